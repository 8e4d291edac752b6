//! Coming and going: attaching in every way, leaving, coming back, growing nothing.

use std::os::unix::net::{UnixListener, UnixStream};

use vunet::config::Attach;
use vunet::device::{DeviceConfig, DeviceEvent};

use crate::support::driver::Buffer;
use crate::support::eventually;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::worker::{Engine, TestDevice, config};

const BASIC: u64 = VERSION_1 | PROTOCOL_FEATURES;

fn send_one(device: &TestDevice, guest: &mut Guest) {
    let before = device.stats().tx.frames;
    let at = guest.ram.guest(guest.heap);
    guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
    guest.tx.kick_now();
    eventually("the frame is seen", || device.stats().tx.frames == before + 1);
    guest.tx.take_used();
}

#[test]
fn front_end_that_comes_back_finds_its_guest_where_it_was() {
    let device = TestDevice::listen(Engine::Record);
    let mut guest = Guest::new(64);
    for _ in 0..3 {
        let mut frontend = Frontend::connect(&device.path());
        guest.attach(&mut frontend, BASIC);
        send_one(&device, &mut guest);
    }
    let events = device.events();
    assert!(!events.contains(&DeviceEvent::GuestReset));
    assert_eq!(events.iter().filter(|e| **e == DeviceEvent::RingsUp).count(), 3);
}

#[test]
fn guest_that_started_over_while_detached_is_told_from_one_that_did_not() {
    let device = TestDevice::listen(Engine::Record);
    let mut guest = Guest::new(64);
    let mut frontend = Frontend::connect(&device.path());
    guest.attach(&mut frontend, BASIC);
    send_one(&device, &mut guest);
    drop(frontend);
    guest.tx.reset();
    guest.rx.reset();
    let mut frontend = Frontend::connect(&device.path());
    guest.attach(&mut frontend, BASIC);
    send_one(&device, &mut guest);
    assert_eq!(device.events().iter().filter(|e| **e == DeviceEvent::GuestReset).count(), 1);
}

#[test]
fn one_off_session_ends_when_the_first_front_end_leaves() {
    let mut device = TestDevice::listen_with(Engine::Record, DeviceConfig { one_off: true, ..config() });
    // Someone looking whether the socket is alive is no front-end.
    drop(UnixStream::connect(device.path()).unwrap());
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, BASIC);
    send_one(&device, &mut guest);
    drop(frontend);
    device.session_ended().unwrap();
    assert!(!device.path().exists());
}

#[test]
fn inherited_connection_is_served_and_its_end_is_the_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut device = TestDevice::start(Engine::Record, config(), Attach::Inherited(theirs.into())).unwrap();
    let mut frontend = Frontend::new(ours);
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, BASIC);
    send_one(&device, &mut guest);
    drop(frontend);
    device.session_ended().unwrap();
}

#[test]
fn inherited_listener_serves_one_front_end_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let device = TestDevice::start(Engine::Record, config(), Attach::Inherited(listener.into())).unwrap();
    let mut guest = Guest::new(64);
    for _ in 0..3 {
        let mut frontend = Frontend::connect(&path);
        guest.attach(&mut frontend, BASIC);
        send_one(&device, &mut guest);
    }
    drop(device);
    assert!(path.exists(), "a socket that was not ours is not removed");
}

#[test]
fn client_connects_when_the_front_end_appears_and_again_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let device = TestDevice::start(Engine::Record, config(), Attach::Connect(path.clone())).unwrap();
    let mut guest = Guest::new(64);
    for _ in 0..3 {
        std::thread::sleep(std::time::Duration::from_millis(60));
        let listener = UnixListener::bind(&path).unwrap();
        let mut frontend = Frontend::new(listener.accept().unwrap().0);
        guest.attach(&mut frontend, BASIC);
        send_one(&device, &mut guest);
        drop(listener);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn shutdown_ends_a_session_at_once_whatever_it_waits_for() {
    // Nobody attached; one that said half a message; one that runs.
    drop(TestDevice::listen(Engine::Record));
    let device = TestDevice::listen(Engine::Record);
    let frontend = Frontend::connect(&device.path());
    frontend.send_raw(&[1, 0, 0, 0, 1], &[]);
    drop(device);
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, BASIC);
    let path = device.path();
    drop(device);
    assert!(!path.exists());
}

#[test]
fn socket_in_use_is_refused_at_once_with_a_clear_error() {
    let device = TestDevice::listen(Engine::Record);
    let refused = TestDevice::start(Engine::Record, config(), Attach::Listen(device.path()));
    let error = refused.err().expect("it is in use").to_string();
    assert!(error.contains("another process is listening"), "{error}");
    assert!(error.contains("--socket-path"), "{error}");
}

#[test]
fn idle_device_sleeps() {
    let device = TestDevice::listen(Engine::Record);
    let mut guest = Guest::new(64);
    let mut frontend = Frontend::connect(&device.path());
    guest.attach(&mut frontend, BASIC);
    send_one(&device, &mut guest);
    let wakes = || device.seen.lock().unwrap().wakes;
    std::thread::sleep(std::time::Duration::from_millis(20));
    let before = wakes();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(wakes(), before);
}
