//! A small HTTP/1.1 server: persistent connections, `Content-Length` bodies, `Expect: 100-continue`.
//! Read first: RFC 9112.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use sha2::{Digest, Sha256};

use super::{End, pattern};

/// Longest request head in bytes.
const HEAD_BYTES_MAX: u64 = 16 << 10;

struct Request {
    method: String,
    path: String,
    seed: u64,
    body_bytes: u64,
    wants_continue: bool,
    close: bool,
}

/// Serves requests until the client closes or asks to.
pub(super) fn serve(stream: &mut TcpStream, peer: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read_head(&mut reader, bytes)? {
        if request.wants_continue {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let body = digest_body(&mut reader, request.body_bytes)?;
        *bytes += request.body_bytes;
        answer(stream, peer, &request, &body)?;
        if request.close {
            break;
        }
    }
    Ok(End::Fin)
}

fn read_head(reader: &mut BufReader<TcpStream>, bytes: &mut u64) -> io::Result<Option<Request>> {
    let mut lines = Vec::new();
    let mut head = reader.take(HEAD_BYTES_MAX);
    loop {
        let mut line = String::new();
        let len = head.read_line(&mut line)?;
        *bytes += len as u64;
        if len == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let mut words = lines.first().map(String::as_str).unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut request = Request {
        method: method.to_owned(),
        path: path.to_owned(),
        seed: query.strip_prefix("seed=").and_then(|seed| seed.parse().ok()).unwrap_or(0),
        body_bytes: 0,
        wants_continue: false,
        close: false,
    };
    for line in &lines[1..] {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => request.body_bytes = value.trim().parse().unwrap_or(0),
            "expect" => request.wants_continue = value.trim().eq_ignore_ascii_case("100-continue"),
            "connection" => request.close = value.trim().eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    Ok(Some(request))
}

fn digest_body(reader: &mut BufReader<TcpStream>, body_bytes: u64) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut body = reader.take(body_bytes);
    let mut chunk = vec![0; 32 << 10];
    loop {
        let n = body.read(&mut chunk)?;
        if n == 0 {
            break;
        }
        hash.update(&chunk[..n]);
    }
    if body.limit() > 0 {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    Ok(pattern::hex(&hash.finalize()))
}

fn head(stream: &mut TcpStream, status: &str, len: u64) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nContent-Type: application/octet-stream\r\n\r\n"
    );
    stream.write_all(head.as_bytes())
}

fn text(stream: &mut TcpStream, status: &str, body: &str) -> io::Result<()> {
    head(stream, status, body.len() as u64)?;
    stream.write_all(body.as_bytes())
}

fn answer(stream: &mut TcpStream, peer: SocketAddr, request: &Request, body: &str) -> io::Result<()> {
    let mut parts = request.path.trim_start_matches('/').split('/');
    let (first, second) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let number = second.parse::<u64>();
    match (request.method.as_str(), first, number) {
        ("GET", "bytes", Ok(count)) => {
            head(stream, "200 OK", count)?;
            pattern::send(request.seed, count, stream)
        }
        ("HEAD", "bytes", Ok(count)) => head(stream, "200 OK", count),
        ("GET", "sha256", Ok(count)) => {
            text(stream, "200 OK", &format!("{}\n", pattern::sha256(request.seed, count)))
        }
        ("GET", "small", Ok(index)) => text(stream, "200 OK", &small(index)),
        ("GET", "peer", _) => text(stream, "200 OK", &format!("{peer}\n")),
        ("PUT" | "POST", "upload", _) => text(stream, "200 OK", &format!("{body} {}\n", request.body_bytes)),
        _ => text(stream, "404 Not Found", "there is no such thing\n"),
    }
}

/// The small file number `index`: 200 to 1,199 bytes.
pub(super) fn small(index: u64) -> String {
    let len = usize::try_from(200 + index * 37 % 1000).expect("below 1200");
    format!("small file {index} ").chars().cycle().take(len).collect()
}
