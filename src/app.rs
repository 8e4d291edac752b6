//! Start order and shutdown: open what can fail, bind, then run.
//!
//! The main thread runs the control side (tokio, current-thread): signals and upstream DNS. The
//! worker and the vhost-user session have threads of their own.

mod capturing;
mod hold;
mod membership;
mod outside;
mod publishing;
mod services;
mod stations;
mod supervise;
mod translation;

pub use hold::hold;
use outside::{Inner, Opened, Outside};
use publishing::{AtStart, bind_all};
use supervise::{Live, Supervisor};

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::{MacAddr, VlanId};
use crate::cli::Reloader;
use crate::config::{Config, GuardConfig, IpMtu, LinkConfig, Mode, NatConfig, Publish};
use crate::control::api::leases::LeaseSource;
use crate::control::api::{self, Facts};
use crate::control::capture::{CaptureError, Reason};
use crate::control::dependents::Dependents;
use crate::control::dns_forward::{self, DnsForwarder, DnsStats, Resolver, Upstreams};
use crate::control::events::Events;
use crate::control::lease_claims;
use crate::control::lease_keeping;
use crate::control::limits::LiveLimits;
use crate::control::network_watch::SharedJoined;
use crate::control::ports_of_settings::PortsOfSettings;
use crate::control::signals::Signals;
use crate::control::station_leases;
use crate::device::{self, DeviceConfig, DeviceQueues, SessionError};
use crate::engine::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::lan::guard::{Guard, SharedTable};
use crate::engine::packet::table::TableError;
use crate::engine::placement::{Directory, Home, WorkerId};
use crate::holder::tenant::{self, Tenant};
use crate::holder::{self, Services};
use crate::limits;
use crate::log::Log;
use crate::network::manager::NetworkError;
use crate::network::name::NetworkName;
use crate::network::rootless::JoinError;
use crate::network::state_dir::StateDirError;
use crate::network::store::StoreError;
use crate::network::store::keeper::Keeper;
use crate::postbox;
use crate::random;
use crate::rate_limit::RateLimits;
use crate::requests;
use crate::socket_file::SocketFileError;
use crate::time::Clock;
use crate::uplink::published::BindError;
use crate::uplink::sys::socket::raise_open_files_limit;
use crate::uplink::sys::tap::TapQueue;
use crate::uplink::tap::{self, OpenLink};
use crate::worker::{LinkParts, Worker, WorkerParts};

/// Why the process could not start or had to end.
#[derive(Debug, Error)]
pub enum Error {
    /// A published port could not be bound.
    #[error("--publish")]
    Publish(#[from] BindError),
    /// The link of `--uplink` could not be had.
    #[error(transparent)]
    Link(#[from] tap::OpenError),
    /// The named network could not be joined.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// There is no socket for metrics.
    #[error("--metrics {address}: cannot listen there")]
    Metrics {
        /// The address asked for.
        address: SocketAddr,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// What crosses the device cannot be captured.
    #[error("--pcap")]
    Capture(#[from] CaptureError),
    /// There is no control socket.
    #[error(transparent)]
    Control(#[from] SocketFileError),
    /// The vhost-user socket could not be had, or the session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A descriptor, thread or random bytes could not be had.
    #[error("cannot start: {what}")]
    Start {
        /// What was to be made.
        what: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// No place for the state of named networks.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The holder of a rootless network could not be met.
    #[error("network {name}")]
    Join {
        /// The network.
        name: NetworkName,
        /// Why.
        source: JoinError,
    },
    /// This process is a holder, and has to end.
    #[error("network {name}")]
    Holder {
        /// The network.
        name: NetworkName,
        /// Why.
        source: holder::Error,
    },
    /// The leases of the named network could not be had.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No memory for the flows of packet translation.
    #[error("cannot start: the table of flows")]
    Flows(#[source] TableError),
    /// A thread ended by itself.
    #[error("the {0} thread ended unexpectedly")]
    Thread(&'static str),
}

fn starting(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Start { what, source }
}

/// Runs a backend until a signal, or until the front-end leaves and `one_off` was asked for. At SIGHUP its settings
/// are read again by `reloader`, if there is one; `log` is what they change of the log.
///
/// # Errors
/// [`enum@Error`], whose chain says what to do.
pub fn run(mut config: Config, log: &Log, reloader: Option<Reloader>) -> Result<(), Error> {
    write_log_apart(log, config.network.is_none())?;
    let runtime = control_runtime()?;
    // Handlers stand before anything can be seen from outside, so no signal is lost.
    let signals =
        runtime.block_on(async { if reloader.is_some() { Signals::with_reload() } else { Signals::new() } });
    let mut signals = signals.map_err(starting("signal handlers"))?;
    let mut facts = Facts::of(&config);
    let control = config.control.as_deref().map(api::listen).transpose()?;
    let metrics = config
        .metrics
        .map(|address| api::listen_for_metrics(address).map_err(|source| Error::Metrics { address, source }));
    let metrics = metrics.transpose()?;
    let pcap = config.pcap.as_ref().map(capturing::open).transpose()?;
    let joined = match membership::join(&config) {
        // Waiting for the network's lock ended by it.
        Err(_) if runtime.block_on(signals.have_asked_to_end()) => return Ok(()),
        joined => joined?,
    };
    let held = joined.as_ref().and_then(membership::leads_to_the_world);
    facts.translates_at_holder(held.is_some());
    let (lender, wishes) = tenant::channel();
    let place = publishing::place(&config, held.map(|world| (world, lender)));
    // Before the host's namespace is left, and while this is the only thread.
    let lent = membership::bind_lent(config.network.as_mut())?;
    let used = membership::enter(joined.as_ref(), &lent)?;
    write_log_apart(log, true)?;
    let mut link = config.link.take();
    let mut translate = link.as_mut().and_then(|link| link.translate.take());
    let station_mac = translate.as_mut().map(translation::settle_mac).transpose()?;
    let judge = link.as_ref().map(|link| Judge { vlan: link.vlan, guard: link.guard, gateway: link.gateway });
    let kept = link.as_ref().and_then(|link| link.keep.as_ref()).and_then(stations::open);
    let mut open = runtime.block_on(open_link(link, &config, station_mac))?;
    let queues = open.as_mut().map(OpenLink::take_queues).unwrap_or_default();
    if let (Some(joined), Some(first)) = (&joined, queues.first()) {
        let tap = first.name().to_owned();
        membership::update(joined, |user| user.tap = Some(tap))?;
    }
    let table = Arc::new(stations::table(kept.as_ref()));
    let news = (table.news(), table.news());
    let guest = membership::address(&config, &table);
    let mut links = link_ends(queues, config.lan.ip_mtu, &judge.unwrap_or_default(), &table);
    if let Some(translate) = &translate {
        let parts = translation::parts(translate, &config.lan, links.len())?;
        links = links.into_iter().zip(parts).map(|(link, parts)| link.translated(parts)).collect();
    }
    if let Some(kept) = kept {
        runtime.spawn(station_leases::keep(kept, news.0));
    }
    if let Some(store) =
        joined.as_ref().map(|joined| membership::claims(joined, &config)).transpose()?.flatten()
    {
        runtime.spawn(lease_claims::claim(store, news.1));
    }
    let is_held = used.is_some();
    if let Some((place, used)) = used {
        runtime.spawn(place.stay(used, Tenant { lent, guest: guest.clone(), wishes }));
    }
    let membership = joined.as_ref().map(|joined| (joined, is_held.then_some(guest)));
    let outside = Outside { signals, log: log.clone(), reloader, facts, control, metrics, pcap, place };
    let outcome = run_on(config, links, &runtime, outside, membership);
    if let Some(open) = open {
        runtime.block_on(open.close());
    }
    // Its tasks look after the network; with them gone this is the last that uses it, and leaves it.
    drop(runtime);
    drop(joined);
    outcome
}

fn control_runtime() -> Result<Runtime, Error> {
    Builder::new_current_thread().enable_all().build().map_err(starting("the control runtime"))
}

/// Has the log written by a thread of its own, once this process may have one: into a rootless network go processes of one.
fn write_log_apart(log: &Log, may_have_threads: bool) -> Result<(), Error> {
    if may_have_threads { log.write_apart().map_err(starting("the log's thread")) } else { Ok(()) }
}

/// What the workers' ends of a link are told of it.
#[derive(Clone, Copy, Default)]
struct Judge {
    vlan: Option<VlanId>,
    guard: Option<GuardConfig>,
    gateway: Option<Ipv4Addr>,
}

/// Each worker's end of the link.
fn link_ends(
    queues: Vec<TapQueue>,
    ip_mtu: IpMtu,
    judge: &Judge,
    table: &Arc<SharedTable>,
) -> Vec<LinkParts> {
    let &Judge { vlan, guard, gateway } = judge;
    let guard = |worker| guard.map(|guard| Guard::new(guard, Arc::clone(table), worker));
    let ends = queues.into_iter().zip(0u8..);
    let end = |(queue, worker)| LinkParts {
        queue,
        vlan,
        guard: guard(worker),
        ip_mtu,
        gateway,
        dhcp: None,
        translation: None,
        limits: RateLimits::default(),
    };
    ends.map(end).collect()
}

/// Opens the link for the guest, or for our station of this MAC address.
async fn open_link(
    link: Option<LinkConfig>,
    config: &Config,
    station_mac: Option<MacAddr>,
) -> Result<Option<OpenLink>, Error> {
    let Some(link) = link else { return Ok(None) };
    let queues = usize::from(config.workers.queue_pairs);
    Ok(Some(tap::open(link.source, queues, config.lan.ip_mtu, station_mac.or(config.mac)).await?))
}

/// The same, with the link open.
fn run_on(
    config: Config,
    links: Vec<LinkParts>,
    runtime: &Runtime,
    mut outside: Outside,
    membership: Option<(&SharedJoined, Option<watch::Receiver<Option<Ipv4Addr>>>)>,
) -> Result<(), Error> {
    let open_files = raise_open_files_limit();
    let workers = usize::from(config.workers.queue_pairs.max(1));
    let device = DeviceConfig {
        mac: config.mac,
        ip_mtu: config.lan.ip_mtu,
        queue_pairs: config.workers.queue_pairs.into(),
        one_off: config.one_off,
    };
    let (session, queues) = device::device(device, workers).map_err(starting("the device"))?;
    let stop = EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?;
    let shutdown = EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?;
    let holder = membership.as_ref().and_then(|(joined, _)| membership::holder(joined));
    let events = outside.log.events.clone();
    let asked = publishing::asked(&config.mode);
    let prepared = prepare(&config, (open_files, holder), &events, queues, links, &stop)?;
    let Prepared { parts, forwarders, host, keeper, ports, guest, inner } = prepared;
    let (dns, resolver) = (Arc::clone(&inner.dns), Arc::clone(&inner.resolver));
    let _inside = runtime.enter();
    // Where a holder answers DHCP, the guard sees what it says.
    let member = membership.map(|(joined, held)| (joined, held.unwrap_or(guest.clone())));
    if let Some((joined, guest)) = &member {
        membership::serve(joined, &ports.ports, guest.clone())?;
    }
    let seen = member.as_ref().map_or_else(|| guest.clone(), |(_, held)| held.clone());
    let way = outside.place.clone().with(inner.workers.clone(), member);
    let ports = publishing::serve(way, events, ports, &guest)?;
    let threads = parts.into_iter().enumerate().map(|(n, parts)| spawn_worker(n, parts));
    let threads = threads.collect::<Result<Vec<_>, Error>>()?;
    let captures = capturing::captures(inner.workers.clone(), &outside.log.events, &config.attach);
    capturing::begin(runtime, &captures, &inner.workers, outside.pcap.take(), config.pcap.as_ref())?;
    let for_session = shutdown.try_clone().map_err(starting("an eventfd"))?;
    let serving = supervise::serving(&config.attach);
    // Before the session: with socket activation a VM waits already.
    let news = outside.log.events.listen();
    let session = session.spawn(config.attach, for_session)?;
    let outcome = runtime.block_on(async {
        for forwarder in forwarders {
            tokio::task::spawn(forwarder.run(Arc::clone(&dns)));
        }
        if let Some(host) = host {
            host.follow();
        }
        if let Some(keeper) = keeper {
            tokio::task::spawn(lease_keeping::keep(keeper));
        }
        let of_settings = PortsOfSettings::new(ports.clone(), asked).await;
        let (log, limits) = (outside.log.clone(), inner.limits.clone());
        let live = Live { log, dns: Arc::clone(&dns), lan: config.lan, limits, ports: of_settings };
        let workers = inner.workers.clone();
        let Opened { signals, stop, reloader, file: _file } =
            outside.open(seen, inner, ports.clone(), captures.clone());
        let ended = tokio::task::spawn_blocking(move || session.join());
        let supervisor = Supervisor { signals, stop, reloader, live, workers, serving };
        let outcome = supervisor.run(news, ended, &shutdown).await;
        // While workers can still give back what they recorded.
        let _ = captures.stop(Reason::ProcessEnds).await;
        outcome
    });
    let _ = stop.write(1);
    ended(threads)?.log();
    log_dns(&resolver.stats());
    outcome
}

/// What all workers counted, once each has ended.
fn ended(threads: Vec<WorkerThread>) -> Result<Counters, Error> {
    let mut total = Counters::default();
    for thread in threads {
        let counters = thread.join().map_err(|_| Error::Thread("worker"))?;
        total.add(&counters.map_err(starting("the worker"))?);
    }
    Ok(total)
}

struct Prepared {
    parts: Vec<WorkerParts>,
    forwarders: Vec<DnsForwarder>,
    /// None where the guest sees nothing of the host's network.
    host: Option<Dependents>,
    /// Of the named network's leases.
    keeper: Option<Keeper>,
    /// What is published.
    ports: AtStart,
    /// What the control API answers from.
    inner: Inner,
    /// The guest's address as DHCP gives it.
    guest: watch::Receiver<Option<Ipv4Addr>>,
}

/// What is translated to sockets of the host. Behind an address on a link no port is the host's, and the way to
/// the world is that link.
fn on_sockets(mode: &Mode, is_translated: bool) -> NatConfig {
    let mut nat = match mode {
        Mode::Nat(nat) => nat.clone(),
        Mode::Isolated => NatConfig::default(),
    };
    if is_translated {
        nat.publish.clear();
    }
    nat
}

/// What the engine makes of the world. Where the kernel translates (on a named network), or packets are translated onto a link,
/// names are all that is asked of it: no frame of the guest, wherever it is addressed, leaves by a socket of the host's.
fn engine_mode(mode: &Mode, nat: &NatConfig, is_translated_elsewhere: bool) -> Mode {
    match mode {
        Mode::Nat(_) if !is_translated_elsewhere => Mode::Nat(nat.clone()),
        Mode::Nat(_) | Mode::Isolated => Mode::Isolated,
    }
}

/// Opens what the workers need, within the open files limit; `holder` is this process's number in the store of
/// its named network. Published ports are the first worker's; their flows move to the worker
/// whose queue pair the guest answers on.
fn prepare(
    config: &Config,
    (open_files, holder): (u64, Option<u64>),
    events: &Events,
    queues: Vec<DeviceQueues>,
    links: Vec<LinkParts>,
    stop: &EventFd,
) -> Result<Prepared, Error> {
    let workers = queues.len();
    let several = workers > 1;
    let named = |error| membership::with_owner(error, config.network.as_ref());
    let is_translated = links.iter().any(LinkParts::translates);
    let follows_flows = links.is_empty() || is_translated;
    let mut nat = on_sockets(&config.mode, is_translated);
    let bound = bind_all(&mut nat.publish).map_err(named)?;
    let world = matches!(config.mode, Mode::Nat(_));
    let is_shared = config.network.is_some();
    let mode = engine_mode(&config.mode, &nat, is_shared || is_translated);
    let (mut published, relayed) = if is_shared { (None, bound) } else { (Some(bound), Vec::new()) };
    let ports = AtStart { ports: published_at_start(config, &nat, is_translated), relayed };
    let Services { dns, dhcp, keeper, leases } = services::of(config, world, holder)?;
    let directory = Arc::new(Directory::default());
    let clock = Clock::start();
    let limits = RateLimits::new(&config.limits);
    let flows_max = limits::flows_max(open_files, nat.publish.len(), workers);
    let engine = engine_config(config, mode, flows_max, random_pair()?);
    let resolver = Resolver::new(Upstreams::of(&nat));
    let postboxes = postbox::postboxes(workers).map_err(starting("the workers' rings"))?;
    let (mut parts, mut forwarders, mut wakes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut links, mut handles) = (links.into_iter(), Vec::new());
    for ((own, queues), postbox) in (0u8..).map(WorkerId).zip(queues).zip(postboxes) {
        let (dns_client, forwarder) = dns_forward::channel(&resolver).map_err(starting("the DNS channel"))?;
        forwarders.push(forwarder);
        let addresses_gone = EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?;
        wakes.push(addresses_gone.try_clone().map_err(starting("an eventfd"))?);
        let (handle, asked) = requests::channel().map_err(starting("an eventfd"))?;
        handles.push(handle);
        let home = Home { own, workers: config.workers.queue_pairs, directory: Arc::clone(&directory) };
        parts.push(WorkerParts {
            queues,
            engine: EngineConfig { home: several.then_some(home), ..engine.clone() },
            dns: Arc::clone(&dns),
            link: links.next().map(|link| link.sharing(&dhcp, &limits)),
            dns_client,
            published: published.take().unwrap_or_default(),
            stop: stop.try_clone().map_err(starting("an eventfd"))?,
            addresses_gone,
            peek_offset: !config.no_peek_off,
            dhcp: Arc::clone(&dhcp),
            postbox: several.then_some(postbox),
            requests: asked,
            events: events.clone(),
            number: own.0.into(),
            clock,
            limits: limits.clone(),
            cpu: config.workers.cpus.iter().copied().cycle().nth(own.0.into()),
            busy_poll: Duration::from_micros(config.workers.busy_poll_us.into()),
        });
    }
    let guest = dhcp.lock().unwrap_or_else(PoisonError::into_inner).bound();
    let asked = config.dns.enabled.then(|| Arc::clone(&resolver));
    let leases = LeaseSource::new(Arc::clone(&dhcp), leases);
    let limits = LiveLimits::new(limits, handles.clone(), clock, follows_flows);
    let inner = Inner { workers: handles, leases, dns, resolver, clock, limits };
    let host = Dependents { resolver: asked, dhcp, workers: wakes, subnet: config.lan.subnet };
    Ok(Prepared { parts, forwarders, host: world.then_some(host), keeper, ports, guest, inner })
}

/// The engine of each worker, but for its place among them.
fn engine_config(config: &Config, mode: Mode, flows_max: usize, isn_secret: (u64, u64)) -> EngineConfig {
    EngineConfig {
        lan: config.lan,
        dns: config.dns.clone(),
        mode,
        mac: config.mac,
        flows_max,
        isn_secret,
        home: None,
    }
}

/// The published ports, whoever serves them.
fn published_at_start(config: &Config, nat: &NatConfig, is_translated: bool) -> Vec<Publish> {
    let lent = config.network.iter().flat_map(|network| &network.lent);
    let of_link = match &config.mode {
        Mode::Nat(nat) if is_translated => &nat.publish[..],
        _ => &[],
    };
    nat.publish.iter().chain(lent).chain(of_link).copied().collect()
}

type WorkerThread = thread::JoinHandle<io::Result<Counters>>;

fn spawn_worker(n: usize, parts: WorkerParts) -> Result<WorkerThread, Error> {
    thread::Builder::new()
        .name(format!("worker-{n}"))
        .spawn(move || Worker::new(parts)?.run())
        .map_err(starting("a worker thread"))
}

fn random_pair() -> Result<(u64, u64), Error> {
    let bits = || random::bits64().map_err(starting("random bytes"));
    Ok((bits()?, bits()?))
}

fn log_dns(stats: &DnsStats) {
    if stats.queries == 0 {
        return;
    }
    tracing::info!(
        queries = stats.queries,
        cached = stats.cached,
        joined = stats.joined,
        answered = stats.answered,
        failed = stats.failed,
        over_bound = stats.over_bound,
        timeouts = stats.timeouts,
        errors = stats.errors,
        mismatched = stats.mismatched,
        connections = stats.connections,
        streams_refused = stats.streams_refused,
        evicted = stats.evicted,
        "names forwarded"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_packets_are_translated_elsewhere_no_frame_of_the_guest_leaves_by_a_socket() {
        let nat = NatConfig::default();
        let world = Mode::Nat(nat.clone());
        assert_eq!(engine_mode(&world, &nat, true), Mode::Isolated);
        assert_eq!(engine_mode(&Mode::Isolated, &nat, false), Mode::Isolated);
        assert_eq!(engine_mode(&world, &nat, false), world);
    }
}
