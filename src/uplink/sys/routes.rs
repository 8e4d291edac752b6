//! The host's IPv4 routes, so that the guest's subnet does not hide a network the host can reach.
//!
//! Linux prints its main table as text in `/proc/thread-self/net/route`: one line per route, addresses as
//! hexadecimal numbers in the host's byte order. Read once at start; no netlink socket is needed.
//! Where a single address leads is asked of the kernel, which knows every table and rule.

use std::fmt;
use std::io::{self, Read};
use std::net::Ipv4Addr;

use socket2::{Domain, Socket, Type};

use crate::addr::Ipv4Subnet;

/// The route is usable (`RTF_UP` of `linux/route.h`).
const FLAG_UP: u16 = 0x0001;
/// The route refuses what it matches, so nothing lies behind it (`RTF_REJECT`).
const FLAG_REJECT: u16 = 0x0200;

/// A route of the host that leads to a network, not the default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRoute {
    /// The network's address, host bits zero.
    pub network: Ipv4Addr,
    /// Length of its prefix in bits, 1 to 32.
    pub prefix_len: u8,
    /// Name of the interface it leaves by.
    pub interface: String,
}

impl HostRoute {
    /// Whether the route and `subnet` share an address.
    pub fn overlaps(&self, subnet: Ipv4Subnet) -> bool {
        let common = self.prefix_len.min(subnet.prefix_len());
        let mask = u32::MAX.checked_shl(32 - u32::from(common)).unwrap_or(0);
        (self.network.to_bits() ^ subnet.network().to_bits()) & mask == 0
    }
}

impl fmt::Display for HostRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} on {}", self.network, self.prefix_len, self.interface)
    }
}

/// Reads the host's routes, default routes left out.
///
/// # Errors
/// Whatever reading the kernel's table yields; `Unsupported` on systems without `/proc/thread-self/net/route`.
pub fn host_routes() -> io::Result<Vec<HostRoute>> {
    if cfg!(target_os = "linux") {
        std::fs::read_to_string("/proc/thread-self/net/route").map(|table| parse(&table))
    } else {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Whether packets to `addr` stay in the host (a route of type `local`): one question to the kernel
/// (`RTM_GETROUTE`, rtnetlink(7)).
///
/// # Errors
/// No netlink socket, or an answer that is none.
pub fn leads_to_host(addr: Ipv4Addr) -> io::Result<bool> {
    const RTM_NEWROUTE: u16 = 24;
    const RTM_GETROUTE: u16 = 26;
    const NLMSG_ERROR: u16 = 2;
    const NLM_F_REQUEST: u16 = 1;
    const RTA_DST: u16 = 1;
    const RTN_LOCAL: u8 = 2;
    const REQUEST_BYTES: usize = 36;
    /// Behind the message's header of 16 bytes, the route's type.
    const TYPE_AT: usize = 16 + 7;
    let mut request = [0u8; REQUEST_BYTES];
    request[0..4].copy_from_slice(&(REQUEST_BYTES as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&RTM_GETROUTE.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request[16] = libc::AF_INET as u8;
    request[17] = 32;
    request[28..30].copy_from_slice(&8u16.to_ne_bytes());
    request[30..32].copy_from_slice(&RTA_DST.to_ne_bytes());
    request[32..36].copy_from_slice(&addr.octets());
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW.cloexec(), None)?;
    socket.send(&request)?;
    let mut answer = [0u8; 1024];
    let len = (&socket).read(&mut answer)?;
    match u16::from_ne_bytes([answer[4], answer[5]]) {
        RTM_NEWROUTE if len > TYPE_AT => Ok(answer[TYPE_AT] == RTN_LOCAL),
        // No route at all: it leads nowhere.
        NLMSG_ERROR => Ok(false),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The routes of a table in the form of `/proc/thread-self/net/route`; lines of another form are skipped.
fn parse(table: &str) -> Vec<HostRoute> {
    table.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<HostRoute> {
    parse_any(line).filter(|route| route.prefix_len > 0)
}

/// One line: interface, destination, gateway, flags, use counts, metric, mask and more.
fn parse_any(line: &str) -> Option<HostRoute> {
    let mut fields = line.split_ascii_whitespace();
    let interface = fields.next()?.to_owned();
    let network = parse_addr(fields.next()?)?;
    let flags = u16::from_str_radix(fields.nth(1)?, 16).ok()?;
    let mask = parse_addr(fields.nth(3)?)?.to_bits();
    let prefix_len = u8::try_from(mask.leading_ones()).ok()?;
    let contiguous = mask.count_ones() == mask.leading_ones();
    let leads_somewhere = flags & FLAG_UP != 0 && flags & FLAG_REJECT == 0;
    (contiguous && leads_somewhere).then_some(HostRoute { network, prefix_len, interface })
}

fn parse_addr(hex: &str) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(network: [u8; 4], prefix_len: u8, interface: &str) -> HostRoute {
        HostRoute { network: network.into(), prefix_len, interface: interface.to_owned() }
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn table_yields_networks_without_default_and_dead_routes() {
        let table = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
tun0\t0000000A\t00000000\t0001\t0\t0\t50\t000000FF\t0\t0\t0
wg0\t0902000A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
*\t000010AC\t00000000\t0200\t0\t0\t0\t0000F0FF\t0\t0\t0
down0\t0005000A\t00000000\t0000\t0\t0\t0\t00FFFFFF\t0\t0\t0
odd0\t0005000A\t00000000\t0001\t0\t0\t0\t00FF00FF\t0\t0\t0
cut0\t0005000A\t00000000
bad0\tnothex\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
";
        assert_eq!(
            parse(table),
            [
                route([192, 168, 1, 0], 24, "eth0"),
                route([10, 0, 0, 0], 8, "tun0"),
                route([10, 0, 2, 9], 32, "wg0"),
            ]
        );
    }

    #[test]
    fn overlap_is_seen_from_both_sides() {
        let subnet: Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
        assert!(route([10, 0, 0, 0], 8, "a").overlaps(subnet), "route holds the subnet");
        assert!(route([10, 0, 2, 128], 25, "a").overlaps(subnet), "subnet holds the route");
        assert!(route([10, 0, 2, 9], 32, "a").overlaps(subnet), "one host in the subnet");
        assert!(!route([10, 0, 3, 0], 24, "a").overlaps(subnet));
        assert!(!route([192, 168, 0, 0], 16, "a").overlaps(subnet));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_hosts_table_can_be_read() {
        assert!(host_routes().is_ok());
    }
}
