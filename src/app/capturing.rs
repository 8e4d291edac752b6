//! The capture of `--pcap`: its file is opened before anything can be seen from outside, and it begins before a VM
//! can attach.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;

use super::Error;
use crate::capture::{self, Opened};
use crate::config::{Attach, PcapConfig};
use crate::control::capture::{CaptureError, Captures, Target};
use crate::control::events::Events;
use crate::requests::{NoAnswer, Request, WorkerHandle};

/// How long workers may take to begin before their first request is given up.
const START_MAX: Duration = Duration::from_secs(30);

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

/// Waits until every worker has begun, which takes time where their tables are large.
async fn are_there(workers: &[WorkerHandle]) {
    let since = Instant::now();
    for worker in workers {
        while worker.ask(Request::Report).await.is_err_and(|error| error == NoAnswer::Busy)
            && since.elapsed() < START_MAX
        {}
    }
}

/// Begins the capture that was configured, if one was.
pub(super) fn begin(
    runtime: &Runtime,
    captures: &Captures,
    workers: &[WorkerHandle],
    opened: Option<Opened>,
    config: Option<&PcapConfig>,
) -> Result<(), Error> {
    let Some((opened, config)) = opened.zip(config) else { return Ok(()) };
    runtime.block_on(are_there(workers));
    let target = Target::Opened(opened, Path::to_path_buf(&config.path));
    runtime.block_on(captures.start(target, config.settings.clone()))?;
    Ok(())
}
