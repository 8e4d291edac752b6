//! The bridge of a named network: made by the first process that joins, removed by the last.
//!
//! Its MAC address is the gateway's, so that what the kernel answers and what this program answers agree.
//! On it the host has the gateway's address and no IPv6, answers ARP for no other address of its own, and
//! takes no redirect and no foreign source address. These settings go with the bridge.
//!
//! It is ours if it has our alias. One that was made and got none, because its maker was killed in between,
//! is known by being down and having the gateway's MAC address under a name with 32 random bits.
//!
//! May touch: `uplink::links`, `uplink::sysctl`.

use std::net::{IpAddr, Ipv4Addr};

use thiserror::Error;

use super::links::{Link, LinkError, LinkKind, Links};
use super::sysctl::{self, SysctlError};
use crate::addr::MacAddr;
use crate::config::IpMtu;

/// What the bridge is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnBridge {
    /// Its name.
    pub name: String,
    /// Its alias: the mark that it is ours.
    pub alias: String,
    /// The host's address on it.
    pub gateway: Ipv4Addr,
    /// Length of the subnet's prefix in bits.
    pub prefix_len: u8,
    /// Its IP MTU.
    pub ip_mtu: IpMtu,
    /// Whether the host forwards what comes in by it.
    pub forwards: bool,
}

/// Why a bridge could not be made or removed.
#[derive(Debug, Error)]
pub enum BridgeError {
    /// Somebody else's link has the name.
    #[error(
        "a link called {0} exists that vunet did not make, so it is left alone: rename or remove it, or remove \
         the network and create it anew"
    )]
    NameTaken(String),
    /// The kernel's refusal.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A setting could not be made.
    #[error(transparent)]
    Setting(#[from] SysctlError),
}

/// Settings of `net.ipv4.conf.BRIDGE` beside `forwarding`.
const SETTINGS: [(&str, &str); 7] = [
    // Only for the address that is on this bridge, and only to hosts of its subnet.
    ("arp_ignore", "2"),
    ("arp_announce", "2"),
    // A source address must be one that is reached over this bridge.
    ("rp_filter", "1"),
    ("accept_redirects", "0"),
    // Guests that reach each other through the host are not told to stop it: the host knows why they do.
    ("send_redirects", "0"),
    ("accept_source_route", "0"),
    ("route_localnet", "0"),
];

impl OwnBridge {
    /// Makes the bridge, or what is missing of it.
    ///
    /// # Errors
    /// [`BridgeError`]; what was made stays, to be removed by [`Self::remove`].
    pub async fn ensure(&self, links: &Links) -> Result<Link, BridgeError> {
        let link = match links.find(&self.name).await? {
            Some(link) if self.is_ours(&link) => link,
            Some(link) => return Err(BridgeError::NameTaken(link.name)),
            None => links.add_bridge(&self.name, MacAddr::GATEWAY).await?,
        };
        if link.alias.is_none() {
            links.set_alias(&link, &self.alias).await?;
        }
        sysctl::disable_ipv6(&self.name)?;
        for (key, value) in SETTINGS {
            sysctl::set_ipv4(&self.name, key, value)?;
        }
        sysctl::set_forwards(&self.name, self.forwards)?;
        let ip_mtu = u32::from(self.ip_mtu.get());
        if link.ip_mtu != ip_mtu {
            links.set_ip_mtu(&link, ip_mtu).await?;
        }
        match links.add_address(&link, IpAddr::V4(self.gateway), self.prefix_len).await {
            Err(error) if error.source.kind() == std::io::ErrorKind::AlreadyExists => {}
            outcome => outcome?,
        }
        if !link.up {
            links.set_up(&link).await?;
        }
        Ok(link)
    }

    /// Removes the bridge if it is there and ours. Whether it was.
    ///
    /// # Errors
    /// [`BridgeError::Link`].
    pub async fn remove(&self, links: &Links) -> Result<bool, BridgeError> {
        match links.find(&self.name).await? {
            Some(link) if self.is_ours(&link) => {
                links.delete(&link).await?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn is_ours(&self, link: &Link) -> bool {
        link.kind == LinkKind::Bridge
            && match &link.alias {
                Some(alias) => *alias == self.alias,
                None => !link.up && link.mac == Some(MacAddr::GATEWAY),
            }
    }
}
