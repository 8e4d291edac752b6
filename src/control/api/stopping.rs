//! `/v1/stop` and `/v1/drain`: the process's end, at once or once its flows have ended.

use std::sync::{Arc, Mutex, PoisonError};
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
use crate::requests::{Request, WorkerReport};

/// How often a draining process looks whether flows are left.
const LOOK: Duration = Duration::from_millis(200);
/// Looks in a row without flows that end it: one may be on its way from one worker to another.
const EMPTY_LOOKS: u32 = 2;
/// The longest time a process may be asked to drain.
const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

/// The process's end, asked for by a client.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    inner: Arc<(Notify, Mutex<Option<Instant>>)>,
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
        self.deadline().is_some()
    }

    /// When a process that drains ends at the latest.
    fn deadline(&self) -> Option<Instant> {
        *self.inner.1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drains until `deadline` at the latest. Of several the earliest counts: who asks for an end soon gets it, and who
    /// asked for it is not put off by others. Whether this is the first.
    fn drain_until(&self, deadline: Instant) -> bool {
        let mut known = self.inner.1.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = known.is_none();
        *known = Some(known.map_or(deadline, |known| known.min(deadline)));
        is_first
    }
}

/// How a process is to drain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Seconds after which it ends whatever flows are left. If it drains already, the shorter time counts.
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
    tracing::info!(timeout_seconds, "no flow may begin any more; ending with the last");
    if api.stop.drain_until(Instant::now() + timeout) {
        tokio::spawn(end_with_flows(Arc::clone(&api)));
    }
    // A worker that is late does it once it looks.
    api.ask_all(Request::Drain).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Ends the process once no flow is left, or its time is over.
async fn end_with_flows(api: Arc<Api>) {
    let left = || {
        let api = Arc::clone(&api);
        // A worker that is late may have some.
        async move { api.ask_all(Request::Report).await.ok().map(|reports| flows_of(&reports)) }
    };
    let flows_left = drained(&api.stop, left).await;
    tracing::info!(flows_left, "drained");
    api.stop.ask();
}

fn flows_of(reports: &[WorkerReport]) -> u64 {
    reports.iter().map(|report| report.flows).sum()
}

/// Returns once no flow is `left`, or at the deadline of `stop`: how many there are, if it is known.
async fn drained<F: Future<Output = Option<u64>>>(stop: &Stop, mut left: impl FnMut() -> F) -> Option<u64> {
    let mut empty_looks = 0;
    loop {
        sleep(LOOK).await;
        let left = left().await;
        empty_looks = if left == Some(0) { empty_looks + 1 } else { 0 };
        let is_over = stop.deadline().is_none_or(|deadline| Instant::now() >= deadline);
        if empty_looks >= EMPTY_LOOKS || is_over {
            return left;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn of_several_deadlines_the_earliest_counts_whoever_asked_first() {
        let stop = Stop::default();
        assert!(!stop.is_draining());
        let begun = Instant::now();
        assert!(stop.drain_until(begun + Duration::from_secs(3600)), "the first");
        assert!(!stop.drain_until(begun + 2 * LOOK));
        assert!(!stop.drain_until(begun + Duration::from_secs(7200)));
        let ends = tokio::time::timeout(Duration::from_secs(60), drained(&stop, || ready(Some(1))));
        assert_eq!(ends.await, Ok(Some(1)), "with a flow left, and in time");
        assert!(stop.is_draining() && begun.elapsed() >= 2 * LOOK);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_flow_on_its_way_between_two_looks_is_waited_for() {
        let stop = Stop::default();
        stop.drain_until(Instant::now() + Duration::from_secs(3600));
        let mut looks = [0, 2, 0, 0, 9].into_iter();
        assert_eq!(drained(&stop, || ready(looks.next())).await, Some(0));
        assert_eq!(looks.next(), Some(9), "two in a row without flows");
    }
}
