//! System calls of namespaces. Linux only.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A child process, to be waited for.
#[derive(Debug)]
pub(super) struct Child(libc::pid_t);

impl Child {
    /// Waits for the child's end.
    ///
    /// # Errors
    /// `waitpid(2)`'s.
    pub(super) fn wait(self) -> io::Result<()> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is writable, and `self.0` is a child nobody else waits for.
            if unsafe { libc::waitpid(self.0, &raw mut status, 0) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

impl Child {
    /// Kills the child and leaves it to whoever inherits this process's children.
    pub(super) fn kill(self) {
        // SAFETY: `self.0` is a child nobody has waited for, so that the number is still its own.
        let _ = unsafe { libc::kill(self.0, libc::SIGKILL) };
    }
}

/// Threads of this process.
///
/// # Errors
/// No procfs.
pub(super) fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Runs `work` in a child process, which ends with it. The process must have one thread: what others held
/// locked would stay locked in the child.
///
/// # Errors
/// `fork(2)`'s; [`io::ErrorKind::Unsupported`] where there are other threads.
pub(super) fn in_child(work: impl FnOnce()) -> io::Result<Child> {
    if threads()? != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // SAFETY: this is the only thread, so the child finds everything in a state a thread may find it in.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid > 0 {
        return Ok(Child(pid));
    }
    // A panic must not run on into what the parent was about to do.
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    // SAFETY: ends the child without running what the parent registered for its own end.
    unsafe { libc::_exit(i32::from(outcome.is_err())) }
}

/// Keeps every open descriptor but the standard streams from programs that are started from now on.
///
/// # Errors
/// `close_range(2)`'s; kernels before 5.11 do not know the flag.
pub(super) fn keep_from_children() -> io::Result<()> {
    let (first, last, flags) = (3 as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: with this flag nothing is closed; no memory is involved.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Moves this process into new namespaces of users and networks.
///
/// # Errors
/// `unshare(2)`'s.
pub(super) fn unshare_user_and_net() -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) })
}

/// Which kind of namespace to enter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// Of users; the process must have one thread.
    User,
    /// Of networks; the thread's only.
    Net,
}

/// Moves this thread into a namespace.
///
/// # Errors
/// `setns(2)`'s.
pub(super) fn enter(namespace: BorrowedFd<'_>, kind: Kind) -> io::Result<()> {
    let kind = match kind {
        Kind::User => libc::CLONE_NEWUSER,
        Kind::Net => libc::CLONE_NEWNET,
    };
    // SAFETY: the descriptor is open; no memory is involved.
    check(unsafe { libc::setns(namespace.as_raw_fd(), kind) })
}

/// The effective user and group.
pub(super) fn effective_ids() -> (libc::uid_t, libc::gid_t) {
    // SAFETY: these calls have no preconditions and do not fail.
    let uid = unsafe { libc::geteuid() };
    // SAFETY: as above.
    (uid, unsafe { libc::getegid() })
}

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
