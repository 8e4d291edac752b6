//! How flows end: FIN as FIN, in either order, and everything else as reset.

use vunet::wire::tcp::Flags;

use crate::frames::{guest, world};
use crate::rig::{Peer, READABLE, Rig, WORLD_FIN, WRITABLE, connected, only, pattern, secs};
use crate::world::End;

fn flow(rig: &mut Rig) -> Peer {
    connected(rig, Peer::new(guest(4000), world(80)))
}

fn world_ends(rig: &mut Rig) -> Vec<crate::frames::Seen> {
    rig.conn(0).fin_from_world = true;
    rig.stream_ready(0, WORLD_FIN)
}

#[test]
fn an_upload_ended_by_half_close_gets_its_late_answer() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let acknowledged = only(peer.data(&mut rig, Flags::PSH | Flags::FIN, b"upload")).tcp();
    assert_eq!(acknowledged.header.ack.0, peer.seq);
    assert!(rig.conn(0).fin_from_guest);
    assert_eq!(rig.conn(0).end, End::Open);
    assert_eq!(rig.pass(secs(600)), []);
    rig.conn(0).queue.extend(pattern(50_000));
    let mut received = Vec::new();
    let mut seen = rig.stream_ready(0, READABLE);
    while !seen.is_empty() {
        received.extend(peer.take(seen));
        seen = peer.acknowledge(&mut rig);
    }
    assert_eq!(received, pattern(50_000));
    let seen = world_ends(&mut rig);
    assert!(only(seen.clone()).tcp().has(Flags::FIN));
    peer.take(seen);
    assert_eq!(peer.acknowledge(&mut rig), []);
    assert_eq!(rig.conn(0).end, End::Clean);
}

#[test]
fn a_world_that_ends_first_still_takes_bytes() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_ends(&mut rig);
    peer.take(seen);
    peer.acknowledge(&mut rig);
    assert_eq!(rig.pass(secs(3600)), []);
    peer.data(&mut rig, Flags::PSH, b"still");
    assert_eq!(rig.conn(0).taken, b"still");
    assert_eq!(rig.conn(0).end, End::Open);
    let last = only(peer.data(&mut rig, Flags::FIN, &[])).tcp();
    assert_eq!(last.header.ack.0, peer.seq);
    assert!(rig.conn(0).fin_from_guest);
    assert_eq!(rig.conn(0).end, End::Clean);
}

/// Lets a day pass; the guest answers when asked whether it lives.
fn a_day(rig: &mut Rig, peer: &Peer) {
    let mut asked = 0;
    for _ in 0..24 * 60 {
        for question in rig.pass(secs(60)) {
            assert_eq!(question.tcp().header.flags, Flags::ACK);
            assert_eq!(peer.acknowledge(rig), []);
            asked += 1;
        }
    }
    assert!((1..=12).contains(&asked), "asked {asked} times a day");
    assert_eq!(rig.conn(0).end, End::Open);
}

#[test]
fn a_half_closed_flow_lives_for_days_whichever_half_was_closed() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::FIN, b"upload");
    a_day(&mut rig, &peer);
    rig.conn(0).queue.extend(b"answer");
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), b"answer");
    peer.acknowledge(&mut rig);
    a_day(&mut rig, &peer);

    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_ends(&mut rig);
    peer.take(seen);
    peer.acknowledge(&mut rig);
    a_day(&mut rig, &peer);
    peer.data(&mut rig, Flags::PSH, b"answer");
    assert_eq!(rig.conn(0).taken, b"answer");
    a_day(&mut rig, &peer);
}

#[test]
fn both_ends_at_once_is_clean_too() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_ends(&mut rig);
    let fin = only(seen).tcp();
    let crossing = peer;
    let acknowledged = only(peer.data(&mut rig, Flags::FIN, &[])).tcp();
    assert_eq!(acknowledged.header.ack.0, peer.seq);
    assert_eq!(rig.conn(0).end, End::Open, "our FIN is not acknowledged yet");
    peer.ack = fin.header.seq.0.wrapping_add(1);
    peer.acknowledge(&mut rig);
    assert_eq!(rig.conn(0).end, End::Clean);
    assert_eq!(crossing.ack.wrapping_add(1), peer.ack);
}

#[test]
fn a_repeated_fin_is_acknowledged_for_ten_seconds_and_reset_after() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_ends(&mut rig);
    peer.take(seen);
    let fin = Peer { ..peer };
    peer.data(&mut rig, Flags::FIN, &[]);
    assert_eq!(rig.conn(0).end, End::Clean);
    assert_eq!(rig.world().open(), 0, "no descriptor is held");
    rig.pass(secs(9));
    let acknowledged = only(rig.send(&fin.seg(Flags::FIN | Flags::ACK, &[]).frame())).tcp();
    assert_eq!((acknowledged.header.flags, acknowledged.header.ack.0), (Flags::ACK, peer.seq));
    rig.pass(secs(2));
    rig.assert_empty();
    let reset = only(rig.send(&fin.seg(Flags::FIN | Flags::ACK, &[]).frame())).tcp();
    assert!(reset.has(Flags::RST));
}

#[test]
fn a_finished_flows_ports_may_be_used_again_at_once() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_ends(&mut rig);
    peer.take(seen);
    peer.data(&mut rig, Flags::FIN, &[]);
    let mut again = Peer { seq: peer.seq + 100_000, ..Peer::new(guest(4000), world(80)) };
    assert_eq!(again.syn(&mut rig), []);
    let seen = rig.stream_ready(1, WRITABLE);
    again.establish(&mut rig, seen);
    rig.pass(secs(20));
    assert_eq!(rig.conn(1).end, End::Open, "the old flow's time does not end the new one");
}

#[test]
fn the_last_bytes_are_discarded_before_the_socket_is_closed() {
    // A socket closed with bytes unread sends a reset, whatever was asked.
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::FIN, b"ask");
    rig.conn(0).queue.extend(b"answer");
    let seen = world_ends(&mut rig);
    peer.take(seen);
    peer.acknowledge(&mut rig);
    assert_eq!(rig.conn(0).end, End::Clean);
    assert_eq!(rig.conn(0).queue.len(), 0);
}

#[test]
fn a_guest_that_resets_is_a_reset_to_the_world_whatever_it_had_sent() {
    for fin in [false, true] {
        let mut rig = Rig::new();
        let mut peer = flow(&mut rig);
        let flags = if fin { Flags::FIN } else { Flags::PSH };
        peer.data(&mut rig, flags, b"upload");
        rig.send(&peer.seg(Flags::RST, &[]).frame());
        assert_eq!(rig.conn(0).end, End::Reset);
        rig.assert_empty();
    }
}

#[test]
fn a_guest_that_forgot_a_complete_connection_is_no_reason_to_reset_the_world() {
    // Its last acknowledgement was lost and its TIME-WAIT is over, or it closed long ago: the FIN,
    // sent again, meets nobody. What the world has not read yet of the upload must reach it.
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::FIN, b"upload");
    rig.conn(0).queue.extend(b"answer");
    let seen = world_ends(&mut rig);
    peer.take(seen);
    let before_fin = Peer { ack: peer.ack - 1, ..peer };
    before_fin.acknowledge(&mut rig);
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    assert_eq!(rig.conn(0).end, End::Clean);
    rig.assert_empty();
}

#[test]
fn a_guest_that_is_gone_is_never_a_clean_end() {
    let mut rig = Rig::new();
    // One flow in each state it may be in.
    let mut connecting = Peer::new(guest(4000), world(80));
    connecting.syn(&mut rig);
    let mut handshake = Peer::new(guest(4001), world(80));
    handshake.syn(&mut rig);
    rig.stream_ready(1, WRITABLE);
    connected(&mut rig, Peer::new(guest(4002), world(80)));
    let mut half = connected(&mut rig, Peer::new(guest(4003), world(80)));
    half.data(&mut rig, Flags::FIN, b"upload");
    connected(&mut rig, Peer::new(guest(4004), world(80)));
    rig.conn(4).fin_from_world = true;
    rig.stream_ready(4, WORLD_FIN);
    let mut held = connected(&mut rig, Peer::new(guest(4005), world(80)));
    rig.conn(5).room = 0;
    held.data(&mut rig, Flags::FIN, b"upload");
    rig.engine.guest_reset();
    assert_eq!(rig.flush(), [], "nobody is there to be told");
    for n in 0..6 {
        assert_eq!(rig.conn(n).end, End::Reset, "stream {n}");
    }
    rig.assert_empty();
}

#[test]
fn an_engine_that_ends_is_never_a_clean_end() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::FIN, b"upload");
    let Rig { engine, .. } = &mut rig;
    let world = std::rc::Rc::clone(&engine.nat().net().0);
    drop(rig);
    assert_eq!(world.borrow().conns[0].end, End::Reset);
}

#[test]
fn a_shutdown_the_socket_refuses_is_a_reset_to_the_guest() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).error = Some(libc::ENOTCONN);
    assert!(only(peer.data(&mut rig, Flags::FIN, &[])).tcp().has(Flags::RST));
    rig.assert_empty();
}

#[test]
fn events_of_a_finished_flow_touch_nobody() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    let token = rig.conn(0).token;
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    connected(&mut rig, Peer::new(guest(4001), world(80)));
    assert_ne!(rig.conn(1).token, token);
    assert_eq!(rig.ready(token, crate::rig::FAILED), []);
    assert_eq!(rig.conn(1).end, End::Open);
}
