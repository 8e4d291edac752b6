//! Frames by hand: what the guest sends, and what it finds in its buffers, every checksum checked.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use vunet::addr::MacAddr;
use vunet::wire::checksum::{self, Accumulator};
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::icmpv4::Message;
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags, Options, SeqNumber};
use vunet::wire::vnet::Checksum;
use vunet::wire::{arp, udp};

use crate::port::Received;

pub(crate) const GUEST_MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
pub(crate) const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

pub(crate) fn guest(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(GUEST_IP, port)
}

pub(crate) fn world(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(WORLD, port)
}

pub(crate) fn gateway(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(GATEWAY, port)
}

/// An IPv4 header with the usual fields.
pub(crate) fn ip(src: Ipv4Addr, dst: Ipv4Addr, protocol: Protocol, payload_bytes: usize) -> ipv4::Header {
    ipv4::Header {
        src,
        dst,
        protocol,
        ttl: 64,
        tos: 0,
        ident: 0x4242,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes,
    }
}

/// A frame of the guest to the gateway's MAC address.
pub(crate) fn frame(header: &ipv4::Header, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; ethernet::HEADER_BYTES + ipv4::HEADER_BYTES];
    ethernet::Header { dst: MacAddr::GATEWAY, src: GUEST_MAC, ethertype: EtherType::IPV4 }.emit(&mut out);
    header.emit(&mut out[ethernet::HEADER_BYTES..]);
    out.extend_from_slice(payload);
    out
}

fn transport_checksum(src: Ipv4Addr, dst: Ipv4Addr, protocol: Protocol, message: &mut [u8], at: usize) {
    let mut sum = checksum::pseudo_header(src.into(), dst.into(), protocol, message.len());
    sum.add_bytes(message);
    message[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
}

/// A UDP datagram, header included.
pub(crate) fn udp_message(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![0; udp::HEADER_BYTES];
    message.extend_from_slice(payload);
    let len_bytes = message.len();
    udp::Header { src_port: from.port(), dst_port: to.port(), len_bytes, checksum: 0 }.emit(&mut message);
    transport_checksum(*from.ip(), *to.ip(), Protocol::UDP, &mut message, udp::CHECKSUM_OFFSET);
    message
}

/// A frame with a UDP datagram.
pub(crate) fn udp_frame(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let message = udp_message(from, to, payload);
    frame(&ip(*from.ip(), *to.ip(), Protocol::UDP, message.len()), &message)
}

/// An echo request, header included.
pub(crate) fn echo_message(ident: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let mut message = vec![0; 8 + payload.len()];
    Message::EchoRequest { ident, seq }.emit_with_payload(payload, &mut message);
    message
}

/// A frame with an echo request.
pub(crate) fn echo_frame(to: Ipv4Addr, ident: u16, seq: u16, payload: &[u8]) -> Vec<u8> {
    let message = echo_message(ident, seq, payload);
    frame(&ip(GUEST_IP, to, Protocol::ICMP, message.len()), &message)
}

/// `message` from the guest to `dst` in fragments of at most `ip_mtu` bytes.
pub(crate) fn fragments(
    dst: Ipv4Addr,
    protocol: Protocol,
    message: &[u8],
    ident: u16,
    ip_mtu: usize,
) -> Vec<Vec<u8>> {
    let room = (ip_mtu - ipv4::HEADER_BYTES) & !7;
    let count = message.len().div_ceil(room);
    let part = |(n, bytes): (usize, &[u8])| {
        let mut header = ip(GUEST_IP, dst, protocol, bytes.len());
        header.ident = ident;
        header.fragment_offset_bytes = (n * room) as u16;
        header.more_fragments = n + 1 < count;
        frame(&header, bytes)
    };
    message.chunks(room).enumerate().map(part).collect()
}

/// A TCP segment of the guest, to be varied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seg<'a> {
    pub(crate) from: SocketAddrV4,
    pub(crate) to: SocketAddrV4,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    pub(crate) options: Options,
    pub(crate) payload: &'a [u8],
}

impl Seg<'_> {
    pub(crate) fn frame(&self) -> Vec<u8> {
        let header = tcp::Header {
            src_port: self.from.port(),
            dst_port: self.to.port(),
            seq: SeqNumber(self.seq),
            ack: SeqNumber(self.ack),
            flags: self.flags,
            window: self.window,
            urgent: 0,
            options: self.options,
        };
        let mut message = vec![0; header.header_bytes()];
        header.emit(&mut message);
        message.extend_from_slice(self.payload);
        let (src, dst) = (*self.from.ip(), *self.to.ip());
        // Unlike UDP's, a TCP checksum of zero is sent as such; both verify.
        transport_checksum(src, dst, Protocol::TCP, &mut message, tcp::CHECKSUM_OFFSET);
        frame(&ip(src, dst, Protocol::TCP, message.len()), &message)
    }
}

/// A TCP segment the guest received.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct TcpSeen {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) header: tcp::Header,
    pub(crate) payload: Vec<u8>,
}

impl std::fmt::Debug for TcpSeen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tcp::Header { seq, ack, flags, window, .. } = self.header;
        let (from, to, len) = (self.from, self.to, self.payload.len());
        write!(f, "{from} to {to} {flags:?} seq {} ack {} window {window}, {len} bytes", seq.0, ack.0)
    }
}

impl TcpSeen {
    pub(crate) fn has(&self, flags: Flags) -> bool {
        self.header.flags.contains(flags)
    }
}

/// What the guest received, by kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Arp(arp::Packet),
    Tcp(TcpSeen),
    Udp { from: SocketAddr, to: SocketAddr, payload: Vec<u8> },
    Icmp { from: Ipv4Addr, message: Message, payload: Vec<u8> },
}

impl Seen {
    pub(crate) fn tcp(self) -> TcpSeen {
        match self {
            Seen::Tcp(segment) => segment,
            other => panic!("not TCP: {other:?}"),
        }
    }

    /// The code of "destination unreachable" and the quoted packet.
    pub(crate) fn unreachable(self) -> (u8, Vec<u8>) {
        match self {
            Seen::Icmp { message: Message::Unreachable { code, .. }, payload, .. } => (code.into(), payload),
            other => panic!("not unreachable: {other:?}"),
        }
    }
}

/// The pieces of one packet, each with its offset, and its length once known.
type Pieces = (Vec<(usize, Vec<u8>)>, Option<usize>);

/// Puts fragments together and reads what is whole.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    partial: HashMap<u16, Pieces>,
    pub(crate) fragments: usize,
}

impl Reader {
    /// Reads one frame; `None` for a fragment whose packet is not complete yet. Panics if anything in
    /// it is wrong.
    pub(crate) fn read(&mut self, received: &Received, ip_mtu: usize) -> Option<Seen> {
        let frame = &received.frame;
        let eth = ethernet::Header::parse(frame).expect("an Ethernet header");
        assert_eq!(eth.src, MacAddr::GATEWAY);
        let body = &frame[ethernet::HEADER_BYTES..];
        if eth.ethertype == EtherType::ARP {
            return Some(Seen::Arp(arp::Packet::parse(body).expect("an ARP packet")));
        }
        let ip = ipv4::Header::parse(body, body.len()).expect("an IPv4 header");
        assert_eq!(ip.header_bytes + ip.payload_bytes, body.len(), "the frame ends with its packet");
        assert!(body.len() <= ip_mtu || received.vnet.gso.is_some(), "{} bytes exceed the MTU", body.len());
        let mut message = body[ip.header_bytes..].to_vec();
        if let Checksum::Partial { start, offset } = received.vnet.checksum {
            let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
            assert!(!ip.is_fragment() && start == ethernet::HEADER_BYTES + ip.header_bytes);
            let mut sum = Accumulator::new();
            sum.add_bytes(&frame[start..]);
            message[at - start..at - start + 2].copy_from_slice(&sum.finish().to_be_bytes());
        }
        if ip.is_fragment() {
            self.fragments += 1;
            message = self.collect(&ip, message)?;
        }
        Some(read_message(&ip, &message))
    }

    fn collect(&mut self, ip: &ipv4::Header, bytes: Vec<u8>) -> Option<Vec<u8>> {
        let (pieces, total) = self.partial.entry(ip.ident).or_default();
        let offset = usize::from(ip.fragment_offset_bytes);
        if !ip.more_fragments {
            *total = Some(offset + bytes.len());
        }
        pieces.push((offset, bytes));
        let held: usize = pieces.iter().map(|(_, bytes)| bytes.len()).sum();
        if *total != Some(held) {
            return None;
        }
        let (mut pieces, _) = self.partial.remove(&ip.ident).expect("just there");
        pieces.sort();
        let mut whole = Vec::new();
        for (offset, bytes) in pieces {
            assert_eq!(offset, whole.len(), "fragments neither overlap nor leave gaps");
            whole.extend(bytes);
        }
        Some(whole)
    }
}

fn read_message(ip: &ipv4::Header, message: &[u8]) -> Seen {
    if ip.protocol != Protocol::ICMP {
        let mut sum =
            checksum::pseudo_header(IpAddr::V4(ip.src), IpAddr::V4(ip.dst), ip.protocol, message.len());
        sum.add_bytes(message);
        assert_eq!(sum.finish(), 0, "the transport checksum is right");
    }
    match ip.protocol {
        Protocol::TCP => {
            let (header, header_bytes) = tcp::Header::parse(message).expect("a TCP header");
            Seen::Tcp(TcpSeen {
                from: SocketAddr::new(ip.src.into(), header.src_port),
                to: SocketAddr::new(ip.dst.into(), header.dst_port),
                header,
                payload: message[header_bytes..].to_vec(),
            })
        }
        Protocol::UDP => {
            let header = udp::Header::parse(message, message.len()).expect("a UDP header");
            assert_eq!(header.len_bytes, message.len());
            assert_ne!(header.checksum, 0, "vunet always sends a UDP checksum");
            Seen::Udp {
                from: SocketAddr::new(ip.src.into(), header.src_port),
                to: SocketAddr::new(ip.dst.into(), header.dst_port),
                payload: message[udp::HEADER_BYTES..].to_vec(),
            }
        }
        Protocol::ICMP => {
            let mut sum = Accumulator::new();
            sum.add_bytes(message);
            assert_eq!(sum.finish(), 0, "the ICMP checksum is right");
            let parsed = Message::parse(message).expect("an ICMP header");
            Seen::Icmp { from: ip.src, message: parsed, payload: message[8..].to_vec() }
        }
        other => panic!("{other:?} is never sent to a guest"),
    }
}
