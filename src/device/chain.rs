//! Walking a descriptor chain that the guest may have made wrong, or be changing now.
//!
//! Each descriptor is copied once and judged by the copy; the walk is bounded by the table's size
//! and by [`FRAME_SEGMENTS_MAX`], so a loop ends. A chain with anything wrong is an error as a
//! whole: it is never shortened to its good part.
//!
//! May touch: descriptor tables in guest memory. Read first: virtio 1.3, 2.7.4 and 2.7.5.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::guest_mem::{GuestMemory, Mark, Segments, TranslateError};
use super::ring::SharedMemory;
use crate::limits::FRAME_SEGMENTS_MAX;

macro_rules! chain_errors {
    ($($(#[doc = $doc:literal])+ $name:ident => $text:literal,)*) => {
        /// What is wrong with a chain.
        #[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
        pub enum ChainError {
            $($(#[doc = $doc])+ #[error($text)] $name,)*
        }

        impl ChainError {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [ChainError] = &[$(ChainError::$name),*];
        }
    };
}

chain_errors! {
    /// More descriptors than the table has entries, or than a frame may have: a loop.
    TooLong => "more descriptors than a chain can have",
    /// `next` names no entry of the table.
    NextOutOfRange => "the next descriptor is beyond its table",
    /// An indirect table although `INDIRECT_DESC` was not negotiated.
    IndirectNotNegotiated => "an indirect table was not negotiated",
    /// An indirect table inside an indirect table.
    IndirectNested => "an indirect table within another",
    /// Both `INDIRECT` and `NEXT` are set.
    IndirectNotLast => "a descriptor follows the one that names an indirect table",
    /// The table's length is zero or no multiple of a descriptor's.
    IndirectLength => "an indirect table of impossible length",
    /// The table lies outside guest memory.
    IndirectUnmapped => "an indirect table outside guest memory",
    /// A device-readable descriptor follows a device-writable one.
    ReadableAfterWritable => "a readable descriptor after a writable one",
    /// A buffer lies outside guest memory.
    Unmapped => "a buffer outside guest memory",
    /// The buffers straddle so many regions that they exceed [`FRAME_SEGMENTS_MAX`].
    TooManySegments => "more segments than a frame can have",
    /// A device-writable descriptor where the driver sends, or a readable one where it receives.
    WrongDirection => "a buffer of the wrong direction for its queue",
    /// Not a byte to write to in a receive buffer.
    Empty => "no byte in the buffers",
}

impl From<TranslateError> for ChainError {
    fn from(error: TranslateError) -> ChainError {
        match error {
            TranslateError::Unmapped => ChainError::Unmapped,
            TranslateError::TooManySegments => ChainError::TooManySegments,
        }
    }
}

/// Where chains are put: the readable segments, then the writable ones.
#[derive(Debug)]
pub(super) struct ChainBuf {
    pub(super) readable: Segments,
    pub(super) writable: Segments,
}

impl ChainBuf {
    pub(super) fn new(memory: &SharedMemory) -> ChainBuf {
        ChainBuf { readable: Segments::new(memory.clone()), writable: Segments::new(memory.clone()) }
    }

    pub(super) fn set_memory(&mut self, memory: &SharedMemory) {
        self.readable.set_memory(memory.clone());
        self.writable.set_memory(memory.clone());
    }

    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }

    fn marks(&self) -> (Mark, Mark) {
        (self.readable.mark(), self.writable.mark())
    }
}

/// The table a walk is in.
#[derive(Clone, Copy)]
enum Table {
    Direct,
    Indirect { guest_addr: u64, entries: u32 },
}

/// Appends the chain that starts at descriptor `head` of a table of `size` entries, read through
/// `direct`, to `buf`. On error `buf` is as it was.
pub(super) fn walk(
    head: u16,
    size: u16,
    indirect: bool,
    direct: impl Fn(u16) -> Descriptor,
    buf: &mut ChainBuf,
) -> Result<(), ChainError> {
    let (readable, writable) = buf.marks();
    let result = append(head, size, indirect, direct, buf);
    if result.is_err() {
        buf.readable.truncate(readable);
        buf.writable.truncate(writable);
    }
    result
}

fn append(
    head: u16,
    size: u16,
    indirect: bool,
    direct: impl Fn(u16) -> Descriptor,
    buf: &mut ChainBuf,
) -> Result<(), ChainError> {
    let mut table = Table::Direct;
    let mut index = head;
    let mut visited = 0;
    let mut any_writable = false;
    loop {
        visited += 1;
        let (descriptor, entries) = match table {
            Table::Direct => (direct(index), u32::from(size)),
            Table::Indirect { guest_addr, entries } => {
                (indirect_descriptor(buf.readable.memory(), guest_addr, index)?, entries)
            }
        };
        if visited > FRAME_SEGMENTS_MAX || visited > entries as usize {
            return Err(ChainError::TooLong);
        }
        if descriptor.refers_to_indirect_table() {
            table = enter_indirect(table, &descriptor, indirect)?;
            index = 0;
            visited = 0;
            continue;
        }
        if descriptor.is_write_only() {
            any_writable = true;
            buf.writable.push(descriptor.addr().0, descriptor.len())?;
        } else if any_writable {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            buf.readable.push(descriptor.addr().0, descriptor.len())?;
        }
        if !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
        if u32::from(index) >= entries {
            return Err(ChainError::NextOutOfRange);
        }
    }
}

fn enter_indirect(table: Table, descriptor: &Descriptor, negotiated: bool) -> Result<Table, ChainError> {
    if !negotiated {
        return Err(ChainError::IndirectNotNegotiated);
    }
    if matches!(table, Table::Indirect { .. }) {
        return Err(ChainError::IndirectNested);
    }
    if descriptor.has_next() {
        return Err(ChainError::IndirectNotLast);
    }
    let each = size_of::<Descriptor>() as u32;
    if descriptor.len() == 0 || !descriptor.len().is_multiple_of(each) {
        return Err(ChainError::IndirectLength);
    }
    Ok(Table::Indirect { guest_addr: descriptor.addr().0, entries: descriptor.len() / each })
}

fn indirect_descriptor(memory: &GuestMemory, table: u64, index: u16) -> Result<Descriptor, ChainError> {
    let mut descriptor = Descriptor::default();
    let offset = u64::from(index) * size_of::<Descriptor>() as u64;
    let at = table.checked_add(offset).ok_or(ChainError::IndirectUnmapped)?;
    memory.read(at, descriptor.as_mut_slice()).map_err(|_| ChainError::IndirectUnmapped)?;
    Ok(descriptor)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};

    use super::*;
    use crate::device::guest_mem::RegionSpec;

    const GUEST: u64 = 0x10_0000;
    const BYTES: u64 = 0x1_0000;

    fn memory(content: &[u8]) -> SharedMemory {
        use std::os::unix::fs::FileExt;
        let file: File = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(BYTES).unwrap();
        file.write_all_at(content, 0).unwrap();
        let spec = RegionSpec { guest_addr: GUEST, size_bytes: BYTES, user_addr: 0, file_offset_bytes: 0 };
        Arc::new(GuestMemory::default().replaced(vec![(spec, file)]).unwrap())
    }

    fn next(addr: u64, len: u32, next: u16) -> Descriptor {
        Descriptor::new(addr, len, VRING_DESC_F_NEXT as u16, next)
    }

    fn walk_table(table: &[Descriptor], indirect: bool, buf: &mut ChainBuf) -> Result<(), ChainError> {
        walk(0, table.len() as u16, indirect, |n| table[usize::from(n)], buf)
    }

    #[test]
    fn chain_as_long_as_its_table_is_taken() {
        let mut buf = ChainBuf::new(&memory(&[]));
        let mut table: Vec<_> = (1..=64).map(|n| next(GUEST, 2, n)).collect();
        assert_eq!(walk_table(&table, false, &mut buf), Err(ChainError::NextOutOfRange));
        table[63] = Descriptor::new(GUEST, 2, 0, 0);
        assert_eq!(walk_table(&table, false, &mut buf), Ok(()));
        assert_eq!(buf.readable.len_bytes(), 128);
    }

    #[test]
    fn chain_of_the_most_segments_is_taken_and_one_more_refused() {
        let mut buf = ChainBuf::new(&memory(&[]));
        let mut table: Vec<_> = (1..=2048).map(|n| next(GUEST, 1, n)).collect();
        table[FRAME_SEGMENTS_MAX - 1] = Descriptor::new(GUEST, 1, 0, 0);
        assert_eq!(walk_table(&table, false, &mut buf), Ok(()));
        buf.clear();
        table[FRAME_SEGMENTS_MAX - 1] = next(GUEST, 1, FRAME_SEGMENTS_MAX as u16);
        table[FRAME_SEGMENTS_MAX] = Descriptor::new(GUEST, 1, 0, 0);
        assert_eq!(walk_table(&table, false, &mut buf), Err(ChainError::TooLong));
        assert_eq!(buf.readable.count(), 0, "nothing of it stays");
    }

    proptest! {
        #[test]
        fn arbitrary_descriptors_end_and_leave_all_or_nothing(
            raw in proptest::collection::vec((0u8..6, any::<u32>(), 0u32..0x2000, 0u16..8, 0u16..20), 16),
            content in proptest::collection::vec(any::<u8>(), 0..2048),
            indirect: bool,
        ) {
            let mut buf = ChainBuf::new(&memory(&content));
            let table: Vec<_> = raw
                .iter()
                .map(|(kind, wild, len, flags, next)| match kind {
                    0 => Descriptor::new(u64::from(*wild) << 20, *wild, *flags, *next),
                    1 => Descriptor::new(GUEST, *len & !15, VRING_DESC_F_INDIRECT as u16, *next),
                    _ => Descriptor::new(GUEST + u64::from(*wild) % BYTES, *len, *flags, *next),
                })
                .collect();
            let result = walk_table(&table, indirect, &mut buf);
            let count = buf.readable.count() + buf.writable.count();
            if result.is_err() {
                prop_assert_eq!(count, 0);
            }
            prop_assert!(count <= 2 * FRAME_SEGMENTS_MAX);
        }
    }
}
