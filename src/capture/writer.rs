//! A capture's writer: a thread that makes blocks of records and writes them.
//!
//! It looks at the workers' rings each [`CAPTURE_LOOK`], or when a worker wakes it because its ring fills up. Of
//! several workers' records that wait at the same time the older ones are written first; what a worker shows later
//! than another is not sorted in.
//!
//! May touch: the rings, the sink.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rtrb::Consumer;
use rtrb::chunks::ReadChunk;
use rustix::process::{Resource, getrlimit};

use super::record::{HEADER_BYTES, Header};
use super::sink::{Sink, SinkError};
use super::{Progress, Settings, Totals, WallClock, pcapng};
use crate::limits::{CAPTURE_END, CAPTURE_FLUSH, CAPTURE_LOOK, CAPTURE_WRITE_BYTES};

/// Bytes of a ring that are looked at at once.
const TURN_BYTES: usize = 1 << 20;

/// How a capture ended.
#[derive(Debug)]
pub enum Ended {
    /// All recorders are gone, and all they recorded is written.
    Drained,
    /// It has as many bytes as it may have.
    Full,
    /// Nobody reads any more.
    Left,
    /// It cannot be written.
    Failed(io::Error),
    /// It was to end, and whoever reads did not take the rest.
    GaveUp,
}

/// What one look at the rings came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Nothing,
    Some,
    /// There is no room for more in the capture.
    Full,
}

/// It.
#[derive(Debug)]
pub struct Writer {
    rings: Vec<Consumer<u8>>,
    sink: Sink,
    /// Blocks not written yet, and how many of them are frames.
    out: Vec<u8>,
    out_frames: u64,
    bytes_max: u64,
    clock: WallClock,
    began_ns: u64,
    progress: Arc<Progress>,
    written_at: Instant,
    /// When it was first seen that it is to end.
    stopped_at: Option<Instant>,
}

impl Writer {
    pub(super) fn new(
        rings: Vec<Consumer<u8>>,
        sink: Sink,
        settings: &Settings,
        guest: &str,
        clock: WallClock,
        progress: Arc<Progress>,
    ) -> Writer {
        let mut out = Vec::with_capacity(2 * CAPTURE_WRITE_BYTES);
        let system = rustix::system::uname();
        let os = format!("{} {}", system.sysname().to_string_lossy(), system.release().to_string_lossy());
        pcapng::head(&mut out, guest, settings.snaplen, &os);
        let bytes_max = settings.bytes_max.unwrap_or(u64::MAX);
        progress.awaits_reader.store(matches!(sink, Sink::Waiting(_)), Ordering::Relaxed);
        // Past the process's own limit the kernel would end the process.
        let of_process = match &sink {
            Sink::File(..) => getrlimit(Resource::Fsize).current,
            _ => None,
        };
        Writer {
            rings,
            sink,
            out,
            out_frames: 0,
            bytes_max: bytes_max.min(of_process.unwrap_or(u64::MAX)),
            clock,
            began_ns: clock.now_ns(),
            progress,
            written_at: Instant::now(),
            stopped_at: None,
        }
    }

    /// Writes until the capture ends.
    pub(super) fn run(mut self) -> Ended {
        let ended = match self.serve() {
            Ok(ended) => ended,
            Err(error) => return of(error),
        };
        let Totals { seen, lost, frames, .. } = self.progress.totals();
        let totals = Totals { seen, lost, frames: frames + self.out_frames, bytes: 0 };
        pcapng::statistics(&mut self.out, (self.began_ns, self.clock.now_ns()), &totals);
        match self.flush() {
            Ok(()) => ended,
            Err(error) => of(error),
        }
    }

    fn serve(&mut self) -> Result<Ended, SinkError> {
        loop {
            // Asked before the look: what was pushed before the last recorder went is seen by it.
            let is_last = self.rings.iter().all(Consumer::is_abandoned) || self.gives_up();
            let is_ready = self.sink.is_ready()?;
            self.progress.awaits_reader.store(!is_ready, Ordering::Relaxed);
            if !is_ready && self.progress.is_stopped() {
                return Err(SinkError::GaveUp);
            }
            let moved = if self.out.len() < CAPTURE_WRITE_BYTES { self.look() } else { Moved::Nothing };
            if moved == Moved::Full {
                return Ok(Ended::Full);
            }
            let is_due = self.out.len() >= CAPTURE_WRITE_BYTES || self.written_at.elapsed() >= CAPTURE_FLUSH;
            if is_ready && (is_due || is_last) {
                self.flush()?;
            }
            if self.sink.is_left() {
                return Err(SinkError::Left);
            }
            match moved {
                Moved::Nothing if is_last && is_ready => return Ok(Ended::Drained),
                Moved::Nothing => std::thread::park_timeout(CAPTURE_LOOK),
                Moved::Some | Moved::Full => {}
            }
        }
    }

    /// Whether it is to end and has waited long enough for who reads.
    fn gives_up(&mut self) -> bool {
        if !self.progress.is_stopped() {
            return false;
        }
        self.stopped_at.get_or_insert_with(Instant::now).elapsed() >= CAPTURE_END
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        self.written_at = Instant::now();
        if self.out.is_empty() {
            return Ok(());
        }
        let out = std::mem::take(&mut self.out);
        let mut sink = std::mem::replace(&mut self.sink, Sink::Waiting(std::path::PathBuf::new()));
        let written = sink.write(&out, || self.gives_up());
        (self.sink, self.out) = (sink, out);
        written?;
        self.progress.bytes.fetch_add(self.out.len() as u64, Ordering::Relaxed);
        self.progress.frames.fetch_add(std::mem::take(&mut self.out_frames), Ordering::Relaxed);
        self.out.clear();
        Ok(())
    }

    /// Makes blocks of what waits in the rings, the oldest first, until there are enough to be written.
    fn look(&mut self) -> Moved {
        let Writer { rings, out, out_frames, bytes_max, progress, .. } = self;
        let written = progress.bytes.load(Ordering::Relaxed) + pcapng::STATISTICS_BYTES as u64;
        let mut turns: Vec<Turn<'_>> = rings.iter_mut().filter_map(Turn::begin).collect();
        let mut moved = Moved::Nothing;
        while out.len() < CAPTURE_WRITE_BYTES {
            // One whose rest was not looked at may have older ones than the others.
            if turns.iter().any(|turn| turn.next.is_none() && turn.is_cut) {
                break;
            }
            let oldest = turns.iter_mut().filter(|turn| turn.next.is_some()).min_by_key(|turn| turn.time());
            let Some(turn) = oldest else { break };
            let Some(header) = turn.next else { break };
            if written + (out.len() + pcapng::packet_bytes(&header)) as u64 > *bytes_max {
                moved = Moved::Full;
                break;
            }
            pcapng::packet(out, &header, turn.frame(&header));
            turn.go_on(&header);
            *out_frames += 1;
            moved = Moved::Some;
        }
        for turn in turns {
            turn.end();
        }
        moved
    }
}

fn of(error: SinkError) -> Ended {
    match error {
        SinkError::Left => Ended::Left,
        SinkError::Io(error) => Ended::Failed(error),
        SinkError::GaveUp => Ended::GaveUp,
    }
}

/// One look at one ring.
struct Turn<'a> {
    chunk: ReadChunk<'a, u8>,
    /// Bytes of it that were taken.
    at: usize,
    /// The record there.
    next: Option<Header>,
    /// There is more in the ring.
    is_cut: bool,
}

impl<'a> Turn<'a> {
    fn begin(ring: &'a mut Consumer<u8>) -> Option<Turn<'a>> {
        let waiting = ring.slots();
        let chunk = ring.read_chunk(waiting.min(TURN_BYTES)).ok().filter(|chunk| !chunk.is_empty())?;
        let mut turn = Turn { chunk, at: 0, next: None, is_cut: waiting > TURN_BYTES };
        turn.next = turn.header();
        Some(turn)
    }

    fn time(&self) -> u64 {
        self.next.map_or(u64::MAX, |header| header.time_ns)
    }

    /// So many bytes from `from` on, in the two parts they may lie in.
    fn bytes(&self, from: usize, len: usize) -> Option<(&[u8], &[u8])> {
        let (first, second) = self.chunk.as_slices();
        if from + len > first.len() + second.len() {
            return None;
        }
        let in_first = &first[from.min(first.len())..(from + len).min(first.len())];
        let behind = from.saturating_sub(first.len());
        Some((in_first, &second[behind..behind + len - in_first.len()]))
    }

    /// The header of the record that is next, if all of the record is here.
    fn header(&self) -> Option<Header> {
        let (first, second) = self.bytes(self.at, HEADER_BYTES)?;
        let mut bytes = [0; HEADER_BYTES];
        bytes[..first.len()].copy_from_slice(first);
        bytes[first.len()..].copy_from_slice(second);
        let header = Header::parse(&bytes);
        self.bytes(self.at, header.record_bytes()).map(|_| header)
    }

    fn frame(&self, header: &Header) -> (&[u8], &[u8]) {
        self.bytes(self.at + HEADER_BYTES, header.captured_bytes as usize).expect("all of the record is here")
    }

    fn go_on(&mut self, header: &Header) {
        self.at += header.record_bytes();
        self.next = self.header();
    }

    /// Gives what was taken back to the worker.
    fn end(self) {
        self.chunk.commit(self.at);
    }
}
