//! Values of single flags: text to a checked value, with an error that says why not and what to write
//! instead. The flag's name and the text itself are put in front by the argument parser.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::RawFd;

use thiserror::Error;

use super::UplinkArg;
use crate::addr::{Ipv4Subnet, MacAddr, VlanId};
use crate::config::{self, DnsConfig, IpMtu, Protocol, PublishError, PublishList, PublishRange};
use crate::uplink::links::is_link_name;
use crate::uplink::sys::affinity::CPUS_MAX;

/// Longest domain name in text form, in characters (RFC 1035, 2.3.4: 255 octets on the wire).
const NAME_CHARS_MAX: usize = 253;
/// Longest label (RFC 1035, 2.3.4).
const LABEL_CHARS_MAX: usize = 63;

/// Fewest ports of `--nat-ports`: a page of the web opens dozens of connections.
const NAT_PORTS_MIN: usize = 256;

/// Why a value is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ValueError {
    /// Not an address on a link.
    #[error(
        "expected dhcp, or a host's address with its network's prefix length (8 to 30), such as 192.0.2.50/24"
    )]
    NatAddress,
    /// Not a range of ports.
    #[error("expected FIRST-LAST, {NAT_PORTS_MIN} ports or more, such as 49152-65535")]
    NatPorts,
    /// Not a list of CPUs.
    #[error("expected CPU numbers and ranges joined by commas, such as 2,3 or 4-7")]
    CpuList,
    /// Not what can be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Not a resolver's address.
    #[error("expected IP[:PORT], such as 192.0.2.53, 192.0.2.53:5353 or [2001:db8::53]:53")]
    DnsServerForm,
    /// An address no resolver can have.
    #[error("no resolver can have this address: give the address of one host, and a port other than 0")]
    DnsServerAddress,
    /// Not `NAME=IP`.
    #[error("expected NAME=IP, such as db=10.0.2.9 or www.example.org=192.0.2.80")]
    DnsHostForm,
    /// Not the form of `--reserve`.
    #[error(
        "expected MAC=IP or id:HEX=IP, and ,NAME if it is to have one, such as 52:54:00:12:34:56=10.0.2.9,db"
    )]
    ReservationForm,
    /// Not a domain name.
    #[error(
        "'{0}' is not a domain name: labels of 1 to 63 letters, digits, '-' or '_' joined by dots, 253 \
         characters at most, no '-' at a label's end"
    )]
    Name(String),
    /// A domain that multicast DNS owns.
    #[error("names under .local belong to multicast DNS (RFC 6762): choose another, such as {default}", default = DnsConfig::DEFAULT_DOMAIN)]
    LocalDomain,
    /// A MAC address no station can have.
    #[error("not a station's address: the guest's MAC is neither zero nor multicast (first octet even)")]
    NotUnicast,
    /// The gateway's MAC address.
    #[error("this is vunet's own address on the link: give the guest another")]
    GatewayMac,
    /// An MTU out of bounds.
    #[error("not an IP MTU: give bytes from {min} to {max}", min = IpMtu::MIN, max = IpMtu::MAX)]
    IpMtu,
    /// Not a log filter.
    #[error("'{0}' is neither a level (off, error, warn, info, debug, trace) nor MODULE=LEVEL")]
    LogLevel(String),
    /// A subnet whose addresses never leave a host or name no host.
    #[error(
        "no guest can use these addresses (0/8, 127/8 and 224/3 are reserved): use a private subnet such as 10.0.2.0/24"
    )]
    ReservedSubnet,
    /// Not an IPv4 address.
    #[error("expected an IPv4 address, such as 10.0.2.1")]
    Ipv4Address,
    /// Not the form of `--uplink`.
    #[error("expected sockets, bridge=BRIDGE, tap, tap=IFNAME, tap-fd=N or macvtap=IFNAME")]
    UplinkForm,
    /// Not an interface's name.
    #[error("'{0}' is not a name of an interface: 1 to 15 bytes without blanks, '/', ':' and '%'")]
    LinkName(String),
    /// Not a VLAN.
    #[error("expected the number of a VLAN, 1 to 4094")]
    Vlan,
    /// Not a descriptor's number.
    #[error("expected the number of an open descriptor, such as 3")]
    Descriptor,
    /// Any other error of an address.
    #[error(transparent)]
    Addr(#[from] crate::addr::ParseAddrError),
}

/// Reads `--publish`.
pub(super) fn publish(text: &str) -> Result<PublishRange, ValueError> {
    Ok(config::publish::publish(text)?)
}

/// What `--publish` would take, as it is written.
pub(super) fn publish_text(text: &str) -> Result<String, ValueError> {
    publish(text).map(|_| text.to_owned())
}

/// Reads `-t`.
pub(super) fn tcp_ports(text: &str) -> Result<PublishList, ValueError> {
    Ok(config::publish::publish_list(Protocol::Tcp, text)?)
}

/// Reads `-u`.
pub(super) fn udp_ports(text: &str) -> Result<PublishList, ValueError> {
    Ok(config::publish::publish_list(Protocol::Udp, text)?)
}

/// Reads `IP[:PORT]`; port 53 without one. IPv6 resolvers are asked by the host, so they are allowed.
pub(super) fn dns_server(text: &str) -> Result<SocketAddr, ValueError> {
    /// The port of DNS (RFC 1035, 4.2).
    const DNS_PORT: u16 = 53;
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let server = match (text.parse::<SocketAddr>(), bare.parse::<IpAddr>()) {
        (Ok(server), _) => server,
        (_, Ok(addr)) => SocketAddr::new(addr, DNS_PORT),
        _ => return Err(ValueError::DnsServerForm),
    };
    let addr = server.ip();
    if addr.is_unspecified()
        || addr.is_multicast()
        || addr == IpAddr::V4(Ipv4Addr::BROADCAST)
        || server.port() == 0
    {
        return Err(ValueError::DnsServerAddress);
    }
    Ok(server)
}

/// What `--dns-host` asks for. A name with a dot in it (or behind it) stands for itself, one without is
/// put under the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsHost {
    name: String,
    relative: bool,
    /// The address the name gets.
    pub addr: IpAddr,
}

impl DnsHost {
    /// The whole name.
    ///
    /// # Errors
    /// [`ValueError::Name`] if it is too long under `domain`.
    pub fn qualified(&self, domain: &str) -> Result<String, ValueError> {
        if self.relative { under(&self.name, domain) } else { Ok(self.name.clone()) }
    }
}

/// `label` put under `domain`.
///
/// # Errors
/// [`ValueError::Name`] if the whole is too long.
pub(super) fn under(label: &str, domain: &str) -> Result<String, ValueError> {
    let whole = format!("{label}.{domain}");
    if whole.len() > NAME_CHARS_MAX { Err(ValueError::Name(whole)) } else { Ok(whole) }
}

/// Reads `NAME=IP`.
pub(super) fn dns_host(text: &str) -> Result<DnsHost, ValueError> {
    let (name, addr) = text.split_once('=').ok_or(ValueError::DnsHostForm)?;
    let addr = addr.parse().map_err(|_| ValueError::DnsHostForm)?;
    Ok(DnsHost { name: domain_name(name)?, relative: !name.contains('.'), addr })
}

/// Reads a domain for local names.
pub(super) fn dns_domain(text: &str) -> Result<String, ValueError> {
    let domain = domain_name(text)?;
    if domain == "local" || domain.ends_with(".local") { Err(ValueError::LocalDomain) } else { Ok(domain) }
}

/// A domain name in lower case without a trailing dot.
fn domain_name(text: &str) -> Result<String, ValueError> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label_holds = |label: &str| {
        (1..=LABEL_CHARS_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() > NAME_CHARS_MAX || !name.split('.').all(label_holds) {
        return Err(ValueError::Name(text.to_owned()));
    }
    Ok(name.to_ascii_lowercase())
}

/// Reads a guest's MAC address.
pub(super) fn guest_mac(text: &str) -> Result<MacAddr, ValueError> {
    let mac: MacAddr = text.parse()?;
    match mac {
        MacAddr::GATEWAY => Err(ValueError::GatewayMac),
        mac if mac.is_unicast() => Ok(mac),
        _ => Err(ValueError::NotUnicast),
    }
}

/// Reads an IP MTU in bytes.
pub(super) fn ip_mtu(text: &str) -> Result<IpMtu, ValueError> {
    text.parse().ok().and_then(IpMtu::new).ok_or(ValueError::IpMtu)
}

/// Reads a log filter.
pub(super) fn log_level(text: &str) -> Result<String, ValueError> {
    crate::log::check_level(text).map_err(ValueError::LogLevel)?;
    Ok(text.to_owned())
}

/// Reads an IPv4 address.
pub(super) fn ipv4_addr(text: &str) -> Result<Ipv4Addr, ValueError> {
    text.parse().map_err(|_| ValueError::Ipv4Address)
}

/// Reads a descriptor's number.
pub(super) fn descriptor(text: &str) -> Result<RawFd, ValueError> {
    text.parse().map_err(|_| ValueError::Descriptor)
}

/// Reads `--uplink`.
pub(super) fn uplink(text: &str) -> Result<UplinkArg, ValueError> {
    let (kind, value) = text.split_once('=').map_or((text, None), |(kind, value)| (kind, Some(value)));
    let name = |name: &str| {
        if is_link_name(name) { Ok(name.to_owned()) } else { Err(ValueError::LinkName(name.to_owned())) }
    };
    match (kind, value) {
        ("sockets", None) => Ok(UplinkArg::Sockets),
        ("tap", None) => Ok(UplinkArg::Tap(None)),
        ("tap", Some(value)) => name(value).map(|name| UplinkArg::Tap(Some(name))),
        ("tap-fd", Some(value)) => {
            value.split(',').map(descriptor).collect::<Result<_, _>>().map(UplinkArg::TapFd)
        }
        ("bridge", Some(value)) => name(value).map(UplinkArg::Bridge),
        ("macvtap", Some(value)) => name(value).map(UplinkArg::MacVtap),
        _ => Err(ValueError::UplinkForm),
    }
}

/// Reads a VLAN's number.
pub(super) fn vlan(text: &str) -> Result<VlanId, ValueError> {
    text.parse().ok().and_then(VlanId::new).ok_or(ValueError::Vlan)
}

/// Value of `--nat-address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NatAddress {
    /// An address and its network.
    Fixed(Ipv4Addr, Ipv4Subnet),
    /// Whatever the link's DHCP leases.
    Dhcp,
}

/// `--nat-address`: a host's address with its network's prefix length, or `dhcp`.
pub(super) fn nat_address(text: &str) -> Result<NatAddress, ValueError> {
    if text == "dhcp" {
        return Ok(NatAddress::Dhcp);
    }
    let parse = || {
        let (addr, prefix) = text.split_once('/')?;
        let (addr, prefix): (Ipv4Addr, u8) = (addr.parse().ok()?, prefix.parse().ok()?);
        let bits = addr.to_bits() & u32::MAX.checked_shl(32u32.checked_sub(prefix.into())?)?;
        let subnet = Ipv4Subnet::new(Ipv4Addr::from_bits(bits), prefix).ok()?;
        let reserved = matches!(addr.octets()[0], 0 | 127 | 224..);
        (!reserved && subnet.is_host(addr)).then_some(NatAddress::Fixed(addr, subnet))
    };
    parse().ok_or(ValueError::NatAddress)
}

/// `--nat-ports`: first and last, at least [`NAT_PORTS_MIN`] of them.
pub(super) fn nat_ports(text: &str) -> Result<RangeInclusive<u16>, ValueError> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let range = text.split_once('-').and_then(|(first, last)| Some(port(first)?..=port(last)?));
    range.filter(|range| range.len() >= NAT_PORTS_MIN).ok_or(ValueError::NatPorts)
}

/// CPUs of `--pin`, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CpuList(pub Vec<usize>);

/// `--pin`: numbers and ranges of CPUs joined by commas, the kernel's own list format.
pub(super) fn cpu_list(text: &str) -> Result<CpuList, ValueError> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < CPUS_MAX);
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => cpus.extend(first..=last),
            _ => return Err(ValueError::CpuList),
        }
    }
    Ok(CpuList(cpus))
}

/// Reads a guest's subnet. A prefix has 8 bits at least, so the first octet tells a reserved one.
pub(super) fn subnet(text: &str) -> Result<Ipv4Subnet, ValueError> {
    let subnet: Ipv4Subnet = text.parse()?;
    match subnet.network().octets()[0] {
        0 | 127 | 224.. => Err(ValueError::ReservedSubnet),
        _ => Ok(subnet),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    /// Every good text gives its value; every bad one an error whose words hold the given part.
    fn table<T: Debug + PartialEq>(
        parse: impl Fn(&str) -> Result<T, ValueError>,
        good: &[(&str, T)],
        bad: &[(&str, &str)],
    ) {
        for (text, value) in good {
            assert_eq!(parse(text).as_ref(), Ok(value), "{text}");
        }
        for (text, part) in bad {
            let error = parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: '{part}' is not in: {error}");
        }
    }

    #[test]
    fn dns_server_values() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        table(
            dns_server,
            &[
                ("192.0.2.53", addr("192.0.2.53:53")),
                ("127.0.0.53:5353", addr("127.0.0.53:5353")),
                ("2001:db8::53", addr("[2001:db8::53]:53")),
                ("[2001:db8::53]", addr("[2001:db8::53]:53")),
                ("[::1]:5353", addr("[::1]:5353")),
            ],
            &[
                ("", "expected IP[:PORT]"),
                ("dns.example", "expected IP[:PORT]"),
                ("192.0.2.53:", "expected IP[:PORT]"),
                ("192.0.2.53:70000", "expected IP[:PORT]"),
                ("192.0.2.53:0", "a port other than 0"),
                ("0.0.0.0", "no resolver can have this address"),
                ("[::]:53", "no resolver can have this address"),
                ("224.0.0.251:5353", "no resolver can have this address"),
                ("255.255.255.255", "no resolver can have this address"),
            ],
        );
    }

    #[test]
    fn dns_host_values() {
        let host = |name: &str, relative, addr: &str| DnsHost {
            name: name.to_owned(),
            relative,
            addr: addr.parse().unwrap(),
        };
        table(
            dns_host,
            &[
                ("db=10.0.2.9", host("db", true, "10.0.2.9")),
                ("DB.=10.0.2.9", host("db", false, "10.0.2.9")),
                ("www.Example.org=2001:db8::80", host("www.example.org", false, "2001:db8::80")),
                ("_x-1.a=0.0.0.0", host("_x-1.a", false, "0.0.0.0")),
            ],
            &[
                ("", "expected NAME=IP"),
                ("db", "expected NAME=IP"),
                ("db=", "expected NAME=IP"),
                ("db=host", "expected NAME=IP"),
                ("=10.0.2.9", "'' is not a domain name"),
                ("a..b=10.0.2.9", "'a..b' is not a domain name"),
                ("-a=10.0.2.9", "is not a domain name"),
                ("a-=10.0.2.9", "is not a domain name"),
                ("a b=10.0.2.9", "is not a domain name"),
                ("*.a=10.0.2.9", "is not a domain name"),
            ],
        );
    }

    #[test]
    fn dns_domain_values() {
        let label = "x".repeat(63);
        let longest = [&label[..], &label, &label, &label[..61]].join(".");
        table(
            dns_domain,
            &[
                ("vunet.internal", "vunet.internal".to_owned()),
                ("Lab.Example.", "lab.example".to_owned()),
                ("lan", "lan".to_owned()),
                (&longest, longest.clone()),
            ],
            &[
                ("", "is not a domain name"),
                (".", "is not a domain name"),
                (".a", "is not a domain name"),
                ("a..", "is not a domain name"),
                ("local", "multicast DNS"),
                ("vm.LOCAL.", "multicast DNS"),
                (&format!("{label}x"), "is not a domain name"),
                (&format!("x{longest}"), "is not a domain name"),
            ],
        );
        assert_eq!(longest.len(), NAME_CHARS_MAX);
    }

    #[test]
    fn a_relative_name_goes_under_the_domain_and_a_dotted_one_does_not() {
        let name = |text: &str| dns_host(text).unwrap().qualified("lan");
        assert_eq!(name("db=10.0.2.9"), Ok("db.lan".to_owned()));
        assert_eq!(name("db.=10.0.2.9"), Ok("db".to_owned()));
        assert_eq!(name("a.b=10.0.2.9"), Ok("a.b".to_owned()));
        let long = "d".repeat(NAME_CHARS_MAX - 2);
        assert!(dns_host("ab=10.0.2.9").unwrap().qualified(&long).is_err());
        assert!(dns_host("a=10.0.2.9").unwrap().qualified(&long).is_ok());
    }

    #[test]
    fn mac_values() {
        table(
            guest_mac,
            &[("52:54:00:12:34:56", MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]))],
            &[
                ("52:54:00:12:34", "not a MAC address"),
                ("00:00:00:00:00:00", "neither zero nor multicast"),
                ("01:00:5e:00:00:01", "neither zero nor multicast"),
                ("ff:ff:ff:ff:ff:ff", "neither zero nor multicast"),
                ("02:ab:cd:00:00:01", "vunet's own address"),
            ],
        );
    }

    #[test]
    fn ip_mtu_values() {
        let mtu = |bytes| IpMtu::new(bytes).unwrap();
        table(
            ip_mtu,
            &[("576", mtu(576)), ("1500", IpMtu::DEFAULT), ("65521", mtu(65_521))],
            &[
                ("575", "from 576 to 65521"),
                ("65522", "from 576 to 65521"),
                ("70000", "from 576 to 65521"),
                ("-1", "from 576 to 65521"),
                ("9k", "from 576 to 65521"),
            ],
        );
    }

    #[test]
    fn subnet_values() {
        let net = |text: &str| text.parse::<Ipv4Subnet>().unwrap();
        table(
            subnet,
            &[
                ("10.0.2.0/24", net("10.0.2.0/24")),
                ("10.0.0.0/8", net("10.0.0.0/8")),
                ("192.168.7.4/30", net("192.168.7.4/30")),
            ],
            &[
                ("10.0.2.0", "expected ADDRESS/PREFIX"),
                ("fd00::/64", "expected ADDRESS/PREFIX"),
                ("10.0.2.0/x", "expected ADDRESS/PREFIX"),
                ("10.0.2.0/31", "use 8 to 30"),
                ("10.0.0.0/7", "use 8 to 30"),
                ("10.0.2.1/24", "the subnet is 10.0.2.0/24"),
                ("127.0.0.0/8", "127/8 and 224/3 are reserved"),
                ("0.0.0.0/24", "are reserved"),
                ("224.0.0.0/24", "are reserved"),
                ("240.0.0.0/24", "are reserved"),
            ],
        );
    }

    #[test]
    fn log_level_values() {
        let same = |text: &'static str| (text, text.to_owned());
        table(
            log_level,
            &[same("off"), same("info"), same("TRACE"), same("warn,vunet::device=debug")],
            &[
                ("", "neither a level"),
                ("verbose", "'verbose' is neither a level"),
                ("vunet::device", "neither a level"),
                ("info,", "'' is neither a level"),
                ("vunet=loud", "'vunet=loud' is neither"),
                ("=info", "'=info' is neither"),
            ],
        );
    }

    #[test]
    fn address_and_descriptor_values() {
        table(
            ipv4_addr,
            &[("10.0.2.1", Ipv4Addr::new(10, 0, 2, 1))],
            &[("", "expected an IPv4 address"), ("::1", "expected an IPv4 address"), ("10.0.2", "expected")],
        );
        table(descriptor, &[("3", 3), ("-1", -1)], &[("", "such as 3"), ("x", "such as 3")]);
    }
}
