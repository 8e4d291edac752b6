//! The guest's receive side: a bounded number of buffers, filled by the engine.

use std::collections::VecDeque;

use vunet::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use vunet::frame::{PayloadMut, QueuePair};
use vunet::wire::vnet::{Checksum, Gso, VnetHeader};

/// A frame as the guest's driver finds it.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) vnet: VnetHeader,
    pub(crate) frame: Vec<u8>,
}

/// Receive buffers and what was put into them.
pub(crate) struct SimPort {
    pub(crate) offload: bool,
    /// Whether the ring runs.
    pub(crate) is_up: bool,
    /// Buffers free now.
    pub(crate) free: usize,
    pub(crate) starved: bool,
    pub(crate) delivered: VecDeque<Received>,
    open: Option<Vec<u8>>,
}

impl SimPort {
    pub(crate) fn new(offload: bool, buffers: usize) -> SimPort {
        SimPort {
            offload,
            is_up: true,
            free: buffers,
            starved: false,
            delivered: VecDeque::new(),
            open: None,
        }
    }
}

impl GuestPort for SimPort {
    fn offloads(&self) -> GuestOffloads {
        let on = self.offload;
        GuestOffloads { checksum: on, tso4: on, tso6: false, ecn: false, uso4: false, uso6: false }
    }

    fn reserve(&mut self, _: QueuePair, min_bytes: usize, max_bytes: usize) -> Result<usize, ReserveError> {
        assert!(self.open.is_none(), "one reservation at a time");
        assert!(min_bytes <= max_bytes);
        if !self.is_up {
            return Err(ReserveError::Down);
        }
        if self.free == 0 {
            self.starved = true;
            return Err(ReserveError::Full);
        }
        self.open = Some(vec![0xee; max_bytes]);
        Ok(max_bytes)
    }

    fn buffers(&self, _: QueuePair) -> usize {
        self.free
    }

    fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_> {
        PayloadMut::from_host(&mut self.open.as_mut().expect("a reservation is open")[from_bytes..])
    }

    fn commit(&mut self, vnet: VnetHeader, head: &[u8], len_bytes: usize) {
        let mut frame = self.open.take().expect("a reservation is open");
        assert!(head.len() <= len_bytes && len_bytes <= frame.len());
        frame.truncate(len_bytes);
        frame[..head.len()].copy_from_slice(head);
        self.free -= 1;
        self.delivered.push_back(Received { vnet, frame });
    }

    fn cancel(&mut self) {
        assert!(self.open.take().is_some(), "a reservation is open");
    }
}

/// Does what a driver's stack does with offloaded frames: cuts segments and completes checksums, so
/// that a stack without offloads can take them. Panics if the header contradicts the frame.
pub(crate) fn plain_frames(received: Received) -> Vec<Vec<u8>> {
    let Received { vnet, frame } = received;
    match vnet.gso {
        Some(gso) => cut(&frame, gso, vnet.checksum),
        None => vec![complete(frame, vnet.checksum)],
    }
}

const IP: usize = 14;
const TCP: usize = 34;

fn complete(mut frame: Vec<u8>, checksum: Checksum) -> Vec<u8> {
    if let Checksum::Partial { start, offset } = checksum {
        let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
        let sum = !ones_sum(&frame[start..]);
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn cut(frame: &[u8], gso: Gso, checksum: Checksum) -> Vec<Vec<u8>> {
    let Checksum::Partial { start, .. } = checksum else {
        panic!("a frame to be segmented has a partial checksum");
    };
    assert_eq!(usize::from(start), TCP);
    let tcp_bytes = usize::from(frame[TCP + 12] >> 4) * 4;
    let head = TCP + tcp_bytes;
    assert_eq!(usize::from(gso.headers_bytes), head);
    let payload = &frame[head..];
    assert!(payload.len() > usize::from(gso.size_bytes), "a frame of one segment needs no cutting");
    let seq = u32::from_be_bytes(frame[TCP + 4..TCP + 8].try_into().unwrap());
    let count = payload.len().div_ceil(usize::from(gso.size_bytes));
    payload
        .chunks(usize::from(gso.size_bytes))
        .enumerate()
        .map(|(n, part)| {
            let mut segment = frame[..head].to_vec();
            segment.extend_from_slice(part);
            let total = (segment.len() - IP) as u16;
            segment[IP + 2..IP + 4].copy_from_slice(&total.to_be_bytes());
            segment[IP + 10..IP + 12].fill(0);
            let sum = !ones_sum(&segment[IP..TCP]);
            segment[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
            let at = seq.wrapping_add((n * usize::from(gso.size_bytes)) as u32);
            segment[TCP + 4..TCP + 8].copy_from_slice(&at.to_be_bytes());
            if n + 1 < count {
                segment[TCP + 13] &= !0x09;
            }
            let tcp_len = segment.len() - TCP;
            let mut pseudo = segment[IP + 12..IP + 20].to_vec();
            pseudo.extend_from_slice(&[0, 6]);
            pseudo.extend_from_slice(&(tcp_len as u16).to_be_bytes());
            segment[TCP + 16..TCP + 18].copy_from_slice(&ones_sum(&pseudo).to_be_bytes());
            complete(segment, checksum)
        })
        .collect()
}
