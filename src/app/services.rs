//! DHCP and local names: of one guest alone, or over the leases of a named network.

use std::sync::{Arc, Mutex};

use super::{Error, starting};
use crate::config::{Config, DnsConfig, Lan, NetworkConfig};
use crate::holder::Services;
use crate::network::clock::{HostClock, SystemClock};
use crate::network::definition::OwnLan;
use crate::network::store::keeper::Keeper;
use crate::network::store::live_names::LiveNames;
use crate::network::store::reading::LeaseReader;
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
            leases: None,
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
    let guests = Arc::new(LiveNames::open(&folder, Arc::clone(&clock))?);
    let dhcp = DhcpServer::over(Box::new(leases), lan, dns).shared(network.trust_guest);
    Ok(Services {
        dns: Arc::new(DnsService::new(dns, lan, world).with_guests(guests, lan)),
        dhcp: Arc::new(Mutex::new(dhcp)),
        keeper: Some(Keeper::open(&folder)?),
        leases: Some(LeaseReader::new(folder, clock)),
    })
}

/// The store of a network's leases, for who claims there what its holder gave: process `holder`.
pub(super) fn to_claim(network: &NetworkConfig, own: &OwnLan, holder: u64) -> Result<LeaseStore, Error> {
    let folder = network.state.make_network(&network.name)?;
    let clock = Arc::new(SystemClock::new().map_err(starting("the number of this boot"))?);
    Ok(LeaseStore::open(&folder, Pool::new(own.subnet, own.gateway), clock, holder)?.of_process()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::MacAddr;
    use crate::config::IpMtu;
    use crate::limits::LEASES_PER_GUEST_MAX;
    use crate::network::state_dir::StateDir;
    use crate::service::dhcp::{Outcome, Silence};
    use crate::time::Instant;

    /// How many of `clients` are offered an address, one after the other, by a process with the number `holder`.
    fn offered(holder: Option<u64>, clients: usize) -> usize {
        // Not in memory: vunet refuses that.
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let state = StateDir::open(place.path().join("state")).unwrap();
        let network =
            NetworkConfig { name: "lab".parse().unwrap(), state, trust_guest: true, lent: Vec::new() };
        let subnet: crate::addr::Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
        let gateway = subnet.host(1).unwrap();
        let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let dns = DnsConfig::of_gateway(DnsConfig::DEFAULT_DOMAIN, gateway);
        let services = of_network(&network, &lan, &dns, true, holder).unwrap();
        let mut dhcp = services.dhcp.lock().unwrap();
        let is_offered = |n: usize| {
            let mac = MacAddr([2, 0, 0, 0, 0, u8::try_from(n).unwrap()]);
            let mut discover = vec![0; 236];
            discover[..3].copy_from_slice(&[1, 1, 6]);
            discover[28..34].copy_from_slice(&mac.0);
            discover.extend_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
            match dhcp.handle(Instant::ZERO, mac, &discover) {
                Outcome::Reply(_) => true,
                outcome => {
                    assert_eq!(outcome, Outcome::Silent(Silence::ShareUsed));
                    false
                }
            }
        };
        (0..clients).map(is_offered).filter(|&is| is).count()
    }

    #[test]
    fn a_holder_leases_to_more_guests_than_one_guest_may_have_addresses() {
        let more = LEASES_PER_GUEST_MAX + 4;
        assert_eq!(offered(None, more), more, "they are of as many processes");
        assert_eq!(offered(Some(7), more), LEASES_PER_GUEST_MAX, "one guest's");
    }
}
