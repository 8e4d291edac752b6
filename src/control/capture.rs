//! The capture of a process: begun at its start or by a client of the control API, one at a time.
//!
//! Workers are handed recorders by requests, and give them back before the writer is told to end, so that all they
//! recorded is written. Whatever ends it, the same task winds it up and tells of it.
//!
//! May touch: `requests`, `capture`, `events`. Read first: `capture`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};

use super::events::{CaptureEnd, Event, Events};
use crate::capture::{Ended, OpenError, Opened, Progress, Recorder, Rings, Settings, Sink, Totals, open};
use crate::limits::CAPTURE_END;
use crate::requests::{NoAnswer, Request, WorkerHandle};

/// How long the writer may take to end before it is left to itself: a disk that hangs.
const END_TIMEOUT: Duration = CAPTURE_END.saturating_mul(4);

/// Where a capture is to go.
#[derive(Debug)]
pub enum Target {
    /// To a file or FIFO.
    Path(PathBuf),
    /// To one that was opened before, from this path.
    Opened(Opened, PathBuf),
    /// To a client.
    Client(mpsc::Sender<Vec<u8>>),
}

/// Why no capture begins.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// There is one.
    #[error("a capture runs already, to {0}: stop it first")]
    Running(String),
    /// Its file.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// No thread.
    #[error("its thread cannot be had: {0}")]
    Thread(#[source] std::io::Error),
    /// A worker does not answer.
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
}

/// Why a capture ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A client of the control API asked for it.
    Stopped,
    /// It has as many bytes as it may have.
    MaxBytes,
    /// Its time is over.
    Duration,
    /// Who read it is gone, or took too long.
    ReaderLeft,
    /// It could not be written.
    WriteFailed,
    /// The process ends.
    ProcessEnds,
}

impl Reason {
    /// Its name in the control API.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Stopped => "stopped",
            Reason::MaxBytes => "max_bytes",
            Reason::Duration => "duration",
            Reason::ReaderLeft => "reader_left",
            Reason::WriteFailed => "write_failed",
            Reason::ProcessEnds => "process_ends",
        }
    }
}

/// A capture that runs, or did.
#[derive(Clone, Debug)]
pub struct CaptureState {
    /// Where it goes: a path, or `client`.
    pub to: String,
    /// What is captured.
    pub settings: Settings,
    /// How much there is.
    pub totals: Totals,
    /// How long it has run.
    pub took: Duration,
    /// Whether it waits for the reader of a FIFO.
    pub awaits_reader: bool,
    /// Why it ended; none while it runs.
    pub ended: Option<Reason>,
    /// With [`Reason::WriteFailed`], what went wrong.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Running {
    to: String,
    settings: Settings,
    progress: Arc<Progress>,
    began: Instant,
    /// Asks for its end; none if that was asked for.
    ask: Option<oneshot::Sender<Reason>>,
    /// How it ended, once it has.
    over: watch::Receiver<Option<CaptureState>>,
}

impl Running {
    fn state(&self, ended: Option<(Reason, Option<String>)>) -> CaptureState {
        let (ended, error) = ended.unzip();
        CaptureState {
            to: self.to.clone(),
            settings: self.settings.clone(),
            totals: self.progress.totals(),
            took: self.began.elapsed(),
            awaits_reader: ended.is_none() && self.progress.awaits_reader(),
            ended,
            error: error.flatten(),
        }
    }
}

/// What the task that winds a capture up waits for and tells.
struct Attended {
    duration: Option<Duration>,
    asked: oneshot::Receiver<Reason>,
    progress: Arc<Progress>,
    writer: Thread,
    written: oneshot::Receiver<Ended>,
    finish: watch::Sender<Option<CaptureState>>,
}

#[derive(Debug, Default)]
struct Current {
    running: Option<Running>,
    last: Option<CaptureState>,
    /// Of all captures that have ended.
    before: Totals,
}

#[derive(Debug)]
struct Shared {
    workers: Vec<WorkerHandle>,
    events: Events,
    guest: String,
    /// Held while one begins, which may take as long as its file takes to open.
    beginning: tokio::sync::Mutex<()>,
    /// Held for moments only.
    current: Mutex<Current>,
}

/// The captures of a process, one at a time.
#[derive(Clone, Debug)]
pub struct Captures(Arc<Shared>);

impl Captures {
    /// None yet, of the guest called `guest`.
    pub fn new(workers: Vec<WorkerHandle>, events: Events, guest: String) -> Captures {
        let beginning = tokio::sync::Mutex::default();
        Captures(Arc::new(Shared { workers, events, guest, beginning, current: Mutex::default() }))
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a capture. Once this returns, what crosses the device is captured.
    ///
    /// # Errors
    /// [`CaptureError`].
    pub async fn start(&self, target: Target, settings: Settings) -> Result<CaptureState, CaptureError> {
        let _turn = self.0.beginning.lock().await;
        if let Some(running) = &self.current().running {
            return Err(CaptureError::Running(running.to.clone()));
        }
        let (sink, to) = sink(target).await?;
        let rings = Rings::new(self.0.workers.len());
        let progress = rings.progress();
        let (tell, written) = oneshot::channel();
        let (recorders, writer) = rings
            .start(&settings, &self.0.guest, sink, |ended| {
                // Fails only if the process ends and nobody wants to know.
                let _ = tell.send(ended);
            })
            .map_err(CaptureError::Thread)?;
        if let Err(error) = self.hand_out(recorders).await {
            self.take_back().await;
            progress.stop();
            writer.unpark();
            return Err(error.into());
        }
        let (ask, asked) = oneshot::channel();
        let (finish, over) = watch::channel(None);
        let began = Instant::now();
        let running = Running { to, settings, progress, began, ask: Some(ask), over };
        let state = running.state(None);
        tracing::info!(to = running.to, snaplen = running.settings.snaplen, "a capture began");
        self.0.events.tell(Event::CaptureStarted { to: running.to.clone() });
        let duration = running.settings.duration;
        let progress = Arc::clone(&running.progress);
        self.current().running = Some(running);
        let attended = Attended { duration, asked, progress, writer, written, finish };
        tokio::spawn(self.clone().attend(attended));
        Ok(state)
    }

    /// Ends the capture that runs, and says how it was; none if none runs.
    pub async fn stop(&self, why: Reason) -> Option<CaptureState> {
        let mut over = {
            let mut current = self.current();
            let running = current.running.as_mut()?;
            if let Some(ask) = running.ask.take() {
                // Fails only if it ends by itself just now.
                let _ = ask.send(why);
            }
            running.over.clone()
        };
        over.wait_for(Option::is_some).await.ok().and_then(|state| state.clone())
    }

    /// The capture that runs, else the last one.
    pub fn state(&self) -> Option<CaptureState> {
        let current = self.current();
        current.running.as_ref().map(|running| running.state(None)).or_else(|| current.last.clone())
    }

    /// What all captures since the start came to, and whether one runs.
    pub fn totals(&self) -> (Totals, bool) {
        let current = self.current();
        let of_running = current.running.as_ref().map(|running| running.progress.totals());
        (current.before.plus(&of_running.unwrap_or_default()), of_running.is_some())
    }

    async fn hand_out(&self, recorders: Vec<Recorder>) -> Result<(), NoAnswer> {
        for (worker, recorder) in self.0.workers.iter().zip(recorders) {
            worker.ask(|answer| Request::Record(Some(Box::new(recorder)), answer)).await?;
        }
        Ok(())
    }

    /// Takes the recorders back. One that does not come back in time ends with its writer.
    async fn take_back(&self) {
        for worker in &self.0.workers {
            // What is dropped here has nothing left to show.
            let _ = worker.ask(|answer| Request::Record(None, answer)).await;
        }
    }

    /// Winds the capture up once it has ended by itself, was asked to, or had its time.
    async fn attend(self, attended: Attended) {
        let Attended { duration, asked, progress, writer, mut written, finish } = attended;
        let time = async {
            match duration {
                Some(duration) => sleep(duration).await,
                None => std::future::pending().await,
            }
        };
        let (reason, ended) = tokio::select! {
            ended = &mut written => (None, ended.ok()),
            Ok(reason) = asked => (Some(reason), None),
            () = time => (Some(Reason::Duration), None),
        };
        self.take_back().await;
        let ended = match (ended, reason) {
            (None, Some(_)) => {
                progress.stop();
                writer.unpark();
                timeout(END_TIMEOUT, written).await.ok().and_then(Result::ok)
            }
            (ended, _) => ended,
        };
        self.wind_up(outcome(ended, reason), &finish);
    }

    fn wind_up(
        &self,
        (reason, error): (Reason, Option<String>),
        finish: &watch::Sender<Option<CaptureState>>,
    ) {
        let mut current = self.current();
        let Some(running) = current.running.take() else { return };
        let state = running.state(Some((reason, error)));
        let Totals { frames, lost, bytes, .. } = state.totals;
        match &state.error {
            Some(error) => tracing::error!(to = state.to, error, frames, lost, bytes, "the capture ended"),
            None => tracing::info!(
                to = state.to,
                reason = reason.name(),
                frames,
                lost,
                bytes,
                "the capture ended"
            ),
        }
        let end =
            CaptureEnd { to: state.to.clone(), reason: reason.name(), frames, lost_frames: lost, bytes };
        self.0.events.tell(Event::CaptureEnded(end));
        current.before = current.before.plus(&state.totals);
        current.last = Some(state.clone());
        finish.send_replace(Some(state));
    }
}

/// Where blocks are written, and its name.
async fn sink(target: Target) -> Result<(Sink, String), CaptureError> {
    match target {
        Target::Client(client) => Ok((Sink::Stream(client), "client".to_owned())),
        Target::Opened(opened, path) => Ok((opened.into(), path.display().to_string())),
        Target::Path(path) => {
            let to = path.display().to_string();
            // A filesystem that hangs is not to hold the control thread.
            let opened = tokio::task::spawn_blocking(move || open(&path)).await;
            let opened = opened.map_err(|error| CaptureError::Thread(std::io::Error::other(error)))??;
            Ok((opened.into(), to))
        }
    }
}

/// Why it ended, and what went wrong: how the writer ended, if it did, and what it was asked for.
fn outcome(ended: Option<Ended>, asked: Option<Reason>) -> (Reason, Option<String>) {
    match ended {
        Some(Ended::Failed(error)) => (Reason::WriteFailed, Some(error.to_string())),
        Some(Ended::Full) => (Reason::MaxBytes, None),
        Some(Ended::Left) => (Reason::ReaderLeft, None),
        Some(Ended::Drained | Ended::GaveUp) => (asked.unwrap_or(Reason::Stopped), None),
        None => (Reason::WriteFailed, Some("its writer does not end".to_owned())),
    }
}
