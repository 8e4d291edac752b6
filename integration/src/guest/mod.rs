//! The namespace guest: a vhost-user front-end whose driver side is a TAP in a network namespace.
//!
//! [`run`] is one guest's life: negotiate with the back-end ([`session`]), open the TAP with the
//! offloads that were negotiated, lay out memory and rings, run one worker a
//! queue pair, and watch the connection and the signals until it is told to end. If the back-end
//! leaves and `reconnect` is set, the rings stay as they are and are offered to the next back-end
//! with `used->idx` as their base, as QEMU does.

mod buffers;
mod check;
mod counters;
mod doorbells;
mod driver;
pub mod features;
pub mod frames;
mod garbage;
mod handshake;
pub mod misbehave;
mod pair;
mod ring;
pub mod session;

use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use counters::Counters;
use counters::PairCounters;
use doorbells::Doorbells;
use driver::PairRings;
pub use driver::{DriverConfig, Order};
use handshake::{Agreement, RingPlace};
use misbehave::{Misbehaviour, Plan};
use pair::{Control, NOTICE_PAUSE, Pair, PairParts};
use session::{Session, SessionError};

use crate::sys::mem::GuestMemory;
use crate::sys::netns;
use crate::sys::signal::{Signal, Signals};
use crate::sys::tap::{Offload, Tap};

/// What a namespace guest is to be.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// Its driver.
    pub driver: DriverConfig,
    /// Network namespace the TAP is made in; `None` for the caller's.
    pub netns: Option<String>,
    /// Name of the TAP interface.
    pub tap: String,
    /// MAC address; without one the device's, else a random one.
    pub mac: Option<[u8; 6]>,
    /// Ways to go wrong.
    pub misbehave: Vec<Misbehaviour>,
    /// Wait for another back-end when one leaves.
    pub reconnect: bool,
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

/// Runs a guest until SIGTERM or SIGINT, or until the back-end leaves for good. Prints JSON lines:
/// one with `ready` when the rings run (again after each reconnect), one with `counters` at the end
/// and on SIGUSR1.
///
/// # Errors
/// [`GuestError`]; the counters are printed even then.
pub fn run(config: &GuestConfig) -> Result<(), GuestError> {
    config.driver.validate()?;
    let mut signals = Signals::block().map_err(kernel("signals"))?;
    let listener = config.driver.listen().map_err(kernel("binding the socket"))?;
    if let Some(name) = &config.netns {
        netns::enter(name).map_err(kernel("entering the network namespace"))?;
    }
    let mut session = config.driver.meet(listener.as_ref())?;
    let agreement = handshake::negotiate(&mut session, &config.driver)?;
    let mut guest = Guest::build(config, agreement)?;
    handshake::start_rings(&mut session, &config.driver, &guest.agreement, guest.mem, &guest.places)?;
    guest.start()?;
    guest.announce(&session);
    let ended = guest.watch(config, session, listener.as_ref(), &mut signals);
    guest.stop();
    guest.report();
    if config.driver.server {
        // Nobody can be helped if it is gone already.
        let _ = std::fs::remove_file(&config.driver.socket);
    }
    ended
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
        let tap = open_tap(config, &agreement)?;
        let mac = tap.mac().map_err(kernel("reading the MAC address"))?;
        let layout = driver::lay_out(&config.driver, &agreement)?;
        let mut guest = Guest {
            agreement,
            mem: layout.mem,
            tap,
            mac,
            places: layout.places,
            waiting: Vec::new(),
            bells: Vec::new(),
            counters: Vec::new(),
            control: Vec::new(),
            threads: Vec::new(),
        };
        for (index, rings) in layout.pairs.into_iter().enumerate() {
            guest.add_pair(config, index, rings);
        }
        Ok(guest)
    }

    fn add_pair(&mut self, config: &GuestConfig, index: usize, rings: PairRings) {
        let control = Arc::new(Control::default());
        let counters = Arc::new(PairCounters::default());
        self.bells.push(Arc::clone(&rings.bells));
        self.waiting.push(Pair::new(PairParts {
            mem: self.mem,
            features: self.agreement.features,
            ip_mtu: self.agreement.ip_mtu,
            tap: self.tap.fd(index),
            rx: rings.rx,
            tx: rings.tx,
            rx_slots: rings.rx_slots,
            tx_slots: rings.tx_slots,
            bells: rings.bells,
            counters: Arc::clone(&counters),
            control: Arc::clone(&control),
            plan: Plan::new(&config.misbehave),
        }));
        self.counters.push(counters);
        self.control.push(control);
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
        let deadline = Instant::now() + config.driver.patience;
        loop {
            let attempt = DriverConfig { patience: Duration::ZERO, ..config.driver.clone() };
            match attempt.meet(listener).and_then(|session| self.resume(config, session)) {
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
        let agreement = handshake::negotiate(&mut session, &config.driver)?;
        if agreement.features != self.agreement.features {
            let text = format!("came back with features {}", agreement.features);
            return Err(SessionError::Unfit(text));
        }
        handshake::start_rings(&mut session, &config.driver, &agreement, self.mem, &self.places)?;
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
    let tap = Tap::open(&config.tap, config.driver.queues, features.header_bytes(), offload)
        .map_err(kernel("opening the TAP"))?;
    if let Some(mac) = config.mac.or(agreement.mac) {
        tap.set_mac(mac).map_err(kernel("setting the MAC address"))?;
    }
    tap.set_ip_mtu(agreement.ip_mtu).map_err(kernel("setting the MTU"))?;
    Ok(tap)
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
