//! The world's TCP: host sockets in memory, and behind each a program that takes and gives bytes at its
//! own pace, stalls, resets, refuses and ends as its flow's plan says.
//!
//! Readiness is edge-triggered as epoll's: an event tells all that holds. An error is told once, and the
//! next look finds the end of the stream, as with the kernel's sockets. A socket closed in order with
//! unread bytes is a reset, too.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use vunet::engine::host_net::{Close, HostListener, HostStream, Readiness, SendSpace, Token};
use vunet::frame::{Payload, PayloadMut};

use crate::bytes::Stream;
use crate::datagrams::Socks;
use crate::detached::{Detached, Lost};
use crate::plan::{Ending, FlowPlan, Plan, Shape};
use crate::random::Rng;

/// Most bytes gathered for one call.
const GATHER_MAX: usize = 256 << 10;

/// How a connection ended, as its world's end saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Open,
    Clean,
    Reset,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) plan: FlowPlan,
    worker: u8,
    token: Token,
    /// What the connect comes to.
    connect_error: Option<i32>,
    connected: bool,
    /// Of the world's stream: sent by the program, discarded by the engine.
    pub(crate) given: usize,
    pub(crate) discarded: usize,
    pub(crate) fin_given: bool,
    /// Of the guest's stream: taken by the socket, read by the program.
    taken: usize,
    pub(crate) read: usize,
    pub(crate) fin_taken: bool,
    gathered: Vec<u8>,
    wants_writable: bool,
    /// The world reset; the error waits to be told.
    pub(crate) reset_by_world: bool,
    error: Option<i32>,
    next_us: Option<u64>,
    pub(crate) end: End,
    /// Its stream leaves its worker: what is dropped there is not the socket.
    leaves: bool,
}

/// The world: what it is like, its connections, its datagram sockets.
pub(crate) struct World {
    pub(crate) conns: Vec<Conn>,
    pub(crate) socks: Socks,
    flows: Vec<FlowPlan>,
    /// Connects so far, a flow.
    attempts: Vec<usize>,
    /// Clients that wait to be accepted, a published flow each: (flow, listener).
    backlog: Vec<VecDeque<usize>>,
    pub(crate) rng: Rng,
    refuse: f64,
    stall: f64,
    stall_us_max: usize,
    corrupt: f64,
    front_only: bool,
    pub(crate) now_us: u64,
    /// Faults that took place.
    pub(crate) faults_seen: u64,
    pub(crate) events: VecDeque<(u8, Token, Readiness)>,
    /// Streams dropped on their way between workers.
    lost: Lost,
}

impl World {
    pub(crate) fn new(plan: &Plan) -> World {
        World {
            conns: Vec::new(),
            socks: Socks::new(plan),
            flows: plan.flows.clone(),
            attempts: vec![0; plan.flows.len()],
            backlog: vec![VecDeque::new(); plan.flows.len()],
            rng: Rng::new(plan.seed ^ 0xf0_0d),
            refuse: plan.refuse,
            stall: plan.stall,
            stall_us_max: plan.stall_us_max,
            corrupt: plan.corrupt,
            front_only: plan.front_only,
            now_us: 0,
            faults_seen: 0,
            events: VecDeque::new(),
            lost: Lost::default(),
        }
    }

    /// When anybody in the world does something next.
    pub(crate) fn next_at(&self) -> Option<u64> {
        let conns = self.conns.iter().filter_map(|conn| conn.next_us);
        conns.chain(self.socks.next_at()).min()
    }

    /// Lets those work whose time has come.
    pub(crate) fn step(&mut self, now_us: u64) {
        self.now_us = now_us;
        for at in self.lost.take() {
            self.conns[at].reset_by_drop();
        }
        for at in 0..self.conns.len() {
            if self.conns[at].next_us.is_some_and(|next| next <= now_us) {
                self.step_one(at);
            }
        }
        self.socks.step(now_us, &mut self.rng, &mut self.events);
    }

    /// A client comes to the published port of flow `flow`, whose listener is `listener` of worker 0.
    pub(crate) fn arrive(&mut self, flow: usize, listener: Token) {
        self.backlog[flow].push_back(flow);
        self.events.push_back((0, listener, Readiness { readable: true, ..Readiness::default() }));
    }

    /// The connections of flow `flow`, oldest first.
    pub(crate) fn of(&self, flow: &FlowPlan) -> impl Iterator<Item = &Conn> {
        let remote = flow.remote;
        self.conns.iter().filter(move |conn| conn.plan.remote == remote)
    }

    /// What was gathered in a batch of frames must have left by its end.
    pub(crate) fn assert_none_gathered(&self) {
        assert!(
            self.conns.iter().all(|conn| conn.gathered.is_empty()),
            "gathered bytes outlived their frames"
        );
    }

    fn add(&mut self, worker: u8, token: Token, flow: usize) -> usize {
        let attempt = self.attempts[flow];
        self.attempts[flow] += 1;
        let plan = self.flows[flow].clone();
        let connect_error = plan.connect_errors.get(attempt).copied().filter(|_| !plan.published);
        self.faults_seen += u64::from(connect_error.is_some());
        let wait = if plan.published { plan.pace_us as u64 } else { plan.connect_us };
        self.conns.push(Conn {
            worker,
            token,
            connect_error,
            connected: plan.published,
            given: 0,
            discarded: 0,
            fin_given: false,
            taken: 0,
            read: 0,
            fin_taken: false,
            gathered: Vec::new(),
            wants_writable: false,
            reset_by_world: false,
            error: None,
            next_us: Some(self.now_us + wait),
            end: End::Open,
            leaves: false,
            plan,
        });
        self.conns.len() - 1
    }

    /// Starts a connect; the outcome comes later, but for a router's word that is known at once.
    pub(crate) fn connect(&mut self, worker: u8, token: Token, peer: SocketAddr) -> io::Result<usize> {
        let flow = self.flows.iter().position(|flow| flow.peer() == peer);
        let flow = flow.expect("the engine connects only where the guest does");
        assert!(!self.flows[flow].published, "nobody connects to a client");
        Ok(self.add(worker, token, flow))
    }

    fn step_one(&mut self, at: usize) {
        let conn = &mut self.conns[at];
        conn.next_us = None;
        if conn.end != End::Open || conn.reset_by_world {
            return;
        }
        if !conn.connected {
            return self.end_connect(at);
        }
        let pace = conn.plan.pace_us;
        let pause = self.rng.between(pace / 2, pace + 1) as u64;
        if self.rng.chance(self.stall) {
            self.faults_seen += 1;
            let stalled = self.rng.below(self.stall_us_max) as u64;
            return self.sleep(at, stalled);
        }
        if self.rng.chance(self.corrupt) {
            // Thrown away by the kernel; here until it was sent again.
            self.faults_seen += 1;
            let again = 200_000 << self.rng.below(4);
            return self.sleep(at, again);
        }
        let (take, give) = (self.rng.below(conn.plan.piece) + 1, self.rng.below(conn.plan.piece) + 1);
        let ready = self.conns[at].work(take, give);
        if self.conns[at].reset_by_world {
            self.faults_seen += 1;
        }
        if ready != Readiness::default() {
            let conn = &self.conns[at];
            self.events.push_back((conn.worker, conn.token, conn.all_of(ready)));
        }
        if self.conns[at].has_work() {
            self.sleep(at, pause);
        }
    }

    fn sleep(&mut self, at: usize, pause_us: u64) {
        self.conns[at].next_us = Some(self.now_us + 1 + pause_us);
    }

    fn end_connect(&mut self, at: usize) {
        let conn = &mut self.conns[at];
        conn.connected = conn.connect_error.is_none();
        let ready =
            Readiness { writable: true, failed: conn.connect_error.is_some(), ..Readiness::default() };
        self.events.push_back((conn.worker, conn.token, ready));
        if conn.connected {
            let pause = self.conns[at].plan.pace_us as u64;
            self.sleep(at, pause);
        }
    }

    /// Something changed for connection `at`: its program looks again.
    fn wake(&mut self, at: usize) {
        let conn = &mut self.conns[at];
        if conn.next_us.is_none() && conn.connected && !conn.reset_by_world && conn.has_work() {
            conn.next_us = Some(self.now_us + 1 + conn.plan.pace_us as u64);
        }
    }
}

impl Conn {
    /// Its socket was closed as it was.
    fn reset_by_drop(&mut self) {
        if self.end == End::Open {
            self.end = End::Reset;
            self.next_us = None;
        }
    }

    fn stream(&self, from_guest: bool) -> Stream {
        Stream::new(self.plan.peer(), from_guest)
    }

    fn queued(&self) -> usize {
        self.taken - self.read
    }

    fn has_room_again(&self) -> bool {
        self.queued() < self.plan.send_max * 2 / 3
    }

    /// Bytes of its stream the program would have sent by now.
    fn may_give(&self) -> usize {
        let total = match self.plan.shape {
            Shape::Both | Shape::WorldFirst => self.plan.bytes,
            Shape::GuestFirst if self.fin_taken && self.queued() == 0 => self.plan.bytes,
            Shape::GuestFirst => 0,
            Shape::Dialogue(chunk) => {
                let asked = if self.fin_taken { usize::MAX } else { self.read / chunk };
                asked.saturating_mul(chunk).min(self.plan.bytes)
            }
        };
        total.min(self.discarded + self.plan.queue_max)
    }

    fn has_work(&self) -> bool {
        let ends = self.given == self.plan.bytes && !self.fin_given;
        let wakes = self.wants_writable && self.has_room_again();
        self.queued() > 0 || self.given < self.may_give() || ends || wakes
    }

    /// The program takes and gives; returns what is news to the engine.
    fn work(&mut self, take: usize, give: usize) -> Readiness {
        let mut ready = Readiness::default();
        self.read += take.min(self.queued());
        if self.wants_writable && self.has_room_again() {
            self.wants_writable = false;
            ready.writable = true;
        }
        let given = give.min(self.may_give().saturating_sub(self.given));
        if self.plan.urgent_at.is_some_and(|at| (self.given..self.given + given).contains(&at)) {
            ready.urgent = true;
        }
        self.given += given;
        ready.readable = given > 0;
        if let Ending::WorldResets(after) = self.plan.ending
            && self.given >= after
        {
            self.reset_by_world = true;
            self.error = Some(libc::ECONNRESET);
            return Readiness {
                readable: true,
                writable: true,
                peer_closed: true,
                failed: true,
                urgent: false,
            };
        }
        if self.given == self.plan.bytes && !self.fin_given {
            self.fin_given = true;
            ready.readable = true;
            ready.peer_closed = true;
        }
        ready
    }

    /// An edge-triggered event tells all that holds, new or not.
    fn all_of(&self, mut ready: Readiness) -> Readiness {
        ready.writable |= self.has_room_again();
        ready.peer_closed |= self.fin_given;
        ready.failed |= self.reset_by_world;
        ready
    }

    /// The error that waits, once.
    fn told(&mut self) -> io::Result<()> {
        match self.error.take() {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(()),
        }
    }

    /// Takes the next bytes of the guest's stream, each as it must be.
    fn accept(&mut self, bytes: &[u8]) {
        let wrong = self.stream(true).first_difference(self.taken, bytes);
        assert_eq!(wrong, None, "a byte the world got from the guest at {} is wrong", self.plan.remote);
        self.taken += bytes.len();
    }
}

/// A stream socket.
pub(crate) struct SimStream {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) at: usize,
}

impl SimStream {
    /// Bytes of `len` the socket takes now; `None` after a reset, whose error was told.
    fn room(&self, world: &mut World, len: usize) -> io::Result<usize> {
        let stingy = world.rng.chance(world.refuse);
        let limit = if stingy { world.rng.below(len + 1) } else { len };
        world.faults_seen += u64::from(limit < len);
        let conn = &mut world.conns[self.at];
        conn.told()?;
        if conn.reset_by_world {
            return Err(io::Error::from_raw_os_error(libc::EPIPE));
        }
        assert!(conn.connected, "bytes before the connection");
        assert!(!conn.fin_taken, "bytes after FIN");
        Ok(limit.min(conn.plan.send_max.saturating_sub(conn.queued())))
    }

    /// Watches the stream under `token` of `worker` from now on.
    pub(crate) fn attach(
        world: &Rc<RefCell<World>>,
        worker: u8,
        token: Token,
        detached: Detached,
    ) -> SimStream {
        let at = detached.arrived();
        let mut locked = world.borrow_mut();
        let conn = &mut locked.conns[at];
        (conn.worker, conn.token) = (worker, token);
        let readable = conn.given > conn.discarded || conn.fin_given || conn.reset_by_world;
        let urgent = conn.plan.urgent_at.is_some_and(|at| (conn.discarded..conn.given).contains(&at));
        let ready = conn.all_of(Readiness { readable, urgent, ..Readiness::default() });
        if conn.connected || conn.connect_error.is_some() && conn.next_us.is_none() {
            let failed = conn.connect_error.is_some();
            locked.events.push_back((worker, token, Readiness { failed: ready.failed | failed, ..ready }));
        }
        drop(locked);
        SimStream { world: Rc::clone(world), at }
    }
}

impl HostStream for SimStream {
    type Detached = Detached;

    fn detach(self) -> Detached {
        let at = self.at;
        assert!(self.world.borrow().conns[at].gathered.is_empty(), "a stream moved with bytes gathered");
        let mut world = self.world.borrow_mut();
        world.conns[at].leaves = true;
        Detached::new(at, &world.lost)
    }

    fn take_error(&mut self) -> io::Result<()> {
        match self.world.borrow().conns[self.at].connect_error {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(()),
        }
    }

    fn send(&mut self, payload: &Payload<'_>) -> io::Result<usize> {
        let mut world = self.world.borrow_mut();
        let len = self.room(&mut world, payload.len())?;
        assert!(world.conns[self.at].gathered.is_empty(), "gathered bytes must leave first");
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = vec![0; len];
        assert_eq!(payload.copy_to(&mut bytes), len);
        world.conns[self.at].accept(&bytes);
        world.wake(self.at);
        Ok(len)
    }

    fn queue(&mut self, payload: &Payload<'_>) -> bool {
        let gathered = &mut self.world.borrow_mut().conns[self.at].gathered;
        if gathered.len() + payload.len() > GATHER_MAX {
            return false;
        }
        let start = gathered.len();
        gathered.resize(start + payload.len(), 0);
        payload.copy_to(&mut gathered[start..]);
        true
    }

    fn send_queued(&mut self, rest: &mut dyn FnMut(&Payload<'_>)) -> io::Result<usize> {
        let mut world = self.world.borrow_mut();
        let gathered = std::mem::take(&mut world.conns[self.at].gathered);
        let len = self.room(&mut world, gathered.len())?;
        world.conns[self.at].accept(&gathered[..len]);
        world.wake(self.at);
        drop(world);
        if len < gathered.len() {
            rest(&Payload::from_host(&gathered[len..]));
        }
        Ok(len)
    }

    fn peek(&mut self, offset_bytes: usize, mut into: PayloadMut<'_>) -> io::Result<usize> {
        let world = &mut *self.world.borrow_mut();
        let front_only = world.front_only;
        let conn = &mut world.conns[self.at];
        conn.told()?;
        if conn.reset_by_world {
            return Ok(0);
        }
        let at = conn.discarded + offset_bytes;
        assert!(at <= conn.given, "peeked past what was ever there");
        let mut len = (conn.given - at).min(into.len());
        if len == 0 {
            return if conn.fin_given { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        if let Some(urgent) = conn.plan.urgent_at {
            if front_only && conn.discarded < urgent && at >= urgent {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            if (at + 1..at + len).contains(&urgent) {
                len = urgent - at;
            }
        }
        let stream = conn.stream(false);
        let mut bytes = vec![0; len];
        stream.fill(at, &mut bytes);
        Ok(into.copy_from(&bytes))
    }

    fn discard(&mut self, len_bytes: usize) -> io::Result<()> {
        let mut world = self.world.borrow_mut();
        let conn = &mut world.conns[self.at];
        conn.told()?;
        if conn.reset_by_world {
            return Err(io::Error::from_raw_os_error(libc::EPIPE));
        }
        assert!(conn.discarded + len_bytes <= conn.given, "discarded more than there is");
        conn.discarded += len_bytes;
        world.wake(self.at);
        Ok(())
    }

    fn send_space(&mut self) -> SendSpace {
        let world = self.world.borrow();
        let conn = &world.conns[self.at];
        let queued = conn.queued();
        let free = conn.plan.send_max - queued;
        SendSpace { bytes: free / 4 * 3, tight: free < queued / 2 }
    }

    fn want_writable(&mut self) {
        let mut world = self.world.borrow_mut();
        world.conns[self.at].wants_writable = true;
        world.wake(self.at);
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        let mut world = self.world.borrow_mut();
        let conn = &mut world.conns[self.at];
        conn.told()?;
        if conn.reset_by_world {
            return Err(io::Error::from_raw_os_error(libc::ENOTCONN));
        }
        assert!(!conn.fin_taken, "FIN twice");
        assert!(conn.gathered.is_empty(), "gathered bytes must leave before FIN");
        conn.fin_taken = true;
        world.wake(self.at);
        Ok(())
    }

    fn close(self, how: Close) {
        let mut world = self.world.borrow_mut();
        let conn = &mut world.conns[self.at];
        // The kernel answers a close that leaves bytes unread with a reset.
        let is_clean = how == Close::Clean && conn.discarded == conn.given && !conn.reset_by_world;
        conn.end = if is_clean { End::Clean } else { End::Reset };
        if is_clean {
            // What was accepted is still delivered.
            conn.read = conn.taken;
        }
        conn.next_us = None;
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let Ok(mut world) = self.world.try_borrow_mut() else { return };
        let conn = &mut world.conns[self.at];
        if !std::mem::take(&mut conn.leaves) {
            conn.reset_by_drop();
        }
    }
}

/// The published port of one flow.
pub(crate) struct SimListener {
    pub(crate) world: Rc<RefCell<World>>,
    pub(crate) flow: usize,
}

impl HostListener for SimListener {
    type Stream = SimStream;

    fn accept(&mut self, token: Token) -> io::Result<(SimStream, SocketAddr)> {
        let mut world = self.world.borrow_mut();
        let Some(flow) = world.backlog[self.flow].pop_front() else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let client = world.flows[flow].peer();
        let at = world.add(0, token, flow);
        drop(world);
        Ok((SimStream { world: Rc::clone(&self.world), at }, client))
    }
}
