//! What a NAT knows of a TCP connection it only sees pass: who has said what, and which bytes may come next.
//!
//! Each end has a `Side` of its own, moved by what it sends and by what the other acknowledges; the state
//! people know from connection tables ([`TcpState`]) is read off both. Nothing is kept of data. For each end:
//! how far it has sent (`sent`), how far it may send (`edge`: the highest acknowledgement and window of the other),
//! how far it has acknowledged, and its largest window. By these a segment is plausible or not: it starts within
//! what the receiver offered and acknowledges what was really sent; one that ends further back than a window, or acknowledges
//! what is long past, passes without effect. (The rules are those of G. van Rooij, "Real Stateful TCP Packet Filtering in IP Filter", 2001.)
//!
//! What changes the state must be more than plausible: a reset has to carry the exact next number (RFC 5961, 3.2),
//! and SYN in the middle of a connection goes through without effect, so that the ends settle it between them
//! (RFC 5961, 4.2), unless the answer proves that the other end had forgotten.
//!
//! A connection that was begun before this NAT was (vunet started anew) is picked up with its first segment that is neither
//! SYN nor RST. Scales of its windows are unknown, so the largest is assumed.
//!
//! Read first: RFC 9293, 3.3.2, 3.5 and 3.10.7; RFC 5382; RFC 5961; RFC 7857, 2; RFC 7323, 2.

use std::time::Duration;

use crate::wire::tcp::{Flags, SeqNumber, WINDOW_SCALE_MAX};

/// Which of a flow's ends sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// The end whose packet began the flow.
    Original = 0,
    /// The other.
    Reply = 1,
}

impl Direction {
    /// The other direction.
    pub const fn other(self) -> Direction {
        match self {
            Direction::Original => Direction::Reply,
            Direction::Reply => Direction::Original,
        }
    }
}

/// How long a connection may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpTimeouts {
    /// Open in at least one direction.
    pub established: Duration,
    /// Not yet open, closed from both ends, or reset.
    pub transitory: Duration,
}

impl Default for TcpTimeouts {
    /// The shortest RFC 5382 allows (REQ-5): two hours and four minutes, and four minutes.
    fn default() -> TcpTimeouts {
        TcpTimeouts { established: Duration::from_secs(7440), transitory: Duration::from_secs(240) }
    }
}

/// What matters of a segment. A frame still to be cut into segments is one of its whole length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number of the first byte, or of SYN.
    pub seq: SeqNumber,
    /// Acknowledgement; has meaning with ACK.
    pub ack: SeqNumber,
    /// Control bits.
    pub flags: Flags,
    /// Window as it stands in the header.
    pub window: u16,
    /// Payload bytes, without SYN and FIN.
    pub payload_bytes: u32,
    /// The window scale offered; read only where SYN is set.
    pub window_scale: Option<u8>,
}

impl Segment {
    /// The number behind the segment's last, SYN and FIN counted.
    fn end(&self) -> SeqNumber {
        let control =
            usize::from(self.flags.contains(Flags::SYN)) + usize::from(self.flags.contains(Flags::FIN));
        self.seq + self.payload_bytes as usize + control
    }
}

/// How far one end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Sent nothing yet.
    Silent,
    /// Sent SYN, not acknowledged.
    SynSent,
    /// Its SYN is acknowledged: it may send.
    Open,
    /// Sent FIN, not acknowledged.
    FinSent,
    /// Its FIN is acknowledged: it has said all.
    FinAcked,
    /// Sent a reset that the other end must take.
    Reset,
}

impl Side {
    const ALL: [Side; 8] = [
        Side::Silent,
        Side::SynSent,
        Side::Open,
        Side::FinSent,
        Side::FinAcked,
        Side::Reset,
        // Not written.
        Side::Reset,
        Side::Reset,
    ];

    const fn is_synchronised(self) -> bool {
        matches!(self, Side::Open | Side::FinSent | Side::FinAcked)
    }

    const fn is_ended(self) -> bool {
        matches!(self, Side::FinSent | Side::FinAcked)
    }
}

/// A connection's state, by the names of RFC 9293 where they fit what is seen from the middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// One end sent SYN.
    SynSent,
    /// Both sent SYN, and neither has acknowledged (simultaneous open).
    SynSentBoth,
    /// SYN was answered with SYN and ACK.
    SynReceived,
    /// Both ends may send; or, picked up in the middle, one has been heard.
    Established,
    /// One end has sent FIN.
    FinWait,
    /// That FIN is acknowledged; the other end may go on sending.
    CloseWait,
    /// Both have sent FIN.
    LastAck,
    /// Both FINs are acknowledged.
    TimeWait,
    /// Reset.
    Closed,
}

/// What a segment is to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpVerdict {
    /// Part of it: goes on, and the connection is alive.
    Accepted,
    /// Goes on, for the end it reaches to judge, and proves nothing: the connection's time is not renewed.
    Unproven,
    /// Neither in the window nor explainable: to be dropped.
    Invalid,
}

/// Stands for "offered no window scale" until both ends have spoken.
const NO_SCALE: u8 = 15;

/// Both scales of a connection whose windows are not checked; two that were agreed on are never these.
const LOOSE: u8 = NO_SCALE << 4 | NO_SCALE;

/// The least distance an acknowledgement may lag, in bytes, however small windows are: one frame of the largest
/// size, which its receiver may acknowledge in parts.
const ACK_LAG_BYTES_MIN: u32 = 66_000;

/// Flags that say what a segment is to its connection.
const JUDGED: Flags = Flags(Flags::SYN.0 | Flags::ACK.0 | Flags::FIN.0 | Flags::RST.0);

/// [`TcpTracker::sides`] where both ends are open and no SYN is pending.
const BOTH_OPEN: u8 = (Side::Open as u8) << 3 | Side::Open as u8;

const PENDING_SYN: u8 = 1 << 6;
const OPENED_BY_REPLY: u8 = 1 << 7;

/// One connection, 32 bytes. Arrays are indexed by [`Direction`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TcpTracker {
    /// Behind the highest number an end has sent.
    sent: [SeqNumber; 2],
    /// Behind the highest number an end may send.
    edge: [SeqNumber; 2],
    /// The highest acknowledgement an end has sent; its peer's first number before there was one.
    acked: [SeqNumber; 2],
    /// An end's largest window, in units of its scale, rounded up.
    window_max: [u16; 2],
    /// The low half of the number of a SYN that came in the middle, where `PENDING_SYN` is set.
    pending: u16,
    /// Window scales, four bits each, `Original` in the low ones.
    scales: u8,
    /// Both sides, three bits each, `Original` in the low ones; then flags.
    sides: u8,
}

const _: () = assert!(size_of::<TcpTracker>() <= 32);

impl TcpTracker {
    const EMPTY: TcpTracker = TcpTracker {
        sent: [SeqNumber(0); 2],
        edge: [SeqNumber(0); 2],
        acked: [SeqNumber(0); 2],
        window_max: [0; 2],
        pending: 0,
        scales: 0,
        sides: 0,
    };

    /// A connection that begins with `segment`: SYN alone, or with `pick_up` any other that acknowledges
    /// something. `None` for what can begin none.
    pub fn begin(segment: &Segment, pick_up: bool) -> Option<TcpTracker> {
        let flags = segment.flags;
        if !is_sane(flags) || flags.contains(Flags::RST) {
            return None;
        }
        let mut tracker = TcpTracker::EMPTY;
        match (flags.contains(Flags::SYN), flags.contains(Flags::ACK)) {
            (true, false) => tracker.begin_with_syn(Direction::Original, segment),
            (false, true) if pick_up => tracker.pick_up(segment),
            _ => return None,
        }
        Some(tracker)
    }

    /// Takes a segment from the end `from`. With `liberal`, one outside of the windows is accepted, unless it
    /// resets.
    #[inline]
    pub fn take(&mut self, from: Direction, segment: &Segment, liberal: bool) -> TcpVerdict {
        let is_plain = segment.flags.0 & JUDGED.0 == Flags::ACK.0;
        if is_plain && self.sides & !OPENED_BY_REPLY == BOTH_OPEN && self.scales != LOOSE {
            return self.take_plain(from, segment, liberal);
        }
        self.take_any(from, segment, liberal)
    }

    /// [`TcpTracker::take_ack`] while both ends may send and neither wants to end: what most segments are.
    #[inline]
    fn take_plain(&mut self, from: Direction, segment: &Segment, liberal: bool) -> TcpVerdict {
        let (me, peer) = (from as usize, from.other() as usize);
        let is_in_window =
            segment.seq.at_or_before(self.edge[me] + 1) && segment.ack.at_or_before(self.sent[peer]);
        if !is_in_window {
            return if liberal { TcpVerdict::Accepted } else { TcpVerdict::Invalid };
        }
        if self.is_old(from, segment) {
            return if liberal { TcpVerdict::Accepted } else { TcpVerdict::Unproven };
        }
        self.sent[me] = furthest(self.sent[me], segment.seq + segment.payload_bytes as usize);
        self.window_max[me] = self.window_max[me].max(segment.window);
        let edge = segment.ack + self.offered_bytes(from, segment).max(1) as usize;
        self.edge[peer] = furthest(self.edge[peer], edge);
        self.acked[me] = furthest(self.acked[me], segment.ack);
        TcpVerdict::Accepted
    }

    fn take_any(&mut self, from: Direction, segment: &Segment, liberal: bool) -> TcpVerdict {
        let flags = segment.flags;
        if !is_sane(flags) {
            return TcpVerdict::Invalid;
        }
        if flags.contains(Flags::RST) {
            return self.take_reset(from, segment);
        }
        match (flags.contains(Flags::SYN), flags.contains(Flags::ACK)) {
            (true, false) => self.take_syn(from, segment),
            (true, true) => self.take_syn_ack(from, segment),
            (false, true) => self.take_ack(from, segment, liberal),
            (false, false) => TcpVerdict::Invalid,
        }
    }

    /// The connection's state.
    pub fn state(&self) -> TcpState {
        let (original, reply) = (self.side(Direction::Original), self.side(Direction::Reply));
        match (original, reply) {
            (Side::Reset, _) | (_, Side::Reset) => TcpState::Closed,
            (Side::SynSent, Side::SynSent) => TcpState::SynSentBoth,
            (Side::Silent, Side::SynSent | Side::Silent) | (Side::SynSent, Side::Silent) => TcpState::SynSent,
            (Side::SynSent, _) | (_, Side::SynSent) => TcpState::SynReceived,
            (Side::FinAcked, Side::FinAcked) => TcpState::TimeWait,
            (first, second) if first.is_ended() && second.is_ended() => TcpState::LastAck,
            (Side::FinAcked, _) | (_, Side::FinAcked) => TcpState::CloseWait,
            (Side::FinSent, _) | (_, Side::FinSent) => TcpState::FinWait,
            (Side::Open | Side::Silent, Side::Open | Side::Silent) => TcpState::Established,
        }
    }

    /// Whether both ends have taken part and not both are done: such a connection is worth more than one that may be a
    /// scan, or is over.
    #[inline]
    pub fn is_assured(&self) -> bool {
        if self.sides & !(OPENED_BY_REPLY | PENDING_SYN) == BOTH_OPEN {
            return true;
        }
        let sides = [self.side(Direction::Original), self.side(Direction::Reply)];
        sides.iter().all(|side| side.is_synchronised()) && !sides.iter().all(|side| side.is_ended())
    }

    /// Whether it was begun in the middle and has not been answered since.
    pub fn is_picked_up(&self) -> bool {
        self.side(Direction::Original).is_synchronised() && self.side(Direction::Reply) == Side::Silent
    }

    /// Resets that end the connection at its end `to`, as (sequence number, acknowledgement) in the order they are to be sent: one
    /// is taken only with the number that end expects, which is what it has acknowledged, or all that was sent to it (RFC 5961, 3.2).
    /// None of a connection that is over.
    pub fn resets(&self, to: Direction) -> impl Iterator<Item = (SeqNumber, Option<SeqNumber>)> {
        let (it, other) = (to as usize, to.other() as usize);
        let (acked, sent) = (self.acked[it], self.sent[other]);
        // What it has not said yet nobody can acknowledge.
        let ack = (self.side(to) != Side::Silent).then_some(self.sent[it]);
        let numbers = match (self.state(), self.side(to.other())) {
            (TcpState::Closed | TcpState::TimeWait, _) => [None, None],
            // It has nothing to go by but the acknowledgement of its SYN (RFC 9293, 3.10.7.3).
            (_, Side::Silent) if self.side(to) == Side::SynSent => [Some(SeqNumber(0)), None],
            (_, Side::Silent) => [Some(acked), None],
            _ if ack.is_none() || acked == sent => [Some(sent), None],
            _ => [Some(acked), Some(sent)],
        };
        numbers.into_iter().flatten().map(move |seq| (seq, ack))
    }

    /// How long the connection may be silent now. One end's FIN does not shorten it: the other may work for an
    /// hour before it answers (RFC 6146, 3.5.2.2). A connection picked up and not yet answered has proved nothing.
    pub fn idle_timeout(&self, timeouts: &TcpTimeouts) -> Duration {
        if self.is_assured() { timeouts.established } else { timeouts.transitory }
    }

    /// Its segments come in fragments, of which only the first is seen: how long they are is not known, and
    /// windows are not checked any more.
    pub fn loosen(&mut self) {
        if self.is_assured() {
            self.scales = LOOSE;
        }
    }

    fn begin_with_syn(&mut self, from: Direction, segment: &Segment) {
        let (me, peer) = (from as usize, from.other() as usize);
        *self = TcpTracker::EMPTY;
        if from == Direction::Reply {
            self.sides = OPENED_BY_REPLY;
        }
        // The peer's own numbers are unknown until it speaks.
        self.sent[me] = segment.end();
        self.edge[me] = segment.end();
        self.acked[peer] = segment.seq;
        self.window_max[me] = segment.window;
        self.set_offered_scale(from, segment.window_scale);
        self.set_side(from, Side::SynSent);
    }

    /// Begins in the middle. The opener's own bounds are taken as wide as they can be.
    fn pick_up(&mut self, segment: &Segment) {
        let (me, peer) = (Direction::Original as usize, Direction::Reply as usize);
        self.scales = WINDOW_SCALE_MAX << 4 | WINDOW_SCALE_MAX;
        self.window_max = [segment.window.max(1), u16::MAX];
        self.sent[me] = segment.end();
        self.sent[peer] = segment.ack;
        self.acked = [segment.ack, segment.seq];
        self.edge[me] = segment.end() + self.window_bytes(Direction::Reply) as usize;
        self.edge[peer] = segment.ack + self.offered_bytes(Direction::Original, segment).max(1) as usize;
        let side = if segment.flags.contains(Flags::FIN) { Side::FinSent } else { Side::Open };
        self.set_side(Direction::Original, side);
    }

    fn take_syn(&mut self, from: Direction, segment: &Segment) -> TcpVerdict {
        let (own, other) = (self.side(from), self.side(from.other()));
        match (own, other) {
            (Side::Reset, _) | (_, Side::Reset) => self.begin_with_syn(from, segment),
            // RFC 9293, 3.6.1: a new incarnation, if nothing old can be taken for its own.
            (Side::FinAcked, Side::FinAcked) if segment.seq.after(self.sent[from as usize]) => {
                self.begin_with_syn(from, segment);
            }
            (Side::SynSent, Side::Silent) => self.begin_with_syn(from, segment),
            (Side::Silent, Side::SynSent) => {
                self.join_with_syn(from, segment);
                self.acked[from.other() as usize] = segment.seq;
            }
            // A copy of its SYN, perhaps overtaken by its answer to the other's.
            (Side::SynSent, _) if segment.end() == self.sent[from as usize] => {}
            _ if self.opener() == from => {
                self.pending = low_half(segment.seq);
                self.sides |= PENDING_SYN;
                return TcpVerdict::Unproven;
            }
            _ => return TcpVerdict::Invalid,
        }
        TcpVerdict::Accepted
    }

    fn take_syn_ack(&mut self, from: Direction, segment: &Segment) -> TcpVerdict {
        let (me, peer) = (from as usize, from.other() as usize);
        let (own, other) = (self.side(from), self.side(from.other()));
        if other == Side::SynSent && matches!(own, Side::Silent | Side::SynSent) {
            let acknowledges = segment.ack.after(self.acked[me]) && segment.ack.at_or_before(self.sent[peer]);
            if !acknowledges {
                // The peer may hold an older attempt; the opener resets it (RFC 9293, 3.5.1).
                return TcpVerdict::Unproven;
            }
            self.join_with_syn(from, segment);
            self.acked[me] = segment.ack;
            if own == Side::Silent {
                self.acked[peer] = segment.seq;
            }
            self.set_side(from.other(), Side::Open);
            return TcpVerdict::Accepted;
        }
        let is_copy = self.is_copy(from, segment);
        match (own, other) {
            // The second answer of a simultaneous open.
            (Side::Open, Side::SynSent) if is_copy && segment.ack.after(self.acked[me]) => {
                self.note_acknowledged(from, segment);
                TcpVerdict::Accepted
            }
            // The ACK of the first was lost, and will be repeated; or it is late.
            _ if is_copy && own != Side::Silent && other.is_synchronised() => TcpVerdict::Unproven,
            _ if self.answers_pending(from, segment) => {
                self.begin_anew_with_answer(from, segment);
                TcpVerdict::Accepted
            }
            _ => TcpVerdict::Invalid,
        }
    }

    fn take_ack(&mut self, from: Direction, segment: &Segment, liberal: bool) -> TcpVerdict {
        let (own, other) = (self.side(from), self.side(from.other()));
        match (own, other) {
            (Side::Reset, _) | (_, Side::Reset) => return TcpVerdict::Unproven,
            // The peer still has an older connection, says so, and will be reset by the opener.
            (Side::Silent, Side::SynSent) => return TcpVerdict::Unproven,
            (Side::SynSent, Side::Silent) => return TcpVerdict::Invalid,
            (Side::Silent, _) => {
                if !self.first_answer_is_near(from, segment) {
                    return TcpVerdict::Invalid;
                }
                self.set_side(from, Side::Open);
            }
            _ if self.scales == LOOSE => {}
            _ if !self.is_in_window(from, segment) => {
                return if liberal { TcpVerdict::Accepted } else { TcpVerdict::Invalid };
            }
            // Its receiver says where it stands, which may be what the sender needs.
            _ if self.is_old(from, segment) => {
                return if liberal { TcpVerdict::Accepted } else { TcpVerdict::Unproven };
            }
            _ => {}
        }
        self.note_sent(from, segment);
        self.note_acknowledged(from, segment);
        TcpVerdict::Accepted
    }

    fn take_reset(&mut self, from: Direction, segment: &Segment) -> TcpVerdict {
        let (me, peer) = (from as usize, from.other() as usize);
        let has_ack = segment.flags.contains(Flags::ACK);
        match (self.side(from), self.side(from.other())) {
            (Side::Reset, _) | (_, Side::Reset) => return TcpVerdict::Unproven,
            (Side::Silent, Side::SynSent) => {
                let acknowledges =
                    segment.ack.after(self.acked[me]) && segment.ack.at_or_before(self.sent[peer]);
                if !(has_ack && acknowledges) {
                    return TcpVerdict::Invalid;
                }
            }
            // The opener gives up, or resets what its peer still had of an earlier connection.
            (Side::SynSent, Side::Silent) => {}
            _ if has_ack && self.answers_pending(from, segment) => {}
            _ => {
                let exact = segment.seq == self.acked[peer] || segment.seq == self.sent[me];
                if !exact {
                    let in_window =
                        segment.seq.after(self.acked[peer]) && segment.seq.at_or_before(self.edge[me]);
                    // The receiver asks whether it was meant, and the answer is exact (RFC 5961, 3.2).
                    return if in_window { TcpVerdict::Unproven } else { TcpVerdict::Invalid };
                }
            }
        }
        self.set_side(from, Side::Reset);
        TcpVerdict::Accepted
    }

    /// The second SYN: both ends' windows have meaning from here on.
    fn join_with_syn(&mut self, from: Direction, segment: &Segment) {
        let (me, peer) = (from as usize, from.other() as usize);
        let agreed_before = self.side(from) == Side::SynSent;
        self.sent[me] = segment.end();
        if !agreed_before {
            self.window_max[me] = segment.window;
            self.set_offered_scale(from, segment.window_scale);
            self.agree_on_scales();
        }
        let base = if segment.flags.contains(Flags::ACK) { segment.ack } else { self.sent[peer] };
        self.edge[peer] = furthest(self.edge[peer], base + usize::from(segment.window.max(1)));
        self.edge[me] = furthest(segment.end(), segment.end() + self.window_bytes(from.other()) as usize);
        self.set_side(from, Side::SynSent);
    }

    /// Whether SYN and ACK can be a copy of those the connection began with: they lie behind what was sent, near enough.
    fn is_copy(&self, from: Direction, segment: &Segment) -> bool {
        let behind = |end: SeqNumber, sent: SeqNumber, window: u32| {
            end.at_or_before(sent) && end.at_or_after(sent - window.max(ACK_LAG_BYTES_MIN) as usize)
        };
        behind(segment.end(), self.sent[from as usize], self.window_bytes(from.other()))
            && behind(segment.ack, self.sent[from.other() as usize], self.window_bytes(from))
    }

    /// Whether a segment acknowledges the SYN that came in the middle.
    fn answers_pending(&self, from: Direction, segment: &Segment) -> bool {
        self.sides & PENDING_SYN != 0
            && self.opener() != from
            && low_half(segment.ack) == self.pending.wrapping_add(1)
    }

    /// The peer had forgotten the connection and takes the opener's new SYN. What that SYN offered was not kept.
    fn begin_anew_with_answer(&mut self, from: Direction, answer: &Segment) {
        let syn = Segment {
            seq: answer.ack - 1,
            flags: Flags::SYN,
            window: u16::MAX,
            window_scale: answer.window_scale.map(|_| WINDOW_SCALE_MAX),
            ..Segment::default()
        };
        self.begin_with_syn(from.other(), &syn);
        self.join_with_syn(from, answer);
        self.acked[from as usize] = answer.ack;
        self.acked[from.other() as usize] = answer.seq;
        // The window the SYN offered may have been scaled since.
        self.edge[from as usize] = answer.end() + self.window_bytes(from.other()) as usize;
        self.set_side(from.other(), Side::Open);
    }

    /// Of a connection picked up: whether the other end's first segment is where it was said to be, a largest window
    /// either way.
    fn first_answer_is_near(&self, from: Direction, segment: &Segment) -> bool {
        let (me, peer) = (from as usize, from.other() as usize);
        let window = self.window_bytes(from.other()).max(ACK_LAG_BYTES_MIN).cast_signed();
        let back = segment.end().distance_from(self.sent[me]);
        let acknowledged = segment.ack.distance_from(self.sent[peer]);
        back >= -window && segment.seq.at_or_before(self.edge[me]) && acknowledged.abs() <= 1 << 30
    }

    /// Whether a segment is not beyond what its sender may say.
    fn is_in_window(&self, from: Direction, segment: &Segment) -> bool {
        let (me, peer) = (from as usize, from.other() as usize);
        // Nothing follows a FIN.
        let limit = if self.side(from).is_ended() { self.sent[me] } else { segment.end() };
        // A FIN may lie behind a window that is full, and the sender's next number behind it.
        segment.seq.at_or_before(self.edge[me] + 1)
            && segment.end().at_or_before(limit)
            && segment.ack.at_or_before(self.sent[peer])
    }

    /// Whether a segment tells its receiver nothing new: it ends, or acknowledges, further back than honest ones can.
    fn is_old(&self, from: Direction, segment: &Segment) -> bool {
        let me = from as usize;
        // Its receiver need not take what lags a window behind the acknowledgements it has (RFC 5961, 5.2), and may
        // not have the last window's.
        let lag = (2 * self.window_bytes(from)).clamp(ACK_LAG_BYTES_MIN, 1 << 30) as usize;
        let peer_window = self.window_bytes(from.other()) as usize;
        segment.end().before(self.sent[me] - peer_window - 1) || segment.ack.before(self.acked[me] - lag)
    }

    /// What an accepted segment says of its sender's own direction.
    fn note_sent(&mut self, from: Direction, segment: &Segment) {
        let me = from as usize;
        let ends = segment.flags.contains(Flags::FIN) && segment.end().at_or_after(self.sent[me]);
        self.sent[me] = furthest(self.sent[me], segment.end());
        let may_end = match self.side(from) {
            Side::Open => true,
            // Data, and its end, may follow the answer to SYN at once (RFC 7413).
            Side::SynSent => self.side(from.other()).is_synchronised(),
            _ => false,
        };
        if ends && may_end {
            self.set_side(from, Side::FinSent);
        }
        if self.opener() == from {
            // It goes on, so the SYN in the middle was a late copy.
            self.sides &= !PENDING_SYN;
        }
        let shift = self.scale(from);
        let window = (self.offered_bytes(from, segment) + (1 << shift) - 1) >> shift;
        let window = u16::try_from(window).unwrap_or(u16::MAX);
        self.window_max[me] = self.window_max[me].max(window);
    }

    /// What it says of the other's.
    fn note_acknowledged(&mut self, from: Direction, segment: &Segment) {
        let (me, peer) = (from as usize, from.other() as usize);
        // A window of zero is still probed with one byte.
        let edge = segment.ack + self.offered_bytes(from, segment).max(1) as usize;
        self.edge[peer] = furthest(self.edge[peer], edge);
        match self.side(from.other()) {
            Side::SynSent if segment.ack.after(self.acked[me]) => {
                self.set_side(from.other(), Side::Open);
            }
            Side::FinSent if segment.ack == self.sent[peer] => self.set_side(from.other(), Side::FinAcked),
            _ => {}
        }
        self.acked[me] = furthest(self.acked[me], segment.ack);
    }

    fn opener(&self) -> Direction {
        if self.sides & OPENED_BY_REPLY == 0 { Direction::Original } else { Direction::Reply }
    }

    fn side(&self, of: Direction) -> Side {
        Side::ALL[usize::from(self.sides >> (3 * of as u8) & 7)]
    }

    fn set_side(&mut self, of: Direction, side: Side) {
        let shift = 3 * of as u8;
        self.sides = self.sides & !(7 << shift) | (side as u8) << shift;
    }

    fn scale(&self, of: Direction) -> u8 {
        (self.scales >> (4 * of as u8) & 15).min(WINDOW_SCALE_MAX)
    }

    fn set_offered_scale(&mut self, of: Direction, offered: Option<u8>) {
        let scale = offered.map_or(NO_SCALE, |scale| scale.min(WINDOW_SCALE_MAX));
        let shift = 4 * of as u8;
        self.scales = self.scales & !(15 << shift) | scale << shift;
    }

    /// Scales hold only if both ends offered one (RFC 7323, 2.2); windows kept so far were not scaled.
    fn agree_on_scales(&mut self) {
        let both = [Direction::Original, Direction::Reply];
        if both.iter().any(|end| self.scales >> (4 * *end as u8) & 15 == NO_SCALE) {
            self.scales = 0;
        }
        for end in both {
            let scaled = self.window_max[end as usize].div_ceil(1 << self.scale(end));
            self.window_max[end as usize] = scaled;
        }
    }

    /// An end's largest window, in bytes.
    fn window_bytes(&self, of: Direction) -> u32 {
        u32::from(self.window_max[of as usize]) << self.scale(of)
    }

    /// The window a segment offers, in bytes; that of SYN is never scaled.
    fn offered_bytes(&self, from: Direction, segment: &Segment) -> u32 {
        let shift = if segment.flags.contains(Flags::SYN) { 0 } else { self.scale(from) };
        u32::from(segment.window) << shift
    }
}

impl Default for TcpTracker {
    /// No connection yet.
    fn default() -> TcpTracker {
        TcpTracker::EMPTY
    }
}

impl std::fmt::Debug for TcpTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpTracker")
            .field("state", &self.state())
            .field("sent", &self.sent)
            .field("edge", &self.edge)
            .field("acked", &self.acked)
            .field("window_max", &self.window_max)
            .field("scales", &[self.scale(Direction::Original), self.scale(Direction::Reply)])
            .finish_non_exhaustive()
    }
}

/// The one further along.
fn furthest(one: SeqNumber, other: SeqNumber) -> SeqNumber {
    if other.after(one) { other } else { one }
}

/// The low 16 bits of a number.
const fn low_half(number: SeqNumber) -> u16 {
    (number.0 & 0xffff) as u16
}

/// Whether control bits can stand together; others are sent by scanners only.
const fn is_sane(flags: Flags) -> bool {
    let syn = flags.contains(Flags::SYN);
    let end = flags.intersects(Flags(Flags::FIN.0 | Flags::RST.0));
    let both = flags.contains(Flags(Flags::FIN.0 | Flags::RST.0));
    let says_something = flags.intersects(Flags(Flags::SYN.0 | Flags::ACK.0 | Flags::RST.0));
    says_something && !(both || syn && end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The short way of plain segments, against the one for all.
        #[test]
        fn plain_segments_are_taken_alike_both_ways(
            numbers in proptest::collection::vec((any::<bool>(), -70_000i32..70_000, -70_000i32..70_000, any::<u16>(), 0u32..3000), 1..40),
            scales in 0u8..=0xfe, window_max in any::<[u16; 2]>(), liberal: bool, replied: bool, start: u32,
        ) {
            let at = SeqNumber(start);
            let sides = BOTH_OPEN | if replied { OPENED_BY_REPLY } else { 0 };
            let mut short = TcpTracker { sent: [at; 2], edge: [at + 5000; 2], acked: [at; 2], window_max, pending: 0, scales, sides };
            let mut long = short;
            for (reply, seq, ack, window, payload_bytes) in numbers {
                let from = if reply { Direction::Reply } else { Direction::Original };
                let near = |base: SeqNumber, away: i32| SeqNumber(base.0.wrapping_add_signed(away));
                let segment = Segment {
                    seq: near(short.sent[from as usize], seq), ack: near(short.sent[from.other() as usize], ack),
                    flags: Flags::ACK, window, payload_bytes, window_scale: None,
                };
                prop_assert_eq!(short.take_plain(from, &segment, liberal), long.take_any(from, &segment, liberal));
                prop_assert_eq!(short, long);
            }
        }
    }
}
