//! A descriptor that the control thread's runtime waits on until it is readable: inotify, netlink.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Waits on a copy of a non-blocking descriptor; reading is the owner's.
#[derive(Debug)]
pub struct Readable(AsyncFd<OwnedFd>);

impl Readable {
    /// Watches `fd`.
    ///
    /// # Errors
    /// No descriptor for the copy, or the kernel cannot watch it.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Readable> {
        let copy = fd.try_clone_to_owned()?;
        // SAFETY: the copy is open, and an `OwnedFd` names the same open descriptor until it is dropped,
        // which nobody but the `AsyncFd` does.
        let watched = unsafe { AsyncFd::register_with_interest(copy, Interest::READABLE) };
        Ok(Readable(watched?))
    }

    /// Calls `read` until it does not say `WouldBlock`, waiting in between.
    ///
    /// # Errors
    /// Those of `read`, and of the runtime's end.
    pub async fn read<T>(&self, mut read: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut ready = self.0.readable().await?;
            match read() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                outcome => return outcome,
            }
        }
    }
}
