//! A thousand front-ends, one after another: nothing of them may stay. A process of its own, because
//! it counts the process's descriptors, threads and memory.

#[expect(dead_code, reason = "the other device tests use the rest")]
mod support;

use vunet::device::DeviceEvent;

use support::driver::Buffer;
use support::eventually;
use support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use support::worker::{Engine, TestDevice};

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).expect("a process").count()
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process");
    let line = status.lines().find(|l| l.starts_with("VmRSS")).expect("a resident size");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[test]
fn thousand_reconnects_leave_no_descriptor_thread_or_memory_behind() {
    let device = TestDevice::listen(Engine::Record);
    let mut guest = Guest::new(64);
    let mut settled = (0, 0, 0);
    for round in 0..1000 {
        let mut frontend = Frontend::connect(&device.path());
        guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES);
        let at = guest.ram.guest(guest.heap);
        guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
        guest.tx.kick_now();
        eventually("the frame is seen", || !guest.tx.take_used().is_empty());
        drop(frontend);
        let gone = || device.events().iter().filter(|e| **e == DeviceEvent::Detached).count();
        eventually("the device lets go", || gone() == round + 1);
        if round == 100 {
            settled = (count("/proc/self/fd"), count("/proc/self/task"), resident_kib());
        }
    }
    assert_eq!(count("/proc/self/fd"), settled.0);
    assert_eq!(count("/proc/self/task"), settled.1);
    assert!(resident_kib() < settled.2 + 4096, "{} KiB after {} KiB", resident_kib(), settled.2);
}
