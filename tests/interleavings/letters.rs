//! Letters between workers: the rings and the eventfd of `postbox`, with two senders; and a sender whose ring is full.

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::fence;
use loom::thread;

use crate::{assert_noticed, assert_sound, explore};

/// Workers that send to the one that receives.
const SENDERS: usize = 2;

/// Steps put elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The receiver takes the letters, then clears the event.
    ClearedLate,
    /// The sender writes the event, then pushes the letter.
    SignalledEarly,
}

/// What one worker is sent.
struct Inbox {
    /// Letters pushed into each sender's ring; `rtrb` publishes an entry by storing its tail.
    tails: [AtomicUsize; SENDERS],
    /// The eventfd.
    event: AtomicUsize,
}

/// `Postbox::deliver`.
fn send(inbox: &Inbox, sender: usize, fault: Fault) {
    if fault == Fault::SignalledEarly {
        inbox.event.fetch_add(1, AcqRel);
    }
    let tail = inbox.tails[sender].load(Relaxed);
    inbox.tails[sender].store(tail + 1, Release);
    if fault != Fault::SignalledEarly {
        inbox.event.fetch_add(1, AcqRel);
    }
}

/// `Postbox::take` until there is none.
fn take_all(inbox: &Inbox, taken: &mut [usize; SENDERS]) {
    for (tail, taken) in inbox.tails.iter().zip(taken) {
        *taken = tail.load(Acquire);
    }
}

/// `Worker::letters`, as often as the event wakes it; returns the letters taken from each ring.
fn receive(inbox: &Inbox, fault: Fault) -> [usize; SENDERS] {
    let mut taken = [0; SENDERS];
    for _ in 0..=SENDERS {
        if inbox.event.load(Acquire) == 0 {
            break;
        }
        if fault == Fault::ClearedLate {
            take_all(inbox, &mut taken);
            inbox.event.swap(0, AcqRel);
        } else {
            inbox.event.swap(0, AcqRel);
            take_all(inbox, &mut taken);
        }
    }
    taken
}

/// Whether the receiver sleeps without an event although there are letters.
fn loses(fault: Fault) -> bool {
    let inbox = Arc::new(Inbox { tails: Default::default(), event: AtomicUsize::new(0) });
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || send(&inbox, sender, fault))
        })
        .collect();
    let taken = receive(&inbox, fault);
    for sender in senders {
        sender.join().expect("no panic");
    }
    let sent: usize = inbox.tails.iter().map(|tail| tail.load(Relaxed)).sum();
    inbox.event.load(Relaxed) == 0 && taken.iter().sum::<usize>() < sent
}

#[test]
fn no_letter_is_left_unseen_with_its_receiver_asleep() {
    assert_sound(&explore(|| loses(Fault::None)));
}

#[test]
fn clearing_the_event_after_the_letters_or_signalling_before_them_loses_some() {
    for fault in [Fault::ClearedLate, Fault::SignalledEarly] {
        println!("{fault:?}");
        assert_noticed(&explore(move || loses(fault)));
    }
}

/// Steps left out of the waiting for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoomFault {
    None,
    /// The sender says that it waits, and does not look again.
    NoSecondLook,
    /// It looks again before others see that it waits.
    NoFenceOfSender,
    /// The receiver looks for who waits before others see what it took.
    NoFenceOfReceiver,
}

/// A ring with one place.
struct OnePlace {
    head: AtomicUsize,
    tail: AtomicUsize,
    waits: AtomicUsize,
    /// The sender's eventfd.
    event: AtomicUsize,
}

/// `Outbox::push_all` of one letter.
fn push(ring: &OnePlace) -> bool {
    let tail = ring.tail.load(Relaxed);
    let has_room = tail == ring.head.load(Acquire);
    if has_room {
        ring.tail.store(tail + 1, Release);
    }
    has_room
}

/// `Outbox::deliver` of one letter; whether it was sent.
fn deliver(ring: &OnePlace, fault: RoomFault) -> bool {
    if push(ring) {
        return true;
    }
    ring.waits.store(1, Relaxed);
    if fault != RoomFault::NoFenceOfSender {
        fence(SeqCst);
    }
    fault != RoomFault::NoSecondLook && push(ring)
}

/// `Postbox::take_turn`.
fn take_turn(ring: &OnePlace, fault: RoomFault) {
    let head = ring.head.load(Relaxed);
    if ring.tail.load(Acquire) > head {
        ring.head.store(head + 1, Release);
    }
    if fault != RoomFault::NoFenceOfReceiver {
        fence(SeqCst);
    }
    if ring.waits.load(Relaxed) == 1 && ring.waits.swap(0, Relaxed) == 1 {
        ring.event.fetch_add(1, AcqRel);
    }
}

/// Whether the sender of three letters sleeps without an event although there is room for the next.
fn sleeps_on(fault: RoomFault) -> bool {
    let [head, tail, waits, event] = std::array::from_fn(|_| AtomicUsize::new(0));
    let ring = Arc::new(OnePlace { head, tail, waits, event });
    let sender = {
        let ring = Arc::clone(&ring);
        thread::spawn(move || (0..3).all(|_| deliver(&ring, fault)))
    };
    (0..2).for_each(|_| take_turn(&ring, fault));
    let is_sent = sender.join().expect("no panic");
    let has_room = ring.head.load(Relaxed) == ring.tail.load(Relaxed);
    !is_sent && has_room && ring.event.load(Relaxed) == 0
}

#[test]
fn no_sender_sleeps_although_there_is_room() {
    assert_sound(&explore(|| sleeps_on(RoomFault::None)));
}

#[test]
fn a_sender_that_does_not_look_again_or_is_not_seen_sleeps_on() {
    for fault in [RoomFault::NoSecondLook, RoomFault::NoFenceOfSender, RoomFault::NoFenceOfReceiver] {
        println!("{fault:?}");
        assert_noticed(&explore(move || sleeps_on(fault)));
    }
}
