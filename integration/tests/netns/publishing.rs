//! Published ports as people say and change them: lists, interfaces, refusals, and changes while the process runs.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use vunet_integration::lab::{BackendOptions, GATEWAY, HOST, HOST_TOO, Netns, SHORT, WORLD, vunet_binary};
use vunet_integration::world::pattern;

use crate::bench::{
    ANSWER_BYTES_MAX, Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, fail, scenario,
};
use crate::publish::{connect, seen, serve_in_guest};

/// A second address of the world's.
const WORLD_ALSO: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

/// A client of the control API over one connection.
pub(crate) struct Api {
    stream: BufReader<UnixStream>,
}

impl Api {
    pub(crate) fn open(path: &Path) -> Result<Api, Failure> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Api { stream: BufReader::new(stream) })
    }

    /// The status, and the answer as JSON has it.
    pub(crate) fn ask(
        &mut self,
        method: &str,
        resource: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), Failure> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        let request = format!(
            "{method} {resource} HTTP/1.1\r\nhost: vunet\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.ok_or_else(|| Failure(format!("not HTTP: {line:?}")))?;
        let mut length = 0;
        loop {
            let mut field = String::new();
            self.stream.read_line(&mut field)?;
            match field.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse()?;
                }
                Some(_) => {}
                None => break,
            }
        }
        let mut answer = vec![0; length];
        self.stream.read_exact(&mut answer)?;
        Ok((status, serde_json::from_slice(&answer).unwrap_or_default()))
    }

    /// Publishes; the one port that was.
    pub(crate) fn publish(&mut self, port: &str) -> Result<Value, Failure> {
        let (status, answer) = self.ask("POST", "/v1/ports", Some(&json!({ "publish": port })))?;
        ensure!(status == 201, "publish {port}: {status} {answer}");
        Ok(answer["ports"][0].clone())
    }

    /// Publishes no more; how many connections were reset.
    pub(crate) fn unpublish(&mut self, id: &Value, close: bool) -> Result<u64, Failure> {
        let (status, answer) = self.ask("DELETE", &format!("/v1/ports/{id}?keep={}", !close), None)?;
        ensure!(status == 200, "unpublish {id}: {status} {answer}");
        Ok(answer["connections_reset"].as_u64().unwrap_or(u64::MAX))
    }
}

/// A setup whose control socket is in the lab's folder, which is made with it.
fn with_control(setup: Setup, body: impl FnOnce(&mut Bench, &mut Api) -> Outcome) {
    let folder = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let path = folder.path().join("control.sock");
    let text = path.display().to_string();
    scenario(&setup.vunet(&["--control", &text]), |bench| {
        let mut api = Api::open(&path)?;
        body(bench, &mut api)
    });
}

/// Both engines.
fn engines() -> [Setup; 2] {
    [Setup::new(), Setup::translated()]
}

fn descriptors(pid: u32) -> Result<usize, Failure> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// The address a client at `from` is seen with.
fn seen_from(world: &Netns, from: Ipv4Addr, to: (Ipv4Addr, u16)) -> Result<[SocketAddr; 2], Failure> {
    let own = world.inside(|| -> std::io::Result<_> {
        let tcp = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        tcp.bind(&SocketAddr::from((from, 0)).into())?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        tcp.connect_timeout(&SocketAddr::from(to).into(), PATIENCE)?;
        let udp = UdpSocket::bind((from, 0))?;
        udp.set_read_timeout(Some(PATIENCE))?;
        udp.connect(to)?;
        Ok((TcpStream::from(tcp), udp))
    })?;
    let (tcp, udp) = own;
    let mut text = String::new();
    let tcp_own = tcp.local_addr()?;
    tcp.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    let by_tcp: SocketAddr = text.trim().parse()?;
    ensure!(by_tcp == tcp_own, "the guest saw {by_tcp} for the client {tcp_own}");
    udp.send(b"who am I?")?;
    let mut answer = [0; 64];
    let len = udp.recv(&mut answer)?;
    let by_udp: SocketAddr = String::from_utf8_lossy(&answer[..len]).parse()?;
    ensure!(by_udp == udp.local_addr()?, "the guest saw {by_udp} for the client {:?}", udp.local_addr());
    Ok([by_tcp, by_udp])
}

#[test]
fn clients_of_two_addresses_are_each_seen_with_their_own_by_either_engine() {
    for setup in engines() {
        scenario(&setup.vunet(&["-t", "8006:9006", "-u", "8006:9006"]), |bench| {
            let _server = serve_in_guest(bench)?;
            bench.lab.world.run(&["ip", "addr", "add", "192.0.2.3/24", "dev", "e0"], SHORT)?;
            for from in [WORLD, WORLD_ALSO, WORLD] {
                let seen = seen_from(&bench.lab.world, from, (HOST, 8006))?;
                ensure!(seen.iter().all(|seen| seen.ip() == from), "{seen:?} for a client at {from}");
            }
            Ok(())
        });
    }
}

#[test]
fn lists_are_published_as_passt_reads_them() {
    let args = ["-t", "8003-8006:9003-9006,~8005", "--udp-ports", "127.0.0.1/7006:9006", "-t", "none"];
    scenario(&Setup::new().vunet(&args), |bench| {
        let _server = serve_in_guest(bench)?;
        ensure!(seen(&bench.lab.world, (HOST, 8006))?.ip() == WORLD, "it is not published");
        let left_out = connect(&bench.lab.world, (HOST, 8005));
        ensure!(left_out.is_err(), "a port that was left out is published");
        ensure!(connect(&bench.lab.world, (HOST, 9006)).is_err(), "so is one nobody named");
        let udp = bench.lab.host.inside(|| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))?;
        udp.set_read_timeout(Some(PATIENCE))?;
        udp.send_to(b"who am I?", (Ipv4Addr::LOCALHOST, 7006))?;
        let mut text = [0; 64];
        let (len, _) = udp.recv_from(&mut text)?;
        ensure!(
            text[..len].starts_with(GATEWAY.to_string().as_bytes()),
            "{:?}",
            String::from_utf8_lossy(&text[..len])
        );
        Ok(())
    });
}

#[test]
fn a_port_of_one_interface_takes_no_clients_of_another() {
    scenario(&Setup::new().vunet(&["--publish", "%p0:8006:9006"]), |bench| {
        let _server = serve_in_guest(bench)?;
        bench.lab.link_too()?;
        ensure!(seen(&bench.lab.world, (HOST, 8006))?.ip() == WORLD, "clients of its interface");
        let other = connect(&bench.lab.world, (HOST_TOO, 8006));
        ensure!(other.is_err(), "a client of another interface was taken");
        let own = connect(&bench.lab.host, (Ipv4Addr::LOCALHOST, 8006));
        ensure!(own.is_err(), "a client of the loopback was taken");
        Ok(())
    });
}

#[test]
fn the_loopback_of_ipv6_is_served_and_its_clients_are_the_gateway() {
    let args = ["--publish", "[::1]:8006:9006", "-u", "::1/8006:9006"];
    scenario(&Setup::new().vunet(&args), |bench| {
        let _server = serve_in_guest(bench)?;
        let to = SocketAddr::from((Ipv6Addr::LOCALHOST, 8006));
        let mut tcp = bench.lab.host.inside(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        (&mut tcp).take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
        let peer: SocketAddr = text.trim().parse()?;
        ensure!(peer.ip() == GATEWAY, "the guest saw {peer}");
        let udp = bench.lab.host.inside(|| UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)))?;
        udp.set_read_timeout(Some(PATIENCE))?;
        udp.connect(to)?;
        for _ in 0..3 {
            udp.send(b"who am I?")?;
            let mut text = [0; 64];
            let len = udp.recv(&mut text)?;
            let peer: SocketAddr = String::from_utf8_lossy(&text[..len]).parse()?;
            ensure!(peer == SocketAddr::from((GATEWAY, udp.local_addr()?.port())), "the guest saw {peer}");
        }
        Ok(())
    });
}

#[test]
fn a_port_the_guest_refuses_is_a_reset_to_its_client_and_nothing_else() {
    scenario(&Setup::new().vunet(&["-t", "8006:9006"]), |bench| {
        // Nobody serves it in the guest.
        let to = SocketAddr::from((HOST, 8006));
        // The reset may be there before the connect returns.
        let client = bench.lab.world.inside(|| TcpStream::connect_timeout(&to, PATIENCE));
        let end = client.and_then(|mut client| client.read(&mut [0; 1])).map_err(|error| error.kind());
        ensure!(end == Err(ErrorKind::ConnectionReset), "{end:?}");
        Ok(())
    });
}

#[test]
fn without_a_guest_a_client_is_reset_at_once() {
    bare(&Setup::new().vunet(&["-t", "8006:9006"]), |bench| {
        // The reset may be there before the connect returns.
        let to = SocketAddr::from((HOST, 8006));
        let client = bench.lab.world.inside(|| TcpStream::connect_timeout(&to, PATIENCE));
        let end = client.and_then(|mut client| client.read(&mut [0; 1])).map_err(|error| error.kind());
        ensure!(end == Err(ErrorKind::ConnectionReset), "{end:?}");
        Ok(())
    });
}

/// What vunet says as it ends because it cannot publish `args`, started by another user than root if `unprivileged`.
fn refusal(bench: &Bench, args: &[&str], unprivileged: bool) -> Result<String, Failure> {
    let socket = bench.lab.dir().join("refused.sock").display().to_string();
    let options = BackendOptions { unprivileged, ..BackendOptions::default() };
    let words = [&["--socket-path", &socket], args].concat();
    let mut process = bench.lab.start_vunet(&options, &words)?;
    let line = process.wait_error(PATIENCE, "the reason", |line| line.contains("cannot listen on"))?;
    let code = process.stop();
    ensure!(code == Some(1), "it ended with {code:?}");
    Ok(line)
}

#[test]
fn a_refused_port_names_its_owner_or_what_is_missing() {
    scenario(&Setup::new(), |bench| {
        let taken = bench.lab.host.inside(|| TcpListener::bind((HOST, 8006)))?;
        let _udp = bench.lab.host.inside(|| UdpSocket::bind((HOST, 8006)))?;
        let pid = std::process::id();
        for flag in [["-t", "8006"], ["-u", "8006"]] {
            let words = refusal(bench, &flag, false)?;
            ensure!(words.contains(&format!("process {pid} (")) && words.contains("of user 0"), "{words}");
        }
        // Another user sees whose it is, and not which process.
        let words = refusal(bench, &["--publish", "8006:80"], true)?;
        ensure!(words.contains("of user 0") && !words.contains(&pid.to_string()), "{words}");
        drop(taken);
        let words = refusal(bench, &["--publish", "80:80"], true)?;
        for part in ["CAP_NET_BIND_SERVICE", "ports below 1024", "ip_unprivileged_port_start=80"] {
            ensure!(words.contains(part), "{words}");
        }
        let words = refusal(bench, &["--publish", "%nonesuch:8006:80"], true)?;
        ensure!(words.contains("no such interface"), "{words}");
        let words = refusal(bench, &["--publish", "198.51.100.7:8006:80"], true)?;
        ensure!(words.contains("no interface of this host has the address"), "{words}");
        Ok(())
    });
}

/// Sends `count` bytes to the digest behind `port`, and checks what arrived.
fn upload(world: &Netns, port: u16, count: u64) -> Outcome {
    let mut digest = connect(world, (HOST, port))?;
    pattern::send(8, count, &mut digest)?;
    digest.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    (&digest).take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    let want = format!("{} {count}\n", pattern::sha256(8, count));
    ensure!(answer == want, "upload of {count} bytes: {answer:?}");
    Ok(())
}

#[test]
fn a_thousand_ports_come_and_go_under_traffic_and_leave_no_descriptor() {
    for setup in engines() {
        with_control(setup.vunet(&["-t", "8004:9004"]), |bench, api| {
            let _server = serve_in_guest(bench)?;
            change_ports_under_traffic(api, &bench.lab.world, &[bench.vunet.process.pid()], 1000)
        });
    }
}

/// Publishes and removes ports `times` times while bytes go to the digest behind port 8004, which alone is left; no process of
/// `pids` has more descriptors after it.
pub(crate) fn change_ports_under_traffic(api: &mut Api, world: &Netns, pids: &[u32], times: u16) -> Outcome {
    let count = || pids.iter().map(|pid| descriptors(*pid)).collect::<Result<Vec<_>, _>>();
    let (before, over) = (count()?, AtomicBool::new(false));
    std::thread::scope(|scope| -> Outcome {
        let traffic = scope.spawn(|| -> Result<u32, Failure> {
            let mut rounds = 0;
            while !over.load(Ordering::Relaxed) {
                upload(world, 8004, 4 * MIB)?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let changes = change_ports(api, world, times);
        over.store(true, Ordering::Relaxed);
        let rounds = traffic.join().expect("it does not panic")?;
        changes?;
        ensure!(rounds > 0, "there was no traffic");
        Ok(())
    })?;
    let (_, list) = api.ask("GET", "/v1/ports", None)?;
    ensure!(list["ports"].as_array().is_some_and(|ports| ports.len() == 1), "{list}");
    // What has ended is closed by now, and one is the API's own connection.
    std::thread::sleep(Duration::from_millis(200));
    let after = count()?;
    let grown = before.iter().zip(&after).any(|(before, after)| *after > before + 8);
    ensure!(!grown, "{before:?} descriptors became {after:?}");
    Ok(())
}

/// Publishes and removes ports, and uses some of them.
fn change_ports(api: &mut Api, world: &Netns, times: u16) -> Outcome {
    for n in 0..times {
        let protocol = if n % 4 == 3 { "udp" } else { "tcp" };
        let host_port = 20_000 + n % 50;
        let port = api.publish(&format!("{protocol}:{host_port}:9006"))?;
        ensure!(port["host_port"] == host_port, "{port}");
        if n % 100 == 0 {
            let peer = seen(world, (HOST, host_port))?;
            ensure!(peer.ip() == WORLD, "the guest saw {peer}");
        }
        api.unpublish(&port["id"], n % 2 == 0)?;
    }
    Ok(())
}

#[test]
fn open_connections_end_with_their_port_unless_they_are_to_be_kept() {
    engines().into_iter().for_each(connections_end_or_are_kept);
}

fn connections_end_or_are_kept(setup: Setup) {
    with_control(setup, |bench, api| {
        let _server = serve_in_guest(bench)?;
        let world = &bench.lab.world;
        for close in [false, true] {
            let port = api.publish("8003:9003")?;
            let mut echo = connect(world, (HOST, 8003))?;
            let mut got = [0; 5];
            echo.write_all(b"hello")?;
            echo.read_exact(&mut got)?;
            ensure!(api.unpublish(&port["id"], close)? == u64::from(close), "how many were reset");
            // Behind an address on a link nobody answers.
            let to = SocketAddr::from((HOST, 8003));
            let gone = world.inside(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)));
            ensure!(gone.is_err(), "it takes clients still");
            // A reset is told once, to the first call.
            let end = echo.write_all(b"again").and_then(|()| echo.read_exact(&mut got));
            let end = end.map_err(|error| error.kind());
            let expected = if close { Err(ErrorKind::ConnectionReset) } else { Ok(()) };
            ensure!(end == expected, "with close={close}: {end:?}");
        }
        Ok(())
    });
}

#[test]
fn both_ends_of_an_idle_connection_are_told_of_the_end_of_its_port_by_either_engine() {
    for setup in engines() {
        with_control(setup, |bench, api| {
            let listener = bench.lab.guest.inside(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7003)))?;
            for said in [&b""[..], b"hello"] {
                let port = api.publish("8003:7003")?;
                let mut client = connect(&bench.lab.world, (HOST, 8003))?;
                let (mut guest, _) = listener.accept()?;
                guest.set_read_timeout(Some(PATIENCE))?;
                client.write_all(said)?;
                guest.read_exact(&mut vec![0; said.len()])?;
                ensure!(api.unpublish(&port["id"], true)? == 1, "how many were reset");
                for end in [&mut client, &mut guest] {
                    let told = end.read(&mut [0; 1]).map_err(|error| error.kind());
                    ensure!(told == Err(ErrorKind::ConnectionReset), "{told:?}");
                }
            }
            Ok(())
        });
    }
}

#[test]
fn ports_are_picked_listed_refused_and_removed_by_the_api_and_by_ctl() {
    with_control(Setup::new().vunet(&["--publish", "8006:9006"]), |bench, api| {
        let _server = serve_in_guest(bench)?;
        let picked = api.publish("0:9006")?;
        let number = picked["host_port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
        ensure!(seen(&bench.lab.world, (HOST, number))?.ip() == WORLD, "{picked}");
        let taken = bench.lab.host.inside(|| TcpListener::bind((HOST, 8009)))?;
        let (status, answer) = api.ask("POST", "/v1/ports", Some(&json!({ "publish": "8008-8009:1-2" })))?;
        let owner = &answer["error"]["owner"];
        ensure!(
            status == 409 && owner["uid"] == 0 && owner["pid"] == std::process::id(),
            "{status} {answer}"
        );
        drop(taken);
        for (publish, status) in
            [("8006:1", 409), ("nonsense", 400), ("198.51.100.7:80:80", 400), ("[::]:1:1", 400)]
        {
            let (got, answer) = api.ask("POST", "/v1/ports", Some(&json!({ "publish": publish })))?;
            ensure!(got == status, "{publish}: {got} {answer}");
        }
        let (status, answer) = api.ask("DELETE", "/v1/ports/99", None)?;
        ensure!(status == 404, "{status} {answer}");
        ctl(bench, api, number)
    });
}

/// `vunet ctl` with `words`.
fn run_ctl(bench: &Bench, control: &str, words: &[&str]) -> Result<String, Failure> {
    let binary = vunet_binary().display().to_string();
    let command = [&[&*binary, "ctl", "--control", control], words].concat();
    Ok(bench.lab.host.run(&command, PATIENCE)?.stdout)
}

fn ctl(bench: &Bench, api: &mut Api, picked: u16) -> Outcome {
    let peer = api.stream.get_ref().peer_addr()?;
    let Some(path) = peer.as_pathname() else { fail!("the control socket has no name") };
    let control = path.display().to_string();
    let made = run_ctl(bench, &control, &["publish", "8100-8101:9006-9007", "udp:127.0.0.1:8100:9006"])?;
    for part in ["0.0.0.0:8100", "0.0.0.0:8101", "127.0.0.1:8100", "udp"] {
        ensure!(made.contains(part), "{made}");
    }
    ensure!(seen(&bench.lab.world, (HOST, 8100))?.ip() == WORLD, "it is not published");
    let list = run_ctl(bench, &control, &["ports"])?;
    ensure!(list.lines().count() == 6, "{list}");
    run_ctl(bench, &control, &["unpublish", "tcp:8100"])?;
    run_ctl(bench, &control, &["unpublish", "udp:127.0.0.1:8100:9006", &format!("tcp:{picked}")])?;
    ensure!(connect(&bench.lab.world, (HOST, 8100)).is_err(), "it is published still");
    let list = run_ctl(bench, &control, &["ports", "--json"])?;
    let list: Value = serde_json::from_str(&list)?;
    let left: Vec<&str> =
        list["ports"].as_array().into_iter().flatten().filter_map(|port| port["publish"].as_str()).collect();
    ensure!(left == ["tcp:0.0.0.0:8006:9006", "tcp:0.0.0.0:8101:9007"], "{left:?}");
    Ok(())
}

/// Kilobytes of the process that are resident.
fn resident_kb(pid: u32) -> Result<u64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0))
}

#[test]
fn four_thousand_ports_cost_the_process_little_memory() {
    let mut resident = Vec::new();
    for range in ["20000:20000", "20000-23999:20000-23999"] {
        bare(&Setup::new().vunet(&["--publish", range]), |bench| {
            std::thread::sleep(Duration::from_millis(300));
            resident.push(resident_kb(bench.vunet.process.pid())?);
            Ok(())
        });
    }
    if let [one, many] = resident[..] {
        println!("resident kB with 1 port: {one}, with 4000: {many}");
        // Every worker knows of every port.
        assert!(many < one + 8192, "one port: {one} kB, 4000 ports: {many} kB");
    }
}
