//! Translation, overlap, repetition and loss, on shared memory of the test's own.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;

fn file(len_bytes: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(len_bytes).unwrap();
    file
}

fn spec(guest_addr: u64, size_bytes: u64, user_addr: u64, file_offset_bytes: u64) -> RegionSpec {
    RegionSpec { guest_addr, size_bytes, user_addr, file_offset_bytes }
}

/// Two adjacent regions and one apart, each of two pages in a file of its own.
fn three_regions() -> (GuestMemory, Vec<File>) {
    let files: Vec<_> = (0..3).map(|_| file(3 * PAGE)).collect();
    let mut memory = GuestMemory::default();
    for (n, guest) in [0x1_0000, 0x1_0000 + 2 * PAGE, 0x9_0000].into_iter().enumerate() {
        let at = spec(guest, 2 * PAGE, 0x7000_0000 + 0x10_0000 * n as u64, PAGE);
        memory = memory.with_added(at, files[n].try_clone().unwrap()).unwrap();
    }
    (memory, files)
}

#[test]
fn range_over_adjacent_regions_is_split_where_they_meet() {
    let (memory, files) = three_regions();
    let mut segments = Segments::new(Arc::new(memory));
    segments.push(0x1_0000 + 2 * PAGE - 10, 30).unwrap();
    assert_eq!((segments.count(), segments.len_bytes()), (2, 30));
    let text = b"abcdefghijABCDEFGHIJKLMNOPQRST";
    assert_eq!(segments.payload_mut().copy_from(text), 30);
    let mut first = [0; 10];
    files[0].read_exact_at(&mut first, 3 * PAGE - 10).unwrap();
    let mut second = [0; 20];
    files[1].read_exact_at(&mut second, PAGE).unwrap();
    assert_eq!((&first[..], &second[..]), (&text[..10], &text[10..]));
    let mut read = [0; 30];
    segments.memory().read(0x1_0000 + 2 * PAGE - 10, &mut read).unwrap();
    assert_eq!(&read, text);
}

#[test]
fn range_into_a_hole_or_around_the_end_is_refused_whole() {
    let (memory, _files) = three_regions();
    let mut segments = Segments::new(Arc::new(memory));
    let end = 0x1_0000 + 4 * PAGE;
    for (addr, len) in [
        (end - 5, 6),
        (end, 1),
        (0x1_0000 - 1, 2),
        (0, 1),
        (0x9_0000 + 2 * PAGE - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
        (0x1_0000, u32::MAX),
    ] {
        assert_eq!(segments.push(addr, len), Err(TranslateError::Unmapped), "{addr:#x}+{len}");
        assert_eq!((segments.count(), segments.len_bytes()), (0, 0));
        let mut out = vec![0; (len as usize).min(1 << 16)];
        assert!(segments.memory().read(addr, &mut out).is_err());
    }
    segments.push(end - 5, 5).unwrap();
}

#[test]
fn segments_end_at_their_bound() {
    let (memory, _files) = three_regions();
    let mut segments = Segments::new(Arc::new(memory));
    for _ in 0..FRAME_SEGMENTS_MAX {
        segments.push(0x1_0000, 1).unwrap();
    }
    assert_eq!(segments.push(0x1_0000, 1), Err(TranslateError::TooManySegments));
    assert_eq!(segments.push(0x1_0000, 0), Ok(()));
}

#[test]
fn overlap_is_refused_and_touching_is_not() {
    let (memory, _files) = three_regions();
    let add = |guest, size| memory.with_added(spec(guest, size, 0x5000_0000, 0), file(size));
    for (guest, size) in [
        (0x1_0000, PAGE),
        (0x1_0000 - 1, 2),
        (0x1_0000 + 4 * PAGE - 1, PAGE),
        (0x9_0000 - PAGE, PAGE + 1),
        (0, 0x10_0000),
    ] {
        assert!(matches!(add(guest, size), Err(RegionError::Overlap(..))), "{guest:#x}+{size:#x}");
    }
    assert!(add(0x1_0000 - PAGE, PAGE).is_ok());
    assert!(add(0x1_0000 + 4 * PAGE, PAGE).is_ok());
}

#[test]
fn repeated_table_keeps_its_mappings() {
    let backing = file(2 * PAGE);
    let table = || vec![(spec(0, PAGE, 0x1000, PAGE), backing.try_clone().unwrap())];
    let first = GuestMemory::default().replaced(table()).unwrap();
    let second = first.replaced(table()).unwrap();
    assert!(Arc::ptr_eq(&first.regions[0], &second.regions[0]));
    let third = second.with_added(table()[0].0, backing.try_clone().unwrap()).unwrap();
    assert!(Arc::ptr_eq(&first.regions[0], &third.regions[0]));
    // Another file at the same place is another region.
    let other = second.replaced(vec![(table()[0].0, file(2 * PAGE))]).unwrap();
    assert!(!Arc::ptr_eq(&first.regions[0], &other.regions[0]));
}

#[test]
fn region_at_an_odd_offset_shows_the_right_bytes() {
    let backing = file(3 * PAGE);
    backing.write_all_at(b"here", PAGE + 8).unwrap();
    let memory =
        GuestMemory::default().replaced(vec![(spec(0x4000, 100, 0x1000, PAGE + 8), backing)]).unwrap();
    let mut read = [0; 4];
    memory.read(0x4000, &mut read).unwrap();
    assert_eq!(&read, b"here");
    let mut last = [0; 1];
    assert!(memory.read(0x4000 + 99, &mut last).is_ok());
    assert!(memory.read(0x4000 + 100, &mut last).is_err());
}

#[test]
fn area_must_lie_in_one_region_and_be_aligned() {
    let (memory, _files) = three_regions();
    let base = 0x7000_0000;
    assert!(memory.area(base, 2 * PAGE as usize, 16).is_ok());
    assert!(matches!(memory.area(base, 2 * PAGE as usize + 1, 16), Err(AreaError::Unmapped { .. })));
    assert!(matches!(memory.area(base + 8, 16, 16), Err(AreaError::Misaligned { .. })));
    assert!(matches!(memory.area(base - 1, 16, 1), Err(AreaError::Unmapped { .. })));
    assert!(matches!(memory.area(u64::MAX, usize::MAX, 1), Err(AreaError::Unmapped { .. })));
}

#[test]
fn truncated_file_reads_as_zeroes_and_is_reported_once() {
    let backing = file(2 * PAGE);
    backing.write_all_at(b"gone", 0).unwrap();
    let other = GuestMemory::default().replaced(vec![(spec(0, PAGE, 0, 0), file(PAGE))]).unwrap();
    let memory = GuestMemory::default()
        .replaced(vec![(spec(0x4000, 2 * PAGE, 0x1000, 0), backing.try_clone().unwrap())])
        .unwrap();
    let mut watch = LossWatch::new();
    assert!(!watch.is_lost(&memory));
    backing.set_len(0).unwrap();
    let mut read = [1; 4];
    memory.read(0x4000, &mut read).unwrap();
    assert_eq!(read, [0; 4]);
    assert!(memory.is_lost());
    assert!(!other.is_lost());
    assert!(watch.is_lost(&memory));
    assert!(!watch.is_lost(&memory));
    let area = memory.area(0x1000 + PAGE, PAGE as usize, 16).unwrap();
    assert_eq!(area.load_u16(0), 0);
    area.store_u16(0, 7);
    assert_eq!(area.load_u16(0), 7);
}

proptest! {
    #[test]
    fn translation_covers_exactly_what_was_asked_or_nothing(addr in any::<u64>(), near in 0u64..0xa_0000, len in any::<u32>(), short in 0u32..0x5000, pick in 0..4) {
        let (memory, _files) = three_regions();
        let mut segments = Segments::new(Arc::new(memory));
        let addr = if pick & 1 == 0 { addr } else { near };
        let len = if pick & 2 == 0 { len } else { short };
        match segments.push(addr, len) {
            Ok(()) => prop_assert_eq!(segments.len_bytes(), len as usize),
            Err(_) => prop_assert_eq!(segments.count(), 0),
        }
    }
}
