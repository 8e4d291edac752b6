//! The worker's side of the device: all rings, and the commands that start and stop them.
//!
//! One worker owns a [`DeviceQueues`] and calls, per wake-up: [`DeviceQueues::handle_commands`] when
//! the command descriptor is readable, [`DeviceQueues::kicked`] for each readable kick, the two sides
//! of [`DeviceQueues::split`] to move frames, and [`DeviceQueues::publish`] at the end of the batch.
//!
//! Ring `2n` receives and ring `2n + 1` sends, but the control queue stands after the last pair, on
//! an even index, and nothing announces which one that is. So an even ring beyond the first whose
//! partner is not there is *undecided* while `CTRL_VQ` is negotiated: it carries no frame until its
//! partner starts or its first chain shows what it is (only control commands begin with bytes to
//! read).
//!
//! A ring without a kick descriptor (`NOFD`) is to be polled: [`DeviceQueues::polled`] says so, and
//! the worker should then visit all running pairs at every wake-up and wake up often.
//!
//! May touch: rings, kick descriptors. Read first: the vhost-user specification, "Ring states" and
//! "Multiple queue support".

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::command::{Command, CommandReceiver, Reply, RingStart, StartError};
use super::control_queue::{ControlRing, ControlSide};
use super::features::{Feature, Features};
use super::guest_mem::LossWatch;
use super::ring::{Ring, RingFault, RingOptions, SharedMemory};
use super::rx::{RxRing, RxSide};
use super::stats::DeviceStats;
use super::sys::{self, KickRead, Notifier};
use super::tx::{Enabled, TxRing, TxSide};
use crate::capture::Recorder;
use crate::frame::QueuePair;
use crate::limits::VRINGS_MAX;

/// How the worker's event loop learns which kick descriptors to wait for (level-triggered).
pub trait KickWatch {
    /// Waits for `fd`, the kick descriptor of `ring`, to become readable.
    ///
    /// # Errors
    /// The descriptor cannot be waited for (a regular file, say); the ring is not started then.
    fn watch(&mut self, fd: RawFd, ring: u16) -> io::Result<()>;

    /// Waits for `fd` no more; it is about to be closed.
    fn unwatch(&mut self, fd: RawFd);
}

/// What a kick was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KickKind {
    /// Frames from the guest: drain the pair.
    Tx(QueuePair),
    /// Receive buffers the engine was starved of: tell it.
    Rx(QueuePair),
    /// Control commands; they are served already.
    Control,
    /// Nothing to do.
    Idle,
}

/// What happened to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// A front-end connected.
    Attached,
    /// It is gone, and all rings with it.
    Detached,
    /// The guest started over: a ring's used index is not where we left it, so what was known of
    /// the guest's connections is void.
    GuestReset,
    /// The guest's IP MTU in bytes, from now on.
    IpMtu(u16),
    /// A receive ring runs: the guest can be reached.
    RingsUp,
    /// No receive ring runs any more.
    RingsDown,
    /// A ring began to carry frames: treat it as kicked, chains may wait without a kick.
    Ready(KickKind),
}

/// What stands at a ring index.
#[derive(Debug, Default)]
struct Slot {
    kick: Option<OwnedFd>,
    err: Option<Notifier>,
    /// The kick descriptor will never tell anything again; to be unwatched.
    kick_dead: bool,
    /// Where the ring stood when it was last stopped.
    stopped_at: Option<u16>,
    /// The fault that stopped the ring was told.
    fault_told: bool,
}

/// All rings of the device; owned by the worker.
#[derive(Debug)]
pub struct DeviceQueues {
    link: CommandReceiver,
    tx: TxSide,
    rx: RxSide,
    control: ControlSide,
    slots: [Slot; VRINGS_MAX],
    features: Features,
    memory: SharedMemory,
    stats: DeviceStats,
    broken_rings: u64,
    memory_loss: LossWatch,
    any_kick_dead: bool,
    /// Control commands were left for the next visit.
    control_waits: bool,
    reachable: bool,
    /// The rings' fresh start was told already; until all have stopped again.
    reset_told: bool,
}

/// Where a ring index leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Rx(usize),
    Tx(usize),
    Control,
}

impl DeviceQueues {
    pub(super) fn new(link: CommandReceiver) -> DeviceQueues {
        let memory = SharedMemory::default();
        DeviceQueues {
            link,
            tx: TxSide::new(&memory),
            rx: RxSide::new(&memory),
            control: ControlSide::new(&memory),
            slots: std::array::from_fn(|_| Slot::default()),
            features: Features::NONE,
            memory,
            stats: DeviceStats::default(),
            broken_rings: 0,
            memory_loss: LossWatch::new(),
            any_kick_dead: false,
            control_waits: false,
            reachable: false,
            reset_told: false,
        }
    }

    /// Readable (level-triggered) when commands wait.
    pub fn command_fd(&self) -> RawFd {
        self.link.fd()
    }

    /// Carries out the commands waiting and acknowledges each; what the worker should know is
    /// appended to `events`. Never with a reservation open.
    pub fn handle_commands(&mut self, kicks: &mut dyn KickWatch, events: &mut Vec<DeviceEvent>) {
        self.link.clear_event();
        self.publish();
        if std::mem::take(&mut self.any_kick_dead) {
            self.drop_dead_kicks(kicks);
        }
        if std::mem::take(&mut self.control_waits) {
            self.serve_control();
        }
        while let Some(command) = self.link.next() {
            let reply = self.handle(command, kicks, events);
            self.tell_reachable(events);
            self.link.reply(reply);
        }
    }

    /// Takes note of a readable kick descriptor and says what it was for.
    pub fn kicked(&mut self, ring: u16) -> KickKind {
        let Some(slot) = self.slots.get_mut(usize::from(ring)) else { return KickKind::Idle };
        let Some(kick) = &slot.kick else { return KickKind::Idle };
        match sys::read_kick(kick) {
            KickRead::Kicked => {}
            KickRead::Nothing => return KickKind::Idle,
            KickRead::Dead => {
                slot.kick_dead = true;
                self.any_kick_dead = true;
                self.link.shared.wake_worker();
            }
        }
        match self.place(ring) {
            Place::Tx(pair) => KickKind::Tx(queue_pair(pair)),
            Place::Rx(pair) => self.rx_kicked(ring, pair),
            Place::Control => self.serve_control(),
        }
    }

    /// The transmit and the receive side, to move frames.
    pub fn split(&mut self) -> (&mut TxSide, &mut RxSide) {
        (&mut self.tx, &mut self.rx)
    }

    /// Ends a batch: frames committed to the receive rings become visible, with at most one
    /// notification for each ring.
    pub fn publish(&mut self) {
        self.rx.publish();
        if self.memory_loss.is_lost(&self.memory) {
            self.stop_all(RingFault::MemoryLost);
            self.link.shared.tell_memory_lost();
        }
        if self.tx.any_fault || self.rx.any_fault {
            self.tell_faults();
        }
        self.stats = DeviceStats {
            tx: self.tx.stats,
            rx: self.rx.stats,
            control: self.control.stats,
            broken_rings: self.broken_rings,
        };
    }

    /// Has `recorder` copy what crosses the device from now on, or nothing; what did so before.
    pub fn set_recorder(&mut self, recorder: Option<Box<Recorder>>) -> Option<Box<Recorder>> {
        std::mem::replace(&mut self.rx.recorder, recorder)
    }

    /// What was counted, as of the last [`DeviceQueues::publish`].
    pub fn stats(&self) -> &DeviceStats {
        &self.stats
    }

    /// Features that were acknowledged and count.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The rings that run: index, entries, and how many of those the driver made available that were not taken
    /// yet. The driver's word for the last, bounded by the second.
    pub fn rings(&self) -> impl Iterator<Item = (u16, u16, u16)> {
        (0..VRINGS_MAX as u16).filter_map(|index| {
            let ring = self.ring_at(index)?;
            Some((index, ring.size(), ring.available()))
        })
    }

    /// Whether a running ring has no kick descriptor and must be polled.
    pub fn polled(&self) -> bool {
        (0..VRINGS_MAX).any(|n| self.slots[n].kick.is_none() && self.ring_at(n as u16).is_some())
    }

    fn place(&self, index: u16) -> Place {
        match &self.control.ring {
            Some((at, _)) if *at == index => Place::Control,
            _ if index.is_multiple_of(2) => Place::Rx(usize::from(index) / 2),
            _ => Place::Tx(usize::from(index) / 2),
        }
    }

    fn ring_at(&self, index: u16) -> Option<&Ring> {
        match self.place(index) {
            Place::Rx(pair) => self.rx.rings.get(pair)?.as_ref().map(|r| &r.ring),
            Place::Tx(pair) => self.tx.rings.get(pair)?.as_ref().map(|r| &r.ring),
            Place::Control => self.control.ring.as_ref().map(|(_, r)| &r.ring),
        }
    }

    fn ring_at_mut(&mut self, index: u16) -> Option<&mut Ring> {
        match self.place(index) {
            Place::Rx(pair) => self.rx.rings.get_mut(pair)?.as_mut().map(|r| &mut r.ring),
            Place::Tx(pair) => self.tx.rings.get_mut(pair)?.as_mut().map(|r| &mut r.ring),
            Place::Control => self.control.ring.as_mut().map(|(_, r)| &mut r.ring),
        }
    }

    fn fault_at(&mut self, index: u16) -> Option<&mut Option<RingFault>> {
        match self.place(index) {
            Place::Rx(pair) => self.rx.rings.get_mut(pair)?.as_mut().map(|r| &mut r.fault),
            Place::Tx(pair) => self.tx.rings.get_mut(pair)?.as_mut().map(|r| &mut r.fault),
            Place::Control => self.control.ring.as_mut().map(|(_, r)| &mut r.fault),
        }
    }

    fn rx_kicked(&mut self, index: u16, pair: usize) -> KickKind {
        if self.rx.rings.get(pair).and_then(Option::as_ref).is_some_and(|rx| rx.undecided) {
            return self.decide(index, pair);
        }
        if self.rx.take_kick(pair) { KickKind::Rx(queue_pair(pair)) } else { KickKind::Idle }
    }

    /// Finds out what an undecided ring is by its first chain, if it has one.
    fn decide(&mut self, index: u16, pair: usize) -> KickKind {
        match self.rx.looks_like_control(pair) {
            None => KickKind::Idle,
            Some(false) => {
                self.settle_as_rx(pair);
                KickKind::Rx(queue_pair(pair))
            }
            Some(true) => {
                let Some(rx) = self.rx.rings[pair].take() else { return KickKind::Idle };
                tracing::info!(ring = index, "control queue found");
                self.control.ring = Some((index, ControlRing { ring: rx.ring, fault: rx.fault }));
                self.serve_control()
            }
        }
    }

    fn settle_as_rx(&mut self, pair: usize) {
        if let Some(Some(rx)) = self.rx.rings.get_mut(pair) {
            rx.undecided = false;
            rx.ring.disarm();
        }
    }

    fn serve_control(&mut self) -> KickKind {
        if self.control.serve() {
            // More commands than one visit serves: come back through the command descriptor.
            self.control_waits = true;
            self.link.shared.wake_worker();
        }
        if self.control.ring.as_ref().is_some_and(|(_, r)| r.fault.is_some()) {
            self.tell_faults();
        }
        KickKind::Control
    }

    fn handle(
        &mut self,
        command: Command,
        kicks: &mut dyn KickWatch,
        events: &mut Vec<DeviceEvent>,
    ) -> Reply {
        match command {
            Command::Attached => events.push(DeviceEvent::Attached),
            Command::Detached => {
                self.detach(kicks);
                events.push(DeviceEvent::Detached);
            }
            Command::Features(features) => self.set_features(features),
            Command::Memory(memory) => self.set_memory(memory),
            Command::IpMtu(bytes) => events.push(DeviceEvent::IpMtu(bytes)),
            Command::Start(start) => {
                return match self.start(*start, kicks, events) {
                    Ok(at) => Reply::At(at),
                    Err(error) => Reply::NotStarted(error),
                };
            }
            Command::Stop(index) => return Reply::At(self.stop(index, kicks)),
            Command::Enable(index, enabled) => self.enable(index, enabled, events),
            Command::Kick(index, kick) => {
                if let Err(error) = self.replace_kick(index, kick, kicks) {
                    return Reply::NotStarted(StartError::Kick(error));
                }
            }
            Command::Call(index, call) => {
                if let Some(ring) = self.ring_at_mut(index) {
                    ring.set_call(call);
                }
            }
            Command::Err(index, err) => {
                if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                    slot.err = err;
                }
            }
        }
        Reply::Done
    }

    fn detach(&mut self, kicks: &mut dyn KickWatch) {
        for index in 0..VRINGS_MAX as u16 {
            self.stop(index, kicks);
            self.slots[usize::from(index)].err = None;
        }
        self.set_features(Features::NONE);
        self.set_memory(SharedMemory::default());
    }

    fn set_features(&mut self, features: Features) {
        self.features = features;
        self.tx.set_features(features);
        self.rx.set_features(features);
        for index in 0..VRINGS_MAX as u16 {
            if let Some(ring) = self.ring_at_mut(index) {
                ring.set_options(RingOptions::from_features(features));
            }
        }
    }

    fn set_memory(&mut self, memory: SharedMemory) {
        for index in 0..VRINGS_MAX as u16 {
            let moved = self.ring_at_mut(index).map(|ring| ring.relocate(&memory));
            if let Some(Err(error)) = moved
                && let Some(fault) = self.fault_at(index)
            {
                *fault = Some(RingFault::Gone(error));
            }
        }
        self.tx.set_memory(&memory);
        self.rx.set_memory(&memory);
        self.control.set_memory(&memory);
        self.memory = memory;
        self.tell_faults();
    }

    fn start(
        &mut self,
        start: RingStart,
        kicks: &mut dyn KickWatch,
        events: &mut Vec<DeviceEvent>,
    ) -> Result<u16, StartError> {
        let index = start.index;
        self.stop(index, kicks);
        let options = RingOptions::from_features(self.features);
        let mut ring = Ring::start(start.size, start.addrs, options, &self.memory)?;
        ring.call = start.call;
        let at = ring.next_avail();
        if let Some(kick) = &start.kick {
            kicks.watch(kick.as_raw_fd(), index).map_err(StartError::Kick)?;
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.kick = start.kick;
        slot.err = start.err;
        slot.fault_told = false;
        let reset = slot.stopped_at.is_some_and(|before| started_over(before, at));
        if reset && !std::mem::replace(&mut self.reset_told, true) {
            events.push(DeviceEvent::GuestReset);
        }
        self.install(index, ring, start.enabled, events);
        Ok(at)
    }

    /// Puts a started ring in its place.
    fn install(&mut self, index: u16, ring: Ring, enabled: Enabled, events: &mut Vec<DeviceEvent>) {
        let pair = usize::from(index) / 2;
        if !index.is_multiple_of(2) {
            self.tx.rings[pair] = Some(TxRing::new(ring, enabled));
            self.settle_as_rx(pair);
            events.push(DeviceEvent::Ready(KickKind::Tx(queue_pair(pair))));
            events.push(DeviceEvent::Ready(KickKind::Rx(queue_pair(pair))));
            return;
        }
        let has_partner = self.tx.rings.get(pair).is_some_and(Option::is_some);
        let mut rx = RxRing::new(ring, enabled);
        rx.undecided = index >= 2 && !has_partner && self.features.has(Feature::CTRL_VQ);
        let undecided = rx.undecided;
        if pair >= self.rx.rings.len() {
            // Beyond the last pair there can only be the control queue.
            self.control.ring = Some((index, ControlRing { ring: rx.ring, fault: None }));
            self.serve_control();
            return;
        }
        self.rx.rings[pair] = Some(rx);
        if undecided {
            self.arm_undecided(index, pair, events);
        } else {
            events.push(DeviceEvent::Ready(KickKind::Rx(queue_pair(pair))));
        }
    }

    fn arm_undecided(&mut self, index: u16, pair: usize, events: &mut Vec<DeviceEvent>) {
        let Some(Some(rx)) = self.rx.rings.get_mut(pair) else { return };
        match rx.ring.arm() {
            Ok(_) => {
                let kind = self.decide(index, pair);
                if kind != KickKind::Idle {
                    events.push(DeviceEvent::Ready(kind));
                }
            }
            Err(fault) => {
                rx.fault = Some(fault);
                self.tell_faults();
            }
        }
    }

    /// Stops a ring if it runs. Returns where it stands, or stood when it was last stopped.
    fn stop(&mut self, index: u16, kicks: &mut dyn KickWatch) -> u16 {
        let place = self.place(index);
        self.rx.publish();
        let ring = match place {
            Place::Rx(pair) => self.rx.rings.get_mut(pair).and_then(Option::take).map(|r| r.ring),
            Place::Tx(pair) => self.tx.rings.get_mut(pair).and_then(Option::take).map(|r| r.ring),
            Place::Control => self.control.ring.take().map(|(_, r)| r.ring),
        };
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return 0 };
        if let Some(kick) = slot.kick.take() {
            kicks.unwatch(kick.as_raw_fd());
        }
        slot.kick_dead = false;
        if let Some(ring) = ring {
            slot.stopped_at = Some(ring.next_avail());
        }
        let at = slot.stopped_at.unwrap_or(0);
        if (0..VRINGS_MAX as u16).all(|n| self.ring_at(n).is_none()) {
            self.reset_told = false;
        }
        at
    }

    fn enable(&mut self, index: u16, enabled: Enabled, events: &mut Vec<DeviceEvent>) {
        let kind = match self.place(index) {
            Place::Rx(pair) => {
                let Some(Some(rx)) = self.rx.rings.get_mut(pair) else { return };
                rx.enabled = enabled;
                KickKind::Rx(queue_pair(pair))
            }
            Place::Tx(pair) => {
                let Some(Some(tx)) = self.tx.rings.get_mut(pair) else { return };
                tx.enabled = enabled;
                KickKind::Tx(queue_pair(pair))
            }
            Place::Control => return,
        };
        events.push(DeviceEvent::Ready(kind));
    }

    fn replace_kick(
        &mut self,
        index: u16,
        kick: Option<OwnedFd>,
        kicks: &mut dyn KickWatch,
    ) -> io::Result<()> {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return Ok(()) };
        if let Some(old) = slot.kick.take() {
            kicks.unwatch(old.as_raw_fd());
        }
        slot.kick_dead = false;
        if let Some(kick) = kick {
            kicks.watch(kick.as_raw_fd(), index)?;
            slot.kick = Some(kick);
        }
        Ok(())
    }

    fn drop_dead_kicks(&mut self, kicks: &mut dyn KickWatch) {
        for (slot, index) in self.slots.iter_mut().zip(0u16..) {
            if std::mem::take(&mut slot.kick_dead)
                && let Some(kick) = slot.kick.take()
            {
                kicks.unwatch(kick.as_raw_fd());
                tracing::warn!(ring = index, "the kick descriptor is closed; the ring is polled from now on");
            }
        }
    }

    fn tell_reachable(&mut self, events: &mut Vec<DeviceEvent>) {
        let reachable = self.rx.any_running();
        if reachable != self.reachable {
            self.reachable = reachable;
            events.push(if reachable { DeviceEvent::RingsUp } else { DeviceEvent::RingsDown });
        }
    }

    /// Stops every running ring for `fault`.
    fn stop_all(&mut self, fault: RingFault) {
        for index in 0..VRINGS_MAX as u16 {
            if let Some(place) = self.fault_at(index) {
                place.get_or_insert(fault);
            }
        }
        self.tell_faults();
    }

    /// Tells of each ring that got a fault: to the log, the front-end and, if memory was lost, the
    /// session.
    fn tell_faults(&mut self) {
        self.tx.any_fault = false;
        self.rx.any_fault = false;
        for index in 0..VRINGS_MAX as u16 {
            let Some(&mut Some(fault)) = self.fault_at(index) else { continue };
            let slot = &mut self.slots[usize::from(index)];
            if std::mem::replace(&mut slot.fault_told, true) {
                continue;
            }
            self.broken_rings += 1;
            tracing::warn!(ring = index, reason = %fault, "ring stopped until the front-end restarts it");
            if let Some(err) = &slot.err {
                // A front-end that cannot be told has to find out itself.
                let _ = err.notify();
            }
        }
    }
}

/// Whether a ring that stood at `before` and starts at `now` belongs to a guest that started over:
/// the used index went back, to zero above all. (Forward it goes if someone else worked the ring
/// meanwhile, as QEMU does.)
fn started_over(before: u16, now: u16) -> bool {
    before != now && (now == 0 || before.wrapping_sub(now) < 0x8000)
}

pub(super) fn queue_pair(pair: usize) -> QueuePair {
    QueuePair(u8::try_from(pair).expect("a device has at most 16 pairs"))
}
