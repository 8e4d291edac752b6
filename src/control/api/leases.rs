//! `/v1/leases`: which addresses DHCP gave.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{Api, ApiError, Shared};
use crate::engine::gateway::SharedDhcp;
use crate::network::allocator::Lease;
use crate::network::store::reading::LeaseReader;
use crate::time::Instant;

/// Leases known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Leases {
    /// By address.
    pub leases: Vec<LeaseStatus>,
}

/// One client's address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LeaseStatus {
    /// The address.
    #[schema(value_type = String, format = Ipv4)]
    pub address: Ipv4Addr,
    /// The client's hardware address.
    pub mac: String,
    /// The name the client gave itself.
    pub host_name: Option<String>,
    /// `offered`, `active` or `ended`.
    pub state: String,
    /// Seconds until it ends, if it is active.
    pub left_seconds: Option<f64>,
}

impl LeaseStatus {
    fn of(lease: &Lease, now: Instant) -> LeaseStatus {
        let state = match lease.until {
            None => "offered",
            Some(until) if until > now => "active",
            Some(_) => "ended",
        };
        LeaseStatus {
            address: lease.ip,
            mac: lease.mac.to_string(),
            host_name: lease.host_name.clone(),
            state: state.to_owned(),
            left_seconds: lease
                .until
                .filter(|until| *until > now)
                .map(|until| until.since(now).as_secs_f64()),
        }
    }
}

/// Where leases are read.
#[derive(Clone, Debug)]
pub enum LeaseSource {
    /// The process's own, which workers hold for microseconds.
    Memory(SharedDhcp),
    /// The store of a named network: beside the workers, whose guests would wait for the disk with it.
    Store(Arc<Mutex<LeaseReader>>),
}

impl LeaseSource {
    /// The `store`, or what `dhcp` has in memory.
    pub fn new(dhcp: SharedDhcp, store: Option<LeaseReader>) -> LeaseSource {
        store.map_or(LeaseSource::Memory(dhcp), |store| LeaseSource::Store(Arc::new(Mutex::new(store))))
    }

    /// All leases known, by address; or why not.
    async fn read(&self, now: Instant) -> Result<Vec<Lease>, String> {
        let leases = match self {
            LeaseSource::Memory(dhcp) => dhcp.lock().unwrap_or_else(PoisonError::into_inner).leases(now),
            LeaseSource::Store(store) => {
                let store = Arc::clone(store);
                let work = move || store.lock().unwrap_or_else(PoisonError::into_inner).leases(now);
                spawn_blocking(work).await.map_err(|error| error.to_string())?
            }
        };
        leases.map_err(|error| error.to_string())
    }
}

/// Addresses that DHCP gave
#[utoipa::path(
    get,
    path = "/v1/leases",
    responses(
        (status = 200, body = Leases),
        (status = 503, description = "The network's leases cannot be read", body = ErrorBody),
    )
)]
pub(super) async fn get(State(api): Shared) -> Result<Json<Leases>, ApiError> {
    let now = api.clock.now();
    let leases = api.leases.read(now).await.map_err(|why| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_store", format!("the network's leases: {why}"))
    })?;
    Ok(Json(Leases { leases: leases.iter().map(|lease| LeaseStatus::of(lease, now)).collect() }))
}

impl Api {
    /// The guest's address as DHCP gave it, ours or a holder's.
    pub(super) fn guest_address(&self) -> Option<Ipv4Addr> {
        *self.guest.borrow()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::addr::MacAddr;
    use crate::config::{DnsConfig, IpMtu, Lan};
    use crate::network::allocator::{Client, IpAllocator as _};
    use crate::network::clock::{HostClock, SystemClock};
    use crate::network::store::{LeaseStore, Pool};
    use crate::service::dhcp::DhcpServer;

    #[test]
    fn leases_of_a_network_are_read_while_workers_answer_dhcp() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // Not in memory: the store refuses that.
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let subnet: crate::addr::Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
        let gateway = subnet.host(1).unwrap();
        let clock: Arc<dyn HostClock> = Arc::new(SystemClock::new().unwrap());
        let pool = Pool::new(subnet, gateway);
        let mut store = LeaseStore::open(place.path(), pool, Arc::clone(&clock), 7).unwrap();
        let client = Client { mac: MacAddr([2, 0, 0, 0, 0, 9]), id: None, host_name: Some("vm9") };
        let offer = store.offer(Instant::ZERO, &client, None).unwrap();
        store.bind(Instant::ZERO, &client, offer.ip).unwrap();
        let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let dns = DnsConfig::of_gateway(DnsConfig::DEFAULT_DOMAIN, gateway);
        let dhcp: SharedDhcp = Arc::new(Mutex::new(DhcpServer::over(Box::new(store), &lan, &dns)));
        let reader = LeaseReader::new(place.path().to_owned(), clock);
        let source = LeaseSource::new(Arc::clone(&dhcp), Some(reader));
        let held = dhcp.lock().unwrap();
        for _ in 0..2 {
            let read = async { timeout(Duration::from_secs(20), source.read(Instant::ZERO)).await };
            let leases = runtime.block_on(read).expect("nobody is waited for").unwrap();
            assert_eq!(leases.len(), 1);
            assert_eq!((leases[0].ip, leases[0].mac), (offer.ip, client.mac));
            assert!(leases[0].is_active(Instant::ZERO));
        }
        drop(held);
        let nowhere = LeaseReader::new(place.path().join("nowhere"), Arc::new(SystemClock::new().unwrap()));
        let source = LeaseSource::new(dhcp, Some(nowhere));
        assert!(runtime.block_on(source.read(Instant::ZERO)).is_err());
    }
}
