//! iperf3 both ways at once, nc with half-closes, NTP, and dig past the gateway's resolver.

use std::fs;
use std::thread;

use serde_json::Value;
use vunet_integration::lab::{self, BIG_TXT_BYTES, BIG_TXT_NAME, SHORT, WORLD};
use vunet_integration::world::{pattern, ports};

use super::{Dialogue, IDLE};
use crate::bench::{MIB, PATIENCE, Setup, ensure, scenario};

const NC_PORT: &str = "5001";

#[test]
fn iperf3_both_ways_at_once_stalls_neither() {
    scenario(&Setup::new().tools(&["iperf3"]), |bench| {
        bench.lab.start_iperf3()?;
        let world = WORLD.to_string();
        let words =
            ["iperf3", "-c", &world, "-J", "--bidir", "-t", "4", "-P", "2", "--connect-timeout", "3000"];
        let said: Value = serde_json::from_str(&bench.in_guest(&words)?)?;
        for direction in ["sum", "sum_bidir_reverse"] {
            let intervals = said["intervals"].as_array().map(Vec::as_slice).unwrap_or_default();
            let rates: Vec<f64> = intervals
                .iter()
                // The tail end of a run may be a fraction of an interval.
                .filter(|interval| {
                    interval[direction]["seconds"].as_f64().is_some_and(|seconds| seconds > 0.9)
                })
                .filter_map(|interval| Some(interval[direction]["bits_per_second"].as_f64()? / 1e6))
                .collect();
            println!("{direction}: {rates:.0?} Mbit/s");
            ensure!(
                rates.len() >= 3 && rates.iter().all(|rate| *rate > 10.0),
                "{direction}: {rates:?} Mbit/s"
            );
        }
        Ok(())
    });
}

#[test]
fn nc_that_half_closes_gets_the_answer() {
    scenario(&Setup::new().tools(&["nc.openbsd"]), |bench| {
        let (world, port) = (WORLD.to_string(), ports::DIGEST.to_string());
        let mut upload = Vec::new();
        pattern::send(3, MIB, &mut upload)?;
        let mut nc = Dialogue::start(&bench.lab.guest, &["nc.openbsd", "-N", &world, &port])?;
        let (first, second) = upload.split_at(100_000);
        nc.say(first)?;
        thread::sleep(IDLE / 2);
        nc.say(second)?;
        let answer = nc.end()?;
        ensure!(answer == format!("{} {MIB}\n", pattern::sha256(3, MIB)), "{answer}");
        Ok(())
    });
}

#[test]
fn nc_half_closed_by_the_server_sends_the_rest_after_a_while() {
    scenario(&Setup::new().tools(&["nc.openbsd"]), |bench| {
        let received = bench.lab.dir().join("received");
        let script = format!("echo your turn | nc.openbsd -n -N -v -l {NC_PORT} >{}", received.display());
        let mut server = bench.lab.world.spawn(&["sh", "-c", &script])?;
        server.wait_error(SHORT, "nc", |line| line.contains("Listening"))?;
        let mut nc = Dialogue::start(&bench.lab.guest, &["nc.openbsd", "-N", &WORLD.to_string(), NC_PORT])?;
        nc.expect(b"your turn\n")?;
        nc.say(b"before\n")?;
        // The world's side is half-closed meanwhile.
        thread::sleep(IDLE);
        let mut rest = b"after\n".to_vec();
        pattern::send(4, MIB, &mut rest)?;
        nc.say(&rest)?;
        let more = nc.end()?;
        ensure!(more.is_empty(), "{more:?} came behind the server's end");
        let deadline = std::time::Instant::now() + PATIENCE;
        while server.is_running() && std::time::Instant::now() < deadline {
            thread::sleep(std::time::Duration::from_millis(10));
        }
        ensure!(fs::read(&received)? == [&b"before\n"[..], &rest].concat(), "the rest did not arrive whole");
        Ok(())
    });
}

#[test]
fn ntp_finds_the_worlds_clock() {
    scenario(&Setup::new().tools(&["chronyd"]), |bench| {
        let chronyd = lab::find_tool("chronyd").expect("the scenario needs it").display().to_string();
        let file = |name: &str| bench.lab.dir().join(name);
        let (config, pid) = (file("chrony.conf"), file("server.pid").display().to_string());
        let address = WORLD.to_string();
        let lines = ["local stratum 8", "allow", &format!("bindaddress {address}"), "cmdport 0"];
        fs::write(&config, lines.join("\n") + &format!("\npidfile {pid}\n"))?;
        let config = config.display().to_string();
        // -x: nobody sets this machine's clock.
        let server = bench.lab.world.spawn(&[&chronyd, "-d", "-x", "-u", "root", "-f", &config])?;
        server.wait_error(SHORT, "chronyd", |line| line.contains("starting"))?;
        let (source, pid) = (
            format!("server {address} iburst maxsamples 2"),
            format!("pidfile {}", file("client.pid").display()),
        );
        let words = [&*chronyd, "-Q", "-t", "15", "-u", "root", "-f", "/dev/null"];
        let output = bench.lab.guest.run(&[&words[..], &[&source, &pid, "cmdport 0"]].concat(), PATIENCE);
        let said = output.map(|output| output.stdout + &output.stderr)?;
        let offset = said.split_once("wrong by ").and_then(|(_, rest)| rest.split_whitespace().next());
        let Some(offset) = offset.and_then(|word| word.parse::<f64>().ok()) else {
            crate::bench::fail!("no offset: {said}");
        };
        // One clock for both: the difference is the way's.
        let is_close = offset.abs() <= 0.1;
        ensure!(is_close, "{offset} s");
        Ok(())
    });
}

#[test]
fn dig_asks_a_resolver_of_the_world_over_udp_and_tcp() {
    scenario(&Setup::new(), |bench| {
        let server = format!("@{WORLD}");
        let dig =
            |words: &[&str]| bench.in_guest(&[&["dig", &*server, "+time=3", "+tries=2"], words].concat());
        for way in ["+notcp", "+tcp"] {
            let answer = dig(&[way, "+short", "www.example.test"])?;
            ensure!(answer.trim() == WORLD.to_string(), "{way}: {answer}");
        }
        for words in [&["+bufsize=4096", "+notcp", "+ignore"][..], &["+bufsize=512"], &["+tcp"]] {
            let answer = dig(&[words, &["TXT", BIG_TXT_NAME]].concat())?;
            let is_whole = answer.matches("TXT").count() >= 2 && answer.len() >= BIG_TXT_BYTES;
            ensure!(is_whole && !answer.contains(" tc"), "{words:?}: {answer}");
        }
        let truncated = dig(&["+bufsize=512", "+ignore", "+notcp", "TXT", BIG_TXT_NAME])?;
        ensure!(truncated.contains(" tc"), "{truncated}");
        Ok(())
    });
}
