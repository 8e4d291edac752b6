//! What answers at the gateway's own address, and what a link may not do.

use std::net::Ipv4Addr;

use vunet::addr::MacAddr;
use vunet::engine::counters::DropReason;
use vunet::wire::arp;
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::Protocol;
use vunet::wire::tcp::Flags;

use crate::frames::{
    GATEWAY, GUEST_IP, GUEST_MAC, Seen, WORLD, echo_frame, echo_message, fragments, frame, gateway, guest,
    ip, udp_frame, udp_message, world,
};
use crate::rig::{Peer, READABLE, Rig, Setup, only, pattern, secs};

fn arp_request(sender_ip: Ipv4Addr, target_ip: Ipv4Addr) -> Vec<u8> {
    let mut out = vec![0; ethernet::HEADER_BYTES + arp::PACKET_BYTES];
    ethernet::Header { dst: MacAddr::BROADCAST, src: GUEST_MAC, ethertype: EtherType::ARP }.emit(&mut out);
    let operation = arp::Operation::Request;
    let packet =
        arp::Packet { operation, sender_mac: GUEST_MAC, sender_ip, target_mac: MacAddr::ZERO, target_ip };
    packet.emit(&mut out[ethernet::HEADER_BYTES..]);
    out
}

#[test]
fn arp_is_answered_for_the_gateway_and_for_nobody_else() {
    let mut rig = Rig::new();
    for target in [GUEST_IP, Ipv4Addr::new(10, 0, 2, 3), Ipv4Addr::new(10, 0, 2, 255), WORLD] {
        assert_eq!(rig.send(&arp_request(GUEST_IP, target)), [], "{target}");
    }
    let Seen::Arp(reply) = only(rig.send(&arp_request(GUEST_IP, GATEWAY))) else { panic!("not ARP") };
    assert_eq!(reply.operation, arp::Operation::Reply);
    assert_eq!((reply.sender_mac, reply.sender_ip), (MacAddr::GATEWAY, GATEWAY));
    assert_eq!((reply.target_mac, reply.target_ip), (GUEST_MAC, GUEST_IP));
}

#[test]
fn an_arp_probe_for_the_gateways_address_is_defended() {
    let mut rig = Rig::new();
    let seen = rig.send(&arp_request(Ipv4Addr::UNSPECIFIED, GATEWAY));
    assert!(matches!(only(seen), Seen::Arp(reply) if reply.sender_ip == GATEWAY));
}

#[test]
fn the_gateway_answers_pings() {
    let mut rig = Rig::new();
    let payload = pattern(56);
    let reply = only(rig.send(&echo_frame(GATEWAY, 7, 9, &payload)));
    let message = Message::EchoReply { ident: 7, seq: 9 };
    assert_eq!(reply, Seen::Icmp { from: GATEWAY, message, payload });
}

#[test]
fn a_ping_of_3000_bytes_to_the_gateway_goes_in_fragments_both_ways() {
    let mut rig = Rig::new();
    let payload = pattern(3000);
    let mut seen = Vec::new();
    for frame in fragments(GATEWAY, Protocol::ICMP, &echo_message(7, 1, &payload), 99, 1500) {
        seen.extend(rig.send(&frame));
    }
    let message = Message::EchoReply { ident: 7, seq: 1 };
    assert_eq!(only(seen), Seen::Icmp { from: GATEWAY, message, payload });
    assert_eq!(rig.reader.fragments, 3);
}

#[test]
fn the_longest_ping_to_the_gateway_is_answered_whole() {
    let mut rig = Rig::new();
    let payload = pattern(65_507);
    let mut seen = Vec::new();
    for frame in fragments(GATEWAY, Protocol::ICMP, &echo_message(7, 1, &payload), 99, 1500) {
        seen.extend(rig.send(&frame));
    }
    assert_eq!(
        only(seen),
        Seen::Icmp { from: GATEWAY, message: Message::EchoReply { ident: 7, seq: 1 }, payload }
    );
}

#[test]
fn the_last_hop_is_said_to_be_exceeded_with_the_packet_quoted() {
    let mut rig = Rig::new();
    let message = udp_message(guest(4000), world(33_434), b"trace");
    let mut header = ip(GUEST_IP, WORLD, Protocol::UDP, message.len());
    header.ttl = 1;
    let sent = frame(&header, &message);
    let Seen::Icmp { from, message, payload } = only(rig.send(&sent)) else { panic!("not ICMP") };
    assert_eq!((from, message), (GATEWAY, Message::TimeExceeded { code: 0 }));
    assert_eq!(payload, &sent[ethernet::HEADER_BYTES..]);
    assert!(!rig.world().touched());
}

#[test]
fn a_last_hop_to_the_gateway_itself_arrives() {
    let mut rig = Rig::new();
    let message = echo_message(1, 1, b"");
    let mut header = ip(GUEST_IP, GATEWAY, Protocol::ICMP, message.len());
    header.ttl = 1;
    let seen = rig.send(&frame(&header, &message));
    assert!(matches!(only(seen), Seen::Icmp { message: Message::EchoReply { .. }, .. }));
}

#[test]
fn sources_that_are_not_the_guests_to_use_are_dropped() {
    let mut rig = Rig::new();
    let spoofed =
        [[10, 0, 3, 2], [192, 0, 2, 1], [127, 0, 0, 1], [10, 0, 2, 0], [10, 0, 2, 255], [10, 0, 2, 1]];
    for (n, source) in spoofed.into_iter().enumerate() {
        let from = std::net::SocketAddrV4::new(source.into(), 4000);
        assert_eq!(rig.send(&udp_frame(from, world(53), b"spoofed")), []);
        let mut peer = Peer::new(from, world(80));
        assert_eq!(peer.syn(&mut rig), []);
        assert_eq!(rig.dropped(DropReason::SpoofedSource), 2 * (n as u64 + 1));
    }
    assert!(!rig.world().touched());
}

#[test]
fn an_unspecified_source_reaches_dhcp_only() {
    let mut rig = Rig::new();
    let nobody = |port| std::net::SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port);
    assert_eq!(rig.send(&udp_frame(nobody(4000), world(53), b"x")), []);
    assert_eq!(rig.dropped(DropReason::SpoofedSource), 1);
    assert!(!rig.world().touched());
}

#[test]
fn frames_to_other_stations_and_from_group_addresses_are_dropped() {
    let mut rig = Rig::new();
    let mut sent = echo_frame(GATEWAY, 1, 1, b"");
    sent[..6].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 9]);
    assert_eq!(rig.send(&sent), []);
    assert_eq!(rig.dropped(DropReason::NotForUs), 1);
    let mut sent = echo_frame(GATEWAY, 1, 1, b"");
    sent[6] |= 1;
    assert_eq!(rig.send(&sent), []);
    assert_eq!(rig.dropped(DropReason::SpoofedSource), 1);
}

#[test]
fn wrong_checksums_are_dropped_at_every_layer() {
    let mut rig = Rig::new();
    let frames = [
        echo_frame(GATEWAY, 1, 1, b"ping"),
        udp_frame(guest(4000), world(4001), b"datagram"),
        Peer::new(guest(4000), world(80)).seg(Flags::SYN, &[]).frame(),
    ];
    for (n, good) in frames.iter().enumerate() {
        let mut transport = good.clone();
        *transport.last_mut().expect("a byte") ^= 1;
        assert_eq!(rig.send(&transport), []);
        let mut network = good.clone();
        network[ethernet::HEADER_BYTES + 8] ^= 1;
        assert_eq!(rig.send(&network), []);
        assert_eq!(rig.dropped(DropReason::Checksum), 2 * (n as u64 + 1));
    }
    assert!(!rig.world().touched());
}

#[test]
fn every_prefix_of_a_good_frame_is_dropped_without_harm() {
    let mut rig = Rig::new();
    let frames = [
        echo_frame(GATEWAY, 1, 1, b"ping"),
        udp_frame(guest(4000), world(4001), b"datagram"),
        udp_frame(guest(4000), gateway(53), b"query"),
        udp_frame(guest(68), gateway(67), b"dhcp"),
        Peer::new(guest(4000), world(80)).seg(Flags::SYN, &[]).frame(),
        arp_request(GUEST_IP, GATEWAY),
    ];
    for whole in frames {
        for len in ethernet::HEADER_BYTES..whole.len() {
            assert_eq!(rig.send(&whole[..len]), [], "{len} bytes");
        }
    }
    assert!(!rig.world().touched());
}

/// A frame as a driver pads it, with bytes that are not zero.
fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    let len = frame.len().max(60) + 4;
    frame.resize(len, 0xee);
    frame
}

#[test]
fn bytes_behind_a_short_packet_are_nobodys_payload() {
    let mut rig = Rig::new();
    let Seen::Arp(reply) = only(rig.send(&padded(arp_request(GUEST_IP, GATEWAY)))) else { panic!("not ARP") };
    assert_eq!(reply.sender_ip, GATEWAY);
    let message = Message::EchoReply { ident: 7, seq: 9 };
    let expected = Seen::Icmp { from: GATEWAY, message, payload: b"x".to_vec() };
    assert_eq!(only(rig.send(&padded(echo_frame(GATEWAY, 7, 9, b"x")))), expected);
    rig.send(&padded(udp_frame(guest(4000), world(9), b"")));
    rig.send(&padded(udp_frame(guest(4000), world(9), b"x")));
    let sent: Vec<_> = rig.sock(0).sent.iter().map(|(bytes, _)| bytes.clone()).collect();
    assert_eq!(sent, [b"".to_vec(), b"x".to_vec()]);
    let mut peer = Peer::new(guest(4000), world(80));
    assert_eq!(rig.send(&padded(peer.seg(Flags::SYN, &[]).frame())), []);
    peer.seq += 1;
    peer.ack = only(rig.stream_ready(0, crate::rig::WRITABLE)).tcp().header.seq.0.wrapping_add(1);
    assert_eq!(rig.send(&padded(peer.seg(Flags::ACK, &[]).frame())), []);
    assert_eq!(rig.conn(0).taken, b"");
    rig.send(&padded(peer.seg(Flags::ACK | Flags::PSH, b"yz").frame()));
    assert_eq!(rig.conn(0).taken, b"yz");
    let message = udp_message(guest(4001), world(9), &pattern(3001));
    for fragment in fragments(WORLD, Protocol::UDP, &message, 1, 1500) {
        rig.send(&padded(fragment));
    }
    assert_eq!(rig.sock(1).sent[0].0, pattern(3001));
}

#[test]
fn what_is_neither_arp_nor_ipv4_is_dropped_counted_and_not_answered() {
    let mut rig = Rig::new();
    let ipv4 = echo_frame(GATEWAY, 7, 9, b"x");
    // A length (802.3), 802.1Q around IPv4, IPv6, link-layer discovery, and IPv6 that calls itself IPv4.
    for (n, kind) in [[0, 46], [0x81, 0], [0x86, 0xdd], [0x88, 0xcc]].into_iter().enumerate() {
        for dst in [MacAddr::GATEWAY, MacAddr::BROADCAST, MacAddr([0x33, 0x33, 0, 0, 0, 2])] {
            let mut frame = ipv4.clone();
            frame[..6].copy_from_slice(&dst.0);
            frame[12..14].copy_from_slice(&kind);
            assert_eq!(rig.send(&frame), [], "{kind:02x?} to {dst}");
        }
        assert_eq!(rig.dropped(DropReason::Unsupported), 3 * (n as u64 + 1));
    }
    let mut six = ipv4;
    six[ethernet::HEADER_BYTES] = 0x60;
    assert_eq!(rig.send(&six), []);
    assert_eq!(rig.dropped(DropReason::Malformed), 1);
    assert!(!rig.world().touched());
}

#[test]
fn unknown_transports_are_answered_with_protocol_unreachable() {
    let mut rig = Rig::new();
    let sent = frame(&ip(GUEST_IP, WORLD, Protocol(132), 12), &[0; 12]);
    let (code, quoted) = only(rig.send(&sent)).unreachable();
    assert_eq!((code, &quoted[..]), (2, &sent[ethernet::HEADER_BYTES..]));
}

#[test]
fn icmp_errors_are_never_answered_with_errors() {
    let mut rig = Rig::new();
    let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
    error.extend_from_slice(&[0x45; 28]);
    let mut header = ip(GUEST_IP, WORLD, Protocol::ICMP, error.len());
    header.ttl = 1;
    assert_eq!(rig.send(&frame(&header, &error)), []);
}

#[test]
fn icmp_errors_are_limited_to_a_burst_and_a_rate() {
    let mut rig = Rig::new();
    let forbidden = std::net::SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 1), 9);
    let flood = |rig: &mut Rig| {
        let answers: usize = (0..500).map(|_| rig.send(&udp_frame(guest(9), forbidden, b"x")).len()).sum();
        answers
    };
    assert_eq!(flood(&mut rig), 64);
    rig.now = rig.now + secs(60);
    assert_eq!(flood(&mut rig), 64, "the burst does not grow with time");
    rig.now = rig.now + std::time::Duration::from_millis(100);
    assert_eq!(flood(&mut rig), 10);
    assert_eq!(rig.dropped(DropReason::RateLimited), 1500 - 138);
}

/// A query for `name`'s address, with an EDNS size if given.
pub(crate) fn query(id: u16, name: &str, edns_bytes: Option<u16>) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    out.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, u8::from(edns_bytes.is_some())]);
    for label in name.split('.') {
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.extend_from_slice(&[0, 0, 1, 0, 1]);
    if let Some(bytes) = edns_bytes {
        out.extend_from_slice(&[0, 0, 41]);
        out.extend_from_slice(&bytes.to_be_bytes());
        out.extend_from_slice(&[0; 6]);
    }
    out
}

/// An answer to `query` of `len` bytes, as far as vunet reads it.
fn answer(query: &[u8], len: usize) -> Vec<u8> {
    let mut out = query.to_vec();
    out[2] |= 0x80;
    out.resize(len, 0xab);
    out
}

#[test]
fn local_names_are_answered_at_once() {
    let mut rig = Rig::new();
    let seen = rig.send(&udp_frame(guest(5353), gateway(53), &query(7, "host.vunet.internal", None)));
    let Seen::Udp { from, to, payload } = only(seen) else { panic!("not UDP") };
    assert_eq!((from, to), (gateway(53).into(), guest(5353).into()));
    assert_eq!(payload[..2], [0, 7]);
    assert!(payload.ends_with(&GATEWAY.octets()));
    assert!(rig.engine.next_dns_forward().is_none());
}

#[test]
fn foreign_names_are_forwarded_as_they_came_and_the_answer_returned() {
    let mut rig = Rig::new();
    let asked = query(9, "example.org", Some(4096));
    assert_eq!(rig.send(&udp_frame(guest(5353), gateway(53), &asked)), []);
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    assert_eq!(forward.query, asked);
    let answered = answer(&asked, 300);
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answered);
    let seen = Seen::Udp { from: gateway(53).into(), to: guest(5353).into(), payload: answered.clone() };
    assert_eq!(rig.take(), [seen]);
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answered);
    assert_eq!(rig.take(), [], "an answer is given once");
}

#[test]
fn a_big_answer_leaves_in_fragments() {
    let mut rig = Rig::new();
    let asked = query(9, "example.org", Some(4096));
    rig.send(&udp_frame(guest(5353), gateway(53), &asked));
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    let payload = answer(&asked, 3000);
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &payload);
    let seen = Seen::Udp { from: gateway(53).into(), to: guest(5353).into(), payload };
    assert_eq!(rig.take(), [seen]);
    assert_eq!(rig.reader.fragments, 3);
}

#[test]
fn an_answer_no_datagram_can_hold_is_truncated() {
    for len in [65_507, 65_508, 65_527, 65_528, 65_535] {
        let mut rig = Rig::new();
        let asked = query(9, "example.org", Some(65_535));
        rig.send(&udp_frame(guest(5353), gateway(53), &asked));
        let forward = rig.engine.next_dns_forward().expect("a question to forward");
        rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer(&asked, len));
        let Seen::Udp { payload, .. } = only(rig.take()) else { panic!("not UDP") };
        match len {
            65_507 => assert_eq!(payload.len(), len),
            _ => assert!(payload.len() < 512 && payload[2] & 2 != 0, "TC is set"),
        }
    }
}

#[test]
fn questions_past_the_bound_are_answered_with_failure() {
    let mut rig = Rig::new();
    let asked = query(9, "example.org", None);
    for _ in 0..vunet::limits::DNS_QUERIES_MAX {
        assert_eq!(rig.send(&udp_frame(guest(5353), gateway(53), &asked)), []);
    }
    let seen = rig.send(&udp_frame(guest(5353), gateway(53), &asked));
    let Seen::Udp { payload, .. } = only(seen) else { panic!("not UDP") };
    assert_eq!(payload[3] & 0xf, 2, "SERVFAIL");
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer(&asked, 100));
    assert_eq!(rig.take().len(), 1);
    assert_eq!(rig.send(&udp_frame(guest(5353), gateway(53), &asked)), [], "room for one again");
}

#[test]
fn long_questions_are_bounded_by_their_bytes() {
    let mut rig = Rig::new();
    let mut asked = query(9, "example.org", None);
    asked.resize(1024, 0);
    for n in 0..vunet::limits::DNS_QUERIES_BYTES_MAX / asked.len() {
        assert_eq!(rig.send(&udp_frame(guest(5353), gateway(53), &asked)), [], "question {n}");
    }
    let one_more = udp_frame(guest(5353), gateway(53), &query(9, "example.org", None));
    let Seen::Udp { payload, .. } = only(rig.send(&one_more)) else { panic!("not UDP") };
    assert_eq!(payload[3] & 0xf, 2, "SERVFAIL");
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer(&asked, 100));
    assert_eq!(rig.take().len(), 1);
    assert_eq!(rig.send(&one_more), [], "room for one again");
}

#[test]
fn dns_over_tcp_goes_to_the_service_and_not_to_the_world() {
    let mut rig = Rig::new();
    let mut peer = Peer::new(guest(4000), gateway(53));
    assert_eq!(peer.syn(&mut rig), []);
    assert!(rig.conn(0).is_dns);
    let seen = rig.stream_ready(0, READABLE);
    peer.establish(&mut rig, seen);
    peer.data(&mut rig, Flags::PSH, b"query");
    assert_eq!(rig.conn(0).taken, b"query");
    rig.conn(0).queue.extend(b"answer");
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), b"answer");
}

#[test]
fn a_gateway_without_dns_refuses_it() {
    let mut rig = Rig::with(Setup { dns: false, ..Setup::default() });
    let asked = query(9, "example.org", None);
    assert_eq!(rig.send(&udp_frame(guest(5353), gateway(53), &asked)), [], "a service that is off is silent");
    let reset = only(Peer::new(guest(4000), gateway(53)).syn(&mut rig)).tcp();
    assert!(reset.has(Flags::RST));
    assert!(!rig.world().touched());
}

#[test]
fn a_guest_that_began_anew_gets_no_answers_to_old_questions() {
    let mut rig = Rig::new();
    let asked = query(9, "example.org", None);
    rig.send(&udp_frame(guest(5353), gateway(53), &asked));
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    rig.engine.guest_reset();
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer(&asked, 100));
    assert_eq!(rig.take(), []);
}
