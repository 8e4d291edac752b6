//! A host with named networks: the lab, a state directory, and guests in namespaces of their own.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vunet_integration::lab::{
    BackendOptions, GuestProcess, Lab, Lease, Netns, Output, Process, SHORT, vunet_binary,
};

use crate::bench::{ANSWER_BYTES_MAX, Failure, Outcome, PATIENCE, ensure, integration_binary, missing, skip};

/// The lab with a state directory.
pub(super) struct Site {
    pub(super) lab: Lab,
    state: TempDir,
    /// The beginning of commands, where they are not to be root's.
    pub(super) user: &'static [&'static str],
    /// What root's commands are run through.
    pub(super) through: &'static [&'static str],
}

/// A VM of a named network: vunet, a front-end, and the namespace that is the guest.
pub(super) struct Vm {
    // In this order, so that the guest goes first and its namespace last.
    guest: Option<GuestProcess>,
    pub(super) vunet: Process,
    pub(super) netns: Netns,
    pub(super) ip: Ipv4Addr,
    /// Of its card, as a text.
    pub(super) mac: String,
    socket: PathBuf,
}

/// Runs `body` on a site; skips where it cannot be.
pub(super) fn on_a_site(tools: &[&str], body: impl FnOnce(&mut Site) -> Outcome) {
    let mut needed = vec!["nft", "bridge", "ping"];
    needed.extend(tools);
    if let Some(reason) = missing(&needed) {
        return skip(&reason);
    }
    let lab = Lab::new(integration_binary()).unwrap_or_else(|error| panic!("{error}"));
    // Not below /tmp, which may be in memory: vunet refuses that.
    let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap_or_else(|error| panic!("{error}"));
    let mut site = Site { lab, state, user: &[], through: &[] };
    if let Err(failure) = body(&mut site) {
        // While the site lives, so that its processes' last words are shown.
        panic!("{failure:?}");
    }
}

impl Site {
    pub(super) fn state_dir(&self) -> &Path {
        self.state.path()
    }

    fn network_command(&self, words: &str) -> Vec<String> {
        let before = self.user.iter().chain(self.through);
        let mut command: Vec<String> = before.map(|&word| word.to_owned()).collect();
        command.extend([vunet_binary().display().to_string(), "network".to_owned()]);
        command.extend(words.split(' ').map(str::to_owned));
        command.extend(["--state-dir".to_owned(), self.state_dir().display().to_string()]);
        command
    }

    /// `vunet network` with `words`, which must succeed.
    pub(super) fn network(&self, words: &str) -> Result<String, Failure> {
        let command = self.network_command(words);
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        Ok(self.lab.host.run(&words, PATIENCE)?.stdout)
    }

    /// The same whatever its exit code.
    pub(super) fn network_any(&self, words: &str) -> Result<Output, Failure> {
        let command = self.network_command(words);
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        Ok(self.lab.host.run_any(&words, PATIENCE)?)
    }

    /// What `inspect --json` says.
    pub(super) fn inspect(&self, name: &str) -> Result<serde_json::Value, Failure> {
        Ok(serde_json::from_str(&self.network(&format!("inspect {name} --json"))?)?)
    }

    /// Starts a vunet on `network` without waiting for anything.
    pub(super) fn start(&self, network: &str, socket: &Path, args: &[&str]) -> Result<Process, Failure> {
        let (socket, state) = (socket.display().to_string(), self.state_dir().display().to_string());
        let mut words = vec!["--socket-path", &socket, "--network", network, "--state-dir", &state];
        words.extend(args);
        if !self.through.is_empty() {
            let binary = vunet_binary().display().to_string();
            return Ok(self.lab.host.spawn(&[self.through, &[&binary], &words].concat())?);
        }
        let options = BackendOptions { unprivileged: !self.user.is_empty(), ..BackendOptions::default() };
        Ok(self.lab.start_vunet(&options, &words)?)
    }

    /// A VM called `label` on `network`, with a lease.
    pub(super) fn vm(&self, network: &str, label: &str, args: &[&str]) -> Result<Vm, Failure> {
        let mut vm = self.vm_without_lease(network, label, args)?;
        vm.ip = self.lease(&vm, label)?.ip;
        Ok(vm)
    }

    pub(super) fn lease(&self, vm: &Vm, label: &str) -> Result<Lease, Failure> {
        let hostname = format!("hostname:{label}");
        Ok(self.lab.udhcpc_in(&vm.netns, &["-x", &hostname], PATIENCE)?)
    }

    pub(super) fn vm_without_lease(&self, network: &str, label: &str, args: &[&str]) -> Result<Vm, Failure> {
        self.vm_as(network, label, args, &[])
    }

    /// The same with a front-end started with `card`.
    pub(super) fn vm_as(
        &self,
        network: &str,
        label: &str,
        args: &[&str],
        card: &[&str],
    ) -> Result<Vm, Failure> {
        let socket = self.lab.dir().join(format!("{label}.sock"));
        let mut vunet = self.start(network, &socket, args)?;
        until("vunet's socket", || socket.exists() || !vunet.is_running())?;
        ensure!(vunet.is_running(), "vunet ended: {}", vunet.errors().join("\n"));
        let netns = Netns::create(label)?;
        netns.set_resolver("10.0.2.1")?;
        let guest = self.lab.attach_in(&netns, &socket, card)?;
        let mac = netns.run(&["cat", "/sys/class/net/eth0/address"], SHORT)?.stdout.trim().to_owned();
        Ok(Vm { guest: Some(guest), vunet, netns, ip: Ipv4Addr::UNSPECIFIED, mac, socket })
    }

    /// Kills the vunet of `vm`, starts another in its place and attaches the guest anew, as its VMM would.
    pub(super) fn revive(&self, vm: &mut Vm, network: &str, args: &[&str]) -> Outcome {
        // A front-end that reconnects keeps the guest's interface; this one makes it anew, so that it gets back
        // what the guest's stack still knows.
        vm.vunet.kill();
        vm.guest = None;
        std::fs::remove_file(&vm.socket)?;
        vm.vunet = self.start(network, &vm.socket, args)?;
        until("vunet's socket", || vm.socket.exists() || !vm.vunet.is_running())?;
        vm.guest = Some(self.lab.attach_in(&vm.netns, &vm.socket, &["--mac", &vm.mac])?);
        vm.run(&format!("ip addr replace {}/24 dev eth0", vm.ip))?;
        vm.run("ip route replace default via 10.0.2.1").map(drop)
    }

    /// All a network could leave on the host: links, addresses, routes, rules, forwarding, files.
    pub(super) fn host_state(&self) -> Result<String, Failure> {
        let host = |words: &[&str]| self.lab.host.run(words, SHORT).map(|output| output.stdout);
        let mut state = host(&["ip", "-o", "link", "show"])? + &host(&["ip", "-o", "addr", "show"])?;
        state += &host(&["ip", "route", "show", "table", "all"])?;
        state += &host(&["nft", "list", "ruleset"])?;
        state += &host(&["sysctl", "-a", "-r", "net.ipv4.*forward|net.ipv4.conf.p0"])?;
        state += &host(&["find", &self.state_dir().display().to_string()])?;
        // Locks are files that stay, leases are to stay, and IPv6 settles by itself.
        let comes_and_goes = |line: &str| {
            let is_file = line.starts_with('/') && !line.contains("user-");
            is_file && ["lock", "/run", "sqlite", "/stations"].iter().any(|kind| line.contains(kind))
                || ["fe80::", "ff00::"].iter().any(|kind| line.contains(kind))
        };
        Ok(state.lines().filter(|line| !comes_and_goes(line)).map(|line| line.to_owned() + "\n").collect())
    }

    /// Starts the world's kind of servers in `netns`, on all its addresses.
    pub(super) fn serve(&self, netns: &Netns) -> Result<Process, Failure> {
        let server = netns.spawn(&[
            &integration_binary().display().to_string(),
            "world-server",
            "--bind",
            "0.0.0.0",
        ])?;
        server.wait_line(SHORT, "servers", |line| line.contains("ready"))?;
        Ok(server)
    }
}

impl Vm {
    /// Runs a command in the guest that must succeed.
    pub(super) fn run(&self, words: &str) -> Result<String, Failure> {
        let words: Vec<&str> = words.split(' ').collect();
        Ok(self.netns.run(&words, PATIENCE)?.stdout)
    }

    /// Whether three of three pings to `to` are answered, late on a busy machine.
    pub(super) fn pings(&self, to: Ipv4Addr) -> Result<bool, Failure> {
        Ok(self.ping(to, "5")?.contains("3 received"))
    }

    /// Whether any of them is within a second: to show that none is.
    pub(super) fn pings_soon(&self, to: Ipv4Addr) -> Result<bool, Failure> {
        Ok(!self.ping(to, "1")?.contains(" 0 received"))
    }

    fn ping(&self, to: Ipv4Addr, wait_s: &str) -> Result<String, Failure> {
        let to = to.to_string();
        let words = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", wait_s, &to];
        let output = self.netns.run_any(&words, PATIENCE)?;
        // Without a route it says so and sends none.
        let none = if output.stdout.contains("received") { "" } else { " 0 received" };
        Ok(output.stdout + none)
    }

    /// Detaches the guest, which must have seen no breach, and ends vunet in order.
    pub(super) fn stop(mut self) -> Outcome {
        if let Some(guest) = self.guest.take() {
            let counters = guest.stop()?;
            ensure!(counters.faults() == 0, "the guest saw breaches: {counters:?}");
        }
        ensure!(self.vunet.is_running(), "vunet ended by itself");
        let code = self.vunet.stop();
        let errors = self.vunet.errors().join("\n");
        ensure!(code == Some(0) && !errors.contains("panicked"), "vunet ended with {code:?}: {errors}");
        ensure!(!self.socket.exists(), "vunet left its socket behind");
        Ok(())
    }
}

/// Connects from `netns`.
pub(super) fn connect(
    netns: &Netns,
    to: impl Into<SocketAddr>,
    timeout: Duration,
) -> std::io::Result<TcpStream> {
    let to = to.into();
    let stream = netns.inside(|| TcpStream::connect_timeout(&to, timeout))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The address that a server at `to` sees for a client in `netns`.
pub(super) fn seen(netns: &Netns, to: impl Into<SocketAddr>) -> Result<SocketAddr, Failure> {
    use std::io::Read as _;
    let to = to.into();
    let stream =
        connect(netns, to, PATIENCE).map_err(|error| Failure(format!("connect to {to}: {error}")))?;
    let mut text = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    text.trim().parse().map_err(|_| Failure(format!("{to} answered {text:?}")))
}

/// Fails if the host is not as it was.
pub(super) fn ensure_as_before(before: &str, after: &str) -> Outcome {
    let lost: Vec<&str> = before.lines().filter(|line| !after.contains(line)).collect();
    let left: Vec<&str> = after.lines().filter(|line| !before.contains(line)).collect();
    ensure!(lost.is_empty() && left.is_empty(), "left behind: {left:#?}\nlost: {lost:#?}");
    Ok(())
}

/// Waits until `holds`.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
