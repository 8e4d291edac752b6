//! The packet most packets are: TCP or UDP, whole, without IP options, of a flow that stands.
//!
//! Its head is judged and changed as arrays of known length, and nothing is written before it is known to pass. Whatever is
//! unlike it (fragments, SYN, first packets, what turns back) and whatever is refused is left
//! as it came to the general way (`outward.rs`, `inward.rs`), which judges it anew and knows why. The two agree on every
//! packet both can carry. A frame still to be cut is one packet here too: its header is what each segment begins with, and
//! its checksum is partial.
//!
//! Who may speak to whom is not asked here: a flow stands only between ends that may.

use std::net::Ipv4Addr;

use super::flow::{ChecksumDeltas, Inbound, Outbound};
use super::head::{IP_AT, Packet, checksum_offset};
use super::rewrite::{DESTINATION, End, HOP_DELTA, IP_CHECKSUM, SOURCE, TTL};
use super::table::FlowIndex;
use super::tcp_state::{Segment, TcpVerdict};
use super::{PacketNat, Passage, Side};
use crate::time::Instant;
use crate::wire::checksum::{is_whole, udp_nonzero};
use crate::wire::ethernet::EtherType;
use crate::wire::ipv4::{self, Protocol};
use crate::wire::tcp::{self, Flags, SeqNumber};
use crate::wire::udp;
use crate::wire::vnet::{Checksum, Gso};

/// Where the transport starts.
const TRANSPORT_AT: usize = IP_AT + ipv4::HEADER_BYTES;

/// Bytes of the head of every such packet, and of one of TCP.
const UDP_HEAD_BYTES: usize = TRANSPORT_AT + udp::HEADER_BYTES;
const TCP_HEAD_BYTES: usize = TRANSPORT_AT + tcp::HEADER_BYTES;

/// Version 4, five words of header.
const WITHOUT_OPTIONS: u8 = 0x45;

/// More fragments, and the offset of this one.
const FRAGMENT_MASK: u16 = 0x3fff;

const UDP_CHECKSUM: usize = TRANSPORT_AT + udp::CHECKSUM_OFFSET;
const TCP_CHECKSUM: usize = TRANSPORT_AT + tcp::CHECKSUM_OFFSET;

/// What such a packet's head says.
struct Plain {
    protocol: Protocol,
    src: Ipv4Addr,
    dst: Ipv4Addr,
    src_port: u16,
    dst_port: u16,
    /// Length of the transport with its header, in bytes.
    payload_bytes: u16,
    /// Whether the transport's checksum field holds the pseudo-header's sum only.
    partial: bool,
}

#[inline(always)]
fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

#[inline(always)]
fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Plain {
    /// Reads a frame that may pass on to a link of this MTU; none if it is not plain or must not.
    #[inline(always)]
    fn read(packet: &Packet<'_>, ip_mtu: u16) -> Option<Plain> {
        let head: &[u8; UDP_HEAD_BYTES] = packet.head.first_chunk()?;
        if be16(head, IP_AT - 2) != EtherType::IPV4.0
            || head[IP_AT] != WITHOUT_OPTIONS
            || be16(head, IP_AT + 6) & FRAGMENT_MASK != 0
        {
            return None;
        }
        let total_bytes = be16(head, IP_AT + 2);
        let received = usize::from(total_bytes) + IP_AT <= packet.len_bytes;
        let has_hops = head[IP_AT + TTL] > 1;
        let header: &[u8; ipv4::HEADER_BYTES] = head[IP_AT..].first_chunk()?;
        if !received || !has_hops || !is_whole(header) {
            return None;
        }
        let payload_bytes = total_bytes.checked_sub(ipv4::HEADER_BYTES as u16)?;
        let protocol = Protocol(head[IP_AT + 9]);
        let possible = match protocol {
            Protocol::TCP => segment_is_plain(packet.head, payload_bytes),
            Protocol::UDP => {
                let len_bytes = be16(head, TRANSPORT_AT + 4);
                // Of a frame to be cut it may say the length of a segment.
                payload_bytes >= udp::HEADER_BYTES as u16
                    && len_bytes >= udp::HEADER_BYTES as u16
                    && (len_bytes <= payload_bytes || packet.vnet.gso.is_some())
            }
            _ => false,
        };
        let longest_bytes = match packet.vnet.gso {
            None => total_bytes,
            Some(_) if !possible => return None,
            Some(gso) => total_bytes.min(segment_bytes(packet.head, protocol, gso)),
        };
        if !possible || longest_bytes > ip_mtu {
            return None;
        }
        let partial = match packet.vnet.checksum {
            Checksum::Partial { start, offset } => {
                let offset_expected = checksum_offset(protocol)?;
                if usize::from(start) != TRANSPORT_AT || usize::from(offset) != offset_expected {
                    return None;
                }
                true
            }
            _ => false,
        };
        Some(Plain {
            protocol,
            src: Ipv4Addr::from_bits(be32(head, IP_AT + SOURCE)),
            dst: Ipv4Addr::from_bits(be32(head, IP_AT + DESTINATION)),
            src_port: be16(head, TRANSPORT_AT),
            dst_port: be16(head, TRANSPORT_AT + 2),
            payload_bytes,
            partial,
        })
    }

    /// The segment of a packet of TCP.
    #[inline(always)]
    fn segment(&self, head: &[u8]) -> Option<Segment> {
        let head: &[u8; TCP_HEAD_BYTES] = head.first_chunk()?;
        let header_bytes = u16::from(head[TRANSPORT_AT + 12] >> 4) * 4;
        Some(Segment {
            seq: SeqNumber(be32(head, TRANSPORT_AT + 4)),
            ack: SeqNumber(be32(head, TRANSPORT_AT + 8)),
            flags: Flags(head[TRANSPORT_AT + 13]),
            window: be16(head, TRANSPORT_AT + 14),
            payload_bytes: self.payload_bytes.saturating_sub(header_bytes).into(),
            window_scale: None,
        })
    }

    /// Takes a hop, and changes one end.
    #[inline(always)]
    fn rewrite(&self, head: &mut [u8], end: End, addr: Ipv4Addr, port: u16, deltas: ChecksumDeltas) {
        let (addr_at, port_at) = match end {
            End::Source => (IP_AT + SOURCE, TRANSPORT_AT),
            End::Destination => (IP_AT + DESTINATION, TRANSPORT_AT + 2),
        };
        let address = u32::from(deltas.address);
        let added = if self.partial { address } else { address + u32::from(deltas.port) };
        if self.protocol == Protocol::TCP {
            let head: &mut [u8; TCP_HEAD_BYTES] = head.first_chunk_mut().expect("it was read there");
            let field = be16(head, TCP_CHECKSUM);
            let sum = if self.partial { fold(u32::from(field) + added) } else { changed(field, added) };
            head[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let head: &mut [u8; UDP_HEAD_BYTES] = head.first_chunk_mut().expect("it was read there");
        if self.protocol == Protocol::UDP {
            let field = be16(head, UDP_CHECKSUM);
            let sum = match field {
                _ if self.partial => fold(u32::from(field) + added),
                0 => 0,
                _ => udp_nonzero(changed(field, added)),
            };
            head[UDP_CHECKSUM..UDP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let sum = changed(be16(head, IP_AT + IP_CHECKSUM), address + u32::from(HOP_DELTA));
        head[IP_AT + IP_CHECKSUM..IP_AT + IP_CHECKSUM + 2].copy_from_slice(&sum.to_be_bytes());
        head[IP_AT + TTL] -= 1;
        head[addr_at..addr_at + 4].copy_from_slice(&addr.octets());
        head[port_at..port_at + 2].copy_from_slice(&port.to_be_bytes());
    }
}

/// Length of the packets, with their headers, that a frame with whole headers of TCP or UDP is cut into.
fn segment_bytes(head: &[u8], protocol: Protocol, gso: Gso) -> u16 {
    let transport_bytes = match (protocol, head.get(TRANSPORT_AT + 12)) {
        (Protocol::TCP, Some(offset)) => u16::from(offset >> 4) * 4,
        _ => udp::HEADER_BYTES as u16,
    };
    gso.size_bytes.saturating_add(ipv4::HEADER_BYTES as u16 + transport_bytes)
}

/// Both ends of a frame that begins with `head` if it is plain: source and destination, address and port. Nothing is judged.
#[inline(always)]
fn ends_at_first_sight(head: &[u8]) -> (Protocol, [(Ipv4Addr, u16); 2]) {
    let head: &[u8; UDP_HEAD_BYTES] = head.first_chunk().unwrap_or(&[0; UDP_HEAD_BYTES]);
    let src = (Ipv4Addr::from_bits(be32(head, IP_AT + SOURCE)), be16(head, TRANSPORT_AT));
    let dst = (Ipv4Addr::from_bits(be32(head, IP_AT + DESTINATION)), be16(head, TRANSPORT_AT + 2));
    (Protocol(head[IP_AT + 9]), [src, dst])
}

/// How a frame of the guest that begins with `head` is known if it is plain; a key of nobody if it is not.
#[inline(always)]
pub(super) fn outbound_at_first_sight(head: &[u8]) -> Outbound {
    let (protocol, [(guest, guest_port), (remote, remote_port)]) = ends_at_first_sight(head);
    Outbound { protocol, guest, guest_port, remote, remote_port }
}

/// The same of the world.
#[inline(always)]
pub(super) fn inbound_at_first_sight(head: &[u8]) -> Inbound {
    let (protocol, [(remote, remote_port), (_, external_port)]) = ends_at_first_sight(head);
    Inbound { protocol, external_port, remote, remote_port }
}

/// Whether the head holds a whole header of TCP that opens nothing.
#[inline(always)]
fn segment_is_plain(head: &[u8], payload_bytes: u16) -> bool {
    let Some(head) = head.first_chunk::<TCP_HEAD_BYTES>() else { return false };
    let header_bytes = u16::from(head[TRANSPORT_AT + 12] >> 4) * 4;
    header_bytes >= tcp::HEADER_BYTES as u16
        && header_bytes <= payload_bytes
        && !Flags(head[TRANSPORT_AT + 13]).contains(Flags::SYN)
}

/// The one's complement sum of a few words that were added up.
#[inline(always)]
const fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + sum) as u16
}

/// A complete checksum over words to which `delta` is added, itself a sum of a few words.
#[inline(always)]
fn changed(checksum: u16, delta: u32) -> u16 {
    !fold(u32::from(!checksum) + delta)
}

impl PacketNat {
    /// Carries a plain packet of the guest to the world, if it can.
    #[inline]
    pub(super) fn pass_outward(&mut self, now: Instant, packet: &mut Packet<'_>) -> Passage {
        let Some(outside) = self.config.outside else { return Passage::General };
        let Some(plain) = Plain::read(packet, self.config.outside_ip_mtu) else { return Passage::General };
        if plain.dst == outside {
            return Passage::General;
        }
        let found = self.table.find_outbound(&Outbound {
            protocol: plain.protocol,
            guest: plain.src,
            guest_port: plain.src_port,
            remote: plain.dst,
            remote_port: plain.dst_port,
        });
        let Some(at) = found else { return Passage::Unknown };
        if self.advance_plain(now, at, Side::Guest, &plain, packet.head).is_none() {
            return Passage::General;
        }
        let flow = self.table.flow(at);
        plain.rewrite(packet.head, End::Source, outside, flow.key().external_port, flow.deltas);
        Passage::Done
    }

    /// Carries a plain packet of the world to a guest, if it can.
    #[inline]
    pub(super) fn pass_inward(&mut self, now: Instant, packet: &mut Packet<'_>) -> Passage {
        let Some(outside) = self.config.outside else { return Passage::General };
        let Some(plain) = Plain::read(packet, self.config.guest_ip_mtu) else { return Passage::General };
        // Flows between two guests have the outside address for both.
        if plain.dst != outside || plain.src == outside {
            return Passage::General;
        }
        let found = self.table.find_inbound(&Inbound {
            protocol: plain.protocol,
            external_port: plain.dst_port,
            remote: plain.src,
            remote_port: plain.src_port,
        });
        let Some(at) = found else { return Passage::Unknown };
        if self.advance_plain(now, at, Side::World, &plain, packet.head).is_none() {
            return Passage::General;
        }
        let flow = self.table.flow(at);
        let key = flow.key();
        plain.rewrite(packet.head, End::Destination, key.guest, key.guest_port, flow.deltas.inverse());
        Passage::Done
    }

    /// As [`PacketNat::advance`]. A flow that does not take the packet is as before, and is asked again.
    #[inline(always)]
    fn advance_plain(
        &mut self,
        now: Instant,
        at: FlowIndex,
        side: Side,
        plain: &Plain,
        head: &[u8],
    ) -> Option<()> {
        let liberal = self.config.liberal;
        let judge = |tcp: &mut super::TcpTracker, from| match plain.segment(head) {
            Some(segment) => tcp.take(from, &segment, liberal),
            None => TcpVerdict::Invalid,
        };
        self.advance(now, at, side, plain.protocol, judge).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;

    use super::super::Verdict;
    use super::super::config::PacketNatConfig;
    use super::super::ports::Mappings;
    use super::*;
    use crate::wire::checksum::Accumulator;
    use crate::wire::vnet::{GsoKind, VnetHeader};

    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
    const REMOTE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
    const PORT: u16 = 50_000;

    fn nat() -> PacketNat {
        let config = PacketNatConfig {
            outside: Some(OUTSIDE),
            flows_max: 64,
            guest_flows_max: 64,
            ..PacketNatConfig::new("10.0.2.0/24".parse().unwrap(), Ipv4Addr::new(10, 0, 2, 1), (3, 4))
        };
        let mappings = Arc::new(Mutex::new(Mappings::new(config.ports.clone(), (5, 6))));
        PacketNat::new(config, mappings, Instant::ZERO).unwrap()
    }

    fn sum_header(head: &mut [u8]) {
        head[24..26].fill(0);
        let mut sum = Accumulator::new();
        sum.add_bytes(&head[IP_AT..TRANSPORT_AT]);
        head[24..26].copy_from_slice(&sum.finish().to_be_bytes());
    }

    /// A frame of 64 bytes of the flow, checksum of the transport as it comes.
    fn frame(protocol: Protocol, out: bool, flags: u8, seq: u32, ack: u32) -> [u8; 64] {
        let mut head = [0u8; 64];
        let (src, dst) = if out { (GUEST, REMOTE) } else { (REMOTE, OUTSIDE) };
        let ports = if out { [PORT, 443] } else { [443, PORT] };
        head[12..18].copy_from_slice(&[8, 0, 0x45, 0, 0, 50]);
        head[22..24].copy_from_slice(&[64, protocol.0]);
        head[26..30].copy_from_slice(&src.octets());
        head[30..34].copy_from_slice(&dst.octets());
        head[34..36].copy_from_slice(&ports[0].to_be_bytes());
        head[36..38].copy_from_slice(&ports[1].to_be_bytes());
        if protocol == Protocol::TCP {
            head[38..42].copy_from_slice(&seq.to_be_bytes());
            head[42..46].copy_from_slice(&ack.to_be_bytes());
            head[46..50].copy_from_slice(&[0x50, flags, 0x20, 0]);
            head[50..52].copy_from_slice(&(seq as u16 ^ ack as u16).to_be_bytes());
        } else {
            head[38..40].copy_from_slice(&[0, 30]);
            head[40..42].copy_from_slice(&(seq as u16).to_be_bytes());
        }
        sum_header(&mut head);
        head
    }

    type Judge = fn(&mut PacketNat, Instant, &mut Packet<'_>) -> Verdict;
    const WHOLE: [Judge; 2] = [PacketNat::from_guest, PacketNat::from_world];
    const GENERAL: [Judge; 2] = [
        |nat, now, packet| nat.judge_from_guest(now, packet, Passage::General),
        |nat, now, packet| nat.judge_from_world(now, packet, Passage::General),
    ];

    fn judged(
        nat: &mut PacketNat,
        by: [Judge; 2],
        out: bool,
        head: &[u8; 64],
        len_bytes: usize,
        vnet: VnetHeader,
    ) -> (Verdict, [u8; 64]) {
        let mut head = *head;
        let mut packet = Packet::new(&vnet, &mut head[..len_bytes], len_bytes);
        let verdict = by[usize::from(!out)](nat, Instant::from_micros(1_000_000), &mut packet);
        (verdict, head)
    }

    #[test]
    fn a_frame_to_be_cut_passes_the_short_way() {
        for (protocol, offset) in [(Protocol::UDP, 6), (Protocol::TCP, 16)] {
            let mut nat = nat();
            for (out, flags, seq, ack) in [(true, 2, 100, 0), (false, 0x12, 900, 101), (true, 0x10, 101, 901)]
            {
                let head = frame(protocol, out, flags, seq, ack);
                judged(&mut nat, GENERAL, out, &head, 64, VnetHeader::default());
            }
            let gso = Some(Gso { kind: GsoKind::Tcp4, size_bytes: 8, headers_bytes: 54, ecn: false });
            let checksum = Checksum::Partial { start: 34, offset };
            let vnet = VnetHeader { checksum, gso, ..VnetHeader::default() };
            let now = Instant::from_micros(1_000_000);
            // Longer as a whole than the link, its packets are not.
            nat.set_ip_mtus(49, 49);
            for (out, seq, ack) in [(true, 101, 901), (false, 901, 101)] {
                let mut head = frame(protocol, out, 0x10, seq, ack);
                let mut packet = Packet::new(&vnet, &mut head, 64);
                let passage =
                    if out { nat.pass_outward(now, &mut packet) } else { nat.pass_inward(now, &mut packet) };
                assert_eq!(passage, Passage::Done, "{protocol:?} {out}");
            }
        }
    }

    proptest! {
        /// Frames of two standing flows, changed in a few bytes: the general way alone says and does the same.
        #[test]
        fn both_ways_say_and_do_the_same(
            frames in proptest::collection::vec(
                (any::<bool>(), any::<bool>(), 0u32..3000, 0u32..3000, prop_oneof![3 => Just(0x10u8), 1 => any::<u8>()],
                 proptest::collection::vec((12usize..54, any::<u8>()), 0..3), any::<bool>(),
                 prop_oneof![4 => Just(64usize), 1 => 14usize..64], prop_oneof![Just(None), Just(Some(16u16)), Just(Some(6))],
                 prop_oneof![2 => Just(None), 1 => (any::<bool>(), 0u16..40).prop_map(Some)]),
                1..30,
            ),
            ip_mtu in prop_oneof![2 => Just(1500u16), 1 => 28u16..60],
        ) {
            let (mut whole, mut general) = (nat(), nat());
            for nat in [&mut whole, &mut general] {
                for (protocol, out, flags, seq, ack) in [
                    (Protocol::UDP, true, 0, 1, 0), (Protocol::UDP, false, 0, 1, 0), (Protocol::TCP, true, 2, 100, 0),
                    (Protocol::TCP, false, 0x12, 900, 101), (Protocol::TCP, true, 0x10, 101, 901),
                ] {
                    let head = frame(protocol, out, flags, seq, ack);
                    let (verdict, _) = judged(nat, GENERAL, out, &head, 64, VnetHeader::default());
                    prop_assert_eq!(verdict, Verdict::Forward);
                }
                nat.set_ip_mtus(ip_mtu, ip_mtu);
            }
            for (tcp, out, seq, ack, flags, changes, sums, len_bytes, offset, gso) in frames {
                let protocol = if tcp { Protocol::TCP } else { Protocol::UDP };
                let mut head = frame(protocol, out, flags, seq, ack);
                for (at, value) in changes {
                    head[at] = value;
                }
                if sums {
                    sum_header(&mut head);
                }
                let checksum = offset.map_or(Checksum::Complete, |offset| Checksum::Partial { start: 34, offset });
                let gso = gso.map(|(of_tcp, size_bytes)| {
                    let kind = if of_tcp { GsoKind::Tcp4 } else { GsoKind::UdpL4 };
                    Gso { kind, size_bytes, headers_bytes: 54, ecn: false }
                });
                let vnet = VnetHeader { checksum, gso, ..VnetHeader::default() };
                let said = judged(&mut whole, WHOLE, out, &head, len_bytes, vnet);
                prop_assert_eq!(said, judged(&mut general, GENERAL, out, &head, len_bytes, vnet));
            }
        }
    }
}
