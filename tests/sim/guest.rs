//! The guest: smoltcp's stack, with an application that sends, receives and checks on every socket.

use std::cell::Cell;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::bytes::Stream;
use crate::plan::{Ending, FlowPlan, GUEST, Plan, Shape};

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);

/// Frames the guest sends at once.
pub(crate) const RING_FRAMES: usize = 256;

thread_local! {
    /// Virtual time for the stack's timestamps, which it asks for without a context.
    static NOW_MS: Cell<u32> = const { Cell::new(0) };
}

/// The link: frames in and out.
pub(crate) struct Link {
    pub(crate) inbound: VecDeque<Vec<u8>>,
    pub(crate) outbound: VecDeque<Vec<u8>>,
    mtu: usize,
    /// TCP checksums are left to the device.
    partial: bool,
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
        // A ring has its end; and smoltcp 0.14 can get into a state in which it sends without one.
        (self.outbound.len() < RING_FRAMES).then_some(Tx(&mut self.outbound))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + 14;
        if self.partial {
            capabilities.checksum.tcp = Checksum::Rx;
        }
        capabilities
    }
}

/// One connection of the guest's application.
pub(crate) struct App {
    handle: SocketHandle,
    plan: FlowPlan,
    sent: usize,
    pub(crate) received: usize,
    closed: bool,
    pub(crate) was_reset: bool,
    pub(crate) opened: bool,
}

pub(crate) struct Guest {
    /// Until when the applications read nothing, in microseconds.
    pub(crate) reads_nothing_until: u64,
    pub(crate) link: Link,
    interface: Interface,
    sockets: SocketSet<'static>,
    pub(crate) apps: Vec<App>,
}

impl Guest {
    /// A guest that connects to each of `peers`, sends `bytes` there and expects as many.
    pub(crate) fn new(seed: u64, peers: &[SocketAddrV4], bytes: usize) -> Guest {
        let mut plan = Plan::clean(seed, peers.len(), bytes);
        for (flow, peer) in plan.flows.iter_mut().zip(peers) {
            flow.remote = *peer;
        }
        Guest::planned(&plan, MAC, seed)
    }

    /// The guest of `plan`; one with another `seed` chooses other sequence numbers.
    pub(crate) fn planned(plan: &Plan, mac: [u8; 6], seed: u64) -> Guest {
        let mut link = Link {
            inbound: VecDeque::new(),
            outbound: VecDeque::new(),
            mtu: usize::from(plan.guest_mtu),
            partial: plan.partial,
        };
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addrs| {
            addrs.push(IpCidr::new(IpAddress::Ipv4(GUEST), 24)).expect("room for one address");
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY).expect("room for one route");
        let mut sockets = SocketSet::new(Vec::new());
        let apps = plan
            .flows
            .iter()
            .map(|flow| {
                let socket = socket(&mut interface, plan, flow);
                App {
                    handle: sockets.add(socket),
                    plan: flow.clone(),
                    sent: 0,
                    received: 0,
                    closed: false,
                    was_reset: false,
                    opened: false,
                }
            })
            .collect();
        Guest { reads_nothing_until: 0, link, interface, sockets, apps }
    }

    /// From now on the guest has another MAC address.
    pub(crate) fn set_mac(&mut self, mac: [u8; 6]) {
        self.interface.set_hardware_addr(EthernetAddress(mac).into());
    }

    /// Lets the stack and the applications work at `micros`.
    pub(crate) fn step(&mut self, micros: u64) {
        NOW_MS.set((micros / 1000) as u32);
        let now = Instant::from_micros(micros as i64);
        self.interface.poll(now, &mut self.link, &mut self.sockets);
        for app in &mut self.apps {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(app.handle);
            app.step(socket, micros >= self.reads_nothing_until);
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
            let is_over = matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait);
            // A client that resets may be gone before the handshake's end: then nobody came.
            let nobody_came = socket.state() == tcp::State::Listen && app.plan.ending != Ending::Full;
            (is_over && !socket.can_recv()) || nobody_came
        })
    }

    /// Whether an application has more to read now than it took in its last turn.
    pub(crate) fn has_unread(&self) -> bool {
        self.apps.iter().any(|app| self.sockets.get::<tcp::Socket<'_>>(app.handle).can_recv())
    }

    /// Bytes that all applications received.
    pub(crate) fn received(&self) -> usize {
        self.apps.iter().map(|app| app.received).sum()
    }

    /// For a failure's report.
    pub(crate) fn state(&self) -> String {
        let state = |app: &App| {
            let socket = self.sockets.get::<tcp::Socket<'_>>(app.handle);
            format!("{}: {} sent {} received {}", app.plan.remote, socket.state(), app.sent, app.received)
        };
        self.apps.iter().map(state).collect::<Vec<_>>().join(", ")
    }
}

fn socket(interface: &mut Interface, plan: &Plan, flow: &FlowPlan) -> tcp::Socket<'static> {
    let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
    let mut socket = tcp::Socket::new(buffer(flow.guest_rx), buffer(flow.guest_tx));
    socket.set_nagle_enabled(flow.nagle);
    if plan.timestamps {
        socket.set_tsval_generator(Some(|| NOW_MS.get()));
    }
    // A reset may be lost; without anything to send only this finds out.
    socket.set_keep_alive(Some(Duration::from_secs(75)));
    if flow.published {
        socket.listen(flow.guest_port).expect("a fresh socket listens");
    } else {
        let remote = (IpAddress::Ipv4(*flow.remote.ip()), flow.remote.port());
        socket.connect(interface.context(), remote, flow.guest_port).expect("a fresh socket connects");
    }
    socket
}

impl App {
    pub(crate) fn peer(&self) -> SocketAddr {
        self.plan.peer()
    }

    /// How much of its stream the application would have sent by now.
    fn may_send(&self, world_is_done: bool) -> usize {
        match self.plan.shape {
            Shape::Both | Shape::GuestFirst => self.plan.bytes,
            Shape::WorldFirst if world_is_done => self.plan.bytes,
            Shape::WorldFirst => 0,
            Shape::Dialogue(chunk) => ((self.received / chunk + 1) * chunk).min(self.plan.bytes),
        }
    }

    fn step(&mut self, socket: &mut tcp::Socket<'_>, reads: bool) {
        if socket.state() == tcp::State::Established {
            self.opened = true;
        }
        let (bytes, peer) = (self.plan.bytes, self.plan.peer());
        let mut left = match socket.state() {
            // smoltcp throws away what is unread when TIME-WAIT ends.
            tcp::State::TimeWait => usize::MAX,
            _ if reads => self.plan.guest_reads,
            _ => 0,
        };
        while left > 0 && socket.can_recv() {
            let received = self.received;
            let len = socket
                .recv(|data| {
                    let data = &data[..data.len().min(left)];
                    let wrong = Stream::new(peer, false).first_difference(received, data);
                    assert_eq!(wrong, None, "a byte the guest got of {peer} is wrong");
                    (data.len(), data.len())
                })
                .expect("can receive");
            self.received += len;
            left -= len;
        }
        if let Ending::GuestAborts(after) = self.plan.ending
            && self.opened
            && self.received >= after
        {
            return socket.abort();
        }
        let world_is_done = self.opened && !socket.may_recv();
        while self.sent < self.may_send(world_is_done) && socket.can_send() {
            let (sent, limit) = (self.sent, self.may_send(world_is_done));
            let len = socket
                .send(|buffer| {
                    let len = buffer.len().min(limit - sent);
                    Stream::new(peer, true).fill(sent, &mut buffer[..len]);
                    (len, len)
                })
                .expect("can send");
            self.sent += len;
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
