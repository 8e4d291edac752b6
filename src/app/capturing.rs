//! The capture of `--pcap`: its file is opened before anything can be seen from outside, and it begins before a VM
//! can attach.

use std::path::Path;

use tokio::runtime::Runtime;

use super::Error;
use crate::capture::{self, Opened};
use crate::config::{Attach, PcapConfig};
use crate::control::capture::{CaptureError, Captures, Target};
use crate::control::events::Events;
use crate::requests::WorkerHandle;

/// Opens the file.
pub(super) fn open(config: &PcapConfig) -> Result<Opened, Error> {
    Ok(capture::open(&config.path).map_err(CaptureError::from)?)
}

/// The process's captures, none yet. The guest is called as its socket is.
pub(super) fn captures(workers: Vec<WorkerHandle>, events: &Events, attach: &Attach) -> Captures {
    let guest = match attach {
        Attach::Listen(path) | Attach::Connect(path) => path.file_stem().map(|name| name.to_string_lossy()),
        Attach::Inherited(_) => None,
    };
    Captures::new(workers, events.clone(), guest.map_or_else(|| "guest".to_owned(), Into::into))
}

/// Begins the capture that was configured, if one was.
pub(super) fn begin(
    runtime: &Runtime,
    captures: &Captures,
    opened: Option<Opened>,
    config: Option<&PcapConfig>,
) -> Result<(), Error> {
    let Some((opened, config)) = opened.zip(config) else { return Ok(()) };
    let target = Target::Opened(opened, Path::to_path_buf(&config.path));
    runtime.block_on(captures.start(target, config.settings.clone()))?;
    Ok(())
}
