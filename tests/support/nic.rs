//! A driver that sends and receives whole frames, with buffers cut at random.

use std::collections::HashMap;

use super::Random;
use super::driver::{Buffer, DriverRing};
use super::frontend::Guest;

pub(crate) const CSUM: u64 = 1;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;

/// A frame as the driver received it.
#[derive(Debug, PartialEq)]
pub(crate) struct Received {
    pub(crate) header: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) buffers: usize,
}

/// How a driver cuts its buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Bytes of each receive chain.
    pub(crate) rx_bytes: usize,
    /// Most descriptors of a receive chain.
    pub(crate) rx_pieces: usize,
    /// Most descriptors of a transmit chain.
    pub(crate) tx_pieces: usize,
    /// Whether chains may be indirect.
    pub(crate) indirect: bool,
}

/// A driver over one queue pair.
pub(crate) struct Nic {
    pub(crate) guest: Guest,
    shape: Shape,
    /// Where each posted receive chain lies, by head: its buffers and how many descriptors it took.
    posted: HashMap<u32, (Vec<(usize, usize)>, u16)>,
    rx_free: u16,
    rx_slot: usize,
    tx_taken: HashMap<u32, u16>,
    tx_free: u16,
    tx_slot: usize,
}

/// Bytes of one transmit slot; as many as a full frame, a header and slack take.
const TX_SLOT: usize = 0x12000;
const TX_SLOTS: usize = 32;
const TABLE_BYTES: usize = 0x1000;

impl Nic {
    pub(crate) fn new(guest: Guest, shape: Shape) -> Nic {
        let size = guest.rx.size;
        Nic {
            guest,
            shape,
            posted: HashMap::new(),
            rx_free: size,
            rx_slot: 0,
            tx_taken: HashMap::new(),
            tx_free: size,
            tx_slot: 0,
        }
    }

    /// Cuts `len` bytes at `at` into at most `pieces` parts.
    fn cut(at: usize, len: usize, pieces: usize, random: &mut Random) -> Vec<(usize, usize)> {
        let mut cuts: Vec<usize> =
            (0..random.below(pieces as u64)).map(|_| random.below(len as u64 + 1) as usize).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|w| (at + w[0], w[1] - w[0])).collect()
    }

    fn post(
        ring: &mut DriverRing,
        parts: &[(usize, usize)],
        writable: bool,
        table: Option<usize>,
    ) -> (u16, u16) {
        let chain: Vec<_> = parts
            .iter()
            .map(|(at, len)| Buffer { guest: ring.ram.guest(*at), len: *len as u32, writable })
            .collect();
        match table {
            Some(at) => (ring.post_indirect(at, &chain), 1),
            None => (ring.post(&chain), parts.len() as u16),
        }
    }

    /// Posts at most `count` receive chains; kicks if asked to. Returns how many it posted.
    pub(crate) fn post_rx(&mut self, count: usize, random: &mut Random) -> usize {
        let Shape { rx_bytes, rx_pieces, indirect, .. } = self.shape;
        let slot_bytes = (rx_bytes + TABLE_BYTES).next_multiple_of(4096);
        let area = self.guest.heap + TX_SLOTS * (TX_SLOT + TABLE_BYTES);
        let slots = (Guest::RAM_BYTES - area) / slot_bytes;
        let old = self.guest.rx.avail_index();
        let mut done = 0;
        while done < count && self.posted.len() < slots {
            let at = area + self.rx_slot * slot_bytes;
            let parts = Nic::cut(at + TABLE_BYTES, rx_bytes, rx_pieces, random);
            let table = (indirect && random.below(2) == 0).then_some(at);
            let need = if table.is_some() { 1 } else { parts.len() as u16 };
            if need > self.rx_free {
                break;
            }
            self.rx_slot = (self.rx_slot + 1) % slots;
            let (head, taken) = Nic::post(&mut self.guest.rx, &parts, true, table);
            self.rx_free -= taken;
            self.posted.insert(u32::from(head), (parts, taken));
            done += 1;
        }
        if done > 0 {
            self.guest.rx.kick_after(old);
        }
        done
    }

    /// Sends a frame; `false` if the ring is full.
    pub(crate) fn send(&mut self, header: &[u8; 12], frame: &[u8], random: &mut Random) -> bool {
        for (head, _) in self.guest.tx.take_used() {
            self.tx_free += self.tx_taken.remove(&head).expect("only what was posted comes back");
        }
        let header_bytes = self.guest.header_bytes();
        let at = self.guest.heap + self.tx_slot * (TX_SLOT + TABLE_BYTES);
        let parts = Nic::cut(at + TABLE_BYTES, header_bytes + frame.len(), self.shape.tx_pieces, random);
        let table = (self.shape.indirect && random.below(2) == 0).then_some(at);
        let need = if table.is_some() { 1 } else { parts.len() as u16 };
        if need > self.tx_free || self.tx_taken.len() >= TX_SLOTS {
            return false;
        }
        self.tx_slot = (self.tx_slot + 1) % TX_SLOTS;
        self.guest.ram.write(at + TABLE_BYTES, &header[..header_bytes]);
        self.guest.ram.write(at + TABLE_BYTES + header_bytes, frame);
        let old = self.guest.tx.avail_index();
        let (head, taken) = Nic::post(&mut self.guest.tx, &parts, false, table);
        self.tx_free -= taken;
        self.tx_taken.insert(u32::from(head), taken);
        self.guest.tx.kick_after(old);
        true
    }

    /// Frames that arrived. Panics if one is not whole.
    pub(crate) fn receive(&mut self) -> Vec<Received> {
        let mut used = self.guest.rx.take_used().into_iter();
        let mut out = Vec::new();
        let header_bytes = self.guest.header_bytes();
        while let Some(entry) = used.next() {
            let mut bytes = self.take_buffer(entry);
            assert!(bytes.len() >= header_bytes, "the header is in the first buffer");
            let count = if header_bytes == 12 { u16::from_le_bytes([bytes[10], bytes[11]]) } else { 1 };
            assert!(count > 0, "a frame takes a buffer");
            assert!(self.guest.features & MRG_RXBUF != 0 || count == 1, "only mergeable buffers merge");
            for _ in 1..count {
                let entry = used.next().expect("a frame is published with all of its buffers");
                bytes.extend(self.take_buffer(entry));
            }
            let frame = bytes.split_off(header_bytes);
            out.push(Received { header: bytes, bytes: frame, buffers: usize::from(count) });
        }
        out
    }

    fn take_buffer(&mut self, (head, len): (u32, u32)) -> Vec<u8> {
        let (parts, taken) = self.posted.remove(&head).expect("only what was posted comes back");
        self.rx_free += taken;
        let mut left = len as usize;
        let mut out = Vec::new();
        for (at, part) in parts {
            let take = left.min(part);
            out.extend(self.guest.ram.read(at, take));
            left -= take;
        }
        assert_eq!(left, 0, "no more was written than fits");
        out
    }
}
