//! Leases by real DHCP clients, ping, and coming and going.

use std::time::{Duration, Instant};

use vunet_integration::lab::{BackendOptions, GATEWAY, GUEST, Lease, WORLD};

use crate::bench::{Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, fail, scenario};

fn check(lease: &Lease) -> Outcome {
    ensure!(lease.ip == GUEST && lease.router == GATEWAY, "{lease:?}");
    ensure!(lease.option("dns") == GATEWAY.to_string(), "dns: {lease:?}");
    ensure!(lease.option("mtu") == "1500", "mtu: {lease:?}");
    ensure!(lease.option("lease") == "86400", "lease time: {lease:?}");
    ensure!(lease.option("domain") == "vunet.internal", "domain: {lease:?}");
    ensure!(lease.option("serverid") == GATEWAY.to_string(), "server id: {lease:?}");
    Ok(())
}

fn ping(bench: &Bench, to: &str) -> Outcome {
    let output = bench.in_guest(&["ping", "-n", "-c", "10", "-i", "0.05", "-W", "2", to])?;
    ensure!(output.contains("10 received"), "{output}");
    Ok(())
}

#[test]
fn udhcpc_gets_a_lease_with_every_option() {
    bare(&Setup::new(), |bench| {
        bench.attach(&[])?;
        let started = Instant::now();
        check(&bench.lease()?)?;
        let took = started.elapsed();
        ensure!(took < Duration::from_secs(2), "the lease took {took:?}");
        Ok(())
    });
}

#[test]
fn dhclient_gets_the_same_lease() {
    bare(&Setup::new().tools(&["dhclient"]), |bench| {
        bench.attach(&["--mac", "52:54:00:00:00:07"])?;
        check(&bench.lab.dhclient(PATIENCE)?)?;
        // One MAC gets one address, whichever client asks.
        check(&bench.lease()?)
    });
}

#[test]
fn gateway_and_world_answer_pings_of_any_size() {
    scenario(&Setup::new().tools(&["ping"]), |bench| {
        ping(bench, &GATEWAY.to_string())?;
        ping(bench, &WORLD.to_string())?;
        for size in ["0", "1472", "1473", "8000"] {
            for to in [GATEWAY, WORLD] {
                let to = to.to_string();
                let output =
                    bench.in_guest(&["ping", "-n", "-c", "2", "-i", "0.05", "-W", "2", "-s", size, &to])?;
                ensure!(output.contains("2 received"), "{size} bytes to {to}: {output}");
            }
        }
        Ok(())
    });
}

#[test]
fn without_ping_sockets_the_gateway_still_answers() {
    scenario(&Setup::new().tools(&["ping", "curl"]), |bench| {
        bench.lab.host.sysctl("net.ipv4.ping_group_range", "1 0")?;
        bench.vunet.process.stop();
        bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
        bench.guest = None;
        bench.attach(&[])?;
        bench.lease()?;
        ping(bench, &GATEWAY.to_string())?;
        bench.http_both_ways(MIB, 1)
    });
}

#[test]
fn it_runs_as_an_ordinary_user_without_capabilities() {
    let mut setup = Setup::new().tools(&["setpriv", "ping", "curl"]);
    setup.vunet.unprivileged = true;
    scenario(&setup, |bench| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", bench.vunet.process.pid()))?;
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
        };
        ensure!(field("Uid:") == "65534 65534 65534 65534", "user: {}", field("Uid:"));
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            ensure!(field(set) == "0000000000000000", "{set} {}", field(set));
        }
        ping(bench, &WORLD.to_string())?;
        bench.http_both_ways(4 * MIB, 2)
    });
}

#[test]
fn front_ends_come_and_go() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        let files = |bench: &Bench| {
            let dir = format!("/proc/{}/fd", bench.vunet.process.pid());
            std::fs::read_dir(dir).map(Iterator::count)
        };
        let mut counts = Vec::new();
        for round in 0..8 {
            bench.attach(&["--mac", "52:54:00:00:00:09"])?;
            check(&bench.lease()?)?;
            bench.http_both_ways(MIB, round)?;
            match round % 2 {
                0 => drop(bench.detach()?),
                _ => bench.guest.take().expect("just attached").process.kill(),
            }
            std::thread::sleep(Duration::from_millis(200));
            counts.push(files(bench)?);
        }
        ensure!(counts[7] <= counts[1], "open files grow: {counts:?}");
        Ok(())
    });
}

#[test]
fn a_guest_survives_the_death_of_vunet() {
    scenario(&Setup::new().tools(&["curl"]).guest(&["--reconnect"]), |bench| {
        for round in 0..3 {
            bench.http_both_ways(MIB, round)?;
            bench.vunet.process.kill();
            std::thread::sleep(Duration::from_millis(100));
            // The socket of the dead process is in the way, and must be replaced.
            bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
            wait_ready(bench, round as usize + 2)?;
        }
        bench.http_both_ways(MIB, 9)
    });
}

fn wait_ready(bench: &Bench, count: usize) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lines = bench.front_end().process.lines();
        if lines.iter().filter(|line| line.contains("\"ready\":true")).count() >= count {
            return Ok(());
        }
        if Instant::now() > deadline {
            fail!("the guest did not find vunet again: {}", lines.join("\n"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_front_end_that_listens_is_served() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        let socket = bench.lab.dir().join("listening.sock");
        let guest = bench.lab.start_guest(&socket, &["--server"])?;
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "the front-end does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        let path = socket.display().to_string();
        let mut client =
            bench.lab.start_vunet(&BackendOptions::default(), &["--socket-path", &path, "--client"])?;
        let is_ready = |line: &str| line.contains("\"ready\":true");
        guest.process.wait_line(PATIENCE, "the guest's rings", is_ready)?;
        bench.lease()?;
        bench.http_both_ways(MIB, 3)?;
        guest.stop()?;
        let code = client.stop();
        ensure!(code == Some(0), "vunet --client ended with {code:?}");
        Ok(())
    });
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    bare(&Setup::new(), |bench| {
        let path = bench.vunet.socket.display().to_string();
        let mut second = bench.lab.start_vunet(&BackendOptions::default(), &["--socket-path", &path])?;
        let deadline = Instant::now() + PATIENCE;
        while second.is_running() {
            ensure!(Instant::now() < deadline, "a second vunet runs on a live socket");
            std::thread::sleep(Duration::from_millis(10));
        }
        let code = second.stop();
        ensure!(code.is_some_and(|code| code != 0), "a second vunet ended with {code:?}");
        bench.attach(&[])?;
        bench.lease().map(drop).map_err(|e| Failure(format!("after a second vunet tried: {e:?}")))
    });
}
