//! What the kernel says of a TCP socket.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// `TCPI_OPT_ECN` of `TCP_INFO`'s options, which are its sixth byte (tcp(7)).
const OPTION_ECN: u8 = 8;

/// Whether both ends agreed on explicit congestion notification.
///
/// # Errors
/// The kernel's refusal.
pub fn has_ecn(stream: &TcpStream) -> io::Result<bool> {
    let mut info = [0u8; 8];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into the live array.
    let outcome = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if outcome == 0 { Ok(info[5] & OPTION_ECN != 0) } else { Err(io::Error::last_os_error()) }
}
