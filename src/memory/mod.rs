//! Large tables in memory: huge pages for them, and lines of them fetched before they are needed.
//!
//! A packet of one of a million flows waits for memory longer than it is worked on: for the line its flow stands in, and
//! before it for the page that line is in, as processors know the places of few thousand pages of 4 KiB. Both are only
//! about time; nothing here changes what anybody reads.
//!
//! May touch: nothing else. Read first: `madvise(2)`, `Documentation/admin-guide/mm/transhuge.rst` of Linux.

mod sys;

pub use sys::prefetch;

/// Bytes of a huge page of x86-64, and of AArch64 with pages of 4 KiB.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Asks for huge pages for the room `vec` has reserved, from byte `from_bytes` on. What is not a whole huge page stays in
/// small ones, and where the kernel has none to give all does.
pub fn ask_for_huge_pages<T>(vec: &Vec<T>, from_bytes: usize) {
    sys::ask_for_huge_pages(vec, from_bytes, HUGE_PAGE_BYTES);
}
