//! Frames built from their meaning, every checksum summed in full: what a translation must come to.

use std::net::{IpAddr, Ipv4Addr};

use vunet::addr::MacAddr;
use vunet::wire::checksum::{self, Accumulator, udp_nonzero};
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags, SeqNumber};
use vunet::wire::vnet::{Checksum, VnetHeader};
use vunet::wire::{icmpv4, udp};

/// Where IP and its payload start in a built frame.
pub(crate) const IP_AT: usize = ethernet::HEADER_BYTES;
pub(crate) const TRANSPORT_AT: usize = IP_AT + ipv4::HEADER_BYTES;

/// What a frame carries.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    Tcp(tcp::Header),
    /// With a checksum or without.
    Udp {
        summed: bool,
    },
    /// An ICMP message of this type; identifier and port of the frame are one. The number is its sequence.
    Query {
        kind: u8,
        seq: u16,
    },
    /// DCCP or UDP-Lite: eight bytes without ports of ours and a checksum over all.
    Summed(Protocol),
    /// Bytes.
    Plain(Protocol),
}

/// A frame's meaning.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frame {
    pub(crate) src: (Ipv4Addr, u16),
    pub(crate) dst: (Ipv4Addr, u16),
    pub(crate) ttl: u8,
    pub(crate) ident: u16,
    pub(crate) dont_fragment: bool,
    pub(crate) body: Body,
    pub(crate) payload: Vec<u8>,
}

impl Frame {
    /// A datagram.
    pub(crate) fn udp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), payload: &[u8]) -> Frame {
        let (body, payload) = (Body::Udp { summed: true }, payload.to_vec());
        Frame { src, dst, ttl: 64, ident: 0, dont_fragment: false, body, payload }
    }

    /// A segment with the window wide open.
    pub(crate) fn tcp(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), flags: Flags, seq: u32, ack: u32) -> Frame {
        let header = tcp::Header {
            seq: SeqNumber(seq),
            ack: SeqNumber(ack),
            flags,
            window: 65_535,
            ..Default::default()
        };
        Frame { body: Body::Tcp(header), ..Frame::udp(src, dst, &[]) }
    }

    /// An echo request or its answer.
    pub(crate) fn echo(kind: u8, src: Ipv4Addr, dst: Ipv4Addr, ident: u16) -> Frame {
        Frame { body: Body::Query { kind, seq: 7 }, ..Frame::udp((src, ident), (dst, ident), b"echo echo") }
    }

    pub(crate) fn protocol(&self) -> Protocol {
        match self.body {
            Body::Tcp(_) => Protocol::TCP,
            Body::Udp { .. } => Protocol::UDP,
            Body::Query { .. } => Protocol::ICMP,
            Body::Summed(protocol) | Body::Plain(protocol) => protocol,
        }
    }

    /// Where the checksum stands in the transport, if it has one.
    pub(crate) fn checksum_offset(&self) -> Option<usize> {
        match self.body {
            Body::Tcp(_) => Some(tcp::CHECKSUM_OFFSET),
            Body::Udp { .. } | Body::Summed(_) => Some(udp::CHECKSUM_OFFSET),
            Body::Query { .. } => Some(2),
            Body::Plain(_) => None,
        }
    }

    /// The transport's header, checksum field zero.
    fn header(&self) -> Vec<u8> {
        let mut out = vec![0u8; 60];
        let len = match &self.body {
            Body::Tcp(header) => {
                let header = tcp::Header { src_port: self.src.1, dst_port: self.dst.1, ..*header };
                header.emit(&mut out)
            }
            Body::Udp { .. } => {
                let len_bytes = udp::HEADER_BYTES + self.payload.len();
                udp::Header { src_port: self.src.1, dst_port: self.dst.1, len_bytes, checksum: 0 }
                    .emit(&mut out);
                udp::HEADER_BYTES
            }
            Body::Query { kind, seq } => {
                out[0] = *kind;
                out[4..6].copy_from_slice(&self.src.1.to_be_bytes());
                out[6..8].copy_from_slice(&seq.to_be_bytes());
                icmpv4::HEADER_BYTES
            }
            Body::Summed(_) => udp::HEADER_BYTES,
            Body::Plain(_) => 0,
        };
        out.truncate(len);
        out
    }

    /// The transport, its checksum complete, or with `partial` the pseudo-header's sum.
    fn transport(&self, partial: bool) -> Vec<u8> {
        let mut out = self.header();
        out.extend_from_slice(&self.payload);
        let Some(at) = self.checksum_offset() else { return out };
        let mut sum = match self.body {
            Body::Query { .. } => Accumulator::new(),
            _ => {
                let (src, dst) = (IpAddr::V4(self.src.0), IpAddr::V4(self.dst.0));
                checksum::pseudo_header(src, dst, self.protocol(), out.len())
            }
        };
        let value = if partial {
            sum.fold()
        } else {
            sum.add_bytes(&out);
            match self.body {
                Body::Udp { summed: false } => 0,
                Body::Udp { summed: true } => udp_nonzero(sum.finish()),
                _ => sum.finish(),
            }
        };
        out[at..at + 2].copy_from_slice(&value.to_be_bytes());
        out
    }

    /// The frame.
    pub(crate) fn build(&self) -> Vec<u8> {
        self.around(&self.transport(false))
    }

    /// The frame with a partial checksum, and the virtio-net header that says so.
    pub(crate) fn build_partial(&self) -> (VnetHeader, Vec<u8>) {
        let offset = self.checksum_offset().expect("a checksum to leave partial") as u16;
        let checksum = Checksum::Partial { start: TRANSPORT_AT as u16, offset };
        (VnetHeader { checksum, ..VnetHeader::default() }, self.around(&self.transport(true)))
    }

    /// Its fragments of at most `len_bytes` of payload each, a multiple of eight.
    pub(crate) fn fragments(&self, len_bytes: usize) -> Vec<Vec<u8>> {
        let whole = self.transport(false);
        let count = whole.chunks(len_bytes).count();
        let fragment = |(n, piece): (usize, &[u8])| {
            let header = ipv4::Header {
                more_fragments: n + 1 < count,
                fragment_offset_bytes: (n * len_bytes) as u16,
                ..self.ip(piece.len())
            };
            frame(&header, piece)
        };
        whole.chunks(len_bytes).enumerate().map(fragment).collect()
    }

    pub(crate) fn ip(&self, payload_bytes: usize) -> ipv4::Header {
        ipv4::Header {
            src: self.src.0,
            dst: self.dst.0,
            protocol: self.protocol(),
            ttl: self.ttl,
            tos: 0,
            ident: self.ident,
            dont_fragment: self.dont_fragment,
            more_fragments: false,
            fragment_offset_bytes: 0,
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes,
        }
    }

    fn around(&self, transport: &[u8]) -> Vec<u8> {
        frame(&self.ip(transport.len()), transport)
    }
}

/// An Ethernet frame with this IP packet.
pub(crate) fn frame(ip: &ipv4::Header, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; TRANSPORT_AT];
    let (dst, src) = (MacAddr::GATEWAY, MacAddr([0x52, 0x54, 0, 0, 0, 9]));
    ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(&mut out);
    ip.emit(&mut out[IP_AT..]);
    out.extend_from_slice(payload);
    out
}

/// An ICMP error of type and code `said`, from `src` to `dst`, quoting the first `quoted_bytes` of `about`'s packet.
pub(crate) fn error(
    said: (u8, u8),
    src: Ipv4Addr,
    dst: Ipv4Addr,
    about: &[u8],
    quoted_bytes: usize,
) -> Vec<u8> {
    let packet = &about[IP_AT..];
    let quote = &packet[..packet.len().min(quoted_bytes)];
    let mut message = vec![said.0, said.1, 0, 0, 0, 0, 5, 0xdc];
    message.extend_from_slice(quote);
    let mut sum = Accumulator::new();
    sum.add_bytes(&message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    let outer = Frame {
        ident: 99,
        body: Body::Plain(Protocol::ICMP),
        payload: message,
        ..Frame::udp((src, 0), (dst, 0), &[])
    };
    outer.build()
}

/// Puts the IP header's checksum right.
pub(crate) fn sum_ip(frame: &mut [u8]) {
    frame[IP_AT + 10..IP_AT + 12].fill(0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&frame[IP_AT..TRANSPORT_AT]);
    frame[IP_AT + 10..IP_AT + 12].copy_from_slice(&sum.finish().to_be_bytes());
}

/// The word at `at`.
pub(crate) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}
