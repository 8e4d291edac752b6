//! UDP's mapping, filtering, ports and hairpins with real sockets (RFC 4787), and an exchange like SIP's.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use vunet_integration::lab::{GUEST, HOST, WORLD};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, Outcome, PATIENCE, Setup, ensure, scenario};

/// A second address of the world's.
const WORLD_TOO: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

fn guest_socket(bench: &Bench, port: u16) -> Result<UdpSocket, Failure> {
    let socket = bench.lab.guest.inside(|| UdpSocket::bind((GUEST, port)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn world_socket(bench: &Bench, addr: Ipv4Addr, port: u16) -> Result<UdpSocket, Failure> {
    let socket = bench.lab.world.inside(|| UdpSocket::bind((addr, port)))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The address the far end `to` sees the guest's socket under.
fn seen_by(guest: &UdpSocket, to: &UdpSocket) -> Result<SocketAddr, Failure> {
    guest.send_to(b"who am I?", to.local_addr()?)?;
    Ok(to.recv_from(&mut [0; 32])?.1)
}

/// Whether what `from` sends to `to` reaches the guest's socket.
fn comes_in(from: &UdpSocket, to: SocketAddr, guest: &UdpSocket) -> Result<bool, Failure> {
    from.send_to(b"hello", to)?;
    guest.set_read_timeout(Some(Duration::from_millis(500)))?;
    match guest.recv_from(&mut [0; 32]) {
        Ok((5, seen)) if seen == from.local_addr()? => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        other => Err(Failure(format!("the guest got {other:?}"))),
    }
}

/// One guest port and four ends of the world: two ports of each of two addresses.
fn ends(bench: &Bench) -> Result<[UdpSocket; 4], Failure> {
    bench.lab.world.run(&["ip", "addr", "add", "192.0.2.3/24", "dev", "e0"], PATIENCE)?;
    let open = |(addr, port)| world_socket(bench, addr, port);
    let [a, b, c, d] = [(WORLD, 9100), (WORLD, 9101), (WORLD_TOO, 9100), (WORLD_TOO, 9101)].map(open);
    Ok([a?, b?, c?, d?])
}

#[test]
fn each_filtering_lets_in_whom_it_says() {
    // Of the four ends the guest speaks to the first.
    for (filtering, expected) in [
        (None, [true, false, false, false]),
        (Some("address-and-port-dependent"), [true, false, false, false]),
        (Some("address-dependent"), [true, true, false, false]),
        (Some("endpoint-independent"), [true, true, true, true]),
    ] {
        let args: Vec<&str> = filtering.into_iter().flat_map(|name| ["--udp-filtering", name]).collect();
        scenario(&Setup::new().vunet(&args), |bench| {
            let ends = ends(bench)?;
            let guest = guest_socket(bench, 4000)?;
            let outside = seen_by(&guest, &ends[0])?;
            for (end, expected) in ends.iter().zip(expected) {
                let got = comes_in(end, outside, &guest)?;
                ensure!(got == expected, "{filtering:?}: {:?} came in: {got}", end.local_addr());
            }
            Ok(())
        });
    }
}

#[test]
fn each_mapping_gives_the_ports_it_says() {
    for (mapping, shared) in
        [(None, true), (Some("endpoint-independent"), true), (Some("address-and-port-dependent"), false)]
    {
        let args: Vec<&str> = mapping.into_iter().flat_map(|name| ["--udp-mapping", name]).collect();
        scenario(&Setup::new().vunet(&args), |bench| {
            let ends = ends(bench)?;
            let guest = guest_socket(bench, 4000)?;
            let mut outside = Vec::new();
            for _ in 0..2 {
                for end in &ends {
                    outside.push(seen_by(&guest, end)?);
                }
            }
            ensure!(outside[..4] == outside[4..], "{mapping:?}: the ports changed: {outside:?}");
            outside.sort_unstable();
            outside.dedup();
            let count = if shared { 1 } else { 4 };
            ensure!(outside.len() == count, "{mapping:?}: {outside:?}");
            ensure!(outside.iter().all(|end| end.ip() == HOST), "{outside:?}");
            // With a mapping of its own each end answers through it.
            ensure!(comes_in(&ends[3], seen_by(&guest, &ends[3])?, &guest)?, "no answer came");
            Ok(())
        });
    }
}

#[test]
fn the_guests_port_is_kept_where_it_is_free() {
    scenario(&Setup::new(), |bench| {
        let world = world_socket(bench, WORLD, 9100)?;
        let taken = bench.lab.host.inside(|| UdpSocket::bind("0.0.0.0:5061"))?;
        let port =
            |own: u16| -> Result<u16, Failure> { Ok(seen_by(&guest_socket(bench, own)?, &world)?.port()) };
        for own in [5060, 1024, 40_000, 65_535] {
            let outside = port(own)?;
            ensure!(outside == own, "port {own} became {outside}");
        }
        let outside = port(5061)?;
        ensure!(outside != 5061 && outside % 2 == 1, "the taken port 5061 became {outside}");
        let outside = port(123)?;
        ensure!(outside >= 1024, "the privileged port 123 became {outside}");
        drop(taken);
        Ok(())
    });
}

fn hairpin(bench: &Bench, host: Ipv4Addr) -> Outcome {
    let (inside, server) = (guest_socket(bench, 4000)?, guest_socket(bench, 9006)?);
    inside.send_to(b"ask", (host, 8006))?;
    let mut got = [0; 32];
    let (len, client) = server.recv_from(&mut got)?;
    ensure!(&got[..len] == b"ask" && client.ip() == host, "the server got {len} bytes of {client}");
    server.send_to(b"answer", client)?;
    let (len, from) = inside.recv_from(&mut got)?;
    let published = SocketAddr::from((host, 8006));
    ensure!(&got[..len] == b"answer" && from == published, "{len} bytes of {from}");
    Ok(())
}

#[test]
fn a_published_port_is_reached_from_inside() {
    scenario(&Setup::new().vunet(&["--publish", "udp:8006:9006", "--publish", "tcp:8007:9007"]), |bench| {
        hairpin(bench, HOST)?;
        // The same over TCP, to a server in the guest.
        let server = bench.lab.guest.inside(|| std::net::TcpListener::bind((GUEST, 9007)))?;
        let client = bench.connect((HOST, 8007), PATIENCE)?;
        let (accepted, peer) = server.accept()?;
        ensure!(peer.ip() == HOST, "the server saw {peer}");
        std::io::Write::write_all(&mut &client, b"over TCP")?;
        let mut got = [0; 8];
        std::io::Read::read_exact(&mut &accepted, &mut got)?;
        ensure!(&got == b"over TCP", "{got:?}");
        // What is not published stays the host's own.
        let other = bench.connect((HOST, 8008), Duration::from_secs(2));
        ensure!(other.is_err(), "the host's own port 8008 was reached");
        Ok(())
    });
}

/// Both ends speak first and at any time, on one port each, and media flow on another pair of ports: what a
/// call over SIP and RTP does.
#[test]
fn a_call_goes_on_both_ways_on_its_two_ports() {
    scenario(&Setup::new(), |bench| {
        let signals = (guest_socket(bench, 5060)?, world_socket(bench, WORLD, 5060)?);
        let media = (guest_socket(bench, 16_384)?, world_socket(bench, WORLD, 20_000)?);
        signals.0.send_to(b"INVITE", (WORLD, 5060))?;
        let mut got = [0; 200];
        let (len, caller) = signals.1.recv_from(&mut got)?;
        ensure!(&got[..len] == b"INVITE", "{len} bytes");
        ensure!(caller == SocketAddr::from((HOST, 5060)), "the caller is {caller}");
        signals.1.send_to(b"200 OK", caller)?;
        let (len, _) = signals.0.recv_from(&mut got)?;
        ensure!(&got[..len] == b"200 OK", "{len} bytes");
        media.0.send_to(&[0xff; 172], (WORLD, 20_000))?;
        let (_, caller_media) = media.1.recv_from(&mut got)?;
        ensure!(caller_media.port() == 16_384, "media comes from {caller_media}");
        for round in 0..200u8 {
            media.0.send_to(&[round; 172], (WORLD, 20_000))?;
            media.1.send_to(&[!round; 172], caller_media)?;
            let (len, from) = media.1.recv_from(&mut got)?;
            ensure!(len == 172 && got[0] == round && from == caller_media, "{round}: {len} bytes of {from}");
            let (len, from) = media.0.recv_from(&mut got)?;
            ensure!(len == 172 && got[0] == !round, "{round}: {len} bytes of {from}");
        }
        // The far end hangs up: the guest is spoken to, not asked.
        signals.1.send_to(b"BYE", caller)?;
        let (len, _) = signals.0.recv_from(&mut got)?;
        ensure!(&got[..len] == b"BYE", "{len} bytes");
        signals.0.send_to(b"200 OK", (WORLD, 5060))?;
        let (len, from) = signals.1.recv_from(&mut got)?;
        ensure!(&got[..len] == b"200 OK" && from == caller, "{len} bytes of {from}");
        Ok(())
    });
}

/// A client that asks from the privileged port servers answer to, as NTP's do.
#[test]
fn a_question_from_port_123_is_answered_there() {
    scenario(&Setup::new(), |bench| {
        let guest = guest_socket(bench, 123)?;
        for _ in 0..3 {
            let mut question = [0u8; 48];
            question[0] = 0x23;
            guest.send_to(&question, (WORLD, ports::ECHO))?;
            let (len, from) = guest.recv_from(&mut [0; 100])?;
            ensure!(len == 48 && from == SocketAddr::from((WORLD, ports::ECHO)), "{len} bytes of {from}");
        }
        Ok(())
    });
}
