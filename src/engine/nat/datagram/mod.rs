//! UDP and ICMP echo: one host socket for each guest endpoint, whatever it talks to.
//!
//! Mapping is endpoint-independent (RFC 4787, REQ-1): all datagrams from one guest address and port
//! leave from one host port. Filtering is address- and port-dependent (REQ-8): only remote endpoints
//! the guest has sent to may answer; each is a *peer* with its own idle time. A published port's
//! socket takes anyone and makes a peer of them. ICMP echo is the same with the identifier as port
//! (RFC 5508, REQ-1 to 3).

mod delivery;
mod errors;
mod filtering;
mod limited;
mod listing;
mod peers;
mod turns;

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hashbrown::HashMap;
use slab::Slab;

use super::{Datagram, TokenKind, policy};
use crate::addr::MacAddr;
use crate::config::{Publish, UdpConfig, UdpMapping};
use crate::engine::core::{Core, Neighbour, Owner};
use crate::engine::flows::Carried;
use crate::engine::host_net::{HostDatagram, PacketFields, Token};
use crate::engine::lru::Lru;
use crate::engine::placement::Place;
use crate::engine::timers::TimerSlot;
use crate::limits;
use crate::rate_limit::Sender;
use crate::time::Instant;

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

/// What one socket serves: a guest's end, with endpoint-dependent mapping towards one remote end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestEnd {
    /// Protocol.
    pub kind: Kind,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The one remote end it sends to, as the guest sees it; `None` for whatever there is.
    pub remote: Option<SocketAddr>,
}

/// A socket on its way between workers, with its remote endpoints. `D` is the socket without its worker.
#[derive(Debug)]
pub struct Moved<D> {
    end: GuestEnd,
    socket: D,
    mac: Option<MacAddr>,
    /// Oldest first.
    peers: Vec<MovedPeer>,
}

#[derive(Debug)]
struct MovedPeer {
    key: Key,
    real: SocketAddr,
    answered: bool,
    spoken: bool,
    stranger: bool,
    sent: Sent,
    carried: Carried,
}

impl<D> Moved<D> {
    /// The guest's end.
    pub fn end(&self) -> GuestEnd {
        self.end
    }
}

#[derive(Debug)]
struct Mapping<D> {
    token: Token,
    kind: Kind,
    /// The guest's end; unknown for a published port until a guest is known.
    guest: Option<SocketAddr>,
    /// What it serves; a published port serves whoever comes.
    end: Option<GuestEnd>,
    published_port: Option<u16>,
    /// Whom a published port leads to.
    owner: Owner,
    /// Away only while it is being read.
    socket: Option<D>,
    /// Most datagrams in one arrival of the last batch.
    coalesced: usize,
    neighbour: Option<Neighbour>,
    /// The newest peer, which leads to the others.
    newest_peer: Option<usize>,
    /// Peers that are no strangers.
    spoken_to: usize,
    starved: bool,
    /// It waits in line for the limit.
    limited: bool,
    /// Its turn ended with datagrams waiting.
    again: bool,
    /// The network may have said something about what it sent.
    failed: bool,
    /// Turns in a row in which every reading failed.
    failed_turns: u8,
    last_active: Instant,
}

/// What is remembered of a packet the guest sent, for errors that come back about it.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    /// The IP header's identification.
    ident: u16,
    fields: PacketFields,
    /// The UDP payload or ICMP message, in bytes.
    len_bytes: usize,
}

#[derive(Debug)]
struct Peer {
    token: Token,
    key: Key,
    real: SocketAddr,
    mapping: usize,
    answered: bool,
    /// The guest has sent to it before.
    spoken: bool,
    /// It sent before the guest did.
    stranger: bool,
    /// What the guest sent to it last.
    sent: Sent,
    carried: Carried,
    /// The host's address it sends to, which answers come from.
    local: Option<IpAddr>,
    timer: TimerSlot,
    /// What of the limit it used of late.
    sender: Sender,
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

/// A remote endpoint in the table, as long as nothing was removed from it.
#[derive(Clone, Copy, Debug)]
pub struct PeerId(usize);

/// All datagram sockets of an engine.
#[derive(Debug)]
pub struct DatagramTable<D> {
    rules: UdpConfig,
    mappings: Slab<Mapping<D>>,
    by_guest: HashMap<GuestEnd, usize, foldhash::quality::RandomState>,
    /// Sockets of ports published on all addresses, by the guest and its port; the first of several.
    by_published: HashMap<(Owner, u16), usize, foldhash::quality::RandomState>,
    peers: Slab<Peer>,
    by_key: HashMap<Key, usize, foldhash::quality::RandomState>,
    by_real: HashMap<(usize, SocketAddr), usize, foldhash::quality::RandomState>,
    lru: Lru,
    /// Remote endpoints the guest sent to, by their last use ...
    peer_lru: Lru,
    /// ... and strangers, who sent before it did.
    stranger_lru: Lru,
    strangers: usize,
    /// Remote endpoints the guest sent to, by socket and address; counted for address-dependent filtering.
    spoken_to: HashMap<(usize, IpAddr), usize, foldhash::quality::RandomState>,
    again: Vec<Token>,
    starved: VecDeque<Token>,
    /// Published ports, by their sockets.
    published: HashMap<usize, Publish, foldhash::quality::RandomState>,
    generation: u32,
}

impl<D: HostDatagram> DatagramTable<D> {
    /// No sockets yet; UDP is translated as `rules` say.
    pub fn new(rules: UdpConfig) -> DatagramTable<D> {
        DatagramTable {
            rules,
            mappings: Slab::new(),
            by_guest: HashMap::default(),
            by_published: HashMap::default(),
            peers: Slab::new(),
            by_key: HashMap::default(),
            by_real: HashMap::default(),
            lru: Lru::default(),
            peer_lru: Lru::default(),
            stranger_lru: Lru::default(),
            strangers: 0,
            spoken_to: HashMap::default(),
            again: Vec::new(),
            starved: VecDeque::new(),
            published: HashMap::default(),
            generation: 0,
        }
    }

    /// Sockets in the table; those of published ports, which stay, are not counted.
    pub fn len(&self) -> usize {
        self.mappings.len() - self.published.len()
    }

    /// Sockets that carry something: those of published ports too, if anybody uses them.
    pub fn used(&self) -> usize {
        let published =
            |mapping: &Mapping<D>| mapping.published_port.is_some() && mapping.newest_peer.is_some();
        self.len() + self.mappings.iter().filter(|(_, mapping)| published(mapping)).count()
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

    /// This exchange's remote endpoint, if it is known.
    pub fn peer(&self, key: &Key) -> Option<PeerId> {
        self.by_key.get(key).copied().map(PeerId)
    }

    /// Where datagrams to a remote endpoint really go.
    pub fn real(&self, PeerId(at): PeerId) -> SocketAddr {
        self.peers[at].real
    }

    /// What the socket of an exchange serves (RFC 4787, 4.1; of echoes always all remote ends).
    pub fn end_of(&self, key: &Key) -> GuestEnd {
        let is_shared = key.kind == Kind::Echo || self.rules.mapping == UdpMapping::EndpointIndependent;
        GuestEnd { kind: key.kind, guest: key.guest, remote: (!is_shared).then_some(key.remote) }
    }

    /// Whether the guest's end has a socket of its own.
    pub fn has_mapping(&self, end: &GuestEnd) -> bool {
        self.by_guest.contains_key(end)
    }

    /// Whether a socket serves the guest's end: its own, or that of its published port.
    pub fn is_served(&self, core: &Core, end: &GuestEnd) -> bool {
        self.mapping_of(core, end).is_some()
    }

    /// The socket of the guest's end: its own, or with endpoint-independent mapping that of its published
    /// port.
    fn mapping_of(&self, core: &Core, end: &GuestEnd) -> Option<usize> {
        let own = self.by_guest.get(end).copied();
        if own.is_some() || end.kind != Kind::Udp || end.remote.is_some() {
            return own;
        }
        let of_owner = |owner| self.by_published.get(&(owner, end.guest.port())).copied();
        core.owners_at(end.guest.ip()).find_map(of_owner)
    }

    /// Adds the socket of a guest's end.
    pub fn insert_mapping(&mut self, core: &mut Core, end: GuestEnd, socket: D) {
        let at = self.insert(core, end.kind, socket);
        self.serve(at, end);
        core.claim(Place::Socket(end));
        core.counters.flows_opened += 1;
    }

    fn serve(&mut self, at: usize, end: GuestEnd) {
        self.mappings[at].guest = Some(end.guest);
        self.mappings[at].end = Some(end);
        self.by_guest.insert(end, at);
        self.lru.touch(at);
    }

    /// Published ports' sockets.
    pub fn published(&self) -> usize {
        self.published.len()
    }

    /// Ports that are published to a guest of `owner`.
    pub fn published_of(&self, owner: Owner) -> impl Iterator<Item = Publish> {
        self.published.iter().filter(move |(at, _)| self.mappings[**at].owner == owner).map(|(_, port)| *port)
    }

    /// Adds the socket of a published UDP port, which leads to a guest of `owner`. It lives as long as the
    /// table, or until the port is closed. What the guest sends from there by itself leaves through it if it is on
    /// all addresses of the host.
    pub fn insert_published(&mut self, core: &Core, owner: Owner, port: Publish, socket: D) {
        let at = self.insert(core, Kind::Udp, socket);
        self.mappings[at].published_port = Some(port.guest_port);
        self.mappings[at].owner = owner;
        if policy::is_udp_everywhere(&port) {
            self.by_published.entry((owner, port.guest_port)).or_insert(at);
        }
        self.published.insert(at, port);
    }

    /// Closes the socket of a published port of `owner`, with its exchanges, if there is one.
    pub fn unpublish(&mut self, core: &mut Core, owner: Owner, port: &Publish) {
        let is_it = |(at, known): &(&usize, &Publish)| *known == port && self.mappings[**at].owner == owner;
        let Some(at) = self.published.iter().find(is_it).map(|(at, _)| *at) else { return };
        while let Some(peer) = self.mappings[at].newest_peer {
            self.forget_peer(core, peer);
        }
        // Others may have the socket open still, so that it would not be forgotten by itself.
        if let Some(socket) = self.mappings.remove(at).socket {
            drop(socket.detach());
        }
        self.published.remove(&at);
        let end = (owner, port.guest_port);
        if self.by_published.get(&end) == Some(&at) {
            self.by_published.remove(&end);
            let serves = |(at, other): &(&usize, &Publish)| {
                other.guest_port == port.guest_port
                    && policy::is_udp_everywhere(other)
                    && self.mappings[**at].owner == owner
            };
            if let Some((at, _)) = self.published.iter().find(serves) {
                self.by_published.insert(end, *at);
            }
        }
    }

    fn insert(&mut self, core: &Core, kind: Kind, socket: D) -> usize {
        self.forget_gone_turns();
        let token = self.next_token();
        self.generation = self.generation.wrapping_add(1);
        self.mappings.insert(Mapping {
            token,
            kind,
            guest: None,
            end: None,
            published_port: None,
            owner: Owner::TheGuest,
            socket: Some(socket),
            coalesced: 1,
            neighbour: None,
            newest_peer: None,
            spoken_to: 0,
            starved: false,
            limited: false,
            again: false,
            failed: false,
            failed_turns: 0,
            last_active: core.now,
        })
    }

    /// Sends a datagram of the guest to a known peer; with UDP segmentation offload as several.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&mut self, core: &mut Core, PeerId(at): PeerId, datagram: &Datagram<'_>) -> io::Result<()> {
        let Datagram { from, head, payload, gso_bytes, ident, fields, .. } = *datagram;
        self.speak(core, at);
        let peer = &mut self.peers[at];
        let len_bytes = gso_bytes.unwrap_or(usize::MAX).min(head.len() + payload.len());
        peer.sent = Sent { ident, fields, len_bytes };
        let mapping = &mut self.mappings[peer.mapping];
        mapping.neighbour = Some(from);
        let Some(socket) = mapping.socket.as_mut() else { return Ok(()) };
        socket.set_fields(PacketFields { from: peer.local, ..fields });
        match (peer.key.kind, gso_bytes) {
            (Kind::Udp, Some(segment_bytes)) => {
                socket.send_segments_to(&payload, segment_bytes, peer.real)?;
            }
            // The first of an exchange goes alone, so that its error can be told to the guest.
            (Kind::Udp, None) if std::mem::replace(&mut peer.spoken, true) => {
                socket.queue_to(&payload, peer.real)?;
            }
            _ => socket.send_to(head, &payload, peer.real)?,
        }
        core.counters.payload_from_guest_bytes += payload.len() as u64;
        peer.carried.from_guest_bytes += payload.len() as u64;
        Ok(())
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
        if let Some(end) = mapping.end {
            self.by_guest.remove(&end);
            core.release(&Place::Socket(end));
        }
    }

    /// Takes the socket of a guest's end out, for another worker; `None` if there is none that moves.
    pub fn detach(&mut self, core: &mut Core, end: &GuestEnd) -> Option<Moved<D::Detached>> {
        let at = *self.by_guest.get(end)?;
        let mut peers = Vec::new();
        let mut next = self.mappings[at].newest_peer;
        while let Some(peer) = next.map(|peer| &self.peers[peer]) {
            let Peer { key, real, answered, spoken, stranger, sent, carried, older, .. } = *peer;
            peers.push(MovedPeer { key, real, answered, spoken, stranger, sent, carried });
            if peers.len() > limits::MOVED_PEERS_MAX {
                return None;
            }
            next = older;
        }
        peers.reverse();
        let socket = self.mappings[at].socket.take()?;
        while let Some(peer) = self.mappings[at].newest_peer {
            self.take_peer(core, peer);
        }
        self.lru.remove(at);
        self.by_guest.remove(end);
        let mapping = self.mappings.remove(at);
        let mac = mapping.neighbour.map(|neighbour| neighbour.mac);
        Some(Moved { end: *end, socket: socket.detach(), mac, peers })
    }

    /// Takes a socket in that another worker had; it is watched through `attach`. Its remote endpoints'
    /// idle times begin anew.
    pub fn attach(
        &mut self,
        core: &mut Core,
        moved: Moved<D::Detached>,
        attach: impl FnOnce(Token, D::Detached) -> io::Result<D>,
    ) {
        let Moved { end, socket, mac, peers } = moved;
        let Ok(socket) = attach(self.next_token(), socket) else {
            // The guest's next datagram opens another.
            for peer in &peers {
                Self::note_flow(core, false, &peer.key, peer.carried);
            }
            return core.release(&Place::Socket(end));
        };
        let at = self.insert(core, end.kind, socket);
        self.serve(at, end);
        self.mappings[at].neighbour = mac.map(|mac| Neighbour { mac, pair: core.first_pair() });
        for MovedPeer { key, real, answered, spoken, stranger, sent, carried } in peers {
            let at = self.place_peer(core, at, key, real, stranger);
            let peer = &mut self.peers[at];
            (peer.answered, peer.spoken, peer.sent, peer.carried) = (answered, spoken, sent, carried);
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

    /// Closes the sockets of the guest's address `addr`; those of published ports stay.
    pub fn reset_address(&mut self, core: &mut Core, addr: IpAddr) {
        let of_it = |mapping: &Mapping<D>| mapping.guest.is_some_and(|guest| guest.ip() == addr);
        let own = |mapping: &Mapping<D>| of_it(mapping) && mapping.published_port.is_none();
        let ends: Vec<usize> =
            self.mappings.iter().filter(|(_, mapping)| own(mapping)).map(|(at, _)| at).collect();
        for at in ends {
            self.remove_mapping(core, at);
        }
    }
}
