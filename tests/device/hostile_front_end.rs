//! A front-end that breaks every rule of the protocol: its message, ring or connection pays, and
//! the next front-end is served.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq as Req;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::driver::{Buffer, DriverRing};
use crate::support::frontend::{
    Frontend, Guest, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, message, region, region_of, state,
};
use crate::support::ram::{FILE_OFFSET, GUEST_BASE, Ram, USER_BASE};
use crate::support::worker::{Engine, TestDevice};
use crate::support::{Random, eventually};

const BASIC: u64 = VERSION_1 | PROTOCOL_FEATURES;

fn attached() -> (TestDevice, Frontend, Guest) {
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, BASIC);
    (device, frontend, guest)
}

/// Posts a frame with a kick and waits for it.
#[track_caller]
fn frame_passes(device: &TestDevice, guest: &mut Guest) {
    let before = device.stats().tx.frames;
    guest.ram.write(guest.heap, &[0; 128]);
    let at = guest.ram.guest(guest.heap);
    guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
    guest.tx.kick_now();
    eventually("a frame passes", || device.stats().tx.frames == before + 1);
    guest.tx.take_used();
}

/// A whole new front-end is served.
#[track_caller]
fn next_front_end_is_served(device: &TestDevice) {
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, BASIC);
    frame_passes(device, &mut guest);
}

#[test]
fn message_in_single_bytes_is_understood() {
    let (_device, frontend, _guest) = attached();
    for byte in message(Req::GET_FEATURES.into(), 1, &[]) {
        (&frontend.stream).write_all(&[byte]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(frontend.receive().unwrap().payload.len(), 8);
    // A split body, which others take for the end.
    let whole = message(Req::SET_VRING_ENABLE.into(), 9, &state(0, 1));
    frontend.send_raw(&whole[..15], &[]);
    std::thread::sleep(std::time::Duration::from_millis(5));
    frontend.send_raw(&whole[15..], &[]);
    assert_eq!(frontend.receive().unwrap().payload, 0u64.to_ne_bytes());
}

#[test]
fn several_messages_in_one_piece_are_answered_in_order() {
    let (_device, frontend, _guest) = attached();
    let batch = [
        message(Req::GET_QUEUE_NUM.into(), 1, &[]),
        message(Req::GET_MAX_MEM_SLOTS.into(), 1, &[]),
        message(Req::GET_STATUS.into(), 1, &[]),
    ]
    .concat();
    frontend.send_raw(&batch, &[]);
    for want in [16u64, 509, 0] {
        assert_eq!(frontend.receive().unwrap().payload, want.to_ne_bytes());
    }
}

#[test]
fn unknown_messages_are_refused_and_the_connection_goes_on() {
    let (device, frontend, mut guest) = attached();
    for code in [0, 4, 6, 7, 19, 22, 23, 26, 28, 33, 35, 41, 42, 45, 1000, u32::MAX] {
        frontend.send(code, 8, &[1; 40], &[]);
        let answer = frontend.receive().unwrap().payload;
        let want = if code == 4 { 0u64 } else { 1 };
        assert_eq!(answer, want.to_ne_bytes(), "{code}");
        frontend.send(code, 0, &[1; 40], &[guest.ram.fd()]);
    }
    frontend.sync();
    frame_passes(&device, &mut guest);
}

#[test]
fn oversized_message_ends_the_connection_only() {
    for size in [4097u32, 1 << 20, u32::MAX] {
        let (device, frontend, _guest) = attached();
        let header = [Req::SET_MEM_TABLE.into(), 1u32, size].map(u32::to_ne_bytes).concat();
        frontend.send_raw(&header, &[]);
        assert!(frontend.is_closed());
        next_front_end_is_served(&device);
    }
}

#[test]
fn message_of_another_version_ends_the_connection_only() {
    let (device, frontend, _guest) = attached();
    frontend.send_raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[]);
    assert!(frontend.is_closed());
    next_front_end_is_served(&device);
}

#[test]
fn connection_that_breaks_off_within_a_message_is_forgotten() {
    let (device, frontend, guest) = attached();
    let whole = message(Req::SET_MEM_TABLE.into(), 1, &[0; 40]);
    frontend.send_raw(&whole[..20], &[guest.ram.fd()]);
    drop(frontend);
    next_front_end_is_served(&device);
}

#[test]
fn arbitrary_bytes_and_messages_never_end_the_process() {
    let mut random = Random::seeded();
    let device = TestDevice::listen(Engine::Record);
    let ram = Ram::new(1 << 16);
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let other = UnixStream::pair().unwrap().0;
    let things = [ram.fd(), event.as_raw_fd(), other.as_raw_fd()];
    for _ in 0..150 {
        let frontend = Frontend::connect(&device.path());
        frontend.stream.set_nonblocking(true).unwrap();
        for _ in 0..random.below(40) {
            let len = random.below(80) as usize;
            let mut payload = random.bytes(len);
            if random.below(2) == 0 && len > 1 {
                payload[1..len.min(4)].fill(0);
                payload[0] %= 40;
            }
            let fds: Vec<RawFd> = (0..random.below(3)).map(|_| things[random.below(3) as usize]).collect();
            frontend.send(random.below(46) as u32, random.below(4) as u32 * 8, &payload, &fds);
        }
        let len = random.below(64) as usize;
        frontend.send_raw(&random.bytes(len), &[]);
    }
    next_front_end_is_served(&device);
}

#[test]
fn ring_index_beyond_the_last_is_refused() {
    let (device, frontend, mut guest) = attached();
    for code in [Req::SET_VRING_NUM, Req::SET_VRING_BASE, Req::SET_VRING_ENABLE] {
        for index in [33u32, 255, 65_536, u32::MAX] {
            let payload = [index.to_ne_bytes(), 1u32.to_ne_bytes()].concat();
            assert!(!frontend.tell(code, &payload, &[]), "{code:?} {index}");
        }
    }
    for code in [Req::SET_VRING_KICK, Req::SET_VRING_CALL, Req::SET_VRING_ERR] {
        assert!(!frontend.tell(code, &33u64.to_ne_bytes(), &[guest.tx.kick.as_raw_fd()]));
    }
    frame_passes(&device, &mut guest);
    // An answer the front-end waits for cannot be made up.
    frontend.send(Req::GET_VRING_BASE.into(), 0, &state(33, 0), &[]);
    assert!(frontend.is_closed());
    next_front_end_is_served(&device);
}

#[test]
fn ring_sizes_that_cannot_be_are_refused() {
    let (_device, frontend, _guest) = attached();
    frontend.get_vring_base(0);
    for size in [0, 1, 3, 300, 32_769, 65_536, u32::MAX] {
        assert!(!frontend.tell_ring(Req::SET_VRING_NUM, 0, size), "{size}");
    }
    assert!(frontend.tell_ring(Req::SET_VRING_NUM, 0, 32_768));
}

#[test]
fn missing_and_extra_descriptors_are_refused() {
    let (device, frontend, mut guest) = attached();
    let kick = guest.tx.kick.as_raw_fd();
    for fds in [&[][..], &[kick; 2], &[kick; 40], &[kick; 253]] {
        assert!(!frontend.tell(Req::SET_VRING_CALL, &1u64.to_ne_bytes(), fds), "{}", fds.len());
    }
    let table = [&1u32.to_ne_bytes()[..], &[0; 4], &region(&guest.ram)].concat();
    for count in [0, 2, 33] {
        assert!(!frontend.tell(Req::SET_MEM_TABLE, &table, &vec![guest.ram.fd(); count]), "{count}");
    }
    frame_passes(&device, &mut guest);
}

#[test]
fn features_never_offered_are_refused_and_not_honoured() {
    let (device, frontend, mut guest) = attached();
    assert!(!frontend.tell_u64(Req::SET_FEATURES, BASIC | 1 << 34));
    assert!(!frontend.tell_u64(Req::SET_PROTOCOL_FEATURES, REPLY_ACK | 1 << 14 | 1 << 40));
    frame_passes(&device, &mut guest);
}

#[test]
fn memory_regions_that_cannot_be_are_refused_and_the_old_ones_stay() {
    let (device, frontend, mut guest) = attached();
    let size = Guest::RAM_BYTES as u64;
    let pipe = UnixStream::pair().unwrap().0;
    let cases: &[(&str, Vec<u8>, RawFd)] = &[
        ("longer than the file", region_of(0, size + 1, USER_BASE, FILE_OFFSET), guest.ram.fd()),
        ("begins past the file", region_of(0, 4096, USER_BASE, FILE_OFFSET + size), guest.ram.fd()),
        ("wraps the file offset", region_of(0, 8192, USER_BASE, u64::MAX - 4095), guest.ram.fd()),
        ("wraps guest addresses", region_of(u64::MAX - 4095, 8192, USER_BASE, 0), guest.ram.fd()),
        ("wraps user addresses", region_of(0, 8192, u64::MAX - 4095, 0), guest.ram.fd()),
        ("is empty", region_of(0, 0, USER_BASE, 0), guest.ram.fd()),
        ("is no file", region_of(0, 4096, USER_BASE, 0), pipe.as_raw_fd()),
        ("is not writable", region_of(0, 1, USER_BASE, 0), -1),
    ];
    let passwd = File::open("/etc/passwd").unwrap();
    for (what, region, fd) in cases {
        let fd = if *fd < 0 { passwd.as_raw_fd() } else { *fd };
        let table = [&1u32.to_ne_bytes()[..], &[0; 4], region].concat();
        assert!(!frontend.tell(Req::SET_MEM_TABLE, &table, &[fd]), "{what}");
        let single = [&0u64.to_ne_bytes()[..], region].concat();
        assert!(!frontend.tell(Req::ADD_MEM_REG, &single, &[fd]), "{what}");
    }
    let overlap = region_of(GUEST_BASE + size - 1, 4096, 0x1000, 0);
    let single = [&0u64.to_ne_bytes()[..], &overlap].concat();
    assert!(!frontend.tell(Req::ADD_MEM_REG, &single, &[guest.ram.fd()]), "it overlaps");
    let unknown = [&0u64.to_ne_bytes()[..], &region_of(0, 4096, 0, 0)].concat();
    assert!(!frontend.tell(Req::REM_MEM_REG, &unknown, &[]), "there is none");
    frame_passes(&device, &mut guest);
}

#[test]
fn memory_slots_end_at_509() {
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    frontend.negotiate(BASIC, REPLY_ACK | 1 << 15);
    let ram = Ram::new(1 << 20);
    let slot = |n: u64| {
        let region = region_of(0x10_0000 * n, 0x1000, 0x10_0000 * n, 0);
        [&0u64.to_ne_bytes()[..], &region].concat()
    };
    for n in 1..=509 {
        assert!(frontend.tell(Req::ADD_MEM_REG, &slot(n), &[ram.fd()]), "{n}");
    }
    assert!(!frontend.tell(Req::ADD_MEM_REG, &slot(510), &[ram.fd()]));
    assert!(frontend.tell(Req::REM_MEM_REG, &slot(7), &[]));
    assert!(frontend.tell(Req::ADD_MEM_REG, &slot(510), &[ram.fd()]));
}

#[test]
fn ring_outside_memory_is_refused_and_one_that_ends_with_it_is_taken() {
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.features = BASIC;
    frontend.negotiate(BASIC, REPLY_ACK);
    assert!(frontend.set_mem_table(&guest.ram));
    let last = Guest::RAM_BYTES - 4096;
    let mut high = DriverRing::new(&guest.ram, last, 64);
    // The used ring's last byte is the memory's last byte but the padding in front of it.
    let used_end = high.used_at() + 6 + 8 * 64;
    high.base += (Guest::RAM_BYTES - used_end) & !63;
    for (ring, ok) in [(&high, true), (&DriverRing::new(&guest.ram, high.base + 64, 64), false)] {
        frontend.tell_ring(Req::SET_VRING_NUM, 1, 64);
        frontend.set_vring_addr(1, ring);
        assert_eq!(frontend.set_vring_fd(Req::SET_VRING_KICK, 1, &ring.kick), ok);
        frontend.get_vring_base(1);
    }
    // Misaligned: refused with its addresses already.
    let crooked = DriverRing::new(&guest.ram, 8, 64);
    assert!(!frontend.set_vring_addr(1, &crooked));
    guest.tx.reset();
    guest.start(&frontend);
    frame_passes(&device, &mut guest);
}

#[test]
fn memory_removed_under_a_running_ring_stops_it() {
    let (device, frontend, mut guest) = attached();
    frame_passes(&device, &mut guest);
    let single = [&0u64.to_ne_bytes()[..], &region(&guest.ram)].concat();
    assert!(frontend.tell(Req::REM_MEM_REG, &single, &[]));
    eventually("both rings are stopped", || {
        guest.tx.kick_now();
        device.stats().broken_rings == 2
    });
    frontend.get_vring_base(0);
    frontend.get_vring_base(1);
    guest.start(&frontend);
    frame_passes(&device, &mut guest);
}

#[test]
fn memory_replaced_under_running_rings_carries_on() {
    let (device, frontend, mut guest) = attached();
    for _ in 0..20 {
        assert!(frontend.set_mem_table(&guest.ram));
        frame_passes(&device, &mut guest);
        // The same memory through another file offset: everything is mapped anew.
        let lead = region_of(0, FILE_OFFSET, 0x1000, 0);
        let single = [&0u64.to_ne_bytes()[..], &lead].concat();
        assert!(frontend.tell(Req::ADD_MEM_REG, &single, &[guest.ram.fd()]));
        frame_passes(&device, &mut guest);
        assert!(frontend.tell(Req::REM_MEM_REG, &single, &[]));
        frame_passes(&device, &mut guest);
    }
}

#[test]
fn file_truncated_under_running_rings_costs_the_connection_only() {
    let (device, frontend, mut guest) = attached();
    frame_passes(&device, &mut guest);
    guest.ram.file().set_len(0).unwrap();
    // Our own mapping is gone as well: only descriptors can be used from here.
    guest.tx.kick.write(1).unwrap();
    assert!(frontend.is_closed());
    next_front_end_is_served(&device);
}

#[test]
fn file_truncated_while_a_frame_is_read_costs_the_connection_only() {
    let (device, frontend, mut guest) = attached();
    // The rings stay, the heap goes.
    let at = guest.ram.guest(Guest::RAM_BYTES - 4096);
    guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
    guest.ram.file().set_len(FILE_OFFSET + Guest::RAM_BYTES as u64 / 2).unwrap();
    guest.tx.kick_now();
    assert!(frontend.is_closed());
    next_front_end_is_served(&device);
}

#[test]
fn kick_descriptor_replaced_on_a_running_ring_moves_over() {
    let (device, frontend, mut guest) = attached();
    frame_passes(&device, &mut guest);
    let old = guest.tx.kick.try_clone().unwrap();
    guest.tx.kick = EventFd::new(EFD_NONBLOCK).unwrap();
    assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, 1, &guest.tx.kick));
    old.write(1).unwrap();
    frame_passes(&device, &mut guest);
    assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, 1, &guest.tx.kick));
    frame_passes(&device, &mut guest);
}

#[test]
fn ring_without_a_kick_descriptor_is_polled() {
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    frontend.negotiate(BASIC, REPLY_ACK);
    frontend.set_mem_table(&guest.ram);
    frontend.tell_ring(Req::SET_VRING_NUM, 1, 64);
    frontend.set_vring_addr(1, &guest.tx);
    assert!(frontend.tell_u64(Req::SET_VRING_KICK, 1 | 0x100));
    assert!(frontend.tell_u64(Req::SET_VRING_CALL, 1 | 0x100));
    frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 1);
    // The kick goes nowhere.
    frame_passes(&device, &mut guest);
    frame_passes(&device, &mut guest);
}

#[test]
fn kick_by_a_pipe_works_and_its_end_makes_the_ring_polled() {
    let (device, frontend, mut guest) = attached();
    let (read, mut write) = std::io::pipe().unwrap();
    assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, 1, &read));
    let at = guest.ram.guest(guest.heap);
    guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
    write.write_all(b"kick").unwrap();
    eventually("the frame passes", || device.stats().tx.frames == 1);
    drop(write);
    let wakes = || device.seen.lock().unwrap().wakes;
    frame_passes(&device, &mut guest);
    // The dead descriptor must not keep the worker awake beyond its polling, once a millisecond.
    let before = wakes();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(wakes() - before < 300, "{} wake-ups in 100 ms", wakes() - before);
}

#[test]
fn kick_descriptor_that_cannot_be_waited_for_is_refused() {
    let (device, frontend, mut guest) = attached();
    frontend.get_vring_base(1);
    assert!(!frontend.set_vring_fd(Req::SET_VRING_KICK, 1, guest.ram.file()));
    frontend.start_ring(1, &guest.tx);
    frame_passes(&device, &mut guest);
}

#[test]
fn blocking_and_unwritable_call_descriptors_never_hold_the_worker() {
    let (device, frontend, mut guest) = attached();
    // A pipe nobody reads: it fills up.
    let (read, write) = std::io::pipe().unwrap();
    assert!(frontend.set_vring_fd(Req::SET_VRING_CALL, 1, &write));
    let at = guest.ram.guest(guest.heap);
    for _ in 0..10_000 {
        guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
        guest.tx.kick_now();
        eventually("the chain comes back", || !guest.tx.take_used().is_empty());
    }
    // Its reader goes away.
    drop(read);
    frame_passes(&device, &mut guest);
    // An eventfd at its limit, blocking.
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    assert!(frontend.set_vring_fd(Req::SET_VRING_CALL, 1, &full));
    frame_passes(&device, &mut guest);
    // A file that cannot be written.
    let unwritable = File::open("/etc/passwd").unwrap();
    assert!(frontend.set_vring_fd(Req::SET_VRING_CALL, 1, &unwritable));
    frame_passes(&device, &mut guest);
    frame_passes(&device, &mut guest);
}

#[test]
fn reset_device_stops_and_disables_all_rings() {
    let (device, frontend, mut guest) = attached();
    frame_passes(&device, &mut guest);
    assert!(frontend.tell(Req::RESET_DEVICE, &[], &[]));
    guest.tx.reset();
    guest.rx.reset();
    guest.start(&frontend);
    frame_passes(&device, &mut guest);
}

#[test]
fn device_status_is_kept_and_zero_stops_the_rings() {
    let (device, frontend, mut guest) = attached();
    assert!(frontend.tell_u64(Req::SET_STATUS, 0xf));
    assert_eq!(frontend.ask_u64(Req::GET_STATUS), 0xf);
    frame_passes(&device, &mut guest);
    assert!(frontend.tell_u64(Req::SET_STATUS, 0));
    guest.tx.reset();
    guest.rx.reset();
    guest.start(&frontend);
    frame_passes(&device, &mut guest);
}

#[test]
fn mtu_no_guest_can_use_is_refused() {
    let (_device, frontend, _guest) = attached();
    for bad in [0, 575, 65_522, 1 << 40] {
        assert!(!frontend.tell_u64(Req::NET_SET_MTU, bad), "{bad}");
    }
    assert!(frontend.tell_u64(Req::NET_SET_MTU, 9000));
    assert!(frontend.tell_u64(Req::NET_SET_MTU, 576));
}

#[test]
fn configuration_beyond_the_space_is_answered_with_nothing() {
    let (_device, frontend, _guest) = attached();
    let ask = |offset: u32, size: u32| {
        let payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
        frontend.ask(Req::GET_CONFIG, &payload).payload.len()
    };
    assert_eq!(ask(0, 256), 12 + 256);
    assert_eq!(ask(0, 257), 0);
    assert_eq!(ask(u32::MAX, 2), 0);
    assert!(frontend.tell(
        Req::SET_CONFIG,
        &[[0u32, 6, 0].map(u32::to_ne_bytes).concat(), vec![0; 6]].concat(),
        &[]
    ));
    assert!(!frontend.tell(Req::SET_CONFIG, &[0u32, 6, 0].map(u32::to_ne_bytes).concat(), &[]));
}

#[test]
fn inflight_area_longer_than_its_file_is_refused() {
    let (_device, frontend, guest) = attached();
    let area = |size: u64, offset: u64| {
        [&size.to_ne_bytes()[..], &offset.to_ne_bytes(), &[2, 0, 64, 0], &[0; 4]].concat()
    };
    assert!(frontend.tell(Req::SET_INFLIGHT_FD, &area(4096, 0), &[guest.ram.fd()]));
    assert!(!frontend.tell(Req::SET_INFLIGHT_FD, &area(1 << 40, 0), &[guest.ram.fd()]));
    assert!(!frontend.tell(Req::SET_INFLIGHT_FD, &area(4096, u64::MAX), &[guest.ram.fd()]));
    assert!(!frontend.tell(Req::SET_INFLIGHT_FD, &area(4096, 0), &[]));
}
