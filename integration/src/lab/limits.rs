//! The host's limits on socket buffers, changed for a while.

use std::fs::{self, File};
use std::path::Path;

use super::LabError;
use crate::sys::lock;

/// Whoever changes the limits holds the lock on this file: they belong to the whole machine.
const LOCK_FILE: &str = "/tmp/vunet-buffer-limits.lock";
const FILES: [&str; 2] = ["/proc/sys/net/core/wmem_max", "/proc/sys/net/core/rmem_max"];

/// Limits on what SO_SNDBUF and SO_RCVBUF can be set to, put back when dropped.
#[derive(Debug)]
pub struct BufferLimits {
    before: Vec<(&'static str, String)>,
    _lock: File,
}

impl BufferLimits {
    /// Sets both limits to `bytes`, once no other test has changed them.
    ///
    /// # Errors
    /// If they cannot be read or set.
    pub fn set(bytes: u32) -> Result<BufferLimits, LabError> {
        let fail = |what: &'static str| move |e| LabError::Io(what.to_owned(), e);
        let lock = lock::exclusive(Path::new(LOCK_FILE)).map_err(fail(LOCK_FILE))?;
        let mut limits = BufferLimits { before: Vec::new(), _lock: lock };
        for file in FILES {
            let before = fs::read_to_string(file).map_err(fail(file))?;
            limits.before.push((file, before));
            fs::write(file, bytes.to_string()).map_err(fail(file))?;
        }
        Ok(limits)
    }
}

impl Drop for BufferLimits {
    fn drop(&mut self) {
        for (file, value) in &self.before {
            if let Err(e) = fs::write(file, value) {
                eprintln!("{file} stays changed: {e}");
            }
        }
    }
}
