//! `/v1/dns`: local names, and what became of all others.

use std::net::IpAddr;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;

/// Names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Names {
    /// Local names and their addresses, by name.
    pub records: Vec<NameRecord>,
    /// What became of names that are not local.
    pub forwarded: Forwarded,
}

/// A local name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct NameRecord {
    /// It.
    pub name: String,
    /// An address of it.
    #[schema(value_type = String)]
    pub address: IpAddr,
}

/// What became of names that are not local, counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Forwarded {
    /// Queries taken to be forwarded.
    pub queries: u64,
    /// Answered from the cache.
    pub cached: u64,
    /// Waited for the answer to another that asked the same.
    pub joined: u64,
    /// Questions an upstream answered.
    pub answered: u64,
    /// Questions no upstream answered.
    pub failed: u64,
    /// Queries beyond the bound on those outstanding.
    pub over_bound: u64,
    /// Tries that ran out of time.
    pub timeouts: u64,
    /// Tries the host's network refused.
    pub errors: u64,
}

/// Local names, and what became of all others
#[utoipa::path(
    get,
    path = "/v1/dns",
    responses(
        (status = 200, body = Names),
    )
)]
pub(super) async fn get(State(api): Shared) -> Json<Names> {
    let records = api.dns.records().into_iter().map(|(name, address)| NameRecord { name, address });
    let mut records: Vec<NameRecord> = records.collect();
    records.sort();
    let stats = api.resolver.stats();
    Json(Names {
        records,
        forwarded: Forwarded {
            queries: stats.queries,
            cached: stats.cached,
            joined: stats.joined,
            answered: stats.answered,
            failed: stats.failed,
            over_bound: stats.over_bound,
            timeouts: stats.timeouts,
            errors: stats.errors,
        },
    })
}
