//! The DHCP server: one UDP payload in, at most one out.
//!
//! [`DhcpServer::handle`] takes what a client sent to port 67 and says what to send back and where
//! to, or why nothing is sent. It is authoritative for the guest's subnet: there is no other
//! server, so a client that asks for an address of another network, or for one somebody else
//! holds, is told so at once (NAK) and starts over.
//!
//! `message` reads requests and writes replies, byte for byte; this file decides. Addresses come
//! from an [`IpAllocator`]: the memory of this process, or the store of a named network. A store that
//! cannot be read or written makes the server silent: clients repeat themselves, and a wrong answer lasts a
//! day.
//!
//! Read first: RFC 2131, 3 and 4.3 (with table 4 for the client's states), RFC 2132.

pub mod client;
mod message;

use std::net::Ipv4Addr;

use tokio::sync::watch;

use dhcproto::v4::MessageType;

use crate::addr::MacAddr;
use crate::config::{DnsConfig, IpMtu, Lan};
use crate::limits::{DHCP_MESSAGES_BURST, DHCP_MESSAGES_PER_SECOND};
use crate::network::allocator::{Bind, Grant, IpAllocator, Lease, Refusal};
use crate::network::leases::LeaseTable;
use crate::network::store::StoreError;
use crate::rate::Rate;
use crate::service::dhcp::message::{Fault, ReplyWriter, Request};
use crate::time::Instant;

/// UDP port of servers and relays.
pub const SERVER_PORT: u16 = 67;
/// UDP port of clients.
pub const CLIENT_PORT: u16 = 68;

/// What a message did to a client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseChange {
    /// Offered, not taken yet.
    Offered,
    /// Leased anew.
    Bound,
    /// A running lease was prolonged.
    Renewed,
    /// The client gave it back.
    Released,
    /// The client found it in use by someone else.
    Declined,
}

/// A change of a client's address, worth a line of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseEvent {
    /// The client's hardware address.
    pub mac: MacAddr,
    /// The address.
    pub ip: Ipv4Addr,
    /// What became of it.
    pub change: LeaseChange,
}

/// A datagram to send: from the gateway's address and [`SERVER_PORT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpReply {
    /// Destination hardware address. The client may have no IP address yet and answer no ARP, so
    /// this one is to be used as it is.
    pub dst_mac: MacAddr,
    /// Destination address.
    pub dst_ip: Ipv4Addr,
    /// Destination port: a client's, or a relay's.
    pub dst_port: u16,
    /// The UDP payload, at least 300 bytes.
    pub payload: Vec<u8>,
    /// The change that this reply announces; `None` for NAK and for the answer to INFORM.
    pub lease: Option<LeaseEvent>,
    /// The name the client gave itself, if it is another's.
    pub name_refused: Option<String>,
}

/// Why a message is not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Silence {
    /// DHCP is switched off.
    Disabled,
    /// Too short, too long, or not a DHCP request in its fixed part.
    Malformed,
    /// Not from an Ethernet station: another hardware type, or a group or zero address.
    NotEthernet,
    /// Plain BOOTP, or a message type that servers do not take.
    NotForServers,
    /// A REQUEST that names no address, or an INFORM from outside the subnet.
    NoAddress,
    /// Relayed from a link that is not the guest's subnet, or with our own address as the relay's.
    ForeignRelay,
    /// The client chose, released to or declined another server.
    OtherServer,
    /// No address is free.
    PoolExhausted,
    /// The guest holds as many addresses of a shared network as one may.
    ShareUsed,
    /// On a shared network: another guest that is there holds the lease of the sender's hardware address.
    Elsewhere,
    /// On a shared network: for another station than the one that sent it, or by way of a relay.
    NotTheSender,
    /// On a shared network: more messages than a guest may send.
    TooMany,
    /// The store of the network's leases cannot be read or written, for this reason.
    Store(String),
    /// The client gave its address back; RELEASE has no answer.
    Released(LeaseEvent),
    /// The client declined its address; DECLINE has no answer.
    Declined(LeaseEvent),
    /// A RELEASE or DECLINE of an address that is not the sender's.
    NotTheirs,
}

/// What to do after a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Send this.
    Reply(DhcpReply),
    /// Send nothing.
    Silent(Silence),
}

/// The server of one guest's subnet.
#[derive(Debug)]
pub struct DhcpServer {
    enabled: bool,
    lan: Lan,
    leases: Box<dyn IpAllocator>,
    writer: ReplyWriter,
    shared: Option<Shared>,
    /// The address last bound, while it is.
    bound: watch::Sender<Option<Ipv4Addr>>,
}

/// What holds on a network of several guests only.
#[derive(Debug)]
struct Shared {
    /// Whether a guest may speak for others: it bridges or relays.
    trust_guest: bool,
    rate: Rate,
}

impl DhcpServer {
    /// A server for `lan` that hands out the gateway as router and, if `dns` is enabled, as
    /// resolver.
    pub fn new(lan: &Lan, dns: &DnsConfig) -> DhcpServer {
        DhcpServer::over(Box::new(LeaseTable::new(lan.subnet, lan.gateway, lan.guest)), lan, dns)
    }

    /// The same with the addresses of `leases`, whose pool is that of `lan`.
    pub fn over(leases: Box<dyn IpAllocator>, lan: &Lan, dns: &DnsConfig) -> DhcpServer {
        let writer = ReplyWriter::new(lan, dns);
        DhcpServer {
            enabled: lan.dhcp,
            lan: *lan,
            leases,
            writer,
            shared: None,
            bound: watch::Sender::new(None),
        }
    }

    /// Makes it the server of one of several guests that share a network: a guest speaks for itself only,
    /// unless `trust_guest`, and at a bounded rate ([`crate::limits::DHCP_MESSAGES_PER_SECOND`]).
    #[must_use]
    pub fn shared(mut self, trust_guest: bool) -> DhcpServer {
        self.shared =
            Some(Shared { trust_guest, rate: Rate::new(DHCP_MESSAGES_BURST, DHCP_MESSAGES_PER_SECOND) });
        self
    }

    /// The address of the guest that was bound last; none after it was given back.
    pub fn bound(&self) -> watch::Receiver<Option<Ipv4Addr>> {
        self.bound.subscribe()
    }

    fn note(&self, outcome: &Outcome) {
        let event = match outcome {
            Outcome::Reply(reply) => reply.lease,
            Outcome::Silent(Silence::Released(event) | Silence::Declined(event)) => Some(*event),
            Outcome::Silent(_) => None,
        };
        let Some(LeaseEvent { ip, change, .. }) = event else { return };
        self.bound.send_if_modified(|bound| {
            let before = *bound;
            match change {
                LeaseChange::Bound | LeaseChange::Renewed => *bound = Some(ip),
                LeaseChange::Released | LeaseChange::Declined if before == Some(ip) => *bound = None,
                LeaseChange::Offered | LeaseChange::Released | LeaseChange::Declined => {}
            }
            *bound != before
        });
    }

    /// Changes the MTU offered from now on.
    pub fn set_ip_mtu(&mut self, ip_mtu: IpMtu) {
        self.writer.set_ip_mtu(ip_mtu);
    }

    /// Sets the domains, besides the network's own, in which clients look for short names from their next
    /// message on.
    pub fn set_search(&mut self, domains: &[String]) {
        self.writer.set_search(domains);
    }

    /// Takes the payload of one UDP datagram that came to port 67 in a frame from `link_src`.
    pub fn handle(&mut self, now: Instant, link_src: MacAddr, udp_payload: &[u8]) -> Outcome {
        if !self.enabled {
            return Outcome::Silent(Silence::Disabled);
        }
        let request = match Request::parse(udp_payload) {
            Ok(request) => request,
            Err(fault) => return Outcome::Silent(fault.into()),
        };
        if let Some(silence) = self.refuse_stranger(now, link_src, &request) {
            return Outcome::Silent(silence);
        }
        let relay = request.giaddr;
        if relay != Ipv4Addr::UNSPECIFIED && (!self.lan.subnet.is_host(relay) || relay == self.lan.gateway) {
            return Outcome::Silent(Silence::ForeignRelay);
        }
        let outcome = match request.message_type {
            MessageType::Discover => self.discover(now, link_src, &request),
            MessageType::Request => self.request(now, link_src, &request),
            MessageType::Decline => self.decline(now, &request),
            MessageType::Release => self.release(now, &request),
            MessageType::Inform => self.inform(link_src, &request),
            _ => Outcome::Silent(Silence::NotForServers),
        };
        self.note(&outcome);
        outcome
    }

    /// What is known of the client with this hardware address: offered, leased or remembered.
    ///
    /// # Errors
    /// Of the store.
    pub fn lease_of(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        self.leases.get(now, mac)
    }

    /// The lease the client with this hardware address has, be it of a process of the network that is gone: then
    /// it is this one's from now on.
    ///
    /// # Errors
    /// Of the store.
    pub fn resume(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        self.leases.resume(now, mac)
    }

    /// Every client known, by address: offers, leases and leases that ended.
    ///
    /// # Errors
    /// Of the store.
    pub fn leases(&mut self, now: Instant) -> Result<Vec<Lease>, StoreError> {
        self.leases.leases(now)
    }

    /// What a guest of a shared network may not do.
    fn refuse_stranger(&mut self, now: Instant, link_src: MacAddr, request: &Request) -> Option<Silence> {
        let shared = self.shared.as_mut()?;
        if !shared.trust_guest && (request.mac != link_src || !request.giaddr.is_unspecified()) {
            return Some(Silence::NotTheSender);
        }
        (!shared.rate.take(now)).then_some(Silence::TooMany)
    }

    fn discover(&mut self, now: Instant, link_src: MacAddr, request: &Request) -> Outcome {
        match self.leases.offer(now, &request.client(), request.requested) {
            Ok(grant) => self.grant(link_src, request, MessageType::Offer, (grant, LeaseChange::Offered)),
            Err(refusal) => self.refuse(link_src, request, refusal),
        }
    }

    /// A REQUEST in one of the client's four states (RFC 2131, 4.3.2): SELECTING names a server;
    /// RENEWING and REBINDING have `ciaddr`, the address they use; INIT-REBOOT has option 50 only.
    /// Our answer to the last three is the same, and an address goes back in the field the state
    /// uses.
    fn request(&mut self, now: Instant, link_src: MacAddr, request: &Request) -> Outcome {
        if request.server.is_some_and(|server| server != self.lan.gateway) {
            return Outcome::Silent(match self.leases.withdraw(now, request.mac) {
                Ok(()) => Silence::OtherServer,
                Err(error) => no_store(&error),
            });
        }
        let in_use = Some(request.ciaddr).filter(|ip| !ip.is_unspecified());
        let wanted = if request.server.is_some() {
            request.requested.or(in_use)
        } else {
            in_use.or(request.requested)
        };
        let Some(ip) = wanted else {
            return Outcome::Silent(Silence::NoAddress);
        };
        let (grant, change) = match self.leases.bind(now, &request.client(), ip) {
            Ok((Bind::Bound, grant)) => (grant, LeaseChange::Bound),
            Ok((Bind::Renewed, grant)) => (grant, LeaseChange::Renewed),
            Err(refusal) => return self.refuse(link_src, request, refusal),
        };
        self.grant(link_src, request, MessageType::Ack, (grant, change))
    }

    fn decline(&mut self, now: Instant, request: &Request) -> Outcome {
        if request.server.is_some_and(|server| server != self.lan.gateway) {
            return Outcome::Silent(Silence::OtherServer);
        }
        let Some(ip) = request.requested else {
            return Outcome::Silent(Silence::NotTheirs);
        };
        let event = LeaseEvent { mac: request.mac, ip, change: LeaseChange::Declined };
        Outcome::Silent(match self.leases.decline(now, request.mac, ip) {
            Ok(true) => Silence::Declined(event),
            Ok(false) => Silence::NotTheirs,
            Err(error) => no_store(&error),
        })
    }

    fn release(&mut self, now: Instant, request: &Request) -> Outcome {
        if request.server.is_some_and(|server| server != self.lan.gateway) {
            return Outcome::Silent(Silence::OtherServer);
        }
        let ip = request.ciaddr;
        let event = LeaseEvent { mac: request.mac, ip, change: LeaseChange::Released };
        Outcome::Silent(match self.leases.release(now, request.mac, ip) {
            Ok(true) => Silence::Released(event),
            Ok(false) => Silence::NotTheirs,
            Err(error) => no_store(&error),
        })
    }

    /// The client has an address from elsewhere and wants the rest (RFC 2131, 3.4 and 4.3.5).
    fn inform(&mut self, link_src: MacAddr, request: &Request) -> Outcome {
        if !request.ciaddr.is_unspecified() && !self.is_guest_host(request.ciaddr) {
            return Outcome::Silent(Silence::NoAddress);
        }
        let payload = self.writer.inform_ack(request);
        let (dst_mac, dst_ip, dst_port) = self.route(link_src, request, Ipv4Addr::UNSPECIFIED);
        Outcome::Reply(DhcpReply { dst_mac, dst_ip, dst_port, payload, lease: None, name_refused: None })
    }

    fn grant(
        &self,
        link_src: MacAddr,
        request: &Request,
        message_type: MessageType,
        (grant, change): (Grant, LeaseChange),
    ) -> Outcome {
        let event = LeaseEvent { mac: request.mac, ip: grant.ip, change };
        let payload = self.writer.grant(request, message_type, event.ip, grant.host_name.as_deref());
        let (dst_mac, dst_ip, dst_port) = self.route(link_src, request, event.ip);
        let name_refused = request.host_name.clone().filter(|_| grant.name_refused);
        Outcome::Reply(DhcpReply { dst_mac, dst_ip, dst_port, payload, lease: Some(event), name_refused })
    }

    fn refuse(&self, link_src: MacAddr, request: &Request, refusal: Refusal) -> Outcome {
        match refusal {
            Refusal::NotBound(_) => self.nak(link_src, request),
            Refusal::Exhausted => Outcome::Silent(Silence::PoolExhausted),
            Refusal::ShareUsed => Outcome::Silent(Silence::ShareUsed),
            Refusal::Elsewhere => Outcome::Silent(Silence::Elsewhere),
            Refusal::Store(error) => Outcome::Silent(no_store(&error)),
        }
    }

    /// NAK goes to everyone on the link, for the client may use an address it must not use; a relay
    /// is asked to do the same by the broadcast flag (RFC 2131, 4.1 and 4.3.2).
    fn nak(&self, link_src: MacAddr, request: &Request) -> Outcome {
        let payload = self.writer.nak(request);
        let (dst_mac, dst_ip, dst_port) = if request.giaddr.is_unspecified() {
            (MacAddr::BROADCAST, Ipv4Addr::BROADCAST, CLIENT_PORT)
        } else {
            (link_src, request.giaddr, SERVER_PORT)
        };
        Outcome::Reply(DhcpReply { dst_mac, dst_ip, dst_port, payload, lease: None, name_refused: None })
    }

    /// Where OFFER and ACK go (RFC 2131, 4.1): the relay; the address in use; everyone, if the
    /// client asks for that; else the address it is being given.
    fn route(&self, link_src: MacAddr, request: &Request, yiaddr: Ipv4Addr) -> (MacAddr, Ipv4Addr, u16) {
        if !request.giaddr.is_unspecified() {
            (link_src, request.giaddr, SERVER_PORT)
        } else if self.is_guest_host(request.ciaddr) {
            (request.mac, request.ciaddr, CLIENT_PORT)
        } else if request.broadcast() || yiaddr.is_unspecified() {
            (MacAddr::BROADCAST, Ipv4Addr::BROADCAST, CLIENT_PORT)
        } else {
            (request.mac, yiaddr, CLIENT_PORT)
        }
    }

    fn is_guest_host(&self, ip: Ipv4Addr) -> bool {
        self.lan.subnet.is_host(ip) && ip != self.lan.gateway
    }
}

/// The error with its causes, for the log.
fn no_store(error: &StoreError) -> Silence {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    Silence::Store(text)
}

impl From<Fault> for Silence {
    fn from(fault: Fault) -> Silence {
        match fault {
            Fault::Malformed => Silence::Malformed,
            Fault::NotEthernet => Silence::NotEthernet,
            Fault::NoType => Silence::NotForServers,
        }
    }
}
