//! One run: a guest, an engine, a world, the faults between them, and what must hold at the end.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use vunet::config::{DnsConfig, IpMtu, Lan, Mode, NatConfig};
use vunet::engine::{Engine, EngineConfig};
use vunet::frame::{Payload, QueuePair, TxFrame};
use vunet::limits;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Instant;
use vunet::wire::vnet::VnetHeader;

use crate::guest::Guest;
use crate::port::{SimPort, plain_frames};
use crate::world::{End, SimNet, World};

/// Virtual time after which a run counts as stalled.
const STALLED_US: u64 = 1_800_000_000;
/// The world's pace.
const WORLD_STEP_US: u64 = 1_000;

/// xorshift64*: small, seedable, good enough to choose faults.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((self.next() >> 33) % bound.max(1) as u64) as usize
    }
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        ((self.next() >> 11) as f64 / (1u64 << 53) as f64) < probability
    }
}

/// The byte at `at` of a flow's stream.
pub(crate) fn pattern(peer: SocketAddr, from_guest: bool, at: usize) -> u8 {
    let seed = u64::from(peer.port()) << 1 | u64::from(from_guest);
    let mixed = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed.wrapping_mul(0xff51_afd7_ed55_8ccd);
    (mixed >> 29) as u8
}

/// What goes wrong between guest and engine, as probabilities a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub(crate) lose: f64,
    pub(crate) repeat: f64,
    pub(crate) reorder: f64,
    /// A socket takes less than it promised, a probability a send.
    pub(crate) refuse: f64,
    /// The receive ring stops for a while, a probability a round.
    pub(crate) ring_stops: f64,
    /// The guest accepts other offloads from now on, a probability a round.
    pub(crate) offloads_change: f64,
    /// The guest's applications read nothing for up to a minute, a probability a round.
    pub(crate) guest_pauses: f64,
}

impl Faults {
    pub(crate) const NONE: Faults = Faults {
        lose: 0.0,
        repeat: 0.0,
        reorder: 0.0,
        refuse: 0.0,
        ring_stops: 0.0,
        offloads_change: 0.0,
        guest_pauses: 0.0,
    };
}

#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) seed: u64,
    pub(crate) flows: usize,
    /// Each way, a flow.
    pub(crate) bytes: usize,
    pub(crate) faults: Faults,
    pub(crate) buffers: usize,
    pub(crate) offload: bool,
    pub(crate) world_resets: bool,
    pub(crate) guest_vanishes: bool,
    pub(crate) refused: bool,
    pub(crate) answers_late: bool,
}

/// What a run cost.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) retransmits: u64,
    pub(crate) largest_frame: usize,
}

impl Scenario {
    pub(crate) fn clean(seed: u64) -> Scenario {
        Scenario {
            seed,
            flows: 3,
            bytes: 150_000,
            faults: Faults::NONE,
            buffers: 256,
            offload: false,
            world_resets: false,
            guest_vanishes: false,
            refused: false,
            answers_late: false,
        }
    }

    /// Every kind of fault, each as strong as the seed says.
    pub(crate) fn hostile(seed: u64) -> Scenario {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let mut up_to = |max: f64| rng.below(1000) as f64 / 1000.0 * max;
        let faults = Faults {
            lose: up_to(0.08),
            repeat: up_to(0.08),
            reorder: up_to(0.15),
            refuse: up_to(0.3),
            ring_stops: up_to(0.002),
            offloads_change: up_to(0.01),
            guest_pauses: up_to(0.0005),
        };
        Scenario {
            faults,
            flows: 4,
            bytes: 64 << 10,
            buffers: 4 + rng.below(250),
            offload: rng.chance(0.3),
            answers_late: rng.chance(0.3),
            ..Scenario::clean(seed)
        }
    }

    pub(crate) fn run(&self) -> Outcome {
        let mut run = Run::new(self);
        run.until_done();
        run.check()
    }
}

struct Run<'a> {
    scenario: &'a Scenario,
    engine: Engine<SimNet>,
    world: Rc<RefCell<World>>,
    guest: Guest,
    port: SimPort,
    rng: Rng,
    now_us: u64,
    world_next_us: u64,
    largest_frame: usize,
    vanished: bool,
    ring_up_at_us: u64,
}

/// Where the guest's flows go.
fn peers(flows: usize) -> Vec<SocketAddrV4> {
    (0..flows).map(|n| SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 2), 7000 + n as u16)).collect()
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

fn engine(world: &Rc<RefCell<World>>, seed: u64) -> Engine<SimNet> {
    let config = engine_config(seed, Mode::Nat(NatConfig::default()));
    let service = Arc::new(DnsService::new(&config.dns, &config.lan, true));
    let dhcp = Arc::new(Mutex::new(DhcpServer::new(&config.lan, &config.dns)));
    Engine::new(&config, SimNet(Rc::clone(world)), dhcp, service)
}

impl Run<'_> {
    fn new(scenario: &Scenario) -> Run<'_> {
        let mut world = World::new(Rng::new(scenario.seed + 1), scenario.bytes);
        world.refuse = scenario.faults.refuse;
        world.refuse_connects = scenario.refused;
        world.answers_late = scenario.answers_late;
        world.reset_after = scenario.world_resets.then_some(scenario.bytes / 2);
        let world = Rc::new(RefCell::new(world));
        Run {
            scenario,
            engine: engine(&world, scenario.seed),
            world,
            guest: Guest::new(scenario.seed, &peers(scenario.flows), scenario.bytes),
            port: SimPort::new(scenario.offload, scenario.buffers),
            rng: Rng::new(scenario.seed + 2),
            now_us: 0,
            world_next_us: 0,
            largest_frame: 0,
            vanished: false,
            ring_up_at_us: 0,
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.now_us)
    }

    fn until_done(&mut self) {
        while !self.is_done() {
            assert!(self.now_us < STALLED_US, "stalled: {}", self.state());
            let busy = self.step();
            self.advance(busy);
        }
    }

    fn state(&self) -> String {
        let conns: Vec<_> = self
            .world
            .borrow()
            .conns
            .iter()
            .map(|c| (c.received, c.fin_received, c.fin_sent, c.end))
            .collect();
        let apps: Vec<_> = self.guest.apps.iter().map(|a| (a.received, a.was_reset)).collect();
        format!("now {} world {conns:?}, guest {apps:?}, {:?}", self.now_us, self.engine.counters())
    }

    fn is_done(&mut self) -> bool {
        let ended = self.world.borrow().conns.iter().all(|conn| conn.end != End::Open);
        let begun = self.world.borrow().conns.len() == self.scenario.flows;
        begun && ended && (self.vanished || self.guest.is_done()) && self.engine.nat().is_empty()
    }

    /// One round of everybody; true if anything moved.
    fn step(&mut self) -> bool {
        let now = self.now();
        self.trouble(now);
        if !self.vanished {
            self.guest.step(self.now_us);
        }
        if self.scenario.guest_vanishes
            && !self.vanished
            && self.world.borrow().conns.iter().all(|c| c.received > self.scenario.bytes / 3)
            && self.world.borrow().conns.len() == self.scenario.flows
        {
            self.vanished = true;
            self.engine.guest_reset();
        }
        let outbound = std::mem::take(&mut self.guest.link.outbound);
        let mut busy = !outbound.is_empty();
        for frame in self.disturb(outbound) {
            self.feed(now, &frame);
        }
        if self.now_us >= self.world_next_us {
            self.world_next_us = self.now_us + WORLD_STEP_US;
            self.world.borrow_mut().step();
        }
        loop {
            let event = self.world.borrow_mut().next_event();
            let Some((token, ready)) = event else { break };
            busy = true;
            self.engine.host_ready(now, &mut self.port, token, ready);
        }
        self.engine.run_timers(now, &mut self.port);
        busy |= self.engine.flush(&mut self.port);
        busy | self.deliver(now)
    }

    /// What befalls the guest's side between batches.
    fn trouble(&mut self, now: Instant) {
        let faults = self.scenario.faults;
        if self.port.is_up && self.rng.chance(faults.ring_stops) {
            self.port.is_up = false;
            self.ring_up_at_us = self.now_us + self.rng.below(3_000_000) as u64;
        }
        if !self.port.is_up && self.now_us >= self.ring_up_at_us {
            self.port.is_up = true;
            self.engine.guest_has_buffers(now, &mut self.port);
        }
        if self.rng.chance(faults.offloads_change) {
            self.port.offload = !self.port.offload;
        }
        if self.rng.chance(faults.guest_pauses) {
            self.guest.reads_nothing_until = self.now_us + self.rng.below(60_000_000) as u64;
        }
    }

    fn feed(&mut self, now: Instant, frame: &[u8]) {
        let head = &frame[..frame.len().min(limits::FRAME_HEAD_BYTES)];
        let frame = TxFrame {
            vnet: VnetHeader::default(),
            head,
            whole: Payload::from_host(frame),
            pair: QueuePair::default(),
        };
        self.engine.from_guest(now, &mut self.port, &frame);
    }

    /// The guest's driver takes frames and posts its buffers again.
    fn deliver(&mut self, now: Instant) -> bool {
        let delivered = std::mem::take(&mut self.port.delivered);
        let busy = !delivered.is_empty();
        self.port.free += delivered.len();
        let mut frames = VecDeque::new();
        for received in delivered {
            self.largest_frame = self.largest_frame.max(received.frame.len());
            frames.extend(plain_frames(received));
        }
        let frames = self.disturb(frames);
        self.guest.link.inbound.extend(frames);
        if std::mem::take(&mut self.port.starved) {
            self.engine.guest_has_buffers(now, &mut self.port);
        }
        busy
    }

    /// Loses, repeats and reorders frames.
    fn disturb(&mut self, frames: VecDeque<Vec<u8>>) -> VecDeque<Vec<u8>> {
        let faults = self.scenario.faults;
        let mut out = VecDeque::new();
        for frame in frames {
            // Without the gateway's address nothing begins; its loss tests the guest's stack only.
            let is_arp = frame[12..14] == [8, 6];
            if !is_arp && self.rng.chance(faults.lose) {
                continue;
            }
            if self.rng.chance(faults.repeat) {
                out.push_back(frame.clone());
            }
            out.push_back(frame);
            let len = out.len();
            if len > 1 && self.rng.chance(faults.reorder) {
                let other = self.rng.below(len);
                out.swap(len - 1, other);
            }
        }
        out
    }

    fn advance(&mut self, busy: bool) {
        if busy {
            self.now_us += 20;
            return;
        }
        let engine = self.engine.next_deadline().map(Instant::as_micros);
        let guest = if self.vanished { None } else { self.guest.next_deadline(self.now_us) };
        let active = self.world.borrow().conns.iter().any(|conn| conn.end == End::Open);
        let world = active.then_some(self.world_next_us);
        let ring = (!self.port.is_up).then_some(self.ring_up_at_us);
        let reads = Some(self.guest.reads_nothing_until).filter(|until| *until > self.now_us);
        let next = [engine, guest, world, ring, reads].into_iter().flatten().min();
        self.now_us = next.unwrap_or(self.now_us + WORLD_STEP_US).max(self.now_us + 1);
    }

    fn check(mut self) -> Outcome {
        let bytes = self.scenario.bytes;
        let world = self.world.borrow();
        for (conn, app) in world.conns.iter().zip(&self.guest.apps) {
            if self.scenario.refused {
                assert!(app.was_reset && app.received == 0, "the guest must see the refusal");
            } else if self.scenario.guest_vanishes {
                assert_eq!(conn.end, End::Reset, "a dead guest is a reset, never FIN");
            } else if self.scenario.world_resets {
                assert!(app.was_reset, "the guest must see the reset");
            } else {
                assert_eq!((conn.received, app.received), (bytes, bytes), "every byte both ways");
                assert!(conn.fin_received && conn.fin_sent, "both half-closes");
                assert_eq!(conn.end, End::Clean);
                assert!(!app.was_reset);
            }
        }
        drop(world);
        assert!(self.engine.nat().is_empty(), "no flow is left");
        assert_eq!(self.engine.nat().held_bytes(), 0, "no held payload is left");
        assert_eq!(self.engine.next_deadline(), None, "no timer is left");
        let counters = self.engine.counters();
        Outcome { retransmits: counters.retransmits, largest_frame: self.largest_frame }
    }
}
