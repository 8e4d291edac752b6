//! Hand-made frames, for what a guest's own stack would never send.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use super::Netns;
use crate::sys::packet::RawLink;

/// A transport payload to put into an IPv4 packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// A TCP SYN to this port.
    TcpSyn(u16),
    /// A TCP segment of an unknown connection to this port.
    TcpStray(u16),
    /// A UDP datagram of four bytes to this port.
    Udp(u16),
    /// An ICMP echo request.
    Echo,
}

/// Port all probes come from.
pub const PROBE_PORT: u16 = 40_404;

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes
        .chunks(2)
        .fold(start, |sum, pair| sum + (u32::from(pair[0]) << 8) + pair.get(1).copied().map_or(0, u32::from))
}

fn fold(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("folded to 16 bits")).to_be_bytes()
}

impl Probe {
    fn protocol(self) -> u8 {
        match self {
            Probe::TcpSyn(_) | Probe::TcpStray(_) => 6,
            Probe::Udp(_) => 17,
            Probe::Echo => 1,
        }
    }

    /// Transport header and payload with a zero checksum, and where the checksum goes.
    fn transport(self) -> (Vec<u8>, usize) {
        let mut out = Vec::new();
        match self {
            Probe::TcpSyn(port) | Probe::TcpStray(port) => {
                out.extend(PROBE_PORT.to_be_bytes());
                out.extend(port.to_be_bytes());
                let flags = if matches!(self, Probe::TcpSyn(_)) { 0x02 } else { 0x10 };
                out.extend([0, 0, 0x12, 0x34, 0, 0, 0x56, 0x78, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
                (out, 16)
            }
            Probe::Udp(port) => {
                out.extend(PROBE_PORT.to_be_bytes());
                out.extend(port.to_be_bytes());
                out.extend([0, 12, 0, 0]);
                out.extend(b"ping");
                (out, 6)
            }
            Probe::Echo => {
                out.extend([8, 0, 0, 0, 0x77, 0x77, 0, 1]);
                out.extend(b"ping");
                (out, 2)
            }
        }
    }

    /// The whole frame.
    pub fn frame(self, from: ([u8; 6], Ipv4Addr), to: ([u8; 6], Ipv4Addr)) -> Vec<u8> {
        let (mut transport, checksum_at) = self.transport();
        let len = u16::try_from(transport.len()).expect("a short packet");
        let addresses = [from.1.octets(), to.1.octets()].concat();
        let pseudo = match self {
            Probe::Echo => 0,
            _ => sum(&addresses, u32::from(self.protocol()) + u32::from(len)),
        };
        let checksum = fold(sum(&transport, pseudo));
        transport[checksum_at..checksum_at + 2].copy_from_slice(&checksum);
        ip_frame(from, to, self.protocol(), &transport)
    }
}

/// A whole frame with one UDP datagram, checksums included.
///
/// # Panics
/// If `payload` does not fit one IPv4 packet.
pub fn udp_frame(from: ([u8; 6], SocketAddrV4), to: ([u8; 6], SocketAddrV4), payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).expect("a datagram that fits");
    let mut udp =
        [from.1.port().to_be_bytes(), to.1.port().to_be_bytes(), len.to_be_bytes(), [0; 2]].concat();
    udp.extend(payload);
    let pseudo = [from.1.ip().octets(), to.1.ip().octets()].concat();
    let checksum = fold(sum(&udp, sum(&pseudo, 17 + u32::from(len))));
    udp[6..8].copy_from_slice(&checksum);
    ip_frame((from.0, *from.1.ip()), (to.0, *to.1.ip()), 17, &udp)
}

/// What a TCP segment without options says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, sent whether or not the flag is set.
    pub ack: u32,
    /// Flags, as in the header's octet.
    pub flags: u8,
    /// Window in bytes.
    pub window: u16,
    /// Payload in bytes.
    pub payload_bytes: u16,
}

/// A whole frame with one TCP segment, checksums included.
///
/// # Panics
/// If the payload does not fit one IPv4 packet.
pub fn tcp_frame(from: ([u8; 6], SocketAddrV4), to: ([u8; 6], SocketAddrV4), segment: &Segment) -> Vec<u8> {
    let mut tcp = [from.1.port().to_be_bytes(), to.1.port().to_be_bytes()].concat();
    tcp.extend(segment.seq.to_be_bytes());
    tcp.extend(segment.ack.to_be_bytes());
    tcp.extend([0x50, segment.flags]);
    tcp.extend(segment.window.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.resize(20 + usize::from(segment.payload_bytes), 0x55);
    let len = u16::try_from(tcp.len()).expect("a segment that fits");
    let pseudo = [from.1.ip().octets(), to.1.ip().octets()].concat();
    let checksum = fold(sum(&tcp, sum(&pseudo, 6 + u32::from(len))));
    tcp[16..18].copy_from_slice(&checksum);
    ip_frame((from.0, *from.1.ip()), (to.0, *to.1.ip()), 6, &tcp)
}

fn ip_frame(from: ([u8; 6], Ipv4Addr), to: ([u8; 6], Ipv4Addr), protocol: u8, transport: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + transport.len()).expect("a packet that fits");
    let mut ip = vec![0x45, 0];
    ip.extend(len.to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(from.1.octets());
    ip.extend(to.1.octets());
    let checksum = fold(sum(&ip, 0));
    ip[10..12].copy_from_slice(&checksum);
    [&to.0[..], &from.0[..], &[8, 0], &ip, transport].concat()
}

/// An Ethernet frame.
pub fn ethernet_frame(to: [u8; 6], from: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethertype.to_be_bytes(), payload].concat()
}

/// An ARP request from `from` for `wanted` (RFC 826).
pub fn arp_request(from: ([u8; 6], Ipv4Addr), wanted: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    let body = [&head[..], &from.0, &from.1.octets(), &[0; 6], &wanted.octets()].concat();
    ethernet_frame([0xff; 6], from.0, 0x0806, &body)
}

/// An IPv6 packet with an ICMPv6 message in a frame, checksum included.
///
/// # Panics
/// If `message` does not fit one packet.
pub fn icmpv6_frame(mac: ([u8; 6], [u8; 6]), from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let len = u16::try_from(message.len()).expect("a short message");
    let pseudo = [from.octets(), to.octets()].concat();
    let mut message = message.to_vec();
    message[2..4].fill(0);
    let checksum = fold(sum(&message, sum(&pseudo, u32::from(len) + 58)));
    message[2..4].copy_from_slice(&checksum);
    let head = [&[0x60, 0, 0, 0][..], &len.to_be_bytes(), &[58, 255]].concat();
    let packet = [&head[..], &from.octets(), &to.octets(), &message].concat();
    ethernet_frame(mac.1, mac.0, 0x86dd, &packet)
}

/// Sends frames from interface `eth0` of `netns` as they are.
///
/// # Errors
/// If the interface cannot be used.
pub fn send_frames(netns: &Netns, frames: &[Vec<u8>]) -> io::Result<()> {
    netns.inside(|| {
        let mut link = RawLink::open("eth0")?;
        frames.iter().try_for_each(|frame| link.send(frame))
    })
}

/// Frames that pass an interface, caught from when it is made.
#[derive(Debug)]
pub struct Capture(RawLink);

impl Capture {
    /// Of `interface` in `netns`.
    ///
    /// # Errors
    /// If the interface cannot be used.
    pub fn of(netns: &Netns, interface: &str) -> io::Result<Capture> {
        netns.inside(|| RawLink::open(interface)).map(Capture)
    }

    /// All frames so far, and those of the next `silence` without one; 1,000 at most.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn frames(&mut self, silence: Duration) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        let mut buffer = [0; 2048];
        while frames.len() < 1000 {
            match self.0.receive(&mut buffer, silence) {
                Ok(len) => frames.push(buffer[..len].to_vec()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(frames)
    }
}

/// An answer to a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A TCP SYN with ACK: somebody accepted.
    SynAck,
    /// A TCP RST.
    Rst,
    /// A UDP datagram.
    Datagram,
    /// An ICMP message: type and code.
    Icmp(u8, u8),
}

/// Sends `probe` from interface `eth0` of `netns`, from the address pair `from` to `to`, and waits up
/// to `timeout` for the first answer from the address probed or about it.
///
/// # Errors
/// If the interface cannot be used.
pub fn probe(
    netns: &Netns,
    probe: Probe,
    from: ([u8; 6], Ipv4Addr),
    to: ([u8; 6], Ipv4Addr),
    timeout: Duration,
) -> io::Result<Option<Answer>> {
    netns.inside(|| {
        let mut link = RawLink::open("eth0")?;
        link.send(&probe.frame(from, to))?;
        let deadline = Instant::now() + timeout;
        let mut frame = [0; 2048];
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|t| !t.is_zero()) {
            match link.receive(&mut frame, left) {
                Ok(len) => {
                    if let Some(answer) = classify(&frame[..len], from, to.1) {
                        return Ok(Some(answer));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    })
}

fn classify(frame: &[u8], us: ([u8; 6], Ipv4Addr), probed: Ipv4Addr) -> Option<Answer> {
    if frame.get(..6)? != us.0 || frame.get(12..14)? != [8, 0] {
        return None;
    }
    let ip = &frame[14..];
    let header = usize::from(ip.first()? & 15) * 4;
    let (source, target) = (ip.get(12..16)?, ip.get(16..20)?);
    if target != us.1.octets() {
        return None;
    }
    let transport = ip.get(header..)?;
    let from_probed = source == probed.octets();
    let to_probe_port = transport.get(2..4)? == PROBE_PORT.to_be_bytes();
    match ip.get(9)? {
        6 if from_probed && to_probe_port => {
            let flags = *transport.get(13)?;
            if flags & 4 != 0 { Some(Answer::Rst) } else { (flags & 0x12 == 0x12).then_some(Answer::SynAck) }
        }
        17 if from_probed && to_probe_port => Some(Answer::Datagram),
        1 => {
            let (kind, code) = (*transport.first()?, *transport.get(1)?);
            // An echo reply comes from the address probed, an error quotes it as destination.
            let about = if kind == 0 { from_probed } else { transport.get(24..28)? == probed.octets() };
            about.then_some(Answer::Icmp(kind, code))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_have_valid_checksums() {
        let (a, b) = (Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(192, 0, 2, 2));
        let frame = Probe::Udp(9).frame(([2; 6], a), ([4; 6], b));
        assert_eq!(fold(sum(&frame[14..34], 0)), [0, 0]);
        let pseudo = sum(&[a.octets(), b.octets()].concat(), 17 + 12);
        assert_eq!(fold(sum(&frame[34..], pseudo)), [0, 0]);
    }

    #[test]
    fn answers_are_told_from_noise() {
        let (us, them) = (([2; 6], Ipv4Addr::new(10, 0, 2, 2)), Ipv4Addr::new(192, 0, 2, 2));
        let mut reset = Probe::TcpStray(7).frame(([4; 6], them), us);
        reset[34 + 2..34 + 4].copy_from_slice(&PROBE_PORT.to_be_bytes());
        reset[34 + 13] = 0x14;
        assert_eq!(classify(&reset, us, them), Some(Answer::Rst));
        assert_eq!(classify(&reset, us, Ipv4Addr::LOCALHOST), None);
        assert_eq!(classify(&reset[..40], us, them), None);
    }
}
