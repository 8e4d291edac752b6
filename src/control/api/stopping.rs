//! `/v1/stop` and `/v1/drain`: the process's end, at once or once its flows have ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{Api, ApiError, Shared};
use crate::requests::Request;

/// How often a draining process looks whether flows are left.
const LOOK: Duration = Duration::from_millis(200);
/// Looks in a row without flows that end it: one may be on its way from one worker to another.
const EMPTY_LOOKS: u32 = 2;
/// The longest time a process may be asked to drain.
const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

/// The process's end, asked for by a client.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    inner: Arc<(Notify, AtomicBool)>,
}

impl Stop {
    /// Returns once a client has asked for the end.
    pub async fn asked(&self) {
        self.inner.0.notified().await;
    }

    fn ask(&self) {
        self.inner.0.notify_one();
    }

    /// Whether no flow may begin any more.
    pub fn is_draining(&self) -> bool {
        self.inner.1.load(Ordering::Acquire)
    }
}

/// How a process is to drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Seconds after which it ends whatever flows are left.
    #[serde(default = "default_timeout_seconds")]
    pub timeout_seconds: f64,
}

fn default_timeout_seconds() -> f64 {
    60.0
}

/// Ends the process
#[utoipa::path(
    post,
    path = "/v1/stop",
    responses(
        (status = 202, description = "It ends"),
    )
)]
pub(super) async fn stop(State(api): Shared) -> StatusCode {
    tracing::info!("a client of the control API asked for the end");
    // The answer leaves first: what ends then is the process.
    let stop = api.stop.clone();
    tokio::spawn(async move {
        sleep(LOOK / 2).await;
        stop.ask();
    });
    StatusCode::ACCEPTED
}

/// Lets no flow begin any more, and ends the process with the last
#[utoipa::path(
    post,
    path = "/v1/drain",
    request_body = Drain,
    responses(
        (status = 202, description = "It drains"),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 409, description = "The guest's connections are not this process's", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "The body is not this object", body = ErrorBody),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn drain(
    State(api): Shared,
    body: Result<Json<Drain>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(Drain { timeout_seconds }) = body?;
    let timeout = Duration::try_from_secs_f64(timeout_seconds).ok().filter(|time| *time <= DRAIN_MAX);
    let Some(timeout) = timeout else {
        let longest = DRAIN_MAX.as_secs();
        return Err(ApiError::bad_value(format!("timeout_seconds={timeout_seconds}: 0 to {longest}")));
    };
    if matches!(api.facts.nat.as_deref(), Some("kernel" | "holder")) || api.facts.mode == "bridge" {
        let message = "the guest's connections are not this process's, so that it cannot tell when they have ended: use /v1/stop";
        return Err(ApiError::new(StatusCode::CONFLICT, "not_here", message));
    }
    if !api.stop.inner.1.swap(true, Ordering::AcqRel) {
        tracing::info!(timeout_seconds, "no flow may begin any more; ending with the last");
        tokio::spawn(end_with_flows(Arc::clone(&api), Instant::now() + timeout));
    }
    // A worker that is late does it once it looks.
    api.ask_all(Request::Drain).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Ends the process once no flow is left, or at `deadline`.
async fn end_with_flows(api: Arc<Api>, deadline: Instant) {
    let mut empty_looks = 0;
    loop {
        sleep(LOOK).await;
        // A worker that is late may have some.
        let left = match api.ask_all(Request::Report).await {
            Ok(reports) => Some(reports.iter().map(|report| report.flows).sum::<u64>()),
            Err(_) => None,
        };
        empty_looks = if left == Some(0) { empty_looks + 1 } else { 0 };
        if empty_looks >= EMPTY_LOOKS || Instant::now() >= deadline {
            tracing::info!(flows_left = left, "drained");
            return api.stop.ask();
        }
    }
}
