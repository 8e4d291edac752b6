//! IPv4 fragments of the guest put together, in bounded memory and time.
//!
//! A fragment that overlaps bytes already there poisons its datagram: it is dropped with everything that
//! still comes of it (RFC 5722's rule, applied to IPv4). An exact repetition is ignored. A datagram that
//! is not complete in time is dropped, and its sender told if the first fragment came (RFC 792, time
//! exceeded). Memory is shared fairly: the source that holds most makes room, with its oldest datagram.
//!
//! Read first: RFC 791, 3.2; RFC 815; RFC 1122, 3.3.2; RFC 5722.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::core::{Core, Neighbour};
use super::counters::DropReason;
use super::emit;
use super::guest_port::GuestPort;
use crate::limits;
use crate::time::Instant;
use crate::wire::icmpv4::Message;
use crate::wire::ipv4::{self, Header, Protocol};

/// How long an incomplete datagram is kept. RFC 791, 3.2 names 15 s; RFC 1122's minute is for paths whose
/// delay varies, and the guest's link has none.
const LIFETIME: Duration = Duration::from_secs(15);

/// Time exceeded: of putting fragments together (RFC 792).
const REASSEMBLY_TIMED_OUT: Message = Message::TimeExceeded { code: 1 };

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
    from: Neighbour,
    /// The first fragment's header, once it came.
    first: Option<Header>,
    /// Sorted, without overlap: (offset, bytes).
    pieces: Vec<(usize, Box<[u8]>)>,
    held_bytes: usize,
    total_bytes: Option<usize>,
    /// It contradicted itself; what comes of it is dropped until its time is over.
    poisoned: bool,
}

/// Datagrams under way.
#[derive(Debug, Default)]
pub struct Reassembly {
    datagrams: HashMap<Key, Datagram>,
    held_bytes: usize,
}

impl Reassembly {
    /// Takes one fragment's payload; returns the whole datagram's when it is complete.
    pub fn add(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        from: Neighbour,
        header: &Header,
        payload: &[u8],
    ) -> Option<Vec<u8>> {
        self.expire(core, port);
        if !is_possible(header, payload) {
            core.counters.drop(DropReason::Malformed);
            return None;
        }
        let key = Key { src: header.src, dst: header.dst, protocol: header.protocol, ident: header.ident };
        self.make_room(core, &key, payload.len());
        let datagram = self.datagrams.entry(key).or_insert_with(|| Datagram::new(core.now, from));
        let before = datagram.held_bytes;
        if datagram.poisoned || !datagram.insert(header, payload) {
            core.counters.drop(DropReason::Fragment);
            datagram.poison();
            self.held_bytes -= before;
            return None;
        }
        self.held_bytes += datagram.held_bytes - before;
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

    /// When the time of the oldest datagram is over.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.datagrams.values().map(|datagram| datagram.started + LIFETIME).min()
    }

    /// Gives up datagrams whose time is over; those who sent them are told.
    pub fn expire(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        while self.next_deadline().is_some_and(|at| at <= core.now)
            && let Some(oldest) = self.oldest(|_| true)
            && let Some(datagram) = self.forget(&oldest)
        {
            if datagram.poisoned {
                continue;
            }
            core.counters.drop_aside(DropReason::FragmentHole);
            if let Some(first) = datagram.first_fragment() {
                core.send_icmp_error(port, datagram.from, REASSEMBLY_TIMED_OUT, &first);
            }
        }
    }

    fn oldest(&self, pick: impl Fn(&Key) -> bool) -> Option<Key> {
        let candidates = self.datagrams.iter().filter(|(key, _)| pick(key));
        candidates.min_by_key(|(_, datagram)| datagram.started).map(|(key, _)| *key)
    }

    fn forget(&mut self, key: &Key) -> Option<Datagram> {
        let datagram = self.datagrams.remove(key)?;
        self.held_bytes -= datagram.held_bytes;
        Some(datagram)
    }

    /// Makes room for `len` more bytes of `own`, which itself stays.
    fn make_room(&mut self, core: &mut Core, own: &Key, len: usize) {
        loop {
            let greediest = if self.held_bytes + len > limits::REASSEMBLY_BYTES_MAX {
                self.greediest(own, |datagram| datagram.held_bytes)
            } else if self.datagrams.len() >= limits::REASSEMBLY_DATAGRAMS_MAX
                && !self.datagrams.contains_key(own)
            {
                self.greediest(own, |_| 1)
            } else {
                return;
            };
            let Some(oldest) = greediest.and_then(|src| self.oldest(|key| key.src == src && key != own))
            else {
                return;
            };
            core.counters.drop_aside(DropReason::TableFull);
            self.forget(&oldest);
        }
    }

    /// The source whose datagrams but `own` hold the most of what `measure` says.
    fn greediest(&self, own: &Key, measure: impl Fn(&Datagram) -> usize) -> Option<Ipv4Addr> {
        let mut held: HashMap<Ipv4Addr, usize> = HashMap::new();
        for (key, datagram) in self.datagrams.iter().filter(|(key, _)| *key != own) {
            *held.entry(key.src).or_default() += measure(datagram);
        }
        held.into_iter().max_by_key(|(_, held)| *held).map(|(src, _)| src)
    }
}

/// Whether a fragment can be part of a packet: it has bytes, ends at a multiple of eight unless it is the
/// last, and within the longest packet.
fn is_possible(header: &Header, payload: &[u8]) -> bool {
    let end = usize::from(header.fragment_offset_bytes) + payload.len();
    let is_aligned = !header.more_fragments || payload.len().is_multiple_of(8);
    !payload.is_empty() && is_aligned && end <= ipv4::PACKET_BYTES_MAX - ipv4::HEADER_BYTES
}

impl Datagram {
    fn new(now: Instant, from: Neighbour) -> Datagram {
        Datagram {
            started: now,
            from,
            first: None,
            pieces: Vec::new(),
            held_bytes: 0,
            total_bytes: None,
            poisoned: false,
        }
    }

    fn poison(&mut self) {
        self.pieces = Vec::new();
        self.held_bytes = 0;
        self.poisoned = true;
    }

    /// Adds a piece; false if it contradicts what is held or a bound is met.
    fn insert(&mut self, header: &Header, bytes: &[u8]) -> bool {
        let offset = usize::from(header.fragment_offset_bytes);
        let end = offset + bytes.len();
        if !header.more_fragments {
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
        if offset == 0 {
            self.first = Some(*header);
        }
        self.pieces.insert(at, (offset, bytes.into()));
        self.held_bytes += bytes.len();
        true
    }

    /// The beginning of the first fragment as a packet, to quote; `None` if it did not come.
    fn first_fragment(&self) -> Option<Vec<u8>> {
        let (header, (_, bytes)) = self.first.as_ref().zip(self.pieces.first())?;
        let mut packet = vec![0u8; ipv4::HEADER_BYTES];
        header.emit(&mut packet);
        packet.extend_from_slice(&bytes[..bytes.len().min(emit::ICMP_QUOTE_BYTES_MAX)]);
        Some(packet)
    }
}
