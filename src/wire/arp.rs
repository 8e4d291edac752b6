//! ARP for IPv4 over Ethernet.
//!
//! Read first: RFC 826; RFC 5227 for probes (sender address zero) and announcements.

use std::net::Ipv4Addr;

use super::WireError;
use super::ethernet::{self, EtherType};
use crate::addr::MacAddr;

/// Length of a packet in bytes, without the Ethernet header.
pub const PACKET_BYTES: usize = 28;

/// The same with it.
pub const FRAME_BYTES: usize = ethernet::HEADER_BYTES + PACKET_BYTES;

/// Hardware type Ethernet, protocol type IPv4, their address lengths.
const ETHERNET_IPV4: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// What a packet asks or says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Who has the target address?
    Request,
    /// The sender has the sender address.
    Reply,
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Question or answer.
    pub operation: Operation,
    /// The sender's hardware address.
    pub sender_mac: MacAddr,
    /// The sender's protocol address; zero in a probe.
    pub sender_ip: Ipv4Addr,
    /// The target's hardware address; without meaning in a request.
    pub target_mac: MacAddr,
    /// The target's protocol address.
    pub target_ip: Ipv4Addr,
}

impl Packet {
    /// Reads the packet behind an Ethernet header; padding behind it is ignored.
    ///
    /// # Errors
    /// [`WireError::Truncated`] for fewer than [`PACKET_BYTES`], [`WireError::Malformed`] for address
    /// types other than Ethernet and IPv4 and for operations other than request and reply.
    pub fn parse(bytes: &[u8]) -> Result<Packet, WireError> {
        let bytes: &[u8; PACKET_BYTES] = bytes.first_chunk().ok_or(WireError::Truncated)?;
        if bytes[..6] != ETHERNET_IPV4 {
            return Err(WireError::Malformed("ARP for other than Ethernet and IPv4"));
        }
        let operation = match (bytes[6], bytes[7]) {
            (0, 1) => Operation::Request,
            (0, 2) => Operation::Reply,
            _ => return Err(WireError::Malformed("ARP operation is neither request nor reply")),
        };
        let mac =
            |at: usize| MacAddr(bytes[at..at + 6].try_into().expect("six bytes lie within the packet's 28"));
        let ip = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
        Ok(Packet {
            operation,
            sender_mac: mac(8),
            sender_ip: ip(14),
            target_mac: mac(18),
            target_ip: ip(24),
        })
    }

    /// The packet in a frame from `src` to `dst`.
    pub fn frame(&self, dst: MacAddr, src: MacAddr) -> [u8; FRAME_BYTES] {
        let mut frame = [0; FRAME_BYTES];
        ethernet::Header { dst, src, ethertype: EtherType::ARP }.emit(&mut frame);
        self.emit(&mut frame[ethernet::HEADER_BYTES..]);
        frame
    }

    /// Writes the packet to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter than [`PACKET_BYTES`].
    pub fn emit(&self, out: &mut [u8]) {
        let out = &mut out[..PACKET_BYTES];
        let operation: u16 = match self.operation {
            Operation::Request => 1,
            Operation::Reply => 2,
        };
        out[0..6].copy_from_slice(&ETHERNET_IPV4);
        out[6..8].copy_from_slice(&operation.to_be_bytes());
        out[8..14].copy_from_slice(&self.sender_mac.0);
        out[14..18].copy_from_slice(&self.sender_ip.octets());
        out[18..24].copy_from_slice(&self.target_mac.0);
        out[24..28].copy_from_slice(&self.target_ip.octets());
    }
}
