//! What the guest checks and repairs in the header of a frame from the device.

use super::features::Features;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Bytes of a frame that [`Header::parse`] and [`repair`] look at: header, Ethernet, IPv4 with
/// options and the transport's first bytes.
pub(crate) const HEAD_BYTES: usize = 12 + 14 + 60 + 20;

/// The fields of a virtio-net header that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    flags: u8,
    gso_type: u8,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    /// Receive buffers the frame takes; 1 where the field is absent.
    pub(crate) num_buffers: u16,
}

impl Header {
    /// Reads the header of `header_bytes` (10 or 12) at the start of `head`.
    pub(crate) fn parse(head: &[u8], header_bytes: usize) -> Option<Header> {
        let head = head.get(..header_bytes)?;
        let le16 = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        Some(Header {
            flags: head[0],
            gso_type: head[1],
            gso_size: le16(4),
            csum_start: le16(6),
            csum_offset: le16(8),
            num_buffers: if header_bytes == 12 { le16(10) } else { 1 },
        })
    }

    /// Whether the frame is to be segmented.
    pub(crate) fn is_gso(&self) -> bool {
        self.gso_type & !GSO_ECN != 0
    }

    /// Whether the checksum is partial.
    pub(crate) fn needs_csum(&self) -> bool {
        self.flags & F_NEEDS_CSUM != 0
    }

    /// Whether the device vouches for the checksum.
    pub(crate) fn data_valid(&self) -> bool {
        self.flags & F_DATA_VALID != 0
    }

    /// Whether the device kept to what was negotiated (virtio 1.3, 5.1.6.4.1) for a frame of
    /// `frame_bytes`, header not counted.
    pub(crate) fn is_allowed(&self, features: Features, frame_bytes: usize) -> bool {
        if self.flags & (F_NEEDS_CSUM | F_DATA_VALID) != 0 && !features.named("guest_csum") {
            return false;
        }
        let csum_end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
        if self.needs_csum() && csum_end > frame_bytes {
            return false;
        }
        if self.gso_type & GSO_ECN != 0 && !features.named("guest_ecn") {
            return false;
        }
        let kind_allowed = match self.gso_type & !GSO_ECN {
            0 => true,
            GSO_TCPV4 => features.named("guest_tso4"),
            GSO_TCPV6 => features.named("guest_tso6"),
            GSO_UDP_L4 => features.named("guest_uso4") || features.named("guest_uso6"),
            _ => false,
        };
        kind_allowed && (!self.is_gso() || (self.gso_size > 0 && self.needs_csum()))
    }

    /// Whether `num_buffers` is possible: at least 1, and 1 without MRG_RXBUF (5.1.6.4.1).
    pub(crate) fn num_buffers_allowed(&self, features: Features) -> bool {
        if features.named("mrg_rxbuf") { self.num_buffers > 0 } else { self.num_buffers == 1 }
    }
}

/// The header to hand to the TAP instead, if it has to differ: TUN knows no DATA_VALID, and drops a
/// frame flagged so whose checksum is not filled in. NEEDS_CSUM makes it trust the frame likewise.
pub(crate) fn repair(head: &[u8], header_bytes: usize) -> Option<[u8; 10]> {
    let header = Header::parse(head, header_bytes)?;
    if !header.data_valid() {
        return None;
    }
    let mut out: [u8; 10] = head[..10].try_into().expect("a header is at least 10 bytes");
    out[0] &= !F_DATA_VALID;
    if header.needs_csum() {
        return Some(out);
    }
    if let Some((start, offset)) = transport(&head[header_bytes..]) {
        out[0] |= F_NEEDS_CSUM;
        out[6..8].copy_from_slice(&start.to_le_bytes());
        out[8..10].copy_from_slice(&offset.to_le_bytes());
    }
    Some(out)
}

/// Where the transport header starts and where in it the checksum is, for whole TCP and UDP packets.
fn transport(frame: &[u8]) -> Option<(u16, u16)> {
    let be16 = |at: usize| frame.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let (protocol, start) = match be16(12)? {
        0x0800 => {
            let header = usize::from(frame.get(14)? & 15) * 4;
            let fragment = be16(20)? & 0x3fff != 0;
            if fragment || header < 20 {
                return None;
            }
            (*frame.get(23)?, 14 + header)
        }
        0x86dd => (*frame.get(20)?, 14 + 40),
        _ => return None,
    };
    let offset = match protocol {
        6 => 16,
        17 => 6,
        _ => return None,
    };
    Some((u16::try_from(start).ok()?, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp_frame(flags: u8) -> Vec<u8> {
        let mut head = vec![0u8; 12 + 14 + 20 + 20];
        head[0] = flags;
        head[10] = 1;
        head[12 + 12..12 + 14].copy_from_slice(&[8, 0]);
        head[12 + 14] = 0x45;
        head[12 + 23] = 6;
        head
    }

    #[test]
    fn data_valid_becomes_needs_csum_at_the_transport_header() {
        let repaired = repair(&tcp_frame(F_DATA_VALID), 12).unwrap();
        assert_eq!(repaired[0], F_NEEDS_CSUM);
        assert_eq!(repaired[6..10], [34, 0, 16, 0]);
        assert_eq!(repair(&tcp_frame(0), 12), None);
    }

    #[test]
    fn what_was_not_negotiated_is_a_breach() {
        let header = Header::parse(&tcp_frame(F_NEEDS_CSUM), 12).unwrap();
        assert!(!header.is_allowed(Features::NONE, 54));
        assert!(header.is_allowed("guest_csum".parse().unwrap(), 54));
        let gso = Header { gso_type: GSO_TCPV4, gso_size: 1448, ..header };
        assert!(!gso.is_allowed("guest_csum".parse().unwrap(), 54));
        assert!(gso.is_allowed("guest_csum,guest_tso4".parse().unwrap(), 54));
        assert!(!Header { gso_size: 0, ..gso }.is_allowed(Features::all(), 54));
    }
}
