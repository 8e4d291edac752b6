//! Bytes anyone can compute from a seed, so that what arrives can be checked at any length without
//! keeping what was sent.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// Bytes produced or compared at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// A stream of pseudo-random bytes (splitmix64), the same for the same seed.
#[derive(Clone, Debug)]
pub struct Pattern {
    state: u64,
}

impl Pattern {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Pattern {
        Pattern { state: seed }
    }

    /// The next 64 pseudo-random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills `out` with the next bytes; every call starts at a fresh 64-bit word.
    pub fn fill(&mut self, out: &mut [u8]) {
        let mut chunks = out.chunks_exact_mut(8);
        for chunk in &mut chunks {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes());
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            let word = self.next_u64().to_le_bytes();
            rest.copy_from_slice(&word[..rest.len()]);
        }
    }
}

fn chunks(seed: u64, count_bytes: u64, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut left = count_bytes;
    while left > 0 {
        let len = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
        pattern.fill(&mut chunk[..len]);
        each(&chunk[..len])?;
        left -= len as u64;
    }
    Ok(())
}

/// Writes the first `count_bytes` bytes of the stream of `seed` to `to`.
///
/// # Errors
/// What `to` answers.
pub fn send(seed: u64, count_bytes: u64, to: &mut impl Write) -> io::Result<()> {
    chunks(seed, count_bytes, |chunk| to.write_all(chunk))
}

/// Reads from `from` what [`send`] wrote with the same arguments.
///
/// # Errors
/// `InvalidData` at the first byte that differs, `UnexpectedEof` if it ends early.
pub fn expect(seed: u64, count_bytes: u64, from: &mut impl Read) -> io::Result<()> {
    let mut got = vec![0; CHUNK_BYTES];
    let mut at = 0u64;
    chunks(seed, count_bytes, |chunk| {
        from.read_exact(&mut got[..chunk.len()])?;
        if let Some(offset) = got.iter().zip(chunk).position(|(a, b)| a != b) {
            let place = at + offset as u64;
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("byte {place} differs")));
        }
        at += chunk.len() as u64;
        Ok(())
    })
}

/// SHA-256 of the first `count_bytes` bytes of the stream of `seed`, as lower-case hexadecimal.
pub fn sha256(seed: u64, count_bytes: u64) -> String {
    let mut hash = Sha256::new();
    chunks(seed, count_bytes, |chunk| {
        hash.update(chunk);
        Ok(())
    })
    .expect("hashing does not fail");
    hex(&hash.finalize())
}

/// Lower-case hexadecimal of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_expected() {
        for count in [0, 1, 7, 8, 65_536, 65_537, 200_001] {
            let mut wire = Vec::new();
            send(7, count, &mut wire).unwrap();
            assert_eq!(wire.len() as u64, count);
            expect(7, count, &mut wire.as_slice()).unwrap();
            assert_eq!(hex(&Sha256::digest(&wire)), sha256(7, count));
        }
    }

    #[test]
    fn one_wrong_byte_is_found_where_it_is() {
        let mut wire = Vec::new();
        send(7, 100_000, &mut wire).unwrap();
        wire[70_000] ^= 1;
        let error = expect(7, 100_000, &mut wire.as_slice()).unwrap_err();
        assert_eq!(error.to_string(), "byte 70000 differs");
    }
}
