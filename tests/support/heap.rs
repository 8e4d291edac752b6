//! An allocator that knows how many bytes each thread has and has not given back.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Constant and without a destructor: reaching it allocates nothing.
    static HELD: Cell<isize> = const { Cell::new(0) };
}

/// Bytes this thread took more than it gave back.
pub(crate) fn held_bytes() -> isize {
    HELD.get()
}

fn note(bytes: isize) {
    HELD.set(HELD.get() + bytes);
}

struct Balanced;

#[global_allocator]
static BALANCED: Balanced = Balanced;

// SAFETY: every call goes to the system's allocator unchanged; the count beside it neither unwinds nor
// touches the memory in question.
unsafe impl GlobalAlloc for Balanced {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size().cast_signed());
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note(-layout.size().cast_signed());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}
