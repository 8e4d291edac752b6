//! What the guard reads of an IPv6 packet: its addresses, and what stands behind its extension headers.
//!
//! Everything must lie in the host's copy of the frame's first bytes: a packet whose headers are longer
//! (RFC 7112 asks that the first fragment hold them all) is refused, as what it says cannot be judged.
//!
//! Read first: RFC 8200, 4; RFC 4861, 4.

use std::net::Ipv6Addr;

use crate::addr::MacAddr;
use crate::wire::WireError;
use crate::wire::ipv4::Protocol;

const HEADER_BYTES: usize = 40;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
/// Extension headers of one packet that are walked: RFC 8200, 4.1 lists six, the destination options twice.
const EXTENSIONS_MAX: usize = 8;

/// A packet of the guest or for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) src: Ipv6Addr,
    pub(super) upper: Upper<'a>,
    /// Where that begins, in bytes.
    pub(super) upper_at: usize,
    /// Its protocol; none of the further pieces of a fragmented packet.
    pub(super) protocol: Option<Protocol>,
}

/// What stands behind the extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upper<'a> {
    /// ICMPv6, as much of it as was copied. `fragment`: it is the first of several pieces.
    Icmp { message: &'a [u8], fragment: bool },
    /// UDP from one port to another.
    Udp { src_port: u16, dst_port: u16 },
    /// Anything else, and the further pieces of a fragmented packet.
    Other,
}

impl Packet<'_> {
    /// Reads the packet whose first bytes are `bytes`.
    pub(super) fn parse(bytes: &[u8]) -> Result<Packet<'_>, WireError> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        if header[0] >> 4 != 6 {
            return Err(WireError::Malformed("IP version is not 6"));
        }
        let src: [u8; 16] = header[8..24].try_into().expect("16 of 40 bytes");
        let payload_bytes = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let behind = &bytes[HEADER_BYTES..];
        let payload = &behind[..payload_bytes.min(behind.len())];
        let (protocol, rest, upper) = upper(header[6], payload)?;
        let upper_at = HEADER_BYTES + payload.len() - rest.len();
        Ok(Packet { src: src.into(), upper, upper_at, protocol })
    }
}

/// Walks the extension headers in `rest`, of which the first is of type `next`. Returns what stands behind them: its
/// protocol, unless it is a further piece of a packet, its bytes, and what they are.
fn upper(mut next: u8, mut rest: &[u8]) -> Result<(Option<Protocol>, &[u8], Upper<'_>), WireError> {
    let mut fragment = false;
    for _ in 0..=EXTENSIONS_MAX {
        let len = match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                (usize::from(*rest.get(1).ok_or(WireError::Truncated)?) + 1) * 8
            }
            AUTHENTICATION => (usize::from(*rest.get(1).ok_or(WireError::Truncated)?) + 2) * 4,
            FRAGMENT => {
                let offset = rest.get(2..4).ok_or(WireError::Truncated)?;
                if u16::from_be_bytes([offset[0], offset[1]]) & 0xfff8 != 0 {
                    return Ok((None, rest.get(8..).ok_or(WireError::Truncated)?, Upper::Other));
                }
                fragment |= offset[1] & 1 != 0;
                8
            }
            _ => return Ok((Some(Protocol(next)), rest, transport(next, rest, fragment)?)),
        };
        next = rest[0];
        rest = rest.get(len..).ok_or(WireError::Truncated)?;
    }
    Err(WireError::Malformed("more extension headers than any packet needs"))
}

fn transport(protocol: u8, rest: &[u8], fragment: bool) -> Result<Upper<'_>, WireError> {
    match Protocol(protocol) {
        Protocol::UDP => {
            let [a, b, c, d] = *rest.first_chunk().ok_or(WireError::Truncated)?;
            Ok(Upper::Udp { src_port: u16::from_be_bytes([a, b]), dst_port: u16::from_be_bytes([c, d]) })
        }
        Protocol::ICMPV6 if rest.len() < 4 => Err(WireError::Truncated),
        Protocol::ICMPV6 => Ok(Upper::Icmp { message: rest, fragment }),
        _ => Ok(Upper::Other),
    }
}

/// What a message of neighbour discovery says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Discovery {
    /// Who is a router here? With the sender's address, if it says it.
    RouterSolicitation(Option<MacAddr>),
    /// What only routers say: advertisements and redirects, queries for groups (RFC 3810, 5.1), and what multicast routers say
    /// of themselves (RFC 4286, 3).
    FromRouter,
    /// Who has the target? With the sender's address, if it says it.
    NeighbourSolicitation(Ipv6Addr, Option<MacAddr>),
    /// The sender has the target. With the address, if it says it.
    NeighbourAdvertisement(Ipv6Addr, Option<MacAddr>),
    /// A listener's report about multicast groups (RFC 2710, RFC 3810).
    ListenerReport,
    /// Any other message.
    Other,
}

const SOURCE_ADDRESS: u8 = 1;
const TARGET_ADDRESS: u8 = 2;
/// Options of one message that are read.
const OPTIONS_MAX: usize = 16;

impl Discovery {
    /// Reads an ICMPv6 message of at least four bytes.
    pub(super) fn parse(message: &[u8]) -> Result<Discovery, WireError> {
        let target = || {
            let bytes = message.get(8..24).ok_or(WireError::Truncated)?;
            let octets: [u8; 16] = bytes.try_into().expect("16 bytes");
            Ok(Ipv6Addr::from(octets))
        };
        match message[0] {
            133 => Ok(Discovery::RouterSolicitation(option(message, 8, SOURCE_ADDRESS)?)),
            130 | 134 | 137 | 151 | 153 => Ok(Discovery::FromRouter),
            135 => Ok(Discovery::NeighbourSolicitation(target()?, option(message, 24, SOURCE_ADDRESS)?)),
            136 => Ok(Discovery::NeighbourAdvertisement(target()?, option(message, 24, TARGET_ADDRESS)?)),
            131 | 132 | 143 => Ok(Discovery::ListenerReport),
            _ => Ok(Discovery::Other),
        }
    }
}

/// The link-layer address of kind `kind` among the options from byte `from` on.
fn option(message: &[u8], from: usize, kind: u8) -> Result<Option<MacAddr>, WireError> {
    let mut rest = message.get(from..).ok_or(WireError::Truncated)?;
    let mut found = None;
    for _ in 0..OPTIONS_MAX {
        if rest.is_empty() {
            return Ok(found);
        }
        let [this, units, ..] = *rest else { return Err(WireError::Truncated) };
        if units == 0 {
            return Err(WireError::Malformed("option of no length"));
        }
        let option = rest.get(..usize::from(units) * 8).ok_or(WireError::Truncated)?;
        if this == kind {
            let octets: [u8; 6] = option[2..8].try_into().expect("an option has eight bytes at least");
            // Two that differ could be read either way.
            if found.replace(MacAddr(octets)).is_some_and(|first| first.0 != octets) {
                return Err(WireError::Malformed("two link-layer addresses"));
            }
        }
        rest = &rest[option.len()..];
    }
    Err(WireError::Malformed("more options than any message needs"))
}
