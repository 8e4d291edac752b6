//! What a service manager is told of this process (systemd's notification protocol): ready, reloading, stopping,
//! alive. Where nobody asked (`NOTIFY_SOCKET` is not set), nothing is said.
//!
//! Read first: sd_notify(3), sd_watchdog_enabled(3).

use std::time::Duration;

use sd_notify::NotifyState;

/// The service manager that started this process, if one did.
#[derive(Debug)]
pub struct ServiceManager {
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// As the environment says.
    pub fn from_environment() -> ServiceManager {
        ServiceManager { watchdog: sd_notify::watchdog_enabled() }
    }

    /// How often it is told that this process is alive, if it wants to hear it: three times in its time-out, so that one
    /// may be late. (sd_watchdog_enabled(3) advises twice.)
    pub fn alive_period(&self) -> Option<Duration> {
        self.watchdog.map(|timeout| timeout / 3)
    }

    /// The process serves, and how it stands in one line for people.
    pub fn ready(&self, status: &str) {
        tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// How it stands, in one line for people.
    pub fn status(&self, status: &str) {
        tell(&[NotifyState::Status(status)]);
    }

    /// Settings are being read again; to be followed by [`ServiceManager::ready`].
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => tell(&[NotifyState::Reloading, now]),
            Err(_) => tell(&[NotifyState::Reloading]),
        }
    }

    /// The process has begun to end.
    pub fn stopping(&self) {
        tell(&[NotifyState::Stopping, NotifyState::Status("ending")]);
    }

    /// The process is alive.
    pub fn alive(&self) {
        tell(&[NotifyState::Watchdog]);
    }
}

/// A manager that hears nothing acts by its own time-outs; no reason to end here.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}
