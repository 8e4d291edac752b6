//! The process from the moment it serves until it ends: signals, settings that change, the service manager.

use std::sync::Arc;
use std::thread;

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::cli::Reloader;
use crate::config::{Lan, LiveConfig};
use crate::control::service_manager::ServiceManager;
use crate::control::signals::{Asked, Signals};
use crate::device::SessionError;
use crate::log::LogLevel;
use crate::service::dns::DnsService;

/// The session's thread, waited for.
pub(super) type Ended = JoinHandle<thread::Result<Result<(), SessionError>>>;

/// Parts of a running backend that settings change.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) log: LogLevel,
    pub(super) dns: Arc<DnsService>,
    pub(super) lan: Lan,
}

impl Live {
    /// Applies what was judged; none of it can fail any more. Every field is taken here, so that one that nobody
    /// obeys does not compile.
    fn apply(&self, change: LiveConfig) {
        let LiveConfig { log_level, dns } = change;
        if let Some(level) = log_level
            && let Err(error) = self.log.set(&level)
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
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) signals: Signals,
    pub(super) reloader: Option<Reloader>,
    pub(super) live: Live,
    pub(super) manager: ServiceManager,
    /// How the process stands, for people.
    pub(super) status: String,
}

impl Supervisor {
    /// Waits for a signal to end or the session's end, and for the session after a signal.
    pub(super) async fn run(mut self, mut session: Ended, shutdown: &EventFd) -> Result<(), Error> {
        self.manager.ready(&self.status);
        let period = self.manager.alive_period();
        let mut alive = period.map(interval);
        if let Some(alive) = &mut alive {
            alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let ended = loop {
            let tick = async {
                match &mut alive {
                    Some(alive) => alive.tick().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                asked = self.signals.next() => match asked {
                    Asked::End(name) => {
                        tracing::info!(signal = name, "ending");
                        self.manager.stopping();
                        let _ = shutdown.write(1);
                        break (&mut session).await;
                    }
                    Asked::Reload => self.reload().await,
                },
                ended = &mut session => {
                    self.manager.stopping();
                    break ended;
                }
                _ = tick => self.manager.alive(),
            }
        };
        match ended {
            Ok(Ok(result)) => Ok(result?),
            _ => Err(Error::Thread("session")),
        }
    }

    /// Reads the settings again, away from this thread, and applies all that changed or nothing.
    async fn reload(&mut self) {
        let Some(mut reloader) = self.reloader.take() else { return };
        self.manager.reloading();
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
                self.manager.ready(&self.status);
            }
            Err(error) => {
                tracing::error!("settings stay as they are: {error}");
                self.manager.ready(&format!("{}; settings stay as they are: {error}", self.status));
            }
        }
    }
}
