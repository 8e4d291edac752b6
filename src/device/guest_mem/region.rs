//! One region of guest memory: a file of the front-end's, mapped.
//!
//! A region is checked against its file before it is mapped, so that no access can lie beyond the
//! end; what the front-end does to the file later is [`super::sigbus`]'s matter. The mapping starts
//! and ends on the file's block boundaries (huge pages), whatever the region's own offset.
//!
//! May touch: `mmap`. Read first: the vhost-user specification, "Memory region description".

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use thiserror::Error;
use vm_memory::{FileOffset, MmapRegion};

use super::sigbus::Watch;

/// Where a region lies, as the front-end described it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address of the first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size_bytes: u64,
    /// Address of the first byte in the front-end's own address space.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub file_offset_bytes: u64,
}

/// Why a region, or a memory table, was refused.
#[derive(Debug, Error)]
pub enum RegionError {
    /// Zero bytes long.
    #[error("the region is empty")]
    Empty,
    /// An address plus the length passes the end of the 64-bit space.
    #[error("the region wraps around the address space")]
    Wraps,
    /// The descriptor is no regular file (a memfd is one).
    #[error("the region's descriptor is not a regular file")]
    NotAFile,
    /// The region reaches past the end of its file: touching it would raise SIGBUS.
    #[error("the region ends at byte {end_bytes} of a file of {file_bytes} bytes")]
    BeyondFile {
        /// Where the region ends in the file.
        end_bytes: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// Two regions share guest addresses.
    #[error("the region at {0:#x} overlaps the one at {1:#x}")]
    Overlap(u64, u64),
    /// More regions than there are slots.
    #[error("more than {0} memory regions")]
    TooMany(usize),
    /// No such region to remove.
    #[error("no region of {size_bytes} bytes at {guest_addr:#x}")]
    Unknown {
        /// Guest physical address asked for.
        guest_addr: u64,
        /// Length asked for.
        size_bytes: u64,
    },
    /// The file's state could not be read.
    #[error("cannot stat the region's file")]
    Stat(#[source] io::Error),
    /// The kernel refused the mapping.
    #[error("cannot map the region")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
}

/// A mapped region.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) spec: RegionSpec,
    file_id: (u64, u64),
    /// Ends before the mapping does: fields drop in this order.
    watch: Watch,
    mapping: MmapRegion,
    /// Bytes between the start of the mapping and the region's first byte.
    lead_bytes: usize,
}

impl Region {
    /// Maps `spec` of `file`.
    pub(super) fn map(spec: RegionSpec, file: File) -> Result<Region, RegionError> {
        let end_bytes = checked_end(&spec)?;
        let meta = file.metadata().map_err(RegionError::Stat)?;
        if !meta.is_file() {
            return Err(RegionError::NotAFile);
        }
        if end_bytes > meta.len() {
            return Err(RegionError::BeyondFile { end_bytes, file_bytes: meta.len() });
        }
        let block = block_bytes(meta.blksize());
        let start = spec.file_offset_bytes & !(block - 1);
        let end = end_bytes.checked_next_multiple_of(block).ok_or(RegionError::Wraps)?;
        let len = usize::try_from(end - start).map_err(|_| RegionError::Wraps)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, start), len).map_err(RegionError::Map)?;
        let block = usize::try_from(block).map_err(|_| RegionError::Wraps)?;
        let watch = Watch::new(mapping.as_ptr() as usize, len, block)
            .ok_or(RegionError::TooMany(crate::limits::WATCHED_MAPPINGS_MAX))?;
        let lead_bytes = usize::try_from(spec.file_offset_bytes - start).map_err(|_| RegionError::Wraps)?;
        Ok(Region { spec, file_id: (meta.dev(), meta.ino()), watch, mapping, lead_bytes })
    }

    /// Whether this is already the mapping of `spec` of `file`.
    pub(super) fn is_same(&self, spec: &RegionSpec, file: &File) -> bool {
        self.spec == *spec && file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == self.file_id)
    }

    /// Whether a page was lost because the file shrank.
    pub(super) fn is_lost(&self) -> bool {
        self.watch.is_lost()
    }

    /// Length in bytes; it fits, or the mapping would not exist.
    pub(super) fn len(&self) -> usize {
        self.mapping.size().min(self.spec.size_bytes as usize)
    }

    /// The host's address of the region's byte `offset_bytes`, which must lie within it.
    pub(super) fn pointer(&self, offset_bytes: u64) -> *mut u8 {
        debug_assert!(offset_bytes <= self.spec.size_bytes);
        self.mapping.as_ptr().wrapping_add(self.lead_bytes + offset_bytes as usize)
    }

    /// Offset of `guest_addr` and the bytes from there to the region's end; `None` if outside.
    pub(super) fn locate_guest(&self, guest_addr: u64) -> Option<(u64, u64)> {
        locate(self.spec.guest_addr, self.spec.size_bytes, guest_addr)
    }

    /// The same for an address of the front-end's own.
    pub(super) fn locate_user(&self, user_addr: u64) -> Option<(u64, u64)> {
        locate(self.spec.user_addr, self.spec.size_bytes, user_addr)
    }
}

fn locate(base: u64, size: u64, addr: u64) -> Option<(u64, u64)> {
    let offset = addr.checked_sub(base)?;
    (offset < size).then(|| (offset, size - offset))
}

/// Where the region ends in its file, after every sum over it was checked.
fn checked_end(spec: &RegionSpec) -> Result<u64, RegionError> {
    if spec.size_bytes == 0 {
        return Err(RegionError::Empty);
    }
    let fits = |base: u64| base.checked_add(spec.size_bytes).ok_or(RegionError::Wraps);
    fits(spec.guest_addr)?;
    fits(spec.user_addr)?;
    fits(spec.file_offset_bytes)
}

/// The unit in which the file can be mapped: its huge page size on hugetlbfs, else a page.
fn block_bytes(reported: u64) -> u64 {
    const GIB: u64 = 1 << 30;
    // SAFETY: asking for the page size has no preconditions.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = u64::try_from(page).unwrap_or(4096);
    if reported.is_power_of_two() && reported <= GIB { reported.max(page) } else { page }
}
