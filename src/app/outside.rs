//! What people and programs outside have to do with the process: signals, the control API, the log.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use tokio::sync::watch;

use super::publishing::Place;

use crate::cli::Reloader;
use crate::control::api::leases::LeaseSource;
use crate::control::api::{self, Api, Facts, Stop, StreamPlaces};
use crate::control::capture::Captures;
use crate::control::dns_forward::Resolver;
use crate::control::events::{Event, Events};
use crate::control::limits::LiveLimits;
use crate::control::ports::Ports;
use crate::control::signals::Signals;
use crate::log::Log;
use crate::requests::WorkerHandle;
use crate::service::dns::DnsService;
use crate::socket_file::SocketFile;
use crate::time::Clock;

/// It, before the process runs.
pub(super) struct Outside {
    pub(super) signals: Signals,
    pub(super) log: Log,
    /// Reads the settings again, where they are in a file.
    pub(super) reloader: Option<Reloader>,
    pub(super) facts: Facts,
    /// The control API's listener, and its file.
    pub(super) control: Option<(UnixListener, SocketFile)>,
    /// The listener for metrics alone.
    pub(super) metrics: Option<TcpListener>,
    /// What `--pcap` writes to.
    pub(super) pcap: Option<crate::capture::Opened>,
    /// Who serves published ports.
    pub(super) place: Place,
}

/// What the control API answers from.
pub(super) struct Inner {
    pub(super) workers: Vec<WorkerHandle>,
    pub(super) leases: LeaseSource,
    pub(super) dns: Arc<DnsService>,
    pub(super) resolver: Arc<Resolver>,
    pub(super) clock: Clock,
    pub(super) limits: LiveLimits,
}

/// What ends or changes the process from now on.
pub(super) struct Opened {
    pub(super) signals: Signals,
    pub(super) stop: Stop,
    pub(super) reloader: Option<Reloader>,
    /// The API's socket, whose file goes with it.
    pub(super) file: Option<SocketFile>,
}

impl Outside {
    /// Serves the control API and metrics from now on, on the runtime this is called on, and tells of the guest's address.
    pub(super) fn open(
        self,
        guest: watch::Receiver<Option<Ipv4Addr>>,
        inner: Inner,
        ports: Ports,
        captures: Captures,
    ) -> Opened {
        let Outside { signals, log, reloader, facts, control, metrics, pcap: _, place: _ } = self;
        let stop = Stop::default();
        let events = log.events.clone();
        tokio::spawn(tell_leases(guest.clone(), events.clone()));
        let Inner { workers, leases, dns, resolver, clock, limits } = inner;
        let api = Arc::new(Api {
            facts,
            workers,
            leases,
            guest,
            dns,
            resolver,
            ports,
            captures,
            limits,
            events,
            streams: StreamPlaces::default(),
            log,
            stop: stop.clone(),
            clock,
        });
        if let Some(listener) = metrics {
            tokio::spawn(served(api::serve_metrics(listener, Arc::clone(&api))));
        }
        let file = control.map(|(listener, file)| {
            tokio::spawn(served(api::serve(listener, api)));
            file
        });
        Opened { signals, stop, reloader, file }
    }
}

async fn served(serving: impl Future<Output = io::Result<()>>) {
    if let Err(error) = serving.await {
        tracing::error!(%error, "the control API cannot be served");
    }
}

/// Tells of the guest's address as DHCP gives it.
async fn tell_leases(mut guest: watch::Receiver<Option<Ipv4Addr>>, events: Events) {
    while guest.changed().await.is_ok() {
        let address = *guest.borrow_and_update();
        events.tell(Event::Lease { address });
    }
}
