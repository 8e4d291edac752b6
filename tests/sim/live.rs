//! The same guest over the kernel's own sockets and a world of threads, in real time: what a scripted
//! world cannot show, such as a readiness event that never comes.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use epoll::Event;
use vunet::config::{Mode, NatConfig};
use vunet::engine::Engine;
use vunet::frame::{Payload, QueuePair, TxFrame};
use vunet::limits;
use vunet::service::dhcp::DhcpServer;
use vunet::service::dns::DnsService;
use vunet::time::Clock;
use vunet::uplink::sockets::HostSockets;
use vunet::uplink::sys::poll::{self, Poll};
use vunet::wire::vnet::VnetHeader;

use crate::bytes::pattern;
use crate::guest::Guest;
use crate::port::{SimPort, plain_frames};
use crate::random::Rng;
use crate::run::engine_config;

/// What a run is to be like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Live {
    pub(crate) seed: u64,
    pub(crate) peek_offset: bool,
    pub(crate) offload: bool,
    pub(crate) flows: usize,
    /// Each way, a flow.
    pub(crate) bytes: usize,
    pub(crate) buffers: usize,
    /// Frames lost, as a probability.
    pub(crate) lose: f64,
    /// The world reads and writes in small pieces with pauses.
    pub(crate) slow_world: bool,
}

/// A world's end: sends its stream, ends it, and checks what comes until that ends.
fn serve(listener: TcpListener, peer: SocketAddr, live: Live) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let mut sending = stream.try_clone().expect("a second handle");
        let piece = if live.slow_world { 9_000 } else { 200_000 };
        let pause = move || {
            if live.slow_world {
                std::thread::sleep(Duration::from_micros(300));
            }
        };
        let sender = std::thread::spawn(move || {
            let bytes: Vec<u8> = (0..live.bytes).map(|at| pattern(peer, false, at)).collect();
            for part in bytes.chunks(piece) {
                sending.write_all(part).expect("the guest takes all");
                pause();
            }
            sending.shutdown(Shutdown::Write).expect("an end");
        });
        let mut received = 0;
        let mut buffer = vec![0; piece];
        loop {
            let len = stream.read(&mut buffer).expect("no reset");
            if len == 0 {
                break;
            }
            for byte in &buffer[..len] {
                assert_eq!(*byte, pattern(peer, true, received), "byte {received} of {peer}");
                received += 1;
            }
            pause();
        }
        assert_eq!(received, live.bytes);
        sender.join().expect("all was sent");
    })
}

/// Lets every flow run to its end; false where the kernel lacks what was asked for.
pub(crate) fn run(live: Live) -> bool {
    let mut peers = Vec::new();
    let mut ends = Vec::new();
    for _ in 0..live.flows {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        let peer = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 1), port);
        ends.push(serve(listener, peer.into(), live));
        peers.push(peer);
    }
    let Some(mut run) = Run::new(live, &peers) else { return false };
    while !(run.guest.is_done() && ends.iter().all(JoinHandle::is_finished)) {
        run.turn();
        assert!(run.clock.now().as_micros() < 120_000_000, "stalled: {live:?} {:?}", run.received());
    }
    for end in ends {
        end.join().expect("every byte, and a clean end");
    }
    assert!(run.received().iter().all(|(received, reset)| *received == live.bytes && !reset));
    true
}

/// Lets a world that reads nothing and a guest that reads nothing stall each other's flows; returns
/// how many times the worker was woken in a second of that. `None` where the kernel lacks what was
/// asked for.
pub(crate) fn wakeups_while_stalled(live: Live) -> Option<usize> {
    let mut peers = Vec::new();
    let mut ends = Vec::new();
    let mut listeners = Vec::new();
    for _ in 0..live.flows {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        peers.push(SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 1), port));
        listener.set_nonblocking(true).expect("nonblocking");
        listeners.push(listener);
    }
    let mut run = Run::new(live, &peers)?;
    run.guest.reads_nothing_until = u64::MAX;
    let chunk = vec![0; 64 << 10];
    while run.clock.now().as_micros() < 2_000_000 {
        run.turn();
        for listener in &listeners {
            if let Ok((end, _)) = listener.accept() {
                end.set_nonblocking(true).expect("nonblocking");
                ends.push(end);
            }
        }
        for end in &mut ends {
            while end.write(&chunk).is_ok_and(|len| len > 0) {}
        }
    }
    assert_eq!(ends.len(), live.flows);
    let before = run.wakeups;
    while run.clock.now().as_micros() < 3_000_000 {
        run.turn();
    }
    Some(run.wakeups - before)
}

struct Run {
    engine: Engine<HostSockets>,
    poll: Poll,
    port: SimPort,
    guest: Guest,
    rng: Rng,
    clock: Clock,
    lose: f64,
    /// Events and deadlines so far.
    wakeups: usize,
}

impl Run {
    fn new(live: Live, peers: &[SocketAddrV4]) -> Option<Run> {
        let poll = Poll::new().expect("an epoll set");
        let no_dns = Box::new(|| Err(std::io::ErrorKind::Unsupported.into()));
        let net = HostSockets::new(poll.clone(), no_dns, live.peek_offset);
        if live.peek_offset != net.uses_peek_offset() {
            return None;
        }
        let nat = NatConfig { allow_host_loopback: true, ..NatConfig::default() };
        let config = engine_config(live.seed, Mode::Nat(nat));
        let dhcp = Arc::new(Mutex::new(DhcpServer::new(&config.lan, &config.dns)));
        let dns = Arc::new(DnsService::new(&config.dns, &config.lan, true));
        Some(Run {
            engine: Engine::new(&config, net, dhcp, dns),
            poll,
            port: SimPort::new(live.offload, live.buffers),
            guest: Guest::new(live.seed, peers, live.bytes),
            rng: Rng::new(live.seed),
            clock: Clock::start(),
            lose: live.lose,
            wakeups: 0,
        })
    }

    fn received(&self) -> Vec<(usize, bool)> {
        self.guest.apps.iter().map(|app| (app.received, app.was_reset)).collect()
    }

    /// What a worker does in a turn, the guest's driver included.
    fn turn(&mut self) {
        let now = self.clock.now();
        self.guest.step(now.as_micros());
        let mut busy = false;
        for frame in std::mem::take(&mut self.guest.link.outbound) {
            let is_arp = frame[12..14] == [8, 6];
            if !is_arp && self.rng.chance(self.lose) {
                continue;
            }
            busy = true;
            let head = &frame[..frame.len().min(limits::FRAME_HEAD_BYTES)];
            let whole = Payload::from_host(&frame);
            let frame = TxFrame { vnet: VnetHeader::default(), head, whole, pair: QueuePair::default() };
            self.engine.from_guest(now, &mut self.port, &frame);
        }
        self.engine.end_of_frames(&mut self.port);
        let mut events = [Event { events: 0, data: 0 }; 64];
        let wait_ms =
            i32::from(!busy && self.port.delivered.is_empty() && self.guest.link.inbound.is_empty());
        let count = self.poll.wait(wait_ms, &mut events).expect("events");
        self.wakeups += count + usize::from(self.engine.next_deadline().is_some_and(|at| at <= now));
        for event in &events[..count] {
            let token = vunet::engine::host_net::Token(event.data);
            self.engine.host_ready(now, &mut self.port, token, poll::readiness(event));
        }
        self.engine.run_timers(now, &mut self.port);
        self.engine.flush(&mut self.port);
        let delivered = std::mem::take(&mut self.port.delivered);
        self.port.free += delivered.len();
        for frame in delivered.into_iter().flat_map(plain_frames) {
            if !self.rng.chance(self.lose) {
                self.guest.link.inbound.push_back(frame);
            }
        }
        if std::mem::take(&mut self.port.starved) {
            self.engine.guest_has_buffers(now, &mut self.port);
        }
    }
}
