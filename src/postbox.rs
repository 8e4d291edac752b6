//! Letters between workers: for each ordered pair of workers a single-producer single-consumer ring,
//! and for each worker an eventfd that says its rings have something.
//!
//! May touch: the rings. Read first: `engine::placement`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use rtrb::{Consumer, Producer, PushError, RingBuffer};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::placement::{Post, WorkerId};
use crate::limits;
use crate::uplink::sockets::{DetachedDatagram, DetachedStream};

/// What workers over host sockets tell each other.
pub type HostLetter = Post<DetachedStream, DetachedDatagram>;

#[derive(Debug)]
struct Outbox {
    ring: Producer<HostLetter>,
    event: Arc<EventFd>,
}

/// A worker's end of all rings to and from the others.
#[derive(Debug)]
pub struct Postbox {
    inboxes: Vec<Consumer<HostLetter>>,
    /// By worker; none for its own.
    outboxes: Vec<Option<Outbox>>,
    event: Arc<EventFd>,
    /// Letters whose ring was full.
    undelivered: VecDeque<(WorkerId, HostLetter)>,
}

/// The postboxes of `workers` workers, in their order.
///
/// # Errors
/// No descriptor for the eventfds.
pub fn postboxes(workers: usize) -> io::Result<Vec<Postbox>> {
    let events = (0..workers)
        .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
        .collect::<io::Result<Vec<_>>>()?;
    let mut boxes: Vec<Postbox> = events
        .iter()
        .map(|event| Postbox {
            inboxes: Vec::new(),
            outboxes: Vec::new(),
            event: Arc::clone(event),
            undelivered: VecDeque::new(),
        })
        .collect();
    for from in 0..workers {
        for (to, event) in events.iter().enumerate() {
            if from == to {
                boxes[from].outboxes.push(None);
                continue;
            }
            let (ring, inbox) = RingBuffer::new(limits::LETTERS_MAX);
            boxes[from].outboxes.push(Some(Outbox { ring, event: Arc::clone(event) }));
            boxes[to].inboxes.push(inbox);
        }
    }
    Ok(boxes)
}

impl Postbox {
    /// Readable (level-triggered) when letters wait.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Clears the event; to be called before the letters are taken.
    pub fn clear_event(&self) {
        let _ = self.event.read();
    }

    /// The next letter that waits.
    pub fn take(&mut self) -> Option<HostLetter> {
        self.inboxes.iter_mut().find_map(|inbox| inbox.pop().ok())
    }

    /// Sends a letter. One whose ring is full waits here, in order.
    pub fn send(&mut self, to: WorkerId, letter: HostLetter) {
        self.undelivered.push_back((to, letter));
        self.deliver();
    }

    /// Sends what waits. Returns whether all of it is gone.
    pub fn deliver(&mut self) -> bool {
        while let Some((to, letter)) = self.undelivered.pop_front() {
            let Some(Some(outbox)) = self.outboxes.get_mut(usize::from(to.0)) else { continue };
            match outbox.ring.push(letter) {
                Ok(()) => {
                    // The write can only fail because the counter is full: the other is awake anyway.
                    let _ = outbox.event.write(1);
                }
                Err(PushError::Full(letter)) => {
                    self.undelivered.push_front((to, letter));
                    return false;
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::placement::Letter;
    use std::net::{IpAddr, Ipv4Addr};

    fn primary(n: u8) -> HostLetter {
        Post { guest_starts: 0, letter: Letter::Primary(IpAddr::V4(Ipv4Addr::new(10, 0, 2, n))) }
    }

    fn number(letter: Option<HostLetter>) -> Option<u8> {
        match letter?.letter {
            Letter::Primary(IpAddr::V4(addr)) => Some(addr.octets()[3]),
            other => panic!("{other:?} was never sent"),
        }
    }

    #[test]
    fn letters_arrive_in_order_at_the_worker_they_are_for() {
        let mut boxes = postboxes(3).unwrap();
        for n in 0..5 {
            boxes[0].send(WorkerId(2), primary(n));
        }
        assert!(boxes[1].take().is_none());
        for n in 0..5 {
            assert_eq!(number(boxes[2].take()), Some(n));
        }
        assert!(boxes[2].take().is_none());
    }

    #[test]
    fn a_letter_past_a_full_ring_waits_and_keeps_its_place() {
        let mut boxes = postboxes(2).unwrap();
        for _ in 0..limits::LETTERS_MAX {
            boxes[0].send(WorkerId(1), primary(1));
        }
        assert!(boxes[0].deliver());
        boxes[0].send(WorkerId(1), primary(2));
        boxes[0].send(WorkerId(1), primary(3));
        assert!(!boxes[0].deliver());
        for _ in 0..limits::LETTERS_MAX {
            assert_eq!(number(boxes[1].take()), Some(1));
        }
        assert!(boxes[0].deliver());
        assert_eq!((number(boxes[1].take()), number(boxes[1].take())), (Some(2), Some(3)));
    }
}
