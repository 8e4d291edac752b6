//! Forwarding on the interfaces that lead to the world: switched on for nat networks, put back after the last.
//!
//! Only interfaces are switched (`net.ipv4.conf.INTERFACE.forwarding`), never `net.ipv4.ip_forward`, which
//! would make a router of the whole host. What was changed is written to a file first, with who needs it,
//! so that after a kill at any instruction the next start puts back exactly what was changed. What an
//! administrator switched on for all interfaces meanwhile is left on.
//!
//! Entries are of one boot and one network namespace: sysctls end with either.
//!
//! May touch: `uplink::sysctl`, one file. The caller holds a lock that all processes share.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::sysctl::{self, SysctlError};
use crate::limits;

/// What tells this boot from others.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What tells this network namespace from others.
const NET_NAMESPACE: &str = "/proc/thread-self/ns/net";
/// Extension of the file while it is written.
const BESIDE: &str = "new";

/// Why forwarding could not be switched or put back.
#[derive(Debug, Error)]
pub enum ForwardingError {
    /// The note of what was changed.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// The setting itself.
    #[error(transparent)]
    Setting(#[from] SysctlError),
}

/// An interface that was switched on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    boot: String,
    net_namespace: u64,
    interface: String,
    /// Networks that need it, by their ids.
    holders: Vec<String>,
}

/// What was switched on, by whom, kept in a file.
#[derive(Debug)]
pub struct Forwarding {
    path: PathBuf,
    boot: String,
    net_namespace: u64,
    entries: Vec<Entry>,
}

impl Forwarding {
    /// Reads the file at `path`, which need not exist. A file cut short is as if it were not there: it is
    /// written whole before anything is switched.
    ///
    /// # Errors
    /// [`ForwardingError::File`].
    pub fn open(path: &Path) -> Result<Forwarding, ForwardingError> {
        let refused =
            |path: &Path, source| ForwardingError::File { what: "read", path: path.to_owned(), source };
        let failed = |source| refused(path, source);
        let boot = fs::read_to_string(BOOT_ID).map_err(|source| refused(Path::new(BOOT_ID), source))?;
        let boot = boot.trim().to_owned();
        let namespace =
            fs::metadata(NET_NAMESPACE).map_err(|source| refused(Path::new(NET_NAMESPACE), source));
        let net_namespace = namespace?.ino();
        let mut entries: Vec<Entry> = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        entries.retain(|entry| entry.boot == boot);
        // Left by a process that was killed before it could put it in the file's place.
        match fs::remove_file(path.with_extension(BESIDE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        Ok(Forwarding { path: path.to_owned(), boot, net_namespace, entries })
    }

    /// Makes the host forward what comes in by `interfaces` for the network `holder`, and by no other
    /// interface on its behalf. Interfaces that forward already, or are not there, are let be.
    ///
    /// # Errors
    /// [`ForwardingError`].
    pub fn hold(&mut self, holder: &str, interfaces: &[String]) -> Result<(), ForwardingError> {
        let before = self.entries.clone();
        let dropped = self.drop_holder(holder, |interface| !interfaces.iter().any(|name| name == interface));
        let mut to_set = Vec::new();
        for interface in interfaces {
            let Some(forwards) = sysctl::forwards(interface)? else { continue };
            if self.note(holder, interface, forwards) && !forwards {
                to_set.push(interface);
            }
        }
        // What is put back leaves the file after, what is switched on enters it before.
        if self.entries != before {
            let kept: Vec<Entry> = self.entries.iter().chain(&dropped).cloned().collect();
            self.write(&kept)?;
        }
        put_back(&dropped)?;
        for interface in to_set {
            sysctl::set_forwards(interface, true)?;
        }
        if dropped.is_empty() { Ok(()) } else { self.write(&self.entries) }
    }

    /// Ends what `holder` needed; interfaces that nobody needs any more are put back.
    ///
    /// # Errors
    /// [`ForwardingError`].
    pub fn release(&mut self, holder: &str) -> Result<(), ForwardingError> {
        let before = self.entries.clone();
        let dropped = self.drop_holder(holder, |_| true);
        put_back(&dropped)?;
        if self.entries == before { Ok(()) } else { self.write(&self.entries) }
    }

    /// Of `interfaces`, those that forward only because of us.
    pub fn switched(&self, interfaces: &[String]) -> Vec<String> {
        interfaces.iter().filter(|interface| self.position(interface).is_some()).cloned().collect()
    }

    /// Notes that `holder` needs `interface`, which `forwards` already or not. Whether there is a note of it: without one
    /// nobody would put it back.
    fn note(&mut self, holder: &str, interface: &str, forwards: bool) -> bool {
        if let Some(at) = self.position(interface) {
            let holders = &mut self.entries[at].holders;
            if !holders.iter().any(|known| known == holder) {
                holders.push(holder.to_owned());
            }
            return true;
        }
        if forwards {
            return false;
        }
        if self.entries.len() >= limits::FORWARDING_ENTRIES_MAX {
            tracing::warn!(
                interface, file = %self.path.display(), max = limits::FORWARDING_ENTRIES_MAX,
                "too many interfaces are noted as switched; this one is not made to forward, so the network's guests \
                 get no replies by it: end other networks, or remove the file once no VM uses a network"
            );
            return false;
        }
        self.entries.push(Entry {
            boot: self.boot.clone(),
            net_namespace: self.net_namespace,
            interface: interface.to_owned(),
            holders: vec![holder.to_owned()],
        });
        true
    }

    fn position(&self, interface: &str) -> Option<usize> {
        let here = |entry: &Entry| entry.net_namespace == self.net_namespace && entry.interface == interface;
        self.entries.iter().position(here)
    }

    /// Takes `holder` from the entries of this namespace that `pick` names; returns those left without any.
    fn drop_holder(&mut self, holder: &str, pick: impl Fn(&str) -> bool) -> Vec<Entry> {
        let namespace = self.net_namespace;
        for entry in &mut self.entries {
            if entry.net_namespace == namespace && pick(&entry.interface) {
                entry.holders.retain(|known| known != holder);
            }
        }
        let gone = |entry: &mut Entry| entry.net_namespace == namespace && entry.holders.is_empty();
        self.entries.extract_if(.., gone).collect()
    }

    fn write(&self, entries: &[Entry]) -> Result<(), ForwardingError> {
        let beside = self.path.with_extension(BESIDE);
        let write = || {
            let mut file = File::create(&beside)?;
            file.write_all(&serde_json::to_vec(entries).map_err(io::Error::other)?)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)
        };
        let failed = |source| ForwardingError::File { what: "write", path: self.path.clone(), source };
        if !entries.is_empty() {
            return write().map_err(failed);
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }
}

/// Switches forwarding off again, unless the whole host has become a router meanwhile.
fn put_back(entries: &[Entry]) -> Result<(), ForwardingError> {
    if entries.is_empty() || sysctl::is_router()? {
        return Ok(());
    }
    for entry in entries {
        if sysctl::forwards(&entry.interface)? == Some(true) {
            sysctl::set_forwards(&entry.interface, false)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_its_bound_no_interface_is_switched_that_nobody_would_put_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut forwarding = Forwarding::open(&folder.path().join("forwarding.json")).unwrap();
        for n in 0..limits::FORWARDING_ENTRIES_MAX {
            assert!(forwarding.note("one", &format!("if{n}"), false), "{n}");
        }
        assert!(!forwarding.note("one", "another", false), "one past the bound");
        assert!(forwarding.note("two", "if0", true), "what is noted may have further holders");
        assert_eq!(forwarding.entries.len(), limits::FORWARDING_ENTRIES_MAX);
        assert_eq!(forwarding.switched(&["another".to_owned(), "if0".to_owned()]), ["if0"]);
        assert!(forwarding.drop_holder("one", |_| true).iter().all(|entry| entry.interface != "if0"));
        assert!(!forwarding.note("one", "forwards-already", true), "nothing of it is ours");
    }
}
