//! One TCP connection of the guest, spliced to a host socket.
//!
//! The engine terminates the guest's TCP without buffering its bytes: what the guest sends goes into
//! the socket at once and is acknowledged only then; what the world sends stays queued in the socket
//! until the guest has acknowledged it, so the socket is the retransmission buffer.
//!
//! | state | entered | left | fields that hold |
//! |---|---|---|---|
//! | `Connecting` | the guest's SYN, a connect under way | the connect's end, the guest's RST | `recv.nxt` = its sequence number + 1 |
//! | `SynSent` | a client of a published port, our SYN sent | the guest's SYN-ACK, SYN or RST, 6 tries | `send.*` but the peer's window |
//! | `SynReceived` | the connect succeeded, our SYN-ACK sent; the guest's SYN met ours | the guest's ACK or RST, 6 tries | all |
//! | `Established` | the handshake's end | RST either way, or both FINs done | all; `recv.closed`, `send.eof` tell half-closes |
//! | `TimeWait` | both FINs done, ours first | 10 s, or a new SYN | sequence numbers; no socket |
//!
//! Read first: RFC 9293 sections 3.4 to 3.10, RFC 7323 section 2, RFC 5961.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use super::pool::{Budget, Pool};
use super::round_trip::RoundTrip;
use super::scoreboard::Scoreboard;
use crate::addr::MacAddr;
use crate::engine::core::Core;
use crate::engine::counters::DropReason;
use crate::engine::flows::Carried;
use crate::engine::host_net::{Close, HostStream, Readiness, Token};
use crate::engine::timers::TimerSlot;
use crate::frame::{Payload, QueuePair};
use crate::limits;
use crate::rate_limit::Sender;
use crate::time::Instant;
use crate::wire::tcp::{Flags, Options, SeqNumber};

/// Window scale offered to the guest (RFC 7323, 2.3), see [`limits::TCP_WINDOW_BYTES_MAX`].
pub(super) const WINDOW_SCALE: u8 = 8;
/// Segment size of a peer that names none (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// Smallest segment size obeyed; a smaller one would cost a frame for a handful of bytes.
const MIN_MSS: u16 = 88;
/// First retransmission of a SYN (RFC 6298, 2.1).
const SYN_RTO: Duration = Duration::from_secs(1);
/// Longest pause between retransmissions or window probes (RFC 6298, 2.5).
const RTO_MAX: Duration = Duration::from_secs(60);
/// Tries of a SYN.
const SYN_RETRIES: u8 = 6;
/// Tries of data before the guest is taken for dead: about 13 minutes (RFC 9293, 3.8.3 asks 100 s).
const DATA_RETRIES: u8 = 18;
/// Idle time after which the guest is asked whether it lives (RFC 9293, 3.8.4).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(7200);
/// Pause between unanswered keepalives, and their number (Linux's defaults).
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(75);
const KEEPALIVE_PROBES: u8 = 9;
/// Longest wait of an acknowledgement for an answer that carries it. Far below the 500 ms of RFC 9293,
/// 3.8.6.3, so that a guest that waits for the acknowledgement (Nagle's algorithm) hardly notices; one
/// that waited in vain ends the waiting.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(1);
/// Quick answers in a row that make a flow a dialogue. A flow begins as one.
const QUICK_ANSWERS: u8 = 2;
/// Below this window the socket is asked at each acknowledgement.
const WINDOW_ASK_BYTES: usize = 64 << 10;
/// How long a finished flow answers the guest's repeated FIN.
const TIME_WAIT: Duration = Duration::from_secs(10);

/// Both ends of a flow as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's end.
    pub guest: SocketAddr,
    /// The world's end; the gateway's address for what stands behind it.
    pub remote: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Connecting,
    SynSent,
    SynReceived,
    Established,
    TimeWait,
}

/// What becomes of a flow after an event.
#[derive(Debug)]
pub enum Fate {
    /// It lives.
    Live,
    /// Both directions ended in order.
    Done,
    /// It is over; the world sees RST, the guest knows already.
    Reset,
    /// It is over; the world sees RST and so does the guest.
    ResetBoth,
    /// The connect failed; the guest is told why.
    ConnectFailed(io::Error),
}

/// Bytes of the timestamps option and its padding in each segment's header.
pub(super) const TIMESTAMPS_BYTES: usize = 12;

/// The guest's timestamps (RFC 7323, 3 to 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timestamps {
    /// The newest of a segment at the left edge: what is echoed, and what old duplicates fall short of.
    pub(super) recent: u32,
    /// When it came.
    pub(super) taken_at: Instant,
}

impl Timestamps {
    /// Whether a segment of this value is an old duplicate (RFC 7323, 5.3).
    pub(super) fn is_old(self, value: u32) -> bool {
        value.wrapping_sub(self.recent).cast_signed() < 0
    }
}

/// Explicit congestion notification between guest and vunet (RFC 3168, 6.1): agreed on where the host's
/// side of the flow has it. Nothing between the two drops or marks, but a router or queue within the guest
/// may, on the way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ecn {
    /// Not in use.
    Off,
    /// The side that began asks for it.
    Asked,
    /// Both agreed.
    Agreed,
    /// A segment came marked: every acknowledgement says so until the guest slows down.
    Echoing,
}

impl Ecn {
    /// What a guest's SYN with `flags` asks for (RFC 3168, 6.1.1).
    pub(super) fn asked_by(flags: Flags) -> Ecn {
        if flags.contains(Flags::ECE | Flags::CWR) { Ecn::Asked } else { Ecn::Off }
    }
}

/// From the guest to the world.
#[derive(Debug)]
pub(super) struct Recv {
    /// Next byte expected: all before went into the socket.
    pub(super) nxt: SeqNumber,
    /// Right edge of the window as advertised; never moves left.
    pub(super) edge: SeqNumber,
    /// Shift of the windows we send.
    pub(super) shift: u8,
    /// Sequence number of the guest's FIN, once seen.
    pub(super) fin: Option<SeqNumber>,
    /// The FIN was reached and passed on.
    pub(super) closed: bool,
    /// What the socket cannot take yet, or the limit does not let pass.
    pub(super) pool: Pool,
    /// It waits in line for the limit.
    pub(super) limited: bool,
    /// That it sends, for who shares the limit.
    pub(super) sender: Sender,
    /// Bytes from `nxt` on that are gathered for one call at the end of the batch of frames.
    pub(super) queued: usize,
    /// What was acknowledged last.
    pub(super) acked: SeqNumber,
    /// An acknowledgement is owed at the batch's end.
    pub(super) ack_due: bool,
    /// An acknowledgement is owed by then: an answer of the world is expected to carry it.
    pub(super) ack_by: Option<Instant>,
    /// When the guest's newest bytes came.
    pub(super) bytes_at: Instant,
    /// Answers in a row that came within [`ACK_DELAY`] of the guest's bytes.
    pub(super) quick_answers: u8,
    /// The window when the socket was last asked for it, in bytes.
    pub(super) window_asked: usize,
    /// Segments of this batch beyond a hole. Each is owed a duplicate acknowledgement (RFC 5681, 4.2),
    /// or the guest would wait for its time-out instead of sending the hole again.
    pub(super) beyond_hole: u8,
    /// Where the newest bytes beyond a hole begin: their block is named first (RFC 2018, 4).
    pub(super) newest_beyond: SeqNumber,
    /// The guest takes SACK blocks, and sends them.
    pub(super) sack: bool,
    /// Timestamps, where the guest sends them.
    pub(super) timestamps: Option<Timestamps>,
    /// Explicit congestion notification.
    pub(super) ecn: Ecn,
    /// Since when challenges are counted, and how many they were.
    pub(super) challenges: (Instant, u8),
    /// The socket was asked to tell of room. Without that its readiness to write says nothing new:
    /// edge-triggered events repeat it with everything else they report.
    pub(super) wants_room: bool,
}

impl Recv {
    /// Of a flow that begins at `now`.
    fn new(now: Instant) -> Recv {
        Recv {
            nxt: SeqNumber(0),
            edge: SeqNumber(0),
            shift: 0,
            fin: None,
            closed: false,
            pool: Pool::default(),
            limited: false,
            sender: Sender::default(),
            queued: 0,
            acked: SeqNumber(0),
            ack_due: false,
            ack_by: None,
            bytes_at: now,
            quick_answers: QUICK_ANSWERS,
            window_asked: 0,
            beyond_hole: 0,
            newest_beyond: SeqNumber(0),
            sack: false,
            timestamps: None,
            ecn: Ecn::Off,
            challenges: (now, 0),
            wants_room: false,
        }
    }

    /// As far as bytes that follow `nxt` are held. That is what the window promised; but a guest that sends
    /// a whole segment into a window with less room (smoltcp's fast retransmission) goes on as if all of it
    /// were under way, and would send the rest never again. So one segment is held beyond an open window
    /// (RFC 9293, 3.10.7.4: what lies outside could be trimmed).
    pub(super) fn held_until(&self) -> SeqNumber {
        if self.edge.after(self.nxt) { self.edge + limits::FRAME_BYTES_MAX } else { self.edge }
    }

    /// Whether the flow is question and answer, and the answers are quick: then an acknowledgement may
    /// wait for the answer that can carry it.
    pub(super) fn is_dialogue(&self) -> bool {
        self.quick_answers >= QUICK_ANSWERS
    }

    /// Bytes of the world go to the guest at `now`.
    pub(super) fn note_answer(&mut self, now: Instant) {
        let is_quick = now.since(self.bytes_at) <= ACK_DELAY;
        self.quick_answers = if is_quick { (self.quick_answers + 1).min(QUICK_ANSWERS) } else { 0 };
    }
}

/// From the world to the guest.
#[derive(Debug)]
pub(super) struct Send {
    /// Initial sequence number.
    pub(super) iss: SeqNumber,
    /// Oldest unacknowledged.
    pub(super) una: SeqNumber,
    /// Next to send; moves back to `una` for a retransmission.
    pub(super) nxt: SeqNumber,
    /// Highest ever sent.
    pub(super) max: SeqNumber,
    /// Sequence number of the first byte in the socket's queue; lags `una` within a batch.
    pub(super) consumed: SeqNumber,
    /// The guest's window in bytes, and the segment that told it (RFC 9293, 3.10.7.4).
    pub(super) window: u32,
    pub(super) window_max: u32,
    pub(super) wl1: SeqNumber,
    pub(super) wl2: SeqNumber,
    /// Shift of the windows the guest sends.
    pub(super) shift: u8,
    /// Largest segment the guest takes, payload bytes.
    pub(super) mss: u16,
    /// Sequence number of our FIN, once the world's end of stream was met.
    pub(super) eof: Option<SeqNumber>,
    /// The socket may hold bytes not yet peeked.
    pub(super) readable: bool,
    /// It waits in line for the limit.
    pub(super) limited: bool,
    /// The world's FIN or error came: after the last byte there is one more thing to read.
    pub(super) peer_closed: bool,
    /// The world sent urgent bytes: reads stop at them, and where the kernel peeks from the front
    /// only, go on behind them once what lies before is discarded.
    pub(super) urgent: bool,
    /// A SYN or SYN-ACK is owed.
    pub(super) syn_due: bool,
    /// A probe (keepalive or zero window) is owed.
    pub(super) probe_due: bool,
    /// What a guest expects next whose segment was not acceptable: the answer begins there, if that was sent.
    pub(super) answer_at: Option<SeqNumber>,
    /// A reset at this sequence number is owed to a stray segment.
    pub(super) rst_due: Option<SeqNumber>,
    pub(super) dup_acks: u8,
    /// What the guest holds beyond `una`.
    pub(super) sacked: Scoreboard,
    /// Behind the highest byte sent again in this recovery (RFC 6675, 2: HighRxt).
    pub(super) resent: SeqNumber,
    /// Fast recovery lasts until this is acknowledged (RFC 6582).
    pub(super) recover: Option<SeqNumber>,
    /// Retransmissions, window probes or keepalives without success: they grow the pauses.
    pub(super) tries: u8,
    /// Time-outs since the guest was last heard: a guest that answers is alive, whatever it answers.
    pub(super) silent: u8,
    /// From when the pending time-out counts.
    pub(super) timer_base: Instant,
    /// How long the guest takes to acknowledge.
    pub(super) round_trip: RoundTrip,
}

impl Send {
    /// Of a flow that begins at `now`, with its first sequence number.
    fn new(iss: SeqNumber, now: Instant) -> Send {
        Send {
            iss,
            una: iss,
            nxt: iss,
            max: iss,
            consumed: iss + 1,
            window: 0,
            window_max: 0,
            wl1: SeqNumber(0),
            wl2: SeqNumber(0),
            shift: 0,
            mss: DEFAULT_MSS,
            eof: None,
            readable: false,
            limited: false,
            peer_closed: false,
            urgent: false,
            syn_due: false,
            probe_due: false,
            answer_at: None,
            rst_due: None,
            dup_acks: 0,
            sacked: Scoreboard::default(),
            resent: iss,
            recover: None,
            tries: 0,
            silent: 0,
            timer_base: now,
            round_trip: RoundTrip::default(),
        }
    }

    /// Whether bytes may wait for the guest to open its window.
    pub(super) fn probes_window(&self) -> bool {
        self.window == 0 && self.readable
    }

    /// Sequence number of an acknowledgement without bytes: behind all that was ever sent (RFC 9293, 3.4),
    /// however far back `nxt` went to send again. A guest that has those bytes, its acknowledgements lost,
    /// lets a segment from before them go, and the acknowledgement with it. Where the guest took back a part
    /// of its window, by more than its scale rounds, what lies behind is not acceptable to it either. One
    /// whose own segment was not acceptable says in it what is.
    pub(super) fn ack_seq(&mut self) -> SeqNumber {
        let told = self.answer_at.take();
        if let Some(told) = told.filter(|seq| seq.at_or_after(self.una) && seq.at_or_before(self.max)) {
            return told;
        }
        let edge = self.una + self.window as usize;
        if self.max.distance_from(edge) < 1 << self.shift { self.max } else { edge }
    }

    /// Whether nothing is awaited of the guest.
    pub(super) fn is_idle(&self) -> bool {
        self.max == self.una && !self.probes_window()
    }
}

/// One connection. `S` is the host's stream.
#[derive(Debug)]
pub struct Flow<S> {
    pub(super) key: Key,
    pub(super) token: Token,
    pub(super) guest_mac: Option<MacAddr>,
    pub(super) pair: QueuePair,
    pub(super) stream: Option<S>,
    pub(super) state: State,
    pub(super) recv: Recv,
    pub(super) send: Send,
    pub(super) timer: TimerSlot,
    /// On the list of flows with something to do at the batch's end.
    pub(super) dirty: bool,
    /// Waits for its turn to send, or for receive buffers.
    pub(super) queued: bool,
    /// Its place in the backlog: the end its SYN went to, until the handshake is done.
    pub(super) under_way: Option<SocketAddr>,
    pub(super) last_active: Instant,
    /// A client of a published port began it.
    pub(super) from_world: bool,
    /// What it carried.
    pub(super) carried: Carried,
    /// It leads to a service of ours, which no limit holds up.
    pub(super) is_service: bool,
    /// When it came to this worker.
    begun: Instant,
}

/// A flow on its way between workers. `D` is its stream without its worker.
#[derive(Debug)]
pub struct Moved<D> {
    pub(super) key: Key,
    guest_mac: Option<MacAddr>,
    stream: Option<D>,
    state: State,
    recv: Recv,
    send: Send,
    from_world: bool,
    pub(super) carried: Carried,
    is_service: bool,
}

impl<D> Moved<D> {
    /// Both ends.
    pub fn key(&self) -> Key {
        self.key
    }
}

impl<S: HostStream> Flow<S> {
    /// Takes the flow out of its worker.
    pub(super) fn detach(mut self) -> Moved<S::Detached> {
        // Whose turn it is there is another line's to say. Where its socket tells of room, what is held goes on.
        self.recv.wants_room |= std::mem::take(&mut self.recv.limited);
        self.send.limited = false;
        Moved {
            key: self.key,
            guest_mac: self.guest_mac,
            stream: self.stream.map(S::detach),
            state: self.state,
            recv: self.recv,
            send: self.send,
            from_world: self.from_world,
            carried: self.carried,
            is_service: self.is_service,
        }
    }

    /// Puts a flow into this worker. What it had to do was done or is noted in it; its socket tells of
    /// readiness anew.
    pub(super) fn attach(
        moved: Moved<S::Detached>,
        token: Token,
        now: Instant,
        attach: impl FnOnce(S::Detached) -> io::Result<S>,
    ) -> io::Result<Flow<S>> {
        let stream = moved.stream.map(attach).transpose()?;
        Ok(Flow {
            key: moved.key,
            token,
            guest_mac: moved.guest_mac,
            pair: QueuePair::default(),
            stream,
            state: moved.state,
            recv: moved.recv,
            send: moved.send,
            timer: TimerSlot::default(),
            dirty: false,
            queued: false,
            under_way: None,
            last_active: now,
            from_world: moved.from_world,
            carried: moved.carried,
            is_service: moved.is_service,
            begun: now,
        })
    }
}

/// Who began a flow.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// The guest's SYN with this sequence number, options and window.
    /// `ecn`: whether it asks for explicit congestion notification.
    Guest { irs: SeqNumber, options: Options, window: u16, ecn: Ecn },
    /// A client of a published port.
    World,
}

impl<S: HostStream> Flow<S> {
    pub(super) fn new(
        core: &Core,
        key: Key,
        token: Token,
        stream: S,
        iss: SeqNumber,
        origin: Origin,
    ) -> Flow<S> {
        let mut flow = Flow {
            key,
            token,
            guest_mac: None,
            pair: QueuePair::default(),
            stream: Some(stream),
            state: State::Connecting,
            recv: Recv::new(core.now),
            send: Send::new(iss, core.now),
            timer: TimerSlot::default(),
            dirty: false,
            queued: false,
            under_way: None,
            last_active: core.now,
            from_world: matches!(origin, Origin::World),
            carried: Carried::default(),
            is_service: false,
            begun: core.now,
        };
        flow.begin(core, origin);
        flow
    }

    fn begin(&mut self, core: &Core, origin: Origin) {
        match origin {
            Origin::Guest { irs, options, window, ecn } => {
                self.take_syn(core, irs, &options, window);
                self.recv.ecn = ecn;
            }
            Origin::World => {
                if self.stream.as_ref().is_some_and(HostStream::uses_ecn) {
                    self.recv.ecn = Ecn::Asked;
                }
                self.state = State::SynSent;
                self.send.syn_due = true;
                self.send.readable = true;
            }
        }
    }

    /// The end its SYN went to, while the handshake is not done.
    pub(super) fn destination(&self) -> Option<SocketAddr> {
        match self.state {
            State::Connecting | State::SynReceived => Some(self.key.remote),
            State::SynSent => Some(self.key.guest),
            State::Established | State::TimeWait => None,
        }
    }

    /// Takes what the guest's SYN says.
    pub(super) fn take_syn(&mut self, core: &Core, irs: SeqNumber, options: &Options, window: u16) {
        self.recv.nxt = irs + 1;
        self.recv.edge = irs + 1;
        let room = core.ip_mtu.saturating_sub(40);
        self.send.mss = options.mss.unwrap_or(DEFAULT_MSS).min(room).max(MIN_MSS);
        self.recv.sack = options.sack_permitted;
        self.recv.timestamps =
            options.timestamps.map(|(value, _)| Timestamps { recent: value, taken_at: core.now });
        if self.recv.timestamps.is_some() {
            // The segment size counts no options (RFC 6691, 2).
            self.send.mss -= TIMESTAMPS_BYTES as u16;
        }
        if let Some(shift) = options.window_scale {
            self.send.shift = shift.min(14);
            self.recv.shift = WINDOW_SCALE;
        } else {
            self.send.shift = 0;
            self.recv.shift = 0;
        }
        // A SYN's own window is never scaled (RFC 7323, 2.2).
        self.send.window = u32::from(window);
        self.send.window_max = self.send.window;
        self.send.wl1 = irs;
        self.send.wl2 = self.send.una;
    }

    /// The socket's news.
    pub(super) fn host_ready(&mut self, core: &mut Core, budget: &mut Budget, ready: Readiness) -> Fate {
        let Some(stream) = self.stream.as_mut() else {
            return Fate::Live;
        };
        if self.state == State::Connecting {
            if !ready.writable && !ready.failed {
                return Fate::Live;
            }
            if let Err(error) = stream.take_error() {
                return Fate::ConnectFailed(error);
            }
            if self.recv.ecn == Ecn::Asked {
                self.recv.ecn = if stream.uses_ecn() { Ecn::Agreed } else { Ecn::Off };
            }
            core.counters.connect_time.record_time(core.now.since(self.begun));
            self.state = State::SynReceived;
            self.send.syn_due = true;
            self.send.timer_base = core.now;
        }
        self.send.peer_closed |= ready.peer_closed || ready.failed;
        self.send.urgent |= ready.urgent;
        self.send.readable |= (ready.readable || self.send.peer_closed) && self.send.eof.is_none();
        if ready.writable && self.state == State::Established && self.recv.wants_room {
            // Room again: first what was held back, then a larger window for the guest.
            self.recv.wants_room = false;
            self.recv.window_asked = 0;
            if let Err(fate) = self.drain_pool(core, budget) {
                return fate;
            }
            self.recv.ack_due |= !self.recv.closed;
        }
        Fate::Live
    }

    /// Moves held payload into the socket while it fits and may pass, then passes a FIN on that was reached.
    pub(super) fn drain_pool(&mut self, core: &mut Core, budget: &mut Budget) -> Result<(), Fate> {
        while let Some(held_bytes) = self.recv.pool.front(budget, self.recv.nxt).map(<[u8]>::len) {
            if !self.passes(core, held_bytes) {
                break;
            }
            let bytes = self.recv.pool.front(budget, self.recv.nxt).unwrap_or_default();
            let Some(stream) = self.stream.as_mut() else { break };
            let sent = match stream.send(&Payload::from_host(bytes)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                sent => sent.map_err(|_| Fate::ResetBoth)?,
            };
            self.give_back(core, held_bytes, sent);
            if sent > 0 {
                self.took_held(core, sent);
            }
            if sent < held_bytes {
                self.want_room();
                break;
            }
        }
        self.pass_fin_on(budget)
    }

    /// The socket took so many of the bytes held.
    pub(super) fn took_held(&mut self, core: &mut Core, len_bytes: usize) {
        core.counters.payload_from_guest_bytes += len_bytes as u64;
        self.carried.from_guest_bytes += len_bytes as u64;
        self.recv.nxt = self.recv.nxt + len_bytes;
        self.recv.ack_due = true;
    }

    /// Moves what was gathered into the socket; what it does not take is held.
    pub(super) fn send_queued(&mut self, core: &mut Core, budget: &mut Budget) -> Result<(), Fate> {
        let queued = std::mem::take(&mut self.recv.queued);
        let Some(stream) = self.stream.as_mut().filter(|_| queued > 0) else { return Ok(()) };
        let (start, until, pool) = (self.recv.nxt, self.recv.held_until(), &mut self.recv.pool);
        let mut all_held = true;
        let mut hold = |rest: &Payload<'_>| {
            let at = start + (queued - rest.len());
            let held = rest.range(0, until.distance_from(at).max(0) as usize);
            all_held &= pool.insert(budget, at, &held) && held.len() == rest.len();
        };
        let sent = stream.send_queued(&mut hold).map_err(|_| Fate::ResetBoth)?;
        if !all_held {
            core.counters.drop_aside(DropReason::TableFull);
        }
        core.counters.payload_from_guest_bytes += sent as u64;
        self.carried.from_guest_bytes += sent as u64;
        self.recv.nxt = start + sent;
        if sent < queued {
            self.give_back(core, queued, sent);
            self.want_room();
        }
        Ok(())
    }

    /// Asks the socket to tell of room, if it was not asked already.
    pub(super) fn want_room(&mut self) {
        if let Some(stream) = self.stream.as_mut()
            && !std::mem::replace(&mut self.recv.wants_room, true)
        {
            stream.want_writable();
        }
    }

    /// Passes a FIN on that was reached.
    pub(super) fn pass_fin_on(&mut self, budget: &mut Budget) -> Result<(), Fate> {
        if self.recv.closed || self.recv.fin != Some(self.recv.nxt) {
            return Ok(());
        }
        if let Some(stream) = self.stream.as_mut() {
            stream.shutdown_write().map_err(|_| Fate::ResetBoth)?;
        }
        self.recv.nxt = self.recv.nxt + 1;
        self.recv.closed = true;
        self.recv.ack_due = true;
        self.recv.pool.clear(budget);
        Ok(())
    }

    /// Whether our FIN was sent and acknowledged.
    fn fin_acknowledged(&self) -> bool {
        self.send.eof.is_some_and(|eof| self.send.una.after(eof))
    }

    /// Ends the flow where both directions are done.
    pub(super) fn finish(&mut self, core: &Core) -> Fate {
        if self.state != State::Established || !self.recv.closed || !self.fin_acknowledged() {
            return Fate::Live;
        }
        if let Some(stream) = self.stream.take() {
            stream.close(Close::Clean);
        }
        self.state = State::TimeWait;
        self.send.timer_base = core.now;
        Fate::Live
    }

    /// When what is awaited of the guest counts as not come.
    fn patience_ends(&self) -> Option<Instant> {
        let send = &self.send;
        let pause = match self.state {
            State::Connecting => return None,
            State::SynSent | State::SynReceived => backoff(SYN_RTO, send.tries),
            State::TimeWait => TIME_WAIT,
            State::Established if send.max != send.una || send.probes_window() => {
                backoff(send.round_trip.timeout(), send.tries)
            }
            State::Established if send.tries > 0 => KEEPALIVE_PAUSE,
            State::Established => KEEPALIVE_IDLE,
        };
        Some(send.timer_base + pause)
    }

    /// Sets the timer to what is awaited next.
    pub(super) fn rearm(&mut self, core: &mut Core) {
        let next = [self.patience_ends(), self.recv.ack_by].into_iter().flatten().min();
        match next {
            Some(at) => core.timers.set(&mut self.timer, self.token, at),
            None => core.timers.clear(&mut self.timer),
        }
    }

    /// The timer came up.
    pub(super) fn timeout(&mut self, core: &mut Core) -> Fate {
        if self.recv.ack_by.is_some_and(|by| by <= core.now) {
            // No answer carried it: here none is quick.
            self.recv.ack_by = None;
            self.recv.ack_due = true;
            self.recv.quick_answers = 0;
        }
        if self.patience_ends().is_none_or(|at| at > core.now) {
            return Fate::Live;
        }
        self.send.timer_base = core.now;
        self.send.tries = self.send.tries.saturating_add(1);
        self.send.silent = self.send.silent.saturating_add(1);
        match self.state {
            State::Connecting => Fate::Live,
            State::TimeWait => Fate::Done,
            State::SynSent | State::SynReceived if self.send.tries > SYN_RETRIES => Fate::Reset,
            State::SynSent | State::SynReceived => {
                self.send.syn_due = true;
                Fate::Live
            }
            State::Established if self.send.window == 0 && !self.send.is_idle() => {
                // Closed, perhaps on bytes in flight: asked for as long as the guest answers
                // (RFC 9293, 3.8.6.1).
                if self.send.silent > DATA_RETRIES {
                    return Fate::ResetBoth;
                }
                self.send.sacked.clear();
                self.send.nxt = self.send.una;
                self.send.probe_due = true;
                Fate::Live
            }
            State::Established if self.send.max != self.send.una => {
                if self.send.tries > DATA_RETRIES {
                    return Fate::ResetBoth;
                }
                // A receiver may take back what it said it holds (RFC 2018, 8).
                self.send.sacked.clear();
                self.rewind(core);
                Fate::Live
            }
            State::Established => {
                if self.send.silent > KEEPALIVE_PROBES {
                    return Fate::ResetBoth;
                }
                self.send.probe_due = true;
                Fate::Live
            }
        }
    }

    /// Asks the guest at once whether it knows the flow; unanswered, like a keepalive or like lost bytes.
    pub(super) fn ask(&mut self, now: Instant) {
        match self.state {
            State::Connecting | State::TimeWait => return,
            State::SynSent | State::SynReceived => self.send.syn_due = true,
            State::Established => self.send.probe_due = true,
        }
        self.send.tries = u8::from(self.send.is_idle());
        self.send.timer_base = now;
    }

    /// Goes back to the oldest unacknowledged byte, over what the guest does not hold.
    pub(super) fn rewind(&mut self, core: &mut Core) {
        self.send.nxt = self.send.una;
        self.send.resent = self.send.una;
        self.send.round_trip.sent_again();
        self.send.recover = Some(self.send.max);
        core.counters.retransmits += 1;
    }

    /// The window to advertise, as the header's field. Grows the right edge by what the socket
    /// takes, never by a silly amount (RFC 9293, 3.8.6.2.2) and never back.
    /// Without an acknowledgement owed, or with little of the window used, it stands as it is, which
    /// spares asking the socket.
    pub(super) fn window_field(&mut self, core: &Core, scaled: bool) -> u16 {
        let left = self.recv.edge.distance_from(self.recv.nxt).max(0) as usize;
        let is_wide = left >= WINDOW_ASK_BYTES && left >= self.recv.window_asked / 4 * 3;
        let grow = !scaled || (self.recv.ack_due && !is_wide);
        if let Some(stream) = self.stream.as_mut().filter(|_| grow && !self.recv.closed) {
            let space = stream.send_space();
            if space.tight {
                self.want_room();
            }
            let bytes = self.window_within_limit(core, space.bytes);
            let free = bytes.saturating_sub(self.recv.pool.held_bytes());
            let edge = self.recv.nxt + free.min(limits::TCP_WINDOW_BYTES_MAX);
            let growth = edge.distance_from(self.recv.edge);
            // A socket that is not tight has a third of its queue free: no silly window, though it may
            // be less than a segment where the MTU is large and the queue small.
            if growth >= i32::from(self.send.mss) || (growth > 0 && !space.tight) {
                self.recv.edge = edge;
            }
            self.recv.window_asked = free;
        }
        let (nxt, promised) = (self.recv.nxt, self.recv.edge);
        if promised.before(nxt) {
            self.recv.edge = nxt;
        }
        let shift = if scaled { self.recv.shift } else { 0 };
        let mut field = (self.recv.edge.distance_from(nxt) as usize >> shift).min(0xffff);
        if scaled && (nxt + (field << shift)).before(promised) && field < 0xffff {
            // What the field cannot say exactly is rounded up: a promise is kept (RFC 7323, 2.4).
            field += 1;
        }
        self.recv.edge = nxt + (field << shift);
        field as u16
    }
}

fn backoff(first: Duration, tries: u8) -> Duration {
    first.saturating_mul(1 << tries.min(10)).min(RTO_MAX)
}
