//! A unix socket with a file of our own: the front-end's and the control API's.
//!
//! It is created with mode 0600 whatever the umask (its mode is set before it has a name). What lies at its
//! path already is replaced only if it is a socket that nobody listens on; a lock on the directory keeps two
//! processes from replacing each other's. At the end the file is removed if it is still ours.
//!
//! May touch: the file system at the socket's path. Read first: `unix(7)`.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};
use thiserror::Error;

/// How long to wait for the directory's lock, and how often to try.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why there is no socket at a path.
#[derive(Debug, Error)]
pub enum SocketFileError {
    /// Another process listens there.
    #[error("{flag} {path}: another process is listening on it; end it or use another path", path = path.display())]
    InUse {
        /// What asked for it.
        flag: &'static str,
        /// The path asked for.
        path: PathBuf,
    },
    /// Something that is no socket lies there.
    #[error("{flag} {path}: the path exists and is not a socket; remove it or use another path", path = path.display())]
    NotASocket {
        /// What asked for it.
        flag: &'static str,
        /// The path asked for.
        path: PathBuf,
    },
    /// The socket could not be made.
    #[error("{flag} {path}: cannot {what}", path = path.display())]
    Bind {
        /// What asked for it.
        flag: &'static str,
        /// The path asked for.
        path: PathBuf,
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A path as `flag` of the command line gave it.
#[derive(Clone, Copy, Debug)]
pub struct AskedPath<'a> {
    /// The flag, for messages.
    pub flag: &'static str,
    /// Its value.
    pub path: &'a Path,
}

impl AskedPath<'_> {
    fn fail(self, what: &'static str) -> impl FnOnce(io::Error) -> SocketFileError {
        let path = self.path.to_owned();
        move |source| SocketFileError::Bind { flag: self.flag, path, what, source }
    }
}

/// A socket's file of ours, removed with this.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let still_ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.id);
        if still_ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket file");
        }
    }
}

/// Listens at a path, without blocking; `backlog` clients may wait.
///
/// # Errors
/// [`SocketFileError`].
pub fn bind(at: AskedPath<'_>, backlog: i32) -> Result<(UnixListener, SocketFile), SocketFileError> {
    let path = at.path;
    let _lock = lock_directory(path).map_err(at.fail("open its directory"))?;
    clear_stale(at)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(at.fail("make a socket"))?;
    // The name takes its mode from the socket's own inode, so it is never open to others.
    let file = File::from(OwnedFd::from(socket));
    file.set_permissions(Permissions::from_mode(0o600)).map_err(at.fail("set its mode"))?;
    let socket = Socket::from(OwnedFd::from(file));
    let address = SockAddr::unix(path).map_err(at.fail("use it as an address"))?;
    socket.bind(&address).map_err(at.fail("bind it"))?;
    let meta = fs::symlink_metadata(path).map_err(at.fail("stat it"))?;
    let bound = SocketFile { path: path.to_owned(), id: (meta.dev(), meta.ino()) };
    socket.listen(backlog).map_err(at.fail("listen on it"))?;
    socket.set_nonblocking(true).map_err(at.fail("listen on it"))?;
    Ok((OwnedFd::from(socket).into(), bound))
}

/// Connects without ever blocking on a listener whose backlog is full.
///
/// # Errors
/// The kernel's refusal.
pub fn try_connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
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
        if directory.try_lock().is_ok() {
            break;
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Ok(directory)
}

/// Removes the socket of a process that is gone.
fn clear_stale(at: AskedPath<'_>) -> Result<(), SocketFileError> {
    let AskedPath { flag, path } = at;
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(at.fail("stat it")(e)),
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(SocketFileError::NotASocket { flag, path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match try_connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the socket of a process that is gone");
            fs::remove_file(path).map_err(at.fail("remove the stale socket"))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(at.fail("reach the socket there")(e)),
        // Connected, or its backlog is full: someone lives there.
        _ => Err(SocketFileError::InUse { flag, path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(path: &Path) -> Result<(UnixListener, SocketFile), SocketFileError> {
        super::bind(AskedPath { flag: "--socket-path", path }, 4)
    }

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
        assert!(matches!(bind(&path), Err(SocketFileError::InUse { path: p, .. }) if p == path));
    }

    #[test]
    fn file_that_is_no_socket_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "x").unwrap();
        assert!(matches!(bind(&path), Err(SocketFileError::NotASocket { .. })));
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
}
