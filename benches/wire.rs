//! Checksums, and headers parsed and written.

use std::hint::black_box;
use std::net::Ipv4Addr;

use criterion::{Criterion, Throughput, criterion_group};
use vunet::addr::MacAddr;
use vunet::wire::checksum::{self, Accumulator};
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags, Options, SeqNumber};
use vunet::wire::udp;
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for len in [64, 1500, 65_536] {
        let bytes = vec![0x5a; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("{len} bytes"), |b| {
            b.iter(|| {
                let mut sum = Accumulator::new();
                sum.add_bytes(black_box(&bytes));
                sum.finish()
            });
        });
    }
    group.throughput(Throughput::Elements(1));
    group.bench_function("update", |b| {
        b.iter(|| checksum::update(black_box(0xdd2f), black_box(0x5555), black_box(0x3285)));
    });
    group.finish();
}

fn tcp_header() -> tcp::Header {
    tcp::Header {
        src_port: 40_000,
        dst_port: 443,
        seq: SeqNumber(1),
        ack: SeqNumber(2),
        flags: Flags::ACK,
        window: 512,
        urgent: 0,
        options: Options { timestamps: Some((1, 2)), ..Options::default() },
    }
}

fn ip_header() -> ipv4::Header {
    ipv4::Header {
        src: Ipv4Addr::new(10, 0, 2, 2),
        dst: Ipv4Addr::new(192, 0, 2, 2),
        protocol: Protocol::TCP,
        ttl: 64,
        tos: 0,
        ident: 1,
        dont_fragment: true,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: 1480,
    }
}

fn vnet_header() -> VnetHeader {
    VnetHeader {
        checksum: Checksum::Partial { start: 34, offset: 16 },
        gso: Some(Gso { kind: GsoKind::Tcp4, size_bytes: 1448, headers_bytes: 66, ecn: false }),
        num_buffers: 1,
    }
}

fn emits(c: &mut Criterion) {
    let mut group = c.benchmark_group("emit");
    let ethernet = ethernet::Header { dst: MacAddr::GATEWAY, src: MacAddr::ZERO, ethertype: EtherType::IPV4 };
    let mut out = [0; 64];
    group.bench_function("ethernet", |b| b.iter(|| black_box(&ethernet).emit(black_box(&mut out))));
    let ip = ip_header();
    group.bench_function("ipv4", |b| b.iter(|| black_box(&ip).emit(black_box(&mut out))));
    let tcp = tcp_header();
    group.bench_function("tcp", |b| b.iter(|| black_box(&tcp).emit(black_box(&mut out))));
    let udp = udp::Header { src_port: 1, dst_port: 2, len_bytes: 1480, checksum: 3 };
    group.bench_function("udp", |b| b.iter(|| black_box(&udp).emit(black_box(&mut out))));
    let vnet = vnet_header();
    group.bench_function("vnet", |b| b.iter(|| black_box(&vnet).emit()));
    group.finish();
}

fn parses(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    let mut out = [0; 64];
    ethernet::Header { dst: MacAddr::GATEWAY, src: MacAddr::ZERO, ethertype: EtherType::IPV4 }.emit(&mut out);
    group.bench_function("ethernet", |b| b.iter(|| ethernet::Header::parse(black_box(&out))));
    ip_header().emit(&mut out);
    group.bench_function("ipv4", |b| b.iter(|| ipv4::Header::parse(black_box(&out), 1500)));
    tcp_header().emit(&mut out);
    group.bench_function("tcp", |b| b.iter(|| tcp::Header::parse(black_box(&out))));
    udp::Header { src_port: 1, dst_port: 2, len_bytes: 1480, checksum: 3 }.emit(&mut out);
    group.bench_function("udp", |b| b.iter(|| udp::Header::parse(black_box(&out), 1480)));
    let vnet = vnet_header().emit();
    group.bench_function("vnet", |b| b.iter(|| VnetHeader::parse(black_box(&vnet))));
    group.finish();
}

criterion_group!(wire, checksums, emits, parses);

fn main() {
    wire();
    Criterion::default().configure_from_args().final_summary();
}
