//! Medians, spreads and percentiles.

use serde::{Deserialize, Serialize};

/// The repetitions of one figure. A median of few runs says little without its spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Summary {
    /// Middle value, or the mean of the two middle ones.
    pub(super) median: f64,
    /// Smallest value.
    pub(super) min: f64,
    /// Largest value.
    pub(super) max: f64,
    /// Every value, in the order they were measured.
    pub(super) values: Vec<f64>,
}

impl Summary {
    /// Summarises `values`; `None` if there are none, or one is not a number.
    pub(super) fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted = values.to_vec();
        if sorted.is_empty() || sorted.iter().any(|value| value.is_nan()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (sorted[0], sorted[sorted.len() - 1]);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Some(Summary { median: f64::midpoint(low, high), min, max, values: values.to_vec() })
    }
}

/// The value below which `percent` of the samples lie (nearest rank); `None` without samples.
/// Sorts them.
pub(super) fn percentile(samples: &mut [u64], percent: u64) -> Option<u64> {
    samples.sort_unstable();
    let rank = (samples.len() as u64 * percent).div_ceil(100).max(1);
    samples.get(usize::try_from(rank - 1).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_an_odd_and_the_mean_of_an_even_count() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(odd.values, [3.0, 1.0, 2.0], "values keep the order of measurement");
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
    }

    #[test]
    fn nothing_and_no_number_have_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn percentiles_take_the_nearest_rank() {
        let mut hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentile(&mut hundred, 50), Some(50));
        assert_eq!(percentile(&mut hundred, 99), Some(99));
        assert_eq!(percentile(&mut [7], 99), Some(7));
        assert_eq!(percentile(&mut [7, 8], 0), Some(7));
        assert_eq!(percentile(&mut [], 50), None);
    }
}
