//! Where one sample is taken: namespaces of its own, a back-end, and a guest attached to it.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

use crate::lab::{self, GuestProcess, Lab, LabError, Process, SHORT, WORLD};

/// Time a back-end gets to be up and give a lease.
const LEASE_PATIENCE: Duration = Duration::from_secs(15);
/// Open files a back-end may have: enough for the most flows of any scenario.
const BACKEND_FILES: u32 = 20_000;

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
    /// A vhost-user back-end: the words of its command, with `{socket}` and `{ip_mtu}` in them.
    VhostUser(Vec<String>),
    /// No back-end: the guest's namespace is joined to the world's by a veth pair.
    Veth,
    /// No back-end: two TAPs and a process that copies frames between them.
    TapLoop,
}

impl Backend {
    /// vunet as this workspace built it, or `VUNET_BIN`.
    pub fn vunet() -> Backend {
        let binary = lab::vunet_binary().display().to_string();
        let words = [&*binary, "--socket-path", "{socket}", "--ip-mtu", "{ip_mtu}", "--log-level", "warn"];
        Backend { name: "vunet".into(), kind: BackendKind::VhostUser(words.map(str::to_owned).into()) }
    }

    /// The bounds: what the machine does without any vhost-user.
    pub fn bounds() -> [Backend; 2] {
        [
            Backend { name: "two TAPs".into(), kind: BackendKind::TapLoop },
            Backend { name: "veth".into(), kind: BackendKind::Veth },
        ]
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

fn fill_in(words: &[String], socket: &Path, ip_mtu: u16) -> Vec<String> {
    let (socket, ip_mtu) = (socket.display().to_string(), ip_mtu.to_string());
    words.iter().map(|word| word.replace("{socket}", &socket).replace("{ip_mtu}", &ip_mtu)).collect()
}

/// A lab with a back-end in it. Dropping it ends everything.
pub(super) struct Site {
    // In this order, so that the guest goes first and the namespaces last.
    guest: Option<GuestProcess>,
    backend: Option<Process>,
    pub(super) lab: Lab,
    integration: PathBuf,
    socket: PathBuf,
}

impl Site {
    /// Namespaces, and nothing in them yet.
    pub(super) fn new(integration: &Path) -> Result<Site, BenchError> {
        let lab = Lab::new(integration)?;
        // Router solicitations would wake an idle back-end.
        lab.guest.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        lab.guest.sysctl("net.ipv4.ping_group_range", "0 2147483647")?;
        let socket = lab.dir().join("backend.sock");
        Ok(Site { guest: None, backend: None, lab, integration: integration.to_owned(), socket })
    }

    /// Process id of the back-end, if there is one.
    pub(super) fn backend_pid(&self) -> Option<u32> {
        self.backend.as_ref().map(Process::pid)
    }

    /// The vhost-user socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts `backend` for a guest's link of `ip_mtu`, without a guest if it is a vhost-user one.
    pub(super) fn start(&mut self, backend: &Backend, ip_mtu: u16) -> Result<(), BenchError> {
        match &backend.kind {
            BackendKind::VhostUser(words) => {
                let limit = format!("--nofile={BACKEND_FILES}:{BACKEND_FILES}");
                let command = fill_in(words, &self.socket, ip_mtu);
                let mut words = vec!["prlimit", &limit];
                words.extend(command.iter().map(String::as_str));
                self.backend = Some(self.lab.host.spawn(&words)?);
            }
            BackendKind::Veth => self.join_veth(ip_mtu)?,
            BackendKind::TapLoop => self.join_taps(ip_mtu)?,
        }
        Ok(())
    }

    /// Attaches the namespace guest; it is up when this returns, without an address.
    pub(super) fn attach(
        &mut self,
        backend: &Backend,
        ip_mtu: u16,
        args: &[String],
    ) -> Result<(), BenchError> {
        if matches!(backend.kind, BackendKind::VhostUser(_)) {
            let ip_mtu = ip_mtu.to_string();
            let mut words = vec!["--ip-mtu", &*ip_mtu];
            words.extend(args.iter().map(String::as_str));
            self.guest = Some(self.lab.attach(&self.socket, &words).map_err(|e| self.explain(&e))?);
        }
        Ok(())
    }

    /// What the back-end said, behind an error it may have caused.
    fn explain(&self, error: &LabError) -> BenchError {
        let said = self.backend.as_ref().map(Process::errors).unwrap_or_default();
        BenchError::Result(format!("{error}\nback-end: {}", said.join("\n")))
    }

    /// Starts `backend` with a namespace guest that has an address.
    pub(super) fn ready(
        &mut self,
        backend: &Backend,
        ip_mtu: u16,
        args: &[String],
    ) -> Result<(), BenchError> {
        self.start(backend, ip_mtu)?;
        self.attach(backend, ip_mtu, args)?;
        if self.guest.is_some() {
            self.lab.udhcpc(LEASE_PATIENCE).map_err(|e| self.explain(&e))?;
        }
        Ok(())
    }

    fn join_veth(&self, ip_mtu: u16) -> Result<(), BenchError> {
        let (guest, world, mtu) = (self.lab.guest.name(), self.lab.world.name(), ip_mtu.to_string());
        let pair = ["ip", "link", "add", "eth0", "mtu", &mtu, "netns", guest, "type", "veth"];
        let peer = ["peer", "name", "e1", "mtu", &mtu, "netns", world];
        lab::run(&[&pair[..], &peer].concat(), SHORT)?;
        self.address_ends()
    }

    fn join_taps(&mut self, ip_mtu: u16) -> Result<(), BenchError> {
        let binary = self.integration.display().to_string();
        let ends = [(self.lab.guest.name(), "eth0"), (self.lab.world.name(), "e1")];
        let ends = ends.map(|(netns, tap)| format!("{netns}:{tap}"));
        let words = [&*binary, "tap-loop", &ends[0], &ends[1], "--ip-mtu", &ip_mtu.to_string()];
        let process = Process::start(&words)?;
        process.wait_line(SHORT, "the TAPs", |line| line.contains("\"ready\":true"))?;
        self.backend = Some(process);
        self.address_ends()
    }

    /// Gives the guest vunet's usual address and the world its gateway's, on the link between them.
    fn address_ends(&self) -> Result<(), BenchError> {
        let ends = [(&self.lab.guest, "eth0", lab::GUEST), (&self.lab.world, "e1", lab::GATEWAY)];
        for (netns, interface, address) in ends {
            let address = format!("{address}/24");
            lab::run(&["ip", "-n", netns.name(), "addr", "add", &address, "dev", interface], SHORT)?;
            lab::run(&["ip", "-n", netns.name(), "link", "set", interface, "up"], SHORT)?;
        }
        let via: Ipv4Addr = lab::GATEWAY;
        let words = ["ip", "-n", self.lab.guest.name(), "route", "add", "default", "via"];
        lab::run(&[&words[..], &[&via.to_string()]].concat(), SHORT)?;
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
    pub(super) fn frames(&self, seconds: f64, args: &[&str]) -> Result<serde_json::Value, BenchError> {
        let binary = self.integration.display().to_string();
        let socket = self.socket.display().to_string();
        // Whole seconds, and the datagrams' time must lie within.
        let whole = format!("{}", seconds.ceil());
        let mut words = vec![&*binary, "frames", "--socket", &socket, "--seconds", &whole];
        words.extend(args);
        let patience = SHORT + Duration::from_secs_f64(seconds);
        let output = lab::run(&words, patience).map_err(|e| self.explain(&e))?;
        let line = output.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).map_err(|e| BenchError::Result(format!("frames said {line:?}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_and_a_command_with_a_socket() {
        let peer: Backend = "old=/bin/x -s {socket} -m {ip_mtu}".parse().unwrap();
        assert_eq!(peer.name, "old");
        let BackendKind::VhostUser(words) = peer.kind else { panic!("{peer:?}") };
        assert_eq!(fill_in(&words, Path::new("/s"), 1500), ["/bin/x", "-s", "/s", "-m", "1500"]);
        for bad in ["x", "x=", "=y {socket}", "x=y --no-socket"] {
            assert!(bad.parse::<Backend>().is_err(), "{bad}");
        }
    }
}
