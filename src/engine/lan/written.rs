//! Where a frame of the guest is still to be written to: its checksum, which the kernel or a card stores after
//! the guard has judged.
//!
//! Driver and device agree on any place (virtio 1.3, 5.1.6.2), and the bytes that are summed are the guest's to choose;
//! so two bytes of what was judged could become any others: an address, the type of an ICMPv6 message, a port.
//! They may go where the packet's protocol has its checksum, or behind everything that was looked at.
//!
//! Read first: RFC 9293, 3.1; RFC 768; RFC 4443, 2.1.

use super::dhcp;
use super::ipv6;
use crate::engine::counters::DropReason;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::Checksum;

/// Where ICMP, ICMPv6 and IGMP have their checksum, from the start of the message in bytes.
const ICMP_CHECKSUM: usize = 2;
/// The same of UDP.
const UDP_CHECKSUM: usize = 6;
const UDP_HEADER_BYTES: usize = 8;

/// Judges where the checksum of a frame goes whose first bytes are `head` and were let pass by the guard.
///
/// # Errors
/// [`DropReason::Malformed`] if that is within what the guard judged.
pub(super) fn check(checksum: Checksum, head: &[u8]) -> Result<(), DropReason> {
    let Checksum::Partial { start, offset } = checksum else { return Ok(()) };
    let place = usize::from(start) + usize::from(offset);
    let allowed = of_packet(head).is_some_and(|(upper_at, protocol)| {
        let upper = head.get(upper_at..).unwrap_or_default();
        place.checked_sub(upper_at).is_some_and(|place| is_allowed(protocol, upper, place))
    });
    if allowed { Ok(()) } else { Err(DropReason::Malformed) }
}

/// Where what stands behind the IP headers begins in the frame, and its protocol; none for fragments but the first,
/// of which nothing behind the headers is judged. `None` for what is not IP.
fn of_packet(head: &[u8]) -> Option<(usize, Option<Protocol>)> {
    let packet = head.get(ethernet::HEADER_BYTES..)?;
    let (upper_at, protocol) = match ethernet::Header::parse(head).ok()?.ethertype {
        EtherType::IPV4 => {
            let header = ipv4::Header::parse(packet, usize::MAX).ok()?;
            (header.header_bytes, (header.fragment_offset_bytes == 0).then_some(header.protocol))
        }
        EtherType::IPV6 => {
            let packet = ipv6::Packet::parse(packet).ok()?;
            (packet.upper_at, packet.protocol)
        }
        _ => return None,
    };
    Some((ethernet::HEADER_BYTES + upper_at, protocol))
}

/// Whether `place` within `upper`, the bytes behind the IP headers, may be written to.
fn is_allowed(protocol: Option<Protocol>, upper: &[u8], place: usize) -> bool {
    match protocol {
        Some(Protocol::UDP) if place == UDP_CHECKSUM => true,
        // Of a question to a DHCP server the message is judged too. Others may carry packets of a tunnel.
        Some(Protocol::UDP) => {
            let to_server = upper.get(2..4) == Some(&dhcp::SERVER_PORT.to_be_bytes());
            place >= UDP_HEADER_BYTES && !to_server
        }
        Some(Protocol::ICMP | Protocol::ICMPV6 | Protocol::IGMP) => place == ICMP_CHECKSUM,
        _ => true,
    }
}
