//! Connections that move to the worker whose queue the guest uses for them.
//!
//! A segment that comes by another worker's queue is handed to the worker of its flow, as a copy. One in passing
//! is cheap that way; when they keep coming the flow goes after them, with all that is known of it, so that they are
//! translated where they come. Its mapping is all workers' and stays as it is. What the world answers
//! follows by itself: the kernel gives frames of a flow to the queue it was last written to.
//!
//! While the flow is on its way its new worker does not have it yet, and hands over frames that come to
//! the old one behind it. Those are sent after the flow, on the same ring, for a moment. A frame comes to no worker more
//! than twice ([`Packet::tried`]).
//!
//! Only TCP moves. Datagrams and questions begin a flow of the same mapping wherever the guest sends them. A shared port's
//! flows are one worker's by design, and a connection between guests is two flows.
//!
//! Read first: `docs/adr/0006-flows-move-between-workers.md` (the same over host sockets).

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::flow::{Flow, FlowFlags, FlowId, Outbound};
use super::head::{Packet, View};
use super::outward::outbound;
use super::{PacketNat, give_back, listing, lock};
use crate::engine::placement::WorkerId;
use crate::limits;
use crate::time::Instant;
use crate::wire::ipv4::Protocol;

/// How long frames are sent after a flow that has moved: longer than letters wait.
const CHASED: Duration = Duration::from_secs(1);

/// A flow on its way to another worker.
#[derive(Debug)]
pub struct MovedFlow {
    flow: Flow,
    /// The address it was translated to.
    outside: Option<Ipv4Addr>,
}

/// Frames in a row that another worker handed over for a flow.
#[derive(Clone, Copy, Debug)]
struct Handed {
    flow: FlowId,
    by: WorkerId,
    frames: u8,
}

/// What a worker knows of flows that are to move, and of those that have.
#[derive(Debug)]
pub(super) struct Moving {
    handed: [Option<Handed>; limits::PACKET_HANDED_FLOWS],
    gone: VecDeque<(Outbound, WorkerId, Instant)>,
}

impl Default for Moving {
    fn default() -> Moving {
        Moving { handed: [None; limits::PACKET_HANDED_FLOWS], gone: VecDeque::new() }
    }
}

impl Moving {
    /// Counts a frame that `by` handed over; whether its flow is to move there.
    fn count(&mut self, flow: FlowId, by: WorkerId) -> bool {
        let slot = &mut self.handed[flow.index as usize % limits::PACKET_HANDED_FLOWS];
        let frames = match slot {
            Some(handed) if (handed.flow, handed.by) == (flow, by) => handed.frames + 1,
            _ => 1,
        };
        let moves = frames >= limits::PACKET_HANDED_FRAMES;
        *slot = (!moves).then_some(Handed { flow, by, frames });
        moves
    }

    fn remember(&mut self, now: Instant, key: Outbound, to: WorkerId) {
        if self.gone.len() >= limits::PACKET_HANDED_FLOWS {
            self.gone.pop_front();
        }
        self.gone.push_back((key, to, now));
    }

    /// Where a flow has moved to a moment ago.
    pub(super) fn gone_to(&self, now: Instant, key: &Outbound) -> Option<WorkerId> {
        let mut latest = self.gone.iter().rev();
        let (_, to, since) = latest.find(|(gone, ..)| gone == key)?;
        (now.since(*since) < CHASED).then_some(*to)
    }
}

impl PacketNat {
    /// The guest's packet, as it came, was handed over by worker `from`: gives its flow away if more of them were than it is
    /// worth.
    pub fn give_away(&mut self, now: Instant, packet: &Packet<'_>, from: WorkerId) -> Option<MovedFlow> {
        let view = View::read(packet).ok().filter(|view| view.ip.protocol == Protocol::TCP)?;
        let key = outbound(&view);
        let at = self.table.find_outbound(&key)?;
        let flags = self.table.flow(at).flags;
        let id = self.table.id(at);
        if self.draining
            || flags.has(FlowFlags::PORT_SHARED)
            || flags.has(FlowFlags::HAIRPIN)
            || !self.moving.count(id, from)
        {
            return None;
        }
        let flow = self.table.remove(id)?;
        self.moving.remember(now, key, from);
        let key = flow.key();
        lock(&self.mappings).joins(key.protocol, key.external_port, from);
        Some(MovedFlow { flow, outside: self.config.outside })
    }

    /// Takes a flow in that another worker gave away. One of its own with the same ends, begun by a repeated SYN,
    /// knows less and makes way.
    pub fn take_in(&mut self, moved: MovedFlow) {
        if moved.outside != self.config.outside {
            return self.give_up(&moved);
        }
        let key = moved.flow.key();
        let own = [self.table.find_outbound(&key.outbound()), self.table.find_inbound(&key.inbound())];
        for id in own.map(|at| at.map(|at| self.table.id(at))).into_iter().flatten() {
            if let Some(flow) = self.table.remove(id) {
                self.flow_news.note(|| listing::news(false, &flow));
                give_back(&mut lock(&self.mappings), &mut self.spoken_to, &self.config, &flow);
            }
        }
        self.make_room(key.guest);
        let spare = MovedFlow { flow: moved.flow.clone(), outside: moved.outside };
        if self.table.insert(moved.flow).is_err() {
            self.give_up(&spare);
        }
    }

    /// Ends a flow that was given away and is nobody's: its guest or its address outside is gone.
    pub fn give_up(&mut self, moved: &MovedFlow) {
        self.flow_news.note(|| listing::news(false, &moved.flow));
        give_back(&mut lock(&self.mappings), &mut self.spoken_to, &self.config, &moved.flow);
    }
}
