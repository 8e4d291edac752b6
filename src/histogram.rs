//! Counts by size, of one writer: plain numbers, one addition a value.
//!
//! Buckets are powers of four, so that a few of them reach from a microsecond to minutes, and a value's bucket is
//! its number of digits.

use std::time::Duration;

/// Buckets; the last takes whatever is beyond the others.
const BUCKETS: usize = 15;

/// Values, counted by size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    sum: u64,
}

impl Histogram {
    /// Counts a value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.sum = self.sum.wrapping_add(value);
    }

    /// Counts a time, in microseconds.
    pub fn record_time(&mut self, time: Duration) {
        self.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Histogram) {
        for (own, theirs) in self.counts.iter_mut().zip(other.counts) {
            *own += theirs;
        }
        self.sum = self.sum.wrapping_add(other.sum);
    }

    /// Values counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// For each bucket but the last its largest value, and how many values are no larger than that.
    pub fn cumulative(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut total = 0;
        self.counts.iter().take(BUCKETS - 1).enumerate().map(move |(at, count)| {
            total += count;
            (1 << (2 * at), total)
        })
    }
}

/// The first bucket whose largest value, 4 to the power of its index, is not below `value`.
#[inline]
fn bucket(value: u64) -> usize {
    let digits = u64::BITS - value.saturating_sub(1).leading_zeros();
    (digits.div_ceil(2) as usize).min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_lies_in_the_first_bucket_that_is_not_below_it() {
        for value in (0..70).chain([1 << 26, (1 << 26) + 1, 1 << 40, u64::MAX]) {
            let mut one = Histogram::default();
            one.record(value);
            for (largest, total) in one.cumulative() {
                assert_eq!(total, u64::from(value <= largest), "{value} and {largest}");
            }
            assert_eq!((one.count(), one.sum()), (1, value));
        }
    }

    #[test]
    fn histograms_add_up() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        one.record_time(Duration::from_millis(3));
        other.record_time(Duration::from_micros(3));
        other.record_time(Duration::from_secs(1_000_000));
        one.add(&other);
        assert_eq!((one.count(), one.sum()), (3, 1_000_000_003_003));
        assert_eq!(one.cumulative().last(), Some((1 << 26, 2)));
    }
}
