//! `--network NAME`: the guest is one of a named network's, whose definition says what else flags would.

use std::path::Path;

use super::check::{Parts, UsageError, dns, nat, published, publishing_flag};
use super::{Args, bridge};
use crate::config::{
    DnsConfig, GuardConfig, IpMtu, KeepLeases, Lan, LinkConfig, LinkSource, Mode, NetworkConfig,
};
use crate::network::definition::{Definition, Kind, OwnLan};
use crate::network::manager::{NetworkError, Networks};
use crate::network::name::NetworkName;
use crate::network::state_dir::{self, StateDir};

/// The guest's network as the definition of `name` has it.
pub(super) fn parts(args: &Args, name: &NetworkName) -> Result<Parts, UsageError> {
    refuse_defined(args, name)?;
    let failed = |error| UsageError::Network(Box::new(error));
    let (state, definition) = find(args.state_dir.as_deref(), name).map_err(failed)?;
    let trust_guest = args.trust_guest;
    let config = NetworkConfig { name: name.clone(), state, trust_guest, lent: Vec::new() };
    let guard = (!args.trust_guest).then_some(GuardConfig { mac: args.mac, ipv4: args.guest_ip });
    match &definition.kind {
        Kind::Nat { lan, .. } => own(args, lan, Mode::Nat(nat(args)?), guard, config),
        Kind::HostOnly { lan } => {
            refuse_host_only(args, name)?;
            own(args, lan, Mode::Isolated, guard, config)
        }
        Kind::Rootless { lan, world } => {
            refuse_rootless(args, name)?;
            if !world {
                refuse_host_only(args, name)?;
            }
            let config = NetworkConfig { lent: published(args)?, ..config };
            let parts = station(args, lan.ip_mtu, guard, config);
            Ok(Parts { lan: Lan { guest: args.guest_ip, ..parts.lan }, ..parts })
        }
        Kind::Bridge { ip_mtu, .. } => {
            bridge::refuse_within(args)?;
            Ok(station(args, *ip_mtu, guard, config))
        }
    }
}

/// A network whose DHCP and DNS are not this process's.
fn station(args: &Args, ip_mtu: IpMtu, guard: Option<GuardConfig>, network: NetworkConfig) -> Parts {
    let (lan, dns) = bridge::no_gateway(args);
    let keep = guard.filter(|guard| guard.ipv4.is_none()).map(|_| {
        let vlan = args.vlan.map_or(String::new(), |vlan| format!("-vlan-{}", vlan.get()));
        let folder = network.state.network(&network.name).join(bridge::STATIONS_FOLDER);
        KeepLeases { folder: Some(folder), link: format!("bridge{vlan}") }
    });
    let link = LinkConfig {
        source: LinkSource::Tap(None),
        vlan: args.vlan,
        guard,
        gateway: None,
        keep,
        translate: None,
    };
    let lan = Lan { ip_mtu, ..lan };
    Parts { lan, dns, mode: Mode::Isolated, link: Some(link), network: Some(network) }
}

fn find(state_dir: Option<&Path>, name: &NetworkName) -> Result<(StateDir, Definition), NetworkError> {
    let state = StateDir::open(state_dir::locate(state_dir)?)?;
    let definition = Networks::new(state.clone()).find(name)?;
    Ok((state, definition))
}

/// A network with a bridge of its own, whose DHCP and DNS are ours.
fn own(
    args: &Args,
    own: &OwnLan,
    mode: Mode,
    guard: Option<GuardConfig>,
    network: NetworkConfig,
) -> Result<Parts, UsageError> {
    if args.no_dhcp && args.guest_ip.is_none() && !args.trust_guest {
        let why = "nothing says which address the guest may send from: add --guest-ip IP or --trust-guest";
        return Err(UsageError::NotWithNetwork { flag: "--no-dhcp", network: network.name, why });
    }
    if args.vlan.is_some() {
        let why = "its bridge carries one network";
        return Err(UsageError::NotWithNetwork { flag: "--vlan", network: network.name, why });
    }
    let OwnLan { subnet, gateway, ip_mtu, .. } = *own;
    if let Some(addr) = args.guest_ip {
        let (first, last) = (subnet.host(1), std::net::Ipv4Addr::from_bits(subnet.broadcast().to_bits() - 1));
        let first = first.expect("a prefix of at most 30 bits leaves two hosts");
        if !subnet.is_host(addr) {
            return Err(UsageError::NotInSubnet { flag: "--guest-ip", addr, subnet, first, last });
        }
        if addr == gateway {
            return Err(UsageError::GuestIsGateway(gateway));
        }
    }
    let lan = Lan { subnet, gateway, guest: args.guest_ip, ip_mtu, dhcp: !args.no_dhcp };
    let dns: DnsConfig = dns(args, &own.dns_domain, gateway)?;
    let link = LinkConfig {
        source: LinkSource::Tap(None),
        vlan: None,
        guard,
        gateway: Some(gateway),
        keep: None,
        translate: None,
    };
    Ok(Parts { lan, dns, mode, link: Some(link), network: Some(network) })
}

/// Flags of what the definition says.
fn refuse_defined(args: &Args, name: &NetworkName) -> Result<(), UsageError> {
    let defined = "the network's definition says it (vunet network inspect)";
    let kernel = "the host's kernel translates there";
    let own = "the network has a way to translate of its own (vunet network create)";
    let given = [
        (args.mode_given, "--mode", defined),
        (args.uplink.is_some(), "--uplink", "the guest is on the network's bridge"),
        (args.subnet.is_some(), "--subnet", defined),
        (args.gateway.is_some(), "--gateway", defined),
        (args.dns_domain.is_some(), "--dns-domain", defined),
        (args.ip_mtu_given, "--ip-mtu", defined),
        (
            args.allow_host_loopback,
            "--allow-host-loopback",
            "whether guests reach the host is said at its creation (--allow-host)",
        ),
        (args.nat.is_some(), "--nat", own),
        (args.nat_address.is_some(), "--nat-address", own),
        (args.nat_gateway.is_some(), "--nat-gateway", own),
        (args.nat_ports.is_some(), "--nat-ports", own),
        (args.udp_mapping.is_some(), "--udp-mapping", kernel),
        (args.udp_filtering.is_some(), "--udp-filtering", kernel),
    ];
    refuse(&given, name)
}

/// Flags of the world.
fn refuse_host_only(args: &Args, name: &NetworkName) -> Result<(), UsageError> {
    let given = [
        (
            publishing_flag(args).is_some(),
            publishing_flag(args).unwrap_or_default(),
            "its guests are reached from this host only, at their own addresses",
        ),
        (!args.dns_server.is_empty(), "--dns-server", "only local names are answered"),
    ];
    refuse(&given, name)
}

/// Flags of what the network's holder does, for all its guests.
fn refuse_rootless(args: &Args, name: &NetworkName) -> Result<(), UsageError> {
    let holder = "the network's holder serves all its guests";
    let given = [
        (
            publishing_flag(args).is_some() && args.trust_guest && args.guest_ip.is_none(),
            "--publish with --trust-guest",
            "nothing says which of its addresses the port leads to: add --guest-ip IP",
        ),
        (args.vlan.is_some(), "--vlan", "its bridge carries one network"),
        (!args.dns_server.is_empty(), "--dns-server", holder),
        (!args.dns_host.is_empty(), "--dns-host", holder),
        (args.no_dns, "--no-dns", holder),
        (args.no_dhcp, "--no-dhcp", holder),
    ];
    refuse(&given, name)
}

fn refuse(given: &[(bool, &'static str, &'static str)], name: &NetworkName) -> Result<(), UsageError> {
    match given.iter().find(|(given, ..)| *given) {
        Some(&(_, flag, why)) => Err(UsageError::NotWithNetwork { flag, network: name.clone(), why }),
        None => Ok(()),
    }
}
