//! The gateway: what answers at vunet's own address. ARP, ICMP echo, DHCP and DNS over UDP; DNS over
//! TCP is a flow to the process's own resolver (`nat`).

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slab::Slab;

use super::complaints::{Complaint, Complaints};
use super::core::{Core, Neighbour};
use super::counters::DropReason;
use super::emit;
use super::guest_port::GuestPort;
use super::nat::DNS_PORT;
use crate::addr::MacAddr;
use crate::config::IpMtu;
use crate::frame::{Payload, QueuePair};
use crate::limits;
use crate::service::dhcp::{self, DhcpServer, LeaseChange, LeaseEvent, Outcome, Silence};
use crate::service::dns::{self, DnsAction, DnsService, Transport};
use crate::wire::icmpv4::{self, Message};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::VnetHeader;
use crate::wire::{arp, udp};

/// Longest UDP payload over IPv4.
const UDP_PAYLOAD_BYTES_MAX: usize = ipv4::PACKET_BYTES_MAX - ipv4::HEADER_BYTES - udp::HEADER_BYTES;

/// A question for the upstream resolvers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsForward {
    /// Names it in [`Gateway::dns_answer`].
    pub id: u64,
    /// The query as the guest sent it.
    pub query: Vec<u8>,
}

#[derive(Debug)]
struct PendingDns {
    id: u64,
    client: SocketAddr,
    from: Neighbour,
    query: Vec<u8>,
}

/// The DHCP server of the process: one for all workers, asked a few times in a guest's life.
pub type SharedDhcp = Arc<Mutex<DhcpServer>>;

fn lock(dhcp: &SharedDhcp) -> MutexGuard<'_, DhcpServer> {
    dhcp.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The gateway's services.
#[derive(Debug)]
pub struct Gateway {
    dhcp: SharedDhcp,
    dns: Arc<DnsService>,
    pending: Slab<PendingDns>,
    /// Bytes of the queries in `pending`.
    pending_bytes: usize,
    forwards: VecDeque<DnsForward>,
    next_id: u32,
    complaints: Complaints,
}

impl Gateway {
    /// The services, over the leases of the whole process.
    pub fn new(dhcp: SharedDhcp, dns: Arc<DnsService>) -> Gateway {
        let (pending, forwards) = (Slab::new(), VecDeque::new());
        let complaints = Complaints::default();
        Gateway { dhcp, dns, pending, pending_bytes: 0, forwards, next_id: 0, complaints }
    }

    /// The MTU that DHCP offers from now on.
    pub fn set_ip_mtu(&mut self, ip_mtu: IpMtu) {
        lock(&self.dhcp).set_ip_mtu(ip_mtu);
    }

    /// An ARP packet of the guest. The gateway answers for itself and for nobody else.
    pub fn arp(&self, core: &mut Core, port: &mut impl GuestPort, pair: QueuePair, packet: &arp::Packet) {
        let asked = packet.operation == arp::Operation::Request && packet.target_ip == core.lan.gateway;
        if !asked {
            return;
        }
        let reply = arp::Packet {
            operation: arp::Operation::Reply,
            sender_mac: MacAddr::GATEWAY,
            sender_ip: core.lan.gateway,
            target_mac: packet.sender_mac,
            target_ip: packet.sender_ip,
        };
        core.send_arp(port, pair, packet.sender_mac, &reply);
    }

    /// An echo request to the gateway, answered with its own payload (RFC 792).
    pub fn echo(
        &self,
        core: &mut Core,
        port: &mut impl GuestPort,
        from: Neighbour,
        guest: IpAddr,
        (ident, seq): (u16, u16),
        payload: &Payload<'_>,
    ) {
        let mut data = vec![0u8; payload.len()];
        payload.copy_to(&mut data);
        let mut transport = vec![0u8; icmpv4::HEADER_BYTES + data.len()];
        Message::EchoReply { ident, seq }.emit_with_payload(&data, &mut transport);
        let gateway = core.gateway();
        send_transport(core, port, from, (gateway, guest), Protocol::ICMP, &transport);
    }

    /// A DHCP message; returns what it did to a lease.
    pub fn dhcp(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        from: Neighbour,
        payload: &Payload<'_>,
    ) -> Option<LeaseEvent> {
        let mut message = vec![0u8; payload.len().min(limits::DHCP_MESSAGE_BYTES_MAX + 1)];
        payload.copy_to(&mut message);
        let outcome = lock(&self.dhcp).handle(core.now, from.mac, &message);
        let reply = match outcome {
            Outcome::Reply(reply) => reply,
            // Not to be answered (RFC 2131, 4.3.4), and all the same news.
            Outcome::Silent(Silence::Released(event)) => return Some(event),
            Outcome::Silent(reason) => {
                self.not_answered(core, from.mac, &reason);
                return None;
            }
        };
        if let Some(name) = &reply.name_refused
            && let Some(more) = self.complaints.due(core.now, Complaint::NameRefused)
        {
            let mac = from.mac;
            tracing::warn!(%mac, %name, more, "host name refused: another guest's, or the network's own");
        }
        let source = SocketAddr::new(core.gateway(), dhcp::SERVER_PORT);
        let target = SocketAddr::new(reply.dst_ip.into(), reply.dst_port);
        let to = Neighbour { mac: reply.dst_mac, pair: from.pair };
        core.counters.dhcp_answered += 1;
        send_udp(core, port, to, source, target, &reply.payload);
        if let Some(event) = reply.lease
            && event.change == LeaseChange::Bound
        {
            core.set_primary_guest(IpAddr::V4(event.ip));
        }
        reply.lease
    }

    /// Counts a DHCP message that gets no answer, and says so where somebody has to do something.
    fn not_answered(&mut self, core: &mut Core, mac: MacAddr, reason: &Silence) {
        tracing::debug!(%mac, ?reason, "DHCP message not answered");
        let mut due = |complaint| self.complaints.due(core.now, complaint);
        core.counters.drop(match reason {
            Silence::PoolExhausted => {
                if let Some(more) = due(Complaint::PoolExhausted) {
                    let subnet = core.lan.subnet;
                    tracing::warn!(%mac, %subnet, more, "DHCP is silent: every address of the subnet is taken");
                }
                DropReason::PoolExhausted
            }
            Silence::ShareUsed => {
                if let Some(more) = due(Complaint::ShareUsed) {
                    let max = limits::LEASES_PER_GUEST_MAX;
                    tracing::warn!(%mac, max, more, "DHCP is silent: this guest holds as many addresses as one may");
                }
                DropReason::PoolExhausted
            }
            Silence::Store(error) => {
                if let Some(more) = due(Complaint::LeaseStore) {
                    tracing::error!(%mac, %error, more, "DHCP is silent");
                }
                DropReason::LeaseStore
            }
            Silence::Elsewhere => {
                if let Some(more) = due(Complaint::Elsewhere) {
                    tracing::warn!(%mac, more, "DHCP is silent: another guest of the network that is running has \
                        this MAC address and its lease; give each a MAC address of its own, and say it with --mac");
                }
                DropReason::SpoofedSource
            }
            Silence::NotTheSender => DropReason::SpoofedSource,
            Silence::TooMany => DropReason::RateLimited,
            _ => DropReason::ServiceSilent,
        });
    }

    /// A DNS query to the gateway's port 53 over UDP.
    pub fn dns(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        from: Neighbour,
        client: SocketAddr,
        payload: &Payload<'_>,
    ) {
        let mut query = vec![0u8; payload.len()];
        payload.copy_to(&mut query);
        match self.dns.handle(&query, Transport::Udp) {
            DnsAction::Reply(answer) => {
                core.counters.names_answered += 1;
                send_dns(core, port, from, client, &answer);
            }
            DnsAction::Drop(_) => core.counters.drop(DropReason::ServiceSilent),
            DnsAction::Forward if !self.has_room_for(&query) => {
                core.counters.drop(DropReason::TableFull);
                send_dns(core, port, from, client, &dns::servfail(&query));
            }
            DnsAction::Forward => {
                self.next_id = self.next_id.wrapping_add(1);
                let slot = self.pending.vacant_key() as u64;
                let id = (u64::from(self.next_id) << 32) | slot;
                core.counters.names_forwarded += 1;
                self.pending_bytes += query.len();
                self.pending.insert(PendingDns { id, client, from, query: query.clone() });
                self.forwards.push_back(DnsForward { id, query });
            }
        }
    }

    fn has_room_for(&self, query: &[u8]) -> bool {
        self.pending.len() < limits::DNS_QUERIES_MAX
            && self.pending_bytes + query.len() <= limits::DNS_QUERIES_BYTES_MAX
    }

    /// Questions to forward, to be taken after each batch.
    pub fn next_forward(&mut self) -> Option<DnsForward> {
        self.forwards.pop_front()
    }

    /// An upstream's answer to question `id`.
    pub fn dns_answer(&mut self, core: &mut Core, port: &mut impl GuestPort, id: u64, answer: &[u8]) {
        let slot = (id & 0xffff_ffff) as usize;
        if self.pending.get(slot).is_none_or(|pending| pending.id != id) {
            return;
        }
        let pending = self.pending.remove(slot);
        self.pending_bytes -= pending.query.len();
        // A client may ask for more than a datagram over IPv4 can be; without OPT it is cut to 512 bytes.
        let query = if answer.len() > UDP_PAYLOAD_BYTES_MAX { &[][..] } else { &pending.query };
        let answer = dns::truncate_for_udp(answer, query);
        send_dns(core, port, pending.from, pending.client, &answer);
    }

    /// The guest began anew: nobody waits for answers any more.
    pub fn forget_guest(&mut self) {
        self.pending.clear();
        self.pending_bytes = 0;
        self.forwards.clear();
    }
}

fn send_dns(core: &mut Core, port: &mut impl GuestPort, to: Neighbour, client: SocketAddr, answer: &[u8]) {
    let source = SocketAddr::new(core.gateway(), DNS_PORT);
    send_udp(core, port, to, source, client, answer);
}

/// Sends a UDP datagram from host memory, in fragments if it exceeds the MTU.
fn send_udp(
    core: &mut Core,
    port: &mut impl GuestPort,
    to: Neighbour,
    source: SocketAddr,
    target: SocketAddr,
    payload: &[u8],
) {
    let transport = emit::datagram(source, target, payload);
    send_transport(core, port, to, (source.ip(), target.ip()), Protocol::UDP, &transport);
}

fn send_transport(
    core: &mut Core,
    port: &mut impl GuestPort,
    to: Neighbour,
    (from_ip, to_ip): (IpAddr, IpAddr),
    protocol: Protocol,
    transport: &[u8],
) {
    let (ident, mtu) = (core.next_ident(), core.ip_mtu);
    let mac = if to_ip == IpAddr::V4(Ipv4Addr::BROADCAST) { MacAddr::BROADCAST } else { to.mac };
    let packet = emit::HostPacket { guest_mac: mac, from: from_ip, to: to_ip, protocol, tos: 0, transport };
    packet.for_each_frame(ident, mtu, |frame| core.send(port, to.pair, VnetHeader::default(), frame));
}
