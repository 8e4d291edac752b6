//! Whom to ask, in which order: the resolvers there are, and how they have done lately.
//!
//! They are asked in the order they are named, as the C library does, or in turn with `rotate`. One that
//! failed twice in a row is held back: asked only after the others. After a pause that doubles with each
//! further failure one question tries it again, and only that one pays for it if it is still silent. Any
//! answer makes it as good as new. An answer that tells of failure is an answer: the resolver lives.
//!
//! Time is an argument.

use std::net::SocketAddr;
use std::time::Duration;

use crate::control::dns_forward::resolv_conf::ResolvConf;
use crate::limits;
use crate::time::Instant;

/// Failures in a row after which one is held back: one datagram may get lost.
const FAILURES_MAX: u32 = 2;
/// The first pause, and the longest.
const HOLD_MIN: Duration = Duration::from_secs(5);
const HOLD_MAX: Duration = Duration::from_secs(60);
/// When a datagram is sent again: after three times what answers usually take, but within these; and
/// where nothing is known, after the longest.
const RESEND_MIN: Duration = Duration::from_millis(300);
const RESEND_MAX: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    /// Asked in its order; so many failures in a row.
    Good(u32),
    /// Asked after the others until then; the pause was so long.
    Held(Instant, Duration),
    /// One question tries it, until then at most; the pause before was so long.
    Tried(Instant, Duration),
}

#[derive(Debug)]
struct Server {
    addr: SocketAddr,
    health: Health,
    /// What its answers take, smoothed (as RFC 6298, 2 does).
    usual: Option<Duration>,
}

/// One resolver to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Try {
    pub(super) addr: SocketAddr,
    /// When to send a datagram again, doubling from there.
    pub(super) resend_after: Duration,
}

/// Whom to ask for one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) tries: Vec<Try>,
    /// How long each has to answer.
    pub(super) timeout: Duration,
    /// How often silent ones are asked.
    pub(super) attempts: u32,
}

/// The resolvers as known at present.
#[derive(Debug)]
pub(super) struct UpstreamList {
    servers: Vec<Server>,
    conf: ResolvConf,
    /// Whose turn is next, with `rotate`.
    turn: usize,
}

impl UpstreamList {
    /// Those of `conf`.
    pub(super) fn new(conf: ResolvConf) -> UpstreamList {
        let servers = conf.servers.iter().map(|&addr| Server { addr, health: Health::Good(0), usual: None });
        UpstreamList { servers: servers.collect(), conf, turn: 0 }
    }

    /// The settings they came from.
    pub(super) fn conf(&self) -> &ResolvConf {
        &self.conf
    }

    /// Forgets how they have done: the way to them is another.
    pub(super) fn forget_health(&mut self) {
        for server in &mut self.servers {
            (server.health, server.usual) = (Health::Good(0), None);
        }
    }

    /// Whom to ask for a question that comes `now`.
    pub(super) fn plan(&mut self, now: Instant) -> Plan {
        let timeout = self.conf.timeout;
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        if self.conf.rotate && !order.is_empty() {
            self.turn = (self.turn + 1) % order.len();
            order.rotate_left(self.turn);
        }
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for at in order {
            let server = &mut self.servers[at];
            let is_asked = match server.health {
                Health::Good(_) => true,
                Health::Held(until, pause) | Health::Tried(until, pause) if now >= until => {
                    server.health = Health::Tried(now + timeout + timeout, pause);
                    true
                }
                Health::Held(..) | Health::Tried(..) => false,
            };
            if is_asked { &mut first } else { &mut last }.push(server.as_try());
        }
        first.append(&mut last);
        Plan { tries: first, timeout, attempts: self.conf.attempts }
    }

    /// `addr` answered after `took`.
    pub(super) fn answered(&mut self, addr: SocketAddr, took: Duration) {
        let Some(server) = self.servers.iter_mut().find(|server| server.addr == addr) else { return };
        if matches!(server.health, Health::Held(..) | Health::Tried(..)) {
            tracing::info!(resolver = %addr, "answers again");
        }
        server.health = Health::Good(0);
        server.usual = Some(server.usual.map_or(took, |usual| (usual * 7 + took) / 8));
    }

    /// `addr` was silent or could not be reached.
    pub(super) fn failed(&mut self, now: Instant, addr: SocketAddr) {
        let Some(server) = self.servers.iter_mut().find(|server| server.addr == addr) else { return };
        server.health = match server.health {
            Health::Good(failures) if failures + 1 < FAILURES_MAX => Health::Good(failures + 1),
            Health::Good(_) => {
                tracing::info!(resolver = %addr, "does not answer; others are asked first");
                Health::Held(now + HOLD_MIN, HOLD_MIN)
            }
            Health::Tried(_, pause) => {
                let pause = (pause * 2).min(HOLD_MAX);
                Health::Held(now + pause, pause)
            }
            // Asked before it was held back.
            held @ Health::Held(..) => held,
        };
    }
}

impl Server {
    fn as_try(&self) -> Try {
        let usual = self.usual.map_or(RESEND_MAX, |usual| usual * 3);
        Try { addr: self.addr, resend_after: usual.clamp(RESEND_MIN, RESEND_MAX) }
    }
}

/// `servers` given by hand, as settings.
pub(super) fn given(servers: &[SocketAddr]) -> ResolvConf {
    let mut servers = servers.to_vec();
    if servers.len() > limits::DNS_UPSTREAMS_MAX {
        let used = limits::DNS_UPSTREAMS_MAX;
        tracing::warn!(given = servers.len(), used, "more resolvers than are ever tried");
        servers.truncate(used);
    }
    ResolvConf { servers, ..ResolvConf::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1000)
    }

    fn addr(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 53))
    }

    fn list(rotate: bool) -> UpstreamList {
        UpstreamList::new(ResolvConf { rotate, ..given(&[addr(1), addr(2), addr(3)]) })
    }

    fn order(list: &mut UpstreamList, ms: u64) -> Vec<u8> {
        let last = |addr: SocketAddr| match addr {
            SocketAddr::V4(addr) => addr.ip().octets()[3],
            SocketAddr::V6(_) => 0,
        };
        list.plan(at(ms)).tries.iter().map(|one| last(one.addr)).collect()
    }

    #[test]
    fn resolvers_are_asked_in_their_order_or_in_turn() {
        let mut plain = list(false);
        assert_eq!(order(&mut plain, 0), [1, 2, 3]);
        assert_eq!(order(&mut plain, 0), [1, 2, 3]);
        let mut rotating = list(true);
        let first: Vec<u8> = (0..4).map(|_| order(&mut rotating, 0)[0]).collect();
        assert_eq!(first, [2, 3, 1, 2]);
        assert!(order(&mut UpstreamList::new(ResolvConf::default()), 0).is_empty());
    }

    #[test]
    fn one_failure_holds_nobody_back_and_two_in_a_row_do() {
        let mut list = list(false);
        list.failed(at(0), addr(1));
        assert_eq!(order(&mut list, 0), [1, 2, 3]);
        list.answered(addr(1), Duration::from_millis(20));
        list.failed(at(0), addr(1));
        assert_eq!(order(&mut list, 0), [1, 2, 3], "not in a row");
        list.failed(at(0), addr(1));
        assert_eq!(order(&mut list, 0), [2, 3, 1]);
    }

    #[test]
    fn one_question_tries_again_after_a_pause_that_doubles_up_to_a_minute() {
        let mut list = list(false);
        for _ in 0..100 {
            // Many questions were on their way when it fell silent.
            list.failed(at(0), addr(1));
        }
        let mut held_at_ms = 0;
        for pause_ms in [5_000, 10_000, 20_000, 40_000, 60_000, 60_000] {
            assert_eq!(order(&mut list, held_at_ms + pause_ms - 1), [2, 3, 1], "{pause_ms}");
            assert_eq!(order(&mut list, held_at_ms + pause_ms), [1, 2, 3]);
            assert_eq!(order(&mut list, held_at_ms + pause_ms), [2, 3, 1], "only one tries");
            held_at_ms += pause_ms + 2_000;
            list.failed(at(held_at_ms), addr(1));
        }
        list.answered(addr(1), Duration::from_millis(20));
        assert_eq!(order(&mut list, held_at_ms), [1, 2, 3]);
    }

    #[test]
    fn a_question_that_tried_and_never_told_leaves_room_for_another() {
        let mut list = list(false);
        list.failed(at(0), addr(1));
        list.failed(at(0), addr(1));
        assert_eq!(order(&mut list, 5_000), [1, 2, 3]);
        assert_eq!(order(&mut list, 8_999), [2, 3, 1]);
        assert_eq!(order(&mut list, 9_000), [1, 2, 3]);
    }

    #[test]
    fn where_all_are_held_back_all_are_asked() {
        let mut list = list(false);
        for n in [1, 2, 3, 1, 2, 3] {
            list.failed(at(0), addr(n));
        }
        assert_eq!(order(&mut list, 1), [1, 2, 3]);
        list.forget_health();
        assert_eq!(list.servers[0].health, Health::Good(0));
    }

    #[test]
    fn datagrams_are_sent_again_after_what_answers_usually_take() {
        let mut list = list(false);
        let resend = |list: &mut UpstreamList| list.plan(at(0)).tries[0].resend_after.as_millis();
        assert_eq!(resend(&mut list), 1_000);
        list.answered(addr(1), Duration::from_millis(10));
        assert_eq!(resend(&mut list), 300);
        for _ in 0..50 {
            list.answered(addr(1), Duration::from_millis(200));
        }
        assert!((590..=600).contains(&resend(&mut list)), "{}", resend(&mut list));
        list.answered(addr(1), Duration::from_secs(20));
        assert_eq!(resend(&mut list), 1_000);
    }

    #[test]
    fn no_more_are_used_than_are_ever_tried() {
        let five: Vec<_> = (1..=5).map(addr).collect();
        assert_eq!(given(&five).servers, five[..4]);
    }
}
