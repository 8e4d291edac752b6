//! What a flow owes the guest at the end of a batch: handshake, data, FIN, acknowledgement, probes.
//!
//! Data goes from the socket's queue straight into receive buffers (`peek` into the reservation);
//! what the guest acknowledged is removed from the queue first. Everything here can be regenerated
//! from the flow's state, so a lack of receive buffers loses nothing: the flow waits its turn.

use std::io;

use super::flow::{Ecn, Fate, Flow, State, TIMESTAMPS_BYTES};
use crate::engine::core::Core;
use crate::engine::emit;
use crate::engine::guest_port::{GuestPort, ReserveError};
use crate::engine::host_net::HostStream;
use crate::frame::Payload;
use crate::limits;
use crate::rate_limit::Cost;
use crate::wire::ethernet;
use crate::wire::tcp::{self, Flags, Header, Options, SeqNumber};
use crate::wire::vnet::{Gso, GsoKind};

/// Duplicate acknowledgements sent at once: one that may change the window, and the three that count.
const DUPLICATES_MAX: u8 = 4;

/// What is left to do after an output.
#[derive(Debug)]
pub(super) enum After {
    /// Nothing until the next event.
    Idle,
    /// More could be sent now; others have their turn first.
    More,
    /// The limit lets no more pass; its turn in line comes.
    Limited,
    /// Receive buffers are missing.
    Starved {
        /// Frames went out before they ran short.
        sent: bool,
    },
    /// The flow ends.
    Over(Fate),
}

/// Why no more data is sent, all being well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// There is no more, or the guest's window is full.
    All,
    /// The turn is over.
    Turn,
    /// The limit lets no more pass.
    ToLimit,
}

/// Why sending stopped short.
pub(super) enum Stop {
    Starved,
    Over(Fate),
}

impl From<ReserveError> for Stop {
    fn from(error: ReserveError) -> Stop {
        match error {
            ReserveError::Full | ReserveError::Down => Stop::Starved,
            ReserveError::TooSmall => Stop::Over(Fate::Reset),
        }
    }
}

impl<S: HostStream> Flow<S> {
    /// Sends all that is owed and possible; of data no more than what costs `left`, which becomes less by that.
    pub(super) fn output(&mut self, core: &mut Core, port: &mut impl GuestPort, left: &mut Cost) -> After {
        let frames_before = core.counters.frames_to_guest;
        let result = self.try_output(core, port, left);
        let after = match result {
            Ok(sent) => match (self.finish(core), sent) {
                (Fate::Live, Sent::Turn) => After::More,
                (Fate::Live, Sent::ToLimit) => After::Limited,
                (Fate::Live, Sent::All) => After::Idle,
                (fate, _) => After::Over(fate),
            },
            Err(Stop::Starved) => After::Starved { sent: core.counters.frames_to_guest > frames_before },
            Err(Stop::Over(fate)) => return After::Over(fate),
        };
        if matches!(after, After::Starved { .. }) {
            // No time runs against a guest that posts no buffers; its next kick wakes the flow.
            core.timers.clear(&mut self.timer);
        } else {
            self.rearm(core);
        }
        after
    }

    fn try_output(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        left: &mut Cost,
    ) -> Result<Sent, Stop> {
        if let Some(seq) = self.send.rst_due {
            self.send_empty(core, port, Flags::RST, seq)?;
            self.send.rst_due = None;
        }
        match self.state {
            State::Connecting => return Ok(Sent::All),
            State::SynSent | State::SynReceived => {
                if self.send.syn_due {
                    self.send_syn(core, port)?;
                    self.send.syn_due = false;
                }
                return Ok(Sent::All);
            }
            State::Established | State::TimeWait => {}
        }
        self.discard_acknowledged()?;
        let sent = match self.state {
            State::Established => self.send_data(core, port, left)?,
            _ => Sent::All,
        };
        if self.send.probe_due {
            // An old sequence number makes the peer answer with its window (RFC 9293, 3.8.4 and 3.8.6.1).
            self.send_empty(core, port, Flags::ACK, self.send.una - 1)?;
            self.send.probe_due = false;
            self.recv.ack_due = false;
        }
        self.send_acks(core, port)?;
        Ok(sent)
    }

    /// Sends the acknowledgement owed, and for segments beyond a hole as many duplicates as make the
    /// guest send the hole again.
    fn send_acks(&mut self, core: &mut Core, port: &mut impl GuestPort) -> Result<(), Stop> {
        if self.recv.sack {
            // One that names the blocks tells as much as all (RFC 2018, 4).
            self.recv.beyond_hole = self.recv.beyond_hole.min(1);
        }
        while self.recv.beyond_hole > 0 {
            self.recv.beyond_hole = self.recv.beyond_hole.min(DUPLICATES_MAX) - 1;
            let seq = self.send.ack_seq();
            self.send_empty(core, port, Flags::ACK, seq)?;
            self.recv.ack_due = false;
        }
        if self.recv.ack_due {
            let seq = self.send.ack_seq();
            self.send_empty(core, port, Flags::ACK, seq)?;
            self.recv.ack_due = false;
        }
        Ok(())
    }

    /// Removes from the socket what the guest has.
    pub(super) fn discard_acknowledged(&mut self) -> Result<(), Stop> {
        let until = match self.send.eof {
            Some(eof) if self.send.una.after(eof) => eof,
            _ => self.send.una,
        };
        let len = until.distance_from(self.send.consumed);
        if len <= 0 {
            return Ok(());
        }
        if let Some(stream) = self.stream.as_mut() {
            stream.discard(len as usize).map_err(|_| Stop::Over(Fate::ResetBoth))?;
        }
        self.send.consumed = until;
        self.send.readable |= self.send.urgent && self.send.eof.is_none();
        Ok(())
    }

    /// Sends data and FIN as far as window, buffers, this flow's turn and the limit go.
    fn send_data(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        left: &mut Cost,
    ) -> Result<Sent, Stop> {
        let mut turn_bytes = limits::FLOW_TURN_BYTES;
        let mut is_first = true;
        for _ in 0..limits::FLOW_TURN_FRAMES {
            self.skip_sacked();
            if self.send.eof == Some(self.send.nxt) {
                self.send_empty(core, port, Flags::FIN | Flags::ACK, self.send.nxt)?;
                self.recv.ack_due = false;
                self.sent(core, 1);
                return Ok(Sent::All);
            }
            let unsent = self.send.nxt.before(self.send.max) || self.send.readable;
            if self.send.eof.is_some_and(|eof| self.send.nxt.after(eof)) || !unsent {
                return Ok(Sent::All);
            }
            let Some(room) = self.room_within(port, *left, is_first) else { return Ok(Sent::ToLimit) };
            let before = self.send.nxt;
            if room == 0 || !self.send_one(core, port, room)? {
                return Ok(Sent::All);
            }
            is_first = false;
            // A FIN costs nothing.
            let end = self.send.eof.filter(|eof| eof.before(self.send.nxt)).unwrap_or(self.send.nxt);
            let sent_bytes = end.distance_from(before).unsigned_abs() as usize;
            *left = left.less(Cost::of_payload(sent_bytes, self.head_bytes(), self.send.mss.into()));
            turn_bytes = turn_bytes.saturating_sub(sent_bytes);
            if turn_bytes == 0 {
                break;
            }
        }
        Ok(Sent::Turn)
    }

    /// Payload bytes the next frame may carry, zero for none; `None` if only the limit is in the way. What is left of
    /// the limit is used in whole segments.
    fn room_within(&self, port: &impl GuestPort, left: Cost, is_first: bool) -> Option<usize> {
        let offloads = port.offloads();
        let room = self.frame_room(offloads.checksum && offloads.tso4 && self.key.guest.is_ipv4());
        let mss = usize::from(self.send.mss);
        let allowed = left.payload_max(self.head_bytes(), mss);
        match allowed {
            _ if allowed >= room => Some(room),
            _ if allowed >= mss => Some(allowed - allowed % mss),
            0 => None,
            _ => is_first.then_some(allowed),
        }
    }

    /// While sending again: over what the guest holds to the next hole, and from the last hole to where
    /// sending stopped (RFC 6675, 4, `NextSeg`).
    fn skip_sacked(&mut self) {
        let send = &mut self.send;
        if send.sacked.is_empty() || !send.nxt.before(send.max) {
            return;
        }
        send.nxt = match send.sacked.hole(send.nxt) {
            (start, Some(_)) => start,
            (_, None) if send.recover.is_some() => send.max,
            (start, None) => start,
        };
    }

    /// Whether there may be data for the guest that its window lets pass.
    pub(super) fn has_data_to_send(&self) -> bool {
        let unsent = self.send.nxt.before(self.send.max) || self.send.readable;
        self.state == State::Established && unsent && self.frame_room(true) > 0
    }

    /// Payload bytes the next frame may carry, zero to wait.
    fn frame_room(&self, segmentation: bool) -> usize {
        let send = &self.send;
        let in_flight = send.nxt.distance_from(send.una).max(0) as usize;
        let window = (send.window as usize).saturating_sub(in_flight);
        let mss = usize::from(send.mss);
        // Sender's silly-window avoidance (RFC 9293, 3.8.6.2.1).
        if window < mss && in_flight > 0 && window < send.window_max as usize / 2 {
            return 0;
        }
        let frame_max = ethernet::HEADER_BYTES + 65_535;
        let room = if segmentation { window.min(frame_max - self.head_bytes()) } else { window.min(mss) };
        match send.sacked.hole(send.nxt) {
            (_, Some(end)) if send.nxt.before(send.max) => {
                room.min(end.distance_from(send.nxt).max(0) as usize)
            }
            _ => room,
        }
    }

    /// Bytes of a data frame's headers.
    fn head_bytes(&self) -> usize {
        let options = if self.recv.timestamps.is_some() { TIMESTAMPS_BYTES } else { 0 };
        emit::ip_head_bytes(self.key.guest.ip()) + tcp::HEADER_BYTES + options
    }

    /// Sends one frame of at most `room` bytes of data; false if there is nothing to send.
    fn send_one(&mut self, core: &mut Core, port: &mut impl GuestPort, room: usize) -> Result<bool, Stop> {
        let head_bytes = self.head_bytes();
        let reserved = port.reserve(self.pair, head_bytes + 1, head_bytes + room)?;
        let ask = reserved - head_bytes;
        let offset = self.send.nxt.distance_from(self.send.consumed).max(0) as usize;
        let Some(stream) = self.stream.as_mut() else {
            port.cancel();
            return Ok(false);
        };
        let mut len = match stream.peek(offset, port.reserved(head_bytes).range(0, ask)) {
            Ok(len) if len > 0 => len,
            outcome => {
                port.cancel();
                self.send.readable = false;
                return match outcome {
                    Ok(_) => {
                        self.send.eof = Some(self.send.nxt);
                        Ok(true)
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                    Err(_) => Err(Stop::Over(Fate::ResetBoth)),
                };
            }
        };
        // A short read means an empty queue (epoll(7)), unless what follows is the end of the stream or
        // an urgent byte.
        let mut failed = false;
        if len < ask && (self.send.nxt + len).at_or_after(self.send.max) {
            if self.send.peer_closed {
                // The stream's end goes with its last bytes.
                match stream.peek(offset + len, port.reserved(head_bytes + len).range(0, ask - len)) {
                    Ok(0) => self.send.eof = Some(self.send.nxt + len),
                    Ok(more) => len += more,
                    Err(error) => failed = error.kind() != io::ErrorKind::WouldBlock,
                }
            } else if !self.send.urgent {
                self.send.readable = false;
            }
        }
        let sent = self.commit_data(core, port, head_bytes, len)?;
        // An error is told once: the next look would find an end where there is none.
        if failed { Err(Stop::Over(Fate::ResetBoth)) } else { Ok(sent) }
    }

    fn commit_data(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        head_bytes: usize,
        len: usize,
    ) -> Result<bool, Stop> {
        let ends = self.send.eof == Some(self.send.nxt + len);
        let flags = match (ends, self.send.readable) {
            (true, _) => Flags::ACK | Flags::PSH | Flags::FIN,
            (false, false) => Flags::ACK | Flags::PSH,
            (false, true) => Flags::ACK,
        };
        let header = self.header(core, flags, self.send.nxt, Options::default());
        let partial = port.offloads().checksum;
        let Some(mac) = self.guest_mac else {
            port.cancel();
            return Ok(false);
        };
        let head = {
            let reserved = port.reserved(head_bytes).range(0, len);
            emit::tcp(mac, self.key.remote, self.key.guest, &header, &reserved.as_payload(), partial)
        };
        let Some(head) = head else {
            port.cancel();
            return Ok(false);
        };
        let mut vnet = head.vnet;
        if len > usize::from(self.send.mss) {
            vnet.gso = Some(Gso {
                kind: GsoKind::Tcp4,
                size_bytes: self.send.mss,
                headers_bytes: head_bytes as u16,
                ecn: false,
            });
        }
        port.commit(vnet, head.bytes(), head_bytes + len);
        core.counters.frames_to_guest += 1;
        core.counters.payload_to_guest_bytes += len as u64;
        let fresh = (self.send.nxt + len).distance_from(self.send.max).max(0) as usize;
        self.carried.to_guest_bytes += fresh.min(len) as u64;
        self.recv.ack_due = false;
        self.recv.note_answer(core.now);
        self.sent(core, len + usize::from(ends));
        Ok(true)
    }

    /// Advances over `len` sequence numbers just sent.
    fn sent(&mut self, core: &Core, len: usize) {
        let send = &mut self.send;
        if send.una == send.max {
            send.timer_base = core.now;
        }
        if send.nxt.before(send.max) {
            send.round_trip.sent_again();
        } else {
            send.round_trip.sent(core.now, send.nxt + len);
        }
        send.nxt = send.nxt + len;
        if send.nxt.after(send.resent) {
            send.resent = send.nxt;
        }
        if send.nxt.after(send.max) {
            send.max = send.nxt;
        }
    }

    fn header(&mut self, core: &Core, flags: Flags, seq: SeqNumber, options: Options) -> Header {
        let syn = flags.contains(Flags::SYN);
        let reset = flags.contains(Flags::RST);
        let mut options = options;
        if let Some(timestamps) = self.recv.timestamps.filter(|_| !reset) {
            options.timestamps = Some((self.timestamp(core), timestamps.recent));
        }
        let mut flags = flags;
        if self.recv.ecn == Ecn::Echoing && flags.contains(Flags::ACK) && !syn && !reset {
            flags = flags | Flags::ECE;
        }
        if flags.contains(Flags::ACK) {
            self.recv.ack_by = None;
            self.recv.acked = self.recv.nxt;
            self.send.answer_at = None;
        }
        Header {
            src_port: self.key.remote.port(),
            dst_port: self.key.guest.port(),
            seq,
            ack: if flags.contains(Flags::ACK) { self.recv.nxt } else { SeqNumber(0) },
            flags,
            window: if reset { 0 } else { self.window_field(core, !syn) },
            urgent: 0,
            options,
        }
    }

    /// Our timestamp: milliseconds, from a beginning of each flow's own (RFC 7323, 5.4).
    fn timestamp(&self, core: &Core) -> u32 {
        self.send.iss.0.wrapping_add((core.now.as_micros() / 1000) as u32)
    }

    fn send_syn(&mut self, core: &mut Core, port: &mut impl GuestPort) -> Result<(), Stop> {
        let answer = self.state == State::SynReceived;
        let scaled = !answer || self.recv.shift > 0;
        let options = Options {
            mss: Some(core.ip_mtu.saturating_sub(40)),
            window_scale: scaled.then_some(super::flow::WINDOW_SCALE),
            sack_permitted: !answer || self.recv.sack,
            timestamps: (!answer).then(|| (self.timestamp(core), 0)),
            ..Options::default()
        };
        let flags = match (answer, self.recv.ecn) {
            (true, Ecn::Agreed | Ecn::Echoing) => Flags::SYN | Flags::ACK | Flags::ECE,
            (true, _) => Flags::SYN | Flags::ACK,
            // One that was not answered may have been thrown away for what it asks (RFC 3168, 6.1.1.1).
            (false, Ecn::Asked) if self.send.tries == 0 => Flags::SYN | Flags::ECE | Flags::CWR,
            (false, _) => Flags::SYN,
        };
        self.send_segment(core, port, flags, self.send.iss, options)?;
        if self.send.max == self.send.iss {
            self.send.round_trip.sent(core.now, self.send.iss + 1);
        } else {
            self.send.round_trip.sent_again();
        }
        self.send.max = self.send.iss + 1;
        self.send.nxt = self.send.max;
        Ok(())
    }

    fn send_empty(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        flags: Flags,
        seq: SeqNumber,
    ) -> Result<(), Stop> {
        let mut options = Options::default();
        if self.recv.sack && flags.contains(Flags::ACK) && self.recv.pool.held_bytes() > 0 {
            options.sack = self.recv.pool.blocks(self.recv.nxt, self.recv.newest_beyond);
        }
        self.send_segment(core, port, flags, seq, options)
    }

    fn send_segment(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        flags: Flags,
        seq: SeqNumber,
        options: Options,
    ) -> Result<(), Stop> {
        let Some(mac) = self.guest_mac else {
            return Ok(());
        };
        let header = self.header(core, flags, seq, options);
        let partial = port.offloads().checksum;
        if let Some(head) = emit::tcp(mac, self.key.remote, self.key.guest, &header, &Payload::EMPTY, partial)
        {
            port.send(self.pair, head.vnet, head.bytes())?;
            core.counters.frames_to_guest += 1;
        }
        Ok(())
    }

    /// Tells the guest that the flow is over; best effort, an unheard reset is repeated to its next
    /// segment.
    pub(super) fn reset_guest(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        let seq = self.send.max;
        let header = self.header(core, Flags::RST | Flags::ACK, seq, Options::default());
        let Some(mac) = self.guest_mac else { return };
        let partial = port.offloads().checksum;
        if let Some(head) = emit::tcp(mac, self.key.remote, self.key.guest, &header, &Payload::EMPTY, partial)
        {
            core.send(port, self.pair, head.vnet, head.bytes());
        }
    }
}
