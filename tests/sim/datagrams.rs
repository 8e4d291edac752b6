//! Datagrams, both ends: the guest's, made by hand, and the world's behind host sockets in memory.
//!
//! Each datagram begins with the guest's port and a number, and goes on with a piece of its stream, so
//! both ends check whom it is for and every byte. The world answers late, never, twice, or with damaged
//! bytes, which are data like any other: the guest must get exactly what the world sent.

use std::cell::RefCell;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;

use vunet::addr::MacAddr;
use vunet::engine::host_net::{Arrival, HostDatagram, Readiness, Token};
use vunet::frame::Payload;
use vunet::wire::checksum;
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::udp;

use crate::bytes::Stream;
use crate::detached::{Detached, Lost};
use crate::plan::{DATAGRAM_PORTS, DatagramKind, DatagramPlan, GUEST, Plan};
use crate::random::Rng;
use crate::world::World;

/// The guest's port and the datagram's number.
const HEAD_BYTES: usize = 6;
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// Arrivals one call takes at most, as the kernel's.
const BATCH_MAX: usize = 16;

/// The payload of datagram `number` between `remote` and the guest's `port`.
fn payload(remote: SocketAddrV4, from_guest: bool, port: u16, number: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len.max(HEAD_BYTES)];
    bytes[..2].copy_from_slice(&port.to_be_bytes());
    bytes[2..HEAD_BYTES].copy_from_slice(&number.to_be_bytes());
    Stream::new(remote.into(), from_guest).fill(number as usize * 13, &mut bytes[HEAD_BYTES..]);
    bytes
}

/// Port and number of what is whole; panics if it is not what was sent.
fn check(remote: SocketAddrV4, from_guest: bool, bytes: &[u8]) -> (u16, u32) {
    let port = u16::from_be_bytes([bytes[0], bytes[1]]);
    let number = u32::from_be_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]);
    let stream = Stream::new(remote.into(), from_guest);
    let wrong = stream.first_difference(number as usize * 13, &bytes[HEAD_BYTES..]);
    assert_eq!(wrong, None, "datagram {number} of {remote} and guest port {port} is damaged");
    (port, number)
}

/// A datagram socket.
#[derive(Debug)]
struct Sock {
    worker: u8,
    token: Token,
    inbox: VecDeque<(Vec<u8>, SocketAddr)>,
    is_open: bool,
    is_echo: bool,
    /// An error waits.
    error: Option<i32>,
    /// It leaves its worker: what is dropped there is not the socket.
    leaves: bool,
}

/// A datagram of the world under way to a socket.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Coming {
    at_us: std::cmp::Reverse<u64>,
    sock: usize,
    bytes: Vec<u8>,
    from: SocketAddr,
}

/// All datagram sockets, and what the world knows of their exchanges.
#[derive(Debug)]
pub(crate) struct Socks {
    socks: Vec<Sock>,
    plans: Vec<DatagramPlan>,
    coming: BinaryHeap<Coming>,
    /// Clients of published ports: socket, plan, datagrams yet to send, when.
    clients: Vec<(usize, DatagramPlan, usize, u64)>,
    numbers: u32,
    corrupt: f64,
    refuse: f64,
    refused_at_flush: u64,
    /// What was sent towards the guest, by world's and guest's end.
    sent: HashMap<(SocketAddrV4, u16), HashSet<Vec<u8>>>,
    /// How often each datagram of the guest arrived or was refused.
    pub(crate) taken: HashMap<(u16, u32), usize>,
    pub(crate) open: usize,
    /// Dropped on their way between workers.
    lost: Lost,
}

impl Socks {
    pub(crate) fn new(plan: &Plan) -> Socks {
        Socks {
            socks: Vec::new(),
            plans: plan.datagrams.clone(),
            coming: BinaryHeap::new(),
            clients: Vec::new(),
            numbers: 0,
            corrupt: plan.corrupt,
            refuse: plan.refuse,
            refused_at_flush: 0,
            sent: HashMap::new(),
            taken: HashMap::new(),
            open: 0,
            lost: Lost::default(),
        }
    }

    /// A socket of `worker`.
    pub(crate) fn open(&mut self, worker: u8, token: Token, is_echo: bool) -> usize {
        self.open += 1;
        self.socks.push(Sock {
            worker,
            token,
            inbox: VecDeque::new(),
            is_open: true,
            is_echo,
            error: None,
            leaves: false,
        });
        self.socks.len() - 1
    }

    fn close(&mut self, at: usize) {
        self.socks[at].is_open = false;
        self.open -= 1;
    }

    /// A client of the published port whose socket is `sock` begins to send.
    pub(crate) fn begin_client(&mut self, sock: usize, plan: DatagramPlan) {
        self.clients.push((sock, plan, plan.count, 200_000));
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        let clients = self.clients.iter().map(|client| client.3);
        self.coming.peek().map(|coming| coming.at_us.0).into_iter().chain(clients).min()
    }

    /// The queued datagrams that were refused.
    pub(crate) fn flush(&mut self) -> u64 {
        std::mem::take(&mut self.refused_at_flush)
    }

    pub(crate) fn step(&mut self, now_us: u64, rng: &mut Rng, events: &mut VecDeque<(u8, Token, Readiness)>) {
        for at in self.lost.take() {
            self.close(at);
        }
        for at in 0..self.clients.len() {
            let (sock, plan, left, due) = self.clients[at];
            if left > 0 && due <= now_us {
                self.numbers += 1;
                let bytes =
                    payload(plan.remote, false, plan.guest_port, self.numbers, rng.below(plan.bytes_max));
                self.send_towards_guest(now_us, sock, plan.remote, plan.guest_port, bytes);
                self.clients[at].2 -= 1;
                self.clients[at].3 = now_us + 1 + plan.pace_us as u64;
            }
        }
        self.clients.retain(|client| client.2 > 0);
        while self.coming.peek().is_some_and(|coming| coming.at_us.0 <= now_us) {
            let Some(Coming { sock, bytes, from, .. }) = self.coming.pop() else { break };
            let sock = &mut self.socks[sock];
            if sock.is_open {
                sock.inbox.push_back((bytes, from));
                let ready = Readiness { readable: true, ..Readiness::default() };
                events.push_back((sock.worker, sock.token, ready));
            }
        }
    }

    fn send_towards_guest(
        &mut self,
        at_us: u64,
        sock: usize,
        remote: SocketAddrV4,
        port: u16,
        bytes: Vec<u8>,
    ) {
        self.sent.entry((remote, port)).or_default().insert(bytes.clone());
        self.put(at_us, sock, remote, bytes);
    }

    fn put(&mut self, at_us: u64, sock: usize, from: SocketAddrV4, bytes: Vec<u8>) {
        self.coming.push(Coming { at_us: std::cmp::Reverse(at_us), sock, bytes, from: from.into() });
    }

    /// The guest got `bytes` at `port` from `remote`: the world must have sent exactly that.
    fn was_sent(&self, remote: SocketAddrV4, port: u16, bytes: &[u8]) -> bool {
        self.sent.get(&(remote, port)).is_some_and(|sent| sent.contains(bytes))
    }

    /// The same from any port of the remote's.
    fn was_sent_from(&self, remote: Ipv4Addr, port: u16, bytes: &[u8]) -> bool {
        let mut sent = self.sent.iter().filter(|((from, to), _)| (*from.ip(), *to) == (remote, port));
        sent.any(|(_, sent)| sent.contains(bytes))
    }

    /// A datagram of the guest left through `sock` to `to`: it is checked and answered.
    fn take(&mut self, now_us: u64, rng: &mut Rng, sock: usize, to: SocketAddr, bytes: &[u8]) {
        let plan = *self
            .plans
            .iter()
            .find(|plan| plan.kind != DatagramKind::Dns && to.ip() == *plan.remote.ip())
            .expect("datagrams leave only for where the guest sends them");
        let is_echo = plan.kind == DatagramKind::Echo;
        assert_eq!(is_echo, self.socks[sock].is_echo);
        assert!(is_echo || to.port() == plan.remote.port(), "to the right port");
        let body = if is_echo { &bytes[8..] } else { bytes };
        let (port, number) = check(plan.remote, true, body);
        assert_eq!(port, plan.guest_port);
        *self.taken.entry((port, number)).or_default() += 1;
        if plan.kind == DatagramKind::Published || rng.chance(0.1) {
            return;
        }
        for _ in 0..1 + usize::from(rng.chance(0.1)) {
            self.numbers += 1;
            let len = rng.below(plan.bytes_max);
            let mut answer = payload(plan.remote, false, port, self.numbers, len);
            if rng.chance(self.corrupt) {
                let at = rng.below(answer.len());
                answer[at] ^= 1 << rng.below(8);
            }
            let at_us = now_us + rng.below(50_000) as u64;
            if is_echo {
                self.answer_echo(at_us, rng, sock, plan, &bytes[..8], &answer);
            } else {
                self.send_towards_guest(at_us, sock, plan.remote, port, answer);
            }
        }
        if rng.chance(self.corrupt) {
            self.socks[sock].error = Some(libc::ECONNREFUSED);
        }
    }

    fn answer_echo(
        &mut self,
        at_us: u64,
        rng: &mut Rng,
        sock: usize,
        plan: DatagramPlan,
        head: &[u8],
        answer: &[u8],
    ) {
        let remote = SocketAddrV4::new(*plan.remote.ip(), 0);
        self.sent.entry((remote, plan.guest_port)).or_default().insert(answer.to_vec());
        let mut message = vec![0; 8 + answer.len()];
        // The kernel's own identifier, not the guest's.
        let seq = u16::from_be_bytes([head[6], head[7]]);
        Message::EchoReply { ident: 0x7777, seq }.emit_with_payload(answer, &mut message);
        if rng.chance(self.corrupt) {
            message.truncate(rng.below(8));
        }
        self.put(at_us, sock, remote, message);
    }
}

/// A datagram socket of the engine's.
pub(crate) struct SimDatagram {
    world: Rc<RefCell<World>>,
    at: usize,
}

impl SimDatagram {
    pub(crate) fn new(world: &Rc<RefCell<World>>, worker: u8, token: Token, is_echo: bool) -> SimDatagram {
        let at = world.borrow_mut().socks.open(worker, token, is_echo);
        SimDatagram { world: Rc::clone(world), at }
    }

    /// Watches the socket under `token` of `worker` from now on.
    pub(crate) fn attach(
        world: &Rc<RefCell<World>>,
        worker: u8,
        token: Token,
        detached: Detached,
    ) -> SimDatagram {
        let at = detached.arrived();
        let mut locked = world.borrow_mut();
        let sock = &mut locked.socks.socks[at];
        (sock.worker, sock.token) = (worker, token);
        let ready = Readiness { readable: !sock.inbox.is_empty(), writable: true, ..Readiness::default() };
        locked.events.push_back((worker, token, ready));
        drop(locked);
        SimDatagram { world: Rc::clone(world), at }
    }

    /// Its number in the world.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    fn give(&self, bytes: &[u8], to: SocketAddr) -> bool {
        let world = &mut *self.world.borrow_mut();
        if world.rng.chance(world.socks.refuse) {
            world.faults_seen += 1;
            let body = if world.socks.socks[self.at].is_echo { &bytes[8..] } else { bytes };
            let number = u32::from_be_bytes([body[2], body[3], body[4], body[5]]);
            *world.socks.taken.entry((u16::from_be_bytes([body[0], body[1]]), number)).or_default() += 1;
            return false;
        }
        let now_us = world.now_us;
        world.socks.take(now_us, &mut world.rng, self.at, to, bytes);
        true
    }
}

impl HostDatagram for SimDatagram {
    type Detached = Detached;

    fn detach(self) -> Detached {
        let socks = &mut self.world.borrow_mut().socks;
        socks.socks[self.at].leaves = true;
        Detached::new(self.at, &socks.lost)
    }

    fn send_to(&mut self, head: &[u8], payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        let mut bytes = head.to_vec();
        bytes.resize(head.len() + payload.len(), 0);
        payload.copy_to(&mut bytes[head.len()..]);
        if self.give(&bytes, to) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    fn queue_to(&mut self, payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        let mut bytes = vec![0; payload.len()];
        payload.copy_to(&mut bytes);
        if !self.give(&bytes, to) {
            self.world.borrow_mut().socks.refused_at_flush += 1;
        }
        Ok(())
    }

    fn send_segments_to(&mut self, payload: &Payload<'_>, segment: usize, to: SocketAddr) -> io::Result<()> {
        let mut bytes = vec![0; payload.len()];
        payload.copy_to(&mut bytes);
        for part in bytes.chunks(segment) {
            self.give(part, to);
        }
        Ok(())
    }

    fn recv_batch(&mut self, arrivals_max: usize, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        let mut world = self.world.borrow_mut();
        let sock = &mut world.socks.socks[self.at];
        if let Some(error) = sock.error.take() {
            return Err(io::Error::from_raw_os_error(error));
        }
        let count = arrivals_max.min(BATCH_MAX).min(sock.inbox.len());
        let arrivals: Vec<_> = sock.inbox.drain(..count).collect();
        let more = !sock.inbox.is_empty();
        drop(world);
        for (bytes, from) in &arrivals {
            each(Arrival { from: *from, to: None, tos: 0, bytes, segment_bytes: bytes.len() });
        }
        Ok(more)
    }
}

impl Drop for SimDatagram {
    fn drop(&mut self) {
        if let Ok(mut world) = self.world.try_borrow_mut() {
            let leaves = std::mem::take(&mut world.socks.socks[self.at].leaves);
            if !leaves {
                world.socks.close(self.at);
            }
        }
    }
}

/// An exchange as the guest has it.
struct Exchange {
    plan: DatagramPlan,
    left: usize,
    next_us: u64,
}

/// Offset, whether more follow, bytes.
type Fragment = (usize, bool, Vec<u8>);

/// The guest's datagrams.
pub(crate) struct Datagrams {
    pub(crate) mac: [u8; 6],
    mtu: usize,
    rng: Rng,
    exchanges: Vec<Exchange>,
    number: u32,
    ident: u16,
    /// By sender and identification.
    fragments: HashMap<(Ipv4Addr, u16), Vec<Fragment>>,
    /// Datagrams that fit a frame, by port and number: how often they were handed to the engine.
    pub(crate) fed: HashMap<(u16, u32), usize>,
    pub(crate) received: usize,
    /// The guest began anew: its late answers to a published port's client are then the first thing the
    /// engine knows of the exchange, and the client may come to the guest from another port.
    rebooted: bool,
}

impl Datagrams {
    pub(crate) fn new(plan: &Plan, mac: [u8; 6]) -> Datagrams {
        // Clients of published ports speak first, and are answered once each time.
        let begin = |plan: &DatagramPlan| {
            let left = if plan.kind == DatagramKind::Published { 0 } else { plan.count };
            Exchange { plan: *plan, left, next_us: 100_000 }
        };
        Datagrams {
            mac,
            mtu: usize::from(plan.guest_mtu),
            rng: Rng::new(plan.seed ^ 0xda7a),
            exchanges: plan.datagrams.iter().map(begin).collect(),
            number: 0,
            ident: 0,
            fragments: HashMap::new(),
            fed: HashMap::new(),
            received: 0,
            rebooted: false,
        }
    }

    /// The guest began anew at this MAC address.
    pub(crate) fn reboot(&mut self, mac: [u8; 6]) {
        self.mac = mac;
        self.rebooted = true;
        self.fragments.clear();
    }

    pub(crate) fn next_at(&self) -> Option<u64> {
        self.exchanges.iter().filter(|exchange| exchange.left > 0).map(|exchange| exchange.next_us).min()
    }

    /// Frames the guest sends now.
    pub(crate) fn step(&mut self, now_us: u64) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for at in 0..self.exchanges.len() {
            let Exchange { plan, left, next_us } = self.exchanges[at];
            if left > 0 && next_us <= now_us {
                let pause = self.rng.between(plan.pace_us / 2, plan.pace_us + 1) as u64;
                self.exchanges[at].left -= 1;
                self.exchanges[at].next_us = now_us + 1 + pause;
                frames.extend(self.message(&plan));
            }
        }
        frames
    }

    fn message(&mut self, plan: &DatagramPlan) -> Vec<Vec<u8>> {
        self.number += 1;
        if plan.kind == DatagramKind::Dns {
            let query = question(self.number as u16);
            return self.frames(plan, GATEWAY, Protocol::UDP, &udp(plan.guest_port, (GATEWAY, 53), &query));
        }
        let len = self.rng.below(plan.bytes_max);
        let body = payload(plan.remote, true, plan.guest_port, self.number, len);
        let ip = *plan.remote.ip();
        match plan.kind {
            DatagramKind::Echo => {
                let mut message = vec![0; 8 + body.len()];
                let request = Message::EchoRequest { ident: plan.guest_port, seq: self.number as u16 };
                request.emit_with_payload(&body, &mut message);
                self.frames(plan, ip, Protocol::ICMP, &message)
            }
            _ => self.frames(plan, ip, Protocol::UDP, &udp(plan.guest_port, (ip, plan.remote.port()), &body)),
        }
    }

    /// A message as frames, in fragments where it exceeds the MTU.
    fn frames(
        &mut self,
        plan: &DatagramPlan,
        to: Ipv4Addr,
        protocol: Protocol,
        message: &[u8],
    ) -> Vec<Vec<u8>> {
        self.ident = self.ident.wrapping_add(1);
        let room = (self.mtu - ipv4::HEADER_BYTES) & !7;
        let count = message.len().div_ceil(room);
        if count == 1 && plan.kind != DatagramKind::Dns {
            self.fed.insert((plan.guest_port, self.number), 0);
        }
        let frame = |(n, part): (usize, &[u8])| {
            let header = ipv4::Header {
                src: GUEST,
                dst: to,
                protocol,
                ttl: 64,
                tos: 0,
                ident: self.ident,
                dont_fragment: false,
                more_fragments: n + 1 < count,
                fragment_offset_bytes: (n * room) as u16,
                header_bytes: ipv4::HEADER_BYTES,
                payload_bytes: part.len(),
            };
            let mut bytes = vec![0; ethernet::HEADER_BYTES + ipv4::HEADER_BYTES];
            let src = MacAddr(self.mac);
            ethernet::Header { dst: MacAddr::GATEWAY, src, ethertype: EtherType::IPV4 }.emit(&mut bytes);
            header.emit(&mut bytes[ethernet::HEADER_BYTES..]);
            bytes.extend_from_slice(part);
            bytes
        };
        message.chunks(room).enumerate().map(frame).collect()
    }

    /// Notes a frame handed to the engine, if it holds a whole datagram of ours.
    pub(crate) fn note_fed(&mut self, frame: &[u8]) {
        let Some((ip, at)) = ip_of(frame) else { return };
        if ip.is_fragment() || ![Protocol::UDP, Protocol::ICMP].contains(&ip.protocol) {
            return;
        }
        let body = &frame[at + 8..];
        if body.len() < HEAD_BYTES {
            return;
        }
        let key = (
            u16::from_be_bytes([body[0], body[1]]),
            u32::from_be_bytes([body[2], body[3], body[4], body[5]]),
        );
        if let Some(count) = self.fed.get_mut(&key) {
            *count += 1;
        }
    }

    /// Takes a frame towards the guest, if it is a datagram's; false otherwise.
    pub(crate) fn receive(&mut self, world: &World, frame: &[u8]) -> bool {
        let Some((ip, at)) = ip_of(frame) else { return false };
        if ip.protocol == Protocol::TCP {
            return false;
        }
        assert_eq!(ip.dst, GUEST, "it is for the guest");
        let part = &frame[at..at + ip.payload_bytes];
        let Some(message) = self.reassemble(&ip, part) else { return true };
        match ip.protocol {
            Protocol::UDP => self.receive_udp(world, &ip, &message),
            _ => self.receive_icmp(world, &ip, &message),
        }
        true
    }

    fn reassemble(&mut self, ip: &ipv4::Header, part: &[u8]) -> Option<Vec<u8>> {
        if !ip.is_fragment() {
            return Some(part.to_vec());
        }
        let key = (ip.src, ip.ident);
        let held = self.fragments.entry(key).or_default();
        let offset = usize::from(ip.fragment_offset_bytes);
        held.retain(|(at, _, _)| *at != offset);
        held.push((offset, ip.more_fragments, part.to_vec()));
        held.sort();
        let (mut whole, mut ended) = (Vec::new(), false);
        for (at, more, bytes) in held.iter() {
            if *at != whole.len() {
                return None;
            }
            whole.extend_from_slice(bytes);
            ended = !more;
        }
        if !ended {
            return None;
        }
        self.fragments.remove(&key);
        Some(whole)
    }

    fn receive_udp(&mut self, world: &World, ip: &ipv4::Header, message: &[u8]) {
        let header = udp::Header::parse(message, message.len()).expect("a UDP header");
        assert!(header.dst_port >= DATAGRAM_PORTS, "to a port that asked");
        if header.checksum != 0 {
            let mut sum = checksum::pseudo_header(ip.src.into(), ip.dst.into(), Protocol::UDP, message.len());
            sum.add_bytes(message);
            assert_eq!(sum.finish(), 0, "a checksum is wrong");
        }
        self.received += 1;
        if ip.src == GATEWAY {
            return assert_eq!(header.src_port, 53, "only DNS answers there");
        }
        let remote = SocketAddrV4::new(ip.src, header.src_port);
        let body = &message[udp::HEADER_BYTES..header.len_bytes];
        assert!(
            world.socks.was_sent(remote, header.dst_port, body)
                || self.rebooted && world.socks.was_sent_from(*remote.ip(), header.dst_port, body),
            "{remote} never sent this to {}: {} bytes, {:02x?}",
            header.dst_port,
            body.len(),
            &body[..body.len().min(40)]
        );
        for exchange in &mut self.exchanges {
            if exchange.plan.kind == DatagramKind::Published && exchange.plan.guest_port == header.dst_port {
                exchange.left += 1;
            }
        }
    }

    fn receive_icmp(&mut self, world: &World, ip: &ipv4::Header, message: &[u8]) {
        // Errors are advice; answers are checked.
        let Ok(Message::EchoReply { ident, .. }) = Message::parse(message) else { return };
        self.received += 1;
        let remote = SocketAddrV4::new(ip.src, 0);
        assert!(world.socks.was_sent(remote, ident, &message[8..]), "{remote} never sent this to {ident}");
    }

    /// Whether all is sent.
    pub(crate) fn is_done(&self) -> bool {
        self.exchanges.iter().all(|exchange| exchange.left == 0)
    }

    /// Each datagram that reached the engine in one frame reached its socket, once each time.
    pub(crate) fn assert_all_taken(&self, world: &World) {
        for (key, fed) in &self.fed {
            let taken = world.socks.taken.get(key).copied().unwrap_or(0);
            assert_eq!(taken, *fed, "datagram {key:?} reached the engine and the world differently often");
        }
    }
}

fn ip_of(frame: &[u8]) -> Option<(ipv4::Header, usize)> {
    if frame.len() < 34 || frame[12..14] != [8, 0] {
        return None;
    }
    let ip = ipv4::Header::parse(&frame[14..], frame.len() - 14).expect("an IPv4 header");
    Some((ip, 14 + ip.header_bytes))
}

fn udp(from: u16, (ip, to): (Ipv4Addr, u16), body: &[u8]) -> Vec<u8> {
    let mut message = vec![0; udp::HEADER_BYTES];
    message.extend_from_slice(body);
    let len_bytes = message.len();
    udp::Header { src_port: from, dst_port: to, len_bytes, checksum: 0 }.emit(&mut message);
    let (from, to): (IpAddr, IpAddr) = (GUEST.into(), ip.into());
    let mut sum = checksum::pseudo_header(from, to, Protocol::UDP, message.len());
    sum.add_bytes(&message);
    let at = udp::CHECKSUM_OFFSET;
    message[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
    message
}

/// A question for the address of a name with a number.
fn question(id: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let name = format!("n{id}");
    for label in [name.as_str(), "example", "com"] {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
    bytes
}
