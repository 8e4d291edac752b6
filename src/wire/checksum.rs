//! The internet checksum: full, partial (pseudo-header only) and incremental.
//!
//! The one's complement sum does not depend on byte order (RFC 1071, 2B), so bytes are added as
//! native words and swapped once at the end. Sums may be built in any order and in pieces of any
//! length.
//!
//! Read first: RFC 1071, RFC 1624 (section 3), RFC 768 (the zero checksum), virtio 1.3, 5.1.6.2
//! (what a partial checksum field holds).

use std::net::IpAddr;

use super::ipv4::Protocol;

/// A one's complement sum in the making.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accumulator {
    /// Sum of native-endian 16-bit words, carries not folded yet.
    sum: u64,
    /// Whether an odd number of bytes was added, so that the next byte completes a word.
    odd: bool,
}

impl Accumulator {
    /// An empty sum.
    pub const fn new() -> Accumulator {
        Accumulator { sum: 0, odd: false }
    }

    /// Adds `bytes` as the continuation of those added before; pieces may have odd lengths.
    #[inline]
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        let words = fold_words(sum_words(bytes));
        // After an odd piece every byte stands in the other half of its word.
        self.sum += u64::from(if self.odd { words.swap_bytes() } else { words });
        self.odd ^= bytes.len() % 2 == 1;
    }

    /// Adds a piece of a known length of whole words, such as a header without options: a few additions.
    #[inline]
    pub fn add_words<const BYTES: usize>(&mut self, bytes: &[u8; BYTES]) {
        const { assert!(BYTES.is_multiple_of(4)) };
        let words =
            bytes.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        let sum = words.map(u64::from).sum();
        self.sum += u64::from(if self.odd { fold_words(sum).swap_bytes() } else { fold_words(sum) });
    }

    /// Adds one 16-bit field, as a word of its own: an odd byte before it is not completed by it.
    pub fn add_u16(&mut self, value: u16) {
        self.sum += u64::from(value.to_be());
    }

    /// Adds one 32-bit field, as two words of their own.
    pub fn add_u32(&mut self, value: u32) {
        let value = value.to_be();
        self.sum += u64::from(value >> 16) + u64::from(value & 0xffff);
    }

    /// The sum, not complemented: what a checksum field holds that is still to be completed over the
    /// bytes behind the pseudo-header.
    #[inline]
    pub fn fold(&self) -> u16 {
        u16::from_be(fold_words(self.sum))
    }

    /// The checksum: the sum's complement. Over data whose checksum field is right it is 0.
    #[inline]
    pub fn finish(&self) -> u16 {
        !self.fold()
    }
}

/// Sum of `bytes` as native words, a last odd byte padded with zero. At most `2^32` words of 32 bits
/// fit before a carry is lost, which is more than any slice vunet holds.
#[inline]
fn sum_words(bytes: &[u8]) -> u64 {
    let mut sum = 0u64;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes(chunk.try_into().expect("chunks_exact(8) yields 8 bytes"));
        sum += (word >> 32) + (word & 0xffff_ffff);
    }
    let rest = chunks.remainder();
    let mut last = [0u8; 8];
    last[..rest.len()].copy_from_slice(rest);
    let word = u64::from_ne_bytes(last);
    sum + (word >> 32) + (word & 0xffff_ffff)
}

/// Whether the checksum of an IPv4 header without options is right.
#[inline]
pub fn is_whole(header: &[u8; 20]) -> bool {
    let words = header.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    let sum: u64 = words.map(u64::from).sum();
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    (sum >> 16) + (sum & 0xffff) == 0xffff
}

/// Adds the carries back in until 16 bits are left.
#[inline]
fn fold_words(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    u16::try_from(sum).expect("a 64-bit sum folds into 16 bits in five steps")
}

/// The sum of the pseudo-header in front of a transport segment of `len` bytes (header and payload):
/// RFC 9293, 3.1 for IPv4; RFC 8200, 8.1 for IPv6. Both addresses are of one family.
pub fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: Protocol, len: usize) -> Accumulator {
    let mut sum = Accumulator::new();
    for addr in [src, dst] {
        match addr {
            IpAddr::V4(addr) => sum.add_bytes(&addr.octets()),
            IpAddr::V6(addr) => sum.add_bytes(&addr.octets()),
        }
    }
    // IPv4 has 16 bits of length, IPv6 32; the sum is the same where both can say it.
    sum.add_u32(u32::try_from(len).expect("no transport segment is longer than 4 GiB"));
    sum.add_u16(u16::from(protocol.0));
    sum
}

/// `checksum` after one 16-bit word under it changed from `old` to `new` (RFC 1624, equation 3).
///
/// A UDP checksum still needs [`udp_nonzero`] behind it, and one that is absent (0) must stay so.
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = u32::from(!checksum) + u32::from(!old) + u32::from(new);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    !u16::try_from(sum).expect("three 16-bit words fold into 16 bits in two steps")
}

/// A computed UDP checksum as it is sent: 0 means "none", so 0 goes out as `0xffff` (RFC 768).
pub const fn udp_nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum as RFC 1071 words it: big-endian words, one at a time.
    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::try_from(sum).unwrap()
    }

    #[test]
    fn rfc_1071_example_sums_to_ddf2() {
        let mut sum = Accumulator::new();
        sum.add_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.finish(), !0xddf2);
    }

    #[test]
    fn rfc_1624_example_updates_to_zero() {
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn every_short_length_and_alignment_agrees_with_the_plain_sum() {
        let bytes: Vec<u8> = (0..200u32).map(|i| u8::try_from(i * 151 % 256).unwrap()).collect();
        for from in 0..9 {
            for to in from..bytes.len() {
                let mut sum = Accumulator::new();
                sum.add_bytes(&bytes[from..to]);
                assert_eq!(sum.fold(), plain(&bytes[from..to]), "{from}..{to}");
            }
        }
    }

    #[test]
    fn carries_of_a_64_kib_frame_of_ones_are_not_lost() {
        let mut sum = Accumulator::new();
        sum.add_bytes(&[0xff; 65_536]);
        assert_eq!(sum.finish(), 0);
    }

    #[test]
    fn fields_and_their_bytes_sum_alike() {
        let (mut fields, mut bytes) = (Accumulator::new(), Accumulator::new());
        fields.add_u16(0x1234);
        fields.add_u32(0xdead_beef);
        bytes.add_bytes(&[0x12, 0x34, 0xde, 0xad, 0xbe, 0xef]);
        assert_eq!(fields.fold(), bytes.fold());
    }

    #[test]
    fn a_header_is_whole_where_its_sum_is_all_ones_and_nowhere_else() {
        let mut random = 1u64;
        for _ in 0..20_000 {
            let mut header: [u8; 20] = std::array::from_fn(|_| {
                random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                // Many extremes, where carries are.
                match random >> 61 {
                    0 | 1 => 0xff,
                    2 => 0,
                    _ => (random >> 40) as u8,
                }
            });
            assert_eq!(is_whole(&header), plain(&header) == 0xffff);
            header[10..12].fill(0);
            let sum = !plain(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            assert!(is_whole(&header));
            header[3] ^= 0x10;
            assert!(!is_whole(&header));
        }
        assert!(!is_whole(&[0; 20]));
        assert!(is_whole(&[0xff; 20]));
    }

    #[test]
    fn zero_udp_checksum_goes_out_as_ones() {
        assert_eq!(udp_nonzero(0), 0xffff);
        assert_eq!(udp_nonzero(1), 1);
        assert_eq!(udp_nonzero(0xffff), 0xffff);
    }
}
