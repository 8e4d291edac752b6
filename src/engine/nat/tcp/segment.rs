//! A segment from the guest meets its flow: RFC 9293 section 3.10.7, with RFC 5961's checks.
//!
//! Nothing is sent from here. Payload goes into the socket at once; answers owed are noted in the
//! flow and sent at the end of the batch, one acknowledgement for all of a batch's segments.

use std::io;
use std::time::Duration;

use super::flow::{ACK_DELAY, Ecn, Fate, Flow, State, TIMESTAMPS_BYTES};
use super::pool::Budget;
use crate::engine::core::Core;
use crate::engine::counters::DropReason;
use crate::engine::host_net::{Close, HostStream};
use crate::frame::Payload;
use crate::limits;
use crate::wire::icmpv4::UnreachableCode;
use crate::wire::tcp::{Flags, Header, SeqNumber};

/// Payload from which on a segment may be gathered with others whatever the segment size.
const BULK_BYTES: usize = 1400;
/// Idle time after which old timestamps prove nothing (RFC 7323, 5.5): half a circle of a clock of 1 ms.
const PAWS_IDLE: Duration = Duration::from_secs(24 * 86_400);
/// Least path MTU believed, in bytes (Linux's `min_pmtu`): a smaller one is a forger's.
const PATH_MTU_MIN: u16 = 552;
/// Path MTU of a router that does not say (RFC 1191, 5).
const PATH_MTU_UNTOLD: u16 = 576;
/// Duplicate acknowledgements that mean a loss (RFC 5681, 3.2).
const DUP_ACKS: u8 = 3;

impl<S: HostStream> Flow<S> {
    /// Takes one segment of the guest.
    pub(super) fn segment(
        &mut self,
        core: &mut Core,
        budget: &mut Budget,
        header: &Header,
        payload: &Payload<'_>,
    ) -> Fate {
        match self.state {
            State::Connecting => self.segment_while_connecting(core, header),
            State::SynSent => self.segment_after_our_syn(core, header),
            State::TimeWait => self.segment_in_time_wait(header),
            State::SynReceived | State::Established => self.segment_in_sync(core, budget, header, payload),
        }
    }

    /// What a segment says of congestion: marked by a router in the guest, or that the guest slowed down.
    pub(super) fn note_congestion(&mut self, header: &Header, is_marked: bool) {
        if matches!(self.recv.ecn, Ecn::Off | Ecn::Asked) || header.flags.contains(Flags::SYN) {
            return;
        }
        if header.flags.contains(Flags::CWR) {
            self.recv.ecn = Ecn::Agreed;
        }
        if is_marked {
            self.recv.ecn = Ecn::Echoing;
        }
    }

    /// Answers what proves nothing with an acknowledgement, so many times a second (RFC 5961, 7).
    fn challenge(&mut self, core: &mut Core) {
        let (since, count) = &mut self.recv.challenges;
        if core.now.since(*since) >= Duration::from_secs(1) {
            (*since, *count) = (core.now, 0);
        }
        if *count < limits::TCP_CHALLENGES_PER_SECOND {
            *count += 1;
            self.recv.ack_due = true;
        } else {
            core.counters.drop_aside(DropReason::RateLimited);
        }
    }

    fn segment_while_connecting(&mut self, core: &Core, header: &Header) -> Fate {
        if header.flags.contains(Flags::RST) {
            return if header.seq == self.recv.nxt { Fate::Reset } else { Fate::Live };
        }
        if header.flags.contains(Flags::SYN) && header.seq + 1 != self.recv.nxt {
            // The guest gave up and began anew with the same ports; the connect under way serves both.
            self.take_syn(core, header.seq, &header.options, header.window);
            self.recv.ecn = Ecn::asked_by(header.flags);
        }
        Fate::Live
    }

    fn segment_after_our_syn(&mut self, core: &mut Core, header: &Header) -> Fate {
        let acks_ours = header.flags.contains(Flags::ACK) && header.ack == self.send.iss + 1;
        if header.flags.contains(Flags::RST) {
            return if acks_ours { Fate::Reset } else { Fate::Live };
        }
        if header.flags.contains(Flags::ACK) && !acks_ours {
            self.send.rst_due = Some(header.ack);
            return Fate::Live;
        }
        if !header.flags.contains(Flags::SYN) {
            return Fate::Live;
        }
        self.take_syn(core, header.seq, &header.options, header.window);
        if !acks_ours {
            // Both began at once (RFC 9293, 3.5, figure 8).
            self.state = State::SynReceived;
            self.send.syn_due = true;
            self.send.tries = 0;
            self.send.timer_base = core.now;
            return Fate::Live;
        }
        if self.recv.ecn == Ecn::Asked {
            let agreed = header.flags.contains(Flags::ECE) && !header.flags.contains(Flags::CWR);
            self.recv.ecn = if agreed { Ecn::Agreed } else { Ecn::Off };
        }
        self.establish(core, header.ack);
        self.recv.ack_due = true;
        Fate::Live
    }

    /// The guest's "destination unreachable" about the segment at `seq`, which must be under way (RFC 5927,
    /// 4.1).
    pub(super) fn unreachable(
        &mut self,
        core: &mut Core,
        seq: SeqNumber,
        code: UnreachableCode,
        next_hop_mtu: u16,
    ) -> Fate {
        if seq.before(self.send.una) || seq.at_or_after(self.send.max) {
            core.counters.drop(DropReason::OutOfWindow);
            return Fate::Live;
        }
        match (self.state, code) {
            (State::Established, UnreachableCode::FragmentationNeeded) => {
                self.take_path_mtu(core, next_hop_mtu);
                Fate::Live
            }
            // A guest's firewall refuses a client of a published port (RFC 5461, 4.1).
            (State::SynSent, code) if code != UnreachableCode::FragmentationNeeded => Fate::Reset,
            // Of a connection that was there already it is no end (RFC 5927, 5.2).
            _ => Fate::Live,
        }
    }

    /// Segments of this size do not reach the guest's end, which is behind a narrower link than ours: what is
    /// under way goes out again in smaller ones (RFC 1191, 3 and 6.4).
    fn take_path_mtu(&mut self, core: &mut Core, next_hop_mtu: u16) {
        let mtu = if next_hop_mtu == 0 { PATH_MTU_UNTOLD } else { next_hop_mtu.max(PATH_MTU_MIN) };
        let options = if self.recv.timestamps.is_some() { TIMESTAMPS_BYTES as u16 } else { 0 };
        let mss = mtu - 40 - options;
        if mss < self.send.mss {
            self.send.mss = mss;
            self.rewind(core);
            self.send.timer_base = core.now;
        }
    }

    /// Whether it is the guest's SYN-ACK where both began at once: its SYN is known already.
    fn crosses_our_syn(&self, header: &Header) -> bool {
        self.state == State::SynReceived
            && header.flags.contains(Flags::SYN | Flags::ACK)
            && !header.flags.contains(Flags::RST)
            && header.seq + 1 == self.recv.nxt
            && header.ack == self.send.iss + 1
    }

    /// Whether this SYN begins a new connection in place of one in TIME-WAIT, rather than being an old
    /// duplicate (RFC 9293, 3.6.1; RFC 6191).
    pub(super) fn may_be_followed_by(&self, header: &Header) -> bool {
        let newer = match (self.recv.timestamps, header.options.timestamps) {
            (Some(known), Some((value, _))) => !known.is_old(value) && value != known.recent,
            _ => false,
        };
        newer || header.seq.at_or_after(self.recv.nxt)
    }

    fn segment_in_time_wait(&mut self, header: &Header) -> Fate {
        if header.flags.contains(Flags::RST) {
            return if header.seq == self.recv.nxt { Fate::Done } else { Fate::Live };
        }
        self.recv.ack_due = true;
        Fate::Live
    }

    fn establish(&mut self, core: &mut Core, ack: SeqNumber) {
        self.state = State::Established;
        self.send.round_trip.acknowledged(core.now, ack);
        self.send.una = ack;
        self.send.nxt = ack;
        self.send.max = ack;
        self.send.syn_due = false;
        self.send.tries = 0;
        self.send.timer_base = core.now;
    }

    fn segment_in_sync(
        &mut self,
        core: &mut Core,
        budget: &mut Budget,
        header: &Header,
        payload: &Payload<'_>,
    ) -> Fate {
        if !self.timestamps_pass(core, header) {
            return Fate::Live;
        }
        if self.is_bulk(header, payload) && self.queue(core, header, payload) {
            return Fate::Live;
        }
        if let Err(fate) = self.send_queued(core, budget) {
            return fate;
        }
        let flags = header.flags;
        if self.crosses_our_syn(header) {
            self.establish(core, header.ack);
            self.recv.ack_due = true;
            return Fate::Live;
        }
        let len = payload.len() + usize::from(flags.contains(Flags::FIN));
        if !self.acceptable(header.seq, len) {
            core.counters.drop(DropReason::OutOfWindow);
            if flags.contains(Flags::SYN) && self.state == State::SynReceived {
                self.send.syn_due = true;
            } else if !payload.is_empty() {
                self.recv.ack_due = true;
            } else if !flags.contains(Flags::RST) {
                self.challenge(core);
            }
            self.send.answer_at = (self.recv.ack_due && flags.contains(Flags::ACK)).then_some(header.ack);
            return Fate::Live;
        }
        if flags.contains(Flags::RST) {
            if header.seq == self.recv.nxt {
                return self.reset_by_guest();
            }
            self.challenge(core);
            return Fate::Live;
        }
        if flags.contains(Flags::SYN) {
            // RFC 5961, 4.2; a guest that rebooted answers with RST.
            self.challenge(core);
            return Fate::Live;
        }
        if !flags.contains(Flags::ACK) {
            return Fate::Live;
        }
        if self.state == State::SynReceived {
            if header.ack != self.send.iss + 1 {
                self.send.rst_due = Some(header.ack);
                return Fate::Live;
            }
            self.establish(core, header.ack);
        }
        if !self.acknowledge(core, header, payload.is_empty()) {
            return Fate::Live;
        }
        match self.take_payload(core, budget, header, payload) {
            Ok(()) => Fate::Live,
            Err(fate) => fate,
        }
    }

    /// Judges a segment's timestamps where they are in use, and takes one to echo (RFC 7323, 3.2, 4.3
    /// and 5.3); false if the segment is to be let go of.
    fn timestamps_pass(&mut self, core: &mut Core, header: &Header) -> bool {
        let Some(timestamps) = &mut self.recv.timestamps else { return true };
        if header.flags.contains(Flags::RST) {
            return true;
        }
        let Some((value, _)) = header.options.timestamps else {
            core.counters.drop(DropReason::OldTimestamp);
            return false;
        };
        let is_stale = core.now.since(timestamps.taken_at) >= PAWS_IDLE;
        if timestamps.is_old(value) && !is_stale {
            core.counters.drop(DropReason::OldTimestamp);
            self.challenge(core);
            return false;
        }
        if header.seq.at_or_before(self.recv.acked) {
            timestamps.recent = value;
            timestamps.taken_at = core.now;
        }
        true
    }

    /// Whether a segment is one of many: full, at the next byte, with nothing to it but its bytes.
    fn is_bulk(&self, header: &Header, payload: &Payload<'_>) -> bool {
        let recv = &self.recv;
        self.state == State::Established
            && payload.len() >= usize::from(self.send.mss).min(BULK_BYTES)
            && header.seq == recv.nxt + recv.queued
            && header.flags.contains(Flags::ACK)
            && !header.flags.intersects(Flags::SYN | Flags::FIN | Flags::RST | Flags::URG)
            && !header.ack.after(self.send.max)
            && recv.fin.is_none()
            && !recv.closed
            && recv.pool.held_bytes() == 0
    }

    /// Gathers a bulk segment for one call at the batch's end. False if it has to go by itself.
    fn queue(&mut self, core: &mut Core, header: &Header, payload: &Payload<'_>) -> bool {
        if self.stream.is_none() || !self.passes(core, payload.len()) {
            return false;
        }
        if !self.stream.as_mut().is_some_and(|stream| stream.queue(payload)) {
            self.give_back(core, payload.len(), 0);
            return false;
        }
        self.acknowledge(core, header, false);
        self.recv.queued += payload.len();
        self.recv.ack_due = true;
        self.recv.bytes_at = core.now;
        true
    }

    /// The guest's reset. Where both streams had ended and only our FIN is not acknowledged, the guest
    /// has forgotten a connection that was complete: the world is to have what is queued of it.
    fn reset_by_guest(&mut self) -> Fate {
        let complete = self.recv.closed && self.send.eof == Some(self.send.una);
        if !complete || self.discard_acknowledged().is_err() {
            return Fate::Reset;
        }
        if let Some(stream) = self.stream.take() {
            stream.close(Close::Clean);
        }
        Fate::Done
    }

    /// RFC 9293, 3.10.7.4, first step. A segment that begins at the next byte expected is let through
    /// whatever the window: the socket judges it, and a window probe must be answered. What is held
    /// beyond the window counts as a part of it.
    fn acceptable(&self, seq: SeqNumber, len: usize) -> bool {
        let recv = &self.recv;
        if seq == recv.nxt {
            return true;
        }
        let reach = recv.pool.reach(recv.nxt);
        let edge = if reach.after(recv.edge) { reach } else { recv.edge };
        let begins_inside = seq.after(recv.nxt) && seq.at_or_before(edge);
        let reaches_inside = len > 0 && seq.before(recv.nxt) && (seq + len).after(recv.nxt);
        begins_inside || reaches_inside
    }

    /// Takes the acknowledgement and window; false if the segment is to be let go of.
    fn acknowledge(&mut self, core: &mut Core, header: &Header, empty: bool) -> bool {
        let ack = header.ack;
        if ack.after(self.send.max) || ack.before(self.send.una - self.send.window_max as usize) {
            // RFC 5961, 5.2.
            self.challenge(core);
            core.counters.drop(DropReason::OutOfWindow);
            return false;
        }
        let send = &mut self.send;
        send.silent = 0;
        let window = u32::from(header.window) << send.shift;
        if self.recv.sack {
            for block in header.options.sack.iter().flatten() {
                send.sacked.insert(if ack.after(send.una) { ack } else { send.una }, send.max, *block);
            }
        }
        let is_new = ack.after(send.una);
        if is_new {
            send.round_trip.acknowledged(core.now, ack);
            send.una = ack;
            if send.nxt.before(ack) {
                send.nxt = ack;
            }
            send.sacked.advance(ack);
            send.dup_acks = 0;
            send.tries = 0;
            send.timer_base = core.now;
            if send.recover.is_some_and(|until| ack.at_or_after(until)) {
                send.recover = None;
            }
        } else if ack == send.una {
            // Of a closed window, the answer to a probe.
            let same_window = window == send.window && window > 0;
            let is_duplicate =
                empty && same_window && send.max != send.una && !header.flags.contains(Flags::FIN);
            if is_duplicate {
                self.duplicate_ack(core);
            } else if send.is_idle() {
                send.tries = 0;
                send.timer_base = core.now;
            }
        }
        self.go_on_with_holes(core);
        self.take_window(header.seq, ack, window, is_new);
        true
    }

    /// Takes the window told with `ack`, unless it is an older one (RFC 9293, 3.10.7.4). An acknowledgement
    /// that goes on is the newest whatever its number, which is low where the guest sends again; one that
    /// falls behind is old whatever its number.
    fn take_window(&mut self, seq: SeqNumber, ack: SeqNumber, window: u32, is_new: bool) {
        let send = &mut self.send;
        let later = seq.after(send.wl1) || (seq == send.wl1 && ack.at_or_after(send.wl2));
        if ack != send.una || !(is_new || later || window > send.window) {
            return;
        }
        if window != send.window {
            send.tries = 0;
        }
        send.window = window;
        send.window_max = send.window_max.max(window);
        send.wl1 = seq;
        send.wl2 = ack;
    }

    fn duplicate_ack(&mut self, core: &mut Core) {
        self.send.dup_acks = self.send.dup_acks.saturating_add(1);
        if self.send.dup_acks == DUP_ACKS && self.send.recover.is_none() {
            self.rewind(core);
            self.send.timer_base = core.now;
        }
    }

    /// Sends again what the guest's blocks tell to be lost: all holes when a loss is first noticed, later
    /// those between what was sent again and the highest block (RFC 6675, 5).
    fn go_on_with_holes(&mut self, core: &mut Core) {
        let send = &mut self.send;
        let Some(highest) = send.sacked.highest() else { return };
        if send.recover.is_none() {
            if send.sacked.tells_loss(send.mss) {
                self.rewind(core);
                self.send.timer_base = core.now;
            }
            return;
        }
        let from = if send.resent.after(send.una) { send.resent } else { send.una };
        if send.nxt == send.max && from.before(highest) {
            let (hole, end) = send.sacked.hole(from);
            if end.is_some() {
                send.nxt = hole;
            }
        }
    }

    fn take_payload(
        &mut self,
        core: &mut Core,
        budget: &mut Budget,
        header: &Header,
        payload: &Payload<'_>,
    ) -> Result<(), Fate> {
        if header.flags.contains(Flags::FIN) && self.recv.fin.is_none() {
            self.recv.fin = Some(header.seq + payload.len());
        }
        let is_next = header.seq == self.recv.nxt;
        if !payload.is_empty() && !self.recv.closed {
            self.take_bytes(core, budget, header.seq, payload)?;
        }
        let may_wait = is_next && self.ack_may_wait(header, payload);
        if may_wait {
            self.recv.ack_by.get_or_insert(core.now + ACK_DELAY);
        } else if !payload.is_empty() || header.flags.contains(Flags::FIN) {
            self.recv.ack_due = true;
        }
        if !payload.is_empty() {
            self.recv.bytes_at = core.now;
        }
        if self.recv.closed { Ok(()) } else { self.drain_pool(core, budget) }
    }

    /// Whether the acknowledgement of a segment just taken may wait for an answer to carry it: a short
    /// one at the end of a question (RFC 9293, 3.8.6.3; RFC 5681, 4.2: of full segments each second one
    /// is acknowledged at once), wholly in the socket, in a dialogue.
    fn ack_may_wait(&self, header: &Header, payload: &Payload<'_>) -> bool {
        let recv = &self.recv;
        let unacknowledged = recv.nxt.distance_from(recv.acked);
        recv.is_dialogue()
            && !payload.is_empty()
            && header.flags.contains(Flags::PSH)
            && !header.flags.contains(Flags::FIN)
            && recv.nxt == header.seq + payload.len()
            && (0..i32::from(self.send.mss)).contains(&unacknowledged)
            && recv.edge.distance_from(recv.nxt) >= i32::from(self.send.mss)
    }

    /// Bytes at `seq`: into the socket where they are next, into the pool where they are not.
    fn take_bytes(
        &mut self,
        core: &mut Core,
        budget: &mut Budget,
        seq: SeqNumber,
        payload: &Payload<'_>,
    ) -> Result<(), Fate> {
        let known = self.recv.nxt.distance_from(seq).max(0) as usize;
        let mut fresh = payload.range(known, payload.len());
        if let Some(fin) = self.recv.fin {
            // Nothing follows the FIN, whatever a later segment claims.
            fresh = fresh.range(0, fin.distance_from(seq + known).max(0) as usize);
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let mut at = seq + known;
        let (is_next, until) = (at == self.recv.nxt, self.recv.held_until());
        if self.stream.is_none() {
            return Ok(());
        }
        let goes_on = is_next && self.recv.pool.front(budget, at).is_none();
        if goes_on && self.passes(core, fresh.len()) {
            let Some(stream) = self.stream.as_mut() else { return Ok(()) };
            let len = match stream.send(&fresh) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                sent => sent.map_err(|_| Fate::ResetBoth)?,
            };
            self.give_back(core, fresh.len(), len);
            core.counters.payload_from_guest_bytes += len as u64;
            self.carried.from_guest_bytes += len as u64;
            self.recv.nxt = self.recv.nxt + len;
            at = self.recv.nxt;
            fresh = fresh.range(len, fresh.len());
            if fresh.is_empty() {
                return Ok(());
            }
            self.want_room();
        }
        // Bytes held at the front are no hole: the socket has to take them, not the guest to resend.
        if at != self.recv.nxt && self.recv.pool.front(budget, self.recv.nxt).is_none() {
            self.recv.beyond_hole = self.recv.beyond_hole.saturating_add(1);
            self.recv.newest_beyond = at;
        }
        // Held back, unacknowledged, and only as far as the window promised.
        let until = if is_next { until } else { self.recv.edge };
        let held = fresh.range(0, until.distance_from(at).max(0) as usize);
        let all_held = self.recv.pool.insert(budget, at, &held);
        if !all_held || held.len() < fresh.len() {
            core.counters.drop(DropReason::TableFull);
        }
        Ok(())
    }
}
