//! The TCP header with the options vunet speaks, and sequence arithmetic.
//!
//! Checksums are not this file's: the header is emitted with a zero checksum field, which the caller
//! fills with the pseudo-header's sum or with the complete checksum (see `checksum`).
//!
//! Read first: RFC 9293, 3.1 to 3.4; RFC 7323 (window scale, timestamps); RFC 2018 (SACK).

use std::fmt;
use std::ops::{Add, BitOr, Sub};

use super::WireError;

/// Length of a header without options, in bytes.
pub const HEADER_BYTES: usize = 20;

/// Longest header, in bytes: the data offset has four bits and counts words of four bytes.
pub const HEADER_BYTES_MAX: usize = 60;

/// Where the checksum stands, from the start of the header, in bytes.
pub const CHECKSUM_OFFSET: usize = 16;

/// The largest window scale; a larger one is read as this (RFC 7323, 2.3).
pub const WINDOW_SCALE_MAX: u8 = 14;

/// SACK blocks that fit a header without other options.
pub const SACK_BLOCKS_MAX: usize = 4;

const OPTIONS_BYTES_MAX: usize = HEADER_BYTES_MAX - HEADER_BYTES;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK_PERMITTED: u8 = 4;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMPS: u8 = 8;

/// A sequence number: a point on a circle of 2^32 (RFC 9293, 3.4).
///
/// Order has meaning only between numbers less than 2^31 apart, which is why this is not `Ord`; two
/// numbers exactly 2^31 apart are each before the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SeqNumber(pub u32);

impl SeqNumber {
    /// How far `self` lies behind `earlier`, in bytes; negative if it lies before it.
    pub const fn distance_from(self, earlier: SeqNumber) -> i32 {
        self.0.wrapping_sub(earlier.0).cast_signed()
    }

    /// Whether `self` lies before `other`.
    pub const fn before(self, other: SeqNumber) -> bool {
        self.distance_from(other) < 0
    }

    /// Whether `self` lies after `other`.
    pub const fn after(self, other: SeqNumber) -> bool {
        other.before(self)
    }

    /// Whether `self` lies before `other` or is it.
    pub const fn at_or_before(self, other: SeqNumber) -> bool {
        self.0 == other.0 || self.before(other)
    }

    /// Whether `self` lies after `other` or is it.
    pub const fn at_or_after(self, other: SeqNumber) -> bool {
        self.0 == other.0 || self.after(other)
    }
}

/// `bytes` on the circle; a turn of 2^32 is no step.
fn on_circle(bytes: usize) -> u32 {
    const LOW: usize = u32::MAX as usize;
    u32::try_from(bytes & LOW).expect("masked to 32 bits")
}

impl Add<usize> for SeqNumber {
    type Output = SeqNumber;
    fn add(self, bytes: usize) -> SeqNumber {
        SeqNumber(self.0.wrapping_add(on_circle(bytes)))
    }
}

impl Sub<usize> for SeqNumber {
    type Output = SeqNumber;
    fn sub(self, bytes: usize) -> SeqNumber {
        SeqNumber(self.0.wrapping_sub(on_circle(bytes)))
    }
}

/// The control bits.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u8);

impl Flags {
    /// No bit set.
    pub const NONE: Flags = Flags(0);
    /// The sender has no more data.
    pub const FIN: Flags = Flags(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Flags = Flags(0x02);
    /// Reset the connection.
    pub const RST: Flags = Flags(0x04);
    /// Push.
    pub const PSH: Flags = Flags(0x08);
    /// The acknowledgment field is significant.
    pub const ACK: Flags = Flags(0x10);
    /// The urgent pointer is significant.
    pub const URG: Flags = Flags(0x20);
    /// ECN echo (RFC 3168).
    pub const ECE: Flags = Flags(0x40);
    /// Congestion window reduced (RFC 3168).
    pub const CWR: Flags = Flags(0x80);

    /// Whether all bits of `other` are set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any bit of `other` is set.
    pub const fn intersects(self, other: Flags) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Flags {
    type Output = Flags;
    fn bitor(self, rhs: Flags) -> Flags {
        Flags(self.0 | rhs.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
        if *self == Flags::NONE {
            return f.write_str("none");
        }
        let set = NAMES.iter().enumerate().filter(|(bit, _)| self.0 & (1 << bit) != 0);
        for (n, (_, name)) in set.enumerate() {
            if n > 0 {
                f.write_str("|")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

/// The options vunet reads and writes; others are skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Maximum segment size the sender takes, in bytes.
    pub mss: Option<u16>,
    /// Window scale as a shift count, at most [`WINDOW_SCALE_MAX`].
    pub window_scale: Option<u8>,
    /// Whether the sender takes SACK blocks.
    pub sack_permitted: bool,
    /// Timestamp value and echo reply.
    pub timestamps: Option<(u32, u32)>,
    /// SACK blocks as (left edge, right edge), the used ones first.
    pub sack: [Option<(SeqNumber, SeqNumber)>; SACK_BLOCKS_MAX],
}

impl Options {
    /// Reads options up to the end, or up to the first one that is malformed.
    fn parse(mut bytes: &[u8]) -> Options {
        let mut options = Options::default();
        loop {
            match *bytes {
                [] | [OPTION_END, ..] => return options,
                [OPTION_NOP, ..] => bytes = &bytes[1..],
                [_] => return options,
                [kind, len, ..] => {
                    let len = usize::from(len);
                    if len < 2 || len > bytes.len() || !options.read_one(kind, &bytes[2..len]) {
                        return options;
                    }
                    bytes = &bytes[len..];
                }
            }
        }
    }

    /// Takes one option's value; `false` if its length does not fit its kind.
    fn read_one(&mut self, kind: u8, value: &[u8]) -> bool {
        match (kind, value) {
            (OPTION_MSS, &[a, b]) => self.mss = Some(u16::from_be_bytes([a, b])),
            (OPTION_WINDOW_SCALE, &[shift]) => self.window_scale = Some(shift.min(WINDOW_SCALE_MAX)),
            (OPTION_SACK_PERMITTED, &[]) => self.sack_permitted = true,
            (OPTION_TIMESTAMPS, &[a, b, c, d, e, f, g, h]) => {
                self.timestamps = Some((u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h])));
            }
            (OPTION_SACK, blocks) if !blocks.is_empty() && blocks.len() % 8 == 0 => {
                self.sack = [None; SACK_BLOCKS_MAX];
                for (slot, block) in self.sack.iter_mut().zip(blocks.chunks_exact(8)) {
                    let edge = |at: usize| {
                        let edge = [block[at], block[at + 1], block[at + 2], block[at + 3]];
                        SeqNumber(u32::from_be_bytes(edge))
                    };
                    *slot = Some((edge(0), edge(4)));
                }
            }
            (
                OPTION_MSS | OPTION_WINDOW_SCALE | OPTION_SACK_PERMITTED | OPTION_TIMESTAMPS | OPTION_SACK,
                _,
            ) => {
                return false;
            }
            _ => {}
        }
        true
    }

    /// Bytes of every option but SACK blocks, not padded; at most 19.
    fn fixed_bytes(&self) -> usize {
        let mut bytes = 0;
        bytes += if self.mss.is_some() { 4 } else { 0 };
        bytes += if self.window_scale.is_some() { 3 } else { 0 };
        bytes += if self.sack_permitted { 2 } else { 0 };
        bytes += if self.timestamps.is_some() { 10 } else { 0 };
        bytes
    }

    /// How many SACK blocks are written: those there are, as far as they fit (RFC 2018, 3).
    fn sack_blocks_written(&self) -> usize {
        let room = (OPTIONS_BYTES_MAX - self.fixed_bytes()).saturating_sub(2) / 8;
        self.sack.iter().flatten().count().min(room)
    }

    /// Bytes as written, padded to a multiple of 4.
    fn emitted_bytes(&self) -> usize {
        let sack = match self.sack_blocks_written() {
            0 => 0,
            blocks => 2 + 8 * blocks,
        };
        (self.fixed_bytes() + sack).next_multiple_of(4)
    }

    /// Writes the options to `out`, which is [`Options::emitted_bytes`] long.
    fn emit(&self, out: &mut [u8]) {
        out.fill(OPTION_NOP);
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        if let Some(mss) = self.mss {
            put(&[OPTION_MSS, 4]);
            put(&mss.to_be_bytes());
        }
        if let Some(shift) = self.window_scale {
            put(&[OPTION_WINDOW_SCALE, 3, shift]);
        }
        if self.sack_permitted {
            put(&[OPTION_SACK_PERMITTED, 2]);
        }
        if let Some((value, echo)) = self.timestamps {
            put(&[OPTION_TIMESTAMPS, 10]);
            put(&value.to_be_bytes());
            put(&echo.to_be_bytes());
        }
        let blocks = self.sack_blocks_written();
        if blocks > 0 {
            put(&[OPTION_SACK, u8::try_from(2 + 8 * blocks).expect("at most four blocks")]);
            for (left, right) in self.sack.iter().flatten().take(blocks) {
                put(&left.0.to_be_bytes());
                put(&right.0.to_be_bytes());
            }
        }
    }
}

/// A TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number of the first byte, or of SYN.
    pub seq: SeqNumber,
    /// Next sequence number expected; has meaning with ACK.
    pub ack: SeqNumber,
    /// Control bits.
    pub flags: Flags,
    /// Window, not scaled.
    pub window: u16,
    /// Urgent pointer; has meaning with URG.
    pub urgent: u16,
    /// Options.
    pub options: Options,
}

impl Header {
    /// Reads the header at the start of a segment; the length returned is the whole header's, in bytes.
    /// Malformed options end the options, as if the rest were padding. The checksum is not judged.
    ///
    /// # Errors
    /// [`WireError::Truncated`] if the header does not lie in `bytes`, [`WireError::Malformed`] for a
    /// data offset below 20 bytes.
    pub fn parse(bytes: &[u8]) -> Result<(Header, usize), WireError> {
        let fixed: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        let be16 = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        let be32 = |at: usize| u32::from(be16(at)) << 16 | u32::from(be16(at + 2));
        let header_bytes = usize::from(fixed[12] >> 4) * 4;
        if header_bytes < HEADER_BYTES {
            return Err(WireError::Malformed("TCP data offset below 20"));
        }
        let options = bytes.get(HEADER_BYTES..header_bytes).ok_or(WireError::Truncated)?;
        let header = Header {
            src_port: be16(0),
            dst_port: be16(2),
            seq: SeqNumber(be32(4)),
            ack: SeqNumber(be32(8)),
            flags: Flags(fixed[13]),
            window: be16(14),
            urgent: be16(18),
            options: Options::parse(options),
        };
        Ok((header, header_bytes))
    }

    /// Length of the header as [`Header::emit`] writes it, in bytes: 20 to 60, a multiple of 4.
    pub fn header_bytes(&self) -> usize {
        HEADER_BYTES + self.options.emitted_bytes()
    }

    /// Writes the header to the start of `out`, with a checksum field of zero, and returns its length in
    /// bytes. SACK blocks that do not fit beside the other options are left out.
    ///
    /// # Panics
    /// If `out` is shorter than [`Header::header_bytes`].
    pub fn emit(&self, out: &mut [u8]) -> usize {
        let header_bytes = self.header_bytes();
        let (fixed, options) = out[..header_bytes].split_at_mut(HEADER_BYTES);
        fixed[0..2].copy_from_slice(&self.src_port.to_be_bytes());
        fixed[2..4].copy_from_slice(&self.dst_port.to_be_bytes());
        fixed[4..8].copy_from_slice(&self.seq.0.to_be_bytes());
        fixed[8..12].copy_from_slice(&self.ack.0.to_be_bytes());
        fixed[12] = u8::try_from(header_bytes / 4).expect("a header is at most 60 bytes") << 4;
        fixed[13] = self.flags.0;
        fixed[14..16].copy_from_slice(&self.window.to_be_bytes());
        fixed[16..18].fill(0);
        fixed[18..20].copy_from_slice(&self.urgent.to_be_bytes());
        self.options.emit(options);
        header_bytes
    }
}
