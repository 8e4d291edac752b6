//! Vectored system calls and socket options on host sockets.
//!
//! The segments handed to the kernel may lie in guest memory; the kernel checks every access itself
//! and answers a bad one with `EFAULT`, so no guest can make these calls unsound.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, c_void, iovec, socklen_t};
use socket2::{SockAddr, SockAddrStorage};

use super::control::Control;
use crate::engine::host_net::Arrival;

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

/// How one datagram, or several cut from one payload, leave.
#[derive(Clone, Copy, Debug, Default)]
pub struct DatagramCall {
    /// Length of each but the last (`UDP_SEGMENT`, udp(7), since Linux 4.18); one datagram if `None`.
    pub segment_bytes: Option<u16>,
    /// The host's address they come from (`IP_PKTINFO`, ip(7)); the kernel picks one if `None`.
    pub from: Option<Ipv4Addr>,
}

/// `sendmsg` of the segments as datagrams, without blocking.
///
/// # Errors
/// The kernel's; `EINVAL`, `EIO` or `EMSGSIZE` where the route or device cannot cut.
pub fn send_datagrams(
    fd: BorrowedFd<'_>,
    segments: &mut [iovec],
    to: &SockAddr,
    call: DatagramCall,
) -> io::Result<usize> {
    let mut control = Control::<DATAGRAM_CONTROL_BYTES>::default();
    if let Some(segment_bytes) = call.segment_bytes {
        control.push(libc::SOL_UDP, libc::UDP_SEGMENT, &segment_bytes.to_ne_bytes());
    }
    if let Some(from) = call.from {
        // struct in_pktinfo: no interface, the source, nothing.
        let mut info = [0u8; PKTINFO_BYTES];
        info[PKTINFO_LOCAL].copy_from_slice(&from.octets());
        control.push(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
    }
    let mut header = header(segments);
    header.msg_name = to.as_ptr().cast_mut().cast();
    header.msg_namelen = to.len();
    control.send_with(&mut header);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header` names live segments, address and control buffer; the kernel only reads them.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &header, flags) })
}

/// Room for the control messages of one call with datagrams: three of at most 16 bytes and their headers.
const DATAGRAM_CONTROL_BYTES: usize = 96;
/// Length of `struct in_pktinfo`, and where the host's own address stands in it.
const PKTINFO_BYTES: usize = 12;
const PKTINFO_LOCAL: std::ops::Range<usize> = 4..8;

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
    local: Option<Ipv4Addr>,
    tos: u8,
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
        let none = Message { from: None, local: None, tos: 0, len_bytes: 0, segment_bytes: 0 };
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
        let mut controls = [Control::<DATAGRAM_CONTROL_BYTES>::default(); MESSAGES_MAX];
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
            control.receive_with(&mut header.msg_hdr);
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
            let len = headers[n].msg_hdr.msg_controllen;
            let segment = controls[n].find(len, libc::SOL_UDP, libc::UDP_GRO).and_then(length);
            message.segment_bytes = segment.filter(|len| *len > 0).unwrap_or(message.len_bytes);
            message.local = controls[n].find(len, libc::IPPROTO_IP, libc::IP_PKTINFO).and_then(local);
            let tos = controls[n].find(len, libc::IPPROTO_IP, libc::IP_TOS);
            message.tos = tos.and_then(|data| data.first().copied()).unwrap_or(0);
        }
        Ok(count)
    }

    /// Message `n` of the last read; `None` for a sender that is not an IP address.
    pub fn message(&self, n: usize) -> Option<Arrival<'_>> {
        let message = &self.messages[n];
        let at = n * MESSAGE_BYTES_MAX;
        Some(Arrival {
            from: message.from?,
            to: message.local.map(IpAddr::V4),
            tos: message.tos,
            bytes: &self.buffer[at..at + message.len_bytes],
            segment_bytes: message.segment_bytes,
        })
    }
}

/// The length in a `UDP_GRO` message.
fn length(data: &[u8]) -> Option<usize> {
    let value = c_int::from_ne_bytes(*data.first_chunk()?);
    usize::try_from(value).ok()
}

/// The host's own address in an `IP_PKTINFO` message.
fn local(data: &[u8]) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = data.get(PKTINFO_LOCAL)?.try_into().ok()?;
    Some(Ipv4Addr::from(octets)).filter(|addr| !addr.is_unspecified())
}

/// Has the kernel say which of the host's addresses a datagram came to (`IP_PKTINFO`, ip(7)).
///
/// # Errors
/// The kernel's.
pub fn tell_addresses(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
}

/// Has the kernel say with each datagram what its packet had as differentiated services and ECN
/// (`IP_RECVTOS`, ip(7)).
///
/// # Errors
/// The kernel's.
pub fn tell_tos(fd: BorrowedFd<'_>) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)
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

/// Whether the kernel cuts messages into datagrams (`UDP_SEGMENT`, udp(7), since Linux 4.18).
pub fn knows_segmentation(fd: BorrowedFd<'_>) -> bool {
    set_option(fd, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
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

/// How many bytes a stream socket waits for before it is readable (`SO_RCVLOWAT`, socket(7)); its receive
/// buffer grows to hold them (Linux 4.18).
///
/// # Errors
/// The kernel's.
pub fn set_low_water(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = c_int::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
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

/// Whether a connected TCP socket and its peer agreed on ECN (`TCPI_OPT_ECN` of tcp(7)'s `TCP_INFO`).
pub fn uses_ecn(fd: BorrowedFd<'_>) -> bool {
    const TCPI_OPT_ECN: u8 = 8;
    // The first eight bytes: state, congestion state, retransmits, probes, backoff, options, and two more.
    let mut info = [0u8; 8];
    let mut len = info.len() as socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into the live array.
    let outcome = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    outcome == 0 && len as usize >= 6 && info[5] & TCPI_OPT_ECN != 0
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
