//! Signals to processes.

use std::io;

/// Signal numbers tests need, as the kernel knows them.
pub(crate) const SIGKILL: i32 = libc::SIGKILL;
/// Orderly end.
pub(crate) const SIGTERM: i32 = libc::SIGTERM;
/// Print counters.
pub(crate) const SIGUSR1: i32 = libc::SIGUSR1;

/// Sends `signal` to process `pid`.
///
/// # Errors
/// If there is no such process.
pub(crate) fn send(pid: u32, signal: i32) -> io::Result<()> {
    let pid = i32::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill touches no memory of ours.
    let rc = unsafe { libc::kill(pid, signal) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the caller is root.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid touches no memory and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Clock ticks a second, the unit of times in `/proc`.
pub(crate) fn clock_ticks_per_second() -> f64 {
    // SAFETY: sysconf touches no memory of ours.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    // Linux always knows it; 100 is its value on every architecture.
    if ticks > 0 { ticks as f64 } else { 100.0 }
}
