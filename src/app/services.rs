//! DHCP and local names: of one guest alone, or over the leases of a named network.

use std::sync::{Arc, Mutex};

use super::{Error, random_pair, starting};
use crate::config::{Config, DnsConfig, Lan, NetworkConfig};
use crate::holder::Services;
use crate::network::clock::{HostClock, SystemClock};
use crate::network::store::keeper::Keeper;
use crate::network::store::live_names::LiveNames;
use crate::network::store::{LeaseStore, Pool};
use crate::service::dhcp::DhcpServer;
use crate::service::dns::DnsService;

/// Those of `config`; with `world`, names that are not local are asked for upstream.
pub(super) fn of(config: &Config, world: bool) -> Result<Services, Error> {
    // On a bridge of the host's both are its own network's.
    let ours = config.lan.dhcp || config.dns.enabled;
    match config.network.as_ref().filter(|_| ours) {
        Some(network) => of_network(network, &config.lan, &config.dns, world),
        None => Ok(Services {
            dns: Arc::new(DnsService::new(&config.dns, &config.lan, world)),
            dhcp: Arc::new(Mutex::new(DhcpServer::new(&config.lan, &config.dns))),
            keeper: None,
        }),
    }
}

/// Those of a named network, over its store of leases.
pub(super) fn of_network(
    network: &NetworkConfig,
    lan: &Lan,
    dns: &DnsConfig,
    world: bool,
) -> Result<Services, Error> {
    let folder = network.state.make_network(&network.name)?;
    let clock: Arc<dyn HostClock> =
        Arc::new(SystemClock::new().map_err(starting("the number of this boot"))?);
    let mut pool = Pool::new(lan.subnet, lan.gateway);
    pool.first = lan.guest;
    pool.names_taken = dns.labels().map(str::to_owned).collect();
    let (holder, _) = random_pair()?;
    let leases = LeaseStore::open(&folder, pool, Arc::clone(&clock), holder)?;
    let guests = Arc::new(LiveNames::open(&folder, clock)?);
    let dhcp = DhcpServer::over(Box::new(leases), lan, dns).shared(network.trust_guest);
    Ok(Services {
        dns: Arc::new(DnsService::new(dns, lan, world).with_guests(guests, lan)),
        dhcp: Arc::new(Mutex::new(dhcp)),
        keeper: Some(Keeper::open(&folder)?),
    })
}
