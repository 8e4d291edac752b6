//! Bytes of guest memory on their way into stream sockets: the segments of one batch's frames, gathered
//! so that each stream's leave with one system call.
//!
//! Read first: `engine::host_net::HostStream::queue`, whose contract keeps the memory in place.

use libc::iovec;

use crate::frame::Payload;
use crate::limits;

/// Streams that gather at once. A batch is of few flows; others send frame by frame.
const RUNS_MAX: usize = 8;

/// One stream's segments.
#[derive(Debug)]
pub struct StreamRun {
    segments: Vec<iovec>,
    len_bytes: usize,
    in_use: bool,
}

impl Default for StreamRun {
    fn default() -> StreamRun {
        // Room from the start: how long a run gets depends on when its frames come.
        StreamRun { segments: Vec::with_capacity(limits::FRAME_SEGMENTS_MAX), len_bytes: 0, in_use: false }
    }
}

impl StreamRun {
    /// Appends `payload`, which lies in guest memory, if there is room for it.
    pub fn push(&mut self, payload: &Payload<'_>) -> bool {
        assert!(payload.is_in_guest(), "host memory is not kept in place until the batch's end");
        if self.len_bytes + payload.len() > limits::STREAM_RUN_BYTES_MAX {
            return false;
        }
        let before = self.segments.len();
        payload.push_iovecs(&mut self.segments);
        if self.segments.len() > limits::FRAME_SEGMENTS_MAX {
            self.segments.truncate(before);
            return false;
        }
        self.len_bytes += payload.len();
        true
    }

    /// Bytes gathered.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// The segments, for a vectored system call.
    pub fn segments(&mut self) -> &mut [iovec] {
        &mut self.segments
    }

    /// Hands what follows the first `sent_bytes` to `rest`, and empties the run.
    pub fn hand_rest(&mut self, sent_bytes: usize, rest: &mut dyn FnMut(&Payload<'_>)) {
        if sent_bytes < self.len_bytes {
            // SAFETY: the segments lie in guest memory (`push`) and are of frames of the batch under way (the contract of
            // `HostStream::queue`, kept by the engine's `end_of_frames`); the device publishes them, and
            // takes memory away, only after its end.
            let payload = unsafe { Payload::from_guest(&self.segments) };
            rest(&payload.range(sent_bytes, self.len_bytes));
        }
        self.segments.clear();
        self.len_bytes = 0;
    }
}

/// The runs of one worker.
#[derive(Debug, Default)]
pub struct StreamRuns {
    runs: [StreamRun; RUNS_MAX],
}

impl StreamRuns {
    /// Takes an empty run; `None` if all are in use.
    pub fn take(&mut self) -> Option<usize> {
        let at = self.runs.iter().position(|run| !run.in_use)?;
        self.runs[at].in_use = true;
        Some(at)
    }

    /// The run taken as `at`.
    pub fn run(&mut self, at: usize) -> &mut StreamRun {
        &mut self.runs[at]
    }

    /// Gives a run back, whatever is in it.
    pub fn give_back(&mut self, at: usize) {
        let run = &mut self.runs[at];
        run.segments.clear();
        run.len_bytes = 0;
        run.in_use = false;
    }
}
