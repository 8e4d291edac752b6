//! The processes under test: vunet, and the front-end that attaches to it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Lab, LabError, Netns, Process, SHORT};
use crate::guest::Counters;

/// How vunet is started.
#[derive(Clone, Debug, Default)]
pub struct BackendOptions {
    /// Arguments besides the socket.
    pub args: Vec<String>,
    /// Run as user and group 65534 without any capability and without a way to get one.
    pub unprivileged: bool,
    /// Soft and hard RLIMIT_NOFILE.
    pub open_files_max: Option<u64>,
}

impl BackendOptions {
    /// Only arguments.
    pub fn args(args: &[&str]) -> BackendOptions {
        BackendOptions { args: args.iter().map(|arg| (*arg).to_owned()).collect(), ..Default::default() }
    }
}

/// A running vunet.
#[derive(Debug)]
pub struct Backend {
    /// The process.
    pub process: Process,
    /// Its vhost-user socket.
    pub socket: PathBuf,
}

/// The vunet binary: `VUNET_BIN`, else the release build of this workspace.
pub fn vunet_binary() -> PathBuf {
    match std::env::var_os("VUNET_BIN") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/vunet"),
    }
}

/// The arguments in the environment variable `name`, unless `args` give the first of them already.
fn more_arguments(name: &str, args: &[&str]) -> Vec<String> {
    let text = std::env::var(name).unwrap_or_default();
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    let is_given = words.first().is_none_or(|flag| args.contains(&flag.as_str()));
    if is_given { Vec::new() } else { words }
}

impl Lab {
    /// Starts vunet in the host namespace and waits for its socket.
    ///
    /// # Errors
    /// If it cannot be started or makes no socket.
    pub fn vunet(&self, options: &BackendOptions) -> Result<Backend, LabError> {
        let socket = self.dir().join("vunet.sock");
        // A dead vunet may have left one behind: wait for the new one.
        // Inode numbers are used again at once, so its time of birth counts too.
        let identity = |socket: &Path| {
            let meta = std::fs::symlink_metadata(socket).ok()?;
            Some((meta.ino(), meta.ctime(), meta.ctime_nsec()))
        };
        let stale = identity(&socket);
        let (at, state) = (socket.display().to_string(), self.state_dir().display().to_string());
        let mut words = vec!["--socket-path", &*at];
        // On a LAN it keeps leases: the lab's, not the host's.
        let has = |word: &str| options.args.iter().any(|arg| arg == word);
        if has("bridge") && !has("--state-dir") {
            words.extend(["--state-dir", &*state]);
        }
        let process = self.start_vunet(options, &words)?;
        let deadline = Instant::now() + SHORT;
        let mut backend = Backend { process, socket };
        while identity(&backend.socket).is_none_or(|now| Some(now) == stale) {
            if Instant::now() > deadline || !backend.process.is_running() {
                let errors = backend.process.errors().join("\n");
                return Err(LabError::Timeout(SHORT, format!("vunet's socket\n{errors}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(backend)
    }

    /// The state directory of the lab's vunet, which makes it.
    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Starts vunet with `args` and the options' arguments, without waiting for anything. `VUNET_ARGS`
    /// adds arguments wherever a test does not give the first of them itself, to run all tests with, say,
    /// several workers.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_vunet(&self, options: &BackendOptions, args: &[&str]) -> Result<Process, LabError> {
        let binary = vunet_binary().display().to_string();
        let limit = options.open_files_max.map(|n| format!("--nofile={n}:{n}"));
        let mut words: Vec<&str> = Vec::new();
        if let Some(limit) = &limit {
            words.extend(["prlimit", limit]);
        }
        if options.unprivileged {
            self.open_dir()?;
            words.extend(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]);
            words.extend(["--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]);
        }
        words.push(&binary);
        words.extend(args);
        let own: Vec<&str> = options.args.iter().map(String::as_str).collect();
        let more = more_arguments("VUNET_ARGS", &own);
        words.extend(more.iter().map(String::as_str));
        words.extend(own);
        self.host.spawn(&words)
    }

    /// Lets any user make files in the lab's directory, as in `/tmp`.
    fn open_dir(&self) -> Result<(), LabError> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(self.dir(), std::fs::Permissions::from_mode(0o1777))
            .map_err(|e| LabError::Io(self.dir().display().to_string(), e))
    }

    /// Attaches the namespace guest to `socket` and waits until its rings run. `args` are further
    /// arguments of `netns-guest`.
    ///
    /// # Errors
    /// If it fails or does not get ready.
    pub fn attach(&self, socket: &Path, args: &[&str]) -> Result<GuestProcess, LabError> {
        self.start_guest(socket, args)?.when_ready()
    }

    /// Starts the namespace guest without waiting for anything. `VUNET_GUEST_ARGS` adds arguments wherever
    /// a test does not give the first of them itself, to run all tests with, say, another ring size.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_guest(&self, socket: &Path, args: &[&str]) -> Result<GuestProcess, LabError> {
        self.start_guest_in(&self.guest, socket, args)
    }

    /// The same in any namespace.
    ///
    /// # Errors
    /// As [`Self::start_guest`].
    pub fn start_guest_in(
        &self,
        netns: &Netns,
        socket: &Path,
        args: &[&str],
    ) -> Result<GuestProcess, LabError> {
        let binary = self.integration.display().to_string();
        let socket = socket.display().to_string();
        let mut words = vec![&*binary, "netns-guest", "--socket", &socket, "--netns", netns.name()];
        words.extend(args);
        let more = more_arguments("VUNET_GUEST_ARGS", args);
        words.extend(more.iter().map(String::as_str));
        // Started outside the guest's namespace: it enters by itself.
        let process = Process::start(&words)?;
        Ok(GuestProcess { process, ready: serde_json::Value::Null })
    }
}

/// A running namespace guest.
#[derive(Debug)]
pub struct GuestProcess {
    /// The front-end.
    pub process: Process,
    /// What it said when its rings ran: `features`, `protocol`, `mac`, `ip_mtu`.
    pub ready: serde_json::Value,
}

impl GuestProcess {
    /// Waits until its rings run.
    pub(super) fn when_ready(self) -> Result<GuestProcess, LabError> {
        let is_ready = |line: &str| line.contains("\"ready\":true");
        let ready = self.process.wait_line(SHORT, "the guest's rings", is_ready)?;
        let ready = serde_json::from_str(&ready).map_err(|e| LabError::Io("ready line".into(), e.into()))?;
        Ok(GuestProcess { ready, ..self })
    }

    /// Its counters now.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn counters(&self) -> Result<Counters, LabError> {
        let before = self.reports().len();
        self.process.ask_report();
        let deadline = Instant::now() + SHORT;
        loop {
            let reports = self.reports();
            if reports.len() > before {
                return Ok(reports[reports.len() - 1]);
            }
            if Instant::now() > deadline {
                return Err(LabError::Timeout(SHORT, "the guest's counters".into()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn reports(&self) -> Vec<Counters> {
        #[derive(serde::Deserialize)]
        struct Line {
            counters: Counters,
        }
        let parse = |line: &String| serde_json::from_str::<Line>(line).ok().map(|line| line.counters);
        self.process.lines().iter().filter_map(parse).collect()
    }

    /// Ends it in order; returns its last counters.
    ///
    /// # Errors
    /// If it printed none.
    pub fn stop(mut self) -> Result<Counters, LabError> {
        let before = self.reports().len();
        self.process.stop();
        let deadline = Instant::now() + SHORT;
        loop {
            let reports = self.reports();
            if let Some(last) = reports.get(before..).and_then(<[Counters]>::last) {
                return Ok(*last);
            }
            if Instant::now() > deadline {
                return Err(LabError::Timeout(SHORT, "the guest's last counters".into()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
