//! Ports of the host that lead to the guest.

use std::net::{Ipv4Addr, SocketAddr};

use vunet::addr::MacAddr;
use vunet::config::{Protocol, Publish};
use vunet::engine::core::Owner;
use vunet::engine::counters::DropReason;
use vunet::engine::host_net::Token;
use vunet::limits;
use vunet::wire::arp;
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::tcp::{Flags, Options};

use crate::frames::{GATEWAY, GUEST_IP, GUEST_MAC, Seen, echo_frame, guest, udp_frame};
use crate::rig::{FAILED, Peer, READABLE, Rig, Setup, only, pattern, secs};
use crate::world::End;

pub(crate) fn client(port: u16) -> SocketAddr {
    SocketAddr::from(([198, 51, 100, 9], port))
}

fn v4(addr: SocketAddr) -> std::net::SocketAddrV4 {
    match addr {
        SocketAddr::V4(addr) => addr,
        SocketAddr::V6(_) => panic!("not IPv4"),
    }
}

/// Publishes TCP port 22 and UDP port 53.
fn publish(rig: &mut Rig) -> (Token, Token) {
    let tcp = rig.engine.nat().next_listener_token();
    let listener = rig.engine.nat().net().listener();
    rig.publish_tcp(22, listener);
    let udp = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(udp);
    rig.publish_udp(53, socket);
    (tcp, udp)
}

/// A rig whose guest is known.
pub(crate) fn rig() -> (Rig, Token) {
    let mut rig = Rig::new();
    let (tcp, _) = publish(&mut rig);
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    (rig, tcp)
}

pub(crate) fn arrives(rig: &mut Rig, listener: Token, client: SocketAddr) -> Vec<Seen> {
    rig.world().backlogs[0].push_back(client);
    rig.ready(listener, READABLE)
}

/// The guest's end of what the world's `syn` begins.
pub(crate) fn peer_of(syn: &crate::frames::TcpSeen) -> Peer {
    Peer { ack: syn.header.seq.0.wrapping_add(1), ..Peer::new(v4(syn.to), v4(syn.from)) }
}

/// The guest's answer to a SYN of the world.
fn answer(rig: &mut Rig, syn: &crate::frames::TcpSeen) -> Peer {
    let mut peer = peer_of(syn);
    let options = Options { mss: Some(1460), window_scale: Some(7), ..Options::default() };
    let seg = crate::frames::Seg { options, ..peer.seg(Flags::SYN | Flags::ACK, &[]) };
    let acknowledged = only(rig.send(&seg.frame())).tcp();
    peer.seq += 1;
    assert_eq!((acknowledged.header.flags, acknowledged.header.ack.0), (Flags::ACK, peer.seq));
    peer
}

#[test]
fn a_client_reaches_the_guest_under_its_own_address() {
    let (mut rig, listener) = rig();
    let syn = only(arrives(&mut rig, listener, client(999))).tcp();
    assert_eq!(syn.header.flags, Flags::SYN);
    assert_eq!((syn.from, syn.to), (client(999), SocketAddr::from(guest(22))));
    assert_eq!(syn.header.options.mss, Some(1460));
    assert_eq!(syn.header.options.window_scale, Some(8));
    let mut peer = answer(&mut rig, &syn);
    assert_eq!(peer.data(&mut rig, Flags::ACK, b"SSH-2.0").len(), 1);
    assert_eq!(rig.conn(0).taken, b"SSH-2.0");
    rig.conn(0).queue.extend(pattern(3000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), pattern(3000));
}

#[test]
fn what_the_client_sent_before_the_guest_answered_arrives() {
    let (mut rig, listener) = rig();
    let syn = only(arrives(&mut rig, listener, client(999))).tcp();
    rig.conn(0).queue.extend(b"hello");
    rig.conn(0).fin_from_world = true;
    assert_eq!(rig.stream_ready(0, crate::rig::WORLD_FIN), []);
    let mut peer = Peer::new(v4(syn.to), v4(syn.from));
    peer.ack = syn.header.seq.0.wrapping_add(1);
    let seen = rig.send(&peer.seg(Flags::SYN | Flags::ACK, &[]).frame());
    assert_eq!(peer.take(seen), b"hello");
}

#[test]
fn clients_on_the_host_and_of_the_guests_own_subnet_appear_as_the_gateway() {
    let hidden = [[127, 0, 0, 1], [127, 1, 2, 3], [10, 0, 2, 2], [10, 0, 2, 77]];
    for address in hidden {
        let (mut rig, listener) = rig();
        let syn = only(arrives(&mut rig, listener, SocketAddr::from((address, 999)))).tcp();
        assert_eq!(syn.from, SocketAddr::new(GATEWAY.into(), 999));
        answer(&mut rig, &syn);
    }
}

#[test]
fn clients_whose_visible_ends_collide_get_ports_of_their_own() {
    let (mut rig, listener) = rig();
    let mut seen = Vec::new();
    for n in 1..=20u8 {
        let syn = only(arrives(&mut rig, listener, SocketAddr::from(([127, 0, 0, n], 999)))).tcp();
        assert_eq!(syn.from.ip(), GATEWAY);
        assert!(!seen.contains(&syn.from.port()));
        seen.push(syn.from.port());
        answer(&mut rig, &syn);
    }
    assert_eq!(seen[0], 999);
    assert!(seen[1..].iter().all(|port| *port >= 49_152));
}

#[test]
fn a_guest_that_refuses_is_a_reset_to_the_client() {
    let (mut rig, listener) = rig();
    let syn = only(arrives(&mut rig, listener, client(999))).tcp();
    let peer = Peer { seq: 0, ack: syn.header.seq.0.wrapping_add(1), ..Peer::new(v4(syn.to), v4(syn.from)) };
    assert_eq!(rig.send(&peer.seg(Flags::RST | Flags::ACK, &[]).frame()), []);
    assert_eq!(rig.conn(0).end, End::Reset);
    assert!(rig.engine.nat().is_empty());
}

#[test]
fn a_reset_of_another_time_does_not_end_the_handshake() {
    let (mut rig, listener) = rig();
    let syn = only(arrives(&mut rig, listener, client(999))).tcp();
    let stale = Peer { ack: syn.header.seq.0.wrapping_add(7), ..Peer::new(v4(syn.to), v4(syn.from)) };
    assert_eq!(rig.send(&stale.seg(Flags::RST | Flags::ACK, &[]).frame()), []);
    let reset = only(rig.send(&stale.seg(Flags::ACK, &[]).frame())).tcp();
    assert_eq!(
        (reset.header.flags, reset.header.seq.0),
        (Flags::RST, stale.ack),
        "an old connection's answer"
    );
    answer(&mut rig, &syn);
}

#[test]
fn a_guest_that_never_answers_is_a_reset_to_the_client_after_six_tries() {
    let (mut rig, listener) = rig();
    assert_eq!(arrives(&mut rig, listener, client(999)).len(), 1);
    let repeated = rig.pass(secs(200));
    assert_eq!(repeated.len(), 6);
    assert_eq!(rig.conn(0).end, End::Reset);
    assert!(rig.engine.nat().is_empty());
}

#[test]
fn a_client_waits_for_a_guest_that_is_not_there_some_two_minutes() {
    // One that never answered for its address, and one that falls silent.
    for known in [false, true] {
        let mut rig = Rig::with(Setup { guest: Some(GUEST_IP), ..Setup::default() });
        let (listener, _) = publish(&mut rig);
        if known {
            rig.send(&arp_reply());
        }
        arrives(&mut rig, listener, client(999));
        let mut waited = 0;
        while rig.conn(0).end == End::Open {
            rig.pass(secs(1));
            waited += 1;
            assert!(waited <= 200, "known: {known}");
        }
        assert_eq!((rig.conn(0).end, waited), (End::Reset, 123), "known: {known}");
    }
}

#[test]
fn without_a_guest_clients_are_reset() {
    let mut rig = Rig::new();
    let (listener, _) = publish(&mut rig);
    assert_eq!(arrives(&mut rig, listener, client(999)), []);
    assert_eq!(rig.conn(0).end, End::Reset);
}

fn arp_reply() -> Vec<u8> {
    let mut out = vec![0; ethernet::HEADER_BYTES + arp::PACKET_BYTES];
    ethernet::Header { dst: MacAddr::GATEWAY, src: GUEST_MAC, ethertype: EtherType::ARP }.emit(&mut out);
    arp::Packet {
        operation: arp::Operation::Reply,
        sender_mac: GUEST_MAC,
        sender_ip: GUEST_IP,
        target_mac: MacAddr::GATEWAY,
        target_ip: GATEWAY,
    }
    .emit(&mut out[ethernet::HEADER_BYTES..]);
    out
}

fn asks_for_the_guest(seen: &Seen) -> bool {
    matches!(seen, Seen::Arp(packet) if packet.operation == arp::Operation::Request
        && packet.target_ip == GUEST_IP && packet.sender_ip == GATEWAY)
}

#[test]
fn a_guest_whose_mac_address_is_unknown_is_asked_for_and_then_reached() {
    let mut rig = Rig::with(Setup { guest: Some(GUEST_IP), ..Setup::default() });
    let (listener, _) = publish(&mut rig);
    let seen = arrives(&mut rig, listener, client(999));
    assert!(asks_for_the_guest(&only(seen)));
    let syn = only(rig.send(&arp_reply())).tcp();
    answer(&mut rig, &syn);
}

#[test]
fn a_guest_that_missed_the_question_is_asked_again() {
    let mut rig = Rig::with(Setup { guest: Some(GUEST_IP), ..Setup::default() });
    let (listener, _) = publish(&mut rig);
    rig.port.is_up = false;
    assert_eq!(arrives(&mut rig, listener, client(999)), []);
    rig.port.is_up = true;
    let seen = rig.pass(secs(20));
    assert!(!seen.is_empty() && seen.iter().all(asks_for_the_guest), "{seen:?}");
    let syn = only(rig.send(&arp_reply())).tcp();
    answer(&mut rig, &syn);
}

#[test]
fn clients_of_a_guest_that_is_not_there_leave_nothing_behind() {
    let mut rig = Rig::with(Setup { guest: Some(GUEST_IP), ..Setup::default() });
    let (listener, _) = publish(&mut rig);
    for n in 0..100 {
        arrives(&mut rig, listener, client(1000 + n));
        rig.pass(secs(30));
    }
    rig.pass(secs(300));
    assert!(rig.engine.nat().is_empty());
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn more_clients_than_one_turn_are_all_taken() {
    let (mut rig, listener) = rig();
    let count = 2 * limits::ACCEPT_BURST + 5;
    for n in 0..count {
        rig.world().backlogs[0].push_back(client(n as u16 + 1));
    }
    let seen = rig.ready(listener, READABLE);
    assert_eq!(seen.len(), count);
    assert!(!rig.engine.nat().has_more());
}

#[test]
fn a_client_that_cannot_be_taken_waits_without_a_spin_and_is_taken_later() {
    for code in [libc::ENOBUFS, libc::ENOMEM, libc::EMFILE, libc::ENFILE] {
        let (mut rig, listener) = rig();
        rig.world().accept_error = Some(code);
        // The flush behind it fails the test if the engine goes on without pause.
        assert_eq!(arrives(&mut rig, listener, client(999)), [], "errno {code}");
        assert_eq!(rig.pass(secs(60)), [], "errno {code}");
        assert!(rig.world().accepts < 1000, "errno {code}: tried {} times a minute", rig.world().accepts);
        rig.world().accept_error = None;
        // Nobody else comes: the socket tells of one client once.
        let syn = only(rig.pass(secs(1))).tcp();
        answer(&mut rig, &syn);
        assert!(rig.wakeups(secs(3600)) <= 2, "the pause is over");
    }
}

#[test]
fn a_client_no_descriptor_comes_free_for_costs_one_flow_a_try_at_most() {
    // Of the process's own one is given up; those of the host others would take, so none is.
    for (code, cost) in [(libc::EMFILE, 1), (libc::ENFILE, 0)] {
        let (mut rig, listener) = rig();
        for n in 0..50 {
            crate::rig::connected(&mut rig, Peer::new(guest(4000 + n), crate::frames::world(80)));
        }
        rig.world().accept_error = Some(code);
        assert_eq!(arrives(&mut rig, listener, client(999)).len(), cost);
        assert_eq!(rig.engine.nat().len(), 50 - cost);
    }
}

#[test]
fn datagrams_of_two_clients_are_answered_each_to_its_own_however_they_alternate() {
    let (mut rig, _) = rig();
    let loopback = |n: u8| SocketAddr::from(([127, 0, 0, n], 999));
    // Two seen as themselves and two hidden behind the gateway, all from one port.
    let clients = [client(999), SocketAddr::from(([198, 51, 100, 10], 999)), loopback(1), loopback(2)];
    let mut first = Vec::new();
    for round in 0..5 {
        let mut seen = Vec::new();
        for from in clients {
            let Seen::Udp { from, .. } = only(rig.datagram_arrives(0, b"ask", from)) else {
                panic!("not UDP")
            };
            seen.push(from);
        }
        if round == 0 {
            first.clone_from(&seen);
        }
        assert_eq!(seen, first, "a client keeps its address and port towards the guest");
        for (n, from) in seen.into_iter().enumerate().rev() {
            rig.send(&udp_frame(guest(53), v4(from), &[n as u8]));
            assert_eq!(rig.sock(0).sent.pop(), Some((vec![n as u8], clients[n])));
        }
        rig.pass(secs(20));
    }
}

#[test]
fn either_end_of_a_published_connection_may_stop_sending_and_go_on_reading() {
    for guest_first in [true, false] {
        let (mut rig, listener) = rig();
        let syn = only(arrives(&mut rig, listener, client(999))).tcp();
        let mut peer = answer(&mut rig, &syn);
        if guest_first {
            peer.data(&mut rig, Flags::FIN, b"all");
            assert!(rig.conn(0).fin_from_guest);
            rig.pass(secs(600));
            rig.conn(0).queue.extend(b"more");
            let seen = rig.stream_ready(0, READABLE);
            assert_eq!(peer.take(seen), b"more");
            peer.acknowledge(&mut rig);
        }
        rig.conn(0).fin_from_world = true;
        let seen = rig.stream_ready(0, crate::rig::WORLD_FIN);
        assert!(only(seen.clone()).tcp().has(Flags::FIN));
        peer.take(seen);
        peer.acknowledge(&mut rig);
        if !guest_first {
            rig.pass(secs(600));
            peer.data(&mut rig, Flags::PSH, b"more");
            assert_eq!(rig.conn(0).taken, b"more");
            assert!(!rig.conn(0).fin_from_guest);
            peer.data(&mut rig, Flags::FIN, &[]);
        }
        assert_eq!(rig.conn(0).end, End::Clean);
    }
}

#[test]
fn a_client_that_left_before_the_guest_answered_ends_as_reset() {
    let (mut rig, listener) = rig();
    let syn = only(arrives(&mut rig, listener, client(999))).tcp();
    rig.conn(0).error = Some(libc::ECONNRESET);
    rig.stream_ready(0, FAILED);
    let peer = peer_of(&syn);
    let seen = rig.send(&peer.seg(Flags::SYN | Flags::ACK, &[]).frame());
    assert!(seen.last().expect("an answer").clone().tcp().has(Flags::RST));
    assert!(rig.engine.nat().is_empty());
}

#[test]
fn datagrams_to_a_published_port_reach_the_guest_and_its_answers_leave_from_there() {
    let (mut rig, _) = rig();
    let seen = rig.datagram_arrives(0, b"ask", client(999));
    let expected = Seen::Udp { from: client(999), to: guest(53).into(), payload: b"ask".to_vec() };
    assert_eq!(only(seen), expected);
    assert_eq!(rig.send(&udp_frame(guest(53), v4(client(999)), b"answer")), []);
    assert_eq!(rig.sock(0).sent, [(b"answer".to_vec(), client(999))]);
    assert_eq!(rig.world().socks.len(), 1);
}

#[test]
fn datagrams_of_the_host_itself_appear_as_the_gateways_and_answers_find_back() {
    let (mut rig, _) = rig();
    let loopback = |n: u8| SocketAddr::from(([127, 0, 0, n], 999));
    let mut from = Vec::new();
    for n in 1..=3 {
        let Seen::Udp { from: seen, .. } = only(rig.datagram_arrives(0, b"ask", loopback(n))) else {
            panic!("not UDP")
        };
        assert_eq!(seen.ip(), GATEWAY);
        from.push(seen);
    }
    assert_eq!(from[0].port(), 999);
    assert!(from[1] != from[2] && from[0] != from[1]);
    for (n, from) in from.into_iter().enumerate() {
        rig.send(&udp_frame(guest(53), v4(from), b"answer"));
        assert_eq!(rig.sock(0).sent.pop(), Some((b"answer".to_vec(), loopback(n as u8 + 1))));
    }
}

#[test]
fn a_published_socket_outlives_its_peers_and_the_guest() {
    let (mut rig, _) = rig();
    rig.datagram_arrives(0, b"ask", client(999));
    rig.pass(secs(1000));
    assert!(rig.sock(0).is_open);
    assert_eq!(rig.engine.next_deadline(), None);
    rig.engine.guest_reset();
    assert!(rig.sock(0).is_open);
    assert_eq!(rig.datagram_arrives(0, b"lost", client(999)), [], "no guest yet");
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    assert_eq!(rig.datagram_arrives(0, b"ask", client(999)).len(), 1);
}

#[test]
fn datagrams_without_a_guest_are_dropped_and_the_socket_drained() {
    let mut rig = Rig::new();
    publish(&mut rig);
    for _ in 0..3 * crate::world::TURN {
        rig.sock(0).inbox.push_back((b"ask".to_vec(), client(999)));
    }
    let token = rig.sock(0).token;
    assert_eq!(rig.ready(token, READABLE), []);
    assert_eq!(rig.sock(0).inbox.len(), 0);
    assert_eq!(rig.dropped(DropReason::NoFlow), 3 * crate::world::TURN as u64);
}

#[test]
fn datagrams_for_a_guest_of_unknown_mac_address_make_vunet_ask() {
    let mut rig = Rig::with(Setup { guest: Some(GUEST_IP), ..Setup::default() });
    publish(&mut rig);
    assert!(asks_for_the_guest(&only(rig.datagram_arrives(0, b"ask", client(999)))));
    rig.send(&arp_reply());
    assert_eq!(rig.datagram_arrives(0, b"ask", client(999)).len(), 1);
}

#[test]
fn a_flow_follows_the_guest_to_its_new_address() {
    let (mut rig, _) = rig();
    assert_eq!(rig.datagram_arrives(0, b"ask", client(999)).len(), 1);
    rig.engine.guest_reset();
    let moved = Ipv4Addr::new(10, 0, 2, 9);
    let message = crate::frames::echo_message(1, 1, b"hello");
    let header = crate::frames::ip(moved, GATEWAY, vunet::wire::ipv4::Protocol::ICMP, message.len());
    rig.send(&crate::frames::frame(&header, &message));
    let Seen::Udp { to, .. } = only(rig.datagram_arrives(0, b"ask", client(999))) else { panic!("not UDP") };
    assert_eq!(to, SocketAddr::new(moved.into(), 53));
}

#[test]
fn an_answer_leaves_from_the_address_its_client_sent_to() {
    let (mut rig, _) = rig();
    let addresses = [[203, 0, 113, 1], [203, 0, 113, 2], [203, 0, 113, 1]];
    for address in addresses {
        rig.sock(0).sent_to = Some(address.into());
        assert_eq!(rig.datagram_arrives(0, b"ask", client(999)).len(), 1);
        rig.send(&udp_frame(guest(53), v4(client(999)), b"answer"));
    }
    let from: Vec<_> = rig.sock(0).sent_fields.iter().map(|fields| fields.from).collect();
    assert_eq!(from, addresses.map(|address| Some(address.into())));
    // The guest's own sockets have no such address.
    rig.send(&udp_frame(guest(4000), v4(client(999)), b"ask"));
    assert_eq!(rig.sock(1).sent_fields[0].from, None);
}

/// A second guest beside the usual one.
const SECOND_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 9);

/// A rig where both guests are known, and guest 1 publishes TCP port 22 and UDP port 53, guest 2 TCP port 80;
/// the listeners' tokens.
fn two_guests() -> (Rig, [Token; 2]) {
    let mut rig = Rig::new();
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    let message = crate::frames::echo_message(1, 1, b"hello");
    let header = crate::frames::ip(SECOND_IP, GATEWAY, vunet::wire::ipv4::Protocol::ICMP, message.len());
    rig.send(&crate::frames::frame(&header, &message));
    let listeners = [(1, 22, 8022), (2, 80, 8080)].map(|(number, guest_port, host_port)| {
        let token = rig.engine.nat().next_listener_token();
        let listener = rig.engine.nat().net().listener();
        rig.engine.publish_tcp(Owner::OneOf(number), port(Protocol::Tcp, host_port, guest_port), listener);
        token
    });
    let udp = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(udp);
    rig.engine.publish_udp(Owner::OneOf(1), port(Protocol::Udp, 8053, 53), socket);
    (rig, listeners)
}

fn port(protocol: Protocol, host_port: u16, guest_port: u16) -> Publish {
    Publish::new(protocol, SocketAddr::from(([0, 0, 0, 0], host_port)), guest_port)
}

fn arrives_at(rig: &mut Rig, at: usize, listener: Token) -> Vec<Seen> {
    rig.world().backlogs[at].push_back(client(999));
    rig.ready(listener, READABLE)
}

#[test]
fn each_of_several_guests_has_its_own_ports_once_it_has_an_address() {
    let (mut rig, [one, two]) = two_guests();
    // The engine has seen both, yet nobody said whose the ports are.
    assert_eq!(arrives_at(&mut rig, 0, one), []);
    assert_eq!(rig.datagram_arrives(0, b"ask", client(999)), []);
    rig.engine.set_guest(1, Some(GUEST_IP));
    rig.engine.set_guest(2, Some(SECOND_IP));
    let syn = only(arrives_at(&mut rig, 0, one)).tcp();
    assert_eq!((syn.from, syn.to), (client(999), SocketAddr::from(guest(22))));
    let syn = only(arrives_at(&mut rig, 1, two)).tcp();
    assert_eq!(syn.to, SocketAddr::from((SECOND_IP, 80)));
    let Seen::Udp { to, .. } = only(rig.datagram_arrives(0, b"ask", client(999))) else { panic!("not UDP") };
    assert_eq!(to, SocketAddr::from(guest(53)));
    rig.send(&udp_frame(guest(53), v4(client(999)), b"answer"));
    assert_eq!(rig.sock(0).sent, [(b"answer".to_vec(), client(999))]);
    // An address that is no guest's is none.
    rig.engine.set_guest(2, Some(GATEWAY));
    assert_eq!(arrives_at(&mut rig, 1, two), []);
    rig.engine.set_guest(2, None);
    assert_eq!(arrives_at(&mut rig, 1, two), []);
}

#[test]
fn what_a_guest_sends_from_its_published_port_leaves_there_and_another_guests_does_not() {
    let (mut rig, _) = two_guests();
    rig.engine.set_guest(1, Some(GUEST_IP));
    rig.engine.set_guest(2, Some(SECOND_IP));
    rig.send(&udp_frame(guest(53), v4(client(7)), b"mine"));
    assert_eq!(rig.sock(0).sent, [(b"mine".to_vec(), client(7))]);
    rig.send(&udp_frame(std::net::SocketAddrV4::new(SECOND_IP, 53), v4(client(7)), b"other"));
    assert_eq!(rig.sock(0).sent.len(), 1);
    assert_eq!(rig.sock(1).sent, [(b"other".to_vec(), client(7))]);
}

#[test]
fn ports_of_a_guest_that_is_gone_are_closed_with_its_flows_and_the_others_stay() {
    let (mut rig, [one, two]) = two_guests();
    rig.engine.set_guest(1, Some(GUEST_IP));
    rig.engine.set_guest(2, Some(SECOND_IP));
    let syn = only(arrives_at(&mut rig, 0, one)).tcp();
    answer(&mut rig, &syn);
    let second = only(arrives_at(&mut rig, 1, two)).tcp();
    rig.datagram_arrives(0, b"ask", client(999));
    rig.engine.guest_gone(1);
    assert_eq!(rig.conn(0).end, End::Reset, "the client is told");
    assert!(!rig.world().socks[0].is_open, "the port is free");
    assert_eq!(rig.ready(one, READABLE), [], "news of a listener that is gone");
    assert_eq!(rig.conn(1).end, End::Open);
    assert_eq!(second.to, SocketAddr::from((SECOND_IP, 80)));
    assert_eq!(only(arrives_at(&mut rig, 1, two)).tcp().to.port(), 80);
    rig.engine.guest_gone(2);
    rig.engine.guest_gone(3);
    rig.assert_empty();
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn a_published_port_of_one_guest_is_in_reach_of_another_by_way_of_the_host() {
    let (mut rig, _) = two_guests();
    let host = Ipv4Addr::new(203, 0, 113, 1);
    rig.world().own.insert(host.into());
    rig.engine.set_guest(2, Some(SECOND_IP));
    let mut peer = Peer::new(guest(4000), std::net::SocketAddrV4::new(host, 8080));
    peer.syn(&mut rig);
    assert_eq!(rig.conn(0).peer, SocketAddr::from((host, 8080)));
    rig.engine.guest_gone(2);
    let mut peer = Peer::new(guest(4001), std::net::SocketAddrV4::new(host, 8080));
    assert!(!peer.syn(&mut rig).is_empty(), "it is told");
    assert_eq!(rig.world().conns.len(), 1, "no port of the host's own but a published one");
}

#[test]
fn a_port_that_is_published_no_more_takes_no_clients_and_keeps_those_it_has() {
    let (mut rig, listener) = rig();
    let other = rig.engine.nat().next_listener_token();
    let socket = rig.engine.nat().net().listener();
    let port = rig.publish_tcp(22, socket);
    let syn = only(arrives_at(&mut rig, 1, other)).tcp();
    let mut peer = answer(&mut rig, &syn);
    assert_eq!(rig.unpublish(&port, false), (vec![], 0));
    rig.world().backlogs[1].push_back(client(7));
    assert_eq!(rig.ready(other, READABLE), [], "news of a listener that is gone");
    rig.conn(0).queue.extend(b"still here");
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), b"still here");
    // The one beside it, which leads to the same port of the guest, stays, and this one comes again.
    assert_eq!(arrives(&mut rig, listener, client(8)).len(), 1);
    let again = rig.engine.nat().next_listener_token();
    let socket = rig.engine.nat().net().listener();
    rig.publish_tcp(22, socket);
    assert_eq!(arrives_at(&mut rig, 2, again).len(), 1);
}

#[test]
fn connections_of_a_removed_port_are_reset_both_ways_if_that_is_asked_for() {
    let (mut rig, listener) = rig();
    let other = rig.engine.nat().next_listener_token();
    let socket = rig.engine.nat().net().listener();
    let port = rig.publish_tcp(22, socket);
    let syn = only(arrives_at(&mut rig, 1, other)).tcp();
    let peer = answer(&mut rig, &syn);
    let spared = only(arrives(&mut rig, listener, client(8))).tcp();
    answer(&mut rig, &spared);
    crate::rig::connected(&mut rig, Peer::new(guest(22), crate::frames::world(port.host.port())));
    let (seen, ended) = rig.unpublish(&port, true);
    let reset = only(seen).tcp();
    assert!(reset.has(Flags::RST) && ended == 1, "{reset:?}");
    assert_eq!((reset.from, reset.header.seq.0), (client(999), peer.ack), "the guest is told");
    assert_eq!(rig.conn(0).end, End::Reset, "the client is told");
    assert_eq!(rig.conn(1).end, End::Open, "a client of another port");
    assert_eq!(rig.conn(2).end, End::Open, "a flow of the guest's own");
    assert_eq!(rig.unpublish(&port, true), (vec![], 0), "there is none any more");
}

#[test]
fn exchanges_of_a_removed_port_end_and_another_port_takes_its_place() {
    let mut rig = Rig::new();
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    let everywhere = |host_port| port(Protocol::Udp, host_port, 53);
    for host_port in [8053, 9053] {
        let token = rig.engine.nat().next_datagram_token();
        let socket = rig.engine.nat().net().published_udp(token);
        rig.engine.publish_udp(Owner::TheGuest, everywhere(host_port), socket);
    }
    assert_eq!(rig.datagram_arrives(0, b"ask", client(999)).len(), 1);
    assert_eq!(rig.datagram_arrives(1, b"ask", client(999)).len(), 1);
    rig.unpublish(&everywhere(8053), false);
    assert!(!rig.world().socks[0].is_open, "the port is free");
    let token = rig.sock(0).token;
    assert_eq!(rig.ready(token, READABLE), [], "news of a socket that is gone");
    // What the guest sends from there leaves from the other.
    rig.send(&udp_frame(guest(53), v4(client(5)), b"mine"));
    assert_eq!(rig.sock(1).sent.last(), Some(&(b"mine".to_vec(), client(5))));
    rig.unpublish(&everywhere(9053), false);
    rig.send(&udp_frame(guest(53), v4(client(5)), b"mine"));
    assert_eq!(rig.sock(2).sent, [(b"mine".to_vec(), client(5))], "a socket of its own");
    rig.pass(secs(400));
    rig.assert_empty();
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn ports_come_and_go_ten_thousand_times_and_leave_nothing() {
    let (mut rig, _) = rig();
    let before = rig.engine.nat().len();
    for n in 0..5000u32 {
        let socket = rig.engine.nat().net().listener();
        let tcp = rig.publish_tcp(22, socket);
        let token = rig.engine.nat().next_datagram_token();
        let socket = rig.engine.nat().net().published_udp(token);
        let udp = port(Protocol::Udp, 8053, 54);
        rig.engine.publish_udp(Owner::TheGuest, udp, socket);
        if n % 2 == 0 {
            let at = rig.world().socks.len() - 1;
            rig.datagram_arrives(at, b"ask", client(n as u16));
        }
        rig.unpublish(&tcp, n % 3 == 0);
        rig.unpublish(&udp, n % 3 == 0);
    }
    assert_eq!(rig.engine.nat().len(), before);
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn a_removed_port_is_in_reach_of_the_guest_by_way_of_the_host_no_more() {
    let (mut rig, _) = rig();
    let host = Ipv4Addr::new(203, 0, 113, 1);
    rig.world().own.insert(host.into());
    let reachable = |rig: &mut Rig, from: u16| {
        let before = rig.world().conns.len();
        Peer::new(guest(from), std::net::SocketAddrV4::new(host, 8080)).syn(rig);
        rig.world().conns.len() > before
    };
    let everywhere = port(Protocol::Tcp, 8080, 80);
    assert!(!reachable(&mut rig, 4000));
    // As at a worker that has not its socket.
    rig.engine.note_published(everywhere);
    assert!(reachable(&mut rig, 4001));
    rig.unpublish(&everywhere, false);
    assert!(!reachable(&mut rig, 4002));
}
