//! What is measured on a named network: guest to guest over its bridge, and many VMs that start together.
//!
//! Each VM has a vunet of its own in the host's namespace, and a namespace for its guest. The bound of guest to guest
//! is the same way without vunet: a copy loop from each guest's TAP to one on a bridge.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::dhcp::DhcpClient;
use super::measure::{Sample, Sampler};
use super::scenario::{self as m, Scenario};
use super::site::{Backend, BackendKind, BenchError, Site, during};
use crate::lab::{self, GuestProcess, Netns, Process, SHORT};

/// The network's name.
const NETWORK: &str = "bench";
/// Its subnet, and the guests' addresses where nobody leases them.
const SUBNET: &str = "10.0.2.0/24";
const BARE_ENDS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 3)];
/// Time the slowest of many VMs may take to get its lease.
const TOGETHER_PATIENCE: Duration = Duration::from_secs(30);

/// A host-only network in the host's namespace of a site.
struct Network<'a> {
    site: &'a Site,
    state: TempDir,
}

impl Network<'_> {
    fn create(site: &Site) -> Result<Network<'_>, BenchError> {
        // Beside the programs and not below /tmp, which may be in memory: vunet refuses that.
        let here = site.lab.integration().parent().unwrap_or(Path::new("."));
        let state = tempfile::Builder::new().prefix("bench-state-").tempdir_in(here);
        let network = Network { site, state: state.map_err(during("the networks' directory"))? };
        network.command(&["create", NETWORK, "--mode", "host-only", "--subnet", SUBNET])?;
        Ok(network)
    }

    /// `vunet network` with `words`; what it said.
    fn command(&self, words: &[&str]) -> Result<String, BenchError> {
        let (vunet, state) = (lab::vunet_binary().display().to_string(), self.state_dir());
        let command = [&[&*vunet, "network"], words, &["--state-dir", &state]].concat();
        Ok(self.site.lab.host.run(&command, SHORT)?.stdout)
    }

    fn state_dir(&self) -> String {
        self.state.path().display().to_string()
    }

    /// Starts the vunet of the VM with this MAC address, without waiting for anything, and names its socket.
    fn start_vunet(&self, mac: [u8; 6]) -> Result<(Process, PathBuf), BenchError> {
        let socket = self.site.lab.dir().join(format!("vm{}.sock", mac[5]));
        let (vunet, state, path) =
            (lab::vunet_binary().display().to_string(), self.state_dir(), socket.display().to_string());
        let mac = mac.map(|octet| format!("{octet:02x}")).join(":");
        let words = [&*vunet, "--socket-path", &path, "--network", NETWORK, "--state-dir", &state];
        let more = ["--mac", &mac, "--log-level", "warn"];
        Ok((self.site.lab.host.spawn(&[&words[..], &more].concat())?, socket))
    }

    /// How many leases `vunet network inspect` shows.
    fn leases(&self) -> Result<usize, BenchError> {
        let shown = self.command(&["inspect", NETWORK, "--json"])?;
        let shown: serde_json::Value = serde_json::from_str(&shown)
            .map_err(|e| BenchError::Result(format!("vunet network inspect: {e}: {shown}")))?;
        Ok(shown["leases"].as_array().map_or(0, Vec::len))
    }
}

/// The MAC address of VM `number`.
fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 1, number]
}

/// Two guests that reach each other, the lab's own and another. Dropping it ends what joins them.
struct Joined {
    // First, so that the guests go before their back-ends.
    guests: Vec<GuestProcess>,
    between: Vec<Process>,
}

/// A guest's namespace without IPv6, as the lab's own in a benchmark.
fn guest_netns(label: &str) -> Result<Netns, BenchError> {
    let netns = Netns::create(label)?;
    // Router solicitations would wake what is measured.
    netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    Ok(netns)
}

impl Joined {
    /// Each behind a vunet on the network; the second one's address too.
    fn by_vunet(network: &Network<'_>, second: &Netns) -> Result<(Joined, Ipv4Addr), BenchError> {
        let site = network.site;
        let mut joined = Joined { guests: Vec::new(), between: Vec::new() };
        let mut address = Ipv4Addr::UNSPECIFIED;
        for (number, netns) in [(1, &site.lab.guest), (2, second)] {
            let (vunet, socket) = network.start_vunet(mac(number))?;
            let words = site.front_end_words(Scenario::Between, &[]);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            let guest = site.lab.attach_in(netns, &socket, &words).map_err(|e| explain(&e, &vunet))?;
            joined.guests.push(guest);
            address = site.lab.udhcpc_in(netns, &[], SHORT).map_err(|e| explain(&e, &vunet))?.ip;
            joined.between.push(vunet);
        }
        Ok((joined, address))
    }

    /// Each behind a copy loop to a TAP on one bridge.
    fn by_loops(site: &Site, second: &Netns) -> Result<(Joined, Ipv4Addr), BenchError> {
        let host = &site.lab.host;
        host.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        site.lab.ip(host, "link add br0 type bridge")?;
        site.lab.ip(host, "link set br0 up")?;
        let binary = site.lab.integration().display().to_string();
        let mut joined = Joined { guests: Vec::new(), between: Vec::new() };
        for (netns, address, port) in [(&site.lab.guest, BARE_ENDS[0], "b0"), (second, BARE_ENDS[1], "b1")] {
            let ends = [format!("{}:eth0", netns.name()), format!("{}:{port}", host.name())];
            let copies = Process::start(&[&*binary, "tap-loop", &ends[0], &ends[1]])?;
            copies.wait_line(SHORT, "the TAPs", |line| line.contains("\"ready\":true"))?;
            joined.between.push(copies);
            site.lab.ip(host, &format!("link set {port} master br0"))?;
            site.lab.ip(netns, &format!("addr add {address}/24 dev eth0"))?;
        }
        Ok((joined, BARE_ENDS[1]))
    }

    fn pids(&self) -> Vec<u32> {
        self.between.iter().map(Process::pid).collect()
    }
}

/// What a vunet said, behind an error it may have caused.
fn explain(error: &lab::LabError, vunet: &Process) -> BenchError {
    BenchError::Result(format!("{error}\nvunet: {}", vunet.errors().join("\n")))
}

impl Sampler<'_> {
    /// One TCP flow from the lab's guest to another over a bridge.
    pub(super) fn between(&self, site: &mut Site, backend: &Backend) -> Result<Sample, BenchError> {
        let site = &*site;
        let second = guest_netns("second")?;
        let network;
        let (mut joined, to) = if backend.kind == BackendKind::OnNetwork {
            network = Network::create(site)?;
            Joined::by_vunet(&network, &second)?
        } else {
            Joined::by_loops(site, &second)?
        };
        let _server = lab::start_iperf3(&second)?;
        let mark = self.mark_of(joined.pids())?;
        let said = self.iperf3_client(&site.lab.guest, to, &[], 1, SHORT)?;
        let (cpu, machine) = mark.since()?;
        for process in &mut joined.between {
            if !process.is_running() {
                return Err(BenchError::Result(format!("one ended: {}", process.errors().join("\n"))));
            }
        }
        for guest in joined.guests.drain(..) {
            let counters = guest.stop()?;
            if counters.faults() != 0 {
                return Err(BenchError::Result(format!("a guest saw breaches: {counters:?}")));
            }
        }
        Ok(vec![
            (m::RATE, said.bytes * 8.0 / said.seconds / 1e9),
            (m::CPU_PER_GB, cpu.unwrap_or_default() * 1e9 / said.bytes),
            (m::MACHINE_PER_GB, machine * 1e9 / said.bytes),
        ])
    }

    /// From the start of the first of `guests` VMs, all started at once, to the last one's lease.
    pub(super) fn leases_together(&self, site: &Site, guests: u8) -> Result<Sample, BenchError> {
        let network = Network::create(site)?;
        let namespaces: Vec<Netns> =
            (1..=guests).map(|n| guest_netns(&format!("g{n}"))).collect::<Result<_, _>>()?;
        let (mut vunets, mut fronts) = (Vec::new(), Vec::new());
        let started = Instant::now();
        for (number, netns) in (1..=guests).zip(&namespaces) {
            let (vunet, socket) = network.start_vunet(mac(number))?;
            let words = site.front_end_words(Scenario::LeasesTogether { guests }, &[]);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            fronts.push(site.lab.start_guest_in(netns, &socket, &words)?);
            vunets.push(vunet);
        }
        let leases = std::thread::scope(|scope| {
            let clients: Vec<_> = (1..=guests)
                .zip(&namespaces)
                .map(|(number, netns)| {
                    // As patient as a real client, or fifty of them would be the load.
                    let (retry, pause) = (Duration::from_millis(500), Duration::from_millis(5));
                    let client = DhcpClient { mac: mac(number), retry, pause };
                    scope.spawn(move || netns.inside(|| client.lease(TOGETHER_PATIENCE)))
                })
                .collect();
            let joined = clients.into_iter().map(|client| client.join().expect("a client does not panic"));
            joined.collect::<Result<Vec<Ipv4Addr>, _>>()
        });
        let took = started.elapsed();
        let said = || vunets.iter().flat_map(Process::errors).collect::<Vec<_>>().join("\n");
        let leases =
            leases.map_err(|e| BenchError::Result(format!("a lease of many: {e}\nvunets: {}", said())))?;
        let distinct: HashSet<&Ipv4Addr> = leases.iter().collect();
        let known = network.leases()?;
        if distinct.len() != usize::from(guests) || known != usize::from(guests) {
            let what =
                format!("{guests} guests have {} addresses, and {known} leases: {leases:?}", distinct.len());
            return Err(BenchError::Result(what));
        }
        drop(fronts);
        Ok(vec![(m::LEASE_MS, took.as_secs_f64() * 1e3)])
    }
}
