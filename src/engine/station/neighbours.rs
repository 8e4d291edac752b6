//! Who has which address on the link: asked for when needed, asked again while used, forgotten when silent.
//!
//! Read first: RFC 826; RFC 1122, 2.3.2 (requests bounded, entries that age); RFC 4861, 7.3.2 for the states.

use std::net::Ipv4Addr;
use std::time::Duration;

use hashbrown::HashMap;

use crate::addr::MacAddr;
use crate::limits;
use crate::time::Instant;

/// How long what a host said of itself is believed without asking again.
const FRESH: Duration = Duration::from_secs(60);
/// Between two questions for one address (RFC 1122, 2.3.2.1: one a second at most).
const ASK_PAUSE: Duration = Duration::from_secs(1);
/// Questions before a host counts as gone.
const ASKS_MAX: u8 = 3;
/// How long it does, without further questions.
const GONE: Duration = Duration::from_secs(3);
/// An entry nobody used for so long is forgotten.
const UNUSED: Duration = Duration::from_secs(600);

/// Whom a question goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// The address asked for.
    pub(super) target: Ipv4Addr,
    /// Who had it, to be asked directly; everybody if `None`.
    pub(super) mac: Option<MacAddr>,
}

/// What is known of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Who has it, and until when that need not be looked up again.
    Known(MacAddr, Instant),
    /// It was asked for.
    Asked,
    /// Nobody answers.
    Gone,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Asked { asks: u8, due: Instant },
    Known { mac: MacAddr, fresh_until: Instant, asks: u8, due: Instant },
    Gone { until: Instant },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    state: State,
    used: Instant,
}

/// The table, at most [`limits::STATION_NEIGHBOURS_MAX`] addresses.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    entries: HashMap<Ipv4Addr, Entry, foldhash::quality::RandomState>,
    /// No entry has anything to do before this.
    due: Option<Instant>,
}

impl Neighbours {
    /// Who has `target`; a question to send comes along if it is time for one.
    pub(super) fn find(&mut self, now: Instant, target: Ipv4Addr) -> (Found, Option<Question>) {
        let Some(entry) = self.entries.get_mut(&target) else {
            return self.ask_anew(now, target);
        };
        entry.used = now;
        match &mut entry.state {
            State::Asked { .. } => (Found::Asked, None),
            State::Gone { until } if now < *until => (Found::Gone, None),
            State::Gone { .. } => self.ask_anew(now, target),
            State::Known { mac, fresh_until, .. } if now < *fresh_until => {
                (Found::Known(*mac, *fresh_until), None)
            }
            State::Known { mac, asks, due, .. } => {
                let mac = *mac;
                let question = (*asks == 0).then_some(Question { target, mac: Some(mac) });
                if question.is_some() {
                    (*asks, *due) = (1, now + ASK_PAUSE);
                    self.due = Some(self.due.map_or(*due, |at| at.min(*due)));
                }
                (Found::Known(mac, now + ASK_PAUSE), question)
            }
        }
    }

    /// A host said which address it has. Only what is in the table is changed, unless `wanted`. Returns
    /// whether what is known of it changed.
    pub(super) fn learn(&mut self, now: Instant, addr: Ipv4Addr, mac: MacAddr, wanted: bool) -> bool {
        if !mac.is_unicast() {
            return false;
        }
        let state = State::Known { mac, fresh_until: now + FRESH, asks: 0, due: now + FRESH };
        match self.entries.get_mut(&addr) {
            Some(entry) => {
                let changed = !matches!(entry.state, State::Known { mac: known, .. } if known == mac);
                entry.state = state;
                changed
            }
            None if wanted => {
                self.make_room();
                self.entries.insert(addr, Entry { state, used: now });
                true
            }
            None => false,
        }
    }

    /// Asks what is due again; returns whether anything became unknown.
    pub(super) fn poll(&mut self, now: Instant, mut ask: impl FnMut(Question)) -> bool {
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        let mut changed = false;
        self.entries.retain(|target, entry| {
            match &mut entry.state {
                State::Asked { asks, due } if now >= *due => {
                    if *asks >= ASKS_MAX {
                        entry.state = State::Gone { until: now + GONE };
                        changed = true;
                    } else {
                        (*asks, *due) = (*asks + 1, now + ASK_PAUSE);
                        ask(Question { target: *target, mac: None });
                    }
                }
                State::Known { mac, asks, due, .. } if *asks > 0 && now >= *due => {
                    if *asks >= ASKS_MAX {
                        ask(Question { target: *target, mac: None });
                        entry.state = State::Asked { asks: 1, due: now + ASK_PAUSE };
                        changed = true;
                    } else {
                        (*asks, *due) = (*asks + 1, now + ASK_PAUSE);
                        ask(Question { target: *target, mac: Some(*mac) });
                    }
                }
                _ => {}
            }
            now.since(entry.used) < UNUSED
        });
        self.due = self.entries.values().filter_map(Entry::due).min();
        changed
    }

    /// When [`Neighbours::poll`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Forgets everybody: the address they were asked from is gone.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.due = None;
    }

    fn ask_anew(&mut self, now: Instant, target: Ipv4Addr) -> (Found, Option<Question>) {
        let due = now + ASK_PAUSE;
        if !self.entries.contains_key(&target) {
            self.make_room();
        }
        self.entries.insert(target, Entry { state: State::Asked { asks: 1, due }, used: now });
        self.due = Some(self.due.map_or(due, |at| at.min(due)));
        (Found::Asked, Some(Question { target, mac: None }))
    }

    /// The longest unused one makes room: a guest that scans the link does not cost it its router.
    fn make_room(&mut self) {
        if self.entries.len() < limits::STATION_NEIGHBOURS_MAX {
            return;
        }
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used).map(|(addr, _)| *addr);
        if let Some(oldest) = oldest {
            self.entries.remove(&oldest);
        }
    }
}

impl Entry {
    fn due(&self) -> Option<Instant> {
        match self.state {
            State::Asked { due, .. } => Some(due),
            State::Known { asks, due, .. } if asks > 0 => Some(due),
            State::Known { .. } | State::Gone { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
    const MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    fn polled(table: &mut Neighbours, now: Instant) -> (Vec<Option<MacAddr>>, bool) {
        let mut asked = Vec::new();
        let changed = table.poll(now, |question| asked.push(question.mac));
        (asked, changed)
    }

    #[test]
    fn an_address_is_asked_for_once_a_second_and_given_up() {
        let mut table = Neighbours::default();
        assert_eq!(table.find(at(0), ADDR), (Found::Asked, Some(Question { target: ADDR, mac: None })));
        assert_eq!(table.find(at(0), ADDR), (Found::Asked, None));
        assert_eq!(polled(&mut table, at(0)), (vec![], false));
        assert_eq!(polled(&mut table, at(1)), (vec![None], false));
        assert_eq!(polled(&mut table, at(2)), (vec![None], false));
        assert_eq!(polled(&mut table, at(3)), (vec![], true));
        assert_eq!(table.find(at(4), ADDR), (Found::Gone, None));
        assert_eq!(table.find(at(6), ADDR).0, Found::Asked);
        assert!(table.learn(at(6), ADDR, MAC, false));
        assert_eq!(table.find(at(6), ADDR), (Found::Known(MAC, at(66)), None));
    }

    #[test]
    fn a_used_entry_is_asked_again_directly_and_then_anew() {
        let mut table = Neighbours::default();
        assert!(!table.learn(at(0), ADDR, MAC, false), "nobody asked");
        assert!(table.learn(at(0), ADDR, MAC, true));
        assert_eq!(table.deadline(), None);
        let question = Some(Question { target: ADDR, mac: Some(MAC) });
        assert_eq!(table.find(at(60), ADDR), (Found::Known(MAC, at(61)), question));
        assert_eq!(polled(&mut table, at(61)), (vec![Some(MAC)], false));
        assert_eq!(polled(&mut table, at(62)), (vec![Some(MAC)], false));
        assert_eq!(table.find(at(62), ADDR).0, Found::Known(MAC, at(63)), "used meanwhile");
        assert_eq!(polled(&mut table, at(63)), (vec![None], true));
        assert_eq!(table.find(at(63), ADDR).0, Found::Asked);
        let moved = MacAddr([2, 0, 0, 0, 0, 10]);
        assert!(table.learn(at(63), ADDR, moved, false));
        assert!(!table.learn(at(64), ADDR, MacAddr::BROADCAST, false));
        assert_eq!(table.find(at(64), ADDR).0, Found::Known(moved, at(123)));
    }

    #[test]
    fn a_scan_costs_the_longest_unused() {
        let mut table = Neighbours::default();
        table.learn(at(0), ADDR, MAC, true);
        for n in 0..2 * limits::STATION_NEIGHBOURS_MAX as u32 {
            let now = at(1) + Duration::from_micros(u64::from(n) * 10);
            assert!(matches!(table.find(now, ADDR).0, Found::Known(..)), "{n}");
            table.find(now, Ipv4Addr::from_bits(0x0a00_0000 + n));
            assert!(table.entries.len() <= limits::STATION_NEIGHBOURS_MAX);
        }
    }
}
