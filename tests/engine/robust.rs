//! What TCP needs on bad networks besides bytes in order: both ends that begin at once, time-outs that fit the
//! guest's pace, a bound on connections under way, congestion marks, narrower links within the guest.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::engine::counters::DropReason;
use vunet::engine::host_net::Token;
use vunet::limits;
use vunet::wire::icmpv4::{Message, UnreachableCode};
use vunet::wire::ipv4::Protocol;
use vunet::wire::tcp::{Flags, Options};

use crate::frames::{Seen, Seg, TcpSeen, frame, guest, ip, world};
use crate::published::{arrives, client, peer_of, rig};
use crate::rig::{Peer, READABLE, Rig, WORLD_FIN, WRITABLE, connected, ms, only, pattern, secs};
use crate::world::End;

/// The SYN that a client of the published port has the guest receive.
fn syn_of(rig: &mut Rig, listener: Token, client: SocketAddr) -> TcpSeen {
    only(arrives(rig, listener, client)).tcp()
}

/// The guest's "destination unreachable" about the segment of `peer`'s flow at `seq`.
fn unreachable(peer: &Peer, seq: u32, code: UnreachableCode, next_hop_mtu: u16) -> Vec<u8> {
    let mut quote = vec![0; 28];
    ip(*peer.to.ip(), *peer.from.ip(), Protocol::TCP, 1460).emit(&mut quote);
    quote[20..22].copy_from_slice(&peer.to.port().to_be_bytes());
    quote[22..24].copy_from_slice(&peer.from.port().to_be_bytes());
    quote[24..28].copy_from_slice(&seq.to_be_bytes());
    let mut message = vec![0; 8 + quote.len()];
    Message::Unreachable { code, next_hop_mtu }.emit_with_payload(&quote, &mut message);
    frame(&ip(*peer.from.ip(), *peer.to.ip(), Protocol::ICMP, message.len()), &message)
}

#[test]
fn both_ends_that_begin_at_once_meet() {
    let (mut rig, listener) = rig();
    let syn = syn_of(&mut rig, listener, client(999));
    let mut peer = peer_of(&syn);
    let answer = only(rig.send(&peer.seg(Flags::SYN, &[]).frame())).tcp();
    assert_eq!(answer.header.flags, Flags::SYN | Flags::ACK);
    assert_eq!((answer.header.seq, answer.header.ack.0), (syn.header.seq, peer.seq + 1));
    // The guest's own SYN-ACK has its SYN's number.
    let done = only(rig.send(&peer.seg(Flags::SYN | Flags::ACK, &[]).frame())).tcp();
    peer.seq += 1;
    assert_eq!((done.header.flags, done.header.ack.0), (Flags::ACK, peer.seq));
    peer.data(&mut rig, Flags::PSH, b"hello");
    assert_eq!(rig.conn(0).taken, b"hello");
    rig.conn(0).queue.extend(b"you too");
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), b"you too");
}

/// The world has sent 3,000 bytes, and the time-out sent again what fits of them: without the last 80. The
/// guest had them all, and its acknowledgement was lost.
fn sending_again(shift: Option<u8>) -> (Rig, Peer) {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 4000, shift, ..Peer::new(guest(4000), world(80)) });
    if shift.is_some() {
        peer.window = 4000 >> 7;
        peer.acknowledge(&mut rig);
    }
    for _ in 0..3 {
        rig.conn(0).queue.extend(pattern(1000));
        let seen = rig.stream_ready(0, READABLE);
        assert_eq!(only(seen).tcp().payload.len(), 1000);
    }
    let again: usize = rig.pass(ms(250)).into_iter().map(|seen| seen.tcp().payload.len()).sum();
    assert!((2900..3000).contains(&again), "{again} bytes sent again");
    (rig, peer)
}

#[test]
fn an_acknowledgement_lies_behind_all_that_was_sent_while_it_is_sent_again() {
    let (mut rig, mut peer) = sending_again(None);
    let answer = only(peer.data(&mut rig, Flags::FIN, b"bytes")).tcp();
    assert!(answer.payload.is_empty());
    assert_eq!(answer.header.seq.0, peer.ack + 3000, "a guest lets older ones go, and what they acknowledge");
}

#[test]
fn an_acknowledgement_lies_within_a_window_the_guest_took_back() {
    for (shift, window, seq) in [(None, 1000, 1000), (Some(7), 8, 1024), (Some(7), 23, 3000)] {
        let (mut rig, mut peer) = sending_again(shift);
        peer.window = window;
        let answer = only(peer.data(&mut rig, Flags::FIN, b"bytes")).tcp();
        assert_eq!(answer.header.seq.0, peer.ack + seq, "a window of {window} by {shift:?}");
    }
}

#[test]
fn a_guest_whose_segment_is_not_acceptable_is_answered_where_it_stands() {
    let (mut rig, mut peer) = sending_again(None);
    peer.window = 1000;
    let beyond_a_hole = Peer { seq: peer.seq + 100, ..peer };
    let usual = beyond_a_hole.seg(Flags::ACK, b"later").frame();
    assert_eq!(only(rig.send(&usual)).tcp().header.seq.0, peer.ack + 1000);
    for (told, answered) in [(2500, 2500), (3000, 3000), (3001, 1000), (0, 0), (-1i32 as u32, 1000)] {
        let old = Peer { seq: peer.seq - 3, ack: peer.ack.wrapping_add(told), ..peer };
        let answer = only(old.acknowledge(&mut rig)).tcp();
        assert_eq!(answer.header.seq.0, peer.ack + answered, "told {told}");
        assert_eq!(rig.conn(0).discarded, 0, "it is told from, not believed");
        assert_eq!(only(rig.send(&usual)).tcp().header.seq.0, peer.ack + 1000, "and once only");
    }
}

#[test]
fn an_acknowledgement_that_goes_on_tells_the_window_whatever_its_number() {
    let mut rig = Rig::new();
    let peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(1000));
    rig.stream_ready(0, READABLE);
    let later = Peer { seq: peer.seq + 100, window: 60_000, ..peer };
    rig.send(&later.seg(Flags::ACK, b"later").frame());
    // It sends again what was lost, and its application reads nothing.
    let again = Peer { ack: peer.ack + 1000, window: 1000, ..peer };
    rig.send(&again.seg(Flags::ACK, &pattern(100)).frame());
    rig.conn(0).queue.extend(pattern(5000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(seen.into_iter().map(|seen| seen.tcp().payload.len()).sum::<usize>(), 1000);
}

#[test]
fn an_acknowledgement_that_falls_behind_tells_no_window_whatever_its_number() {
    let mut rig = Rig::new();
    let peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(3000));
    rig.stream_ready(0, READABLE);
    Peer { ack: peer.ack + 3000, window: 2000, ..peer }.acknowledge(&mut rig);
    let late = Peer { seq: peer.seq + 100, ack: peer.ack + 1460, window: 60_000, ..peer };
    rig.send(&late.seg(Flags::ACK, b"late").frame());
    rig.conn(0).queue.extend(pattern(5000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(seen.into_iter().map(|seen| seen.tcp().payload.len()).sum::<usize>(), 1460);
}

#[test]
fn a_guest_that_takes_its_time_is_not_sent_everything_twice() {
    let mut rig = Rig::new();
    let mut peer = Peer::new(guest(4000), world(80));
    peer.syn(&mut rig);
    let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
    // Its acknowledgement takes 600 ms, here and from now on.
    peer.seq += 1;
    peer.ack = syn_ack.header.seq.0.wrapping_add(1);
    assert_eq!(rig.pass(ms(600)), []);
    peer.acknowledge(&mut rig);
    for _ in 0..20 {
        rig.conn(0).queue.extend(pattern(1000));
        let seen = rig.stream_ready(0, READABLE);
        peer.take(seen);
        assert_eq!(rig.pass(ms(600)), [], "nothing is sent again before its time");
        peer.acknowledge(&mut rig);
    }
    assert_eq!(rig.engine.counters().retransmits, 0);
    rig.conn(0).queue.extend(pattern(1000));
    rig.stream_ready(0, READABLE);
    assert_eq!(rig.pass(ms(1200)).len(), 1, "and a loss is noticed in 600 ms and a margin");
}

#[test]
fn a_guest_that_was_paused_does_not_make_later_losses_long() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 2000, ..Peer::new(guest(4000), world(80)) });
    rig.conn(0).queue.extend(pattern(1000));
    // Nothing is sent again to a guest that posts no buffers, and no time runs against it.
    rig.port.free = 1;
    let seen = rig.stream_ready(0, READABLE);
    peer.take(seen);
    rig.now = rig.now + secs(60);
    peer.acknowledge(&mut rig);
    rig.port.free = 100;
    rig.conn(0).queue.extend(pattern(1000));
    rig.stream_ready(0, READABLE);
    assert_eq!(rig.pass(secs(4)).len(), 1, "a loss is noticed in seconds");
}

#[test]
fn what_was_sent_twice_is_not_timed() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(1000));
    let seen = rig.stream_ready(0, READABLE);
    peer.take(seen);
    // An acknowledgement after 50 s answers any of many sendings.
    rig.pass(secs(50));
    peer.acknowledge(&mut rig);
    rig.conn(0).queue.extend(pattern(1000));
    rig.stream_ready(0, READABLE);
    assert_eq!(rig.pass(ms(250)).len(), 1);
}

#[test]
fn connections_under_way_are_bounded_and_the_dead_destination_pays() {
    let mut rig = Rig::new();
    let alive = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 5), 443);
    Peer::new(guest(3999), alive).syn(&mut rig);
    for n in 0..limits::TCP_BACKLOG_MAX as u16 {
        Peer::new(guest(4000 + n), world(80)).syn(&mut rig);
    }
    let open = limits::TCP_BACKLOG_MAX;
    assert_eq!((rig.engine.nat().len(), rig.world().open()), (open, open));
    assert_eq!(rig.dropped(DropReason::TableFull), 1);
    let ends: Vec<End> = rig.world().conns.iter().map(|conn| conn.end).collect();
    assert_eq!((ends[0], ends[1]), (End::Open, End::Reset), "the oldest to the dead host made room");
    // The one to the host that lives is served, and then no longer counted.
    let mut peer = Peer::new(guest(3999), alive);
    let seen = rig.stream_ready(0, WRITABLE);
    peer.establish(&mut rig, seen);
    Peer::new(guest(9000), world(80)).syn(&mut rig);
    assert_eq!(rig.dropped(DropReason::TableFull), 1);
    Peer::new(guest(9001), world(80)).syn(&mut rig);
    assert_eq!(rig.dropped(DropReason::TableFull), 2);
}

#[test]
fn connections_that_end_before_they_began_leave_the_backlog() {
    let mut rig = Rig::new();
    for n in 0..3 * limits::TCP_BACKLOG_MAX {
        let mut peer = Peer::new(guest(1024 + n as u16), world(80));
        peer.syn(&mut rig);
        peer.seq += 1;
        match n % 3 {
            0 => drop(rig.send(&peer.seg(Flags::RST, &[]).frame())),
            1 => {
                rig.conn(n).connect_error = Some(libc::ECONNREFUSED);
                rig.stream_ready(n, WRITABLE);
            }
            _ => {
                let seen = rig.stream_ready(n, WRITABLE);
                peer.seq -= 1;
                peer.establish(&mut rig, seen);
            }
        }
    }
    assert_eq!(rig.dropped(DropReason::TableFull), 0);
}

#[test]
fn a_flood_of_clients_of_one_published_port_spares_another() {
    let (mut rig, listener) = rig();
    let other = rig.engine.nat().next_listener_token();
    let socket = rig.engine.nat().net().listener();
    rig.publish_tcp(23, socket);
    rig.world().backlogs[1].push_back(client(1));
    only(rig.ready(other, READABLE));
    for n in 0..limits::TCP_BACKLOG_MAX as u16 {
        syn_of(&mut rig, listener, client(1000 + n));
    }
    let ends: Vec<End> = rig.world().conns.iter().map(|conn| conn.end).collect();
    assert_eq!((ends[0], ends[1], ends[2]), (End::Open, End::Reset, End::Open));
}

#[test]
fn an_old_syn_does_not_take_the_place_of_a_finished_flow() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { seq: 500_000, ..Peer::new(guest(4000), world(80)) });
    rig.conn(0).fin_from_world = true;
    let seen = rig.stream_ready(0, WORLD_FIN);
    peer.take(seen);
    peer.data(&mut rig, Flags::FIN, &[]);
    let challenged = only(Peer { seq: 400_000, ..peer }.syn(&mut rig)).tcp();
    assert_eq!((challenged.header.flags, challenged.header.ack.0), (Flags::ACK, peer.seq));
    assert_eq!(rig.world().conns.len(), 1);
    // A stray reset does not end the waiting; what the guest answers the challenge with does.
    rig.send(&Peer { seq: peer.seq + 1, ..peer }.seg(Flags::RST, &[]).frame());
    assert_eq!(rig.engine.nat().len(), 1);
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    assert!(rig.engine.nat().is_empty());
}

#[test]
fn newer_timestamps_make_a_syn_new_whatever_its_number() {
    for (value, is_new) in [(100, false), (101, true)] {
        let mut rig = Rig::new();
        let stamped = |value| Options { timestamps: Some((value, 0)), ..Options::default() };
        let mut peer = Peer { seq: 500_000, ..Peer::new(guest(4000), world(80)) };
        let send =
            |rig: &mut Rig, seg: Seg<'_>, value| rig.send(&Seg { options: stamped(value), ..seg }.frame());
        send(&mut rig, peer.seg(Flags::SYN, &[]), 100);
        let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
        peer.seq += 1;
        peer.ack = syn_ack.header.seq.0.wrapping_add(1);
        send(&mut rig, peer.seg(Flags::ACK, &[]), 100);
        rig.conn(0).fin_from_world = true;
        let seen = rig.stream_ready(0, WORLD_FIN);
        peer.take(seen);
        send(&mut rig, peer.seg(Flags::ACK | Flags::FIN, &[]), 100);
        send(&mut rig, Peer { seq: 400_000, ..peer }.seg(Flags::SYN, &[]), value);
        assert_eq!(rig.world().conns.len() == 2, is_new, "timestamp {value}");
    }
}

#[test]
fn challenges_are_rationed_and_begin_again() {
    let mut rig = Rig::new();
    let peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    let stray = Peer { seq: peer.seq.wrapping_add(100), ..peer }.seg(Flags::RST, &[]).frame();
    let most = usize::from(limits::TCP_CHALLENGES_PER_SECOND);
    let answers = |rig: &mut Rig| (0..100).filter(|_| !rig.send(&stray).is_empty()).count();
    assert_eq!(answers(&mut rig), most);
    assert_eq!(rig.dropped(DropReason::RateLimited), 100 - most as u64);
    rig.pass(secs(1));
    assert_eq!(answers(&mut rig), most);
}

#[test]
fn congestion_is_told_where_the_hosts_side_agreed_on_it_too() {
    for (guest_asks, host_has) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut rig = Rig::new();
        rig.world().ecn = host_has;
        let mut peer = Peer::new(guest(4000), world(80));
        let asks = if guest_asks { Flags::SYN | Flags::ECE | Flags::CWR } else { Flags::SYN };
        rig.send(&peer.seg(asks, &[]).frame());
        let seen = rig.stream_ready(0, WRITABLE);
        let agreed = peer.establish(&mut rig, seen).has(Flags::ECE);
        assert_eq!(agreed, guest_asks && host_has);
        let marked = |peer: &Peer, flags| {
            let mut bytes = peer.seg(Flags::ACK | flags, b"x").frame();
            mark(&mut bytes);
            bytes
        };
        // The acknowledgement of a short segment may wait.
        let echoes = |rig: &mut Rig| only(rig.pass(ms(1))).tcp().has(Flags::ECE);
        rig.send(&marked(&peer, Flags::PSH));
        peer.seq += 1;
        assert_eq!(echoes(&mut rig), agreed);
        for (flags, expected) in [(Flags::PSH, agreed), (Flags::PSH | Flags::CWR, false), (Flags::PSH, false)]
        {
            let mut seen = peer.data(&mut rig, flags, b"x");
            seen.extend(rig.pass(ms(1)));
            assert_eq!(only(seen).tcp().has(Flags::ECE), expected, "until the guest slows down");
        }
    }
}

/// Sets "congestion experienced" and corrects the IPv4 header's checksum.
fn mark(bytes: &mut [u8]) {
    bytes[15] |= 3;
    bytes[24..26].fill(0);
    let mut sum = vunet::wire::checksum::Accumulator::new();
    sum.add_bytes(&bytes[14..34]);
    let sum = sum.finish();
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_guest_that_begins_anew_while_connecting_is_answered_for_what_it_asks_now() {
    for (first, then) in [(true, false), (false, true)] {
        let mut rig = Rig::new();
        rig.world().ecn = true;
        let mut peer = Peer::new(guest(4000), world(80));
        let asks = |ecn: bool| if ecn { Flags::SYN | Flags::ECE | Flags::CWR } else { Flags::SYN };
        rig.send(&peer.seg(asks(first), &[]).frame());
        peer.seq += 5000;
        rig.send(&peer.seg(asks(then), &[]).frame());
        let answer = only(rig.stream_ready(0, WRITABLE)).tcp();
        assert_eq!(answer.header.ack.0, peer.seq + 1);
        assert_eq!(answer.has(Flags::ECE), then);
    }
}

#[test]
fn the_guest_is_asked_for_ecn_once_where_a_client_has_it() {
    let (mut rig, listener) = rig();
    rig.world().ecn = true;
    let syn = syn_of(&mut rig, listener, client(999));
    assert_eq!(syn.header.flags, Flags::SYN | Flags::ECE | Flags::CWR);
    let again = only(rig.pass(secs(1))).tcp();
    assert_eq!(again.header.flags, Flags::SYN, "a guest that throws such away gets a plain one");
    let mut peer = peer_of(&syn);
    rig.send(&peer.seg(Flags::SYN | Flags::ACK | Flags::ECE, &[]).frame());
    peer.seq += 1;
    let mut bytes = peer.seg(Flags::ACK, b"x").frame();
    mark(&mut bytes);
    assert!(only(rig.send(&bytes)).tcp().has(Flags::ECE));
}

#[test]
fn a_narrower_link_within_the_guest_gets_smaller_segments() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(5000));
    rig.stream_ready(0, READABLE);
    let sizes = |seen: &[Seen]| seen.iter().map(|seen| seen.clone().tcp().payload.len()).max();
    // One that quotes nothing under way is a forgery.
    let forged = unreachable(&peer, peer.ack.wrapping_add(6000), UnreachableCode::FragmentationNeeded, 1000);
    assert_eq!(rig.send(&forged), []);
    assert_eq!(rig.dropped(DropReason::OutOfWindow), 1);
    let seen = rig.send(&unreachable(&peer, peer.ack, UnreachableCode::FragmentationNeeded, 1000));
    assert_eq!(sizes(&seen), Some(960));
    assert_eq!(peer.take(seen), pattern(5000));
    peer.acknowledge(&mut rig);
    rig.conn(0).queue.extend(pattern(5000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(sizes(&seen), Some(960), "from now on");
    // A router that does not say how small, and a forger's nonsense.
    for (told, expected) in [(0, 536), (68, 512)] {
        let seen = rig.send(&unreachable(&peer, peer.ack, UnreachableCode::FragmentationNeeded, told));
        assert_eq!(sizes(&seen), Some(expected), "told {told}");
    }
}

#[test]
fn a_guests_firewall_that_rejects_a_client_ends_its_wait() {
    let (mut rig, listener) = rig();
    let syn = syn_of(&mut rig, listener, client(999));
    let peer = peer_of(&syn);
    rig.send(&unreachable(&peer, syn.header.seq.0, UnreachableCode::Port, 0));
    assert_eq!(rig.conn(0).end, End::Reset);
    assert!(rig.engine.nat().is_empty());
}

#[test]
fn unreachable_is_no_end_of_a_connection_that_was_there() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(100));
    let seen = rig.stream_ready(0, READABLE);
    let at = peer.ack;
    peer.take(seen);
    for code in [UnreachableCode::Port, UnreachableCode::Host, UnreachableCode::AdminProhibited] {
        rig.send(&unreachable(&peer, at, code, 0));
    }
    assert_eq!(rig.conn(0).end, End::Open);
}

#[test]
fn unreachable_finds_the_worker_that_has_the_flow() {
    let mut rigs = Rig::workers(2);
    let peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    crate::handover::exchange(&mut rigs);
    rigs[0].conn(0).queue.extend(pattern(1460));
    rigs[0].stream_ready(0, READABLE);
    rigs[1].send(&unreachable(&peer, peer.ack, UnreachableCode::FragmentationNeeded, 1000));
    let seen = crate::handover::exchange(&mut rigs);
    assert_eq!(seen[0].first().expect("sent again").clone().tcp().payload.len(), 960);
}
