//! A front-end in the test's own process: guest memory on shared memory, a raw vhost-user client
//! that can say anything, a driver that can post any descriptor, and a worker with a loopback
//! instead of an engine.

pub(crate) mod driver;
pub(crate) mod frontend;
pub(crate) mod nic;
pub(crate) mod ram;
pub(crate) mod worker;

use std::time::{Duration, Instant};

/// Longest wait for anything a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `holds`, or fails the test with `what`.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "did not happen in time: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A small generator of repeatable randomness (xorshift64*).
pub(crate) struct Random(u64);

impl Random {
    /// Seeded from `VUNET_TEST_SEED`, or from the clock; prints the seed so that a failure can be
    /// replayed.
    pub(crate) fn seeded() -> Random {
        let given = std::env::var("VUNET_TEST_SEED").ok().and_then(|s| s.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = given.unwrap_or_else(|| now.map_or(1, |t| t.as_nanos() as u64));
        println!("VUNET_TEST_SEED={seed}");
        Random(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
