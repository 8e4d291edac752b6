//! Who has which address on the link: asked for when needed, asked again while used, forgotten when silent.
//!
//! Read first: RFC 826; RFC 1122, 2.3.2 (requests bounded, entries that age); RFC 4861, 7.3.2 for the states.

use std::net::Ipv4Addr;
use std::time::Duration;

use hashbrown::HashMap;
use slab::Slab;

use crate::addr::MacAddr;
use crate::engine::lru::Lru;
use crate::limits;
use crate::rate::Rate;
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
    /// It is not known, and too much was asked for to ask for it as well.
    Withheld,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Asked { asks: u8, due: Instant },
    Known { mac: MacAddr, fresh_until: Instant, asks: u8, due: Instant },
    Gone { until: Instant },
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    addr: Ipv4Addr,
    state: State,
    used: Instant,
}

/// The table, at most [`limits::STATION_NEIGHBOURS_MAX`] addresses.
#[derive(Debug)]
pub(super) struct Neighbours {
    entries: Slab<Entry>,
    places: HashMap<Ipv4Addr, usize, foldhash::quality::RandomState>,
    /// Entries with a MAC address, and those without, in the order of their use: who scans the link costs it
    /// none of the first while there are others.
    known: Lru,
    unknown: Lru,
    /// Of questions for addresses nobody is known to have: each disturbs the whole link.
    questions: Rate,
    /// No entry has anything to do before this.
    due: Option<Instant>,
}

impl Default for Neighbours {
    fn default() -> Neighbours {
        Neighbours {
            entries: Slab::new(),
            places: HashMap::default(),
            known: Lru::default(),
            unknown: Lru::default(),
            questions: Rate::new(limits::STATION_QUESTIONS_BURST, limits::STATION_QUESTIONS_PER_SECOND),
            due: None,
        }
    }
}

impl Neighbours {
    /// Who has `target`; a question to send comes along if it is time for one. One that `matters`, as a router does, is
    /// asked for however much else is.
    pub(super) fn find(
        &mut self,
        now: Instant,
        target: Ipv4Addr,
        matters: bool,
    ) -> (Found, Option<Question>) {
        let Some(place) = self.places.get(&target).copied() else {
            return self.ask_anew(now, target, matters);
        };
        let entry = &mut self.entries[place];
        entry.used = now;
        let order = if entry.is_known() { &mut self.known } else { &mut self.unknown };
        order.touch(place);
        match &mut entry.state {
            State::Asked { .. } => (Found::Asked, None),
            State::Gone { until } if now < *until => (Found::Gone, None),
            State::Gone { .. } => self.ask_anew(now, target, matters),
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
        let place = self.places.get(&addr).copied();
        match place.map(|place| &mut self.entries[place]) {
            Some(entry) => {
                let changed = !matches!(entry.state, State::Known { mac: known, .. } if known == mac);
                self.set(place.expect("an entry has a place"), state);
                changed
            }
            None if wanted => {
                self.insert(Entry { addr, state, used: now });
                true
            }
            None => false,
        }
    }

    /// Who has `addr`, if that is known; nothing is asked.
    pub(super) fn known(&self, addr: Ipv4Addr) -> Option<MacAddr> {
        match self.entries[*self.places.get(&addr)?].state {
            State::Known { mac, .. } => Some(mac),
            State::Asked { .. } | State::Gone { .. } => None,
        }
    }

    /// Asks what is due again; returns whether anything became unknown.
    pub(super) fn poll(&mut self, now: Instant, mut ask: impl FnMut(Question)) -> bool {
        if self.due.is_none_or(|due| now < due) {
            return false;
        }
        let mut changed = false;
        let mut unknown = Vec::new();
        let mut unused = Vec::new();
        for (place, entry) in &mut self.entries {
            let target = entry.addr;
            match &mut entry.state {
                State::Asked { asks, due } if now >= *due => {
                    if *asks >= ASKS_MAX {
                        entry.state = State::Gone { until: now + GONE };
                        changed = true;
                    } else {
                        (*asks, *due) = (*asks + 1, now + ASK_PAUSE);
                        ask(Question { target, mac: None });
                    }
                }
                State::Known { mac, asks, due, .. } if *asks > 0 && now >= *due => {
                    if *asks >= ASKS_MAX {
                        ask(Question { target, mac: None });
                        unknown.push(place);
                        changed = true;
                    } else {
                        (*asks, *due) = (*asks + 1, now + ASK_PAUSE);
                        ask(Question { target, mac: Some(*mac) });
                    }
                }
                _ => {}
            }
            if now.since(entry.used) >= UNUSED {
                unused.push(place);
            }
        }
        for place in unknown {
            self.set(place, State::Asked { asks: 1, due: now + ASK_PAUSE });
        }
        unused.into_iter().for_each(|place| self.remove(place));
        self.due = self.entries.iter().filter_map(|(_, entry)| entry.due()).min();
        changed
    }

    /// When [`Neighbours::poll`] has something to do.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.due
    }

    /// Forgets everybody: the address they were asked from is gone.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.places.clear();
        (self.known, self.unknown) = (Lru::default(), Lru::default());
        self.due = None;
    }

    fn ask_anew(&mut self, now: Instant, target: Ipv4Addr, matters: bool) -> (Found, Option<Question>) {
        if !self.questions.take(now) && !matters {
            return (Found::Withheld, None);
        }
        let due = now + ASK_PAUSE;
        let state = State::Asked { asks: 1, due };
        match self.places.get(&target).copied() {
            Some(place) => self.set(place, state),
            None => self.insert(Entry { addr: target, state, used: now }),
        }
        self.due = Some(self.due.map_or(due, |at| at.min(due)));
        (Found::Asked, Some(Question { target, mac: None }))
    }

    /// Takes an entry in. The longest unused one makes room, of those nobody answers for while there are any.
    fn insert(&mut self, entry: Entry) {
        if self.entries.len() >= limits::STATION_NEIGHBOURS_MAX
            && let Some(oldest) = self.unknown.oldest().or_else(|| self.known.oldest())
        {
            self.remove(oldest);
        }
        let place = self.entries.insert(entry);
        self.places.insert(entry.addr, place);
        self.set(place, entry.state);
    }

    fn set(&mut self, place: usize, state: State) {
        let entry = &mut self.entries[place];
        entry.state = state;
        let is_known = entry.is_known();
        let (to, from) = if is_known {
            (&mut self.known, &mut self.unknown)
        } else {
            (&mut self.unknown, &mut self.known)
        };
        from.remove(place);
        to.touch(place);
    }

    fn remove(&mut self, place: usize) {
        let entry = self.entries.remove(place);
        self.places.remove(&entry.addr);
        self.known.remove(place);
        self.unknown.remove(place);
    }
}

impl Entry {
    fn is_known(&self) -> bool {
        matches!(self.state, State::Known { .. })
    }

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
        assert_eq!(
            table.find(at(0), ADDR, false),
            (Found::Asked, Some(Question { target: ADDR, mac: None }))
        );
        assert_eq!(table.find(at(0), ADDR, false), (Found::Asked, None));
        assert_eq!(polled(&mut table, at(0)), (vec![], false));
        assert_eq!(polled(&mut table, at(1)), (vec![None], false));
        assert_eq!(polled(&mut table, at(2)), (vec![None], false));
        assert_eq!(polled(&mut table, at(3)), (vec![], true));
        assert_eq!(table.find(at(4), ADDR, false), (Found::Gone, None));
        assert_eq!(table.find(at(6), ADDR, false).0, Found::Asked);
        assert!(table.learn(at(6), ADDR, MAC, false));
        assert_eq!(table.find(at(6), ADDR, false), (Found::Known(MAC, at(66)), None));
    }

    #[test]
    fn a_used_entry_is_asked_again_directly_and_then_anew() {
        let mut table = Neighbours::default();
        assert!(!table.learn(at(0), ADDR, MAC, false), "nobody asked");
        assert!(table.learn(at(0), ADDR, MAC, true));
        assert_eq!(table.deadline(), None);
        let question = Some(Question { target: ADDR, mac: Some(MAC) });
        assert_eq!(table.find(at(60), ADDR, false), (Found::Known(MAC, at(61)), question));
        assert_eq!(polled(&mut table, at(61)), (vec![Some(MAC)], false));
        assert_eq!(polled(&mut table, at(62)), (vec![Some(MAC)], false));
        assert_eq!(table.find(at(62), ADDR, false).0, Found::Known(MAC, at(63)), "used meanwhile");
        assert_eq!(polled(&mut table, at(63)), (vec![None], true));
        assert_eq!(table.find(at(63), ADDR, false).0, Found::Asked);
        let moved = MacAddr([2, 0, 0, 0, 0, 10]);
        assert!(table.learn(at(63), ADDR, moved, false));
        assert!(!table.learn(at(64), ADDR, MacAddr::BROADCAST, false));
        assert_eq!(table.find(at(64), ADDR, false).0, Found::Known(moved, at(123)));
    }

    #[test]
    fn a_scan_is_slowed_down_and_costs_the_longest_unknown() {
        let mut table = Neighbours::default();
        table.learn(at(0), ADDR, MAC, true);
        let silent = Ipv4Addr::from_bits(0x0a00_0000);
        let mut asked = 0;
        let seconds = 60;
        for n in 0..seconds * 1000 {
            let now = at(1) + Duration::from_millis(n);
            let (found, question) = table.find(now, Ipv4Addr::from_bits(0x0a00_0000 + n as u32), false);
            assert_eq!(found, if question.is_some() { Found::Asked } else { Found::Withheld });
            asked += u64::from(question.is_some());
            assert!(table.entries.len() <= limits::STATION_NEIGHBOURS_MAX);
        }
        let (burst, rate) = (limits::STATION_QUESTIONS_BURST, limits::STATION_QUESTIONS_PER_SECOND);
        assert!(asked.abs_diff(u64::from(burst) + seconds * u64::from(rate)) <= 1, "{asked}");
        assert!(asked > limits::STATION_NEIGHBOURS_MAX as u64, "some made room");
        assert!(!table.places.contains_key(&silent));
        assert!(table.places.contains_key(&ADDR), "who is known stays, though nobody used it");
        let now = at(1 + seconds);
        table.find(now, Ipv4Addr::from_bits(0x0b00_0000), false);
        assert_eq!(table.find(now, Ipv4Addr::from_bits(0x0b00_0001), false).0, Found::Withheld);
        assert_eq!(table.find(now, Ipv4Addr::from_bits(0x0b00_0002), true).0, Found::Asked, "a router");
    }

    #[test]
    fn neighbours_past_the_bound_cost_the_longest_unused_each() {
        let mut table = Neighbours::default();
        let addr = |n: usize| Ipv4Addr::from_bits(0x0a00_0000 + n as u32);
        for n in 0..limits::STATION_NEIGHBOURS_MAX {
            table.learn(at(0), addr(n), MAC, true);
        }
        table.find(at(1), addr(0), false);
        for n in 0..limits::STATION_NEIGHBOURS_MAX - 1 {
            table.learn(at(2), addr(10_000 + n), MAC, true);
            assert!(table.known(addr(0)).is_some(), "{n}");
            assert_eq!(table.known(addr(n + 1)), None);
        }
        table.learn(at(2), addr(20_000), MAC, true);
        assert_eq!(table.known(addr(0)), None);
        assert_eq!(table.entries.len(), limits::STATION_NEIGHBOURS_MAX);
    }
}
