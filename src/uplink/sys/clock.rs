//! Time that passes while the host sleeps, too (`clock_gettime(2)`, `CLOCK_BOOTTIME`). What the world says is
//! good for so many seconds is not good for longer because the host was suspended meanwhile; `std`'s clock,
//! `CLOCK_MONOTONIC`, stands still then.

use std::time::Duration;

use crate::time::Instant;

/// Linux's; elsewhere the monotonic clock counts sleep itself.
#[cfg(target_os = "linux")]
const CLOCK: libc::clockid_t = libc::CLOCK_BOOTTIME;
#[cfg(not(target_os = "linux"))]
const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC;

/// Time since the host's start, its sleep included.
///
/// # Panics
/// If the kernel has no such clock: before Linux 2.6.39.
pub fn since_boot() -> Instant {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is live and may be written.
    let failed = unsafe { libc::clock_gettime(CLOCK, &mut now) };
    assert_eq!(failed, 0, "the kernel has this clock");
    Instant::ZERO + Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set in the process that only tells its time.
    const TELL: &str = "VUNET_TEST_TELL_SINCE_BOOT";

    #[test]
    fn time_asleep_counts() {
        if std::env::var_os(TELL).is_some() {
            println!("told {}", since_boot().as_micros());
            return;
        }
        // A namespace in which the host slept for a day: only this clock shows it (time_namespaces(7)).
        let before = since_boot();
        let slept = Command::new("unshare")
            .args(["--time", "--boottime", "86400", "--fork", "--"])
            .arg(std::env::current_exe().expect("this test's program"))
            .args(["--exact", "uplink::sys::clock::tests::time_asleep_counts", "--nocapture"])
            .env(TELL, "1")
            .output();
        let Some(slept) = slept.ok().filter(|slept| slept.status.success()) else {
            eprintln!("no time namespaces here: only that the clock goes on is tested");
            assert!(before > Instant::ZERO && since_boot() >= before);
            return;
        };
        let told = String::from_utf8_lossy(&slept.stdout).into_owned();
        let micros = told.lines().find_map(|line| line.split_once("told ")).map(|(_, micros)| micros.trim());
        let then = Instant::from_micros(micros.and_then(|micros| micros.parse().ok()).expect(&told));
        let passed = then.since(before).as_secs();
        assert!((86_400..86_500).contains(&passed), "{passed} s");
    }
}
