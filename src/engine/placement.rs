//! Which worker has a flow, and how flows move between workers.
//!
//! Each worker has an engine of its own and shares nothing on the way of a frame. A flow lives where
//! the guest last sent on it, because its frames towards the guest go out on that queue pair. When a
//! frame comes to a worker that does not know its flow, the worker looks into the [`Directory`]: if
//! another has it, the frame is held and the flow asked for by [`Letter`]; it comes with its socket and
//! the held frames go on. One datagram socket carries all a guest's port sends, from any thread: frames
//! for it are sent on at first, and only when they keep coming it is asked for in the same way. A
//! published port's socket never moves.
//!
//! The directory is looked into only for flows that are not known, and written only when one begins or
//! ends. It also counts the guest's starts: a worker forgets the guest before that with the first frame,
//! letter or event after a new start, whoever saw it, and a letter written before it carries nothing
//! into the new guest's life. Read first: `docs/adr/0006-flows-move-between-workers.md`.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::core::Neighbour;
use super::nat::{datagram, tcp};
use crate::addr::MacAddr;
use crate::frame::{Payload, QueuePair, TxFrame};
use crate::limits;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4;
use crate::wire::vnet::VnetHeader;

/// A worker's number, from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerId(pub u8);

/// What a worker can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A TCP flow.
    Tcp(tcp::Key),
    /// The datagram socket of a guest's end.
    Socket(datagram::GuestEnd),
    /// An exchange of a published UDP port.
    Exchange(datagram::Key),
}

/// Parts of the directory, each with a lock of its own.
const SHARDS: usize = 16;

/// A count on a cache line of its own: every worker reads it with each frame.
#[derive(Debug, Default)]
#[repr(align(64))]
struct GuestStarts(AtomicU64);

/// Who has what, for all workers of the process.
#[derive(Debug, Default)]
pub struct Directory {
    guest_starts: GuestStarts,
    shards: [Mutex<HashMap<Place, WorkerId>>; SHARDS],
    hasher: RandomState,
}

impl Directory {
    fn with<R>(&self, place: &Place, act: impl FnOnce(&mut HashMap<Place, WorkerId>) -> R) -> R {
        let shard = &self.shards[self.hasher.hash_one(place) as usize % SHARDS];
        // A panic while a map is changed ends the process (panic = abort); elsewhere the map is whole.
        act(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How often the guest began anew.
    pub fn guest_starts(&self) -> u64 {
        self.guest_starts.0.load(Ordering::Acquire)
    }

    /// The guest begins anew.
    pub fn guest_started(&self) {
        self.guest_starts.0.fetch_add(1, Ordering::Release);
    }

    /// Who has `place`.
    pub fn owner(&self, place: &Place) -> Option<WorkerId> {
        self.with(place, |map| map.get(place).copied())
    }

    /// From now on `worker` has `place`.
    pub fn set(&self, place: Place, worker: WorkerId) {
        self.with(&place, |map| map.insert(place, worker));
    }

    /// Nobody has `place`, if `worker` had it.
    pub fn clear(&self, place: &Place, worker: WorkerId) {
        self.with(place, |map| {
            if map.get(place) == Some(&worker) {
                map.remove(place);
            }
        });
    }
}

/// A worker's own place among the others.
#[derive(Clone, Debug)]
pub struct Home {
    /// Its number.
    pub own: WorkerId,
    /// How many there are.
    pub workers: u8,
    /// Who has what.
    pub directory: Arc<Directory>,
}

impl Home {
    /// The other worker that has `place`, if one has.
    pub fn elsewhere(&self, place: &Place) -> Option<WorkerId> {
        self.directory.owner(place).filter(|owner| *owner != self.own)
    }

    /// The queue pair of this worker that frames without one of their own go to.
    pub fn first_pair(&self) -> QueuePair {
        QueuePair(self.own.0)
    }
}

/// A frame of the guest in host memory.
#[derive(Clone, Debug)]
pub struct HeldFrame {
    vnet: VnetHeader,
    bytes: Box<[u8]>,
    pair: QueuePair,
}

impl HeldFrame {
    /// A copy of `frame`.
    pub fn copy_of(frame: &TxFrame<'_>) -> HeldFrame {
        let mut bytes = vec![0; frame.whole.len()].into_boxed_slice();
        frame.whole.copy_to(&mut bytes);
        // What was judged stays what is judged: the copy made first wins over guest memory.
        bytes[..frame.head.len()].copy_from_slice(frame.head);
        HeldFrame { vnet: frame.vnet, bytes, pair: frame.pair }
    }

    /// The frame of an IPv4 packet that came in fragments: what `ip` says of it, and its `payload`.
    pub fn of_packet(ip: &ipv4::Header, from: Neighbour, payload: &Payload<'_>) -> HeldFrame {
        let start = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES;
        let mut bytes = vec![0; start + payload.len()].into_boxed_slice();
        let header = ethernet::Header { dst: MacAddr::GATEWAY, src: from.mac, ethertype: EtherType::IPV4 };
        header.emit(&mut bytes);
        ip.emit(&mut bytes[ethernet::HEADER_BYTES..]);
        payload.copy_to(&mut bytes[start..]);
        HeldFrame { vnet: VnetHeader::default(), bytes, pair: from.pair }
    }

    /// The frame as if it had come on `pair` of this worker.
    pub fn as_frame(&self, pair: Option<QueuePair>) -> TxFrame<'_> {
        TxFrame {
            vnet: self.vnet,
            head: &self.bytes[..self.bytes.len().min(limits::FRAME_HEAD_BYTES)],
            whole: Payload::from_host(&self.bytes),
            pair: pair.unwrap_or(self.pair),
        }
    }
}

/// What workers tell each other. `S` is a stream without its worker, `D` a datagram socket.
#[derive(Debug)]
pub enum Letter<S, D> {
    /// `from` has frames for this flow or socket: give it to it.
    Want {
        /// The flow or socket.
        place: Place,
        /// Who asks.
        from: WorkerId,
    },
    /// The flow asked for.
    Flow(Box<tcp::Moved<S>>),
    /// The datagram socket asked for.
    Socket(Box<datagram::Moved<D>>),
    /// There is no such flow or socket, or it stays.
    Gone(Place),
    /// A frame for a datagram socket of the receiver's.
    Frame(HeldFrame),
    /// A guest address was seen at a MAC address.
    Neighbour(IpAddr, MacAddr),
    /// Published ports lead to this guest address.
    Primary(IpAddr),
    /// The guest gave this address up.
    AddressGone(IpAddr),
    /// The guest started anew.
    GuestReset,
}

/// A letter on its way.
#[derive(Debug)]
pub struct Post<S, D> {
    /// The guest's starts ([`Directory::guest_starts`]) its writer knew of.
    pub guest_starts: u64,
    /// What it says.
    pub letter: Letter<S, D>,
}

/// Frames that wait for their flows or sockets, and who else asked for those.
#[derive(Debug, Default)]
pub struct Waiting {
    places: HashMap<Place, Awaited>,
    frames: usize,
}

/// What waits for one flow or socket.
#[derive(Debug, Default)]
pub struct Awaited {
    /// Frames, in order.
    pub frames: Vec<HeldFrame>,
    /// Workers that asked for it before it came.
    pub wanted_by: Vec<WorkerId>,
}

impl Waiting {
    /// Whether `place` is awaited.
    pub fn awaits(&self, place: &Place) -> bool {
        !self.places.is_empty() && self.places.contains_key(place)
    }

    /// Holds a frame for `place`, which is awaited from then on; `None` if there is no room and the frame is
    /// lost.
    pub fn hold(&mut self, place: Place, frame: HeldFrame) -> Option<()> {
        if self.frames >= limits::AWAITING_FRAMES_MAX {
            return None;
        }
        self.frames += 1;
        self.places.entry(place).or_default().frames.push(frame);
        Some(())
    }

    /// Notes that `worker` wants what is itself awaited; false if it is not.
    pub fn note(&mut self, place: &Place, worker: WorkerId) -> bool {
        match self.places.get_mut(place) {
            Some(awaited) => {
                awaited.wanted_by.push(worker);
                true
            }
            None => false,
        }
    }

    /// What waited for `place`, which came or will not come.
    pub fn take(&mut self, place: &Place) -> Awaited {
        let awaited = self.places.remove(place).unwrap_or_default();
        self.frames -= awaited.frames.len();
        awaited
    }

    /// Lets everything go: the guest began anew.
    pub fn clear(&mut self) {
        self.places.clear();
        self.frames = 0;
    }
}

/// Datagrams that were sent on to the worker that has their socket.
#[derive(Debug, Default)]
pub struct SentOn {
    counts: HashMap<datagram::GuestEnd, usize>,
}

impl SentOn {
    /// Counts one more for `end`; whether they are so many that the socket should come here.
    pub fn count(&mut self, end: datagram::GuestEnd) -> bool {
        if self.counts.len() >= limits::SENT_ON_ENDS_MAX && !self.counts.contains_key(&end) {
            self.counts.clear();
        }
        let count = self.counts.entry(end).or_default();
        *count += 1;
        let is_many = *count > limits::SENT_ON_FRAMES;
        if is_many {
            self.counts.remove(&end);
        }
        is_many
    }

    /// Forgets everything: the guest began anew.
    pub fn clear(&mut self) {
        self.counts.clear();
    }
}
