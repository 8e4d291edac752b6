//! The packet NAT: what a packet of a known flow costs, in the table alone and translated whole, and a new flow.
//!
//! Packets come for flows at random, which is the worst a cache can meet, and time goes on while they do.
//! A translation works on a copy of the frame's first 64 bytes, as the device makes one; the copy is in the figure. Packets
//! come in the batches a worker takes from a ring or a link, which it tells the NAT of before the first.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group};
use vunet::engine::packet::config::PacketNatConfig;
use vunet::engine::packet::flow::{Flow, FlowFlags, FlowKey, Ticks};
use vunet::engine::packet::head::Packet;
use vunet::engine::packet::ports::Mappings;
use vunet::engine::packet::random::Random;
use vunet::engine::packet::table::{FlowTable, TableConfig};
use vunet::engine::packet::{PacketNat, Side, Verdict};
use vunet::limits::PACKET_AHEAD_FRAMES;
use vunet::time::Instant;
use vunet::wire::checksum::{Accumulator, pseudo_header};
use vunet::wire::ipv4::Protocol;
use vunet::wire::vnet::VnetHeader;

/// Flows under way.
const SIZES: [u32; 4] = [1, 1024, 65_536, 1_000_000];

/// Packets in one turn, each of a random flow: so many that their flows fit in no cache.
const PACKETS: usize = 1 << 18;

/// Packets in a millisecond of the table's time: about what one worker carries.
const PACKETS_PER_MS: usize = 1 << 13;

/// How long TCP lives, in milliseconds.
const TIMEOUT_MS: u32 = 7_440_000;

/// Ports of the range of external ports.
const PORTS: u32 = 16_384;

/// The nth flow: all ports of one guest, each to as many hosts as it takes.
fn key(n: u32) -> FlowKey {
    let port = 49_152 + (n % PORTS) as u16;
    FlowKey {
        guest: Ipv4Addr::new(10, 0, 2, 2),
        remote: Ipv4Addr::from_bits(0xc612_0000 + n / PORTS),
        guest_port: port,
        remote_port: 443,
        external_port: port,
        protocol: Protocol::TCP,
    }
}

fn empty_table(flows: u32) -> FlowTable {
    let flows_max = flows as usize;
    let config = TableConfig { flows_max, guest_flows_max: flows_max, seed: (1, 2) };
    FlowTable::new(&config, Instant::ZERO).expect("a table")
}

fn table(flows: u32) -> FlowTable {
    let mut table = empty_table(flows);
    for n in 0..flows {
        table.insert(Flow::new(key(n), FlowFlags::NONE, Ticks(0), TIMEOUT_MS)).expect("room");
    }
    table
}

fn order(flows: u32) -> Vec<u32> {
    let mut random = Random::new((3, 4));
    (0..PACKETS).map(|_| random.below(flows)).collect()
}

fn packets(c: &mut Criterion) {
    let mut group = c.benchmark_group("packet NAT, lookup and touch");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for flows in SIZES {
        let mut table = table(flows);
        let order = order(flows);
        let mut carried = 0;
        let mut now = || {
            carried += 1;
            Ticks((carried / PACKETS_PER_MS) as u32)
        };
        group.bench_function(BenchmarkId::new("from the guest", flows), |b| {
            b.iter(|| {
                for n in &order {
                    let at = table.find_outbound(&key(*n).outbound()).expect("known");
                    black_box(table.flow(at).key().external_port);
                    table.touch(at, now(), TIMEOUT_MS);
                }
            });
        });
        group.bench_function(BenchmarkId::new("from the world", flows), |b| {
            b.iter(|| {
                for n in &order {
                    let at = table.find_inbound(&key(*n).inbound()).expect("known");
                    black_box(table.flow(at).key().guest_port);
                    table.touch(at, now(), TIMEOUT_MS);
                }
            });
        });
    }
    group.finish();
}

fn new_flows(c: &mut Criterion) {
    let mut group = c.benchmark_group("packet NAT, new flows");
    group.sample_size(10);
    for flows in [65_536, 1_000_000] {
        group.throughput(Throughput::Elements(flows.into()));
        group.bench_function(BenchmarkId::new("into an empty table", flows), |b| {
            b.iter_with_large_drop(|| table(flows));
        });
        let mut full = table(flows);
        let mut next = flows;
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("in place of the longest idle", flows), |b| {
            b.iter(|| {
                let key = key(next);
                next = next.wrapping_add(1);
                let victim = full.crowded(key.guest).expect("full");
                full.remove(victim).expect("it lives");
                full.insert(Flow::new(key, FlowFlags::NONE, Ticks(next >> 10), TIMEOUT_MS)).expect("room");
            });
        });
    }
    group.finish();
}

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A frame, whole.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Frame([u8; 64]);

/// A frame of UDP, or of TCP without payload, with these ends and this beginning behind the ports.
fn frame(
    protocol: Protocol,
    src: (Ipv4Addr, u16),
    dst: (Ipv4Addr, u16),
    rest: &[u8],
    checksum_at: usize,
) -> Frame {
    let mut bytes = [0; 64];
    let len_bytes = 4 + rest.len();
    bytes[12..14].copy_from_slice(&[0x08, 0x00]);
    bytes[14] = 0x45;
    bytes[16..18].copy_from_slice(&(20 + len_bytes as u16).to_be_bytes());
    bytes[22..24].copy_from_slice(&[64, protocol.0]);
    bytes[26..30].copy_from_slice(&src.0.octets());
    bytes[30..34].copy_from_slice(&dst.0.octets());
    let mut sum = Accumulator::new();
    sum.add_bytes(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&sum.finish().to_be_bytes());
    bytes[34..36].copy_from_slice(&src.1.to_be_bytes());
    bytes[36..38].copy_from_slice(&dst.1.to_be_bytes());
    bytes[38..34 + len_bytes].copy_from_slice(rest);
    let mut sum = pseudo_header(src.0.into(), dst.0.into(), protocol, len_bytes);
    sum.add_bytes(&bytes[34..34 + len_bytes]);
    bytes[34 + checksum_at..36 + checksum_at].copy_from_slice(&sum.finish().to_be_bytes());
    Frame(bytes)
}

fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16)) -> Frame {
    let mut rest = [0x5a; 26];
    rest[..4].copy_from_slice(&[0, 30, 0, 0]);
    frame(Protocol::UDP, src, dst, &rest, 6)
}

fn tcp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), flags: u8, seq: u32, ack: u32) -> Frame {
    let mut rest = [0; 16];
    rest[..4].copy_from_slice(&seq.to_be_bytes());
    rest[4..8].copy_from_slice(&ack.to_be_bytes());
    rest[8..12].copy_from_slice(&[0x50, flags, 0x20, 0]);
    frame(Protocol::TCP, src, dst, &rest, 16)
}

/// The nth flow's ends: guest, remote, and the guest's as the world sees it.
fn ends(n: u32) -> [(Ipv4Addr, u16); 3] {
    let key = key(n);
    [(GUEST, key.guest_port), (key.remote, key.remote_port), (OUTSIDE, key.external_port)]
}

/// What passes a flow once it stands, both ways.
fn steady(protocol: Protocol, n: u32) -> [Frame; 2] {
    let [guest, remote, outside] = ends(n);
    match protocol {
        Protocol::TCP => [tcp(guest, remote, ACK, 101, 901), tcp(remote, outside, ACK, 901, 101)],
        _ => [udp(guest, remote), udp(remote, outside)],
    }
}

struct Nat {
    nat: PacketNat,
    now: Instant,
    carried: usize,
}

impl Nat {
    fn new(flows: u32) -> Nat {
        let config = PacketNatConfig {
            outside: Some(OUTSIDE),
            flows_max: flows as usize,
            guest_flows_max: flows as usize,
            ..PacketNatConfig::new(
                "10.0.2.0/24".parse().expect("a subnet"),
                Ipv4Addr::new(10, 0, 2, 1),
                (3, 4),
            )
        };
        let mappings = Arc::new(Mutex::new(Mappings::new(config.ports.clone(), (5, 6))));
        let now = Instant::from_micros(1_000_000);
        Nat { nat: PacketNat::new(config, mappings, now).expect("memory"), now, carried: 0 }
    }

    /// With so many flows under way.
    fn standing(protocol: Protocol, flows: u32) -> Nat {
        let mut nat = Nat::new(flows);
        for n in 0..flows {
            let [guest, remote, outside] = ends(n);
            if protocol == Protocol::TCP {
                nat.out(&tcp(guest, remote, SYN, 100, 0));
                nat.inn(&tcp(remote, outside, SYN | ACK, 900, 101));
            }
            let [out, inn] = steady(protocol, n);
            nat.out(&out);
            nat.inn(&inn);
            nat.out(&out);
        }
        nat
    }

    fn pass(&mut self) {
        self.carried += 1;
        self.now = Instant::from_micros(1_000_000 + (self.carried / PACKETS_PER_MS * 1000) as u64);
    }

    /// Packets of one side, taken as a worker takes them.
    fn batches(&mut self, side: Side, frames: &[Frame]) {
        for batch in frames.chunks(PACKET_AHEAD_FRAMES) {
            self.nat.expect(side, batch.iter().map(|frame| &frame.0[..]));
            match side {
                Side::Guest => batch.iter().for_each(|frame| self.out(frame)),
                Side::World => batch.iter().for_each(|frame| self.inn(frame)),
            }
        }
    }

    fn out(&mut self, frame: &Frame) {
        let mut copy = *frame;
        self.pass();
        let vnet = VnetHeader::default();
        let verdict = self.nat.from_guest(self.now, &mut Packet::new(&vnet, &mut copy.0, 64));
        assert_eq!(verdict, Verdict::Forward);
        black_box(&copy);
    }

    fn inn(&mut self, frame: &Frame) {
        let mut copy = *frame;
        self.pass();
        let vnet = VnetHeader::default();
        let verdict = self.nat.from_world(self.now, &mut Packet::new(&vnet, &mut copy.0, 64));
        assert_eq!(verdict, Verdict::Forward);
        black_box(&copy);
    }
}

fn translation(c: &mut Criterion) {
    for (protocol, name) in [(Protocol::UDP, "UDP"), (Protocol::TCP, "TCP")] {
        let mut group = c.benchmark_group(format!("packet NAT, {name} of 64 bytes"));
        group.throughput(Throughput::Elements(PACKETS as u64));
        for flows in SIZES {
            let mut nat = Nat::standing(protocol, flows);
            let order = order(flows);
            let sides = [(Side::Guest, "from the guest"), (Side::World, "from the world")];
            for (at, (side, name)) in sides.into_iter().enumerate() {
                let frames: Vec<Frame> = order.iter().map(|n| steady(protocol, *n)[at]).collect();
                group.bench_function(BenchmarkId::new(name, flows), |b| {
                    b.iter(|| nat.batches(side, &frames));
                });
            }
        }
        group.finish();
    }
}

fn new_translations(c: &mut Criterion) {
    let mut group = c.benchmark_group("packet NAT, first packets");
    group.sample_size(10);
    let flows = 65_536;
    let frames: Vec<Frame> = (0..flows).map(|n| tcp(ends(n)[0], ends(n)[1], SYN, 100, 0)).collect();
    group.throughput(Throughput::Elements(flows.into()));
    group.bench_function("TCP", |b| {
        b.iter_batched(
            || Nat::new(flows),
            |mut nat| {
                frames.iter().for_each(|frame| nat.out(frame));
                nat
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(flows, packets, new_flows, translation, new_translations);

fn main() {
    flows();
    Criterion::default().configure_from_args().final_summary();
}
