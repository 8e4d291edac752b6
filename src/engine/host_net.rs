//! What the engine needs of the host's side: sockets towards the world.
//!
//! `uplink::sockets` implements it over the kernel's sockets, the simulation over a scripted world.
//! No call blocks. Readiness is edge-triggered: it is reported once per change through
//! [`crate::engine::Engine::host_ready`], with the [`Token`] given at creation.

use std::io;
use std::net::{IpAddr, SocketAddr};

use crate::config::Publish;
use crate::frame::{Payload, PayloadMut};
use crate::wire::icmpv4::Message;

/// Names a socket's owner in readiness events; opaque to the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// What an edge-triggered event said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// Bytes, a datagram or a connection may be read.
    pub readable: bool,
    /// The socket may take bytes again, or its connect has ended.
    pub writable: bool,
    /// The peer sent FIN (`EPOLLRDHUP`).
    pub peer_closed: bool,
    /// Both directions are closed or an error waits (`EPOLLHUP`, `EPOLLERR`).
    pub failed: bool,
    /// Urgent bytes lie in the queue (`EPOLLPRI`): reads stop at them, so a short one says nothing of
    /// what is behind.
    pub urgent: bool,
}

/// How a stream socket ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// Both directions ended with FIN: what is still queued is delivered.
    Clean,
    /// Anything else: the peer sees RST.
    Reset,
}

/// Room in a socket's send queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendSpace {
    /// Bytes it takes without refusing.
    pub bytes: usize,
    /// So little is left that the kernel will say when there is more, if asked.
    pub tight: bool,
}

/// A stream towards the world: TCP, or a connected local service.
pub trait HostStream {
    /// The stream without its worker, to be moved to another one.
    type Detached: Send;

    /// Takes the stream out of its worker's readiness events.
    fn detach(self) -> Self::Detached;

    /// The outcome of a non-blocking connect, once writable: `Ok` if connected.
    ///
    /// # Errors
    /// The connect's error (`SO_ERROR`).
    fn take_error(&mut self) -> io::Result<()>;

    /// Moves bytes into the socket; returns how many it took.
    ///
    /// # Errors
    /// `WouldBlock` if it is full; anything else ends the stream.
    fn send(&mut self, payload: &Payload<'_>) -> io::Result<usize>;

    /// Gathers bytes from guest memory behind those gathered before, to leave with one call. They must leave
    /// by [`HostStream::send_queued`] before anything else is sent and before the end of the batch of
    /// frames, until which the memory stays as it is. False if they cannot be gathered: then what was
    /// goes first and these by themselves.
    fn queue(&mut self, _payload: &Payload<'_>) -> bool {
        false
    }

    /// Moves what was gathered into the socket; returns how many bytes it took, and hands those it did
    /// not take to `rest`, in order.
    ///
    /// # Errors
    /// As [`HostStream::send`], except that a full socket takes nothing and is no error.
    fn send_queued(&mut self, _rest: &mut dyn FnMut(&Payload<'_>)) -> io::Result<usize> {
        Ok(0)
    }

    /// Reads bytes that follow the first `offset_bytes` of the receive queue into `into`, leaving
    /// all of them queued. Returns their count; zero at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if nothing follows; anything else ends the stream.
    fn peek(&mut self, offset_bytes: usize, into: PayloadMut<'_>) -> io::Result<usize>;

    /// Removes `len_bytes` already peeked from the front of the receive queue.
    ///
    /// # Errors
    /// Any error ends the stream.
    fn discard(&mut self, len_bytes: usize) -> io::Result<()>;

    /// Room for bytes to send, an estimate on the low side.
    fn send_space(&mut self) -> SendSpace;

    /// Asks for a writable event once there is room again.
    fn want_writable(&mut self);

    /// Sends FIN after what is queued.
    ///
    /// # Errors
    /// Any error ends the stream.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Whether host and peer agreed on explicit congestion notification (RFC 3168, 6.1.1).
    fn uses_ecn(&self) -> bool {
        false
    }

    /// The host's address it comes from; `None` if it does not leave the process.
    fn local_ip(&self) -> Option<IpAddr> {
        None
    }

    /// Whether its client came by this published port, by where the socket is bound.
    fn came_by(&self, _port: &Publish) -> bool {
        false
    }

    /// Closes the socket. Dropping it without this call is a reset.
    fn close(self, how: Close);
}

/// What of the guest's IP header goes with a datagram into the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketFields {
    /// Hops left, at least 1.
    pub ttl: u8,
    /// Differentiated services and ECN (RFC 2474, RFC 3168).
    pub tos: u8,
    /// Whether nobody may fragment it, this host included.
    pub dont_fragment: bool,
    /// The host's address it comes from; whichever suits the route if `None`.
    pub from: Option<IpAddr>,
}

impl Default for PacketFields {
    fn default() -> PacketFields {
        PacketFields { ttl: 64, tos: 0, dont_fragment: false, from: None }
    }
}

/// A datagram socket bound to one local port: UDP, or ICMP echo.
pub trait HostDatagram {
    /// The socket without its worker, to be moved to another one.
    type Detached: Send;

    /// What the datagrams sent from now on have in their IP header; a host without a say in that ignores
    /// it.
    fn set_fields(&mut self, _fields: PacketFields) {}

    /// Takes the socket out of its worker's readiness events; what was queued on it leaves first.
    fn detach(self) -> Self::Detached;

    /// Sends one datagram: `head` from host memory, then `payload`.
    ///
    /// # Errors
    /// `WouldBlock` if the socket is full; the kernel's error for the destination otherwise.
    fn send_to(&mut self, head: &[u8], payload: &Payload<'_>, to: SocketAddr) -> io::Result<()>;

    /// Sends one datagram from guest memory, together with others to the same endpoint where the
    /// kernel can: at the latest at [`HostNet::flush_datagrams`], until which the memory must stay as
    /// it is. What is refused then is counted there, and the datagram after it goes alone.
    ///
    /// # Errors
    /// As [`HostDatagram::send_to`], for a datagram that goes alone.
    fn queue_to(&mut self, payload: &Payload<'_>, to: SocketAddr) -> io::Result<()>;

    /// Sends `payload` as datagrams of `segment_bytes` each but the last (`UDP_SEGMENT`).
    ///
    /// # Errors
    /// As [`HostDatagram::send_to`].
    fn send_segments_to(
        &mut self,
        payload: &Payload<'_>,
        segment_bytes: usize,
        to: SocketAddr,
    ) -> io::Result<()>;

    /// Receives what waits, at most `arrivals_max` arrivals (the socket may bound it further), and hands
    /// each to `each`. Returns whether more may wait.
    ///
    /// # Errors
    /// The socket's pending error; the socket lives on.
    fn recv_batch(&mut self, arrivals_max: usize, each: &mut dyn FnMut(Arrival<'_>)) -> io::Result<bool>;

    /// Takes what the network said about datagrams that left here, at most `errors_max` messages, and
    /// hands each to `each`. Returns whether more may wait. A host that is told nothing has none.
    fn take_errors(&mut self, _errors_max: usize, _each: &mut dyn FnMut(&NetworkError<'_>)) -> bool {
        false
    }
}

/// A datagram, or several of equal size but the last that one sender sent and the kernel coalesced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<'a> {
    /// Who sent them.
    pub from: SocketAddr,
    /// The host's address they were sent to, where the socket has more than one and is told.
    pub to: Option<IpAddr>,
    /// Differentiated services and ECN of their packets (RFC 2474, RFC 3168).
    pub tos: u8,
    /// Their bytes, one after the other.
    pub bytes: &'a [u8],
    /// Length of each but the last; the whole length for a single one.
    pub segment_bytes: usize,
}

/// An ICMP error about a datagram that left through a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkError<'a> {
    /// Where the datagram went.
    pub to: SocketAddr,
    /// Who says so, if that is known.
    pub offender: Option<IpAddr>,
    /// What is said.
    pub message: Message,
    /// What came back of the datagram, perhaps nothing: of UDP the payload, of an echo the ICMP message.
    pub quoted: &'a [u8],
}

/// A published TCP port.
pub trait HostListener {
    /// The stream type accepted.
    type Stream: HostStream;

    /// Takes a waiting connection and watches it under `token`; returns it and the client.
    ///
    /// # Errors
    /// `WouldBlock` if none waits.
    fn accept(&mut self, token: Token) -> io::Result<(Self::Stream, SocketAddr)>;
}

/// Makes sockets towards the world.
pub trait HostNet {
    /// A stream.
    type Stream: HostStream;
    /// A datagram socket.
    type Datagram: HostDatagram;
    /// A listening socket.
    type Listener: HostListener<Stream = Self::Stream>;

    /// Starts a TCP connect to `peer`.
    ///
    /// # Errors
    /// The kernel's immediate refusal (no route, no descriptor, ...).
    fn connect(&mut self, token: Token, peer: SocketAddr) -> io::Result<Self::Stream>;

    /// Takes a stream in that another worker detached; readiness it has is reported.
    ///
    /// # Errors
    /// It cannot be watched.
    fn attach(
        &mut self,
        token: Token,
        detached: <Self::Stream as HostStream>::Detached,
    ) -> io::Result<Self::Stream>;

    /// Takes a datagram socket in that another worker detached; readiness it has is reported.
    ///
    /// # Errors
    /// It cannot be watched.
    fn attach_datagram(
        &mut self,
        token: Token,
        detached: <Self::Datagram as HostDatagram>::Detached,
    ) -> io::Result<Self::Datagram>;

    /// A stream to the process's own DNS service, which speaks DNS over TCP on it.
    ///
    /// # Errors
    /// No descriptor, or the service is gone.
    fn connect_dns(&mut self, token: Token) -> io::Result<Self::Stream>;

    /// A UDP socket on `local`'s address, and on its port if that is free; else, and for port 0, on any, of
    /// the same parity where one is soon found (RFC 4787, REQ-4).
    ///
    /// # Errors
    /// The kernel's refusal, but for a port that is not to be had.
    fn udp(&mut self, token: Token, local: SocketAddr) -> io::Result<Self::Datagram>;

    /// An ICMP echo socket of the family of `family`. The kernel sets and matches the identifier.
    ///
    /// # Errors
    /// `PermissionDenied` where `net.ipv4.ping_group_range` excludes the process.
    fn ping(&mut self, token: Token, family: IpAddr) -> io::Result<Self::Datagram>;

    /// Sends what [`HostDatagram::queue_to`] still holds; returns how many datagrams were refused.
    fn flush_datagrams(&mut self) -> u64;

    /// The largest packet the path to `to` is known to carry, in bytes; `None` where nothing is known.
    fn path_mtu(&mut self, _to: SocketAddr) -> Option<u16> {
        None
    }

    /// Whether `addr` is one of the host's own addresses.
    fn is_own_address(&mut self, addr: IpAddr) -> bool;
}
