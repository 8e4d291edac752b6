//! Time as several processes can agree on it, and as it passes while the host is off.
//!
//! Within one boot of the host all processes read one clock that nobody can set (`CLOCK_BOOTTIME`; it goes on
//! while the host sleeps, as a guest's lease does). Only what was written in another boot is judged by the
//! time of day, once, and only as far as that can be true.
//!
//! Read first: clock_gettime(2); random(4), `boot_id`.

use std::fmt;
use std::fs;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::time::Instant;

/// The file that tells this boot from others.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// One moment on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Microseconds since this boot.
    pub boottime_us: i64,
    /// Microseconds since 1970, by the time of day: may be wrong, may jump.
    pub wall_us: i64,
}

/// The host's clocks.
pub trait HostClock: fmt::Debug + Send + Sync {
    /// What tells this boot from others.
    fn boot_id(&self) -> &str;
    /// This moment.
    fn now(&self) -> Moment;
    /// The moment a caller calls `now`; only a test's clock looks at it.
    fn at(&self, _now: Instant) -> Moment {
        self.now()
    }
}

/// The clocks of the host this process runs on.
#[derive(Clone, Debug)]
pub struct SystemClock {
    boot_id: String,
}

impl SystemClock {
    /// Finds out which boot this is.
    ///
    /// # Errors
    /// If `/proc` does not say; the file is named.
    pub fn new() -> io::Result<SystemClock> {
        let text = fs::read_to_string(BOOT_ID)
            .map_err(|error| io::Error::new(error.kind(), format!("{BOOT_ID}: {error}")))?;
        Ok(SystemClock { boot_id: text.trim().to_owned() })
    }
}

impl HostClock for SystemClock {
    fn boot_id(&self) -> &str {
        &self.boot_id
    }

    fn now(&self) -> Moment {
        let boottime = clock_gettime(ClockId::Boottime);
        // Before 1970 only if nobody set the clock: as wrong as any other time then.
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Moment {
            boottime_us: boottime.tv_sec.saturating_mul(1_000_000).saturating_add(boottime.tv_nsec / 1000),
            wall_us: i64::try_from(wall.as_micros()).unwrap_or(i64::MAX),
        }
    }
}
