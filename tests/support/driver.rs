//! The driver's side of a split virtqueue, able to do it right and to do it wrong.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ram::Ram;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) guest: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A ring as its driver sees it. It lies at `base` of the memory.
pub(crate) struct DriverRing {
    pub(crate) ram: Arc<Ram>,
    pub(crate) base: usize,
    pub(crate) size: u16,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) err: EventFd,
    pub(crate) event_idx: bool,
    /// Kicks really sent.
    pub(crate) kicks: u64,
    avail_index: u16,
    used_seen: u16,
    next_descriptor: u16,
}

impl DriverRing {
    /// Bytes a ring of `size` takes, rounded up to pages.
    pub(crate) fn bytes(size: u16) -> usize {
        let n = usize::from(size);
        (16 * n).next_multiple_of(16)
            + (6 + 2 * n).next_multiple_of(64)
            + (6 + 8 * n).next_multiple_of(4096)
            + 4096
    }

    pub(crate) fn new(ram: &Arc<Ram>, base: usize, size: u16) -> DriverRing {
        let event = || EventFd::new(EFD_NONBLOCK).expect("a descriptor");
        DriverRing {
            ram: Arc::clone(ram),
            base,
            size,
            kick: event(),
            call: event(),
            err: event(),
            event_idx: false,
            kicks: 0,
            avail_index: 0,
            used_seen: 0,
            next_descriptor: 0,
        }
    }

    pub(crate) fn descriptors_at(&self) -> usize {
        self.base
    }

    pub(crate) fn avail_at(&self) -> usize {
        self.base + 16 * usize::from(self.size)
    }

    pub(crate) fn used_at(&self) -> usize {
        (self.avail_at() + 6 + 2 * usize::from(self.size)).next_multiple_of(64)
    }

    /// Starts over, as a driver does after a reset.
    pub(crate) fn reset(&mut self) {
        let zeroes = vec![0; Self::bytes(self.size)];
        self.ram.write(self.base, &zeroes);
        self.avail_index = 0;
        self.used_seen = 0;
        self.next_descriptor = 0;
    }

    pub(crate) fn set_descriptor(&self, index: u16, guest: u64, len: u32, flags: u16, next: u16) {
        let at = self.descriptors_at() + 16 * usize::from(index);
        self.ram.write(at, &descriptor(guest, len, flags, next));
    }

    /// Puts a chain into descriptors of its own and makes it available. Returns its head.
    pub(crate) fn post(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.place(chain);
        self.make_available(head);
        head
    }

    /// Puts a chain into descriptors of its own, without making it available.
    pub(crate) fn place(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (n, buffer) in chain.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (self.next_descriptor + 1) % self.size;
            let more = if n + 1 < chain.len() { NEXT } else { 0 };
            let flags = more | if buffer.writable { WRITE } else { 0 };
            self.set_descriptor(index, buffer.guest, buffer.len, flags, self.next_descriptor);
        }
        head
    }

    /// Puts a chain into an indirect table at `table_at` of the memory and makes it available.
    pub(crate) fn post_indirect(&mut self, table_at: usize, chain: &[Buffer]) -> u16 {
        for (n, buffer) in chain.iter().enumerate() {
            let more = if n + 1 < chain.len() { NEXT } else { 0 };
            let flags = more | if buffer.writable { WRITE } else { 0 };
            self.ram.write(table_at + 16 * n, &descriptor(buffer.guest, buffer.len, flags, n as u16 + 1));
        }
        let head = self.next_descriptor;
        self.next_descriptor = (self.next_descriptor + 1) % self.size;
        self.set_descriptor(head, self.ram.guest(table_at), 16 * chain.len() as u32, INDIRECT, 0);
        self.make_available(head);
        head
    }

    /// Makes `head` available, whatever it is.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = usize::from(self.avail_index % self.size);
        self.ram.store_u16(self.avail_at() + 4 + 2 * slot, head);
        self.avail_index = self.avail_index.wrapping_add(1);
        self.ram.store_u16(self.avail_at() + 2, self.avail_index);
    }

    /// Stores an avail index out of the blue.
    pub(crate) fn force_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        self.ram.store_u16(self.avail_at() + 2, index);
    }

    pub(crate) fn avail_index(&self) -> u16 {
        self.avail_index
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.ram.load_u16(self.used_at() + 2)
    }

    /// Writes a used index, as another device that worked the ring before would have.
    pub(crate) fn force_used_index(&mut self, index: u16) {
        self.ram.store_u16(self.used_at() + 2, index);
        self.used_seen = index;
        self.force_avail_index(index);
    }

    /// Whether the device asked for a kick after the avail index moved from `old`.
    pub(crate) fn kick_wanted(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.ram.load_u16(self.used_at() + 4 + 8 * usize::from(self.size));
            self.avail_index.wrapping_sub(event).wrapping_sub(1) < self.avail_index.wrapping_sub(old)
        } else {
            self.ram.load_u16(self.used_at()) & 1 == 0
        }
    }

    /// Kicks if the device asked for it, as a driver does that posted since `old`.
    pub(crate) fn kick_after(&mut self, old: u16) {
        if self.kick_wanted(old) {
            self.kick_now();
        }
    }

    /// Kicks whether the device asked or not.
    pub(crate) fn kick_now(&mut self) {
        self.kicks += 1;
        self.kick.write(1).expect("a kick");
    }

    /// Takes the used entries that appeared: (head, length).
    pub(crate) fn take_used(&mut self) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        let index = self.used_index();
        while self.used_seen != index {
            let at = self.used_at() + 4 + 8 * usize::from(self.used_seen % self.size);
            out.push((self.ram.load_u32(at), self.ram.load_u32(at + 4)));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        if self.event_idx {
            self.ram.store_u16(self.avail_at() + 4 + 2 * usize::from(self.size), self.used_seen);
        }
        out
    }

    /// Chains posted whose completion was not taken yet.
    pub(crate) fn outstanding(&self) -> u16 {
        self.avail_index.wrapping_sub(self.used_seen)
    }

    /// Calls received since the last look.
    pub(crate) fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

/// The 16 bytes of a descriptor.
pub(crate) fn descriptor(guest: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut out = [0; 16];
    out[0..8].copy_from_slice(&guest.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..14].copy_from_slice(&flags.to_le_bytes());
    out[14..16].copy_from_slice(&next.to_le_bytes());
    out
}
