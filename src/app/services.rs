//! DHCP and local names: of one guest alone, or over the leases of a named network.

use std::sync::{Arc, Mutex};

use super::{Error, starting};
use crate::config::{Config, DnsConfig, Lan, NetworkConfig};
use crate::holder::Services;
use crate::network::clock::{HostClock, SystemClock};
use crate::network::store::keeper::Keeper;
use crate::network::store::live_names::LiveNames;
use crate::network::store::{LeaseStore, Pool};
use crate::service::dhcp::DhcpServer;
use crate::service::dns::DnsService;

/// The number of processes that lease for others' guests.
const HOLDER_OF_ALL: u64 = 0;

/// Those of `config`; with `world`, names that are not local are asked for upstream. `holder` is this process's
/// number among those of its named network.
pub(super) fn of(config: &Config, world: bool, holder: Option<u64>) -> Result<Services, Error> {
    // On a bridge of the host's both are its own network's.
    let ours = config.lan.dhcp || config.dns.enabled;
    match config.network.as_ref().filter(|_| ours) {
        Some(network) => of_network(network, &config.lan, &config.dns, world, holder),
        None => Ok(Services {
            dns: Arc::new(DnsService::new(&config.dns, &config.lan, world)),
            dhcp: Arc::new(Mutex::new(DhcpServer::new(&config.lan, &config.dns))),
            keeper: None,
        }),
    }
}

/// Those of a named network, over its store of leases. Without a number of its own (`holder`) the process leases
/// for the guests of all, and leases outlive it.
pub(super) fn of_network(
    network: &NetworkConfig,
    lan: &Lan,
    dns: &DnsConfig,
    world: bool,
    holder: Option<u64>,
) -> Result<Services, Error> {
    let folder = network.state.make_network(&network.name)?;
    let clock: Arc<dyn HostClock> =
        Arc::new(SystemClock::new().map_err(starting("the number of this boot"))?);
    let mut pool = Pool::new(lan.subnet, lan.gateway);
    pool.first = lan.guest;
    pool.names_taken = dns.labels().map(str::to_owned).collect();
    pool.takes_over = network.trust_guest || holder.is_none();
    let leases = match holder {
        Some(holder) => LeaseStore::open(&folder, pool, Arc::clone(&clock), holder)?.of_process()?,
        None => {
            // Each guest's own process sees to it that it asks for itself only.
            pool.leases_per_guest_max = pool.leases_max;
            LeaseStore::open(&folder, pool, Arc::clone(&clock), HOLDER_OF_ALL)?
        }
    };
    let guests = Arc::new(LiveNames::open(&folder, clock)?);
    let dhcp = DhcpServer::over(Box::new(leases), lan, dns).shared(network.trust_guest);
    Ok(Services {
        dns: Arc::new(DnsService::new(dns, lan, world).with_guests(guests, lan)),
        dhcp: Arc::new(Mutex::new(dhcp)),
        keeper: Some(Keeper::open(&folder)?),
    })
}
