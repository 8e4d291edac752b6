//! The control API: HTTP and JSON on the unix socket of `--control`.
//!
//! `server` meets clients and bounds what they may send; each resource has a file of its own, which holds its
//! answers as types. `docs/openapi.json` describes all of it, and `vunet ctl` is its client.
//!
//! A resource that asks workers waits for them a second at most and answers 503 if one hangs.
//!
//! May touch: `requests`, what the control thread shares with workers (DHCP, names, the log), `config`.

pub mod capture;
pub mod counters;
pub mod error;
mod event_stream;
mod facts;
pub mod flows;
pub mod leases;
pub mod limits;
pub mod log_level;
mod metrics;
pub mod names;
pub mod ports;
mod punctual;
mod server;
pub mod status;
pub mod stopping;

use std::net::Ipv4Addr;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::get;
use futures_util::future::try_join_all;
use tokio::sync::watch;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use self::error::ApiError;
pub use self::facts::Facts;
use self::leases::LeaseSource;
pub use self::server::{StreamPlaces, listen, listen_for_metrics, serve, serve_metrics};
pub use self::stopping::Stop;

use crate::control::capture::Captures;
use crate::control::dns_forward::Resolver;
use crate::control::events::Events;
use crate::control::limits::LiveLimits;
use crate::control::ports::Ports;
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
    /// The process's leases, or its named network's.
    pub leases: LeaseSource,
    /// The guest's address as DHCP gives it.
    pub guest: watch::Receiver<Option<Ipv4Addr>>,
    /// Local names.
    pub dns: Arc<DnsService>,
    /// Asks upstream resolvers.
    pub resolver: Arc<Resolver>,
    /// Published ports.
    pub ports: Ports,
    /// Captures.
    pub captures: Captures,
    /// How much the guest may send and be sent.
    pub limits: LiveLimits,
    /// What happens.
    pub events: Events,
    /// Places for those who listen to it.
    pub streams: StreamPlaces,
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

/// The API's description (OpenAPI 3.1), as `docs/openapi.json` has it.
pub fn description() -> OpenApi {
    let info = InfoBuilder::new()
        .title("vunet control API")
        .version("1")
        .description(Some(
            "HTTP/1.1 on the unix socket of `--control`, for the user the process belongs to and for root. \
             Errors are `{\"error\": {\"code\", \"message\"}}`.",
        ))
        .license(Some(
            LicenseBuilder::new().name("MIT OR Apache-2.0").identifier(Some("MIT OR Apache-2.0")).build(),
        ));
    let mut description = resources().1;
    description.info = info.build();
    description
}

/// Every resource, and its description.
fn resources() -> (Router<Arc<Api>>, OpenApi) {
    OpenApiRouter::new()
        .routes(routes!(status::get))
        .routes(routes!(counters::get))
        .routes(routes!(flows::list))
        .routes(routes!(flows::end))
        .routes(routes!(leases::get))
        .routes(routes!(names::get))
        .routes(routes!(ports::list, ports::add))
        .routes(routes!(ports::remove))
        .routes(routes!(capture::get, capture::start, capture::stop))
        .routes(routes!(capture::stream))
        .routes(routes!(limits::get, limits::put))
        .routes(routes!(log_level::get, log_level::put))
        .routes(routes!(event_stream::get))
        .routes(routes!(metrics::get))
        .routes(routes!(stopping::drain))
        .routes(routes!(stopping::stop))
        .split_for_parts()
}

/// What serves the resources.
pub fn router(api: Arc<Api>) -> Router {
    resources()
        .0
        .fallback(error::no_resource)
        .method_not_allowed_fallback(error::no_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(axum::middleware::from_fn(server::in_time))
        .with_state(api)
}

/// What serves metrics alone.
fn metrics_router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/metrics", get(metrics::get))
        .fallback(error::no_resource)
        .method_not_allowed_fallback(error::no_method)
        .layer(axum::middleware::from_fn(server::in_time))
        .with_state(api)
}
