//! What is made inside the network's namespaces: the bridge, and the holder's TAP on it.

use std::error::Error;
use std::io;
use std::os::fd::OwnedFd;

use crate::addr::MacAddr;
use crate::config::IpMtu;
use crate::engine::guest_port::GuestOffloads;
use crate::uplink::links::{Link, LinkError, Links};
use crate::uplink::sys::tap::TapQueue;

/// The network's bridge. The names are taken from nobody: the namespace has no other links.
pub const BRIDGE: &str = "vn-lan";
/// Its own MAC address, which is nobody's: the engine behind the TAP is the gateway.
const BRIDGE_MAC: MacAddr = MacAddr([0x02, 0xab, 0xcd, 0, 0, 0x02]);
/// The holder's own port of it.
const TAP: &str = "vn-gateway";

/// What the engine takes: everything, so that the kernel need not cut.
const OFFLOADS: GuestOffloads =
    GuestOffloads { checksum: true, tso4: true, tso6: false, ecn: true, uso4: false, uso6: false };

/// Makes the bridge, if there is none, and the TAP in the namespace this process is in; the TAP's descriptor.
///
/// # Errors
/// What could not be made and why, in words.
pub(super) fn make(ip_mtu: IpMtu, alias: &str) -> Result<OwnedFd, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let tap = TapQueue::open(TAP, false).map_err(|error| refused("open /dev/net/tun", &error))?;
    tap.set_offloads(OFFLOADS).map_err(|error| refused("set the offloads of the TAP", &error))?;
    runtime.block_on(join(ip_mtu, alias)).map_err(|error| said(&error))?;
    Ok(tap.into_fd())
}

async fn join(ip_mtu: IpMtu, alias: &str) -> Result<(), LinkError> {
    let links = Links::open().map_err(|source| absent("open the way to", "links", source))?;
    let bridge = match links.find(BRIDGE).await? {
        // Of a holder that was killed.
        Some(bridge) => bridge,
        None => links.add_bridge(BRIDGE, BRIDGE_MAC).await?,
    };
    links.set_alias(&bridge, alias).await?;
    let tap = find(&links, TAP).await?;
    links.set_master(&tap, bridge.index).await?;
    for link in [&find(&links, "lo").await?, &tap, &bridge] {
        if link.name != "lo" {
            links.set_ip_mtu(link, ip_mtu.get().into()).await?;
        }
        links.set_up(link).await?;
    }
    Ok(())
}

async fn find(links: &Links, name: &str) -> Result<Link, LinkError> {
    let none = || absent("find", name, io::ErrorKind::NotFound.into());
    links.find(name).await?.ok_or_else(none)
}

fn absent(what: &'static str, link: &str, source: io::Error) -> LinkError {
    LinkError { what, link: link.to_owned(), source }
}

fn refused(what: &str, error: &io::Error) -> String {
    format!("cannot {what}: {error}")
}

fn said(error: &LinkError) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}
