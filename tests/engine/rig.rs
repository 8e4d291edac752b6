//! An engine between a scripted guest and a scripted world, time by hand.

use std::cell::{RefCell, RefMut};
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vunet::config::{DnsConfig, IpMtu, Lan, Mode, NatConfig, Protocol, Publish};
use vunet::engine::core::Owner;
use vunet::engine::counters::DropReason;
use vunet::engine::guest_port::GuestOffloads;
use vunet::engine::host_net::{Readiness, Token};
use vunet::engine::placement::{Directory, Home, WorkerId};
use vunet::engine::{Engine, EngineConfig};
use vunet::frame::{Payload, QueuePair, TxFrame};
use vunet::limits;
use vunet::network::allocator::IpAllocator;
use vunet::network::leases::LeaseTable;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Instant;
use vunet::wire::tcp::{Flags, Options};
use vunet::wire::vnet::VnetHeader;

use crate::frames::{GATEWAY, Reader, Seen, Seg, TcpSeen};
use crate::port::Port;
use crate::world::{Conn, FakeDatagram, FakeListener, Net, Sock, World};

pub(crate) const READABLE: Readiness = Readiness { readable: true, writable: true, ..NOTHING };
pub(crate) const WRITABLE: Readiness = Readiness { writable: true, ..NOTHING };
pub(crate) const WORLD_FIN: Readiness =
    Readiness { readable: true, writable: true, peer_closed: true, ..NOTHING };
pub(crate) const FAILED: Readiness =
    Readiness { readable: true, writable: true, peer_closed: true, failed: true, ..NOTHING };
/// An error waits, as an edge says it.
pub(crate) const COMPLAINT: Readiness = Readiness { failed: true, ..NOTHING };
const NOTHING: Readiness =
    Readiness { readable: false, writable: false, peer_closed: false, failed: false, urgent: false };

/// What varies between tests.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) ip_mtu: u16,
    pub(crate) flows_max: usize,
    pub(crate) offloads: GuestOffloads,
    pub(crate) guest: Option<std::net::Ipv4Addr>,
    pub(crate) dns: bool,
    /// Keys the initial sequence numbers.
    pub(crate) secret: (u64, u64),
    /// Its place among other workers.
    pub(crate) home: Option<Home>,
    /// Who hands out addresses.
    pub(crate) leases: fn(&Lan) -> Box<dyn IpAllocator>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            mode: Mode::Nat(NatConfig::default()),
            ip_mtu: 1500,
            flows_max: limits::FLOWS_MAX,
            offloads: GuestOffloads::default(),
            guest: None,
            dns: true,
            secret: (1, 2),
            home: None,
            leases: |lan| Box::new(LeaseTable::new(lan.subnet, lan.gateway, lan.guest)),
        }
    }
}

impl Setup {
    pub(crate) fn with_host_loopback() -> Setup {
        let nat = NatConfig { allow_host_loopback: true, ..NatConfig::default() };
        Setup { mode: Mode::Nat(nat), ..Setup::default() }
    }

    pub(crate) fn isolated() -> Setup {
        Setup { mode: Mode::Isolated, ..Setup::default() }
    }
}

/// The engine and both its sides.
pub(crate) struct Rig {
    pub(crate) engine: Engine<Net>,
    pub(crate) port: Port,
    pub(crate) now: Instant,
    pub(crate) reader: Reader,
    world: Rc<RefCell<World>>,
    ip_mtu: usize,
}

impl Rig {
    /// Publishes a listener to a port of the guest.
    pub(crate) fn publish_tcp(&mut self, guest_port: u16, listener: FakeListener) -> Publish {
        let host = SocketAddr::from(([203, 0, 113, 200], listener.host_port()));
        let port = Publish::new(Protocol::Tcp, host, guest_port);
        self.engine.publish_tcp(Owner::TheGuest, port, listener);
        port
    }

    /// Closes a published port of the guest; returns what the guest sees of it, and how many connections were reset.
    pub(crate) fn unpublish(&mut self, port: &Publish, reset: bool) -> (Vec<Seen>, usize) {
        let ended = self.engine.unpublish(self.now, &mut self.port, (Owner::TheGuest, port), reset);
        assert_eq!(ended.next, None, "one step is all");
        (self.flush(), ended.connections)
    }

    /// Publishes a socket to a UDP port of the guest.
    pub(crate) fn publish_udp(&mut self, guest_port: u16, socket: FakeDatagram) {
        let port =
            Publish::new(Protocol::Udp, SocketAddr::from(([203, 0, 113, 200], guest_port)), guest_port);
        self.engine.publish_udp(Owner::TheGuest, port, socket);
    }

    pub(crate) fn new() -> Rig {
        Rig::with(Setup::default())
    }

    pub(crate) fn with(setup: Setup) -> Rig {
        let lan = Lan {
            subnet: "10.0.2.0/24".parse().expect("a subnet"),
            gateway: GATEWAY,
            guest: setup.guest,
            ip_mtu: IpMtu::new(setup.ip_mtu).expect("an MTU"),
            dhcp: true,
        };
        let dns =
            DnsConfig { enabled: setup.dns, domain: DnsConfig::DEFAULT_DOMAIN.into(), hosts: Vec::new() };
        let service = Arc::new(DnsService::new(&dns, &lan, matches!(setup.mode, Mode::Nat(_))));
        let dhcp = Arc::new(Mutex::new(DhcpServer::over((setup.leases)(&lan), &lan, &dns)));
        let config = EngineConfig {
            lan,
            dns,
            mode: setup.mode,
            mac: None,
            flows_max: setup.flows_max,
            isn_secret: setup.secret,
            home: setup.home,
        };
        let world = Rc::new(RefCell::new(World::new()));
        let mut port = Port::new();
        port.offloads = setup.offloads;
        Rig {
            engine: Engine::new(&config, Net(Rc::clone(&world)), dhcp, service),
            port,
            now: Instant::from_micros(1_000_000),
            reader: Reader::default(),
            world,
            ip_mtu: usize::from(setup.ip_mtu),
        }
    }

    /// Workers with a rig each, all in one world.
    pub(crate) fn workers(count: u8) -> Vec<Rig> {
        Rig::workers_with(count, &Setup::default())
    }

    pub(crate) fn workers_with(count: u8, setup: &Setup) -> Vec<Rig> {
        let directory = Arc::new(Directory::default());
        let rig = |n| {
            let home = Home { own: WorkerId(n), workers: count, directory: Arc::clone(&directory) };
            Rig::with(Setup { home: Some(home), ..setup.clone() })
        };
        let mut rigs: Vec<Rig> = (0..count).map(rig).collect();
        let world = Rc::clone(&rigs[0].world);
        for rig in &mut rigs[1..] {
            rig.engine.nat().net().0 = Rc::clone(&world);
            rig.world = Rc::clone(&world);
        }
        rigs
    }

    pub(crate) fn world(&self) -> RefMut<'_, World> {
        let mut world = self.world.borrow_mut();
        world.close_lost();
        world
    }

    /// The `n`th stream ever made.
    pub(crate) fn conn(&self, n: usize) -> RefMut<'_, Conn> {
        RefMut::map(self.world.borrow_mut(), |world| &mut world.conns[n])
    }

    /// The `n`th datagram socket ever made.
    pub(crate) fn sock(&self, n: usize) -> RefMut<'_, Sock> {
        RefMut::map(self.world.borrow_mut(), |world| &mut world.socks[n])
    }

    pub(crate) fn dropped(&self, reason: DropReason) -> u64 {
        self.engine.counters().dropped(reason)
    }

    /// Hands one frame over without ending the batch.
    pub(crate) fn feed(&mut self, frame: &[u8]) {
        self.feed_with(VnetHeader::default(), frame);
    }

    pub(crate) fn feed_with(&mut self, vnet: VnetHeader, frame: &[u8]) {
        self.feed_on(QueuePair::default(), vnet, frame);
    }

    /// Hands a frame over that came by the queue `pair`.
    pub(crate) fn feed_on(&mut self, pair: QueuePair, vnet: VnetHeader, frame: &[u8]) {
        let frame = TxFrame {
            vnet,
            head: &frame[..frame.len().min(limits::FRAME_HEAD_BYTES)],
            whole: Payload::from_host(frame),
            pair,
        };
        self.engine.from_guest(self.now, &mut self.port, &frame);
        self.engine.end_of_frames(&mut self.port);
    }

    /// Hands one frame over in the middle of a batch of frames, to be followed by others and by
    /// [`Rig::end_of_batch`].
    pub(crate) fn feed_only(&mut self, frame: &[u8]) {
        let frame = TxFrame {
            vnet: VnetHeader::default(),
            head: &frame[..frame.len().min(limits::FRAME_HEAD_BYTES)],
            whole: Payload::from_host(frame),
            pair: QueuePair::default(),
        };
        self.engine.from_guest(self.now, &mut self.port, &frame);
    }

    /// Ends a batch of frames; returns what the guest received.
    pub(crate) fn end_of_batch(&mut self) -> Vec<Seen> {
        self.engine.end_of_frames(&mut self.port);
        self.flush()
    }

    /// Hands one frame over, ends the batch and returns what the guest received.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Vec<Seen> {
        self.feed(frame);
        self.flush()
    }

    /// News of a socket, then the batch's end.
    pub(crate) fn ready(&mut self, token: Token, ready: Readiness) -> Vec<Seen> {
        self.engine.host_ready(self.now, &mut self.port, token, ready);
        self.flush()
    }

    /// News of the `n`th stream.
    pub(crate) fn stream_ready(&mut self, n: usize, ready: Readiness) -> Vec<Seen> {
        let token = self.conn(n).token;
        self.ready(token, ready)
    }

    /// The `n`th datagram socket has a datagram.
    pub(crate) fn datagram_arrives(&mut self, n: usize, bytes: &[u8], from: SocketAddr) -> Vec<Seen> {
        self.sock(n).inbox.push_back((bytes.to_vec(), from));
        let token = self.sock(n).token;
        self.ready(token, READABLE)
    }

    /// Ends batches until there is nothing more to do at once; returns what the guest received.
    pub(crate) fn flush(&mut self) -> Vec<Seen> {
        let mut turns = 0;
        while self.engine.flush(&mut self.port) {
            turns += 1;
            assert!(turns < 100_000, "the engine spins");
        }
        self.take()
    }

    /// What the guest received since last asked.
    pub(crate) fn take(&mut self) -> Vec<Seen> {
        let delivered = std::mem::take(&mut self.port.delivered);
        let Rig { reader, ip_mtu, .. } = self;
        delivered.iter().filter_map(|received| reader.read(received, *ip_mtu)).collect()
    }

    /// The guest posts `count` buffers; if it was asked to, it kicks.
    pub(crate) fn post_buffers(&mut self, count: usize) -> Vec<Seen> {
        self.port.free += count;
        if std::mem::take(&mut self.port.is_starved) {
            self.engine.guest_has_buffers(self.now, &mut self.port);
        }
        self.flush()
    }

    /// The receive ring starts.
    pub(crate) fn ring_up(&mut self) -> Vec<Seen> {
        self.port.is_up = true;
        self.engine.guest_has_buffers(self.now, &mut self.port);
        self.flush()
    }

    /// Lets time pass, with every deadline met on time; returns what the guest received.
    pub(crate) fn pass(&mut self, time: Duration) -> Vec<Seen> {
        let until = self.now + time;
        let mut seen = Vec::new();
        let mut turns = 0;
        while let Some(at) = self.engine.next_deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.engine.run_timers(self.now, &mut self.port);
            seen.extend(self.flush());
            turns += 1;
            assert!(turns < 100_000, "timers spin");
        }
        self.now = until;
        seen
    }

    /// Deadlines that came up within `time`.
    pub(crate) fn wakeups(&mut self, time: Duration) -> usize {
        let until = self.now + time;
        let mut count = 0;
        while let Some(at) = self.engine.next_deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.engine.run_timers(self.now, &mut self.port);
            self.flush();
            count += 1;
            assert!(count < 100_000, "timers spin");
        }
        self.now = until;
        count
    }

    /// Asserts that nothing of any flow is left.
    pub(crate) fn assert_empty(&mut self) {
        assert!(self.engine.nat().is_empty(), "no flow is left");
        assert_eq!(self.engine.next_deadline(), None, "no timer is left");
        assert_eq!(self.engine.nat().held_bytes(), 0, "no held payload is left");
        assert_eq!(self.world().open(), 0, "no socket is left");
    }
}

/// The guest's end of one TCP connection, as simple as can be: it remembers the numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    /// Next sequence number it sends, next it expects.
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) shift: Option<u8>,
}

impl Peer {
    pub(crate) fn new(from: SocketAddrV4, to: SocketAddrV4) -> Peer {
        Peer { from, to, seq: 1000, ack: 0, window: 0xffff, mss: Some(1460), shift: None }
    }

    pub(crate) fn seg<'a>(&self, flags: Flags, payload: &'a [u8]) -> Seg<'a> {
        let Peer { from, to, seq, ack, window, .. } = *self;
        Seg { from, to, seq, ack, flags, window, options: Options::default(), payload }
    }

    /// Sends SYN.
    pub(crate) fn syn(&mut self, rig: &mut Rig) -> Vec<Seen> {
        let options = Options { mss: self.mss, window_scale: self.shift, ..Options::default() };
        rig.send(&Seg { options, ..self.seg(Flags::SYN, &[]) }.frame())
    }

    /// Takes a SYN-ACK and acknowledges it.
    pub(crate) fn establish(&mut self, rig: &mut Rig, seen: Vec<Seen>) -> TcpSeen {
        let syn_ack = only(seen).tcp();
        assert!(syn_ack.has(Flags::SYN | Flags::ACK), "{syn_ack:?}");
        self.seq = self.seq.wrapping_add(1);
        assert_eq!(syn_ack.header.ack.0, self.seq);
        self.ack = syn_ack.header.seq.0.wrapping_add(1);
        let seen = self.acknowledge(rig);
        assert_eq!(seen, [], "nothing follows a handshake by itself");
        syn_ack
    }

    pub(crate) fn acknowledge(&self, rig: &mut Rig) -> Vec<Seen> {
        rig.send(&self.seg(Flags::ACK, &[]).frame())
    }

    /// Sends payload, with further `flags`, and advances over it.
    pub(crate) fn data(&mut self, rig: &mut Rig, flags: Flags, payload: &[u8]) -> Vec<Seen> {
        let frame = self.seg(Flags::ACK | flags, payload).frame();
        let fin = u32::from(flags.contains(Flags::FIN));
        self.seq = self.seq.wrapping_add(payload.len() as u32 + fin);
        rig.send(&frame)
    }

    /// Takes segments in order, advancing over payload and FIN; returns the payload. Segments that do
    /// not begin at the next byte expected fail the test.
    pub(crate) fn take(&mut self, seen: Vec<Seen>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for segment in seen.into_iter().map(Seen::tcp) {
            assert_eq!(segment.header.seq.0, self.ack, "{segment:?}");
            assert!(!segment.has(Flags::RST), "{segment:?}");
            let fin = u32::from(segment.has(Flags::FIN));
            self.ack = self.ack.wrapping_add(segment.payload.len() as u32 + fin);
            bytes.extend(segment.payload);
        }
        bytes
    }
}

/// An established flow of the guest to the world, its stream the newest.
pub(crate) fn connected(rig: &mut Rig, mut peer: Peer) -> Peer {
    assert_eq!(peer.syn(rig), [], "no answer before the connect succeeded");
    let n = rig.world().conns.len() - 1;
    let seen = rig.stream_ready(n, WRITABLE);
    peer.establish(rig, seen);
    peer
}

/// The one thing seen.
pub(crate) fn only(seen: Vec<Seen>) -> Seen {
    assert_eq!(seen.len(), 1, "{seen:?}");
    seen.into_iter().next().expect("one")
}

/// Bytes that differ from their neighbours.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

pub(crate) const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(crate) const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}
