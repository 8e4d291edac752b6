//! News of what a named network leans on: rules of the firewall, links, addresses, routes and settings of
//! interfaces, each told by the kernel over netlink as it changes.
//!
//! What changed is not read: whoever is told looks at all of it, because looking is what says whether
//! anything is amiss.
//!
//! May touch: netlink sockets. Read first: netlink(7), `linux/netfilter/nfnetlink.h`, `linux/rtnetlink.h`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};

/// The bit of `NFNLGRP_NFTABLES` (7).
const FIREWALL_GROUPS: u32 = 1 << 6;
/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV4_RULE`, and the bit of
/// `RTNLGRP_IPV4_NETCONF` (24).
const ROUTE_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 1 << 23;
/// More than the kernel puts into one datagram.
const BUFFER_BYTES: usize = 64 << 10;
/// Datagrams taken at once.
const READS_MAX: usize = 256;

/// One kind of news.
pub struct NetworkNews {
    socket: Socket,
    buffer: Box<[u8]>,
}

impl std::fmt::Debug for NetworkNews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetworkNews").finish_non_exhaustive()
    }
}

impl AsFd for NetworkNews {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl NetworkNews {
    /// Of the firewall's rules.
    ///
    /// # Errors
    /// No socket; `PermissionDenied` without CAP_NET_ADMIN.
    pub fn of_firewall() -> io::Result<NetworkNews> {
        NetworkNews::of(NETLINK_NETFILTER, FIREWALL_GROUPS)
    }

    /// Of links, addresses, routes, rules that choose among tables of them, and forwarding.
    ///
    /// # Errors
    /// No socket.
    pub fn of_routes() -> io::Result<NetworkNews> {
        NetworkNews::of(NETLINK_ROUTE, ROUTE_GROUPS)
    }

    fn of(protocol: isize, groups: u32) -> io::Result<NetworkNews> {
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        Ok(NetworkNews { socket, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() })
    }

    /// Takes what waits.
    ///
    /// # Errors
    /// `WouldBlock` if nothing waits; anything else ends the news.
    pub fn read(&mut self) -> io::Result<()> {
        for count in 0..READS_MAX {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && count > 0 => break,
                // Some were lost, which is news too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
