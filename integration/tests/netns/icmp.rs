//! ICMP with real programs: routes traced, large pings, path MTU, and what errors of the world do in
//! the guest.
//!
//! Behind the world lies a further network, so that a route has hops:
//! ```text
//!  guest -- vunet (10.0.2.1) ~~ host -- world 192.0.2.2 | 198.18.0.1 -- far 198.18.0.2
//! ```

use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};

use vunet_integration::lab::{self, GATEWAY, Netns, SHORT, WORLD};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, PATIENCE, Setup, ensure, scenario};

/// The host behind the world.
const FAR: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

/// Adds the far network, whose link carries packets of at most `mtu` bytes.
fn far(bench: &Bench, mtu: u16) -> Result<Netns, Failure> {
    let (far, mtu) = (Netns::create("far")?, mtu.to_string());
    let world = bench.lab.world.name();
    let ip = |words: &[&str]| lab::run(&[&["ip"], words].concat(), SHORT).map(drop);
    let name = far.name();
    ip(&[
        "link", "add", "f0", "mtu", &mtu, "netns", world, "type", "veth", "peer", "name", "e0", "netns", name,
    ])?;
    ip(&["-n", name, "link", "set", "e0", "mtu", &mtu])?;
    ip(&["-n", world, "addr", "add", "198.18.0.1/24", "dev", "f0"])?;
    ip(&["-n", name, "addr", "add", "198.18.0.2/24", "dev", "e0"])?;
    ip(&["-n", world, "link", "set", "f0", "up"])?;
    ip(&["-n", name, "link", "set", "e0", "up"])?;
    ip(&["-n", name, "route", "add", "default", "via", "198.18.0.1"])?;
    far.sysctl("net.ipv4.icmp_ratelimit", "0")?;
    Ok(far)
}

/// The addresses in a program's numbered lines of hops: the first on each.
fn hops(output: &str) -> Vec<String> {
    let numbered = |line: &&str| line.trim_start().starts_with(|c: char| c.is_ascii_digit());
    let address = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        words.find(|word| word.parse::<Ipv4Addr>().is_ok() || *word == "*").map(str::to_owned)
    };
    output.lines().filter(numbered).filter_map(address).collect()
}

fn route() -> Vec<String> {
    [GATEWAY, WORLD, FAR].iter().map(Ipv4Addr::to_string).collect()
}

#[test]
fn a_route_is_traced_through_vunet_with_datagrams_and_with_echoes() {
    scenario(&Setup::new().tools(&["traceroute"]), |bench| {
        let _far = far(bench, 1500)?;
        for kind in [&["-U", "-p", "33434"][..], &[], &["-I"]] {
            let mut words = vec!["traceroute", "-n", "-q", "2", "-w", "2", "-m", "6"];
            words.extend(kind);
            let far = FAR.to_string();
            words.push(&far);
            let output = bench.in_guest(&words)?;
            ensure!(hops(&output) == route(), "{words:?}: {output}");
            ensure!(!output.contains('*') && !output.contains('!'), "{words:?}: {output}");
        }
        Ok(())
    });
}

#[test]
fn mtr_sees_every_hop_without_loss() {
    scenario(&Setup::new().tools(&["mtr"]), |bench| {
        let _far = far(bench, 1500)?;
        let far = FAR.to_string();
        for kind in [&[][..], &["--udp"]] {
            let base = ["mtr", "-n", "--report", "-c", "4", "-i", "0.2", "-m", "6", "--gracetime", "2"];
            let words = [&base[..], kind, &[&far]].concat();
            let output = bench.in_guest(&words)?;
            let lines: Vec<&str> = output.lines().filter(|line| line.contains("|--")).collect();
            let seen: Vec<&str> = lines.iter().filter_map(|line| line.split_whitespace().nth(1)).collect();
            ensure!(seen == route(), "{words:?}: {output}");
            ensure!(lines.iter().all(|line| line.contains(" 0.0%")), "{words:?}: {output}");
        }
        Ok(())
    });
}

#[test]
fn tracepath_finds_the_mtu_of_the_path() {
    scenario(&Setup::new().tools(&["tracepath"]), |bench| {
        let _far = far(bench, 1400)?;
        let output = bench.in_guest(&["tracepath", "-n", "-m", "6", &FAR.to_string()])?;
        ensure!(output.contains("pmtu 1400"), "{output}");
        ensure!(output.contains("Resume: pmtu 1400 hops 3"), "{output}");
        Ok(())
    });
}

#[test]
fn a_datagram_too_large_for_the_path_is_refused_to_who_may_not_fragment_and_arrives_from_who_may() {
    scenario(&Setup::new().tools(&["ping"]), |bench| {
        let _far = far(bench, 1400)?;
        let far = FAR.to_string();
        for _ in 0..2 {
            // The first is refused by the world's router, the next by the host that learned from it.
            let refused = bench
                .lab
                .guest
                .run_any(&["ping", "-n", "-M", "do", "-c", "1", "-W", "2", "-s", "1430", &far], PATIENCE)?;
            let text = [refused.stdout, refused.stderr].concat();
            ensure!(text.contains("mtu") && text.contains("1400"), "{text}");
            bench.in_guest(&["ip", "route", "flush", "cache"])?;
        }
        for size in ["1430", "30000"] {
            let words = ["ping", "-n", "-M", "dont", "-c", "2", "-i", "0.05", "-W", "2", "-s", size, &far];
            let output = bench.in_guest(&words)?;
            ensure!(output.contains("2 received"), "{output}");
        }
        Ok(())
    });
}

#[test]
fn a_ping_of_60000_bytes_comes_back() {
    scenario(&Setup::new().tools(&["ping"]), |bench| {
        for size in ["60000", "65507"] {
            let (world, gateway) = (WORLD.to_string(), GATEWAY.to_string());
            for target in [&world, &gateway] {
                let words = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", "-s", size, target];
                let output = bench.in_guest(&words)?;
                ensure!(output.contains("3 received"), "{output}");
            }
        }
        Ok(())
    });
}

#[test]
fn a_closed_port_of_the_world_is_refused_at_once() {
    scenario(&Setup::new(), |bench| {
        let socket = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect((WORLD, ports::CLOSED))?;
        for _ in 0..3 {
            socket.send(b"anybody?")?;
            match socket.recv(&mut [0; 10]) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                outcome => return Err(Failure(format!("a closed port gave {outcome:?}"))),
            }
        }
        // The socket lives: the next of its datagrams reaches whom it is for.
        socket.connect((WORLD, ports::ECHO))?;
        socket.send(b"hello")?;
        let mut got = [0; 10];
        let len = socket.recv(&mut got)?;
        ensure!(&got[..len] == b"hello", "{got:?}");
        Ok(())
    });
}

#[test]
fn a_host_that_forbids_echo_sockets_says_so_to_the_guest_and_in_the_log() {
    scenario(&Setup::new().tools(&["ping"]), |bench| {
        bench.lab.host.sysctl("net.ipv4.ping_group_range", "1 0")?;
        let world = WORLD.to_string();
        for _ in 0..2 {
            let refused = bench.lab.guest.run_any(&["ping", "-n", "-c", "1", "-W", "3", &world], PATIENCE)?;
            let text = [refused.stdout, refused.stderr].concat();
            ensure!(text.contains("Packet filtered"), "{text}");
        }
        let said = bench.vunet.process.errors();
        let said = said.iter().filter(|line| line.contains("net.ipv4.ping_group_range")).count();
        ensure!(said == 1, "the log names the sysctl {said} times");
        // It is asked again for every new exchange.
        bench.lab.host.sysctl("net.ipv4.ping_group_range", "0 2147483647")?;
        let output = bench.in_guest(&["ping", "-n", "-c", "1", "-W", "3", &world])?;
        ensure!(output.contains("1 received"), "{output}");
        Ok(())
    });
}

#[test]
fn a_port_the_guest_closed_is_refused_to_the_world() {
    scenario(&Setup::new(), |bench| {
        let world = bench.lab.world.inside(|| UdpSocket::bind((WORLD, 9100)))?;
        let guest = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
        world.set_read_timeout(Some(PATIENCE))?;
        guest.set_read_timeout(Some(PATIENCE))?;
        guest.connect((WORLD, 9100))?;
        guest.send(b"ask")?;
        let (_, seen_as) = world.recv_from(&mut [0; 10])?;
        world.connect(seen_as)?;
        world.send(b"answer")?;
        guest.recv(&mut [0; 10])?;
        drop(guest);
        // The guest refuses the first of these, which closes the host's socket; the host refuses the next.
        world.set_read_timeout(Some(std::time::Duration::from_millis(50)))?;
        for _ in 0..100 {
            let refused = |error: &std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
            match world.send(b"late").and_then(|_| world.recv(&mut [0; 10])) {
                Err(error) if refused(&error) => return Ok(()),
                Err(_) => {}
                Ok(_) => return Err(Failure("nobody was there to answer".into())),
            }
        }
        Err(Failure("the world was never refused".into()))
    });
}
