//! System calls of the worker, counted by `strace` while a known payload passes: bulk TCP both ways,
//! requests and responses, bursts of UDP both ways.
//!
//! Traced calls take longer, so batches are larger than at full speed, on a loaded machine smaller:
//! bounds are a frame's, or 64 KiB of payload's, and leave room for both.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Shutdown, UdpSocket};

use vunet_integration::guest::Counters;
use vunet_integration::lab::{Process, SHORT, WORLD};
use vunet_integration::world::{pattern, ports};

use crate::bench::{ANSWER_BYTES_MAX, Bench, Failure, MIB, Outcome, PATIENCE, Setup, ensure, scenario, skip};

/// Payload of a bulk transfer.
const BULK_BYTES: u64 = 64 * MIB;
/// Exchanges of one byte each way.
const EXCHANGES: u64 = 2000;
/// Datagrams sent at once, few enough for any socket's queue.
const BURST: u64 = 32;
const BURSTS: u64 = 60;
const DATAGRAM_BYTES: usize = 1200;
/// A port of the world without a service.
const UDP_PORT: u16 = 9100;

/// What a transfer cost.
struct Cost {
    /// System calls of the worker by name.
    calls: BTreeMap<String, u64>,
    frames_from_guest: u64,
    frames_to_guest: u64,
    payload_bytes: u64,
}

impl Cost {
    fn calls(&self, names: &[&str]) -> u64 {
        names.iter().filter_map(|name| self.calls.get(*name)).sum()
    }

    fn total(&self) -> u64 {
        self.calls.values().sum()
    }

    /// Batches: each begins by waiting.
    fn waits(&self) -> u64 {
        self.calls(&["epoll_wait"])
    }

    /// The total for each 64 KiB of payload.
    fn per_64_kib(&self) -> f64 {
        self.total() as f64 * 65_536.0 / self.payload_bytes as f64
    }

    fn print(&self, title: &str) {
        let mut text = String::new();
        for (name, count) in &self.calls {
            let _ = write!(text, " {name} {count}");
        }
        println!(
            "{title}: {} bytes, {} frames from and {} to the guest, {} calls, {:.2} for each 64 KiB:{text}",
            self.payload_bytes,
            self.frames_from_guest,
            self.frames_to_guest,
            self.total(),
            self.per_64_kib()
        );
    }
}

/// The thread id of vunet's only worker.
fn worker_id(bench: &Bench) -> Result<String, Failure> {
    for task in std::fs::read_dir(format!("/proc/{}/task", bench.vunet.process.pid()))? {
        let task = task?;
        if std::fs::read_to_string(task.path().join("comm"))?.trim() == "worker-0" {
            return Ok(task.file_name().to_string_lossy().into_owned());
        }
    }
    Err(Failure("vunet has no thread worker-0".into()))
}

/// The counts in a table of `strace -c`: its last column is the name, its fourth the calls.
fn parse(table: &str) -> BTreeMap<String, u64> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let calls = words.get(3)?.parse().ok()?;
        let name = (*words.last()?).to_owned();
        (name != "total").then_some((name, calls))
    };
    table.lines().filter_map(row).collect()
}

/// Counts the worker's calls while `transfer` moves `payload_bytes`.
fn cost_of(bench: &Bench, payload_bytes: u64, transfer: impl FnOnce() -> Outcome) -> Result<Cost, Failure> {
    let table = bench.lab.dir().join("strace").display().to_string();
    let before: Counters = bench.front_end().counters()?;
    let mut strace = Process::start(&["strace", "-c", "-o", &table, "-p", &worker_id(bench)?])?;
    strace.wait_error(SHORT, "strace", |line| line.contains("attached"))?;
    transfer()?;
    strace.stop();
    let after = bench.front_end().counters()?;
    let cost = Cost {
        calls: parse(&std::fs::read_to_string(&table)?),
        frames_from_guest: after.frames_from_guest - before.frames_from_guest,
        frames_to_guest: after.frames_to_guest - before.frames_to_guest,
        payload_bytes,
    };
    ensure!(cost.waits() > 0, "strace saw no worker: {:?}", cost.calls);
    Ok(cost)
}

fn setup() -> Setup {
    Setup::new().tools(&["strace"]).vunet(&["--queues", "1"]).guest(&["--queues", "1"])
}

/// Calls by one of these names, and how many there may be.
type Bound<'a> = (&'a [&'a str], u64);

/// Calls to open and close a flow, and what else is not a frame's or a batch's doing.
const OTHERS_MAX: u64 = 40;

/// Checks the bounds given, those of any batch, and that nothing else is called.
fn ensure_bounds(cost: &Cost, title: &str, bounds: &[Bound<'_>]) -> Outcome {
    cost.print(title);
    let (waits, frames) = (cost.waits(), cost.frames_from_guest + cost.frames_to_guest);
    let of_batches: [Bound<'_>; 3] = [
        // Deadlines and sockets that can be written again wake the worker as well.
        (&["epoll_wait"], 2 * frames + 100),
        // A kick of each ring may come at once, and a notification of each may go; rarely both.
        (&["preadv2", "read"], waits * 3 / 2 + OTHERS_MAX),
        (&["write"], waits * 3 / 2 + OTHERS_MAX),
    ];
    let mut others = cost.total();
    for (names, at_most) in of_batches.iter().chain(bounds) {
        let count = cost.calls(names);
        ensure!(count <= *at_most, "{title}: {count} of {names:?}, at most {at_most} expected");
        others -= count;
    }
    ensure!(others <= OTHERS_MAX, "{title}: {others} other calls: {:?}", cost.calls);
    Ok(())
}

fn upload(bench: &Bench) -> Outcome {
    let mut stream = bench.connect_world(ports::DIGEST)?;
    pattern::send(3, BULK_BYTES, &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    (&stream).take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
    let want = format!("{} {BULK_BYTES}\n", pattern::sha256(3, BULK_BYTES));
    ensure!(answer == want, "{answer:?} instead of {want:?}");
    Ok(())
}

#[test]
fn tcp_from_the_guest_costs_one_send_a_frame() {
    scenario(&setup(), |bench| {
        let cost = cost_of(bench, BULK_BYTES, || upload(bench))?;
        // Once a batch: how much room the socket has; and if that is little, to be told of more.
        let once_a_batch = cost.waits() + OTHERS_MAX;
        let bounds: [Bound<'_>; 3] = [
            (&["sendmsg"], cost.frames_from_guest),
            (&["getsockopt"], once_a_batch),
            (&["epoll_ctl"], once_a_batch),
        ];
        ensure_bounds(&cost, "TCP from the guest", &bounds)?;
        // A frame a batch, of 48 KiB: the worst that passes.
        ensure!(
            cost.total() * 65_536 < 9 * cost.payload_bytes,
            "{:.2} calls for each 64 KiB",
            cost.per_64_kib()
        );
        Ok(())
    });
}

/// Whether TCP is peeked at an offset (Linux 6.9): without it a peek costs more calls.
fn peeks_at_an_offset() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).filter_map(|text| text.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(9))
}

fn download(bench: &Bench) -> Outcome {
    let mut stream = bench.connect_world(ports::SOURCE)?;
    stream.write_all(format!("{BULK_BYTES} 3\n").as_bytes())?;
    Ok(pattern::expect(3, BULK_BYTES, &mut stream)?)
}

#[test]
fn tcp_to_the_guest_costs_one_peek_and_at_most_one_discard_a_frame() {
    if !peeks_at_an_offset() {
        return skip("needs SO_PEEK_OFF for TCP (Linux 6.9)");
    }
    scenario(&setup(), |bench| {
        let cost = cost_of(bench, BULK_BYTES, || download(bench))?;
        let bounds: [Bound<'_>; 2] = [
            // A peek now and then finds nothing.
            (&["recvmsg"], cost.frames_to_guest * 5 / 4 + OTHERS_MAX),
            // What was acknowledged leaves the socket.
            (&["recvfrom"], cost.frames_from_guest),
        ];
        ensure_bounds(&cost, "TCP to the guest", &bounds)?;
        ensure!(
            cost.total() * 65_536 < 8 * cost.payload_bytes,
            "{:.2} calls for each 64 KiB",
            cost.per_64_kib()
        );
        Ok(())
    });
}

#[test]
fn a_tcp_exchange_costs_a_fixed_number_of_calls() {
    scenario(&setup(), |bench| {
        let mut stream = bench.connect_world(ports::ECHO)?;
        stream.set_nodelay(true)?;
        let cost = cost_of(bench, 2 * EXCHANGES, || {
            for _ in 0..EXCHANGES {
                stream.write_all(b"?")?;
                stream.read_exact(&mut [0])?;
            }
            Ok(())
        })?;
        let one_each = EXCHANGES + EXCHANGES / 10;
        let bounds: [Bound<'_>; 4] = [
            (&["sendmsg"], one_each),
            (&["getsockopt"], one_each),
            (&["recvmsg"], one_each),
            (&["recvfrom"], one_each),
        ];
        ensure_bounds(&cost, "TCP exchanges", &bounds)?;
        // Two batches: wait, kick, send, room, notify; wait, peek, notify, and the discard in either.
        ensure!(cost.total() * 10 < 98 * EXCHANGES, "{} calls in {EXCHANGES} exchanges", cost.total());
        Ok(())
    });
}

/// The world's socket and the guest's, connected to it.
fn udp_pair(bench: &Bench) -> Result<(UdpSocket, UdpSocket), Failure> {
    let world = bench.lab.world.inside(|| UdpSocket::bind((WORLD, UDP_PORT)))?;
    let guest = bench.lab.guest.inside(|| UdpSocket::bind("0.0.0.0:0"))?;
    guest.connect((WORLD, UDP_PORT))?;
    world.set_read_timeout(Some(PATIENCE))?;
    guest.set_read_timeout(Some(PATIENCE))?;
    Ok((world, guest))
}

#[test]
fn udp_from_the_guest_costs_at_most_one_send_a_datagram() {
    scenario(&setup(), |bench| {
        let (world, guest) = udp_pair(bench)?;
        let bytes = [0x55; DATAGRAM_BYTES];
        let cost = cost_of(bench, BURST * BURSTS * DATAGRAM_BYTES as u64, || {
            for _ in 0..BURSTS {
                (0..BURST).try_for_each(|_| guest.send(&bytes).map(drop))?;
                (0..BURST).try_for_each(|_| world.recv(&mut [0; 2 * DATAGRAM_BYTES]).map(drop))?;
            }
            Ok(())
        })?;
        let bounds: [Bound<'_>; 2] = [
            (&["sendmsg"], cost.frames_from_guest),
            // A socket that can be written again is looked at.
            (&["recvmmsg"], cost.waits()),
        ];
        ensure_bounds(&cost, "UDP from the guest", &bounds)
    });
}

#[test]
fn udp_to_the_guest_is_read_in_batches() {
    scenario(&setup(), |bench| {
        let (world, guest) = udp_pair(bench)?;
        guest.send(b"?")?;
        let (_, back) = world.recv_from(&mut [0; 100])?;
        let bytes = [0x55; DATAGRAM_BYTES];
        let cost = cost_of(bench, BURST * BURSTS * DATAGRAM_BYTES as u64, || {
            for _ in 0..BURSTS {
                (0..BURST).try_for_each(|_| world.send_to(&bytes, back).map(drop))?;
                (0..BURST).try_for_each(|_| guest.recv(&mut [0; 2 * DATAGRAM_BYTES]).map(drop))?;
            }
            Ok(())
        })?;
        // Sixteen messages at once, and at the end of each of two turns a look that finds fewer.
        let reads = cost.frames_to_guest / 16 + 2 * cost.waits();
        ensure_bounds(&cost, "UDP to the guest", &[(&["recvmmsg"], reads)])
    });
}
