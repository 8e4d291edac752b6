//! Limits are met in order, never by failing.

use std::io::{Read, Write};
use std::net::TcpStream;

use vunet_integration::lab::{GATEWAY, WORLD};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, MIB, Outcome, Setup, allow_files, ensure, scenario};

fn exchange(stream: &mut TcpStream, text: &str) -> std::io::Result<bool> {
    stream.write_all(text.as_bytes())?;
    let mut got = vec![0; text.len()];
    stream.read_exact(&mut got)?;
    Ok(got == text.as_bytes())
}

fn open_files(bench: &Bench) -> Result<usize, Failure> {
    Ok(std::fs::read_dir(format!("/proc/{}/fd", bench.vunet.process.pid()))?.count())
}

#[test]
fn three_thousand_connections_under_a_limit_of_1024_files() {
    if let Err(failure) = allow_files(16_384) {
        panic!("{failure:?}");
    }
    let mut setup = Setup::new().tools(&["ping", "curl", "prlimit"]);
    setup.vunet.open_files_max = Some(1024);
    scenario(&setup, |bench| {
        let mut streams = Vec::new();
        let mut most = 0;
        for index in 0..3000 {
            let mut stream = bench.connect_world(ports::ECHO)?;
            let same = exchange(&mut stream, &format!("hello {index}\n"));
            let same = same.map_err(|e| Failure(format!("connection {index}: {e}")))?;
            ensure!(same, "connection {index} got something else back");
            streams.push(stream);
            if index % 100 == 0 {
                most = most.max(open_files(bench)?);
            }
        }
        println!("vunet had at most {most} files open");
        ensure!(most < 1024, "{most} files open");
        check_survivors(&mut streams)?;
        let pinged = bench.in_guest(&["ping", "-n", "-q", "-c", "5", "-i", "0.05", &WORLD.to_string()])?;
        ensure!(pinged.contains("5 received"), "{pinged}");
        let name = bench.in_guest(&["dig", "+short", &format!("@{GATEWAY}"), "www.example.test"])?;
        ensure!(name.trim() == WORLD.to_string(), "{name:?}");
        bench.http_both_ways(4 * MIB, 1)?;
        let errors = bench.vunet.process.errors().join("\n");
        ensure!(!errors.contains("Too many open files"), "vunet ran out of files");
        Ok(())
    });
}

/// The newest connections must still work, the oldest must have been reset.
fn check_survivors(streams: &mut [TcpStream]) -> Outcome {
    let count = streams.len();
    for (index, stream) in streams.iter_mut().enumerate().skip(count - 200) {
        let same = exchange(stream, "still there?\n");
        ensure!(matches!(same, Ok(true)), "connection {index} of {count}: {same:?}");
    }
    for (index, stream) in streams.iter_mut().enumerate().take(200) {
        let alive = exchange(stream, "still there?\n");
        ensure!(alive.is_err(), "connection {index} of {count} outlived newer ones");
    }
    Ok(())
}

#[test]
fn an_idle_vunet_does_not_wake() {
    scenario(&Setup::new(), |bench| {
        let _idle = bench.connect_world(ports::ECHO)?;
        // Whatever the guest's own stack sends at first (router solicitations) is over by then.
        bench.lab.guest.sysctl("net.ipv6.conf.eth0.disable_ipv6", "1")?;
        std::thread::sleep(std::time::Duration::from_secs(3));
        let before = switches(bench)?;
        std::thread::sleep(std::time::Duration::from_secs(3));
        let woke = switches(bench)? - before;
        println!("{woke} context switches in 3 idle seconds");
        ensure!(woke <= 3, "{woke} context switches in 3 idle seconds");
        Ok(())
    });
}

/// Voluntary context switches of all vunet's threads.
fn switches(bench: &Bench) -> Result<u64, Failure> {
    let mut sum = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", bench.vunet.process.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let line =
            status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap_or_default();
        sum += line.split_whitespace().last().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(sum)
}
