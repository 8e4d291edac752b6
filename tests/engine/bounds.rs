//! The tables at their limits and one past them.

use std::net::SocketAddr;

use vunet::engine::counters::DropReason;
use vunet::limits;
use vunet::wire::tcp::Flags;

use crate::frames::{GATEWAY, Seen, echo_frame, guest, udp_frame, world};
use crate::rig::{Peer, READABLE, Rig, Setup, WORLD_FIN, connected, ms, only, secs};
use crate::world::End;

fn small(flows_max: usize) -> Rig {
    Rig::with(Setup { flows_max, ..Setup::default() })
}

fn udp(rig: &mut Rig, from: u16, to: u16) -> Vec<Seen> {
    rig.send(&udp_frame(guest(from), world(to), b"x"))
}

/// Ends a flow in order, the world first: it lingers in TIME-WAIT.
fn finish(rig: &mut Rig, n: usize, mut peer: Peer) {
    rig.conn(n).fin_from_world = true;
    let seen = rig.stream_ready(n, WORLD_FIN);
    peer.take(seen);
    peer.data(rig, Flags::FIN, &[]);
    assert_eq!(rig.conn(n).end, End::Clean);
}

#[test]
fn the_table_at_its_limit_evicts_nobody_and_one_past_it_the_longest_idle() {
    let mut rig = small(4);
    let peers: Vec<Peer> = (0..4)
        .map(|n| {
            rig.now = rig.now + ms(10);
            connected(&mut rig, Peer::new(guest(4000 + n), world(80)))
        })
        .collect();
    assert_eq!(rig.engine.counters().flows_evicted, 0);
    rig.now = rig.now + ms(10);
    peers[0].acknowledge(&mut rig);
    let mut fifth = Peer::new(guest(5000), world(80));
    let reset = only(fifth.syn(&mut rig)).tcp();
    assert!(reset.has(Flags::RST));
    assert_eq!(reset.to, SocketAddr::from(guest(4001)), "the longest idle hears of it");
    assert_eq!(reset.header.seq.0, peers[1].ack);
    assert_eq!(rig.conn(1).end, End::Reset);
    assert_eq!((rig.engine.nat().len(), rig.engine.counters().flows_evicted), (4, 1));
}

#[test]
fn datagrams_and_connections_share_one_limit() {
    let mut rig = small(3);
    udp(&mut rig, 4000, 53);
    rig.now = rig.now + ms(10);
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.now = rig.now + ms(10);
    rig.send(&echo_frame(crate::frames::WORLD, 7, 1, b"ping"));
    rig.now = rig.now + ms(10);
    assert_eq!(rig.engine.nat().len(), 3);
    udp(&mut rig, 4001, 53);
    assert!(!rig.sock(0).is_open, "the longest idle is a datagram socket");
    rig.now = rig.now + ms(10);
    udp(&mut rig, 4002, 53);
    assert_eq!(rig.conn(0).end, End::Reset, "and then a connection");
    rig.now = rig.now + ms(10);
    connected(&mut rig, Peer::new(guest(4003), world(80)));
    assert!(!rig.sock(1).is_open, "and then the echo");
    assert_eq!((rig.engine.nat().len(), rig.engine.counters().flows_evicted), (3, 3));
    assert_eq!(rig.world().open(), 3);
}

#[test]
fn one_guest_port_talking_to_many_is_one_socket() {
    let mut rig = small(2);
    for n in 0..1000 {
        udp(&mut rig, 4000, 1000 + n);
    }
    assert_eq!((rig.engine.nat().len(), rig.engine.counters().flows_evicted), (1, 0));
    assert_eq!(rig.world().open(), 1);
}

#[test]
fn finished_connections_make_room_before_living_ones() {
    let mut rig = small(4);
    let idle = connected(&mut rig, Peer::new(guest(4000), world(22)));
    for n in 0..50 {
        rig.now = rig.now + ms(10);
        let peer = connected(&mut rig, Peer::new(guest(5000 + n), world(80)));
        finish(&mut rig, 1 + usize::from(n), peer);
    }
    assert_eq!(rig.conn(0).end, End::Open, "a connection that ended is no reason to end a living one");
    assert_eq!(idle.acknowledge(&mut rig), []);
    assert_eq!(rig.engine.counters().flows_evicted, 0);
    assert!(rig.engine.nat().len() <= 4);
    rig.pass(secs(11));
    assert_eq!(rig.engine.nat().len(), 1);
}

#[test]
fn where_descriptors_run_out_the_longest_idle_gives_its_own() {
    let mut rig = Rig::new();
    rig.world().descriptors_max = 3;
    for n in 0..3 {
        rig.now = rig.now + ms(10);
        connected(&mut rig, Peer::new(guest(4000 + n), world(80)));
    }
    rig.now = rig.now + ms(10);
    let mut peer = Peer::new(guest(5000), world(80));
    let reset = only(peer.syn(&mut rig)).tcp();
    assert_eq!(reset.to, SocketAddr::from(guest(4000)));
    assert_eq!(rig.conn(0).end, End::Reset);
    assert_eq!(rig.world().conns.len(), 4);
    udp(&mut rig, 5000, 53);
    assert_eq!(rig.sock(0).sent.len(), 1);
    assert_eq!(rig.conn(1).end, End::Reset);
}

#[test]
fn where_descriptors_run_out_finished_connections_do_not_stand_in_for_living_ones() {
    let mut rig = Rig::new();
    rig.world().descriptors_max = 2;
    for n in 0..3 {
        let peer = connected(&mut rig, Peer::new(guest(4000 + n), world(80)));
        finish(&mut rig, usize::from(n), peer);
    }
    for n in 0..2 {
        connected(&mut rig, Peer::new(guest(5000 + n), world(80)));
    }
    let mut peer = Peer::new(guest(6000), world(80));
    assert!(only(peer.syn(&mut rig)).tcp().has(Flags::RST), "of the living one that gave way");
    let seen = rig.stream_ready(5, crate::rig::WRITABLE);
    peer.establish(&mut rig, seen);
    assert_eq!(rig.conn(3).end, End::Reset);
}

#[test]
fn a_connect_without_descriptors_and_without_flows_is_dropped_silently() {
    let mut rig = Rig::new();
    rig.world().descriptors_max = 0;
    assert_eq!(Peer::new(guest(4000), world(80)).syn(&mut rig), [], "its SYN is repeated");
    assert_eq!(rig.dropped(DropReason::TableFull), 1);
    rig.world().descriptors_max = 1;
    connected(&mut rig, Peer::new(guest(4000), world(80)));
}

#[test]
fn remote_endpoints_past_the_limit_forget_the_longest_idle() {
    let mut rig = Rig::new();
    let at = |n: usize| std::net::SocketAddrV4::new([192, 0, 2, (n >> 16) as u8].into(), n as u16);
    for n in 1..=limits::DATAGRAM_PEERS_MAX {
        rig.feed(&udp_frame(guest(4000), at(n), b"x"));
    }
    assert_eq!(rig.datagram_arrives(0, b"answer", at(1).into()).len(), 1);
    // The first endpoint was heard last, so the second is the longest idle.
    rig.feed(&udp_frame(guest(4000), at(limits::DATAGRAM_PEERS_MAX + 1), b"x"));
    assert_eq!(rig.datagram_arrives(0, b"answer", at(2).into()), []);
    assert_eq!(rig.datagram_arrives(0, b"answer", at(1).into()).len(), 1);
    assert_eq!(rig.datagram_arrives(0, b"answer", at(3).into()).len(), 1);
}

#[test]
fn an_endpoint_past_the_limit_may_take_the_place_of_its_own_sockets_last() {
    let mut rig = Rig::new();
    let at = |n: usize| std::net::SocketAddrV4::new([192, 0, 2, (n >> 16) as u8].into(), n as u16);
    rig.feed(&udp_frame(guest(4000), at(9), b"x"));
    for n in 1..limits::DATAGRAM_PEERS_MAX {
        rig.feed(&udp_frame(guest(4001), at(n), b"x"));
    }
    rig.feed(&udp_frame(guest(4000), at(10), b"x"));
    assert_eq!(rig.sock(0).sent.len(), 2, "from the same socket");
    assert_eq!(rig.datagram_arrives(0, b"answer", at(10).into()).len(), 1);
    assert_eq!(rig.datagram_arrives(0, b"answer", at(9).into()), []);
}

#[test]
fn evictions_from_a_crowded_table_are_quick() {
    // Each takes a step a peer of the evicted socket, not one a peer of the table.
    let flows_max = 20_000;
    let mut rig = small(flows_max);
    for n in 0..flows_max as u16 {
        rig.feed(&udp_frame(guest(1 + n), world(53), b"x"));
    }
    let start = std::time::Instant::now();
    for n in 0..20_000 {
        rig.feed(&udp_frame(guest(30_000 + n), world(53), b"x"));
    }
    assert!(start.elapsed() < secs(4), "{:?}", start.elapsed());
    assert_eq!(rig.engine.counters().flows_evicted, 20_000);
    let start = std::time::Instant::now();
    rig.engine.guest_reset();
    assert!(start.elapsed() < secs(2), "{:?}", start.elapsed());
    rig.assert_empty();
}

#[test]
fn clients_of_published_ports_evict_only_for_clients_there_are() {
    let mut rig = small(3);
    let listener = rig.engine.nat().net().listener();
    let token = rig.engine.nat().next_listener_token();
    rig.publish_tcp(22, listener);
    for n in 0..3 {
        rig.now = rig.now + ms(10);
        connected(&mut rig, Peer::new(guest(4000 + n), world(80)));
    }
    for _ in 0..5 {
        rig.ready(token, READABLE);
    }
    assert_eq!(rig.engine.counters().flows_evicted, 0, "nobody came");
    rig.world().backlogs[0].push_back(SocketAddr::from(([198, 51, 100, 1], 999)));
    rig.ready(token, READABLE);
    assert_eq!(rig.engine.counters().flows_evicted, 1, "one came");
    assert_eq!(rig.engine.nat().len(), 3);
    assert_eq!(rig.conn(3).end, End::Open);
}

#[test]
fn published_sockets_take_no_flows_place() {
    let mut rig = small(2);
    for n in 0..4 {
        let token = rig.engine.nat().next_datagram_token();
        let socket = rig.engine.nat().net().published_udp(token);
        rig.publish_udp(1000 + n, socket);
    }
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    connected(&mut rig, Peer::new(guest(4001), world(80)));
    assert_eq!(rig.engine.counters().flows_evicted, 0);
    assert_eq!(rig.engine.nat().len(), 2);
}

#[test]
fn frames_past_the_outbox_are_dropped_and_counted() {
    let mut rig = Rig::new();
    rig.port.free = 0;
    let count = limits::OUTBOX_FRAMES_MAX + 10;
    for n in 0..count {
        assert_eq!(rig.send(&echo_frame(GATEWAY, 1, n as u16, b"x")), []);
    }
    assert_eq!(rig.dropped(DropReason::GuestNotReceiving), 10);
    let seen = rig.post_buffers(5);
    assert_eq!(seen.len(), 5);
    let seen = rig.post_buffers(1000);
    assert_eq!(seen.len(), limits::OUTBOX_FRAMES_MAX - 5);
    assert_eq!(rig.send(&echo_frame(GATEWAY, 1, 1, b"x")).len(), 1);
}

#[test]
fn reassembly_is_bounded_and_a_flood_of_fragments_ends_nobody_elses_datagram_for_long() {
    let mut rig = Rig::new();
    let message = crate::frames::udp_message(guest(4000), world(9), &crate::rig::pattern(3000));
    for ident in 0..1000 {
        let fragments = crate::frames::fragments(
            crate::frames::WORLD,
            vunet::wire::ipv4::Protocol::UDP,
            &message,
            ident,
            1500,
        );
        rig.feed(&fragments[0]);
    }
    let dropped = 1000 - limits::REASSEMBLY_DATAGRAMS_MAX as u64;
    assert_eq!(rig.dropped(DropReason::TableFull), dropped);
    for frame in
        crate::frames::fragments(crate::frames::WORLD, vunet::wire::ipv4::Protocol::UDP, &message, 2000, 1500)
    {
        rig.feed(&frame);
    }
    assert_eq!(rig.sock(0).sent.len(), 1);
}
