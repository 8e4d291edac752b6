//! Guest memory: one memfd mapped as regions whose guest-physical addresses, mapping addresses and
//! file offsets all differ, so that a back-end that mixes them up fails at once.
//!
//! The mapping is shared with another process, so nothing here hands out references to plain
//! memory: ring fields are atomics, payload goes through kernel iovecs or byte copies. Mappings
//! live until the process ends (a front-end has one guest for its whole life), which is what makes
//! the iovecs handed out sound without lifetimes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// Bytes of file left unused before the first region and between regions.
const FILE_GAP_BYTES: u64 = 2 << 20;

/// One region of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    /// Guest-physical address.
    pub(crate) guest_addr: u64,
    /// Length in bytes.
    pub(crate) len_bytes: u64,
    /// Where the region starts in the memfd, in bytes.
    pub(crate) file_offset: u64,
    host: NonNull<u8>,
}

impl Region {
    /// Address of the mapping in this process: vhost-user's "user address".
    pub(crate) fn user_addr(&self) -> u64 {
        self.host.as_ptr() as u64
    }
}

/// An iovec that points into guest memory. Only [`GuestMemory::iov`] makes one.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct GuestIov(libc::iovec);

// SAFETY: points into a shared mapping that is never unmapped, and only the kernel dereferences it.
unsafe impl Send for GuestIov {}

impl GuestIov {
    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The first `len_bytes` of the same memory.
    ///
    /// # Panics
    /// If that is more than there is.
    pub(crate) fn truncated(self, len_bytes: usize) -> GuestIov {
        assert!(len_bytes <= self.0.iov_len, "an iovec can only be cut shorter");
        GuestIov(libc::iovec { iov_base: self.0.iov_base, iov_len: len_bytes })
    }
}

/// The guest's memory.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    file: File,
    regions: Vec<Region>,
}

// SAFETY: the pointers are to shared mappings that are never unmapped, and every access through
// them is an atomic, a bounded byte copy or a kernel call; none assumes exclusive access.
unsafe impl Send for GuestMemory {}
// SAFETY: as for Send: shared access is what the mapping is for.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Maps regions of (guest-physical address, length in bytes), which are multiples of the page
    /// size. They lie in the file in reverse order, with gaps.
    ///
    /// # Errors
    /// What `memfd_create`, `ftruncate` or `mmap` answer.
    pub(crate) fn new(layout: &[(u64, u64)]) -> io::Result<&'static GuestMemory> {
        let file = memfd()?;
        let total: u64 = layout.iter().map(|(_, len)| len + FILE_GAP_BYTES).sum();
        file.set_len(total)?;
        let mut end = total;
        let mut regions = Vec::new();
        for &(guest_addr, len_bytes) in layout {
            end -= len_bytes;
            let host = map_shared(&file, end, len_bytes)?;
            regions.push(Region { guest_addr, len_bytes, file_offset: end, host });
            end -= FILE_GAP_BYTES;
        }
        Ok(Box::leak(Box::new(GuestMemory { file, regions })))
    }

    /// The regions.
    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The memfd behind all regions.
    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The mapping address of guest-physical `addr`, which vhost-user ring addresses are given in.
    ///
    /// # Panics
    /// If `addr` lies in no region: a bug of the caller.
    pub(crate) fn user_addr(&self, addr: u64) -> u64 {
        self.host(addr, 1).as_ptr() as u64
    }

    fn host(&self, addr: u64, len_bytes: usize) -> NonNull<u8> {
        let region = self
            .regions
            .iter()
            .find(|r| addr >= r.guest_addr && addr - r.guest_addr < r.len_bytes)
            .expect("the driver only uses addresses it laid out");
        let offset = addr - region.guest_addr;
        assert!(offset + len_bytes as u64 <= region.len_bytes, "access past the end of a region");
        let offset = usize::try_from(offset).expect("a mapping fits the address space");
        // SAFETY: offset was checked to lie within the mapping of this region.
        unsafe { region.host.add(offset) }
    }

    /// The 16-bit field at `addr`.
    ///
    /// # Panics
    /// If `addr` is unaligned or outside every region.
    pub(crate) fn u16_at(&self, addr: u64) -> &AtomicU16 {
        let at = self.host(addr, 2).cast::<u16>();
        assert!(at.is_aligned(), "ring fields are laid out aligned");
        // SAFETY: in bounds and aligned; the mapping is never unmapped; accessed as atomic only.
        unsafe { AtomicU16::from_ptr(at.as_ptr()) }
    }

    /// The 32-bit field at `addr`; panics as [`Self::u16_at`].
    pub(crate) fn u32_at(&self, addr: u64) -> &AtomicU32 {
        let at = self.host(addr, 4).cast::<u32>();
        assert!(at.is_aligned(), "ring fields are laid out aligned");
        // SAFETY: in bounds and aligned; the mapping is never unmapped; accessed as atomic only.
        unsafe { AtomicU32::from_ptr(at.as_ptr()) }
    }

    /// The 64-bit field at `addr`; panics as [`Self::u16_at`].
    pub(crate) fn u64_at(&self, addr: u64) -> &AtomicU64 {
        let at = self.host(addr, 8).cast::<u64>();
        assert!(at.is_aligned(), "ring fields are laid out aligned");
        // SAFETY: in bounds and aligned; the mapping is never unmapped; accessed as atomic only.
        unsafe { AtomicU64::from_ptr(at.as_ptr()) }
    }

    /// Copies guest memory from `addr` into `to`. Panics if the range leaves its region.
    pub(crate) fn read(&self, addr: u64, to: &mut [u8]) {
        let from = self.host(addr, to.len());
        // SAFETY: the source range was checked, `to` is ours and cannot overlap a private mapping;
        // bytes the peer changes meanwhile arrive in either state, which is what a driver sees.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr(), to.len()) };
    }

    /// Copies `from` into guest memory at `addr`. Panics if the range leaves its region.
    pub(crate) fn write(&self, addr: u64, from: &[u8]) {
        let to = self.host(addr, from.len());
        // SAFETY: the target range was checked and is shared memory no reference points into.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), from.len()) };
    }

    /// An iovec over `len_bytes` at `addr`. Panics if the range leaves its region.
    pub(crate) fn iov(&self, addr: u64, len_bytes: usize) -> GuestIov {
        let base = self.host(addr, len_bytes);
        GuestIov(libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len_bytes })
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal; no other memory is touched.
    let fd = unsafe { libc::memfd_create(c"vunet-guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor, nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(File::from(fd))
}

fn map_shared(file: &File, offset: u64, len_bytes: u64) -> io::Result<NonNull<u8>> {
    let len = usize::try_from(len_bytes).map_err(io::Error::other)?;
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, file.as_raw_fd(), offset) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mmap gave address zero"))
}

/// Reads one message from `fd` into guest memory. Returns its length in bytes.
///
/// # Errors
/// What `readv` answers, `WouldBlock` included.
pub(crate) fn readv(fd: RawFd, iovs: &[GuestIov]) -> io::Result<usize> {
    let count = i32::try_from(iovs.len()).map_err(io::Error::other)?;
    // SAFETY: GuestIov is a transparent iovec made by GuestMemory::iov: in bounds of a mapping that
    // is never unmapped, and writable shared memory no reference points into.
    let n = unsafe { libc::readv(fd, iovs.as_ptr().cast(), count) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes one message gathered from guest memory to `fd`. Returns the bytes written.
///
/// # Errors
/// What `writev` answers.
pub(crate) fn writev(fd: RawFd, iovs: &[GuestIov]) -> io::Result<usize> {
    let count = i32::try_from(iovs.len()).map_err(io::Error::other)?;
    // SAFETY: as in readv; the kernel only reads.
    let n = unsafe { libc::writev(fd, iovs.as_ptr().cast(), count) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn regions_differ_in_guest_host_and_file_address() {
        let mem = GuestMemory::new(&[(0x4000_0000, 0x10000), (0x1_0000_0000, 0x20000)]).unwrap();
        for region in mem.regions() {
            assert_ne!(region.guest_addr, region.file_offset);
            assert_ne!(region.guest_addr, region.user_addr());
            assert_ne!(region.file_offset, 0);
        }
        assert!(mem.regions()[0].file_offset > mem.regions()[1].file_offset);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mem = GuestMemory::new(&[(0x4000_0000, 0x10000)]).unwrap();
        mem.write(0x4000_0100, &[1, 2, 3, 4]);
        assert_eq!(mem.u16_at(0x4000_0102).load(Ordering::Relaxed), u16::from_le_bytes([3, 4]));
        let mut back = [0; 4];
        mem.read(0x4000_0100, &mut back);
        assert_eq!(back, [1, 2, 3, 4]);
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn access_past_a_region_is_a_bug() {
        let mem = GuestMemory::new(&[(0x4000_0000, 0x1000)]).unwrap();
        mem.read(0x4000_0fff, &mut [0; 2]);
    }
}
