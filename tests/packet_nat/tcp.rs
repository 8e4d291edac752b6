//! What the tracker makes of segments: conversations line by line, and two honest ends over a bad network.

use std::time::Duration;

use proptest::prelude::*;

use vunet::engine::packet::tcp_state::{Direction, Segment, TcpState, TcpTimeouts, TcpTracker, TcpVerdict};
use vunet::wire::tcp::{Flags, SeqNumber};

use crate::config;

use Direction::{Original, Reply};
use TcpState::{
    CloseWait, Closed, Established, FinWait, LastAck, SynReceived, SynSent, SynSentBoth, TimeWait,
};
use TcpVerdict::{Accepted, Invalid, Unproven};

const SYN: Flags = Flags::SYN;
const ACK: Flags = Flags::ACK;
const RST: Flags = Flags::RST;

fn synack() -> Flags {
    SYN | ACK
}

fn fin() -> Flags {
    Flags::FIN | ACK
}

fn segment(flags: Flags, seq: u32, ack: u32, payload_bytes: u32) -> Segment {
    let (seq, ack) = (SeqNumber(seq), SeqNumber(ack));
    Segment { seq, ack, flags, window: 1000, payload_bytes, window_scale: None }
}

/// Who sends, flags, sequence number, acknowledgement, payload; what it is, and the state behind it.
type Line = (Direction, Flags, u32, u32, u32, TcpVerdict, TcpState);

/// Plays a conversation that begins with its first line.
#[track_caller]
fn play(lines: &[Line]) -> TcpTracker {
    play_on(None, lines)
}

#[track_caller]
fn play_on(begun: Option<TcpTracker>, lines: &[Line]) -> TcpTracker {
    let mut tracker = begun;
    for (n, &(from, flags, seq, ack, len, verdict, state)) in lines.iter().enumerate() {
        let segment = segment(flags, seq, ack, len);
        let got = match &mut tracker {
            Some(tracker) => tracker.take(from, &segment, false),
            None => {
                tracker = TcpTracker::begin(&segment, true);
                if tracker.is_some() { Accepted } else { Invalid }
            }
        };
        let after = tracker.as_ref().map(TcpTracker::state);
        assert_eq!((got, after), (verdict, Some(state)), "line {n}: {from:?} {flags:?} {seq} {ack} {len}");
    }
    tracker.expect("a first line")
}

/// The client's numbers begin at 100, the server's at 500.
fn handshake() -> TcpTracker {
    play(&[
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, synack(), 500, 101, 0, Accepted, SynReceived),
        (Original, ACK, 101, 501, 0, Accepted, Established),
    ])
}

#[test]
fn a_whole_life_of_a_connection() {
    let tracker = play_on(
        Some(handshake()),
        &[
            (Original, ACK, 101, 501, 50, Accepted, Established),
            (Reply, ACK, 501, 151, 900, Accepted, Established),
            (Original, ACK, 151, 1401, 0, Accepted, Established),
            (Original, fin(), 151, 1401, 0, Accepted, FinWait),
            (Reply, ACK, 1401, 152, 0, Accepted, CloseWait),
            // Half closed: the other end may send on.
            (Reply, ACK, 1401, 152, 700, Accepted, CloseWait),
            (Original, ACK, 152, 2101, 0, Accepted, CloseWait),
            (Reply, fin(), 2101, 152, 0, Accepted, LastAck),
            (Original, ACK, 152, 2102, 0, Accepted, TimeWait),
            // The last ACK was lost.
            (Reply, fin(), 2101, 152, 0, Accepted, TimeWait),
            (Original, ACK, 152, 2102, 0, Accepted, TimeWait),
        ],
    );
    assert!(handshake().is_assured() && !tracker.is_assured(), "what is over makes room first");
}

#[test]
fn segments_of_unknown_length_are_not_held_against_their_windows() {
    let mut tracker = handshake();
    tracker.loosen();
    play_on(
        Some(tracker),
        &[
            (Original, ACK, 101, 501, 8, Accepted, Established),
            // It acknowledges what came in later fragments.
            (Reply, ACK, 501, 2901, 0, Accepted, Established),
            (Original, ACK, 2901, 501, 8, Accepted, Established),
            (Reply, RST, 600, 0, 0, Unproven, Established),
            (Reply, RST, 501, 0, 0, Accepted, Closed),
        ],
    );
}

#[test]
fn both_ends_close_at_once() {
    play_on(
        Some(handshake()),
        &[
            (Original, fin(), 101, 501, 0, Accepted, FinWait),
            (Reply, fin(), 501, 101, 0, Accepted, LastAck),
            (Original, ACK, 102, 502, 0, Accepted, LastAck),
            (Reply, ACK, 502, 102, 0, Accepted, TimeWait),
        ],
    );
}

#[test]
fn both_ends_open_at_once() {
    play(&[
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, SYN, 500, 0, 0, Accepted, SynSentBoth),
        (Reply, SYN, 500, 0, 0, Accepted, SynSentBoth),
        (Original, synack(), 100, 501, 0, Accepted, SynReceived),
        (Reply, synack(), 500, 101, 0, Accepted, Established),
        (Original, ACK, 101, 501, 300, Accepted, Established),
        (Reply, ACK, 501, 401, 300, Accepted, Established),
    ]);
}

#[test]
fn lost_and_repeated_handshakes() {
    play(&[
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, synack(), 500, 101, 0, Accepted, SynReceived),
        // It was lost behind the NAT.
        (Original, SYN, 100, 0, 0, Unproven, SynReceived),
        (Reply, synack(), 500, 101, 0, Unproven, SynReceived),
        (Original, ACK, 101, 501, 10, Accepted, Established),
        (Reply, synack(), 500, 101, 0, Unproven, Established),
        (Original, ACK, 101, 501, 10, Accepted, Established),
        (Reply, ACK, 501, 111, 10, Accepted, Established),
    ]);
}

#[test]
fn segments_outside_of_the_windows_are_invalid() {
    let open = handshake();
    for (from, flags, seq, ack, len, verdict) in [
        // Windows are 1000 bytes.
        (Original, ACK, 1100, 501, 1, Accepted),
        (Original, ACK, 1101, 501, 0, Accepted),
        // One behind a full window: a FIN may have filled it.
        (Original, ACK, 1102, 501, 0, Accepted),
        (Original, ACK, 1103, 501, 0, Invalid),
        (Original, ACK, 0u32.wrapping_sub(901), 501, 1, Accepted),
        (Original, ACK, 0u32.wrapping_sub(902), 501, 1, Unproven),
        (Original, ACK, 101, 502, 0, Invalid),
        (Reply, ACK, 1503, 101, 1, Invalid),
        (Reply, ACK, 501, 102, 1, Invalid),
        (Reply, ACK, 501, 101u32.wrapping_sub(66_001), 1, Unproven),
        (Reply, fin(), 1503, 101, 0, Invalid),
        // A keepalive asks from one byte back.
        (Reply, ACK, 500, 101, 0, Accepted),
    ] {
        let mut tracker = open;
        let segment = segment(flags, seq, ack, len);
        assert_eq!(tracker.take(from, &segment, false), verdict, "{from:?} {seq} {ack} {len}");
        assert!(verdict == Accepted || tracker == open, "what is not accepted changes nothing");
        let mut liberal = open;
        assert_eq!(liberal.take(from, &segment, true), Accepted, "liberal: {from:?} {seq} {ack} {len}");
    }
}

#[test]
fn windows_are_scaled_only_if_both_ends_offered_it() {
    for (client, server, reaches) in [(Some(7), Some(3), 3000), (None, Some(3), 1001), (Some(7), None, 1001)]
    {
        let offering =
            |flags, seq, ack, window_scale| Segment { window_scale, ..segment(flags, seq, ack, 0) };
        let mut tracker = TcpTracker::begin(&offering(SYN, 100, 0, client), false).unwrap();
        assert_eq!(tracker.take(Reply, &offering(synack(), 500, 101, server), false), Accepted);
        // A window in SYN is never scaled.
        let before = Segment { window: 375, ..segment(ACK, 101, 501, 0) };
        assert_eq!(tracker.take(Original, &before, false), Accepted);
        assert_eq!(tracker.take(Original, &segment(ACK, 1103, 501, 0), false), Invalid);
        // What the server offers behind its SYN is.
        let offer = Segment { window: 375, ..segment(ACK, 501, 101, 0) };
        assert_eq!(tracker.take(Reply, &offer, false), Accepted);
        assert_eq!(tracker.take(Original, &segment(ACK, 101 + reaches + 2, 501, 0), false), Invalid);
        let reached = if reaches == 3000 { 101 + 3000 } else { 1101 };
        assert_eq!(tracker.take(Original, &segment(ACK, reached, 501, 0), false), Accepted);
    }
}

#[test]
fn a_reset_must_be_exact_to_count() {
    let open = play_on(
        Some(handshake()),
        &[
            (Original, ACK, 101, 501, 200, Accepted, Established),
            (Reply, ACK, 501, 101, 0, Accepted, Established),
        ],
    );
    for (from, seq, verdict, state) in [
        // What the peer acknowledged, and what was sent.
        (Original, 101, Accepted, Closed),
        (Original, 301, Accepted, Closed),
        (Reply, 501, Accepted, Closed),
        (Original, 200, Unproven, Established),
        (Original, 1101, Unproven, Established),
        (Original, 1102, Invalid, Established),
        (Original, 100, Invalid, Established),
        (Reply, 1501, Unproven, Established),
        (Reply, 1502, Invalid, Established),
        (Reply, 500, Invalid, Established),
    ] {
        let mut tracker = open;
        let reset = segment(RST, seq, 0, 0);
        assert_eq!((tracker.take(from, &reset, false), tracker.state()), (verdict, state), "{from:?} {seq}");
        let mut liberal = open;
        assert_eq!(liberal.take(from, &reset, true), verdict, "resets are checked whatever else is not");
    }
}

#[test]
fn resets_of_handshakes() {
    let opening = play(&[(Original, SYN, 100, 0, 0, Accepted, SynSent)]);
    let refused = RST | ACK;
    play_on(Some(opening), &[(Reply, refused, 0, 101, 0, Accepted, Closed)]);
    play_on(Some(opening), &[(Reply, refused, 0, 102, 0, Invalid, SynSent)]);
    play_on(Some(opening), &[(Reply, refused, 0, 100, 0, Invalid, SynSent)]);
    play_on(Some(opening), &[(Reply, RST, 0, 101, 0, Invalid, SynSent)]);
    play_on(Some(opening), &[(Original, RST, 101, 0, 0, Accepted, Closed)]);
    let answered = play_on(Some(opening), &[(Reply, synack(), 500, 101, 0, Accepted, SynReceived)]);
    play_on(Some(answered), &[(Original, RST, 101, 0, 0, Accepted, Closed)]);
    play_on(Some(answered), &[(Reply, refused, 501, 101, 0, Accepted, Closed)]);
}

#[test]
fn a_peer_that_remembers_an_older_connection_is_reset_by_its_client() {
    // RFC 9293, 3.5.1: the client lost its state, and so did we.
    play(&[
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, ACK, 7000, 6000, 0, Unproven, SynSent),
        (Original, RST, 6000, 0, 0, Accepted, Closed),
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, synack(), 500, 101, 0, Accepted, SynReceived),
        (Original, ACK, 101, 501, 0, Accepted, Established),
    ]);
    // An answer to another SYN than ours.
    play(&[
        (Original, SYN, 100, 0, 0, Accepted, SynSent),
        (Reply, synack(), 500, 91, 0, Unproven, SynSent),
        (Original, RST, 91, 0, 0, Accepted, Closed),
    ]);
}

#[test]
fn a_client_that_begins_anew_in_the_middle() {
    // The server has the old connection and asks (RFC 5961, 4): its answer and the reset pass.
    play_on(
        Some(handshake()),
        &[
            (Original, SYN, 90_000, 0, 0, Unproven, Established),
            (Reply, ACK, 501, 101, 0, Accepted, Established),
            (Original, RST, 101, 0, 0, Accepted, Closed),
            (Original, SYN, 90_000, 0, 0, Accepted, SynSent),
        ],
    );
    // The server has forgotten it and answers the new one.
    play_on(
        Some(handshake()),
        &[
            (Original, SYN, 90_000, 0, 0, Unproven, Established),
            (Reply, synack(), 70_000, 90_001, 0, Accepted, SynReceived),
            (Original, ACK, 90_001, 70_001, 0, Accepted, Established),
            (Reply, ACK, 70_001, 90_001, 500, Accepted, Established),
        ],
    );
    // The server has forgotten it and refuses.
    play_on(
        Some(handshake()),
        &[
            (Original, SYN, 90_000, 0, 0, Unproven, Established),
            (Reply, RST | ACK, 0, 90_001, 0, Accepted, Closed),
        ],
    );
    // Nobody asked for these.
    play_on(
        Some(handshake()),
        &[
            (Reply, SYN, 500, 0, 0, Invalid, Established),
            (Reply, synack(), 70_000, 90_001, 0, Invalid, Established),
            (Reply, RST | ACK, 0, 90_001, 0, Invalid, Established),
        ],
    );
}

#[test]
fn time_wait_is_left_by_a_later_number_only() {
    let over = play_on(
        Some(handshake()),
        &[
            (Original, fin(), 101, 501, 0, Accepted, FinWait),
            (Reply, fin(), 501, 102, 0, Accepted, LastAck),
            (Original, ACK, 102, 502, 0, Accepted, TimeWait),
        ],
    );
    play_on(
        Some(over),
        &[
            (Original, SYN, 103, 0, 0, Accepted, SynSent),
            (Reply, synack(), 9, 104, 0, Accepted, SynReceived),
            (Original, ACK, 104, 10, 0, Accepted, Established),
        ],
    );
    play_on(Some(over), &[(Original, SYN, 50, 0, 0, Unproven, TimeWait)]);
    // From the other end: it becomes the opener.
    play_on(
        Some(over),
        &[
            (Reply, SYN, 600, 0, 0, Accepted, SynSent),
            (Original, synack(), 200, 601, 0, Accepted, SynReceived),
            (Reply, ACK, 601, 201, 0, Accepted, Established),
            (Original, SYN, 5000, 0, 0, Invalid, Established),
            (Reply, SYN, 5000, 0, 0, Unproven, Established),
        ],
    );
}

#[test]
fn a_connection_begun_before_us_is_picked_up() {
    let alive = play(&[
        (Original, ACK, 101, 501, 20, Accepted, Established),
        (Reply, ACK, 501, 121, 900_000, Accepted, Established),
        (Original, ACK, 121, 900_501, 0, Accepted, Established),
    ]);
    assert!(alive.is_assured());
    // Its peer has no such connection any more; the reset is exact.
    play(&[(Original, ACK, 101, 501, 20, Accepted, Established), (Reply, RST, 501, 0, 0, Accepted, Closed)]);
    play(&[
        (Original, ACK, 101, 501, 20, Accepted, Established),
        (Reply, RST, 500, 0, 0, Invalid, Established),
    ]);
    play(&[
        (Original, fin(), 101, 501, 0, Accepted, FinWait),
        (Reply, ACK, 501, 102, 0, Accepted, CloseWait),
    ]);
    let middle = segment(ACK, 101, 501, 20);
    assert!(TcpTracker::begin(&middle, false).is_none(), "only where that is wanted");
    for flags in [RST, RST | ACK, synack(), Flags::NONE, SYN | Flags::FIN, SYN | RST, Flags::FIN, Flags::PSH]
    {
        assert!(TcpTracker::begin(&segment(flags, 1, 1, 0), true).is_none(), "{flags:?} begins nothing");
    }
}

#[test]
fn nonsense_is_invalid_in_every_state() {
    for begun in [play(&[(Original, SYN, 100, 0, 0, Accepted, SynSent)]), handshake()] {
        for flags in
            [Flags::NONE, SYN | Flags::FIN, SYN | RST, Flags::FIN, Flags::PSH | Flags::URG, Flags::FIN | RST]
        {
            for from in [Original, Reply] {
                let mut tracker = begun;
                assert_eq!(tracker.take(from, &segment(flags, 101, 501, 0), true), Invalid, "{flags:?}");
                assert_eq!(tracker, begun);
            }
        }
    }
}

#[test]
fn data_in_the_handshake_counts() {
    // RFC 7413: SYN with data, of which the server takes all or none, and may answer at once.
    play(&[
        (Original, SYN, 100, 0, 300, Accepted, SynSent),
        (Reply, synack(), 500, 401, 0, Accepted, SynReceived),
        (Reply, fin(), 501, 401, 700, Accepted, FinWait),
        (Original, ACK, 401, 1202, 0, Accepted, CloseWait),
    ]);
    play(&[
        (Original, SYN, 100, 0, 300, Accepted, SynSent),
        (Reply, synack(), 500, 101, 0, Accepted, SynReceived),
        (Original, ACK, 101, 501, 300, Accepted, Established),
    ]);
}

#[test]
fn timeouts_are_what_rfc_5382_asks_for_and_no_less() {
    let timeouts = TcpTimeouts::default();
    assert!(timeouts.established >= Duration::from_secs(2 * 3600 + 4 * 60));
    assert!(timeouts.transitory >= Duration::from_secs(4 * 60));
    let after = |tracker: TcpTracker| tracker.idle_timeout(&timeouts);
    assert_eq!(after(play(&[(Original, SYN, 100, 0, 0, Accepted, SynSent)])), timeouts.transitory);
    assert_eq!(after(handshake()), timeouts.established);
    assert_eq!(after(play(&[(Original, ACK, 1, 1, 0, Accepted, Established)])), timeouts.transitory);
    let half = play_on(
        Some(handshake()),
        &[(Original, fin(), 101, 501, 0, Accepted, FinWait), (Reply, ACK, 501, 102, 0, Accepted, CloseWait)],
    );
    assert_eq!(after(half), timeouts.established, "the other end may still be at work");
    let both = play_on(Some(half), &[(Reply, fin(), 501, 102, 0, Accepted, LastAck)]);
    assert_eq!(after(both), timeouts.transitory);
    let reset = play_on(Some(handshake()), &[(Reply, RST, 501, 0, 0, Accepted, Closed)]);
    assert_eq!(after(reset), timeouts.transitory);
}

/// One honest end: takes what is in order, sends what its peer has room for.
#[derive(Clone, Debug)]
struct Host {
    isn: SeqNumber,
    una: SeqNumber,
    next: SeqNumber,
    heard: Option<SeqNumber>,
    to_send: u32,
    fin_sent: bool,
    fin_heard: bool,
    window: u16,
    offered: Option<u8>,
    scale: u8,
    peer_scale: u8,
    peer_room: u32,
}

impl Host {
    fn new(isn: u32, to_send: u32, window: u16, offered: Option<u8>) -> Host {
        let isn = SeqNumber(isn);
        Host {
            isn,
            una: isn,
            next: isn,
            heard: None,
            to_send,
            fin_sent: false,
            fin_heard: false,
            window,
            offered,
            scale: 0,
            peer_scale: 0,
            peer_room: 0,
        }
    }

    fn make(&self, flags: Flags, seq: SeqNumber, payload_bytes: u32) -> Segment {
        let flags = if self.heard.is_some() { flags | ACK } else { flags };
        let ack = self.heard.unwrap_or_default();
        let window_scale = if flags.contains(SYN) { self.offered } else { None };
        Segment { seq, ack, flags, window: self.window, payload_bytes, window_scale }
    }

    fn synchronised(&self) -> bool {
        self.heard.is_some() && self.una != self.isn
    }

    /// Something new, if there is room for it; `max` is the most a segment may carry.
    fn send(&mut self, max: u32) -> Option<Segment> {
        if self.next == self.isn {
            self.next = self.isn + 1;
            return Some(self.make(SYN, self.isn, 0));
        }
        if !self.synchronised() || self.fin_sent {
            return None;
        }
        let in_flight = self.next.distance_from(self.una) as u32;
        let len = self.to_send.min(max).min(self.peer_room.saturating_sub(in_flight));
        if len == 0 && self.to_send > 0 {
            return None;
        }
        self.to_send -= len;
        let flags = if self.to_send == 0 { Flags::FIN } else { Flags::NONE };
        let segment = self.make(flags, self.next, len);
        self.fin_sent = self.to_send == 0;
        self.next = self.next + len as usize + usize::from(self.fin_sent);
        Some(segment)
    }

    /// Everything not acknowledged, as one segment.
    fn again(&self) -> Option<Segment> {
        let outstanding = self.next.distance_from(self.una) as u32;
        if outstanding == 0 {
            return None;
        }
        if self.una == self.isn {
            return Some(self.make(SYN, self.isn, 0));
        }
        let flags = if self.fin_sent { Flags::FIN } else { Flags::NONE };
        Some(self.make(flags, self.una, outstanding - u32::from(self.fin_sent)))
    }

    /// Takes a segment; returns what it answers.
    fn take(&mut self, segment: &Segment) -> Option<Segment> {
        let syn = segment.flags.contains(SYN);
        if syn && self.heard.is_none() {
            self.heard = Some(segment.seq + 1);
            if let (Some(own), Some(peer)) = (self.offered, segment.window_scale) {
                (self.scale, self.peer_scale) = (own, peer);
            }
            let was_silent = self.next == self.isn;
            self.next = self.isn + 1;
            if segment.flags.contains(ACK) {
                self.una = segment.ack;
            }
            self.peer_room = segment.window.into();
            let flags = if segment.flags.contains(ACK) && !was_silent { Flags::NONE } else { SYN };
            let seq = if flags == SYN { self.isn } else { self.next };
            return Some(self.make(flags, seq, 0));
        }
        let heard = self.heard?;
        if segment.flags.contains(ACK)
            && segment.ack.at_or_after(self.una)
            && segment.ack.at_or_before(self.next)
        {
            self.una = segment.ack;
            self.peer_room = u32::from(segment.window) << if syn { 0 } else { self.peer_scale };
        }
        let fin = segment.flags.contains(Flags::FIN);
        let end = segment.seq + segment.payload_bytes as usize + usize::from(syn) + usize::from(fin);
        if segment.seq.at_or_before(heard) && end.after(heard) {
            self.heard = Some(end);
            self.fin_heard |= fin;
        }
        let says = end != segment.seq || syn;
        (says && self.una != self.isn).then(|| self.make(Flags::NONE, self.next, 0))
    }

    /// Whether a segment can tell this end nothing it does not know.
    fn knows(&self, segment: &Segment) -> bool {
        let control = usize::from(segment.flags.intersects(SYN | Flags::FIN));
        let end = segment.seq + segment.payload_bytes as usize + control;
        let acknowledges = segment.flags.contains(ACK) && segment.ack.after(self.una);
        let is_old = end == segment.seq || self.heard.is_some_and(|heard| end.at_or_before(heard));
        // RFC 5961, 5.2: not taken, whatever it carries.
        let is_stale =
            segment.flags.contains(ACK) && segment.ack.before(self.una - self.peer_room.max(66_000) as usize);
        is_stale || (is_old && !acknowledges)
    }

    fn done(&self) -> bool {
        self.fin_sent && self.una == self.next && self.fin_heard
    }
}

/// A generator for the network's moods.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    }
}

/// Lets two ends talk over a network that loses, repeats and reorders before and behind the tracker.
fn converse(mut hosts: [Host; 2], both_open: bool, seed: u64) -> Result<TcpTracker, TestCaseError> {
    const IN_FLIGHT_MAX: usize = 12;
    let mut dice = Dice(seed | 1);
    // Segments before and behind the tracker, by who sent them.
    let mut before: [Vec<Segment>; 2] = Default::default();
    let mut behind: [Vec<Segment>; 2] = Default::default();
    let mut tracker: Option<TcpTracker> = None;
    for step in 0..200_000 {
        let me = dice.below(2);
        let from = if me == 0 { Original } else { Reply };
        match dice.below(10) {
            0..2 if before[me].len() < IN_FLIGHT_MAX => {
                let may_begin = me == 0 || hosts[me].next != hosts[me].isn || both_open;
                let max = 1 + dice.below(60_000) as u32;
                before[me].extend(if may_begin { hosts[me].send(max) } else { None });
            }
            2 if dice.below(4) == 0 => before[me].extend(hosts[me].again()),
            3..6 if !before[me].is_empty() => {
                let at = dice.below(before[me].len().min(4));
                let segment = if dice.below(10) == 0 { before[me][at] } else { before[me].remove(at) };
                let verdict = match &mut tracker {
                    Some(tracker) => tracker.take(from, &segment, false),
                    None if me == 0 => {
                        tracker = TcpTracker::begin(&segment, false);
                        prop_assert!(tracker.is_some());
                        Accepted
                    }
                    // Nobody lets it in before there is a flow.
                    None => continue,
                };
                let useless = verdict == Invalid && hosts[1 - me].knows(&segment);
                prop_assert!(
                    verdict != Invalid || useless,
                    "step {step}: {from:?} {segment:?} at {tracker:?}, receiver {:?}",
                    hosts[1 - me]
                );
                if verdict != Invalid && dice.below(10) != 0 {
                    behind[me].push(segment);
                }
            }
            6.. if !behind[me].is_empty() => {
                let at = dice.below(behind[me].len().min(4));
                let segment = if dice.below(20) == 0 { behind[me][at] } else { behind[me].remove(at) };
                let answer = hosts[1 - me].take(&segment);
                before[1 - me].extend(answer);
            }
            _ => {}
        }
        if hosts.iter().all(Host::done) && before.iter().chain(&behind).all(Vec::is_empty) {
            break;
        }
    }
    prop_assert!(hosts.iter().all(Host::done), "the ends did not finish: {hosts:?}");
    Ok(tracker.expect("they talked"))
}

prop_compose! {
    fn host()(
        isn in prop_oneof![Just(u32::MAX - 3), Just(0x7fff_fff0), any::<u32>()],
        to_send in 0u32..400_000,
        window in prop_oneof![1u16..200, 1000u16..],
        offered in proptest::option::of(0u8..=14),
    ) -> Host {
        Host::new(isn, to_send, window, offered)
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn what_honest_ends_say_is_valid_whatever_the_network_does(
        client in host(), server in host(), both_open in any::<bool>(), seed in any::<u64>(),
    ) {
        // A small window must not take for ever.
        let room = |peer: &Host| u32::from(peer.window) * 100;
        let client_sends = client.to_send.min(room(&server));
        let server_sends = server.to_send.min(room(&client));
        let hosts = [Host { to_send: client_sends, ..client }, Host { to_send: server_sends, ..server }];
        let tracker = converse(hosts, both_open, seed)?;
        prop_assert_eq!(tracker.state(), TimeWait);
    }

    #[test]
    fn no_segments_whatever_make_it_panic(
        segments in proptest::collection::vec((any::<bool>(), any::<[u32; 3]>(), any::<u8>(), any::<u16>()), 1..40),
        near in any::<bool>(),
    ) {
        let mut tracker = None::<TcpTracker>;
        for (from, [seq, ack, len], flags, window) in segments {
            let number = |number: u32| SeqNumber(if near { number % 3000 } else { number });
            let segment = Segment {
                seq: number(seq), ack: number(ack), flags: Flags(flags), window,
                payload_bytes: len % 65_536, window_scale: (flags & 64 != 0).then_some((len % 20) as u8),
            };
            match &mut tracker {
                Some(tracker) => {
                    let before = *tracker;
                    let from = if from { Original } else { Reply };
                    let verdict = tracker.take(from, &segment, false);
                    prop_assert!(verdict != Invalid || *tracker == before);
                    tracker.idle_timeout(&TcpTimeouts::default());
                }
                None => tracker = TcpTracker::begin(&segment, true),
            }
        }
    }
}
