//! Ways a guest or its driver goes wrong, on request.

use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

/// One way to go wrong. Several may be asked for together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misbehaviour {
    /// Drop every Nth frame to the guest: a lossy receive path.
    DropRx(u64),
    /// Drop every Nth frame from the guest.
    DropTx(u64),
    /// Every `period`, post no receive buffers for `pause`.
    NoRefill {
        /// How often.
        period: Duration,
        /// For how long.
        pause: Duration,
    },
    /// Never notify the device.
    NoKick,
    /// Notify the device at most this often.
    LateKick(Duration),
    /// Notify the device this many times for each batch, with nothing new.
    KickStorm(u32),
    /// Look at the used rings only this often.
    SlowUsed(Duration),
    /// After every Nth frame from the guest offer a broken chain; all kinds in turn.
    Garbage(u64),
    /// Give every Nth frame from the guest a nonsensical virtio-net header; all kinds in turn.
    BadHeader(u64),
    /// After N frames from the guest, jump the transmit ring's available index: the ring is broken.
    BreakRing(u64),
    /// After N frames to the guest, post no receive buffers any more.
    Starve(u64),
    /// After N frames to the guest, drop all further ones: the guest falls silent as its peer sees it.
    Deaf(u64),
}

/// Why a text names no misbehaviour.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "unknown misbehaviour {0:?}: expected drop-rx:N, drop-tx:N, no-refill:PERIOD_MS:PAUSE_MS, no-kick, \
     late-kick:MS, kick-storm:N, slow-used:MS, garbage:N, bad-header:N, break-ring:N, starve:N or deaf:N"
)]
pub struct UnknownMisbehaviour(String);

impl FromStr for Misbehaviour {
    type Err = UnknownMisbehaviour;
    fn from_str(text: &str) -> Result<Misbehaviour, UnknownMisbehaviour> {
        let unknown = || UnknownMisbehaviour(text.to_owned());
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let numbers: Vec<u64> = parts
            .map(|part| part.parse().ok().filter(|n| *n > 0))
            .collect::<Option<_>>()
            .ok_or_else(unknown)?;
        let ms = Duration::from_millis;
        Ok(match (name, numbers.as_slice()) {
            ("drop-rx", [n]) => Misbehaviour::DropRx(*n),
            ("drop-tx", [n]) => Misbehaviour::DropTx(*n),
            ("no-refill", [period, pause]) if pause < period => {
                Misbehaviour::NoRefill { period: ms(*period), pause: ms(*pause) }
            }
            ("no-kick", []) => Misbehaviour::NoKick,
            ("late-kick", [n]) => Misbehaviour::LateKick(ms(*n)),
            ("kick-storm", [n]) => Misbehaviour::KickStorm(u32::try_from(*n).map_err(|_| unknown())?),
            ("slow-used", [n]) => Misbehaviour::SlowUsed(ms(*n)),
            ("garbage", [n]) => Misbehaviour::Garbage(*n),
            ("bad-header", [n]) => Misbehaviour::BadHeader(*n),
            ("break-ring", [n]) => Misbehaviour::BreakRing(*n),
            ("starve", [n]) => Misbehaviour::Starve(*n),
            ("deaf", [n]) => Misbehaviour::Deaf(*n),
            _ => return Err(unknown()),
        })
    }
}

/// What was asked for, sorted for the worker.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Plan {
    /// See [`Misbehaviour::DropRx`].
    pub(crate) drop_rx: Option<u64>,
    /// See [`Misbehaviour::DropTx`].
    pub(crate) drop_tx: Option<u64>,
    /// See [`Misbehaviour::NoRefill`]: period and pause.
    pub(crate) no_refill: Option<(Duration, Duration)>,
    /// See [`Misbehaviour::NoKick`].
    pub(crate) no_kick: bool,
    /// See [`Misbehaviour::LateKick`].
    pub(crate) late_kick: Option<Duration>,
    /// See [`Misbehaviour::KickStorm`]; notifications a batch.
    pub(crate) kicks: Option<u32>,
    /// See [`Misbehaviour::SlowUsed`].
    pub(crate) slow_used: Option<Duration>,
    /// See [`Misbehaviour::Garbage`].
    pub(crate) garbage: Option<u64>,
    /// See [`Misbehaviour::BadHeader`].
    pub(crate) bad_header: Option<u64>,
    /// See [`Misbehaviour::BreakRing`].
    pub(crate) break_ring: Option<u64>,
    /// See [`Misbehaviour::Starve`].
    pub(crate) starve: Option<u64>,
    /// See [`Misbehaviour::Deaf`].
    pub(crate) deaf: Option<u64>,
}

impl Plan {
    /// The plan of `wishes`; a later one of the same kind replaces an earlier one.
    pub(crate) fn new(wishes: &[Misbehaviour]) -> Plan {
        let mut plan = Plan::default();
        for wish in wishes {
            match *wish {
                Misbehaviour::DropRx(n) => plan.drop_rx = Some(n),
                Misbehaviour::DropTx(n) => plan.drop_tx = Some(n),
                Misbehaviour::NoRefill { period, pause } => plan.no_refill = Some((period, pause)),
                Misbehaviour::NoKick => plan.no_kick = true,
                Misbehaviour::LateKick(every) => plan.late_kick = Some(every),
                Misbehaviour::KickStorm(n) => plan.kicks = Some(n),
                Misbehaviour::SlowUsed(every) => plan.slow_used = Some(every),
                Misbehaviour::Garbage(n) => plan.garbage = Some(n),
                Misbehaviour::BadHeader(n) => plan.bad_header = Some(n),
                Misbehaviour::BreakRing(n) => plan.break_ring = Some(n),
                Misbehaviour::Starve(n) => plan.starve = Some(n),
                Misbehaviour::Deaf(n) => plan.deaf = Some(n),
            }
        }
        plan
    }

    /// Longest sleep that still keeps the plan's times.
    pub(crate) fn longest_sleep(&self) -> Option<Duration> {
        if self.no_refill.is_some() || self.late_kick.is_some() || self.slow_used.is_some() {
            Some(Duration::from_millis(1))
        } else {
            None
        }
    }
}

/// Whether event number `count`, counted from 1, is one of every `n`.
pub(crate) fn every(n: Option<u64>, count: u64) -> bool {
    n.is_some_and(|n| count.is_multiple_of(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_parse_with_their_numbers() {
        assert_eq!("drop-rx:10".parse(), Ok(Misbehaviour::DropRx(10)));
        let pause =
            Misbehaviour::NoRefill { period: Duration::from_millis(500), pause: Duration::from_millis(100) };
        assert_eq!("no-refill:500:100".parse(), Ok(pause));
        assert_eq!("starve:7".parse(), Ok(Misbehaviour::Starve(7)));
        assert_eq!("deaf:7".parse(), Ok(Misbehaviour::Deaf(7)));
        for bad in ["drop-rx", "drop-rx:0", "no-refill:100:100", "no-kick:1", "deaf:0", "sulk"] {
            assert_eq!(bad.parse::<Misbehaviour>(), Err(UnknownMisbehaviour(bad.into())));
        }
    }
}
