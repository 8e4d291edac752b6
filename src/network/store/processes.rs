//! Which process a lease belongs to, and what becomes of it once that process is gone.
//!
//! A process of the network has a number, which it notes in its user file (`network/users.rs`) and then here,
//! before it leases anything; each lease has the number of the process that gave it. Whoever sees that a
//! process is gone, as its user file's lock is free, notes here when that was. From then on its leases are
//! *let go*: their names resolve no more, and after [`RESTART_HOLD`] others may get their addresses, if no
//! others are left. A process that finds the same guest takes its lease up again (`resume` of the store).
//!
//! While it lives, its leases are its own guest's: another process whose guest comes with the MAC address of one
//! gets [`Refusal::Elsewhere`], and cannot give it back either, unless it may take over ([`Pool::takes_over`]).
//!
//! Numbers that are not noted here are of nobody who could die: the holder of a rootless network, which leases
//! for the guests of other processes, and processes of a version that noted none. The guest's own process of a
//! rootless network claims what the holder leased ([`LeaseStore::claim`]).
//!
//! [`Pool::takes_over`]: super::Pool::takes_over
//! [`Refusal::Elsewhere`]: crate::network::allocator::Refusal::Elsewhere

use std::net::Ipv4Addr;
use std::path::Path;

use rusqlite::{Connection, Transaction, params};

use super::file::{FILE_NAME, StoreFile, carry_over};
use super::pool::{Row, row_of};
use super::{LeaseStore, StoreError, micros};
use crate::addr::MacAddr;
use crate::network::allocator::{BindRefusal, RESTART_HOLD, Refusal};
use crate::network::clock::{HostClock, Moment};
use crate::time::Instant;

/// The first layout that knows of processes.
const LAYOUT: i64 = 2;

/// When the process that `lease` belongs to was found gone, as an expression; NULL while it lives.
pub(super) const ENDED_US: &str = "(SELECT ended_us FROM process WHERE process.holder = lease.holder)";

/// Whether the process that `lease` belongs to noted itself and was not found gone, as an expression.
pub(super) const LIVES: &str =
    "EXISTS(SELECT 1 FROM process WHERE process.holder = lease.holder AND ended_us IS NULL)";

/// Whether a lease that runs may be given to nobody else: `now` is an expression of the time.
pub(super) fn keeps(now: &str) -> String {
    format!("coalesce({ENDED_US} > {now} - {}, true)", micros(RESTART_HOLD))
}

/// Notes that the processes that are not among `live` are gone, if they are noted at all, in the store in
/// `folder`. `live` must be all that live, and none may join meanwhile. Returns of how many leases that run the
/// names resolve no more now.
///
/// A store that is not there yet has no leases.
///
/// # Errors
/// [`StoreError`].
pub fn let_go(folder: &Path, live: &[u64], clock: &dyn HostClock) -> Result<usize, StoreError> {
    if !folder.join(FILE_NAME).exists() {
        return Ok(0);
    }
    let mut file = StoreFile::open_again(folder)?;
    let path = file.path.clone();
    let failed = |error| StoreError::of(&path, error);
    let layout: i64 =
        file.connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed)?;
    if layout != LAYOUT {
        // Of an earlier version, which notes no processes; of a later one, whose user says so itself.
        return Ok(0);
    }
    // Nearly always nobody died, and then nobody has to wait for this.
    if gone(&file.connection, live).map_err(failed)?.is_empty() {
        return Ok(0);
    }
    let now = clock.now();
    file.write(|tx| {
        carry_over(tx, clock)?;
        let gone = gone(tx, live)?;
        gone.iter().try_fold(0, |leases, &holder| Ok(leases + note_end(tx, holder, now)?))
    })
}

/// Those noted as living that are not among `live`.
fn gone(connection: &Connection, live: &[u64]) -> rusqlite::Result<Vec<i64>> {
    let mut statement = connection.prepare("SELECT holder FROM process WHERE ended_us IS NULL")?;
    let noted = statement.query_map([], |row| row.get::<_, i64>(0))?;
    let noted = noted.collect::<rusqlite::Result<Vec<i64>>>()?;
    // Only equality matters: the sign is the file's.
    Ok(noted.into_iter().filter(|&holder| !live.contains(&(holder as u64))).collect())
}

/// Notes the end of a process; the leases of it that run.
fn note_end(tx: &Transaction<'_>, holder: i64, now: Moment) -> rusqlite::Result<usize> {
    let sql = "UPDATE process SET ended_us = ?2, ended_wall_us = ?3 WHERE holder = ?1";
    tx.execute(sql, params![holder, now.boottime_us, now.wall_us])?;
    let sql = "SELECT count(*) FROM lease WHERE holder = ?1 AND until_us > ?2";
    let leases: i64 = tx.query_row(sql, params![holder, now.boottime_us], |row| row.get(0))?;
    // Of those that leased nothing, or whose leases others have by now, nothing need be known.
    let sql = "DELETE FROM process WHERE ended_us IS NOT NULL \
               AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.holder = process.holder)";
    tx.execute(sql, [])?;
    Ok(usize::try_from(leases).unwrap_or_default())
}

impl LeaseStore {
    /// Notes this process, so that its leases are let go once it is gone: to be called by one that noted its
    /// number in its user file, before it leases anything.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn of_process(mut self) -> Result<LeaseStore, StoreError> {
        let holder = self.holder;
        self.file.write(|tx| {
            tx.execute("INSERT OR REPLACE INTO process(holder) VALUES(?1)", [holder])?;
            Ok(())
        })?;
        Ok(self)
    }

    /// Makes the lease that `mac` has on `ip` this process's, whoever gave it: the holder of a rootless network, or
    /// a process that is gone.
    ///
    /// # Errors
    /// [`Refusal::Elsewhere`] if it is another process's that lives, [`Refusal::NotBound`] if there is no such lease
    /// or it is over, [`Refusal::Store`].
    pub fn claim(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<(), Refusal> {
        let holder = self.holder;
        self.write(now, |ledger| {
            let runs = |row: &Row| row.ip == ip && row.until_us > Some(ledger.now.boottime_us);
            let Some(row) = row_of(ledger.tx, mac)?.filter(runs) else {
                return Ok(Err(BindRefusal::Taken.into()));
            };
            if row.is_of_another(holder) {
                return Ok(Err(Refusal::Elsewhere));
            }
            let sql = "UPDATE lease SET holder = ?2 WHERE mac = ?1";
            ledger.tx.prepare_cached(sql)?.execute(params![mac.0, holder])?;
            Ok(Ok(()))
        })?
    }
}
