//! How often something that costs others may be done at a guest's wish.

use crate::time::Instant;

/// A bucket of tokens, full at first, that fills by so many a second.
#[derive(Debug)]
pub(crate) struct Rate {
    burst: u32,
    each_us: u64,
    tokens: u32,
    filled: Instant,
}

impl Rate {
    /// `burst` at once, and `per_second` (1 to 1,000,000) in the long run.
    pub(crate) fn new(burst: u32, per_second: u32) -> Rate {
        Rate { burst, each_us: 1_000_000 / u64::from(per_second), tokens: burst, filled: Instant::ZERO }
    }

    /// Whether it may be done once more at `now`; it is counted as done if so.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let may = self.has(now);
        self.tokens -= u32::from(may);
        may
    }

    /// Whether it may be done once more at `now`.
    pub(crate) fn has(&mut self, now: Instant) -> bool {
        let passed_us = now.as_micros().saturating_sub(self.filled.as_micros());
        let more = passed_us / self.each_us;
        self.tokens = u32::try_from(more).unwrap_or(u32::MAX).saturating_add(self.tokens).min(self.burst);
        self.filled = Instant::from_micros(self.filled.as_micros() + more * self.each_us);
        self.tokens > 0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_is_let_pass_and_then_so_many_a_second() {
        let mut rate = Rate::new(64, 20);
        let start = Instant::ZERO + Duration::from_secs(1000);
        let passed = |rate: &mut Rate, at| (0..1000).filter(|_| rate.take(at)).count();
        assert_eq!(passed(&mut rate, start), 64);
        let second = start + Duration::from_secs(1);
        assert_eq!(passed(&mut rate, second), 20);
        assert_eq!(passed(&mut rate, second), 0);
        assert_eq!(passed(&mut rate, start), 0, "time that goes backwards fills nothing");
    }
}
