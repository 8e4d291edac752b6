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

/// Whether the frame whose first bytes are `head` and that is `len_bytes` long is for a service of ours at `gateway`.
/// Later fragments are not: they name no port, and none of these services takes messages that long.
pub fn is_ours(head: &[u8], len_bytes: usize, gateway: Ipv4Addr) -> bool {
    let Ok(frame) = ethernet::Header::parse(head) else { return false };
    if frame.ethertype != EtherType::IPV4 {
        return false;
    }
    let packet = &head[ethernet::HEADER_BYTES..];
    let Ok(header) = ipv4::Header::parse(packet, len_bytes.saturating_sub(ethernet::HEADER_BYTES)) else {
        return false;
    };
    let port = packet.get(header.header_bytes + 2..header.header_bytes + 4);
    let (Some(&[high, low]), 0) = (port, header.fragment_offset_bytes) else { return false };
    let port = u16::from_be_bytes([high, low]);
    match header.protocol {
        Protocol::UDP if port == DHCP_PORT => header.dst == gateway || header.dst.is_broadcast(),
        Protocol::UDP | Protocol::TCP => port == DNS_PORT && header.dst == gateway,
        _ => false,
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
            (GATEWAY, Protocol::UDP, 67, 0, true),
            (Ipv4Addr::BROADCAST, Protocol::UDP, 67, 0, true),
            (other, Protocol::UDP, 67, 0, false),
            (GATEWAY, Protocol::TCP, 67, 0, false),
            (GATEWAY, Protocol::UDP, 53, 0, true),
            (GATEWAY, Protocol::TCP, 53, 0, true),
            (Ipv4Addr::BROADCAST, Protocol::UDP, 53, 0, false),
            (other, Protocol::TCP, 53, 0, false),
            (GATEWAY, Protocol::TCP, 80, 0, false),
            (GATEWAY, Protocol::ICMP, 53, 0, false),
            (GATEWAY, Protocol::UDP, 53, 8, false),
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
            assert!(!is_ours(&frame[..len], frame.len(), GATEWAY), "{len}");
        }
        let mut arp = frame;
        arp[12..14].copy_from_slice(&EtherType::ARP.0.to_be_bytes());
        assert!(!is_ours(&arp, arp.len(), GATEWAY));
    }
}
