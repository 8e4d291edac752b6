//! A worker: the thread that owns the device's rings, an engine and its sockets, and moves frames.
//!
//! One loop, run to completion: wait for events, take what they say, drain the transmit rings within
//! a budget, carry out deadlines, flush what flows owe, publish. No lock, and nothing to wait for but
//! the epoll set.
//!
//! May touch: `device`, `engine`, `uplink`, `control` (its DNS client).

mod link;
pub(crate) mod names;
mod requests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use epoll::Event;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{IpMtu, Protocol, Publish};
use crate::control::dns_forward::DnsClient;
use crate::control::events::Events;
use crate::device::{DeviceEvent, DeviceQueues, Drained, KickKind, KickWatch, RxSide, Taken, TxEvent};
use crate::engine::core::Owner;
use crate::engine::counters::Counters;
use crate::engine::gateway::SharedDhcp;
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::Token;
use crate::engine::{Engine, EngineConfig};
use crate::frame::{QueuePair, TxFrame};
use crate::limits;
use crate::postbox::{HostLetter, Postbox};
use crate::rate_limit::RateLimits;
use crate::requests::{Measures, RequestBox};
use crate::service::dns::DnsService;
use crate::time::{Clock, Instant};
use crate::uplink::sockets::HostSockets;
use crate::uplink::sys::affinity::bind_to;
use crate::uplink::sys::poll::{self, Poll};

use self::link::{Left, LinkEnd};
use self::names::Names;
use self::requests::Requests;

pub use self::link::{LinkParts, SharedStation, TranslationParts};

/// Events taken at once.
const EVENTS: usize = 256;
/// How often a ring without a kick descriptor is looked at, in milliseconds.
const POLLED_RING_MS: i32 = 1;

/// Tokens of the worker's own descriptors: above every kind of the engine's.
const COMMANDS: Token = Token(0x80 << 56);
const KICK: u64 = 0x81 << 56;
const DNS: Token = Token(0x82 << 56);
const STOP: Token = Token(0x83 << 56);
const LETTERS: Token = Token(0x84 << 56);
const ADDRESSES_GONE: Token = Token(0x85 << 56);
const LINK: Token = Token(0x86 << 56);
const REQUESTS: Token = Token(0x87 << 56);
const KIND_MASK: u64 = 0xff << 56;

/// Everything a worker owns. Made on its own thread: its parts share without locks.
pub struct Worker {
    poll: Poll,
    queues: DeviceQueues,
    engine: Engine<HostSockets>,
    /// On a link, the guest's frames go there and not to the engine, but for those to services of ours.
    link: Option<LinkEnd>,
    names: Names,
    clock: Clock,
    postbox: Option<Postbox>,
    requests: Requests,
    measures: Measures,
    limits: RateLimits,
    /// The version of the limits that is known here.
    limits_version: u32,
    addresses_gone: EventFd,
    busy_poll: Duration,
    /// Transmit rings with frames waiting, a bit a pair.
    tx_waiting: u64,
    /// Transmit rings that wait for room in the link, a bit a pair.
    tx_blocked: u64,
    /// Transmit rings that wait for the limit, a bit a pair.
    tx_limited: u64,
    /// The pair whose frames go first.
    tx_first: u32,
    device_events: Vec<DeviceEvent>,
}

/// What a worker is made of.
pub struct WorkerParts {
    /// The device's rings.
    pub queues: DeviceQueues,
    /// The engine's settings.
    pub engine: EngineConfig,
    /// Local DNS answers.
    pub dns: std::sync::Arc<DnsService>,
    /// The worker's end of a link, if the guest is on one.
    pub link: Option<LinkParts>,
    /// The way to upstream resolvers.
    pub dns_client: DnsClient,
    /// Published ports, with their bound sockets.
    pub published: Vec<(Publish, socket2::Socket)>,
    /// Written to end the worker.
    pub stop: EventFd,
    /// Written when addresses of the host went and did not come back.
    pub addresses_gone: EventFd,
    /// Whether `SO_PEEK_OFF` may be used on TCP.
    pub peek_offset: bool,
    /// The process's leases.
    pub dhcp: SharedDhcp,
    /// The way to other workers, if there are others.
    pub postbox: Option<Postbox>,
    /// What the control thread asks.
    pub requests: RequestBox,
    /// Where what happens is told.
    pub events: Events,
    /// Its number among the workers; the first tells what concerns all.
    pub number: usize,
    /// The clock of all workers: flows carry its time from one to another.
    pub clock: Clock,
    /// How much the guest may send and be sent, by all workers together.
    pub limits: RateLimits,
    /// CPU to run on, if not any.
    pub cpu: Option<usize>,
    /// How long to look for more work before sleeping.
    pub busy_poll: Duration,
}

struct Kicks<'a>(&'a Poll);

impl KickWatch for Kicks<'_> {
    fn watch(&mut self, fd: RawFd, ring: u16) -> io::Result<()> {
        self.0.watch_readable(fd, Token(KICK | u64::from(ring)))
    }

    fn unwatch(&mut self, fd: RawFd) {
        self.0.unwatch(fd);
    }
}

/// Has `engine` serve a published port by its bound socket.
///
/// # Errors
/// The socket cannot be watched.
pub(crate) fn publish(
    engine: &mut Engine<HostSockets>,
    owner: Owner,
    port: Publish,
    socket: socket2::Socket,
) -> io::Result<()> {
    match port.protocol {
        Protocol::Tcp => {
            let token = engine.nat().next_listener_token();
            let listener = engine.nat().net().listener(token, socket)?;
            engine.publish_tcp(owner, port, listener);
        }
        Protocol::Udp => {
            let token = engine.nat().next_datagram_token();
            let socket = engine.nat().net().published_udp(token, socket)?;
            engine.publish_udp(owner, port, socket);
        }
    }
    Ok(())
}

impl Worker {
    /// Puts a worker together.
    ///
    /// # Errors
    /// Descriptors that cannot be had or watched.
    pub fn new(parts: WorkerParts) -> io::Result<Worker> {
        let poll = Poll::new()?;
        poll.watch_readable(parts.queues.command_fd(), COMMANDS)?;
        poll.watch_readable(parts.stop.as_raw_fd(), STOP)?;
        poll.watch_readable(parts.requests.fd(), REQUESTS)?;
        poll.watch_readable(parts.addresses_gone.as_raw_fd(), ADDRESSES_GONE)?;
        let names = Names::new(parts.dns_client, &poll, DNS)?;
        let sockets = HostSockets::new(poll.clone(), names.streams(), parts.peek_offset);
        if let Some(cpu) = parts.cpu
            && let Err(error) = bind_to(cpu)
        {
            tracing::warn!(cpu, %error, "--pin: cannot bind a worker to the CPU; it runs on any");
        }
        if let Some(postbox) = &parts.postbox {
            poll.watch_readable(postbox.fd(), LETTERS)?;
        }
        let mut engine = Engine::new(&parts.engine, sockets, parts.dhcp, parts.dns);
        // On a link all that passes the engine is for services of ours.
        if parts.link.is_none() {
            engine.limit_rates(&parts.limits);
        }
        for (port, socket) in parts.published {
            publish(&mut engine, Owner::TheGuest, port, socket)?;
        }
        let mut link = parts.link.map(LinkEnd::new);
        if let Some(link) = &mut link {
            poll.watch_socket(link.queue().fd(), LINK)?;
            link.detach();
        }
        Ok(Worker {
            poll,
            queues: parts.queues,
            engine,
            link,
            names,
            clock: parts.clock,
            postbox: parts.postbox,
            requests: Requests::new(parts.requests, parts.events, parts.number == 0),
            measures: Measures::default(),
            // A change since is found with the first batch.
            limits_version: 0,
            limits: parts.limits,
            addresses_gone: parts.addresses_gone,
            busy_poll: parts.busy_poll,
            tx_waiting: 0,
            tx_blocked: 0,
            tx_limited: 0,
            tx_first: 0,
            device_events: Vec::new(),
        })
    }

    /// Moves frames until `stop` is written; returns what was counted.
    ///
    /// # Errors
    /// The epoll set fails, which it does not.
    pub fn run(mut self) -> io::Result<Counters> {
        let mut events = [Event { events: 0, data: 0 }; EVENTS];
        let mut more = false;
        let mut busy_until = Instant::ZERO;
        let mut was_spinning = false;
        loop {
            let spinning = !self.busy_poll.is_zero() && self.clock.now() < busy_until;
            if spinning != was_spinning {
                // While it looks by itself the guest need not kick; before it sleeps it looks once more.
                let (tx, _) = self.queues.split();
                tx.set_polled(spinning);
                was_spinning = spinning;
                more |= !spinning;
                self.kick_all(self.clock.now());
            }
            let timeout = if more || spinning { 0 } else { self.timeout_ms() };
            let count = self.poll.wait(timeout, &mut events)?;
            let now = self.clock.now();
            if spinning {
                self.kick_all(now);
            }
            let frames_before = self.frames();
            let mut stop = false;
            for event in &events[..count] {
                stop |= self.take(now, event);
            }
            if stop {
                if let Some(link) = &mut self.link {
                    link.leave_link();
                }
                self.engine.guest_reset();
                return Ok(self.counters());
            }
            if self.queues.polled() {
                self.kick_all(now);
            }
            more = self.work(now);
            let frames = self.frames() - frames_before;
            self.measure(now, frames);
            if !self.busy_poll.is_zero() && (count > 0 || frames > 0) {
                busy_until = now + self.busy_poll;
            }
        }
    }

    /// Notes what was done since it woke up at `begun`.
    fn measure(&mut self, begun: Instant, frames: u64) {
        let measures = &mut self.measures;
        measures.wake_ups += 1;
        if frames > 0 {
            measures.batch_frames.record(frames);
            measures.batch_time.record_time(self.clock.now().since(begun));
        }
    }

    /// Frames moved so far, both ways.
    fn frames(&self) -> u64 {
        let of_engine = self.engine.counters();
        let of_link = self.link.as_ref().map_or(0, LinkEnd::frames);
        of_engine.frames_from_guest + of_engine.frames_to_guest + of_link
    }

    fn counters(&self) -> Counters {
        let mut total = self.engine.counters().clone();
        if let Some(link) = &self.link {
            total.add(&link.counters());
        }
        total
    }

    /// Until when to wait: the next deadline, in milliseconds rounded up; -1 without one.
    fn timeout_ms(&self) -> i32 {
        let of_link = self.link.as_ref().and_then(LinkEnd::next_deadline);
        let until_deadline = match [self.engine.next_deadline(), of_link].into_iter().flatten().min() {
            Some(at) => {
                let micros = at.since(self.clock.now()).as_micros();
                i32::try_from(micros.div_ceil(1000)).unwrap_or(i32::MAX)
            }
            None => -1,
        };
        match until_deadline {
            wait if self.queues.polled() && !(0..=POLLED_RING_MS).contains(&wait) => POLLED_RING_MS,
            wait => wait,
        }
    }

    /// Takes one event; true if it asks to stop.
    fn take(&mut self, now: Instant, event: &Event) -> bool {
        let token = Token(event.data);
        match token.0 & KIND_MASK {
            _ if token == STOP => return true,
            _ if token == COMMANDS => self.commands(now),
            _ if token == DNS => self.dns_answers(now),
            _ if token == LETTERS => self.letters(now),
            _ if token == REQUESTS => self.answer_requests(now),
            _ if token == ADDRESSES_GONE => {
                let _ = self.addresses_gone.read();
                let (_, rx) = self.queues.split();
                self.engine.addresses_gone(now, rx);
            }
            _ if token == LINK => self.link_ready(event),
            KICK => {
                self.measures.kicks += 1;
                let kind = self.queues.kicked((token.0 & 0xffff) as u16);
                self.kicked(now, kind);
            }
            _ => {
                let (_, rx) = self.queues.split();
                self.engine.host_ready(now, rx, token, poll::readiness(event));
            }
        }
        false
    }

    fn link_ready(&mut self, event: &Event) {
        let ready = poll::readiness(event);
        if let Some(link) = &mut self.link
            && (ready.readable || ready.failed)
        {
            link.is_readable();
        }
        if ready.writable {
            self.tx_waiting |= std::mem::take(&mut self.tx_blocked);
        }
    }

    fn kicked(&mut self, now: Instant, kind: KickKind) {
        match kind {
            KickKind::Tx(QueuePair(pair)) => self.tx_waiting |= 1 << pair,
            KickKind::Rx(_) => {
                let (_, rx) = self.queues.split();
                self.engine.guest_has_buffers(now, rx);
                if let Some(link) = &mut self.link {
                    link.guest_has_buffers();
                }
                if self.names.are_waiting() {
                    self.dns_answers(now);
                }
            }
            KickKind::Control | KickKind::Idle => {}
        }
    }

    /// Rings without a kick descriptor: look at all of them.
    fn kick_all(&mut self, now: Instant) {
        let pairs = {
            let (tx, _) = self.queues.split();
            tx.pairs_running().fold(0u64, |bits, QueuePair(pair)| bits | 1 << pair)
        };
        self.tx_waiting |= pairs;
        self.kicked(now, KickKind::Rx(QueuePair::default()));
    }

    fn commands(&mut self, now: Instant) {
        let mut events = std::mem::take(&mut self.device_events);
        self.queues.handle_commands(&mut Kicks(&self.poll), &mut events);
        for event in events.drain(..) {
            self.requests.saw(event);
            self.tell_link(now, event);
            match event {
                DeviceEvent::Attached | DeviceEvent::RingsDown => {}
                DeviceEvent::Detached => {
                    self.engine.guest_reset();
                    self.engine.limit_ip_mtu(None);
                }
                DeviceEvent::GuestReset => {
                    tracing::info!("the guest started anew; its connections are reset");
                    self.engine.guest_reset();
                }
                DeviceEvent::IpMtu(bytes) => self.engine.limit_ip_mtu(IpMtu::new(bytes)),
                DeviceEvent::RingsUp => self.kicked(now, KickKind::Rx(QueuePair::default())),
                DeviceEvent::Ready(kind) => self.kicked(now, kind),
            }
        }
        self.device_events = events;
    }

    fn tell_link(&mut self, now: Instant, event: DeviceEvent) {
        let Some(link) = &mut self.link else { return };
        let (_, rx) = self.queues.split();
        match event {
            DeviceEvent::RingsUp => link.rings_up(now, rx.offloads()),
            DeviceEvent::Ready(_) => link.rings_ready(rx.offloads()),
            DeviceEvent::RingsDown => link.rings_down(now),
            DeviceEvent::IpMtu(bytes) => link.limit_ip_mtu(IpMtu::new(bytes)),
            DeviceEvent::Detached => {
                link.limit_ip_mtu(None);
                link.forget_guest(now);
                link.forget_rings();
                (self.tx_blocked, self.tx_limited) = (0, 0);
            }
            DeviceEvent::GuestReset => link.forget_guest(now),
            DeviceEvent::Attached => {}
        }
    }

    fn letters(&mut self, now: Instant) {
        let Some(postbox) = &mut self.postbox else { return };
        let (engine, queues, link) = (&mut self.engine, &mut self.queues, &mut self.link);
        postbox.take_turn(|letter| {
            let (_, rx) = queues.split();
            match (letter, &mut *link) {
                (HostLetter::Engine(post), _) => engine.letter(now, rx, post),
                (HostLetter::Link(letter), Some(link)) => link.letter(now, *letter, engine, rx),
                (HostLetter::Link(_), None) => {}
            }
        });
    }

    /// Sends what the engine has for other workers, and what waited for room.
    fn send_letters(&mut self) {
        let Some(postbox) = &mut self.postbox else { return };
        let mut lost = 0;
        while let Some((to, letter)) = self.link.as_mut().and_then(LinkEnd::next_letter) {
            lost += u64::from(!postbox.send(to, HostLetter::Link(Box::new(letter))));
        }
        while let Some((to, post)) = self.engine.next_letter() {
            lost += u64::from(!postbox.send(to, HostLetter::Engine(post)));
        }
        postbox.deliver();
        if lost > 0 {
            self.engine.letters_lost(lost);
        }
    }

    fn dns_answers(&mut self, now: Instant) {
        let (_, rx) = self.queues.split();
        self.names.answer(now, &mut self.engine, rx);
    }

    /// Takes up what the limits were set to.
    fn look_at_limits(&mut self, now: Instant) {
        let version = self.limits.version();
        if version != self.limits_version {
            self.limits_version = version;
            self.engine.limits_changed(now);
            if let Some(link) = &mut self.link {
                link.limits_changed(now);
            }
        }
    }

    /// One batch. Returns whether there is more to do at once.
    fn work(&mut self, now: Instant) -> bool {
        self.look_at_limits(now);
        if let Some(link) = &mut self.link
            && link.translates()
        {
            link.notice_guest(now, self.engine.guest_starts(now));
        }
        if self.tx_limited != 0 && self.link.as_mut().is_some_and(|link| link.leaves_are_due(now)) {
            self.tx_waiting |= std::mem::take(&mut self.tx_limited);
        }
        // Those that wait for the limit wait together still.
        self.tx_waiting &= !self.tx_limited;
        self.drain_waiting(now);
        let (_, rx) = self.queues.split();
        self.engine.run_timers(now, rx);
        let more = self.engine.flush(rx);
        self.names.ask(now, &mut self.engine, rx);
        let link_more = self.link_to_guest(now);
        // Last: frames of the link may be other workers'.
        self.send_letters();
        self.queues.publish();
        self.tell_flows();
        more || link_more || self.tx_waiting != 0
    }

    /// Takes a batch of frames from each ring that has some.
    fn drain_waiting(&mut self, now: Instant) {
        let first = self.tx_first;
        let mut waiting = std::mem::take(&mut self.tx_waiting).rotate_right(first);
        while waiting != 0 {
            let pair = ((waiting.trailing_zeros() + first) % u64::BITS) as u8;
            waiting &= waiting - 1;
            match self.drain(now, QueuePair(pair)) {
                (Drained::More, _) => self.tx_waiting |= 1 << pair,
                (Drained::Blocked, Left::Limited) => {
                    self.tx_limited |= 1 << pair;
                    // The next one's turn.
                    self.tx_first = u32::from(pair) + 1;
                }
                (Drained::Blocked, _) => self.block(pair),
                (Drained::Empty | Drained::Down, _) => {}
            }
        }
    }

    /// Has a pair wait for room in the link. The kernel tells of room only who looked while there was none.
    fn block(&mut self, pair: u8) {
        self.tx_blocked |= 1 << pair;
        let Some(link) = &self.link else { return };
        if link.awaits_claim() {
            return;
        }
        if let Err(error) = self.poll.rewatch_socket(link.queue().fd(), LINK) {
            tracing::warn!(%error, "the link cannot be waited for; its frames are tried again with the next event");
        }
    }

    /// Takes a batch of a pair's frames to where they belong. With what became of the last.
    fn drain(&mut self, now: Instant, pair: QueuePair) -> (Drained, Left) {
        let mut last = Left::Yes;
        let (engine, link) = (&mut self.engine, &mut self.link);
        let (tx, rx) = self.queues.split();
        tx.set_ahead(link.as_ref().map_or(1, LinkEnd::frames_ahead));
        let drained = tx.drain(pair, limits::TX_BATCH_FRAMES, |event| {
            match (event, &mut *link) {
                (TxEvent::Coming(heads), Some(link)) => link.expect_from_guest(heads.iter()),
                (TxEvent::Coming(_), None) => {}
                (TxEvent::Frame(frame), link) => {
                    let take = if rx.recorder().is_some() { take_recorded } else { take_frame };
                    last = take(now, engine, link.as_mut(), rx, &frame);
                    if last != Left::Yes {
                        return Taken::NotNow;
                    }
                }
                (TxEvent::Unfit(whole, why), _) => {
                    if let Some(recorder) = rx.recorder() {
                        recorder.unfit(pair, &whole, why);
                    }
                }
                (TxEvent::BatchEnd, _) => engine.end_of_frames(rx),
            }
            Taken::Yes
        });
        (drained, last)
    }

    /// Takes a batch of the link's frames to the guest. Returns whether more may wait.
    fn link_to_guest(&mut self, now: Instant) -> bool {
        let Some(link) = &mut self.link else { return false };
        let (_, rx) = self.queues.split();
        link.run_translation(now, &mut self.engine, rx);
        if link.is_claim_due(now) {
            self.tx_waiting |= std::mem::take(&mut self.tx_blocked);
        }
        match rx.first_running() {
            Some(pair) => link.deliver(now, rx, pair),
            None => link.serve_station(now),
        }
    }
}

/// Takes one frame of the guest to where it belongs.
fn take_frame(
    now: Instant,
    engine: &mut Engine<HostSockets>,
    link: Option<&mut LinkEnd>,
    rx: &mut RxSide,
    frame: &TxFrame<'_>,
) -> Left {
    let Some(link) = link else {
        engine.from_guest(now, rx, frame);
        return Left::Yes;
    };
    let left = if link.is_for_us(now, frame) {
        engine.from_guest(now, rx, frame);
        Left::Yes
    } else if !link.may_leave(now, frame) {
        Left::Limited
    } else if link.translates() {
        link.forward_translated(now, frame, engine, rx)
    } else {
        link.forward(now, frame)
    };
    if left == Left::Full {
        link.did_not_leave(frame);
    }
    left
}

/// The same while there is a capture: the frame stands in it before its answers, with what became of it.
fn take_recorded(
    now: Instant,
    engine: &mut Engine<HostSockets>,
    mut link: Option<&mut LinkEnd>,
    rx: &mut RxSide,
    frame: &TxFrame<'_>,
) -> Left {
    if let Some(recorder) = rx.recorder() {
        recorder.from_guest(frame);
    }
    let take_dropped = |engine: &mut Engine<HostSockets>, link: Option<&mut LinkEnd>| {
        engine.take_dropped().or(link.and_then(LinkEnd::take_dropped))
    };
    // Of others before.
    let _ = take_dropped(engine, link.as_deref_mut());
    let left = take_frame(now, engine, link.as_deref_mut(), rx, frame);
    let why = take_dropped(engine, link);
    if let Some(recorder) = rx.recorder() {
        match left {
            Left::Yes => recorder.judged(why),
            Left::Full | Left::Limited => recorder.not_taken(),
        }
    }
    left
}
