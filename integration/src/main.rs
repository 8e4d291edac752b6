//! Guests, servers and helpers of vunet's integration tests, as commands.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vunet_integration::bench::server::ServerConfig;
use vunet_integration::bench::{self, Backend, BenchConfig};
use vunet_integration::guest::features::Features;
use vunet_integration::guest::frames::{self, FramesConfig, Generate};
use vunet_integration::guest::misbehave::Misbehaviour;
use vunet_integration::guest::session::ProtocolFeatures;
use vunet_integration::guest::{self, DriverConfig, GuestConfig, Order};
use vunet_integration::link::{self, End, LinkConfig, Settings};
use vunet_integration::{pass_tap, world};

/// Real guests for vunet's tests, benchmarks and demo.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a vhost-user front-end whose guest is a network namespace.
    NetnsGuest(Box<NetnsGuest>),
    /// Run a front-end that makes and counts UDP frames itself, to measure frames a second.
    Frames(Box<Frames>),
    /// Run the servers that stand for the world, and report how each connection ended.
    WorldServer {
        /// Address to listen on.
        #[arg(long, default_value = "0.0.0.0")]
        bind: IpAddr,
    },
    /// Measure back-ends side by side, see docs/benchmarks.md.
    Bench(Bench),
    /// Run the benchmark's servers.
    BenchServer(BenchServer),
    /// Carry frames between two TAPs with a WAN's delay, faults and rate.
    Link(Box<Link>),
    /// Open a TAP and become a command that inherits its queues.
    PassTap {
        /// Its name.
        #[arg(long)]
        name: String,
        /// Its queues.
        #[arg(long, default_value_t = 1)]
        queues: usize,
        /// Without virtio-net headers.
        #[arg(long)]
        plain: bool,
        /// The command; `{fds}` in its words stands for the descriptors.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copy frames between two TAPs, the bound of any path between two of them.
    TapLoop {
        /// Network namespace and name of one TAP, as NETNS:NAME.
        #[arg(value_parser = parse_end)]
        a: (String, String),
        /// The same of the other.
        #[arg(value_parser = parse_end)]
        b: (String, String),
        /// IP MTU of both.
        #[arg(long, default_value_t = 1500)]
        ip_mtu: u16,
    },
}

#[derive(Debug, Args)]
struct Bench {
    /// Seconds of load of each sample.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Samples of each scenario behind each back-end.
    #[arg(long, default_value_t = 3)]
    repetitions: u32,
    /// Scenarios, or beginnings of their names such as `tcp-from`; by default all but `wan`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Another back-end: NAME='COMMAND … {socket} …'; `{ip_mtu}` and `{queues}` may be used too, and
    /// without the latter it is left out where several queue pairs are needed; with `{tap}` it joins the
    /// guest to a TAP of that name; repeatable.
    #[arg(long)]
    peer: Vec<Backend>,
    /// Leave vunet out.
    #[arg(long)]
    without_vunet: bool,
    /// Also measure vunet with the guest on a TAP (`--uplink tap`), which the two TAPs of --bounds bound.
    #[arg(long)]
    tap: bool,
    /// Also measure the guest behind a host, its TAP the host's and routed: in bridge mode, by vunet's packet NAT, and
    /// in bridge mode while the host's kernel masquerades; and the first two on a bridge. Needs nft.
    #[arg(long)]
    through_host: bool,
    /// Also measure the same namespaces over veth, over two TAPs and a copy loop, and bare sockets
    /// where a back-end would stand.
    #[arg(long)]
    bounds: bool,
    /// Directory for the results.
    #[arg(long, default_value = "docs/benchmarks")]
    out: PathBuf,
    /// Beginning of the results' file names.
    #[arg(long, default_value = "results")]
    label: String,
    /// Set the machine's rmem_max and wmem_max to this many bytes meanwhile.
    #[arg(long)]
    socket_limits: Option<u32>,
    /// Congestion control of guest, host and world in the `wan` scenarios; by default the machine's.
    #[arg(long)]
    congestion: Option<String>,
    /// Further arguments of every front-end, separated by blanks. A frame from the guest lies in one
    /// descriptor (`--tx-cuts 65562`) unless they say otherwise.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    guest_args: String,
}

impl Bench {
    fn into_config(self) -> Result<BenchConfig, String> {
        Ok(BenchConfig {
            seconds: self.seconds,
            repetitions: self.repetitions,
            only: self.only,
            peers: self.peer,
            without_vunet: self.without_vunet,
            tap: self.tap,
            through_host: self.through_host,
            bounds: self.bounds,
            out: self.out,
            label: self.label,
            socket_limits: self.socket_limits,
            guest_args: self.guest_args.split_whitespace().map(str::to_owned).collect(),
            congestion: self.congestion,
            integration: std::env::current_exe().map_err(|e| format!("own path: {e}"))?,
            command: bench::command_line(std::env::args()),
        })
    }
}

#[derive(Debug, Args)]
struct BenchServer {
    /// Address to listen on.
    #[arg(long)]
    bind: IpAddr,
    /// Payload of the datagrams sent to whoever sends one.
    #[arg(long, default_value_t = 64)]
    blast_bytes: u16,
    /// For how many milliseconds they are sent.
    #[arg(long, default_value_t = 1000)]
    blast_ms: u64,
    /// Datagrams a second at most; 0 for as many as go.
    #[arg(long, default_value_t = 0)]
    blast_rate: u64,
    /// Datagrams sent with one system call at most, as QUIC servers do.
    #[arg(long, default_value_t = 1)]
    blast_run: u16,
}

impl BenchServer {
    fn into_config(self) -> ServerConfig {
        ServerConfig {
            bind: self.bind,
            blast_bytes: self.blast_bytes,
            blast: Duration::from_millis(self.blast_ms),
            blast_rate: self.blast_rate,
            blast_run: self.blast_run,
        }
    }
}

#[derive(Debug, Args)]
struct Link {
    /// Network namespace and name of one TAP, as NETNS:NAME.
    #[arg(value_parser = parse_end)]
    a: (String, String),
    /// The same of the other.
    #[arg(value_parser = parse_end)]
    b: (String, String),
    /// What happens from A to B: delay=TIME, jitter=TIME, loss=N%, reorder=N%, reorder-by=TIME, duplicate=N%,
    /// corrupt=N%, rate=N with bit to gbit, queue=N with B to MB; separated by commas.
    #[arg(long, default_value = "")]
    to_b: Settings,
    /// The same from B to A.
    #[arg(long, default_value = "")]
    to_a: Settings,
    /// Where losses and other fates come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// IP MTU of both.
    #[arg(long, default_value_t = 1500)]
    ip_mtu: u16,
    /// Let every segment cross as a frame of its own, its checksum complete.
    #[arg(long)]
    no_segmentation: bool,
}

impl Link {
    fn into_config(self) -> LinkConfig {
        let end = |(netns, tap)| End { netns, tap };
        LinkConfig {
            ends: [end(self.a), end(self.b)],
            ways: [self.to_b, self.to_a],
            seed: self.seed,
            ip_mtu: self.ip_mtu,
            segmentation: !self.no_segmentation,
        }
    }
}

#[derive(Debug, Args)]
struct Driver {
    /// The vhost-user socket.
    #[arg(long)]
    socket: PathBuf,
    /// Listen on the socket and let the back-end connect.
    #[arg(long)]
    server: bool,
    /// How long to wait for a back-end, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    patience_ms: u64,
    /// IP MTU of the link; without one the device's, else 1500.
    #[arg(long)]
    ip_mtu: Option<u16>,
    /// Features to accept where offered: names, `all`, `none`, `-name` to take away, or a mask.
    #[arg(long, default_value = "all", allow_hyphen_values = true)]
    features: Features,
    /// Protocol features to accept where offered.
    #[arg(long, default_value = "all", allow_hyphen_values = true)]
    protocol: ProtocolFeatures,
    /// Entries of each ring, a power of two.
    #[arg(long, default_value_t = 256)]
    ring_size: u16,
    /// Length of a receive buffer in bytes.
    #[arg(long, default_value_t = 4096)]
    rx_buffer: u32,
    /// Lengths of the descriptors a frame from the guest is cut into; the last one repeats.
    #[arg(long, value_delimiter = ',', default_value = "128,32768", overrides_with = "tx_cuts")]
    tx_cuts: Vec<u32>,
    /// Queue pairs.
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Order of the handshake's messages.
    #[arg(long, value_enum, default_value_t = Order::Spec)]
    order: Order,
}

impl Driver {
    fn into_config(self) -> DriverConfig {
        DriverConfig {
            socket: self.socket,
            server: self.server,
            patience: Duration::from_millis(self.patience_ms),
            ip_mtu: self.ip_mtu,
            features: self.features,
            protocol: self.protocol,
            ring_size: self.ring_size,
            rx_buffer_bytes: self.rx_buffer,
            tx_cuts: self.tx_cuts,
            queues: self.queues,
            order: self.order,
        }
    }
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
struct NetnsGuest {
    #[command(flatten)]
    driver: Driver,
    /// Network namespace for the TAP, as `ip netns` names it.
    #[arg(long)]
    netns: Option<String>,
    /// Name of the TAP interface.
    #[arg(long, default_value = "eth0")]
    tap: String,
    /// MAC address; without one the device's, else a random one.
    #[arg(long, value_parser = parse_mac)]
    mac: Option<[u8; 6]>,
    /// Ways to go wrong: drop-rx:N, drop-tx:N, no-refill:PERIOD_MS:PAUSE_MS, no-kick, late-kick:MS,
    /// kick-storm:N, slow-used:MS, garbage:N, bad-header:N, break-ring:N, starve:N, deaf:N.
    #[arg(long, value_delimiter = ',')]
    misbehave: Vec<Misbehaviour>,
    /// Wait for another back-end when one leaves.
    #[arg(long)]
    reconnect: bool,
}

#[derive(Debug, Args)]
#[command(args_override_self = true)]
struct Frames {
    #[command(flatten)]
    driver: Driver,
    /// What to send as fast as it goes: udp:FRAME_BYTES:ADDRESS:PORT. Without it, only receive.
    #[arg(long)]
    generate: Option<Generate>,
    /// Flows, which are source ports, the datagrams belong to; the queue pairs have them in turn. By
    /// default one for each pair.
    #[arg(long)]
    flows: Option<u16>,
    /// Send this many frames at most on each queue pair.
    #[arg(long)]
    frames_max: Option<u64>,
    /// The guest's MAC address.
    #[arg(long, value_parser = parse_mac, default_value = "52:54:00:00:00:01")]
    mac: [u8; 6],
    /// The guest's address.
    #[arg(long, default_value = "10.0.2.2")]
    ip: Ipv4Addr,
    /// The gateway's MAC address.
    #[arg(long, value_parser = parse_mac, default_value = "02:ab:cd:00:00:01")]
    gateway_mac: [u8; 6],
    /// For how long.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

impl NetnsGuest {
    fn into_config(self) -> GuestConfig {
        GuestConfig {
            driver: self.driver.into_config(),
            netns: self.netns,
            tap: self.tap,
            mac: self.mac,
            misbehave: self.misbehave,
            reconnect: self.reconnect,
        }
    }
}

impl Frames {
    fn into_config(self) -> FramesConfig {
        let driver = self.driver.into_config();
        FramesConfig {
            // More pairs than that are refused later.
            flows: self.flows.unwrap_or(u16::try_from(driver.queues).unwrap_or(u16::MAX)),
            driver,
            generate: self.generate,
            frames_max: self.frames_max,
            mac: self.mac,
            ip: self.ip,
            gateway_mac: self.gateway_mac,
            duration: Duration::from_secs(self.seconds),
        }
    }
}

fn parse_end(text: &str) -> Result<(String, String), String> {
    let (netns, name) = text.split_once(':').ok_or_else(|| format!("{text:?} is not NETNS:NAME"))?;
    Ok((netns.to_owned(), name.to_owned()))
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let fail = || format!("{text:?} is not a MAC address such as 52:54:00:12:34:56");
    let octets: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<Result<_, _>>()
        .map_err(|_| fail())?;
    octets.try_into().map_err(|_| fail())
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::NetnsGuest(args) => guest::run(&args.into_config()).map_err(|e| e.to_string()),
        Command::Frames(args) => frames::run(&args.into_config()).map_err(|e| e.to_string()),
        Command::WorldServer { bind } => world::serve(bind).map_err(|e| format!("serving on {bind}: {e}")),
        Command::Bench(args) => args.into_config().and_then(|c| bench::run(&c).map_err(|e| e.to_string())),
        Command::BenchServer(args) => bench::server::serve(&args.into_config()).map_err(|e| e.to_string()),
        Command::Link(args) => link::run(&args.into_config()).map_err(|e| format!("the link: {e}")),
        Command::PassTap { name, queues, plain, command } => {
            pass_tap::run(&name, queues, plain, &command).map_err(|e| format!("passing TAP {name}: {e}"))
        }
        Command::TapLoop { a, b, ip_mtu } => {
            bench::tap_loop::run((&a.0, &a.1), (&b.0, &b.1), ip_mtu).map_err(|e| e.to_string())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("vunet-integration: {text}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_arguments_of_a_front_end_override_earlier_ones() {
        let words = ["x", "netns-guest", "--socket", "s", "--tx-cuts", "65562", "--tx-cuts", "12,4096"];
        let Command::NetnsGuest(guest) = Cli::parse_from(words).command else { panic!("another command") };
        assert_eq!(guest.into_config().driver.tx_cuts, [12, 4096]);
        let words = ["x", "frames", "--socket", "s", "--queues", "1", "--queues", "2"];
        let Command::Frames(frames) = Cli::parse_from(words).command else { panic!("another command") };
        let config = frames.into_config();
        assert_eq!((config.driver.queues, config.flows), (2, 2), "one flow for each pair");
    }
}
