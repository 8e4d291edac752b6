//! Captures: what crosses the guest's network device, as pcapng (draft-ietf-opsawg-pcapng).
//!
//! A worker's [`Recorder`] copies each frame into a ring of bytes (`record`), a thread of its own makes blocks of them
//! (`pcapng`, `writer`) and writes those to a file, a FIFO or a client of the control API (`sink`). The ring is the
//! only thing they share: a writer that is slow, or a disk that is full, loses frames from the capture and nothing
//! else. Captured is each frame as it crosses: with the guest's partial checksum and up to 64 KiB long, as the
//! driver and the device handed it over.
//!
//! A frame of the guest is recorded before it is judged, so that it stands before its answer, and what became of
//! it is noted in its record afterwards: records are shown to the writer at the end of a batch.
//!
//! May touch: `frame` and `wire` to read, `limits`. Docs for users: `docs/capture.md`.

pub mod filter;
mod pcapng;
mod record;
mod sink;
mod writer;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, SystemTime};

use rtrb::{Consumer, Producer, RingBuffer};

use crate::engine::counters::DropReason;
use crate::limits::{CAPTURE_RING_BYTES_MAX, CAPTURE_RINGS_BYTES, FRAME_BYTES_MAX};

pub use self::filter::Filter;
pub use self::record::Recorder;
pub use self::sink::{OpenError, Opened, Sink, open};
pub use self::writer::{Ended, Writer};

/// What is captured, and how much of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Bytes of each frame that are kept, at most.
    pub snaplen: usize,
    /// Bytes after which it ends.
    pub bytes_max: Option<u64>,
    /// Time after which it ends.
    pub duration: Option<Duration>,
    /// Frames that are wanted.
    pub filter: Filter,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { snaplen: FRAME_BYTES_MAX, bytes_max: None, duration: None, filter: Filter::default() }
    }
}

/// Least bytes of a frame worth keeping: an Ethernet header.
pub const SNAPLEN_MIN: usize = 14;
/// Least bytes of a capture: its head, its end, and a frame.
pub const BYTES_MIN: u64 = 4096;

/// Why a chain of a transmit ring held no frame that could be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Shorter than an Ethernet header, or longer than a frame may be.
    Length,
    /// Its virtio-net header contradicts itself or the frame.
    Header,
    /// It asks for an offload that was not negotiated.
    NotNegotiated,
}

impl Unfit {
    /// Its name in the metrics (`vunet_virtqueue_errors_total`).
    pub const fn name(self) -> &'static str {
        match self {
            Unfit::Length => "bad_length",
            Unfit::Header => "bad_header",
            Unfit::NotNegotiated => "not_negotiated",
        }
    }
}

/// Why a frame of the guest went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was dropped.
    Dropped(DropReason),
    /// The device could make nothing of it.
    Unfit(Unfit),
}

impl Why {
    /// Its name, which is the one of the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Why::Dropped(reason) => reason.name(),
            Why::Unfit(unfit) => unfit.name(),
        }
    }
}

/// How a capture is, shared by all who have to do with it.
#[derive(Debug, Default)]
pub struct Progress {
    /// Frames that crossed and were wanted.
    seen: AtomicU64,
    /// Of those, frames that are not in the capture, because its writer was too slow.
    lost: AtomicU64,
    /// Frames written.
    frames: AtomicU64,
    /// Bytes written.
    bytes: AtomicU64,
    /// A FIFO has no reader yet.
    awaits_reader: AtomicBool,
    /// It is to end, whatever is left.
    stop: AtomicBool,
}

/// Totals of a capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Frames that crossed and were wanted.
    pub seen: u64,
    /// Of those, frames that are not in the capture, because its writer was too slow.
    pub lost: u64,
    /// Frames written.
    pub frames: u64,
    /// Bytes written.
    pub bytes: u64,
}

impl Totals {
    /// The sums of both.
    #[must_use]
    pub fn plus(&self, other: &Totals) -> Totals {
        Totals {
            seen: self.seen + other.seen,
            lost: self.lost + other.lost,
            frames: self.frames + other.frames,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Progress {
    /// What there is by now.
    pub fn totals(&self) -> Totals {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            seen: of(&self.seen),
            lost: of(&self.lost),
            frames: of(&self.frames),
            bytes: of(&self.bytes),
        }
    }

    /// Whether it waits for the reader of a FIFO.
    pub fn awaits_reader(&self) -> bool {
        self.awaits_reader.load(Ordering::Relaxed)
    }

    /// Has the writer end, what is in the rings written if that takes no longer than [`crate::limits::CAPTURE_END`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Wall-clock time at which something happened, from a clock that never goes back.
#[derive(Clone, Copy, Debug)]
struct WallClock {
    began: std::time::Instant,
    /// Nanoseconds since 1970 at that time.
    began_ns: u64,
}

impl WallClock {
    fn start() -> WallClock {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let began_ns = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX);
        WallClock { began: std::time::Instant::now(), began_ns }
    }

    /// Nanoseconds since 1970.
    fn now_ns(&self) -> u64 {
        let passed = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.began_ns.saturating_add(passed)
    }
}

/// The rings of a capture's workers, before it is known who writes.
#[derive(Debug)]
pub struct Rings {
    producers: Vec<Producer<u8>>,
    consumers: Vec<Consumer<u8>>,
    clock: WallClock,
    progress: Arc<Progress>,
}

impl Rings {
    /// Rings for so many workers, whose memory is taken as it is used.
    pub fn new(workers: usize) -> Rings {
        let bytes = (CAPTURE_RINGS_BYTES / workers.max(1)).min(CAPTURE_RING_BYTES_MAX);
        let (producers, consumers) = (0..workers).map(|_| RingBuffer::new(bytes)).unzip();
        Rings { producers, consumers, clock: WallClock::start(), progress: Arc::default() }
    }

    /// How the capture is.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Starts the writer's thread, which hands its end to `ended`; a recorder for each worker.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        self,
        settings: &Settings,
        guest: &str,
        sink: Sink,
        ended: impl FnOnce(Ended) + Send + 'static,
    ) -> io::Result<(Vec<Recorder>, Thread)> {
        let Rings { producers, consumers, clock, progress } = self;
        let writer = Writer::new(consumers, sink, settings, guest, clock, Arc::clone(&progress));
        let thread = std::thread::Builder::new().name("capture".to_owned()).spawn(|| ended(writer.run()))?;
        let thread = thread.thread().clone();
        let recorder = |ring| Recorder::new(ring, settings, clock, Arc::clone(&progress), thread.clone());
        Ok((producers.into_iter().map(recorder).collect(), thread))
    }
}
