//! What the device asks of the kernel: waiting, notification descriptors, descriptor passing.
//!
//! Descriptors that come from the front-end may be anything: a blocking eventfd, a pipe, a socket, a
//! file. Nothing here blocks on one of them, and none of their flags is changed, because the
//! front-end shares them. Linux only.
//!
//! May touch: descriptors handed to it. Read first: `eventfd(2)`, `preadv2(2)`, `unix(7)`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::limits::MESSAGE_FDS_MAX;

/// What to wait for on a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// Bytes, a connection, or the end.
    Read,
    /// Room for bytes.
    Write,
}

/// Waits until one of `fds` is ready (or has failed) or `timeout` has passed, and says which are.
/// A signal counts as a time-out.
///
/// # Errors
/// `poll(2)`'s.
pub(super) fn wait<const N: usize>(
    fds: [(RawFd, Interest); N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|(fd, interest)| libc::pollfd {
        fd,
        events: match interest {
            Interest::Read => libc::POLLIN,
            Interest::Write => libc::POLLOUT,
        },
        revents: 0,
    });
    let timeout_ms = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: `polled` is an array of N valid entries that outlives the call.
    let count = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout_ms) };
    if count < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|p| p.revents != 0))
}

/// The front-end's descriptor to be written when buffers were used (`call`) or a ring failed
/// (`err`). Shared by the session, which keeps it over ring restarts, and the ring.
#[derive(Clone, Debug)]
pub(super) struct Notifier {
    fd: Arc<OwnedFd>,
    may_block: bool,
}

impl Notifier {
    /// Takes the descriptor as it is.
    pub(super) fn new(fd: OwnedFd) -> Notifier {
        // SAFETY: reading the flags of an owned descriptor has no preconditions.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        Notifier { fd: Arc::new(fd), may_block: flags < 0 || flags & libc::O_NONBLOCK == 0 }
    }

    /// Notifies without blocking; a full counter or pipe means that a notification is waiting
    /// already. A blocking descriptor is asked for room first: only a front-end that fills it in
    /// between could hold its own worker.
    ///
    /// # Errors
    /// The descriptor cannot be written.
    pub(super) fn notify(&self) -> io::Result<()> {
        if self.may_block && !has_room(&self.fd)? {
            return Ok(());
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is eight readable bytes, the descriptor is owned and open.
        let written = unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if written >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
            _ => Err(error),
        }
    }
}

fn has_room(fd: &OwnedFd) -> io::Result<bool> {
    let [ready] = wait([(fd.as_raw_fd(), Interest::Write)], Some(Duration::ZERO))?;
    Ok(ready)
}

/// What reading a kick descriptor said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KickRead {
    /// At least one kick was waiting; it is consumed.
    Kicked,
    /// None was.
    Nothing,
    /// The descriptor will never tell of a kick again.
    Dead,
}

/// Consumes waiting kicks without blocking, whatever kind of descriptor `fd` is.
pub(super) fn read_kick(fd: &OwnedFd) -> KickRead {
    let mut bytes = [0u8; 64];
    let vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: `vector` describes `bytes`, which outlives the call; offset -1 reads like `readv`.
    let read = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const vector, 1, -1, libc::RWF_NOWAIT) };
    match judge_read(read) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Ok(outcome) => return outcome,
        Err(_) => return KickRead::Dead,
    }
    match wait([(fd.as_raw_fd(), Interest::Read)], Some(Duration::ZERO)) {
        Ok([true]) => {}
        Ok([false]) => return KickRead::Nothing,
        Err(_) => return KickRead::Dead,
    }
    // SAFETY: `bytes` is writable for its length.
    let read = unsafe { libc::read(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    judge_read(read).unwrap_or(KickRead::Dead)
}

fn judge_read(read: isize) -> io::Result<KickRead> {
    match read {
        0 => Ok(KickRead::Dead),
        1.. => Ok(KickRead::Kicked),
        _ => {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(KickRead::Nothing),
                _ => Err(error),
            }
        }
    }
}

/// Receives bytes into `buffer` and appends the descriptors that came with them to `fds`. Returns
/// the bytes received, zero at the end of the stream.
///
/// # Errors
/// The socket's; `ENOBUFS` if descriptors were lost (the process has none left), after which the
/// stream is not to be trusted.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut vectors = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    let mut raw: [RawFd; MESSAGE_FDS_MAX] = [-1; MESSAGE_FDS_MAX];
    // SAFETY: the one vector describes `buffer`, which is writable and outlives the call.
    let (bytes, count) = unsafe { stream.recv_with_fds(&mut vectors, &mut raw) }?;
    for fd in &raw[..count] {
        // SAFETY: the kernel just made this descriptor for us and nothing else knows it.
        fds.push(unsafe { OwnedFd::from_raw_fd(*fd) });
    }
    Ok(bytes)
}

/// Memory shared by descriptor, zeroed, `size_bytes` long.
///
/// # Errors
/// The kernel's.
pub(super) fn shared_memory(size_bytes: u64) -> io::Result<OwnedFd> {
    // SAFETY: the name is a terminated string.
    let raw = unsafe { libc::memfd_create(c"vunet-inflight".as_ptr(), libc::MFD_CLOEXEC) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us and nothing else knows it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(raw) });
    file.set_len(size_bytes)?;
    Ok(file.into())
}
