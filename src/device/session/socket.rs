//! How a front-end is met: the socket bound, connected or inherited.
//!
//! A bound socket is created with mode 0600 whatever the umask (its mode is set before it has a
//! name). What lies at its path already is replaced only if it is a socket that nobody listens on;
//! a lock on the directory keeps two processes from replacing each other's. At the end the file is
//! removed if it is still ours.
//!
//! May touch: the file system at the socket's path. Read first: `unix(7)`.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

use super::message::Ended;
use crate::config::Attach;
use crate::device::sys::{self, Interest};

/// Front-ends waiting while one is attached. One at a time is served.
const BACKLOG: i32 = 4;
/// First and longest wait between attempts to connect.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// Wait after `accept` failed for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);
/// How long to wait for the directory's lock, and how often to try.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why no front-end can be met.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error("--socket-path {0}: another process is listening on it; end it or use another path")]
    InUse(PathBuf),
    /// Something that is no socket lies there.
    #[error("--socket-path {0}: the path exists and is not a socket; remove it or use another path")]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("--socket-path {path}: cannot {what}")]
    Bind {
        /// The path asked for.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The inherited descriptor is no unix stream socket.
    #[error("--fd {0}: not a connected or listening unix stream socket")]
    Inherited(RawFd, #[source] Option<io::Error>),
}

/// Where front-ends come from.
#[derive(Debug)]
pub(super) enum Source {
    /// They connect to us. A socket file of ours is removed with the source.
    Listener { listener: UnixListener, _bound: Option<BoundPath> },
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
                let (listener, bound) = bind(&path)?;
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

/// Connects without ever blocking on a listener whose backlog is full.
fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
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

/// A socket file of ours.
#[derive(Debug)]
pub(super) struct BoundPath {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        let still_ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id);
        if still_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket file");
        }
    }
}

fn bind(path: &Path) -> Result<(UnixListener, BoundPath), SocketError> {
    let fail = |what| move |source| SocketError::Bind { path: path.to_owned(), what, source };
    let _lock = lock_directory(path).map_err(fail("open its directory"))?;
    clear_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(fail("make a socket"))?;
    // The name takes its mode from the socket's own inode, so it is never open to others.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(0o600)).map_err(fail("set its mode"))?;
    let socket = Socket::from(OwnedFd::from(file));
    let address = SockAddr::unix(path).map_err(fail("use it as an address"))?;
    socket.bind(&address).map_err(fail("bind it"))?;
    let meta = fs::symlink_metadata(path).map_err(fail("stat it"))?;
    let bound = BoundPath { path: path.to_owned(), id: (meta.dev(), meta.ino()) };
    socket.listen(BACKLOG).map_err(fail("listen on it"))?;
    socket.set_nonblocking(true).map_err(fail("listen on it"))?;
    Ok((OwnedFd::from(socket).into(), bound))
}

/// Holds off other processes that bind in the same directory. One that does not let go in time is
/// not ours, and is not waited for.
fn lock_directory(path: &Path) -> io::Result<File> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory)?;
    for _ in 0..LOCK_TRIES {
        if sys::try_lock(&directory) {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Ok(directory)
}

/// Removes the socket of a process that is gone.
fn clear_stale(path: &Path) -> Result<(), SocketError> {
    let fail = |what| move |source| SocketError::Bind { path: path.to_owned(), what, source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail("stat it")(e)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match try_connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that is gone");
            fs::remove_file(path).map_err(fail("remove the stale socket"))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(fail("reach the socket there")(e)),
        // Connected, or its backlog is full: someone lives there.
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_created_for_its_owner_only_and_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, bound) = bind(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (_listener, _bound) = bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse(p)) if p == path));
    }

    #[test]
    fn file_that_is_no_socket_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "x").unwrap();
        assert!(matches!(bind(&path), Err(SocketError::NotASocket(_))));
        assert!(path.exists());
    }

    #[test]
    fn socket_file_of_another_process_is_left_alone_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, bound) = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(bound);
        assert!(path.exists());
    }

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
