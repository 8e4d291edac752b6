//! The host's sockets, scripted: a test says what each of them does, and sees what was asked of it.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use vunet::config::Publish;
use vunet::engine::host_net::{
    Arrival, Close, HostDatagram, HostListener, HostNet, HostStream, NetworkError, PacketFields, SendSpace,
    Token,
};
use vunet::frame::{Payload, PayloadMut};
use vunet::wire::icmpv4::Message;

use crate::detached::{Detached, Lost};

/// How a stream ended, as its world's end saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Open,
    Clean,
    Reset,
}

/// A stream socket.
#[derive(Debug)]
pub(crate) struct Conn {
    /// Gathered for one call.
    gathered: Vec<u8>,
    pub(crate) token: Token,
    /// Where it was connected to, or who was accepted; the gateway's port 53 for the DNS service.
    pub(crate) peer: SocketAddr,
    pub(crate) is_dns: bool,
    /// `SO_ERROR` of the connect.
    pub(crate) connect_error: Option<i32>,
    /// Sent by the world and not yet discarded.
    pub(crate) queue: VecDeque<u8>,
    pub(crate) fin_from_world: bool,
    /// The error every call ends with from now on.
    pub(crate) error: Option<i32>,
    /// Bytes the socket still takes.
    pub(crate) room: usize,
    /// What `send_space` says; `room` if `None`.
    pub(crate) space: Option<SendSpace>,
    /// Taken from the guest.
    pub(crate) taken: Vec<u8>,
    pub(crate) fin_from_guest: bool,
    pub(crate) wants_writable: usize,
    pub(crate) sends: usize,
    pub(crate) peeks: usize,
    /// Most bytes one peek gives.
    pub(crate) peek_max: usize,
    pub(crate) discarded: usize,
    /// The host's address it comes from.
    pub(crate) local: Option<IpAddr>,
    /// The listener's port, of a client that was accepted.
    came_by: Option<u16>,
    pub(crate) end: End,
    /// Its stream leaves its worker: what is dropped there is not the socket.
    leaves: bool,
}

/// An ICMP error the world sent about a datagram.
#[derive(Clone, Debug)]
pub(crate) struct Complaint {
    pub(crate) to: SocketAddr,
    pub(crate) offender: Option<IpAddr>,
    pub(crate) message: Message,
    pub(crate) quoted: Vec<u8>,
}

/// A datagram socket.
#[derive(Debug)]
pub(crate) struct Sock {
    pub(crate) token: Token,
    pub(crate) is_ping: bool,
    /// The port asked for, 0 for any.
    pub(crate) wished_port: u16,
    pub(crate) inbox: VecDeque<(Vec<u8>, SocketAddr)>,
    pub(crate) sent: Vec<(Vec<u8>, SocketAddr)>,
    /// The host's address datagrams arrive at, if the socket is told.
    pub(crate) sent_to: Option<IpAddr>,
    /// What each of them had in its header.
    /// TOS of what arrives.
    pub(crate) tos: u8,
    pub(crate) sent_fields: Vec<PacketFields>,
    fields: PacketFields,
    /// Length of the datagrams that arrive as one, coalesced by the kernel.
    pub(crate) coalesced_bytes: Option<usize>,
    pub(crate) send_error: Option<i32>,
    /// Errors to report before any datagram.
    pub(crate) receive_errors: VecDeque<i32>,
    /// What every further reading fails with.
    pub(crate) receives_fail: Option<i32>,
    pub(crate) complaints: VecDeque<Complaint>,
    pub(crate) receives: usize,
    pub(crate) is_open: bool,
    /// As a stream's.
    leaves: bool,
    was_refused: bool,
}

/// Everything beyond the engine.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) conns: Vec<Conn>,
    pub(crate) socks: Vec<Sock>,
    /// Clients waiting at each published TCP port.
    pub(crate) backlogs: Vec<VecDeque<SocketAddr>>,
    /// What every accept fails with.
    pub(crate) accept_error: Option<i32>,
    pub(crate) accepts: usize,
    /// Queued datagrams refused since the last flush.
    pub(crate) refused: u64,
    pub(crate) own: HashSet<IpAddr>,
    /// The immediate outcome of the next connects.
    pub(crate) connect_error: Option<i32>,
    pub(crate) ping_error: Option<i32>,
    /// What the host knows of every path.
    pub(crate) path_mtu: Option<u16>,
    pub(crate) paths_asked: usize,
    /// Descriptors there are.
    pub(crate) descriptors_max: usize,
    /// Room new streams begin with.
    pub(crate) room: usize,
    /// Streams have agreed on ECN with their peers.
    pub(crate) ecn: bool,
    open: usize,
    lost_conns: Lost,
    lost_socks: Lost,
}

impl World {
    pub(crate) fn new() -> World {
        World {
            conns: Vec::new(),
            socks: Vec::new(),
            backlogs: Vec::new(),
            accept_error: None,
            accepts: 0,
            refused: 0,
            own: HashSet::new(),
            connect_error: None,
            ping_error: None,
            path_mtu: None,
            paths_asked: 0,
            descriptors_max: usize::MAX,
            room: 1 << 20,
            ecn: false,
            open: 0,
            lost_conns: Lost::default(),
            lost_socks: Lost::default(),
        }
    }

    /// Closes what was dropped on its way between workers.
    pub(crate) fn close_lost(&mut self) {
        for at in self.lost_conns.take() {
            self.close_conn(at);
        }
        for at in self.lost_socks.take() {
            self.close_sock(at);
        }
    }

    fn close_conn(&mut self, at: usize) {
        self.open -= 1;
        let conn = &mut self.conns[at];
        if conn.end == End::Open {
            conn.end = End::Reset;
        }
    }

    fn close_sock(&mut self, at: usize) {
        self.open -= 1;
        self.socks[at].is_open = false;
    }

    /// Sockets open now.
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    /// Bytes and datagrams that left towards the world.
    pub(crate) fn touched(&self) -> bool {
        !self.conns.is_empty() || self.socks.iter().any(|sock| !sock.sent.is_empty())
    }

    fn take_descriptor(&self) -> io::Result<()> {
        match self.open() < self.descriptors_max {
            true => Ok(()),
            false => Err(os(libc::EMFILE)),
        }
    }

    fn add_conn(&mut self, token: Token, peer: SocketAddr, is_dns: bool) -> usize {
        self.open += 1;
        self.conns.push(Conn {
            gathered: Vec::new(),
            token,
            peer,
            is_dns,
            connect_error: None,
            queue: VecDeque::new(),
            fin_from_world: false,
            error: None,
            room: self.room,
            space: None,
            taken: Vec::new(),
            fin_from_guest: false,
            wants_writable: 0,
            sends: 0,
            peeks: 0,
            peek_max: usize::MAX,
            discarded: 0,
            local: None,
            came_by: None,
            end: End::Open,
            leaves: false,
        });
        self.conns.len() - 1
    }

    fn add_sock(&mut self, token: Token, is_ping: bool) -> usize {
        self.open += 1;
        self.socks.push(Sock {
            token,
            is_ping,
            wished_port: 0,
            inbox: VecDeque::new(),
            sent: Vec::new(),
            tos: 0,
            sent_fields: Vec::new(),
            sent_to: None,
            fields: PacketFields::default(),
            coalesced_bytes: None,
            send_error: None,
            receive_errors: VecDeque::new(),
            receives_fail: None,
            complaints: VecDeque::new(),
            receives: 0,
            is_open: true,
            leaves: false,
            was_refused: false,
        });
        self.socks.len() - 1
    }
}

fn os(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// A handle on the world, as the engine holds it.
#[derive(Clone, Debug)]
pub(crate) struct Net(pub(crate) Rc<RefCell<World>>);

impl Net {
    /// A datagram socket for a published port.
    pub(crate) fn published_udp(&self, token: Token) -> FakeDatagram {
        let at = self.0.borrow_mut().add_sock(token, false);
        FakeDatagram { world: Rc::clone(&self.0), at }
    }

    /// A listener for a published port.
    pub(crate) fn listener(&self) -> FakeListener {
        let mut world = self.0.borrow_mut();
        world.backlogs.push(VecDeque::new());
        FakeListener { world: Rc::clone(&self.0), at: world.backlogs.len() - 1 }
    }
}

#[derive(Debug)]
pub(crate) struct FakeStream {
    world: Rc<RefCell<World>>,
    at: usize,
}

#[derive(Debug)]
pub(crate) struct FakeDatagram {
    world: Rc<RefCell<World>>,
    at: usize,
}

#[derive(Debug)]
pub(crate) struct FakeListener {
    world: Rc<RefCell<World>>,
    at: usize,
}

impl FakeListener {
    /// The port of the host it is bound to.
    pub(crate) fn host_port(&self) -> u16 {
        8000 + self.at as u16
    }
}

impl HostNet for Net {
    type Stream = FakeStream;
    type Datagram = FakeDatagram;
    type Listener = FakeListener;

    fn connect(&mut self, token: Token, peer: SocketAddr) -> io::Result<FakeStream> {
        let mut world = self.0.borrow_mut();
        world.take_descriptor()?;
        if let Some(code) = world.connect_error {
            return Err(os(code));
        }
        let at = world.add_conn(token, peer, false);
        Ok(FakeStream { world: Rc::clone(&self.0), at })
    }

    fn attach(&mut self, token: Token, detached: Detached) -> io::Result<FakeStream> {
        let at = detached.arrived();
        self.0.borrow_mut().conns[at].token = token;
        Ok(FakeStream { world: Rc::clone(&self.0), at })
    }

    fn attach_datagram(&mut self, token: Token, detached: Detached) -> io::Result<FakeDatagram> {
        let at = detached.arrived();
        self.0.borrow_mut().socks[at].token = token;
        Ok(FakeDatagram { world: Rc::clone(&self.0), at })
    }

    fn connect_dns(&mut self, token: Token) -> io::Result<FakeStream> {
        let mut world = self.0.borrow_mut();
        world.take_descriptor()?;
        let at = world.add_conn(token, SocketAddr::from(([10, 0, 2, 1], 53)), true);
        Ok(FakeStream { world: Rc::clone(&self.0), at })
    }

    fn udp(&mut self, token: Token, local: SocketAddr) -> io::Result<FakeDatagram> {
        let mut world = self.0.borrow_mut();
        world.take_descriptor()?;
        let at = world.add_sock(token, false);
        world.socks[at].wished_port = local.port();
        Ok(FakeDatagram { world: Rc::clone(&self.0), at })
    }

    fn ping(&mut self, token: Token, _: IpAddr) -> io::Result<FakeDatagram> {
        let mut world = self.0.borrow_mut();
        world.take_descriptor()?;
        if let Some(code) = world.ping_error {
            return Err(os(code));
        }
        let at = world.add_sock(token, true);
        Ok(FakeDatagram { world: Rc::clone(&self.0), at })
    }

    fn flush_datagrams(&mut self) -> u64 {
        std::mem::take(&mut self.0.borrow_mut().refused)
    }

    fn path_mtu(&mut self, _: SocketAddr) -> Option<u16> {
        let mut world = self.0.borrow_mut();
        world.paths_asked += 1;
        world.path_mtu
    }

    fn is_own_address(&mut self, addr: IpAddr) -> bool {
        self.0.borrow().own.contains(&addr)
    }
}

impl HostStream for FakeStream {
    type Detached = Detached;

    fn uses_ecn(&self) -> bool {
        self.world.borrow().ecn
    }

    fn came_by(&self, port: &Publish) -> bool {
        self.world.borrow().conns[self.at].came_by == Some(port.host.port())
    }

    fn local_ip(&self) -> Option<IpAddr> {
        self.world.borrow().conns[self.at].local
    }

    fn detach(self) -> Detached {
        let at = self.at;
        let mut world = self.world.borrow_mut();
        world.conns[at].leaves = true;
        Detached::new(at, &world.lost_conns)
    }

    fn take_error(&mut self) -> io::Result<()> {
        self.world.borrow().conns[self.at].connect_error.map_or(Ok(()), |code| Err(os(code)))
    }

    fn send(&mut self, payload: &Payload<'_>) -> io::Result<usize> {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        conn.sends += 1;
        if let Some(code) = conn.error {
            return Err(os(code));
        }
        assert!(!conn.fin_from_guest, "no bytes follow FIN");
        let len = payload.len().min(conn.room);
        if len == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = vec![0; len];
        assert_eq!(payload.copy_to(&mut bytes), len);
        conn.taken.extend(bytes);
        conn.room -= len;
        Ok(len)
    }

    fn queue(&mut self, payload: &Payload<'_>) -> bool {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        let mut bytes = vec![0; payload.len()];
        payload.copy_to(&mut bytes);
        conn.gathered.extend(bytes);
        true
    }

    fn send_queued(&mut self, rest: &mut dyn FnMut(&Payload<'_>)) -> io::Result<usize> {
        let gathered = std::mem::take(&mut self.world.borrow_mut().conns[self.at].gathered);
        let sent = match self.send(&Payload::from_host(&gathered)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            outcome => outcome?,
        };
        if sent < gathered.len() {
            rest(&Payload::from_host(&gathered[sent..]));
        }
        Ok(sent)
    }

    fn peek(&mut self, offset_bytes: usize, mut into: PayloadMut<'_>) -> io::Result<usize> {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        conn.peeks += 1;
        assert!(!into.is_empty(), "a peek asks for something");
        assert!(offset_bytes <= conn.queue.len(), "nothing past the queue was ever peeked");
        let fresh: Vec<u8> = conn.queue.iter().skip(offset_bytes).take(conn.peek_max).copied().collect();
        match (fresh.is_empty(), conn.error, conn.fin_from_world) {
            (true, Some(code), _) => Err(os(code)),
            (true, None, true) => Ok(0),
            (true, None, false) => Err(io::ErrorKind::WouldBlock.into()),
            (false, ..) => Ok(into.copy_from(&fresh)),
        }
    }

    fn discard(&mut self, len_bytes: usize) -> io::Result<()> {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        assert!(len_bytes <= conn.queue.len(), "only what was peeked is discarded");
        conn.queue.drain(..len_bytes);
        conn.discarded += len_bytes;
        Ok(())
    }

    fn send_space(&mut self) -> SendSpace {
        let conn = &self.world.borrow().conns[self.at];
        conn.space.unwrap_or(SendSpace { bytes: conn.room, tight: conn.room < 4096 })
    }

    fn want_writable(&mut self) {
        self.world.borrow_mut().conns[self.at].wants_writable += 1;
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        let conn = &mut self.world.borrow_mut().conns[self.at];
        if let Some(code) = conn.error {
            return Err(os(code));
        }
        assert!(!conn.fin_from_guest, "one FIN only");
        conn.fin_from_guest = true;
        Ok(())
    }

    fn close(self, how: Close) {
        self.world.borrow_mut().conns[self.at].end = match how {
            Close::Clean => End::Clean,
            Close::Reset => End::Reset,
        };
    }
}

impl Drop for FakeStream {
    fn drop(&mut self) {
        let mut world = self.world.borrow_mut();
        if !std::mem::take(&mut world.conns[self.at].leaves) {
            world.close_conn(self.at);
        }
    }
}

/// Arrivals a socket hands over at once.
const BATCH: usize = 4;
/// Datagrams of one socket's turn.
pub(crate) const TURN: usize = vunet::limits::DATAGRAM_BATCHES * BATCH;

impl HostDatagram for FakeDatagram {
    type Detached = Detached;

    fn detach(self) -> Detached {
        let at = self.at;
        let mut world = self.world.borrow_mut();
        world.socks[at].leaves = true;
        Detached::new(at, &world.lost_socks)
    }

    fn set_fields(&mut self, fields: PacketFields) {
        self.world.borrow_mut().socks[self.at].fields = fields;
    }

    fn send_to(&mut self, head: &[u8], payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        let sock = &mut self.world.borrow_mut().socks[self.at];
        if let Some(code) = sock.send_error {
            return Err(os(code));
        }
        let mut bytes = head.to_vec();
        bytes.resize(head.len() + payload.len(), 0);
        payload.copy_to(&mut bytes[head.len()..]);
        sock.sent.push((bytes, to));
        sock.sent_fields.push(sock.fields);
        Ok(())
    }

    fn queue_to(&mut self, payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        let outcome = self.send_to(&[], payload, to);
        let mut world = self.world.borrow_mut();
        let was_refused = std::mem::replace(&mut world.socks[self.at].was_refused, outcome.is_err());
        if was_refused || outcome.is_ok() {
            return outcome;
        }
        world.refused += 1;
        Ok(())
    }

    fn send_segments_to(
        &mut self,
        payload: &Payload<'_>,
        segment_bytes: usize,
        to: SocketAddr,
    ) -> io::Result<()> {
        let mut at = 0;
        while at < payload.len() {
            self.send_to(&[], &payload.range(at, segment_bytes), to)?;
            at += segment_bytes;
        }
        Ok(())
    }

    fn recv_batch(&mut self, arrivals_max: usize, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        for _ in 0..arrivals_max.min(BATCH) {
            let (bytes, from, to, tos, coalesced) = {
                let sock = &mut self.world.borrow_mut().socks[self.at];
                sock.receives += 1;
                if let Some(code) = sock.receive_errors.pop_front().or(sock.receives_fail) {
                    return Err(os(code));
                }
                let Some((bytes, from)) = sock.inbox.pop_front() else { return Ok(false) };
                (bytes, from, sock.sent_to, sock.tos, sock.coalesced_bytes)
            };
            let segment_bytes = coalesced.unwrap_or(bytes.len());
            each(Arrival { from, to, tos, bytes: &bytes, segment_bytes });
        }
        Ok(true)
    }

    fn take_errors(&mut self, errors_max: usize, each: &mut dyn FnMut(&NetworkError<'_>)) -> bool {
        for _ in 0..errors_max {
            let complaint = self.world.borrow_mut().socks[self.at].complaints.pop_front();
            let Some(Complaint { to, offender, message, quoted }) = complaint else { return false };
            each(&NetworkError { to, offender, message, quoted: &quoted });
        }
        true
    }
}

impl Drop for FakeDatagram {
    fn drop(&mut self) {
        let mut world = self.world.borrow_mut();
        if !std::mem::take(&mut world.socks[self.at].leaves) {
            world.close_sock(self.at);
        }
    }
}

impl HostListener for FakeListener {
    type Stream = FakeStream;

    fn accept(&mut self, token: Token) -> io::Result<(FakeStream, SocketAddr)> {
        let mut world = self.world.borrow_mut();
        world.accepts += 1;
        if world.backlogs[self.at].is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Some(code) = world.accept_error {
            return Err(os(code));
        }
        world.take_descriptor()?;
        let client = world.backlogs[self.at].pop_front().expect("a client waits");
        let at = world.add_conn(token, client, false);
        world.conns[at].came_by = Some(self.host_port());
        Ok((FakeStream { world: Rc::clone(&self.world), at }, client))
    }
}
