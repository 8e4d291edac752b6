//! A guest that changes its memory while it is captured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use vunet::capture::{Ended, Rings, Settings, open};

use crate::reader::read;
use crate::support::driver::WRITE;
use crate::support::eventually;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::worker::{Engine, TestDevice};

const FRAME_BYTES: usize = 5000;
const HEADER_BYTES: usize = 12;
const BUFFER_BYTES: u32 = 8192;
const ROUNDS: usize = 1000;
/// First bytes of a frame of the guest, which are copied once.
const HEAD_BYTES: usize = 256;

#[test]
fn memory_that_changes_meanwhile_spoils_neither_lengths_nor_what_was_judged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("capture");
    let rings = Rings::new(1);
    let (tell, ended) = channel();
    let sink = open(&path).unwrap().into();
    let started = rings.start(&Settings::default(), "vm", sink, move |end| tell.send(end).unwrap());
    let recorder = started.unwrap().0.remove(0);

    let device = TestDevice::listen(Engine::EchoReserved);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES);
    device.record(recorder);
    let (sent, buffer) = (guest.heap, guest.heap + 0x4000);
    let ram = Arc::clone(&guest.ram);
    // A virtio-net header that asks for nothing, and stays so.
    ram.write(sent, &[0; HEADER_BYTES]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0u8;
            while !stop.load(Ordering::Relaxed) {
                round = round.wrapping_add(1);
                ram.write(sent + HEADER_BYTES, &[round; FRAME_BYTES]);
                ram.write(buffer, &[!round; HEADER_BYTES + FRAME_BYTES]);
            }
        });
        for _ in 0..ROUNDS {
            guest.rx.set_descriptor(0, guest.ram.guest(buffer), BUFFER_BYTES, WRITE, 0);
            guest.rx.make_available(0);
            guest.rx.kick_now();
            let len = (HEADER_BYTES + FRAME_BYTES) as u32;
            guest.tx.set_descriptor(0, guest.ram.guest(sent), len, 0, 0);
            guest.tx.make_available(0);
            guest.tx.kick_now();
            let (mut back, mut came) = (false, false);
            eventually("the frame comes back", || {
                back |= !guest.tx.take_used().is_empty();
                came |= !guest.rx.take_used().is_empty();
                back && came
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
    let seen = device.frames();
    drop(device);
    let ended = ended.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(matches!(ended, Ended::Drained), "{ended:?}");
    let capture = read(&std::fs::read(&path).unwrap());
    let (out, inward): (Vec<_>, Vec<_>) = capture.frames.iter().partition(|frame| frame.flags & 2 != 0);
    assert_eq!((out.len(), inward.len(), seen.len()), (ROUNDS, ROUNDS, ROUNDS));
    assert!(capture.frames.iter().all(|frame| frame.bytes.len() == FRAME_BYTES));
    assert!(capture.frames.iter().all(|frame| frame.original_bytes as usize == FRAME_BYTES));
    for (captured, judged) in out.iter().zip(&seen) {
        assert_eq!(
            captured.bytes[..HEAD_BYTES],
            judged.bytes[..HEAD_BYTES],
            "what was judged is what is shown"
        );
    }
}
