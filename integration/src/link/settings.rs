//! What one direction of a link does to frames, as text: `delay=25ms,loss=0.1%,rate=1gbit,queue=4MB`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Queue in front of a rate if none is given, in bytes.
const QUEUE_BYTES: u64 = 1_000_000;
/// Longest time any setting may name: frames are held in memory meanwhile.
const TIME_MAX: Duration = Duration::from_secs(60);

/// A probability.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Chance(f64);

impl Chance {
    /// Whether it is so for 64 pseudo-random bits.
    pub(super) fn is_hit(self, draw: u64) -> bool {
        // The upper 53 bits make a number in [0, 1) exactly.
        ((draw >> 11) as f64) < self.0 * (1_u64 << 53) as f64
    }
}

/// One direction of a link. Frames pass a bottleneck with a queue first, then the rest of the path:
/// what is lost or doubled there has taken its time on the bottleneck once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Time from the bottleneck's end to the receiver.
    pub delay: Duration,
    /// Up to so much more, evenly distributed; order is kept.
    pub jitter: Duration,
    /// Segments that vanish.
    pub loss: Chance,
    /// Segments that come `reorder_by` later while others overtake them.
    pub reorder: Chance,
    /// How much later.
    pub reorder_by: Duration,
    /// Segments that come twice.
    pub duplicate: Chance,
    /// Segments that come with one bit inverted, behind the Ethernet header.
    pub corrupt: Chance,
    /// The bottleneck's rate in bits of Ethernet frames (without FCS) a second; `None` for no bottleneck.
    pub rate: Option<u64>,
    /// Bytes that may wait for the bottleneck, the frame on it included; what does not fit is dropped.
    pub queue_bytes: u64,
}

impl FromStr for Settings {
    type Err = String;

    /// Parses settings separated by commas; an empty text is a perfect link.
    fn from_str(text: &str) -> Result<Settings, String> {
        let mut settings = Settings {
            reorder_by: Duration::from_millis(1),
            queue_bytes: QUEUE_BYTES,
            ..Settings::default()
        };
        for setting in text.split(',').filter(|setting| !setting.is_empty()) {
            let (name, value) = setting.split_once('=').ok_or_else(|| format!("{setting:?} has no value"))?;
            let value = value.trim();
            match name.trim() {
                "delay" => settings.delay = time(value)?,
                "jitter" => settings.jitter = time(value)?,
                "loss" => settings.loss = chance(value)?,
                "reorder" => settings.reorder = chance(value)?,
                "reorder-by" => settings.reorder_by = time(value)?,
                "duplicate" => settings.duplicate = chance(value)?,
                "corrupt" => settings.corrupt = chance(value)?,
                "rate" => settings.rate = Some(rate(value)?),
                "queue" => settings.queue_bytes = bytes(value)?,
                other => return Err(format!("a link has no setting {other:?}")),
            }
        }
        Ok(settings)
    }
}

/// A number and its unit, the first of `units` the text ends with.
fn scaled(text: &str, units: &[(&str, f64)]) -> Result<f64, String> {
    let fail = || {
        let names: Vec<&str> = units.iter().map(|(name, _)| *name).collect();
        format!("{text:?} is no number with one of {}", names.join(", "))
    };
    let (number, scale) =
        units.iter().find_map(|(name, scale)| Some((text.strip_suffix(name)?, scale))).ok_or_else(fail)?;
    let number: f64 = number.trim().parse().map_err(|_| fail())?;
    let value = number * scale;
    if value.is_finite() && value >= 0.0 { Ok(value) } else { Err(fail()) }
}

fn time(text: &str) -> Result<Duration, String> {
    let seconds = scaled(text, &[("us", 1e-6), ("ms", 1e-3), ("s", 1.0)])?;
    if seconds > TIME_MAX.as_secs_f64() {
        return Err(format!("{text:?} is more than {TIME_MAX:?}"));
    }
    Ok(Duration::from_nanos((seconds * 1e9).round() as u64))
}

fn chance(text: &str) -> Result<Chance, String> {
    let value = scaled(text, &[("%", 0.01)])?;
    if value <= 1.0 { Ok(Chance(value)) } else { Err(format!("{text:?} is more than 100%")) }
}

fn rate(text: &str) -> Result<u64, String> {
    let value = scaled(text, &[("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3), ("bit", 1.0)])?.round();
    if (1e3..=1e12).contains(&value) {
        Ok(value as u64)
    } else {
        Err(format!("{text:?} is not between 1kbit and 1000gbit a second"))
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let value = scaled(text, &[("MB", 1e6), ("kB", 1e3), ("B", 1.0)])?.round();
    if value <= 1e9 { Ok(value as u64) } else { Err(format!("{text:?} is more than 1000MB")) }
}

impl fmt::Display for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0 * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_with_their_units() {
        let text = "delay=25ms,jitter=500us,loss=0.1%,reorder=1%,reorder-by=2ms,duplicate=3%,corrupt=100%,\
                    rate=1.5gbit,queue=4MB";
        let settings: Settings = text.parse().unwrap();
        assert_eq!(
            (settings.delay, settings.jitter),
            (Duration::from_millis(25), Duration::from_micros(500))
        );
        assert_eq!((settings.loss, settings.corrupt), (Chance(0.001), Chance(1.0)));
        assert_eq!((settings.reorder, settings.reorder_by), (Chance(0.01), Duration::from_millis(2)));
        assert_eq!((settings.rate, settings.queue_bytes), (Some(1_500_000_000), 4_000_000));
        assert_eq!("".parse::<Settings>().unwrap().rate, None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let bad = [
            "delay",
            "delay=1",
            "delay=-1ms",
            "delay=61s",
            "loss=101%",
            "loss=nan%",
            "loss=0.1",
            "speed=1gbit",
            "rate=999bit",
            "rate=1001gbit",
            "queue=1001MB",
            "delay=xms",
        ];
        for text in bad {
            assert!(text.parse::<Settings>().is_err(), "{text}");
        }
        for text in ["delay=60s", "loss=100%", "rate=1kbit", "rate=1000gbit", "queue=1000MB", "queue=0B"] {
            assert!(text.parse::<Settings>().is_ok(), "{text}");
        }
    }

    #[test]
    fn a_chance_of_nothing_never_and_of_all_always_hits() {
        for draw in [0, 1 << 11, u64::MAX / 2, u64::MAX] {
            assert!(!Chance(0.0).is_hit(draw) && Chance(1.0).is_hit(draw));
        }
        assert!(Chance(0.5).is_hit(u64::MAX / 2) && !Chance(0.5).is_hit(u64::MAX / 2 + 1));
    }
}
