//! The way to the world, and the settings it passes by.
//!
//! Read first: `Documentation/networking/ip-sysctl.rst` and `nf_conntrack-sysctl.rst` of Linux.

use std::io;

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::check::{Check, Fix, State};
use super::facts::Facts;
use super::links::LinkFacts;
use super::tree::Tree;
use super::way::Asked;

/// Connections that hosts of a few guests have; below it a full table is likely.
const CONNTRACK_FEW: u64 = 16_384;
/// What to raise it to.
const CONNTRACK_ENOUGH: u64 = 262_144;
/// Setting that vunet sets of each interface to the world.
const FORWARDING: &str = "/proc/sys/net/ipv4/conf/all/forwarding";

/// Settings of the kernel that concern what it forwards.
#[derive(Clone, Debug, Default)]
pub(super) struct Settings {
    /// Why settings cannot be made.
    pub(super) refused: Option<io::ErrorKind>,
    /// `net.ipv4.ip_forward`.
    pub(super) is_router: bool,
    /// Whether iptables sees bridged frames.
    pub(super) bridge_netfilter: bool,
    /// `net.ipv4.conf.all.rp_filter`.
    pub(super) rp_filter: u64,
    /// The same of each interface to the world is read with it.
    pub(super) strict: Vec<String>,
    /// Connections tracked now, and at most.
    pub(super) conntrack: Option<(u64, u64)>,
}

impl Settings {
    pub(super) fn read(tree: &Tree) -> Settings {
        let writable = accessat(CWD, tree.path(FORWARDING), Access::WRITE_OK, AtFlags::EACCESS);
        let count = tree.number("net.netfilter.nf_conntrack_count");
        let most = tree.number("net.netfilter.nf_conntrack_max");
        Settings {
            refused: writable.err().map(|error| io::Error::from(error).kind()),
            is_router: tree.number("net.ipv4.ip_forward") == Some(1),
            bridge_netfilter: tree.number("net.bridge.bridge-nf-call-iptables") == Some(1),
            rp_filter: tree.number("net.ipv4.conf.all.rp_filter").unwrap_or(0),
            strict: strict(tree),
            conntrack: count.zip(most),
        }
    }
}

/// Interfaces whose own `rp_filter` is strict.
fn strict(tree: &Tree) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(tree.path("/proc/sys/net/ipv4/conf")) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    // A name may have dots in it, so that it is no part of a setting's name.
    let is_strict = |name: &String| {
        let value = tree.text(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        value.is_some_and(|value| value.trim() == "1")
    };
    names.filter(is_strict).collect()
}

/// Whether forwarding can be switched on.
pub(super) fn settings(settings: &Settings) -> Check {
    const NAME: &str = "sysctl";
    match settings.refused {
        None if settings.is_router => Check::ok(NAME, "net.ipv4.ip_forward is 1, the host forwards already"),
        None => Check::ok(NAME, "forwarding can be switched on, interface by interface"),
        Some(io::ErrorKind::ReadOnlyFilesystem) => Check::missing(
            NAME,
            "/proc/sys is read-only here, so that forwarding and the bridge cannot be set up",
            Fix::root("mount -o remount,rw /proc/sys"),
        ),
        Some(io::ErrorKind::PermissionDenied) => {
            // For want of CAP_NET_ADMIN, which is told of by itself.
            Check::ok(NAME, "settings are for those with CAP_NET_ADMIN")
        }
        Some(kind) => Check::missing(
            NAME,
            format!("{FORWARDING} cannot be written: {kind}"),
            Fix::advice("run vunet where /proc is the kernel's, or make the network with --rootless"),
        ),
    }
}

/// Room in the kernel's table of connections.
pub(super) fn conntrack(settings: &Settings) -> Check {
    const NAME: &str = "conntrack";
    let raise = || Fix::sysctl(&[&*format!("net.netfilter.nf_conntrack_max={CONNTRACK_ENOUGH}")]);
    match settings.conntrack {
        None => Check::ok(NAME, "not in use yet"),
        // 0 is no limit.
        Some((count, max)) if max > 0 && count >= max / 10 * 9 => {
            let says =
                format!("{count} of {max} connections are in the table: new ones of guests will be dropped");
            Check::warn(NAME, says, raise())
        }
        Some((_, max)) if (1..CONNTRACK_FEW).contains(&max) => {
            let says = format!("room for {max} connections, of all guests and of the host together");
            Check::warn(NAME, says, raise())
        }
        Some((count, 0)) => Check::ok(NAME, format!("{count} connections, without a limit")),
        Some((count, max)) => Check::ok(NAME, format!("{count} of {max} connections")),
    }
}

/// Strict reverse path filtering, where there are several ways to the world.
pub(super) fn source_validation(facts: &Facts) -> Option<Check> {
    const NAME: &str = "rp_filter";
    let uplinks = &facts.links.as_ref()?.uplinks;
    // The larger of both counts, and 2 is loose.
    let all = facts.settings.rp_filter;
    let is_strict = |name: &&String| all == 1 || all == 0 && facts.settings.strict.contains(name);
    let strict: Vec<&str> = uplinks.iter().filter(is_strict).map(|name| &**name).collect();
    if uplinks.len() < 2 || strict.is_empty() {
        return None;
    }
    let says = format!(
        "several interfaces lead to the world ({}), and {} drop what comes back by another than it left by",
        uplinks.join(", "),
        strict.join(", ")
    );
    Some(Check::warn(NAME, says, Fix::sysctl(&["net.ipv4.conf.all.rp_filter=2"])))
}

/// A route to the world.
pub(super) fn to_the_world(links: Option<&LinkFacts>) -> Check {
    const NAME: &str = "route";
    let Some(links) = links else {
        return Check::late(NAME, State::Warn, "look at `ip route`: the kernel's netlink does not answer");
    };
    if let (Err(why), true) = (&links.may_change, links.uplinks.is_empty()) {
        let says = format!("this host's routes cannot be listed: {why}");
        return Check::warn(NAME, says, Fix::advice("look at `ip route` whether there is a default route"));
    }
    if links.uplinks.is_empty() {
        return Check::warn(
            NAME,
            "no default route: the guest reaches only what this host has a route to",
            Fix::advice("connect the host, or `ip route add default via ROUTER`"),
        );
    }
    Check::ok(NAME, format!("the world is reached by {}", links.uplinks.join(", ")))
}

/// What is to be said of the guest's subnet.
pub(super) fn subnet(asked: &Asked) -> Option<Check> {
    const NAME: &str = "subnet";
    let notice = asked.subnet.as_ref()?;
    if !notice.is_warning {
        return Some(Check::ok(NAME, notice.says.clone()));
    }
    let fix = Fix::advice("give --subnet ADDRESS/PREFIX that no route of this host overlaps (ip route)");
    Some(Check::warn(NAME, notice.says.clone(), fix))
}

#[cfg(test)]
mod tests {
    use super::super::facts::tests::facts;
    use super::super::tree::planted;
    use super::super::way::SubnetNotice;
    use super::*;

    fn links(uplinks: &[&str]) -> LinkFacts {
        let uplinks = uplinks.iter().map(|name| (*name).to_owned()).collect();
        LinkFacts { may_change: Ok(true), all: Vec::new(), bridge: None, taps: Vec::new(), uplinks }
    }

    #[test]
    fn settings_are_read_from_their_files() {
        let (_folder, tree) = planted(&[
            (FORWARDING, "0\n"),
            ("/proc/sys/net/ipv4/ip_forward", "1\n"),
            ("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n"),
            ("/proc/sys/net/ipv4/conf/all/rp_filter", "2\n"),
            ("/proc/sys/net/ipv4/conf/eth0.7/rp_filter", "1\n"),
            ("/proc/sys/net/netfilter/nf_conntrack_count", "5\n"),
            ("/proc/sys/net/netfilter/nf_conntrack_max", "9\n"),
        ]);
        let read = Settings::read(&tree);
        assert!(read.is_router && read.bridge_netfilter && read.refused.is_none());
        assert_eq!((read.rp_filter, read.conntrack), (2, Some((5, 9))));
        assert_eq!(read.strict, ["eth0.7"]);
        let (_folder, tree) = planted(&[]);
        let none = Settings::read(&tree);
        assert_eq!((none.refused, none.conntrack), (Some(io::ErrorKind::NotFound), None));
    }

    #[test]
    fn settings_that_cannot_be_made_are_missing() {
        let of = |refused| settings(&Settings { refused, ..Settings::default() });
        assert_eq!(of(None).state, State::Ok);
        let read_only = of(Some(io::ErrorKind::ReadOnlyFilesystem));
        assert_eq!(read_only.state, State::Missing);
        assert_eq!(read_only.fix.unwrap().line(true), "mount -o remount,rw /proc/sys");
        assert_eq!(of(Some(io::ErrorKind::NotFound)).state, State::Missing);
        assert_eq!(of(Some(io::ErrorKind::PermissionDenied)).state, State::Ok, "told of as CAP_NET_ADMIN");
    }

    #[test]
    fn a_table_of_connections_that_is_small_or_full_is_raised() {
        let conntrack_of = |conntrack| super::conntrack(&Settings { conntrack, ..Settings::default() });
        assert_eq!(conntrack_of(None).state, State::Ok);
        assert_eq!(conntrack_of(Some((10, 65_536))).state, State::Ok);
        assert_eq!(conntrack_of(Some((10, 0))).state, State::Ok, "no limit");
        assert_eq!(conntrack_of(Some((10, 8192))).state, State::Warn);
        let full = conntrack_of(Some((60_000, 65_536)));
        assert_eq!(full.state, State::Warn);
        assert_eq!(full.fix.unwrap().line(true), "sysctl -w net.netfilter.nf_conntrack_max=262144");
    }

    #[test]
    fn strict_filtering_matters_with_several_ways_to_the_world() {
        let of = |uplinks: &[&str], rp_filter, strict: &[&str]| {
            let strict = strict.iter().map(|name| (*name).to_owned()).collect();
            let settings = Settings { rp_filter, strict, ..Settings::default() };
            source_validation(&Facts { links: Some(links(uplinks)), settings, ..facts() })
        };
        assert_eq!(of(&["eth0"], 1, &[]), None);
        assert_eq!(of(&["eth0", "wg0"], 0, &["lo"]), None);
        assert_eq!(of(&["eth0", "wg0"], 2, &["eth0"]), None, "loose wins");
        let both = of(&["eth0", "wg0"], 0, &["wg0"]).unwrap();
        assert!(both.says.contains("wg0 drop"), "{}", both.says);
        assert_eq!(both.fix.unwrap().line(true), "sysctl -w net.ipv4.conf.all.rp_filter=2");
        assert!(of(&["eth0", "wg0"], 1, &[]).is_some());
    }

    #[test]
    fn a_host_without_a_default_route_or_an_answer_is_warned_of() {
        assert_eq!(to_the_world(Some(&links(&["eth0"]))).state, State::Ok);
        assert_eq!(to_the_world(Some(&links(&[]))).state, State::Warn);
        assert_eq!(to_the_world(None).state, State::Warn);
        let refused = to_the_world(Some(&LinkFacts::refused("not here".to_owned())));
        assert!(refused.state == State::Warn && refused.says.contains("not here"), "{}", refused.says);
        let with = |is_warning| {
            let subnet = Some(SubnetNotice { is_warning, says: "overlaps".to_owned() });
            super::subnet(&Asked { subnet, ..Asked::plain() }).unwrap().state
        };
        assert_eq!((with(true), with(false)), (State::Warn, State::Ok));
    }
}
