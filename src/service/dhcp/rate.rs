//! How often a guest of a shared network is heard.

use crate::limits::{DHCP_MESSAGES_BURST, DHCP_MESSAGES_PER_SECOND};
use crate::time::Instant;

/// A bucket of [`DHCP_MESSAGES_BURST`] messages that fills by [`DHCP_MESSAGES_PER_SECOND`].
#[derive(Debug)]
pub(super) struct Rate {
    tokens: u32,
    filled: Instant,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { tokens: DHCP_MESSAGES_BURST, filled: Instant::ZERO }
    }
}

impl Rate {
    /// Whether one more message is heard at `now`.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let each_us = 1_000_000 / u64::from(DHCP_MESSAGES_PER_SECOND);
        let passed_us = now.as_micros().saturating_sub(self.filled.as_micros());
        let more = passed_us / each_us;
        self.tokens =
            u32::try_from(more).unwrap_or(u32::MAX).saturating_add(self.tokens).min(DHCP_MESSAGES_BURST);
        self.filled = Instant::from_micros(self.filled.as_micros() + more * each_us);
        let heard = self.tokens > 0;
        self.tokens -= u32::from(heard);
        heard
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_is_heard_and_then_so_many_a_second() {
        let mut rate = Rate::default();
        let start = Instant::ZERO + Duration::from_secs(1000);
        let heard = |rate: &mut Rate, at| (0..1000).filter(|_| rate.take(at)).count();
        assert_eq!(heard(&mut rate, start), DHCP_MESSAGES_BURST as usize);
        let second = start + Duration::from_secs(1);
        assert_eq!(heard(&mut rate, second), DHCP_MESSAGES_PER_SECOND as usize);
        assert_eq!(heard(&mut rate, second), 0);
        assert_eq!(heard(&mut rate, start), 0, "time that goes backwards fills nothing");
    }
}
