//! `/v1/flows`: connections and exchanges under way, by pages; and their ends.

use std::net::{IpAddr, SocketAddr};

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Shared};
use crate::engine::flows::{Began, FlowId, FlowProtocol, FlowQuery, FlowView, PAGE_MAX};
use crate::requests::Request;

/// Flows on a page if nobody asks for more or fewer.
const PAGE_DEFAULT: usize = 100;
/// Pages of a worker looked at for one answer: a filter that fits nothing costs no more.
const WALKS_MAX: usize = 16;

/// Which flows.
#[derive(Clone, Debug, Default, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Those of one protocol.
    #[param(inline)]
    protocol: Option<FlowProtocol>,
    /// Those of one address of the guest.
    #[param(value_type = Option<String>)]
    guest: Option<IpAddr>,
    /// Those to one remote address.
    #[param(value_type = Option<String>)]
    remote: Option<IpAddr>,
    /// Those with this port at either end.
    port: Option<u16>,
    /// Flows on a page; 100 if it is not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// Where to go on: `next` of the page before.
    cursor: Option<String>,
}

/// A page of flows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Flows {
    /// They.
    pub flows: Vec<FlowStatus>,
    /// What to give as `cursor` for the next page; none with the last. A page may be empty and not the last.
    pub next: Option<String>,
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FlowStatus {
    /// Its name, to end it by.
    pub id: String,
    /// Protocol.
    pub protocol: FlowProtocol,
    /// The guest's end; of an echo the "port" is the identifier.
    #[schema(value_type = String)]
    pub guest: SocketAddr,
    /// The remote end as the guest sees it.
    #[schema(value_type = String)]
    pub remote: SocketAddr,
    /// The state it is in.
    pub state: String,
    /// `guest` or `world`.
    pub began: Option<String>,
    /// Seconds since anything was carried.
    pub idle_seconds: f64,
    /// Payload carried from the guest since it began, where that is counted: not with packet NAT.
    pub from_guest_bytes: Option<u64>,
    /// The same to the guest.
    pub to_guest_bytes: Option<u64>,
}

impl FlowStatus {
    fn of(worker: usize, flow: &FlowView) -> FlowStatus {
        FlowStatus {
            id: name(worker, flow.id.0),
            protocol: flow.protocol,
            guest: flow.guest,
            remote: flow.remote,
            state: flow.state.to_owned(),
            began: flow.began.map(|began| if began == Began::Guest { "guest" } else { "world" }.to_owned()),
            idle_seconds: flow.idle.as_secs_f64(),
            from_guest_bytes: flow.carried.map(|carried| carried.from_guest_bytes),
            to_guest_bytes: flow.carried.map(|carried| carried.to_guest_bytes),
        }
    }
}

/// A place in all workers' tables, as text.
fn name(worker: usize, place: u64) -> String {
    format!("{worker}-{place:x}")
}

fn parse(text: &str) -> Option<(usize, u64)> {
    let (worker, place) = text.split_once('-')?;
    Some((worker.parse().ok()?, u64::from_str_radix(place, 16).ok()?))
}

/// Connections and exchanges under way, by pages
#[utoipa::path(
    get,
    path = "/v1/flows",
    params(Wanted),
    responses(
        (status = 200, body = Flows),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(api): Shared,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Json<Flows>, ApiError> {
    let Query(wanted) = wanted?;
    let limit = wanted.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ApiError::bad_value(format!("limit={limit}: 1 to {PAGE_MAX}")));
    }
    let start = wanted.cursor.as_deref().map_or(Some((0, 0)), parse);
    let Some((mut worker, mut cursor)) = start else {
        return Err(ApiError::bad_value("cursor: not one of a page's \"next\""));
    };
    let mut flows = Vec::new();
    for _ in 0..WALKS_MAX {
        let Some(handle) = api.workers.get(worker) else { break };
        let query = FlowQuery {
            protocol: wanted.protocol,
            guest: wanted.guest,
            remote: wanted.remote,
            port: wanted.port,
            cursor,
            limit: limit - flows.len(),
        };
        let page = handle.ask(|answer| Request::Flows(query, answer)).await?;
        flows.extend(page.flows.iter().map(|flow| FlowStatus::of(worker, flow)));
        (worker, cursor) = page.next.map_or((worker + 1, 0), |next| (worker, next));
        if flows.len() >= limit {
            break;
        }
    }
    let next = (worker < api.workers.len()).then(|| name(worker, cursor));
    Ok(Json(Flows { flows, next }))
}

/// Ends a flow; both its ends see it, where the protocol can tell
#[utoipa::path(
    delete,
    path = "/v1/flows/{id}",
    params(("id" = String, Path, description = "Its name, as the list has it")),
    responses(
        (status = 204, description = "Ended"),
        (status = 400, description = "The name is not UTF-8", body = ErrorBody),
        (status = 404, description = "There is no such flow", body = ErrorBody),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn end(
    State(api): Shared,
    id: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, ApiError> {
    let Path(id) = id?;
    let no_flow = || ApiError::not_found(format!("no flow {id:?}"));
    let (worker, place) = parse(&id).ok_or_else(no_flow)?;
    let handle = api.workers.get(worker).ok_or_else(no_flow)?;
    match handle.ask(|answer| Request::EndFlow(FlowId(place), answer)).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(no_flow()),
    }
}
