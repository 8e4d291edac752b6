//! What flows are said to have carried: each byte once, wherever the flow went.

use vunet::engine::flows::{Carried, FlowQuery, Walk};
use vunet::wire::tcp::Flags;

use crate::frames::{guest, udp_frame, world};
use crate::handover::exchange;
use crate::rig::{Peer, READABLE, Rig, connected, only, pattern, secs};

/// What the flows of a worker carried.
fn carried(rig: &Rig) -> Vec<Carried> {
    let query = FlowQuery { limit: 100, ..FlowQuery::default() };
    let mut walk = Walk::new(&query, rig.now);
    rig.engine.list_flows(&mut walk);
    walk.done().flows.iter().map(|flow| flow.carried.expect("it is counted")).collect()
}

fn bytes(from_guest_bytes: u64, to_guest_bytes: u64) -> Carried {
    Carried { from_guest_bytes, to_guest_bytes }
}

#[test]
fn bytes_that_are_sent_again_count_once() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    assert_eq!(carried(&rig), [bytes(0, 0)], "a handshake carries nothing");
    let again = peer.seg(Flags::ACK | Flags::PSH, b"question").frame();
    peer.data(&mut rig, Flags::PSH, b"question");
    rig.send(&again);
    assert_eq!(carried(&rig), [bytes(8, 0)]);
    rig.conn(0).queue.extend(pattern(5000));
    rig.stream_ready(0, READABLE);
    assert!(!rig.pass(secs(2)).is_empty(), "it is sent again");
    assert!(rig.engine.counters().payload_to_guest_bytes > 5000);
    assert_eq!(carried(&rig), [bytes(8, 5000)]);
}

#[test]
fn a_flow_that_moves_to_another_worker_takes_its_count_along() {
    let mut rigs = Rig::workers(2);
    let mut peer = connected(&mut rigs[0], Peer::new(guest(4000), world(80)));
    exchange(&mut rigs);
    peer.data(&mut rigs[0], Flags::PSH, b"one ");
    peer.data(&mut rigs[1], Flags::PSH, b"two ");
    exchange(&mut rigs);
    assert_eq!(carried(&rigs[0]), []);
    assert_eq!(carried(&rigs[1]), [bytes(8, 0)]);
}

#[test]
fn a_flow_that_ends_tells_what_it_carried() {
    let mut rig = Rig::new();
    rig.engine.flow_news().set(true);
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    peer.data(&mut rig, Flags::PSH, b"question");
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    let (news, _) = rig.engine.flow_news().take();
    let told: Vec<_> = news.iter().map(|news| (news.opened, news.carried)).collect();
    assert_eq!(told, [(true, None), (false, Some(bytes(8, 0)))]);
}

#[test]
fn datagrams_count_each_way_and_for_each_remote_end() {
    let mut rig = Rig::new();
    rig.send(&udp_frame(guest(4000), world(53), b"ask"));
    rig.send(&udp_frame(guest(4000), world(54), b"ask more"));
    only(rig.datagram_arrives(0, b"answer", world(53).into()));
    assert_eq!(rig.datagram_arrives(0, b"unasked", world(55).into()), []);
    assert_eq!(carried(&rig), [bytes(3, 6), bytes(8, 0)]);
}
