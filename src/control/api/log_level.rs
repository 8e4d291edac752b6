//! `/v1/log-level`: how much is logged.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Shared};

/// How much is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`, or `MODULE=LEVEL`, joined by commas.
    pub level: String,
}

/// How much is logged
#[utoipa::path(
    get,
    path = "/v1/log-level",
    responses(
        (status = 200, body = LogLevel),
    )
)]
pub(super) async fn get(State(api): Shared) -> Json<LogLevel> {
    Json(LogLevel { level: api.log.level() })
}

/// Sets how much is logged
#[utoipa::path(
    put,
    path = "/v1/log-level",
    request_body = LogLevel,
    responses(
        (status = 200, body = LogLevel),
        (status = 400, description = "It is no level", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "The body is not this object", body = ErrorBody),
    )
)]
pub(super) async fn put(
    State(api): Shared,
    body: Result<Json<LogLevel>, JsonRejection>,
) -> Result<Json<LogLevel>, ApiError> {
    let Json(LogLevel { level }) = body?;
    api.log.set_level(&level).map_err(|error| ApiError::bad_value(error.to_string()))?;
    tracing::info!(level, "the log's level was set");
    Ok(Json(LogLevel { level: api.log.level() }))
}
