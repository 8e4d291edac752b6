//! One run of a plan: a guest, an engine a worker, a world, what goes wrong between them, and what must
//! hold at the end.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use vunet::config::{DnsConfig, IpMtu, Lan, LimitsConfig, Mode, NatConfig, Protocol, Publish};
use vunet::engine::core::Owner;
use vunet::engine::host_net::{HostNet, Token};
use vunet::engine::placement::{Directory, Home, WorkerId};
use vunet::engine::{Engine, EngineConfig, PostOf};
use vunet::frame::{Payload, QueuePair, TxFrame};
use vunet::limits;
use vunet::rate_limit::RateLimits;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Instant;
use vunet::wire::vnet::{Checksum, VnetHeader};

use crate::bytes::Stream;
use crate::datagrams::{Datagrams, SimDatagram};
use crate::detached::Detached;
use crate::guest::{Guest, MAC, RING_FRAMES};
use crate::link::{DuplicateAcks, Frame, KeepAlives, Link, SeqShift, fin_apart};
use crate::plan::{DatagramKind, Ending, FlowPlan, Plan};
use crate::port::{SimPort, plain_frames};
use crate::random::Rng;
use crate::world::{End, SimListener, SimStream, World};

/// Virtual time after which a run counts as stalled: two keepalives' patience and more.
const STALLED_US: u64 = 6 * 3_600_000_000;
/// Rounds after which a run counts as spinning; the longest of 10,000 seeds takes 17,555.
const ROUNDS_MAX: u64 = 500_000;

/// Rounds in a row in which the guest filled its ring before it counts as spinning: smoltcp 0.14 can get into
/// a state in which it repeats one acknowledgement for ever.
const FULL_RINGS_MAX: usize = 100;

/// Sockets into the world for one worker.
pub(crate) struct SimNet {
    world: Rc<RefCell<World>>,
    worker: u8,
}

impl HostNet for SimNet {
    type Stream = SimStream;
    type Datagram = SimDatagram;
    type Listener = SimListener;

    fn connect(&mut self, token: Token, peer: SocketAddr) -> io::Result<SimStream> {
        let at = self.world.borrow_mut().connect(self.worker, token, peer)?;
        Ok(SimStream { world: Rc::clone(&self.world), at })
    }

    fn attach(&mut self, token: Token, detached: Detached) -> io::Result<SimStream> {
        Ok(SimStream::attach(&self.world, self.worker, token, detached))
    }

    fn attach_datagram(&mut self, token: Token, detached: Detached) -> io::Result<SimDatagram> {
        Ok(SimDatagram::attach(&self.world, self.worker, token, detached))
    }

    fn connect_dns(&mut self, _: Token) -> io::Result<SimStream> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn udp(&mut self, token: Token, _: SocketAddr) -> io::Result<SimDatagram> {
        Ok(SimDatagram::new(&self.world, self.worker, token, false))
    }

    fn ping(&mut self, token: Token, _: IpAddr) -> io::Result<SimDatagram> {
        Ok(SimDatagram::new(&self.world, self.worker, token, true))
    }

    fn flush_datagrams(&mut self) -> u64 {
        self.world.borrow_mut().socks.flush()
    }

    fn is_own_address(&mut self, _: IpAddr) -> bool {
        false
    }
}

/// What a run cost, and what it went through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) retransmits: u64,
    pub(crate) largest_frame: usize,
    pub(crate) faults: u64,
    /// Whether sequence numbers wrapped: the guest's, the engine's.
    pub(crate) wrapped: (bool, bool),
    /// Flows that moved between workers, at least.
    pub(crate) letters: u64,
    pub(crate) datagrams: usize,
    pub(crate) rounds: u64,
    /// Virtual time to the end of the last flow.
    pub(crate) elapsed_us: u64,
    /// Segments with bytes that the guest had sent before.
    pub(crate) guest_resent: usize,
    /// Times flows waited for a limit.
    pub(crate) limit_waits: u64,
    /// The guest's stack sent without end; nothing was checked but the bytes so far.
    pub(crate) guest_spun: bool,
}

/// The engine's settings, but for its mode.
pub(crate) fn engine_config(seed: u64, mode: Mode) -> EngineConfig {
    let lan = Lan {
        subnet: "10.0.2.0/24".parse().expect("a subnet"),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    };
    EngineConfig {
        lan,
        dns: DnsConfig { enabled: true, domain: DnsConfig::DEFAULT_DOMAIN.into(), hosts: Vec::new() },
        mode,
        mac: None,
        flows_max: limits::FLOWS_MAX,
        isn_secret: (seed, !seed),
        home: None,
    }
}

/// A letter under way: when it comes, who gets it, what it says.
type Letter = (u64, usize, PostOf<SimNet>);

/// A worker: its engine and its part of the guest's receive side.
struct Worker {
    engine: Engine<SimNet>,
    port: SimPort,
    /// Buffers on their way back to the ring: when, how many.
    reposts: VecDeque<(u64, usize)>,
}

struct Run<'a> {
    plan: &'a Plan,
    workers: Vec<Worker>,
    world: Rc<RefCell<World>>,
    guest: Guest,
    datagrams: Datagrams,
    up: Link,
    down: Link,
    shift: SeqShift,
    duplicates: DuplicateAcks,
    keep_alives: KeepAlives,
    letters: VecDeque<Letter>,
    /// Upstream answers under way: when, for which worker, which question.
    answers: VecDeque<(u64, usize, u64, Vec<u8>)>,
    /// Clients of published ports yet to come: when, which flow.
    clients: Vec<(u64, usize)>,
    listeners: Vec<Option<Token>>,
    rng: Rng,
    now_us: u64,
    /// Mixed into the choice of queue; changes when the guest moves its flows.
    spread: u64,
    ring_up_at_us: u64,
    rebooted: bool,
    mac_changed: bool,
    more: bool,
    last_ack: [u32; 2],
    /// Behind the last byte that came of each of the guest's flows, by both ports.
    ends: HashMap<u32, u32>,
    /// When this guest's first frame came.
    known_us: Option<u64>,
    is_traced: bool,
    full_rings: usize,
    outcome: Outcome,
}

/// Runs a plan to its end and checks everything.
pub(crate) fn run(plan: &Plan) -> Outcome {
    let mut run = Run::new(plan);
    while !run.is_done() {
        if run.full_rings >= FULL_RINGS_MAX {
            return Outcome { guest_spun: true, ..run.outcome };
        }
        let stalled = run.now_us > STALLED_US || run.outcome.rounds > ROUNDS_MAX;
        assert!(!stalled, "stalled: {}", run.state());
        run.step();
        run.advance();
    }
    run.check()
}

impl Worker {
    /// Whether nothing is left in the engine's tables; exchanges of published ports show as deadlines.
    fn is_done(&mut self) -> bool {
        self.engine.nat().is_empty() && self.engine.next_deadline().is_none()
    }

    fn new(
        plan: &Plan,
        world: &Rc<RefCell<World>>,
        n: u8,
        (home, limits): (Option<Home>, &RateLimits),
    ) -> Worker {
        let mut config = engine_config(plan.seed, Mode::Nat(NatConfig::default()));
        config.lan.ip_mtu = IpMtu::new(plan.ip_mtu).expect("an MTU");
        config.isn_secret = plan.isn_secret();
        config.home = home;
        let dns = Arc::new(DnsService::new(&config.dns, &config.lan, true));
        let dhcp = Arc::new(Mutex::new(DhcpServer::new(&config.lan, &config.dns)));
        let net = SimNet { world: Rc::clone(world), worker: n };
        let mut engine = Engine::new(&config, net, dhcp, dns);
        engine.limit_rates(limits);
        Worker { engine, port: SimPort::new(plan.offload, plan.buffers), reposts: VecDeque::new() }
    }
}

impl Run<'_> {
    fn new(plan: &Plan) -> Run<'_> {
        let world = Rc::new(RefCell::new(World::new(plan)));
        let directory = Arc::new(Directory::default());
        let [from_guest, to_guest] = plan.limits.map(|spec| spec.parse().expect("a limit"));
        let limits = RateLimits::new(&LimitsConfig { from_guest, to_guest });
        let workers = (0..plan.workers)
            .map(|n| {
                let home = (plan.workers > 1).then(|| Home {
                    own: WorkerId(n),
                    workers: plan.workers,
                    directory: Arc::clone(&directory),
                });
                Worker::new(plan, &world, n, (home, &limits))
            })
            .collect();
        let mut run = Run {
            plan,
            workers,
            guest: Guest::planned(plan, MAC, plan.seed),
            datagrams: Datagrams::new(plan, MAC),
            up: Link::new(Rng::new(plan.seed ^ 0x0b), plan.up),
            down: Link::new(Rng::new(plan.seed ^ 0xd0), plan.down),
            shift: SeqShift::default(),
            duplicates: DuplicateAcks::default(),
            keep_alives: KeepAlives::default(),
            letters: VecDeque::new(),
            answers: VecDeque::new(),
            clients: Vec::new(),
            listeners: vec![None; plan.flows.len()],
            rng: Rng::new(plan.seed ^ 0xab),
            now_us: 0,
            spread: 0,
            ring_up_at_us: 0,
            rebooted: false,
            mac_changed: false,
            more: false,
            last_ack: [0; 2],
            ends: HashMap::new(),
            known_us: None,
            is_traced: std::env::var_os("VUNET_SIM_TRACE").is_some(),
            full_rings: 0,
            outcome: Outcome::default(),
            world,
        };
        run.publish();
        run
    }

    fn publish(&mut self) {
        // One each, of no consequence here.
        let host = |n: usize| SocketAddr::from(([203, 0, 113, 1], 8000 + n as u16));
        let engine = &mut self.workers[0].engine;
        for (n, flow) in self.plan.flows.iter().enumerate().filter(|(_, flow)| flow.published) {
            self.listeners[n] = Some(engine.nat().next_listener_token());
            let listener = SimListener { world: Rc::clone(&self.world), flow: n };
            let port = Publish::new(Protocol::Tcp, host(n), flow.guest_port);
            engine.publish_tcp(Owner::TheGuest, port, listener);
            self.clients.push((flow.begins_us, n));
        }
        for plan in self.plan.datagrams.iter().filter(|plan| plan.kind == DatagramKind::Published) {
            let token = engine.nat().next_datagram_token();
            let socket = SimDatagram::new(&self.world, 0, token, false);
            let at = socket.at();
            let port = Publish::new(Protocol::Udp, host(at), plan.guest_port);
            engine.publish_udp(Owner::TheGuest, port, socket);
            self.world.borrow_mut().socks.begin_client(at, *plan);
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.now_us)
    }

    fn state(&self) -> String {
        let conn = |conn: &crate::world::Conn| {
            format!(
                "{}: read {} fin {} given {} fin {} discarded {} {:?}",
                conn.plan.remote,
                conn.read,
                conn.fin_taken,
                conn.given,
                conn.fin_given,
                conn.discarded,
                conn.end
            )
        };
        let conns: Vec<_> = self.world.borrow().conns.iter().map(conn).collect();
        let counters: Vec<_> =
            self.workers.iter().map(|worker| worker.engine.counters().drops_text()).collect();
        let (now, rounds) = (self.now_us, self.outcome.rounds);
        format!(
            "at {now} us, round {rounds}, world {conns:#?}, guest {}, drops {counters:?}",
            self.guest.state()
        )
    }

    fn is_done(&mut self) -> bool {
        let due = self.plan.reboot.is_some() && !self.rebooted;
        !due && self.guest.is_done()
            && self.datagrams.is_done()
            && self.clients.is_empty()
            && self.letters.is_empty()
            && self.world.borrow().conns.iter().all(|conn| conn.end != End::Open)
            && self.workers.iter_mut().all(|worker| worker.is_done())
    }

    /// One round of everybody.
    fn step(&mut self) {
        self.outcome.rounds += 1;
        self.trouble();
        self.world_step();
        if self.world.borrow().conns.iter().any(|conn| conn.end == End::Open) {
            self.outcome.elapsed_us = self.now_us;
        }
        self.frames_from_guest();
        self.letters_and_answers();
        let now = self.now();
        self.more = false;
        for worker in &mut self.workers {
            worker.engine.run_timers(now, &mut worker.port);
            self.more |= worker.engine.flush(&mut worker.port);
        }
        self.collect();
        self.frames_to_guest();
        self.guest.step(self.now_us);
        let frames: Vec<_> = self.guest.link.outbound.drain(..).collect();
        self.full_rings = if frames.len() >= RING_FRAMES { self.full_rings + 1 } else { 0 };
        for bytes in frames {
            let is_tcp = bytes[12..14] == [8, 0] && bytes[23] == 6;
            let mut frame = Frame { bytes, partial: self.plan.partial && is_tcp };
            self.keep_alives.outbound(&mut frame, |port| {
                let flow = self.plan.flows.iter().find(|flow| flow.guest_port == port)?;
                Some((Stream::new(flow.peer(), true), flow.bytes))
            });
            if self.plan.wraps {
                // Another guest chooses other numbers (RFC 6528).
                let guest = self.plan.seed as u32 ^ u32::from(self.rebooted);
                self.shift.outbound(&mut frame, 1 + guest.wrapping_mul(7919) % 200_000);
            }
            self.up.push(self.now_us, frame);
        }
        for bytes in self.datagrams.step(self.now_us) {
            self.up.push(self.now_us, Frame { bytes, partial: false });
        }
    }

    /// What befalls the guest's side between batches.
    fn trouble(&mut self) {
        let (plan, now) = (self.plan, self.now());
        for at in 0..self.workers.len() {
            let worker = &mut self.workers[at];
            if worker.port.is_up && self.rng.chance(plan.ring_stops) {
                worker.port.is_up = false;
                self.ring_up_at_us = self.now_us + self.rng.below(3_000_000) as u64;
                self.outcome.faults += 1;
            }
            if !worker.port.is_up && self.now_us >= self.ring_up_at_us {
                worker.port.is_up = true;
                worker.engine.guest_has_buffers(now, &mut worker.port);
            }
            if self.rng.chance(plan.offloads_change) {
                worker.port.offload = !worker.port.offload;
                self.outcome.faults += 1;
            }
        }
        if self.rng.chance(plan.guest_pauses) {
            self.guest.reads_nothing_until = self.now_us + self.rng.below(60_000_000) as u64;
            self.outcome.faults += 1;
        }
        if plan.mac_change.is_some_and(|after| self.guest.received() >= after) && !self.mac_changed {
            self.mac_changed = true;
            self.outcome.faults += 1;
            self.change_mac([0x52, 0x54, 0, 0, 0, 2]);
        }
        if let Some(reboot) = plan.reboot.filter(|_| !self.rebooted)
            && (self.guest.received() >= reboot.after || self.now_us > STALLED_US / 4)
        {
            self.reboot(reboot.announced, reboot.new_mac);
        }
    }

    fn change_mac(&mut self, mac: [u8; 6]) {
        self.guest.set_mac(mac);
        self.datagrams.mac = mac;
    }

    /// The guest begins anew: another stack with other sequence numbers on the same ports. Clients of
    /// published ports come again.
    fn reboot(&mut self, announced: bool, new_mac: bool) {
        self.rebooted = true;
        self.known_us = None;
        self.outcome.faults += 1;
        let mac = if new_mac { [0x52, 0x54, 0, 0, 0, 3] } else { MAC };
        self.guest = Guest::planned(self.plan, mac, !self.plan.seed);
        self.datagrams.reboot(mac);
        self.up.clear();
        self.down.clear();
        if announced {
            self.workers[0].engine.guest_reset();
        }
        for (n, flow) in self.plan.flows.iter().enumerate().filter(|(_, flow)| flow.published) {
            self.clients.retain(|(_, client)| *client != n);
            self.clients.push((self.now_us + 1000 + flow.begins_us, n));
        }
    }

    fn world_step(&mut self) {
        let now = self.now();
        for at in (0..self.clients.len()).rev() {
            let (due, flow) = self.clients[at];
            if due > self.now_us {
                continue;
            }
            // Whom nobody knows yet nobody can be led to: clients wait for the guest's first frame, and
            // until every worker was told of it.
            if self.known_us.is_none_or(|known| known + 1000 > self.now_us) {
                self.clients[at].0 = self.now_us + 1000;
            } else {
                self.clients.swap_remove(at);
                let listener = self.listeners[flow].expect("it is published");
                self.world.borrow_mut().arrive(flow, listener);
            }
        }
        self.world.borrow_mut().step(self.now_us);
        loop {
            let event = self.world.borrow_mut().events.pop_front();
            let Some((worker, token, ready)) = event else { break };
            let worker = &mut self.workers[usize::from(worker)];
            worker.engine.host_ready(now, &mut worker.port, token, ready);
        }
    }

    /// The queue the guest sends a frame on: one a flow, until it moves them.
    fn queue_of(&mut self, frame: &[u8]) -> usize {
        if self.workers.len() == 1 || frame.len() < 38 {
            return 0;
        }
        if self.rng.chance(self.plan.queue_moves) {
            self.spread = self.rng.next();
            self.outcome.faults += 1;
        }
        let ports = u64::from(u32::from_be_bytes([frame[34], frame[35], frame[36], frame[37]]));
        (ports ^ self.spread).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize / 7 % self.workers.len()
    }

    fn frames_from_guest(&mut self) {
        let now = self.now();
        while let Some(frame) = self.up.pop(self.now_us) {
            self.datagrams.note_fed(&frame.bytes);
            self.watch_wrap(0, &frame.bytes);
            self.watch_resent(&frame.bytes);
            let at = self.queue_of(&frame.bytes);
            self.trace('>', at, &frame.bytes);
            let checksum = match frame.partial {
                true => Checksum::Partial { start: 34, offset: 16 },
                false => VnetHeader::default().checksum,
            };
            let tx = TxFrame {
                vnet: VnetHeader { checksum, ..VnetHeader::default() },
                head: &frame.bytes[..frame.bytes.len().min(limits::FRAME_HEAD_BYTES)],
                whole: Payload::from_host(&frame.bytes),
                pair: QueuePair(at as u8),
            };
            let worker = &mut self.workers[at];
            worker.engine.from_guest(now, &mut worker.port, &tx);
            self.known_us.get_or_insert(self.now_us);
        }
        for worker in &mut self.workers {
            worker.engine.end_of_frames(&mut worker.port);
        }
        self.world.borrow().assert_none_gathered();
    }

    /// Notes where a direction's sequence numbers wrap.
    fn watch_wrap(&mut self, direction: usize, frame: &[u8]) {
        if frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != 6 {
            return;
        }
        let seq = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
        let last = std::mem::replace(&mut self.last_ack[direction], seq);
        if last > u32::MAX - 70_000 && seq < 70_000 {
            let wrapped = &mut self.outcome.wrapped;
            *(if direction == 0 { &mut wrapped.0 } else { &mut wrapped.1 }) = true;
        }
    }

    /// Counts a segment of bytes that came before.
    fn watch_resent(&mut self, frame: &[u8]) {
        if frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != 6 {
            return;
        }
        let number = |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let len = 14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))
            - 34
            - usize::from(frame[46] >> 4) * 4;
        let (ports, seq, is_syn) = (number(34), number(38), frame[47] & 2 != 0);
        let known = self.ends.get(&ports).copied().filter(|_| !is_syn);
        self.outcome.guest_resent +=
            usize::from(len > 0 && known.is_some_and(|end| end.wrapping_sub(seq).cast_signed() > 0));
        let end = seq.wrapping_add(len as u32);
        if known.is_none_or(|known| end.wrapping_sub(known).cast_signed() > 0) {
            self.ends.insert(ports, end);
        }
    }

    /// With `VUNET_SIM_TRACE`, prints a TCP header as it reaches engine (`>`) or guest (`<`).
    fn trace(&self, way: char, worker: usize, frame: &[u8]) {
        if !self.is_traced || frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != 6 {
            return;
        }
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let number = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let head = 34 + usize::from(frame[46] >> 4) * 4;
        let mut sum = vunet::wire::checksum::Accumulator::new();
        sum.add_bytes(&frame[26..34]);
        sum.add_bytes(&[0, 6]);
        sum.add_bytes(&((frame.len() - 34) as u16).to_be_bytes());
        sum.add_bytes(&frame[34..]);
        let bad = if sum.finish() == 0 { "" } else { "BAD " };
        eprintln!(
            "{bad}{} {way}{worker} {}:{} seq {} len {} ack {} flags {:02x} window {} options {:02x?}",
            self.now_us,
            word(34),
            word(36),
            number(38),
            frame.len() - head,
            number(42),
            frame[47],
            word(48),
            &frame[54..head]
        );
    }

    fn letters_and_answers(&mut self) {
        let now = self.now();
        for at in 0..self.workers.len() {
            let worker = &mut self.workers[at];
            while let Some((to, letter)) = worker.engine.next_letter() {
                // In order, and not at once.
                let soon = self.now_us + self.rng.below(200) as u64;
                let due = self.letters.back().map_or(soon, |(last, _, _)| soon.max(*last));
                self.letters.push_back((due, usize::from(to.0), letter));
                self.outcome.letters += 1;
            }
            while let Some(forward) = worker.engine.next_dns_forward() {
                let mut answer = forward.query;
                answer[2] |= 0x80;
                let due = self.now_us + self.rng.below(30_000) as u64;
                let due = self.answers.back().map_or(due, |(last, ..)| due.max(*last));
                self.answers.push_back((due, at, forward.id, answer));
            }
        }
        while self.letters.front().is_some_and(|(due, _, _)| *due <= self.now_us) {
            let Some((_, to, letter)) = self.letters.pop_front() else { break };
            let worker = &mut self.workers[to];
            worker.engine.letter(now, &mut worker.port, letter);
        }
        while self.answers.front().is_some_and(|(due, ..)| *due <= self.now_us) {
            let Some((_, to, id, answer)) = self.answers.pop_front() else { break };
            let worker = &mut self.workers[to];
            worker.engine.dns_answer(now, &mut worker.port, id, &answer);
        }
    }

    /// The guest's driver takes frames and posts its buffers again.
    fn collect(&mut self) {
        let now = self.now();
        for worker in &mut self.workers {
            let delivered = std::mem::take(&mut worker.port.delivered);
            if !delivered.is_empty() {
                let due = self.now_us + self.rng.below(self.plan.repost_us + 1) as u64;
                worker.reposts.push_back((due, delivered.len()));
            }
            for received in delivered {
                self.outcome.largest_frame = self.outcome.largest_frame.max(received.frame.len());
                for bytes in plain_frames(received) {
                    self.down.push(self.now_us, Frame { bytes, partial: false });
                }
            }
            let mut posted = false;
            while worker.reposts.front().is_some_and(|(due, _)| *due <= self.now_us) {
                worker.port.free += worker.reposts.pop_front().map_or(0, |(_, count)| count);
                posted = true;
            }
            if posted && worker.port.is_up && std::mem::take(&mut worker.port.starved) {
                self.outcome.faults += 1;
                worker.engine.guest_has_buffers(now, &mut worker.port);
                self.more = true;
            }
        }
    }

    fn frames_to_guest(&mut self) {
        while let Some(mut frame) = self.down.pop(self.now_us) {
            self.watch_wrap(1, &frame.bytes);
            self.trace('<', 0, &frame.bytes);
            if self.datagrams.receive(&self.world.borrow(), &frame.bytes) {
                continue;
            }
            if self.plan.wraps {
                self.shift.inbound(&mut frame);
            }
            self.duplicates.inbound(&mut frame);
            self.keep_alives.inbound(&mut frame);
            self.guest.link.inbound.extend(fin_apart(frame.bytes));
        }
    }

    /// On to when anybody has something to do.
    fn advance(&mut self) {
        if self.more {
            self.now_us += 5;
            return;
        }
        let now = self.now_us;
        let mut next = [
            self.up.next_at(),
            self.down.next_at(),
            self.world.borrow().next_at(),
            self.datagrams.next_at(),
            self.letters.front().map(|letter| letter.0),
            self.answers.front().map(|answer| answer.0),
            self.guest.next_deadline(now),
            self.clients.iter().map(|client| client.0).min(),
        ]
        .into_iter()
        .flatten()
        .min();
        let mut sooner = |at: u64| next = Some(next.map_or(at, |next| next.min(at)));
        for worker in &self.workers {
            worker.engine.next_deadline().map(Instant::as_micros).into_iter().for_each(&mut sooner);
            worker.reposts.front().into_iter().for_each(|(due, _)| sooner(*due));
            if !worker.port.is_up {
                sooner(self.ring_up_at_us);
            }
        }
        let reads_at = self.guest.reads_nothing_until;
        if reads_at > now {
            sooner(reads_at);
        } else if self.guest.has_unread() {
            sooner(now + 1000);
        }
        if !self.world.borrow().events.is_empty() {
            sooner(now + 1);
        }
        self.now_us = next.unwrap_or(now + 1_000_000).max(now + 1);
    }

    fn check(mut self) -> Outcome {
        if std::env::var_os("VUNET_SIM_SEED").is_some() {
            eprintln!("{}", self.state());
        }
        let seen = self.world.borrow();
        for (flow, app) in self.plan.flows.iter().zip(&self.guest.apps) {
            let ends: Vec<_> = seen.of(flow).collect();
            assert!(ends.iter().all(|conn| conn.end != End::Open), "{}: every socket is closed", flow.remote);
            // Refused connects have no socket's end to speak of, nor have those a reboot cut short. A client
            // from before a reboot the engine was not told of may be served by the new guest, and the one
            // after it then finds nobody; and a SYN that comes again after its flow began another.
            let served = ends.iter().rfind(|conn| conn.read == flow.bytes);
            check_flow(self.plan, flow, served.or(ends.last()), app);
        }
        let is_limited = self.plan.limits != ["none", "none"];
        let calm = self.plan.workers == 1 && self.plan.reboot.is_none() && !is_limited;
        if calm {
            self.datagrams.assert_all_taken(&seen);
        }
        let published =
            self.plan.datagrams.iter().filter(|plan| plan.kind == DatagramKind::Published).count();
        assert_eq!(seen.socks.open, published, "no datagram socket is left but those published");
        self.outcome.faults += seen.faults_seen + self.up.faults_seen + self.down.faults_seen;
        drop(seen);
        for worker in &mut self.workers {
            assert_eq!(worker.engine.nat().held_bytes(), 0, "no held payload is left");
            assert_eq!(worker.engine.next_deadline(), None, "no timer is left");
            let counters = worker.engine.counters();
            self.outcome.retransmits += counters.retransmits;
            self.outcome.limit_waits += counters.limited_from_guest.waits + counters.limited_to_guest.waits;
        }
        self.outcome.datagrams = self.datagrams.received;
        self.outcome
    }
}

/// What must have become of one flow, at both ends.
fn check_flow(plan: &Plan, flow: &FlowPlan, last: Option<&&crate::world::Conn>, app: &crate::guest::App) {
    let (bytes, name) = (flow.bytes, flow.remote);
    let conn = last.expect("the world saw the flow");
    match flow.ending {
        Ending::Full => {
            assert_eq!((conn.read, app.received), (bytes, bytes), "{name}: every byte both ways");
            assert!(conn.fin_taken && conn.fin_given, "{name}: both half-closes");
            // A guest may be gone from TIME-WAIT before its ring starts again and brings it the FIN once
            // more: that all of it had come nobody can know then.
            let may_be_forgotten = plan.ring_stops > 0.0 && conn.end == End::Reset;
            assert!(conn.end == End::Clean || may_be_forgotten, "{name}: no reset for the world");
            assert!(!app.was_reset, "{name}: no reset for the guest");
            assert_eq!(app.peer(), flow.peer());
        }
        Ending::WorldResets(_) => {
            // A client may go before the guest has taken it.
            assert!(app.was_reset || flow.published && !app.opened, "{name}: the guest sees the reset");
            assert_eq!(conn.end, End::Reset);
        }
        Ending::GuestAborts(_) => {
            // Of a connection that was complete nothing is left to reset.
            let complete = conn.fin_taken && conn.fin_given && (conn.read, app.received) == (bytes, bytes);
            assert!(conn.end == End::Reset || complete, "{name}: the world sees the reset");
        }
        Ending::Refused => {
            assert!(app.was_reset && app.received == 0, "{name}: the guest sees the refusal");
        }
    }
}
