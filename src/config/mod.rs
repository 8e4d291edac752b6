//! Validated settings: what `cli` makes of flags and every other room reads.
//!
//! A [`Config`] cannot be wrong: each value was checked where it entered. Modes are types, so a
//! host-only network has no field that could reach the world.

pub mod limit;
pub mod publish;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::addr::{Ipv4Subnet, MacAddr, VlanId};
use crate::capture::Settings;
use crate::network::name::NetworkName;
use crate::network::state_dir::StateDir;
use crate::uplink::sys::tap::TapQueue;

pub use self::limit::{LimitError, LimitSpec, LimitsConfig};
pub use self::publish::{Publish, PublishError, PublishList, PublishRange};

/// How the front-end is met.
#[derive(Debug)]
pub enum Attach {
    /// Bind the socket and wait for front-ends (the default).
    Listen(PathBuf),
    /// Connect to a front-end that listens, again and again (`--client`).
    Connect(PathBuf),
    /// A connected or listening socket inherited from the parent (`--fd`).
    Inherited(OwnedFd),
}

/// IP MTU offered to the guest, in bytes: 576 to 65,521.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpMtu(u16);

impl IpMtu {
    /// What every IPv4 host must accept (RFC 791, 3.2).
    pub const MIN: u16 = 576;
    /// A 64 KiB Ethernet frame less its header.
    pub const MAX: u16 = 65_521;
    /// Ethernet's.
    pub const DEFAULT: IpMtu = IpMtu(1500);

    /// `bytes` as an MTU, if within bounds.
    pub const fn new(bytes: u16) -> Option<IpMtu> {
        if bytes >= Self::MIN && bytes <= Self::MAX { Some(IpMtu(bytes)) } else { None }
    }

    /// Bytes.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for IpMtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Transport protocol of a published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// `tcp` or `udp`.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// The network's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lan {
    /// The guest's subnet.
    pub subnet: Ipv4Subnet,
    /// vunet's own address there: router, DHCP and DNS server.
    pub gateway: Ipv4Addr,
    /// The first guest's address; a free one by default.
    pub guest: Option<Ipv4Addr>,
    /// IP MTU of the link.
    pub ip_mtu: IpMtu,
    /// Whether DHCP answers.
    pub dhcp: bool,
}

/// DNS as the guest meets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsConfig {
    /// Whether DNS answers at all; off with `--no-dns`.
    pub enabled: bool,
    /// Domain of local names, lower case, no trailing dot.
    pub domain: String,
    /// Local names: (name, lower case, relative names already qualified; address).
    pub hosts: Vec<(String, IpAddr)>,
}

impl DnsConfig {
    /// The default domain. Never `.local`: multicast DNS owns it (RFC 6762).
    pub const DEFAULT_DOMAIN: &'static str = "vunet.internal";
    /// The gateway's own label under the domain.
    pub const GATEWAY_LABEL: &'static str = "host";
    /// Names that answer with the gateway whatever the domain, because people's tools ask for them.
    const GATEWAY_ALIASES: [&'static str; 2] = ["host.docker.internal", "gateway.docker.internal"];

    /// The gateway's names: its own under `domain`, and its aliases.
    pub fn gateway_names(domain: &str) -> impl Iterator<Item = String> {
        let own = format!("{}.{domain}", Self::GATEWAY_LABEL);
        [own].into_iter().chain(Self::GATEWAY_ALIASES.map(str::to_owned))
    }

    /// DNS with the gateway's own names only.
    pub fn of_gateway(domain: &str, gateway: Ipv4Addr) -> DnsConfig {
        let hosts = Self::gateway_names(domain).map(|name| (name, IpAddr::V4(gateway))).collect();
        DnsConfig { enabled: true, domain: domain.to_owned(), hosts }
    }

    /// First labels of the local names that are directly under the domain.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.hosts.iter().filter_map(|(name, _)| {
            let (label, domain) = name.split_once('.')?;
            (domain == self.domain).then_some(label)
        })
    }
}

/// What lies beyond the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The world, through host sockets or, with [`Config::link`], that link.
    Nat(NatConfig),
    /// Nothing: gateway, DHCP and local names only (`host-only` and `none`).
    Isolated,
}

/// Which datagrams of one port of the guest share a host port (RFC 4787, 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UdpMapping {
    /// All of them, whatever they are sent to.
    #[default]
    EndpointIndependent,
    /// Those to one remote address and port; others have a host port of their own.
    AddressAndPortDependent,
}

/// Whose datagrams come in through a host port (RFC 4787, 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UdpFiltering {
    /// Anybody's.
    EndpointIndependent,
    /// Those of addresses the guest has sent to from there.
    AddressDependent,
    /// Those of addresses and ports the guest has sent to from there.
    #[default]
    AddressAndPortDependent,
}

/// How UDP is translated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpConfig {
    /// Which datagrams share a host port.
    pub mapping: UdpMapping,
    /// Whose datagrams come in.
    pub filtering: UdpFiltering,
}

/// Settings of translation to host sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatConfig {
    /// How UDP is translated.
    pub udp: UdpConfig,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
    /// Whether the gateway's address reaches the host's loopback, and the host's own addresses are
    /// reachable.
    pub allow_host_loopback: bool,
    /// Upstream resolvers; empty means the host's `/etc/resolv.conf`.
    pub dns_servers: Vec<SocketAddr>,
}

/// A named network that the guest shares with others: its leases are kept in a store all its processes use, and
/// its guests find each other by name. Its addresses are those of [`Lan`], its domain that of [`DnsConfig`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Its name.
    pub name: NetworkName,
    /// Where its folder is.
    pub state: StateDir,
    /// Whether the guest may speak for others (`--trust-guest`): it bridges or relays.
    pub trust_guest: bool,
    /// Of a network with a holder: ports of the host that lead to the guest by way of the holder's engine.
    pub lent: Vec<Publish>,
}

/// Which link of the host the guest's frames leave by.
#[derive(Debug)]
pub enum LinkSource {
    /// A TAP of this name, made if there is none; of a name that is free if none is given.
    Tap(Option<String>),
    /// TAP queues inherited from the parent, as many as there are queue pairs.
    Inherited(Vec<TapQueue>),
    /// A TAP of our own on this bridge.
    Bridge(String),
    /// A macvtap of our own on this interface.
    MacVtap(String),
}

/// A link of the host on which the guest is a station of its own, or is hidden behind one.
#[derive(Debug)]
pub struct LinkConfig {
    /// Which.
    pub source: LinkSource,
    /// The VLAN the guest is in, unknown to it.
    pub vlan: Option<VlanId>,
    /// On a named network: the address at which DHCP and DNS there are ours.
    pub gateway: Option<Ipv4Addr>,
    /// What the guest may send from; anything if `None`.
    pub guard: Option<GuardConfig>,
    /// The guest is not on the link itself, but behind an address of ours there.
    pub translate: Option<TranslateConfig>,
    /// Where leases of the LAN's DHCP are kept; `None` if there is nothing to keep.
    pub keep: Option<KeepLeases>,
}

/// Where what the LAN's DHCP leased to the guest is kept for the next process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepLeases {
    /// The folder; `None` if this user has no place for any.
    pub folder: Option<PathBuf>,
    /// Tells the link from others in the folder; no `/` in it.
    pub link: String,
}

/// Addresses the guest of a link may send from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuardConfig {
    /// Its MAC address; the first one seen if `None`.
    pub mac: Option<MacAddr>,
    /// Its one IPv4 address; those that DHCP leases if `None`.
    pub ipv4: Option<Ipv4Addr>,
}

/// An address on a link of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// The address.
    pub addr: Ipv4Addr,
    /// The link's network.
    pub subnet: Ipv4Subnet,
    /// The router to everything else; nothing else is reachable if `None`.
    pub router: Option<Ipv4Addr>,
}

/// Where the address comes from that the guest is hidden behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StationAddress {
    /// The user said it.
    Fixed(LinkAddress),
    /// The link's DHCP leases it.
    Dhcp,
}

/// Translation of the guest's packets to one address of ours on the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TranslateConfig {
    /// Our MAC address on the link; one at random if `None`.
    pub mac: Option<MacAddr>,
    /// Our IPv4 address there.
    pub address: StationAddress,
    /// Ports of that address that flows of the guest may take.
    pub ports: RangeInclusive<u16>,
    /// How UDP is translated.
    pub udp: UdpConfig,
    /// Ports of that address that lead to the guest.
    pub publish: Vec<Publish>,
}

impl TranslateConfig {
    /// The dynamic ports (RFC 6335, 6).
    pub const DEFAULT_PORTS: RangeInclusive<u16> = 49_152..=65_535;
}

/// Verbosity and form of the log on standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// A `tracing` filter such as `info` or `vunet::device=debug`.
    pub level: String,
    /// One JSON object a line instead of text.
    pub json: bool,
}

/// A capture from the start on.
#[derive(Clone, Debug, PartialEq)]
pub struct PcapConfig {
    /// A file or a FIFO.
    pub path: PathBuf,
    /// What is captured.
    pub settings: Settings,
}

/// The workers that move frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkersConfig {
    /// Queue pairs, each with a worker of its own: 1 to [`crate::limits::QUEUE_PAIRS_MAX`].
    pub queue_pairs: u8,
    /// CPUs the workers are bound to, in turn; none leaves them to the scheduler.
    pub cpus: Vec<usize>,
    /// How long a worker that ran out of work looks for more before it sleeps, in microseconds.
    pub busy_poll_us: u32,
}

/// What of the settings is to change while the backend runs; `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveConfig {
    /// [`LogConfig::level`].
    pub log_level: Option<String>,
    /// Local names; the domain is that of the start.
    pub dns: Option<DnsConfig>,
    /// All ports that are to be published.
    pub publish: Option<Vec<Publish>>,
    /// [`LimitsConfig::from_guest`].
    pub limit_from_guest: Option<LimitSpec>,
    /// [`LimitsConfig::to_guest`].
    pub limit_to_guest: Option<LimitSpec>,
}

impl LiveConfig {
    /// The settings that change, by name.
    pub fn keys(&self) -> Vec<&'static str> {
        let LiveConfig { log_level, dns, publish, limit_from_guest, limit_to_guest } = self;
        let keys = [
            (log_level.is_some(), "log-level"),
            (dns.is_some(), "dns-host"),
            (publish.is_some(), "published ports"),
            (limit_from_guest.is_some(), "limit-from-guest"),
            (limit_to_guest.is_some(), "limit-to-guest"),
        ];
        keys.into_iter().filter_map(|(changes, key)| changes.then_some(key)).collect()
    }
}

/// Everything a backend needs to run.
#[derive(Debug)]
pub struct Config {
    /// How the front-end is met.
    pub attach: Attach,
    /// End when the front-end leaves.
    pub one_off: bool,
    /// MAC address offered to front-ends that read the device's configuration.
    pub mac: Option<MacAddr>,
    /// The guest's network.
    pub lan: Lan,
    /// DNS as the guest meets it.
    pub dns: DnsConfig,
    /// What lies beyond the gateway.
    pub mode: Mode,
    /// The link the guest is on besides; but for a named network there is no gateway of ours on it.
    pub link: Option<LinkConfig>,
    /// The named network it is a guest of; none for a network of its own.
    pub network: Option<NetworkConfig>,
    /// The workers.
    pub workers: WorkersConfig,
    /// How much the guest may send and be sent.
    pub limits: LimitsConfig,
    /// Where the control API listens.
    pub control: Option<PathBuf>,
    /// Where metrics are served besides.
    pub metrics: Option<SocketAddr>,
    /// What is captured from the start on.
    pub pcap: Option<PcapConfig>,
    /// The log.
    pub log: LogConfig,
    /// Never use `SO_PEEK_OFF` on TCP even where the kernel has it (hidden, for tests).
    pub no_peek_off: bool,
}
