//! How UDP is translated, by configuration: mapping, filtering, ports, hairpins (RFC 4787).

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::config::{Mode, NatConfig, Protocol, Publish, UdpConfig, UdpFiltering, UdpMapping};
use vunet::engine::core::Owner;
use vunet::engine::counters::DropReason;
use vunet::limits;

use crate::frames::{GATEWAY, Seen, WORLD, echo_frame, guest, udp_frame, world};
use crate::guest_changes::lease;
use crate::handover::exchange;
use crate::rig::{Peer, READABLE, Rig, Setup, only, secs};

const OWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

fn other(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 9), port)
}

fn setup(mapping: UdpMapping, filtering: UdpFiltering) -> Setup {
    let udp = UdpConfig { mapping, filtering };
    Setup { mode: Mode::Nat(NatConfig { udp, ..NatConfig::default() }), ..Setup::default() }
}

fn filtering(filtering: UdpFiltering) -> Rig {
    let mut rig = Rig::with(setup(UdpMapping::EndpointIndependent, filtering));
    udp(&mut rig, world(9), b"ask");
    rig
}

fn udp(rig: &mut Rig, to: SocketAddrV4, payload: &[u8]) {
    assert_eq!(rig.send(&udp_frame(guest(4000), to, payload)), []);
}

fn arrives(rig: &mut Rig, n: usize, from: SocketAddrV4) -> usize {
    rig.datagram_arrives(n, b"hello", from.into()).len()
}

#[test]
fn endpoint_dependent_mapping_gives_each_remote_end_a_port_of_its_own() {
    let rules = setup(UdpMapping::AddressAndPortDependent, UdpFiltering::AddressAndPortDependent);
    let mut rig = Rig::with(rules);
    for to in [world(53), world(54), other(53), world(53)] {
        udp(&mut rig, to, b"ask");
    }
    let sent: Vec<Vec<SocketAddr>> =
        rig.world().socks.iter().map(|sock| sock.sent.iter().map(|(_, to)| *to).collect()).collect();
    let one = |to: SocketAddrV4| vec![SocketAddr::from(to)];
    assert_eq!(sent, [[one(world(53)), one(world(53))].concat(), one(world(54)), one(other(53))]);
    assert_eq!((arrives(&mut rig, 0, world(53)), arrives(&mut rig, 0, world(54))), (1, 0));
    assert_eq!((arrives(&mut rig, 1, world(54)), arrives(&mut rig, 2, other(53))), (1, 1));
    rig.pass(secs(400));
    rig.assert_empty();
}

#[test]
fn echoes_share_a_socket_whatever_the_mapping_of_udp() {
    let rules = setup(UdpMapping::AddressAndPortDependent, UdpFiltering::EndpointIndependent);
    let mut rig = Rig::with(rules);
    rig.send(&echo_frame(WORLD, 7, 1, b"x"));
    rig.send(&echo_frame(*other(0).ip(), 7, 2, b"x"));
    assert_eq!(rig.world().socks.len(), 1);
    let reply = [0, 0, 0, 0, 0, 9, 0, 1];
    assert_eq!(rig.datagram_arrives(0, &reply, SocketAddr::new(WORLD.into(), 0)).len(), 1);
    let stranger = SocketAddr::from(([198, 51, 100, 77], 0));
    assert_eq!(rig.datagram_arrives(0, &reply, stranger), [], "nor does filtering of UDP let one in");
}

#[test]
fn each_filtering_lets_in_whom_it_says() {
    // Whom the guest asked, another port of it, another host.
    for (rule, lets_in) in [
        (UdpFiltering::AddressAndPortDependent, [1, 0, 0]),
        (UdpFiltering::AddressDependent, [1, 1, 0]),
        (UdpFiltering::EndpointIndependent, [1, 1, 1]),
    ] {
        let mut rig = filtering(rule);
        let seen = [world(9), world(10), other(9)].map(|from| arrives(&mut rig, 0, from));
        assert_eq!(seen, lets_in, "{rule:?}");
        assert_eq!(rig.dropped(DropReason::Filtered), 3 - seen.iter().sum::<usize>() as u64);
    }
}

#[test]
fn who_was_let_in_is_seen_as_itself_and_answered_through_the_same_port() {
    for mapping in [UdpMapping::EndpointIndependent, UdpMapping::AddressAndPortDependent] {
        let mut rig = Rig::with(setup(mapping, UdpFiltering::EndpointIndependent));
        udp(&mut rig, world(9), b"ask");
        let seen = rig.datagram_arrives(0, b"hello", other(77).into());
        let expected =
            Seen::Udp { from: other(77).into(), to: guest(4000).into(), payload: b"hello".to_vec() };
        assert_eq!(only(seen), expected);
        udp(&mut rig, other(77), b"answer");
        assert_eq!(rig.sock(0).sent.last(), Some(&(b"answer".to_vec(), other(77).into())));
        assert_eq!(rig.world().socks.len(), 1);
    }
}

#[test]
fn with_several_workers_the_answer_to_who_was_let_in_finds_the_port() {
    for mapping in [UdpMapping::EndpointIndependent, UdpMapping::AddressAndPortDependent] {
        let mut rigs = Rig::workers_with(2, &setup(mapping, UdpFiltering::EndpointIndependent));
        udp(&mut rigs[0], world(9), b"ask");
        assert_eq!(arrives(&mut rigs[0], 0, other(77)), 1);
        udp(&mut rigs[1], other(77), b"answer");
        exchange(&mut rigs);
        assert_eq!(rigs[0].sock(0).sent.last(), Some(&(b"answer".to_vec(), other(77).into())), "{mapping:?}");
        assert_eq!(rigs[0].world().socks.len(), 1);
        // A socket on its way takes those it let in along.
        for _ in 0..2 * limits::SENT_ON_FRAMES {
            udp(&mut rigs[1], world(9), b"more");
            exchange(&mut rigs);
        }
        assert_eq!((rigs[0].engine.nat().len(), rigs[1].engine.nat().len()), (0, 1));
        udp(&mut rigs[0], other(77), b"again");
        exchange(&mut rigs);
        assert_eq!(rigs[0].sock(0).sent.last(), Some(&(b"again".to_vec(), other(77).into())), "{mapping:?}");
        rigs[1].pass(secs(400));
        rigs[1].assert_empty();
        udp(&mut rigs[0], other(77), b"anew");
        assert!(rigs[0].engine.next_letter().is_none(), "nobody has it any more");
        assert_eq!(rigs[0].world().socks.len(), 2);
    }
}

#[test]
fn an_address_is_let_in_as_long_as_the_guest_talks_to_it() {
    let mut rig = filtering(UdpFiltering::AddressDependent);
    udp(&mut rig, other(9), b"ask");
    for _ in 0..10 {
        rig.pass(secs(60));
        udp(&mut rig, other(9), b"ask");
        // It sends all the time, which alone keeps nothing open.
        arrives(&mut rig, 0, world(10));
    }
    assert_eq!(arrives(&mut rig, 0, world(11)), 0, "the guest last spoke to it ten minutes ago");
    assert_eq!(arrives(&mut rig, 0, other(11)), 1);
    udp(&mut rig, world(10), b"ask");
    assert_eq!(arrives(&mut rig, 0, world(11)), 1);
}

#[test]
fn strangers_keep_no_port_open() {
    let mut rig = filtering(UdpFiltering::EndpointIndependent);
    for _ in 0..30 {
        rig.pass(secs(10));
        arrives(&mut rig, 0, other(77));
    }
    assert!(!rig.sock(0).is_open);
    rig.assert_empty();
}

#[test]
fn ever_new_strangers_keep_no_port_open_either() {
    let mut rig = filtering(UdpFiltering::EndpointIndependent);
    for n in 0..12 {
        assert_eq!(arrives(&mut rig, 0, other(1000 + n)), 1, "at {n}0 s");
        rig.pass(secs(10));
    }
    assert!(rig.sock(0).is_open, "who came in may still be answered");
    for n in 12..24 {
        assert_eq!(arrives(&mut rig, 0, other(1000 + n)), 0, "nobody is left whom the guest spoke to");
        rig.pass(secs(10));
    }
    assert!(!rig.sock(0).is_open);
    rig.assert_empty();
}

#[test]
fn a_stranger_the_guest_answers_keeps_the_port_open_for_others() {
    let mut rig = filtering(UdpFiltering::EndpointIndependent);
    arrives(&mut rig, 0, other(1));
    udp(&mut rig, other(1), b"answer");
    rig.pass(secs(200));
    assert_eq!(arrives(&mut rig, 0, other(2)), 1);
    rig.pass(secs(110));
    assert_eq!(arrives(&mut rig, 0, other(3)), 0, "that was five minutes ago");
    rig.pass(secs(400));
    rig.assert_empty();
}

#[test]
fn a_flood_of_strangers_costs_no_exchange_of_the_guests_own() {
    // With this mapping who is forgotten shows: an answer to it opens a port of its own.
    let mut rig = Rig::with(setup(UdpMapping::AddressAndPortDependent, UdpFiltering::EndpointIndependent));
    udp(&mut rig, world(9), b"ask");
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.publish_udp(53, socket);
    let client = |n: usize| {
        SocketAddrV4::new(Ipv4Addr::from_bits(0xc612_0000 + (n as u32 >> 8)), 1000 + (n as u16 & 255))
    };
    let most = limits::DATAGRAM_STRANGERS_MAX;
    for n in 0..most {
        assert_eq!(arrives(&mut rig, n % 2, client(n)), 1);
    }
    // At the bound all are known: the guest's answer to the first leaves from where it came in.
    rig.send(&udp_frame(guest(4000), client(0), b"answer"));
    assert_eq!(rig.sock(0).sent.pop(), Some((b"answer".to_vec(), client(0).into())));
    // One answered leaves room for one; with one past that the longest idle is forgotten.
    arrives(&mut rig, 1, client(most));
    arrives(&mut rig, 1, client(most + 1));
    let before = rig.world().socks.len();
    rig.send(&udp_frame(guest(53), client(1), b"answer"));
    assert_eq!(rig.world().socks.len(), before + 1, "it is nobody's client any more");
    rig.send(&udp_frame(guest(53), client(3), b"answer"));
    assert_eq!(rig.world().socks.len(), before + 1, "the next one still is");
    for n in 0..2 * most {
        arrives(&mut rig, 1, client(2 * most + n));
    }
    assert!(rig.sock(0).is_open);
    assert_eq!(arrives(&mut rig, 0, world(9)), 1);
    udp(&mut rig, world(9), b"ask");
    assert_eq!(rig.sock(0).sent.len(), 2);
}

#[test]
fn the_guests_own_port_is_asked_for_unless_it_is_a_privileged_one() {
    for (own, wished) in [(1, 0), (123, 0), (1023, 0), (1024, 1024), (5060, 5060), (65_535, 65_535)] {
        let mut rig = Rig::new();
        rig.send(&udp_frame(guest(own), world(9), b"ask"));
        assert_eq!(rig.sock(0).wished_port, wished);
    }
}

#[test]
fn a_burst_the_socket_refuses_loses_datagrams_and_not_the_exchange() {
    let mut rig = filtering(UdpFiltering::default());
    rig.sock(0).send_error = Some(libc::EAGAIN);
    for _ in 0..10_000 {
        assert_eq!(rig.send(&udp_frame(guest(4000), world(9), b"burst")), []);
    }
    assert_eq!(rig.dropped(DropReason::SocketRefused), 10_000);
    rig.sock(0).send_error = None;
    udp(&mut rig, world(9), b"after");
    assert_eq!(rig.sock(0).sent.last(), Some(&(b"after".to_vec(), world(9).into())));
    assert_eq!(arrives(&mut rig, 0, world(9)), 1);
}

/// A rig of a host with the address [`OWN`] that publishes TCP and UDP port 5000 at `bound`; UDP leads to
/// the guest's port 53, socket 0.
fn publishing(bound: [u8; 4]) -> Rig {
    let mut rig = publishing_for_nobody(bound);
    rig.send(&echo_frame(GATEWAY, 1, 1, b"hello"));
    rig
}

/// The same before its guest is known.
fn publishing_for_nobody(bound: [u8; 4]) -> Rig {
    let host = SocketAddr::from((bound, 5000));
    let publish = [Protocol::Tcp, Protocol::Udp].map(|protocol| Publish::new(protocol, host, 53));
    let nat = NatConfig { publish: publish.into(), ..NatConfig::default() };
    let mut rig = Rig::with(Setup { mode: Mode::Nat(nat), ..Setup::default() });
    rig.world().own.insert(IpAddr::V4(OWN));
    let token = rig.engine.nat().next_datagram_token();
    let socket = rig.engine.nat().net().published_udp(token);
    rig.engine.publish_udp(Owner::TheGuest, Publish::new(Protocol::Udp, host, 53), socket);
    rig
}

#[test]
fn a_published_port_is_reached_from_inside_under_an_outside_address_both_ways() {
    let mut rig = publishing([0, 0, 0, 0]);
    let published = SocketAddrV4::new(OWN, 5000);
    assert_eq!(rig.send(&udp_frame(guest(4000), published, b"ask")), []);
    assert_eq!(rig.sock(1).sent, [(b"ask".to_vec(), published.into())]);
    // The host's kernel carries it from one socket to the other.
    let outside = SocketAddr::new(OWN.into(), 40_000);
    let seen = rig.datagram_arrives(0, b"ask", outside);
    assert_eq!(only(seen), Seen::Udp { from: outside, to: guest(53).into(), payload: b"ask".to_vec() });
    let SocketAddr::V4(back) = outside else { panic!("not IPv4") };
    assert_eq!(rig.send(&udp_frame(guest(53), back, b"answer")), []);
    assert_eq!(rig.sock(0).sent, [(b"answer".to_vec(), outside)]);
    let seen = rig.datagram_arrives(1, b"answer", published.into());
    let expected = Seen::Udp { from: published.into(), to: guest(4000).into(), payload: b"answer".to_vec() };
    assert_eq!(only(seen), expected);
}

#[test]
fn only_published_ends_of_the_host_are_reached_from_inside() {
    for (bound, reachable) in [([0, 0, 0, 0], true), (OWN.octets(), true), ([203, 0, 113, 2], false)] {
        for (port, expected) in [(5000, reachable), (5001, false), (53, false)] {
            let mut rig = publishing(bound);
            let to = SocketAddrV4::new(OWN, port);
            let refused = rig.send(&udp_frame(guest(4000), to, b"ask"));
            assert_eq!(refused.is_empty(), expected, "UDP to {to}, bound to {bound:?}");
            assert_eq!(rig.world().socks.len() > 1, expected);
            let refused = Peer::new(guest(4000), to).syn(&mut rig);
            assert_eq!(refused.is_empty(), expected, "TCP to {to}, bound to {bound:?}");
            assert_eq!(rig.world().conns.len(), usize::from(expected));
        }
    }
    let mut rig = publishing([0, 0, 0, 0]);
    assert_eq!(only(rig.send(&echo_frame(OWN, 1, 1, b"x"))).unreachable().0, 13);
    let loopback = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 5000);
    assert_eq!(only(rig.send(&udp_frame(guest(4000), loopback, b"x"))).unreachable().0, 13);
}

#[test]
fn multicasts_and_broadcasts_are_refused_counted_and_not_answered() {
    let mut rig = Rig::new();
    let groups = [[224, 0, 0, 251], [239, 255, 255, 250], [255, 255, 255, 255], [10, 0, 2, 255]];
    for (n, group) in groups.into_iter().enumerate() {
        for port in [5353, 1900, 9] {
            let to = SocketAddrV4::new(group.into(), port);
            assert_eq!(rig.send(&udp_frame(guest(4000), to, b"anybody?")), []);
        }
        assert_eq!(rig.dropped(DropReason::Refused), 3 * (n as u64 + 1));
    }
    assert!(!rig.world().touched());
}

#[test]
fn a_reading_socket_survives_the_strangers_it_lets_in() {
    // The stranger forgotten for a new one is the last remote end of another socket, which closes.
    let mut rig = Rig::with(setup(UdpMapping::AddressAndPortDependent, UdpFiltering::EndpointIndependent));
    udp(&mut rig, world(9), b"ask");
    arrives(&mut rig, 0, other(1));
    rig.pass(secs(115));
    arrives(&mut rig, 0, other(2));
    rig.pass(secs(10));
    assert!(rig.sock(0).is_open, "the second stranger is left");
    udp(&mut rig, world(10), b"ask");
    for n in 0..limits::DATAGRAM_STRANGERS_MAX {
        let from = SocketAddr::from((Ipv4Addr::from_bits(0xc612_0000 + n as u32), 7));
        rig.sock(1).inbox.push_back((b"x".to_vec(), from));
    }
    let token = rig.sock(1).token;
    rig.ready(token, READABLE);
    assert!(!rig.sock(0).is_open && rig.sock(1).is_open);
    assert_eq!(arrives(&mut rig, 1, world(10)), 1);
}

#[test]
fn a_client_is_known_though_the_guest_has_another_address_since() {
    let mut rig = publishing_for_nobody([0, 0, 0, 0]);
    let old = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 77), 53);
    rig.send(&udp_frame(old, other(9), b"from its old address"));
    lease(&mut rig);
    for _ in 0..4 {
        rig.pass(secs(100));
        rig.send(&udp_frame(guest(53), other(9), b"from its new one"));
    }
    // What was known under the old address is forgotten by now, and only that.
    rig.sock(0).sent_to = Some(OWN.into());
    assert_eq!(arrives(&mut rig, 0, other(9)), 1);
    rig.send(&udp_frame(guest(53), other(9), b"answer"));
    assert_eq!(rig.sock(0).sent.len(), 6, "all from the published port");
    assert_eq!(rig.sock(0).sent_fields.last().map(|fields| fields.from), Some(Some(OWN.into())));
}

#[test]
fn what_the_guest_sends_from_a_published_port_leaves_from_there() {
    let mut rig = publishing([0, 0, 0, 0]);
    assert_eq!(rig.send(&udp_frame(guest(53), other(9), b"ask")), []);
    assert_eq!(rig.sock(0).sent, [(b"ask".to_vec(), other(9).into())]);
    assert_eq!(rig.world().socks.len(), 1);
    assert_eq!(arrives(&mut rig, 0, other(9)), 1);
    // Another guest address with the same port is not published.
    let neighbour = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 77), 53);
    rig.send(&udp_frame(neighbour, other(9), b"ask"));
    assert_eq!(rig.world().socks.len(), 2);
    rig.pass(secs(400));
    assert!(rig.sock(0).is_open && !rig.sock(1).is_open);
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn what_the_guest_sends_from_a_published_port_leaves_from_there_at_any_worker() {
    let host = SocketAddr::from(([0, 0, 0, 0], 5000));
    let publish = vec![Publish::new(Protocol::Udp, host, 53)];
    let nat = NatConfig { publish, ..NatConfig::default() };
    let mut rigs = Rig::workers_with(3, &Setup { mode: Mode::Nat(nat), ..Setup::default() });
    let token = rigs[0].engine.nat().next_datagram_token();
    let socket = rigs[0].engine.nat().net().published_udp(token);
    rigs[0].engine.publish_udp(Owner::TheGuest, Publish::new(Protocol::Udp, host, 53), socket);
    for n in 0..3 * limits::SENT_ON_FRAMES {
        rigs[2].send(&udp_frame(guest(53), other(9), &[n as u8]));
        exchange(&mut rigs);
    }
    let sent: Vec<u8> = rigs[0].sock(0).sent.iter().map(|(bytes, _)| bytes[0]).collect();
    assert_eq!(sent, (0..3 * limits::SENT_ON_FRAMES as u8).collect::<Vec<u8>>());
    assert_eq!(rigs[0].world().socks.len(), 1);
    assert_eq!(arrives(&mut rigs[0], 0, other(9)), 1);
}

#[test]
fn a_port_published_on_one_address_is_not_what_the_guest_sends_from() {
    for bound in [[127, 0, 0, 1], OWN.octets()] {
        let mut rig = publishing(bound);
        rig.send(&udp_frame(guest(53), other(9), b"ask"));
        assert_eq!(rig.sock(0).sent, []);
        assert_eq!(rig.sock(1).sent.len(), 1, "its own socket can go anywhere");
    }
}
