//! The process from the moment it serves until it ends: signals, settings that change, the service manager.

mod reading;

use std::sync::Arc;
use std::{future, thread};

use futures_util::future::join_all;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};
use vmm_sys_util::eventfd::EventFd;

use self::reading::{Outcome, Reading};
use super::Error;
use crate::cli::{ReloadError, Reloader};
use crate::config::{Attach, Lan, LiveConfig};
use crate::control::api::Stop;
use crate::control::events::Event;
use crate::control::limits::LiveLimits;
use crate::control::ports::PortError;
use crate::control::ports_of_settings::PortsOfSettings;
use crate::control::service_manager::ServiceManager;
use crate::control::signals::{Asked, Signals};
use crate::device::SessionError;
use crate::limits;
use crate::log::Log;
use crate::requests::{NoAnswer, Request, WorkerHandle};
use crate::service::dns::DnsService;

/// The session's thread, waited for.
pub(super) type Ended = JoinHandle<thread::Result<Result<(), SessionError>>>;

/// Where a process serves, for people.
pub(super) fn serving(attach: &Attach) -> String {
    match attach {
        Attach::Listen(path) => format!("serving {}", path.display()),
        Attach::Connect(path) => format!("serving the VM that listens on {}", path.display()),
        Attach::Inherited(_) => "serving the socket it was started with".to_owned(),
    }
}

/// Parts of a running backend that settings change.
pub(super) struct Live {
    pub(super) log: Log,
    pub(super) dns: Arc<DnsService>,
    pub(super) lan: Lan,
    pub(super) limits: LiveLimits,
    pub(super) ports: PortsOfSettings,
}

impl Live {
    /// Applies what was judged, or nothing of it. Every field is taken here, so that one that nobody obeys does not
    /// compile.
    ///
    /// # Errors
    /// Ports cannot be published.
    async fn apply(&mut self, change: LiveConfig) -> Result<(), PortError> {
        let LiveConfig { log_level, dns, publish, limit_from_guest, limit_to_guest } = change;
        // First, as it alone can fail.
        if let Some(publish) = publish {
            self.ports.change(&publish).await?;
        }
        if let Some(level) = log_level
            && let Err(error) = self.log.set_level(&level)
        {
            // It was judged by the same parser.
            tracing::error!(%error);
        }
        if let Some(dns) = dns {
            self.dns.set_names(&dns, &self.lan);
        }
        if (limit_from_guest.is_some() || limit_to_guest.is_some())
            && let Err(error) = self.limits.set(limit_from_guest, limit_to_guest)
        {
            // It was judged by the same rule.
            tracing::error!(%error);
        }
        Ok(())
    }
}

/// Who looks after the process.
pub(super) struct Supervisor {
    pub(super) signals: Signals,
    /// The end, asked for by a client of the control API.
    pub(super) stop: Stop,
    pub(super) reloader: Option<Reloader>,
    pub(super) live: Live,
    pub(super) workers: Vec<WorkerHandle>,
    /// Where it serves, for people.
    pub(super) serving: String,
}

impl Supervisor {
    /// Waits for a signal or a client that ends the process, or the session's end; and for the session after a signal.
    /// `news` is what happens, from before the first VM could come.
    pub(super) async fn run(
        mut self,
        news: broadcast::Receiver<Event>,
        mut session: Ended,
        shutdown: &EventFd,
    ) -> Result<(), Error> {
        let mut manager = Manager::new(&self.serving, &self.workers, news);
        let mut reading = Reading::new(reading::PATIENCE);
        manager.told.ready(&manager.status);
        let ended = loop {
            tokio::select! {
                asked = self.signals.next() => match asked {
                    Asked::End(name) => {
                        tracing::info!(signal = name, "ending");
                        manager.told.stopping();
                        let _ = shutdown.write(1);
                        break (&mut session).await;
                    }
                    Asked::Reload => self.read_again(&mut reading, &manager),
                },
                read = reading.outcome() => {
                    self.settle(read, &mut manager).await;
                    if reading.take_again() {
                        self.read_again(&mut reading, &manager);
                    }
                }
                () = self.stop.asked() => {
                    manager.told.stopping();
                    let _ = shutdown.write(1);
                    break (&mut session).await;
                }
                ended = &mut session => {
                    manager.told.stopping();
                    break ended;
                }
                () = manager.attend() => {}
            }
        };
        match ended {
            Ok(Ok(result)) => Ok(result?),
            _ => Err(Error::Thread("session")),
        }
    }

    /// Begins to read the settings again, away from this thread.
    fn read_again(&self, reading: &mut Reading<Read>, manager: &Manager) {
        let Some(reloader) = &self.reloader else { return };
        if reading.follows() {
            return;
        }
        let mut reloader = reloader.clone();
        let begun = reading.begin(move || {
            let change = reloader.reload();
            (reloader, change)
        });
        match begun {
            Ok(()) => manager.told.reloading(),
            Err(error) => tracing::error!("settings stay as they are: {error}"),
        }
    }

    /// Applies all that changed, or nothing.
    async fn settle(&mut self, read: Outcome<Read>, manager: &mut Manager) {
        let path = self.reloader.as_ref().map(|reloader| reloader.path().display().to_string());
        let why = match read {
            Outcome::Done((reloader, Ok(change))) => {
                let changed = change.keys().join(", ");
                match self.live.apply(change).await {
                    Ok(()) => {
                        self.reloader = Some(reloader);
                        tracing::info!(file = %path.unwrap_or_default(), %changed, "settings read again");
                        return manager.told.ready(&manager.status);
                    }
                    Err(error) => error.to_string(),
                }
            }
            Outcome::Done((_, Err(error))) => error.to_string(),
            Outcome::Late => format!(
                "--config {}: it could not be read within {} s: is its file system there? Try again once it is",
                path.unwrap_or_default(),
                reading::PATIENCE.as_secs()
            ),
            Outcome::Failed => "their reader has failed".to_owned(),
        };
        tracing::error!("settings stay as they are: {why}");
        manager.told.ready(&format!("{}; settings stay as they are: {why}", manager.status));
    }
}

/// What was read, and what reads on from there if it is applied.
type Read = (Reloader, Result<LiveConfig, ReloadError>);

/// The service manager, told of life and of VMs that come and go.
struct Manager {
    told: ServiceManager,
    alive: Option<tokio::time::Interval>,
    workers: Vec<WorkerHandle>,
    events: broadcast::Receiver<Event>,
    serving: String,
    status: String,
}

impl Manager {
    fn new(serving: &str, workers: &[WorkerHandle], events: broadcast::Receiver<Event>) -> Manager {
        let told = ServiceManager::from_environment();
        let alive = told.alive_period().map(|period| {
            let mut alive = interval(period);
            alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
            alive
        });
        let status = format!("{serving}: no VM yet");
        Manager { told, alive, workers: workers.to_vec(), events, serving: serving.to_owned(), status }
    }

    /// Waits until there is something to tell, and tells it. Dropped at any of its waits it loses nothing but a
    /// question to the workers, which the next tick asks again.
    async fn attend(&mut self) {
        self.told.settle();
        let is_owed = self.told.is_owed();
        let again =
            async { if is_owed { sleep(limits::MANAGER_RETRY).await } else { future::pending().await } };
        let tick = async {
            match &mut self.alive {
                Some(alive) => alive.tick().await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            // The next turn tries.
            () = again => {}
            _ = tick => {
                if are_alive(&self.workers).await {
                    self.told.alive();
                }
            }
            event = self.events.recv() => match event {
                Ok(Event::Attached) => self.note("a VM is attached"),
                Ok(Event::Detached) => self.note("no VM"),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => future::pending().await,
            },
        }
    }

    /// Every worker tells of the same VM.
    fn note(&mut self, what: &str) {
        let status = format!("{}: {what}", self.serving);
        if self.status != status {
            self.told.status(&status);
            self.status = status;
        }
    }
}

/// Whether every worker answers. One that has ended is no reason to restart the process: it ends by itself then.
async fn are_alive(workers: &[WorkerHandle]) -> bool {
    let answers = join_all(workers.iter().map(|worker| worker.ask(Request::Report))).await;
    let hung = answers.iter().position(|answer| matches!(answer, Err(NoAnswer::Busy | NoAnswer::Full)));
    if let Some(worker) = hung {
        tracing::error!(
            worker,
            "a worker does not answer; the service manager's watchdog is not told that it lives"
        );
    }
    hung.is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::channel;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    #[test]
    fn the_process_is_alive_only_while_every_worker_answers() {
        let (one, mut requests) = channel().unwrap();
        let (hung, _kept) = channel().unwrap();
        let (ended, gone) = channel().unwrap();
        drop(gone);
        let worker = thread::spawn(move || {
            let mut answered = 0;
            while answered < 2 {
                match requests.take() {
                    Some(Request::Report(answer)) => {
                        answered += 1;
                        let _ = answer.send(crate::requests::WorkerReport::default());
                    }
                    Some(other) => panic!("{other:?} was not asked"),
                    None => thread::yield_now(),
                }
            }
        });
        let runtime = runtime();
        assert!(runtime.block_on(are_alive(&[one.clone(), ended])));
        assert!(!runtime.block_on(are_alive(&[one, hung])));
        worker.join().unwrap();
    }
}
