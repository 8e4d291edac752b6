//! Where upstream resolvers come from: given by hand, or the host's `resolv.conf`, followed as it changes.
//!
//! The file is looked at when a query needs it, at most once a second, and read again when it has
//! changed. A file that is gone, empty or names nobody (a manager rewriting it, a VPN half-way down) leaves
//! the last known resolvers in force. A stub on the host's loopback (127.0.0.53) is as good as any: the
//! process runs on the host and asks what the host would ask.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::NatConfig;
use crate::control::dns_forward::resolv_conf::ResolvConf;
use crate::control::dns_forward::upstreams::given;
use crate::limits;
use crate::time::Instant;

/// How often the file is looked at, at most, unless there is news of it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Where upstream resolvers come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upstreams {
    /// These, in this order; the first [`limits::DNS_UPSTREAMS_MAX`] count.
    Fixed(Vec<SocketAddr>),
    /// The `nameserver` lines of this file, followed as it changes.
    ResolvConf(PathBuf),
}

impl Upstreams {
    /// The host's own settings.
    pub const RESOLV_CONF: &'static str = "/etc/resolv.conf";

    /// What `config` names, or else the host's own.
    pub fn of(config: &NatConfig) -> Upstreams {
        if config.dns_servers.is_empty() {
            Upstreams::ResolvConf(PathBuf::from(Self::RESOLV_CONF))
        } else {
            Upstreams::Fixed(config.dns_servers.clone())
        }
    }
}

/// What tells one state of the file from another: it may be written in place or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl From<Metadata> for Stamp {
    fn from(meta: Metadata) -> Stamp {
        Stamp { inode: meta.ino(), size: meta.size(), modified: (meta.mtime(), meta.mtime_nsec()) }
    }
}

/// The settings as last read, and their file if there is one.
#[derive(Debug)]
pub(super) struct Source {
    conf: ResolvConf,
    file: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    looked: Option<Instant>,
    /// `None` before the first look; then the stamp, or `None` if there is no file.
    stamp: Option<Option<Stamp>>,
    /// It was said already that there is nothing in it.
    told: bool,
}

impl Source {
    pub(super) fn new(upstreams: Upstreams) -> Source {
        match upstreams {
            Upstreams::Fixed(servers) => Source { conf: given(&servers), file: None },
            Upstreams::ResolvConf(path) => {
                let file = Watched { path, looked: None, stamp: None, told: false };
                Source { conf: ResolvConf::default(), file: Some(file) }
            }
        }
    }

    /// The settings now.
    pub(super) fn conf(&self) -> &ResolvConf {
        &self.conf
    }

    /// The file, if there is one.
    pub(super) fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| &*file.path)
    }

    /// Looks at the file if a second has passed. Returns whether the settings are others now.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        let Some(file) = &mut self.file else { return false };
        if file.looked.is_some_and(|looked| now < looked + LOOK_INTERVAL) {
            return false;
        }
        file.looked = Some(now);
        let stamp = fs::metadata(&file.path).ok().map(Stamp::from);
        file.stamp != Some(stamp) && self.read()
    }

    /// Reads the file, changed or not: there is news of it, or of an interface a resolver is scoped to.
    /// Returns whether the settings are others now.
    pub(super) fn read(&mut self) -> bool {
        let Some(file) = &mut self.file else { return false };
        // Before reading: what is written meanwhile is read at the next look.
        file.stamp = Some(fs::metadata(&file.path).ok().map(Stamp::from));
        let conf = read_head(&file.path).map(|text| ResolvConf::parse(&text)).unwrap_or_default();
        if conf.servers.is_empty() {
            if !std::mem::replace(&mut file.told, true) {
                let (path, known) = (file.path.display(), &self.conf.servers);
                if known.is_empty() {
                    tracing::warn!(%path, "no nameserver found; the guest's queries fail until there is one, or give --dns-server");
                } else {
                    tracing::warn!(%path, ?known, "no nameserver found; the last known ones stay");
                }
            }
            return false;
        }
        file.told = false;
        if conf == self.conf {
            return false;
        }
        tracing::info!(resolvers = ?conf.servers, search = ?conf.search, "resolvers of the host");
        self.conf = conf;
        true
    }
}

pub(super) fn read_head(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::RESOLV_CONF_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    #[test]
    fn file_is_looked_at_once_a_second_and_read_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut source = Source::new(Upstreams::ResolvConf(path.clone()));
        assert!(!source.look(at(0)), "there is no file");
        assert!(!source.look(at(1000)));
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert!(!source.look(at(1999)), "not yet");
        assert!(source.look(at(2000)));
        assert_eq!(source.conf().servers, addrs(&["192.0.2.1:53"]));
        assert!(!source.look(at(3000)), "unchanged");
        let other = dir.path().join("new");
        fs::write(&other, "nameserver 192.0.2.2\n").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(source.look(at(4000)));
        assert_eq!(source.conf().servers, addrs(&["192.0.2.2:53"]));
        fs::write(&path, "nameserver 192.0.2.2\noptions timeout:1\n").unwrap();
        assert!(source.look(at(5000)));
        assert_eq!(source.conf().timeout, Duration::from_secs(1));
    }

    #[test]
    fn a_file_that_is_gone_or_empty_leaves_the_last_known_resolvers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        let mut source = Source::new(Upstreams::ResolvConf(path.clone()));
        assert!(source.look(at(0)));
        fs::remove_file(&path).unwrap();
        assert!(!source.look(at(1000)));
        fs::write(&path, "").unwrap();
        assert!(!source.look(at(2000)));
        fs::write(&path, "search example.org\n").unwrap();
        assert!(!source.look(at(3000)));
        assert_eq!(source.conf().servers, addrs(&["192.0.2.1:53"]));
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert!(!source.look(at(4000)), "the same again is no news");
        fs::write(&path, "nameserver 192.0.2.3\n").unwrap();
        assert!(source.look(at(5000)));
    }

    #[test]
    fn more_than_a_file_should_have_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let comment = "#".repeat(usize::try_from(limits::RESOLV_CONF_BYTES_MAX).unwrap());
        fs::write(&path, format!("nameserver 192.0.2.1\n{comment}\nnameserver 192.0.2.2\n")).unwrap();
        let mut source = Source::new(Upstreams::ResolvConf(path));
        assert!(source.look(at(0)));
        assert_eq!(source.conf().servers, addrs(&["192.0.2.1:53"]));
    }

    #[test]
    fn configured_resolvers_come_before_the_hosts() {
        let mut config = NatConfig::default();
        assert_eq!(Upstreams::of(&config), Upstreams::ResolvConf("/etc/resolv.conf".into()));
        config.dns_servers = addrs(&["192.0.2.1:5353"]);
        assert_eq!(Upstreams::of(&config), Upstreams::Fixed(config.dns_servers.clone()));
        assert_eq!(Source::new(Upstreams::of(&config)).path(), None);
    }
}
