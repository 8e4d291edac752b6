//! The file: opened, found to be ours, laid out, and brought over from an earlier boot.
//!
//! WAL mode, `synchronous=NORMAL`: a commit is written but not flushed, so it survives the death of any
//! process at any instruction, and costs no wait for the disk; what a failure of the host may lose is the last
//! leases, of guests that died with it. No worker flushes: the log is written back by [`super::keeper`].
//! `docs/adr/0010-the-lease-store.md` says why.
//!
//! Read first: SQLite, "Write-Ahead Logging" and "PRAGMA Statements" (`synchronous`, `data_version`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};

use super::error::StoreError;
use super::{Pool, micros};
use crate::limits;
use crate::network::allocator::{DECLINE_HOLD, LEASE_TIME};
use crate::network::clock::{HostClock, Moment};

/// The file's name in the network's folder.
pub const FILE_NAME: &str = "leases.sqlite";
/// `vnet`: tells the file from others.
const APPLICATION_ID: i64 = 0x766e_6574;
/// The layout written by this version.
const LAYOUT: i64 = 2;
/// How long opening waits for other processes: several may lay the file out at once, or one recovers the log
/// of a dead one.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes the log is cut to once it is written back.
const LOG_BYTES_KEPT: i64 = 1 << 20;

/// One row of `lease` an address; times in microseconds of this boot, and of the time of day where a later
/// boot needs them. The two keys are what makes two holders of one address, or two addresses of one client,
/// impossible whatever the code above does.
const TABLES: &str = "
CREATE TABLE pool(subnet TEXT NOT NULL, gateway TEXT NOT NULL);
CREATE TABLE boot(id TEXT NOT NULL);
CREATE TABLE lease(
  ip INTEGER PRIMARY KEY,
  mac BLOB NOT NULL UNIQUE CHECK(length(mac) = 6),
  client_id BLOB CHECK(length(client_id) <= 255),
  offered_us INTEGER,
  until_us INTEGER,
  until_wall_us INTEGER,
  host_name TEXT UNIQUE,
  holder INTEGER NOT NULL
) STRICT;
CREATE TABLE declined(
  ip INTEGER PRIMARY KEY,
  until_us INTEGER NOT NULL,
  until_wall_us INTEGER NOT NULL,
  holder INTEGER NOT NULL
) STRICT;
CREATE TABLE reservation(
  ip INTEGER PRIMARY KEY,
  mac BLOB UNIQUE CHECK(length(mac) = 6),
  client_id BLOB UNIQUE CHECK(length(client_id) <= 255),
  host_name TEXT UNIQUE,
  CHECK(mac IS NOT NULL OR client_id IS NOT NULL)
) STRICT;
";

/// What layout 2 has more: the processes that lease, and when one was found gone ([`super::processes`]).
const PROCESSES: &str = "
CREATE TABLE process(
  holder INTEGER PRIMARY KEY,
  ended_us INTEGER,
  ended_wall_us INTEGER
) STRICT;
";

/// How long a connection waits for another process's lock; shared with the library's busy handler.
#[derive(Clone, Debug)]
pub(super) struct Patience(Arc<AtomicU64>);

impl Patience {
    fn new(first: Duration) -> Patience {
        Patience(Arc::new(AtomicU64::new(first.as_micros() as u64)))
    }

    pub(super) fn set(&self, wait: Duration) {
        self.0.store(wait.as_micros() as u64, Ordering::Relaxed);
    }

    /// Decides for the library whether to try again. Transactions take a tenth of a millisecond, so waits
    /// are of that kind, and unequal, so that many who wait do not come back together.
    fn handler(&self) -> impl FnMut(i32) -> bool + Send + 'static {
        let patience = Arc::clone(&self.0);
        let mut since = Instant::now();
        let mut state = u64::from(std::process::id()) | 1;
        move |tries| {
            if tries == 0 {
                since = Instant::now();
            }
            if since.elapsed() >= Duration::from_micros(patience.load(Ordering::Relaxed)) {
                return false;
            }
            // Marsaglia's xorshift: cheap, and different in each process.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            thread::sleep(Duration::from_micros(100 + state % 400));
            true
        }
    }
}

/// A connection to the store.
#[derive(Debug)]
pub(super) struct StoreFile {
    pub(super) connection: Connection,
    pub(super) patience: Patience,
    pub(super) path: PathBuf,
}

impl StoreFile {
    /// Opens the store in `folder`, or makes it.
    pub(super) fn open(folder: &Path, pool: &Pool, clock: &dyn HostClock) -> Result<StoreFile, StoreError> {
        let mut file = StoreFile::connect(folder, OpenFlags::SQLITE_OPEN_CREATE)?;
        let path = file.path.clone();
        let failed = |error| StoreError::of(&path, error);
        file.switch_to_wal()?;
        let tx = file.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
        lay_out(&tx, &path, pool)?;
        carry_over(&tx, clock).map_err(failed)?;
        tx.commit().map_err(failed)?;
        file.check()?;
        Ok(file)
    }

    /// A connection to a store that is there already, for whoever only reads it or writes its log back.
    pub(super) fn open_again(folder: &Path) -> Result<StoreFile, StoreError> {
        StoreFile::connect(folder, OpenFlags::empty())
    }

    fn connect(folder: &Path, more: OpenFlags) -> Result<StoreFile, StoreError> {
        let path = folder.join(FILE_NAME);
        let failed = |error| StoreError::of(&path, error);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
        let mut connection = Connection::open_with_flags(&path, flags).map_err(failed)?;
        let patience = Patience::new(OPEN_PATIENCE);
        connection.busy_handler(Some(patience.handler())).map_err(failed)?;
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(failed)?;
        connection.pragma_update(None, "trusted_schema", false).map_err(failed)?;
        connection.pragma_update(None, "temp_store", "MEMORY").map_err(failed)?;
        // Writing the log back is the keeper's.
        connection.pragma_update(None, "wal_autocheckpoint", 0).map_err(failed)?;
        connection.pragma_update(None, "journal_size_limit", LOG_BYTES_KEPT).map_err(failed)?;
        Ok(StoreFile { connection, patience, path })
    }

    /// The change of mode asks for the whole file and is refused at once, not after a wait, if another process
    /// does the same: so it is tried again here.
    fn switch_to_wal(&self) -> Result<(), StoreError> {
        let begin = Instant::now();
        loop {
            let asked = self
                .connection
                .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0));
            match asked.map_err(|error| StoreError::of(&self.path, error)) {
                Ok(mode) if mode == "wal" => return Ok(()),
                Err(StoreError::Locked(_)) if begin.elapsed() < OPEN_PATIENCE => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error),
                // The library says the mode it kept: it could not make the memory that processes share.
                Ok(_) => return Err(StoreError::ReadOnly(self.path.clone())),
            }
        }
    }

    /// Looks through all pages: a damaged store is told of now, not when a guest asks for its address.
    fn check(&self) -> Result<(), StoreError> {
        let verdict: String = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|error| StoreError::of(&self.path, error))?;
        if verdict == "ok" {
            return Ok(());
        }
        Err(StoreError::Damaged { path: self.path.clone(), detail: verdict })
    }

    /// Runs `work` alone among all processes. What it changed is there once this returns, or not at all.
    pub(super) fn write<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let path = &self.path;
        let outcome = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .and_then(|tx| {
                let value = work(&tx)?;
                tx.commit()?;
                Ok(value)
            })
            .map_err(|error| StoreError::of(path, error));
        // A lock nobody gives back is not waited for twice.
        self.patience.set(match &outcome {
            Err(StoreError::Locked(_)) => limits::STORE_WAIT_AFTER_LOCKED,
            _ => limits::STORE_WAIT,
        });
        outcome
    }
}

/// Makes the tables, or finds out that they are ours and for this pool.
fn lay_out(tx: &Transaction<'_>, path: &Path, pool: &Pool) -> Result<(), StoreError> {
    let failed = |error| StoreError::of(path, error);
    let number = |pragma| tx.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0)).map_err(failed);
    let (id, layout) = (number("application_id")?, number("user_version")?);
    let tables: i64 =
        tx.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(failed)?;
    let asked = (pool.subnet.to_string(), pool.gateway.to_string());
    if (id, layout, tables) == (0, 0, 0) {
        tx.execute_batch(TABLES).map_err(failed)?;
        tx.execute_batch(PROCESSES).map_err(failed)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
        tx.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
        tx.execute("INSERT INTO pool VALUES(?1, ?2)", params![asked.0, asked.1]).map_err(failed)?;
        return Ok(());
    }
    if id != APPLICATION_ID || layout < 1 {
        return Err(StoreError::NotAStore(path.to_owned()));
    }
    if layout > LAYOUT {
        return Err(StoreError::Later { path: path.to_owned(), found: layout, known: LAYOUT });
    }
    let found: (String, String) = tx
        .query_row("SELECT subnet, gateway FROM pool", [], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(failed)?;
    if found != asked {
        let text = |(subnet, gateway): (String, String)| format!("{subnet} with gateway {gateway}");
        return Err(StoreError::OtherPool { path: path.to_owned(), found: text(found), asked: text(asked) });
    }
    if layout < LAYOUT {
        // Processes of the earlier version that still run go on: what they know is as it was.
        tx.execute_batch(PROCESSES).map_err(failed)?;
        tx.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    }
    Ok(())
}

/// Times of an earlier boot become times of this one: what was left by the time of day, but no more than there
/// can be, should one of the two clocks have been wrong. Offers are void: their clients are gone, and so is every
/// process.
pub(super) fn carry_over(tx: &Transaction<'_>, clock: &dyn HostClock) -> rusqlite::Result<()> {
    let written: Option<String> = match tx.query_row("SELECT id FROM boot", [], |row| row.get(0)) {
        Ok(id) => Some(id),
        Err(rusqlite::Error::QueryReturnedNoRows) => None,
        Err(error) => return Err(error),
    };
    if written.as_deref() == Some(clock.boot_id()) {
        return Ok(());
    }
    let Moment { boottime_us, wall_us } = clock.now();
    tx.execute("UPDATE lease SET offered_us = NULL", [])?;
    tx.execute("DELETE FROM lease WHERE until_us IS NULL", [])?;
    // The lower bound keeps the order in which leases ended, and numbers far from overflow.
    let ages_us: i64 = 1 << 52;
    for (table, most) in [("lease", LEASE_TIME), ("declined", DECLINE_HOLD)] {
        let sql =
            format!("UPDATE {table} SET until_us = ?1 + max(-?4, min(until_wall_us - ?2, ?3)) WHERE true");
        tx.execute(&sql, params![boottime_us, wall_us, micros(most), ages_us])?;
    }
    let sql = "UPDATE process SET ended_us = ?1 + max(-?3, min(coalesce(ended_wall_us - ?2, 0), 0)), \
               ended_wall_us = coalesce(ended_wall_us, ?2) WHERE true";
    tx.execute(sql, params![boottime_us, wall_us, ages_us])?;
    tx.execute("DELETE FROM boot", [])?;
    tx.execute("INSERT INTO boot VALUES(?1)", [clock.boot_id()])?;
    Ok(())
}
