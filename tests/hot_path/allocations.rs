//! An allocator that counts what the threads under watch take from it, and remembers where.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Backtraces kept: the first few say enough, and each takes a millisecond.
const TRACES_MAX: usize = 4;

/// What one thread took.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    armed: AtomicBool,
    count: AtomicU64,
    traces: Mutex<Vec<Backtrace>>,
}

/// Every watch, so that who looks for leaks knows them to be in use.
static WATCHES: Mutex<Vec<&'static Watch>> = Mutex::new(Vec::new());

thread_local! {
    // Both constant and without a destructor: reaching them allocates nothing.
    static WATCH: Cell<Option<&'static Watch>> = const { Cell::new(None) };
    static IS_TRACING: Cell<bool> = const { Cell::new(false) };
}

impl Watch {
    /// A watch for one thread, which lives as long as the process: the thread may outlive its test.
    pub(crate) fn leaked() -> &'static Watch {
        let watch: &'static Watch = Box::leak(Box::default());
        WATCHES.lock().expect("no holder panics").push(watch);
        watch
    }

    /// Puts the calling thread under this watch.
    pub(crate) fn over_this_thread(&'static self) {
        WATCH.set(Some(self));
    }

    /// Counts from here on.
    pub(crate) fn arm(&self) {
        self.count.store(0, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
    }

    /// Counts no more; returns the allocations since it was armed.
    pub(crate) fn disarm(&self) -> u64 {
        self.armed.store(false, Ordering::SeqCst);
        self.count.load(Ordering::SeqCst)
    }

    /// Where the first allocations came from: the frames of this crate in each backtrace.
    pub(crate) fn origins(&self) -> Vec<String> {
        let traces = self.traces.lock().expect("no holder panics");
        let own = |trace: &Backtrace| {
            let text = trace.to_string();
            let lines: Vec<&str> = text.lines().map(str::trim).collect();
            let frames = lines.windows(2).filter(|pair| pair[1].starts_with("at ./src/"));
            frames.map(|pair| format!("{} {}", pair[0], pair[1])).collect::<Vec<_>>().join("\n    ")
        };
        traces.iter().map(own).collect()
    }

    fn note(&self) {
        if !self.armed.load(Ordering::Relaxed) {
            return;
        }
        self.count.fetch_add(1, Ordering::SeqCst);
        // Taking a backtrace allocates.
        IS_TRACING.set(true);
        let mut traces = self.traces.lock().expect("no holder panics");
        if traces.len() < TRACES_MAX {
            traces.push(Backtrace::force_capture());
        }
        drop(traces);
        IS_TRACING.set(false);
    }
}

fn note() {
    if !IS_TRACING.get()
        && let Some(watch) = WATCH.get()
    {
        watch.note();
    }
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: every call goes to the system's allocator unchanged; what is counted beside it neither
// unwinds nor touches the memory in question.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[test]
fn only_the_thread_under_watch_is_counted_and_only_while_armed() {
    let watch = Watch::leaked();
    let make = || drop(std::hint::black_box(Vec::<u8>::with_capacity(100)));
    let on_thread = |armed: bool| {
        std::thread::spawn(move || {
            watch.over_this_thread();
            if armed {
                watch.arm();
            }
            make();
            make();
            watch.disarm()
        })
        .join()
        .expect("no panic")
    };
    assert_eq!(on_thread(false), 0);
    assert_eq!(on_thread(true), 2);
    watch.arm();
    make();
    assert_eq!(watch.disarm(), 0, "this thread is under no watch");
}
