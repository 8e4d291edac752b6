//! `/v1/capture`: what crosses the guest's device, as pcapng, to a file of this host or to the client.

use std::convert::Infallible;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, Shared};
use crate::capture::filter::Protocol;
use crate::capture::{BYTES_MIN, Filter, OpenError, SNAPLEN_MIN, Settings};
use crate::control::capture::{CaptureError, CaptureState, Reason, Target};
use crate::limits::{CAPTURE_STREAM_PIECES, FRAME_BYTES_MAX};

/// The longest time a capture may be asked to take.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// What of the frames a client wants.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Bytes of each frame that are kept, at most; all if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snaplen: Option<usize>,
    /// Bytes after which the capture ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// Seconds after which it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration_seconds: Option<f64>,
    /// Only frames of this protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Only frames from or to this address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    #[param(value_type = Option<String>)]
    pub host: Option<IpAddr>,
    /// Only frames from or to this port of TCP or UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// A capture to a file of the host vunet runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewCapture {
    /// An absolute path: of a file to be made (mode 0600), of an earlier capture, which is overwritten, or of a FIFO.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// What of the frames is wanted; all of all if it is not given.
    #[serde(default)]
    pub wanted: Wanted,
}

/// The capture that runs, or the last one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CaptureStatus {
    /// `none` since the start, `running`, `waiting` (for the reader of a FIFO) or `ended`.
    pub state: String,
    /// A path, or `client`.
    pub to: Option<String>,
    /// Why it ended: `stopped`, `max_bytes`, `duration`, `reader_left`, `write_failed` or `process_ends`.
    pub ended: Option<String>,
    /// What went wrong, with `write_failed`.
    pub error: Option<String>,
    /// Frames in it.
    pub frames: u64,
    /// Bytes of it.
    pub bytes: u64,
    /// Frames that are not in it because it was written too slowly.
    pub lost_frames: u64,
    /// Seconds it took, or has taken.
    pub seconds: f64,
    /// What was wanted.
    pub wanted: Wanted,
}

impl Wanted {
    fn settings(&self) -> Result<Settings, ApiError> {
        let most = 4 * FRAME_BYTES_MAX;
        let snaplen = self.snaplen.unwrap_or(FRAME_BYTES_MAX);
        if !(SNAPLEN_MIN..=most).contains(&snaplen) {
            return Err(ApiError::bad_value(format!("snaplen={snaplen}: {SNAPLEN_MIN} to {most}")));
        }
        if let Some(bytes) = self.max_bytes.filter(|bytes| *bytes < BYTES_MIN) {
            return Err(ApiError::bad_value(format!("max_bytes={bytes}: at least {BYTES_MIN}")));
        }
        let duration = self.duration_seconds.map(|seconds| {
            let duration = Duration::try_from_secs_f64(seconds).ok();
            duration.filter(|duration| !duration.is_zero() && *duration <= DURATION_MAX).ok_or_else(|| {
                let longest = DURATION_MAX.as_secs();
                ApiError::bad_value(format!("duration_seconds={seconds}: more than 0, up to {longest}"))
            })
        });
        Ok(Settings {
            snaplen: snaplen.min(FRAME_BYTES_MAX),
            bytes_max: self.max_bytes,
            duration: duration.transpose()?,
            filter: Filter { protocol: self.protocol, host: self.host, port: self.port },
        })
    }
}

impl From<&Settings> for Wanted {
    fn from(settings: &Settings) -> Wanted {
        let Settings { snaplen, bytes_max, duration, filter } = settings;
        Wanted {
            snaplen: Some(*snaplen),
            max_bytes: *bytes_max,
            duration_seconds: duration.map(|duration| duration.as_secs_f64()),
            protocol: filter.protocol,
            host: filter.host,
            port: filter.port,
        }
    }
}

impl From<CaptureState> for CaptureStatus {
    fn from(state: CaptureState) -> CaptureStatus {
        let word = match state.ended {
            Some(_) => "ended",
            None if state.awaits_reader => "waiting",
            None => "running",
        };
        CaptureStatus {
            state: word.to_owned(),
            wanted: (&state.settings).into(),
            to: Some(state.to),
            ended: state.ended.map(|reason| reason.name().to_owned()),
            error: state.error,
            frames: state.totals.frames,
            bytes: state.totals.bytes,
            lost_frames: state.totals.lost,
            seconds: state.took.as_secs_f64(),
        }
    }
}

impl From<CaptureError> for ApiError {
    fn from(error: CaptureError) -> ApiError {
        let message = error.to_string();
        let (status, code) = match error {
            CaptureError::Running(_) => (StatusCode::CONFLICT, "running"),
            CaptureError::Open(OpenError::InUse(_)) => (StatusCode::CONFLICT, "in_use"),
            CaptureError::Open(OpenError::NotACapture(_)) => (StatusCode::CONFLICT, "not_a_capture"),
            CaptureError::Open(_) => (StatusCode::BAD_REQUEST, "bad_value"),
            CaptureError::Thread(_) => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
            CaptureError::NoAnswer(no_answer) => return no_answer.into(),
        };
        ApiError::new(status, code, message)
    }
}

/// The capture that runs, or the last one
#[utoipa::path(get, path = "/v1/capture", responses((status = 200, body = CaptureStatus)))]
pub(super) async fn get(State(api): Shared) -> Json<CaptureStatus> {
    let none = || CaptureStatus { state: "none".to_owned(), ..CaptureStatus::default() };
    Json(api.captures.state().map_or_else(none, CaptureStatus::from))
}

/// Begins a capture to a file; there is one capture at a time
#[utoipa::path(
    post,
    path = "/v1/capture",
    request_body = NewCapture,
    responses(
        (status = 201, description = "What crosses the guest's device is captured from now on", body = CaptureStatus),
        (status = 400, description = "A value is wrong, or the file cannot be written", body = ErrorBody),
        (status = 409, description = "A capture runs, or the file is another's or no capture", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "The body is not this object", body = ErrorBody),
        (status = 500, description = "No thread can be had", body = ErrorBody),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn start(
    State(api): Shared,
    body: Result<Json<NewCapture>, JsonRejection>,
) -> Result<(StatusCode, Json<CaptureStatus>), ApiError> {
    let Json(NewCapture { path, wanted }) = body?;
    let settings = wanted.settings()?;
    if !path.is_absolute() {
        let message = format!("path={}: give an absolute one", path.display());
        return Err(ApiError::bad_value(message));
    }
    // Carried out to its end even if the client goes: one that is half begun would be nobody's to stop.
    let captures = api.captures.clone();
    let started = tokio::spawn(async move { captures.start(Target::Path(path), settings).await }).await;
    let state = started.map_err(|_| failed())??;
    Ok((StatusCode::CREATED, Json(state.into())))
}

/// A task of ours that ended by itself.
fn failed() -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "it failed; the log may say why")
}

/// Ends the capture that runs, all that was captured by now written
#[utoipa::path(
    delete,
    path = "/v1/capture",
    responses(
        (status = 200, description = "Ended", body = CaptureStatus),
        (status = 404, description = "None runs", body = ErrorBody),
    )
)]
pub(super) async fn stop(State(api): Shared) -> Result<Json<CaptureStatus>, ApiError> {
    let state = api.captures.stop(Reason::Stopped).await;
    state.map(|state| Json(state.into())).ok_or_else(|| ApiError::not_found("no capture runs"))
}

/// A capture as it is made, until the client leaves or the capture is ended; there is one capture at a time. A client
/// that reads too slowly loses frames of it
#[utoipa::path(
    get,
    path = "/v1/capture/stream",
    params(Wanted),
    responses(
        (status = 200, description = "pcapng", content_type = "application/x-pcapng", body = Vec<u8>),
        (status = 400, description = "A value is wrong", body = ErrorBody),
        (status = 409, description = "A capture runs", body = ErrorBody),
        (status = 500, description = "No thread can be had", body = ErrorBody),
        (status = 503, description = "A worker does not answer", body = ErrorBody),
    )
)]
pub(super) async fn stream(
    State(api): Shared,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Response, ApiError> {
    let settings = wanted?.0.settings()?;
    let (client, mut pieces) = mpsc::channel::<Vec<u8>>(CAPTURE_STREAM_PIECES);
    let captures = api.captures.clone();
    let started = tokio::spawn(async move { captures.start(Target::Client(client), settings).await }).await;
    started.map_err(|_| failed())??;
    let pieces =
        stream::poll_fn(move |context| pieces.poll_recv(context).map(|piece| piece.map(Ok::<_, Infallible>)));
    Ok(([(CONTENT_TYPE, "application/x-pcapng")], Body::from_stream(pieces)).into_response())
}
