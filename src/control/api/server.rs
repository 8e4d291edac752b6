//! Clients of the control socket: who may, how many, how long.
//!
//! Only the user this process belongs to, and root, are served. So many connections at once have a place,
//! further ones wait; each request's head, all of it until its answer begins, and the reading of the answer have their
//! time. The last places are for one request each, and for no stream of events, so that a person comes through beside
//! programs that hold connections.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::punctual::Punctual;
use super::{Api, ApiError, metrics_router, router};
use crate::socket_file::{self, AskedPath, SocketFile, SocketFileError};

/// Connections served at once; others wait in the listener's queue ...
const CLIENTS_MAX: usize = 32;
/// Of them, those for one request each, whose client must send it soon.
const CLIENTS_SHORT: usize = 8;
/// Streams of events at once: they last, and leave the rest to others.
const STREAMS_MAX: usize = CLIENTS_MAX - CLIENTS_SHORT;
/// ... which has as many places.
const BACKLOG: i32 = 32;
/// How long a request's head may take, and the silence before it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The same of a client that has one of the last places.
const HEAD_TIMEOUT_SHORT: Duration = Duration::from_secs(2);
/// How long a client may leave unread what does not fit into its socket's buffer.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of that buffer, of which the kernel makes twice as many and counts its own needs: some twenty events.
const SEND_BUFFER_BYTES: usize = 8 << 10;
/// How long a request may take until its answer begins.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long anybody may have a connection for metrics: who does not read would have it for ever.
const METRICS_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a request's head, at most.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Header fields of a request, at most.
const HEADERS_MAX: usize = 64;
/// Rest after a client could not be taken for want of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(200);

/// Listens at `--control`'s path, for the owner alone.
///
/// # Errors
/// [`SocketFileError`].
pub fn listen(path: &Path) -> Result<(std::os::unix::net::UnixListener, SocketFile), SocketFileError> {
    let listening = socket_file::bind(AskedPath { flag: "--control", path }, BACKLOG)?;
    tracing::info!(path = %path.display(), "control API");
    Ok(listening)
}

/// Listens at `--metrics`' address, for whoever may connect.
///
/// # Errors
/// The kernel's refusal.
pub fn listen_for_metrics(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "metrics");
    Ok(listener)
}

/// Serves clients of the control socket until the runtime ends.
///
/// # Errors
/// The listener cannot be watched.
pub async fn serve(listener: std::os::unix::net::UnixListener, api: Arc<Api>) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let router = router(api);
    let short = router.clone().layer(axum::middleware::map_response(ends_the_connection));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) if may_control(&stream) => {
                bound_buffer(&stream);
                let is_short = places.available_permits() < CLIENTS_SHORT;
                let (router, head) =
                    if is_short { (&short, HEAD_TIMEOUT_SHORT) } else { (&router, HEAD_TIMEOUT) };
                serve_client(stream, router.clone(), place, Times { head, all: Duration::MAX });
            }
            Ok(_) => {}
            Err(error) => rest(&error).await,
        }
    }
}

/// Has an unread answer noticed by how little of it the kernel holds. Without, it takes 200 KiB.
fn bound_buffer(stream: &UnixStream) {
    if let Err(error) = SockRef::from(stream).set_send_buffer_size(SEND_BUFFER_BYTES) {
        tracing::debug!(%error, "the buffer of a client of the control API");
    }
}

/// For the last places: the answer is the last of its connection.
async fn ends_the_connection(mut answer: Response) -> Response {
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Places for streams of events, of all clients together.
#[derive(Clone, Debug)]
pub struct StreamPlaces(Arc<Semaphore>);

impl Default for StreamPlaces {
    fn default() -> StreamPlaces {
        StreamPlaces(Arc::new(Semaphore::new(STREAMS_MAX)))
    }
}

impl StreamPlaces {
    /// A place, as long as it is kept.
    ///
    /// # Errors
    /// All are taken.
    pub(super) fn take(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let taken = Arc::clone(&self.0).try_acquire_owned();
        taken.map_err(|_| {
            let message = format!("{STREAMS_MAX} clients listen to events, which is as many as can");
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_streams", message)
        })
    }
}

/// Serves clients that want metrics, and nothing else, until the runtime ends.
///
/// # Errors
/// The listener cannot be watched.
pub async fn serve_metrics(listener: std::net::TcpListener, api: Arc<Api>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let router = metrics_router(api);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, _)) => {
                serve_client(
                    stream,
                    router.clone(),
                    place,
                    Times { head: HEAD_TIMEOUT, all: METRICS_TIMEOUT },
                );
            }
            Err(error) => rest(&error).await,
        }
    }
}

/// A client could not be taken, for want of descriptors say.
async fn rest(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a client of the control API; trying again");
    tokio::time::sleep(ACCEPT_RETRY).await;
}

/// What a client may take.
#[derive(Clone, Copy, Debug)]
struct Times {
    /// For the head of each request.
    head: Duration,
    /// For everything.
    all: Duration,
}

/// Serves one client, which has its `place` until it leaves or its time is over.
fn serve_client(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    place: OwnedSemaphorePermit,
    times: Times,
) {
    let stream = Punctual::new(stream, UNREAD_TIMEOUT);
    tokio::spawn(async move {
        let _place = place;
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(times.head)
            .max_buf_size(HEAD_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        match tokio::time::timeout(times.all, serving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "a client of the control API left"),
            Err(_) => tracing::debug!("a client's time is over"),
        }
    });
}

/// Whether a client is this process's user, or root.
fn may_control(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == own || peer.uid() == 0 => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "--control: a client of another user was refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "--control: a client whose user cannot be known was refused");
            false
        }
    }
}

/// Gives up on a request that takes too long: a body that does not come.
pub(super) async fn in_time(request: Request, next: Next) -> Result<Response, ApiError> {
    let answered = tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await;
    answered.map_err(|_| {
        ApiError::new(StatusCode::REQUEST_TIMEOUT, "too_slow", "the request did not come in time")
    })
}
