//! The holder's one worker: engine and sockets for all guests of a network, over a TAP on its bridge.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use epoll::Event;
use vmm_sys_util::eventfd::EventFd;

use super::ports::{Order, Orders};
use super::tap_port::{self, TapPort, TapSource};
use crate::control::dns_forward::DnsClient;
use crate::engine::core::Owner;
use crate::engine::counters::Counters;
use crate::engine::flows::Ended;
use crate::engine::gateway::SharedDhcp;
use crate::engine::host_net::Token;
use crate::engine::{Engine, EngineConfig};
use crate::limits;
use crate::service::dns::DnsService;
use crate::time::{Clock, Instant};
use crate::uplink::sockets::HostSockets;
use crate::uplink::sys::poll::{self, Poll};
use crate::worker::names::Names;
use crate::worker::publish;

/// Events taken at once.
const EVENTS: usize = 256;

/// Tokens of the worker's own descriptors: above every kind of the engine's.
const TAP: Token = Token(0x80 << 56);
const DNS: Token = Token(0x82 << 56);
const STOP: Token = Token(0x83 << 56);
const ORDERS: Token = Token(0x84 << 56);
const ADDRESSES_GONE: Token = Token(0x85 << 56);

/// What a worker is made of.
pub struct HolderParts {
    /// The TAP on the bridge, which does not block.
    pub tap: OwnedFd,
    /// The engine's settings.
    pub engine: EngineConfig,
    /// Local DNS answers.
    pub dns: Arc<DnsService>,
    /// The way to upstream resolvers.
    pub dns_client: DnsClient,
    /// The network's leases.
    pub dhcp: SharedDhcp,
    /// Ports that processes publish, and their guests' addresses.
    pub orders: Orders,
    /// Written to end the worker.
    pub stop: EventFd,
    /// Written when addresses of the host went and did not come back.
    pub addresses_gone: EventFd,
}

/// Everything the worker owns. Made on its own thread.
pub struct HolderWorker {
    poll: Poll,
    engine: Engine<HostSockets>,
    source: TapSource,
    port: TapPort,
    names: Names,
    orders: Orders,
    clock: Clock,
    addresses_gone: EventFd,
    /// Frames wait on the TAP.
    tap_waits: bool,
}

impl HolderWorker {
    /// Puts a worker together.
    ///
    /// # Errors
    /// Descriptors that cannot be had or watched.
    pub fn new(parts: HolderParts) -> io::Result<HolderWorker> {
        let poll = Poll::new()?;
        let (source, port) = tap_port::ends(parts.tap)?;
        poll.watch_readable(source.fd(), TAP)?;
        poll.watch_readable(parts.stop.as_raw_fd(), STOP)?;
        poll.watch_readable(parts.addresses_gone.as_raw_fd(), ADDRESSES_GONE)?;
        poll.watch_readable(parts.orders.event_fd().as_raw_fd(), ORDERS)?;
        let names = Names::new(parts.dns_client, &poll, DNS)?;
        let sockets = HostSockets::new(poll.clone(), names.streams(), true);
        Ok(HolderWorker {
            engine: Engine::new(&parts.engine, sockets, parts.dhcp, parts.dns),
            poll,
            source,
            port,
            names,
            orders: parts.orders,
            clock: Clock::start(),
            addresses_gone: parts.addresses_gone,
            tap_waits: false,
        })
    }

    /// Moves frames until `stop` is written; returns what was counted.
    ///
    /// # Errors
    /// The TAP is gone.
    pub fn run(mut self) -> io::Result<Counters> {
        let mut events = [Event { events: 0, data: 0 }; EVENTS];
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.timeout_ms() };
            let count = self.poll.wait(timeout, &mut events)?;
            let now = self.clock.now();
            for event in &events[..count] {
                match Token(event.data) {
                    STOP => {
                        self.engine.guest_reset();
                        return Ok(self.engine.counters().clone());
                    }
                    TAP => self.tap_waits = true,
                    DNS => self.names.answer(now, &mut self.engine, &mut self.port),
                    ORDERS => self.carry_out(now),
                    ADDRESSES_GONE => {
                        let _ = self.addresses_gone.read();
                        self.engine.addresses_gone(now, &mut self.port);
                    }
                    token => self.engine.host_ready(now, &mut self.port, token, poll::readiness(event)),
                }
            }
            more = self.work(now)?;
        }
    }

    /// Until the next deadline, in milliseconds rounded up; -1 without one.
    fn timeout_ms(&self) -> i32 {
        let Some(at) = self.engine.next_deadline() else { return -1 };
        let micros = at.since(self.clock.now()).as_micros();
        i32::try_from(micros.div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// One batch. Returns whether there is more to do at once.
    fn work(&mut self, now: Instant) -> io::Result<bool> {
        for _ in 0..limits::TX_BATCH_FRAMES {
            if !self.tap_waits {
                break;
            }
            let HolderWorker { engine, source, port, .. } = self;
            self.tap_waits = source.next(|frame| engine.from_guest(now, port, frame))?;
        }
        self.engine.end_of_frames(&mut self.port);
        self.engine.run_timers(now, &mut self.port);
        let more = self.engine.flush(&mut self.port);
        self.names.ask(now, &mut self.engine, &mut self.port);
        Ok(more || self.tap_waits)
    }

    fn carry_out(&mut self, now: Instant) {
        self.orders.clear_event();
        let HolderWorker { engine, orders, port: guests, .. } = self;
        orders.take(|order| match order {
            Order::Publish(number, port, socket) => {
                let outcome = publish(engine, Owner::OneOf(number), port, socket);
                if let Err(error) = &outcome {
                    tracing::warn!(%error, host = %port.host, "a published port cannot be watched");
                }
                outcome.is_ok().then(Ended::default)
            }
            Order::Unpublish(number, port, reset) => {
                Some(engine.unpublish(now, guests, (Owner::OneOf(number), &port), reset))
            }
            Order::EndPublished(port, first) => Some(engine.reset_published(now, guests, &port, first)),
            Order::Guest(number, addr) => {
                engine.set_guest(number, addr);
                Some(Ended::default())
            }
            Order::Gone(number) => {
                engine.guest_gone(number);
                Some(Ended::default())
            }
        });
    }
}
