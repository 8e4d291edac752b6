//! Flows and datagrams of a guest that uses several queue pairs, each with a worker of its own.

use std::net::IpAddr;

use vunet::engine::counters::DropReason;
use vunet::engine::nat::datagram::{GuestEnd, Kind};
use vunet::engine::placement::{Directory, Place, Post, WorkerId};
use vunet::limits;
use vunet::wire::tcp::Flags;

use vunet::wire::ipv4::Protocol;

use crate::detached::Detached;
use crate::frames::{Seen, WORLD, fragments, guest, udp_frame, udp_message, world};
use crate::rig::{Peer, READABLE, Rig, connected, only, secs};
use crate::world::End;

/// Delivers letters until none is left; returns what the guest saw of each worker.
pub(crate) fn exchange(rigs: &mut [Rig]) -> Vec<Vec<Seen>> {
    let mut seen: Vec<Vec<Seen>> = rigs.iter().map(|_| Vec::new()).collect();
    for _ in 0..1000 {
        let mut letters = Vec::new();
        for rig in rigs.iter_mut() {
            letters.extend(std::iter::from_fn(|| rig.engine.next_letter()));
        }
        if letters.is_empty() {
            return seen;
        }
        for (to, letter) in letters {
            let rig = &mut rigs[usize::from(to.0)];
            rig.engine.letter(rig.now, &mut rig.port, letter);
            seen[usize::from(to.0)].extend(rig.flush());
        }
    }
    panic!("letters go round and round");
}

#[test]
fn a_flow_follows_the_guest_to_another_queue_pair_and_loses_nothing() {
    let mut rigs = Rig::workers(2);
    let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    peer.data(&mut rigs[0], Flags::PSH, b"one ");
    assert_eq!(peer.data(&mut rigs[1], Flags::PSH, b"two "), [], "it waits for its flow");
    assert_eq!(peer.data(&mut rigs[1], Flags::PSH, b"three "), []);
    let seen = exchange(&mut rigs);
    assert_eq!(seen[0], [], "the worker it left is silent");
    assert_eq!(rigs[0].conn(0).taken, b"one two three ");
    assert_eq!((rigs[0].engine.nat().len(), rigs[1].engine.nat().len()), (0, 1));
    // From the world to the guest it is the new worker that sends.
    rigs[1].conn(0).queue.extend(b"answer");
    let seen = rigs[1].stream_ready(0, READABLE);
    assert!(seen.into_iter().map(Seen::tcp).any(|segment| segment.payload == b"answer"));
    assert_eq!(rigs[0].conn(0).end, End::Open);
}

#[test]
fn a_flow_that_is_gone_is_answered_with_a_reset_wherever_it_is_asked_for() {
    let mut rigs = Rig::workers(3);
    let mut peer = connected(&mut rigs[2], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    rigs[2].send(&peer.seg(Flags::RST, &[]).frame());
    assert!(rigs[2].engine.nat().is_empty());
    let seen = peer.data(&mut rigs[1], Flags::PSH, b"late");
    assert!(only(seen).tcp().has(Flags::RST));
}

#[test]
fn workers_that_want_one_flow_at_once_get_it_in_turn() {
    let mut rigs = Rig::workers(3);
    let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    peer.data(&mut rigs[1], Flags::PSH, b"a");
    peer.data(&mut rigs[2], Flags::PSH, b"b");
    exchange(&mut rigs);
    let mut taken = rigs[0].conn(0).taken.clone();
    taken.sort_unstable();
    assert_eq!(taken, b"ab");
    assert_eq!(rigs.iter_mut().map(|rig| rig.engine.nat().len()).sum::<usize>(), 1);
}

#[test]
fn frames_that_wait_for_a_flow_are_bounded() {
    let mut rigs = Rig::workers(2);
    let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    for _ in 0..=limits::AWAITING_FRAMES_MAX {
        peer.data(&mut rigs[1], Flags::PSH, b"x");
    }
    assert_eq!(rigs[1].dropped(DropReason::TableFull), 1);
    exchange(&mut rigs);
    assert_eq!(rigs[0].conn(0).taken.len(), limits::AWAITING_FRAMES_MAX);
}

#[test]
fn a_datagram_on_another_queue_pair_leaves_from_the_same_port() {
    let mut rigs = Rig::workers(2);
    rigs[0].send(&udp_frame(guest(4000), world(53), b"one"));
    exchange(&mut rigs);
    rigs[1].send(&udp_frame(guest(4000), world(54), b"two"));
    exchange(&mut rigs);
    assert_eq!(rigs[0].world().socks.len(), 1, "one socket for one port of the guest");
    assert_eq!(rigs[0].sock(0).sent.len(), 2);
}

#[test]
fn a_datagram_socket_follows_the_guest_once_its_frames_keep_coming_elsewhere() {
    let mut rigs = Rig::workers(2);
    rigs[0].send(&udp_frame(guest(4000), world(53), b"first"));
    rigs[0].datagram_arrives(0, b"answer", world(53).into());
    let count = limits::SENT_ON_FRAMES + 3;
    for n in 0..count {
        rigs[1].send(&udp_frame(guest(4000), world(53), &[n as u8]));
        if n < limits::SENT_ON_FRAMES {
            exchange(&mut rigs);
            assert_eq!(rigs[0].engine.nat().len(), 1, "one stray datagram moves nothing");
        }
    }
    // Two more came while the socket was on its way.
    exchange(&mut rigs);
    assert_eq!((rigs[0].engine.nat().len(), rigs[1].engine.nat().len()), (0, 1));
    let sent: Vec<Vec<u8>> = rigs[0].sock(0).sent.iter().skip(1).map(|(bytes, _)| bytes.clone()).collect();
    assert_eq!(sent, (0..count).map(|n| vec![n as u8]).collect::<Vec<_>>(), "all, in order, from one socket");
    // Its peers came along: whom the guest spoke to before may answer, at the new worker; nobody else.
    assert_eq!(rigs[1].datagram_arrives(0, b"later", world(53).into()).len(), 1);
    assert_eq!(rigs[1].datagram_arrives(0, b"stranger", world(54).into()), []);
    assert_eq!(rigs[0].engine.next_deadline(), None, "no timer is left behind");
}

/// What each worker told of flows, in order: whether they began.
fn told(rigs: &mut [Rig]) -> Vec<Vec<bool>> {
    rigs.iter_mut()
        .map(|rig| rig.engine.flow_news().take().0.iter().map(|news| news.opened).collect())
        .collect()
}

#[test]
fn a_move_between_workers_is_neither_an_end_nor_a_beginning() {
    let mut rigs = Rig::workers(2);
    rigs.iter_mut().for_each(|rig| rig.engine.flow_news().set(true));
    rigs[0].send(&udp_frame(guest(4000), world(53), b"first"));
    let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    assert_eq!(told(&mut rigs), [vec![true; 2], vec![]]);
    peer.data(&mut rigs[1], Flags::PSH, b"moves");
    for _ in 0..limits::SENT_ON_FRAMES + 3 {
        rigs[1].send(&udp_frame(guest(4000), world(53), b"x"));
        exchange(&mut rigs);
    }
    assert_eq!((rigs[0].engine.nat().len(), rigs[1].engine.nat().len()), (0, 2), "both moved");
    assert!(told(&mut rigs).concat().is_empty());
    rigs[1].engine.guest_reset();
    assert_eq!(told(&mut rigs), [vec![], vec![false; 2]]);
}

#[test]
fn what_is_lost_on_its_way_between_workers_has_ended() {
    let (mut rigs, letters) = flow_on_its_way_past_a_new_start();
    rigs.iter_mut().for_each(|rig| rig.engine.flow_news().set(true));
    deliver(&mut rigs, letters);
    assert_eq!(told(&mut rigs).concat(), [false], "the flow that came too late");
}

#[test]
fn a_socket_asked_for_that_is_gone_is_opened_anew() {
    let mut rigs = Rig::workers(2);
    rigs[0].send(&udp_frame(guest(4000), world(53), b"first"));
    for _ in 0..limits::SENT_ON_FRAMES {
        rigs[1].send(&udp_frame(guest(4000), world(53), b"x"));
        exchange(&mut rigs);
    }
    rigs[1].send(&udp_frame(guest(4000), world(53), b"asks for it"));
    // It idles out before the letter comes.
    rigs[0].pass(secs(400));
    exchange(&mut rigs);
    assert_eq!((rigs[0].engine.nat().len(), rigs[1].engine.nat().len()), (0, 1));
    assert_eq!(rigs[1].sock(1).sent, [(b"asks for it".to_vec(), world(53).into())]);
}

#[test]
fn a_flow_that_comes_costs_no_other() {
    let mut rigs = Rig::workers(2);
    let mut moves = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    for n in 1..5 {
        connected(&mut rigs[1], Peer::new(guest(4000 + n), world(80)));
    }
    exchange(&mut rigs);
    moves.data(&mut rigs[1], Flags::PSH, b"here");
    exchange(&mut rigs);
    assert_eq!(rigs[1].engine.nat().len(), 5);
    assert!(rigs[0].world().conns.iter().all(|conn| conn.end == End::Open));
}

#[test]
fn the_guests_new_start_ends_its_flows_at_every_worker() {
    let mut rigs = Rig::workers(2);
    connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    connected(&mut rigs[1], Peer::new(guest(4001), world(80)));
    exchange(&mut rigs);
    rigs[0].engine.guest_reset();
    exchange(&mut rigs);
    assert_eq!(ends(&rigs), [End::Reset, End::Reset]);
    assert!(rigs.iter_mut().all(|rig| rig.engine.nat().is_empty()));
}

type Sent = (WorkerId, Post<Detached, Detached>);

/// Letters under way, in order.
fn letters(rig: &mut Rig) -> Vec<Sent> {
    std::iter::from_fn(|| rig.engine.next_letter()).collect()
}

fn deliver(rigs: &mut [Rig], letters: Vec<Sent>) {
    for (to, letter) in letters {
        let rig = &mut rigs[usize::from(to.0)];
        rig.engine.letter(rig.now, &mut rig.port, letter);
    }
}

/// Two workers, and the letter with a flow of guest port 4000 from the first to the second that was
/// under way when the guest began anew.
fn flow_on_its_way_past_a_new_start() -> (Vec<Rig>, Vec<Sent>) {
    let mut rigs = Rig::workers(2);
    let mut old = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    old.data(&mut rigs[1], Flags::PSH, b"moves");
    let asks = letters(&mut rigs[1]);
    deliver(&mut rigs, asks);
    let flow = letters(&mut rigs[0]);
    rigs[0].engine.guest_reset();
    (rigs, flow)
}

/// How each stream ended, oldest first.
fn ends(rigs: &[Rig]) -> Vec<End> {
    rigs[0].world().conns.iter().map(|conn| conn.end).collect()
}

#[test]
fn a_flow_on_its_way_when_the_guest_begins_anew_ends_and_takes_nothing_of_the_new_guest_with_it() {
    let (mut rigs, flow) = flow_on_its_way_past_a_new_start();
    let told = letters(&mut rigs[0]);
    // The new guest uses the same port, at the worker the old flow is on its way to.
    connected(&mut rigs[1], Peer::new(guest(4000), world(80)));
    deliver(&mut rigs, flow);
    deliver(&mut rigs, told);
    exchange(&mut rigs);
    assert_eq!(ends(&rigs), [End::Reset, End::Open]);
    assert_eq!(rigs[1].engine.nat().len(), 1);
}

#[test]
fn a_client_whose_port_a_flow_of_another_worker_has_comes_from_another_port() {
    for is_on_its_way in [false, true] {
        let mut rigs = Rig::workers(2);
        let listener = rigs[0].engine.nat().next_listener_token();
        let published = rigs[0].engine.nat().net().listener();
        rigs[0].publish_tcp(22, published);
        let mut old = connected(&mut rigs[1], Peer::new(guest(22), world(999)));
        exchange(&mut rigs);
        if is_on_its_way {
            old.data(&mut rigs[0], Flags::PSH, b"moves");
            let asks = letters(&mut rigs[0]);
            deliver(&mut rigs, asks);
        }
        rigs[0].world().backlogs[0].push_back(world(999).into());
        let syn = only(rigs[0].ready(listener, READABLE)).tcp();
        assert_eq!((syn.header.flags, syn.from.ip()), (Flags::SYN, IpAddr::V4(*world(999).ip())));
        assert_ne!(syn.from.port(), 999, "on its way: {is_on_its_way}");
        exchange(&mut rigs);
    }
}

#[test]
fn a_flow_that_came_too_late_leaves_its_place_free() {
    let (mut rigs, flow) = flow_on_its_way_past_a_new_start();
    deliver(&mut rigs, flow);
    exchange(&mut rigs);
    // Were the directory still to name the other worker, this one would wait for it.
    connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    assert_eq!(ends(&rigs), [End::Reset, End::Open]);
}

#[test]
fn a_worker_forgets_the_guest_before_the_letter_that_says_it_began_anew() {
    let mut rigs = Rig::workers(2);
    connected(&mut rigs[1], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    rigs[0].engine.guest_reset();
    connected(&mut rigs[1], Peer::new(guest(4001), world(80)));
    exchange(&mut rigs);
    assert_eq!(ends(&rigs), [End::Reset, End::Open]);
}

#[test]
fn a_directory_entry_is_cleared_only_by_who_has_it() {
    let directory = Directory::default();
    let place = Place::Socket(GuestEnd { kind: Kind::Udp, guest: guest(4000).into(), remote: None });
    directory.set(place, WorkerId(1));
    directory.clear(&place, WorkerId(0));
    assert_eq!(directory.owner(&place), Some(WorkerId(1)));
    directory.clear(&place, WorkerId(1));
    assert_eq!(directory.owner(&place), None);
}

#[test]
fn a_datagram_in_fragments_leaves_from_the_socket_another_worker_has() {
    let mut rigs = Rig::workers(2);
    rigs[0].send(&udp_frame(guest(4000), world(53), b"whole"));
    let payload = crate::rig::pattern(5000);
    let message = udp_message(guest(4000), world(53), &payload);
    for frame in fragments(WORLD, Protocol::UDP, &message, 7, 1500) {
        rigs[1].feed(&frame);
    }
    exchange(&mut rigs);
    assert_eq!(rigs[0].sock(0).sent.last().map(|(bytes, _)| bytes.clone()), Some(payload));
    assert_eq!(rigs[1].dropped(DropReason::Fragment), 0);
}

#[test]
fn a_guest_one_worker_has_seen_is_known_to_the_published_ports_of_another() {
    let mut rigs = Rig::workers(2);
    let token = rigs[0].engine.nat().next_datagram_token();
    let socket = rigs[0].engine.nat().net().published_udp(token);
    rigs[0].publish_udp(9006, socket);
    rigs[1].send(&udp_frame(guest(4000), world(53), b"anything"));
    exchange(&mut rigs);
    assert_eq!(rigs[0].datagram_arrives(0, b"hello", world(5000).into()).len(), 1);
    // The guest answers on the other pair all the same.
    rigs[1].send(&udp_frame(guest(9006), world(5000), b"answer"));
    exchange(&mut rigs);
    assert_eq!(rigs[0].sock(0).sent, [(b"answer".to_vec(), world(5000).into())]);
}

#[test]
fn datagrams_of_several_workers_never_share_an_identification() {
    let mut rigs = Rig::workers(3);
    let mut idents = std::collections::HashSet::new();
    for (n, rig) in rigs.iter_mut().enumerate() {
        rig.send(&udp_frame(guest(4000 + n as u16), world(9), b"ask"));
        for _ in 0..1000 {
            rig.sock(n).inbox.push_back((vec![7; 3000], world(9).into()));
        }
        let token = rig.sock(n).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        while rig.engine.flush(&mut rig.port) {}
        let first = |frame: &&Vec<u8>| frame[20..22] == [0x20, 0];
        let frames: Vec<Vec<u8>> = rig.port.delivered.drain(..).map(|received| received.frame).collect();
        let new: Vec<_> = frames.iter().filter(first).map(|frame| [frame[18], frame[19]]).collect();
        assert_eq!(new.len(), 1000);
        assert!(new.into_iter().all(|ident| idents.insert(ident)));
    }
}
