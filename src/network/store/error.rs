//! Why the store could not be opened, read or written, in words that say what to do.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;
use thiserror::Error;

/// Why the store of leases is of no use.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Some other program's file, or none of SQLite's.
    #[error(
        "lease store {}: not a lease store of vunet; move it away, and a new one is made", .0.display()
    )]
    NotAStore(PathBuf),
    /// A store that does not hold together.
    #[error(
        "lease store {}: damaged ({detail}); move it and the files beside it (-wal, -shm) away while no \
         process of the network runs, and a new one is made: guests keep their addresses, for a free \
         address goes to whoever asks for it", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Written by a later version.
    #[error(
        "lease store {}: written by a later version of vunet (layout {found}, this version knows {known}); \
         use that version for all processes of the network", path.display()
    )]
    Later {
        /// The file.
        path: PathBuf,
        /// Its layout.
        found: i64,
        /// The latest this version knows.
        known: i64,
    },
    /// The pool of other addresses.
    #[error(
        "lease store {}: holds leases of {found}, but the network's definition says {asked}; end all its \
         processes and move the file away, or put the definition right", path.display()
    )]
    OtherPool {
        /// The file.
        path: PathBuf,
        /// Subnet and gateway it was made for.
        found: String,
        /// Those of the definition.
        asked: String,
    },
    /// A file or file system that takes no writing.
    #[error(
        "lease store {}: read-only, or not this user's; give --state-dir DIR where this user can write",
        .0.display()
    )]
    ReadOnly(PathBuf),
    /// No room.
    #[error("lease store {}: the disk (or this user's quota) is full; free some room", .0.display())]
    Full(PathBuf),
    /// Another process held it for longer than can be waited.
    #[error(
        "lease store {}: locked by another process for too long; if one of the network's processes is \
         stopped (SIGSTOP, a debugger), let it go on or end it", .0.display()
    )]
    Locked(PathBuf),
    /// A reservation that contradicts what there is.
    #[error("reservation of {ip}: {why}")]
    Reservation {
        /// The address.
        ip: std::net::Ipv4Addr,
        /// Why not, and what to do.
        why: String,
    },
    /// Anything else.
    #[error("lease store {}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What the library says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StoreError {
    /// The library's refusal as what it means here.
    pub(super) fn of(path: &Path, error: rusqlite::Error) -> StoreError {
        let path = path.to_owned();
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked(path),
            Some(ErrorCode::DiskFull) => StoreError::Full(path),
            Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => StoreError::ReadOnly(path),
            Some(ErrorCode::CannotOpen) => cannot_open(path),
            Some(ErrorCode::NotADatabase) => StoreError::NotAStore(path),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::TypeMismatch) => damaged(path, &error),
            _ => match error {
                // A value that no version writes: the file was changed by hand, or by the disk.
                rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..) => damaged(path, &error),
                error => StoreError::Other { path, source: Box::new(error) },
            },
        }
    }
}

/// The library does not say why; the folder does, if it is not there at all.
fn cannot_open(path: PathBuf) -> StoreError {
    match path.parent().map(std::fs::read_dir) {
        Some(Err(source)) => StoreError::Other { path, source: Box::new(source) },
        _ => StoreError::ReadOnly(path),
    }
}

fn damaged(path: PathBuf, error: &rusqlite::Error) -> StoreError {
    StoreError::Damaged { path, detail: error.to_string() }
}
