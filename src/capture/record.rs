//! A worker's end of a capture: frames are copied here, and shown to the writer at the end of a batch.
//!
//! A record is a header of 24 bytes and the frame's bytes. The records of a batch lie in host memory of the
//! recorder's own until they are pushed into the ring, whole ones only: until then what became of a frame can be
//! noted in its record, and a frame that stays in the guest's ring taken back.
//!
//! Guest memory changes while it is copied; then the capture shows a mixture, of the length that was judged.
//!
//! May touch: `frame` to read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Thread;

use rtrb::Producer;

use super::{Filter, Progress, Settings, Unfit, WallClock, Why};
use crate::engine::counters::DropReason;
use crate::frame::{Payload, QueuePair, TxFrame};
use crate::limits::{CAPTURE_STAGED_BYTES, CAPTURE_STAGED_BYTES_MAX, CAPTURE_WAKE_BYTES};
use crate::wire::vnet::{Checksum, GsoKind, VnetHeader};

/// Bytes of a record's header.
pub(super) const HEADER_BYTES: usize = 24;

/// Which way a frame went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    FromGuest,
    ToGuest,
}

/// What is known of a frame besides its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes that follow.
    pub(super) captured_bytes: u32,
    /// Bytes the frame had.
    pub(super) original_bytes: u32,
    /// Nanoseconds since 1970.
    pub(super) time_ns: u64,
    /// Frames lost since the record before it.
    pub(super) lost: u32,
    pub(super) direction: Direction,
    /// The transport checksum is still to be computed.
    pub(super) is_partial: bool,
    /// It was verified before.
    pub(super) is_verified: bool,
    /// TCP that is still to be cut.
    pub(super) is_segmented: bool,
    /// The queue pair.
    pub(super) pair: u8,
    /// Why it went nowhere; none if it went on.
    pub(super) why: Option<Why>,
}

const TO_GUEST: u8 = 1;
const PARTIAL: u8 = 2;
const VERIFIED: u8 = 4;
const SEGMENTED: u8 = 8;

/// Where parts of a record stand that change once they were written.
const LOST_AT: usize = 16;
const WHY_AT: usize = 22;

/// In the place of a reason: none, and the first of the device's own; drop reasons are counted from 1.
const PASSED: u8 = 0;
const UNFIT: u8 = 0x80;
const UNFITS: [Unfit; 3] = [Unfit::Length, Unfit::Header, Unfit::NotNegotiated];

fn code_of(why: Option<Why>) -> u8 {
    match why {
        None => PASSED,
        Some(Why::Dropped(reason)) => 1 + reason as u8,
        Some(Why::Unfit(unfit)) => UNFIT | unfit as u8,
    }
}

fn why_of(code: u8) -> Option<Why> {
    match code {
        PASSED => None,
        code if code & UNFIT != 0 => UNFITS.get(usize::from(code & !UNFIT)).copied().map(Why::Unfit),
        code => DropReason::ALL.get(usize::from(code) - 1).copied().map(Why::Dropped),
    }
}

impl Header {
    fn emit(&self, out: &mut [u8]) {
        let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
        let flags = flag(self.direction == Direction::ToGuest, TO_GUEST)
            | flag(self.is_partial, PARTIAL)
            | flag(self.is_verified, VERIFIED)
            | flag(self.is_segmented, SEGMENTED);
        out[..4].copy_from_slice(&self.captured_bytes.to_le_bytes());
        out[4..8].copy_from_slice(&self.original_bytes.to_le_bytes());
        out[8..16].copy_from_slice(&self.time_ns.to_le_bytes());
        out[LOST_AT..20].copy_from_slice(&self.lost.to_le_bytes());
        out[20] = flags;
        out[21] = self.pair;
        out[WHY_AT] = code_of(self.why);
        out[23] = 0;
    }

    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let le32 = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let flags = bytes[20];
        Header {
            captured_bytes: le32(0),
            original_bytes: le32(4),
            time_ns: u64::from(le32(8)) | u64::from(le32(12)) << 32,
            lost: le32(LOST_AT),
            direction: if flags & TO_GUEST == 0 { Direction::FromGuest } else { Direction::ToGuest },
            is_partial: flags & PARTIAL != 0,
            is_verified: flags & VERIFIED != 0,
            is_segmented: flags & SEGMENTED != 0,
            pair: bytes[21],
            why: why_of(bytes[WHY_AT]),
        }
    }

    fn of(vnet: &VnetHeader, pair: QueuePair, direction: Direction) -> Header {
        Header {
            captured_bytes: 0,
            original_bytes: 0,
            time_ns: 0,
            lost: 0,
            direction,
            is_partial: matches!(vnet.checksum, Checksum::Partial { .. }),
            is_verified: vnet.checksum == Checksum::Valid,
            is_segmented: matches!(vnet.gso, Some(gso) if matches!(gso.kind, GsoKind::Tcp4 | GsoKind::Tcp6)),
            pair: pair.0,
            why: None,
        }
    }

    /// Bytes of the whole record.
    pub(super) fn record_bytes(&self) -> usize {
        HEADER_BYTES + self.captured_bytes as usize
    }
}

/// A worker's end of a capture.
#[derive(Debug)]
pub struct Recorder {
    ring: Producer<u8>,
    /// Records of this batch, one behind the other.
    staged: Box<[u8]>,
    used: usize,
    /// The frame of the guest that is being judged: where its record begins, if it has one.
    open: Option<usize>,
    snaplen: usize,
    filter: Filter,
    clock: WallClock,
    /// Frames lost since the last record.
    lost: u32,
    /// The same, of this batch, and wanted frames of this batch.
    batch_lost: u64,
    batch_seen: u64,
    /// Bytes pushed since the writer was woken.
    unheard_bytes: usize,
    /// Nobody writes any more: nothing need be recorded.
    is_over: bool,
    progress: Arc<Progress>,
    writer: Thread,
}

impl Recorder {
    pub(super) fn new(
        ring: Producer<u8>,
        settings: &Settings,
        clock: WallClock,
        progress: Arc<Progress>,
        writer: Thread,
    ) -> Recorder {
        Recorder {
            ring,
            staged: vec![0; CAPTURE_STAGED_BYTES_MAX].into(),
            used: 0,
            open: None,
            snaplen: settings.snaplen,
            filter: settings.filter,
            clock,
            lost: 0,
            batch_lost: 0,
            batch_seen: 0,
            unheard_bytes: 0,
            is_over: false,
            progress,
            writer,
        }
    }

    /// Records a frame for the guest as it was placed in its receive buffers: its first bytes, and what follows them.
    pub fn to_guest(&mut self, pair: QueuePair, vnet: &VnetHeader, head: &[u8], rest: &Payload<'_>) {
        self.record(Header::of(vnet, pair, Direction::ToGuest), head, rest);
    }

    /// Records a frame of the guest that is about to be judged; [`Recorder::judged`] is to follow.
    pub fn from_guest(&mut self, frame: &TxFrame<'_>) {
        let header = Header::of(&frame.vnet, frame.pair, Direction::FromGuest);
        let rest = frame.whole.range(frame.head.len(), frame.whole.len());
        self.open = self.record(header, frame.head, &rest);
    }

    /// Notes what became of the frame recorded last by [`Recorder::from_guest`]: why it was dropped, if it was.
    pub fn judged(&mut self, why: Option<DropReason>) {
        if let Some(at) = self.open.take() {
            self.staged[at + WHY_AT] = code_of(why.map(Why::Dropped));
        }
        if self.used >= CAPTURE_STAGED_BYTES {
            self.push();
        }
    }

    /// Forgets the frame recorded last by [`Recorder::from_guest`]: it stays in the guest's ring.
    pub fn not_taken(&mut self) {
        let Some(at) = self.open.take() else { return };
        let record = Header::parse(self.staged[at..].first_chunk().expect("a record has a header"));
        let end = at + record.record_bytes();
        // What was answered meanwhile moves up.
        self.staged.copy_within(end..self.used, at);
        self.used -= end - at;
        self.lost = self.lost.saturating_add(record.lost);
        self.batch_seen -= 1;
    }

    /// Records what a chain of the guest's held that is no frame to be judged.
    pub fn unfit(&mut self, pair: QueuePair, whole: &Payload<'_>, unfit: Unfit) {
        let header = Header::of(&VnetHeader::default(), pair, Direction::FromGuest);
        let mut head = [0; super::SNAPLEN_MIN];
        let head_bytes = whole.copy_to(&mut head);
        let rest = whole.range(head_bytes, whole.len());
        self.record(Header { why: Some(Why::Unfit(unfit)), ..header }, &head[..head_bytes], &rest);
    }

    /// Records a frame; where, if there is room for it and it is wanted.
    fn record(&mut self, header: Header, head: &[u8], rest: &Payload<'_>) -> Option<usize> {
        if self.is_over || !self.filter.wants(head) {
            return None;
        }
        self.batch_seen += 1;
        let original_bytes = head.len() + rest.len();
        let captured_bytes = original_bytes.min(self.snaplen);
        let at = self.used;
        if !self.has_room(HEADER_BYTES + captured_bytes) {
            self.lost = self.lost.saturating_add(1);
            self.batch_lost += 1;
            return None;
        }
        let header = Header {
            captured_bytes: u32::try_from(captured_bytes).expect("a frame's bytes are at most its bound"),
            original_bytes: u32::try_from(original_bytes).unwrap_or(u32::MAX),
            time_ns: self.clock.now_ns(),
            lost: std::mem::take(&mut self.lost),
            ..header
        };
        let bytes = &mut self.staged[at + HEADER_BYTES..at + HEADER_BYTES + captured_bytes];
        let from_head = head.len().min(captured_bytes);
        bytes[..from_head].copy_from_slice(&head[..from_head]);
        // As many bytes as were counted, whatever the guest does meanwhile.
        rest.copy_to(&mut bytes[from_head..]);
        header.emit(&mut self.staged[at..at + HEADER_BYTES]);
        self.used = at + header.record_bytes();
        Some(at)
    }

    /// Whether a record of so many bytes has room, here and in the ring once it is pushed.
    fn has_room(&mut self, bytes: usize) -> bool {
        if self.used + bytes > self.staged.len() && self.open.is_none() {
            self.push();
        }
        let needed = self.used + bytes;
        needed <= self.staged.len() && (needed <= self.ring.cached_slots() || needed <= self.ring.slots())
    }

    /// The end of a batch: shows the writer its records.
    pub fn publish(&mut self) {
        if self.batch_seen == 0 {
            return;
        }
        self.push();
        self.is_over = self.ring.is_abandoned();
        self.progress.seen.fetch_add(std::mem::take(&mut self.batch_seen), Ordering::Relaxed);
        if self.batch_lost > 0 {
            self.progress.lost.fetch_add(std::mem::take(&mut self.batch_lost), Ordering::Relaxed);
        }
    }

    /// Pushes what is staged. There is room for it: it was looked for with each record.
    fn push(&mut self) {
        let staged = &self.staged[..std::mem::take(&mut self.used)];
        self.ring.push_entire_slice(staged).expect("room only grows between a record and its push");
        self.unheard_bytes += staged.len();
        // It looks by itself, but not as often as a ring can fill up.
        if self.unheard_bytes >= CAPTURE_WAKE_BYTES {
            self.unheard_bytes = 0;
            self.writer.unpark();
        }
    }
}
