//! ICMP errors: what the world says of the guest's datagrams, and what the guest hears of it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::engine::counters::DropReason;
use vunet::engine::host_net::PacketFields;
use vunet::limits;
use vunet::wire::checksum::Accumulator;
use vunet::wire::icmpv4::{Message, UnreachableCode};
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::udp;

use crate::frames::{
    GATEWAY, GUEST_IP, Seen, WORLD, echo_frame, echo_message, fragments, frame, guest, ip, udp_frame,
    udp_message, world,
};
use crate::handover::exchange;
use crate::rig::{COMPLAINT, READABLE, Rig, Setup, only, pattern, secs};
use crate::world::Complaint;

const ROUTER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const EXPIRED: Message = Message::TimeExceeded { code: 0 };

fn unreachable(code: UnreachableCode, next_hop_mtu: u16) -> Message {
    Message::Unreachable { code, next_hop_mtu }
}

fn frag_needed(next_hop_mtu: u16) -> Message {
    unreachable(UnreachableCode::FragmentationNeeded, next_hop_mtu)
}

/// The world says `message` about what socket `n` sent to `to`.
fn complain(
    rig: &mut Rig,
    n: usize,
    to: SocketAddr,
    offender: Ipv4Addr,
    message: Message,
    quoted: &[u8],
) -> Vec<Seen> {
    let complaint = Complaint { to, offender: Some(offender.into()), message, quoted: quoted.to_vec() };
    rig.sock(n).complaints.push_back(complaint);
    let token = rig.sock(n).token;
    rig.ready(token, COMPLAINT)
}

#[test]
fn an_error_quotes_the_guests_packet_though_the_socket_moved_since() {
    let mut rigs = Rig::workers(2);
    let probe = udp_frame(guest(4000), world(9), b"probe");
    let mut expected = Vec::new();
    for moves in [false, true] {
        rigs[0].send(&probe);
        if moves {
            for _ in 0..=limits::SENT_ON_FRAMES {
                rigs[1].send(&udp_frame(guest(4000), world(10), b"other"));
                exchange(&mut rigs);
            }
            assert_eq!(rigs[0].engine.nat().len(), 0);
        }
        let port = Message::Unreachable { code: UnreachableCode::Port, next_hop_mtu: 0 };
        let rig = &mut rigs[usize::from(moves)];
        expected.push(complain(rig, 0, world(9).into(), WORLD, port, b"pro"));
    }
    assert_eq!(expected[0].len(), 1);
    assert_eq!(expected[0], expected[1]);
}

/// A rig whose guest sent `payload` from port 4000 to the world's port 9.
fn asked(payload: &[u8]) -> Rig {
    let mut rig = Rig::new();
    assert_eq!(rig.send(&udp_frame(guest(4000), world(9), payload)), []);
    rig
}

#[test]
fn every_error_of_the_world_reaches_the_guest_as_it_came_with_its_own_packet_quoted() {
    let codes = [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15];
    let unreachable = codes.map(|code| unreachable(UnreachableCode::from(code), 0));
    for message in
        unreachable.into_iter().chain([frag_needed(1400), EXPIRED, Message::TimeExceeded { code: 1 }])
    {
        let sent = udp_frame(guest(4000), world(9), b"traceroute");
        let mut rig = Rig::new();
        rig.send(&sent);
        let seen = complain(&mut rig, 0, world(9).into(), ROUTER, message, b"traceroute");
        let Seen::Icmp { from, message: heard, payload } = only(seen) else { panic!("not ICMP") };
        assert_eq!((from, heard), (ROUTER, message));
        let header = ipv4::Header::parse(&payload, usize::MAX).expect("an IPv4 header, its checksum right");
        assert_eq!((header.src, header.dst, header.protocol), (GUEST_IP, WORLD, Protocol::UDP));
        assert_eq!(header.ident, 0x4242, "the guest's identification");
        assert_eq!(header.payload_bytes, 18);
        assert_eq!(payload[20..], sent[34..], "the UDP header with its checksum, and the payload");
    }
}

#[test]
fn a_packet_that_came_back_in_part_keeps_its_length_and_says_no_checksum() {
    let mut rig = asked(&pattern(1000));
    for returned in [0, 1, 8, 500, 999] {
        let quoted = &pattern(1000)[..returned];
        let seen = complain(&mut rig, 0, world(9).into(), ROUTER, EXPIRED, quoted);
        let Seen::Icmp { payload, .. } = only(seen) else { panic!("not ICMP") };
        let header = ipv4::Header::parse(&payload, usize::MAX).expect("a header");
        let inner = udp::Header::parse(&payload[20..], 1008).expect("a header");
        assert_eq!((header.payload_bytes, inner.len_bytes), (1008, 1008));
        assert_eq!((inner.src_port, inner.dst_port, inner.checksum), (4000, 9, 0));
        assert!(payload.len() <= 548, "an error of at most 576 bytes (RFC 1812, 4.3.2.3)");
        assert_eq!(payload[28..], quoted[..quoted.len().min(520)]);
    }
}

#[test]
fn an_echo_comes_back_under_the_guests_identifier() {
    let mut rig = Rig::new();
    let sent = echo_frame(WORLD, 0x1234, 7, b"payload of an echo");
    assert_eq!(rig.send(&sent), []);
    // As the kernel sent it: an identifier of its own, and the checksum that goes with it.
    let mut quoted = vec![0; 26];
    Message::EchoRequest { ident: 0xbeef, seq: 7 }.emit_with_payload(b"payload of an echo", &mut quoted);
    for returned in [8, 12, 26] {
        let to = SocketAddr::new(WORLD.into(), 0);
        let seen = complain(&mut rig, 0, to, ROUTER, EXPIRED, &quoted[..returned]);
        let Seen::Icmp { from, message, payload } = only(seen) else { panic!("not ICMP") };
        assert_eq!((from, message), (ROUTER, EXPIRED));
        let header = ipv4::Header::parse(&payload, usize::MAX).expect("a header");
        assert_eq!((header.src, header.dst, header.payload_bytes), (GUEST_IP, WORLD, 26));
        assert_eq!(payload[20..], sent[34..34 + returned], "the guest's message, checksum and all");
    }
}

#[test]
fn an_error_comes_from_whom_the_guest_would_know_it_by() {
    let mut rig = Rig::with(Setup::with_host_loopback());
    rig.send(&udp_frame(guest(4000), crate::frames::gateway(9), b"ask"));
    let port = unreachable(UnreachableCode::Port, 0);
    let loopback = SocketAddr::from(([127, 0, 0, 1], 9));
    let seen = complain(&mut rig, 0, loopback, Ipv4Addr::LOCALHOST, port, b"ask");
    let Seen::Icmp { from, payload, .. } = only(seen) else { panic!("not ICMP") };
    assert_eq!(from, GATEWAY);
    assert_eq!(payload[16..20], GATEWAY.octets(), "the destination the guest knows");
    // A router of the world whose address is the guest's own neighbour's.
    let seen = complain(&mut rig, 0, loopback, Ipv4Addr::new(10, 0, 2, 77), port, b"ask");
    assert!(matches!(only(seen), Seen::Icmp { from: GATEWAY, .. }));
    // Nobody knows who.
    let quoted = b"ask".to_vec();
    rig.sock(0).complaints.push_back(Complaint { to: loopback, offender: None, message: port, quoted });
    let token = rig.sock(0).token;
    assert!(matches!(only(rig.ready(token, COMPLAINT)), Seen::Icmp { from: GATEWAY, .. }));
}

#[test]
fn errors_about_what_the_guest_did_not_send_are_dropped() {
    let mut rig = asked(b"ask");
    let port = unreachable(UnreachableCode::Port, 0);
    assert_eq!(complain(&mut rig, 0, world(10).into(), ROUTER, port, b"ask"), []);
    let stranger = SocketAddr::from(([198, 51, 100, 9], 9));
    assert_eq!(complain(&mut rig, 0, stranger, ROUTER, port, b"ask"), []);
    assert_eq!(rig.dropped(DropReason::Filtered), 2);
    // Of an echo no less than its header can be believed.
    rig.send(&echo_frame(WORLD, 1, 1, b"x"));
    let to = SocketAddr::new(WORLD.into(), 0);
    for quoted in [&[8, 0, 0, 0, 0, 0, 0][..], &[0; 8], b""] {
        assert_eq!(complain(&mut rig, 1, to, ROUTER, port, quoted), []);
    }
    assert_eq!(rig.dropped(DropReason::Malformed), 3);
}

#[test]
fn errors_that_concern_the_host_alone_stay_with_it() {
    let mut rig = asked(b"ask");
    for message in [Message::Other { kind: 12, code: 0 }, Message::Other { kind: 5, code: 1 }] {
        assert_eq!(complain(&mut rig, 0, world(9).into(), ROUTER, message, b"ask"), []);
    }
    assert_eq!(rig.dropped(DropReason::Unsupported), 2);
}

#[test]
fn errors_come_without_any_datagram_and_before_one_that_waits() {
    let mut rig = asked(b"ask");
    let port = unreachable(UnreachableCode::Port, 0);
    let complaint =
        Complaint { to: world(9).into(), offender: Some(WORLD.into()), message: port, quoted: vec![] };
    rig.sock(0).complaints.push_back(complaint);
    let mut seen = rig.datagram_arrives(0, b"answer", world(9).into());
    assert!(matches!(only(seen), Seen::Udp { .. }), "nobody said there was an error");
    let token = rig.sock(0).token;
    // The kernel says so where a read failed, if not by an event.
    rig.sock(0).receive_errors.push_back(libc::ECONNREFUSED);
    seen = rig.ready(token, READABLE);
    assert!(matches!(only(seen), Seen::Icmp { from: WORLD, .. }));
}

#[test]
fn a_flood_of_errors_is_taken_in_turns_and_withheld_beyond_the_rate() {
    let mut rig = asked(b"ask");
    rig.send(&udp_frame(guest(4001), world(9), b"ask"));
    let port = unreachable(UnreachableCode::Port, 0);
    let complaint =
        Complaint { to: world(9).into(), offender: Some(WORLD.into()), message: port, quoted: vec![] };
    let count = 10 * limits::DATAGRAM_ERRORS + 1;
    for _ in 0..count {
        rig.sock(0).complaints.push_back(complaint.clone());
    }
    let token = rig.sock(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, COMPLAINT);
    assert_eq!(rig.sock(0).complaints.len(), count - limits::DATAGRAM_ERRORS, "one turn");
    assert!(rig.engine.nat().has_more());
    let token = rig.sock(1).token;
    rig.sock(1).inbox.push_back((b"answer".to_vec(), world(9).into()));
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    let seen = rig.take();
    assert!(matches!(seen.last(), Some(Seen::Udp { .. })), "another socket is not held up");
    let heard = seen.len() - 1 + rig.flush().len();
    assert_eq!(rig.sock(0).complaints.len(), 0);
    assert_eq!(heard, limits::ICMP_ERRORS_BURST as usize);
    assert_eq!(rig.dropped(DropReason::RateLimited), (count - heard) as u64);
}

#[test]
fn exactly_one_turn_of_errors_leaves_nothing_behind() {
    for count in [limits::DATAGRAM_ERRORS - 1, limits::DATAGRAM_ERRORS, limits::DATAGRAM_ERRORS + 1] {
        let mut rig = asked(b"ask");
        let message = unreachable(UnreachableCode::Host, 0);
        for _ in 0..count {
            let complaint = Complaint { to: world(9).into(), offender: None, message, quoted: vec![] };
            rig.sock(0).complaints.push_back(complaint);
        }
        let token = rig.sock(0).token;
        assert_eq!(rig.ready(token, COMPLAINT).len(), count);
        assert!(!rig.engine.nat().has_more());
    }
}

#[test]
fn an_error_neither_ends_a_mapping_nor_keeps_it() {
    let mut rig = asked(b"ask");
    let port = unreachable(UnreachableCode::Port, 0);
    for _ in 0..11 {
        rig.pass(secs(10));
        complain(&mut rig, 0, world(9).into(), WORLD, port, b"ask");
        assert!(rig.sock(0).is_open);
    }
    assert_eq!(rig.datagram_arrives(0, b"late", world(9).into()).len(), 1, "it may still answer");
    let mut rig = asked(b"ask");
    rig.pass(secs(119));
    complain(&mut rig, 0, world(9).into(), WORLD, port, b"ask");
    rig.pass(secs(2));
    assert!(!rig.sock(0).is_open, "two minutes after the guest last spoke");
    rig.send(&echo_frame(WORLD, 7, 1, b"x"));
    let mut quoted = vec![0; 9];
    Message::EchoRequest { ident: 9, seq: 1 }.emit_with_payload(b"x", &mut quoted);
    let to = SocketAddr::new(WORLD.into(), 0);
    for seconds in [59, 2] {
        assert!(rig.sock(1).is_open);
        rig.pass(secs(seconds));
        complain(&mut rig, 1, to, ROUTER, EXPIRED, &quoted);
    }
    assert!(!rig.sock(1).is_open, "a minute after the guest's echo");
}

#[test]
fn errors_about_a_published_ports_answers_reach_the_guest() {
    let mut rig = Rig::new();
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.publish_udp(53, socket);
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    let client = SocketAddr::from(([198, 51, 100, 9], 999));
    rig.datagram_arrives(0, b"ask", client);
    let SocketAddr::V4(to) = client else { panic!("not IPv4") };
    rig.send(&udp_frame(guest(53), to, b"answer"));
    let port = unreachable(UnreachableCode::Port, 0);
    let seen = complain(&mut rig, 0, client, *to.ip(), port, b"answer");
    let Seen::Icmp { from, payload, .. } = only(seen) else { panic!("not ICMP") };
    assert_eq!(from, *to.ip());
    assert_eq!(payload[20..28], udp_message(guest(53), to, b"answer")[..8]);
}

#[test]
fn an_error_follows_the_guest_to_another_mac_address() {
    let mut rig = asked(b"ask");
    let message = udp_message(guest(4001), world(9), b"ask");
    let mut moved = frame(&ip(GUEST_IP, WORLD, Protocol::UDP, message.len()), &message);
    moved[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 2]);
    rig.send(&moved);
    let message = unreachable(UnreachableCode::Port, 0);
    let offender = Some(IpAddr::V4(WORLD));
    rig.sock(0).complaints.push_back(Complaint { to: world(9).into(), offender, message, quoted: vec![] });
    let token = rig.sock(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, COMPLAINT);
    assert_eq!(rig.port.delivered[0].frame[..6], [0x52, 0x54, 0, 0, 0, 2]);
}

/// A datagram or echo of the guest to the world with this header's hops and DF.
fn packet(protocol: Protocol, ttl: u8, dont_fragment: bool, payload: &[u8]) -> Vec<u8> {
    let message = match protocol {
        Protocol::UDP => udp_message(guest(4000), world(9), payload),
        _ => echo_message(7, 1, payload),
    };
    frame(&ipv4::Header { ttl, dont_fragment, ..ip(GUEST_IP, WORLD, protocol, message.len()) }, &message)
}

#[test]
fn vunet_is_one_hop_and_passes_on_who_may_fragment() {
    for protocol in [Protocol::UDP, Protocol::ICMP] {
        let mut rig = Rig::new();
        let mut expected = Vec::new();
        for (ttl, dont_fragment) in [(64, true), (2, true), (2, false), (255, false), (64, true)] {
            assert_eq!(rig.send(&packet(protocol, ttl, dont_fragment, b"x")), []);
            expected.push(PacketFields { ttl: ttl - 1, dont_fragment, ..PacketFields::default() });
        }
        assert_eq!(rig.sock(0).sent_fields, expected);
        let expired = only(rig.send(&packet(protocol, 1, true, b"x")));
        assert!(matches!(expired, Seen::Icmp { from: GATEWAY, message: EXPIRED, .. }));
        assert_eq!(rig.sock(0).sent_fields.len(), expected.len(), "the last hop leaves for nowhere");
    }
}

#[test]
fn differentiated_services_and_ecn_go_with_datagrams_both_ways() {
    for protocol in [Protocol::UDP, Protocol::ICMP] {
        let mut rig = Rig::new();
        let message = match protocol {
            Protocol::UDP => udp_message(guest(4000), world(9), b"x"),
            _ => echo_message(7, 1, b"x"),
        };
        // Expedited forwarding, ECT(1), and back with a mark on the way.
        let header = ipv4::Header { tos: 0xb9, ..ip(GUEST_IP, WORLD, protocol, message.len()) };
        assert_eq!(rig.send(&frame(&header, &message)), []);
        assert_eq!(rig.sock(0).sent_fields[0].tos, 0xb9);
        let (answer, from) = match protocol {
            Protocol::UDP => (vec![1; 3000], world(9).into()),
            _ => (echo_reply(&[1; 3000]), SocketAddr::from((WORLD, 0))),
        };
        rig.sock(0).tos = 0xbb;
        rig.sock(0).inbox.push_back((answer, from));
        let token = rig.sock(0).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        let tos: Vec<u8> = rig.port.delivered.iter().map(|received| received.frame[15]).collect();
        assert_eq!(tos, [0xbb; 3], "each fragment of the answer");
        assert_eq!(rig.take().len(), 1);
    }
}

fn echo_reply(payload: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 8 + payload.len()];
    Message::EchoReply { ident: 1, seq: 1 }.emit_with_payload(payload, &mut message);
    message
}

#[test]
fn a_datagram_to_the_host_itself_needs_no_further_hop() {
    let mut rig = Rig::with(Setup::with_host_loopback());
    let message = udp_message(guest(4000), crate::frames::gateway(9), b"x");
    let header = ip(GUEST_IP, GATEWAY, Protocol::UDP, message.len());
    for ttl in [0, 1, 2] {
        assert_eq!(rig.send(&frame(&ipv4::Header { ttl, ..header }, &message)), []);
    }
    assert!(rig.sock(0).sent_fields.iter().all(|fields| fields.ttl == 1));
    assert_eq!(rig.sock(0).sent.len(), 3);
}

#[test]
fn what_came_in_fragments_may_leave_in_fragments() {
    let mut rig = Rig::new();
    let message = udp_message(guest(4000), world(9), &pattern(3000));
    for mut part in fragments(WORLD, Protocol::UDP, &message, 7, 1500) {
        // DF with an offset: it speaks of the piece, not of the datagram.
        let header = ipv4::Header::parse(&part[14..], usize::MAX).expect("a header");
        ipv4::Header { dont_fragment: true, ..header }.emit(&mut part[14..]);
        rig.feed(&part);
    }
    assert_eq!(
        rig.sock(0).sent_fields,
        [PacketFields { ttl: 63, dont_fragment: false, ..PacketFields::default() }]
    );
}

#[test]
fn a_datagram_too_large_for_the_path_is_told_the_mtu_if_it_may_not_be_fragmented() {
    for (known, expected) in [(Some(1400), 1400), (Some(1280), 1280), (None, 576)] {
        for protocol in [Protocol::UDP, Protocol::ICMP] {
            let mut rig = Rig::new();
            rig.world().path_mtu = known;
            rig.send(&packet(protocol, 64, true, b"small"));
            rig.sock(0).send_error = Some(libc::EMSGSIZE);
            let sent = packet(protocol, 64, true, &pattern(1450));
            // Of UDP one in a batch is only counted; the next one goes alone.
            let mut seen = rig.send(&sent);
            if protocol == Protocol::UDP {
                assert_eq!(seen, []);
                seen = rig.send(&sent);
            }
            let Seen::Icmp { from, message, payload } = only(seen) else { panic!("not ICMP") };
            assert_eq!((from, message), (GATEWAY, frag_needed(expected)));
            // What the engine holds of a packet: its first bytes.
            assert_eq!(payload, sent[14..][..payload.len()]);
            assert!(payload.len() >= 28);
        }
    }
}

#[test]
fn a_datagram_that_may_be_fragmented_gets_no_such_answer() {
    let mut rig = Rig::new();
    rig.world().path_mtu = Some(1400);
    rig.send(&packet(Protocol::ICMP, 64, false, b"small"));
    rig.sock(0).send_error = Some(libc::EMSGSIZE);
    assert_eq!(rig.send(&packet(Protocol::ICMP, 64, false, &pattern(1450))), []);
    assert_eq!(rig.world().paths_asked, 0);
    assert_eq!(rig.dropped(DropReason::SocketRefused), 1);
}

#[test]
fn a_flood_of_datagrams_too_large_asks_for_the_path_no_more_often_than_it_is_told() {
    let mut rig = Rig::new();
    rig.send(&packet(Protocol::ICMP, 64, true, b"small"));
    rig.sock(0).send_error = Some(libc::EMSGSIZE);
    let heard: usize =
        (0..500).map(|_| rig.send(&packet(Protocol::ICMP, 64, true, &pattern(1450))).len()).sum();
    assert_eq!(heard, limits::ICMP_ERRORS_BURST as usize);
    assert_eq!(rig.world().paths_asked, heard);
}

/// The guest's "port unreachable" about a datagram from `from` to `to`, as its kernel sends it.
pub(crate) fn guest_refuses(code: u8, from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let message = udp_message(from, to, b"answer");
    let header = ip(*from.ip(), *to.ip(), Protocol::UDP, message.len());
    let mut quote = vec![0; ipv4::HEADER_BYTES];
    header.emit(&mut quote);
    quote.extend(message);
    let mut error = vec![0; 8 + quote.len()];
    unreachable(UnreachableCode::from(code), 0).emit_with_payload(&quote, &mut error);
    frame(&ip(GUEST_IP, *from.ip(), Protocol::ICMP, error.len()), &error)
}

/// A rig whose guest has an answer from the world's port 9.
fn answered() -> Rig {
    let mut rig = asked(b"ask");
    assert_eq!(rig.datagram_arrives(0, b"answer", world(9).into()).len(), 1);
    rig
}

#[test]
fn a_guest_that_refuses_an_answer_ends_the_exchange_and_its_socket() {
    let mut rig = answered();
    assert_eq!(rig.send(&guest_refuses(3, world(9), guest(4000))), []);
    assert!(!rig.sock(0).is_open);
    rig.assert_empty();
    // It may begin anew.
    rig.send(&udp_frame(guest(4000), world(9), b"ask"));
    assert!(rig.sock(1).is_open);
}

#[test]
fn a_refusal_ends_the_exchange_it_names_and_no_other() {
    let mut rig = answered();
    rig.send(&udp_frame(guest(4000), world(10), b"ask"));
    rig.datagram_arrives(0, b"answer", world(10).into());
    rig.send(&guest_refuses(3, world(9), guest(4000)));
    assert_eq!(rig.datagram_arrives(0, b"again", world(9).into()), []);
    assert_eq!(rig.datagram_arrives(0, b"again", world(10).into()).len(), 1);
    rig.send(&guest_refuses(3, world(10), guest(4000)));
    rig.assert_empty();
}

#[test]
fn a_refusal_that_names_no_delivered_datagram_ends_nothing() {
    let mut rig = answered();
    rig.send(&udp_frame(guest(4000), world(10), b"ask"));
    let good = guest_refuses(3, world(9), guest(4000));
    let with = |at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        frame
    };
    let (icmp, quote) = (14 + 20, 14 + 20 + 8);
    let mut elsewhere = good.clone();
    let header = ipv4::Header::parse(&good[14..], usize::MAX).expect("a header");
    ipv4::Header { dst: ROUTER, ..header }.emit(&mut elsewhere[14..]);
    let wrong: [(Vec<u8>, DropReason); 10] = [
        (guest_refuses(3, world(9), guest(4001)), DropReason::NoFlow),
        (guest_refuses(3, world(11), guest(4000)), DropReason::NoFlow),
        // It was asked, and never answered.
        (guest_refuses(3, world(10), guest(4000)), DropReason::NoFlow),
        (guest_refuses(3, SocketAddrV4::new(ROUTER, 9), guest(4000)), DropReason::NoFlow),
        // Not to whom it says it is about.
        (elsewhere, DropReason::NoFlow),
        (guest_refuses(1, world(9), guest(4000)), DropReason::Unsupported),
        (guest_refuses(13, world(9), guest(4000)), DropReason::Unsupported),
        (with(icmp + 2, good[icmp + 2] ^ 1), DropReason::Checksum),
        (fix_icmp(with(quote + 10, good[quote + 10] ^ 1)), DropReason::Malformed),
        // TCP is quoted.
        (fix_quote(with(quote + 9, 6)), DropReason::NoFlow),
    ];
    for (n, (frame, reason)) in wrong.into_iter().enumerate() {
        let before = rig.dropped(reason);
        assert_eq!(rig.send(&frame), []);
        assert_eq!(rig.dropped(reason), before + 1, "case {n}");
    }
    // Cut anywhere it ends nothing either.
    for len in 0..28 {
        let mut error = good[icmp..quote + len].to_vec();
        error[2..4].fill(0);
        let sum = checksum_of(&error);
        error[2..4].copy_from_slice(&sum);
        rig.send(&frame(&ip(GUEST_IP, WORLD, Protocol::ICMP, error.len()), &error));
    }
    assert_eq!(rig.datagram_arrives(0, b"again", world(9).into()).len(), 1);
    assert!(rig.sock(0).is_open);
}

fn checksum_of(bytes: &[u8]) -> [u8; 2] {
    let mut sum = Accumulator::new();
    sum.add_bytes(bytes);
    sum.finish().to_be_bytes()
}

/// The frame with the right checksum over its ICMP message.
fn fix_icmp(mut frame: Vec<u8>) -> Vec<u8> {
    frame[36..38].fill(0);
    let sum = checksum_of(&frame[34..]);
    frame[36..38].copy_from_slice(&sum);
    frame
}

/// The frame with the right checksums over the IP header it quotes and its ICMP message.
fn fix_quote(mut frame: Vec<u8>) -> Vec<u8> {
    frame[52..54].fill(0);
    let sum = checksum_of(&frame[42..62]);
    frame[52..54].copy_from_slice(&sum);
    fix_icmp(frame)
}

#[test]
fn a_refusal_that_quotes_a_later_fragment_ends_nothing() {
    let mut rig = answered();
    let mut refusal = guest_refuses(3, world(9), guest(4000));
    refusal[42 + 7] = 1;
    rig.send(&fix_quote(refusal));
    assert!(rig.sock(0).is_open);
    assert_eq!(rig.dropped(DropReason::NoFlow), 1);
}

#[test]
fn a_published_port_outlives_every_refusal() {
    let mut rig = Rig::new();
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.publish_udp(53, socket);
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    for _ in 0..3 {
        assert_eq!(rig.datagram_arrives(0, b"ask", world(999).into()).len(), 1);
        rig.send(&guest_refuses(3, world(999), guest(53)));
        assert!(rig.sock(0).is_open);
        assert_eq!(rig.engine.next_deadline(), None, "the exchange is over");
    }
}

#[test]
fn a_refusal_on_another_queue_pair_finds_its_exchange() {
    let mut rigs = Rig::workers(3);
    rigs[2].send(&udp_frame(guest(4000), world(9), b"ask"));
    rigs[2].datagram_arrives(0, b"answer", world(9).into());
    rigs[0].send(&guest_refuses(3, world(9), guest(4000)));
    exchange(&mut rigs);
    assert!(!rigs[2].sock(0).is_open);
    assert_eq!(rigs[0].engine.counters().frames_from_guest, 0, "it is counted where it was taken");
    // Of one nobody has, nobody hears.
    rigs[0].send(&guest_refuses(3, world(9), guest(4000)));
    assert!(rigs[0].engine.next_letter().is_none());
    assert_eq!(rigs[0].dropped(DropReason::NoFlow), 1);
}

#[test]
fn a_flood_of_refusals_costs_one_socket() {
    let mut rig = answered();
    rig.send(&udp_frame(guest(4001), world(9), b"ask"));
    for n in 0..10_000u32 {
        let (from, to) = (world(9), guest((n % 16) as u16 + 4000));
        assert_eq!(rig.send(&guest_refuses(3, from, to)), []);
    }
    assert_eq!(rig.dropped(DropReason::NoFlow), 9_999);
    assert!(rig.sock(1).is_open);
}

#[test]
fn an_exchange_without_a_socket_is_prohibited_aloud() {
    let mut rig = Rig::new();
    rig.world().descriptors_max = 0;
    for sent in [udp_frame(guest(4000), world(9), b"ask"), echo_frame(WORLD, 7, 1, b"ask")] {
        let (code, quoted) = only(rig.send(&sent)).unreachable();
        assert_eq!((code, &quoted[..]), (13, &sent[14..]));
    }
    assert_eq!(rig.dropped(DropReason::SocketRefused), 2);
    rig.world().descriptors_max = usize::MAX;
    assert_eq!(rig.send(&udp_frame(guest(4000), world(9), b"ask")), []);
    assert_eq!(rig.sock(0).sent.len(), 1);
}
