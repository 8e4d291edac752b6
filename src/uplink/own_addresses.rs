//! Whether an address is the host's own, asked once for each address and again after every change.
//!
//! The question goes to the kernel (an address of the host can be bound), never to a list of ours. Its
//! answers are kept until the kernel tells of a changed address or route over netlink, which is looked at
//! before each answer: a guest that connects again and again costs one `recv` and not three calls with a
//! socket of their own.
//!
//! May touch: sockets of its own. Read first: rtnetlink(7), `sys::routes`.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_sys::protocols::NETLINK_ROUTE;
use socket2::{Domain, Protocol, Socket, Type};

use super::sys::routes;
use crate::limits;

/// `RTMGRP_IPV4_IFADDR`, `RTMGRP_IPV4_ROUTE`, `RTMGRP_IPV6_IFADDR`, `RTMGRP_IPV6_ROUTE` of
/// `linux/rtnetlink.h`: addresses, and routes of type `local`.
const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;

/// What is known of addresses.
pub(super) struct OwnAddresses {
    /// Where changes are told; without it nothing is kept.
    news: Option<netlink_sys::Socket>,
    known: HashMap<IpAddr, bool>,
}

impl fmt::Debug for OwnAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnAddresses").field("known", &self.known).finish_non_exhaustive()
    }
}

impl OwnAddresses {
    /// Nothing known yet.
    pub(super) fn new() -> OwnAddresses {
        let news = listen().inspect_err(|error| {
            tracing::debug!(%error, "changes of the host's addresses are not told; each is asked for anew");
        });
        OwnAddresses { news: news.ok(), known: HashMap::new() }
    }

    /// Whether `addr` is the host's own.
    pub(super) fn contains(&mut self, addr: IpAddr) -> bool {
        // What is not known is refused.
        let Some(news) = &self.news else { return ask(addr).unwrap_or(true) };
        if has_news(news) {
            self.known.clear();
        }
        if let Some(known) = self.known.get(&addr) {
            return *known;
        }
        if self.known.len() >= limits::OWN_ADDRESSES_KNOWN_MAX {
            self.known.clear();
        }
        let Ok(is_own) = ask(addr) else { return true };
        self.known.insert(addr, is_own);
        is_own
    }
}

fn listen() -> io::Result<netlink_sys::Socket> {
    let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE)?;
    socket.set_non_blocking(true)?;
    socket.bind(&netlink_sys::SocketAddr::new(0, GROUPS))?;
    Ok(socket)
}

/// Messages read in a row: where there are more, there is news.
const NEWS_MAX: usize = 64;

/// Whether something changed since this was asked last. News that were lost (`ENOBUFS`) are news.
fn has_news(socket: &netlink_sys::Socket) -> bool {
    // Only that there is something counts, so each message is cut off.
    let mut message = [0u8; 16];
    for count in 0..NEWS_MAX {
        match socket.recv(&mut &mut message[..], 0) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return count > 0,
            _ => {}
        }
    }
    true
}

/// # Errors
/// There was no descriptor to ask with.
fn ask(addr: IpAddr) -> io::Result<bool> {
    // The host's own addresses can be bound.
    let at = SocketAddr::new(addr, 0);
    let probe = Socket::new(Domain::for_address(at), Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
    if probe.bind(&at.into()).is_err() {
        return Ok(false);
    }
    // With net.ipv4.ip_nonlocal_bind any address can be bound; the routes have the last word.
    match addr {
        IpAddr::V4(addr) => routes::leads_to_host(addr),
        IpAddr::V6(_) => Ok(true),
    }
}
