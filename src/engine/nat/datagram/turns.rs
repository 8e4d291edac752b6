//! What the world sends: sockets take turns, each bounded, and hand their datagrams to the guest.
//!
//! A socket that used its turn up has another in the next batch, or where a limit holds when it comes up in line; one that found no receive buffers waits
//! until the guest posts some, with its datagrams in the kernel's queue.

use std::net::SocketAddr;

use super::delivery::Delivery;
use super::{DatagramTable, Kind};
use crate::engine::core::{Core, Neighbour};
use crate::engine::counters::DropReason;
use crate::engine::guest_port::{GuestPort, ReserveError};
use crate::engine::host_net::{HostDatagram, Readiness, Token};
use crate::limits;
use crate::rate_limit::Cost;
use crate::wire::ethernet;

/// Whether a socket has more to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pumped {
    Empty,
    More,
    Starved,
    /// Reading failed; the socket may have more.
    Failed,
}

impl<D: HostDatagram> DatagramTable<D> {
    /// A socket has datagrams, or news of what it sent.
    pub fn host_ready(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token, ready: Readiness) {
        let Some(at) = self.find(token) else { return };
        self.mappings[at].failed |= ready.failed;
        // One whose turn is still to come takes it then: a flood is no reason for more turns.
        if !self.mappings[at].again && !self.mappings[at].limited {
            self.take_turn(core, port, token);
        }
    }

    /// Lets a socket hand over what costs `turn` at most, or a batch more; what it used of `turn`.
    pub(super) fn take_turn_within(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        token: Token,
        turn: Cost,
    ) -> Cost {
        self.tell_errors(core, port, token);
        let mut used = Cost::default();
        let pumped = self.pump(core, port, token, (turn, &mut used));
        core.lines.to_guest.charge(core.now, used.less(turn));
        self.end_turn(core, token, pumped);
        used
    }

    /// What a socket does after its turn.
    fn end_turn(&mut self, core: &mut Core, token: Token, pumped: Pumped) {
        let Some(at) = self.find(token) else { return };
        if pumped == Pumped::More && core.lines.to_guest.is_on() {
            self.mappings[at].failed_turns = 0;
            return self.wait_in_line(core, token);
        }
        let mapping = &mut self.mappings[at];
        mapping.failed_turns = match pumped {
            Pumped::Failed => mapping.failed_turns.saturating_add(1),
            _ => 0,
        };
        match pumped {
            Pumped::Empty if !mapping.failed => {}
            // Its next event, or the guest's next buffers, are reason to look again.
            Pumped::Failed if mapping.failed_turns >= limits::DATAGRAM_FAILED_TURNS_MAX => {
                mapping.failed_turns = 0;
            }
            Pumped::Empty | Pumped::More | Pumped::Failed => {
                mapping.again = true;
                self.again.push(token);
            }
            Pumped::Starved => {
                if !std::mem::replace(&mut mapping.starved, true) {
                    self.starved.push_back(token);
                }
            }
        }
    }

    /// Whether sockets have more to give now.
    pub fn has_more(&self) -> bool {
        !self.again.is_empty()
    }

    /// Whether sockets wait for receive buffers.
    pub fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// Sockets that are closed while they wait for receive buffers keep their place until some come: they are
    /// forgotten once they are the most.
    pub(super) fn forget_gone_turns(&mut self) {
        if self.starved.len() > 2 * self.mappings.len() + 1 {
            let mut starved = std::mem::take(&mut self.starved);
            starved.retain(|token| self.find(*token).is_some());
            self.starved = starved;
        }
    }

    /// Places in line for receive buffers, some of them of sockets that are gone.
    pub fn waiting_len(&self) -> usize {
        self.starved.len()
    }

    /// Sockets that used their turn up have another.
    pub fn flush(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        // Those that use this turn up too go to the end of the list: each has one turn a batch.
        let turns = self.again.len();
        for n in 0..turns {
            let token = self.again[n];
            if let Some(at) = self.find(token) {
                self.mappings[at].again = false;
                self.take_turn(core, port, token);
            }
        }
        self.again.drain(..turns);
    }

    /// The guest posted receive buffers.
    pub fn guest_has_buffers(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        for _ in 0..self.starved.len() {
            let Some(token) = self.starved.pop_front() else { break };
            let Some(at) = self.find(token) else { continue };
            self.mappings[at].starved = false;
            self.host_ready(core, port, token, Readiness::default());
            if self.mappings.get(at).is_some_and(|mapping| mapping.starved) {
                break;
            }
        }
    }

    /// Moves datagrams of one socket to the guest.
    fn pump(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        token: Token,
        (turn, used): (Cost, &mut Cost),
    ) -> Pumped {
        let Some(at) = self.find(token) else {
            return Pumped::Empty;
        };
        if let Some(guest_port) = self.mappings[at].published_port {
            let Some(addr) = core.guest_of(self.mappings[at].owner) else {
                return self.drain_unwanted(core, at);
            };
            self.mappings[at].guest = Some(SocketAddr::new(addr, guest_port));
            self.mappings[at].neighbour = core.neighbour(addr);
            if self.mappings[at].neighbour.is_none() {
                core.ask_for(port, addr);
                return self.drain_unwanted(core, at);
            }
        }
        let mut pumped = Pumped::Failed;
        for _ in 0..limits::DATAGRAM_BATCHES {
            match self.pump_batch(core, port, at, (turn, used)) {
                Pumped::Failed => {}
                Pumped::More => pumped = Pumped::More,
                other => return other,
            }
            if used.bytes >= turn.bytes || used.packets >= turn.packets {
                break;
            }
        }
        pumped
    }

    /// Throws away what comes for a guest that is not there.
    fn drain_unwanted(&mut self, core: &mut Core, at: usize) -> Pumped {
        let Some(socket) = self.mappings[at].socket.as_mut() else {
            return Pumped::Empty;
        };
        let mut turn = Pumped::Failed;
        for _ in 0..limits::DATAGRAM_BATCHES {
            let counters = &mut core.counters;
            match socket.recv_batch(usize::MAX, &mut |_| counters.drop(DropReason::NoFlow)) {
                Ok(false) => return Pumped::Empty,
                Ok(true) => turn = Pumped::More,
                Err(_) => {}
            }
        }
        turn
    }

    /// Moves one batch of datagrams of socket `at` to the guest.
    fn pump_batch(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        at: usize,
        (turn, used): (Cost, &mut Cost),
    ) -> Pumped {
        let mapping = &mut self.mappings[at];
        let (Some(guest), Some(neighbour)) = (mapping.guest, mapping.neighbour) else {
            return Pumped::Empty;
        };
        // The guest may have another MAC address since it sent.
        let mac = core.neighbour(guest.ip()).map_or(neighbour.mac, |now| now.mac);
        let neighbour = Neighbour { mac, ..neighbour };
        // Asked before anything is taken: what waits in the socket is not lost.
        match port.has_room(neighbour.pair, ethernet::HEADER_BYTES + usize::from(core.ip_mtu)) {
            // No buffers hold a full frame, but perhaps those that come.
            Ok(()) | Err(ReserveError::TooSmall) => {}
            Err(ReserveError::Full | ReserveError::Down) => return Pumped::Starved,
        }
        // How long they are shows when they are taken; what is beyond the turn is owed.
        let frames_max = turn.less(*used).bytes / (u64::from(core.ip_mtu) + ethernet::HEADER_BYTES as u64);
        let frames_max = port.buffers(neighbour.pair).min(usize::try_from(frames_max).unwrap_or(usize::MAX));
        let arrivals_max = frames_max / mapping.coalesced.max(1);
        let Some(mut socket) = mapping.socket.take() else {
            return Pumped::Empty;
        };
        let mut most = 1;
        let outcome = socket.recv_batch(arrivals_max.max(1), &mut |arrival| {
            most = most.max(arrival.bytes.len().div_ceil(arrival.segment_bytes.max(1)));
            let remote = match self.admit(core, at, guest, &arrival) {
                Ok(remote) => remote,
                Err(reason) => return core.counters.drop(reason),
            };
            let cost = Self::cost_to_guest(core, &arrival);
            *used = Cost { bytes: used.bytes + cost.bytes, packets: used.packets + cost.packets };
            let delivery = Delivery { guest, remote, neighbour };
            match self.mappings[at].kind {
                Kind::Udp => delivery.udp(core, port, &arrival),
                Kind::Echo => delivery.echo(core, port, arrival.bytes, arrival.tos),
            }
        });
        if let Some(mapping) = self.mappings.get_mut(at) {
            mapping.socket = Some(socket);
            mapping.coalesced = most;
            // The kernel says once that there is an error, and keeps what it is about.
            mapping.failed |= outcome.is_err();
        }
        match outcome {
            Ok(false) => Pumped::Empty,
            Ok(true) => Pumped::More,
            Err(_) => Pumped::Failed,
        }
    }
}
