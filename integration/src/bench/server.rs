//! The benchmark's servers in the world, apart from [`crate::world`]: these are to cost little.
//!
//! No line is printed and no thread started for a connection.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use socket2::SockRef;

use crate::sys;

/// First of the ports that answer one request and close.
pub(super) const ANSWER_PORT: u16 = 9200;
/// How many of them there are: connections in TIME_WAIT spread over them.
pub(super) const ANSWER_PORTS: u16 = 64;
/// Accepts connections and keeps them open.
pub(super) const HOLD_PORT: u16 = 9300;
/// Takes datagrams that nobody reads: the kernel counts and drops them.
pub(super) const UNREAD_PORT: u16 = 9301;
/// Sends datagrams to whoever sends one.
pub(super) const BLAST_PORT: u16 = 9302;
/// Length of a request and of its response in bytes.
pub(super) const REQUEST_BYTES: usize = 64;

const STACK_BYTES: usize = 128 << 10;
/// A client that asks nothing must not hold a port for ever.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// Datagrams sent between two looks at the clock, in one call or in many: a burst has one length,
/// so that what is lost at a given rate can be compared.
const BURST: u64 = 64;
/// Datagrams one call can send (Linux's UDP_MAX_SEGMENTS before 6.9; later kernels take 128).
const RUN_MAX: u64 = 64;
/// Payload one call can send: an IPv4 packet's without its headers, in bytes.
const RUN_BYTES_MAX: u64 = 65_507;

/// What the servers are to do.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Address to listen on.
    pub bind: IpAddr,
    /// Payload of the datagrams sent to whoever sends one, in bytes.
    pub blast_bytes: u16,
    /// For how long they are sent.
    pub blast: Duration,
    /// Datagrams a second at most; 0 for as many as go.
    pub blast_rate: u64,
    /// Datagrams sent with one system call at most.
    pub blast_run: u16,
}

impl ServerConfig {
    /// Datagrams sent with one system call.
    fn run(&self) -> u64 {
        let fit = RUN_BYTES_MAX / u64::from(self.blast_bytes.max(1));
        u64::from(self.blast_run).min(fit).clamp(1, RUN_MAX)
    }
}

/// Serves for ever. Prints `{"ready":true}` when all ports are open, and one line with `sent` and
/// `seconds` after datagrams were sent.
///
/// # Errors
/// If a port cannot be bound.
pub fn serve(config: &ServerConfig) -> io::Result<()> {
    let spawn =
        |work: Box<dyn FnOnce() + Send>| thread::Builder::new().stack_size(STACK_BYTES).spawn(work).map(drop);
    for port in ANSWER_PORT..ANSWER_PORT + ANSWER_PORTS {
        let listener = TcpListener::bind((config.bind, port))?;
        spawn(Box::new(move || answer_all(&listener)))?;
    }
    let hold = TcpListener::bind((config.bind, HOLD_PORT))?;
    spawn(Box::new(move || hold_all(&hold)))?;
    let unread = UdpSocket::bind((config.bind, UNREAD_PORT))?;
    // The smallest the kernel gives: what is dropped at once costs the other processes least.
    SockRef::from(&unread).set_recv_buffer_size(1)?;
    let blast = UdpSocket::bind((config.bind, BLAST_PORT))?;
    if config.run() > 1 {
        sys::udp::segment(&blast, config.blast_bytes)?;
    }
    println!("{}", json!({ "ready": true }));
    loop {
        blast_once(&blast, config)?;
    }
}

fn answer_all(listener: &TcpListener) {
    loop {
        let answered = listener.accept().and_then(|(stream, _)| answer(&stream));
        if let Err(e) = answered {
            eprintln!("answering: {e}");
        }
    }
}

fn answer(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    let mut request = [0; REQUEST_BYTES];
    stream.read_exact(&mut request)?;
    stream.write_all(&request)
    // Closed here, before the client does.
}

fn hold_all(listener: &TcpListener) {
    let mut held = Vec::new();
    loop {
        match listener.accept() {
            Ok((stream, _)) => held.push(stream),
            Err(e) => {
                eprintln!("holding: {e}");
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Waits for a datagram, then sends to its sender for the time configured.
fn blast_once(socket: &UdpSocket, config: &ServerConfig) -> io::Result<()> {
    let (_, peer) = socket.recv_from(&mut [0; 2048])?;
    let run = config.run();
    let calls = BURST / run;
    let payload = vec![0x33; usize::from(config.blast_bytes) * usize::try_from(run).unwrap_or(1)];
    let started = Instant::now();
    let mut sent = 0u64;
    while started.elapsed() < config.blast {
        for _ in 0..calls {
            match socket.send_to(&payload, peer) {
                Ok(_) => sent += run,
                // The peer's ICMP errors are not ours to act on.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(e) => return Err(e),
            }
        }
        if config.blast_rate > 0 {
            let due = Duration::from_secs_f64(sent as f64 / config.blast_rate as f64);
            thread::sleep(due.saturating_sub(started.elapsed()));
        }
    }
    println!("{}", json!({ "sent": sent, "seconds": started.elapsed().as_secs_f64() }));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_bounded_by_datagrams_and_by_bytes() {
        let run = |blast_bytes, blast_run| {
            let config = ServerConfig {
                bind: IpAddr::from([127, 0, 0, 1]),
                blast_bytes,
                blast: Duration::ZERO,
                blast_rate: 0,
                blast_run,
            };
            config.run()
        };
        assert_eq!([run(64, 1), run(64, 0), run(64, 64), run(64, 1000)], [1, 1, 64, 64]);
        assert_eq!([run(1472, 64), run(65_507, 64), run(0, 64)], [44, 1, 64]);
    }

    #[test]
    fn a_run_arrives_as_datagrams_of_the_size_asked_for() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sys::udp::segment(&sender, 100).unwrap();
        sender.send_to(&[7; 250], receiver.local_addr().unwrap()).unwrap();
        let lens: Vec<usize> = (0..3).map(|_| receiver.recv(&mut [0; 2048]).unwrap()).collect();
        assert_eq!(lens, [100, 100, 50]);
    }
}
