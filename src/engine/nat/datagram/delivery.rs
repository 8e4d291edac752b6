//! Frames with what the world sent, towards the guest.

use std::net::SocketAddr;

use crate::engine::core::{Core, Neighbour};
use crate::engine::counters::DropReason;
use crate::engine::emit;
use crate::engine::guest_port::{GuestPort, ReserveError};
use crate::engine::host_net::Arrival;
use crate::frame::Payload;
use crate::wire::icmpv4::{self, Message};
use crate::wire::ipv4::Protocol;
use crate::wire::vnet::{Gso, GsoKind, VnetHeader};
use crate::wire::{checksum, ethernet, udp};

/// Where datagrams of a peer go.
pub(super) struct Delivery {
    pub(super) guest: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) neighbour: Neighbour,
}

impl Delivery {
    /// Hands UDP datagrams to the guest, each in a frame of its own, in fragments if it exceeds the MTU.
    pub(super) fn udp(&self, core: &mut Core, port: &mut impl GuestPort, arrival: &Arrival<'_>) {
        let partial = port.offloads().checksum;
        let room = usize::from(core.ip_mtu) - (emit::ip_head_bytes(self.guest.ip()) - ethernet::HEADER_BYTES);
        let coalesced = arrival.bytes.len() > arrival.segment_bytes;
        if coalesced && port.offloads().uso4 && udp::HEADER_BYTES + arrival.segment_bytes <= room {
            match port.has_room(self.neighbour.pair, emit::HEAD_BYTES_MAX + arrival.bytes.len()) {
                // A driver without large buffers cannot take it whole.
                Err(ReserveError::TooSmall) => {}
                _ => return self.udp_coalesced(core, port, arrival),
            }
        }
        // An empty datagram is one too.
        let mut rest = arrival.bytes;
        loop {
            let (bytes, after) = rest.split_at(arrival.segment_bytes.min(rest.len()));
            core.counters.payload_to_guest_bytes += bytes.len() as u64;
            let ident = core.next_ident();
            if udp::HEADER_BYTES + bytes.len() <= room {
                let payload = Payload::from_host(bytes);
                let mac = self.neighbour.mac;
                if let Some(head) =
                    emit::udp(mac, self.remote, self.guest, &payload, (ident, arrival.tos), partial)
                {
                    core.send_parts(port, self.neighbour.pair, head.vnet, head.bytes(), bytes);
                }
            } else {
                self.udp_in_fragments(core, port, (ident, arrival.tos), bytes);
            }
            if after.is_empty() {
                return;
            }
            rest = after;
        }
    }

    /// Hands datagrams of equal size to a guest that cuts them itself (`GUEST_USO4`).
    fn udp_coalesced(&self, core: &mut Core, port: &mut impl GuestPort, arrival: &Arrival<'_>) {
        core.counters.payload_to_guest_bytes += arrival.bytes.len() as u64;
        let (ident, mac) = (core.next_ident(), self.neighbour.mac);
        let payload = Payload::from_host(arrival.bytes);
        let Some(mut head) = emit::udp(mac, self.remote, self.guest, &payload, (ident, arrival.tos), true)
        else {
            return;
        };
        head.vnet.gso = Some(Gso {
            kind: GsoKind::UdpL4,
            size_bytes: arrival.segment_bytes as u16,
            headers_bytes: head.bytes().len() as u16,
            ecn: false,
        });
        core.send_parts(port, self.neighbour.pair, head.vnet, head.bytes(), arrival.bytes);
    }

    fn udp_in_fragments(
        &self,
        core: &mut Core,
        port: &mut impl GuestPort,
        ident_and_tos: (u16, u8),
        bytes: &[u8],
    ) {
        let mut transport = vec![0u8; udp::HEADER_BYTES + bytes.len()];
        let total = transport.len();
        let header = udp::Header {
            src_port: self.remote.port(),
            dst_port: self.guest.port(),
            len_bytes: total,
            checksum: 0,
        };
        header.emit(&mut transport);
        transport[udp::HEADER_BYTES..].copy_from_slice(bytes);
        let mut sum = checksum::pseudo_header(self.remote.ip(), self.guest.ip(), Protocol::UDP, total);
        sum.add_bytes(&transport);
        let at = udp::CHECKSUM_OFFSET;
        transport[at..at + 2].copy_from_slice(&checksum::udp_nonzero(sum.finish()).to_be_bytes());
        self.send_transport(core, port, Protocol::UDP, ident_and_tos, &transport);
    }

    /// Hands an ICMP echo reply to the guest under the guest's own identifier.
    pub(super) fn echo(&self, core: &mut Core, port: &mut impl GuestPort, message: &[u8], tos: u8) {
        let Ok(Message::EchoReply { seq, .. }) = Message::parse(message) else {
            return core.counters.drop(DropReason::Malformed);
        };
        let payload = &message[icmpv4::HEADER_BYTES..];
        core.counters.payload_to_guest_bytes += payload.len() as u64;
        let mut transport = vec![0u8; message.len()];
        Message::EchoReply { ident: self.guest.port(), seq }.emit_with_payload(payload, &mut transport);
        let ident = core.next_ident();
        self.send_transport(core, port, Protocol::ICMP, (ident, tos), &transport);
    }

    fn send_transport(
        &self,
        core: &mut Core,
        port: &mut impl GuestPort,
        protocol: Protocol,
        (ident, tos): (u16, u8),
        transport: &[u8],
    ) {
        let packet = emit::HostPacket {
            guest_mac: self.neighbour.mac,
            from: self.remote.ip(),
            to: self.guest.ip(),
            protocol,
            tos,
            transport,
        };
        packet.for_each_frame(ident, core.ip_mtu, |frame| {
            core.send(port, self.neighbour.pair, VnetHeader::default(), frame);
        });
    }
}
