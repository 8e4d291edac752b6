//! The ways to run: what a run is asked for, and which checks each way is made of.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::check::Check;
use super::facts::Facts;
use super::{firewall, kernel, links, names, places, ports, privilege, routes};
use crate::config::Publish;
use crate::network::name::NetworkName;

/// A way to give a guest its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `--mode nat` over host sockets.
    Sockets,
    /// `--mode host-only` or `none`.
    Isolated,
    /// `--mode bridge`.
    Bridge,
    /// `--mode nat` on a link.
    Packet,
    /// A named network that the kernel translates.
    Network,
    /// A named network without the world.
    NetworkIsolated,
    /// A named network without privilege.
    Rootless,
    /// The same without the world.
    RootlessIsolated,
}

/// The ways that are told of where none is named, the default first.
pub(super) const ALL: [Way; 6] =
    [Way::Sockets, Way::Isolated, Way::Bridge, Way::Packet, Way::Network, Way::Rootless];

/// What is read in a thread of its own, because it may hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Namespaces,
    Links,
    Names,
    Firewall,
}

impl Way {
    /// In JSON.
    pub fn id(self) -> &'static str {
        match self {
            Way::Sockets => "nat",
            Way::Isolated => "host-only",
            Way::Bridge => "bridge",
            Way::Packet => "nat-packet",
            Way::Network => "network",
            Way::NetworkIsolated => "network-host-only",
            Way::Rootless => "network-rootless",
            Way::RootlessIsolated => "network-rootless-host-only",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Way::Sockets => "nat (without privilege)",
            Way::Isolated => "host-only, none",
            Way::Bridge => "bridge",
            Way::Packet => "nat on a link (--uplink)",
            Way::Network => "named network",
            Way::NetworkIsolated => "named network, host-only",
            Way::Rootless => "named network without privilege (--rootless)",
            Way::RootlessIsolated => "named network without privilege (--rootless), host-only",
        }
    }

    pub(super) fn needs(self, group: Group) -> bool {
        let groups: &[Group] = match self {
            Way::Sockets => &[Group::Links, Group::Names],
            Way::Isolated => &[],
            Way::Bridge => &[Group::Links, Group::Firewall],
            Way::Packet => &[Group::Links, Group::Names, Group::Firewall],
            Way::Network => &[Group::Links, Group::Names, Group::Firewall],
            Way::NetworkIsolated => &[Group::Links, Group::Firewall],
            Way::Rootless => &[Group::Namespaces, Group::Links, Group::Names],
            Way::RootlessIsolated => &[Group::Namespaces],
        };
        groups.contains(&group)
    }

    /// Whether the guest's datagrams and connections are sockets of this host.
    fn is_over_sockets(self) -> bool {
        matches!(self, Way::Sockets | Way::Rootless)
    }

    /// Whether it is a named network whose bridge is in the host's own namespace.
    fn is_network_of_kernel(self) -> bool {
        matches!(self, Way::Network | Way::NetworkIsolated)
    }

    fn is_rootless(self) -> bool {
        matches!(self, Way::Rootless | Way::RootlessIsolated)
    }

    /// Whether a TAP is opened, which neither a macvtap nor one that a parent opened needs.
    fn opens_tun(self, link: &LinkAsked) -> bool {
        let on_tap = !matches!(link, LinkAsked::Inherited | LinkAsked::MacVtap(_));
        self.is_rootless() || self.is_network_of_kernel() || self.is_on_link() && on_tap
    }

    /// Everything it needs, as `facts` have it.
    pub(super) fn checks(self, facts: &Facts, asked: &Asked) -> Vec<Check> {
        let mut checks = Vec::new();
        if self.is_over_sockets() {
            checks.push(kernel::sockets(&facts.kernel));
        }
        checks.push(kernel::open_files(&facts.files, facts.who, asked));
        if self.is_rootless() {
            checks.push(kernel::descriptors(&facts.kernel));
            checks.push(privilege::namespaces(facts.namespaces.as_ref()));
        }
        if self.is_on_link() {
            checks.extend(links::net_admin(
                facts,
                asked,
                self.is_network_of_kernel() || asked.network.is_some(),
            ));
        }
        if self.opens_tun(&asked.link) {
            checks.push(privilege::tun(&facts.tun));
        }
        if matches!(self, Way::Bridge | Way::Packet) {
            checks.extend(links::link(facts, asked));
            checks.extend(firewall::bridged(facts, asked));
        }
        if self.is_network_of_kernel() {
            checks.extend(firewall::of_network(facts, self == Way::Network));
            checks.push(routes::settings(&facts.settings));
        }
        if self == Way::Network {
            checks.push(routes::conntrack(&facts.settings));
            checks.extend(routes::source_validation(facts));
        }
        if self.is_over_sockets() || self == Way::Network {
            checks.extend(ports::published(facts, asked));
        }
        if self.is_over_sockets() {
            checks.push(kernel::ping(&facts.ping));
        }
        if self.is_over_sockets() || matches!(self, Way::Packet | Way::Network) {
            checks.extend(names::resolver(facts.names.as_ref(), asked));
        }
        if self.is_over_sockets() || self == Way::Network {
            checks.push(routes::to_the_world(facts.links.as_ref()));
        }
        if matches!(self, Way::Sockets | Way::Packet) {
            checks.extend(routes::subnet(asked));
        }
        checks.extend(self.places(facts, asked));
        checks
    }

    fn is_on_link(self) -> bool {
        self.is_network_of_kernel() || matches!(self, Way::Bridge | Way::Packet)
    }

    fn places(self, facts: &Facts, asked: &Asked) -> Vec<Check> {
        let mut checks = Vec::new();
        let is_named = asked.network.is_some() || self.is_network_of_kernel() || self.is_rootless();
        if is_named {
            checks.push(places::state_dir(facts.places.as_ref(), facts.who));
            checks.extend(places::network(facts.places.as_ref(), asked));
        } else if self == Way::Bridge {
            checks.push(places::state_dir(facts.places.as_ref(), facts.who).not_needed());
        }
        checks.extend(places::sockets(facts.places.as_ref(), facts.who));
        checks.extend(ports::metrics(facts, asked));
        checks
    }
}

/// The link of `--uplink`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkAsked {
    /// Not named yet.
    Any,
    /// A TAP of our own on this bridge.
    Bridge(String),
    /// A TAP, by name or of our own.
    Tap(Option<String>),
    /// Queues that a parent opened.
    Inherited,
    /// A macvtap on this interface.
    MacVtap(String),
}

/// What is to be said of the guest's subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetNotice {
    /// Whether it hides something from the guest.
    pub is_warning: bool,
    /// In words.
    pub says: String,
}

/// A run, as far as this host has to do with it.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Which way; `None` for all, or for that of [`Self::network`].
    pub way: Option<Way>,
    /// The named network.
    pub network: Option<NetworkName>,
    /// The link.
    pub link: LinkAsked,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<Publish>,
    /// Resolvers given by hand; without any, those of `/etc/resolv.conf`. `None` if no names are answered.
    pub dns_servers: Option<Vec<SocketAddr>>,
    /// What is to be said of the subnet.
    pub subnet: Option<SubnetNotice>,
    /// Queue pairs, each with a worker.
    pub workers: usize,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// `--socket-path`, and whether vunet connects to it.
    pub socket: Option<(PathBuf, bool)>,
    /// `--control`.
    pub control: Option<PathBuf>,
    /// `--metrics`.
    pub metrics: Option<SocketAddr>,
    /// Whether resolvers may be asked.
    pub online: bool,
    /// The run as it would be started, for a shell; `...` stands for flags that are left out.
    pub line: String,
}

#[cfg(test)]
impl Asked {
    /// A run without flags.
    pub(super) fn plain() -> Asked {
        Asked {
            way: None,
            network: None,
            link: LinkAsked::Any,
            publish: Vec::new(),
            dns_servers: Some(Vec::new()),
            subnet: None,
            workers: 1,
            state_dir: None,
            socket: None,
            control: None,
            metrics: None,
            online: true,
            line: "vunet ...".to_owned(),
        }
    }
}
