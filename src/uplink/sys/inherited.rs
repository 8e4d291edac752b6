//! A socket handed down by the parent process (`--fd N`).

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use socket2::{SockRef, Type};
use thiserror::Error;

/// Why an inherited descriptor cannot be used.
#[derive(Debug, Error)]
pub enum InheritedError {
    /// 0, 1 and 2 are the standard streams, negative numbers nothing at all.
    #[error("descriptors below 3 are the standard streams")]
    Reserved,
    /// The parent passed no such descriptor.
    #[error("no such descriptor is open in this process")]
    NotOpen,
    /// It is open, but not a unix stream socket.
    #[error("the descriptor is not a unix stream socket")]
    NotUnixStream,
    /// The kernel refused to mark it close-on-exec.
    #[error("cannot mark the descriptor close-on-exec")]
    CloseOnExec(#[source] io::Error),
}

/// Takes ownership of the unix stream socket that the parent passed as descriptor `fd`, listening or
/// connected. To be called at start, once per number, before the process opens files of its own.
///
/// # Errors
/// [`InheritedError`] if the number is reserved, not open or not such a socket.
pub fn unix_stream(fd: RawFd) -> Result<OwnedFd, InheritedError> {
    examine(fd)?;
    // SAFETY: the descriptor is open (checked above) and the caller keeps that nothing else in this
    // process owns it: it came from the parent and is taken once, before anything else is opened.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    SockRef::from(&fd).set_cloexec(true).map_err(InheritedError::CloseOnExec)?;
    Ok(fd)
}

/// Whether descriptor `fd` is such a socket. It is neither taken nor changed.
///
/// # Errors
/// As [`unix_stream`].
pub fn examine(fd: RawFd) -> Result<(), InheritedError> {
    if fd <= libc::STDERR_FILENO {
        return Err(InheritedError::Reserved);
    }
    // SAFETY: `F_GETFD` only reads a descriptor's flags; a number that is not open yields EBADF.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
        return Err(InheritedError::NotOpen);
    }
    // SAFETY: the descriptor is open (checked above), and nothing closes it before this returns: it came from the
    // parent, and nobody else in this process knows of it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let socket = SockRef::from(&fd);
    let is_unix = socket.local_addr().is_ok_and(|addr| addr.is_unix());
    if !is_unix || !socket.r#type().is_ok_and(|kind| kind == Type::STREAM) {
        return Err(InheritedError::NotUnixStream);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::UdpSocket;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connected_and_listening_unix_sockets_are_taken() {
        let (ours, _peer) = UnixStream::pair().unwrap();
        let number = ours.into_raw_fd();
        assert!(examine(number).is_ok(), "it stays open");
        assert_eq!(unix_stream(number).unwrap().as_raw_fd(), number);

        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(unix_stream(listener.into_raw_fd()).is_ok());
    }

    #[test]
    fn anything_else_is_refused_with_its_reason() {
        for number in [-1, 0, 1, 2] {
            assert!(matches!(unix_stream(number), Err(InheritedError::Reserved)), "{number}");
        }
        assert!(matches!(unix_stream(1_000_000), Err(InheritedError::NotOpen)));
        let file = File::open("/dev/null").unwrap().into_raw_fd();
        assert!(matches!(unix_stream(file), Err(InheritedError::NotUnixStream)));
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap().into_raw_fd();
        assert!(matches!(unix_stream(udp), Err(InheritedError::NotUnixStream)));
        let datagram = UnixDatagram::unbound().unwrap().into_raw_fd();
        assert!(matches!(unix_stream(datagram), Err(InheritedError::NotUnixStream)));
    }
}
