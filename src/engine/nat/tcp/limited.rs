//! A flow under a limit: what may pass at once does, the rest waits for the flow's turn in line.
//!
//! What the guest sends and may not pass is held as if the socket had refused it: unacknowledged, and its window
//! promises no more than passes in a moment. What the world sends stays in its socket.

use std::io;

use super::flow::{Fate, Flow, TIMESTAMPS_BYTES};
use super::pool::Budget;
use crate::engine::core::Core;
use crate::engine::emit;
use crate::engine::host_net::HostStream;
use crate::frame::Payload;
use crate::limits;
use crate::rate_limit::Cost;
use crate::wire::tcp;

impl<S: HostStream> Flow<S> {
    /// Bytes of headers in front of a segment's payload, and of the largest payload, of what the guest sends.
    fn guest_segment(&self, core: &Core) -> (usize, usize) {
        let options = if self.recv.timestamps.is_some() { TIMESTAMPS_BYTES } else { 0 };
        let head_bytes = emit::ip_head_bytes(self.key.guest.ip()) + tcp::HEADER_BYTES + options;
        let mss = usize::from(core.ip_mtu).saturating_sub(40 + options).max(1);
        (head_bytes, mss)
    }

    fn cost_from_guest(&self, core: &Core, payload_bytes: usize) -> Cost {
        let (head_bytes, mss) = self.guest_segment(core);
        Cost::of_payload(payload_bytes, head_bytes, mss)
    }

    /// Whether what the guest sends is limited.
    fn is_limited_from_guest(&self, core: &Core) -> bool {
        core.lines.from_guest.is_on() && !self.is_service
    }

    /// Whether so many bytes of the guest may go into the socket now. If not the flow waits for its turn.
    pub(super) fn passes(&mut self, core: &mut Core, payload_bytes: usize) -> bool {
        if !self.is_limited_from_guest(core) {
            return true;
        }
        if self.recv.limited {
            return false;
        }
        let cost = self.cost_from_guest(core, payload_bytes);
        core.lines.from_guest.note_sender(core.now, &mut self.recv.sender);
        let passes = core.lines.from_guest.take(core.now, cost);
        if !passes {
            self.wait_from_guest(core);
        }
        passes
    }

    fn wait_from_guest(&mut self, core: &mut Core) {
        self.recv.limited = true;
        core.counters.limited_from_guest.waits += 1;
        core.lines.from_guest.join(core.now, self.token);
    }

    /// Of `passed` bytes that passed the socket took `taken` only.
    pub(super) fn give_back(&self, core: &Core, passed: usize, taken: usize) {
        if taken < passed && self.is_limited_from_guest(core) {
            let all = self.cost_from_guest(core, passed);
            core.lines.from_guest.give_back(all.less(self.cost_from_guest(core, taken)));
        }
    }

    /// Its turn: moves held payload into the socket for `turn`. What it used of that, and what became of the flow.
    pub(super) fn take_turn_from_guest(
        &mut self,
        core: &mut Core,
        budget: &mut Budget,
        turn: Cost,
    ) -> (Cost, Result<(), Fate>) {
        self.recv.limited = false;
        let (head_bytes, mss) = self.guest_segment(core);
        core.lines.from_guest.note_sender(core.now, &mut self.recv.sender);
        let mut used = Cost::default();
        while let Some(bytes) = self.recv.pool.front(budget, self.recv.nxt) {
            let most = turn.less(used).payload_max(head_bytes, mss);
            if most == 0 {
                self.wait_from_guest(core);
                break;
            }
            let part = &bytes[..bytes.len().min(most)];
            let Some(stream) = self.stream.as_mut() else { break };
            match stream.send(&Payload::from_host(part)) {
                Ok(len) => {
                    let short = len < part.len();
                    let cost = Cost::of_payload(len, head_bytes, mss);
                    used.bytes += cost.bytes;
                    used.packets += cost.packets;
                    self.took_held(core, len);
                    if short {
                        self.want_room();
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.want_room();
                    break;
                }
                Err(_) => return (used, Err(Fate::ResetBoth)),
            }
        }
        (used, self.pass_fin_on(budget))
    }

    /// The window to promise where the socket has room for `space_bytes`: no more than is soon through the limit.
    pub(super) fn window_within_limit(&self, core: &Core, space_bytes: usize) -> usize {
        if !self.is_limited_from_guest(core) {
            return space_bytes;
        }
        let (head_bytes, mss) = self.guest_segment(core);
        let window = core.lines.from_guest.window(head_bytes + mss);
        let pooled = limits::TCP_POOL_BYTES_MAX / (core.lines.flows + 1);
        space_bytes.min(window.min(pooled.max(2 * mss)))
    }
}
