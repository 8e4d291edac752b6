//! The control API: HTTP and JSON on the unix socket of `--control`.
//!
//! `server` meets clients and bounds what they may send; each resource has a file of its own, which holds its
//! answers as types. `docs/openapi.json` describes all of it, and `vunet ctl` is its client.
//!
//! A resource that asks workers waits for them a second at most and answers 503 if one hangs.
//!
//! May touch: `requests`, what the control thread shares with workers (DHCP, names, the log), `config`.

pub mod counters;
pub mod error;
mod event_stream;
mod facts;
pub mod flows;
pub mod leases;
pub mod log_level;
pub mod names;
mod server;
pub mod status;
pub mod stopping;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{delete, get, post};
use futures_util::future::try_join_all;

pub use self::error::ApiError;
pub use self::facts::Facts;
pub use self::server::{listen, serve};
pub use self::stopping::Stop;

use crate::control::dns_forward::Resolver;
use crate::control::events::Events;
use crate::engine::gateway::SharedDhcp;
use crate::log::Log;
use crate::requests::{Answer, Request, WorkerHandle};
use crate::service::dns::DnsService;
use crate::time::Clock;

/// Bytes of a request's body, at most.
const BODY_BYTES_MAX: usize = 64 << 10;

/// All that resources answer from.
#[derive(Debug)]
pub struct Api {
    /// What was configured.
    pub facts: Facts,
    /// The workers, in their order.
    pub workers: Vec<WorkerHandle>,
    /// The process's leases.
    pub dhcp: SharedDhcp,
    /// Local names.
    pub dns: Arc<DnsService>,
    /// Asks upstream resolvers.
    pub resolver: Arc<Resolver>,
    /// What happens.
    pub events: Events,
    /// The log.
    pub log: Log,
    /// Ends the process.
    pub stop: Stop,
    /// The workers' clock.
    pub clock: Clock,
}

/// What a handler gets of it.
type Shared = axum::extract::State<Arc<Api>>;

impl Api {
    /// Asks all workers.
    async fn ask_all<T>(&self, request: impl Fn(Answer<T>) -> Request) -> Result<Vec<T>, ApiError> {
        Ok(try_join_all(self.workers.iter().map(|worker| worker.ask(&request))).await?)
    }
}

/// The resources.
pub fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/status", get(status::get))
        .route("/v1/counters", get(counters::get))
        .route("/v1/flows", get(flows::list))
        .route("/v1/flows/{id}", delete(flows::end))
        .route("/v1/leases", get(leases::get))
        .route("/v1/dns", get(names::get))
        .route("/v1/log-level", get(log_level::get).put(log_level::put))
        .route("/v1/events", get(event_stream::get))
        .route("/v1/drain", post(stopping::drain))
        .route("/v1/stop", post(stopping::stop))
        .fallback(error::no_resource)
        .method_not_allowed_fallback(error::no_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::from_fn(server::in_time))
        .with_state(api)
}
