//! Host sockets: the rootless uplink. Implements the engine's [`HostNet`] over the kernel's TCP, UDP
//! and ICMP echo sockets; those of datagrams are in `datagrams`.
//!
//! TCP sockets linger for zero seconds until they are closed cleanly, so that the death of guest,
//! front-end or this process reaches the world as RST and never as FIN: a truncated upload cannot
//! look complete. Their buffers are left to the kernel's autotuning, which a fixed size would switch
//! off and cap; `receive_window` helps it.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use libc::iovec;
use socket2::{Domain, Protocol, Socket, Type};

use super::datagrams::{self, Runs, UdpSocket};
use super::own_addresses::OwnAddresses;
use super::receive_window::ReceiveWindow;
use super::sys::error_queue::ErrorReader;
use super::sys::poll::Poll;
use super::sys::socket::{self as sys, PeerState};
use super::sys::stream_runs::StreamRuns;
use crate::config::Publish;
use crate::engine::host_net::{Close, HostListener, HostNet, HostStream, SendSpace, Token};
use crate::frame::{Payload, PayloadMut};
use crate::limits;

pub use super::datagrams::{Datagram, DetachedDatagram};

/// Where discarded bytes go when the kernel peeks from the queue's front only.
const SCRATCH_BYTES: usize = 64 << 10;

/// What the sockets of one worker share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) poll: Poll,
    pub(super) segments: RefCell<Vec<iovec>>,
    /// Bytes peeked again only to be skipped; never read by us.
    scratch: RefCell<Box<[u8]>>,
    pub(super) runs: RefCell<Runs>,
    stream_runs: RefCell<StreamRuns>,
    pub(super) reader: RefCell<sys::DatagramReader>,
    pub(super) errors: RefCell<ErrorReader>,
    peek_offset: bool,
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
        datagrams::prepare(&bound)?;
        let address = bound.local_addr()?.as_socket();
        // Of several addresses the one a client used is the one it listens to.
        if address.is_some_and(|address| address.ip() == IpAddr::V4(Ipv4Addr::UNSPECIFIED)) {
            sys::tell_addresses(bound.as_fd())?;
        }
        self.datagram(token, bound)
    }

    fn datagram(&self, token: Token, socket: Socket) -> io::Result<Datagram> {
        self.watch_datagram(token, UdpSocket::new(socket))
    }

    fn watch_datagram(&self, token: Token, socket: UdpSocket) -> io::Result<Datagram> {
        Datagram::watched(&self.shared, token, socket)
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
            window: ReceiveWindow::default(),
            run: None,
        })
    }
}

/// Whether TCP sockets know `SO_PEEK_OFF` here (Linux 6.9), tried on one of our own.
pub fn tcp_knows_peek_offset() -> bool {
    let probe = Socket::new(Domain::IPV4, Type::STREAM.cloexec(), Some(Protocol::TCP));
    probe.is_ok_and(|socket| sys::set_peek_offset(socket.as_fd(), 0).is_ok())
}

/// What the kernel can do with datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpFeatures {
    /// It cuts one message into several datagrams (`UDP_SEGMENT`, Linux 4.18).
    pub segmentation: bool,
    /// It hands over several as one (`UDP_GRO`, Linux 5.0).
    pub coalescing: bool,
}

/// Prepares a UDP socket as those of the guest's datagrams are, and closes it.
///
/// # Errors
/// The kernel's refusal, which would cost the guest UDP.
pub fn try_udp() -> io::Result<UdpFeatures> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
    datagrams::prepare(&socket)?;
    Ok(UdpFeatures {
        segmentation: sys::knows_segmentation(socket.as_fd()),
        coalescing: sys::allow_coalescing(socket.as_fd()).is_ok(),
    })
}

/// Opens an ICMP echo socket as those of the guest's echoes are, and closes it.
///
/// # Errors
/// `PermissionDenied` where `net.ipv4.ping_group_range` leaves this user's groups out.
pub fn try_ping() -> io::Result<()> {
    Socket::new(Domain::IPV4, Type::DGRAM.cloexec(), Some(Protocol::ICMPV4)).map(drop)
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
        let DetachedStream { socket, kind, position, window } = detached;
        self.shared.poll.watch_socket(socket.as_fd(), token)?;
        Ok(Stream { shared: Rc::clone(&self.shared), socket, token, kind, position, window, run: None })
    }

    fn attach_datagram(&mut self, token: Token, detached: DetachedDatagram) -> io::Result<Datagram> {
        self.watch_datagram(token, detached.into_socket())
    }

    fn connect_dns(&mut self, token: Token) -> io::Result<Stream> {
        let stream = (self.connect_dns)()?;
        self.stream(token, stream.into(), StreamKind::Local)
    }

    fn udp(&mut self, token: Token, local: SocketAddr) -> io::Result<Datagram> {
        let socket = datagrams::bind_near(local)?;
        self.datagram(token, socket)
    }

    fn ping(&mut self, token: Token, family: IpAddr) -> io::Result<Datagram> {
        let (domain, protocol) = match family {
            IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
            IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
        };
        let socket = Socket::new(domain, Type::DGRAM.nonblocking().cloexec(), Some(protocol))?;
        sys::tell_tos(socket.as_fd())?;
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
    window: ReceiveWindow,
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
    window: ReceiveWindow,
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
        DetachedStream { socket: self.socket, kind: self.kind, position: self.position, window: self.window }
    }

    fn came_by(&self, port: &Publish) -> bool {
        let bound = self.socket.local_addr().ok().and_then(|addr| addr.as_socket());
        let at_end = bound.is_some_and(|bound| {
            let (ip, wanted) = (bound.ip(), port.host.ip());
            bound.port() == port.host.port() && (ip == wanted || wanted.is_unspecified())
        });
        // Taken from the listener, it is bound to the same interface.
        let interface = || self.socket.device().ok().flatten();
        let wanted = port.interface.as_ref().map(|name| name.as_str().as_bytes());
        self.kind == StreamKind::Tcp && at_end && interface().as_deref() == wanted
    }

    fn uses_ecn(&self) -> bool {
        self.kind == StreamKind::Tcp && sys::uses_ecn(self.socket.as_fd())
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
        if self.kind == StreamKind::Tcp {
            self.window.taken(self.socket.as_fd(), len_bytes);
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

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
        let window = ReceiveWindow::default();
        Ok((Stream { shared, socket, token, kind: StreamKind::Tcp, position, window, run: None }, client))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Another process may have the socket open still: it would be told of here for ever.
        self.shared.poll.unwatch(self.socket.as_raw_fd());
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
