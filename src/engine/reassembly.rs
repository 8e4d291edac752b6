//! IPv4 fragments of the guest put together (RFC 791, 3.2; RFC 815), in bounded memory and time.
//!
//! Fragments that overlap with other bytes poison their datagram (RFC 5722's rule, applied to IPv4).

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::core::Core;
use super::counters::DropReason;
use crate::limits;
use crate::time::Instant;
use crate::wire::ipv4::{Header, Protocol};

/// How long an incomplete datagram is kept (RFC 791, 3.2 names 15 s as the lower bound).
const LIFETIME: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: Protocol,
    ident: u16,
}

#[derive(Debug)]
struct Datagram {
    started: Instant,
    /// Sorted, without overlap: (offset, bytes).
    pieces: Vec<(usize, Box<[u8]>)>,
    held_bytes: usize,
    total_bytes: Option<usize>,
}

/// Datagrams under way.
#[derive(Debug, Default)]
pub struct Reassembly {
    datagrams: HashMap<Key, Datagram>,
    held_bytes: usize,
}

impl Reassembly {
    /// Takes one fragment's payload; returns the whole datagram's when it is complete.
    pub fn add(&mut self, core: &mut Core, header: &Header, payload: &[u8]) -> Option<Vec<u8>> {
        self.expire(core);
        let key = Key { src: header.src, dst: header.dst, protocol: header.protocol, ident: header.ident };
        let offset = usize::from(header.fragment_offset_bytes);
        let end = offset + payload.len();
        let aligned = !header.more_fragments || payload.len().is_multiple_of(8);
        if payload.is_empty()
            || !aligned
            || end > 65_535 - usize::from(crate::wire::ipv4::HEADER_BYTES as u16)
        {
            core.counters.drop(DropReason::Malformed);
            return None;
        }
        self.make_room(core, &key, payload.len());
        let datagram = self.datagrams.entry(key).or_insert_with(|| Datagram {
            started: core.now,
            pieces: Vec::new(),
            held_bytes: 0,
            total_bytes: None,
        });
        if !datagram.insert(offset, payload, header.more_fragments) {
            core.counters.drop(DropReason::Fragment);
            self.forget(&key);
            return None;
        }
        self.held_bytes = self.datagrams.values().map(|d| d.held_bytes).sum();
        let datagram = &self.datagrams[&key];
        if datagram.total_bytes != Some(datagram.held_bytes) {
            return None;
        }
        let datagram = self.forget(&key)?;
        let mut whole = Vec::with_capacity(datagram.held_bytes);
        for (_, bytes) in datagram.pieces {
            whole.extend_from_slice(&bytes);
        }
        Some(whole)
    }

    /// Payload bytes held.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    fn forget(&mut self, key: &Key) -> Option<Datagram> {
        let datagram = self.datagrams.remove(key)?;
        self.held_bytes = self.held_bytes.saturating_sub(datagram.held_bytes);
        Some(datagram)
    }

    fn expire(&mut self, core: &mut Core) {
        let now = core.now;
        let before = self.datagrams.len();
        self.datagrams.retain(|_, datagram| now.since(datagram.started) < LIFETIME);
        for _ in self.datagrams.len()..before {
            core.counters.drop(DropReason::Fragment);
        }
    }

    /// Makes room for `len` more bytes by giving up the oldest datagrams but `key`'s own.
    fn make_room(&mut self, core: &mut Core, key: &Key, len: usize) {
        self.held_bytes = self.datagrams.values().map(|d| d.held_bytes).sum();
        while self.held_bytes + len > limits::REASSEMBLY_BYTES_MAX
            || (self.datagrams.len() >= limits::REASSEMBLY_DATAGRAMS_MAX && !self.datagrams.contains_key(key))
        {
            let oldest = self.datagrams.iter().filter(|(k, _)| *k != key).min_by_key(|(_, d)| d.started);
            let Some((&oldest, _)) = oldest else { return };
            core.counters.drop(DropReason::Fragment);
            self.forget(&oldest);
        }
    }
}

impl Datagram {
    /// Adds a piece; false if it contradicts what is held or a bound is met. An exact repetition is
    /// accepted and ignored.
    fn insert(&mut self, offset: usize, bytes: &[u8], more: bool) -> bool {
        let end = offset + bytes.len();
        if !more {
            let beyond = self.pieces.last().is_some_and(|(at, last)| at + last.len() > end);
            if beyond || self.total_bytes.is_some_and(|total| total != end) {
                return false;
            }
            self.total_bytes = Some(end);
        }
        if self.total_bytes.is_some_and(|total| end > total) {
            return false;
        }
        let at = self.pieces.partition_point(|(start, _)| *start < offset);
        if let Some((start, same)) = self.pieces.get(at)
            && *start == offset
        {
            return same[..] == *bytes;
        }
        let overlaps_before = at > 0 && self.pieces[at - 1].0 + self.pieces[at - 1].1.len() > offset;
        let overlaps_after = self.pieces.get(at).is_some_and(|(start, _)| *start < end);
        if overlaps_before || overlaps_after || self.pieces.len() >= limits::REASSEMBLY_FRAGMENTS_MAX {
            return false;
        }
        self.pieces.insert(at, (offset, bytes.into()));
        self.held_bytes += bytes.len();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{IpMtu, Lan};

    fn core() -> Core {
        Core::new(Lan {
            subnet: "10.0.2.0/24".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 0, 2, 1),
            guest: None,
            ip_mtu: IpMtu::DEFAULT,
            dhcp: true,
        })
    }

    fn fragment(ident: u16, offset: u16, more: bool) -> Header {
        Header {
            src: Ipv4Addr::new(10, 0, 2, 2),
            dst: Ipv4Addr::new(192, 0, 2, 2),
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            ident,
            dont_fragment: false,
            more_fragments: more,
            fragment_offset_bytes: offset,
            header_bytes: 20,
            payload_bytes: 0,
        }
    }

    #[test]
    fn fragments_in_any_order_make_the_datagram() {
        let (mut core, mut table) = (core(), Reassembly::default());
        let data: Vec<u8> = (0..4000u32).map(|n| n as u8).collect();
        for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
            let mut whole = None;
            for n in order {
                let from = n * 1480;
                let to = (from + 1480).min(data.len());
                let header = fragment(7, from as u16, to < data.len());
                assert!(whole.is_none());
                whole = table.add(&mut core, &header, &data[from..to]);
            }
            assert_eq!(whole.as_deref(), Some(&data[..]));
            assert_eq!(table.held_bytes(), 0);
        }
    }

    #[test]
    fn overlapping_fragments_poison_their_datagram() {
        let (mut core, mut table) = (core(), Reassembly::default());
        assert!(table.add(&mut core, &fragment(1, 0, true), &[1; 16]).is_none());
        assert!(table.add(&mut core, &fragment(1, 8, false), &[2; 16]).is_none());
        assert_eq!(core.counters.dropped(DropReason::Fragment), 1);
        assert_eq!(table.held_bytes(), 0);
    }

    #[test]
    fn an_exact_repetition_is_harmless() {
        let (mut core, mut table) = (core(), Reassembly::default());
        assert!(table.add(&mut core, &fragment(1, 0, true), &[1; 16]).is_none());
        assert!(table.add(&mut core, &fragment(1, 0, true), &[1; 16]).is_none());
        let whole = table.add(&mut core, &fragment(1, 16, false), &[2; 3]);
        assert_eq!(whole.map(|w| w.len()), Some(19));
    }

    #[test]
    fn one_datagram_past_the_bound_replaces_the_oldest() {
        let (mut core, mut table) = (core(), Reassembly::default());
        for ident in 0..=limits::REASSEMBLY_DATAGRAMS_MAX as u16 {
            core.now = Instant::from_micros(u64::from(ident));
            assert!(table.add(&mut core, &fragment(ident, 0, true), &[0; 8]).is_none());
        }
        assert_eq!(table.datagrams.len(), limits::REASSEMBLY_DATAGRAMS_MAX);
        assert!(table.add(&mut core, &fragment(0, 8, false), &[0; 8]).is_none(), "the first is gone");
        assert!(table.add(&mut core, &fragment(5, 8, false), &[0; 8]).is_some());
    }

    #[test]
    fn an_incomplete_datagram_is_given_up_after_its_lifetime() {
        let (mut core, mut table) = (core(), Reassembly::default());
        table.add(&mut core, &fragment(1, 0, true), &[0; 8]);
        core.now = core.now + LIFETIME;
        assert!(table.add(&mut core, &fragment(1, 8, false), &[0; 8]).is_none());
        assert_eq!(core.counters.dropped(DropReason::Fragment), 1);
    }
}
