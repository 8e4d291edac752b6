//! `/v1/counters`: what was counted since the start, all workers together.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Shared};
use crate::engine::counters::{Counters, Limited};
use crate::requests::Request;

/// What was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CountersAnswer {
    /// Frames taken from the guest.
    pub frames_from_guest: u64,
    /// Frames placed in the guest's receive buffers.
    pub frames_to_guest: u64,
    /// Payload bytes moved from the guest into sockets; of frames that leave by a link, all bytes.
    pub payload_from_guest_bytes: u64,
    /// Payload bytes moved from sockets to the guest; of frames that come by a link, all bytes.
    pub payload_to_guest_bytes: u64,
    /// Flows begun.
    pub flows_opened: u64,
    /// Flows ended to make room for others.
    pub flows_evicted: u64,
    /// TCP flows ended because the address they came from is the host's no more.
    pub flows_stranded: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// What the rate limit of what the guest sends did.
    pub limited_from_guest: LimitedCounters,
    /// What the rate limit of what it is sent did.
    pub limited_to_guest: LimitedCounters,
    /// Frames, segments and datagrams dropped, by reason; reasons that did not occur are not there.
    pub drops: BTreeMap<String, u64>,
}

/// What a rate limit did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LimitedCounters {
    /// Times a flow, a socket, a queue or clients of a published port had to wait.
    pub waits: u64,
    /// Packets that could not wait, dropped.
    pub dropped_packets: u64,
    /// Their bytes, of Ethernet frames.
    pub dropped_bytes: u64,
    /// New flows that were not let begin.
    pub refused_flows: u64,
}

impl From<Limited> for LimitedCounters {
    fn from(limited: Limited) -> LimitedCounters {
        let Limited { waits, dropped_packets, dropped_bytes, refused_flows } = limited;
        LimitedCounters { waits, dropped_packets, dropped_bytes, refused_flows }
    }
}

/// What was counted since the start, all workers together
#[utoipa::path(
    get,
    path = "/v1/counters",
    responses(
        (status = 200, body = CountersAnswer),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn get(State(api): Shared) -> Result<Json<CountersAnswer>, ApiError> {
    let mut total = Counters::default();
    for report in api.ask_all(Request::Report).await? {
        total.add(&report.counters);
    }
    Ok(Json(CountersAnswer {
        frames_from_guest: total.frames_from_guest,
        frames_to_guest: total.frames_to_guest,
        payload_from_guest_bytes: total.payload_from_guest_bytes,
        payload_to_guest_bytes: total.payload_to_guest_bytes,
        flows_opened: total.flows_opened,
        flows_evicted: total.flows_evicted,
        flows_stranded: total.flows_stranded,
        retransmits: total.retransmits,
        limited_from_guest: total.limited_from_guest.into(),
        limited_to_guest: total.limited_to_guest.into(),
        drops: total
            .drops()
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect(),
    }))
}
