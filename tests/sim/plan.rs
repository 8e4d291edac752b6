//! What a run is to be: flows, how each ends, and what goes wrong, all of it from one seed.

use std::hash::{Hash, Hasher};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use siphasher::sip::SipHasher13;
use vunet::engine::nat::tcp::Key;

use crate::random::Rng;

/// Bytes each way of a flow that runs to its end.
pub(crate) const FLOW_BYTES: usize = 256 << 10;
/// The guest's address.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Guest's ports from here on are served by hand, not by its stack.
pub(crate) const DATAGRAM_PORTS: u16 = 50_000;

/// What one direction of the guest leg does to frames, as probabilities a frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkFaults {
    pub(crate) lose: f64,
    pub(crate) repeat: f64,
    pub(crate) reorder: f64,
    /// How late a repeated or reordered frame comes, at most.
    pub(crate) late_us_max: usize,
    /// All later frames wait for up to `hold_us_max`.
    pub(crate) hold: f64,
    pub(crate) hold_us_max: usize,
    /// Between half of it and all of it.
    pub(crate) delay_us: usize,
    /// Frames arrive together at multiples of this.
    pub(crate) tick_us: u64,
}

impl LinkFaults {
    pub(crate) const NONE: LinkFaults = LinkFaults {
        lose: 0.0,
        repeat: 0.0,
        reorder: 0.0,
        late_us_max: 1,
        hold: 0.0,
        hold_us_max: 1,
        delay_us: 20,
        tick_us: 20,
    };
}

/// In what order a flow's two ends speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Both at once; whoever is done ends its direction.
    Both,
    /// The world begins after the guest's FIN.
    GuestFirst,
    /// The guest begins after the world's FIN.
    WorldFirst,
    /// Piece for piece of so many bytes, the guest first.
    Dialogue(usize),
}

/// How a flow is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Every byte and FIN both ways.
    Full,
    /// The world resets once it has sent so many bytes.
    WorldResets(usize),
    /// The guest resets once it has received so many bytes.
    GuestAborts(usize),
    /// Nobody listens.
    Refused,
}

/// One TCP flow.
#[derive(Clone, Debug)]
pub(crate) struct FlowPlan {
    /// The world's end: a server, or the client of a published port. No other flow has it.
    pub(crate) remote: SocketAddrV4,
    pub(crate) guest_port: u16,
    pub(crate) published: bool,
    /// When a client of a published port comes.
    pub(crate) begins_us: u64,
    /// Each way.
    pub(crate) bytes: usize,
    pub(crate) shape: Shape,
    pub(crate) ending: Ending,
    /// What the first connects end with; those after succeed.
    pub(crate) connect_errors: Vec<i32>,
    pub(crate) connect_us: u64,
    /// The world works every so often, on at most so many bytes.
    pub(crate) pace_us: usize,
    pub(crate) piece: usize,
    /// Room in its socket, each way.
    pub(crate) send_max: usize,
    pub(crate) queue_max: usize,
    /// Urgent bytes lie there in the world's stream.
    pub(crate) urgent_at: Option<usize>,
    /// The guest's socket buffers.
    pub(crate) guest_rx: usize,
    pub(crate) guest_tx: usize,
    /// Most the guest's application reads at once.
    pub(crate) guest_reads: usize,
    pub(crate) nagle: bool,
}

impl FlowPlan {
    pub(crate) fn peer(&self) -> SocketAddr {
        self.remote.into()
    }

    fn plain(n: usize, published: bool, bytes: usize) -> FlowPlan {
        let host = if published { 100 + n as u8 } else { 2 };
        FlowPlan {
            remote: SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, host), 7000 + n as u16),
            guest_port: if published { 8000 } else { 40_000 } + n as u16,
            published,
            begins_us: 1000,
            bytes,
            shape: Shape::Both,
            ending: Ending::Full,
            connect_errors: Vec::new(),
            connect_us: 100,
            pace_us: 1000,
            piece: 30_000,
            send_max: 48 << 10,
            queue_max: 96 << 10,
            urgent_at: None,
            guest_rx: 40_000,
            guest_tx: 40_000,
            guest_reads: usize::MAX,
            nagle: true,
        }
    }

    /// As the seed has it.
    fn random(rng: &mut Rng, n: usize, published: bool) -> FlowPlan {
        let shape = match rng.below(6) {
            0 => Shape::GuestFirst,
            1 => Shape::WorldFirst,
            2 => Shape::Dialogue(rng.between(FLOW_BYTES / 100, FLOW_BYTES / 4)),
            _ => Shape::Both,
        };
        let connect_errors: &[i32] = match rng.below(10) {
            0 => &[libc::ETIMEDOUT],
            1 => &[libc::EHOSTUNREACH, libc::ETIMEDOUT],
            _ => &[],
        };
        FlowPlan {
            shape,
            connect_errors: connect_errors.to_vec(),
            begins_us: rng.below(50_000) as u64,
            connect_us: rng.pick(&[10, 300, 40_000, 700_000]),
            pace_us: rng.pick(&[50, 300, 2_000, 20_000]),
            piece: rng.pick(&[1_000, 10_000, 30_000, 200_000]),
            send_max: rng.between(4 << 10, 200 << 10),
            queue_max: rng.between(4 << 10, 200 << 10),
            urgent_at: rng.chance(0.1).then(|| rng.below(FLOW_BYTES)),
            guest_rx: rng.between(3_000, 150_000),
            guest_tx: rng.between(3_000, 150_000),
            guest_reads: rng.pick(&[1_500, 20_000, usize::MAX, usize::MAX]),
            nagle: rng.chance(0.5),
            ..FlowPlan::plain(n, published, FLOW_BYTES)
        }
    }
}

/// An exchange of datagrams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DatagramPlan {
    pub(crate) kind: DatagramKind,
    /// The world's end; for the gateway's services not looked at.
    pub(crate) remote: SocketAddrV4,
    /// The guest's port, or the identifier of its echo requests.
    pub(crate) guest_port: u16,
    /// How many the guest sends, or the client of a published port.
    pub(crate) count: usize,
    pub(crate) bytes_max: usize,
    pub(crate) pace_us: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DatagramKind {
    Udp,
    Published,
    Echo,
    Dns,
}

/// The guest begins anew.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reboot {
    /// Once the guest has received so many bytes in all.
    pub(crate) after: usize,
    /// Its driver says so; otherwise only its segments do.
    pub(crate) announced: bool,
    pub(crate) new_mac: bool,
}

/// A whole run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) flows: Vec<FlowPlan>,
    pub(crate) datagrams: Vec<DatagramPlan>,
    pub(crate) up: LinkFaults,
    pub(crate) down: LinkFaults,
    /// Receive buffers, and how long the driver takes to post one again.
    pub(crate) buffers: usize,
    pub(crate) repost_us: usize,
    /// The engine's frames may be large and lack checksums; and the guest's lack them.
    pub(crate) offload: bool,
    pub(crate) partial: bool,
    pub(crate) ip_mtu: u16,
    pub(crate) guest_mtu: u16,
    pub(crate) workers: u8,
    /// The guest sends on other queues from now on, a probability a frame.
    pub(crate) queue_moves: f64,
    /// The receive ring stops, and the guest's offloads change: a probability a round.
    pub(crate) ring_stops: f64,
    pub(crate) offloads_change: f64,
    /// The guest's applications read nothing for up to a minute, a probability a round.
    pub(crate) guest_pauses: f64,
    /// A socket takes less than it promised, a probability a send.
    pub(crate) refuse: f64,
    /// The world does nothing for up to `stall_us_max`, a probability a step.
    pub(crate) stall: f64,
    pub(crate) stall_us_max: usize,
    /// The world's segments are damaged, a probability a step. The host's kernel throws such away: what
    /// is left of it is a wait. Datagrams' bytes are changed.
    pub(crate) corrupt: f64,
    /// Sequence numbers wrap early: the guest's in every flow, the engine's in the first.
    pub(crate) wraps: bool,
    pub(crate) timestamps: bool,
    pub(crate) reboot: Option<Reboot>,
    /// The guest goes on with another MAC address after so many bytes.
    pub(crate) mac_change: Option<usize>,
    /// Kernels before 6.9 read from the front only.
    pub(crate) front_only: bool,
    /// Rate limits from and to the guest.
    pub(crate) limits: [&'static str; 2],
}

impl Plan {
    /// `flows` flows to servers on a link that loses nothing.
    pub(crate) fn clean(seed: u64, flows: usize, bytes: usize) -> Plan {
        Plan {
            seed,
            flows: (0..flows).map(|n| FlowPlan::plain(n, false, bytes)).collect(),
            datagrams: Vec::new(),
            up: LinkFaults::NONE,
            down: LinkFaults::NONE,
            buffers: 256,
            repost_us: 0,
            offload: false,
            partial: false,
            ip_mtu: 1500,
            guest_mtu: 1500,
            workers: 1,
            queue_moves: 0.0,
            ring_stops: 0.0,
            offloads_change: 0.0,
            guest_pauses: 0.0,
            refuse: 0.0,
            stall: 0.0,
            stall_us_max: 1,
            corrupt: 0.0,
            wraps: false,
            timestamps: false,
            reboot: None,
            mac_change: None,
            front_only: false,
            limits: ["none", "none"],
        }
    }

    /// The same with another shape and ending of every flow.
    pub(crate) fn with(mut self, shape: Shape, ending: Ending) -> Plan {
        for flow in &mut self.flows {
            (flow.shape, flow.ending) = (shape, ending);
        }
        self
    }

    /// Everything from the seed: at least four flows of [`FLOW_BYTES`] each way that run to their end,
    /// two of them through published ports, others that do not, datagrams, and faults of many kinds.
    pub(crate) fn hostile(seed: u64) -> Plan {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let mut plan = Plan::clean(seed, 0, 0);
        for n in 0..4 {
            plan.flows.push(FlowPlan::random(&mut rng, n, n % 2 == 1));
        }
        plan.add_short_flows(&mut rng);
        plan.add_datagrams(&mut rng);
        plan.choose_machine(&mut rng);
        plan.choose_faults(&mut rng);
        plan.choose_limits(&mut rng);
        plan
    }

    /// Flows that do not end as their guest wishes.
    fn add_short_flows(&mut self, rng: &mut Rng) {
        let endings = [
            Ending::WorldResets(rng.below(FLOW_BYTES)),
            Ending::GuestAborts(rng.below(FLOW_BYTES)),
            Ending::Refused,
        ];
        for ending in endings {
            if rng.chance(0.4) {
                let n = self.flows.len();
                let published = ending != Ending::Refused && rng.chance(0.5);
                let mut flow = FlowPlan::random(rng, n, published);
                flow.ending = ending;
                flow.shape = Shape::Both;
                if ending == Ending::Refused {
                    flow.connect_errors = vec![libc::ECONNREFUSED; 1000];
                }
                self.flows.push(flow);
            }
        }
    }

    fn add_datagrams(&mut self, rng: &mut Rng) {
        use DatagramKind::{Dns, Echo, Published, Udp};
        for (n, kind) in [Udp, Udp, Published, Echo, Dns].into_iter().enumerate() {
            if rng.chance(0.5) {
                self.datagrams.push(DatagramPlan {
                    kind,
                    remote: SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1 + n as u8), 9000 + n as u16),
                    guest_port: DATAGRAM_PORTS + n as u16,
                    count: rng.between(5, 60),
                    bytes_max: if kind == Dns { 200 } else { rng.pick(&[100, 1_400, 9_000]) },
                    pace_us: rng.pick(&[20, 1_000, 50_000]),
                });
            }
        }
    }

    fn choose_machine(&mut self, rng: &mut Rng) {
        self.ip_mtu = rng.pick(&[576, 1280, 1500, 1500, 9000, 65_520]);
        self.guest_mtu = if rng.chance(0.8) { self.ip_mtu } else { self.ip_mtu.min(1280) };
        self.offload = rng.chance(0.5);
        self.partial = rng.chance(0.5);
        self.workers = rng.pick(&[1, 1, 2, 3]);
        self.timestamps = rng.chance(0.5);
        self.wraps = rng.chance(0.4);
        self.front_only = rng.chance(0.3);
        for link in [&mut self.up, &mut self.down] {
            link.tick_us = rng.pick(&[1, 20, 200, 1_000]);
            link.delay_us = rng.pick(&[1, 50, 500, 10_000]);
        }
    }

    /// Each kind of fault as strong as the seed says, and not all of them in one run: what hides behind a
    /// strong fault comes up in a run without it.
    fn choose_faults(&mut self, rng: &mut Rng) {
        let mut kinds: Vec<usize> = (0..11).filter(|_| rng.chance(0.4)).collect();
        while kinds.len() < 3 {
            let kind = rng.below(11);
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        // Whatever rare faults a seed is left with, a few frames come twice.
        (self.up.repeat, self.down.repeat) = (0.008, 0.008);
        for kind in kinds {
            let mut up_to = |max: f64| (0.1 + 0.9 * rng.below(1000) as f64 / 1000.0) * max;
            match kind {
                0 => (self.up.lose, self.down.lose) = (up_to(0.06), up_to(0.06)),
                1 => (self.up.repeat, self.down.repeat) = (up_to(0.08), up_to(0.08)),
                2 => (self.up.reorder, self.down.reorder) = (up_to(0.15), up_to(0.15)),
                3 => (self.up.hold, self.down.hold) = (up_to(0.003), up_to(0.003)),
                4 => self.refuse = up_to(0.4),
                5 => (self.stall, self.stall_us_max) = (up_to(0.02), rng.pick(&[50_000, 90_000_000])),
                6 => self.corrupt = up_to(0.05),
                7 => (self.buffers, self.repost_us) = (rng.between(2, 12), rng.pick(&[0, 200, 5_000])),
                8 => (self.ring_stops, self.offloads_change) = (up_to(0.001), up_to(0.005)),
                9 => self.guest_pauses = up_to(0.0005),
                _ => self.choose_guest_change(rng),
            }
        }
        if self.workers > 1 {
            self.queue_moves = rng.pick(&[0.001, 0.02]);
        }
        for link in [&mut self.up, &mut self.down] {
            (link.late_us_max, link.hold_us_max) = (rng.pick(&[100, 2_000, 300_000]), 3_000_000);
        }
    }

    fn choose_limits(&mut self, rng: &mut Rng) {
        if rng.chance(0.4) {
            let specs = [
                "none",
                "rate=2mbit",
                "rate=40mbit,burst=1kb",
                "packets=2000",
                "rate=20mbit,packets=1000,packets-burst=1",
            ];
            self.limits = [rng.pick(&specs), rng.pick(&specs)];
        }
    }

    fn choose_guest_change(&mut self, rng: &mut Rng) {
        let after = rng.below(FLOW_BYTES);
        if rng.chance(0.3) {
            self.mac_change = Some(after);
        } else {
            let announced = rng.chance(0.6);
            self.reboot = Some(Reboot { after, announced, new_mac: rng.chance(0.3) });
        }
    }

    /// A key for the engine's initial sequence numbers; one that wraps early in the first flow, if that is
    /// wanted. (The engine's own function, RFC 6528; a test sees that it still is.)
    pub(crate) fn isn_secret(&self) -> (u64, u64) {
        let secret = |n: u64| (self.seed.wrapping_add(n << 32), !self.seed);
        let Some(flow) = self.flows.first().filter(|_| self.wraps) else { return secret(0) };
        let key = Key { guest: SocketAddr::new(GUEST.into(), flow.guest_port), remote: flow.peer() };
        let early = |secret: &(u64, u64)| {
            let mut hasher = SipHasher13::new_with_keys(secret.0, secret.1);
            key.hash(&mut hasher);
            (u32::MAX - 230_000..u32::MAX - 30_000).contains(&(hasher.finish() as u32))
        };
        (0..1 << 20).map(secret).find(early).expect("one of 20,000 does")
    }
}
