//! The UDP header.
//!
//! Read first: RFC 768; RFC 1122, 4.1.

use super::WireError;

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 8;

/// Where the checksum stands, from the start of the header, in bytes.
pub const CHECKSUM_OFFSET: usize = 6;

/// A UDP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Length of header and payload, in bytes: 8 to 65,535.
    pub len_bytes: usize,
    /// The checksum field as it stands: 0 is "none" over IPv4.
    pub checksum: u16,
}

impl Header {
    /// Reads the header at the start of a datagram of which `available_bytes` were received, padding
    /// included. The checksum is not judged.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if the header does not lie in `bytes` or the datagram claims more than
    /// `available_bytes`, [`WireError::Malformed`] for a length below the header's.
    pub fn parse(bytes: &[u8], available_bytes: usize) -> Result<Header, WireError> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let len_bytes = usize::from(be16(4));
        if len_bytes < HEADER_BYTES {
            return Err(WireError::Malformed("UDP length below 8"));
        }
        if len_bytes > available_bytes {
            return Err(WireError::Truncated);
        }
        Ok(Header { src_port: be16(0), dst_port: be16(2), len_bytes, checksum: be16(6) })
    }

    /// Writes the header, its checksum as given, to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER_BYTES`], or the datagram longer than 65,535 bytes.
    pub fn emit(&self, out: &mut [u8]) {
        let out = &mut out[..HEADER_BYTES];
        let len = u16::try_from(self.len_bytes).expect("the caller keeps a datagram within 65,535 bytes");
        out[0..2].copy_from_slice(&self.src_port.to_be_bytes());
        out[2..4].copy_from_slice(&self.dst_port.to_be_bytes());
        out[4..6].copy_from_slice(&len.to_be_bytes());
        out[6..8].copy_from_slice(&self.checksum.to_be_bytes());
    }
}
