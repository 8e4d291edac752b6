//! Control messages of socket calls, written and read as bytes.
//!
//! Read first: cmsg(3).

use std::mem::size_of;

use libc::c_int;

/// Control messages are aligned like this.
const ALIGN: usize = size_of::<usize>();
/// Length of a message's header, `CMSG_LEN(0)`: its length, level and kind.
const HEADER_BYTES: usize = size_of::<usize>() + 2 * size_of::<c_int>();

/// Room of `N` bytes for control messages.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct Control<const N: usize> {
    bytes: [u8; N],
    len_bytes: usize,
}

impl<const N: usize> Default for Control<N> {
    fn default() -> Control<N> {
        Control { bytes: [0; N], len_bytes: 0 }
    }
}

impl<const N: usize> Control<N> {
    /// Appends a message to be sent.
    ///
    /// # Panics
    /// If there is no room for it.
    pub fn push(&mut self, level: c_int, kind: c_int, data: &[u8]) {
        let (at, len) = (self.len_bytes, HEADER_BYTES + data.len());
        let out = &mut self.bytes[at..at + len];
        let (head, rest) = out.split_at_mut(HEADER_BYTES);
        head[..ALIGN].copy_from_slice(&len.to_ne_bytes());
        head[ALIGN..ALIGN + 4].copy_from_slice(&level.to_ne_bytes());
        head[ALIGN + 4..].copy_from_slice(&kind.to_ne_bytes());
        rest.copy_from_slice(data);
        self.len_bytes = (at + len).next_multiple_of(ALIGN);
        assert!(self.len_bytes <= N, "the caller knows how much it sends");
    }

    /// Has `header` send what was pushed.
    pub fn send_with(&mut self, header: &mut libc::msghdr) {
        if self.len_bytes > 0 {
            header.msg_control = self.bytes.as_mut_ptr().cast();
            header.msg_controllen = self.len_bytes as _;
        }
    }

    /// Has `header` receive messages here.
    pub fn receive_with(&mut self, header: &mut libc::msghdr) {
        header.msg_control = self.bytes.as_mut_ptr().cast();
        header.msg_controllen = N as _;
    }

    /// The data of the message of `level` and `kind` among the `len_bytes` the kernel wrote.
    pub fn find(&self, len_bytes: usize, level: c_int, kind: c_int) -> Option<&[u8]> {
        find(&self.bytes[..len_bytes.min(N)], level, kind)
    }
}

fn find(mut messages: &[u8], level: c_int, kind: c_int) -> Option<&[u8]> {
    loop {
        let (len, rest) = messages.split_first_chunk::<ALIGN>()?;
        let (its_level, rest) = rest.split_first_chunk::<4>()?;
        let (its_kind, _) = rest.split_first_chunk::<4>()?;
        let len = usize::from_ne_bytes(*len);
        let data = messages.get(HEADER_BYTES..len)?;
        if (c_int::from_ne_bytes(*its_level), c_int::from_ne_bytes(*its_kind)) == (level, kind) {
            return Some(data);
        }
        messages = messages.get(len.next_multiple_of(ALIGN)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_behind_others_of_any_length() {
        let mut control = Control::<128>::default();
        control.push(1, 2, &[7; 3]);
        control.push(3, 4, &[]);
        control.push(5, 6, &[9; 12]);
        let len = control.len_bytes;
        assert_eq!(control.find(len, 1, 2), Some(&[7; 3][..]));
        assert_eq!(control.find(len, 3, 4), Some(&[][..]));
        assert_eq!(control.find(len, 5, 6), Some(&[9; 12][..]));
        assert_eq!(control.find(len, 5, 2), None);
        for cut in 0..len - 4 {
            assert_eq!(control.find(cut, 5, 6), None, "{cut} bytes");
        }
    }

    #[test]
    fn a_length_that_cannot_be_ends_the_search() {
        for len in [0usize, 1, HEADER_BYTES - 1, 1000, usize::MAX] {
            let mut messages = len.to_ne_bytes().to_vec();
            messages.extend([0; 56]);
            assert_eq!(find(&messages, 1, 1), None);
        }
    }
}
