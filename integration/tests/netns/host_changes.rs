//! The host's network changes while the guest's connections live.

use std::io::{self, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vunet_integration::lab::{BackendOptions, DOMAIN, GATEWAY, HOST, HOST_TOO, Lab, WORLD, WORLD_TOO};
use vunet_integration::world::ports;

use crate::bench::{ANSWER_BYTES_MAX, Bench, Failure, Outcome, PATIENCE, Setup, ensure, fail, scenario};

/// Sends a line through an echo and reads it back.
fn echo(stream: &mut TcpStream, line: &[u8]) -> Outcome {
    stream.write_all(line)?;
    let mut back = vec![0; line.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == line, "{back:?} instead of {line:?}");
    Ok(())
}

/// The address the world sees a new connection of the guest come from.
fn seen_by_tcp(bench: &Bench) -> Result<String, Failure> {
    let mut text = String::new();
    bench.connect_world(ports::PEER)?.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text.trim().rsplit_once(':').map(|(ip, _)| ip.to_owned()).unwrap_or(text))
}

fn udp(bench: &Bench, port: u16) -> Result<UdpSocket, Failure> {
    let socket = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
    socket.connect((WORLD, port))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    Ok(socket)
}

/// The address and port the world sees the guest's socket come from; asked again if lost.
fn seen_by_udp(socket: &UdpSocket) -> Result<(String, String), Failure> {
    let mut answer = [0; 100];
    for _ in 0..20 {
        socket.send(b"who")?;
        match socket.recv(&mut answer) {
            Ok(len) => {
                let text = String::from_utf8_lossy(&answer[..len]).into_owned();
                let Some((ip, port)) = text.rsplit_once(':') else { fail!("{text:?}") };
                return Ok((ip.to_owned(), port.to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    fail!("nobody answers")
}

/// Bytes that left the host by an interface.
fn sent_by(lab: &Lab, interface: &str) -> Result<u64, Failure> {
    let file = format!("/sys/class/net/{interface}/statistics/tx_bytes");
    Ok(lab.host.run(&["cat", &file], PATIENCE)?.stdout.trim().parse()?)
}

fn await_network_change(bench: &Bench) -> Outcome {
    let told = |line: &str| line.contains("the host's network changed");
    bench.vunet.process.wait_error(PATIENCE, "news of the network", told)?;
    Ok(())
}

#[test]
fn flows_live_on_over_another_route_and_new_ones_take_it() {
    scenario(&Setup::new(), |bench| {
        let lab = &bench.lab;
        let mut old = bench.connect_world(ports::ECHO)?;
        echo(&mut old, b"before")?;
        let socket = udp(bench, ports::PEER)?;
        let (before, port) = seen_by_udp(&socket)?;
        ensure!(before == HOST.to_string() && seen_by_tcp(bench)? == before, "from {before}");
        lab.link_too()?;
        lab.ip(&lab.world, &format!("route add {HOST}/32 via {HOST_TOO} dev e1"))?;
        lab.ip(&lab.host, &format!("route add {WORLD}/32 via {WORLD_TOO} dev p1"))?;
        await_network_change(bench)?;
        let by_old_way = sent_by(lab, "p0")?;
        echo(&mut old, &[7; 50_000])?;
        ensure!(sent_by(lab, "p1")? > 50_000, "the old connection does not take the new way");
        ensure!(sent_by(lab, "p0")? < by_old_way + 10_000, "the old connection takes the old way");
        let (after, same_port) = seen_by_udp(&socket)?;
        ensure!(after == HOST_TOO.to_string(), "the next datagram came from {after}");
        ensure!(same_port == port, "from port {same_port} and not {port}");
        ensure!(seen_by_tcp(bench)? == after, "a new connection came from elsewhere");
        Ok(())
    });
}

#[test]
fn flows_live_while_the_interface_is_down_and_up_again() {
    scenario(&Setup::new(), |bench| {
        let lab = &bench.lab;
        let mut stream = bench.connect_world(ports::ECHO)?;
        echo(&mut stream, b"before")?;
        let socket = udp(bench, ports::PEER)?;
        let before = seen_by_udp(&socket)?;
        lab.ip(&lab.host, "link set p0 down")?;
        stream.write_all(b"while it is down")?;
        sleep(Duration::from_millis(700));
        lab.ip(&lab.host, "link set p0 up")?;
        let mut back = [0; 16];
        stream.read_exact(&mut back)?;
        ensure!(&back == b"while it is down", "{back:?}");
        ensure!(seen_by_udp(&socket)? == before, "the datagrams' way did not come back");
        let answer = bench.in_guest(&[
            "dig",
            "+short",
            "+tries=5",
            &format!("@{GATEWAY}"),
            &format!("www.{DOMAIN}"),
        ])?;
        ensure!(answer.trim() == WORLD.to_string(), "{answer:?}");
        Ok(())
    });
}

#[test]
fn a_connection_from_an_address_that_went_is_reset_and_datagrams_go_on_from_the_new_one() {
    scenario(&Setup::new(), |bench| {
        let lab = &bench.lab;
        // Idle, so that nothing but the reset could end it.
        let mut old = bench.connect_world(ports::ECHO)?;
        echo(&mut old, b"before")?;
        let socket = udp(bench, ports::PEER)?;
        let (_, port) = seen_by_udp(&socket)?;
        lab.ip(&lab.host, &format!("addr del {HOST}/24 dev p0"))?;
        lab.ip(&lab.host, "addr add 192.0.2.9/24 dev p0")?;
        let (after, same_port) = seen_by_udp(&socket)?;
        ensure!((&*after, &same_port) == ("192.0.2.9", &port), "{after}:{same_port}");
        ensure!(seen_by_tcp(bench)? == "192.0.2.9", "a new connection came from elsewhere");
        let ended = old.read(&mut [0]);
        let is_reset = ended.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset);
        ensure!(is_reset, "{ended:?}");
        let said = |line: &str| line.contains("an address the host no longer has");
        bench.vunet.process.wait_error(PATIENCE, "a word about it", said)?;
        Ok(())
    });
}

#[test]
fn a_connection_whose_address_comes_back_within_the_grace_lives() {
    scenario(&Setup::new(), |bench| {
        let lab = &bench.lab;
        let mut stream = bench.connect_world(ports::ECHO)?;
        echo(&mut stream, b"before")?;
        lab.ip(&lab.host, &format!("addr del {HOST}/24 dev p0"))?;
        sleep(Duration::from_secs(1));
        lab.ip(&lab.host, &format!("addr add {HOST}/24 dev p0"))?;
        // Past the grace: the bytes under way are the kernel's to send again.
        sleep(Duration::from_secs(6));
        echo(&mut stream, b"after")
    });
}

#[test]
fn a_change_of_the_network_forgets_the_answers_kept() {
    scenario(&Setup::new(), |bench| {
        let lab = &bench.lab;
        let www = format!("www.{DOMAIN}");
        let ask = || bench.in_guest(&["dig", "+short", &format!("@{GATEWAY}"), &www]);
        let before = lab.asked_for(&www);
        ask()?;
        ask()?;
        ensure!(lab.asked_for(&www) == before + 1, "it is not kept");
        lab.ip(&lab.host, "route add 10.99.0.0/16 via 192.0.2.2")?;
        let deadline = Instant::now() + PATIENCE;
        while lab.asked_for(&www) == before + 1 {
            ensure!(Instant::now() < deadline, "answers of before are given on");
            ask()?;
            sleep(Duration::from_millis(50));
        }
        Ok(())
    });
}

#[test]
fn a_host_that_has_no_network_at_the_start_gets_one_later() {
    scenario(&Setup::new(), |bench| {
        // A vunet that starts before the host is on any network, and before anyone wrote resolv.conf.
        bench.detach()?;
        bench.vunet.process.stop();
        bench.lab.ip(&bench.lab.host, "link set p0 down")?;
        bench.lab.ip(&bench.lab.host, &format!("addr del {HOST}/24 dev p0"))?;
        bench.lab.host.set_resolv_conf("# nobody yet\n")?;
        bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
        bench.attach(&[])?;
        bench.lease()?;
        let refused = bench.connect((WORLD, ports::ECHO), PATIENCE);
        ensure!(refused.is_err(), "there is no network, and yet a connection");
        let www = format!("www.{DOMAIN}");
        let server = format!("@{GATEWAY}");
        let output = bench.in_guest(&["dig", &server, &www])?;
        ensure!(output.contains("status: SERVFAIL"), "{output}");
        bench.lab.ip(&bench.lab.host, &format!("addr add {HOST}/24 dev p0"))?;
        bench.lab.ip(&bench.lab.host, "link set p0 up")?;
        bench.lab.host.set_resolver(&WORLD.to_string())?;
        let deadline = Instant::now() + PATIENCE;
        while bench.in_guest(&["dig", "+short", &server, &www])?.trim() != WORLD.to_string() {
            ensure!(Instant::now() < deadline, "the resolver that came later is not asked");
            sleep(Duration::from_millis(50));
        }
        ensure!(seen_by_tcp(bench)? == HOST.to_string(), "a new connection came from elsewhere");
        Ok(())
    });
}

#[test]
fn a_network_the_guests_subnet_hides_is_named() {
    scenario(&Setup::new(), |bench| {
        bench.lab.ip(&bench.lab.host, "route add 10.0.0.0/8 via 192.0.2.2")?;
        let named = |line: &str| line.contains("cannot reach this network") && line.contains("10.0.0.0/8");
        bench.vunet.process.wait_error(PATIENCE, "the hidden network", named)?;
        Ok(())
    });
}
