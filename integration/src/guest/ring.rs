//! The driver's side of a split virtqueue.
//!
//! Descriptors are handed out from a stack of free ones, so that chains get scattered and a
//! back-end that assumes neighbours fails. What the device writes is checked, never trusted: each
//! breach is counted in [`RingFaults`].
//!
//! Read first: virtio 1.3, 2.7 (split virtqueues), above all 2.7.13 and 2.7.14 (memory barriers).

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use crate::sys::mem::GuestMemory;

const DESC_BYTES: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// Most descriptors of one indirect table here: a 64 KiB frame in pieces of 1 KiB and its header.
pub(crate) const INDIRECT_MAX: usize = 68;

/// A piece of guest memory: guest-physical address and length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Guest-physical address.
    pub(crate) addr: u64,
    /// Length in bytes.
    pub(crate) len: u32,
}

/// Where a ring lies in guest memory, as guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingAddrs {
    /// Descriptor table.
    pub(crate) desc: u64,
    /// Available ring.
    pub(crate) avail: u64,
    /// Used ring.
    pub(crate) used: u64,
    /// One indirect table of [`INDIRECT_MAX`] descriptors per ring entry.
    pub(crate) indirect: u64,
}

impl RingAddrs {
    /// Bytes of indirect tables a ring of `size` needs.
    pub(crate) fn indirect_bytes(size: u16) -> u64 {
        u64::from(size) * INDIRECT_MAX as u64 * DESC_BYTES
    }
}

/// How a ring is driven.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingOptions {
    /// Entries, a power of two.
    pub(crate) size: u16,
    /// The device writes into the buffers (a receive ring).
    pub(crate) device_writes: bool,
    /// `VIRTIO_RING_F_EVENT_IDX` is negotiated.
    pub(crate) event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC` is negotiated.
    pub(crate) indirect: bool,
    /// `VIRTIO_F_IN_ORDER` is negotiated.
    pub(crate) in_order: bool,
}

/// Breaches of the specification by the device, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RingFaults {
    /// A used element named a chain that is not in flight.
    pub(crate) unknown_id: u64,
    /// A used element's length exceeds what the device may write.
    pub(crate) bad_len: u64,
    /// With IN_ORDER: a chain completed out of turn.
    pub(crate) out_of_order: u64,
    /// The used index ran ahead of what is in flight.
    pub(crate) index_ahead: u64,
}

/// A chain the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// What the driver called it.
    pub(crate) token: u16,
    /// Bytes the device says it wrote.
    pub(crate) len: u32,
}

#[derive(Clone, Copy, Debug)]
struct InFlight {
    token: u16,
    descs: u16,
    writable_bytes: u32,
}

/// There are not enough free descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// The driver's side of one split ring.
pub(crate) struct DriverRing {
    mem: &'static GuestMemory,
    addrs: RingAddrs,
    options: RingOptions,
    free: Vec<u16>,
    next: Vec<u16>,
    in_flight: Vec<Option<InFlight>>,
    order: VecDeque<u16>,
    avail_next: u16,
    avail_published: u16,
    used_next: u16,
    /// Breaches seen so far.
    pub(crate) faults: RingFaults,
}

impl DriverRing {
    /// An empty ring at `addrs`; the memory there is zero.
    pub(crate) fn new(mem: &'static GuestMemory, addrs: RingAddrs, options: RingOptions) -> DriverRing {
        assert!(options.size.is_power_of_two(), "ring sizes are powers of two");
        DriverRing {
            mem,
            addrs,
            options,
            free: (0..options.size).rev().collect(),
            next: vec![0; usize::from(options.size)],
            in_flight: vec![None; usize::from(options.size)],
            order: VecDeque::new(),
            avail_next: 0,
            avail_published: 0,
            used_next: 0,
            faults: RingFaults::default(),
        }
    }

    /// Where the ring lies.
    pub(crate) fn addrs(&self) -> RingAddrs {
        self.addrs
    }

    /// Entries.
    pub(crate) fn size(&self) -> u16 {
        self.options.size
    }

    /// Descriptors a chain of `pieces` pieces takes.
    pub(crate) fn cost(&self, pieces: usize) -> usize {
        if self.options.indirect && pieces > 1 { 1 } else { pieces }
    }

    /// Free descriptors.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains the device has not used yet, or that were used and not taken back.
    pub(crate) fn in_flight(&self) -> usize {
        self.order.len()
    }

    /// The device's used index, as it stands in memory.
    pub(crate) fn used_index(&self) -> u16 {
        self.mem.u16_at(self.addrs.used + 2).load(Ordering::Acquire)
    }

    fn write_desc(&self, at: u64, piece: Piece, flags: u16, next: u16) {
        self.mem.u64_at(at).store(piece.addr.to_le(), Ordering::Relaxed);
        self.mem.u32_at(at + 8).store(piece.len.to_le(), Ordering::Relaxed);
        self.mem.u16_at(at + 12).store(flags.to_le(), Ordering::Relaxed);
        self.mem.u16_at(at + 14).store(next.to_le(), Ordering::Relaxed);
    }

    fn desc_addr(&self, index: u16) -> u64 {
        self.addrs.desc + DESC_BYTES * u64::from(index)
    }

    /// Puts a chain of `pieces` in the ring under the driver's name `token`; the device sees it
    /// after [`Self::publish`].
    ///
    /// # Errors
    /// [`Full`] if there are not enough free descriptors; nothing happened then.
    pub(crate) fn add(&mut self, pieces: &[Piece], token: u16) -> Result<(), Full> {
        let cost = self.cost(pieces.len());
        if pieces.is_empty() || self.free.len() < cost {
            return Err(Full);
        }
        let write = if self.options.device_writes { F_WRITE } else { 0 };
        let head = *self.free.last().ok_or(Full)?;
        if cost < pieces.len() {
            self.write_indirect(head, pieces, write);
            self.free.pop();
        } else {
            for (at, piece) in pieces.iter().enumerate() {
                let this = self.free.pop().ok_or(Full)?;
                let following = self.free.last().copied().unwrap_or(0);
                let last = at + 1 == pieces.len();
                let (flags, next) = if last { (write, 0) } else { (write | F_NEXT, following) };
                self.write_desc(self.desc_addr(this), *piece, flags, next);
                self.next[usize::from(this)] = next;
            }
        }
        let writable = if self.options.device_writes { pieces.iter().map(|p| p.len).sum() } else { 0 };
        let descs = u16::try_from(cost).expect("a chain is not longer than the ring");
        self.enqueue(head, InFlight { token, descs, writable_bytes: writable });
        Ok(())
    }

    fn write_indirect(&self, head: u16, pieces: &[Piece], write: u16) {
        let table = self.addrs.indirect + u64::from(head) * INDIRECT_MAX as u64 * DESC_BYTES;
        assert!(pieces.len() <= INDIRECT_MAX, "a frame is cut into at most INDIRECT_MAX pieces");
        for (at, piece) in (0u16..).zip(pieces) {
            let last = usize::from(at) + 1 == pieces.len();
            let (flags, next) = if last { (write, 0) } else { (write | F_NEXT, at + 1) };
            self.write_desc(table + DESC_BYTES * u64::from(at), *piece, flags, next);
        }
        let len = u32::try_from(pieces.len() as u64 * DESC_BYTES).expect("a table of few descriptors");
        self.write_desc(self.desc_addr(head), Piece { addr: table, len }, F_INDIRECT, 0);
    }

    /// Writes one raw descriptor and offers it as a chain: for tests of what a device makes of
    /// nonsense. Takes one descriptor.
    ///
    /// # Errors
    /// [`Full`] if there is no free descriptor.
    pub(crate) fn add_raw(
        &mut self,
        piece: Piece,
        flags: u16,
        next: RawNext,
        token: u16,
    ) -> Result<(), Full> {
        let head = self.free.pop().ok_or(Full)?;
        let next = match next {
            RawNext::Itself => head,
            RawNext::Index(index) => index,
        };
        self.write_desc(self.desc_addr(head), piece, flags, next);
        self.enqueue(head, InFlight { token, descs: 1, writable_bytes: u32::MAX });
        Ok(())
    }

    fn enqueue(&mut self, head: u16, chain: InFlight) {
        self.in_flight[usize::from(head)] = Some(chain);
        self.order.push_back(head);
        let slot = u64::from(self.avail_next & (self.options.size - 1));
        self.mem.u16_at(self.addrs.avail + 4 + 2 * slot).store(head.to_le(), Ordering::Relaxed);
        self.avail_next = self.avail_next.wrapping_add(1);
    }

    /// Shows the device everything added so far. Returns whether it wants to be notified.
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.avail_published, self.avail_next);
        if old == new {
            return false;
        }
        // The descriptors and ring entries above must be visible before the index (2.7.13.3.1).
        self.mem.u16_at(self.addrs.avail + 2).store(new.to_le(), Ordering::Release);
        self.avail_published = new;
        // And the index before the device's wish is read (2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.options.event_idx {
            let event = self.avail_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.mem.u16_at(self.addrs.used).load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    fn avail_event(&self) -> u16 {
        let at = self.addrs.used + 4 + 8 * u64::from(self.options.size);
        u16::from_le(self.mem.u16_at(at).load(Ordering::Relaxed))
    }

    /// Jumps the available index far ahead of what is there: breaks the ring for good.
    pub(crate) fn break_avail_index(&mut self) {
        let wild = self.avail_next.wrapping_add(self.options.size).wrapping_add(7);
        self.mem.u16_at(self.addrs.avail + 2).store(wild.to_le(), Ordering::Release);
    }

    /// Chains used by the device and not yet taken.
    pub(crate) fn used_pending(&mut self) -> u16 {
        let ahead = self.used_index().wrapping_sub(self.used_next);
        if usize::from(ahead) > self.order.len() {
            self.faults.index_ahead += 1;
            return 0;
        }
        ahead
    }

    /// Takes up to `max` used chains into `out`.
    pub(crate) fn take_used(&mut self, max: usize, out: &mut impl Extend<Used>) {
        let mut pending = usize::from(self.used_pending()).min(max);
        while pending > 0 {
            let slot = u64::from(self.used_next & (self.options.size - 1));
            let at = self.addrs.used + 4 + 8 * slot;
            let id = u32::from_le(self.mem.u32_at(at).load(Ordering::Relaxed));
            let len = u32::from_le(self.mem.u32_at(at + 4).load(Ordering::Relaxed));
            let taken = self.take_element(id, len, pending, out);
            self.used_next = self.used_next.wrapping_add(u16::try_from(taken).unwrap_or(1));
            pending -= taken;
        }
    }

    /// Takes the chain `id`; with IN_ORDER also those before it that share its used element
    /// (virtio 1.3, 2.7.9.1). Returns how many ring entries that was.
    fn take_element(&mut self, id: u32, len: u32, limit: usize, out: &mut impl Extend<Used>) -> usize {
        let head = u16::try_from(id)
            .ok()
            .filter(|head| self.in_flight.get(usize::from(*head)).is_some_and(Option::is_some));
        let Some(head) = head else {
            self.faults.unknown_id += 1;
            return 1;
        };
        let Some(at) = self.order.iter().position(|queued| *queued == head) else {
            self.faults.unknown_id += 1;
            return 1;
        };
        if self.options.in_order && at > 0 {
            if at < limit {
                for _ in 0..at {
                    let skipped = self.order.pop_front().expect("position is within the queue");
                    let bytes = self.in_flight[usize::from(skipped)].map_or(0, |c| c.writable_bytes);
                    self.release(skipped, bytes, out);
                }
                self.order.pop_front();
                self.release(head, len, out);
                return at + 1;
            }
            self.faults.out_of_order += 1;
        }
        self.order.remove(at);
        self.release(head, len, out);
        1
    }

    fn release(&mut self, head: u16, len: u32, out: &mut impl Extend<Used>) {
        let chain = self.in_flight[usize::from(head)].take().expect("only chains in flight are released");
        let mut index = head;
        for _ in 0..chain.descs {
            self.free.push(index);
            index = self.next[usize::from(index)];
        }
        if len > chain.writable_bytes {
            self.faults.bad_len += 1;
        }
        out.extend([Used { token: chain.token, len: len.min(chain.writable_bytes) }]);
    }

    /// Asks for a notification when `after` more chains are used (1: the next one). Returns whether
    /// chains were used meanwhile: then the caller looks again instead of sleeping.
    pub(crate) fn arm(&mut self, after: u16) -> bool {
        if self.options.event_idx {
            let event = self.used_next.wrapping_add(after.max(1) - 1);
            let at = self.addrs.avail + 4 + 2 * u64::from(self.options.size);
            self.mem.u16_at(at).store(event.to_le(), Ordering::Relaxed);
        } else {
            self.mem.u16_at(self.addrs.avail).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read again (2.7.14).
        fence(Ordering::SeqCst);
        self.used_index().wrapping_sub(self.used_next) >= after.max(1)
    }

    /// Asks for no notifications. With EVENT_IDX the event passed last does that by itself.
    pub(crate) fn disarm(&mut self) {
        if !self.options.event_idx {
            self.mem.u16_at(self.addrs.avail).store(AVAIL_NO_INTERRUPT.to_le(), Ordering::Relaxed);
        }
    }
}

/// The `next` field of a raw descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RawNext {
    /// The descriptor itself: a loop.
    Itself,
    /// This index, whether it exists or not.
    Index(u16),
}
