//! The least of a guest that keeps a worker busy: segments as long as segmentation offload allows, an
//! acknowledgement for every batch, no losses and hence no retransmission.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use vunet::addr::MacAddr;
use vunet::wire::ethernet::{self, EtherType};
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags, Options, SeqNumber};
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};
use vunet::wire::{checksum, udp};

use crate::support::nic::Nic;
use crate::support::{PATIENCE, Random};

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
const MSS: u16 = 1460;
const WINDOW_SHIFT: u8 = 8;
/// Bytes before the transport header.
const IP_HEAD_BYTES: usize = ethernet::HEADER_BYTES + ipv4::HEADER_BYTES;

/// A frame with `message` of `protocol`, whose checksum field at `checksum_at` the device completes.
fn frame(protocol: Protocol, message: &mut [u8], checksum_at: usize) -> (VnetHeader, Vec<u8>) {
    let partial = checksum::pseudo_header(GUEST.into(), GATEWAY.into(), protocol, message.len()).fold();
    message[checksum_at..checksum_at + 2].copy_from_slice(&partial.to_be_bytes());
    let mut out = vec![0; IP_HEAD_BYTES + message.len()];
    ethernet::Header { dst: MacAddr::GATEWAY, src: MAC, ethertype: EtherType::IPV4 }.emit(&mut out);
    let ip = ipv4::Header {
        src: GUEST,
        dst: GATEWAY,
        protocol,
        ttl: 64,
        tos: 0,
        ident: 0,
        dont_fragment: true,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: message.len(),
    };
    ip.emit(&mut out[ethernet::HEADER_BYTES..]);
    out[IP_HEAD_BYTES..].copy_from_slice(message);
    let checksum = Checksum::Partial { start: IP_HEAD_BYTES as u16, offset: checksum_at as u16 };
    (VnetHeader { checksum, ..VnetHeader::default() }, out)
}

/// Sends, waiting for room in the ring.
fn send(nic: &mut Nic, vnet: VnetHeader, frame: &[u8], random: &mut Random) {
    let header = vnet.emit();
    until("the ring has room", || nic.send(&header, frame, random));
}

/// Tries again at once until `done`, unlike `eventually`, whose pauses would make each batch one frame.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "did not happen in time: {what}");
        std::thread::yield_now();
    }
}

/// Sends one UDP datagram from `port` to the gateway's `to`.
pub(crate) fn send_udp(nic: &mut Nic, port: u16, to: u16, payload: &[u8], random: &mut Random) {
    let mut message = vec![0; udp::HEADER_BYTES];
    message.extend_from_slice(payload);
    let len_bytes = message.len();
    udp::Header { src_port: port, dst_port: to, len_bytes, checksum: 0 }.emit(&mut message);
    let (vnet, frame) = frame(Protocol::UDP, &mut message, udp::CHECKSUM_OFFSET);
    send(nic, vnet, &frame, random);
}

/// Takes what arrived and gives the buffers back; returns the UDP payload bytes of each frame.
pub(crate) fn receive_udp(nic: &mut Nic, random: &mut Random) -> Vec<usize> {
    let frames = nic.receive();
    nic.post_rx(usize::MAX, random);
    let is_udp = |bytes: &&[u8]| bytes.len() > IP_HEAD_BYTES && bytes[23] == Protocol::UDP.0;
    let len = |bytes: &[u8]| bytes.len() - IP_HEAD_BYTES - udp::HEADER_BYTES;
    frames.iter().map(|frame| &frame.bytes[..]).filter(is_udp).map(len).collect()
}

/// One connection of the guest.
#[derive(Debug)]
pub(crate) struct Connection {
    local: u16,
    remote: u16,
    /// The next byte to send.
    next: SeqNumber,
    /// The first byte not acknowledged.
    acknowledged: SeqNumber,
    /// What the peer takes beyond that.
    window_bytes: usize,
    /// The next byte to receive.
    expected: SeqNumber,
    established: bool,
    pub(crate) received_bytes: usize,
    ack_due: bool,
}

impl Connection {
    fn new(local: u16, remote: u16) -> Connection {
        let start = SeqNumber(u32::from(local) << 8);
        Connection {
            local,
            remote,
            next: start,
            acknowledged: start,
            window_bytes: 0,
            expected: SeqNumber(0),
            established: false,
            received_bytes: 0,
            ack_due: false,
        }
    }

    fn segment(
        &mut self,
        nic: &mut Nic,
        flags: Flags,
        options: Options,
        payload: &[u8],
        random: &mut Random,
    ) {
        let header = tcp::Header {
            src_port: self.local,
            dst_port: self.remote,
            seq: self.next,
            ack: self.expected,
            flags,
            window: u16::MAX,
            urgent: 0,
            options,
        };
        let mut message = vec![0; header.header_bytes()];
        let header_bytes = header.emit(&mut message);
        message.extend_from_slice(payload);
        let (mut vnet, frame) = frame(Protocol::TCP, &mut message, tcp::CHECKSUM_OFFSET);
        if payload.len() > usize::from(MSS) {
            let headers_bytes = (IP_HEAD_BYTES + header_bytes) as u16;
            vnet.gso = Some(Gso { kind: GsoKind::Tcp4, size_bytes: MSS, headers_bytes, ecn: false });
        }
        self.next = self.next + payload.len();
        self.ack_due = false;
        send(nic, vnet, &frame, random);
    }

    /// Bytes the peer has not acknowledged.
    pub(crate) fn in_flight_bytes(&self) -> usize {
        self.next.distance_from(self.acknowledged) as usize
    }

    /// Sends `payload` as one frame if the window has room for all of it.
    pub(crate) fn send(&mut self, nic: &mut Nic, payload: &[u8], random: &mut Random) -> bool {
        let fits = self.in_flight_bytes() + payload.len() <= self.window_bytes;
        if fits {
            self.segment(nic, Flags::ACK | Flags::PSH, Options::default(), payload, random);
        }
        fits
    }

    fn take(&mut self, header: &tcp::Header, payload_bytes: usize) {
        assert!(!header.flags.contains(Flags::RST), "the connection was reset: {self:?}");
        if header.flags.contains(Flags::SYN) {
            self.expected = header.seq + 1;
            self.next = self.next + 1;
            self.established = true;
            self.ack_due = true;
        } else {
            self.window_bytes = usize::from(header.window) << WINDOW_SHIFT;
        }
        self.acknowledged = header.ack;
        if payload_bytes > 0 {
            assert!(header.seq.at_or_before(self.expected), "nothing is lost here");
            // On a loaded machine an acknowledgement may be so late that the worker sends again.
            let fresh_bytes = (header.seq + payload_bytes).distance_from(self.expected).max(0) as usize;
            self.expected = self.expected + fresh_bytes;
            self.received_bytes += fresh_bytes;
            self.ack_due = true;
        }
    }
}

/// Takes what arrived for `connections`, gives the buffers back and acknowledges.
pub(crate) fn receive_tcp(nic: &mut Nic, connections: &mut [Connection], random: &mut Random) {
    for received in nic.receive() {
        let bytes = &received.bytes[..];
        if bytes.len() < IP_HEAD_BYTES || bytes[23] != Protocol::TCP.0 {
            continue;
        }
        let (header, header_bytes) = tcp::Header::parse(&bytes[IP_HEAD_BYTES..]).expect("a segment");
        let is_its = |one: &&mut Connection| one.local == header.dst_port;
        let connection = connections.iter_mut().find(is_its).expect("a connection of ours");
        connection.take(&header, bytes.len() - IP_HEAD_BYTES - header_bytes);
    }
    nic.post_rx(usize::MAX, random);
    for connection in connections.iter_mut().filter(|one| one.ack_due) {
        connection.segment(nic, Flags::ACK, Options::default(), &[], random);
    }
}

/// Connects to each of `servers` on the host's loopback.
pub(crate) fn connect(nic: &mut Nic, servers: &[SocketAddr], random: &mut Random) -> Vec<Connection> {
    nic.post_rx(usize::MAX, random);
    let mut connections: Vec<Connection> =
        (40_000..).zip(servers).map(|(local, server)| Connection::new(local, server.port())).collect();
    let options = Options { mss: Some(MSS), window_scale: Some(WINDOW_SHIFT), ..Options::default() };
    for connection in &mut connections {
        connection.segment(nic, Flags::SYN, options, &[], random);
    }
    let ready = |one: &Connection| one.established && one.window_bytes > 0;
    until("the connections stand", || {
        receive_tcp(nic, &mut connections, random);
        // The window of a SYN is not scaled; a byte makes the peer say what it really takes.
        for connection in connections.iter_mut().filter(|one| one.established && one.window_bytes == 0) {
            if connection.in_flight_bytes() == 0 {
                connection.segment(nic, Flags::ACK | Flags::PSH, Options::default(), b"!", random);
            }
        }
        connections.iter().all(ready)
    });
    connections
}
