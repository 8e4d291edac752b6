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

use crate::config::{Mode, Protocol, Publish};
use crate::engine::core::Core;
use crate::engine::host_net::HostNet;

/// What may be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The world beyond the gateway.
    pub world: bool,
    /// The host itself.
    pub host_loopback: bool,
    /// Ports of the host that lead back to the guest, with the addresses they are really bound to.
    pub published: Vec<Publish>,
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
                Policy { world: true, host_loopback: nat.allow_host_loopback, published: nat.publish.clone() }
            }
            Mode::Isolated => Policy { world: false, host_loopback: false, published: Vec::new() },
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
        let leads_there = |bound: SocketAddr| {
            bound.port() == to.port() && (bound.ip() == to.ip() || bound.ip().is_unspecified())
        };
        self.published.iter().any(|port| Some(port.protocol) == protocol && leads_there(port.host))
    }

    /// Whether a UDP port of the guest is published on all addresses of the host: then what it sends can
    /// leave from there, whatever the route.
    pub fn publishes_udp(&self, guest_port: u16) -> bool {
        self.published_udp().any(|port| port.guest_port == guest_port && port.host.ip().is_unspecified())
    }

    /// Published UDP ports, in the order they were given.
    pub fn published_udp(&self) -> impl Iterator<Item = &Publish> {
        self.published.iter().filter(|port| port.protocol == Protocol::Udp)
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
