//! The Ethernet II header: destination, source, type. VLAN tags are not spoken on the guest's link.
//!
//! Read first: IEEE 802.3, 3.2; RFC 894.

use std::fmt;

use super::WireError;
use crate::addr::MacAddr;

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 14;

/// What the bytes behind the header are.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct EtherType(pub u16);

impl EtherType {
    /// IPv4.
    pub const IPV4: EtherType = EtherType(0x0800);
    /// ARP.
    pub const ARP: EtherType = EtherType(0x0806);
    /// IPv6.
    pub const IPV6: EtherType = EtherType(0x86dd);
}

impl fmt::Debug for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            EtherType::IPV4 => f.write_str("IPv4"),
            EtherType::ARP => f.write_str("ARP"),
            EtherType::IPV6 => f.write_str("IPv6"),
            EtherType(other) => write!(f, "EtherType({other:#06x})"),
        }
    }
}

/// An Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Destination.
    pub dst: MacAddr,
    /// Source.
    pub src: MacAddr,
    /// Type of the payload.
    pub ethertype: EtherType,
}

impl Header {
    /// Reads the header at the start of a frame.
    ///
    /// # Errors
    /// [`WireError::Truncated`] for fewer than [`HEADER_BYTES`].
    pub fn parse(bytes: &[u8]) -> Result<Header, WireError> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *bytes;
        Ok(Header {
            dst: MacAddr([d0, d1, d2, d3, d4, d5]),
            src: MacAddr([s0, s1, s2, s3, s4, s5]),
            ethertype: EtherType(u16::from_be_bytes([t0, t1])),
        })
    }

    /// Writes the header to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER_BYTES`].
    pub fn emit(&self, out: &mut [u8]) {
        let out = &mut out[..HEADER_BYTES];
        out[0..6].copy_from_slice(&self.dst.0);
        out[6..12].copy_from_slice(&self.src.0);
        out[12..14].copy_from_slice(&self.ethertype.0.to_be_bytes());
    }
}
