//! Wire formats: parse and emit are inverses, and no bytes whatever make a parser panic.
//!
//! A failing case is printed shrunk; its seed goes to `tests/wire.regressions` and is replayed first by
//! every later run.

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use vunet::addr::MacAddr;
use vunet::wire::checksum::{Accumulator, pseudo_header, udp_nonzero, update};
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VNET_HEADER_BYTES, VnetHeader};
use vunet::wire::{WireError, arp, ethernet, icmpv4, ipv4, tcp, udp};

fn config() -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::with_cases(512) }
}

fn mac() -> impl Strategy<Value = MacAddr> {
    any::<[u8; 6]>().prop_map(MacAddr)
}

prop_compose! {
    fn ipv4_header()(
        src in any::<Ipv4Addr>(),
        dst in any::<Ipv4Addr>(),
        protocol in any::<u8>(),
        ttl in any::<u8>(),
        tos in any::<u8>(),
        ident in any::<u16>(),
        dont_fragment in any::<bool>(),
        more_fragments in any::<bool>(),
        offset_units in 0u16..8192,
        payload in 0usize..=65_515,
    ) -> ipv4::Header {
        let fragment_offset_bytes = offset_units * 8;
        let room = (ipv4::PACKET_BYTES_MAX - ipv4::HEADER_BYTES).saturating_sub(fragment_offset_bytes.into());
        let payload = payload.min(room);
        ipv4::Header {
            src, dst, protocol: ipv4::Protocol(protocol), ttl, tos, ident, dont_fragment, more_fragments,
            // An offset that leaves no room even for the header cannot be in a valid packet.
            fragment_offset_bytes: if room == 0 { 0 } else { fragment_offset_bytes },
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes: if more_fragments { payload / 8 * 8 } else { payload },
        }
    }
}

prop_compose! {
    fn tcp_options()(
        mss in any::<Option<u16>>(),
        window_scale in proptest::option::of(0..=tcp::WINDOW_SCALE_MAX),
        sack_permitted in any::<bool>(),
        timestamps in any::<Option<(u32, u32)>>(),
        blocks in proptest::collection::vec(any::<(u32, u32)>(), 0..=tcp::SACK_BLOCKS_MAX),
    ) -> tcp::Options {
        let mut options = tcp::Options { mss, window_scale, sack_permitted, timestamps, ..Default::default() };
        for (slot, (left, right)) in options.sack.iter_mut().zip(blocks) {
            *slot = Some((tcp::SeqNumber(left), tcp::SeqNumber(right)));
        }
        options
    }
}

prop_compose! {
    fn tcp_header()(
        ports in any::<(u16, u16)>(),
        numbers in any::<(u32, u32)>(),
        flags in any::<u8>(),
        window in any::<u16>(),
        urgent in any::<u16>(),
        options in tcp_options(),
    ) -> tcp::Header {
        tcp::Header {
            src_port: ports.0, dst_port: ports.1,
            seq: tcp::SeqNumber(numbers.0), ack: tcp::SeqNumber(numbers.1),
            flags: tcp::Flags(flags), window, urgent, options,
        }
    }
}

fn icmp_message() -> impl Strategy<Value = icmpv4::Message> {
    use icmpv4::Message;
    prop_oneof![
        any::<(u16, u16)>().prop_map(|(ident, seq)| Message::EchoRequest { ident, seq }),
        any::<(u16, u16)>().prop_map(|(ident, seq)| Message::EchoReply { ident, seq }),
        any::<(u8, u16)>()
            .prop_map(|(code, next_hop_mtu)| Message::Unreachable { code: code.into(), next_hop_mtu }),
        any::<u8>().prop_map(|code| Message::TimeExceeded { code }),
        any::<(u8, u8)>()
            .prop_filter("kinds with a variant of their own", |&(kind, code)| {
                !matches!((kind, code), (0 | 8, 0) | (3 | 11, _))
            })
            .prop_map(|(kind, code)| Message::Other { kind, code }),
    ]
}

prop_compose! {
    fn vnet_header()(
        checksum in prop_oneof![
            Just(Checksum::Complete),
            Just(Checksum::Valid),
            any::<(u16, u16)>().prop_map(|(start, offset)| Checksum::Partial { start, offset }),
        ],
        gso in proptest::option::of((
            prop_oneof![
                Just(GsoKind::Tcp4), Just(GsoKind::Tcp6), Just(GsoKind::UdpL4), Just(GsoKind::UdpFragment),
            ],
            1..=u16::MAX,
            any::<u16>(),
            any::<bool>(),
        )),
        num_buffers in any::<u16>(),
    ) -> VnetHeader {
        let gso = gso.map(|(kind, size_bytes, headers_bytes, ecn)| Gso { kind, size_bytes, headers_bytes, ecn });
        VnetHeader { checksum, gso, num_buffers }
    }
}

/// Runs every parser over `bytes`; the packet is claimed to be `available` bytes long.
fn parse_everything(bytes: &[u8], available: usize) {
    let _ = ethernet::Header::parse(bytes);
    let _ = arp::Packet::parse(bytes);
    let _ = ipv4::Header::parse(bytes, available);
    let _ = tcp::Header::parse(bytes);
    let _ = udp::Header::parse(bytes, available);
    let _ = icmpv4::Message::parse(bytes);
    if let Some(bytes) = bytes.first_chunk() {
        let _ = VnetHeader::parse(bytes);
    }
}

/// An IPv4 header of `header_bytes` over arbitrary bytes whose checksum is right.
fn with_ipv4_checksum(mut bytes: Vec<u8>, header_bytes: usize) -> Vec<u8> {
    bytes[10..12].fill(0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&bytes[..header_bytes]);
    bytes[10..12].copy_from_slice(&sum.finish().to_be_bytes());
    bytes
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn ethernet_parses_what_it_emits(dst in mac(), src in mac(), kind in any::<u16>()) {
        let header = ethernet::Header { dst, src, ethertype: ethernet::EtherType(kind) };
        let mut bytes = [0xa5; ethernet::HEADER_BYTES];
        header.emit(&mut bytes);
        prop_assert_eq!(ethernet::Header::parse(&bytes), Ok(header));
    }

    #[test]
    fn ethernet_emits_what_it_parses(bytes in any::<[u8; ethernet::HEADER_BYTES]>()) {
        let mut again = [0; ethernet::HEADER_BYTES];
        ethernet::Header::parse(&bytes).unwrap().emit(&mut again);
        prop_assert_eq!(again, bytes);
    }

    #[test]
    fn arp_parses_what_it_emits(
        request in any::<bool>(), macs in (mac(), mac()), ips in any::<(Ipv4Addr, Ipv4Addr)>(),
    ) {
        let operation = if request { arp::Operation::Request } else { arp::Operation::Reply };
        let packet = arp::Packet {
            operation, sender_mac: macs.0, sender_ip: ips.0, target_mac: macs.1, target_ip: ips.1,
        };
        let mut bytes = [0xa5; arp::PACKET_BYTES];
        packet.emit(&mut bytes);
        prop_assert_eq!(arp::Packet::parse(&bytes), Ok(packet));
    }

    #[test]
    fn ipv4_parses_what_it_emits(header in ipv4_header(), padding in 0usize..64) {
        let mut bytes = [0xa5; ipv4::HEADER_BYTES];
        header.emit(&mut bytes);
        let total = ipv4::HEADER_BYTES + header.payload_bytes;
        prop_assert_eq!(ipv4::Header::parse(&bytes, total + padding), Ok(header));
        prop_assert_eq!(ipv4::Header::parse(&bytes, total - 1), Err(WireError::Truncated));
    }

    #[test]
    fn ipv4_checksum_finds_every_changed_bit(header in ipv4_header(), bit in 0usize..160) {
        let mut bytes = [0; ipv4::HEADER_BYTES];
        header.emit(&mut bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(ipv4::Header::parse(&bytes, usize::MAX).is_err());
    }

    #[test]
    fn tcp_parses_what_it_emits(mut header in tcp_header()) {
        let mut bytes = [0xa5; tcp::HEADER_BYTES_MAX];
        let len = header.emit(&mut bytes);
        prop_assert_eq!(len, header.header_bytes());
        prop_assert_eq!(len % 4, 0);
        prop_assert_eq!(&bytes[tcp::CHECKSUM_OFFSET..tcp::CHECKSUM_OFFSET + 2], &[0, 0]);
        let (parsed, parsed_len) = tcp::Header::parse(&bytes[..len]).unwrap();
        prop_assert_eq!(parsed_len, len);
        // SACK blocks give way to the other options; never more of them than there is no room for.
        let written = parsed.options.sack.iter().flatten().count();
        let left_out = header.options.sack.iter().flatten().count() - written;
        prop_assert!(left_out == 0 || len + 8 > tcp::HEADER_BYTES_MAX);
        header.options.sack[written..].fill(None);
        prop_assert_eq!(parsed, header);
        prop_assert_eq!(tcp::Header::parse(&bytes[..len - 1]), Err(WireError::Truncated));
    }

    #[test]
    fn udp_parses_what_it_emits(ports in any::<(u16, u16)>(), len_bytes in 8usize..=65_535, checksum: u16) {
        let header = udp::Header { src_port: ports.0, dst_port: ports.1, len_bytes, checksum };
        let mut bytes = [0xa5; udp::HEADER_BYTES];
        header.emit(&mut bytes);
        prop_assert_eq!(udp::Header::parse(&bytes, len_bytes), Ok(header));
        prop_assert_eq!(udp::Header::parse(&bytes, len_bytes - 1), Err(WireError::Truncated));
    }

    #[test]
    fn icmpv4_parses_what_it_emits(message in icmp_message(), payload: Vec<u8>) {
        let mut bytes = vec![0xa5; icmpv4::HEADER_BYTES + payload.len()];
        message.emit(&mut bytes);
        prop_assert_eq!(&bytes[2..4], &[0, 0]);
        prop_assert_eq!(icmpv4::Message::parse(&bytes), Ok(message));
        prop_assert_eq!(message.emit_with_payload(&payload, &mut bytes), bytes.len());
        prop_assert_eq!(icmpv4::Message::parse(&bytes), Ok(message));
        let mut sum = Accumulator::new();
        sum.add_bytes(&bytes);
        prop_assert_eq!(sum.finish(), 0);
    }

    #[test]
    fn vnet_header_parses_what_it_emits(header in vnet_header()) {
        prop_assert_eq!(VnetHeader::parse(&header.emit()), Ok(header));
    }

    #[test]
    fn vnet_header_emits_the_meaning_it_parsed(bytes in any::<[u8; VNET_HEADER_BYTES]>()) {
        if let Ok(header) = VnetHeader::parse(&bytes) {
            prop_assert_eq!(VnetHeader::parse(&header.emit()), Ok(header));
        }
    }

    #[test]
    fn no_bytes_make_a_parser_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200), available in any::<usize>(),
    ) {
        parse_everything(&bytes, available);
    }

    #[test]
    fn no_truncation_makes_a_parser_panic(ip in ipv4_header(), tcp in tcp_header(), available in any::<usize>()) {
        let mut bytes = [0; ipv4::HEADER_BYTES + tcp::HEADER_BYTES_MAX];
        ip.emit(&mut bytes);
        tcp.emit(&mut bytes[ipv4::HEADER_BYTES..]);
        for from in [0, ipv4::HEADER_BYTES] {
            for to in from..=bytes.len() {
                parse_everything(&bytes[from..to], available);
            }
        }
    }

    #[test]
    fn tcp_options_of_any_bytes_parse_to_what_is_emitted_again(
        options in proptest::collection::vec(any::<u8>(), 0..=40), words in 5u8..=15,
    ) {
        let mut bytes = [0u8; tcp::HEADER_BYTES_MAX];
        bytes[20..20 + options.len()].copy_from_slice(&options);
        bytes[12] = words << 4;
        let (header, len) = tcp::Header::parse(&bytes).unwrap();
        prop_assert_eq!(len, usize::from(words) * 4);
        let mut again = [0u8; tcp::HEADER_BYTES_MAX];
        let len = header.emit(&mut again);
        let (parsed, _) = tcp::Header::parse(&again[..len]).unwrap();
        prop_assert_eq!(parsed.options.mss, header.options.mss);
        prop_assert_eq!(parsed.options.timestamps, header.options.timestamps);
        prop_assert_eq!(parsed.options.window_scale, header.options.window_scale);
    }

    #[test]
    fn ipv4_options_are_skipped(
        words in 5u8..=15, fill in proptest::collection::vec(any::<u8>(), 60), payload in 0u16..1400,
    ) {
        let header_bytes = usize::from(words) * 4;
        let mut bytes = fill;
        bytes[0] = 0x40 | words;
        bytes[2..4].copy_from_slice(&(u16::from(words) * 4 + payload).to_be_bytes());
        bytes[6..8].fill(0);
        let bytes = with_ipv4_checksum(bytes, header_bytes);
        let header = ipv4::Header::parse(&bytes, 1500).unwrap();
        prop_assert_eq!(header.header_bytes, header_bytes);
        prop_assert_eq!(header.payload_bytes, usize::from(payload));
        prop_assert_eq!(ipv4::Header::parse(&bytes[..header_bytes - 1], 1500), Err(WireError::Truncated));
    }

    #[test]
    fn incremental_checksum_equals_full(
        mut bytes in proptest::collection::vec(any::<u8>(), 2..256), at in any::<prop::sample::Index>(), new: u16,
    ) {
        let full = |bytes: &[u8]| {
            let mut sum = Accumulator::new();
            sum.add_bytes(bytes);
            sum.finish()
        };
        // A packet is never all zero bytes (RFC 1624's one ambiguous sum): its version is not.
        bytes[0] |= 0x40;
        let before = full(&bytes);
        let at = at.index(bytes.len() / 2) * 2;
        let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        bytes[at..at + 2].copy_from_slice(&new.to_be_bytes());
        bytes[0] |= 0x40;
        let new = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        prop_assert_eq!(update(before, old, new), full(&bytes));
    }

    #[test]
    fn pieces_sum_to_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..600), cuts: Vec<u16>) {
        let mut whole = Accumulator::new();
        whole.add_bytes(&bytes);
        let mut cuts: Vec<usize> = cuts.iter().map(|&cut| usize::from(cut) % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let mut pieces = Accumulator::new();
        for pair in cuts.windows(2) {
            pieces.add_bytes(&bytes[pair[0]..pair[1]]);
        }
        prop_assert_eq!(pieces.fold(), whole.fold());
    }

    #[test]
    fn a_partial_checksum_completed_over_the_segment_is_the_full_one(
        src in any::<IpAddr>(), dst in any::<IpAddr>(), payload: Vec<u8>, ports in any::<(u16, u16)>(),
    ) {
        let len_bytes = udp::HEADER_BYTES + payload.len();
        let pseudo = pseudo_header(src, dst, ipv4::Protocol::UDP, len_bytes);
        let mut segment = vec![0; len_bytes];
        let (src_port, dst_port) = ports;
        let partial = udp::Header { src_port, dst_port, len_bytes, checksum: pseudo.fold() };
        partial.emit(&mut segment);
        segment[udp::HEADER_BYTES..].copy_from_slice(&payload);
        // What a receiver of NEEDS_CSUM does: sum from `start` on, the field included, store at `offset`.
        let mut completed = Accumulator::new();
        completed.add_bytes(&segment);
        let checksum = udp_nonzero(completed.finish());

        segment[udp::CHECKSUM_OFFSET..udp::HEADER_BYTES].fill(0);
        let mut full = pseudo;
        full.add_bytes(&segment);
        prop_assert_eq!(checksum, udp_nonzero(full.finish()));
    }

    #[test]
    fn sequence_order_holds_around_the_circle(start: u32, step in 1u32..0x8000_0000) {
        let earlier = tcp::SeqNumber(start);
        let later = earlier + usize::try_from(step).unwrap();
        prop_assert!(earlier.before(later) && later.after(earlier));
        prop_assert!(earlier.at_or_before(later) && later.at_or_after(earlier));
        prop_assert!(!later.before(earlier) && !earlier.after(later));
        prop_assert!(!later.at_or_before(earlier) && !earlier.at_or_after(later));
        prop_assert_eq!(i64::from(later.distance_from(earlier)), i64::from(step));
        prop_assert_eq!(i64::from(earlier.distance_from(later)), -i64::from(step));
        prop_assert_eq!(later - usize::try_from(step).unwrap(), earlier);
    }
}

#[test]
fn sequence_numbers_wrap() {
    let last = tcp::SeqNumber(u32::MAX);
    assert_eq!(last + 1, tcp::SeqNumber(0));
    assert_eq!(tcp::SeqNumber(0) - 1, last);
    assert_eq!((last + 1).distance_from(last), 1);
    assert_eq!(last.distance_from(last + 1), -1);
    assert!(last.before(tcp::SeqNumber(0)));
    assert!(tcp::SeqNumber(5).after(last));
    assert!(last.at_or_before(last) && last.at_or_after(last));
    assert!(!last.before(last) && !last.after(last));
    assert_eq!((last - 10).distance_from(tcp::SeqNumber(9)), -20);
}

#[test]
fn a_distance_of_half_the_circle_is_negative_both_ways() {
    let (a, b) = (tcp::SeqNumber(7), tcp::SeqNumber(7) + 0x8000_0000);
    assert_eq!(a.distance_from(b), i32::MIN);
    assert_eq!(b.distance_from(a), i32::MIN);
    assert!(a.before(b) && b.before(a));
}

#[test]
fn tcp_flags_print_their_names() {
    assert_eq!(format!("{:?}", tcp::Flags::SYN | tcp::Flags::ACK), "SYN|ACK");
    assert_eq!(format!("{:?}", tcp::Flags::NONE), "none");
    assert!((tcp::Flags::SYN | tcp::Flags::ACK).contains(tcp::Flags::SYN));
    assert!(!tcp::Flags::SYN.contains(tcp::Flags::SYN | tcp::Flags::ACK));
    assert!(tcp::Flags::SYN.intersects(tcp::Flags::SYN | tcp::Flags::ACK));
}

#[test]
fn malformed_tcp_options_end_the_options_but_not_the_segment() {
    let parse = |options: &[u8]| {
        let mut bytes = [0u8; tcp::HEADER_BYTES_MAX];
        bytes[12] = 0xf0;
        bytes[20..20 + options.len()].copy_from_slice(options);
        tcp::Header::parse(&bytes).unwrap().0.options
    };
    let mss = tcp::Options { mss: Some(1460), ..Default::default() };
    // Behind the MSS: length 0, 1, past the end, wrong for its kind.
    for bad in
        [&[3, 0, 7][..], &[3, 1, 7], &[3, 200, 7], &[3, 4, 7, 7], &[4, 3, 0], &[5, 3, 0], &[8, 4, 0, 0]]
    {
        let options = [&[2, 4, 5, 180], bad, &[2, 4, 0, 1]].concat();
        assert_eq!(parse(&options), mss, "{bad:?}");
    }
    // Unknown kinds are skipped, END ends, a window scale above 14 is 14.
    assert_eq!(parse(&[254, 4, 9, 9, 2, 4, 5, 180]), mss);
    assert_eq!(parse(&[2, 4, 5, 180, 0, 2, 4, 0, 1]), mss);
    assert_eq!(parse(&[3, 3, 15]).window_scale, Some(14));
}

#[test]
fn a_tcp_data_offset_below_the_header_is_malformed() {
    for words in 0..5u8 {
        let mut bytes = [0u8; tcp::HEADER_BYTES];
        bytes[12] = words << 4;
        assert!(matches!(tcp::Header::parse(&bytes), Err(WireError::Malformed(_))), "{words}");
    }
    assert_eq!(tcp::Header::parse(&[0; tcp::HEADER_BYTES - 1]), Err(WireError::Truncated));
}

#[test]
fn ipv4_refuses_what_contradicts_itself() {
    let good = ipv4::Header {
        src: Ipv4Addr::new(10, 0, 2, 2),
        dst: Ipv4Addr::new(192, 0, 2, 1),
        protocol: ipv4::Protocol::UDP,
        ttl: 64,
        tos: 0,
        ident: 1,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: 80,
    };
    let changed = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = vec![0; ipv4::HEADER_BYTES];
        good.emit(&mut bytes);
        change(&mut bytes);
        ipv4::Header::parse(&with_ipv4_checksum(bytes, ipv4::HEADER_BYTES), 100)
    };
    assert_eq!(changed(&|_| {}), Ok(good));
    let malformed = |change: &dyn Fn(&mut [u8])| matches!(changed(change), Err(WireError::Malformed(_)));
    assert!(malformed(&|b| b[0] = 0x65), "version 6");
    assert!(malformed(&|b| b[0] = 0x44), "header length 16");
    assert!(malformed(&|b| b[2..4].copy_from_slice(&[0, 19])), "total length below the header's");
    assert!(malformed(&|b| b[6..8].copy_from_slice(&[0x20 | 0x1f, 0xff])), "fragment past the end");
    assert!(malformed(&|b| b[2..8].copy_from_slice(&[0, 99, 0, 1, 0x20, 0])), "middle fragment of 79 bytes");
    assert_eq!(changed(&|b| b[0] = 0x46), Err(WireError::Truncated), "options beyond the bytes at hand");
    assert_eq!(changed(&|b| b[3] = 101), Err(WireError::Truncated), "longer than received");
}

#[test]
fn the_last_byte_of_the_longest_packet_may_be_a_fragments() {
    let mut header = ipv4::Header {
        src: Ipv4Addr::LOCALHOST,
        dst: Ipv4Addr::LOCALHOST,
        protocol: ipv4::Protocol::ICMP,
        ttl: 1,
        tos: 0,
        ident: 0,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 65_512,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: 3,
    };
    let mut bytes = [0; ipv4::HEADER_BYTES];
    header.emit(&mut bytes);
    assert!(header.is_fragment());
    assert_eq!(ipv4::Header::parse(&bytes, 23), Ok(header));
    header.payload_bytes = 4;
    header.emit(&mut bytes);
    assert!(matches!(ipv4::Header::parse(&bytes, 24), Err(WireError::Malformed(_))));
}

#[test]
fn arp_for_other_networks_is_malformed() {
    let packet = arp::Packet {
        operation: arp::Operation::Request,
        sender_mac: MacAddr::GATEWAY,
        sender_ip: Ipv4Addr::UNSPECIFIED,
        target_mac: MacAddr::ZERO,
        target_ip: Ipv4Addr::new(10, 0, 2, 1),
    };
    let mut good = [0; arp::PACKET_BYTES];
    packet.emit(&mut good);
    for at in 0..8 {
        let mut bytes = good;
        bytes[at] ^= 0x80;
        assert!(matches!(arp::Packet::parse(&bytes), Err(WireError::Malformed(_))), "byte {at}");
    }
    assert_eq!(arp::Packet::parse(&good[..27]), Err(WireError::Truncated));
}

#[test]
fn vnet_header_refuses_segmentation_it_does_not_know() {
    let mut bytes = [0u8; VNET_HEADER_BYTES];
    bytes[4] = 1;
    for kind in [2, 6, 0x7f, 0x82] {
        bytes[1] = kind;
        assert!(matches!(VnetHeader::parse(&bytes), Err(WireError::Malformed(_))), "{kind:#x}");
    }
    bytes[1] = 1;
    bytes[4] = 0;
    assert_eq!(VnetHeader::parse(&bytes), Err(WireError::Malformed("gso_size 0")));
}
