//! The process from the moment it serves until it ends: signals, settings that change, the service manager.

use std::future;
use std::sync::Arc;
use std::thread;

use futures_util::future::join_all;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::cli::Reloader;
use crate::config::{Attach, Lan, LiveConfig};
use crate::control::api::Stop;
use crate::control::events::Event;
use crate::control::service_manager::ServiceManager;
use crate::control::signals::{Asked, Signals};
use crate::device::SessionError;
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
}

impl Live {
    /// Applies what was judged; none of it can fail any more. Every field is taken here, so that one that nobody
    /// obeys does not compile.
    fn apply(&self, change: LiveConfig) {
        let LiveConfig { log_level, dns } = change;
        if let Some(level) = log_level
            && let Err(error) = self.log.set_level(&level)
        {
            // It was judged by the same parser.
            tracing::error!(%error);
        }
        if let Some(dns) = dns {
            self.dns.set_names(&dns, &self.lan);
        }
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
                    Asked::Reload => self.reload(&manager).await,
                },
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

    /// Reads the settings again, away from this thread, and applies all that changed or nothing.
    async fn reload(&mut self, manager: &Manager) {
        let Some(mut reloader) = self.reloader.take() else { return };
        manager.told.reloading();
        let read = spawn_blocking(move || {
            let change = reloader.reload();
            (reloader, change)
        });
        let Ok((reloader, change)) = read.await else {
            tracing::error!("settings are not read any more: their reader has failed");
            return;
        };
        let path = reloader.path().display().to_string();
        self.reloader = Some(reloader);
        match change {
            Ok(change) => {
                let changed = change.keys().join(", ");
                self.live.apply(change);
                tracing::info!(file = %path, %changed, "settings read again");
                manager.told.ready(&manager.status);
            }
            Err(error) => {
                tracing::error!("settings stay as they are: {error}");
                manager.told.ready(&format!("{}; settings stay as they are: {error}", manager.status));
            }
        }
    }
}

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
        let tick = async {
            match &mut self.alive {
                Some(alive) => alive.tick().await,
                None => future::pending().await,
            }
        };
        tokio::select! {
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
