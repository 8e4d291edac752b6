//! The holder of a rootless network, from its definition.

use super::{Error, random_pair, services, starting};
use crate::config::{DnsConfig, Lan, NetworkConfig};
use crate::holder::{self, HolderConfig, door};
use crate::log::Log;
use crate::network::definition::OwnLan;
use crate::network::manager::Networks;
use crate::network::name::NetworkName;

/// Holds the rootless network `name` of `networks`, whose addresses are `own` and which leads to the `world` or nowhere, and calls `ready` once processes
/// can join; with `keep` for ever, else until nobody has used it for a while. False if another process holds
/// it. Must be called while the process has one thread.
/// Its `log` is written by another once it may have several.
///
/// # Errors
/// [`enum@Error`], whose chain says what to do.
pub fn hold(
    networks: &Networks,
    name: &NetworkName,
    (own, world): (&OwnLan, bool),
    (keep, log): (bool, &Log),
    ready: impl FnOnce(),
) -> Result<bool, Error> {
    let place = networks.holder(name);
    let Some(_lock) = place.hold().map_err(starting("the holder's lock"))? else { return Ok(false) };
    let lan = Lan { subnet: own.subnet, gateway: own.gateway, guest: None, ip_mtu: own.ip_mtu, dhcp: true };
    let dns = DnsConfig::of_gateway(&own.dns_domain, own.gateway);
    // Each process guards its own guest; what comes over the bridge is of all of them.
    let state = networks.state().clone();
    let network = NetworkConfig { name: name.clone(), state, trust_guest: true, lent: Vec::new() };
    let services = services::of_network(&network, &lan, &dns, world, None)?;
    let config = HolderConfig {
        lan,
        dns,
        world,
        isn_secret: random_pair()?,
        alias: networks.find(name)?.alias(),
        survivors: networks.users(name)?.iter().map(|user| user.pid).collect(),
        door: place.door(),
        idle: (!keep).then_some(door::IDLE),
        log: log.clone(),
    };
    holder::run(&config, services, ready).map_err(|source| Error::Holder { name: name.clone(), source })?;
    Ok(true)
}
