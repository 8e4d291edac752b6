//! Signals to processes, and limits of this one.

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

/// Lets the calling thread run before every ordinary one as soon as it has something to do
/// (SCHED_RR, `sched(7)`).
///
/// # Errors
/// If that is not allowed here.
pub(crate) fn run_before_others() -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 1 };
    // SAFETY: sched_setscheduler reads one sched_param, which we own; 0 is the calling thread.
    let rc = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const param) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Clock ticks a second, the unit of times in `/proc`.
pub(crate) fn clock_ticks_per_second() -> f64 {
    // SAFETY: sysconf touches no memory of ours.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    // Linux always knows it; 100 is its value on every architecture.
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

/// Sets how many files this process, and those it starts, may have open to `wanted`; where that is
/// not allowed, to as many as are. Returns what the limit is now.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn allow_open_files(wanted: u64) -> io::Result<u64> {
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, which we own.
    let rc = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut now) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    for files in [wanted, wanted.min(now.rlim_max)] {
        let limit = libc::rlimit { rlim_cur: files, rlim_max: files };
        // SAFETY: setrlimit reads one rlimit, which we own.
        let rc = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
        if rc == 0 {
            return Ok(files);
        }
    }
    Err(io::Error::last_os_error())
}

/// Lets a descriptor stay open in what the calling process becomes.
///
/// # Errors
/// What the kernel answers.
pub(crate) fn keep_open(fd: i32) -> io::Result<()> {
    // SAFETY: F_SETFD changes a flag of a descriptor; a number that is not open yields EBADF.
    let rc = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_not_allowed_becomes_the_highest_that_is() {
        // Above nr_open nobody may go.
        let limit = allow_open_files(u64::MAX - 1).unwrap();
        assert_eq!(allow_open_files(limit).unwrap(), limit);
    }
}
