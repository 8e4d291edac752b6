//! Ways onto a LAN, what goes wrong with them, and what is left of them.

use std::time::{Duration, Instant};

use vunet_integration::lab::{
    BRIDGE, Backend, BackendOptions, LAN_POOL, Netns, Process, SHORT, WORLD, vunet_binary,
};

use crate::bench::{Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, fail, scenario};

fn bridged(args: &[&str]) -> BackendOptions {
    let mut all = vec!["--mode", "bridge", "--uplink"];
    all.extend(args);
    BackendOptions::args(&all)
}

/// Leases, pings and transfers.
fn works(bench: &mut Bench) -> Outcome {
    let lease = bench.lease()?;
    ensure!((LAN_POOL.0..=LAN_POOL.1).contains(&lease.ip), "{lease:?}");
    bench.in_guest(&["ping", "-n", "-c", "2", "-i", "0.05", "-W", "2", &WORLD.to_string()])?;
    bench.http_both_ways(4 * MIB, 3)
}

/// Ends the bench's vunet and starts another.
fn instead(bench: &mut Bench, options: &BackendOptions) -> Outcome {
    bench.guest = None;
    bench.vunet.process.stop();
    bench.vunet = bench.lab.vunet(options)?;
    Ok(())
}

/// What ip shows of the bridge itself.
fn bridge(bench: &Bench) -> Result<String, Failure> {
    let link = bench.lab.host.run(&["ip", "-o", "link", "show", BRIDGE], SHORT)?.stdout;
    let addr = bench.lab.host.run(&["ip", "-o", "-4", "addr", "show", BRIDGE], SHORT)?.stdout;
    Ok(link + &addr)
}

/// Waits until the bridge has these ports.
fn await_ports(bench: &Bench, expected: &[&str]) -> Outcome {
    let deadline = Instant::now() + SHORT;
    loop {
        let ports = bench.lab.bridge_ports()?;
        if ports == expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "ports {ports:?} instead of {expected:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn our_tap_leaves_the_bridge_and_the_bridge_stays() {
    let setup = Setup::on_bridge();
    scenario(&setup, |bench| {
        let during = bridge(bench)?;
        await_ports(bench, &["p0", "vt-0"])?;
        let code = bench.vunet.process.stop();
        ensure!(code == Some(0), "SIGTERM: {code:?}");
        await_ports(bench, &["p0"])?;
        ensure!(bridge(bench)? == during, "the bridge was changed from {during} to {}", bridge(bench)?);
        instead(bench, &setup.vunet)?;
        bench.attach(&[])?;
        await_ports(bench, &["p0", "vt-0"])?;
        bench.vunet.process.kill();
        await_ports(bench, &["p0"])?;
        ensure!(bridge(bench)? == during, "the bridge was changed from {during} to {}", bridge(bench)?);
        instead(bench, &setup.vunet)
    });
}

#[test]
fn a_persistent_tap_of_the_users_own_needs_no_privilege() {
    bare(&Setup::on_bridge().tools(&["setpriv", "ping", "curl"]), |bench| {
        // With multi_queue, so that it does whatever --queues says.
        let made = "ip tuntap add dev vm0 mode tap user 65534 multi_queue";
        bench.lab.host.run(&made.split(' ').collect::<Vec<_>>(), SHORT)?;
        bench.lab.ip(&bench.lab.host, &format!("link set vm0 master {BRIDGE}"))?;
        bench.lab.ip(&bench.lab.host, "link set vm0 up")?;
        let options = BackendOptions { unprivileged: true, ..bridged(&["tap=vm0"]) };
        instead(bench, &options)?;
        bench.attach(&[])?;
        works(bench)?;
        bench.detach()?;
        bench.vunet.process.stop();
        await_ports(bench, &["p0", "vm0"])?;
        bench.vunet = bench.lab.vunet(&options)?;
        bench.attach(&[])?;
        works(bench)
    });
}

/// Starts vunet as the child of a parent that hands TAP queues down.
fn inherit(bench: &Bench, queues: &str, flags: &[&str]) -> Result<Process, Failure> {
    let own = bench.lab.integration().display().to_string();
    let vunet = vunet_binary().display().to_string();
    let socket = bench.lab.dir().join("inherited.sock").display().to_string();
    let mut words = vec![own.as_str(), "pass-tap", "--name", "vm1", "--queues", queues];
    words.extend(flags);
    words.extend(["--", &vunet, "--socket-path", &socket, "--mode", "bridge", "--uplink", "tap-fd={fds}"]);
    words.extend(["--queues", queues]);
    Ok(bench.lab.host.spawn(&words)?)
}

/// Attaches the bench's guest to a vunet that inherited `queues` queues, its TAP on the bridge.
fn attach_inherited(bench: &mut Bench, queues: &str, flags: &[&str]) -> Result<Process, Failure> {
    bench.guest = None;
    let process = inherit(bench, queues, flags)?;
    let socket = bench.lab.dir().join("inherited.sock");
    let deadline = Instant::now() + SHORT;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "no socket: {}", process.errors().join("\n"));
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.lab.ip(&bench.lab.host, &format!("link set vm1 master {BRIDGE}"))?;
    bench.guest = Some(bench.lab.attach(&socket, &["--queues", queues])?);
    Ok(process)
}

#[test]
fn inherited_queues_are_used_as_they_are() {
    bare(&Setup::on_bridge().tools(&["ping", "curl"]), |bench| {
        for queues in ["1", "2"] {
            let mut process = attach_inherited(bench, queues, &[])?;
            works(bench)?;
            bench.detach()?;
            let code = process.stop();
            ensure!(code == Some(0), "with {queues} queues: {code:?}");
        }
        Ok(())
    });
}

#[test]
fn a_full_link_stops_the_ring_and_loses_nothing() {
    const MAC: &str = "52:54:00:00:00:32";
    bare(&Setup::new().tools(&["curl", "iperf3", "tc"]), |bench| {
        bench.lab.start_lan_dhcp()?;
        // A slow way out whose queue is longer than what the macvtap takes (`wmem_default`).
        let slow = "tc qdisc add dev p0 root tbf rate 100mbit burst 64kb limit 8mb";
        bench.lab.host.run(&slow.split(' ').collect::<Vec<_>>(), SHORT)?;
        instead(bench, &bridged(&["macvtap=p0", "--mac", MAC]))?;
        bench.attach(&["--mac", MAC])?;
        bench.lease()?;
        bench.lab.start_iperf3()?;
        for kind in [&["-u", "-b", "1G", "-l", "1400"][..], &[]] {
            let mut words = vec!["iperf3", "-c", "192.0.2.2", "-t", "2", "--connect-timeout", "5000"];
            words.extend(kind);
            let output = bench.in_guest(&words)?;
            ensure!(output.contains("receiver"), "{output}");
        }
        let shown = bench.lab.host.run(&["tc", "-s", "qdisc", "show", "dev", "p0"], SHORT)?.stdout;
        ensure!(shown.contains("dropped 0,"), "the queue behind the link overflowed: {shown}");
        let sent: u64 =
            shown.split("Sent ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or("0").parse()?;
        ensure!(sent > 20_000_000, "only {sent} bytes left: {shown}");
        bench.http_both_ways(MIB, 1)?;
        bench.detach()?;
        bench.vunet.process.stop();
        let said = bench.vunet.process.errors().join("\n");
        ensure!(!said.contains("link_refused"), "{said}");
        bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
        Ok(())
    });
}

#[test]
fn four_queues_carry_flows_side_by_side() {
    let setup = Setup::on_bridge().tools(&["iperf3", "curl"]).vunet(&["--queues", "4"]);
    bare(&setup, |bench| {
        bench.lab.start_iperf3()?;
        for queues in ["4", "2", "1"] {
            bench.attach(&["--queues", queues])?;
            let lease = bench.lease()?;
            // Whichever queue it comes by, and though the guest says nothing by itself.
            let guest = lease.ip.to_string();
            for _ in 0..4 {
                let words = ["ping", "-n", "-c", "3", "-i", "0.1", "-W", "2", &guest];
                let output = bench.lab.world.run(&words, PATIENCE)?.stdout;
                ensure!(output.contains("3 received"), "with {queues} pairs: {output}");
            }
            for direction in [&[][..], &["-R"]] {
                let mut words =
                    vec!["iperf3", "-c", "192.0.2.2", "-t", "1", "-P", "8", "--connect-timeout", "5000"];
                words.extend(direction);
                let output = bench.in_guest(&words)?;
                ensure!(output.contains("receiver"), "{output}");
            }
            bench.http_both_ways(8 * MIB, 4)?;
            bench.detach()?;
        }
        let link = bench.lab.host.run(&["ip", "-d", "link", "show", "vt-0"], SHORT)?.stdout;
        ensure!(link.contains("multi_queue"), "{link}");
        Ok(())
    });
}

/// A second guest of another vunet on the same bridge.
struct Second {
    guest: vunet_integration::lab::GuestProcess,
    vunet: Backend,
    netns: Netns,
}

fn second(bench: &Bench, options: &BackendOptions) -> Result<Second, Failure> {
    let netns = Netns::create("second")?;
    let socket = bench.lab.dir().join("second.sock");
    let process = bench.lab.start_vunet(options, &["--socket-path", &socket.display().to_string()])?;
    let deadline = Instant::now() + SHORT;
    while !socket.exists() {
        ensure!(Instant::now() < deadline, "no socket: {}", process.errors().join("\n"));
        std::thread::sleep(Duration::from_millis(5));
    }
    let guest = bench.lab.attach_in(&netns, &socket, &[])?;
    Ok(Second { guest, vunet: Backend { process, socket }, netns })
}

#[test]
fn two_guests_meet_on_one_bridge() {
    let setup = Setup::on_bridge().tools(&["iperf3"]);
    scenario(&setup, |bench| {
        let mut second = second(bench, &setup.vunet)?;
        let lease = bench.lab.udhcpc_in(&second.netns, &[], PATIENCE)?;
        iperf3_between(bench, &second, &lease.ip.to_string())?;
        second.guest.stop()?;
        let code = second.vunet.process.stop();
        ensure!(code == Some(0), "the second vunet: {code:?}");
        await_ports(bench, &["p0", "vt-0"])
    });
}

#[test]
fn two_guests_meet_in_one_vlan() {
    let vlan = |ip: &'static str| Setup::on_bridge().vunet(&["--vlan", "100", "--guest-ip", ip]);
    bare(&vlan("192.0.2.71").tools(&["iperf3"]), |bench| {
        bench.attach(&["--features", "all"])?;
        let second = second(bench, &vlan("192.0.2.72").vunet)?;
        for (netns, ip) in [(&bench.lab.guest, "192.0.2.71/24"), (&second.netns, "192.0.2.72/24")] {
            bench.lab.ip(netns, &format!("addr add {ip} dev eth0"))?;
        }
        iperf3_between(bench, &second, "192.0.2.72")?;
        let counters = bench.detach()?;
        ensure!(counters.gso_from_guest > 0 && counters.gso_to_guest > 0, "segmentation: {counters:?}");
        Ok(())
    });
}

fn iperf3_between(bench: &Bench, second: &Second, to: &str) -> Outcome {
    let server = second.netns.spawn(&["iperf3", "-s", "--forceflush"])?;
    server.wait_line(SHORT, "iperf3", |line| line.contains("Server listening"))?;
    for direction in [&[][..], &["-R"]] {
        let mut words = vec!["iperf3", "-c", to, "-t", "1", "--connect-timeout", "5000"];
        words.extend(direction);
        let output = bench.in_guest(&words)?;
        ensure!(output.contains("receiver"), "{output}");
    }
    Ok(())
}

#[test]
fn a_macvtap_puts_the_guest_on_an_interface_without_a_bridge() {
    const MAC: &str = "52:54:00:00:00:31";
    bare(&Setup::new().tools(&["ping", "curl"]), |bench| {
        bench.lab.start_lan_dhcp()?;
        let options = bridged(&["macvtap=p0", "--mac", MAC]);
        instead(bench, &options)?;
        bench.attach(&["--mac", MAC])?;
        works(bench)?;
        bench.detach()?;
        let macvtaps = |bench: &Bench| -> Result<usize, Failure> {
            Ok(bench
                .lab
                .host
                .run(&["ip", "-o", "link", "show", "type", "macvtap"], SHORT)?
                .stdout
                .lines()
                .count())
        };
        ensure!(macvtaps(bench)? == 1, "{} macvtaps", macvtaps(bench)?);
        let code = bench.vunet.process.stop();
        ensure!(code == Some(0) && macvtaps(bench)? == 0, "{code:?}, {} macvtaps left", macvtaps(bench)?);
        bench.vunet = bench.lab.vunet(&options)?;
        bench.vunet.process.kill();
        ensure!(macvtaps(bench)? == 1, "nobody could delete it");
        instead(bench, &options)?;
        ensure!(macvtaps(bench)? == 1, "the one of the vunet that was killed stays");
        bench.attach(&["--mac", MAC])?;
        works(bench)
    });
}

/// Starts vunet with `args` and expects it to end with `code`, saying every one of `parts`.
fn ends(bench: &Bench, options: &BackendOptions, code: i32, parts: &[&str]) -> Outcome {
    let socket = bench.lab.dir().join("never.sock").display().to_string();
    let process = bench.lab.start_vunet(options, &["--socket-path", &socket])?;
    ended(process, code, parts, &format!("{:?}", options.args))
}

fn ended(mut process: Process, code: i32, parts: &[&str], what: &str) -> Outcome {
    let deadline = Instant::now() + SHORT;
    while process.is_running() {
        ensure!(Instant::now() < deadline, "{what}: it runs");
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = process.stop();
    std::thread::sleep(Duration::from_millis(20));
    let said = process.errors().join("\n");
    ensure!(ended == Some(code), "{what}: code {ended:?} instead of {code}: {said}");
    for part in parts {
        ensure!(said.contains(part), "{what}: '{part}' is not in: {said}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_had_is_said_at_once_with_what_to_do() {
    bare(&Setup::on_bridge().tools(&["setpriv"]), |bench| {
        let made = "ip tuntap add dev one mode tap";
        bench.lab.host.run(&made.split(' ').collect::<Vec<_>>(), SHORT)?;
        let unprivileged = |args: &[&str]| BackendOptions { unprivileged: true, ..bridged(args) };
        let one_queue = |args: &[&str]| bridged(&[args, &["--queues", "1"]].concat());
        for (options, parts) in [
            (bridged(&["bridge=none"]), &["bridge=none", "no interface", "ip link add none type bridge"][..]),
            (bridged(&["bridge=p0"]), &["bridge=p0", "not a bridge", "macvtap=p0"]),
            (bridged(&["tap=p0"]), &["tap=p0", "no TAP", "another name"]),
            (bridged(&["macvtap=none", "--mac", "52:54:00:00:00:01"]), &["macvtap=none", "no interface"]),
            (unprivileged(&["bridge=br0"]), &["CAP_NET_ADMIN", "ip tuntap add", "--uplink tap=NAME"]),
            (unprivileged(&["tap"]), &["CAP_NET_ADMIN", "ip tuntap add"]),
            (unprivileged(&["tap=one", "--queues", "1"]), &["tap=one", "needs CAP_NET_ADMIN", "ip tuntap"]),
            (bridged(&["tap=one", "--queues", "2"]), &["tap=one", "multi_queue", "--queues 1"]),
        ] {
            // A TAP made for nobody is anybody's: the kernel lets only its owner be checked.
            if options.args.iter().any(|arg| arg == "tap=one") && options.unprivileged {
                continue;
            }
            ends(bench, &options, 1, parts)?;
        }
        let socket = bench.lab.dir().join("first.sock").display().to_string();
        let first = bench.lab.start_vunet(&one_queue(&["tap=one"]), &["--socket-path", &socket])?;
        first.wait_error(SHORT, "the first vunet", |line| line.contains("TAP that was there"))?;
        ends(bench, &one_queue(&["tap=one"]), 1, &["tap=one", "another process"])?;
        let plain = inherit(bench, "1", &["--plain"])?;
        ended(plain, 2, &["tap-fd=", "IFF_VNET_HDR"], "a TAP without headers")
    });
}

#[test]
fn a_tap_of_another_users_is_refused() {
    bare(&Setup::on_bridge().tools(&["setpriv"]), |bench| {
        let made = "ip tuntap add dev hers mode tap user 1234 multi_queue";
        bench.lab.host.run(&made.split(' ').collect::<Vec<_>>(), SHORT)?;
        let options = BackendOptions { unprivileged: true, ..bridged(&["tap=hers"]) };
        ends(bench, &options, 1, &["tap=hers", "another user", "ip tuntap"])?;
        let made = "ip tuntap add dev long mode tap user 65534 multi_queue";
        bench.lab.host.run(&made.split(' ').collect::<Vec<_>>(), SHORT)?;
        let options = BackendOptions { unprivileged: true, ..bridged(&["tap=long", "--ip-mtu", "9000"]) };
        ends(bench, &options, 1, &["tap=long", "MTU is 1500", "--ip-mtu 1500"])?;
        let options = BackendOptions { unprivileged: true, ..bridged(&["tap=long"]) };
        ends(bench, &options, 1, &["tap=long", "is down", "ip link set long up"])
    });
}

/// Processor time of a process, in hundredths of a second.
fn cpu_ticks(pid: u32) -> Result<u64, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

#[test]
fn a_guest_that_posts_no_buffers_costs_no_processor_time() {
    let setup = Setup { faults_allowed: true, ..Setup::on_bridge() };
    bare(&setup, |bench| {
        bench.attach(&["--misbehave", "starve:40"])?;
        let lease = bench.lease()?;
        // A hundred a second that it does not take: its ring of 256 is used up, then frames wait in the TAP.
        let flood = ["ping", "-n", "-q", "-f", "-w", "6", "-W", "1", &lease.ip.to_string()];
        let _ = bench.lab.world.run_any(&flood, PATIENCE)?;
        let before = cpu_ticks(bench.vunet.process.pid())?;
        std::thread::sleep(Duration::from_secs(2));
        let used = cpu_ticks(bench.vunet.process.pid())? - before;
        ensure!(used <= 2, "{used} hundredths of a second of processor time in 2 s without buffers");
        Ok(())
    });
}

#[test]
fn hostile_guests_on_a_bridge_harm_only_themselves() {
    let setup = Setup { faults_allowed: true, ..Setup::on_bridge().tools(&["curl", "ping"]) };
    bare(&setup, |bench| {
        for wish in ["bad-header:50", "garbage:2", "drop-rx:50,drop-tx:50", "no-refill:300:150"] {
            let run = |bench: &mut Bench| -> Outcome {
                bench.attach(&["--misbehave", wish])?;
                bench.lease()?;
                bench.http_both_ways(MIB, 1)?;
                bench.detach().map(drop)
            };
            run(bench).map_err(|Failure(text)| Failure(format!("with {wish}: {text}")))?;
        }
        bench.attach(&["--misbehave", "break-ring:20"])?;
        let _ = bench.lab.udhcpc(SHORT);
        if !bench.vunet.process.is_running() {
            fail!("vunet ended");
        }
        let _ = bench.detach();
        bench.attach(&[])?;
        works(bench)
    });
}

#[test]
fn the_mtu_is_obeyed() {
    for (mtu, asked) in [("9000", "8972"), ("1280", "1252")] {
        let setup = Setup::on_bridge().tools(&["ping", "curl"]).vunet(&["--ip-mtu", mtu]);
        bare(&setup, |bench| {
            for words in [format!("link set p0 mtu {mtu}"), format!("link set {BRIDGE} mtu {mtu}")] {
                bench.lab.ip(&bench.lab.host, &words)?;
            }
            bench.lab.ip(&bench.lab.world, &format!("link set e0 mtu {mtu}"))?;
            // With mergeable buffers: single ones are too small for the longest packets.
            bench.attach(&["--features", "all"])?;
            bench.lease()?;
            // dnsmasq tells the interface's MTU by itself; the device's stands.
            bench.in_guest(&["ip", "link", "set", "eth0", "mtu", mtu])?;
            let tap = bench.lab.host.run(&["ip", "link", "show", "vt-0"], SHORT)?.stdout;
            ensure!(tap.contains(&format!("mtu {mtu} ")), "{tap}");
            let world = WORLD.to_string();
            let words = ["ping", "-n", "-M", "do", "-s", asked, "-c", "2", "-i", "0.05", "-W", "2", &world];
            let output = bench.in_guest(&words)?;
            ensure!(output.contains("2 received"), "{output}");
            bench.http_both_ways(4 * MIB, 1)
        });
    }
}
