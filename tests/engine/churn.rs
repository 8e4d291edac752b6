//! A virtual day of a guest whose connections come, end in every way there is, idle, break and are
//! forgotten: afterwards no flow is left, no socket, no timer, and no table has grown.
//!
//! A flow takes a [`Course`]; its steps come due at random times, and what the engine sends by itself
//! (segments again, questions whether the guest lives) is answered unless the guest has forgotten the
//! flow. Seeded: the day is the same each time.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddrV4;
use std::time::Duration;

use vunet::engine::host_net::Readiness;
use vunet::frame::QueuePair;
use vunet::time::Instant;
use vunet::wire::ipv4::Protocol;
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::VnetHeader;

use crate::frames::{
    Seen, TcpSeen, WORLD, echo_frame, fragments, gateway, guest, udp_frame, udp_message, world,
};
use crate::gateway::query;
use crate::heap;
use crate::random::Rng;
use crate::rig::{FAILED, Peer, READABLE, Rig, WORLD_FIN, WRITABLE, ms, pattern, secs};
use crate::world::End;

/// What becomes of a TCP flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Course {
    /// Question, answer, the guest ends first.
    GuestEnds,
    /// The same, the world ends first.
    WorldEnds,
    /// The guest ends its half at once; the answer comes hours later.
    HalfClosed,
    GuestResets,
    WorldResets,
    Refused,
    /// The connect ends hours later, if ever.
    Unanswered,
    /// The guest never acknowledges the handshake.
    HalfOpen,
    /// The guest forgets the flow with bytes of the world under way.
    Vanishes,
    /// The guest forgets an idle flow.
    VanishesIdle,
}

const COURSES: [Course; 10] = [
    Course::GuestEnds,
    Course::WorldEnds,
    Course::HalfClosed,
    Course::GuestResets,
    Course::WorldResets,
    Course::Refused,
    Course::Unanswered,
    Course::HalfOpen,
    Course::Vanishes,
    Course::VanishesIdle,
];

/// A TCP flow as its guest and its world have it.
struct Live {
    peer: Peer,
    course: Course,
    /// Which stream of the world's.
    conn: usize,
    step: usize,
    /// The guest has sent its FIN, has got the world's.
    ended: (bool, bool),
}

struct Churn {
    rigs: Vec<Rig>,
    rng: Rng,
    /// By the guest's port.
    live: HashMap<u16, Live>,
    /// When a flow has its next step: time and the guest's port.
    due: BTreeMap<(Instant, u16), ()>,
    now: Instant,
    next_port: u16,
    opened: BTreeMap<Course, usize>,
}

impl Churn {
    fn new(workers: u8) -> Churn {
        Churn {
            rigs: Rig::workers(workers),
            rng: Rng::new(24),
            live: HashMap::new(),
            due: BTreeMap::new(),
            now: Instant::from_micros(1_000_000),
            next_port: 1024,
            opened: BTreeMap::new(),
        }
    }

    /// Hands a frame to any worker and the letters that follow to all; what the guest hears is answered.
    fn send(&mut self, frame: &[u8]) {
        let worker = self.rng.below(self.rigs.len());
        let rig = &mut self.rigs[worker];
        rig.feed_on(QueuePair(worker as u8), VnetHeader::default(), frame);
        let seen = rig.flush();
        self.hear(seen);
    }

    /// What the guest does about what it hears, and about what it hears then.
    fn hear(&mut self, first: Vec<Seen>) {
        let mut seen = first;
        for _ in 0..1000 {
            seen.extend(self.letters());
            if seen.is_empty() {
                return;
            }
            let frames: Vec<_> = std::mem::take(&mut seen)
                .into_iter()
                .filter_map(|seen| match seen {
                    Seen::Tcp(segment) => self.answer(&segment),
                    _ => None,
                })
                .collect();
            for frame in frames {
                let worker = self.rng.below(self.rigs.len());
                self.rigs[worker].feed_on(QueuePair(worker as u8), VnetHeader::default(), &frame);
                seen.extend(self.rigs[worker].flush());
            }
        }
        panic!("guest and engine never fall silent");
    }

    fn letters(&mut self) -> Vec<Seen> {
        crate::handover::exchange(&mut self.rigs).into_iter().flatten().collect()
    }

    /// The guest's stack: takes what comes in order and acknowledges; knows nothing of forgotten flows,
    /// and, unlike a stack, says nothing about them: that is what a guest looks like that lost power.
    fn answer(&mut self, segment: &TcpSeen) -> Option<Vec<u8>> {
        let live = self.live.get_mut(&segment.to.port())?;
        if live.course == Course::HalfOpen {
            return None;
        }
        if segment.has(Flags::RST) {
            self.live.remove(&segment.to.port());
            return None;
        }
        let peer = &mut live.peer;
        if segment.has(Flags::SYN) {
            peer.ack = segment.header.seq.0.wrapping_add(1);
            peer.seq = segment.header.ack.0;
            return Some(peer.seg(Flags::ACK, &[]).frame());
        }
        if segment.payload.is_empty() && !segment.has(Flags::FIN) && segment.header.seq.0 == peer.ack {
            return None;
        }
        if segment.header.seq.0 == peer.ack {
            live.ended.1 |= segment.has(Flags::FIN);
            let fin = u32::from(segment.has(Flags::FIN));
            peer.ack = peer.ack.wrapping_add(segment.payload.len() as u32 + fin);
        }
        Some(peer.seg(Flags::ACK, &[]).frame())
    }

    /// Time goes on to `until`, with each worker's deadlines met in order.
    fn pass(&mut self, until: Instant) {
        let mut turns = 0;
        loop {
            let next = self.rigs.iter().filter_map(|rig| rig.engine.next_deadline()).min();
            let Some(at) = next.filter(|at| *at <= until) else { break };
            self.now = self.now.max(at);
            for worker in 0..self.rigs.len() {
                let rig = &mut self.rigs[worker];
                rig.now = self.now;
                rig.engine.run_timers(rig.now, &mut rig.port);
                let seen = rig.flush();
                self.hear(seen);
            }
            turns += 1;
            assert!(turns < 100_000, "timers spin");
        }
        self.now = until;
        self.rigs.iter_mut().for_each(|rig| rig.now = until);
    }

    /// Opens a TCP flow of any course.
    fn open(&mut self) {
        let port = self.next_port;
        self.next_port = if port == 30_000 { 1024 } else { port + 1 };
        if self.live.contains_key(&port) {
            return;
        }
        let course = self.rng.pick(&COURSES);
        let peer = Peer { seq: self.rng.next() as u32, ..Peer::new(guest(port), world(80)) };
        let conn = self.rigs[0].world().conns.len();
        self.live.insert(port, Live { peer, course, conn, step: 0, ended: (false, false) });
        self.send(&peer.seg(Flags::SYN, &[]).frame());
        self.live.get_mut(&port).expect("nothing answers a SYN at once").peer.seq = peer.seq.wrapping_add(1);
        *self.opened.entry(course).or_default() += 1;
        self.schedule(port, ms(1), ms(1000));
    }

    fn schedule(&mut self, port: u16, least: Duration, most: Duration) {
        let wait = self.rng.between(least.as_micros() as usize, most.as_micros() as usize);
        self.due.insert((self.now + Duration::from_micros(wait as u64), port), ());
    }

    /// News of a flow's stream, at whichever worker has it.
    fn world_says(&mut self, conn: usize, ready: Readiness) {
        if self.rigs[0].conn(conn).end != End::Open {
            return;
        }
        let token = self.rigs[0].conn(conn).token;
        for worker in 0..self.rigs.len() {
            let rig = &mut self.rigs[worker];
            let seen = rig.ready(token, ready);
            self.hear(seen);
        }
    }

    /// The guest sends bytes, a FIN, or both.
    fn guest_says(&mut self, port: u16, flags: Flags, bytes: &[u8]) {
        let Some(live) = self.live.get_mut(&port) else { return };
        let frame = live.peer.seg(Flags::ACK | flags, bytes).frame();
        let fin = u32::from(flags.contains(Flags::FIN));
        live.ended.0 |= flags.contains(Flags::FIN);
        live.peer.seq = live.peer.seq.wrapping_add(bytes.len() as u32 + fin);
        self.send(&frame);
    }

    /// The next step of the flow at `port`; the first two are common to all that get so far.
    fn step(&mut self, port: u16) {
        let Some(live) = self.live.get_mut(&port) else { return };
        let (course, conn, step) = (live.course, live.conn, live.step);
        live.step += 1;
        match (step, course) {
            (0, Course::Refused) => {
                self.rigs[0].conn(conn).connect_error = Some(libc::ECONNREFUSED);
                self.world_says(conn, FAILED);
            }
            (0, Course::Unanswered) => self.schedule(port, secs(10), secs(7200)),
            (1, Course::Unanswered) => {
                self.rigs[0].conn(conn).connect_error = Some(libc::ETIMEDOUT);
                self.world_says(conn, FAILED);
                self.live.remove(&port);
            }
            (0, _) => {
                self.world_says(conn, WRITABLE);
                self.schedule(port, ms(1), secs(5));
            }
            (1, Course::HalfOpen) => {}
            (1, Course::HalfClosed) => {
                self.guest_says(port, Flags::PSH | Flags::FIN, &pattern(700));
                self.schedule(port, secs(60), secs(3 * 3600));
            }
            (1, _) => {
                self.guest_says(port, Flags::PSH, &pattern(1200));
                let len = self.rng.between(1, 20_000);
                self.rigs[0].conn(conn).queue.extend(pattern(len));
                self.world_says(conn, READABLE);
                self.schedule(port, ms(1), secs(600));
            }
            (2, _) => self.end(port, course, conn),
            (_, _) => self.second_end(port, course, conn),
        }
    }

    fn end(&mut self, port: u16, course: Course, conn: usize) {
        match course {
            Course::GuestEnds => {
                self.guest_says(port, Flags::FIN, &[]);
                self.schedule(port, ms(1), secs(100));
            }
            Course::WorldEnds | Course::HalfClosed => {
                if course == Course::HalfClosed {
                    self.rigs[0].conn(conn).queue.extend(pattern(3000));
                }
                self.rigs[0].conn(conn).fin_from_world = true;
                self.world_says(conn, WORLD_FIN);
                self.schedule(port, ms(1), secs(100));
            }
            Course::GuestResets => {
                self.guest_says(port, Flags::RST, &[]);
                self.live.remove(&port);
            }
            Course::WorldResets => {
                self.rigs[0].conn(conn).error = Some(libc::ECONNRESET);
                self.world_says(conn, FAILED);
            }
            Course::Vanishes => {
                self.live.remove(&port);
                self.rigs[0].conn(conn).queue.extend(pattern(500));
                self.world_says(conn, READABLE);
            }
            _ => drop(self.live.remove(&port)),
        }
    }

    fn second_end(&mut self, port: u16, course: Course, conn: usize) {
        match course {
            Course::GuestEnds => {
                self.rigs[0].conn(conn).fin_from_world = true;
                self.world_says(conn, WORLD_FIN);
            }
            Course::WorldEnds => self.guest_says(port, Flags::FIN, &[]),
            _ => {}
        }
        if let Some(live) = self.live.remove(&port) {
            assert_eq!(live.ended, (true, true), "{course:?}: both ends were passed on");
            assert_eq!(self.rigs[0].conn(conn).end, End::Clean, "{course:?}: an orderly end");
        }
    }

    /// Datagrams, echoes, names and fragments whose rest never comes.
    fn datagrams(&mut self) {
        let port = self.rng.between(40_000, 50_000) as u16;
        match self.rng.below(4) {
            0 => self.udp(port),
            1 => self.send(&echo_frame(WORLD, port, 1, b"ping")),
            2 => self.name(port),
            _ => {
                let message = udp_message(guest(port), world(9), &pattern(3000));
                let first = &fragments(WORLD, Protocol::UDP, &message, port, 1500)[0];
                self.send(first);
            }
        }
    }

    fn udp(&mut self, port: u16) {
        let sock = self.rigs[0].world().socks.len();
        self.send(&udp_frame(guest(port), world(9), b"ask"));
        let is_new = self.rigs[0].world().socks.len() > sock;
        if is_new && self.rng.below(2) == 0 {
            self.rigs[0].sock(sock).inbox.push_back((b"answer".to_vec(), world(9).into()));
            let token = self.rigs[0].sock(sock).token;
            for worker in 0..self.rigs.len() {
                self.rigs[worker].ready(token, READABLE);
            }
        }
    }

    /// Half of the questions are never answered.
    fn name(&mut self, port: u16) {
        let name = format!("host{port}.example.com");
        let from = SocketAddrV4::new(*guest(port).ip(), port);
        self.send(&udp_frame(from, gateway(53), &query(port, &name, None)));
        for worker in 0..self.rigs.len() {
            while let Some(forward) = self.rigs[worker].engine.next_dns_forward() {
                if self.rng.below(2) == 0 {
                    let mut answer = forward.query.clone();
                    answer[2] |= 0x80;
                    let rig = &mut self.rigs[worker];
                    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer);
                    rig.flush();
                }
            }
        }
    }

    /// The guest begins anew.
    fn reboot(&mut self) {
        self.rigs[0].engine.guest_reset();
        self.letters();
        self.live.clear();
        self.due.clear();
    }

    /// Lets `hours` go by with something new every two seconds or so, then lets everything come to its end.
    fn hours(&mut self, hours: u64) {
        let until = self.now + secs(hours * 3600);
        let rebooted_at = self.now + secs(hours * 1800);
        let mut rebooted = false;
        while self.now < until {
            let next = self.now + ms(self.rng.between(1, 4000) as u64);
            while let Some((&(at, port), ())) = self.due.first_key_value().filter(|((at, _), ())| *at <= next)
            {
                self.due.pop_first();
                self.pass(at);
                self.step(port);
            }
            self.pass(next);
            if self.rng.chance(0.7) {
                self.open();
            } else {
                self.datagrams();
            }
            if !rebooted && self.now > rebooted_at {
                rebooted = true;
                self.reboot();
            }
        }
        while let Some(((at, port), ())) = self.due.pop_first() {
            self.pass(at);
            self.step(port);
        }
        // Two idle hours, the questions after them, and the same again for good measure.
        self.pass(self.now + secs(5 * 3600));
    }

    /// Asserts that nothing is left, and lets go of the scripted world's memory of it.
    fn assert_over(&mut self) {
        for rig in &mut self.rigs {
            rig.assert_empty();
        }
        let mut world = self.rigs[0].world();
        assert!(world.conns.iter().all(|conn| conn.end != End::Open), "every stream was closed");
        assert!(world.socks.iter().all(|sock| !sock.is_open), "every socket was closed");
        (world.conns, world.socks) = (Vec::new(), Vec::new());
        drop(world);
        self.live = HashMap::new();
        for rig in &mut self.rigs {
            rig.reader = Default::default();
        }
    }
}

fn a_day(workers: u8) {
    let mut churn = Churn::new(workers);
    churn.hours(6);
    churn.assert_over();
    let after_a_quarter = heap::held_bytes();
    churn.hours(18);
    churn.assert_over();
    let opened: usize = churn.opened.values().sum();
    assert!(opened > 25_000 && churn.opened.values().all(|count| *count > 1000), "{:?}", churn.opened);
    // Room once had is kept, and the peaks of 18 hours lie above those of 6; one forgotten deadline a
    // flow would be more.
    let grown = heap::held_bytes() - after_a_quarter;
    assert!(grown < 16 * opened as isize, "{grown} bytes more after {opened} flows");
}

#[test]
fn a_day_of_churn_leaves_no_flow_no_socket_no_timer_and_no_larger_table() {
    a_day(1);
}

#[test]
fn a_day_of_churn_over_two_workers_leaves_nothing_either() {
    a_day(2);
}
