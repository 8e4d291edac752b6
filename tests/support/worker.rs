//! A worker for tests: the device's queues in an event loop, with a loopback for an engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tempfile::TempDir;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vunet::capture::Recorder;
use vunet::config::{Attach, IpMtu};
use vunet::device::{
    DeviceConfig, DeviceEvent, DeviceQueues, DeviceStats, Drained, KickKind, KickWatch, SessionError, Taken,
    device,
};
use vunet::engine::guest_port::{GuestPort, ReserveError};
use vunet::frame::QueuePair;
use vunet::wire::vnet::VnetHeader;

/// A frame as the worker saw it, or is to send it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Frame {
    pub(crate) vnet: VnetHeader,
    pub(crate) bytes: Vec<u8>,
    pub(crate) pair: QueuePair,
}

/// What the worker saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) frames: Vec<Frame>,
    pub(crate) events: Vec<DeviceEvent>,
    pub(crate) stats: DeviceStats,
    /// Frames refused by the receive side for good.
    pub(crate) too_small: u64,
    pub(crate) wakes: u64,
}

/// What the loopback does with frames from the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    /// Sends each back to its pair.
    Echo,
    /// Sends each back to its pair through reservations larger than needed, some cancelled first.
    EchoReserved,
    /// Keeps each in [`Seen::frames`].
    Record,
}

/// A device that runs: session, worker, socket.
pub(crate) struct TestDevice {
    pub(crate) seen: Arc<Mutex<Seen>>,
    shutdown: EventFd,
    session: Option<JoinHandle<Result<(), SessionError>>>,
    worker: Option<JoinHandle<()>>,
    inject: Sender<Frame>,
    inject_event: Arc<EventFd>,
    recorder: Arc<Mutex<Option<Box<Recorder>>>>,
    dir: Option<TempDir>,
}

pub(crate) fn config() -> DeviceConfig {
    DeviceConfig { mac: None, ip_mtu: IpMtu::DEFAULT, queue_pairs: 1, one_off: false }
}

impl TestDevice {
    /// Listens on a socket of its own.
    pub(crate) fn listen(engine: Engine) -> TestDevice {
        TestDevice::listen_with(engine, config())
    }

    pub(crate) fn listen_with(engine: Engine, config: DeviceConfig) -> TestDevice {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("s");
        let mut device = TestDevice::start(engine, config, Attach::Listen(path)).expect("a device");
        device.dir = Some(dir);
        device
    }

    pub(crate) fn start(
        engine: Engine,
        config: DeviceConfig,
        attach: Attach,
    ) -> Result<TestDevice, SessionError> {
        let (session, mut queues) = device(config, 1).expect("descriptors");
        let queues = queues.remove(0);
        let shutdown = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
        let session = session.spawn(attach, shutdown.try_clone().expect("a descriptor"))?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let inject_event = Arc::new(EventFd::new(EFD_NONBLOCK).expect("a descriptor"));
        let (inject, injected) = channel();
        let recorder = Arc::new(Mutex::new(None));
        let worker = Worker {
            queues,
            engine,
            seen: Arc::clone(&seen),
            stop: shutdown.try_clone().expect("a descriptor"),
            injected,
            inject_event: Arc::clone(&inject_event),
            waiting: VecDeque::new(),
            pending: Vec::new(),
            drains: 0,
            recorder: Arc::clone(&recorder),
        };
        let worker = std::thread::spawn(move || worker.run());
        Ok(TestDevice {
            seen,
            shutdown,
            session: Some(session),
            worker: Some(worker),
            inject,
            inject_event,
            recorder,
            dir: None,
        })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.as_ref().map_or_else(|| Path::new("/nowhere").to_owned(), |d| d.path().join("s"))
    }

    /// Sends a frame to the guest.
    pub(crate) fn inject(&self, frame: Frame) {
        self.inject.send(frame).expect("the worker runs");
        self.inject_event.write(1).expect("a wake-up");
    }

    /// Records what crosses the device, from before the next batch on. The guest may change frames meanwhile.
    pub(crate) fn record(&self, recorder: Recorder) {
        *self.recorder.lock().expect("the worker lives") = Some(Box::new(recorder));
    }

    pub(crate) fn stats(&self) -> DeviceStats {
        self.seen.lock().expect("the worker lives").stats
    }

    pub(crate) fn frames(&self) -> Vec<Frame> {
        self.seen.lock().expect("the worker lives").frames.clone()
    }

    pub(crate) fn events(&self) -> Vec<DeviceEvent> {
        self.seen.lock().expect("the worker lives").events.clone()
    }

    /// Waits for the session to end by itself and returns how.
    pub(crate) fn session_ended(&mut self) -> Result<(), SessionError> {
        self.session.take().expect("a session").join().expect("the session does not panic")
    }
}

impl Drop for TestDevice {
    fn drop(&mut self) {
        self.shutdown.write(1).expect("a shutdown");
        let session = self.session.take().map(JoinHandle::join);
        let worker = self.worker.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            if let Some(ended) = session {
                ended.expect("the session does not panic").expect("the session ends well");
            }
            worker.expect("a worker").expect("the worker does not panic");
        }
    }
}

/// Ring numbers stand for kicks; these for the rest.
const COMMANDS: u64 = 1 << 32;
const STOP: u64 = 2 << 32;
const INJECT: u64 = 3 << 32;

struct Watch<'a>(&'a Epoll);

impl KickWatch for Watch<'_> {
    fn watch(&mut self, fd: RawFd, ring: u16) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, u64::from(ring)))
    }

    fn unwatch(&mut self, fd: RawFd) {
        self.0.ctl(ControlOperation::Delete, fd, EpollEvent::default()).expect("it was watched");
    }
}

struct Worker {
    queues: DeviceQueues,
    engine: Engine,
    seen: Arc<Mutex<Seen>>,
    stop: EventFd,
    injected: Receiver<Frame>,
    inject_event: Arc<EventFd>,
    /// Frames that wait for receive buffers.
    waiting: VecDeque<Frame>,
    /// Pairs with more to drain.
    pending: Vec<QueuePair>,
    /// Drains so far: each looks further ahead than the one before, up to the most, and again.
    drains: usize,
    recorder: Arc<Mutex<Option<Box<Recorder>>>>,
}

impl Worker {
    fn run(mut self) {
        let epoll = Epoll::new().expect("a descriptor");
        for (fd, data) in [
            (self.queues.command_fd(), COMMANDS),
            (self.stop.as_raw_fd(), STOP),
            (self.inject_event.as_raw_fd(), INJECT),
        ] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data)).expect("watchable");
        }
        loop {
            let mut ready = [EpollEvent::default(); 16];
            let timeout = match (self.pending.is_empty(), self.queues.polled()) {
                (false, _) => 0,
                (true, true) => 1,
                (true, false) => -1,
            };
            let count = match epoll.wait(timeout, &mut ready) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => panic!("epoll: {e}"),
            };
            let mut drain = std::mem::take(&mut self.pending);
            for event in &ready[..count] {
                match event.data() {
                    STOP => return,
                    COMMANDS => self.commands(&epoll, &mut drain),
                    INJECT => {
                        let _ = self.inject_event.read();
                        self.waiting.extend(self.injected.try_iter());
                    }
                    ring => {
                        let kind = self.queues.kicked(ring as u16);
                        note(kind, &mut drain);
                    }
                }
            }
            if self.queues.polled() {
                drain.extend(self.queues.split().0.pairs_running());
            }
            self.batch(&drain);
        }
    }

    fn commands(&mut self, epoll: &Epoll, drain: &mut Vec<QueuePair>) {
        let mut events = Vec::new();
        self.queues.handle_commands(&mut Watch(epoll), &mut events);
        for event in &events {
            if let DeviceEvent::Ready(kind) = event {
                note(*kind, drain);
            }
        }
        let events = events.into_iter().filter(|e| !matches!(e, DeviceEvent::Ready(_)));
        self.seen.lock().expect("the test lives").events.extend(events);
    }

    fn batch(&mut self, drain: &[QueuePair]) {
        let mut frames = Vec::new();
        if let Some(recorder) = self.recorder.lock().expect("the test lives").take() {
            self.queues.set_recorder(Some(recorder));
        }
        let (tx, rx) = self.queues.split();
        for pair in drain {
            self.drains += 1;
            tx.set_ahead(self.drains % (vunet::limits::TX_AHEAD_FRAMES_MAX + 1));
            let mut coming: VecDeque<Vec<u8>> = VecDeque::new();
            let each = |event: vunet::device::TxEvent<'_>| {
                let frame = match event {
                    vunet::device::TxEvent::Frame(frame) => frame,
                    vunet::device::TxEvent::Coming(heads) => {
                        coming = heads.iter().map(<[u8]>::to_vec).collect();
                        return Taken::Yes;
                    }
                    vunet::device::TxEvent::Unfit(..) | vunet::device::TxEvent::BatchEnd => {
                        return Taken::Yes;
                    }
                };
                if let Some(head) = coming.pop_front() {
                    assert_eq!(frame.head, head, "the frames that were coming are those that come");
                }
                let mut bytes = vec![0; frame.whole.len()];
                frame.whole.copy_to(&mut bytes);
                if let Some(recorder) = rx.recorder() {
                    recorder.from_guest(&frame);
                    recorder.judged(None);
                    // What was judged.
                    bytes[..frame.head.len()].copy_from_slice(frame.head);
                }
                assert_eq!(frame.head, &bytes[..frame.head.len()], "head and payload are one frame");
                frames.push(Frame { vnet: frame.vnet, bytes, pair: frame.pair });
                Taken::Yes
            };
            if tx.drain(*pair, 64, each) == Drained::More && !self.pending.contains(pair) {
                self.pending.push(*pair);
            }
        }
        let mut seen = self.seen.lock().expect("the test lives");
        match self.engine {
            Engine::Echo | Engine::EchoReserved => {
                if rx.recorder().is_some() {
                    seen.frames.extend(frames.iter().cloned());
                }
                self.waiting.extend(frames);
            }
            Engine::Record => seen.frames.extend(frames),
        }
        while let Some(frame) = self.waiting.front() {
            let sent = match self.engine {
                Engine::EchoReserved => send_reserved(rx, frame),
                _ => rx.send(frame.pair, header_for(rx, frame), &frame.bytes),
            };
            match sent {
                Ok(()) => {}
                Err(ReserveError::Full | ReserveError::Down) => break,
                Err(ReserveError::TooSmall) => seen.too_small += 1,
            }
            self.waiting.pop_front();
        }
        drop(seen);
        self.queues.publish();
        let mut seen = self.seen.lock().expect("the test lives");
        seen.stats = *self.queues.stats();
        seen.wakes += 1;
    }
}

fn note(kind: KickKind, drain: &mut Vec<QueuePair>) {
    if let KickKind::Tx(pair) = kind {
        drain.push(pair);
    }
}

/// The frame's own header, as far as the driver takes it.
fn header_for(rx: &impl GuestPort, frame: &Frame) -> VnetHeader {
    let takes = rx.offloads();
    let mut vnet = frame.vnet;
    if !takes.tso4 {
        vnet.gso = None;
    }
    if !takes.checksum {
        vnet.checksum = vunet::wire::vnet::Checksum::Complete;
    }
    vnet
}

/// Sends a frame the way a socket fills it: more reserved than needed, the body written in place,
/// the first bytes at the end.
fn send_reserved(rx: &mut impl GuestPort, frame: &Frame) -> Result<(), ReserveError> {
    let len = frame.bytes.len();
    if len.is_multiple_of(3) {
        rx.reserve(frame.pair, len, 2 * len)?;
        rx.cancel();
    }
    let room = rx.reserve(frame.pair, len, (3 * len).min(vunet::limits::FRAME_BYTES_MAX))?;
    assert!(room >= len, "what was reserved is at least what was asked for");
    let head = len.min(54);
    assert_eq!(rx.reserved(head).copy_from(&frame.bytes[head..]), len - head);
    let vnet = header_for(rx, frame);
    rx.commit(vnet, &frame.bytes[..head], len);
    Ok(())
}
