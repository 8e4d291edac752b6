//! Published ports: the world reaches servers in the guest.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use vunet_integration::lab::{GATEWAY, GUEST, HOST, Netns, Process, SHORT, WORLD, run};
use vunet_integration::world::pattern;

use crate::bench::{
    ANSWER_BYTES_MAX, Bench, Failure, MIB, PATIENCE, Setup, ensure, integration_binary, scenario,
};

const PUBLISH: [&str; 8] = [
    "--publish",
    "tcp:8006:9006",
    "--publish",
    "udp:8006:9006",
    "--publish",
    "tcp:8003-8004:9003-9004",
    "--publish",
    "tcp:127.0.0.1:7006:9006",
];

pub(crate) fn serve_in_guest(bench: &Bench) -> Result<Process, Failure> {
    let binary = integration_binary().display().to_string();
    let server = bench.lab.guest.spawn(&[&binary, "world-server", "--bind", &GUEST.to_string()])?;
    server.wait_line(SHORT, "servers in the guest", |line| line.contains("ready"))?;
    Ok(server)
}

pub(crate) fn connect(from: &Netns, to: (Ipv4Addr, u16)) -> Result<TcpStream, Failure> {
    let addr = SocketAddr::from(to);
    let stream = from
        .inside(|| TcpStream::connect_timeout(&addr, PATIENCE))
        .map_err(|e| Failure(format!("connect to {addr}: {e}")))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The address the guest's server sees for a client in `from` that connects to `to`.
pub(crate) fn seen(from: &Netns, to: (Ipv4Addr, u16)) -> Result<SocketAddr, Failure> {
    let mut text = String::new();
    connect(from, to)?.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text.trim().parse()?)
}

#[test]
fn a_tcp_client_is_seen_with_its_own_address() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let _server = serve_in_guest(bench)?;
        let peer = seen(&bench.lab.world, (HOST, 8006))?;
        ensure!(peer.ip() == WORLD, "the guest saw {peer} for a client at {WORLD}");
        let peer = seen(&bench.lab.host, (Ipv4Addr::LOCALHOST, 7006))?;
        ensure!(peer.ip() == GATEWAY, "the guest saw {peer} for a client on the host's loopback");
        let refused = seen(&bench.lab.world, (HOST, 7006));
        ensure!(refused.is_err(), "a port published on loopback is open to the world");
        Ok(())
    });
}

#[test]
fn a_udp_client_is_seen_with_its_own_address() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let _server = serve_in_guest(bench)?;
        let socket = bench.lab.world.inside(|| UdpSocket::bind((WORLD, 0)))?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.connect((HOST, 8006))?;
        socket.send(b"who am I?")?;
        let mut text = [0; 64];
        let len = socket.recv(&mut text).map_err(|e| Failure(format!("no answer over UDP: {e}")))?;
        let peer: SocketAddr = String::from_utf8_lossy(&text[..len]).parse()?;
        ensure!(peer == socket.local_addr()?, "the guest saw {peer} for {:?}", socket.local_addr());
        Ok(())
    });
}

#[test]
fn a_published_range_carries_bytes_both_ways() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let _server = serve_in_guest(bench)?;
        let mut echo = connect(&bench.lab.world, (HOST, 8003))?;
        echo.write_all(b"hello")?;
        let mut got = [0; 5];
        echo.read_exact(&mut got)?;
        ensure!(&got == b"hello", "{got:?}");
        for count in [0, 1, 16 * MIB] {
            let mut digest = connect(&bench.lab.world, (HOST, 8004))?;
            pattern::send(8, count, &mut digest)?;
            digest.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            (&digest).take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
            let want = format!("{} {count}\n", pattern::sha256(8, count));
            ensure!(answer == want, "upload of {count} into the guest: {answer:?}");
        }
        Ok(())
    });
}

#[test]
fn a_port_the_guest_does_not_serve_is_no_open_port() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let stream = match connect(&bench.lab.world, (HOST, 8006)) {
            Err(_) => return Ok(()),
            Ok(stream) => stream,
        };
        let mut text = String::new();
        let end = (&stream).take(ANSWER_BYTES_MAX).read_to_string(&mut text);
        ensure!(end.is_err(), "a port nobody serves gave {text:?} and an orderly end");
        Ok(())
    });
}

#[test]
fn a_udp_client_is_answered_from_the_address_it_sent_to() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let _server = serve_in_guest(bench)?;
        bench.lab.host.run(&["ip", "addr", "add", "192.0.2.9/24", "dev", "p0"], PATIENCE)?;
        for address in [Ipv4Addr::new(192, 0, 2, 9), HOST, Ipv4Addr::new(192, 0, 2, 9)] {
            let socket = bench.lab.world.inside(|| UdpSocket::bind((WORLD, 0)))?;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            // Connected, it takes answers from nowhere else.
            socket.connect((address, 8006))?;
            for _ in 0..3 {
                socket.send(b"who am I?")?;
                let mut text = [0; 64];
                let len =
                    socket.recv(&mut text).map_err(|e| Failure(format!("no answer of {address}: {e}")))?;
                let peer: SocketAddr = String::from_utf8_lossy(&text[..len]).parse()?;
                ensure!(peer == socket.local_addr()?, "the guest saw {peer}");
            }
        }
        Ok(())
    });
}

#[test]
fn what_the_guest_sends_from_a_published_port_leaves_from_there() {
    scenario(&Setup::new().vunet(&PUBLISH), |bench| {
        let guest = bench.lab.guest.inside(|| UdpSocket::bind(("0.0.0.0", 9006)))?;
        let world = bench.lab.world.inside(|| UdpSocket::bind((WORLD, 9100)))?;
        world.set_read_timeout(Some(PATIENCE))?;
        for _ in 0..3 {
            guest.send_to(b"hello", (WORLD, 9100))?;
            let (_, from) = world.recv_from(&mut [0; 10])?;
            ensure!(from == SocketAddr::from((HOST, 8006)), "it came from {from}");
        }
        Ok(())
    });
}

#[test]
fn a_client_no_descriptor_is_left_for_is_served_once_there_is_one() {
    scenario(&Setup::new().tools(&["prlimit"]).vunet(&PUBLISH), |bench| {
        let _server = serve_in_guest(bench)?;
        let pid = bench.vunet.process.pid().to_string();
        let files = |limit: &str| run(&["prlimit", "--pid", &pid, &format!("--nofile={limit}")], PATIENCE);
        // Those it has stay; no further one is to be had.
        files("3:")?;
        let mut stream = connect(&bench.lab.world, (HOST, 8006))?;
        stream.set_read_timeout(Some(Duration::from_millis(500)))?;
        let early = stream.read(&mut [0; 1]);
        ensure!(
            early.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock),
            "served without a descriptor, or not kept waiting: {early:?}"
        );
        files("1024:")?;
        // Nobody else comes who could wake it.
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
        let peer: SocketAddr = text.trim().parse()?;
        ensure!(peer.ip() == WORLD, "the guest saw {peer} for a client at {WORLD}");
        Ok(())
    });
}
