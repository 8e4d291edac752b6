//! Exchanges of datagrams as they are shown, and ended by who looks at them.

use super::{DatagramTable, Key, Kind, Moved, Peer};
use crate::engine::core::Core;
use crate::engine::flows::{Began, Carried, FlowId, FlowNews, FlowProtocol, FlowView, Table, Walk};
use crate::engine::host_net::HostDatagram;

impl Kind {
    const fn protocol(self) -> FlowProtocol {
        match self {
            Kind::Udp => FlowProtocol::Udp,
            Kind::Echo => FlowProtocol::Icmp,
        }
    }
}

impl<D: HostDatagram> DatagramTable<D> {
    /// Shows exchanges with remote ends to a walk. When one was last used is known of its socket only.
    pub fn list(&self, walk: &mut Walk<'_>) {
        let now = walk.now;
        let view = |peer: &Peer| FlowView {
            id: FlowId(peer.token.0),
            protocol: peer.key.kind.protocol(),
            guest: peer.key.guest,
            remote: peer.key.remote,
            state: if peer.answered { "answered" } else { "unanswered" },
            began: Some(if peer.stranger { Began::World } else { Began::Guest }),
            idle: now.since(self.mappings[peer.mapping].last_active),
            carried: Some(peer.carried),
        };
        walk.over(Table::Datagram, self.peers.capacity(), |place| self.peers.get(place).map(view));
    }

    /// Ends an exchange, and its socket with the last. False if there is none of this name.
    pub fn end(&mut self, core: &mut Core, id: FlowId) -> bool {
        let at = id.place() as usize;
        let is_it = self.peers.get(at).is_some_and(|peer| peer.token.0 == id.0);
        if is_it {
            self.remove_peer(core, at);
        }
        is_it
    }

    /// Tells of the end of exchanges whose socket was lost on its way from another worker.
    pub fn note_lost(core: &mut Core, moved: &Moved<D::Detached>) {
        for peer in &moved.peers {
            Self::note_flow(core, false, &peer.key, peer.carried);
        }
    }

    /// Tells of an exchange that began or ended, if anybody listens.
    pub(super) fn note_flow(core: &mut Core, opened: bool, key: &Key, carried: Carried) {
        let (guest, remote, protocol) = (key.guest, key.remote, key.kind.protocol());
        let carried = (!opened).then_some(carried);
        core.flow_news.note(|| FlowNews { opened, protocol, guest, remote, carried });
    }
}
