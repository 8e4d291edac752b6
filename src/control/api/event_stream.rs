//! `/v1/events`: what happens, as server-sent events, until the client leaves.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Sse;
use axum::response::sse::{Event as SentEvent, KeepAlive};
use futures_util::stream::{self, Stream, StreamExt as _};
use serde::Deserialize;

use super::error::ErrorBody;
use super::{ApiError, Shared};
use crate::control::events::Event;
use crate::requests::Request;

/// Silence after which a comment is sent, so that a client that is gone, or does not read, is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What a client wants to hear of.
#[derive(Clone, Copy, Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(super) struct Wanted {
    /// Each flow that begins or ends, too.
    #[serde(default)]
    flows: bool,
}

/// What happens, as server-sent events, until the client leaves
#[utoipa::path(
    get,
    path = "/v1/events",
    params(Wanted),
    responses(
        (status = 200, description = "One event for each thing that happens: its name, and its data as a JSON object", content_type = "text/event-stream", body = String),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 503, description = "A worker does not answer, or 24 clients listen already", body = ErrorBody),
    )
)]
pub(super) async fn get(
    State(api): Shared,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Sse<impl Stream<Item = Result<SentEvent, Infallible>>>, ApiError> {
    let Query(Wanted { flows }) = wanted?;
    let place = api.streams.take()?;
    let listener = api.events.listener(flows);
    if flows {
        // Workers note flows from their next turn on: this is one.
        api.ask_all(Request::Report).await?;
    }
    let first = stream::once(async { Ok(sent(&Event::Listening)) });
    let news = stream::unfold((listener, place), |(mut listener, place)| async move {
        let event = listener.next().await?;
        Some((Ok(sent(&event)), (listener, place)))
    });
    Ok(Sse::new(first.chain(news)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// An event with its name, and itself as JSON, which has no line break.
fn sent(event: &Event) -> SentEvent {
    SentEvent::default().event(event.name()).data(serde_json::to_string(event).unwrap_or_default())
}
