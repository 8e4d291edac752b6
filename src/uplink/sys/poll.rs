//! The worker's epoll set, over the `epoll` crate.
//!
//! Host sockets are watched edge-triggered: peeked bytes that stay queued would keep a
//! level-triggered set ready for ever.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use epoll::{ControlOptions, Event, Events};

use crate::engine::host_net::{Readiness, Token};

/// An epoll set shared by a worker and the sockets it owns.
#[derive(Clone, Debug)]
pub struct Poll {
    epoll: Rc<OwnedFd>,
}

impl Poll {
    /// An empty set.
    ///
    /// # Errors
    /// No descriptor.
    pub fn new() -> io::Result<Poll> {
        let fd = epoll::create(true)?;
        // SAFETY: `fd` was just created and belongs to nobody else.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Poll { epoll: Rc::new(epoll) })
    }

    /// Watches a host socket, edge-triggered, both directions.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn watch_socket(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), socket_events(), token)
    }

    /// Watches a datagram socket, edge-triggered, for datagrams and errors. (Room to send would be reported
    /// with nearly every datagram that leaves, and nobody waits for it.)
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn watch_datagrams(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        let events = Events::EPOLLIN | Events::EPOLLET;
        self.control(ControlOptions::EPOLL_CTL_ADD, fd.as_raw_fd(), events, token)
    }

    /// Watches a socket again, which reports readiness that already exists and makes the kernel
    /// report room in a full send queue.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn rewatch_socket(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd.as_raw_fd(), socket_events(), token)
    }

    /// Watches a descriptor for reading, level-triggered.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn watch_readable(&self, fd: RawFd, token: Token) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, Events::EPOLLIN, token)
    }

    /// Stops watching a descriptor.
    pub fn unwatch(&self, fd: RawFd) {
        let none = Event { events: 0, data: 0 };
        // A descriptor that is not in the set is no harm.
        let _ = epoll::ctl(self.epoll.as_raw_fd(), ControlOptions::EPOLL_CTL_DEL, fd, none);
    }

    fn control(&self, what: ControlOptions, fd: RawFd, events: Events, token: Token) -> io::Result<()> {
        epoll::ctl(self.epoll.as_raw_fd(), what, fd, Event::new(events, token.0))
    }

    /// Waits for events, at most `timeout_ms` (-1 for ever); returns how many came.
    ///
    /// # Errors
    /// Never in practice; an interruption counts as no event.
    pub fn wait(&self, timeout_ms: i32, events: &mut [Event]) -> io::Result<usize> {
        match epoll::wait(self.epoll.as_raw_fd(), timeout_ms, events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            outcome => outcome,
        }
    }
}

fn socket_events() -> Events {
    Events::EPOLLIN | Events::EPOLLPRI | Events::EPOLLOUT | Events::EPOLLRDHUP | Events::EPOLLET
}

/// What an event says of a host socket.
pub fn readiness(event: &Event) -> Readiness {
    let events = Events::from_bits_truncate(event.events);
    Readiness {
        readable: events.contains(Events::EPOLLIN),
        writable: events.contains(Events::EPOLLOUT),
        peer_closed: events.contains(Events::EPOLLRDHUP),
        failed: events.intersects(Events::EPOLLERR | Events::EPOLLHUP),
        urgent: events.contains(Events::EPOLLPRI),
    }
}
