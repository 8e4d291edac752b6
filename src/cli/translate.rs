//! `--nat`: how nat mode translates, and the address on a link that packets of the guest leave from.

use std::ops::RangeInclusive;

use super::check::UsageError;
use super::values::NatAddress;
use super::{Args, ModeArg, NatArg, UplinkArg, bridge};
use crate::config::{Lan, LinkAddress, LinkConfig, NatConfig, StationAddress, TranslateConfig};

/// Whether the flags ask for translation of packets onto a link.
pub(super) fn is_asked(args: &Args) -> Result<bool, UsageError> {
    let link = match &args.uplink {
        None | Some(UplinkArg::Sockets) => None,
        Some(uplink) => Some(uplink),
    };
    if args.mode != ModeArg::Nat {
        return match args.nat {
            Some(nat) => Err(UsageError::NeedsNatMode { flag: format!("--nat {nat}") }),
            None => refuse(args, "nothing is translated in this mode").map(|()| false),
        };
    }
    match (args.nat, link) {
        (None | Some(NatArg::Packet), Some(_)) => Ok(true),
        (Some(NatArg::Packet), None) => Err(UsageError::PacketNatNeedsLink),
        (Some(NatArg::Sockets), Some(uplink)) => Err(UsageError::SocketsNatOnLink(uplink.clone())),
        (Some(NatArg::Kernel), _) => Err(UsageError::KernelNatAlone),
        (None | Some(NatArg::Sockets), None) => {
            refuse(args, "sockets of this host have its own addresses").map(|()| false)
        }
    }
}

/// Refuses the flags of translation onto a link where there is none.
fn refuse(args: &Args, why: &'static str) -> Result<(), UsageError> {
    let given = [
        (args.nat_address.is_some(), "--nat-address"),
        (args.nat_gateway.is_some(), "--nat-gateway"),
        (args.nat_ports.is_some(), "--nat-ports"),
    ];
    match given.into_iter().find(|(given, _)| *given) {
        Some((_, flag)) => Err(UsageError::NeedsPacketNat { flag, why }),
        None => Ok(()),
    }
}

/// The link, and the address on it that the guest of `lan` is hidden behind.
pub(super) fn link(args: &Args, lan: &Lan, nat: &NatConfig) -> Result<LinkConfig, UsageError> {
    if args.allow_host_loopback {
        let flag = "--allow-host-loopback".to_owned();
        let why = "packets leave on the link; none reaches this host's own sockets";
        return Err(UsageError::NotWithPacketNat { flag, why });
    }
    if args.trust_guest {
        let flag = "--trust-guest".to_owned();
        let why = "whatever address the guest sends from, the link sees ours only";
        return Err(UsageError::NotWithPacketNat { flag, why });
    }
    let address = address(args, lan)?;
    for port in &nat.publish {
        let fits = match address {
            StationAddress::Fixed(held) => port.host.ip() == held.addr,
            StationAddress::Dhcp => false,
        };
        if !fits && !port.host.ip().is_unspecified() {
            let flag = format!("--publish {}", port.host);
            let why = "ports are published at the address on the link (--nat-address), and at no other";
            return Err(UsageError::NotWithPacketNat { flag, why });
        }
        if let Some(interface) = port.interface {
            let flag = format!("--publish %{interface}");
            let why = "ports are published on the link of --uplink, and on no other interface";
            return Err(UsageError::NotWithPacketNat { flag, why });
        }
        if port.host.port() == 0 {
            let flag = "--publish with host port 0".to_owned();
            let why = "nobody on the link could know the port picked";
            return Err(UsageError::NotWithPacketNat { flag, why });
        }
    }
    let translate = TranslateConfig {
        // The guest's own, marked as local and so not the same: it stays with the VM.
        mac: args.mac.map(crate::addr::MacAddr::sibling),
        address,
        ports: ports(args),
        udp: nat.udp,
        publish: nat.publish.clone(),
    };
    Ok(LinkConfig {
        source: bridge::source(args)?,
        vlan: args.vlan,
        guard: None,
        gateway: None,
        keep: None,
        translate: Some(translate),
    })
}

fn ports(args: &Args) -> RangeInclusive<u16> {
    args.nat_ports.clone().unwrap_or(TranslateConfig::DEFAULT_PORTS)
}

fn address(args: &Args, lan: &Lan) -> Result<StationAddress, UsageError> {
    let (addr, subnet) = match (&args.nat_address, args.nat_gateway) {
        (None | Some(NatAddress::Dhcp), Some(router)) => return Err(UsageError::NatGatewayWithDhcp(router)),
        (None | Some(NatAddress::Dhcp), None) => return Ok(StationAddress::Dhcp),
        (Some(NatAddress::Fixed(addr, subnet)), _) => (*addr, *subnet),
    };
    if subnet.overlaps(lan.subnet) {
        return Err(UsageError::NatAddressOverlaps { addr, link: subnet, guests: lan.subnet });
    }
    if let Some(router) = args.nat_gateway
        && (!subnet.is_host(router) || router == addr)
    {
        return Err(UsageError::NatGateway { router, addr, link: subnet });
    }
    Ok(StationAddress::Fixed(LinkAddress { addr, subnet, router: args.nat_gateway }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::lines::{args, assert_says};
    use crate::cli::parse;
    use crate::config::Mode;

    fn translate(line: &str) -> TranslateConfig {
        let (config, _) = args(line).into_config(Ok(Vec::new())).unwrap();
        assert!(matches!(config.mode, Mode::Nat(_)) && config.lan.dhcp && config.dns.enabled, "{line}");
        let link = config.link.expect("a link");
        assert_eq!(link.guard, None);
        link.translate.expect("translation")
    }

    #[test]
    fn a_link_in_nat_mode_means_translation_of_packets() {
        for uplink in ["tap", "tap=vm0", "bridge=br0", "macvtap=eth0"] {
            let found = translate(&format!("--uplink {uplink}"));
            assert_eq!((found.address, found.ports), (StationAddress::Dhcp, 49_152..=65_535), "{uplink}");
        }
        let line = "--nat packet --uplink bridge=br0 --nat-address 192.0.2.50/24 --nat-gateway 192.0.2.2 \
                    --nat-ports 20000-29999 --mac 52:54:00:00:00:09 --publish 80:8080 --vlan 7";
        let found = translate(line);
        let subnet = "192.0.2.0/24".parse().unwrap();
        let router = Some([192, 0, 2, 2].into());
        let held = LinkAddress { addr: [192, 0, 2, 50].into(), subnet, router };
        assert_eq!((found.address, found.ports), (StationAddress::Fixed(held), 20_000..=29_999));
        assert_eq!(found.mac.unwrap().to_string(), "56:54:00:00:00:09", "never the guest's");
        assert_eq!(found.publish.len(), 1);
    }

    #[test]
    fn the_ways_to_translate_are_told_apart() {
        assert_says("--nat packet", &["--nat packet needs a link", "--uplink bridge=BRIDGE"]);
        assert_says("--nat sockets --uplink tap", &["--nat sockets", "--uplink tap", "--nat packet"]);
        assert_says("--nat kernel", &["vunet network create", "--network"]);
        assert_says("--mode host-only --nat packet", &["--nat packet needs --mode nat"]);
        for flag in ["--nat-address dhcp", "--nat-gateway 192.0.2.2", "--nat-ports 2000-3000"] {
            let name = flag.split(' ').next().unwrap();
            assert_says(flag, &[name, "needs --nat packet"]);
            assert_says(&format!("--mode none {flag}"), &[name, "needs --nat packet"]);
            assert_says(&format!("--mode bridge --uplink tap {flag}"), &[name, "needs --nat packet"]);
        }
    }

    #[test]
    fn addresses_that_cannot_be_are_refused() {
        let on = "--uplink bridge=br0";
        assert_says(&format!("{on} --nat-gateway 192.0.2.2"), &["--nat-gateway 192.0.2.2", "DHCP"]);
        let fixed = format!("{on} --nat-address 192.0.2.50/24");
        assert_says(&format!("{fixed} --nat-gateway 192.0.3.2"), &["192.0.3.2", "192.0.2.0/24"]);
        assert_says(&format!("{fixed} --nat-gateway 192.0.2.50"), &["192.0.2.50"]);
        assert_says(&format!("{fixed} --subnet 192.0.2.0/24"), &["overlaps", "--subnet"]);
        assert_says(&format!("{fixed} --publish 192.0.2.51:80:80"), &["192.0.2.51:80", "--nat-address"]);
        assert_says(&format!("{on} --publish 192.0.2.50:80:80"), &["--nat-address"]);
        assert_says(&format!("{fixed} --publish 0:80"), &["host port 0"]);
        assert_says(&format!("{fixed} -t %eth0/80"), &["%eth0", "no other interface"]);
        assert_says(&format!("{fixed} --publish [::1]:80:80"), &["--nat-address"]);
        assert_says(&format!("{fixed} --allow-host-loopback"), &["--allow-host-loopback"]);
        assert_says(&format!("{fixed} --trust-guest"), &["--trust-guest"]);
        for bad in
            ["", "192.0.2.50", "192.0.2.0/24", "192.0.2.255/24", "192.0.2.50/33", "127.0.0.1/8", "::1/64"]
        {
            let words = ["vunet", "--socket-path", "s", "--uplink", "tap", "--nat-address", bad];
            assert!(parse(words.map(Into::into)).is_err(), "{bad}");
        }
        for bad in ["", "1", "9-1", "0-9", "1-65536", "1000-1009"] {
            let words = ["vunet", "--socket-path", "s", "--uplink", "tap", "--nat-ports", bad];
            assert!(parse(words.map(Into::into)).is_err(), "{bad}");
        }
    }
}
