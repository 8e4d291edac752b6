//! UDP and ICMP echo of the guest: mapping, filtering, sizes, idle time.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::engine::counters::DropReason;
use vunet::engine::guest_port::GuestOffloads;
use vunet::limits;
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::Protocol;
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

use crate::frames::{Seen, WORLD, echo_frame, echo_message, fragments, guest, udp_frame, udp_message, world};
use crate::rig::{READABLE, Rig, Setup, only, pattern, secs};

fn other(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 9), port)
}

fn udp(rig: &mut Rig, to: SocketAddrV4, payload: &[u8]) {
    assert_eq!(rig.send(&udp_frame(guest(4000), to, payload)), []);
}

#[test]
fn one_guest_port_is_one_socket_whatever_it_talks_to() {
    let mut rig = Rig::new();
    udp(&mut rig, world(53), b"one");
    udp(&mut rig, world(54), b"two");
    udp(&mut rig, other(53), b"three");
    assert_eq!(rig.world().socks.len(), 1);
    let sent: Vec<SocketAddr> = rig.sock(0).sent.iter().map(|(_, to)| *to).collect();
    assert_eq!(sent, [world(53).into(), world(54).into(), SocketAddr::from(other(53))]);
    rig.send(&udp_frame(guest(4001), world(53), b"four"));
    assert_eq!(rig.world().socks.len(), 2);
}

#[test]
fn only_who_was_spoken_to_may_answer() {
    let mut rig = Rig::new();
    udp(&mut rig, world(53), b"ask");
    let answer = Seen::Udp { from: world(53).into(), to: guest(4000).into(), payload: b"answer".to_vec() };
    assert_eq!(rig.datagram_arrives(0, b"answer", world(53).into()), [answer]);
    assert_eq!(rig.datagram_arrives(0, b"answer", world(54).into()), [], "another port");
    assert_eq!(rig.datagram_arrives(0, b"answer", other(53).into()), [], "another address");
    assert_eq!(rig.dropped(DropReason::Filtered), 2);
}

#[test]
fn datagrams_of_every_size_go_both_ways() {
    for size in [0, 1, 1471, 1472, 1473, 2944, 9000, 65_506, 65_507] {
        for offloads in
            [GuestOffloads::default(), GuestOffloads { checksum: true, ..GuestOffloads::default() }]
        {
            let mut rig = Rig::with(Setup { offloads, ..Setup::default() });
            let payload = pattern(size);
            let message = udp_message(guest(4000), world(9), &payload);
            for frame in fragments(WORLD, Protocol::UDP, &message, 7, 1500) {
                assert_eq!(rig.send(&frame), []);
            }
            assert_eq!(rig.sock(0).sent, [(payload.clone(), world(9).into())]);
            let seen = rig.datagram_arrives(0, &payload, world(9).into());
            let expected = Seen::Udp { from: world(9).into(), to: guest(4000).into(), payload };
            assert!(seen == [expected], "{size} bytes");
            assert_eq!(rig.reader.fragments > 0, size > 1472);
        }
    }
}

#[test]
fn the_smallest_mtu_cuts_at_multiples_of_eight() {
    let mut rig = Rig::with(Setup { ip_mtu: 577, ..Setup::default() });
    udp(&mut rig, world(9), b"ask");
    let payload = pattern(65_507);
    let seen = rig.datagram_arrives(0, &payload, world(9).into());
    assert_eq!(only(seen), Seen::Udp { from: world(9).into(), to: guest(4000).into(), payload });
}

#[test]
fn checksums_towards_the_guest_are_partial_only_where_it_accepts_that() {
    for checksum in [false, true] {
        let offloads = GuestOffloads { checksum, ..GuestOffloads::default() };
        let mut rig = Rig::with(Setup { offloads, ..Setup::default() });
        udp(&mut rig, world(9), b"ask");
        rig.sock(0).inbox.push_back((b"answer".to_vec(), world(9).into()));
        let token = rig.sock(0).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        let partial = Checksum::Partial { start: 34, offset: 6 };
        assert_eq!(rig.port.delivered[0].vnet.checksum == partial, checksum);
        assert_eq!(rig.take().len(), 1);
    }
}

#[test]
fn a_checksum_that_comes_out_as_zero_is_sent_as_ones() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    // Of all two bytes one pair makes it zero, which would mean "none"; the reader refuses that.
    for bytes in 0..=u16::MAX {
        let seen = rig.datagram_arrives(0, &bytes.to_be_bytes(), world(9).into());
        assert!(matches!(only(seen), Seen::Udp { .. }));
    }
}

#[test]
fn a_refused_datagram_in_fragments_is_answered_like_any_other() {
    let mut rig = Rig::with(Setup::isolated());
    let message = udp_message(guest(4000), world(9), &pattern(3000));
    let mut seen = Vec::new();
    for frame in fragments(WORLD, Protocol::UDP, &message, 7, 1500) {
        seen.extend(rig.send(&frame));
    }
    let (code, quoted) = only(seen).unreachable();
    assert_eq!(code, 0);
    assert_eq!(quoted[20..28], message[..8], "the datagram's beginning is quoted");
}

#[test]
fn a_mapping_ends_when_nobody_spoke_for_long_and_either_side_refreshes_it() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    rig.pass(secs(119));
    assert!(rig.sock(0).is_open);
    rig.pass(secs(2));
    assert!(!rig.sock(0).is_open, "two minutes without an answer");
    rig.assert_empty();
    udp(&mut rig, world(9), b"ask");
    rig.datagram_arrives(1, b"answer", world(9).into());
    for _ in 0..5 {
        rig.pass(secs(290));
        rig.datagram_arrives(1, b"answer", world(9).into());
        rig.pass(secs(290));
        udp(&mut rig, world(9), b"ask");
    }
    assert_eq!(rig.world().socks.len(), 2, "the same socket all the time");
    rig.pass(secs(301));
    assert!(!rig.sock(1).is_open);
    rig.assert_empty();
}

#[test]
fn questions_and_echoes_end_sooner() {
    let mut rig = Rig::new();
    udp(&mut rig, world(53), b"ask");
    rig.datagram_arrives(0, b"answer", world(53).into());
    rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
    rig.pass(secs(31));
    assert!(!rig.sock(0).is_open);
    rig.pass(secs(30));
    assert!(!rig.sock(1).is_open);
    rig.assert_empty();
}

#[test]
fn one_remote_that_went_silent_does_not_take_the_mapping_with_it() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    rig.pass(secs(100));
    udp(&mut rig, other(9), b"ask");
    rig.pass(secs(100));
    assert!(rig.sock(0).is_open);
    assert_eq!(rig.datagram_arrives(0, b"late", world(9).into()), [], "its time is over");
    assert_eq!(rig.datagram_arrives(0, b"answer", other(9).into()).len(), 1);
}

#[test]
fn a_datagram_the_socket_refuses_is_counted_and_its_flow_lives() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"one");
    rig.sock(0).send_error = Some(libc::EAGAIN);
    udp(&mut rig, world(9), b"two");
    assert_eq!(rig.dropped(DropReason::SocketRefused), 1);
    rig.sock(0).send_error = None;
    udp(&mut rig, world(9), b"three");
    assert_eq!(rig.sock(0).sent.len(), 2);
}

#[test]
fn an_unreachable_destination_is_an_icmp_error() {
    for (errno, expected) in [(libc::ENETUNREACH, 0), (libc::EHOSTUNREACH, 1), (libc::EPERM, 13)] {
        let mut rig = Rig::new();
        udp(&mut rig, world(9), b"one");
        rig.sock(0).send_error = Some(errno);
        // One that left in a batch is only counted; the one after it goes alone and tells why.
        assert_eq!(rig.send(&udp_frame(guest(4000), world(9), b"counted")), []);
        assert_eq!(rig.dropped(DropReason::SocketRefused), 1);
        let sent = udp_frame(guest(4000), world(9), b"two");
        let (code, quoted) = only(rig.send(&sent)).unreachable();
        assert_eq!((code, &quoted[..]), (expected, &sent[14..]));
    }
}

#[test]
fn a_sockets_pending_error_costs_no_datagram() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    rig.sock(0).receive_errors.extend([libc::ECONNREFUSED, libc::EHOSTUNREACH]);
    assert_eq!(rig.datagram_arrives(0, b"answer", world(9).into()).len(), 1);
}

#[test]
fn a_socket_whose_reading_keeps_failing_is_left_alone_until_there_is_news() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.publish_udp(53, socket);
    for n in 0..2 {
        rig.sock(n).receives_fail = Some(libc::ENOMEM);
        // The flush behind it fails the test if the engine goes on without pause.
        assert_eq!(rig.datagram_arrives(n, b"answer", world(9).into()), []);
        let tries = rig.sock(n).receives;
        assert!(tries < 1000, "{tries} tries");
        assert!(!rig.engine.nat().has_more());
        rig.sock(n).receives_fail = None;
        assert_eq!(rig.datagram_arrives(n, b"answer", world(9).into()).len(), 2, "both are there");
    }
}

#[test]
fn a_published_socket_whose_reading_fails_without_a_guest_does_not_spin() {
    let mut rig = Rig::new();
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.publish_udp(53, socket);
    rig.sock(0).receives_fail = Some(libc::ENOMEM);
    assert_eq!(rig.datagram_arrives(0, b"lost", world(9).into()), []);
    assert!(!rig.engine.nat().has_more());
    rig.sock(0).receives_fail = None;
    rig.datagram_arrives(0, b"lost", world(9).into());
    assert_eq!(rig.sock(0).inbox.len(), 0);
}

#[test]
fn echoes_go_out_and_come_back_under_the_guests_identifier() {
    let mut rig = Rig::new();
    for size in [0, 56, 1472, 1473, 65_507] {
        let payload = pattern(size);
        let message = echo_message(0x1234, 5, &payload);
        for frame in fragments(WORLD, Protocol::ICMP, &message, size as u16, 1500) {
            assert_eq!(rig.send(&frame), []);
        }
        let (mut sent, to) = rig.sock(0).sent.pop().expect("sent");
        assert!(rig.sock(0).is_ping);
        assert_eq!((sent.len(), to), (8 + size, SocketAddr::new(WORLD.into(), 0)));
        // The kernel's identifier instead of the guest's, and an answer instead of a question.
        sent[0] = 0;
        sent[4..6].copy_from_slice(&[0x99, 0x99]);
        let seen = rig.datagram_arrives(0, &sent, SocketAddr::new(WORLD.into(), 0));
        let message = Message::EchoReply { ident: 0x1234, seq: 5 };
        assert!(only(seen) == Seen::Icmp { from: WORLD, message, payload }, "{size} bytes");
    }
    assert_eq!(rig.world().socks.len(), 1);
}

#[test]
fn echoes_of_several_askers_with_one_identifier_are_kept_apart() {
    let mut rig = Rig::new();
    let askers = [[10, 0, 2, 2], [10, 0, 2, 77]].map(Ipv4Addr::from);
    for asker in askers {
        for ident in [7, 8] {
            let message = echo_message(ident, 1, b"ping");
            let header = crate::frames::ip(asker, WORLD, Protocol::ICMP, message.len());
            rig.send(&crate::frames::frame(&header, &message));
        }
    }
    assert_eq!(rig.world().socks.len(), 4, "the kernel tells them apart outside");
    for n in [2, 0, 3, 1] {
        let reply = [0, 0, 0, 0, 0x99, 0x99, 0, 1];
        rig.sock(n).inbox.push_back((reply.to_vec(), SocketAddr::new(WORLD.into(), 0)));
        let token = rig.sock(n).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        assert_eq!(rig.port.delivered[0].frame[30..34], askers[n / 2].octets());
        let message = Message::EchoReply { ident: 7 + n as u16 % 2, seq: 1 };
        assert_eq!(only(rig.take()), Seen::Icmp { from: WORLD, message, payload: vec![] });
    }
}

#[test]
fn echo_answers_of_strangers_are_dropped() {
    let mut rig = Rig::new();
    rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
    let reply = [0, 0, 0, 0, 0, 9, 0, 1];
    assert_eq!(rig.datagram_arrives(0, &reply, SocketAddr::from(([198, 51, 100, 9], 0))), []);
    assert_eq!(rig.dropped(DropReason::Filtered), 1);
    assert_eq!(rig.datagram_arrives(0, &reply[..7], SocketAddr::new(WORLD.into(), 0)), [], "too short");
}

#[test]
fn a_host_that_refuses_echo_sockets_says_so_to_the_guest() {
    let mut rig = Rig::new();
    rig.world().ping_error = Some(libc::EACCES);
    for _ in 0..3 {
        assert_eq!(only(rig.send(&echo_frame(WORLD, 7, 1, b"ping"))).unreachable().0, 13);
    }
    rig.world().ping_error = None;
    assert_eq!(rig.send(&echo_frame(WORLD, 7, 1, b"ping")), []);
}

#[test]
fn sockets_that_reset_with_the_guest_are_closed() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
    rig.engine.guest_reset();
    rig.assert_empty();
}

#[test]
fn an_answer_reaches_the_queue_pair_and_the_mac_address_last_seen() {
    let mut rig = Rig::new();
    udp(&mut rig, world(9), b"ask");
    let mut moved = udp_frame(guest(4000), world(9), b"ask");
    moved[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 2]);
    rig.send(&moved);
    rig.sock(0).inbox.push_back((b"answer".to_vec(), world(9).into()));
    let token = rig.sock(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    assert_eq!(rig.port.delivered[0].frame[..6], [0x52, 0x54, 0, 0, 0, 2]);
}

#[test]
fn a_frame_to_be_cut_leaves_as_datagrams_and_not_as_too_many() {
    let mut rig = Rig::new();
    let most = limits::USO_SEGMENTS_MAX;
    for (len, size, count) in
        [(3000, 1000, 3), (3001, 1000, 4), (100, 1000, 1), (most, 1, most), (most + 1, 1, 0)]
    {
        let payload = pattern(len);
        let gso = Gso { kind: GsoKind::UdpL4, size_bytes: size, headers_bytes: 42, ecn: false };
        let checksum = Checksum::Partial { start: 34, offset: 6 };
        rig.feed_with(
            VnetHeader { checksum, gso: Some(gso), num_buffers: 0 },
            &udp_frame(guest(4000), world(9), &payload),
        );
        let sent: Vec<Vec<u8>> = rig.sock(0).sent.drain(..).map(|(bytes, _)| bytes).collect();
        assert_eq!(sent.len(), count);
        assert!(count == 0 || sent.concat() == payload);
    }
    assert_eq!(rig.dropped(DropReason::Malformed), 1);
}

#[test]
fn coalesced_datagrams_reach_the_guest_one_by_one_unless_it_cuts_them_itself() {
    let uso = GuestOffloads { checksum: true, uso4: true, ..GuestOffloads::default() };
    for (offloads, frame_bytes_max, len, size, frames) in [
        (GuestOffloads::default(), 70_000, 3500, 1000, 4),
        (uso, 70_000, 3500, 1000, 1),
        (uso, 70_000, 65_507, 1472, 1),
        (uso, 1514, 3500, 1000, 4),
        // Larger than the MTU: no guest may cut such.
        (uso, 70_000, 6000, 3000, 6),
        (uso, 70_000, 1000, 1000, 1),
    ] {
        let mut rig = Rig::with(Setup { offloads, ..Setup::default() });
        rig.port.frame_bytes_max = frame_bytes_max;
        udp(&mut rig, world(9), b"ask");
        rig.sock(0).coalesced_bytes = Some(size);
        rig.sock(0).inbox.push_back((pattern(len), world(9).into()));
        let token = rig.sock(0).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        assert_eq!(rig.port.delivered.len(), frames, "{len} bytes by {size}");
        let whole = frames == 1 && len > size;
        let gso = Gso { kind: GsoKind::UdpL4, size_bytes: size as u16, headers_bytes: 42, ecn: false };
        assert_eq!(rig.port.delivered[0].vnet.gso, whole.then_some(gso));
        let mut received = Vec::new();
        for seen in rig.take() {
            let Seen::Udp { payload, .. } = seen else { panic!("not UDP") };
            assert!(whole || payload.len() <= size);
            received.extend(payload);
        }
        assert!(received == pattern(len));
    }
}
