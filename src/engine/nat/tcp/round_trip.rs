//! How long the guest takes to acknowledge, and from that how long to wait for it: RFC 6298.
//!
//! One segment at a time is timed, from its first sending to the acknowledgement that covers it; once
//! anything is sent again nothing tells which sending is acknowledged, and no time is taken (Karn, RFC
//! 6298, 3).

use std::time::Duration;

use crate::time::Instant;
use crate::wire::tcp::SeqNumber;

/// What a guest that was never timed is given (RFC 6298, 2.1).
const UNKNOWN: Duration = Duration::from_secs(1);
/// Least margin above the smoothed time. RFC 6298, 2.4 has a least time-out of 1 s; the guest is one memory
/// copy away, and what it may wait with an acknowledgement (RFC 9293, 3.8.6.3: below 500 ms, of Linux 40 to
/// 200 ms) is what counts. Linux has the same.
const MARGIN_MIN: Duration = Duration::from_millis(200);

/// Longest time-out an estimate makes. A guest that was paused has one round trip of a minute; what is lost
/// afterwards must not wait for that long. RFC 6298, 2.5 asks for a bound no lower than a minute, on paths
/// longer than a memory copy.
const TIMEOUT_MAX: Duration = Duration::from_secs(3);

/// The estimate of one flow.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RoundTrip {
    /// Smoothed time and its variation (RFC 6298, 2: SRTT, RTTVAR), once known.
    known: Option<(Duration, Duration)>,
    /// What is timed: the number behind it, and when it was sent.
    timed: Option<(SeqNumber, Instant)>,
}

impl RoundTrip {
    /// Bytes up to `end` are sent for the first time.
    pub(super) fn sent(&mut self, now: Instant, end: SeqNumber) {
        self.timed.get_or_insert((end, now));
    }

    /// Something is sent again.
    pub(super) fn sent_again(&mut self) {
        self.timed = None;
    }

    /// Everything before `ack` is acknowledged.
    pub(super) fn acknowledged(&mut self, now: Instant, ack: SeqNumber) {
        let Some((_, at)) = self.timed.filter(|(end, _)| ack.at_or_after(*end)) else { return };
        self.timed = None;
        let time = now.since(at);
        self.known = Some(match self.known {
            None => (time, time / 2),
            Some((smoothed, variation)) => {
                (smoothed * 7 / 8 + time / 8, variation * 3 / 4 + smoothed.abs_diff(time) / 4)
            }
        });
    }

    /// How long to wait before anything is sent again (RFC 6298, 2.3).
    pub(super) fn timeout(&self) -> Duration {
        match self.known {
            None => UNKNOWN,
            Some((smoothed, variation)) => (smoothed + (variation * 4).max(MARGIN_MIN)).min(TIMEOUT_MAX),
        }
    }
}
