//! What a named network is: the file `network.toml` that `vunet network create` writes once.
//!
//! Nothing changes in it afterwards, so any number of processes read it without a lock. It appears whole
//! (written beside, synced, renamed), and a folder without it is no network yet. Modes are types: a bridge
//! network has no subnet of ours, and only a nat network has a way out.
//!
//! May touch: files of the network's folder.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::name::NetworkName;
use crate::addr::{Ipv4Subnet, ParseAddrError};
use crate::config::IpMtu;
use crate::limits;
use crate::random;

/// Name of the file in the network's folder.
pub const FILE_NAME: &str = "network.toml";
/// Version of the file's form that this program writes and reads.
const VERSION: u32 = 1;

/// What tells a network's links and rules from everybody else's: 32 random bits, eight hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetworkId(u32);

impl NetworkId {
    /// A new one.
    ///
    /// # Errors
    /// The system has no randomness.
    pub fn random() -> io::Result<NetworkId> {
        random::bits32().map(NetworkId)
    }

    /// Name of the network's own bridge: `vn-` and the digits, 11 bytes.
    pub fn bridge(self) -> String {
        format!("vn-{self}")
    }

    /// Name of the network's firewall table.
    pub fn table(self) -> String {
        format!("vunet-{self}")
    }

    /// Comment of our rules in other tables.
    pub fn rule_comment(self) -> String {
        format!("vunet:{self}")
    }

    fn parse(text: &str) -> Option<NetworkId> {
        let is_hex =
            text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if is_hex { u32::from_str_radix(text, 16).ok().map(NetworkId) } else { None }
    }
}

impl std::fmt::Display for NetworkId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// The addresses of a network that has a bridge of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnLan {
    /// Subnet of all its guests.
    pub subnet: Ipv4Subnet,
    /// The host's address there: router, DHCP and DNS server.
    pub gateway: Ipv4Addr,
    /// Domain of its guests' names.
    pub dns_domain: String,
    /// IP MTU of its links.
    pub ip_mtu: IpMtu,
    /// Whether guests are kept from each other.
    pub isolate: bool,
}

/// What lies beyond the guests' own links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each other and the world, translated by the host's kernel. `allow_host`: also the host's own services.
    Nat {
        /// Its addresses.
        lan: OwnLan,
        /// Whether guests may open connections to the host itself.
        allow_host: bool,
    },
    /// Each other and the host.
    HostOnly {
        /// Its addresses.
        lan: OwnLan,
    },
    /// Each other and perhaps the world, without privilege: the bridge is in namespaces of this user's, and a
    /// holder's sockets lead to the world.
    Rootless {
        /// Its addresses.
        lan: OwnLan,
        /// Whether anything lies beyond the guests and their gateway.
        world: bool,
    },
    /// Whatever an existing bridge of the host leads to.
    Bridge {
        /// The bridge's name.
        bridge: String,
        /// IP MTU of the links.
        ip_mtu: IpMtu,
        /// Whether guests are kept from each other.
        isolate: bool,
    },
}

impl Kind {
    /// In a word: `nat`, `host-only`, `rootless`, `rootless-host-only` or `bridge`.
    pub fn mode(&self) -> &'static str {
        match self {
            Kind::Nat { .. } => "nat",
            Kind::HostOnly { .. } => "host-only",
            Kind::Rootless { world: true, .. } => "rootless",
            Kind::Rootless { world: false, .. } => "rootless-host-only",
            Kind::Bridge { .. } => "bridge",
        }
    }

    /// The addresses, where they are the network's own.
    pub fn lan(&self) -> Option<&OwnLan> {
        match self {
            Kind::Nat { lan, .. } | Kind::HostOnly { lan } | Kind::Rootless { lan, .. } => Some(lan),
            Kind::Bridge { .. } => None,
        }
    }

    /// Whether guests are kept from each other.
    pub fn isolate(&self) -> bool {
        match self {
            Kind::Nat { lan, .. } | Kind::HostOnly { lan } | Kind::Rootless { lan, .. } => lan.isolate,
            Kind::Bridge { isolate, .. } => *isolate,
        }
    }

    /// IP MTU of the guests' links.
    pub fn ip_mtu(&self) -> IpMtu {
        match self {
            Kind::Nat { lan, .. } | Kind::HostOnly { lan } | Kind::Rootless { lan, .. } => lan.ip_mtu,
            Kind::Bridge { ip_mtu, .. } => *ip_mtu,
        }
    }
}

/// A named network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name.
    pub name: NetworkName,
    /// What its links and rules are known by.
    pub id: NetworkId,
    /// What it leads to.
    pub kind: Kind,
}

impl Definition {
    /// Name of the bridge its guests are on.
    pub fn bridge(&self) -> String {
        match &self.kind {
            Kind::Nat { .. } | Kind::HostOnly { .. } => self.id.bridge(),
            // In a namespace that has no other.
            Kind::Rootless { .. } => crate::holder::BRIDGE.to_owned(),
            Kind::Bridge { bridge, .. } => bridge.clone(),
        }
    }

    /// Whether it is of namespaces that a holder keeps.
    pub fn is_rootless(&self) -> bool {
        matches!(self.kind, Kind::Rootless { .. })
    }

    /// Alias of the links made for it, which marks them as ours.
    pub fn alias(&self) -> String {
        format!("vunet:{}", self.name)
    }
}

/// Why a definition could not be read or written.
#[derive(Debug, Error)]
pub enum DefinitionError {
    /// The file system's refusal.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// Not a file of this program.
    #[error(
        "{}: {why}; it was not written by this version of vunet: remove the network's folder once no VM uses \
         it, and create the network anew", path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The file as it is on disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk {
    version: u32,
    id: String,
    mode: String,
    ip_mtu: u16,
    isolate: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subnet: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gateway: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dns_domain: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allow_host: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bridge: Option<String>,
}

impl OnDisk {
    fn of(definition: &Definition) -> OnDisk {
        let kind = &definition.kind;
        let lan = kind.lan();
        OnDisk {
            version: VERSION,
            id: definition.id.to_string(),
            mode: kind.mode().to_owned(),
            ip_mtu: kind.ip_mtu().get(),
            isolate: kind.isolate(),
            subnet: lan.map(|lan| lan.subnet.to_string()),
            gateway: lan.map(|lan| lan.gateway),
            dns_domain: lan.map(|lan| lan.dns_domain.clone()),
            allow_host: match kind {
                Kind::Nat { allow_host, .. } => Some(*allow_host),
                _ => None,
            },
            bridge: match kind {
                Kind::Bridge { bridge, .. } => Some(bridge.clone()),
                _ => None,
            },
        }
    }

    fn into_definition(self, name: &NetworkName) -> Result<Definition, String> {
        if self.version != VERSION {
            return Err(format!("version is {} and not {VERSION}", self.version));
        }
        let id = NetworkId::parse(&self.id).ok_or_else(|| format!("id is {:?}", self.id))?;
        let ip_mtu = IpMtu::new(self.ip_mtu).ok_or_else(|| format!("ip_mtu is {}", self.ip_mtu))?;
        let kind = match &*self.mode {
            "nat" => Kind::Nat {
                allow_host: self.allow_host.ok_or("allow_host is missing")?,
                lan: self.lan(ip_mtu)?,
            },
            "host-only" => Kind::HostOnly { lan: self.lan(ip_mtu)? },
            "rootless" => Kind::Rootless { lan: self.lan(ip_mtu)?, world: true },
            "rootless-host-only" => Kind::Rootless { lan: self.lan(ip_mtu)?, world: false },
            "bridge" => {
                let bridge = self.bridge.ok_or("bridge is missing")?;
                Kind::Bridge { bridge, ip_mtu, isolate: self.isolate }
            }
            other => return Err(format!("mode is {other:?}")),
        };
        Ok(Definition { name: name.clone(), id, kind })
    }

    fn lan(&self, ip_mtu: IpMtu) -> Result<OwnLan, String> {
        let subnet = self.subnet.as_deref().ok_or("subnet is missing")?;
        let subnet: Ipv4Subnet =
            subnet.parse().map_err(|error: ParseAddrError| format!("subnet: {error}"))?;
        let gateway = self.gateway.ok_or("gateway is missing")?;
        if !subnet.is_host(gateway) {
            return Err(format!("gateway {gateway} is no host of {subnet}"));
        }
        let dns_domain = self.dns_domain.clone().ok_or("dns_domain is missing")?;
        Ok(OwnLan { subnet, gateway, dns_domain, ip_mtu, isolate: self.isolate })
    }
}

/// Reads the definition of `name` from its folder; `None` if there is no such network.
///
/// # Errors
/// [`DefinitionError`].
pub fn load(folder: &Path, name: &NetworkName) -> Result<Option<Definition>, DefinitionError> {
    let path = folder.join(FILE_NAME);
    let failed = |source| DefinitionError::Io { what: "read", path: path.clone(), source };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut text = String::new();
    file.take(limits::NETWORK_FILE_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    let content = |why: String| DefinitionError::Content { path: path.clone(), why };
    let on_disk: OnDisk = toml::from_str(&text).map_err(|error| content(error.message().to_owned()))?;
    on_disk.into_definition(name).map(Some).map_err(content)
}

/// Writes `definition` into its folder, which exists. It is there whole after a crash, or not at all.
///
/// # Errors
/// [`DefinitionError::Io`].
pub fn store(folder: &Path, definition: &Definition) -> Result<(), DefinitionError> {
    let text = toml::to_string(&OnDisk::of(definition)).expect("strings and numbers are TOML");
    write_whole(folder, FILE_NAME, text.as_bytes())
}

/// Replaces the file `name` of `folder` by `bytes`: beside it, synced, renamed over it, folder synced.
pub(super) fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), DefinitionError> {
    let (path, beside) = (folder.join(name), folder.join(format!(".{name}.new")));
    let write = || {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, &path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| DefinitionError::Io { what: "write", path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lan(isolate: bool) -> OwnLan {
        OwnLan {
            subnet: "10.0.2.0/24".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 0, 2, 1),
            dns_domain: "lab.vunet.internal".to_owned(),
            ip_mtu: IpMtu::DEFAULT,
            isolate,
        }
    }

    fn definition(kind: Kind) -> Definition {
        Definition { name: "lab".parse().unwrap(), id: NetworkId(0xf00d), kind }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let name = "lab".parse().unwrap();
        assert_eq!(load(folder.path(), &name).unwrap(), None);
        for kind in [
            Kind::Nat { lan: lan(false), allow_host: true },
            Kind::HostOnly { lan: lan(true) },
            Kind::Rootless { lan: lan(false), world: true },
            Kind::Rootless { lan: lan(true), world: false },
            Kind::Bridge { bridge: "br0".to_owned(), ip_mtu: IpMtu::DEFAULT, isolate: false },
        ] {
            let definition = definition(kind);
            store(folder.path(), &definition).unwrap();
            assert_eq!(load(folder.path(), &name).unwrap(), Some(definition));
            let left = fs::read_dir(folder.path()).unwrap().count();
            assert_eq!(left, 1, "nothing is left beside the file");
        }
    }

    #[test]
    fn a_file_of_another_hand_is_refused_with_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let name = "lab".parse().unwrap();
        store(folder.path(), &definition(Kind::HostOnly { lan: lan(false) })).unwrap();
        let path = folder.path().join(FILE_NAME);
        let good = fs::read_to_string(&path).unwrap();
        for (from, to, part) in [
            ("version = 1", "version = 2", "version is 2"),
            ("id = \"0000f00d\"", "id = \"0000F00D\"", "id is"),
            ("mode = \"host-only\"", "mode = \"none\"", "mode is \"none\""),
            ("mode = \"host-only\"", "mode = \"nat\"", "allow_host is missing"),
            ("10.0.2.1\"", "10.0.3.1\"", "gateway 10.0.3.1 is no host"),
            ("ip_mtu = 1500", "ip_mtu = 9", "ip_mtu is 9"),
            ("isolate = false", "isolate = false\nmore = 1", "unknown field"),
            ("isolate = false", "", "missing field"),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good, "{from}");
            fs::write(&path, bad).unwrap();
            let error = load(folder.path(), &name).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(FILE_NAME), "'{part}' is not in: {error}");
        }
    }

    #[test]
    fn names_in_the_kernel_fit_and_tell_networks_apart() {
        let bridge = NetworkId(u32::MAX).bridge();
        assert_eq!(bridge, "vn-ffffffff");
        assert!(bridge.len() <= 15);
        assert_eq!(NetworkId::parse("0000f00d"), Some(NetworkId(0xf00d)));
        for bad in ["", "f00d", "0000F00D", "+000f00d", "0000f00d0"] {
            assert_eq!(NetworkId::parse(bad), None, "{bad}");
        }
    }
}
