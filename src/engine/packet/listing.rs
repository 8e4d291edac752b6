//! Translated flows as they are shown, and ended by who looks at them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::flow::{self, Flow, FlowFlags, FlowKey, Ticks};
use super::{PacketNat, Side, give_back, lock, published_protocol};
use crate::config as settings;
use crate::engine::flows::{
    Began, Ended, FlowId, FlowNews, FlowProtocol, FlowView, NewsList, Table, Walk, ending_step,
};
use crate::rate_limit::RateLimits;
use crate::time::Instant;
use crate::wire::ipv4::Protocol;

fn protocol(key: &FlowKey) -> FlowProtocol {
    match key.protocol {
        Protocol::TCP => FlowProtocol::Tcp,
        Protocol::UDP => FlowProtocol::Udp,
        Protocol::ICMP => FlowProtocol::Icmp,
        _ => FlowProtocol::Other,
    }
}

/// The guest's end and the remote one.
fn ends(key: &FlowKey) -> (SocketAddr, SocketAddr) {
    ((key.guest, key.guest_port).into(), (key.remote, key.remote_port).into())
}

/// A flow that began or ended.
pub(super) fn news(opened: bool, flow: &Flow) -> FlowNews {
    let key = flow.key();
    let (guest, remote) = ends(&key);
    FlowNews { opened, protocol: protocol(&key), guest, remote, carried: None }
}

fn view(flow: &Flow, id: flow::FlowId, now: Instant) -> FlowView {
    let key = flow.key();
    let (guest, remote) = ends(&key);
    let idle_ms = Ticks::at(now).since(flow.last_seen).max(0).unsigned_abs();
    let state = match () {
        () if flow.flags.has(FlowFlags::ASSURED) => "assured",
        () if flow.flags.has(FlowFlags::SEEN_REPLY) => "answered",
        () => "unanswered",
    };
    FlowView {
        id: FlowId::new(Table::Packet, id.generation, id.index),
        protocol: protocol(&key),
        guest,
        remote,
        state,
        began: Some(if flow.flags.has(FlowFlags::FROM_WORLD) { Began::World } else { Began::Guest }),
        idle: Duration::from_millis(u64::from(idle_ms)),
        // The entry's first cache line has no room for it, and its second is not touched by packets under way.
        carried: None,
    }
}

impl PacketNat {
    /// Shows flows to a walk.
    pub fn list(&self, walk: &mut Walk<'_>) {
        let now = walk.now;
        let show = |place| self.table.at_place(place).map(|(flow, id)| view(flow, id, now));
        walk.over(Table::Packet, self.table.places(), show);
    }

    /// Ends a flow: both ends of a TCP connection are reset. What still comes of the world is nobody's, and what comes of
    /// the guest begins another. False if there is none of this name.
    pub fn end(&mut self, id: FlowId) -> bool {
        let named = self.table.at_place(id.place() as usize).map(|(_, own)| own);
        let is_it = |own: &flow::FlowId| FlowId::new(Table::Packet, own.generation, own.index) == id;
        named.filter(is_it).is_some_and(|own| self.end_named(own).is_some())
    }

    /// The same; whether it was a TCP connection that was not over, `None` if it has ended already.
    fn end_named(&mut self, id: flow::FlowId) -> Option<bool> {
        let flow = self.table.remove(id)?;
        give_back(&mut lock(&self.mappings), &mut self.spoken_to, &self.config, &flow);
        self.flow_news.note(|| news(false, &flow));
        Some(self.resets.add(&flow, self.config.outside))
    }

    /// Ends flows that clients began by a published port, from the place `first` on: both ends of TCP connections are reset.
    pub fn end_published(&mut self, protocol: settings::Protocol, port: u16, first: usize) -> Ended {
        let protocol = published_protocol(protocol);
        let held = lock(&self.mappings).of_port(protocol, port, Ipv4Addr::UNSPECIFIED);
        if held.is_none_or(|held| held.flows == 0) {
            return Ended::default();
        }
        let (step, next) = ending_step(first, self.table.places());
        let mut connections = 0;
        for place in step {
            let Some((flow, id)) = self.table.at_place(place) else { continue };
            let key = flow.key();
            if flow.flags.has(FlowFlags::PUBLISHED) && (key.protocol, key.external_port) == (protocol, port) {
                connections += usize::from(self.end_named(id) == Some(true));
            }
        }
        Ended { connections, next }
    }

    /// Flows that begin and end.
    pub fn flow_news(&mut self) -> &mut NewsList {
        &mut self.flow_news
    }

    /// Lets as many flows begin as `limits` say, which all workers share.
    pub fn limit_flows(&mut self, limits: RateLimits) {
        self.limits = limits;
    }

    /// Whether a flow from `side` may begin, by its limit; it is counted as refused if not.
    pub(super) fn is_within_limit(&mut self, now: Instant, side: Side) -> bool {
        let (limit, limited) = match side {
            Side::Guest => (&self.limits.from_guest, &mut self.counters.limited_from_guest),
            Side::World => (&self.limits.to_guest, &mut self.counters.limited_to_guest),
        };
        let is_within = limit.take_flow(now);
        limited.refused_flows += u64::from(!is_within);
        is_within
    }

    /// Lets no flow begin any more; those under way go on.
    pub fn drain(&mut self) {
        self.draining = true;
    }
}
