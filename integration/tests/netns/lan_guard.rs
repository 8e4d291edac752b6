//! What a guest on a LAN may send, as a port of the same bridge sees it.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use vunet_integration::lab::frame::udp_frame;
use vunet_integration::lab::port::{Port, seen_at, send_from};
use vunet_integration::lab::{SHORT, WORLD};

use crate::bench::{Bench, Failure, PATIENCE, Setup, bare, ensure};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x11];
const MAC_TEXT: &str = "52:54:00:00:00:11";
const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x22];
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
const ALL: [u8; 6] = [0xff; 6];
/// In every frame of these tests, within the packet (bridges cut off what lies behind); a number follows.
const MARK: &[u8] = b"by hand: ";

fn marked(mut frame: Vec<u8>, number: u8) -> Vec<u8> {
    let at = frame.windows(MARK.len()).rposition(|window| window == MARK).expect("every frame has one");
    frame[at + MARK.len()] = number;
    frame
}

/// The mark, its number to come, and an option's worth of bytes in all.
fn mark() -> Vec<u8> {
    [MARK, &[0; 5]].concat()
}

fn number_of(frame: &[u8]) -> Option<u8> {
    let at = frame.windows(MARK.len()).rposition(|window| window == MARK)?;
    frame.get(at + MARK.len()).copied()
}

fn ethernet(src: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&ALL[..], &src, &ethertype.to_be_bytes(), packet].concat()
}

fn arp(mac: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let sender = [&mac[..], &ip.octets()].concat();
    ethernet(MAC, 0x0806, &[&[0, 1, 8, 0, 6, 4, 0, 2][..], &sender, &sender, &mark()].concat())
}

fn udp(src: ([u8; 6], Ipv4Addr), ports: (u16, u16)) -> Vec<u8> {
    let to = (ALL, SocketAddrV4::new(Ipv4Addr::BROADCAST, ports.1));
    udp_frame((src.0, SocketAddrV4::new(src.1, ports.0)), to, &mark())
}

/// ICMPv6 of neighbour discovery, the checksum not computed: nobody here takes it.
fn icmpv6(src: [u8; 16], kind: u8, rest: &[u8]) -> Vec<u8> {
    let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    // The mark is a nonce (RFC 3971, 5.3.2).
    let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], rest, &[14, 2], &mark()].concat();
    let length = (message.len() as u16).to_be_bytes();
    let header = [&[0x60, 0, 0, 0][..], &length, &[58, 255], &src, &all_nodes].concat();
    ethernet(MAC, 0x86dd, &[header, message].concat())
}

const ROUTER: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x99];

/// What the guest may not send, by name; each is marked with its place.
fn lies(own: Ipv4Addr) -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("another's MAC", udp((OTHER_MAC, own), (4000, 9))),
        ("another's address", udp((MAC, OTHER_IP), (4000, 9))),
        ("another's address in ARP", arp(MAC, OTHER_IP)),
        ("the router's address in ARP", arp(MAC, WORLD)),
        ("another's MAC in ARP", arp(OTHER_MAC, own)),
        ("a DHCP offer", udp((MAC, own), (67, 68))),
        ("a router advertisement", icmpv6(ROUTER, 134, &[0; 8])),
        ("a router's neighbour advertisement", icmpv6(ROUTER, 136, &ROUTER)),
        ("a VLAN tag", [&ALL[..], &MAC, &[0x81, 0, 0, 7], &udp((MAC, own), (4000, 9))[12..]].concat()),
        ("a bridge's own protocol", ethernet(MAC, 0x88cc, &mark())),
    ]
}

/// Attaches the guest with its MAC address and gets its lease.
fn attach(bench: &mut Bench) -> Result<Ipv4Addr, Failure> {
    bench.attach(&["--mac", MAC_TEXT])?;
    Ok(bench.lease()?.ip)
}

/// Sends all `lies` and then an honest frame; the numbers of those that come through to `port`.
fn what_comes_through(bench: &Bench, port: &Port, own: Ipv4Addr) -> Result<Vec<u8>, Failure> {
    const HONEST: u8 = 200;
    let mut frames: Vec<_> = (0..).zip(lies(own)).map(|(n, (_, frame))| marked(frame, n)).collect();
    frames.push(marked(udp((MAC, own), (4000, 9)), HONEST));
    send_from(&bench.lab.guest, &frames)?;
    let seen = port.frames(PATIENCE, |frame| number_of(frame) == Some(HONEST))?;
    let mut numbers: Vec<u8> = seen.iter().filter_map(|frame| number_of(frame)).collect();
    ensure!(numbers.contains(&HONEST), "not even the honest frame came through: {numbers:?}");
    numbers.retain(|number| *number != HONEST);
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// What vunet counted for `reason`, as it says at its end.
fn counted(bench: &mut Bench, reason: &str) -> Result<u64, Failure> {
    let lines = bench.vunet.process.errors().join("\n");
    let count = lines.rsplit(&format!("{reason}=")).next().and_then(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    });
    count.ok_or_else(|| Failure(format!("{reason} was not counted: {lines}")))
}

#[test]
fn a_guest_speaks_for_itself_only() {
    let setup = Setup::on_bridge();
    bare(&setup, |bench| {
        let port = bench.lab.bridge_port("ear")?;
        let own = attach(bench)?;
        let through = what_comes_through(bench, &port, own)?;
        let names: Vec<_> = through.iter().map(|n| lies(own)[usize::from(*n)].0).collect();
        ensure!(names.is_empty(), "came through: {names:?}");
        bench.detach()?;
        bench.vunet.process.stop();
        for (reason, least) in
            [("spoofed_source", 5), ("rogue_server", 2), ("vlan_tag", 1), ("unsupported", 1)]
        {
            let count = counted(bench, reason)?;
            ensure!(count >= least, "{reason} was counted {count} times, not {least}");
        }
        let told = bench.vunet.process.errors().join("\n");
        ensure!(
            told.contains("--trust-guest") && told.contains(&format!("{OTHER_MAC:02x?}")[1..3]),
            "{told}"
        );
        // The scenario ends with a vunet that runs.
        bench.vunet = bench.lab.vunet(&setup.vunet)?;
        Ok(())
    });
}

#[test]
fn a_trusted_guest_speaks_for_anybody() {
    bare(&Setup::on_bridge().vunet(&["--trust-guest"]), |bench| {
        let port = bench.lab.bridge_port("ear")?;
        let own = attach(bench)?;
        let through = what_comes_through(bench, &port, own)?;
        let missing: Vec<_> = (0..).zip(lies(own)).filter(|(n, _)| !through.contains(n)).collect();
        // What bridges keep for themselves (IEEE 802.1Q, 8.6.3) they would not flood; these are broadcasts.
        ensure!(missing.is_empty(), "did not come through: {missing:x?}");
        Ok(())
    });
}

#[test]
fn without_a_lease_a_guest_asks_only_and_with_guest_ip_it_needs_none() {
    bare(&Setup::on_bridge().vunet(&["--guest-ip", "192.0.2.77"]), |bench| {
        let port = bench.lab.bridge_port("ear")?;
        bench.attach(&["--mac", MAC_TEXT])?;
        let frames = [
            marked(udp((MAC, Ipv4Addr::new(192, 0, 2, 100)), (4000, 9)), 1),
            marked(udp((MAC, OTHER_IP), (4000, 9)), 2),
        ];
        send_from(&bench.lab.guest, &frames)?;
        let seen = port.frames(PATIENCE, |frame| number_of(frame) == Some(2))?;
        let numbers: Vec<u8> = seen.iter().filter_map(|frame| number_of(frame)).collect();
        ensure!(numbers == [2], "{numbers:?}");
        // A lease of another address does not help.
        let lease = bench.lease()?;
        ensure!(lease.ip != OTHER_IP, "{lease:?}");
        let output = bench.lab.guest.run_any(&["ping", "-n", "-c", "2", "-W", "1", "192.0.2.2"], SHORT)?;
        ensure!(output.stdout.contains(" 0 received"), "{}", output.stdout);
        Ok(())
    });
}

#[test]
fn ipv6_addresses_are_first_come_first_served() {
    bare(&Setup::on_bridge().tools(&["ping"]), |bench| {
        // Without a lease: the DHCP client here takes link-local addresses away.
        bench.attach(&["--mac", MAC_TEXT])?;
        let link_local =
            bench.lab.world.run(&["ip", "-6", "-o", "addr", "show", "dev", "e0", "scope", "link"], SHORT)?;
        let words: Vec<&str> = link_local.stdout.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "inet6").expect("ip says so");
        let world = words[at + 1].split('/').next().unwrap_or_default().to_owned();
        let to = format!("{world}%eth0");
        // The guest's own link-local address, by its own duplicate address detection.
        let mut pinged = String::new();
        for _ in 0..20 {
            pinged = bench.lab.guest.run_any(&["ping", "-n", "-c", "1", "-W", "1", &to], SHORT)?.stdout;
            if pinged.contains("1 received") {
                break;
            }
        }
        ensure!(pinged.contains("1 received"), "{pinged}");
        // One it never asked for: asked on its behalf.
        bench.lab.world.run(&["ip", "addr", "add", "2001:db8::2/64", "dev", "e0", "nodad"], SHORT)?;
        bench.in_guest(&["ip", "addr", "add", "2001:db8::7/64", "dev", "eth0", "nodad"])?;
        let pinged = bench.in_guest(&["ping", "-n", "-c", "15", "-i", "0.2", "-W", "1", "2001:db8::2"])?;
        ensure!(!pinged.contains(" 0 received"), "{pinged}");
        // The world's: never, however long it tries.
        bench.in_guest(&["ip", "addr", "add", "2001:db8::2/64", "dev", "eth0", "nodad"])?;
        let theft = ["ping", "-n", "-c", "10", "-i", "0.2", "-W", "1", "-I", "2001:db8::2", "ff02::1%eth0"];
        let heard = seen_by_host(bench, "2001:db8::2", || {
            let _ = bench.lab.guest.run_any(&theft, SHORT);
        })?;
        ensure!(heard == 0, "{heard} packets came from the world's address");
        Ok(())
    });
}

/// Packets of the guest with source `addr` that a new port of the bridge sees while `work` runs.
fn seen_by_host(bench: &Bench, addr: &str, work: impl FnOnce()) -> Result<usize, Failure> {
    let port = bench.lab.bridge_port("ear6")?;
    let source = addr.parse::<std::net::Ipv6Addr>()?.octets();
    work();
    let frames = port.frames(Duration::from_millis(300), |_| false)?;
    let is_data = |frame: &&Vec<u8>| frame.get(22..38) == Some(&source) && frame.get(6..12) == Some(&MAC);
    Ok(frames.iter().filter(is_data).count())
}

#[test]
fn a_vlan_is_the_guests_and_nothing_else_is() {
    let setup = Setup::on_bridge().vunet(&["--vlan", "7", "--guest-ip", "192.0.2.77"]);
    bare(&setup, |bench| {
        let port = bench.lab.bridge_port("ear")?;
        bench.attach(&["--mac", MAC_TEXT])?;
        let plain = udp((MAC, OTHER_IP), (4000, 9));
        let with = |tags: &[u8], frame: &[u8], n| marked([&frame[..12], tags, &frame[12..]].concat(), n);
        send_from(&bench.lab.guest, &[with(&[0x81, 0, 0, 7], &plain, 1), with(&[], &plain, 2)])?;
        let seen = port.frames(PATIENCE, |frame| number_of(frame) == Some(2))?;
        let ours: Vec<_> = seen.iter().filter(|frame| number_of(frame).is_some()).collect();
        ensure!(ours == [&with(&[0x81, 0, 0, 7], &plain, 2)], "{ours:x?}");
        let tagged =
            seen.iter().filter(|frame| frame[6..12] == MAC).all(|frame| frame[12..16] == [0x81, 0, 0, 7]);
        ensure!(tagged, "a frame of the guest without its tag: {seen:x?}");

        let from = udp((OTHER_MAC, Ipv4Addr::new(192, 0, 2, 9)), (5000, 9));
        let last = |frame: &[u8]| number_of(frame) == Some(9);
        let got = seen_at(&bench.lab.guest, PATIENCE, last, || {
            port.send(&with(&[], &from, 1))?;
            port.send(&with(&[0x81, 0, 0, 8], &from, 2))?;
            port.send(&with(&[0x81, 0, 0, 7, 0x81, 0, 0, 7], &from, 3))?;
            port.send(&with(&[0x81, 0, 0, 7], &from, 9))
        })?;
        let numbers: Vec<u8> = got.iter().filter_map(|frame| number_of(frame)).collect();
        ensure!(numbers == [9], "{numbers:?}");
        let arrived = got.iter().find(|frame| last(frame)).expect("just seen");
        ensure!(*arrived == with(&[], &from, 9), "{arrived:x?}");
        Ok(())
    });
}
