//! Bytes of the guest on their way into a socket.

use vunet::engine::counters::DropReason;
use vunet::engine::host_net::SendSpace;
use vunet::limits;
use vunet::wire::tcp::Flags;

use crate::frames::{guest, world};
use crate::rig::{Peer, READABLE, Rig, Setup, WRITABLE, connected, only, pattern, secs};

fn flow(rig: &mut Rig) -> Peer {
    connected(rig, Peer::new(guest(4000), world(80)))
}

/// A flow that scales windows, so that they are seen to the nearest 256 bytes.
fn scaled_flow(rig: &mut Rig) -> Peer {
    connected(rig, Peer { shift: Some(7), ..Peer::new(guest(4000), world(80)) })
}

#[test]
fn bytes_go_into_the_socket_at_once_and_are_acknowledged_only_then() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let bytes = pattern(1000);
    rig.feed(&peer.seg(Flags::ACK, &bytes).frame());
    assert_eq!(rig.conn(0).taken, bytes);
    let acknowledged = only(rig.flush()).tcp();
    peer.seq += 1000;
    assert_eq!((acknowledged.header.flags, acknowledged.header.ack.0), (Flags::ACK, peer.seq));
    assert_eq!(rig.engine.counters().payload_from_guest_bytes, 1000);
}

#[test]
fn one_batch_is_acknowledged_once() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    for _ in 0..20 {
        rig.feed(&peer.seg(Flags::ACK, &pattern(1000)).frame());
        peer.seq += 1000;
    }
    assert_eq!(only(rig.flush()).tcp().header.ack.0, peer.seq);
}

#[test]
fn bytes_a_socket_takes_in_part_are_held_and_follow_when_there_is_room() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).room = 400;
    let bytes = pattern(1000);
    let start = peer.seq;
    let acknowledged = only(peer.data(&mut rig, Flags::PSH, &bytes)).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 400, "only what the socket has");
    assert_eq!(rig.engine.nat().held_bytes(), 600);
    assert!(rig.conn(0).wants_writable > 0);
    rig.conn(0).room = 1 << 20;
    let acknowledged = only(rig.stream_ready(0, WRITABLE)).tcp();
    assert_eq!(acknowledged.header.ack.0, peer.seq);
    assert_eq!(rig.conn(0).taken, bytes);
    assert_eq!(rig.engine.nat().held_bytes(), 0);
}

#[test]
fn bytes_a_socket_refuses_are_held_as_far_as_the_window_promised() {
    let mut rig = Rig::new();
    rig.world().room = 3000;
    let mut peer = flow(&mut rig);
    rig.conn(0).room = 0;
    let bytes = pattern(5000);
    let start = peer.seq;
    for piece in bytes.chunks(2500) {
        let acknowledged = only(peer.data(&mut rig, Flags::PSH, piece)).tcp();
        assert_eq!(acknowledged.header.ack.0, start);
    }
    assert_eq!(rig.engine.nat().held_bytes(), 3000, "the window was 3,000 bytes");
    assert_eq!(rig.dropped(DropReason::TableFull), 1);
    rig.conn(0).room = 10_000;
    let acknowledged = only(rig.stream_ready(0, WRITABLE)).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 3000);
    peer.seq = start + 3000;
    let acknowledged = only(peer.data(&mut rig, Flags::PSH, &bytes[3000..])).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 5000);
    assert_eq!(rig.conn(0).taken, bytes);
}

#[test]
fn a_segment_longer_than_the_open_window_is_held_whole_and_its_guest_heard() {
    for fin in [false, true] {
        let mut rig = Rig::new();
        rig.world().room = 3000;
        let mut peer = flow(&mut rig);
        rig.conn(0).room = 1000;
        let bytes = pattern(5000);
        let start = peer.seq;
        let flags = if fin { Flags::FIN } else { Flags::PSH };
        let acknowledged = only(peer.data(&mut rig, flags, &bytes)).tcp();
        assert_eq!(acknowledged.header.ack.0, start + 1000);
        assert_eq!((rig.engine.nat().held_bytes(), rig.dropped(DropReason::TableFull)), (4000, 0));
        // The guest's numbers lie beyond the window now; what it acknowledges counts all the same.
        rig.conn(0).queue.extend(b"answer");
        let seen = rig.stream_ready(0, READABLE);
        assert_eq!(peer.take(seen), b"answer");
        Peer { seq: start + 5000, ..peer }.acknowledge(&mut rig);
        assert_eq!(rig.conn(0).discarded, 6);
        rig.conn(0).room = 10_000;
        let acknowledged = only(rig.stream_ready(0, WRITABLE)).tcp();
        assert_eq!(acknowledged.header.ack.0, peer.seq);
        assert_eq!(rig.conn(0).taken, bytes);
        assert_eq!(rig.conn(0).fin_from_guest, fin);
        assert_eq!(rig.engine.nat().held_bytes(), 0);
    }
}

#[test]
fn a_guest_that_ignores_the_window_is_held_to_one_frame_beyond_it() {
    let mut rig = Rig::new();
    rig.world().room = 3000;
    let mut peer = flow(&mut rig);
    rig.conn(0).room = 0;
    for _ in 0..60 {
        rig.feed_only(&peer.seg(Flags::ACK, &pattern(1460)).frame());
        peer.seq += 1460;
    }
    rig.end_of_batch();
    assert_eq!(rig.engine.nat().held_bytes(), 3000 + limits::FRAME_BYTES_MAX);
    assert_eq!(rig.dropped(DropReason::TableFull), 1);
    peer.data(&mut rig, Flags::PSH, &pattern(1460));
    assert_eq!(rig.engine.nat().held_bytes(), 3000 + limits::FRAME_BYTES_MAX);
}

#[test]
fn segments_out_of_order_are_put_in_order_and_answered_each_batch() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let bytes = pattern(3000);
    let start = peer.seq;
    for at in [2000, 1000] {
        peer.seq = start + at;
        let duplicate = only(peer.data(&mut rig, Flags::PSH, &bytes[at as usize..at as usize + 1000])).tcp();
        assert_eq!(duplicate.header.ack.0, start, "a duplicate acknowledgement tells of the gap");
    }
    assert_eq!(rig.engine.nat().held_bytes(), 2000);
    peer.seq = start;
    let acknowledged = only(peer.data(&mut rig, Flags::PSH, &bytes[..1000])).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 3000);
    assert_eq!(rig.conn(0).taken, bytes);
    assert_eq!(rig.engine.nat().held_bytes(), 0);
}

#[test]
fn sequence_numbers_wrap_without_loss() {
    for start in [u32::MAX - 1, u32::MAX - 1500, i32::MAX as u32 - 1500] {
        let mut rig = Rig::new();
        let mut peer = connected(&mut rig, Peer { seq: start, ..Peer::new(guest(4000), world(80)) });
        let bytes = pattern(6000);
        for order in [1, 0, 3, 2, 5, 4] {
            let at = order * 1000;
            let sent = Peer { seq: peer.seq.wrapping_add(at as u32), ..peer };
            rig.send(&sent.seg(Flags::ACK, &bytes[at..at + 1000]).frame());
        }
        assert_eq!(rig.conn(0).taken, bytes);
        peer.seq = peer.seq.wrapping_add(6000);
        peer.data(&mut rig, Flags::FIN, &[]);
        assert!(rig.conn(0).fin_from_guest);
    }
}

#[test]
fn what_was_taken_already_is_not_sent_twice() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let bytes = pattern(2000);
    let start = peer.seq;
    peer.data(&mut rig, Flags::PSH, &bytes[..1000]);
    peer.seq = start;
    let repeated = only(peer.data(&mut rig, Flags::PSH, &bytes[..1000])).tcp();
    assert_eq!(repeated.header.ack.0, start + 1000);
    peer.seq = start + 500;
    let overlapping = only(peer.data(&mut rig, Flags::PSH, &bytes[500..])).tcp();
    assert_eq!(overlapping.header.ack.0, start + 2000);
    assert_eq!(rig.conn(0).taken, bytes);
}

#[test]
fn a_full_socket_closes_the_window_and_room_opens_it_again() {
    let mut rig = Rig::new();
    rig.world().room = 10_000;
    let mut peer = scaled_flow(&mut rig);
    let mut sent = 0;
    while sent < 10_000 {
        let acknowledged = only(peer.data(&mut rig, Flags::ACK, &pattern(1000))).tcp();
        sent += 1000;
        let window = usize::from(acknowledged.header.window) << 8;
        // A promise the scaled field cannot say exactly is rounded up, by less than 256 bytes a segment.
        let rounded = sent / 1000 * 255;
        assert!(window <= 10_000 - sent + rounded, "{window} promised, {} there", 10_000 - sent);
    }
    assert!(rig.conn(0).wants_writable > 0, "the socket is asked to tell of room");
    // What was promised beyond the room there is, is held, and then the window is closed.
    let start = peer.seq;
    let last = only(peer.data(&mut rig, Flags::ACK, &pattern(2304))).tcp();
    assert_eq!((last.header.window, last.header.ack.0), (9, start));
    assert_eq!(rig.engine.nat().held_bytes(), 2304);
    rig.conn(0).room = 20_000;
    let update = only(rig.stream_ready(0, WRITABLE)).tcp();
    assert_eq!(update.header.ack.0, peer.seq);
    assert!(usize::from(update.header.window) << 8 > 17_000);
    assert_eq!(peer.data(&mut rig, Flags::ACK, &pattern(1000)).len(), 1);
    assert_eq!(rig.conn(0).taken.len(), 13_304);
}

#[test]
fn a_probe_of_a_closed_window_is_answered() {
    let mut rig = Rig::new();
    rig.world().room = 2560;
    let mut peer = scaled_flow(&mut rig);
    assert_eq!(only(peer.data(&mut rig, Flags::PSH, &pattern(2560))).tcp().header.window, 0);
    for probe in
        [Peer { seq: peer.seq.wrapping_sub(1), ..peer }.seg(Flags::ACK, &[]), peer.seg(Flags::ACK, b"x")]
    {
        let answer = only(rig.send(&probe.frame())).tcp();
        assert_eq!((answer.header.window, answer.header.ack.0), (0, peer.seq));
    }
    assert_eq!(rig.engine.nat().held_bytes(), 0, "nothing was promised");
}

#[test]
fn a_socket_smaller_than_one_segment_still_opens_its_window() {
    // A guest of an MTU near 64 KiB over a socket whose buffer begins at 87,040 bytes.
    let mut rig = Rig::with(Setup { ip_mtu: 65_520, ..Setup::default() });
    rig.world().room = 87_040;
    let mut peer = Peer { mss: Some(65_480), shift: Some(7), ..Peer::new(guest(4000), world(80)) };
    peer.syn(&mut rig);
    rig.conn(0).space = Some(SendSpace { bytes: 65_280, tight: false });
    let seen = rig.stream_ready(0, WRITABLE);
    let syn_ack = peer.establish(&mut rig, seen);
    assert!(syn_ack.header.window > 60_000, "a window of {}", syn_ack.header.window);
    rig.conn(0).space = Some(SendSpace { bytes: 16_000, tight: true });
    let window = only(peer.data(&mut rig, Flags::PSH, &pattern(65_280))).tcp().header.window;
    assert_eq!(window, 0);
    rig.conn(0).space = Some(SendSpace { bytes: 40_000, tight: false });
    let window = only(rig.stream_ready(0, WRITABLE)).tcp().header.window;
    assert_eq!(window, (40_000 >> 8) + 1, "open again once a third is free");
}

#[test]
fn a_silly_window_is_not_offered_while_the_socket_is_tight() {
    let mut rig = Rig::new();
    rig.world().room = 2000;
    let mut peer = flow(&mut rig);
    let window = only(peer.data(&mut rig, Flags::PSH, &pattern(2000))).tcp().header.window;
    assert_eq!(window, 0);
    rig.conn(0).space = Some(SendSpace { bytes: 300, tight: true });
    let window = only(rig.stream_ready(0, WRITABLE)).tcp().header.window;
    assert_eq!(window, 0);
}

#[test]
fn the_windows_right_edge_never_moves_left() {
    for shift in [None, Some(7)] {
        let mut rig = Rig::new();
        rig.world().room = 50_000;
        let mut peer = connected(&mut rig, Peer { shift, ..Peer::new(guest(4000), world(80)) });
        let scale = if shift.is_some() { 8 } else { 0 };
        let mut edge = 0;
        for n in 0..400usize {
            let size = 1 + n * 7919 % 1460;
            let left = rig.conn(0).room;
            if left < size {
                rig.conn(0).room = if n % 3 == 0 { left } else { 50_000 };
                rig.stream_ready(0, WRITABLE);
            }
            let start = peer.seq;
            let seen = peer.data(&mut rig, Flags::PSH, &pattern(size));
            for acknowledged in seen.into_iter().map(crate::frames::Seen::tcp) {
                let ack = acknowledged.header.ack.0 as usize;
                let window = usize::from(acknowledged.header.window) << scale;
                assert!(ack + window >= edge, "{} bytes are taken back", edge - ack - window);
                edge = ack + window;
                // A refused part is sent again.
                peer.seq = acknowledged.header.ack.0.max(start);
            }
        }
    }
}

#[test]
fn readiness_to_read_alone_costs_no_acknowledgement() {
    // Edge-triggered events repeat what holds already: a socket with room says so with each of them.
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::PSH, b"x");
    let closed = Peer { window: 0, ..peer };
    closed.acknowledge(&mut rig);
    rig.conn(0).queue.extend(pattern(100));
    for _ in 0..5 {
        assert_eq!(rig.stream_ready(0, READABLE), [], "the guest has heard all of that");
    }
}

#[test]
fn bytes_beyond_the_fin_are_ignored() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::PSH | Flags::FIN, b"end");
    assert!(rig.conn(0).fin_from_guest);
    peer.data(&mut rig, Flags::PSH, b"more");
    assert_eq!(rig.conn(0).taken, b"end");
}

#[test]
fn a_fin_waits_for_the_bytes_before_it() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let start = peer.seq;
    peer.seq = start + 10;
    peer.data(&mut rig, Flags::FIN, b"later");
    assert!(!rig.conn(0).fin_from_guest);
    peer.seq = start;
    let acknowledged = only(peer.data(&mut rig, Flags::PSH, b"0123456789")).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 16);
    assert!(rig.conn(0).fin_from_guest);
    assert_eq!(rig.conn(0).taken, b"0123456789later");
}

#[test]
fn a_fin_waits_for_bytes_the_socket_refused() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).room = 3;
    let start = peer.seq;
    peer.data(&mut rig, Flags::FIN, b"upload");
    assert!(!rig.conn(0).fin_from_guest);
    rig.conn(0).room = 100;
    let acknowledged = only(rig.stream_ready(0, WRITABLE)).tcp();
    assert_eq!(acknowledged.header.ack.0, start + 7);
    assert!(rig.conn(0).fin_from_guest);
    assert_eq!(rig.conn(0).taken, b"upload");
}

#[test]
fn urgent_bytes_are_bytes_like_any_other() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    peer.data(&mut rig, Flags::URG | Flags::PSH, b"abc");
    assert_eq!(rig.conn(0).taken, b"abc");
}

#[test]
fn segments_outside_of_the_window_are_answered_and_not_taken() {
    let mut rig = Rig::new();
    rig.world().room = 8000;
    let peer = flow(&mut rig);
    for offset in [8001, 100_000, 0x4000_0000, 0x8000_0000u32, -10i32 as u32] {
        let stray = Peer { seq: peer.seq.wrapping_add(offset), ..peer };
        let answer = only(rig.send(&stray.seg(Flags::ACK, b"stray").frame())).tcp();
        assert_eq!((answer.header.flags, answer.header.ack.0), (Flags::ACK, peer.seq));
    }
    assert_eq!(rig.dropped(DropReason::OutOfWindow), 5);
    assert_eq!(rig.conn(0).taken, b"");
    assert_eq!(rig.engine.nat().held_bytes(), 0);
}

#[test]
fn acknowledgements_of_what_was_never_sent_are_answered_and_ignored() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    let wrong = Peer { ack: peer.ack.wrapping_add(5000), ..peer };
    let answer = only(rig.send(&wrong.seg(Flags::ACK, b"data").frame())).tcp();
    assert_eq!((answer.header.seq.0, answer.header.ack.0), (peer.ack, peer.seq));
    assert_eq!(rig.conn(0).taken, b"");
}

#[test]
fn a_reset_in_the_window_is_challenged_and_an_exact_one_obeyed() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    let near = Peer { seq: peer.seq + 1, ..peer };
    let challenge = only(rig.send(&near.seg(Flags::RST, &[]).frame())).tcp();
    assert_eq!((challenge.header.flags, challenge.header.ack.0), (Flags::ACK, peer.seq));
    let outside = Peer { seq: peer.seq.wrapping_sub(1), ..peer };
    assert_eq!(rig.send(&outside.seg(Flags::RST, &[]).frame()), []);
    assert_eq!(rig.conn(0).end, crate::world::End::Open);
    assert_eq!(rig.send(&peer.seg(Flags::RST, &[]).frame()), []);
    assert_eq!(rig.conn(0).end, crate::world::End::Reset);
    rig.assert_empty();
}

#[test]
fn a_world_that_resets_during_an_upload_is_seen_as_reset() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).error = Some(libc::EPIPE);
    let reset = only(peer.data(&mut rig, Flags::PSH, b"x")).tcp();
    assert!(reset.has(Flags::RST));
    assert_eq!(reset.header.seq.0, peer.ack, "a reset counts only at the next byte expected");
    rig.assert_empty();
}

#[test]
fn one_flow_holds_so_much_and_not_a_byte_more() {
    let mut rig = Rig::new();
    rig.world().room = 4 << 20;
    let peer = scaled_flow(&mut rig);
    let piece = pattern(16 << 10);
    let pieces = limits::TCP_POOL_FLOW_BYTES_MAX / piece.len();
    for n in 0..pieces + 3 {
        let later = Peer { seq: peer.seq.wrapping_add(1 + (n * piece.len()) as u32), ..peer };
        rig.send(&later.seg(Flags::ACK, &piece).frame());
    }
    assert_eq!(rig.engine.nat().held_bytes(), limits::TCP_POOL_FLOW_BYTES_MAX);
    assert_eq!(rig.dropped(DropReason::TableFull), 3);
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    rig.assert_empty();
}

#[test]
fn all_flows_together_hold_so_much_and_not_a_byte_more() {
    let mut rig = Rig::new();
    rig.world().room = 4 << 20;
    let piece = pattern(16 << 10);
    let mut flows = 0;
    while rig.dropped(DropReason::TableFull) == 0 {
        flows += 1;
        let peer = connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4000 + flows), world(80)) });
        for n in 0..60 {
            let later = Peer { seq: peer.seq.wrapping_add(1 + (n * piece.len()) as u32), ..peer };
            rig.send(&later.seg(Flags::ACK, &piece).frame());
        }
    }
    assert_eq!(rig.engine.nat().held_bytes(), limits::TCP_POOL_BYTES_MAX);
    assert_eq!(usize::from(flows), limits::TCP_POOL_BYTES_MAX / (60 * piece.len()) + 1);
    rig.engine.guest_reset();
    rig.assert_empty();
}

#[test]
fn a_flow_that_waits_for_room_wakes_nobody() {
    let mut rig = Rig::new();
    rig.world().room = 3000;
    let mut peer = flow(&mut rig);
    rig.conn(0).room = 0;
    peer.data(&mut rig, Flags::PSH, &pattern(2000));
    assert!(rig.engine.nat().held_bytes() > 0);
    assert!(rig.wakeups(secs(3600)) <= 1, "one deadline of the handshake may come up to be moved");
    assert_eq!(rig.wakeups(secs(3500)), 0);
}

/// A question and its answer, `pause` apart; what the guest sees right after its question.
fn ask(rig: &mut Rig, peer: &mut Peer, pause: std::time::Duration) -> Vec<crate::frames::Seen> {
    let at_once = peer.data(rig, Flags::PSH, b"question");
    let later = rig.pass(pause);
    rig.conn(0).queue.extend(b"answer");
    let answer = rig.stream_ready(0, READABLE);
    assert_eq!(only(answer.clone()).tcp().header.ack.0, peer.seq, "the answer acknowledges");
    peer.take(answer);
    peer.acknowledge(rig);
    at_once.into_iter().chain(later).collect()
}

#[test]
fn an_acknowledgement_waits_for_the_answer_that_carries_it() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    for _ in 0..5 {
        assert_eq!(ask(&mut rig, &mut peer, std::time::Duration::from_micros(300)), []);
    }
}

#[test]
fn an_acknowledgement_waits_a_millisecond_and_once_only() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    assert_eq!(peer.data(&mut rig, Flags::PSH, b"question"), []);
    assert_eq!(only(rig.pass(crate::rig::ms(1))).tcp().header.ack.0, peer.seq);
    for _ in 0..3 {
        let answered = only(peer.data(&mut rig, Flags::PSH, b"another")).tcp();
        assert_eq!(answered.header.ack.0, peer.seq, "at once where answers are slow");
    }
    assert_eq!(rig.engine.counters().retransmits, 0);
}

#[test]
fn slow_answers_end_the_waiting_and_quick_ones_bring_it_back() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    assert_eq!(ask(&mut rig, &mut peer, crate::rig::ms(30)).len(), 1, "after its time");
    assert_eq!(ask(&mut rig, &mut peer, crate::rig::ms(30)).len(), 1, "at once");
    let quick = std::time::Duration::from_micros(100);
    for _ in 0..2 {
        assert_eq!(ask(&mut rig, &mut peer, quick).len(), 1, "at once");
    }
    assert_eq!(ask(&mut rig, &mut peer, quick), []);
}

#[test]
fn a_full_segment_and_one_after_a_hole_are_acknowledged_at_once() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    assert_eq!(peer.data(&mut rig, Flags::PSH, &pattern(1460)).len(), 1);
    assert_eq!(peer.data(&mut rig, Flags::PSH, &pattern(1000)), []);
    assert_eq!(peer.data(&mut rig, Flags::PSH, &pattern(1000)).len(), 1, "more than a segment waits");
    peer.seq = peer.seq.wrapping_add(100);
    assert!(!peer.data(&mut rig, Flags::PSH, b"beyond").is_empty());
}

/// Feeds segments of `len` bytes each as one batch of frames; what the guest sees at its end.
fn batch(rig: &mut Rig, peer: &mut Peer, bytes: &[u8], len: usize) -> Vec<crate::frames::Seen> {
    for chunk in bytes.chunks(len) {
        let frame = peer.seg(Flags::ACK, chunk).frame();
        peer.seq = peer.seq.wrapping_add(chunk.len() as u32);
        rig.feed_only(&frame);
    }
    rig.end_of_batch()
}

#[test]
fn full_segments_of_a_batch_go_into_the_socket_with_one_call_and_are_acknowledged_once() {
    let mut rig = Rig::new();
    let mut peer = scaled_flow(&mut rig);
    let bytes = pattern(20 * 1460);
    let seen = batch(&mut rig, &mut peer, &bytes, 1460);
    assert_eq!(only(seen).tcp().header.ack.0, peer.seq);
    assert_eq!(rig.conn(0).sends, 1);
    assert_eq!(rig.conn(0).taken, bytes);
}

#[test]
fn what_a_socket_does_not_take_of_a_batch_is_held_in_order() {
    let mut rig = Rig::new();
    rig.world().room = 20_000;
    let mut peer = scaled_flow(&mut rig);
    rig.conn(0).room = 5000;
    let bytes = pattern(10 * 1460);
    batch(&mut rig, &mut peer, &bytes, 1460);
    assert_eq!(rig.engine.nat().held_bytes(), bytes.len() - 5000);
    rig.conn(0).room = 50_000;
    rig.stream_ready(0, WRITABLE);
    assert_eq!(rig.conn(0).taken, bytes);
}

#[test]
fn whatever_follows_gathered_segments_comes_after_them() {
    for last in [Flags::FIN, Flags::RST, Flags::PSH] {
        let mut rig = Rig::new();
        let mut peer = scaled_flow(&mut rig);
        let bytes = pattern(3 * 1460);
        for chunk in bytes.chunks(1460) {
            let frame = peer.seg(Flags::ACK, chunk).frame();
            peer.seq = peer.seq.wrapping_add(chunk.len() as u32);
            rig.feed_only(&frame);
        }
        // A retransmission of the second in between changes nothing.
        let again = Peer { seq: peer.seq.wrapping_sub(2 * 1460), ..peer };
        rig.feed_only(&again.seg(Flags::ACK, &bytes[1460..2920]).frame());
        rig.feed_only(&peer.seg(Flags::ACK | last, b"").frame());
        rig.end_of_batch();
        assert_eq!(rig.conn(0).taken, bytes, "{last:?}");
    }
}

#[test]
fn a_socket_that_fails_at_the_end_of_a_batch_resets_the_guest() {
    let mut rig = Rig::new();
    let mut peer = scaled_flow(&mut rig);
    rig.conn(0).error = Some(libc::ECONNRESET);
    let seen = batch(&mut rig, &mut peer, &pattern(2 * 1460), 1460);
    assert!(only(seen).tcp().has(Flags::RST));
    rig.assert_empty();
}
