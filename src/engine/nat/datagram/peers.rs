//! Remote endpoints of sockets: how they come, how long they stay, and who makes room for whom.
//!
//! Those the guest sent to and strangers, who sent first, are bounded apart: a flood of invented senders
//! drives out other strangers only. A stranger at a socket of the guest's own is not what keeps it open:
//! its time runs from its first datagram until the guest speaks to it, and none is let in where nobody is left
//! whom the guest spoke to (RFC 4787, REQ-6: who refreshes from outside may keep a port open for ever).

use std::hash::Hash;
use std::net::SocketAddr;

use hashbrown::HashMap;

use super::{DatagramTable, Key, Kind, Peer, PeerId, Sent};
use crate::config::UdpFiltering;
use crate::engine::core::Core;
use crate::engine::flows::Carried;
use crate::engine::host_net::{HostDatagram, Token};
use crate::engine::nat::TokenKind;
use crate::engine::placement::Place;
use crate::engine::timers::TimerSlot;
use crate::limits;
use crate::rate_limit::Sender;

impl<D: HostDatagram> DatagramTable<D> {
    /// Adds a remote endpoint the guest sends to through its socket; `None` if it has no socket.
    pub fn insert_peer(&mut self, core: &mut Core, key: Key, real: SocketAddr) -> Option<PeerId> {
        let mapping = self.mapping_of(core, &self.end_of(&key))?;
        Some(PeerId(self.add_peer(core, mapping, key, real, false)))
    }

    /// Adds a remote endpoint, `stranger` if it sent before the guest did.
    pub(super) fn add_peer(
        &mut self,
        core: &mut Core,
        mapping: usize,
        key: Key,
        real: SocketAddr,
        stranger: bool,
    ) -> usize {
        let at = self.place_peer(core, mapping, key, real, stranger);
        Self::note_flow(core, true, &key, Carried::default());
        at
    }

    /// The same of one that another worker had: nobody is told that it begins.
    pub(super) fn place_peer(
        &mut self,
        core: &mut Core,
        mapping: usize,
        key: Key,
        real: SocketAddr,
        stranger: bool,
    ) -> usize {
        self.generation = self.generation.wrapping_add(1);
        let token = TokenKind::Peer.token(self.generation, self.peers.vacant_key());
        let older = self.mappings[mapping].newest_peer;
        let at = self.peers.insert(Peer {
            token,
            key,
            real,
            mapping,
            answered: false,
            spoken: false,
            stranger,
            sent: Sent::default(),
            carried: Carried::default(),
            local: None,
            timer: TimerSlot::default(),
            sender: Sender::default(),
            newer: None,
            older,
        });
        if let Some(older) = older {
            self.peers[older].newer = Some(at);
        }
        self.mappings[mapping].newest_peer = Some(at);
        self.by_key.insert(key, at);
        self.by_real.insert((mapping, real), at);
        if self.is_found_by_itself(at) {
            core.claim(Place::Exchange(key));
        }
        self.strangers += usize::from(stranger);
        self.mappings[mapping].spoken_to += usize::from(!stranger);
        self.count_address(at);
        self.refresh(core, at);
        // After the new one is in, so that the one given up may be its own socket's only other.
        self.keep_within(core);
        at
    }

    /// Whether other workers find this exchange by its own name, not by its socket's: a published port's, or
    /// a stranger's at a socket for another remote end.
    fn is_found_by_itself(&self, at: usize) -> bool {
        let peer = &self.peers[at];
        self.mappings[peer.mapping].end != Some(self.end_of(&peer.key))
    }

    fn keep_within(&mut self, core: &mut Core) {
        if self.strangers > limits::DATAGRAM_STRANGERS_MAX
            && let Some(oldest) = self.stranger_lru.oldest()
        {
            self.remove_peer(core, oldest);
        }
        if self.peers.len() - self.strangers > limits::DATAGRAM_PEERS_MAX
            && let Some(oldest) = self.peer_lru.oldest()
        {
            self.remove_peer(core, oldest);
        }
    }

    /// The guest sends to a remote endpoint, which is no stranger from then on.
    pub(super) fn speak(&mut self, core: &mut Core, at: usize) {
        if std::mem::take(&mut self.peers[at].stranger) {
            self.peers[at].answered = true;
            self.strangers -= 1;
            self.mappings[self.peers[at].mapping].spoken_to += 1;
            self.stranger_lru.remove(at);
            self.count_address(at);
        }
        self.refresh(core, at);
        self.keep_within(core);
    }

    /// A remote endpoint sent something.
    pub(super) fn hear(&mut self, core: &mut Core, at: usize) {
        let peer = &mut self.peers[at];
        if !peer.stranger || self.mappings[peer.mapping].published_port.is_some() {
            peer.answered = true;
            self.refresh(core, at);
        }
    }

    /// The idle time of a remote endpoint starts again.
    fn refresh(&mut self, core: &mut Core, at: usize) {
        let peer = &mut self.peers[at];
        let deadline = core.now + peer.idle_max();
        core.timers.set(&mut peer.timer, peer.token, deadline);
        let lru = if peer.stranger { &mut self.stranger_lru } else { &mut self.peer_lru };
        lru.touch(at);
        let mapping = &mut self.mappings[peer.mapping];
        mapping.last_active = core.now;
        if mapping.published_port.is_none() {
            self.lru.touch(peer.mapping);
        }
    }

    /// Counts one more endpoint of an address the guest sends to, if that is how senders are judged.
    fn count_address(&mut self, at: usize) {
        let peer = &self.peers[at];
        let is_judged = self.rules.filtering == UdpFiltering::AddressDependent && peer.key.kind == Kind::Udp;
        if is_judged && !peer.stranger {
            *self.spoken_to.entry((peer.mapping, peer.real.ip())).or_default() += 1;
        }
    }

    /// Takes back what [`DatagramTable::count_address`] counted for `peer`.
    fn uncount_address(&mut self, peer: &Peer) {
        let address = (peer.mapping, peer.real.ip());
        if !peer.stranger
            && let Some(count) = self.spoken_to.get_mut(&address)
        {
            *count -= 1;
            if *count == 0 {
                self.spoken_to.remove(&address);
            }
        }
    }

    /// A peer's deadline came up.
    pub fn timeout(&mut self, core: &mut Core, token: Token) {
        let at = TokenKind::index(token);
        let Some(peer) = self.peers.get_mut(at).filter(|peer| peer.token == token) else {
            return;
        };
        if core.timers.expired(&mut peer.timer, token, core.now) {
            self.remove_peer(core, at);
        }
    }

    /// Forgets a peer, and its socket if that was the last one and nobody published it.
    pub(super) fn remove_peer(&mut self, core: &mut Core, at: usize) {
        let mapping = self.forget_peer(core, at);
        if self.mappings[mapping].newest_peer.is_none() && self.mappings[mapping].published_port.is_none() {
            self.remove_mapping(core, mapping);
        }
    }

    /// Takes a peer out of every table; returns its mapping.
    pub(super) fn forget_peer(&mut self, core: &mut Core, at: usize) -> usize {
        let (key, carried) = (self.peers[at].key, self.peers[at].carried);
        let mapping = self.take_peer(core, at);
        Self::note_flow(core, false, &key, carried);
        mapping
    }

    /// The same of one that is another worker's from now on: nobody is told that it ends.
    pub(super) fn take_peer(&mut self, core: &mut Core, at: usize) -> usize {
        if self.is_found_by_itself(at) {
            core.release(&Place::Exchange(self.peers[at].key));
        }
        let mut peer = self.peers.remove(at);
        core.timers.clear(&mut peer.timer);
        self.peer_lru.remove(at);
        self.stranger_lru.remove(at);
        self.strangers -= usize::from(peer.stranger);
        self.mappings[peer.mapping].spoken_to -= usize::from(!peer.stranger);
        self.uncount_address(&peer);
        remove_own(&mut self.by_key, &peer.key, at);
        remove_own(&mut self.by_real, &(peer.mapping, peer.real), at);
        if let Some(older) = peer.older {
            self.peers[older].newer = peer.newer;
        }
        match peer.newer {
            Some(newer) => self.peers[newer].older = peer.older,
            None => self.mappings[peer.mapping].newest_peer = peer.older,
        }
        peer.mapping
    }
}

/// Removes the entry at `key` if it is that of the peer `at`.
fn remove_own<K: Eq + Hash>(
    index: &mut HashMap<K, usize, foldhash::quality::RandomState>,
    key: &K,
    at: usize,
) {
    if index.get(key) == Some(&at) {
        index.remove(key);
    }
}
