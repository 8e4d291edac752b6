//! `vunet network`: named networks made, listed, shown and removed.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use rustix::process::geteuid;
use serde::Serialize;
use thiserror::Error;

use super::leases::{self, LeaseReport, ReservationReport};
use super::subnet;
use super::values;
use crate::addr::Ipv4Subnet;
use crate::app;
use crate::config::{DnsConfig, IpMtu};
use crate::log::Log;
use crate::network::definition::{Definition, Kind, NetworkId, OwnLan};
use crate::network::manager::{NetworkError, Networks};
use crate::network::name::NetworkName;
use crate::network::rootless::{self, JoinError};
use crate::network::state_dir::{self, StateDir};
use crate::network::store::{Reservation, StoreError};
use crate::network::users::User;
use crate::sandbox::user::become_user;
use crate::uplink::firewall::{self, FirewallError};
use crate::uplink::links::is_link_name;
use crate::uplink::sys::routes::HostRoute;

/// What is to be done with named networks.
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network; nothing appears on the host until a VM uses it
    Create(Box<CreateArgs>),
    /// List all networks
    List,
    /// Show a network and who uses it
    Inspect {
        /// Name of the network
        name: NetworkName,
        /// As a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Hold a rootless network, in the foreground, for a service manager; without it VMs start one by themselves
    Hold {
        /// Name of the network
        name: NetworkName,
        /// Do not end when no VM has used the network for a minute
        #[arg(long)]
        keep: bool,
    },
    /// Remove a network that no VM uses, with its leases
    Remove {
        /// Name of the network
        name: NetworkName,
    },
}

/// What the network is to be.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Name of the network: lower-case letters, digits and hyphens
    name: NetworkName,
    /// What its guests may reach
    #[arg(long, value_enum, default_value = "nat")]
    mode: NetworkModeArg,
    /// Subnet of its guests [default: the first of 10.0.2.0/24 to 10.0.254.0/24 (host-only: 10.0.0.0/24 first)
    /// that overlaps no other network and no route of this host]
    #[arg(long, value_name = "ADDRESS/PREFIX", value_parser = values::subnet)]
    subnet: Option<Ipv4Subnet>,
    /// The host's address there: router, DHCP and DNS server [default: the subnet's first]
    #[arg(long, value_name = "IP", value_parser = values::ipv4_addr)]
    gateway: Option<Ipv4Addr>,
    /// Domain of its guests' names [default: NAME.vunet.internal]
    #[arg(long, value_name = "DOMAIN", value_parser = values::dns_domain)]
    dns_domain: Option<String>,
    /// Largest IP packet on its links, in bytes
    #[arg(long, value_name = "BYTES", value_parser = values::ip_mtu, default_value_t = IpMtu::DEFAULT)]
    ip_mtu: IpMtu,
    /// Keep its guests from each other
    #[arg(long)]
    isolate: bool,
    /// With --mode nat: let its guests open connections to this host itself
    #[arg(long)]
    allow_host: bool,
    /// Without privilege: its bridge lies in namespaces of this user, and a small process holds them. Needs no
    /// nft, for root either; with --mode host-only this host itself is not in reach
    #[arg(long)]
    rootless: bool,
    /// With --mode bridge: the bridge of this host that its guests are on
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,
    /// Keep an address for one guest, known by its MAC address or by its DHCP client identifier (hexadecimal),
    /// and a name if wanted; repeatable
    #[arg(long, value_name = "MAC|id:HEX=IP[,NAME]", value_parser = leases::reservation)]
    reserve: Vec<Reservation>,
}

/// What guests of a named network may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NetworkModeArg {
    /// Each other, and the world through this host's addresses
    Nat,
    /// Each other and this host (with --rootless each other only)
    HostOnly,
    /// Whatever an existing bridge of this host leads to
    Bridge,
}

/// Why a command about networks fails.
#[derive(Debug, Error)]
pub enum CommandError {
    /// A flag that the mode has no use for.
    #[error("{flag} has no meaning with --mode {mode}: {why}; drop it")]
    NotInMode {
        /// The flag.
        flag: &'static str,
        /// The mode.
        mode: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// Bridge mode without a bridge.
    #[error("--mode bridge needs --bridge NAME: the bridge of this host that the guests are to be on")]
    NoBridge,
    /// Not an interface's name.
    #[error("--bridge {0:?}: no interface can have this name: give 1 to 15 characters, no space or slash")]
    BridgeName(String),
    /// A gateway outside of the subnet.
    #[error("--gateway {gateway} is no host of the subnet {subnet}: give one from it, or another --subnet")]
    Gateway {
        /// The gateway.
        gateway: Ipv4Addr,
        /// The subnet.
        subnet: Ipv4Subnet,
    },
    /// A subnet that another network has.
    #[error("--subnet {subnet} overlaps {other} of network {name}: give another")]
    Taken {
        /// The subnet asked for.
        subnet: Ipv4Subnet,
        /// The other's.
        other: Ipv4Subnet,
        /// The other network.
        name: NetworkName,
    },
    /// No default left.
    #[error(
        "networks have all of 10.0.0.0/24 and 10.0.2.0/24 to 10.0.254.0/24: give --subnet, or remove one"
    )]
    NoneLeft,
    /// A network without a holder.
    #[error("network {name} is of mode {mode}, which needs no holder: only networks made with --rootless do")]
    NotRootless {
        /// Its name.
        name: NetworkName,
        /// Its mode.
        mode: &'static str,
    },
    /// The holder of a rootless network.
    #[error("network {name}")]
    Join {
        /// Its name.
        name: NetworkName,
        /// What failed.
        source: JoinError,
    },
    /// This process is the holder, and has to end.
    #[error(transparent)]
    Hold(#[from] app::Error),
    /// An address that cannot be kept.
    #[error("--reserve: {0}")]
    Reserve(#[source] StoreError),
    /// The network's leases.
    #[error(transparent)]
    Leases(StoreError),
    /// Networks of another user.
    #[error("state directory {}: it belongs to user {uid}, and this process cannot become that user; run it as that user", place.display())]
    Owner {
        /// The state directory.
        place: PathBuf,
        /// Its owner.
        uid: u32,
        /// The kernel's refusal.
        source: io::Error,
    },
    /// No random bytes.
    #[error("cannot get random bytes")]
    Random(#[source] io::Error),
    /// A network.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

impl CommandError {
    /// The code to end the process with: 1 where the host refuses, 2 where the command is wrong.
    pub fn exit_code(&self) -> u8 {
        match self {
            CommandError::Network(NetworkError::Unknown { .. } | NetworkError::Exists(_)) => 2,
            CommandError::Reserve(StoreError::Reservation { .. }) => 2,
            CommandError::Network(_)
            | CommandError::Owner { .. }
            | CommandError::Random(_)
            | CommandError::Reserve(_)
            | CommandError::Leases(_)
            | CommandError::Join { .. }
            | CommandError::Hold(_) => 1,
            _ => 2,
        }
    }
}

impl NetworkCommand {
    /// Root becomes the owner of networks that are another user's, such as those of services: what it makes of them stays
    /// that user's. What of a network is left on the host only who may change that takes away.
    fn act_as_owner(&self, place: &Path) -> Result<(), CommandError> {
        let Some((uid, gid)) = state_dir::other_owner(place) else { return Ok(()) };
        if !geteuid().is_root() {
            return Ok(());
        }
        let keeps_net_admin = matches!(self, NetworkCommand::Remove { .. });
        become_user(uid, gid, keeps_net_admin).map_err(|source| CommandError::Owner {
            place: place.to_owned(),
            uid: uid.as_raw(),
            source,
        })
    }

    /// Does it; what is to be printed. Advice goes to the `log`.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn run(
        self,
        state_dir: Option<&Path>,
        log: &Log,
        routes: io::Result<Vec<HostRoute>>,
    ) -> Result<String, CommandError> {
        let place = state_dir::locate(state_dir).map_err(NetworkError::from)?;
        self.act_as_owner(&place)?;
        let networks = Networks::new(StateDir::open(place).map_err(NetworkError::from)?);
        match self {
            NetworkCommand::Create(args) => create(&networks, &args, routes),
            NetworkCommand::List => list(&networks),
            NetworkCommand::Inspect { name, json } => inspect(&networks, &name, json),
            NetworkCommand::Hold { name, keep } => hold(&networks, &name, keep, log),
            NetworkCommand::Remove { name } => {
                networks.sweep(Some(&name));
                let removed = networks.remove(&name)?;
                Ok(format!("removed network {}\n", removed.name))
            }
        }
    }
}

fn create(
    networks: &Networks,
    args: &CreateArgs,
    routes: io::Result<Vec<HostRoute>>,
) -> Result<String, CommandError> {
    let routes = routes.unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read this host's routes: whether the subnet hides one is not checked");
        Vec::new()
    });
    if !args.rootless && args.mode != NetworkModeArg::Bridge && !firewall::has_program() {
        tracing::warn!("{}: until then no VM can join the network", FirewallError::NoProgram);
    }
    let made = networks.create(&args.name, |others| {
        let kind = args.kind(others, &routes)?;
        let id = NetworkId::random().map_err(CommandError::Random)?;
        Ok::<_, CommandError>(Definition { name: args.name.clone(), id, kind })
    })?;
    if let Err(error) = begin(networks, &made, &args.reserve) {
        // Nobody knows of it yet, so that it goes whole, as if it had been refused before.
        networks.remove(&made.name)?;
        return Err(error);
    }
    Ok(format!("created network {}: {}\n", made.name, summary(&made)))
}

/// What is done for a network before any VM uses it.
fn begin(networks: &Networks, made: &Definition, reserve: &[Reservation]) -> Result<(), CommandError> {
    if let Some(lan) = made.kind.lan() {
        leases::reserve(&networks.folder(&made.name), lan, reserve).map_err(CommandError::Reserve)?;
    }
    if made.is_rootless() {
        // So that whatever forbids it is told now, and the first VM need not wait.
        let joined = networks.holder(&made.name).knock();
        joined.map_err(|source| CommandError::Join { name: made.name.clone(), source })?;
    }
    Ok(())
}

/// Is the holder of a rootless network until nobody uses it.
fn hold(networks: &Networks, name: &NetworkName, keep: bool, log: &Log) -> Result<String, CommandError> {
    let network = networks.find(name)?;
    let Kind::Rootless { lan, world } = &network.kind else {
        return Err(CommandError::NotRootless { name: name.clone(), mode: network.kind.mode() });
    };
    let ready = || {
        // Whoever started it may be gone.
        let _ = writeln!(io::stdout(), "{}", rootless::READY);
    };
    match app::hold(networks, name, (lan, *world), (keep, log), ready)? {
        true => Ok(String::new()),
        false => Ok(format!("{}\n", rootless::HELD)),
    }
}

impl CreateArgs {
    fn kind(&self, others: &[Definition], routes: &[HostRoute]) -> Result<Kind, CommandError> {
        self.check_mode()?;
        match self.mode {
            NetworkModeArg::Nat => {
                let lan = self.lan(subnet::nat_default(), others, routes)?;
                match self.rootless {
                    true => Ok(Kind::Rootless { lan, world: true }),
                    false => Ok(Kind::Nat { lan, allow_host: self.allow_host }),
                }
            }
            NetworkModeArg::HostOnly => {
                let lan = self.lan(subnet::isolated_default(), others, routes)?;
                match self.rootless {
                    true => Ok(Kind::Rootless { lan, world: false }),
                    false => Ok(Kind::HostOnly { lan }),
                }
            }
            NetworkModeArg::Bridge => {
                let bridge = self.bridge.clone().ok_or(CommandError::NoBridge)?;
                if !is_link_name(&bridge) {
                    return Err(CommandError::BridgeName(bridge));
                }
                Ok(Kind::Bridge { bridge, ip_mtu: self.ip_mtu, isolate: self.isolate })
            }
        }
    }

    fn check_mode(&self) -> Result<(), CommandError> {
        let refuse = |mode, flag, why| Err(CommandError::NotInMode { flag, mode, why });
        let of_lan = "addresses and names are those of the bridge's own network";
        match self.mode {
            NetworkModeArg::Bridge if self.subnet.is_some() => refuse("bridge", "--subnet", of_lan),
            NetworkModeArg::Bridge if self.gateway.is_some() => refuse("bridge", "--gateway", of_lan),
            NetworkModeArg::Bridge if !self.reserve.is_empty() => refuse("bridge", "--reserve", of_lan),
            NetworkModeArg::Bridge if self.dns_domain.is_some() => refuse("bridge", "--dns-domain", of_lan),
            NetworkModeArg::Bridge if self.allow_host => {
                refuse("bridge", "--allow-host", "the host's own firewall decides there")
            }
            NetworkModeArg::Bridge if self.rootless => {
                refuse("bridge", "--rootless", "a port of a bridge of this host needs privilege")
            }
            NetworkModeArg::Nat if self.rootless && self.allow_host => {
                refuse("nat, rootless", "--allow-host", "its gateway does not reach this host")
            }
            NetworkModeArg::HostOnly if self.allow_host => {
                refuse("host-only", "--allow-host", "its guests reach the host anyway")
            }
            NetworkModeArg::Nat if self.bridge.is_some() => {
                refuse("nat", "--bridge", "the network has a bridge of its own")
            }
            NetworkModeArg::HostOnly if self.bridge.is_some() => {
                refuse("host-only", "--bridge", "the network has a bridge of its own")
            }
            _ => Ok(()),
        }
    }

    fn lan(
        &self,
        first: Ipv4Subnet,
        others: &[Definition],
        routes: &[HostRoute],
    ) -> Result<OwnLan, CommandError> {
        let taken: Vec<(Ipv4Subnet, &NetworkName)> =
            others.iter().filter_map(|other| Some((other.kind.lan()?.subnet, &other.name))).collect();
        // A network that is up has a route of its own, which is no reason against it.
        let of_others = |route: &&HostRoute| !others.iter().any(|other| other.bridge() == route.interface);
        let routes: Vec<HostRoute> = routes.iter().filter(of_others).cloned().collect();
        let (subnet, verdict) = match self.subnet {
            Some(subnet) => match taken.iter().find(|(other, _)| other.overlaps(subnet)) {
                Some(&(other, name)) => {
                    return Err(CommandError::Taken { subnet, other, name: name.clone() });
                }
                None => (subnet, subnet::judge(subnet, &routes)),
            },
            None => {
                let taken: Vec<Ipv4Subnet> = taken.iter().map(|(subnet, _)| *subnet).collect();
                subnet::pick_apart(first, &routes, &taken).ok_or(CommandError::NoneLeft)?
            }
        };
        if let Some(notice) = subnet::notice(subnet, verdict) {
            notice.log();
        }
        let gateway = self.gateway.or(subnet.host(1)).expect("a prefix of at most 30 bits leaves two hosts");
        if !subnet.is_host(gateway) {
            return Err(CommandError::Gateway { gateway, subnet });
        }
        let own = || format!("{}.{}", self.name, DnsConfig::DEFAULT_DOMAIN);
        let dns_domain = self.dns_domain.clone().unwrap_or_else(own);
        Ok(OwnLan { subnet, gateway, dns_domain, ip_mtu: self.ip_mtu, isolate: self.isolate })
    }
}

/// A network in a few words.
fn summary(network: &Definition) -> String {
    let mut text = network.kind.mode().to_owned();
    match network.kind.lan() {
        Some(lan) => {
            let _ = write!(text, ", subnet {}, gateway {}", lan.subnet, lan.gateway);
        }
        None => {
            let _ = write!(text, ", on {}", network.bridge());
        }
    }
    if network.kind.isolate() {
        text.push_str(", guests isolated");
    }
    text
}

fn list(networks: &Networks) -> Result<String, CommandError> {
    let mut text = format!("{:<20} {:<10} {:<18} {:<12} USERS\n", "NAME", "MODE", "SUBNET", "BRIDGE");
    for network in networks.all()? {
        let users = networks.users(&network.name)?.len();
        let subnet = network.kind.lan().map_or("-".to_owned(), |lan| lan.subnet.to_string());
        let (mode, bridge) = (network.kind.mode(), network.bridge());
        let _ = writeln!(text, "{:<20} {mode:<10} {subnet:<18} {bridge:<12} {users}", network.name.as_str());
    }
    Ok(text)
}

/// What `inspect --json` prints.
#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    id: String,
    mode: &'static str,
    state: &'static str,
    bridge: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    subnet: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dns_domain: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allow_host: Option<bool>,
    ip_mtu: u16,
    isolate: bool,
    folder: PathBuf,
    users: Vec<User>,
    reservations: Vec<ReservationReport>,
    leases: Vec<LeaseReport>,
}

fn inspect(networks: &Networks, name: &NetworkName, json: bool) -> Result<String, CommandError> {
    let network = networks.find(name)?;
    let users = networks.users(name)?;
    let lan = network.kind.lan();
    let (reservations, leases) = match lan {
        Some(lan) => leases::report(&networks.folder(name), lan).map_err(CommandError::Leases)?,
        None => Default::default(),
    };
    let report = Report {
        name: name.as_str(),
        id: network.id.to_string(),
        mode: network.kind.mode(),
        state: if users.is_empty() { "down" } else { "up" },
        bridge: network.bridge(),
        subnet: lan.map(|lan| lan.subnet.to_string()),
        gateway: lan.map(|lan| lan.gateway),
        dns_domain: lan.map(|lan| &*lan.dns_domain),
        allow_host: match network.kind {
            Kind::Nat { allow_host, .. } => Some(allow_host),
            _ => None,
        },
        ip_mtu: network.kind.ip_mtu().get(),
        isolate: network.kind.isolate(),
        folder: networks.folder(name),
        users,
        reservations,
        leases,
    };
    if json {
        let json = serde_json::to_string_pretty(&report).expect("strings and numbers are JSON");
        return Ok(json + "\n");
    }
    Ok(in_words(&report))
}

fn in_words(report: &Report<'_>) -> String {
    let mut text = String::new();
    let mut line = |what: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{what:<12} {value}");
    };
    line("name", &report.name);
    line("mode", &report.mode);
    line("state", &report.state);
    line("bridge", &report.bridge);
    if let (Some(subnet), Some(gateway), Some(domain)) = (&report.subnet, &report.gateway, report.dns_domain)
    {
        line("subnet", subnet);
        line("gateway", gateway);
        line("domain", &domain);
    }
    if let Some(allow_host) = report.allow_host {
        line("allow host", &allow_host);
    }
    line("ip mtu", &report.ip_mtu);
    line("isolate", &report.isolate);
    line("folder", &report.folder.display());
    for user in &report.users {
        let guest = user.guest.map_or("no address yet".to_owned(), |addr| addr.to_string());
        let socket = user.socket.as_ref().map_or("-".to_owned(), |path| path.display().to_string());
        line("user", &format!("process {}, guest {guest}, socket {socket}", user.pid));
    }
    let named = |name: &Option<String>| name.as_ref().map_or(String::new(), |name| format!(", {name}"));
    for kept in &report.reservations {
        line("reserved", &format!("{} for {}{}", kept.ip, kept.client, named(&kept.host_name)));
    }
    for lease in &report.leases {
        let left_min = lease.seconds_left / 60;
        let text = format!("{} of {}{}, {left_min} min left", lease.ip, lease.mac, named(&lease.host_name));
        line("lease", &text);
    }
    text
}
