//! Where one sample is taken: namespaces of its own, a back-end, and a guest attached to it.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use super::names;
use super::scenario::Scenario;
use super::through;
use crate::guest::Counters;
use crate::lab::{self, GuestProcess, Lab, LabError, Process, SHORT, WORLD};

/// Time a back-end gets to be up and give a lease.
const LEASE_PATIENCE: Duration = Duration::from_secs(15);
/// The world's end of a link that is not the lab's own, or the host's if it routes.
pub(super) const WORLD_END: &str = "e1";
/// On it, the address vunet holds for its packet NAT, and the world's.
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);
pub(super) const OUTSIDE_ROUTER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// Arguments of every front-end, before a user's: each frame from the guest lies in one descriptor,
/// because passt of January 2025 ends with an assertion on a chain of several.
pub(super) const FRONT_END_ARGS: [&str; 2] = ["--tx-cuts", "65562"];

/// Why a sample could not be taken.
#[derive(Debug, Error)]
pub enum BenchError {
    /// The namespaces or a command in them.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A socket or a file.
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    /// A result that is none.
    #[error("{0}")]
    Result(String),
    /// A setting that cannot be.
    #[error("{0}")]
    Config(String),
    /// The back-end cannot take part in this scenario.
    #[error("does not apply")]
    NotApplicable,
}

/// Names what failed in an I/O error.
pub(super) fn during(what: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io(what, source)
}

/// What carries the guest's frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Its name in the results.
    pub name: String,
    /// What it is.
    pub kind: BackendKind,
}

/// What a back-end is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendKind {
    /// A vhost-user back-end: the words of its command, with `{socket}`, `{ip_mtu}` and `{queues}` in
    /// them. With `{tap}`, it puts the guest on a TAP of that name in the world's namespace, as the copy
    /// loop does.
    VhostUser(Vec<String>),
    /// vunet on a link of the host's, over which the world is reached.
    ThroughHost {
        /// The words of its command.
        words: Vec<String>,
        /// What leads to the world.
        way: Way,
        /// What of the guest the world sees.
        seen: Seen,
    },
    /// No back-end: the guest's namespace is joined to the world's by a veth pair.
    Veth,
    /// No back-end: two TAPs and a process that copies frames between them.
    TapLoop,
    /// No back-end and no guest: what a guest does is done where a back-end would stand.
    Sockets,
    /// A vunet for each guest, on one named network of mode host-only.
    OnNetwork,
    /// No back-end: a copy loop from each guest's TAP to one on a bridge.
    LoopsOverBridge,
}

/// What leads from a link of the host's to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The host routes what comes from `{tap}`.
    Routed,
    /// The link is a bridge, on which the world is too.
    Bridged,
}

/// Under which address the world sees a guest behind a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Its own.
    Own,
    /// One that vunet holds: its packet NAT.
    Vunets,
    /// The host's: the kernel masquerades.
    Hosts,
}

impl Backend {
    /// vunet as this workspace built it, or `VUNET_BIN`.
    pub fn vunet() -> Backend {
        let binary = lab::vunet_binary().display().to_string();
        let mut words = vec![&*binary, "--socket-path", "{socket}", "--ip-mtu", "{ip_mtu}"];
        words.extend(["--queues", "{queues}", "--log-level", "warn"]);
        let words = words.into_iter().map(str::to_owned).collect();
        Backend { name: "vunet".into(), kind: BackendKind::VhostUser(words) }
    }

    /// The same with the guest on a TAP instead of sockets, its guard on.
    pub fn vunet_on_tap() -> Backend {
        let Backend { kind, .. } = Backend::vunet();
        let BackendKind::VhostUser(mut words) = kind else { unreachable!("vunet is a vhost-user back-end") };
        let guest = lab::GUEST.to_string();
        let more = ["--mode", "bridge", "--uplink", "tap={tap}", "--guest-ip", &guest];
        words.extend(more.map(str::to_owned));
        Backend { name: "vunet on a TAP".into(), kind: BackendKind::VhostUser(words) }
    }

    /// The same with the guest hidden behind an address of vunet's own on the TAP.
    pub fn vunet_translated() -> Backend {
        let Backend { kind, .. } = Backend::vunet();
        let BackendKind::VhostUser(mut words) = kind else { unreachable!("vunet is a vhost-user back-end") };
        let address = format!("{OUTSIDE}/24");
        let gateway = OUTSIDE_ROUTER.to_string();
        let more = ["--uplink", "tap={tap}", "--nat-address", &address, "--nat-gateway", &gateway];
        words.extend(more.map(str::to_owned));
        Backend { name: "vunet's packet NAT".into(), kind: BackendKind::VhostUser(words) }
    }

    /// The same through a host: with a TAP that is routed, where what differs is who translates; and on a bridge, as one
    /// would have vunet hold an address on a LAN.
    pub fn through_host() -> [Backend; 5] {
        let through = |name: &str, way: Way, seen: Seen| {
            let like =
                if seen == Seen::Vunets { Backend::vunet_translated() } else { Backend::vunet_on_tap() };
            let BackendKind::VhostUser(mut words) = like.kind else {
                unreachable!("vunet is a vhost-user back-end")
            };
            if way == Way::Bridged {
                let bridge = format!("bridge={}", lab::BRIDGE);
                words
                    .iter_mut()
                    .filter(|word| *word == "tap={tap}")
                    .for_each(|word| word.clone_from(&bridge));
            }
            Backend { name: name.into(), kind: BackendKind::ThroughHost { words, way, seen } }
        };
        [
            through("bridge mode, routed", Way::Routed, Seen::Own),
            through("packet NAT, routed", Way::Routed, Seen::Vunets),
            through("kernel masquerade", Way::Routed, Seen::Hosts),
            through("bridge mode, on a bridge", Way::Bridged, Seen::Own),
            through("packet NAT, on a bridge", Way::Bridged, Seen::Vunets),
        ]
    }

    /// vunet on a named network, a process for each guest.
    pub fn vunet_on_network() -> Backend {
        Backend { name: "vunet on a network".into(), kind: BackendKind::OnNetwork }
    }

    /// Whether it puts the guest on a TAP.
    fn is_on_tap(&self) -> bool {
        matches!(&self.kind, BackendKind::VhostUser(words) if words.iter().any(|word| word.contains("{tap}")))
    }

    /// Whether the guest there has an address of vunet's.
    fn is_translated(&self) -> bool {
        matches!(&self.kind, BackendKind::VhostUser(words) if words.iter().any(|word| word == "--nat-address"))
    }

    /// The bounds: what the machine does without any vhost-user.
    pub fn bounds() -> [Backend; 4] {
        [
            Backend { name: "two TAPs".into(), kind: BackendKind::TapLoop },
            Backend { name: "veth".into(), kind: BackendKind::Veth },
            Backend { name: "bare sockets".into(), kind: BackendKind::Sockets },
            Backend { name: "two copy loops".into(), kind: BackendKind::LoopsOverBridge },
        ]
    }

    /// The command of a vhost-user back-end, with files' names only.
    pub(super) fn command(&self) -> Option<String> {
        match &self.kind {
            BackendKind::VhostUser(words) | BackendKind::ThroughHost { words, .. } => {
                Some(names::in_command(&words.join(" ")))
            }
            _ => None,
        }
    }

    /// Whether it can take part in `scenario`.
    pub(super) fn takes_part(&self, scenario: Scenario) -> bool {
        let one_pair = scenario.pairs() == 1;
        let carries_ip =
            matches!(scenario, Scenario::Tcp { .. } | Scenario::Latency(_) | Scenario::Connect { .. });
        match &self.kind {
            BackendKind::OnNetwork => scenario.is_on_a_network(),
            BackendKind::LoopsOverBridge => scenario == Scenario::Between,
            _ if scenario.is_on_a_network() => false,
            // There is no DHCP server on its TAP, and what a gateway answers it does not.
            BackendKind::VhostUser(_) if self.is_on_tap() && !carries_ip => false,
            BackendKind::ThroughHost { .. } => {
                carries_ip || matches!(scenario, Scenario::UdpFrom { .. } | Scenario::UdpTo { .. })
            }
            BackendKind::VhostUser(words) => one_pair || words.iter().any(|word| word.contains("{queues}")),
            BackendKind::Veth | BackendKind::TapLoop => one_pair && carries_ip,
            BackendKind::Sockets => one_pair && matches!(scenario, Scenario::Tcp { .. } | Scenario::Wan(_)),
        }
    }
}

impl FromStr for Backend {
    type Err = String;

    /// Parses `NAME=COMMAND`, where the command holds `{socket}`.
    fn from_str(text: &str) -> Result<Backend, String> {
        let (name, command) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?}: expected NAME='COMMAND … {{socket}} …'"))?;
        let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
        if name.is_empty() || words.is_empty() || !command.contains("{socket}") {
            return Err(format!("{text:?}: expected a name and a command with {{socket}} in it"));
        }
        Ok(Backend { name: name.to_owned(), kind: BackendKind::VhostUser(words) })
    }
}

fn fill_in(words: &[String], socket: &Path, scenario: Scenario) -> Vec<String> {
    let values = [
        ("{socket}", socket.display().to_string()),
        ("{ip_mtu}", scenario.ip_mtu().to_string()),
        ("{queues}", scenario.pairs().to_string()),
        ("{tap}", WORLD_END.to_owned()),
    ];
    let fill = |word: &String| values.iter().fold(word.clone(), |word, (name, to)| word.replace(name, to));
    words.iter().map(fill).collect()
}

/// A lab with a back-end in it. Dropping it ends everything.
pub(super) struct Site {
    // In this order, so that the guest goes first and the namespaces last.
    guest: Option<GuestProcess>,
    backend: Option<Process>,
    pub(super) lab: Lab,
    integration: PathBuf,
    socket: PathBuf,
    front_end_args: Vec<String>,
}

impl Site {
    /// Namespaces, and nothing in them yet. Front-ends will have `front_end_args`; with `link_args`,
    /// there is a link with faults between host and world.
    pub(super) fn new(
        integration: &Path,
        front_end_args: &[String],
        link_args: Option<&[String]>,
    ) -> Result<Site, BenchError> {
        let lab = match link_args {
            None => Lab::new(integration)?,
            Some(args) => Lab::over_link(integration, &args.iter().map(String::as_str).collect::<Vec<_>>())?,
        };
        // Router solicitations would wake an idle back-end.
        lab.guest.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        lab.guest.sysctl("net.ipv4.ping_group_range", "0 2147483647")?;
        let socket = lab.dir().join("backend.sock");
        Ok(Site {
            guest: None,
            backend: None,
            lab,
            integration: integration.to_owned(),
            socket,
            front_end_args: front_end_args.to_vec(),
        })
    }

    /// Process id of the back-end, if there is one.
    pub(super) fn backend_pid(&self) -> Option<u32> {
        self.backend.as_ref().map(Process::pid)
    }

    /// Fails if the back-end has failed: figures taken behind a dead one are none. It may have ended
    /// in order when its guest left.
    pub(super) fn check_backend(&mut self) -> Result<(), BenchError> {
        let Some(backend) = &mut self.backend else {
            return Ok(());
        };
        match backend.ended() {
            Some(status) if !status.success() => Err(BenchError::Result(format!(
                "the back-end ended: {status}\n{}",
                backend.errors().join("\n")
            ))),
            _ => Ok(()),
        }
    }

    /// Starts `backend` for `scenario`, without a guest if it is a vhost-user one.
    pub(super) fn start(&mut self, backend: &Backend, scenario: Scenario) -> Result<(), BenchError> {
        match &backend.kind {
            BackendKind::VhostUser(words) => {
                let command = fill_in(words, &self.socket, scenario);
                let words: Vec<&str> = command.iter().map(String::as_str).collect();
                let netns = if backend.is_on_tap() { &self.lab.world } else { &self.lab.host };
                self.backend = Some(netns.spawn(&words)?);
            }
            BackendKind::ThroughHost { words, way, seen } => {
                let command = fill_in(words, &self.socket, scenario);
                let words: Vec<&str> = command.iter().map(String::as_str).collect();
                through::prepare(&self.lab, *way, *seen)?;
                let backend = self.backend.insert(self.lab.host.spawn(&words)?);
                through::make_way(&self.lab, *way, *seen).map_err(|e| {
                    BenchError::Result(format!("{e}\nback-end: {}", backend.errors().join("\n")))
                })?;
            }
            BackendKind::Veth => self.join_veth(scenario.ip_mtu())?,
            BackendKind::TapLoop => self.join_taps(scenario.ip_mtu())?,
            // Their guests are more than a site's own.
            BackendKind::Sockets | BackendKind::OnNetwork | BackendKind::LoopsOverBridge => {}
        }
        Ok(())
    }

    /// Starts the namespace guest without waiting for anything. `args` are those of `scenario`.
    pub(super) fn start_guest(&self, scenario: Scenario, args: &[&str]) -> Result<GuestProcess, BenchError> {
        let words = self.front_end_words(scenario, args);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Ok(self.lab.start_guest(&self.socket, &words)?)
    }

    /// Arguments of a front-end. The user's come last: a later one overrides.
    pub(super) fn front_end_words(&self, scenario: Scenario, args: &[&str]) -> Vec<String> {
        let (ip_mtu, pairs) = (scenario.ip_mtu().to_string(), scenario.pairs().to_string());
        let scenarios = ["--ip-mtu", &ip_mtu, "--queues", &pairs];
        let words = scenarios.iter().chain(args).map(|word| (*word).to_owned());
        words.chain(self.front_end_args.iter().cloned()).collect()
    }

    /// What the back-end said, behind an error it may have caused.
    fn explain(&self, error: &LabError) -> BenchError {
        let said = self.backend.as_ref().map(Process::errors).unwrap_or_default();
        BenchError::Result(format!("{error}\nback-end: {}", said.join("\n")))
    }

    /// Starts `backend` with a namespace guest that has an address; `args` are further arguments of
    /// the guest.
    pub(super) fn ready(
        &mut self,
        backend: &Backend,
        scenario: Scenario,
        args: &[&str],
    ) -> Result<(), BenchError> {
        self.start(backend, scenario)?;
        if !matches!(backend.kind, BackendKind::VhostUser(_) | BackendKind::ThroughHost { .. }) {
            return Ok(());
        }
        let words = self.front_end_words(scenario, args);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.guest = Some(self.lab.attach(&self.socket, &words).map_err(|e| self.explain(&e))?);
        if let BackendKind::ThroughHost { seen: Seen::Own | Seen::Hosts, .. } = backend.kind {
            return self.address_guest();
        }
        if backend.is_translated() {
            self.address_world(OUTSIDE_ROUTER)?;
        } else if backend.is_on_tap() {
            return self.address_ends();
        }
        self.lab.udhcpc(LEASE_PATIENCE).map_err(|e| self.explain(&e)).map(drop)
    }

    /// What the namespace guest counted so far.
    pub(super) fn guest_counters(&self) -> Result<Counters, BenchError> {
        let guest = self.guest.as_ref().ok_or_else(|| BenchError::Result("there is no guest".into()))?;
        Ok(guest.counters()?)
    }

    fn join_veth(&self, ip_mtu: u16) -> Result<(), BenchError> {
        let (guest, world, mtu) = (self.lab.guest.name(), self.lab.world.name(), ip_mtu.to_string());
        let pair = ["ip", "link", "add", "eth0", "mtu", &mtu, "netns", guest, "type", "veth"];
        let peer = ["peer", "name", WORLD_END, "mtu", &mtu, "netns", world];
        lab::run(&[&pair[..], &peer].concat(), SHORT)?;
        self.address_ends()
    }

    fn join_taps(&mut self, ip_mtu: u16) -> Result<(), BenchError> {
        let binary = self.integration.display().to_string();
        let ends = [(self.lab.guest.name(), "eth0"), (self.lab.world.name(), WORLD_END)];
        let ends = ends.map(|(netns, tap)| format!("{netns}:{tap}"));
        let words = [&*binary, "tap-loop", &ends[0], &ends[1], "--ip-mtu", &ip_mtu.to_string()];
        let process = Process::start(&words)?;
        process.wait_line(SHORT, "the TAPs", |line| line.contains("\"ready\":true"))?;
        self.backend = Some(process);
        self.address_ends()
    }

    /// Gives the world an address on the link to the guest.
    fn address_world(&self, address: Ipv4Addr) -> Result<(), BenchError> {
        self.lab.ip(&self.lab.world, &format!("addr add {address}/24 dev {WORLD_END}"))?;
        self.lab.ip(&self.lab.world, &format!("link set {WORLD_END} up"))?;
        Ok(())
    }

    /// Gives the guest vunet's usual address and the world its gateway's, on the link between them.
    fn address_ends(&self) -> Result<(), BenchError> {
        self.address_world(lab::GATEWAY)?;
        self.address_guest()
    }

    /// Gives the guest vunet's usual address and gateway.
    fn address_guest(&self) -> Result<(), BenchError> {
        self.lab.ip(&self.lab.guest, &format!("addr add {}/24 dev eth0", lab::GUEST))?;
        self.lab.ip(&self.lab.guest, "link set eth0 up")?;
        self.lab.ip(&self.lab.guest, &format!("route add default via {}", lab::GATEWAY))?;
        Ok(())
    }

    /// Starts the servers of [`super::server`] in the world.
    pub(super) fn serve(&self, args: &[&str]) -> Result<Process, BenchError> {
        let binary = self.integration.display().to_string();
        let world = WORLD.to_string();
        let mut words = vec![&*binary, "bench-server", "--bind", &world];
        words.extend(args);
        let process = self.lab.world.spawn(&words)?;
        process.wait_line(SHORT, "the servers", |line| line.contains("\"ready\":true"))?;
        Ok(process)
    }

    /// Runs the frame guest to its end; `args` are further arguments of `frames`.
    pub(super) fn frames(
        &self,
        scenario: Scenario,
        seconds: f64,
        args: &[&str],
    ) -> Result<serde_json::Value, BenchError> {
        let binary = self.integration.display().to_string();
        let socket = self.socket.display().to_string();
        // Whole seconds, and the datagrams' time must lie within.
        let whole = format!("{}", seconds.ceil());
        let mut words = vec![&*binary, "frames", "--socket", &socket, "--seconds", &whole];
        let front_end = self.front_end_words(scenario, args);
        words.extend(front_end.iter().map(String::as_str));
        let patience = SHORT + Duration::from_secs_f64(seconds);
        let output = lab::run(&words, patience).map_err(|e| self.explain(&e))?;
        let line = output.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).map_err(|e| BenchError::Result(format!("frames said {line:?}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR_FLOWS_ON_TWO_PAIRS: Scenario =
        Scenario::Tcp { to_guest: true, ip_mtu: 9000, flows: 4, pairs: 2 };

    #[test]
    fn a_peer_is_a_name_and_a_command_with_a_socket() {
        let peer: Backend = "old=/bin/x -s {socket} -m {ip_mtu} -q {queues}".parse().unwrap();
        assert_eq!(peer.name, "old");
        let BackendKind::VhostUser(words) = peer.kind else { panic!("{peer:?}") };
        let filled = fill_in(&words, Path::new("/s"), FOUR_FLOWS_ON_TWO_PAIRS);
        assert_eq!(filled, ["/bin/x", "-s", "/s", "-m", "9000", "-q", "2"]);
        for bad in ["x", "x=", "=y {socket}", "x=y --no-socket"] {
            assert!(bad.parse::<Backend>().is_err(), "{bad}");
        }
    }

    #[test]
    fn several_pairs_are_for_commands_that_can_say_so() {
        let one: Backend = "one=x {socket}".parse().unwrap();
        let many: Backend = "many=x {socket} -q {queues}".parse().unwrap();
        assert!(!one.takes_part(FOUR_FLOWS_ON_TWO_PAIRS) && one.takes_part(Scenario::Lease));
        assert!(
            many.takes_part(FOUR_FLOWS_ON_TWO_PAIRS) && Backend::vunet().takes_part(FOUR_FLOWS_ON_TWO_PAIRS)
        );
        assert!(Backend::bounds().iter().all(|bound| !bound.takes_part(FOUR_FLOWS_ON_TWO_PAIRS)));
    }

    #[test]
    fn a_command_with_a_tap_takes_part_where_addresses_are_enough() {
        let tap: Backend = "ch=x socket={socket},tap={tap},queues={queues}".parse().unwrap();
        let tcp = Scenario::Tcp { to_guest: true, ip_mtu: 1500, flows: 1, pairs: 1 };
        let udp = Scenario::UdpFrom { payload_bytes: 64, pairs: None };
        for through in Backend::through_host() {
            assert!(through.takes_part(tcp) && through.takes_part(udp));
            assert!(!through.takes_part(Scenario::Lease));
        }
        for backend in [tap.clone(), Backend::vunet_on_tap()] {
            assert!(backend.is_on_tap() && backend.takes_part(tcp) && !backend.takes_part(Scenario::Lease));
        }
        assert!(!Backend::vunet().is_on_tap());
        let BackendKind::VhostUser(words) = tap.kind else { panic!("a command") };
        assert_eq!(fill_in(&words, Path::new("/s"), tcp), ["x", "socket=/s,tap=e1,queues=1"]);
    }

    #[test]
    fn bounds_take_part_where_there_is_something_to_bound() {
        let tcp = Scenario::Tcp { to_guest: true, ip_mtu: 1500, flows: 1, pairs: 1 };
        let connect = Scenario::Connect { parallel: 1 };
        let with = |scenario| Backend::bounds().map(|bound| bound.takes_part(scenario));
        assert_eq!(
            (with(tcp), with(connect), with(Scenario::Lease)),
            ([true, true, true, false], [true, true, false, false], [false; 4])
        );
        assert_eq!(with(Scenario::Between), [false, false, false, true]);
    }

    #[test]
    fn only_vunet_on_a_network_takes_part_where_there_is_one() {
        let leases = Scenario::LeasesTogether { guests: 50 };
        let network = Backend::vunet_on_network();
        assert!(network.takes_part(leases) && network.takes_part(Scenario::Between));
        assert!(!network.takes_part(Scenario::Lease));
        assert!(
            !Backend::vunet().takes_part(Scenario::Between) && !Backend::vunet_on_tap().takes_part(leases)
        );
    }
}
