//! What the first bytes of a frame say: the IPv4 header, and of the transport what a translation needs.
//!
//! Everything is judged here, once, on the host's copy; whoever changes the frame afterwards relies on it. Of a
//! fragment but the first nothing is read behind the IP header: what stands there is payload, whatever it looks like.
//!
//! Read first: RFC 791, RFC 792, RFC 1858 and 3128 (fragments made to fool filters), virtio 1.3, 5.1.6.2.

use super::ports::WorkerSet;
use super::tcp_state::Segment;
use crate::engine::counters::DropReason;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::tcp::{self, Flags, SeqNumber};
use crate::wire::vnet::{Checksum, VnetHeader};
use crate::wire::{WireError, icmpv4, udp};

/// A frame under judgement.
#[derive(Debug)]
pub struct Packet<'a> {
    /// Its virtio-net header.
    pub vnet: &'a VnetHeader,
    /// Its first bytes in host memory, from the Ethernet header on; all that is judged and changed. Of ICMP errors
    /// the quoted headers should lie in it: 150 bytes hold them whatever options they have.
    pub head: &'a mut [u8],
    /// Length of the whole frame, in bytes.
    pub len_bytes: usize,
    /// Workers that have looked at it and did not have its flow.
    pub tried: WorkerSet,
}

impl<'a> Packet<'a> {
    /// A frame nobody has looked at yet.
    pub fn new(vnet: &'a VnetHeader, head: &'a mut [u8], len_bytes: usize) -> Packet<'a> {
        Packet { vnet, head, len_bytes, tried: WorkerSet::default() }
    }
}

/// Where the IP header starts in a frame.
pub(super) const IP_AT: usize = ethernet::HEADER_BYTES;

/// Where ICMP keeps its checksum and, in queries, the identifier; in bytes from its header.
pub(super) const ICMP_CHECKSUM: usize = 2;
/// See [`ICMP_CHECKSUM`].
pub(super) const ICMP_IDENT: usize = 4;

/// Protocols whose checksum covers the addresses, beside TCP and UDP (RFC 4340, 9.1; RFC 3828, 3.1).
const DCCP: Protocol = Protocol(33);
const UDP_LITE: Protocol = Protocol(136);

/// What stands behind the IP header, as far as it concerns a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP or UDP.
    Ports {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// An ICMP question (echo, timestamp) or the answer to one.
    Query {
        /// Identifier of who asks.
        ident: u16,
        /// Whether it is the question.
        asks: bool,
    },
    /// An ICMP error, which quotes the packet it is about.
    Error,
    /// A fragment but the first of its packet.
    LaterFragment,
    /// A protocol known by its addresses only.
    Addresses,
}

/// A frame as it was judged.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Its IPv4 header.
    pub ip: ipv4::Header,
    /// Where the transport starts in the frame, in bytes.
    pub transport_at: usize,
    /// What the transport is.
    pub transport: Transport,
    /// Whether the transport's checksum field holds the pseudo-header's sum only.
    pub partial: bool,
}

impl View {
    /// Judges a frame.
    ///
    /// # Errors
    /// [`DropReason::Unsupported`] for other than IPv4 and for ICMP messages that cross no NAT,
    /// [`DropReason::Malformed`], [`DropReason::Checksum`] (of the IP header; others are the receiver's to judge), and
    /// [`DropReason::Fragment`] for fragments that could hide a header.
    pub fn read(packet: &Packet<'_>) -> Result<View, DropReason> {
        let head = &*packet.head;
        let ethertype = head.get(12..IP_AT).ok_or(DropReason::Malformed)?;
        if ethertype != EtherType::IPV4.0.to_be_bytes() {
            return Err(DropReason::Unsupported);
        }
        let available = packet.len_bytes.saturating_sub(IP_AT);
        let ip = ipv4::Header::parse(&head[IP_AT..], available).map_err(reason)?;
        let transport_at = IP_AT + ip.header_bytes;
        if ip.is_fragment() && packet.vnet.gso.is_some() {
            return Err(DropReason::Malformed);
        }
        let bytes = &head[transport_at.min(head.len())..];
        let transport = read_transport(&ip, bytes, packet.vnet)?;
        let partial = read_partial(&ip, transport_at, packet.vnet)?;
        Ok(View { ip, transport_at, transport, partial })
    }

    /// The segment a TCP packet carries, which [`View::read`] found to be whole.
    pub fn segment(&self, head: &[u8]) -> Segment {
        let bytes: &[u8; tcp::HEADER_BYTES] =
            head[self.transport_at..].first_chunk().expect("a TCP header was found there");
        let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let be32 = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let flags = Flags(bytes[13]);
        let header_bytes = usize::from(bytes[12] >> 4) * 4;
        // Options matter in SYN only. One longer than the head was copied offers nothing.
        let offered = || tcp::Header::parse(&head[self.transport_at..]).ok()?.0.options.window_scale;
        Segment {
            seq: SeqNumber(be32(4)),
            ack: SeqNumber(be32(8)),
            flags,
            window: be16(14),
            payload_bytes: self.ip.payload_bytes.saturating_sub(header_bytes) as u32,
            window_scale: if flags.contains(Flags::SYN) { offered() } else { None },
        }
    }
}

/// Why bytes that are no header are dropped.
fn reason(error: WireError) -> DropReason {
    match error {
        WireError::Checksum => DropReason::Checksum,
        WireError::Truncated | WireError::Malformed(_) => DropReason::Malformed,
    }
}

/// Where the checksum over pseudo-header and transport stands, from the transport's start.
pub(super) const fn checksum_offset(protocol: Protocol) -> Option<usize> {
    match protocol {
        Protocol::TCP => Some(tcp::CHECKSUM_OFFSET),
        Protocol::UDP | DCCP | UDP_LITE => Some(udp::CHECKSUM_OFFSET),
        _ => None,
    }
}

fn read_transport(ip: &ipv4::Header, bytes: &[u8], vnet: &VnetHeader) -> Result<Transport, DropReason> {
    if ip.fragment_offset_bytes > 0 {
        // What begins within a TCP header would change flags that were judged in the first fragment.
        let hides = ip.protocol == Protocol::TCP && usize::from(ip.fragment_offset_bytes) < tcp::HEADER_BYTES;
        let possible = ip.payload_bytes > 0 && !hides;
        return if possible { Ok(Transport::LaterFragment) } else { Err(DropReason::Fragment) };
    }
    let too_short = if ip.more_fragments { DropReason::Fragment } else { DropReason::Malformed };
    let fixed_bytes = match ip.protocol {
        Protocol::TCP => tcp::HEADER_BYTES,
        Protocol::UDP => udp::HEADER_BYTES,
        Protocol::ICMP => icmpv4::HEADER_BYTES,
        // Where a checksum is to be changed it must be there.
        protocol => checksum_offset(protocol).map_or(0, |offset| offset + 2),
    };
    if ip.payload_bytes < fixed_bytes || bytes.len() < fixed_bytes {
        return Err(too_short);
    }
    let be16 = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    match ip.protocol {
        Protocol::TCP => {
            let header_bytes = usize::from(bytes[12] >> 4) * 4;
            if header_bytes < tcp::HEADER_BYTES || header_bytes > ip.payload_bytes {
                return Err(too_short);
            }
        }
        Protocol::UDP => {
            let len_bytes = usize::from(be16(4));
            let is_whole = !ip.more_fragments && vnet.gso.is_none();
            if len_bytes < udp::HEADER_BYTES || (is_whole && len_bytes > ip.payload_bytes) {
                return Err(DropReason::Malformed);
            }
        }
        Protocol::ICMP => return read_icmp(bytes[0], be16(ICMP_IDENT), ip.more_fragments),
        _ => return Ok(Transport::Addresses),
    }
    Ok(Transport::Ports { src: be16(0), dst: be16(2) })
}

fn read_icmp(kind: u8, ident: u16, more_fragments: bool) -> Result<Transport, DropReason> {
    match kind {
        8 | 13 => Ok(Transport::Query { ident, asks: true }),
        0 | 14 => Ok(Transport::Query { ident, asks: false }),
        // Nobody cuts 600 bytes in pieces; the checksum over them could not be kept right.
        3 | 11 | 12 if more_fragments => Err(DropReason::Fragment),
        3 | 11 | 12 => Ok(Transport::Error),
        // Routes, routers and masks are a link's own (RFC 5508, REQ-10); source quench is dead (RFC 6633).
        _ => Err(DropReason::Unsupported),
    }
}

/// Whether the checksum is partial. One that would be completed at another place than its protocol's could be
/// made to change the packet behind the translation's back.
fn read_partial(ip: &ipv4::Header, transport_at: usize, vnet: &VnetHeader) -> Result<bool, DropReason> {
    let Checksum::Partial { start, offset } = vnet.checksum else { return Ok(false) };
    let expected = checksum_offset(ip.protocol)
        .is_some_and(|at| usize::from(start) == transport_at && usize::from(offset) == at);
    if expected && !ip.is_fragment() { Ok(true) } else { Err(DropReason::Malformed) }
}
