//! Deadlines of flows: one entry a flow, moved lazily.
//!
//! A flow's deadline moves later with nearly every packet. Its entry stays where it is then, and is
//! put at the new place only when it comes up; it is moved at once only to an earlier place. So the
//! hot path touches the set rarely, and no flow ever has two entries.

use std::collections::BTreeSet;

use super::host_net::Token;
use crate::time::Instant;

/// A flow's side of its timer.
#[derive(Clone, Copy, Debug, Default)]
pub struct TimerSlot {
    deadline: Option<Instant>,
    queued: Option<Instant>,
}

/// All deadlines of an engine.
#[derive(Debug, Default)]
pub struct Timers {
    entries: BTreeSet<(Instant, u64)>,
}

impl Timers {
    /// Sets the deadline of `slot`, whose owner is `token`.
    pub fn set(&mut self, slot: &mut TimerSlot, token: Token, at: Instant) {
        slot.deadline = Some(at);
        match slot.queued {
            Some(queued) if queued <= at => {}
            previous => {
                if let Some(queued) = previous {
                    self.entries.remove(&(queued, token.0));
                }
                self.entries.insert((at, token.0));
                slot.queued = Some(at);
            }
        }
    }

    /// Takes the deadline of `slot` away for good.
    pub fn clear(&mut self, slot: &mut TimerSlot, token: Token) {
        slot.deadline = None;
        if let Some(queued) = slot.queued.take() {
            self.entries.remove(&(queued, token.0));
        }
    }

    /// The owner of the first entry due at `now`, whose entry is removed.
    pub fn pop_due(&mut self, now: Instant) -> Option<Token> {
        let first = *self.entries.first()?;
        if first.0 > now {
            return None;
        }
        self.entries.remove(&first);
        Some(Token(first.1))
    }

    /// Whether the deadline of `slot` has come, called for each popped owner; queues it again if it
    /// has moved meanwhile.
    pub fn expired(&mut self, slot: &mut TimerSlot, token: Token, now: Instant) -> bool {
        slot.queued = None;
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
        self.entries.first().map(|(at, _)| *at)
    }

    /// Entries held, one a flow at most.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        timers.clear(&mut slot, Token(1));
        assert!(timers.is_empty());
    }
}
