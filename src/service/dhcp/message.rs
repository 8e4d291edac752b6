//! DHCP messages: what a client's request says, and the bytes of a reply.
//!
//! Requests are read with the crate's borrowed view, option by option, and only those options that
//! matter here: a client's malformed or unknown option must not hide the ones behind it. An option
//! split over several (RFC 3396) or overflowing into `file` and `sname` (option 52) is put
//! together first.
//!
//! Replies hold the options every client needs, those it asked for (option 55), and no more than
//! it said it can take (option 57).
//!
//! Read first: RFC 2131, 2 and table 3; RFC 2132; RFC 3046 (82), 3397 (119), 4702 (81), 6842 (61).

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use dhcproto::v4::borrowed::{DhcpOptionIterator, Message as View};
use dhcproto::v4::{
    DhcpOption, Encodable, Flags, HType, MAGIC, MIN_PACKET_SIZE, Message, MessageType, Opcode, OptionCode,
    UnknownOption,
};
use hickory_proto::rr::Name;

use crate::addr::MacAddr;
use crate::config::{DnsConfig, IpMtu, Lan};
use crate::limits;
use crate::network::allocator::{Client, LEASE_TIME};

/// Fixed part and magic cookie, in bytes.
const FIXED_BYTES: usize = 240;
const MAGIC_AT: std::ops::Range<usize> = 236..240;
const SNAME_AT: std::ops::Range<usize> = 44..108;
const FILE_AT: std::ops::Range<usize> = 108..236;
/// IPv4 header without options, and UDP header.
const IP_UDP_BYTES: u16 = 28;
/// What every client can take, IP and UDP headers included (RFC 2131, 2).
const MESSAGE_SIZE_MIN: u16 = 576;
/// Data of one option.
const OPTION_BYTES_MAX: usize = 255;
/// A client identifier or relay information we echo: one option's worth.
const ECHO_BYTES_MAX: usize = OPTION_BYTES_MAX;
/// Options left out, one after the other, if a reply is longer than the client can take. What is
/// not here is needed to use the address at all.
const DISPENSABLE: [OptionCode; 7] = [
    OptionCode::DomainSearch,
    OptionCode::Hostname,
    OptionCode::DomainName,
    OptionCode::RelayAgentInformation,
    OptionCode::BroadcastAddr,
    OptionCode::InterfaceMtu,
    OptionCode::ClientIdentifier,
];

/// Why bytes are not a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Length, operation or magic cookie.
    Malformed,
    /// Hardware type, length or address.
    NotEthernet,
    /// No message type: BOOTP.
    NoType,
}

/// A client's message, as far as it matters.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) message_type: MessageType,
    pub(super) xid: u32,
    pub(super) flags: Flags,
    /// The address the client uses, unspecified if none.
    pub(super) ciaddr: Ipv4Addr,
    /// The relay, unspecified if none.
    pub(super) giaddr: Ipv4Addr,
    /// Hardware address: the client's key.
    pub(super) mac: MacAddr,
    /// Option 50.
    pub(super) requested: Option<Ipv4Addr>,
    /// Option 54.
    pub(super) server: Option<Ipv4Addr>,
    /// The client's name for itself, made a lower-case label (option 12, or the first label of 81).
    pub(super) host_name: Option<String>,
    /// Option 57, bytes with IP and UDP headers.
    message_size_max: Option<u16>,
    /// Option 55; `None` if the client leaves the choice to us.
    parameters: Option<Vec<u8>>,
    /// Option 61, echoed.
    pub(super) client_id: Option<Vec<u8>>,
    /// Option 82, echoed.
    relay_info: Option<Vec<u8>>,
}

impl Request {
    pub(super) fn parse(bytes: &[u8]) -> Result<Request, Fault> {
        if bytes.len() < FIXED_BYTES || bytes.len() > limits::DHCP_MESSAGE_BYTES_MAX {
            return Err(Fault::Malformed);
        }
        let view = View::new(bytes).map_err(|_| Fault::Malformed)?;
        if view.opcode() != Opcode::BootRequest || bytes[MAGIC_AT] != MAGIC {
            return Err(Fault::Malformed);
        }
        if view.htype() != HType::Eth || view.hlen() != 6 {
            return Err(Fault::NotEthernet);
        }
        let mac = view.chaddr().try_into().map(MacAddr).map_err(|_| Fault::NotEthernet)?;
        if !mac.is_unicast() {
            return Err(Fault::NotEthernet);
        }
        let options = Options::collect(bytes);
        let message_type = match options.get(OptionCode::MessageType) {
            Some(&[value]) => MessageType::from(value),
            Some(_) => return Err(Fault::Malformed),
            None => return Err(Fault::NoType),
        };
        let echo = |code| options.get(code).filter(|data| data.len() <= ECHO_BYTES_MAX).map(<[u8]>::to_vec);
        Ok(Request {
            message_type,
            xid: view.xid(),
            flags: view.flags(),
            ciaddr: view.ciaddr(),
            giaddr: view.giaddr(),
            mac,
            requested: options.address(OptionCode::RequestedIpAddress),
            server: options.address(OptionCode::ServerIdentifier),
            host_name: options.host_name(),
            message_size_max: options
                .get(OptionCode::MaxMessageSize)
                .and_then(|data| Some(u16::from_be_bytes(data.try_into().ok()?))),
            parameters: options.get(OptionCode::ParameterRequestList).map(<[u8]>::to_vec),
            client_id: echo(OptionCode::ClientIdentifier),
            relay_info: echo(OptionCode::RelayAgentInformation),
        })
    }

    /// Who asks.
    pub(super) fn client(&self) -> Client<'_> {
        Client { mac: self.mac, id: self.client_id.as_deref(), host_name: self.host_name.as_deref() }
    }

    /// Whether the client wants replies as broadcasts.
    pub(super) fn broadcast(&self) -> bool {
        self.flags.broadcast()
    }

    fn wants(&self, code: OptionCode) -> bool {
        self.parameters.as_ref().is_none_or(|list| list.contains(&u8::from(code)))
    }
}

/// The options of a message, each put together from its parts.
struct Options(BTreeMap<u8, Vec<u8>>);

impl Options {
    fn collect(bytes: &[u8]) -> Options {
        let mut options = Options(BTreeMap::new());
        options.add(&bytes[FIXED_BYTES..]);
        let overload = match options.get(OptionCode::OptionOverload) {
            Some(&[fields]) => fields,
            _ => 0,
        };
        if overload & 1 != 0 {
            options.add(&bytes[FILE_AT]);
        }
        if overload & 2 != 0 {
            options.add(&bytes[SNAME_AT]);
        }
        options
    }

    fn add(&mut self, field: &[u8]) {
        for option in DhcpOptionIterator::new(field) {
            self.0.entry(option.code().into()).or_default().extend_from_slice(option.data());
        }
    }

    fn get(&self, code: OptionCode) -> Option<&[u8]> {
        self.0.get(&u8::from(code)).map(Vec::as_slice)
    }

    fn address(&self, code: OptionCode) -> Option<Ipv4Addr> {
        let octets: [u8; 4] = self.get(code)?.try_into().ok()?;
        Some(Ipv4Addr::from(octets)).filter(|ip| !ip.is_unspecified())
    }

    fn host_name(&self) -> Option<String> {
        let plain = self.get(OptionCode::Hostname).and_then(first_label);
        plain.or_else(|| first_label_of_fqdn(self.get(OptionCode::ClientFQDN)?))
    }
}

/// Option 81: flags, two bytes of no use, then the name, in wire form if bit E is set (RFC 4702, 2).
fn first_label_of_fqdn(data: &[u8]) -> Option<String> {
    const E: u8 = 0x04;
    let (&flags, name) = (data.first()?, data.get(3..)?);
    if flags & E == 0 {
        return first_label(name);
    }
    let (&len, rest) = name.split_first()?;
    first_label(rest.get(..usize::from(len))?)
}

/// The first label of a name as clients send it, in lower case, if it can be a host name: letters,
/// digits and inner hyphens, at most 63 (RFC 1123, 2.1). Never `localhost`.
fn first_label(name: &[u8]) -> Option<String> {
    let label = name.split(|&byte| byte == b'.' || byte == 0).next()?;
    let fits = (1..=63).contains(&label.len())
        && label.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-')
        && label.first() != Some(&b'-')
        && label.last() != Some(&b'-');
    let label = fits.then(|| String::from_utf8_lossy(label).to_ascii_lowercase())?;
    (label != "localhost").then_some(label)
}

/// Writes replies: everything of the configuration that a reply can hold.
#[derive(Debug)]
pub(super) struct ReplyWriter {
    lan: Lan,
    dns: bool,
    domain: Option<(String, Name)>,
    /// The domain and those of the host's search list.
    search: Vec<Name>,
}

impl ReplyWriter {
    /// Changes the MTU offered from now on.
    pub(super) fn set_ip_mtu(&mut self, ip_mtu: IpMtu) {
        self.lan.ip_mtu = ip_mtu;
    }

    pub(super) fn new(lan: &Lan, dns: &DnsConfig) -> ReplyWriter {
        let name = Name::from_ascii(&dns.domain).ok().filter(|name| !name.is_root());
        let domain = name.map(|mut name| {
            name.set_fqdn(true);
            (dns.domain.clone(), name)
        });
        let mut writer = ReplyWriter {
            lan: *lan,
            dns: dns.enabled,
            domain: domain.filter(|_| dns.enabled),
            search: Vec::new(),
        };
        writer.set_search(&[]);
        writer
    }

    /// Sets the domains clients are told of besides the network's own, as many as one option holds: not
    /// every client puts a longer one together (RFC 3396), and each domain is a question more for every
    /// short name.
    pub(super) fn set_search(&mut self, domains: &[String]) {
        self.search.clear();
        let Some((_, own)) = &self.domain else { return };
        let mut bytes = 0;
        let others = domains.iter().filter_map(|domain| Name::from_ascii(domain).ok());
        for mut name in std::iter::once(own.clone()).chain(others) {
            name.set_fqdn(true);
            // In wire form, without the compression that makes it shorter.
            bytes += name.len() + 1;
            if bytes > OPTION_BYTES_MAX {
                return;
            }
            if !self.search.contains(&name) {
                self.search.push(name);
            }
        }
    }

    /// OFFER, or ACK of a REQUEST: address, lease and parameters.
    pub(super) fn grant(
        &self,
        request: &Request,
        message_type: MessageType,
        yiaddr: Ipv4Addr,
        host_name: Option<&str>,
    ) -> Vec<u8> {
        let mut reply = self.blank(request, message_type);
        reply.set_yiaddr(yiaddr);
        if message_type == MessageType::Ack {
            reply.set_ciaddr(request.ciaddr);
        }
        // A u32 holds the whole lease; T1 and T2 are the fractions of RFC 2131, 4.4.5.
        let lease_s = u32::try_from(LEASE_TIME.as_secs()).unwrap_or(u32::MAX);
        let options = reply.opts_mut();
        options.insert(DhcpOption::AddressLeaseTime(lease_s));
        options.insert(DhcpOption::Renewal(lease_s / 2));
        options.insert(DhcpOption::Rebinding(lease_s / 8 * 7));
        if let Some(name) = host_name.filter(|_| request.wants(OptionCode::Hostname)) {
            options.insert(DhcpOption::Hostname(name.to_owned()));
        }
        self.add_parameters(request, &mut reply);
        self.finish(request, reply)
    }

    /// ACK of an INFORM: parameters, but neither address nor lease (RFC 2131, 4.3.5).
    pub(super) fn inform_ack(&self, request: &Request) -> Vec<u8> {
        let mut reply = self.blank(request, MessageType::Ack);
        reply.set_ciaddr(request.ciaddr);
        self.add_parameters(request, &mut reply);
        self.finish(request, reply)
    }

    /// NAK: nothing but who says so and why (RFC 2131, table 3).
    pub(super) fn nak(&self, request: &Request) -> Vec<u8> {
        let mut reply = self.blank(request, MessageType::Nak);
        if !request.giaddr.is_unspecified() {
            reply.set_flags(request.flags.set_broadcast());
        }
        reply.opts_mut().insert(DhcpOption::Message("address not available here".to_owned()));
        self.finish(request, reply)
    }

    fn blank(&self, request: &Request, message_type: MessageType) -> Message {
        let unspecified = Ipv4Addr::UNSPECIFIED;
        let mut reply = Message::new_with_id(
            request.xid,
            unspecified,
            unspecified,
            unspecified,
            request.giaddr,
            &request.mac.0,
        );
        reply.set_opcode(Opcode::BootReply).set_flags(request.flags);
        let options = reply.opts_mut();
        options.insert(DhcpOption::MessageType(message_type));
        options.insert(DhcpOption::ServerIdentifier(self.lan.gateway));
        if let Some(id) = &request.client_id {
            options.insert(DhcpOption::ClientIdentifier(id.clone()));
        }
        if let Some(info) = &request.relay_info {
            let raw = UnknownOption::new(OptionCode::RelayAgentInformation, info.clone());
            options.insert(DhcpOption::Unknown(raw));
        }
        reply
    }

    fn add_parameters(&self, request: &Request, reply: &mut Message) {
        let options = reply.opts_mut();
        options.insert(DhcpOption::SubnetMask(self.lan.subnet.mask()));
        options.insert(DhcpOption::Router(vec![self.lan.gateway]));
        if self.dns {
            options.insert(DhcpOption::DomainNameServer(vec![self.lan.gateway]));
        }
        // Unasked where it is not what every client assumes: a smaller link would lose packets.
        if self.lan.ip_mtu != IpMtu::DEFAULT || request.wants(OptionCode::InterfaceMtu) {
            options.insert(DhcpOption::InterfaceMtu(self.lan.ip_mtu.get()));
        }
        if request.wants(OptionCode::BroadcastAddr) {
            options.insert(DhcpOption::BroadcastAddr(self.lan.subnet.broadcast()));
        }
        if let Some((text, _)) = &self.domain {
            if request.wants(OptionCode::DomainName) {
                options.insert(DhcpOption::DomainName(text.clone()));
            }
            if request.wants(OptionCode::DomainSearch) {
                options.insert(DhcpOption::DomainSearch(self.search.clone()));
            }
        }
    }

    /// The bytes, no longer than the client and the link take, no shorter than BOOTP's 300.
    fn finish(&self, request: &Request, mut reply: Message) -> Vec<u8> {
        let asked = request.message_size_max.unwrap_or(MESSAGE_SIZE_MIN);
        let size = asked.max(MESSAGE_SIZE_MIN).min(self.lan.ip_mtu.get());
        let bytes_max = usize::from(size - IP_UDP_BYTES);
        let mut dispensable = DISPENSABLE.iter();
        loop {
            let mut bytes =
                reply.to_vec().expect("options of bounded length always encode into a growing buffer");
            if bytes.len() <= bytes_max {
                bytes.resize(bytes.len().max(MIN_PACKET_SIZE), 0);
                return bytes;
            }
            let code =
                dispensable.next().expect("a reply without its dispensable options is under 548 bytes");
            reply.opts_mut().remove(*code);
        }
    }
}
