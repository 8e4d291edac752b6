//! TAP and macvtap interfaces made, opened and put in their place: before the workers start.
//!
//! What we make is gone when its last queue is closed, whatever ends the process; a macvtap alone stays until
//! it is deleted. What the user made is used as it is: nothing of it is changed that is as it should be,
//! so that it can be used without privilege.
//!
//! A TAP of ours on a bridge has a MAC address beginning with `fe`: a bridge that was given no address takes
//! the lowest of its ports', and the host's address must not change when a guest comes.
//!
//! May touch: `links`, `sys::tap`. Read first: `sys::tap`; the kernel's `tuntap.rst`.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::links::{Link, LinkError, LinkKind, Links};
use super::sys::tap::{CLONE_DEVICE, TapQueue};
use crate::addr::MacAddr;
use crate::config::{IpMtu, LinkSource};
use crate::random;

/// Name of a TAP of ours; the kernel puts the first free number.
pub const OWN_NAME: &str = "vt-%d";
/// Beginning of the names of macvtaps of ours; eight random hexadecimal digits follow.
const MACVTAP_NAME: &str = "vt-";
/// What the alias of a macvtap of ours begins with; the process's number and that of its namespace of processes follow.
const MACVTAP_ALIAS: &str = "vunet:macvtap:";

/// Why a link cannot be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No such bridge.
    #[error(
        "--uplink bridge={0}: there is no interface of this name; make the bridge first (ip link add {0} type \
         bridge && ip link set {0} up) or name another (ip link show type bridge)"
    )]
    NoBridge(String),
    /// An interface that is no bridge.
    #[error(
        "--uplink bridge={0}: the interface is not a bridge; name one (ip link show type bridge), or use \
         --uplink macvtap={0} to share the interface without one"
    )]
    NotABridge(String),
    /// No such interface for a macvtap.
    #[error("--uplink macvtap={0}: there is no interface of this name; name one (ip link show)")]
    NoLower(String),
    /// An interface that is no TAP.
    #[error("--uplink tap={0}: an interface of this name exists and is no TAP: give another name")]
    NotATap(String),
    /// The TUN driver is not there.
    #[error(
        "{CLONE_DEVICE} cannot be opened, so no TAP can be had: load the driver (modprobe tun), or give the \
         container the device (--device {CLONE_DEVICE})"
    )]
    NoTun(#[source] io::Error),
    /// Not allowed to make an interface.
    #[error(
        "making {what} needs CAP_NET_ADMIN: start vunet with it, or have an administrator make a TAP for this \
         user (ip tuntap add dev NAME mode tap user USER{multi}) and give --uplink tap=NAME"
    )]
    NotPermitted {
        /// What was to be made.
        what: String,
        /// What `ip tuntap` needs for several queues.
        multi: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// Not the caller's interface.
    #[error(
        "--uplink tap={name}: the TAP belongs to another user: have it made for this one (ip tuntap add dev \
         {name} mode tap user USER{multi}), or start vunet with CAP_NET_ADMIN"
    )]
    NotOurs {
        /// Its name.
        name: String,
        /// What `ip tuntap` needs for several queues.
        multi: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// Another process has it.
    #[error("--uplink tap={0}: another process uses this TAP: end it, or name another")]
    Busy(String),
    /// Made for one queue, or for several.
    #[error(
        "--uplink tap={0}: the TAP was made for one queue only: make it with multi_queue (ip tuntap add dev {0} \
         mode tap multi_queue), or give --queues 1"
    )]
    OneQueue(String),
    /// An interface of the user's with another MTU, which may not be set.
    #[error(
        "--uplink tap={name}: its MTU is {found} and the guest's {wanted}: set it (ip link set {name} mtu \
         {wanted}) or give --ip-mtu {found}"
    )]
    Mtu {
        /// Its name.
        name: String,
        /// Its MTU in bytes.
        found: u32,
        /// The guest's.
        wanted: u32,
        /// The kernel's refusal.
        source: LinkError,
    },
    /// An interface of the user's that is down and may not be brought up.
    #[error("--uplink tap={name}: it is down: bring it up (ip link set {name} up)")]
    Down {
        /// Its name.
        name: String,
        /// The kernel's refusal.
        source: LinkError,
    },
    /// Any other refusal of the kernel about a TAP.
    #[error("a TAP cannot be had")]
    Tap(#[source] io::Error),
    /// The device of a macvtap cannot be opened.
    #[error(
        "the device of macvtap {name} cannot be opened: it needs CAP_NET_ADMIN and access to {device}, or \
         CAP_MKNOD to make it"
    )]
    MacVtapDevice {
        /// Its name.
        name: String,
        /// Where it should be.
        device: String,
        /// The system's refusal.
        source: io::Error,
    },
    /// No netlink.
    #[error("the host's links cannot be looked up")]
    Netlink(#[source] io::Error),
    /// A link cannot be looked up or changed.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// An open link: one queue for each worker.
#[derive(Debug)]
pub struct OpenLink {
    /// The queues.
    pub queues: Vec<TapQueue>,
    /// What must be deleted at the end.
    delete: Option<(Links, Link)>,
}

impl OpenLink {
    fn of(queues: Vec<TapQueue>) -> OpenLink {
        OpenLink { queues, delete: None }
    }

    /// Takes the queues, for the workers.
    pub fn take_queues(&mut self) -> Vec<TapQueue> {
        std::mem::take(&mut self.queues)
    }

    /// Deletes what would outlive the process.
    pub async fn close(self) {
        let Some((links, link)) = self.delete else { return };
        if let Err(error) = links.delete(&link).await {
            tracing::warn!(link = link.name, %error, "the macvtap stays; delete it with ip link del");
        }
    }
}

/// Opens `source` with `queues` queues for a guest of this MTU and, if it is known, this MAC address. To be
/// called within a tokio runtime.
///
/// # Errors
/// [`OpenError`], which says what to do.
pub async fn open(
    source: LinkSource,
    queues: usize,
    ip_mtu: IpMtu,
    mac: Option<MacAddr>,
) -> Result<OpenLink, OpenError> {
    let links = || Links::open().map_err(OpenError::Netlink);
    match source {
        LinkSource::Inherited(queues) => Ok(OpenLink::of(queues)),
        LinkSource::Tap(name) => open_tap(&links()?, name.as_deref(), queues, ip_mtu).await.map(OpenLink::of),
        LinkSource::Bridge(name) => {
            let links = links()?;
            let bridge = find_bridge(&links, &name).await?;
            open_on_bridge(&links, &bridge, queues, ip_mtu).await.map(OpenLink::of)
        }
        LinkSource::MacVtap(lower) => open_macvtap(links()?, &lower, queues, ip_mtu, mac).await,
    }
}

/// The bridge of `--uplink bridge=NAME`.
///
/// # Errors
/// [`OpenError::NoBridge`], [`OpenError::NotABridge`], or the kernel's refusal.
pub async fn find_bridge(links: &Links, name: &str) -> Result<Link, OpenError> {
    match links.find(name).await? {
        None => Err(OpenError::NoBridge(name.to_owned())),
        Some(link) if link.kind != LinkKind::Bridge => Err(OpenError::NotABridge(link.name)),
        Some(link) => Ok(link),
    }
}

/// A TAP of our own, up, on `bridge`; it leaves it with its last queue.
///
/// # Errors
/// [`OpenError`].
pub async fn open_on_bridge(
    links: &Links,
    bridge: &Link,
    queues: usize,
    ip_mtu: IpMtu,
) -> Result<Vec<TapQueue>, OpenError> {
    let (taps, tap) = make_tap(links, OWN_NAME, queues, ip_mtu).await?;
    if bridge.ip_mtu != u32::from(ip_mtu.get()) {
        tracing::warn!(
            bridge = bridge.name, bridge_mtu = bridge.ip_mtu, %ip_mtu,
            "--ip-mtu is not the bridge's MTU: what is longer than the shorter of them will be lost on the way"
        );
    }
    links.set_master(&tap, bridge.index).await?;
    links.set_up(&tap).await?;
    tracing::info!(tap = tap.name, bridge = bridge.name, queues, "the guest is on the bridge");
    Ok(taps)
}

/// The TAP `name`, made if there is none; without a name, one of our own.
async fn open_tap(
    links: &Links,
    name: Option<&str>,
    queues: usize,
    ip_mtu: IpMtu,
) -> Result<Vec<TapQueue>, OpenError> {
    let found = match name {
        Some(name) => links.find(name).await?,
        None => None,
    };
    let Some(found) = found else {
        let (taps, tap) = make_tap(links, name.unwrap_or(OWN_NAME), queues, ip_mtu).await?;
        links.set_up(&tap).await?;
        tracing::info!(tap = tap.name, queues, "the guest is on a TAP of its own");
        return Ok(taps);
    };
    if found.kind != LinkKind::Tun {
        return Err(OpenError::NotATap(found.name));
    }
    let taps = open_existing(&found.name, queues)?;
    let wanted = u32::from(ip_mtu.get());
    if found.ip_mtu != wanted {
        links.set_ip_mtu(&found, wanted).await.map_err(|source| OpenError::Mtu {
            name: found.name.clone(),
            found: found.ip_mtu,
            wanted,
            source,
        })?;
    }
    if !found.up {
        let down = |source| OpenError::Down { name: found.name.clone(), source };
        links.set_up(&found).await.map_err(down)?;
    }
    tracing::info!(tap = found.name, queues, "the guest is on a TAP that was there");
    Ok(taps)
}

/// What `ip tuntap` needs for so many queues.
fn multi(queues: usize) -> &'static str {
    if queues > 1 { " multi_queue" } else { "" }
}

/// Opens the queues of a TAP that exists. One made for several queues has one too.
fn open_existing(name: &str, queues: usize) -> Result<Vec<TapQueue>, OpenError> {
    let refused = |error: io::Error| match error.raw_os_error() {
        Some(libc::EBUSY) => OpenError::Busy(name.to_owned()),
        Some(libc::EINVAL) if queues > 1 => OpenError::OneQueue(name.to_owned()),
        Some(libc::EINVAL) => OpenError::NotATap(name.to_owned()),
        Some(libc::EPERM) => {
            OpenError::NotOurs { name: name.to_owned(), multi: multi(queues), source: error }
        }
        _ => no_tun(error),
    };
    match open_queues(name, queues, queues > 1) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && queues == 1 => {
            open_queues(name, 1, true).map_err(refused)
        }
        outcome => outcome.map_err(refused),
    }
}

fn no_tun(error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EACCES) => OpenError::NoTun(error),
        _ => OpenError::Tap(error),
    }
}

/// Makes a TAP with an address that no bridge takes, the guest's MTU, and no addresses of the host's own.
async fn make_tap(
    links: &Links,
    name: &str,
    queues: usize,
    ip_mtu: IpMtu,
) -> Result<(Vec<TapQueue>, Link), OpenError> {
    let taps = open_queues(name, queues, queues > 1).map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => {
            let what = format!("the TAP {name}").replace(" vt-%d", "");
            OpenError::NotPermitted { what, multi: multi(queues), source: error }
        }
        _ => no_tun(error),
    })?;
    let name = taps[0].name();
    let gone = || OpenError::Tap(io::ErrorKind::NotFound.into());
    let tap = links.find(name).await?.ok_or_else(gone)?;
    links.set_mac(&tap, port_mac()?).await?;
    links.set_ip_mtu(&tap, ip_mtu.get().into()).await?;
    links.set_silent(&tap).await?;
    Ok((taps, tap))
}

/// An address of a bridge's port: locally administered and higher than any other's.
fn port_mac() -> Result<MacAddr, OpenError> {
    let [a, b, c, d, e, ..] = random::bits64().map_err(OpenError::Tap)?.to_ne_bytes();
    Ok(MacAddr([0xfe, a, b, c, d, e]))
}

/// `queues` queues of the TAP `name`; the first one may make it and name it.
fn open_queues(name: &str, queues: usize, multi_queue: bool) -> io::Result<Vec<TapQueue>> {
    let first = TapQueue::open(name, multi_queue)?;
    let name = first.name().to_owned();
    let others = (1..queues).map(|_| TapQueue::open(&name, multi_queue));
    std::iter::once(Ok(first)).chain(others).collect()
}

/// A macvtap of our own on `lower`, for the guest of this address alone.
async fn open_macvtap(
    links: Links,
    lower: &str,
    queues: usize,
    ip_mtu: IpMtu,
    mac: Option<MacAddr>,
) -> Result<OpenLink, OpenError> {
    let below = links.find(lower).await?.ok_or_else(|| OpenError::NoLower(lower.to_owned()))?;
    delete_orphans(&links).await?;
    let mac = match mac {
        Some(mac) => mac,
        None => port_mac()?,
    };
    let name = format!("{MACVTAP_NAME}{:08x}", random::bits32().map_err(OpenError::Tap)?);
    let link = links.add_macvtap(&name, below.index, mac).await.map_err(|error| {
        match error.source.raw_os_error() {
            Some(libc::EPERM) => OpenError::NotPermitted {
                what: format!("a macvtap on {lower}"),
                multi: multi(queues),
                source: error.source,
            },
            _ => OpenError::Link(error),
        }
    })?;
    let mut open = OpenLink { queues: Vec::new(), delete: Some((links.clone(), link.clone())) };
    match set_up_macvtap(&links, &link, queues, ip_mtu).await {
        Ok(taps) => {
            tracing::info!(macvtap = link.name, on = lower, queues, "the guest is on the interface");
            open.queues = taps;
            Ok(open)
        }
        Err(error) => {
            open.close().await;
            Err(error)
        }
    }
}

async fn set_up_macvtap(
    links: &Links,
    link: &Link,
    queues: usize,
    ip_mtu: IpMtu,
) -> Result<Vec<TapQueue>, OpenError> {
    let namespace = pid_namespace().map_err(OpenError::Tap)?;
    links.set_alias(link, &format!("{MACVTAP_ALIAS}{}:{namespace}", std::process::id())).await?;
    links.set_silent(link).await?;
    links.set_ip_mtu(link, ip_mtu.get().into()).await?;
    links.set_up(link).await?;
    let device = PathBuf::from(format!("/dev/tap{}", link.index));
    let numbers = PathBuf::from(format!("/sys/class/net/{}/tap{}/dev", link.name, link.index));
    let open = |_| TapQueue::open_macvtap(&device, &numbers, &link.name, queues > 1);
    (0..queues).map(open).collect::<io::Result<_>>().map_err(|source| OpenError::MacVtapDevice {
        name: link.name.clone(),
        device: device.display().to_string(),
        source,
    })
}

/// The namespace in which process numbers mean what they do here: an inode number.
fn pid_namespace() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self/ns/pid").map(|meta| meta.ino())
}

/// Whether the process a macvtap's alias names was killed. A process of another namespace of processes, as in a container
/// with the host's network, cannot be seen from here: its link is let be.
fn is_orphan(alias: &str, namespace: u64) -> bool {
    let Some((pid, of)) = alias.strip_prefix(MACVTAP_ALIAS).and_then(|owner| owner.split_once(':')) else {
        return false;
    };
    of.parse() == Ok(namespace)
        && pid.parse::<u32>().is_ok_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists())
}

/// Deletes the macvtaps of processes that were killed.
async fn delete_orphans(links: &Links) -> Result<(), OpenError> {
    let namespace = pid_namespace().map_err(OpenError::Tap)?;
    for link in links.all().await? {
        let is_orphan = link.alias.as_deref().is_some_and(|alias| is_orphan(alias, namespace));
        if link.kind == LinkKind::MacVtap && is_orphan {
            tracing::info!(macvtap = link.name, "the macvtap of a vunet that was killed is deleted");
            links.delete(&link).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_macvtap_whose_process_would_be_seen_here_is_an_orphan() {
        let own = pid_namespace().unwrap();
        // Beyond what the kernel gives a process (`PID_MAX_LIMIT`, 2^22).
        let (dead, live) = (1u32 << 23, std::process::id());
        for (alias, expected) in [
            (format!("vunet:macvtap:{dead}:{own}"), true),
            (format!("vunet:macvtap:{live}:{own}"), false),
            (format!("vunet:macvtap:{dead}:{}", own - 1), false),
            (format!("vunet:macvtap:{dead}"), false),
            (format!("other:{dead}:{own}"), false),
            (format!("vunet:macvtap:x:{own}"), false),
        ] {
            assert_eq!(is_orphan(&alias, own), expected, "{alias}");
        }
    }

    #[test]
    fn an_address_of_ours_is_above_every_ordinary_one() {
        let mac = port_mac().unwrap();
        assert_eq!(mac.0[0], 0xfe);
        assert!(mac.is_unicast() && mac > MacAddr([0xfd, 0xff, 0xff, 0xff, 0xff, 0xff]));
    }
}
