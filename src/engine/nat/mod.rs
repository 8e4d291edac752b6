//! Translation to host sockets: flows of the guest spliced to connections of this process.
//!
//! `tcp` and `datagram` hold the flows; `policy` says where they may go. Both tables share one bound,
//! derived from the descriptors the process may open; beyond it the longest idle flow ends.

pub mod datagram;
pub mod policy;
pub mod tcp;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use slab::Slab;

use self::datagram::{DatagramTable, GuestEnd, Kind, PeerId};
use self::policy::{Policy, Verdict};
use self::tcp::{Segment, TcpTable};
use super::core::{Core, Neighbour, Owner};
use super::counters::DropReason;
use super::flows::{Ended, FlowId, Walk};
use super::guest_port::GuestPort;
use super::host_net::{HostDatagram, HostListener, HostNet, HostStream, PacketFields, Readiness, Token};
use super::placement::{Place, WorkerId};
use super::timers::TimerSlot;
use crate::config::{IpMtu, Protocol, Publish, UdpConfig};
use crate::frame::Payload;
use crate::limits;
use crate::time::Instant;
use crate::wire::icmpv4::{Message, UnreachableCode};
use crate::wire::tcp::{Flags, SeqNumber};

/// Port of DNS.
pub const DNS_PORT: u16 = 53;

/// What a token names: kind, generation and slot in 8, 24 and 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TokenKind {
    /// A TCP flow.
    Tcp = 1,
    /// A datagram socket.
    Datagram = 2,
    /// A remote endpoint of one.
    Peer = 3,
    /// A published TCP port.
    Listener = 4,
}

impl TokenKind {
    /// The token of slot `index` in its `generation`.
    pub fn token(self, generation: u32, index: usize) -> Token {
        Token(
            ((self as u64) << 56) | (u64::from(generation & 0xff_ffff) << 32) | (index as u64 & 0xffff_ffff),
        )
    }

    /// The kind a token names.
    pub fn of(token: Token) -> Option<TokenKind> {
        match token.0 >> 56 {
            1 => Some(TokenKind::Tcp),
            2 => Some(TokenKind::Datagram),
            3 => Some(TokenKind::Peer),
            4 => Some(TokenKind::Listener),
            _ => None,
        }
    }

    /// The slot a token names.
    pub fn index(token: Token) -> usize {
        (token.0 & 0xffff_ffff) as usize
    }
}

/// A flow on its way between workers with sockets of `N`.
pub type MovedFlow<N> = tcp::Moved<<<N as HostNet>::Stream as HostStream>::Detached>;

/// A datagram socket on its way between workers with sockets of `N`.
pub type MovedSocket<N> = datagram::Moved<<<N as HostNet>::Datagram as HostDatagram>::Detached>;

/// The other worker that has a datagram's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// It stays there: a published port's.
    Stays(WorkerId),
    /// It may be asked for.
    Moves(WorkerId),
}

struct Published<L> {
    listener: L,
    owner: Owner,
    /// Where it is bound, and where it leads.
    port: Publish,
    /// When clients that could not be taken are tried again: the socket tells of each once.
    again: TimerSlot,
}

/// All flows of an engine.
pub struct Nat<N: HostNet> {
    net: N,
    policy: Policy,
    flows_max: usize,
    tcp: TcpTable<N::Stream>,
    datagrams: DatagramTable<N::Datagram>,
    listeners: Slab<Published<N::Listener>>,
    /// Listeners whose turn ended with clients waiting.
    accept_again: Vec<usize>,
    /// Published ports that `flows_max` knows of; others came later.
    published_at_start: usize,
    dns: bool,
}

/// A datagram of the guest, parsed.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Both ends.
    pub key: datagram::Key,
    /// Who sent it.
    pub from: Neighbour,
    /// Bytes to send before the payload (an ICMP header; nothing for UDP).
    pub head: &'a [u8],
    /// Payload in guest memory.
    pub payload: Payload<'a>,
    /// With UDP segmentation offload: length of each datagram in the payload but the last.
    pub gso_bytes: Option<usize>,
    /// The packet's identification.
    pub ident: u16,
    /// What goes with it into the world.
    pub fields: PacketFields,
    /// The packet's first bytes, to quote in errors.
    pub packet: &'a [u8],
}

impl<N: HostNet> Nat<N> {
    /// No flows yet. UDP is translated as `udp` says; `flows_max` bounds both tables together; `dns` says
    /// whether the gateway's port 53 answers.
    pub fn new(
        net: N,
        policy: Policy,
        udp: UdpConfig,
        flows_max: usize,
        isn_secret: (u64, u64),
        dns: bool,
    ) -> Nat<N> {
        Nat {
            net,
            published_at_start: policy.published.len(),
            policy,
            flows_max: flows_max.clamp(1, limits::FLOWS_MAX),
            tcp: TcpTable::new(flows_max, isn_secret),
            datagrams: DatagramTable::new(udp),
            listeners: Slab::new(),
            accept_again: Vec::new(),
            dns,
        }
    }

    /// Flows and sockets in the tables; those of published ports, which stay, are not counted.
    pub fn len(&self) -> usize {
        self.tcp.len() + self.datagrams.len()
    }

    /// Flows, and sockets that carry something, those of published ports too.
    pub fn used(&self) -> usize {
        self.tcp.len() + self.datagrams.used()
    }

    /// Shows flows to a walk.
    pub fn list_flows(&self, walk: &mut Walk<'_>) {
        self.tcp.list(walk);
        self.datagrams.list(walk);
    }

    /// Ends a TCP flow; both sides see RST. False if there is none of this name.
    pub fn end_stream(&mut self, core: &mut Core, port: &mut impl GuestPort, id: FlowId) -> bool {
        self.tcp.end(core, port, id)
    }

    /// Ends an exchange of datagrams. False if there is none of this name.
    pub fn end_exchange(&mut self, core: &mut Core, id: FlowId) -> bool {
        self.datagrams.end(core, id)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Payload of guests' segments held because it came out of order or a socket refused it, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.tcp.held_bytes()
    }

    /// Places in line for receive buffers, some of them of flows and sockets that are gone.
    pub fn waiting_len(&self) -> usize {
        self.tcp.waiting_len() + self.datagrams.waiting_len()
    }

    /// The host's side, for what a test has to see of it.
    pub fn net(&mut self) -> &mut N {
        &mut self.net
    }

    /// The token the next published TCP port will have.
    pub fn next_listener_token(&self) -> Token {
        TokenKind::Listener.token(0, self.listeners.vacant_key())
    }

    /// This end of the host leads back to a guest, by this worker or another.
    pub fn note_published(&mut self, port: Publish) {
        self.policy.published.add(port);
    }

    /// Publishes a listening socket, bound as `port` says, to a guest of `owner`.
    pub fn publish_tcp(&mut self, owner: Owner, port: Publish, listener: N::Listener) {
        self.note_published(port);
        self.listeners.insert(Published { listener, owner, port, again: TimerSlot::default() });
    }

    /// Publishes a UDP socket, bound as `port` says, to a guest of `owner`.
    pub fn publish_udp(&mut self, core: &Core, owner: Owner, port: Publish, socket: N::Datagram) {
        self.note_published(port);
        self.datagrams.insert_published(core, owner, port, socket);
    }

    /// Closes all published ports of `owner`; their datagram exchanges end, their connections do not.
    pub fn unpublish_all(&mut self, core: &mut Core, owner: Owner) {
        let of_it = |published: &Published<N::Listener>| published.owner == owner;
        let tcp = self.listeners.iter().filter(|(_, published)| of_it(published));
        let mut ports: Vec<Publish> = tcp.map(|(_, published)| published.port).collect();
        ports.extend(self.datagrams.published_of(owner));
        for port in ports {
            self.unpublish(core, owner, &port);
        }
    }

    /// Closes one published port of `owner`, if this worker has its socket; nobody takes it for one any more. Its
    /// datagram exchanges end, its connections do not.
    pub fn unpublish(&mut self, core: &mut Core, owner: Owner, port: &Publish) {
        self.policy.published.remove(port);
        let is_it = |published: &Published<N::Listener>| published.owner == owner && published.port == *port;
        if let Some((at, _)) = self.listeners.iter().find(|(_, published)| is_it(published)) {
            let mut published = self.listeners.remove(at);
            core.timers.clear(&mut published.again);
        }
        self.datagrams.unpublish(core, owner, port);
    }

    /// Resets connections of clients that came by a published port, both ways, from the place `first` of the table on.
    pub fn reset_published(
        &mut self,
        core: &mut Core,
        guest: &mut impl GuestPort,
        port: &Publish,
        first: usize,
    ) -> Ended {
        self.tcp.reset_published(core, guest, port, first)
    }

    /// Bound of flows and sockets: what ports that came later hold is not there for flows.
    fn flows_max(&self) -> usize {
        let later =
            (self.listeners.len() + self.datagrams.published()).saturating_sub(self.published_at_start);
        self.flows_max.saturating_sub(later).max(limits::FLOWS_MIN.min(self.flows_max))
    }

    /// The token the next datagram socket will have.
    pub fn next_datagram_token(&self) -> Token {
        self.datagrams.next_token()
    }

    /// Keeps the tables within `flows`: finished connections go first, then the longest idle.
    fn keep_within(&mut self, core: &mut Core, port: &mut impl GuestPort, flows: usize) {
        while self.len() > flows {
            if self.tcp.forget_finished(core) {
                continue;
            }
            let before = self.len();
            self.evict(core, port);
            if self.len() == before {
                return;
            }
        }
    }

    /// Ends the longest idle flow that holds a descriptor.
    fn evict(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        match (self.tcp.oldest(), self.datagrams.oldest()) {
            (Some(tcp), Some(datagram)) if datagram < tcp => self.datagrams.evict_oldest(core),
            (Some(_), _) => self.tcp.evict_oldest(core, port),
            (None, _) => self.datagrams.evict_oldest(core),
        }
    }

    /// Makes a socket; where descriptors ran out all the same, once more after an eviction.
    fn open<T>(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        mut make: impl FnMut(&mut Self) -> io::Result<T>,
    ) -> io::Result<T> {
        self.keep_within(core, port, self.flows_max() - 1);
        self.forget_gone_in_line(core);
        match make(self) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                self.evict(core, port);
                make(self)
            }
            outcome => outcome,
        }
    }

    /// A TCP segment of the guest. Returns the worker that has its flow, if that is another one: the
    /// segment was not taken then.
    pub fn segment(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        segment: &Segment<'_>,
    ) -> Option<WorkerId> {
        if self.tcp.segment(core, port, segment) {
            return None;
        }
        let elsewhere = core.elsewhere(&Place::Tcp(segment.key));
        if elsewhere.is_none() {
            self.begin(core, port, segment);
        }
        elsewhere
    }

    /// A segment of no flow: begins one if it is a SYN and may.
    fn begin(&mut self, core: &mut Core, port: &mut impl GuestPort, segment: &Segment<'_>) {
        let flags = segment.header.flags;
        if !flags.contains(Flags::SYN) || flags.intersects(Flags::ACK | Flags::RST | Flags::FIN) {
            return TcpTable::<N::Stream>::refuse(core, port, segment);
        }
        let (key, from, syn) = (segment.key, segment.from, segment.header.seq);
        let is_dns = self.dns && key.remote == SocketAddr::new(core.gateway(), DNS_PORT);
        let verdict = match is_dns {
            true => Verdict::Connect(key.remote),
            false if core.draining => Verdict::Prohibited,
            false => self.policy.judge(core, &mut self.net, Some(Protocol::Tcp), key.remote),
        };
        let to = match verdict {
            // The guest sends its SYN again.
            Verdict::Connect(_) if !is_dns && !Self::may_begin(core) => return,
            Verdict::Connect(to) => to,
            Verdict::NoService => return TcpTable::<N::Stream>::refuse(core, port, segment),
            Verdict::Prohibited => {
                core.counters.drop(DropReason::Refused);
                return tcp::unreachable(core, port, from, &key, syn, UnreachableCode::AdminProhibited);
            }
            Verdict::NoRoute => {
                core.counters.drop(DropReason::Refused);
                return tcp::unreachable(core, port, from, &key, syn, UnreachableCode::Net);
            }
        };
        let made = self.open(core, port, |nat| {
            let token = nat.tcp.next_token();
            if is_dns { nat.net.connect_dns(token) } else { nat.net.connect(token, to) }
        });
        match made {
            Ok(stream) => self.tcp.insert_from_guest(core, segment, stream, is_dns),
            Err(error) => tcp::connect_failed(core, port, from, &key, syn, &error),
        }
    }

    /// Whether the limit lets the guest begin a flow; it is counted as refused if not.
    fn may_begin(core: &mut Core) -> bool {
        let may = core.lines.from_guest.take_flow(core.now);
        if !may {
            core.counters.drop(DropReason::FlowLimit);
            core.counters.limited_from_guest.refused_flows += 1;
        }
        may
    }

    /// Takes a flow out, for another worker.
    pub fn detach(&mut self, core: &mut Core, key: &tcp::Key) -> Option<MovedFlow<N>> {
        self.tcp.detach(core, key)
    }

    /// Whether this worker has it.
    pub fn has(&self, place: &Place) -> bool {
        match place {
            Place::Tcp(key) => self.tcp.contains(key),
            Place::Socket(end) => self.datagrams.has_mapping(end),
            Place::Exchange(key) => self.datagrams.peer(key).is_some(),
        }
    }

    /// Takes a flow in that another worker had.
    pub fn attach(&mut self, core: &mut Core, port: &mut impl GuestPort, moved: MovedFlow<N>) {
        self.keep_within(core, port, self.flows_max() - 1);
        let net = &mut self.net;
        self.tcp.attach(core, moved, |token, stream| net.attach(token, stream));
    }

    /// A flow that another worker had came too late to be taken in.
    pub fn lose(&self, core: &mut Core, moved: &MovedFlow<N>) {
        TcpTable::<N::Stream>::note_lost(core, moved);
    }

    /// The same of a datagram socket.
    pub fn lose_socket(&self, core: &mut Core, moved: &MovedSocket<N>) {
        DatagramTable::<N::Datagram>::note_lost(core, moved);
    }

    /// Takes a datagram socket out, for another worker; `None` if there is none that moves.
    pub fn detach_socket(&mut self, core: &mut Core, end: &GuestEnd) -> Option<MovedSocket<N>> {
        self.datagrams.detach(core, end)
    }

    /// Takes a datagram socket in that another worker had.
    pub fn attach_socket(&mut self, core: &mut Core, port: &mut impl GuestPort, moved: MovedSocket<N>) {
        self.keep_within(core, port, self.flows_max() - 1);
        let net = &mut self.net;
        self.datagrams.attach(core, moved, |token, socket| net.attach_datagram(token, socket));
    }

    /// A UDP datagram or ICMP echo request of the guest. Returns the worker that has its socket, if that
    /// is another one: the datagram was not taken then.
    pub fn datagram(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        datagram: &Datagram<'_>,
    ) -> Option<Elsewhere> {
        let key = &datagram.key;
        let peer = match self.datagrams.peer(key) {
            Some(peer) => peer,
            None => {
                if let Some(worker) = core.elsewhere(&Place::Exchange(*key)) {
                    return Some(Elsewhere::Stays(worker));
                }
                let end = self.datagrams.end_of(key);
                if self.is_published(core, &end) {
                    if let Some(worker) = core.not_first() {
                        return Some(Elsewhere::Stays(worker));
                    }
                } else if !self.datagrams.has_mapping(&end)
                    && let Some(worker) = core.elsewhere(&Place::Socket(end))
                {
                    return Some(Elsewhere::Moves(worker));
                }
                self.open_datagram(core, port, datagram)?
            }
        };
        self.send_datagram(core, port, datagram, peer);
        None
    }

    /// The guest refuses what the remote end of an exchange sends; false if there is no such exchange here.
    pub fn refused_by_guest(&mut self, core: &mut Core, key: &datagram::Key) -> bool {
        self.datagrams.refused_by_guest(core, key)
    }

    /// The guest's "destination unreachable" about the segment at `seq` of a flow; false if this worker has no
    /// such flow.
    pub fn unreachable_in_guest(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        key: &tcp::Key,
        seq: SeqNumber,
        code: UnreachableCode,
        next_hop_mtu: u16,
    ) -> bool {
        self.tcp.unreachable(core, port, key, seq, code, next_hop_mtu)
    }

    /// The other worker that has the socket of an exchange.
    pub fn datagram_elsewhere(&self, core: &Core, key: &datagram::Key) -> Option<WorkerId> {
        let socket = Place::Socket(self.end_of(key));
        core.elsewhere(&Place::Exchange(*key)).or_else(|| core.elsewhere(&socket))
    }

    /// Whether a published port's socket serves this end, at the first worker: what the guest sends from
    /// there leaves where it is answered (RFC 4787, REQ-1).
    fn is_published(&self, core: &Core, end: &GuestEnd) -> bool {
        let is_shared_udp = end.kind == Kind::Udp && end.remote.is_none();
        is_shared_udp
            && core.primary_guest() == Some(end.guest.ip())
            && self.policy.publishes_udp(end.guest.port())
    }

    /// What the socket of an exchange serves.
    pub fn end_of(&self, key: &datagram::Key) -> GuestEnd {
        self.datagrams.end_of(key)
    }

    fn send_datagram(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        datagram: &Datagram<'_>,
        peer: PeerId,
    ) {
        if !self.datagrams.passes(core, peer, datagram) {
            return;
        }
        let Err(error) = self.datagrams.send(core, peer, datagram) else { return };
        core.counters.drop(DropReason::SocketRefused);
        let code = match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::ENETDOWN) => UnreachableCode::Net,
            Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => UnreachableCode::Host,
            Some(libc::EACCES | libc::EPERM) => UnreachableCode::AdminProhibited,
            Some(libc::EMSGSIZE) => return self.too_big(core, port, datagram, peer),
            _ => return,
        };
        core.send_unreachable(port, datagram.from, code, datagram.packet);
    }

    /// Tells the guest how large its datagrams that nobody may fragment can be (RFC 1191, 4).
    fn too_big(&mut self, core: &mut Core, port: &mut impl GuestPort, datagram: &Datagram<'_>, peer: PeerId) {
        // The path is asked for only where the answer will be told.
        if !datagram.fields.dont_fragment || !core.has_icmp_token() {
            return;
        }
        let real = self.datagrams.real(peer);
        let next_hop_mtu = self.net.path_mtu(real).unwrap_or(IpMtu::MIN);
        let message = Message::Unreachable { code: UnreachableCode::FragmentationNeeded, next_hop_mtu };
        core.send_icmp_error(port, datagram.from, message, datagram.packet);
    }

    /// Judges a new exchange and makes its socket and peer; `None` if it may not be.
    fn open_datagram(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        datagram: &Datagram<'_>,
    ) -> Option<PeerId> {
        let Datagram { key, from, packet, .. } = *datagram;
        let protocol = (key.kind == Kind::Udp).then_some(Protocol::Udp);
        let verdict = match core.draining {
            true => Verdict::Prohibited,
            false => self.policy.judge(core, &mut self.net, protocol, key.remote),
        };
        let code = match verdict {
            Verdict::Connect(real) => {
                if !Self::may_begin(core) {
                    return None;
                }
                if !self.datagrams.is_served(core, &self.datagrams.end_of(&key))
                    && !self.open_mapping(core, port, datagram, real)
                {
                    return None;
                }
                return self.datagrams.insert_peer(core, key, real);
            }
            Verdict::NoService => UnreachableCode::Port,
            Verdict::Prohibited => UnreachableCode::AdminProhibited,
            Verdict::NoRoute => UnreachableCode::Net,
        };
        core.counters.drop(DropReason::Refused);
        core.send_unreachable(port, from, code, packet);
        None
    }

    fn open_mapping(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        datagram: &Datagram<'_>,
        real: SocketAddr,
    ) -> bool {
        // Its own port where that is free (RFC 4787, 4.2.1), so that a mapping survives its idle time.
        let own = Some(datagram.key.guest.port()).filter(|own| *own >= limits::PRESERVED_PORT_MIN);
        let any = match real {
            SocketAddr::V4(_) => SocketAddr::from(([0, 0, 0, 0], own.unwrap_or(0))),
            SocketAddr::V6(_) => SocketAddr::from(([0u16; 8], own.unwrap_or(0))),
        };
        let (kind, end) = (datagram.key.kind, self.datagrams.end_of(&datagram.key));
        let made = self.open(core, port, |nat| {
            let token = nat.datagrams.next_token();
            match kind {
                Kind::Udp => nat.net.udp(token, any),
                Kind::Echo => nat.net.ping(token, real.ip()),
            }
        });
        match made {
            Ok(socket) => {
                self.datagrams.insert_mapping(core, end, socket);
                true
            }
            Err(error) => {
                core.counters.drop(DropReason::SocketRefused);
                if kind == Kind::Echo && error.kind() == io::ErrorKind::PermissionDenied {
                    Self::say_ping_refused();
                }
                // Whatever the host lacks, leave or room (RFC 5508, REQ-8).
                let code = UnreachableCode::AdminProhibited;
                core.send_unreachable(port, datagram.from, code, datagram.packet);
                false
            }
        }
    }

    fn say_ping_refused() {
        /// One process, one sysctl: whichever worker meets it says so.
        static SAID: AtomicBool = AtomicBool::new(false);
        if !SAID.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the guest's pings cannot leave: the kernel refuses ICMP echo sockets to this process; \
                 allow its group in the sysctl net.ipv4.ping_group_range, such as \
                 `sysctl -w net.ipv4.ping_group_range='0 2147483647'`"
            );
        }
    }

    /// News of a host socket.
    pub fn host_ready(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token, ready: Readiness) {
        match TokenKind::of(token) {
            Some(TokenKind::Tcp) => self.tcp.host_ready(core, port, token, ready),
            Some(TokenKind::Datagram) => self.datagrams.host_ready(core, port, token, ready),
            Some(TokenKind::Listener) => self.accept(core, port, token),
            Some(TokenKind::Peer) | None => {}
        }
    }

    /// Takes the waiting clients of a published port.
    fn accept(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        let at = TokenKind::index(token);
        let (mut taken, mut made_room) = (0, false);
        for _ in 0..limits::ACCEPT_BURST {
            let flow_token = self.tcp.next_token();
            let Some(published) = self.listeners.get_mut(at) else { return };
            let to = (published.owner, published.port.guest_port);
            let ready_at = core.lines.to_guest.flow_ready_at(core.now);
            if ready_at > core.now {
                core.counters.limited_to_guest.waits += 1;
                return self.accept_later(core, token, ready_at);
            }
            let (stream, client) = match published.listener.accept(flow_token) {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE) if !made_room && !self.is_empty() => {
                        self.evict(core, port);
                        made_room = true;
                        continue;
                    }
                    // The client waits on, and nothing of ours would make room for sure.
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        return self.accept_later(core, token, core.now + limits::ACCEPT_PAUSE);
                    }
                    // A client that left before it was taken (ECONNABORTED) and the like.
                    _ => continue,
                },
            };
            (taken, made_room) = (taken + 1, false);
            core.lines.to_guest.take_flow(core.now);
            self.begin_published(core, port, stream, client, to);
            // Only now that there is a client; the newest is never the longest idle.
            self.keep_within(core, port, self.flows_max());
        }
        if taken == 0 {
            return self.accept_later(core, token, core.now + limits::ACCEPT_PAUSE);
        }
        if !self.accept_again.contains(&at) {
            self.accept_again.push(at);
        }
    }

    fn accept_later(&mut self, core: &mut Core, token: Token, at: Instant) {
        if let Some(published) = self.listeners.get_mut(TokenKind::index(token)) {
            core.timers.set(&mut published.again, token, at);
        }
    }

    /// The pause of a listener may be over.
    fn accept_timeout(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        let Some(published) = self.listeners.get_mut(TokenKind::index(token)) else { return };
        if core.timers.expired(&mut published.again, token, core.now) {
            self.accept(core, port, token);
        }
    }

    /// Leads a client to the guest. Where there is none, or no flow may begin any more, the stream is dropped: the client sees RST.
    fn begin_published(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        stream: N::Stream,
        client: SocketAddr,
        (owner, guest_port): (Owner, u16),
    ) {
        let Some(addr) = core.guest_of(owner).filter(|_| !core.draining) else { return };
        let guest = SocketAddr::new(addr, guest_port);
        let mut key = tcp::Key { guest, remote: policy::visible(core, client) };
        // A flow on its way here is in no table; the directory knows it and those of other workers.
        let is_taken = |key: tcp::Key| self.tcp.contains(&key) || core.is_had(&Place::Tcp(key));
        if is_taken(key) {
            let ip = key.remote.ip();
            let taken = |port| is_taken(tcp::Key { guest, remote: SocketAddr::new(ip, port) });
            let Some(free) = policy::free_port(client.port(), taken) else { return };
            key.remote = SocketAddr::new(ip, free);
        }
        let neighbour = core.neighbour(addr);
        if neighbour.is_none() {
            core.ask_for(port, addr);
        }
        self.tcp.insert_from_world(core, key, neighbour, stream);
    }

    /// A guest address was seen at a new MAC address.
    pub fn resolved(&mut self, core: &Core, addr: std::net::IpAddr, neighbour: Neighbour) {
        self.tcp.resolved(core, addr, neighbour);
    }

    /// Ends what the guest began from `addr`, without a word to it: the address is no longer its own.
    pub fn reset_address(&mut self, core: &mut Core, addr: std::net::IpAddr) {
        self.tcp.reset_address(core, addr);
        self.datagrams.reset_address(core, addr);
    }

    /// Addresses of the host went and did not come back: flows that came from them end.
    pub fn addresses_gone(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        let net = &mut self.net;
        let before = core.counters.flows_stranded;
        self.tcp.reset_stranded(core, port, |ip| net.is_own_address(ip));
        let ended = core.counters.flows_stranded - before;
        if ended > 0 {
            tracing::info!(ended, "connections from an address the host no longer has are reset");
        }
    }

    /// Carries out the deadlines that came up.
    pub fn run_timers(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        while let Some(token) = core.timers.pop_due(core.now) {
            match TokenKind::of(token) {
                Some(TokenKind::Tcp) => self.tcp.timeout(core, port, token),
                Some(TokenKind::Peer) => self.datagrams.timeout(core, token),
                Some(TokenKind::Listener) => self.accept_timeout(core, port, token),
                _ => {}
            }
        }
        core.lines.run_timers(core.now);
        if core.lines.has_due(core.now) {
            self.serve_lines(core, port);
        }
    }

    /// Has those whose turn in line for a limit has come go on, so many of them.
    fn serve_lines(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        for _ in 0..limits::BATCH_TURNS {
            let Some((token, turn)) = core.lines.from_guest.next(core.now) else { break };
            let used = self.tcp.take_turn_from_guest(core, port, token, turn);
            core.lines.from_guest.give_back(turn.less(used));
        }
        let full = core.counters.payload_to_guest_bytes + limits::BATCH_BYTES;
        for _ in 0..limits::BATCH_TURNS {
            if core.counters.payload_to_guest_bytes >= full {
                return;
            }
            let Some((token, turn)) = core.lines.to_guest.next(core.now) else { break };
            let used = match TokenKind::of(token) {
                Some(TokenKind::Datagram) => self.datagrams.take_turn_in_line(core, port, token, turn),
                _ => self.tcp.take_turn_to_guest(core, port, token, turn),
            };
            core.lines.to_guest.give_back(turn.less(used));
        }
    }

    /// Those who wait in line for a limit, and are gone, keep their places until their turn comes, which may be long
    /// with many and a low rate: they are forgotten once they are the most.
    fn forget_gone_in_line(&self, core: &mut Core) {
        for line in [&mut core.lines.from_guest, &mut core.lines.to_guest] {
            if line.len() > 2 * self.len() + limits::BATCH_TURNS {
                line.retain(|token| self.tcp.is_flow(token) || self.datagrams.is_socket(token));
            }
        }
    }

    /// The end of a batch of frames, before their memory is the guest's again.
    pub fn end_of_frames(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        self.tcp.send_queued(core, port);
        core.counters.drop_many(DropReason::SocketRefused, self.net.flush_datagrams());
    }

    /// The end of a batch.
    pub fn flush(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        for at in std::mem::take(&mut self.accept_again) {
            self.accept(core, port, TokenKind::Listener.token(0, at));
        }
        self.datagrams.flush(core, port);
        self.tcp.flush(core, port);
    }

    /// Whether flows have more to send, or clients wait to be taken, now.
    pub fn has_more(&self) -> bool {
        self.tcp.has_more() || self.datagrams.has_more() || !self.accept_again.is_empty()
    }

    /// Whether flows wait for receive buffers.
    pub fn is_starved(&self) -> bool {
        self.tcp.is_starved() || self.datagrams.is_starved()
    }

    /// The guest posted receive buffers.
    pub fn guest_has_buffers(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        self.datagrams.guest_has_buffers(core, port);
        self.tcp.guest_has_buffers(core, port);
    }

    /// The guest is gone or began anew: its flows end, the world sees RST.
    pub fn reset_all(&mut self, core: &mut Core) {
        self.tcp.reset_all(core);
        self.datagrams.reset_all(core);
    }
}
