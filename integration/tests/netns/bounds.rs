//! Limits are met in order, never by failing.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::SockRef;
use vunet_integration::lab::{BackendOptions, GATEWAY, WORLD};
use vunet_integration::world::ports;

use crate::bench::{
    ANSWER_BYTES_MAX, Bench, Failure, MIB, Outcome, PATIENCE, Setup, allow_files, bare, ensure, scenario,
};

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
fn two_thousand_short_connections_leave_nothing_behind() {
    scenario(&Setup::new(), |bench| {
        let before = open_files(bench)?;
        std::thread::scope(|scope| {
            let bench = &*bench;
            let churn = || {
                for _ in 0..500 {
                    // The server closes first, so that the guest does not run out of ports.
                    let mut text = String::new();
                    bench.connect_world(ports::PEER)?.take(ANSWER_BYTES_MAX).read_to_string(&mut text)?;
                    ensure!(text.starts_with("192.0.2.1:"), "{text:?}");
                }
                Ok(())
            };
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(churn)).collect();
            workers.into_iter().try_for_each(|worker| {
                worker.join().unwrap_or_else(|_| Err(Failure("a client panicked".into())))
            })
        })?;
        let deadline = Instant::now() + PATIENCE;
        while open_files(bench)? > before {
            ensure!(Instant::now() < deadline, "{} files open, {before} before", open_files(bench)?);
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    });
}

#[test]
#[ignore = "takes a minute: part of the long tests"]
fn a_thousand_front_ends_leave_nothing_behind() {
    bare(&Setup::new(), |bench| {
        let mut first = None;
        for round in 0..1000 {
            bench.attach(&[])?;
            match round % 3 {
                0 => drop(bench.detach()?),
                _ => bench.guest.take().expect("just attached").process.kill(),
            }
            if round == 100 {
                first = Some(footprint(bench)?);
            }
        }
        std::thread::sleep(Duration::from_millis(500));
        let (files, threads, kib) = first.expect("more than a hundred rounds");
        let (files_now, threads_now, kib_now) = footprint(bench)?;
        println!(
            "files {files} to {files_now}, threads {threads} to {threads_now}, RSS {kib} to {kib_now} KiB"
        );
        ensure!(files_now <= files && threads_now <= threads, "files or threads grow");
        ensure!(kib_now <= kib + 1024, "memory grows");
        Ok(())
    });
}

/// vunet's open files, threads and resident KiB.
fn footprint(bench: &Bench) -> Result<(usize, usize, u64), Failure> {
    let proc = format!("/proc/{}", bench.vunet.process.pid());
    let threads = std::fs::read_dir(format!("{proc}/task"))?.count();
    let status = std::fs::read_to_string(format!("{proc}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default();
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    Ok((open_files(bench)?, threads, kib))
}

#[test]
fn an_idle_vunet_does_not_wake() {
    scenario(&Setup::new(), |bench| {
        let _idle = bench.connect_world(ports::ECHO)?;
        // Whatever the guest's own stack sends at first (router solicitations) is over by then.
        bench.lab.guest.sysctl("net.ipv6.conf.eth0.disable_ipv6", "1")?;
        std::thread::sleep(Duration::from_secs(3));
        let before = switches(bench)?;
        std::thread::sleep(Duration::from_secs(3));
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

/// A host with ten ports for all its connections to one place.
const PORTS_FEW: usize = 10;

#[test]
fn a_host_without_a_port_left_mixes_up_no_connections_and_goes_on_once_it_has_one() {
    scenario(&Setup::new(), |bench| {
        bench.lab.host.sysctl("net.ipv4.ip_local_port_range", "41000 41009")?;
        let mut streams = Vec::new();
        for index in 0..PORTS_FEW {
            let mut stream = bench.connect_world(ports::ECHO)?;
            ensure!(exchange(&mut stream, &format!("connection {index}\n"))?, "connection {index} differs");
            streams.push(stream);
        }
        let world = SocketAddr::from((WORLD, ports::ECHO));
        let short = Duration::from_secs(1);
        let eleventh = bench.lab.guest.inside(|| TcpStream::connect_timeout(&world, short));
        ensure!(
            eleventh.as_ref().is_err_and(|error| error.kind() == ErrorKind::TimedOut),
            "one connection too many: {eleventh:?}"
        );
        for (index, stream) in streams.iter_mut().enumerate() {
            ensure!(exchange(stream, &format!("again {index}\n"))?, "connection {index} differs by now");
        }
        // Reset, or the world's TIME-WAIT would keep the ports.
        for stream in streams.drain(..) {
            SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        }
        let mut stream = bench.connect_world(ports::ECHO)?;
        ensure!(exchange(&mut stream, "at last\n")?, "the next connection differs");
        Ok(())
    });
}

#[test]
fn as_many_published_ports_as_may_be_cost_little_memory() {
    if let Err(failure) = allow_files(16_384) {
        panic!("{failure:?}");
    }
    let mut setup = Setup::new();
    setup.vunet = BackendOptions::args(&["--publish", "20001-24096:20001-24096"]);
    scenario(&setup, |bench| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", bench.vunet.process.pid()))?;
        // Its own, without the program's pages that processes share.
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        println!("{kib} KiB with 4,096 ports");
        ensure!(kib < 10 << 10, "{kib} KiB");
        Ok(())
    });
}
