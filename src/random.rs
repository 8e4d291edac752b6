//! Random numbers of the operating system.

use std::io;

/// 64 random bits.
///
/// # Errors
/// The system has none to give.
pub(crate) fn bits64() -> io::Result<u64> {
    getrandom::u64().map_err(io::Error::other)
}

/// 32 random bits.
///
/// # Errors
/// As [`bits64`].
pub(crate) fn bits32() -> io::Result<u32> {
    getrandom::u32().map_err(io::Error::other)
}
