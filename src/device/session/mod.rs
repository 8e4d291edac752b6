//! The vhost-user session: the device's control side.
//!
//! One thread serves one front-end after another. It blocks only in `poll`, and always wakes up for
//! shutdown. `socket` finds front-ends, `message` frames what they send, `request` judges it, and
//! `connection` carries it out, through `link` wherever rings are concerned.
//!
//! May touch: the socket, the worker through its command channel. Read first: the vhost-user
//! specification.

mod connection;
mod inflight;
mod link;
mod message;
mod request;
mod socket;
mod vring;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use socket::SocketError;

use super::DeviceConfig;
use super::command::{Command, CommandSender};
use crate::config::Attach;
use connection::Connection;
use link::Link;
use message::{Channel, Ended};
use socket::Source;

/// Why there is no session, or no more.
#[derive(Debug, Error)]
pub enum SessionError {
    /// No front-end can be met.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The session's thread could not be started.
    #[error("cannot start the session's thread")]
    Thread(#[source] io::Error),
    /// The worker ended before the session.
    #[error("the worker has ended")]
    WorkerGone,
    /// Waiting for a front-end failed.
    #[error("cannot wait for a front-end")]
    Wait(#[source] io::Error),
}

/// The session before it runs.
#[derive(Debug)]
pub struct SessionSide {
    config: DeviceConfig,
    sender: CommandSender,
}

impl SessionSide {
    pub(super) fn new(config: DeviceConfig, sender: CommandSender) -> SessionSide {
        SessionSide { config, sender }
    }

    /// Prepares the socket and runs the session on a thread of its own, until `shutdown` becomes
    /// readable (it is not read), or the first front-end has left and nothing else can come: with
    /// `one_off`, or on an inherited connected socket.
    ///
    /// # Errors
    /// [`SessionError`] if the socket or the thread cannot be had. The thread returns it if it had
    /// to end early.
    pub fn spawn(
        self,
        attach: Attach,
        shutdown: EventFd,
    ) -> Result<JoinHandle<Result<(), SessionError>>, SessionError> {
        let source = Source::open(attach)?;
        thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || self.run(source, &shutdown))
            .map_err(SessionError::Thread)
    }

    fn run(self, mut source: Source, shutdown: &EventFd) -> Result<(), SessionError> {
        let mut link = Link::new(self.sender, shutdown.as_raw_fd());
        loop {
            let stream = match source.next(shutdown.as_raw_fd()) {
                Ok(Some(stream)) => stream,
                Ok(None) | Err(Ended::Shutdown) => return Ok(()),
                Err(Ended::Io(error)) => return Err(SessionError::Wait(error)),
                Err(_) => return Err(SessionError::WorkerGone),
            };
            let served = serve(stream, &mut link, &self.config, shutdown);
            match served.ended {
                Ended::Shutdown => return Ok(()),
                Ended::Worker(_) => return Err(SessionError::WorkerGone),
                _ => {}
            }
            // A connection that never spoke was someone looking whether the socket is alive.
            if served.spoke && self.config.one_off || !source.is_repeatable() {
                return Ok(());
            }
            if !served.spoke && source.rest(shutdown.as_raw_fd()).is_err() {
                return Ok(());
            }
        }
    }
}

/// How serving a front-end went.
struct Served {
    ended: Ended,
    spoke: bool,
}

/// Serves one front-end and cleans up after it.
fn serve(stream: UnixStream, link: &mut Link, config: &DeviceConfig, shutdown: &EventFd) -> Served {
    link.clear_notice();
    let channel = match Channel::new(stream, shutdown.as_raw_fd(), link.notice_fd()) {
        Ok(channel) => channel,
        Err(error) => return Served { ended: error.into(), spoke: false },
    };
    let mut connection = Connection::new(channel, link, config);
    let ended = connection.serve();
    let spoke = connection.spoke();
    drop(connection);
    let ended = if !spoke {
        ended
    } else if matches!(ended, Ended::Shutdown | Ended::Worker(_)) {
        link.tell(Command::Detached);
        ended
    } else {
        link.call(Command::Detached).err().unwrap_or(ended)
    };
    match &ended {
        Ended::Left if !spoke => tracing::debug!("a connection said nothing and closed"),
        Ended::Left | Ended::Shutdown => tracing::info!("front-end detached"),
        reason => tracing::warn!(%reason, "front-end detached"),
    }
    Served { ended, spoke }
}
