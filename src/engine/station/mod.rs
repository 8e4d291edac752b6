//! The one address that vunet holds on a link when it translates the guest's packets onto it: told, or leased
//! by that link's DHCP.
//!
//! It is probed for before it is used and announced then, defended and, if leased, given up as RFC 5227 says;
//! ARP is answered for it and asked from it. All workers share one station; each frame needs it only when the
//! next hop is not known to its worker.
//!
//! Pure: what is to be sent waits in [`Station::next_frame`]. Read first: RFC 5227, 2; RFC 826.

mod neighbours;

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::addr::{Ipv4Subnet, MacAddr};
use crate::config::{LinkAddress, StationAddress};
use crate::engine::emit;
use crate::limits;
use crate::service::dhcp::client::{ClientEvent, ClientMessage, DhcpClient};
use crate::service::dhcp::{CLIENT_PORT, SERVER_PORT};
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::{arp, udp};

use self::neighbours::{Found, Neighbours, Question};

/// Questions whether somebody has the address (RFC 5227, 2.1.1).
const PROBES: u8 = 3;
/// Between them, and behind the last. The RFC says seconds; a guest boots within that, and a host that answers
/// at all does so in a millisecond.
const PROBE_PAUSE: Duration = Duration::from_millis(200);
/// Announcements once nobody has it (RFC 5227, 2.3).
const ANNOUNCEMENTS: u8 = 2;
/// Between them.
const ANNOUNCE_PAUSE: Duration = Duration::from_secs(2);
/// How long the guest's packets wait in its ring for the router's first answer.
const ROUTER_PATIENCE: Duration = Duration::from_secs(1);
/// How long after somebody had the address it is tried again, and between two defences of it (RFC 5227, 2.4).
const CONFLICT_PAUSE: Duration = Duration::from_secs(10);

/// How long until an address is asked for again after one that cannot be used; twice as long each time, up to
/// [`REFUSED_WAIT_MAX`].
const REFUSED_WAIT: Duration = Duration::from_secs(10);
/// See [`REFUSED_WAIT`].
const REFUSED_WAIT_MAX: Duration = Duration::from_secs(640);

/// A station's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StationConfig {
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its IPv4 address.
    pub address: StationAddress,
    /// The guest's network, which the link's must not overlap.
    pub guests: Ipv4Subnet,
    /// Random: spreads questions for a lease over time.
    pub seed: u64,
}

/// Where a packet goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// To this MAC address; it need not be looked up again before the time given.
    At(MacAddr, Instant),
    /// Who has the next address is not known yet; it was asked for.
    Asked(Ipv4Addr),
    /// Nobody has it, or no router leads there.
    Unreachable,
    /// Who has it is not known, and not asked for either: too many others are.
    Withheld,
    /// Whether the address is anybody else's is being asked, or the router for the first time; it takes a moment.
    NotYet,
    /// The station has no address, or lost it.
    NoAddress,
}

/// How far the address is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// There is none, or somebody has it.
    None,
    /// Whether somebody has it is being asked, `sent` times so far.
    Probing { held: LinkAddress, sent: u8, due: Instant },
    /// It is ours since `since`; `left` announcements are due.
    Ours { held: LinkAddress, since: Instant, left: u8, due: Instant },
    /// Somebody had it. It is tried again then.
    Taken { held: LinkAddress, until: Instant },
}

/// The station.
#[derive(Debug)]
pub struct Station {
    config: StationConfig,
    claim: Claim,
    dhcp: Option<DhcpClient>,
    neighbours: Neighbours,
    outbox: VecDeque<Box<[u8]>>,
    /// To the lease's server, whose MAC address is asked for.
    to_server: Option<ClientMessage>,
    /// Leases in a row that could not be used.
    refused: u32,
    defended: Option<Instant>,
    /// Changes with everything a worker may have kept.
    version: u64,
    ident: u16,
}

impl Station {
    /// A station that claims its address, or asks for one, at once.
    pub fn new(now: Instant, config: StationConfig) -> Station {
        let (claim, dhcp) = match config.address {
            StationAddress::Fixed(held) => (Claim::Probing { held, sent: 0, due: now }, None),
            StationAddress::Dhcp => (Claim::None, Some(DhcpClient::new(now, config.mac, config.seed))),
        };
        Station {
            config,
            claim,
            dhcp,
            neighbours: Neighbours::default(),
            outbox: VecDeque::new(),
            to_server: None,
            refused: 0,
            defended: None,
            version: 1,
            ident: config.seed as u16,
        }
    }

    /// The address, while it is ours.
    pub fn held(&self) -> Option<LinkAddress> {
        match self.claim {
            Claim::Ours { held, .. } => Some(held),
            _ => None,
        }
    }

    /// Its MAC address.
    pub fn mac(&self) -> MacAddr {
        self.config.mac
    }

    /// Changes with the address and with what is known of neighbours.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether an answer of DHCP may come, which is longer than other frames that are judged.
    pub fn awaits_dhcp(&self) -> bool {
        self.dhcp.as_ref().is_some_and(DhcpClient::awaits_answer)
    }

    /// When [`Station::poll`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        let claim = match self.claim {
            Claim::Probing { due, .. } | Claim::Taken { until: due, .. } => Some(due),
            Claim::Ours { left, due, .. } => (left > 0).then_some(due),
            Claim::None => None,
        };
        let dhcp = self.dhcp.as_ref().map(DhcpClient::deadline);
        [claim, dhcp, self.neighbours.deadline()].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Instant) {
        self.poll_claim(now);
        if let Some(dhcp) = &mut self.dhcp {
            let (message, event) = dhcp.poll(now);
            if let Some(message) = message {
                self.to_server = Some(message);
            }
            self.leased(now, event);
        }
        let mut questions = Vec::new();
        if self.neighbours.poll(now, |question| questions.push(question)) {
            self.version += 1;
        }
        questions.into_iter().for_each(|question| self.ask(question));
        self.send_to_server(now);
    }

    /// Takes a frame of the link that is not to be translated: ARP, and DHCP for us. `head` is as much of it as
    /// was read. Returns whether it was one.
    pub fn receive(&mut self, now: Instant, head: &[u8]) -> bool {
        let Ok(header) = ethernet::Header::parse(head) else { return false };
        let packet = &head[ethernet::HEADER_BYTES..];
        match header.ethertype {
            EtherType::ARP => {
                if let Ok(packet) = arp::Packet::parse(packet) {
                    self.arp(now, &packet);
                }
                true
            }
            EtherType::IPV4 => self.dhcp_answer(now, packet),
            _ => false,
        }
    }

    /// Where a packet to `dst` goes; asks if that is not known.
    pub fn next_hop(&mut self, now: Instant, dst: Ipv4Addr) -> NextHop {
        let Some(held) = self.held() else {
            let is_asking = matches!(self.claim, Claim::Probing { .. });
            return if is_asking { NextHop::NotYet } else { NextHop::NoAddress };
        };
        let target = if held.subnet.contains(dst) { Some(dst) } else { held.router };
        // A directed broadcast is not forwarded (RFC 2644).
        let Some(target) = target.filter(|target| held.subnet.is_host(*target)) else {
            return NextHop::Unreachable;
        };
        let (found, question) = self.neighbours.find(now, target, held.router == Some(target));
        if let Some(question) = question {
            self.ask(question);
        }
        match found {
            Found::Known(mac, until) => NextHop::At(mac, until),
            // The guest's first packets came while the address was probed for, and more than may be kept.
            Found::Asked if held.router == Some(target) && self.is_new(now) => NextHop::NotYet,
            Found::Asked => NextHop::Asked(target),
            Found::Gone => NextHop::Unreachable,
            Found::Withheld => NextHop::Withheld,
        }
    }

    /// Whether the address has been ours for so short a time that the router may not have answered yet.
    fn is_new(&self, now: Instant) -> bool {
        matches!(self.claim, Claim::Ours { since, .. } if now.since(since) < ROUTER_PATIENCE)
    }

    /// Gives a leased address back; the frame that says so is the last.
    pub fn release(&mut self) {
        if let Some(message) = self.dhcp.as_mut().and_then(DhcpClient::release) {
            let to = self.known_hop(message.dst);
            self.send_dhcp(to, &message);
        }
    }

    /// The next frame to send.
    pub fn next_frame(&mut self) -> Option<Box<[u8]>> {
        self.outbox.pop_front()
    }

    fn set_claim(&mut self, claim: Claim) {
        let before = self.held();
        self.claim = claim;
        self.version += 1;
        if self.held() != before {
            self.neighbours.clear();
        }
    }

    fn poll_claim(&mut self, now: Instant) {
        match self.claim {
            Claim::Probing { held, sent, due } if now >= due && sent < PROBES => {
                self.claim = Claim::Probing { held, sent: sent + 1, due: now + PROBE_PAUSE };
                self.send_request(Ipv4Addr::UNSPECIFIED, held.addr, None);
            }
            Claim::Probing { held, due, .. } if now >= due => {
                let due = now + ANNOUNCE_PAUSE;
                self.set_claim(Claim::Ours { held, since: now, left: ANNOUNCEMENTS - 1, due });
                self.announce(&held);
                tracing::info!(
                    address = %held.addr, subnet = %held.subnet, router = ?held.router, mac = %self.config.mac,
                    "the link's address is ours; the guest's packets leave from it"
                );
                if let Some(router) = held.router {
                    // The guest's first packet need not wait for it.
                    let (_, question) = self.neighbours.find(now, router, true);
                    question.into_iter().for_each(|question| self.ask(question));
                }
            }
            Claim::Ours { held, since, left, due } if left > 0 && now >= due => {
                self.claim = Claim::Ours { held, since, left: left - 1, due: now + ANNOUNCE_PAUSE };
                self.announce(&held);
            }
            Claim::Taken { held, until } if now >= until => {
                self.claim = Claim::Probing { held, sent: 0, due: now };
                self.poll_claim(now);
            }
            _ => {}
        }
    }

    /// What became of a lease.
    fn leased(&mut self, now: Instant, event: Option<ClientEvent>) {
        match event {
            None => {}
            Some(ClientEvent::Lost) => {
                tracing::warn!(
                    "the address leased on the link is ours no more; nothing leaves until another is"
                );
                self.set_claim(Claim::None);
            }
            Some(ClientEvent::Bound(lease)) => {
                let held = LinkAddress { addr: lease.addr, subnet: lease.subnet, router: lease.router };
                if held.subnet.overlaps(self.config.guests) {
                    return self.refuse(now, &held);
                }
                self.refused = 0;
                match self.claim {
                    // Only the router or the prefix is another: flows go on.
                    Claim::Ours { held: before, since, left, due }
                        if before.addr == held.addr && before != held =>
                    {
                        self.claim = Claim::Ours { held, since, left, due };
                        self.neighbours.clear();
                        self.version += 1;
                    }
                    Claim::Ours { held: now_held, .. } | Claim::Probing { held: now_held, .. }
                        if now_held == held => {}
                    _ => self.set_claim(Claim::Probing { held, sent: 0, due: now }),
                }
                self.poll_claim(now);
            }
        }
    }

    fn arp(&mut self, now: Instant, packet: &arp::Packet) {
        if packet.sender_mac == self.config.mac {
            return;
        }
        if self.is_conflict(packet) {
            return self.conflict(now, packet.sender_mac);
        }
        let Some(held) = self.held() else { return };
        if !held.subnet.is_host(packet.sender_ip) {
            // Probes of others, and hosts of other networks, are answered all the same.
            if packet.operation == arp::Operation::Request && packet.target_ip == held.addr {
                self.reply(&held, packet);
            }
            return;
        }
        let asked = packet.operation == arp::Operation::Request && packet.target_ip == held.addr;
        if self.neighbours.learn(now, packet.sender_ip, packet.sender_mac, asked) {
            self.version += 1;
            self.send_to_server(now);
        }
        if asked {
            self.reply(&held, packet);
        }
    }

    /// Whether another host has the address, or asks whether it can have it while we do (RFC 5227, 2.1.1).
    fn is_conflict(&self, packet: &arp::Packet) -> bool {
        match self.claim {
            Claim::Probing { held, .. } => {
                let probes = packet.sender_ip.is_unspecified() && packet.operation == arp::Operation::Request;
                packet.sender_ip == held.addr || probes && packet.target_ip == held.addr
            }
            Claim::Ours { held, .. } => packet.sender_ip == held.addr,
            Claim::None | Claim::Taken { .. } => false,
        }
    }

    fn conflict(&mut self, now: Instant, other: MacAddr) {
        let (held, is_ours) = match self.claim {
            Claim::Probing { held, .. } => (held, false),
            Claim::Ours { held, .. } => (held, true),
            Claim::None | Claim::Taken { .. } => return,
        };
        let is_first = self.defended.is_none_or(|at| now.since(at) >= CONFLICT_PAUSE);
        if is_ours && (is_first || self.dhcp.is_none()) {
            // Defended once in a while; one that was told to us is never given up (RFC 5227, 2.4, b and c).
            if is_first {
                self.defended = Some(now);
                tracing::warn!(address = %held.addr, %other, "another host of the link uses our address too");
                self.announce(&held);
            }
            return;
        }
        tracing::error!(
            address = %held.addr, %other,
            "another host of the link has the address; nothing leaves until one is ours (--nat-address)"
        );
        match self.dhcp.as_mut() {
            Some(dhcp) => {
                let decline = dhcp.decline(now);
                self.set_claim(Claim::None);
                decline.iter().for_each(|message| self.send_dhcp(None, message));
            }
            None => self.set_claim(Claim::Taken { held, until: now + CONFLICT_PAUSE }),
        }
    }

    /// Takes `packet`, as much of an IPv4 packet as was read, if it is for our port of DHCP.
    fn dhcp_answer(&mut self, now: Instant, packet: &[u8]) -> bool {
        let Some(dhcp) = &mut self.dhcp else { return false };
        let Ok(header) = ipv4::Header::parse(packet, packet.len()) else { return false };
        if header.protocol != Protocol::UDP || header.is_fragment() {
            return false;
        }
        let datagram = &packet[header.header_bytes..header.header_bytes + header.payload_bytes];
        let Ok(datagram_header) = udp::Header::parse(datagram, datagram.len()) else { return false };
        if (datagram_header.src_port, datagram_header.dst_port) != (SERVER_PORT, CLIENT_PORT) {
            return false;
        }
        let payload = &datagram[udp::HEADER_BYTES..datagram_header.len_bytes];
        let event = dhcp.receive(now, payload);
        self.leased(now, event);
        true
    }

    fn announce(&mut self, held: &LinkAddress) {
        self.send_request(held.addr, held.addr, None);
    }

    fn ask(&mut self, question: Question) {
        if let Some(held) = self.held() {
            self.send_request(held.addr, question.target, question.mac);
        }
    }

    fn send_request(&mut self, sender_ip: Ipv4Addr, target_ip: Ipv4Addr, to: Option<MacAddr>) {
        let packet = arp::Packet {
            operation: arp::Operation::Request,
            sender_mac: self.config.mac,
            sender_ip,
            target_mac: MacAddr::ZERO,
            target_ip,
        };
        self.send_arp(to.unwrap_or(MacAddr::BROADCAST), &packet);
    }

    fn reply(&mut self, held: &LinkAddress, asked: &arp::Packet) {
        if !asked.sender_mac.is_unicast() {
            return;
        }
        let packet = arp::Packet {
            operation: arp::Operation::Reply,
            sender_mac: self.config.mac,
            sender_ip: held.addr,
            target_mac: asked.sender_mac,
            target_ip: asked.sender_ip,
        };
        self.send_arp(asked.sender_mac, &packet);
    }

    fn send_arp(&mut self, dst: MacAddr, packet: &arp::Packet) {
        self.send(&packet.frame(dst, self.config.mac));
    }

    /// Gives a lease back that cannot be used, and asks again after a while: the link may have changed by then.
    fn refuse(&mut self, now: Instant, held: &LinkAddress) {
        let wait = (REFUSED_WAIT * 2u32.saturating_pow(self.refused)).min(REFUSED_WAIT_MAX);
        self.refused += 1;
        tracing::error!(
            leased = %held.addr, link = %held.subnet, guests = %self.config.guests, again_in = ?wait,
            "the link's network overlaps the guest's, so the lease is given back and nothing leaves: give the guest another \
             network with --subnet"
        );
        let message = self.dhcp.as_mut().and_then(|dhcp| dhcp.refuse(now, wait));
        self.set_claim(Claim::None);
        if let Some(message) = message {
            self.send_dhcp(None, &message);
        }
    }

    /// Sends the message to a DHCP server, once its MAC address is known if it goes to a single one (RFC 2131, 4.4.4
    /// and 4.4.5). One that nobody answers for is given up: the client repeats it, and broadcasts in the end.
    fn send_to_server(&mut self, now: Instant) {
        let Some(message) = self.to_server.take() else { return };
        if message.dst.is_broadcast() {
            return self.send_dhcp(None, &message);
        }
        match self.next_hop(now, message.dst) {
            NextHop::At(mac, _) => self.send_dhcp(Some(mac), &message),
            NextHop::Asked(_) | NextHop::NotYet => self.to_server = Some(message),
            NextHop::Unreachable | NextHop::Withheld | NextHop::NoAddress => {}
        }
    }

    /// The MAC address that leads to `dst`, if it is known.
    fn known_hop(&self, dst: Ipv4Addr) -> Option<MacAddr> {
        let held = self.held()?;
        let target = if held.subnet.contains(dst) { Some(dst) } else { held.router };
        self.neighbours.known(target?)
    }

    /// Sends it to `mac`, or to everybody: a broadcast reaches the server whoever it is.
    fn send_dhcp(&mut self, mac: Option<MacAddr>, message: &ClientMessage) {
        let (from, to) = ((message.src, CLIENT_PORT).into(), (message.dst, SERVER_PORT).into());
        let datagram = emit::datagram(from, to, &message.payload);
        let mut frame = vec![0; ethernet::HEADER_BYTES + ipv4::HEADER_BYTES];
        let dst = mac.unwrap_or(MacAddr::BROADCAST);
        ethernet::Header { dst, src: self.config.mac, ethertype: EtherType::IPV4 }.emit(&mut frame);
        self.ident = self.ident.wrapping_add(1);
        let packet = ipv4::Header {
            src: message.src,
            dst: message.dst,
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            ident: self.ident,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset_bytes: 0,
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes: datagram.len(),
        };
        packet.emit(&mut frame[ethernet::HEADER_BYTES..]);
        frame.extend_from_slice(&datagram);
        self.send(&frame);
    }

    fn send(&mut self, frame: &[u8]) {
        // Lost questions are repeated.
        if self.outbox.len() < limits::STATION_OUTBOX_MAX {
            self.outbox.push_back(frame.into());
        }
    }
}

#[cfg(test)]
mod tests;
