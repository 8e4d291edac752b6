//! UDP segmentation offload (`udp(7)`, UDP_SEGMENT).

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Has the kernel cut whatever is sent on `socket` into datagrams of `payload_bytes`.
///
/// # Errors
/// What the kernel answers: before Linux 4.18 there is no such option.
pub(crate) fn segment(socket: &UdpSocket, payload_bytes: u16) -> io::Result<()> {
    let value = libc::c_int::from(payload_bytes);
    let len = u32::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the option's value is an int we own, of the length given; the descriptor is open.
    let rc = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const value).cast(), len)
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
