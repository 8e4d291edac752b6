//! Published ports of a rootless network: sockets that processes of virtual machines have bound in the host's
//! namespace, before they left it, and lend the holder.
//!
//! What is said at the door, by the process, in records of 8 bytes:
//!
//! | first byte | then | with it | answer |
//! |---|---|---|---|
//! | `P` | port in the guest, big endian | a listening TCP or a bound UDP socket, IPv4 | `K`, or why not: `F` too many, `X` no such socket |
//! | `A` | the guest's address, 0.0.0.0 for none | | none |
//! | `E` | | | none: the holder ends |
//!
//! The socket stays open in the process too, which binds once and lends again to a holder that succeeds another:
//! nobody takes the port meanwhile, and clients that connect wait. The holder closes its copies when the
//! connection ends, whatever ended it.
//!
//! May touch: `limits`, `config`, `sandbox`. Read first: unix(7), SCM_RIGHTS.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use socket2::{Domain, Socket, Type};
use thiserror::Error;
use tokio::io::Interest;
use tokio::sync::oneshot;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::addr::LinkName;
use crate::config::{Protocol, Publish};
use crate::limits;

/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 8;
const PUBLISH: u8 = b'P';
const ADDRESS: u8 = b'A';
const END: u8 = b'E';
const TAKEN: u8 = b'K';
const TOO_MANY: u8 = b'F';
const NO_SUCH: u8 = b'X';

/// What a process says at the door.
#[derive(Debug)]
pub(super) enum Said {
    /// This socket leads to `guest_port` of its guest.
    Publish { socket: Option<File>, guest_port: u16 },
    /// Its guest's address.
    Address(Option<Ipv4Addr>),
    /// The holder shall end.
    End,
    /// Nothing this version knows.
    Unknown,
}

/// A record that is being read.
#[derive(Debug, Default)]
pub(super) struct Record {
    bytes: [u8; RECORD_BYTES],
    len: usize,
    socket: Option<File>,
}

/// A tokio stream as one that descriptors come over.
struct Stream<'a>(&'a tokio::net::UnixStream);

impl ScmSocket for Stream<'_> {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Record {
    /// The next thing said over `stream`; `None` at its end.
    ///
    /// # Errors
    /// The socket's.
    pub(super) async fn read(&mut self, stream: &tokio::net::UnixStream) -> io::Result<Option<Said>> {
        // Earlier versions said so with one byte.
        while self.len < RECORD_BYTES && self.bytes[0] != END {
            stream.readable().await?;
            let rest = &mut self.bytes[self.len..];
            let read = || Stream(stream).recv_with_fd(rest).map_err(io::Error::from);
            match stream.try_io(Interest::READABLE, read) {
                Ok((0, _)) => return Ok(None),
                Ok((len, socket)) => {
                    self.len += len;
                    self.socket = socket.or(self.socket.take());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let Record { bytes, socket, .. } = std::mem::take(self);
        let [what, a, b, c, d, ..] = bytes;
        Ok(Some(match what {
            PUBLISH => Said::Publish { socket, guest_port: u16::from_be_bytes([a, b]) },
            ADDRESS => Said::Address(Some(Ipv4Addr::new(a, b, c, d)).filter(|addr| !addr.is_unspecified())),
            END => Said::End,
            _ => Said::Unknown,
        }))
    }
}

/// The record that asks the holder to end.
pub(super) const fn end() -> [u8; RECORD_BYTES] {
    [END, 0, 0, 0, 0, 0, 0, 0]
}

/// The record that says the guest's address.
pub(super) fn address(addr: Option<Ipv4Addr>) -> [u8; RECORD_BYTES] {
    let [a, b, c, d] = addr.unwrap_or(Ipv4Addr::UNSPECIFIED).octets();
    [ADDRESS, a, b, c, d, 0, 0, 0]
}

/// A published port as its process has it.
#[derive(Debug)]
pub struct Lent {
    /// Bound, and with TCP listening, in the host's namespace.
    pub socket: Socket,
    /// Where it is bound, and the port in the guest.
    pub port: Publish,
}

/// Why a holder does not take a port.
#[derive(Debug, Error)]
pub enum LendError {
    /// The socket failed, or the holder went.
    #[error("the network's holder does not answer")]
    Silent(#[from] io::Error),
    /// Its bound.
    #[error(
        "the network has {} published ports already, which is as many as its holder takes",
        limits::PUBLISHED_PORTS_MAX
    )]
    TooMany,
    /// It says something else.
    #[error(
        "the network's holder does not understand: it is of another version; end its guests, and it with them"
    )]
    NotUnderstood,
}

impl Lent {
    /// Lends the port to the holder at the other end of `stream`, and waits for its answer.
    ///
    /// # Errors
    /// [`LendError`].
    pub(super) fn lend(&self, stream: &UnixStream) -> Result<(), LendError> {
        let [a, b] = self.port.guest_port.to_be_bytes();
        let record = [PUBLISH, a, b, 0, 0, 0, 0, 0];
        let sent = stream.send_with_fd(&record[..], self.socket.as_raw_fd()).map_err(io::Error::from)?;
        if sent != RECORD_BYTES {
            return Err(LendError::Silent(io::ErrorKind::WriteZero.into()));
        }
        let mut answer = [0; 1];
        io::Read::read_exact(&mut &*stream, &mut answer)?;
        match answer[0] {
            TAKEN => Ok(()),
            TOO_MANY => Err(LendError::TooMany),
            _ => Err(LendError::NotUnderstood),
        }
    }
}

/// What the worker is to do for a process, by the number of its connection.
#[derive(Debug)]
pub enum Order {
    /// Publish this socket.
    Publish(u64, Publish, Socket),
    /// Lead its ports to this address.
    Guest(u64, Option<Ipv4Addr>),
    /// Close its ports: it is gone.
    Gone(u64),
}

/// The worker's end: orders as they come.
#[derive(Debug)]
pub struct Orders {
    orders: mpsc::Receiver<(Order, oneshot::Sender<bool>)>,
    wake: EventFd,
}

/// The door's end.
#[derive(Clone, Debug)]
pub struct Ports {
    orders: mpsc::Sender<(Order, oneshot::Sender<bool>)>,
    wake: Arc<EventFd>,
    published: Arc<AtomicUsize>,
}

/// Both ends of the way from the door to the worker.
///
/// # Errors
/// No eventfd.
pub fn channel() -> io::Result<(Ports, Orders)> {
    let wake = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?;
    let (sender, orders) = mpsc::channel();
    let ports = Ports { orders: sender, wake: Arc::new(wake.try_clone()?), published: Arc::default() };
    Ok((ports, Orders { orders, wake }))
}

impl Orders {
    /// Readable when there are orders.
    pub fn event_fd(&self) -> &EventFd {
        &self.wake
    }

    /// No order that came until now is to wake the worker any more.
    pub fn clear_event(&self) {
        let _ = self.wake.read();
    }

    /// Carries out what waits by `each`, which says whether it could.
    pub fn take(&self, mut each: impl FnMut(Order) -> bool) {
        for (order, done) in self.orders.try_iter() {
            // Whoever gave the order may be gone.
            let _ = done.send(each(order));
        }
    }
}

impl Ports {
    /// Gives an order and waits until it is carried out, so that no process has more than one under way. False
    /// if it could not be, or there is no worker any more.
    async fn order(&self, order: Order) -> bool {
        let (done, carried_out) = oneshot::channel();
        self.orders.send((order, done)).is_ok() && self.wake.write(1).is_ok() && carried_out.await == Ok(true)
    }

    /// Those of one process, by the number of its connection.
    pub(super) fn of(&self, number: u64) -> PortsOf {
        PortsOf { ports: self.clone(), number, guest: None, published: 0 }
    }
}

/// Ports that one process has lent.
#[derive(Debug)]
pub(super) struct PortsOf {
    ports: Ports,
    number: u64,
    /// Its guest's address, if it has said so.
    guest: Option<Ipv4Addr>,
    published: usize,
}

impl PortsOf {
    /// Publishes a socket; the answer for the process.
    pub(super) async fn publish(&mut self, socket: Option<File>, guest_port: u16) -> u8 {
        let Some((port, socket)) = socket.and_then(|socket| judge(socket, guest_port)) else {
            return NO_SUCH;
        };
        let all = &self.ports.published;
        if all.fetch_add(1, Ordering::Relaxed) >= limits::PUBLISHED_PORTS_MAX {
            all.fetch_sub(1, Ordering::Relaxed);
            return TOO_MANY;
        }
        self.published += 1;
        if self.published == 1 && self.guest.is_some() {
            // Before clients that wait already are taken.
            self.ports.order(Order::Guest(self.number, self.guest)).await;
        }
        tracing::info!(protocol = ?port.protocol, host = %port.host, guest_port, "published");
        match self.ports.order(Order::Publish(self.number, port, socket)).await {
            true => TAKEN,
            false => NO_SUCH,
        }
    }

    /// Its guest has this address.
    pub(super) async fn lead_to(&mut self, addr: Option<Ipv4Addr>) {
        self.guest = addr;
        if self.published > 0 {
            self.ports.order(Order::Guest(self.number, addr)).await;
        }
    }

    /// The process is gone.
    pub(super) async fn close(self) {
        if self.published > 0 {
            self.ports.order(Order::Gone(self.number)).await;
            self.ports.published.fetch_sub(self.published, Ordering::Relaxed);
        }
    }
}

/// What a process's socket is, if it is one that can be published: whatever else came is closed.
fn judge(socket: File, guest_port: u16) -> Option<(Publish, Socket)> {
    let socket = Socket::from(OwnedFd::from(socket));
    let family = socket.domain().ok()?;
    if ![Domain::IPV4, Domain::IPV6].contains(&family) || guest_port == 0 {
        return None;
    }
    let (kind, transport) = (socket.r#type().ok()?, socket.protocol().ok()??);
    let protocol = match kind {
        Type::STREAM if transport == socket2::Protocol::TCP && socket.is_listener().ok()? => Protocol::Tcp,
        Type::DGRAM if transport == socket2::Protocol::UDP => Protocol::Udp,
        _ => return None,
    };
    let host: SocketAddr = socket.local_addr().ok()?.as_socket()?;
    // Clients of IPv6 elsewhere have no address that a guest could see.
    if family == Domain::IPV6 && host.ip() != IpAddr::V6(Ipv6Addr::LOCALHOST) {
        return None;
    }
    let device = socket.device().ok()?;
    let interface = match &device {
        Some(name) => Some(LinkName::new(str::from_utf8(name).ok()?)?),
        None => None,
    };
    socket.set_nonblocking(true).ok()?;
    (host.port() != 0).then_some((Publish { protocol, host, interface, guest_port }, socket))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::uplink::published::bind;

    fn file(socket: Socket) -> File {
        File::from(OwnedFd::from(socket))
    }

    #[test]
    fn only_sockets_that_can_be_published_are_taken() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (port, _) = judge(file(bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap()), 80).unwrap();
        assert_eq!((port.protocol, port.guest_port), (Protocol::Tcp, 80));
        assert!(port.host.port() != 0);
        let (port, _) = judge(file(bind(&mut Publish::new(Protocol::Udp, any, 80)).unwrap()), 53).unwrap();
        assert_eq!(port.protocol, Protocol::Udp);
        let refused = [
            file(Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()),
            file(Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap()),
            file(bind(&mut Publish::new(Protocol::Tcp, "[::]:0".parse().unwrap(), 80)).unwrap()),
            file(Socket::from(OwnedFd::from(UnixStream::pair().unwrap().0))),
            File::open("/dev/null").unwrap(),
        ];
        for (n, socket) in refused.into_iter().enumerate() {
            assert!(judge(socket, 80).is_none(), "number {n}");
        }
        assert!(judge(file(bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap()), 0).is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn records_are_read_however_they_are_cut() {
        let (here, there) = UnixStream::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        let there = tokio::net::UnixStream::from_std(there).unwrap();
        let addr = Ipv4Addr::new(10, 0, 2, 7);
        let sent = std::thread::spawn(move || {
            let record = [PUBLISH, 0, 80, 0, 0, 0, 0, 0];
            here.send_with_fd(&record[..3], File::open("/dev/null").unwrap().as_raw_fd()).unwrap();
            (&here).write_all(&record[3..]).unwrap();
            (&here).write_all(&[address(Some(addr)), address(None)].concat()).unwrap();
            (&here).write_all(b"?1234567").unwrap();
            // What earlier versions sent.
            (&here).write_all(b"E").unwrap();
        });
        let mut record = Record::default();
        let mut said = Vec::new();
        while let Some(next) = record.read(&there).await.unwrap() {
            said.push(next);
        }
        sent.join().unwrap();
        assert!(matches!(&said[0], Said::Publish { socket: Some(_), guest_port: 80 }), "{said:?}");
        assert!(matches!(said[1], Said::Address(Some(told)) if told == addr), "{said:?}");
        assert!(matches!(said[2..], [Said::Address(None), Said::Unknown, Said::End]), "{said:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn one_port_past_the_bound_is_refused_until_another_is_closed() {
        let (ports, orders) = channel().unwrap();
        let worker = std::thread::spawn(move || {
            let mut seen = Vec::new();
            while let Ok((order, done)) = orders.orders.recv() {
                seen.push(match order {
                    Order::Publish(number, ..) => (number, "port"),
                    Order::Guest(number, _) => (number, "guest"),
                    Order::Gone(number) => (number, "gone"),
                });
                let _ = done.send(true);
            }
            seen
        });
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let socket = || Some(file(bind(&mut Publish::new(Protocol::Udp, any, 80)).unwrap()));
        let mut first = ports.of(1);
        assert_eq!(first.publish(socket(), 80).await, TAKEN);
        ports.published.store(limits::PUBLISHED_PORTS_MAX, Ordering::Relaxed);
        let mut second = ports.of(2);
        assert_eq!(second.publish(socket(), 80).await, TOO_MANY);
        second.lead_to(Some(Ipv4Addr::LOCALHOST)).await;
        first.close().await;
        assert_eq!(second.publish(socket(), 80).await, TAKEN);
        second.close().await;
        assert_eq!(ports.published.load(Ordering::Relaxed), limits::PUBLISHED_PORTS_MAX - 1);
        drop(ports);
        let expected = [(1, "port"), (1, "gone"), (2, "guest"), (2, "port"), (2, "gone")];
        assert_eq!(
            worker.join().unwrap(),
            expected,
            "an address is told before the first port, or not at all"
        );
    }

    #[test]
    fn a_holder_that_says_no_is_understood() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let socket = bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap();
        let host = socket.local_addr().unwrap().as_socket().unwrap();
        let lent = Lent { socket, port: Publish::new(Protocol::Tcp, host, 80) };
        for (answer, expected) in
            [(TOO_MANY, "as many"), (NO_SUCH, "another version"), (b'?', "another version")]
        {
            let (here, there) = UnixStream::pair().unwrap();
            (&there).write_all(&[answer]).unwrap();
            let error = lent.lend(&here).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            let mut record = [0; RECORD_BYTES];
            (&there).read_exact(&mut record).unwrap();
            assert_eq!(record[..3], [PUBLISH, 0, 80]);
        }
    }
}
