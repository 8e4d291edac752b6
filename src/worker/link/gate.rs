//! Rate limits at a link: what they do not let pass waits where it is, the guest's frames in their ring, the link's in
//! its queue.
//!
//! Who is first among those that wait is the guest's and the link's queueing discipline's to say.

use crate::engine::counters::Counters;
use crate::rate_limit::{Cost, RateLimits, Share};
use crate::time::Instant;
use crate::wire::vnet::VnetHeader;

/// Headers of a segment whose frame does not say how long they are: Ethernet, IPv4 and TCP's.
const HEADERS_BYTES_MIN: usize = 54;
/// What is believed of it.
const HEADERS_BYTES_MAX: usize = 256;

/// What a frame of `len_bytes` costs: of segmentation offload, its segments.
fn cost(vnet: &VnetHeader, len_bytes: usize) -> Cost {
    let Some(gso) = vnet.gso else { return Cost::frame(len_bytes) };
    let head_bytes = usize::from(gso.headers_bytes).clamp(HEADERS_BYTES_MIN, HEADERS_BYTES_MAX);
    match len_bytes.checked_sub(head_bytes) {
        None | Some(0) => Cost::frame(len_bytes),
        Some(payload_bytes) => Cost::of_payload(payload_bytes, head_bytes, gso.size_bytes.into()),
    }
}

/// One worker's share of both limits.
#[derive(Debug, Default)]
pub(super) struct Gate {
    from_guest: Share,
    to_guest: Share,
    /// When the frame that waits in its ring may leave.
    leaves: Option<Instant>,
    /// What was taken for frames to the guest that are not read yet.
    credit: Cost,
    /// When the next may be read.
    reads: Option<Instant>,
}

impl Gate {
    pub(super) fn new(limits: &RateLimits) -> Gate {
        let share = |limit| Share::new(limit);
        Gate {
            from_guest: share(limits.from_guest.clone()),
            to_guest: share(limits.to_guest.clone()),
            ..Gate::default()
        }
    }

    /// Takes up what the limits were set to; who waits is tried again.
    pub(super) fn refresh(&mut self, now: Instant) {
        self.from_guest.refresh();
        self.to_guest.refresh();
        self.leaves = self.leaves.map(|_| now);
        self.reads = None;
    }

    /// No ring has frames that wait any more.
    pub(super) fn forget_rings(&mut self) {
        self.from_guest.release();
        self.leaves = None;
    }

    /// Whether a frame of the guest may leave now.
    pub(super) fn lets_leave(
        &mut self,
        now: Instant,
        (vnet, len_bytes): (&VnetHeader, usize),
        counters: &mut Counters,
    ) -> bool {
        if !self.from_guest.is_on() {
            return true;
        }
        match self.from_guest.claim(now, cost(vnet, len_bytes)) {
            Ok(()) => true,
            Err(at) => {
                counters.limited_from_guest.waits += u64::from(self.leaves.is_none());
                self.leaves = Some(at);
                false
            }
        }
    }

    /// A frame that was let leave did not.
    pub(super) fn did_not_leave(&self, vnet: &VnetHeader, len_bytes: usize) {
        self.from_guest.give_back(cost(vnet, len_bytes));
    }

    /// Whether rings that wait for the limit are to be tried again.
    pub(super) fn leaves_are_due(&mut self, now: Instant) -> bool {
        let is_due = self.leaves.is_some_and(|at| at <= now);
        if is_due {
            self.leaves = None;
        }
        is_due
    }

    /// Whether a frame may be read for the guest.
    pub(super) fn lets_read(&mut self, now: Instant, counters: &mut Counters) -> bool {
        if !self.to_guest.is_on() || !self.credit.is_zero() {
            return true;
        }
        let turn = self.to_guest.turn();
        match self.to_guest.claim(now, turn) {
            Ok(()) => {
                self.credit = turn;
                self.reads = None;
                true
            }
            Err(at) => {
                counters.limited_to_guest.waits += u64::from(self.reads.is_none());
                self.reads = Some(at);
                false
            }
        }
    }

    /// A frame reached the guest. How long it is shows when it is read: what is beyond what was taken is owed.
    pub(super) fn has_read(&mut self, now: Instant, vnet: &VnetHeader, len_bytes: usize) {
        if self.to_guest.is_on() {
            let cost = cost(vnet, len_bytes);
            self.to_guest.charge(now, cost.less(self.credit));
            let left = self.credit.less(cost);
            self.credit = if left.bytes == 0 || left.packets == 0 { Cost::default() } else { left };
        }
    }

    /// No more is read in this batch.
    pub(super) fn ends_reading(&mut self) {
        if !self.credit.is_zero() {
            self.to_guest.give_back(std::mem::take(&mut self.credit));
        }
    }

    /// Nothing is left to read: what was reserved for it is everybody's.
    pub(super) fn has_read_all(&mut self) {
        self.to_guest.release();
        self.reads = None;
    }

    /// When either way goes on; nothing is read for a guest that `is_starved` of buffers.
    pub(super) fn next_deadline(&self, is_starved: bool) -> Option<Instant> {
        [self.leaves, self.reads.filter(|_| !is_starved)].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::vnet::{Checksum, Gso, GsoKind};

    #[test]
    fn a_frame_of_segmentation_offload_costs_what_its_segments_do() {
        let vnet = |headers_bytes| VnetHeader {
            checksum: Checksum::Complete,
            gso: Some(Gso { kind: GsoKind::Tcp4, size_bytes: 1448, headers_bytes, ecn: false }),
            num_buffers: 0,
        };
        let segments = Cost { bytes: 3 * 1514 + 66 + 100, packets: 4 };
        assert_eq!(cost(&vnet(66), 66 + 3 * 1448 + 100), segments);
        assert_eq!(cost(&VnetHeader::default(), 1514), Cost::frame(1514));
        // Whatever the header says.
        for headers_bytes in [0, 1, 255, u16::MAX] {
            assert!(cost(&vnet(headers_bytes), 60).bytes >= 60);
            assert!(cost(&vnet(headers_bytes), 65_550).packets >= 45);
        }
    }
}
