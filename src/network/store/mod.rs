//! The leases of a named network: one SQLite file that all its processes share.
//!
//! Each process answers DHCP for its own guest, and all answer alike, for each answer is one transaction here.
//! What a transaction did is there after `kill -9` of any process at any instruction, or was never there; that
//! no address has two holders is also a key of the table. The rules are those of
//! [`super::leases::LeaseTable`], and these that only a shared network needs:
//!
//! - An address may be reserved, for a MAC address or a client identifier: nobody else gets it.
//! - One guest holds at most [`limits::LEASES_PER_GUEST_MAX`] addresses and has
//!   [`limits::DECLINED_PER_GUEST_MAX`] set aside, so that none can starve the others.
//! - A host name belongs to who came with it first, as long as its lease runs. Some are nobody's
//!   ([`NAMES_OF_NOBODY`], and what the network itself answers to).
//!
//! - Leases of a process that is gone are let go ([`processes`]).
//!
//! `file` opens and lays out, `pool` decides within a transaction, [`live_names`] reads for DNS, [`reading`] for the
//! control API, [`keeper`] writes the log back, `reservations` says what is reserved.
//!
//! Read first: `docs/adr/0010-the-lease-store.md`, `docs/leases.md`.

mod error;
mod file;
pub mod keeper;
pub mod live_names;
mod pool;
pub mod processes;
pub mod reading;
mod reservations;

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{Ipv4Subnet, MacAddr};
use crate::limits;
use crate::network::allocator::{Bind, Client, Grant, IpAllocator, Lease, Refusal};
use crate::network::clock::{HostClock, Moment};
use crate::time::Instant;

use self::file::StoreFile;
use self::pool::{Ledger, Row};

pub use self::error::StoreError;
pub use self::file::FILE_NAME;
pub use self::reservations::{Reservation, Who};

/// Names no guest may have: the gateway's, the guest's own, and two that programs trust without being told to
/// (web proxy discovery and ISATAP look them up in every domain they are in).
pub const NAMES_OF_NOBODY: [&str; 5] = ["gateway", "host", "isatap", "localhost", "wpad"];

/// Which addresses are handed out, and to what bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The network's subnet: the pool is every host address of it but `gateway`.
    pub subnet: Ipv4Subnet,
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// What this process's first client gets if it is free.
    pub first: Option<Ipv4Addr>,
    /// Host names that belong to the network itself, besides [`NAMES_OF_NOBODY`]: lower-case labels.
    pub names_taken: Vec<String>,
    /// Addresses leased, offered or remembered at one time.
    pub leases_max: usize,
    /// Of them, those one process's guest holds.
    pub leases_per_guest_max: usize,
    /// Declined addresses that rest because of one process's guest.
    pub declined_per_guest_max: usize,
    /// Whether a client may have the lease that another process which lives gave it: its guest is trusted to
    /// bridge clients that move, or it leases for the guests of others.
    pub takes_over: bool,
}

impl Pool {
    /// The pool of `subnet` with the usual bounds.
    pub fn new(subnet: Ipv4Subnet, gateway: Ipv4Addr) -> Pool {
        Pool {
            subnet,
            gateway,
            first: None,
            names_taken: Vec::new(),
            leases_max: limits::NETWORK_LEASES_MAX,
            leases_per_guest_max: limits::LEASES_PER_GUEST_MAX,
            declined_per_guest_max: limits::DECLINED_PER_GUEST_MAX,
            takes_over: false,
        }
    }

    fn contains(&self, ip: Ipv4Addr) -> bool {
        self.subnet.is_host(ip) && ip != self.gateway
    }

    fn name_is_free(&self, name: &str) -> bool {
        !NAMES_OF_NOBODY.contains(&name) && !self.names_taken.iter().any(|taken| taken == name)
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// One process's hold of the store.
#[derive(Debug)]
pub struct LeaseStore {
    file: StoreFile,
    pool: Pool,
    clock: Arc<dyn HostClock>,
    /// Tells what this process's guest holds from what others do.
    holder: i64,
}

impl LeaseStore {
    /// Opens the store in `folder`, or makes it. `holder` is a random number of this process.
    ///
    /// Waits up to 5 s for other processes; whatever comes later waits no longer than
    /// [`limits::STORE_WAIT`].
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(
        folder: &Path,
        pool: Pool,
        clock: Arc<dyn HostClock>,
        holder: u64,
    ) -> Result<LeaseStore, StoreError> {
        let file = StoreFile::open(folder, &pool, &*clock)?;
        file.patience.set(limits::STORE_WAIT);
        // Only equality matters.
        Ok(LeaseStore { file, pool, clock, holder: holder as i64 })
    }

    /// Runs `work` alone among all processes, at the time the host's clock says.
    fn write<T>(
        &mut self,
        now: Instant,
        work: impl FnOnce(&Ledger<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let LeaseStore { file, pool, clock, holder } = self;
        let moment = clock.at(now);
        file.write(|tx| {
            let ledger = Ledger { tx, now: moment, pool, holder: *holder };
            ledger.sweep()?;
            work(&ledger)
        })
    }
}

impl IpAllocator for LeaseStore {
    fn offer(
        &mut self,
        now: Instant,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
    ) -> Result<Grant, Refusal> {
        self.write(now, |ledger| ledger.offer(client, wanted))?
    }

    fn bind(&mut self, now: Instant, client: &Client<'_>, ip: Ipv4Addr) -> Result<(Bind, Grant), Refusal> {
        self.write(now, |ledger| ledger.bind(client, ip))?
    }

    fn withdraw(&mut self, now: Instant, mac: MacAddr) -> Result<(), StoreError> {
        self.write(now, |ledger| ledger.withdraw(mac))
    }

    fn release(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError> {
        self.write(now, |ledger| ledger.release(mac, ip))
    }

    fn decline(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError> {
        self.write(now, |ledger| ledger.decline(mac, ip))
    }

    fn get(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        let moment = self.clock.at(now);
        let row = pool::row_of(&self.file.connection, mac);
        let row = row.map_err(|error| StoreError::of(&self.file.path, error))?;
        Ok(row.map(|row| lease(&row, now, moment)))
    }

    fn resume(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        let moment = self.clock.at(now);
        let row = pool::row_of(&self.file.connection, mac);
        let row = row.map_err(|error| StoreError::of(&self.file.path, error))?;
        let row = match row {
            Some(row) if row.is_let_go(moment) => self.write(now, |ledger| ledger.resume(mac))?,
            row => row,
        };
        let row = row.filter(|row| self.pool.takes_over || !row.is_of_another(self.holder));
        Ok(row.map(|row| lease(&row, now, moment)).filter(|lease| lease.is_active(now)))
    }

    fn leases(&mut self, now: Instant) -> Result<Vec<Lease>, StoreError> {
        let moment = self.clock.at(now);
        let rows = pool::rows(&self.file.connection);
        let rows = rows.map_err(|error| StoreError::of(&self.file.path, error))?;
        Ok(rows.iter().map(|row| lease(row, now, moment)).collect())
    }
}

/// A row in the caller's time.
fn lease(row: &Row, now: Instant, moment: Moment) -> Lease {
    let until = row.end_us().map(|until_us| {
        let left_us = until_us.saturating_sub(moment.boottime_us);
        match u64::try_from(left_us) {
            Ok(left_us) => now + Duration::from_micros(left_us),
            Err(_) => now - Duration::from_micros(left_us.unsigned_abs()),
        }
    });
    Lease { mac: row.mac, ip: row.ip, until, host_name: row.host_name.clone() }
}
