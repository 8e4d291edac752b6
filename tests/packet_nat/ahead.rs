//! What is fetched ahead of a batch changes nothing but time.

use std::time::Duration;

use vunet::engine::packet::random::Random;
use vunet::engine::packet::{Side, Verdict};
use vunet::limits;
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::VnetHeader;

use crate::packets::Frame;
use crate::rig::{GUEST, GUEST_2, OTHER, OUTSIDE, REMOTE, Rig, settings};

/// A frame of either side: of a flow that stands, of a new one, cut off, or of random bytes.
fn frame(random: &mut Random) -> (Side, Vec<u8>) {
    let port = 49_152 + random.below(2 * limits::PACKET_AHEAD_FLOWS_MIN as u32) as u16;
    let (guest, remote) = match random.below(8) {
        0 => (GUEST_2, REMOTE),
        1 => (GUEST, OTHER),
        _ => (GUEST, REMOTE),
    };
    let mut bytes = match random.below(6) {
        0 | 1 => Frame::udp((guest, port), (remote, 443), b"out"),
        2 | 3 => Frame::udp((remote, 443), (OUTSIDE, port), b"in"),
        4 => Frame::tcp((guest, port), (remote, 443), Flags::SYN, 1, 0),
        _ => Frame::echo(8, guest, remote, port),
    }
    .build();
    match random.below(16) {
        0 => bytes.truncate(random.below(bytes.len() as u32 + 1) as usize),
        1 => bytes.iter_mut().for_each(|byte| *byte = random.next_u64() as u8),
        2 => {
            let at = random.below(bytes.len() as u32) as usize;
            bytes[at] = random.next_u64() as u8;
        }
        _ => {}
    }
    (if random.below(6) < 3 { Side::Guest } else { Side::World }, bytes)
}

#[test]
fn batches_that_were_expected_pass_as_those_that_were_not() {
    let (mut told, mut untold) = (Rig::new(settings()), Rig::new(settings()));
    for rig in [&mut told, &mut untold] {
        for port in 49_152..49_152 + limits::PACKET_AHEAD_FLOWS_MIN as u16 + 500 {
            rig.out(&Frame::udp((GUEST, port), (REMOTE, 443), b"first"));
        }
    }
    let mut random = Random::new((7, 8));
    let (mut carried, vnet) = (0, VnetHeader::default());
    for batch in 0..1500 {
        let frames: Vec<_> = (0..random.below(40)).map(|_| frame(&mut random)).collect();
        for side in [Side::Guest, Side::World] {
            let heads = frames.iter().filter(|(from, _)| *from == side).map(|(_, bytes)| &bytes[..]);
            told.nat.expect(side, heads);
        }
        for (side, bytes) in frames {
            let (mut one, mut other) = (bytes.clone(), bytes);
            let verdict = told.judge(side, &vnet, &mut one);
            assert_eq!((verdict, &one), (untold.judge(side, &vnet, &mut other), &other), "batch {batch}");
            carried += usize::from(verdict == Verdict::Forward);
        }
        if batch % 100 == 99 {
            // Some end, and their places are free.
            let time = Duration::from_secs(u64::from(random.below(40)));
            told.pass(time);
            untold.pass(time);
        }
    }
    assert!(carried > 9_000, "{carried} were carried");
    let counted = [&told, &untold].map(|rig| format!("{:?}", rig.nat.counters()));
    assert_eq!(counted[0], counted[1]);
    assert_eq!(told.nat.table().len(), untold.nat.table().len());
}
