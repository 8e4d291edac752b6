//! Guests that post no receive buffers, or whose ring is down: everything waits, nothing spins, all
//! of it goes on.

use std::net::SocketAddr;

use vunet::wire::tcp::Flags;

use crate::frames::{GATEWAY, Seen, WORLD, echo_frame, gateway, guest, udp_frame, world};
use crate::gateway::query;
use crate::rig::{Peer, READABLE, Rig, WORLD_FIN, WRITABLE, connected, pattern, secs};
use crate::world::End;

/// Both ways a guest may not receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    Buffers,
    Ring,
}

const BOTH: [Lack; 2] = [Lack::Buffers, Lack::Ring];

fn begin(rig: &mut Rig, lack: Lack) {
    match lack {
        Lack::Buffers => rig.port.free = 0,
        Lack::Ring => rig.port.is_up = false,
    }
}

/// Nothing runs while the guest does not receive: no turn at once, no timer to speak of.
fn asleep(rig: &mut Rig) {
    assert!(!rig.engine.flush(&mut rig.port), "it spins");
    assert!(rig.wakeups(secs(3600)) <= 8, "it is woken again and again");
    assert_eq!(rig.take(), []);
}

fn end(rig: &mut Rig, lack: Lack) -> Vec<Seen> {
    match lack {
        Lack::Buffers => rig.post_buffers(1000),
        Lack::Ring => rig.ring_up(),
    }
}

#[test]
fn data_waits_in_its_socket() {
    for lack in BOTH {
        let mut rig = Rig::new();
        let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
        begin(&mut rig, lack);
        rig.conn(0).queue.extend(pattern(20_000));
        assert_eq!(rig.stream_ready(0, READABLE), []);
        asleep(&mut rig);
        let seen = end(&mut rig, lack);
        assert_eq!(peer.take(seen), pattern(20_000));
        assert_eq!(rig.engine.counters().retransmits, 0);
    }
}

#[test]
fn a_name_s_answer_goes_before_all_bytes_that_wait_for_buffers() {
    let mut rig = Rig::new();
    for n in 0..20 {
        connected(&mut rig, Peer::new(guest(4000 + n), world(80)));
    }
    let asked = query(9, "example.org", None);
    rig.send(&udp_frame(guest(5353), gateway(53), &asked));
    let forward = rig.engine.next_dns_forward().expect("a question to forward");
    begin(&mut rig, Lack::Buffers);
    for n in 0..20 {
        rig.conn(n).queue.extend(pattern(60_000));
        assert_eq!(rig.stream_ready(n, READABLE), []);
    }
    let mut answer = asked;
    answer[2] |= 0x80;
    rig.engine.dns_answer(rig.now, &mut rig.port, forward.id, &answer);
    assert_eq!(rig.flush(), []);
    let seen = rig.post_buffers(1);
    let Seen::Udp { payload, .. } = &seen[0] else { panic!("bulk went first") };
    assert_eq!(*payload, answer);
}

#[test]
fn a_name_is_asked_for_behind_bulk_that_no_socket_takes() {
    let mut rig = Rig::new();
    rig.world().room = 0;
    let mut peers: Vec<Peer> =
        (0..50).map(|n| connected(&mut rig, Peer::new(guest(4000 + n), world(80)))).collect();
    // More than the pools of refused bytes hold; nothing of it is taken.
    for _ in 0..40 {
        for peer in &mut peers {
            peer.data(&mut rig, Flags::PSH, &pattern(1400));
        }
    }
    let asked = query(9, "example.org", None);
    rig.send(&udp_frame(guest(5353), gateway(53), &asked));
    assert_eq!(rig.engine.next_dns_forward().map(|forward| forward.query), Some(asked));
}

#[test]
fn a_handshake_waits() {
    for lack in BOTH {
        let mut rig = Rig::new();
        let mut peer = Peer::new(guest(4000), world(80));
        peer.syn(&mut rig);
        begin(&mut rig, lack);
        assert_eq!(rig.stream_ready(0, WRITABLE), []);
        asleep(&mut rig);
        let seen = end(&mut rig, lack);
        peer.establish(&mut rig, seen);
    }
}

#[test]
fn acknowledgements_fins_and_window_updates_wait() {
    for lack in BOTH {
        let mut rig = Rig::new();
        rig.world().room = 3000;
        let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
        begin(&mut rig, lack);
        assert_eq!(peer.data(&mut rig, Flags::PSH, &pattern(3000)), []);
        rig.conn(0).room = 50_000;
        assert_eq!(rig.stream_ready(0, WRITABLE), []);
        rig.conn(0).fin_from_world = true;
        assert_eq!(rig.stream_ready(0, WORLD_FIN), []);
        asleep(&mut rig);
        let seen = end(&mut rig, lack);
        let last = seen.last().expect("an answer").clone().tcp();
        assert!(last.has(Flags::FIN));
        assert_eq!((last.header.ack.0, last.header.window), (peer.seq, 50_000));
        peer.take(seen);
        peer.data(&mut rig, Flags::FIN, &[]);
        assert_eq!(rig.conn(0).end, End::Clean);
    }
}

#[test]
fn a_reset_of_the_world_waits() {
    let mut rig = Rig::new();
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    begin(&mut rig, Lack::Buffers);
    rig.conn(0).error = Some(libc::ECONNRESET);
    rig.stream_ready(0, crate::rig::FAILED);
    asleep(&mut rig);
    let seen = end(&mut rig, Lack::Buffers);
    assert!(seen[0].clone().tcp().has(Flags::RST));
    rig.assert_empty();
}

#[test]
fn a_lost_segment_is_sent_again_once_there_are_buffers() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.conn(0).queue.extend(pattern(3000));
    rig.stream_ready(0, READABLE);
    begin(&mut rig, Lack::Buffers);
    assert_eq!(rig.pass(secs(1)), []);
    asleep(&mut rig);
    let seen = end(&mut rig, Lack::Buffers);
    assert_eq!(peer.take(seen), pattern(3000));
}

#[test]
fn a_timer_goes_on_after_the_wait() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    begin(&mut rig, Lack::Buffers);
    rig.conn(0).queue.extend(pattern(100));
    rig.stream_ready(0, READABLE);
    asleep(&mut rig);
    assert_eq!(end(&mut rig, Lack::Buffers).len(), 1);
    let seen = rig.pass(secs(1));
    assert!(!seen.is_empty(), "what went out unanswered is sent again");
    assert_eq!(peer.take(vec![seen[0].clone()]), pattern(100));
}

#[test]
fn datagrams_wait_in_their_sockets() {
    for lack in BOTH {
        let mut rig = Rig::new();
        rig.send(&udp_frame(guest(4000), world(53), b"ask"));
        rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
        begin(&mut rig, lack);
        for n in 0..10 {
            assert_eq!(rig.datagram_arrives(0, &[n], world(53).into()), []);
        }
        let reply = [0, 0, 0, 0, 0, 9, 0, 1, b'p'];
        assert_eq!(rig.datagram_arrives(1, &reply, SocketAddr::new(WORLD.into(), 0)), []);
        assert_eq!(rig.sock(0).inbox.len(), 10);
        assert!(!rig.engine.flush(&mut rig.port), "it spins");
        assert_eq!(rig.take(), []);
        let seen = end(&mut rig, lack);
        assert_eq!(seen.len(), 11);
    }
}

#[test]
fn more_datagrams_than_one_turn_all_arrive() {
    let mut rig = Rig::new();
    rig.send(&udp_frame(guest(4000), world(53), b"ask"));
    rig.port.free = 0;
    let count = 3 * crate::world::TURN + 7;
    for n in 0..count {
        rig.sock(0).inbox.push_back((n.to_be_bytes().to_vec(), world(53).into()));
    }
    let token = rig.sock(0).token;
    rig.ready(token, READABLE);
    let mut seen = Vec::new();
    while seen.len() < count {
        let more = rig.post_buffers(50);
        assert!(!more.is_empty());
        seen.extend(more);
    }
    for (n, seen) in seen.into_iter().enumerate() {
        let Seen::Udp { payload, .. } = seen else { panic!("not UDP") };
        assert_eq!(payload, n.to_be_bytes());
    }
}

#[test]
fn one_socket_that_floods_leaves_others_their_turn() {
    let mut rig = Rig::new();
    rig.send(&udp_frame(guest(4000), world(53), b"ask"));
    rig.send(&udp_frame(guest(4001), world(53), b"ask"));
    for _ in 0..10_000 {
        rig.sock(0).inbox.push_back((vec![0; 100], world(53).into()));
    }
    rig.sock(1).inbox.push_back((b"other".to_vec(), world(53).into()));
    let flood = rig.sock(0).token;
    let other = rig.sock(1).token;
    for _ in 0..5 {
        rig.engine.host_ready(rig.now, &mut rig.port, flood, READABLE);
    }
    rig.engine.host_ready(rig.now, &mut rig.port, other, READABLE);
    assert!(rig.engine.flush(&mut rig.port));
    let received = rig.sock(0).receives;
    rig.engine.flush(&mut rig.port);
    let turn = rig.sock(0).receives - received;
    assert_eq!(turn, crate::world::TURN, "one turn a batch, however often it was ready");
}

#[test]
fn answers_of_the_gateway_wait_for_buffers() {
    let mut rig = Rig::new();
    begin(&mut rig, Lack::Buffers);
    rig.send(&echo_frame(GATEWAY, 1, 1, &pattern(3000)[..1000]));
    rig.send(&udp_frame(guest(5353), gateway(53), &query(1, "host.vunet.internal", None)));
    rig.send(&Peer::new(guest(4000), gateway(22)).seg(Flags::SYN, &[]).frame());
    rig.send(&udp_frame(guest(4000), gateway(161), b"x"));
    asleep(&mut rig);
    let seen = end(&mut rig, Lack::Buffers);
    assert_eq!(seen.len(), 4);
}

#[test]
fn waiting_frames_and_waiting_flows_all_get_buffers_in_the_end() {
    let mut rig = Rig::new();
    let mut peers: Vec<Peer> =
        (0..40).map(|n| connected(&mut rig, Peer::new(guest(4000 + n), world(80)))).collect();
    rig.send(&udp_frame(guest(9000), world(53), b"ask"));
    begin(&mut rig, Lack::Buffers);
    for n in 0..40 {
        rig.conn(n).queue.extend(pattern(5000));
        rig.stream_ready(n, READABLE);
    }
    for _ in 0..20 {
        rig.send(&echo_frame(GATEWAY, 1, 1, b"x"));
        rig.datagram_arrives(0, b"answer", world(53).into());
    }
    let mut received = vec![Vec::new(); 40];
    let mut others = 0;
    for _ in 0..200 {
        for seen in rig.post_buffers(1) {
            match seen {
                Seen::Tcp(segment) => {
                    let n = usize::from(segment.to.port() - 4000);
                    received[n].extend(peers[n].take(vec![Seen::Tcp(segment)]));
                }
                _ => others += 1,
            }
        }
    }
    assert_eq!(others, 40);
    assert!(received.iter().all(|bytes| *bytes == pattern(5000)));
}

#[test]
fn a_guest_reset_while_nothing_is_received_leaves_nothing_waiting() {
    for lack in BOTH {
        let mut rig = Rig::new();
        connected(&mut rig, Peer::new(guest(4000), world(80)));
        rig.send(&udp_frame(guest(4000), world(53), b"ask"));
        begin(&mut rig, lack);
        rig.conn(0).queue.extend(pattern(5000));
        rig.stream_ready(0, READABLE);
        rig.datagram_arrives(0, b"answer", world(53).into());
        rig.send(&echo_frame(GATEWAY, 1, 1, b"x"));
        rig.engine.guest_reset();
        rig.assert_empty();
        assert_eq!(end(&mut rig, lack), []);
        assert!(!rig.engine.nat().is_starved());
    }
}

#[test]
fn those_that_ended_while_they_waited_are_not_remembered_without_bound() {
    const FLOWS_MAX: usize = 64;
    for is_tcp in [true, false] {
        let mut rig = Rig::with(crate::rig::Setup { flows_max: FLOWS_MAX, ..crate::rig::Setup::default() });
        begin(&mut rig, Lack::Buffers);
        for n in 0..2000 {
            let own = guest(4000 + n as u16);
            if is_tcp {
                Peer::new(own, world(80)).syn(&mut rig);
                rig.stream_ready(n, WRITABLE);
            } else {
                rig.send(&udp_frame(own, world(9), b"ask"));
                rig.datagram_arrives(n, b"answer", world(9).into());
            }
        }
        let waiting = rig.engine.nat().waiting_len();
        assert!((1..=4 * FLOWS_MAX).contains(&waiting), "{waiting}");
        assert!(!end(&mut rig, Lack::Buffers).is_empty());
        assert_eq!(rig.engine.nat().waiting_len(), 0);
    }
}

#[test]
fn buffers_too_small_for_a_full_datagram_still_take_small_ones() {
    // A driver without mergeable buffers that knows nothing of the larger MTU.
    let mut rig = Rig::with(crate::rig::Setup { ip_mtu: 9000, ..crate::rig::Setup::default() });
    rig.port.frame_bytes_max = 1514;
    rig.send(&udp_frame(guest(4000), world(69), b"ask"));
    let seen = rig.datagram_arrives(0, &pattern(512), world(69).into());
    assert_eq!(seen, [Seen::Udp { from: world(69).into(), to: guest(4000).into(), payload: pattern(512) }]);
    assert_eq!(rig.datagram_arrives(0, &pattern(5000), world(69).into()), [], "no buffer holds it");
    rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
    let mut reply = vec![0, 0, 0, 0, 0, 9, 0, 1];
    reply.extend(pattern(64));
    assert_eq!(rig.datagram_arrives(1, &reply, SocketAddr::new(WORLD.into(), 0)).len(), 1);
}
