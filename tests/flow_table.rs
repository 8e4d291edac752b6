//! What the packet NAT's flows take of memory. A process of its own, because it counts with the process's allocator.

#[path = "support/heap.rs"]
mod heap;

use std::net::Ipv4Addr;

use vunet::engine::packet::flow::{Flow, FlowFlags, FlowKey, Ticks};
use vunet::engine::packet::table::{FlowTable, TableConfig};
use vunet::time::Instant;
use vunet::wire::ipv4::Protocol;

const MIB: isize = 1 << 20;

fn flow(n: u32) -> Flow {
    let key = FlowKey {
        guest: Ipv4Addr::from_bits(0x0a00_0000 + n % 200),
        remote: Ipv4Addr::from_bits(0xc612_0000 + n / 16_384),
        guest_port: (n % 16_384) as u16,
        remote_port: 443,
        external_port: (n % 16_384) as u16,
        protocol: Protocol::TCP,
    };
    Flow::new(key, FlowFlags::NONE, Ticks(0), 7_440_000)
}

#[test]
fn a_million_flows_take_at_most_160_mib_and_what_is_under_way_takes_nothing_more() {
    let before = heap::held_bytes();
    let flows = 1_000_000;
    let config = TableConfig { flows_max: flows as usize, guest_flows_max: flows as usize, seed: (1, 2) };
    let mut table = FlowTable::new(&config, Instant::ZERO).expect("a table");
    let mut most = 0;
    for n in 0..flows {
        table.insert(flow(n)).expect("room");
        most = most.max(heap::held_bytes() - before);
    }
    assert_eq!(table.len(), flows as usize);
    assert!(most <= 160 * MIB, "{most} bytes at most");
    assert_eq!(table.rekeyed(), 0);
    let stands = heap::held_bytes();
    for n in (0..flows).step_by(7) {
        let at = table.find_outbound(&flow(n).key().outbound()).expect("known");
        table.touch(at, Ticks(n), 240_000);
        let at = table.find_inbound(&flow(n).key().inbound()).expect("known");
        table.touch(at, Ticks(n + 1), 7_440_000);
    }
    table.expire(Instant::from_micros(1_000_000_000), |_| panic!("none is due"));
    assert_eq!(heap::held_bytes(), stands);
}
