//! Packets of the guest: to the world, to the gateway, or back to a guest by way of the outside address.

use std::net::Ipv4Addr;

use super::flow::{ChecksumDeltas, FlowFlags, FlowKey, Inbound, Outbound};
use super::fragments::Way;
use super::head::{Packet, Transport, View};
use super::icmp::{Quote, translate_quote};
use super::ports::{Request, WorkerSet};
use super::rewrite::{End, NewEnd, take_hop, translate};
use super::table::FlowIndex;
use super::{PacketNat, Passage, Refusal, Side, Verdict, first_segment, guest_end, lock, scope};
use crate::engine::counters::DropReason;
use crate::engine::placement::WorkerId;
use crate::limits::FRAME_HEAD_BYTES;
use crate::time::Instant;
use crate::wire::icmpv4::UnreachableCode;
use crate::wire::ipv4::Protocol;
use crate::wire::tcp::Flags;

impl PacketNat {
    pub(super) fn judge_outward(
        &mut self,
        now: Instant,
        packet: &mut Packet<'_>,
        known: Passage,
    ) -> Result<Verdict, Refusal> {
        let view = View::read(packet)?;
        let (src, dst) = (view.ip.src, view.ip.dst);
        let subnet = self.config.subnet;
        if dst == self.config.gateway || dst == subnet.broadcast() || dst.is_broadcast() || dst.is_multicast()
        {
            return Ok(Verdict::Ours);
        }
        if !subnet.is_host(src) || src == self.config.gateway {
            return Err(DropReason::SpoofedSource.into());
        }
        if subnet.contains(dst) || is_no_destination(dst) {
            return Err(Refusal::unreachable(UnreachableCode::AdminProhibited, DropReason::Refused));
        }
        let Some(outside) = self.config.outside else {
            return Err(Refusal::unreachable(UnreachableCode::Net, DropReason::Refused));
        };
        let is_query = matches!(view.transport, Transport::Query { .. });
        if dst == outside && is_query {
            return Ok(Verdict::Ours);
        }
        Self::check_passage(&view, packet, self.config.outside_ip_mtu)?;
        match view.transport {
            Transport::LaterFragment => Ok(self.follow(now, Side::Guest, packet.head, &view)),
            Transport::Error => self.error_outward(packet, &view, outside),
            // An answer to a question that did not come through here.
            Transport::Query { asks: false, .. } => Err(DropReason::NoFlow.into()),
            _ => self.carry_outward(now, packet, (&view, known), outside),
        }
    }

    fn carry_outward(
        &mut self,
        now: Instant,
        packet: &mut Packet<'_>,
        (view, known): (&View, Passage),
        outside: Ipv4Addr,
    ) -> Result<Verdict, Refusal> {
        let key = outbound(view);
        let found = if known == Passage::Unknown { None } else { self.table.find_outbound(&key) };
        let at = match found {
            Some(at) => {
                self.advance_any(now, at, Side::Guest, view, packet.head)
                    .map_err(|reason| self.not_taken(at, packet, reason))?;
                at
            }
            None => match self.begin_outward(now, packet, view, &key, outside) {
                Err(Refusal::Elsewhere(worker)) => {
                    self.lead(now, Side::Guest, view, Way::Elsewhere(worker));
                    return Err(Refusal::Elsewhere(worker));
                }
                begun => begun?,
            },
        };
        let flow = self.table.flow(at);
        let port = flow.key().external_port;
        let hairpin = key.remote == outside;
        let as_it_came = hairpin.then(|| Kept::of(packet.head));
        translate(packet.head, view, &NewEnd { end: End::Source, addr: outside, port, deltas: flow.deltas });
        let dst = if hairpin { self.turn_back(now, packet) } else { Ok(key.remote) };
        let dst = match (dst, as_it_came) {
            // The end it goes to is that worker's, which turns it back as a whole.
            (Err(Refusal::Elsewhere(worker)), Some(head)) => {
                head.put_back(packet.head);
                self.lead(now, Side::Guest, view, Way::Elsewhere(worker));
                return Err(Refusal::Elsewhere(worker));
            }
            (dst, _) => dst?,
        };
        take_hop(packet.head);
        self.lead(now, Side::Guest, view, Way::On { src: outside, dst, hairpin });
        Ok(if hairpin { Verdict::Hairpin } else { Verdict::Forward })
    }

    /// What left for the outside address comes in again; returns the guest it goes to. Its sender has
    /// been told of what it is told before: nothing is quoted of a packet already changed.
    fn turn_back(&mut self, now: Instant, packet: &mut Packet<'_>) -> Result<Ipv4Addr, Refusal> {
        let view = View::read(packet)?;
        self.carry_inward(now, packet, (&view, Passage::General)).map_err(too_late)
    }

    fn begin_outward(
        &mut self,
        now: Instant,
        packet: &Packet<'_>,
        view: &View,
        key: &Outbound,
        outside: Ipv4Addr,
    ) -> Result<FlowIndex, Refusal> {
        let hairpin = key.remote == outside;
        if hairpin && !self.is_held(key.protocol, key.remote_port) {
            return Err(Refusal::unreachable(UnreachableCode::Port, DropReason::NoFlow));
        }
        let mut flow_key = FlowKey {
            guest: key.guest,
            remote: key.remote,
            guest_port: key.guest_port,
            remote_port: key.remote_port,
            external_port: 0,
            protocol: key.protocol,
        };
        let (guest, scope) = (guest_end(&flow_key), scope(&self.config, &flow_key));
        if !opens(view, packet.head) {
            if let Some(worker) = self.moving.gone_to(now, key)
                && !packet.tried.has(self.config.worker)
            {
                return Err(Refusal::Elsewhere(worker));
            }
            let workers = lock(&self.mappings).of_guest(guest, scope).map(|held| held.workers);
            if let Some(worker) = self.another(workers.unwrap_or_default(), packet) {
                return Err(Refusal::Elsewhere(worker));
            }
        }
        let tcp = first_segment(view, packet.head, true).ok_or(DropReason::NoFlow)?;
        if self.draining {
            return Err(Refusal::unreachable(UnreachableCode::AdminProhibited, DropReason::Refused));
        }
        // The guest tries again: it is told nothing.
        if !self.is_within_limit(now, Side::Guest) {
            return Err(DropReason::FlowLimit.into());
        }
        self.make_room(key.guest);
        let table = &self.table;
        let in_use = |port| table.has_inbound(&FlowKey { external_port: port, ..flow_key }.inbound());
        let request = Request { guest, scope, worker: self.config.worker };
        let granted = lock(&self.mappings).begin(&request, in_use);
        let full = Refusal::unreachable(UnreachableCode::AdminProhibited, DropReason::TableFull);
        let grant = granted.map_err(|_| full)?;
        flow_key.external_port = grant.external_port;
        let mut flags = if hairpin { FlowFlags::HAIRPIN } else { FlowFlags::NONE };
        if grant.shared {
            flags.set(FlowFlags::PORT_SHARED);
        }
        self.begin(now, flow_key, flags, tcp).ok_or(full)
    }

    /// Makes of a packet that was translated for the world what the guest sent; returns who that was, if the flow lives.
    pub fn as_sent(&mut self, packet: &mut Packet<'_>) -> Option<Ipv4Addr> {
        let view = View::read(packet).ok()?;
        if matches!(view.transport, Transport::LaterFragment | Transport::Error) {
            return None;
        }
        let Outbound { protocol, guest_port, remote, remote_port, .. } = outbound(&view);
        let at =
            self.table.find_inbound(&Inbound { protocol, external_port: guest_port, remote, remote_port })?;
        let flow = self.table.flow(at);
        let (addr, port, deltas) = (flow.key().guest, flow.key().guest_port, flow.deltas.inverse());
        translate(packet.head, &view, &NewEnd { end: End::Source, addr, port, deltas });
        Some(addr)
    }

    /// Another worker of `workers` that has not looked at this frame yet, if there is one.
    pub(super) fn another(&self, workers: WorkerSet, packet: &Packet<'_>) -> Option<WorkerId> {
        workers.iter().find(|worker| *worker != self.config.worker && !packet.tried.has(*worker))
    }

    /// The guest says of a packet that reached it that it failed.
    fn error_outward(
        &mut self,
        packet: &mut Packet<'_>,
        view: &View,
        outside: Ipv4Addr,
    ) -> Result<Verdict, Refusal> {
        let quote = Quote::read(packet.head, view)?;
        if quote.src != view.ip.dst {
            return Err(DropReason::NoFlow.into());
        }
        let remote_port = if quote.has_ident() { 0 } else { quote.port(End::Source) };
        let key = Outbound {
            protocol: quote.protocol,
            guest: quote.dst,
            guest_port: quote.port(End::Destination),
            remote: quote.src,
            remote_port,
        };
        let at = self.table.find_outbound(&key).ok_or(DropReason::NoFlow)?;
        let flow = self.table.flow(at);
        let port = flow.key().external_port;
        let new = NewEnd { end: End::Destination, addr: outside, port, deltas: flow.deltas };
        let hairpin = view.ip.dst == outside;
        let as_it_came = hairpin.then(|| Kept::of(packet.head));
        translate_quote(packet.head, view, &quote, &new);
        let deltas = ChecksumDeltas::between((view.ip.src, 0), (outside, 0));
        translate(packet.head, view, &NewEnd { end: End::Source, addr: outside, port: 0, deltas });
        if let Some(head) = as_it_came {
            let turned = View::read(packet)?;
            let carried = self.carry_error_inward(packet, &turned, outside).map_err(too_late);
            if let Err(Refusal::Elsewhere(_)) = carried {
                head.put_back(packet.head);
            }
            carried?;
        }
        take_hop(packet.head);
        Ok(if hairpin { Verdict::Hairpin } else { Verdict::Forward })
    }
}

/// The first bytes of a frame, all that a translation changes, as they came.
struct Kept {
    bytes: [u8; FRAME_HEAD_BYTES],
    len_bytes: usize,
}

impl Kept {
    fn of(head: &[u8]) -> Kept {
        let len_bytes = head.len().min(FRAME_HEAD_BYTES);
        let mut bytes = [0; FRAME_HEAD_BYTES];
        bytes[..len_bytes].copy_from_slice(&head[..len_bytes]);
        Kept { bytes, len_bytes }
    }

    fn put_back(&self, head: &mut [u8]) {
        head[..self.len_bytes].copy_from_slice(&self.bytes[..self.len_bytes]);
    }
}

/// A refusal of a packet that was changed already: nobody can be shown it. Another worker gets it as it came.
fn too_late(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::Told(_, reason) => Refusal::Silent(reason),
        other @ (Refusal::Silent(_) | Refusal::Elsewhere(_)) => other,
    }
}

/// Whether a packet begins a flow where it has none; a segment in the middle of a connection may be another worker's.
pub(super) fn opens(view: &View, head: &[u8]) -> bool {
    view.ip.protocol != Protocol::TCP || {
        let flags = view.segment(head).flags;
        flags.contains(Flags::SYN) && !flags.contains(Flags::ACK)
    }
}

/// How a packet of the guest is known.
pub(super) fn outbound(view: &View) -> Outbound {
    let (guest_port, remote_port) = match view.transport {
        Transport::Ports { src, dst } => (src, dst),
        Transport::Query { ident, .. } => (ident, 0),
        _ => (0, 0),
    };
    let (guest, remote) = (view.ip.src, view.ip.dst);
    Outbound { protocol: view.ip.protocol, guest, guest_port, remote, remote_port }
}

/// Addresses no packet leaves for (RFC 6890): this network, loopback, and what is reserved.
pub(super) fn is_no_destination(addr: Ipv4Addr) -> bool {
    let first = addr.octets()[0];
    first == 0 || first == 127 || first >= 240
}
