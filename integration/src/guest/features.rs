//! Virtio and vhost-user feature bits by name: parsing, printing and the dependencies between them.
//!
//! Read first: virtio 1.3, 5.1.3 (feature bits and 5.1.3.1, requirements) and 6 (reserved bits).

use std::fmt;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use thiserror::Error;
use virtio_bindings::{virtio_config as config, virtio_net as net, virtio_ring as ring};

/// Bit 30: the connection negotiates protocol features (vhost-user, "Feature negotiation").
pub const PROTOCOL_FEATURES: u32 = 30;

const NAMES: &[(&str, u32)] = &[
    ("csum", net::VIRTIO_NET_F_CSUM),
    ("guest_csum", net::VIRTIO_NET_F_GUEST_CSUM),
    ("mtu", net::VIRTIO_NET_F_MTU),
    ("mac", net::VIRTIO_NET_F_MAC),
    ("guest_tso4", net::VIRTIO_NET_F_GUEST_TSO4),
    ("guest_tso6", net::VIRTIO_NET_F_GUEST_TSO6),
    ("guest_ecn", net::VIRTIO_NET_F_GUEST_ECN),
    ("host_tso4", net::VIRTIO_NET_F_HOST_TSO4),
    ("host_tso6", net::VIRTIO_NET_F_HOST_TSO6),
    ("host_ecn", net::VIRTIO_NET_F_HOST_ECN),
    ("mrg_rxbuf", net::VIRTIO_NET_F_MRG_RXBUF),
    ("status", net::VIRTIO_NET_F_STATUS),
    ("ctrl_vq", net::VIRTIO_NET_F_CTRL_VQ),
    ("guest_announce", net::VIRTIO_NET_F_GUEST_ANNOUNCE),
    ("mq", net::VIRTIO_NET_F_MQ),
    ("notify_on_empty", config::VIRTIO_F_NOTIFY_ON_EMPTY),
    ("any_layout", config::VIRTIO_F_ANY_LAYOUT),
    ("indirect_desc", ring::VIRTIO_RING_F_INDIRECT_DESC),
    ("event_idx", ring::VIRTIO_RING_F_EVENT_IDX),
    ("protocol_features", PROTOCOL_FEATURES),
    ("version_1", config::VIRTIO_F_VERSION_1),
    ("in_order", config::VIRTIO_F_IN_ORDER),
    ("guest_uso4", net::VIRTIO_NET_F_GUEST_USO4),
    ("guest_uso6", net::VIRTIO_NET_F_GUEST_USO6),
    ("host_uso", net::VIRTIO_NET_F_HOST_USO),
];

/// A feature and the features of which one must be acknowledged with it (virtio 1.3, 5.1.3.1).
const NEEDS: &[(&str, &[&str])] = &[
    ("guest_tso4", &["guest_csum"]),
    ("guest_tso6", &["guest_csum"]),
    ("guest_uso4", &["guest_csum"]),
    ("guest_uso6", &["guest_csum"]),
    ("guest_ecn", &["guest_tso4", "guest_tso6"]),
    ("host_tso4", &["csum"]),
    ("host_tso6", &["csum"]),
    ("host_uso", &["csum"]),
    ("host_ecn", &["host_tso4", "host_tso6"]),
    ("mq", &["ctrl_vq"]),
    ("guest_announce", &["ctrl_vq"]),
];

/// A set of virtio feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

/// Why a text is no feature set.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown feature {0:?}: expected names out of {names}, `all`, `none`, or a mask such as 0x130008001", names = known_names())]
pub struct UnknownFeature(String);

fn known_names() -> String {
    NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn bit_of(name: &str) -> Option<u32> {
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, bit)| *bit)
}

impl Features {
    /// No feature at all: a legacy driver that knows nothing.
    pub const NONE: Features = Features(0);

    /// Every feature this front-end can drive.
    pub fn all() -> Features {
        NAMES.iter().fold(Features::NONE, |set, (_, bit)| set.with(*bit))
    }

    /// Whether bit `bit` is set.
    pub const fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// Whether the feature called `name` is set.
    ///
    /// # Panics
    /// If no feature is called so.
    pub fn named(self, name: &str) -> bool {
        self.has(bit_of(name).expect("a feature this front-end knows"))
    }

    /// The set and bit `bit`.
    #[must_use]
    pub const fn with(self, bit: u32) -> Features {
        Features(self.0 | 1 << bit)
    }

    /// What both sets hold.
    #[must_use]
    pub const fn intersect(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// Without the features whose dependency is not in the set, as a driver must not accept them
    /// (virtio 1.3, 5.1.3.1).
    #[must_use]
    pub fn with_dependencies_met(self) -> Features {
        let mut set = self;
        // GUEST_ECN hangs on GUEST_TSO4, which hangs on GUEST_CSUM: two rounds settle every chain.
        for _ in 0..2 {
            for (name, needed) in NEEDS {
                let bit = bit_of(name).expect("NEEDS only names known features");
                if set.has(bit) && !needed.iter().any(|n| set.named(n)) {
                    set.0 &= !(1 << bit);
                }
            }
        }
        set
    }

    /// Length of the header in front of every frame, in bytes: `num_buffers` is part of it under
    /// VERSION_1 or MRG_RXBUF (virtio 1.3, 5.1.6.1).
    pub fn header_bytes(self) -> usize {
        if self.named("version_1") || self.named("mrg_rxbuf") { 12 } else { 10 }
    }

    /// Whether the device may send frames longer than the MTU.
    pub fn guest_gso(self) -> bool {
        ["guest_tso4", "guest_tso6", "guest_uso4", "guest_uso6"].iter().any(|name| self.named(name))
    }

    /// Names of the set's bits, unknown ones as `bit_N`.
    pub fn names(self) -> Vec<String> {
        let name = |bit: u32| match NAMES.iter().find(|(_, known)| *known == bit) {
            Some((name, _)) => (*name).to_owned(),
            None => format!("bit_{bit}"),
        };
        (0..64).filter(|bit| self.has(*bit)).map(name).collect()
    }
}

impl FromStr for Features {
    type Err = UnknownFeature;
    /// `all`, `none`, a hexadecimal mask, or names separated by commas; a name after `-` takes away,
    /// as in `all,-event_idx`.
    fn from_str(text: &str) -> Result<Features, UnknownFeature> {
        let mut set = Features::NONE;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let unknown = || UnknownFeature(part.to_owned());
            let (name, add) = match part.strip_prefix('-') {
                Some(name) => (name, false),
                None => (part, true),
            };
            let bits = match name {
                "all" => Features::all().0,
                "none" => 0,
                _ => match name.strip_prefix("0x") {
                    Some(hex) => u64::from_str_radix(hex, 16).map_err(|_| unknown())?,
                    None => 1 << bit_of(name).ok_or_else(unknown)?,
                },
            };
            set.0 = if add { set.0 | bits } else { set.0 & !bits };
        }
        Ok(set)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

impl Serialize for Features {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_add_and_take_away() {
        let set: Features = "all,-event_idx".parse().unwrap();
        assert!(!set.named("event_idx") && set.named("mrg_rxbuf"));
        assert_eq!("0x100000000".parse(), Ok(Features::NONE.with(32)));
        assert_eq!("none".parse(), Ok(Features::NONE));
        assert_eq!("csum,what".parse::<Features>(), Err(UnknownFeature("what".into())));
    }

    #[test]
    fn display_parses_back() {
        let set = Features(0x1_3000_8003);
        assert_eq!(set.to_string().parse(), Ok(set));
    }

    #[test]
    fn a_feature_without_its_dependency_is_dropped() {
        let set: Features = "guest_ecn,guest_tso4,host_tso4,csum,mq".parse().unwrap();
        assert_eq!(set.with_dependencies_met(), "host_tso4,csum".parse().unwrap());
    }

    #[test]
    fn a_driver_that_knows_nothing_has_the_short_header() {
        assert_eq!(Features::NONE.header_bytes(), 10);
        assert_eq!("mrg_rxbuf".parse::<Features>().unwrap().header_bytes(), 12);
    }
}
