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
