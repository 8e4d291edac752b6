//! A guest that breaks every rule of the ring: its chain or its ring pays, never the process, and
//! frames flow again afterwards.

use vhost::vhost_user::message::FrontendReq as Req;
use vunet::device::ChainError;

use crate::support::driver::{Buffer, INDIRECT, NEXT, WRITE, descriptor};
use crate::support::eventually;
use crate::support::frontend::{Frontend, Guest, PROTOCOL_FEATURES, VERSION_1};
use crate::support::ram::GUEST_BASE;
use crate::support::worker::{Engine, Frame, TestDevice};

const CSUM: u64 = 1;
const MRG_RXBUF: u64 = 1 << 15;
const INDIRECT_DESC: u64 = 1 << 28;
const BASIC: u64 = VERSION_1 | PROTOCOL_FEATURES;

struct Fixture {
    device: TestDevice,
    frontend: Frontend,
    guest: Guest,
}

impl Fixture {
    fn new(features: u64) -> Fixture {
        let device = TestDevice::listen(Engine::Record);
        let mut frontend = Frontend::connect(&device.path());
        let mut guest = Guest::new(64);
        guest.attach(&mut frontend, features);
        Fixture { device, frontend, guest }
    }

    /// A readable buffer of the heap.
    fn buffer(&self, len: u32) -> Buffer {
        Buffer { guest: self.guest.ram.guest(self.guest.heap), len, writable: false }
    }

    /// Makes `head` available in the transmit ring and waits for it to come back with length zero.
    #[track_caller]
    fn offer_tx(&mut self, head: u16) {
        self.guest.tx.make_available(head);
        self.guest.tx.kick_now();
        let mut used = Vec::new();
        eventually("the chain comes back", || {
            used.extend(self.guest.tx.take_used());
            !used.is_empty()
        });
        assert_eq!(used, [(u32::from(head), 0)]);
    }

    /// Sends a good frame and checks that it arrives: the ring lives.
    #[track_caller]
    fn good_frame_passes(&mut self) {
        let before = self.device.frames().len();
        self.guest.ram.write(self.guest.heap, &[0; 128]);
        let at = self.guest.ram.guest(self.guest.heap);
        self.guest.tx.set_descriptor(63, at, 100, 0, 0);
        self.offer_tx(63);
        eventually("a good frame passes", || self.device.frames().len() == before + 1);
    }

    #[track_caller]
    fn bad_tx_chains(&self, why: ChainError) -> u64 {
        self.device.stats().tx.bad_chains.get(why)
    }

    /// Offers the chain at `head` and checks that it is counted as `why` and the ring goes on.
    #[track_caller]
    fn refuses(&mut self, head: u16, why: ChainError) {
        let before = self.bad_tx_chains(why);
        self.offer_tx(head);
        eventually("the chain is counted", || self.bad_tx_chains(why) == before + 1);
        self.good_frame_passes();
    }
}

#[test]
fn chain_that_loops_is_dropped_and_the_ring_goes_on() {
    let mut f = Fixture::new(BASIC);
    let at = f.guest.ram.guest(f.guest.heap);
    f.guest.tx.set_descriptor(0, at, 10, NEXT, 0);
    f.refuses(0, ChainError::TooLong);
    for n in 0..4 {
        f.guest.tx.set_descriptor(n, at, 0, NEXT, (n + 1) % 4);
    }
    f.refuses(2, ChainError::TooLong);
}

#[test]
fn next_beyond_the_table_is_dropped() {
    let mut f = Fixture::new(BASIC);
    let at = f.guest.ram.guest(f.guest.heap);
    for next in [64, 65, u16::MAX] {
        f.guest.tx.set_descriptor(0, at, 10, NEXT, next);
        f.refuses(0, ChainError::NextOutOfRange);
    }
}

#[test]
fn indirect_table_without_the_feature_is_dropped() {
    let mut f = Fixture::new(BASIC);
    let table = f.guest.ram.guest(f.guest.heap + 0x1000);
    f.guest.tx.set_descriptor(0, table, 16, INDIRECT, 0);
    f.refuses(0, ChainError::IndirectNotNegotiated);
}

#[test]
fn malformed_indirect_tables_are_dropped() {
    let mut f = Fixture::new(BASIC | INDIRECT_DESC);
    let heap = f.guest.ram.guest(f.guest.heap);
    let table_at = f.guest.heap + 0x1000;
    let table = f.guest.ram.guest(table_at);
    for len in [0, 1, 15, 17, u32::MAX] {
        f.guest.tx.set_descriptor(0, table, len, INDIRECT, 0);
        f.refuses(0, ChainError::IndirectLength);
    }
    f.guest.tx.set_descriptor(0, table, 16, INDIRECT | NEXT, 1);
    f.refuses(0, ChainError::IndirectNotLast);
    f.guest.ram.write(table_at, &descriptor(table, 16, INDIRECT, 0));
    f.guest.tx.set_descriptor(0, table, 16, INDIRECT, 0);
    f.refuses(0, ChainError::IndirectNested);
    for outside in [0, GUEST_BASE - 8, GUEST_BASE + Guest::RAM_BYTES as u64 - 8, u64::MAX - 7, u64::MAX] {
        f.guest.tx.set_descriptor(0, outside, 16, INDIRECT, 0);
        f.refuses(0, ChainError::IndirectUnmapped);
    }
    // 65,535 entries, each naming the next, the last the first.
    for n in 0..4096 {
        f.guest.ram.write(table_at + 16 * n, &descriptor(heap, 1, NEXT, ((n + 1) % 4096) as u16));
    }
    f.guest.tx.set_descriptor(0, table, 16 * 65_535, INDIRECT, 0);
    f.refuses(0, ChainError::TooLong);
    for n in 0..4096 {
        f.guest.ram.write(table_at + 16 * n, &descriptor(heap, 0, NEXT, ((n + 1) % 4096) as u16));
    }
    f.refuses(0, ChainError::TooLong);
}

#[test]
fn misaligned_indirect_table_is_read_as_it_lies() {
    let mut f = Fixture::new(BASIC | INDIRECT_DESC);
    f.guest.ram.write(f.guest.heap, &[0; 128]);
    let heap = f.guest.ram.guest(f.guest.heap);
    let table_at = f.guest.heap + 0x1003;
    f.guest.ram.write(table_at, &descriptor(heap, 90, 0, 0));
    f.guest.tx.set_descriptor(0, f.guest.ram.guest(table_at), 16, INDIRECT, 0);
    f.offer_tx(0);
    eventually("the frame is seen", || f.device.frames().len() == 1);
}

#[test]
fn buffers_outside_guest_memory_are_dropped() {
    let mut f = Fixture::new(BASIC);
    let end = GUEST_BASE + Guest::RAM_BYTES as u64;
    for (addr, len) in [
        (0, 100),
        (GUEST_BASE - 1, 100),
        (end, 100),
        (end - 99, 100),
        (end - 1, u32::MAX),
        (GUEST_BASE, u32::MAX),
        (u64::MAX, 100),
        (u64::MAX - 50, 100),
    ] {
        f.guest.tx.set_descriptor(0, addr, len, 0, 0);
        f.refuses(0, ChainError::Unmapped);
    }
}

#[test]
fn transmit_chain_with_writable_buffers_is_dropped() {
    let mut f = Fixture::new(BASIC);
    let at = f.guest.ram.guest(f.guest.heap);
    f.guest.tx.set_descriptor(0, at, 100, WRITE, 0);
    f.refuses(0, ChainError::WrongDirection);
    f.guest.tx.set_descriptor(0, at, 50, NEXT, 1);
    f.guest.tx.set_descriptor(1, at, 50, WRITE, 0);
    f.refuses(0, ChainError::WrongDirection);
    f.guest.tx.set_descriptor(0, at, 50, NEXT | WRITE, 1);
    f.guest.tx.set_descriptor(1, at, 50, 0, 0);
    f.refuses(0, ChainError::ReadableAfterWritable);
}

#[test]
fn chain_shorter_than_its_headers_is_dropped_and_a_split_header_is_read() {
    let mut f = Fixture::new(BASIC);
    for len in [0, 1, 11, 12, 25] {
        let buffer = f.buffer(len);
        f.guest.tx.set_descriptor(0, buffer.guest, len, 0, 0);
        f.offer_tx(0);
    }
    eventually("all are counted", || f.device.stats().tx.too_short == 5);
    f.guest.ram.write(f.guest.heap, &[0; 128]);
    let at = f.guest.ram.guest(f.guest.heap);
    for n in 0..13 {
        f.guest.tx.set_descriptor(n, at + u64::from(n), 1, NEXT, n + 1);
    }
    f.guest.tx.set_descriptor(13, at + 13, 60, 0, 0);
    f.offer_tx(0);
    eventually("the frame is seen", || f.device.frames().len() == 1);
    assert_eq!(f.device.frames()[0].bytes.len(), 61);
}

#[test]
fn lying_vnet_headers_are_dropped_and_counted() {
    let mut f = Fixture::new(BASIC | CSUM);
    let len = 112; // 12 of header, 100 of frame
    let cases: &[(&[u8], bool)] = &[
        (&[1, 0, 0, 0, 0, 0, 34, 0, 65, 0], true), // the field ends one byte late
        (&[1, 0, 0, 0, 0, 0, 255, 255, 0, 0], true), // starts beyond the frame
        (&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0], true),   // starts in the Ethernet header
        (&[1, 1, 0, 0, 0, 0, 34, 0, 16, 0], true), // segments of no size
        (&[1, 9, 0, 0, 1, 0, 34, 0, 16, 0], true), // an unknown segmentation
        (&[1, 1, 0, 0, 1, 0, 34, 0, 16, 0], false), // segmentation not negotiated
        (&[1, 5, 0, 0, 1, 0, 34, 0, 16, 0], false), // never offered
    ];
    for (header, _) in cases {
        f.guest.ram.write(f.guest.heap, header);
        let at = f.guest.ram.guest(f.guest.heap);
        f.guest.tx.set_descriptor(0, at, len, 0, 0);
        f.offer_tx(0);
    }
    let bad = cases.iter().filter(|(_, bad)| *bad).count() as u64;
    eventually("all are counted", || {
        let tx = f.device.stats().tx;
        tx.bad_header == bad && tx.not_negotiated == cases.len() as u64 - bad
    });
    f.good_frame_passes();
}

#[test]
fn header_changed_while_it_is_judged_is_never_handed_on_unjudged() {
    let mut f = Fixture::new(BASIC | CSUM);
    let at = f.guest.heap;
    let good = [1u8, 0, 0, 0, 0, 0, 34, 0, 16, 0];
    let bad = [1u8, 1, 0, 0, 1, 0, 255, 255, 255, 255];
    f.guest.ram.write(at, &[0; 256]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let ram = std::sync::Arc::clone(&f.guest.ram);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                ram.write(at, &good);
                ram.write(at, &bad);
            }
        });
        for _ in 0..3000 {
            let guest_at = f.guest.ram.guest(at);
            f.guest.tx.set_descriptor(0, guest_at, 112, 0, 0);
            f.offer_tx(0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    for frame in f.device.frames() {
        assert_eq!(frame.vnet.gso, None);
        if let vunet::wire::vnet::Checksum::Partial { start, offset } = frame.vnet.checksum {
            assert!(usize::from(start) + usize::from(offset) + 2 <= frame.bytes.len());
        }
    }
}

/// Waits until ring 1 is broken, restarts it, and checks that frames flow.
#[track_caller]
fn ring_is_broken_and_restarts(f: &mut Fixture) {
    eventually("the ring is stopped", || f.device.stats().broken_rings == 1);
    eventually("the front-end is told", || f.guest.tx.err.read().is_ok());
    // Kicks at the broken ring change nothing.
    f.guest.tx.kick_now();
    f.frontend.get_vring_base(1);
    f.guest.tx.reset();
    f.frontend.start_ring(1, &f.guest.tx);
    f.frontend.sync();
    f.good_frame_passes();
    assert_eq!(f.device.stats().broken_rings, 1, "it was told once");
}

#[test]
fn avail_index_that_jumps_stops_the_ring_until_it_is_restarted() {
    for jump in [65, 1000, 32_768, 65_535] {
        let mut f = Fixture::new(BASIC);
        f.good_frame_passes();
        let index = f.guest.tx.avail_index();
        f.guest.tx.force_avail_index(index.wrapping_add(jump));
        f.guest.tx.kick_now();
        ring_is_broken_and_restarts(&mut f);
    }
}

#[test]
fn head_beyond_the_table_stops_the_ring_until_it_is_restarted() {
    for head in [64, u16::MAX] {
        let mut f = Fixture::new(BASIC);
        f.guest.tx.make_available(head);
        f.guest.tx.kick_now();
        ring_is_broken_and_restarts(&mut f);
    }
}

#[test]
fn duplicate_head_is_served_as_often_as_it_is_offered() {
    let mut f = Fixture::new(BASIC);
    f.guest.ram.write(f.guest.heap, &[0; 128]);
    let at = f.guest.ram.guest(f.guest.heap);
    f.guest.tx.set_descriptor(5, at, 100, 0, 0);
    for _ in 0..64 {
        f.guest.tx.make_available(5);
    }
    f.guest.tx.kick_now();
    eventually("all are served", || f.device.stats().tx.frames == 64);
    assert_eq!(f.guest.tx.take_used(), [(5, 0); 64]);
    f.good_frame_passes();
}

#[test]
fn receive_buffers_the_device_may_not_write_are_given_back_unused() {
    for features in [BASIC, BASIC | MRG_RXBUF] {
        let mut f = Fixture::new(features);
        let heap = f.guest.ram.guest(f.guest.heap);
        let rx = &mut f.guest.rx;
        rx.post(&[Buffer { guest: heap, len: 40, writable: true }]);
        rx.post(&[Buffer { guest: heap, len: 2000, writable: false }]);
        rx.post(&[Buffer { guest: heap, len: 0, writable: true }]);
        rx.post(&[Buffer { guest: u64::MAX - 100, len: 2000, writable: true }]);
        rx.post(&[Buffer { guest: heap, len: 2000, writable: true }]);
        rx.kick_now();
        let bytes = vec![9; 1000];
        let frame = Frame { vnet: Default::default(), bytes, pair: Default::default() };
        if features & MRG_RXBUF == 0 {
            // Too small by itself, so the first chain is in the way of long frames: use it up.
            f.device.inject(Frame { bytes: vec![9; 20], ..frame.clone() });
        }
        f.device.inject(frame);
        let mut used = Vec::new();
        eventually("the frame arrives", || {
            used.extend(f.guest.rx.take_used());
            used.len() == 5
        });
        let first = if features & MRG_RXBUF == 0 { 32 } else { 0 };
        assert_eq!(used, [(0, first), (1, 0), (2, 0), (3, 0), (4, 1012)]);
        let bad = f.device.stats().rx.bad_chains;
        assert_eq!(bad.total(), 3);
        assert_eq!(bad.get(ChainError::WrongDirection), 1);
        assert_eq!(bad.get(ChainError::Empty), 1);
        assert_eq!(bad.get(ChainError::Unmapped), 1);
    }
}

#[test]
fn receive_ring_with_a_wild_index_is_stopped_and_frames_have_nowhere_to_go() {
    let mut f = Fixture::new(BASIC);
    f.guest.rx.force_avail_index(1000);
    f.device.inject(Frame { vnet: Default::default(), bytes: vec![1; 60], pair: Default::default() });
    eventually("the ring is stopped", || f.device.stats().broken_rings == 1);
    eventually("the front-end is told", || f.guest.rx.err.read().is_ok());
    f.good_frame_passes();
}

#[test]
fn kick_storm_without_frames_is_harmless() {
    let mut f = Fixture::new(BASIC);
    for _ in 0..10_000 {
        f.guest.tx.kick_now();
        f.guest.rx.kick_now();
    }
    f.good_frame_passes();
}

#[test]
fn ring_stopped_in_the_middle_of_a_burst_loses_nothing_and_does_nothing_twice() {
    let mut f = Fixture::new(BASIC);
    f.guest.ram.write(f.guest.heap, &[0; 128]);
    let at = f.guest.ram.guest(f.guest.heap);
    let mut sent = 0u64;
    for round in 0..50 {
        for _ in 0..30 {
            f.guest.tx.post(&[Buffer { guest: at, len: 100, writable: false }]);
            sent += 1;
        }
        f.guest.tx.kick_now();
        let base = f.frontend.get_vring_base(1);
        assert_eq!(base as u16, f.guest.tx.used_index(), "round {round}: nothing is left in flight");
        f.guest.tx.take_used();
        f.frontend.start_ring(1, &f.guest.tx);
        eventually("the rest is served", || {
            f.guest.tx.take_used();
            f.guest.tx.outstanding() == 0
        });
    }
    eventually("all are counted", || f.device.stats().tx.frames == sent);
}

#[test]
fn disabled_transmit_ring_discards_and_goes_on_when_enabled() {
    let mut f = Fixture::new(BASIC);
    f.good_frame_passes();
    f.frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 0);
    f.guest.tx.set_descriptor(0, f.guest.ram.guest(f.guest.heap), 100, 0, 0);
    f.offer_tx(0);
    eventually("it is discarded", || f.device.stats().tx.disabled == 1);
    f.frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 1);
    f.good_frame_passes();
}
