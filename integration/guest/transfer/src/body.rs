//! Bodies of transfers: bytes made from a seed, so that a misplaced, repeated or missing segment
//! changes the hash, and nothing needs a file.

use sha2::{Digest, Sha256};

/// The most one body may hold, in bytes: the client keeps it in a small guest's memory.
pub(crate) const BYTES_MAX: usize = 256 << 20;

/// An endless stream of bytes from a seed (SplitMix64, whose every output differs from its
/// neighbours').
pub(crate) struct Stream {
    state: u64,
}

impl Stream {
    /// The stream of `seed`; equal seeds give equal bytes.
    pub(crate) fn new(seed: u64) -> Stream {
        Stream { state: seed }
    }

    fn next_word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// The next `count` bytes.
    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend_from_slice(&self.next_word().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

/// SHA-256 of `bytes`, in lower-case hexadecimal.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// `bytes` in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_bytes_and_others_do_not() {
        assert_eq!(Stream::new(7).take(1000), Stream::new(7).take(1000));
        assert_ne!(Stream::new(7).take(1000), Stream::new(8).take(1000));
    }

    #[test]
    fn lengths_that_are_no_multiple_of_a_word_are_exact() {
        for count in [0, 1, 7, 8, 9, 1001] {
            assert_eq!(Stream::new(1).take(count).len(), count);
        }
    }

    #[test]
    fn the_empty_body_hashes_as_published() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(sha256_hex(b""), empty);
    }
}
