//! What routers and hosts say about the guest's datagrams (ICMP errors), told to the guest.
//!
//! The kernel hands an error over only if it quotes a datagram that a socket of ours can have sent; here it
//! must name a remote endpoint of the socket's as well (RFC 5508, REQ-4). The guest gets the type and code
//! as they came, from whoever said so, with its own packet quoted: its addresses, ports and identifier
//! instead of the host's (REQ-4a to c). The host's socket does not give the original IP header away: what it
//! said of length and identification is remembered of the last packet to that endpoint. An error neither
//! refreshes nor ends anything (RFC 5508, REQ-6; RFC 4787, REQ-12).
//!
//! The other way there is one: a guest's "port unreachable" ends the exchange it names. The world hears of it
//! once the socket is gone, from the host's own kernel.
//!
//! Read first: RFC 792, RFC 5508 (section 4), RFC 1812 (5.3.2, 4.3.2), ip(7) on `IP_RECVERR`.

use std::net::{IpAddr, SocketAddr};

use super::{DatagramTable, Key, Kind, Peer};
use crate::engine::core::{Core, Neighbour};
use crate::engine::counters::DropReason;
use crate::engine::emit;
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::{HostDatagram, NetworkError, Token};
use crate::engine::nat::policy;
use crate::limits;
use crate::wire::icmpv4::{self, Message};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::{checksum, udp};

/// Where an echo request's checksum and identifier stand in its message, in bytes.
const ECHO_CHECKSUM: std::ops::Range<usize> = 2..4;
const ECHO_IDENT: std::ops::Range<usize> = 4..6;

impl<D: HostDatagram> DatagramTable<D> {
    /// Tells the guest what the network said of its datagrams on this socket, as much as one turn allows.
    pub(super) fn tell_errors(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        let Some(at) = self.find(token).filter(|at| self.mappings[*at].failed) else { return };
        let Some(mut socket) = self.mappings[at].socket.take() else { return };
        let more = socket.take_errors(limits::DATAGRAM_ERRORS, &mut |error| self.tell(core, port, at, error));
        self.mappings[at].socket = Some(socket);
        self.mappings[at].failed = more;
    }

    /// The guest answered a datagram of this exchange with "port unreachable": the exchange is over, and its
    /// socket with it unless others go on there or the port is published. False where nothing was delivered
    /// that could be refused.
    pub fn refused_by_guest(&mut self, core: &mut Core, key: &Key) -> bool {
        match self.by_key.get(key) {
            Some(&peer) if self.peers[peer].answered || self.peers[peer].stranger => {
                self.remove_peer(core, peer);
                true
            }
            _ => false,
        }
    }

    fn tell(&self, core: &mut Core, port: &mut impl GuestPort, at: usize, error: &NetworkError<'_>) {
        let mapping = &self.mappings[at];
        let real = mapping.kind.endpoint(error.to);
        let Some(peer) = self.by_real.get(&(at, real)).map(|peer| &self.peers[*peer]) else {
            return core.counters.drop(DropReason::Filtered);
        };
        if !is_for_the_guest(error.message) {
            return core.counters.drop(DropReason::Unsupported);
        }
        let guest = peer.key.guest;
        let Some(known) = core.neighbour(guest.ip()).or(mapping.neighbour) else { return };
        let pair = mapping.neighbour.map_or(known.pair, |neighbour| neighbour.pair);
        let Some(quote) = quote(peer, error.quoted) else {
            return core.counters.drop(DropReason::Malformed);
        };
        let from = said_by(core, peer, error.offender);
        let to = Neighbour { pair, ..known };
        core.relay_icmp_error(port, to, (from, guest.ip()), error.message, &quote);
    }
}

impl Kind {
    /// The endpoint of the remote host `addr` as exchanges know it: an echo's has no port.
    pub(super) fn endpoint(self, addr: SocketAddr) -> SocketAddr {
        match self {
            Kind::Udp => addr,
            Kind::Echo => SocketAddr::new(addr.ip(), 0),
        }
    }
}

/// Whether a message concerns what the guest chose. A parameter problem is one of the header this host
/// made, a redirect one of its routes.
fn is_for_the_guest(message: Message) -> bool {
    matches!(message, Message::Unreachable { .. } | Message::TimeExceeded { .. })
}

/// The address an error comes from, as the guest sees addresses; the gateway for an unknown offender.
fn said_by(core: &Core, peer: &Peer, offender: Option<IpAddr>) -> IpAddr {
    match offender {
        Some(addr) if addr == peer.real.ip() => peer.key.remote.ip(),
        Some(addr) => policy::visible(core, SocketAddr::new(addr, 0)).ip(),
        None => core.gateway(),
    }
}

/// The guest's packet as it may have been, with what came back of it; `None` where that is too little.
fn quote(peer: &Peer, returned: &[u8]) -> Option<Vec<u8>> {
    let (SocketAddr::V4(guest), SocketAddr::V4(remote)) = (peer.key.guest, peer.key.remote) else {
        return None;
    };
    let (protocol, transport) = match peer.key.kind {
        Kind::Udp => (Protocol::UDP, udp_quote(peer, returned)),
        Kind::Echo => (Protocol::ICMP, echo_quote(guest.port(), returned)?),
    };
    let payload_bytes = match peer.key.kind {
        Kind::Udp => udp::HEADER_BYTES + peer.sent.len_bytes.max(returned.len()),
        Kind::Echo => peer.sent.len_bytes.max(returned.len()),
    };
    let header = ipv4::Header {
        src: *guest.ip(),
        dst: *remote.ip(),
        protocol,
        ttl: 1,
        tos: peer.sent.fields.tos,
        ident: peer.sent.ident,
        dont_fragment: peer.sent.fields.dont_fragment,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: payload_bytes.min(ipv4::PACKET_BYTES_MAX - ipv4::HEADER_BYTES),
    };
    let mut packet = vec![0u8; ipv4::HEADER_BYTES];
    header.emit(&mut packet);
    packet.extend_from_slice(&transport);
    packet.truncate(emit::ICMP_QUOTE_BYTES_MAX);
    Some(packet)
}

/// The guest's UDP header and the payload that came back. The checksum stands where it can be known: over a
/// datagram that came back whole.
fn udp_quote(peer: &Peer, returned: &[u8]) -> Vec<u8> {
    let (guest, remote) = (peer.key.guest, peer.key.remote);
    let len_bytes = udp::HEADER_BYTES + peer.sent.len_bytes.max(returned.len());
    let mut message = vec![0u8; udp::HEADER_BYTES];
    udp::Header { src_port: guest.port(), dst_port: remote.port(), len_bytes, checksum: 0 }
        .emit(&mut message);
    message.extend_from_slice(returned);
    if message.len() == len_bytes {
        let mut sum = checksum::pseudo_header(guest.ip(), remote.ip(), Protocol::UDP, len_bytes);
        sum.add_bytes(&message);
        let at = udp::CHECKSUM_OFFSET;
        message[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
    }
    message
}

/// The echo request that came back, under the guest's identifier instead of the kernel's.
fn echo_quote(ident: u16, returned: &[u8]) -> Option<Vec<u8>> {
    let Ok(Message::EchoRequest { ident: own, .. }) = Message::parse(returned) else { return None };
    let mut message = returned.to_vec();
    debug_assert!(message.len() >= icmpv4::HEADER_BYTES, "it was parsed");
    let sum = u16::from_be_bytes([message[2], message[3]]);
    message[ECHO_CHECKSUM].copy_from_slice(&checksum::update(sum, own, ident).to_be_bytes());
    message[ECHO_IDENT].copy_from_slice(&ident.to_be_bytes());
    Some(message)
}
