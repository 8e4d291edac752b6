//! Published ports of a rootless network: sockets that processes of virtual machines have bound in the host's
//! namespace, before they left it, and lend the holder.
//!
//! What is said at the door, by the process, in records of 8 bytes:
//!
//! | first byte | then | with it | answer |
//! |---|---|---|---|
//! | `P` | port in the guest, big endian | a listening TCP or a bound UDP socket, IPv4 | `K`, or why not: `F` too many, `X` no such socket |
//! | `T` | 7 bytes of a port as `--publish` takes it, zeros behind its end | | none: more of it, or what is to be done with it, follows |
//! | `B` | | | whether that port could be bound, and its socket (`binding.rs`) |
//! | `U` | 1 if its connections are to be reset, else 0 | | `K` and how many were (32 bits, big endian), or `X`: it is not published; 8 bytes |
//! | `A` | the guest's address, 0.0.0.0 for none | | none |
//! | `E` | | | none: the holder ends |
//!
//! The socket stays open in the process too, which binds once and lends again to a holder that succeeds another:
//! nobody takes the port meanwhile, and clients that connect wait. The holder closes its copies when the
//! connection ends, whatever ended it.
//!
//! May touch: `limits`, `config`, `sandbox`. Read first: unix(7), SCM_RIGHTS.

use std::collections::HashSet;
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
use crate::config::publish::publish;
use crate::config::{Protocol, Publish};
use crate::engine::flows::Ended;
use crate::limits;
use crate::uplink::published::BindError;

/// Bytes of a record.
pub(super) const RECORD_BYTES: usize = 8;
const PUBLISH: u8 = b'P';
const TEXT: u8 = b'T';
const BIND: u8 = b'B';
const UNPUBLISH: u8 = b'U';
const ADDRESS: u8 = b'A';
const END: u8 = b'E';
const TAKEN: u8 = b'K';
const TOO_MANY: u8 = b'F';
const NO_SUCH: u8 = b'X';
/// Bytes of a port's text: `udp:255.255.255.255%` and an interface's 15 bytes and two ports are 47.
const TEXT_BYTES_MAX: usize = 56;

/// What a process says at the door.
#[derive(Debug)]
pub(super) enum Said {
    /// This socket leads to `guest_port` of its guest.
    Publish { socket: Option<File>, guest_port: u16 },
    /// This port is to be bound; `None` is none.
    Bind(Option<Publish>),
    /// This port, which it has lent, leads nowhere any more.
    Unpublish { port: Option<Publish>, reset: bool },
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
    /// Of a port, from records before this one.
    text: Vec<u8>,
}

/// A tokio stream as one that descriptors come over.
pub(super) struct Stream<'a>(pub(super) &'a tokio::net::UnixStream);

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
        loop {
            if !self.fill(stream).await? {
                return Ok(None);
            }
            let Record { bytes, socket, text, .. } = std::mem::take(self);
            let [what, a, b, c, d, ..] = bytes;
            return Ok(Some(match what {
                TEXT => {
                    // One byte too many is remembered, so that what is cut is no port.
                    let room = (TEXT_BYTES_MAX + 1).saturating_sub(text.len());
                    self.text = text;
                    self.text.extend(bytes[1..].iter().take(room));
                    continue;
                }
                PUBLISH => Said::Publish { socket, guest_port: u16::from_be_bytes([a, b]) },
                BIND => Said::Bind(port(&text)),
                UNPUBLISH => Said::Unpublish { port: port(&text), reset: a != 0 },
                ADDRESS => {
                    Said::Address(Some(Ipv4Addr::new(a, b, c, d)).filter(|addr| !addr.is_unspecified()))
                }
                END => Said::End,
                _ => Said::Unknown,
            }));
        }
    }

    /// Reads until the record is whole; false at the stream's end.
    async fn fill(&mut self, stream: &tokio::net::UnixStream) -> io::Result<bool> {
        // Earlier versions said so with one byte.
        while self.len < RECORD_BYTES && self.bytes[0] != END {
            stream.readable().await?;
            let rest = &mut self.bytes[self.len..];
            let read = || Stream(stream).recv_with_fd(rest).map_err(io::Error::from);
            match stream.try_io(Interest::READABLE, read) {
                Ok((0, _)) => return Ok(false),
                Ok((len, socket)) => {
                    self.len += len;
                    self.socket = socket.or(self.socket.take());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The one port a text means, if it does.
fn port(text: &[u8]) -> Option<Publish> {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let text = str::from_utf8(&text[..end]).ok().filter(|text| text.len() <= TEXT_BYTES_MAX)?;
    publish(text).ok().filter(|range| range.count() == 1)?.iter().next()
}

/// The records that say a port, before one that says what is to be done with it.
fn text(port: &Publish) -> Vec<u8> {
    let text = port.to_string();
    let of = |part: &[u8]| {
        let mut record = [0; RECORD_BYTES];
        record[0] = TEXT;
        record[1..=part.len()].copy_from_slice(part);
        record
    };
    text.as_bytes().chunks(RECORD_BYTES - 1).flat_map(of).collect()
}

/// The records that ask for a port to be bound.
pub(super) fn bind(port: &Publish) -> Vec<u8> {
    [text(port), vec![BIND, 0, 0, 0, 0, 0, 0, 0]].concat()
}

/// The records that ask for a port to lead nowhere any more, its connections reset or left.
pub(super) fn unpublish(port: &Publish, reset: bool) -> Vec<u8> {
    [text(port), vec![UNPUBLISH, reset.into(), 0, 0, 0, 0, 0, 0]].concat()
}

/// What the answer to [`unpublish`] says: how many connections were reset, `None` if there was no such port.
pub(super) fn unpublished(answer: [u8; RECORD_BYTES]) -> Option<usize> {
    let [what, a, b, c, d, ..] = answer;
    (what == TAKEN).then_some(u32::from_be_bytes([a, b, c, d]) as usize)
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
    /// It cannot bind it.
    #[error(transparent)]
    Bind(Box<BindError>),
    /// There is none.
    #[error(
        "the network has no holder just now, which serves its ports: start one (`vunet network hold NAME`, or a further VM) and try again"
    )]
    NoHolder,
}

impl Lent {
    /// Lends the port to the holder at the other end of `stream`, and waits for its answer.
    ///
    /// # Errors
    /// [`LendError`].
    pub(super) fn lend(&self, stream: &UnixStream) -> Result<(), LendError> {
        self.send(stream)?;
        let mut answer = [0; 1];
        io::Read::read_exact(&mut &*stream, &mut answer)?;
        lent(answer[0])
    }

    /// The same over a stream of tokio's.
    ///
    /// # Errors
    /// [`LendError`].
    pub(super) async fn lend_over(&self, stream: &mut tokio::net::UnixStream) -> Result<(), LendError> {
        loop {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || self.send(&Stream(stream)));
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => break outcome?,
            }
        }
        lent(tokio::io::AsyncReadExt::read_u8(stream).await?)
    }

    fn send(&self, stream: &impl ScmSocket) -> io::Result<()> {
        let [a, b] = self.port.guest_port.to_be_bytes();
        let record = [PUBLISH, a, b, 0, 0, 0, 0, 0];
        let sent = stream.send_with_fd(&record[..], self.socket.as_raw_fd()).map_err(io::Error::from)?;
        if sent == RECORD_BYTES { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// What the answer to a lent port means.
fn lent(answer: u8) -> Result<(), LendError> {
    match answer {
        TAKEN => Ok(()),
        TOO_MANY => Err(LendError::TooMany),
        _ => Err(LendError::NotUnderstood),
    }
}

/// What the worker is to do for a process, by the number of its connection.
#[derive(Debug)]
pub enum Order {
    /// Publish this socket.
    Publish(u64, Publish, Socket),
    /// Publish it no more; whether its connections are reset.
    Unpublish(u64, Publish, bool),
    /// Reset more of them, from this place on.
    EndPublished(Publish, usize),
    /// Lead its ports to this address.
    Guest(u64, Option<Ipv4Addr>),
    /// Close its ports: it is gone.
    Gone(u64),
}

/// Where it is said that an order was carried out, and which connections it reset; `None` if it could not be.
type Outcome = oneshot::Sender<Option<Ended>>;

/// The worker's end: orders as they come.
#[derive(Debug)]
pub struct Orders {
    orders: mpsc::Receiver<(Order, Outcome)>,
    wake: EventFd,
}

/// The door's end.
#[derive(Clone, Debug)]
pub struct Ports {
    orders: mpsc::Sender<(Order, Outcome)>,
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

    /// Carries out what waits by `each`, which says whether it could, and which connections it reset.
    pub fn take(&self, mut each: impl FnMut(Order) -> Option<Ended>) {
        for (order, done) in self.orders.try_iter() {
            // Whoever gave the order may be gone.
            let _ = done.send(each(order));
        }
    }
}

impl Ports {
    /// Gives an order and waits until it is carried out, so that no process has more than one under way. `None`
    /// if it could not be, or there is no worker any more.
    async fn order(&self, order: Order) -> Option<Ended> {
        let (done, carried_out) = oneshot::channel();
        self.orders.send((order, done)).ok()?;
        self.wake.write(1).ok()?;
        carried_out.await.ok().flatten()
    }

    /// Those of one process, by the number of its connection.
    pub(super) fn of(&self, number: u64) -> PortsOf {
        PortsOf { ports: self.clone(), number, guest: None, published: HashSet::new(), served: false }
    }
}

/// Ports that one process has lent.
#[derive(Debug)]
pub(super) struct PortsOf {
    ports: Ports,
    number: u64,
    /// Its guest's address, if it has said so.
    guest: Option<Ipv4Addr>,
    published: HashSet<Publish>,
    /// The worker knows of it: it has published something, and may have connections of that still.
    served: bool,
}

impl PortsOf {
    /// Publishes a socket; the answer for the process.
    pub(super) async fn publish(&mut self, socket: Option<File>, guest_port: u16) -> u8 {
        let judged = socket.and_then(|socket| judge(socket, guest_port));
        let Some((port, socket)) = judged.filter(|(port, _)| !self.published.contains(port)) else {
            return NO_SUCH;
        };
        let all = &self.ports.published;
        if all.fetch_add(1, Ordering::Relaxed) >= limits::PUBLISHED_PORTS_MAX {
            all.fetch_sub(1, Ordering::Relaxed);
            return TOO_MANY;
        }
        if !self.served && self.guest.is_some() {
            // Before clients that wait already are taken.
            self.ports.order(Order::Guest(self.number, self.guest)).await;
        }
        self.served = true;
        if self.ports.order(Order::Publish(self.number, port, socket)).await.is_none() {
            self.ports.published.fetch_sub(1, Ordering::Relaxed);
            return NO_SUCH;
        }
        tracing::info!(protocol = ?port.protocol, host = %port.host, guest_port, "published");
        self.published.insert(port);
        TAKEN
    }

    /// Publishes a port no more, if it is one of the process's; the answer for it.
    pub(super) async fn unpublish(&mut self, port: Option<Publish>, reset: bool) -> [u8; RECORD_BYTES] {
        let Some(port) = port.filter(|port| self.published.remove(port)) else {
            return [NO_SUCH, 0, 0, 0, 0, 0, 0, 0];
        };
        let mut connections = 0;
        let mut ended = self.ports.order(Order::Unpublish(self.number, port, reset)).await;
        while let Some(step) = ended {
            connections += step.connections;
            let Some(first) = step.next else { break };
            ended = self.ports.order(Order::EndPublished(port, first)).await;
        }
        self.ports.published.fetch_sub(1, Ordering::Relaxed);
        tracing::info!(protocol = ?port.protocol, host = %port.host, "published no more");
        let [a, b, c, d] = u32::try_from(connections).unwrap_or(u32::MAX).to_be_bytes();
        [TAKEN, a, b, c, d, 0, 0, 0]
    }

    /// Its guest has this address.
    pub(super) async fn lead_to(&mut self, addr: Option<Ipv4Addr>) {
        self.guest = addr;
        if self.served {
            self.ports.order(Order::Guest(self.number, addr)).await;
        }
    }

    /// The process is gone.
    pub(super) async fn close(self) {
        if self.served {
            self.ports.order(Order::Gone(self.number)).await;
        }
        self.ports.published.fetch_sub(self.published.len(), Ordering::Relaxed);
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
    use crate::uplink::published;

    fn file(socket: Socket) -> File {
        File::from(OwnedFd::from(socket))
    }

    #[test]
    fn only_sockets_that_can_be_published_are_taken() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (port, _) =
            judge(file(published::bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap()), 80).unwrap();
        assert_eq!((port.protocol, port.guest_port), (Protocol::Tcp, 80));
        assert!(port.host.port() != 0);
        let (port, _) =
            judge(file(published::bind(&mut Publish::new(Protocol::Udp, any, 80)).unwrap()), 53).unwrap();
        assert_eq!(port.protocol, Protocol::Udp);
        let refused = [
            file(Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()),
            file(Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap()),
            file(published::bind(&mut Publish::new(Protocol::Tcp, "[::]:0".parse().unwrap(), 80)).unwrap()),
            file(Socket::from(OwnedFd::from(UnixStream::pair().unwrap().0))),
            File::open("/dev/null").unwrap(),
        ];
        for (n, socket) in refused.into_iter().enumerate() {
            assert!(judge(socket, 80).is_none(), "number {n}");
        }
        assert!(
            judge(file(published::bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap()), 0).is_none()
        );
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
            let longest = "udp:255.255.255.254%interface-names:65535:65535";
            let longest = publish(longest).unwrap().iter().next().unwrap();
            (&here).write_all(&[bind(&longest), unpublish(&longest, true)].concat()).unwrap();
            // Neither a port nor an end of text.
            (&here).write_all(&[&b"T\xff\xff\xff\xff\xff\xff\xff"[..], &bind(&longest)].concat()).unwrap();
            (&here).write_all(&[&b"T8080:80".repeat(100)[..], b"B1234567"].concat()).unwrap();
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
        assert!(matches!(said[2..4], [Said::Address(None), Said::Unknown]), "{said:?}");
        let is_longest =
            |port: &Publish| port.to_string() == "udp:255.255.255.254%interface-names:65535:65535";
        assert!(matches!(&said[4], Said::Bind(Some(port)) if is_longest(port)), "{said:?}");
        assert!(matches!(&said[5], Said::Unpublish { port: Some(port), reset: true } if is_longest(port)));
        assert!(matches!(said[6..], [Said::Bind(None), Said::Bind(None), Said::End]), "{said:?}");
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
                    Order::Unpublish(number, ..) => (number, "port removed"),
                    Order::EndPublished(_, first) => (first as u64, "more of its connections"),
                    Order::Gone(number) => (number, "gone"),
                });
                // Connections of a removed port end in two steps.
                let next = (seen.last() == Some(&(2, "port removed"))).then_some(4096);
                let _ = done.send(Some(Ended { connections: 3, next }));
            }
            seen
        });
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let socket = || Some(file(published::bind(&mut Publish::new(Protocol::Udp, any, 80)).unwrap()));
        let mut first = ports.of(1);
        assert_eq!(first.publish(socket(), 80).await, TAKEN);
        ports.published.store(limits::PUBLISHED_PORTS_MAX, Ordering::Relaxed);
        let mut second = ports.of(2);
        assert_eq!(second.publish(socket(), 80).await, TOO_MANY);
        second.lead_to(Some(Ipv4Addr::LOCALHOST)).await;
        first.close().await;
        assert_eq!(second.publish(socket(), 80).await, TAKEN);
        let port = *second.published.iter().next().unwrap();
        assert_eq!(unpublished(second.unpublish(Some(port), true).await), Some(6));
        assert_eq!(unpublished(second.unpublish(Some(port), true).await), None, "it is gone");
        assert_eq!(second.publish(socket(), 80).await, TAKEN, "another has its place");
        second.close().await;
        assert_eq!(ports.published.load(Ordering::Relaxed), limits::PUBLISHED_PORTS_MAX - 1);
        drop(ports);
        let expected = [
            (1, "port"),
            (1, "gone"),
            (2, "guest"),
            (2, "port"),
            (2, "port removed"),
            (4096, "more of its connections"),
            (2, "port"),
            (2, "gone"),
        ];
        assert_eq!(
            worker.join().unwrap(),
            expected,
            "an address is told before the first port, or not at all"
        );
    }

    #[test]
    fn a_holder_that_says_no_is_understood() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let socket = published::bind(&mut Publish::new(Protocol::Tcp, any, 80)).unwrap();
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
