//! `--mode bridge`: the guest is a station of a network that has its own gateway, so that no flag of ours
//! about one has a meaning; and the flags that have one there only.

use super::check::{UsageError, publishing_flag};
use super::{Args, ModeArg, UplinkArg, subnet};
use crate::config::{DnsConfig, GuardConfig, KeepLeases, Lan, LinkConfig, LinkSource};
use crate::network::state_dir::{self, StateDirError};
use crate::uplink::sys::tap::{InheritedTapError, TapQueue};

/// Folder of the leases of stations, in the state directory or in a network's folder.
pub(super) const STATIONS_FOLDER: &str = "stations";

/// The link of `--uplink` in bridge mode; `None` in others. Descriptors of `tap-fd` are taken.
pub(super) fn link(args: &Args) -> Result<Option<LinkConfig>, UsageError> {
    if args.mode != ModeArg::Bridge {
        return refuse_outside(args).map(|()| None);
    }
    refuse_within(args)?;
    if let Some(UplinkArg::MacVtap(name)) = &args.uplink
        && args.mac.is_none()
    {
        return Err(UsageError::MacVtapNeedsMac(name.clone()));
    }
    let source = source(args)?;
    let guard = GuardConfig { mac: args.mac, ipv4: args.guest_ip };
    let guard = (!args.trust_guest).then_some(guard);
    let keep = guard.filter(|guard| guard.ipv4.is_none()).map(|_| keep(args, &source)).transpose()?;
    Ok(Some(LinkConfig { source, vlan: args.vlan, guard, gateway: None, keep, translate: None }))
}

/// Where the guest's leases on the LAN at `source` are kept.
fn keep(args: &Args, source: &LinkSource) -> Result<KeepLeases, UsageError> {
    let folder = match state_dir::locate(args.state_dir.as_deref()) {
        Ok(state) => Some(state.join(STATIONS_FOLDER)),
        Err(StateDirError::Nowhere) => None,
        Err(error) => return Err(UsageError::Network(Box::new(error.into()))),
    };
    let link = match source {
        LinkSource::Tap(None) => "tap".to_owned(),
        LinkSource::Tap(Some(name)) => format!("tap-{name}"),
        LinkSource::Inherited(queues) => format!("tap-{}", queues.first().map_or("", TapQueue::name)),
        LinkSource::Bridge(name) => format!("bridge-{name}"),
        LinkSource::MacVtap(name) => format!("macvtap-{name}"),
    };
    let vlan = args.vlan.map_or(String::new(), |vlan| format!("-vlan-{}", vlan.get()));
    Ok(KeepLeases { folder, link: link + &vlan })
}

/// The link of `--uplink`. Descriptors of `tap-fd` are taken, unless the run is only asked about.
pub(super) fn source(args: &Args) -> Result<LinkSource, UsageError> {
    match &args.uplink {
        None => Err(UsageError::BridgeNeedsUplink),
        Some(UplinkArg::Sockets) => Err(UsageError::BridgeOverSockets),
        Some(UplinkArg::Tap(name)) => Ok(LinkSource::Tap(name.clone())),
        Some(UplinkArg::TapFd(fds)) if args.is_only_asked => {
            judge_descriptors(fds, args.queues).map(|()| LinkSource::Tap(None))
        }
        Some(UplinkArg::TapFd(fds)) => inherited(fds, args.queues).map(LinkSource::Inherited),
        Some(UplinkArg::Bridge(name)) => Ok(LinkSource::Bridge(name.clone())),
        Some(UplinkArg::MacVtap(name)) => Ok(LinkSource::MacVtap(name.clone())),
    }
}

fn inherited(fds: &[i32], queues: u8) -> Result<Vec<TapQueue>, UsageError> {
    judge_descriptors(fds, queues)?;
    let take = |fd: &i32| TapQueue::inherited(*fd).map_err(|reason| UsageError::TapFd { fd: *fd, reason });
    fds.iter().map(take).collect()
}

/// Whether these are one queue for each of `queues`, all of one interface.
fn judge_descriptors(fds: &[i32], queues: u8) -> Result<(), UsageError> {
    if fds.len() != usize::from(queues) {
        return Err(UsageError::TapFdCount { given: fds.len(), queues });
    }
    let mut first: Option<String> = None;
    for (at, fd) in fds.iter().copied().enumerate() {
        // Each is taken once: a number given twice would be closed twice.
        let reason = match fds[..at].contains(&fd) {
            true => Err(InheritedTapError::Twice),
            false => TapQueue::examine(fd),
        };
        let (name, _) = reason.map_err(|reason| UsageError::TapFd { fd, reason })?;
        match &first {
            Some(first) if *first != name => {
                return Err(UsageError::TapFdInterfaces { fd, name, first: first.clone() });
            }
            Some(_) => {}
            None => first = Some(name),
        }
    }
    Ok(())
}

/// Our gateway in bridge mode: there is none that any frame reaches.
pub(super) fn no_gateway(args: &Args) -> (Lan, DnsConfig) {
    let subnet = subnet::isolated_default();
    let gateway = subnet.host(1).expect("the default subnet has hosts");
    let lan = Lan { subnet, gateway, guest: None, ip_mtu: args.ip_mtu, dhcp: false };
    (lan, DnsConfig { enabled: false, domain: DnsConfig::DEFAULT_DOMAIN.to_owned(), hosts: Vec::new() })
}

pub(super) fn refuse_within(args: &Args) -> Result<(), UsageError> {
    let addresses = "that network's DHCP or the guest itself decides its addresses";
    let names = "that network's DHCP tells the guest its resolvers, and vunet answers no names there";
    let publishing = publishing_flag(args);
    let udp = "nothing is translated, so no datagram has a port of this host";
    let given = [
        (
            publishing.is_some(),
            publishing.unwrap_or_default(),
            "the guest has an address of its own that others reach",
        ),
        (args.allow_host_loopback, "--allow-host-loopback", "there is no gateway of ours on that network"),
        (args.subnet.is_some(), "--subnet", addresses),
        (args.gateway.is_some(), "--gateway", addresses),
        (args.no_dhcp, "--no-dhcp", "vunet answers no DHCP there"),
        (!args.dns_server.is_empty(), "--dns-server", names),
        (args.dns_domain.is_some(), "--dns-domain", names),
        (!args.dns_host.is_empty(), "--dns-host", names),
        (args.no_dns, "--no-dns", "vunet answers no names there"),
        (args.udp_mapping.is_some(), "--udp-mapping", udp),
        (args.udp_filtering.is_some(), "--udp-filtering", udp),
        (
            args.guest_ip.is_some() && args.trust_guest,
            "--guest-ip",
            "it says what address the guest may send from, and --trust-guest lets it send from any",
        ),
    ];
    match given.into_iter().find(|(given, ..)| *given) {
        Some((_, flag, why)) => Err(UsageError::NotWithBridge { flag: flag.to_owned(), why }),
        None => Ok(()),
    }
}

fn refuse_outside(args: &Args) -> Result<(), UsageError> {
    if let Some(vlan) = args.vlan {
        let flag = format!("--vlan {}", vlan.get());
        return Err(UsageError::NeedsBridge { flag, why: "no other mode sends frames to a network" });
    }
    if args.trust_guest {
        let flag = "--trust-guest".to_owned();
        return Err(UsageError::NeedsBridge {
            flag,
            why: "in other modes, but on a named network, the guest meets nobody it could deceive",
        });
    }
    match &args.uplink {
        None | Some(UplinkArg::Sockets) => Ok(()),
        Some(uplink) => Err(UsageError::LinkNeedsFrames(uplink.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::lines::{args, assert_says};
    use crate::cli::parse;

    #[test]
    fn each_link_can_be_asked_for() {
        let source = |line: &str| {
            let (config, notices) =
                args(&format!("--mode bridge {line}")).into_config(Ok(Vec::new())).unwrap();
            assert!(notices.is_empty() && !config.lan.dhcp && !config.dns.enabled, "{line}");
            let link = config.link.expect("a link");
            (format!("{:?}", link.source), link.vlan.map(crate::addr::VlanId::get))
        };
        assert_eq!(source("--uplink tap"), ("Tap(None)".to_owned(), None));
        assert_eq!(source("--uplink tap=vm0 --vlan 7"), ("Tap(Some(\"vm0\"))".to_owned(), Some(7)));
        assert_eq!(source("--uplink bridge=br0"), ("Bridge(\"br0\")".to_owned(), None));
        let macvtap = source("--uplink macvtap=eth0 --mac 52:54:00:00:00:01");
        assert_eq!(macvtap, ("MacVtap(\"eth0\")".to_owned(), None));
    }

    #[test]
    fn the_guard_is_on_unless_the_guest_is_trusted() {
        let guard = |line: &str| {
            let line = format!("--mode bridge --uplink bridge=br0 {line}");
            args(&line).into_config(Ok(Vec::new())).unwrap().0.link.unwrap().guard
        };
        assert_eq!(guard(""), Some(GuardConfig::default()));
        let told = guard("--mac 52:54:00:00:00:09 --guest-ip 203.0.113.7").unwrap();
        assert_eq!(told.mac.unwrap().to_string(), "52:54:00:00:00:09");
        assert_eq!(told.ipv4.unwrap().to_string(), "203.0.113.7");
        assert_eq!(guard("--trust-guest"), None);
        let line = "--mode bridge --uplink bridge=br0 --trust-guest --guest-ip 203.0.113.7";
        assert_says(line, &["--guest-ip", "--trust-guest"]);
    }

    #[test]
    fn a_network_is_named_and_can_carry_frames() {
        assert_says("--mode bridge", &["--uplink bridge=BRIDGE", "tap-fd=N"]);
        assert_says("--mode bridge --uplink sockets", &["--uplink sockets", "carry no frames"]);
        assert_says("--mode bridge --uplink macvtap=eth0", &["macvtap=eth0", "--mac MAC"]);
        assert_says("--mode bridge --uplink tap-fd=7,8", &["2 descriptors for 1 queue pairs"]);
        assert_says("--mode bridge --uplink tap-fd=1000000", &["tap-fd=1000000", "no such descriptor"]);
        let null = || std::os::fd::IntoRawFd::into_raw_fd(std::fs::File::open("/dev/null").unwrap());
        let line = format!("--mode bridge --uplink tap-fd={}", null());
        assert_says(&line, &["the descriptor is not a TAP interface"]);
    }

    #[test]
    fn flags_of_a_gateway_of_ours_are_refused_on_a_network_with_its_own() {
        for flag in [
            "--publish 80:80",
            "--tcp-ports 80",
            "--udp-ports 80",
            "--allow-host-loopback",
            "--subnet 10.0.2.0/24",
            "--gateway 10.0.2.1",
            "--no-dhcp",
            "--dns-server 192.0.2.1",
            "--dns-domain lan",
            "--dns-host a=10.0.0.9",
            "--no-dns",
            "--udp-mapping endpoint-independent",
            "--udp-filtering address-dependent",
        ] {
            let name = flag.split(' ').next().unwrap();
            assert_says(
                &format!("--mode bridge --uplink bridge=br0 {flag}"),
                &[name, "--mode bridge", "drop it"],
            );
        }
    }

    #[test]
    fn links_and_their_flags_are_refused_in_other_modes() {
        for mode in ["host-only", "none"] {
            for uplink in ["tap", "tap=vm0", "tap-fd=9", "bridge=br0", "macvtap=eth0"] {
                let line = format!("--mode {mode} --uplink {uplink}");
                assert_says(
                    &line,
                    &[&format!("--uplink {uplink} needs --mode nat or bridge"), "drop --uplink"],
                );
            }
            assert_says(&format!("--mode {mode} --vlan 7"), &["--vlan 7 needs --mode bridge"]);
            assert_says(&format!("--mode {mode} --trust-guest"), &["--trust-guest needs --mode bridge"]);
        }
    }

    #[test]
    fn malformed_links_are_refused_by_the_parser() {
        for value in [
            "",
            "veth",
            "tap=",
            "tap=a/b",
            "tap=abcdefghijklmnop",
            "tap-fd",
            "tap-fd=x",
            "bridge",
            "bridge=",
            "macvtap",
            "sockets=1",
            "tap-fd=3,",
            "bridge=a%d",
        ] {
            let words = ["vunet", "--socket-path", "s", "--mode", "bridge", "--uplink", value];
            assert!(parse(words.map(Into::into)).is_err(), "{value}");
        }
        for value in ["0", "4095", "x", "-1"] {
            let words = ["vunet", "--socket-path", "s", "--vlan", value];
            assert!(parse(words.map(Into::into)).is_err(), "{value}");
        }
    }
}
