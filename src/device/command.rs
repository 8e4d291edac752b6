//! Between session and worker: commands one way, acknowledgements the other.
//!
//! The session thread never touches a ring. It sends a command, signals an eventfd and waits; the
//! worker handles commands between batches and never waits for the session. What the worker has to
//! say unasked (guest memory was lost) is a flag and an eventfd the session polls.
//!
//! May touch: the two channels. Read first: `session`, `queues`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::features::Features;
use super::guest_mem::AreaError;
use super::ring::{RingAddrs, SharedMemory};
use super::sys::Notifier;
use super::tx::Enabled;

/// Everything a ring needs to start.
#[derive(Debug)]
pub(super) struct RingStart {
    pub(super) index: u16,
    pub(super) size: u16,
    pub(super) addrs: RingAddrs,
    /// `None`: the front-end kicks with nothing and expects to be polled.
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<Notifier>,
    pub(super) err: Option<Notifier>,
    pub(super) enabled: Enabled,
}

/// What the session asks of the worker.
#[derive(Debug)]
pub(super) enum Command {
    /// A front-end connected.
    Attached,
    /// It is gone: stop everything, forget its memory and descriptors.
    Detached,
    /// The features that count from now on.
    Features(Features),
    /// The guest's memory from now on.
    Memory(SharedMemory),
    /// The guest's IP MTU in bytes from now on.
    IpMtu(u16),
    /// Start a ring, stopping it first if it runs.
    Start(Box<RingStart>),
    /// Stop a ring; answered with where it stands.
    Stop(u16),
    /// Enable or disable a ring.
    Enable(u16, Enabled),
    /// Replace a running ring's kick descriptor.
    Kick(u16, Option<OwnedFd>),
    /// Replace a running ring's call descriptor.
    Call(u16, Option<Notifier>),
    /// Replace a running ring's error descriptor.
    Err(u16, Option<Notifier>),
}

/// The worker's acknowledgement.
#[derive(Debug)]
pub(super) enum Reply {
    /// Done.
    Done,
    /// The ring stands here: the next available entry, equal to the used index.
    At(u16),
    /// The ring could not be started.
    NotStarted(StartError),
}

/// Why a ring did not start.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error(transparent)]
    Area(#[from] AreaError),
    #[error("the kick descriptor cannot be waited for")]
    Kick(#[source] io::Error),
}

/// What both sides share.
#[derive(Debug)]
pub(super) struct Shared {
    command_event: EventFd,
    notice_event: EventFd,
    memory_lost: AtomicBool,
}

impl Shared {
    /// Has the worker handle commands although none may wait.
    pub(super) fn wake_worker(&self) {
        // The write can only fail because the counter is full, and then the worker is awake anyway.
        let _ = self.command_event.write(1);
    }

    /// Tells the session that guest memory was lost.
    pub(super) fn tell_memory_lost(&self) {
        if !self.memory_lost.swap(true, Ordering::AcqRel) {
            let _ = self.notice_event.write(1);
        }
    }

    /// Takes the worker's notice: whether guest memory was lost since the last call.
    pub(super) fn take_memory_lost(&self) -> bool {
        let _ = self.notice_event.read();
        self.memory_lost.swap(false, Ordering::AcqRel)
    }

    /// Readable when a notice waits.
    pub(super) fn notice_fd(&self) -> RawFd {
        self.notice_event.as_raw_fd()
    }
}

/// The session's end.
#[derive(Debug)]
pub(super) struct CommandSender {
    commands: Sender<Command>,
    pub(super) replies: Receiver<Reply>,
    pub(super) shared: Arc<Shared>,
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct CommandReceiver {
    commands: Receiver<Command>,
    replies: Sender<Reply>,
    pub(super) shared: Arc<Shared>,
}

/// The worker is gone.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the worker has ended")]
pub(super) struct WorkerGone;

impl CommandSender {
    /// Sends a command; its reply is the next one received.
    pub(super) fn send(&self, command: Command) -> Result<(), WorkerGone> {
        self.commands.send(command).map_err(|_| WorkerGone)?;
        self.shared.wake_worker();
        Ok(())
    }
}

impl CommandReceiver {
    /// Readable when commands wait.
    pub(super) fn fd(&self) -> RawFd {
        self.shared.command_event.as_raw_fd()
    }

    /// The next command waiting.
    pub(super) fn next(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Acknowledges; a session that is gone needs no answer.
    pub(super) fn reply(&self, reply: Reply) {
        let _ = self.replies.send(reply);
    }

    /// Clears the event; commands sent from now on set it again.
    pub(super) fn clear_event(&self) {
        let _ = self.shared.command_event.read();
    }
}

/// Both ends of a fresh pair of channels.
///
/// # Errors
/// No descriptor for the eventfds.
pub(super) fn channels() -> io::Result<(CommandSender, CommandReceiver)> {
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    let shared = Arc::new(Shared {
        command_event: event()?,
        notice_event: event()?,
        memory_lost: AtomicBool::new(false),
    });
    let (commands, command_queue) = channel();
    let (replies, reply_queue) = channel();
    Ok((
        CommandSender { commands, replies: reply_queue, shared: Arc::clone(&shared) },
        CommandReceiver { commands: command_queue, replies, shared },
    ))
}
