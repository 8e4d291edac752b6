//! Virtio features: what is offered, what was negotiated, and what follows from it.
//!
//! Everything works with no feature at all; each is honoured only if the driver acknowledged it. A
//! feature acknowledged without one it depends on counts as not acknowledged (virtio 1.3, 5.1.3.1).
//!
//! May touch: nothing. Read first: virtio 1.3, 2.2, 5.1.3 and 6; the vhost-user specification for
//! bit 30.

use std::fmt;

use vhost::vhost_user::VhostUserVirtioFeatures;
use virtio_bindings::bindings::{virtio_config, virtio_net, virtio_ring};

use crate::engine::guest_port::GuestOffloads;

macro_rules! features {
    ($($name:ident = $bit:expr, $needs:expr;)*) => {
        /// One virtio feature.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(non_camel_case_types, reason = "the specification's own names, as they appear in the log")]
        pub enum Feature {
            $(
                #[doc = concat!("`", stringify!($name), "`.")]
                $name = $bit as isize,
            )*
        }

        impl Feature {
            /// Every feature that may be offered, dependencies before their dependents.
            pub const ALL: &'static [Feature] = &[$(Feature::$name),*];

            /// The specification's name, without its prefix.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Feature::$name => stringify!($name),)*
                }
            }

            /// Features of which at least one must be acknowledged too; none if empty.
            const fn needs_one_of(self) -> &'static [Feature] {
                match self {
                    $(Feature::$name => &$needs,)*
                }
            }
        }
    };
}

features! {
    VERSION_1 = virtio_config::VIRTIO_F_VERSION_1, [];
    CSUM = virtio_net::VIRTIO_NET_F_CSUM, [];
    GUEST_CSUM = virtio_net::VIRTIO_NET_F_GUEST_CSUM, [];
    MTU = virtio_net::VIRTIO_NET_F_MTU, [];
    MAC = virtio_net::VIRTIO_NET_F_MAC, [];
    GUEST_TSO4 = virtio_net::VIRTIO_NET_F_GUEST_TSO4, [Feature::GUEST_CSUM];
    GUEST_TSO6 = virtio_net::VIRTIO_NET_F_GUEST_TSO6, [Feature::GUEST_CSUM];
    GUEST_ECN = virtio_net::VIRTIO_NET_F_GUEST_ECN, [Feature::GUEST_TSO4, Feature::GUEST_TSO6];
    HOST_TSO4 = virtio_net::VIRTIO_NET_F_HOST_TSO4, [Feature::CSUM];
    HOST_TSO6 = virtio_net::VIRTIO_NET_F_HOST_TSO6, [Feature::CSUM];
    HOST_ECN = virtio_net::VIRTIO_NET_F_HOST_ECN, [Feature::HOST_TSO4, Feature::HOST_TSO6];
    MRG_RXBUF = virtio_net::VIRTIO_NET_F_MRG_RXBUF, [];
    STATUS = virtio_net::VIRTIO_NET_F_STATUS, [];
    CTRL_VQ = virtio_net::VIRTIO_NET_F_CTRL_VQ, [];
    GUEST_ANNOUNCE = virtio_net::VIRTIO_NET_F_GUEST_ANNOUNCE, [Feature::CTRL_VQ];
    MQ = virtio_net::VIRTIO_NET_F_MQ, [Feature::CTRL_VQ];
    INDIRECT_DESC = virtio_ring::VIRTIO_RING_F_INDIRECT_DESC, [];
    EVENT_IDX = virtio_ring::VIRTIO_RING_F_EVENT_IDX, [];
    PROTOCOL_FEATURES = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits().trailing_zeros(), [];
    IN_ORDER = virtio_config::VIRTIO_F_IN_ORDER, [];
    GUEST_USO4 = virtio_net::VIRTIO_NET_F_GUEST_USO4, [Feature::GUEST_CSUM];
    GUEST_USO6 = virtio_net::VIRTIO_NET_F_GUEST_USO6, [Feature::GUEST_CSUM];
    HOST_USO = virtio_net::VIRTIO_NET_F_HOST_USO, [Feature::CSUM];
}

impl Feature {
    /// The feature's bit in a mask.
    pub const fn mask(self) -> u64 {
        1 << self as u32
    }
}

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Features(u64);

impl Features {
    /// No feature.
    pub const NONE: Features = Features(0);

    /// What the device offers; `MAC` only if it has an address of its own to offer, because a driver
    /// that acknowledges it takes the address from the configuration space, zero or not.
    pub fn offered(has_mac: bool) -> Features {
        let bits = Feature::ALL.iter().fold(0, |bits, f| bits | f.mask());
        if has_mac { Features(bits) } else { Features(bits & !Feature::MAC.mask()) }
    }

    /// The bits as they came.
    pub const fn from_bits(bits: u64) -> Features {
        Features(bits)
    }

    /// The bits as they go.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether `feature` is in the set.
    pub const fn has(self, feature: Feature) -> bool {
        self.0 & feature.mask() != 0
    }

    /// The part of the set that `offered` lacks.
    pub const fn beyond(self, offered: Features) -> Features {
        Features(self.0 & !offered.0)
    }

    /// What counts of an acknowledged set: bits that were offered, less those whose dependencies
    /// are missing.
    pub fn effective(acked: Features, offered: Features) -> Features {
        let mut set = Features(acked.0 & offered.0);
        for feature in Feature::ALL {
            let needs = feature.needs_one_of();
            if !needs.is_empty() && !needs.iter().any(|n| set.has(*n)) {
                set.0 &= !feature.mask();
            }
        }
        set
    }

    /// What the driver takes on frames towards it.
    pub fn guest_offloads(self) -> GuestOffloads {
        GuestOffloads {
            checksum: self.has(Feature::GUEST_CSUM),
            tso4: self.has(Feature::GUEST_TSO4),
            tso6: self.has(Feature::GUEST_TSO6),
            ecn: self.has(Feature::GUEST_ECN),
            uso4: self.has(Feature::GUEST_USO4),
            uso6: self.has(Feature::GUEST_USO6),
        }
    }

    /// Bytes of the header in front of every frame: `num_buffers` is there under `VERSION_1` or
    /// `MRG_RXBUF` only (virtio 1.3, 5.1.6.1).
    pub const fn vnet_header_bytes(self) -> usize {
        if self.has(Feature::VERSION_1) || self.has(Feature::MRG_RXBUF) { 12 } else { 10 }
    }
}

/// Names in order of bits, unknown bits as numbers: `CSUM MRG_RXBUF bit40`; `none` if empty.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("none");
        }
        let mut space = "";
        for bit in (0..64).filter(|bit| self.0 & (1 << bit) != 0) {
            f.write_str(space)?;
            space = " ";
            match Feature::ALL.iter().find(|known| **known as u32 == bit) {
                Some(known) => f.write_str(known.name())?,
                None => write!(f, "bit{bit}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(features: &[Feature]) -> Features {
        Features(features.iter().fold(0, |bits, f| bits | f.mask()))
    }

    #[test]
    fn feature_without_its_dependency_counts_as_not_acknowledged() {
        let offered = Features::offered(true);
        let acked = set(&[Feature::GUEST_TSO4, Feature::GUEST_ECN, Feature::MQ, Feature::EVENT_IDX]);
        assert_eq!(Features::effective(acked, offered), set(&[Feature::EVENT_IDX]));
        let acked = set(&[Feature::CSUM, Feature::HOST_TSO6, Feature::HOST_ECN]);
        assert_eq!(Features::effective(acked, offered), acked);
    }

    #[test]
    fn feature_never_offered_is_not_honoured() {
        let packed = Features(1 << 34);
        assert_eq!(Features::effective(packed, Features::offered(true)), Features::NONE);
        assert_eq!(packed.beyond(Features::offered(true)), packed);
    }

    #[test]
    fn mac_is_offered_only_with_an_address() {
        assert!(Features::offered(true).has(Feature::MAC));
        assert!(!Features::offered(false).has(Feature::MAC));
    }

    #[test]
    fn names_are_printed_in_order_of_bits() {
        let features = Features(set(&[Feature::VERSION_1, Feature::CSUM]).0 | 1 << 40);
        assert_eq!(features.to_string(), "CSUM VERSION_1 bit40");
        assert_eq!(Features::NONE.to_string(), "none");
    }

    #[test]
    fn header_is_short_only_for_a_legacy_driver_without_mergeable_buffers() {
        assert_eq!(Features::NONE.vnet_header_bytes(), 10);
        assert_eq!(set(&[Feature::MRG_RXBUF]).vnet_header_bytes(), 12);
        assert_eq!(set(&[Feature::VERSION_1]).vnet_header_bytes(), 12);
    }
}
