//! The namespace guest: a vhost-user front-end whose driver side is a TAP in a network namespace.
//!
//! [`run`] is one guest's life: negotiate with the back-end ([`session`]), open the TAP with the
//! offloads that were negotiated, lay out memory ([`buffers`](self)) and rings, run one worker a
//! queue pair, and watch the connection and the signals until it is told to end. If the back-end
//! leaves and `reconnect` is set, the rings stay as they are and are offered to the next back-end
//! with `used->idx` as their base, as QEMU does.

mod buffers;
mod check;
mod counters;
pub mod features;
mod garbage;
mod handshake;
pub mod misbehave;
mod pair;
mod ring;
pub mod session;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use counters::Counters;
use counters::PairCounters;
use features::Features;
use handshake::{Agreement, RingPlace};
use misbehave::{Misbehaviour, Plan};
use pair::{Control, Doorbells, NOTICE_PAUSE, Pair, PairParts};
use ring::{DriverRing, RingAddrs, RingOptions};
use session::{ProtocolFeatures, Session, SessionError};

use crate::sys::mem::GuestMemory;
use crate::sys::netns;
use crate::sys::signal::{Signal, Signals};
use crate::sys::tap::{Offload, Tap};
use buffers::{Arena, Slot, rx_pieces, tx_pieces};

/// Guest-physical addresses of the two regions: transmit below 4 GiB, receive above.
const TX_REGION_ADDR: u64 = 0x4000_0000;
const RX_REGION_ADDR: u64 = 0x1_2000_0000_0000;
/// Regions are sized in multiples of this many bytes.
const REGION_ALIGN_BYTES: u64 = 2 << 20;
/// Worst-case padding of one ring's parts in bytes.
const RING_PADDING_BYTES: u64 = 4 * 4096;
/// Queue pairs at most, so that descriptors and threads stay few.
const PAIRS_MAX: usize = 16;

/// In which order the messages of a handshake come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// Features first, rings enabled last.
    #[default]
    Spec,
    /// As QEMU 7.2: rings are enabled before any SET_FEATURES and never again; feature and memory
    /// messages repeat for each queue pair.
    Qemu,
}

/// What a guest is to be.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Listen on the socket and let the back-end connect.
    pub server: bool,
    /// Network namespace the TAP is made in; `None` for the caller's.
    pub netns: Option<String>,
    /// Name of the TAP interface.
    pub tap: String,
    /// MAC address; without one the device's, else a random one.
    pub mac: Option<[u8; 6]>,
    /// IP MTU of the interface in bytes; without one the device's, else 1500.
    pub ip_mtu: Option<u16>,
    /// Features to accept where offered.
    pub features: Features,
    /// Protocol features to accept where offered.
    pub protocol: ProtocolFeatures,
    /// Entries of each ring, a power of two.
    pub ring_size: u16,
    /// Length of a receive buffer in bytes.
    pub rx_buffer_bytes: u32,
    /// Lengths of the descriptors a frame from the guest is cut into; the last one repeats.
    pub tx_cuts: Vec<u32>,
    /// Queue pairs.
    pub queues: usize,
    /// Order of the handshake's messages.
    pub order: Order,
    /// Ways to go wrong.
    pub misbehave: Vec<Misbehaviour>,
    /// Wait for another back-end when one leaves.
    pub reconnect: bool,
    /// How long to wait for a back-end.
    pub patience: Duration,
}

/// Why a guest ended.
#[derive(Debug, Error)]
pub enum GuestError {
    /// A setting that cannot be.
    #[error("{0}")]
    Config(String),
    /// Talking to the back-end failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A kernel call failed.
    #[error("{0}: {1}")]
    Kernel(&'static str, io::Error),
    /// The back-end left and no other was to be waited for.
    #[error("the back-end left")]
    BackendLeft,
}

fn kernel(what: &'static str) -> impl Fn(io::Error) -> GuestError {
    move |source| GuestError::Kernel(what, source)
}

impl GuestConfig {
    fn validate(&self) -> Result<(), GuestError> {
        let fail = |text: String| Err(GuestError::Config(text));
        if !self.ring_size.is_power_of_two() || self.ring_size < 2 || self.ring_size > 32_768 {
            return fail(format!("ring size {}: expected a power of two from 2 to 32768", self.ring_size));
        }
        if self.queues == 0 || self.queues > PAIRS_MAX {
            return fail(format!("{} queue pairs: expected 1 to {PAIRS_MAX}", self.queues));
        }
        if self.rx_buffer_bytes < 128 || self.rx_buffer_bytes > 1 << 20 {
            return fail(format!("receive buffers of {}: expected 128 to 1048576", self.rx_buffer_bytes));
        }
        if self.tx_cuts.is_empty() || self.tx_cuts.contains(&0) {
            return fail("descriptor lengths must be one or more numbers above zero".into());
        }
        Ok(())
    }
}

/// Runs a guest until SIGTERM or SIGINT, or until the back-end leaves for good. Prints JSON lines:
/// one with `ready` when the rings run (again after each reconnect), one with `counters` at the end
/// and on SIGUSR1.
///
/// # Errors
/// [`GuestError`]; the counters are printed even then.
pub fn run(config: &GuestConfig) -> Result<(), GuestError> {
    config.validate()?;
    let mut signals = Signals::block().map_err(kernel("signals"))?;
    let listener = match config.server {
        true => {
            let bound = UnixListener::bind(&config.socket).map_err(kernel("binding the socket"))?;
            Some(bound)
        }
        false => None,
    };
    if let Some(name) = &config.netns {
        netns::enter(name).map_err(kernel("entering the network namespace"))?;
    }
    let mut session = meet(config, listener.as_ref())?;
    let agreement = handshake::negotiate(&mut session, config)?;
    let mut guest = Guest::build(config, agreement)?;
    handshake::start_rings(&mut session, config, &guest.agreement, guest.mem, &guest.places)?;
    guest.start()?;
    guest.announce(&session);
    let ended = guest.watch(config, session, listener.as_ref(), &mut signals);
    guest.stop();
    guest.report();
    if config.server {
        // Nobody can be helped if it is gone already.
        let _ = std::fs::remove_file(&config.socket);
    }
    ended
}

fn meet(config: &GuestConfig, listener: Option<&UnixListener>) -> Result<Session, SessionError> {
    match listener {
        Some(listener) => Session::accept(listener, &config.socket),
        None => Session::connect(&config.socket, config.patience),
    }
}

/// A guest's TAP, memory, rings and workers.
struct Guest {
    agreement: Agreement,
    mem: &'static GuestMemory,
    tap: Tap,
    mac: [u8; 6],
    places: Vec<RingPlace>,
    waiting: Vec<Pair>,
    bells: Vec<Arc<Doorbells>>,
    counters: Vec<Arc<PairCounters>>,
    control: Vec<Arc<Control>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Guest {
    fn build(config: &GuestConfig, agreement: Agreement) -> Result<Guest, GuestError> {
        let features = agreement.features;
        let tap = open_tap(config, &agreement)?;
        let mac = tap.mac().map_err(kernel("reading the MAC address"))?;
        let tx_lens = tx_pieces(features, &config.tx_cuts);
        let rx_lens = rx_pieces(features, config.rx_buffer_bytes, u32::from(agreement.ip_mtu));
        let ring = ring_bytes(config.ring_size);
        let size = |lens: &[u32], slots: usize| {
            let pair = ring + Slot::footprint_bytes(lens) * slots as u64;
            (pair * config.queues as u64).next_multiple_of(REGION_ALIGN_BYTES)
        };
        let options = |device_writes| RingOptions {
            size: config.ring_size,
            device_writes,
            event_idx: features.named("event_idx"),
            indirect: features.named("indirect_desc"),
            in_order: features.named("in_order"),
        };
        let cost = |lens: &[u32]| if options(true).indirect && lens.len() > 1 { 1 } else { lens.len() };
        let slots = |lens: &[u32]| usize::from(config.ring_size) / cost(lens);
        if slots(&tx_lens) == 0 || slots(&rx_lens) == 0 {
            let pieces = tx_lens.len().max(rx_lens.len());
            let text = format!("a ring of {} cannot hold a frame of {pieces} pieces", config.ring_size);
            return Err(GuestError::Config(text));
        }
        // A frame shorter than the longest takes fewer descriptors, so more slots than chains of
        // full length are of use when transmitting.
        let tx_slots = usize::from(config.ring_size);
        let (tx_bytes, rx_bytes) = (size(&tx_lens, tx_slots), size(&rx_lens, slots(&rx_lens)));
        let mem = GuestMemory::new(&[(TX_REGION_ADDR, tx_bytes), (RX_REGION_ADDR, rx_bytes)])
            .map_err(kernel("guest memory"))?;
        let mut arenas = [Arena::new(TX_REGION_ADDR, tx_bytes), Arena::new(RX_REGION_ADDR, rx_bytes)];
        let mut guest = Guest {
            agreement,
            mem,
            tap,
            mac,
            places: Vec::new(),
            waiting: Vec::new(),
            bells: Vec::new(),
            counters: Vec::new(),
            control: Vec::new(),
            threads: Vec::new(),
        };
        for index in 0..config.queues {
            let tx = DriverRing::new(mem, lay_out_ring(&mut arenas[0], config.ring_size), options(false));
            let rx = DriverRing::new(mem, lay_out_ring(&mut arenas[1], config.ring_size), options(true));
            let lay = |arena: &mut Arena, lens: &[u32], n: usize| {
                (0..n).map(|_| Slot::lay_out(mem, arena, lens)).collect::<Vec<_>>()
            };
            let tx_slots = lay(&mut arenas[0], &tx_lens, tx_slots);
            let rx_slots = lay(&mut arenas[1], &rx_lens, slots(&rx_lens));
            guest.add_pair(config, index, [rx, tx], [rx_slots, tx_slots])?;
        }
        Ok(guest)
    }

    fn add_pair(
        &mut self,
        config: &GuestConfig,
        index: usize,
        [rx, tx]: [DriverRing; 2],
        [rx_slots, tx_slots]: [Vec<Slot>; 2],
    ) -> Result<(), GuestError> {
        let bells = Arc::new(Doorbells::new().map_err(kernel("eventfd"))?);
        let control = Arc::new(Control::default());
        let counters = Arc::new(PairCounters::default());
        for (ring, kick, call) in
            [(&rx, &bells.rx_kick, &bells.rx_call), (&tx, &bells.tx_kick, &bells.tx_call)]
        {
            self.places.push(RingPlace {
                addrs: ring.addrs(),
                size: ring.size(),
                kick: kick.as_raw_fd(),
                call: call.as_raw_fd(),
            });
        }
        self.waiting.push(Pair::new(PairParts {
            mem: self.mem,
            features: self.agreement.features,
            ip_mtu: self.agreement.ip_mtu,
            tap: self.tap.fd(index),
            rx,
            tx,
            rx_slots,
            tx_slots,
            bells: Arc::clone(&bells),
            counters: Arc::clone(&counters),
            control: Arc::clone(&control),
            plan: Plan::new(&config.misbehave),
        }));
        self.bells.push(bells);
        self.counters.push(counters);
        self.control.push(control);
        Ok(())
    }

    fn start(&mut self) -> Result<(), GuestError> {
        self.tap.set_up().map_err(kernel("bringing the TAP up"))?;
        for (index, pair) in self.waiting.drain(..).enumerate() {
            let spawned = std::thread::Builder::new().name(format!("pair{index}")).spawn(|| pair.run());
            self.threads.push(spawned.map_err(kernel("starting a worker"))?);
        }
        Ok(())
    }

    fn announce(&self, session: &Session) {
        let mac = self.mac.map(|octet| format!("{octet:02x}")).join(":");
        print_line(&json!({
            "ready": true,
            "features": self.agreement.features,
            "offered": self.agreement.offered,
            "protocol": session.protocol().names(),
            "mac": mac,
            "ip_mtu": self.agreement.ip_mtu,
        }));
    }

    /// Counters of all pairs together.
    fn report(&self) {
        let sum = self.counters.iter().map(|c| c.snapshot()).fold(Counters::default(), |a, b| a + b);
        print_line(&json!({ "counters": sum }));
    }

    /// Waits for signals and for the back-end to leave.
    fn watch(
        &mut self,
        config: &GuestConfig,
        mut session: Session,
        listener: Option<&UnixListener>,
        signals: &mut Signals,
    ) -> Result<(), GuestError> {
        loop {
            match wait_event(&session, signals)? {
                Event::Signal(Signal::Report) => self.report(),
                Event::Signal(Signal::Terminate) => {
                    handshake::stop_rings(&mut session, &self.places);
                    return Ok(());
                }
                Event::Left if !config.reconnect => return Err(GuestError::BackendLeft),
                Event::Left => {
                    drop(session);
                    print_line(&json!({ "ready": false }));
                    self.settle_loss();
                    let Some(next) = self.meet_again(config, listener, signals)? else {
                        return Ok(());
                    };
                    session = next;
                    self.announce(&session);
                }
            }
        }
    }

    /// Has the workers put away what the lost back-end left half done.
    fn settle_loss(&self) {
        for (control, bells) in self.control.iter().zip(&self.bells) {
            let lost = control.lost.fetch_add(1, Ordering::AcqRel) + 1;
            while control.lost_seen.load(Ordering::Acquire) != lost {
                // A full counter wakes the worker as well.
                let _ = bells.wake.write(1);
                std::thread::sleep(NOTICE_PAUSE);
            }
        }
    }

    /// Connects and hands over the rings again; `None` if a signal came first.
    fn meet_again(
        &mut self,
        config: &GuestConfig,
        listener: Option<&UnixListener>,
        signals: &mut Signals,
    ) -> Result<Option<Session>, GuestError> {
        let deadline = Instant::now() + config.patience;
        loop {
            let attempt = GuestConfig { patience: Duration::ZERO, ..config.clone() };
            match meet(&attempt, listener).and_then(|session| self.resume(config, session)) {
                Ok(session) => return Ok(Some(session)),
                Err(e) if Instant::now() >= deadline => return Err(e.into()),
                Err(SessionError::Unfit(text)) => return Err(SessionError::Unfit(text).into()),
                Err(_) => {}
            }
            if let Some(Event::Signal(Signal::Terminate)) = poll_signals(signals, Duration::from_millis(20))?
            {
                return Ok(None);
            }
        }
    }

    fn resume(&self, config: &GuestConfig, mut session: Session) -> Result<Session, SessionError> {
        let agreement = handshake::negotiate(&mut session, config)?;
        if agreement.features != self.agreement.features {
            let text = format!("came back with features {}", agreement.features);
            return Err(SessionError::Unfit(text));
        }
        handshake::start_rings(&mut session, config, &agreement, self.mem, &self.places)?;
        for bells in &self.bells {
            // Whatever was offered while nobody looked; a full counter wakes the device as well.
            let _ = bells.rx_kick.write(1);
            let _ = bells.tx_kick.write(1);
        }
        Ok(session)
    }

    fn stop(&mut self) {
        for (control, bells) in self.control.iter().zip(&self.bells) {
            control.stop.store(true, Ordering::Release);
            // A full counter wakes the worker as well.
            let _ = bells.wake.write(1);
        }
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(e)) => eprintln!("worker ended: {e}"),
                Err(_) => eprintln!("worker panicked"),
            }
        }
    }
}

fn open_tap(config: &GuestConfig, agreement: &Agreement) -> Result<Tap, GuestError> {
    let features = agreement.features;
    let offload = Offload {
        csum: features.named("csum"),
        tso4: features.named("host_tso4"),
        tso6: features.named("host_tso6"),
        ecn: features.named("host_ecn"),
        uso: features.named("host_uso"),
    };
    let tap = Tap::open(&config.tap, config.queues, features.header_bytes(), offload)
        .map_err(kernel("opening the TAP"))?;
    if let Some(mac) = config.mac.or(agreement.mac) {
        tap.set_mac(mac).map_err(kernel("setting the MAC address"))?;
    }
    tap.set_ip_mtu(agreement.ip_mtu).map_err(kernel("setting the MTU"))?;
    Ok(tap)
}

fn ring_bytes(size: u16) -> u64 {
    let n = u64::from(size);
    16 * n + (6 + 2 * n) + (6 + 8 * n) + RingAddrs::indirect_bytes(size) + RING_PADDING_BYTES
}

/// Places a ring's parts with the least alignment the specification asks for (virtio 1.3, 2.7), and
/// not at multiples of anything larger.
fn lay_out_ring(arena: &mut Arena, size: u16) -> RingAddrs {
    let n = u64::from(size);
    RingAddrs {
        desc: arena.take(16 * n, 4096, 16),
        avail: arena.take(6 + 2 * n, 4096, 2),
        used: arena.take(6 + 8 * n, 4096, 4),
        indirect: arena.take(RingAddrs::indirect_bytes(size), 64, 16),
    }
}

enum Event {
    Signal(Signal),
    Left,
}

/// Waits for a signal or for the back-end to hang up.
fn wait_event(session: &Session, signals: &mut Signals) -> Result<Event, GuestError> {
    let epoll = Epoll::new().map_err(kernel("epoll"))?;
    for (fd, set) in [(signals.fd(), EventSet::IN), (session.fd(), EventSet::READ_HANG_UP)] {
        epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(set, u64::from(fd.unsigned_abs())))
            .map_err(kernel("epoll"))?;
    }
    let mut events = [EpollEvent::default(); 2];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map_err(kernel("epoll"))?,
        };
        if events[..ready].iter().any(|e| e.fd() == signals.fd()) {
            return signals.take().map(Event::Signal).map_err(kernel("signals"));
        }
        if ready > 0 {
            return Ok(Event::Left);
        }
    }
}

fn poll_signals(signals: &mut Signals, timeout: Duration) -> Result<Option<Event>, GuestError> {
    let epoll = Epoll::new().map_err(kernel("epoll"))?;
    epoll
        .ctl(ControlOperation::Add, signals.fd(), EpollEvent::new(EventSet::IN, 0))
        .map_err(kernel("epoll"))?;
    let mut events = [EpollEvent::default(); 1];
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    match epoll.wait(timeout_ms, &mut events) {
        Ok(0) => Ok(None),
        Ok(_) => signals.take().map(|s| Some(Event::Signal(s))).map_err(kernel("signals")),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(e) => Err(kernel("epoll")(e)),
    }
}

fn print_line(value: &serde_json::Value) {
    let mut out = io::stdout().lock();
    // A reader that went away must not end the guest.
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}
