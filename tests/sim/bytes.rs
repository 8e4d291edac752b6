//! The bytes of every stream.
//!
//! A stream's bytes are a piece of one random table, from a place its ends choose: making and comparing
//! them costs a copy. No shift of less than the table's length goes unseen.

use std::net::SocketAddr;
use std::sync::LazyLock;

use crate::random::{Rng, mix};

/// Far longer than any simulated stream.
const TABLE_BYTES: usize = 1 << 20;

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut rng = Rng::new(0x7ab1e);
    (0..TABLE_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
});

/// One direction of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(usize);

impl Stream {
    /// The stream of the connection with `remote`, an address of the world that only one flow has.
    pub(crate) fn new(remote: SocketAddr, from_guest: bool) -> Stream {
        let ip = match remote.ip() {
            std::net::IpAddr::V4(ip) => u64::from(u32::from(ip)),
            std::net::IpAddr::V6(_) => unreachable!("the simulation is of IPv4"),
        };
        let name = ip << 17 | u64::from(remote.port()) << 1 | u64::from(from_guest);
        Stream(mix(name) as usize % TABLE_BYTES)
    }

    /// Its bytes from `at` on, at most `len` and at least one of them.
    pub(crate) fn bytes(self, at: usize, len: usize) -> &'static [u8] {
        let start = (self.0 + at) % TABLE_BYTES;
        &TABLE[start..TABLE_BYTES.min(start + len)]
    }

    /// Copies its bytes from `at` on.
    pub(crate) fn fill(self, at: usize, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let part = self.bytes(at + done, into.len() - done);
            into[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        }
    }

    /// Where `bytes`, said to lie at `at`, first differ.
    pub(crate) fn first_difference(self, at: usize, bytes: &[u8]) -> Option<usize> {
        let mut done = 0;
        while done < bytes.len() {
            let part = self.bytes(at + done, bytes.len() - done);
            let given = &bytes[done..done + part.len()];
            if given != part {
                return given.iter().zip(part).position(|(a, b)| a != b).map(|n| at + done + n);
            }
            done += part.len();
        }
        None
    }
}

/// The byte at `at` of a stream.
pub(crate) fn pattern(peer: SocketAddr, from_guest: bool, at: usize) -> u8 {
    Stream::new(peer, from_guest).bytes(at, 1)[0]
}
