//! Addresses: MAC addresses and IPv4 subnets. IP addresses are `std::net`'s, family-neutral
//! (`IpAddr`, `SocketAddr`) wherever a flow or a key holds one.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use thiserror::Error;

/// An IEEE 802 MAC address, six octets in wire order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);
    /// `00:00:00:00:00:00`.
    pub const ZERO: MacAddr = MacAddr([0; 6]);
    /// The gateway's address, locally administered.
    pub const GATEWAY: MacAddr = MacAddr([0x02, 0xab, 0xcd, 0x00, 0x00, 0x01]);

    /// An address for something else that belongs to the same VM: unicast, locally administered, and never
    /// the same.
    #[must_use]
    pub const fn sibling(self) -> MacAddr {
        let MacAddr([first, b, c, d, e, f]) = self;
        let local = (first & !1) ^ 4 | 2;
        MacAddr([local, b, c, d, e, f])
    }

    /// Whether the group bit is set (multicast and broadcast).
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether the address can be a station's own: neither zero nor a group address.
    pub fn is_unicast(self) -> bool {
        self != Self::ZERO && !self.is_multicast()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Longest name of an interface in bytes: `IFNAMSIZ` less its final zero.
const LINK_NAME_BYTES_MAX: usize = 15;

/// Name of an interface of the host, as the kernel would take it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkName {
    bytes: [u8; LINK_NAME_BYTES_MAX],
    len: u8,
}

impl LinkName {
    /// `name`, if the kernel would take it for a new interface: 1 to 15 bytes, no slash,
    /// colon or white space, not `.` or `..` (`dev_valid_name`); `%` is refused too, which the kernel would replace
    /// by a number.
    pub fn new(name: &str) -> Option<LinkName> {
        let wrong =
            |c: u8| c == b'/' || c == b':' || c == b'%' || c.is_ascii_whitespace() || c == 0x0b || c == 0;
        let fits = !name.is_empty()
            && name.len() <= LINK_NAME_BYTES_MAX
            && name != "."
            && name != ".."
            && !name.bytes().any(wrong);
        if !fits {
            return None;
        }
        let mut bytes = [0; LINK_NAME_BYTES_MAX];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Some(LinkName { bytes, len: name.len() as u8 })
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        str::from_utf8(&self.bytes[..usize::from(self.len)]).expect("made of a whole text")
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for LinkName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> serde::Deserialize<'de> for LinkName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<LinkName, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        LinkName::new(&text).ok_or_else(|| serde::de::Error::custom("not a name of an interface"))
    }
}

/// Identifier of a VLAN (IEEE 802.1Q, 9.6): 1 to 4094. 0 is a priority without a VLAN, 4095 is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VlanId(u16);

impl VlanId {
    /// `id` as an identifier, if it is one.
    pub const fn new(id: u16) -> Option<VlanId> {
        if id >= 1 && id <= 4094 { Some(VlanId(id)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// Why a text is not an address.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ParseAddrError {
    /// Not six hexadecimal octets separated by colons.
    #[error("not a MAC address: expected six hexadecimal octets such as 52:54:00:12:34:56")]
    Mac,
    /// Not `ADDRESS/PREFIX`.
    #[error("not an IPv4 subnet: expected ADDRESS/PREFIX such as 10.0.2.0/24")]
    Subnet,
    /// A prefix length that leaves no room for a gateway and a guest.
    #[error("prefix length {0} leaves no room for a gateway and a guest: use 8 to 30")]
    Prefix(u8),
    /// Bits set beyond the prefix.
    #[error("{0} has bits set beyond its prefix: the subnet is {1}")]
    HostBits(Ipv4Addr, Ipv4Subnet),
}

impl FromStr for MacAddr {
    type Err = ParseAddrError;
    fn from_str(s: &str) -> Result<MacAddr, ParseAddrError> {
        let mut octets = [0u8; 6];
        let mut parts = s.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or(ParseAddrError::Mac)?;
            if part.is_empty() || part.len() > 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(ParseAddrError::Mac);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| ParseAddrError::Mac)?;
        }
        if parts.next().is_some() {
            return Err(ParseAddrError::Mac);
        }
        Ok(MacAddr(octets))
    }
}

/// An IPv4 subnet with a prefix length of 8 to 30: room for a gateway and at least one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv4Subnet {
    network: Ipv4Addr,
    prefix_len: u8,
}

impl Ipv4Subnet {
    /// The subnet of `prefix_len` bits that `network` names.
    ///
    /// # Errors
    /// [`ParseAddrError::Prefix`] for a length outside 8..=30, [`ParseAddrError::HostBits`] if
    /// `network` has bits set beyond the prefix.
    pub fn new(network: Ipv4Addr, prefix_len: u8) -> Result<Ipv4Subnet, ParseAddrError> {
        if !(8..=30).contains(&prefix_len) {
            return Err(ParseAddrError::Prefix(prefix_len));
        }
        let base = Ipv4Addr::from_bits(network.to_bits() & mask_bits(prefix_len));
        let subnet = Ipv4Subnet { network: base, prefix_len };
        if base == network { Ok(subnet) } else { Err(ParseAddrError::HostBits(network, subnet)) }
    }

    /// The network's own address, all host bits zero.
    pub const fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of the prefix in bits, 8 to 30.
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// The subnet mask.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask_bits(self.prefix_len))
    }

    /// The directed broadcast address, all host bits one.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !mask_bits(self.prefix_len))
    }

    /// Whether `addr` lies in the subnet (its network and broadcast addresses included).
    pub fn contains(self, addr: Ipv4Addr) -> bool {
        addr.to_bits() & mask_bits(self.prefix_len) == self.network.to_bits()
    }

    /// Whether `addr` can be a host's: in the subnet and neither network nor broadcast address.
    pub fn is_host(self, addr: Ipv4Addr) -> bool {
        self.contains(addr) && addr != self.network && addr != self.broadcast()
    }

    /// Whether the two subnets share an address.
    pub fn overlaps(self, other: Ipv4Subnet) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }

    /// The `n`th host address, counted from 1; `None` past the last.
    pub fn host(self, n: u32) -> Option<Ipv4Addr> {
        let addr = Ipv4Addr::from_bits(self.network.to_bits().checked_add(n)?);
        self.is_host(addr).then_some(addr)
    }
}

fn mask_bits(prefix_len: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix_len))
}

impl fmt::Display for Ipv4Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix_len)
    }
}

impl FromStr for Ipv4Subnet {
    type Err = ParseAddrError;
    fn from_str(s: &str) -> Result<Ipv4Subnet, ParseAddrError> {
        let (addr, len) = s.split_once('/').ok_or(ParseAddrError::Subnet)?;
        let addr = addr.parse().map_err(|_| ParseAddrError::Subnet)?;
        let len = len.parse().map_err(|_| ParseAddrError::Subnet)?;
        Ipv4Subnet::new(addr, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_round_trips_through_text() {
        let mac: MacAddr = "52:54:00:ab:Cd:0".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:00");
        for bad in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:00:11", "52:54:00:ab:cd:0g", "+5:54:00:ab:cd:00"] {
            assert_eq!(bad.parse::<MacAddr>(), Err(ParseAddrError::Mac), "{bad}");
        }
    }

    #[test]
    fn subnet_knows_its_hosts() {
        let net: Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
        assert_eq!(net.host(1), Some(Ipv4Addr::new(10, 0, 2, 1)));
        assert_eq!(net.host(254), Some(Ipv4Addr::new(10, 0, 2, 254)));
        assert_eq!(net.host(255), None);
        assert_eq!(net.broadcast(), Ipv4Addr::new(10, 0, 2, 255));
        assert!(!net.contains(Ipv4Addr::new(10, 0, 3, 0)));
        assert!(net.overlaps("10.0.0.0/8".parse().unwrap()));
        assert!(!net.overlaps("10.0.3.0/24".parse().unwrap()));
    }

    #[test]
    fn subnet_refuses_what_holds_no_guest() {
        assert_eq!("10.0.2.0/31".parse::<Ipv4Subnet>(), Err(ParseAddrError::Prefix(31)));
        assert_eq!("0.0.0.0/0".parse::<Ipv4Subnet>(), Err(ParseAddrError::Prefix(0)));
        assert!(matches!("10.0.2.1/24".parse::<Ipv4Subnet>(), Err(ParseAddrError::HostBits(..))));
        assert_eq!("10.0.2.0".parse::<Ipv4Subnet>(), Err(ParseAddrError::Subnet));
    }
}
