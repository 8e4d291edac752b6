//! The host's links: whether they may be changed, and the one the guest is to be on.
//!
//! Links are looked up and named as `uplink::tap` does; nothing of them is changed.

use super::check::{Check, Fix};
use super::facts::Facts;
use super::privilege::{self, CAP_DAC_OVERRIDE, CAP_MKNOD, Who};
use super::tree::Tree;
use super::way::{Asked, LinkAsked};
use crate::uplink::links::{Link, LinkError, LinkKind, Links};
use crate::uplink::tap::{self, OpenError};

/// The flag of a TAP that was made for several queues (`IFF_MULTI_QUEUE` of `linux/if_tun.h`).
const MULTI_QUEUE: u32 = 0x0100;
/// Owner or group of a TAP that has none.
const NOBODY: u32 = u32::MAX;

/// What is known of the host's links.
#[derive(Clone, Debug)]
pub(super) struct LinkFacts {
    /// Whether this process may change them; in words, why that is not known.
    pub(super) may_change: Result<bool, String>,
    /// All of them.
    pub(super) all: Vec<Link>,
    /// The bridge that is asked for; in words, what is wrong with it.
    pub(super) bridge: Option<Result<Link, String>>,
    /// Persistent TAPs.
    pub(super) taps: Vec<Tap>,
    /// Interfaces that lead to the world.
    pub(super) uplinks: Vec<String>,
}

/// A TAP that somebody made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tap {
    pub(super) name: String,
    owner: Option<u32>,
    group: Option<u32>,
    multi_queue: bool,
}

impl Tap {
    fn read(tree: &Tree, name: &str) -> Option<Tap> {
        let text = |file: &str| tree.text(&format!("/sys/class/net/{name}/{file}"));
        let id = |file| {
            // Without one it is -1.
            let id: i64 = text(file)?.trim().parse().ok()?;
            u32::try_from(id).ok().filter(|id| *id != NOBODY)
        };
        let flags = text("tun_flags")?;
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).ok()?;
        let (owner, group) = (id("owner"), id("group"));
        Some(Tap { name: name.to_owned(), owner, group, multi_queue: flags & MULTI_QUEUE != 0 })
    }

    /// Whether `who` may open it without CAP_NET_ADMIN: the kernel wants one of both to be his (`tun_not_capable`).
    fn is_of(&self, who: Who) -> bool {
        (self.owner.is_some() || self.group.is_some())
            && self.owner.is_none_or(|owner| owner == who.uid)
            && self.group.is_none_or(|group| group == who.gid)
    }
}

impl LinkFacts {
    /// Asks the kernel; needs a tokio runtime.
    pub(super) async fn read(tree: &Tree, asked: &LinkAsked) -> Result<LinkFacts, String> {
        let words = |error: &LinkError| {
            let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            format!("{error}: {source}")
        };
        let links = Links::open().map_err(|error| format!("no netlink socket: {error}"))?;
        let all = links.all().await.map_err(|error| words(&error))?;
        let uplinks = links.to_the_world().await.map_err(|error| words(&error))?;
        let bridge = match asked {
            LinkAsked::Bridge(name) => {
                Some(tap::find_bridge(&links, name).await.map_err(|error| match error {
                    OpenError::Link(error) => words(&error),
                    OpenError::NotABridge(name) => format!("{name} is no bridge"),
                    _ => format!("there is no interface {name}"),
                }))
            }
            _ => None,
        };
        let may_change = links.may_change().await.map_err(|error| words(&error));
        let taps = all.iter().filter(|link| link.kind == LinkKind::Tun);
        let taps = taps.filter_map(|link| Tap::read(tree, &link.name)).collect();
        Ok(LinkFacts { may_change, all, bridge, taps, uplinks })
    }

    /// What is known where the kernel refuses to tell.
    pub(super) fn refused(why: String) -> LinkFacts {
        LinkFacts {
            may_change: Err(why),
            all: Vec::new(),
            bridge: None,
            taps: Vec::new(),
            uplinks: Vec::new(),
        }
    }

    fn find(&self, name: &str) -> Option<&Link> {
        self.all.iter().find(|link| link.name == name)
    }

    fn bridges(&self) -> impl Iterator<Item = &Link> {
        self.all.iter().filter(|link| link.kind == LinkKind::Bridge)
    }

    /// The bridge the guest is to be on, or the first there is where none is named.
    pub(super) fn bridge_of(&self, asked: &LinkAsked) -> Option<&Link> {
        match (asked, &self.bridge) {
            (LinkAsked::Bridge(_), Some(Ok(bridge))) => Some(bridge),
            (LinkAsked::Any, _) => self.bridges().next(),
            _ => None,
        }
    }
}

fn unknown(name: &'static str) -> Check {
    Check::late(name, super::check::State::Missing, "look at `ip link`: the kernel's netlink does not answer")
}

/// The right to change links; not needed on a TAP of this user's or one that a parent opened, but for a named network.
pub(super) fn net_admin(facts: &Facts, asked: &Asked, is_named: bool) -> Option<Check> {
    const NAME: &str = "CAP_NET_ADMIN";
    if asked.link == LinkAsked::Inherited && !is_named {
        return None;
    }
    let Some(links) = &facts.links else { return Some(unknown(NAME)) };
    let who = facts.who;
    match (&links.may_change, &asked.link) {
        (Ok(true), _) => Some(Check::ok(NAME, "this process may make and change links")),
        (Err(error), _) => Some(Check::missing(
            NAME,
            format!("links cannot be changed here: {error}"),
            privilege::get_net_admin(who, &asked.line),
        )),
        (Ok(false), LinkAsked::Tap(Some(name))) if !is_named => {
            match links.taps.iter().find(|tap| tap.name == *name) {
                // `link` judges what is there.
                Some(_) => None,
                None => Some(Check::missing(
                    NAME,
                    format!("this process may not make the TAP {name}"),
                    have_tap(name, who, asked),
                )),
            }
        }
        (Ok(false), LinkAsked::Any) if !is_named && links.taps.iter().any(|tap| tap.is_of(who)) => {
            let own = links.taps.iter().filter(|tap| tap.is_of(who)).map(|tap| &*tap.name);
            let own = own.collect::<Vec<_>>().join(", ");
            let says =
                format!("this process may not make links, but use TAPs of its user: --uplink tap={own}");
            Some(Check::warn(NAME, says, privilege::get_net_admin(who, &asked.line)))
        }
        (Ok(false), _) => {
            let says = "this process may not make or change links";
            Some(Check::missing(NAME, says, privilege::get_net_admin(who, &asked.line)))
        }
    }
}

/// A TAP made for `who` by root.
fn have_tap(name: &str, who: Who, asked: &Asked) -> Fix {
    let multi = if asked.workers > 1 { " multi_queue" } else { "" };
    let uid = who.uid;
    Fix::AsRoot(vec![
        format!("ip tuntap add dev {name} mode tap user {uid}{multi}"),
        format!("ip link set {name} up"),
    ])
}

/// The link that is asked for.
pub(super) fn link(facts: &Facts, asked: &Asked) -> Option<Check> {
    const NAME: &str = "uplink";
    let Some(links) = &facts.links else { return Some(unknown(NAME)) };
    match &asked.link {
        LinkAsked::Any => Some(any(links)),
        LinkAsked::Inherited | LinkAsked::Tap(None) => None,
        LinkAsked::Bridge(name) => match &links.bridge {
            Some(Ok(bridge)) => Some(bridge_state(links, bridge)),
            Some(Err(says)) if links.find(name).is_some() => {
                let advice =
                    format!("name a bridge (ip link show type bridge), or give --uplink macvtap={name}");
                Some(Check::missing(NAME, says.clone(), Fix::advice(advice)))
            }
            Some(Err(says)) => Some(Check::missing(NAME, says.clone(), make_bridge(name))),
            None => Some(unknown(NAME)),
        },
        LinkAsked::Tap(Some(name)) => links.find(name).map(|link| existing_tap(facts, links, link, asked)),
        LinkAsked::MacVtap(name) => Some(lower(links.find(name), name, facts)),
    }
}

fn make_bridge(name: &str) -> Fix {
    Fix::AsRoot(vec![format!("ip link add {name} type bridge"), format!("ip link set {name} up")])
}

fn any(links: &LinkFacts) -> Check {
    const NAME: &str = "uplink";
    let names: Vec<&str> = links.bridges().map(|bridge| &*bridge.name).collect();
    if names.is_empty() {
        let says =
            "there is no bridge here yet: one is needed for --uplink bridge=BRIDGE, not for tap or macvtap";
        return Check::warn(NAME, says, make_bridge("br0"));
    }
    Check::ok(NAME, format!("bridges that --uplink bridge= can name: {}", names.join(", ")))
}

fn bridge_state(links: &LinkFacts, bridge: &Link) -> Check {
    const NAME: &str = "uplink";
    let name = &bridge.name;
    let ports = links.all.iter().filter(|link| link.master == Some(bridge.index)).count();
    if !bridge.up {
        let says = format!("bridge {name} is down: the guest reaches nobody");
        return Check::warn(NAME, says, Fix::root(format!("ip link set {name} up")));
    }
    if ports == 0 {
        let says = format!("bridge {name} has no interface on it: the guest reaches only this host there");
        return Check::warn(
            NAME,
            says,
            Fix::advice(format!("put one on it: ip link set IFNAME master {name}")),
        );
    }
    Check::ok(NAME, format!("bridge {name} is up, with interfaces on it: {ports}"))
}

fn existing_tap(facts: &Facts, links: &LinkFacts, link: &Link, asked: &Asked) -> Check {
    const NAME: &str = "uplink";
    let name = &link.name;
    let tap = links.taps.iter().find(|tap| tap.name == *name);
    let Some(tap) = tap.filter(|_| link.kind == LinkKind::Tun) else {
        let says = format!("an interface {name} exists and is no TAP");
        return Check::missing(NAME, says, Fix::advice("give another name"));
    };
    let may_change = links.may_change == Ok(true);
    let again = |fix: Fix| match fix {
        Fix::AsRoot(mut commands) => {
            commands.insert(0, format!("ip link del {name}"));
            Fix::AsRoot(commands)
        }
        other => other,
    };
    if !may_change && !tap.is_of(facts.who) {
        let says = format!("TAP {name} is not of user {}", facts.who.uid);
        return Check::missing(NAME, says, again(have_tap(name, facts.who, asked)));
    }
    if asked.workers > 1 && !tap.multi_queue {
        let says = format!("TAP {name} was made for one queue, and --queues {} needs more", asked.workers);
        return Check::missing(NAME, says, again(have_tap(name, facts.who, asked)));
    }
    if !link.up && !may_change {
        let says = format!("TAP {name} is down, and this process may not bring it up");
        return Check::missing(NAME, says, Fix::root(format!("ip link set {name} up")));
    }
    Check::ok(NAME, format!("TAP {name} can be used"))
}

/// What a macvtap stands on, and its device.
fn lower(lower: Option<&Link>, name: &str, facts: &Facts) -> Check {
    const NAME: &str = "uplink";
    let Some(lower) = lower else {
        let says = format!("there is no interface {name}");
        return Check::missing(NAME, says, Fix::advice("name one of `ip link show`"));
    };
    let who = facts.who;
    let reaches_device =
        facts.has_devtmpfs && (who.is_root() || who.has(CAP_DAC_OVERRIDE)) || who.has(CAP_MKNOD);
    if !reaches_device {
        let says = format!(
            "a macvtap on {name} could not be opened: its device /dev/tapN is root's, and where /dev is not the kernel's, \
             it has to be made (CAP_MKNOD)"
        );
        return Check::missing(
            NAME,
            says,
            Fix::advice("start vunet as root, or give the container MKNOD (--cap-add MKNOD)"),
        );
    }
    if !lower.up {
        let says = format!("interface {name} is down: the guest reaches nobody");
        return Check::warn(NAME, says, Fix::root(format!("ip link set {name} up")));
    }
    Check::ok(NAME, format!("interface {name} is up, and the device of a macvtap on it can be opened"))
}

/// Whether `/dev` is the kernel's, which makes the devices of macvtaps.
pub(super) fn has_devtmpfs(tree: &Tree) -> bool {
    let is_dev = |line: &str| line.split_whitespace().skip(1).take(2).eq(["/dev", "devtmpfs"]);
    tree.text("/proc/self/mounts").is_some_and(|mounts| mounts.lines().any(is_dev))
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::super::facts::tests::facts;
    use super::super::tree::planted;
    use super::*;

    fn a_link(index: u32, name: &str, kind: LinkKind) -> Link {
        Link {
            index,
            name: name.to_owned(),
            kind,
            mac: None,
            ip_mtu: 1500,
            master: None,
            lower: None,
            up: true,
            alias: None,
        }
    }

    fn none(may_change: bool) -> LinkFacts {
        LinkFacts {
            may_change: Ok(may_change),
            all: Vec::new(),
            bridge: None,
            taps: Vec::new(),
            uplinks: Vec::new(),
        }
    }

    fn user() -> Who {
        Who::parse("Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\nCapEff:\t0\nCapBnd:\tffff\n")
    }

    fn on(link: LinkAsked) -> Asked {
        Asked { link, ..Asked::plain() }
    }

    fn with(links: LinkFacts) -> Facts {
        Facts { links: Some(links), who: user(), ..facts() }
    }

    fn tap(owner: Option<u32>, multi_queue: bool) -> Tap {
        Tap { name: "vm0".to_owned(), owner, group: None, multi_queue }
    }

    #[test]
    fn without_the_right_to_change_links_a_bridge_needs_it_and_a_tap_is_made_by_root() {
        let facts = with(none(false));
        let bridge = net_admin(&facts, &on(LinkAsked::Bridge("br0".to_owned())), false).unwrap();
        assert_eq!((bridge.name, bridge.state), ("CAP_NET_ADMIN", State::Missing));
        assert!(bridge.fix.unwrap().line(false).starts_with("sudo setpriv --reuid=1000"));
        let asked = Asked { workers: 2, ..on(LinkAsked::Tap(Some("vm0".to_owned()))) };
        let made = net_admin(&facts, &asked, false).unwrap();
        assert_eq!(
            made.fix.unwrap().line(true),
            "ip tuntap add dev vm0 mode tap user 1000 multi_queue && ip link set vm0 up"
        );
        assert_eq!(net_admin(&facts, &on(LinkAsked::Inherited), false), None, "a parent opened it");
        let of_network = net_admin(&facts, &on(LinkAsked::Inherited), true).unwrap();
        assert_eq!(of_network.state, State::Missing);
        assert_eq!(net_admin(&with(none(true)), &on(LinkAsked::Any), true).unwrap().state, State::Ok);
    }

    #[test]
    fn taps_of_this_user_are_enough() {
        let mut links = LinkFacts { taps: vec![tap(Some(1000), false)], ..none(false) };
        links.all.push(a_link(7, "vm0", LinkKind::Tun));
        let facts = with(links);
        let named = on(LinkAsked::Tap(Some("vm0".to_owned())));
        assert_eq!(net_admin(&facts, &named, false), None);
        assert_eq!(link(&facts, &named).unwrap().state, State::Ok);
        let any = net_admin(&facts, &on(LinkAsked::Any), false).unwrap();
        assert!(any.state == State::Warn && any.says.contains("tap=vm0"), "{}", any.says);
        let several = link(&facts, &Asked { workers: 2, ..named.clone() }).unwrap();
        assert_eq!(several.state, State::Missing);
        assert!(several.fix.unwrap().line(true).starts_with("ip link del vm0 && ip tuntap add dev vm0"));
        let others = LinkFacts { taps: vec![tap(Some(1001), false)], ..facts.links.unwrap() };
        let check = link(&with(others), &named).unwrap();
        assert!(check.state == State::Missing && check.says.contains("not of user 1000"), "{}", check.says);
    }

    #[test]
    fn taps_are_read_from_files_and_one_without_owner_is_nobodys() {
        let (_folder, tree) = planted(&[
            ("/sys/class/net/a/owner", "1000\n"),
            ("/sys/class/net/a/group", "-1\n"),
            ("/sys/class/net/a/tun_flags", "0x5102\n"),
            ("/sys/class/net/b/owner", "-1\n"),
            ("/sys/class/net/b/group", "-1\n"),
            ("/sys/class/net/b/tun_flags", "0x5002\n"),
        ]);
        let a = Tap::read(&tree, "a").unwrap();
        assert!(a.multi_queue && a.is_of(user()));
        let b = Tap::read(&tree, "b").unwrap();
        assert!(!b.multi_queue && !b.is_of(user()));
        assert_eq!(Tap::read(&tree, "c"), None);
    }

    #[test]
    fn a_bridge_that_is_not_there_is_down_or_empty_says_what_to_do() {
        let asked = on(LinkAsked::Bridge("br0".to_owned()));
        let of = |bridge: Result<Link, String>, all: Vec<Link>| {
            let links = LinkFacts { bridge: Some(bridge), all, ..none(true) };
            let check = link(&with(links), &asked).unwrap();
            (check.state, check.fix.map(|fix| fix.line(true)).unwrap_or_default())
        };
        let bridge = a_link(3, "br0", LinkKind::Bridge);
        let gone = of(Err("there is no interface br0".to_owned()), Vec::new());
        assert_eq!(gone, (State::Missing, "ip link add br0 type bridge && ip link set br0 up".to_owned()));
        let veth = a_link(3, "br0", LinkKind::Other("veth".to_owned()));
        let wrong = of(Err("br0 is no bridge".to_owned()), vec![veth]);
        assert!(wrong.0 == State::Missing && wrong.1.contains("--uplink macvtap=br0"), "{wrong:?}");
        let down = of(Ok(Link { up: false, ..bridge.clone() }), vec![bridge.clone()]);
        assert_eq!(down, (State::Warn, "ip link set br0 up".to_owned()));
        let empty = of(Ok(bridge.clone()), vec![bridge.clone()]);
        assert!(empty.0 == State::Warn && empty.1.contains("master br0"), "{empty:?}");
        let port = Link { master: Some(3), ..a_link(4, "eth1", LinkKind::Plain) };
        assert_eq!(of(Ok(bridge.clone()), vec![bridge.clone(), port]).0, State::Ok);
        let some = LinkFacts { all: vec![bridge], ..none(true) };
        assert_eq!(link(&with(some), &on(LinkAsked::Any)).unwrap().state, State::Ok);
        assert_eq!(link(&with(none(true)), &on(LinkAsked::Any)).unwrap().state, State::Warn);
    }

    #[test]
    fn a_macvtap_needs_its_interface_and_its_device() {
        let asked = on(LinkAsked::MacVtap("eth0".to_owned()));
        let of = |all: Vec<Link>, who: Who, has_devtmpfs| {
            let links = LinkFacts { all, ..none(true) };
            let facts = Facts { who, has_devtmpfs, ..with(links) };
            link(&facts, &asked).unwrap().state
        };
        let eth0 = || vec![a_link(2, "eth0", LinkKind::Plain)];
        let root = Who::parse("Uid:\t0\t0\t0\t0\n");
        let maker = Who::parse("Uid:\t0\t0\t0\t0\nCapEff:\t8000000\n");
        assert_eq!(of(eth0(), root, true), State::Ok);
        assert_eq!(of(eth0(), root, false), State::Missing, "a container's /dev");
        assert_eq!(of(eth0(), maker, false), State::Ok, "made with CAP_MKNOD");
        assert_eq!(of(eth0(), user(), true), State::Missing, "it is root's");
        assert_eq!(of(Vec::new(), root, true), State::Missing);
        assert_eq!(of(vec![Link { up: false, ..eth0().remove(0) }], root, true), State::Warn);
        let (_folder, tree) = planted(&[("/proc/self/mounts", "udev /dev devtmpfs rw 0 0\n")]);
        assert!(has_devtmpfs(&tree));
        let (_folder, tree) =
            planted(&[("/proc/self/mounts", "tmpfs /dev tmpfs rw 0 0\ndevtmpfs /x devtmpfs rw 0 0\n")]);
        assert!(!has_devtmpfs(&tree));
    }

    #[test]
    fn links_that_nobody_could_tell_of_are_missing() {
        let facts = Facts { links: None, ..facts() };
        assert_eq!(net_admin(&facts, &Asked::plain(), false).unwrap().state, State::Missing);
        assert_eq!(link(&facts, &Asked::plain()).unwrap().state, State::Missing);
    }
}
