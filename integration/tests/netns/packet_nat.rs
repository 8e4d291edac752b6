//! Translation of packets onto a link: what it does that the NAT over sockets does not, and how it holds its
//! address there. What both do is run through both: `VUNET_NAT=packet`.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use vunet_integration::lab::{GUEST, HOST, HOST_BESIDE, LAN_POOL, SHORT, WORLD};

use vunet_integration::world::ports;

use crate::bench::{
    ANSWER_BYTES_MAX, Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, integration_binary,
    scenario,
};

/// What `ip neigh` shows of `addr` in the world.
fn neighbour(bench: &Bench, addr: Ipv4Addr) -> Result<String, Failure> {
    let words = ["ip", "-4", "neigh", "show", "to", &addr.to_string()];
    Ok(bench.lab.world.run(&words, SHORT)?.stdout)
}

/// Waits for a line of vunet's log.
fn await_log(bench: &Bench, what: &str) -> Result<String, Failure> {
    Ok(bench.vunet.process.wait_error(PATIENCE, what, |line| line.contains(what))?)
}

/// Pings of the guest to `to`, all of which are answered.
fn ping(bench: &Bench, to: Ipv4Addr, more: &[&str]) -> Outcome {
    let to = to.to_string();
    let words = [&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2"], more, &[&to]].concat();
    let output = bench.in_guest(&words)?;
    ensure!(output.contains("3 received"), "{words:?}: {output}");
    Ok(())
}

#[test]
fn the_guest_is_hidden_behind_an_address_of_vunets_own() {
    let setup = Setup::translated().tools(&["ping", "curl", "iperf3", "ss"]);
    scenario(&setup, |bench| {
        ping(bench, WORLD, &[])?;
        ping(bench, HOST_BESIDE, &[])?;
        bench.http_both_ways(32 * MIB, 1)?;
        let known = neighbour(bench, HOST)?;
        ensure!(known.contains("lladdr"), "the world knows no station at {HOST}: {known}");
        let guest = bench.lab.guest.run(&["cat", "/sys/class/net/eth0/address"], SHORT)?.stdout;
        ensure!(!known.contains(guest.trim()), "the world sees the guest's own MAC: {known}");
        bench.lab.start_iperf3()?;
        for direction in [&[][..], &["-R"]] {
            let base = ["iperf3", "-c", "192.0.2.2", "-t", "1", "--connect-timeout", "5000"];
            let output = bench.in_guest(&[&base[..], direction].concat())?;
            ensure!(output.contains("receiver"), "{output}");
        }
        let _held = bench.connect_world(ports::ECHO)?;
        let peers = bench.lab.world.run(&["ss", "-Htn", "sport", "=", ":9003"], SHORT)?.stdout;
        ensure!(peers.contains(&HOST.to_string()), "{peers}");
        ensure!(!peers.contains(&GUEST.to_string()), "{peers}");
        let counters = bench.detach()?;
        ensure!(counters.gso_from_guest > 0 && counters.gso_to_guest > 0, "segmentation: {counters:?}");
        Ok(())
    });
}

#[test]
fn connections_keep_what_the_ends_agreed_on() {
    let setup = Setup::translated().tools(&["ss"]);
    scenario(&setup, |bench| {
        let _held = bench.connect_world(ports::ECHO)?;
        let both = [&bench.lab.world, &bench.lab.guest];
        for (netns, filter) in both.iter().zip(["sport = :9003", "dport = :9003"]) {
            let shown = netns.run(&["ss", "-Htnio", filter], SHORT)?.stdout;
            for option in [" ts ", " sack ", " wscale:"] {
                ensure!(shown.contains(option), "no {option}: {shown}");
            }
        }
        Ok(())
    });
}

#[test]
fn packets_longer_than_the_link_and_other_protocols_pass() {
    let setup = Setup::translated().tools(&["ping", "traceroute"]);
    scenario(&setup, |bench| {
        for size in ["1472", "1473", "20000"] {
            ping(bench, WORLD, &["-s", size])?;
        }
        let trace =
            bench.in_guest(&["traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", &WORLD.to_string()])?;
        let hops: Vec<&str> =
            trace.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
        ensure!(hops == ["10.0.2.1", "192.0.2.2"], "{trace}");
        Ok(())
    });
}

#[test]
fn an_address_leased_on_the_link_is_used_and_given_back() {
    let uplink = format!("bridge={}", vunet_integration::lab::BRIDGE);
    let mac = "52:54:00:00:00:77";
    let setup = Setup::on_bridge().tools(&["curl"]);
    bare(&setup, |bench| {
        bench.vunet.process.stop();
        let args = ["--uplink", &uplink, "--mac", mac];
        let options = vunet_integration::lab::BackendOptions::args(&args);
        let mut leased = Vec::new();
        for round in 0..2 {
            bench.vunet = bench.lab.vunet(&options)?;
            bench.attach(&["--mac", mac])?;
            bench.lease()?;
            await_log(bench, "the link's address is ours")?;
            bench.http_both_ways(MIB, round)?;
            let found: Vec<Ipv4Addr> = bench
                .lab
                .world
                .run(&["ip", "-4", "neigh", "show", "dev", "e0"], SHORT)?
                .stdout
                .lines()
                .filter(|line| line.contains("56:54:00:00:00:77"))
                .filter_map(|line| line.split(' ').next()?.parse().ok())
                .collect();
            ensure!(found.len() == 1, "{found:?}");
            ensure!((LAN_POOL.0..=LAN_POOL.1).contains(&found[0]), "{found:?}");
            leased.extend(found);
            bench.detach()?;
            let code = bench.vunet.process.stop();
            ensure!(code == Some(0), "{code:?}");
        }
        ensure!(leased[0] == leased[1], "the same VM got {leased:?}");
        bench.vunet = bench.lab.vunet(&setup.vunet)?;
        Ok(())
    });
}

#[test]
fn an_address_another_host_has_is_not_used() {
    bare(&Setup::translated(), |bench| {
        await_log(bench, "the link's address is ours")?;
        bench.vunet.process.stop();
        bench.lab.ip(&bench.lab.world, &format!("addr add {HOST}/32 dev e0"))?;
        bench.vunet = bench.lab.vunet(&Setup::translated().vunet)?;
        let said = await_log(bench, "another host of the link has the address")?;
        ensure!(said.contains(&HOST.to_string()), "{said}");
        bench.attach(&[])?;
        bench.lease()?;
        let refused = bench.connect((WORLD, ports::ECHO), Duration::from_secs(1));
        ensure!(refused.is_err(), "a connection from an address that is another's");
        bench.lab.ip(&bench.lab.world, &format!("addr del {HOST}/32 dev e0"))?;
        let deadline = Instant::now() + 2 * PATIENCE;
        while bench.connect((WORLD, ports::ECHO), Duration::from_secs(1)).is_err() {
            ensure!(Instant::now() < deadline, "the address is free and not taken again");
        }
        Ok(())
    });
}

/// The address and port the guest's server sees of a client in the world.
fn seen_by_guest(bench: &Bench, port: u16) -> Result<std::net::SocketAddr, Failure> {
    let to = std::net::SocketAddr::from((HOST, port));
    let stream = bench.lab.world.inside(|| std::net::TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text.trim().parse()?)
}

#[test]
fn published_ports_lead_to_the_guest_who_sees_its_clients() {
    let publish =
        ["--publish", "8006:9006", "--publish", "udp:8003:9003", "--publish", "9009-9010:9003-9004"];
    scenario(&Setup::translated().vunet(&publish), |bench| {
        let binary = integration_binary().display().to_string();
        let server = bench.lab.guest.spawn(&[&binary, "world-server", "--bind", &GUEST.to_string()])?;
        server.wait_line(SHORT, "servers in the guest", |line| line.contains("ready"))?;
        let client = seen_by_guest(bench, 8006)?;
        ensure!(client.ip() == WORLD, "the guest saw {client} for a client at {WORLD}");
        let socket = bench.lab.world.inside(|| std::net::UdpSocket::bind((WORLD, 0)))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send_to(b"echo me", (HOST, 8003))?;
        let mut bytes = [0; 16];
        let (len, from) = socket.recv_from(&mut bytes)?;
        ensure!(&bytes[..len] == b"echo me" && from == (HOST, 8003).into(), "{from}: {:?}", &bytes[..len]);
        let to = std::net::SocketAddr::from((HOST, 9009));
        let mut stream = bench.lab.world.inside(|| std::net::TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"twice")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut text = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
        ensure!(text == "twice", "{text}");
        // A port that is not published is nobody's: nothing answers.
        let to = std::net::SocketAddr::from((HOST, 9006));
        let refused =
            bench.lab.world.inside(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(300)));
        ensure!(refused.is_err(), "port 9006 was not published");
        // The host's own address has none of the ports.
        let to = std::net::SocketAddr::from((HOST_BESIDE, 8006));
        let refused = bench.lab.world.inside(|| std::net::TcpStream::connect_timeout(&to, PATIENCE));
        ensure!(refused.is_err(), "port 8006 is published at the host's own address");
        // The guest reaches its own published port from inside.
        let mut text = String::new();
        let stream = bench.connect((HOST, 8006), PATIENCE)?;
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
        ensure!(text.trim().starts_with(&HOST.to_string()), "hairpin: {text}");
        Ok(())
    });
}

#[test]
fn four_queues_carry_flows_side_by_side() {
    let setup = Setup::translated().tools(&["iperf3", "curl"]).vunet(&["--queues", "4"]);
    bare(&setup, |bench| {
        bench.lab.start_iperf3()?;
        for queues in ["4", "2", "1"] {
            bench.attach(&["--queues", queues])?;
            bench.lease()?;
            for direction in [&[][..], &["-R"]] {
                let base = ["iperf3", "-c", "192.0.2.2", "-t", "1", "-P", "8", "--connect-timeout", "5000"];
                let output = bench.in_guest(&[&base[..], direction].concat())?;
                ensure!(output.contains("receiver"), "{output}");
            }
            bench.http_both_ways(8 * MIB, 4)?;
            bench.detach()?;
        }
        Ok(())
    });
}

#[test]
fn frames_to_a_group_of_stations_leave_by_no_socket_of_the_hosts() {
    let group = |bench: &Bench, mac: &str| {
        bench.in_guest(&[
            "ip",
            "neigh",
            "replace",
            "10.0.2.1",
            "lladdr",
            mac,
            "dev",
            "eth0",
            "nud",
            "permanent",
        ])
    };
    scenario(&Setup::translated(), |bench| {
        let gateway = bench.in_guest(&["ip", "neigh", "show", "10.0.2.1"])?;
        for mac in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:05", "33:33:00:00:00:01"] {
            group(bench, mac)?;
            // The host could reach both.
            for to in [WORLD, HOST_BESIDE] {
                let refused = bench.connect((to, ports::ECHO), Duration::from_millis(500));
                ensure!(refused.is_err(), "{mac} {to}: {gateway}");
                let socket = bench.lab.guest.inside(|| std::net::UdpSocket::bind((GUEST, 0)))?;
                socket.set_read_timeout(Some(Duration::from_millis(300)))?;
                socket.send_to(b"anybody?", (to, ports::ECHO))?;
                let answer = socket.recv_from(&mut [0; 16]);
                ensure!(answer.is_err(), "{mac} {to}: {answer:?}");
            }
        }
        bench.in_guest(&["ip", "neigh", "del", "10.0.2.1", "dev", "eth0"])?;
        bench.connect((WORLD, ports::ECHO), PATIENCE)?;
        Ok(())
    });
}

#[test]
fn our_address_answers_who_asks_whether_it_is_there() {
    scenario(&Setup::translated().tools(&["ping"]), |bench| {
        ping(bench, HOST, &[])?;
        let to = HOST.to_string();
        let shown =
            bench.lab.world.run(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", &to], SHORT)?.stdout;
        ensure!(shown.contains("3 received"), "{shown}");
        Ok(())
    });
}

#[test]
fn packets_of_a_guest_with_a_longer_mtu_are_cut_or_it_is_told() {
    scenario(&Setup::translated().tools(&["ping"]), |bench| {
        bench.in_guest(&["ip", "link", "set", "eth0", "mtu", "4000"])?;
        ping(bench, WORLD, &["-s", "3500", "-M", "dont"])?;
        let words = ["ping", "-n", "-c", "1", "-W", "2", "-s", "3500", "-M", "do", &WORLD.to_string()];
        let told = bench.lab.guest.run_any(&words, SHORT)?;
        let told = told.stdout + &told.stderr;
        ensure!(told.contains("mtu") && told.contains("1500"), "{told}");
        Ok(())
    });
}
