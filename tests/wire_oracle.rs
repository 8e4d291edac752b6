//! Wire formats against an implementation that is not ours: what vunet emits, etherparse must read the
//! same, and its checksums must agree; what etherparse writes, vunet must read.

use std::net::{IpAddr, Ipv4Addr};

use etherparse::{
    IcmpEchoHeader, Icmpv4Header, Icmpv4Slice, Icmpv4Type, IpFragOffset, IpNumber, Ipv4Header, TcpHeader,
    TcpOptionElement, UdpHeader, icmpv4 as oracle_icmpv4,
};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use vunet::wire::checksum::{pseudo_header, udp_nonzero};
use vunet::wire::{icmpv4, ipv4, tcp, udp};

fn config() -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::with_cases(512) }
}

/// Addresses in both forms, with a full IP header around `payload_bytes`.
fn ip_header(src: Ipv4Addr, dst: Ipv4Addr, protocol: ipv4::Protocol, payload_bytes: usize) -> ipv4::Header {
    ipv4::Header {
        src,
        dst,
        protocol,
        ttl: 64,
        tos: 0,
        ident: 0,
        dont_fragment: true,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes,
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn etherparse_reads_our_ipv4(
        addrs in any::<(Ipv4Addr, Ipv4Addr)>(), protocol: u8, ttl: u8, tos: u8, ident: u16,
        flags in any::<(bool, bool)>(), offset_units in 0u16..8192, payload_bytes in 0usize..=65_515,
    ) {
        let header = ipv4::Header {
            ttl, tos, ident,
            dont_fragment: flags.0,
            more_fragments: flags.1,
            fragment_offset_bytes: offset_units * 8,
            ..ip_header(addrs.0, addrs.1, ipv4::Protocol(protocol), payload_bytes)
        };
        let mut bytes = [0; ipv4::HEADER_BYTES];
        header.emit(&mut bytes);
        let (theirs, rest) = Ipv4Header::from_slice(&bytes).unwrap();
        prop_assert!(rest.is_empty());
        prop_assert_eq!(theirs.header_checksum, theirs.calc_header_checksum());
        prop_assert_eq!(theirs.source, addrs.0.octets());
        prop_assert_eq!(theirs.destination, addrs.1.octets());
        prop_assert_eq!(theirs.protocol, IpNumber(protocol));
        prop_assert_eq!(theirs.time_to_live, ttl);
        prop_assert_eq!(theirs.dscp.value() << 2 | theirs.ecn.value(), tos);
        prop_assert_eq!(theirs.identification, ident);
        prop_assert_eq!((theirs.dont_fragment, theirs.more_fragments), flags);
        prop_assert_eq!(theirs.fragment_offset.value(), offset_units);
        prop_assert_eq!(usize::from(theirs.total_len), ipv4::HEADER_BYTES + payload_bytes);
    }

    #[test]
    fn we_read_etherparses_ipv4(
        addrs in any::<([u8; 4], [u8; 4])>(), protocol: u8, payload in 0u16..1400, options in 0usize..=10,
        offset_units in 0u16..100,
    ) {
        let mut theirs = Ipv4Header::new(payload, 64, IpNumber(protocol), addrs.0, addrs.1).unwrap();
        theirs.options = vec![1; options * 4].as_slice().try_into().unwrap();
        theirs.set_payload_len(payload.into()).unwrap();
        theirs.fragment_offset = IpFragOffset::try_new(offset_units).unwrap();
        theirs.header_checksum = theirs.calc_header_checksum();
        let bytes = theirs.to_bytes();
        let ours = ipv4::Header::parse(&bytes, 1500).unwrap();
        prop_assert_eq!((ours.src.octets(), ours.dst.octets()), addrs);
        prop_assert_eq!(ours.header_bytes, theirs.header_len());
        prop_assert_eq!(ours.payload_bytes, usize::from(payload));
        prop_assert_eq!(ours.fragment_offset_bytes, offset_units * 8);
        prop_assert_eq!(ours.is_fragment(), offset_units != 0);
    }

    #[test]
    fn etherparse_reads_our_tcp_and_agrees_on_the_checksum(
        addrs in any::<(Ipv4Addr, Ipv4Addr)>(), ports in any::<(u16, u16)>(), numbers in any::<(u32, u32)>(),
        flags: u8, window: u16, urgent: u16, mss: Option<u16>, scale in proptest::option::of(0u8..=14),
        sack_permitted: bool, timestamps: Option<(u32, u32)>, sack: Option<(u32, u32)>, payload: Vec<u8>,
    ) {
        let mut options = tcp::Options { mss, window_scale: scale, sack_permitted, timestamps, ..Default::default() };
        options.sack[0] = sack.map(|(left, right)| (tcp::SeqNumber(left), tcp::SeqNumber(right)));
        let header = tcp::Header {
            src_port: ports.0, dst_port: ports.1,
            seq: tcp::SeqNumber(numbers.0), ack: tcp::SeqNumber(numbers.1),
            flags: tcp::Flags(flags), window, urgent, options,
        };
        let mut segment = vec![0; header.header_bytes() + payload.len()];
        let len = header.emit(&mut segment);
        segment[len..].copy_from_slice(&payload);
        let mut sum = pseudo_header(IpAddr::V4(addrs.0), IpAddr::V4(addrs.1), ipv4::Protocol::TCP, segment.len());
        sum.add_bytes(&segment);
        segment[tcp::CHECKSUM_OFFSET..tcp::CHECKSUM_OFFSET + 2].copy_from_slice(&sum.finish().to_be_bytes());

        let (theirs, rest) = TcpHeader::from_slice(&segment).unwrap();
        prop_assert_eq!(rest, &payload[..]);
        prop_assert_eq!((theirs.source_port, theirs.destination_port), ports);
        prop_assert_eq!((theirs.sequence_number, theirs.acknowledgment_number), numbers);
        let bits = [
            theirs.fin, theirs.syn, theirs.rst, theirs.psh, theirs.ack, theirs.urg, theirs.ece, theirs.cwr,
        ];
        let bits = bits.iter().rev().fold(0u8, |all, &bit| all << 1 | u8::from(bit));
        prop_assert_eq!(bits, flags);
        prop_assert_eq!((theirs.window_size, theirs.urgent_pointer), (window, urgent));
        let their_sum = theirs.calc_checksum_ipv4_raw(addrs.0.octets(), addrs.1.octets(), rest).unwrap();
        prop_assert_eq!(theirs.checksum, their_sum);

        let mut read = tcp::Options::default();
        for option in theirs.options_iterator() {
            match option.unwrap() {
                TcpOptionElement::Noop => {}
                TcpOptionElement::MaximumSegmentSize(mss) => read.mss = Some(mss),
                TcpOptionElement::WindowScale(scale) => read.window_scale = Some(scale),
                TcpOptionElement::SelectiveAcknowledgementPermitted => read.sack_permitted = true,
                TcpOptionElement::SelectiveAcknowledgement((left, right), _) => {
                    read.sack[0] = Some((tcp::SeqNumber(left), tcp::SeqNumber(right)));
                }
                TcpOptionElement::Timestamp(value, echo) => read.timestamps = Some((value, echo)),
            }
        }
        prop_assert_eq!(read, options);
    }

    #[test]
    fn etherparse_reads_our_udp_and_agrees_on_the_checksum(
        addrs in any::<(Ipv4Addr, Ipv4Addr)>(), ports in any::<(u16, u16)>(), payload: Vec<u8>,
    ) {
        let len_bytes = udp::HEADER_BYTES + payload.len();
        let (src_port, dst_port) = ports;
        let mut header = udp::Header { src_port, dst_port, len_bytes, checksum: 0 };
        let mut datagram = vec![0; len_bytes];
        header.emit(&mut datagram);
        datagram[udp::HEADER_BYTES..].copy_from_slice(&payload);
        let mut sum = pseudo_header(IpAddr::V4(addrs.0), IpAddr::V4(addrs.1), ipv4::Protocol::UDP, len_bytes);
        sum.add_bytes(&datagram);
        header.checksum = udp_nonzero(sum.finish());
        header.emit(&mut datagram);

        let (theirs, rest) = UdpHeader::from_slice(&datagram).unwrap();
        prop_assert_eq!(rest, &payload[..]);
        prop_assert_eq!((theirs.source_port, theirs.destination_port), ports);
        prop_assert_eq!(usize::from(theirs.length), len_bytes);
        let their_sum = theirs.calc_checksum_ipv4_raw(addrs.0.octets(), addrs.1.octets(), rest).unwrap();
        prop_assert_eq!(theirs.checksum, their_sum);
    }

    #[test]
    fn checksums_agree_over_ipv6_too(
        src in any::<[u8; 16]>(), dst in any::<[u8; 16]>(), payload: Vec<u8>,
    ) {
        let theirs = UdpHeader::with_ipv6_checksum(
            1, 2, &etherparse::Ipv6Header { source: src, destination: dst, ..Default::default() }, &payload,
        ).unwrap();
        let len_bytes = udp::HEADER_BYTES + payload.len();
        let mut sum = pseudo_header(src.into(), dst.into(), ipv4::Protocol::UDP, len_bytes);
        let mut header = [0; udp::HEADER_BYTES];
        udp::Header { src_port: 1, dst_port: 2, len_bytes, checksum: 0 }.emit(&mut header);
        sum.add_bytes(&header);
        sum.add_bytes(&payload);
        prop_assert_eq!(udp_nonzero(sum.finish()), theirs.checksum);
    }

    #[test]
    fn icmpv4_is_what_etherparse_writes(ident: u16, seq: u16, mtu: u16, code in 0u8..2, payload: Vec<u8>) {
        use icmpv4::{Message, UnreachableCode};
        let echo = IcmpEchoHeader { id: ident, seq };
        let unreachable = |code| Message::Unreachable { code, next_hop_mtu: 0 };
        let cases = [
            (Message::EchoRequest { ident, seq }, Icmpv4Type::EchoRequest(echo)),
            (Message::EchoReply { ident, seq }, Icmpv4Type::EchoReply(echo)),
            (unreachable(UnreachableCode::Net), dest(oracle_icmpv4::DestUnreachableHeader::Network)),
            (unreachable(UnreachableCode::Host), dest(oracle_icmpv4::DestUnreachableHeader::Host)),
            (unreachable(UnreachableCode::Protocol), dest(oracle_icmpv4::DestUnreachableHeader::Protocol)),
            (unreachable(UnreachableCode::Port), dest(oracle_icmpv4::DestUnreachableHeader::Port)),
            (
                unreachable(UnreachableCode::AdminProhibited),
                dest(oracle_icmpv4::DestUnreachableHeader::FilterProhibited),
            ),
            (
                Message::Unreachable { code: UnreachableCode::FragmentationNeeded, next_hop_mtu: mtu },
                dest(oracle_icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu }),
            ),
            (
                Message::TimeExceeded { code },
                Icmpv4Type::TimeExceeded(oracle_icmpv4::TimeExceededCode::from_u8(code).unwrap()),
            ),
        ];
        for (ours, theirs) in cases {
            let mut bytes = vec![0xa5; icmpv4::HEADER_BYTES + payload.len()];
            ours.emit_with_payload(&payload, &mut bytes);
            let mut expected = Icmpv4Header::with_checksum(theirs.clone(), &payload).to_bytes().to_vec();
            expected.extend_from_slice(&payload);
            prop_assert_eq!(&bytes, &expected);
            prop_assert_eq!(Icmpv4Slice::from_slice(&bytes).unwrap().icmp_type(), theirs);
            prop_assert_eq!(Message::parse(&expected), Ok(ours));
        }
    }
}

fn dest(header: oracle_icmpv4::DestUnreachableHeader) -> Icmpv4Type {
    Icmpv4Type::DestinationUnreachable(header)
}
