//! How frames lie in guest memory: slots of pieces, with gaps between them so that a back-end that
//! takes neighbouring descriptors for one buffer reads poison.

use super::features::Features;
use super::ring::{INDIRECT_MAX, Piece};
use crate::sys::mem::{GuestIov, GuestMemory};

/// Room for the longest frame with its header (virtio 1.3, 5.1.6.3.1).
pub(crate) const FRAME_ROOM_BYTES: u32 = 65_562;
/// Ethernet header in bytes.
const ETHERNET_BYTES: u32 = 14;
/// Unused bytes after each piece.
const GAP_BYTES: u64 = 64;

/// Hands out guest-physical addresses of one region, upwards.
#[derive(Debug)]
pub(crate) struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// All of `start..start + len_bytes`.
    pub(crate) fn new(start: u64, len_bytes: u64) -> Arena {
        Arena { next: start, end: start + len_bytes }
    }

    /// The next `len_bytes` bytes at a multiple of `align` plus `skew` bytes.
    ///
    /// # Panics
    /// If the region is used up: sizes are computed before it is made.
    pub(crate) fn take(&mut self, len_bytes: u64, align: u64, skew: u64) -> u64 {
        let at = self.next.next_multiple_of(align) + skew;
        self.next = at + len_bytes;
        assert!(self.next <= self.end, "guest memory was sized for what is laid out in it");
        at
    }
}

/// A buffer for one frame (or one part of a merged frame).
pub(crate) struct Slot {
    /// The pieces in order.
    pub(crate) pieces: Vec<Piece>,
    /// The same pieces for the kernel.
    pub(crate) iovs: Vec<GuestIov>,
}

impl Slot {
    /// Lays the pieces out in `arena`.
    pub(crate) fn lay_out(mem: &GuestMemory, arena: &mut Arena, lens: &[u32]) -> Slot {
        let mut slot = Slot { pieces: Vec::new(), iovs: Vec::new() };
        for &len in lens {
            let addr = arena.take(u64::from(len) + GAP_BYTES, 64, 0);
            slot.pieces.push(Piece { addr, len });
            slot.iovs.push(mem.iov(addr, len as usize));
        }
        slot
    }

    /// Bytes of guest memory a slot of `lens` takes.
    pub(crate) fn footprint_bytes(lens: &[u32]) -> u64 {
        lens.iter().map(|len| (u64::from(*len) + GAP_BYTES).next_multiple_of(64)).sum()
    }

    /// Appends the pieces that hold the first `len_bytes` bytes to `out`.
    pub(crate) fn pieces_of(&self, len_bytes: usize, out: &mut Vec<Piece>) {
        let mut left = len_bytes;
        for piece in &self.pieces {
            if left == 0 {
                break;
            }
            let len = left.min(piece.len as usize);
            out.push(Piece {
                addr: piece.addr,
                len: u32::try_from(len).expect("at most the piece's length"),
            });
            left -= len;
        }
    }

    /// Appends iovecs over the first `len_bytes` bytes to `out`.
    pub(crate) fn iovs_of(&self, len_bytes: usize, out: &mut Vec<GuestIov>) {
        let mut left = len_bytes;
        for iov in &self.iovs {
            if left == 0 {
                break;
            }
            let len = left.min(iov.len());
            out.push(iov.truncated(len));
            left -= len;
        }
    }

    /// Copies the slot's bytes from its start into `to`; returns how many there were.
    pub(crate) fn read(&self, mem: &GuestMemory, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.pieces {
            let len = (to.len() - done).min(piece.len as usize);
            mem.read(piece.addr, &mut to[done..done + len]);
            done += len;
        }
        done
    }

    /// Writes `from` at the slot's start.
    pub(crate) fn write(&self, mem: &GuestMemory, from: &[u8]) {
        self.write_at(mem, 0, from);
    }

    /// Writes `from` at byte `offset` of the slot.
    pub(crate) fn write_at(&self, mem: &GuestMemory, offset: usize, from: &[u8]) {
        let (mut skip, mut done) = (offset, 0);
        for piece in &self.pieces {
            let room = (piece.len as usize).saturating_sub(skip);
            let len = (from.len() - done).min(room);
            if len > 0 {
                mem.write(piece.addr + skip as u64, &from[done..done + len]);
            }
            done += len;
            skip = skip.saturating_sub(piece.len as usize);
        }
    }
}

/// Whether the header must lie in a descriptor of its own (virtio 1.3, 5.1.6.6, legacy interface).
fn header_alone(features: Features) -> bool {
    !features.named("version_1") && !features.named("any_layout")
}

/// Lengths of a transmit slot's pieces: `cuts` in order, the last one repeated until the longest
/// frame fits.
pub(crate) fn tx_pieces(features: Features, cuts: &[u32]) -> Vec<u32> {
    let mut lens = Vec::new();
    let mut room = 0;
    if header_alone(features) {
        lens.push(u32::try_from(features.header_bytes()).expect("10 or 12"));
        room += lens[0];
    }
    let mut cuts = cuts.iter().copied();
    let mut cut = 0;
    while room < FRAME_ROOM_BYTES {
        cut = cuts.next().unwrap_or(cut).max(1);
        let rest = FRAME_ROOM_BYTES - room;
        // The table of an indirect chain is bounded: the last piece takes what is left.
        let len = if lens.len() + 1 == INDIRECT_MAX { rest } else { cut.min(rest) };
        lens.push(len);
        room += len;
    }
    lens
}

/// Lengths of a receive slot's pieces, in bytes, for buffers of `buffer_bytes`.
///
/// With MRG_RXBUF one piece; else, if the device may send more than the MTU, pieces up to the longest
/// frame; else one buffer with room for the MTU (virtio 1.3, 5.1.6.3.1).
pub(crate) fn rx_pieces(features: Features, buffer_bytes: u32, ip_mtu: u32) -> Vec<u32> {
    if features.named("mrg_rxbuf") {
        return vec![buffer_bytes.max(128)];
    }
    let header = u32::try_from(features.header_bytes()).expect("10 or 12");
    if features.guest_gso() {
        // Half an indirect table is enough for any frame: smaller buffers than that make no chain.
        let least = FRAME_ROOM_BYTES / u32::try_from(INDIRECT_MAX / 2).expect("small");
        return tx_pieces(features, &[buffer_bytes.max(least)]);
    }
    let frame = buffer_bytes.max(header + ETHERNET_BYTES + ip_mtu);
    if header_alone(features) { vec![header, frame - header] } else { vec![frame] }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(text: &str) -> Features {
        text.parse().unwrap()
    }

    #[test]
    fn transmit_pieces_hold_the_longest_frame_whatever_the_cuts() {
        for cuts in [&[128, 32_768][..], &[12, 4096], &[1, 13, 1024], &[10]] {
            for features in ["none", "version_1", "any_layout"] {
                let lens = tx_pieces(set(features), cuts);
                assert_eq!(lens.iter().sum::<u32>(), FRAME_ROOM_BYTES, "{cuts:?} {features}");
                assert!(lens.len() <= INDIRECT_MAX);
            }
        }
    }

    #[test]
    fn legacy_header_lies_alone() {
        assert_eq!(tx_pieces(Features::NONE, &[4096])[0], 10);
        assert_eq!(rx_pieces(Features::NONE, 1536, 1500), [10, 1526]);
    }

    #[test]
    fn receive_pieces_follow_what_the_device_may_send() {
        assert_eq!(rx_pieces(set("version_1,mrg_rxbuf,guest_csum,guest_tso4"), 1536, 1500), [1536]);
        assert_eq!(rx_pieces(set("version_1"), 100, 1500), [1526]);
        let big = rx_pieces(set("version_1,guest_csum,guest_tso4"), 4096, 1500);
        assert_eq!(big.iter().sum::<u32>(), FRAME_ROOM_BYTES);
        assert_eq!(big[0], 4096);
    }
}
