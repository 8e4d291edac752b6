//! The IPv4 header. Options are skipped when parsing and never sent.
//!
//! Read first: RFC 791, 3.1; RFC 1122, 3.2.1; RFC 6864 (the identification field).

use std::fmt;
use std::net::Ipv4Addr;

use super::WireError;
use super::checksum::Accumulator;

/// Length of a header without options, in bytes: what [`Header::emit`] writes.
pub const HEADER_BYTES: usize = 20;

/// Longest packet, header included, in bytes: the total length field has 16 bits.
pub const PACKET_BYTES_MAX: usize = 65_535;

const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET_MASK: u16 = 0x1fff;

/// The protocol of a packet's payload (IANA's assigned internet protocol numbers).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    /// ICMP.
    pub const ICMP: Protocol = Protocol(1);
    /// IGMP.
    pub const IGMP: Protocol = Protocol(2);
    /// TCP.
    pub const TCP: Protocol = Protocol(6);
    /// UDP.
    pub const UDP: Protocol = Protocol(17);
    /// ICMPv6.
    pub const ICMPV6: Protocol = Protocol(58);
}

impl fmt::Debug for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Protocol::ICMP => f.write_str("ICMP"),
            Protocol::IGMP => f.write_str("IGMP"),
            Protocol::TCP => f.write_str("TCP"),
            Protocol::UDP => f.write_str("UDP"),
            Protocol::ICMPV6 => f.write_str("ICMPv6"),
            Protocol(other) => write!(f, "Protocol({other})"),
        }
    }
}

/// An IPv4 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source.
    pub src: Ipv4Addr,
    /// Destination.
    pub dst: Ipv4Addr,
    /// Protocol of the payload.
    pub protocol: Protocol,
    /// Hops left.
    pub ttl: u8,
    /// Differentiated services and ECN, the former type of service.
    pub tos: u8,
    /// Identification, shared by the fragments of one packet.
    pub ident: u16,
    /// Whether routers must not fragment the packet.
    pub dont_fragment: bool,
    /// Whether fragments follow this one.
    pub more_fragments: bool,
    /// Where this fragment's payload starts in the whole packet's, in bytes: a multiple of 8.
    pub fragment_offset_bytes: u16,
    /// Length of the parsed header with its options, in bytes: 20 to 60. [`Header::emit`] writes 20
    /// whatever stands here.
    pub header_bytes: usize,
    /// Length of the payload, in bytes.
    pub payload_bytes: usize,
}

impl Header {
    /// Reads the header of a packet whose first bytes are `bytes` (the host's copy, perhaps shorter
    /// than the packet) and of which `available_bytes` were received, padding included.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if the header does not lie in `bytes` or the packet claims more than
    /// `available_bytes`; [`WireError::Malformed`] for another version, for lengths that contradict each
    /// other and for fragments that fit no packet; [`WireError::Checksum`] for a wrong header checksum.
    #[inline]
    pub fn parse(bytes: &[u8], available_bytes: usize) -> Result<Header, WireError> {
        let fixed: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        let be16 = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        if fixed[0] >> 4 != 4 {
            return Err(WireError::Malformed("IP version is not 4"));
        }
        let header_bytes = usize::from(fixed[0] & 0x0f) * 4;
        if header_bytes < HEADER_BYTES {
            return Err(WireError::Malformed("IPv4 header length below 20"));
        }
        let header = bytes.get(..header_bytes).ok_or(WireError::Truncated)?;
        let total_bytes = usize::from(be16(2));
        if total_bytes > available_bytes {
            return Err(WireError::Truncated);
        }
        let payload_bytes = total_bytes
            .checked_sub(header_bytes)
            .ok_or(WireError::Malformed("IPv4 total length below header length"))?;
        let mut sum = Accumulator::new();
        sum.add_words(fixed);
        // Few headers have options.
        if header_bytes > HEADER_BYTES {
            sum.add_bytes(&header[HEADER_BYTES..]);
        }
        if sum.finish() != 0 {
            return Err(WireError::Checksum);
        }
        let more_fragments = be16(6) & MORE_FRAGMENTS != 0;
        let fragment_offset_bytes = (be16(6) & OFFSET_MASK) * 8;
        if more_fragments && payload_bytes % 8 != 0 {
            return Err(WireError::Malformed("IPv4 fragment that is not the last has a length not of 8"));
        }
        if usize::from(fragment_offset_bytes) + total_bytes > PACKET_BYTES_MAX {
            return Err(WireError::Malformed("IPv4 fragment past 65,535 bytes"));
        }
        Ok(Header {
            src: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
            dst: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]),
            protocol: Protocol(fixed[9]),
            ttl: fixed[8],
            tos: fixed[1],
            ident: be16(4),
            dont_fragment: be16(6) & DONT_FRAGMENT != 0,
            more_fragments,
            fragment_offset_bytes,
            header_bytes,
            payload_bytes,
        })
    }

    /// Whether a router marked the packet instead of dropping it (RFC 3168, 5: CE).
    pub const fn is_congestion_experienced(&self) -> bool {
        self.tos & 3 == 3
    }

    /// Whether the packet is a fragment of a longer one.
    pub const fn is_fragment(&self) -> bool {
        self.more_fragments || self.fragment_offset_bytes != 0
    }

    /// Writes the header, without options and with its checksum, to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER_BYTES`], if the packet would be longer than
    /// [`PACKET_BYTES_MAX`], or if the fragment offset is not a multiple of 8.
    pub fn emit(&self, out: &mut [u8]) {
        let out = &mut out[..HEADER_BYTES];
        let total_bytes = u16::try_from(HEADER_BYTES + self.payload_bytes)
            .expect("the caller keeps a packet within 65,535 bytes");
        assert!(self.fragment_offset_bytes.is_multiple_of(8), "the caller cuts fragments at multiples of 8");
        let mut fragment = self.fragment_offset_bytes / 8;
        if self.dont_fragment {
            fragment |= DONT_FRAGMENT;
        }
        if self.more_fragments {
            fragment |= MORE_FRAGMENTS;
        }
        out[0] = 0x45;
        out[1] = self.tos;
        out[2..4].copy_from_slice(&total_bytes.to_be_bytes());
        out[4..6].copy_from_slice(&self.ident.to_be_bytes());
        out[6..8].copy_from_slice(&fragment.to_be_bytes());
        out[8] = self.ttl;
        out[9] = self.protocol.0;
        out[10..12].fill(0);
        out[12..16].copy_from_slice(&self.src.octets());
        out[16..20].copy_from_slice(&self.dst.octets());
        let mut sum = Accumulator::new();
        sum.add_bytes(out);
        out[10..12].copy_from_slice(&sum.finish().to_be_bytes());
    }
}
