//! The segments of a frame as a TAP with offloads hands it over, and how to cut it between them.
//!
//! With TSO a frame of up to 64 KiB crosses the TAP whole, behind a virtio-net header (virtio 1.3,
//! 5.1.6) that says how the wire would cut it. A link loses segments, not such frames: [`Shape`] counts
//! them, [`Shape::cut`] makes a frame of some of them, as segmentation in hardware would have.

use std::ops::Range;

/// Length of the virtio-net header in front of each frame, `num_buffers` included.
pub(super) const HEADER_BYTES: usize = 12;
const ETHERNET_BYTES: usize = 14;
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_ECN: u8 = 0x80;
const PROTOCOL_TCP: u8 = 6;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Where a frame's parts lie, counted from the virtio-net header on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Length of the whole in bytes.
    len: usize,
    /// Where TCP's header begins, and its payload; both 0 if there is one segment only.
    tcp_at: usize,
    data_at: usize,
    /// Payload of a segment in bytes; of the last one, what is left.
    mss: usize,
}

impl Shape {
    /// The shape of `frame`. What is not understood is one segment.
    pub(super) fn of(frame: &[u8]) -> Shape {
        Shape::of_tcp(frame).unwrap_or(Shape { len: frame.len(), tcp_at: 0, data_at: 0, mss: 0 })
    }

    fn of_tcp(frame: &[u8]) -> Option<Shape> {
        let ip_at = HEADER_BYTES + ETHERNET_BYTES;
        let is_tcp4 = *frame.get(1)? & !GSO_ECN == GSO_TCPV4
            && frame.get(ip_at - 2..ip_at)? == [8, 0]
            && *frame.get(ip_at + 9)? == PROTOCOL_TCP;
        let mss = usize::from(u16::from_le_bytes([frame[4], frame[5]]));
        if !is_tcp4 || mss == 0 {
            return None;
        }
        let tcp_at = ip_at + usize::from(frame[ip_at] & 15) * 4;
        let data_at = tcp_at + usize::from(*frame.get(tcp_at + 12)? >> 4) * 4;
        let cuttable = tcp_at >= ip_at + 20 && data_at >= tcp_at + 20 && data_at + mss < frame.len();
        cuttable.then_some(Shape { len: frame.len(), tcp_at, data_at, mss })
    }

    /// How many segments there are.
    pub(super) fn count(&self) -> usize {
        if self.mss == 0 { 1 } else { (self.len - self.data_at).div_ceil(self.mss) }
    }

    /// Length of segment `index` on the wire in bytes, from the Ethernet header to the payload's end.
    pub(super) fn wire_bytes(&self, index: usize) -> usize {
        if self.mss == 0 {
            return self.len.saturating_sub(HEADER_BYTES);
        }
        let data = self.data(index..index + 1);
        self.data_at - HEADER_BYTES + data.len()
    }

    fn data(&self, segments: Range<usize>) -> Range<usize> {
        let at = |index: usize| (self.data_at + index * self.mss).min(self.len);
        at(segments.start)..at(segments.end)
    }

    /// A frame of those `segments` of `frame`, whose shape this is.
    pub(super) fn cut(&self, frame: &[u8], segments: Range<usize>) -> Vec<u8> {
        if segments == (0..self.count()) {
            return frame.to_vec();
        }
        let data = self.data(segments.clone());
        let mut out = Vec::with_capacity(self.data_at + data.len());
        out.extend_from_slice(&frame[..self.data_at]);
        out.extend_from_slice(&frame[data]);
        if segments.len() == 1 {
            out[1] = GSO_NONE;
            out[4..6].fill(0);
        }
        self.fit_ip(&mut out, segments.start);
        self.fit_tcp(&mut out, &segments);
        out
    }

    fn fit_ip(&self, out: &mut [u8], first: usize) {
        let ip_at = HEADER_BYTES + ETHERNET_BYTES;
        let total = u16::try_from(out.len() - ip_at).expect("no part is longer than the whole");
        put(out, ip_at + 2, total);
        let identification = get(out, ip_at + 4).wrapping_add(first as u16);
        put(out, ip_at + 4, identification);
        put(out, ip_at + 10, 0);
        let checksum = !fold(sum(&out[ip_at..self.tcp_at]));
        put(out, ip_at + 10, checksum);
    }

    fn fit_tcp(&self, out: &mut [u8], segments: &Range<usize>) {
        let (ip_at, tcp_at) = (HEADER_BYTES + ETHERNET_BYTES, self.tcp_at);
        let number = u32::from_be_bytes([out[tcp_at + 4], out[tcp_at + 5], out[tcp_at + 6], out[tcp_at + 7]]);
        let number = number.wrapping_add((segments.start * self.mss) as u32);
        out[tcp_at + 4..tcp_at + 8].copy_from_slice(&number.to_be_bytes());
        if segments.end < self.count() {
            out[tcp_at + 13] &= !(FIN | PSH);
        }
        if segments.start > 0 {
            out[tcp_at + 13] &= !CWR;
        }
        // A frame to be cut has a partial checksum: the pseudo-header's sum, with the length in it.
        let tcp_bytes = (out.len() - tcp_at) as u32;
        let pseudo = sum(&out[ip_at + 12..ip_at + 20]) + u32::from(PROTOCOL_TCP) + tcp_bytes;
        put(out, tcp_at + 16, fold(pseudo));
    }
}

/// Inverts one bit of a frame of one segment, behind the Ethernet header; `draw` chooses it. A
/// checksum that is partial is completed first, so that the receiver can tell.
pub(super) fn corrupt(frame: &mut [u8], draw: u64) {
    complete_checksum(frame);
    let from = HEADER_BYTES + ETHERNET_BYTES;
    let bits = frame.len().saturating_sub(from) as u64 * 8;
    if bits > 0 {
        let bit = usize::try_from(draw % bits).expect("a frame's bits can be counted");
        frame[from + bit / 8] ^= 1 << (bit % 8);
    }
}

/// Completes a partial checksum.
fn complete_checksum(frame: &mut [u8]) {
    if frame.len() < HEADER_BYTES || frame[0] & NEEDS_CSUM == 0 {
        return;
    }
    let start = HEADER_BYTES + usize::from(u16::from_le_bytes([frame[6], frame[7]]));
    let at = start + usize::from(u16::from_le_bytes([frame[8], frame[9]]));
    frame[0] &= !NEEDS_CSUM;
    if at + 2 > frame.len() {
        return;
    }
    let checksum = !fold(sum(&frame[start..]));
    // 0 would say "no checksum" in UDP, and both mean the same (RFC 768).
    put(frame, at, if checksum == 0 { 0xffff } else { checksum });
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// One's complement sum, not folded (RFC 1071). At most 64 KiB, so that it cannot overflow.
fn sum(bytes: &[u8]) -> u32 {
    let words =
        bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| (*low).into()));
    words.sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const IP_AT: usize = HEADER_BYTES + ETHERNET_BYTES;
    const TCP_AT: usize = IP_AT + 20;

    /// A TSO frame of `data_bytes` with numbered bytes, its sequence number close to the wrap.
    pub(in super::super) fn tso_frame(data_bytes: usize, mss: u16) -> Vec<u8> {
        let mut frame = vec![NEEDS_CSUM, GSO_TCPV4, 54, 0];
        frame.extend(mss.to_le_bytes());
        frame.extend([34, 0, 16, 0, 0, 0]);
        frame.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
        let total = u16::try_from(40 + data_bytes).unwrap().to_be_bytes();
        frame.extend([0x45, 0, total[0], total[1], 0xff, 0xfe, 0x40, 0, 64, PROTOCOL_TCP, 0, 0]);
        frame.extend([192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend([0x10, 0, 0x20, 0, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 1]);
        frame.extend([0x50, CWR | 0x10 | PSH | FIN, 0xff, 0xff, 0, 0, 0, 0]);
        frame.extend((0..data_bytes).map(|number| number as u8));
        frame
    }

    /// What a receiver checks: lengths and both checksums. The TCP payload, sequence number and flags.
    fn received(frame: &[u8]) -> (Vec<u8>, u32, u8) {
        let mut frame = frame.to_vec();
        assert_eq!(fold(sum(&frame[IP_AT..TCP_AT])), 0xffff, "IP checksum");
        assert_eq!(usize::from(get(&frame, IP_AT + 2)), frame.len() - IP_AT, "IP length");
        complete_checksum(&mut frame);
        let tcp_bytes = (frame.len() - TCP_AT) as u32;
        let pseudo = sum(&frame[IP_AT + 12..TCP_AT]) + u32::from(PROTOCOL_TCP) + tcp_bytes;
        assert_eq!(fold(pseudo + sum(&frame[TCP_AT..])), 0xffff, "TCP checksum");
        let number = u32::from_be_bytes(frame[TCP_AT + 4..TCP_AT + 8].try_into().unwrap());
        (frame[TCP_AT + 20..].to_vec(), number, frame[TCP_AT + 13])
    }

    #[test]
    fn a_frame_is_counted_in_the_segments_the_wire_would_see() {
        for (data, count, last) in [(1001, 2, 1), (2000, 2, 1000), (2001, 3, 1)] {
            let shape = Shape::of(&tso_frame(data, 1000));
            assert_eq!(shape.count(), count);
            assert_eq!(shape.wire_bytes(0), 54 + 1000);
            assert_eq!(shape.wire_bytes(count - 1), 54 + last);
        }
        // One segment's worth, another protocol, cut anywhere: one.
        assert_eq!(Shape::of(&tso_frame(1000, 1000)).count(), 1);
        let whole = tso_frame(3000, 1000);
        for len in 0..TCP_AT + 20 {
            assert_eq!(Shape::of(&whole[..len]).count(), 1);
        }
        assert_eq!(Shape::of(&[0; 72]).wire_bytes(0), 60);
    }

    #[test]
    fn parts_of_a_frame_carry_its_bytes_in_valid_segments() {
        let frame = tso_frame(3500, 1000);
        let shape = Shape::of(&frame);
        let mut together = Vec::new();
        for (part, flags) in [(0..1, CWR | 0x10), (1..3, 0x10), (3..4, 0x10 | PSH | FIN)] {
            let cut = shape.cut(&frame, part.clone());
            let gso = if part.len() == 1 { GSO_NONE } else { GSO_TCPV4 };
            assert_eq!(cut[1], gso);
            assert_eq!(Shape::of(&cut).count(), part.len());
            assert_eq!(get(&cut, IP_AT + 4), 0xfffe_u16.wrapping_add(part.start as u16));
            let (data, number, seen) = received(&cut);
            assert_eq!((number, seen), (0xffff_fff0_u32.wrapping_add(1000 * part.start as u32), flags));
            together.extend(data);
        }
        assert_eq!(together, frame[TCP_AT + 20..]);
        assert_eq!(shape.cut(&frame, 0..4), frame, "all of it is the frame itself");
    }

    #[test]
    fn corruption_changes_one_bit_a_checksum_tells_of() {
        let frame = tso_frame(2000, 1000);
        let segment = Shape::of(&frame).cut(&frame, 0..1);
        let mut complete = segment.clone();
        complete_checksum(&mut complete);
        for draw in [0, 161, 8 * 1040 - 1, u64::MAX] {
            let mut corrupted = segment.clone();
            corrupt(&mut corrupted, draw);
            assert_eq!(corrupted[0] & NEEDS_CSUM, 0, "nobody completes it again");
            let bits: u32 = complete.iter().zip(&corrupted).map(|(a, b)| (a ^ b).count_ones()).sum();
            assert_eq!(bits, 1);
            assert!(std::panic::catch_unwind(|| received(&corrupted)).is_err(), "draw {draw}");
        }
        corrupt(&mut [0; 20], 1);
    }
}
