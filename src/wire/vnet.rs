//! The virtio-net header (virtio 1.3, 5.1.6), 12 bytes, little-endian, in front of every frame.

use super::WireError;

/// Length of the header in bytes, with `num_buffers` (virtio 1.3, 5.1.6: always present under VERSION_1).
pub const VNET_HEADER_BYTES: usize = 12;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// What stands in a frame's transport checksum field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// The full checksum.
    #[default]
    Complete,
    /// Only the pseudo-header's sum: the receiver completes it over the bytes from `start` to the
    /// end of the frame and stores the result at `start + offset`. Offsets from the Ethernet header.
    Partial {
        /// First byte summed.
        start: u16,
        /// Where the result goes, from `start`.
        offset: u16,
    },
    /// Already verified by the sender's device (`DATA_VALID`).
    Valid,
}

/// How a frame longer than the MTU is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams of equal size (USO).
    UdpL4,
    /// UDP fragmentation (UFO).
    UdpFragment,
}

/// Segmentation a frame still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// What to cut.
    pub kind: GsoKind,
    /// Payload bytes of each segment but the last.
    pub size_bytes: u16,
    /// Length of all headers, a hint.
    pub headers_bytes: u16,
    /// TCP's CWR is set on the first segment only.
    pub ecn: bool,
}

/// A decoded virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHeader {
    /// State of the transport checksum.
    pub checksum: Checksum,
    /// Segmentation still to be done, if any.
    pub gso: Option<Gso>,
    /// Receive buffers the frame takes; set by the device's receive side.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Reads the header's 12 bytes.
    ///
    /// # Errors
    /// [`WireError::Malformed`] for a segmentation type the specification does not define and for a
    /// segment size of zero.
    pub fn parse(bytes: &[u8; VNET_HEADER_BYTES]) -> Result<VnetHeader, WireError> {
        let le16 = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let checksum = if bytes[0] & F_NEEDS_CSUM != 0 {
            Checksum::Partial { start: le16(6), offset: le16(8) }
        } else if bytes[0] & F_DATA_VALID != 0 {
            Checksum::Valid
        } else {
            Checksum::Complete
        };
        let kind = match bytes[1] & !GSO_ECN {
            0 => None,
            GSO_TCPV4 => Some(GsoKind::Tcp4),
            GSO_TCPV6 => Some(GsoKind::Tcp6),
            GSO_UDP_L4 => Some(GsoKind::UdpL4),
            GSO_UDP => Some(GsoKind::UdpFragment),
            _ => return Err(WireError::Malformed("unknown gso_type")),
        };
        let gso = match kind {
            None => None,
            Some(_) if le16(4) == 0 => return Err(WireError::Malformed("gso_size 0")),
            Some(kind) => {
                Some(Gso { kind, size_bytes: le16(4), headers_bytes: le16(2), ecn: bytes[1] & GSO_ECN != 0 })
            }
        };
        Ok(VnetHeader { checksum, gso, num_buffers: le16(10) })
    }

    /// Writes the header's 12 bytes.
    pub fn emit(&self) -> [u8; VNET_HEADER_BYTES] {
        let mut out = [0u8; VNET_HEADER_BYTES];
        match self.checksum {
            Checksum::Complete => {}
            Checksum::Valid => out[0] = F_DATA_VALID,
            Checksum::Partial { start, offset } => {
                out[0] = F_NEEDS_CSUM;
                out[6..8].copy_from_slice(&start.to_le_bytes());
                out[8..10].copy_from_slice(&offset.to_le_bytes());
            }
        }
        if let Some(gso) = self.gso {
            let kind = match gso.kind {
                GsoKind::Tcp4 => GSO_TCPV4,
                GsoKind::Tcp6 => GSO_TCPV6,
                GsoKind::UdpL4 => GSO_UDP_L4,
                GsoKind::UdpFragment => GSO_UDP,
            };
            out[1] = kind | if gso.ecn { GSO_ECN } else { 0 };
            out[2..4].copy_from_slice(&gso.headers_bytes.to_le_bytes());
            out[4..6].copy_from_slice(&gso.size_bytes.to_le_bytes());
        }
        out[10..12].copy_from_slice(&self.num_buffers.to_le_bytes());
        out
    }
}
