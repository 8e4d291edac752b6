//! What a worker does for its station while the guest has no receive buffers.
//!
//! On a link of its own such a guest leaves its frames in the queue, which is the larger buffer and costs nothing.
//! Where our station is on the link, questions for its address and answers of DHCP lie behind them: nobody would
//! hear of it any more, and the lease would end. So once the guest has been without buffers for a moment, the queue
//! is read as if it had none at all: the station gets what is its own, and frames for the guest are
//! translated and kept, as many as a card's ring would hold. What comes past that is dropped, the newest
//! first: TCP learns of the lack as from any full queue, and what is kept stays in order.
//!
//! Before that moment nothing is read. A guest that is merely slow has none for milliseconds again and
//! again, and copying or dropping its frames then would cost more than the station gains: who asks for an address asks
//! for a second at least (RFC 1122, 2.3.2.1).
//!
//! May touch: what [`LinkEnd`] may.

use std::collections::VecDeque;
use std::time::Duration;

use super::{LinkEnd, Step};
use crate::engine::counters::DropReason;
use crate::engine::guest_port::{GuestPort, ReserveError};
use crate::engine::packet::cut::cut;
use crate::frame::QueuePair;
use crate::limits;
use crate::time::Instant;
use crate::wire::vnet::VnetHeader;

/// How long a guest is without buffers before the queue is read for the station's sake.
const PATIENCE: Duration = Duration::from_millis(100);

/// Frames a guest has to take after a lack of buffers for it to count as over, while more wait: one that posts a buffer
/// now and then would be as deaf.
const RECOVERED_FRAMES: u64 = limits::LINK_BATCH_FRAMES as u64;

/// Frames kept for the guest, translated, in the order they came.
#[derive(Debug, Default)]
pub(super) struct Starved {
    /// Since when the guest has had no buffers, and how many frames it had taken by then.
    since: Option<(Instant, u64)>,
    kept: VecDeque<(VnetHeader, Box<[u8]>)>,
    kept_bytes: usize,
}

impl Starved {
    /// The guest has no buffers, and has taken `taken` frames so far.
    pub(super) fn begin(&mut self, now: Instant, taken: u64) {
        match self.since {
            Some((_, before)) if taken - before < RECOVERED_FRAMES => {}
            _ => self.since = Some((now, taken)),
        }
    }

    /// The queue was read until nothing was left.
    pub(super) fn read_empty(&mut self) {
        self.since = None;
    }

    /// Whether frames are kept.
    pub(super) fn has_frames(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Forgets what is kept; how many frames that were.
    pub(super) fn forget(&mut self) -> u64 {
        let lost = self.kept.len() as u64;
        *self = Starved::default();
        lost
    }

    /// When the queue is to be read although the guest has no buffers.
    pub(super) fn due(&self) -> Option<Instant> {
        self.since.map(|(since, _)| since + PATIENCE)
    }

    fn keep(&mut self, vnet: VnetHeader, frame: &[u8]) -> bool {
        let has_room = self.kept.len() < limits::STARVED_FRAMES_MAX
            && self.kept_bytes + frame.len() <= limits::STARVED_BYTES_MAX;
        if has_room {
            self.kept_bytes += frame.len();
            self.kept.push_back((vnet, frame.into()));
        }
        has_room
    }
}

impl LinkEnd {
    /// Reads a batch of the queue for the station, if the guest has been without buffers for long. Returns whether
    /// more may wait.
    pub(super) fn read_for_station(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
    ) -> bool {
        let is_time = self.meanwhile.due().is_some_and(|due| now >= due);
        if self.translation.is_none() || !is_time {
            return false;
        }
        // Kept behind it, so that all of them lie in one place.
        if let Some(held) = self.held.take() {
            let whole = &self.whole[..held.len_bytes];
            if !self.meanwhile.keep(held.vnet, whole) {
                self.counters.drop(DropReason::GuestNotReceiving);
            }
        }
        // What was read ahead came before what is in the queue.
        while self.ahead.has_frames() {
            if let Err(reason) = self.deliver_ahead(now, port, pair) {
                self.counters.drop(reason);
            }
        }
        for _ in 0..limits::LINK_BATCH_FRAMES {
            if !self.readable {
                break;
            }
            match self.receive(now, port, pair, 0) {
                Ok(Step::Nothing) => self.readable = false,
                Ok(Step::Moved(_) | Step::NoBuffers) => {}
                Err(reason) => self.counters.drop(reason),
            }
        }
        self.readable
    }

    /// When [`LinkEnd::read_for_station`] has something to do.
    pub(super) fn station_deadline(&self) -> Option<Instant> {
        let waits = self.starved && self.readable && self.translation.is_some();
        if waits { self.meanwhile.due() } else { None }
    }

    /// Keeps the frame of the link that lies in `whole`, for a guest without buffers.
    pub(super) fn keep_meanwhile(&mut self, vnet: VnetHeader, len_bytes: usize) -> Result<Step, DropReason> {
        let kept = self.meanwhile.keep(vnet, &self.whole[..len_bytes]);
        if kept { Ok(Step::NoBuffers) } else { Err(DropReason::GuestNotReceiving) }
    }

    /// Cuts the frame of the link that lies in `whole`, which is longer than the guest's link. What the guest has no buffers for
    /// is kept: a part of a packet is of no use.
    pub(super) fn send_cut(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        (vnet, len_bytes): (VnetHeader, usize),
    ) -> Result<Step, DropReason> {
        let LinkEnd { whole, meanwhile, ip_mtu, .. } = self;
        let mut pieces = Vec::new();
        cut(&vnet, &mut whole[..len_bytes], *ip_mtu, |piece| {
            let is_kept = meanwhile.keep(VnetHeader::default(), piece);
            pieces.push(is_kept);
        })?;
        let lost = pieces.iter().filter(|is_kept| !**is_kept).count();
        self.counters.drop_many(DropReason::GuestNotReceiving, lost as u64);
        if self.starved { Ok(Step::NoBuffers) } else { self.send_kept(now, port, pair) }
    }

    /// Sends the frame that was kept first.
    pub(super) fn send_kept(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
    ) -> Result<Step, DropReason> {
        let Some((vnet, frame)) = self.meanwhile.kept.front() else { return Ok(Step::Moved(0)) };
        let (vnet, len_bytes) = (*vnet, frame.len());
        let outcome = port.send(pair, vnet, frame);
        if outcome == Err(ReserveError::Full) {
            return Ok(Step::NoBuffers);
        }
        self.meanwhile.kept.pop_front();
        self.meanwhile.kept_bytes -= len_bytes;
        if self.meanwhile.kept.is_empty() && !self.readable {
            self.meanwhile.read_empty();
        }
        match outcome {
            Ok(()) => Ok(self.moved(now, &vnet, len_bytes)),
            Err(_) => Err(DropReason::GuestNotReceiving),
        }
    }
}

#[cfg(test)]
mod tests;
