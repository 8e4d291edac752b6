//! Which frames a capture wants, judged by their first bytes. What cannot be known of a frame, the ports of a later
//! fragment say, is not what was asked for.
//!
//! May touch: the numbers of `wire`, whose parsers refuse frames that a capture shows. Read first: RFC 791, 3.1; RFC 8200, 3; RFC 826.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4;

/// Frames that are wanted: those of which all that is said here holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this protocol.
    pub protocol: Option<Protocol>,
    /// From or to this address.
    pub host: Option<IpAddr>,
    /// From or to this port of TCP or UDP.
    pub port: Option<u16>,
}

/// A protocol that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
    /// ICMP or ICMPv6.
    Icmp,
    /// ARP.
    Arp,
}

/// What a frame's first bytes say.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    protocol: Option<Protocol>,
    ends: Option<(IpAddr, IpAddr)>,
    ports: Option<(u16, u16)>,
}

const ETHERTYPE_AT: usize = 12;
/// The type in the place of which a VLAN tag begins (IEEE 802.1Q).
const TAG: u16 = 0x8100;

impl Filter {
    /// Whether a frame that begins with `head` is wanted.
    pub(super) fn wants(&self, head: &[u8]) -> bool {
        if *self == Filter::default() {
            return true;
        }
        let seen = Seen::of(head).unwrap_or_default();
        self.protocol.is_none_or(|wanted| seen.protocol == Some(wanted))
            && self.host.is_none_or(|host| seen.ends.is_some_and(|(a, b)| a == host || b == host))
            && self.port.is_none_or(|port| seen.ports.is_some_and(|(a, b)| a == port || b == port))
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn ipv4_at(bytes: &[u8], at: usize) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*bytes.get(at..)?.first_chunk::<4>()?).into())
}

fn ipv6_at(bytes: &[u8], at: usize) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*bytes.get(at..)?.first_chunk::<16>()?).into())
}

impl Seen {
    fn of(head: &[u8]) -> Option<Seen> {
        let (mut ethertype, mut at) = (be16(head, ETHERTYPE_AT)?, ethernet::HEADER_BYTES);
        if ethertype == TAG {
            (ethertype, at) = (be16(head, at + 2)?, at + 4);
        }
        let packet = head.get(at..)?;
        match EtherType(ethertype) {
            EtherType::IPV4 => Seen::of_ipv4(packet),
            EtherType::IPV6 => Seen::of_ipv6(packet),
            EtherType::ARP => Some(Seen {
                protocol: Some(Protocol::Arp),
                ends: ipv4_at(packet, 14).zip(ipv4_at(packet, 24)),
                ports: None,
            }),
            _ => None,
        }
    }

    fn of_ipv4(packet: &[u8]) -> Option<Seen> {
        let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
        let is_later_fragment = be16(packet, 6)? & 0x1fff != 0;
        let transport = if is_later_fragment { None } else { packet.get(header_bytes..) };
        let ends = ipv4_at(packet, 12).zip(ipv4_at(packet, 16));
        Some(Seen::of_transport(*packet.get(9)?, transport, ends))
    }

    fn of_ipv6(packet: &[u8]) -> Option<Seen> {
        let ends = ipv6_at(packet, 8).zip(ipv6_at(packet, 24));
        Some(Seen::of_transport(*packet.get(6)?, packet.get(40..), ends))
    }

    fn of_transport(number: u8, transport: Option<&[u8]>, ends: Option<(IpAddr, IpAddr)>) -> Seen {
        let protocol = match ipv4::Protocol(number) {
            ipv4::Protocol::TCP => Some(Protocol::Tcp),
            ipv4::Protocol::UDP => Some(Protocol::Udp),
            ipv4::Protocol::ICMP | ipv4::Protocol::ICMPV6 => Some(Protocol::Icmp),
            _ => None,
        };
        let has_ports = matches!(protocol, Some(Protocol::Tcp | Protocol::Udp));
        let ports = transport.filter(|_| has_ports).and_then(|bytes| be16(bytes, 0).zip(be16(bytes, 2)));
        Seen { protocol, ends, ports }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 frame from 10.0.2.2:1000 to 192.0.2.1:80.
    fn ipv4(protocol: u8, fragment: u16) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 8];
        frame[12..14].copy_from_slice(&EtherType::IPV4.0.to_be_bytes());
        frame[14] = 0x45;
        frame[20..22].copy_from_slice(&fragment.to_be_bytes());
        frame[23] = protocol;
        frame[26..30].copy_from_slice(&[10, 0, 2, 2]);
        frame[30..34].copy_from_slice(&[192, 0, 2, 1]);
        frame[34..38].copy_from_slice(&[1000u16.to_be_bytes(), 80u16.to_be_bytes()].concat());
        frame
    }

    fn ipv6() -> Vec<u8> {
        let mut frame = vec![0; 14 + 40 + 8];
        frame[12..14].copy_from_slice(&EtherType::IPV6.0.to_be_bytes());
        frame[20] = 17;
        frame[22..38].copy_from_slice(&"fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        frame[38..54].copy_from_slice(&"2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
        frame[54..58].copy_from_slice(&[1000u16.to_be_bytes(), 53u16.to_be_bytes()].concat());
        frame
    }

    fn filter(protocol: Option<Protocol>, host: Option<&str>, port: Option<u16>) -> Filter {
        Filter { protocol, host: host.map(|host| host.parse().unwrap()), port }
    }

    #[test]
    fn all_that_is_asked_for_has_to_hold() {
        let tcp = ipv4(6, 0);
        for (wanted, filter) in [
            (true, filter(None, None, None)),
            (true, filter(Some(Protocol::Tcp), None, None)),
            (false, filter(Some(Protocol::Udp), None, None)),
            (true, filter(None, Some("192.0.2.1"), Some(80))),
            (true, filter(None, Some("10.0.2.2"), Some(1000))),
            (false, filter(None, Some("10.0.2.3"), Some(1000))),
            (false, filter(Some(Protocol::Tcp), Some("10.0.2.2"), Some(81))),
        ] {
            assert_eq!(filter.wants(&tcp), wanted, "{filter:?}");
        }
        assert!(filter(Some(Protocol::Udp), Some("2001:db8::1"), Some(53)).wants(&ipv6()));
        assert!(!filter(None, Some("2001:db8::2"), None).wants(&ipv6()));
    }

    #[test]
    fn ports_of_a_later_fragment_and_of_other_protocols_are_not_known() {
        assert!(!filter(None, None, Some(80)).wants(&ipv4(17, 1)));
        assert!(filter(None, Some("192.0.2.1"), None).wants(&ipv4(17, 1)));
        assert!(!filter(None, None, Some(80)).wants(&ipv4(1, 0)));
    }

    #[test]
    fn a_vlan_tag_is_looked_behind() {
        let mut frame = ipv4(6, 0);
        frame.splice(12..12, [0x81, 0, 0, 7]);
        assert!(filter(Some(Protocol::Tcp), None, Some(80)).wants(&frame));
    }

    #[test]
    fn arp_has_its_addresses() {
        let mut frame = vec![0; 42];
        frame[12..14].copy_from_slice(&EtherType::ARP.0.to_be_bytes());
        frame[28..32].copy_from_slice(&[10, 0, 2, 2]);
        frame[38..42].copy_from_slice(&[10, 0, 2, 1]);
        assert!(filter(Some(Protocol::Arp), Some("10.0.2.1"), None).wants(&frame));
        assert!(filter(None, Some("10.0.2.2"), None).wants(&frame));
        assert!(!filter(Some(Protocol::Tcp), None, None).wants(&frame));
    }

    #[test]
    fn frames_cut_anywhere_are_judged_without_a_panic() {
        for frame in [ipv4(6, 0), ipv6(), vec![0x81; 60], vec![0xff; 14]] {
            for len in 0..frame.len() {
                let _ = filter(Some(Protocol::Tcp), Some("10.0.2.2"), Some(80)).wants(&frame[..len]);
                assert!(Filter::default().wants(&frame[..len]));
            }
        }
    }
}
