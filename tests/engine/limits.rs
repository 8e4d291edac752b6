//! Rate limits: what waits, in what order it goes on, and that pushing back loses nothing.

use std::net::SocketAddr;

use vunet::engine::counters::DropReason;
use vunet::engine::guest_port::GuestOffloads;
use vunet::rate_limit::RateLimits;
use vunet::wire::tcp::Flags;

use crate::frames::{GATEWAY, Seen, WORLD, echo_frame, gateway, guest, udp_frame, world};
use crate::rig::{Peer, READABLE, Rig, Setup, connected, ms, pattern, secs};

/// Headers of a segment of these tests.
const HEAD: usize = 54;
const MSS: usize = 1460;

const TSO: GuestOffloads =
    GuestOffloads { checksum: true, tso4: true, tso6: false, ecn: false, uso4: false, uso6: false };

pub(crate) fn limited(from_guest: &str, to_guest: &str) -> (Rig, RateLimits) {
    let (mut rig, limits) = (Rig::with(Setup::default()), RateLimits::default());
    limits.from_guest.set(rig.now, from_guest.parse().expect("a limit"));
    limits.to_guest.set(rig.now, to_guest.parse().expect("a limit"));
    rig.engine.limit_rates(&limits);
    (rig, limits)
}

/// A guest's end that sends as much as its window lets it, and never anything twice.
#[derive(Debug)]
struct Sender {
    peer: Peer,
    /// First byte that is not acknowledged, and behind the last that may be sent.
    una: u32,
    edge: u32,
}

impl Sender {
    fn new(rig: &mut Rig, port: u16) -> Sender {
        let mut peer = Peer { shift: Some(7), ..Peer::new(guest(port), world(80)) };
        peer.syn(rig);
        let n = rig.world().conns.len() - 1;
        let seen = rig.stream_ready(n, crate::rig::WRITABLE);
        peer.establish(rig, seen);
        // A SYN's window is not scaled, and never more than this.
        Sender { una: peer.seq, edge: peer.seq.wrapping_add(2 * MSS as u32), peer }
    }

    fn send_all_it_may(&mut self, rig: &mut Rig, segment_bytes: usize) {
        while self.edge.wrapping_sub(self.peer.seq) as usize >= segment_bytes {
            rig.feed_only(&self.peer.seg(Flags::ACK, &vec![7; segment_bytes]).frame());
            self.peer.seq = self.peer.seq.wrapping_add(segment_bytes as u32);
        }
    }

    fn take(&mut self, seen: &[Seen]) {
        for segment in seen {
            let Seen::Tcp(segment) = segment else { continue };
            if segment.to != SocketAddr::from(self.peer.from) {
                continue;
            }
            let ack = segment.header.ack.0;
            assert!(ack.wrapping_sub(self.una) < 1 << 30, "it acknowledges forwards");
            self.una = ack;
            self.edge = ack.wrapping_add(u32::from(segment.header.window) << 8);
        }
    }
}

/// Lets guests send for `time_ms`; what the sockets took, in order of flows.
fn upload(rig: &mut Rig, senders: &mut [Sender], segment_bytes: usize, time_ms: u64) -> Vec<usize> {
    let before: Vec<usize> = (0..senders.len()).map(|n| rig.conn(n).taken.len()).collect();
    for _ in 0..time_ms * 4 {
        (0..senders.len()).for_each(|n| rig.conn(n).room = 1 << 20);
        senders.iter_mut().for_each(|sender| sender.send_all_it_may(rig, segment_bytes));
        let mut seen = rig.end_of_batch();
        seen.extend(rig.pass(ms(1) / 4));
        senders.iter_mut().for_each(|sender| sender.take(&seen));
    }
    assert_eq!(rig.dropped(DropReason::TableFull), 0, "nothing is lost for the limit's sake");
    (0..senders.len()).map(|n| rig.conn(n).taken.len() - before[n]).collect()
}

fn assert_near(have: usize, want: usize, what: &str) {
    let bounds = want - want / 20..=want + want / 20;
    assert!(bounds.contains(&have), "{what}: {have}, not {want}");
}

#[test]
fn an_upload_takes_the_time_its_rate_says_and_nothing_is_dropped() {
    for (spec, bytes_a_second) in
        [("rate=8mbit", 1_000_000), ("rate=400mbit", 50_000_000), ("packets=1000", 1_514_000)]
    {
        let (mut rig, _) = limited(spec, "none");
        let mut senders = [Sender::new(&mut rig, 4000)];
        upload(&mut rig, &mut senders, MSS, 500);
        let passed = upload(&mut rig, &mut senders, MSS, 2000);
        let want = 2 * bytes_a_second / (MSS + HEAD) * MSS;
        assert_near(passed[0], want, spec);
        assert!(rig.engine.counters().limited_from_guest.waits > 10);
        assert!(rig.engine.nat().held_bytes() <= 512 << 10);
    }
}

#[test]
fn the_burst_passes_at_once() {
    let (mut rig, _) = limited("rate=8mbit,burst=20kb", "none");
    let mut sender = Sender::new(&mut rig, 4000);
    sender.edge = sender.una + 65_535;
    sender.send_all_it_may(&mut rig, MSS);
    rig.end_of_batch();
    let burst = 20 * 1024 / (MSS + HEAD) * MSS;
    assert_eq!(rig.conn(0).taken.len(), burst);
    rig.pass(secs(1));
    assert_eq!(rig.conn(0).taken.len(), 65_535 / MSS * MSS, "what was sent is passed on, unasked");
}

#[test]
fn uploads_share_evenly_whenever_they_began() {
    let (mut rig, _) = limited("rate=16mbit", "none");
    let mut senders = vec![Sender::new(&mut rig, 4000)];
    upload(&mut rig, &mut senders, MSS, 500);
    for port in 4001..4005 {
        senders.push(Sender::new(&mut rig, port));
    }
    upload(&mut rig, &mut senders, MSS, 500);
    let passed = upload(&mut rig, &mut senders, MSS, 4000);
    for bytes in &passed {
        assert_near(*bytes, 4 * 2_000_000 / (MSS + HEAD) * MSS / 5, "a fifth each");
    }
}

#[test]
fn writers_of_small_segments_lose_nothing() {
    let (mut rig, _) = limited("rate=1mbit", "none");
    let mut senders = [Sender::new(&mut rig, 4000)];
    upload(&mut rig, &mut senders, 10, 500);
    let passed = upload(&mut rig, &mut senders, 10, 1000);
    // Held bytes leave in whole segments, whatever they came in.
    assert!(passed[0] >= 100_000, "{passed:?}");
}

#[test]
fn a_fin_waits_behind_what_waits() {
    let (mut rig, _) = limited("rate=8mbit,burst=2000b", "none");
    let mut sender = Sender::new(&mut rig, 4000);
    sender.edge = sender.una + 20_000;
    sender.send_all_it_may(&mut rig, 1000);
    let seen = sender.peer.data(&mut rig, Flags::FIN, &[]);
    sender.take(&seen);
    assert!(!rig.conn(0).fin_from_guest && rig.conn(0).taken.len() < 3000);
    rig.pass(secs(1));
    assert!(rig.conn(0).fin_from_guest);
    assert_eq!(rig.conn(0).taken.len(), 20_000);
}

#[test]
fn a_socket_that_is_full_besides_goes_on_within_the_limit() {
    let (mut rig, _) = limited("rate=8mbit,burst=2000b", "none");
    let mut sender = Sender::new(&mut rig, 4000);
    rig.conn(0).room = 3000;
    sender.edge = sender.una + 20_000;
    sender.send_all_it_may(&mut rig, 1000);
    rig.end_of_batch();
    rig.pass(secs(1));
    assert_eq!(rig.conn(0).taken.len(), 3000);
    assert_eq!(rig.wakeups(secs(60)), 0, "no timer runs for a socket");
    rig.conn(0).room = 1 << 20;
    rig.stream_ready(0, crate::rig::WRITABLE);
    let at_once = rig.conn(0).taken.len();
    assert!(at_once <= 3000 + 2000, "{at_once}");
    rig.pass(secs(1));
    assert_eq!(rig.conn(0).taken.len(), 20_000);
}

#[test]
fn names_over_tcp_are_not_held_up() {
    let (mut rig, _) = limited("rate=1kbit,burst=100b", "rate=1kbit,burst=100b");
    let mut peer = connected(&mut rig, Peer::new(guest(4000), gateway(53)));
    let bytes = pattern(1400);
    for _ in 0..5 {
        peer.data(&mut rig, Flags::PSH, &bytes);
    }
    assert_eq!(rig.conn(0).taken.len(), 5 * 1400);
    rig.conn(0).queue.extend(pattern(5000));
    let seen = rig.stream_ready(0, READABLE);
    assert_eq!(peer.take(seen), pattern(5000));
}

/// Guests' ends that take what the world sends, each the `n`th stream.
struct Takers {
    peers: Vec<Peer>,
    taken: Vec<usize>,
}

impl Takers {
    fn new(rig: &mut Rig, count: u16) -> Takers {
        let peer = |port| Peer { shift: Some(7), ..Peer::new(guest(port), world(80)) };
        let peers: Vec<Peer> = (0..count).map(|n| connected(rig, peer(4000 + n))).collect();
        Takers { taken: vec![0; peers.len()], peers }
    }

    fn take(&mut self, seen: Vec<Seen>) {
        for segment in seen {
            let to = segment.clone().tcp().to;
            // Resets of those that are gone.
            let at = self.peers.iter().position(|peer| SocketAddr::from(peer.from) == to);
            let Some(at) = at else { continue };
            // Panics at anything that does not follow.
            self.taken[at] += self.peers[at].take(vec![segment]).len();
        }
    }

    /// The world sends without end for `time_ms`; what each took of it.
    fn download(&mut self, rig: &mut Rig, time_ms: u64) -> Vec<usize> {
        let before = self.taken.clone();
        for _ in 0..time_ms {
            for n in 0..self.peers.len() {
                let missing = 120_000usize.saturating_sub(rig.conn(n).queue.len());
                rig.conn(n).queue.extend(vec![9; missing]);
                let seen = rig.stream_ready(n, READABLE);
                self.take(seen);
            }
            let seen = rig.pass(ms(1));
            self.take(seen);
            for n in 0..self.peers.len() {
                let seen = self.peers[n].acknowledge(rig);
                self.take(seen);
            }
        }
        self.taken.iter().zip(before).map(|(now, before)| now - before).collect()
    }

    /// A millisecond of it; how many datagrams came meanwhile.
    fn download_beside(&mut self, rig: &mut Rig) -> usize {
        let missing = 120_000usize.saturating_sub(rig.conn(0).queue.len());
        rig.conn(0).queue.extend(vec![9; missing]);
        let mut seen = rig.stream_ready(0, READABLE);
        seen.extend(rig.pass(ms(1)));
        seen.extend(self.peers[0].acknowledge(rig));
        let (udp, tcp): (Vec<Seen>, Vec<Seen>) =
            seen.into_iter().partition(|seen| matches!(seen, Seen::Udp { .. }));
        self.take(tcp);
        udp.len()
    }
}

#[test]
fn a_download_takes_the_time_its_rate_says_and_nothing_is_sent_twice() {
    for (spec, bytes_a_second) in
        [("rate=8mbit", 1_000_000), ("rate=400mbit", 50_000_000), ("packets=1000", 1_514_000)]
    {
        for offloads in [GuestOffloads::default(), TSO] {
            let (mut rig, _) = limited("none", spec);
            rig.port.offloads = offloads;
            let mut takers = Takers::new(&mut rig, 1);
            takers.download(&mut rig, 500);
            let taken = takers.download(&mut rig, 2000);
            assert_near(taken[0], 2 * bytes_a_second / (MSS + HEAD) * MSS, spec);
            assert_eq!(rig.engine.counters().retransmits, 0);
            assert!(rig.engine.counters().limited_to_guest.waits > 10);
        }
    }
}

#[test]
fn downloads_share_evenly_and_what_they_do_not_use_is_anybodys() {
    let (mut rig, _) = limited("none", "rate=16mbit");
    let mut takers = Takers::new(&mut rig, 5);
    takers.download(&mut rig, 500);
    let taken = takers.download(&mut rig, 4000);
    for bytes in &taken {
        assert_near(*bytes, 4 * 2_000_000 / (MSS + HEAD) * MSS / 5, "a fifth each");
    }
    // Four of them end.
    for n in 1..5 {
        rig.conn(n).error = Some(libc::ECONNRESET);
        rig.conn(n).queue.clear();
        rig.stream_ready(n, crate::rig::FAILED);
    }
    takers.peers.truncate(1);
    takers.taken.truncate(1);
    let taken = takers.download(&mut rig, 1000);
    assert_near(taken[0], 2_000_000 / (MSS + HEAD) * MSS, "all of it");
}

#[test]
fn acknowledgements_do_not_wait_behind_data_that_does() {
    let (mut rig, _) = limited("none", "rate=1kbit");
    let mut takers = Takers::new(&mut rig, 1);
    takers.download(&mut rig, 10);
    let mut peer = takers.peers[0];
    let mut seen = peer.data(&mut rig, Flags::PSH, b"question");
    seen.extend(rig.pass(ms(2)));
    let acks: Vec<u32> = seen.into_iter().map(|segment| segment.tcp().header.ack.0).collect();
    assert_eq!(acks.last(), Some(&peer.seq));
    assert_eq!(rig.conn(0).taken, b"question");
}

#[test]
fn a_guest_without_buffers_and_a_limit_wait_for_both() {
    let (mut rig, _) = limited("none", "rate=8mbit,burst=2000b");
    let mut takers = Takers::new(&mut rig, 3);
    takers.download(&mut rig, 20);
    rig.port.free = 0;
    for _ in 0..50 {
        takers.download(&mut rig, 10);
    }
    assert!(rig.engine.nat().waiting_len() <= 10, "{} places", rig.engine.nat().waiting_len());
    assert!(rig.wakeups(secs(3600)) < 20, "no timer runs against a guest without buffers");
    let seen = rig.post_buffers(1_000_000);
    takers.take(seen);
    takers.download(&mut rig, 500);
    let taken = takers.download(&mut rig, 1000);
    assert_near(taken.iter().sum(), 1_000_000 / (MSS + HEAD) * MSS, "all of it");
    assert!(taken.iter().all(|bytes| *bytes > 250_000), "{taken:?}");
}

#[test]
fn a_limit_that_is_changed_or_lifted_holds_at_once() {
    let (mut rig, limits) = limited("rate=1mbit", "rate=1mbit");
    let mut senders = [Sender::new(&mut rig, 5000)];
    upload(&mut rig, &mut senders, MSS, 1000);
    limits.from_guest.set(rig.now, "rate=80mbit".parse().expect("a limit"));
    rig.engine.limits_changed(rig.now);
    upload(&mut rig, &mut senders, MSS, 200);
    let passed = upload(&mut rig, &mut senders, MSS, 500);
    assert_near(passed[0], 5_000_000 / (MSS + HEAD) * MSS, "the new rate");
    limits.from_guest.set(rig.now, "none".parse().expect("a limit"));
    rig.engine.limits_changed(rig.now);
    rig.pass(ms(0));
    assert_eq!(rig.engine.nat().held_bytes(), 0, "what waited has passed");
    let passed = upload(&mut rig, &mut senders, MSS, 20);
    assert!(passed[0] > 5_000_000, "{passed:?}");
}

#[test]
fn with_no_limit_no_timer_runs() {
    let (mut rig, _) = limited("none", "none");
    let mut takers = Takers::new(&mut rig, 1);
    rig.conn(0).queue.extend(pattern(3000));
    let seen = rig.stream_ready(0, READABLE);
    takers.take(seen);
    takers.peers[0].acknowledge(&mut rig);
    assert!(rig.wakeups(secs(3600)) <= 2, "no more than old deadlines of the flow");
}

#[test]
fn flows_that_end_while_they_wait_leave_nothing_behind() {
    let (mut rig, _) = limited("rate=1kbit,burst=100b", "rate=1kbit,burst=100b");
    for n in 0..2000u16 {
        let mut peer = connected(&mut rig, Peer::new(guest(4000 + n), world(80)));
        peer.data(&mut rig, Flags::PSH, &pattern(1400));
        rig.conn(usize::from(n)).queue.extend(pattern(1400));
        rig.stream_ready(n.into(), READABLE);
        let taken = rig.conn(usize::from(n)).taken.len();
        peer.seq = peer.seq - 1400 + taken as u32;
        peer.data(&mut rig, Flags::RST, &[]);
        rig.now = rig.now + ms(1);
    }
    assert!(rig.engine.nat().is_empty());
    assert!(rig.engine.nat().waiting_len() < 1000, "{}", rig.engine.nat().waiting_len());
    assert!(rig.wakeups(secs(3600)) < 100);
    rig.assert_empty();
}

/// Lets the guest send datagrams of 958 bytes (1000 as frames) for `time_ms`: so many a millisecond of each port.
/// How many of each left.
fn flood(rig: &mut Rig, each: &[(u16, usize)], time_ms: u64) -> Vec<usize> {
    let from = |rig: &mut Rig, port: u16| -> usize {
        let mut world = rig.world();
        let sent = world.socks.iter_mut().filter(|sock| sock.wished_port == port);
        sent.map(|sock| sock.sent.len()).sum()
    };
    let before: Vec<usize> = each.iter().map(|(port, _)| from(rig, *port)).collect();
    for _ in 0..time_ms {
        for (port, count) in each {
            (0..*count).for_each(|_| rig.feed_only(&udp_frame(guest(*port), world(9), &[5; 958])));
        }
        rig.end_of_batch();
        rig.pass(ms(1));
    }
    each.iter().zip(before).map(|((port, _), before)| from(rig, *port) - before).collect()
}

#[test]
fn a_flood_of_datagrams_is_cut_to_the_rate_and_starves_no_other_flow() {
    let (mut rig, _) = limited("rate=8mbit", "none");
    flood(&mut rig, &[(5000, 20)], 300);
    let left = flood(&mut rig, &[(5000, 20)], 1000);
    assert_near(left[0], 1000, "all of it");
    // 200 packets a second beside 20,000.
    let mut passed = [0, 0];
    for _ in 0..200 {
        let left = flood(&mut rig, &[(5000, 20), (5001, 1)], 1);
        let more = flood(&mut rig, &[(5000, 20)], 4);
        passed = [passed[0] + left[0] + more[0], passed[1] + left[1]];
    }
    assert!(passed[1] >= 195, "{passed:?}");
    // Less what the flood alone was in debt, and the half of the bucket that is left to others.
    assert!((880..=1020).contains(&(passed[0] + passed[1])), "{passed:?}");
    let counters = rig.engine.counters();
    assert_eq!(counters.dropped(DropReason::OverLimit), counters.limited_from_guest.dropped_packets);
    assert_eq!(counters.limited_from_guest.dropped_bytes, 1000 * counters.limited_from_guest.dropped_packets);
}

#[test]
fn a_flood_of_datagrams_leaves_half_to_a_connection() {
    let (mut rig, _) = limited("rate=8mbit", "none");
    let mut senders = [Sender::new(&mut rig, 4000)];
    let (mut datagrams, mut taken) = (0, 0);
    for n in 0..3000 {
        let left = flood(&mut rig, &[(5000, 20)], 1);
        upload(&mut rig, &mut senders, MSS, 1);
        if n == 1000 {
            taken = rig.conn(0).taken.len();
        }
        datagrams += if n > 1000 { left[0] } else { 0 };
    }
    let taken = rig.conn(0).taken.len() - taken;
    // Four seconds, for each takes a millisecond of its own.
    assert_near(datagrams * 1000, 2_000_000, "datagrams");
    assert_near(taken, 2_000_000 / (MSS + HEAD) * MSS, "the connection");
}

#[test]
fn services_of_the_gateway_are_heard_and_heard_from_behind_any_limit() {
    let (mut rig, _) =
        limited("rate=1kbit,burst=100b,packets=1,packets-burst=1,flows=1", "rate=1kbit,burst=100b");
    flood(&mut rig, &[(5000, 20)], 10);
    for n in 0..20 {
        let seen = rig.send(&echo_frame(GATEWAY, 7, n, b"ping"));
        assert!(matches!(seen[..], [Seen::Icmp { .. }]), "{seen:?}");
        let asked = crate::gateway::query(n, "example.org", None);
        rig.send(&udp_frame(guest(5353), gateway(53), &asked));
        assert!(rig.engine.next_dns_forward().is_some());
    }
}

#[test]
fn datagrams_of_the_world_wait_in_their_sockets_and_share_with_connections() {
    let (mut rig, _) = limited("none", "rate=8mbit");
    let mut takers = Takers::new(&mut rig, 1);
    rig.send(&udp_frame(guest(5000), world(9), b"begins"));
    let sock = 0;
    let mut datagrams = [0, 0];
    for n in 0..2000 {
        for _ in 0..5 {
            rig.sock(sock).inbox.push_back((vec![1; 958], world(9).into()));
        }
        let token = rig.sock(sock).token;
        let mut seen = rig.ready(token, READABLE);
        seen.extend(rig.pass(ms(0)));
        let (udp, tcp): (Vec<Seen>, Vec<Seen>) =
            seen.into_iter().partition(|seen| matches!(seen, Seen::Udp { .. }));
        takers.take(tcp);
        datagrams[usize::from(n >= 1000)] += udp.len();
        datagrams[usize::from(n >= 1000)] += takers.download_beside(&mut rig);
    }
    assert!((400..=600).contains(&datagrams[1]), "{datagrams:?} of 500");
    assert_eq!(rig.engine.counters().dropped_total(), 0);
    assert!(rig.sock(sock).inbox.len() > 5000, "they wait where they are");
}

#[test]
fn flows_begin_as_often_as_the_limit_lets_them() {
    let (mut rig, _) = limited("flows=10,flows-burst=5", "none");
    let begun = |rig: &mut Rig| rig.engine.counters().flows_opened;
    for port in 0..20 {
        assert_eq!(Peer::new(guest(4000 + port), world(80)).syn(&mut rig), [], "no answer: it tries again");
    }
    assert_eq!(begun(&mut rig), 5);
    rig.pass(secs(1));
    for port in 0..20 {
        rig.send(&udp_frame(guest(5000 + port), world(9), b"x"));
    }
    rig.send(&echo_frame(WORLD, 7, 1, b"ping"));
    assert_eq!(begun(&mut rig), 10);
    assert_eq!(rig.dropped(DropReason::FlowLimit), 15 + 16);
    assert_eq!(rig.engine.counters().limited_from_guest.refused_flows, 31);
    // Those that are there go on, and names are asked for.
    rig.send(&udp_frame(guest(5000), world(9), b"y"));
    assert_eq!(rig.sock(0).sent.len(), 2);
    connected(&mut rig, Peer::new(guest(6000), gateway(53)));
}

#[test]
fn clients_beyond_the_limit_of_flows_wait_in_the_backlog() {
    let (mut rig, _) = limited("none", "flows=10,flows-burst=2");
    let listener = rig.engine.nat().net().listener();
    let token = rig.engine.nat().next_listener_token();
    rig.publish_tcp(80, listener);
    rig.send(&udp_frame(guest(5000), world(9), b"it is there"));
    for n in 0..10u16 {
        rig.world().backlogs[0].push_back(SocketAddr::from(([198, 51, 100, 9], 1000 + n)));
    }
    rig.ready(token, READABLE);
    assert_eq!(rig.world().backlogs[0].len(), 8);
    rig.pass(ms(500));
    assert_eq!(rig.world().backlogs[0].len(), 3);
    rig.pass(secs(1));
    assert_eq!(rig.world().backlogs[0].len(), 0);
    assert_eq!(rig.engine.counters().dropped_total(), 0);
}
