//! A UDP frame of the guest through the engine, over a host that takes everything and does nothing.

use std::hint::black_box;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use criterion::{Criterion, criterion_group};
use vunet::addr::MacAddr;
use vunet::config::{DnsConfig, IpMtu, Lan, Mode, NatConfig};
use vunet::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use vunet::engine::host_net::{
    Arrival, Close, HostDatagram, HostListener, HostNet, HostStream, SendSpace, Token,
};
use vunet::engine::{Engine, EngineConfig};
use vunet::frame::{Payload, PayloadMut, QueuePair, TxFrame};
use vunet::limits;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Instant;
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::udp;
use vunet::wire::vnet::{Checksum, VnetHeader};

/// Takes every datagram; has no streams.
struct NullHost;
struct NullSocket;
enum Never {}

impl HostStream for Never {
    type Detached = Never;

    fn detach(self) -> Never {
        self
    }
    fn take_error(&mut self) -> io::Result<()> {
        match *self {}
    }
    fn send(&mut self, _: &Payload<'_>) -> io::Result<usize> {
        match *self {}
    }
    fn peek(&mut self, _: usize, _: PayloadMut<'_>) -> io::Result<usize> {
        match *self {}
    }
    fn discard(&mut self, _: usize) -> io::Result<()> {
        match *self {}
    }
    fn send_space(&mut self) -> SendSpace {
        match *self {}
    }
    fn want_writable(&mut self) {
        match *self {}
    }
    fn shutdown_write(&mut self) -> io::Result<()> {
        match *self {}
    }
    fn close(self, _: Close) {
        match self {}
    }
}

impl HostListener for Never {
    type Stream = Never;

    fn accept(&mut self, _: Token) -> io::Result<(Never, SocketAddr)> {
        match *self {}
    }
}

impl HostDatagram for NullSocket {
    type Detached = NullSocket;

    fn detach(self) -> NullSocket {
        self
    }
    fn send_to(&mut self, _: &[u8], payload: &Payload<'_>, _: SocketAddr) -> io::Result<()> {
        black_box(payload.len());
        Ok(())
    }
    fn queue_to(&mut self, payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        self.send_to(&[], payload, to)
    }
    fn send_segments_to(&mut self, payload: &Payload<'_>, _: usize, to: SocketAddr) -> io::Result<()> {
        self.send_to(&[], payload, to)
    }
    fn recv_batch(&mut self, _: usize, _: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        Ok(false)
    }
}

impl HostNet for NullHost {
    type Stream = Never;
    type Datagram = NullSocket;
    type Listener = Never;

    fn connect(&mut self, _: Token, _: SocketAddr) -> io::Result<Never> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn attach(&mut self, _: Token, detached: Never) -> io::Result<Never> {
        Ok(detached)
    }
    fn attach_datagram(&mut self, _: Token, detached: NullSocket) -> io::Result<NullSocket> {
        Ok(detached)
    }
    fn connect_dns(&mut self, _: Token) -> io::Result<Never> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn udp(&mut self, _: Token, _: SocketAddr) -> io::Result<NullSocket> {
        Ok(NullSocket)
    }
    fn ping(&mut self, _: Token, _: IpAddr) -> io::Result<NullSocket> {
        Ok(NullSocket)
    }
    fn flush_datagrams(&mut self) -> u64 {
        0
    }
    fn is_own_address(&mut self, _: IpAddr) -> bool {
        false
    }
}

/// A guest that takes nothing.
struct NullPort;

impl GuestPort for NullPort {
    fn offloads(&self) -> GuestOffloads {
        GuestOffloads::default()
    }
    fn reserve(&mut self, _: QueuePair, _: usize, _: usize) -> Result<usize, ReserveError> {
        Err(ReserveError::Down)
    }
    fn reserved(&mut self, _: usize) -> PayloadMut<'_> {
        unreachable!("nothing is ever reserved")
    }
    fn commit(&mut self, _: VnetHeader, _: &[u8], _: usize) {
        unreachable!("nothing is ever reserved");
    }
    fn cancel(&mut self) {}
    fn buffers(&self, _: QueuePair) -> usize {
        0
    }
}

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn engine() -> Engine<NullHost> {
    let subnet = "10.0.2.0/24".parse().expect("a subnet");
    let gateway = Ipv4Addr::new(10, 0, 2, 1);
    let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
    let dns = DnsConfig { enabled: true, domain: DnsConfig::DEFAULT_DOMAIN.into(), hosts: Vec::new() };
    let config = EngineConfig {
        lan,
        dns: dns.clone(),
        mode: Mode::Nat(NatConfig::default()),
        mac: None,
        flows_max: limits::FLOWS_MAX,
        isn_secret: (1, 2),
        home: None,
    };
    let dhcp = Arc::new(Mutex::new(DhcpServer::new(&lan, &dns)));
    Engine::new(&config, NullHost, dhcp, Arc::new(DnsService::new(&dns, &lan, true)))
}

/// A frame with a datagram of `payload_bytes` without a checksum.
fn frame(payload_bytes: usize) -> Vec<u8> {
    let ip_at = ethernet::HEADER_BYTES;
    let udp_at = ip_at + ipv4::HEADER_BYTES;
    let len_bytes = udp::HEADER_BYTES + payload_bytes;
    let mut out = vec![0; udp_at + len_bytes];
    let src = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    ethernet::Header { dst: MacAddr::GATEWAY, src, ethertype: EtherType::IPV4 }.emit(&mut out);
    let ip = ipv4::Header {
        src: GUEST,
        dst: Ipv4Addr::new(192, 0, 2, 2),
        protocol: Protocol::UDP,
        ttl: 64,
        tos: 0,
        ident: 0,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: len_bytes,
    };
    ip.emit(&mut out[ip_at..]);
    udp::Header { src_port: 4000, dst_port: 9, len_bytes, checksum: 0 }.emit(&mut out[udp_at..]);
    out
}

fn udp_from_guest(c: &mut Criterion) {
    let mut group = c.benchmark_group("UDP from the guest");
    for payload_bytes in [22, 1458] {
        let mut engine = engine();
        let bytes = frame(payload_bytes);
        let head = &bytes[..bytes.len().min(limits::FRAME_HEAD_BYTES)];
        let vnet =
            VnetHeader { checksum: Checksum::Partial { start: 34, offset: 6 }, ..VnetHeader::default() };
        let whole = Payload::from_host(&bytes);
        let frame = TxFrame { vnet, head, whole, pair: QueuePair::default() };
        group.bench_function(format!("{} bytes", bytes.len()), |b| {
            b.iter(|| {
                engine.from_guest(Instant::ZERO, &mut NullPort, black_box(&frame));
                engine.end_of_frames(&mut NullPort);
            });
        });
        assert_eq!(engine.counters().dropped_total(), 0, "every frame was carried");
    }
    group.finish();
}

criterion_group!(frames, udp_from_guest);

fn main() {
    frames();
    Criterion::default().configure_from_args().final_summary();
}
