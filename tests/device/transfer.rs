//! Frames both ways under every mixture of features.

use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::nic::{
    CSUM, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, INDIRECT_DESC, MRG_RXBUF, Nic, Received, Shape,
};
use crate::support::worker::{Engine, Frame, TestDevice};
use crate::support::{Random, eventually};

const PLAIN: Shape = Shape { rx_bytes: 0x11000, rx_pieces: 3, tx_pieces: 4, indirect: false };

fn attached(engine: Engine, size: u16, features: u64, shape: Shape) -> (TestDevice, Frontend, Nic) {
    let device = TestDevice::listen(engine);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(size);
    guest.attach(&mut frontend, features);
    (device, frontend, Nic::new(guest, shape))
}

/// A header that asks for what was negotiated, for a frame of `len` bytes.
fn header(features: u64, len: usize, random: &mut Random) -> VnetHeader {
    let mut vnet = VnetHeader::default();
    if features & CSUM != 0 && len >= 60 && random.below(2) == 0 {
        vnet.checksum = Checksum::Partial { start: 34, offset: 16 };
        if features & HOST_TSO4 != 0 && random.below(2) == 0 {
            let gso = Gso { kind: GsoKind::Tcp4, size_bytes: 1448, headers_bytes: 54, ecn: false };
            vnet.gso = Some(gso);
        }
    }
    vnet
}

/// What the driver should see of a header it sent, back from the loopback.
fn expected(vnet: VnetHeader, features: u64, buffers: usize) -> Vec<u8> {
    let mut vnet = vnet;
    if features & GUEST_CSUM == 0 {
        vnet.checksum = Checksum::Complete;
    }
    if features & (GUEST_CSUM | GUEST_TSO4) != GUEST_CSUM | GUEST_TSO4 {
        vnet.gso = None;
    }
    vnet.num_buffers = buffers as u16;
    vnet.emit().to_vec()
}

/// Sends `count` frames of random length and content through the loopback and compares.
fn exchange(nic: &mut Nic, count: usize, longest: usize, random: &mut Random) {
    let features = nic.guest.features;
    let mut sent = Vec::new();
    let mut back: Vec<Received> = Vec::new();
    eventually("all frames come back", || {
        nic.post_rx(usize::MAX, random);
        while sent.len() < count {
            let len = 14 + random.below(longest as u64 - 13) as usize;
            let frame = random.bytes(len);
            let vnet = header(features, len, random);
            if !nic.send(&vnet.emit(), &frame, random) {
                break;
            }
            sent.push((vnet, frame));
        }
        back.extend(nic.receive());
        back.len() == count
    });
    for ((vnet, frame), got) in sent.iter().zip(&back) {
        assert_eq!(&got.bytes, frame);
        assert_eq!(got.header, expected(*vnet, features, got.buffers)[..got.header.len()]);
    }
}

#[test]
fn frames_pass_both_ways_under_random_subsets_of_features() {
    let mut random = Random::seeded();
    for round in 0..40 {
        let device = TestDevice::listen(if round % 2 == 0 { Engine::Echo } else { Engine::EchoReserved });
        let mut frontend = Frontend::connect(&device.path());
        let offered = frontend.ask_u64(vhost::vhost_user::message::FrontendReq::GET_FEATURES);
        let features = match round {
            0 => 0,
            1 => offered,
            _ => offered & random.next(),
        };
        let size = 64 << random.below(5);
        println!("features {features:#x} size {size}");
        let mut guest = Guest::new(size);
        guest.attach(&mut frontend, features);
        let shape = Shape {
            rx_bytes: if features & MRG_RXBUF != 0 { 1526 } else { 0x11000 },
            rx_pieces: 1 + random.below(4) as usize,
            tx_pieces: 1 + random.below(8) as usize,
            indirect: features & INDIRECT_DESC != 0,
        };
        // A frame must fit the buffers a ring of this size can hold.
        let longest =
            if features & MRG_RXBUF != 0 { (usize::from(size) / 8 * 1526).min(65_550) } else { 65_550 };
        let mut nic = Nic::new(guest, shape);
        exchange(&mut nic, 40, longest, &mut random);
    }
}

#[test]
fn frame_over_many_mergeable_buffers_is_seen_whole_or_not_at_all() {
    let mut random = Random::seeded();
    let shape = Shape { rx_bytes: 256, rx_pieces: 2, tx_pieces: 3, indirect: false };
    let features = VERSION_1 | PROTOCOL_FEATURES | MRG_RXBUF | EVENT_IDX;
    let (_device, _frontend, mut nic) = attached(Engine::Echo, 1024, features, shape);
    // `receive` fails the test if it ever finds a part of a frame.
    exchange(&mut nic, 200, 60_000, &mut random);
}

#[test]
fn longest_frame_passes_and_one_byte_more_is_dropped_and_counted() {
    let mut random = Random::seeded();
    let (device, _frontend, mut nic) = attached(Engine::Echo, 64, VERSION_1, PLAIN);
    nic.post_rx(8, &mut random);
    let longest = random.bytes(65_550);
    assert!(nic.send(&[0; 12], &random.bytes(65_551), &mut random));
    assert!(nic.send(&[0; 12], &random.bytes(13), &mut random));
    assert!(nic.send(&[0; 12], &longest, &mut random));
    let mut back = Vec::new();
    eventually("the frame comes back", || {
        back.extend(nic.receive());
        !back.is_empty()
    });
    assert_eq!(back[0].bytes, longest);
    eventually("all three were counted", || device.stats().tx.frames == 1);
    assert_eq!(device.stats().tx.too_long, 1);
    assert_eq!(device.stats().tx.too_short, 1);
}

#[test]
fn rings_of_every_legal_size_work() {
    let mut random = Random::seeded();
    for shift in 1..=15u32 {
        let size = 1u16 << shift;
        let pieces = if size < 8 { 1 } else { 3 };
        let shape = Shape { rx_bytes: 2048, rx_pieces: pieces, tx_pieces: pieces, indirect: false };
        let (_device, _frontend, mut nic) = attached(Engine::Echo, size, VERSION_1 | EVENT_IDX, shape);
        exchange(&mut nic, 50, 1514, &mut random);
    }
}

#[test]
fn indices_that_wrap_go_on() {
    let mut random = Random::seeded();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | EVENT_IDX | MRG_RXBUF] {
        let device = TestDevice::listen(Engine::Echo);
        let mut frontend = Frontend::connect(&device.path());
        let mut guest = Guest::new(64);
        guest.rx.force_used_index(65_500);
        guest.tx.force_used_index(65_520);
        guest.attach(&mut frontend, features);
        let mut nic = Nic::new(guest, Shape { rx_bytes: 512, ..PLAIN });
        exchange(&mut nic, 300, if features & MRG_RXBUF != 0 { 3000 } else { 490 }, &mut random);
    }
}

#[test]
fn frame_waits_for_receive_buffers_and_only_then_is_a_kick_wanted() {
    for event_idx in [0, EVENT_IDX] {
        let mut random = Random::seeded();
        let features = VERSION_1 | MRG_RXBUF | event_idx;
        let shape = Shape { rx_bytes: 1526, rx_pieces: 1, ..PLAIN };
        let (device, _frontend, mut nic) = attached(Engine::Record, 64, features, shape);
        nic.post_rx(2, &mut random);
        assert_eq!(nic.guest.rx.kicks, 0, "there is no hurry while nobody waits");
        let frame =
            |len| Frame { vnet: VnetHeader::default(), bytes: vec![7; len], pair: Default::default() };
        device.inject(frame(4000));
        eventually("the reservation fails", || device.stats().rx.full > 0);
        assert!(nic.receive().is_empty());
        nic.post_rx(1, &mut random);
        assert_eq!(nic.guest.rx.kicks, 1, "the device waits for this one");
        let mut back = Vec::new();
        eventually("the frame arrives", || {
            back.extend(nic.receive());
            !back.is_empty()
        });
        assert_eq!((back[0].bytes.len(), back[0].buffers), (4000, 3));
        nic.post_rx(2, &mut random);
        assert_eq!(nic.guest.rx.kicks, 1, "nobody waits any more");
    }
}

#[test]
fn frame_no_number_of_buffers_can_hold_is_refused() {
    let mut random = Random::seeded();
    for (features, size) in [(VERSION_1, 64), (VERSION_1 | MRG_RXBUF, 4)] {
        let shape = Shape { rx_bytes: 512, rx_pieces: 1, ..PLAIN };
        let (device, _frontend, mut nic) = attached(Engine::Record, size, features, shape);
        nic.post_rx(usize::MAX, &mut random);
        let frame =
            |len| Frame { vnet: VnetHeader::default(), bytes: vec![7; len], pair: Default::default() };
        device.inject(frame(4000));
        device.inject(frame(500));
        let mut back = Vec::new();
        eventually("the short frame arrives", || {
            back.extend(nic.receive());
            !back.is_empty()
        });
        assert_eq!(back[0].bytes.len(), 500);
        assert_eq!(device.stats().rx.too_small, 1);
    }
}

#[test]
fn driver_that_wants_no_interrupts_gets_none() {
    let mut random = Random::seeded();
    let (device, _frontend, mut nic) = attached(Engine::Record, 64, VERSION_1, PLAIN);
    let flags_at = nic.guest.tx.avail_at();
    nic.guest.ram.store_u16(flags_at, 1);
    for n in 1..=10 {
        assert!(nic.send(&[0; 12], &[0; 60], &mut random));
        eventually("the frame is seen", || device.stats().tx.frames == n);
    }
    assert_eq!(nic.guest.tx.calls(), 0);
    nic.guest.ram.store_u16(flags_at, 0);
    assert!(nic.send(&[0; 12], &[0; 60], &mut random));
    eventually("the driver is notified", || nic.guest.tx.calls() == 1);
}

#[test]
fn batch_is_notified_at_most_once() {
    let mut random = Random::seeded();
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let (device, _frontend, mut nic) = attached(Engine::Record, 64, features, PLAIN);
        let kick = nic.guest.tx.kick.try_clone().unwrap();
        // Post without kicks, then kick once.
        nic.guest.tx.kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        for _ in 0..10 {
            assert!(nic.send(&[0; 12], &[0; 60], &mut random));
        }
        kick.write(1).unwrap();
        eventually("all frames are seen", || device.stats().tx.frames == 10);
        assert_eq!(device.stats().tx.calls, 1);
    }
}

#[test]
fn second_queue_pair_is_served() {
    use crate::support::driver::{Buffer, DriverRing};
    use vhost::vhost_user::message::FrontendReq as Req;
    let device = TestDevice::listen(Engine::Record);
    let mut frontend = Frontend::connect(&device.path());
    let mut guest = Guest::new(64);
    guest.attach(&mut frontend, VERSION_1 | PROTOCOL_FEATURES | 1 << 17 | 1 << 22);
    let at = guest.heap;
    let mut rings: Vec<_> =
        (0..2).map(|n| DriverRing::new(&guest.ram, at + n * DriverRing::bytes(64), 64)).collect();
    for (index, ring) in [(2, &rings[0]), (3, &rings[1])] {
        frontend.start_ring(index, ring);
        frontend.tell_ring(Req::SET_VRING_ENABLE, index, 1);
    }
    let buffer = guest.ram.guest(guest.heap + 0x10000);
    rings[1].post(&[Buffer { guest: buffer, len: 72, writable: false }]);
    rings[1].kick_now();
    eventually("the frame is seen", || device.frames().len() == 1);
    assert_eq!(device.frames()[0].pair.0, 1);
    let old = rings[0].avail_index();
    rings[0].post(&[Buffer { guest: buffer, len: 72, writable: true }]);
    rings[0].kick_after(old);
    device.inject(device.frames()[0].clone());
    eventually("the frame arrives", || rings[0].take_used() == [(0, 72)]);
}
