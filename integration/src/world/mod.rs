//! The world beyond the host, in small: servers with one purpose each, at fixed [`ports`].
//!
//! Every TCP service reports how each of its connections ended as a JSON line on standard output
//! ([`EndEvent`]), because whether an end arrives as FIN or as RST is what many tests are about.
//! Threads with small stacks, blocking sockets, no dependencies: a test must be able to trust it.

mod http;
pub mod pattern;
mod tcp;
mod udp;

use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

/// Stack of a connection's thread in bytes: thousands run at once.
const STACK_BYTES: usize = 128 << 10;
/// Connections a listener may have waiting: a thousand may come at once.
const BACKLOG: i32 = 4096;

/// Where each service listens.
pub mod ports {
    /// HTTP/1.1: `/bytes/N?seed=S`, `/sha256/N?seed=S`, `/small/I`, `/peer`, PUT or POST `/upload`.
    pub const HTTP: u16 = 80;
    /// Reads until the end.
    pub const SINK: u16 = 9001;
    /// Reads `COUNT SEED\n`, sends that many bytes of the pattern, closes.
    pub const SOURCE: u16 = 9002;
    /// Sends back what it reads; TCP and UDP.
    pub const ECHO: u16 = 9003;
    /// Reads until the peer's half-close, then answers `SHA256 COUNT\n`, then closes.
    pub const DIGEST: u16 = 9004;
    /// Accepts and never reads, with a small receive buffer.
    pub const STALL: u16 = 9005;
    /// Tells the client its address as seen here, closes; TCP and UDP.
    pub const PEER: u16 = 9006;
    /// Resets the connection after the first byte.
    pub const RESET: u16 = 9007;
    /// UDP: answers `COUNT SIZE` with that many datagrams of that size, numbered.
    pub const BURST: u16 = 9008;
    /// Sends a line, half-closes, reads until the end and reports how much came.
    pub const HALF_CLOSE: u16 = 9009;
    /// Nothing listens here.
    pub const CLOSED: u16 = 9999;
}

/// How a connection ended, seen from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The peer closed or half-closed in order.
    Fin,
    /// The peer reset the connection.
    Rst,
    /// The connection timed out.
    Timeout,
    /// Something else went wrong.
    Error,
}

/// One ended connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndEvent {
    /// Name of the service.
    pub service: String,
    /// The client's address.
    pub peer: SocketAddr,
    /// How it ended.
    pub how: End,
    /// Bytes received from the client.
    pub bytes: u64,
}

impl EndEvent {
    /// The event of a line of output, if the line is one.
    pub fn parse(line: &str) -> Option<EndEvent> {
        serde_json::from_str(line).ok()
    }
}

impl End {
    fn of(error: &io::Error) -> End {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => End::Rst,
            io::ErrorKind::TimedOut => End::Timeout,
            _ => End::Error,
        }
    }
}

impl fmt::Display for EndEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?} after {} bytes", self.service, self.peer, self.how, self.bytes)
    }
}

fn print_line(line: &impl fmt::Display) {
    let mut out = io::stdout().lock();
    // A reader that went away must not end the servers.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// What HTTP's `/small/INDEX` answers.
pub fn small_file(index: u64) -> String {
    http::small(index)
}

/// What a TCP service does with a connection: the bytes it received, and how it ended.
type Service = fn(&mut TcpStream, SocketAddr, &mut u64) -> io::Result<End>;

/// Serves every service on `addr` for ever. Prints `{"ready":true}` when all listen.
///
/// # Errors
/// If a port cannot be bound.
pub fn serve(addr: IpAddr) -> io::Result<()> {
    let tcp_services: [(&'static str, u16, Service); 9] = [
        ("http", ports::HTTP, http::serve),
        ("sink", ports::SINK, tcp::sink),
        ("source", ports::SOURCE, tcp::source),
        ("echo", ports::ECHO, tcp::echo),
        ("digest", ports::DIGEST, tcp::digest),
        ("stall", ports::STALL, tcp::stall),
        ("peer", ports::PEER, tcp::peer),
        ("reset", ports::RESET, tcp::reset),
        ("half_close", ports::HALF_CLOSE, tcp::half_close),
    ];
    let mut threads = Vec::new();
    for (name, port, service) in tcp_services {
        let listener = listen(SocketAddr::new(addr, port), name == "stall")?;
        threads.push(thread::spawn(move || accept(&listener, name, service)));
    }
    let udp_services: [(u16, udp::Service); 3] =
        [(ports::ECHO, udp::echo), (ports::PEER, udp::peer), (ports::BURST, udp::burst)];
    for (port, service) in udp_services {
        let socket = UdpSocket::bind(SocketAddr::new(addr, port))?;
        threads.push(thread::spawn(move || udp::serve(&socket, service)));
    }
    print_line(&json!({ "ready": true }));
    for thread in threads {
        join(thread);
    }
    Ok(())
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        eprintln!("a server panicked");
    }
}

fn listen(addr: SocketAddr, small_buffer: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if small_buffer {
        // Before listen, so that the window offered is small from the start.
        socket.set_recv_buffer_size(4096)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn accept(listener: &TcpListener, name: &'static str, service: Service) {
    let name: Arc<str> = Arc::from(name);
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e) => {
                eprintln!("{name}: accept: {e}");
                thread::sleep(std::time::Duration::from_millis(10));
                continue;
            }
        };
        let own = Arc::clone(&name);
        let spawned = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || run_service(&own, stream, peer, service));
        if let Err(e) = spawned {
            eprintln!("{name}: thread: {e}");
        }
    }
}

fn run_service(name: &str, mut stream: TcpStream, peer: SocketAddr, service: Service) {
    let mut bytes = 0;
    let how = service(&mut stream, peer, &mut bytes).unwrap_or_else(|e| End::of(&e));
    drop(stream);
    let event = EndEvent { service: name.to_owned(), peer, how, bytes };
    print_line(&serde_json::to_string(&event).expect("plain fields always serialise"));
}
