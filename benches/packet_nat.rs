//! The packet NAT's table: what a packet of a known flow costs, and a new flow.
//!
//! Packets come for flows at random, which is the worst a cache can meet. Each is looked up, read and touched
//! while time goes on, as a translation does.

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};
use vunet::engine::packet::flow::{Flow, FlowFlags, FlowKey, Ticks};
use vunet::engine::packet::random::Random;
use vunet::engine::packet::table::{FlowTable, TableConfig};
use vunet::time::Instant;
use vunet::wire::ipv4::Protocol;

/// Flows under way.
const SIZES: [u32; 4] = [1, 1024, 65_536, 1_000_000];

/// Packets in one turn, each of a random flow.
const PACKETS: usize = 1 << 16;

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

criterion_group!(flows, packets, new_flows);

fn main() {
    flows();
    Criterion::default().configure_from_args().final_summary();
}
