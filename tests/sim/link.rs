//! The guest leg, one direction of it: frames on their way, late, lost, repeated, out of order, held up.
//! Nothing is corrupted here: the real leg is the guest's memory.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use vunet::wire::checksum::Accumulator;

use crate::bytes::Stream;
use crate::plan::LinkFaults;
use crate::random::Rng;

/// A frame with what the driver says of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frame {
    pub(crate) bytes: Vec<u8>,
    /// The TCP checksum is left to the device.
    pub(crate) partial: bool,
}

/// Frames under way.
pub(crate) struct Link {
    rng: Rng,
    faults: LinkFaults,
    queue: BinaryHeap<Reverse<(u64, u64, Frame)>>,
    count: u64,
    last_at_us: u64,
    held_until_us: u64,
    /// Faults that took place.
    pub(crate) faults_seen: u64,
}

impl Link {
    pub(crate) fn new(rng: Rng, faults: LinkFaults) -> Link {
        Link {
            rng,
            faults,
            queue: BinaryHeap::new(),
            count: 0,
            last_at_us: 0,
            held_until_us: 0,
            faults_seen: 0,
        }
    }

    /// Sends a frame at `now_us`.
    pub(crate) fn push(&mut self, now_us: u64, frame: Frame) {
        let faults = self.faults;
        // Without the gateway's address nothing begins; the loss of ARP tests the guest's stack only.
        let is_arp = frame.bytes[12..14] == [8, 6];
        if self.rng.chance(faults.hold) {
            self.faults_seen += 1;
            self.held_until_us = now_us + self.rng.below(faults.hold_us_max) as u64;
        }
        if !is_arp && self.rng.chance(faults.lose) {
            self.faults_seen += 1;
            return;
        }
        if self.rng.chance(faults.repeat) {
            self.faults_seen += 1;
            let later = self.rng.below(faults.late_us_max) as u64;
            self.put(now_us + later, frame.clone());
        }
        if !is_arp && self.rng.chance(faults.reorder) {
            self.faults_seen += 1;
            let later = self.rng.below(faults.late_us_max) as u64;
            return self.put(now_us + later, frame);
        }
        let at = (now_us + self.rng.between(faults.delay_us / 2, faults.delay_us + 1) as u64)
            .max(self.last_at_us)
            .max(self.held_until_us);
        self.last_at_us = at;
        self.put(at, frame);
    }

    fn put(&mut self, at: u64, frame: Frame) {
        self.count += 1;
        self.queue.push(Reverse((at.next_multiple_of(self.faults.tick_us), self.count, frame)));
    }

    /// The next frame that has come.
    pub(crate) fn pop(&mut self, now_us: u64) -> Option<Frame> {
        if self.next_at()? > now_us {
            return None;
        }
        self.queue.pop().map(|Reverse((_, _, frame))| frame)
    }

    /// When the next frame comes.
    pub(crate) fn next_at(&self) -> Option<u64> {
        self.queue.peek().map(|Reverse((at, _, _))| *at)
    }

    /// What is under way is lost: the guest is another one now.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }
}

/// Moves the guest's sequence numbers, as if its stack had chosen others: the first of each connection is
/// so near the end of its space that it wraps.
#[derive(Default)]
pub(crate) struct SeqShift {
    /// By the guest's and the remote port: the SYN's own number, and what is added to it.
    flows: std::collections::HashMap<(u16, u16), (u32, u32)>,
}

const IP: usize = 14;
const TCP: usize = 34;

impl SeqShift {
    /// A frame of the guest; `before_wrap` numbers lie between a new SYN and the wrap.
    pub(crate) fn outbound(&mut self, frame: &mut Frame, before_wrap: u32) {
        let Some(bytes) = tcp(&mut frame.bytes) else { return };
        let key = (port(bytes, TCP), port(bytes, TCP + 2));
        let seq = number(bytes, TCP + 4);
        let syn = bytes[TCP + 13] & 2 != 0;
        if syn && self.flows.get(&key).is_none_or(|(first, _)| *first != seq) {
            self.flows.insert(key, (seq, (u32::MAX - before_wrap).wrapping_sub(seq)));
        }
        let Some((_, add)) = self.flows.get(&key) else { return };
        set_number(bytes, TCP + 4, seq.wrapping_add(*add), frame.partial);
    }

    /// A frame towards the guest.
    pub(crate) fn inbound(&self, frame: &mut Frame) {
        let Some(bytes) = tcp(&mut frame.bytes) else { return };
        let Some((_, add)) = self.flows.get(&(port(bytes, TCP + 2), port(bytes, TCP))) else { return };
        if bytes[TCP + 13] & 16 != 0 {
            set_number(bytes, TCP + 8, number(bytes, TCP + 8).wrapping_sub(*add), false);
        }
        let end = TCP + usize::from(bytes[TCP + 12] >> 4) * 4;
        let mut at = TCP + 20;
        while at < end && bytes[at] != 0 {
            let len = if bytes[at] == 1 { 1 } else { usize::from(bytes[at + 1]) };
            if bytes[at] == 5 {
                for edge in (at + 2..at + len).step_by(4) {
                    set_number(bytes, edge, number(bytes, edge).wrapping_sub(*add), false);
                }
            }
            at += len.max(1);
        }
    }
}

/// Helps smoltcp out of a corner. Where a window of zero opens again it forgets that bytes sent before may
/// be lost, and has no timer for them; duplicate acknowledgements, the answers to its keep-alives, make it
/// send them again, but only the third in a row does, and that may be lost as well. So each eighth in a
/// row says a window one smaller, which to smoltcp is no duplicate, and the count begins again.
#[derive(Debug, Default)]
pub(crate) struct DuplicateAcks {
    /// By the guest's and the remote port: the last acknowledgement, and how often it came in a row.
    rows: std::collections::HashMap<(u16, u16), (u32, u32)>,
}

impl DuplicateAcks {
    /// A frame towards the guest.
    pub(crate) fn inbound(&mut self, frame: &mut Frame) {
        let Some(bytes) = tcp(&mut frame.bytes) else { return };
        let payload_at = TCP + usize::from(bytes[TCP + 12] >> 4) * 4;
        let is_bare = usize::from(port(bytes, IP + 2)) == payload_at - IP && bytes[TCP + 13] == 16;
        let ack = number(bytes, TCP + 8);
        let row = self.rows.entry((port(bytes, TCP + 2), port(bytes, TCP))).or_default();
        if !is_bare || row.0 != ack {
            *row = (ack, 0);
            return;
        }
        row.1 += 1;
        let window_at = TCP + 14;
        if row.1.is_multiple_of(8) && port(bytes, window_at) > 0 {
            let smaller = number(bytes, window_at) - (1 << 16);
            set_number(bytes, window_at, smaller, false);
        }
    }
}

/// smoltcp's keep-alives carry a byte of nothing in the place of the last one sent (RFC 9293, 3.8.4), which
/// the other side is to have already. In the corner that [`DuplicateAcks`] is for it may not have it, and
/// nobody could tell that byte from a true one. There the true one, or the FIN, is put in its place.
#[derive(Debug, Default)]
pub(crate) struct KeepAlives {
    /// By the guest's and the remote port: its first byte's number, and what it knows to be acknowledged.
    flows: std::collections::HashMap<(u16, u16), (u32, u32)>,
}

impl KeepAlives {
    /// A frame towards the guest.
    pub(crate) fn inbound(&mut self, frame: &mut Frame) {
        let Some(bytes) = tcp(&mut frame.bytes) else { return };
        let Some((_, una)) = self.flows.get_mut(&(port(bytes, TCP + 2), port(bytes, TCP))) else { return };
        let ack = number(bytes, TCP + 8);
        if bytes[TCP + 13] & 16 != 0 && ack.wrapping_sub(*una).cast_signed() > 0 {
            *una = ack;
        }
    }

    /// A frame of the guest; `stream_of` knows what it sends from a port, and how much.
    pub(crate) fn outbound(
        &mut self,
        frame: &mut Frame,
        stream_of: impl FnOnce(u16) -> Option<(Stream, usize)>,
    ) {
        let Some(bytes) = tcp(&mut frame.bytes) else { return };
        let (key, seq) = ((port(bytes, TCP), port(bytes, TCP + 2)), number(bytes, TCP + 4));
        if bytes[TCP + 13] & 2 != 0 {
            self.flows.insert(key, (seq.wrapping_add(1), seq.wrapping_add(1)));
            return;
        }
        let head = TCP + usize::from(bytes[TCP + 12] >> 4) * 4;
        let Some((first, una)) = self.flows.get(&key) else { return };
        if bytes.len() != head + 1 || bytes[head] != 0 || seq.wrapping_sub(*una).cast_signed() < 0 {
            return;
        }
        let Some((stream, len)) = stream_of(key.0) else { return };
        let at = seq.wrapping_sub(*first) as usize;
        if at == len {
            bytes[TCP + 13] |= 1;
            frame.bytes.truncate(head);
        } else {
            stream.fill(at, &mut bytes[head..]);
        }
        set_length(&mut frame.bytes);
    }
}

/// The frame if it holds a TCP header.
fn tcp(bytes: &mut [u8]) -> Option<&mut [u8]> {
    let is_tcp = bytes.len() >= TCP + 20 && bytes[12..14] == [8, 0] && bytes[IP + 9] == 6;
    is_tcp.then_some(bytes)
}

fn port(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes a number and, unless the checksum is yet to be made, corrects that (RFC 1624).
fn set_number(bytes: &mut [u8], at: usize, value: u32, partial: bool) {
    if !partial {
        // Bytes at an odd place weigh in the other half of the sum's words.
        let word = |bytes: &[u8], at: usize| {
            let (high, low) = (u32::from(bytes[at]), u32::from(bytes[at + 1]));
            if (at - TCP).is_multiple_of(2) { high << 8 | low } else { low << 8 | high }
        };
        let mut sum = u32::from(!port(bytes, TCP + 16));
        sum += (0xffff - word(bytes, at)) + (0xffff - word(bytes, at + 2));
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        sum += word(bytes, at) + word(bytes, at + 2);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        bytes[TCP + 16..TCP + 18].copy_from_slice(&(!sum as u16).to_be_bytes());
    } else {
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
}

/// A FIN apart from the bytes before it. smoltcp 0.14 does not remember the window that its own window
/// probe told, cuts what lies beyond the one told before, and takes the FIN behind the cut all the same.
pub(crate) fn fin_apart(bytes: Vec<u8>) -> Vec<Vec<u8>> {
    let mut first = bytes;
    let Some(head) = tcp(&mut first).map(|bytes| TCP + usize::from(bytes[TCP + 12] >> 4) * 4) else {
        return vec![first];
    };
    if first[TCP + 13] & 1 == 0 || first.len() == head {
        return vec![first];
    }
    let mut last = first[..head].to_vec();
    let seq = number(&last, TCP + 4).wrapping_add((first.len() - head) as u32);
    last[TCP + 4..TCP + 8].copy_from_slice(&seq.to_be_bytes());
    first[TCP + 13] &= !1;
    set_length(&mut first);
    set_length(&mut last);
    vec![first, last]
}

/// Writes length and checksums of a segment that got shorter.
fn set_length(bytes: &mut [u8]) {
    let total = (bytes.len() - IP) as u16;
    bytes[IP + 2..IP + 4].copy_from_slice(&total.to_be_bytes());
    set_checksum(bytes, IP + 10, Accumulator::new(), IP..TCP);
    let mut pseudo = Accumulator::new();
    pseudo.add_bytes(&bytes[IP + 12..IP + 20]);
    pseudo.add_bytes(&[0, 6]);
    pseudo.add_bytes(&((bytes.len() - TCP) as u16).to_be_bytes());
    let end = bytes.len();
    set_checksum(bytes, TCP + 16, pseudo, TCP..end);
}

fn set_checksum(bytes: &mut [u8], at: usize, mut sum: Accumulator, over: std::ops::Range<usize>) {
    bytes[at..at + 2].fill(0);
    sum.add_bytes(&bytes[over]);
    bytes[at..at + 2].copy_from_slice(&sum.finish().to_be_bytes());
}
