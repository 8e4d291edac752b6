//! Raw Ethernet frames on an interface (`packet(7)`).

use std::ffi::CString;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// A socket that sends and receives whole frames on one interface.
#[derive(Debug)]
pub(crate) struct RawLink(Socket);

impl RawLink {
    /// Opens the interface `name` of the calling thread's network namespace.
    ///
    /// # Errors
    /// If there is no such interface or the caller lacks `CAP_NET_RAW`.
    pub(crate) fn open(name: &str) -> io::Result<RawLink> {
        // ETH_P_ALL in network byte order (packet(7)).
        let all = (libc::ETH_P_ALL as u16).to_be();
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(all))))?;
        let name = CString::new(name).map_err(io::Error::other)?;
        // SAFETY: the name is NUL-terminated.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        let addr = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: all,
            sll_ifindex: i32::try_from(index).map_err(io::Error::other)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let len = u32::try_from(size_of_val(&addr)).map_err(io::Error::other)?;
        // SAFETY: the address is a sockaddr_ll we own, of the length given.
        let rc = unsafe { libc::bind(socket.as_raw_fd(), (&raw const addr).cast(), len) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(RawLink(socket)) }
    }

    /// Sends one frame.
    ///
    /// # Errors
    /// What the kernel answers.
    pub(crate) fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.write_all(frame)
    }

    /// Receives one frame (those sent by this machine included) into `buf`; its length in bytes.
    ///
    /// # Errors
    /// `WouldBlock` if none comes within `timeout`.
    pub(crate) fn receive(&mut self, buf: &mut [u8], timeout: Duration) -> io::Result<usize> {
        self.0.set_read_timeout(Some(timeout))?;
        self.0.read(buf)
    }
}
