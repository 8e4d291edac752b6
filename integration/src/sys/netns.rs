//! Entering a network namespace.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Where `ip netns` keeps named namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Moves the calling thread into the named network namespace; threads it starts follow it.
///
/// # Errors
/// If the namespace does not exist or the caller lacks `CAP_SYS_ADMIN`.
pub(crate) fn enter(name: &str) -> io::Result<()> {
    let file = File::open(Path::new(NETNS_DIR).join(name))?;
    // SAFETY: setns touches no memory; the descriptor is open for the whole call.
    let rc = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
