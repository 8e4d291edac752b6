//! The message orders of real front-ends, replayed.

use vhost::vhost_user::message::FrontendReq as Req;
use vunet::addr::MacAddr;
use vunet::config::IpMtu;
use vunet::device::{DeviceConfig, DeviceEvent};

use crate::support::driver::{Buffer, DriverRing};
use crate::support::eventually;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, region, state};
use crate::support::worker::{Engine, TestDevice, config};

const MRG_RXBUF: u64 = 1 << 15;
const EVENT_IDX: u64 = 1 << 29;

/// Sends one frame through the loopback and checks that it comes back.
fn echo_works(guest: &mut Guest) {
    let header = guest.header_bytes();
    let rx_at = guest.heap;
    let tx_at = guest.heap + 0x10000;
    let frame: Vec<u8> = (0..100u8).collect();
    let old = guest.rx.avail_index();
    let at = guest.ram.guest(rx_at);
    guest.rx.post(&[Buffer { guest: at, len: 2048, writable: true }]);
    guest.rx.kick_after(old);
    guest.ram.write(tx_at, &vec![0; header]);
    guest.ram.write(tx_at + header, &frame);
    let old = guest.tx.avail_index();
    let at = guest.ram.guest(tx_at);
    guest.tx.post(&[Buffer { guest: at, len: (header + frame.len()) as u32, writable: false }]);
    guest.tx.kick_after(old);
    let mut used = Vec::new();
    eventually("the frame comes back", || {
        used.extend(guest.rx.take_used());
        !used.is_empty()
    });
    assert_eq!(used[0].1 as usize, header + frame.len());
    assert_eq!(guest.ram.read(rx_at + header, frame.len()), frame);
    eventually("the sent buffer is given back", || !guest.tx.take_used().is_empty());
}

#[test]
fn qemu_enabling_rings_before_setting_features_is_served() {
    let device = TestDevice::listen(Engine::Echo);
    let frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(256);
    // As QEMU 7.2 does: everything acknowledged it knows, rings enabled once and first.
    let offered = frontend.ask_u64(Req::GET_FEATURES);
    let protocol = frontend.ask_u64(Req::GET_PROTOCOL_FEATURES) & 0x1fdff;
    frontend.tell_u64(Req::SET_PROTOCOL_FEATURES, protocol);
    assert_eq!(frontend.ask_u64(Req::GET_QUEUE_NUM), 16);
    assert_eq!(frontend.ask_u64(Req::GET_MAX_MEM_SLOTS), 509);
    let (backend, _ours) = std::os::unix::net::UnixStream::pair().unwrap();
    frontend.set_vring_fd(Req::SET_BACKEND_REQ_FD, 0, &backend);
    frontend.tell(Req::SET_OWNER, &[], &[]);
    frontend.ask_u64(Req::GET_FEATURES);
    for (index, ring) in [(0, &guest.rx), (1, &guest.tx)] {
        frontend.set_vring_fd(Req::SET_VRING_CALL, index, &ring.call);
        frontend.set_vring_fd(Req::SET_VRING_ERR, index, &ring.err);
    }
    for _ in 0..2 {
        frontend.tell_ring(Req::SET_VRING_ENABLE, 0, 1);
        frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 1);
    }
    // The driver is ready.
    frontend.tell_u64(Req::NET_SET_MTU, 1400);
    guest.features = offered & (VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF | EVENT_IDX);
    frontend.tell_u64(Req::SET_FEATURES, guest.features);
    // Memory goes region by region once slots were negotiated.
    let single = [&0u64.to_ne_bytes()[..], &region(&guest.ram)].concat();
    frontend.tell(Req::ADD_MEM_REG, &single, &[guest.ram.fd()]);
    guest.rx.event_idx = true;
    guest.tx.event_idx = true;
    for (index, ring) in [(0u16, &guest.rx), (1, &guest.tx)] {
        frontend.tell_ring(Req::SET_VRING_NUM, index, u32::from(ring.size));
        frontend.tell_ring(Req::SET_VRING_BASE, index, 0);
        frontend.set_vring_addr(index, ring);
        frontend.set_vring_fd(Req::SET_VRING_KICK, index, &ring.kick);
        frontend.set_vring_fd(Req::SET_VRING_CALL, index, &ring.call);
    }
    frontend.sync();
    echo_works(&mut guest);
    assert!(device.events().contains(&DeviceEvent::IpMtu(1400)));
}

#[test]
fn qemu_repeating_messages_for_each_queue_pair_is_served() {
    let device = TestDevice::listen(Engine::Echo);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.features = VERSION_1 | PROTOCOL_FEATURES;
    frontend.negotiate(guest.features, REPLY_ACK | 1);
    for pair in 0..2 {
        assert!(frontend.tell_u64(Req::SET_FEATURES, guest.features));
        assert!(frontend.set_mem_table(&guest.ram));
        if pair == 0 {
            frontend.start_ring(0, &guest.rx);
            frontend.start_ring(1, &guest.tx);
        }
        assert!(frontend.tell_ring(Req::SET_VRING_ENABLE, 2 * pair, u32::from(pair == 0)));
        assert!(frontend.tell_ring(Req::SET_VRING_ENABLE, 2 * pair + 1, u32::from(pair == 0)));
    }
    echo_works(&mut guest);
}

#[test]
fn guest_reboot_over_the_same_connection_starts_from_scratch() {
    let device = TestDevice::listen(Engine::Echo);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES);
    for _ in 0..3 {
        echo_works(&mut guest);
    }
    assert_eq!(frontend.get_vring_base(0), 3);
    assert_eq!(frontend.get_vring_base(1), 3);
    frontend.tell_ring(Req::SET_VRING_ENABLE, 0, 0);
    frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 0);
    guest.rx.reset();
    guest.tx.reset();
    guest.start(&frontend);
    echo_works(&mut guest);
    assert_eq!(device.events().iter().filter(|e| **e == DeviceEvent::GuestReset).count(), 1);
}

#[test]
fn front_end_that_comes_back_with_a_wrong_ring_base_goes_on_where_the_used_ring_stands() {
    let device = TestDevice::listen(Engine::Echo);
    let mut guest = Guest::new(64);
    for round in 0..3u32 {
        let mut frontend = Frontend::connect(&device.path());
        frontend.negotiate(VERSION_1 | PROTOCOL_FEATURES, REPLY_ACK | 1);
        guest.features = VERSION_1 | PROTOCOL_FEATURES;
        // Two buffers are posted while nobody works the ring, as cloud-hypervisor's guest does.
        assert!(frontend.set_mem_table(&guest.ram));
        for (index, ring) in [(0u16, &guest.rx), (1, &guest.tx)] {
            frontend.tell_ring(Req::SET_VRING_NUM, index, 64);
            frontend.set_vring_addr(index, ring);
            frontend.tell_ring(Req::SET_VRING_BASE, index, 40 + round);
            frontend.set_vring_fd(Req::SET_VRING_CALL, index, &ring.call);
            frontend.set_vring_fd(Req::SET_VRING_KICK, index, &ring.kick);
            frontend.tell_ring(Req::SET_VRING_ENABLE, index, 1);
        }
        echo_works(&mut guest);
        echo_works(&mut guest);
    }
    assert!(!device.events().contains(&DeviceEvent::GuestReset));
}

#[test]
fn user_mode_linux_padding_its_memory_table_and_leaving_the_control_queue_is_served() {
    let mac = MacAddr([0x52, 0x54, 0, 1, 2, 3]);
    let config = DeviceConfig { mac: Some(mac), ip_mtu: IpMtu::new(1400).unwrap(), ..config() };
    let device = TestDevice::listen_with(Engine::Echo, config);
    let frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    frontend.tell(Req::SET_OWNER, &[], &[]);
    let offered = frontend.ask_u64(Req::GET_FEATURES);
    let protocol = frontend.ask_u64(Req::GET_PROTOCOL_FEATURES);
    assert_ne!(protocol & (1 << 5), 0, "its driver needs BACKEND_REQ");
    frontend.tell_u64(Req::SET_PROTOCOL_FEATURES, protocol & (1 << 3 | 1 << 5 | 1 << 9));
    let (backend, _ours) = std::os::unix::net::UnixStream::pair().unwrap();
    frontend.set_vring_fd(Req::SET_BACKEND_REQ_FD, 0, &backend);
    // The configuration, in the pieces the driver reads.
    let space = frontend.ask(Req::GET_CONFIG, &config_request(0, 6)).payload;
    assert_eq!(space[12..], mac.0);
    let space = frontend.ask(Req::GET_CONFIG, &config_request(10, 2)).payload;
    assert_eq!(space[12..], 1400u16.to_le_bytes());
    guest.features = offered & (VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF | EVENT_IDX | 1 << 17);
    frontend.tell_u64(Req::SET_FEATURES, guest.features);
    // One region, the payload of two.
    let payload = [&1u32.to_ne_bytes()[..], &[0; 4], &region(&guest.ram), &[0; 32]].concat();
    frontend.tell(Req::SET_MEM_TABLE, &payload, &[guest.ram.fd()]);
    let mut control = DriverRing::new(&guest.ram, guest.heap + 0x20000, 64);
    for ring in [&mut guest.rx, &mut guest.tx, &mut control] {
        ring.event_idx = true;
    }
    for (index, ring) in [(0u16, &guest.rx), (1, &guest.tx), (2, &control)] {
        frontend.set_vring_fd(Req::SET_VRING_CALL, index, &ring.call);
        frontend.tell_ring(Req::SET_VRING_NUM, index, 64);
        frontend.tell_ring(Req::SET_VRING_BASE, index, 0);
        frontend.set_vring_addr(index, ring);
        frontend.set_vring_fd(Req::SET_VRING_KICK, index, &ring.kick);
        frontend.tell_ring(Req::SET_VRING_ENABLE, index, 1);
    }
    frontend.sync();
    echo_works(&mut guest);
    assert_eq!(control_command(&guest, &mut control, &[0, 0, 1]), 0, "promiscuous mode is acknowledged");
    assert_eq!(control_command(&guest, &mut control, &[9, 9]), 1, "an unknown class is refused");
    assert_eq!(control_command(&guest, &mut control, &[4, 0, 1, 0]), 0, "one pair is acknowledged");
    echo_works(&mut guest);
    assert_eq!(device.stats().control.served, 2);
    assert_eq!(device.stats().control.refused, 1);
}

fn config_request(offset: u32, size: u32) -> Vec<u8> {
    let mut out = [offset.to_ne_bytes(), size.to_ne_bytes(), 0u32.to_ne_bytes()].concat();
    out.resize(12 + size as usize, 0);
    out
}

/// Sends a control command and returns its answer.
fn control_command(guest: &Guest, control: &mut DriverRing, command: &[u8]) -> u8 {
    let at = guest.heap + 0x40000;
    guest.ram.write(at, command);
    guest.ram.write(at + 0x100, &[0xaa]);
    let old = control.avail_index();
    control.post(&[
        Buffer { guest: guest.ram.guest(at), len: 2, writable: false },
        Buffer { guest: guest.ram.guest(at + 2), len: command.len() as u32 - 2, writable: false },
        Buffer { guest: guest.ram.guest(at + 0x100), len: 1, writable: true },
    ]);
    control.kick_after(old);
    eventually("the command is answered", || !control.take_used().is_empty());
    guest.ram.read(at + 0x100, 1)[0]
}

#[test]
fn cloud_hypervisor_setting_features_first_and_enabling_last_is_served() {
    let device = TestDevice::listen(Engine::Echo);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(256);
    frontend.tell(Req::SET_OWNER, &[], &[]);
    let offered = frontend.ask_u64(Req::GET_FEATURES);
    assert_ne!(offered & (1 << 17), 0, "it wants the CTRL_VQ bit");
    frontend.tell_u64(Req::SET_PROTOCOL_FEATURES, 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15);
    frontend.ack = true;
    assert!(frontend.ask_u64(Req::GET_QUEUE_NUM) >= 4, "it reads the answer as rings");
    guest.features = offered & (VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF | EVENT_IDX);
    assert!(frontend.tell_u64(Req::SET_FEATURES, guest.features));
    assert!(frontend.set_mem_table(&guest.ram));
    let inflight = [&[0; 16][..], &2u16.to_ne_bytes(), &256u16.to_ne_bytes(), &[0; 4]].concat();
    let answer = frontend.ask(Req::GET_INFLIGHT_FD, &inflight);
    assert_eq!(answer.fds.len(), 1);
    assert_eq!(
        u64::from_ne_bytes(answer.payload[..8].try_into().unwrap()),
        2 * (16 + 16 * 256u64).next_multiple_of(64)
    );
    assert!(frontend.tell(
        Req::SET_INFLIGHT_FD,
        &answer.payload,
        &[std::os::fd::AsRawFd::as_raw_fd(&answer.fds[0])]
    ));
    guest.rx.event_idx = true;
    guest.tx.event_idx = true;
    for (index, ring) in [(0u16, &guest.rx), (1, &guest.tx)] {
        assert!(frontend.tell_ring(Req::SET_VRING_NUM, index, 256));
        assert!(frontend.set_vring_addr(index, ring));
        assert!(frontend.tell_ring(Req::SET_VRING_BASE, index, 0));
        assert!(frontend.set_vring_fd(Req::SET_VRING_CALL, index, &ring.call));
        assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, index, &ring.kick));
    }
    for index in 0..2 {
        assert!(frontend.tell_ring(Req::SET_VRING_ENABLE, index, 1));
    }
    echo_works(&mut guest);
}

#[test]
fn front_end_without_any_feature_is_served() {
    let device = TestDevice::listen(Engine::Echo);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, 0);
    echo_works(&mut guest);
}

#[test]
fn parts_of_a_ring_are_taken_in_any_order() {
    for order in 0..4 {
        let device = TestDevice::listen(Engine::Echo);
        let mut frontend = Frontend::connect(&device.path());
        let mut guest = Guest::new(64);
        guest.features = VERSION_1 | PROTOCOL_FEATURES;
        frontend.negotiate(guest.features, REPLY_ACK | 1);
        for step in 0..4 {
            match (order + step) % 4 {
                0 => assert!(frontend.set_mem_table(&guest.ram)),
                1 => {
                    assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, 0, &guest.rx.kick));
                    assert!(frontend.set_vring_fd(Req::SET_VRING_KICK, 1, &guest.tx.kick));
                }
                2 => {
                    assert!(frontend.set_vring_addr(0, &guest.rx));
                    assert!(frontend.set_vring_addr(1, &guest.tx));
                }
                _ => {
                    assert!(frontend.tell(Req::SET_VRING_NUM, &state(0, 64), &[]));
                    assert!(frontend.tell(Req::SET_VRING_NUM, &state(1, 64), &[]));
                }
            }
        }
        frontend.tell_ring(Req::SET_VRING_ENABLE, 0, 1);
        frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 1);
        echo_works(&mut guest);
    }
}

#[test]
fn control_commands_beyond_one_visit_are_served_without_another_kick() {
    let device = TestDevice::listen(Engine::Echo);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES | 1 << 17);
    let mut control = DriverRing::new(&guest.ram, guest.heap + 0x20000, 512);
    frontend.start_ring(2, &control);
    frontend.tell_ring(Req::SET_VRING_ENABLE, 2, 1);
    let at = guest.heap + 0x40000;
    guest.ram.write(at, &[0, 0, 1]);
    for _ in 0..200 {
        control.post(&[
            Buffer { guest: guest.ram.guest(at), len: 3, writable: false },
            Buffer { guest: guest.ram.guest(at + 0x100), len: 1, writable: true },
        ]);
    }
    control.kick_now();
    let mut answered = 0;
    eventually("all are answered", || {
        answered += control.take_used().len();
        answered == 200
    });
    eventually("all are counted", || device.stats().control.served == 200);
}

#[test]
fn ring_that_never_ran_stands_where_the_front_end_said() {
    let device = TestDevice::listen(Engine::Echo);
    let mut guest = Guest::new(64);
    let mut frontend = Frontend::connect(&device.path());
    guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES);
    echo_works(&mut guest);
    drop(frontend);
    let frontend = Frontend::connect(&device.path());
    assert_eq!(frontend.get_vring_base(0), 0);
    frontend.tell_ring(Req::SET_VRING_BASE, 0, 77);
    assert_eq!(frontend.get_vring_base(0), 77);
}
