//! A test's own small internet: namespaces, links, processes, all gone when dropped.
//!
//! ```text
//!  guest namespace          host namespace                   world namespace
//!  eth0 (TAP) -- front-end ~~ vhost-user ~~ vunet -- p0 --- veth --- e0
//!                           192.0.2.1/24                     192.0.2.2/24
//! ```
//! Instead of the veth pair there can be a link with a WAN's faults ([`crate::link`]): [`Lab::over_link`].
//! The world has the servers of [`crate::world`], dnsmasq and iperf3; it routes nothing:
//! [`UNREACHABLE`] is answered by its ICMP error, [`BLACKHOLE`] by nothing at all.

mod backend;
mod dhcp;
mod dns;
pub mod frame;
mod lan;
mod limits;
mod netns;
pub mod port;
mod process;

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use thiserror::Error;

pub use crate::sys::tcp::has_ecn;
pub use backend::{Backend, BackendOptions, GuestProcess, vunet_binary};
pub use dhcp::Lease;
pub use dns::{BIG_TXT_BYTES, BIG_TXT_NAME, DOMAIN};
pub use lan::{BRIDGE, LAN_DOMAIN, LAN_POOL};
pub use limits::BufferLimits;
pub use netns::Netns;
pub use process::{Output, Process, run, run_any};

use crate::link::LinkReport;
use crate::world::EndEvent;

/// The world's address.
pub const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The host's address on the link to the world.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The host's and the world's addresses on a second link ([`Lab::link_too`]).
pub const HOST_TOO: Ipv4Addr = Ipv4Addr::new(100, 64, 1, 1);
/// See [`HOST_TOO`].
pub const WORLD_TOO: Ipv4Addr = Ipv4Addr::new(100, 64, 1, 2);
/// The gateway vunet shows the guest by default.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// The guest's address by default.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The world answers packets to this address with ICMP "network unreachable".
pub const UNREACHABLE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The world swallows packets to this address.
pub const BLACKHOLE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// Time any helper command may take.
pub const SHORT: Duration = Duration::from_secs(10);

/// Why a lab could not be set up or used.
#[derive(Debug, Error)]
pub enum LabError {
    /// A command could not be started.
    #[error("{command}: {source}")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// A command failed or took too long.
    #[error("{command}: {why}\n{output}")]
    Failed {
        /// The command line.
        command: String,
        /// Exit status or "timed out".
        why: String,
        /// What it printed.
        output: String,
    },
    /// Something awaited did not come.
    #[error("waited {0:?} in vain for {1}")]
    Timeout(Duration, String),
    /// A file or socket failed.
    #[error("{0}: {1}")]
    Io(String, io::Error),
}

/// What a test needs of the machine and why it is not there; `None` if it is.
///
/// `tools` are programs looked for in `PATH` (and the `sbin` directories).
pub fn missing(tools: &[&str]) -> Option<String> {
    if !crate::sys::process::is_root() {
        return Some("needs root to make network namespaces".into());
    }
    if !Path::new("/dev/net/tun").exists() {
        return Some("needs /dev/net/tun".into());
    }
    let lacks: Vec<&str> = tools.iter().copied().filter(|tool| find_tool(tool).is_none()).collect();
    if lacks.is_empty() { None } else { Some(format!("needs {}", lacks.join(", "))) }
}

/// Where `tool` is: in `PATH`, a `sbin` directory, or among the daemons `lib/prerequisites.sh` unpacked.
pub fn find_tool(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest-cache");
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .chain(["openssh-server", "chrony"].map(|package| unpacked.join(package).join("usr/sbin")))
        .map(|dir| dir.join(tool))
        .find(|file| file.is_file())
}

/// Starts `iperf3 -s` in `netns`.
///
/// # Errors
/// If it cannot be started.
pub fn start_iperf3(netns: &Netns) -> Result<Process, LabError> {
    let server = netns.spawn(&["iperf3", "-s", "--forceflush"])?;
    server.wait_line(SHORT, "iperf3", |line| line.contains("Server listening"))?;
    Ok(server)
}

/// Three namespaces, the link between host and world, and the world's servers.
#[derive(Debug)]
pub struct Lab {
    // First, so that the processes end before their namespaces go.
    servers: Vec<Process>,
    link: Option<Process>,
    /// Where the guest's TAP is.
    pub guest: Netns,
    /// Where vunet runs.
    pub host: Netns,
    /// Beyond.
    pub world: Netns,
    dir: TempDir,
    integration: PathBuf,
}

impl Lab {
    /// Sets everything up. `integration` is the path of the `vunet-integration` binary.
    ///
    /// # Errors
    /// If a namespace, link or server cannot be had.
    pub fn new(integration: &Path) -> Result<Lab, LabError> {
        Lab::with(integration, None)
    }

    /// The same, with a faulty link between host and world: `args` are further arguments of
    /// `vunet-integration link`, whose A is the host and B the world.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn over_link(integration: &Path, args: &[&str]) -> Result<Lab, LabError> {
        Lab::with(integration, Some(args))
    }

    fn with(integration: &Path, link_args: Option<&[&str]>) -> Result<Lab, LabError> {
        netns::sweep();
        let io = |e| LabError::Io("temporary directory".into(), e);
        let dir = tempfile::Builder::new().prefix("netns-lab-").tempdir().map_err(io)?;
        let mut lab = Lab {
            guest: Netns::create("guest")?,
            host: Netns::create("host")?,
            world: Netns::create("world")?,
            servers: Vec::new(),
            link: None,
            dir,
            integration: integration.to_owned(),
        };
        match link_args {
            Some(args) => lab.link_process(args)?,
            None => lab.link_veth()?,
        }
        lab.address_link()?;
        lab.host.set_resolver(&WORLD.to_string())?;
        lab.guest.set_resolver(&GATEWAY.to_string())?;
        lab.start_servers()?;
        Ok(lab)
    }

    fn link_veth(&self) -> Result<(), LabError> {
        let (host, world) = (self.host.name(), self.world.name());
        let words =
            ["ip", "link", "add", "p0", "netns", host, "type", "veth", "peer", "name", "e0", "netns", world];
        run(&words, SHORT).map(drop)
    }

    fn link_process(&mut self, args: &[&str]) -> Result<(), LabError> {
        for netns in [&self.host, &self.world] {
            // Solicitations nobody asked for would take places in the seed's order.
            netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        }
        let binary = self.integration.display().to_string();
        let ends = [format!("{}:p0", self.host.name()), format!("{}:e0", self.world.name())];
        let mut words = vec![&*binary, "link", &ends[0], &ends[1]];
        words.extend(args);
        let link = Process::start(&words)?;
        link.wait_line(SHORT, "the link", |line| line.contains("\"ready\":true"))?;
        self.link = Some(link);
        Ok(())
    }

    fn address_link(&self) -> Result<(), LabError> {
        let (host, world) = (self.host.name(), self.world.name());
        let ip = |words: &[&str]| {
            let mut command = vec!["ip"];
            command.extend(words);
            run(&command, SHORT).map(drop)
        };
        ip(&["-n", host, "addr", "add", &format!("{HOST}/24"), "dev", "p0"])?;
        ip(&["-n", world, "addr", "add", &format!("{WORLD}/24"), "dev", "e0"])?;
        ip(&["-n", host, "link", "set", "p0", "up"])?;
        ip(&["-n", world, "link", "set", "e0", "up"])?;
        ip(&["-n", host, "route", "add", "default", "via", &WORLD.to_string()])?;
        ip(&["-n", world, "route", "add", "unreachable", "198.51.100.0/24"])?;
        ip(&["-n", world, "route", "add", "blackhole", "203.0.113.0/24"])?;
        self.world.sysctl("net.ipv4.ip_forward", "1")?;
        // No limit on ICMP errors, or a test of many refusals measures the limit.
        self.world.sysctl("net.ipv4.icmp_ratelimit", "0")?;
        self.world.sysctl("net.ipv4.tcp_max_syn_backlog", "8192")?;
        self.world.sysctl("net.core.somaxconn", "8192")?;
        // Datagram ICMP sockets are refused in a new namespace until this is set.
        self.host.sysctl("net.ipv4.ping_group_range", "0 2147483647")
    }

    fn start_servers(&mut self) -> Result<(), LabError> {
        let binary = self.integration.display().to_string();
        let world = WORLD.to_string();
        let server = self.world.spawn(&[&binary, "world-server", "--bind", &world])?;
        server.wait_line(SHORT, "the world's servers", |line| line.contains("\"ready\":true"))?;
        self.servers.push(server);
        self.servers.push(dns::start(&self.world, self.dir.path(), &world, WORLD)?);
        Ok(())
    }

    /// Starts another name server in the world, on `addr`, where `www` has the address `www`.
    ///
    /// # Errors
    /// If it cannot be started or does not answer.
    pub fn start_name_server(&self, addr: &str, www: Ipv4Addr) -> Result<Process, LabError> {
        dns::start(&self.world, self.dir.path(), addr, www)
    }

    /// How often the world's name server was asked for `name`, for whatever type.
    pub fn asked_for(&self, name: &str) -> usize {
        let (kind, whom) = ("query[", format!(" {name} from "));
        self.servers[1].errors().iter().filter(|line| line.contains(kind) && line.contains(&whom)).count()
    }

    /// Runs `ip` with `words`, in words.
    ///
    /// # Errors
    /// If it fails.
    pub fn ip(&self, netns: &Netns, words: &str) -> Result<(), LabError> {
        let mut command = vec!["ip", "-n", netns.name()];
        command.extend(words.split(' '));
        run(&command, SHORT).map(drop)
    }

    /// A second way from host to world: `p1` with [`HOST_TOO`] to `e1` with [`WORLD_TOO`].
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn link_too(&self) -> Result<(), LabError> {
        let (host, world) = (self.host.name(), self.world.name());
        let link = format!("link add p1 netns {host} type veth peer name e1 netns {world}");
        let mut command = vec!["ip"];
        command.extend(link.split(' '));
        run(&command, SHORT)?;
        self.ip(&self.host, &format!("addr add {HOST_TOO}/24 dev p1"))?;
        self.ip(&self.world, &format!("addr add {WORLD_TOO}/24 dev e1"))?;
        self.ip(&self.host, "link set p1 up")?;
        self.ip(&self.world, "link set e1 up")
    }

    /// Starts `iperf3 -s` in the world.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_iperf3(&mut self) -> Result<(), LabError> {
        self.servers.push(start_iperf3(&self.world)?);
        Ok(())
    }

    /// Ends the link with faults; what it has done.
    ///
    /// # Errors
    /// If there is none, or it does not say.
    pub fn end_link(&mut self) -> Result<LinkReport, LabError> {
        let nothing = || LabError::Timeout(Duration::ZERO, "a link's report".into());
        let mut link = self.link.take().ok_or_else(nothing)?;
        link.stop();
        let line = link.wait_line(SHORT, "the link's report", |line| LinkReport::parse(line).is_some())?;
        LinkReport::parse(&line).ok_or_else(nothing)
    }

    /// Path of the `vunet-integration` binary.
    pub fn integration(&self) -> &Path {
        &self.integration
    }

    /// A directory for the test's files, removed with the lab.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Waits for the world's servers to report the end of a connection for which `pick` holds.
    ///
    /// # Errors
    /// [`LabError::Timeout`].
    pub fn wait_end(
        &self,
        timeout: Duration,
        what: &str,
        pick: impl Fn(&EndEvent) -> bool,
    ) -> Result<EndEvent, LabError> {
        let found = |line: &str| EndEvent::parse(line).is_some_and(|event| pick(&event));
        let line = self.servers[0].wait_line(timeout, what, found)?;
        Ok(EndEvent::parse(&line).expect("the line was picked because it parses"))
    }

    /// All ends of connections the world's servers reported so far.
    pub fn ends(&self) -> Vec<EndEvent> {
        self.servers[0].lines().iter().filter_map(|line| EndEvent::parse(line)).collect()
    }
}
