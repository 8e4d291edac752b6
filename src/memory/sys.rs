//! What the processor and the kernel are told of memory. Both are hints.

/// Has the processor fetch the cache line `place` begins in, without waiting for it.
#[inline(always)]
pub fn prefetch<T>(place: &T) {
    let at = std::ptr::from_ref(place);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64. A prefetch reads nothing and cannot fault, and `at` is valid anyway.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch reads nothing, changes no register and cannot fault, and `at` is valid anyway.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Asks for pages of `page_bytes` for the whole ones of them among what `vec` has reserved, from byte `from_bytes` on.
pub(super) fn ask_for_huge_pages<T>(vec: &Vec<T>, from_bytes: usize, page_bytes: usize) {
    let room_bytes = vec.capacity() * size_of::<T>();
    let begin = vec.as_ptr().addr();
    let (Some(from), end) = (begin.checked_add(from_bytes), begin + room_bytes) else { return };
    let (first, last) = (from.next_multiple_of(page_bytes), end - end % page_bytes);
    if first >= last {
        return;
    }
    let at = vec.as_ptr().cast::<libc::c_void>().wrapping_byte_add(first - begin);
    // SAFETY: `first..last` lies within the room of `vec`, which is borrowed, and the advice changes no byte of it.
    // Refused, it is as if it had not been given.
    let _ = unsafe { libc::madvise(at.cast_mut(), last - first, libc::MADV_HUGEPAGE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the kernel was told of the mapping that holds `at` (`hg` of its flags).
    fn is_advised(at: usize) -> Option<bool> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let mut holds = false;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((from, to)) = range
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                holds = (from..to).contains(&at);
            }
            if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| holds) {
                return Some(flags.split(' ').any(|flag| flag == "hg"));
            }
        }
        None
    }

    #[test]
    fn only_whole_huge_pages_behind_the_first_bytes_are_asked_for() {
        const PAGE: usize = 2 << 20;
        let vec: Vec<u64> = Vec::with_capacity(4 * PAGE / size_of::<u64>());
        let begin = vec.as_ptr().addr();
        ask_for_huge_pages(&vec, PAGE, PAGE);
        let first = (begin + PAGE).next_multiple_of(PAGE);
        let Some(advised) = is_advised(first) else { return };
        if !advised && !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        assert!(advised && is_advised(first + PAGE) == Some(true));
        assert_eq!(is_advised(begin + PAGE - 4096), Some(false), "the first bytes stay in small pages");
        ask_for_huge_pages(&Vec::<u64>::new(), 0, PAGE);
        ask_for_huge_pages(&vec, 5 * PAGE, PAGE);
        ask_for_huge_pages(&vec, usize::MAX, PAGE);
    }
}
