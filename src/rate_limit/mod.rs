//! How much the guest may send and be sent: token buckets, one of each direction and kind, shared by all workers.
//!
//! A [`Limit`] has the buckets of one direction: of bytes, packets and new flows. Each worker has a [`Share`] of it, by
//! which it takes what passes at once, and reserves what waits: reservations of several workers come up in the order
//! they were made, so that none starves another. Time is an argument.
//!
//! May touch: `config`, `limits`, `time`. Read first: `docs/limits.md`, ADR 0013.

mod bucket;
mod share;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{LimitSpec, LimitsConfig};
use crate::limits::{LIMIT_FRAME_BYTES, LIMIT_PACKETS_BURST_MIN};
use crate::time::Instant;

pub use self::bucket::Bucket;
pub use self::share::{Sender, Share};

/// What passes, as limits count it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of its Ethernet frames.
    pub bytes: u64,
    /// Its packets.
    pub packets: u64,
}

impl Cost {
    /// More than anything costs.
    pub const UNLIMITED: Cost = Cost { bytes: u64::MAX, packets: u64::MAX };

    /// Of one frame.
    pub const fn frame(len_bytes: usize) -> Cost {
        Cost { bytes: len_bytes as u64, packets: 1 }
    }

    /// Of `payload_bytes` in segments of at most `mss_bytes`, each behind `head_bytes` of headers. Nothing for nothing.
    pub fn of_payload(payload_bytes: usize, head_bytes: usize, mss_bytes: usize) -> Cost {
        let packets = payload_bytes.div_ceil(mss_bytes.max(1)) as u64;
        Cost { bytes: payload_bytes as u64 + packets * head_bytes as u64, packets }
    }

    /// The most payload that costs no more than this: [`Cost::of_payload`] the other way round.
    pub fn payload_max(self, head_bytes: usize, mss_bytes: usize) -> usize {
        let (head, mss) = (head_bytes as u64, mss_bytes.max(1) as u64);
        let whole = self.bytes / (mss + head);
        let part = (self.bytes % (mss + head)).saturating_sub(head);
        let bytes = if whole < self.packets { whole * mss + part } else { self.packets.saturating_mul(mss) };
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// What is left of it without `other`.
    #[must_use]
    pub fn less(self, other: Cost) -> Cost {
        Cost {
            bytes: self.bytes.saturating_sub(other.bytes),
            packets: self.packets.saturating_sub(other.packets),
        }
    }

    /// Whether it is nothing.
    pub fn is_zero(self) -> bool {
        self.bytes == 0 && self.packets == 0
    }
}

/// The limit of one direction.
#[derive(Debug, Default)]
pub struct Limit {
    bytes: Bucket,
    packets: Bucket,
    flows: Bucket,
    /// Flows that sent of late, at all workers.
    senders: AtomicU32,
    spec: Mutex<LimitSpec>,
}

impl Limit {
    /// What it was set to.
    pub fn spec(&self) -> LimitSpec {
        *self.spec.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets it at `now`. Each worker has to look at its share again ([`Share::refresh`]).
    pub fn set(&self, now: Instant, spec: LimitSpec) {
        let mut known = self.spec.lock().unwrap_or_else(PoisonError::into_inner);
        self.bytes.set(now, spec.bytes, LIMIT_FRAME_BYTES.get());
        self.packets.set(now, spec.packets, LIMIT_PACKETS_BURST_MIN.get());
        self.flows.set(now, spec.flows, 0);
        *known = spec;
    }

    /// Takes one new flow.
    pub fn take_flow(&self, now: Instant) -> bool {
        self.flows.take(now, 1)
    }

    fn take(&self, now: Instant, cost: Cost, quarters_left: u64) -> bool {
        self.take_both(cost, |bucket, units| bucket.take_leaving(now, units, quarters_left))
    }

    fn take_owing(&self, now: Instant, cost: Cost) -> bool {
        self.take_both(cost, |bucket, units| bucket.take_owing(now, units))
    }

    /// Takes of both buckets or of none.
    fn take_both(&self, cost: Cost, take: impl Fn(&Bucket, u64) -> bool) -> bool {
        if !take(&self.bytes, cost.bytes) {
            return false;
        }
        let is_taken = take(&self.packets, cost.packets);
        if !is_taken {
            self.bytes.give_back(cost.bytes);
        }
        is_taken
    }

    fn reserve(&self, now: Instant, cost: Cost) -> Instant {
        self.bytes.reserve(now, cost.bytes).max(self.packets.reserve(now, cost.packets))
    }

    fn charge(&self, now: Instant, cost: Cost) {
        self.bytes.charge(now, cost.bytes);
        self.packets.charge(now, cost.packets);
    }

    fn give_back(&self, cost: Cost) {
        self.bytes.give_back(cost.bytes);
        self.packets.give_back(cost.packets);
    }

    fn senders(&self) -> u64 {
        self.senders.load(Ordering::Relaxed).max(1).into()
    }
}

/// The limits of both directions.
#[derive(Clone, Debug, Default)]
pub struct RateLimits {
    /// What the guest sends.
    pub from_guest: Arc<Limit>,
    /// What it is sent.
    pub to_guest: Arc<Limit>,
    /// How often they were set.
    version: Arc<AtomicU32>,
}

impl RateLimits {
    /// Limits as they are configured.
    pub fn new(config: &LimitsConfig) -> RateLimits {
        let limits = RateLimits::default();
        limits.set(Instant::ZERO, config);
        limits
    }

    /// Sets both at `now`.
    pub fn set(&self, now: Instant, config: &LimitsConfig) {
        self.from_guest.set(now, config.from_guest);
        self.to_guest.set(now, config.to_guest);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Another number after each time they were set, which workers compare with what they know.
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// What they were set to.
    pub fn config(&self) -> LimitsConfig {
        LimitsConfig { from_guest: self.from_guest.spec(), to_guest: self.to_guest.spec() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn payload_and_cost_are_each_others_inverse(
            bytes in 0u64..200_000,
            packets in 1u64..200,
            head in 54usize..100,
            mss in 1usize..9000,
        ) {
            let allowed = Cost { bytes, packets };
            let payload = allowed.payload_max(head, mss);
            let cost = Cost::of_payload(payload, head, mss);
            prop_assert!(cost.bytes <= bytes && cost.packets <= packets, "{cost:?}");
            let more = Cost::of_payload(payload + 1, head, mss);
            prop_assert!(more.bytes > bytes || more.packets > packets, "{more:?}");
        }
    }

    #[test]
    fn the_unlimited_allows_any_payload() {
        assert!(Cost::UNLIMITED.payload_max(66, 1448) > 1 << 40);
        assert!(Cost::UNLIMITED.payload_max(54, 65_535) > 1 << 40);
    }
}
