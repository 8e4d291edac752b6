//! Whom to ask: configured resolvers, or those of the host's `resolv.conf`.
//!
//! The file is looked at when a query needs it, at most once a second, and read again when it has
//! changed. A stub on the host's loopback (127.0.0.53) is as good as any: the process runs on the
//! host and asks what the host would ask.
//!
//! Read first: resolv.conf(5).

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::NatConfig;
use crate::limits;
use crate::service::dns::DNS_PORT;

/// How often the file is looked at, at most.
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

/// The resolvers as known at present.
#[derive(Debug)]
pub(super) struct UpstreamList {
    list: Arc<[SocketAddr]>,
    file: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    path: PathBuf,
    looked: Option<Instant>,
    /// `None` before the first look; then the stamp, or `None` if there is no file.
    stamp: Option<Option<Stamp>>,
}

impl UpstreamList {
    pub(super) fn new(upstreams: Upstreams) -> UpstreamList {
        match upstreams {
            Upstreams::Fixed(mut list) => {
                if list.len() > limits::DNS_UPSTREAMS_MAX {
                    let used = limits::DNS_UPSTREAMS_MAX;
                    tracing::warn!(given = list.len(), used, "more resolvers than are ever tried");
                    list.truncate(used);
                }
                UpstreamList { list: list.into(), file: None }
            }
            Upstreams::ResolvConf(path) => {
                UpstreamList { list: Arc::new([]), file: Some(Watched { path, looked: None, stamp: None }) }
            }
        }
    }

    /// Whom to ask now, in order.
    pub(super) fn current(&self) -> Arc<[SocketAddr]> {
        Arc::clone(&self.list)
    }

    /// Looks at the file if a second has passed. Returns whether there are other resolvers now.
    pub(super) fn look(&mut self) -> bool {
        if let Some(file) = &mut self.file
            && let Some(list) = file.look(Instant::now())
        {
            let changed = *self.list != *list;
            self.list = list.into();
            if self.list.is_empty() {
                let path = file.path.display();
                tracing::warn!(%path, "no nameserver found; the guest's queries fail until there is one, or give --dns-server");
            } else {
                tracing::info!(resolvers = ?self.list, "resolvers of the host");
            }
            return changed;
        }
        false
    }
}

impl Watched {
    /// The resolvers, if the file has changed since the last look.
    fn look(&mut self, now: Instant) -> Option<Vec<SocketAddr>> {
        if self.looked.is_some_and(|looked| now < looked + LOOK_INTERVAL) {
            return None;
        }
        self.looked = Some(now);
        let stamp = fs::metadata(&self.path).ok().map(Stamp::from);
        if self.stamp == Some(stamp) {
            return None;
        }
        self.stamp = Some(stamp);
        Some(read_head(&self.path).map(|text| nameservers(&text)).unwrap_or_default())
    }
}

fn read_head(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limits::RESOLV_CONF_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The addresses of `nameserver` lines. What cannot be read is passed over, as the C library does.
fn nameservers(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()).flatten()
        })
        .filter_map(server)
        .take(limits::DNS_UPSTREAMS_MAX)
        .collect()
}

/// An address, with a scope if it is a link-local one of IPv6 (`fe80::1%eth0`).
fn server(text: &str) -> Option<SocketAddr> {
    match text.split_once('%') {
        None => text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DNS_PORT)),
        Some((ip, scope)) => {
            let ip: Ipv6Addr = ip.parse().ok()?;
            Some(SocketAddrV6::new(ip, DNS_PORT, 0, interface_index(scope)?).into())
        }
    }
}

fn interface_index(scope: &str) -> Option<u32> {
    if let Ok(index) = scope.parse() {
        return Some(index);
    }
    if scope.contains('/') || scope.starts_with('.') {
        return None;
    }
    fs::read_to_string(Path::new("/sys/class/net").join(scope).join("ifindex")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn nameserver_lines_are_read_and_everything_else_passed_over() {
        let text = "# by hand\n; also\nsearch example.org\nnameserver 192.0.2.1\n\tnameserver\t2001:db8::1 # v6\n\
                    nameserver\nnameservers 192.0.2.9\nnameserver example.org\noptions edns0\nnameserver 127.0.0.53\n";
        assert_eq!(nameservers(text), addrs(&["192.0.2.1:53", "[2001:db8::1]:53", "127.0.0.53:53"]));
    }

    #[test]
    fn as_many_as_are_tried_are_read() {
        let text: String = (1..=5).map(|n| format!("nameserver 192.0.2.{n}\n")).collect();
        assert_eq!(nameservers(&text).len(), limits::DNS_UPSTREAMS_MAX);
    }

    #[test]
    fn link_local_address_has_its_scope() {
        assert_eq!(server("fe80::1%7"), Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 7).into()));
        assert_eq!(
            server("fe80::1%lo"),
            Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 1).into())
        );
        assert_eq!(server("fe80::1%../lo"), None);
        assert_eq!(server("fe80::1%nosuch"), None);
    }

    #[test]
    fn file_is_looked_at_once_a_second_and_read_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut file = Watched { path: path.clone(), looked: None, stamp: None };
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(file.look(at(0)), Some(vec![]), "no file is known once");
        assert_eq!(file.look(at(1000)), None);
        fs::write(&path, "nameserver 192.0.2.1\n").unwrap();
        assert_eq!(file.look(at(1999)), None, "not yet");
        assert_eq!(file.look(at(2000)), Some(addrs(&["192.0.2.1:53"])));
        assert_eq!(file.look(at(3000)), None, "unchanged");
        let other = dir.path().join("new");
        fs::write(&other, "nameserver 192.0.2.2\n").unwrap();
        fs::rename(&other, &path).unwrap();
        assert_eq!(file.look(at(4000)), Some(addrs(&["192.0.2.2:53"])));
        fs::remove_file(&path).unwrap();
        assert_eq!(file.look(at(5000)), Some(vec![]));
    }

    #[test]
    fn configured_resolvers_come_before_the_hosts() {
        let mut config = NatConfig::default();
        assert_eq!(Upstreams::of(&config), Upstreams::ResolvConf("/etc/resolv.conf".into()));
        config.dns_servers = addrs(&["192.0.2.1:5353"]);
        assert_eq!(Upstreams::of(&config), Upstreams::Fixed(config.dns_servers.clone()));
    }
}
