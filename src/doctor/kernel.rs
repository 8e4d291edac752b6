//! What the kernel can do for sockets: features that are used, open files, ICMP echo.
//!
//! Features are tried on sockets of our own, as `uplink::sockets` does, never derived from a version.
//!
//! Read first: socket(7), udp(7), icmp(7), getrlimit(2).

use std::io;

use rustix::process::{Resource, getrlimit};

use super::check::{Check, Fix};
use super::privilege::{CAP_SYS_RESOURCE, Who};
use super::tree::Tree;
use super::way::Asked;
use crate::limits;
use crate::sandbox::namespaces::keep_from_children;
use crate::uplink::sockets::{self, UdpFeatures};

/// The hard limit that systemd gives services; plenty.
const OPEN_FILES: u64 = 524_288;
/// Flows below which a guest that does more than one thing at a time is held up: a browser opens some hundred.
const FLOWS_FEW: usize = 512;

/// What sockets can do here.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// Its version, as it says.
    pub(super) release: String,
    /// Whether TCP peeks from an offset.
    pub(super) peek_offset: bool,
    /// What UDP can do; in words, why it cannot be had.
    pub(super) udp: Result<UdpFeatures, String>,
    /// Whether descriptors can be kept from programs that are started.
    pub(super) keeps_descriptors: bool,
}

impl Kernel {
    pub(super) fn read(tree: &Tree) -> Kernel {
        Kernel {
            release: tree.sysctl("kernel.osrelease").unwrap_or_default(),
            peek_offset: sockets::tcp_knows_peek_offset(),
            udp: sockets::try_udp().map_err(|error| error.to_string()),
            // What this process has open is nobody else's business either.
            keeps_descriptors: keep_from_children().is_ok(),
        }
    }
}

/// Features of sockets.
pub(super) fn sockets(kernel: &Kernel) -> Check {
    const NAME: &str = "kernel";
    let release = &kernel.release;
    let udp = match &kernel.udp {
        Ok(udp) => udp,
        Err(error) => {
            let says =
                format!("Linux {release}: no UDP socket can be had with IP_RECVERR and IP_RECVTOS ({error})");
            return Check::missing(
                NAME,
                says,
                Fix::advice("run vunet outside of the sandbox that refuses them"),
            );
        }
    };
    let lacking = [
        (kernel.peek_offset, "SO_PEEK_OFF on TCP", "6.9"),
        (udp.segmentation, "UDP_SEGMENT", "4.18"),
        (udp.coalescing, "UDP_GRO", "5.0"),
    ];
    let lacking = || lacking.iter().filter(|(has, ..)| !has);
    match lacking().map(|(.., since)| *since).next() {
        None => {
            Check::ok(NAME, format!("Linux {release}: SO_PEEK_OFF on TCP, UDP_SEGMENT, UDP_GRO, IP_RECVERR"))
        }
        Some(since) => {
            let names: Vec<&str> = lacking().map(|(_, name, _)| *name).collect();
            let says = format!(
                "Linux {release} lacks {}: everything works, and costs more CPU time",
                names.join(", ")
            );
            Check::warn(NAME, says, Fix::advice(format!("boot a kernel of Linux {since} or later")))
        }
    }
}

/// What starting the holder of a network needs.
pub(super) fn descriptors(kernel: &Kernel) -> Check {
    const NAME: &str = "close_range";
    let release = &kernel.release;
    if kernel.keeps_descriptors {
        return Check::ok(NAME, "descriptors can be kept from the network's holder");
    }
    let says = format!(
        "Linux {release} cannot keep descriptors from a program that is started (CLOSE_RANGE_CLOEXEC)"
    );
    Check::missing(NAME, says, Fix::advice("boot a kernel of Linux 5.11 or later"))
}

/// How many files may be open.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpenFiles {
    /// What vunet raises its own limit to.
    pub(super) hard: u64,
    /// What root may raise that to.
    pub(super) most: u64,
}

impl OpenFiles {
    pub(super) fn read(tree: &Tree) -> OpenFiles {
        let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        OpenFiles { hard, most: tree.number("fs.nr_open").unwrap_or(OPEN_FILES) }
    }
}

/// The open files limit, against flows.
pub(super) fn open_files(files: &OpenFiles, who: Who, asked: &Asked) -> Check {
    const NAME: &str = "open files";
    let (hard, workers, published) = (files.hard, asked.workers.max(1), asked.publish.len());
    let flows = limits::flows_max(hard, published, workers).saturating_mul(workers);
    let least = limits::RESERVED_FDS_WORKER * workers + limits::FLOWS_MIN + published;
    let enough = OPEN_FILES.min(files.most);
    let fix = || match who.could_have(CAP_SYS_RESOURCE) {
        true => Fix::root(format!("prlimit --pid $$ --nofile={enough}:{enough}")),
        // Root neither, then.
        false => Fix::advice(format!(
            "have the container started with more (docker run --ulimit nofile={enough}:{enough})"
        )),
    };
    let how = "raise it in the shell that starts vunet, or with LimitNOFILE= of its service";
    if hard < least as u64 {
        let says = format!("the hard limit is {hard}, and vunet itself needs {least} with 16 flows; {how}");
        return Check::missing(NAME, says, fix());
    }
    if flows < FLOWS_FEW {
        let says = format!("the hard limit is {hard}, which leaves room for {flows} flows; {how}");
        return Check::warn(NAME, says, fix());
    }
    Check::ok(NAME, format!("the hard limit is {hard}, room for {flows} flows"))
}

/// Whether ICMP echo sockets can be had.
#[derive(Clone, Debug)]
pub(super) struct Ping {
    /// None if they can; else why not.
    pub(super) refused: Option<io::ErrorKind>,
    /// `net.ipv4.ping_group_range`.
    pub(super) groups: Option<String>,
}

impl Ping {
    pub(super) fn read(tree: &Tree) -> Ping {
        let refused = sockets::try_ping().err().map(|error| error.kind());
        Ping { refused, groups: tree.sysctl("net.ipv4.ping_group_range") }
    }
}

/// ICMP echo.
pub(super) fn ping(ping: &Ping) -> Check {
    const NAME: &str = "ping";
    match (ping.refused, &ping.groups) {
        (None, _) => Check::ok(NAME, "ICMP echo sockets can be had"),
        (Some(io::ErrorKind::PermissionDenied), Some(groups)) => Check::warn(
            NAME,
            format!(
                "the guest's pings go nowhere: net.ipv4.ping_group_range is '{groups}', without this user's group"
            ),
            Fix::sysctl(&["net.ipv4.ping_group_range='0 2147483647'"]),
        ),
        (Some(_), _) => Check::warn(
            NAME,
            "the guest's pings go nowhere: ICMP echo sockets are refused here",
            Fix::advice("run vunet outside of the sandbox that refuses them; everything else works"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::*;

    fn kernel() -> Kernel {
        let udp = Ok(UdpFeatures { segmentation: true, coalescing: true });
        Kernel { release: "6.12.1".to_owned(), peek_offset: true, udp, keeps_descriptors: true }
    }

    #[test]
    fn a_kernel_that_lacks_a_feature_is_slower_and_says_since_when_there_is_one() {
        assert_eq!(sockets(&kernel()).state, State::Ok);
        let old = sockets(&Kernel { release: "6.1.0".to_owned(), peek_offset: false, ..kernel() });
        assert_eq!(old.state, State::Warn);
        assert!(old.says.contains("Linux 6.1.0 lacks SO_PEEK_OFF"), "{}", old.says);
        assert!(old.fix.unwrap().line(true).contains("6.9"));
        let older = Ok(UdpFeatures { segmentation: true, coalescing: false });
        let check = sockets(&Kernel { peek_offset: false, udp: older, ..kernel() });
        assert!(check.says.contains("SO_PEEK_OFF on TCP, UDP_GRO"), "{}", check.says);
        let none = sockets(&Kernel { udp: Err("not here".to_owned()), ..kernel() });
        assert_eq!(none.state, State::Missing);
        assert!(none.says.contains("not here"));
        assert_eq!(descriptors(&kernel()).state, State::Ok);
        assert_eq!(descriptors(&Kernel { keeps_descriptors: false, ..kernel() }).state, State::Missing);
    }

    #[test]
    fn open_files_are_judged_by_the_flows_they_leave_room_for() {
        let who = Who::parse("CapBnd:\t1ffffffffff\n");
        let of = |hard, asked: &Asked| open_files(&OpenFiles { hard, most: 1 << 20 }, who, asked);
        let one = Asked::plain();
        let missing = of(64, &one);
        assert_eq!(missing.state, State::Missing);
        assert_eq!(missing.fix.unwrap().line(true), "prlimit --pid $$ --nofile=524288:524288");
        assert_eq!(of(79, &one).state, State::Missing, "one short");
        assert_eq!(of(80, &one).state, State::Warn, "as many as it takes");
        assert_eq!(of(895, &one).state, State::Warn);
        assert_eq!(of(896, &one).state, State::Ok);
        assert_eq!(of(1024, &Asked { workers: 16, ..Asked::plain() }).state, State::Missing);
        assert!(of(u64::MAX, &one).says.contains("262144 flows"));
        let bounded = open_files(&OpenFiles { hard: 64, most: 4096 }, who, &one);
        assert!(
            bounded.fix.unwrap().line(false).ends_with("--nofile=4096:4096"),
            "root may not raise it further"
        );
        let contained =
            open_files(&OpenFiles { hard: 64, most: 4096 }, Who::parse("CapBnd:\t0\n"), &one).fix.unwrap();
        assert!(!contained.is_command() && contained.line(true).contains("--ulimit nofile=4096:4096"));
    }

    #[test]
    fn the_group_range_is_named_where_it_forbids_pings() {
        let of = |refused, groups: Option<&str>| ping(&Ping { refused, groups: groups.map(str::to_owned) });
        assert_eq!(of(None, Some("1 0")).state, State::Ok, "what was tried counts");
        let denied = of(Some(io::ErrorKind::PermissionDenied), Some("1 0"));
        assert_eq!(denied.state, State::Warn);
        assert_eq!(denied.fix.unwrap().line(true), "sysctl -w net.ipv4.ping_group_range='0 2147483647'");
        let sandboxed = of(Some(io::ErrorKind::Unsupported), None);
        assert!(!sandboxed.fix.unwrap().is_command());
    }
}
