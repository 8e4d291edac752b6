//! The station outside answers who asks whether it is there.
//!
//! Read first: RFC 1122, 3.2.2.6; RFC 792, page 14.

use super::head::{ICMP_CHECKSUM, IP_AT};
use super::rewrite::{DESTINATION, IP_CHECKSUM, SOURCE, TTL, add_to_checksum, set_word, word};
use crate::engine::emit;
use crate::wire::checksum::Accumulator;
use crate::wire::ipv4::{self, Protocol};

const TRANSPORT_AT: usize = IP_AT + ipv4::HEADER_BYTES;
const ECHO_REQUEST: u8 = 8;
/// What it adds to the message's sum that a request becomes a reply: the complement of its type, in the upper half.
const REPLY_DELTA: u16 = !0x0800;

/// Makes of a whole frame with an echo request, whose packet was found to be one, the frame that answers it, to the station it
/// came from. `false`, and nothing is changed, for anything else: fragments, and packets with IP options too.
pub fn answer_echo(frame: &mut [u8]) -> bool {
    let Some(head) = frame.first_chunk::<{ TRANSPORT_AT + 8 }>() else { return false };
    // Version 4, five words of header; whole.
    let is_plain = head[IP_AT] == 0x45 && word(head, IP_AT + 6) & 0x3fff == 0;
    let is_request = head[IP_AT + 9] == Protocol::ICMP.0 && head[TRANSPORT_AT..][..2] == [ECHO_REQUEST, 0];
    if !is_plain || !is_request {
        return false;
    }
    let (to, from) = frame.split_at_mut(6);
    to.swap_with_slice(&mut from[..6]);
    let (source, destination) = frame.split_at_mut(IP_AT + DESTINATION);
    source[IP_AT + SOURCE..].swap_with_slice(&mut destination[..4]);
    frame[IP_AT + TTL] = emit::TTL;
    set_word(frame, IP_AT + IP_CHECKSUM, 0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&frame[IP_AT..TRANSPORT_AT]);
    set_word(frame, IP_AT + IP_CHECKSUM, sum.finish());
    frame[TRANSPORT_AT] = 0;
    // What came damaged leaves damaged.
    add_to_checksum(frame, TRANSPORT_AT + ICMP_CHECKSUM, REPLY_DELTA);
    true
}
