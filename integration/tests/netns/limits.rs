//! Rate limits with Linux's own TCP as the guest: the rate is met, nothing is dropped that could wait, flows share.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vunet_integration::lab::{SHORT, vunet_binary};

use crate::bench::{Bench, Failure, Outcome, PATIENCE, Setup, ensure, scenario};

/// What the guest may send and be sent in these tests, in Mbit/s.
const FROM_GUEST: f64 = 40.0;
const TO_GUEST: f64 = 60.0;
const LIMITS: [&str; 4] = ["--limit-from-guest", "rate=40mbit", "--limit-to-guest", "rate=60mbit"];

/// A control socket.
struct Control(TempDir);

impl Control {
    fn new() -> Control {
        Control(tempfile::tempdir().expect("a directory"))
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("ctl")
    }

    fn on(&self, setup: Setup) -> Setup {
        setup.tools(&["iperf3"]).vunet(&["--control", &self.socket().display().to_string()])
    }

    fn ctl(&self, args: &[&str]) -> Result<Value, Failure> {
        let socket = self.socket().display().to_string();
        let vunet = vunet_binary().display().to_string();
        let words = [&[&vunet, "ctl", "--json", "--control", &socket], args].concat();
        Ok(serde_json::from_str(&vunet_integration::lab::run(&words, SHORT)?.stdout)?)
    }
}

/// What iperf3 in the guest says of a run against the world, after a second to begin with.
fn iperf3(bench: &Bench, args: &[&str]) -> Result<Value, Failure> {
    let base = ["iperf3", "-c", "192.0.2.2", "-J", "-O", "1", "-t", "3", "--connect-timeout", "5000"];
    Ok(serde_json::from_str(&bench.in_guest(&[&base[..], args].concat())?)?)
}

/// Mbit/s that arrived.
fn arrived(said: &Value) -> f64 {
    said["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or(0.0) / 1e6
}

fn ensure_near(what: &str, mbit: f64, want: f64) -> Outcome {
    println!("{what}: {mbit:.1} of {want} Mbit/s");
    ensure!((want * 0.7..want * 1.1).contains(&mbit), "{what}: {mbit:.1} of {want} Mbit/s");
    Ok(())
}

/// Both ways at the rates of [`LIMITS`], with several connections as with one; nothing of it is dropped.
fn both_ways(setup: Setup) {
    let control = Control::new();
    scenario(&control.on(setup).vunet(&LIMITS), |bench| {
        bench.lab.start_iperf3()?;
        for connections in ["1", "4"] {
            let said = iperf3(bench, &["-P", connections])?;
            ensure_near("from the guest", arrived(&said), FROM_GUEST)?;
            let again = said["end"]["sum_sent"]["retransmits"].as_u64();
            println!("sent again: {again:?}");
            ensure!(again.is_some_and(|again| again < 20), "the guest sent {again:?} segments again");
            let said = iperf3(bench, &["-R", "-P", connections])?;
            ensure_near("to the guest", arrived(&said), TO_GUEST)?;
        }
        let counters = control.ctl(&["counters"])?;
        for direction in ["limited_from_guest", "limited_to_guest"] {
            let limited = &counters[direction];
            ensure!(limited["waits"].as_u64() > Some(100), "{direction}: {counters}");
            ensure!(limited["dropped_packets"] == 0, "{direction}: {counters}");
        }
        for reason in ["over_limit", "table_full", "link_refused", "socket_refused"] {
            ensure!(counters["drops"].get(reason).is_none(), "{counters}");
        }
        ensure!(counters["retransmits"].as_u64() < Some(20), "{counters}");
        Ok(())
    });
}

#[test]
fn limits_are_met_over_sockets() {
    both_ways(Setup::new());
}

#[test]
fn limits_are_met_over_sockets_with_two_queues() {
    both_ways(Setup::new().vunet(&["--queues", "2"]).guest(&["--queues", "2"]));
}

#[test]
fn limits_are_met_on_a_bridge() {
    both_ways(Setup::on_bridge());
}

#[test]
fn limits_are_met_behind_an_address_on_a_link() {
    both_ways(Setup::translated());
}

#[test]
fn connections_share_a_limit_evenly() {
    let setup = Setup::new().tools(&["iperf3"]).vunet(&LIMITS);
    scenario(&setup, |bench| {
        bench.lab.start_iperf3()?;
        for direction in [&[][..], &["-R"]] {
            let said = iperf3(bench, &[direction, &["-P", "4"]].concat())?;
            let streams = said["end"]["streams"].as_array().map(Vec::as_slice).unwrap_or_default();
            let rates: Vec<f64> =
                streams.iter().filter_map(|stream| stream["receiver"]["bits_per_second"].as_f64()).collect();
            println!("{direction:?}: {rates:.0?}");
            let (least, most) =
                (rates.iter().copied().fold(f64::MAX, f64::min), rates.iter().copied().fold(0.0, f64::max));
            ensure!(rates.len() == 4 && least > 0.75 * most, "{direction:?}: {rates:.0?}");
        }
        Ok(())
    });
}

#[test]
fn a_flood_of_datagrams_leaves_a_connection_its_share() {
    let control = Control::new();
    scenario(&control.on(Setup::new()).vunet(&LIMITS), |bench| {
        bench.lab.start_iperf3()?;
        let other = bench.lab.world.spawn(&["iperf3", "-s", "-p", "5202", "--forceflush"])?;
        other.wait_line(SHORT, "iperf3", |line| line.contains("Server listening"))?;
        let to = ["iperf3", "-c", "192.0.2.2", "-p", "5202", "--forceflush"];
        let flood = ["-u", "-b", "200M", "-l", "1400", "-t", "20"];
        let mut flood = bench.lab.guest.spawn(&[&to[..], &flood].concat())?;
        flood.wait_line(SHORT, "iperf3", |line| line.contains("connected to"))?;
        let mbit = arrived(&iperf3(bench, &[])?);
        println!("beside a flood: {mbit:.1} Mbit/s");
        ensure!(mbit > 0.3 * FROM_GUEST && mbit < 0.8 * FROM_GUEST, "{mbit:.1} of {FROM_GUEST} Mbit/s");
        let counters = control.ctl(&["counters"])?;
        ensure!(counters["drops"]["over_limit"].as_u64() > Some(1000), "{counters}");
        // Names are answered all the same.
        let answer = bench.in_guest(&["dig", "+short", "+timeout=1", "host.vunet.internal"])?;
        ensure!(answer.contains("10.0.2.1"), "{answer}");
        ensure!(flood.is_running(), "the flood was over before");
        Ok(())
    });
}

/// That the guest sends as fast as it can.
fn is_free(bench: &Bench) -> Outcome {
    let mbit = arrived(&iperf3(bench, &[])?);
    ensure!((3.0 * FROM_GUEST..).contains(&mbit), "without a limit: {mbit:.1} Mbit/s");
    Ok(())
}

#[test]
fn limits_change_while_a_guest_is_there() {
    let control = Control::new();
    for setup in [Setup::new(), Setup::on_bridge()] {
        scenario(&control.on(setup), |bench| {
            bench.lab.start_iperf3()?;
            is_free(bench)?;
            let set = control.ctl(&["limits", "set", "--from-guest", "rate=40mbit"])?;
            ensure!(set["from_guest"]["rate_bytes_per_second"] == 5_000_000, "{set}");
            ensure_near("limited", arrived(&iperf3(bench, &[])?), FROM_GUEST)?;
            control.ctl(&["limits", "set", "--from-guest", "rate=80mbit"])?;
            ensure_near("limited less", arrived(&iperf3(bench, &[])?), 80.0)?;
            control.ctl(&["limits", "set", "--from-guest", "none"])?;
            is_free(bench)
        });
    }
}

#[test]
fn limits_of_the_settings_are_read_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("vm.toml");
    fs::write(&file, "limit-from-guest = 'rate=80mbit'\n").expect("a file");
    let setup = Setup::new().tools(&["iperf3"]).vunet(&["--config", &file.display().to_string()]);
    scenario(&setup, |bench| {
        bench.lab.start_iperf3()?;
        ensure_near("at first", arrived(&iperf3(bench, &[])?), 80.0)?;
        fs::write(&file, "limit-from-guest = 'rate=40mbit'\n")?;
        vunet_integration::lab::run(&["kill", "-HUP", &bench.vunet.process.pid().to_string()], SHORT)?;
        let read = |line: &str| line.contains("settings read again") && line.contains("limit-from-guest");
        bench.vunet.process.wait_error(PATIENCE, "the settings", read)?;
        ensure_near("read again", arrived(&iperf3(bench, &[])?), FROM_GUEST)
    });
}

#[test]
fn new_flows_are_limited_behind_an_address_on_a_link() {
    let control = Control::new();
    for setup in [Setup::new(), Setup::translated()] {
        let limit = ["--limit-from-guest", "flows=5,flows-burst=5"];
        scenario(&control.on(setup).vunet(&limit), |bench| {
            std::thread::sleep(Duration::from_secs(1));
            let tries = 30;
            let begun = (0..tries)
                .filter(|_| {
                    let addr = (vunet_integration::lab::WORLD, vunet_integration::world::ports::ECHO);
                    bench.connect(addr, Duration::from_millis(50)).is_ok()
                })
                .count();
            // 5 at once, and 5 a second for a second and a half at most.
            println!("{begun} of {tries} began");
            ensure!((5..=15).contains(&begun), "{begun} of {tries} began");
            let counters = control.ctl(&["counters"])?;
            ensure!(counters["limited_from_guest"]["refused_flows"].as_u64() > Some(8), "{counters}");
            Ok(())
        });
    }
}
