//! Which destinations the guest may reach.

use std::net::Ipv4Addr;
use std::time::Duration;

use vunet_integration::lab::frame::{Answer, Probe, probe};
use vunet_integration::lab::{GATEWAY, GUEST, HOST, SHORT, WORLD};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, Outcome, Setup, ensure, fail, integration_binary, scenario};

/// The gateway's MAC address.
const GATEWAY_MAC: [u8; 6] = [0x02, 0xab, 0xcd, 0, 0, 1];

fn guest_mac(bench: &Bench) -> Result<[u8; 6], Failure> {
    let text = bench.front_end().ready["mac"].as_str().unwrap_or_default().to_owned();
    let octets: Vec<u8> = text.split(':').filter_map(|part| u8::from_str_radix(part, 16).ok()).collect();
    octets.try_into().map_err(|_| Failure(format!("the guest's MAC address is {text:?}")))
}

fn ask(bench: &Bench, what: Probe, to: Ipv4Addr) -> Result<Option<Answer>, Failure> {
    let from = (guest_mac(bench)?, GUEST);
    Ok(probe(&bench.lab.guest, what, from, (GATEWAY_MAC, to), Duration::from_millis(400))?)
}

/// Counts what the host sends to the destinations in question, on any of its interfaces.
fn count_forbidden(bench: &Bench) -> Outcome {
    let rules = "add table inet watch
        add chain inet watch out { type filter hook output priority 0; }
        add rule inet watch out ip daddr { 0.0.0.0/8, 127.0.0.0/8, 224.0.0.0/4, 240.0.0.0/4, 10.0.2.0/24 } \
        meta l4proto { tcp, udp, icmp } counter";
    let file = bench.lab.dir().join("watch.nft");
    std::fs::write(&file, rules)?;
    bench.lab.host.run(&["nft", "-f", &file.display().to_string()], SHORT)?;
    Ok(())
}

fn forbidden(bench: &Bench) -> Result<String, Failure> {
    let rules = bench.lab.host.run(&["nft", "list", "table", "inet", "watch"], SHORT)?.stdout;
    let line = rules.lines().find(|line| line.contains("counter packets")).unwrap_or_default();
    Ok(line.split("counter ").nth(1).unwrap_or_default().trim().to_owned())
}

#[test]
fn forbidden_destinations_never_reach_a_socket() {
    scenario(&Setup::new().tools(&["nft"]), |bench| {
        // Servers on every address of the host, so that a leak would be answered.
        let binary = integration_binary().display().to_string();
        let local = bench.lab.host.spawn(&[&binary, "world-server", "--bind", "0.0.0.0"])?;
        local.wait_line(SHORT, "servers on the host", |line| line.contains("ready"))?;
        count_forbidden(bench)?;
        let ok = ask(bench, Probe::TcpSyn(ports::ECHO), WORLD)?;
        ensure!(ok == Some(Answer::SynAck), "a probe to the world was answered with {ok:?}");
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "224.0.0.1",
            "239.1.2.3",
            "240.0.0.1",
            "255.255.255.255",
            "10.0.2.0",
            "10.0.2.77",
            "10.0.2.255",
        ] {
            let to: Ipv4Addr = text.parse()?;
            for what in [
                Probe::TcpSyn(ports::ECHO),
                Probe::TcpStray(ports::ECHO),
                Probe::Udp(ports::ECHO),
                Probe::Echo,
            ] {
                let answer = ask(bench, what, to)?;
                println!("{what:?} to {to}: {answer:?}");
                let accepted = matches!(answer, Some(Answer::SynAck | Answer::Datagram | Answer::Icmp(0, _)));
                ensure!(!accepted, "{what:?} to {to} was answered with {answer:?}");
            }
        }
        let sent = forbidden(bench)?;
        ensure!(sent == "packets 0 bytes 0", "the host sent {sent} to forbidden destinations");
        Ok(())
    });
}

#[test]
fn the_gateway_is_not_the_hosts_loopback() {
    scenario(&Setup::new(), |bench| {
        let binary = integration_binary().display().to_string();
        let local = bench.lab.host.spawn(&[&binary, "world-server", "--bind", "0.0.0.0"])?;
        local.wait_line(SHORT, "servers on the host", |line| line.contains("ready"))?;
        let answer = ask(bench, Probe::TcpSyn(ports::ECHO), GATEWAY)?;
        ensure!(answer != Some(Answer::SynAck), "the gateway accepted for the host's loopback");
        let answer = ask(bench, Probe::Udp(ports::ECHO), GATEWAY)?;
        ensure!(answer != Some(Answer::Datagram), "the gateway answered for the host's loopback");
        // The host's own addresses follow the same rule.
        let answer = ask(bench, Probe::TcpSyn(ports::ECHO), HOST)?;
        ensure!(answer != Some(Answer::SynAck), "the host's own address was reached");
        Ok(())
    });
}

#[test]
fn host_loopback_can_be_allowed() {
    scenario(&Setup::new().vunet(&["--allow-host-loopback"]), |bench| {
        let binary = integration_binary().display().to_string();
        let local = bench.lab.host.spawn(&[&binary, "world-server", "--bind", "127.0.0.1"])?;
        local.wait_line(SHORT, "servers on the host's loopback", |line| line.contains("ready"))?;
        let answer = ask(bench, Probe::TcpSyn(ports::ECHO), GATEWAY)?;
        ensure!(answer == Some(Answer::SynAck), "TCP to the gateway: {answer:?}");
        let answer = ask(bench, Probe::Udp(ports::ECHO), GATEWAY)?;
        ensure!(answer == Some(Answer::Datagram), "UDP to the gateway: {answer:?}");
        Ok(())
    });
}

#[test]
fn an_unknown_segment_gets_a_reset() {
    scenario(&Setup::new(), |bench| {
        let answer = ask(bench, Probe::TcpStray(ports::ECHO), WORLD)?;
        ensure!(answer == Some(Answer::Rst), "a stray segment was answered with {answer:?}");
        Ok(())
    });
}

#[test]
fn without_an_uplink_only_the_gateway_answers() {
    for mode in ["host-only", "none"] {
        let setup = Setup::new().tools(&["ping"]).vunet(&["--mode", mode]);
        if let Some(reason) = crate::bench::missing(&setup.tools) {
            return crate::bench::skip(&reason);
        }
        crate::bench::bare(&setup, |bench| {
            bench.attach(&[])?;
            let lease = bench.lease()?;
            println!("{mode}: {lease:?}");
            let gateway = lease.router.to_string();
            let output = bench.in_guest(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", &gateway])?;
            ensure!(output.contains("3 received"), "{mode}: {output}");
            let server = format!("@{gateway}");
            let name = bench.in_guest(&["dig", "+short", &server, "host.vunet.internal"])?;
            ensure!(name.trim() == gateway, "{mode}: {name:?}");
            match bench.connect((WORLD, ports::ECHO), Duration::from_secs(2)) {
                Err(_) => Ok(()),
                Ok(_) => fail!("{mode} reached the world"),
            }
        });
    }
}
