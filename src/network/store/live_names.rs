//! Names of all guests of the network, as their leases come and go in whatever process.
//!
//! Each question asks the store's change counter (`PRAGMA data_version`: no lock that a writer holds, a few
//! microseconds); only after a change are names read anew. A lease that ends by itself changes nothing in
//! the store, so ends are kept and looked at. While the store cannot be read, the last known names stand.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::StoreError;
use super::file::StoreFile;
use super::pool::ip_at;
use crate::limits;
use crate::network::clock::HostClock;
use crate::network::guest_names::GuestNames;

/// How often it is said that the store cannot be read.
const COMPLAINT_PAUSE: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Debug)]
pub struct LiveNames {
    known: Mutex<Known>,
    clock: Arc<dyn HostClock>,
}

#[derive(Debug)]
struct Known {
    file: StoreFile,
    /// The change counter when names were read last.
    version: Option<i64>,
    by_name: HashMap<String, Held>,
    by_ip: HashMap<Ipv4Addr, String>,
    complained: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    ip: Ipv4Addr,
    until_us: i64,
}

impl LiveNames {
    /// The names of the store in `folder`, which exists.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(folder: &Path, clock: Arc<dyn HostClock>) -> Result<LiveNames, StoreError> {
        let file = StoreFile::open_again(folder)?;
        file.patience.set(limits::STORE_WAIT_AFTER_LOCKED);
        let (by_name, by_ip) = (HashMap::new(), HashMap::new());
        let known = Known { file, version: None, by_name, by_ip, complained: None };
        Ok(LiveNames { known: Mutex::new(known), clock })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = known.follow() {
            let error = StoreError::of(&known.file.path, error);
            if known.complained.is_none_or(|at| at.elapsed() >= COMPLAINT_PAUSE) {
                known.complained = Some(Instant::now());
                tracing::warn!(%error, "names of the network's guests are answered as last known");
            }
        }
        known
    }
}

impl Known {
    /// Reads names anew if anything changed.
    fn follow(&mut self) -> rusqlite::Result<()> {
        let connection = &self.file.connection;
        let version: i64 =
            connection.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get(0))?;
        if self.version == Some(version) {
            return Ok(());
        }
        let sql = "SELECT host_name, ip, until_us FROM lease WHERE host_name IS NOT NULL AND until_us IS NOT NULL \
             AND holder NOT IN (SELECT holder FROM process WHERE ended_us IS NOT NULL)";
        let mut statement = connection.prepare_cached(sql)?;
        let rows = statement.query_map([], |row| {
            Ok((row.get::<_, String>(0)?, Held { ip: ip_at(row, 1)?, until_us: row.get(2)? }))
        })?;
        let by_name = rows.collect::<rusqlite::Result<HashMap<String, Held>>>()?;
        self.by_ip = by_name.iter().map(|(name, held)| (held.ip, name.clone())).collect();
        self.by_name = by_name;
        self.version = Some(version);
        Ok(())
    }

    fn held(&self, name: &str, now_us: i64) -> Option<Held> {
        self.by_name.get(name).copied().filter(|held| held.until_us > now_us)
    }
}

impl GuestNames for LiveNames {
    fn address_of(&self, label: &str) -> Option<Ipv4Addr> {
        let now_us = self.clock.now().boottime_us;
        self.known().held(label, now_us).map(|held| held.ip)
    }

    fn name_of(&self, ip: Ipv4Addr) -> Option<String> {
        let now_us = self.clock.now().boottime_us;
        let known = self.known();
        let name = known.by_ip.get(&ip)?;
        known.held(name, now_us).map(|_| name.clone())
    }

    fn all(&self) -> Vec<(String, Ipv4Addr)> {
        let now_us = self.clock.now().boottime_us;
        let known = self.known();
        let held = known.by_name.iter().filter(|(_, held)| held.until_us > now_us);
        held.map(|(name, held)| (name.clone(), held.ip)).collect()
    }
}
