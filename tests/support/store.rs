//! Lease stores for tests: in memory where nothing is to survive, with a clock of the test's own.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use vunet::addr::Ipv4Subnet;
use vunet::network::clock::{HostClock, Moment};
use vunet::network::store::{LeaseStore, Pool};
use vunet::time::Instant;

/// A clock that stands where it is told to, and follows the times that callers give.
#[derive(Debug)]
pub(crate) struct TestClock {
    boot_id: &'static str,
    boottime_us: AtomicI64,
    /// What the time of day is ahead of the time since boot.
    wall_ahead_us: i64,
}

impl TestClock {
    pub(crate) fn new(boot_id: &'static str, wall_ahead_us: i64) -> Arc<TestClock> {
        Arc::new(TestClock { boot_id, boottime_us: AtomicI64::new(0), wall_ahead_us })
    }
}

impl HostClock for TestClock {
    fn boot_id(&self) -> &str {
        self.boot_id
    }

    fn now(&self) -> Moment {
        let boottime_us = self.boottime_us.load(Ordering::Relaxed);
        Moment { boottime_us, wall_us: boottime_us + self.wall_ahead_us }
    }

    fn at(&self, now: Instant) -> Moment {
        self.boottime_us.store(i64::try_from(now.as_micros()).unwrap(), Ordering::Relaxed);
        self.now()
    }
}

/// A folder in memory, for stores that no reboot is to outlive.
pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A pool whose only guest may take it all, as that of one process alone.
pub(crate) fn alone(subnet: Ipv4Subnet, gateway: Ipv4Addr, first: Option<Ipv4Addr>) -> Pool {
    Pool {
        first,
        leases_max: vunet::limits::LEASES_MAX,
        leases_per_guest_max: usize::MAX,
        declined_per_guest_max: usize::MAX,
        ..Pool::new(subnet, gateway)
    }
}

/// A store in `folder` with a clock of its own.
pub(crate) fn open(folder: &Path, pool: Pool) -> LeaseStore {
    LeaseStore::open(folder, pool, TestClock::new("boot", 1_700_000_000_000_000), 1).unwrap()
}
