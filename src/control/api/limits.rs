//! `/v1/limits`: how much the guest may send and be sent.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Shared};
use crate::config::limit::Amount;
use crate::config::{LimitSpec, LimitsConfig};

/// The limits of both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limits {
    /// Of what the guest sends.
    pub from_guest: DirectionLimits,
    /// Of what it is sent.
    pub to_guest: DirectionLimits,
}

/// The limits of one direction; what is not limited is null.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DirectionLimits {
    /// All of it as `--limit-from-guest` takes it; `none` for no limit.
    pub limit: String,
    /// Bytes of Ethernet frames a second.
    pub rate_bytes_per_second: Option<u64>,
    /// Bytes that pass at once after a pause.
    pub burst_bytes: Option<u64>,
    /// Packets a second.
    pub packets_per_second: Option<u64>,
    /// Packets that pass at once after a pause.
    pub packets_burst: Option<u64>,
    /// New flows a second.
    pub flows_per_second: Option<u64>,
    /// New flows that may begin at once after a pause.
    pub flows_burst: Option<u64>,
}

/// What is to be limited from now on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewLimits {
    /// As `--limit-from-guest` takes it; stays as it is if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_guest: Option<String>,
    /// As `--limit-to-guest` takes it; stays as it is if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_guest: Option<String>,
}

impl From<LimitSpec> for DirectionLimits {
    fn from(spec: LimitSpec) -> DirectionLimits {
        let per_second = |amount: Option<Amount>| amount.map(|amount| amount.per_second.get());
        let burst = |amount: Option<Amount>| amount.map(|amount| amount.burst.get());
        DirectionLimits {
            limit: spec.to_string(),
            rate_bytes_per_second: per_second(spec.bytes),
            burst_bytes: burst(spec.bytes),
            packets_per_second: per_second(spec.packets),
            packets_burst: burst(spec.packets),
            flows_per_second: per_second(spec.flows),
            flows_burst: burst(spec.flows),
        }
    }
}

impl From<LimitsConfig> for Limits {
    fn from(LimitsConfig { from_guest, to_guest }: LimitsConfig) -> Limits {
        Limits { from_guest: from_guest.into(), to_guest: to_guest.into() }
    }
}

/// How much the guest may send and be sent
#[utoipa::path(
    get,
    path = "/v1/limits",
    responses(
        (status = 200, body = Limits),
    )
)]
pub(super) async fn get(State(api): Shared) -> Json<Limits> {
    Json(api.limits.config().into())
}

/// Limits the guest from now on, all of it or nothing
#[utoipa::path(
    put,
    path = "/v1/limits",
    request_body = NewLimits,
    responses(
        (status = 200, description = "What holds from now on", body = Limits),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 409, description = "Flows cannot be limited here", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "The body is not this object", body = ErrorBody),
    )
)]
pub(super) async fn put(
    State(api): Shared,
    body: Result<Json<NewLimits>, JsonRejection>,
) -> Result<Json<Limits>, ApiError> {
    let Json(NewLimits { from_guest, to_guest }) = body?;
    let read = |name: &str, text: Option<String>| -> Result<Option<LimitSpec>, ApiError> {
        let spec = text.map(|text| text.parse().map_err(|error| (text, error)));
        spec.transpose().map_err(|(text, error)| ApiError::bad_value(format!("{name}={text}: {error}")))
    };
    let (from_guest, to_guest) = (read("from_guest", from_guest)?, read("to_guest", to_guest)?);
    let limits = api.limits.set(from_guest, to_guest);
    let limits =
        limits.map_err(|error| ApiError::new(StatusCode::CONFLICT, "not_here", error.to_string()))?;
    Ok(Json(limits.into()))
}
