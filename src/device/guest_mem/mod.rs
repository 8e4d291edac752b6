//! Guest memory: what the front-end shares, mapped, and the only way the device reaches it.
//!
//! A [`GuestMemory`] is an immutable snapshot: a change of the memory table makes a new one that
//! shares the regions that stayed. Rings ([`Area`]) and chains ([`Segments`]) hold what they point
//! into, so no pointer outlives its mapping. All addresses from outside are translated with checked
//! arithmetic; a range that straddles adjacent regions is split.
//!
//! May touch: `mmap`, the SIGBUS disposition. The one place of the device, with `sys`, that holds
//! unsafe code. Read first: the vhost-user specification, "Memory mapping" and "Memory region
//! description".

mod area;
mod region;
mod segments;
mod sigbus;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use libc::iovec;
use thiserror::Error;

pub use area::Area;
pub use region::{RegionError, RegionSpec};
pub use segments::{Mark, Segments};

use crate::limits::{FRAME_SEGMENTS_MAX, MEMORY_SLOTS_MAX};
use region::Region;

/// Why a guest address range could not be reached.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TranslateError {
    /// Part of it lies in no region, or it wraps around.
    #[error("not in guest memory")]
    Unmapped,
    /// The list would exceed [`FRAME_SEGMENTS_MAX`].
    #[error("too many segments")]
    TooManySegments,
}

/// Why a ring's part has no place in memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AreaError {
    /// No single region holds all of it.
    #[error("{len_bytes} bytes at {user_addr:#x} lie in no region of the front-end's memory")]
    Unmapped {
        /// First byte, in the front-end's address space.
        user_addr: u64,
        /// Bytes asked for.
        len_bytes: usize,
    },
    /// Not a multiple of what the specification asks for, here or in the guest.
    #[error("{user_addr:#x} is not aligned to {align_bytes} bytes")]
    Misaligned {
        /// First byte, in the front-end's address space.
        user_addr: u64,
        /// Alignment asked for.
        align_bytes: usize,
    },
}

/// A snapshot of the guest's memory: regions in order of guest address, none overlapping.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// Memory of exactly the `wanted` regions. Those that this snapshot already maps are kept, so
    /// that a repeated table changes nothing.
    ///
    /// # Errors
    /// [`RegionError`] if any region is refused; none is kept then.
    pub fn replaced(&self, wanted: Vec<(RegionSpec, File)>) -> Result<GuestMemory, RegionError> {
        let mut fresh = GuestMemory::default();
        for (spec, file) in wanted {
            let region = match self.regions.iter().find(|r| r.is_same(&spec, &file)) {
                Some(known) => Arc::clone(known),
                None => Arc::new(Region::map(spec, file)?),
            };
            fresh.insert(region)?;
        }
        Ok(fresh)
    }

    /// This memory and one region more; a region already there changes nothing.
    ///
    /// # Errors
    /// [`RegionError`] if the region is refused.
    pub fn with_added(&self, spec: RegionSpec, file: File) -> Result<GuestMemory, RegionError> {
        let mut fresh = GuestMemory { regions: self.regions.clone() };
        if !self.regions.iter().any(|r| r.is_same(&spec, &file)) {
            fresh.insert(Arc::new(Region::map(spec, file)?))?;
        }
        Ok(fresh)
    }

    /// This memory without the region at `spec`'s addresses (its file offset is not compared).
    ///
    /// # Errors
    /// [`RegionError::Unknown`] if there is none.
    pub fn with_removed(&self, spec: &RegionSpec) -> Result<GuestMemory, RegionError> {
        let is_it = |r: &Arc<Region>| {
            r.spec.guest_addr == spec.guest_addr
                && r.spec.size_bytes == spec.size_bytes
                && r.spec.user_addr == spec.user_addr
        };
        let Some(at) = self.regions.iter().position(is_it) else {
            return Err(RegionError::Unknown { guest_addr: spec.guest_addr, size_bytes: spec.size_bytes });
        };
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(GuestMemory { regions })
    }

    fn insert(&mut self, region: Arc<Region>) -> Result<(), RegionError> {
        if self.regions.len() >= MEMORY_SLOTS_MAX {
            return Err(RegionError::TooMany(MEMORY_SLOTS_MAX));
        }
        let start = region.spec.guest_addr;
        let end = start + region.spec.size_bytes;
        let at = self.regions.partition_point(|r| r.spec.guest_addr < start);
        if let Some(next) = self.regions.get(at)
            && next.spec.guest_addr < end
        {
            return Err(RegionError::Overlap(start, next.spec.guest_addr));
        }
        if let Some(before) = at.checked_sub(1).map(|i| &self.regions[i])
            && before.locate_guest(start).is_some()
        {
            return Err(RegionError::Overlap(start, before.spec.guest_addr));
        }
        self.regions.insert(at, region);
        Ok(())
    }

    /// Regions in the snapshot.
    pub fn region_count(&self) -> usize {
        self.regions.len()
    }

    /// Bytes of all regions.
    pub fn size_bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.spec.size_bytes).sum()
    }

    /// Whether a page was lost because a file shrank under its mapping.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.is_lost())
    }

    /// Appends the host segments of `len_bytes` bytes from `guest_addr` on.
    fn translate(&self, guest_addr: u64, len_bytes: u64, out: &mut Vec<iovec>) -> Result<(), TranslateError> {
        let mut addr = guest_addr;
        let mut left = len_bytes;
        let mut at = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
        at = at.checked_sub(1).ok_or(TranslateError::Unmapped)?;
        while left > 0 {
            let region = self.regions.get(at).ok_or(TranslateError::Unmapped)?;
            let (offset, room) = region.locate_guest(addr).ok_or(TranslateError::Unmapped)?;
            let take = room.min(left);
            if out.len() >= FRAME_SEGMENTS_MAX {
                return Err(TranslateError::TooManySegments);
            }
            out.push(iovec { iov_base: region.pointer(offset).cast(), iov_len: take as usize });
            left -= take;
            addr = addr.wrapping_add(take);
            at += 1;
        }
        Ok(())
    }

    /// Copies the bytes from `guest_addr` on into `out`; `out` is partly filled on error.
    ///
    /// # Errors
    /// [`TranslateError::Unmapped`] if any of them lies outside.
    pub fn read(&self, guest_addr: u64, out: &mut [u8]) -> Result<(), TranslateError> {
        let mut done = 0;
        while done < out.len() {
            let addr = guest_addr.checked_add(done as u64).ok_or(TranslateError::Unmapped)?;
            let at = self.regions.partition_point(|r| r.spec.guest_addr <= addr);
            let region = at.checked_sub(1).map(|i| &self.regions[i]).ok_or(TranslateError::Unmapped)?;
            let (offset, room) = region.locate_guest(addr).ok_or(TranslateError::Unmapped)?;
            let take = usize::try_from(room).unwrap_or(usize::MAX).min(out.len() - done);
            let target = &mut out[done..done + take];
            // SAFETY: `locate_guest` found `take` bytes from `offset` on within the region, which
            // `self` keeps mapped; `target` is exactly as long and host memory apart from it.
            unsafe { std::ptr::copy_nonoverlapping(region.pointer(offset), target.as_mut_ptr(), take) };
            done += take;
        }
        Ok(())
    }

    /// The area of `len_bytes` bytes from the front-end's address `user_addr` on, aligned to
    /// `align_bytes`, a power of two.
    ///
    /// # Errors
    /// [`AreaError`] if no single region holds it all, or it is not aligned.
    pub fn area(&self, user_addr: u64, len_bytes: usize, align_bytes: usize) -> Result<Area, AreaError> {
        let unmapped = AreaError::Unmapped { user_addr, len_bytes };
        let found = self.regions.iter().find_map(|r| Some((r, r.locate_user(user_addr)?)));
        let (region, (offset, room)) = found.ok_or(unmapped)?;
        if room < len_bytes as u64 {
            return Err(unmapped);
        }
        if !region.pointer(offset).addr().is_multiple_of(align_bytes) {
            return Err(AreaError::Misaligned { user_addr, align_bytes });
        }
        Ok(Area::new(region, offset, len_bytes))
    }
}

/// A cheap check, once per batch, whether any guest's memory was lost since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct LossWatch {
    seen: u32,
}

impl LossWatch {
    /// A watch that has seen all losses up to now.
    pub fn new() -> LossWatch {
        LossWatch { seen: sigbus::lost_pages() }
    }

    /// Whether `memory` lost pages; looks closer only after a page of any memory was lost.
    pub fn is_lost(&mut self, memory: &GuestMemory) -> bool {
        let now = sigbus::lost_pages();
        if now == self.seen {
            return false;
        }
        self.seen = now;
        memory.is_lost()
    }
}
