//! Fragments pass without being put together: where the first one went, the others go.
//!
//! Only the first fragment has ports. What its translation came to is remembered by source, destination, protocol and
//! identification, and later fragments follow it by address; the transport's checksum, which the first one has, was changed
//! there for the whole packet. Nothing is held where the first came first. A fragment that overtook it is held,
//! a few for a moment (RFC 4787, REQ-14: fragments out of order must pass), and goes out behind it.
//!
//! A first fragment with an identification that is remembered already takes its place: identifications of a
//! fast sender come round within seconds. What overlaps is the receiver's to judge; what could change the ports or flags a
//! translation was judged by was refused before (`head.rs`).
//!
//! Entries are replaced in the order they came and looked at lazily: nothing runs by time but the end of what is held.
//!
//! Read first: RFC 791, 3.2; RFC 3022, 6.3; RFC 4787, 11; RFC 4963 (identifications that come round).

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use hashbrown::HashMap;

use crate::engine::placement::WorkerId;
use crate::limits;
use crate::time::Instant;
use crate::wire::ipv4::{Header, Protocol};

/// How long the way of a first fragment is remembered. The receiver waits 15 to 60 s for the rest (RFC 791,
/// RFC 1122, 3.3.2); senders have sent it within milliseconds.
const REMEMBERED: Duration = Duration::from_secs(15);

/// How long a fragment waits for the first one. Packets overtake each other by milliseconds.
const HELD: Duration = Duration::from_secs(2);

/// Which packet a fragment is part of, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    ident: u16,
    protocol: Protocol,
}

impl Key {
    fn of(ip: &Header) -> Key {
        Key { src: ip.src, dst: ip.dst, ident: ip.ident, protocol: ip.protocol }
    }
}

/// Where the fragments of a packet go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On, between these addresses.
    On {
        /// The source's address from there on.
        src: Ipv4Addr,
        /// The destination's.
        dst: Ipv4Addr,
        /// Whether it turns back to the guest's side.
        hairpin: bool,
    },
    /// To the gateway's, or the link's station's, own services.
    Ours,
    /// To another worker, which has the flow.
    Elsewhere(WorkerId),
}

#[derive(Clone, Copy, Debug)]
struct Remembered {
    key: Key,
    way: Way,
    since: Instant,
}

#[derive(Debug)]
struct Held {
    key: Key,
    until: Instant,
    frame: Box<[u8]>,
}

/// The packets of one direction that pass in fragments.
#[derive(Debug, Default)]
pub struct Fragments {
    places: HashMap<Key, u32, foldhash::quality::RandomState>,
    remembered: Vec<Remembered>,
    /// The place to be used next, once all are in use.
    next: usize,
    /// In the order they came.
    held: VecDeque<Held>,
    held_bytes: usize,
}

impl Fragments {
    /// Remembers where a packet's first fragment went.
    pub fn remember(&mut self, now: Instant, first: &Header, way: Way) {
        let entry = Remembered { key: Key::of(first), way, since: now };
        if let Some(&place) = self.places.get(&entry.key) {
            self.remembered[place as usize] = entry;
            return;
        }
        let place = if self.remembered.len() < limits::PACKET_FRAGMENTED_MAX {
            self.remembered.push(entry);
            self.remembered.len() - 1
        } else {
            let place = self.next;
            self.next = (place + 1) % self.remembered.len();
            let old = std::mem::replace(&mut self.remembered[place], entry);
            self.places.remove(&old.key);
            place
        };
        self.places.insert(entry.key, place as u32);
    }

    /// The way of a later fragment, if the first one came and was let through.
    pub fn way(&self, now: Instant, later: &Header) -> Option<Way> {
        let place = *self.places.get(&Key::of(later))?;
        let entry = &self.remembered[place as usize];
        (now.since(entry.since) < REMEMBERED).then_some(entry.way)
    }

    /// Holds a later fragment's frame until the first one comes. Returns how many were given up for it, perhaps it
    /// itself.
    pub fn hold(&mut self, now: Instant, later: &Header, frame: &[u8]) -> u64 {
        if frame.len() > limits::PACKET_FRAGMENTS_HELD_BYTES_MAX {
            return 1;
        }
        let mut lost = 0;
        while self.held.len() >= limits::PACKET_FRAGMENTS_HELD_MAX
            || self.held_bytes + frame.len() > limits::PACKET_FRAGMENTS_HELD_BYTES_MAX
        {
            self.drop_oldest();
            lost += 1;
        }
        self.held_bytes += frame.len();
        self.held.push_back(Held { key: Key::of(later), until: now + HELD, frame: frame.into() });
        lost
    }

    /// Takes the frame that waited longest for this first fragment.
    pub fn take_held(&mut self, first: &Header) -> Option<Box<[u8]>> {
        if self.held.is_empty() {
            return None;
        }
        let key = Key::of(first);
        let at = self.held.iter().position(|held| held.key == key)?;
        let frame = self.held.remove(at)?.frame;
        self.held_bytes -= frame.len();
        Some(frame)
    }

    /// Gives up what has waited too long. Returns how many.
    pub fn expire(&mut self, now: Instant) -> u64 {
        let mut lost = 0;
        while self.next_deadline().is_some_and(|until| until <= now) {
            self.drop_oldest();
            lost += 1;
        }
        lost
    }

    /// When the next that waits is given up.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.held.front().map(|held| held.until)
    }

    /// Bytes of frames held.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.held.pop_front() {
            self.held_bytes -= oldest.frame.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(ident: u16) -> Header {
        Header {
            src: Ipv4Addr::new(10, 0, 2, 2),
            dst: Ipv4Addr::new(192, 0, 2, 1),
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            ident,
            dont_fragment: false,
            more_fragments: true,
            fragment_offset_bytes: 8,
            header_bytes: 20,
            payload_bytes: 8,
        }
    }

    fn on(last: u8) -> Way {
        Way::On { src: Ipv4Addr::new(198, 51, 100, last), dst: Ipv4Addr::new(192, 0, 2, 1), hairpin: false }
    }

    #[test]
    fn later_fragments_follow_the_first_for_its_time() {
        let mut fragments = Fragments::default();
        let start = Instant::from_micros(5);
        assert_eq!(fragments.way(start, &header(1)), None);
        fragments.remember(start, &header(1), on(1));
        assert_eq!(fragments.way(start, &header(1)), Some(on(1)));
        assert_eq!(fragments.way(start, &header(2)), None, "another packet");
        let other = Header { protocol: Protocol::ICMP, ..header(1) };
        assert_eq!(fragments.way(start, &other), None, "another protocol");
        assert_eq!(fragments.way(start + REMEMBERED - Duration::from_micros(1), &header(1)), Some(on(1)));
        assert_eq!(fragments.way(start + REMEMBERED, &header(1)), None);
        fragments.remember(start + REMEMBERED, &header(1), on(2));
        assert_eq!(
            fragments.way(start + REMEMBERED, &header(1)),
            Some(on(2)),
            "the identification came round"
        );
    }

    #[test]
    fn the_table_keeps_its_bound_and_forgets_the_oldest() {
        let mut fragments = Fragments::default();
        let now = Instant::ZERO;
        let max = limits::PACKET_FRAGMENTED_MAX as u16;
        for ident in 0..=max {
            fragments.remember(now, &header(ident), on(1));
        }
        assert_eq!(fragments.remembered.len(), usize::from(max));
        assert_eq!(fragments.places.len(), usize::from(max));
        assert_eq!(fragments.way(now, &header(0)), None);
        assert_eq!(fragments.way(now, &header(1)), Some(on(1)));
        assert_eq!(fragments.way(now, &header(max)), Some(on(1)));
    }

    #[test]
    fn what_is_held_keeps_its_bounds_and_its_order() {
        let mut fragments = Fragments::default();
        let now = Instant::ZERO;
        for n in 0..limits::PACKET_FRAGMENTS_HELD_MAX as u8 {
            assert_eq!(fragments.hold(now, &header(u16::from(n % 2)), &[n]), 0);
        }
        assert_eq!(fragments.hold(now, &header(0), &[99]), 1, "the first of all made room");
        assert_eq!(fragments.take_held(&header(0)).as_deref(), Some(&[2][..]));
        assert_eq!(fragments.take_held(&header(1)).as_deref(), Some(&[1][..]));
        assert_eq!(fragments.take_held(&header(7)), None);
        let whole = vec![0; limits::PACKET_FRAGMENTS_HELD_BYTES_MAX];
        assert_eq!(fragments.hold(now, &header(3), &whole), fragments_left());
        assert_eq!(fragments.held_bytes(), whole.len());
        assert_eq!(fragments.hold(now, &header(3), &vec![0; whole.len() + 1]), 1, "too long for the pool");
        assert_eq!(fragments.next_deadline(), Some(now + HELD));
        assert_eq!(fragments.expire(now + HELD - Duration::from_micros(1)), 0);
        assert_eq!(fragments.expire(now + HELD), 1);
        assert_eq!((fragments.held_bytes(), fragments.next_deadline()), (0, None));
    }

    /// All that were held before one as long as the pool came, less the two that were taken.
    fn fragments_left() -> u64 {
        limits::PACKET_FRAGMENTS_HELD_MAX as u64 - 2
    }
}
