//! The guest as a station of a LAN: on a bridge, on a TAP, on a macvtap.

use vunet_integration::lab::{LAN_DOMAIN, LAN_POOL, Lease, WORLD};

use crate::bench::{Bench, MIB, Outcome, PATIENCE, Setup, bare, ensure, scenario};

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
