//! The flows packets came for lately: a small set-associative cache before an index.
//!
//! An entry is a key's whole hash and the flow's place; whether the flow is the one is seen at the flow, which the packet
//! needs anyway. So nothing must be taken out when a flow ends or an index gets a new key: what is
//! wrong does not match. Four entries make a set of half a cache line; a hit behind the first moves one place up, so
//! that what is asked for often stays.

use super::index::Hash;
use crate::limits;

const WAYS: usize = 4;

#[derive(Clone, Copy, Debug, Default)]
#[repr(align(32))]
struct Set([Entry; WAYS]);

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    hash: u32,
    /// The flow's index plus one; zero in an unused entry.
    flow: u32,
}

/// A cache of [`limits::PACKET_CACHE_ENTRIES`] flows of one direction.
#[derive(Debug)]
pub(super) struct FlowCache {
    sets: Box<[Set; SETS]>,
    hits: u64,
    misses: u64,
}

const SETS: usize = limits::PACKET_CACHE_ENTRIES / WAYS;
const _: () = assert!(SETS.is_power_of_two());

impl FlowCache {
    pub(super) fn new() -> FlowCache {
        FlowCache { sets: Box::new([Set::default(); SETS]), hits: 0, misses: 0 }
    }

    /// The flow with this hash that `wanted` accepts.
    #[inline]
    pub(super) fn find(&mut self, hash: Hash, wanted: impl Fn(u32) -> bool) -> Option<u32> {
        let set = &mut self.sets[hash.0 as usize % SETS].0;
        for way in 0..WAYS {
            let entry = set[way];
            if entry.hash == hash.0 && entry.flow != 0 && wanted(entry.flow - 1) {
                if way > 0 {
                    set.swap(way, way - 1);
                }
                self.hits += 1;
                return Some(entry.flow - 1);
            }
        }
        self.misses += 1;
        None
    }

    /// Remembers a flow that was not found here, in place of the one least often asked for.
    #[inline]
    pub(super) fn put(&mut self, hash: Hash, flow: u32) {
        let set = &mut self.sets[hash.0 as usize % SETS].0;
        set[WAYS - 1] = Entry { hash: hash.0, flow: flow + 1 };
    }

    /// Lookups it answered, and all others.
    pub(super) fn rates(&self) -> (u64, u64) {
        (self.hits, self.misses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_flows_of_one_set_are_kept_and_the_fifth_takes_the_last_ones_place() {
        let mut cache = FlowCache::new();
        let hash = |n: u32| Hash(n << 20 | 5);
        for n in 0..4 {
            assert_eq!(cache.find(hash(n), |_| true), None);
            cache.put(hash(n), n);
            // Up to the first place, so that the next one finds the last free.
            while cache.sets[5].0[0].flow != n + 1 {
                assert_eq!(cache.find(hash(n), |_| true), Some(n));
            }
        }
        cache.put(hash(4), 4);
        assert_eq!(cache.find(hash(0), |_| true), None, "it was asked for longest ago");
        assert_eq!((1..5).filter_map(|n| cache.find(hash(n), |_| true)).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_does_not_match_is_a_miss_and_counted_as_one() {
        let mut cache = FlowCache::new();
        cache.put(Hash(9), 7);
        assert_eq!(cache.find(Hash(9), |flow| flow == 8), None);
        assert_eq!(cache.find(Hash(9 + SETS as u32), |_| true), None);
        assert_eq!(cache.find(Hash(9), |flow| flow == 7), Some(7));
        assert_eq!(cache.find(Hash(0), |_| true), None, "an unused entry matches nothing");
        assert_eq!(cache.rates(), (1, 3));
    }
}
