//! Bulk transfers, many connections, half-closes and datagrams.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use vunet_integration::lab::{self, WORLD};
use vunet_integration::world::{self, End, pattern, ports};

use crate::bench::{
    ANSWER_BYTES_MAX, Bench, Failure, MIB, Outcome, PATIENCE, Setup, allow_files, bare, ensure, fail,
    integration_binary, scenario,
};

#[test]
fn both_ways_64_mib_byte_for_byte() {
    scenario(&Setup::new().tools(&["curl"]), |bench| bench.http_both_ways(64 * MIB, 64));
}

#[test]
fn an_upload_ended_by_half_close_gets_its_answer() {
    scenario(&Setup::new(), |bench| {
        for count in [0, 1, 1000, MIB, 64 * MIB] {
            let mut stream = bench.connect_world(ports::DIGEST)?;
            pattern::send(count, count, &mut stream)?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            let got = (&stream).take(ANSWER_BYTES_MAX).read_to_string(&mut answer);
            got.map_err(|e| Failure(format!("answer to {count} bytes: {e}")))?;
            let want = format!("{} {count}\n", pattern::sha256(count, count));
            ensure!(answer == want, "answer to {count} bytes: {answer:?} instead of {want:?}");
        }
        Ok(())
    });
}

#[test]
fn a_server_that_half_closes_still_hears_the_guest() {
    scenario(&Setup::new(), |bench| {
        let mut stream = bench.connect_world(ports::HALF_CLOSE)?;
        let mut greeting = String::new();
        (&stream).take(ANSWER_BYTES_MAX).read_to_string(&mut greeting)?;
        ensure!(greeting == "your turn\n", "{greeting:?}");
        pattern::send(5, 4 * MIB, &mut stream)?;
        drop(stream);
        let end = bench.lab.wait_end(PATIENCE, "the half-closed upload", |e| e.service == "half_close")?;
        ensure!(end.bytes == 4 * MIB && end.how == End::Fin, "{end}");
        Ok(())
    });
}

#[test]
fn both_directions_of_one_connection_run_at_once() {
    scenario(&Setup::new(), |bench| {
        let mut stream = bench.connect_world(ports::ECHO)?;
        let mut writer = stream.try_clone()?;
        let sender = std::thread::spawn(move || {
            pattern::send(11, 32 * MIB, &mut writer)?;
            writer.shutdown(Shutdown::Write)
        });
        pattern::expect(11, 32 * MIB, &mut stream)?;
        ensure!(stream.read(&mut [0])? == 0, "more came back than was sent");
        sender.join().map_err(|_| Failure("the sender panicked".into()))??;
        Ok(())
    });
}

#[test]
fn a_guest_that_stops_reading_gets_the_rest_later() {
    scenario(&Setup::new(), |bench| {
        let mut streams = Vec::new();
        for seed in 0..5 {
            let mut stream = bench.connect_world(ports::SOURCE)?;
            stream.write_all(format!("{} {seed}\n", 16 * MIB).as_bytes())?;
            streams.push((seed, stream));
        }
        // Long enough for every window on the way to be full.
        std::thread::sleep(Duration::from_secs(2));
        bench.http_both_ways(MIB, 1)?;
        for (seed, stream) in &mut streams {
            pattern::expect(*seed, 16 * MIB, stream)?;
        }
        Ok(())
    });
}

fn iperf3(bench: &Bench, args: &[&str]) -> Outcome {
    let world = WORLD.to_string();
    let mut words = vec!["iperf3", "-c", &world, "-J", "-t", "5", "-i", "1", "--connect-timeout", "3000"];
    words.extend(args);
    let output = bench.lab.guest.run(&words, Duration::from_secs(30))?.stdout;
    let report: serde_json::Value = serde_json::from_str(&output)?;
    let mut rates = Vec::new();
    for interval in report["intervals"].as_array().into_iter().flatten() {
        let sum = &interval["sum"];
        // The tail end of a run may be a fraction of an interval.
        if sum["seconds"].as_f64().unwrap_or(0.0) > 0.9 {
            rates.push(sum["bits_per_second"].as_f64().unwrap_or(0.0) / 1e6);
        }
    }
    println!("iperf3 {args:?}: {rates:.0?} Mbit/s");
    ensure!(rates.len() >= 4, "iperf3 {args:?} reported {rates:?}: {output}");
    ensure!(rates.iter().all(|rate| *rate > 1.0), "iperf3 {args:?} stalled: {rates:?} Mbit/s");
    Ok(())
}

#[test]
fn nothing_stalls_at_the_default_socket_buffer_limits() {
    scenario(&Setup::new().tools(&["iperf3"]), |bench| {
        let _limits = lab::BufferLimits::set(212_992)?;
        bench.lab.start_iperf3()?;
        iperf3(bench, &[])?;
        iperf3(bench, &["-R"])?;
        iperf3(bench, &["-P", "4"])?;
        iperf3(bench, &["-P", "4", "-R"])
    });
}

#[test]
fn frames_made_in_guest_memory_come_back() {
    bare(&Setup::new(), |bench| {
        let (binary, socket) =
            (integration_binary().display().to_string(), bench.vunet.socket.display().to_string());
        for (size, features) in [("46", "all"), ("64", "none"), ("1514", "all")] {
            let target = format!("udp:{size}:{WORLD}:{}", ports::ECHO);
            let words = [
                &*binary,
                "frames",
                "--socket",
                &socket,
                "--generate",
                &target,
                "--seconds",
                "1",
                "--features",
                features,
            ];
            let output = lab::run(&words, PATIENCE)?.stdout;
            let report: serde_json::Value = serde_json::from_str(output.lines().last().unwrap_or_default())?;
            let number = |name: &str| report[name].as_u64().unwrap_or(0);
            let (sent, received) = (number("sent"), number("received"));
            println!("{size} B: {sent} frames sent, {received} received in a second");
            ensure!(sent > 5_000 && received > 1_000, "{size} B: {report}");
            let mean = number("received_bytes") / received;
            let want: u64 = size.parse()?;
            ensure!(mean.abs_diff(want) <= 1, "frames of {size} B came back with {mean} B on average");
        }
        Ok(())
    });
}

/// Starts `count` connections from the guest to `addr` before any is waited for.
fn connect_at_once(bench: &Bench, addr: SocketAddr, count: usize) -> Result<Vec<TcpStream>, Failure> {
    let mut streams = Vec::new();
    bench.lab.guest.inside(|| {
        for _ in 0..count {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            match socket.connect(&addr.into()) {
                Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => return Err(e),
                _ => streams.push(TcpStream::from(socket)),
            }
        }
        Ok(())
    })?;
    for stream in &streams {
        // A blocking write waits for the connection as well.
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    Ok(streams)
}

#[test]
fn a_thousand_connections_at_once() {
    if let Err(failure) = allow_files(16_384) {
        panic!("{failure:?}");
    }
    scenario(&Setup::new(), |bench| {
        let mut streams = connect_at_once(bench, (WORLD, ports::ECHO).into(), 1000)?;
        for round in 0..2 {
            for (index, stream) in streams.iter_mut().enumerate() {
                let wrote = stream.write_all(format!("line {round} of {index:05}\n").as_bytes());
                wrote.map_err(|e| Failure(format!("connection {index}, round {round}: {e}")))?;
            }
            for (index, stream) in streams.iter_mut().enumerate() {
                let want = format!("line {round} of {index:05}\n");
                let mut got = vec![0; want.len()];
                let read = stream.read_exact(&mut got);
                read.map_err(|e| Failure(format!("connection {index}, round {round}: {e}")))?;
                ensure!(got == want.as_bytes(), "connection {index} got {:?}", String::from_utf8_lossy(&got));
            }
        }
        Ok(())
    });
}

#[test]
fn a_hundred_small_files_over_one_and_over_many_connections() {
    scenario(&Setup::new().tools(&["curl"]), |bench| {
        let url = format!("http://{WORLD}/small/[1-100]");
        let file = |index: &str| bench.lab.dir().join(format!("small-{index}")).display().to_string();
        let target = file("#1");
        let base = ["curl", "-sS", "--fail", "-m", "30", "-o", &target, "-w", "%{num_connects}\n", &url];
        for (more, connections) in [
            (&[][..], 1..=1),
            (&["-H", "Connection: close"], 100..=100),
            (&["--parallel", "--parallel-max", "50"], 1..=100),
        ] {
            let output = bench.in_guest(&[&base[..], more].concat())?;
            let made: u32 = output.lines().filter_map(|line| line.trim().parse::<u32>().ok()).sum();
            ensure!(connections.contains(&made), "{more:?} made {made} connections");
            for index in 1..=100 {
                let got = std::fs::read_to_string(file(&index.to_string()))?;
                ensure!(got == world::small_file(index), "file {index} differs with {more:?}");
            }
        }
        Ok(())
    });
}

#[test]
fn datagrams_of_any_size_both_ways() {
    scenario(&Setup::new(), |bench| {
        let socket = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.connect((WORLD, ports::ECHO))?;
        let mut got = vec![0; 65_536];
        for size in [0usize, 1, 512, 1471, 1472, 1473, 2000, 2960, 8972, 30_000, 65_507] {
            let mut sent = vec![0; size];
            pattern::Pattern::new(size as u64).fill(&mut sent);
            socket.send(&sent)?;
            let len = socket.recv(&mut got).map_err(|e| Failure(format!("echo of {size} bytes: {e}")))?;
            ensure!(got[..len] == sent, "{size} bytes came back as {len} others");
        }
        Ok(())
    });
}

#[test]
fn a_burst_of_datagrams_arrives() {
    scenario(&Setup::new(), |bench| {
        let socket = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect((WORLD, ports::BURST))?;
        // Fewer than the default receive buffer of a socket holds, so none needs to be lost anywhere.
        socket.send(b"64 1200")?;
        let mut seen = std::collections::BTreeSet::new();
        let mut got = [0; 2048];
        while let Ok(len) = socket.recv(&mut got) {
            ensure!(len == 1200, "a datagram of {len} bytes");
            seen.insert(u32::from_le_bytes([got[0], got[1], got[2], got[3]]));
            if seen.len() == 64 {
                break;
            }
        }
        ensure!(seen.len() == 64, "{} of 64 datagrams arrived", seen.len());
        Ok(())
    });
}

#[test]
fn a_hundred_stalled_flows_harm_nothing_else() {
    scenario(&Setup::new().tools(&["ping", "curl"]), |bench| {
        let mut stalled = connect_at_once(bench, (WORLD, ports::STALL).into(), 100)?;
        fill(&mut stalled)?;
        let world = WORLD.to_string();
        let pinged = bench.in_guest(&["ping", "-n", "-q", "-c", "20", "-i", "0.05", "-W", "1", &world])?;
        ensure!(pinged.contains("20 received"), "{pinged}");
        let resolved = bench.in_guest(&["dig", "+short", "+time=1", "+tries=1", "www.example.test"])?;
        ensure!(resolved.trim() == world, "{resolved}");
        let started = Instant::now();
        bench.http_both_ways(32 * MIB, 3)?;
        println!("32 MiB both ways beside 100 stalled flows took {:?}", started.elapsed());
        let lease = bench.lease()?;
        ensure!(lease.ip == lab::GUEST, "{lease:?}");
        Ok(())
    });
}

/// Writes to all connections until none of them takes any more.
fn fill(streams: &mut [TcpStream]) -> Outcome {
    let chunk = vec![0x55; 64 << 10];
    let mut total = 0u64;
    let mut last_progress = Instant::now();
    while last_progress.elapsed() < Duration::from_millis(500) {
        for stream in &mut *streams {
            stream.set_nonblocking(true)?;
            match stream.write(&chunk) {
                Ok(n) => {
                    total += n as u64;
                    last_progress = Instant::now();
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => fail!("a stalled flow failed after {total} bytes of all: {e}"),
            }
        }
        ensure!(total < 4096 * MIB, "flows nobody reads took {total} bytes");
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("{} stalled flows took {total} bytes", streams.len());
    Ok(())
}
