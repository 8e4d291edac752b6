//! Packets of the world, and those of guests that turn back at the outside address.

use std::net::Ipv4Addr;

use super::flow::{ChecksumDeltas, FlowFlags, FlowKey, Inbound};
use super::fragments::Way;
use super::head::{Packet, Transport, View};
use super::icmp::{Quote, translate_quote};
use super::outward::{is_no_destination, opens};
use super::ports::{MappingInfo, Request};
use super::rewrite::{End, NewEnd, take_hop, translate};
use super::table::FlowIndex;
use super::{PacketNat, Passage, Refusal, Side, Verdict, first_segment, lock};
use crate::config::UdpFiltering;
use crate::engine::counters::DropReason;
use crate::time::Instant;
use crate::wire::ipv4::Protocol;

impl PacketNat {
    pub(super) fn judge_inward(
        &mut self,
        now: Instant,
        packet: &mut Packet<'_>,
        known: Passage,
    ) -> Result<Verdict, Refusal> {
        let view = View::read(packet)?;
        let (src, dst) = (view.ip.src, view.ip.dst);
        let Some(outside) = self.config.outside else { return Ok(Verdict::Ours) };
        if dst != outside {
            let for_all = dst.is_broadcast() || dst.is_multicast();
            return if for_all { Ok(Verdict::Ours) } else { Err(DropReason::NotForUs.into()) };
        }
        if src == outside || self.config.subnet.contains(src) || src.is_multicast() || is_no_destination(src)
        {
            return Err(DropReason::SpoofedSource.into());
        }
        match view.transport {
            Transport::LaterFragment => return Ok(self.follow(now, Side::World, packet.head, &view)),
            Transport::Query { asks: true, .. } => {
                self.lead(now, Side::World, &view, Way::Ours);
                return Ok(Verdict::Ours);
            }
            Transport::Error => {
                Self::check_passage(&view, packet, self.config.guest_ip_mtu)?;
                self.carry_error_inward(packet, &view, outside)?;
                take_hop(packet.head);
                return Ok(Verdict::Forward);
            }
            _ => {}
        }
        let dst = match self.carry_inward(now, packet, (&view, known)) {
            Err(Refusal::Elsewhere(worker)) => {
                self.lead(now, Side::World, &view, Way::Elsewhere(worker));
                return Err(Refusal::Elsewhere(worker));
            }
            carried => carried?,
        };
        take_hop(packet.head);
        self.lead(now, Side::World, &view, Way::On { src, dst, hairpin: false });
        Ok(Verdict::Forward)
    }

    /// Finds or begins the flow of a packet to the outside address and changes its destination, which is returned.
    pub(super) fn carry_inward(
        &mut self,
        now: Instant,
        packet: &mut Packet<'_>,
        (view, known): (&View, Passage),
    ) -> Result<Ipv4Addr, Refusal> {
        let key = inbound(view);
        let found = if known == Passage::Unknown { None } else { self.table.find_inbound(&key) };
        let at = match found {
            Some(at) => {
                Self::check_passage(view, packet, self.config.guest_ip_mtu)?;
                self.advance_any(now, at, Side::World, view, packet.head)
                    .map_err(|reason| self.not_taken(at, packet, reason))?;
                at
            }
            None => self.begin_inward(now, packet, view, &key)?,
        };
        let flow = self.table.flow(at);
        let guest = flow.key();
        let deltas = flow.deltas.inverse();
        let new = NewEnd { end: End::Destination, addr: guest.guest, port: guest.guest_port, deltas };
        translate(packet.head, view, &new);
        Ok(guest.guest)
    }

    /// Whether an end outside belongs to anyone.
    pub(super) fn is_held(&self, protocol: Protocol, external_port: u16) -> bool {
        lock(&self.mappings).of_port(protocol, external_port, Ipv4Addr::UNSPECIFIED).is_some()
    }

    fn begin_inward(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        view: &View,
        key: &Inbound,
    ) -> Result<FlowIndex, Refusal> {
        let mappings = lock(&self.mappings);
        let held = mappings.of_port(key.protocol, key.external_port, key.remote);
        let workers = mappings.workers_of_port(key.protocol, key.external_port, key.remote);
        drop(mappings);
        let target = held.and_then(|held| self.target(&held, key));
        if (target.is_none() || !opens(view, packet.head))
            && let Some(worker) = self.another(workers, packet)
        {
            return Err(Refusal::Elsewhere(worker));
        }
        let held = held.ok_or(DropReason::NoFlow)?;
        let (guest, guest_port, flags) = target.ok_or(DropReason::Filtered)?;
        Self::check_passage(view, packet, self.config.guest_ip_mtu)?;
        let pick_up = flags.has(FlowFlags::PUBLISHED);
        let tcp = first_segment(view, packet.head, pick_up).ok_or(DropReason::NoFlow)?;
        if self.draining {
            return Err(DropReason::Refused.into());
        }
        if !self.is_within_limit(now, Side::World) {
            return Err(DropReason::FlowLimit.into());
        }
        self.make_room(guest);
        let request = Request { guest: held.guest, scope: held.scope, worker: self.config.worker };
        let mut mappings = lock(&self.mappings);
        // Its last flow may just have been the one that made room.
        let is_held = mappings
            .of_port(key.protocol, key.external_port, key.remote)
            .is_some_and(|now| now.guest == held.guest);
        let grant = if is_held { mappings.begin(&request, |_| true).ok() } else { None };
        let grant = grant.ok_or(DropReason::TableFull)?;
        if grant.external_port != key.external_port {
            mappings.end(held.guest, held.scope, grant);
            return Err(DropReason::TableFull.into());
        }
        drop(mappings);
        let flow_key = FlowKey {
            guest,
            remote: key.remote,
            guest_port,
            remote_port: key.remote_port,
            external_port: key.external_port,
            protocol: key.protocol,
        };
        Ok(self.begin(now, flow_key, flags, tcp).ok_or(DropReason::TableFull)?)
    }

    /// The guest's end whoever was not spoken to may reach through a mapping (RFC 4787, 5).
    fn target(&self, held: &MappingInfo, key: &Inbound) -> Option<(Ipv4Addr, u16, FlowFlags)> {
        if let Some((guest, port)) = held.leads_to {
            return Some((guest, port, FlowFlags::FROM_WORLD.with(FlowFlags::PUBLISHED)));
        }
        let lets_in = match (key.protocol, self.config.udp.filtering) {
            (Protocol::UDP, UdpFiltering::EndpointIndependent) => true,
            (Protocol::UDP, UdpFiltering::AddressDependent) => {
                self.spoken_to.contains_key(&(key.external_port, key.remote))
            }
            _ => false,
        };
        // What stood in for a port that is published no more leads to nobody.
        let lets_in = lets_in && !held.guest.addr.is_unspecified();
        lets_in.then_some((held.guest.addr, held.guest.port, FlowFlags::FROM_WORLD))
    }

    /// Translates what the world says of a packet that left: the packet it quotes, and whom it is said to.
    pub(super) fn carry_error_inward(
        &mut self,
        packet: &mut Packet<'_>,
        view: &View,
        outside: Ipv4Addr,
    ) -> Result<(), Refusal> {
        let quote = Quote::read(packet.head, view)?;
        if quote.src != outside {
            return Err(DropReason::NoFlow.into());
        }
        let remote_port = if quote.has_ident() { 0 } else { quote.port(End::Destination) };
        let external_port = quote.port(End::Source);
        let key = Inbound { protocol: quote.protocol, external_port, remote: quote.dst, remote_port };
        let Some(at) = self.table.find_inbound(&key) else {
            let workers = lock(&self.mappings).workers_of_port(key.protocol, external_port, key.remote);
            let other = self.another(workers, packet);
            return Err(other.map_or(DropReason::NoFlow.into(), Refusal::Elsewhere));
        };
        let flow = self.table.flow(at);
        let guest = flow.key();
        let deltas = flow.deltas.inverse();
        let new = NewEnd { end: End::Source, addr: guest.guest, port: guest.guest_port, deltas };
        translate_quote(packet.head, view, &quote, &new);
        let deltas = ChecksumDeltas::between((outside, 0), (guest.guest, 0));
        translate(packet.head, view, &NewEnd { end: End::Destination, addr: guest.guest, port: 0, deltas });
        Ok(())
    }
}

/// How a packet of the world is known.
fn inbound(view: &View) -> Inbound {
    let (remote_port, external_port) = match view.transport {
        Transport::Ports { src, dst } => (src, dst),
        Transport::Query { ident, .. } => (0, ident),
        _ => (0, 0),
    };
    Inbound { protocol: view.ip.protocol, external_port, remote: view.ip.src, remote_port }
}
