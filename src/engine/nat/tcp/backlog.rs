//! Connections under way: flows whose handshake is not done, by the end their SYN went to.
//!
//! Each holds a descriptor for up to two minutes, whoever answers. So they have a bound of their own, and
//! where it is reached the longest waiting one of the destination with the most makes room: a guest that
//! asks a dead host a thousand times, or a world that floods one published port, is the one that waits.

use std::collections::VecDeque;
use std::net::SocketAddr;

use hashbrown::HashMap;

use crate::engine::host_net::Token;
use crate::limits;

/// The flows, oldest first, of each destination.
#[derive(Debug)]
pub(super) struct Backlog {
    by_destination: HashMap<SocketAddr, VecDeque<Token>, foldhash::quality::RandomState>,
    len: usize,
    max: usize,
}

impl Backlog {
    /// An empty one, of a table of at most `flows_max` flows.
    pub(super) fn new(flows_max: usize) -> Backlog {
        Backlog {
            by_destination: HashMap::default(),
            len: 0,
            max: limits::TCP_BACKLOG_MAX.min(flows_max / 2).max(1),
        }
    }

    /// A connection to `to` begins.
    pub(super) fn enter(&mut self, to: SocketAddr, token: Token) {
        self.by_destination.entry(to).or_default().push_back(token);
        self.len += 1;
    }

    /// It is established, or over.
    pub(super) fn leave(&mut self, to: SocketAddr, token: Token) {
        let Some(waiting) = self.by_destination.get_mut(&to) else { return };
        if let Some(at) = waiting.iter().position(|waiting| *waiting == token) {
            waiting.remove(at);
            self.len -= 1;
        }
        if waiting.is_empty() {
            self.by_destination.remove(&to);
        }
    }

    /// Where the flow `newest` is one too many, the one that has to go: the oldest of the destination with
    /// the most.
    pub(super) fn too_many(&self, newest: Token) -> Option<Token> {
        if self.len <= self.max {
            return None;
        }
        let others = self.by_destination.values().filter(|waiting| waiting.front() != Some(&newest));
        others.max_by_key(|waiting| waiting.len())?.front().copied()
    }
}
