//! Surviving SIGBUS: a front-end that truncates the file behind guest memory must not kill us.
//!
//! Every mapping of guest memory is entered in a static table of atomics. When a page of it has
//! lost its file, the handler maps an anonymous page over the hole, marks the mapping as lost and
//! lets the access go on (it reads zeroes); the worker sees the mark at its next batch, stops the
//! rings and has the connection dropped. Any other SIGBUS goes to whoever handled it before.
//!
//! May touch: the process's SIGBUS disposition, mappings it was told of. Read first: `sigaction(2)`,
//! `signal-safety(7)`; the handler uses atomics and raw system calls only.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};

use crate::limits::WATCHED_MAPPINGS_MAX;

/// One watched mapping. `start` is zero while the slot holds nothing; it is written last and
/// cleared first, so the handler never sees half a slot.
struct Slot {
    claimed: AtomicBool,
    start: AtomicUsize,
    end: AtomicUsize,
    block: AtomicUsize,
    lost: AtomicBool,
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            claimed: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            block: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
        }
    }
}

static TABLE: [Slot; WATCHED_MAPPINGS_MAX] = [const { Slot::new() }; WATCHED_MAPPINGS_MAX];
static LOST_PAGES: AtomicU32 = AtomicU32::new(0);
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// Pages lost since the process started; a change tells that some mapping was lost.
pub(super) fn lost_pages() -> u32 {
    LOST_PAGES.load(Ordering::Acquire)
}

/// A watched mapping; dropping it ends the watch (before the mapping goes).
#[derive(Debug)]
pub(super) struct Watch(usize);

impl Watch {
    /// Watches `len_bytes` bytes from `start` on, a multiple of `block_bytes`, a power of two and the
    /// granularity in which the mapping can be replaced. `None` if the table is full.
    pub(super) fn new(start: usize, len_bytes: usize, block_bytes: usize) -> Option<Watch> {
        install();
        let claim = |slot: &Slot| {
            slot.claimed.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let at = TABLE.iter().position(claim)?;
        let slot = &TABLE[at];
        slot.end.store(start + len_bytes, Ordering::Relaxed);
        slot.block.store(block_bytes, Ordering::Relaxed);
        slot.lost.store(false, Ordering::Relaxed);
        slot.start.store(start, Ordering::Release);
        Some(Watch(at))
    }

    /// Whether a page of the mapping was lost.
    pub(super) fn is_lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let slot = &TABLE[self.0];
        slot.start.store(0, Ordering::Release);
        slot.claimed.store(false, Ordering::Release);
    }
}

/// Installs the handler once per process.
fn install() {
    PREVIOUS.get_or_init(|| {
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
        // SAFETY: all-zero bytes are a valid `sigaction` (no flags, empty mask, default handler).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: as above.
        let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: both point to valid structures; the handler is async-signal-safe (see there).
        let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut previous) };
        assert_eq!(result, 0, "sigaction(SIGBUS) accepts a valid handler");
        previous
    });
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the kernel hands a siginfo that is valid while the handler runs.
    let info = unsafe { &*info };
    let code = info.si_code;
    if code > 0 {
        // SAFETY: SIGBUS raised by the kernel (positive code) carries an address.
        let address = unsafe { info.si_addr() };
        if replace_page(address as usize) {
            return;
        }
    }
    give_up(signal, code);
}

/// Maps an anonymous block over the one `address` lies in, if that is watched.
fn replace_page(address: usize) -> bool {
    let holds = |slot: &&Slot| {
        let start = slot.start.load(Ordering::Acquire);
        start != 0 && address >= start && address < slot.end.load(Ordering::Relaxed)
    };
    let Some(slot) = TABLE.iter().find(holds) else { return false };
    let block = slot.block.load(Ordering::Relaxed);
    // Counted from the mapping's start, which need not be a multiple of the block itself.
    let start = slot.start.load(Ordering::Relaxed);
    let hole = start + ((address - start) & !(block - 1));
    // SAFETY: the thread's own errno, restored below: the interrupted code must not see ours.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: `errno` is valid for this thread's whole life.
    let saved = unsafe { *errno };
    // SAFETY: the block lies in a mapping this process made and watches (`Watch::new`: its length is
    // a multiple of the block), so replacing it touches nothing of anyone else's. Guest memory is
    // only reached through raw pointers and atomics, for which any content is valid.
    let mapped = unsafe {
        libc::mmap(
            hole as *mut c_void,
            block,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    // SAFETY: as above.
    unsafe { *errno = saved };
    slot.lost.store(true, Ordering::Release);
    LOST_PAGES.fetch_add(1, Ordering::AcqRel);
    mapped != libc::MAP_FAILED
}

/// Hands the signal to the previous disposition: a fault strikes again on return, a signal that was
/// sent is sent anew.
fn give_up(signal: c_int, code: c_int) {
    let previous = PREVIOUS.get().map_or(std::ptr::null(), std::ptr::from_ref);
    if previous.is_null() {
        // SAFETY: restoring the default disposition has no preconditions.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    } else {
        // SAFETY: `previous` is what `sigaction` itself returned.
        unsafe { libc::sigaction(signal, previous, std::ptr::null_mut()) };
    }
    if code <= 0 {
        // SAFETY: raising a signal in the own thread has no preconditions.
        unsafe { libc::raise(signal) };
    }
}
