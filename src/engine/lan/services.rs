//! On a named network: which frames of the guest are for the services that this process has there.
//!
//! They are DHCP, whoever it is sent to, and DNS at the gateway's address. All else to that address, ARP and
//! echo too, is the kernel's, which has it on the network's bridge.
//!
//! Read first: RFC 2131, 4.1; RFC 7766, 4.

use std::net::Ipv4Addr;

use crate::service::dhcp::SERVER_PORT as DHCP_PORT;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};

/// The port of DNS (RFC 1035, 4.2).
const DNS_PORT: u16 = 53;

/// A service of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// DHCP.
    Dhcp,
    /// DNS.
    Dns,
}

/// Whether the frame whose first bytes are `head` and that is `len_bytes` long is for a service of ours at `gateway`, and which.
/// Later fragments are not: they name no port, and none of these services takes messages that long.
pub fn is_ours(head: &[u8], len_bytes: usize, gateway: Ipv4Addr) -> Option<Service> {
    let frame = ethernet::Header::parse(head).ok()?;
    if frame.ethertype != EtherType::IPV4 {
        return None;
    }
    let packet = &head[ethernet::HEADER_BYTES..];
    let header = ipv4::Header::parse(packet, len_bytes.saturating_sub(ethernet::HEADER_BYTES)).ok()?;
    let port = packet.get(header.header_bytes + 2..header.header_bytes + 4)?;
    let port = u16::from_be_bytes([port[0], port[1]]);
    let to_gateway = header.dst == gateway;
    match header.protocol {
        _ if header.fragment_offset_bytes > 0 => None,
        Protocol::UDP if port == DHCP_PORT && (to_gateway || header.dst.is_broadcast()) => {
            Some(Service::Dhcp)
        }
        Protocol::UDP | Protocol::TCP if port == DNS_PORT && to_gateway => Some(Service::Dns),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::MacAddr;

    const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);

    fn frame(dst: Ipv4Addr, protocol: Protocol, port: u16, fragment_offset_bytes: u16) -> Vec<u8> {
        let mut frame = vec![0; ethernet::HEADER_BYTES + ipv4::HEADER_BYTES + 8];
        let (dst_mac, src_mac) = (MacAddr::GATEWAY, MacAddr([2, 0, 0, 0, 0, 1]));
        ethernet::Header { dst: dst_mac, src: src_mac, ethertype: EtherType::IPV4 }.emit(&mut frame);
        let header = ipv4::Header {
            src: Ipv4Addr::new(10, 0, 2, 2),
            dst,
            protocol,
            ttl: 64,
            tos: 0,
            ident: 1,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset_bytes,
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes: 8,
        };
        header.emit(&mut frame[ethernet::HEADER_BYTES..]);
        let at = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES + 2;
        frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
        frame
    }

    #[test]
    fn dhcp_and_dns_at_the_gateway_are_ours_and_nothing_else_is() {
        let other = Ipv4Addr::new(10, 0, 2, 9);
        for (dst, protocol, port, offset, expected) in [
            (GATEWAY, Protocol::UDP, 67, 0, Some(Service::Dhcp)),
            (Ipv4Addr::BROADCAST, Protocol::UDP, 67, 0, Some(Service::Dhcp)),
            (other, Protocol::UDP, 67, 0, None),
            (GATEWAY, Protocol::TCP, 67, 0, None),
            (GATEWAY, Protocol::UDP, 53, 0, Some(Service::Dns)),
            (GATEWAY, Protocol::TCP, 53, 0, Some(Service::Dns)),
            (Ipv4Addr::BROADCAST, Protocol::UDP, 53, 0, None),
            (other, Protocol::TCP, 53, 0, None),
            (GATEWAY, Protocol::TCP, 80, 0, None),
            (GATEWAY, Protocol::ICMP, 53, 0, None),
            (GATEWAY, Protocol::UDP, 53, 8, None),
        ] {
            let frame = frame(dst, protocol, port, offset);
            let seen = is_ours(&frame, frame.len(), GATEWAY);
            assert_eq!(seen, expected, "{dst} {protocol:?} {port} at {offset}");
        }
    }

    #[test]
    fn what_is_cut_or_of_another_kind_is_not_ours() {
        let frame = frame(GATEWAY, Protocol::UDP, 53, 0);
        for len in 0..ethernet::HEADER_BYTES + ipv4::HEADER_BYTES + 4 {
            assert_eq!(is_ours(&frame[..len], frame.len(), GATEWAY), None, "{len}");
        }
        let mut arp = frame;
        arp[12..14].copy_from_slice(&EtherType::ARP.0.to_be_bytes());
        assert_eq!(is_ours(&arp, arp.len(), GATEWAY), None);
    }
}
