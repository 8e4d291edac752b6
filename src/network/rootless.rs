//! The way into a rootless network: knock at the holder's door, or start a holder first.
//!
//! One holder has a network's lock (`run/holder.lock`) as long as it lives, so of several that are started at
//! once one stays and the others end. A holder is a process of its own, in a process group of its own: it
//! outlives whoever started it.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use thiserror::Error;

use super::users::RUN_FOLDER;
use crate::holder::door::{self, Use};
use crate::holder::ports::{LendError, Lent};
use crate::holder::tenant::Tenant;
use crate::sandbox::namespaces::{NamespaceError, Namespaces, keep_from_children};

/// Names of the holder's files: lock and door in the network's run folder, log in the network's folder.
const LOCK_NAME: &str = "holder.lock";
const DOOR_NAME: &str = "holder.sock";
const LOG_NAME: &str = "holder.log";
/// What a holder prints once processes can join ...
pub const READY: &str = "ready";
/// ... and what if another has the network already.
pub const HELD: &str = "held by another process";
/// Knocks at a door before it is given up: a holder may end, or another be started, between two.
const KNOCKS: usize = 50;
/// Between knocks where another process is starting the holder.
const PAUSE: Duration = Duration::from_millis(100);
/// Between knocks at the door of a holder that is to come.
const RETURN_PAUSE: Duration = Duration::from_secs(1);
/// Length of a log in bytes from which the next holder begins it anew.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// Characters of a failed holder's log that are shown.
const LOG_CHARS_SHOWN: usize = 2000;

/// Why a process could not join.
#[derive(Debug, Error)]
pub enum JoinError {
    /// The holder could not be started.
    #[error("cannot start the network's holder: {what}")]
    Start {
        /// What failed.
        what: &'static str,
        /// The system's refusal.
        source: io::Error,
    },
    /// The holder ended at once.
    #[error("the network's holder ended at once: {0}")]
    Ended(String),
    /// Its door does not open.
    #[error("the network's holder does not answer at {}: end it, and it is started anew", door.display())]
    Silent {
        /// The socket.
        door: PathBuf,
        /// The last refusal.
        source: io::Error,
    },
    /// It does not take a published port.
    #[error("--publish: port {host} cannot be published")]
    Lend {
        /// Where it is bound.
        host: SocketAddr,
        /// Why not.
        source: LendError,
    },
    /// Its namespaces cannot be entered.
    #[error("cannot enter the network")]
    Enter(#[from] NamespaceError),
}

/// Where a network's holder is found.
#[derive(Clone, Debug)]
pub struct Place {
    /// The network's folder.
    pub folder: PathBuf,
    /// Arguments of this program that start its holder.
    pub arguments: Vec<String>,
}

impl Place {
    /// The holder's socket.
    pub fn door(&self) -> PathBuf {
        self.folder.join(RUN_FOLDER).join(DOOR_NAME)
    }

    /// Takes the network's lock as its holder; `None` if another has it.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn hold(&self) -> io::Result<Option<File>> {
        let run = self.folder.join(RUN_FOLDER);
        match fs::DirBuilder::new().mode(0o700).create(&run) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let path = run.join(LOCK_NAME);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Moves this process into the network, whose holder is started if there is none, and lends it `ports`. It
    /// must have one thread. The network is used until what is returned is dropped.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn enter(&self, ports: &[Arc<Lent>]) -> Result<Use, JoinError> {
        let (namespaces, used) = self.knock()?;
        used.lend(ports, None).map_err(|(host, source)| JoinError::Lend { host, source })?;
        namespaces.enter()?;
        Ok(used)
    }

    /// The network's namespaces, and the use of them.
    ///
    /// # Errors
    /// [`JoinError`].
    pub fn knock(&self) -> Result<(Namespaces, Use), JoinError> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for _ in 0..KNOCKS {
            match door::knock(&self.door()) {
                Ok(opened) => return Ok(opened),
                Err(error) => last = error,
            }
            if !self.start()? {
                thread::sleep(PAUSE);
            }
        }
        Err(JoinError::Silent { door: self.door(), source: last })
    }

    /// Stays one who uses the network, as `tenant`: should its holder end, knocks at the next one's door and lends it the
    /// tenant's ports again. For as long as it is polled; needs a tokio runtime.
    pub async fn stay(self, mut used: Use, mut tenant: Tenant) {
        let place = Arc::new(self);
        loop {
            used.live(&mut tenant).await;
            tracing::warn!(
                "the network's holder ended: guests reach each other, but the world only once another is \
                 started (`vunet network hold NAME`, or the start of a further VM)"
            );
            used = loop {
                tenant.without_a_holder(tokio::time::sleep(RETURN_PAUSE)).await;
                let (place, ports, addr) = (Arc::clone(&place), tenant.lent.clone(), *tenant.guest.borrow());
                // The holder may let it wait for a moment.
                match tokio::task::spawn_blocking(move || place.knock_again(&ports, addr)).await {
                    Ok(Ok(used)) => break used,
                    Ok(Err(Some((host, error)))) => {
                        tracing::warn!(%host, %error, "a port is published no more; tried again in a second");
                    }
                    Ok(Err(None)) | Err(_) => {}
                }
            };
            tracing::info!("the network has a holder again");
        }
    }

    /// Knocks at the door of a holder that may not be there yet, which is no error to tell of.
    fn knock_again(
        &self,
        ports: &[Arc<Lent>],
        guest: Option<Ipv4Addr>,
    ) -> Result<Use, Option<(SocketAddr, LendError)>> {
        let (_, used) = door::knock(&self.door()).map_err(|_| None)?;
        match used.lend(ports, guest) {
            Ok(()) => Ok(used),
            // Gone again.
            Err((_, LendError::Silent(_))) => Err(None),
            Err(told) => Err(Some(told)),
        }
    }

    /// Ends the holder, if there is one, which nobody uses.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if it does not end.
    pub fn end(&self) -> io::Result<()> {
        for _ in 0..KNOCKS {
            if self.hold()?.is_some() {
                return Ok(());
            }
            // One that is just starting has no door yet.
            if let Ok((_, used)) = door::knock(&self.door()) {
                used.end()?;
            }
            thread::sleep(PAUSE);
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Starts a holder and waits until it is ready; false if another holds the network.
    fn start(&self) -> Result<bool, JoinError> {
        let starting = |what| move |source| JoinError::Start { what, source };
        let log = self.folder.join(LOG_NAME);
        let (errors, begin) = open_log(&log).map_err(starting("its log cannot be written"))?;
        keep_from_children().map_err(starting("what is open here cannot be kept from it"))?;
        let mut child = Command::new("/proc/self/exe")
            .arg0("vunet")
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors)
            // What is typed at the terminal of whoever starts it does not concern it.
            .process_group(0)
            .spawn()
            .map_err(starting("the program cannot be run"))?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line).map_err(starting("it cannot be heard"))?;
        }
        match line.trim_end() {
            READY => Ok(true),
            said => {
                let _ = child.wait();
                if said == HELD { Ok(false) } else { Err(JoinError::Ended(last_words(&log, begin))) }
            }
        }
    }
}

/// A log to write on in, and its length. Several processes may be starting a holder, so that none may truncate it but
/// one that has become long.
fn open_log(log: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    if file.metadata()?.len() > LOG_BYTES_MAX {
        file.set_len(0)?;
    }
    let begin = file.metadata()?.len();
    Ok((file, begin))
}

/// What a log says from `begin` on, its end if that is long, in one line.
fn last_words(log: &Path, begin: u64) -> String {
    let mut text = String::new();
    let read = File::open(log).and_then(|mut file| {
        file.seek(SeekFrom::Start(begin))?;
        file.take(LOG_BYTES_MAX).read_to_string(&mut text)
    });
    let words: Vec<&str> = text.split_whitespace().collect();
    let words = words.join(" ");
    let cut = words.chars().count().saturating_sub(LOG_CHARS_SHOWN);
    let words: String = words.chars().skip(cut).collect();
    match read {
        Ok(_) if !words.is_empty() => words,
        _ => "it said nothing".to_owned(),
    }
}
