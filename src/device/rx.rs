//! The receive queues: frames to the guest.
//!
//! A frame takes one reservation: chains are popped until their buffers hold it, the engine fills
//! them in place, and `commit` writes the virtio-net header, completes the chains that were needed
//! and gives the rest back. With `MRG_RXBUF` a frame may take many chains, else exactly one. Nothing
//! is seen by the driver before `publish`, which shows a whole batch with one store: a frame is
//! never half there.
//!
//! The driver is asked not to kick while there are buffers. Only a reservation that found too few
//! asks for a kick, and remembers it: the ring is *starved*.
//!
//! May touch: receive rings, guest memory to write. Read first: virtio 1.3, 5.1.6.3 and 5.1.6.4;
//! `ring`; `engine::guest_port`.

use super::chain::{ChainBuf, ChainError};
use super::features::{Feature, Features};
use super::queues::queue_pair;
use super::ring::{Popped, Ring, RingFault, SharedMemory};
use super::stats::RxStats;
use super::tx::Enabled;
use crate::capture::Recorder;
use crate::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use crate::frame::{PayloadMut, QueuePair};
use crate::limits::{FRAME_SEGMENTS_MAX, QUEUE_PAIRS_MAX};
use crate::wire::vnet::{Checksum, VnetHeader};

/// A receive ring in its place.
#[derive(Debug)]
pub(super) struct RxRing {
    pub(super) ring: Ring,
    pub(super) enabled: Enabled,
    /// Why it was stopped, until it is started again.
    pub(super) fault: Option<RingFault>,
    /// A reservation found too few buffers; the next kick tells of more.
    pub(super) starved: bool,
    /// It may turn out to be the control queue: see `queues`.
    pub(super) undecided: bool,
    complained: bool,
}

impl RxRing {
    pub(super) fn new(ring: Ring, enabled: Enabled) -> RxRing {
        RxRing { ring, enabled, fault: None, starved: false, undecided: false, complained: false }
    }

    fn is_running(&self) -> bool {
        self.fault.is_none() && self.enabled == Enabled::Yes && !self.undecided
    }

    /// Completes a chain that no frame can go into.
    fn discard(&mut self, head: u16, why: ChainError, stats: &mut RxStats) {
        stats.bad_chains.count(why);
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(reason = %why, "malformed chain in a receive ring given back unused");
        }
        self.ring.complete(head, 0);
    }
}

/// A chain of the open reservation.
#[derive(Clone, Copy, Debug)]
struct Held {
    head: u16,
    len_bytes: u32,
}

/// The open reservation.
#[derive(Debug)]
struct Open {
    pair: usize,
    /// Frame bytes reserved, the virtio-net header not counted.
    frame_bytes: usize,
}

/// The receive queues of all pairs.
#[derive(Debug)]
pub struct RxSide {
    pub(super) rings: [Option<RxRing>; QUEUE_PAIRS_MAX],
    pub(super) stats: RxStats,
    features: Features,
    chain: ChainBuf,
    held: Vec<Held>,
    open: Option<Open>,
    /// Copies what crosses the device, both ways, while there is a capture.
    pub(super) recorder: Option<Box<Recorder>>,
    /// A ring got a fault that `queues` has not seen yet.
    pub(super) any_fault: bool,
}

/// What gathering came to.
enum Gathered {
    /// Frame bytes the buffers hold.
    Enough(usize),
    /// Too few buffers, all given back.
    Short,
    /// No number of buffers would do; all given back.
    Never,
}

impl RxSide {
    pub(super) fn new(memory: &SharedMemory) -> RxSide {
        RxSide {
            rings: [const { None }; QUEUE_PAIRS_MAX],
            stats: RxStats::default(),
            features: Features::NONE,
            chain: ChainBuf::new(memory),
            held: Vec::with_capacity(FRAME_SEGMENTS_MAX),
            open: None,
            recorder: None,
            any_fault: false,
        }
    }

    pub(super) fn set_features(&mut self, features: Features) {
        self.features = features;
    }

    pub(super) fn set_memory(&mut self, memory: &SharedMemory) {
        assert!(self.open.is_none(), "reservations end within a batch, memory changes between batches");
        self.chain.set_memory(memory);
    }

    /// What copies frames that cross the device, while there is a capture.
    pub fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_deref_mut()
    }

    /// Whether a reservation of some running pair found too few buffers and none have come since.
    pub fn starved(&self) -> bool {
        self.rings.iter().flatten().any(|rx| rx.starved && rx.is_running())
    }

    /// The first pair whose receive ring carries frames.
    pub fn first_running(&self) -> Option<QueuePair> {
        let running = |rx: &Option<RxRing>| rx.as_ref().is_some_and(RxRing::is_running);
        self.rings.iter().zip(0..).find(|(rx, _)| running(rx)).map(|(_, n)| QueuePair(n))
    }

    /// Whether any receive ring carries frames.
    pub(super) fn any_running(&self) -> bool {
        self.rings.iter().flatten().any(RxRing::is_running)
    }

    /// Shows the driver every frame committed since the last call.
    pub(super) fn publish(&mut self) {
        for rx in self.rings.iter_mut().flatten() {
            if rx.ring.publish() {
                self.stats.calls += 1;
            }
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.publish();
        }
    }

    /// Takes note of a kick. Returns whether the engine was waiting for it.
    pub(super) fn take_kick(&mut self, pair: usize) -> bool {
        let Some(rx) = &mut self.rings[pair] else { return false };
        if !rx.starved || !rx.is_running() {
            return false;
        }
        rx.starved = false;
        rx.ring.disarm();
        true
    }

    /// Whether the first chain of an undecided ring begins with bytes to read, which only a control
    /// queue's do; `None` if there is no chain yet.
    pub(super) fn looks_like_control(&mut self, pair: usize) -> Option<bool> {
        let RxSide { rings, chain, .. } = self;
        let rx = rings[pair].as_mut()?;
        chain.clear();
        let readable = match rx.ring.pop(chain) {
            Ok(Popped::Chain { .. }) => chain.readable.count() > 0,
            Ok(Popped::Bad { .. }) => false,
            Ok(Popped::Empty) | Err(_) => return None,
        };
        rx.ring.unpop(1);
        Some(readable)
    }

    fn try_reserve(&mut self, pair: usize, min: usize, max: usize) -> Result<usize, ReserveError> {
        let running = |rx: &RxRing| rx.is_running();
        if !self.rings.get(pair).and_then(Option::as_ref).is_some_and(running) {
            return Err(ReserveError::Down);
        }
        // Ends: each turn found more chains than the one before, and gathering gives up at 1,024.
        loop {
            match self.gather(pair, min, max) {
                Ok(Gathered::Enough(frame_bytes)) => {
                    self.open = Some(Open { pair, frame_bytes });
                    return Ok(frame_bytes);
                }
                Ok(Gathered::Never) => {
                    self.stats.too_small += 1;
                    return Err(ReserveError::TooSmall);
                }
                Ok(Gathered::Short) => match self.starve(pair) {
                    Ok(true) => {}
                    Ok(false) => {
                        self.stats.full += 1;
                        return Err(ReserveError::Full);
                    }
                    Err(fault) => return Err(self.fail(pair, fault)),
                },
                Err(fault) => return Err(self.fail(pair, fault)),
            }
        }
    }

    fn fail(&mut self, pair: usize, fault: RingFault) -> ReserveError {
        if let Some(rx) = &mut self.rings[pair] {
            give_back(rx, &mut self.held);
            rx.fault = Some(fault);
            self.any_fault = true;
        }
        ReserveError::Down
    }

    /// Marks the ring starved and asks for a kick. Returns whether buffers came meanwhile.
    fn starve(&mut self, pair: usize) -> Result<bool, RingFault> {
        let Some(rx) = &mut self.rings[pair] else { return Ok(false) };
        rx.starved = true;
        let more = rx.ring.arm()?;
        Ok(more)
    }

    /// Pops chains until they hold a header and `min` bytes, and on up to `max` while there are any.
    fn gather(&mut self, pair: usize, min: usize, max: usize) -> Result<Gathered, RingFault> {
        let RxSide { rings, stats, features, chain, held, .. } = self;
        let Some(rx) = &mut rings[pair] else { return Ok(Gathered::Short) };
        let header_bytes = features.vnet_header_bytes();
        let mergeable = features.has(Feature::MRG_RXBUF);
        chain.clear();
        held.clear();
        loop {
            let before = chain.writable.len_bytes();
            let count_before = chain.writable.count();
            match rx.ring.pop(chain)? {
                Popped::Empty => break,
                Popped::Bad { why: ChainError::TooManySegments, .. } if count_before > 0 => {
                    rx.ring.unpop(1);
                    break;
                }
                Popped::Bad { head, why } => give_up(rx, chain, held, (head, why), stats),
                Popped::Chain { head } => {
                    let len = chain.writable.len_bytes() - before;
                    if chain.readable.count() > 0 {
                        give_up(rx, chain, held, (head, ChainError::WrongDirection), stats);
                    } else if len == 0 {
                        give_up(rx, chain, held, (head, ChainError::Empty), stats);
                    } else {
                        held.push(Held { head, len_bytes: u32::try_from(len).unwrap_or(u32::MAX) });
                        if !mergeable || chain.writable.len_bytes() >= header_bytes + max {
                            break;
                        }
                    }
                }
            }
        }
        let len_bytes = chain.writable.len_bytes();
        if len_bytes >= header_bytes + min && !held.is_empty() {
            return Ok(Gathered::Enough((len_bytes - header_bytes).min(max)));
        }
        let hopeless = !held.is_empty()
            && (!mergeable
                || held.len() >= usize::from(rx.ring.size())
                || chain.writable.count() >= FRAME_SEGMENTS_MAX);
        give_back(rx, held);
        Ok(if hopeless { Gathered::Never } else { Gathered::Short })
    }
}

/// Gives all held chains back to the ring.
fn give_back(rx: &mut RxRing, held: &mut Vec<Held>) {
    rx.ring.unpop(u16::try_from(held.len()).expect("a ring has at most 32,768 chains"));
    held.clear();
}

/// Completes a bad chain. Those held stand before it and completions are in order, so they go back
/// to the driver with it, unused.
fn give_up(
    rx: &mut RxRing,
    chain: &mut ChainBuf,
    held: &mut Vec<Held>,
    bad: (u16, ChainError),
    stats: &mut RxStats,
) {
    for good in held.drain(..) {
        rx.ring.complete(good.head, 0);
    }
    chain.clear();
    let (head, why) = bad;
    rx.discard(head, why, stats);
}

impl GuestPort for RxSide {
    fn offloads(&self) -> GuestOffloads {
        self.features.guest_offloads()
    }

    fn reserve(
        &mut self,
        pair: QueuePair,
        min_bytes: usize,
        max_bytes: usize,
    ) -> Result<usize, ReserveError> {
        assert!(self.open.is_none(), "at most one reservation is open");
        assert!(min_bytes <= max_bytes, "a reservation's least is at most its most");
        self.try_reserve(usize::from(pair.0), min_bytes, max_bytes)
    }

    fn buffers(&self, pair: QueuePair) -> usize {
        let ring = self.rings.get(usize::from(pair.0)).and_then(Option::as_ref);
        ring.map_or(0, |rx| usize::from(rx.ring.seen_available()))
    }

    fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_> {
        let open = self.open.as_ref().expect("a reservation is open");
        let from = from_bytes.min(open.frame_bytes);
        let header_bytes = self.features.vnet_header_bytes();
        self.chain.writable.payload_mut().range(header_bytes + from, open.frame_bytes - from)
    }

    fn commit(&mut self, mut vnet: VnetHeader, head: &[u8], len_bytes: usize) {
        let open = self.open.take().expect("a reservation is open");
        assert!(len_bytes <= open.frame_bytes, "the frame fits its reservation");
        assert!(head.len() <= len_bytes, "the head is part of the frame");
        let RxSide { rings, stats, features, chain, held, recorder, .. } = self;
        let rx = rings[open.pair].as_mut().expect("rings change between batches only");
        let header_bytes = features.vnet_header_bytes();
        let mut left = header_bytes + len_bytes;
        let mut used = 0;
        for chain in held.iter() {
            let take = left.min(chain.len_bytes as usize);
            rx.ring.complete(chain.head, take as u32);
            left -= take;
            used += 1;
            if left == 0 {
                break;
            }
        }
        vnet.num_buffers = used;
        if vnet.checksum == Checksum::Valid && !features.has(Feature::GUEST_CSUM) {
            vnet.checksum = Checksum::Complete;
        }
        let header = vnet.emit();
        chain.writable.payload_mut().copy_from(&header[..header_bytes]);
        chain.writable.payload_mut().range(header_bytes, head.len()).copy_from(head);
        if let Some(recorder) = recorder {
            let rest = chain.writable.payload_mut();
            let rest = rest.range(header_bytes + head.len(), len_bytes - head.len());
            recorder.to_guest(queue_pair(open.pair), &vnet, head, &rest.as_payload());
        }
        rx.ring.unpop(held.len() as u16 - used);
        held.clear();
        stats.frames += 1;
        stats.bytes += len_bytes as u64;
        stats.buffers += u64::from(used);
    }

    fn cancel(&mut self) {
        let open = self.open.take().expect("a reservation is open");
        let rx = self.rings[open.pair].as_mut().expect("rings change between batches only");
        give_back(rx, &mut self.held);
    }
}
