//! What the guest's applications do: exchanges, connections.
//!
//! Each runs on a thread inside the guest's namespace and answers with times in nanoseconds.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::server::{ANSWER_PORT, ANSWER_PORTS, HOLD_PORT, REQUEST_BYTES};
use crate::lab::WORLD;
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
