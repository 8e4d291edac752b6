//! Who reaches whom.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Socket, Type};
use vunet_integration::lab::frame::Capture;
use vunet_integration::lab::{DOMAIN, HOST, SHORT, WORLD, vunet_binary};
use vunet_integration::world::ports;

use super::site::{Site, Vm, connect, ensure_as_before, on_a_site, seen, until};
use crate::bench::{Failure, Outcome, PATIENCE, ensure};
use crate::publishing::{Api, change_ports_under_traffic};

#[test]
fn guests_of_a_nat_network_reach_each_other_and_the_world_and_nothing_is_left() {
    on_a_site(&["dig", "curl"], |site| {
        site.network("create lab")?;
        let before = site.host_state()?;
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(one.ip != two.ip, "both have {}", one.ip);
        for (from, to) in [(&one, &two), (&two, &one)] {
            ensure!(from.pings(to.ip)?, "{} does not reach {}", from.ip, to.ip);
            ensure!(from.pings(WORLD)?, "{} does not reach the world", from.ip);
            ensure!(from.pings(Ipv4Addr::new(10, 0, 2, 1))?, "{} does not reach the gateway", from.ip);
            let peer = seen(&from.netns, (WORLD, ports::PEER))?;
            ensure!(peer.ip() == HOST, "the world saw {peer}");
            let name = from.run(&format!("dig +short @10.0.2.1 www.{DOMAIN}"))?;
            ensure!(name.trim() == WORLD.to_string(), "{name:?}");
            let name = from.run(&format!("dig +tcp +short @10.0.2.1 www.{DOMAIN}"))?;
            ensure!(name.trim() == WORLD.to_string(), "over TCP: {name:?}");
        }
        let name = one.run("dig +short @10.0.2.1 vm2.lab.vunet.internal")?;
        ensure!(name.trim() == two.ip.to_string(), "the other guest's name: {name:?}");
        let _server = site.serve(&two.netns)?;
        let peer = seen(&one.netns, (two.ip, ports::PEER))?;
        ensure!(peer.ip() == one.ip, "among guests nothing is translated, yet {peer}");
        let shown = site.inspect("lab")?;
        let bridge = shown["bridge"].as_str().unwrap_or_default().to_owned();
        ensure!(shown["state"] == "up" && shown["users"].as_array().is_some_and(|u| u.len() == 2), "{shown}");
        let bridged = site.lab.host.run(&["bridge", "link", "show"], SHORT)?.stdout;
        ensure!(bridged.matches(&format!("master {bridge}")).count() == 2, "{bridged}");
        let refused = site.network_any("remove lab")?;
        let pid = shown["users"][0]["pid"].to_string();
        ensure!(refused.code == Some(1) && refused.stderr.contains(&pid), "{refused:?}");
        one.stop()?;
        ensure!(two.pings(WORLD)?, "the network went with the first of its users");
        two.stop()?;
        ensure_as_before(&before, &site.host_state()?)?;
        site.network("remove lab")?;
        let listed = site.network("list")?;
        ensure!(!listed.contains("lab"), "{listed}");
        Ok(())
    });
}

/// A datagram's way: the address its server in the guest sees, asked from `netns`.
pub(super) fn seen_by_udp(
    netns: &vunet_integration::lab::Netns,
    to: (Ipv4Addr, u16),
) -> Result<String, Failure> {
    let socket = netns.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
    socket.set_read_timeout(Some(Duration::from_secs(3)))?;
    socket.connect(to)?;
    socket.send(b"who am I?")?;
    let mut text = [0; 64];
    let len = socket.recv(&mut text).map_err(|error| Failure(format!("no answer of {to:?}: {error}")))?;
    Ok(String::from_utf8_lossy(&text[..len])
        .rsplit_once(':')
        .map(|(ip, _)| ip.to_owned())
        .unwrap_or_default())
}

const PUBLISH: [&str; 6] =
    ["--publish", "8006:9006", "--publish", "udp:8006:9006", "--publish", "127.0.0.1:7006:9006"];

#[test]
fn published_ports_lead_to_their_guest_from_the_world_the_host_and_other_guests() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let one = site.vm("lab", "vm1", &PUBLISH)?;
        let two = site.vm("lab", "vm2", &[])?;
        let _server = site.serve(&one.netns)?;
        let gateway = Ipv4Addr::new(10, 0, 2, 1);
        let rules = || site.lab.host.run(&["nft", "list", "ruleset"], PATIENCE).map(|output| output.stdout);
        until("the port's rule", || rules().is_ok_and(|rules| rules.contains("8006 : 9006")))?;
        let peer = seen(&site.lab.world, (HOST, 8006))?;
        ensure!(peer.ip() == WORLD, "the guest saw {peer} for the world's client");
        ensure!(seen_by_udp(&site.lab.world, (HOST, 8006))? == WORLD.to_string(), "over UDP");
        for to in [(Ipv4Addr::LOCALHOST, 8006), (Ipv4Addr::LOCALHOST, 7006), (HOST, 8006)] {
            let peer = seen(&site.lab.host, to)?;
            ensure!(peer.ip() == gateway, "the guest saw {peer} for the host's own client of {to:?}");
        }
        ensure!(seen_by_udp(&site.lab.host, (Ipv4Addr::LOCALHOST, 8006))? == gateway.to_string(), "over UDP");
        let peer = seen(&two.netns, (HOST, 8006))?;
        ensure!(peer.ip() == gateway, "the guest saw {peer} for another guest's client");
        let refused = connect(&site.lab.world, (HOST, 7006), Duration::from_secs(2));
        ensure!(refused.is_err(), "a port published on loopback is open to the world");
        // A port that is taken is told of, by whichever of them comes second.
        let socket = site.lab.dir().join("vm3.sock");
        let mut third = site.start("lab", &socket, &["--publish", "8006:1"])?;
        until("the refusal", || !third.is_running())?;
        let words = third.errors().join("\n");
        ensure!(words.contains("8006") && words.contains("--publish"), "{words}");
        one.stop()?;
        until("the rule's end", || rules().is_ok_and(|rules| !rules.contains("8006")))?;
        let gone = connect(&site.lab.world, (HOST, 8006), Duration::from_secs(2));
        ensure!(gone.is_err(), "the port outlives its process");
        two.stop()
    });
}

/// `vunet ctl` on the host.
fn ctl(site: &Site, control: &str, words: &str) -> Result<String, Failure> {
    let binary = vunet_binary().display().to_string();
    let mut command = vec![&*binary, "ctl", "--control", control];
    command.extend(words.split(' '));
    Ok(site.lab.host.run(&command, PATIENCE)?.stdout)
}

#[test]
fn ports_of_a_network_come_and_go_and_are_nobody_elses_meanwhile() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let control = site.lab.dir().join("control.sock").display().to_string();
        let one = site.vm("lab", "vm1", &["--control", &control, "-t", "%p0/8007:9006"])?;
        let _server = site.serve(&one.netns)?;
        let bind = || site.lab.host.inside(|| TcpListener::bind((HOST, 8006)));
        for _ in 0..3 {
            ctl(site, &control, "publish 8006:9006 udp:8006:9006")?;
            let peer = seen(&site.lab.world, (HOST, 8006))?;
            ensure!(peer.ip() == WORLD, "the guest saw {peer} for the world's client");
            ensure!(seen_by_udp(&site.lab.world, (HOST, 8006))? == WORLD.to_string(), "over UDP");
            let peer = seen(&site.lab.host, (Ipv4Addr::LOCALHOST, 8006))?;
            ensure!(
                peer.ip() == Ipv4Addr::new(10, 0, 2, 1),
                "the guest saw {peer} for the host's own client"
            );
            ensure!(bind().is_err(), "another process took a published port");
            let users = site.inspect("lab")?["users"].clone();
            ensure!(users[0]["published"].as_array().is_some_and(|ports| ports.len() == 3), "{users}");
            ctl(site, &control, "unpublish tcp:8006 udp:8006")?;
            let gone = connect(&site.lab.world, (HOST, 8006), Duration::from_secs(2));
            ensure!(gone.is_err(), "the port outlives its removal");
            drop(bind()?);
        }
        // The other network's process is told whose it is.
        ctl(site, &control, "publish 8006:9006")?;
        let socket = site.lab.dir().join("vm2.sock");
        let mut second = site.start("lab", &socket, &["--publish", "8006:1"])?;
        until("the refusal", || !second.is_running())?;
        let words = second.errors().join("\n");
        let owner = format!("process {}", one.vunet.pid());
        ensure!(words.contains(&owner) && words.contains("network lab"), "{words}");
        one.stop()
    });
}

/// Where the world's client comes from.
const CLIENT_PORT: u16 = 33_333;

/// A connection of the world's to a listener in the guest by way of `port`, which has carried bytes both ways.
fn redirected(site: &Site, listener: &TcpListener, port: u16) -> Result<(TcpStream, TcpStream), Failure> {
    let mut client = site.lab.world.inside(|| -> std::io::Result<TcpStream> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((WORLD, CLIENT_PORT)).into())?;
        socket.connect_timeout(&SocketAddr::from((HOST, port)).into(), PATIENCE)?;
        Ok(socket.into())
    })?;
    let (mut guest, from) = listener.accept()?;
    ensure!(from == SocketAddr::from((WORLD, CLIENT_PORT)), "the guest saw {from}");
    client.set_read_timeout(Some(PATIENCE))?;
    guest.set_read_timeout(Some(PATIENCE))?;
    pass(&mut client, &mut guest)?;
    pass(&mut guest, &mut client)?;
    Ok((client, guest))
}

fn pass(from: &mut TcpStream, to: &mut TcpStream) -> Outcome {
    let mut got = [0; 5];
    from.write_all(b"hello")?;
    to.read_exact(&mut got)?;
    ensure!(&got == b"hello", "{got:?} came");
    Ok(())
}

/// Whether an end that sends is answered with RST.
fn is_reset(end: &mut TcpStream) -> Outcome {
    let outcome = end.write_all(b"again").and_then(|()| end.read(&mut [0; 1])).map_err(|error| error.kind());
    ensure!(outcome == Err(ErrorKind::ConnectionReset), "it ended with {outcome:?}");
    Ok(())
}

#[test]
fn connections_the_kernel_redirects_end_with_their_port_unless_they_are_to_be_kept() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let path = site.lab.dir().join("control.sock");
        let one = site.vm("lab", "vm1", &["--control", &path.display().to_string()])?;
        let mut api = Api::open(&path)?;
        let listener = one.netns.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7003)))?;
        // With one number at both ends, what the guest sends could go on unnoticed.
        for (publish, port) in [("8003:7003", 8003), ("7003:7003", 7003), ("192.0.2.1:7003:7003", 7003)] {
            for guest_first in [false, true, true] {
                let published = api.publish(publish)?;
                let (mut client, mut guest) = redirected(site, &listener, port)?;
                let mut other = api.publish("8009:7003")?;
                let mut beside = connect(&site.lab.world, (HOST, 8009), PATIENCE)?;
                let (mut beside_guest, _) = listener.accept()?;
                let ended = api.unpublish(&published["id"], true)?;
                ensure!(ended == 1, "{publish}: {ended} connections were reset");
                let ends = if guest_first { [&mut guest, &mut client] } else { [&mut client, &mut guest] };
                for end in ends {
                    is_reset(end)?;
                }
                // Another port's connection to the same guest's port goes on.
                pass(&mut beside, &mut beside_guest)?;
                ensure!(api.unpublish(&other["id"].take(), true)? == 1, "the other port's");
            }
        }
        let kept = api.publish("8003:7003")?;
        let (mut client, mut guest) = redirected(site, &listener, 8003)?;
        ensure!(api.unpublish(&kept["id"], false)? == 0, "what was to be kept was reset");
        pass(&mut client, &mut guest)?;
        pass(&mut guest, &mut client)?;
        let gone = connect(&site.lab.world, (HOST, 8003), Duration::from_secs(2));
        ensure!(gone.is_err(), "the port outlives its removal");
        // The host's own clients are the relay's.
        for reset in [true, false] {
            let port = api.publish("8004:7003")?;
            let mut own = connect(&site.lab.host, (Ipv4Addr::LOCALHOST, 8004), PATIENCE)?;
            let (mut guest, _) = listener.accept()?;
            pass(&mut own, &mut guest)?;
            ensure!(api.unpublish(&port["id"], reset)? == u64::from(reset), "of the relay");
            match reset {
                true => is_reset(&mut own)?,
                false => pass(&mut own, &mut guest)?,
            }
        }
        exchanges_end_with_their_port(site, &one, &mut api)?;
        one.stop()
    });
}

/// Datagrams of a client that was answered reach the guest no more once the port is gone, whether or not connections are kept.
fn exchanges_end_with_their_port(site: &Site, vm: &Vm, api: &mut Api) -> Outcome {
    let guest = vm.netns.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 7005)))?;
    guest.set_read_timeout(Some(Duration::from_millis(500)))?;
    for reset in [true, false] {
        let port = api.publish("udp:8005:7005")?;
        let client = site.lab.world.inside(|| UdpSocket::bind((WORLD, 0)))?;
        client.set_read_timeout(Some(PATIENCE))?;
        let mut text = [0; 8];
        client.send_to(b"one", (HOST, 8005))?;
        let (_, from) = guest.recv_from(&mut text)?;
        guest.send_to(b"two", from)?;
        let (_, from) = client.recv_from(&mut text)?;
        ensure!(from == SocketAddr::from((HOST, 8005)), "{from} answered");
        api.unpublish(&port["id"], reset)?;
        client.send_to(b"three", (HOST, 8005))?;
        let late = guest.recv_from(&mut text);
        ensure!(late.is_err(), "{late:?} came by a port that is gone");
    }
    Ok(())
}

#[test]
fn a_change_that_nft_refuses_leaves_ports_as_they_were() {
    on_a_site(&["nft"], |site| {
        // The real one, but while there is a file that says otherwise.
        let folder = site.lab.dir().join("bin");
        std::fs::create_dir(&folder)?;
        let (nft, fails) = (folder.join("nft"), folder.join("fails"));
        let script = "#!/bin/sh\n[ -e \"${0%/*}/fails\" ] && { echo 'Error: no such luck' >&2; exit 1; }\n\
                      PATH=/usr/sbin:/sbin:/usr/bin:/bin exec nft \"$@\"\n";
        std::fs::write(&nft, script)?;
        std::fs::set_permissions(&nft, std::fs::Permissions::from_mode(0o755))?;
        let path = std::env::var("PATH").unwrap_or_default();
        let words = ["env".to_owned(), format!("PATH={}:{path}", folder.display())];
        let words: Vec<&'static str> = words.into_iter().map(|word| &*word.leak()).collect();
        site.through = words.leak();
        site.network("create lab")?;
        let control = site.lab.dir().join("control.sock");
        let one = site.vm("lab", "vm1", &["--control", &control.display().to_string(), "-t", "8006:9006"])?;
        let mut api = Api::open(&control)?;
        let _server = site.serve(&one.netns)?;
        let rules = || site.lab.host.run(&["nft", "list", "ruleset"], SHORT).map(|output| output.stdout);
        let before = (rules()?, site.inspect("lab")?["users"].clone());
        let unchanged = |api: &mut Api| -> Outcome {
            ensure!(
                (rules()?, site.inspect("lab")?["users"].clone()) == before,
                "{} {}",
                rules()?,
                site.inspect("lab")?
            );
            let (_, list) = api.ask("GET", "/v1/ports", None)?;
            ensure!(list["ports"].as_array().is_some_and(|ports| ports.len() == 1), "{list}");
            for from in [&site.lab.world, &site.lab.host] {
                seen(from, (HOST, 8006))?;
            }
            Ok(())
        };
        unchanged(&mut api)?;
        for _ in 0..2 {
            std::fs::write(&fails, "")?;
            let (status, answer) =
                api.ask("POST", "/v1/ports", Some(&json!({ "publish": "8007-8009:9006-9008" })))?;
            ensure!(status == 500 && answer.to_string().contains("no such luck"), "{status} {answer}");
            let (status, answer) = api.ask("DELETE", "/v1/ports/tcp:8006", None)?;
            ensure!(status == 500, "{status} {answer}");
            unchanged(&mut api)?;
            std::fs::remove_file(&fails)?;
            // What was refused is free, and no later change brings it back.
            drop(site.lab.host.inside(|| TcpListener::bind((HOST, 8007)))?);
            let other = api.publish("8010:9006")?;
            ensure!(seen(&site.lab.world, (HOST, 8010))?.ip() == WORLD, "{other}");
            ensure!(!rules()?.contains("8007"), "{}", rules()?);
            api.unpublish(&other["id"], true)?;
            unchanged(&mut api)?;
        }
        let (status, answer) = api.ask("DELETE", "/v1/ports/tcp:8006", None)?;
        ensure!(status == 200, "{status} {answer}");
        ensure!(!rules()?.contains("8006"), "{}", rules()?);
        one.stop()
    });
}

/// Ports that the kernel redirects come and go under traffic.
fn redirects_come_and_go(times: u16) {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let path = site.lab.dir().join("control.sock");
        let one = site.vm("lab", "vm1", &["--control", &path.display().to_string(), "-t", "8004:9004"])?;
        let mut api = Api::open(&path)?;
        let _server = site.serve(&one.netns)?;
        change_ports_under_traffic(&mut api, &site.lab.world, &[one.vunet.pid()], times)?;
        one.stop()
    });
}

#[test]
fn ports_the_kernel_redirects_come_and_go_under_traffic_and_leave_no_descriptor() {
    redirects_come_and_go(50);
}

#[test]
#[ignore = "minutes: each change replaces the network's rules"]
fn a_thousand_ports_the_kernel_redirects_come_and_go_under_traffic() {
    redirects_come_and_go(1000);
}

#[test]
fn the_hosts_own_services_are_closed_to_guests_unless_the_network_allows_it() {
    on_a_site(&[], |site| {
        site.network("create closed --subnet 10.0.2.0/24")?;
        site.network("create open --allow-host --subnet 10.0.3.0/24")?;
        let _server = site.serve(&site.lab.host)?;
        for (network, third, allowed) in [("closed", 2, false), ("open", 3, true)] {
            let vm = site.vm(network, network, &[])?;
            for to in [Ipv4Addr::new(10, 0, third, 1), HOST] {
                let outcome = connect(&vm.netns, (to, ports::PEER), Duration::from_secs(2));
                ensure!(outcome.is_ok() == allowed, "{network} to {to}: {outcome:?}");
                let refused = outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
                ensure!(refused != allowed, "{network} to {to}: refused at once is kinder than silence");
            }
            vm.stop()?;
        }
        Ok(())
    });
}

#[test]
fn isolated_guests_reach_the_world_and_not_each_other_whatever_they_send() {
    on_a_site(&[], |site| {
        site.network("create lab --isolate")?;
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(one.pings(WORLD)? && two.pings(WORLD)?, "the world is out of reach");
        ensure!(!one.pings_soon(two.ip)?, "the other guest is in reach");
        // By way of the host, which knows where the other one is.
        one.run(&format!("ip route add {}/32 via 10.0.2.1", two.ip))?;
        one.run("ip neigh replace 10.0.2.1 lladdr 02:ab:cd:00:00:01 dev eth0")?;
        let mut capture = Capture::of(&two.netns, "eth0")?;
        ensure!(!one.pings_soon(two.ip)?, "the other guest is in reach through the host");
        // Not even one way, which needs no answer.
        let from_one = |frame: &Vec<u8>| frame.windows(4).any(|four| four == one.ip.octets());
        let seen = capture.frames(Duration::from_millis(300))?;
        ensure!(!seen.iter().any(from_one), "the other guest got {seen:02x?}");
        one.stop()?;
        two.stop()
    });
}

/// Two VMs on the bridge of a network work with a firewall that drops what it does not know.
fn coexists(when: &str, site: &Site, one: &Vm, two: &Vm) -> Outcome {
    ensure!(one.pings(two.ip)?, "{when}: guests do not reach each other");
    let rules = site.lab.host.run(&["nft", "list", "ruleset"], PATIENCE)?.stdout;
    ensure!(one.pings(WORLD)?, "{when}: the world is out of reach: {rules}");
    let peer = seen(&site.lab.world, (HOST, 8006))?;
    ensure!(peer.ip() == WORLD, "{when}: the guest saw {peer}");
    Ok(())
}

#[test]
fn a_policy_of_drop_like_dockers_is_lived_with_before_and_after_its_rules_are_flushed() {
    on_a_site(&[], |site| {
        let nft = |rules: &str| site.lab.host.run(&["nft", rules], PATIENCE).map(drop);
        let docker = "add table ip filter; \
            add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; \
            add chain ip filter DOCKER-USER; add rule ip filter FORWARD jump DOCKER-USER; \
            add rule ip filter DOCKER-USER return";
        nft(docker)?;
        // Bridged frames are filtered too.
        site.lab.host.sysctl("net.bridge.bridge-nf-call-iptables", "1")?;
        site.network("create lab")?;
        let before = site.host_state()?;
        let one = site.vm("lab", "vm1", &PUBLISH)?;
        let two = site.vm("lab", "vm2", &[])?;
        let _server = site.serve(&one.netns)?;
        let rules = || site.lab.host.run(&["nft", "list", "ruleset"], PATIENCE).map(|output| output.stdout);
        until("the port's rule", || rules().is_ok_and(|rules| rules.contains("8006 : 9006")))?;
        coexists("at first", site, &one, &two)?;
        let tagged = || rules().is_ok_and(|rules| rules.contains("comment \"vunet:"));
        for damage in
            ["flush chain ip filter DOCKER-USER; add rule ip filter DOCKER-USER return", "flush ruleset"]
        {
            nft(damage)?;
            if damage.ends_with("ruleset") {
                nft(docker)?;
            }
            until("the accepts", tagged)?;
            until("the port's rule", || rules().is_ok_and(|rules| rules.contains("8006 : 9006")))?;
            coexists(damage, site, &one, &two)?;
        }
        one.stop()?;
        two.stop()?;
        ensure_as_before(&before, &site.host_state()?)
    });
}

#[test]
fn a_policy_of_drop_of_iptables_legacy_is_lived_with_and_its_rules_stay() {
    on_a_site(&["iptables-legacy"], |site| {
        let legacy = |program: &str, words: &str| {
            let words: Vec<&str> = std::iter::once(program).chain(words.split(' ')).collect();
            site.lab.host.run(&words, PATIENCE).map(|output| output.stdout)
        };
        for program in ["iptables-legacy", "ip6tables-legacy"] {
            legacy(program, "-P FORWARD DROP")?;
            legacy(program, "-A FORWARD -i nobody -j ACCEPT")?;
        }
        site.lab.host.sysctl("net.bridge.bridge-nf-call-iptables", "1")?;
        let here = || -> Result<String, Failure> {
            Ok(legacy("iptables-legacy", "-S")? + &legacy("ip6tables-legacy", "-S")?)
        };
        site.network("create lab")?;
        let (before, rules_before) = (site.host_state()?, here()?);
        let one = site.vm("lab", "vm1", &PUBLISH)?;
        let two = site.vm("lab", "vm2", &[])?;
        let _server = site.serve(&one.netns)?;
        let rules = || site.lab.host.run(&["nft", "list", "ruleset"], PATIENCE).map(|output| output.stdout);
        until("the port's rule", || rules().is_ok_and(|rules| rules.contains("8006 : 9006")))?;
        let shown = here()?;
        // The bridge to itself, out and in over IPv4; to itself over IPv6.
        ensure!(shown.matches("vunet:").count() == 4, "{shown}");
        coexists("at first", site, &one, &two)?;
        // Docker comes, and with it a chain for users; what was flushed comes back with the next change.
        legacy("iptables-legacy", "-N DOCKER-USER")?;
        legacy("iptables-legacy", "-I FORWARD -j DOCKER-USER")?;
        let three = site.vm("lab", "vm3", &[])?;
        let shown = here()?;
        ensure!(shown.matches("-A DOCKER-USER").count() == 3, "{shown}");
        coexists("with Docker", site, &one, &two)?;
        [one, two, three].into_iter().try_for_each(Vm::stop)?;
        legacy("iptables-legacy", "-D FORWARD -j DOCKER-USER")?;
        legacy("iptables-legacy", "-X DOCKER-USER")?;
        ensure_as_before(&before, &site.host_state()?)?;
        ensure_as_before(&rules_before, &here()?)
    });
}

/// What firewalld 1.3.3 has about forwarding, without its zones.
const FIREWALLD: &str = "add table inet firewalld; \
    add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; }; \
    add chain inet firewalld filter_FORWARD_ZONES; \
    add rule inet firewalld filter_FORWARD ct state established,related accept; \
    add rule inet firewalld filter_FORWARD ct status dnat accept; \
    add rule inet firewalld filter_FORWARD jump filter_FORWARD_ZONES; \
    add rule inet firewalld filter_FORWARD reject with icmpx admin-prohibited";

#[test]
fn what_to_do_about_firewalld_is_said_until_it_is_done() {
    on_a_site(&[], |site| {
        let nft = |rules: &str| site.lab.host.run(&["nft", rules], PATIENCE).map(drop);
        nft(FIREWALLD)?;
        site.network("create lab")?;
        let says = |vm: &Vm| vm.vunet.errors().join("\n").matches("--add-interface=vn-+").count();
        let one = site.vm("lab", "vm1", &[])?;
        ensure!(!one.pings_soon(WORLD)?, "this firewalld rejects nothing");
        ensure!(says(&one) == 1, "said {} times", says(&one));
        // What that command makes of its rules.
        nft("add rule inet firewalld filter_FORWARD_ZONES iifname \"vn-*\" accept")?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(one.pings(WORLD)? && two.pings(one.ip)?, "what is said does not help");
        ensure!(says(&two) == 0, "it is said although it is done");
        one.stop()?;
        two.stop()
    });
}

#[test]
fn another_default_route_is_followed() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        site.lab.link_too()?;
        let before = site.host_state()?;
        let vm = site.vm("lab", "vm1", &[])?;
        ensure!(seen(&vm.netns, (WORLD, ports::PEER))?.ip() == HOST, "by the first way");
        let (host_too, world_too) = (vunet_integration::lab::HOST_TOO, vunet_integration::lab::WORLD_TOO);
        site.lab.ip(&site.lab.host, &format!("route replace default via {world_too}"))?;
        site.lab.ip(&site.lab.host, "addr flush dev p0")?;
        until("the other way", || {
            seen(&vm.netns, (WORLD, ports::PEER)).is_ok_and(|peer| peer.ip() == host_too)
        })?;
        let forwards = |interface: &str| {
            let key = format!("net.ipv4.conf.{interface}.forwarding");
            site.lab.host.run(&["sysctl", "-n", &key], PATIENCE).map(|output| output.stdout.trim().to_owned())
        };
        ensure!(
            forwards("p0")? == "0" && forwards("p1")? == "1",
            "the old way still forwards, or the new does not"
        );
        vm.stop()?;
        site.lab.ip(&site.lab.host, &format!("addr add {HOST}/24 dev p0"))?;
        site.lab.ip(&site.lab.host, &format!("route replace default via {WORLD}"))?;
        ensure_as_before(&before, &site.host_state()?)
    });
}

#[test]
fn a_default_route_in_a_table_of_its_own_or_in_halves_leads_to_the_world_too() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        site.lab.link_too()?;
        let (host_too, world_too) = (vunet_integration::lab::HOST_TOO, vunet_integration::lab::WORLD_TOO);
        let ip = |words: &str| site.lab.ip(&site.lab.host, words);
        // A VPN's way of doing it; the world is on no link of the host's, so that only this leads there.
        ip("addr flush dev p0")?;
        ip(&format!("route add default via {world_too} table 51820"))?;
        // Else what comes back for the guest would leave by that route too.
        ip("rule add lookup main suppress_prefixlength 0 priority 999")?;
        let before = site.host_state()?;
        let vm = site.vm("lab", "vm1", &[])?;
        let reaches = || seen(&vm.netns, (WORLD, ports::PEER)).is_ok_and(|peer| peer.ip() == host_too);
        let refused = connect(&vm.netns, (WORLD, ports::PEER), Duration::from_secs(1));
        ensure!(refused.is_err(), "a table that no rule leads to leads to the world");
        ip("rule add lookup 51820 priority 1000")?;
        until("the table's way", reaches)?;
        let forwards = || {
            let key = "net.ipv4.conf.p1.forwarding";
            site.lab.host.run(&["sysctl", "-n", key], PATIENCE).map(|output| output.stdout.trim().to_owned())
        };
        ensure!(forwards()? == "1", "p1 does not forward");
        ip("rule del lookup 51820 priority 1000")?;
        until("the end of it", || forwards().is_ok_and(|is| is == "0"))?;
        for half in ["0.0.0.0/1", "128.0.0.0/1"] {
            ip(&format!("route add {half} via {world_too}"))?;
        }
        until("the halves' way", reaches)?;
        for half in ["0.0.0.0/1", "128.0.0.0/1"] {
            ip(&format!("route del {half}"))?;
        }
        vm.stop()?;
        ensure_as_before(&before, &site.host_state()?)
    });
}

#[test]
fn a_guest_goes_on_with_its_address_when_its_vunet_was_killed_and_started_anew() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let mut vm = site.vm("lab", "vm1", &["--publish", "8006:9006"])?;
        let _server = site.serve(&vm.netns)?;
        site.revive(&mut vm, "lab", &["--publish", "8006:9006"])?;
        // The guest's stack noticed nothing and asks for no lease.
        ensure!(vm.pings(WORLD)?, "the world is out of reach");
        ensure!(seen(&vm.netns, (WORLD, ports::PEER))?.ip() == HOST, "it leaves otherwise");
        vm.stop()
    });
}
