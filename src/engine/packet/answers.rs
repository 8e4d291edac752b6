//! ICMP errors of the NAT's own, to who sent what is not carried.
//!
//! Read first: RFC 1812, 4.3.2; RFC 1122, 3.2.2 (what no error is sent about).

use std::net::Ipv4Addr;

use super::head::{IP_AT, Packet};
use crate::addr::MacAddr;
use crate::engine::counters::DropReason;
use crate::engine::emit::{self, ICMP_ERROR_FRAME_BYTES_MAX};
use crate::limits;
use crate::rate::Rate;
use crate::time::Instant;
use crate::wire::icmpv4::Message;

/// The one answer under way, and how many more there may be.
#[derive(Debug)]
pub(super) struct Answers {
    frame: Box<[u8; ICMP_ERROR_FRAME_BYTES_MAX]>,
    len_bytes: usize,
    next_ident: u16,
    rate: Rate,
}

impl Default for Answers {
    fn default() -> Answers {
        Answers {
            frame: Box::new([0; ICMP_ERROR_FRAME_BYTES_MAX]),
            len_bytes: 0,
            next_ident: 0,
            rate: Rate::new(limits::ICMP_ERRORS_BURST, limits::ICMP_ERRORS_PER_SECOND),
        }
    }
}

impl Answers {
    /// The frame of the last answer.
    pub(super) fn frame(&self) -> &[u8] {
        &self.frame[..self.len_bytes]
    }

    /// Makes the frame that tells the sender of `packet`; returns its length. It goes to the Ethernet address the packet
    /// came from.
    ///
    /// # Errors
    /// Why there is none: the rate limit, or nothing (`None`) if no error may be sent about such a packet.
    pub(super) fn answer(
        &mut self,
        now: Instant,
        from: Ipv4Addr,
        message: Message,
        packet: &Packet<'_>,
    ) -> Result<usize, Option<DropReason>> {
        if !self.rate.has(now) {
            return Err(Some(DropReason::RateLimited));
        }
        let mac: [u8; 6] = packet.head[6..12].try_into().expect("six bytes");
        let quoted = &packet.head[IP_AT..packet.head.len().min(packet.len_bytes)];
        let made = emit::icmp_error(&mut self.frame, from, MacAddr(mac), self.next_ident, message, quoted);
        self.len_bytes = made.ok_or(None)?;
        self.next_ident = self.next_ident.wrapping_add(1);
        self.rate.take(now);
        Ok(self.len_bytes)
    }
}
