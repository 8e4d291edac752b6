//! Guests and drivers that go wrong harm only themselves.

use std::io::{Read, Write};
use std::time::Duration;

use vunet_integration::lab::{SHORT, WORLD};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, MIB, Outcome, Setup, bare, ensure};

/// Transfers under `misbehave`, then with a guest that behaves.
fn transfers_survive(misbehave: &[&str], count_bytes: u64) {
    bare(&Setup { faults_allowed: true, ..Setup::new().tools(&["curl"]) }, |bench| {
        for wish in misbehave {
            let run = |bench: &mut Bench| -> Outcome {
                bench.attach(&["--misbehave", wish])?;
                bench.lease()?;
                bench.http_both_ways(count_bytes, 1)?;
                bench.detach().map(drop)
            };
            run(bench).map_err(|Failure(text)| Failure(format!("with {wish}: {text}")))?;
        }
        well_behaved(bench)
    });
}

fn well_behaved(bench: &mut Bench) -> Outcome {
    bench.attach(&[])?;
    bench.lease()?;
    bench.http_both_ways(MIB, 2)?;
    let counters = bench.detach()?;
    ensure!(counters.faults() == 0, "{counters:?}");
    Ok(())
}

#[test]
fn frames_lost_on_the_way_are_sent_again() {
    transfers_survive(&["drop-rx:50", "drop-tx:50", "drop-rx:50,drop-tx:50"], 4 * MIB);
    transfers_survive(&["drop-rx:20,drop-tx:20"], MIB);
}

#[test]
fn a_driver_that_pauses_is_waited_for() {
    transfers_survive(&["no-refill:300:150", "slow-used:5", "late-kick:5"], 4 * MIB);
}

#[test]
fn needless_kicks_are_harmless() {
    transfers_survive(&["kick-storm:20"], 4 * MIB);
}

#[test]
fn broken_chains_cost_only_themselves() {
    bare(&Setup { faults_allowed: true, ..Setup::new().tools(&["curl"]) }, |bench| {
        for features in ["all", "all,-indirect_desc", "all,-event_idx,-in_order", "version_1"] {
            let run = |bench: &mut Bench| -> Outcome {
                bench.attach(&["--misbehave", "garbage:2", "--features", features])?;
                bench.lease()?;
                bench.http_both_ways(2 * MIB, 1)?;
                let counters = bench.detach()?;
                ensure!(counters.garbage_offered >= 24, "{counters:?}");
                ensure!(counters.faults() == 0, "{counters:?}");
                Ok(())
            };
            run(bench).map_err(|Failure(text)| Failure(format!("with {features}: {text}")))?;
        }
        well_behaved(bench)
    });
}

#[test]
fn impossible_headers_cost_only_their_frame() {
    transfers_survive(&["bad-header:50"], 2 * MIB);
}

#[test]
fn a_broken_ring_costs_only_its_session() {
    bare(&Setup { faults_allowed: true, ..Setup::new().tools(&["curl"]) }, |bench| {
        bench.attach(&["--misbehave", "break-ring:20"])?;
        // The lease may or may not come before the ring breaks.
        let _ = bench.lab.udhcpc(SHORT);
        let _ = bench
            .lab
            .guest
            .run_any(&["ping", "-c", "30", "-i", "0.02", "-W", "1", &WORLD.to_string()], SHORT);
        ensure!(bench.vunet.process.is_running(), "vunet ended");
        let _ = bench.detach();
        well_behaved(bench)
    });
}

#[test]
fn a_driver_that_never_kicks_hurts_nobody() {
    bare(&Setup { faults_allowed: true, ..Setup::new().tools(&["curl"]) }, |bench| {
        bench.attach(&["--misbehave", "no-kick"])?;
        std::thread::sleep(Duration::from_secs(1));
        ensure!(bench.vunet.process.is_running(), "vunet ended");
        let _ = bench.detach();
        well_behaved(bench)
    });
}

#[test]
fn a_guest_without_buffers_gets_its_data_later() {
    bare(&Setup { faults_allowed: true, ..Setup::new() }, |bench| {
        bench.attach(&["--misbehave", "no-refill:2000:1500", "--ring-size", "64"])?;
        bench.lease()?;
        let mut stream = bench.connect_world(ports::SOURCE)?;
        // Into the pause, which starts half a second after the rings.
        std::thread::sleep(Duration::from_millis(600));
        stream.write_all(format!("{} 7\n", 2 * MIB).as_bytes())?;
        vunet_integration::world::pattern::expect(7, 2 * MIB, &mut stream)?;
        let rest = stream.read(&mut [0])?;
        ensure!(rest == 0, "more than was asked for");
        Ok(())
    });
}
