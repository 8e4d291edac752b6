//! The link with a WAN's faults, measured against what it claims. vunet has no part in these.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use vunet_integration::lab::{self, HOST, Lab, WORLD};
use vunet_integration::link::{Counters, Line, LinkReport, Settings};
use vunet_integration::world::ports;

use crate::bench::{Failure, MIB, Outcome, PATIENCE, ensure, integration_binary, skip};

/// Datagrams of the tests that count them.
const DATAGRAMS: u32 = 2000;

/// Runs `body` in a lab whose host and world are joined by a link with `args`.
fn over_link(tools: &[&str], args: &[&str], body: impl FnOnce(&mut Lab) -> Outcome) {
    if let Some(reason) = lab::missing(&[&["ip", "sysctl", "dnsmasq"], tools].concat()) {
        return skip(&reason);
    }
    let mut lab = Lab::over_link(integration_binary(), args).unwrap_or_else(|e| panic!("{e}"));
    if let Err(failure) = body(&mut lab) {
        panic!("{failure:?}");
    }
}

/// Gives both ends the other's MAC address, so that no ARP takes part.
fn fix_neighbours(lab: &Lab) -> Outcome {
    for (from, address, interface, to, peer) in
        [(&lab.world, WORLD, "e0", &lab.host, "p0"), (&lab.host, HOST, "p0", &lab.world, "e0")]
    {
        let mac = from.run(&["cat", &format!("/sys/class/net/{interface}/address")], PATIENCE)?.stdout;
        let address = address.to_string();
        to.run(&["ip", "neigh", "replace", &address, "lladdr", mac.trim(), "dev", peer], PATIENCE)?;
    }
    Ok(())
}

/// Sends numbered datagrams from host to world; the numbers that arrive, in order.
fn numbers_received(lab: &Lab) -> Result<Vec<u32>, Failure> {
    fix_neighbours(lab)?;
    let receiver = lab.world.inside(|| UdpSocket::bind((WORLD, 5555)))?;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let sender = lab.host.inside(|| UdpSocket::bind((HOST, 0)))?;
    sender.connect((WORLD, 5555))?;
    let reader = std::thread::spawn(move || {
        let (mut numbers, mut datagram) = (Vec::new(), [0; 100]);
        while receiver.recv(&mut datagram).is_ok() {
            numbers.push(u32::from_le_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]));
        }
        numbers
    });
    let mut datagram = [0; 100];
    for number in 0..DATAGRAMS {
        datagram[..4].copy_from_slice(&number.to_le_bytes());
        sender.send(&datagram)?;
        if number % 50 == 49 {
            // So that the reader keeps up and no socket's queue overflows.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let numbers = reader.join().map_err(|_| Failure("the reader panicked".into()))?;
    Ok(numbers)
}

/// Which of as many frames a line with these settings and seed lets through.
fn numbers_expected(settings: &str, seed: u64) -> Result<Vec<u32>, Failure> {
    let settings: Settings = settings.parse().map_err(Failure)?;
    let mut line = Line::new(settings, seed);
    let mut numbers = Vec::new();
    for number in 0..DATAGRAMS {
        let now = Duration::from_secs(number.into());
        line.offer(now, &[0; 154]);
        while line.take_due(now).is_some() {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

#[test]
fn frames_that_are_lost_and_doubled_are_those_of_the_seed() {
    let faults = "loss=10%,duplicate=5%";
    let want = numbers_expected(faults, 77).unwrap_or_else(|e| panic!("{e:?}"));
    assert!((1_700..2_000).contains(&want.len()), "{}", want.len());
    over_link(&[], &["--to-b", faults, "--seed", "77"], |lab| {
        let got = numbers_received(lab)?;
        let report = lab.end_link()?;
        let same = got.iter().zip(&want).take_while(|(a, b)| a == b).count();
        ensure!(got == want, "{} numbers instead of {}, {same} alike; {report:?}", got.len(), want.len());
        let Counters { offered, delivered, .. } = report.to_second;
        ensure!(offered == u64::from(DATAGRAMS) && delivered == want.len() as u64, "{report:?}");
        Ok(())
    });
}

#[test]
fn a_ping_takes_the_delay_of_both_ways() {
    over_link(&["ping"], &["--to-b", "delay=20ms", "--to-a", "delay=5ms"], |lab| {
        let world = WORLD.to_string();
        let said = lab.host.run(&["ping", "-n", "-q", "-c", "20", "-i", "0.02", &world], PATIENCE)?.stdout;
        let times: Vec<f64> = said
            .split_once("mdev = ")
            .map(|(_, times)| times.split(['/', ' ']).filter_map(|word| word.parse().ok()).collect())
            .unwrap_or_default();
        let [min, average, ..] = times[..] else { return Err(Failure(said)) };
        println!("ping over 25 ms: {min} ms at least, {average} ms on average");
        // The rest is the machine's: never early, and late by the time processes take to be woken.
        ensure!((25.0..26.0).contains(&min), "{said}");
        Ok(())
    });
}

#[test]
fn bytes_survive_every_fault_at_once() {
    let faults = "delay=2ms,jitter=1ms,loss=1%,reorder=1%,duplicate=1%,corrupt=1%,rate=200mbit,queue=200kB";
    over_link(&["curl"], &["--to-b", faults, "--to-a", faults], |lab| {
        let url = format!("http://{WORLD}/bytes/{}?seed=5", 4 * MIB);
        let file = lab.dir().join("download").display().to_string();
        lab.host.run(&["curl", "-sS", "--fail", "-m", "60", "-o", &file, &url], 3 * PATIENCE)?;
        let got = lab::run(&["sha256sum", &file], PATIENCE)?.stdout;
        let want = vunet_integration::world::pattern::sha256(5, 4 * MIB);
        ensure!(got.starts_with(&want), "SHA-256 {got} instead of {want}");
        let report = lab.end_link()?;
        let Counters { lost, reordered, duplicated, corrupted, .. } = report.to_first;
        println!("{report:?}");
        ensure!([lost, reordered, duplicated, corrupted].iter().all(|count| *count > 0), "{report:?}");
        Ok(())
    });
}

/// Carries as much as goes for two seconds; bits of payload a second.
fn rate(lab: &mut Lab) -> Result<f64, Failure> {
    lab.start_iperf3()?;
    let world = WORLD.to_string();
    let words = ["iperf3", "-c", &world, "-J", "-t", "2", "--connect-timeout", "3000"];
    let said = lab.host.run(&words, PATIENCE)?.stdout;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    said["end"]["sum_received"]["bits_per_second"].as_f64().ok_or_else(|| Failure(said.to_string()))
}

fn carried(report: &LinkReport) -> u64 {
    report.to_second.delivered
}

#[test]
fn a_rate_is_not_exceeded_and_nearly_reached() {
    for more in [&[][..], &["--no-segmentation"]] {
        let args = [&["--to-b", "rate=50mbit,queue=250kB"], more].concat();
        over_link(&["iperf3"], &args, |lab| {
            let rate = rate(lab)?;
            let report = lab.end_link()?;
            println!("{more:?}: {:.1} Mbit/s over 50; {report:?}", rate / 1e6);
            // 1,448 of 1,514 bytes are payload; a busy machine may leave the link idle for a while.
            let in_bounds = (30e6..48.5e6).contains(&rate);
            ensure!(in_bounds, "{rate} bit/s over 50 Mbit/s");
            // Two seconds of full frames.
            ensure!(carried(&report) > 4_000, "{report:?}");
            Ok(())
        });
    }
}

#[test]
fn a_link_without_faults_adds_none() {
    over_link(&["iperf3"], &[], |lab| {
        let started = Instant::now();
        let rate = rate(lab)?;
        let report = lab.end_link()?;
        println!("{:.2} Gbit/s in {:?}; {report:?}", rate / 1e9, started.elapsed());
        let is_fast = rate > 100e6;
        ensure!(is_fast, "{rate} bit/s over a link without a rate");
        for Counters { offered, delivered, .. } in [report.to_first, report.to_second] {
            ensure!(offered == delivered, "{report:?}");
        }
        // The servers of the world are on it as well.
        let answered = lab.host.inside(|| {
            std::net::TcpStream::connect_timeout(&(WORLD, ports::ECHO).into(), Duration::from_millis(300))
        });
        ensure!(answered.is_err(), "the link is gone and the world still answers");
        Ok(())
    });
}
