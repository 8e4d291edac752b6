//! Fragments of the guest: put together, or dropped on purpose.

use std::net::Ipv4Addr;

use vunet::engine::counters::DropReason;
use vunet::limits;
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::{self, Protocol};

use crate::frames::{GATEWAY, GUEST_IP, Seen, WORLD, fragments, frame, guest, ip, udp_message, world};
use crate::rig::{Rig, only, pattern, secs};

const LIFETIME_SECS: u64 = 15;

/// The fragments of a UDP datagram of the guest with a payload of `len` bytes.
fn parts(ident: u16, len: usize) -> Vec<Vec<u8>> {
    let message = udp_message(guest(4000), world(9), &pattern(len));
    fragments(WORLD, Protocol::UDP, &message, ident, 1500)
}

/// A fragment of `bytes` of zeroes from `src`.
fn piece(src: Ipv4Addr, ident: u16, offset: usize, bytes: usize, more: bool) -> Vec<u8> {
    let header = ipv4::Header {
        ident,
        fragment_offset_bytes: offset as u16,
        more_fragments: more,
        ..ip(src, WORLD, Protocol::UDP, bytes)
    };
    frame(&header, &vec![0; bytes])
}

fn dropped(rig: &Rig) -> [u64; 3] {
    [DropReason::Fragment, DropReason::FragmentHole, DropReason::TableFull].map(|reason| rig.dropped(reason))
}

#[test]
fn fragments_in_any_order_and_repeated_make_the_datagram() {
    for order in [&[0, 1, 2][..], &[2, 1, 0], &[1, 2, 0], &[0, 0, 2, 2, 0, 1], &[2, 1, 1, 2, 0]] {
        let mut rig = Rig::new();
        for n in order {
            assert!(!rig.world().touched());
            rig.feed(&parts(7, 4000)[*n]);
        }
        assert_eq!(rig.sock(0).sent, [(pattern(4000), world(9).into())], "{order:?}");
        assert_eq!(dropped(&rig), [0, 0, 0]);
    }
}

#[test]
fn datagrams_whose_fragments_come_interleaved_are_told_apart() {
    let mut rig = Rig::new();
    let datagrams = [parts(1, 4000), parts(2, 3000), parts(3, 2000)];
    for n in 0..3 {
        for parts in &datagrams {
            parts.get(n).into_iter().for_each(|part| rig.feed(part));
        }
    }
    let sizes: Vec<usize> = rig.sock(0).sent.iter().map(|(bytes, _)| bytes.len()).collect();
    assert_eq!(sizes, [2000, 4000, 3000], "each when its last fragment came");
}

#[test]
fn any_overlap_drops_the_datagram_with_all_that_comes_of_it_later() {
    let good = || parts(7, 4000);
    let mut forged = good()[1].clone();
    *forged.last_mut().expect("a byte") ^= 1;
    let overlapping = [
        // The same place, other bytes; the same bytes, one less; across either edge; within; around.
        forged,
        piece(GUEST_IP, 7, 1480, 1472, true),
        piece(GUEST_IP, 7, 1472, 16, true),
        piece(GUEST_IP, 7, 2952, 16, true),
        piece(GUEST_IP, 7, 1488, 8, true),
        piece(GUEST_IP, 7, 1480 - 8, 1480 + 16, true),
        // An end within what is held already.
        piece(GUEST_IP, 7, 1480, 9, false),
    ];
    for (n, overlap) in overlapping.into_iter().enumerate() {
        let mut rig = Rig::new();
        rig.feed(&good()[1]);
        rig.feed(&overlap);
        assert_eq!(dropped(&rig), [1, 0, 0], "case {n}");
        // All of it once more, as if nothing had been.
        good().iter().for_each(|part| rig.feed(part));
        assert!(!rig.world().touched(), "case {n}");
        assert_eq!(dropped(&rig), [4, 0, 0]);
        // Its time over, the identification may be used again; the sender is told nothing.
        assert_eq!(rig.pass(secs(LIFETIME_SECS)), []);
        good().iter().for_each(|part| rig.feed(part));
        assert_eq!(rig.sock(0).sent.len(), 1, "case {n}");
        assert_eq!(dropped(&rig), [4, 0, 0]);
    }
}

#[test]
fn two_different_ends_or_bytes_past_the_end_drop_the_datagram() {
    for second in [piece(GUEST_IP, 7, 16, 9, false), piece(GUEST_IP, 7, 24, 8, true)] {
        let mut rig = Rig::new();
        rig.feed(&piece(GUEST_IP, 7, 16, 8, false));
        rig.feed(&second);
        rig.feed(&piece(GUEST_IP, 7, 0, 16, true));
        assert_eq!(dropped(&rig), [2, 0, 0]);
        assert!(!rig.world().touched());
    }
}

#[test]
fn a_datagram_with_a_hole_is_given_up_and_its_sender_told_if_the_beginning_came() {
    for (missing, is_told) in [(0, false), (1, true), (2, true)] {
        let mut rig = Rig::new();
        let parts = parts(7, 4000);
        for (n, part) in parts.iter().enumerate().filter(|(n, _)| *n != missing) {
            rig.now = rig.now + secs(n as u64);
            rig.feed(part);
        }
        let until = rig.engine.next_deadline().expect("its time is measured");
        let early = until.since(rig.now) - std::time::Duration::from_micros(1);
        assert_eq!(rig.pass(early), []);
        assert_eq!(dropped(&rig), [0, 0, 0]);
        let seen = rig.pass(secs(1));
        assert_eq!(dropped(&rig), [0, 1, 0]);
        if is_told {
            let Seen::Icmp { from, message, payload } = only(seen) else { panic!("not ICMP") };
            assert_eq!((from, message), (GATEWAY, Message::TimeExceeded { code: 1 }));
            assert_eq!(payload, parts[0][14..][..payload.len()], "the first fragment is quoted");
            assert!((28..=548).contains(&payload.len()));
        } else {
            assert_eq!(seen, []);
        }
        rig.feed(&parts[missing]);
        assert!(!rig.world().touched(), "its rest comes too late");
    }
}

#[test]
fn the_time_runs_from_the_first_fragment_that_came_and_is_not_renewed() {
    let mut rig = Rig::new();
    let parts = parts(7, 60_000);
    for part in &parts[1..] {
        rig.feed(part);
        rig.pass(std::time::Duration::from_millis(400));
    }
    assert_eq!(dropped(&rig)[1], 1);
    assert!(!rig.world().touched());
}

#[test]
fn a_flood_of_holes_is_told_within_the_rate() {
    let mut rig = Rig::new();
    for ident in 0..3000u16 {
        rig.feed(&piece(GUEST_IP, ident, 0, 8, true));
    }
    let told = rig.pass(secs(LIFETIME_SECS)).len();
    assert_eq!(told, limits::REASSEMBLY_DATAGRAMS_MAX.min(limits::ICMP_ERRORS_BURST as usize));
    let most = limits::REASSEMBLY_DATAGRAMS_MAX as u64;
    assert_eq!(dropped(&rig), [0, most, 3000 - most]);
    rig.assert_empty();
}

#[test]
fn one_datagram_past_the_bound_replaces_the_oldest() {
    let mut rig = Rig::new();
    let most = limits::REASSEMBLY_DATAGRAMS_MAX as u16;
    let first = |ident: u16| parts(ident, 2000).swap_remove(0);
    let last = |ident: u16| parts(ident, 2000).swap_remove(1);
    for ident in 0..=most {
        assert_eq!(dropped(&rig)[2], 0);
        rig.now = rig.now + std::time::Duration::from_micros(1);
        rig.feed(&first(ident));
    }
    assert_eq!(dropped(&rig), [0, 0, 1]);
    for ident in 1..=most {
        rig.feed(&last(ident));
    }
    assert_eq!(rig.sock(0).sent.len(), usize::from(most));
    rig.feed(&last(0));
    assert_eq!(rig.sock(0).sent.len(), usize::from(most), "the first is gone");
}

#[test]
fn bytes_past_the_bound_are_made_room_for_by_the_oldest() {
    let mut rig = Rig::new();
    // Datagrams that lack their last eight bytes.
    let each = 65_512;
    let fit = limits::REASSEMBLY_BYTES_MAX / each;
    for ident in 0..=fit as u16 {
        rig.now = rig.now + std::time::Duration::from_micros(1);
        for offset in (0..each).step_by(1448) {
            rig.feed(&piece(GUEST_IP, ident, offset, 1448.min(each - offset), true));
            let held = rig.engine.reassembly_bytes();
            assert!(held <= limits::REASSEMBLY_BYTES_MAX, "{held} bytes");
        }
    }
    assert_eq!(dropped(&rig), [0, 0, 1]);
    rig.pass(secs(LIFETIME_SECS + 1));
    assert_eq!(rig.engine.reassembly_bytes(), 0);
    assert_eq!(dropped(&rig)[1], fit as u64);
}

#[test]
fn fragments_past_the_bound_of_one_datagram_drop_it() {
    for (count, expected) in
        [(limits::REASSEMBLY_FRAGMENTS_MAX, 0), (limits::REASSEMBLY_FRAGMENTS_MAX + 1, 1)]
    {
        let mut rig = Rig::new();
        for n in 0..count {
            rig.feed(&piece(GUEST_IP, 7, 16 * n, 8, true));
        }
        assert_eq!(dropped(&rig), [expected, 0, 0]);
        assert_eq!(rig.engine.reassembly_bytes(), if expected == 0 { 8 * count } else { 0 });
    }
}

#[test]
fn a_source_that_floods_costs_no_other_source_its_datagrams() {
    let mut rig = Rig::new();
    let quiet = parts(7, 4000);
    rig.feed(&quiet[0]);
    // By count, and by bytes.
    for ident in 0..10_000u16 {
        rig.feed(&piece(Ipv4Addr::new(10, 0, 2, 66), ident, 0, 8, true));
    }
    rig.feed(&quiet[1]);
    for ident in 0..200u16 {
        for offset in (0..60_000).step_by(1448) {
            rig.feed(&piece(Ipv4Addr::new(10, 0, 2, 67), ident, offset, 1448, true));
        }
    }
    rig.feed(&quiet[2]);
    assert_eq!(rig.sock(0).sent, [(pattern(4000), world(9).into())]);
}

#[test]
fn impossible_fragments_are_malformed() {
    let mut rig = Rig::new();
    let cases = [
        // Nothing in it; a length not of eight; past the longest packet.
        piece(GUEST_IP, 7, 8, 0, true),
        piece(GUEST_IP, 7, 8, 9, true),
        piece(GUEST_IP, 7, 65_512, 8, false),
    ];
    for (n, case) in cases.iter().enumerate() {
        rig.feed(case);
        assert_eq!(rig.dropped(DropReason::Malformed), n as u64 + 1);
    }
    assert_eq!(rig.engine.next_deadline(), None);
}

#[test]
fn a_guest_that_began_anew_leaves_no_fragments() {
    let mut rig = Rig::new();
    rig.feed(&parts(7, 2000)[0]);
    rig.engine.guest_reset();
    rig.assert_empty();
    assert_eq!(rig.engine.reassembly_bytes(), 0);
}
