use super::super::rig::{GUEST, OURS, REMOTE, Rig, asks_for_us, udp};
use super::*;
use crate::wire::arp;
use crate::wire::ethernet;

/// A guest that has spoken to [`REMOTE`] and has no receive buffers since.
fn starved() -> (Rig, u16) {
    let mut rig = Rig::new(1, &[]);
    rig.sends(0, &udp((GUEST.1, 50_000), (REMOTE.1, 9), b"x"));
    assert_eq!(rig.left(0).len(), 1);
    rig.workers[0].port.buffers_bytes = 0;
    (rig, 50_000)
}

fn answers_arp(rig: &mut Rig) -> bool {
    rig.comes(0, &asks_for_us());
    let left = rig.left(0);
    left.iter().any(|frame| {
        arp::Packet::parse(&frame[ethernet::HEADER_BYTES..])
            .is_ok_and(|packet| packet.operation == arp::Operation::Reply && packet.sender_ip == OURS.1)
    })
}

fn datagram(port: u16, n: u8, len: usize) -> Vec<u8> {
    udp((REMOTE.1, 9), (OURS.1, port), &vec![n; len])
}

#[test]
fn our_station_is_heard_although_the_guest_has_no_buffers_and_frames_for_it_wait() {
    let (mut rig, port) = starved();
    rig.comes(0, &datagram(port, 0, 10));
    assert!(!answers_arp(&mut rig), "the guest may have buffers in a moment");
    let due = rig.workers[0].end.next_deadline().expect("the queue is to be read");
    rig.pass(due.since(rig.now));
    assert_eq!(rig.left(0).len(), 1, "the question is answered without another event");
    for n in 1..20 {
        rig.comes(0, &datagram(port, n, 10));
        assert!(answers_arp(&mut rig), "{n}");
    }
    rig.workers[0].port.buffers_bytes = 1 << 20;
    rig.workers[0].end.guest_has_buffers();
    rig.pass(Duration::ZERO);
    let came: Vec<u8> = rig.came(0).iter().map(|frame| frame[frame.len() - 1]).collect();
    assert_eq!(came, (0..20).collect::<Vec<u8>>(), "in order, none lost");
    assert_eq!(rig.workers[0].end.counters().dropped_total(), 0);
}

#[test]
fn frames_for_a_guest_without_buffers_are_kept_within_bounds_and_the_newest_lost() {
    let (mut rig, port) = starved();
    rig.comes(0, &datagram(port, 0, 10));
    rig.pass(PATIENCE);
    let past = 50;
    for n in 1..limits::STARVED_FRAMES_MAX + past {
        rig.comes(0, &datagram(port, n as u8, 10));
    }
    let end = &mut rig.workers[0].end;
    assert_eq!(end.counters().dropped(DropReason::GuestNotReceiving), past as u64);
    assert_eq!(end.meanwhile.kept.len(), limits::STARVED_FRAMES_MAX);
    end.rings_down(rig.now);
    assert!(!rig.workers[0].end.meanwhile.has_frames(), "they were for the guest that is gone");
    let mut waits = Starved::default();
    let large = vec![0; 60_000];
    let kept =
        (0..limits::STARVED_FRAMES_MAX).take_while(|_| waits.keep(VnetHeader::default(), &large)).count();
    assert_eq!(kept, limits::STARVED_BYTES_MAX / large.len());
}

#[test]
fn a_guest_that_takes_a_frame_now_and_then_makes_nobody_deaf() {
    let (mut rig, port) = starved();
    for n in 0..40 {
        rig.workers[0].port.buffers_bytes = 1600;
        rig.workers[0].end.guest_has_buffers();
        for _ in 0..4 {
            rig.comes(0, &datagram(port, n, 10));
        }
        rig.pass(Duration::from_millis(20));
    }
    assert!(answers_arp(&mut rig));
    assert!(rig.came(0).len() >= 40, "it gets what it has room for");
}

#[test]
fn a_guest_that_keeps_up_by_and_large_has_its_frames_left_in_the_queue() {
    let mut waits = Starved::default();
    let ms = |at| Instant::ZERO + Duration::from_millis(at);
    for n in 0..50u64 {
        waits.begin(ms(n * 50), n * RECOVERED_FRAMES);
        assert!(waits.due().is_some_and(|due| due > ms(n * 50)), "{n}");
    }
    waits.begin(ms(2549), 49 * RECOVERED_FRAMES + 63);
    assert_eq!(waits.due(), Some(ms(2550)), "too few since");
    waits.read_empty();
    assert_eq!(waits.due(), None);
}
