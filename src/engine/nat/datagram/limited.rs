//! Datagrams under a limit: those of the guest pass or are lost, for nobody could tell it to wait; those of the
//! world wait in their sockets.

use super::{Datagram, DatagramTable, PeerId};
use crate::engine::core::Core;
use crate::engine::counters::DropReason;
use crate::engine::emit;
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::{Arrival, HostDatagram, Token};
use crate::rate_limit::Cost;
use crate::wire::{icmpv4, udp};

/// What datagrams of at most `each_bytes` of payload cost; UDP's header is as long as that of an echo. One that is
/// longer than the link comes in fragments.
fn cost(core: &Core, payload_bytes: usize, each_bytes: usize) -> Cost {
    const { assert!(udp::HEADER_BYTES == icmpv4::HEADER_BYTES) };
    let head_bytes = emit::ip_head_bytes(core.gateway()) + udp::HEADER_BYTES;
    let room = usize::from(core.ip_mtu).saturating_sub(head_bytes).max(1);
    match payload_bytes {
        0 => Cost::frame(head_bytes),
        _ => Cost::of_payload(payload_bytes, head_bytes, each_bytes.clamp(1, room)),
    }
}

impl<D: HostDatagram> DatagramTable<D> {
    /// Whether a datagram of the guest passes the limit; it is counted as dropped if not.
    pub fn passes(&mut self, core: &mut Core, PeerId(at): PeerId, datagram: &Datagram<'_>) -> bool {
        if !core.lines.from_guest.is_on() {
            return true;
        }
        let payload_bytes = datagram.payload.len();
        let cost = cost(core, payload_bytes, datagram.gso_bytes.unwrap_or(payload_bytes));
        let passes = core.lines.from_guest.admit(core.now, &mut self.peers[at].sender, cost);
        if !passes {
            core.counters.drop_many(DropReason::OverLimit, cost.packets);
            core.counters.limited_from_guest.dropped_packets += cost.packets;
            core.counters.limited_from_guest.dropped_bytes += cost.bytes;
        }
        passes
    }

    /// What it costs to hand an arrival to the guest.
    pub(super) fn cost_to_guest(core: &Core, arrival: &Arrival<'_>) -> Cost {
        cost(core, arrival.bytes.len(), arrival.segment_bytes)
    }

    /// A turn of a socket, with what the limit lets pass now.
    pub(super) fn take_turn(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        if !core.lines.to_guest.is_on() {
            self.take_turn_within(core, port, token, Cost::UNLIMITED);
            return;
        }
        match core.lines.to_guest.take_turn(core.now) {
            Some(turn) => {
                let used = self.take_turn_within(core, port, token, turn);
                core.lines.to_guest.give_back(turn.less(used));
            }
            None => self.wait_in_line(core, token),
        }
    }

    /// Its turn in line for the limit of what guests are sent; what it used of `turn`.
    pub fn take_turn_in_line(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        token: Token,
        turn: Cost,
    ) -> Cost {
        let Some(at) = self.find(token) else { return Cost::default() };
        self.mappings[at].limited = false;
        // One that waits for buffers besides has its turn when they come.
        if self.mappings[at].starved {
            Cost::default()
        } else {
            self.take_turn_within(core, port, token, turn)
        }
    }

    /// Puts a socket last in line, where it is not there yet.
    pub(super) fn wait_in_line(&mut self, core: &mut Core, token: Token) {
        let Some(at) = self.find(token) else { return };
        if !std::mem::replace(&mut self.mappings[at].limited, true) {
            core.counters.limited_to_guest.waits += 1;
            core.lines.to_guest.join(core.now, token);
        }
    }

    /// Whether a token of a line is still a socket's.
    pub fn is_socket(&self, token: Token) -> bool {
        self.find(token).is_some()
    }
}
