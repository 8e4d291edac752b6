//! How a connection of the guest begins, or does not.

use vunet::engine::counters::DropReason;
use vunet::wire::tcp::Flags;

use crate::frames::{GUEST_IP, WORLD, guest, world};
use crate::rig::{FAILED, Peer, READABLE, Rig, Setup, WRITABLE, connected, only, secs};

/// A connect under way and its SYN's sequence number.
fn connecting(rig: &mut Rig) -> Peer {
    let mut peer = Peer::new(guest(4000), world(80));
    assert_eq!(peer.syn(rig), []);
    peer
}

#[test]
fn the_syn_is_answered_only_after_the_connect_succeeded() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    assert_eq!(rig.pass(secs(100)), [], "however long it takes");
    let seen = rig.stream_ready(0, WRITABLE);
    peer.establish(&mut rig, seen);
    assert_eq!(rig.world().conns.len(), 1);
}

#[test]
fn a_repeated_syn_begins_no_second_connect() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    for _ in 0..3 {
        assert_eq!(peer.syn(&mut rig), []);
    }
    let seen = rig.stream_ready(0, WRITABLE);
    let first = only(seen).tcp();
    let repeated = only(peer.syn(&mut rig)).tcp();
    assert_eq!((repeated.header.seq, repeated.header.ack), (first.header.seq, first.header.ack));
    assert_eq!(rig.world().conns.len(), 1);
}

#[test]
fn a_syn_ack_nobody_answers_is_repeated_with_growing_pauses_and_then_the_world_sees_reset() {
    let mut rig = Rig::new();
    connecting(&mut rig);
    assert_eq!(rig.stream_ready(0, WRITABLE).len(), 1);
    let mut times = Vec::new();
    let start = rig.now;
    for _ in 0..300 {
        for segment in rig.pass(secs(1)) {
            assert!(segment.tcp().has(Flags::SYN | Flags::ACK));
            times.push(rig.now.since(start).as_secs());
        }
    }
    assert_eq!(times, [1, 3, 7, 15, 31, 63]);
    assert_eq!(rig.conn(0).end, crate::world::End::Reset);
    rig.assert_empty();
}

#[test]
fn a_refused_connect_is_a_reset_of_the_syn() {
    for immediate in [true, false] {
        let mut rig = Rig::new();
        let mut peer = Peer::new(guest(4000), world(80));
        let seen = if immediate {
            rig.world().connect_error = Some(libc::ECONNREFUSED);
            peer.syn(&mut rig)
        } else {
            peer.syn(&mut rig);
            rig.conn(0).connect_error = Some(libc::ECONNREFUSED);
            rig.stream_ready(0, FAILED)
        };
        let reset = only(seen).tcp();
        assert_eq!(reset.header.flags, Flags::RST | Flags::ACK);
        assert_eq!(reset.header.ack.0, 1001);
        assert_eq!((reset.from, reset.to), (world(80).into(), guest(4000).into()));
        rig.assert_empty();
    }
}

#[test]
fn an_unreachable_destination_is_an_icmp_error_about_the_syn() {
    let codes = [
        (libc::ENETUNREACH, 0),
        (libc::ENETDOWN, 0),
        (libc::EHOSTUNREACH, 1),
        (libc::EHOSTDOWN, 1),
        (libc::EACCES, 13),
        (libc::EPERM, 13),
    ];
    for (errno, expected) in codes {
        for immediate in [true, false] {
            let mut rig = Rig::new();
            let mut peer = Peer::new(guest(4000), world(80));
            let seen = if immediate {
                rig.world().connect_error = Some(errno);
                peer.syn(&mut rig)
            } else {
                peer.syn(&mut rig);
                rig.conn(0).connect_error = Some(errno);
                rig.stream_ready(0, FAILED)
            };
            let (code, quoted) = only(seen).unreachable();
            assert_eq!(code, expected);
            assert_eq!((&quoted[12..16], &quoted[16..20]), (&GUEST_IP.octets()[..], &WORLD.octets()[..]));
            assert_eq!(quoted[9], 6, "TCP");
            assert_eq!(quoted[20..24], [0x0f, 0xa0, 0, 80], "the ports");
            assert_eq!(quoted[24..28], 1000u32.to_be_bytes(), "the SYN's sequence number");
            rig.assert_empty();
        }
    }
}

#[test]
fn a_host_without_ports_or_memory_left_says_nothing_and_the_repeated_syn_connects() {
    for code in [libc::EADDRNOTAVAIL, libc::ENOBUFS, libc::ENOMEM] {
        for immediate in [true, false] {
            let mut rig = Rig::new();
            let mut peer = Peer::new(guest(4000), world(80));
            rig.world().connect_error = immediate.then_some(code);
            assert_eq!(peer.syn(&mut rig), []);
            if !immediate {
                rig.conn(0).connect_error = Some(code);
                assert_eq!(rig.stream_ready(0, FAILED), [], "a reset would end what may yet begin");
            }
            assert_eq!(rig.dropped(DropReason::TableFull), 1);
            rig.assert_empty();
            rig.world().connect_error = None;
            connected(&mut rig, peer);
        }
    }
}

/// The number vunet begins a flow of these ends with.
fn initial_number(rig: &mut Rig, from: u16, to: u16) -> u32 {
    let mut peer = Peer::new(guest(from), world(to));
    assert_eq!(peer.syn(rig), []);
    let n = rig.world().conns.len() - 1;
    let syn_ack = only(rig.stream_ready(n, WRITABLE)).tcp();
    let reset = Peer { seq: 1001, ack: syn_ack.header.seq.0.wrapping_add(1), ..peer };
    assert_eq!(rig.send(&reset.seg(Flags::RST | Flags::ACK, &[]).frame()), []);
    rig.assert_empty();
    syn_ack.header.seq.0
}

#[test]
fn initial_numbers_of_other_ends_or_with_another_secret_tell_nothing() {
    let numbers = |secret| {
        let mut rig = Rig::with(Setup { secret, ..Setup::default() });
        let ends = (0..100u16).map(|n| (4000 + n, 80)).chain((0..100).map(|n| (4000, 81 + n)));
        ends.map(|(from, to)| initial_number(&mut rig, from, to)).collect::<Vec<u32>>()
    };
    let secrets = [(1, 2), (1, 3), (2, 2)];
    let all: Vec<u32> = secrets.into_iter().flat_map(numbers).collect();
    // 600 numbers drawn from the whole circle at one time: what lies next to another is chance.
    let steps: std::collections::HashSet<u32> =
        all.windows(2).map(|two| two[1].wrapping_sub(two[0])).collect();
    assert!(steps.len() >= all.len() - 2, "{} different steps of {}", steps.len(), all.len());
    let mut quarters = [0; 4];
    for number in &all {
        quarters[(number >> 30) as usize] += 1;
    }
    assert!(quarters.iter().all(|count| *count > all.len() / 8), "{quarters:?}");
}

#[test]
fn initial_numbers_of_the_same_ends_go_up_by_a_quarter_of_the_microseconds() {
    let mut rig = Rig::new();
    let mut before = initial_number(&mut rig, 4000, 80);
    for seconds in [1, 60, 3600] {
        rig.pass(secs(seconds));
        let number = initial_number(&mut rig, 4000, 80);
        assert_eq!(number.wrapping_sub(before), (seconds * 250_000) as u32, "RFC 6528, 3");
        before = number;
    }
}

#[test]
fn a_connect_nobody_answered_ends_in_silence() {
    let mut rig = Rig::new();
    connecting(&mut rig);
    rig.conn(0).connect_error = Some(libc::ETIMEDOUT);
    assert_eq!(rig.stream_ready(0, FAILED), []);
    rig.assert_empty();
}

#[test]
fn a_guest_that_resets_while_connecting_is_forgotten() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    peer.seq = 1001;
    assert_eq!(rig.send(&peer.seg(Flags::RST, &[]).frame()), []);
    assert_eq!(rig.conn(0).end, crate::world::End::Reset);
    rig.assert_empty();
}

#[test]
fn a_guest_that_begins_anew_while_connecting_is_served_by_the_same_connect() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    peer.seq = 77_000;
    assert_eq!(peer.syn(&mut rig), []);
    let seen = rig.stream_ready(0, WRITABLE);
    peer.establish(&mut rig, seen);
    assert_eq!(rig.world().conns.len(), 1);
}

#[test]
fn window_scale_is_used_only_if_the_guest_offers_it() {
    for (offered, expected) in [(None, None), (Some(0), Some(8)), (Some(7), Some(8)), (Some(14), Some(8))] {
        let mut rig = Rig::new();
        let mut peer = connecting(&mut rig);
        peer.shift = offered;
        peer.seq = 5;
        peer.syn(&mut rig);
        let seen = rig.stream_ready(0, WRITABLE);
        let syn_ack = peer.establish(&mut rig, seen);
        assert_eq!(syn_ack.header.options.window_scale, expected);
        assert_eq!(syn_ack.header.window, 0xffff, "a SYN's window is never scaled");
        let acknowledged = only(peer.data(&mut rig, Flags::ACK, b"x")).tcp();
        match expected {
            Some(shift) => {
                let window = usize::from(acknowledged.header.window) << shift;
                assert!(window > (1 << 20) - 1000, "{window}");
            }
            None => assert_eq!(acknowledged.header.window, 0xffff),
        }
    }
}

#[test]
fn the_guests_scaled_window_is_understood() {
    let mut rig = Rig::new();
    let mut peer = Peer { shift: Some(10), window: 3, ..Peer::new(guest(4000), world(80)) };
    peer.syn(&mut rig);
    let seen = rig.stream_ready(0, WRITABLE);
    peer.establish(&mut rig, seen);
    rig.conn(0).queue.extend(crate::rig::pattern(100_000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen).len(), 2 * 1460, "3,072 bytes hold two segments, and the rest is silly");
    let seen = peer.acknowledge(&mut rig);
    assert_eq!(peer.take(seen).len(), 2 * 1460);
}

#[test]
fn the_segment_size_is_the_smaller_of_both_and_never_absurd() {
    let cases = [
        (1500, Some(1460), 1460),
        (1500, Some(9000), 1460),
        (1500, Some(1000), 1000),
        (1500, None, 536),
        (1500, Some(1), 88),
        (9000, Some(8960), 8960),
        (576, Some(1460), 536),
    ];
    for (ip_mtu, offered, expected) in cases {
        let mut rig = Rig::with(Setup { ip_mtu, ..Setup::default() });
        let mut peer = Peer { mss: offered, ..Peer::new(guest(4000), world(80)) };
        peer.syn(&mut rig);
        let seen = rig.stream_ready(0, WRITABLE);
        let syn_ack = peer.establish(&mut rig, seen);
        assert_eq!(syn_ack.header.options.mss, Some(ip_mtu - 40));
        rig.conn(0).queue.extend(crate::rig::pattern(10_000));
        let first = rig.stream_ready(0, READABLE).remove(0).tcp();
        assert_eq!(first.payload.len(), expected, "{ip_mtu} {offered:?}");
    }
}

#[test]
fn segments_of_no_flow_are_reset_with_the_right_numbers() {
    let mut rig = Rig::new();
    let peer = Peer { seq: 500, ack: 900, ..Peer::new(guest(4000), world(80)) };
    let reset = only(rig.send(&peer.seg(Flags::ACK, b"data").frame())).tcp();
    assert_eq!((reset.header.flags, reset.header.seq.0, reset.header.ack.0), (Flags::RST, 900, 0));
    let reset = only(rig.send(&peer.seg(Flags::FIN, b"data").frame())).tcp();
    assert_eq!((reset.header.flags, reset.header.seq.0), (Flags::RST | Flags::ACK, 0));
    assert_eq!(reset.header.ack.0, 505, "payload and FIN are counted");
    let reset = only(rig.send(&peer.seg(Flags::SYN | Flags::ACK, &[]).frame())).tcp();
    assert_eq!((reset.header.flags, reset.header.seq.0), (Flags::RST, 900));
    assert_eq!(rig.send(&peer.seg(Flags::RST, &[]).frame()), [], "a reset is never answered");
    assert_eq!(rig.dropped(DropReason::NoFlow), 3);
    assert!(!rig.world().touched());
}

#[test]
fn a_syn_with_other_flags_begins_nothing() {
    let mut rig = Rig::new();
    for flags in [Flags::FIN, Flags::RST, Flags::ACK] {
        rig.send(&Peer::new(guest(4000), world(80)).seg(Flags::SYN | flags, &[]).frame());
    }
    assert!(!rig.world().touched());
}

#[test]
fn a_syn_ack_acknowledged_wrongly_is_reset_and_the_handshake_goes_on() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
    let wrong = Peer { seq: 1001, ack: syn_ack.header.seq.0.wrapping_add(9), ..peer };
    let reset = only(wrong.acknowledge(&mut rig)).tcp();
    assert_eq!((reset.header.flags, reset.header.seq.0), (Flags::RST, wrong.ack));
    peer.establish(&mut rig, vec![crate::frames::Seen::Tcp(syn_ack)]);
    peer.data(&mut rig, Flags::PSH, b"x");
    assert_eq!(rig.conn(0).taken, b"x");
}

#[test]
fn data_with_the_handshakes_last_acknowledgement_is_taken() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
    peer.seq = 1001;
    peer.ack = syn_ack.header.seq.0.wrapping_add(1);
    let seen = peer.data(&mut rig, Flags::PSH | Flags::FIN, b"GET /");
    assert_eq!(only(seen).tcp().header.ack.0, peer.seq);
    assert_eq!(rig.conn(0).taken, b"GET /");
    assert!(rig.conn(0).fin_from_guest);
}

#[test]
fn a_guest_that_rebooted_and_uses_the_same_ports_is_challenged_resets_and_connects() {
    let mut rig = Rig::new();
    let old = connected(&mut rig, Peer::new(guest(4000), world(80)));
    let mut new = Peer { seq: old.seq.wrapping_add(0x5000_0000), ..Peer::new(guest(4000), world(80)) };
    let challenge = only(new.syn(&mut rig)).tcp();
    assert_eq!((challenge.header.flags, challenge.header.ack.0), (Flags::ACK, old.seq));
    let reset = Peer { seq: challenge.header.ack.0, ..new };
    assert_eq!(rig.send(&reset.seg(Flags::RST, &[]).frame()), []);
    assert_eq!(rig.conn(0).end, crate::world::End::Reset, "the old one is no clean end");
    assert_eq!(new.syn(&mut rig), []);
    let seen = rig.stream_ready(1, WRITABLE);
    new.establish(&mut rig, seen);
}

#[test]
fn a_world_that_has_reset_before_the_handshake_ended_is_seen_as_reset() {
    let mut rig = Rig::new();
    let mut peer = connecting(&mut rig);
    let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
    rig.conn(0).error = Some(libc::ECONNRESET);
    assert_eq!(rig.stream_ready(0, FAILED), []);
    peer.seq = 1001;
    peer.ack = syn_ack.header.seq.0.wrapping_add(1);
    assert!(only(peer.acknowledge(&mut rig)).tcp().has(Flags::RST));
    rig.assert_empty();
}
