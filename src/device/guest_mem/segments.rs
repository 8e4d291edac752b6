//! A list of guest memory segments, held mapped: what a descriptor chain names.
//!
//! The list owns a reference to the memory its segments lie in, which is what makes the views it
//! hands out safe.
//!
//! May touch: guest memory, through the views. Read first: `frame::segments`.

use std::sync::Arc;

use libc::iovec;

use super::{GuestMemory, TranslateError};
use crate::frame::{Payload, PayloadMut};

/// Segments of guest memory in the order of a chain.
#[derive(Debug)]
pub struct Segments {
    memory: Arc<GuestMemory>,
    list: Vec<iovec>,
    len_bytes: usize,
}

// SAFETY: the pointers in `list` are into `memory`, which the list keeps mapped; they are only
// dereferenced through `Payload` views, which copy.
unsafe impl Send for Segments {}

/// A point in a list to go back to.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    count: usize,
    len_bytes: usize,
}

impl Segments {
    /// An empty list over `memory`, with room for a full frame.
    pub fn new(memory: Arc<GuestMemory>) -> Segments {
        Segments { memory, list: Vec::with_capacity(crate::limits::FRAME_SEGMENTS_MAX + 1), len_bytes: 0 }
    }

    /// Empties the list and moves it to other memory.
    pub fn set_memory(&mut self, memory: Arc<GuestMemory>) {
        self.clear();
        self.memory = memory;
    }

    /// The memory the segments lie in.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Removes all segments.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len_bytes = 0;
    }

    /// Where the list ends now.
    pub fn mark(&self) -> Mark {
        Mark { count: self.list.len(), len_bytes: self.len_bytes }
    }

    /// Removes what was added since `mark` was taken.
    pub fn truncate(&mut self, mark: Mark) {
        self.list.truncate(mark.count);
        self.len_bytes = mark.len_bytes;
    }

    /// Appends `len_bytes` bytes from `guest_addr` on; one segment for each region they lie in.
    ///
    /// # Errors
    /// [`TranslateError`]; the list is unchanged then.
    pub fn push(&mut self, guest_addr: u64, len_bytes: u32) -> Result<(), TranslateError> {
        let mark = self.mark();
        let result = self.memory.translate(guest_addr, u64::from(len_bytes), &mut self.list);
        if result.is_err() {
            self.truncate(mark);
        } else {
            self.len_bytes += len_bytes as usize;
        }
        result
    }

    /// Bytes of all segments.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Segments in the list.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// The segments, to read.
    pub fn payload(&self) -> Payload<'_> {
        // SAFETY: every segment came from `memory.translate`, and `self.memory` keeps the regions
        // mapped, readable and writable while `self` is borrowed.
        unsafe { Payload::from_guest(&self.list) }
    }

    /// The segments, to write.
    pub fn payload_mut(&mut self) -> PayloadMut<'_> {
        // SAFETY: as in `payload`.
        unsafe { PayloadMut::from_guest(&self.list) }
    }
}
