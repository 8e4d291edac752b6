//! The holder of a rootless network: the small process that keeps what several virtual machines of one user
//! share.
//!
//! ```text
//!   host's namespace            |  the network's own namespaces (of users, of networks)
//!   host sockets -- engine -- TAP ==== bridge ==== TAP -- vunet -- virtual machine
//!                               |             \=== TAP -- vunet -- virtual machine
//! ```
//!
//! The engine is the gateway of all of them: NAT over host sockets, DHCP from the network's leases, DNS. The
//! bridge is the kernel's, so guests reach each other without the holder, and no virtual machine's death
//! takes anything away. A process of a virtual machine gets the namespaces at the [`door`] and moves into
//! them before it starts a thread.
//!
//! May touch: `engine`, `uplink`, `control`, `service`, `sandbox`, `worker::names`.

mod binding;
pub mod door;
mod links;
pub mod ports;
pub mod tap_port;
pub mod tenant;
pub mod worker;

pub use links::BRIDGE;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use thiserror::Error;
use tokio::net::UnixListener;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::ports::Ports;
use self::worker::{HolderParts, HolderWorker};
use crate::config::{DnsConfig, IpMtu, Lan, Mode, NatConfig};
use crate::control::dependents::Dependents;
use crate::control::dns_forward::{self, DnsForwarder, Resolver, Upstreams};
use crate::control::lease_keeping;
use crate::control::signals::Signals;
use crate::engine::EngineConfig;
use crate::engine::gateway::SharedDhcp;
use crate::limits;
use crate::log::Log;
use crate::network::store::keeper::Keeper;
use crate::network::store::reading::LeaseReader;
use crate::sandbox::namespaces::{NamespaceError, Namespaces};
use crate::service::dns::DnsService;
use crate::uplink::sys::socket::raise_open_files_limit;

/// What a holder is told at its start.
#[derive(Debug)]
pub struct HolderConfig {
    /// The guests' network.
    pub lan: Lan,
    /// DNS as they meet it.
    pub dns: DnsConfig,
    /// Whether anything lies beyond the guests and their gateway.
    pub world: bool,
    /// Keys the initial sequence numbers (RFC 6528).
    pub isn_secret: (u64, u64),
    /// Alias of the bridge, which marks it as this network's.
    pub alias: String,
    /// Processes that use the network already, whose holder ended.
    pub survivors: Vec<u32>,
    /// Where the door's socket is to be.
    pub door: PathBuf,
    /// How long the network is kept without users; for ever without.
    pub idle: Option<Duration>,
    /// The process's log.
    pub log: Log,
}

/// The network's services, over its leases.
#[derive(Debug)]
pub struct Services {
    /// Local names.
    pub dns: Arc<DnsService>,
    /// Addresses.
    pub dhcp: SharedDhcp,
    /// What keeps the store of leases small and current.
    pub keeper: Option<Keeper>,
    /// Reads that store beside who writes it.
    pub leases: Option<LeaseReader>,
}

/// Why there is no holder, or why it had to end.
#[derive(Debug, Error)]
pub enum Error {
    /// No namespaces, or what belongs into them could not be made there.
    #[error("the network's namespaces")]
    Namespaces(#[from] NamespaceError),
    /// A descriptor, thread, socket or random bytes could not be had.
    #[error("cannot start: {what}")]
    Start {
        /// What was to be made.
        what: &'static str,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// The worker ended by itself.
    #[error("the worker thread ended unexpectedly")]
    Worker,
}

fn starting(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Start { what, source }
}

/// Finds out whether this user can hold a network here, within `patience`: makes its namespaces, bridge and TAP in a child
/// process and lets them go.
///
/// Must be called while the process has one thread.
///
/// # Errors
/// [`NamespaceError`], which says what forbids it.
pub fn try_out(patience: Duration) -> Result<(), NamespaceError> {
    Namespaces::try_out(patience, || links::make(IpMtu::DEFAULT, "vunet:try"))
}

/// Holds a network until nobody has used it for the configured time, or a signal. Calls `ready` once
/// processes can join.
///
/// Must be called while the process has one thread.
///
/// # Errors
/// [`enum@Error`], whose chain says what to do.
pub fn run(config: &HolderConfig, services: Services, ready: impl FnOnce()) -> Result<(), Error> {
    let ip_mtu = config.lan.ip_mtu;
    let mut survivors = config.survivors.iter().filter_map(|pid| Namespaces::of_process(*pid).ok().flatten());
    let (namespaces, tap) = match survivors.next() {
        Some(namespaces) => {
            tracing::info!("the network is still there; taking it over from a holder that ended");
            let tap = namespaces.reach(|| links::make(ip_mtu, &config.alias))?;
            (namespaces, tap)
        }
        None => Namespaces::make(|| links::make(ip_mtu, &config.alias))?,
    };
    let open_files = raise_open_files_limit();
    let stop = EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(starting("the control runtime"))?;
    let keeper = services.keeper;
    let services = (services.dns, services.dhcp);
    let Prepared { parts, forwarder, resolver, ports } = prepare(config, open_files, tap, &stop, services)?;
    config.log.write_apart().map_err(starting("the log's thread"))?;
    let dns = Arc::clone(&parts.dns);
    let host = Dependents {
        resolver: (config.dns.enabled && config.world).then_some(resolver),
        dhcp: Arc::clone(&parts.dhcp),
        workers: vec![parts.addresses_gone.try_clone().map_err(starting("an eventfd"))?],
        subnet: config.lan.subnet,
    };
    let worker = thread::Builder::new()
        .name("worker".to_owned())
        .spawn(move || HolderWorker::new(parts)?.run())
        .map_err(starting("a worker thread"))?;
    let outcome = runtime.block_on(async {
        let listener = open_door(&config.door)?;
        let signals = Signals::new().map_err(starting("signal handlers"))?;
        tokio::spawn(forwarder.run(dns));
        host.follow();
        if let Some(keeper) = keeper {
            tokio::spawn(lease_keeping::keep(keeper));
        }
        ready();
        hold((listener, namespaces, ports), config.idle, signals).await;
        // The next holder makes its own door; a process that knocks meanwhile finds none and waits for it.
        let _ = fs::remove_file(&config.door);
        Ok(())
    });
    let _ = stop.write(1);
    let counters = worker.join().map_err(|_| Error::Worker)?.map_err(starting("the worker"))?;
    counters.log();
    outcome
}

struct Prepared {
    parts: HolderParts,
    forwarder: DnsForwarder,
    resolver: Arc<Resolver>,
    ports: Ports,
}

fn prepare(
    config: &HolderConfig,
    open_files: u64,
    tap: OwnedFd,
    stop: &EventFd,
    (dns, dhcp): (Arc<DnsService>, SharedDhcp),
) -> Result<Prepared, Error> {
    let nat = NatConfig::default();
    let resolver = Resolver::new(Upstreams::of(&nat));
    let (dns_client, forwarder) = dns_forward::channel(&resolver).map_err(starting("the DNS channel"))?;
    let (ports, orders) = ports::channel().map_err(starting("an eventfd"))?;
    let parts = HolderParts {
        tap,
        engine: EngineConfig {
            lan: config.lan,
            dns: config.dns.clone(),
            mode: if config.world { Mode::Nat(nat) } else { Mode::Isolated },
            mac: None,
            flows_max: limits::flows_max(open_files, limits::HOLDER_USERS_MAX, 1),
            isn_secret: config.isn_secret,
            home: None,
        },
        dns,
        dns_client,
        dhcp,
        orders,
        stop: stop.try_clone().map_err(starting("an eventfd"))?,
        addresses_gone: EventFd::new(EFD_NONBLOCK).map_err(starting("an eventfd"))?,
    };
    Ok(Prepared { parts, forwarder, resolver, ports })
}

/// Binds the door's socket, this user's only. Whoever calls holds the network's lock, so a socket that is
/// there already is a dead holder's.
fn open_door(path: &Path) -> Result<UnixListener, Error> {
    let doing = "the socket where processes join";
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(starting(doing)(error)),
        _ => {}
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let folder = File::open(folder).map_err(starting(doing))?;
    let listener = UnixListener::bind(door::short_path(&folder, name)).map_err(starting(doing))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(starting(doing))?;
    Ok(listener)
}

/// Serves the door until nobody has used it for `idle`, or a signal.
async fn hold(
    (listener, namespaces, ports): (UnixListener, Namespaces, Ports),
    idle: Option<Duration>,
    mut signals: Signals,
) {
    tokio::select! {
        () = door::serve(listener, namespaces, ports, idle) => tracing::info!("nobody uses the network, or it is to be removed; ending"),
        name = signals.end() => tracing::info!(signal = name, "ending"),
    }
}
