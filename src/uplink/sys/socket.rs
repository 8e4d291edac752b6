//! Vectored system calls and socket options on host sockets.
//!
//! The segments handed to the kernel may lie in guest memory; the kernel checks every access itself
//! and answers a bad one with `EFAULT`, so no guest can make these calls unsound.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_void, iovec, socklen_t};
use socket2::{SockAddr, SockAddrStorage};

/// Bytes queued and allowed in a socket's send queue, headers and the like charged too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendMemory {
    /// In a TCP socket's queue, sent and not acknowledged included: what its kernel judges by.
    pub queued_bytes: usize,
    /// In buffers that belong to the socket, wherever they are: what a local socket is judged by. For
    /// TCP it counts copies on their way through devices too.
    pub allocated_bytes: usize,
    /// Where the kernel starts to refuse.
    pub limit_bytes: usize,
}

fn check(result: isize) -> io::Result<usize> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
}

fn header(segments: &mut [iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data, for which all zeroes is valid (no name, no control).
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = segments.as_mut_ptr();
    header.msg_iovlen = segments.len() as _;
    header
}

/// `sendmsg` of the segments, without blocking or SIGPIPE; to `to` if given.
///
/// # Errors
/// The kernel's.
pub fn send_segments(fd: BorrowedFd<'_>, segments: &mut [iovec], to: Option<&SockAddr>) -> io::Result<usize> {
    let mut header = header(segments);
    if let Some(to) = to {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len();
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header` names live segments and a live address; the kernel only reads them.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &header, flags) })
}

/// `recvmsg` into the segments, without blocking, with further `flags`.
///
/// # Errors
/// The kernel's.
pub fn recv_segments(fd: BorrowedFd<'_>, segments: &mut [iovec], flags: c_int) -> io::Result<usize> {
    let mut header = header(segments);
    // SAFETY: `header` names segments that the caller reserved for writing; the kernel writes no
    // further than each one's length.
    check(unsafe { libc::recvmsg(fd.as_raw_fd(), &mut header, flags | libc::MSG_DONTWAIT) })
}

/// `sendmsg` of the segments as datagrams of `segment_bytes` each but the last (`UDP_SEGMENT`,
/// udp(7), since Linux 4.18).
///
/// # Errors
/// The kernel's; `EINVAL`, `EIO` or `EMSGSIZE` where the route or device cannot.
pub fn send_datagrams(
    fd: BorrowedFd<'_>,
    segments: &mut [iovec],
    to: &SockAddr,
    segment_bytes: u16,
) -> io::Result<usize> {
    let mut control = Control::default();
    let mut header = header(segments);
    header.msg_name = to.as_ptr().cast_mut().cast();
    header.msg_namelen = to.len();
    control.attach(&mut header);
    control.set(libc::UDP_SEGMENT, segment_bytes);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header` names live segments, address and control buffer; the kernel only reads them.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &header, flags) })
}

/// Room for one control message of an integer, laid out as `CMSG_SPACE(sizeof(int))`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
struct Control {
    len: usize,
    level: c_int,
    kind: c_int,
    data: [u8; 8],
}

impl Control {
    /// Length of a control message's header, `CMSG_LEN(0)`.
    const HEADER_BYTES: usize = size_of::<usize>() + 2 * size_of::<c_int>();

    fn attach(&mut self, header: &mut libc::msghdr) {
        header.msg_control = (&raw mut *self).cast();
        header.msg_controllen = size_of::<Control>() as _;
    }

    fn set(&mut self, kind: c_int, value: u16) {
        self.len = Control::HEADER_BYTES + size_of::<u16>();
        self.level = libc::SOL_UDP;
        self.kind = kind;
        self.data[..2].copy_from_slice(&value.to_ne_bytes());
    }

    /// The integer of a message of `kind`, if that is what the kernel put here.
    fn get(&self, kind: c_int) -> Option<usize> {
        let is_it = self.level == libc::SOL_UDP
            && self.kind == kind
            && self.len >= Control::HEADER_BYTES + size_of::<c_int>();
        let value = c_int::from_ne_bytes([self.data[0], self.data[1], self.data[2], self.data[3]]);
        is_it.then_some(value).and_then(|value| usize::try_from(value).ok())
    }
}

/// Messages of one [`DatagramReader::read`].
pub const MESSAGES_MAX: usize = 16;
/// Longest message: the largest UDP payload, which is also the most the kernel coalesces.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Reads datagrams in batches (`recvmmsg`), coalesced ones as they come (`UDP_GRO`).
pub struct DatagramReader {
    buffer: Box<[u8]>,
    messages: Box<[Message; MESSAGES_MAX]>,
}

#[derive(Clone, Copy)]
struct Message {
    from: Option<SocketAddr>,
    len_bytes: usize,
    segment_bytes: usize,
}

impl std::fmt::Debug for DatagramReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DatagramReader").finish_non_exhaustive()
    }
}

impl Default for DatagramReader {
    fn default() -> DatagramReader {
        let none = Message { from: None, len_bytes: 0, segment_bytes: 0 };
        DatagramReader {
            buffer: vec![0; MESSAGES_MAX * MESSAGE_BYTES_MAX].into_boxed_slice(),
            messages: Box::new([none; MESSAGES_MAX]),
        }
    }
}

impl DatagramReader {
    /// Reads what waits, at most `messages_max` messages, without blocking; returns the count of messages, to be had with
    /// [`DatagramReader::message`].
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if nothing waits.
    pub fn read(&mut self, fd: BorrowedFd<'_>, messages_max: usize) -> io::Result<usize> {
        let base = self.buffer.as_mut_ptr();
        let mut names: [SockAddrStorage; MESSAGES_MAX] = std::array::from_fn(|_| SockAddrStorage::zeroed());
        let mut controls = [Control::default(); MESSAGES_MAX];
        let mut segments: [iovec; MESSAGES_MAX] = std::array::from_fn(|n| iovec {
            iov_base: base.wrapping_add(n * MESSAGE_BYTES_MAX).cast(),
            iov_len: MESSAGE_BYTES_MAX,
        });
        let mut headers: [libc::mmsghdr; MESSAGES_MAX] = std::array::from_fn(|n| {
            let mut header = header(&mut segments[n..=n]);
            header.msg_name = (&raw mut names[n]).cast();
            header.msg_namelen = names[n].size_of();
            libc::mmsghdr { msg_hdr: header, msg_len: 0 }
        });
        for (header, control) in headers.iter_mut().zip(&mut controls) {
            control.attach(&mut header.msg_hdr);
        }
        let (pointer, count) = (headers.as_mut_ptr(), messages_max.min(MESSAGES_MAX) as u32);
        // SAFETY: every header names live storage of the length it says: a part of the buffer, an
        // address and a control message of its own.
        let result = unsafe {
            libc::recvmmsg(fd.as_raw_fd(), pointer, count, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        let count = check(result as isize)?;
        for (n, name) in names.into_iter().enumerate().take(count) {
            let message = &mut self.messages[n];
            // SAFETY: the kernel wrote an address of `msg_namelen` bytes into the storage.
            let from = unsafe { SockAddr::new(name, headers[n].msg_hdr.msg_namelen) };
            message.from = from.as_socket();
            message.len_bytes = (headers[n].msg_len as usize).min(MESSAGE_BYTES_MAX);
            let coalesced = headers[n].msg_hdr.msg_controllen as usize >= Control::HEADER_BYTES;
            let segment = if coalesced { controls[n].get(libc::UDP_GRO) } else { None };
            message.segment_bytes = segment.filter(|len| *len > 0).unwrap_or(message.len_bytes);
        }
        Ok(count)
    }

    /// Message `n` of the last read: sender, bytes and the length of each datagram in them. `None` for
    /// a sender that is not an IP address.
    pub fn message(&self, n: usize) -> Option<(SocketAddr, &[u8], usize)> {
        let message = &self.messages[n];
        let at = n * MESSAGE_BYTES_MAX;
        Some((message.from?, &self.buffer[at..at + message.len_bytes], message.segment_bytes))
    }
}

/// Has the kernel keep what the network says of datagrams sent (`IP_RECVERR`, ip(7)).
///
/// # Errors
/// The kernel's.
pub fn keep_errors(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_IP, libc::IP_RECVERR, 1)
}

/// Lets the kernel hand over coalesced datagrams (`UDP_GRO`, udp(7), since Linux 5.0).
///
/// # Errors
/// `ENOPROTOOPT` where it cannot.
pub fn allow_coalescing(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Removes `len_bytes` from the front of a TCP socket's receive queue without copying them
/// (`MSG_TRUNC`, tcp(7)).
///
/// # Errors
/// The kernel's.
pub fn discard_tcp(fd: BorrowedFd<'_>, len_bytes: usize) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: with MSG_TRUNC a TCP socket writes nothing to the buffer, so a null one is allowed.
    check(unsafe { libc::recv(fd.as_raw_fd(), std::ptr::null_mut(), len_bytes, flags) })
}

/// Sets where the next peek begins (`SO_PEEK_OFF`, socket(7); TCP since Linux 6.9), -1 for off.
///
/// # Errors
/// `EOPNOTSUPP` where the socket does not know it.
pub fn set_peek_offset(fd: BorrowedFd<'_>, offset_bytes: c_int) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset_bytes)
}

/// Whether datagrams may be fragmented, here and on their way, or are refused with `EMSGSIZE` where they
/// exceed the path's MTU (`IP_MTU_DISCOVER`, ip(7)).
///
/// # Errors
/// The kernel's.
pub fn set_dont_fragment(fd: BorrowedFd<'_>, dont_fragment: bool) -> io::Result<()> {
    let value = if dont_fragment { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
    set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value)
}

/// What is known of the MTU of a connected socket's path, in bytes (`IP_MTU`, ip(7)).
pub fn path_mtu(fd: BorrowedFd<'_>) -> Option<u16> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as socklen_t;
    let pointer = (&raw mut value).cast::<c_void>();
    // SAFETY: `pointer` has room for `len` bytes, and the kernel writes no more.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_IP, libc::IP_MTU, pointer, &mut len) };
    // Loopback's 65,536 is more than any packet.
    (result == 0 && value > 0).then(|| u16::try_from(value).unwrap_or(u16::MAX))
}

fn set_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let pointer = (&raw const value).cast::<c_void>();
    // SAFETY: `pointer` is a live `c_int` and the length says so.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, pointer, size_of::<c_int>() as socklen_t) };
    check(result as isize).map(|_| ())
}

/// What lies in the send queue (`SO_MEMINFO`, since Linux 4.12). `None` where it is not known.
pub fn send_memory(fd: BorrowedFd<'_>) -> Option<SendMemory> {
    // include/uapi/linux/sock_diag.h: rmem_alloc, rcvbuf, wmem_alloc, sndbuf, fwd_alloc,
    // wmem_queued, optmem, backlog, drops.
    const WMEM_ALLOC: usize = 2;
    const SNDBUF: usize = 3;
    const WMEM_QUEUED: usize = 5;
    let mut info = [0u32; 9];
    let mut len = size_of_val(&info) as socklen_t;
    let pointer = info.as_mut_ptr().cast::<c_void>();
    // SAFETY: `pointer` has room for `len` bytes, and the kernel writes no more.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MEMINFO, pointer, &mut len) };
    (result == 0).then_some(SendMemory {
        queued_bytes: info[WMEM_QUEUED] as usize,
        allocated_bytes: info[WMEM_ALLOC] as usize,
        limit_bytes: info[SNDBUF] as usize,
    })
}

/// What a stream's peer has done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerState {
    /// It may send more.
    Open,
    /// It sent FIN.
    Closed,
    /// It sent RST, or the connection failed otherwise.
    Failed,
}

/// The state of a stream's peer (poll(2)). Does not take the socket's error away.
pub fn peer_state(fd: BorrowedFd<'_>) -> PeerState {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one live `pollfd`, and no waiting.
    let count = unsafe { libc::poll(&mut poll, 1, 0) };
    match poll.revents {
        _ if count != 1 => PeerState::Open,
        events if events & libc::POLLERR != 0 => PeerState::Failed,
        events if events & (libc::POLLRDHUP | libc::POLLHUP) != 0 => PeerState::Closed,
        _ => PeerState::Open,
    }
}

/// Raises the soft limit of open files to the hard one; returns the limit now in force.
pub fn raise_open_files_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is live and of the type asked for.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return 1024;
    }
    let soft = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is live; a refusal leaves the limit as it is.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0;
    if raised { limit.rlim_max } else { soft }
}
