//! A way that is full: frames from the guest wait in their ring.

use std::io;
use std::os::fd::RawFd;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vunet::config::{Attach, IpMtu};
use vunet::device::{DeviceConfig, DeviceQueues, Drained, KickWatch, Taken, TxEvent, device};
use vunet::frame::QueuePair;
use vunet::wire::vnet::VnetHeader;

use crate::support::Random;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::nic::{EVENT_IDX, Nic, Shape};

const SHAPE: Shape = Shape { rx_bytes: 0x1000, rx_pieces: 1, tx_pieces: 3, indirect: false };

/// Kicks are not waited for here.
struct NoKicks;

impl KickWatch for NoKicks {
    fn watch(&mut self, _: RawFd, _: u16) -> io::Result<()> {
        Ok(())
    }
    fn unwatch(&mut self, _: RawFd) {}
}

/// A device whose rings run, worked by the test itself, and its driver.
fn attached() -> (DeviceQueues, Nic, Frontend) {
    let config = DeviceConfig { mac: None, ip_mtu: IpMtu::DEFAULT, queue_pairs: 1, one_off: false };
    let (session, mut queues) = device(config, 1).expect("descriptors");
    let mut queues = queues.remove(0);
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("s");
    let shutdown = EventFd::new(EFD_NONBLOCK).expect("a descriptor");
    let session = session.spawn(Attach::Listen(path.clone()), shutdown).expect("a session");
    let front_end = std::thread::spawn(move || {
        let mut frontend = Frontend::connect(&path);
        let mut guest = Guest::new(64);
        guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX);
        (Nic::new(guest, SHAPE), frontend)
    });
    while !front_end.is_finished() {
        queues.handle_commands(&mut NoKicks, &mut Vec::new());
        std::thread::yield_now();
    }
    let (nic, frontend) = front_end.join().expect("a front-end");
    drop(session);
    (queues, nic, frontend)
}

/// Drains a way that takes `room` frames; what it took, and how the drain ended.
fn drain(queues: &mut DeviceQueues, budget: usize, mut room: usize) -> (Vec<Vec<u8>>, Drained) {
    let mut frames = Vec::new();
    let (tx, _) = queues.split();
    let drained = tx.drain(QueuePair(0), budget, |event| {
        let TxEvent::Frame(frame) = event else { return Taken::Yes };
        if room == 0 {
            return Taken::NotNow;
        }
        room -= 1;
        let mut bytes = vec![0; frame.whole.len()];
        frame.whole.copy_to(&mut bytes);
        frames.push(bytes);
        Taken::Yes
    });
    (frames, drained)
}

#[test]
fn frames_that_are_not_taken_stay_in_their_ring_in_order() {
    for ahead in [1, 2, 3, 16, 17] {
        frames_not_taken_stay(ahead);
    }
}

fn frames_not_taken_stay(ahead: usize) {
    let (mut queues, mut nic, _frontend) = attached();
    queues.split().0.set_ahead(ahead);
    let mut random = Random::seeded();
    let sent: Vec<Vec<u8>> = (0..8).map(|n| random.bytes(60 + 40 * n)).collect();
    for frame in &sent {
        assert!(nic.send(&VnetHeader::default().emit(), frame, &mut random), "room");
    }
    let mut came = Vec::new();
    for room in [3, 0, 0, 1] {
        let (frames, drained) = drain(&mut queues, 64, room);
        assert_eq!((frames.len(), drained), (room, Drained::Blocked));
        came.extend(frames);
        let used = nic.guest.tx.take_used();
        assert_eq!(used.len(), room, "only what left is the guest's again");
    }
    queues.publish();
    assert_eq!(queues.stats().tx.frames, 4);
    let (frames, drained) = drain(&mut queues, 2, usize::MAX);
    assert_eq!((frames.len(), drained), (2, Drained::More));
    came.extend(frames);
    let (frames, drained) = drain(&mut queues, 64, usize::MAX);
    assert_eq!(drained, Drained::Empty);
    came.extend(frames);
    assert_eq!(came, sent);
    assert_eq!(nic.guest.tx.take_used().len(), 4);
    queues.publish();
    assert_eq!(queues.stats().tx.frames, 8);
}
