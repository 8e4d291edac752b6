//! Letters between workers: the rings and the eventfd of `postbox`, with two senders.

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
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
