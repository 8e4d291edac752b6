//! The timer wheel: when flows are to be looked at, constant work for each.
//!
//! Three levels of 256 slots; a slot of the first is [`GRAIN_MS`] wide, of the second 256 times that, of the
//! third 65,536 times. A flow stands in the lowest level whose present turn reaches it, in a list that runs
//! through the flows themselves. When a slot's time comes its flows are handed out one by one, and whoever
//! asked puts back those that live longer: so a flow that carries packets costs the wheel nothing until the end it had when
//! it was put there, and no slot is ever emptied in one go. If the asker stops early the wheel's
//! clock stays behind until it goes on.
//!
//! A flow is looked at up to one grain after it is due, never before.
//!
//! Read first: Varghese and Lauck, "Hashed and Hierarchical Timing Wheels" (1987), scheme 7.

use super::flow::{Flow, NIL, Ticks};
use crate::time::Instant;

/// Width of the finest slots, in milliseconds: how late a flow may end.
pub(super) const GRAIN_MS: u64 = 1 << GRAIN_BITS;

const GRAIN_BITS: u32 = 7;
const SLOT_BITS: u32 = 8;
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_MASK: u64 = SLOTS as u64 - 1;
const LEVELS: u32 = 3;

/// Set in the `previous` of a slot's first flow, beside the slot's number.
const HEAD: u32 = 1 << 31;

/// One level: the first flow of each slot, and which slots have one.
#[derive(Debug)]
struct Level {
    heads: [u32; SLOTS],
    occupied: [u64; SLOTS / 64],
}

impl Level {
    fn is_occupied(&self, slot: usize) -> bool {
        self.occupied[slot / 64] & 1 << (slot % 64) != 0
    }

    /// The first slot from `from` on, without wrapping, that holds flows.
    fn next_occupied(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = self.occupied.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.occupied.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }
}

/// The wheel. Flows are named by their index in the slice it is given, always the same.
#[derive(Debug)]
pub(super) struct Wheel {
    levels: [Level; LEVELS as usize],
    /// The wheel's clock, in grains: all slots before it are empty.
    cursor: u64,
}

impl Wheel {
    /// An empty wheel whose clock stands at `now`.
    pub(super) fn new(now: Instant) -> Wheel {
        let level = || Level { heads: [NIL; SLOTS], occupied: [0; SLOTS / 64] };
        Wheel { levels: [level(), level(), level()], cursor: grains(now) }
    }

    /// Has flow `index` looked at when `due` has come; it must not be in the wheel. `due` lies at most
    /// [`Ticks::SPAN_MAX`] away from the wheel's clock.
    pub(super) fn put(&mut self, flows: &mut [Flow], index: u32, due: Ticks) {
        let slot = self.slot_of(due);
        let (level, place) = (slot >> SLOT_BITS, slot & SLOT_MASK as usize);
        let head = std::mem::replace(&mut self.levels[level].heads[place], index);
        self.levels[level].occupied[place / 64] |= 1 << (place % 64);
        if head != NIL {
            flows[head as usize].timer.previous = index;
        }
        let timer = &mut flows[index as usize].timer;
        timer.due = due;
        timer.next = head;
        timer.previous = HEAD | slot as u32;
    }

    /// Takes flow `index` out, if it is in.
    pub(super) fn take(&mut self, flows: &mut [Flow], index: u32) {
        let timer = flows[index as usize].timer;
        if timer.previous == NIL {
            return;
        }
        if timer.next != NIL {
            flows[timer.next as usize].timer.previous = timer.previous;
        }
        if timer.previous & HEAD == 0 {
            flows[timer.previous as usize].timer.next = timer.next;
        } else {
            let slot = (timer.previous & !HEAD) as usize;
            let (level, place) = (&mut self.levels[slot >> SLOT_BITS], slot & SLOT_MASK as usize);
            level.heads[place] = timer.next;
            if timer.next == NIL {
                level.occupied[place / 64] &= !(1 << (place % 64));
            }
        }
        let timer = &mut flows[index as usize].timer;
        timer.next = NIL;
        timer.previous = NIL;
    }

    /// Takes out one flow whose slot has come at `now`; `None` if there is none, and the clock stands at `now`.
    /// The flow may live longer: slots of higher levels come up at their beginning.
    pub(super) fn pop(&mut self, flows: &mut [Flow], now: Instant) -> Option<u32> {
        let now = grains(now);
        loop {
            if let Some(index) = self.first_at_cursor() {
                self.take(flows, index);
                return Some(index);
            }
            match self.next_event() {
                Some(at) if at <= now => self.cursor = at,
                _ => {
                    self.cursor = self.cursor.max(now);
                    return None;
                }
            }
        }
    }

    /// When [`Wheel::pop`] will have something, or a time before it; `None` if the wheel is empty.
    pub(super) fn next(&self) -> Option<Instant> {
        let at = match self.first_at_cursor() {
            Some(_) => self.cursor,
            None => self.next_event()?,
        };
        Some(Instant::from_micros((at << GRAIN_BITS) * 1000))
    }

    /// The slot, counted through all levels, that comes up at the grain in which `due` has passed.
    fn slot_of(&self, due: Ticks) -> usize {
        let cursor_ms = self.cursor << GRAIN_BITS;
        let ahead_ms = i64::from(due.since(Ticks(cursor_ms as u32)));
        let due_ms = cursor_ms.saturating_add_signed(ahead_ms);
        let at = due_ms.div_ceil(GRAIN_MS).max(self.cursor + 1);
        for level in 0..LEVELS - 1 {
            let turn = (level + 1) * SLOT_BITS;
            if at >> turn == self.cursor >> turn {
                return slot_at(level, at);
            }
        }
        // The last level goes round: what lies a whole turn away comes up early and is put back.
        let top = (LEVELS - 1) * SLOT_BITS;
        let farthest = (self.cursor >> top) + SLOT_MASK;
        slot_at(LEVELS - 1, (at >> top).min(farthest) << top)
    }

    fn first_at_cursor(&self) -> Option<u32> {
        self.levels.iter().zip(0..).find_map(|(level, n)| {
            let head = level.heads[slot_at(n, self.cursor) & SLOT_MASK as usize];
            (head != NIL).then_some(head)
        })
    }

    /// The first grain after the clock at which a slot that holds flows comes up.
    fn next_event(&self) -> Option<u64> {
        for (level, n) in self.levels[..LEVELS as usize - 1].iter().zip(0..) {
            let here = self.cursor >> (n * SLOT_BITS);
            if let Some(slot) = level.next_occupied((here & SLOT_MASK) as usize + 1) {
                return Some((here & !SLOT_MASK | slot as u64) << (n * SLOT_BITS));
            }
        }
        let top = (LEVELS - 1) * SLOT_BITS;
        let (level, here) = (&self.levels[LEVELS as usize - 1], self.cursor >> top);
        let from = (here & SLOT_MASK) as usize + 1;
        let slot = level.next_occupied(from).or_else(|| level.next_occupied(0))?;
        debug_assert!(level.is_occupied(slot));
        let ahead = (slot as u64).wrapping_sub(here) & SLOT_MASK;
        Some((here + ahead) << top)
    }
}

/// Whole grains that have passed at `now`.
fn grains(now: Instant) -> u64 {
    (now.as_micros() / 1000) >> GRAIN_BITS
}

/// The slot, counted through all levels, that level `level` has for the grain `at`.
fn slot_at(level: u32, at: u64) -> usize {
    level as usize * SLOTS + ((at >> (level * SLOT_BITS)) & SLOT_MASK) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::packet::flow::{FlowFlags, FlowKey};
    use crate::wire::ipv4::Protocol;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn flows(count: usize) -> Vec<Flow> {
        let addr = Ipv4Addr::UNSPECIFIED;
        let key = FlowKey {
            guest: addr,
            remote: addr,
            guest_port: 0,
            remote_port: 0,
            external_port: 0,
            protocol: Protocol::UDP,
        };
        vec![Flow::new(key, FlowFlags::NONE, Ticks(0), 0); count]
    }

    fn ms(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    /// What the owner of a wheel does: looks at what comes up, puts back what is not due.
    fn due(wheel: &mut Wheel, flows: &mut [Flow], now_ms: u64) -> Vec<u32> {
        let mut due = Vec::new();
        while let Some(index) = wheel.pop(flows, ms(now_ms)) {
            let at = flows[index as usize].timer.due;
            if at.since(Ticks(now_ms as u32)) <= 0 {
                due.push(index);
            } else {
                wheel.put(flows, index, at);
            }
        }
        due
    }

    #[test]
    fn a_flow_comes_up_within_a_grain_after_it_is_due_and_never_before() {
        for due_ms in
            [1u32, 127, 128, 129, 32_767, 32_768, 40_000, 7_440_000, 8_388_608, 400_000_000, 2_000_000_000]
        {
            for start_ms in [0u64, 1, 127, 8_388_000, (1 << 32) - 500, (1 << 40) + 77] {
                let mut flows = flows(1);
                let mut wheel = Wheel::new(ms(start_ms));
                wheel.put(&mut flows, 0, Ticks(start_ms as u32).plus(due_ms));
                let at = start_ms + u64::from(due_ms);
                assert_eq!(due(&mut wheel, &mut flows, at - 1), [0u32; 0], "{due_ms} from {start_ms}");
                assert_eq!(due(&mut wheel, &mut flows, at + GRAIN_MS), [0], "{due_ms} from {start_ms}");
                assert_eq!(wheel.next(), None);
            }
        }
    }

    #[test]
    fn the_next_deadline_is_never_late_and_sleeping_until_it_needs_few_wakeups() {
        let mut flows = flows(1);
        let mut wheel = Wheel::new(ms(5_000));
        wheel.put(&mut flows, 0, Ticks(5_000 + 7_440_000));
        let mut wakeups = 0;
        let at = loop {
            let now_ms = wheel.next().expect("it is in").as_micros() / 1000;
            wakeups += 1;
            if due(&mut wheel, &mut flows, now_ms) == [0] {
                break now_ms;
            }
        };
        assert!((7_445_000..7_445_000 + GRAIN_MS).contains(&at), "{at}");
        assert!(wakeups <= LEVELS, "{wakeups}");
    }

    #[test]
    fn who_stops_early_goes_on_later_where_he_stopped() {
        let mut flows = flows(1000);
        let mut wheel = Wheel::new(ms(0));
        for index in 0..1000 {
            wheel.put(&mut flows, index, Ticks(1_000 + index / 500));
        }
        for n in 0..1000 {
            assert!(wheel.next().expect("more") <= ms(n + 5_000), "what is late is due at once");
            assert!(wheel.pop(&mut flows, ms(n + 5_000)).is_some());
        }
        assert_eq!(wheel.pop(&mut flows, ms(10_000)), None);
        assert_eq!(wheel.next(), None);
    }

    proptest! {
        /// Against a plain list of ends.
        #[test]
        fn every_order_of_changes_brings_each_flow_up_in_time(
            start_ms in prop_oneof![Just(0u64), Just((1 << 32) - 40_000), 0u64..1 << 40],
            changes in proptest::collection::vec(
                (0usize..24, 0u8..4, prop_oneof![0u32..400, 0u32..70_000, 0u32..20_000_000, 0u32..2_000_000_000],
                 prop_oneof![4 => 0u64..300, 2 => 0u64..40_000, 1 => 0u64..10_000_000, 1 => 0u64..600_000_000]),
                1..300,
            ),
        ) {
            let mut flows = flows(24);
            let mut wheel = Wheel::new(ms(start_ms));
            let mut model: [Option<u64>; 24] = [None; 24];
            let mut now_ms = start_ms;
            for (owner, change, after_ms, pass_ms) in changes {
                wheel.take(&mut flows, owner as u32);
                model[owner] = None;
                if change > 0 {
                    wheel.put(&mut flows, owner as u32, Ticks(now_ms as u32).plus(after_ms));
                    model[owner] = Some(now_ms + u64::from(after_ms));
                }
                let first = model.iter().flatten().min().copied();
                prop_assert_eq!(wheel.next().is_some(), first.is_some());
                if let (Some(next), Some(first)) = (wheel.next(), first) {
                    prop_assert!(next.as_micros() / 1000 < first.max(now_ms) + GRAIN_MS * 2);
                }
                now_ms += pass_ms;
                for index in due(&mut wheel, &mut flows, now_ms) {
                    let at = model[index as usize].take();
                    prop_assert!(at.is_some_and(|at| at <= now_ms), "{index} came up early: {at:?} at {now_ms}");
                }
                let late = model.iter().flatten().find(|at| **at + GRAIN_MS <= now_ms);
                prop_assert!(late.is_none(), "{late:?} is late at {now_ms}");
            }
        }
    }
}
