//! Host sockets: the rootless uplink. Implements the engine's [`HostNet`] over the kernel's TCP, UDP
//! and ICMP echo sockets.
//!
//! TCP sockets linger for zero seconds until they are closed cleanly, so that the death of guest,
//! front-end or this process reaches the world as RST and never as FIN: a truncated upload cannot
//! look complete. Their buffers are left to the kernel's autotuning, which a fixed size would switch
//! off and cap.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use libc::iovec;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::own_addresses::OwnAddresses;
use super::sys::error_queue::ErrorReader;
use super::sys::poll::Poll;
use super::sys::socket::{self as sys, DatagramCall, PeerState};
use super::sys::stream_runs::StreamRuns;
use crate::engine::host_net::{
    Arrival, Close, HostDatagram, HostListener, HostNet, HostStream, NetworkError, PacketFields, SendSpace,
    Token,
};
use crate::frame::{Payload, PayloadMut};
use crate::limits;

/// Receive queue asked for each UDP socket, in bytes.
const UDP_RECEIVE_BYTES: usize = 4 << 20;

/// Where discarded bytes go when the kernel peeks from the queue's front only.
const SCRATCH_BYTES: usize = 64 << 10;

/// What the sockets of one worker share.
#[derive(Debug)]
struct Shared {
    poll: Poll,
    segments: RefCell<Vec<iovec>>,
    /// Bytes peeked again only to be skipped; never read by us.
    scratch: RefCell<Box<[u8]>>,
    runs: RefCell<Runs>,
    stream_runs: RefCell<StreamRuns>,
    reader: RefCell<sys::DatagramReader>,
    errors: RefCell<ErrorReader>,
    peek_offset: bool,
}

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
struct Runs {
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
    fn send_all(&mut self) -> u64 {
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
        socket.alone.set(true);
        for n in 0..self.starts.len() {
            let end = self.starts.get(n + 1).copied().unwrap_or(self.segments.len());
            let segments = &mut self.segments[self.starts[n]..end];
            if socket.send(segments, to, self.fields.from).is_err() {
                refused += 1;
            }
        }
        refused
    }
}

/// Opens the stream to the process's own DNS service.
pub type ConnectDns = Box<dyn FnMut() -> io::Result<UnixStream>>;

/// The host's sockets, watched by one worker's epoll set.
pub struct HostSockets {
    shared: Rc<Shared>,
    connect_dns: ConnectDns,
    own_addresses: OwnAddresses,
}

impl HostSockets {
    /// Sockets watched by `poll`. `peek_offset` false never uses `SO_PEEK_OFF` on TCP.
    pub fn new(poll: Poll, connect_dns: ConnectDns, peek_offset: bool) -> HostSockets {
        let shared = Shared {
            poll,
            segments: RefCell::new(Vec::with_capacity(limits::FRAME_SEGMENTS_MAX)),
            scratch: RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice()),
            runs: RefCell::default(),
            stream_runs: RefCell::default(),
            reader: RefCell::default(),
            errors: RefCell::default(),
            peek_offset: peek_offset && tcp_knows_peek_offset(),
        };
        HostSockets { shared: Rc::new(shared), connect_dns, own_addresses: OwnAddresses::new() }
    }

    /// Whether TCP data is peeked with `SO_PEEK_OFF`.
    pub fn uses_peek_offset(&self) -> bool {
        self.shared.peek_offset
    }

    /// A published TCP port: listens on `bound` under `token`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn listener(&self, token: Token, bound: Socket) -> io::Result<Listener> {
        self.shared.poll.watch_socket(bound.as_fd(), token)?;
        Ok(Listener { shared: Rc::clone(&self.shared), socket: bound })
    }

    /// A published UDP port: receives on `bound` under `token`.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn published_udp(&self, token: Token, bound: Socket) -> io::Result<Datagram> {
        prepare_udp(&bound)?;
        let address = bound.local_addr()?.as_socket();
        // Of several addresses the one a client used is the one it listens to.
        if address.is_some_and(|address| address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED)) {
            sys::tell_addresses(bound.as_fd())?;
        }
        self.datagram(token, bound)
    }

    fn datagram(&self, token: Token, socket: Socket) -> io::Result<Datagram> {
        let fields = Cell::new(PacketFields::default());
        let (alone, refused, applied) = (Cell::new(false), Cell::new(false), Cell::new(None));
        self.watch_datagram(token, UdpSocket { socket, alone, refused, fields, applied })
    }

    fn watch_datagram(&self, token: Token, socket: UdpSocket) -> io::Result<Datagram> {
        self.shared.poll.watch_datagrams(socket.socket.as_fd(), token)?;
        Ok(Datagram { shared: Rc::clone(&self.shared), socket: Rc::new(socket) })
    }

    fn stream(&self, token: Token, socket: OwnedFd, kind: StreamKind) -> io::Result<Stream> {
        let peek_offset = match kind {
            StreamKind::Tcp => self.shared.peek_offset,
            // Unix streams have had it since Linux 3.4.
            StreamKind::Local => true,
        };
        if peek_offset {
            sys::set_peek_offset(socket.as_fd(), 0)?;
        }
        self.shared.poll.watch_socket(socket.as_fd(), token)?;
        let position = peek_offset.then_some(0);
        Ok(Stream {
            shared: Rc::clone(&self.shared),
            socket: socket.into(),
            token,
            kind,
            position,
            run: None,
        })
    }
}

/// Binds a socket for a published port: TCP sockets listen.
///
/// # Errors
/// The kernel's refusal, such as an address in use.
pub fn bind_published(kind: Type, address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), None)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    if kind == Type::STREAM {
        socket.listen(1024)?;
    }
    Ok(socket)
}

/// Ports tried for one of the right parity: with half of them free, all but one in 256 sockets get it.
const PARITY_TRIES: usize = 8;

/// A UDP socket of a flow's at `local`.
fn bind_udp(local: SocketAddr) -> io::Result<Socket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(local), kind, Some(Protocol::UDP))?;
    prepare_udp(&socket)?;
    socket.bind(&local.into())?;
    Ok(socket)
}

fn tcp_knows_peek_offset() -> bool {
    let probe = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), Some(Protocol::TCP));
    probe.is_ok_and(|socket| sys::set_peek_offset(socket.as_fd(), 0).is_ok())
}

/// What every UDP socket is set to.
fn prepare_udp(socket: &Socket) -> io::Result<()> {
    // The kernel cuts this to `net.core.rmem_max`; a burst has to wait somewhere until it is its turn.
    socket.set_recv_buffer_size(UDP_RECEIVE_BYTES)?;
    // Where the kernel cannot coalesce, datagrams come one by one.
    let _ = sys::allow_coalescing(socket.as_fd());
    sys::keep_errors(socket.as_fd())
}

/// What every TCP socket of a flow is set to.
fn prepare_tcp(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_out_of_band_inline(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)
}

impl HostNet for HostSockets {
    type Stream = Stream;
    type Datagram = Datagram;
    type Listener = Listener;

    fn connect(&mut self, token: Token, peer: SocketAddr) -> io::Result<Stream> {
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = Socket::new(Domain::for_address(peer), kind, Some(Protocol::TCP))?;
        prepare_tcp(&socket)?;
        match socket.connect(&peer.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        self.stream(token, socket.into(), StreamKind::Tcp)
    }

    fn attach(&mut self, token: Token, detached: DetachedStream) -> io::Result<Stream> {
        let DetachedStream { socket, kind, position } = detached;
        self.shared.poll.watch_socket(socket.as_fd(), token)?;
        Ok(Stream { shared: Rc::clone(&self.shared), socket, token, kind, position, run: None })
    }

    fn attach_datagram(&mut self, token: Token, detached: DetachedDatagram) -> io::Result<Datagram> {
        self.watch_datagram(token, detached.0)
    }

    fn connect_dns(&mut self, token: Token) -> io::Result<Stream> {
        let stream = (self.connect_dns)()?;
        self.stream(token, stream.into(), StreamKind::Local)
    }

    fn udp(&mut self, token: Token, local: SocketAddr) -> io::Result<Datagram> {
        let mut any = local;
        any.set_port(0);
        let mut socket = match local.port() {
            0 => bind_udp(any)?,
            _ => bind_udp(local).or_else(|_| bind_udp(any))?,
        };
        for _ in 0..PARITY_TRIES {
            let port = socket.local_addr()?.as_socket().map_or(0, |bound| bound.port());
            if local.port() == 0 || port % 2 == local.port() % 2 {
                break;
            }
            socket = bind_udp(any)?;
        }
        self.datagram(token, socket)
    }

    fn ping(&mut self, token: Token, family: IpAddr) -> io::Result<Datagram> {
        let (domain, protocol) = match family {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(protocol))?;
        sys::keep_errors(socket.as_fd())?;
        self.datagram(token, socket)
    }

    fn flush_datagrams(&mut self) -> u64 {
        self.shared.runs.borrow_mut().send_all()
    }

    fn path_mtu(&mut self, to: SocketAddr) -> Option<u16> {
        // Only a connected socket knows its path; a port is needed, not used.
        let to = SocketAddr::new(to.ip(), to.port().max(1));
        let kind = Type::DGRAM.cloexec();
        let probe = Socket::new(Domain::for_address(to), kind, Some(Protocol::UDP)).ok()?;
        probe.connect(&to.into()).ok()?;
        sys::path_mtu(probe.as_fd())
    }

    fn is_own_address(&mut self, addr: IpAddr) -> bool {
        self.own_addresses.contains(addr)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamKind {
    Tcp,
    Local,
}

/// A stream socket: TCP to the world, or a local one to the process's own services.
#[derive(Debug)]
pub struct Stream {
    shared: Rc<Shared>,
    socket: Socket,
    token: Token,
    kind: StreamKind,
    /// Where the kernel peeks next, if it keeps an offset.
    position: Option<usize>,
    /// What was gathered of this batch.
    run: Option<RunHandle>,
}

/// A run of the worker's, given back when dropped.
#[derive(Debug)]
struct RunHandle {
    shared: Rc<Shared>,
    at: usize,
}

impl Drop for RunHandle {
    fn drop(&mut self) {
        self.shared.stream_runs.borrow_mut().give_back(self.at);
    }
}

impl Stream {
    fn peek_from_front(&mut self, offset: usize, into: &mut PayloadMut<'_>) -> io::Result<usize> {
        // Asked before reading: an end that came with the last bytes is then known with certainty.
        let peer = if offset > 0 { sys::peer_state(self.socket.as_fd()) } else { PeerState::Open };
        let mut segments = self.shared.segments.borrow_mut();
        let mut scratch = self.shared.scratch.borrow_mut();
        segments.clear();
        push_skipped(&mut segments, &mut scratch, offset);
        into.push_iovecs(&mut segments);
        let mut seen = 0;
        // More than one turn only for more segments than one call takes.
        loop {
            let count = segments.len().min(limits::FRAME_SEGMENTS_MAX);
            let asked: usize = segments[..count].iter().map(|segment| segment.iov_len).sum();
            let len = sys::recv_segments(self.socket.as_fd(), &mut segments[..count], libc::MSG_PEEK)?;
            seen = len.max(seen);
            if len < asked || count == segments.len() {
                break;
            }
            let rest = segments.split_off(count);
            segments.clear();
            push_skipped(&mut segments, &mut scratch, asked);
            segments.extend(rest);
        }
        match (seen.saturating_sub(offset), peer) {
            (0, PeerState::Open) if offset > 0 => Err(io::ErrorKind::WouldBlock.into()),
            // What was peeked before is still there to be read, and hides the error from reads.
            (0, PeerState::Failed) => {
                Err(self.socket.take_error()?.unwrap_or(io::ErrorKind::ConnectionReset.into()))
            }
            (fresh, _) => Ok(fresh),
        }
    }

    fn peek_from_offset(&mut self, offset: usize, into: &mut PayloadMut<'_>) -> io::Result<usize> {
        if self.position != Some(offset) {
            let at = i32::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            sys::set_peek_offset(self.socket.as_fd(), at)?;
        }
        let mut segments = self.shared.segments.borrow_mut();
        segments.clear();
        into.push_iovecs(&mut segments);
        let outcome = sys::recv_segments(self.socket.as_fd(), &mut segments, libc::MSG_PEEK);
        self.position = Some(offset + *outcome.as_ref().unwrap_or(&0));
        outcome
    }
}

/// A stream on its way between workers.
#[derive(Debug)]
pub struct DetachedStream {
    socket: Socket,
    kind: StreamKind,
    position: Option<usize>,
}

/// Appends `len` bytes of `scratch`, over and over, to be skipped by a peek.
fn push_skipped(segments: &mut Vec<iovec>, scratch: &mut [u8], len: usize) {
    let base = scratch.as_mut_ptr();
    let mut left = len;
    while left > 0 {
        let iov_len = left.min(scratch.len());
        segments.push(iovec { iov_base: base.cast(), iov_len });
        left -= iov_len;
    }
}

impl HostStream for Stream {
    type Detached = DetachedStream;

    fn detach(self) -> DetachedStream {
        self.shared.poll.unwatch(self.socket.as_raw_fd());
        DetachedStream { socket: self.socket, kind: self.kind, position: self.position }
    }

    fn take_error(&mut self) -> io::Result<()> {
        match self.socket.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn send(&mut self, payload: &Payload<'_>) -> io::Result<usize> {
        let mut segments = self.shared.segments.borrow_mut();
        segments.clear();
        payload.push_iovecs(&mut segments);
        sys::send_segments(self.socket.as_fd(), &mut segments, None)
    }

    fn queue(&mut self, payload: &Payload<'_>) -> bool {
        // A run taken for nothing would be kept until the stream has bytes for it.
        if !payload.is_in_guest() {
            return false;
        }
        let mut runs = self.shared.stream_runs.borrow_mut();
        if self.run.is_none() {
            let taken = runs.take();
            self.run = taken.map(|at| RunHandle { shared: Rc::clone(&self.shared), at });
        }
        self.run.as_ref().is_some_and(|run| runs.run(run.at).push(payload))
    }

    fn send_queued(&mut self, rest: &mut dyn FnMut(&Payload<'_>)) -> io::Result<usize> {
        let Some(handle) = self.run.take() else { return Ok(0) };
        let mut runs = self.shared.stream_runs.borrow_mut();
        let run = runs.run(handle.at);
        let outcome = match run.len_bytes() {
            0 => Ok(0),
            _ => sys::send_segments(self.socket.as_fd(), run.segments(), None),
        };
        let sent = match outcome {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            outcome => outcome?,
        };
        run.hand_rest(sent, rest);
        drop(runs);
        Ok(sent)
    }

    fn peek(&mut self, offset_bytes: usize, mut into: PayloadMut<'_>) -> io::Result<usize> {
        match self.position {
            Some(_) => self.peek_from_offset(offset_bytes, &mut into),
            None => self.peek_from_front(offset_bytes, &mut into),
        }
    }

    fn discard(&mut self, len_bytes: usize) -> io::Result<()> {
        let mut left = len_bytes;
        while left > 0 {
            let done = match self.kind {
                StreamKind::Tcp => sys::discard_tcp(self.socket.as_fd(), left)?,
                StreamKind::Local => {
                    let mut scratch = self.shared.scratch.borrow_mut();
                    let len = left.min(SCRATCH_BYTES);
                    let mut into = [iovec { iov_base: scratch.as_mut_ptr().cast(), iov_len: len }];
                    sys::recv_segments(self.socket.as_fd(), &mut into, 0)?
                }
            };
            if done == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= done;
        }
        // The kernel moves its offset back by what left the queue.
        self.position = self.position.map(|at| at.saturating_sub(len_bytes));
        Ok(())
    }

    fn send_space(&mut self) -> SendSpace {
        let Some(memory) = sys::send_memory(self.socket.as_fd()) else {
            return SendSpace { bytes: 64 << 10, tight: true };
        };
        let queued = match self.kind {
            StreamKind::Tcp => memory.queued_bytes,
            StreamKind::Local => memory.allocated_bytes,
        };
        let free = memory.limit_bytes.saturating_sub(queued);
        // A quarter is left for what the kernel charges besides payload. It tells of room once a third
        // of the queue is free (sk_stream_is_writeable), and grows the queue only when so asked.
        // Judged otherwise than the kernel does, "tight" would make it tell at once, again and again.
        SendSpace { bytes: free / 4 * 3, tight: free < queued / 2 }
    }

    fn want_writable(&mut self) {
        if let Err(error) = self.shared.poll.rewatch_socket(self.socket.as_fd(), self.token) {
            tracing::debug!(%error, "cannot watch a socket for room");
        }
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }

    fn local_ip(&self) -> Option<IpAddr> {
        let address = self.socket.local_addr().ok()?.as_socket()?;
        Some(address.ip())
    }

    fn close(self, how: Close) {
        if how == Close::Clean && self.kind == StreamKind::Tcp {
            // On failure the socket stays as it was: a reset rather than a false FIN.
            let _ = self.socket.set_linger(None);
        }
    }
}

#[derive(Debug)]
struct UdpSocket {
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
    /// Sets the socket to `fields` where it is not: a flow's datagrams rarely differ in them.
    fn apply(&self, fields: PacketFields) {
        let old = self.applied.replace(Some(fields));
        if old.is_none_or(|old| old.ttl != fields.ttl)
            && let Err(error) = self.socket.set_ttl_v4(fields.ttl.into())
        {
            tracing::debug!(%error, "cannot set a datagram's hop limit");
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
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.socket.as_fd()
    }
}

/// A datagram socket on its way between workers.
#[derive(Debug)]
pub struct DetachedDatagram(UdpSocket);

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

/// A published TCP port.
#[derive(Debug)]
pub struct Listener {
    shared: Rc<Shared>,
    socket: Socket,
}

impl HostListener for Listener {
    type Stream = Stream;

    fn accept(&mut self, token: Token) -> io::Result<(Stream, SocketAddr)> {
        let (socket, client) = self.socket.accept()?;
        socket.set_nonblocking(true)?;
        prepare_tcp(&socket)?;
        let client = client.as_socket().unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
        let peek_offset = self.shared.peek_offset;
        if peek_offset {
            sys::set_peek_offset(socket.as_fd(), 0)?;
        }
        self.shared.poll.watch_socket(socket.as_fd(), token)?;
        let position = peek_offset.then_some(0);
        let shared = Rc::clone(&self.shared);
        Ok((Stream { shared, socket, token, kind: StreamKind::Tcp, position, run: None }, client))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
