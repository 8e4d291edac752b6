//! A token bucket as one number: the time at which it will be full (the generic cell rate algorithm of ITU-T
//! I.371, annex A, read backwards).
//!
//! What is taken moves that time on by what it costs at the bucket's rate; time passing fills the bucket without
//! anybody touching it. All workers share it: taking is one compare-and-swap, and nobody waits for a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::limit::Amount;
use crate::time::Instant;

/// Parts of a microsecond that costs are counted in: 1/16 ns. A frame of 64 bytes at 1 Tbit/s costs 9 of them, and
/// 64 bits hold 36 years.
const TICKS_PER_US: u64 = 16_000;
const TICKS_PER_SECOND: u64 = TICKS_PER_US * 1_000_000;
/// Most units of one taking: so many times [`TICKS_PER_SECOND`] fits 64 bits.
const UNITS_MAX: u64 = u64::MAX / TICKS_PER_SECOND;

/// A bucket of so many tokens a second, shared by all workers. One without a rate lets everything pass.
#[derive(Debug, Default)]
pub struct Bucket {
    /// Tokens a second; zero for no limit.
    per_second: AtomicU64,
    /// How long an empty one takes to be full, in ticks.
    burst: AtomicU64,
    /// When it is full, in ticks. Further in the future than [`Bucket::burst`] it is in debt.
    full_at: AtomicU64,
    /// How deep it may be in debt for what cannot wait, in ticks.
    debt: AtomicU64,
}

fn ticks_of(at: Instant) -> u64 {
    at.as_micros().saturating_mul(TICKS_PER_US)
}

/// How long so many tokens take to come, in ticks. A bucket is full after an hour at the latest.
fn time_of(tokens: u64, per_second: u64) -> u64 {
    const HOURS: u64 = 24 * 3600 * TICKS_PER_SECOND;
    let ticks = (u128::from(tokens) * u128::from(TICKS_PER_SECOND)).div_ceil(per_second.into());
    u64::try_from(ticks).unwrap_or(HOURS).min(HOURS)
}

/// Never earlier than `ticks`.
fn instant_of(ticks: u64) -> Instant {
    Instant::from_micros(ticks.div_ceil(TICKS_PER_US))
}

impl Bucket {
    /// Whether it limits anything.
    pub fn is_on(&self) -> bool {
        self.per_second() > 0
    }

    /// Tokens a second, zero without a limit.
    pub fn per_second(&self) -> u64 {
        self.per_second.load(Ordering::Relaxed)
    }

    /// Sets it at `now`; what cannot wait may put it in debt by `debt` units, or by what it holds if that is more.
    /// What it lacked, or owed, it goes on lacking in tokens; a bucket that limited nothing is full.
    pub fn set(&self, now: Instant, amount: Option<Amount>, debt: u64) {
        let before = self.per_second();
        let (per_second, burst) =
            amount.map_or((0, 0), |amount| (amount.per_second.get(), amount.burst.get()));
        let missing = self.full_at.load(Ordering::Relaxed).saturating_sub(ticks_of(now));
        let missing = match per_second {
            0 => 0,
            _ => u128::from(missing) * u128::from(before) / u128::from(per_second),
        };
        let missing = u64::try_from(missing).unwrap_or(u64::MAX);
        self.per_second.store(per_second, Ordering::Relaxed);
        let (burst, debt) = match per_second {
            0 => (0, 0),
            _ => (time_of(burst, per_second), time_of(debt.max(burst), per_second)),
        };
        self.burst.store(burst, Ordering::Relaxed);
        self.debt.store(debt, Ordering::Relaxed);
        let missing = missing.min(burst.saturating_add(debt));
        self.full_at.store(ticks_of(now).saturating_add(missing), Ordering::Relaxed);
    }

    /// What `units` cost, rounded up: never more than the rate passes.
    fn ticks(&self, units: u64) -> u64 {
        let per_second = self.per_second().max(1);
        (units.min(UNITS_MAX) * TICKS_PER_SECOND).div_ceil(per_second)
    }

    /// Takes `units` if there are so many. Of more than it can hold it must hold what it can, and is in debt then.
    pub fn take(&self, now: Instant, units: u64) -> bool {
        self.take_leaving(now, units, 0)
    }

    /// [`Bucket::take`], if `quarters` of the bucket are left then.
    pub fn take_leaving(&self, now: Instant, units: u64, quarters: u64) -> bool {
        let burst = self.burst.load(Ordering::Relaxed);
        self.take_of(now, units, burst, burst / 4 * quarters)
    }

    /// The same for what cannot wait: the bucket may be in debt by as much as it was set to.
    pub fn take_owing(&self, now: Instant, units: u64) -> bool {
        let burst = self.burst.load(Ordering::Relaxed);
        self.take_of(now, units, burst.saturating_add(self.debt.load(Ordering::Relaxed)), 0)
    }

    /// Takes `units` of a bucket that holds `holds` ticks, if `left` are left then.
    fn take_of(&self, now: Instant, units: u64, holds: u64, left: u64) -> bool {
        if !self.is_on() || units == 0 {
            return true;
        }
        let (now, cost) = (ticks_of(now), self.ticks(units));
        let least = cost.saturating_add(left).min(holds);
        let take = |full_at: u64| {
            let full_at = full_at.max(now);
            let has = holds.saturating_sub(full_at - now);
            (has >= least).then(|| full_at.saturating_add(cost))
        };
        self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Takes `units` whether or not they are there; when they are.
    pub fn reserve(&self, now: Instant, units: u64) -> Instant {
        if !self.is_on() || units == 0 {
            return now;
        }
        let (ticks, cost, burst) = (ticks_of(now), self.ticks(units), self.burst.load(Ordering::Relaxed));
        let before = self.charge_ticks(ticks, cost, u64::MAX);
        let at = before.max(ticks).saturating_add(cost.min(burst)).saturating_sub(burst);
        instant_of(at).max(now)
    }

    /// Takes `units` that have passed already. The debt has the bound that was set.
    pub fn charge(&self, now: Instant, units: u64) {
        if self.is_on() {
            let ticks = ticks_of(now);
            let lasts = self.burst.load(Ordering::Relaxed).saturating_add(self.debt.load(Ordering::Relaxed));
            self.charge_ticks(ticks, self.ticks(units), ticks.saturating_add(lasts));
        }
    }

    /// Moves the time at which it is full on, to `most` at the latest; what it was.
    fn charge_ticks(&self, now: u64, cost: u64, most: u64) -> u64 {
        let charge = |full_at: u64| {
            let after = full_at.max(now).saturating_add(cost);
            Some(after.min(most.max(full_at)))
        };
        let updated = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, charge);
        updated.unwrap_or_else(|full_at| full_at)
    }

    /// Gives back `units` that were taken and not used.
    pub fn give_back(&self, units: u64) {
        if self.is_on() && units > 0 {
            // Rounded down: giving back never makes more of what was taken.
            let cost = units.min(UNITS_MAX) * TICKS_PER_SECOND / self.per_second().max(1);
            let less = |full_at: u64| Some(full_at.saturating_sub(cost));
            let _ = self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
    }

    /// When `units` can be taken, if nobody else takes any.
    pub fn ready_at(&self, now: Instant, units: u64) -> Instant {
        if !self.is_on() {
            return now;
        }
        let burst = self.burst.load(Ordering::Relaxed);
        let full_at = self.full_at.load(Ordering::Relaxed).max(ticks_of(now));
        instant_of(full_at.saturating_add(self.ticks(units).min(burst)).saturating_sub(burst)).max(now)
    }

    /// What `units` cost of a bucket of so many times fewer tokens, in ticks: for shares of it.
    pub(super) fn share_ticks(&self, units: u64, sharers: u64) -> u64 {
        if self.is_on() { self.ticks(units).saturating_mul(sharers) } else { 0 }
    }

    /// How long an empty one takes to be full, in ticks.
    pub(super) fn burst_ticks(&self) -> u64 {
        if self.is_on() { self.burst.load(Ordering::Relaxed) } else { 0 }
    }
}

/// One sender's share of a bucket: a bucket of its own, whose rate is what the whole has divided by how many share it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FairShare {
    full_at: u64,
}

impl FairShare {
    /// Takes what costs `ticks` at the share's rate, if that is within `burst` ticks; whether it was.
    pub(super) fn take(&mut self, now: Instant, ticks: u64, burst: u64) -> bool {
        let now = ticks_of(now);
        let full_at = self.full_at.max(now);
        let is_within = burst.saturating_sub(full_at - now) >= ticks.min(burst);
        if is_within {
            self.full_at = full_at.saturating_add(ticks);
        }
        is_within
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn bucket(per_second: u64, burst: u64) -> Bucket {
        let bucket = Bucket::default();
        let non_zero = |n| NonZeroU64::new(n).unwrap();
        let amount = Amount { per_second: non_zero(per_second), burst: non_zero(burst) };
        bucket.set(Instant::ZERO, Some(amount), 0);
        bucket
    }

    fn us(micros: u64) -> Instant {
        Instant::from_micros(micros)
    }

    #[test]
    fn without_a_limit_everything_passes() {
        let bucket = Bucket::default();
        assert!((0..1000).all(|_| bucket.take(Instant::ZERO, u64::MAX)));
        assert_eq!(bucket.reserve(us(5), 1 << 40), us(5));
    }

    #[test]
    fn a_frame_larger_than_the_bucket_passes_into_debt_and_is_paid_for() {
        // 1 kbit/s, and a frame of segmentation offload.
        let bucket = bucket(125, 1514);
        assert!(bucket.take(Instant::ZERO, 65_550));
        assert!(!bucket.take(Instant::ZERO, 1));
        // It owes 64,036 bytes, and is full only when it has 1514 besides.
        let full = Duration::from_micros(65_550 * 1_000_000 / 125);
        assert!(!bucket.take(Instant::ZERO + full - Duration::from_micros(1), 65_550));
        assert!(bucket.take(Instant::ZERO + full, 65_550));
    }

    #[test]
    fn what_is_reserved_is_there_at_the_time_told_in_the_order_of_asking() {
        let bucket = bucket(1_000_000, 1000);
        assert!(bucket.take(Instant::ZERO, 1000));
        assert_eq!(bucket.reserve(Instant::ZERO, 500), us(500));
        assert_eq!(bucket.reserve(Instant::ZERO, 500), us(1000));
        assert!(!bucket.take(us(1400), 500), "what others reserved is theirs");
        assert!(bucket.take(us(1500), 500));
        bucket.give_back(500);
        assert!(bucket.take(us(1500), 500));
    }

    #[test]
    fn the_fastest_rate_is_met_with_the_smallest_frames() {
        let bucket = bucket(125_000_000_000, 1_250_000_000);
        let mut passed = 0u64;
        let mut now = Instant::ZERO;
        for _ in 0..1000 {
            now = now + Duration::from_micros(1);
            while bucket.take(now, 64) {
                passed += 64;
                assert!(passed < 1 << 40, "it has a bound");
            }
        }
        let most = 1_250_000_000 + 125_000_000;
        assert!(passed <= most && passed > most / 10 * 9, "{passed}");
    }

    #[test]
    fn a_debt_stays_as_many_tokens_when_the_rate_changes() {
        let bucket = bucket(1000, 1000);
        assert!(bucket.take(Instant::ZERO, 1000));
        let amount =
            Amount { per_second: NonZeroU64::new(4000).unwrap(), burst: NonZeroU64::new(1000).unwrap() };
        bucket.set(Instant::ZERO, Some(amount), 0);
        assert!(!bucket.take(us(249_000), 1000));
        assert!(bucket.take(us(250_000), 1000));
        bucket.set(us(250_000), None, 0);
        assert!(bucket.take(us(250_000), 1 << 30));
    }

    #[test]
    fn charges_run_into_bounded_debt() {
        let bucket = bucket(1000, 1000);
        (0..1000).for_each(|_| bucket.charge(Instant::ZERO, 1000));
        assert!(!bucket.take(us(1_999_000), 1000));
        assert!(bucket.take(us(2_000_000), 1000), "of as much as it holds");
    }

    proptest! {
        /// Over any interval no more passes than its length at the rate, the burst, and one frame that is larger
        /// than the bucket; and whoever asks again and again is served in time.
        #[test]
        fn no_interval_has_more_than_rate_and_burst_and_none_starves(
            per_second in 125u64..125_000_000_000,
            burst in 1u64..2_000_000,
            takes in proptest::collection::vec((0u64..5_000, 1u64..70_000), 1..300),
        ) {
            let bucket = bucket(per_second, burst);
            let mut now = 1_000_000;
            let mut passed: Vec<(u64, u64)> = Vec::new();
            for (pause, units) in takes {
                now += pause;
                if bucket.take(us(now), units) {
                    passed.push((now, units));
                } else {
                    let ready = bucket.ready_at(us(now), units);
                    prop_assert!(ready > us(now));
                    prop_assert!(bucket.take(ready, units), "it is there when it was said to be");
                    now = ready.as_micros();
                    passed.push((now, units));
                }
            }
            for from in 0..passed.len() {
                let mut sum = 0u128;
                for (at, units) in &passed[from..] {
                    sum += u128::from(*units);
                    // The last may be larger than the bucket: it passed when that was full.
                    let earned = u128::from(at - passed[from].0) * u128::from(per_second) / 1_000_000;
                    let most = earned + u128::from(burst.max(*units)) + 1;
                    prop_assert!(sum <= most, "{} of at most {} within {} us", sum, most, at - passed[from].0);
                }
            }
        }

        /// Nothing overflows, whatever is asked.
        #[test]
        fn every_number_is_safe(per_second: u64, burst: u64, units: u64, at: u64, charges in 0usize..5) {
            let bucket = bucket(per_second.max(1), burst.max(1));
            let now = us(at);
            for _ in 0..charges {
                bucket.charge(now, units);
                bucket.take_owing(now, units);
                bucket.reserve(now, units);
                bucket.take(now, units);
                bucket.give_back(units);
                bucket.ready_at(now, units);
            }
        }
    }
}
