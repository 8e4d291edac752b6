//! A split virtqueue, the device's side.
//!
//! The order of things is the specification's (virtio 1.3, 2.7.8 and 2.7.13): the avail index is
//! loaded before the entries it covers, used entries are stored before the one store of the used
//! index that publishes a whole batch, and a full fence stands between an index and the event field
//! of the other side. On start both indices come from `used->idx`, whatever the front-end says:
//! completions are in order and nothing is left in flight, so that is always the truth.
//!
//! The guest may write anything at any time. A malformed chain costs that chain; an avail index or
//! head that cannot be costs the ring ([`RingFault`]).
//!
//! May touch: its areas of guest memory. Read first: virtio 1.3, 2.7.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::chain::{self, ChainBuf, ChainError};
use super::features::{Feature, Features};
use super::guest_mem::{Area, AreaError, GuestMemory};
use super::sys::Notifier;

/// Where a ring's three parts lie, in the front-end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingAddrs {
    pub(super) descriptors: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// Why a ring was stopped until the front-end starts it again.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RingFault {
    /// The avail index covers more entries than the ring has.
    #[error("avail index {avail} is more than the ring's {size} entries ahead of used index {used}")]
    AvailIndex {
        /// The index the driver stored.
        avail: u16,
        /// The used index published last.
        used: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// An avail entry names no descriptor.
    #[error("avail entry names descriptor {head} of {size}")]
    Head {
        /// The descriptor named.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// After a change of the memory table the ring lies in no region.
    #[error("the ring is no longer in memory: {0}")]
    Gone(#[from] AreaError),
    /// The front-end shrank the file behind the guest's memory.
    #[error("guest memory was lost: its file was truncated")]
    MemoryLost,
}

/// What [`Ring::pop`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Popped {
    /// Nothing available.
    Empty,
    /// A chain, appended to the buffer given.
    Chain {
        /// Its first descriptor.
        head: u16,
    },
    /// A malformed chain, to be completed with length zero.
    Bad {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        why: ChainError,
    },
}

/// What was negotiated that concerns rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RingOptions {
    pub(super) event_idx: bool,
    pub(super) indirect: bool,
}

impl RingOptions {
    pub(super) fn from_features(features: Features) -> RingOptions {
        RingOptions {
            event_idx: features.has(Feature::EVENT_IDX),
            indirect: features.has(Feature::INDIRECT_DESC),
        }
    }
}

/// Byte offset of the index in avail and used ring, after the flags.
const INDEX_AT: usize = 2;
/// Byte offset of the first entry, after flags and index.
const ENTRIES_AT: usize = 4;
const AVAIL_ENTRY_BYTES: usize = 2;
const USED_ENTRY_BYTES: usize = 8;
const DESCRIPTOR_BYTES: usize = size_of::<Descriptor>();

/// A running ring.
#[derive(Debug)]
pub(super) struct Ring {
    size: u16,
    addrs: RingAddrs,
    options: RingOptions,
    descriptors: Area,
    avail: Area,
    used: Area,
    /// The avail entry to pop next.
    next_avail: u16,
    /// The driver's index when it was last loaded.
    avail_seen: u16,
    /// The used entry to write next.
    next_used: u16,
    /// The used index the driver sees.
    published: u16,
    /// Whether the driver was ever asked about an interrupt since the start.
    asked: bool,
    armed: bool,
    pub(super) call: Option<Notifier>,
    /// A call was due while there was no descriptor for it.
    call_missed: bool,
}

impl Ring {
    /// Starts a ring of `size` entries (a power of two) where its used index stands.
    pub(super) fn start(
        size: u16,
        addrs: RingAddrs,
        options: RingOptions,
        memory: &GuestMemory,
    ) -> Result<Ring, AreaError> {
        let (descriptors, avail, used) = locate(size, addrs, memory)?;
        let index = used.load_u16(INDEX_AT);
        let mut ring = Ring {
            size,
            addrs,
            options,
            descriptors,
            avail,
            used,
            next_avail: index,
            avail_seen: index,
            next_used: index,
            published: index,
            asked: false,
            armed: false,
            call: None,
            call_missed: false,
        };
        ring.write_notification_wish(false);
        Ok(ring)
    }

    /// Moves the ring to a new snapshot of memory.
    pub(super) fn relocate(&mut self, memory: &GuestMemory) -> Result<(), AreaError> {
        (self.descriptors, self.avail, self.used) = locate(self.size, self.addrs, memory)?;
        Ok(())
    }

    pub(super) fn set_options(&mut self, options: RingOptions) {
        self.options = options;
        self.asked = false;
        self.write_notification_wish(self.armed);
    }

    /// Entries of the ring.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The index of the next chain to pop, which is where the ring goes on after a stop.
    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Chains seen available and not popped.
    pub(super) fn seen_available(&self) -> u16 {
        self.avail_seen.wrapping_sub(self.next_avail)
    }

    /// Entries the driver made available that were not popped, by its word; never more than the ring has.
    pub(super) fn available(&self) -> u16 {
        self.avail.load_u16(INDEX_AT).wrapping_sub(self.next_avail).min(self.size)
    }

    /// Loads the driver's index.
    fn refresh(&mut self) -> Result<(), RingFault> {
        let avail = self.avail.load_u16(INDEX_AT);
        let outstanding = avail.wrapping_sub(self.published);
        if outstanding > self.size || avail.wrapping_sub(self.next_avail) > outstanding {
            return Err(RingFault::AvailIndex { avail, used: self.published, size: self.size });
        }
        self.avail_seen = avail;
        Ok(())
    }

    /// Pops the next chain and appends its segments to `buf`.
    pub(super) fn pop(&mut self, buf: &mut ChainBuf) -> Result<Popped, RingFault> {
        if self.next_avail == self.avail_seen {
            self.refresh()?;
            if self.next_avail == self.avail_seen {
                return Ok(Popped::Empty);
            }
        }
        let slot = usize::from(self.next_avail & (self.size - 1));
        let head = self.avail.load_u16(ENTRIES_AT + slot * AVAIL_ENTRY_BYTES);
        if head >= self.size {
            return Err(RingFault::Head { head, size: self.size });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        let direct = |index: u16| self.descriptor(index);
        match chain::walk(head, self.size, self.options.indirect, direct, buf) {
            Ok(()) => Ok(Popped::Chain { head }),
            Err(why) => Ok(Popped::Bad { head, why }),
        }
    }

    fn descriptor(&self, index: u16) -> Descriptor {
        let bytes = self.descriptors.load_16_bytes(usize::from(index) * DESCRIPTOR_BYTES);
        let mut descriptor = Descriptor::default();
        descriptor.as_mut_slice().copy_from_slice(&bytes);
        descriptor
    }

    /// Gives the `count` chains popped last back, to be popped again.
    pub(super) fn unpop(&mut self, count: u16) {
        let held = self.next_avail.wrapping_sub(self.next_used);
        assert!(count <= held, "only chains that were popped and not completed go back");
        self.next_avail = self.next_avail.wrapping_sub(count);
    }

    /// Completes a chain into which `len_bytes` were written; the driver sees it at the next
    /// [`Ring::publish`].
    pub(super) fn complete(&mut self, head: u16, len_bytes: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let at = ENTRIES_AT + slot * USED_ENTRY_BYTES;
        self.used.store_u32(at, u32::from(head));
        self.used.store_u32(at + 4, len_bytes);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Publishes what was completed with one store and notifies the driver if it wants that.
    /// Returns whether it was notified.
    pub(super) fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        let old = self.published;
        self.used.store_u16(INDEX_AT, self.next_used);
        self.published = self.next_used;
        // The driver stores its wish, then loads the used index; we do the reverse. One of the two
        // must see the other's store (virtio 1.3, 2.7.7.2).
        fence(Ordering::SeqCst);
        // The event a driver left behind from before this start says nothing: the first batch calls.
        let first = !std::mem::replace(&mut self.asked, true) && self.options.event_idx;
        (first || self.driver_wants_call(old)) && self.notify_driver()
    }

    fn driver_wants_call(&self, old: u16) -> bool {
        if self.options.event_idx {
            let event = self.avail.load_u16(ENTRIES_AT + usize::from(self.size) * AVAIL_ENTRY_BYTES);
            // virtio 1.3, 2.7.7.1: the index passed the event in this batch.
            let since_event = self.published.wrapping_sub(event).wrapping_sub(1);
            since_event < self.published.wrapping_sub(old)
        } else {
            self.avail.load_u16(0) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    fn notify_driver(&mut self) -> bool {
        match &self.call {
            Some(call) => {
                if let Err(error) = call.notify() {
                    tracing::warn!(%error, "the front-end's call descriptor cannot be written; dropped");
                    self.call = None;
                }
                true
            }
            None => {
                self.call_missed = true;
                false
            }
        }
    }

    /// Replaces the call descriptor and makes up for a call that was due without one.
    pub(super) fn set_call(&mut self, call: Option<Notifier>) {
        self.call = call;
        if self.call.is_some() && std::mem::take(&mut self.call_missed) {
            self.notify_driver();
        }
    }

    /// Asks the driver for a kick when it makes more chains available than were seen. Returns
    /// whether it has done so already: then there may be no kick.
    pub(super) fn arm(&mut self) -> Result<bool, RingFault> {
        let seen = self.avail_seen;
        self.write_notification_wish(true);
        fence(Ordering::SeqCst);
        self.refresh()?;
        Ok(self.avail_seen != seen)
    }

    /// Asks the driver not to kick.
    pub(super) fn disarm(&mut self) {
        if self.armed {
            self.write_notification_wish(false);
        }
    }

    fn write_notification_wish(&mut self, armed: bool) {
        self.armed = armed;
        if self.options.event_idx {
            // A past index never matches until the index wraps: leaving it is the way not to be
            // kicked (virtio 1.3, 2.7.10.1). The flags must then be zero.
            let event = if armed { self.avail_seen } else { self.avail_seen.wrapping_sub(1) };
            self.used.store_u16(ENTRIES_AT + usize::from(self.size) * USED_ENTRY_BYTES, event);
            self.used.store_u16(0, 0);
        } else {
            self.used.store_u16(0, if armed { 0 } else { VRING_USED_F_NO_NOTIFY as u16 });
        }
    }
}

/// The three areas of a ring. All of each must lie in memory, the event fields included.
fn locate(size: u16, addrs: RingAddrs, memory: &GuestMemory) -> Result<(Area, Area, Area), AreaError> {
    let entries = usize::from(size);
    let avail_bytes = ENTRIES_AT + entries * AVAIL_ENTRY_BYTES + 2;
    let used_bytes = ENTRIES_AT + entries * USED_ENTRY_BYTES + 2;
    Ok((
        memory.area(addrs.descriptors, entries * DESCRIPTOR_BYTES, 16)?,
        memory.area(addrs.avail, avail_bytes, 2)?,
        memory.area(addrs.used, used_bytes, 4)?,
    ))
}

/// Memory shared by all rings of a device.
pub(super) type SharedMemory = Arc<GuestMemory>;
