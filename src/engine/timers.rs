//! Deadlines of flows: one entry a flow, moved lazily.
//!
//! A flow's deadline moves later with nearly every packet. Its entry stays where it is then, and is
//! put at the new place only when it comes up; it is moved at once only to an earlier place. So the
//! hot path touches the set rarely, and no flow ever has two entries.

use super::host_net::Token;
use crate::time::Instant;

/// A flow's side of its timer.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimerSlot {
    deadline: Option<Instant>,
    entry: Option<EntryId>,
}

/// Names an entry wherever it stands in the heap.
type EntryId = u32;

#[derive(Clone, Copy, Debug)]
struct Entry {
    at: Instant,
    token: Token,
    id: EntryId,
}

/// All deadlines of an engine: a binary heap whose entries know their places, so that one in the middle
/// can be moved. Room once had is kept.
#[derive(Debug, Default)]
pub struct Timers {
    heap: Vec<Entry>,
    /// Where each entry stands.
    places: Vec<usize>,
    /// Names not in use.
    free: Vec<EntryId>,
}

impl Timers {
    /// Sets the deadline of `slot`, whose owner is `token`.
    pub fn set(&mut self, slot: &mut TimerSlot, token: Token, at: Instant) {
        slot.deadline = Some(at);
        match slot.entry {
            None => slot.entry = Some(self.insert(token, at)),
            Some(id) => {
                let place = self.places[id as usize];
                if at < self.heap[place].at {
                    self.heap[place].at = at;
                    self.rise(place);
                }
            }
        }
    }

    /// Takes the deadline of `slot` away for good.
    pub fn clear(&mut self, slot: &mut TimerSlot) {
        slot.deadline = None;
        if let Some(id) = slot.entry.take() {
            self.remove(self.places[id as usize]);
        }
    }

    /// The owner of the first entry due at `now`, whose entry is removed. [`Timers::expired`] must be
    /// called for it next.
    pub fn pop_due(&mut self, now: Instant) -> Option<Token> {
        let first = self.heap.first()?;
        if first.at > now {
            return None;
        }
        Some(self.remove(0).token)
    }

    /// Whether the deadline of `slot` has come, called for each popped owner; queues it again if it
    /// has moved meanwhile.
    pub fn expired(&mut self, slot: &mut TimerSlot, token: Token, now: Instant) -> bool {
        slot.entry = None;
        match slot.deadline {
            Some(at) if at > now => {
                self.set(slot, token, at);
                false
            }
            Some(_) => {
                slot.deadline = None;
                true
            }
            None => false,
        }
    }

    /// When the first entry comes up.
    pub fn next(&self) -> Option<Instant> {
        self.heap.first().map(|entry| entry.at)
    }

    /// Entries held, one a flow at most.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }

    fn insert(&mut self, token: Token, at: Instant) -> EntryId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.places.push(0);
            // Room for all to be free at once: that must not be had when they are.
            self.free.reserve(self.places.len());
            EntryId::try_from(self.places.len() - 1).expect("flows are bounded far below 2^32")
        });
        let place = self.heap.len();
        self.heap.push(Entry { at, token, id });
        self.places[id as usize] = place;
        self.rise(place);
        id
    }

    fn remove(&mut self, place: usize) -> Entry {
        let removed = self.heap.swap_remove(place);
        self.free.push(removed.id);
        if let Some(moved) = self.heap.get(place) {
            self.places[moved.id as usize] = place;
            self.rise(place);
            self.sink(place);
        }
        removed
    }

    /// Moves an entry up to where no later one is above it.
    fn rise(&mut self, mut place: usize) {
        while place > 0 {
            let above = (place - 1) / 2;
            if self.heap[above].at <= self.heap[place].at {
                return;
            }
            self.swap(place, above);
            place = above;
        }
    }

    /// Moves an entry down to where no earlier one is below it.
    fn sink(&mut self, mut place: usize) {
        loop {
            let below = [2 * place + 1, 2 * place + 2].into_iter().filter(|at| *at < self.heap.len());
            let Some(earliest) = below.min_by_key(|at| self.heap[*at].at) else { return };
            if self.heap[place].at <= self.heap[earliest].at {
                return;
            }
            self.swap(place, earliest);
            place = earliest;
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        for place in [a, b] {
            self.places[self.heap[place].id as usize] = place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn at(ms: u64) -> Instant {
        Instant::ZERO + Duration::from_millis(ms)
    }

    #[test]
    fn a_deadline_that_moves_later_keeps_one_entry_and_expires_once() {
        let mut timers = Timers::default();
        let mut slot = TimerSlot::default();
        let token = Token(7);
        for ms in 10..100 {
            timers.set(&mut slot, token, at(ms));
            assert_eq!(timers.len(), 1);
        }
        assert_eq!(timers.pop_due(at(50)), Some(token));
        assert!(!timers.expired(&mut slot, token, at(50)));
        assert_eq!(timers.next(), Some(at(99)));
        assert_eq!(timers.pop_due(at(98)), None);
        assert_eq!(timers.pop_due(at(99)), Some(token));
        assert!(timers.expired(&mut slot, token, at(99)));
        assert!(timers.is_empty());
    }

    #[test]
    fn a_deadline_that_moves_earlier_replaces_its_entry() {
        let mut timers = Timers::default();
        let mut slot = TimerSlot::default();
        timers.set(&mut slot, Token(1), at(7_200_000));
        timers.set(&mut slot, Token(1), at(200));
        assert_eq!((timers.len(), timers.next()), (1, Some(at(200))));
        timers.clear(&mut slot);
        assert!(timers.is_empty());
    }

    proptest! {
        /// Against a plain list: what comes up, when, and that nothing is left behind.
        #[test]
        fn any_order_of_changes_brings_every_deadline_up_in_time(
            changes in proptest::collection::vec((0usize..20, proptest::option::of(0u64..1000), 0u64..40), 1..400),
        ) {
            let mut timers = Timers::default();
            let mut slots = [TimerSlot::default(); 20];
            let mut wanted: [Option<u64>; 20] = [None; 20];
            let mut now = 0;
            for (owner, deadline, pass) in changes {
                match deadline {
                    Some(ms) => timers.set(&mut slots[owner], Token(owner as u64), at(now + ms)),
                    None => timers.clear(&mut slots[owner]),
                }
                wanted[owner] = deadline.map(|ms| now + ms);
                now += pass;
                while let Some(token) = timers.pop_due(at(now)) {
                    let owner = token.0 as usize;
                    let due = wanted[owner].is_some_and(|ms| ms <= now);
                    prop_assert_eq!(timers.expired(&mut slots[owner], token, at(now)), due);
                    if due {
                        wanted[owner] = None;
                    }
                }
                prop_assert!(wanted.iter().flatten().all(|ms| *ms > now), "none is late");
                prop_assert_eq!(timers.len(), wanted.iter().flatten().count());
                let first = wanted.iter().flatten().min().map(|ms| at(*ms));
                prop_assert!(timers.next() <= first || first.is_none());
            }
        }
    }
}
