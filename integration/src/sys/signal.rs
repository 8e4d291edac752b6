//! Signals as a file descriptor.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A signal the process waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGTERM or SIGINT: end in an orderly way.
    Terminate,
    /// SIGUSR1: print the counters.
    Report,
}

/// Blocked signals, readable as they arrive.
#[derive(Debug)]
pub(crate) struct Signals(File);

impl Signals {
    /// Blocks SIGTERM, SIGINT and SIGUSR1 for this thread and those it starts later, and opens a
    /// descriptor they arrive on. Call it before the first thread starts.
    ///
    /// # Errors
    /// What `sigprocmask` or `signalfd` answer.
    pub(crate) fn block() -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the pointer is to a sigset_t we own.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1] {
            // SAFETY: sigemptyset initialised the set, the signal numbers are valid.
            unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
        }
        // SAFETY: initialised by sigemptyset above.
        let set = unsafe { set.assume_init() };
        // SAFETY: `set` is valid, the old mask is not asked for.
        let rc = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if rc != 0 {
            return Err(io::Error::from_raw_os_error(rc));
        }
        // SAFETY: `set` is valid; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor, nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Signals(File::from(fd)))
    }

    /// The descriptor to wait on.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Takes the next signal; blocks if none is pending.
    ///
    /// # Errors
    /// What `read` answers.
    pub(crate) fn take(&mut self) -> io::Result<Signal> {
        // struct signalfd_siginfo is 128 bytes and starts with the signal number (signalfd(2)).
        let mut info = [0u8; 128];
        self.0.read_exact(&mut info)?;
        let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
        Ok(if number == libc::SIGUSR1.unsigned_abs() { Signal::Report } else { Signal::Terminate })
    }
}
