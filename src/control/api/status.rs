//! `/v1/status`: the process, its network, who is attached.

use std::net::Ipv4Addr;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Facts, Shared};
use crate::device::Feature;
use crate::requests::Request;

/// How the process is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Version of vunet.
    pub version: String,
    /// The process's number.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_seconds: f64,
    /// What was configured.
    #[serde(flatten)]
    pub facts: Facts,
    /// Whether a front-end is there.
    pub attached: bool,
    /// Virtio features the driver acknowledged and that count, by the specification's names.
    pub features: Vec<String>,
    /// Virtqueues that run.
    pub rings: Vec<RingStatus>,
    /// The guest's address, once it is known.
    #[schema(value_type = Option<String>, format = Ipv4)]
    pub guest_address: Option<Ipv4Addr>,
    /// Flows of all workers now.
    pub flows: u64,
    /// Whether no flow may begin any more.
    pub draining: bool,
}

/// A virtqueue that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RingStatus {
    /// The worker that serves it.
    pub worker: usize,
    /// Its index: even ones receive (as the guest sees it), odd ones transmit.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Entries the driver made available that are not used yet.
    pub available: u16,
}

/// The process, its network, who is attached
#[utoipa::path(
    get,
    path = "/v1/status",
    responses(
        (status = 200, body = Status),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn get(State(api): Shared) -> Result<Json<Status>, ApiError> {
    let reports = api.ask_all(Request::Report).await?;
    let rings = reports.iter().enumerate().flat_map(|(worker, report)| {
        report.rings.iter().map(move |ring| RingStatus {
            worker,
            index: ring.index,
            size: ring.size,
            available: ring.available,
        })
    });
    let features = reports.first().map(|report| report.features).unwrap_or_default();
    let names = Feature::ALL.iter().filter(|feature| features.has(**feature));
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: api.clock.now().as_micros() as f64 / 1e6,
        facts: api.facts.clone(),
        attached: reports.iter().any(|report| report.attached),
        features: names.map(|feature| feature.name().to_owned()).collect(),
        rings: rings.collect(),
        guest_address: api.guest_address(),
        flows: reports.iter().map(|report| report.flows).sum(),
        draining: api.stop.is_draining(),
    }))
}
