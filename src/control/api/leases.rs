//! `/v1/leases`: which addresses DHCP gave.

use std::net::Ipv4Addr;
use std::sync::PoisonError;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{Api, ApiError, Shared};
use crate::network::allocator::Lease;
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
    let leases = api.dhcp.lock().unwrap_or_else(PoisonError::into_inner).leases(now);
    let leases = leases.map_err(|error| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_store", format!("the network's leases: {error}"))
    })?;
    Ok(Json(Leases { leases: leases.iter().map(|lease| LeaseStatus::of(lease, now)).collect() }))
}

impl Api {
    /// The guest's address as DHCP gave it, ours or a holder's.
    pub(super) fn guest_address(&self) -> Option<Ipv4Addr> {
        *self.guest.borrow()
    }
}
