//! Workers of a guest whose packets are translated, with a link and a guest of the test's making.

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::tests::Port;
use super::{Left, LinkEnd, LinkParts, SharedStation, TranslationParts};
use crate::addr::{Ipv4Subnet, MacAddr};
use crate::config::{DnsConfig, IpMtu, Lan, LinkAddress, Mode, Publish, StationAddress};
use crate::engine::packet::PacketNat;
use crate::engine::packet::config::PacketNatConfig;
use crate::engine::packet::ports::Mappings;
use crate::engine::placement::{Directory, Home, WorkerId};
use crate::engine::station::{Station, StationConfig};
use crate::engine::{Engine, EngineConfig, emit};
use crate::frame::{Payload, QueuePair, TxFrame};
use crate::limits::FRAME_HEAD_BYTES;
use crate::rate_limit::RateLimits;
use crate::service::dhcp::DhcpServer;
use crate::service::dns::DnsService;
use crate::time::Instant;
use crate::uplink::sockets::HostSockets;
use crate::uplink::sys::poll::Poll;
use crate::uplink::sys::tap::TapQueue;
use crate::wire::checksum::Accumulator;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::VnetHeader;
use crate::wire::{arp, tcp};

pub(super) const GUEST: (MacAddr, Ipv4Addr) = (MacAddr([4; 6]), Ipv4Addr::new(10, 0, 2, 2));
pub(super) const OURS: (MacAddr, Ipv4Addr) = (MacAddr([0x02, 0, 0, 0, 0, 1]), Ipv4Addr::new(192, 0, 2, 50));
pub(super) const REMOTE: (MacAddr, Ipv4Addr) = (MacAddr([2, 0, 0, 0, 0, 2]), Ipv4Addr::new(192, 0, 2, 2));
/// Where the IP packet and its transport start.
pub(super) const IP_AT: usize = ethernet::HEADER_BYTES;
pub(super) const TRANSPORT_AT: usize = IP_AT + ipv4::HEADER_BYTES;

/// One worker, the guest's end of its queue pair, and the far end of its queue of the link.
pub(super) struct OneWorker {
    pub(super) end: LinkEnd,
    pub(super) engine: Engine<HostSockets>,
    pub(super) port: Port,
    far: UnixDatagram,
}

/// All of them.
pub(super) struct Rig {
    pub(super) workers: Vec<OneWorker>,
    pub(super) directory: Arc<Directory>,
    pub(super) now: Instant,
}

impl Rig {
    /// Workers whose station has its address and knows [`REMOTE`], and whose guest has been seen by none.
    pub(super) fn new(workers: u8, publish: &[Publish]) -> Rig {
        let subnet: Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
        let gateway = Ipv4Addr::new(10, 0, 2, 1);
        let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let held = LinkAddress { addr: OURS.1, subnet: "192.0.2.0/24".parse().unwrap(), router: None };
        let station =
            StationConfig { mac: OURS.0, address: StationAddress::Fixed(held), guests: subnet, seed: 3 };
        let station = Arc::new(SharedStation::new(Station::new(Instant::ZERO, station)));
        let mappings = Arc::new(Mutex::new(Mappings::new(49_152..=65_535, (1, 2))));
        let directory = Arc::new(Directory::default());
        let dns_config = DnsConfig::of_gateway(DnsConfig::DEFAULT_DOMAIN, gateway);
        let dhcp = Arc::new(Mutex::new(DhcpServer::new(&lan, &dns_config)));
        let dns = Arc::new(DnsService::new(&dns_config, &lan, false));
        let made = (0..workers).map(WorkerId).map(|own| {
            let (near, far) = UnixDatagram::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            let nat = PacketNatConfig {
                flows_max: 4096,
                guest_flows_max: 4096,
                worker: own,
                ..PacketNatConfig::new(subnet, gateway, (u64::from(own.0), 4))
            };
            let nat = PacketNat::new(nat, Arc::clone(&mappings), Instant::ZERO).unwrap();
            let (station, publish) = (Arc::clone(&station), publish.to_vec());
            let parts = TranslationParts { nat, station, guests: subnet, worker: own, publish };
            let link = LinkParts {
                queue: TapQueue::of_socket(near),
                vlan: None,
                guard: None,
                ip_mtu: IpMtu::DEFAULT,
                gateway: None,
                dhcp: None,
                translation: Some(parts),
                limits: RateLimits::default(),
            };
            let home = Home { own, workers, directory: Arc::clone(&directory) };
            let config = EngineConfig {
                lan,
                dns: dns_config.clone(),
                mode: Mode::Isolated,
                mac: None,
                flows_max: 64,
                isn_secret: (1, 2),
                home: (workers > 1).then_some(home),
            };
            let no_stream = Box::new(|| Err(io::Error::other("no DNS here")));
            let net = HostSockets::new(Poll::new().unwrap(), no_stream, true);
            let engine = Engine::new(&config, net, Arc::clone(&dhcp), Arc::clone(&dns));
            let mut end = LinkEnd::new(link);
            end.rings_up(Instant::ZERO, super::tests::TSO);
            OneWorker { end, engine, port: Port::new(1 << 20), far }
        });
        let mut rig = Rig { workers: made.collect(), directory, now: Instant::ZERO };
        for _ in 0..4 {
            rig.pass(Duration::from_millis(200));
        }
        // Who asks is known, and is answered.
        rig.comes(0, &asks_for_us());
        rig.left(0);
        rig
    }

    /// Time passes, and each worker does what is due.
    pub(super) fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        for worker in &mut self.workers {
            worker.end.notice_guest(self.now, worker.engine.guest_starts(self.now));
            worker.end.run_translation(self.now, &mut worker.engine, &mut worker.port);
            worker.end.deliver(self.now, &mut worker.port, QueuePair(0));
        }
    }

    /// A frame comes by a worker's queue of the link.
    pub(super) fn comes(&mut self, at: usize, frame: &[u8]) {
        let worker = &mut self.workers[at];
        worker.far.send(&[&VnetHeader::default().emit()[..], frame].concat()).unwrap();
        worker.end.is_readable();
        self.pass(Duration::ZERO);
    }

    /// The guest sends a frame by a worker's queue pair.
    pub(super) fn sends(&mut self, at: usize, frame: &[u8]) -> Left {
        self.sends_as(at, VnetHeader::default(), frame)
    }

    /// The same with a header of its own.
    pub(super) fn sends_as(&mut self, at: usize, vnet: VnetHeader, frame: &[u8]) -> Left {
        let OneWorker { end, engine, port, .. } = &mut self.workers[at];
        let head = &frame[..frame.len().min(FRAME_HEAD_BYTES)];
        end.notice_guest(self.now, engine.guest_starts(self.now));
        let frame = TxFrame { vnet, head, whole: Payload::from_host(frame), pair: QueuePair(0) };
        assert!(!end.is_for_us(self.now, &frame));
        end.forward_translated(self.now, &frame, engine, port)
    }

    /// What left by a worker's queue of the link, without its headers.
    pub(super) fn left(&mut self, at: usize) -> Vec<Vec<u8>> {
        let far = &self.workers[at].far;
        let mut bytes = vec![0; 1 << 17];
        std::iter::from_fn(|| {
            let len = far.recv(&mut bytes).ok()?;
            Some(bytes[12..len].to_vec())
        })
        .collect()
    }

    /// What came to the guest by a worker's queue pair.
    pub(super) fn came(&mut self, at: usize) -> Vec<Vec<u8>> {
        self.workers[at].port.came.drain(..).map(|(_, frame)| frame).collect()
    }

    /// Takes what workers have for each other to them, until nothing is left. Returns how many frames.
    pub(super) fn deliver_letters(&mut self) -> usize {
        let mut count = 0;
        loop {
            let mut next = None;
            for worker in &mut self.workers {
                next = worker.end.next_letter();
                if next.is_some() {
                    break;
                }
            }
            let Some((to, letter)) = next else { return count };
            let OneWorker { end, engine, port, .. } = &mut self.workers[usize::from(to.0)];
            end.letter(self.now, letter, engine, port);
            count += 1;
            assert!(count < 100_000, "frames go round");
        }
    }
}

/// A question of [`REMOTE`]'s for our address.
pub(super) fn asks_for_us() -> [u8; arp::FRAME_BYTES] {
    let packet = arp::Packet {
        operation: arp::Operation::Request,
        sender_mac: REMOTE.0,
        sender_ip: REMOTE.1,
        target_mac: MacAddr::ZERO,
        target_ip: OURS.1,
    };
    packet.frame(MacAddr::BROADCAST, REMOTE.0)
}

/// A frame around a transport message between the ends' addresses, from the guest or, without its MAC address, from
/// [`REMOTE`].
fn frame(src: Ipv4Addr, dst: Ipv4Addr, protocol: Protocol, transport: &[u8]) -> Vec<u8> {
    let (to, from) = if src.octets()[0] == 10 { (MacAddr::GATEWAY, GUEST.0) } else { (OURS.0, REMOTE.0) };
    let mut frame = vec![0; TRANSPORT_AT];
    ethernet::Header { dst: to, src: from, ethertype: EtherType::IPV4 }.emit(&mut frame);
    let header = ipv4::Header {
        src,
        dst,
        protocol,
        ttl: 64,
        tos: 0,
        ident: 7,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: transport.len(),
    };
    header.emit(&mut frame[IP_AT..]);
    frame.extend_from_slice(transport);
    frame
}

/// Puts the IP header's checksum right.
pub(super) fn sum_ip(frame: &mut [u8]) {
    frame[IP_AT + 10..IP_AT + 12].fill(0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&frame[IP_AT..TRANSPORT_AT]);
    frame[IP_AT + 10..IP_AT + 12].copy_from_slice(&sum.finish().to_be_bytes());
}

/// A datagram.
pub(super) fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    frame(src.0, dst.0, Protocol::UDP, &emit::datagram(src.into(), dst.into(), payload))
}

/// A segment with a window wide open, its checksum not summed: nobody here asks for it.
pub(super) fn segment(
    src: (Ipv4Addr, u16),
    dst: (Ipv4Addr, u16),
    flags: tcp::Flags,
    (seq, ack): (u32, u32),
) -> Vec<u8> {
    let header = tcp::Header {
        src_port: src.1,
        dst_port: dst.1,
        seq: tcp::SeqNumber(seq),
        ack: tcp::SeqNumber(ack),
        flags,
        window: 65_535,
        ..Default::default()
    };
    let mut bytes = [0; 60];
    let len = header.emit(&mut bytes);
    frame(src.0, dst.0, Protocol::TCP, &bytes[..len])
}
