//! `vunet doctor`: which run is asked about.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use super::check::{UsageError, alone, judge_sockets, nat, published};
use super::{DoctorArgs, ModeArg, NatArg, UplinkArg};
use crate::cli::subnet::Notice;
use crate::doctor::{self, Asked, LinkAsked, Report, SubnetNotice, Way, quoted};
use crate::uplink::sys::routes::HostRoute;

/// The command line of the run that one of a doctor asks about.
pub(super) fn words_of_run(mut line: Vec<OsString>) -> Vec<OsString> {
    if let Some(at) = line.iter().position(|word| word == "doctor") {
        line.remove(at);
    }
    line.retain(|word| word != "--json" && word != "--offline");
    line
}

/// A run's command line for a shell.
pub(super) fn run_again(words: &[OsString]) -> String {
    let mut words = words.iter().map(|word| quoted(Path::new(word)));
    let program = words.next().unwrap_or_else(|| "vunet".to_owned());
    let words: Vec<String> = words.collect();
    let attaches = |word: &String| word.starts_with("--socket-path") || word.starts_with("--fd");
    let rest = if words.iter().any(attaches) { "" } else { " ..." };
    std::iter::once(program).chain(words).collect::<Vec<_>>().join(" ") + rest
}

impl DoctorArgs {
    /// Looks at this host. Must be called while the process has one thread.
    ///
    /// # Errors
    /// [`UsageError`] for flags that a run would refuse together.
    pub fn examine(self, routes: io::Result<Vec<HostRoute>>) -> Result<Report, UsageError> {
        self.asked(routes).map(doctor::examine)
    }

    /// Whether the report is for programs.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// The run in question.
    fn asked(self, routes: io::Result<Vec<HostRoute>>) -> Result<Asked, UsageError> {
        let subnet = self.judge(routes)?;
        let run = self.run;
        let publish = published(&run)?;
        let way = match (run.mode, &run.uplink, run.nat) {
            _ if run.network.is_some() => None,
            (ModeArg::HostOnly | ModeArg::None, ..) => Some(Way::Isolated),
            (ModeArg::Bridge, ..) => Some(Way::Bridge),
            (ModeArg::Nat, _, Some(NatArg::Kernel)) => Some(Way::Network),
            (ModeArg::Nat, _, Some(NatArg::Packet)) => Some(Way::Packet),
            (ModeArg::Nat, None | Some(UplinkArg::Sockets), _) => {
                let is_named =
                    run.mode_given || run.uplink.is_some() || run.nat.is_some() || run.socket_path.is_some();
                is_named.then_some(Way::Sockets)
            }
            (ModeArg::Nat, Some(_), _) => Some(Way::Packet),
        };
        let link = match run.uplink {
            None | Some(UplinkArg::Sockets) => LinkAsked::Any,
            Some(UplinkArg::Tap(name)) => LinkAsked::Tap(name),
            Some(UplinkArg::TapFd(_)) => LinkAsked::Inherited,
            Some(UplinkArg::Bridge(name)) => LinkAsked::Bridge(name),
            Some(UplinkArg::MacVtap(name)) => LinkAsked::MacVtap(name),
        };
        Ok(Asked {
            way,
            network: run.network,
            link,
            publish,
            dns_servers: (!run.no_dns).then_some(run.dns_server),
            subnet,
            workers: run.queues.into(),
            state_dir: run.state_dir,
            socket: run.socket_path.map(|path| (path, run.client)),
            control: run.control,
            metrics: run.metrics,
            online: !self.offline,
            line: self.line,
        })
    }

    /// Judges the flags as a run would, as far as that opens nothing and what is asked about is said in full; what is to be said of the
    /// subnet.
    fn judge(&self, routes: io::Result<Vec<HostRoute>>) -> Result<Option<SubnetNotice>, UsageError> {
        let run = &self.run;
        judge_sockets(run)?;
        let is_open = run.mode == ModeArg::Bridge && run.uplink.is_none()
            || run.nat == Some(NatArg::Kernel)
            || run.nat == Some(NatArg::Packet) && run.uplink.is_none();
        if run.network.is_some() || is_open {
            nat(run)?;
            return Ok(None);
        }
        let mut notices = Vec::new();
        alone(run, routes, &mut notices)?;
        let of = |notice: &Notice| SubnetNotice {
            is_warning: matches!(notice, Notice::Warn(_)),
            says: notice.to_string(),
        };
        Ok(notices.first().map(of))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::Ipv4Addr;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::cli::{Command, parse};

    fn args(line: &str) -> DoctorArgs {
        let words = ["vunet", "doctor"].into_iter().chain(line.split_ascii_whitespace());
        match parse(words.map(Into::into)) {
            Ok(Command::Doctor(args)) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn asked(line: &str) -> Asked {
        args(line).asked(Ok(Vec::new())).expect(line)
    }

    #[test]
    fn the_flags_of_a_run_say_which_way_is_asked_about() {
        for (line, way) in [
            ("", None),
            ("--json --offline", None),
            ("--mode nat", Some(Way::Sockets)),
            ("--socket-path s", Some(Way::Sockets)),
            ("--uplink sockets", Some(Way::Sockets)),
            ("--mode none", Some(Way::Isolated)),
            ("--mode host-only", Some(Way::Isolated)),
            ("--mode bridge", Some(Way::Bridge)),
            ("--mode bridge --uplink bridge=br0", Some(Way::Bridge)),
            ("--uplink tap", Some(Way::Packet)),
            ("--nat packet", Some(Way::Packet)),
            ("--nat kernel", Some(Way::Network)),
            ("--network lab", None),
        ] {
            assert_eq!(asked(line).way, way, "{line}");
        }
    }

    #[test]
    fn what_a_run_needs_of_the_host_is_taken_from_its_flags() {
        let line = "--socket-path vm.sock --client --publish 80-81:80-81 --dns-server 192.0.2.1 --queues 4 \
                    --state-dir /s --offline --control ctl --metrics 127.0.0.1:9";
        let found = asked(line);
        assert_eq!(found.socket, Some(("vm.sock".into(), true)));
        assert_eq!(found.control, Some("ctl".into()));
        assert_eq!(found.metrics, Some("127.0.0.1:9".parse().unwrap()));
        assert_eq!((found.publish.len(), found.workers, found.online), (2, 4, false));
        assert_eq!(found.dns_servers, Some(vec!["192.0.2.1:53".parse().unwrap()]));
        assert_eq!(found.state_dir, Some("/s".into()));
        assert_eq!(asked("--no-dns").dns_servers, None);
        assert_eq!(asked("--mode bridge --uplink tap=vm0").link, LinkAsked::Tap(Some("vm0".to_owned())));
        let named = asked("--network lab --publish 80:80");
        assert_eq!((named.network.unwrap().as_str(), named.publish.len()), ("lab", 1));
    }

    #[test]
    fn the_run_can_be_started_again_from_what_is_printed() {
        let line = "--json --mode bridge --uplink bridge=br0 --socket-path vm.sock --offline";
        assert_eq!(asked(line).line, "vunet --mode bridge --uplink bridge=br0 --socket-path vm.sock");
        assert_eq!(asked("--mode bridge").line, "vunet --mode bridge ...");
        assert_eq!(asked("").line, "vunet ...");
        assert_eq!(args("--network doctor --fd 3").line, "vunet --network doctor --fd 3");
        let words = ["/opt/my vunet", "doctor", "--socket-path", "a b"].map(OsString::from);
        assert_eq!(run_again(&words_of_run(words.to_vec())), "'/opt/my vunet' --socket-path 'a b'");
    }

    #[test]
    fn flags_that_a_run_refuses_together_are_refused() {
        for line in [
            "--mode none --publish 1:1",
            "--mode host-only --uplink tap",
            "--publish 1:1 --publish 1:2",
            "--mode bridge --uplink tap-fd=1000000",
            "--fd 1000000",
            "--fd 1000000 --socket-path s",
            "--socket-path s --control ./s",
        ] {
            assert!(args(line).asked(Ok(Vec::new())).is_err(), "{line}");
        }
    }

    #[test]
    fn a_socket_that_is_handed_down_is_looked_at_and_stays() {
        let (socket, peer) = UnixStream::pair().unwrap();
        let number = socket.as_raw_fd();
        assert_eq!(asked(&format!("--fd {number}")).socket, None);
        assert!(args(&format!("--fd {number} --client")).asked(Ok(Vec::new())).is_err());
        drop(socket);
        assert_eq!((&peer).read(&mut [0]).unwrap(), 0, "it was open until now, and is nobody else's");
    }

    #[test]
    fn a_subnet_that_hides_a_network_of_the_host_is_told_of() {
        let route =
            HostRoute { network: Ipv4Addr::new(10, 0, 2, 0), prefix_len: 24, interface: "eth0".to_owned() };
        let of = |line: &str| args(line).asked(Ok(vec![route.clone()])).unwrap().subnet.unwrap();
        assert!(!of("").is_warning, "another default is taken");
        assert!(of("--subnet 10.0.2.0/24").is_warning);
    }
}
