//! The session's way to the worker: a command, then its acknowledgement.
//!
//! The worker answers between two batches, at once by human measure. While waiting the session
//! still notices shutdown, because the worker may have left its loop already.
//!
//! May touch: the command channel.

use std::os::fd::RawFd;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::message::Ended;
use crate::device::command::{Command, CommandSender, Reply, WorkerGone};
use crate::device::sys::{self, Interest};

/// How often a waiting session looks for shutdown.
const SHUTDOWN_CHECK: Duration = Duration::from_millis(20);

/// The worker, as the session sees it.
#[derive(Debug)]
pub(super) struct Link {
    sender: CommandSender,
    shutdown: RawFd,
    /// Replies still to come to commands whose wait was given up.
    unanswered: usize,
}

impl Link {
    pub(super) fn new(sender: CommandSender, shutdown: RawFd) -> Link {
        Link { sender, shutdown, unanswered: 0 }
    }

    /// Readable when the worker has a notice.
    pub(super) fn notice_fd(&self) -> RawFd {
        self.sender.shared.notice_fd()
    }

    /// Forgets a notice about memory that is gone anyway.
    pub(super) fn clear_notice(&self) {
        self.sender.shared.take_memory_lost();
    }

    /// Has the worker carry out `command`.
    pub(super) fn call(&mut self, command: Command) -> Result<Reply, Ended> {
        if self.sender.send(command).is_err() {
            return Err(self.worker_gone());
        }
        self.unanswered += 1;
        loop {
            match self.sender.replies.recv_timeout(SHUTDOWN_CHECK) {
                Ok(reply) => {
                    self.unanswered -= 1;
                    if self.unanswered == 0 {
                        return Ok(reply);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.worker_gone()),
                Err(RecvTimeoutError::Timeout) if self.is_shutdown() => return Err(Ended::Shutdown),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Why there is no worker: on shutdown it may be the first to leave.
    fn worker_gone(&self) -> Ended {
        if self.is_shutdown() { Ended::Shutdown } else { WorkerGone.into() }
    }

    fn is_shutdown(&self) -> bool {
        matches!(sys::wait([(self.shutdown, Interest::Read)], Some(Duration::ZERO)), Ok([true]))
    }

    /// Has the worker carry out `command` without waiting for it: the process is ending.
    pub(super) fn tell(&mut self, command: Command) {
        if self.sender.send(command).is_ok() {
            self.unanswered += 1;
        }
    }
}
