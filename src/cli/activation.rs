//! The socket that a service manager passed (socket activation): it takes the place of `--fd`.
//!
//! Read first: sd_listen_fds(3).

use std::io;
use std::os::fd::RawFd;

use thiserror::Error;

use super::UsageError;

/// Why what was passed is of no use.
#[derive(Debug, Error)]
pub enum PassedError {
    /// The environment or the descriptors are not as the protocol has them.
    #[error("LISTEN_FDS: {0}; have the service manager pass one listening unix stream socket")]
    Environment(io::Error),
    /// Sockets nobody would serve.
    #[error(
        "LISTEN_FDS: {0} sockets were passed, and one VM has one: give the socket unit one ListenStream=, and each VM a \
         unit of its own"
    )]
    Several(usize),
}

/// The descriptor of the socket that was passed to this process, if one was.
///
/// # Errors
/// [`UsageError::Passed`].
pub(super) fn passed() -> Result<Option<RawFd>, UsageError> {
    let fds = sd_notify::listen_fds().map_err(PassedError::Environment)?;
    Ok(only(fds)?)
}

fn only(mut fds: impl ExactSizeIterator<Item = RawFd>) -> Result<Option<RawFd>, PassedError> {
    match fds.len() {
        0 | 1 => Ok(fds.next()),
        several => Err(PassedError::Several(several)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_socket_is_taken_and_several_are_refused() {
        assert_eq!(only(3..3).unwrap(), None);
        assert_eq!(only(3..4).unwrap(), Some(3));
        let error = only(3..5).unwrap_err().to_string();
        assert!(error.contains("2 sockets") && error.contains("ListenStream="), "{error}");
    }
}
