//! Datagram sockets of the host: UDP and ICMP echo.
//!
//! Datagrams of one socket to one endpoint that come in one batch leave as one message (`UDP_SEGMENT`); what
//! comes is read in batches; errors of the network are read from the socket's error queue. Hop limit, TOS and
//! DF are options of the socket, set when a datagram needs others than the one before.
//!
//! May touch: `sys`. Read first: udp(7), ip(7).

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;

use libc::iovec;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::sockets::Shared;
use super::sys::socket::{self as sys, DatagramCall};
use crate::engine::host_net::{Arrival, HostDatagram, NetworkError, PacketFields, Token};
use crate::frame::Payload;

/// Receive queue asked for each UDP socket, in bytes.
const UDP_RECEIVE_BYTES: usize = 4 << 20;

/// Datagrams of one socket to one endpoint, all of one length but a shorter last one, that leave with
/// one system call.
#[derive(Debug)]
struct Run {
    socket: Option<Rc<UdpSocket>>,
    to: Option<SocketAddr>,
    fields: PacketFields,
    segment_bytes: usize,
    /// Where each datagram's segments begin.
    starts: Vec<usize>,
    segments: Vec<iovec>,
    total_bytes: usize,
    /// A shorter datagram ended it.
    ended: bool,
}

/// Datagrams of one run: `UDP_MAX_SEGMENTS` of kernels before 6.8.
const RUN_DATAGRAMS_MAX: usize = 64;
/// Segments of guest memory a run has room for at once: a few for each datagram.
const RUN_SEGMENTS: usize = 8 * RUN_DATAGRAMS_MAX;
/// Bytes of one run: the largest UDP payload over IPv4.
const RUN_BYTES_MAX: usize = 65_507;
/// Longest datagram of a run: longer ones may have to be fragmented, which segmentation cannot.
const RUN_DATAGRAM_BYTES_MAX: usize = 1472;

/// The runs of a batch: datagrams of several sockets or endpoints come interleaved.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: [Run; RUNS_MAX],
    /// The run that makes room for the next one past the bound.
    next_to_go: usize,
    /// Datagrams refused since this was last asked.
    refused: u64,
}

/// Runs at once; a search among them costs less than a system call.
const RUNS_MAX: usize = 16;

impl Runs {
    /// The run that takes a datagram of `len` bytes: the one of its socket and endpoint, else a new one.
    fn run_for(&mut self, socket: &Rc<UdpSocket>, to: SocketAddr, len: usize) -> &mut Run {
        let fields = socket.fields.get();
        let own = self.runs.iter().position(|run| run.is_of(socket) && run.to == Some(to));
        let at = own.or_else(|| self.runs.iter().position(|run| run.socket.is_none())).unwrap_or_else(|| {
            self.next_to_go = (self.next_to_go + 1) % RUNS_MAX;
            self.next_to_go
        });
        if own.is_some() && self.runs[at].accepts(len, fields) {
            return &mut self.runs[at];
        }
        self.refused += self.runs[at].send();
        let run = &mut self.runs[at];
        run.socket = Some(Rc::clone(socket));
        run.to = Some(to);
        run.fields = fields;
        run.segment_bytes = len;
        run
    }

    /// Sends what was queued on `socket`, so that what follows on it keeps its order.
    fn send_of(&mut self, socket: &Rc<UdpSocket>) {
        for run in &mut self.runs {
            if run.is_of(socket) {
                self.refused += run.send();
            }
        }
    }

    /// Sends everything; returns how many datagrams were refused since this was last called.
    pub(super) fn send_all(&mut self) -> u64 {
        for run in &mut self.runs {
            self.refused += run.send();
        }
        std::mem::take(&mut self.refused)
    }
}

impl Default for Run {
    fn default() -> Run {
        Run {
            socket: None,
            to: None,
            fields: PacketFields::default(),
            segment_bytes: 0,
            // Room from the start: how long the runs of a batch get depends on when its frames come.
            starts: Vec::with_capacity(RUN_DATAGRAMS_MAX),
            segments: Vec::with_capacity(RUN_SEGMENTS),
            total_bytes: 0,
            ended: false,
        }
    }
}

impl Run {
    fn is_of(&self, socket: &Rc<UdpSocket>) -> bool {
        self.socket.as_ref().is_some_and(|own| Rc::ptr_eq(own, socket))
    }

    fn accepts(&self, len: usize, fields: PacketFields) -> bool {
        !self.ended
            && self.fields == fields
            // An empty one would be no datagram at a run's end.
            && (1..=self.segment_bytes).contains(&len)
            && self.starts.len() < RUN_DATAGRAMS_MAX
            && self.total_bytes + len <= RUN_BYTES_MAX
    }

    fn push(&mut self, payload: &Payload<'_>) {
        self.starts.push(self.segments.len());
        payload.push_iovecs(&mut self.segments);
        self.total_bytes += payload.len();
        self.ended = payload.len() < self.segment_bytes;
    }

    /// Sends the run, as one where the kernel can; returns how many datagrams were refused.
    fn send(&mut self) -> u64 {
        let (Some(socket), Some(to)) = (self.socket.take(), self.to.take()) else {
            return 0;
        };
        let to = SockAddr::from(to);
        let count = self.starts.len();
        socket.apply(self.fields);
        let outcome = if count == 1 {
            socket.send(&mut self.segments, &to, self.fields.from)
        } else {
            socket.send_cut(&mut self.segments, &to, self.segment_bytes as u16, self.fields.from)
        };
        let refused = match outcome {
            Ok(_) => 0,
            Err(error) if count > 1 && error.kind() != io::ErrorKind::WouldBlock => {
                self.send_one_by_one(&socket, &to)
            }
            Err(_) => count as u64,
        };
        if refused > 0 {
            socket.refused.set(true);
        }
        self.starts.clear();
        self.segments.clear();
        self.total_bytes = 0;
        self.ended = false;
        refused
    }

    fn send_one_by_one(&mut self, socket: &UdpSocket, to: &SockAddr) -> u64 {
        let mut refused = 0;
        for n in 0..self.starts.len() {
            let end = self.starts.get(n + 1).copied().unwrap_or(self.segments.len());
            let segments = &mut self.segments[self.starts[n]..end];
            if socket.send(segments, to, self.fields.from).is_err() {
                refused += 1;
            }
        }
        // Where each by itself is refused too, it is not for being cut that the run was.
        if refused < self.starts.len() as u64 {
            socket.alone.set(true);
        }
        refused
    }
}

/// Ports tried for one of the right parity: with half of them free, all but one in 256 sockets get it.
const PARITY_TRIES: usize = 8;

/// A UDP socket of a flow's at `local`.
fn bind_udp(local: SocketAddr) -> io::Result<Socket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(local), kind, Some(Protocol::UDP))?;
    prepare(&socket)?;
    socket.bind(&local.into())?;
    Ok(socket)
}

/// A UDP socket at `local` if its port is free, else at any, of the same parity where one is soon found.
///
/// # Errors
/// The kernel's refusal, but for a port that is not to be had.
pub(super) fn bind_near(local: SocketAddr) -> io::Result<Socket> {
    let mut any = local;
    any.set_port(0);
    if local.port() == 0 {
        return bind_udp(any);
    }
    if let Ok(socket) = bind_udp(local) {
        return Ok(socket);
    }
    let mut socket = bind_udp(any)?;
    for _ in 0..PARITY_TRIES {
        let port = socket.local_addr()?.as_socket().map_or(0, |bound| bound.port());
        if port % 2 == local.port() % 2 {
            break;
        }
        socket = bind_udp(any)?;
    }
    Ok(socket)
}

/// What every UDP socket is set to.
pub(super) fn prepare(socket: &Socket) -> io::Result<()> {
    // The kernel cuts this to `net.core.rmem_max`; a burst has to wait somewhere until it is its turn.
    socket.set_recv_buffer_size(UDP_RECEIVE_BYTES)?;
    // Where the kernel cannot coalesce, datagrams come one by one.
    let _ = sys::allow_coalescing(socket.as_fd());
    sys::tell_tos(socket.as_fd())?;
    sys::keep_errors(socket.as_fd())
}

/// A datagram socket, and what is to be known of it wherever it is watched.
#[derive(Debug)]
pub(super) struct UdpSocket {
    socket: Socket,
    /// Its route or device refused a run; datagrams go alone.
    alone: Cell<bool>,
    /// A queued datagram was refused; the next one finds out why.
    refused: Cell<bool>,
    /// What the datagrams to come shall have.
    fields: Cell<PacketFields>,
    /// What the socket is set to; not known of a new one.
    applied: Cell<Option<PacketFields>>,
}

impl UdpSocket {
    pub(super) fn new(socket: Socket) -> UdpSocket {
        UdpSocket {
            socket,
            alone: Cell::new(false),
            refused: Cell::new(false),
            fields: Cell::new(PacketFields::default()),
            applied: Cell::new(None),
        }
    }

    /// Sets the socket to `fields` where it is not: a flow's datagrams rarely differ in them.
    fn apply(&self, fields: PacketFields) {
        let old = self.applied.replace(Some(fields));
        if old.is_none_or(|old| old.ttl != fields.ttl)
            && let Err(error) = self.socket.set_ttl_v4(fields.ttl.into())
        {
            tracing::debug!(%error, "cannot set a datagram's hop limit");
        }
        if old.is_none_or(|old| old.tos != fields.tos)
            && let Err(error) = self.socket.set_tos_v4(fields.tos.into())
        {
            tracing::debug!(%error, "cannot set a datagram's differentiated services");
        }
        if old.is_none_or(|old| old.dont_fragment != fields.dont_fragment)
            && let Err(error) = sys::set_dont_fragment(self.socket.as_fd(), fields.dont_fragment)
        {
            tracing::debug!(%error, "cannot say whether datagrams may be fragmented");
        }
    }

    /// Sends one datagram.
    fn send(&self, segments: &mut [iovec], to: &SockAddr, from: Option<IpAddr>) -> io::Result<usize> {
        self.call(segments, to, DatagramCall { segment_bytes: None, from: ipv4(from) })
    }

    /// Sends datagrams of `segment_bytes` each.
    fn send_cut(
        &self,
        segments: &mut [iovec],
        to: &SockAddr,
        segment_bytes: u16,
        from: Option<IpAddr>,
    ) -> io::Result<usize> {
        self.call(segments, to, DatagramCall { segment_bytes: Some(segment_bytes), from: ipv4(from) })
    }

    /// What the network said of an earlier datagram fails the call after it, whose own fault it is not
    /// (socket(7), `SO_ERROR`): called again, it says what becomes of this one.
    fn call(&self, segments: &mut [iovec], to: &SockAddr, call: DatagramCall) -> io::Result<usize> {
        match sys::send_datagrams(self.socket.as_fd(), segments, to, call) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                sys::send_datagrams(self.socket.as_fd(), segments, to, call)
            }
            outcome => outcome,
        }
    }
}

fn ipv4(addr: Option<IpAddr>) -> Option<Ipv4Addr> {
    match addr {
        Some(IpAddr::V4(addr)) => Some(addr),
        Some(IpAddr::V6(_)) | None => None,
    }
}

/// A UDP or ICMP echo socket.
#[derive(Debug)]
pub struct Datagram {
    shared: Rc<Shared>,
    socket: Rc<UdpSocket>,
}

impl Datagram {
    /// The socket, watched under `token` by the worker whose sockets share `shared`.
    pub(super) fn watched(shared: &Rc<Shared>, token: Token, socket: UdpSocket) -> io::Result<Datagram> {
        shared.poll.watch_datagrams(socket.socket.as_fd(), token)?;
        Ok(Datagram { shared: Rc::clone(shared), socket: Rc::new(socket) })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.socket.as_fd()
    }
}

/// A datagram socket on its way between workers.
#[derive(Debug)]
pub struct DetachedDatagram(UdpSocket);

impl DetachedDatagram {
    pub(super) fn into_socket(self) -> UdpSocket {
        self.0
    }
}

impl HostDatagram for Datagram {
    type Detached = DetachedDatagram;

    fn detach(self) -> DetachedDatagram {
        self.shared.runs.borrow_mut().send_of(&self.socket);
        self.shared.poll.unwatch(self.socket.socket.as_raw_fd());
        let socket = Rc::into_inner(self.socket).expect("only its runs, which were sent, share the socket");
        DetachedDatagram(socket)
    }

    fn set_fields(&mut self, fields: PacketFields) {
        self.socket.fields.set(fields);
    }

    fn send_to(&mut self, head: &[u8], payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        self.shared.runs.borrow_mut().send_of(&self.socket);
        let mut segments = self.shared.segments.borrow_mut();
        segments.clear();
        Payload::from_host(head).push_iovecs(&mut segments);
        payload.push_iovecs(&mut segments);
        let fields = self.socket.fields.get();
        self.socket.apply(fields);
        self.socket.send(&mut segments, &SockAddr::from(to), fields.from)?;
        Ok(())
    }

    fn queue_to(&mut self, payload: &Payload<'_>, to: SocketAddr) -> io::Result<()> {
        if self.socket.refused.take() {
            return self.send_to(&[], payload, to);
        }
        let mut runs = self.shared.runs.borrow_mut();
        let len = payload.len();
        runs.run_for(&self.socket, to, len).push(payload);
        let joins = len > 0 && len <= RUN_DATAGRAM_BYTES_MAX && !self.socket.alone.get();
        if !joins || !payload.is_in_guest() {
            runs.send_of(&self.socket);
        }
        Ok(())
    }

    fn send_segments_to(
        &mut self,
        payload: &Payload<'_>,
        segment_bytes: usize,
        to: SocketAddr,
    ) -> io::Result<()> {
        self.shared.runs.borrow_mut().send_of(&self.socket);
        let mut segments = self.shared.segments.borrow_mut();
        let address = SockAddr::from(to);
        let fields = self.socket.fields.get();
        self.socket.apply(fields);
        if !self.socket.alone.get() {
            segments.clear();
            payload.push_iovecs(&mut segments);
            let size = u16::try_from(segment_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
            match self.socket.send_cut(&mut segments, &address, size, fields.from) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(_) => {}
            }
        }
        let mut at = 0;
        while at < payload.len() {
            segments.clear();
            payload.range(at, segment_bytes).push_iovecs(&mut segments);
            self.socket.send(&mut segments, &address, fields.from)?;
            at += segment_bytes;
        }
        Ok(())
    }

    fn recv_batch(&mut self, arrivals_max: usize, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool> {
        let mut reader = self.shared.reader.borrow_mut();
        let messages = arrivals_max.clamp(1, sys::MESSAGES_MAX);
        let count = match reader.read(self.fd(), messages) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            outcome => outcome?,
        };
        for n in 0..count {
            if let Some(arrival) = reader.message(n) {
                each(arrival);
            }
        }
        // Fewer than asked for means that nothing is left (epoll(7)'s rule for short reads).
        Ok(count == messages)
    }

    fn take_errors(&mut self, errors_max: usize, each: &mut dyn FnMut(&NetworkError<'_>)) -> bool {
        let mut reader = self.shared.errors.borrow_mut();
        for _ in 0..errors_max {
            match reader.read(self.fd()) {
                Ok(Some(error)) => each(&error),
                Ok(None) => {}
                Err(_) => return false,
            }
        }
        true
    }
}
