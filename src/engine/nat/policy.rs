//! Where the guest may go. One rule, judged once a flow, before any `connect` or `sendto`.
//!
//! | destination | answer |
//! |---|---|
//! | the gateway | its own services; the host's loopback with `--allow-host-loopback` |
//! | 0/8, 127/8, 224/4, 240/4, broadcast, the guest's own subnet | prohibited, always |
//! | a published port at an address of the host's own | back to the guest, by way of the host (RFC 4787, REQ-9) |
//! | another end of the host's own | prohibited, unless `--allow-host-loopback`: such packets travel over the host's loopback, past the rules that guard its interfaces |
//! | anything else | the world; in an isolated network nothing |

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use hashbrown::HashMap;

use crate::config::{Mode, Protocol, Publish};
use crate::engine::core::Core;
use crate::engine::host_net::HostNet;

/// What may be reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The world beyond the gateway.
    pub world: bool,
    /// The host itself.
    pub host_loopback: bool,
    /// Ports of the host that lead back to the guest, with the addresses they are really bound to.
    pub published: PublishedEnds,
}

/// Ends of the host that lead back to guests, found in one step however many there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublishedEnds {
    by_host_port: HashMap<(Protocol, u16), Vec<Publish>, foldhash::quality::RandomState>,
    /// How many lead to this UDP port of a guest from all of the host's addresses and interfaces.
    udp_from_everywhere: HashMap<u16, usize, foldhash::quality::RandomState>,
    len: usize,
}

impl PublishedEnds {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One more, unless it is known.
    pub fn add(&mut self, port: Publish) {
        // Nearly always one, of thousands of ports.
        let number = (port.protocol, port.host.port());
        let ends = self.by_host_port.entry(number).or_insert_with(|| Vec::with_capacity(1));
        if ends.contains(&port) {
            return;
        }
        ends.push(port);
        self.len += 1;
        if is_udp_everywhere(&port) {
            *self.udp_from_everywhere.entry(port.guest_port).or_default() += 1;
        }
    }

    /// One less; false if it is not known.
    pub fn remove(&mut self, port: &Publish) -> bool {
        let number = (port.protocol, port.host.port());
        let Some(ends) = self.by_host_port.get_mut(&number) else { return false };
        let Some(at) = ends.iter().position(|known| known == port) else { return false };
        ends.swap_remove(at);
        if ends.is_empty() {
            self.by_host_port.remove(&number);
        }
        self.len -= 1;
        if is_udp_everywhere(port)
            && let Some(count) = self.udp_from_everywhere.get_mut(&port.guest_port)
        {
            *count -= 1;
            if *count == 0 {
                self.udp_from_everywhere.remove(&port.guest_port);
            }
        }
        true
    }

    /// Whether this end of the host's own is one of them.
    fn has(&self, protocol: Protocol, to: SocketAddr) -> bool {
        let leads_there = |bound: IpAddr| bound == to.ip() || bound.is_unspecified();
        let ends = self.by_host_port.get(&(protocol, to.port()));
        // Behind one interface's port the host may have a service of its own on its other addresses.
        ends.is_some_and(|ends| {
            ends.iter().any(|port| leads_there(port.host.ip()) && port.interface.is_none())
        })
    }
}

impl FromIterator<Publish> for PublishedEnds {
    fn from_iter<I: IntoIterator<Item = Publish>>(ports: I) -> PublishedEnds {
        let mut ends = PublishedEnds::default();
        ports.into_iter().for_each(|port| ends.add(port));
        ends
    }
}

/// Whether what a guest sends from there by itself can leave through this port's socket, whatever the route.
pub fn is_udp_everywhere(port: &Publish) -> bool {
    port.protocol == Protocol::Udp && port.host.ip().is_unspecified() && port.interface.is_none()
}

/// What becomes of a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to this address of the host's view.
    Connect(SocketAddr),
    /// The gateway has no such service.
    NoService,
    /// Never, administratively.
    Prohibited,
    /// There is nothing beyond the gateway.
    NoRoute,
}

impl Policy {
    /// The policy of a mode.
    pub fn of(mode: &Mode) -> Policy {
        match mode {
            Mode::Nat(nat) => {
                let published = nat.publish.iter().copied().collect();
                Policy { world: true, host_loopback: nat.allow_host_loopback, published }
            }
            Mode::Isolated => Policy::default(),
        }
    }

    /// Judges a new flow of the guest to `to`; `protocol` is `None` for an echo.
    pub fn judge(
        &self,
        core: &Core,
        net: &mut impl HostNet,
        protocol: Option<Protocol>,
        to: SocketAddr,
    ) -> Verdict {
        if to.ip() == core.gateway() {
            let loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), to.port());
            return if self.host_loopback { Verdict::Connect(loopback) } else { Verdict::NoService };
        }
        if is_forbidden(core, to.ip()) {
            return Verdict::Prohibited;
        }
        if !self.world {
            return Verdict::NoRoute;
        }
        if !self.host_loopback && net.is_own_address(to.ip()) && !self.is_published(protocol, to) {
            return Verdict::Prohibited;
        }
        Verdict::Connect(to)
    }

    /// Whether this end of the host's own is a published port.
    fn is_published(&self, protocol: Option<Protocol>, to: SocketAddr) -> bool {
        protocol.is_some_and(|protocol| self.published.has(protocol, to))
    }

    /// Whether a UDP port of the guest is published on all addresses of the host: then what it sends can
    /// leave from there, whatever the route.
    pub fn publishes_udp(&self, guest_port: u16) -> bool {
        self.published.udp_from_everywhere.contains_key(&guest_port)
    }
}

/// Destinations no flow may have (RFC 6890; a connect to 0/8 would reach loopback).
fn is_forbidden(core: &Core, addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => {
            let first = addr.octets()[0];
            first == 0 || first == 127 || first >= 224 || core.lan.subnet.contains(addr)
        }
        IpAddr::V6(_) => true,
    }
}

/// The address under which the guest sees a client or peer of the host's view: the gateway's for the
/// host's loopback and for addresses the guest would take for its neighbours.
pub fn visible(core: &Core, real: SocketAddr) -> SocketAddr {
    let hidden = match real.ip() {
        IpAddr::V4(addr) => addr.is_loopback() || addr.is_unspecified() || core.lan.subnet.contains(addr),
        IpAddr::V6(addr) => addr.is_loopback(),
    };
    if hidden { SocketAddr::new(core.gateway(), real.port()) } else { real }
}

/// Another port for a client whose visible address is taken by a different flow (RFC 6335's dynamic
/// range, searched from `hint` on).
pub fn free_port(hint: u16, mut is_taken: impl FnMut(u16) -> bool) -> Option<u16> {
    const FIRST: u16 = 49_152;
    const COUNT: u16 = 16_384;
    (0..COUNT).map(|n| FIRST + (hint % COUNT).wrapping_add(n) % COUNT).find(|port| !is_taken(*port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_is_found_as_long_as_there_is_one() {
        assert_eq!(free_port(5, |port| port != 49_152), Some(49_152));
        assert_eq!(free_port(0, |port| port != 65_535), Some(65_535));
        assert_eq!(free_port(40_000, |_| true), None);
    }
}
