//! Bytes that lie in segments: guest memory as iovecs, or one slice of host memory.
//!
//! Guest memory changes under us at any time, so it is never viewed as a Rust slice: it is moved by
//! the kernel, copied, or summed, always through raw pointers.

use std::marker::PhantomData;

use libc::iovec;

use crate::wire::checksum::Accumulator;

/// Chunks in which bytes are copied to be summed; even, so that each begins a 16-bit word.
const SMALL_CHUNK_BYTES: usize = 128;
const LARGE_CHUNK_BYTES: usize = 2048;

/// Segments to read from: a view of part of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    source: Source<'a>,
    skip_bytes: usize,
    len_bytes: usize,
}

#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    Guest(&'a [iovec]),
    Host(&'a [u8]),
}

impl<'a> Payload<'a> {
    /// No bytes.
    pub const EMPTY: Payload<'static> = Payload { source: Source::Host(&[]), skip_bytes: 0, len_bytes: 0 };

    /// A view of host memory.
    pub fn from_host(bytes: &'a [u8]) -> Payload<'a> {
        Payload { source: Source::Host(bytes), skip_bytes: 0, len_bytes: bytes.len() }
    }

    /// A view of `segments` of mapped guest memory.
    ///
    /// # Safety
    /// Every segment stays mapped and readable for `'a`.
    pub unsafe fn from_guest(segments: &'a [iovec]) -> Payload<'a> {
        let len_bytes = segments.iter().map(|s| s.iov_len).sum();
        Payload { source: Source::Guest(segments), skip_bytes: 0, len_bytes }
    }

    /// Bytes in view.
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether no byte is in view.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Whether the bytes lie in guest memory, which stays as it is until the batch is published.
    pub fn is_in_guest(&self) -> bool {
        matches!(self.source, Source::Guest(_))
    }

    /// The part of at most `len_bytes` from `from_bytes` on; shorter, or empty, where the view ends.
    #[must_use]
    pub fn range(&self, from_bytes: usize, len_bytes: usize) -> Payload<'a> {
        let from = from_bytes.min(self.len_bytes);
        Payload {
            source: self.source,
            skip_bytes: self.skip_bytes + from,
            len_bytes: len_bytes.min(self.len_bytes - from),
        }
    }

    /// Calls `each` with every run of bytes in view, as (pointer, length).
    fn for_each_run(&self, mut each: impl FnMut(*const u8, usize)) {
        let mut skip = self.skip_bytes;
        let mut left = self.len_bytes;
        match self.source {
            Source::Host(bytes) => {
                if left > 0 {
                    each(bytes[skip..skip + left].as_ptr(), left);
                }
            }
            Source::Guest(segments) => {
                for segment in segments {
                    if left == 0 {
                        break;
                    }
                    if skip >= segment.iov_len {
                        skip -= segment.iov_len;
                        continue;
                    }
                    let len = (segment.iov_len - skip).min(left);
                    each(segment.iov_base.cast::<u8>().wrapping_add(skip), len);
                    left -= len;
                    skip = 0;
                }
            }
        }
    }

    /// Copies into `out` as many bytes as both hold; returns that count.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let mut done = 0;
        self.range(0, out.len()).for_each_run(|ptr, len| {
            let target = &mut out[done..done + len];
            // SAFETY: `ptr` is readable for `len` bytes (constructor's contract, `for_each_run` stays
            // within each segment), `target` is exactly `len` bytes of host memory apart from it.
            unsafe { std::ptr::copy_nonoverlapping(ptr, target.as_mut_ptr(), len) };
            done += len;
        });
        done
    }

    /// Adds the bytes in view to a ones' complement sum. The guest may change them meanwhile, which
    /// spoils its own checksum only.
    pub fn add_to(&self, sum: &mut Accumulator) {
        // Small ones are the many: a large chunk would be cleared for each of them.
        if self.len_bytes <= SMALL_CHUNK_BYTES {
            self.add_in_chunks(sum, &mut [0; SMALL_CHUNK_BYTES]);
        } else {
            self.add_in_chunks(sum, &mut [0; LARGE_CHUNK_BYTES]);
        }
    }

    fn add_in_chunks(&self, sum: &mut Accumulator, chunk: &mut [u8]) {
        let mut from = 0;
        while from < self.len_bytes {
            let len = self.range(from, chunk.len()).copy_to(chunk);
            sum.add_bytes(&chunk[..len]);
            from += len;
        }
    }

    /// Appends the runs in view to `out`, for a vectored system call.
    pub fn push_iovecs(&self, out: &mut Vec<iovec>) {
        self.for_each_run(|ptr, len| out.push(iovec { iov_base: ptr.cast_mut().cast(), iov_len: len }));
    }
}

/// Segments to write to: reserved receive buffers of the guest, or host memory.
#[derive(Debug)]
pub struct PayloadMut<'a> {
    source: SourceMut<'a>,
    skip_bytes: usize,
    len_bytes: usize,
}

#[derive(Debug)]
enum SourceMut<'a> {
    Guest(&'a [iovec]),
    Host(*mut u8, PhantomData<&'a mut [u8]>),
}

impl<'a> PayloadMut<'a> {
    /// Host memory to fill.
    pub fn from_host(bytes: &'a mut [u8]) -> PayloadMut<'a> {
        let len_bytes = bytes.len();
        PayloadMut { source: SourceMut::Host(bytes.as_mut_ptr(), PhantomData), skip_bytes: 0, len_bytes }
    }

    /// Reserved `segments` of mapped guest memory.
    ///
    /// # Safety
    /// Every segment stays mapped and writable for `'a`.
    pub unsafe fn from_guest(segments: &'a [iovec]) -> PayloadMut<'a> {
        let len_bytes = segments.iter().map(|s| s.iov_len).sum();
        PayloadMut { source: SourceMut::Guest(segments), skip_bytes: 0, len_bytes }
    }

    /// Bytes in view.
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether no byte is in view.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The part of at most `len_bytes` from `from_bytes` on; shorter, or empty, where the view ends.
    #[must_use]
    pub fn range(self, from_bytes: usize, len_bytes: usize) -> PayloadMut<'a> {
        let from = from_bytes.min(self.len_bytes);
        PayloadMut {
            source: self.source,
            skip_bytes: self.skip_bytes + from,
            len_bytes: len_bytes.min(self.len_bytes - from),
        }
    }

    fn for_each_run(&mut self, mut each: impl FnMut(*mut u8, usize)) {
        let mut skip = self.skip_bytes;
        let mut left = self.len_bytes;
        match &self.source {
            SourceMut::Host(base, _) => {
                if left > 0 {
                    each(base.wrapping_add(skip), left);
                }
            }
            SourceMut::Guest(segments) => {
                for segment in *segments {
                    if left == 0 {
                        break;
                    }
                    if skip >= segment.iov_len {
                        skip -= segment.iov_len;
                        continue;
                    }
                    let len = (segment.iov_len - skip).min(left);
                    each(segment.iov_base.cast::<u8>().wrapping_add(skip), len);
                    left -= len;
                    skip = 0;
                }
            }
        }
    }

    /// Copies as much of `bytes` as fits; returns that count.
    pub fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let full = self.len_bytes;
        let total = full.min(bytes.len());
        let mut done = 0;
        self.len_bytes = total;
        self.for_each_run(|ptr, len| {
            let source = &bytes[done..done + len];
            // SAFETY: `ptr` is writable for `len` bytes (constructor's contract, `for_each_run` stays
            // within each segment), `source` is exactly `len` bytes of host memory apart from it.
            unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), ptr, len) };
            done += len;
        });
        self.len_bytes = full;
        total
    }

    /// The same bytes, to read.
    pub fn as_payload(&self) -> Payload<'_> {
        let source = match &self.source {
            SourceMut::Guest(segments) => Source::Guest(segments),
            SourceMut::Host(base, _) => {
                let len = self.skip_bytes + self.len_bytes;
                // SAFETY: `base` came from a live `&mut [u8]` of at least `len` bytes that `self`
                // borrows mutably and that nothing else can reach.
                Source::Host(unsafe { std::slice::from_raw_parts(*base, len) })
            }
        };
        Payload { source, skip_bytes: self.skip_bytes, len_bytes: self.len_bytes }
    }

    /// Appends the runs in view to `out`, for a vectored system call.
    pub fn push_iovecs(&mut self, out: &mut Vec<iovec>) {
        self.for_each_run(|ptr, len| out.push(iovec { iov_base: ptr.cast(), iov_len: len }));
    }
}
