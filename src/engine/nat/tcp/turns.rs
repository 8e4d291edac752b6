//! Whose turn it is: flows that have data to send, or lack receive buffers.
//!
//! One queue for each pair, because buffers are a pair's. Flows take turns of
//! [`limits::FLOW_TURN_BYTES`] in the order they came. A pair whose guest posts no buffers is
//! *blocked*: nobody has a turn until it posts some, so that those who came first go first, and a flow
//! that is acknowledged while others wait cannot push in front of them.

use std::collections::VecDeque;

use super::BATCH_FLOWS;
use crate::engine::host_net::Token;
use crate::frame::QueuePair;

/// Flows of one pair in order.
#[derive(Debug)]
struct Queue {
    waiting: VecDeque<Token>,
    blocked: bool,
}

impl Default for Queue {
    fn default() -> Queue {
        Queue { waiting: VecDeque::with_capacity(BATCH_FLOWS), blocked: false }
    }
}

/// The queues of all pairs.
#[derive(Debug, Default)]
pub(super) struct Turns {
    queues: Vec<Queue>,
    /// The pair that had a turn last.
    last: usize,
}

impl Turns {
    fn queue(&mut self, pair: QueuePair) -> &mut Queue {
        let at = usize::from(pair.0);
        if self.queues.len() <= at {
            self.queues.resize_with(at + 1, Queue::default);
        }
        &mut self.queues[at]
    }

    /// Puts a flow last.
    pub(super) fn push_back(&mut self, pair: QueuePair, token: Token) {
        self.queue(pair).waiting.push_back(token);
    }

    /// Puts a flow first: it was its turn, and it got nothing.
    pub(super) fn push_front(&mut self, pair: QueuePair, token: Token) {
        self.queue(pair).waiting.push_front(token);
    }

    /// The pair's guest posts no buffers.
    pub(super) fn block(&mut self, pair: QueuePair) {
        self.queue(pair).blocked = true;
    }

    /// Guests posted buffers.
    pub(super) fn unblock_all(&mut self) {
        for queue in &mut self.queues {
            queue.blocked = false;
        }
    }

    /// The flow whose turn it is: pairs in rotation, flows in order.
    pub(super) fn next(&mut self) -> Option<Token> {
        for _ in 0..self.queues.len() {
            self.last = (self.last + 1) % self.queues.len();
            let queue = &mut self.queues[self.last];
            if !queue.blocked
                && let Some(token) = queue.waiting.pop_front()
            {
                return Some(token);
            }
        }
        None
    }

    /// Whether somebody could have a turn now.
    pub(super) fn has_ready(&self) -> bool {
        self.queues.iter().any(|queue| !queue.blocked && !queue.waiting.is_empty())
    }

    /// Whether somebody waits for buffers.
    pub(super) fn has_blocked(&self) -> bool {
        self.queues.iter().any(|queue| queue.blocked && !queue.waiting.is_empty())
    }

    /// Places in all queues.
    pub(super) fn len(&self) -> usize {
        self.queues.iter().map(|queue| queue.waiting.len()).sum()
    }

    /// Takes those out who are not to stay.
    pub(super) fn retain(&mut self, stays: impl Fn(Token) -> bool) {
        for queue in &mut self.queues {
            queue.waiting.retain(|token| stays(*token));
        }
    }

    /// Nobody waits any more.
    pub(super) fn clear(&mut self) {
        self.queues.clear();
        self.last = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: QueuePair = QueuePair(0);
    const B: QueuePair = QueuePair(3);

    #[test]
    fn pairs_alternate_and_flows_keep_their_order() {
        let mut turns = Turns::default();
        for (pair, token) in [(A, 1), (A, 2), (B, 3), (B, 4)] {
            turns.push_back(pair, Token(token));
        }
        let order: Vec<u64> = std::iter::from_fn(|| turns.next()).map(|token| token.0).collect();
        assert_eq!(order, [3, 1, 4, 2]);
    }

    #[test]
    fn a_blocked_pair_holds_up_nobody_else() {
        let mut turns = Turns::default();
        turns.push_back(A, Token(1));
        turns.push_back(B, Token(2));
        turns.block(A);
        assert_eq!(turns.next(), Some(Token(2)));
        assert_eq!(turns.next(), None);
        assert!(turns.has_blocked() && !turns.has_ready());
        turns.unblock_all();
        assert_eq!(turns.next(), Some(Token(1)));
    }
}
