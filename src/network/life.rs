//! The life of a named network on the host: made by the first process that joins, removed by the last.
//!
//! | state | seen by | who leaves it, and how |
//! |---|---|---|
//! | down | no user, nothing of ours in the kernel | the first to join: [`raise`] |
//! | up | a user's file is locked | the last to leave: [`lower`] |
//! | left | no user, yet something of ours in the kernel or the notes | whoever comes next: [`lower`], then perhaps [`raise`] |
//!
//! There is no note of which state it is, so none can be wrong: users are counted by locks that the kernel
//! releases, and what is in the kernel is asked of the kernel. All of it happens under the run folder's lock.
//!
//! May touch: `uplink` (links, bridge, firewall, forwarding), `network`. Runs programs and waits for them.

use std::fs::OpenOptions;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::path::Path;

use thiserror::Error;

use super::definition::{Definition, Kind};
use super::file_lock;
use super::users::User;
use crate::addr::LinkName;
use crate::uplink::firewall::{self, Beyond, FirewallError, Redirect, Ruleset};
use crate::uplink::forwarding::{Forwarding, ForwardingError};
use crate::uplink::links::{Link, LinkError, LinkKind, Links};
use crate::uplink::own_bridge::{BridgeError, OwnBridge};
use crate::uplink::sysctl::{self, SysctlError};

/// Name of the note of switched interfaces, in the state directory: all its networks share it.
const FORWARDING_NAME: &str = "forwarding.json";
/// Its lock.
const HOST_LOCK_NAME: &str = "host.lock";

/// Why a network could not be made or removed on the host.
#[derive(Debug, Error)]
pub enum LifeError {
    /// The bridge of a bridge network.
    #[error(
        "bridge {name} of network {network}: {why}; make it, or create the network anew with another --bridge"
    )]
    Bridge {
        /// Its name.
        name: String,
        /// The network's.
        network: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The network's own bridge.
    #[error(transparent)]
    OwnBridge(#[from] BridgeError),
    /// Links could not be looked up.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The firewall.
    #[error(transparent)]
    Firewall(FirewallError),
    /// There is no program for the firewall, and another way that needs none.
    #[error("{}; that is `{instead}`", FirewallError::NoProgram)]
    NoProgram {
        /// The commands.
        instead: String,
    },
    /// Forwarding.
    #[error(transparent)]
    Forwarding(#[from] ForwardingError),
    /// A setting.
    #[error(transparent)]
    Setting(#[from] SysctlError),
    /// A netlink socket, routes, or the lock that the host's networks share.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The refusal.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> LifeError {
    move |source| LifeError::Host { what, source }
}

/// Runs what asks the kernel about links, on a runtime of its own.
fn with_links<T>(work: impl AsyncFnOnce(&Links) -> Result<T, LifeError>) -> Result<T, LifeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(host("start a runtime for netlink"))?;
    runtime.block_on(async { work(&Links::open().map_err(host("open a netlink socket"))?).await })
}

/// Calls `work` with the forwarding notes of `state_dir`, alone among all its processes.
fn with_forwarding<T>(
    state_dir: &Path,
    work: impl FnOnce(&mut Forwarding) -> Result<T, ForwardingError>,
) -> Result<T, LifeError> {
    let path = state_dir.join(HOST_LOCK_NAME);
    let open = || {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        file_lock::lock(&file).map(|()| file)
    };
    let _lock = open().map_err(host("lock host.lock in the state directory"))?;
    Ok(work(&mut Forwarding::open(&state_dir.join(FORWARDING_NAME))?)?)
}

/// What a network has on the host itself: nothing, if a holder has it in namespaces of its own.
fn own_bridge(definition: &Definition) -> Option<OwnBridge> {
    let lan = definition.kind.lan().filter(|_| !definition.is_rootless())?;
    Some(OwnBridge {
        name: definition.bridge(),
        alias: definition.alias(),
        gateway: lan.gateway,
        prefix_len: lan.subnet.prefix_len(),
        ip_mtu: lan.ip_mtu,
        forwards: matches!(definition.kind, Kind::Nat { .. }),
    })
}

/// Makes of a network what is missing on the host, for these users. To be called at every change of them,
/// and whenever something may have been taken away. Whether the firewall had to be changed.
///
/// # Errors
/// [`LifeError`]; what was made stays for [`lower`].
pub fn raise(state_dir: &Path, definition: &Definition, users: &[User]) -> Result<bool, LifeError> {
    let Some(bridge) = own_bridge(definition) else {
        if definition.is_rootless() {
            return raise_inside(definition, users).map(|()| false);
        }
        return with_links(async |links| {
            let bridge = find_bridge(links, definition).await?;
            put_on(links, &bridge, users, definition.kind.isolate()).await.map(|()| false)
        });
    };
    // The firewall comes first: no guest and no forwarding without it.
    let uplinks = uplinks(definition)?;
    let changed = match ruleset(definition, users, &uplinks, state_dir)? {
        Some(ruleset) => apply(state_dir, definition, &ruleset)?,
        None => false,
    };
    with_links(async |links| {
        let bridge = bridge.ensure(links).await?;
        put_on(links, &bridge, users, definition.kind.isolate()).await
    })?;
    if let Kind::Nat { .. } = definition.kind {
        let holder = definition.id.to_string();
        let switched = with_forwarding(state_dir, |forwarding| {
            let before = forwarding.switched(&uplinks);
            forwarding.hold(&holder, &uplinks)?;
            Ok(forwarding.switched(&uplinks) != before)
        })?;
        if switched && let Some(ruleset) = ruleset(definition, users, &uplinks, state_dir)? {
            apply(state_dir, definition, &ruleset)?;
        }
    }
    Ok(changed)
}

/// Makes the TAP of one user a port of the network's bridge, which is up.
///
/// # Errors
/// [`LifeError`].
pub fn attach(definition: &Definition, user: &User) -> Result<(), LifeError> {
    with_links(async |links| {
        let bridge = match own_bridge(definition) {
            Some(bridge) => bridge.ensure(links).await?,
            None => find_bridge(links, definition).await?,
        };
        put_on(links, &bridge, std::slice::from_ref(user), definition.kind.isolate()).await
    })
}

/// Whether ports of the host lead to a user's guest.
pub fn leads_anywhere(user: &User) -> bool {
    !redirects(user).is_empty()
}

/// Whether ports of the host lead elsewhere after a change of a user.
pub fn leads_elsewhere(before: &User, after: &User) -> bool {
    redirects(before) != redirects(after)
}

/// Removes from the host all that is there of a network, which nobody uses. Whether there was anything.
///
/// # Errors
/// [`LifeError`]; what could be removed is.
pub fn lower(state_dir: &Path, definition: &Definition) -> Result<bool, LifeError> {
    let Some(bridge) = own_bridge(definition) else { return Ok(false) };
    // Each step in spite of the others' failure; forwarding first and the rules last, so that nothing is
    // ever open without them.
    let forwarding = with_forwarding(state_dir, |forwarding| forwarding.release(&definition.id.to_string()));
    let link = with_links(async |links| Ok(bridge.remove(links).await?));
    let rules = match firewall::remove(&definition.id.table(), &definition.id.rule_comment()) {
        // Without the program there never were any.
        Err(FirewallError::NoProgram) => Ok(false),
        outcome => outcome,
    };
    forwarding?;
    Ok(link? | rules.map_err(LifeError::Firewall)?)
}

fn apply(state_dir: &Path, definition: &Definition, ruleset: &Ruleset) -> Result<bool, LifeError> {
    firewall::apply(ruleset).map_err(|error| match error {
        FirewallError::NoProgram => LifeError::NoProgram { instead: rootless(state_dir, definition) },
        error => LifeError::Firewall(error),
    })
}

/// The commands that make the same network in user space.
fn rootless(state_dir: &Path, definition: &Definition) -> String {
    let (name, state) = (&definition.name, state_dir.display());
    let mode = if matches!(definition.kind, Kind::HostOnly { .. }) { " --mode host-only" } else { "" };
    let isolate = if definition.kind.isolate() { " --isolate" } else { "" };
    let subnet =
        definition.kind.lan().map(|lan| format!(" --subnet {} --gateway {}", lan.subnet, lan.gateway));
    format!(
        "vunet network remove {name} --state-dir {state} && vunet network create {name} --state-dir {state}{mode} \
         --rootless{isolate}{}",
        subnet.unwrap_or_default()
    )
}

/// Interfaces that lead to the world, for those that may go there.
fn uplinks(definition: &Definition) -> Result<Vec<String>, LifeError> {
    match definition.kind {
        Kind::Nat { .. } => with_links(async |links| Ok(links.to_the_world().await?)),
        Kind::HostOnly { .. } | Kind::Rootless { .. } | Kind::Bridge { .. } => Ok(Vec::new()),
    }
}

/// What the firewall must hold; none on a bridge that is not ours.
fn ruleset(
    definition: &Definition,
    users: &[User],
    uplinks: &[String],
    state_dir: &Path,
) -> Result<Option<Ruleset>, LifeError> {
    let Some(lan) = definition.kind.lan() else { return Ok(None) };
    let beyond = match &definition.kind {
        Kind::Nat { allow_host, .. } => {
            // A host that became a router by its administrator's will is left one.
            let guarded = if sysctl::is_router()? {
                Vec::new()
            } else {
                with_forwarding(state_dir, |forwarding| Ok(forwarding.switched(uplinks)))?
            };
            let redirects = users.iter().flat_map(redirects).collect();
            Beyond::World { allow_host: *allow_host, uplinks: uplinks.to_vec(), guarded, redirects }
        }
        Kind::HostOnly { .. } | Kind::Rootless { .. } | Kind::Bridge { .. } => Beyond::Host,
    };
    Ok(Some(Ruleset {
        table: definition.id.table(),
        comment: definition.id.rule_comment(),
        bridge: definition.bridge(),
        subnet: lan.subnet,
        gateway: lan.gateway,
        isolate: lan.isolate,
        beyond,
    }))
}

/// Whether this is the host's loopback interface, which every namespace has under this name.
fn is_loopback(interface: Option<LinkName>) -> bool {
    interface.is_some_and(|name| name.as_str() == "lo")
}

fn redirects(user: &User) -> Vec<Redirect> {
    let Some(guest) = user.guest else { return Vec::new() };
    let redirect = |port: &super::users::PublishedPort| match port.host {
        // What the host sends to itself is never redirected: the process's own relay serves it.
        SocketAddr::V4(host) if !host.ip().is_loopback() && !is_loopback(port.interface) => Some(Redirect {
            udp: port.udp,
            host,
            interface: port.interface,
            guest: SocketAddrV4::new(guest, port.guest_port),
        }),
        _ => None,
    };
    user.published.iter().filter_map(redirect).collect()
}

/// Puts TAPs on the bridge of a rootless network. Before this process has moved into the namespaces nothing of
/// the network is to be seen, and nothing to be done.
fn raise_inside(definition: &Definition, users: &[User]) -> Result<(), LifeError> {
    with_links(async |links| match links.find(&definition.bridge()).await? {
        Some(bridge) if bridge.alias.as_deref() == Some(&*definition.alias()) => {
            put_on(links, &bridge, users, definition.kind.isolate()).await
        }
        _ => Ok(()),
    })
}

/// The bridge of a bridge network, which must be there before anything is made.
async fn find_bridge(links: &Links, definition: &Definition) -> Result<Link, LifeError> {
    let name = definition.bridge();
    let why = match links.find(&name).await? {
        None => "there is no such link",
        Some(link) if link.kind != LinkKind::Bridge => "it is no bridge",
        Some(link) if !link.up => "it is down",
        Some(link) => return Ok(link),
    };
    Err(LifeError::Bridge { name, network: definition.name.to_string(), why })
}

/// Makes the users' TAPs ports of the bridge. One that is not there is of a process that is just ending.
async fn put_on(links: &Links, bridge: &Link, users: &[User], isolate: bool) -> Result<(), LifeError> {
    for name in users.iter().filter_map(|user| user.tap.as_deref()) {
        let Some(tap) = links.find(name).await? else { continue };
        if tap.master == Some(bridge.index) {
            continue;
        }
        links.set_master(&tap, bridge.index).await?;
        if isolate {
            links.set_isolated(&tap).await?;
        }
    }
    Ok(())
}
