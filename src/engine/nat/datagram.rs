//! UDP and ICMP echo: one host socket for each guest endpoint, whatever it talks to.
//!
//! Mapping is endpoint-independent (RFC 4787, REQ-1): all datagrams from one guest address and port
//! leave from one host port. Filtering is address- and port-dependent (REQ-8): only remote endpoints
//! the guest has sent to may answer; each is a *peer* with its own idle time. A published port's
//! socket takes anyone and makes a peer of them. ICMP echo is the same with the identifier as port
//! (RFC 5508, REQ-1 to 3).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hashbrown::HashMap;
use slab::Slab;

use super::TokenKind;
use super::policy;
use crate::engine::core::{Core, Neighbour};
use crate::engine::counters::DropReason;
use crate::engine::emit;
use crate::engine::guest_port::{GuestPort, ReserveError};
use crate::engine::host_net::{HostDatagram, Token};
use crate::engine::lru::Lru;
use crate::engine::timers::TimerSlot;
use crate::frame::{Payload, PayloadMut};
use crate::limits;
use crate::time::Instant;
use crate::wire::icmpv4::{self, Message};
use crate::wire::ipv4::Protocol;
use crate::wire::vnet::VnetHeader;
use crate::wire::{checksum, ethernet, udp};

/// Idle time of a peer that has answered (RFC 4787, REQ-5 recommends five minutes) ...
const IDLE_ANSWERED: Duration = Duration::from_secs(300);
/// ... that has not (its minimum) ...
const IDLE_UNANSWERED: Duration = Duration::from_secs(120);
/// ... on a well-known question-and-answer port (REQ-5a allows less) ...
const IDLE_DNS: Duration = Duration::from_secs(30);
/// ... and of an echo (RFC 5508, REQ-2).
const IDLE_ECHO: Duration = Duration::from_secs(60);

/// What a datagram socket carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// UDP.
    Udp,
    /// ICMP echo; "ports" of the guest's end are identifiers, of the remote end zero.
    Echo,
}

/// Both ends of an exchange as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Protocol.
    pub kind: Kind,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The remote end.
    pub remote: SocketAddr,
}

#[derive(Debug)]
struct Mapping<D> {
    token: Token,
    kind: Kind,
    /// The guest's end; unknown for a published port until a guest is known.
    guest: Option<SocketAddr>,
    published_port: Option<u16>,
    socket: D,
    neighbour: Option<Neighbour>,
    /// The newest peer, which leads to the others.
    newest_peer: Option<usize>,
    starved: bool,
    /// Its turn ended with datagrams waiting.
    again: bool,
    last_active: Instant,
}

#[derive(Debug)]
struct Peer {
    token: Token,
    key: Key,
    real: SocketAddr,
    mapping: usize,
    answered: bool,
    timer: TimerSlot,
    /// Neighbours on the list of its mapping's peers.
    newer: Option<usize>,
    older: Option<usize>,
}

impl Peer {
    fn idle_max(&self) -> Duration {
        match self.key.kind {
            Kind::Echo => IDLE_ECHO,
            Kind::Udp if self.key.remote.port() == 53 => IDLE_DNS,
            Kind::Udp if self.answered => IDLE_ANSWERED,
            Kind::Udp => IDLE_UNANSWERED,
        }
    }
}

/// Whether a socket has more to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pumped {
    Empty,
    More,
    Starved,
}

/// All datagram sockets of an engine.
#[derive(Debug)]
pub struct DatagramTable<D> {
    mappings: Slab<Mapping<D>>,
    by_guest: HashMap<(Kind, SocketAddr), usize, foldhash::quality::RandomState>,
    peers: Slab<Peer>,
    by_key: HashMap<Key, usize, foldhash::quality::RandomState>,
    by_real: HashMap<(usize, SocketAddr), usize, foldhash::quality::RandomState>,
    lru: Lru,
    peer_lru: Lru,
    again: Vec<Token>,
    starved: VecDeque<Token>,
    published: usize,
    generation: u32,
    overflow: Box<[u8]>,
}

impl<D: HostDatagram> Default for DatagramTable<D> {
    fn default() -> DatagramTable<D> {
        DatagramTable {
            mappings: Slab::new(),
            by_guest: HashMap::default(),
            peers: Slab::new(),
            by_key: HashMap::default(),
            by_real: HashMap::default(),
            lru: Lru::default(),
            peer_lru: Lru::default(),
            again: Vec::new(),
            starved: VecDeque::new(),
            published: 0,
            generation: 0,
            overflow: vec![0; 65_536].into_boxed_slice(),
        }
    }
}

impl<D: HostDatagram> DatagramTable<D> {
    /// Sockets in the table; those of published ports, which stay, are not counted.
    pub fn len(&self) -> usize {
        self.mappings.len() - self.published
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the longest idle socket that may be given up was last used.
    pub fn oldest(&self) -> Option<Instant> {
        self.lru.oldest().map(|at| self.mappings[at].last_active)
    }

    /// The token the next socket will have.
    pub fn next_token(&self) -> Token {
        TokenKind::Datagram.token(self.generation.wrapping_add(1), self.mappings.vacant_key())
    }

    fn find(&self, token: Token) -> Option<usize> {
        let at = TokenKind::index(token);
        self.mappings.get(at).filter(|mapping| mapping.token == token).map(|_| at)
    }

    /// Whether this exchange is known.
    pub fn contains(&self, key: &Key) -> bool {
        self.by_key.contains_key(key)
    }

    /// Whether the guest's end has a socket.
    pub fn has_mapping(&self, kind: Kind, guest: SocketAddr) -> bool {
        self.by_guest.contains_key(&(kind, guest))
    }

    /// Adds the socket of a guest's end.
    pub fn insert_mapping(&mut self, core: &mut Core, kind: Kind, guest: SocketAddr, socket: D) {
        let at = self.insert(core, kind, socket);
        self.mappings[at].guest = Some(guest);
        self.by_guest.insert((kind, guest), at);
        self.lru.touch(at);
        core.counters.flows_opened += 1;
    }

    /// Adds the socket of a published UDP port. It lives as long as the table.
    pub fn insert_published(&mut self, core: &Core, guest_port: u16, socket: D) {
        let at = self.insert(core, Kind::Udp, socket);
        self.mappings[at].published_port = Some(guest_port);
        self.published += 1;
    }

    fn insert(&mut self, core: &Core, kind: Kind, socket: D) -> usize {
        let token = self.next_token();
        self.generation = self.generation.wrapping_add(1);
        self.mappings.insert(Mapping {
            token,
            kind,
            guest: None,
            published_port: None,
            socket,
            neighbour: None,
            newest_peer: None,
            starved: false,
            again: false,
            last_active: core.now,
        })
    }

    /// Adds a remote endpoint the guest sends to through its socket.
    pub fn insert_peer(&mut self, core: &mut Core, key: Key, real: SocketAddr) {
        if let Some(&mapping) = self.by_guest.get(&(key.kind, key.guest)) {
            self.add_peer(core, mapping, key, real);
        }
    }

    fn add_peer(&mut self, core: &mut Core, mapping: usize, key: Key, real: SocketAddr) -> usize {
        self.generation = self.generation.wrapping_add(1);
        let token = TokenKind::Peer.token(self.generation, self.peers.vacant_key());
        let older = self.mappings[mapping].newest_peer;
        let timer = TimerSlot::default();
        let peer = Peer { token, key, real, mapping, answered: false, timer, newer: None, older };
        let at = self.peers.insert(peer);
        if let Some(older) = older {
            self.peers[older].newer = Some(at);
        }
        self.mappings[mapping].newest_peer = Some(at);
        self.by_key.insert(key, at);
        self.by_real.insert((mapping, real), at);
        self.refresh(core, at);
        // After the new one is in, so that the one given up may be its own socket's only other.
        if self.peers.len() > limits::DATAGRAM_PEERS_MAX
            && let Some(oldest) = self.peer_lru.oldest()
        {
            self.remove_peer(core, oldest);
        }
        at
    }

    /// A peer was heard or spoken to: its idle time starts again.
    fn refresh(&mut self, core: &mut Core, at: usize) {
        let peer = &mut self.peers[at];
        let deadline = core.now + peer.idle_max();
        core.timers.set(&mut peer.timer, peer.token, deadline);
        self.peer_lru.touch(at);
        let mapping = &mut self.mappings[peer.mapping];
        mapping.last_active = core.now;
        if mapping.published_port.is_none() {
            self.lru.touch(peer.mapping);
        }
    }

    /// Sends a datagram of the guest to a known peer: `head` from host memory, then `payload`.
    ///
    /// # Errors
    /// `NotFound` if the exchange is not known; the socket's error otherwise.
    pub fn send(
        &mut self,
        core: &mut Core,
        key: &Key,
        from: Neighbour,
        head: &[u8],
        payload: &Payload<'_>,
    ) -> io::Result<()> {
        let at = *self.by_key.get(key).ok_or(io::ErrorKind::NotFound)?;
        self.refresh(core, at);
        let peer = &self.peers[at];
        let mapping = &mut self.mappings[peer.mapping];
        mapping.neighbour = Some(from);
        mapping.socket.send_to(head, payload, peer.real)?;
        core.counters.payload_from_guest_bytes += payload.len() as u64;
        Ok(())
    }

    /// A peer's deadline came up.
    pub fn timeout(&mut self, core: &mut Core, token: Token) {
        let at = TokenKind::index(token);
        let Some(peer) = self.peers.get_mut(at).filter(|peer| peer.token == token) else {
            return;
        };
        if core.timers.expired(&mut peer.timer, token, core.now) {
            self.remove_peer(core, at);
        }
    }

    /// Forgets a peer, and its socket if that was the last one and nobody published it.
    fn remove_peer(&mut self, core: &mut Core, at: usize) {
        let mapping = self.forget_peer(core, at);
        if self.mappings[mapping].newest_peer.is_none() && self.mappings[mapping].published_port.is_none() {
            self.remove_mapping(core, mapping);
        }
    }

    /// Takes a peer out of every table; returns its mapping.
    fn forget_peer(&mut self, core: &mut Core, at: usize) -> usize {
        let mut peer = self.peers.remove(at);
        core.timers.clear(&mut peer.timer, peer.token);
        self.peer_lru.remove(at);
        self.by_key.remove(&peer.key);
        self.by_real.remove(&(peer.mapping, peer.real));
        if let Some(older) = peer.older {
            self.peers[older].newer = peer.newer;
        }
        match peer.newer {
            Some(newer) => self.peers[newer].older = peer.older,
            None => self.mappings[peer.mapping].newest_peer = peer.older,
        }
        peer.mapping
    }

    /// Ends a socket with its peers; of a published one only the peers.
    fn remove_mapping(&mut self, core: &mut Core, at: usize) {
        while let Some(peer) = self.mappings[at].newest_peer {
            self.forget_peer(core, peer);
        }
        if self.mappings[at].published_port.is_some() {
            return;
        }
        self.lru.remove(at);
        let mapping = self.mappings.remove(at);
        if let Some(guest) = mapping.guest {
            self.by_guest.remove(&(mapping.kind, guest));
        }
    }

    /// Ends the longest idle socket to make room.
    pub fn evict_oldest(&mut self, core: &mut Core) {
        if let Some(at) = self.lru.oldest() {
            core.counters.flows_evicted += 1;
            self.remove_mapping(core, at);
        }
    }

    /// Ends every exchange; published sockets stay.
    pub fn reset_all(&mut self, core: &mut Core) {
        let all: Vec<usize> = self.mappings.iter().map(|(at, _)| at).collect();
        for at in all {
            self.remove_mapping(core, at);
        }
    }

    /// A socket has datagrams.
    pub fn host_ready(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        // One whose turn is still to come takes it then: a flood is no reason for more turns.
        if let Some(at) = self.find(token)
            && !self.mappings[at].again
        {
            self.take_turn(core, port, token);
        }
    }

    fn take_turn(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        let pumped = self.pump(core, port, token);
        let Some(at) = self.find(token) else { return };
        let mapping = &mut self.mappings[at];
        match pumped {
            Pumped::Empty => {}
            Pumped::More => {
                mapping.again = true;
                self.again.push(token);
            }
            Pumped::Starved => {
                if !std::mem::replace(&mut mapping.starved, true) {
                    self.starved.push_back(token);
                }
            }
        }
    }

    /// Whether sockets have more to give now.
    pub fn has_more(&self) -> bool {
        !self.again.is_empty()
    }

    /// Whether sockets wait for receive buffers.
    pub fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Sockets that used their turn up have another.
    pub fn flush(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        for token in std::mem::take(&mut self.again) {
            if let Some(at) = self.find(token) {
                self.mappings[at].again = false;
                self.take_turn(core, port, token);
            }
        }
    }

    /// The guest posted receive buffers.
    pub fn guest_has_buffers(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        for _ in 0..self.starved.len() {
            let Some(token) = self.starved.pop_front() else { break };
            let Some(at) = self.find(token) else { continue };
            self.mappings[at].starved = false;
            self.host_ready(core, port, token);
            if self.mappings.get(at).is_some_and(|mapping| mapping.starved) {
                break;
            }
        }
    }

    /// Moves datagrams of one socket to the guest.
    fn pump(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) -> Pumped {
        let Some(at) = self.find(token) else {
            return Pumped::Empty;
        };
        if let Some(guest_port) = self.mappings[at].published_port {
            let Some(addr) = core.primary_guest() else {
                return self.drain_unwanted(core, at);
            };
            self.mappings[at].guest = Some(SocketAddr::new(addr, guest_port));
            self.mappings[at].neighbour = core.neighbour(addr);
            if self.mappings[at].neighbour.is_none() {
                core.ask_for(port, addr);
                return self.drain_unwanted(core, at);
            }
        }
        for _ in 0..limits::DATAGRAM_BURST {
            match self.pump_one(core, port, at) {
                Pumped::More => {}
                other => return other,
            }
        }
        Pumped::More
    }

    /// Throws away what comes for a guest that is not there.
    fn drain_unwanted(&mut self, core: &mut Core, at: usize) -> Pumped {
        for _ in 0..limits::DATAGRAM_BURST {
            let mut none = [];
            let nowhere = PayloadMut::from_host(&mut none);
            match self.mappings[at].socket.recv_from(&mut [], nowhere, &mut self.overflow) {
                Ok(_) => core.counters.drop(DropReason::NoFlow),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Pumped::Empty,
                Err(_) => {}
            }
        }
        Pumped::More
    }

    fn pump_one(&mut self, core: &mut Core, port: &mut impl GuestPort, at: usize) -> Pumped {
        let mapping = &mut self.mappings[at];
        let (Some(guest), Some(neighbour)) = (mapping.guest, mapping.neighbour) else {
            return Pumped::Empty;
        };
        let transport_bytes = match mapping.kind {
            Kind::Udp => udp::HEADER_BYTES,
            Kind::Echo => icmpv4::HEADER_BYTES,
        };
        let head_bytes = emit::ip_head_bytes(guest.ip()) + transport_bytes;
        let frame_bytes = ethernet::HEADER_BYTES + usize::from(core.ip_mtu);
        let room = match port.reserve(neighbour.pair, frame_bytes, frame_bytes) {
            Ok(_) => Some(frame_bytes - head_bytes),
            Err(ReserveError::Full | ReserveError::Down) => return Pumped::Starved,
            // No buffers hold a full frame, but perhaps this datagram: by way of host memory.
            Err(ReserveError::TooSmall) => None,
        };
        let mut icmp_head = [0u8; icmpv4::HEADER_BYTES];
        let head_len = if mapping.kind == Kind::Echo { icmpv4::HEADER_BYTES } else { 0 };
        let mut nothing = [];
        let into = match room {
            Some(room) => port.reserved(head_bytes).range(0, room),
            None => PayloadMut::from_host(&mut nothing),
        };
        let received = mapping.socket.recv_from(&mut icmp_head[..head_len], into, &mut self.overflow);
        let (len, real) = match received {
            Ok((len, real)) if len >= head_len => (len - head_len, real),
            outcome => {
                let is_empty = outcome.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
                cancel(port, room);
                return if is_empty { Pumped::Empty } else { Pumped::More };
            }
        };
        let Some(remote) = self.admit(core, at, guest, real) else {
            cancel(port, room);
            core.counters.drop(DropReason::Filtered);
            return Pumped::More;
        };
        let delivery = Delivery { guest, remote, neighbour, head_bytes, room, len };
        match self.mappings[at].kind {
            Kind::Udp => self.deliver_udp(core, port, &delivery),
            Kind::Echo => self.deliver_echo(core, port, &delivery, &icmp_head),
        }
        Pumped::More
    }

    /// The remote end as the guest sees it, if it may send to this socket.
    fn admit(
        &mut self,
        core: &mut Core,
        at: usize,
        guest: SocketAddr,
        real: SocketAddr,
    ) -> Option<SocketAddr> {
        let mapping = &self.mappings[at];
        let real = if mapping.kind == Kind::Echo { SocketAddr::new(real.ip(), 0) } else { real };
        if let Some(&peer) = self.by_real.get(&(at, real)) {
            if self.peers[peer].key.guest == guest {
                self.peers[peer].answered = true;
                self.refresh(core, peer);
                return Some(self.peers[peer].key.remote);
            }
            // The guest behind a published port has another address now.
            self.remove_peer(core, peer);
        }
        self.mappings[at].published_port?;
        let mut key = Key { kind: Kind::Udp, guest, remote: policy::visible(core, real) };
        if self.by_key.contains_key(&key) {
            let taken = |port| {
                self.by_key.contains_key(&Key { remote: SocketAddr::new(key.remote.ip(), port), ..key })
            };
            key.remote = SocketAddr::new(key.remote.ip(), policy::free_port(real.port(), taken)?);
        }
        let peer = self.add_peer(core, at, key, real);
        Some(self.peers[peer].key.remote)
    }

    fn deliver_udp(&mut self, core: &mut Core, port: &mut impl GuestPort, to: &Delivery) {
        let ident = core.next_ident();
        core.counters.payload_to_guest_bytes += to.len as u64;
        if to.fits() {
            let partial = port.offloads().checksum;
            let head = {
                let data = port.reserved(to.head_bytes).range(0, to.len);
                emit::udp(to.neighbour.mac, to.remote, to.guest, &data.as_payload(), ident, partial)
            };
            return to.commit(core, port, head);
        }
        let mut transport = vec![0u8; udp::HEADER_BYTES + to.len];
        let total = transport.len();
        let header = udp::Header {
            src_port: to.remote.port(),
            dst_port: to.guest.port(),
            len_bytes: total,
            checksum: 0,
        };
        header.emit(&mut transport);
        to.take_back(port, &self.overflow, &mut transport[udp::HEADER_BYTES..]);
        let mut sum = checksum::pseudo_header(to.remote.ip(), to.guest.ip(), Protocol::UDP, total);
        sum.add_bytes(&transport);
        let at = udp::CHECKSUM_OFFSET;
        transport[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
        to.send_fragments(core, port, Protocol::UDP, ident, &transport);
    }

    fn deliver_echo(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        to: &Delivery,
        received: &[u8; icmpv4::HEADER_BYTES],
    ) {
        let Ok(Message::EchoReply { seq, .. }) = Message::parse(received) else {
            cancel(port, to.room);
            return core.counters.drop(DropReason::Malformed);
        };
        let reply = Message::EchoReply { ident: to.guest.port(), seq };
        let ident = core.next_ident();
        core.counters.payload_to_guest_bytes += to.len as u64;
        if to.fits() {
            let head = {
                let data = port.reserved(to.head_bytes).range(0, to.len);
                emit::icmp(to.neighbour.mac, to.remote.ip(), to.guest.ip(), reply, &data.as_payload(), ident)
            };
            return to.commit(core, port, head);
        }
        let mut data = vec![0u8; to.len];
        to.take_back(port, &self.overflow, &mut data);
        let mut transport = vec![0u8; icmpv4::HEADER_BYTES + to.len];
        reply.emit_with_payload(&data, &mut transport);
        to.send_fragments(core, port, Protocol::ICMP, ident, &transport);
    }
}

/// A datagram received and on its way to the guest.
struct Delivery {
    guest: SocketAddr,
    remote: SocketAddr,
    neighbour: Neighbour,
    head_bytes: usize,
    /// Payload bytes that fit the reservation; `None` without one.
    room: Option<usize>,
    /// Payload bytes received.
    len: usize,
}

/// Ends the reservation there is where there is `room`.
fn cancel(port: &mut impl GuestPort, room: Option<usize>) {
    if room.is_some() {
        port.cancel();
    }
}

impl Delivery {
    /// Whether the payload lies in the reservation, whole.
    fn fits(&self) -> bool {
        self.room.is_some_and(|room| self.len <= room)
    }

    fn commit(&self, core: &mut Core, port: &mut impl GuestPort, head: Option<emit::Head>) {
        match head {
            Some(head) => {
                port.commit(head.vnet, head.bytes(), self.head_bytes + self.len);
                core.counters.frames_to_guest += 1;
            }
            None => port.cancel(),
        }
    }

    /// Gathers the payload from the reservation and the overflow; ends the reservation.
    fn take_back(&self, port: &mut impl GuestPort, overflow: &[u8], out: &mut [u8]) {
        let inside = self.room.unwrap_or(0).min(out.len());
        if self.room.is_some() {
            port.reserved(self.head_bytes).range(0, inside).as_payload().copy_to(&mut out[..inside]);
            port.cancel();
        }
        let rest = out.len() - inside;
        out[inside..].copy_from_slice(&overflow[..rest]);
    }

    fn send_fragments(
        &self,
        core: &mut Core,
        port: &mut impl GuestPort,
        protocol: Protocol,
        ident: u16,
        transport: &[u8],
    ) {
        let packet = emit::HostPacket {
            guest_mac: self.neighbour.mac,
            from: self.remote.ip(),
            to: self.guest.ip(),
            protocol,
            transport,
        };
        packet.for_each_frame(ident, core.ip_mtu, |frame| {
            core.send(port, self.neighbour.pair, VnetHeader::default(), frame);
        });
    }
}
