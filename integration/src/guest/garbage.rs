//! Nonsense for the device: broken descriptor chains and impossible headers.

use super::ring::{Piece, RawNext};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Kinds of broken chains.
pub(crate) const GARBAGE_KINDS: usize = 12;

/// Broken chain number `kind`: a descriptor, its flags and successor. `good` is a piece of memory
/// the device may read, `ring_size` the ring's number of descriptors.
pub(crate) fn chain(kind: usize, good: Piece, ring_size: u16) -> (Piece, u16, RawNext) {
    let at = |addr: u64, len: u32| Piece { addr, len };
    let end = RawNext::Index(0);
    match kind {
        0 => (good, F_NEXT, RawNext::Itself),
        1 => (good, F_NEXT, RawNext::Index(ring_size)),
        2 => (good, F_NEXT, RawNext::Index(u16::MAX)),
        3 => (at(0, 60), 0, end),
        4 => (at(u64::MAX - 8, 64), 0, end),
        5 => (at(good.addr, u32::MAX), 0, end),
        6 => (at(good.addr, 0), 0, end),
        7 => (at(good.addr, 5), 0, end),
        8 => (good, F_WRITE, end),
        9 => (at(good.addr, 16), F_INDIRECT, end),
        10 => (at(good.addr, 17), F_INDIRECT, end),
        _ => (at(good.addr, 65_535 * 16), F_INDIRECT | F_NEXT, RawNext::Itself),
    }
}

/// Kinds of impossible headers.
pub(crate) const HEADER_KINDS: usize = 8;

/// Impossible virtio-net header number `kind` for a frame of `frame_bytes`; its first 10 bytes.
pub(crate) fn header(kind: usize, frame_bytes: usize) -> [u8; 10] {
    let len = u16::try_from(frame_bytes).unwrap_or(u16::MAX);
    let make = |flags: u8, gso: u8, hdr_len: u16, size: u16, start: u16, offset: u16| {
        let mut out = [0u8; 10];
        out[0] = flags;
        out[1] = gso;
        for (at, value) in [hdr_len, size, start, offset].into_iter().enumerate() {
            out[2 + 2 * at..4 + 2 * at].copy_from_slice(&value.to_le_bytes());
        }
        out
    };
    match kind {
        0 => make(1, 0, 0, 0, len, 0),
        1 => make(1, 0, 0, 0, u16::MAX, u16::MAX),
        2 => make(1, 1, 54, 0, 34, 16),
        3 => make(1, 0x7f, 54, 1448, 34, 16),
        4 => make(0, 1, 54, 1448, 0, 0),
        5 => make(1, 1, u16::MAX, 1, 34, 16),
        6 => make(1, 4, 54, 1448, 34, 16),
        _ => make(0xff, 0x83, 1, u16::MAX, 1, 1),
    }
}
