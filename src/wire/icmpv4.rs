//! ICMP for IPv4: the messages vunet sends and understands.
//!
//! Read first: RFC 792; RFC 1191, 4 (next-hop MTU); RFC 1812, 5.2.7.1 (codes 4 and 13).

use super::WireError;
use super::checksum::Accumulator;

/// Length of a message's header in bytes.
pub const HEADER_BYTES: usize = 8;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;

/// Why a destination is unreachable. [`UnreachableCode::from`] yields `Other` only for numbers without
/// a name here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnreachableCode {
    /// Net unreachable (0).
    Net,
    /// Host unreachable (1).
    Host,
    /// Protocol unreachable (2).
    Protocol,
    /// Port unreachable (3).
    Port,
    /// Fragmentation needed and DF set (4).
    FragmentationNeeded,
    /// Communication administratively prohibited (13).
    AdminProhibited,
    /// Any other.
    Other(u8),
}

impl From<u8> for UnreachableCode {
    fn from(code: u8) -> UnreachableCode {
        match code {
            0 => UnreachableCode::Net,
            1 => UnreachableCode::Host,
            2 => UnreachableCode::Protocol,
            3 => UnreachableCode::Port,
            4 => UnreachableCode::FragmentationNeeded,
            13 => UnreachableCode::AdminProhibited,
            other => UnreachableCode::Other(other),
        }
    }
}

impl From<UnreachableCode> for u8 {
    fn from(code: UnreachableCode) -> u8 {
        match code {
            UnreachableCode::Net => 0,
            UnreachableCode::Host => 1,
            UnreachableCode::Protocol => 2,
            UnreachableCode::Port => 3,
            UnreachableCode::FragmentationNeeded => 4,
            UnreachableCode::AdminProhibited => 13,
            UnreachableCode::Other(other) => other,
        }
    }
}

/// A message, without what follows its eight header bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Echo request, "ping".
    EchoRequest {
        /// Identifier of the asker.
        ident: u16,
        /// Sequence number.
        seq: u16,
    },
    /// Echo reply.
    EchoReply {
        /// Identifier of the asker.
        ident: u16,
        /// Sequence number.
        seq: u16,
    },
    /// Destination unreachable; the refused packet's start follows.
    Unreachable {
        /// Why.
        code: UnreachableCode,
        /// MTU of the next hop in bytes, with `FragmentationNeeded`; else 0.
        next_hop_mtu: u16,
    },
    /// Time exceeded; the expired packet's start follows.
    TimeExceeded {
        /// 0: hops used up; 1: reassembly timed out.
        code: u8,
    },
    /// Anything else.
    Other {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
}

impl Message {
    /// Reads a message's header. The checksum covers bytes that need not be here, so it is not judged.
    ///
    /// # Errors
    /// [`WireError::Truncated`] for fewer than [`HEADER_BYTES`].
    pub fn parse(bytes: &[u8]) -> Result<Message, WireError> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        Ok(match (bytes[0], bytes[1]) {
            (ECHO_REPLY, 0) => Message::EchoReply { ident: be16(4), seq: be16(6) },
            (ECHO_REQUEST, 0) => Message::EchoRequest { ident: be16(4), seq: be16(6) },
            (UNREACHABLE, code) => Message::Unreachable { code: code.into(), next_hop_mtu: be16(6) },
            (TIME_EXCEEDED, code) => Message::TimeExceeded { code },
            (kind, code) => Message::Other { kind, code },
        })
    }

    /// Writes the message's eight header bytes to the start of `out`, with a checksum field of zero.
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER_BYTES`].
    pub fn emit(&self, out: &mut [u8]) {
        let out = &mut out[..HEADER_BYTES];
        let (kind, code, third, fourth) = match *self {
            Message::EchoReply { ident, seq } => (ECHO_REPLY, 0, ident, seq),
            Message::EchoRequest { ident, seq } => (ECHO_REQUEST, 0, ident, seq),
            Message::Unreachable { code, next_hop_mtu } => (UNREACHABLE, code.into(), 0, next_hop_mtu),
            Message::TimeExceeded { code } => (TIME_EXCEEDED, code, 0, 0),
            Message::Other { kind, code } => (kind, code, 0, 0),
        };
        out[0] = kind;
        out[1] = code;
        out[2..4].fill(0);
        out[4..6].copy_from_slice(&third.to_be_bytes());
        out[6..8].copy_from_slice(&fourth.to_be_bytes());
    }

    /// Writes the message and `payload` behind it to the start of `out`, with the complete checksum, and
    /// returns the length of both in bytes.
    ///
    /// # Panics
    /// If `out` is shorter than [`HEADER_BYTES`] and the payload.
    pub fn emit_with_payload(&self, payload: &[u8], out: &mut [u8]) -> usize {
        let len = HEADER_BYTES + payload.len();
        let out = &mut out[..len];
        self.emit(out);
        out[HEADER_BYTES..].copy_from_slice(payload);
        let mut sum = Accumulator::new();
        sum.add_bytes(out);
        out[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        len
    }
}
