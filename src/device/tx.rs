//! The transmit queues: frames from the guest.
//!
//! A chain is popped, its virtio-net header and first bytes are copied once and judged by the copy,
//! and the frame is handed on in place. Every chain is completed in order, whatever became of its
//! frame; a batch is published once, with at most one notification. While a batch is full the
//! driver is asked not to kick; when the queue is empty it is asked to, and looked at once more.
//!
//! Who takes the frames may want to see some ahead ([`TxSide::set_ahead`]): so many are popped and copied before the first is
//! handed on, and what is not taken goes back.
//!
//! May touch: transmit rings, guest memory to read. Read first: virtio 1.3, 5.1.6.2; `ring`.

use super::chain::{ChainBuf, ChainError};
use super::features::{Feature, Features};
use super::guest_mem::Segments;
use super::ring::{Popped, Ring, RingFault, SharedMemory};
use super::stats::TxStats;
use crate::capture::Unfit;
use crate::frame::{Payload, QueuePair, TxFrame};
use crate::limits::{
    FRAME_BYTES_MAX, FRAME_HEAD_BYTES, QUEUE_PAIRS_MAX, TX_AHEAD_FRAMES_MAX, TX_BATCH_BYTES,
};
use crate::wire::vnet::{Checksum, GsoKind, VNET_HEADER_BYTES, VnetHeader};

/// Bytes of an Ethernet header: nothing shorter is a frame.
const ETHERNET_HEADER_BYTES: usize = 14;

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Nothing is left, and the guest will kick when there is.
    Empty,
    /// The budget is spent and more may wait; there will be no kick for it.
    More,
    /// A frame was not taken; it and what follows wait in the ring, and there will be no kick for them.
    Blocked,
    /// The ring is not running.
    Down,
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is dealt with.
    Yes,
    /// The frame's way is full: it stays in the ring, to be handed on again. Without meaning for a batch's
    /// end.
    NotNow,
}

/// What a drain hands on.
#[derive(Debug)]
pub enum TxEvent<'a> {
    /// A frame.
    Frame(TxFrame<'a>),
    /// What a chain holds that is no frame to be judged, for who records it.
    Unfit(Payload<'a>, Unfit),
    /// Frames that are handed on next, if none before is refused; only with [`TxSide::set_ahead`].
    Coming(Heads<'a>),
    /// The batch's frames are about to be the guest's again.
    BatchEnd,
}

/// First bytes of frames, as the frames will show them.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a>(&'a [Slot]);

impl<'a> Heads<'a> {
    /// One after the other.
    pub fn iter(self) -> impl Iterator<Item = &'a [u8]> {
        self.0.iter().filter_map(|slot| match slot.holds {
            Holds::Frame { whole_bytes, .. } => Some(&slot.head[..whole_bytes.min(FRAME_HEAD_BYTES)]),
            Holds::BadChain(_) | Holds::NoFrame(_) | Holds::Discarded => None,
        })
    }
}

/// A chain that was popped and is not handed on yet.
#[derive(Debug)]
struct Slot {
    chain: ChainBuf,
    /// Its first descriptor.
    first: u16,
    holds: Holds,
    head: Box<[u8; FRAME_HEAD_BYTES]>,
}

impl Slot {
    fn new(memory: &SharedMemory) -> Slot {
        let head = Box::new([0; FRAME_HEAD_BYTES]);
        Slot { chain: ChainBuf::new(memory), first: 0, holds: Holds::Discarded, head }
    }
}

/// What a chain holds, as it was judged when it was popped.
#[derive(Clone, Copy, Debug)]
enum Holds {
    Frame {
        vnet: VnetHeader,
        whole_bytes: usize,
    },
    BadChain(ChainError),
    NoFrame(FrameError),
    /// The ring is disabled.
    Discarded,
}

/// Whether the front-end enabled a ring (`VHOST_USER_SET_VRING_ENABLE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enabled {
    /// Never since it was reset: its chains wait.
    NotYet,
    /// It carries frames.
    Yes,
    /// Disabled again: frames from the guest are consumed and discarded, as the vhost-user
    /// specification asks, so that the guest's queue does not stall.
    No,
}

/// A transmit ring in its place.
#[derive(Debug)]
pub(super) struct TxRing {
    pub(super) ring: Ring,
    pub(super) enabled: Enabled,
    /// Why it was stopped, until it is started again.
    pub(super) fault: Option<RingFault>,
    /// Whether a malformed chain was logged since the start.
    complained: bool,
}

impl TxRing {
    pub(super) fn new(ring: Ring, enabled: Enabled) -> TxRing {
        TxRing { ring, enabled, fault: None, complained: false }
    }

    fn is_running(&self) -> bool {
        self.fault.is_none() && self.enabled != Enabled::NotYet
    }
}

/// The transmit queues of all pairs.
#[derive(Debug)]
pub struct TxSide {
    pub(super) rings: [Option<TxRing>; QUEUE_PAIRS_MAX],
    pub(super) stats: TxStats,
    features: Features,
    memory: SharedMemory,
    /// One, or as many as were ever asked for.
    slots: Vec<Slot>,
    /// How many are used.
    ahead: usize,
    /// A ring got a fault that `queues` has not seen yet.
    pub(super) any_fault: bool,
    /// The worker looks at the rings by itself.
    polled: bool,
}

impl TxSide {
    pub(super) fn new(memory: &SharedMemory) -> TxSide {
        TxSide {
            rings: [const { None }; QUEUE_PAIRS_MAX],
            stats: TxStats::default(),
            features: Features::NONE,
            memory: memory.clone(),
            slots: vec![Slot::new(memory)],
            ahead: 1,
            any_fault: false,
            polled: false,
        }
    }

    /// While `polled`, drivers are not asked to kick when a ring is empty: the worker looks at all rings
    /// again soon, and once more after this is switched off.
    pub fn set_polled(&mut self, polled: bool) {
        self.polled = polled;
    }

    pub(super) fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    pub(super) fn set_memory(&mut self, memory: &SharedMemory) {
        self.memory = memory.clone();
        for slot in &mut self.slots {
            slot.chain.set_memory(memory);
        }
    }

    /// So many frames, at least one and at most [`TX_AHEAD_FRAMES_MAX`], are looked at before the
    /// first of them is handed on.
    pub fn set_ahead(&mut self, frames: usize) {
        self.ahead = frames.clamp(1, TX_AHEAD_FRAMES_MAX);
        while self.slots.len() < self.ahead {
            self.slots.push(Slot::new(&self.memory));
        }
    }

    /// Pairs whose transmit ring runs.
    pub fn pairs_running(&self) -> impl Iterator<Item = QueuePair> + '_ {
        let running = |ring: &Option<TxRing>| ring.as_ref().is_some_and(TxRing::is_running);
        self.rings.iter().zip(0..).filter(move |(ring, _)| running(ring)).map(|(_, n)| QueuePair(n))
    }

    /// Hands at most `budget_frames` chains' frames of `pair`, and about [`TX_BATCH_BYTES`] of them, to
    /// `each`, then the batch's end, completes them and publishes once. A frame's memory is the guest's
    /// again after the batch's end: what was not copied or sent by then cannot be had later. A frame that is
    /// not taken ends the batch and goes back to the ring.
    pub fn drain(
        &mut self,
        pair: QueuePair,
        budget_frames: usize,
        mut each: impl FnMut(TxEvent<'_>) -> Taken,
    ) -> Drained {
        let TxSide { rings, stats, features, slots, ahead, any_fault, polled, .. } = self;
        let slots = &mut slots[..*ahead];
        let Some(Some(tx)) = rings.get_mut(usize::from(pair.0)) else { return Drained::Down };
        if !tx.is_running() {
            return Drained::Down;
        }
        tx.ring.disarm();
        let mut batch = Batch { tx, stats, features: *features, slots, pair, polled: *polled };
        let outcome = batch.run(budget_frames, &mut each);
        let _ = each(TxEvent::BatchEnd);
        if batch.tx.ring.publish() {
            batch.stats.calls += 1;
        }
        match outcome {
            Ok(drained) => drained,
            Err(fault) => {
                batch.tx.fault = Some(fault);
                *any_fault = true;
                Drained::Down
            }
        }
    }
}

/// One visit to one ring.
struct Batch<'a> {
    tx: &'a mut TxRing,
    stats: &'a mut TxStats,
    features: Features,
    slots: &'a mut [Slot],
    pair: QueuePair,
    polled: bool,
}

impl Batch<'_> {
    fn run(
        &mut self,
        budget: usize,
        each: &mut impl FnMut(TxEvent<'_>) -> Taken,
    ) -> Result<Drained, RingFault> {
        let bytes_max = self.stats.bytes + TX_BATCH_BYTES as u64;
        let mut left = budget;
        while left > 0 && self.stats.bytes < bytes_max {
            let popped = self.pop(left)?;
            if popped == 0 {
                // Polled: no kick is wanted, and there will be another look.
                if !self.polled && self.tx.ring.arm()? {
                    continue;
                }
                return Ok(Drained::Empty);
            }
            left -= popped;
            if popped > 1 {
                let _ = each(TxEvent::Coming(Heads(&self.slots[..popped])));
            }
            for at in 0..popped {
                let full = self.stats.bytes >= bytes_max;
                if full || self.hand_on(at, each) == Taken::NotNow {
                    self.tx.ring.unpop((popped - at) as u16);
                    if full {
                        break;
                    }
                    return Ok(Drained::Blocked);
                }
                self.tx.ring.complete(self.slots[at].first, 0);
            }
        }
        self.tx.ring.disarm();
        Ok(Drained::More)
    }

    /// Pops chains into the slots, at most `most`, and says how many there were.
    fn pop(&mut self, most: usize) -> Result<usize, RingFault> {
        let mut popped = 0;
        for slot in self.slots.iter_mut().take(most) {
            slot.chain.clear();
            (slot.first, slot.holds) = match self.tx.ring.pop(&mut slot.chain) {
                Ok(Popped::Empty) => break,
                Ok(Popped::Bad { head, why }) => (head, Holds::BadChain(why)),
                Ok(Popped::Chain { head }) => (head, judge_chain(slot, self.tx.enabled, self.features)),
                Err(fault) if popped == 0 => return Err(fault),
                // Met again once those before it are handed on.
                Err(_) => break,
            };
            popped += 1;
        }
        Ok(popped)
    }

    fn refuse(&mut self, why: ChainError) {
        self.stats.bad_chains.count(why);
        if !std::mem::replace(&mut self.tx.complained, true) {
            tracing::warn!(pair = self.pair.0, reason = %why, "malformed chain in a transmit ring dropped");
        }
    }

    /// Hands the frame of a slot on if it holds one, and counts what it holds.
    fn hand_on(&mut self, at: usize, each: &mut impl FnMut(TxEvent<'_>) -> Taken) -> Taken {
        let slot = &self.slots[at];
        match slot.holds {
            Holds::Frame { vnet, whole_bytes } => {
                let header_bytes = self.features.vnet_header_bytes();
                let taken = each(TxEvent::Frame(TxFrame {
                    vnet,
                    head: &slot.head[..whole_bytes.min(FRAME_HEAD_BYTES)],
                    whole: slot.chain.readable.payload().range(header_bytes, whole_bytes),
                    pair: self.pair,
                }));
                if taken == Taken::Yes {
                    self.stats.frames += 1;
                    self.stats.bytes += whole_bytes as u64;
                }
                return taken;
            }
            Holds::BadChain(why) => self.refuse(why),
            Holds::Discarded => self.stats.disabled += 1,
            Holds::NoFrame(error) => {
                let (count, unfit) = match error {
                    FrameError::TooShort => (&mut self.stats.too_short, Unfit::Length),
                    FrameError::TooLong => (&mut self.stats.too_long, Unfit::Length),
                    FrameError::BadHeader => (&mut self.stats.bad_header, Unfit::Header),
                    FrameError::NotNegotiated => (&mut self.stats.not_negotiated, Unfit::NotNegotiated),
                };
                *count += 1;
                let whole =
                    slot.chain.readable.payload().range(self.features.vnet_header_bytes(), usize::MAX);
                let _ = each(TxEvent::Unfit(whole, unfit));
            }
        }
        Taken::Yes
    }
}

/// Judges the chain in a slot and copies what of it is judged later.
fn judge_chain(slot: &mut Slot, enabled: Enabled, features: Features) -> Holds {
    if slot.chain.writable.count() > 0 {
        return Holds::BadChain(ChainError::WrongDirection);
    }
    if enabled != Enabled::Yes {
        return Holds::Discarded;
    }
    match read_frame(&slot.chain.readable, features, &mut slot.head) {
        Ok((vnet, whole_bytes)) => Holds::Frame { vnet, whole_bytes },
        Err(error) => Holds::NoFrame(error),
    }
}

/// Why a well-formed chain holds no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameError {
    TooShort,
    TooLong,
    BadHeader,
    NotNegotiated,
}

/// Copies header and head out of `segments`, judges the header, and returns it with the frame's
/// length.
fn read_frame(
    segments: &Segments,
    features: Features,
    head: &mut [u8; FRAME_HEAD_BYTES],
) -> Result<(VnetHeader, usize), FrameError> {
    let header_bytes = features.vnet_header_bytes();
    let frame_bytes = segments.len_bytes().checked_sub(header_bytes).ok_or(FrameError::TooShort)?;
    if frame_bytes < ETHERNET_HEADER_BYTES {
        return Err(FrameError::TooShort);
    }
    if frame_bytes > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong);
    }
    let mut raw = [0; VNET_HEADER_BYTES + FRAME_HEAD_BYTES];
    let copied = segments.payload().copy_to(&mut raw[..header_bytes + FRAME_HEAD_BYTES]);
    debug_assert_eq!(copied, header_bytes + frame_bytes.min(FRAME_HEAD_BYTES));
    head.copy_from_slice(&raw[header_bytes..header_bytes + FRAME_HEAD_BYTES]);
    let mut header = [0; VNET_HEADER_BYTES];
    header[..header_bytes].copy_from_slice(&raw[..header_bytes]);
    let vnet = VnetHeader::parse(&header).map_err(|_| FrameError::BadHeader)?;
    Ok((judge(vnet, features, frame_bytes)?, frame_bytes))
}

/// The header as the engine may rely on it: offloads negotiated, offsets within the frame.
fn judge(mut vnet: VnetHeader, features: Features, frame_bytes: usize) -> Result<VnetHeader, FrameError> {
    match vnet.checksum {
        Checksum::Partial { start, offset } => {
            if !features.has(Feature::CSUM) {
                return Err(FrameError::NotNegotiated);
            }
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET_HEADER_BYTES || end > frame_bytes {
                return Err(FrameError::BadHeader);
            }
        }
        // The flag is the device's to set (virtio 1.3, 5.1.6.2.1); the checksum is there.
        Checksum::Valid => vnet.checksum = Checksum::Complete,
        Checksum::Complete => {}
    }
    if let Some(gso) = &mut vnet.gso {
        let negotiated = match gso.kind {
            GsoKind::Tcp4 => features.has(Feature::HOST_TSO4),
            GsoKind::Tcp6 => features.has(Feature::HOST_TSO6),
            GsoKind::UdpL4 => features.has(Feature::HOST_USO),
            GsoKind::UdpFragment => false,
        };
        if !negotiated || (gso.ecn && !features.has(Feature::HOST_ECN)) {
            return Err(FrameError::NotNegotiated);
        }
        // Segments get checksums of their own, so the frame cannot carry a complete one.
        if vnet.checksum == Checksum::Complete {
            return Err(FrameError::BadHeader);
        }
        // A hint only (virtio 1.3, 5.1.6.2.2).
        gso.headers_bytes = gso.headers_bytes.min(u16::try_from(frame_bytes).unwrap_or(u16::MAX));
    }
    vnet.num_buffers = 0;
    Ok(vnet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::vnet::Gso;

    fn all() -> Features {
        Features::offered(true)
    }

    fn partial(start: u16, offset: u16) -> VnetHeader {
        VnetHeader { checksum: Checksum::Partial { start, offset }, ..VnetHeader::default() }
    }

    fn segmented(kind: GsoKind, ecn: bool) -> VnetHeader {
        let gso = Gso { kind, size_bytes: 1448, headers_bytes: u16::MAX, ecn };
        VnetHeader { gso: Some(gso), ..partial(34, 16) }
    }

    #[test]
    fn checksum_field_beyond_the_frame_is_refused() {
        assert!(judge(partial(34, 16), all(), 52).is_ok());
        assert_eq!(judge(partial(34, 16), all(), 51), Err(FrameError::BadHeader));
        assert_eq!(judge(partial(u16::MAX, u16::MAX), all(), 1500), Err(FrameError::BadHeader));
        assert_eq!(judge(partial(0, 16), all(), 1500), Err(FrameError::BadHeader));
    }

    #[test]
    fn offload_that_was_not_negotiated_is_refused() {
        assert_eq!(judge(partial(34, 16), Features::NONE, 1500), Err(FrameError::NotNegotiated));
        let csum = Features::from_bits(Feature::CSUM.mask());
        assert_eq!(judge(segmented(GsoKind::Tcp4, false), csum, 1500), Err(FrameError::NotNegotiated));
        let tso4 = Features::from_bits(Feature::CSUM.mask() | Feature::HOST_TSO4.mask());
        assert!(judge(segmented(GsoKind::Tcp4, false), tso4, 1500).is_ok());
        assert_eq!(judge(segmented(GsoKind::Tcp4, true), tso4, 1500), Err(FrameError::NotNegotiated));
        assert_eq!(judge(segmented(GsoKind::Tcp6, false), tso4, 1500), Err(FrameError::NotNegotiated));
        assert_eq!(judge(segmented(GsoKind::UdpL4, false), tso4, 1500), Err(FrameError::NotNegotiated));
        assert!(judge(segmented(GsoKind::UdpL4, false), all(), 1500).is_ok());
        assert_eq!(
            judge(segmented(GsoKind::UdpFragment, false), all(), 1500),
            Err(FrameError::NotNegotiated)
        );
    }

    #[test]
    fn segmentation_without_a_partial_checksum_is_refused() {
        let header = VnetHeader { checksum: Checksum::Complete, ..segmented(GsoKind::Tcp4, false) };
        assert_eq!(judge(header, all(), 1500), Err(FrameError::BadHeader));
    }

    #[test]
    fn header_length_hint_beyond_the_frame_is_cut() {
        let judged = judge(segmented(GsoKind::Tcp4, false), all(), 1500).unwrap();
        assert_eq!(judged.gso.unwrap().headers_bytes, 1500);
    }

    #[test]
    fn data_valid_from_the_guest_means_a_complete_checksum() {
        let header = VnetHeader { checksum: Checksum::Valid, ..VnetHeader::default() };
        assert_eq!(judge(header, all(), 60).unwrap().checksum, Checksum::Complete);
    }
}
