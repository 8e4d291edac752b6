//! Whose datagrams a socket takes (RFC 4787, 5), and under which address the guest sees them.

use std::net::SocketAddr;

use super::{DatagramTable, Key, Kind};
use crate::engine::core::Core;
use crate::engine::host_net::HostDatagram;
use crate::engine::nat::policy;
use crate::engine::placement::Place;

impl<D: HostDatagram> DatagramTable<D> {
    /// The remote end as the guest sees it, if it may send to this socket.
    pub(super) fn admit(
        &mut self,
        core: &mut Core,
        at: usize,
        guest: SocketAddr,
        real: SocketAddr,
    ) -> Option<SocketAddr> {
        let mapping = &self.mappings[at];
        let real = mapping.kind.endpoint(real);
        if let Some(&peer) = self.by_real.get(&(at, real)) {
            if self.peers[peer].key.guest == guest {
                self.peers[peer].answered = true;
                self.refresh(core, peer);
                return Some(self.peers[peer].key.remote);
            }
            // The guest behind a published port has another address now.
            self.remove_peer(core, peer);
        }
        self.mappings[at].published_port?;
        let mut key = Key { kind: Kind::Udp, guest, remote: policy::visible(core, real) };
        if self.by_key.contains_key(&key) {
            let taken = |port| {
                self.by_key.contains_key(&Key { remote: SocketAddr::new(key.remote.ip(), port), ..key })
            };
            key.remote = SocketAddr::new(key.remote.ip(), policy::free_port(real.port(), taken)?);
        }
        let peer = self.add_peer(core, at, key, real);
        self.peers[peer].stranger = true;
        core.claim(Place::Exchange(key));
        Some(self.peers[peer].key.remote)
    }
}
