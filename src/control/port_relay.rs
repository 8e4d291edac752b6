//! Published ports of a guest on a named network, as the host itself reaches them.
//!
//! The kernel redirects what comes in by an interface (`uplink::firewall`). What the host sends to itself, to
//! 127.0.0.1 above all, passes no rule that could; it arrives at the socket that holds the port, and is
//! relayed from there: bytes of TCP with their ends, datagrams with their sender remembered for a while. The
//! guest sees the gateway as the client. The socket also keeps the port from others.
//!
//! Until the guest has an address, a connection is reset and a datagram dropped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::AbortHandle;

use crate::config::{Protocol, Publish};
use crate::limits::{DATAGRAM_BYTES_MAX, RELAYED_MAX};

/// The guest's address as it comes and goes.
pub type GuestAddress = watch::Receiver<Option<Ipv4Addr>>;

/// How long a sender of datagrams is remembered after the last (RFC 4787, REQ-5, is for the world's).
const DATAGRAM_IDLE: Duration = Duration::from_secs(120);
/// Pause after a connection could not be taken for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Datagrams of one sender that wait for their way to the guest.
const DATAGRAMS_WAITING: usize = 32;

/// The relay of a published port. Dropped, it takes nobody any more; connections it has go on, exchanges of
/// datagrams end.
#[derive(Debug)]
pub struct Relay {
    task: AbortHandle,
    /// Told of once they are to end; its receivers are the connections.
    end: watch::Sender<bool>,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relay {
    /// Relays what comes to `socket`, bound as `port` says, to the guest.
    ///
    /// # Errors
    /// The socket cannot be watched.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(socket: socket2::Socket, guest: GuestAddress, port: &Publish) -> io::Result<Relay> {
        let end = watch::Sender::new(false);
        let task = match port.protocol {
            Protocol::Tcp => relay_tcp(socket, guest, port.guest_port, end.clone()),
            Protocol::Udp => relay_udp(socket, guest, port.guest_port),
        }?;
        Ok(Relay { task, end })
    }

    /// Resets the connections it has, both ways; how many.
    pub fn reset(&self) -> usize {
        let open = self.end.receiver_count();
        self.end.send_replace(true);
        open
    }
}

/// Relays connections that come to `socket`, which listens, to `port` of the guest.
fn relay_tcp(
    socket: socket2::Socket,
    guest: GuestAddress,
    port: u16,
    end: watch::Sender<bool>,
) -> io::Result<AbortHandle> {
    let listener = TcpListener::from_std(socket.into())?;
    let task = tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(RELAYED_MAX));
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let Ok((client, _)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (target, end) = (*guest.borrow(), end.subscribe());
            tokio::spawn(async move {
                if let Err(error) = relay_connection(client, target, port, end).await {
                    tracing::debug!(port, %error, "a relayed connection ended");
                }
                drop(place);
            });
        }
    });
    Ok(task.abort_handle())
}

async fn relay_connection(
    mut client: TcpStream,
    target: Option<Ipv4Addr>,
    port: u16,
    mut end: watch::Receiver<bool>,
) -> io::Result<()> {
    let Some(target) = target else { return reset(client) };
    let connected = tokio::select! {
        connected = TcpStream::connect((target, port)) => connected,
        () = ended(&mut end) => return reset(client),
    };
    let mut guest = match connected {
        Ok(guest) => guest,
        // Nobody serves it there: the client is told as the guest would tell it.
        Err(_) => return reset(client),
    };
    for stream in [&client, &guest] {
        stream.set_nodelay(true)?;
    }
    let outcome = tokio::select! {
        outcome = tokio::io::copy_bidirectional(&mut client, &mut guest) => outcome.ok(),
        () = ended(&mut end) => None,
    };
    match outcome {
        Some(_) => Ok(()),
        // One end was reset, so the other is; or both are to be.
        None => reset(client).and(reset(guest)),
    }
}

/// Waits until connections are to end: never, if the port is gone without that.
async fn ended(end: &mut watch::Receiver<bool>) {
    if end.wait_for(|end| *end).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn reset(stream: TcpStream) -> io::Result<()> {
    let stream = socket2::Socket::from(stream.into_std()?);
    stream.set_linger(Some(Duration::ZERO))
}

/// Relays datagrams that come to `socket`, bound, to `port` of the guest, and the answers back.
fn relay_udp(socket: socket2::Socket, guest: GuestAddress, port: u16) -> io::Result<AbortHandle> {
    let socket = Arc::new(UdpSocket::from_std(socket.into())?);
    let task = tokio::spawn(async move {
        let mut senders: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
        loop {
            let (datagram, from) = match receive(&socket).await {
                Ok(received) => received,
                // An ICMP error about an answer is no reason to end.
                Err(_) => continue,
            };
            let Some(target) = *guest.borrow() else { continue };
            senders.retain(|_, sender| !sender.is_closed());
            if let Some(sender) = senders.get(&from) {
                // One that is full loses it, as a socket would.
                let _ = sender.try_send(datagram);
            } else if senders.len() < RELAYED_MAX {
                let (sender, receiver) = mpsc::channel(DATAGRAMS_WAITING);
                let _ = sender.try_send(datagram);
                senders.insert(from, sender);
                tokio::spawn(relay_datagrams(Arc::clone(&socket), from, (target, port).into(), receiver));
            }
        }
    });
    Ok(task.abort_handle())
}

thread_local! {
    /// Where datagrams are read: one buffer for all ports of the control thread.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; DATAGRAM_BYTES_MAX]);
}

/// The next datagram and its sender.
async fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    loop {
        socket.readable().await?;
        let read = BUFFER.with_borrow_mut(|buffer| {
            let (len, from) = socket.try_recv_from(buffer)?;
            Ok((buffer[..len].to_vec(), from))
        });
        match read {
            Err(error) if io::Error::kind(&error) == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
    }
}

/// Carries one sender's datagrams to the guest and its answers back, until both fall silent.
async fn relay_datagrams(
    outside: Arc<UdpSocket>,
    sender: SocketAddr,
    guest: SocketAddr,
    mut datagrams: mpsc::Receiver<Vec<u8>>,
) {
    let Ok(inside) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await else { return };
    if inside.connect(guest).await.is_err() {
        return;
    }
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        tokio::select! {
            datagram = datagrams.recv() => {
                let Some(datagram) = datagram else { return };
                // Refused ones are lost, as the guest lost them.
                let _ = inside.send(&datagram).await;
            }
            answer = inside.recv(&mut buffer) => match answer {
                Ok(len) => {
                    let _ = outside.send_to(&buffer[..len], sender).await;
                }
                // The guest's port is closed, says ICMP: nobody is there to relay to.
                Err(_) => return,
            },
            () = tokio::time::sleep(DATAGRAM_IDLE) => return,
        }
    }
}
