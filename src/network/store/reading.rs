//! Leases read beside those who write them, by who is no worker: over a connection of its own, so that nobody who answers
//! DHCP waits for it. In WAL mode readers hold up no writer, and writers no reader.

use std::path::PathBuf;
use std::sync::Arc;

use super::error::StoreError;
use super::file::StoreFile;
use super::{lease, pool};
use crate::limits;
use crate::network::allocator::Lease;
use crate::network::clock::HostClock;
use crate::time::Instant;

/// See the [module](self).
#[derive(Debug)]
pub struct LeaseReader {
    folder: PathBuf,
    clock: Arc<dyn HostClock>,
    /// None until somebody asks, and after a failure.
    file: Option<StoreFile>,
}

impl LeaseReader {
    /// One of the store in `folder`, which is opened once somebody asks.
    pub fn new(folder: PathBuf, clock: Arc<dyn HostClock>) -> LeaseReader {
        LeaseReader { folder, clock, file: None }
    }

    /// All leases known, by address, in the time `now` is of. Waits for the disk, and for who recovers the log of a dead
    /// process up to [`limits::STORE_WAIT`].
    ///
    /// # Errors
    /// [`StoreError`]; the next call opens the store anew.
    pub fn leases(&mut self, now: Instant) -> Result<Vec<Lease>, StoreError> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let file = StoreFile::open_again(&self.folder)?;
                file.patience.set(limits::STORE_WAIT);
                file
            }
        };
        let moment = self.clock.at(now);
        let rows = pool::rows(&file.connection).map_err(|error| StoreError::of(&file.path, error))?;
        self.file = Some(file);
        Ok(rows.iter().map(|row| lease(row, now, moment)).collect())
    }
}
