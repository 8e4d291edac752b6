//! Guests that send anything at all, and a world that does too: nothing panics, spins or leaks.
//!
//! Seeded; `VUNET_HOSTILE_SEED=n` replays one run.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use vunet::config::{Mode, NatConfig, UdpConfig, UdpFiltering, UdpMapping};
use vunet::engine::counters::Counters;
use vunet::engine::guest_port::GuestOffloads;
use vunet::engine::host_net::{Readiness, SendSpace, Token};
use vunet::frame::QueuePair;
use vunet::limits;
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::Protocol;
use vunet::wire::tcp::{Flags, Options};
use vunet::wire::vnet::{Checksum, VnetHeader};

use crate::frames::{
    GATEWAY, GUEST_IP, Seen, Seg, WORLD, echo_message, fragments, frame, ip, udp_frame, udp_message,
};
use crate::random::Rng;
use crate::rig::{Rig, Setup, pattern, secs};
use crate::world::Complaint;

/// Runs by default.
const SEEDS: u64 = 20;
/// Events of one run.
const EVENTS: usize = 1500;

/// What the guest last heard of a connection, to aim at.
#[derive(Clone, Copy, Default)]
struct Aim {
    seq: u32,
    ack: u32,
}

struct Chaos {
    rig: Rig,
    rng: Rng,
    aims: Vec<((u16, SocketAddr), Aim)>,
    listener: Token,
}

impl Chaos {
    fn new(seed: u64) -> Chaos {
        let mut rng = Rng::new(seed);
        let offload = rng.below(2) == 0;
        let udp = UdpConfig {
            mapping: rng.pick(&[UdpMapping::EndpointIndependent, UdpMapping::AddressAndPortDependent]),
            filtering: rng.pick(&[
                UdpFiltering::EndpointIndependent,
                UdpFiltering::AddressDependent,
                UdpFiltering::AddressAndPortDependent,
            ]),
        };
        let setup = Setup {
            flows_max: 4 + rng.below(20),
            ip_mtu: rng.pick(&[576, 1500, 9000, 65_521]),
            offloads: GuestOffloads { checksum: offload, tso4: offload, ..GuestOffloads::default() },
            mode: Mode::Nat(NatConfig { allow_host_loopback: true, udp, ..NatConfig::default() }),
            ..Setup::default()
        };
        let mut rig = Rig::with(setup);
        let listener = rig.engine.nat().next_listener_token();
        let socket = rig.engine.nat().net().listener();
        rig.publish_tcp(22, socket);
        let token = rig.engine.nat().next_datagram_token();
        let socket = rig.engine.nat().net().published_udp(token);
        rig.publish_udp(53, socket);
        Chaos { rig, rng, aims: Vec::new(), listener }
    }

    fn run(mut self) -> Counters {
        for _ in 0..EVENTS {
            match self.rng.below(20) {
                0..8 => self.segment(),
                8..10 => self.datagram(),
                10 => self.garbage(),
                11..14 => self.socket_event(),
                14 => self.datagram_arrives(),
                15 => self.client_arrives(),
                16 => self.receive_side(),
                17 => self.time_passes(),
                18 => self.sockets_change(),
                _ => {
                    self.settle();
                }
            }
            assert!(self.rig.engine.nat().held_bytes() <= limits::TCP_POOL_BYTES_MAX);
        }
        self.rig.port.is_up = true;
        self.rig.port.free = usize::MAX;
        self.settle();
        let counters = self.rig.engine.counters().clone();
        self.rig.engine.guest_reset();
        assert!(self.rig.engine.nat().is_empty());
        assert_eq!(self.rig.engine.nat().held_bytes(), 0);
        // Clients that no descriptor was left for are taken now, and reset: there is no guest.
        self.rig.world().descriptors_max = usize::MAX;
        self.rig.pass(secs(1));
        assert!(self.rig.world().backlogs[0].is_empty(), "a client was forgotten");
        assert_eq!(self.rig.engine.next_deadline(), None);
        assert_eq!(self.rig.world().open(), 1, "the published socket only");
        counters
    }

    /// Ends a batch and remembers what the guest heard.
    fn settle(&mut self) {
        self.rig.engine.end_of_frames(&mut self.rig.port);
        for seen in self.rig.flush() {
            let Seen::Tcp(segment) = seen else { continue };
            let key = (segment.to.port(), segment.from);
            let fin = u32::from(segment.has(Flags::FIN)) + u32::from(segment.has(Flags::SYN));
            let end = segment.header.seq.0.wrapping_add(segment.payload.len() as u32 + fin);
            let aim = Aim { seq: segment.header.ack.0, ack: end };
            match self.aims.iter_mut().find(|(other, _)| *other == key) {
                Some((_, known)) => *known = aim,
                None => self.aims.push((key, aim)),
            }
        }
        if self.aims.len() > 64 {
            self.aims.remove(0);
        }
    }

    fn remote(&mut self) -> SocketAddrV4 {
        let ip = self.rng.pick(&[WORLD, GATEWAY, Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::LOCALHOST]);
        SocketAddrV4::new(ip, self.rng.pick(&[0, 22, 53, 80, 999, 65_535]))
    }

    fn guest(&mut self) -> SocketAddrV4 {
        let host = self.rng.pick(&[2, 2, 2, 3, 254]);
        SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, host), self.rng.pick(&[22, 53, 4000, 4001, 65_535]))
    }

    fn near(&mut self, value: u32) -> u32 {
        let by =
            self.rng.pick(&[0, 0, 0, 0, 1, 2, 1460, 65_535, 1 << 20, 1 << 31, u32::MAX, u32::MAX - 1460]);
        value.wrapping_add(by)
    }

    fn segment(&mut self) {
        let (from, to, aim) = match self.aims.len() {
            count if count > 0 && self.rng.below(4) > 0 => {
                let ((port, remote), aim) = self.aims[self.rng.below(count)];
                let SocketAddr::V4(remote) = remote else { return };
                (SocketAddrV4::new(GUEST_IP, port), remote, aim)
            }
            _ => (self.guest(), self.remote(), Aim::default()),
        };
        let common = [Flags::SYN, Flags::ACK, Flags::ACK, Flags::ACK, Flags::ACK | Flags::FIN, Flags::RST];
        let flags = match self.rng.below(6) == 0 {
            true => Flags(self.rng.next() as u8),
            false if aim.ack == 0 => self.rng.pick(&[Flags::SYN, Flags::SYN | Flags::ACK]),
            false => self.rng.pick(&common),
        };
        let options = Options {
            mss: self.rng.pick(&[None, Some(0), Some(1), Some(1460), Some(65_535)]),
            window_scale: self.rng.pick(&[None, Some(0), Some(7), Some(14)]),
            ..Options::default()
        };
        let len = self.rng.pick(&[0, 0, 0, 1, 100, 1460, 20_000, 65_000]);
        let payload = pattern(len);
        let (seq, ack) = (self.near(aim.seq), self.near(aim.ack));
        let window = self.rng.pick(&[0, 1, 100, 1460, 65_535]);
        let frame = Seg { from, to, seq, ack, flags, window, options, payload: &payload }.frame();
        let pair = QueuePair(self.rng.below(3) as u8);
        self.rig.feed_on(pair, VnetHeader::default(), &frame);
    }

    fn datagram(&mut self) {
        let (from, to) = (self.guest(), self.remote());
        let len = self.rng.pick(&[0, 1, 100, 1472, 9000, 65_507]);
        let payload = pattern(len);
        if self.rng.below(3) == 0 {
            let message = if self.rng.below(2) == 0 {
                echo_message(from.port(), 1, &payload)
            } else {
                udp_message(from, to, &payload)
            };
            let protocol = if message[0] == 8 { Protocol::ICMP } else { Protocol::UDP };
            let mtu = self.rng.pick(&[576, 1500, 65_535]);
            for part in fragments(*to.ip(), protocol, &message, self.rng.next() as u16 % 8, mtu) {
                if self.rng.below(8) > 0 {
                    self.rig.feed(&part);
                }
            }
            return;
        }
        self.rig.feed(&udp_frame(from, to, &payload));
    }

    /// A good frame with bytes changed, cut anywhere, or only random bytes; checksums of no account.
    fn garbage(&mut self) {
        let protocol = self.rng.pick(&[Protocol::TCP, Protocol::UDP, Protocol::ICMP, Protocol(99)]);
        let len = self.rng.below(300);
        let bytes: Vec<u8> = (0..len).map(|_| self.rng.next() as u8).collect();
        let mut out = frame(&ip(GUEST_IP, *self.remote().ip(), protocol, len), &bytes);
        for _ in 0..self.rng.below(4) {
            let at = self.rng.below(out.len());
            out[at] = self.rng.next() as u8;
        }
        let cut = 14 + self.rng.below(out.len() - 13);
        out.truncate(cut);
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        self.rig.feed_with(VnetHeader { checksum, ..VnetHeader::default() }, &out);
    }

    fn readiness(&mut self) -> Readiness {
        let bits = self.rng.next();
        let bit = |n: u32| bits >> n & 1 == 1;
        Readiness {
            readable: bit(1),
            writable: bit(2) || bit(3),
            peer_closed: bit(4) && bit(5),
            failed: bit(6) && bit(7) && bit(8),
            urgent: bit(9) && bit(10),
        }
    }

    fn socket_event(&mut self) {
        let count = self.rig.world().conns.len();
        if count == 0 {
            return;
        }
        let ready = self.readiness();
        let token = {
            let at = count - 1 - self.rng.below(count.min(30));
            let mut conn = self.rig.conn(at);
            if ready.readable && !conn.fin_from_world {
                conn.queue.extend(pattern(self.rng.below(100_000)));
            }
            if ready.writable {
                conn.room = self.rng.below(1 << 20);
            }
            conn.fin_from_world |= ready.peer_closed;
            if ready.failed {
                conn.error = Some(self.rng.pick(&[libc::ECONNRESET, libc::EPIPE, libc::ETIMEDOUT]));
            }
            conn.token
        };
        self.rig.engine.host_ready(self.rig.now, &mut self.rig.port, token, ready);
    }

    fn datagram_arrives(&mut self) {
        let count = self.rig.world().socks.len();
        let at = count - 1 - self.rng.below(count.min(30));
        let at = if self.rng.below(3) == 0 { 0 } else { at };
        let len = self.rng.pick(&[0, 1, 8, 100, 1472, 9000, 65_507]);
        let from = SocketAddr::from(self.remote());
        let complaint = (self.rng.below(3) == 0).then(|| self.complaint());
        let token = {
            let mut sock = self.rig.sock(at);
            sock.inbox.push_back((pattern(len), from));
            sock.complaints.extend(complaint);
            sock.token
        };
        let ready = self.readiness();
        self.rig.engine.host_ready(self.rig.now, &mut self.rig.port, token, ready);
    }

    /// An ICMP error of the world about anything at all.
    fn complaint(&mut self) -> Complaint {
        let (kind, code) = (self.rng.pick(&[3, 3, 5, 11, 12]), self.rng.below(16) as u8);
        let message = Message::parse(&[kind, code, 0, 0, 0, 0, 5, 0]).expect("eight bytes");
        let len = self.rng.pick(&[0, 7, 8, 100, 548]);
        let mut quoted: Vec<u8> = (0..len).map(|_| self.rng.next() as u8).collect();
        if len > 0 && self.rng.below(2) == 0 {
            quoted[0] = 8;
        }
        let offender = (self.rng.below(2) == 0).then(|| IpAddr::V4(*self.remote().ip()));
        Complaint { to: self.remote().into(), offender, message, quoted }
    }

    fn client_arrives(&mut self) {
        let client = SocketAddr::from(self.remote());
        self.rig.world().backlogs[0].push_back(client);
        let ready = self.readiness();
        self.rig.engine.host_ready(self.rig.now, &mut self.rig.port, self.listener, ready);
    }

    fn receive_side(&mut self) {
        self.rig.port.frame_bytes_max = self.rng.pick(&[60, 1514, 70_000, 70_000, 70_000]);
        self.rig.port.is_up = self.rng.below(4) > 0;
        self.rig.port.free = self.rng.pick(&[0, 1, 10, usize::MAX]);
        self.rig.engine.guest_has_buffers(self.rig.now, &mut self.rig.port);
    }

    fn time_passes(&mut self) {
        let pause = self.rng.pick(&[1, 50, 300, 2_000, 70_000, 8_000_000]);
        self.rig.now = self.rig.now + Duration::from_millis(pause);
        self.rig.engine.run_timers(self.rig.now, &mut self.rig.port);
    }

    fn sockets_change(&mut self) {
        let mut world = self.rig.world();
        world.connect_error =
            self.rng.pick(&[None, None, None, Some(libc::ECONNREFUSED), Some(libc::ENETUNREACH)]);
        world.descriptors_max = self.rng.pick(&[usize::MAX, usize::MAX, 5, 2]);
        world.room = self.rng.pick(&[0, 1, 5000, 1 << 20]);
        let count = world.conns.len();
        if count > 0 {
            let at = count - 1 - self.rng.below(count.min(30));
            let bytes = self.rng.below(1 << 20);
            world.conns[at].space = Some(SendSpace { bytes, tight: self.rng.below(2) == 0 });
            world.conns[at].connect_error = self.rng.pick(&[None, None, Some(libc::EHOSTUNREACH)]);
        }
    }
}

#[test]
fn nothing_a_guest_or_a_world_sends_panics_spins_or_leaks() {
    let seeds = match std::env::var("VUNET_HOSTILE_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("VUNET_HOSTILE_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    };
    let (mut from_guest, mut to_guest, mut evicted) = (0, 0, 0);
    for seed in seeds {
        match std::panic::catch_unwind(|| Chaos::new(seed).run()) {
            Ok(counters) => {
                from_guest += counters.payload_from_guest_bytes;
                to_guest += counters.payload_to_guest_bytes;
                evicted += counters.flows_evicted;
            }
            Err(panic) => {
                eprintln!("failed with VUNET_HOSTILE_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    assert!(from_guest > 0 && to_guest > 0 && evicted > 0, "it reaches past the first checks");
    eprintln!("{from_guest} bytes from and {to_guest} to the guest, {evicted} flows evicted");
}
