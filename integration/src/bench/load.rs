//! What the guest's applications do: exchanges, connections, a DHCP client.
//!
//! Each runs on a thread inside the guest's namespace and answers with times in nanoseconds.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::server::{ANSWER_PORT, ANSWER_PORTS, HOLD_PORT, REQUEST_BYTES};
use crate::lab::WORLD;
use crate::lab::frame::udp_frame;
use crate::sys::packet::RawLink;
use crate::world::ports;

/// Time one exchange may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// A flow that carries nothing for so long has come to rest: longer than a first retransmission takes.
const SILENCE: Duration = Duration::from_secs(1);
/// More than is sent in any run: 2^50.
const ENDLESS_BYTES: u64 = 1 << 50;
/// Exchanges before the first one counted.
const WARM_UP: usize = 50;
/// Pause between two pings.
const PING_PAUSE: Duration = Duration::from_millis(1);

/// Calls `exchange` until `duration` is over; the time each call took.
fn repeat(duration: Duration, mut exchange: impl FnMut() -> io::Result<()>) -> io::Result<Vec<u64>> {
    for _ in 0..WARM_UP {
        exchange()?;
    }
    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed() < duration {
        let before = Instant::now();
        exchange()?;
        times.push(u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    Ok(times)
}

/// One byte there and back on one TCP connection.
pub(super) fn tcp_exchanges(duration: Duration) -> io::Result<Vec<u64>> {
    let to = SocketAddr::from((WORLD, ports::ECHO));
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    repeat(duration, || {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])
    })
}

/// One byte there and back between two UDP sockets. A lost datagram ends it.
pub(super) fn udp_exchanges(duration: Duration) -> io::Result<Vec<u64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect((WORLD, ports::ECHO))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    repeat(duration, || {
        socket.send(&[1])?;
        socket.recv(&mut [0]).map(drop)
    })
}

/// ICMP echo of 56 bytes, with a pause between answer and request.
pub(super) fn pings(duration: Duration) -> io::Result<Vec<u64>> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))?;
    socket.connect(&SocketAddr::from((WORLD, 0)).into())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Echo request; the kernel fills in identifier and checksum.
    let mut request = [0u8; 64];
    request[0] = 8;
    let mut number = 0u16;
    let mut times = Vec::new();
    let started = Instant::now();
    while started.elapsed() < duration {
        number = number.wrapping_add(1);
        request[6..8].copy_from_slice(&number.to_be_bytes());
        let before = Instant::now();
        socket.send(&request)?;
        let mut answer = [MaybeUninit::<u8>::uninit(); 128];
        socket.recv(&mut answer)?;
        times.push(u64::try_from(before.elapsed().as_nanos()).unwrap_or(u64::MAX));
        std::thread::sleep(PING_PAUSE);
    }
    Ok(times)
}

/// Connect, request, response and the server's close, again and again by client `number` of `of`.
pub(super) fn connections(duration: Duration, number: u16, of: u16) -> io::Result<Vec<u64>> {
    let request = [7; REQUEST_BYTES];
    let mut turn = number;
    repeat(duration, || {
        let port = ANSWER_PORT + turn % ANSWER_PORTS;
        turn = turn.wrapping_add(of);
        let to = SocketAddr::from((WORLD, port));
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&request)?;
        let mut response = Vec::with_capacity(REQUEST_BYTES);
        let len = stream.read_to_end(&mut response)?;
        if len == REQUEST_BYTES { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    })
}

/// Opens up to `count` connections, until one fails, that stay open as long as what is returned; and
/// the time the good ones took.
pub(super) fn open_flows(count: u32) -> (Vec<TcpStream>, Duration) {
    let to = SocketAddr::from((WORLD, HOLD_PORT));
    let (mut flows, mut took, started) = (Vec::new(), Duration::ZERO, Instant::now());
    for _ in 0..count {
        match TcpStream::connect_timeout(&to, PATIENCE) {
            Ok(flow) => flows.push(flow),
            Err(e) => {
                eprintln!("flow {} of {count}: {e}", flows.len() + 1);
                break;
            }
        }
        took = started.elapsed();
    }
    (flows, took)
}

/// Has the world send without end and reads until nothing comes any more; the connection.
pub(super) fn download_until_silence() -> io::Result<TcpStream> {
    let to = SocketAddr::from((WORLD, ports::SOURCE));
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.write_all(format!("{ENDLESS_BYTES} 1\n").as_bytes())?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(stream),
            Err(e) => return Err(e),
        }
    }
}

/// Ends connections in order.
pub(super) fn close_flows(flows: Vec<TcpStream>) {
    for flow in flows {
        // One that failed meanwhile is over as well.
        let _ = flow.shutdown(Shutdown::Both);
    }
}

/// The MAC address the hand-made DHCP client shows.
const CLIENT_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x77];
/// Where options begin in a DHCP message, and the cookie in front of them (RFC 2131, section 3).
const OPTIONS_AT: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
/// Time until a DHCP message is sent again.
const DHCP_RETRY: Duration = Duration::from_millis(20);

/// A DHCP message of the client in a broadcast frame.
fn dhcp_frame(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut message = vec![0; OPTIONS_AT];
    // BOOTREQUEST, Ethernet, 6 bytes of address; any transaction id; broadcast flag.
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[4..8].copy_from_slice(b"vunt");
    message[10] = 0x80;
    message[28..34].copy_from_slice(&CLIENT_MAC);
    message[236..240].copy_from_slice(&COOKIE);
    message.extend([53, 1, kind]);
    message.extend(options);
    message.push(255);
    message.resize(300, 0);
    let from = (CLIENT_MAC, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68));
    udp_frame(from, ([0xff; 6], SocketAddrV4::new(Ipv4Addr::BROADCAST, 67)), &message)
}

/// The DHCP server's answer in a frame: its kind, the address it offers and its own.
fn dhcp_answer(frame: &[u8]) -> Option<(u8, [u8; 4], [u8; 4])> {
    if frame.get(12..14)? != [8, 0] || *frame.get(23)? != 17 || frame.get(36..38)? != [0, 68] {
        return None;
    }
    let message = frame.get(42..)?;
    if message.get(236..240)? != COOKIE {
        return None;
    }
    let offered = message.get(16..20)?.try_into().ok()?;
    let (mut kind, mut server) = (None, None);
    let mut options = message.get(OPTIONS_AT..)?;
    while let [code, len, rest @ ..] = options {
        let value = rest.get(..usize::from(*len))?;
        match code {
            53 => kind = value.first().copied(),
            54 => server = value.try_into().ok(),
            255 => break,
            _ => {}
        }
        options = rest.get(usize::from(*len)..)?;
    }
    Some((kind?, offered, server?))
}

/// Sends `frame` until an answer of `kind` comes: the address offered and the server's.
fn ask(link: &mut RawLink, frame: &[u8], kind: u8, deadline: Instant) -> io::Result<([u8; 4], [u8; 4])> {
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        // The interface may not be up yet.
        let _ = link.send(frame);
        let again = Instant::now() + DHCP_RETRY;
        while let Some(left) = again.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            match link.receive(&mut buffer, left) {
                Ok(len) => {
                    if let Some((answered, offered, server)) = dhcp_answer(&buffer[..len])
                        && answered == kind
                    {
                        return Ok((offered, server));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Not up yet.
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Gets a lease on `eth0` as soon as there is one, without configuring anything.
pub(super) fn lease(patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    let mut link = loop {
        match RawLink::open("eth0") {
            Ok(link) => break link,
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    };
    let (offered, server) = ask(&mut link, &dhcp_frame(DISCOVER, &[]), OFFER, deadline)?;
    let options = [&[50, 4][..], &offered, &[54, 4], &server].concat();
    ask(&mut link, &dhcp_frame(REQUEST, &options), ACK, deadline).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_sends_is_a_dhcp_message_with_the_options_asked_for() {
        let mut frame = dhcp_frame(REQUEST, &[54, 4, 10, 0, 2, 1]);
        assert_eq!(dhcp_answer(&frame), None, "it goes to port 67");
        frame[36..38].copy_from_slice(&[0, 68]);
        frame[42 + 16..42 + 20].copy_from_slice(&[10, 0, 2, 2]);
        assert_eq!(dhcp_answer(&frame), Some((REQUEST, [10, 0, 2, 2], [10, 0, 2, 1])));
        for len in 0..frame.len() {
            // Whatever is cut off, it must not panic.
            let _ = dhcp_answer(&frame[..len]);
        }
    }
}
