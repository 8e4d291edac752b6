//! An area of guest memory that a ring lies in: loads and stores that the guest sees, and that a
//! guest writing at the same time cannot make undefined.
//!
//! Every access is atomic and bounds-checked against the area; multi-byte values are little-endian
//! (virtio 1.3; a legacy driver's are the guest's own, the same on every host vunet runs on).
//!
//! May touch: the area. Read first: virtio 1.3, 2.7 (split virtqueues).

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::region::Region;

/// A contiguous part of one region, held mapped.
#[derive(Debug)]
pub struct Area {
    base: *mut u8,
    len_bytes: usize,
    /// Keeps `base` mapped.
    _region: Arc<Region>,
}

// SAFETY: the pointer is into `_region`, which the area keeps mapped; every access through it is
// atomic, so it may happen on any thread.
unsafe impl Send for Area {}

impl Area {
    pub(super) fn new(region: &Arc<Region>, offset_bytes: u64, len_bytes: usize) -> Area {
        let end = usize::try_from(offset_bytes).ok().and_then(|o| o.checked_add(len_bytes));
        assert!(end.is_some_and(|end| end <= region.len()), "the caller located the area in the region");
        Area { base: region.pointer(offset_bytes), len_bytes, _region: Arc::clone(region) }
    }

    /// The address of `width` bytes at `at`, checked.
    fn at(&self, at: usize, width: usize) -> *mut u8 {
        let end = at.checked_add(width);
        assert!(end.is_some_and(|end| end <= self.len_bytes), "ring offsets derive from the checked size");
        let pointer = self.base.wrapping_add(at);
        assert!(pointer.addr().is_multiple_of(width), "ring parts are aligned: checked when started");
        pointer
    }

    /// Loads the value at byte `at`, a multiple of 2; later loads stay later.
    pub fn load_u16(&self, at: usize) -> u16 {
        let pointer = self.at(at, 2).cast();
        // SAFETY: `at` checked bounds and alignment; the region stays mapped while `self` lives; all
        // of this process's accesses to ring memory are atomic.
        let cell = unsafe { AtomicU16::from_ptr(pointer) };
        u16::from_le(cell.load(Ordering::Acquire))
    }

    /// Stores the value at byte `at`, a multiple of 2; earlier stores stay earlier.
    pub fn store_u16(&self, at: usize, value: u16) {
        let pointer = self.at(at, 2).cast();
        // SAFETY: as in `load_u16`.
        let cell = unsafe { AtomicU16::from_ptr(pointer) };
        cell.store(value.to_le(), Ordering::Release);
    }

    /// Stores the value at byte `at`, a multiple of 4, in no order.
    pub fn store_u32(&self, at: usize, value: u32) {
        let pointer = self.at(at, 4).cast();
        // SAFETY: as in `load_u16`.
        let cell = unsafe { AtomicU32::from_ptr(pointer) };
        cell.store(value.to_le(), Ordering::Relaxed);
    }

    /// Copies the 16 bytes at byte `at`, a multiple of 8, in no order.
    pub fn load_16_bytes(&self, at: usize) -> [u8; 16] {
        let mut out = [0; 16];
        for (half, bytes) in out.chunks_exact_mut(8).enumerate() {
            let pointer = self.at(at + 8 * half, 8).cast();
            // SAFETY: as in `load_u16`.
            let cell = unsafe { AtomicU64::from_ptr(pointer) };
            bytes.copy_from_slice(&cell.load(Ordering::Relaxed).to_ne_bytes());
        }
        out
    }
}
