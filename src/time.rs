//! Monotonic time as an argument.
//!
//! Engine and services never read a clock: a worker reads it once per wake-up and hands the value
//! down, so that a test can run hours of a guest's life in virtual time.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on a monotonic clock, in microseconds since an arbitrary start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant {
    micros: u64,
}

impl Instant {
    /// The clock's start.
    pub const ZERO: Instant = Instant { micros: 0 };

    /// A point `micros` microseconds after the clock's start.
    pub const fn from_micros(micros: u64) -> Instant {
        Instant { micros }
    }

    /// Microseconds since the clock's start.
    pub const fn as_micros(self) -> u64 {
        self.micros
    }

    /// Time passed since `earlier`, zero if `earlier` lies in the future.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_micros(self.micros.saturating_sub(earlier.micros))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        let micros = u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX);
        Instant { micros: self.micros.saturating_add(micros) }
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, rhs: Duration) -> Instant {
        let micros = u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX);
        Instant { micros: self.micros.saturating_sub(micros) }
    }
}

/// The worker's clock: reads `CLOCK_MONOTONIC` through [`std::time::Instant`].
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: std::time::Instant,
}

impl Clock {
    /// Starts a clock at [`Instant::ZERO`].
    pub fn start() -> Clock {
        Clock { start: std::time::Instant::now() }
    }

    /// The time now. One call per wake-up, not per packet.
    pub fn now(&self) -> Instant {
        Instant::ZERO + self.start.elapsed()
    }
}
