//! A host-only network has no way out, whatever its guests send and whatever becomes of the host.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use vunet_integration::lab::frame::{Capture, Probe, arp_request, ethernet_frame, icmpv6_frame, send_frames};
use vunet_integration::lab::{HOST, WORLD};
use vunet_integration::world::ports;

use super::site::{Site, Vm, on_a_site};
use crate::bench::{Failure, Outcome, ensure};

/// The gateway's MAC address.
const GATEWAY_MAC: [u8; 6] = [0x02, 0xab, 0xcd, 0, 0, 1];
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Time in which a frame that leaks would have leaked.
const SILENCE: Duration = Duration::from_millis(300);

fn mac_of(site: &Site, netns: &vunet_integration::lab::Netns, interface: &str) -> Result<[u8; 6], Failure> {
    let words = ["cat", &format!("/sys/class/net/{interface}/address")].map(str::to_owned);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let text = netns.run(&words, SILENCE * 10)?.stdout;
    let octets: Vec<u8> =
        text.trim().split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let _ = site;
    octets.try_into().map_err(|_| Failure(format!("{interface} has the address {text:?}")))
}

/// Every way out a guest can try with frames of its own making: its own and others' addresses, to whoever could
/// pass them on.
fn attempts(own_mac: [u8; 6], own_ip: Ipv4Addr, uplink_mac: [u8; 6], world_mac: [u8; 6]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let spoofed_macs = [own_mac, GATEWAY_MAC, uplink_mac, [2, 9, 9, 9, 9, 9]];
    let sources = [own_ip, HOST, WORLD, GATEWAY, Ipv4Addr::new(10, 0, 0, 77), Ipv4Addr::new(203, 0, 113, 9)];
    for from_mac in spoofed_macs {
        for from in sources {
            for to_mac in [GATEWAY_MAC, uplink_mac, world_mac, [0xff; 6]] {
                for what in [Probe::TcpSyn(ports::ECHO), Probe::Udp(ports::ECHO), Probe::Echo] {
                    frames.push(what.frame((from_mac, from), (to_mac, WORLD)));
                }
            }
            frames.push(arp_request((from_mac, from), WORLD));
            frames.push(arp_request((from_mac, from), HOST));
        }
    }
    for group in [Ipv4Addr::new(224, 0, 0, 1), Ipv4Addr::new(239, 1, 2, 3), Ipv4Addr::BROADCAST] {
        let [_, b, c, d] = group.octets();
        frames.push(Probe::Udp(ports::ECHO).frame((own_mac, own_ip), ([1, 0, 0x5e, b & 0x7f, c, d], group)));
    }
    frames.extend(ipv6_attempts(own_mac, world_mac));
    // Source routing (RFC 791, 3.1), an encapsulated packet, and a frame for the next bridge (IEEE 802.1D).
    let mut routed = Probe::Echo.frame((own_mac, own_ip), (GATEWAY_MAC, GATEWAY));
    let inner = routed[14..].to_vec();
    routed[14 + 9] = 4;
    routed.extend(inner);
    frames.push(routed);
    frames.push(ethernet_frame([1, 0x80, 0xc2, 0, 0, 0], own_mac, 38, &[0x42, 0x42, 3, 0, 0, 0, 0, 0]));
    frames
}

/// Router solicitations and advertisements, echo to link-local, group and global addresses.
fn ipv6_attempts(own_mac: [u8; 6], world_mac: [u8; 6]) -> Vec<Vec<u8>> {
    let own: Ipv6Addr = "fe80::9".parse().expect("an address");
    let (all_nodes, all_routers) = (0x2_u16, 0x1_u16);
    let group = |last: u16| Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, last);
    let group_mac = |last: u8| [0x33, 0x33, 0, 0, 0, last];
    let advertisement = {
        let mut message = vec![134, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend([3, 4, 64, 0xc0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0, 0, 0]);
        message.extend(Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 0).octets());
        message
    };
    let echo = [128, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3, 4];
    let world = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
    vec![
        icmpv6_frame((own_mac, group_mac(2)), own, group(all_nodes), &[133, 0, 0, 0, 0, 0, 0, 0]),
        icmpv6_frame((own_mac, group_mac(1)), own, group(all_routers), &advertisement),
        icmpv6_frame((own_mac, GATEWAY_MAC), own, world, &echo),
        icmpv6_frame((own_mac, world_mac), own, world, &echo),
        icmpv6_frame(
            (own_mac, GATEWAY_MAC),
            Ipv6Addr::new(0x2001, 0xdb8, 0xbad, 0, 0, 0, 0, 9),
            world,
            &echo,
        ),
        icmpv6_frame((own_mac, group_mac(1)), own, group(all_nodes), &echo),
    ]
}

/// What a guest's own stack tries once it was told that everything is in reach.
fn ordinary_attempts(vm: &Vm) -> Outcome {
    for words in ["ip route replace default via 10.0.0.1", "ip addr add 192.0.2.77/32 dev eth0"] {
        vm.run(words)?;
    }
    ensure!(!vm.pings_soon(WORLD)?, "the world is in reach");
    vm.run("ip route replace 192.0.2.0/24 dev eth0 src 192.0.2.77")?;
    ensure!(!vm.pings_soon(WORLD)?, "the world is in reach as if on the link");
    vm.run("ip route del 192.0.2.0/24 dev eth0")?;
    vm.run("ip addr del 192.0.2.77/32 dev eth0").map(drop)
}

#[test]
fn nothing_of_a_host_only_network_reaches_the_world_though_the_host_becomes_a_router() {
    on_a_site(&["dig"], |site| {
        let lab = &site.lab;
        // What host and world say to each other by themselves is no leak: they say nothing.
        for (netns, interface) in [(&lab.host, "p0"), (&lab.world, "e0")] {
            netns.sysctl(&format!("net.ipv6.conf.{interface}.disable_ipv6"), "1")?;
        }
        site.network("create quiet --mode host-only")?;
        // Trusted, so that what it forges reaches the bridge, and the host's rules alone hold.
        let vm = site.vm("quiet", "vm1", &["--trust-guest"])?;
        let other = site.vm("quiet", "vm2", &[])?;
        let (own_mac, uplink_mac) = (mac_of(site, &vm.netns, "eth0")?, mac_of(site, &lab.host, "p0")?);
        let world_mac = mac_of(site, &lab.world, "e0")?;
        let bridge = site.inspect("quiet")?["bridge"].as_str().unwrap_or_default().to_owned();
        let mut capture = Capture::of(&lab.world, "e0")?;
        for forwarding in ["0", "1"] {
            lab.host.sysctl("net.ipv4.ip_forward", forwarding)?;
            lab.host.sysctl("net.ipv6.conf.all.forwarding", forwarding)?;
            // vunet switches its bridge off again; here it is switched on faster, so that the rules alone hold.
            let hammer =
                format!("while :; do echo {forwarding} >/proc/sys/net/ipv4/conf/{bridge}/forwarding; done");
            let _hammer = lab.host.spawn(&["sh", "-c", &hammer])?;
            ensure!(vm.pings(other.ip)? && vm.pings(GATEWAY)?, "guests and host reach each other");
            send_frames(&vm.netns, &attempts(own_mac, vm.ip, uplink_mac, world_mac))?;
            ordinary_attempts(&vm)?;
            let name = vm.run("dig +short +time=2 +tries=1 @10.0.0.1 www.example.test");
            ensure!(!name.is_ok_and(|name| name.contains("192.0.2")), "a name of the world was asked for");
            let leaked = capture.frames(SILENCE)?;
            ensure!(leaked.is_empty(), "with ip_forward={forwarding} the world saw {leaked:02x?}");
            let addresses =
                lab.host.run(&["ip", "-6", "addr", "show", "scope", "global"], SILENCE * 10)?.stdout;
            ensure!(addresses.is_empty(), "the host took an address from a guest: {addresses}");
        }
        // The same capture sees what does leave, so its silence means something.
        lab.host.run_any(&["ping", "-c", "1", "-W", "1", &WORLD.to_string()], SILENCE * 10)?;
        ensure!(!capture.frames(SILENCE)?.is_empty(), "the capture sees nothing at all");
        vm.stop()?;
        other.stop()
    });
}

#[test]
fn the_gateways_address_is_the_only_one_of_the_host_that_host_only_guests_reach() {
    on_a_site(&[], |site| {
        site.network("create quiet --mode host-only")?;
        let vm = site.vm("quiet", "vm1", &[])?;
        vm.run("ip route replace default via 10.0.0.1")?;
        ensure!(vm.pings(GATEWAY)?, "the gateway does not answer");
        ensure!(!vm.pings_soon(HOST)?, "an address of the host's other network answers");
        let (host, _) = (&site.lab.host, ());
        let guest = vm.ip.to_string();
        let output = host.run_any(&["ping", "-n", "-c", "1", "-W", "2", &guest], SILENCE * 10)?.stdout;
        ensure!(output.contains("1 received"), "the host does not reach its guest: {output}");
        vm.stop()
    });
}
