//! The guest as a station of a LAN: on a bridge, on a TAP, on a macvtap.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use vunet_integration::lab::{BRIDGE, LAN_DOMAIN, LAN_POOL, Lease, SHORT, WORLD};

use crate::bench::{Bench, Failure, MIB, Outcome, PATIENCE, Setup, bare, ensure, scenario};

fn check(lease: &Lease) -> Outcome {
    ensure!((LAN_POOL.0..=LAN_POOL.1).contains(&lease.ip) && lease.router == WORLD, "{lease:?}");
    ensure!(lease.option("domain") == LAN_DOMAIN && lease.option("lease") == "3600", "{lease:?}");
    ensure!(lease.option("serverid") == WORLD.to_string(), "{lease:?}");
    Ok(())
}

/// Three pings of the guest to `to`.
fn ping(bench: &Bench, to: &str) -> Outcome {
    let output = bench.in_guest(&["ping", "-n", "-c", "3", "-i", "0.05", "-W", "2", to])?;
    ensure!(output.contains("3 received"), "{output}");
    Ok(())
}

#[test]
fn the_lans_own_dhcp_leases_and_frames_go_both_ways() {
    let setup = Setup::on_bridge().tools(&["ping", "curl", "iperf3", "dhclient"]);
    bare(&setup, |bench| {
        bench.attach(&["--features", "all"])?;
        check(&bench.lease()?)?;
        check(&bench.lab.dhclient(PATIENCE)?)?;
        ping(bench, &WORLD.to_string())?;
        bench.http_both_ways(32 * MIB, 1)?;
        bench.lab.start_iperf3()?;
        for direction in [&[][..], &["-R"]] {
            let mut words = vec!["iperf3", "-c", "192.0.2.2", "-t", "1", "--connect-timeout", "5000"];
            words.extend(direction);
            let output = bench.in_guest(&words)?;
            ensure!(output.contains("receiver"), "{output}");
        }
        let counters = bench.detach()?;
        ensure!(counters.gso_from_guest > 0 && counters.gso_to_guest > 0, "segmentation: {counters:?}");
        Ok(())
    });
}

#[test]
fn a_guest_without_offloads_and_buffers_of_any_size_are_served() {
    scenario(&Setup::on_bridge().tools(&["curl"]), |bench| {
        bench.http_both_ways(4 * MIB, 1)?;
        for args in [
            &["--features", "version_1"][..],
            &["--features", "all,-mrg_rxbuf"],
            &["--features", "all,-guest_csum,-guest_tso4"],
            &["--rx-buffer", "128"],
            &["--rx-buffer", "1536", "--ring-size", "64"],
            &["--tx-cuts", "1,13,20,1024"],
        ] {
            bench.detach()?;
            bench.attach(args)?;
            check(&bench.lease()?)?;
            bench.http_both_ways(4 * MIB, 2)?;
        }
        Ok(())
    });
}

const MAC: &str = "52:54:00:00:00:31";

/// Kills vunet and starts another; the guest goes on with the address it has, without a word of DHCP.
fn killed_and_started(bench: &mut Bench, setup: &Setup, lease: &Lease) -> Outcome {
    bench.vunet.process.kill();
    // The front-end made the guest's interface, so it is made anew.
    bench.guest = None;
    bench.vunet = bench.lab.vunet(&setup.vunet)?;
    bench.attach(&["--mac", MAC])?;
    bench.in_guest(&["ip", "addr", "replace", &format!("{}/24", lease.ip), "dev", "eth0"]).map(drop)
}

#[test]
fn a_guest_that_lives_on_is_not_cut_off_by_a_killed_vunet() {
    for args in [&["--mac", MAC][..], &[]] {
        let setup = Setup::on_bridge().tools(&["ping"]).vunet(args);
        bare(&setup, |bench| {
            bench.attach(&["--mac", MAC])?;
            let lease = bench.lease()?;
            let kept = bench.lab.state_dir().join("stations");
            let names = || std::fs::read_dir(&kept).map(|files| files.flatten().count()).unwrap_or(0);
            let deadline = Instant::now() + SHORT;
            while names() == 0 {
                ensure!(Instant::now() < deadline, "the lease was not written down");
                std::thread::sleep(Duration::from_millis(5));
            }
            for _ in 0..2 {
                killed_and_started(bench, &setup, &lease)?;
                ping(bench, &WORLD.to_string())?;
            }
            // It may send from no other address, and from none that nobody leased.
            bench.in_guest(&["ip", "addr", "replace", "192.0.2.77/24", "dev", "eth0"])?;
            let spoofed = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "-I", "192.0.2.77", "192.0.2.2"];
            let output = bench.lab.guest.run_any(&spoofed, SHORT)?.stdout;
            ensure!(output.contains(" 0 received"), "{output}");
            std::fs::remove_dir_all(&kept)?;
            killed_and_started(bench, &setup, &lease)?;
            let words = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "192.0.2.2"];
            let output = bench.lab.guest.run_any(&words, SHORT)?.stdout;
            ensure!(output.contains(" 0 received"), "nothing was known of its lease: {output}");
            check(&bench.lease()?)?;
            ping(bench, &WORLD.to_string())
        });
    }
}

#[test]
fn an_address_given_back_is_not_the_guests_any_more() {
    let setup = Setup::on_bridge().tools(&["ping", "udhcpc"]).vunet(&["--mac", MAC]);
    bare(&setup, |bench| {
        bench.attach(&["--mac", MAC])?;
        let lease = bench.lease()?;
        ping(bench, &WORLD.to_string())?;
        let kept = bench.lab.state_dir().join("stations");
        let names = || std::fs::read_dir(&kept).map(|files| files.flatten().count()).unwrap_or(0);
        // The client lets go of the lease as it ends; its script leaves the address on the interface.
        let give_back =
            "udhcpc -i eth0 -f -R -n -s /bin/true & client=$!; sleep 2; kill $client; wait $client; true";
        bench.in_guest(&["sh", "-c", give_back])?;
        bench.in_guest(&["ip", "addr", "replace", &format!("{}/24", lease.ip), "dev", "eth0"])?;
        let words = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "1", "192.0.2.2"];
        let output = bench.lab.guest.run_any(&words, SHORT)?.stdout;
        ensure!(output.contains(" 0 received"), "it gave the address back: {output}");
        let deadline = Instant::now() + SHORT;
        while names() > 0 {
            ensure!(Instant::now() < deadline, "the lease is still written down");
            std::thread::sleep(Duration::from_millis(5));
        }
        check(&bench.lease()?)?;
        ping(bench, &WORLD.to_string())
    });
}

#[test]
fn without_a_place_for_leases_vunet_says_so_once_and_goes_on() {
    bare(&Setup::on_bridge().tools(&["ping"]).vunet(&["--state-dir", "/proc/nowhere"]), |bench| {
        bench.attach(&[])?;
        check(&bench.lease()?)?;
        ping(bench, &WORLD.to_string())?;
        let told = bench.vunet.process.errors().join("\n");
        let (times, names_flag) = (told.matches("cannot be kept").count(), told.contains("--state-dir DIR"));
        ensure!(times == 1 && names_flag && told.contains("/proc/nowhere"), "{told}");
        Ok(())
    });
}

/// The ports of the LAN's bridge with their MTUs, but for the host's own link.
fn port_ip_mtu(bench: &Bench) -> Result<u32, Failure> {
    let words = ["ip", "-o", "link", "show", "master", BRIDGE];
    let shown = bench.lab.host.run(&words, PATIENCE)?.stdout;
    let tap = shown.lines().find(|line| !line.contains(": p0@")).unwrap_or_default();
    let mut words = tap.split(' ').skip_while(|word| *word != "mtu").skip(1);
    words
        .next()
        .and_then(|mtu| mtu.parse().ok())
        .ok_or_else(|| Failure(format!("no port of vunet in {shown}")))
}

/// Whether pings of `bytes` of IP with DF from the world to `guest` are answered.
fn fits(bench: &Bench, bytes: u16, guest: Ipv4Addr) -> Result<bool, Failure> {
    let (payload, guest) = ((bytes - 28).to_string(), guest.to_string());
    let words = ["ping", "-n", "-M", "do", "-c", "2", "-i", "0.05", "-W", "1", "-s", &payload, &guest];
    Ok(bench.lab.world.run_any(&words, PATIENCE)?.stdout.contains("2 received"))
}

#[test]
fn the_tap_has_the_mtu_a_front_end_asks_for_while_it_is_there() {
    let setup = Setup::on_bridge().tools(&["ping"]);
    bare(&setup, |bench| {
        ensure!(port_ip_mtu(bench)? == 1500, "before: {}", port_ip_mtu(bench)?);
        bench.attach(&["--features", "all", "--ip-mtu", "1300"])?;
        let lease = bench.lease()?;
        check(&lease)?;
        ensure!(port_ip_mtu(bench)? == 1300, "asked for 1300: {}", port_ip_mtu(bench)?);
        // The bridge drops what exceeds its port, so the guest counts no breach.
        ensure!(fits(bench, 1300, lease.ip)? && !fits(bench, 1301, lease.ip)?, "1300 and no more");
        bench.detach()?;
        until_port_has(bench, 1500)?;
        bench.attach(&["--features", "all", "--ip-mtu", "1600"])?;
        let lease = bench.lease()?;
        ensure!(port_ip_mtu(bench)? == 1500, "no more than configured: {}", port_ip_mtu(bench)?);
        let output = fits(bench, 1500, lease.ip)?;
        ensure!(output, "frames of the configured MTU pass again");
        Ok(())
    });
}

/// Waits for the port to have an MTU: vunet sees the front-end leave a moment later.
fn until_port_has(bench: &Bench, ip_mtu: u32) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while port_ip_mtu(bench)? != ip_mtu {
        ensure!(Instant::now() < deadline, "the port stays at {}", port_ip_mtu(bench)?);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
