//! News of the host's network: whether the way to the world, or an address of the host, is another now.
//!
//! The kernel tells of links, addresses, routes and rules over netlink, also of much that changes nothing:
//! lifetimes refreshed by router advertisements, statistics, scans for wireless networks, containers coming
//! and going. So what matters of each is remembered (first of all as it is at the start), and only a
//! difference is news. Left out are addresses and routes of a single link, the kernel's own `local` routes
//! and what it caches, and links that nothing leads over, such as a container's. When an interface goes down
//! its IPv4 routes go without a word; therefore a link's change makes its routes news when they are told of
//! again.
//!
//! May touch: a netlink socket. Read first: netlink(7), rtnetlink(7).

use std::fmt;
use std::hash::BuildHasher;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use hashbrown::HashMap;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::limits;

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR`, `_ROUTE`, `_RULE`, `RTMGRP_IPV6_IFADDR`, `_ROUTE` and the bit of
/// `RTNLGRP_IPV6_RULE` (19), of `linux/rtnetlink.h`.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

/// Message types of `linux/netlink.h` and `linux/rtnetlink.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
/// `NLM_F_REQUEST` and `NLM_F_DUMP`.
const REQUEST_DUMP: u16 = 0x1 | 0x300;
/// `NLM_F_REPLACE`, in news of a route: what it replaced is gone without a word.
const REPLACE: u16 = 0x100;

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// More than the kernel puts into one datagram.
const BUFFER_BYTES: usize = 64 << 10;
/// Datagrams taken at once.
const READS_MAX: usize = 64;

/// What changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// A link, address, route or rule: packets may take another way.
    pub way: bool,
    /// An address is the host's no more.
    pub address_gone: bool,
}

/// Something remembered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Item {
    Link(u32),
    /// Interface, prefix length, and address as it is on the wire.
    Address(u32, u8, Vec<u8>),
    /// A hash of what makes the route; its state is the interface it leads over, 0 if there are several.
    Route(u64),
}

/// The kernel's news, and what was known before.
pub struct HostNews {
    socket: Socket,
    known: Known,
    /// What is still to be asked for at the start, one after the other.
    to_ask: &'static [u16],
    buffer: Box<[u8]>,
}

impl fmt::Debug for HostNews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostNews").field("known", &self.known.items.len()).finish_non_exhaustive()
    }
}

impl AsFd for HostNews {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl HostNews {
    /// Listens from now on. How things are at present is asked for and is no news.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn new() -> io::Result<HostNews> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, GROUPS))?;
        let known = Known { learning: true, ..Known::default() };
        let to_ask = &[RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE];
        let mut news = HostNews { socket, known, to_ask, buffer: vec![0; BUFFER_BYTES].into_boxed_slice() };
        news.ask_next()?;
        Ok(news)
    }

    /// Asks for the next kind of thing, or ends learning.
    fn ask_next(&mut self) -> io::Result<()> {
        let Some((kind, rest)) = self.to_ask.split_first() else {
            self.known.learning = false;
            return Ok(());
        };
        self.to_ask = rest;
        // A header and a `struct rtgenmsg` for all families, padded to 4 bytes.
        const REQUEST_BYTES: usize = HEADER_BYTES + 4;
        let mut request = [0; REQUEST_BYTES];
        request[..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
        request[4..6].copy_from_slice(&kind.to_ne_bytes());
        request[6..8].copy_from_slice(&REQUEST_DUMP.to_ne_bytes());
        self.socket.send(&request, 0).map(drop)
    }

    /// Whether how things are at the start is known by now.
    pub fn is_ready(&self) -> bool {
        !self.known.learning
    }

    /// Takes what waits; returns what it changed.
    ///
    /// # Errors
    /// `WouldBlock` if nothing waits; anything else ends the news.
    pub fn read(&mut self) -> io::Result<Change> {
        let mut change = Change::default();
        for count in 0..READS_MAX {
            let len = match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(len) => len.min(self.buffer.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && count > 0 => break,
                // Some were lost: anything may have changed.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.known.items.clear();
                    change = Change { way: true, address_gone: true };
                    continue;
                }
                Err(error) => return Err(error),
            };
            if self.known.take(&self.buffer[..len], &mut change) {
                self.ask_next()?;
            }
        }
        Ok(change)
    }
}

/// What was told so far.
#[derive(Debug, Default)]
struct Known {
    items: HashMap<Item, u32, foldhash::quality::RandomState>,
    /// As long as it is, nothing is news.
    learning: bool,
}

impl Known {
    /// Takes a datagram of messages; returns whether an answer to a question ended in it.
    fn take(&mut self, mut datagram: &[u8], change: &mut Change) -> bool {
        let mut is_done = false;
        while let Some(header) = datagram.first_chunk::<HEADER_BYTES>() {
            let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let (kind, flags) = (ne16(header, 4), ne16(header, 6));
            let Some(body) = datagram.get(HEADER_BYTES..len) else { break };
            let told = self.message(kind, flags, body).unwrap_or_default();
            if !self.learning {
                change.way |= told.way;
                change.address_gone |= told.address_gone;
            }
            is_done |= matches!(kind, NLMSG_DONE | NLMSG_ERROR);
            datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        is_done
    }

    /// One message; `None` if it is not understood.
    fn message(&mut self, kind: u16, flags: u16, body: &[u8]) -> Option<Change> {
        let way = match kind {
            RTM_NEWLINK | RTM_DELLINK => self.link(kind == RTM_NEWLINK, body)?,
            RTM_NEWADDR => self.set(address(body)?),
            RTM_DELADDR => {
                let way = self.items.remove(&address(body)?.0).is_some();
                return Some(Change { way, address_gone: way });
            }
            RTM_NEWROUTE => self.set(route(body)?) || flags & REPLACE != 0,
            RTM_DELROUTE => {
                self.items.remove(&route(body)?.0);
                true
            }
            RTM_NEWRULE | RTM_DELRULE => true,
            _ => false,
        };
        Some(Change { way, address_gone: false })
    }

    /// `struct ifinfomsg`: whether the link can be used. News if something leads over it.
    fn link(&mut self, exists: bool, body: &[u8]) -> Option<bool> {
        /// `IFF_UP`, `IFF_RUNNING` and `IFF_LOWER_UP` of `linux/if.h`.
        const USABLE: u32 = 0x1 | 0x40 | 0x1_0000;
        let index = ne32(body, 4)?;
        let (item, flags) = (Item::Link(index), ne32(body, 8)? & USABLE);
        let is_other = if exists { self.set((item, flags)) } else { self.items.remove(&item).is_some() };
        let before = self.items.len();
        let mut has_address = false;
        if is_other && !self.learning {
            self.items.retain(|item, over| match item {
                Item::Route(_) => *over != index && *over != 0,
                Item::Address(of, ..) => {
                    has_address |= *of == index;
                    true
                }
                Item::Link(_) => true,
            });
        }
        Some(has_address || self.items.len() < before)
    }

    /// Remembers an item; returns whether that is news.
    fn set(&mut self, (item, state): (Item, u32)) -> bool {
        if self.items.len() >= limits::HOST_ITEMS_KNOWN_MAX && !self.items.contains_key(&item) {
            self.items.clear();
        }
        self.items.insert(item, state) != Some(state)
    }
}

/// `struct ifaddrmsg` and its attributes: an address that reaches beyond its link, and its state.
fn address(body: &[u8]) -> Option<(Item, u32)> {
    const RT_SCOPE_LINK: u8 = 253;
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    /// `IFA_F_DEPRECATED`, `IFA_F_TENTATIVE`: not to be used for what begins.
    const UNUSABLE: u32 = 0x20 | 0x40;
    let [_, prefix_len, flags, scope, ..] = *body.first_chunk::<8>()?;
    if scope >= RT_SCOPE_LINK {
        return None;
    }
    let (mut own, mut other) = (None, None);
    attributes(body.get(8..)?, |kind, data| match kind {
        IFA_LOCAL => own = Some(data.to_vec()),
        // Of a point-to-point link the other end's, else the same.
        IFA_ADDRESS => other = Some(data.to_vec()),
        _ => {}
    });
    let item = Item::Address(ne32(body, 4)?, prefix_len, own.or(other)?);
    Some((item, u32::from(flags) & UNUSABLE))
}

/// `struct rtmsg` and its attributes: a route that leads beyond the host and its links, and over which
/// interface.
fn route(body: &[u8]) -> Option<(Item, u32)> {
    const RTM_F_CLONED: u32 = 0x200;
    const RTN_LOCAL: u8 = 2;
    const RTN_MULTICAST: u8 = 5;
    const RTA_DST: u16 = 1;
    const RTA_OIF: u16 = 4;
    const RTA_CACHEINFO: u16 = 12;
    const RTA_EXPIRES: u16 = 23;
    let fixed = body.first_chunk::<12>()?;
    let (family, kind) = (fixed[0], fixed[7]);
    if (RTN_LOCAL..=RTN_MULTICAST).contains(&kind) || ne32(body, 8)? & RTM_F_CLONED != 0 {
        return None;
    }
    // Without the protocol (who made it) and the flags (such as whether the link is down, told apart).
    let mut essence = fixed[..5].to_vec();
    essence.push(kind);
    let (mut is_of_link, mut over) = (false, 0);
    attributes(&body[12..], |kind, data| {
        // fe80::/10 and ff00::/8.
        is_of_link |= kind == RTA_DST && i32::from(family) == libc::AF_INET6 && data[0] >= 0xfe;
        if kind == RTA_OIF {
            over = ne32(data, 0).unwrap_or_default();
        }
        if !matches!(kind, RTA_CACHEINFO | RTA_EXPIRES) {
            essence.extend(kind.to_ne_bytes());
            essence.extend(data);
        }
    });
    let hash = foldhash::quality::FixedState::with_seed(0).hash_one(essence);
    (!is_of_link).then_some((Item::Route(hash), over))
}

/// Hands kind and data of each attribute (`struct rtattr`) that has data to `each`.
fn attributes(mut bytes: &[u8], mut each: impl FnMut(u16, &[u8])) {
    while bytes.len() >= 4 {
        let len = usize::from(ne16(bytes, 0));
        let Some(data) = bytes.get(4..len) else { return };
        if !data.is_empty() {
            each(ne16(bytes, 2), data);
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn ne16(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn ne32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
        let mut bytes = ((4 + data.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(index: u32, flags: u32) -> Vec<u8> {
        [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), [0; 4]].concat()
    }

    /// 192.0.2.`last`/24 on interface 2.
    fn addr(last: u8, flags: u8, scope: u8, lifetime: u8) -> Vec<u8> {
        let mut body = vec![2, 24, flags, scope];
        body.extend(2u32.to_ne_bytes());
        body.extend(attribute(1, &[192, 0, 2, last]));
        body.extend(attribute(6, &[lifetime; 16]));
        body
    }

    /// A default route through 192.0.2.`gateway` over interface 2.
    fn default_route(gateway: u8, age: u8) -> Vec<u8> {
        let mut body = vec![2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        body.extend(attribute(4, &2u32.to_ne_bytes()));
        body.extend(attribute(5, &[192, 0, 2, gateway]));
        body.extend(attribute(12, &[age; 32]));
        body
    }

    fn take(known: &mut Known, kind: u16, body: &[u8]) -> Change {
        let mut change = Change::default();
        known.take(&message(kind, 0, body), &mut change);
        change
    }

    const NOTHING: Change = Change { way: false, address_gone: false };
    const WAY: Change = Change { way: true, address_gone: false };
    const GONE: Change = Change { way: true, address_gone: true };

    #[test]
    fn only_a_difference_is_news() {
        let mut known = Known::default();
        assert_eq!(take(&mut known, RTM_NEWADDR, &addr(1, 0, 0, 1)), WAY);
        assert_eq!(take(&mut known, RTM_NEWADDR, &addr(1, 0, 0, 2)), NOTHING, "its lifetime only");
        assert_eq!(take(&mut known, RTM_NEWADDR, &addr(1, 0x20, 0, 2)), WAY, "deprecated");
        assert_eq!(take(&mut known, RTM_NEWADDR, &addr(2, 0, 253, 1)), NOTHING, "of the link");
        assert_eq!(take(&mut known, RTM_DELADDR, &addr(2, 0, 253, 1)), NOTHING);
        assert_eq!(take(&mut known, RTM_DELADDR, &addr(1, 0, 0, 1)), GONE);
        assert_eq!(take(&mut known, RTM_NEWROUTE, &default_route(1, 0)), WAY);
        assert_eq!(take(&mut known, RTM_NEWROUTE, &default_route(1, 9)), NOTHING, "its age only");
        assert_eq!(take(&mut known, RTM_NEWROUTE, &default_route(2, 9)), WAY);
        assert_eq!(take(&mut known, RTM_DELROUTE, &default_route(2, 9)), WAY);
        assert_eq!(take(&mut known, RTM_NEWRULE, &[0; 12]), WAY);
    }

    #[test]
    fn routes_of_the_host_itself_and_of_one_link_are_no_news() {
        let mut known = Known::default();
        let mut local = default_route(1, 0);
        local[7] = 2;
        assert_eq!(take(&mut known, RTM_NEWROUTE, &local), NOTHING);
        let mut cloned = default_route(1, 0);
        cloned[8..12].copy_from_slice(&0x200u32.to_ne_bytes());
        assert_eq!(take(&mut known, RTM_NEWROUTE, &cloned), NOTHING);
        let mut of_link = vec![10, 64, 0, 0, 254, 2, 0, 1, 0, 0, 0, 0];
        of_link.extend(attribute(1, &[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(take(&mut known, RTM_NEWROUTE, &of_link), NOTHING);
    }

    #[test]
    fn a_link_counts_by_whether_it_can_be_used_and_makes_its_routes_news_again() {
        let mut known = Known::default();
        take(&mut known, RTM_NEWLINK, &link(2, 0x1_0043));
        take(&mut known, RTM_NEWADDR, &addr(1, 0, 0, 1));
        take(&mut known, RTM_NEWROUTE, &default_route(1, 0));
        assert_eq!(take(&mut known, RTM_NEWLINK, &link(2, 0x1_1043)), NOTHING, "a flag of no concern");
        assert_eq!(take(&mut known, RTM_NEWLINK, &link(2, 0x1002)), WAY, "down");
        assert_eq!(take(&mut known, RTM_NEWLINK, &link(2, 0x1_0043)), WAY, "up");
        assert_eq!(take(&mut known, RTM_NEWROUTE, &default_route(1, 0)), WAY, "it was gone without a word");
        assert_eq!(take(&mut known, RTM_DELADDR, &addr(1, 0, 0, 1)), GONE);
        assert_eq!(take(&mut known, RTM_DELLINK, &link(2, 0)), WAY, "a route leads over it");
        assert_eq!(take(&mut known, RTM_DELLINK, &link(2, 0)), NOTHING);
    }

    #[test]
    fn a_link_nothing_leads_over_is_no_news_and_takes_no_route_along() {
        let mut known = Known::default();
        take(&mut known, RTM_NEWADDR, &addr(1, 0, 0, 1));
        take(&mut known, RTM_NEWROUTE, &default_route(1, 0));
        for flags in [0x1002, 0x1_0043, 0x1003] {
            assert_eq!(take(&mut known, RTM_NEWLINK, &link(7, flags)), NOTHING);
        }
        assert_eq!(take(&mut known, RTM_DELLINK, &link(7, 0)), NOTHING);
        assert_eq!(take(&mut known, RTM_NEWROUTE, &default_route(1, 0)), NOTHING);
    }

    #[test]
    fn a_route_put_in_place_of_another_is_news_though_it_was_known() {
        let mut known = Known::default();
        for (gateway, flags) in [(1, 0), (2, REPLACE), (1, REPLACE)] {
            let mut change = Change::default();
            known.take(&message(RTM_NEWROUTE, flags, &default_route(gateway, 0)), &mut change);
            assert_eq!(change, WAY, "{gateway}");
        }
    }

    #[test]
    fn what_is_learned_at_the_start_is_no_news() {
        let mut known = Known { learning: true, ..Known::default() };
        let all = [message(RTM_NEWADDR, 2, &addr(1, 0, 0, 1)), message(NLMSG_DONE, 2, &[0; 4])].concat();
        let mut change = Change::default();
        assert!(known.take(&all, &mut change));
        assert_eq!(change, NOTHING);
        known.learning = false;
        assert_eq!(take(&mut known, RTM_NEWADDR, &addr(1, 0, 0, 1)), NOTHING);
        assert_eq!(take(&mut known, RTM_DELADDR, &addr(1, 0, 0, 1)), GONE);
    }

    #[test]
    fn past_the_bound_all_is_forgotten_and_news_again() {
        let mut known = Known::default();
        let on = |index: u32| {
            let mut body = addr(1, 0, 0, 1);
            body[4..8].copy_from_slice(&index.to_ne_bytes());
            body
        };
        for index in 0..limits::HOST_ITEMS_KNOWN_MAX as u32 {
            take(&mut known, RTM_NEWADDR, &on(index));
        }
        assert_eq!(take(&mut known, RTM_NEWADDR, &on(0)), NOTHING);
        assert_eq!(take(&mut known, RTM_NEWADDR, &on(1 << 30)), WAY);
        assert_eq!(take(&mut known, RTM_NEWADDR, &on(0)), WAY);
        assert!(known.items.len() <= limits::HOST_ITEMS_KNOWN_MAX);
    }

    #[test]
    fn cut_messages_are_passed_over() {
        let mut known = Known::default();
        for (kind, body) in
            [(RTM_NEWADDR, addr(1, 0, 0, 1)), (RTM_NEWROUTE, default_route(1, 0)), (RTM_NEWLINK, link(2, 1))]
        {
            let whole = message(kind, 0, &body);
            for len in 0..whole.len() {
                known.take(&whole[..len], &mut Change::default());
                known.take(&message(kind, 0, &body[..len.min(body.len())]), &mut Change::default());
            }
            for at in 0..whole.len() {
                for value in [0, 1, 2, 3, 0x7f, 0xff] {
                    let mut changed = whole.clone();
                    changed[at] = value;
                    known.take(&changed, &mut Change::default());
                }
            }
        }
    }
}
