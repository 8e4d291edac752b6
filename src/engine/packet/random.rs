//! Numbers nobody outside can foretell: a keyed pseudo-random function of a counter.

use std::hash::Hasher as _;

use siphasher::sip::SipHasher13;

/// A sequence of numbers that is random to who does not know its seed.
#[derive(Clone, Debug)]
pub struct Random {
    keyed: SipHasher13,
    count: u64,
}

impl Random {
    /// The sequence of `seed`, which must come from the operating system's randomness, or from a test.
    pub fn new(seed: (u64, u64)) -> Random {
        Random { keyed: SipHasher13::new_with_keys(seed.0, seed.1), count: 0 }
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.count += 1;
        let mut hasher = self.keyed;
        hasher.write_u64(self.count);
        hasher.finish()
    }

    /// A number below `bound`, which is not zero. Its bias is below 2^-32 for bounds below 2^32.
    pub fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u32
    }
}
