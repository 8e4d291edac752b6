//! How a front-end is met: the socket bound, connected or inherited.
//!
//! May touch: `socket_file`. Read first: `unix(7)`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, Socket, Type};
use thiserror::Error;

use super::message::Ended;
use crate::config::Attach;
use crate::device::sys::{self, Interest};
use crate::socket_file::{self, AskedPath, SocketFile, SocketFileError, try_connect};

/// Front-ends waiting while one is attached. One at a time is served.
const BACKLOG: i32 = 4;
/// First and longest wait between attempts to connect.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// Wait after `accept` failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// Why no front-end can be met.
#[derive(Debug, Error)]
pub enum SocketError {
    /// There is no socket at `--socket-path`.
    #[error(transparent)]
    File(#[from] SocketFileError),
    /// The inherited descriptor is no unix stream socket.
    #[error(
        "descriptor {0} (of --fd, or of a service manager's LISTEN_FDS): not a connected or listening unix stream socket"
    )]
    Inherited(RawFd, #[source] Option<io::Error>),
}

/// Where front-ends come from.
#[derive(Debug)]
pub(super) enum Source {
    /// They connect to us. A socket file of ours is removed with the source.
    Listener { listener: UnixListener, _bound: Option<SocketFile> },
    /// We connect to them.
    Client(PathBuf),
    /// One is there already, and there will be no other.
    Connected(Option<UnixStream>),
}

impl Source {
    /// Prepares what `attach` says.
    pub(super) fn open(attach: Attach) -> Result<Source, SocketError> {
        match attach {
            Attach::Listen(path) => {
                let (listener, bound) =
                    socket_file::bind(AskedPath { flag: "--socket-path", path: &path }, BACKLOG)?;
                tracing::info!(path = %path.display(), "listening for a front-end");
                Ok(Source::Listener { listener, _bound: Some(bound) })
            }
            Attach::Connect(path) => {
                tracing::info!(path = %path.display(), "connecting to the front-end");
                Ok(Source::Client(path))
            }
            Attach::Inherited(fd) => inherited(fd),
        }
    }

    /// Whether another front-end may come after this one.
    pub(super) fn is_repeatable(&self) -> bool {
        !matches!(self, Source::Connected(_))
    }

    /// Rests after a front-end that said nothing, so that one which lets us connect only to hang up
    /// does not keep us busy.
    pub(super) fn rest(&self, shutdown: RawFd) -> Result<(), Ended> {
        match self {
            Source::Client(_) => pause(shutdown, RETRY_LONGEST),
            Source::Listener { .. } | Source::Connected(_) => Ok(()),
        }
    }

    /// Waits for the next front-end; `None` if there will be none.
    pub(super) fn next(&mut self, shutdown: RawFd) -> Result<Option<UnixStream>, Ended> {
        match self {
            Source::Listener { listener, .. } => accept(listener, shutdown).map(Some),
            Source::Client(path) => connect(path, shutdown).map(Some),
            Source::Connected(stream) => Ok(stream.take()),
        }
    }
}

fn accept(listener: &UnixListener, shutdown: RawFd) -> Result<UnixStream, Ended> {
    let mut told = false;
    loop {
        match sys::wait([(listener.as_raw_fd(), Interest::Read), (shutdown, Interest::Read)], None)? {
            [_, true] => return Err(Ended::Shutdown),
            [true, _] => {}
            _ => continue,
        }
        match listener.accept() {
            Ok((stream, _)) => return Ok(stream),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%error, "cannot accept a front-end; trying again");
                }
                pause(shutdown, ACCEPT_RETRY)?;
            }
        }
    }
}

fn connect(path: &Path, shutdown: RawFd) -> Result<UnixStream, Ended> {
    let mut wait = RETRY_FIRST;
    let mut told = false;
    loop {
        match try_connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::info!(path = %path.display(), %error, "no front-end there yet; trying again");
            }
            Err(_) => {}
        }
        pause(shutdown, wait)?;
        wait = (wait * 2).min(RETRY_LONGEST);
    }
}

fn pause(shutdown: RawFd, time: Duration) -> Result<(), Ended> {
    match sys::wait([(shutdown, Interest::Read)], Some(time))? {
        [true] => Err(Ended::Shutdown),
        [false] => Ok(()),
    }
}

fn inherited(fd: OwnedFd) -> Result<Source, SocketError> {
    let number = fd.as_raw_fd();
    let fail = |error| SocketError::Inherited(number, error);
    let socket = Socket::from(fd);
    let domain = socket.domain().map_err(|e| fail(Some(e)))?;
    let kind = socket.r#type().map_err(|e| fail(Some(e)))?;
    if domain != Domain::UNIX || kind != Type::STREAM {
        return Err(fail(None));
    }
    if socket.is_listener().map_err(|e| fail(Some(e)))? {
        socket.set_nonblocking(true).map_err(|e| fail(Some(e)))?;
        tracing::info!(fd = number, "listening for a front-end on an inherited socket");
        return Ok(Source::Listener { listener: OwnedFd::from(socket).into(), _bound: None });
    }
    socket.peer_addr().map_err(|e| fail(Some(e)))?;
    Ok(Source::Connected(Some(OwnedFd::from(socket).into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn inherited_descriptor_that_is_no_unix_stream_socket_is_refused() {
        let null: OwnedFd = File::open("/dev/null").unwrap().into();
        assert!(matches!(inherited(null), Err(SocketError::Inherited(_, Some(_)))));
        let udp: OwnedFd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        assert!(matches!(inherited(udp), Err(SocketError::Inherited(_, None))));
        let (one, _other) = UnixStream::pair().unwrap();
        assert!(matches!(inherited(one.into()), Ok(Source::Connected(Some(_)))));
    }
}
