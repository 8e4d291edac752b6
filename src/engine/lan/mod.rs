//! A guest on a link with others: what of its frames may leave, and what of the link's is for it.
//!
//! Pure judgement on the host's copy of a frame's first bytes; the worker moves the frames. Towards the
//! link: [`guard`] lets the guest send from its own addresses only (`written`: nor have the kernel write others into what
//! was judged), [`vlan`] adds the network's 802.1Q tag.
//! Towards the guest: the tag is taken away, and what the guest's driver did not accept, or could not
//! receive, is refused. On a named network, [`services`] says which frames are for DHCP and DNS of ours.
//!
//! May touch: `wire`, `addr`, `limits`. Read first: IEEE 802.1Q, 9; virtio 1.3, 5.1.6.

mod dhcp;
pub mod guard;
mod ipv6;
pub mod services;
pub mod vlan;
mod written;

use crate::engine::counters::DropReason;
use crate::engine::guest_port::GuestOffloads;
use crate::wire::ethernet;
use crate::wire::vnet::{Checksum, GsoKind, VnetHeader};

/// Whether a frame of `len_bytes` fits a link of `ip_mtu` bytes, or will be cut to it.
///
/// # Errors
/// [`DropReason::TooLong`].
pub fn check_length(vnet: &VnetHeader, len_bytes: usize, ip_mtu: u16) -> Result<(), DropReason> {
    let fits = vnet.gso.is_some() || len_bytes <= ethernet::HEADER_BYTES + usize::from(ip_mtu);
    if fits { Ok(()) } else { Err(DropReason::TooLong) }
}

/// Whether the guest's driver accepted what the header of a frame towards it asks for. The kernel was told;
/// frames it queued for an earlier driver may ask for more.
///
/// # Errors
/// [`DropReason::NotNegotiated`].
pub fn check_offloads(vnet: &VnetHeader, accepted: GuestOffloads) -> Result<(), DropReason> {
    let partial = matches!(vnet.checksum, Checksum::Partial { .. });
    let segmented = vnet.gso.is_none_or(|gso| {
        let kind = match gso.kind {
            GsoKind::Tcp4 => accepted.tso4,
            GsoKind::Tcp6 => accepted.tso6,
            GsoKind::UdpL4 => accepted.uso4 && accepted.uso6,
            GsoKind::UdpFragment => false,
        };
        kind && (accepted.ecn || !gso.ecn)
    });
    let accepted = segmented && (accepted.checksum || !partial);
    if accepted { Ok(()) } else { Err(DropReason::NotNegotiated) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::vnet::Gso;

    const TSO4: GuestOffloads =
        GuestOffloads { checksum: true, tso4: true, tso6: false, ecn: false, uso4: false, uso6: false };

    fn gso(kind: GsoKind, ecn: bool) -> VnetHeader {
        let gso = Gso { kind, size_bytes: 1448, headers_bytes: 54, ecn };
        let checksum = Checksum::Partial { start: 34, offset: 16 };
        VnetHeader { checksum, gso: Some(gso), num_buffers: 0 }
    }

    #[test]
    fn only_offloads_the_guest_accepted_reach_it() {
        let partial = VnetHeader { gso: None, ..gso(GsoKind::Tcp4, false) };
        let plain = VnetHeader::default();
        let none = GuestOffloads::default();
        let refused = Err(DropReason::NotNegotiated);
        for (vnet, accepted, expected) in [
            (plain, none, Ok(())),
            (partial, none, refused),
            (partial, TSO4, Ok(())),
            (gso(GsoKind::Tcp4, false), TSO4, Ok(())),
            (gso(GsoKind::Tcp4, true), TSO4, refused),
            (gso(GsoKind::Tcp4, true), GuestOffloads { ecn: true, ..TSO4 }, Ok(())),
            (gso(GsoKind::Tcp6, false), TSO4, refused),
            (gso(GsoKind::UdpL4, false), GuestOffloads { uso4: true, ..TSO4 }, refused),
            (gso(GsoKind::UdpL4, false), GuestOffloads { uso4: true, uso6: true, ..TSO4 }, Ok(())),
            (gso(GsoKind::UdpFragment, false), TSO4, refused),
        ] {
            assert_eq!(check_offloads(&vnet, accepted), expected, "{vnet:?} {accepted:?}");
        }
    }

    #[test]
    fn frames_beyond_the_mtu_are_refused_unless_they_will_be_cut() {
        let plain = VnetHeader::default();
        assert_eq!(check_length(&plain, 1514, 1500), Ok(()));
        assert_eq!(check_length(&plain, 1515, 1500), Err(DropReason::TooLong));
        assert_eq!(check_length(&gso(GsoKind::Tcp4, false), 65_000, 1500), Ok(()));
    }
}
