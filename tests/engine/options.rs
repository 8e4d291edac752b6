//! Selective acknowledgement and timestamps, segment by segment: RFC 2018, RFC 6675, RFC 7323, and the
//! range of acknowledgements RFC 5961 accepts.

use vunet::engine::counters::DropReason;
use vunet::engine::guest_port::GuestOffloads;
use vunet::limits;
use vunet::wire::tcp::{Flags, Options, SeqNumber};

use crate::frames::{Seen, Seg, TcpSeen, guest, world};
use crate::rig::{Peer, READABLE, Rig, Setup, WRITABLE, ms, only, pattern};

const TSO: GuestOffloads =
    GuestOffloads { checksum: true, tso4: true, tso6: false, ecn: false, uso4: false, uso6: false };
const SACK: Options = offer(true, None);

const fn offer(sack_permitted: bool, timestamps: Option<(u32, u32)>) -> Options {
    Options { mss: Some(1460), window_scale: Some(7), sack_permitted, timestamps, sack: [None; 4] }
}

fn with(options: Options, seg: Seg<'_>) -> Vec<u8> {
    Seg { options, ..seg }.frame()
}

fn stamped(value: u32) -> Options {
    Options { timestamps: Some((value, 0)), ..Options::default() }
}

/// A flow whose guest offers `options`; the engine's SYN-ACK comes with it.
fn flow(rig: &mut Rig, options: Options) -> (Peer, TcpSeen) {
    let mut peer = Peer { shift: options.window_scale, ..Peer::new(guest(4000), world(80)) };
    rig.send(&with(options, peer.seg(Flags::SYN, &[])));
    let syn_ack = only(rig.stream_ready(0, WRITABLE)).tcp();
    peer.seq += 1;
    peer.ack = syn_ack.header.seq.0.wrapping_add(1);
    let answer = Options { timestamps: options.timestamps, ..Options::default() };
    assert_eq!(rig.send(&with(answer, peer.seg(Flags::ACK, &[]))), []);
    (peer, syn_ack)
}

/// Segments from the world: `(first byte, length)` from the peer's next one on.
fn places(peer: &Peer, seen: Vec<Seen>) -> Vec<(u32, usize)> {
    let place = |seen: Seen| {
        let seen = seen.tcp();
        (seen.header.seq.0.wrapping_sub(peer.ack), seen.payload.len())
    };
    seen.into_iter().map(place).collect()
}

/// An acknowledgement of the peer's next byte that says it holds `blocks` beyond.
fn holds(peer: &Peer, blocks: &[(u32, u32)]) -> Vec<u8> {
    let mut options = Options::default();
    for (slot, (left, right)) in options.sack.iter_mut().zip(blocks) {
        *slot = Some((SeqNumber(peer.ack) + *left as usize, SeqNumber(peer.ack) + *right as usize));
    }
    with(options, peer.seg(Flags::ACK, &[]))
}

#[test]
fn selective_acknowledgement_and_timestamps_are_used_only_if_the_guest_offers_them() {
    for (sack, timestamps) in [(false, None), (true, None), (false, Some((7, 0))), (true, Some((7, 0)))] {
        let (_, syn_ack) = flow(&mut Rig::new(), offer(sack, timestamps));
        let options = syn_ack.header.options;
        assert_eq!(options.sack_permitted, sack);
        assert_eq!(options.timestamps.map(|(_, echo)| echo), timestamps.map(|(value, _)| value));
    }
}

#[test]
fn bytes_beyond_a_hole_are_named_newest_first() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, SACK);
    let bytes = pattern(10_000);
    let at = |n: usize| SeqNumber(peer.seq) + n;
    let mut said = Vec::new();
    for begin in [1000, 5000, 3000, 6000] {
        let sent = Peer { seq: peer.seq + begin as u32, ..peer };
        let seen = rig.send(&sent.seg(Flags::ACK, &bytes[begin..begin + 1000]).frame());
        let header = only(seen).tcp().header;
        assert_eq!(header.ack.0, peer.seq);
        said.push(header.options.sack);
    }
    assert_eq!(said[0], [Some((at(1000), at(2000))), None, None, None]);
    assert_eq!(said[1], [Some((at(5000), at(6000))), Some((at(1000), at(2000))), None, None]);
    let third = [Some((at(3000), at(4000))), Some((at(1000), at(2000))), Some((at(5000), at(6000))), None];
    assert_eq!(said[2], third);
    let fourth = [Some((at(5000), at(7000))), Some((at(1000), at(2000))), Some((at(3000), at(4000))), None];
    assert_eq!(said[3], fourth, "blocks that touch are one");
    let seen = rig.send(&peer.seg(Flags::ACK, &bytes[..1000]).frame());
    let header = only(seen).tcp().header;
    assert_eq!(header.ack, at(2000));
    let left: Vec<_> = header.options.sack.iter().flatten().copied().collect();
    assert_eq!(left.len(), 2, "what was filled in is named no more");
}

#[test]
fn a_guest_that_did_not_offer_it_is_named_no_blocks() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, offer(false, None));
    let sent = Peer { seq: peer.seq + 1000, ..peer };
    let header = only(rig.send(&sent.seg(Flags::ACK, b"beyond").frame())).tcp().header;
    assert_eq!(header.options, Options::default());
}

#[test]
fn bytes_only_their_socket_is_awaited_for_are_no_block() {
    let mut rig = Rig::new();
    rig.world().room = 500;
    let (mut peer, _) = flow(&mut rig, SACK);
    let header = only(peer.data(&mut rig, Flags::PSH, &pattern(400))).tcp().header;
    assert_eq!(header.options, Options::default());
    let header = only(peer.data(&mut rig, Flags::PSH, &pattern(90))).tcp().header;
    assert_eq!(header.options, Options::default());
}

#[test]
fn only_what_the_guest_lacks_is_sent_again() {
    for offloads in [GuestOffloads::default(), TSO] {
        let mut rig = Rig::with(Setup { offloads, ..Setup::default() });
        let (peer, _) = flow(&mut rig, SACK);
        rig.conn(0).queue.extend(pattern(14_600));
        rig.stream_ready(0, READABLE);
        // The first, the fourth and the fifth segment are lost, and the last two perhaps under way.
        assert_eq!(rig.send(&holds(&peer, &[(1460, 2920)])), [], "one segment may have overtaken another");
        let seen = rig.send(&holds(&peer, &[(7300, 11_680), (1460, 4380)]));
        let again: usize = seen.iter().map(|seen| seen.clone().tcp().payload.len()).sum();
        let places = places(&peer, seen);
        assert_eq!((places[0], again), ((0, 1460), 3 * 1460), "{places:?}");
        assert_eq!(places[1].0, 4380);
        assert_eq!(rig.send(&holds(&peer, &[(7300, 11_680), (1460, 4380)])), [], "once");
        assert_eq!(rig.engine.counters().retransmits, 1);
    }
}

#[test]
fn a_hole_that_shows_during_recovery_is_sent_again_too() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, SACK);
    rig.conn(0).queue.extend(pattern(14_600));
    rig.stream_ready(0, READABLE);
    let seen = rig.send(&holds(&peer, &[(1460, 7300)]));
    assert_eq!(places(&peer, seen), [(0, 1460)]);
    let seen = rig.send(&holds(&peer, &[(8760, 13_140), (1460, 7300)]));
    assert_eq!(places(&peer, seen), [(7300, 1460)]);
    let done = Peer { ack: peer.ack + 14_600, ..peer };
    assert_eq!(done.acknowledge(&mut rig), []);
    assert_eq!(rig.conn(0).discarded, 14_600);
}

#[test]
fn new_bytes_follow_what_was_sent_again() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, SACK);
    rig.conn(0).queue.extend(pattern(14_600));
    rig.stream_ready(0, READABLE);
    rig.conn(0).queue.extend(pattern(100));
    let token = rig.conn(0).token;
    rig.feed(&holds(&peer, &[(1460, 8760)]));
    let seen = rig.ready(token, READABLE);
    assert_eq!(places(&peer, seen), [(0, 1460), (14_600, 100)]);
}

#[test]
fn a_time_out_sends_all_again_whatever_the_guest_said_it_holds() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, SACK);
    rig.conn(0).queue.extend(pattern(4380));
    rig.stream_ready(0, READABLE);
    assert_eq!(rig.send(&holds(&peer, &[(2920, 4380)])), []);
    let seen = rig.pass(ms(250));
    assert_eq!(places(&peer, seen), [(0, 1460), (1460, 1460), (2920, 1460)]);
}

#[test]
fn blocks_a_guest_invents_harm_nobody() {
    let mut rig = Rig::new();
    let (mut peer, _) = flow(&mut rig, SACK);
    rig.conn(0).queue.extend(pattern(2920));
    let seen = rig.stream_ready(0, READABLE);
    for block in [(0, 2921), (u32::MAX - 9000, 500), (500, 400), (7, 7), (5000, 90_000)] {
        let again: usize =
            rig.send(&holds(&peer, &[block; 4])).into_iter().map(|seen| seen.tcp().payload.len()).sum();
        assert!(again <= 2920, "at most what was in flight");
    }
    for n in 0..2 * limits::TCP_SACKED_RANGES_MAX as u32 {
        rig.send(&holds(&peer, &[(n * 8 + 1, n * 8 + 2)]));
    }
    assert_eq!(peer.take(seen), pattern(2920));
    peer.acknowledge(&mut rig);
    assert_eq!(rig.conn(0).discarded, 2920);
}

#[test]
fn every_segment_carries_timestamps_that_echo_the_guests_and_go_on() {
    let mut rig = Rig::with(Setup { offloads: TSO, ..Setup::default() });
    let (peer, syn_ack) = flow(&mut rig, offer(false, Some((500, 0))));
    let (first, _) = syn_ack.header.options.timestamps.expect("timestamps");
    rig.pass(ms(40));
    rig.send(&with(stamped(540), peer.seg(Flags::ACK, b"question")));
    rig.conn(0).queue.extend(pattern(4000));
    let token = rig.conn(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    while rig.engine.flush(&mut rig.port) {}
    let vnet = rig.port.delivered.back().expect("a frame").vnet;
    let gso = vnet.gso.expect("a frame to be cut");
    assert_eq!((gso.size_bytes, gso.headers_bytes), (1448, 66), "options take from the segment's size");
    let seen = rig.take();
    let (value, echo) =
        seen.last().expect("data").clone().tcp().header.options.timestamps.expect("timestamps");
    assert_eq!((value.wrapping_sub(first), echo), (40, 540));
}

#[test]
fn a_segment_of_full_size_with_timestamps_fits_the_mtu() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, offer(true, Some((1, 0))));
    rig.conn(0).queue.extend(pattern(2896));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(places(&peer, seen), [(0, 1448), (1448, 1448)]);
}

#[test]
fn an_old_duplicate_is_answered_and_not_taken() {
    for (start, newer, older) in [(500, 600, 599), (u32::MAX - 10, 5, u32::MAX)] {
        let mut rig = Rig::new();
        let (mut peer, _) = flow(&mut rig, offer(false, Some((start, 0))));
        rig.send(&with(stamped(newer), peer.seg(Flags::ACK, &pattern(1460))));
        peer.seq += 1460;
        let answer = only(rig.send(&with(stamped(older), peer.seg(Flags::ACK, b"stale")))).tcp();
        assert_eq!((answer.header.ack.0, rig.conn(0).taken.len()), (peer.seq, 1460));
        assert_eq!(rig.dropped(DropReason::OldTimestamp), 1);
        rig.send(&with(stamped(newer), peer.seg(Flags::ACK | Flags::PSH, b"fresh")));
        assert_eq!(rig.conn(0).taken.len(), 1465);
    }
}

#[test]
fn a_segment_without_the_timestamps_agreed_on_is_dropped_but_a_reset_is_not() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, offer(false, Some((500, 0))));
    assert_eq!(rig.send(&peer.seg(Flags::ACK, b"bare").frame()), []);
    assert!(rig.conn(0).taken.is_empty());
    assert_eq!(rig.dropped(DropReason::OldTimestamp), 1);
    rig.send(&peer.seg(Flags::RST, &[]).frame());
    rig.assert_empty();
}

#[test]
fn timestamps_of_a_flow_idle_for_25_days_prove_nothing() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, offer(false, Some((500, 0))));
    rig.now = rig.now + ms(25 * 86_400_000);
    rig.send(&with(stamped(499), peer.seg(Flags::ACK | Flags::PSH, b"still here")));
    assert_eq!(rig.conn(0).taken, b"still here");
}

#[test]
fn an_acknowledgement_from_before_any_window_is_challenged_and_its_bytes_not_taken() {
    let mut rig = Rig::new();
    let (peer, _) = flow(&mut rig, SACK);
    let window = u32::from(peer.window) << 7;
    let within = Peer { ack: peer.ack - window, ..peer };
    rig.send(&within.seg(Flags::ACK | Flags::PSH, b"in").frame());
    assert_eq!(rig.conn(0).taken, b"in");
    let forged = Peer { ack: peer.ack - window - 1, seq: peer.seq + 2, ..peer };
    let answer = only(rig.send(&forged.seg(Flags::ACK | Flags::PSH, b"jected").frame())).tcp();
    assert_eq!((answer.header.ack.0, answer.header.seq.0), (peer.seq + 2, peer.ack));
    assert_eq!(rig.conn(0).taken, b"in");
}
