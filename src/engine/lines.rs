//! Who waits for a limit: of each direction one line of flows, served in turn as tokens come.
//!
//! A flow stands in line once, and leaves it with a turn's tokens, to come back last if it has more. While anybody is
//! in line nobody passes by. One timer a direction says when the first may go.

use std::collections::VecDeque;

use super::host_net::Token;
use crate::rate_limit::{Cost, RateLimits, Sender, Share};
use crate::time::Instant;

/// One direction's.
#[derive(Debug, Default)]
pub struct Line {
    share: Share,
    waiting: VecDeque<Token>,
    /// When the first in line may go.
    due: Option<Instant>,
}

impl Line {
    /// Whether bytes or packets are limited.
    pub fn is_on(&self) -> bool {
        self.share.is_on()
    }

    /// Takes `cost` if it is there and nobody waits.
    pub fn take(&mut self, now: Instant, cost: Cost) -> bool {
        !self.is_on() || (self.waiting.is_empty() && self.share.take(now, cost))
    }

    /// Takes what one turn may use, if it is there and nobody waits.
    pub fn take_turn(&mut self, now: Instant) -> Option<Cost> {
        let turn = self.share.turn();
        self.take(now, turn).then_some(turn)
    }

    /// Takes what has passed already.
    pub fn charge(&self, now: Instant, cost: Cost) {
        self.share.charge(now, cost);
    }

    /// Gives back what was taken and not used.
    pub fn give_back(&self, cost: Cost) {
        self.share.give_back(cost);
    }

    /// Whether a packet that cannot wait may pass.
    pub fn admit(&mut self, now: Instant, sender: &mut Sender, cost: Cost) -> bool {
        self.share.admit(now, sender, cost)
    }

    /// A flow sends: it shares what there is.
    pub fn note_sender(&mut self, now: Instant, sender: &mut Sender) {
        self.share.note_sender(now, sender);
    }

    /// Takes one new flow.
    pub fn take_flow(&self, now: Instant) -> bool {
        self.share.take_flow(now)
    }

    /// When a new flow may begin.
    pub fn flow_ready_at(&self, now: Instant) -> Instant {
        self.share.flow_ready_at(now)
    }

    /// See [`Share::window`].
    pub fn window(&self, packet_bytes: usize) -> usize {
        self.share.window(self.waiting.len(), packet_bytes)
    }

    /// Puts a flow last, which stands nowhere in line.
    pub fn join(&mut self, now: Instant, token: Token) {
        self.waiting.push_back(token);
        if self.due.is_none() {
            self.due = Some(match self.share.claim(now, self.share.turn()) {
                Ok(()) => {
                    self.share.give_back(self.share.turn());
                    now
                }
                Err(at) => at,
            });
        }
    }

    /// The flow whose turn it is, with what it may use; what it does not is to be given back.
    pub fn next(&mut self, now: Instant) -> Option<(Token, Cost)> {
        if self.waiting.is_empty() {
            self.share.release();
            self.due = None;
            return None;
        }
        // Those who waited for a limit that is lifted go on without one.
        let turn = if self.is_on() { self.share.turn() } else { Cost::UNLIMITED };
        match self.share.claim(now, turn) {
            Ok(()) => self.waiting.pop_front().map(|token| (token, turn)),
            Err(at) => {
                self.due = Some(at);
                None
            }
        }
    }

    /// Whether the first in line may go by now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// Places in line, some of them of flows that are gone.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Takes those out who are not to stay.
    pub fn retain(&mut self, stays: impl Fn(Token) -> bool) {
        self.waiting.retain(|token| stays(*token));
    }
}

/// Both directions'.
#[derive(Debug, Default)]
pub struct Lines {
    /// Of what the guest sends.
    pub from_guest: Line,
    /// Of what it is sent.
    pub to_guest: Line,
    /// TCP flows there are.
    pub flows: usize,
}

impl Lines {
    /// Lines for `limits`.
    pub fn new(limits: &RateLimits) -> Lines {
        let line = |limit| Line { share: Share::new(limit), ..Line::default() };
        Lines {
            from_guest: line(limits.from_guest.clone()),
            to_guest: line(limits.to_guest.clone()),
            flows: 0,
        }
    }

    /// Takes up what the limits were set to. Who waits may have another turn at once.
    pub fn refresh(&mut self, now: Instant) {
        for line in [&mut self.from_guest, &mut self.to_guest] {
            line.share.refresh();
            line.due = (!line.waiting.is_empty()).then_some(now);
        }
    }

    /// Looks who sends still.
    pub fn run_timers(&mut self, now: Instant) {
        for line in [&mut self.from_guest, &mut self.to_guest] {
            if line.share.next_deadline().is_some_and(|at| at <= now) {
                line.share.end_period(now);
            }
        }
    }

    /// When a turn comes up, or who sends is to be looked at.
    pub fn next_deadline(&self) -> Option<Instant> {
        let of = |line: &Line| [line.due, line.share.next_deadline()];
        let [one, two] = [of(&self.from_guest), of(&self.to_guest)];
        one.into_iter().chain(two).flatten().min()
    }

    /// Whether somebody may go at once.
    pub fn has_due(&self, now: Instant) -> bool {
        self.from_guest.is_due(now) || self.to_guest.is_due(now)
    }
}
