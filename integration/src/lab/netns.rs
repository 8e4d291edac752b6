//! Named network namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use super::process::{Output, Process, run, run_any};
use super::{LabError, SHORT};
use crate::sys::netns as sys;

/// Names start with this and the maker's process id, so that what a killed test left is found.
const PREFIX: &str = "vunet";
/// Per-namespace files that `ip netns exec` mounts over `/etc`.
const ETC_DIR: &str = "/etc/netns";

static COUNT: AtomicU32 = AtomicU32::new(0);

/// A network namespace, deleted when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with a unique name that contains `label`; its loopback is up.
    ///
    /// # Errors
    /// If `ip netns` fails.
    pub fn create(label: &str) -> Result<Netns, LabError> {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{count}-{label}", std::process::id());
        run(&["ip", "netns", "add", &name], SHORT)?;
        let netns = Netns { name };
        run(&["ip", "-n", &netns.name, "link", "set", "lo", "up"], SHORT)?;
        Ok(netns)
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn wrap<'a>(&'a self, words: &[&'a str]) -> Vec<&'a str> {
        let mut command = vec!["ip", "netns", "exec", &self.name];
        command.extend(words);
        command
    }

    /// Runs a command inside that must succeed within `timeout`.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(&self, words: &[&str], timeout: Duration) -> Result<Output, LabError> {
        run(&self.wrap(words), timeout)
    }

    /// Runs a command inside, whatever its exit code.
    ///
    /// # Errors
    /// If it cannot be started or takes longer than `timeout`.
    pub fn run_any(&self, words: &[&str], timeout: Duration) -> Result<Output, LabError> {
        run_any(&self.wrap(words), timeout)
    }

    /// Starts a command inside, in the background.
    ///
    /// # Errors
    /// [`LabError::Start`].
    pub fn spawn(&self, words: &[&str]) -> Result<Process, LabError> {
        Process::start(&self.wrap(words))
    }

    /// Calls `work` on a thread inside: sockets it makes belong to this namespace.
    ///
    /// # Panics
    /// If `work` does, or the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                sys::enter(&self.name).expect("a namespace we made can be entered");
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sets a sysctl inside.
    ///
    /// # Errors
    /// If it does not exist or cannot be set.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), LabError> {
        self.run(&["sysctl", "-qw", &format!("{name}={value}")], SHORT).map(drop)
    }

    /// Gives processes inside an `/etc/resolv.conf` that names one server.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn set_resolver(&self, server: &str) -> Result<(), LabError> {
        self.set_resolv_conf(&format!("nameserver {server}\n"))
    }

    /// Gives processes inside an `/etc/resolv.conf` of this text; those that run see it change.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn set_resolv_conf(&self, text: &str) -> Result<(), LabError> {
        self.set_etc_file("resolv.conf", text)
    }

    /// Gives processes that start inside from now on a file `name` of `/etc`, which must be there outside too, of
    /// this text.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn set_etc_file(&self, name: &str, text: &str) -> Result<(), LabError> {
        let dir = self.etc();
        let file = dir.join(name);
        fs::create_dir_all(&dir)
            .and_then(|()| fs::write(&file, text))
            .map_err(|e| LabError::Io(file.display().to_string(), e))
    }

    fn etc(&self) -> PathBuf {
        Path::new(ETC_DIR).join(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Best effort: `sweep` finds what is left.
        let _ = fs::remove_dir_all(self.etc());
        let _ = run(&["ip", "netns", "del", &self.name], SHORT);
    }
}

/// Deletes namespaces of labs whose process is gone.
pub(super) fn sweep() {
    for dir in [Path::new(sys::NETNS_DIR), Path::new(ETC_DIR)] {
        let Ok(entries) = fs::read_dir(dir) else {
            continue;
        };
        for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
            let mut parts = name.split('-');
            let (Some(PREFIX), Some(pid)) = (parts.next(), parts.next()) else {
                continue;
            };
            if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
                // Somebody else may be sweeping too.
                drop(Netns { name });
            }
        }
    }
}
