//! Binding a thread to a CPU (`sched_setaffinity(2)`).

use std::io;
use std::mem::MaybeUninit;

/// CPUs a mask can name.
pub const CPUS_MAX: usize = libc::CPU_SETSIZE as usize;

/// Binds the calling thread to `cpu`.
///
/// # Errors
/// `EINVAL` for a CPU that does not exist or is not allowed to the process.
///
/// # Panics
/// If `cpu` is not below [`CPUS_MAX`].
pub fn bind_to(cpu: usize) -> io::Result<()> {
    assert!(cpu < CPUS_MAX, "the command line refuses other CPUs");
    // SAFETY: a CPU set is plain bits, for which all zeroes is the empty set.
    let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: `cpu` is within the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` is live and of the length given; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
