//! External ports: which end of a guest has which, shared by all workers.
//!
//! A *mapping* joins a guest's end to an external port and lasts while any flow uses it. Its *scope* says how much of the
//! world it speaks to: all of it (endpoint-independent), one address, one end. A port belongs to one mapping.
//! Where the range has no free port left, a new mapping of TCP, or of one remote end, *shares* one: its flow is told from the others of that
//! port by its remote end alone, which must differ from theirs. Other ends are refused: endpoint-independent is what they are promised. Flows are a worker's own, so a
//! port is shared only among flows of one worker, which asks its own table.
//!
//! Protocols without ports are mapped by address: one guest for each protocol and remote address.
//!
//! | asked for | granted |
//! |---|---|
//! | an end that has a mapping | its port, unless there another end's flow, or another worker's, may have the same remote end: then as if the range were exhausted |
//! | a new end | its own port if in range and free; else a free one at random, for UDP of the same parity if there is one |
//! | a new end of TCP, or of scope end, range exhausted | a shared port whose flows have other remote ends, counted |
//! | a new end, and none is found | refused, counted |
//!
//! This is behind a lock, taken when a flow begins or ends and for a packet nobody knows, never for a packet of a known flow.
//!
//! Read first: RFC 4787, 4; RFC 5382, 4; RFC 5508, 3.1; RFC 6056, 3.3; RFC 7857, 2 and 3.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

use hashbrown::HashMap;
use slab::Slab;
use thiserror::Error;

use super::random::Random;
use crate::engine::placement::WorkerId;
use crate::limits;
use crate::wire::ipv4::Protocol;

/// Workers, one bit each: [`limits::QUEUE_PAIRS_MAX`] of them at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerSet(u16);

impl WorkerSet {
    /// Only `worker`.
    pub fn of(worker: WorkerId) -> WorkerSet {
        WorkerSet(1 << (worker.0 & 15))
    }

    /// Whether `worker` is one of them.
    pub fn has(self, worker: WorkerId) -> bool {
        self.0 & WorkerSet::of(worker).0 != 0
    }

    /// These and `worker`.
    pub fn with(self, worker: WorkerId) -> WorkerSet {
        WorkerSet(self.0 | WorkerSet::of(worker).0)
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = WorkerId> {
        (0..16).map(WorkerId).filter(move |worker| self.has(*worker))
    }
}

const _: () = assert!(limits::QUEUE_PAIRS_MAX <= 16);

/// A guest's end. A protocol without ports has zero for the port, ICMP the echo's identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestEnd {
    /// Protocol of its packets.
    pub protocol: Protocol,
    /// Its address.
    pub addr: Ipv4Addr,
    /// Its port.
    pub port: u16,
}

/// How much of the world a mapping speaks to (RFC 4787, 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of it: endpoint-independent.
    World,
    /// One address.
    Address(Ipv4Addr),
    /// One end: address and port.
    End(Ipv4Addr, u16),
}

/// An external port that is granted to a flow; given back with [`Mappings::end`] when the flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The port, zero for protocols without ports.
    pub external_port: u16,
    /// Whether it is shared with flows of other mappings, which differ by their remote ends.
    pub shared: bool,
}

/// What is asked for a flow that begins.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The guest's end.
    pub guest: GuestEnd,
    /// How much of the world its mapping speaks to.
    pub scope: Scope,
    /// The worker whose flow it is.
    pub worker: WorkerId,
}

impl Request {
    /// Whether its flow may have a port with others that differ by their remote ends alone. TCP may, as a
    /// connection is between two ends anyway. An end of UDP that is to look the same to all of the world must not
    /// (RFC 4787, REQ-1): who tells others its end by STUN would be reached there by nobody. So with questions of ICMP.
    fn may_share(&self) -> bool {
        self.guest.protocol == Protocol::TCP || matches!(self.scope, Scope::End(..))
    }
}

/// Why no port is granted.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refused {
    /// The range is exhausted, and every port looked at has a flow to the same remote end.
    #[error("no external port is free for this remote end")]
    Exhausted,
    /// A protocol without ports, and another guest speaks it with this address.
    #[error("another guest speaks this protocol with this address")]
    AddressTaken,
}

/// What happened, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Flows that share a port because the range was exhausted.
    pub shared: u64,
    /// Flows refused because none was found even so.
    pub refused: u64,
}

/// A mapping as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingInfo {
    /// The guest's end.
    pub guest: GuestEnd,
    /// How much of the world it speaks to.
    pub scope: Scope,
    /// Its port.
    pub external_port: u16,
    /// Flows that use it, shared ones of other mappings not counted.
    pub flows: u32,
    /// Workers that have had flows of it, or of those that share its port.
    pub workers: WorkerSet,
    /// Of a published port: the guest's end it leads to.
    pub leads_to: Option<(Ipv4Addr, u16)>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    guest: GuestEnd,
    scope: Scope,
    external_port: u16,
    flows: u32,
    workers: WorkerSet,
    /// Of a published port, which stays without flows: the guest's end it leads to.
    leads_to: Option<(Ipv4Addr, u16)>,
}

/// Flows that share a port, and the one worker they may belong to.
#[derive(Clone, Copy, Debug)]
struct Sharing {
    flows: u32,
    worker: WorkerId,
}

/// What a protocol's ports are used for.
#[derive(Debug)]
struct Space {
    /// Ports that have a mapping, or flows that share them.
    taken: Box<[u64; WORDS]>,
    by_port: HashMap<u16, usize, foldhash::quality::RandomState>,
    sharing: HashMap<u16, Sharing, foldhash::quality::RandomState>,
    /// Where looking for a port to share goes on.
    next_shared: u16,
}

const WORDS: usize = (1 << 16) / 64;

impl Space {
    fn new(next_shared: u16) -> Space {
        Space {
            taken: Box::new([0; WORDS]),
            by_port: HashMap::default(),
            sharing: HashMap::default(),
            next_shared,
        }
    }

    fn is_taken(&self, port: u16) -> bool {
        self.taken[usize::from(port) / 64] & 1 << (port % 64) != 0
    }

    fn take(&mut self, port: u16, mapping: usize) {
        self.taken[usize::from(port) / 64] |= 1 << (port % 64);
        self.by_port.insert(port, mapping);
    }

    /// The port's mapping is gone.
    fn release(&mut self, port: u16) {
        self.by_port.remove(&port);
        self.free_unused(port);
    }

    /// One flow more shares the port.
    fn begin_sharing(&mut self, port: u16, worker: WorkerId) {
        self.taken[usize::from(port) / 64] |= 1 << (port % 64);
        self.sharing.entry(port).or_insert(Sharing { flows: 0, worker }).flows += 1;
    }

    /// A flow that shared the port has ended.
    fn end_sharing(&mut self, port: u16) {
        let Some(sharing) = self.sharing.get_mut(&port) else { return };
        sharing.flows -= 1;
        if sharing.flows == 0 {
            self.sharing.remove(&port);
            self.free_unused(port);
        }
    }

    fn free_unused(&mut self, port: u16) {
        if !self.by_port.contains_key(&port) && !self.sharing.contains_key(&port) {
            self.taken[usize::from(port) / 64] &= !(1 << (port % 64));
        }
    }

    /// The first free port of those in `parity`, one bit a port of a word, between both ends.
    fn first_free(&self, from: u16, to: u16, parity: u64) -> Option<u16> {
        let (first, last) = (usize::from(from) / 64, usize::from(to) / 64);
        for word in first..=last {
            let mut free = !self.taken[word] & parity;
            if word == first {
                free &= u64::MAX << (from % 64);
            }
            if word == last {
                free &= u64::MAX >> (63 - to % 64);
            }
            if free != 0 {
                return Some((word * 64) as u16 + free.trailing_zeros() as u16);
            }
        }
        None
    }
}

/// All mappings of a process.
#[derive(Debug)]
pub struct Mappings {
    range: RangeInclusive<u16>,
    mappings: Slab<Mapping>,
    by_guest: HashMap<(GuestEnd, Scope), usize, foldhash::quality::RandomState>,
    /// TCP, UDP and ICMP.
    spaces: [Space; 3],
    by_address: HashMap<(Protocol, Ipv4Addr), usize, foldhash::quality::RandomState>,
    random: Random,
    counters: PortCounters,
}

impl Mappings {
    /// No mappings yet, with the ports of `range`, which is not empty; `seed` comes from the operating system's randomness.
    pub fn new(range: RangeInclusive<u16>, seed: (u64, u64)) -> Mappings {
        let mut random = Random::new(seed);
        let mut space = || {
            let count = u32::from(range.end().saturating_sub(*range.start())) + 1;
            Space::new(range.start().saturating_add(random.below(count) as u16))
        };
        Mappings {
            spaces: [space(), space(), space()],
            range,
            mappings: Slab::new(),
            by_guest: HashMap::default(),
            by_address: HashMap::default(),
            random,
            counters: PortCounters::default(),
        }
    }

    /// What happened so far.
    pub fn counters(&self) -> PortCounters {
        self.counters
    }

    /// Mappings there are, published ports included.
    pub fn len(&self) -> usize {
        self.mappings.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = MappingInfo> {
        self.mappings.iter().map(|(_, mapping)| mapping.info())
    }

    /// Gives the guest's end this external port for good, whether in the range or not, so that it leads there; flows the
    /// guest begins there have the same. `false` if the port or the end has another mapping.
    pub fn publish(&mut self, guest: GuestEnd, external_port: u16) -> bool {
        self.publish_for(guest, external_port, (guest.addr, guest.port))
    }

    /// The same where `stand_in` holds the port for the guest's end it leads to, which has another port outside.
    pub fn publish_for(&mut self, stand_in: GuestEnd, external_port: u16, leads_to: (Ipv4Addr, u16)) -> bool {
        let guest = stand_in;
        let Some(space) = space_of(guest.protocol) else { return false };
        let key = (guest, Scope::World);
        if let Some(at) = self.by_guest.get(&key) {
            let mapping = &mut self.mappings[*at];
            // Clients could be those whom flows of other ends that share the port speak to.
            let same = mapping.external_port == external_port
                && !self.spaces[space].sharing.contains_key(&external_port);
            if same {
                mapping.leads_to = Some(leads_to);
            }
            return same;
        }
        if self.spaces[space].is_taken(external_port)
            || self.spaces[space].sharing.contains_key(&external_port)
        {
            return false;
        }
        self.add(Mapping { leads_to: Some(leads_to), ..Mapping::new(guest, Scope::World, external_port) });
        true
    }

    /// Takes what [`Mappings::publish`] gave; flows under way keep it until they end.
    pub fn unpublish(&mut self, guest: GuestEnd) {
        let Some(at) = self.by_guest.get(&(guest, Scope::World)).copied() else { return };
        self.mappings[at].leads_to = None;
        self.remove_unused(at);
    }

    /// The mapping an external port belongs to; for protocols without ports, of this remote address.
    pub fn of_port(&self, protocol: Protocol, external_port: u16, remote: Ipv4Addr) -> Option<MappingInfo> {
        let at = match space_of(protocol) {
            Some(space) => self.spaces[space].by_port.get(&external_port)?,
            None => self.by_address.get(&(protocol, remote))?,
        };
        Some(self.mappings[*at].info())
    }

    /// The mapping of a guest's end.
    pub fn of_guest(&self, guest: GuestEnd, scope: Scope) -> Option<MappingInfo> {
        self.by_guest.get(&(guest, scope)).map(|at| self.mappings[*at].info())
    }

    /// The workers that may have a flow of this external port.
    pub fn workers_of_port(&self, protocol: Protocol, external_port: u16, remote: Ipv4Addr) -> WorkerSet {
        let own = self.of_port(protocol, external_port, remote).map(|info| info.workers).unwrap_or_default();
        let sharing = space_of(protocol).and_then(|space| self.spaces[space].sharing.get(&external_port));
        sharing.map_or(own, |sharing| own.with(sharing.worker))
    }

    /// A flow of this external port is `worker`'s from now on.
    pub fn joins(&mut self, protocol: Protocol, external_port: u16, worker: WorkerId) {
        let space = space_of(protocol);
        if let Some(at) = space.and_then(|space| self.spaces[space].by_port.get(&external_port)) {
            let mapping = &mut self.mappings[*at];
            mapping.workers = mapping.workers.with(worker);
        }
    }

    /// Grants a port to a flow that begins. `in_use` says whether the worker has a flow of this protocol with the external
    /// port given and the new flow's remote end.
    ///
    /// # Errors
    /// [`Refused`], counted; nothing has changed then.
    pub fn begin(&mut self, request: &Request, in_use: impl Fn(u16) -> bool) -> Result<Grant, Refused> {
        let Some(space) = space_of(request.guest.protocol) else { return self.begin_by_address(request) };
        if let Some(at) = self.by_guest.get(&(request.guest, request.scope)).copied() {
            let port = self.mappings[at].external_port;
            let others = self.spaces[space].sharing.get(&port).map(|sharing| sharing.worker);
            if others.is_none_or(|worker| worker == request.worker && !in_use(port)) {
                return Ok(self.join(at, request.worker));
            }
        } else if let Some(port) = self.free_port(space, request.guest) {
            let at = self.add(Mapping::new(request.guest, request.scope, port));
            return Ok(self.join(at, request.worker));
        }
        let grant = if request.may_share() {
            self.share(space, request.worker, in_use)
        } else {
            Err(Refused::Exhausted)
        };
        match grant {
            Ok(_) => self.counters.shared += 1,
            Err(_) => self.counters.refused += 1,
        }
        grant
    }

    fn begin_by_address(&mut self, request: &Request) -> Result<Grant, Refused> {
        let (Scope::Address(remote) | Scope::End(remote, _)) = request.scope else {
            unreachable!("a protocol without ports is mapped by address");
        };
        let key = (request.guest.protocol, remote);
        let at = match self.by_address.get(&key).copied() {
            Some(at) if self.mappings[at].guest != request.guest => {
                self.counters.refused += 1;
                return Err(Refused::AddressTaken);
            }
            Some(at) => at,
            None => self.add(Mapping::new(request.guest, Scope::Address(remote), 0)),
        };
        Ok(self.join(at, request.worker))
    }

    fn join(&mut self, at: usize, worker: WorkerId) -> Grant {
        let mapping = &mut self.mappings[at];
        mapping.flows += 1;
        mapping.workers = mapping.workers.with(worker);
        Grant { external_port: mapping.external_port, shared: false }
    }

    /// Gives back what [`Mappings::begin`] granted.
    pub fn end(&mut self, guest: GuestEnd, scope: Scope, grant: Grant) {
        let space = space_of(guest.protocol);
        if let (true, Some(space)) = (grant.shared, space) {
            self.spaces[space].end_sharing(grant.external_port);
            return;
        }
        let scope = match (scope, space) {
            (Scope::End(remote, _), None) => Scope::Address(remote),
            (scope, _) => scope,
        };
        if let Some(at) = self.by_guest.get(&(guest, scope)).copied() {
            self.mappings[at].flows -= 1;
            self.remove_unused(at);
        }
    }

    /// A free port of the range for a new mapping.
    fn free_port(&mut self, space: usize, guest: GuestEnd) -> Option<u16> {
        let of = &self.spaces[space];
        if self.range.contains(&guest.port) && !of.is_taken(guest.port) {
            return Some(guest.port);
        }
        let (start, end) = (*self.range.start(), *self.range.end());
        let from = start + self.random.below(u32::from(end - start) + 1) as u16;
        let same = if guest.port.is_multiple_of(2) { EVEN } else { !EVEN };
        let parities: &[u64] = if guest.protocol == Protocol::UDP { &[same, !same] } else { &[u64::MAX] };
        let search =
            |parity: &u64| of.first_free(from, end, *parity).or_else(|| of.first_free(start, from, *parity));
        parities.iter().find_map(search)
    }

    /// A port of the range that flows of other mappings have, none of them to the new flow's remote end.
    fn share(
        &mut self,
        space: usize,
        worker: WorkerId,
        in_use: impl Fn(u16) -> bool,
    ) -> Result<Grant, Refused> {
        let (start, end) = (*self.range.start(), *self.range.end());
        let space = &mut self.spaces[space];
        let only = WorkerSet::of(worker).0;
        for _ in 0..limits::PACKET_PORTS_TRIED {
            let port = space.next_shared;
            space.next_shared = if port >= end { start } else { port + 1 };
            let owner = space.by_port.get(&port).map(|at| &self.mappings[*at]);
            let is_ours = owner.is_none_or(|own| own.leads_to.is_none() && own.workers.0 | only == only);
            let with_ours = space.sharing.get(&port).is_none_or(|sharing| sharing.worker == worker);
            if is_ours && with_ours && !in_use(port) {
                space.begin_sharing(port, worker);
                return Ok(Grant { external_port: port, shared: true });
            }
        }
        Err(Refused::Exhausted)
    }

    fn add(&mut self, mapping: Mapping) -> usize {
        let at = self.mappings.insert(mapping);
        self.by_guest.insert((mapping.guest, mapping.scope), at);
        match (space_of(mapping.guest.protocol), mapping.scope) {
            (Some(space), _) => self.spaces[space].take(mapping.external_port, at),
            (None, Scope::Address(remote)) => {
                self.by_address.insert((mapping.guest.protocol, remote), at);
            }
            (None, _) => unreachable!("a protocol without ports is mapped by address"),
        }
        at
    }

    fn remove_unused(&mut self, at: usize) {
        let mapping = self.mappings[at];
        if mapping.flows > 0 || mapping.leads_to.is_some() {
            return;
        }
        self.mappings.remove(at);
        self.by_guest.remove(&(mapping.guest, mapping.scope));
        match (space_of(mapping.guest.protocol), mapping.scope) {
            (Some(space), _) => self.spaces[space].release(mapping.external_port),
            (None, Scope::Address(remote)) => {
                self.by_address.remove(&(mapping.guest.protocol, remote));
            }
            (None, _) => {}
        }
    }
}

/// The even ports of a word of 64.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// Which protocols have ports, or what serves as one.
fn space_of(protocol: Protocol) -> Option<usize> {
    match protocol {
        Protocol::TCP => Some(0),
        Protocol::UDP => Some(1),
        Protocol::ICMP => Some(2),
        _ => None,
    }
}

impl Mapping {
    fn new(guest: GuestEnd, scope: Scope, external_port: u16) -> Mapping {
        Mapping { guest, scope, external_port, flows: 0, workers: WorkerSet::default(), leads_to: None }
    }

    fn info(&self) -> MappingInfo {
        MappingInfo {
            guest: self.guest,
            scope: self.scope,
            external_port: self.external_port,
            flows: self.flows,
            workers: self.workers,
            leads_to: self.leads_to,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap as Map, HashSet};

    const RANGE: RangeInclusive<u16> = 49_152..=65_535;

    fn guest(last: u8, port: u16) -> GuestEnd {
        GuestEnd { protocol: Protocol::TCP, addr: Ipv4Addr::new(10, 0, 2, last), port }
    }

    fn request(guest: GuestEnd) -> Request {
        Request { guest, scope: Scope::World, worker: WorkerId(0) }
    }

    #[test]
    fn an_end_keeps_its_own_port_where_it_can_and_always_the_same() {
        let mut ports = Mappings::new(RANGE, (1, 2));
        let own = ports.begin(&request(guest(2, 50_000)), |_| false).unwrap();
        assert_eq!(own, Grant { external_port: 50_000, shared: false });
        let taken = ports.begin(&request(guest(3, 50_000)), |_| false).unwrap();
        assert!(RANGE.contains(&taken.external_port) && taken.external_port != 50_000);
        assert_eq!(ports.begin(&request(guest(3, 50_000)), |_| false), Ok(taken));
        let outside = ports.begin(&request(guest(2, 1024)), |_| false).unwrap();
        assert!(RANGE.contains(&outside.external_port));
        for (end, grant) in [(guest(3, 50_000), taken), (guest(2, 50_000), own), (guest(2, 1024), outside)] {
            ports.end(end, Scope::World, grant);
        }
        assert!(ports.of_guest(guest(3, 50_000), Scope::World).is_some(), "one flow of it is left");
        ports.end(guest(3, 50_000), Scope::World, taken);
        assert!(ports.is_empty());
    }

    #[test]
    fn chosen_ports_are_spread_and_foretold_by_no_other_seed() {
        let choose = |seed| {
            let mut ports = Mappings::new(RANGE, seed);
            (0..64).map(|n| ports.begin(&request(guest(2, n)), |_| false).unwrap().external_port).collect()
        };
        let (one, other): (Vec<u16>, Vec<u16>) = (choose((1, 2)), choose((1, 3)));
        assert_eq!(one, choose((1, 2)));
        assert!(one.iter().zip(&other).filter(|(a, b)| a == b).count() < 4);
        let next_to = one.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) < 256).count();
        assert!(next_to < 10, "{one:?}");
    }

    #[test]
    fn udp_keeps_the_parity_of_its_port_while_there_is_one() {
        let mut ports = Mappings::new(1000..=1009, (1, 2));
        let end = |n| GuestEnd { protocol: Protocol::UDP, ..guest(2, n) };
        let mut choose = |n| ports.begin(&request(end(n)), |_| false).unwrap().external_port % 2;
        assert_eq!([1, 3, 5, 7, 9].map(&mut choose), [1; 5]);
        assert_eq!(
            [11, 2, 4, 6, 8].map(&mut choose),
            [0; 5],
            "the sixth odd one gets an even port rather than none"
        );
    }

    #[test]
    fn the_16385th_connection_to_one_destination_is_refused_and_goes_on_to_another() {
        let mut ports = Mappings::new(RANGE, (1, 2));
        let to_one: HashSet<u16> = (0..16_384)
            .map(|n| ports.begin(&request(guest(2, n)), |_| false).unwrap())
            .map(|grant| {
                assert!(!grant.shared);
                grant.external_port
            })
            .collect();
        assert_eq!(to_one.len(), 16_384, "no port twice");
        for _ in 0..16 {
            let again = ports.begin(&request(guest(2, 16_384)), |port| to_one.contains(&port));
            assert_eq!(again, Err(Refused::Exhausted));
        }
        let elsewhere = ports.begin(&request(guest(2, 16_384)), |_| false).unwrap();
        assert!(elsewhere.shared && RANGE.contains(&elsewhere.external_port));
        assert_eq!(ports.counters(), PortCounters { shared: 1, refused: 16 });
    }

    #[test]
    fn repetitions_of_a_first_packet_find_the_only_port_without_a_flow_to_its_destination() {
        let mut ports = Mappings::new(RANGE, (1, 2));
        for n in 0..16_384 {
            ports.begin(&request(guest(2, n)), |_| false).unwrap();
        }
        let tries = (1..).find(|_| ports.begin(&request(guest(2, 20_000)), |port| port != 60_000).is_ok());
        assert!(tries.unwrap() <= 16_384_usize.div_ceil(limits::PACKET_PORTS_TRIED) + 1);
    }

    #[test]
    fn protocols_without_ports_are_one_guests_for_each_remote_address() {
        let mut ports = Mappings::new(RANGE, (1, 2));
        let gre = |last| GuestEnd { protocol: Protocol(47), ..guest(last, 0) };
        let remote = Ipv4Addr::new(192, 0, 2, 1);
        let ask = |last| Request { scope: Scope::Address(remote), ..request(gre(last)) };
        let grant = ports.begin(&ask(2), |_| false).unwrap();
        assert_eq!(ports.begin(&ask(2), |_| false), Ok(grant));
        assert_eq!(ports.begin(&ask(3), |_| false), Err(Refused::AddressTaken));
        assert_eq!(ports.of_port(Protocol(47), 0, remote).unwrap().guest, gre(2));
        ports.end(gre(2), Scope::Address(remote), grant);
        ports.end(gre(2), Scope::Address(remote), grant);
        assert!(ports.begin(&ask(3), |_| false).is_ok());
    }

    #[test]
    fn a_port_that_flows_share_is_published_once_they_have_ended() {
        let mut ports = Mappings::new(50_000..=50_000, (1, 2));
        let own = ports.begin(&request(guest(2, 50_000)), |_| false).unwrap();
        let shared = ports.begin(&request(guest(3, 7)), |_| false).unwrap();
        assert!(shared.shared && shared.external_port == own.external_port);
        assert!(!ports.publish(guest(2, 50_000), 50_000), "another guest's flow may have the client's end");
        assert_eq!(ports.of_port(Protocol::TCP, 50_000, Ipv4Addr::UNSPECIFIED).unwrap().leads_to, None);
        ports.end(guest(3, 7), Scope::World, shared);
        assert!(ports.publish(guest(2, 50_000), 50_000));
        assert!(ports.begin(&request(guest(3, 7)), |_| false).is_err(), "it is nobody else's now");
    }

    #[test]
    fn a_published_port_is_nobody_elses_and_the_guests_own_flows_leave_from_it() {
        let mut ports = Mappings::new(RANGE, (1, 2));
        assert!(ports.publish(guest(2, 80), 50_000));
        assert!(!ports.publish(guest(3, 80), 50_000));
        assert!(!ports.publish(guest(2, 80), 50_001));
        assert!(ports.publish(guest(2, 22), 2222), "outside of the range as well");
        let other = ports.begin(&request(guest(3, 50_000)), |_| false).unwrap();
        assert_ne!(other.external_port, 50_000);
        let own = ports.begin(&request(guest(2, 80)), |_| false).unwrap();
        assert_eq!(own.external_port, 50_000);
        ports.unpublish(guest(2, 80));
        assert_eq!(ports.begin(&request(guest(2, 80)), |_| false), Ok(own), "while a flow uses it");
        ports.end(guest(2, 80), Scope::World, own);
        ports.end(guest(2, 80), Scope::World, own);
        assert_eq!(ports.of_guest(guest(2, 80), Scope::World), None);
    }

    /// A flow as its worker's table has it.
    #[derive(Clone, Copy, Debug)]
    struct Live {
        asked: Request,
        remote: u8,
        grant: Grant,
    }

    proptest! {
        /// Few ports and many ends, so that sharing, its end and refusals are the rule.
        #[test]
        fn no_two_flows_of_any_workers_share_port_and_remote_end(
            changes in proptest::collection::vec((any::<bool>(), 0u16..12, 0u8..4, 0u8..3, 0u8..3, any::<usize>()), 1..400),
        ) {
            let mut ports = Mappings::new(8..=11, (7, 7));
            let mut live: Vec<Live> = Vec::new();
            for (ends, end, remote, worker, kind, which) in changes {
                if ends && !live.is_empty() {
                    let flow = live.swap_remove(which % live.len());
                    ports.end(flow.asked.guest, flow.asked.scope, flow.grant);
                    continue;
                }
                let scope = if kind == 2 { Scope::End(Ipv4Addr::new(192, 0, 2, remote), 80) } else { Scope::World };
                let protocol = if kind == 0 { Protocol::TCP } else { Protocol::UDP };
                let asked = Request { guest: GuestEnd { protocol, ..guest(2, end) }, scope, worker: WorkerId(worker) };
                if live.iter().any(|flow| flow.asked.guest == asked.guest && flow.remote == remote) {
                    continue;
                }
                let of_port = |port: u16| live.iter().filter(move |flow| {
                    flow.asked.guest.protocol == protocol && flow.grant.external_port == port
                });
                let in_use = |port: u16| of_port(port).any(|flow| flow.remote == remote && flow.asked.worker == asked.worker);
                match ports.begin(&asked, in_use) {
                    Ok(grant) => {
                        prop_assert!((8..=11).contains(&grant.external_port));
                        prop_assert!(!of_port(grant.external_port).any(|flow| flow.remote == remote), "{grant:?}");
                        let same_end = live.iter().find(|flow| {
                            (flow.asked.guest, flow.asked.scope) == (asked.guest, scope) && !flow.grant.shared
                        });
                        if let (Some(flow), false) = (same_end, grant.shared) {
                            prop_assert_eq!(flow.grant, grant, "endpoint-independent");
                        }
                        live.push(Live { asked, remote, grant });
                    }
                    Err(refused) => {
                        prop_assert_eq!(refused, Refused::Exhausted);
                        let own = ports.of_guest(asked.guest, scope);
                        for port in 8..=11 {
                            if !asked.may_share() {
                                prop_assert!(own.is_some() || of_port(port).count() > 0, "{port} is free");
                                continue;
                            }
                            let taken = of_port(port).any(|flow| flow.remote == remote);
                            let anothers = ports.workers_of_port(protocol, port, Ipv4Addr::UNSPECIFIED);
                            prop_assert!(taken || anothers.iter().any(|other| other != asked.worker), "{port}");
                        }
                    }
                }
                let mut used: Map<(Protocol, u16), u32> = Map::new();
                for flow in live.iter().filter(|flow| !flow.grant.shared) {
                    *used.entry((flow.asked.guest.protocol, flow.grant.external_port)).or_default() += 1;
                }
                let counted: Map<_, _> =
                    ports.iter().map(|info| ((info.guest.protocol, info.external_port), info.flows)).collect();
                prop_assert_eq!(counted, used);
            }
            for flow in live {
                ports.end(flow.asked.guest, flow.asked.scope, flow.grant);
            }
            prop_assert!(ports.is_empty());
            prop_assert!(ports.spaces.iter().all(|space| space.taken.iter().all(|word| *word == 0)));
            prop_assert!(ports.spaces.iter().all(|space| space.sharing.is_empty() && space.by_port.is_empty()));
        }
    }
}
