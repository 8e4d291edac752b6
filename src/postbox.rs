//! Letters between workers: for each ordered pair of workers a single-producer single-consumer ring,
//! and for each worker an eventfd that says its rings have something, or have room.
//!
//! Letters whose ring is full wait by destination, so that a worker that hangs keeps nothing from the others, and nobody
//! spins for it: it says when it has read (`waits` of a ring). So many frames wait and no more.
//!
//! May touch: the rings. Read first: `engine::placement`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use rtrb::{Consumer, Producer, PushError, RingBuffer};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::engine::packet::Side;
use crate::engine::packet::moving::MovedFlow;
use crate::engine::packet::ports::WorkerSet;
use crate::engine::placement::{Letter, Post, WorkerId};
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

impl HostLetter {
    /// How many letters may wait in front of it where it has to wait; otherwise it is lost. What workers tell of the guest is
    /// not lost for the many frames another is too slow for, and flows are as many as there were.
    fn waiting_max(&self) -> usize {
        match self {
            HostLetter::Engine(Post { letter: Letter::Frame(_), .. }) => limits::LETTERS_MAX,
            HostLetter::Link(letter) if matches!(**letter, LinkLetter::Frame(_)) => limits::LETTERS_MAX,
            HostLetter::Engine(Post {
                letter: Letter::Flow(_) | Letter::Socket(_) | Letter::Gone(_),
                ..
            })
            | HostLetter::Link(_) => usize::MAX,
            HostLetter::Engine(_) => 2 * limits::LETTERS_MAX,
        }
    }
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
    /// The receiver's.
    event: Arc<EventFd>,
    /// Whether letters wait for room in the ring.
    waits: Arc<AtomicBool>,
    /// They, in order.
    waiting: VecDeque<HostLetter>,
}

#[derive(Debug)]
struct Inbox {
    ring: Consumer<HostLetter>,
    /// The sender's.
    event: Arc<EventFd>,
    /// Whether the sender waits for room.
    waits: Arc<AtomicBool>,
}

/// A worker's end of all rings to and from the others.
#[derive(Debug)]
pub struct Postbox {
    inboxes: Vec<Inbox>,
    /// The inbox whose turn is next.
    turn: usize,
    /// By worker; none for its own.
    outboxes: Vec<Option<Outbox>>,
    event: Arc<EventFd>,
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
        .map(|event| Postbox { inboxes: Vec::new(), turn: 0, outboxes: Vec::new(), event: Arc::clone(event) })
        .collect();
    for from in 0..workers {
        for (to, event) in events.iter().enumerate() {
            if from == to {
                boxes[from].outboxes.push(None);
                continue;
            }
            let (ring, inbox) = RingBuffer::new(limits::LETTERS_MAX);
            let waits = Arc::new(AtomicBool::new(false));
            let inbox = Inbox { ring: inbox, event: Arc::clone(&events[from]), waits: Arc::clone(&waits) };
            let outbox = Outbox { ring, event: Arc::clone(event), waits, waiting: VecDeque::new() };
            boxes[from].outboxes.push(Some(outbox));
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
            if let Ok(letter) = self.inboxes[self.turn].ring.pop() {
                return Some(letter);
            }
        }
        None
    }

    /// Hands the letters that wait to `each`, at most [`limits::LETTERS_MAX`]: with more the event stays set. Wakes who
    /// waits for room.
    pub fn take_turn(&mut self, mut each: impl FnMut(HostLetter)) {
        self.clear_event();
        for taken in 0.. {
            if taken == limits::LETTERS_MAX {
                // Fails only if the counter is full, and then it is set.
                let _ = self.event.write(1);
                break;
            }
            let Some(letter) = self.take() else { break };
            each(letter);
        }
        // What was taken is seen by a sender that has said that it waits, or that is seen here.
        fence(Ordering::SeqCst);
        for inbox in &self.inboxes {
            if inbox.waits.load(Ordering::Relaxed) && inbox.waits.swap(false, Ordering::Relaxed) {
                let _ = inbox.event.write(1);
            }
        }
    }

    /// Sends a letter. One whose ring is full waits here, in order. False if it is lost, because too many wait for that
    /// worker already.
    pub fn send(&mut self, to: WorkerId, letter: HostLetter) -> bool {
        let Some(Some(outbox)) = self.outboxes.get_mut(usize::from(to.0)) else { return true };
        let is_kept = outbox.waiting.len() < letter.waiting_max();
        if is_kept {
            outbox.waiting.push_back(letter);
            outbox.deliver();
        }
        is_kept
    }

    /// Sends what waits, as far as there is room. The event is set once there is more.
    pub fn deliver(&mut self) {
        self.outboxes.iter_mut().flatten().for_each(Outbox::deliver);
    }
}

impl Outbox {
    fn deliver(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        if !self.push_all() {
            self.waits.store(true, Ordering::Relaxed);
            // The receiver sees that, or what it has taken is seen here.
            fence(Ordering::SeqCst);
            self.push_all();
        }
    }

    /// Whether nothing waits any more.
    fn push_all(&mut self) -> bool {
        let mut sent = false;
        while let Some(letter) = self.waiting.pop_front() {
            if let Err(PushError::Full(letter)) = self.ring.push(letter) {
                self.waiting.push_front(letter);
                break;
            }
            sent = true;
        }
        if sent {
            // The write can only fail because the counter is full: the other is awake anyway.
            let _ = self.event.write(1);
        }
        self.waiting.is_empty()
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

    fn frame() -> HostLetter {
        let (side, pair) = (Side::Guest, QueuePair::default());
        let frame =
            LinkFrame::new(side, pair, VnetHeader::default(), WorkerSet::default(), Box::new([0; 60]));
        HostLetter::Link(Box::new(LinkLetter::Frame(frame)))
    }

    #[test]
    fn frames_for_a_worker_that_does_not_read_are_so_many_and_cost_the_others_nothing() {
        let mut boxes = postboxes(3).unwrap();
        let sent = (0..5 * limits::LETTERS_MAX).filter(|_| boxes[0].send(WorkerId(1), frame())).count();
        assert_eq!(sent, 2 * limits::LETTERS_MAX, "a full ring, and as many that wait");
        assert!(boxes[0].send(WorkerId(1), primary(1)), "what is told of the guest is not lost for them");
        assert!(boxes[0].send(WorkerId(2), primary(2)));
        assert_eq!(number(boxes[2].take()), Some(2), "and nobody else waits");
        let told = (0..5 * limits::LETTERS_MAX).filter(|_| boxes[0].send(WorkerId(1), primary(1))).count();
        assert_eq!(told, limits::LETTERS_MAX - 1, "but it has its bound too");
    }

    #[test]
    fn who_waits_for_room_sleeps_until_there_is_some() {
        let mut boxes = postboxes(2).unwrap();
        for _ in 0..limits::LETTERS_MAX {
            boxes[0].send(WorkerId(1), primary(1));
        }
        boxes[0].send(WorkerId(1), primary(2));
        boxes[0].deliver();
        assert!(boxes[0].event.read().is_err(), "nothing wakes it");
        boxes[1].take_turn(|_| {});
        assert!(boxes[0].event.read().is_ok(), "there is room");
        boxes[0].deliver();
        let mut seen = Vec::new();
        boxes[1].take_turn(|letter| seen.push(number(Some(letter))));
        assert_eq!(seen, [Some(2)]);
        assert!(boxes[0].event.read().is_err(), "it waits for nothing");
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
        boxes[0].send(WorkerId(1), primary(2));
        boxes[0].send(WorkerId(1), primary(3));
        for _ in 0..limits::LETTERS_MAX {
            assert_eq!(number(boxes[1].take()), Some(1));
        }
        boxes[0].deliver();
        assert_eq!((number(boxes[1].take()), number(boxes[1].take())), (Some(2), Some(3)));
    }
}
