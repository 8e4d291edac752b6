//! Packets longer than the link they go to: cut into fragments, as a router does where their sender lets it.
//!
//! The transport's checksum covers the whole packet, so a partial one is completed first. Options that say so go with every
//! fragment, the others with the first. What is cut may be a fragment itself.
//!
//! Read first: RFC 791, 3.1 (options, flags) and 3.2 (the procedure); RFC 1812, 4.2.2.7 and 5.2.6.

use super::head::IP_AT;
use super::rewrite::{IP_CHECKSUM, set_word, word};
use crate::engine::counters::DropReason;
use crate::wire::checksum::{Accumulator, udp_nonzero};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::{Checksum, VnetHeader};

/// Where total length, and flags with the offset, stand in the IPv4 header.
const TOTAL: usize = 2;
const FLAGS_OFFSET: usize = 6;
/// More fragments follow.
const MORE: u16 = 0x2000;

/// Options end; nothing; and the bit of those every fragment has.
const END_OF_OPTIONS: u8 = 0;
const NO_OPTION: u8 = 1;
const COPIED: u8 = 0x80;

/// Cuts a whole frame with an IPv4 packet into frames whose packets are `ip_mtu` bytes long at most, and hands them to
/// `each` in their order. The frame's checksum is complete afterwards.
///
/// # Errors
/// [`DropReason::Malformed`] for what is no such frame, [`DropReason::TooLong`] for one that may not be cut: its
/// sender forbids it, it is to be segmented instead, or the MTU has no room for eight bytes.
pub fn cut(
    vnet: &VnetHeader,
    frame: &mut [u8],
    ip_mtu: u16,
    mut each: impl FnMut(&[u8]),
) -> Result<(), DropReason> {
    let packet = frame.get(IP_AT..).ok_or(DropReason::Malformed)?;
    let ip = ipv4::Header::parse(packet, packet.len()).map_err(|_| DropReason::Malformed)?;
    if ip.dont_fragment || vnet.gso.is_some() {
        return Err(DropReason::TooLong);
    }
    let end = IP_AT + ip.header_bytes + ip.payload_bytes;
    complete_checksum(vnet, &mut frame[..end], ip.protocol)?;
    let (head, payload) = frame[..end].split_at(IP_AT + ip.header_bytes);
    let later = later_head(head);
    let mut piece = Vec::with_capacity(IP_AT + usize::from(ip_mtu));
    let mut at = 0;
    while at < payload.len() {
        let head = if at == 0 { head } else { &later };
        let room = (IP_AT + usize::from(ip_mtu)).saturating_sub(head.len()) & !7;
        if room == 0 {
            return Err(DropReason::TooLong);
        }
        let len = room.min(payload.len() - at);
        piece.clear();
        piece.extend_from_slice(head);
        piece.extend_from_slice(&payload[at..at + len]);
        let more = if ip.more_fragments || at + len < payload.len() { MORE } else { 0 };
        let offset = (usize::from(ip.fragment_offset_bytes) + at) / 8;
        let total = piece.len() - IP_AT;
        set_word(&mut piece, IP_AT + TOTAL, total as u16);
        set_word(&mut piece, IP_AT + FLAGS_OFFSET, more | offset as u16);
        sum_header(&mut piece, head.len());
        each(&piece);
        at += len;
    }
    Ok(())
}

fn sum_header(frame: &mut [u8], head_bytes: usize) {
    set_word(frame, IP_AT + IP_CHECKSUM, 0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&frame[IP_AT..head_bytes]);
    set_word(frame, IP_AT + IP_CHECKSUM, sum.finish());
}

/// Sums what a partial checksum leaves to be summed; `frame` ends with its packet.
fn complete_checksum(vnet: &VnetHeader, frame: &mut [u8], protocol: Protocol) -> Result<(), DropReason> {
    let Checksum::Partial { start, offset } = vnet.checksum else { return Ok(()) };
    let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
    if at + 2 > frame.len() {
        return Err(DropReason::Malformed);
    }
    let mut sum = Accumulator::new();
    sum.add_bytes(&frame[start..]);
    let value = sum.finish();
    set_word(frame, at, if protocol == Protocol::UDP { udp_nonzero(value) } else { value });
    Ok(())
}

/// The head of all fragments but the first: with the options only that are to be copied.
fn later_head(head: &[u8]) -> Vec<u8> {
    let (fixed, mut options) = head.split_at(IP_AT + ipv4::HEADER_BYTES);
    let mut later = fixed.to_vec();
    while let Some((&kind, rest)) = options.split_first() {
        let len = match (kind, rest.first()) {
            (END_OF_OPTIONS, _) => break,
            (NO_OPTION, _) => 1,
            // One that runs past the header is nobody's to copy.
            (_, Some(&len)) if (2..=options.len()).contains(&usize::from(len)) => usize::from(len),
            _ => break,
        };
        if kind & COPIED != 0 {
            later.extend_from_slice(&options[..len]);
        }
        options = &options[len..];
    }
    let header_bytes = (later.len() - IP_AT).next_multiple_of(4);
    later.resize(IP_AT + header_bytes, END_OF_OPTIONS);
    // Version 4, and the header's words.
    later[IP_AT] = 0x40 | (header_bytes / 4) as u8;
    debug_assert!(word(&later, IP_AT + TOTAL) > 0, "the rest is written with each fragment");
    later
}
