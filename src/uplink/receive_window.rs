//! A receive window that grows with its stream.
//!
//! The kernel sizes a socket's receive buffer by what the application takes out of it in a round trip, less
//! what then still lies in it (tcp(7), `tcp_moderate_rcvbuf`). Here bytes lie in it until the guest has acknowledged them, so a
//! burst is measured when most of it is still there, and where the machine is busy the window never grows: 64 KiB
//! a round trip is all the stream gets. So it is asked for more by the bytes taken: a quarter of the window within
//! a second, and it doubles. A sender that doubles what it sends each round trip so never meets its end.
//!
//! `SO_RCVLOWAT` enlarges the buffer to hold what is to be waited for, up to half of `tcp_rmem`'s maximum, and
//! leaves the kernel's own sizing on, which `SO_RCVBUF` would end.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::sys::socket as sys;

/// The window a stream is taken to begin with.
const FIRST_BYTES: usize = 64 << 10;
/// The largest asked for; the kernel's bound is lower unless the administrator raised it.
const LARGEST_BYTES: usize = 16 << 20;
/// A part of the window must be taken within this for the next to be larger.
const PACE: Duration = Duration::from_secs(1);
/// What part of the window that is: a sender doubles within half of its window, and takes a round trip to hear
/// of more.
const PART: usize = 4;

/// What is asked of one stream's socket.
#[derive(Debug)]
pub(super) struct ReceiveWindow {
    asked_bytes: usize,
    taken_bytes: usize,
    /// When counting began; the first part counts whenever it comes.
    since: Option<Instant>,
}

impl Default for ReceiveWindow {
    fn default() -> ReceiveWindow {
        ReceiveWindow { asked_bytes: FIRST_BYTES, taken_bytes: 0, since: None }
    }
}

impl ReceiveWindow {
    /// `len_bytes` left the queue of `fd`.
    pub(super) fn taken(&mut self, fd: BorrowedFd<'_>, len_bytes: usize) {
        if self.asked_bytes >= LARGEST_BYTES {
            return;
        }
        self.taken_bytes += len_bytes;
        if self.taken_bytes < self.asked_bytes / PART {
            return;
        }
        let now = Instant::now();
        let is_quick = self.since.replace(now).is_none_or(|since| now - since <= PACE);
        self.taken_bytes = 0;
        if is_quick {
            self.asked_bytes *= 2;
            if let Err(error) = enlarge(fd, self.asked_bytes) {
                tracing::debug!(%error, "cannot enlarge a receive window");
                self.asked_bytes = LARGEST_BYTES;
            }
        }
    }
}

/// Room for `bytes` in the queue of `fd`; then any byte wakes again.
fn enlarge(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    sys::set_low_water(fd, bytes)?;
    sys::set_low_water(fd, 1)
}
