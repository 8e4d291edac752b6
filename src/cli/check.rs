//! Flags judged together: what cannot be said by one value alone.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::RawFd;
use std::os::unix;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::activation::PassedError;
use super::bridge;
use super::member;
use super::subnet::{self, Notice};
use super::translate;
use super::values::{self, ValueError};
use super::{Args, ModeArg, UdpFilteringArg, UdpMappingArg, UplinkArg};
use crate::addr::Ipv4Subnet;
use crate::capture::Settings;
use crate::config::{
    Attach, Config, DnsConfig, Lan, LimitsConfig, LinkConfig, Mode, NatConfig, NetworkConfig, PcapConfig,
    Protocol, Publish, PublishList, PublishRange, UdpConfig, UdpFiltering, UdpMapping, WorkersConfig,
};
use crate::limits;
use crate::network::manager::NetworkError;
use crate::network::name::NetworkName;
use crate::uplink::sys::inherited::{self, InheritedError};
use crate::uplink::sys::routes::HostRoute;
use crate::uplink::sys::tap::InheritedTapError;

/// Why flags do not go together, or not on this host.
#[derive(Debug, Error)]
pub enum UsageError {
    /// A limit of flows where nobody follows them.
    #[error(
        "{0} flows=: on a link vunet carries frames and follows no flows; limit rate= and packets=, or translate \
         there with --nat packet"
    )]
    FlowsOfLink(&'static str),
    /// Nothing to attach to.
    #[error(
        "neither --socket-path nor --fd is given, and no service manager passed a socket, so no VM can attach: give \
         --socket-path PATH (or --fd N, if a parent process passes the socket)"
    )]
    NoSocket,
    /// `vunet ctl` without a socket.
    #[error(
        "no backend is named: give --control PATH, the socket the backend was started with, or set \
         VUNET_CONTROL"
    )]
    NoControl,
    /// Two things to attach to.
    #[error(
        "--socket-path {} and --fd {fd} both say how the VM attaches: give one of them", path.display()
    )]
    TwoSockets {
        /// The path.
        path: PathBuf,
        /// The descriptor's number.
        fd: i32,
    },
    /// One path for the VM and for the control API.
    #[error(
        "--socket-path and --control are the same path {}: give each a path of its own", .0.display()
    )]
    SameSocket(PathBuf),
    /// `--client` with an inherited socket.
    #[error(
        "--client goes with --socket-path only: --fd {0} is a socket that already listens or is connected; \
         drop --client"
    )]
    ClientFd(i32),
    /// A path no unix socket can have.
    #[error(
        "--socket-path {}: no unix socket can have this path ({reason}): give a shorter one, without NUL \
         bytes", path.display()
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Why, in the system's words.
        reason: String,
    },
    /// A flag beside a socket of the service manager's.
    #[error(
        "{0} and the socket that the service manager passed (LISTEN_FDS) both say how the VM attaches: drop {0}, or start \
         vunet without a socket unit"
    )]
    PassedBeside(String),
    /// What the service manager passed.
    #[error(transparent)]
    Passed(#[from] PassedError),
    /// The socket it passed is of no use.
    #[error(
        "LISTEN_FDS: the socket that the service manager passed as descriptor {fd}: {reason}; have it pass a unix stream \
         socket (ListenStream=/PATH)"
    )]
    PassedSocket {
        /// Its number.
        fd: i32,
        /// Why.
        reason: InheritedError,
    },
    /// The inherited descriptor is of no use.
    #[error(
        "--fd {fd}: {reason}; have the parent pass a unix stream socket, listening or connected, and give \
         its number"
    )]
    Inherited {
        /// Its number.
        fd: i32,
        /// Why.
        reason: InheritedError,
    },
    /// A flag of NAT in a mode without it.
    #[error("{flag} needs --mode nat: {why} in mode {mode}; drop it or use --mode nat")]
    NeedsNat {
        /// The flag, with its value.
        flag: String,
        /// The mode asked for.
        mode: &'static str,
        /// What the mode lacks.
        why: &'static str,
    },
    /// A flag of our own gateway on a network that has one.
    #[error("{flag} does not go with --mode bridge: {why}; drop it")]
    NotWithBridge {
        /// The flag, with its value.
        flag: String,
        /// Why it would do nothing.
        why: &'static str,
    },
    /// Bridge mode without a network.
    #[error(
        "--mode bridge needs to know which network the guest joins: give --uplink bridge=BRIDGE (ip link show \
         type bridge lists them), tap, tap=IFNAME, tap-fd=N or macvtap=IFNAME"
    )]
    BridgeNeedsUplink,
    /// Bridge mode over sockets.
    #[error(
        "--mode bridge cannot use --uplink sockets: sockets carry no frames; give --uplink bridge=BRIDGE, tap, \
         tap=IFNAME, tap-fd=N or macvtap=IFNAME"
    )]
    BridgeOverSockets,
    /// A link in a mode that puts nothing on it.
    #[error(
        "--uplink {0} needs --mode nat or bridge: no frame leaves the guest's own network in other modes; give one \
         of them, or drop --uplink"
    )]
    LinkNeedsFrames(UplinkArg),
    /// A way to translate where nothing is.
    #[error("{flag} needs --mode nat: nothing is translated in other modes; drop it")]
    NeedsNatMode {
        /// The flag, with its value.
        flag: String,
    },
    /// A flag of packet translation without it.
    #[error("{flag} needs --nat packet and a link (--uplink bridge=BRIDGE, tap, …): {why}; drop it")]
    NeedsPacketNat {
        /// The flag.
        flag: &'static str,
        /// What there is instead.
        why: &'static str,
    },
    /// Packet translation onto nothing.
    #[error(
        "--nat packet needs a link to put packets on: give --uplink bridge=BRIDGE (ip link show type bridge lists \
         them), tap, tap=IFNAME, tap-fd=N or macvtap=IFNAME"
    )]
    PacketNatNeedsLink,
    /// Sockets on a link.
    #[error(
        "--nat sockets does not go with --uplink {0}: sockets have this host's addresses, on whatever link; give \
         --nat packet, or drop --uplink"
    )]
    SocketsNatOnLink(UplinkArg),
    /// The kernel without a network of its own.
    #[error(
        "--nat kernel is what named networks do: make one (vunet network create NAME --mode nat) and join it \
         (--network NAME)"
    )]
    KernelNatAlone,
    /// A flag without meaning where packets are translated.
    #[error("{flag} does not go with --nat packet: {why}; drop it")]
    NotWithPacketNat {
        /// The flag, with its value.
        flag: String,
        /// Why it would do nothing.
        why: &'static str,
    },
    /// A router for an address that DHCP leases.
    #[error(
        "--nat-gateway {0} goes with an address of yours: DHCP tells its own router; give --nat-address IP/PREFIX too, \
         or drop --nat-gateway"
    )]
    NatGatewayWithDhcp(Ipv4Addr),
    /// A router that is not on the link.
    #[error(
        "--nat-gateway {router} is no other host of {link} than {addr}: give the address of the link's router"
    )]
    NatGateway {
        /// The router.
        router: Ipv4Addr,
        /// Our own address.
        addr: Ipv4Addr,
        /// The link's network.
        link: Ipv4Subnet,
    },
    /// The link's network and the guest's are one.
    #[error(
        "--nat-address {addr}: the link's network {link} overlaps the guest's {guests}: give the guest another with \
         --subnet"
    )]
    NatAddressOverlaps {
        /// Our own address.
        addr: Ipv4Addr,
        /// The link's network.
        link: Ipv4Subnet,
        /// The guest's network.
        guests: Ipv4Subnet,
    },
    /// A flag of bridge mode in another.
    #[error("{flag} needs --mode bridge: {why}; drop it")]
    NeedsBridge {
        /// The flag, with its value.
        flag: String,
        /// Why it would do nothing.
        why: &'static str,
    },
    /// A macvtap for a guest of unknown address.
    #[error(
        "--uplink macvtap={0} needs --mac: the interface gets frames of one address only; give --mac MAC and \
         the same to the VM"
    )]
    MacVtapNeedsMac(String),
    /// Not one descriptor for each queue pair.
    #[error(
        "--uplink tap-fd: {given} descriptors for {queues} queue pairs: pass one TAP queue for each of --queues"
    )]
    TapFdCount {
        /// Descriptors given.
        given: usize,
        /// Queue pairs.
        queues: u8,
    },
    /// Queues of different interfaces.
    #[error(
        "--uplink tap-fd: descriptor {fd} is of interface {name}, the first of {first}: pass queues of one"
    )]
    TapFdInterfaces {
        /// The descriptor.
        fd: i32,
        /// Its interface.
        name: String,
        /// That of the first.
        first: String,
    },
    /// An inherited descriptor that is no TAP.
    #[error("--uplink tap-fd={fd}: {}", chain(reason))]
    TapFd {
        /// Its number.
        fd: i32,
        /// Why.
        reason: InheritedTapError,
    },
    /// A flag whose meaning is the named network's.
    #[error("{flag} does not go with --network {network}: {why}; drop it")]
    NotWithNetwork {
        /// The flag.
        flag: &'static str,
        /// The network.
        network: NetworkName,
        /// Why it would do nothing.
        why: &'static str,
    },
    /// The named network.
    #[error("--network: {}", chain(.0))]
    Network(#[source] Box<NetworkError>),
    /// A flag of DNS together with `--no-dns`.
    #[error("{flag} and --no-dns contradict each other: nothing answers DNS then; drop one of them")]
    NeedsDns {
        /// The flag, with its value.
        flag: String,
    },
    /// An address that no host of the subnet can have.
    #[error("{flag} {addr} is no host of the subnet {subnet}: give one from {first} to {last}, or --subnet")]
    NotInSubnet {
        /// `--gateway` or `--guest-ip`.
        flag: &'static str,
        /// Its value.
        addr: Ipv4Addr,
        /// The subnet.
        subnet: Ipv4Subnet,
        /// Its first host.
        first: Ipv4Addr,
        /// Its last host.
        last: Ipv4Addr,
    },
    /// Guest and gateway with one address.
    #[error("--guest-ip {0} is the gateway's address: give the guest another, or --gateway")]
    GuestIsGateway(Ipv4Addr),
    /// One host port for two guest ports.
    #[error("{first} and {second} take one port of this host: publish each host port once")]
    PublishedTwice {
        /// What takes it.
        first: Publish,
        /// What takes it again.
        second: Publish,
    },
    /// A flag given more often than its bound.
    #[error("{flag}: {count} {what} are more than the {max} allowed: give fewer")]
    TooMany {
        /// The flag.
        flag: &'static str,
        /// How many there are.
        count: usize,
        /// Of what.
        what: &'static str,
        /// How many there may be.
        max: usize,
    },
    /// A bound of a capture that is not asked for.
    #[error("{flag} is of no use without --pcap: give --pcap FILE, or leave it out")]
    NeedsPcap {
        /// The flag.
        flag: &'static str,
    },
    /// Something a command has no use for.
    #[error("{command} has no use for {extra}: leave it out")]
    OfNoUse {
        /// The command.
        command: String,
        /// What was given.
        extra: &'static str,
    },
    /// A name that becomes too long under the domain.
    #[error("{flag}: {reason}; shorten it or --dns-domain")]
    Name {
        /// The flag.
        flag: &'static str,
        /// Why.
        reason: ValueError,
    },
}

/// The capture from the start on.
fn pcap(args: &Args) -> Result<Option<PcapConfig>, UsageError> {
    let Some(path) = args.pcap.clone() else {
        let given = [
            ("--pcap-snaplen", args.pcap_snaplen.is_some()),
            ("--pcap-max-bytes", args.pcap_max_bytes.is_some()),
        ];
        return match given.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(UsageError::NeedsPcap { flag }),
            None => Ok(None),
        };
    };
    let all = Settings::default();
    let snaplen = args.pcap_snaplen.and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(all.snaplen);
    let settings = Settings { snaplen: snaplen.min(all.snaplen), bytes_max: args.pcap_max_bytes, ..all };
    Ok(Some(PcapConfig { path, settings }))
}

/// An error and what caused it, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(" ({})", chain(cause))).unwrap_or_default();
    format!("{error}{cause}")
}

/// See [`Args::into_config`].
pub(super) fn into_config(
    args: Args,
    routes: io::Result<Vec<HostRoute>>,
) -> Result<(Config, Vec<Notice>), UsageError> {
    let mut notices = Vec::new();
    two_sockets(&args)?;
    let Parts { lan, dns, mode, link, network } = match &args.network {
        Some(name) => member::parts(&args, name)?,
        None => alone(&args, routes, &mut notices)?,
    };
    let limits = limits(&args, link.as_ref())?;
    let config = Config {
        one_off: args.one_off,
        mac: args.mac,
        lan,
        dns,
        mode,
        link,
        network,
        workers: WorkersConfig {
            queue_pairs: args.queues,
            cpus: args.pin.as_ref().map(|list| list.0.clone()).unwrap_or_default(),
            busy_poll_us: args.busy_poll_us,
        },
        limits,
        control: args.control.clone(),
        metrics: args.metrics,
        pcap: pcap(&args)?,
        log: args.log(),
        no_peek_off: args.no_peek_off,
        // Last: it takes the descriptor of --fd.
        attach: attach(args)?,
    };
    Ok((config, notices))
}

/// The guest's network, as far as it depends on whether it is shared.
pub(super) struct Parts {
    pub(super) lan: Lan,
    pub(super) dns: DnsConfig,
    pub(super) mode: Mode,
    pub(super) link: Option<LinkConfig>,
    pub(super) network: Option<NetworkConfig>,
}

/// How much the guest may send and be sent on `link`, or without one.
pub(super) fn limits(args: &Args, link: Option<&LinkConfig>) -> Result<LimitsConfig, UsageError> {
    let given = [("--limit-from-guest", args.limit_from_guest), ("--limit-to-guest", args.limit_to_guest)];
    let [from_guest, to_guest] = given.map(|(_, spec)| spec.unwrap_or_default());
    let limits = LimitsConfig { from_guest, to_guest };
    if limits.limits_flows() && link.is_some_and(|link| link.translate.is_none()) {
        let limited = given.into_iter().find(|(_, spec)| spec.is_some_and(|spec| spec.flows.is_some()));
        return Err(UsageError::FlowsOfLink(limited.map_or("--limit-from-guest", |(flag, _)| flag)));
    }
    Ok(limits)
}

/// A network of the guest's own.
pub(super) fn alone(
    args: &Args,
    routes: io::Result<Vec<HostRoute>>,
    notices: &mut Vec<Notice>,
) -> Result<Parts, UsageError> {
    let mode = mode(args)?;
    let translates = translate::is_asked(args)?;
    let link = if translates { None } else { bridge::link(args)? };
    if link.is_some() {
        let (lan, dns) = bridge::no_gateway(args);
        return Ok(Parts { lan, dns, mode, link, network: None });
    }
    let lan = lan(args, routes, notices)?;
    let dns = dns(args, args.domain(), lan.gateway)?;
    let link = match &mode {
        Mode::Nat(nat) if translates => Some(translate::link(args, &lan, nat)?),
        _ => None,
    };
    Ok(Parts { lan, dns, mode, link, network: None })
}

fn attach(args: Args) -> Result<Attach, UsageError> {
    if let Some(fd) = args.passed {
        return passed(&args, fd);
    }
    match (args.socket_path, args.fd) {
        (None, None) => Err(UsageError::NoSocket),
        (Some(path), Some(fd)) => Err(UsageError::TwoSockets { path, fd }),
        (None, Some(fd)) if args.client => Err(UsageError::ClientFd(fd)),
        (None, Some(fd)) => inherited::unix_stream(fd)
            .map(Attach::Inherited)
            .map_err(|reason| UsageError::Inherited { fd, reason }),
        (Some(path), None) => {
            let reason = match unix::net::SocketAddr::from_pathname(&path) {
                Ok(addr) if addr.as_pathname().is_some() => None,
                Ok(_) => Some("it is empty".to_owned()),
                Err(error) => Some(error.to_string()),
            };
            match reason {
                Some(reason) => Err(UsageError::SocketPath { path, reason }),
                None if args.client => Ok(Attach::Connect(path)),
                None => Ok(Attach::Listen(path)),
            }
        }
    }
}

/// Whether the VM's socket and that of the control API are told apart.
fn two_sockets(args: &Args) -> Result<(), UsageError> {
    match (&args.socket_path, &args.control) {
        (Some(path), Some(control)) if absolute(path) == absolute(control) => {
            Err(UsageError::SameSocket(control.clone()))
        }
        _ => Ok(()),
    }
}

/// The same path from anywhere, without looking at what is there.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Judges the sockets of a run that is only asked about, as that would itself. Without one it is not said in full yet.
pub(super) fn judge_sockets(args: &Args) -> Result<(), UsageError> {
    two_sockets(args)?;
    match (&args.socket_path, args.fd) {
        (Some(path), Some(fd)) => Err(UsageError::TwoSockets { path: path.clone(), fd }),
        (None, Some(fd)) if args.client => Err(UsageError::ClientFd(fd)),
        (None, Some(fd)) => inherited::examine(fd).map_err(|reason| UsageError::Inherited { fd, reason }),
        (_, None) => Ok(()),
    }
}

/// The socket of a service manager, which `--fd` may name too.
fn passed(args: &Args, fd: RawFd) -> Result<Attach, UsageError> {
    let beside = match (&args.socket_path, args.fd, args.client) {
        (Some(path), ..) => Some(format!("--socket-path {}", path.display())),
        (_, Some(other), _) if other != fd => Some(format!("--fd {other}")),
        (.., true) => Some("--client".to_owned()),
        _ => None,
    };
    match beside {
        Some(flag) => Err(UsageError::PassedBeside(flag)),
        None => inherited::unix_stream(fd)
            .map(Attach::Inherited)
            .map_err(|reason| UsageError::PassedSocket { fd, reason }),
    }
}

fn mode(args: &Args) -> Result<Mode, UsageError> {
    let name = match args.mode {
        ModeArg::Nat => return nat(args).map(Mode::Nat),
        ModeArg::HostOnly => "host-only",
        ModeArg::None => "none",
        ModeArg::Bridge => return Ok(Mode::Isolated),
    };
    let refuse = |flag: String, why| Err(UsageError::NeedsNat { flag, mode: name, why });
    if let Some(flag) = publishing_flag(args) {
        return refuse(flag.to_owned(), "no port of this host leads to the guest");
    }
    if args.allow_host_loopback {
        return refuse("--allow-host-loopback".to_owned(), "nothing leads from the guest to this host");
    }
    if let Some(server) = args.dns_server.first() {
        return refuse(format!("--dns-server {server}"), "only local names are answered");
    }
    if args.udp_mapping.is_some() {
        return refuse("--udp-mapping".to_owned(), "no datagram leaves for the world");
    }
    if args.udp_filtering.is_some() {
        return refuse("--udp-filtering".to_owned(), "no datagram comes from the world");
    }
    if args.uplink == Some(UplinkArg::Sockets) {
        return refuse("--uplink sockets".to_owned(), "no frame leaves for the world");
    }
    Ok(Mode::Isolated)
}

pub(super) fn nat(args: &Args) -> Result<NatConfig, UsageError> {
    bound("--dns-server", "resolvers", args.dns_server.len(), limits::DNS_SERVERS_MAX)?;
    let mut dns_servers = Vec::new();
    for server in &args.dns_server {
        if !dns_servers.contains(server) {
            dns_servers.push(*server);
        }
    }
    Ok(NatConfig {
        udp: udp(args),
        publish: published(args)?,
        allow_host_loopback: args.allow_host_loopback,
        dns_servers,
    })
}

fn udp(args: &Args) -> UdpConfig {
    let mapping = args.udp_mapping.map(|mapping| match mapping {
        UdpMappingArg::EndpointIndependent => UdpMapping::EndpointIndependent,
        UdpMappingArg::AddressAndPortDependent => UdpMapping::AddressAndPortDependent,
    });
    let filtering = args.udp_filtering.map(|filtering| match filtering {
        UdpFilteringArg::EndpointIndependent => UdpFiltering::EndpointIndependent,
        UdpFilteringArg::AddressDependent => UdpFiltering::AddressDependent,
        UdpFilteringArg::AddressAndPortDependent => UdpFiltering::AddressAndPortDependent,
    });
    UdpConfig { mapping: mapping.unwrap_or_default(), filtering: filtering.unwrap_or_default() }
}

/// What the flags publish, in the order of the flags.
pub(super) fn ranges(args: &Args) -> impl Iterator<Item = PublishRange> {
    let listed = args.tcp_ports.iter().chain(&args.udp_ports).flat_map(|list| &list.0);
    args.publish.iter().chain(listed).copied()
}

/// A flag that publishes something.
pub(super) fn publishing_flag(args: &Args) -> Option<&'static str> {
    let is_given = |lists: &[PublishList]| lists.iter().any(|list| !list.0.is_empty());
    let given = [
        (!args.publish.is_empty(), "--publish"),
        (is_given(&args.tcp_ports), "--tcp-ports"),
        (is_given(&args.udp_ports), "--udp-ports"),
    ];
    given.into_iter().find(|(given, _)| *given).map(|(_, flag)| flag)
}

/// Every port by itself; no host port twice, or the second could not be bound.
pub(super) fn published(args: &Args) -> Result<Vec<Publish>, UsageError> {
    let count = ranges(args).map(|range| range.count()).sum();
    let flag = publishing_flag(args).unwrap_or("--publish");
    bound(flag, "ports", count, limits::PUBLISHED_PORTS_MAX)?;
    let mut ports: Vec<Publish> = Vec::with_capacity(count);
    let mut at_port: HashMap<(Protocol, u16), Vec<usize>> = HashMap::new();
    for port in ranges(args).flat_map(PublishRange::iter) {
        let of_number = at_port.entry((port.protocol, port.host.port())).or_default();
        if let Some(first) = of_number.iter().map(|at| &ports[*at]).find(|other| other.collides(&port)) {
            return Err(UsageError::PublishedTwice { first: *first, second: port });
        }
        of_number.push(ports.len());
        ports.push(port);
    }
    Ok(ports)
}

fn bound(flag: &'static str, what: &'static str, count: usize, max: usize) -> Result<(), UsageError> {
    if count > max { Err(UsageError::TooMany { flag, count, what, max }) } else { Ok(()) }
}

fn lan(
    args: &Args,
    routes: io::Result<Vec<HostRoute>>,
    notices: &mut Vec<Notice>,
) -> Result<Lan, UsageError> {
    let subnet = match args.mode {
        ModeArg::Nat => nat_subnet(args, routes, notices),
        // Nothing of this network meets a route of the host.
        ModeArg::HostOnly | ModeArg::None | ModeArg::Bridge => {
            args.subnet.unwrap_or_else(subnet::isolated_default)
        }
    };
    let first = subnet.host(1).expect("a prefix of at most 30 bits leaves two hosts");
    let last = Ipv4Addr::from_bits(subnet.broadcast().to_bits() - 1);
    let host_of_subnet = |flag, addr| {
        if subnet.is_host(addr) {
            Ok(addr)
        } else {
            Err(UsageError::NotInSubnet { flag, addr, subnet, first, last })
        }
    };
    let gateway = host_of_subnet("--gateway", args.gateway.unwrap_or(first))?;
    let guest = args.guest_ip.map(|addr| host_of_subnet("--guest-ip", addr)).transpose()?;
    if guest == Some(gateway) {
        return Err(UsageError::GuestIsGateway(gateway));
    }
    Ok(Lan { subnet, gateway, guest, ip_mtu: args.ip_mtu, dhcp: !args.no_dhcp })
}

/// The subnet asked for, or the default. An address given without a subnet means one of the default's,
/// so the default does not move then.
fn nat_subnet(args: &Args, routes: io::Result<Vec<HostRoute>>, notices: &mut Vec<Notice>) -> Ipv4Subnet {
    let routes = routes.unwrap_or_else(|error| {
        notices.push(Notice::Warn(format!(
            "cannot read this host's routes ({error}): whether the guest's subnet hides one of its networks \
             is not checked"
        )));
        Vec::new()
    });
    let fixed = args.subnet.or_else(|| args.gateway.or(args.guest_ip).map(|_| subnet::nat_default()));
    let (subnet, verdict) = match fixed {
        Some(subnet) => (subnet, subnet::judge(subnet, &routes)),
        None => subnet::pick(&routes),
    };
    notices.extend(subnet::notice(subnet, verdict));
    subnet
}

pub(super) fn dns(args: &Args, domain: &str, gateway: Ipv4Addr) -> Result<DnsConfig, UsageError> {
    let domain = domain.to_owned();
    if args.no_dns {
        let flag = if let Some(server) = args.dns_server.first() {
            format!("--dns-server {server}")
        } else if let Some(domain) = &args.dns_domain {
            format!("--dns-domain {domain}")
        } else if !args.dns_host.is_empty() {
            "--dns-host".to_owned()
        } else {
            return Ok(DnsConfig { enabled: false, domain, hosts: Vec::new() });
        };
        return Err(UsageError::NeedsDns { flag });
    }
    bound("--dns-host", "names", args.dns_host.len(), limits::DNS_HOSTS_MAX)?;
    let mut hosts: Vec<(String, IpAddr)> = Vec::new();
    for host in &args.dns_host {
        let name =
            host.qualified(&domain).map_err(|reason| UsageError::Name { flag: "--dns-host", reason })?;
        let entry = (name, host.addr);
        if !hosts.contains(&entry) {
            hosts.push(entry);
        }
    }
    // A domain that leaves no room for it is too long.
    values::under(DnsConfig::GATEWAY_LABEL, &domain)
        .map_err(|reason| UsageError::Name { flag: "--dns-domain", reason })?;
    let given = hosts.len();
    for name in DnsConfig::gateway_names(&domain) {
        // A name the user gave an address keeps that one alone.
        if hosts[..given].iter().all(|(taken, _)| *taken != name) {
            hosts.push((name, IpAddr::V4(gateway)));
        }
    }
    Ok(DnsConfig { enabled: true, domain, hosts })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::cli::lines::whole as args;
    use crate::config::IpMtu;
    use crate::config::LogConfig;

    fn route(network: [u8; 4], prefix_len: u8) -> HostRoute {
        HostRoute { network: network.into(), prefix_len, interface: "eth0".to_owned() }
    }

    /// The configuration of `line` behind `--socket-path`, on a host with one ordinary route.
    fn config(line: &str) -> Config {
        let routes = Ok(vec![route([192, 0, 2, 0], 24)]);
        let (config, notices) =
            args(&format!("--socket-path vm.sock {line}")).into_config(routes).expect(line);
        assert_eq!(notices, [], "{line}");
        config
    }

    fn error(line: &str) -> String {
        args(line).into_config(Ok(Vec::new())).expect_err(line).to_string()
    }

    fn nat_of(config: &Config) -> &NatConfig {
        match &config.mode {
            Mode::Nat(nat) => nat,
            Mode::Isolated => panic!("isolated"),
        }
    }

    #[test]
    fn a_socket_path_alone_is_the_documented_defaults() {
        let config = config("");
        assert!(matches!(&config.attach, Attach::Listen(path) if path.as_os_str() == "vm.sock"));
        assert!(!config.one_off && !config.no_peek_off);
        assert_eq!(config.mac, None);
        assert_eq!(
            config.lan,
            Lan {
                subnet: "10.0.2.0/24".parse().unwrap(),
                gateway: Ipv4Addr::new(10, 0, 2, 1),
                guest: None,
                ip_mtu: IpMtu::DEFAULT,
                dhcp: true,
            }
        );
        let gateway = IpAddr::V4(config.lan.gateway);
        let names = ["host.vunet.internal", "host.docker.internal", "gateway.docker.internal"];
        assert_eq!(
            config.dns,
            DnsConfig {
                enabled: true,
                domain: "vunet.internal".to_owned(),
                hosts: names.map(|name| (name.to_owned(), gateway)).to_vec(),
            }
        );
        assert_eq!(config.mode, Mode::Nat(NatConfig::default()));
        assert_eq!(config.workers, WorkersConfig { queue_pairs: 1, cpus: Vec::new(), busy_poll_us: 0 });
        assert_eq!(config.limits, LimitsConfig::default());
        assert_eq!(config.log, LogConfig { level: "info".to_owned(), json: false });
    }

    #[test]
    fn each_behaviour_of_udp_can_be_asked_for_by_its_name_in_the_rfc() {
        use UdpFiltering::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
        for (name, expected) in [
            ("endpoint-independent", EndpointIndependent),
            ("address-dependent", AddressDependent),
            ("address-and-port-dependent", AddressAndPortDependent),
        ] {
            let config = config(&format!("--udp-filtering {name}"));
            let mapping = UdpMapping::EndpointIndependent;
            assert_eq!(nat_of(&config).udp, UdpConfig { mapping, filtering: expected });
        }
        let config = config("--udp-mapping endpoint-independent");
        assert_eq!(nat_of(&config).udp, UdpConfig::default());
    }

    #[test]
    fn limits_hold_wherever_they_can_be_kept() {
        let both = "--limit-from-guest rate=10mbit,flows=9 --limit-to-guest packets=500";
        for line in ["", "--mode nat --uplink bridge=br0 --nat-address 192.0.2.9/24", "--mode host-only"] {
            let limits = config(&format!("{line} {both}")).limits;
            assert_eq!(limits.from_guest, "rate=10mbit,flows=9".parse().unwrap());
            assert_eq!(limits.to_guest, "packets=500".parse().unwrap());
        }
        let bridge = "--mode bridge --uplink bridge=br0";
        assert!(!config(&format!("{bridge} --limit-to-guest rate=1gbit")).limits.to_guest.is_none());
        for flag in ["--limit-from-guest", "--limit-to-guest"] {
            let error = error(&format!("{bridge} {flag} rate=1gbit,flows=9"));
            assert!(error.contains(flag) && error.contains("--nat packet"), "{error}");
        }
    }

    #[test]
    fn every_flag_reaches_the_configuration() {
        let config = config(
            "--client --one-off --mode nat --uplink sockets --mac 52:54:00:00:00:09 --ip-mtu 9000 \
             --subnet 10.9.0.0/16 --gateway 10.9.0.254 --guest-ip 10.9.9.9 --no-dhcp --publish 8080:80 \
             --publish udp:127.0.0.1:0:53 --allow-host-loopback --dns-server 192.0.2.1 \
             --dns-server 192.0.2.1:53 --dns-domain Lan --dns-host db=10.9.0.7 --log-level debug \
             --log-format json --no-peek-off --queues 4 --pin 1,4-6 --busy-poll-us 50 \
             --udp-mapping address-and-port-dependent --udp-filtering address-dependent",
        );
        assert_eq!(
            config.workers,
            WorkersConfig { queue_pairs: 4, cpus: vec![1, 4, 5, 6], busy_poll_us: 50 }
        );
        assert!(matches!(&config.attach, Attach::Connect(path) if path.as_os_str() == "vm.sock"));
        assert!(config.one_off && config.no_peek_off);
        assert_eq!(config.mac.unwrap().to_string(), "52:54:00:00:00:09");
        assert_eq!(
            config.lan,
            Lan {
                subnet: "10.9.0.0/16".parse().unwrap(),
                gateway: Ipv4Addr::new(10, 9, 0, 254),
                guest: Some(Ipv4Addr::new(10, 9, 9, 9)),
                ip_mtu: IpMtu::new(9000).unwrap(),
                dhcp: false,
            }
        );
        let nat = nat_of(&config);
        assert_eq!(nat.publish.len(), 2);
        assert!(nat.allow_host_loopback);
        assert_eq!(nat.udp.mapping, UdpMapping::AddressAndPortDependent);
        assert_eq!(nat.udp.filtering, UdpFiltering::AddressDependent);
        assert_eq!(nat.dns_servers, ["192.0.2.1:53".parse().unwrap()]);
        assert_eq!(config.dns.domain, "lan");
        assert_eq!(config.dns.hosts[0], ("db.lan".to_owned(), "10.9.0.7".parse().unwrap()));
        assert_eq!(config.dns.hosts[1], ("host.lan".to_owned(), "10.9.0.254".parse().unwrap()));
        assert_eq!(config.log, LogConfig { level: "debug".to_owned(), json: true });
    }

    #[test]
    fn host_only_and_none_have_nothing_that_leads_out() {
        for mode in ["host-only", "none"] {
            let line = format!("--socket-path vm.sock --mode {mode} --dns-host db=10.0.0.9");
            // A route over the default subnet is nothing to speak of: no frame meets it.
            let routes = Ok(vec![route([10, 0, 0, 0], 8)]);
            let (config, notices) = args(&line).into_config(routes).unwrap();
            assert_eq!(config.mode, Mode::Isolated);
            assert_eq!(config.lan.subnet.to_string(), "10.0.0.0/24");
            assert_eq!(notices, []);
            for flag in [
                "--publish 80:80",
                "--tcp-ports 80",
                "--udp-ports 80",
                "--allow-host-loopback",
                "--dns-server 192.0.2.1",
                "--uplink sockets",
                "--udp-mapping endpoint-independent",
                "--udp-filtering address-dependent",
            ] {
                let error = error(&format!("{line} {flag}"));
                for part in [flag.split(' ').next().unwrap(), mode, "--mode nat", "drop it"] {
                    assert!(error.contains(part), "'{part}' is not in: {error}");
                }
            }
        }
    }

    #[test]
    fn attachment_is_said_once() {
        let long = format!("--socket-path {}", "x".repeat(200));
        for (line, part) in [
            ("", "give --socket-path PATH"),
            ("--one-off", "neither --socket-path nor --fd"),
            ("--client", "give --socket-path PATH"),
            ("--socket-path a --fd 3", "--socket-path a and --fd 3 both"),
            ("--client --fd 3", "drop --client"),
            ("--fd 2", "--fd 2: descriptors below 3"),
            ("--fd -1", "--fd -1: descriptors below 3"),
            ("--fd 1000000", "--fd 1000000: no such descriptor is open"),
            (&long, "give a shorter one"),
        ] {
            let error = error(line);
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
    }

    #[test]
    fn an_inherited_socket_becomes_the_configurations_own() {
        let (ours, _peer) = UnixStream::pair().unwrap();
        let number = ours.into_raw_fd();
        let (config, _) = args(&format!("--fd {number}")).into_config(Ok(Vec::new())).unwrap();
        assert!(matches!(&config.attach, Attach::Inherited(fd) if fd.as_raw_fd() == number));
    }

    #[test]
    fn a_socket_that_a_service_manager_passed_is_the_only_one() {
        let with = |line: &str, fd: RawFd| {
            let mut args = args(line);
            args.passed = Some(fd);
            args.into_config(Ok(Vec::new())).map(|(config, _)| config.attach)
        };
        for line in ["--one-off", "--fd {}"] {
            let number = UnixStream::pair().unwrap().0.into_raw_fd();
            let attach = with(&line.replace("{}", &number.to_string()), number);
            assert!(matches!(attach, Ok(Attach::Inherited(fd)) if fd.as_raw_fd() == number), "{line}");
        }
        for (line, fd, parts) in [
            ("--socket-path vm.sock", 9, &["--socket-path vm.sock", "LISTEN_FDS", "drop --socket-path"][..]),
            ("--fd 8", 9, &["--fd 8", "LISTEN_FDS"]),
            ("--client", 9, &["--client", "LISTEN_FDS"]),
            ("", 1_000_000, &["LISTEN_FDS", "descriptor 1000000", "no such descriptor", "ListenStream"]),
        ] {
            let error = with(line, fd).expect_err(line).to_string();
            for part in parts {
                assert!(error.contains(part), "{line}: '{part}' is not in: {error}");
            }
        }
    }

    #[test]
    fn addresses_are_hosts_of_the_subnet_and_not_the_same() {
        for (line, part) in [
            ("--gateway 10.0.3.1", "--gateway 10.0.3.1 is no host of the subnet 10.0.2.0/24"),
            ("--gateway 10.0.2.0", "give one from 10.0.2.1 to 10.0.2.254"),
            ("--gateway 10.0.2.255", "--gateway 10.0.2.255"),
            ("--guest-ip 192.168.1.1", "--guest-ip 192.168.1.1 is no host"),
            ("--guest-ip 10.0.2.255", "--guest-ip"),
            ("--guest-ip 10.0.2.1", "--guest-ip 10.0.2.1 is the gateway's address"),
            ("--gateway 10.0.2.2 --guest-ip 10.0.2.2", "is the gateway's address"),
            ("--subnet 192.168.7.4/30 --guest-ip 192.168.7.7", "from 192.168.7.5 to 192.168.7.6"),
        ] {
            let error = error(&format!("--socket-path s {line}"));
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
        let smallest = config("--subnet 192.168.7.4/30 --guest-ip 192.168.7.5 --gateway 192.168.7.6");
        assert_eq!(smallest.lan.gateway, Ipv4Addr::new(192, 168, 7, 6));
    }

    #[test]
    fn the_default_subnet_moves_away_from_a_route_unless_an_address_ties_it() {
        let run = |line: &str| {
            let routes = Ok(vec![route([10, 0, 2, 0], 23)]);
            args(&format!("--socket-path s {line}")).into_config(routes).unwrap()
        };
        let (config, notices) = run("");
        assert_eq!(config.lan.subnet.to_string(), "10.0.4.0/24");
        assert_eq!(config.lan.gateway, Ipv4Addr::new(10, 0, 4, 1));
        assert_eq!(config.dns.hosts[0].1, IpAddr::V4(config.lan.gateway));
        assert!(matches!(&notices[..], [Notice::Info(_)]), "{notices:?}");
        for tied in ["--guest-ip 10.0.2.9", "--gateway 10.0.2.9", "--subnet 10.0.2.0/24"] {
            let (config, notices) = run(tied);
            assert_eq!(config.lan.subnet.to_string(), "10.0.2.0/24", "{tied}");
            assert!(matches!(&notices[..], [Notice::Warn(_)]), "{tied}: {notices:?}");
        }
    }

    #[test]
    fn routes_that_cannot_be_read_are_a_warning() {
        let routes = Err(io::ErrorKind::Unsupported.into());
        let (config, notices) = args("--socket-path s").into_config(routes).unwrap();
        assert_eq!(config.lan.subnet.to_string(), "10.0.2.0/24");
        assert!(matches!(&notices[..], [Notice::Warn(text)] if text.contains("routes")));
    }

    #[test]
    fn a_host_port_is_published_once() {
        for line in [
            "--publish 80:80 --publish 80:81",
            "--publish 80:80 --publish 127.0.0.1:80:80",
            "--publish 127.0.0.1:80:80 --publish tcp:0.0.0.0:80:80",
            "--publish 80-90:80-90 --publish 85:1",
            "--publish 80:80 -t 80",
            "-t 80-90 -t 127.0.0.1/85:1",
            "-u 53 --publish udp:%eth0:53:53",
        ] {
            let error = error(&format!("--socket-path s {line}"));
            assert!(error.contains("publish each host port once"), "{error}");
        }
        let config = config(
            "--publish 80:80 --publish udp:80:80 --publish 127.0.0.1:81:80 --publish 127.0.0.2:81:80 \
             --publish 0:22 --publish 0:22 -t none -u 127.0.0.1/53 -t %eth0/7000-7002,~7001 -t %eth1/7000",
        );
        let ports: Vec<String> = nat_of(&config).publish.iter().map(ToString::to_string).collect();
        assert_eq!(ports.len(), 10);
        let listed = ["tcp:0.0.0.0%eth0:7000:7000", "tcp:0.0.0.0%eth0:7002:7002"];
        let rest = ["tcp:0.0.0.0%eth1:7000:7000", "udp:127.0.0.1:53:53"];
        assert_eq!(ports[6..], [listed, rest].concat());
    }

    #[test]
    fn bounds_hold_at_the_limit_and_one_past_it() {
        let publish = |ports: usize| format!("--socket-path s --publish 1-{ports}:1-{ports}");
        assert!(args(&publish(limits::PUBLISHED_PORTS_MAX)).into_config(Ok(Vec::new())).is_ok());
        assert!(error(&publish(limits::PUBLISHED_PORTS_MAX + 1)).contains("more than the 4096 allowed"));

        let servers = |count: usize| {
            (0..count).fold("--socket-path s".to_owned(), |line, n| {
                format!("{line} --dns-server 192.0.2.{}", n + 1)
            })
        };
        assert!(args(&servers(limits::DNS_SERVERS_MAX)).into_config(Ok(Vec::new())).is_ok());
        assert!(error(&servers(limits::DNS_SERVERS_MAX + 1)).contains("--dns-server: 9 resolvers"));

        let hosts = |count: usize| {
            (0..count)
                .fold("--socket-path s".to_owned(), |line, n| format!("{line} --dns-host h{n}=10.0.2.9"))
        };
        assert!(args(&hosts(limits::DNS_HOSTS_MAX)).into_config(Ok(Vec::new())).is_ok());
        assert!(error(&hosts(limits::DNS_HOSTS_MAX + 1)).contains("--dns-host: 1025 names"));
    }

    #[test]
    fn a_name_given_an_address_is_not_the_gateways_too() {
        let dns = config(
            "--dns-host host.docker.internal=192.0.2.7 --dns-host db=10.0.2.9 --dns-host db=2001:db8::9 \
             --dns-host db=10.0.2.9",
        )
        .dns;
        let names: Vec<_> = dns.hosts.iter().map(|(name, addr)| format!("{name} {addr}")).collect();
        assert_eq!(
            names,
            [
                "host.docker.internal 192.0.2.7",
                "db.vunet.internal 10.0.2.9",
                "db.vunet.internal 2001:db8::9",
                "host.vunet.internal 10.0.2.1",
                "gateway.docker.internal 10.0.2.1",
            ]
        );
    }

    #[test]
    fn without_dns_no_flag_of_dns_is_taken() {
        let dns = config("--no-dns").dns;
        assert!(!dns.enabled && dns.hosts.is_empty());
        for flag in ["--dns-server 192.0.2.1", "--dns-domain lan", "--dns-host a=10.0.2.9"] {
            let error = error(&format!("--socket-path s --no-dns {flag}"));
            assert!(error.contains("contradict each other"), "{error}");
            assert!(error.contains(flag.split(' ').next().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_domain_that_leaves_no_room_for_names_is_refused() {
        let label = "x".repeat(63);
        let domain = [&label[..], &label, &label, &label[..57]].join(".");
        let error = error(&format!("--socket-path s --dns-domain {domain}"));
        assert!(error.contains("--dns-domain"), "{error}");
        config(&format!("--dns-domain {}", &domain[1..]));
    }
}
