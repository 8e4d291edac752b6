//! Letters between workers: for each ordered pair of workers a single-producer single-consumer ring,
//! and for each worker an eventfd that says its rings have something.
//!
//! May touch: the rings. Read first: `engine::placement`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rtrb::{Consumer, Producer, PushError, RingBuffer};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::packet::Side;
use crate::engine::packet::moving::MovedFlow;
use crate::engine::packet::ports::WorkerSet;
use crate::engine::placement::{Post, WorkerId};
use crate::frame::QueuePair;
use crate::limits;
use crate::uplink::sockets::{DetachedDatagram, DetachedStream};
use crate::wire::vnet::VnetHeader;

/// What workers tell each other.
#[derive(Debug)]
pub enum HostLetter {
    /// Of the engine over host sockets.
    Engine(Post<DetachedStream, DetachedDatagram>),
    /// Of the translation of packets onto a link.
    Link(Box<LinkLetter>),
}

/// What workers that translate packets tell each other.
#[derive(Debug)]
pub enum LinkLetter {
    /// A frame whose flow is the receiver's.
    Frame(LinkFrame),
    /// A flow that is the receiver's from now on, as of so many of the guest's starts.
    Flow(MovedFlow, u64),
}

/// A frame that is translated by another worker than the one it came to.
#[derive(Debug)]
pub struct LinkFrame {
    /// Where it came from.
    pub side: Side,
    /// The guest's queue pair it came by, if it is the guest's.
    pub pair: QueuePair,
    /// Its virtio-net header.
    pub vnet: VnetHeader,
    /// Workers that have looked at it.
    pub tried: WorkerSet,
    /// All of it.
    pub bytes: Box<[u8]>,
    /// The guest's starts its sender knew of ([`crate::engine::placement::Directory::guest_starts`]): it is not for the guest
    /// after that.
    pub guest_starts: u64,
    /// Its sender.
    pub from: WorkerId,
    /// What it takes of its sender's room, until it is read.
    pub room: Option<RoomTaken>,
}

impl LinkFrame {
    /// A frame that is to be handed over.
    pub fn new(
        side: Side,
        pair: QueuePair,
        vnet: VnetHeader,
        tried: WorkerSet,
        bytes: Box<[u8]>,
    ) -> LinkFrame {
        LinkFrame { side, pair, vnet, tried, bytes, guest_starts: 0, from: WorkerId(0), room: None }
    }
}

/// Room for the frames a worker has under way to others: [`limits::HANDED_BYTES_MAX`] bytes.
#[derive(Debug, Default)]
pub struct Room(Arc<AtomicUsize>);

/// A frame's part of it, given back when it is dropped, by whichever worker.
#[derive(Debug)]
pub struct RoomTaken {
    of: Arc<AtomicUsize>,
    bytes: usize,
}

impl Room {
    /// Takes room for so many bytes, if there is any. Only its one owner takes; others only give back.
    pub fn take(&mut self, bytes: usize) -> Option<RoomTaken> {
        if self.0.load(Ordering::Relaxed) + bytes > limits::HANDED_BYTES_MAX {
            return None;
        }
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Some(RoomTaken { of: Arc::clone(&self.0), bytes })
    }
}

impl Drop for RoomTaken {
    fn drop(&mut self) {
        self.of.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Outbox {
    ring: Producer<HostLetter>,
    event: Arc<EventFd>,
}

/// A worker's end of all rings to and from the others.
#[derive(Debug)]
pub struct Postbox {
    inboxes: Vec<Consumer<HostLetter>>,
    /// The inbox whose turn is next.
    turn: usize,
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
            turn: 0,
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

    /// The next letter that waits; other workers take turns.
    pub fn take(&mut self) -> Option<HostLetter> {
        for _ in 0..self.inboxes.len() {
            self.turn = (self.turn + 1) % self.inboxes.len();
            if let Ok(letter) = self.inboxes[self.turn].pop() {
                return Some(letter);
            }
        }
        None
    }

    /// Hands the letters that wait to `each`, at most [`limits::LETTERS_MAX`]: with more the event stays set.
    pub fn take_turn(&mut self, mut each: impl FnMut(HostLetter)) {
        self.clear_event();
        for _ in 0..limits::LETTERS_MAX {
            let Some(letter) = self.take() else { return };
            each(letter);
        }
        // Fails only if the counter is full, and then it is set.
        let _ = self.event.write(1);
    }

    /// Sends a letter. One whose ring is full waits here, in order.
    pub fn send(&mut self, to: WorkerId, letter: HostLetter) {
        self.undelivered.push_back((to, letter));
        self.deliver();
    }

    /// Sends what `next` gives, until that is nothing or [`limits::LETTERS_MAX`] wait here: what is left is
    /// its giver's to bound. Returns whether all of it is gone.
    pub fn send_all(&mut self, mut next: impl FnMut() -> Option<(WorkerId, HostLetter)>) -> bool {
        loop {
            let is_gone = self.deliver();
            if self.undelivered.len() >= limits::LETTERS_MAX {
                return false;
            }
            let Some(letter) = next() else { return is_gone };
            self.undelivered.push_back(letter);
        }
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
        let letter = Letter::Primary(IpAddr::V4(Ipv4Addr::new(10, 0, 2, n)));
        HostLetter::Engine(Post { guest_starts: 0, letter })
    }

    fn number(letter: Option<HostLetter>) -> Option<u8> {
        match letter? {
            HostLetter::Engine(Post { letter: Letter::Primary(IpAddr::V4(addr)), .. }) => {
                Some(addr.octets()[3])
            }
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
    fn a_worker_that_does_not_read_is_sent_so_many_letters_and_no_more() {
        let mut boxes = postboxes(2).unwrap();
        let mut given = 0;
        let mut give = || {
            given += 1;
            (given <= 5 * limits::LETTERS_MAX).then(|| (WorkerId(1), primary(1)))
        };
        for _ in 0..3 {
            assert!(!boxes[0].send_all(&mut give));
        }
        assert_eq!(given, 2 * limits::LETTERS_MAX, "a full ring, and as many that wait");
    }

    #[test]
    fn letters_without_end_leave_a_worker_time_and_other_workers_theirs() {
        let mut boxes = postboxes(3).unwrap();
        let mut own = boxes.remove(2);
        for _ in 0..limits::LETTERS_MAX {
            boxes[0].send(WorkerId(2), primary(1));
        }
        boxes[1].send(WorkerId(2), primary(2));
        let mut seen = Vec::new();
        own.take_turn(|letter| {
            seen.push(number(Some(letter)));
            boxes[0].send(WorkerId(2), primary(1));
        });
        assert_eq!(seen.len(), limits::LETTERS_MAX);
        assert!(seen[..2].contains(&Some(2)), "the other worker's turn");
        assert!(own.event.read().is_ok(), "it is woken for the rest");
    }

    #[test]
    fn room_for_frames_is_bounded_and_given_back_as_they_are_read() {
        let mut room = Room::default();
        let mut taken: Vec<_> = std::iter::from_fn(|| room.take(60_000)).collect();
        assert_eq!(taken.len(), limits::HANDED_BYTES_MAX / 60_000);
        let rest = room.take(limits::HANDED_BYTES_MAX % 60_000);
        assert!(rest.is_some() && room.take(1).is_none(), "to the last byte");
        taken.pop();
        assert!(room.take(60_001).is_none() && room.take(60_000).is_some());
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
