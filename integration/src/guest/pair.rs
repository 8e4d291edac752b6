//! One queue pair's worker: TAP to transmit ring, receive ring to TAP.
//!
//! The thread sleeps in one epoll wait on the TAP queue, both call eventfds and a control eventfd,
//! all edge-triggered. It re-reads a used index for the last time only after arming its
//! notification, so a completion between the two cannot be slept through.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::buffers::Slot;
use super::check::{self, HEAD_BYTES, Header};
use super::counters::PairCounters;
use super::doorbells::Doorbells;
use super::features::Features;
use super::garbage::{self, GARBAGE_KINDS, HEADER_KINDS};
use super::misbehave::{Plan, every};
use super::ring::{DriverRing, Piece, Used};
use crate::sys::mem::{self, GuestIov, GuestMemory};

/// Frames taken in one direction before the other gets its turn.
const BUDGET: usize = 64;
/// Frames after which the device is shown what is there.
const PUBLISH_EVERY: usize = 16;
/// The token of chains made of nonsense.
const GARBAGE_TOKEN: u16 = u16::MAX;
const ETHERNET_BYTES: usize = 14;

/// What the main thread tells a worker.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// End.
    pub(crate) stop: AtomicBool,
    /// Raised by one each time the back-end went away.
    pub(crate) lost: AtomicU64,
    /// The value of `lost` the worker has dealt with.
    pub(crate) lost_seen: AtomicU64,
}

/// Everything a worker is made of.
pub(crate) struct PairParts {
    /// Guest memory.
    pub(crate) mem: &'static GuestMemory,
    /// Negotiated features.
    pub(crate) features: Features,
    /// IP MTU of the link in bytes: longer frames without segmentation are a breach.
    pub(crate) ip_mtu: u16,
    /// The TAP queue.
    pub(crate) tap: RawFd,
    /// Receive ring.
    pub(crate) rx: DriverRing,
    /// Transmit ring.
    pub(crate) tx: DriverRing,
    /// Receive buffers.
    pub(crate) rx_slots: Vec<Slot>,
    /// Transmit buffers.
    pub(crate) tx_slots: Vec<Slot>,
    /// Notification descriptors.
    pub(crate) bells: Arc<Doorbells>,
    /// Counters.
    pub(crate) counters: Arc<PairCounters>,
    /// Orders of the main thread.
    pub(crate) control: Arc<Control>,
    /// How to go wrong.
    pub(crate) plan: Plan,
}

/// A queue pair at work.
pub(crate) struct Pair {
    p: PairParts,
    tx_free: Vec<u16>,
    taken: Vec<Used>,
    pending: VecDeque<Used>,
    withheld: Vec<u16>,
    pieces: Vec<Piece>,
    iovs: Vec<GuestIov>,
    tap_ready: bool,
    tx_stuck: bool,
    frames_from_guest: u64,
    frames_to_guest: u64,
    garbage: u64,
    started: Instant,
    last_kick: Instant,
    last_used_look: Instant,
    kick_owed: [bool; 2],
}

impl Pair {
    /// A pair with all receive buffers posted; call it before the rings are started.
    pub(crate) fn new(parts: PairParts) -> Pair {
        let now = Instant::now();
        let slots = u16::try_from(parts.tx_slots.len()).expect("slots are counted by ring size");
        let mut pair = Pair {
            tx_free: (0..slots).rev().collect(),
            taken: Vec::new(),
            pending: VecDeque::new(),
            withheld: (0..u16::try_from(parts.rx_slots.len()).expect("as above")).collect(),
            pieces: Vec::new(),
            iovs: Vec::new(),
            tap_ready: true,
            tx_stuck: false,
            frames_from_guest: 0,
            frames_to_guest: 0,
            garbage: 0,
            started: now,
            last_kick: now,
            last_used_look: now,
            kick_owed: [false; 2],
            p: parts,
        };
        pair.post_withheld();
        pair.p.rx.publish();
        pair
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// If epoll cannot be set up or the TAP fails for good.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let epoll = self.register()?;
        let mut events = [EpollEvent::default(); 8];
        self.ring_bells(true, true);
        while !self.p.control.stop.load(Ordering::Acquire) {
            self.notice_loss();
            self.take_back_tx();
            let sent = self.pump_tx()?;
            let received = self.pump_rx();
            self.pay_kicks();
            if sent || received || !self.may_sleep() {
                continue;
            }
            let timeout = match self.p.plan.longest_sleep() {
                Some(sleep) => i32::try_from(sleep.as_millis()).unwrap_or(1),
                None => -1,
            };
            let ready = wait(&epoll, timeout, &mut events)?;
            self.p.counters.wakes.add(1);
            self.p.rx.disarm();
            self.p.tx.disarm();
            self.tap_ready |= events[..ready].iter().any(|e| e.fd() == self.p.tap);
        }
        self.note_faults();
        Ok(())
    }

    fn register(&self) -> io::Result<Epoll> {
        let epoll = Epoll::new()?;
        let bells = &self.p.bells;
        for fd in [self.p.tap, bells.rx_call.as_raw_fd(), bells.tx_call.as_raw_fd(), bells.wake.as_raw_fd()] {
            let event =
                EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, u64::from(fd.unsigned_abs()));
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        Ok(epoll)
    }

    /// Arms the notifications the worker needs; false if there is work already.
    fn may_sleep(&mut self) -> bool {
        self.note_faults();
        let look = self.may_look();
        if self.p.rx.arm(1) && look {
            return false;
        }
        if self.tx_stuck {
            // Half of what is in flight: room for a batch, few notifications.
            let after = u16::try_from(self.p.tx.in_flight() / 2).unwrap_or(1);
            if self.p.tx.arm(after) && look {
                return false;
            }
        }
        true
    }

    fn note_faults(&self) {
        let (rx, tx, counters) = (self.p.rx.faults, self.p.tx.faults, &self.p.counters);
        counters.fault_unknown_id.set(rx.unknown_id + tx.unknown_id);
        counters.fault_bad_len.set(rx.bad_len + tx.bad_len);
        counters.fault_out_of_order.set(rx.out_of_order + tx.out_of_order);
        counters.fault_index_ahead.set(rx.index_ahead + tx.index_ahead);
    }

    /// The back-end went away: a frame it had published in part will never be completed.
    fn notice_loss(&mut self) {
        let lost = self.p.control.lost.load(Ordering::Acquire);
        if lost == self.p.control.lost_seen.load(Ordering::Relaxed) {
            return;
        }
        self.p.rx.take_used(usize::MAX, &mut self.pending);
        while self.pump_rx_frame() {}
        self.withheld.extend(self.pending.drain(..).map(|used| used.token));
        self.post_withheld();
        self.p.rx.publish();
        self.p.control.lost_seen.store(lost, Ordering::Release);
    }

    fn may_look(&self) -> bool {
        self.p.plan.slow_used.is_none_or(|every| self.last_used_look.elapsed() >= every)
    }

    fn take_back_tx(&mut self) {
        if !self.may_look() {
            return;
        }
        self.taken.clear();
        self.p.tx.take_used(usize::MAX, &mut self.taken);
        let slots = self.taken.iter().map(|used| used.token).filter(|token| *token != GARBAGE_TOKEN);
        self.tx_free.extend(slots);
    }

    /// Moves up to a budget of frames from the TAP to the transmit ring; true if there may be more.
    fn pump_tx(&mut self) -> io::Result<bool> {
        let mut done = 0;
        while done < BUDGET && self.tap_ready {
            let Some(&token) = self.tx_free.last() else {
                break;
            };
            let slot = &self.p.tx_slots[usize::from(token)];
            if self.p.tx.free() < self.p.tx.cost(slot.pieces.len()) {
                break;
            }
            match mem::readv(self.p.tap, &slot.iovs) {
                Ok(len_bytes) => self.offer(token, len_bytes),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.tap_ready = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            done += 1;
            if done.is_multiple_of(PUBLISH_EVERY) {
                self.publish_tx();
            }
        }
        self.publish_tx();
        let stuck = self.tap_ready && done < BUDGET;
        if stuck && !self.tx_stuck {
            self.p.counters.tx_stuck.add(1);
        }
        self.tx_stuck = stuck;
        Ok(self.tap_ready && !stuck)
    }

    fn offer(&mut self, token: u16, len_bytes: usize) {
        self.frames_from_guest += 1;
        let count = self.frames_from_guest;
        if every(self.p.plan.drop_tx, count) {
            self.p.counters.dropped_on_request.add(1);
            return;
        }
        let slot = &self.p.tx_slots[usize::from(token)];
        let header_bytes = self.p.features.header_bytes();
        if every(self.p.plan.bad_header, count) {
            let kind = usize::try_from(self.garbage).unwrap_or(0) % HEADER_KINDS;
            slot.write(self.p.mem, &garbage::header(kind, len_bytes - header_bytes));
            self.garbage += 1;
            self.p.counters.garbage_offered.add(1);
        }
        let mut head = [0u8; 2];
        slot.read(self.p.mem, &mut head);
        self.pieces.clear();
        slot.pieces_of(len_bytes, &mut self.pieces);
        self.p.tx.add(&self.pieces, token).expect("room was checked before the frame was read");
        self.tx_free.pop();
        let counters = &self.p.counters;
        counters.frames_from_guest.add(1);
        counters.bytes_from_guest.add((len_bytes - header_bytes) as u64);
        if head[1] != 0 {
            counters.gso_from_guest.add(1);
        }
        if every(self.p.plan.garbage, count) && self.p.tx.free() > 0 {
            let kind = usize::try_from(self.garbage).unwrap_or(0) % GARBAGE_KINDS;
            let (piece, flags, next) = garbage::chain(kind, self.pieces[0], self.p.tx.size());
            if self.p.tx.add_raw(piece, flags, next, GARBAGE_TOKEN).is_ok() {
                self.garbage += 1;
                self.p.counters.garbage_offered.add(1);
            }
        }
        if self.p.plan.break_ring == Some(count) {
            self.p.tx.publish();
            self.p.tx.break_avail_index();
            self.ring_bells(false, true);
        }
    }

    fn publish_tx(&mut self) {
        let wanted = self.p.tx.publish();
        self.ring_bells(false, wanted);
    }

    /// Moves up to a budget of frames from the receive ring to the TAP; true if there may be more.
    fn pump_rx(&mut self) -> bool {
        if !self.may_look() {
            return false;
        }
        self.last_used_look = Instant::now();
        self.p.rx.take_used(BUDGET, &mut self.pending);
        let mut done = 0;
        while self.pump_rx_frame() {
            done += 1;
            if done % PUBLISH_EVERY == 0 {
                self.publish_rx();
            }
        }
        self.publish_rx();
        done > 0
    }

    fn publish_rx(&mut self) {
        if !self.pausing() {
            self.post_withheld();
        }
        let wanted = self.p.rx.publish();
        self.ring_bells(wanted, false);
    }

    fn pausing(&self) -> bool {
        if self.p.plan.starve.is_some_and(|n| self.frames_to_guest >= n) {
            return true;
        }
        self.p.plan.no_refill.is_some_and(|(period, pause)| {
            let into = self.started.elapsed().as_nanos() % period.as_nanos();
            // The pause ends the period, so that a lease comes first.
            into >= (period - pause).as_nanos()
        })
    }

    /// Takes one whole frame off `pending` and writes it to the TAP; false if there is none.
    fn pump_rx_frame(&mut self) -> bool {
        let Some(first) = self.pending.front().copied() else {
            return false;
        };
        let slot = &self.p.rx_slots[usize::from(first.token)];
        let header_bytes = self.p.features.header_bytes();
        let mut head = [0u8; HEAD_BYTES];
        let have = slot.read(self.p.mem, &mut head).min(first.len as usize);
        let header = Header::parse(&head[..have], header_bytes);
        let mut buffers = 1;
        if let Some(header) = header {
            if !header.num_buffers_allowed(self.p.features) && self.p.features.named("version_1") {
                self.p.counters.fault_num_buffers.add(1);
            }
            if self.p.features.named("mrg_rxbuf") {
                buffers = usize::from(header.num_buffers.max(1));
            }
        }
        if self.pending.len() < buffers {
            // The rest of a merged frame is not in the used ring yet.
            self.p.rx.take_used(buffers - self.pending.len(), &mut self.pending);
            if self.pending.len() < buffers {
                return false;
            }
        }
        match header {
            Some(header) => self.deliver(header, buffers, &head),
            None => self.p.counters.fault_short_frame.add(1),
        }
        self.withheld.extend(self.pending.drain(..buffers).map(|used| used.token));
        true
    }

    fn deliver(&mut self, header: Header, buffers: usize, head: &[u8; HEAD_BYTES]) {
        let header_bytes = self.p.features.header_bytes();
        self.frames_to_guest += 1;
        self.iovs.clear();
        let mut total = 0;
        for used in self.pending.range(..buffers) {
            let slot = &self.p.rx_slots[usize::from(used.token)];
            slot.iovs_of(used.len as usize, &mut self.iovs);
            total += used.len as usize;
        }
        let frame_bytes = total.saturating_sub(header_bytes);
        let counters = &self.p.counters;
        if !header.is_allowed(self.p.features, frame_bytes) {
            counters.fault_header.add(1);
        }
        if !header.is_gso() && frame_bytes > ETHERNET_BYTES + usize::from(self.p.ip_mtu) {
            counters.fault_too_long.add(1);
        }
        counters.gso_to_guest.add(u64::from(header.is_gso()));
        counters.needs_csum_to_guest.add(u64::from(header.needs_csum()));
        counters.data_valid_to_guest.add(u64::from(header.data_valid()));
        counters.merged_to_guest.add(u64::from(buffers > 1));
        let deaf = self.p.plan.deaf.is_some_and(|n| self.frames_to_guest > n);
        if deaf || every(self.p.plan.drop_rx, self.frames_to_guest) {
            counters.dropped_on_request.add(1);
            return;
        }
        if let Some(repaired) = check::repair(head, header_bytes) {
            let first = self.pending.front().expect("the frame has a first buffer");
            self.p.rx_slots[usize::from(first.token)].write(self.p.mem, &repaired);
        }
        match mem::writev(self.p.tap, &self.iovs) {
            Ok(_) => {
                counters.frames_to_guest.add(1);
                counters.bytes_to_guest.add(frame_bytes as u64);
            }
            Err(_) => counters.tap_refused.add(1),
        }
    }

    fn post_withheld(&mut self) {
        while let Some(&token) = self.withheld.last() {
            if self.p.rx.add(&self.p.rx_slots[usize::from(token)].pieces, token).is_err() {
                break;
            }
            self.withheld.pop();
        }
    }

    fn ring_bells(&mut self, rx: bool, tx: bool) {
        if self.p.plan.no_kick || !(rx || tx) {
            return;
        }
        if self.p.plan.late_kick.is_some() {
            self.kick_owed[0] |= rx;
            self.kick_owed[1] |= tx;
            return;
        }
        for _ in 0..self.p.plan.kicks.unwrap_or(1) {
            self.kick(rx, tx);
        }
    }

    fn kick(&self, rx: bool, tx: bool) {
        // A full counter (EAGAIN) means the device has been told often enough.
        for (wanted, bell) in [(rx, &self.p.bells.rx_kick), (tx, &self.p.bells.tx_kick)] {
            if wanted && bell.write(1).is_ok() {
                self.p.counters.kicks.add(1);
            }
        }
    }

    /// Sends kicks held back on request, and posts buffers held back, once their time has come.
    fn pay_kicks(&mut self) {
        if self.p.plan.no_refill.is_some() && !self.withheld.is_empty() {
            self.publish_rx();
        }
        let Some(every) = self.p.plan.late_kick else {
            return;
        };
        if self.last_kick.elapsed() >= every {
            self.kick(self.kick_owed[0], self.kick_owed[1]);
            self.kick_owed = [false; 2];
            self.last_kick = Instant::now();
        }
    }
}

fn wait(epoll: &Epoll, timeout_ms: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    loop {
        match epoll.wait(timeout_ms, events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// How long the main thread waits for a worker to notice that the back-end went away.
pub(crate) const NOTICE_PAUSE: Duration = Duration::from_millis(1);
