//! Where a flow is, by what a packet says: an open-addressed index of one direction.
//!
//! A slot is four bytes: a flow's place in the table, and in the bits this leaves a tag from its key's hash, so that a
//! flow is looked at only if it almost surely is the one. Eight slots make a bucket of half a cache line, which is compared
//! at once, without a branch that depends on where in it the flow is: a processor that guesses such a branch wrong waits
//! for the line and cannot wait for the next packet's meanwhile. A full bucket overflows into the next; at most half of all
//! slots are used, so that few do. Removal pulls back what overflowed, so that no lookup walks over what is gone.
//!
//! **Growth is gradual.** A larger index stands beside the full one, and each insertion moves a few slots; lookups ask both
//! meanwhile. The same way an index gets a new key.
//!
//! **Who chooses keys cannot slow it down.** The hash is a strongly universal family (Lemire and Kaser, "Strongly universal
//! string hashing is fast", 2014: any two keys collide with probability 2^-32 over the random multipliers), keyed from the
//! operating system's randomness, followed by a bijection against regular patterns. Keys chosen without knowledge of the
//! multipliers therefore do no better than random ones. Should somebody learn of collisions by measuring time, the
//! first insertion that finds [`limits::PACKET_INDEX_PROBES_MAX`] slots in a row has the index move to new
//! multipliers, and what was learnt is worth nothing.

use super::flow::{Flow, Inbound, Outbound};
use crate::limits;
use crate::memory::{self, HUGE_PAGE_BYTES};

/// A key's hash: the low bits say which bucket is its own, the top bits are its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hash(pub(super) u32);

/// What can be looked up.
pub(super) trait Key: Copy {
    /// The whole key as words.
    fn words(&self) -> [u32; 4];
    /// Whether `flow` is what the key names.
    fn is(&self, flow: &Flow) -> bool;
    /// The key of `flow`.
    fn of(flow: &Flow) -> Self;
}

fn two(high: u16, low: u16) -> u32 {
    u32::from(high) << 16 | u32::from(low)
}

impl Key for Outbound {
    #[inline]
    fn words(&self) -> [u32; 4] {
        let ports = two(self.guest_port, self.remote_port);
        [self.guest.to_bits(), self.remote.to_bits(), ports, self.protocol.0.into()]
    }

    #[inline]
    fn is(&self, flow: &Flow) -> bool {
        flow.is_outbound(self)
    }

    #[inline]
    fn of(flow: &Flow) -> Outbound {
        flow.key().outbound()
    }
}

impl Key for Inbound {
    #[inline]
    fn words(&self) -> [u32; 4] {
        [self.remote.to_bits(), two(self.external_port, self.remote_port), self.protocol.0.into(), 0]
    }

    #[inline]
    fn is(&self, flow: &Flow) -> bool {
        flow.is_inbound(self)
    }

    #[inline]
    fn of(flow: &Flow) -> Inbound {
        flow.key().inbound()
    }
}

/// One member of the family of hashes.
#[derive(Clone, Copy, Debug)]
struct Hasher {
    multipliers: [u64; 4],
    addend: u64,
}

impl Hasher {
    fn new(random: &mut impl FnMut() -> u64) -> Hasher {
        Hasher { multipliers: std::array::from_fn(|_| random()), addend: random() }
    }

    #[inline]
    fn hash(&self, words: [u32; 4]) -> Hash {
        let sum = self.multipliers.iter().zip(words).fold(self.addend, |sum, (multiplier, word)| {
            sum.wrapping_add(multiplier.wrapping_mul(word.into()))
        });
        // The upper half is what is universal. Both steps can be undone, so it stays that.
        let mut bits = (sum >> 32) as u32;
        bits = (bits ^ bits >> 16).wrapping_mul(0x85eb_ca6b);
        Hash(bits ^ bits >> 13)
    }
}

/// A slot that was never used, or is unused again. Used slots have [`USED`] set.
const EMPTY: u32 = 0;

/// Set in used slots, so that no tag is like an empty slot's.
const USED: u32 = 1 << 31;

/// A slot of the smaller index whose flow has ended while its successor is being filled. It names no flow.
const GONE: u32 = u32::MAX;

/// Most flows an index can name: seven bits of tag remain, and two values are special.
pub(super) const FLOWS_BOUND: usize = (1 << 24) - 2;

const BUCKET_SLOTS: usize = 8;

/// Half a cache line, aligned to its size.
type Bucket = [u32; BUCKET_SLOTS];

/// Which slots of a bucket have this tag, one bit each.
#[inline]
fn matches(bucket: &Bucket, tag: u32, name_mask: u32) -> u32 {
    let mut matches = 0;
    for (at, slot) in bucket.iter().enumerate() {
        matches |= u32::from((slot ^ tag) & !name_mask == 0) << at;
    }
    matches
}

/// A bucket's first empty slot.
fn gap(bucket: &Bucket) -> Option<usize> {
    bucket.iter().position(|slot| *slot == EMPTY)
}

/// A slot's place.
#[derive(Clone, Copy, Debug)]
struct At {
    bucket: usize,
    slot: usize,
}

#[derive(Debug)]
struct Slots {
    /// All buckets, from `first` on. Plain words, so that a large index comes as zeroed pages of the kernel's, each
    /// when it is first written: filling it all at once would take milliseconds. From a huge page on it asks for those.
    words: Vec<u32>,
    first: usize,
    buckets: usize,
    hasher: Hasher,
    /// The bits of a slot that name a flow, by its place plus one.
    name_mask: u32,
}

impl Slots {
    fn new(buckets: usize, hasher: Hasher, name_mask: u32) -> Slots {
        let bytes = buckets * size_of::<Bucket>();
        let align = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { size_of::<Bucket>() };
        let words = vec![EMPTY; (bytes + align) / size_of::<u32>()];
        if align == HUGE_PAGE_BYTES {
            memory::ask_for_huge_pages(&words, 0);
        }
        let first = words.as_ptr().align_offset(align);
        let first = if first < align / size_of::<u32>() { first } else { 0 };
        Slots { words, first, buckets, hasher, name_mask }
    }

    fn mask(&self) -> usize {
        self.buckets - 1
    }

    fn count(&self) -> usize {
        self.buckets * BUCKET_SLOTS
    }

    #[inline]
    fn bucket(&self, bucket: usize) -> &Bucket {
        let from_here = &self.words[self.first + bucket * BUCKET_SLOTS..];
        from_here.first_chunk().expect("there is one bucket more than asked for")
    }

    fn tag(&self, hash: Hash) -> u32 {
        hash.0 & !self.name_mask | USED
    }

    fn at(&mut self, at: At) -> &mut u32 {
        &mut self.words[self.first + at.bucket * BUCKET_SLOTS + at.slot]
    }

    /// The flow that `wanted` accepts and its slot, of those with the hash's tag.
    #[inline]
    fn find(&self, hash: Hash, wanted: impl Fn(u32) -> bool) -> Option<(u32, At)> {
        let mask = self.mask();
        let tag = self.tag(hash);
        let mut bucket = hash.0 as usize & mask;
        loop {
            let slots = self.bucket(bucket & mask);
            let mut matches = matches(slots, tag, self.name_mask);
            while matches != 0 {
                let slot = matches.trailing_zeros() as usize % BUCKET_SLOTS;
                let index = (slots[slot] & self.name_mask).wrapping_sub(1);
                if wanted(index) {
                    return Some((index, At { bucket: bucket & mask, slot }));
                }
                matches &= matches - 1;
            }
            if gap(slots).is_some() {
                return None;
            }
            bucket += 1;
        }
    }

    /// Puts a flow in whose key is not in yet; says how many buckets were probed.
    fn insert(&mut self, hash: Hash, index: u32) -> usize {
        let mask = self.mask();
        let value = self.tag(hash) | (index + 1);
        for probed in 0.. {
            let bucket = (hash.0 as usize + probed) & mask;
            if let Some(slot) = gap(self.bucket(bucket)) {
                *self.at(At { bucket, slot }) = value;
                return probed + 1;
            }
        }
        unreachable!("half of the slots are empty");
    }

    /// Empties a slot, and fills it with what stands in a later bucket only because this one was full.
    fn remove<K: Key>(&mut self, mut empty: At, flows: &[Flow]) {
        let mask = self.mask();
        let mut was_full = gap(self.bucket(empty.bucket)).is_none();
        *self.at(empty) = EMPTY;
        let mut bucket = empty.bucket;
        while was_full {
            bucket = (bucket + 1) & mask;
            let slots = *self.bucket(bucket);
            was_full = gap(&slots).is_none();
            let from_before = |slot: &u32| {
                let away = bucket.wrapping_sub(self.home::<K>(*slot, flows)) & mask;
                *slot != EMPTY && away >= (bucket.wrapping_sub(empty.bucket) & mask)
            };
            if let Some(slot) = slots.iter().position(from_before) {
                *self.at(empty) = slots[slot];
                empty = At { bucket, slot };
                *self.at(empty) = EMPTY;
            }
        }
    }

    /// The bucket that is the slot's own.
    fn home<K: Key>(&self, slot: u32, flows: &[Flow]) -> usize {
        let index = (slot & self.name_mask).wrapping_sub(1);
        flows
            .get(index as usize)
            .map_or(0, |flow| self.hasher.hash(K::of(flow).words()).0 as usize & self.mask())
    }
}

/// What an index moves away from.
#[derive(Debug)]
struct Former {
    slots: Slots,
    /// Buckets before it have been moved.
    moved: usize,
}

/// The index of one direction.
#[derive(Debug)]
pub(super) struct Index {
    slots: Slots,
    former: Option<Former>,
    len: usize,
    rekeyed: u64,
}

impl Index {
    /// An index without flows, for flows with places below `flows_max`, which is at most [`FLOWS_BOUND`].
    pub(super) fn new(flows_max: usize, random: &mut impl FnMut() -> u64) -> Index {
        let name_mask = (flows_max as u32 + 2).next_power_of_two() - 1;
        let slots = Slots::new(limits::PACKET_INDEX_BUCKETS_MIN, Hasher::new(random), name_mask);
        Index { slots, former: None, len: 0, rekeyed: 0 }
    }

    /// How often it has got new multipliers because of a row of full buckets.
    pub(super) fn rekeyed(&self) -> u64 {
        self.rekeyed
    }

    /// The hash to look `key` up with, until the next insertion.
    #[inline]
    pub(super) fn hash(&self, key: &impl Key) -> Hash {
        self.slots.hasher.hash(key.words())
    }

    /// The flow that `key` names.
    #[inline]
    pub(super) fn find(&self, key: &impl Key, hash: Hash, flows: &[Flow]) -> Option<u32> {
        let wanted = |index: u32| flows.get(index as usize).is_some_and(|flow| key.is(flow));
        match self.slots.find(hash, wanted) {
            Some((index, _)) => Some(index),
            None => self.find_former(key, flows),
        }
    }

    /// Has the bucket fetched that [`Index::find`] looks at first.
    #[inline]
    pub(super) fn prefetch(&self, hash: Hash) {
        memory::prefetch(self.slots.bucket(hash.0 as usize & self.slots.mask()));
    }

    /// The first flow [`Index::find`] will probably look at, whoever it is.
    #[inline]
    pub(super) fn peek(&self, hash: Hash) -> Option<u32> {
        let bucket = self.slots.bucket(hash.0 as usize & self.slots.mask());
        let matches = matches(bucket, self.slots.tag(hash), self.slots.name_mask);
        let slot = bucket[matches.trailing_zeros() as usize % BUCKET_SLOTS];
        (slot & self.slots.name_mask).checked_sub(1)
    }

    #[cold]
    fn find_former(&self, key: &impl Key, flows: &[Flow]) -> Option<u32> {
        let former = &self.former.as_ref()?.slots;
        let wanted = |index: u32| flows.get(index as usize).is_some_and(|flow| key.is(flow));
        former.find(former.hasher.hash(key.words()), wanted).map(|(index, _)| index)
    }

    /// Puts flow `index` in, whose key `K` with this hash must not be in yet; moves on with a change of size or key.
    pub(super) fn insert<K: Key>(
        &mut self,
        index: u32,
        hash: Hash,
        flows: &[Flow],
        random: &mut impl FnMut() -> u64,
    ) {
        self.go_on::<K>(flows);
        if self.former.is_none() && (self.len + 1) * 2 > self.slots.count() {
            self.replace(self.slots.buckets * 2, self.slots.hasher);
        }
        debug_assert_eq!(hash, self.hash(&K::of(&flows[index as usize])), "no insertion came between");
        let probed = self.slots.insert(hash, index);
        self.len += 1;
        if probed > limits::PACKET_INDEX_PROBES_MAX && self.former.is_none() {
            self.replace(self.slots.buckets, Hasher::new(random));
            self.rekeyed += 1;
        }
    }

    fn replace(&mut self, buckets: usize, hasher: Hasher) {
        let slots = Slots::new(buckets, hasher, self.slots.name_mask);
        let slots = std::mem::replace(&mut self.slots, slots);
        self.former = Some(Former { slots, moved: 0 });
    }

    /// Takes flow `index` out, which must be in, with the key `K` it has had since.
    pub(super) fn remove<K: Key>(&mut self, index: u32, flows: &[Flow]) {
        let key = K::of(&flows[index as usize]);
        let mut found = false;
        if let Some(former) = &mut self.former {
            let hash = former.slots.hasher.hash(key.words());
            if let Some((_, at)) = former.slots.find(hash, |other| other == index) {
                *former.slots.at(at) = GONE;
                found = true;
            }
        }
        if let Some((_, at)) = self.slots.find(self.hash(&key), |other| other == index) {
            self.slots.remove::<K>(at, flows);
            found = true;
        }
        debug_assert!(found, "a flow is in both indices until it ends");
        self.len -= 1;
    }

    /// Moves some buckets of the former index, if there is one.
    pub(super) fn go_on<K: Key>(&mut self, flows: &[Flow]) {
        let Some(former) = &mut self.former else { return };
        let bucket = *former.slots.bucket(former.moved);
        // The flows are read first, all at once: each is a cache miss, and they do not wait for each other.
        let mut moving = [(Hash(0), None); BUCKET_SLOTS];
        for (entry, slot) in moving.iter_mut().zip(bucket).filter(|(_, slot)| ![EMPTY, GONE].contains(slot)) {
            let index = (slot & former.slots.name_mask) - 1;
            *entry = (self.slots.hasher.hash(K::of(&flows[index as usize]).words()), Some(index));
        }
        for (hash, index) in moving {
            if let Some(index) = index {
                self.slots.insert(hash, index);
            }
        }
        former.moved += 1;
        if former.moved == former.slots.buckets {
            self.former = None;
        }
    }

    /// Bytes its slots take.
    pub(super) fn bytes(&self) -> usize {
        let former = self.former.as_ref().map_or(0, |former| former.slots.count());
        (self.slots.count() + former) * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::packet::flow::{FlowFlags, FlowKey, Ticks};
    use crate::engine::packet::random::Random;
    use crate::wire::ipv4::Protocol;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    fn flow(guest: u32, guest_port: u16, remote: u32, remote_port: u16) -> Flow {
        let key = FlowKey {
            guest: Ipv4Addr::from_bits(guest),
            remote: Ipv4Addr::from_bits(remote),
            guest_port,
            remote_port,
            external_port: guest_port,
            protocol: Protocol::TCP,
        };
        Flow::new(key, FlowFlags::LIVE, Ticks(0), 0)
    }

    fn put(index: &mut Index, at: u32, flows: &[Flow], random: &mut impl FnMut() -> u64) {
        let hash = index.hash(&Outbound::of(&flows[at as usize]));
        index.insert::<Outbound>(at, hash, flows, random);
    }

    fn find(index: &Index, flow: &Flow, flows: &[Flow]) -> Option<u32> {
        let key = Outbound::of(flow);
        index.find(&key, index.hash(&key), flows)
    }

    #[test]
    fn regular_keys_fill_buckets_as_random_ones_do() {
        let patterns: [fn(u32) -> Flow; 5] = [
            |n| flow(1, n as u16, 9 + (n >> 16), 443),
            |n| flow(1, 49_152 + (n % 16_384) as u16, 9 + n / 16_384, 443),
            |n| flow(0x0a00_0002, 40_000, 0xc612_0000 + n, 443),
            |n| flow(0x0a00_0000 + (n & 0xff), 40_000, n << 8, 443),
            |n| flow(n << 12, (n << 4) as u16, 0x0101_0101_u32.wrapping_mul(n), n as u16),
        ];
        for (at, pattern) in patterns.into_iter().enumerate() {
            for seed in 0..32 {
                let mut random = Random::new((seed, 3));
                let hasher = Hasher::new(&mut || random.next_u64());
                let mut loads = vec![0u8; 1 << 12];
                for n in 0..1 << 14 {
                    let hash = hasher.hash(Outbound::of(&pattern(n)).words());
                    loads[hash.0 as usize % (1 << 12)] += 1;
                }
                let over = loads.iter().filter(|load| usize::from(**load) > BUCKET_SLOTS).count();
                assert!(over * 100 < loads.len() * 6, "pattern {at}, seed {seed}: {over} overflow");
                assert!(loads.iter().all(|load| *load < 32), "pattern {at}, seed {seed}");
            }
        }
    }

    #[test]
    fn keys_chosen_to_collide_bring_a_new_key_and_are_all_found() {
        let mut random = Random::new((5, 6));
        let mut random = || random.next_u64();
        let mut index = Index::new(100_000, &mut random);
        let known = index.slots.hasher;
        let collides = |flow: &Flow| known.hash(Outbound::of(flow).words()).0 % (1 << 12) == 7;
        let flows: Vec<Flow> = (0..u32::MAX).map(|n| flow(n, 1, 2, 3)).filter(collides).take(300).collect();
        for at in 0..300 {
            put(&mut index, at, &flows, &mut random);
            for before in 0..=at {
                assert_eq!(find(&index, &flows[before as usize], &flows), Some(before), "{at}");
            }
        }
        assert_eq!(index.rekeyed(), 1, "the new key's buckets are not known");
    }

    #[test]
    fn growth_moves_one_bucket_an_insertion_and_ends_before_the_next() {
        let mut random = Random::new((5, 6));
        let mut random = || random.next_u64();
        let mut index = Index::new(1 << 16, &mut random);
        let flows: Vec<Flow> = (0..1 << 16).map(|n| flow(n, 1, 2, 3)).collect();
        let mut moving = 0;
        for at in 0..flows.len() as u32 {
            put(&mut index, at, &flows, &mut random);
            assert!(index.len * 2 <= index.slots.count());
            moving += u32::from(index.former.is_some());
        }
        assert_eq!(index.slots.count(), 1 << 17, "half full");
        assert!((1..1 << 14).contains(&moving), "{moving}");
        assert_eq!(index.rekeyed(), 0);
        assert!((0..flows.len()).all(|at| find(&index, &flows[at], &flows) == Some(at as u32)));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        /// Against a hash map, with keys so few and an index so small that buckets overflow, gaps are filled and
        /// growth is under way most of the time.
        #[test]
        fn any_order_of_insertions_and_removals_finds_what_is_in_and_nothing_else(
            seed in any::<u64>(),
            changes in proptest::collection::vec((0u32..600, 0u32..4), 1..3000),
        ) {
            let mut random = Random::new((seed, 1));
            let mut random = || random.next_u64();
            let mut index = Index::new(1000, &mut random);
            index.slots = Slots::new(2, index.slots.hasher, index.slots.name_mask);
            let flows: Vec<Flow> = (0..600).map(|n| flow(n, 1, 2, 3)).collect();
            let mut model: HashMap<u32, ()> = HashMap::new();
            for (at, kind) in changes {
                if model.remove(&at).is_some() {
                    index.remove::<Outbound>(at, &flows);
                } else {
                    model.insert(at, ());
                    put(&mut index, at, &flows, &mut random);
                }
                if kind == 0 {
                    for _ in 0..4 {
                        index.go_on::<Outbound>(&flows);
                    }
                }
                let probe = [at, (at + 1) % 600, (at * 7 + kind) % 600];
                for at in probe {
                    let wanted = model.contains_key(&at).then_some(at);
                    prop_assert_eq!(find(&index, &flows[at as usize], &flows), wanted);
                }
            }
            for at in 0..600u32 {
                let wanted = model.contains_key(&at).then_some(at);
                prop_assert_eq!(find(&index, &flows[at as usize], &flows), wanted);
            }
            for at in model.keys() {
                index.remove::<Outbound>(*at, &flows);
            }
            prop_assert!(index.slots.words.iter().all(|slot| *slot == EMPTY));
        }
    }
}
