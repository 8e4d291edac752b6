//! Links of the host: bridges and the interfaces on them, over rtnetlink.
//!
//! Looked up and changed at start and at the end only, on the control thread's runtime; no frame waits
//! for it. A [`Links`] belongs to the network namespace of the thread that opened it. Each error names
//! what was to be done to which link; what to do about it, the caller says.
//!
//! May touch: `addr`. Read first: rtnetlink(7), and `linux/if_link.h` for the attributes.

use std::io;
use std::net::IpAddr;

use futures_util::{Stream, StreamExt};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    MacVtapMode,
};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMacVtap, LinkUnspec};
use thiserror::Error;

use crate::addr::{LinkName, MacAddr};

/// Whether `name` can be that of an interface; see [`LinkName::new`].
pub fn is_link_name(name: &str) -> bool {
    LinkName::new(name).is_some()
}

/// What a link is, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A software bridge.
    Bridge,
    /// A TAP or TUN interface.
    Tun,
    /// A macvtap interface.
    MacVtap,
    /// Any other kind, as the kernel names it.
    Other(String),
    /// The kernel names no kind: hardware, or the loopback.
    Plain,
}

/// A link as the kernel described it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index, unique in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Its MAC address, if it has one of six octets.
    pub mac: Option<MacAddr>,
    /// Its IP MTU in bytes.
    pub ip_mtu: u32,
    /// Index of the bridge, bond or team it is a port of.
    pub master: Option<u32>,
    /// Index of the link it stands on, as a macvtap does.
    pub lower: Option<u32>,
    /// Whether it is administratively up.
    pub up: bool,
    /// Its alias: a text for people, and our mark on what is ours.
    pub alias: Option<String>,
}

/// Why a link could not be looked up or changed.
#[derive(Debug, Error)]
#[error("cannot {what} {link}")]
pub struct LinkError {
    /// What was to be done.
    pub what: &'static str,
    /// To which link.
    pub link: String,
    /// The kernel's refusal.
    pub source: io::Error,
}

/// The way to the kernel's links, of one network namespace.
#[derive(Clone, Debug)]
pub struct Links(Handle);

impl Links {
    /// Opens the way; to be called within a tokio runtime, which drives it.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn open() -> io::Result<Links> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Links(handle))
    }

    /// The way itself, for what is asked elsewhere.
    pub(super) fn handle(&self) -> &Handle {
        &self.0
    }

    /// The link of this name; `None` if there is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        let request = self.0.link().get().match_name(name);
        first(request.execute()).await.map_err(failed("look up", name))
    }

    /// Whether this process may change links here: the kernel judges that before it looks for the link, so that it is
    /// asked for no change of a link that nobody has.
    ///
    /// # Errors
    /// Any refusal but those for want of CAP_NET_ADMIN and of the link.
    pub async fn may_change(&self) -> Result<bool, LinkError> {
        // `ifindex` counts up from 1 (`dev_new_index`).
        let nobodys = LinkUnspec::new_with_index(i32::MAX.unsigned_abs()).build();
        let outcome = self.0.link().change(nobodys).execute().await;
        match outcome.map_err(failed("try to change", "a link")) {
            Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(error) if !is_absent(&error.source) => Err(error),
            _ => Ok(true),
        }
    }

    /// The link of this index; `None` if there is none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn at(&self, index: u32) -> Result<Option<Link>, LinkError> {
        let request = self.0.link().get().match_index(index);
        first(request.execute()).await.map_err(failed("look up", &format!("link {index}")))
    }

    /// All links of the namespace.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn all(&self) -> Result<Vec<Link>, LinkError> {
        let mut stream = std::pin::pin!(self.0.link().get().execute());
        let mut links = Vec::new();
        while let Some(message) = stream.next().await {
            links.push(link_of(&message.map_err(failed("list", "links"))?));
        }
        Ok(links)
    }

    /// Makes a bridge, down, with this MAC address (a bridge given one keeps it whatever joins).
    ///
    /// # Errors
    /// The kernel's refusal; `AlreadyExists` if the name is taken.
    pub async fn add_bridge(&self, name: &str, mac: MacAddr) -> Result<Link, LinkError> {
        let message = LinkBridge::new(name).down().address(mac.0.to_vec()).build();
        self.0.link().add(message).execute().await.map_err(failed("make bridge", name))?;
        self.made(name).await
    }

    /// Makes a macvtap in bridge mode on the link `lower`, down, with this MAC address.
    ///
    /// # Errors
    /// The kernel's refusal; `AlreadyExists` if the name is taken.
    pub async fn add_macvtap(&self, name: &str, lower: u32, mac: MacAddr) -> Result<Link, LinkError> {
        let link = LinkMacVtap::new(name, lower, MacVtapMode::Bridge);
        let message = link.address(mac.0.to_vec()).build();
        self.0.link().add(message).execute().await.map_err(failed("make macvtap", name))?;
        self.made(name).await
    }

    async fn made(&self, name: &str) -> Result<Link, LinkError> {
        let gone = || failed("find again", name)(rtnetlink::Error::RequestFailed);
        self.find(name).await?.ok_or_else(gone)
    }

    /// Makes `link` a port of the bridge of index `bridge`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn set_master(&self, link: &Link, bridge: u32) -> Result<(), LinkError> {
        self.change(
            link,
            "put on its bridge",
            LinkUnspec::new_with_index(link.index).controller(bridge).build(),
        )
        .await
    }

    /// Keeps `link`, a port of a bridge, from the bridge's other ports that are kept so too.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn set_isolated(&self, link: &Link) -> Result<(), LinkError> {
        let message = LinkBridgePort::new(link.index).isolated(true).build();
        let outcome = self.0.link().set_port(message).execute().await;
        outcome.map_err(failed("keep from other ports", &link.name))
    }

    /// Brings `link` up.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn set_up(&self, link: &Link) -> Result<(), LinkError> {
        self.change(link, "bring up", LinkUnspec::new_with_index(link.index).up().build()).await
    }

    /// Sets the IP MTU of `link`, in bytes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn set_ip_mtu(&self, link: &Link, ip_mtu: u32) -> Result<(), LinkError> {
        self.change(link, "set the MTU of", LinkUnspec::new_with_index(link.index).mtu(ip_mtu).build()).await
    }

    /// Sets the MAC address of `link`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn set_mac(&self, link: &Link, mac: MacAddr) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(link.index).address(mac.0.to_vec()).build();
        self.change(link, "set the MAC address of", message).await
    }

    /// Gives `link` an alias.
    ///
    /// # Errors
    /// The kernel's refusal; it takes at most 255 bytes.
    pub async fn set_alias(&self, link: &Link, alias: &str) -> Result<(), LinkError> {
        let attribute = LinkAttribute::IfAlias(alias.to_owned());
        let message = LinkUnspec::new_with_index(link.index).append_extra_attribute(attribute).build();
        self.change(link, "set the alias of", message).await
    }

    /// Keeps the host from giving `link` an IPv6 address by itself, and from speaking there for it.
    ///
    /// # Errors
    /// The kernel's refusal; a host without IPv6 is silent already.
    pub async fn set_silent(&self, link: &Link) -> Result<(), LinkError> {
        let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]);
        let message = LinkUnspec::new_with_index(link.index).append_extra_attribute(attribute).build();
        match self.change(link, "keep IPv6 addresses from", message).await {
            Err(error) if error.source.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
            outcome => outcome,
        }
    }

    async fn change(&self, link: &Link, what: &'static str, message: LinkMessage) -> Result<(), LinkError> {
        self.0.link().change(message).execute().await.map_err(failed(what, &link.name))
    }

    /// Gives `link` an address with a prefix of `prefix_len` bits.
    ///
    /// # Errors
    /// The kernel's refusal; `AlreadyExists` if it has that address.
    pub async fn add_address(&self, link: &Link, addr: IpAddr, prefix_len: u8) -> Result<(), LinkError> {
        let request = self.0.address().add(link.index, addr, prefix_len);
        request.execute().await.map_err(failed("give an address to", &link.name))
    }

    /// Deletes `link`. One that is gone already is no error.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn delete(&self, link: &Link) -> Result<(), LinkError> {
        match self.0.link().del(link.index).execute().await.map_err(failed("delete", &link.name)) {
            Err(error) if is_absent(&error.source) => Ok(()),
            outcome => outcome,
        }
    }
}

/// The first link of an answer; none if the kernel says that there is none.
async fn first(
    answer: impl Stream<Item = Result<LinkMessage, rtnetlink::Error>>,
) -> Result<Option<Link>, rtnetlink::Error> {
    let mut answer = std::pin::pin!(answer);
    match answer.next().await {
        None => Ok(None),
        Some(Ok(message)) => Ok(Some(link_of(&message))),
        Some(Err(rtnetlink::Error::NetlinkError(message))) if is_absent(&message.to_io()) => Ok(None),
        Some(Err(error)) => Err(error),
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

pub(super) fn failed(what: &'static str, link: &str) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    let link = link.to_owned();
    move |error| {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        };
        LinkError { what, link, source }
    }
}

fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Plain,
        mac: None,
        ip_mtu: 0,
        master: None,
        lower: None,
        up: message.header.flags.contains(LinkFlags::Up),
        alias: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(octets) => link.mac = octets.as_slice().try_into().ok().map(MacAddr),
            LinkAttribute::Mtu(bytes) => link.ip_mtu = *bytes,
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.lower = Some(*index).filter(|index| *index != 0),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::LinkInfo(infos) => link.kind = kind_of(infos),
            _ => {}
        }
    }
    link
}

fn kind_of(infos: &[LinkInfo]) -> LinkKind {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        None => LinkKind::Plain,
        Some(InfoKind::Bridge) => LinkKind::Bridge,
        Some(InfoKind::Tun) => LinkKind::Tun,
        Some(InfoKind::MacVtap) => LinkKind::MacVtap,
        Some(other) => LinkKind::Other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_the_kernel_takes_as_they_are() {
        for name in ["a", "vunet0", "vt-3f9a", "abcdefghijklmno", "br.100", "x@y"] {
            assert!(is_link_name(name), "{name}");
        }
        for name in
            ["", ".", "..", "abcdefghijklmnop", "a/b", "a b", "a:b", "tap%d", "a\tb", "a\u{b}b", "a\0"]
        {
            assert!(!is_link_name(name), "{name:?}");
        }
    }
}
