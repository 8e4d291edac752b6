//! The uplink over the kernel's own sockets, on loopback: what the engine leans on, in both ways of
//! peeking.

mod datagrams;
mod hosts;
mod links;
mod news;
mod streams;

use std::cell::RefCell;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use epoll::Event;
use vunet::engine::host_net::{HostNet, HostStream, Readiness, Token};
use vunet::frame::{Payload, PayloadMut};
use vunet::uplink::sockets::{HostSockets, Stream};
use vunet::uplink::sys::poll::{self, Poll};

/// How long to wait for what the kernel does in microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Host sockets and their epoll set.
struct Uplink {
    poll: Poll,
    net: HostSockets,
    /// The far ends of streams to the DNS service.
    dns: Rc<RefCell<Vec<UnixStream>>>,
}

impl Uplink {
    fn new(peek_offset: bool) -> Uplink {
        let poll = Poll::new().expect("an epoll set");
        let dns = Rc::new(RefCell::new(Vec::new()));
        let far_ends = Rc::clone(&dns);
        let connect_dns = Box::new(move || {
            let (near, far) = UnixStream::pair()?;
            near.set_nonblocking(true)?;
            far_ends.borrow_mut().push(far);
            Ok(near)
        });
        let net = HostSockets::new(poll.clone(), connect_dns, peek_offset);
        Uplink { poll, net, dns }
    }

    /// Events within `wait`, merged by token.
    fn events(&self, wait: Duration) -> Vec<(Token, Readiness)> {
        let mut raw = [Event { events: 0, data: 0 }; 64];
        let count = self.poll.wait(wait.as_millis() as i32, &mut raw).expect("events");
        raw[..count].iter().map(|event| (Token(event.data), poll::readiness(event))).collect()
    }

    /// Waits until `token` is ready in the way `wanted` says.
    fn await_event(&self, token: Token, wanted: impl Fn(Readiness) -> bool) -> Readiness {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            for (seen, ready) in self.events(Duration::from_millis(100)) {
                if seen == token && wanted(ready) {
                    return ready;
                }
            }
        }
        panic!("{token:?} was never ready as wanted");
    }

    /// Asserts that nothing happens for a while.
    fn assert_quiet(&self) {
        assert_eq!(self.events(Duration::from_millis(50)), []);
    }

    /// A connected stream and its far end.
    fn connected(&mut self, token: Token) -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        let mut stream = self.net.connect(token, address).expect("a connect");
        let (far, _) = listener.accept().expect("a connection");
        self.await_event(token, |ready| ready.writable);
        stream.take_error().expect("connected");
        (stream, far)
    }
}

/// Runs `test` with `SO_PEEK_OFF`, where the kernel has it for TCP, and without.
fn both_ways(mut test: impl FnMut(Uplink)) {
    let with = Uplink::new(true);
    if with.net.uses_peek_offset() {
        test(with);
    } else {
        eprintln!("this kernel has no SO_PEEK_OFF for TCP: only peeking from the front is tested");
    }
    let without = Uplink::new(false);
    assert!(!without.net.uses_peek_offset());
    test(without);
}

fn send(stream: &mut Stream, bytes: &[u8]) -> io::Result<usize> {
    stream.send(&Payload::from_host(bytes))
}

/// Up to `len` bytes behind the first `offset` of the queue.
fn peek(stream: &mut Stream, offset: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let count = stream.peek(offset, PayloadMut::from_host(&mut bytes))?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Peeks again until something other than "nothing yet" is said.
fn peek_when_there(stream: &mut Stream, offset: usize, len: usize) -> io::Result<Vec<u8>> {
    let start = Instant::now();
    loop {
        match peek(stream, offset, len) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_micros(200));
            }
            outcome => return outcome,
        }
    }
}

/// How a far end sees its stream end, and what came before.
fn read_to_end(far: &mut TcpStream) -> (Vec<u8>, io::Result<()>) {
    far.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut bytes = Vec::new();
    let outcome = far.read_to_end(&mut bytes).map(|_| ());
    (bytes, outcome)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
