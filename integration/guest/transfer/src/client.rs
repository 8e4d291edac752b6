//! The guest's side: resolve, download, upload. Each answers one line that says how much and how
//! fast, or fails with one that says what differed. A body is hashed outside the time reported, since
//! an emulated processor hashes more slowly than the network moves.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::body::{self, Stream};
use crate::{Failure, PATIENCE, dns};

/// How an upload tells its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// By closing the sending direction; the answer comes on the other.
    HalfClose,
    /// By a Content-Length, with both directions open.
    Length,
}

/// The A records of `name` from `server`, or from the system's first server.
pub(crate) fn resolve(name: &str, server: Option<IpAddr>) -> Result<String, Failure> {
    let server = server.map_or_else(dns::system_server, Ok)?;
    let found: Vec<String> = dns::lookup(name, server)?.iter().map(Ipv4Addr::to_string).collect();
    Ok(format!("{name} is {} by {server}", found.join(" ")))
}

/// Fetches `count` bytes and compares their SHA-256 with the server's.
pub(crate) fn download(host: &str, count: usize) -> Result<String, Failure> {
    let mut stream = connect(host)?;
    let begun = Instant::now();
    write!(stream, "GET /bytes/{count}/{} HTTP/1.1\r\nHost: {host}\r\n\r\n", seed())?;
    let (head, received) = answer(&mut stream, count)?;
    let took = begun.elapsed();
    if received.len() != count {
        return Err(format!("{} of {count} bytes came", received.len()).into());
    }
    compare(&body::sha256_hex(&received), header(&head, "X-Content-SHA256")?, count, took)
}

/// Sends `count` bytes and compares their SHA-256 with what the server answers that it got.
pub(crate) fn upload(host: &str, count: usize, end: End) -> Result<String, Failure> {
    if count > body::BYTES_MAX {
        return Err(format!("{count} bytes are more than the {} of a body", body::BYTES_MAX).into());
    }
    let sent = Stream::new(seed()).take(count);
    let hash = body::sha256_hex(&sent);
    let mut stream = connect(host)?;
    let begun = Instant::now();
    write!(stream, "PUT /bytes HTTP/1.1\r\nHost: {host}\r\n")?;
    if end == End::Length {
        write!(stream, "Content-Length: {count}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    stream.write_all(&sent).map_err(|error| format!("sending: {error}"))?;
    if end == End::HalfClose {
        stream.shutdown(Shutdown::Write)?;
    }
    let (_, text) = answer(&mut stream, 1024)?;
    let took = begun.elapsed();
    let text = String::from_utf8_lossy(&text);
    let mut words = text.split_whitespace();
    let (received, theirs) = (words.next().unwrap_or("?"), words.next().unwrap_or("?"));
    if received != count.to_string() {
        return Err(format!("the server got {received} of {count} bytes").into());
    }
    compare(&hash, theirs, count, took)
}

/// Sends `count` bytes of an upload, says so, and holds the connection open until killed.
pub(crate) fn hold(host: &str, count: usize) -> Result<String, Failure> {
    let mut stream = connect(host)?;
    write!(stream, "PUT /bytes HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    stream.write_all(&Stream::new(seed()).take(count.min(body::BYTES_MAX)))?;
    println!("held after {count} bytes");
    loop {
        std::thread::sleep(PATIENCE);
    }
}

/// Sends `count` datagrams that begin with their number, a millisecond apart so that no queue fills.
pub(crate) fn udp_send(to: &str, count: u32) -> Result<String, Failure> {
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    for number in 0..count {
        let mut datagram = [0u8; 64];
        datagram[..4].copy_from_slice(&number.to_be_bytes());
        socket.send_to(&datagram, to)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(format!("{count} datagrams sent to {to}"))
}

/// The address and port the server sees this guest at.
pub(crate) fn peer(host: &str) -> Result<String, Failure> {
    let mut stream = connect(host)?;
    write!(stream, "GET /peer HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let (_, text) = answer(&mut stream, 1024)?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}

fn compare(ours: &str, theirs: &str, count: usize, took: Duration) -> Result<String, Failure> {
    if ours != theirs {
        return Err(format!("SHA-256 differs: {ours} here, {theirs} there").into());
    }
    let megabits = count as f64 * 8.0 / 1e6 / took.as_secs_f64().max(1e-6);
    let short = &ours[..12];
    Ok(format!("{count} bytes in {} ms, {megabits:.0} Mbit/s, SHA-256 {short} equal", took.as_millis()))
}

/// Connects to `HOST:PORT`, where the host is an address or a name the system's server knows.
fn connect(host: &str) -> Result<TcpStream, Failure> {
    let (name, port) = host.rsplit_once(':').ok_or_else(|| format!("{host}: not HOST:PORT"))?;
    let address = match name.parse::<IpAddr>() {
        Ok(address) => address,
        Err(_) => IpAddr::V4(dns::lookup(name, dns::system_server()?)?[0]),
    };
    let address = SocketAddr::new(address, port.parse()?);
    let stream = TcpStream::connect_timeout(&address, PATIENCE)
        .map_err(|error| format!("connecting to {address}: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Reads a whole answer: its head, and its body of at most `body_max` bytes up to the end of the
/// stream. A status other than 200 is a failure, as is an end that is not a clean close.
fn answer(stream: &mut TcpStream, body_max: usize) -> Result<(String, Vec<u8>), Failure> {
    let mut bytes = Vec::with_capacity(body_max.min(body::BYTES_MAX) + 4096);
    let limit = u64::try_from(body_max + 4096)?;
    stream
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("after {} bytes of the answer: {error}", bytes.len()))?;
    let head_end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let head_end = head_end.ok_or_else(|| format!("the answer ended in its head, {} bytes", bytes.len()))?;
    let payload = bytes.split_off(head_end + 4);
    let head = String::from_utf8_lossy(&bytes).into_owned();
    if !head.starts_with("HTTP/1.1 200 ") {
        return Err(head.lines().next().unwrap_or_default().to_owned().into());
    }
    Ok((head, payload))
}

fn header<'head>(head: &'head str, name: &str) -> Result<&'head str, Failure> {
    let value = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    value.ok_or_else(|| format!("the answer has no {name}").into())
}

/// A seed that differs from run to run, so that no stale byte of an earlier transfer can pass.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |since| since.as_secs() ^ (u64::from(since.subsec_nanos()) << 32))
}
