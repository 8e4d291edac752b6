//! Where the guest may go, and what it hears where it may not.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::engine::counters::DropReason;
use vunet::wire::ethernet;
use vunet::wire::tcp::Flags;

use crate::frames::{GATEWAY, GUEST_IP, WORLD, echo_frame, gateway, guest, udp_frame, world};
use crate::rig::{Peer, Rig, Setup, connected, only};

/// Code of "communication administratively prohibited".
const PROHIBITED: u8 = 13;

fn is_group(addr: Ipv4Addr) -> bool {
    addr.is_multicast() || addr.is_broadcast()
}

/// Forbidden destinations: the edges of each range. Host addresses are added by the tests.
fn forbidden() -> Vec<Ipv4Addr> {
    [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 255, 255, 255],
        [127, 0, 0, 0],
        [127, 0, 0, 1],
        [127, 0, 0, 53],
        [127, 255, 255, 255],
        [224, 0, 0, 0],
        [224, 0, 0, 251],
        [239, 255, 255, 255],
        [240, 0, 0, 0],
        [255, 255, 255, 254],
        [255, 255, 255, 255],
        [10, 0, 2, 0],
        [10, 0, 2, 2],
        [10, 0, 2, 3],
        [10, 0, 2, 254],
        [10, 0, 2, 255],
    ]
    .into_iter()
    .map(Ipv4Addr::from)
    .collect()
}

/// Whether an answer is due: RFC 1122, 3.2.2 forbids errors about broadcasts and multicasts.
fn is_answered(addr: Ipv4Addr) -> bool {
    !is_group(addr) && addr != Ipv4Addr::new(10, 0, 2, 255)
}

fn refuses_everything_to(rig: &mut Rig, addr: Ipv4Addr) {
    let to = SocketAddrV4::new(addr, 80);
    let seen = [
        rig.send(&udp_frame(guest(4000), to, b"x")),
        rig.send(&echo_frame(addr, 1, 1, b"x")),
        Peer::new(guest(4000), to).syn(rig),
    ];
    for seen in seen {
        match is_answered(addr) {
            true => {
                let (code, quoted) = only(seen).unreachable();
                assert_eq!(code, PROHIBITED, "{addr}");
                assert_eq!(quoted[12..16], GUEST_IP.octets());
                assert_eq!(quoted[16..20], addr.octets());
            }
            false => assert_eq!(seen, [], "{addr}"),
        }
    }
    rig.now = rig.now + crate::rig::secs(1);
    assert!(!rig.world().touched(), "{addr} was reached");
    assert_eq!(rig.world().open(), 0);
}

#[test]
fn forbidden_destinations_are_answered_and_never_reached() {
    let mut rig = Rig::new();
    for addr in forbidden() {
        refuses_everything_to(&mut rig, addr);
    }
    assert_eq!(rig.dropped(DropReason::Refused), 3 * forbidden().len() as u64);
}

#[test]
fn forbidden_destinations_stay_so_where_the_hosts_loopback_is_allowed() {
    let mut rig = Rig::with(Setup::with_host_loopback());
    for addr in forbidden() {
        refuses_everything_to(&mut rig, addr);
    }
}

#[test]
fn forbidden_destinations_stay_so_in_an_isolated_network() {
    let mut rig = Rig::with(Setup::isolated());
    for addr in forbidden() {
        refuses_everything_to(&mut rig, addr);
    }
}

#[test]
fn the_hosts_own_addresses_are_prohibited() {
    let mut rig = Rig::new();
    let own = Ipv4Addr::new(192, 168, 1, 5);
    rig.world().own.insert(own.into());
    refuses_everything_to(&mut rig, own);
}

#[test]
fn the_hosts_own_addresses_are_reached_where_its_loopback_is_allowed() {
    let mut rig = Rig::with(Setup::with_host_loopback());
    rig.world().own.insert(WORLD.into());
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.send(&udp_frame(guest(4000), world(80), b"x"));
    assert_eq!(rig.sock(0).sent.len(), 1);
}

#[test]
fn the_gateway_has_no_services_but_its_own() {
    let mut rig = Rig::new();
    let reset = only(Peer::new(guest(4000), gateway(22)).syn(&mut rig)).tcp();
    assert!(reset.has(Flags::RST | Flags::ACK));
    assert_eq!((reset.header.seq.0, reset.header.ack.0), (0, 1001));
    let sent = udp_frame(guest(4000), gateway(161), b"x");
    let (code, quoted) = only(rig.send(&sent)).unreachable();
    assert_eq!((code, &quoted[..]), (3, &sent[ethernet::HEADER_BYTES..]), "port unreachable");
    assert!(!rig.world().touched());
}

#[test]
fn the_gateway_is_the_hosts_loopback_where_allowed() {
    let mut rig = Rig::with(Setup::with_host_loopback());
    let peer = connected(&mut rig, Peer::new(guest(4000), gateway(22)));
    assert_eq!(rig.conn(0).peer, SocketAddr::from(([127, 0, 0, 1], 22)));
    assert_eq!(peer.to, SocketAddrV4::new(GATEWAY, 22));
    assert_eq!(rig.send(&udp_frame(guest(4000), gateway(161), b"ask")), []);
    let loopback = SocketAddr::from(([127, 0, 0, 1], 161));
    assert_eq!(rig.sock(0).sent, [(b"ask".to_vec(), loopback)]);
    let seen = rig.datagram_arrives(0, b"answer", loopback);
    let from = SocketAddr::from(gateway(161));
    let payload = b"answer".to_vec();
    assert_eq!(only(seen), crate::frames::Seen::Udp { from, to: guest(4000).into(), payload });
}

#[test]
fn an_isolated_network_has_no_world() {
    let mut rig = Rig::with(Setup::isolated());
    let seen = [
        rig.send(&udp_frame(guest(4000), world(80), b"x")),
        rig.send(&echo_frame(WORLD, 1, 1, b"x")),
        Peer::new(guest(4000), world(80)).syn(&mut rig),
    ];
    for seen in seen {
        assert_eq!(only(seen).unreachable().0, 0, "net unreachable");
    }
    let reset = only(Peer::new(guest(4000), gateway(22)).syn(&mut rig)).tcp();
    assert!(reset.has(Flags::RST));
    assert!(!rig.world().touched());
}
