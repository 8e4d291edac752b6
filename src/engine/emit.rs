//! Frames towards the guest: Ethernet, IP and transport headers in front of a payload.
//!
//! Headers are built in host memory and written into the first receive buffer at commit; the payload
//! is already there. The transport checksum stays partial where the guest accepts that
//! (`GUEST_CSUM`), else it is summed over the buffers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::addr::MacAddr;
use crate::frame::Payload;
use crate::wire::checksum::{self, Accumulator};
use crate::wire::ethernet::{self, EtherType};
use crate::wire::icmpv4::{self, Message};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::{Checksum, VnetHeader};
use crate::wire::{tcp, udp};

/// Ethernet and IPv4 headers.
pub const IPV4_FRAME_HEAD_BYTES: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES;
/// The longest head this module builds: Ethernet, IPv4, TCP with options.
pub const HEAD_BYTES_MAX: usize = IPV4_FRAME_HEAD_BYTES + 60;
/// Packet bytes an ICMP error quotes at most (RFC 1812, 4.3.2.3: the error fits 576 bytes).
pub const ICMP_QUOTE_BYTES_MAX: usize = 548;
/// The longest frame of an ICMP error.
pub const ICMP_ERROR_FRAME_BYTES_MAX: usize =
    IPV4_FRAME_HEAD_BYTES + icmpv4::HEADER_BYTES + ICMP_QUOTE_BYTES_MAX;
/// Hop limit of what vunet sends (RFC 1700's default of the field).
pub const TTL: u8 = 64;

/// Headers in host memory, ready to be written in front of a payload.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len_bytes: usize,
    /// What the virtio-net header has to say.
    pub vnet: VnetHeader,
}

impl Head {
    /// The headers.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len_bytes]
    }
}

/// Length of Ethernet and IP headers for a packet from `addr`.
pub fn ip_head_bytes(addr: IpAddr) -> usize {
    match addr {
        IpAddr::V4(_) => IPV4_FRAME_HEAD_BYTES,
        IpAddr::V6(_) => ethernet::HEADER_BYTES + 40,
    }
}

/// Writes Ethernet and IP headers for `payload_bytes` of transport; returns their length, or `None`
/// where the addresses are not both IPv4.
fn write_ip(
    out: &mut [u8],
    guest_mac: MacAddr,
    from: IpAddr,
    to: IpAddr,
    fields: ipv4::Header,
) -> Option<usize> {
    let (IpAddr::V4(src), IpAddr::V4(dst)) = (from, to) else {
        return None;
    };
    ethernet::Header { dst: guest_mac, src: MacAddr::GATEWAY, ethertype: EtherType::IPV4 }.emit(out);
    ipv4::Header { src, dst, ..fields }.emit(&mut out[ethernet::HEADER_BYTES..]);
    Some(IPV4_FRAME_HEAD_BYTES)
}

/// An IPv4 header with the usual fields; addresses are filled in by `write_ip`.
fn ip_fields(protocol: Protocol, payload_bytes: usize, ident: Option<u16>) -> ipv4::Header {
    ipv4::Header {
        src: Ipv4Addr::UNSPECIFIED,
        dst: Ipv4Addr::UNSPECIFIED,
        protocol,
        ttl: TTL,
        tos: 0,
        // Atomic packets carry no meaningful identification (RFC 6864, 4.1).
        ident: ident.unwrap_or(0),
        dont_fragment: ident.is_none(),
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes,
    }
}

/// Headers of a TCP segment from `from` to the guest at `to`, followed by `payload`.
pub fn tcp(
    guest_mac: MacAddr,
    from: SocketAddr,
    to: SocketAddr,
    header: &tcp::Header,
    payload: &Payload<'_>,
    partial: bool,
) -> Option<Head> {
    let mut bytes = [0u8; HEAD_BYTES_MAX];
    let transport_bytes = header.header_bytes() + payload.len();
    let fields = ip_fields(Protocol::TCP, transport_bytes, None);
    let start = write_ip(&mut bytes, guest_mac, from.ip(), to.ip(), fields)?;
    let len_bytes = start + header.emit(&mut bytes[start..]);
    let pseudo = checksum::pseudo_header(from.ip(), to.ip(), Protocol::TCP, transport_bytes);
    let (value, state) = transport_checksum(
        pseudo,
        &bytes[start..len_bytes],
        payload,
        partial.then_some((start, tcp::CHECKSUM_OFFSET)),
    );
    let at = start + tcp::CHECKSUM_OFFSET;
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    Some(Head { bytes, len_bytes, vnet: VnetHeader { checksum: state, ..VnetHeader::default() } })
}

/// Headers of a UDP datagram from `from` to the guest at `to`, followed by `payload`, unfragmented.
pub fn udp(
    guest_mac: MacAddr,
    from: SocketAddr,
    to: SocketAddr,
    payload: &Payload<'_>,
    (ident, tos): (u16, u8),
    partial: bool,
) -> Option<Head> {
    let mut bytes = [0u8; HEAD_BYTES_MAX];
    let len = udp::HEADER_BYTES + payload.len();
    let fields = ipv4::Header { tos, ..ip_fields(Protocol::UDP, len, Some(ident)) };
    let start = write_ip(&mut bytes, guest_mac, from.ip(), to.ip(), fields)?;
    let len_bytes = start + udp::HEADER_BYTES;
    let header = udp::Header { src_port: from.port(), dst_port: to.port(), len_bytes: len, checksum: 0 };
    header.emit(&mut bytes[start..]);
    let pseudo = checksum::pseudo_header(from.ip(), to.ip(), Protocol::UDP, len);
    let (value, state) = transport_checksum(
        pseudo,
        &bytes[start..len_bytes],
        payload,
        partial.then_some((start, udp::CHECKSUM_OFFSET)),
    );
    let value = if state == Checksum::Complete { checksum::udp_nonzero(value) } else { value };
    let at = start + udp::CHECKSUM_OFFSET;
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    Some(Head { bytes, len_bytes, vnet: VnetHeader { checksum: state, ..VnetHeader::default() } })
}

/// A UDP datagram as a whole, with a complete checksum, to be put behind an IP header.
pub fn datagram(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let len_bytes = udp::HEADER_BYTES + payload.len();
    let mut bytes = vec![0u8; len_bytes];
    let header = udp::Header { src_port: from.port(), dst_port: to.port(), len_bytes, checksum: 0 };
    header.emit(&mut bytes);
    bytes[udp::HEADER_BYTES..].copy_from_slice(payload);
    let mut sum = checksum::pseudo_header(from.ip(), to.ip(), Protocol::UDP, len_bytes);
    sum.add_bytes(&bytes);
    let at = udp::CHECKSUM_OFFSET;
    bytes[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
    bytes
}

/// Headers of an ICMP message from `from` to the guest at `to`, followed by `payload`.
pub fn icmp(
    guest_mac: MacAddr,
    from: IpAddr,
    to: IpAddr,
    message: Message,
    payload: &Payload<'_>,
    ident: u16,
) -> Option<Head> {
    let mut bytes = [0u8; HEAD_BYTES_MAX];
    let fields = ip_fields(Protocol::ICMP, icmpv4::HEADER_BYTES + payload.len(), Some(ident));
    let start = write_ip(&mut bytes, guest_mac, from, to, fields)?;
    let len_bytes = start + icmpv4::HEADER_BYTES;
    message.emit(&mut bytes[start..]);
    // ICMP has no pseudo-header (RFC 792) and virtio no partial checksum for it.
    let (value, state) = transport_checksum(Accumulator::new(), &bytes[start..len_bytes], payload, None);
    bytes[start + 2..start + 4].copy_from_slice(&value.to_be_bytes());
    Some(Head { bytes, len_bytes, vnet: VnetHeader { checksum: state, ..VnetHeader::default() } })
}

/// The value for the checksum field, and what it is.
fn transport_checksum(
    mut sum: Accumulator,
    header: &[u8],
    payload: &Payload<'_>,
    partial: Option<(usize, usize)>,
) -> (u16, Checksum) {
    if let Some((start, offset)) = partial {
        return (sum.fold(), Checksum::Partial { start: start as u16, offset: offset as u16 });
    }
    sum.add_bytes(header);
    payload.add_to(&mut sum);
    (sum.finish(), Checksum::Complete)
}

/// A whole frame with an ICMP error about `packet`, the first bytes of a packet the guest sent.
/// Returns its length, or `None` for a packet no error may be sent about (RFC 1122, 3.2.2: another
/// error, a later fragment, a broadcast or multicast).
pub fn icmp_error(
    out: &mut [u8; ICMP_ERROR_FRAME_BYTES_MAX],
    gateway: Ipv4Addr,
    guest_mac: MacAddr,
    ident: u16,
    message: Message,
    packet: &[u8],
) -> Option<usize> {
    let about = ipv4::Header::parse(packet, usize::MAX).ok()?;
    let is_error = about.protocol == Protocol::ICMP
        && !matches!(
            Message::parse(packet.get(about.header_bytes..)?),
            Ok(Message::EchoRequest { .. } | Message::EchoReply { .. })
        );
    if is_error || about.fragment_offset_bytes > 0 || about.dst.is_broadcast() || about.dst.is_multicast() {
        return None;
    }
    let whole = about.header_bytes + about.payload_bytes;
    let quote = &packet[..packet.len().min(whole).min(ICMP_QUOTE_BYTES_MAX)];
    let payload_bytes = icmpv4::HEADER_BYTES + quote.len();
    let fields = ip_fields(Protocol::ICMP, payload_bytes, Some(ident));
    let start = write_ip(out, guest_mac, IpAddr::V4(gateway), IpAddr::V4(about.src), fields)?;
    Some(start + message.emit_with_payload(quote, &mut out[start..]))
}

/// A transport message towards the guest that lies in host memory.
#[derive(Clone, Copy, Debug)]
pub struct HostPacket<'a> {
    /// Where it goes.
    pub guest_mac: MacAddr,
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// Differentiated services and ECN.
    pub tos: u8,
    /// The message, checksums complete.
    pub transport: &'a [u8],
}

impl HostPacket<'_> {
    /// Cuts the packet into frames that fit `ip_mtu` and hands each to `each` (RFC 791, 3.2).
    pub fn for_each_frame(&self, ident: u16, ip_mtu: u16, mut each: impl FnMut(&[u8])) {
        let room = (usize::from(ip_mtu) - ipv4::HEADER_BYTES) & !7;
        let total = self.transport.len();
        let mut frame = vec![0u8; IPV4_FRAME_HEAD_BYTES + room.min(total)];
        let mut offset = 0;
        while offset < total {
            let len = room.min(total - offset);
            let mut fields = ip_fields(self.protocol, len, Some(ident));
            fields.tos = self.tos;
            fields.fragment_offset_bytes = offset as u16;
            fields.more_fragments = offset + len < total;
            let Some(start) = write_ip(&mut frame, self.guest_mac, self.from, self.to, fields) else {
                return;
            };
            frame[start..start + len].copy_from_slice(&self.transport[offset..offset + len]);
            each(&frame[..start + len]);
            offset += len;
        }
    }
}
