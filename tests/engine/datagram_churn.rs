//! A day of datagrams, echoes, errors and fragments in virtual time, against a model of who may still
//! answer: no exchange ends early or late, no socket, timer or table outlives what it is for.
//!
//! Seeded; `VUNET_CHURN_SEED=n` replays one run.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::Duration;

use vunet::limits;
use vunet::time::Instant;
use vunet::wire::icmpv4::{Message, UnreachableCode};
use vunet::wire::ipv4::Protocol;

use crate::errors::guest_refuses;
use crate::frames::{Seen, echo_frame, fragments, guest, udp_frame, udp_message};
use crate::random::Rng;
use crate::rig::{COMPLAINT, Rig, pattern, secs};
use crate::world::Complaint;

const SEEDS: u64 = 4;
const DAY: Duration = secs(24 * 3600);
/// Ports and identifiers of the guest, and remote ends, few enough to meet again and again.
const OWN: usize = 12;
const REMOTES: usize = 9;

/// An exchange: whether of echoes, the guest's port or identifier, the remote end.
type Exchange = (bool, u16, SocketAddrV4);

#[derive(Clone, Copy)]
struct Life {
    last: Instant,
    answered: bool,
}

impl Life {
    /// When it is over, by the times `docs/udp-icmp.md` names.
    fn ends(self, exchange: &Exchange) -> Instant {
        let idle = match (exchange.0, exchange.2.port()) {
            (true, _) => 60,
            (false, 53) => 30,
            (false, _) if self.answered => 300,
            (false, _) => 120,
        };
        self.last + secs(idle)
    }
}

struct Churn {
    rig: Rig,
    rng: Rng,
    lives: BTreeMap<Exchange, Life>,
    /// The newest socket of each port or identifier.
    sockets: BTreeMap<(bool, u16), usize>,
    answers: usize,
    refusals: usize,
}

impl Churn {
    /// An exchange of the model's half of the time, else any.
    fn exchange(&mut self) -> Exchange {
        if self.rng.chance(0.5)
            && let Some(exchange) = self.lives.keys().nth(self.rng.below(self.lives.len()))
        {
            return *exchange;
        }
        let (is_echo, own) = (self.rng.chance(0.25), 4000 + self.rng.below(OWN) as u16);
        let n = self.rng.below(REMOTES) as u8;
        let port = if is_echo { 0 } else { [53, 9, 5060][usize::from(n % 3)] };
        (is_echo, own, SocketAddrV4::new([198, 51, 100, n].into(), port))
    }

    fn is_alive(&self, exchange: &Exchange) -> bool {
        self.lives.get(exchange).is_some_and(|life| self.rig.now < life.ends(exchange))
    }

    /// The socket of the exchange's own end, if any exchange keeps it open.
    fn socket(&self, exchange: &Exchange) -> Option<usize> {
        let of_it = |other: &&Exchange| (other.0, other.1) == (exchange.0, exchange.1);
        let is_open = self.lives.keys().filter(of_it).any(|other| self.is_alive(other));
        is_open.then(|| self.sockets[&(exchange.0, exchange.1)])
    }

    fn guest_sends(&mut self) {
        let exchange @ (is_echo, own, to) = self.exchange();
        let before = self.socket(&exchange);
        let count = self.rig.world().socks.len();
        let frame = match is_echo {
            true => echo_frame(*to.ip(), own, 1, b"ask"),
            false => udp_frame(guest(own), to, b"ask"),
        };
        assert_eq!(self.rig.send(&frame), []);
        let at = before.unwrap_or(count);
        assert_eq!(self.rig.world().socks.len(), count + usize::from(before.is_none()), "{exchange:?}");
        let sent = self.rig.sock(at).sent.pop().map(|(_, to)| to);
        assert_eq!(sent, Some(SocketAddr::from(to)));
        self.sockets.insert((is_echo, own), at);
        let answered = self.is_alive(&exchange) && self.lives[&exchange].answered;
        self.lives.insert(exchange, Life { last: self.rig.now, answered });
    }

    fn world_answers(&mut self) {
        let exchange @ (is_echo, own, from) = self.exchange();
        let Some(at) = self.socket(&exchange) else { return };
        let bytes = if is_echo { vec![0, 0, 0, 0, 9, 9, 0, 1] } else { b"answer".to_vec() };
        let seen = self.rig.datagram_arrives(at, &bytes, from.into());
        assert_eq!(seen.len(), usize::from(self.is_alive(&exchange)), "{exchange:?}");
        match seen.first() {
            Some(Seen::Udp { from: seen, to, .. }) => {
                assert_eq!((*seen, *to), (from.into(), guest(own).into()));
            }
            Some(Seen::Icmp { from: seen, message, .. }) => {
                assert_eq!((*seen, *message), (*from.ip(), Message::EchoReply { ident: own, seq: 1 }));
            }
            _ => return,
        }
        self.answers += 1;
        self.lives.insert(exchange, Life { last: self.rig.now, answered: true });
    }

    /// The world complains, which changes nothing.
    fn world_complains(&mut self) {
        let exchange @ (is_echo, own, to) = self.exchange();
        let Some(at) = self.socket(&exchange) else { return };
        let mut quoted = vec![0; 11];
        Message::EchoRequest { ident: own, seq: 1 }.emit_with_payload(b"ask", &mut quoted);
        let quoted = if is_echo { quoted } else { b"ask".to_vec() };
        let message = Message::Unreachable { code: UnreachableCode::Host, next_hop_mtu: 0 };
        self.rig.sock(at).complaints.push_back(Complaint { to: to.into(), offender: None, message, quoted });
        let token = self.rig.sock(at).token;
        let seen = self.rig.ready(token, COMPLAINT);
        assert_eq!(seen.len(), usize::from(self.is_alive(&exchange)));
    }

    /// The guest refuses an answer, which ends the exchange if it had one.
    fn guest_refuses(&mut self) {
        let exchange @ (is_echo, own, from) = self.exchange();
        if !is_echo {
            assert_eq!(self.rig.send(&guest_refuses(3, from, guest(own))), []);
            if self.is_alive(&exchange) && self.lives[&exchange].answered {
                self.lives.remove(&exchange);
                self.refusals += 1;
            }
        }
    }

    /// Fragments of a datagram that is never whole; to a port no exchange of the model has.
    fn fragments_come(&mut self) {
        let to = SocketAddrV4::new([198, 51, 100, 200].into(), 9);
        let message = udp_message(guest(9), to, &pattern(4000));
        let ident = self.rng.below(1 << 16) as u16;
        let missing = self.rng.below(3);
        let parts = fragments(*to.ip(), Protocol::UDP, &message, ident, 1500);
        for (_, part) in parts.iter().enumerate().filter(|(n, _)| *n != missing) {
            self.rig.feed(part);
        }
    }

    fn check(&mut self) {
        let now = self.rig.now;
        self.lives.retain(|exchange, life| now < life.ends(exchange));
        let mut ends: Vec<(bool, u16)> = self.lives.keys().map(|(echo, own, _)| (*echo, *own)).collect();
        ends.sort_unstable();
        ends.dedup();
        assert_eq!(self.rig.engine.nat().len(), ends.len(), "a socket for each end that has an exchange");
        assert_eq!(self.rig.world().open(), ends.len());
        assert!(self.rig.engine.reassembly_bytes() <= limits::REASSEMBLY_BYTES_MAX);
        let first = self.lives.iter().map(|(exchange, life)| life.ends(exchange)).min();
        assert!(first.is_none() || self.rig.engine.next_deadline() <= first, "no timer is lost");
    }

    fn run(mut self) -> (usize, usize) {
        let end = self.rig.now + DAY;
        while self.rig.now < end {
            for _ in 0..self.rng.below(8) {
                match self.rng.below(10) {
                    0..4 => self.guest_sends(),
                    4..7 => self.world_answers(),
                    7 => self.world_complains(),
                    8 => self.guest_refuses(),
                    _ => self.fragments_come(),
                }
            }
            // Mostly busy, sometimes long quiet, sometimes for as long as an idle time exactly.
            let pause = match self.rng.below(20) {
                0 => self.rng.pick(&[30, 60, 120, 300]) * 1000,
                1 => self.rng.between(200_000, 600_000),
                _ => self.rng.below(20_000),
            };
            self.rig.pass(Duration::from_millis(pause as u64));
            self.check();
        }
        self.rig.pass(secs(600));
        self.check();
        self.rig.assert_empty();
        assert_eq!(self.rig.engine.reassembly_bytes(), 0);
        (self.answers, self.refusals)
    }
}

#[test]
fn a_day_of_datagrams_leaks_nothing_and_ends_nothing_early() {
    let seeds = match std::env::var("VUNET_CHURN_SEED") {
        Ok(seed) => {
            let seed: u64 = seed.parse().expect("VUNET_CHURN_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    };
    for seed in seeds {
        println!("VUNET_CHURN_SEED={seed}");
        let rng = Rng::new(seed);
        let (lives, sockets) = (BTreeMap::new(), BTreeMap::new());
        let churn = Churn { rig: Rig::new(), rng, lives, sockets, answers: 0, refusals: 0 };
        let (answers, refusals) = churn.run();
        assert!(answers > 1000 && refusals > 10, "the day was busy: {answers} answers, {refusals} refusals");
    }
}
