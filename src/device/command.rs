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

impl Command {
    /// The ring a command is about; `None` for what concerns every worker.
    pub(super) fn ring(&self) -> Option<u16> {
        match self {
            Command::Attached
            | Command::Detached
            | Command::Features(_)
            | Command::Memory(_)
            | Command::IpMtu(_) => None,
            Command::Start(start) => Some(start.index),
            Command::Stop(index)
            | Command::Enable(index, _)
            | Command::Kick(index, _)
            | Command::Call(index, _)
            | Command::Err(index, _) => Some(*index),
        }
    }

    /// The same command for another worker, of those that concern every one.
    pub(super) fn for_another(&self) -> Option<Command> {
        match self {
            Command::Attached => Some(Command::Attached),
            Command::Detached => Some(Command::Detached),
            Command::Features(features) => Some(Command::Features(*features)),
            Command::Memory(memory) => Some(Command::Memory(Arc::clone(memory))),
            Command::IpMtu(bytes) => Some(Command::IpMtu(*bytes)),
            _ => None,
        }
    }
}

/// What the workers tell the session unasked.
#[derive(Debug)]
pub(super) struct Notice {
    event: EventFd,
    memory_lost: AtomicBool,
}

impl Notice {
    /// Takes the notice: whether guest memory was lost since the last call.
    pub(super) fn take_memory_lost(&self) -> bool {
        let _ = self.event.read();
        self.memory_lost.swap(false, Ordering::AcqRel)
    }

    /// Readable when a notice waits.
    pub(super) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// What both sides share.
#[derive(Debug)]
pub(super) struct Shared {
    command_event: EventFd,
    notice: Arc<Notice>,
}

impl Shared {
    /// Has the worker handle commands although none may wait.
    pub(super) fn wake_worker(&self) {
        // The write can only fail because the counter is full, and then the worker is awake anyway.
        let _ = self.command_event.write(1);
    }

    /// Tells the session that guest memory was lost.
    pub(super) fn tell_memory_lost(&self) {
        if !self.notice.memory_lost.swap(true, Ordering::AcqRel) {
            let _ = self.notice.event.write(1);
        }
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

/// The session's ends and the workers' ends of fresh channels, and the workers' common notice.
pub(super) type Channels = (Vec<CommandSender>, Vec<CommandReceiver>, Arc<Notice>);

/// Makes the channels to `workers` workers.
///
/// # Errors
/// No descriptor for the eventfds.
pub(super) fn channels(workers: usize) -> io::Result<Channels> {
    let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
    let notice = Arc::new(Notice { event: event()?, memory_lost: AtomicBool::new(false) });
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..workers {
        let shared = Arc::new(Shared { command_event: event()?, notice: Arc::clone(&notice) });
        let (commands, command_queue) = channel();
        let (replies, reply_queue) = channel();
        senders.push(CommandSender { commands, replies: reply_queue, shared: Arc::clone(&shared) });
        receivers.push(CommandReceiver { commands: command_queue, replies, shared });
    }
    Ok((senders, receivers, notice))
}
