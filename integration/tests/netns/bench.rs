//! One scenario: a lab, a vunet, a guest attached to it, and the checks every scenario ends with.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use vunet_integration::guest::Counters;
use vunet_integration::lab::{self, Backend, BackendOptions, GuestProcess, Lab, Lease, WORLD};
use vunet_integration::world::pattern;

/// Time a single exchange may take on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer of a server in bytes: a back-end that repeats one for ever must not hang a test.
pub(crate) const ANSWER_BYTES_MAX: u64 = 4096;
/// One MiB in bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// Why a scenario failed. Shown as the text itself.
pub(crate) struct Failure(pub(crate) String);

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(error.to_string())
    }
}

/// What a scenario answers.
pub(crate) type Outcome = Result<(), Failure>;

/// Fails a scenario with a text.
macro_rules! fail {
    ($($word:tt)+) => { return Err($crate::bench::Failure(format!($($word)+))) };
}
pub(crate) use fail;

/// Fails a scenario unless the condition holds.
macro_rules! ensure {
    ($condition:expr, $($word:tt)+) => {
        if !$condition {
            $crate::bench::fail!($($word)+);
        }
    };
}
pub(crate) use ensure;

/// How a scenario starts.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Programs needed besides `ip`, `sysctl`, `dnsmasq`, `dig` and `udhcpc`.
    pub(crate) tools: Vec<&'static str>,
    /// vunet's options.
    pub(crate) vunet: BackendOptions,
    /// The guest's arguments.
    pub(crate) guest: Vec<String>,
    /// Whether the guest may meet breaches of the specification (because it commits them).
    pub(crate) faults_allowed: bool,
    /// Whether the host's link is a port of a bridge, and vunet puts the guest on it.
    pub(crate) on_bridge: bool,
    /// Whether it is one on which vunet holds the host's address and translates packets.
    pub(crate) translated: bool,
    /// Arguments of a faulty link between host and world, if there is to be one.
    pub(crate) link: Option<Vec<&'static str>>,
}

impl Setup {
    /// The defaults: everything negotiated, one pair.
    pub(crate) fn new() -> Setup {
        Setup {
            tools: Vec::new(),
            vunet: BackendOptions::default(),
            guest: Vec::new(),
            faults_allowed: false,
            on_bridge: false,
            translated: false,
            link: None,
        }
    }

    /// A LAN with a DHCP server of its own, and the guest as a station on it.
    pub(crate) fn on_bridge() -> Setup {
        let uplink = format!("bridge={}", lab::BRIDGE);
        Setup { on_bridge: true, ..Setup::new() }.vunet(&["--mode", "bridge", "--uplink", &uplink])
    }

    /// The guest behind an address that vunet holds on a bridge: that which is the host's elsewhere, so that
    /// scenarios of the NAT over sockets run unchanged.
    pub(crate) fn translated() -> Setup {
        Setup::new().to_translated()
    }

    fn to_translated(&self) -> Setup {
        let uplink = format!("bridge={}", lab::BRIDGE);
        let (address, router) = (format!("{}/24", lab::HOST), WORLD.to_string());
        let args = ["--uplink", &uplink, "--nat-address", &address, "--nat-gateway", &router];
        Setup { translated: true, ..self.clone() }.vunet(&args)
    }

    /// The same through the engine that `VUNET_NAT` names, where the scenario says nothing of one.
    fn chosen(&self) -> Setup {
        let says = |flag: &str| self.vunet.args.iter().any(|arg| arg == flag);
        let plain = !self.on_bridge && !self.translated && self.link.is_none() && !says("--mode");
        match std::env::var("VUNET_NAT").as_deref() {
            Ok("packet") if plain => self.to_translated(),
            Ok("packet" | "sockets") | Err(_) => self.clone(),
            Ok(other) => panic!("VUNET_NAT is {other}: expected packet or sockets"),
        }
    }

    /// Puts a faulty link between host and world.
    pub(crate) fn over_link(mut self, args: &[&'static str]) -> Setup {
        self.link = Some(args.to_vec());
        self
    }

    pub(crate) fn tools(mut self, tools: &[&'static str]) -> Setup {
        self.tools.extend(tools);
        self
    }

    pub(crate) fn vunet(mut self, args: &[&str]) -> Setup {
        self.vunet.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    pub(crate) fn guest(mut self, args: &[&str]) -> Setup {
        self.guest.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }
}

/// A running scenario.
pub(crate) struct Bench {
    // In this order, so that the guest goes first and the namespaces last.
    pub(crate) guest: Option<GuestProcess>,
    pub(crate) vunet: Backend,
    pub(crate) lab: Lab,
    faults_allowed: bool,
}

/// Path of the `vunet-integration` binary.
pub(crate) fn integration_binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vunet-integration"))
}

/// Reports a test that cannot run here; fails it in CI.
pub(crate) fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let line = format!("SKIPPED {test}: {reason}");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{line}");
    eprintln!("{line}");
    if let Some(log) = std::env::var_os("VUNET_SKIP_LOG") {
        let appended = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .and_then(|mut log| writeln!(log, "{line}"));
        appended.expect("VUNET_SKIP_LOG names a file that can be written");
    }
}

/// What is missing for any scenario with these tools.
pub(crate) fn missing(tools: &[&str]) -> Option<String> {
    let mut all = vec!["ip", "sysctl", "dnsmasq", "dig", "udhcpc"];
    all.extend(tools);
    let vunet = lab::vunet_binary();
    if !vunet.is_file() {
        return Some(format!("needs {} (cargo build --release, or VUNET_BIN)", vunet.display()));
    }
    lab::missing(&all)
}

/// Runs `body` with vunet up, a guest attached and a lease; then ends everything and checks that
/// nothing broke on the way.
pub(crate) fn scenario(setup: &Setup, body: impl FnOnce(&mut Bench) -> Outcome) {
    bare(setup, |bench| {
        let args: Vec<&str> = setup.guest.iter().map(String::as_str).collect();
        bench.attach(&args)?;
        bench.lease()?;
        body(bench)
    });
}

/// As [`scenario`], without a guest.
pub(crate) fn bare(setup: &Setup, body: impl FnOnce(&mut Bench) -> Outcome) {
    if let Some(reason) = missing(&setup.tools) {
        return skip(&reason);
    }
    let setup = setup.chosen();
    let lab = match &setup.link {
        None => Lab::new(integration_binary()),
        Some(args) => Lab::over_link(integration_binary(), args),
    };
    let mut lab = lab.unwrap_or_else(|e| panic!("{e}"));
    if setup.on_bridge {
        lab.make_lan().unwrap_or_else(|e| panic!("{e}"));
    }
    if setup.translated {
        lab.make_outside().unwrap_or_else(|e| panic!("{e}"));
    }
    let vunet = lab.vunet(&setup.vunet).unwrap_or_else(|e| panic!("{e}"));
    if setup.translated {
        // Its first packets would wait for that in its ring, and tests measure how long things take.
        let ours =
            vunet.process.wait_error(PATIENCE, "vunet's address", |line| line.contains("address is ours"));
        ours.unwrap_or_else(|e| panic!("{e}"));
    }
    let mut bench = Bench { guest: None, vunet, lab, faults_allowed: setup.faults_allowed };
    let outcome = body(&mut bench).and_then(|()| bench.finish());
    if let Err(failure) = outcome {
        // While the bench lives, so that its processes' last words are shown.
        panic!("{failure:?}");
    }
}

impl Bench {
    /// Attaches a guest.
    pub(crate) fn attach(&mut self, args: &[&str]) -> Outcome {
        self.guest = Some(self.lab.attach(&self.vunet.socket, args)?);
        Ok(())
    }

    /// Gets a lease for the guest.
    pub(crate) fn lease(&self) -> Result<Lease, Failure> {
        Ok(self.lab.udhcpc(PATIENCE)?)
    }

    /// The attached guest.
    pub(crate) fn front_end(&self) -> &GuestProcess {
        self.guest.as_ref().expect("the scenario attached a guest")
    }

    /// Detaches the guest in order; fails if it saw a breach of the specification.
    pub(crate) fn detach(&mut self) -> Result<Counters, Failure> {
        let guest = self.guest.take().expect("the scenario attached a guest");
        let counters = guest.stop()?;
        ensure!(self.faults_allowed || counters.faults() == 0, "the guest saw breaches: {counters:?}");
        Ok(counters)
    }

    fn finish(&mut self) -> Outcome {
        if self.guest.is_some() {
            self.detach()?;
        }
        ensure!(self.vunet.process.is_running(), "vunet ended by itself");
        let code = self.vunet.process.stop();
        ensure!(code == Some(0), "vunet ended with {code:?} on SIGTERM");
        ensure!(!self.vunet.socket.exists(), "vunet left its socket behind");
        let errors = self.vunet.process.errors();
        ensure!(!errors.iter().any(|line| line.contains("panicked")), "vunet panicked");
        Ok(())
    }

    /// Connects from the guest to `addr`.
    pub(crate) fn connect(&self, addr: impl Into<SocketAddr>, timeout: Duration) -> io::Result<TcpStream> {
        let addr = addr.into();
        let stream = self.lab.guest.inside(|| TcpStream::connect_timeout(&addr, timeout))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Connects from the guest to one of the world's ports.
    pub(crate) fn connect_world(&self, port: u16) -> Result<TcpStream, Failure> {
        self.connect((WORLD, port), PATIENCE)
            .map_err(|e| Failure(format!("connect to world port {port}: {e}")))
    }

    /// Runs a command in the guest that must succeed.
    pub(crate) fn in_guest(&self, words: &[&str]) -> Result<String, Failure> {
        Ok(self.lab.guest.run(words, PATIENCE)?.stdout)
    }

    /// Downloads and uploads `count_bytes` over HTTP with curl and compares the digests.
    pub(crate) fn http_both_ways(&self, count_bytes: u64, seed: u64) -> Outcome {
        let want = pattern::sha256(seed, count_bytes);
        let file = self.lab.dir().join("download").display().to_string();
        let url = format!("http://{WORLD}/bytes/{count_bytes}?seed={seed}");
        self.in_guest(&["curl", "-sS", "--fail", "-m", "60", "-o", &file, &url])?;
        let got = lab::run(&["sha256sum", &file], PATIENCE)?.stdout;
        ensure!(got.starts_with(&want), "download of {count_bytes}: SHA-256 {got} instead of {want}");
        let url = format!("http://{WORLD}/upload");
        let answer = self.in_guest(&["curl", "-sS", "--fail", "-m", "60", "-T", &file, &url])?;
        ensure!(
            answer == format!("{want} {count_bytes}\n"),
            "upload of {count_bytes}: {answer} instead of {want}"
        );
        Ok(())
    }
}

/// The seed of a random test: `VUNET_SEED`, else the machine's randomness; printed.
pub(crate) fn seed() -> u64 {
    let seed = match std::env::var("VUNET_SEED") {
        Ok(text) => text.parse().expect("VUNET_SEED is a decimal number"),
        Err(_) => getrandom::u64().expect("the machine has randomness"),
    };
    println!("VUNET_SEED={seed}");
    seed
}

/// Raises the number of files this process, and those it starts, may have open.
pub(crate) fn allow_files(count: u64) -> Outcome {
    let (pid, limit) = (std::process::id().to_string(), format!("--nofile={count}:{count}"));
    lab::run(&["prlimit", "--pid", &pid, &limit], PATIENCE)?;
    Ok(())
}
