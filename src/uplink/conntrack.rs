//! Connections that the host's kernel redirects from a port of the host to a guest, and their end.
//!
//! Without its rule a redirected connection goes on: the kernel's entry of it says where its packets go. It ends with the
//! entry. What its client sends next is for the host then, which answers with RST. What the guest sends next would be taken
//! for a connection that begins in its middle (`nf_conntrack_tcp_loose`) and masqueraded; where the guest's port and the
//! host's are the same number it would go on as before. Another entry, of a connection between the client and the host
//! itself that is closed, therefore takes the place of the old one: it keeps the two ends' ports, so that the guest's packet
//! leaves by another, and the client, which knows none such, answers with RST. A new connection of the client's ends it.
//!
//! May touch: netlink sockets. Needs CAP_NET_ADMIN, as the rules do. Read first: `linux/netfilter/nfnetlink_conntrack.h`,
//! conntrack(8), the kernel's `nf_conntrack_proto_tcp.c`.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd as _;
use std::time::Duration;

use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, Nla,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol, Status,
    TCPFlags, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use crate::addr::Ipv4Subnet;

/// More than the kernel puts into one datagram.
const BUFFER_BYTES: usize = 64 << 10;
/// The kernel answers at once, or not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Entries looked at in one round.
const ENTRIES_MAX: usize = 1 << 16;
/// Rounds until none is left: one may come while others are ended, of a packet that was on its way.
const ROUNDS_MAX: usize = 64;

/// `IPCTNL_MSG_CT_GET`.
const GET: u8 = 1;
/// `CTA_ID`: of all entries there ever are.
const ID: u16 = 12;
/// `CTA_ZONE`.
const ZONE: u16 = 18;
/// `CTA_FILTER` (Linux 5.8; older ones tell of all entries), and its two nested masks.
const FILTER: u16 = 25;
const FILTER_ORIGINAL: u16 = 1;
const FILTER_REPLY: u16 = 2;
/// Bits of such a mask: protocol and destination port.
const BY_PROTOCOL_AND_PORT: u32 = 1 << 3 | 1 << 5;
/// States of TCP: between these two, in this order, a connection is there.
const NO_STATE: u8 = 0;
const TIME_WAIT: u8 = 7;
const CLOSE: u8 = 8;
/// Whatever an end sends is taken, and a SYN begins another connection (`IP_CT_TCP_FLAG_BE_LIBERAL`, `_CLOSE_INIT`).
const LIBERAL_AND_CLOSED: [u8; 2] = [0x08 | 0x04; 2];
/// How long what takes an entry's place waits for a word of either end: as long as the connection would have been kept.
const PLACE_HELD_S: u32 = 432_000;

/// Connections and exchanges of datagrams from a port of the host to guests of a network.
#[derive(Clone, Copy, Debug)]
pub struct Redirected {
    /// Whether it is UDP, else TCP.
    pub udp: bool,
    /// The host's end; the address is unspecified for "any".
    pub host: SocketAddrV4,
    /// The guest's port.
    pub guest_port: u16,
    /// Where guests are.
    pub subnet: Ipv4Subnet,
}

/// What of the kernel's entry of one is needed to end it.
#[derive(Clone, Debug)]
struct Entry {
    /// As its first packet came.
    original: Tuple4,
    /// What names it for the kernel: that tuple, identifier and zone.
    name: Vec<ConntrackAttribute>,
    /// TCP, and neither end has closed it.
    is_open: bool,
}

/// Source and destination of packets of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple4 {
    udp: bool,
    source: SocketAddrV4,
    destination: SocketAddrV4,
}

/// The way to the kernel's table of connections.
pub struct Conntrack {
    socket: Socket,
    buffer: Box<[u8]>,
    sequence: u32,
}

impl std::fmt::Debug for Conntrack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Conntrack").finish_non_exhaustive()
    }
}

impl Conntrack {
    /// Opens it.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> io::Result<Conntrack> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket2::SockRef::from(&socket.as_fd()).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Conntrack { socket, buffer: vec![0; BUFFER_BYTES].into_boxed_slice(), sequence: 0 })
    }

    /// How many of those there are: whether the kernel tells, above all.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN; `Unsupported` if the kernel lacks `nf_conntrack_netlink`.
    pub fn count(&mut self, of: &Redirected) -> io::Result<usize> {
        Ok(self.find(of)?.len())
    }

    /// Ends all of those; how many were open TCP connections. Both ends of each see RST when they next send.
    ///
    /// # Errors
    /// As [`Conntrack::count`]; some may have been ended.
    pub fn end(&mut self, of: &Redirected) -> io::Result<usize> {
        let mut ended = HashSet::new();
        for _ in 0..ROUNDS_MAX {
            let entries = self.find(of)?;
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                let there_was = self.carry_out(ConntrackMessage::Delete(entry.name), 0)?;
                if there_was && entry.is_open {
                    ended.insert((entry.original.source, entry.original.destination));
                }
                if there_was && !entry.original.udp {
                    self.hold_place(entry.original)?;
                }
            }
        }
        Ok(ended.len())
    }

    /// Puts a closed connection of the host itself in the place of one that was ended.
    fn hold_place(&mut self, original: Tuple4) -> io::Result<()> {
        let Tuple4 { source, destination, .. } = original;
        let reply = Tuple4 { source: destination, destination: source, ..original };
        let flags = || TCPFlags::parse(&LIBERAL_AND_CLOSED).map_err(io::Error::other);
        let state = vec![
            ProtoInfoTCP::State(CLOSE),
            ProtoInfoTCP::OriginalFlags(flags()?),
            ProtoInfoTCP::ReplyFlags(flags()?),
        ];
        let attributes = vec![
            ConntrackAttribute::CtaTupleOrig(original.attribute()),
            ConntrackAttribute::CtaTupleReply(reply.attribute()),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(state)]),
            ConntrackAttribute::CtaStatus(Status::Confirmed | Status::SeenReply | Status::Assured),
            ConntrackAttribute::CtaTimeout(PLACE_HELD_S),
        ];
        // One that is there already has come of a packet meanwhile, and does as well.
        self.carry_out(ConntrackMessage::New(attributes), NLM_F_CREATE | NLM_F_EXCL).map(drop)
    }

    /// All entries that are meant, up to a bound.
    fn find(&mut self, of: &Redirected) -> io::Result<Vec<Entry>> {
        self.send(question(of), NLM_F_DUMP)?;
        let mut entries = Vec::new();
        loop {
            let len = self.receive()?;
            for payload in Payloads(&self.buffer[..len]) {
                match payload? {
                    NetlinkPayload::Done(_) => return Ok(entries),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(NetfilterMessage {
                        inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                        ..
                    }) if entries.len() < ENTRIES_MAX => entries.extend(entry(attributes, of)),
                    _ => {}
                }
            }
        }
    }

    /// Has the kernel carry something out. False if there is no such entry, or there is one already.
    fn carry_out(&mut self, message: ConntrackMessage, flags: u16) -> io::Result<bool> {
        self.send(message, NLM_F_ACK | flags)?;
        loop {
            let len = self.receive()?;
            for payload in Payloads(&self.buffer[..len]) {
                let NetlinkPayload::Error(answer) = payload? else { continue };
                return match answer.code {
                    None => Ok(true),
                    Some(code) if [-libc::ENOENT, -libc::EEXIST].contains(&code.get()) => Ok(false),
                    Some(_) => Err(answer.to_io()),
                };
            }
        }
    }

    fn send(&mut self, message: impl Into<NetfilterMessageInner>, flags: u16) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let message = NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0), message);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return outcome,
            }
        }
    }
}

/// The messages of a datagram.
struct Payloads<'a>(&'a [u8]);

impl Iterator for Payloads<'_> {
    type Item = io::Result<NetlinkPayload<NetfilterMessage>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let message = match NetlinkMessage::<NetfilterMessage>::deserialize(self.0) {
            Ok(message) => message,
            Err(error) => {
                self.0 = &[];
                return Some(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
            }
        };
        let len = (message.header.length as usize).next_multiple_of(4);
        self.0 = self.0.get(len.max(1)..).unwrap_or_default();
        Some(Ok(message.payload))
    }
}

impl Tuple4 {
    fn attribute(self) -> Vec<Tuple> {
        let protocol = if self.udp { Protocol::Udp } else { Protocol::Tcp };
        vec![
            Tuple::Ip(vec![
                IPTuple::SourceAddress(IpAddr::V4(*self.source.ip())),
                IPTuple::DestinationAddress(IpAddr::V4(*self.destination.ip())),
            ]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(protocol),
                ProtoTuple::SourcePort(self.source.port()),
                ProtoTuple::DestinationPort(self.destination.port()),
            ]),
        ]
    }

    /// Reads one of TCP or UDP over IPv4.
    fn read(tuple: &[Tuple]) -> Option<Tuple4> {
        let (mut addrs, mut ports, mut udp) = ([None; 2], [None; 2], None);
        for part in tuple {
            match part {
                Tuple::Ip(ends) => ends.iter().for_each(|end| match end {
                    IPTuple::SourceAddress(IpAddr::V4(addr)) => addrs[0] = Some(*addr),
                    IPTuple::DestinationAddress(IpAddr::V4(addr)) => addrs[1] = Some(*addr),
                    _ => {}
                }),
                Tuple::Proto(ends) => ends.iter().for_each(|end| match end {
                    ProtoTuple::Protocol(Protocol::Tcp) => udp = Some(false),
                    ProtoTuple::Protocol(Protocol::Udp) => udp = Some(true),
                    ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                    ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                    _ => {}
                }),
                _ => {}
            }
        }
        let end = |n: usize| Some(SocketAddrV4::new(addrs[n]?, ports[n]?));
        Some(Tuple4 { udp: udp?, source: end(0)?, destination: end(1)? })
    }
}

/// The question for entries of a port: what the kernel does not know to look for is looked for here.
fn question(of: &Redirected) -> NetfilterMessageInner {
    let mask = |kind, bits: u32| attribute(kind, &bits.to_ne_bytes());
    let masks = [mask(FILTER_ORIGINAL, BY_PROTOCOL_AND_PORT), mask(FILTER_REPLY, 0)].concat();
    let end = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, of.host.port());
    let tuple =
        ConntrackAttribute::CtaTupleOrig(Tuple4 { udp: of.udp, source: end, destination: end }.attribute());
    let mut value = vec![0; tuple.value_len()];
    tuple.emit_value(&mut value);
    // The library's own question would have the filter without the mark of what is nested, and be refused.
    let nested = |kind, value| DefaultNla::new(kind | libc::NLA_F_NESTED as u16, value);
    let attributes = vec![nested(tuple.kind(), value), nested(FILTER, masks)];
    NetfilterMessageInner::Other { subsys: NetfilterSubsystem::Conntrack, message_type: GET, attributes }
}

/// An attribute of four bytes.
fn attribute(kind: u16, value: &[u8; 4]) -> Vec<u8> {
    [&8u16.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// The entry that these attributes tell of, if it is one of `of`.
fn entry(attributes: Vec<ConntrackAttribute>, of: &Redirected) -> Option<Entry> {
    let (mut original, mut reply, mut is_redirected, mut state) = (None, None, false, NO_STATE);
    for attribute in &attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = Tuple4::read(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = Tuple4::read(tuple),
            ConntrackAttribute::CtaStatus(status) => is_redirected = status.contains(Status::DstNat),
            ConntrackAttribute::CtaProtoInfo(infos) => {
                let infos = infos.iter().filter_map(|info| match info {
                    ProtoInfo::TCP(tcp) => Some(tcp),
                    _ => None,
                });
                let mut states = infos.flatten().filter_map(|info| match info {
                    ProtoInfoTCP::State(state) => Some(*state),
                    _ => None,
                });
                state = states.next().unwrap_or(NO_STATE);
            }
            _ => {}
        }
    }
    let (original, reply) = (original?, reply?);
    let to = original.destination;
    let is_it = is_redirected
        && original.udp == of.udp
        && to.port() == of.host.port()
        && (of.host.ip().is_unspecified() || to.ip() == of.host.ip())
        && reply.source.port() == of.guest_port
        && of.subnet.contains(*reply.source.ip());
    let names = |attribute: &ConntrackAttribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(_) => true,
        ConntrackAttribute::Other(other) => [ID, ZONE].contains(&other.kind()),
        _ => false,
    };
    let is_open = !original.udp && (NO_STATE + 1..TIME_WAIT).contains(&state);
    is_it.then(|| Entry { original, name: attributes.into_iter().filter(names).collect(), is_open })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    fn port(udp: bool, host: &str) -> Redirected {
        let subnet = Ipv4Subnet::new(Ipv4Addr::new(10, 0, 2, 0), 24).unwrap();
        Redirected { udp, host: v4(host), guest_port: 80, subnet }
    }

    /// What the kernel tells of a connection from 192.0.2.2:5 to 192.0.2.1:8080, redirected to `guest`.
    fn told(udp: bool, guest: &str, status: Status, state: u8) -> Vec<ConntrackAttribute> {
        let (client, host, guest) = (v4("192.0.2.2:5"), v4("192.0.2.1:8080"), v4(guest));
        vec![
            ConntrackAttribute::CtaTupleOrig(Tuple4 { udp, source: client, destination: host }.attribute()),
            ConntrackAttribute::CtaTupleReply(Tuple4 { udp, source: guest, destination: client }.attribute()),
            ConntrackAttribute::CtaStatus(status),
            ConntrackAttribute::CtaTimeout(7),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![ProtoInfoTCP::State(state)])]),
            ConntrackAttribute::Other(DefaultNla::new(ID, vec![1, 2, 3, 4])),
            ConntrackAttribute::Other(DefaultNla::new(ZONE, vec![0, 9])),
        ]
    }

    #[test]
    fn entries_of_a_port_are_told_from_others() {
        let (nat, guest) = (Status::DstNat | Status::Confirmed, "10.0.2.2:80");
        let cases = [
            (told(false, guest, nat, 3), port(false, "0.0.0.0:8080"), true),
            (told(false, guest, nat, 3), port(false, "192.0.2.1:8080"), true),
            (told(true, guest, nat, 0), port(true, "0.0.0.0:8080"), true),
            (told(true, guest, nat, 0), port(false, "0.0.0.0:8080"), false),
            (told(false, guest, nat, 3), port(false, "192.0.2.9:8080"), false),
            (told(false, guest, nat, 3), port(false, "0.0.0.0:8081"), false),
            (told(false, "10.0.2.2:81", nat, 3), port(false, "0.0.0.0:8080"), false),
            // Somebody else's, who redirects the same number.
            (told(false, "172.17.0.2:80", nat, 3), port(false, "0.0.0.0:8080"), false),
            (told(false, guest, Status::SrcNat, 3), port(false, "0.0.0.0:8080"), false),
        ];
        for (n, (attributes, of, expected)) in cases.into_iter().enumerate() {
            assert_eq!(entry(attributes, &of).is_some(), expected, "number {n}");
        }
        let open =
            |state| entry(told(false, guest, nat, state), &port(false, "0.0.0.0:8080")).unwrap().is_open;
        assert_eq!([0, 1, 3, 6, 7, 8].map(open), [false, true, true, true, false, false]);
    }

    #[test]
    fn an_entry_is_named_by_what_no_other_has() {
        let found =
            entry(told(false, "10.0.2.2:80", Status::DstNat, 3), &port(false, "0.0.0.0:8080")).unwrap();
        let kinds: Vec<u16> = found.name.iter().map(Nla::kind).collect();
        assert_eq!(kinds, [1, ID, ZONE]);
        assert_eq!(found.original.source, v4("192.0.2.2:5"));
    }

    #[test]
    fn what_is_sent_is_read_again() {
        let of = port(true, "0.0.0.0:8080");
        let message =
            NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0), question(&of));
        let mut message = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        // The filter's own attribute, as `linux/netlink.h` lays it out: length, kind, two masks.
        let masks = [attribute(1, &(8u32 | 32).to_ne_bytes()), attribute(2, &0u32.to_ne_bytes())].concat();
        let nested = [&20u16.to_ne_bytes()[..], &(25u16 | 0x8000).to_ne_bytes(), &masks].concat();
        assert!(bytes.windows(nested.len()).any(|part| part == nested), "{bytes:02x?}");
        let whole = [bytes.clone(), bytes].concat();
        assert_eq!(Payloads(&whole).filter(Result::is_ok).count(), 2);
        assert!(Payloads(&whole[..whole.len() - 1]).last().unwrap().is_err(), "what is cut is no message");
    }
}
