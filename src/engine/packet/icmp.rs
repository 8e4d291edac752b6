//! ICMP errors that cross the NAT: the packet they quote is translated back to what its sender sent.
//!
//! A quote holds the IP header and at least eight bytes behind it (RFC 792), often more (RFC 1812, 4.3.2.3), and may end
//! anywhere. What is there is changed, with the checksums in it; what is not there, or lies beyond the head that was
//! copied, cannot be read by anyone or is left. Each word that changes changes the ICMP checksum by as much
//! (RFC 5508, REQ-4), so an error that came damaged arrives damaged.
//!
//! Read first: RFC 5508, 4; RFC 792; RFC 3022, 4.3.

use std::net::Ipv4Addr;

use super::head::{ICMP_CHECKSUM, ICMP_IDENT, Transport, View, checksum_offset};
use super::rewrite::{self, DESTINATION, End, IP_CHECKSUM, NewEnd, SOURCE, add, set_word, word};
use crate::engine::counters::DropReason;
use crate::wire::checksum::udp_nonzero;
use crate::wire::icmpv4;
use crate::wire::ipv4::{self, Protocol};

/// The packet an error is about, as far as it is quoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    /// Who sent it.
    pub src: Ipv4Addr,
    /// To whom.
    pub dst: Ipv4Addr,
    /// Its protocol.
    pub protocol: Protocol,
    /// What it carried; never an error.
    pub transport: Transport,
    at: usize,
    transport_at: usize,
}

impl Quote {
    /// Reads what the error `view` quotes.
    ///
    /// # Errors
    /// [`DropReason::Malformed`] for a quote without ports, [`DropReason::Fragment`] for one of a later fragment, which
    /// nobody may send (RFC 1122, 3.2.2), [`DropReason::Unsupported`] for an error about an error.
    pub fn read(head: &[u8], view: &View) -> Result<Quote, DropReason> {
        let at = view.transport_at + icmpv4::HEADER_BYTES;
        let end = (view.transport_at + view.ip.payload_bytes).min(head.len());
        let bytes = head.get(at..end).ok_or(DropReason::Malformed)?;
        let fixed: &[u8; ipv4::HEADER_BYTES] = bytes.first_chunk().ok_or(DropReason::Malformed)?;
        let header_bytes = usize::from(fixed[0] & 15) * 4;
        if fixed[0] >> 4 != 4 || header_bytes < ipv4::HEADER_BYTES {
            return Err(DropReason::Malformed);
        }
        if word(fixed, 6) & 0x1fff != 0 {
            return Err(DropReason::Fragment);
        }
        let protocol = Protocol(fixed[9]);
        let transport = read_transport(protocol, bytes.get(header_bytes..).ok_or(DropReason::Malformed)?)?;
        let addr = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
        Ok(Quote {
            src: addr(SOURCE),
            dst: addr(DESTINATION),
            protocol,
            transport,
            at,
            transport_at: at + header_bytes,
        })
    }

    /// Whether what identifies it is one number for both ends.
    pub const fn has_ident(&self) -> bool {
        matches!(self.transport, Transport::Query { .. })
    }

    /// The quoted packet's port at one end; its identifier or zero at either where it has none.
    pub const fn port(&self, of: End) -> u16 {
        match (self.transport, of) {
            (Transport::Ports { src, .. }, End::Source) => src,
            (Transport::Ports { dst, .. }, End::Destination) => dst,
            (Transport::Query { ident, .. }, _) => ident,
            _ => 0,
        }
    }
}

fn read_transport(protocol: Protocol, bytes: &[u8]) -> Result<Transport, DropReason> {
    let needed = if matches!(protocol, Protocol::TCP | Protocol::UDP | Protocol::ICMP) { 8 } else { 0 };
    if bytes.len() < needed {
        return Err(DropReason::Malformed);
    }
    match protocol {
        Protocol::TCP | Protocol::UDP => Ok(Transport::Ports { src: word(bytes, 0), dst: word(bytes, 2) }),
        Protocol::ICMP => {
            let asks = matches!(bytes[0], 8 | 13);
            let is_query = asks || matches!(bytes[0], 0 | 14);
            let query = Transport::Query { ident: word(bytes, ICMP_IDENT), asks };
            if is_query { Ok(query) } else { Err(DropReason::Unsupported) }
        }
        _ => Ok(Transport::Addresses),
    }
}

/// An ICMP error's words as they are changed, and what that adds to its checksum.
struct Message<'a> {
    head: &'a mut [u8],
    /// Where the head, or the packet if it is shorter, ends.
    end: usize,
    delta: u16,
}

impl Message<'_> {
    fn get(&self, at: usize) -> Option<u16> {
        (at + 2 <= self.end).then(|| word(self.head, at))
    }

    fn set(&mut self, at: usize, value: u16) {
        if let Some(old) = self.get(at) {
            self.delta = add(self.delta, add(!old, value));
            set_word(self.head, at, value);
        }
    }
}

/// Changes one end of the packet the error `view` quotes.
///
/// # Panics
/// If `head` is not the one `view` and `quote` were read from.
pub fn translate_quote(head: &mut [u8], view: &View, quote: &Quote, new: &NewEnd) {
    let end = (view.transport_at + view.ip.payload_bytes).min(head.len());
    let mut message = Message { head, end, delta: 0 };
    let (addr_at, port_at) = match new.end {
        End::Source => (quote.at + SOURCE, 0),
        End::Destination => (quote.at + DESTINATION, 2),
    };
    let [a, b, c, d] = new.addr.octets();
    message.set(addr_at, u16::from_be_bytes([a, b]));
    message.set(addr_at + 2, u16::from_be_bytes([c, d]));
    let sum = word(message.head, quote.at + IP_CHECKSUM);
    message.set(quote.at + IP_CHECKSUM, !add(!sum, new.deltas.address));
    let checksum_at = match quote.transport {
        Transport::Query { .. } => Some(ICMP_CHECKSUM),
        _ => checksum_offset(quote.protocol),
    };
    let delta = match quote.transport {
        Transport::Ports { .. } => add(new.deltas.address, new.deltas.port),
        Transport::Query { .. } => new.deltas.port,
        _ => new.deltas.address,
    };
    match quote.transport {
        Transport::Ports { .. } => message.set(quote.transport_at + port_at, new.port),
        Transport::Query { .. } => message.set(quote.transport_at + ICMP_IDENT, new.port),
        _ => {}
    }
    let checksum_at = checksum_at.map(|offset| quote.transport_at + offset);
    if let Some((at, sum)) = checksum_at.and_then(|at| Some((at, message.get(at)?))) {
        let is_udp = quote.protocol == Protocol::UDP;
        let changed = !add(!sum, delta);
        if !(is_udp && sum == 0) {
            message.set(at, if is_udp { udp_nonzero(changed) } else { changed });
        }
    }
    let delta = message.delta;
    rewrite::add_to_checksum(head, view.transport_at + ICMP_CHECKSUM, delta);
}
