//! Frames through the rings of a real device over shared memory: popped, completed and published; and
//! reserved, committed and published. The driver's part is not timed.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vunet::config::{Attach, IpMtu};
use vunet::device::{DeviceConfig, DeviceQueues, KickWatch, Taken, device};
use vunet::engine::guest_port::GuestPort;
use vunet::frame::QueuePair;
use vunet::wire::vnet::VnetHeader;

use support::Random;
use support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use support::nic::{EVENT_IDX, MRG_RXBUF, Nic, Shape};

#[expect(dead_code, reason = "the device tests use the rest")]
#[path = "../tests/support/mod.rs"]
mod support;

const SHAPE: Shape = Shape { rx_bytes: 0x11000, rx_pieces: 1, tx_pieces: 1, indirect: false };
/// Frames of a batch: fewer than a transmit ring of the driver's holds.
const BATCH: usize = 16;
const FRAME_BYTES: [usize; 3] = [64, 1500, 65_535];

/// Kicks are not waited for here.
struct NoKicks;

impl KickWatch for NoKicks {
    fn watch(&mut self, _: RawFd, _: u16) -> io::Result<()> {
        Ok(())
    }
    fn unwatch(&mut self, _: RawFd) {}
}

/// A device whose rings run, and its driver. The session ends with the process.
fn attached() -> (DeviceQueues, Nic, Frontend) {
    let config = DeviceConfig { mac: None, ip_mtu: IpMtu::DEFAULT, queue_pairs: 1, one_off: false };
    let (session, mut queues) = device(config, 1).expect("descriptors");
    let mut queues = queues.remove(0);
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let shutdown = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
    let session = session.spawn(Attach::Listen(path.clone()), shutdown).expect("a session");
    let front_end = std::thread::spawn(move || {
        let mut frontend = Frontend::connect(&path);
        let mut guest = Guest::new(256);
        guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF | EVENT_IDX);
        (Nic::new(guest, SHAPE), frontend)
    });
    while !front_end.is_finished() {
        queues.handle_commands(&mut NoKicks, &mut Vec::new());
        std::thread::yield_now();
    }
    let (nic, frontend) = front_end.join().expect("a front-end");
    drop(session);
    (queues, nic, frontend)
}

/// Runs `batch`, which returns the time one batch took, until `frames` are done.
fn timed(frames: u64, mut batch: impl FnMut() -> Duration) -> Duration {
    let batches = frames.div_ceil(BATCH as u64);
    let total: Duration = (0..batches).map(|_| batch()).sum();
    total.mul_f64(frames as f64 / (batches * BATCH as u64) as f64)
}

fn transmit(c: &mut Criterion) {
    let (mut queues, mut nic, _frontend) = attached();
    let mut random = Random::seeded();
    let mut group = c.benchmark_group("pop, complete, publish");
    for len in FRAME_BYTES {
        let frame = vec![0x55; len];
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("{len} bytes"), |b| {
            b.iter_custom(|frames| {
                timed(frames, || {
                    for _ in 0..BATCH {
                        assert!(nic.send(&VnetHeader::default().emit(), &frame, &mut random), "room");
                    }
                    let start = Instant::now();
                    let mut seen = 0;
                    queues.split().0.drain(QueuePair(0), 2 * BATCH, |_| {
                        seen += 1;
                        Taken::Yes
                    });
                    let took = start.elapsed();
                    assert_eq!(seen, BATCH + 1, "every frame, and the batch's end");
                    took
                })
            });
        });
    }
    group.finish();
}

fn receive(c: &mut Criterion) {
    let (mut queues, mut nic, _frontend) = attached();
    let mut random = Random::seeded();
    let mut group = c.benchmark_group("reserve, commit, publish");
    for len in FRAME_BYTES {
        let head = [0x55; 54];
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("{len} bytes"), |b| {
            b.iter_custom(|frames| {
                timed(frames, || {
                    nic.post_rx(usize::MAX, &mut random);
                    let start = Instant::now();
                    for _ in 0..BATCH {
                        let (_, rx) = queues.split();
                        rx.reserve(QueuePair(0), len, len).expect("buffers");
                        rx.commit(VnetHeader::default(), &head, len);
                    }
                    queues.publish();
                    let took = start.elapsed();
                    assert_eq!(nic.receive().len(), BATCH, "every frame");
                    took
                })
            });
        });
    }
    group.finish();
}

criterion_group!(rings, transmit, receive);

fn main() {
    rings();
    Criterion::default().configure_from_args().final_summary();
}
