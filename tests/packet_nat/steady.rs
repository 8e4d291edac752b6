//! What packets of flows under way cost in memory: nothing.

use std::time::Duration;

use vunet::config::Protocol as Transport;
use vunet::engine::packet::config::PacketNatConfig;
use vunet::engine::packet::{Side, Verdict};
use vunet::wire::ipv4::Protocol;
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::VnetHeader;

use crate::allocations::Watch;
use crate::packets::{self, Body, Frame, TRANSPORT_AT, word};
use crate::rig::{GUEST, GUEST_2, OTHER, OUTSIDE, REMOTE, Rig, published, settings, source};

const ACK: Flags = Flags::ACK;

/// Flows of every kind, and frames that go on with them for ever.
fn frames(rig: &mut Rig) -> Vec<(Side, Vec<u8>, Verdict)> {
    let mut frames = Vec::new();
    let mut add = |side, frame: Vec<u8>, verdict| frames.push((side, frame, verdict));
    for port in 0..2000 {
        let sent = Frame::udp((GUEST, 10_000 + port), (REMOTE, 9), b"datagram");
        let left = rig.out(&sent);
        let answer = Frame::udp((REMOTE, 9), source(&left), b"answer");
        add(Side::Guest, sent.build(), Verdict::Forward);
        add(Side::World, answer.build(), Verdict::Forward);
        let error = packets::error((3, 1), OTHER, OUTSIDE, &left, 28);
        add(Side::World, error, Verdict::Forward);
    }
    let external = source(&rig.out(&Frame::tcp((GUEST, 5000), (REMOTE, 80), Flags::SYN, 100, 0))).1;
    rig.inn(&Frame::tcp((REMOTE, 80), (OUTSIDE, external), Flags::SYN | ACK, 500, 101));
    add(Side::Guest, Frame::tcp((GUEST, 5000), (REMOTE, 80), ACK, 101, 501).build(), Verdict::Forward);
    add(Side::World, Frame::tcp((REMOTE, 80), (OUTSIDE, external), ACK, 501, 101).build(), Verdict::Forward);
    let ping = Frame::echo(8, GUEST, REMOTE, 5);
    let ident = word(&rig.out(&ping), TRANSPORT_AT + 4);
    add(Side::Guest, ping.build(), Verdict::Forward);
    add(Side::World, Frame::echo(0, REMOTE, OUTSIDE, ident).build(), Verdict::Forward);
    let tunnel = Frame { body: Body::Plain(Protocol(47)), ..Frame::udp((GUEST, 0), (REMOTE, 0), b"tunnel") };
    add(Side::Guest, tunnel.build(), Verdict::Forward);
    let hairpin = Frame::udp((GUEST_2, 7), (OUTSIDE, 53), b"around");
    add(Side::Guest, hairpin.build(), Verdict::Hairpin);
    let long = Frame { ident: 3, ..Frame::udp((GUEST, 5000), (REMOTE, 7), &[1; 100]) };
    for fragment in long.fragments(40) {
        add(Side::Guest, fragment, Verdict::Forward);
    }
    // Refused and answered.
    add(Side::World, Frame::udp((OTHER, 1), (OUTSIDE, 1), b"x").build(), drop_no_flow());
    frames
}

fn drop_no_flow() -> Verdict {
    Verdict::Drop(vunet::engine::counters::DropReason::NoFlow)
}

#[test]
fn packets_of_flows_under_way_allocate_nothing() {
    let published = vec![published(Transport::Udp, 53, 5353)];
    let mut rig = Rig::new(PacketNatConfig { published, ..settings() });
    let mut frames = frames(&mut rig);
    let watch = Watch::leaked();
    watch.over_this_thread();
    let vnet = VnetHeader::default();
    let originals = frames.clone();
    let mut carry_all = |rig: &mut Rig| {
        for ((side, frame, expected), (_, original, _)) in frames.iter_mut().zip(&originals) {
            frame.copy_from_slice(original);
            assert_eq!(rig.judge(*side, &vnet, frame), *expected);
        }
        rig.pass(Duration::from_millis(700));
    };
    // Begins what is not begun yet.
    carry_all(&mut rig);
    watch.arm();
    for _ in 0..50 {
        carry_all(&mut rig);
    }
    let count = watch.disarm();
    assert_eq!(count, 0, "allocated at: {:#?}", watch.origins());
    assert!(originals.len() > 6000 && rig.nat.table().len() > 2000);
}
