//! What a service manager is told of this process (systemd's notification protocol): ready, reloading, stopping,
//! alive. Where nobody asked (`NOTIFY_SOCKET` is not set), nothing is said.
//!
//! Nobody here waits for the manager: the kernel keeps few messages for one that does not read, and the thread that tells
//! serves everybody else too. What it has to learn is kept until it takes it; signs of life are not worth that.
//!
//! Read first: sd_notify(3), sd_watchdog_enabled(3), unix(7).

use std::env;
use std::io;
use std::mem;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::limits;

/// The service manager that started this process, if one did.
#[derive(Debug)]
pub struct ServiceManager {
    watchdog: Option<Duration>,
    line: Option<Line>,
    owed: Owed,
}

/// The way to the manager. One socket for all messages, so that none needs a descriptor when there are no more.
#[derive(Debug)]
struct Line {
    socket: UnixDatagram,
    manager: SocketAddr,
}

/// What the manager has to learn and did not take yet.
#[derive(Debug, Default)]
struct Owed {
    ready: bool,
    status: Option<String>,
}

impl ServiceManager {
    /// As the environment says.
    pub fn from_environment() -> ServiceManager {
        let line = match Line::from_environment() {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!(%error, "NOTIFY_SOCKET: the service manager cannot be told anything");
                None
            }
        };
        // Zero asks for nothing (sd_watchdog_enabled(3) calls it invalid).
        let watchdog = sd_notify::watchdog_enabled().filter(|timeout| !timeout.is_zero());
        ServiceManager { watchdog, line, owed: Owed::default() }
    }

    /// How often it is told that this process is alive, if it wants to hear it: three times in its time-out, so that one
    /// may be late. (sd_watchdog_enabled(3) advises twice.)
    pub fn alive_period(&self) -> Option<Duration> {
        self.watchdog.map(|timeout| timeout / 3)
    }

    /// The process serves, and how it stands in one line for people.
    pub fn ready(&mut self, status: &str) {
        self.owed = Owed { ready: true, status: Some(one_line(status)) };
        self.settle();
    }

    /// How it stands, in one line for people.
    pub fn status(&mut self, status: &str) {
        self.owed.status = Some(one_line(status));
        self.settle();
    }

    /// Settings are being read again; to be followed by [`ServiceManager::ready`].
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(_) => self.tell(&[NotifyState::Reloading]),
        }
    }

    /// The process has begun to end.
    pub fn stopping(&mut self) {
        self.owed = Owed::default();
        self.tell(&[NotifyState::Stopping, NotifyState::Status("ending")]);
    }

    /// The process is alive.
    pub fn alive(&self) {
        self.tell(&[NotifyState::Watchdog]);
    }

    /// Whether there is something the manager did not take, for [`ServiceManager::settle`] later.
    pub fn is_owed(&self) -> bool {
        self.owed.ready || self.owed.status.is_some()
    }

    /// Tells the manager what it did not take before, all in one message; what it does not take now either is kept.
    pub fn settle(&mut self) {
        let Owed { ready, status } = mem::take(&mut self.owed);
        let mut state = Vec::new();
        state.extend(ready.then_some(NotifyState::Ready));
        state.extend(status.as_deref().map(NotifyState::Status));
        if self.is_full(&state) {
            self.owed = Owed { ready, status };
        }
    }

    fn tell(&self, state: &[NotifyState<'_>]) {
        let _ = self.is_full(state);
    }

    /// Tells the manager this, unless it has too much to read already. Any other refusal is no reason to try again: a manager
    /// that hears nothing acts by its own time-outs.
    fn is_full(&self, state: &[NotifyState<'_>]) -> bool {
        let Some(line) = &self.line else { return false };
        match line.send(state) {
            Ok(()) => false,
            Err(error) => {
                tracing::debug!(%error, "the service manager cannot be told");
                error.kind() == io::ErrorKind::WouldBlock
            }
        }
    }
}

impl Line {
    /// To the manager that `NOTIFY_SOCKET` names, by a path or, after `@`, in the abstract namespace.
    fn from_environment() -> io::Result<Option<Line>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
        let manager = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(&name)?,
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither an absolute path nor @NAME",
                ));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Some(Line { socket, manager }))
    }

    fn send(&self, state: &[NotifyState<'_>]) -> io::Result<()> {
        if state.is_empty() {
            return Ok(());
        }
        let message: String = state.iter().map(|part| format!("{part}\n")).collect();
        self.socket.send_to_addr(message.as_bytes(), &self.manager).map(drop)
    }
}

/// The text as one line of a message that the manager reads whole: a line's end in it would begin another word of the
/// protocol.
fn one_line(text: &str) -> String {
    let fits = |(at, char): &(usize, char)| at + char.len_utf8() <= limits::MANAGER_STATUS_BYTES_MAX;
    let clean = |(_, char): (usize, char)| if char.is_control() { ' ' } else { char };
    text.char_indices().take_while(fits).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line_of_bounded_length() {
        assert_eq!(one_line("a\nREADY=1\r\tb"), "a READY=1  b");
        let most = "x".repeat(limits::MANAGER_STATUS_BYTES_MAX);
        assert_eq!(one_line(&most), most);
        assert_eq!(one_line(&format!("{most}y")), most);
        let halved = one_line(&format!("{}é", &most[1..]));
        assert_eq!(halved, &most[1..], "no half of a character");
    }
}
