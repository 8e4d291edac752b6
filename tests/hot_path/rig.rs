//! The real worker on a thread under watch, with a front-end attached.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tempfile::TempDir;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vunet::config::{Attach, DnsConfig, IpMtu, Lan, Mode, NatConfig};
use vunet::control::dns_forward::{self, DnsForwarder, Resolver, Upstreams};
use vunet::control::events::Events;
use vunet::device::{DeviceConfig, DeviceQueues, SessionError, device};
use vunet::engine::EngineConfig;
use vunet::engine::counters::Counters;
use vunet::limits;
use vunet::rate_limit::RateLimits;
use vunet::requests;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Clock;
use vunet::worker::{Worker, WorkerParts};

use crate::allocations::Watch;
use crate::guest::GATEWAY;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::nic::{CSUM, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, Nic, Shape};

/// One receive buffer holds any frame, as Linux's big-packet buffers do.
const SHAPE: Shape = Shape { rx_bytes: 0x11000, rx_pieces: 1, tx_pieces: 1, indirect: false };
/// Entries of each ring.
pub(crate) const RING_SIZE: u16 = 256;
const FEATURES: u64 =
    VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX | MRG_RXBUF | CSUM | GUEST_CSUM | HOST_TSO4 | GUEST_TSO4;

/// A worker that runs, and the driver of its one queue pair.
pub(crate) struct Rig {
    pub(crate) nic: Nic,
    watch: &'static Watch,
    stop: EventFd,
    worker: Option<JoinHandle<Counters>>,
    session: Option<JoinHandle<Result<(), SessionError>>>,
    // Held, so that their other ends stay open.
    _frontend: Frontend,
    _forwarder: DnsForwarder,
    _dir: TempDir,
}

/// The guest's network; the gateway's address leads to the host's loopback.
fn engine_config() -> EngineConfig {
    let nat = NatConfig { allow_host_loopback: true, ..NatConfig::default() };
    let subnet = "10.0.2.0/24".parse().expect("a subnet");
    EngineConfig {
        lan: Lan { subnet, gateway: GATEWAY, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true },
        dns: DnsConfig { enabled: true, domain: DnsConfig::DEFAULT_DOMAIN.into(), hosts: Vec::new() },
        mode: Mode::Nat(nat),
        mac: None,
        flows_max: limits::FLOWS_MAX,
        isn_secret: (1, 2),
        home: None,
    }
}

fn parts(queues: DeviceQueues, stop: EventFd) -> (WorkerParts, DnsForwarder) {
    let engine = engine_config();
    let upstreams = Upstreams::of(&NatConfig::default());
    let (dns_client, forwarder) = dns_forward::channel(&Resolver::new(upstreams)).expect("descriptors");
    let parts = WorkerParts {
        link: None,
        dns: Arc::new(DnsService::new(&engine.dns, &engine.lan, true)),
        dhcp: Arc::new(Mutex::new(DhcpServer::new(&engine.lan, &engine.dns))),
        queues,
        engine,
        dns_client,
        published: Vec::new(),
        stop,
        addresses_gone: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
        peek_offset: true,
        postbox: None,
        requests: requests::channel().expect("a descriptor").1,
        events: Events::default(),
        number: 0,
        clock: Clock::start(),
        limits: RateLimits::default(),
        cpu: None,
        busy_poll: Duration::ZERO,
    };
    (parts, forwarder)
}

impl Rig {
    pub(crate) fn new() -> Rig {
        let config = DeviceConfig { mac: None, ip_mtu: IpMtu::DEFAULT, queue_pairs: 1, one_off: false };
        let (session, mut queues) = device(config, 1).expect("descriptors");
        let stop = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
        let own = |event: &EventFd| event.try_clone().expect("a descriptor");
        let (parts, forwarder) = parts(queues.remove(0), own(&stop));
        let watch = Watch::leaked();
        let worker = std::thread::spawn(move || {
            watch.over_this_thread();
            Worker::new(parts).and_then(Worker::run).expect("a worker")
        });
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let session = session.spawn(Attach::Listen(path.clone()), own(&stop)).expect("a session");
        let mut frontend = Frontend::connect(&path);
        let mut guest = Guest::new(RING_SIZE);
        guest.attach(&mut frontend, FEATURES);
        Rig {
            nic: Nic::new(guest, SHAPE),
            watch,
            stop,
            worker: Some(worker),
            session: Some(session),
            _frontend: frontend,
            _forwarder: forwarder,
            _dir: dir,
        }
    }

    /// Calls `work` and returns how often the worker allocated meanwhile; says where if it did.
    pub(crate) fn allocations_during(&mut self, work: impl FnOnce(&mut Nic)) -> u64 {
        self.watch.arm();
        work(&mut self.nic);
        let count = self.watch.disarm();
        for origin in self.watch.origins() {
            println!("the worker allocated in\n    {origin}");
        }
        count
    }

    /// Ends the worker; returns what it counted.
    pub(crate) fn end(mut self) -> Counters {
        self.stop.write(1).expect("a stop");
        self.worker.take().expect("a worker").join().expect("the worker does not panic")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.write(1).expect("a stop");
        let session = self.session.take().map(JoinHandle::join);
        let worker = self.worker.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            session.expect("a session").expect("no panic").expect("the session ends well");
            assert!(worker.is_none_or(|ended| ended.is_ok()), "the worker does not panic");
        }
    }
}
