//! The benchmark itself: short runs of the scenarios that differ most, judged by their record.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use vunet_integration::lab;

use crate::bench::{Failure, Outcome, ensure, integration_binary, missing, skip};

/// Time a short run may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(150);

/// Runs the benchmark with `args` and hands its record to `judge`.
fn benchmark(args: &[&str], judge: impl FnOnce(&Value) -> Outcome) {
    if let Some(reason) = missing(&["iperf3"]) {
        return skip(&reason);
    }
    let run = || -> Outcome {
        let dir = tempfile::tempdir()?;
        let (binary, out) = (integration_binary().display().to_string(), dir.path().display().to_string());
        let mut words = vec![&*binary, "bench", "--repetitions", "1", "--out", &out];
        if !args.contains(&"--seconds") {
            words.extend(["--seconds", "0.3"]);
        }
        words.extend(args);
        let output = lab::run(&words, PATIENCE)?;
        println!("{}", output.stderr);
        let text = fs::read_to_string(dir.path().join("results.json"))?;
        // Shells take names alone; a record must not tell where it was made.
        ensure!(!text.contains(&out), "the record names a directory: {text}");
        let record: Value = serde_json::from_str(&text)?;
        ensure!(record["failures"] == serde_json::json!([]), "{}", record["failures"]);
        judge(&record)
    };
    if let Err(failure) = run() {
        panic!("{failure:?}");
    }
}

/// The median of a figure.
fn median(record: &Value, scenario: &str, backend: &str, metric: &str) -> Result<f64, Failure> {
    let figures = record["figures"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = figures
        .iter()
        .find(|f| f["scenario"] == scenario && f["backend"] == backend && f["metric"] == metric)
        .and_then(|f| f["median"].as_f64());
    found.ok_or_else(|| Failure(format!("no {metric} of {scenario} behind {backend} in {record}")))
}

#[test]
fn bounds_are_measured_beside_vunet() {
    benchmark(&["--bounds", "--only", "tcp-from-1500-1,tcp-from-1500-4-pairs-2,lease"], |record| {
        for backend in ["vunet", "two TAPs", "veth", "bare sockets"] {
            let rate = median(record, "tcp-from-1500-1", backend, "rate")?;
            let carried = rate > 0.1;
            ensure!(carried, "{backend} carried {rate} Gbit/s");
        }
        // Seen from its own CPU time: no other figure says that it was measured where it should be.
        let cpu = median(record, "tcp-from-1500-1", "bare sockets", "backend CPU per GB")?;
        ensure!(cpu > 0.0 && cpu < 10.0, "bare sockets took {cpu} s per GB");
        median(record, "tcp-from-1500-4-pairs-2", "vunet", "rate")?;
        let bound = median(record, "tcp-from-1500-4-pairs-2", "veth", "rate");
        ensure!(bound.is_err(), "a bound has no queue pairs");
        median(record, "lease", "vunet", "start to lease")?;
        ensure!(record["front_end_args"][0] == "--tx-cuts", "{}", record["front_end_args"]);
        Ok(())
    });
}

#[test]
fn the_tap_path_is_measured_beside_its_bound() {
    let args = ["--without-vunet", "--tap", "--bounds", "--only", "tcp-from-1500-1,tcp-to-1500-1,tcp-rr"];
    benchmark(&args, |record| {
        for scenario in ["tcp-from-1500-1", "tcp-to-1500-1"] {
            for backend in ["vunet on a TAP", "two TAPs"] {
                let rate = median(record, scenario, backend, "rate")?;
                let carried = rate > 0.5;
                ensure!(carried, "{scenario}: {backend} carried {rate} Gbit/s");
            }
            let cpu = median(record, scenario, "vunet on a TAP", "backend CPU per GB")?;
            ensure!(cpu > 0.0 && cpu < 10.0, "{scenario}: {cpu} s per GB");
        }
        median(record, "tcp-rr", "vunet on a TAP", "p50")?;
        let others = median(record, "tcp-from-1500-1", "vunet", "rate");
        ensure!(others.is_err(), "vunet on sockets was left out");
        Ok(())
    });
}

#[test]
fn ways_through_a_host_are_measured_whoever_translates() {
    if let Some(reason) = missing(&["nft"]) {
        return skip(&reason);
    }
    let args = ["--without-vunet", "--through-host", "--only", "tcp-from-1500-1,udp-from-64,udp-to-64"];
    benchmark(&args, |record| {
        for backend in [
            "bridge mode, routed",
            "packet NAT, routed",
            "kernel masquerade",
            "bridge mode, on a bridge",
            "packet NAT, on a bridge",
        ] {
            let rate = median(record, "tcp-from-1500-1", backend, "rate")?;
            let carried = rate > 0.5;
            ensure!(carried, "{backend} carried {rate} Gbit/s");
            for scenario in ["udp-from-64", "udp-to-64"] {
                let packets = median(record, scenario, backend, "packets")?;
                let own = median(record, scenario, backend, "backend CPU per million")?;
                let all = median(record, scenario, backend, "machine CPU per million")?;
                let arrived = packets > 5.0 && own > 0.0;
                ensure!(arrived, "{scenario}: {packets} thousand/s through {backend}, {own} s a million");
                // Clock ticks of one, microseconds of the other.
                let whole = all > 0.8 * own;
                ensure!(whole, "{scenario}: {backend} took {own} s of {all} s for a million");
            }
        }
        Ok(())
    });
}

#[test]
fn guest_to_guest_is_measured_beside_two_copy_loops_over_the_same_kind_of_bridge() {
    if let Some(reason) = missing(&["nft"]) {
        return skip(&reason);
    }
    benchmark(&["--bounds", "--only", "between"], |record| {
        for backend in ["vunet on a network", "two copy loops"] {
            let rate = median(record, "between-1500-1", backend, "rate")?;
            let carried = rate > 0.2;
            ensure!(carried, "{backend} carried {rate} Gbit/s");
            let cpu = median(record, "between-1500-1", backend, "backend CPU per GB")?;
            ensure!(cpu > 0.0 && cpu < 10.0, "{backend}: {cpu} s per GB");
        }
        ensure!(record["backends"].as_array().is_some_and(|all| all.len() == 2), "{}", record["backends"]);
        Ok(())
    });
}

/// The benchmark compares the addresses and counts the leases: fewer than fifty would be its failure.
#[test]
fn fifty_vms_that_start_together_have_fifty_leases() {
    if let Some(reason) = missing(&["nft"]) {
        return skip(&reason);
    }
    benchmark(&["--only", "leases-50"], |record| {
        let took = median(record, "leases-50", "vunet on a network", "start to lease")?;
        eprintln!("50 leases {took} ms after the first process was started");
        // Wanted on a quiet machine: 5 s.
        let soon = took < 25_000.0;
        ensure!(soon, "the last lease came after {took} ms");
        Ok(())
    });
}

#[test]
fn datagrams_are_counted_on_pairs_and_in_runs() {
    benchmark(&["--only", "udp-from-64-pairs,udp-to-64-runs"], |record| {
        for scenario in ["udp-from-64-pairs-1", "udp-from-64-pairs-2", "udp-to-64-runs"] {
            let packets = median(record, scenario, "vunet", "packets")?;
            let arrived = packets > 5.0;
            ensure!(arrived, "{scenario}: {packets} thousand/s");
        }
        Ok(())
    });
}

#[test]
fn a_guest_that_takes_nothing_leaves_vunet_asleep() {
    benchmark(&["--only", "starved,unacked"], |record| {
        for scenario in ["starved", "unacked"] {
            let wakes = median(record, scenario, "vunet", "wake-ups")?;
            let busy = median(record, scenario, "vunet", "backend CPU")?;
            // Retransmissions back off; a tick of accounting is 10 ms of these 300.
            ensure!(wakes < 20.0 && busy < 20.0, "{scenario}: {wakes} wake-ups/s, {busy} % of a core");
        }
        Ok(())
    });
}

#[test]
fn a_peer_that_cannot_be_told_of_queues_has_one_pair() {
    let peer = format!("other={} --socket-path {{socket}}", lab::vunet_binary().display());
    let args = ["--without-vunet", "--peer", &peer, "--only", "udp-from-64-pairs"];
    benchmark(&args, |record| {
        median(record, "udp-from-64-pairs-1", "other", "packets")?;
        let two = median(record, "udp-from-64-pairs-2", "other", "packets");
        ensure!(two.is_err(), "it was measured with two pairs");
        let command = record["backend_commands"][0].as_str().unwrap_or_default();
        ensure!(command == "vunet --socket-path {socket}", "{command}");
        Ok(())
    });
}

#[test]
fn the_wan_is_measured_beside_the_hosts_own_tcp() {
    let args = [
        "--bounds",
        "--seconds",
        "1",
        "--congestion",
        "cubic",
        "--only",
        "wan-to-10ms-0.1%-8,wan-from-10ms-0%-1",
    ];
    benchmark(&args, |record| {
        for (scenario, at_least) in [("wan-to-10ms-0.1%-8", 5.0), ("wan-from-10ms-0%-1", 20.0)] {
            for backend in ["vunet", "bare sockets"] {
                let goodput = median(record, scenario, backend, "goodput")?;
                // The link is of 1,000 Mbit/s: who exceeds it has not been measured over it.
                let credible = (at_least..960.0).contains(&goodput);
                ensure!(credible, "{scenario}: {backend} carried {goodput} Mbit/s");
            }
        }
        let wan = record["wan"].as_str().unwrap_or_default();
        ensure!(wan.contains("cubic") && wan.contains("tcp_wmem"), "{wan}");
        Ok(())
    });
}
