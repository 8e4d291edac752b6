//! The TCP services. Each gets a connection, counts the bytes it received, and says how it ended.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use socket2::SockRef;

use super::{End, pattern};

const CHUNK_BYTES: usize = 32 << 10;

fn read_all(
    stream: &mut TcpStream,
    bytes: &mut u64,
    mut each: impl FnMut(&mut TcpStream, &[u8]) -> io::Result<()>,
) -> io::Result<End> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(End::Fin),
            Ok(n) => {
                *bytes += n as u64;
                each(stream, &chunk[..n])?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Reads until the end.
pub(super) fn sink(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    // Urgent data counts like any other.
    SockRef::from(&*stream).set_out_of_band_inline(true)?;
    read_all(stream, bytes, |_, _| Ok(()))
}

/// Sends as much of a pattern as a line asks for.
pub(super) fn source(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    let mut line = String::new();
    *bytes += BufReader::new(&mut *stream).read_line(&mut line)? as u64;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [count, seed] = numbers[..] else {
        return Ok(End::Error);
    };
    pattern::send(seed, count, stream)?;
    stream.shutdown(Shutdown::Write)?;
    read_all(stream, bytes, |_, _| Ok(()))
}

/// Sends back what it reads.
pub(super) fn echo(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    stream.set_nodelay(true)?;
    read_all(stream, bytes, |stream, chunk| stream.write_all(chunk))
}

/// Answers a half-closed upload with its digest.
pub(super) fn digest(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    let mut hash = Sha256::new();
    let end = read_all(stream, bytes, |_, chunk| {
        hash.update(chunk);
        Ok(())
    })?;
    let answer = format!("{} {bytes}\n", pattern::hex(&hash.finalize()));
    stream.write_all(answer.as_bytes())?;
    Ok(end)
}

/// Never reads; ends when the peer resets.
pub(super) fn stall(stream: &mut TcpStream, _: SocketAddr, _: &mut u64) -> io::Result<End> {
    loop {
        thread::sleep(Duration::from_millis(200));
        if let Some(e) = stream.take_error()? {
            return Err(e);
        }
    }
}

/// Tells the client its address.
pub(super) fn peer(stream: &mut TcpStream, peer: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    stream.write_all(format!("{peer}\n").as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    read_all(stream, bytes, |_, _| Ok(()))
}

/// Resets after the first byte.
pub(super) fn reset(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    *bytes += stream.read(&mut [0])? as u64;
    SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
    Ok(End::Fin)
}

/// Says a line, half-closes, and reads on.
pub(super) fn half_close(stream: &mut TcpStream, _: SocketAddr, bytes: &mut u64) -> io::Result<End> {
    stream.write_all(b"your turn\n")?;
    stream.shutdown(Shutdown::Write)?;
    read_all(stream, bytes, |_, _| Ok(()))
}
