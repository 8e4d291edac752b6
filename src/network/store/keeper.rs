//! Writes the store's log back into the store, and flushes both: the only one who waits for the disk, so it is
//! run where nobody waits for it.

use std::fs;
use std::path::{Path, PathBuf};

use super::StoreError;
use super::file::StoreFile;
use crate::limits;

/// See the [module](self).
#[derive(Debug)]
pub struct Keeper {
    file: StoreFile,
    log: PathBuf,
}

impl Keeper {
    /// The keeper of the store in `folder`, which exists.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(folder: &Path) -> Result<Keeper, StoreError> {
        let file = StoreFile::open_again(folder)?;
        let mut log = file.path.clone().into_os_string();
        log.push("-wal");
        Ok(Keeper { file, log: log.into() })
    }

    /// Bytes of the log. Looks at the file without opening it: closing it would drop this process's locks.
    fn log_bytes(&self) -> u64 {
        fs::metadata(&self.log).map_or(0, |meta| meta.len())
    }

    /// Writes back what no reader needs in the log any more, if the log is worth it. Stops nobody: who writes
    /// or reads meanwhile goes on.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn write_back(&mut self) -> Result<(), StoreError> {
        if self.log_bytes() < limits::STORE_LOG_BYTES {
            return Ok(());
        }
        self.file
            .connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))
            .map_err(|error| StoreError::of(&self.file.path, error))
    }
}
