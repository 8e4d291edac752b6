//! The host's sockets, in memory: a world that takes and gives bytes at its own pace.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use vunet::engine::host_net::{
    Arrival, Close, HostDatagram, HostListener, HostNet, HostStream, Readiness, SendSpace, Token,
};
use vunet::frame::{Payload, PayloadMut};

use crate::scenario::{Rng, pattern};

/// How a connection ended, as its world's end saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Open,
    Clean,
    Reset,
}

/// One connection.
pub(crate) struct Conn {
    pub(crate) peer: SocketAddr,
    token: Token,
    connected: bool,
    /// Sent by the world, not yet discarded by the engine.
    queue: VecDeque<u8>,
    /// Bytes the world has yet to send, and has sent.
    to_send: usize,
    sent: usize,
    /// Taken by the socket, not yet by the world.
    send_queue: VecDeque<u8>,
    wants_writable: bool,
    pub(crate) received: usize,
    pub(crate) fin_received: bool,
    pub(crate) fin_sent: bool,
    pub(crate) reset_by_world: bool,
    pub(crate) end: End,
}

/// The world's settings and connections.
pub(crate) struct World {
    pub(crate) conns: Vec<Conn>,
    pub(crate) rng: Rng,
    pub(crate) bytes: usize,
    pub(crate) refuse: f64,
    pub(crate) refuse_connects: bool,
    /// Reset each connection after this many bytes.
    pub(crate) reset_after: Option<usize>,
    /// Send nothing before the guest's FIN.
    pub(crate) answers_late: bool,
    pub(crate) send_queue_max: usize,
    pub(crate) queue_max: usize,
    events: VecDeque<(Token, Readiness)>,
}

impl World {
    pub(crate) fn new(rng: Rng, bytes: usize) -> World {
        World {
            conns: Vec::new(),
            rng,
            bytes,
            refuse: 0.0,
            refuse_connects: false,
            reset_after: None,
            answers_late: false,
            send_queue_max: 48 << 10,
            queue_max: 96 << 10,
            events: VecDeque::new(),
        }
    }

    pub(crate) fn next_event(&mut self) -> Option<(Token, Readiness)> {
        self.events.pop_front()
    }

    /// A step of the world's own activity.
    pub(crate) fn step(&mut self) {
        for at in 0..self.conns.len() {
            self.step_one(at);
        }
    }

    fn step_one(&mut self, at: usize) {
        let (take, give) = (self.rng.below(30_000), self.rng.below(30_000));
        let (queue_max, reset_after) = (self.queue_max, self.reset_after);
        let (refused, late) = (self.refuse_connects, self.answers_late);
        let conn = &mut self.conns[at];
        if conn.end != End::Open || conn.reset_by_world {
            return;
        }
        let mut ready = Readiness::default();
        if !conn.connected {
            conn.connected = true;
            ready.writable = true;
            ready.failed = refused;
            self.events.push_back((conn.token, ready));
            return;
        }
        for byte in conn.send_queue.drain(..take.min(conn.send_queue.len())) {
            let expected = pattern(conn.peer, true, conn.received);
            assert_eq!(byte, expected, "byte {} of {} is wrong", conn.received, conn.peer);
            conn.received += 1;
        }
        if conn.wants_writable && conn.send_queue.len() < self.send_queue_max * 2 / 3 {
            conn.wants_writable = false;
            ready.writable = true;
        }
        let give = if late && !conn.fin_received { 0 } else { give };
        let give = give.min(conn.to_send).min(queue_max.saturating_sub(conn.queue.len()));
        for _ in 0..give {
            conn.queue.push_back(pattern(conn.peer, false, conn.sent));
            conn.sent += 1;
        }
        conn.to_send -= give;
        ready.readable = give > 0;
        if reset_after.is_some_and(|limit| conn.sent >= limit) {
            conn.reset_by_world = true;
            conn.queue.clear();
            ready.readable = true;
            ready.writable = true;
            ready.peer_closed = true;
            ready.failed = true;
        } else if conn.to_send == 0 && !conn.fin_sent {
            conn.fin_sent = true;
            ready.readable = true;
            ready.peer_closed = true;
        }
        if ready != Readiness::default() {
            // An edge-triggered event tells all that holds, new or not.
            ready.writable |= conn.send_queue.len() < self.send_queue_max * 2 / 3;
            ready.peer_closed |= conn.fin_sent;
            self.events.push_back((conn.token, ready));
        }
    }
}

/// Sockets into the world.
pub(crate) struct SimNet(pub Rc<RefCell<World>>);

pub(crate) struct SimStream {
    world: Rc<RefCell<World>>,
    at: usize,
}

impl HostNet for SimNet {
    type Stream = SimStream;
    type Datagram = NoDatagram;
    type Listener = NoListener;

    fn connect(&mut self, token: Token, peer: SocketAddr) -> io::Result<SimStream> {
        let mut world = self.0.borrow_mut();
        let bytes = world.bytes;
        world.conns.push(Conn {
            peer,
            token,
            connected: false,
            queue: VecDeque::new(),
            to_send: bytes,
            sent: 0,
            send_queue: VecDeque::new(),
            wants_writable: false,
            received: 0,
            fin_received: false,
            fin_sent: false,
            reset_by_world: false,
            end: End::Open,
        });
        let at = world.conns.len() - 1;
        drop(world);
        Ok(SimStream { world: Rc::clone(&self.0), at })
    }

    fn attach(&mut self, token: Token, at: usize) -> io::Result<SimStream> {
        self.0.borrow_mut().conns[at].token = token;
        Ok(SimStream { world: Rc::clone(&self.0), at })
    }

    fn attach_datagram(&mut self, _: Token, (): ()) -> io::Result<NoDatagram> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn connect_dns(&mut self, _: Token) -> io::Result<SimStream> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn udp(&mut self, _: Token, _: SocketAddr) -> io::Result<NoDatagram> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn ping(&mut self, _: Token, _: IpAddr) -> io::Result<NoDatagram> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush_datagrams(&mut self) -> u64 {
        0
    }

    fn is_own_address(&mut self, _: IpAddr) -> bool {
        false
    }
}

impl HostStream for SimStream {
    type Detached = usize;

    fn detach(self) -> usize {
        let at = self.at;
        // It is not dropped, which would be a reset; the one reference count it keeps ends with the test.
        std::mem::forget(self);
        at
    }

    fn take_error(&mut self) -> io::Result<()> {
        match self.world.borrow().refuse_connects {
            true => Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)),
            false => Ok(()),
        }
    }

    fn send(&mut self, payload: &Payload<'_>) -> io::Result<usize> {
        let mut world = self.world.borrow_mut();
        let (refuse, max) = (world.refuse, world.send_queue_max);
        let stingy = world.rng.chance(refuse);
        let limit = if stingy { world.rng.below(payload.len() + 1) } else { payload.len() };
        let conn = &mut world.conns[self.at];
        if conn.reset_by_world {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        assert!(!conn.fin_received, "bytes after FIN");
        let len = limit.min(max - conn.send_queue.len());
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = vec![0; len];
        assert_eq!(payload.copy_to(&mut bytes), len);
        conn.send_queue.extend(bytes);
        Ok(len)
    }

    fn peek(&mut self, offset_bytes: usize, mut into: PayloadMut<'_>) -> io::Result<usize> {
        let world = self.world.borrow();
        let conn = &world.conns[self.at];
        if conn.reset_by_world {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        assert!(offset_bytes <= conn.queue.len(), "peeked past what was ever there");
        let fresh: Vec<u8> = conn.queue.iter().skip(offset_bytes).take(into.len()).copied().collect();
        match fresh.len() {
            0 if conn.fin_sent => Ok(0),
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(into.copy_from(&fresh)),
        }
    }

    fn discard(&mut self, len_bytes: usize) -> io::Result<()> {
        let mut world = self.world.borrow_mut();
        let queue = &mut world.conns[self.at].queue;
        if queue.len() < len_bytes {
            assert!(world.conns[self.at].reset_by_world, "discarded more than there is");
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        queue.drain(..len_bytes);
        Ok(())
    }

    fn send_space(&mut self) -> SendSpace {
        let world = self.world.borrow();
        let queued = world.conns[self.at].send_queue.len();
        let free = world.send_queue_max - queued;
        SendSpace { bytes: free / 4 * 3, tight: free < queued / 2 }
    }

    fn want_writable(&mut self) {
        self.world.borrow_mut().conns[self.at].wants_writable = true;
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        assert!(!conn.fin_received, "FIN twice");
        conn.fin_received = true;
        Ok(())
    }

    fn close(self, how: Close) {
        let mut world = self.world.borrow_mut();
        let conn = &mut world.conns[self.at];
        conn.end = if how == Close::Clean { End::Clean } else { End::Reset };
        // What was accepted is still delivered after a clean close.
        while let Some(byte) = conn.send_queue.pop_front() {
            assert_eq!(byte, pattern(conn.peer, true, conn.received));
            conn.received += 1;
        }
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        if conn.end == End::Open {
            conn.end = End::Reset;
        }
    }
}

/// The simulation of TCP needs no datagrams ...
pub(crate) enum NoDatagram {}

impl HostDatagram for NoDatagram {
    type Detached = ();

    fn detach(self) {
        match self {}
    }

    fn send_to(&mut self, _: &[u8], _: &Payload<'_>, _: SocketAddr) -> io::Result<()> {
        match *self {}
    }
    fn queue_to(&mut self, _: &Payload<'_>, _: SocketAddr) -> io::Result<()> {
        match *self {}
    }
    fn send_segments_to(&mut self, _: &Payload<'_>, _: usize, _: SocketAddr) -> io::Result<()> {
        match *self {}
    }
    fn recv_batch(&mut self, _: usize, _: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        match *self {}
    }
}

/// ... and no published ports.
pub(crate) enum NoListener {}

impl HostListener for NoListener {
    type Stream = SimStream;
    fn accept(&mut self, _: Token) -> io::Result<(SimStream, SocketAddr)> {
        match *self {}
    }
}
