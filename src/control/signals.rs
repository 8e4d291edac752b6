//! Signals that end the process, or have its settings read again.

use std::time::Duration;
use std::{fs, io};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// To end; with the signal's name.
    End(&'static str),
    /// To read the settings again.
    Reload,
}

/// Handlers of them, from their making on.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if the parent had it ignored, as nohup(1) does.
    hangup: Option<Signal>,
    /// What it asks for.
    hung_up: Asked,
}

impl Signals {
    /// Sets the handlers. SIGHUP means that the terminal is gone, so it asks for the end too. Needs a tokio runtime.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new() -> io::Result<Signals> {
        let hangup = if ignores_hangup() { None } else { Some(signal(SignalKind::hangup())?) };
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Signals { terminate, interrupt, hangup, hung_up: Asked::End("SIGHUP") })
    }

    /// The same, and SIGHUP asks for a reload.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn with_reload() -> io::Result<Signals> {
        let hangup = Some(signal(SignalKind::hangup())?);
        Ok(Signals { hangup, hung_up: Asked::Reload, ..Signals::new()? })
    }

    /// What the next one asks for.
    pub async fn next(&mut self) -> Asked {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => Asked::End("SIGTERM"),
            _ = self.interrupt.recv() => Asked::End("SIGINT"),
            _ = hangup => self.hung_up,
        }
    }

    /// Whether one has come that asks to end. Says so in the log.
    pub async fn have_asked_to_end(&mut self) -> bool {
        // It is there as soon as the runtime has looked.
        let Ok(name) = timeout(Duration::from_millis(10), self.end()).await else { return false };
        tracing::info!(signal = name, "ending before anything began");
        true
    }

    /// The name of the next one that asks to end.
    pub async fn end(&mut self) -> &'static str {
        loop {
            if let Asked::End(name) = self.next().await {
                return name;
            }
        }
    }
}

/// Whether this process began with SIGHUP ignored; to be asked before a handler is set. proc_pid_status(5), SigIgn.
fn ignores_hangup() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // A bit a signal, from 1 on.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}
