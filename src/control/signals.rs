//! Signals that end the process, or have its settings read again.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

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
    /// Only of a process that has settings to read; for others it means what it means to any program.
    hangup: Option<Signal>,
}

impl Signals {
    /// Sets the handlers. Needs a tokio runtime.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn new() -> io::Result<Signals> {
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Signals { terminate, interrupt, hangup: None })
    }

    /// The same, and SIGHUP asks for a reload.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn with_reload() -> io::Result<Signals> {
        Ok(Signals { hangup: Some(signal(SignalKind::hangup())?), ..Signals::new()? })
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
            _ = hangup => Asked::Reload,
        }
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
