use super::super::rig::{GUEST, OURS, REMOTE, Rig, TRANSPORT_AT, segment, sum_ip, udp};
use super::*;
use crate::config::Protocol;
use crate::limits;
use crate::wire::checksum::Accumulator;
use crate::wire::tcp::Flags;

const GUEST_2: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const SYN_ACK: Flags = Flags(Flags::SYN.0 | Flags::ACK.0);

fn published(port: u16, guest_port: u16) -> Publish {
    Publish {
        protocol: Protocol::Tcp,
        host: (Ipv4Addr::UNSPECIFIED, port).into(),
        guest_port,
        interface: None,
    }
}

/// What opens a connection of the guest's that leaves by worker 0.
fn opens() -> Vec<u8> {
    segment((GUEST.1, 50_000), (REMOTE.1, 80), Flags::SYN, (100, 0))
}

/// The world's part of it.
fn answers() -> Vec<u8> {
    segment((REMOTE.1, 80), (OURS.1, 50_000), SYN_ACK, (500, 101))
}

#[test]
fn an_answer_on_another_queue_is_handed_to_the_worker_of_its_flow() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &opens());
    assert_eq!(rig.left(0).len(), 1);
    rig.comes(1, &answers());
    assert_eq!(rig.deliver_letters(), 1);
    assert_eq!((rig.came(0).len(), rig.came(1).len()), (1, 0));
}

#[test]
fn a_frame_handed_over_before_the_guest_began_anew_is_not_for_the_next() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &opens());
    rig.comes(1, &answers());
    let (to, late) = rig.workers[1].end.next_letter().expect("a frame for worker 0");
    assert_eq!(to, WorkerId(0));
    rig.directory.guest_started();
    // The guest of today speaks to the same end from the same port.
    rig.sends(0, &opens());
    let worker = &mut rig.workers[0];
    worker.end.letter(rig.now, late, &mut worker.engine, &mut worker.port);
    assert_eq!(rig.came(0).len(), 0, "it answers the guest before");
    assert_eq!(rig.workers[0].end.counters().dropped(DropReason::NoFlow), 1);
    rig.comes(1, &answers());
    rig.deliver_letters();
    assert_eq!(rig.came(0).len(), 1, "this one answers the guest of today");
}

#[test]
fn frames_for_other_workers_are_bounded_in_bytes() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &opens());
    let mut large = answers();
    large.resize(1400, 0);
    large[16..18].copy_from_slice(&1386u16.to_be_bytes());
    sum_ip(&mut large);
    let fit = limits::HANDED_BYTES_MAX / large.len();
    let translation = rig.workers[1].end.translation.as_mut().unwrap();
    let mut room = Vec::new();
    while let Some(taken) = translation.room.take(64 << 10) {
        room.push(taken);
    }
    rig.comes(1, &large);
    assert_eq!(rig.deliver_letters(), 0, "{fit} and no more");
    assert_eq!(rig.workers[1].end.counters().dropped(DropReason::TableFull), 1);
    drop(room);
    for _ in 0..2 * fit.div_ceil(1000) {
        for _ in 0..1000 {
            rig.comes(1, &large);
        }
        assert_eq!(rig.deliver_letters(), 1000, "what was read makes room");
    }
}

/// Whether a connection of the world to port 8080 comes to `guest`.
fn leads_to(rig: &mut Rig, client: u16, guest: Ipv4Addr) -> bool {
    rig.comes(0, &segment((REMOTE.1, client), (OURS.1, 8080), Flags::SYN, (1, 0)));
    let came = rig.came(0);
    came.iter().any(|frame| addr_at(frame, DST_AT) == guest && frame[TRANSPORT_AT + 3] == 80)
}

#[test]
fn a_worker_that_hears_last_of_a_new_guest_takes_no_published_port_from_it() {
    let mut rig = Rig::new(2, &[published(8080, 80)]);
    let datagram = |from| udp((from, 5000), (REMOTE.1, 9), b"x");
    rig.sends(0, &datagram(GUEST.1));
    rig.sends(1, &datagram(GUEST.1));
    rig.pass(Duration::ZERO);
    assert!(leads_to(&mut rig, 1000, GUEST.1));
    rig.directory.guest_started();
    // It has the address of the one before. The first worker hears of it with its first frame, the second once that is
    // published for.
    rig.sends(0, &datagram(GUEST.1));
    let first = &mut rig.workers[0];
    first.end.run_translation(rig.now, &mut first.engine, &mut first.port);
    rig.pass(Duration::ZERO);
    assert!(leads_to(&mut rig, 1001, GUEST.1));
}

#[test]
fn a_port_that_flows_of_the_guest_before_have_is_published_when_they_have_ended() {
    let mut rig = Rig::new(2, &[published(8080, 80)]);
    rig.sends(0, &udp((GUEST.1, 5000), (REMOTE.1, 9), b"x"));
    rig.pass(Duration::ZERO);
    rig.sends(1, &udp((GUEST.1, 5000), (REMOTE.1, 9), b"x"));
    rig.comes(1, &segment((REMOTE.1, 1000), (OURS.1, 8080), Flags::SYN, (1, 0)));
    assert_eq!(rig.came(1).len(), 1);
    rig.directory.guest_started();
    rig.sends(0, &udp((GUEST_2, 5000), (REMOTE.1, 9), b"x"));
    let first = &mut rig.workers[0];
    first.end.run_translation(rig.now, &mut first.engine, &mut first.port);
    rig.pass(Duration::ZERO);
    assert!(!leads_to(&mut rig, 1001, GUEST_2), "a flow of the second worker had it");
    let again = rig.workers[0].end.next_deadline().expect("tried again");
    rig.pass(again.since(rig.now).max(PUBLISH_PAUSE));
    assert!(leads_to(&mut rig, 1002, GUEST_2));
}

#[test]
fn the_guest_is_told_of_its_packet_that_nobody_on_the_link_answers_for() {
    let mut rig = Rig::new(1, &[]);
    let silent = Ipv4Addr::new(192, 0, 2, 77);
    // Its port lies outside of the range: it leaves from another.
    let sent = udp((GUEST.1, 5000), (silent, 9), b"anybody?");
    rig.sends(0, &sent);
    rig.workers[0].end.send_station_frames();
    assert_eq!(rig.left(0).len(), 1, "a question");
    assert_eq!(rig.came(0).len(), 0);
    for _ in 0..4 {
        rig.pass(Duration::from_secs(1));
    }
    let [told] = &rig.came(0)[..] else { panic!("one answer") };
    assert_eq!(told[..6], GUEST.0.0);
    assert_eq!(addr_at(told, SRC_AT), Ipv4Addr::new(10, 0, 2, 1), "of the gateway");
    assert_eq!((told[TRANSPORT_AT], told[TRANSPORT_AT + 1]), (3, 1), "host unreachable");
    let quote = &told[TRANSPORT_AT + 8..];
    // But for the hop it had taken, and the checksum over it.
    assert_eq!(quote[12..], sent[14 + 12..], "addresses and ports as the guest sent them");
    // What no longer fits is answered while its host counts as gone, and never without end.
    for port in 0..200 {
        rig.sends(0, &udp((GUEST.1, 6000 + port), (silent, 9), b"x"));
    }
    let most = (limits::ICMP_ERRORS_BURST + limits::ICMP_ERRORS_PER_SECOND) as usize;
    assert!((1..=most).contains(&rig.came(0).len()));
}

#[test]
fn a_scan_of_the_link_is_slowed_down_and_others_go_on() {
    let mut rig = Rig::new(1, &[]);
    for n in 0..2000u32 {
        let target = Ipv4Addr::from_bits(Ipv4Addr::new(192, 0, 2, 100).to_bits() + n % 150);
        rig.sends(0, &udp((GUEST.1, 5000), (target, 9), b"x"));
        rig.workers[0].end.send_station_frames();
    }
    let asked = rig.left(0).len();
    assert_eq!(asked, limits::STATION_QUESTIONS_BURST as usize);
    assert!(rig.workers[0].end.counters().dropped(DropReason::RateLimited) > 0);
    rig.sends(0, &udp((GUEST.1, 5000), (REMOTE.1, 9), b"x"));
    assert_eq!(rig.left(0).len(), 1, "who is known is reached");
}

/// A packet's fragment: where it begins, whether more follow, and its payload.
fn fragment(frame: &[u8]) -> (usize, bool, &[u8]) {
    let ip = ipv4::Header::parse(&frame[14..], frame.len() - 14).unwrap();
    (ip.fragment_offset_bytes.into(), ip.more_fragments, &frame[14 + ip.header_bytes..])
}

#[test]
fn packets_longer_than_the_next_link_are_cut_in_both_directions() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &udp((GUEST.1, 50_000), (REMOTE.1, 9), &[1; 4000]));
    let left = rig.left(0);
    let parts: Vec<_> = left.iter().map(|frame| fragment(frame)).collect();
    assert_eq!(
        parts.iter().map(|(at, more, _)| (*at, *more)).collect::<Vec<_>>(),
        [(0, true), (1480, true), (2960, false)]
    );
    assert!(left.iter().all(|frame| frame[..6] == REMOTE.0.0 && frame[6..12] == OURS.0.0));
    assert_eq!(parts.iter().map(|(_, _, payload)| payload.len()).sum::<usize>(), 4008);
    // Towards the guest: as it comes, handed over, and while there is no buffer.
    let answer = udp((REMOTE.1, 9), (OURS.1, 50_000), &[2; 4000]);
    rig.comes(0, &answer);
    let came = rig.came(0);
    assert_eq!(came.iter().map(|frame| fragment(frame).0).collect::<Vec<_>>(), [0, 1480, 2960]);
    assert!(came.iter().all(|frame| frame[..6] == GUEST.0.0));
    rig.comes(1, &answer);
    assert_eq!(rig.deliver_letters(), 1);
    assert_eq!(rig.came(0).len(), 3);
    rig.workers[0].port.buffers_bytes = 2000;
    rig.comes(0, &answer);
    assert_eq!(rig.came(0).len(), 1);
    rig.workers[0].port.buffers_bytes = 1 << 20;
    rig.workers[0].end.guest_has_buffers();
    rig.pass(Duration::ZERO);
    assert_eq!(rig.came(0).len(), 2, "the rest of it");
    let mut whole = udp((REMOTE.1, 9), (OURS.1, 50_000), &[2; 4000]);
    whole[20] = 0x40;
    sum_ip(&mut whole);
    rig.comes(0, &whole);
    let [told] = &rig.left(0)[..] else { panic!("its sender is told") };
    assert_eq!((told[TRANSPORT_AT], told[TRANSPORT_AT + 1]), (3, 4), "with DF");
    assert_eq!(rig.came(0).len(), 0);
}

/// An echo request, its checksum right.
fn echo(src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
    let mut frame = udp((src, 0), (dst, 0), b"are you there?");
    frame[14 + 9] = 1;
    let message = Message::EchoRequest { ident: 3, seq: 4 };
    message.emit_with_payload(b"are you there?", &mut frame[TRANSPORT_AT..]);
    sum_ip(&mut frame);
    frame
}

#[test]
fn who_asks_whether_our_address_is_there_is_answered_but_not_without_end() {
    let mut rig = Rig::new(1, &[]);
    let is_answer = |frame: &[u8], from: Ipv4Addr, to: Ipv4Addr| {
        let mut sum = Accumulator::new();
        sum.add_bytes(&frame[TRANSPORT_AT..]);
        assert_eq!(sum.finish(), 0, "the message's checksum");
        assert!(ipv4::Header::parse(&frame[14..], frame.len() - 14).is_ok());
        assert_eq!((addr_at(frame, SRC_AT), addr_at(frame, DST_AT)), (from, to));
        assert_eq!(frame[TRANSPORT_AT..][..2], [0, 0]);
        assert_eq!(frame[TRANSPORT_AT + 4..], echo(to, from)[TRANSPORT_AT + 4..], "all of it");
    };
    rig.comes(0, &echo(REMOTE.1, OURS.1));
    let [answer] = &rig.left(0)[..] else { panic!("one answer") };
    assert_eq!((&answer[..6], &answer[6..12]), (&REMOTE.0.0[..], &OURS.0.0[..]));
    is_answer(answer, OURS.1, REMOTE.1);
    rig.sends(0, &echo(GUEST.1, OURS.1));
    let [answer] = &rig.came(0)[..] else { panic!("the guest's as well") };
    assert_eq!((&answer[..6], &answer[6..12]), (&GUEST.0.0[..], &MacAddr::GATEWAY.0[..]));
    is_answer(answer, OURS.1, GUEST.1);
    let mut part = echo(REMOTE.1, OURS.1);
    part[20] = 0x20;
    sum_ip(&mut part);
    rig.comes(0, &part);
    assert_eq!(rig.left(0).len(), 0, "fragments are not put together");
    let mut answered = 0;
    for _ in 0..300 {
        rig.comes(0, &echo(REMOTE.1, OURS.1));
        answered += rig.left(0).len();
    }
    assert!(answered < STATION_ECHOES_BURST as usize, "{answered}");
    rig.pass(Duration::from_secs(1));
    rig.comes(0, &echo(REMOTE.1, OURS.1));
    assert_eq!(rig.left(0).len(), 1);
}

#[test]
fn a_connection_moves_to_the_queue_the_guest_uses_for_it_and_back() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &opens());
    rig.comes(0, &answers());
    assert_eq!((rig.left(0).len(), rig.came(0).len()), (1, 1));
    let acks = segment((GUEST.1, 50_000), (REMOTE.1, 80), Flags::ACK, (101, 501));
    for (queue, other) in [(1, 0), (0, 1)] {
        for n in 0..limits::PACKET_HANDED_FRAMES {
            rig.sends(queue, &acks);
            let letters = rig.deliver_letters();
            assert_eq!(letters, if n + 1 < limits::PACKET_HANDED_FRAMES { 1 } else { 2 }, "{queue} {n}");
            assert_eq!(rig.left(other).len(), 1);
        }
        for _ in 0..5 {
            rig.sends(queue, &acks);
            assert_eq!((rig.deliver_letters(), rig.left(queue).len()), (0, 1), "{queue}");
        }
        // What still comes by the other queue finds it.
        rig.comes(other, &segment((REMOTE.1, 80), (OURS.1, 50_000), Flags::ACK, (501, 101)));
        assert_eq!(rig.deliver_letters(), 1);
        assert_eq!((rig.came(queue).len(), rig.came(other).len()), (1, 0));
    }
    let flows: usize =
        rig.workers.iter().map(|w| w.end.translation.as_ref().unwrap().nat.table().len()).sum();
    assert_eq!(flows, 1, "the connection is one flow throughout");
}

#[test]
fn frames_handed_over_while_their_flow_moves_are_sent_after_it() {
    let mut rig = Rig::new(2, &[]);
    rig.sends(0, &opens());
    rig.comes(0, &answers());
    rig.left(0);
    let acks = segment((GUEST.1, 50_000), (REMOTE.1, 80), Flags::ACK, (101, 501));
    let more = 4;
    for _ in 0..limits::PACKET_HANDED_FRAMES + more {
        rig.sends(1, &acks);
    }
    rig.deliver_letters();
    assert_eq!(rig.left(0).len(), usize::from(limits::PACKET_HANDED_FRAMES));
    assert_eq!(rig.left(1).len(), usize::from(more), "by the new worker");
    let flows = |rig: &Rig, n: usize| rig.workers[n].end.translation.as_ref().unwrap().nat.table().len();
    assert_eq!((flows(&rig, 0), flows(&rig, 1)), (0, 1));
    // One on its way when the guest begins anew is nobody's, and its port free again.
    for _ in 0..limits::PACKET_HANDED_FRAMES {
        rig.sends(0, &acks);
    }
    while let Some((to, letter)) = rig.workers[0].end.next_letter() {
        let to = &mut rig.workers[usize::from(to.0)];
        to.end.letter(rig.now, letter, &mut to.engine, &mut to.port);
    }
    assert_eq!(flows(&rig, 1), 0);
    rig.directory.guest_started();
    rig.deliver_letters();
    assert_eq!((flows(&rig, 0), flows(&rig, 1)), (0, 0));
    let other = segment((GUEST_2, 50_000), (REMOTE.1, 80), Flags::SYN, (100, 0));
    rig.left(0);
    rig.sends(0, &other);
    assert_eq!(rig.left(0)[0][TRANSPORT_AT..][..2], 50_000u16.to_be_bytes(), "its own port is free");
}
