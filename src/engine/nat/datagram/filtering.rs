//! Whose datagrams a socket takes (RFC 4787, 5), and under which address the guest sees them.
//!
//! A published port takes anybody's. A socket the guest opened takes those of endpoints it sent to, or what
//! the configured filtering allows beyond that; who comes in becomes a remote endpoint of the socket's, so
//! that the guest's answer finds its way back out through it.

use std::net::SocketAddr;

use super::{DatagramTable, Key, Kind};
use crate::config::UdpFiltering;
use crate::engine::core::Core;
use crate::engine::counters::DropReason;
use crate::engine::host_net::{Arrival, HostDatagram};
use crate::engine::nat::policy;
use crate::wire::icmpv4;

impl<D: HostDatagram> DatagramTable<D> {
    /// The remote end as the guest sees it, if it may send to this socket; else why not.
    pub(super) fn admit(
        &mut self,
        core: &mut Core,
        at: usize,
        guest: SocketAddr,
        arrival: &Arrival<'_>,
    ) -> Result<SocketAddr, DropReason> {
        let real = self.mappings[at].kind.endpoint(arrival.from);
        if let Some(&peer) = self.by_real.get(&(at, real)) {
            if self.peers[peer].key.guest == guest {
                self.peers[peer].local = arrival.to;
                self.hear(core, peer);
                self.count_to_guest(peer, arrival);
                return Ok(self.peers[peer].key.remote);
            }
            // The guest behind a published port has another address now.
            self.remove_peer(core, peer);
        }
        if core.draining || !self.lets_in(at, real) {
            return Err(DropReason::Filtered);
        }
        let mut key = Key { kind: Kind::Udp, guest, remote: policy::visible(core, real) };
        if let Some(&peer) = self.by_key.get(&key) {
            if self.peers[peer].real == real {
                // The guest talks to it through another socket, and will go on to.
                self.count_to_guest(peer, arrival);
                return Ok(key.remote);
            }
            let taken = |port| {
                self.by_key.contains_key(&Key { remote: SocketAddr::new(key.remote.ip(), port), ..key })
            };
            key.remote = SocketAddr::new(
                key.remote.ip(),
                policy::free_port(real.port(), taken).ok_or(DropReason::Filtered)?,
            );
        }
        if !core.lines.to_guest.take_flow(core.now) {
            core.counters.limited_to_guest.refused_flows += 1;
            return Err(DropReason::FlowLimit);
        }
        let peer = self.add_peer(core, at, key, real, true);
        self.peers[peer].local = arrival.to;
        self.count_to_guest(peer, arrival);
        Ok(key.remote)
    }

    /// Counts the payload of what came.
    fn count_to_guest(&mut self, peer: usize, arrival: &Arrival<'_>) {
        let peer = &mut self.peers[peer];
        let head_bytes = match peer.key.kind {
            Kind::Udp => 0,
            Kind::Echo => icmpv4::HEADER_BYTES,
        };
        peer.carried.to_guest_bytes += arrival.bytes.len().saturating_sub(head_bytes) as u64;
    }

    /// Whether an endpoint the guest has not sent to from there may send to it.
    fn lets_in(&self, at: usize, real: SocketAddr) -> bool {
        let mapping = &self.mappings[at];
        match (mapping.kind, self.rules.filtering) {
            _ if mapping.published_port.is_some() => true,
            (Kind::Echo, _) | (Kind::Udp, UdpFiltering::AddressAndPortDependent) => false,
            (Kind::Udp, UdpFiltering::AddressDependent) => self.spoken_to.contains_key(&(at, real.ip())),
            (Kind::Udp, UdpFiltering::EndpointIndependent) => mapping.spoken_to > 0,
        }
    }
}
