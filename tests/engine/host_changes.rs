//! The host's network becomes another one while flows live.

use std::net::IpAddr;

use vunet::wire::tcp::Flags;

use crate::frames::{gateway, guest, udp_frame, world};
use crate::rig::{Peer, READABLE, Rig, WORLD_FIN, WRITABLE, connected, only, pattern};
use crate::world::End;

const OLD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));
const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 2));

#[test]
fn a_flow_from_an_address_that_went_is_reset_and_others_live() {
    let mut rig = Rig::new();
    let lost = connected(&mut rig, Peer::new(guest(4000), world(80)));
    let mut kept = connected(&mut rig, Peer::new(guest(4001), world(80)));
    rig.conn(0).local = Some(OLD);
    rig.conn(1).local = Some(OTHER);
    rig.world().own.extend([OLD, OTHER]);
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    assert_eq!(rig.flush(), [], "both are the host's again");
    rig.world().own.remove(&OLD);
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    let reset = only(rig.flush()).tcp();
    assert!(reset.has(Flags::RST));
    assert_eq!((reset.to, reset.header.seq.0), (guest(4000).into(), lost.ack));
    assert_eq!(rig.conn(0).end, End::Reset);
    assert_eq!(rig.engine.counters().flows_stranded, 1);
    rig.conn(1).queue.extend(pattern(1000));
    let seen = rig.stream_ready(1, READABLE);
    assert_eq!(kept.take(seen), pattern(1000));
}

#[test]
fn a_guest_that_began_anew_hears_nothing_of_what_the_one_before_it_lost() {
    let mut rigs = Rig::workers(2);
    connected(&mut rigs[1], Peer::new(guest(4000), world(80)));
    rigs[1].conn(0).local = Some(OLD);
    rigs[0].engine.guest_reset();
    let rig = &mut rigs[1];
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    assert_eq!(rig.flush(), []);
    assert_eq!(rig.conn(0).end, End::Reset);
}

#[test]
fn a_connect_under_way_from_an_address_that_went_is_refused() {
    let mut rig = Rig::new();
    let mut peer = Peer::new(guest(4000), world(80));
    assert_eq!(peer.syn(&mut rig), []);
    rig.conn(0).local = Some(OLD);
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    let reset = only(rig.flush()).tcp();
    assert!(reset.has(Flags::RST | Flags::ACK));
    assert_eq!(reset.header.ack.0, peer.seq + 1, "so the guest believes it");
    rig.assert_empty();
}

#[test]
fn datagrams_and_the_process_s_own_services_do_not_care() {
    let mut rig = Rig::new();
    let mut dns = Peer::new(guest(4000), gateway(53));
    dns.syn(&mut rig);
    let seen = rig.stream_ready(0, WRITABLE);
    dns.establish(&mut rig, seen);
    rig.send(&udp_frame(guest(4001), world(9), b"ask"));
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    assert_eq!(rig.flush(), []);
    rig.send(&udp_frame(guest(4001), world(9), b"again"));
    assert_eq!(rig.sock(0).sent.len(), 2);
    assert_eq!(rig.conn(0).end, End::Open);
}

#[test]
fn a_finished_flow_goes_on_finishing() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).local = Some(OLD);
    rig.conn(0).fin_from_world = true;
    let seen = rig.stream_ready(0, WORLD_FIN);
    peer.take(seen);
    peer.data(&mut rig, Flags::FIN, &[]);
    assert_eq!(rig.conn(0).end, End::Clean);
    rig.engine.addresses_gone(rig.now, &mut rig.port);
    assert_eq!(rig.flush(), []);
    assert_eq!(rig.engine.counters().flows_stranded, 0);
}
