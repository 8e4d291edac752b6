//! Guest memory as a front-end shares it. Guest addresses, the front-end's addresses and file
//! offsets all differ, so that mixing them up fails.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Guest physical address of the first byte.
pub(crate) const GUEST_BASE: u64 = 0x4000_0000;
/// The front-end's pretended own address of the first byte.
pub(crate) const USER_BASE: u64 = 0x7f12_3450_0000;
/// Where the memory starts in its file.
pub(crate) const FILE_OFFSET: u64 = 0x3000;

/// One region of guest memory.
pub(crate) struct Ram {
    file: File,
    map: MmapRegion,
    size: usize,
}

impl Ram {
    pub(crate) fn new(size: usize) -> Arc<Ram> {
        let file = tempfile::tempfile_in("/dev/shm").expect("shared memory");
        file.set_len(FILE_OFFSET + size as u64).expect("room in shared memory");
        let for_map = FileOffset::new(file.try_clone().expect("a descriptor"), FILE_OFFSET);
        let map = MmapRegion::from_file(for_map, size).expect("a mapping");
        Arc::new(Ram { file, map, size })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn guest(&self, at: usize) -> u64 {
        GUEST_BASE + at as u64
    }

    pub(crate) fn user(&self, at: usize) -> u64 {
        USER_BASE + at as u64
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        self.map.as_volatile_slice().write_slice(bytes, at).expect("within memory");
    }

    pub(crate) fn read(&self, at: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.map.as_volatile_slice().read_slice(&mut out, at).expect("within memory");
        out
    }

    pub(crate) fn load_u16(&self, at: usize) -> u16 {
        self.map.as_volatile_slice().load(at, Ordering::Acquire).expect("within memory")
    }

    pub(crate) fn store_u16(&self, at: usize, value: u16) {
        self.map.as_volatile_slice().store(value, at, Ordering::Release).expect("within memory");
    }

    pub(crate) fn load_u32(&self, at: usize) -> u32 {
        self.map.as_volatile_slice().load(at, Ordering::Acquire).expect("within memory")
    }
}
