//! What every part of the engine shares: the network's addresses, counters, neighbours, timers and
//! the frames that wait for receive buffers.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};

use hashbrown::HashMap;

use super::counters::{Counters, DropReason};
use super::emit;
use super::flows::NewsList;
use super::guest_port::{GuestPort, ReserveError};
use super::lines::Lines;
use super::placement::{Home, Place, WorkerId};
use super::timers::Timers;
use crate::addr::MacAddr;
use crate::config::Lan;
use crate::frame::{Payload, QueuePair};
use crate::limits;
use crate::rate::Rate;
use crate::time::Instant;
use crate::wire::arp;
use crate::wire::icmpv4::{Message, UnreachableCode};
use crate::wire::vnet::VnetHeader;

/// Where a guest address was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its MAC address.
    pub mac: MacAddr,
    /// The queue pair it last used.
    pub pair: QueuePair,
}

/// Whom a published port leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The one guest there is: the configured address, else the one that has the newest lease.
    #[default]
    TheGuest,
    /// One of several guests, by a number that whoever publishes its ports has chosen.
    OneOf(u64),
}

/// Shared state of one engine.
#[derive(Debug)]
pub struct Core {
    /// The guest's network.
    pub lan: Lan,
    /// The MTU towards the guest now: the smaller of the configured and the front-end's.
    pub ip_mtu: u16,
    /// Time of the current batch.
    pub now: Instant,
    /// What happened.
    pub counters: Counters,
    /// Deadlines.
    pub timers: Timers,
    /// This worker's place among others, if there are others.
    pub home: Option<Home>,
    /// No flow may begin any more: the process is to end with the last.
    pub draining: bool,
    neighbours: HashMap<IpAddr, Neighbour, foldhash::quality::RandomState>,
    /// The one learned last: nearly every frame comes from it.
    newest_neighbour: Option<(IpAddr, Neighbour)>,
    /// Whom published ports lead to.
    primary: Option<IpAddr>,
    /// Of several guests, those whose ports are published and that have an address.
    owners: HashMap<u64, IpAddr, foldhash::quality::RandomState>,
    /// The same the other way round.
    owners_by_addr: HashMap<IpAddr, u64, foldhash::quality::RandomState>,
    outbox: VecDeque<Queued>,
    icmp_rate: Rate,
    next_ident: u16,
    /// Flows that begin and end.
    pub flow_news: NewsList,
    /// Who waits for a limit.
    pub lines: Lines,
}

#[derive(Debug)]
struct Queued {
    pair: QueuePair,
    vnet: VnetHeader,
    frame: Box<[u8]>,
}

impl Core {
    /// Shared state for the network `lan`.
    pub fn new(lan: Lan) -> Core {
        Core {
            lan,
            ip_mtu: lan.ip_mtu.get(),
            now: Instant::ZERO,
            counters: Counters::default(),
            timers: Timers::default(),
            home: None,
            draining: false,
            neighbours: HashMap::default(),
            newest_neighbour: None,
            primary: lan.guest.map(IpAddr::V4),
            owners: HashMap::default(),
            owners_by_addr: HashMap::default(),
            outbox: VecDeque::new(),
            icmp_rate: Rate::new(limits::ICMP_ERRORS_BURST, limits::ICMP_ERRORS_PER_SECOND),
            next_ident: 0,
            flow_news: NewsList::default(),
            lines: Lines::default(),
        }
    }

    /// This worker has `place` from now on.
    pub fn claim(&self, place: Place) {
        if let Some(home) = &self.home {
            home.directory.set(place, home.own);
        }
    }

    /// This worker has `place` no more.
    pub fn release(&self, place: &Place) {
        if let Some(home) = &self.home {
            home.directory.clear(place, home.own);
        }
    }

    /// The other worker that has `place`, if one has.
    pub fn elsewhere(&self, place: &Place) -> Option<WorkerId> {
        self.home.as_ref().and_then(|home| home.elsewhere(place))
    }

    /// Whether a worker, this one or another, has `place` or will have it when it comes.
    pub fn is_had(&self, place: &Place) -> bool {
        self.home.as_ref().is_some_and(|home| home.directory.owner(place).is_some())
    }

    /// The first worker, which has the published ports, if this is another.
    pub fn not_first(&self) -> Option<WorkerId> {
        self.home.as_ref().filter(|home| home.own != WorkerId(0)).map(|_| WorkerId(0))
    }

    /// The queue pair for frames that belong to none.
    pub fn first_pair(&self) -> QueuePair {
        self.home.as_ref().map(Home::first_pair).unwrap_or_default()
    }

    /// The gateway's address, family-neutral.
    pub fn gateway(&self) -> IpAddr {
        IpAddr::V4(self.lan.gateway)
    }

    /// Whether `addr` is one the guest may own.
    pub fn is_guest_address(&self, addr: Ipv4Addr) -> bool {
        self.lan.subnet.is_host(addr) && addr != self.lan.gateway
    }

    /// Remembers where a guest address was seen; returns true if its MAC is new or has changed.
    pub fn learn(&mut self, addr: IpAddr, neighbour: Neighbour) -> bool {
        if self.newest_neighbour == Some((addr, neighbour)) {
            return false;
        }
        self.newest_neighbour = Some((addr, neighbour));
        self.primary.get_or_insert(addr);
        if let Some(known) = self.neighbours.get_mut(&addr) {
            let changed = known.mac != neighbour.mac;
            *known = neighbour;
            return changed;
        }
        if self.neighbours.len() >= limits::NEIGHBOURS_MAX {
            // A guest that invents addresses loses them all, its real one until its next frame.
            self.neighbours.clear();
        }
        self.neighbours.insert(addr, neighbour);
        true
    }

    /// Where a guest address was last seen.
    pub fn neighbour(&self, addr: IpAddr) -> Option<Neighbour> {
        if let Some((newest, neighbour)) = self.newest_neighbour
            && newest == addr
        {
            return Some(neighbour);
        }
        self.neighbours.get(&addr).copied()
    }

    /// Forgets one neighbour: the guest gave its address up.
    pub fn forget_neighbour(&mut self, addr: IpAddr) {
        self.neighbours.remove(&addr);
        self.newest_neighbour = None;
        if self.lan.guest.is_none() && self.primary == Some(addr) {
            self.primary = None;
        }
    }

    /// Forgets every neighbour and waiting frame: the guest started anew.
    pub fn forget_guest(&mut self) {
        self.neighbours.clear();
        self.newest_neighbour = None;
        self.outbox.clear();
        self.primary = self.lan.guest.map(IpAddr::V4);
    }

    /// The guest address published ports lead to: the configured one, else the first one seen.
    pub fn primary_guest(&self) -> Option<IpAddr> {
        self.primary
    }

    /// A lease was given: published ports lead to its holder unless configured otherwise.
    pub fn set_primary_guest(&mut self, addr: IpAddr) {
        if self.lan.guest.is_none() {
            self.primary = Some(addr);
        }
    }

    /// The address that published ports of `owner` lead to.
    pub fn guest_of(&self, owner: Owner) -> Option<IpAddr> {
        match owner {
            Owner::TheGuest => self.primary,
            Owner::OneOf(number) => self.owners.get(&number).copied(),
        }
    }

    /// Those whose published ports lead to `addr`.
    pub fn owners_at(&self, addr: IpAddr) -> impl Iterator<Item = Owner> {
        let the_guest = (self.primary == Some(addr)).then_some(Owner::TheGuest);
        let one = self.owners_by_addr.get(&addr).copied().map(Owner::OneOf);
        the_guest.into_iter().chain(one)
    }

    /// Guest `number` of several has this address from now on, or none. What it had before.
    pub fn set_owner(&mut self, number: u64, addr: Option<IpAddr>) -> Option<IpAddr> {
        let before = match addr {
            Some(addr) => self.owners.insert(number, addr),
            None => self.owners.remove(&number),
        };
        if let Some(before) = before
            && self.owners_by_addr.get(&before) == Some(&number)
        {
            self.owners_by_addr.remove(&before);
        }
        if let Some(addr) = addr {
            self.owners_by_addr.insert(addr, number);
        }
        before
    }

    /// Asks who holds `addr` (RFC 826); the answer arrives as any ARP packet does.
    pub fn ask_for(&mut self, port: &mut impl GuestPort, addr: IpAddr) {
        let IpAddr::V4(target_ip) = addr else { return };
        let request = arp::Packet {
            operation: arp::Operation::Request,
            sender_mac: MacAddr::GATEWAY,
            sender_ip: self.lan.gateway,
            target_mac: MacAddr::ZERO,
            target_ip,
        };
        self.send_arp(port, self.first_pair(), MacAddr::BROADCAST, &request);
    }

    /// Sends an ARP packet to `to`.
    pub fn send_arp(
        &mut self,
        port: &mut impl GuestPort,
        pair: QueuePair,
        to: MacAddr,
        packet: &arp::Packet,
    ) {
        self.send(port, pair, VnetHeader::default(), &packet.frame(to, MacAddr::GATEWAY));
    }

    /// A fresh IPv4 identification for a packet that may be fragmented. Workers share none: fragments of
    /// two datagrams would become one at the guest (RFC 6864, 4.3).
    pub fn next_ident(&mut self) -> u16 {
        let (own, workers) = self.home.as_ref().map_or((0, 1), |home| (home.own.0, home.workers));
        let each = u16::MAX / u16::from(workers);
        self.next_ident = (self.next_ident + 1) % each;
        self.next_ident * u16::from(workers) + u16::from(own)
    }

    /// Sends a frame from host memory, or queues it until the guest has buffers.
    pub fn send(&mut self, port: &mut impl GuestPort, pair: QueuePair, vnet: VnetHeader, frame: &[u8]) {
        if self.outbox.is_empty() {
            match port.send(pair, vnet, frame) {
                Ok(()) => {
                    self.counters.frames_to_guest += 1;
                    return;
                }
                Err(ReserveError::Full) => {}
                Err(ReserveError::Down | ReserveError::TooSmall) => {
                    return self.counters.drop_aside(DropReason::GuestNotReceiving);
                }
            }
        }
        if self.outbox.len() >= limits::OUTBOX_FRAMES_MAX {
            return self.counters.drop_aside(DropReason::GuestNotReceiving);
        }
        self.outbox.push_back(Queued { pair, vnet, frame: frame.into() });
    }

    /// Sends a frame whose headers and payload lie apart in host memory, or queues it.
    pub fn send_parts(
        &mut self,
        port: &mut impl GuestPort,
        pair: QueuePair,
        vnet: VnetHeader,
        head: &[u8],
        payload: &[u8],
    ) {
        if self.outbox.is_empty() && port.send_parts(pair, vnet, head, payload).is_ok() {
            self.counters.frames_to_guest += 1;
            return;
        }
        let mut frame = Vec::with_capacity(head.len() + payload.len());
        frame.extend_from_slice(head);
        frame.extend_from_slice(payload);
        self.send(port, pair, vnet, &frame);
    }

    /// Sends what waits, as far as there are buffers. Returns whether all of it is gone.
    pub fn send_waiting(&mut self, port: &mut impl GuestPort) -> bool {
        while let Some(queued) = self.outbox.front() {
            match port.send(queued.pair, queued.vnet, &queued.frame) {
                Err(ReserveError::Full) => return false,
                Ok(()) => self.counters.frames_to_guest += 1,
                Err(_) => self.counters.drop_aside(DropReason::GuestNotReceiving),
            }
            self.outbox.pop_front();
        }
        true
    }

    /// Whether every frame so far had a receive buffer.
    pub fn guest_keeps_up(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Sends an ICMP error about `packet` (the first bytes of an IP packet of the guest), within the
    /// rate limit.
    pub fn send_icmp_error(
        &mut self,
        port: &mut impl GuestPort,
        to: Neighbour,
        message: Message,
        packet: &[u8],
    ) {
        if !self.take_icmp_token() {
            return self.counters.drop_aside(DropReason::RateLimited);
        }
        let ident = self.next_ident();
        let mut frame = [0u8; emit::ICMP_ERROR_FRAME_BYTES_MAX];
        if let Some(len) = emit::icmp_error(&mut frame, self.lan.gateway, to.mac, ident, message, packet) {
            self.send(port, to.pair, VnetHeader::default(), &frame[..len]);
        }
    }

    /// [`Core::send_icmp_error`] with "destination unreachable".
    pub fn send_unreachable(
        &mut self,
        port: &mut impl GuestPort,
        to: Neighbour,
        code: UnreachableCode,
        packet: &[u8],
    ) {
        self.send_icmp_error(port, to, Message::Unreachable { code, next_hop_mtu: 0 }, packet);
    }

    /// Sends an ICMP error of `from`, whose translated quote of the guest's packet is `quote`, within the rate
    /// limit.
    pub fn relay_icmp_error(
        &mut self,
        port: &mut impl GuestPort,
        to: Neighbour,
        (from, guest): (IpAddr, IpAddr),
        message: Message,
        quote: &[u8],
    ) {
        if !self.take_icmp_token() {
            return self.counters.drop_aside(DropReason::RateLimited);
        }
        let ident = self.next_ident();
        if let Some(head) = emit::icmp(to.mac, from, guest, message, &Payload::from_host(quote), ident) {
            self.send_parts(port, to.pair, head.vnet, head.bytes(), quote);
        }
    }

    fn take_icmp_token(&mut self) -> bool {
        self.icmp_rate.take(self.now)
    }

    /// Whether the rate limit allows an ICMP error now.
    pub fn has_icmp_token(&mut self) -> bool {
        self.icmp_rate.has(self.now)
    }
}
