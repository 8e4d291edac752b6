//! What a translation changes in a frame: one end's address and port, the hop count, and the checksums over them.
//!
//! Checksums are never summed anew: what a flow's translation adds to them is always the same
//! ([`ChecksumDeltas`]), so a packet costs three additions. A complete checksum changes by address and port; a partial
//! one, the pseudo-header's sum, by the address alone, as the port lies among the bytes that are still to be summed. Frames
//! to be cut into segments are changed as they are: each segment's checksum comes out as if it alone had been changed.
//!
//! One's complement has two zeros. A sum over bytes that are not all zero is never `0x0000`, and neither is what is
//! added here to one that is not, so incremental and full results are the same bits (RFC 1624, 3).
//!
//! Read first: RFC 1624; RFC 3022, 4.2; RFC 768 (no checksum is `0x0000`, a sum of zero is sent as `0xffff`).

use std::net::Ipv4Addr;

use super::flow::ChecksumDeltas;
use super::head::{ICMP_CHECKSUM, ICMP_IDENT, IP_AT, Transport, View, checksum_offset};
use crate::wire::checksum::udp_nonzero;
use crate::wire::ipv4::Protocol;

/// Where fields stand in the IPv4 header, in bytes.
pub(super) const TTL: usize = 8;
pub(super) const IP_CHECKSUM: usize = 10;
pub(super) const SOURCE: usize = 12;
pub(super) const DESTINATION: usize = 16;

/// What one hop less adds to the header's checksum: the complement of one in the upper half of a word.
pub(super) const HOP_DELTA: u16 = !0x0100;

/// Which end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its sender.
    Source,
    /// Its receiver.
    Destination,
}

/// What an end becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewEnd {
    /// Which.
    pub end: End,
    /// Its address.
    pub addr: Ipv4Addr,
    /// Its port or ICMP identifier; without meaning in packets that have none.
    pub port: u16,
    /// What this adds to checksums.
    pub deltas: ChecksumDeltas,
}

impl ChecksumDeltas {
    /// What it adds that `old` becomes `new`, each an address and a port.
    pub fn between(old: (Ipv4Addr, u16), new: (Ipv4Addr, u16)) -> ChecksumDeltas {
        let halves = |addr: Ipv4Addr| {
            let [a, b, c, d] = addr.octets();
            (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
        };
        let ((old_high, old_low), (new_high, new_low)) = (halves(old.0), halves(new.0));
        let address = add(add(!old_high, new_high), add(!old_low, new_low));
        ChecksumDeltas { address, port: add(!old.1, new.1) }
    }

    /// What the way back adds.
    pub const fn inverse(self) -> ChecksumDeltas {
        ChecksumDeltas { address: !self.address, port: !self.port }
    }
}

/// The one's complement sum of two words.
pub(super) const fn add(one: u16, other: u16) -> u16 {
    let (sum, carry) = one.overflowing_add(other);
    sum + carry as u16
}

/// Reads the word at `at`.
pub(super) fn word(head: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([head[at], head[at + 1]])
}

/// Writes the word at `at`.
pub(super) fn set_word(head: &mut [u8], at: usize, value: u16) {
    head[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Adds `delta` to what the complete checksum at `at` sums.
pub(super) fn add_to_checksum(head: &mut [u8], at: usize, delta: u16) {
    set_word(head, at, !add(!word(head, at), delta));
}

/// Changes one end of the packet `view` was read from.
///
/// # Panics
/// If `head` is not the one `view` was read from.
pub fn translate(head: &mut [u8], view: &View, new: &NewEnd) {
    let (addr_at, port_at) = match new.end {
        End::Source => (SOURCE, 0),
        End::Destination => (DESTINATION, 2),
    };
    head[IP_AT + addr_at..IP_AT + addr_at + 4].copy_from_slice(&new.addr.octets());
    add_to_checksum(head, IP_AT + IP_CHECKSUM, new.deltas.address);
    let at = view.transport_at;
    match view.transport {
        Transport::Ports { .. } => {
            set_word(head, at + port_at, new.port);
            let offset = checksum_offset(view.ip.protocol).expect("what has ports has such a checksum");
            update_transport(head, view, at + offset, add(new.deltas.address, new.deltas.port), new);
        }
        Transport::Query { .. } => {
            set_word(head, at + ICMP_IDENT, new.port);
            // ICMP sums no addresses.
            add_to_checksum(head, at + ICMP_CHECKSUM, new.deltas.port);
        }
        Transport::Addresses => {
            if let Some(offset) = checksum_offset(view.ip.protocol) {
                update_transport(head, view, at + offset, new.deltas.address, new);
            }
        }
        Transport::Error | Transport::LaterFragment => {}
    }
}

/// Changes the checksum at `at`, which covers the pseudo-header: by `complete` where it is complete.
fn update_transport(head: &mut [u8], view: &View, at: usize, complete: u16, new: &NewEnd) {
    if view.partial {
        set_word(head, at, add(word(head, at), new.deltas.address));
    } else if view.ip.protocol != Protocol::UDP {
        add_to_checksum(head, at, complete);
    } else if word(head, at) != 0 {
        add_to_checksum(head, at, complete);
        set_word(head, at, udp_nonzero(word(head, at)));
    }
}

/// Takes one hop.
///
/// # Panics
/// If there is none left.
pub fn take_hop(head: &mut [u8]) {
    let ttl = &mut head[IP_AT + TTL];
    assert!(*ttl > 0, "the caller answers packets whose hops are used up");
    *ttl -= 1;
    add_to_checksum(head, IP_AT + IP_CHECKSUM, HOP_DELTA);
}
