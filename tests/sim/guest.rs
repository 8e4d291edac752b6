//! The guest: smoltcp's stack, with an application that sends, receives and checks on every socket.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::scenario::pattern;

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);

/// The link: frames in and out.
#[derive(Default)]
pub(crate) struct Link {
    pub(crate) inbound: VecDeque<Vec<u8>>,
    pub(crate) outbound: VecDeque<Vec<u8>>,
}

pub(crate) struct Rx(Vec<u8>);
pub(crate) struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        self.inbound.pop_front().map(|frame| (Rx(frame), Tx(&mut self.outbound)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// One connection of the guest's application.
pub(crate) struct App {
    handle: SocketHandle,
    pub(crate) peer: SocketAddr,
    sent: usize,
    pub(crate) received: usize,
    closed: bool,
    pub(crate) was_reset: bool,
    opened: bool,
}

pub(crate) struct Guest {
    /// Until when the applications read nothing, in microseconds.
    pub(crate) reads_nothing_until: u64,
    pub(crate) link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    pub(crate) apps: Vec<App>,
    bytes: usize,
}

impl Guest {
    /// A guest that connects to each of `peers`, sends `bytes` there and expects as many.
    pub(crate) fn new(seed: u64, peers: &[SocketAddrV4], bytes: usize) -> Guest {
        let mut link = Link::default();
        let mut config = Config::new(EthernetAddress(MAC).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addrs| {
            addrs.push(IpCidr::new(IpAddress::Ipv4(ADDRESS), 24)).expect("room for one address");
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY).expect("room for one route");
        let mut sockets = SocketSet::new(Vec::new());
        let apps = peers
            .iter()
            .enumerate()
            .map(|(n, peer)| {
                let buffer = || tcp::SocketBuffer::new(vec![0; 40_000]);
                let mut socket = tcp::Socket::new(buffer(), buffer());
                let remote = (IpAddress::Ipv4(*peer.ip()), peer.port());
                socket
                    .connect(interface.context(), remote, 40_000 + n as u16)
                    .expect("a fresh socket connects");
                App {
                    handle: sockets.add(socket),
                    peer: SocketAddr::V4(*peer),
                    sent: 0,
                    received: 0,
                    closed: false,
                    was_reset: false,
                    opened: false,
                }
            })
            .collect();
        Guest { reads_nothing_until: 0, link, interface, sockets, apps, bytes }
    }

    /// Lets the stack and the applications work at `micros`.
    pub(crate) fn step(&mut self, micros: u64) {
        let now = Instant::from_micros(micros as i64);
        self.interface.poll(now, &mut self.link, &mut self.sockets);
        for app in &mut self.apps {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(app.handle);
            app.step(socket, self.bytes, micros >= self.reads_nothing_until);
        }
        self.interface.poll(now, &mut self.link, &mut self.sockets);
    }

    /// When the stack wants to be called next, in microseconds.
    pub(crate) fn next_deadline(&mut self, micros: u64) -> Option<u64> {
        let now = Instant::from_micros(micros as i64);
        self.interface.poll_at(now, &self.sockets).map(|at| at.total_micros().max(0) as u64)
    }

    /// Whether every connection is over on the guest's side.
    pub(crate) fn is_done(&self) -> bool {
        self.apps.iter().all(|app| {
            let socket = self.sockets.get::<tcp::Socket<'_>>(app.handle);
            matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait) && !socket.can_recv()
        })
    }
}

impl App {
    fn step(&mut self, socket: &mut tcp::Socket<'_>, bytes: usize, reads: bool) {
        if socket.state() == tcp::State::Established {
            self.opened = true;
        }
        while self.sent < bytes && socket.can_send() {
            let (peer, sent) = (self.peer, self.sent);
            let len = socket
                .send(|buffer| {
                    let len = buffer.len().min(bytes - sent);
                    for (n, byte) in buffer[..len].iter_mut().enumerate() {
                        *byte = pattern(peer, true, sent + n);
                    }
                    (len, len)
                })
                .expect("can send");
            self.sent += len;
        }
        // smoltcp throws away what is unread when TIME-WAIT ends.
        let reads = reads || socket.state() == tcp::State::TimeWait;
        while reads && socket.can_recv() {
            let (peer, received) = (self.peer, self.received);
            let len = socket
                .recv(|data| {
                    for (n, byte) in data.iter().enumerate() {
                        assert_eq!(*byte, pattern(peer, false, received + n), "byte {}", received + n);
                    }
                    (data.len(), data.len())
                })
                .expect("can receive");
            self.received += len;
        }
        if self.sent == bytes && !self.closed && socket.may_send() {
            socket.close();
            self.closed = true;
        }
        if socket.state() == tcp::State::Closed
            && !socket.can_recv()
            && (self.received < bytes || !self.closed)
        {
            self.was_reset = true;
        }
    }
}
