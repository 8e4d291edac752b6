//! Start order and shutdown: open what can fail, bind, then run.
//!
//! The main thread runs the control side (tokio, current-thread): signals and upstream DNS. The
//! worker and the vhost-user session have threads of their own.

mod hold;
mod membership;
mod services;
mod stations;
mod translation;

pub use hold::hold;

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use socket2::{Socket, Type};
use thiserror::Error;
use tokio::sync::watch;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::addr::{MacAddr, VlanId};
use crate::config::{Config, GuardConfig, IpMtu, LinkConfig, Mode, NatConfig, Protocol, Publish};
use crate::control::dependents::Dependents;
use crate::control::dns_forward::{self, DnsForwarder, DnsStats, Resolver, Upstreams};
use crate::control::lease_claims;
use crate::control::lease_keeping;
use crate::control::network_watch::SharedJoined;
use crate::control::signals::Signals;
use crate::control::station_leases;
use crate::device::{self, DeviceConfig, DeviceQueues, SessionError};
use crate::engine::EngineConfig;
use crate::engine::counters::Counters;
use crate::engine::lan::guard::{Guard, SharedTable};
use crate::engine::packet::table::TableError;
use crate::engine::placement::{Directory, Home, WorkerId};
use crate::holder::{self, Services};
use crate::limits;
use crate::network::manager::NetworkError;
use crate::network::name::NetworkName;
use crate::network::rootless::JoinError;
use crate::network::state_dir::StateDirError;
use crate::network::store::StoreError;
use crate::network::store::keeper::Keeper;
use crate::postbox;
use crate::random;
use crate::service::dns::DnsService;
use crate::time::Clock;
use crate::uplink::sockets::bind_published;
use crate::uplink::sys::socket::raise_open_files_limit;
use crate::uplink::sys::tap::TapQueue;
use crate::uplink::tap::{self, OpenLink};
use crate::worker::{LinkParts, Worker, WorkerParts};

/// Why the process could not start or had to end.
#[derive(Debug, Error)]
pub enum Error {
    /// A published port could not be bound.
    #[error("--publish: cannot listen on {kind} {host}{taken_by}")]
    Publish {
        /// `tcp` or `udp`.
        kind: &'static str,
        /// The host address asked for.
        host: std::net::SocketAddr,
        /// Whose it is, if that is known; begins with a comma.
        taken_by: String,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// The link of `--uplink` could not be had.
    #[error(transparent)]
    Link(#[from] tap::OpenError),
    /// The named network could not be joined.
    #[error(transparent)]
    Network(#[from] NetworkError),
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

/// Runs a backend until a signal, or until the front-end leaves and `one_off` was asked for.
///
/// # Errors
/// [`enum@Error`], whose chain says what to do.
pub fn run(mut config: Config) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(starting("the control runtime"))?;
    // Handlers stand before anything can be seen from outside, so no signal is lost.
    let signals = runtime.block_on(async { Signals::new() }).map_err(starting("signal handlers"))?;
    let joined = membership::join(&config)?;
    // Before the host's namespace is left, and while this is the only thread.
    let lent = membership::bind_lent(config.network.as_mut())?;
    let used = membership::enter(joined.as_ref(), &lent)?;
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
        runtime.spawn(place.stay(used, lent, guest.clone()));
    }
    let membership = joined.as_ref().map(|joined| (joined, is_held.then_some(guest)));
    let outcome = run_on(config, links, &runtime, signals, membership);
    if let Some(open) = open {
        runtime.block_on(open.close());
    }
    // Its tasks look after the network; with them gone this is the last that uses it, and leaves it.
    drop(runtime);
    drop(joined);
    outcome
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
    runtime: &tokio::runtime::Runtime,
    signals: Signals,
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
    let prepared = prepare(&config, (open_files, holder), queues, links, &stop)?;
    let Prepared { parts, forwarders, dns, resolver, host, keeper, ports, guest } = prepared;
    if let Some((joined, held)) = membership {
        let _inside = runtime.enter();
        // Where a holder answers DHCP, the guard sees what it says.
        membership::serve(joined, &ports.publish, ports.bound, held.unwrap_or(guest))?;
    }
    let threads = parts.into_iter().enumerate().map(|(n, parts)| spawn_worker(n, parts));
    let threads = threads.collect::<Result<Vec<_>, Error>>()?;
    let for_session = shutdown.try_clone().map_err(starting("an eventfd"))?;
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
        let ended = tokio::task::spawn_blocking(move || session.join());
        supervise(signals, ended, &shutdown).await
    });
    let _ = stop.write(1);
    let mut total = Counters::default();
    for thread in threads {
        let counters = thread.join().map_err(|_| Error::Thread("worker"))?;
        total.add(&counters.map_err(starting("the worker"))?);
    }
    total.log();
    log_dns(&resolver.stats());
    outcome
}

struct Prepared {
    parts: Vec<WorkerParts>,
    forwarders: Vec<DnsForwarder>,
    dns: Arc<DnsService>,
    resolver: Arc<Resolver>,
    /// None where the guest sees nothing of the host's network.
    host: Option<Dependents>,
    /// Of the named network's leases.
    keeper: Option<Keeper>,
    /// Published ports that no worker serves, because the kernel translates.
    ports: Ports,
    /// The guest's address as DHCP gives it.
    guest: watch::Receiver<Option<Ipv4Addr>>,
}

#[derive(Default)]
struct Ports {
    publish: Vec<Publish>,
    bound: (Bound, Bound),
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
    queues: Vec<DeviceQueues>,
    links: Vec<LinkParts>,
    stop: &EventFd,
) -> Result<Prepared, Error> {
    let workers = queues.len();
    let named = |error| membership::with_owner(error, config.network.as_ref());
    let is_translated = links.iter().any(LinkParts::translates);
    let mut nat = on_sockets(&config.mode, is_translated);
    let bound = bind_all(&mut nat.publish).map_err(named)?;
    let world = matches!(config.mode, Mode::Nat(_));
    let is_shared = config.network.is_some();
    let mode = engine_mode(&config.mode, &nat, is_shared || is_translated);
    let (mut published, ports) = match is_shared {
        true => (None, Ports { publish: noted(config, &nat), bound }),
        false => (Some(bound), Ports::default()),
    };
    let Services { dns, dhcp, keeper } = services::of(config, world, holder)?;
    let directory = Arc::new(Directory::default());
    let clock = Clock::start();
    let isn_secret = random_pair()?;
    let resolver = Resolver::new(Upstreams::of(&nat));
    let postboxes = postbox::postboxes(workers).map_err(starting("the workers' rings"))?;
    let (mut parts, mut forwarders, mut wakes) = (Vec::new(), Vec::new(), Vec::new());
    let mut links = links.into_iter();
    for ((own, queues), postbox) in (0u8..).map(WorkerId).zip(queues).zip(postboxes) {
        let (dns_client, forwarder) = dns_forward::channel(&resolver).map_err(starting("the DNS channel"))?;
        forwarders.push(forwarder);
        let addresses_gone = EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?;
        wakes.push(addresses_gone.try_clone().map_err(starting("an eventfd"))?);
        let (tcp, udp) = published.take().unwrap_or_default();
        let several = workers > 1;
        let home = Home { own, workers: config.workers.queue_pairs, directory: Arc::clone(&directory) };
        parts.push(WorkerParts {
            queues,
            engine: EngineConfig {
                lan: config.lan,
                dns: config.dns.clone(),
                mode: mode.clone(),
                mac: config.mac,
                flows_max: limits::flows_max(open_files, nat.publish.len(), workers),
                isn_secret,
                home: several.then_some(home),
            },
            dns: Arc::clone(&dns),
            link: links.next().map(|link| LinkParts { dhcp: Some(Arc::clone(&dhcp)), ..link }),
            dns_client,
            tcp,
            udp,
            stop: stop.try_clone().map_err(starting("an eventfd"))?,
            addresses_gone,
            peek_offset: !config.no_peek_off,
            dhcp: Arc::clone(&dhcp),
            postbox: several.then_some(postbox),
            clock,
            cpu: config.workers.cpus.iter().copied().cycle().nth(own.0.into()),
            busy_poll: Duration::from_micros(config.workers.busy_poll_us.into()),
        });
    }
    let guest = dhcp.lock().unwrap_or_else(PoisonError::into_inner).bound();
    let asked = config.dns.enabled.then(|| Arc::clone(&resolver));
    let host = Dependents { resolver: asked, dhcp, workers: wakes, subnet: config.lan.subnet };
    let host = world.then_some(host);
    Ok(Prepared { parts, forwarders, dns, resolver, host, keeper, ports, guest })
}

/// What others are told of this process's published ports, whoever serves them.
fn noted(config: &Config, nat: &NatConfig) -> Vec<Publish> {
    let lent = config.network.iter().flat_map(|network| &network.lent);
    nat.publish.iter().chain(lent).copied().collect()
}

type WorkerThread = thread::JoinHandle<io::Result<Counters>>;

fn spawn_worker(n: usize, parts: WorkerParts) -> Result<WorkerThread, Error> {
    thread::Builder::new()
        .name(format!("worker-{n}"))
        .spawn(move || Worker::new(parts)?.run())
        .map_err(starting("a worker thread"))
}

/// Waits for a signal or the session's end, and for the session after a signal.
async fn supervise(
    mut signals: Signals,
    mut session: tokio::task::JoinHandle<thread::Result<Result<(), SessionError>>>,
    shutdown: &EventFd,
) -> Result<(), Error> {
    let ended = tokio::select! {
        name = signals.next() => {
            tracing::info!(signal = name, "ending");
            let _ = shutdown.write(1);
            (&mut session).await
        }
        ended = &mut session => ended,
    };
    match ended {
        Ok(Ok(result)) => Ok(result?),
        _ => Err(Error::Thread("session")),
    }
}

type Bound = Vec<(Socket, u16)>;

/// Binds every published port; port 0 is picked by the kernel, reported and put in its place.
fn bind_all(publish: &mut [Publish]) -> Result<(Bound, Bound), Error> {
    let (mut tcp, mut udp) = (Vec::new(), Vec::new());
    for entry in publish {
        let socket = bind(entry)?;
        let list = if entry.protocol == Protocol::Tcp { &mut tcp } else { &mut udp };
        list.push((socket, entry.guest_port));
    }
    Ok((tcp, udp))
}

/// Binds one published port, which must be a free one.
fn bind(port: &mut Publish) -> Result<Socket, Error> {
    let (kind, socket_type) = match port.protocol {
        Protocol::Tcp => ("tcp", Type::STREAM),
        Protocol::Udp => ("udp", Type::DGRAM),
    };
    let refused = |source| Error::Publish { kind, host: port.host, taken_by: String::new(), source };
    let socket = bind_published(socket_type, port.host).map_err(refused)?;
    let host = socket.local_addr().map_err(refused)?.as_socket().unwrap_or(port.host);
    tracing::info!(kind, %host, guest_port = port.guest_port, "published");
    port.host = host;
    Ok(socket)
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
