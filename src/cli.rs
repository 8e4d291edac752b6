//! The command line: flags to a validated [`Config`].
//!
//! Three steps, each with its own kind of error, all of them ending the process with code 2:
//! the argument parser splits flags, `values` judges each value by itself, `check` judges them
//! together and against the host's routes. Nothing is opened here but the socket of `--fd`.
//!
//! Read first: the vhost-user back-end program conventions (QEMU, `docs/interop/vhost-user.rst`), which
//! fix `--socket-path`, `--fd` and `--print-capabilities`.

mod activation;
mod bridge;
mod capture;
mod check;
mod config_file;
pub mod ctl;
mod doctor;
mod leases;
#[cfg(test)]
mod lines;
mod member;
pub mod network;
mod pages;
mod reload;
mod subnet;
mod translate;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};
use thiserror::Error;

use crate::addr::{Ipv4Subnet, MacAddr, VlanId};
use crate::config::{Config, DnsConfig, IpMtu, LimitSpec, LogConfig, PublishList, PublishRange};
use crate::limits::QUEUE_PAIRS_MAX;
use crate::network::name::NetworkName;
use crate::top;
use crate::uplink::sys::routes::HostRoute;

pub use activation::PassedError;
pub use check::UsageError;
pub use config_file::FileError;
pub use pages::{PageError, completions, man, man_all};
pub use reload::{ReloadError, Reloader, SettingsFile};
pub use subnet::Notice;
pub use values::{DnsHost, ValueError};

/// What `--print-capabilities` prints: the conventions' JSON. A network back-end has no optional
/// features by them.
pub const CAPABILITIES: &str = r#"{"type":"net","features":[]}"#;

/// What the user asked for.
#[derive(Debug)]
pub enum Command {
    /// Print [`CAPABILITIES`] and end.
    PrintCapabilities,
    /// Run a backend.
    Run(Box<Args>),
    /// Ask a backend that runs, or tell it something.
    Ctl(ctl::Ctl),
    /// Draw a backend that runs.
    Top(top::Top),
    /// Make, list, show or remove named networks.
    Network(network::NetworkCommand, Option<PathBuf>),
    /// Write the manual page of a command, or with a folder those of all.
    Man(Vec<String>, Option<PathBuf>),
    /// Write the completions of a shell.
    Completions(clap_complete::Shell),
    /// Say what a run would lack on this host.
    Doctor(Box<DoctorArgs>),
}

/// Why the command line is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// Not a command line of this program, or `--help` or `--version`, which end here too.
    #[error(transparent)]
    Arguments(#[from] clap::Error),
    /// Flags that are well-formed by themselves but not together, or not on this host.
    #[error(transparent)]
    Usage(Box<UsageError>),
    /// The same of flags some of which are settings of a file.
    #[error("with the settings of {}: {source}", path.display())]
    UsageOfFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<UsageError>,
    },
    /// The file of `--config`.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<UsageError> for Error {
    fn from(error: UsageError) -> Error {
        Error::Usage(Box::new(error))
    }
}

impl Error {
    /// The code to end the process with: 0 after `--help` and `--version`, else 2.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Arguments(error) if error.exit_code() == 0 => 0,
            _ => 2,
        }
    }

    /// The same for an error that ends nothing: in one line, without the usage.
    fn text(&self) -> String {
        match self {
            Error::Arguments(error) => {
                let text = error.render().to_string();
                let first = text.split("\n\n").next().unwrap_or_default();
                first.trim_start_matches("error: ").replace('\n', " ")
            }
            error => error.to_string(),
        }
    }

    /// Prints the error, or the help that was asked for, where it belongs.
    ///
    /// # Errors
    /// Whatever writing to standard output or standard error yields.
    pub fn print(&self) -> io::Result<()> {
        match self {
            Error::Arguments(error) => error.print(),
            error => {
                use io::Write as _;
                writeln!(io::stderr(), "error: {error}\n\nFor more information, try '--help'.")
            }
        }
    }
}

/// Splits a command line, the program's name first.
///
/// By the conventions `--print-capabilities` makes every other argument be ignored, wrong ones too.
///
/// # Errors
/// [`Error::Arguments`], also for `--help` and `--version`.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Ok(Command::PrintCapabilities);
    }
    let matches = Line::command().try_get_matches_from(&args)?;
    let Line { subcommand, run } = Line::from_arg_matches(&matches)?;
    match subcommand {
        Some(Subcommand::Ctl(ctl)) => {
            ctl.check()?;
            Ok(Command::Ctl(ctl))
        }
        Some(Subcommand::Top(top)) if top.control.is_none() => Err(UsageError::NoControl.into()),
        Some(Subcommand::Top(top)) => Ok(Command::Top(top)),
        Some(Subcommand::Network(command)) => Ok(Command::Network(command, run.state_dir)),
        Some(Subcommand::Man { command, dir }) => Ok(Command::Man(command, dir)),
        Some(Subcommand::Completions { shell }) => Ok(Command::Completions(shell)),
        Some(Subcommand::Doctor(doctor)) => {
            let words = doctor::words_of_run(args);
            let (run, line) = (settings(&words)?, doctor::run_again(&words));
            let run = Args { is_only_asked: true, ..run };
            Ok(Command::Doctor(Box::new(DoctorArgs { run, line, ..*doctor })))
        }
        None => Ok(Command::Run(Box::new(settings(&args)?))),
    }
}

/// The flags of a run's command line, with those of the file it names.
fn settings(line: &[OsString]) -> Result<Args, Error> {
    let command = Line::command();
    let given = command.clone().try_get_matches_from(line)?;
    let path = given.get_one::<PathBuf>("config").cloned();
    let matches = match &path {
        Some(path) => {
            command.clone().try_get_matches_from(config_file::merged(&command, line, &given, path)?)?
        }
        None => given,
    };
    let mut args = Line::from_arg_matches(&matches)?.run.with_given(&matches);
    args.file = path.map(|path| SettingsFile {
        line: line.to_vec(),
        path,
        standing: config_file::standing(&command, &matches),
    });
    Ok(args)
}

/// What else the program does than run a backend.
#[derive(Debug, clap::Subcommand)]
enum Subcommand {
    /// Ask a backend that runs, or tell it something, on the socket of its --control
    ///
    /// Exit code 0 if that was done, 2 for a wrong command line, 3 if no backend could be reached, 1 for anything else: it was
    /// refused, or the backend has ended. With --json an error is an object too, on standard error.
    Ctl(ctl::Ctl),
    Top(top::Top),
    /// Named networks, shared by several VMs
    #[command(subcommand)]
    Network(network::NetworkCommand),
    /// Print a manual page, for man -l or a package: vunet man | man -l -
    Man {
        /// Words of the command, such as network create; none for vunet itself
        #[arg(value_name = "COMMAND")]
        command: Vec<String>,
        /// Write the pages of all commands into this folder instead
        #[arg(long, value_name = "DIR", conflicts_with = "command")]
        dir: Option<PathBuf>,
    },
    /// Print completions for a shell, to be put where it looks for them
    Completions {
        /// The shell
        #[arg(value_enum, value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Check what this host lacks for each mode, and say the command that fixes it
    ///
    /// Without flags: every mode in short, the default one in full. With the flags of a run: what that run needs. Nothing on the
    /// host is changed, and it ends within five seconds. Exit code 0 if nothing that was looked at keeps the run
    /// (without flags: the default mode) from starting, 1 if something it needs is missing, 2 for flags that the run
    /// would refuse.
    Doctor(Box<DoctorArgs>),
}

/// What a guest may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// The world, translated to sockets of this host
    Nat,
    /// The gateway only: DHCP and local names
    HostOnly,
    /// The same as host-only, for a VM that is to be alone
    None,
    /// The network of --uplink, as a station of its own: its DHCP, its router, its addresses
    Bridge,
}

/// Where frames leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UplinkArg {
    /// Ordinary sockets of this host; needs no privilege.
    Sockets,
    /// A TAP, by name or not.
    Tap(Option<String>),
    /// TAP queues inherited from the parent.
    TapFd(Vec<RawFd>),
    /// A TAP of our own on a bridge.
    Bridge(String),
    /// A macvtap of our own on an interface.
    MacVtap(String),
}

/// The flag's value, as it is written.
impl fmt::Display for UplinkArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UplinkArg::Sockets => f.write_str("sockets"),
            UplinkArg::Tap(None) => f.write_str("tap"),
            UplinkArg::Tap(Some(name)) => write!(f, "tap={name}"),
            UplinkArg::TapFd(fds) => {
                let numbers: Vec<String> = fds.iter().map(RawFd::to_string).collect();
                write!(f, "tap-fd={}", numbers.join(","))
            }
            UplinkArg::Bridge(name) => write!(f, "bridge={name}"),
            UplinkArg::MacVtap(name) => write!(f, "macvtap={name}"),
        }
    }
}

/// How nat mode translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NatArg {
    /// Connections end here and are made anew by sockets of this host; needs no privilege
    Sockets,
    /// Packets leave on the link of --uplink from one address there
    Packet,
    /// The kernel translates, as on named networks
    Kernel,
}

/// The flag's value, as it is written.
impl fmt::Display for NatArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NatArg::Sockets => "sockets",
            NatArg::Packet => "packet",
            NatArg::Kernel => "kernel",
        })
    }
}

/// Which datagrams of one port of the guest share a port of the host (RFC 4787, 4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UdpMappingArg {
    /// All of them, whatever they are sent to
    EndpointIndependent,
    /// Those to one remote address and port
    AddressAndPortDependent,
}

/// Whose datagrams come in (RFC 4787, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UdpFilteringArg {
    /// Anybody's
    EndpointIndependent,
    /// Those of addresses the guest has sent to
    AddressDependent,
    /// Those of addresses and ports the guest has sent to
    AddressAndPortDependent,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormatArg {
    /// One line of text an event
    Text,
    /// One JSON object an event
    Json,
}

/// A network for one virtual machine over vhost-user: NAT without privilege, DHCP and DNS
#[derive(Debug, Parser)]
#[command(
    name = "vunet",
    version,
    max_term_width = 100,
    after_long_help = format!("{EXAMPLES}\nExit codes: {EXIT_CODES}"),
    args_conflicts_with_subcommands = true
)]
struct Line {
    #[command(subcommand)]
    subcommand: Option<Subcommand>,
    #[command(flatten)]
    run: Args,
}

/// What `vunet doctor` is to check.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Send nothing: whether the resolvers answer is not checked
    #[arg(long)]
    offline: bool,
    // The run in question, as it would be started.
    #[arg(skip)]
    line: String,
    #[command(flatten)]
    run: Args,
}

/// Flags of a run.
#[derive(Debug, clap::Args)]
pub struct Args {
    // Before or behind a subcommand.
    /// Where named networks, and leases that a LAN's DHCP gave the guest, are kept [default: $STATE_DIRECTORY of a service, else /var/lib/vunet
    /// for root, $XDG_STATE_HOME/vunet or ~/.local/state/vunet for others]
    #[arg(long, value_name = "DIR", global = true, help_heading = "Network")]
    state_dir: Option<PathBuf>,
    /// Settings from this TOML file: a key for each of these flags, named like it; a flag given here takes the
    /// place of its key. SIGHUP has it read again: log-level, dns-host, limits and published ports change, a change of others is refused
    #[arg(long, value_name = "FILE.toml", help_heading = "Settings")]
    config: Option<PathBuf>,
    // `settings` sets it.
    #[arg(skip)]
    file: Option<SettingsFile>,
    // A socket that a service manager passed.
    #[arg(skip)]
    passed: Option<RawFd>,
    // Whether no such run is to begin here: descriptors are not taken.
    #[arg(skip)]
    is_only_asked: bool,
    /// Unix socket to create (mode 0600) and wait on for the VM; with --client, the one to connect to
    #[arg(long, value_name = "PATH", help_heading = "Attachment")]
    socket_path: Option<PathBuf>,
    /// Unix socket inherited from the parent process as this descriptor, listening or connected
    #[arg(long, value_name = "N", value_parser = values::descriptor, allow_negative_numbers = true, help_heading = "Attachment")]
    fd: Option<RawFd>,
    /// Connect to a VM that listens on --socket-path instead of waiting for it
    #[arg(long, help_heading = "Attachment")]
    client: bool,
    /// End with code 0 when the VM leaves, instead of waiting for it to come back
    #[arg(long, help_heading = "Attachment")]
    one_off: bool,
    // `parse` looks for it before all others; here it is for --help.
    /// Print the capabilities of the vhost-user back-end conventions as JSON and end
    #[arg(long, help_heading = "Attachment")]
    print_capabilities: bool,

    /// Join the network made with `vunet network create NAME`, with all VMs that do so; mode, subnet, gateway,
    /// domain and MTU are the network's. Needs CAP_NET_ADMIN
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    network: Option<NetworkName>,
    /// What the guest may reach
    #[arg(long, value_enum, default_value = "nat", help_heading = "Network")]
    mode: ModeArg,
    // Whether the flags with a default were given.
    #[arg(skip)]
    mode_given: bool,
    #[arg(skip)]
    ip_mtu_given: bool,
    /// Where frames leave: sockets of this host [default with --mode nat], a TAP on the bridge BRIDGE, a TAP
    /// (made if there is none of this name), TAP queues inherited as descriptors N, or a macvtap on IFNAME
    #[arg(long, value_name = "sockets|bridge=BRIDGE|tap[=IFNAME]|tap-fd=N[,N…]|macvtap=IFNAME",
          value_parser = values::uplink, help_heading = "Network")]
    uplink: Option<UplinkArg>,
    /// How --mode nat translates [default: packet on a link, else sockets]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Network")]
    nat: Option<NatArg>,
    /// With --nat packet: the address on the link that the guest is hidden behind, its own or leased by the
    /// link's DHCP [default: dhcp]
    #[arg(long, value_name = "IP/PREFIX|dhcp", value_parser = values::nat_address, help_heading = "Network")]
    nat_address: Option<values::NatAddress>,
    /// With --nat-address IP/PREFIX: the link's router; without one only the link itself is reached
    #[arg(long, value_name = "IP", value_parser = values::ipv4_addr, help_heading = "Network")]
    nat_gateway: Option<Ipv4Addr>,
    /// With --nat packet: ports of that address for the guest's flows [default: 49152-65535]
    #[arg(long, value_name = "FIRST-LAST", value_parser = values::nat_ports, help_heading = "Network")]
    nat_ports: Option<std::ops::RangeInclusive<u16>>,
    /// On a link: the VLAN the guest is in, 1 to 4094. The 802.1Q tag is added and removed here;
    /// the bridge needs no support for it
    #[arg(long, value_name = "N", value_parser = values::vlan, help_heading = "Network")]
    vlan: Option<VlanId>,
    /// With --mode bridge: let the guest send from any address, and what routers and DHCP servers say.
    /// Without it, it sends from one MAC address (that of --mac, else its first), from IPv4 addresses
    /// that DHCP leased it (or that of --guest-ip), and from IPv6 addresses nobody else has
    #[arg(long, help_heading = "Network")]
    trust_guest: bool,
    /// MAC address offered to a VMM that asks for one (QEMU sets its own: -device …,mac=)
    #[arg(long, value_name = "MAC", value_parser = values::guest_mac, help_heading = "Network")]
    mac: Option<MacAddr>,
    /// Largest IP packet on the guest's link, in bytes
    #[arg(long, value_name = "BYTES", value_parser = values::ip_mtu, default_value_t = IpMtu::DEFAULT,
          help_heading = "Network")]
    ip_mtu: IpMtu,
    /// The guest's subnet [default: the first of 10.0.2.0/24 to 10.0.254.0/24 that overlaps no route of
    /// this host; 10.0.0.0/24 without NAT]
    #[arg(long, value_name = "ADDRESS/PREFIX", value_parser = values::subnet, help_heading = "Network")]
    subnet: Option<Ipv4Subnet>,
    /// Address of router, DHCP and DNS server [default: the subnet's first]
    #[arg(long, value_name = "IP", value_parser = values::ipv4_addr, help_heading = "Network")]
    gateway: Option<Ipv4Addr>,
    /// Address of the guest [default: the first free one; with --mode bridge what DHCP leases it]
    #[arg(long, value_name = "IP", value_parser = values::ipv4_addr, help_heading = "Network")]
    guest_ip: Option<Ipv4Addr>,
    /// Do not answer DHCP; the guest configures itself
    #[arg(long, help_heading = "Network")]
    no_dhcp: bool,

    /// Publish a port of the guest on this host; repeatable. TCP unless udp: is said, on all IPv4
    /// addresses unless HOSTADDR is given, for clients of all interfaces unless %INTERFACE is; host port 0
    /// picks a free one and logs it
    #[arg(long, value_name = "[tcp:|udp:][HOSTADDR][%INTERFACE:]HOSTPORT[-END]:GUESTPORT[-END]",
          value_parser = values::publish, help_heading = "Reaching the guest and the host")]
    publish: Vec<PublishRange>,
    /// Publish TCP ports as passt's -t does: [HOSTADDR][%INTERFACE]/, then FIRST[-LAST][:TO[-TO_LAST]] and, for
    /// those to leave out, ~FIRST[-LAST], joined by commas; or none. Repeatable
    #[arg(short = 't', long, value_name = "PORTS", value_parser = values::tcp_ports,
          help_heading = "Reaching the guest and the host")]
    tcp_ports: Vec<PublishList>,
    /// The same for UDP
    #[arg(short = 'u', long, value_name = "PORTS", value_parser = values::udp_ports,
          help_heading = "Reaching the guest and the host")]
    udp_ports: Vec<PublishList>,
    /// Let the gateway's address reach 127.0.0.1 of this host, and the guest this host's own addresses
    #[arg(long, help_heading = "Reaching the guest and the host")]
    allow_host_loopback: bool,

    /// Limit what the guest sends: rate=RATE (tc's units, such as 100mbit, of Ethernet frames), packets=N a second, flows=N
    /// new ones a second, with burst=SIZE, packets-burst=N, flows-burst=N; or none
    #[arg(long, value_name = "LIMIT[,LIMIT…]", help_heading = "Rate limits")]
    limit_from_guest: Option<LimitSpec>,
    /// The same of what it is sent
    #[arg(long, value_name = "LIMIT[,LIMIT…]", help_heading = "Rate limits")]
    limit_to_guest: Option<LimitSpec>,

    /// Which UDP datagrams of one port of the guest share a port of this host (RFC 4787)
    /// [default: endpoint-independent]
    #[arg(long, value_enum, value_name = "BEHAVIOUR", help_heading = "UDP")]
    udp_mapping: Option<UdpMappingArg>,
    /// Whose UDP datagrams come in through it (RFC 4787) [default: address-and-port-dependent]
    #[arg(long, value_enum, value_name = "BEHAVIOUR", help_heading = "UDP")]
    udp_filtering: Option<UdpFilteringArg>,

    /// Resolver to forward to; repeatable [default: those of /etc/resolv.conf]
    #[arg(long, value_name = "IP[:PORT]", value_parser = values::dns_server, help_heading = "DNS")]
    dns_server: Vec<SocketAddr>,
    /// Domain of local names [default: vunet.internal]
    #[arg(long, value_name = "NAME", value_parser = values::dns_domain, help_heading = "DNS")]
    dns_domain: Option<String>,
    /// Local name with its address; repeatable. A name without a dot is put under the domain
    #[arg(long, value_name = "NAME=IP", value_parser = values::dns_host, help_heading = "DNS")]
    dns_host: Vec<DnsHost>,
    /// Do not answer DNS; the guest is given no resolver
    #[arg(long, help_heading = "DNS")]
    no_dns: bool,

    /// Unix socket to create (mode 0600) for the control API: HTTP and JSON, for `vunet ctl` and programs
    #[arg(long, value_name = "PATH", help_heading = "Control")]
    control: Option<PathBuf>,
    /// Address at which whoever may connect gets metrics for Prometheus (/metrics), besides the control socket;
    /// port 0 picks a free one and logs it
    #[arg(long, value_name = "IP:PORT", help_heading = "Control")]
    metrics: Option<SocketAddr>,
    /// Capture what crosses the guest's device from the start on: pcapng, with direction and why frames were dropped, to a file
    /// (made with mode 0600; an earlier capture is overwritten) or a FIFO
    #[arg(long, value_name = "FILE", help_heading = "Control")]
    pcap: Option<PathBuf>,
    /// With --pcap: bytes of each frame that are kept, at most [default: all]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..=262_144), help_heading = "Control")]
    pcap_snaplen: Option<u32>,
    /// With --pcap: bytes after which the capture ends, at least 4096 [default: none]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(4096..), help_heading = "Control")]
    pcap_max_bytes: Option<u64>,

    /// off, error, warn, info, debug or trace, or MODULE=LEVEL, joined by commas
    #[arg(long, value_name = "LEVEL", value_parser = values::log_level, default_value = "info",
          help_heading = "Log, on standard error")]
    log_level: String,
    /// Form of the log
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        help_heading = "Log, on standard error"
    )]
    log_format: LogFormatArg,

    /// Queue pairs offered to the VM, each with a worker thread of its own (QEMU: queues=N and mq=on)
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        value_parser = clap::value_parser!(u8).range(1..=QUEUE_PAIRS_MAX as i64),
        help_heading = "Performance"
    )]
    queues: u8,
    /// CPUs to bind the workers to in turn, such as 2,3 or 4-7
    #[arg(long, value_name = "CPULIST", value_parser = values::cpu_list, help_heading = "Performance")]
    pin: Option<values::CpuList>,
    /// How long a worker that ran out of work looks for more before it sleeps, in microseconds, up to
    /// 1000000; lowers latency and costs CPU time
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        value_parser = clap::value_parser!(u32).range(0..=1_000_000),
        help_heading = "Performance"
    )]
    busy_poll_us: u32,

    /// Never use SO_PEEK_OFF on TCP, even where the kernel has it
    #[arg(long, hide = true)]
    no_peek_off: bool,
}

impl Args {
    /// The same with what `matches` tells of flags that have a default.
    fn with_given(mut self, matches: &ArgMatches) -> Args {
        let is_given = |id| matches.value_source(id) == Some(ValueSource::CommandLine);
        (self.mode_given, self.ip_mtu_given) = (is_given("mode"), is_given("ip_mtu"));
        self
    }

    /// Judges the flags together and against this host's `routes`; what the user should know of the
    /// outcome comes along, to be logged once the log is set up.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn into_config(
        self,
        routes: io::Result<Vec<HostRoute>>,
    ) -> Result<(Config, Vec<Notice>), UsageError> {
        check::into_config(self, routes)
    }

    /// Takes the socket that a service manager passed, if it did (`LISTEN_FDS`), in the place of `--fd`. To be called
    /// before the process opens files of its own.
    ///
    /// # Errors
    /// [`UsageError::Passed`].
    pub fn take_passed(&mut self) -> Result<(), UsageError> {
        self.passed = activation::passed()?;
        Ok(())
    }

    /// The log that is asked for.
    pub fn log(&self) -> LogConfig {
        LogConfig { level: self.log_level.clone(), json: self.log_format == LogFormatArg::Json }
    }

    /// The file of `--config`, for who reads it again.
    pub fn take_file(&mut self) -> Option<SettingsFile> {
        self.file.take()
    }

    fn domain(&self) -> &str {
        self.dns_domain.as_deref().unwrap_or(DnsConfig::DEFAULT_DOMAIN)
    }
}

const EXAMPLES: &str = "\
Examples:
  QEMU (the guest's memory must be shared; QEMU 9.2 and later say reconnect-ms=1000):
    vunet --socket-path vm1.sock --publish 2222:22
    qemu-system-x86_64 -m 1G \\
      -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\
      -chardev socket,id=chr0,path=vm1.sock,reconnect=1 \\
      -netdev vhost-user,id=net0,chardev=chr0 -device virtio-net-pci,netdev=net0 …

  QEMU as server: let it listen with -chardev socket,id=chr0,path=vm1.sock,server=on and start
    vunet --client --socket-path vm1.sock

  cloud-hypervisor:
    vunet --socket-path vm1.sock --mac 52:54:00:12:34:56
    cloud-hypervisor --memory size=1G,shared=on \\
      --net vhost_user=true,socket=vm1.sock,mac=52:54:00:12:34:56 …

  A station on the bridge br0, with the LAN's own DHCP:
    vunet --socket-path vm1.sock --mode bridge --uplink bridge=br0

  Two VMs that find each other by name, on a network of the host:
    vunet network create lab --mode nat
    vunet --socket-path vm1.sock --network lab
    vunet --socket-path vm2.sock --network lab

  A network without the world, and names of your own:
    vunet --socket-path vm1.sock --mode host-only --dns-host db=10.0.0.9
";

/// What the codes that the process ends with mean.
const EXIT_CODES: &str = "0 ended as asked, 2 usage or configuration, 3 no backend could be reached (vunet ctl, vunet top), 1 anything else.";
