//! Settings of single interfaces: files under `/proc/sys/net`, which show the namespace of who looks.
//!
//! May touch: `/proc/sys/net`. Read first: `Documentation/networking/ip-sysctl.rst` of Linux.

use std::fs;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a setting could not be read or made.
#[derive(Debug, Error)]
#[error("cannot {what} {} (is /proc/sys writable here?)", path.display())]
pub struct SysctlError {
    /// `read` or `set`.
    what: &'static str,
    /// The setting's file.
    path: PathBuf,
    /// The kernel's refusal.
    pub source: io::Error,
}

fn conf(family: &str, interface: &str, key: &str) -> PathBuf {
    // No interface's name has a slash in it or is `..` (`dev_valid_name`).
    ["/proc/sys/net", family, "conf", interface, key].iter().collect()
}

fn write(path: PathBuf, value: &str) -> Result<(), SysctlError> {
    fs::write(&path, value).map_err(|source| SysctlError { what: "set", path, source })
}

fn read_flag(path: PathBuf) -> Result<bool, SysctlError> {
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim() != "0"),
        Err(source) => Err(SysctlError { what: "read", path, source }),
    }
}

/// Sets `net.ipv4.conf.INTERFACE.KEY`.
///
/// # Errors
/// [`SysctlError`].
pub fn set_ipv4(interface: &str, key: &str, value: &str) -> Result<(), SysctlError> {
    write(conf("ipv4", interface, key), value)
}

/// Keeps the host from having IPv6 on `interface`; a kernel without IPv6 has none anyway.
///
/// # Errors
/// [`SysctlError`].
pub fn disable_ipv6(interface: &str) -> Result<(), SysctlError> {
    match write(conf("ipv6", interface, "disable_ipv6"), "1") {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Whether the host forwards IPv4 that comes in by `interface`; `None` if there is no such interface.
///
/// # Errors
/// [`SysctlError`].
pub fn forwards(interface: &str) -> Result<Option<bool>, SysctlError> {
    match read_flag(conf("ipv4", interface, "forwarding")) {
        Ok(forwards) => Ok(Some(forwards)),
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Says whether the host shall forward IPv4 that comes in by `interface`.
///
/// # Errors
/// [`SysctlError`].
pub fn set_forwards(interface: &str, forwards: bool) -> Result<(), SysctlError> {
    set_ipv4(interface, "forwarding", if forwards { "1" } else { "0" })
}

/// Whether the host was told to be a router: `net.ipv4.ip_forward`, which sets all interfaces at once.
///
/// # Errors
/// [`SysctlError`].
pub fn is_router() -> Result<bool, SysctlError> {
    read_flag(PathBuf::from("/proc/sys/net/ipv4/ip_forward"))
}
