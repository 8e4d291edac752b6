//! What is published: one port, ranges of them, and how people write both.
//!
//! Two ways to write: that of `--publish`, `[tcp:|udp:][HOSTADDR][%INTERFACE:]HOSTPORT[-END]:GUESTPORT[-END]`, and
//! that of passt's `-t` and `-u` (passt(1)), `[HOSTADDR][%INTERFACE]/`, then ports joined by commas: `FIRST[-LAST][:TO[-TO_LAST]]`
//! to publish, `~FIRST[-LAST]` to leave out whatever else says so. What of it cannot be obeyed here is refused.
//!
//! The host's address is an IPv4 one, or `[::1]`: guests speak IPv4, and clients on the host's own loopback are seen
//! as the gateway; any other client of IPv6 would have no address that the guest could see.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

use super::Protocol;
use crate::addr::LinkName;
use crate::limits;

/// One published port (a range is expanded into its ports).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Publish {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Host address and port to listen on; the address is unspecified for "any", port 0 picks one.
    pub host: SocketAddr,
    /// The one interface of the host whose clients are taken; those of all if `None`.
    pub interface: Option<LinkName>,
    /// Port in the guest.
    pub guest_port: u16,
}

impl Publish {
    /// A port that clients of every interface reach.
    pub const fn new(protocol: Protocol, host: SocketAddr, guest_port: u16) -> Publish {
        Publish { protocol, host, interface: None, guest_port }
    }

    /// Whether both need the same end of the host; "all addresses" has every one, as "all interfaces" has.
    pub fn collides(&self, other: &Publish) -> bool {
        let (own, others) = (self.host.ip(), other.host.ip());
        let is_any = |addr: IpAddr| addr == IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let same_family = own.is_ipv4() == others.is_ipv4();
        self.protocol == other.protocol
            && self.host.port() == other.host.port()
            && self.host.port() != 0
            && (own == others || (same_family && (is_any(own) || is_any(others))))
            && (self.interface == other.interface || self.interface.is_none() || other.interface.is_none())
    }
}

/// As `--publish` takes it.
impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol.name())?;
        match self.host.ip() {
            IpAddr::V4(addr) => write!(f, "{addr}")?,
            IpAddr::V6(addr) => write!(f, "[{addr}]")?,
        }
        if let Some(interface) = self.interface {
            write!(f, "%{interface}")?;
        }
        write!(f, ":{}:{}", self.host.port(), self.guest_port)
    }
}

/// Why a text is not what can be published.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PublishError {
    /// Not the form of `--publish`.
    #[error(
        "expected [tcp:|udp:][HOSTADDR][%INTERFACE:]HOSTPORT[-END]:GUESTPORT[-END], such as 8080:80 or \
         udp:127.0.0.1:5353:53"
    )]
    Form,
    /// Not the form of `-t` and `-u`.
    #[error(
        "expected none, or [HOSTADDR][%INTERFACE]/ and ports joined by commas: FIRST[-LAST][:TO[-TO_LAST]], and \
         ~FIRST[-LAST] for those to leave out, such as 8000-8100:9000-9100,~8042"
    )]
    ListForm,
    /// Not a port number.
    #[error("'{0}' is not a port: give a number from 1 to 65535{1}")]
    Port(String, &'static str),
    /// A range that ends before it starts.
    #[error("the range {0}-{1} ends before it starts: give the lower port first")]
    Backwards(u16, u16),
    /// Ranges of different lengths.
    #[error("{host} host ports cannot lead to {guest} guest ports: give ranges of equal length")]
    RangeLengths {
        /// Ports in the host's range.
        host: usize,
        /// Ports in the guest's range.
        guest: usize,
    },
    /// Host port 0 as part of a range.
    #[error("host port 0 (pick a free one) stands for a single port: publish each guest port by itself")]
    PickRange,
    /// An IPv6 address to listen on, and not the loopback's.
    #[error(
        "guests speak IPv4, and clients of IPv6 have no address they could see: publish on an IPv4 address of \
         this host, or on [::1], whose clients are seen as the gateway"
    )]
    Ipv6,
    /// A host address that is none.
    #[error("'{0}' is not an IPv4 address: give one of this host's, or none to listen on all of them")]
    HostAddress(String),
    /// A name no interface can have.
    #[error("'{0}' is not a name of an interface: 1 to 15 bytes without blanks, '/', ':' and '%'")]
    Interface(String),
    /// All ports there are.
    #[error(
        "'{0}' stands for all ports but those left out and the ephemeral ones, more than the {max} that can be published: \
         name ports or ranges, such as 1024-2047", max = limits::PUBLISHED_PORTS_MAX
    )]
    All(String),
    /// The ports a guest listens on.
    #[error(
        "'auto' follows what listens in a namespace, and vunet does not see into a guest: name the ports, and change them \
         later with `vunet ctl publish`"
    )]
    Auto,
    /// An address of the guest's side.
    #[error(
        "'{0}': published ports lead to this process's own guest: drop the address, and --guest-ip says which it has"
    )]
    ToAddress(String),
    /// `none` and something else.
    #[error("'none' stands by itself")]
    None,
}

/// Host ports in a row that lead to as many guest ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishRange {
    first: Publish,
    ports: u16,
}

impl PublishRange {
    /// How many ports it publishes.
    pub fn count(&self) -> usize {
        self.ports.into()
    }

    /// Each port by itself, in order.
    pub fn iter(self) -> impl Iterator<Item = Publish> {
        (0..self.ports).map(move |n| {
            let Publish { host, guest_port, .. } = self.first;
            let host = SocketAddr::new(host.ip(), host.port() + n);
            Publish { host, guest_port: guest_port + n, ..self.first }
        })
    }
}

/// What one flag, or one request, asks to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishList(pub Vec<PublishRange>);

/// Where a list's ports are on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    addr: IpAddr,
    interface: Option<LinkName>,
}

impl Place {
    fn range(&self, protocol: Protocol, host_port: u16, guest_port: u16, ports: u16) -> PublishRange {
        let host = SocketAddr::new(self.addr, host_port);
        let first = Publish { protocol, host, interface: self.interface, guest_port };
        PublishRange { first, ports }
    }
}

/// Reads `[tcp:|udp:][HOSTADDR][%INTERFACE:]HOSTPORT[-END]:GUESTPORT[-END]`.
///
/// # Errors
/// [`PublishError`].
pub fn publish(text: &str) -> Result<PublishRange, PublishError> {
    let (protocol, rest) = match text.split_once(':') {
        Some(("tcp", rest)) => (Protocol::Tcp, rest),
        Some(("udp", rest)) => (Protocol::Udp, rest),
        _ => (Protocol::Tcp, text),
    };
    // Ports have no colon, whatever the address has.
    let mut parts = rest.rsplitn(3, ':');
    let (Some(guest_ports), Some(host_ports)) = (parts.next(), parts.next()) else {
        return Err(PublishError::Form);
    };
    let place = match parts.next() {
        // A fourth part that no address explains.
        Some(host) if host.contains(':') && !host.contains("::") && !host.starts_with('[') => {
            return Err(PublishError::Form);
        }
        host => place(host)?,
    };
    range(protocol, &place, port_range(host_ports, true)?, port_range(guest_ports, false)?)
}

/// Reads the value of `-t` (`protocol` TCP) or `-u` (UDP).
///
/// # Errors
/// [`PublishError`].
pub fn publish_list(protocol: Protocol, text: &str) -> Result<PublishList, PublishError> {
    if text == "none" {
        return Ok(PublishList(Vec::new()));
    }
    // A slash in front of the guest's side of the first entry is no place.
    let (at, ports) = match text.split_once('/') {
        Some((at, ports)) if !at.contains(',') && !is_entry(at) => (Some(at), ports),
        _ => (None, text),
    };
    let place = place(at.filter(|at| !at.is_empty()))?;
    let (mut ranges, mut left_out) = (Vec::new(), Vec::new());
    for entry in ports.split(',') {
        match entry {
            "none" => return Err(PublishError::None),
            "auto" => return Err(PublishError::Auto),
            "" if ports.is_empty() => return Err(PublishError::All(text.to_owned())),
            "" => return Err(PublishError::ListForm),
            _ if entry == "all" || entry.starts_with("all:") => {
                return Err(PublishError::All(entry.to_owned()));
            }
            _ => match entry.strip_prefix('~') {
                Some(range) => left_out.push(port_range(range, false)?),
                None => ranges.push(listed(protocol, &place, entry)?),
            },
        }
    }
    if ranges.is_empty() {
        return Err(PublishError::All(text.to_owned()));
    }
    Ok(PublishList(ranges.iter().flat_map(|range| without(range, &left_out)).collect()))
}

/// Whether what stands before a slash belongs to an entry, as `5000:192.0.2.5` does.
fn is_entry(text: &str) -> bool {
    text.split_once(':').is_some_and(|(ports, to)| port_range(ports, true).is_ok() && !to.contains(':'))
}

/// `FIRST[-LAST][:TO[-TO_LAST]]`; without the guest's ports they are the host's.
fn listed(protocol: Protocol, place: &Place, entry: &str) -> Result<PublishRange, PublishError> {
    let Some((host, guest)) = entry.split_once(':') else {
        let ports = port_range(entry, false)?;
        return range(protocol, place, ports, ports);
    };
    if guest.contains(['/', '.', ':']) {
        let addr = guest.split_once('/').map_or(guest, |(addr, _)| addr);
        return Err(PublishError::ToAddress(addr.to_owned()));
    }
    range(protocol, place, port_range(host, true)?, port_range(guest, false)?)
}

/// A range of host ports and one of guest ports, each as (first, last).
fn range(
    protocol: Protocol,
    place: &Place,
    host: (u16, u16),
    guest: (u16, u16),
) -> Result<PublishRange, PublishError> {
    if host.0 == 0 && (host.1, guest.1) != (host.0, guest.0) {
        return Err(PublishError::PickRange);
    }
    let (host_len, guest_len) = (host.1 - host.0, guest.1 - guest.0);
    if host_len != guest_len {
        let count = |len: u16| usize::from(len) + 1;
        return Err(PublishError::RangeLengths { host: count(host_len), guest: count(guest_len) });
    }
    // Guest port 0 is refused, so the count is at most 65,535.
    Ok(place.range(protocol, host.0, guest.0, guest_len + 1))
}

/// What of `range` is in none of `left_out`, which are ranges of host ports as (first, last).
fn without(range: &PublishRange, left_out: &[(u16, u16)]) -> Vec<PublishRange> {
    let mut kept: Vec<PublishRange> = Vec::new();
    for port in range.iter() {
        let number = port.host.port();
        if left_out.iter().any(|&(first, last)| (first..=last).contains(&number)) {
            continue;
        }
        match kept.last_mut() {
            Some(last) if u32::from(last.first.host.port()) + u32::from(last.ports) == u32::from(number) => {
                last.ports += 1;
            }
            _ => kept.push(PublishRange { first: port, ports: 1 }),
        }
    }
    kept
}

/// `[HOSTADDR][%INTERFACE]`; all addresses, and clients of all interfaces, without.
fn place(text: Option<&str>) -> Result<Place, PublishError> {
    let text = text.unwrap_or("0.0.0.0");
    let (addr, interface) = match text.split_once('%') {
        Some((addr, name)) => {
            let name = LinkName::new(name).ok_or_else(|| PublishError::Interface(name.to_owned()))?;
            (addr, Some(name))
        }
        None => (text, None),
    };
    let addr = if addr.is_empty() && interface.is_some() { "0.0.0.0" } else { addr };
    Ok(Place { addr: host_address(addr)?, interface })
}

fn host_address(text: &str) -> Result<IpAddr, PublishError> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    match bare.parse::<IpAddr>() {
        Ok(IpAddr::V4(addr)) if !addr.is_multicast() && !addr.is_broadcast() => Ok(addr.into()),
        Ok(IpAddr::V6(Ipv6Addr::LOCALHOST)) => Ok(Ipv6Addr::LOCALHOST.into()),
        Ok(IpAddr::V6(_)) => Err(PublishError::Ipv6),
        _ => Err(PublishError::HostAddress(text.to_owned())),
    }
}

/// `FIRST` or `FIRST-END` as (first, end); 0 only where a port may be picked.
fn port_range(text: &str, may_pick: bool) -> Result<(u16, u16), PublishError> {
    let hint = if may_pick { ", or 0 to have a free one picked" } else { "" };
    let port = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse::<u16>().ok().filter(|&port| digits && (port != 0 || may_pick));
        number.ok_or_else(|| PublishError::Port(text.to_owned(), hint))
    };
    let (first, end) = match text.split_once('-') {
        Some((first, end)) => (port(first)?, port(end)?),
        None => (port(text)?, port(text)?),
    };
    if end < first { Err(PublishError::Backwards(first, end)) } else { Ok((first, end)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Protocol::{Tcp, Udp};

    const ANY: [u8; 4] = [0; 4];

    fn ports(protocol: Protocol, host: [u8; 4], host_port: u16, guest_port: u16, ports: u16) -> PublishRange {
        Place { addr: host.into(), interface: None }.range(protocol, host_port, guest_port, ports)
    }

    fn of(protocol: Protocol, addr: &str, interface: &str, host_port: u16, guest_port: u16) -> PublishRange {
        Place { addr: addr.parse().unwrap(), interface: LinkName::new(interface) }
            .range(protocol, host_port, guest_port, 1)
    }

    #[test]
    fn each_form_of_a_published_port_is_read() {
        for (text, expected) in [
            ("8080:80", ports(Tcp, ANY, 8080, 80, 1)),
            ("tcp:8080:80", ports(Tcp, ANY, 8080, 80, 1)),
            ("udp:53:53", ports(Udp, ANY, 53, 53, 1)),
            ("127.0.0.1:2222:22", ports(Tcp, [127, 0, 0, 1], 2222, 22, 1)),
            ("udp:192.0.2.1:0:53", ports(Udp, [192, 0, 2, 1], 0, 53, 1)),
            ("0:22-22", ports(Tcp, ANY, 0, 22, 1)),
            ("0.0.0.0:1:1", ports(Tcp, ANY, 1, 1, 1)),
            ("8000-8009:9000-9009", ports(Tcp, ANY, 8000, 9000, 10)),
            ("1-65535:1-65535", ports(Tcp, ANY, 1, 1, 65_535)),
            ("65535:65535", ports(Tcp, ANY, 65_535, 65_535, 1)),
            ("%eth0:80:8080", of(Tcp, "0.0.0.0", "eth0", 80, 8080)),
            ("udp:192.0.2.1%eth0.7:53:54", of(Udp, "192.0.2.1", "eth0.7", 53, 54)),
            ("[::1]:80:80", of(Tcp, "::1", "", 80, 80)),
            ("udp:[::1]%lo:80:80", of(Udp, "::1", "lo", 80, 80)),
            ("::1:80:80", of(Tcp, "::1", "", 80, 80)),
        ] {
            assert_eq!(publish(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_published_is_refused_with_the_reason() {
        for (text, part) in [
            ("", "expected [tcp:|udp:]"),
            ("80", "expected [tcp:|udp:]"),
            ("tcp:80", "expected [tcp:|udp:]"),
            ("1:2:3:4", "expected [tcp:|udp:]"),
            ("sctp:80:80", "'sctp' is not an IPv4 address"),
            ("localhost:80:80", "'localhost' is not an IPv4 address"),
            ("224.0.0.1:80:80", "'224.0.0.1' is not an IPv4 address"),
            ("255.255.255.255:80:80", "not an IPv4 address"),
            ("[::]:80:80", "guests speak IPv4"),
            ("tcp:[2001:db8::1]:80:80", "or on [::1]"),
            ("2001:db8::1:80:80", "guests speak IPv4"),
            ("[::ffff:127.0.0.1]:80:80", "guests speak IPv4"),
            ("80:0", "'0' is not a port: give a number from 1 to 65535"),
            ("65536:80", "'65536' is not a port"),
            ("8080:80/tcp", "'80/tcp' is not a port"),
            ("+80:80", "'+80' is not a port"),
            ("127.0.0.1::80", "or 0 to have a free one picked"),
            ("80-:80", "'' is not a port"),
            ("90-80:80-90", "90-80 ends before it starts"),
            ("80-89:80-88", "10 host ports cannot lead to 9 guest ports"),
            ("80:80-81", "1 host ports cannot lead to 2 guest ports"),
            ("0:80-81", "stands for a single port"),
            ("0-1:80-81", "stands for a single port"),
            ("%:80:80", "'' is not a name of an interface"),
            ("%an interface:80:80", "is not a name of an interface"),
            ("192.0.2.1%0123456789abcdef:80:80", "1 to 15 bytes"),
        ] {
            let error = publish(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: '{part}' is not in: {error}");
        }
    }

    fn list(text: &str) -> Vec<PublishRange> {
        publish_list(Tcp, text).expect(text).0
    }

    #[test]
    fn lists_are_read_as_passt_reads_them() {
        let at = [192, 0, 2, 1];
        for (text, expected) in [
            ("none", vec![]),
            ("22", vec![ports(Tcp, ANY, 22, 22, 1)]),
            ("22:23", vec![ports(Tcp, ANY, 22, 23, 1)]),
            ("22,25", vec![ports(Tcp, ANY, 22, 22, 1), ports(Tcp, ANY, 25, 25, 1)]),
            ("22-80", vec![ports(Tcp, ANY, 22, 22, 59)]),
            ("22-80:32-90", vec![ports(Tcp, ANY, 22, 32, 59)]),
            ("192.0.2.1/22", vec![ports(Tcp, at, 22, 22, 1)]),
            ("192.0.2.1%eth0/22", vec![of(Tcp, "192.0.2.1", "eth0", 22, 22)]),
            ("%eth0/22", vec![of(Tcp, "0.0.0.0", "eth0", 22, 22)]),
            ("/22", vec![ports(Tcp, ANY, 22, 22, 1)]),
            ("::1/22", vec![of(Tcp, "::1", "", 22, 22)]),
            ("[::1]/22", vec![of(Tcp, "::1", "", 22, 22)]),
            (
                "2000-5000,~3000-3010",
                vec![ports(Tcp, ANY, 2000, 2000, 1000), ports(Tcp, ANY, 3011, 3011, 1990)],
            ),
            ("192.0.2.1/20-30,~25", vec![ports(Tcp, at, 20, 20, 5), ports(Tcp, at, 26, 26, 5)]),
            // Where it stands does not matter, and several may overlap.
            ("~25,~24-25,24-26:4-6", vec![ports(Tcp, ANY, 26, 6, 1)]),
            ("65534-65535,~65535", vec![ports(Tcp, ANY, 65_534, 65_534, 1)]),
            ("7,~7", vec![]),
            ("0:22", vec![ports(Tcp, ANY, 0, 22, 1)]),
        ] {
            assert_eq!(list(text), expected, "{text}");
        }
        assert_eq!(publish_list(Udp, "53").unwrap().0, [ports(Udp, ANY, 53, 53, 1)]);
    }

    #[test]
    fn what_of_a_list_cannot_be_obeyed_is_refused_and_not_passed_over() {
        for (text, part) in [
            ("all", "name ports or ranges"),
            ("", "name ports or ranges"),
            ("127.0.0.1/", "name ports or ranges"),
            ("127.0.0.6/all:192.0.2.6", "'all:192.0.2.6' stands for all ports"),
            ("~20000-20010", "more than the 4096"),
            ("80,all", "stands for all ports"),
            ("auto", "vunet ctl publish"),
            ("::1/auto", "does not see into a guest"),
            ("8000-8010,auto", "does not see into a guest"),
            ("0.0.0.0/5000:192.0.2.5/6000", "'192.0.2.5': published ports lead"),
            ("5000:192.0.2.5/6000", "drop the address"),
            ("5000:192.0.2.5", "drop the address"),
            ("none,80", "stands by itself"),
            ("80,none", "stands by itself"),
            ("80,,81", "expected none, or"),
            ("80,", "expected none, or"),
            ("~", "'' is not a port"),
            ("~0", "'0' is not a port"),
            ("~80:81", "'80:81' is not a port"),
            ("0", "'0' is not a port"),
            ("http", "'http' is not a port"),
            ("22-80:32-91", "59 host ports cannot lead to 60"),
            ("2001:db8::1/80", "guests speak IPv4"),
            ("eth0/80", "'eth0' is not an IPv4 address"),
            ("%/80", "not a name of an interface"),
        ] {
            let error = publish_list(Tcp, text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: '{part}' is not in: {error}");
        }
    }

    #[test]
    fn a_range_yields_its_ports_in_order() {
        let range = publish("udp:127.0.0.1:65534-65535:1-2").unwrap();
        let each = |host: &str, guest_port| Publish::new(Udp, host.parse().unwrap(), guest_port);
        assert_eq!(range.count(), 2);
        let ports: Vec<Publish> = range.iter().collect();
        assert_eq!(ports, [each("127.0.0.1:65534", 1), each("127.0.0.1:65535", 2)]);
    }

    #[test]
    fn a_port_is_written_as_it_is_read() {
        for text in [
            "tcp:0.0.0.0:8080:80",
            "udp:127.0.0.1:5353:53",
            "tcp:0.0.0.0%eth0:80:80",
            "udp:[::1]:80:80",
            "udp:[::1]%lo:80:80",
        ] {
            assert_eq!(publish(text).unwrap().iter().next().unwrap().to_string(), text);
        }
    }

    #[test]
    fn ends_collide_where_the_kernel_would_refuse_the_second() {
        let port = |text: &str| publish(text).unwrap().iter().next().unwrap();
        for (a, b, expected) in [
            ("80:80", "80:81", true),
            ("80:80", "81:80", false),
            ("80:80", "udp:80:80", false),
            ("80:80", "127.0.0.1:80:80", true),
            ("127.0.0.2:80:80", "127.0.0.1:80:80", false),
            ("%eth0:80:80", "%eth1:80:80", false),
            ("%eth0:80:80", "80:80", true),
            ("127.0.0.1%eth0:80:80", "%eth0:80:80", true),
            ("[::1]:80:80", "80:80", false),
            ("[::1]:80:80", "[::1]:80:81", true),
            ("0:80", "0:80", false),
        ] {
            assert_eq!(port(a).collides(&port(b)), expected, "{a} and {b}");
            assert_eq!(port(b).collides(&port(a)), expected, "{b} and {a}");
        }
    }
}
