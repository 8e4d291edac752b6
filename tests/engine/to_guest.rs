//! Bytes of a socket on their way to the guest.

use vunet::engine::guest_port::GuestOffloads;
use vunet::engine::host_net::Readiness;
use vunet::frame::QueuePair;
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

use crate::frames::{Seen, guest, world};
use crate::rig::{FAILED, Peer, READABLE, Rig, Setup, WORLD_FIN, connected, ms, only, pattern, secs};
use crate::world::End;

const TSO: GuestOffloads =
    GuestOffloads { checksum: true, tso4: true, tso6: false, ecn: false, uso4: false, uso6: false };

fn flow(rig: &mut Rig) -> Peer {
    connected(rig, Peer::new(guest(4000), world(80)))
}

/// The world sends `bytes`; what reaches the guest is returned.
fn world_sends(rig: &mut Rig, bytes: &[u8]) -> Vec<Seen> {
    rig.conn(0).queue.extend(bytes);
    rig.stream_ready(0, READABLE)
}

fn retransmits(rig: &Rig) -> u64 {
    rig.engine.counters().retransmits
}

#[test]
fn bytes_stay_in_the_socket_until_the_guest_acknowledged_them() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let bytes = pattern(5000);
    let seen = world_sends(&mut rig, &bytes);
    assert_eq!(seen.len(), 4);
    assert_eq!(peer.take(seen), bytes);
    assert_eq!(rig.conn(0).discarded, 0);
    let half = Peer { ack: peer.ack - 2500, ..peer };
    half.acknowledge(&mut rig);
    assert_eq!(rig.conn(0).discarded, 2500);
    peer.acknowledge(&mut rig);
    assert_eq!(rig.conn(0).discarded, 5000);
    assert_eq!(rig.engine.counters().payload_to_guest_bytes, 5000);
}

#[test]
fn only_the_last_segment_at_hand_is_pushed() {
    let mut rig = Rig::new();
    flow(&mut rig);
    let pushed: Vec<bool> =
        world_sends(&mut rig, &pattern(3000)).into_iter().map(|s| s.tcp().has(Flags::PSH)).collect();
    assert_eq!(pushed, [false, false, true]);
}

#[test]
fn data_carries_the_acknowledgement_that_is_owed() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    rig.conn(0).queue.extend(b"answer");
    let token = rig.conn(0).token;
    rig.feed(&peer.seg(Flags::ACK, b"question").frame());
    let seen = rig.ready(token, READABLE);
    let segment = only(seen).tcp();
    assert_eq!((segment.header.ack.0, &segment.payload[..]), (peer.seq + 8, &b"answer"[..]));
}

#[test]
fn offloads_decide_checksums_and_frame_sizes() {
    let checksum = GuestOffloads { checksum: true, ..GuestOffloads::default() };
    let tso_alone = GuestOffloads { tso4: true, ..GuestOffloads::default() };
    for (offloads, frames) in [(GuestOffloads::default(), 28), (checksum, 28), (tso_alone, 28), (TSO, 1)] {
        let mut rig = Rig::with(Setup { offloads, ..Setup::default() });
        let mut peer = flow(&mut rig);
        rig.conn(0).queue.extend(pattern(40_000));
        let token = rig.conn(0).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        while rig.engine.flush(&mut rig.port) {}
        assert_eq!(rig.port.delivered.len(), frames, "{offloads:?}");
        for received in &rig.port.delivered {
            let partial = Checksum::Partial { start: 34, offset: 16 };
            assert_eq!(received.vnet.checksum == partial, offloads.checksum);
            let size_bytes = 1460;
            let gso = Gso { kind: GsoKind::Tcp4, size_bytes, headers_bytes: 54, ecn: false };
            assert_eq!(received.vnet.gso, (frames == 1).then_some(gso));
        }
        let seen = rig.take();
        assert_eq!(peer.take(seen), pattern(40_000));
    }
}

#[test]
fn the_largest_segmented_frame_is_an_ip_packet_of_65535_bytes() {
    let mut rig = Rig::with(Setup { offloads: TSO, ..Setup::default() });
    let mut peer = connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4000), world(80)) });
    rig.conn(0).queue.extend(pattern(200_000));
    let token = rig.conn(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    while rig.engine.flush(&mut rig.port) {}
    let largest = rig.port.delivered.iter().map(|received| received.frame.len()).max();
    assert_eq!(largest, Some(14 + 65_535));
    let seen = rig.take();
    assert_eq!(peer.take(seen), pattern(200_000));
}

#[test]
fn a_frame_of_one_segment_is_not_marked_for_cutting() {
    let mut rig = Rig::with(Setup { offloads: TSO, ..Setup::default() });
    flow(&mut rig);
    rig.conn(0).queue.extend(pattern(1460));
    let token = rig.conn(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    rig.engine.flush(&mut rig.port);
    assert_eq!(rig.port.delivered[0].vnet.gso, None);
}

#[test]
fn buffers_smaller_than_a_segment_get_smaller_segments() {
    let mut rig = Rig::with(Setup { ip_mtu: 9000, offloads: TSO, ..Setup::default() });
    rig.port.frame_bytes_max = 1514;
    let mut peer = connected(&mut rig, Peer { mss: Some(8960), ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(20_000));
    assert_eq!(peer.take(seen), pattern(20_000));
}

#[test]
fn the_guests_window_is_never_exceeded() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 4000, ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(20_000));
    let first = peer.take(seen);
    assert!(first.len() <= 4000 && first.len() > 2000, "{}", first.len());
    let mut received = first;
    while received.len() < 20_000 {
        let seen = peer.acknowledge(&mut rig);
        let more = peer.take(seen);
        assert!(more.len() <= 4000 && !more.is_empty());
        received.extend(more);
    }
    assert_eq!(received, pattern(20_000));
}

#[test]
fn a_window_that_closes_and_opens_again_resumes_at_once() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 1460, ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(5000));
    assert_eq!(peer.take(seen).len(), 1460);
    let closed = Peer { window: 0, ..peer };
    assert_eq!(closed.acknowledge(&mut rig), []);
    let open = Peer { window: 5000, ..peer };
    let seen = open.acknowledge(&mut rig);
    assert_eq!(peer.take(seen), pattern(5000)[1460..]);
}

/// Lets `time` pass while a guest of a closed window answers every probe; returns when probes came.
fn probed(rig: &mut Rig, peer: Peer, time: u64) -> Vec<u64> {
    let closed = Peer { window: 0, ..peer };
    let start = rig.now;
    let mut times = Vec::new();
    while rig.now.since(start) < secs(time) {
        for probe in rig.pass(ms(100)) {
            let probe = probe.tcp();
            assert!(!probe.has(Flags::RST), "given up after {:?}", rig.now.since(start));
            assert!(probe.payload.is_empty() || probe.header.seq.0 == peer.ack);
            times.push(rig.now.since(start).as_millis() as u64);
            assert_eq!(closed.acknowledge(rig), []);
        }
    }
    times
}

#[test]
fn a_closed_window_is_probed_ever_more_rarely_and_never_given_up_on() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 1460, ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(5000));
    peer.take(seen);
    Peer { window: 0, ..peer }.acknowledge(&mut rig);
    let times = probed(&mut rig, peer, 7200);
    assert!(times[0] <= 400, "{times:?}");
    assert!(times.len() < 140, "{} probes in two hours", times.len());
    let seen = peer.acknowledge(&mut rig);
    assert_eq!(peer.take(seen).len(), 1460);
}

#[test]
fn a_guest_that_closes_its_window_on_bytes_in_flight_is_probed_and_never_given_up_on() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    world_sends(&mut rig, &pattern(5000));
    // All of it lost for want of memory, which Linux tells by a closed window.
    assert_eq!(Peer { window: 0, ..peer }.acknowledge(&mut rig), []);
    let times = probed(&mut rig, peer, 7200);
    assert!(times.len() > 20 && times.len() < 160, "{} probes in two hours", times.len());
    let seen = peer.acknowledge(&mut rig);
    assert_eq!(peer.take(seen), pattern(5000), "all of it again once there is room");
    assert_eq!(peer.acknowledge(&mut rig), []);
    assert_eq!(rig.conn(0).discarded, 5000);
}

#[test]
fn a_guest_that_never_answers_probes_is_given_up_on() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 1460, ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(5000));
    peer.take(seen);
    Peer { window: 0, ..peer }.acknowledge(&mut rig);
    rig.pass(secs(3600));
    assert_eq!(rig.conn(0).end, End::Reset);
    rig.assert_empty();
}

#[test]
fn a_lost_segment_is_sent_again_after_pauses_that_double() {
    let mut rig = Rig::new();
    flow(&mut rig);
    let first = only(world_sends(&mut rig, b"data")).tcp();
    let start = rig.now;
    let mut times = Vec::new();
    for _ in 0..700 {
        for segment in rig.pass(ms(100)) {
            let segment = segment.tcp();
            assert_eq!((segment.header.seq, &segment.payload), (first.header.seq, &first.payload));
            times.push(rig.now.since(start).as_millis());
        }
    }
    assert_eq!(times, [200, 600, 1400, 3000, 6200, 12_600, 25_400, 51_000]);
    assert_eq!(retransmits(&rig), 8);
}

#[test]
fn a_guest_that_never_acknowledges_is_given_up_on_after_minutes() {
    let mut rig = Rig::new();
    flow(&mut rig);
    world_sends(&mut rig, b"data");
    let start = rig.now;
    let mut reset_after = None;
    while reset_after.is_none() {
        for segment in rig.pass(secs(1)) {
            if segment.tcp().has(Flags::RST) {
                reset_after = Some(rig.now.since(start));
            }
        }
        assert!(rig.now.since(start) < secs(3600), "never given up");
    }
    assert!(reset_after.expect("a reset") > secs(100), "RFC 9293, 3.8.3");
    assert_eq!(rig.conn(0).end, End::Reset);
    rig.assert_empty();
}

#[test]
fn three_duplicate_acknowledgements_send_again_once_a_loss() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_sends(&mut rig, &pattern(14_600));
    assert_eq!(seen.len(), 10);
    let lost = Peer { ..peer };
    for _ in 0..2 {
        assert_eq!(lost.acknowledge(&mut rig), []);
    }
    let seen = lost.acknowledge(&mut rig);
    assert_eq!(seen[0].clone().tcp().header.seq.0, peer.ack, "from the first byte missing");
    assert_eq!(retransmits(&rig), 1);
    for _ in 0..20 {
        assert_eq!(lost.acknowledge(&mut rig), [], "once");
    }
    assert_eq!(peer.take(seen), pattern(14_600));
    peer.acknowledge(&mut rig);
    assert_eq!(retransmits(&rig), 1);
    assert_eq!(rig.conn(0).discarded, 14_600);
    world_sends(&mut rig, &pattern(14_600));
    for _ in 0..2 {
        assert_eq!(peer.acknowledge(&mut rig), []);
    }
    assert!(!peer.acknowledge(&mut rig).is_empty(), "another loss is another matter");
    assert_eq!(retransmits(&rig), 2);
}

#[test]
fn acknowledgements_with_data_or_a_new_window_are_no_duplicates() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    world_sends(&mut rig, &pattern(2920));
    for n in 0..5 {
        Peer { window: 60_000 - n, ..peer }.acknowledge(&mut rig);
    }
    peer.window = 60_000 - 4;
    for _ in 0..5 {
        peer.data(&mut rig, Flags::PSH, b"x");
    }
    assert_eq!(retransmits(&rig), 0);
}

#[test]
fn bytes_are_read_on_to_the_end_of_the_stream_and_the_fin_goes_with_the_last() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).queue.extend(pattern(3000));
    rig.conn(0).fin_from_world = true;
    let seen = rig.stream_ready(0, WORLD_FIN);
    let fins: Vec<bool> = seen.iter().map(|s| s.clone().tcp().has(Flags::FIN)).collect();
    assert_eq!(fins, [false, false, true]);
    assert_eq!(peer.take(seen), pattern(3000));
    assert_eq!(peer.acknowledge(&mut rig), []);
    assert_eq!(rig.conn(0).discarded, 3000, "the FIN's number is no byte");
}

#[test]
fn short_reads_before_urgent_bytes_leave_nothing_behind() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).queue.extend(pattern(3000));
    rig.conn(0).peek_max = 1000;
    let seen = rig.stream_ready(0, Readiness { urgent: true, ..READABLE });
    assert_eq!(peer.take(seen), pattern(3000));
    // Where the kernel peeks from the front only, the mark is passed once all before it is discarded.
    rig.conn(0).queue.extend(pattern(500));
    rig.conn(0).peek_max = 0;
    assert_eq!(rig.stream_ready(0, READABLE), []);
    rig.conn(0).peek_max = usize::MAX;
    let seen = peer.acknowledge(&mut rig);
    assert_eq!(peer.take(seen), pattern(500));
}

#[test]
fn a_lost_fin_is_sent_again() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).queue.extend(b"bye");
    rig.conn(0).fin_from_world = true;
    let seen = rig.stream_ready(0, WORLD_FIN);
    assert_eq!(peer.take(seen), b"bye");
    let before = Peer { ack: peer.ack - 1, ..peer };
    before.acknowledge(&mut rig);
    let fin = only(rig.pass(ms(250))).tcp();
    assert!(fin.has(Flags::FIN) && fin.payload.is_empty());
    assert_eq!(fin.header.seq.0, peer.ack - 1);
    let none = Peer { ack: peer.ack - 4, ..peer };
    assert_eq!(none.acknowledge(&mut rig), [], "an old acknowledgement says nothing");
}

#[test]
fn a_fin_behind_a_closed_window_follows_when_it_opens() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 3, ..Peer::new(guest(4000), world(80)) });
    rig.conn(0).queue.extend(b"bye");
    rig.conn(0).fin_from_world = true;
    let seen = rig.stream_ready(0, WORLD_FIN);
    assert_eq!(peer.take(seen), b"bye");
    Peer { window: 0, ..peer }.acknowledge(&mut rig);
    let times = probed(&mut rig, peer, 3600);
    assert!(times.len() < 80, "{} probes in an hour", times.len());
    let seen = peer.acknowledge(&mut rig);
    assert!(only(seen.clone()).tcp().has(Flags::FIN));
    peer.take(seen);
    peer.window = 0;
    assert_eq!(peer.acknowledge(&mut rig), []);
    assert!(rig.wakeups(secs(3600)) <= 2, "a half-closed flow is idle whatever its window");
}

#[test]
fn a_world_that_resets_is_seen_as_reset_after_what_it_sent() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    rig.conn(0).queue.extend(b"last words");
    rig.conn(0).error = Some(libc::ECONNRESET);
    let mut seen = rig.stream_ready(0, FAILED);
    let reset = seen.pop().expect("a reset").tcp();
    assert!(reset.has(Flags::RST) && !reset.has(Flags::FIN));
    assert_eq!(peer.take(seen), b"last words");
    assert_eq!(reset.header.seq.0, peer.ack);
    rig.assert_empty();
}

#[test]
fn a_reset_the_guest_missed_is_repeated_to_its_next_segment_where_it_counts() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    world_sends(&mut rig, b"lost");
    rig.conn(0).error = Some(libc::ECONNRESET);
    rig.stream_ready(0, FAILED);
    let reset = only(peer.acknowledge(&mut rig)).tcp();
    assert_eq!((reset.header.flags, reset.header.seq.0), (Flags::RST, peer.ack));
}

#[test]
fn an_idle_flow_is_asked_after_two_hours_whether_it_lives() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    assert_eq!(rig.pass(secs(7199)), []);
    let probe = only(rig.pass(secs(2))).tcp();
    assert_eq!((probe.header.flags, probe.header.seq.0), (Flags::ACK, peer.ack.wrapping_sub(1)));
    assert_eq!(peer.acknowledge(&mut rig), []);
    assert_eq!(rig.pass(secs(7198)), [], "an answer starts the two hours again");
    assert_eq!(rig.pass(secs(3)).len(), 1);
    let mut seen = rig.pass(secs(75 * 10));
    assert!(seen.pop().expect("a reset").tcp().has(Flags::RST));
    assert_eq!(seen.len(), 8, "nine probes in all");
    assert_eq!(rig.conn(0).end, End::Reset, "a dead guest is no clean end");
    rig.assert_empty();
}

#[test]
fn an_idle_guest_with_a_closed_window_that_answers_lives() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer { window: 1460, ..Peer::new(guest(4000), world(80)) });
    let seen = world_sends(&mut rig, &pattern(1000));
    peer.take(seen);
    peer.window = 0;
    peer.acknowledge(&mut rig);
    // A stopped process: nothing more for it, no room, and its kernel answers.
    for _ in 0..40 {
        for probe in rig.pass(secs(600)) {
            assert!(!probe.tcp().has(Flags::RST), "a guest that answers lives");
            peer.acknowledge(&mut rig);
        }
    }
    assert_eq!(rig.conn(0).end, End::Open);
}

#[test]
fn an_idle_flow_wakes_nobody_in_between() {
    let mut rig = Rig::new();
    let mut peer = flow(&mut rig);
    let seen = world_sends(&mut rig, b"data");
    peer.take(seen);
    peer.acknowledge(&mut rig);
    peer.data(&mut rig, Flags::PSH, b"data");
    assert!(rig.wakeups(secs(7000)) <= 2, "deadlines of before may come up once, to be moved");
}

#[test]
fn a_process_that_stood_still_for_hours_asks_each_flow_once_and_ends_none() {
    let mut rig = Rig::new();
    let mut peers: Vec<Peer> =
        (0..300).map(|n| connected(&mut rig, Peer::new(guest(4000 + n), world(80)))).collect();
    // A third with bytes in flight, a third with bytes the guest has no window for.
    for (n, peer) in peers.iter_mut().enumerate() {
        if n % 3 == 1 {
            peer.window = 0;
            peer.acknowledge(&mut rig);
        }
        if n % 3 > 0 {
            rig.conn(n).queue.extend(b"bytes");
            rig.stream_ready(n, READABLE);
        }
    }
    // Stopped, or the whole host asleep on a clock that went on: all deadlines are hours past.
    rig.now = rig.now + secs(9 * 3600);
    rig.engine.run_timers(rig.now, &mut rig.port);
    let seen = rig.flush();
    assert_eq!(seen.len(), peers.len(), "one question or repetition a flow");
    assert!(rig.engine.next_deadline().is_some_and(|at| at > rig.now), "nothing is due again at once");
    for (n, peer) in peers.iter_mut().enumerate() {
        if n % 3 == 2 {
            peer.ack = peer.ack.wrapping_add(5);
        }
        peer.window = 0xffff;
        let seen = peer.acknowledge(&mut rig);
        assert_eq!(peer.take(seen), if n % 3 == 1 { &b"bytes"[..] } else { b"" });
        peer.acknowledge(&mut rig);
        peer.data(&mut rig, Flags::PSH, b"alive");
        let conn = rig.conn(n);
        assert_eq!((&conn.taken[..], conn.end), (&b"alive"[..], End::Open));
    }
    // What is left to acknowledge, and then nothing.
    assert!(rig.pass(secs(1)).into_iter().all(|seen| seen.tcp().header.ack.0 == peers[0].seq));
    assert_eq!(rig.pass(secs(600)), []);
    assert_eq!(rig.engine.nat().len(), peers.len());
}

#[test]
fn flows_take_turns() {
    let mut rig = Rig::new();
    let mut first = connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4000), world(80)) });
    let mut second = connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4001), world(80)) });
    rig.conn(0).queue.extend(pattern(100_000));
    rig.conn(1).queue.extend(b"short");
    let one = rig.conn(0).token;
    let other = rig.conn(1).token;
    for token in [one, other] {
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    }
    assert!(!rig.engine.flush(&mut rig.port), "all of it fits one batch");
    let seen: Vec<_> = rig.take().into_iter().map(|s| (s.clone().tcp().to.port(), s)).collect();
    let short_at = seen.iter().position(|(port, _)| *port == 4001).expect("the short one's frame");
    assert_eq!(short_at, vunet::limits::FLOW_TURN_FRAMES, "after one turn of the long one");
    let (mine, yours): (Vec<_>, Vec<_>) = seen.into_iter().partition(|(port, _)| *port == 4000);
    assert_eq!(second.take(yours.into_iter().map(|(_, s)| s).collect()), b"short");
    assert_eq!(first.take(mine.into_iter().map(|(_, s)| s).collect()), pattern(100_000));
}

#[test]
fn a_batch_ends_before_the_ring_is_full() {
    let mut rig = Rig::new();
    for n in 0..12 {
        connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4000 + n), world(80)) });
    }
    for n in 0..12 {
        rig.conn(n).queue.extend(pattern(100_000));
        let token = rig.conn(n).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    }
    assert!(rig.engine.flush(&mut rig.port), "there is more");
    let bytes: usize = rig.take().into_iter().map(|s| s.tcp().payload.len()).sum();
    let turn = vunet::limits::FLOW_TURN_FRAMES * 1460;
    let batch = vunet::limits::BATCH_BYTES as usize;
    assert!((batch..batch + turn).contains(&bytes), "{bytes}");
}

#[test]
fn a_flow_answers_on_the_queue_pair_the_guest_used_last() {
    let mut rig = Rig::new();
    let peer = flow(&mut rig);
    for pair in [QueuePair(3), QueuePair(1)] {
        rig.feed_on(pair, VnetHeader::default(), &peer.seg(Flags::ACK, &[]).frame());
        rig.conn(0).queue.extend(b"x");
        let token = rig.conn(0).token;
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
        rig.engine.flush(&mut rig.port);
        let received = rig.port.delivered.pop_front().expect("a frame");
        assert_eq!(received.pair, pair);
    }
}

/// A guest whose ring is full most of the time: each turn takes what was posted.
#[test]
fn flows_that_lack_buffers_share_them_in_turn() {
    let mut rig = Rig::new();
    let mut peers: Vec<Peer> = (0..3)
        .map(|n| connected(&mut rig, Peer { shift: Some(7), ..Peer::new(guest(4000 + n), world(80)) }))
        .collect();
    for n in 0..3 {
        rig.conn(n).queue.extend(pattern(400_000));
    }
    rig.port.free = 8;
    let tokens: Vec<_> = (0..3).map(|n| rig.conn(n).token).collect();
    for token in tokens {
        rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    }
    let mut seen = rig.flush();
    let mut bytes = [0usize; 3];
    for _ in 0..60 {
        for segment in std::mem::take(&mut seen) {
            let segment = segment.tcp();
            let n = usize::from(segment.to.port() - 4000);
            bytes[n] += segment.payload.len();
            peers[n].ack = segment.header.seq.0.wrapping_add(segment.payload.len() as u32);
        }
        // The first flow is acknowledged far more often than the others; that gains it nothing.
        for n in [0, 0, 1, 0, 2, 0] {
            seen.extend(peers[n].acknowledge(&mut rig));
        }
        seen.extend(rig.post_buffers(8));
    }
    let (least, most) = (*bytes.iter().min().unwrap(), *bytes.iter().max().unwrap());
    assert!(least * 10 >= most * 8, "{bytes:?}");
}
