//! The world's side: an HTTP server of made bodies, and a sink that counts datagrams. One thread a
//! connection, at most [`CONNECTIONS_MAX`] at once; the server closes first.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::body::{self, Stream};
use crate::{Failure, PATIENCE};

/// Connections served at once: the tests open 1,000, and threads beyond twice that are a loop gone
/// wrong.
const CONNECTIONS_MAX: usize = 2048;

/// Bytes of a request's head that are read before it is refused.
const HEAD_BYTES_MAX: u64 = 8192;

/// Serves HTTP on `listen` until killed.
pub(crate) fn serve(listen: &str) -> Result<String, Failure> {
    let listener = TcpListener::bind(listen).map_err(|error| format!("binding {listen}: {error}"))?;
    serve_on(&listener)
}

fn serve_on(listener: &TcpListener) -> Result<String, Failure> {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = stream?;
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let open = Arc::clone(&open);
        std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
            if let Err(failure) = exchange(stream) {
                eprintln!("{failure}");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        })?;
    }
    Ok(String::new())
}

/// Reads one request and answers it.
fn exchange(mut stream: TcpStream) -> Result<(), Failure> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::with_capacity(256 << 10, stream.try_clone()?);
    let (mut request, mut length) = (String::new(), None);
    let mut head = reader.by_ref().take(HEAD_BYTES_MAX);
    head.read_line(&mut request)?;
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 {
            return Err("the request ended in its head".into());
        }
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.strip_prefix("Content-Length: ") {
            length = Some(value.trim().parse::<u64>()?);
        }
    }
    let words: Vec<&str> = request.split_whitespace().collect();
    match words.as_slice() {
        ["GET", path, _] if path.starts_with("/bytes/") => send_body(&mut stream, path),
        ["GET", "/peer", _] => {
            let peer = stream.peer_addr()?;
            respond(&mut stream, "200 OK", &format!("{peer}\n"))
        }
        ["PUT", "/bytes", _] => receive_body(&mut reader, &mut stream, length),
        _ => respond(&mut stream, "404 Not Found", "no such thing here\n"),
    }
}

/// Answers `/bytes/COUNT/SEED` with that many bytes and their SHA-256.
fn send_body(stream: &mut TcpStream, path: &str) -> Result<(), Failure> {
    let mut parts = path.split('/').skip(2);
    let count = parts.next().and_then(|text| text.parse().ok());
    let seed = parts.next().and_then(|text| text.parse().ok());
    let (Some(count), Some(seed)) = (count, seed) else {
        return respond(stream, "400 Bad Request", "expected /bytes/COUNT/SEED\n");
    };
    if count > body::BYTES_MAX {
        return respond(stream, "400 Bad Request", "more than a body may hold\n");
    }
    let bytes = Stream::new(seed).take(count);
    let hash = body::sha256_hex(&bytes);
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {count}\r\nX-Content-SHA256: {hash}\r\n")?;
    stream.write_all(b"Connection: close\r\n\r\n")?;
    stream.write_all(&bytes)?;
    Ok(())
}

/// Takes a body of `length` bytes, or up to the end of the stream, and answers its count and hash.
fn receive_body(
    reader: &mut BufReader<TcpStream>,
    stream: &mut TcpStream,
    length: Option<u64>,
) -> Result<(), Failure> {
    let mut limited = reader.take(length.unwrap_or(u64::MAX));
    let (mut hash, mut count) = (Sha256::new(), 0);
    loop {
        let chunk = limited.fill_buf().map_err(|error| format!("upload cut after {count} bytes: {error}"))?;
        if chunk.is_empty() {
            break;
        }
        hash.update(chunk);
        let taken = chunk.len();
        count += taken;
        limited.consume(taken);
    }
    eprintln!("upload complete with {count} bytes");
    respond(stream, "200 OK", &format!("{count} {}\n", body::hex(&hash.finalize())))
}

fn respond(stream: &mut TcpStream, status: &str, text: &str) -> Result<(), Failure> {
    let length = text.len();
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")?;
    Ok(())
}

/// Counts datagrams to `listen` until killed, and prints the total whenever none came for a while.
pub(crate) fn udp_sink(listen: &str) -> Result<String, Failure> {
    let socket = UdpSocket::bind(listen).map_err(|error| format!("binding {listen}: {error}"))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (mut total, mut printed, mut since) = (0u64, 0u64, Instant::now());
    let mut datagram = vec![0u8; 65_536];
    loop {
        let came = socket.recv(&mut datagram).is_ok();
        total += u64::from(came);
        let due = !came || since.elapsed() > Duration::from_secs(1);
        if due && total != printed {
            println!("{total}");
            (printed, since) = (total, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{self, End};

    fn server() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || serve_on(&listener));
        address
    }

    #[test]
    fn a_download_and_both_kinds_of_upload_compare_equal() {
        let host = server();
        for count in [0, 1, 1_000_003] {
            client::download(&host, count).unwrap();
            client::upload(&host, count, End::HalfClose).unwrap();
            client::upload(&host, count, End::Length).unwrap();
        }
    }

    #[test]
    fn a_body_past_the_bound_is_refused_on_both_sides() {
        let host = server();
        let past = body::BYTES_MAX + 1;
        assert!(client::download(&host, past).unwrap_err().to_string().contains("400"));
        assert!(client::upload(&host, past, End::Length).is_err());
    }

    #[test]
    fn the_peer_is_told_its_own_address() {
        assert!(client::peer(&server()).unwrap().starts_with("127.0.0.1:"));
    }
}
