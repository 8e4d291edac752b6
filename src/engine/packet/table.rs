//! The table of a worker's flows: where they are, when they end, who makes room.
//!
//! Flows stand in one slab and are named by their place in it; an ended flow's place is used again. Two indices
//! (`index.rs`) lead there, one a direction, each behind a small cache; a flow is in both or in neither. The
//! timer wheel and the order of idleness run through the flows themselves.
//!
//! A packet's way is: [`FlowTable::find_outbound`] or [`FlowTable::find_inbound`], what the caller does to the flow,
//! [`FlowTable::touch`]. It writes to the flow's first cache line only, but for once in four
//! seconds a flow. A new flow's: [`FlowTable::crowded`], whose flow the caller removes, then [`FlowTable::insert`].
//!
//! With many flows each step waits for memory. Who has several packets therefore says so before the first
//! ([`FlowTable::expect_outbound`], [`FlowTable::expect_inbound`]), and what they need is fetched together.
//!
//! The slab's room is reserved at the start and becomes resident as flows come: in small pages for the first 16,384, then
//! in huge ones where the kernel gives them. Nothing here grows beyond [`TableConfig::flows_max`] flows.
//!
//! | | bytes |
//! |---|---|
//! | a flow | 128 |
//! | both indices, a flow | 16 to 32 |

use std::net::Ipv4Addr;

use thiserror::Error;

use super::cache::FlowCache;
use super::flow::{Flow, FlowFlags, FlowId, Inbound, NIL, Outbound, Ticks};
use super::guests::{GRANULE_MS, Guests};
use super::index::{self, Hash, Index, Key};
use super::random::Random;
use super::wheel::Wheel;
use crate::limits;
use crate::memory::{self, HUGE_PAGE_BYTES};
use crate::time::Instant;

/// What a table needs to know at its start.
#[derive(Clone, Copy, Debug)]
pub struct TableConfig {
    /// Most flows at once, up to [`limits::PACKET_FLOWS_BOUND`].
    pub flows_max: usize,
    /// Most flows of one guest address.
    pub guest_flows_max: usize,
    /// From the operating system's randomness: keys the indices.
    pub seed: (u64, u64),
}

/// Why there is no table.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TableError {
    /// More flows than can be named.
    #[error("{0} flows are more than a table can hold: at most {max}", max = limits::PACKET_FLOWS_BOUND)]
    Bound(usize),
    /// The system has no memory for so many.
    #[error("no memory for {0} flows of 128 bytes each")]
    Memory(usize),
}

/// Why a flow is not taken in.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum InsertError {
    /// The guest's end already speaks to this remote end in another flow.
    #[error("the guest's end has a flow to this remote end")]
    GuestSide,
    /// The external port already speaks to this remote end in another flow.
    #[error("the external port has a flow to this remote end")]
    WorldSide,
    /// The table or the guest's quota is full; see [`FlowTable::crowded`].
    #[error("no room for another flow")]
    Full,
}

/// Where a flow is. Good until a flow is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowIndex(u32);

/// What the caches answered so far, both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheRates {
    /// Lookups answered from a cache.
    pub hits: u64,
    /// All others.
    pub misses: u64,
}

/// All flows of a worker.
#[derive(Debug)]
pub struct FlowTable {
    flows: Vec<Flow>,
    /// The first free place before the end, and through `timer.next` all others.
    free: u32,
    len: usize,
    flows_max: usize,
    guest_flows_max: usize,
    outbound: Index,
    inbound: Index,
    outbound_cache: FlowCache,
    inbound_cache: FlowCache,
    wheel: Wheel,
    guests: Guests,
    random: Random,
}

impl FlowTable {
    /// A table without flows.
    ///
    /// # Errors
    /// [`TableError`] if `flows_max` exceeds what can be named, or memory.
    pub fn new(config: &TableConfig, now: Instant) -> Result<FlowTable, TableError> {
        let flows_max = config.flows_max;
        if flows_max > limits::PACKET_FLOWS_BOUND {
            return Err(TableError::Bound(flows_max));
        }
        let mut flows = Vec::new();
        flows.try_reserve_exact(flows_max).map_err(|_| TableError::Memory(flows_max))?;
        // Few flows, as most guests have, take no more memory than they fill.
        memory::ask_for_huge_pages(&flows, HUGE_PAGE_BYTES);
        let mut random = Random::new(config.seed);
        let mut next = || random.next_u64();
        Ok(FlowTable {
            flows,
            free: NIL,
            len: 0,
            flows_max,
            guest_flows_max: config.guest_flows_max,
            outbound: Index::new(flows_max, &mut next),
            inbound: Index::new(flows_max, &mut next),
            outbound_cache: FlowCache::new(),
            inbound_cache: FlowCache::new(),
            wheel: Wheel::new(now),
            guests: Guests::default(),
            random,
        })
    }

    /// Flows it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Flows of one guest.
    pub fn flows_of(&self, guest: Ipv4Addr) -> usize {
        self.guests.flows_of(guest)
    }

    /// All flows, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.flows.iter().filter(|flow| flow.flags.has(FlowFlags::LIVE))
    }

    /// Places that hold a flow or held one.
    pub fn places(&self) -> usize {
        self.flows.len()
    }

    /// The flow at a place, with its name.
    pub fn at_place(&self, place: usize) -> Option<(&Flow, FlowId)> {
        let flow = self.flows.get(place).filter(|flow| flow.flags.has(FlowFlags::LIVE))?;
        Some((flow, FlowId { index: place as u32, generation: flow.generation }))
    }

    /// What the caches answered.
    pub fn cache_rates(&self) -> CacheRates {
        let (out, inn) = (self.outbound_cache.rates(), self.inbound_cache.rates());
        CacheRates { hits: out.0 + inn.0, misses: out.1 + inn.1 }
    }

    /// How often an index has got a new key because keys collided as they do not by chance.
    pub fn rekeyed(&self) -> u64 {
        self.outbound.rekeyed() + self.inbound.rekeyed()
    }

    /// Bytes of flows in use and of both indices.
    pub fn bytes(&self) -> usize {
        self.flows.len() * size_of::<Flow>() + self.outbound.bytes() + self.inbound.bytes()
    }

    /// The flow of a packet of the guest.
    #[inline]
    pub fn find_outbound(&mut self, key: &Outbound) -> Option<FlowIndex> {
        find(&self.outbound, &mut self.outbound_cache, &self.flows, key)
    }

    /// The flow of a packet of the world.
    #[inline]
    pub fn find_inbound(&mut self, key: &Inbound) -> Option<FlowIndex> {
        find(&self.inbound, &mut self.inbound_cache, &self.flows, key)
    }

    /// Whether a flow has this external port and remote end.
    pub fn has_inbound(&self, key: &Inbound) -> bool {
        self.inbound.find(key, self.inbound.hash(key), &self.flows).is_some()
    }

    /// The flow at a place that was just found.
    ///
    /// # Panics
    /// If no flow was ever there.
    #[inline]
    pub fn flow(&self, at: FlowIndex) -> &Flow {
        &self.flows[at.0 as usize]
    }

    /// The same, to change it.
    ///
    /// # Panics
    /// As [`FlowTable::flow`].
    #[inline]
    pub fn flow_mut(&mut self, at: FlowIndex) -> &mut Flow {
        &mut self.flows[at.0 as usize]
    }

    /// A name of the flow for longer than a packet.
    pub fn id(&self, at: FlowIndex) -> FlowId {
        FlowId { index: at.0, generation: self.flows[at.0 as usize].generation }
    }

    /// Where a flow is, unless it has ended.
    pub fn get(&self, id: FlowId) -> Option<FlowIndex> {
        let flow = self.flows.get(id.index as usize)?;
        (flow.generation == id.generation && flow.flags.has(FlowFlags::LIVE)).then_some(FlowIndex(id.index))
    }

    /// A packet of the flow was carried at `now`; without others it lives `timeout_ms` milliseconds, at most [`Ticks::SPAN_MAX`].
    #[inline]
    pub fn touch(&mut self, at: FlowIndex, now: Ticks, timeout_ms: u32) {
        let flow = &mut self.flows[at.0 as usize];
        let moves = (flow.last_seen.0 ^ now.0) / GRANULE_MS != 0
            || flow.flags.has(FlowFlags::ASSURED) != flow.flags.has(FlowFlags::RANKED_ASSURED);
        let sooner = timeout_ms < flow.timeout_ms;
        flow.last_seen = now;
        flow.timeout_ms = timeout_ms;
        if moves || sooner {
            self.rearrange(at.0, moves, sooner);
        }
    }

    /// What few packets need: their flow changes its place in the order of idleness, or in the wheel.
    #[cold]
    fn rearrange(&mut self, index: u32, moves: bool, sooner: bool) {
        if moves {
            self.guests.touch(&mut self.flows, index);
        }
        let flow = &self.flows[index as usize];
        let end = flow.end();
        if sooner && end.since(flow.timer.due) < 0 {
            self.wheel.take(&mut self.flows, index);
            self.wheel.put(&mut self.flows, index, end);
        }
    }

    /// The flow that must be removed before `guest` can have another; `None` if there is room.
    ///
    /// A guest at its quota gives up one of its own. When the table is full, a guest with the most flows does if
    /// it has more than `guest`, else `guest` itself. It is the longest idle one, by
    /// the order `guests.rs` keeps.
    pub fn crowded(&self, guest: Ipv4Addr) -> Option<FlowId> {
        let victim = if self.guests.flows_of(guest) >= self.guest_flows_max {
            self.guests.own_victim(guest)
        } else if self.len >= self.flows_max {
            self.guests.victim(guest)
        } else {
            None
        };
        victim.map(|index| self.id(FlowIndex(index)))
    }

    /// Takes a new flow in, under both its keys.
    ///
    /// # Errors
    /// [`InsertError`]; the table is as before then.
    pub fn insert(&mut self, flow: Flow) -> Result<FlowId, InsertError> {
        let key = flow.key();
        if self.len >= self.flows_max || self.guests.flows_of(key.guest) >= self.guest_flows_max {
            return Err(InsertError::Full);
        }
        let (outbound, inbound) = (key.outbound(), key.inbound());
        let (out_hash, in_hash) = (self.outbound.hash(&outbound), self.inbound.hash(&inbound));
        if self.outbound.find(&outbound, out_hash, &self.flows).is_some() {
            return Err(InsertError::GuestSide);
        }
        if self.inbound.find(&inbound, in_hash, &self.flows).is_some() {
            return Err(InsertError::WorldSide);
        }
        let index = self.place(flow);
        let mut random = || self.random.next_u64();
        self.outbound.insert::<Outbound>(index, out_hash, &self.flows, &mut random);
        self.inbound.insert::<Inbound>(index, in_hash, &self.flows, &mut random);
        self.guests.add(&mut self.flows, index);
        let end = self.flows[index as usize].end();
        self.wheel.put(&mut self.flows, index, end);
        self.len += 1;
        Ok(self.id(FlowIndex(index)))
    }

    /// Puts the flow into a free place, alive.
    fn place(&mut self, mut flow: Flow) -> u32 {
        flow.flags.set(FlowFlags::LIVE);
        if self.free == NIL {
            self.flows.push(flow);
            return self.flows.len() as u32 - 1;
        }
        let index = self.free;
        let place = &mut self.flows[index as usize];
        self.free = place.timer.next;
        flow.generation = place.generation.wrapping_add(1);
        flow.timer.next = NIL;
        *place = flow;
        index
    }

    /// Ends a flow; returns it as it was, or `None` if it has ended already.
    pub fn remove(&mut self, id: FlowId) -> Option<Flow> {
        let FlowIndex(index) = self.get(id)?;
        self.wheel.take(&mut self.flows, index);
        Some(self.unplace(index))
    }

    /// Takes a flow, which is not in the wheel any more, out of everything else.
    fn unplace(&mut self, index: u32) -> Flow {
        self.outbound.remove::<Outbound>(index, &self.flows);
        self.inbound.remove::<Inbound>(index, &self.flows);
        self.guests.remove(&mut self.flows, index);
        let place = &mut self.flows[index as usize];
        let mut flow = place.clone();
        flow.flags.clear(FlowFlags::LIVE.with(FlowFlags::RANKED_ASSURED));
        place.flags.clear(FlowFlags::LIVE);
        place.timer.next = self.free;
        self.free = index;
        self.len -= 1;
        flow
    }

    /// Ends flows whose time has come, at most [`limits::PACKET_TIMERS_EXAMINED`] of them; where more are due,
    /// [`FlowTable::next_deadline`] says so. Each is given to `ended` as it was.
    pub fn expire(&mut self, now: Instant, mut ended: impl FnMut(Flow)) {
        self.outbound.go_on::<Outbound>(&self.flows);
        self.inbound.go_on::<Inbound>(&self.flows);
        let ticks = Ticks::at(now);
        for _ in 0..limits::PACKET_TIMERS_EXAMINED {
            let Some(index) = self.wheel.pop(&mut self.flows, now) else { return };
            let end = self.flows[index as usize].end();
            if end.since(ticks) > 0 {
                self.wheel.put(&mut self.flows, index, end);
            } else {
                ended(self.unplace(index));
            }
        }
    }

    /// When [`FlowTable::expire`] has something to do; `None` while there is no flow.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.wheel.next()
    }

    /// Whether it has, or had, so many flows that packets wait for them.
    #[inline]
    pub fn is_large(&self) -> bool {
        self.flows.len() >= limits::PACKET_AHEAD_FLOWS_MIN
    }

    /// Has fetched what [`FlowTable::find_outbound`] of these keys will read, the first [`limits::PACKET_AHEAD_FRAMES`] of
    /// them: their cache misses are waited for together. It changes no answer.
    #[inline]
    pub fn expect_outbound(&self, keys: impl Iterator<Item = Outbound>) {
        self.expect(&self.outbound, keys);
    }

    /// The same for [`FlowTable::find_inbound`].
    #[inline]
    pub fn expect_inbound(&self, keys: impl Iterator<Item = Inbound>) {
        self.expect(&self.inbound, keys);
    }

    #[inline]
    fn expect(&self, index: &Index, keys: impl Iterator<Item = impl Key>) {
        if !self.is_large() {
            return;
        }
        let mut hashes = [Hash(0); limits::PACKET_AHEAD_FRAMES];
        let mut count = 0;
        for (hash, key) in hashes.iter_mut().zip(keys) {
            *hash = index.hash(&key);
            index.prefetch(*hash);
            count += 1;
        }
        for hash in &hashes[..count] {
            if let Some(flow) = index.peek(*hash).and_then(|at| self.flows.get(at as usize)) {
                memory::prefetch(flow);
            }
        }
    }
}

#[inline]
fn find(index: &Index, cache: &mut FlowCache, flows: &[Flow], key: &impl Key) -> Option<FlowIndex> {
    let hash = index.hash(key);
    let is = |at: u32| flows.get(at as usize).is_some_and(|flow| key.is(flow));
    if let Some(at) = cache.find(hash, is) {
        return Some(FlowIndex(at));
    }
    let at = index.find(key, hash, flows)?;
    cache.put(hash, at);
    Some(FlowIndex(at))
}

const _: () = assert!(limits::PACKET_FLOWS_BOUND <= index::FLOWS_BOUND);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::packet::flow::FlowKey;
    use crate::engine::packet::wheel::GRAIN_MS;
    use crate::wire::ipv4::Protocol;
    use proptest::prelude::*;

    fn ms(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    fn key(guest: u8, guest_port: u16, remote: u8, external_port: u16) -> FlowKey {
        FlowKey {
            guest: Ipv4Addr::new(10, 0, 2, guest),
            remote: Ipv4Addr::new(192, 0, 2, remote),
            guest_port,
            remote_port: 443,
            external_port,
            protocol: Protocol::UDP,
        }
    }

    fn table(flows_max: usize, guest_flows_max: usize) -> FlowTable {
        FlowTable::new(&TableConfig { flows_max, guest_flows_max, seed: (1, 2) }, Instant::ZERO).unwrap()
    }

    fn flow(key: FlowKey) -> Flow {
        Flow::new(key, FlowFlags::NONE, Ticks(0), 30_000)
    }

    #[test]
    fn a_flow_is_found_both_ways_or_neither() {
        let mut table = table(8, 8);
        let id = table.insert(flow(key(2, 1000, 1, 50_000))).unwrap();
        assert_eq!(table.insert(flow(key(2, 1000, 1, 50_001))), Err(InsertError::GuestSide));
        assert_eq!(table.find_inbound(&key(2, 1000, 1, 50_001).inbound()), None);
        assert_eq!(table.insert(flow(key(3, 1000, 1, 50_000))), Err(InsertError::WorldSide));
        assert_eq!(table.find_outbound(&key(3, 1000, 1, 50_000).outbound()), None);
        assert_eq!(table.len(), 1);
        assert_eq!(table.remove(id).unwrap().key(), key(2, 1000, 1, 50_000));
        assert!(table.remove(id).is_none());
        assert_eq!(table.find_outbound(&key(2, 1000, 1, 50_000).outbound()), None);
        assert_eq!(table.find_inbound(&key(2, 1000, 1, 50_000).inbound()), None);
    }

    #[test]
    fn a_name_does_not_outlive_its_flow_although_the_place_is_used_again() {
        let mut table = table(8, 8);
        let old = table.insert(flow(key(2, 1, 1, 1))).unwrap();
        table.remove(old);
        let new = table.insert(flow(key(2, 2, 1, 2))).unwrap();
        assert_eq!(old.index, new.index);
        assert_eq!((table.get(old), table.get(new).is_some()), (None, true));
        assert!(table.remove(old).is_none());
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_guest_with_few_flows_loses_none_to_one_with_many() {
        let mut table = table(16, 16);
        for n in 0..3 {
            table.insert(flow(key(2, n, 1, n))).unwrap();
        }
        for n in 10..5000 {
            if let Some(id) = table.crowded(Ipv4Addr::new(10, 0, 2, 3)) {
                assert_eq!(table.remove(id).unwrap().key().guest, Ipv4Addr::new(10, 0, 2, 3));
            }
            table.insert(flow(key(3, n, 1, n))).unwrap();
        }
        assert_eq!(table.flows_of(Ipv4Addr::new(10, 0, 2, 2)), 3);
        for n in 5000..5005 {
            let id = table.crowded(Ipv4Addr::new(10, 0, 2, 2)).expect("the table is full");
            assert_eq!(table.remove(id).unwrap().key().guest, Ipv4Addr::new(10, 0, 2, 3));
            table.insert(flow(key(2, n, 1, n))).unwrap();
        }
        assert_eq!(table.flows_of(Ipv4Addr::new(10, 0, 2, 2)), 8);
        assert_eq!(table.insert(flow(key(4, 1, 1, 1))), Err(InsertError::Full));
    }

    #[test]
    fn a_flood_of_first_packets_pushes_out_no_assured_flow_of_the_same_guest() {
        let mut table = table(64, 64);
        for n in 0..40 {
            table.insert(Flow::new(key(2, n, 1, n), FlowFlags::ASSURED, Ticks(0), 30_000)).unwrap();
        }
        for n in 100..10_000 {
            if let Some(id) = table.crowded(Ipv4Addr::new(10, 0, 2, 2)) {
                assert!(!table.remove(id).unwrap().flags.has(FlowFlags::ASSURED));
            }
            table.insert(flow(key(2, n, 1, n))).unwrap();
        }
        assert_eq!(table.iter().filter(|flow| flow.flags.has(FlowFlags::ASSURED)).count(), 40);
    }

    #[test]
    fn a_turn_looks_at_a_bounded_number_of_flows_and_says_when_more_are_due() {
        let mut table = table(2000, 2000);
        for n in 0..1000 {
            table.insert(flow(key(2, n, 1, n))).unwrap();
        }
        let mut turns = Vec::new();
        while let Some(deadline) = table.next_deadline() {
            let now = deadline.max(ms(30_000));
            let mut ended = 0;
            table.expire(now, |_| ended += 1);
            turns.push(ended);
        }
        turns.retain(|ended| *ended > 0);
        assert_eq!(turns, [256, 256, 256, 232]);
        assert!(table.is_empty());
    }

    #[test]
    fn too_many_flows_are_refused_at_the_start() {
        let config = |flows_max| TableConfig { flows_max, guest_flows_max: 1, seed: (1, 2) };
        let past = limits::PACKET_FLOWS_BOUND + 1;
        assert_eq!(FlowTable::new(&config(past), Instant::ZERO).unwrap_err(), TableError::Bound(past));
    }

    /// A flow of the model; its place in the list is its place in the order of idleness.
    #[derive(Clone, Debug)]
    struct Model {
        key: FlowKey,
        id: FlowId,
        assured: bool,
        ranked: bool,
        last_seen: u64,
        timeout: u64,
    }

    const FLOWS_MAX: usize = 9;
    const QUOTA: usize = 6;

    fn victim(model: &[Model], guest: Ipv4Addr) -> Option<FlowId> {
        let count = |addr| model.iter().filter(|flow| flow.key.guest == addr).count();
        let own = |addr: Ipv4Addr| {
            let of =
                |ranked| model.iter().filter(move |flow| flow.key.guest == addr && flow.ranked == ranked);
            let from_fresh = of(false).count() > count(addr) / 8 || of(true).count() == 0;
            of(!from_fresh).next().map(|flow| flow.id)
        };
        if count(guest) >= QUOTA {
            return own(guest);
        }
        if model.len() < FLOWS_MAX {
            return None;
        }
        let most = model.iter().map(|flow| count(flow.key.guest)).max()?;
        if most > count(guest) { None } else { own(guest) }
    }

    #[derive(Clone, Debug)]
    enum Change {
        Insert(FlowKey, u32, bool),
        Touch(usize, u32, bool),
        Remove(usize),
        Pass(u64),
    }

    fn change() -> impl Strategy<Value = Change> {
        let timeout = prop_oneof![Just(500u32), Just(30_000), Just(7_440_000)];
        prop_oneof![
            4 => (2u8..5, 0u16..4, 0u8..2, 0u16..8, timeout.clone(), any::<bool>())
                .prop_map(|(guest, port, remote, external, timeout, assured)| {
                    Change::Insert(key(guest, port, remote, external), timeout, assured)
                }),
            4 => (any::<usize>(), timeout, any::<bool>()).prop_map(|(at, t, a)| Change::Touch(at, t, a)),
            1 => any::<usize>().prop_map(Change::Remove),
            2 => prop_oneof![0u64..200, 0u64..10_000, 0u64..8_000_000].prop_map(Change::Pass),
        ]
    }

    fn insert(
        table: &mut FlowTable,
        model: &mut Vec<Model>,
        now_ms: u64,
        key: FlowKey,
        timeout: u32,
        assured: bool,
    ) {
        if let Some(id) = table.crowded(key.guest) {
            let given_up = model.iter().position(|flow| flow.id == id).expect("a live flow");
            let many = |addr| model.iter().filter(|flow| flow.key.guest == addr).count();
            match victim(model, key.guest) {
                Some(expected) => assert_eq!(id, expected),
                None => {
                    let of = model[given_up].key.guest;
                    assert!(many(of) > many(key.guest), "never of one with fewer");
                    assert!(model.iter().all(|flow| many(flow.key.guest) <= many(of)), "of one with most");
                }
            }
            assert!(table.remove(id).is_some());
            model.remove(given_up);
        } else {
            assert_eq!(victim(model, key.guest), None);
        }
        let flags = if assured { FlowFlags::ASSURED } else { FlowFlags::NONE };
        let result = table.insert(Flow::new(key, flags, Ticks(now_ms as u32), timeout));
        let guest_side = model.iter().any(|flow| flow.key.outbound() == key.outbound());
        let world_side = model.iter().any(|flow| flow.key.inbound() == key.inbound());
        match result {
            Ok(id) => {
                assert!(!guest_side && !world_side);
                let timeout = u64::from(timeout);
                model.push(Model { key, id, assured, ranked: assured, last_seen: now_ms, timeout });
            }
            Err(InsertError::GuestSide) => assert!(guest_side),
            Err(InsertError::WorldSide) => assert!(world_side && !guest_side),
            Err(InsertError::Full) => panic!("room was made"),
        }
    }

    fn touch(
        table: &mut FlowTable,
        model: &mut Vec<Model>,
        now_ms: u64,
        at: usize,
        timeout: u32,
        assured: bool,
    ) {
        let mut flow = model.remove(at);
        let place = table.get(flow.id).expect("it lives");
        if assured {
            table.flow_mut(place).flags.set(FlowFlags::ASSURED);
            flow.assured = true;
        }
        table.touch(place, Ticks(now_ms as u32), timeout);
        let granule = u64::from(GRANULE_MS);
        let moves = flow.assured != flow.ranked || flow.last_seen / granule != now_ms / granule;
        flow.ranked = flow.assured;
        flow.last_seen = now_ms;
        flow.timeout = timeout.into();
        model.insert(if moves { model.len() } else { at }, flow);
    }

    proptest! {
        /// Against a list: lookups both ways, bounds, who makes room, and ends in time.
        #[test]
        fn any_order_of_changes_keeps_flows_findable_bounded_and_in_time(
            start_ms in prop_oneof![Just(0u64), Just((1 << 32) - 60_000)],
            changes in proptest::collection::vec(change(), 1..200),
        ) {
            let config = TableConfig { flows_max: FLOWS_MAX, guest_flows_max: QUOTA, seed: (start_ms, 2) };
            let mut table = FlowTable::new(&config, ms(start_ms)).unwrap();
            let (mut model, mut now_ms) = (Vec::new(), start_ms);
            for change in changes {
                match change {
                    Change::Insert(key, timeout, assured) => {
                        insert(&mut table, &mut model, now_ms, key, timeout, assured);
                    }
                    Change::Touch(at, timeout, assured) if !model.is_empty() => {
                        let at = at % model.len();
                        touch(&mut table, &mut model, now_ms, at, timeout, assured);
                    }
                    Change::Remove(at) if !model.is_empty() => {
                        let flow: Model = model.remove(at % model.len());
                        prop_assert_eq!(table.remove(flow.id).map(|flow| flow.key()), Some(flow.key));
                    }
                    Change::Pass(pass_ms) => now_ms += pass_ms,
                    Change::Touch(..) | Change::Remove(_) => {}
                }
                table.expire(ms(now_ms), |flow| {
                    let at = model.iter().position(|other| other.key == flow.key()).expect("it lived");
                    let ended = model.remove(at);
                    assert!(ended.last_seen + ended.timeout <= now_ms, "too early");
                });
                for flow in &model {
                    prop_assert!(flow.last_seen + flow.timeout + GRAIN_MS > now_ms, "too late");
                }
                prop_assert_eq!((table.len(), table.iter().count()), (model.len(), model.len()));
                for key in (2..5).flat_map(|g| (0..4).flat_map(move |p| (0..2).flat_map(move |r| (0..8).map(move |e| key(g, p, r, e))))) {
                    let outbound = model.iter().find(|flow| flow.key.outbound() == key.outbound()).map(|flow| flow.id);
                    let inbound = model.iter().find(|flow| flow.key.inbound() == key.inbound()).map(|flow| flow.id);
                    let found = table.find_outbound(&key.outbound()).map(|at| table.id(at));
                    prop_assert_eq!(found, outbound);
                    let found = table.find_inbound(&key.inbound()).map(|at| table.id(at));
                    prop_assert_eq!(found, inbound);
                }
            }
        }
    }
}
