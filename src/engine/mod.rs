//! What happens to a frame: classification, the gateway's services, translation.
//!
//! One [`Engine`] belongs to one worker. It makes no system call but through [`host_net::HostNet`],
//! reads no clock (each entry takes `now`), and answers through [`guest_port::GuestPort`]. A batch is:
//! any number of [`Engine::from_guest`] and [`Engine::host_ready`], then one [`Engine::flush`].
//!
//! Nothing the guest or the world sends is an error here: what cannot be served is dropped and
//! counted ([`counters::DropReason`]).

#![forbid(unsafe_code)]

mod beside;
mod complaints;
pub mod core;
pub mod counters;
pub mod emit;
pub mod flows;
pub mod gateway;
pub mod guest_port;
pub mod host_net;
pub mod lan;
pub mod lines;
pub mod lru;
pub mod nat;
pub mod packet;
pub mod placement;
pub mod reassembly;
pub mod station;
pub mod timers;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use self::core::{Core, Neighbour, Owner};
use self::counters::{Counters, DropReason};
use self::flows::{Ended, FlowId, NewsList, Table, Walk};
use self::gateway::{DnsForward, Gateway, SharedDhcp};
use self::guest_port::GuestPort;
use self::host_net::{HostDatagram, HostNet, HostStream, PacketFields, Readiness, Token};
use self::lines::Lines;
use self::nat::policy::Policy;
use self::nat::tcp::Segment;
use self::nat::{DNS_PORT, Datagram, Elsewhere, Nat, datagram};
use self::placement::{HeldFrame, Home, Letter, Place, Post, SentOn, Waiting, WorkerId};
use self::reassembly::Reassembly;
use crate::addr::MacAddr;
use crate::config::{DnsConfig, IpMtu, Lan, Mode, Publish, UdpConfig};
use crate::frame::{Payload, TxFrame};
use crate::limits;
use crate::rate_limit::RateLimits;
use crate::service::dhcp::{self, LeaseChange};
use crate::service::dns::DnsService;
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::icmpv4::{self, Message, UnreachableCode};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::{Checksum, GsoKind};
use crate::wire::{arp, checksum, tcp, udp};

/// What an engine needs to know at its start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The guest's network.
    pub lan: Lan,
    /// DNS as the guest meets it.
    pub dns: DnsConfig,
    /// What lies beyond the gateway; published ports with the host addresses they are really bound to.
    pub mode: Mode,
    /// The MAC address the guest should have, if one was configured.
    pub mac: Option<MacAddr>,
    /// Bound of flows, all kinds together.
    pub flows_max: usize,
    /// Keys the initial sequence numbers (RFC 6528).
    pub isn_secret: (u64, u64),
    /// The worker's place among others, if there are others.
    pub home: Option<Home>,
}

/// The engine of one worker, over the host's sockets `N`.
pub struct Engine<N: HostNet> {
    core: Core,
    gateway: Gateway,
    nat: Nat<N>,
    reassembly: Reassembly,
    expected_mac: Option<MacAddr>,
    waiting: Waiting,
    sent_on: SentOn,
    letters: VecDeque<(WorkerId, PostOf<N>)>,
    /// The guest's starts that were noticed here.
    guest_starts: u64,
}

/// What engines with sockets of `N` tell each other.
pub type LetterOf<N> = Letter<DetachedStream<N>, DetachedDatagram<N>>;
/// The same on its way.
pub type PostOf<N> = Post<DetachedStream<N>, DetachedDatagram<N>>;

type DetachedStream<N> = <<N as HostNet>::Stream as HostStream>::Detached;
type DetachedDatagram<N> = <<N as HostNet>::Datagram as HostDatagram>::Detached;

/// A transport message of the guest: whole in place, and its first bytes in host memory.
struct Incoming<'a> {
    ip: ipv4::Header,
    from: Neighbour,
    /// First bytes of the IP packet, to quote in errors.
    packet: &'a [u8],
    /// First bytes of the transport message.
    head: &'a [u8],
    /// The transport message.
    whole: Payload<'a>,
    checksum: Checksum,
    /// With UDP segmentation offload: length of each datagram but the last.
    gso_bytes: Option<usize>,
    /// The frame it came in; none if it came in fragments.
    frame: Option<&'a TxFrame<'a>>,
}

impl Incoming<'_> {
    /// What of the IP header goes on: vunet is one hop. What came in fragments may leave in fragments.
    fn fields(&self) -> PacketFields {
        let dont_fragment = self.ip.dont_fragment && self.frame.is_some();
        PacketFields {
            ttl: self.ip.ttl.saturating_sub(1).max(1),
            tos: self.ip.tos,
            dont_fragment,
            from: None,
        }
    }

    /// The whole as one frame in host memory, for another worker.
    fn to_held_frame(&self) -> HeldFrame {
        match self.frame {
            Some(frame) => HeldFrame::copy_of(frame),
            None => HeldFrame::of_packet(&self.ip, self.from, &self.whole),
        }
    }
}

impl<N: HostNet> Engine<N> {
    /// An engine without flows.
    pub fn new(config: &EngineConfig, net: N, dhcp: SharedDhcp, dns: Arc<DnsService>) -> Engine<N> {
        let mut core = Core::new(config.lan);
        core.home = config.home.clone();
        let policy = Policy::of(&config.mode);
        let udp = match &config.mode {
            Mode::Nat(nat) => nat.udp,
            Mode::Isolated => UdpConfig::default(),
        };
        Engine {
            gateway: Gateway::new(dhcp, dns),
            nat: Nat::new(net, policy, udp, config.flows_max, config.isn_secret, config.dns.enabled),
            reassembly: Reassembly::default(),
            expected_mac: config.mac,
            waiting: Waiting::default(),
            sent_on: SentOn::default(),
            letters: VecDeque::new(),
            guest_starts: 0,
            core,
        }
    }

    /// Keeps the guest within `limits`, which all workers share.
    pub fn limit_rates(&mut self, limits: &RateLimits) {
        self.core.lines = Lines::new(limits);
    }

    /// The limits were set to something else.
    pub fn limits_changed(&mut self, now: Instant) {
        self.begin(now);
        self.core.lines.refresh(now);
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.core.counters
    }

    /// Why the frame at hand was dropped, if it was since this was last asked.
    pub fn take_dropped(&mut self) -> Option<DropReason> {
        self.core.counters.take_dropped()
    }

    /// The flows, to publish ports and to inspect.
    pub fn nat(&mut self) -> &mut Nat<N> {
        &mut self.nat
    }

    /// Payload of fragments held until their datagrams are whole, in bytes.
    pub fn reassembly_bytes(&self) -> usize {
        self.reassembly.held_bytes()
    }

    /// This end of the host leads to the guest by way of another worker.
    pub fn note_published(&mut self, port: Publish) {
        self.nat.note_published(port);
    }

    /// Publishes a listening socket, bound as `port` says, to a guest.
    pub fn publish_tcp(&mut self, owner: Owner, port: Publish, listener: N::Listener) {
        self.nat.publish_tcp(owner, port, listener);
    }

    /// Publishes a UDP socket, bound as `port` says, to a guest.
    pub fn publish_udp(&mut self, owner: Owner, port: Publish, socket: N::Datagram) {
        self.nat.publish_udp(&self.core, owner, port, socket);
    }

    /// Closes a published port. Exchanges of datagrams that came by it end; connections go on, unless they are
    /// to be `reset` (RST both ways): a first step of that is taken.
    pub fn unpublish(
        &mut self,
        now: Instant,
        guest: &mut impl GuestPort,
        (owner, port): (Owner, &Publish),
        reset: bool,
    ) -> Ended {
        self.begin(now);
        self.nat.unpublish(&mut self.core, owner, port);
        if reset { self.nat.reset_published(&mut self.core, guest, port, 0) } else { Ended::default() }
    }

    /// Takes a further step of resetting connections of a port that is published no more, from [`Ended::next`] on.
    pub fn reset_published(
        &mut self,
        now: Instant,
        guest: &mut impl GuestPort,
        port: &Publish,
        first: usize,
    ) -> Ended {
        self.begin(now);
        self.nat.reset_published(&mut self.core, guest, port, first)
    }

    /// The published ports of the guest `number` of several lead to this address of it from now on, or nowhere. An
    /// address that no guest can have is none.
    pub fn set_guest(&mut self, number: u64, addr: Option<Ipv4Addr>) {
        let addr = addr.filter(|addr| self.core.is_guest_address(*addr)).map(IpAddr::V4);
        self.core.set_owner(number, addr);
    }

    /// The guest `number` of several is gone: its published ports are closed, and its flows end, the world sees
    /// RST.
    pub fn guest_gone(&mut self, number: u64) {
        self.nat.unpublish_all(&mut self.core, Owner::OneOf(number));
        if let Some(addr) = self.core.set_owner(number, None) {
            self.forget_address(addr);
        }
    }

    /// A front-end asked for an MTU (`NET_SET_MTU`): the smaller of it and the configured one holds,
    /// until the front-end leaves (`None`).
    pub fn limit_ip_mtu(&mut self, limit: Option<IpMtu>) {
        let configured = self.core.lan.ip_mtu;
        let ip_mtu = limit.filter(|limit| limit.get() < configured.get()).unwrap_or(configured);
        self.core.ip_mtu = ip_mtu.get();
        self.gateway.set_ip_mtu(ip_mtu);
    }

    /// Takes one frame of the guest.
    pub fn from_guest(&mut self, now: Instant, port: &mut impl GuestPort, frame: &TxFrame<'_>) {
        self.begin(now);
        self.core.counters.frames_from_guest += 1;
        if let Err(reason) = self.classify(port, frame) {
            self.core.counters.drop(reason);
        }
    }

    fn classify(&mut self, port: &mut impl GuestPort, frame: &TxFrame<'_>) -> Result<(), DropReason> {
        let header = ethernet::Header::parse(frame.head).map_err(|_| DropReason::Malformed)?;
        if !header.src.is_unicast() {
            return Err(DropReason::SpoofedSource);
        }
        if header.dst != MacAddr::GATEWAY && !header.dst.is_multicast() {
            return Err(DropReason::NotForUs);
        }
        self.check_mac(header.src);
        let from = Neighbour { mac: header.src, pair: frame.pair };
        match header.ethertype {
            EtherType::ARP => self.arp(port, from, &frame.head[ethernet::HEADER_BYTES..]),
            EtherType::IPV4 => self.ipv4(port, from, frame),
            _ => Err(DropReason::Unsupported),
        }
    }

    fn check_mac(&mut self, seen: MacAddr) {
        if let Some(expected) = self.expected_mac
            && expected != seen
        {
            tracing::warn!(
                %expected, %seen,
                "the guest's MAC address is not the one given with --mac: this front-end does not read \
                 it from the backend; give it the address itself (QEMU: -device virtio-net-pci,mac=...)"
            );
            self.expected_mac = None;
        }
    }

    fn arp(&mut self, port: &mut impl GuestPort, from: Neighbour, bytes: &[u8]) -> Result<(), DropReason> {
        let packet = arp::Packet::parse(bytes).map_err(|_| DropReason::Malformed)?;
        if packet.sender_mac == from.mac && self.core.is_guest_address(packet.sender_ip) {
            self.learn(packet.sender_ip, from);
        }
        self.gateway.arp(&mut self.core, port, from.pair, &packet);
        Ok(())
    }

    fn learn(&mut self, addr: Ipv4Addr, at: Neighbour) {
        if self.core.learn(IpAddr::V4(addr), at) {
            self.nat.resolved(&self.core, IpAddr::V4(addr), at);
            self.tell_others(|| Letter::Neighbour(IpAddr::V4(addr), at.mac));
        }
    }

    fn ipv4(
        &mut self,
        port: &mut impl GuestPort,
        from: Neighbour,
        frame: &TxFrame<'_>,
    ) -> Result<(), DropReason> {
        let packet = &frame.head[ethernet::HEADER_BYTES..];
        let available = frame.whole.len() - ethernet::HEADER_BYTES;
        let ip = ipv4::Header::parse(packet, available).map_err(|error| match error {
            crate::wire::WireError::Checksum => DropReason::Checksum,
            _ => DropReason::Malformed,
        })?;
        if self.core.is_guest_address(ip.src) {
            self.learn(ip.src, from);
        } else if !(ip.src.is_unspecified() && ip.protocol == Protocol::UDP) {
            return Err(DropReason::SpoofedSource);
        }
        let whole = frame.whole.range(ethernet::HEADER_BYTES + ip.header_bytes, ip.payload_bytes);
        if ip.is_fragment() {
            let mut bytes = vec![0u8; whole.len()];
            whole.copy_to(&mut bytes);
            let Some(datagram) = self.reassembly.add(&mut self.core, port, from, &ip, &bytes) else {
                return Ok(());
            };
            let ip = ipv4::Header {
                payload_bytes: datagram.len(),
                more_fragments: false,
                fragment_offset_bytes: 0,
                header_bytes: ipv4::HEADER_BYTES,
                ..ip
            };
            // What errors quote is the packet as if it had come whole, whichever fragment came last.
            let mut packet = vec![0u8; ipv4::HEADER_BYTES];
            ip.emit(&mut packet);
            packet.extend_from_slice(&datagram[..datagram.len().min(limits::FRAME_HEAD_BYTES)]);
            let (head, whole) = (&datagram[..], Payload::from_host(&datagram));
            let checksum = Checksum::Complete;
            let incoming =
                Incoming { ip, from, packet: &packet, head, whole, checksum, gso_bytes: None, frame: None };
            return self.transport(port, &incoming);
        }
        let head = &packet[ip.header_bytes..packet.len().min(ip.header_bytes + ip.payload_bytes)];
        let checksum = frame.vnet.checksum;
        let uso = frame.vnet.gso.filter(|gso| gso.kind == GsoKind::UdpL4);
        let gso_bytes = uso.map(|gso| usize::from(gso.size_bytes));
        self.transport(
            port,
            &Incoming { ip, from, packet, head, whole, checksum, gso_bytes, frame: Some(frame) },
        )
    }

    fn transport(&mut self, port: &mut impl GuestPort, incoming: &Incoming<'_>) -> Result<(), DropReason> {
        let ip = &incoming.ip;
        let local = ip.dst == self.core.lan.gateway;
        let broadcast = ip.dst.is_broadcast() || ip.dst == self.core.lan.subnet.broadcast();
        if broadcast {
            return self.broadcast(port, incoming);
        }
        if ip.src.is_unspecified() {
            return Err(DropReason::SpoofedSource);
        }
        if !local && ip.ttl <= 1 {
            let expired = Message::TimeExceeded { code: 0 };
            self.core.send_icmp_error(port, incoming.from, expired, incoming.packet);
            return Err(DropReason::Refused);
        }
        match ip.protocol {
            Protocol::TCP => self.tcp(port, incoming),
            Protocol::UDP => self.udp(port, incoming, local),
            Protocol::ICMP => self.icmp(port, incoming, local),
            _ => {
                let code = UnreachableCode::Protocol;
                self.core.send_unreachable(port, incoming.from, code, incoming.packet);
                Err(DropReason::Unsupported)
            }
        }
    }

    /// Only DHCP listens to broadcasts; there is no other station on the link.
    fn broadcast(&mut self, port: &mut impl GuestPort, incoming: &Incoming<'_>) -> Result<(), DropReason> {
        if incoming.ip.protocol != Protocol::UDP {
            return Err(DropReason::Refused);
        }
        let (header, payload) = self.parse_udp(incoming)?;
        if header.dst_port != dhcp::SERVER_PORT {
            return Err(DropReason::Refused);
        }
        self.dhcp(port, incoming.from, &payload);
        Ok(())
    }

    fn parse_udp<'a>(&self, incoming: &Incoming<'a>) -> Result<(udp::Header, Payload<'a>), DropReason> {
        let header =
            udp::Header::parse(incoming.head, incoming.whole.len()).map_err(|_| DropReason::Malformed)?;
        let message = incoming.whole.range(0, header.len_bytes);
        if header.checksum != 0 {
            verify(incoming, Protocol::UDP, &message)?;
        }
        Ok((header, message.range(udp::HEADER_BYTES, message.len())))
    }

    fn dhcp(&mut self, port: &mut impl GuestPort, from: Neighbour, payload: &Payload<'_>) {
        let Some(event) = self.gateway.dhcp(&mut self.core, port, from, payload) else {
            return;
        };
        match event.change {
            LeaseChange::Bound => {
                tracing::info!(mac = %event.mac, address = %event.ip, "lease");
                // Who comes through a published port, at whichever worker, need not wait for ARP.
                self.learn(event.ip, Neighbour { mac: event.mac, pair: from.pair });
                self.tell_others(|| Letter::Primary(IpAddr::V4(event.ip)));
            }
            LeaseChange::Released => {
                tracing::info!(mac = %event.mac, address = %event.ip, "lease given back");
                let addr = IpAddr::V4(event.ip);
                self.forget_address(addr);
                self.tell_others(|| Letter::AddressGone(addr));
            }
            change => {
                tracing::debug!(mac = %event.mac, address = %event.ip, ?change, "lease");
            }
        }
    }

    fn udp(
        &mut self,
        port: &mut impl GuestPort,
        incoming: &Incoming<'_>,
        local: bool,
    ) -> Result<(), DropReason> {
        let (header, payload) = self.parse_udp(incoming)?;
        let guest = SocketAddr::new(incoming.ip.src.into(), header.src_port);
        match header.dst_port {
            dhcp::SERVER_PORT if local => self.dhcp(port, incoming.from, &payload),
            DNS_PORT if local => self.gateway.dns(&mut self.core, port, incoming.from, guest, &payload),
            _ => {
                let segments = incoming.gso_bytes.map_or(1, |bytes| payload.len().div_ceil(bytes.max(1)));
                if segments > limits::USO_SEGMENTS_MAX {
                    return Err(DropReason::Malformed);
                }
                let remote = SocketAddr::new(incoming.ip.dst.into(), header.dst_port);
                let key = datagram::Key { kind: datagram::Kind::Udp, guest, remote };
                let datagram = Datagram {
                    key,
                    from: incoming.from,
                    head: &[],
                    payload,
                    gso_bytes: incoming.gso_bytes,
                    ident: incoming.ip.ident,
                    fields: incoming.fields(),
                    packet: incoming.packet,
                };
                return self.datagram(port, incoming, &datagram);
            }
        }
        Ok(())
    }

    fn icmp(
        &mut self,
        port: &mut impl GuestPort,
        incoming: &Incoming<'_>,
        local: bool,
    ) -> Result<(), DropReason> {
        let message = Message::parse(incoming.head).map_err(|_| DropReason::Malformed)?;
        let (ident, seq) = match message {
            Message::EchoRequest { ident, seq } => (ident, seq),
            Message::Unreachable { code, next_hop_mtu } => {
                return self.unreachable_in_guest(port, incoming, code, next_hop_mtu);
            }
            _ => return Err(DropReason::Unsupported),
        };
        verify_icmp(incoming)?;
        let payload = incoming.whole.range(icmpv4::HEADER_BYTES, incoming.whole.len());
        let src = IpAddr::V4(incoming.ip.src);
        if local {
            self.gateway.echo(&mut self.core, port, incoming.from, src, (ident, seq), &payload);
            return Ok(());
        }
        let key = datagram::Key {
            kind: datagram::Kind::Echo,
            guest: SocketAddr::new(src, ident),
            remote: SocketAddr::new(incoming.ip.dst.into(), 0),
        };
        let head = &incoming.head[..icmpv4::HEADER_BYTES];
        let datagram = Datagram {
            key,
            from: incoming.from,
            head,
            payload,
            gso_bytes: None,
            ident: incoming.ip.ident,
            fields: incoming.fields(),
            packet: incoming.packet,
        };
        self.datagram(port, incoming, &datagram)
    }

    /// "Destination unreachable" of the guest. It must quote a packet of a live exchange or flow (RFC 5508,
    /// REQ-5; RFC 5927, 4.1), at this worker or another.
    fn unreachable_in_guest(
        &mut self,
        port: &mut impl GuestPort,
        incoming: &Incoming<'_>,
        code: UnreachableCode,
        next_hop_mtu: u16,
    ) -> Result<(), DropReason> {
        verify_icmp(incoming)?;
        let quote = incoming.head.get(icmpv4::HEADER_BYTES..).ok_or(DropReason::Malformed)?;
        let about = ipv4::Header::parse(quote, usize::MAX).map_err(|_| DropReason::Malformed)?;
        // Of UDP the whole header, of TCP as much: ports and sequence number.
        let Some(head) = quote.get(about.header_bytes..about.header_bytes + 8) else {
            return Err(DropReason::Malformed);
        };
        if about.fragment_offset_bytes > 0 || (about.src, about.dst) != (incoming.ip.dst, incoming.ip.src) {
            return Err(DropReason::NoFlow);
        }
        let guest = SocketAddr::new(about.dst.into(), u16::from_be_bytes([head[2], head[3]]));
        let remote = SocketAddr::new(about.src.into(), u16::from_be_bytes([head[0], head[1]]));
        let owner = match (about.protocol, code) {
            (Protocol::UDP, UnreachableCode::Port) => {
                let key = datagram::Key { kind: datagram::Kind::Udp, guest, remote };
                if self.nat.refused_by_guest(&mut self.core, &key) {
                    return Ok(());
                }
                self.nat.datagram_elsewhere(&self.core, &key)
            }
            (Protocol::TCP, _) => {
                let key = nat::tcp::Key { guest, remote };
                let seq = tcp::SeqNumber(u32::from_be_bytes([head[4], head[5], head[6], head[7]]));
                if self.nat.unreachable_in_guest(&mut self.core, port, &key, seq, code, next_hop_mtu) {
                    return Ok(());
                }
                self.core.elsewhere(&Place::Tcp(key))
            }
            _ => return Err(DropReason::Unsupported),
        };
        let owner = owner.ok_or(DropReason::NoFlow)?;
        self.send_letter(owner, Letter::Frame(incoming.to_held_frame()));
        // It is counted where it is taken.
        self.core.counters.frames_from_guest -= 1;
        Ok(())
    }

    /// A datagram for the world, or for the worker that has its socket.
    fn datagram(
        &mut self,
        port: &mut impl GuestPort,
        incoming: &Incoming<'_>,
        datagram: &Datagram<'_>,
    ) -> Result<(), DropReason> {
        let end = self.nat.end_of(&datagram.key);
        let place = Place::Socket(end);
        let owner = match self.waiting.awaits(&place) {
            true => None,
            false => match self.nat.datagram(&mut self.core, port, datagram) {
                None => return Ok(()),
                elsewhere => elsewhere,
            },
        };
        let frame = incoming.to_held_frame();
        match (owner, self.own()) {
            (Some(Elsewhere::Moves(owner)), Some(from)) if self.sent_on.count(end) => {
                self.hold(place, frame, Some((owner, from)))?;
            }
            (Some(Elsewhere::Moves(owner) | Elsewhere::Stays(owner)), _) => {
                self.send_letter(owner, Letter::Frame(frame));
            }
            (None, _) => self.hold(place, frame, None)?,
        }
        // It is counted where, or when, it is taken.
        self.core.counters.frames_from_guest -= 1;
        Ok(())
    }

    /// Holds a frame for a flow or socket of another worker, and asks for that: whom, and for whom.
    fn hold(
        &mut self,
        place: Place,
        frame: HeldFrame,
        ask: Option<(WorkerId, WorkerId)>,
    ) -> Result<(), DropReason> {
        self.waiting.hold(place, frame).ok_or(DropReason::TableFull)?;
        if let Some((owner, from)) = ask {
            // Never dropped, or what is held would wait for ever; there are no more than frames held.
            self.post(owner, Letter::Want { place, from });
        }
        Ok(())
    }

    fn tcp(&mut self, port: &mut impl GuestPort, incoming: &Incoming<'_>) -> Result<(), DropReason> {
        let (header, header_bytes) = tcp::Header::parse(incoming.head).map_err(|_| DropReason::Malformed)?;
        verify(incoming, Protocol::TCP, &incoming.whole)?;
        let key = nat::tcp::Key {
            guest: SocketAddr::new(incoming.ip.src.into(), header.src_port),
            remote: SocketAddr::new(incoming.ip.dst.into(), header.dst_port),
        };
        let payload = incoming.whole.range(header_bytes, incoming.whole.len());
        let is_marked = incoming.ip.is_congestion_experienced();
        let segment = Segment { key, from: incoming.from, header, is_marked, payload };
        // While the flow is on its way the directory names this worker already: what waits says so first.
        let place = Place::Tcp(key);
        let owner = match self.waiting.awaits(&place) {
            true => None,
            false => match self.nat.segment(&mut self.core, port, &segment) {
                None => return Ok(()),
                owner => owner,
            },
        };
        self.hold(place, incoming.to_held_frame(), owner.zip(self.own()))?;
        // It is counted when it is taken.
        self.core.counters.frames_from_guest -= 1;
        Ok(())
    }

    fn own(&self) -> Option<WorkerId> {
        self.core.home.as_ref().map(|home| home.own)
    }

    fn send_letter(&mut self, to: WorkerId, letter: LetterOf<N>) {
        // What workers tell of the guest is not lost for the many frames another is too slow for.
        let max = match letter {
            Letter::Frame(_) => limits::LETTERS_MAX,
            _ => 2 * limits::LETTERS_MAX,
        };
        if self.letters.len() < max {
            self.post(to, letter);
        } else {
            self.core.counters.drop(DropReason::TableFull);
        }
    }

    fn post(&mut self, to: WorkerId, letter: LetterOf<N>) {
        self.letters.push_back((to, Post { guest_starts: self.guest_starts, letter }));
    }

    /// Sends what `letter` makes to every other worker.
    fn tell_others(&mut self, letter: impl Fn() -> LetterOf<N>) {
        let Some(home) = &self.core.home else { return };
        let (own, workers) = (home.own, home.workers);
        for to in (0..workers).map(WorkerId).filter(|to| *to != own) {
            self.send_letter(to, letter());
        }
    }

    /// The next letter to another worker, to be delivered after each batch.
    pub fn next_letter(&mut self) -> Option<(WorkerId, PostOf<N>)> {
        self.letters.pop_front()
    }

    /// So many letters to other workers were lost, as those were too slow for them.
    pub fn letters_lost(&mut self, count: u64) {
        self.core.counters.drop_many(DropReason::TableFull, count);
    }

    /// A letter from another worker.
    pub fn letter(&mut self, now: Instant, port: &mut impl GuestPort, post: PostOf<N>) {
        self.begin(now);
        if post.guest_starts != self.guest_starts {
            return self.too_late(post.letter);
        }
        match post.letter {
            Letter::Want { place, from } => self.give_away(place, from),
            Letter::Flow(moved) => {
                let place = Place::Tcp(moved.key());
                self.nat.attach(&mut self.core, port, *moved);
                self.awaited(now, port, place);
            }
            Letter::Socket(moved) => {
                let place = Place::Socket(moved.end());
                self.nat.attach_socket(&mut self.core, port, *moved);
                self.awaited(now, port, place);
            }
            Letter::Gone(place) => self.awaited(now, port, place),
            Letter::Frame(frame) => {
                let pair = self.core.first_pair();
                self.from_guest(now, port, &frame.as_frame(Some(pair)));
                self.end_of_frames(port);
            }
            Letter::Neighbour(addr, mac) => {
                let at = Neighbour { mac, pair: self.core.first_pair() };
                if self.core.neighbour(addr).is_none_or(|known| known.mac != mac) {
                    self.core.learn(addr, at);
                    self.nat.resolved(&self.core, addr, at);
                }
            }
            Letter::Primary(addr) => self.core.set_primary_guest(addr),
            Letter::AddressGone(addr) => self.forget_address(addr),
            // It was noticed already; the letter woke this worker.
            Letter::GuestReset => {}
        }
    }

    /// A letter of the guest's life before this one: what came with it ends.
    fn too_late(&mut self, letter: LetterOf<N>) {
        let place = match letter {
            Letter::Flow(moved) => {
                self.nat.lose(&mut self.core, &moved);
                Place::Tcp(moved.key())
            }
            Letter::Socket(moved) => {
                self.nat.lose_socket(&mut self.core, &moved);
                Place::Socket(moved.end())
            }
            _ => return,
        };
        // The guest of today may have begun one with the same name here.
        if !self.nat.has(&place) {
            self.core.release(&place);
        }
    }

    /// Gives a flow or socket to the worker that has frames for it.
    fn give_away(&mut self, place: Place, to: WorkerId) {
        let core = &mut self.core;
        let moved = match &place {
            Place::Tcp(key) => self.nat.detach(core, key).map(|flow| Letter::Flow(Box::new(flow))),
            Place::Socket(end) => {
                self.nat.detach_socket(core, end).map(|socket| Letter::Socket(Box::new(socket)))
            }
            Place::Exchange(_) => None,
        };
        // Past the bound on letters what moves would be lost, so that bound does not hold here.
        if let Some(letter) = moved {
            if let Some(home) = &self.core.home {
                home.directory.set(place, to);
            }
            self.post(to, letter);
        } else if !self.waiting.note(&place, to) {
            self.post(to, Letter::Gone(place));
        }
    }

    /// A flow or socket came or will not come: what waited for it goes on.
    fn awaited(&mut self, now: Instant, port: &mut impl GuestPort, place: Place) {
        let awaited = self.waiting.take(&place);
        for frame in &awaited.frames {
            self.from_guest(now, port, &frame.as_frame(None));
        }
        self.end_of_frames(port);
        for to in awaited.wanted_by {
            self.give_away(place, to);
        }
    }

    /// News of a host socket.
    pub fn host_ready(&mut self, now: Instant, port: &mut impl GuestPort, token: Token, ready: Readiness) {
        self.begin(now);
        self.nat.host_ready(&mut self.core, port, token, ready);
    }

    /// The guest posted receive buffers after a lack of them.
    pub fn guest_has_buffers(&mut self, now: Instant, port: &mut impl GuestPort) {
        self.begin(now);
        if self.core.send_waiting(port) {
            self.nat.guest_has_buffers(&mut self.core, port);
        }
    }

    /// Addresses of the host went and did not come back.
    pub fn addresses_gone(&mut self, now: Instant, port: &mut impl GuestPort) {
        self.begin(now);
        self.nat.addresses_gone(&mut self.core, port);
    }

    /// Carries out the deadlines that came up.
    pub fn run_timers(&mut self, now: Instant, port: &mut impl GuestPort) {
        self.begin(now);
        self.reassembly.expire(&mut self.core, port);
        self.nat.run_timers(&mut self.core, port);
    }

    /// The end of a batch of frames: what was queued of them leaves before their memory is the guest's
    /// again.
    pub fn end_of_frames(&mut self, port: &mut impl GuestPort) {
        self.nat.end_of_frames(&mut self.core, port);
    }

    /// The end of a batch: what is owed is sent. Returns whether there is more to do at once.
    pub fn flush(&mut self, port: &mut impl GuestPort) -> bool {
        self.nat.flush(&mut self.core, port);
        self.nat.has_more()
    }

    /// When [`Engine::run_timers`] is to be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadlines =
            [self.core.timers.next(), self.reassembly.next_deadline(), self.core.lines.next_deadline()];
        deadlines.into_iter().flatten().min()
    }

    /// The next question for the upstream resolvers.
    pub fn next_dns_forward(&mut self) -> Option<DnsForward> {
        self.gateway.next_forward()
    }

    /// Whether every frame so far had a receive buffer. If not, answers had better wait: past a bound,
    /// frames for a guest that does not receive are dropped.
    pub fn guest_keeps_up(&self) -> bool {
        self.core.guest_keeps_up()
    }

    /// An upstream's answer.
    pub fn dns_answer(&mut self, now: Instant, port: &mut impl GuestPort, id: u64, answer: &[u8]) {
        self.begin(now);
        self.gateway.dns_answer(&mut self.core, port, id, answer);
    }

    /// Shows flows to a walk.
    pub fn list_flows(&self, walk: &mut Walk<'_>) {
        self.nat.list_flows(walk);
    }

    /// Ends a flow; both its ends are told, where its protocol can. False if there is none of this name.
    pub fn end_flow(&mut self, now: Instant, port: &mut impl GuestPort, id: FlowId) -> bool {
        self.begin(now);
        match id.table() {
            Some(Table::Tcp) => self.nat.end_stream(&mut self.core, port, id),
            Some(Table::Datagram) => self.nat.end_exchange(&mut self.core, id),
            Some(Table::Packet) | None => false,
        }
    }

    /// Lets no flow begin any more; those under way go on.
    pub fn drain(&mut self) {
        self.core.draining = true;
    }

    /// Flows, and datagram sockets that carry something.
    pub fn flows(&self) -> usize {
        self.nat.used()
    }

    /// Flows that begin and end.
    pub fn flow_news(&mut self) -> &mut NewsList {
        &mut self.core.flow_news
    }

    /// The guest is gone or began anew: its flows end, here and at every other worker; the world sees
    /// RST.
    pub fn guest_reset(&mut self) {
        match &self.core.home {
            Some(home) => {
                home.directory.guest_started();
                self.notice_guest_start();
                self.tell_others(|| Letter::GuestReset);
            }
            None => self.forget_guest(),
        }
    }

    /// What every entry begins with.
    fn begin(&mut self, now: Instant) {
        self.core.now = now;
        self.notice_guest_start();
    }

    /// Forgets the guest if it began anew, whichever worker saw that.
    fn notice_guest_start(&mut self) {
        let Some(home) = &self.core.home else { return };
        let guest_starts = home.directory.guest_starts();
        if guest_starts != self.guest_starts {
            self.guest_starts = guest_starts;
            self.forget_guest();
        }
    }

    /// The guest has this address no more: what it began there is over, and the world is told.
    fn forget_address(&mut self, addr: IpAddr) {
        self.nat.reset_address(&mut self.core, addr);
        self.core.forget_neighbour(addr);
    }

    fn forget_guest(&mut self) {
        self.waiting.clear();
        self.sent_on.clear();
        self.nat.reset_all(&mut self.core);
        self.reassembly = Reassembly::default();
        self.gateway.forget_guest();
        self.core.forget_guest();
    }
}

/// Checks the checksum of an ICMP message.
fn verify_icmp(incoming: &Incoming<'_>) -> Result<(), DropReason> {
    let mut sum = checksum::Accumulator::new();
    incoming.whole.add_to(&mut sum);
    if sum.finish() == 0 { Ok(()) } else { Err(DropReason::Checksum) }
}

/// Checks the transport checksum where the guest computed one. A partial checksum means the frame
/// never left its memory, so there is nothing to check.
fn verify(incoming: &Incoming<'_>, protocol: Protocol, message: &Payload<'_>) -> Result<(), DropReason> {
    if let Checksum::Partial { .. } = incoming.checksum {
        return Ok(());
    }
    let (src, dst) = (incoming.ip.src.into(), incoming.ip.dst.into());
    let mut sum = checksum::pseudo_header(src, dst, protocol, message.len());
    message.add_to(&mut sum);
    if sum.finish() == 0 { Ok(()) } else { Err(DropReason::Checksum) }
}
