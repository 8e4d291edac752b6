//! The session's way to the worker: a command, then its acknowledgement.
//!
//! The worker answers between two batches, at once by human measure. While waiting the session
//! still notices shutdown, because the worker may have left its loop already.
//!
//! May touch: the command channel.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use super::message::Ended;
use crate::device::command::{Command, CommandSender, Notice, Reply, WorkerGone};
use crate::device::sys::{self, Interest};

/// How often a waiting session looks for shutdown.
const SHUTDOWN_CHECK: Duration = Duration::from_millis(20);

/// One worker, as the session sees it.
#[derive(Debug)]
struct Line {
    sender: CommandSender,
    /// Replies still to come to commands whose wait was given up.
    unanswered: usize,
}

/// The workers, as the session sees them: pair `n` is at worker `n` modulo their number.
#[derive(Debug)]
pub(super) struct Link {
    lines: Vec<Line>,
    notice: Arc<Notice>,
    shutdown: RawFd,
}

impl Link {
    pub(super) fn new(senders: Vec<CommandSender>, notice: Arc<Notice>, shutdown: RawFd) -> Link {
        assert!(!senders.is_empty(), "a device has at least one worker");
        let lines = senders.into_iter().map(|sender| Line { sender, unanswered: 0 }).collect();
        Link { lines, notice, shutdown }
    }

    /// Readable when a worker has a notice.
    pub(super) fn notice_fd(&self) -> RawFd {
        self.notice.fd()
    }

    /// Takes the workers' notice: whether guest memory was lost since the last call.
    pub(super) fn take_memory_lost(&self) -> bool {
        self.notice.take_memory_lost()
    }

    /// Has the worker that owns the ring carry out `command`, or every worker one after the other;
    /// returns the last one's reply.
    pub(super) fn call(&mut self, command: Command) -> Result<Reply, Ended> {
        if let Some(ring) = command.ring() {
            let at = usize::from(ring) / 2 % self.lines.len();
            return self.call_one(at, command);
        }
        for at in 1..self.lines.len() {
            if let Some(same) = command.for_another() {
                self.call_one(at, same)?;
            }
        }
        self.call_one(0, command)
    }

    fn call_one(&mut self, at: usize, command: Command) -> Result<Reply, Ended> {
        if self.lines[at].sender.send(command).is_err() {
            return Err(self.worker_gone());
        }
        self.lines[at].unanswered += 1;
        loop {
            let line = &mut self.lines[at];
            match line.sender.replies.recv_timeout(SHUTDOWN_CHECK) {
                Ok(reply) => {
                    line.unanswered -= 1;
                    if line.unanswered == 0 {
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

    /// Tells every worker that the front-end is gone, without waiting: the process is ending.
    pub(super) fn tell_detached(&mut self) {
        for line in &mut self.lines {
            if line.sender.send(Command::Detached).is_ok() {
                line.unanswered += 1;
            }
        }
    }
}
