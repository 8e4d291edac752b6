//! All that is read of this host, once, before anything is judged.
//!
//! What may hang (file systems, netlink, programs, resolvers) is read in threads of their own; what has not come in time
//! is not known. Namespaces are tried first, while this process has one thread.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::firewall::FirewallFacts;
use super::kernel::{Kernel, OpenFiles, Ping};
use super::links::{self, LinkFacts};
use super::names::Names;
use super::places::Places;
use super::ports::{self, Refused};
use super::privilege::{Tun, Who};
use super::routes::Settings;
use super::tree::Tree;
use super::way::{Asked, Group};
use crate::holder;

/// How long namespaces may take.
const NAMESPACES: Duration = Duration::from_secs(1);
/// How long everything else may take: a resolver has two seconds of it.
const READING: Duration = Duration::from_secs(3);

/// What is known of this host.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) who: Who,
    pub(super) kernel: Kernel,
    pub(super) files: OpenFiles,
    pub(super) tun: Tun,
    pub(super) has_devtmpfs: bool,
    pub(super) ping: Ping,
    pub(super) ports: Vec<Refused>,
    /// Why nothing can listen where metrics are asked for.
    pub(super) metrics: Option<io::ErrorKind>,
    pub(super) unprivileged_port_start: u64,
    pub(super) settings: Settings,
    /// These are `None` where they were not wanted or did not come in time.
    pub(super) namespaces: Option<Result<(), String>>,
    pub(super) links: Option<LinkFacts>,
    pub(super) names: Option<Names>,
    pub(super) firewall: Option<FirewallFacts>,
    pub(super) places: Option<Places>,
}

impl Facts {
    /// Reads what `asked` needs of the groups that are `wanted`. Must be called while the process has one thread.
    pub(super) fn read(tree: &Tree, asked: &Asked, wanted: impl Fn(Group) -> bool) -> Facts {
        let namespaces = wanted(Group::Namespaces).then(try_namespaces);
        let deadline = Instant::now() + READING;
        let places = Later::begin({
            let (tree, asked) = (tree.clone(), asked.clone());
            move || Some(Places::read(&tree, &asked))
        });
        let links = wanted(Group::Links).then(|| {
            let (tree, link) = (tree.clone(), asked.link.clone());
            Later::begin(move || {
                let read = on_runtime(LinkFacts::read(&tree, &link))?;
                Some(read.unwrap_or_else(LinkFacts::refused))
            })
        });
        let names = wanted(Group::Names).then(|| {
            let (given, online) = (asked.dns_servers.clone().unwrap_or_default(), asked.online);
            Later::begin(move || on_runtime(Names::read(Names::host_file(), &given, online)))
        });
        let firewall = wanted(Group::Firewall).then(|| {
            let tree = tree.clone();
            Later::begin(move || Some(FirewallFacts::read(&tree)))
        });
        Facts {
            who: Who::read(tree),
            kernel: Kernel::read(tree),
            files: OpenFiles::read(tree),
            tun: Tun::read(tree),
            has_devtmpfs: links::has_devtmpfs(tree),
            ping: Ping::read(tree),
            ports: ports::refused(&asked.publish),
            metrics: asked.metrics.and_then(ports::refused_listener),
            unprivileged_port_start: tree.number("net.ipv4.ip_unprivileged_port_start").unwrap_or(1024),
            settings: Settings::read(tree),
            namespaces,
            links: links.and_then(|links| links.by(deadline)),
            names: names.and_then(|names| names.by(deadline)),
            firewall: firewall.and_then(|firewall| firewall.by(deadline)),
            places: places.by(deadline),
        }
    }
}

fn try_namespaces() -> Result<(), String> {
    holder::try_out(NAMESPACES).map_err(|error| {
        let source =
            std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        format!("{error}{source}")
    })
}

fn on_runtime<T>(future: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    Some(runtime.block_on(future))
}

/// Something that a thread finds out.
struct Later<T>(mpsc::Receiver<Option<T>>);

impl<T: Send + 'static> Later<T> {
    fn begin(work: impl FnOnce() -> Option<T> + Send + 'static) -> Later<T> {
        let (sender, receiver) = mpsc::channel();
        // A thread that cannot be started tells nothing, as one that hangs. Nobody waits for one that is late.
        let _ = thread::Builder::new().name("doctor".to_owned()).spawn(move || {
            let _ = sender.send(work());
        });
        Later(receiver)
    }

    /// It, if it is known by then.
    fn by(self, deadline: Instant) -> Option<T> {
        self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok().flatten()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::uplink::sockets::UdpFeatures;

    /// A host on which nothing is amiss, as far as it is known at all.
    pub(in super::super) fn facts() -> Facts {
        let udp = Ok(UdpFeatures { segmentation: true, coalescing: true });
        Facts {
            who: Who::parse("Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nCapEff:\tffffffff\nCapBnd:\tffffffff\n"),
            kernel: Kernel { release: "6.12.0".to_owned(), peek_offset: true, udp, keeps_descriptors: true },
            files: OpenFiles { hard: 65_536, most: 1 << 20 },
            tun: Tun { refused: None, has_driver: true },
            has_devtmpfs: true,
            ping: Ping { refused: None, groups: None },
            ports: Vec::new(),
            metrics: None,
            unprivileged_port_start: 1024,
            settings: Settings::default(),
            namespaces: None,
            links: None,
            names: None,
            firewall: None,
            places: None,
        }
    }

    #[test]
    fn what_is_not_known_in_time_is_not_waited_for() {
        let begun = Instant::now();
        let deadline = begun + Duration::from_millis(50);
        let late: Later<()> = Later::begin(|| {
            thread::sleep(Duration::from_secs(3600));
            Some(())
        });
        assert_eq!(late.by(deadline), None);
        assert!(begun.elapsed() < Duration::from_secs(60));
        let soon = Later::begin(|| Some(7));
        assert_eq!(soon.by(Instant::now() + Duration::from_secs(60)), Some(7));
    }
}
