//! Suppressed notifications of a split virtqueue, both ways, by event index and by flags: `device/ring`
//! against a driver as the specification words it (virtio 1.3, 2.7.7 and 2.7.10).
//!
//! Both ways are one protocol. A *producer* publishes an index, then asks whether the other side wants
//! to hear of it. A *consumer* takes what is there; before it sleeps it says that it wants to hear, and
//! looks once more. For kicks the producer is the driver (avail index), for calls the device (used index).

use loom::sync::Arc;
use loom::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use loom::sync::atomic::{AtomicBool, AtomicU16, fence};
use loom::thread;

use crate::{PREEMPTIONS_MAX, assert_noticed, assert_sound, explore, explore_within};

/// How a wish is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// `VIRTIO_F_EVENT_IDX`: the index that is to be passed.
    EventIndex,
    /// A flag that says "do not".
    Flags,
}

/// A line taken out, or put elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// `Ring::publish` (or the driver's counterpart) without its fence.
    NoFenceAfterPublish,
    /// `Ring::arm` (or the driver's counterpart) without its fence.
    NoFenceAfterWish,
    /// Asleep without another look after the wish.
    NoSecondLook,
    /// The wish is read before the index is published.
    WishReadEarly,
    /// The notification is taken after what it tells of, not before.
    TakenLate,
}

/// One direction of a ring.
struct Shared {
    /// Avail or used index.
    index: AtomicU16,
    /// `avail_event`, `used_event`, or the flags of the consumer.
    wish: AtomicU16,
    /// Kick or call: an eventfd, whose reads and writes have one order (the kernel's lock).
    event: AtomicBool,
}

/// Where the indices start: the entry before they wrap, as event indices must stand that.
const START: u16 = u16::MAX;
/// The flag that says "do not notify".
const DO_NOT: u16 = 1;

/// virtio 1.3, 2.7.7.1.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// `DriverRing::kick_wanted`, `Ring::publish` with `Ring::driver_wants_call`.
fn produce(shared: &Shared, mode: Mode, fault: Fault, entries: u16) {
    let mut old = START;
    for _ in 0..entries {
        let new = old.wrapping_add(1);
        let early = (fault == Fault::WishReadEarly).then(|| shared.wish.load(Acquire));
        shared.index.store(new, Release);
        if fault != Fault::NoFenceAfterPublish {
            fence(SeqCst);
        }
        let wish = early.unwrap_or_else(|| shared.wish.load(Acquire));
        let is_wanted = match mode {
            Mode::EventIndex => passed(wish, new, old),
            Mode::Flags => wish & DO_NOT == 0,
        };
        if is_wanted {
            shared.event.swap(true, AcqRel);
        }
        old = new;
    }
}

/// `Ring::write_notification_wish`.
fn write_wish(shared: &Shared, mode: Mode, is_armed: bool, seen: u16) {
    let value = match (mode, is_armed) {
        (Mode::EventIndex, true) => seen,
        (Mode::EventIndex, false) => seen.wrapping_sub(1),
        (Mode::Flags, true) => 0,
        (Mode::Flags, false) => DO_NOT,
    };
    shared.wish.store(value, Release);
}

/// `Batch::run` until the ring is empty: returns the index seen when it was decided to sleep.
fn drain(shared: &Shared, mode: Mode, fault: Fault, mut seen: u16) -> u16 {
    // `Ring::disarm`.
    write_wish(shared, mode, false, seen);
    loop {
        let index = shared.index.load(Acquire);
        if index != seen {
            seen = index;
            continue;
        }
        // `Ring::arm`.
        write_wish(shared, mode, true, seen);
        if fault == Fault::NoSecondLook {
            return seen;
        }
        if fault != Fault::NoFenceAfterWish {
            fence(SeqCst);
        }
        if shared.index.load(Acquire) == seen {
            return seen;
        }
    }
}

/// The consumer's turns, as long as there is an event; returns what it had seen when it slept.
fn consume(shared: &Shared, mode: Mode, fault: Fault, entries: u16) -> u16 {
    let mut seen = drain(shared, mode, fault, START);
    for _ in 0..entries {
        if fault == Fault::TakenLate {
            if !shared.event.fetch_or(false, AcqRel) {
                break;
            }
            seen = drain(shared, mode, fault, seen);
            shared.event.swap(false, AcqRel);
        } else {
            if !shared.event.swap(false, AcqRel) {
                break;
            }
            seen = drain(shared, mode, fault, seen);
        }
    }
    seen
}

/// Publishes `entries` one by one; whether the consumer sleeps without an event although there is something.
fn loses(mode: Mode, fault: Fault, entries: u16) -> bool {
    let shared = Arc::new(Shared {
        index: AtomicU16::new(START),
        wish: AtomicU16::new(0),
        event: AtomicBool::new(false),
    });
    let producer = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || produce(&shared, mode, fault, entries))
    };
    let seen = consume(&shared, mode, fault, entries);
    producer.join().expect("no panic");
    let is_awake = shared.event.swap(false, AcqRel);
    !is_awake && seen != shared.index.load(Relaxed)
}

#[test]
fn no_notification_by_event_index_is_lost() {
    assert_sound(&explore(|| loses(Mode::EventIndex, Fault::None, 1)));
}

#[test]
fn no_notification_by_flags_is_lost() {
    assert_sound(&explore(|| loses(Mode::Flags, Fault::None, 1)));
}

#[test]
fn no_notification_of_two_is_lost() {
    for mode in [Mode::EventIndex, Mode::Flags] {
        assert_sound(&explore_within(PREEMPTIONS_MAX, move || loses(mode, Fault::None, 2)));
    }
}

#[test]
fn a_missing_fence_look_or_order_loses_notifications() {
    for mode in [Mode::EventIndex, Mode::Flags] {
        for fault in
            [Fault::NoFenceAfterPublish, Fault::NoFenceAfterWish, Fault::NoSecondLook, Fault::WishReadEarly]
        {
            println!("{mode:?}, {fault:?}");
            assert_noticed(&explore(move || loses(mode, fault, 1)));
        }
    }
}

#[test]
fn a_notification_taken_after_what_it_tells_of_loses_the_next() {
    for mode in [Mode::EventIndex, Mode::Flags] {
        assert_noticed(&explore_within(PREEMPTIONS_MAX, move || loses(mode, Fault::TakenLate, 2)));
    }
}
