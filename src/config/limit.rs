//! Rate limits as they are written: `rate=100mbit,burst=256kb,packets=50000,flows=100`.
//!
//! Rates and sizes have the units of tc(8): `kbit`, `mbit`, `gbit` and `tbit` are bits a second by thousands (with
//! an `i`, `kibit`, by 1024), `kbps` and so on bytes a second; of sizes `kb` is 1024 bytes.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use thiserror::Error;

use crate::limits::{
    LIMIT_BURST_MAX, LIMIT_BURST_SECONDS_MAX, LIMIT_FRAME_BYTES, LIMIT_PACKETS_BURST_MIN,
    LIMIT_PER_SECOND_MAX, LIMIT_RATE_BYTES_MAX, LIMIT_RATE_BYTES_MIN,
};

/// A token bucket's size and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount {
    /// Tokens a second.
    pub per_second: NonZeroU64,
    /// Tokens it holds, which pass at once after a pause.
    pub burst: NonZeroU64,
}

/// What of one direction is limited; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitSpec {
    /// Bytes of Ethernet frames, without preamble and frame check sequence.
    pub bytes: Option<Amount>,
    /// Packets as a wire would have them: a frame of segmentation offload counts as its segments.
    pub packets: Option<Amount>,
    /// New flows: TCP connections, and exchanges of datagrams with one remote end.
    pub flows: Option<Amount>,
}

/// What is limited, each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    /// What the guest sends.
    pub from_guest: LimitSpec,
    /// What it is sent.
    pub to_guest: LimitSpec,
}

impl LimitsConfig {
    /// Whether new flows are limited, either way.
    pub fn limits_flows(&self) -> bool {
        self.from_guest.flows.is_some() || self.to_guest.flows.is_some()
    }
}

/// Why a limit is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LimitError {
    /// Not `KEY=VALUE`, or a key there is none of.
    #[error(
        "'{0}' is none of rate=RATE, burst=SIZE, packets=N, packets-burst=N, flows=N and flows-burst=N joined by \
         commas, such as rate=100mbit,packets=50000; or none for no limit"
    )]
    Form(String),
    /// A key twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// A burst of nothing.
    #[error("{burst} is given without {rate}, whose burst it is")]
    BurstAlone {
        /// The key given.
        burst: &'static str,
        /// The key that is missing.
        rate: &'static str,
    },
    /// Not a rate.
    #[error(
        "'{0}' is no rate: a whole number from 1kbit to 1tbit with the unit bit, kbit, mbit, gbit or tbit, or for \
         bytes a second bps, kbps, mbps, gbps or tbps; write none for no limit"
    )]
    Rate(String),
    /// Not a size.
    #[error("'{0}' is no size: a whole number of bytes from 1 to 4gb, with b, kb, mb or gb, such as 256kb")]
    Size(String),
    /// Not a number of things a second.
    #[error("'{0}' is no number from 1 to 1000000000; write none for no limit")]
    Count(String),
    /// A bucket that takes too long to be full.
    #[error("{key}={value} is more than an hour of its rate: no bucket needs to be so large")]
    BurstTooLong {
        /// The key.
        key: &'static str,
        /// What it was given.
        value: u64,
    },
}

/// The keys of a limit, its rate's and its burst's.
const KEYS: [(&str, &str); 3] = [("rate", "burst"), ("packets", "packets-burst"), ("flows", "flows-burst")];

impl LimitSpec {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == LimitSpec::default()
    }

    fn amounts(&self) -> [Option<Amount>; 3] {
        [self.bytes, self.packets, self.flows]
    }
}

impl FromStr for LimitSpec {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<LimitSpec, LimitError> {
        if text == "none" {
            return Ok(LimitSpec::default());
        }
        let mut rates = [None; 3];
        let mut bursts = [None; 3];
        for part in text.split(',') {
            let form = || LimitError::Form(part.to_owned());
            let (key, value) = part.split_once('=').ok_or_else(form)?;
            let is_it = |(rate, burst): &(&str, &str)| *rate == key || *burst == key;
            let at = KEYS.iter().position(is_it).ok_or_else(form)?;
            let (rate_key, burst_key) = KEYS[at];
            let (place, name, number) = match (key == rate_key, at) {
                (true, 0) => (&mut rates[at], rate_key, rate(value)?),
                (false, 0) => (&mut bursts[at], burst_key, size(value)?),
                (true, _) => (&mut rates[at], rate_key, count(value)?),
                (false, _) => (&mut bursts[at], burst_key, count(value)?),
            };
            if place.replace(number).is_some() {
                return Err(LimitError::Twice(name));
            }
        }
        let mut amounts = [None; 3];
        for (at, amount) in amounts.iter_mut().enumerate() {
            *amount = amount_of(at, rates[at], bursts[at])?;
        }
        let [bytes, packets, flows] = amounts;
        Ok(LimitSpec { bytes, packets, flows })
    }
}

/// A rate with its burst, the usual one if none is given.
fn amount_of(
    at: usize,
    rate: Option<NonZeroU64>,
    burst: Option<NonZeroU64>,
) -> Result<Option<Amount>, LimitError> {
    let (rate_key, burst_key) = KEYS[at];
    let Some(per_second) = rate else {
        return match burst {
            Some(_) => Err(LimitError::BurstAlone { burst: burst_key, rate: rate_key }),
            None => Ok(None),
        };
    };
    let hundredth = NonZeroU64::new(per_second.get() / 100).unwrap_or(NonZeroU64::MIN);
    let usual = match at {
        // 10 ms of it, and a frame of segmentation offload at least.
        0 => hundredth.max(LIMIT_FRAME_BYTES),
        1 => hundredth.max(LIMIT_PACKETS_BURST_MIN),
        // A page of the web opens dozens at once.
        _ => per_second,
    };
    let burst = burst.unwrap_or(usual);
    if burst.get() / LIMIT_BURST_SECONDS_MAX > per_second.get() {
        return Err(LimitError::BurstTooLong { key: burst_key, value: burst.get() });
    }
    Ok(Some(Amount { per_second, burst }))
}

/// A whole number and what is behind it, in lower case.
fn number_and_unit(text: &str) -> Option<(u64, String)> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.to_ascii_lowercase()))
}

/// A rate in bytes a second.
fn rate(text: &str) -> Result<NonZeroU64, LimitError> {
    let error = || LimitError::Rate(text.to_owned());
    let (number, unit) = number_and_unit(text).ok_or_else(error)?;
    let (prefix, divisor) = match (unit.strip_suffix("bit"), unit.strip_suffix("bps")) {
        (Some(prefix), _) => (prefix, 8),
        (_, Some(prefix)) => (prefix, 1),
        _ if unit.is_empty() => ("", 8),
        _ => return Err(error()),
    };
    let factor = multiple(prefix, 1000).ok_or_else(error)?;
    let bytes = number.checked_mul(factor).ok_or_else(error)? / divisor;
    let bounds = LIMIT_RATE_BYTES_MIN..=LIMIT_RATE_BYTES_MAX;
    NonZeroU64::new(bytes).filter(|bytes| bounds.contains(&bytes.get())).ok_or_else(error)
}

/// What a prefix of a unit stands for, whose steps are of `step`, or of 1024 with an `i`.
fn multiple(prefix: &str, step: u64) -> Option<u64> {
    let (letter, step) = match prefix.strip_suffix('i') {
        Some(letter) => (letter, 1024),
        None => (prefix, step),
    };
    let steps = match letter {
        "" if prefix.is_empty() => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return None,
    };
    step.checked_pow(steps)
}

/// A size in bytes.
fn size(text: &str) -> Result<NonZeroU64, LimitError> {
    let error = || LimitError::Size(text.to_owned());
    let (number, unit) = number_and_unit(text).ok_or_else(error)?;
    let factor = multiple(unit.strip_suffix('b').unwrap_or(&unit), 1024).ok_or_else(error)?;
    let bytes = number.checked_mul(factor).filter(|bytes| *bytes <= LIMIT_BURST_MAX);
    bytes.and_then(NonZeroU64::new).ok_or_else(error)
}

/// A number of things.
fn count(text: &str) -> Result<NonZeroU64, LimitError> {
    let number = text.parse::<NonZeroU64>().ok().filter(|number| number.get() <= LIMIT_PER_SECOND_MAX);
    number.ok_or_else(|| LimitError::Count(text.to_owned()))
}

/// As it is written, in units that say it exactly.
impl fmt::Display for LimitSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        let mut comma = "";
        for ((at, (rate_key, burst_key)), amount) in KEYS.iter().enumerate().zip(self.amounts()) {
            let Some(Amount { per_second, burst }) = amount else { continue };
            write!(f, "{comma}{rate_key}=")?;
            comma = ",";
            match at {
                0 => write!(f, "{},{burst_key}={}", RateText(per_second.get()), SizeText(burst.get()))?,
                _ => write!(f, "{per_second},{burst_key}={burst}")?,
            }
        }
        Ok(())
    }
}

/// A rate in bytes a second, in bits.
struct RateText(u64);

impl fmt::Display for RateText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = self.0 * 8;
        let units =
            [(1_000_000_000_000, "tbit"), (1_000_000_000, "gbit"), (1_000_000, "mbit"), (1000, "kbit")];
        match units.into_iter().find(|(unit, _)| bits.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", bits / unit),
            None => write!(f, "{bits}bit"),
        }
    }
}

struct SizeText(u64);

impl fmt::Display for SizeText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1u64 << 30, "gb"), (1 << 20, "mb"), (1 << 10, "kb")];
        match units.into_iter().find(|(unit, _)| self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}b", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn amount(per_second: u64, burst: u64) -> Option<Amount> {
        let non_zero = |n| NonZeroU64::new(n).unwrap();
        Some(Amount { per_second: non_zero(per_second), burst: non_zero(burst) })
    }

    #[test]
    fn units_are_those_of_tc() {
        for (text, bytes) in [
            ("1000", 125),
            ("1kbit", 125),
            ("100mbit", 12_500_000),
            ("100Mbit", 12_500_000),
            ("1gbit", 125_000_000),
            ("1tbit", 125_000_000_000),
            ("1kibit", 128),
            ("125bps", 125),
            ("2mbps", 2_000_000),
            ("1gibps", 1 << 30),
        ] {
            assert_eq!(rate(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
        for (text, bytes) in [("1", 1), ("10b", 10), ("256kb", 256 << 10), ("3k", 3 << 10), ("4gb", 4 << 30)]
        {
            assert_eq!(size(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bursts_are_ten_milliseconds_or_a_large_frame_unless_said() {
        let spec: LimitSpec = "rate=1gbit,packets=50000,flows=100".parse().unwrap();
        assert_eq!((spec.bytes, spec.packets), (amount(125_000_000, 1_250_000), amount(50_000, 500)));
        assert_eq!(spec.flows, amount(100, 100));
        let spec: LimitSpec = "rate=1kbit".parse().unwrap();
        assert_eq!((spec.bytes, spec.packets, spec.flows), (amount(125, 65_550), None, None));
        let spec: LimitSpec = "packets=9,packets-burst=3,burst=2kb,rate=1mbit".parse().unwrap();
        assert_eq!((spec.bytes, spec.packets), (amount(125_000, 2048), amount(9, 3)));
        assert_eq!("none".parse(), Ok(LimitSpec::default()));
    }

    #[test]
    fn what_is_no_limit_is_refused_with_what_to_write() {
        for (text, part) in [
            ("", "rate=RATE"),
            ("100mbit", "rate=RATE"),
            ("speed=100mbit", "speed"),
            ("rate=0", "write none"),
            ("rate=999bit", "1kbit"),
            ("rate=2tbit", "1tbit"),
            ("rate=99999999999999999999gbit", "no rate"),
            ("rate=18446744073709551615tbit", "no rate"),
            ("rate=1.5mbit", "whole number"),
            ("rate=5ibit", "no rate"),
            ("rate=-5kbit", "no rate"),
            ("rate=1mbit,rate=2mbit", "twice"),
            ("burst=10kb", "without rate"),
            ("flows-burst=10", "without flows"),
            ("rate=1mbit,burst=0", "no size"),
            ("rate=1mbit,burst=5gb", "no size"),
            ("rate=1kbit,burst=1mb", "an hour"),
            ("packets=0", "write none"),
            ("packets=1000000001", "no number"),
            ("flows=many", "no number"),
            ("none,rate=1mbit", "rate=RATE"),
        ] {
            let error = text.parse::<LimitSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: '{part}' is not in: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_as_it_was(rate in 125u64..=125_000_000_000, burst in 1u64..450_000, flows in 1u64..=1_000_000_000) {
            let spec = LimitSpec { bytes: amount(rate, burst), packets: None, flows: amount(flows, flows) };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }

        #[test]
        fn any_text_is_judged(text in "\\PC{0,40}") {
            let _ = text.parse::<LimitSpec>();
        }
    }
}
