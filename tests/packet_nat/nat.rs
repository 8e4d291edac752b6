//! What becomes of packets that pass the NAT, told by what each end sees.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use vunet::config::{Protocol as Transport, UdpConfig, UdpFiltering, UdpMapping};
use vunet::engine::counters::DropReason;
use vunet::engine::flows::Ended;
use vunet::engine::packet::config::PacketNatConfig;
use vunet::engine::packet::ports::{Mappings, WorkerSet};
use vunet::engine::packet::resets::Reset;
use vunet::engine::packet::{Side, Verdict};
use vunet::engine::placement::WorkerId;
use vunet::wire::checksum;
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags};
use vunet::wire::vnet::{Gso, GsoKind, VnetHeader};

use crate::config;
use crate::packets::{self, Body, Frame, IP_AT, TRANSPORT_AT, word};
use crate::rig::{GATEWAY, GUEST, GUEST_2, OTHER, OUTSIDE, PORTS, REMOTE, Rig, published, settings, source};

const SYN: Flags = Flags::SYN;
const ACK: Flags = Flags::ACK;

fn hop(frame: Frame) -> Frame {
    Frame { ttl: frame.ttl - 1, ..frame }
}

#[test]
fn a_reply_comes_back_to_who_asked() {
    let mut rig = Rig::new(settings());
    for asked in [
        Frame::udp((GUEST, 5000), (REMOTE, 53), b"question"),
        Frame::tcp((GUEST, 5000), (REMOTE, 80), SYN, 100, 0),
        Frame::echo(8, GUEST, REMOTE, 77),
        Frame { body: Body::Plain(Protocol(47)), ..Frame::udp((GUEST, 0), (REMOTE, 0), b"tunnel") },
        Frame { body: Body::Summed(Protocol(33)), ..Frame::udp((GUEST, 0), (REMOTE, 0), b"dccp") },
    ] {
        let left = rig.out(&asked);
        let port = match asked.body {
            Body::Query { .. } => word(&left, TRANSPORT_AT + 4),
            Body::Plain(_) | Body::Summed(_) => 0,
            _ => source(&left).1,
        };
        let mut seen = hop(Frame { src: (OUTSIDE, port), ..asked.clone() });
        if let Body::Query { .. } = asked.body {
            seen.dst.1 = port;
        }
        assert_eq!(left, seen.build(), "as the world sees it");
        let body = match asked.body.clone() {
            Body::Query { .. } => Body::Query { kind: 0, seq: 7 },
            Body::Tcp(header) => Body::Tcp(tcp::Header {
                flags: SYN | ACK,
                seq: tcp::SeqNumber(900),
                ack: tcp::SeqNumber(101),
                ..header
            }),
            body => body,
        };
        let answer =
            Frame { src: seen.dst, dst: seen.src, body, payload: b"answer".to_vec(), ..asked.clone() };
        let answer =
            if let Body::Tcp(_) = answer.body { Frame { payload: vec![], ..answer } } else { answer };
        let expected = hop(Frame { src: asked.dst, dst: asked.src, ..answer.clone() });
        assert_eq!(rig.inn(&answer), expected.build(), "as the guest sees the answer");
    }
    assert_eq!(rig.nat.counters().flows_opened, 5);
}

#[test]
fn all_of_one_guest_port_leave_from_one_external_port() {
    let mut rig = Rig::new(settings());
    let mut leaves = |remote, port| source(&rig.out(&Frame::udp((GUEST, 5000), (remote, port), b"x"))).1;
    let first = leaves(REMOTE, 1);
    assert!(PORTS.contains(&first) && first % 2 == 0, "in the range, parity kept: {first}");
    assert_eq!([leaves(REMOTE, 2), leaves(OTHER, 1), leaves(REMOTE, 1)], [first; 3]);
    let kept = source(&rig.out(&Frame::udp((GUEST, 50_001), (REMOTE, 1), b"x"))).1;
    assert_eq!(kept, 50_001, "the guest's own, where it lies in the range");

    let udp = UdpConfig { mapping: UdpMapping::AddressAndPortDependent, ..UdpConfig::default() };
    let mut rig = Rig::new(PacketNatConfig { udp, ..settings() });
    let mut leaves = |remote, port| source(&rig.out(&Frame::udp((GUEST, 5000), (remote, port), b"x"))).1;
    let ports: HashSet<u16> = [leaves(REMOTE, 1), leaves(REMOTE, 2), leaves(OTHER, 1)].into();
    assert_eq!(ports.len(), 3);
    assert!(ports.contains(&leaves(REMOTE, 1)));
}

#[test]
fn who_was_not_spoken_to_comes_in_as_filtering_says() {
    for (filtering, same_address, anybody) in [
        (UdpFiltering::AddressAndPortDependent, false, false),
        (UdpFiltering::AddressDependent, true, false),
        (UdpFiltering::EndpointIndependent, true, true),
    ] {
        let udp = UdpConfig { filtering, ..UdpConfig::default() };
        let mut rig = Rig::new(PacketNatConfig { udp, ..settings() });
        let external = source(&rig.out(&Frame::udp((GUEST, 5000), (REMOTE, 1), b"x"))).1;
        for (from, comes) in [((REMOTE, 1), true), ((REMOTE, 9), same_address), ((OTHER, 9), anybody)] {
            let stranger = Frame::udp(from, (OUTSIDE, external), b"hello");
            if !comes {
                rig.dropped(Side::World, &stranger, DropReason::Filtered);
                continue;
            }
            assert_eq!(rig.inn(&stranger), hop(Frame { dst: (GUEST, 5000), ..stranger.clone() }).build());
            let answer = Frame::udp((GUEST, 5000), from, b"hello yourself");
            assert_eq!(rig.out(&answer), hop(Frame { src: (OUTSIDE, external), ..answer.clone() }).build());
        }
        // Everything ends, and with it the right to come in.
        rig.pass(Duration::from_secs(3600));
        assert_eq!(rig.nat.table().len(), 0);
        rig.dropped(Side::World, &Frame::udp((REMOTE, 1), (OUTSIDE, external), b"late"), DropReason::NoFlow);
    }
}

#[test]
fn a_stranger_without_an_answer_keeps_nothing_alive() {
    let udp = UdpConfig { filtering: UdpFiltering::EndpointIndependent, ..UdpConfig::default() };
    let mut rig = Rig::new(PacketNatConfig { udp, ..settings() });
    let external = source(&rig.out(&Frame::udp((GUEST, 5000), (REMOTE, 1), b"x"))).1;
    let stranger = Frame::udp((OTHER, 9), (OUTSIDE, external), b"hello");
    rig.inn(&stranger);
    assert_eq!(rig.nat.table().len(), 2);
    for _ in 0..3 {
        rig.pass(Duration::from_secs(50));
        rig.send(Side::World, &stranger.build());
    }
    let strangers = rig.nat.table().iter().filter(|flow| flow.key().remote == OTHER).count();
    assert!(strangers <= 1);
    rig.pass(Duration::from_secs(130));
    assert_eq!(rig.nat.table().len(), 0);
}

#[test]
fn the_16385th_connection_to_one_destination_is_refused_and_no_reply_goes_astray() {
    let mut rig = Rig::new(settings());
    let mut owners = HashMap::new();
    let syn = |port: u16, dst| Frame::tcp((GUEST, port), dst, SYN, 1, 0);
    for port in 0..16_384 {
        let left = source(&rig.out(&syn(port, (REMOTE, 80)))).1;
        assert_eq!(owners.insert(left, port), None, "no external port twice");
    }
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader::default(), &syn(20_000, (REMOTE, 80)).build());
    assert_eq!((kind, code), (3, 13));
    assert_eq!(rig.nat.counters().dropped(DropReason::TableFull), 1);
    for (&external, &port) in &owners {
        let answer = Frame::tcp((REMOTE, 80), (OUTSIDE, external), SYN | ACK, 7, 2);
        let back = rig.inn(&answer);
        assert_eq!(back, hop(Frame { dst: (GUEST, port), ..answer.clone() }).build());
    }
    // To another destination there are ports: the five-tuple is what must be one's own.
    let shared = source(&rig.out(&syn(20_000, (OTHER, 80)))).1;
    let answer = Frame::tcp((OTHER, 80), (OUTSIDE, shared), SYN | ACK, 7, 2);
    assert_eq!(word(&rig.inn(&answer), TRANSPORT_AT + 2), 20_000);
}

#[test]
fn published_ports_lead_to_the_guest_and_answers_come_from_them() {
    let ports = vec![
        published(Transport::Tcp, 8080, 80),
        published(Transport::Tcp, 8081, 80),
        published(Transport::Udp, 53, 5353),
    ];
    let mut rig = Rig::new(PacketNatConfig { published: ports, ..settings() });
    for port in [8080, 8081] {
        let syn = Frame::tcp((REMOTE, 4000 + port), (OUTSIDE, port), SYN, 1, 0);
        assert_eq!(rig.inn(&syn), hop(Frame { dst: (GUEST, 80), ..syn.clone() }).build());
        let answer = Frame::tcp((GUEST, 80), (REMOTE, 4000 + port), SYN | ACK, 9, 2);
        assert_eq!(rig.out(&answer), hop(Frame { src: (OUTSIDE, port), ..answer.clone() }).build());
        let more = Frame::tcp((REMOTE, 4000 + port), (OUTSIDE, port), ACK, 2, 10);
        assert_eq!(rig.inn(&more), hop(Frame { dst: (GUEST, 80), ..more.clone() }).build());
    }
    let asked = Frame::udp((OTHER, 9), (OUTSIDE, 53), b"?");
    assert_eq!(rig.inn(&asked), hop(Frame { dst: (GUEST, 5353), ..asked.clone() }).build());
    let own = Frame::udp((GUEST, 5353), (REMOTE, 1), b"own");
    assert_eq!(source(&rig.out(&own)).1, 53, "what the guest sends from there leaves from there");
    rig.dropped(Side::World, &Frame::tcp((REMOTE, 1), (OUTSIDE, 80), SYN, 1, 0), DropReason::NoFlow);
    rig.dropped(Side::World, &Frame::tcp((REMOTE, 1), (OUTSIDE, 53), SYN, 1, 0), DropReason::NoFlow);
    rig.pass(Duration::from_secs(10_000));
    assert_eq!(rig.nat.table().len(), 0);
    let again = Frame::tcp((REMOTE, 1), (OUTSIDE, 8081), SYN, 1, 0);
    assert_eq!(rig.inn(&again), hop(Frame { dst: (GUEST, 80), ..again.clone() }).build(), "for good");
}

/// A reset: to which side, from and to whom, sequence number and acknowledgement.
type SeenReset = (Side, [(Ipv4Addr, u16); 2], u32, Option<u32>);

/// Resets the NAT sends.
fn resets(rig: &mut Rig) -> Vec<SeenReset> {
    let all = std::iter::from_fn(|| rig.nat.pop_reset());
    let read = |reset: Reset| {
        let ip = ipv4::Header::parse(&reset.frame[IP_AT..], usize::MAX).unwrap();
        let transport = &reset.frame[TRANSPORT_AT..];
        let (header, _) = tcp::Header::parse(transport).unwrap();
        let mut sum = checksum::pseudo_header(ip.src.into(), ip.dst.into(), Protocol::TCP, transport.len());
        sum.add_bytes(transport);
        assert_eq!(sum.finish(), 0, "its checksum");
        assert!(header.flags.contains(Flags::RST));
        let ack = header.flags.contains(Flags::ACK).then_some(header.ack.0);
        (reset.to, [(ip.src, header.src_port), (ip.dst, header.dst_port)], header.seq.0, ack)
    };
    all.map(read).collect()
}

#[test]
fn both_ends_of_a_removed_ports_connections_are_reset_with_the_numbers_they_expect() {
    let ports = vec![published(Transport::Tcp, 8080, 80), published(Transport::Tcp, 8081, 80)];
    let mut rig = Rig::new(PacketNatConfig { published: ports, ..settings() });
    let (client, guest) = ((REMOTE, 4000), (GUEST, 80));
    rig.inn(&Frame::tcp(client, (OUTSIDE, 8080), SYN, 100, 0));
    rig.out(&Frame::tcp(guest, client, SYN | ACK, 900, 101));
    rig.inn(&Frame::tcp(client, (OUTSIDE, 8080), ACK, 101, 901));
    // Ten bytes of the guest's are on their way, and not acknowledged.
    rig.out(&Frame { payload: vec![7; 10], ..Frame::tcp(guest, client, ACK, 901, 101) });
    // Another port's, one of the guest's own, and one that the guest has not answered.
    rig.inn(&Frame::tcp((OTHER, 1), (OUTSIDE, 8081), SYN, 1, 0));
    rig.out(&Frame::tcp((GUEST, 80), (OTHER, 9), SYN, 1, 0));
    rig.inn(&Frame::tcp((OTHER, 2), (OUTSIDE, 8080), SYN, 500, 0));
    assert_eq!(rig.nat.set_published(vec![published(Transport::Tcp, 8081, 80)]), 0);
    let ended = rig.nat.end_published(Transport::Tcp, 8080, 0);
    assert_eq!((ended.connections, ended.next, rig.nat.table().len()), (2, None, 2));
    let told = resets(&mut rig);
    let (to_guest, to_client) = ([client, guest], [(OUTSIDE, 8080), client]);
    for expected in [
        (Side::Guest, to_guest, 101, Some(911)),
        (Side::World, to_client, 901, Some(101)),
        (Side::World, to_client, 911, Some(101)),
        (Side::Guest, [(OTHER, 2), guest], 501, None),
        (Side::World, [(OUTSIDE, 8080), (OTHER, 2)], 0, Some(501)),
    ] {
        assert!(told.contains(&expected), "{expected:?} is not in {told:?}");
    }
    assert_eq!(told.len(), 5, "{told:?}");
    assert_eq!(rig.nat.end_published(Transport::Tcp, 8080, 0), Ended::default(), "there is none any more");
    // The guest's own flow has the port.
    rig.dropped(Side::World, &Frame::tcp((REMOTE, 1), (OUTSIDE, 8080), SYN, 1, 0), DropReason::Filtered);
}

#[test]
fn an_unpublished_udp_port_is_closed_to_strangers_whatever_is_filtered() {
    let udp = UdpConfig { filtering: UdpFiltering::EndpointIndependent, ..UdpConfig::default() };
    let ports = vec![published(Transport::Udp, 53, 5353)];
    let mut rig = Rig::new(PacketNatConfig { published: ports, udp, ..settings() });
    rig.inn(&Frame::udp((REMOTE, 9), (OUTSIDE, 53), b"?"));
    rig.out(&Frame::udp((GUEST, 5353), (REMOTE, 9), b"!"));
    rig.nat.set_published(Vec::new());
    let ended = rig.nat.end_published(Transport::Udp, 53, 0);
    assert_eq!((ended.connections, rig.nat.table().len()), (0, 0), "an exchange is no connection");
    rig.dropped(Side::World, &Frame::udp((OTHER, 9), (OUTSIDE, 53), b"?"), DropReason::NoFlow);
    assert_eq!(resets(&mut rig), []);
}

#[test]
fn a_port_that_flows_keep_takes_new_clients_after_another_was_published() {
    // The second of two ports to one end of the guest is held by a stand-in.
    let mut ports = vec![published(Transport::Tcp, 8080, 80), published(Transport::Tcp, 8081, 80)];
    let mut rig = Rig::new(PacketNatConfig { published: ports.clone(), ..settings() });
    rig.inn(&Frame::tcp((REMOTE, 4000), (OUTSIDE, 8081), SYN, 1, 0));
    ports.push(published(Transport::Tcp, 9000, 90));
    assert_eq!(rig.nat.set_published(ports), 0);
    for (port, to) in [(8080, 80), (8081, 80), (9000, 90)] {
        let syn = Frame::tcp((OTHER, port), (OUTSIDE, port), SYN, 1, 0);
        assert_eq!(rig.inn(&syn), hop(Frame { dst: (GUEST, to), ..syn.clone() }).build(), "{port}");
    }
}

#[test]
fn while_it_drains_flows_go_on_and_none_begins() {
    let ports = vec![published(Transport::Tcp, 8080, 80)];
    let mut rig = Rig::new(PacketNatConfig { published: ports, ..settings() });
    rig.out(&Frame::udp((GUEST, 5000), (REMOTE, 1), b"before"));
    let mappings = rig.nat.table().len();
    rig.nat.drain();
    rig.out(&Frame::udp((GUEST, 5000), (REMOTE, 1), b"goes on"));
    let other = Frame::udp((GUEST, 5001), (REMOTE, 1), b"begins").build();
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader::default(), &other);
    assert_eq!((kind, code), (3, 13));
    let client = Frame::tcp((REMOTE, 4000), (OUTSIDE, 8080), SYN, 1, 0);
    rig.dropped(Side::World, &client, DropReason::Refused);
    assert_eq!(rig.nat.table().len(), mappings);
}

#[test]
fn guests_meet_at_the_outside_address() {
    let ports = vec![published(Transport::Tcp, 8080, 80)];
    let udp = UdpConfig { filtering: UdpFiltering::EndpointIndependent, ..UdpConfig::default() };
    let mut rig = Rig::new(PacketNatConfig { published: ports, udp, ..settings() });
    // Another guest, and the guest itself.
    for from in [GUEST_2, GUEST] {
        let syn = Frame::tcp((from, 50_000), (OUTSIDE, 8080), SYN, 1, 0);
        let turned = rig.around(&syn);
        let external = source(&turned).1;
        let seen = Frame { src: (OUTSIDE, external), dst: (GUEST, 80), ..syn };
        assert_eq!(turned, hop(seen.clone()).build(), "one hop, both ends changed");
        let answer = Frame::tcp((GUEST, 80), (OUTSIDE, external), SYN | ACK, 9, 2);
        let expected = hop(Frame { src: (OUTSIDE, 8080), dst: (from, 50_000), ..answer.clone() });
        assert_eq!(rig.around(&answer), expected.build());
        // Its ICMP error comes back to who sent, about what it sent.
        let error = packets::error((3, 3), GUEST, OUTSIDE, &seen.build(), 200);
        let told = rig.carried(Side::Guest, &error, Verdict::Hairpin);
        let sent = Frame::tcp((from, 50_000), (OUTSIDE, 8080), SYN, 1, 0);
        let mut expected = packets::error((3, 3), OUTSIDE, from, &sent.build(), 200);
        one_hop(&mut expected);
        assert_eq!(told, expected);
    }
    // Two guests that were told of each other's external ends (RFC 4787, REQ-9).
    let first = source(&rig.out(&Frame::udp((GUEST, 6000), (REMOTE, 1), b"x"))).1;
    let second = source(&rig.out(&Frame::udp((GUEST_2, 6000), (REMOTE, 1), b"x"))).1;
    let hello = Frame::udp((GUEST, 6000), (OUTSIDE, second), b"hello");
    let seen = Frame { src: (OUTSIDE, first), dst: (GUEST_2, 6000), ..hello.clone() };
    assert_eq!(rig.around(&hello), hop(seen).build());
    let back = Frame::udp((GUEST_2, 6000), (OUTSIDE, first), b"back");
    let seen = Frame { src: (OUTSIDE, second), dst: (GUEST, 6000), ..back.clone() };
    assert_eq!(rig.around(&back), hop(seen).build());
    let nobody = Frame::udp((GUEST, 6000), (OUTSIDE, 7), b"?").build();
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader::default(), &nobody);
    assert_eq!((kind, code), (3, 3));
}

/// Takes a hop of a built frame.
fn one_hop(frame: &mut [u8]) {
    vunet::engine::packet::rewrite::take_hop(frame);
}

#[test]
fn errors_of_the_world_reach_the_guest_about_its_own_packet() {
    let mut rig = Rig::new(settings());
    for sent in [
        Frame::udp((GUEST, 5000), (REMOTE, 33_434), b"probe"),
        Frame::tcp((GUEST, 5000), (REMOTE, 80), SYN, 100, 0),
        Frame::echo(8, GUEST, REMOTE, 77),
        Frame { body: Body::Plain(Protocol(47)), ..Frame::udp((GUEST, 0), (REMOTE, 0), b"tunnel") },
    ] {
        let left = rig.out(&sent);
        let flows = rig.nat.table().len();
        for quoted in [28, 200] {
            let error = packets::error((11, 0), OTHER, OUTSIDE, &left, quoted);
            let mut expected = packets::error((11, 0), OTHER, GUEST, &hop(sent.clone()).build(), quoted);
            one_hop(&mut expected);
            assert_eq!(rig.carried(Side::World, &error, Verdict::Forward), expected);
        }
        let stranger = Frame { src: (OUTSIDE, 1), dst: (OTHER, 2), ..sent.clone() };
        let error = packets::error((11, 0), OTHER, OUTSIDE, &stranger.build(), 200);
        assert_eq!(rig.send(Side::World, &error).0, Verdict::Drop(DropReason::NoFlow));
        let spoofed = Frame { src: (OTHER, sent.src.1), ..sent };
        let error = packets::error((11, 0), OTHER, OUTSIDE, &spoofed.build(), 200);
        assert_eq!(rig.send(Side::World, &error).0, Verdict::Drop(DropReason::NoFlow));
        assert_eq!(rig.nat.table().len(), flows, "an error begins and ends nothing");
    }
}

#[test]
fn errors_of_the_guest_reach_the_world_about_its_own_packet() {
    let mut rig =
        Rig::new(PacketNatConfig { published: vec![published(Transport::Udp, 53, 5353)], ..settings() });
    let asked = Frame::udp((OTHER, 9), (OUTSIDE, 53), b"?");
    let came = rig.inn(&asked);
    let refused = packets::error((3, 3), GUEST, OTHER, &came, 200);
    let mut expected = packets::error((3, 3), OUTSIDE, OTHER, &hop(asked).build(), 200);
    one_hop(&mut expected);
    assert_eq!(rig.carried(Side::Guest, &refused, Verdict::Forward), expected);
    let invented = Frame::udp((OTHER, 10), (GUEST, 5353), b"?").build();
    let error = packets::error((3, 3), GUEST, OTHER, &invented, 200);
    assert_eq!(rig.send(Side::Guest, &error).0, Verdict::Drop(DropReason::NoFlow));
    let elsewhere = packets::error((3, 3), GUEST, REMOTE, &came, 200);
    assert_eq!(rig.send(Side::Guest, &elsewhere).0, Verdict::Drop(DropReason::NoFlow));
}

#[test]
fn who_sends_what_cannot_pass_is_told_unless_it_is_an_error() {
    let plain = VnetHeader::default();
    let mut rig = Rig::new(settings());
    let dying = Frame { ttl: 1, ..Frame::udp((GUEST, 5000), (REMOTE, 1), b"traceroute") };
    assert_eq!(rig.told(Side::Guest, &plain, &dying.build()).0, 11);
    let mut long = Frame::udp((GUEST, 5000), (REMOTE, 1), &[0; 1473]);
    rig.out(&long);
    long.dont_fragment = true;
    let (kind, code, rest) = rig.told(Side::Guest, &plain, &long.build());
    assert_eq!((kind, code, word(&rest, 2)), (3, 4, 1500));
    long.payload.pop();
    rig.out(&long);
    // To be cut into segments: their length counts.
    let big = Frame { dont_fragment: true, ..Frame::tcp((GUEST, 5001), (REMOTE, 1), SYN, 1, 0) };
    let big = Frame { payload: vec![0; 20_000], ..big };
    let (vnet, bytes) = big.build_partial();
    let gso = |size_bytes| Some(Gso { kind: GsoKind::Tcp4, size_bytes, headers_bytes: 54, ecn: false });
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader { gso: gso(1461), ..vnet }, &bytes);
    assert_eq!((kind, code), (3, 4));
    assert_eq!(
        rig.judge(Side::Guest, &VnetHeader { gso: gso(1460), ..vnet }, &mut bytes.clone()),
        Verdict::Forward
    );
    for (dst, code) in [(GUEST_2, 13), (Ipv4Addr::new(127, 0, 0, 1), 13), (Ipv4Addr::new(240, 0, 0, 1), 13)] {
        let forbidden = Frame::udp((GUEST, 1), (dst, 1), b"x").build();
        assert_eq!(rig.told(Side::Guest, &plain, &forbidden).1, code, "{dst}");
    }
    // No error about an error.
    let error = Frame { ttl: 1, ..Frame::udp((GUEST, 0), (REMOTE, 0), b"") };
    let mut about = packets::error((3, 3), GUEST, REMOTE, &error.build(), 28);
    for _ in 0..63 {
        one_hop(&mut about);
    }
    assert_eq!(rig.send(Side::Guest, &about).0, Verdict::Drop(DropReason::HopLimit));
    // Nobody is told without end.
    let verdicts: Vec<Verdict> = (0..100).map(|_| rig.send(Side::Guest, &dying.build()).0).collect();
    assert!(verdicts.contains(&Verdict::Drop(DropReason::RateLimited)));
    rig.pass(Duration::from_secs(1));
    assert!(matches!(rig.send(Side::Guest, &dying.build()).0, Verdict::Answer(_)));
}

#[test]
fn the_world_is_told_of_hops_and_lengths_only_where_a_flow_is() {
    let mut rig = Rig::new(PacketNatConfig { guest_ip_mtu: 1400, ..settings() });
    let external = source(&rig.out(&Frame::udp((GUEST, 5000), (REMOTE, 1), b"x"))).1;
    let dying = Frame { ttl: 1, ..Frame::udp((REMOTE, 1), (OUTSIDE, external), b"x") };
    assert_eq!(rig.told(Side::World, &VnetHeader::default(), &dying.build()).0, 11);
    let long = Frame { dont_fragment: true, ..Frame::udp((REMOTE, 1), (OUTSIDE, external), &[0; 1400]) };
    let (kind, code, rest) = rig.told(Side::World, &VnetHeader::default(), &long.build());
    assert_eq!((kind, code, word(&rest, 2)), (3, 4, 1400));
    rig.dropped(Side::World, &Frame { dst: (OUTSIDE, 7), ..dying }, DropReason::NoFlow);
}

#[test]
fn what_is_for_the_gateway_or_the_station_is_not_translated() {
    let mut rig = Rig::new(settings());
    for dst in [GATEWAY, Ipv4Addr::BROADCAST, Ipv4Addr::new(10, 0, 2, 255), Ipv4Addr::new(224, 0, 0, 251)] {
        let frame = Frame::udp((Ipv4Addr::UNSPECIFIED, 68), (dst, 67), b"dhcp").build();
        assert_eq!(rig.carried(Side::Guest, &frame, Verdict::Ours), frame);
    }
    let ping = Frame::echo(8, REMOTE, OUTSIDE, 5).build();
    assert_eq!(rig.carried(Side::World, &ping, Verdict::Ours), ping);
    let ping = Frame::echo(8, GUEST, OUTSIDE, 5).build();
    assert_eq!(rig.carried(Side::Guest, &ping, Verdict::Ours), ping);
    let spoofed = |src| Frame::udp((src, 1), (REMOTE, 1), b"x");
    for src in [GATEWAY, Ipv4Addr::new(10, 0, 3, 1), OUTSIDE, Ipv4Addr::new(10, 0, 2, 0)] {
        rig.dropped(Side::Guest, &spoofed(src), DropReason::SpoofedSource);
    }
    for src in [GUEST, OUTSIDE, Ipv4Addr::LOCALHOST] {
        let frame = Frame::udp((src, 1), (OUTSIDE, 1), b"x");
        rig.dropped(Side::World, &frame, DropReason::SpoofedSource);
    }
    rig.dropped(Side::World, &Frame::udp((REMOTE, 1), (OTHER, 1), b"x"), DropReason::NotForUs);
    rig.dropped(Side::Guest, &Frame::echo(0, GUEST, REMOTE, 5), DropReason::NoFlow);
    rig.dropped(Side::World, &Frame::echo(0, REMOTE, OUTSIDE, 5), DropReason::NoFlow);
}

#[test]
fn protocols_without_ports_are_one_guests_for_each_remote_address() {
    let mut rig = Rig::new(settings());
    let gre =
        |from, to| Frame { body: Body::Plain(Protocol(47)), ..Frame::udp((from, 0), (to, 0), b"tunnel") };
    rig.out(&gre(GUEST, REMOTE));
    rig.out(&gre(GUEST_2, OTHER));
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader::default(), &gre(GUEST_2, REMOTE).build());
    assert_eq!((kind, code), (3, 13));
    let back = gre(REMOTE, OUTSIDE);
    assert_eq!(rig.inn(&back), hop(gre(REMOTE, GUEST)).build());
    rig.dropped(Side::World, &gre(Ipv4Addr::new(192, 0, 2, 99), OUTSIDE), DropReason::NoFlow);
    rig.pass(Duration::from_secs(601));
    rig.out(&gre(GUEST_2, REMOTE));
}

#[test]
fn fragments_follow_their_first_in_any_order() {
    for order in [vec![0, 1, 2], vec![2, 1, 0], vec![1, 0, 2]] {
        let mut rig = Rig::new(settings());
        let sent = Frame { ident: 7, ..Frame::udp((GUEST, 5000), (REMOTE, 1), &[0x5a; 100]) };
        let left = pieces(&mut rig, Side::Guest, &sent, &order);
        let external = source(&left[0]).1;
        let mut dying = sent.fragments(40).remove(1);
        let seen = hop(Frame { src: (OUTSIDE, external), ..sent });
        assert_eq!(left, seen.fragments(40), "{order:?}");
        dying[IP_AT + 8] = 1;
        packets::sum_ip(&mut dying);
        assert_eq!(rig.send(Side::Guest, &dying).0, Verdict::Drop(DropReason::HopLimit));
        let answer = Frame { ident: 9, ..Frame::udp((REMOTE, 1), (OUTSIDE, external), &[0xa5; 100]) };
        let came = pieces(&mut rig, Side::World, &answer, &order);
        assert_eq!(came, hop(Frame { dst: (GUEST, 5000), ..answer }).fragments(40), "{order:?}");
        let ping = Frame { ident: 11, payload: vec![1; 100], ..Frame::echo(8, GUEST, REMOTE, 77) };
        let left = pieces(&mut rig, Side::Guest, &ping, &order);
        let ident = word(&left[0], TRANSPORT_AT + 4);
        let seen = hop(Frame { src: (OUTSIDE, ident), dst: (REMOTE, ident), ..ping });
        assert_eq!(left, seen.fragments(40), "{order:?}");
        assert_eq!(rig.nat.counters().dropped_total(), 1, "the one whose hops were used up");
    }
}

/// Sends a frame's fragments in an order; returns what came of them, in their own order.
#[track_caller]
fn pieces(rig: &mut Rig, side: Side, frame: &Frame, order: &[usize]) -> Vec<Vec<u8>> {
    let fragments = frame.fragments(40);
    assert_eq!(fragments.len(), order.len());
    let mut carried = Vec::new();
    for at in order {
        match rig.send(side, &fragments[*at]) {
            (Verdict::Hold, unchanged) => {
                assert_eq!(unchanged, fragments[*at]);
                rig.nat.hold(rig.now, side, &unchanged);
            }
            (verdict, frame) => {
                assert_eq!(verdict, Verdict::Forward);
                carried.push(frame);
            }
        }
        while let Some(released) = rig.nat.pop_released() {
            assert_eq!((released.side, released.verdict), (side, Verdict::Forward));
            carried.push(released.frame.to_vec());
        }
    }
    carried.sort_by_key(|frame| word(frame, IP_AT + 6) & 0x1fff);
    carried
}

#[test]
fn fragments_of_nothing_known_are_given_up_and_never_read_as_ports() {
    let mut rig = Rig::new(settings());
    let flow = Frame::udp((GUEST, 5000), (REMOTE, 1), b"x");
    let external = source(&rig.out(&flow)).1;
    // The payload of a later fragment looks like the flow's ports.
    let mut like = vec![0; 8];
    like.extend_from_slice(&1u16.to_be_bytes());
    like.extend_from_slice(&external.to_be_bytes());
    like.extend_from_slice(&[0; 20]);
    let answer = Frame { ident: 3, ..Frame::udp((REMOTE, 2), (OUTSIDE, 2), &like) };
    let later = &answer.fragments(16)[1];
    assert_eq!(rig.send(Side::World, later).0, Verdict::Hold);
    rig.nat.hold(rig.now, Side::World, later);
    assert_eq!(rig.nat.next_deadline().map(|at| at.since(rig.now)), Some(Duration::from_secs(2)));
    rig.pass(Duration::from_secs(3));
    assert_eq!(rig.nat.counters().dropped(DropReason::FragmentHole), 1);
    // The first is refused, and so are the others.
    assert_eq!(rig.send(Side::World, &answer.fragments(16)[0]).0, Verdict::Drop(DropReason::NoFlow));
    assert_eq!(rig.send(Side::World, later).0, Verdict::Hold);
}

#[test]
fn segments_that_fit_no_window_are_dropped_unless_that_is_wanted() {
    for liberal in [false, true] {
        let mut rig = Rig::new(PacketNatConfig { liberal, ..settings() });
        let external = source(&rig.out(&Frame::tcp((GUEST, 5000), (REMOTE, 80), SYN, 100, 0))).1;
        rig.inn(&Frame::tcp((REMOTE, 80), (OUTSIDE, external), SYN | ACK, 500, 101));
        rig.out(&Frame::tcp((GUEST, 5000), (REMOTE, 80), ACK, 101, 501));
        let far = Frame::tcp((REMOTE, 80), (OUTSIDE, external), ACK, 900_000, 101);
        let forged = Frame::tcp((REMOTE, 80), (OUTSIDE, external), Flags::RST, 900_000, 0);
        if liberal {
            rig.inn(&far);
        } else {
            rig.dropped(Side::World, &far, DropReason::OutOfWindow);
        }
        rig.dropped(Side::World, &forged, DropReason::OutOfWindow);
        // Alive for two hours without a word, and no longer.
        rig.pass(Duration::from_secs(7439));
        assert_eq!(rig.nat.table().len(), 1);
        rig.pass(Duration::from_secs(3));
        assert_eq!(rig.nat.table().len(), 0);
    }
}

#[test]
fn a_connection_older_than_the_nat_goes_on_where_its_port_can() {
    let mut rig = Rig::new(settings());
    let middle = Frame { payload: vec![1; 10], ..Frame::tcp((GUEST, 50_000), (REMOTE, 80), ACK, 7000, 9000) };
    assert_eq!(rig.out(&middle), hop(Frame { src: (OUTSIDE, 50_000), ..middle.clone() }).build());
    let answer = Frame::tcp((REMOTE, 80), (OUTSIDE, 50_000), ACK, 9000, 7010);
    rig.inn(&answer);
    // The world cannot begin in the middle, and a reset begins nothing.
    rig.dropped(Side::World, &Frame { src: (OTHER, 80), ..answer }, DropReason::Filtered);
    let reset = Frame::tcp((GUEST, 50_001), (REMOTE, 80), Flags::RST, 7000, 0);
    rig.dropped(Side::Guest, &reset, DropReason::NoFlow);
}

#[test]
fn a_full_table_takes_from_who_has_most() {
    let mut rig = Rig::new(PacketNatConfig { flows_max: 100, guest_flows_max: 60, ..settings() });
    let datagram = |guest, port| Frame::udp((guest, port), (REMOTE, 1), b"x");
    rig.out(&datagram(GUEST_2, 1));
    for port in 0..200 {
        rig.out(&datagram(GUEST, port));
        rig.pass(Duration::from_millis(10));
    }
    assert_eq!(rig.nat.table().flows_of(GUEST), 60, "its quota");
    assert_eq!(rig.nat.table().flows_of(GUEST_2), 1, "others are not touched");
    assert_eq!(rig.nat.counters().flows_evicted, 140);
    for port in 2..60 {
        rig.out(&datagram(GUEST_2, port));
    }
    assert_eq!(rig.nat.table().len(), 100);
    rig.pass(Duration::from_secs(400));
    assert!(rig.nat.table().is_empty());
}

#[test]
fn a_new_address_outside_begins_anew() {
    let mut rig = Rig::new(settings());
    let sent = Frame::udp((GUEST, 50_000), (REMOTE, 1), b"x");
    rig.out(&sent);
    rig.nat.set_outside(rig.now, None).unwrap();
    let (kind, code, _) = rig.told(Side::Guest, &VnetHeader::default(), &sent.build());
    assert_eq!((kind, code), (3, 0));
    let offer = Frame::udp((REMOTE, 67), (OTHER, 68), b"offer").build();
    assert_eq!(rig.send(Side::World, &offer).0, Verdict::Ours);
    rig.nat.set_outside(rig.now, Some(OTHER)).unwrap();
    assert_eq!(rig.out(&sent), hop(Frame { src: (OTHER, 50_000), ..sent.clone() }).build());
    assert_eq!(rig.nat.table().len(), 1);
}

#[test]
fn a_flow_of_another_worker_is_handed_to_it_and_no_further() {
    let mappings = Arc::new(Mutex::new(Mappings::new(PORTS, (1, 2))));
    let ports = vec![published(Transport::Tcp, 8080, 80)];
    let worker = |n| {
        let config = PacketNatConfig { worker: WorkerId(n), published: ports.clone(), ..settings() };
        Rig::sharing(config, Arc::clone(&mappings))
    };
    let (mut first, mut second) = (worker(0), worker(1));
    let external = source(&first.out(&Frame::tcp((GUEST, 5000), (REMOTE, 80), SYN, 100, 0))).1;
    let answer = Frame::tcp((REMOTE, 80), (OUTSIDE, external), SYN | ACK, 500, 101);
    assert_eq!(second.send(Side::World, &answer.build()), (Verdict::Elsewhere(WorkerId(0)), answer.build()));
    first.tried = WorkerSet::of(WorkerId(1));
    first.inn(&answer);
    let ack = Frame::tcp((GUEST, 5000), (REMOTE, 80), ACK, 101, 501);
    assert_eq!(second.send(Side::Guest, &ack.build()).0, Verdict::Elsewhere(WorkerId(0)));
    first.out(&ack);
    let error =
        packets::error((3, 1), OTHER, OUTSIDE, &Frame { src: (OUTSIDE, external), ..ack }.build(), 28);
    assert_eq!(second.send(Side::World, &error).0, Verdict::Elsewhere(WorkerId(0)));
    // A client of a published port came to one worker, the guest's answer to the other.
    second.inn(&Frame::tcp((OTHER, 9), (OUTSIDE, 8080), SYN, 1, 0));
    let answer = Frame::tcp((GUEST, 80), (OTHER, 9), SYN | ACK, 7, 2);
    first.tried = WorkerSet::default();
    assert_eq!(first.send(Side::Guest, &answer.build()).0, Verdict::Elsewhere(WorkerId(1)));
    second.tried = WorkerSet::of(WorkerId(0));
    second.out(&answer);
    // A segment nobody knows goes round once.
    let nobody = Frame::tcp((REMOTE, 81), (OUTSIDE, external), ACK, 1, 1);
    second.tried = WorkerSet::default();
    assert_eq!(second.send(Side::World, &nobody.build()).0, Verdict::Elsewhere(WorkerId(0)));
    first.tried = WorkerSet::of(WorkerId(1));
    assert!(matches!(first.send(Side::World, &nobody.build()).0, Verdict::Drop(_)));
    let fragment = Frame { payload: vec![0; 80], ..nobody };
    let (one, two) = (&fragment.fragments(40)[0], &fragment.fragments(40)[1]);
    assert_eq!(second.send(Side::World, one).0, Verdict::Elsewhere(WorkerId(0)));
    assert_eq!(second.send(Side::World, two).0, Verdict::Elsewhere(WorkerId(0)), "fragments stay together");
}

#[test]
fn a_handshake_spread_over_two_workers_is_found_by_hand_over() {
    let mappings = Arc::new(Mutex::new(Mappings::new(PORTS, (1, 2))));
    let worker = |n| {
        let config = PacketNatConfig { worker: WorkerId(n), ..settings() };
        Rig::sharing(config, Arc::clone(&mappings))
    };
    let (mut first, mut second) = (worker(0), worker(1));
    let syn = Frame::tcp((GUEST, 5000), (REMOTE, 80), SYN, 100, 0);
    let external = source(&first.out(&syn)).1;
    assert_eq!(source(&second.out(&syn)).1, external, "repeated on another queue: the same end outside");
    first.inn(&Frame::tcp((REMOTE, 80), (OUTSIDE, external), SYN | ACK, 500, 101));
    let ack = Frame::tcp((GUEST, 5000), (REMOTE, 80), ACK, 101, 501);
    assert_eq!(second.send(Side::Guest, &ack.build()), (Verdict::Elsewhere(WorkerId(0)), ack.build()));
    first.tried = WorkerSet::of(WorkerId(1));
    first.out(&ack);
    let data = Frame { payload: vec![1], ..Frame::tcp((REMOTE, 80), (OUTSIDE, external), ACK, 501, 101) };
    second.tried = WorkerSet::of(WorkerId(0));
    second.dropped(Side::World, &Frame { src: (OTHER, 80), ..data.clone() }, DropReason::Filtered);
    first.inn(&data);
}

#[test]
fn guests_meet_at_the_outside_address_across_workers() {
    let mappings = Arc::new(Mutex::new(Mappings::new(PORTS, (1, 2))));
    let worker = |n| {
        let config = PacketNatConfig { worker: WorkerId(n), ..settings() };
        Rig::sharing(config, Arc::clone(&mappings))
    };
    let (mut first, mut second) = (worker(0), worker(1));
    first.out(&Frame::udp((GUEST, 50_001), (REMOTE, 1), b"x"));
    second.out(&Frame::udp((GUEST_2, 50_002), (REMOTE, 1), b"x"));
    let hello = Frame::udp((GUEST, 50_001), (OUTSIDE, 50_002), b"hello");
    assert_eq!(first.send(Side::Guest, &hello.build()), (Verdict::Elsewhere(WorkerId(1)), hello.build()));
    second.tried = WorkerSet::of(WorkerId(0));
    second.dropped(Side::Guest, &hello, DropReason::Filtered);
    // Spoken to, it answers, and then both hear each other.
    second.tried = WorkerSet::default();
    let back = Frame::udp((GUEST_2, 50_002), (OUTSIDE, 50_001), b"back");
    let turned = second.around(&back);
    assert_eq!(turned, hop(Frame { src: (OUTSIDE, 50_002), dst: (GUEST, 50_001), ..back }).build());
    assert_eq!(first.send(Side::Guest, &hello.build()), (Verdict::Elsewhere(WorkerId(1)), hello.build()));
    second.tried = WorkerSet::of(WorkerId(0));
    let turned = second.around(&hello);
    let seen = Frame { src: (OUTSIDE, 50_001), dst: (GUEST_2, 50_002), ..hello };
    assert_eq!(turned, hop(seen.clone()).build());
    // What the one says of it finds its way as well.
    let error = packets::error((3, 3), GUEST_2, OUTSIDE, &seen.build(), 200);
    first.tried = WorkerSet::default();
    let (verdict, unchanged) = first.send(Side::Guest, &error);
    assert!(matches!(verdict, Verdict::Drop(DropReason::NoFlow)) && unchanged == error, "{verdict:?}");
    second.carried(Side::Guest, &error, Verdict::Hairpin);
}

#[test]
fn an_end_that_is_to_look_the_same_to_all_is_refused_when_no_port_is_free() {
    let ports = 60_000..=60_003;
    let mut rig = Rig::new(PacketNatConfig { ports: ports.clone(), ..settings() });
    let plain = VnetHeader::default();
    let kinds: [fn(u16, Ipv4Addr) -> Frame; 2] =
        [|n, to| Frame::udp((GUEST, n), (to, 80), b"x"), |n, to| Frame::echo(8, GUEST, to, n)];
    for (n, frame) in kinds.iter().enumerate() {
        for port in 1..=4 {
            rig.out(&frame(port, REMOTE));
        }
        rig.out(&frame(1, OTHER));
        // Whatever its destination: a port of another's would be another end than to the next.
        let (kind, code, _) = rig.told(Side::Guest, &plain, &frame(5, OTHER).build());
        assert_eq!((kind, code), (3, 13));
        assert_eq!(rig.nat.counters().dropped(DropReason::TableFull), n as u64 + 1);
    }
    rig.pass(Duration::from_secs(200));
    rig.out(&kinds[0](5, OTHER));
    // Mappings that are address- and port-dependent share, and so does TCP.
    let udp = UdpConfig { mapping: UdpMapping::AddressAndPortDependent, ..UdpConfig::default() };
    let mut rig = Rig::new(PacketNatConfig { ports, udp, ..settings() });
    for port in 1..=4 {
        rig.out(&kinds[0](port, REMOTE));
        rig.out(&Frame::tcp((GUEST, port), (REMOTE, 80), SYN, 1, 0));
    }
    let datagram = source(&rig.out(&kinds[0](5, OTHER))).1;
    let segment = source(&rig.out(&Frame::tcp((GUEST, 5), (OTHER, 80), SYN, 1, 0))).1;
    assert!((60_000..=60_003).contains(&datagram) && (60_000..=60_003).contains(&segment));
    assert_eq!(rig.nat.counters().dropped_total(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Out { guest: u8, port: u16, remote: u8, tcp: bool },
    Back { which: usize },
    Pass { seconds: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let out = (2u8..5, 0u16..12, 1u8..4, any::<bool>());
    prop_oneof![
        6 => out.prop_map(|(guest, port, remote, tcp)| Step::Out { guest, port, remote, tcp }),
        3 => any::<usize>().prop_map(|which| Step::Back { which }),
        1 => (1u64..200).prop_map(|seconds| Step::Pass { seconds }),
    ]
}

proptest! {
    #![proptest_config(config())]

    /// A range of four ports, so that they are always too few.
    #[test]
    fn no_two_flows_share_an_external_tuple_and_replies_find_their_sender(
        steps in proptest::collection::vec(step(), 1..120), independent in any::<bool>(),
    ) {
        let mapping = if independent { UdpMapping::EndpointIndependent } else { UdpMapping::AddressAndPortDependent };
        let udp = UdpConfig { mapping, ..UdpConfig::default() };
        let (ports, flows_max) = (60_000..=60_003, 30);
        let mut rig = Rig::new(PacketNatConfig { udp, ports, flows_max, guest_flows_max: 20, ..settings() });
        let mut sent = Vec::new();
        for step in steps {
            match step {
                Step::Out { guest, port, remote, tcp } => {
                    let src = (Ipv4Addr::new(10, 0, 2, guest), 60_000 + port);
                    let dst = (Ipv4Addr::new(192, 0, 2, remote), 80);
                    let frame = if tcp { Frame::tcp(src, dst, SYN, 1, 0) } else { Frame::udp(src, dst, b"x") };
                    let (verdict, left) = rig.send(Side::Guest, &frame.build());
                    let refused = matches!(verdict, Verdict::Answer(_) | Verdict::Drop(DropReason::RateLimited));
                    prop_assert!(verdict == Verdict::Forward || refused, "{:?}", verdict);
                    if verdict == Verdict::Forward {
                        sent.push((source(&left).1, frame));
                    }
                }
                Step::Back { which } => {
                    let Some((external, frame)) = sent.get(which % sent.len().max(1)) else { continue };
                    let answer = match frame.body {
                        Body::Tcp(_) => Frame::tcp(frame.dst, (OUTSIDE, *external), SYN | ACK, 5, 2),
                        _ => Frame::udp(frame.dst, (OUTSIDE, *external), b"y"),
                    };
                    let (verdict, came) = rig.send(Side::World, &answer.build());
                    if verdict == Verdict::Forward {
                        let to = (crate::rig::address(&came, IP_AT + 16), word(&came, TRANSPORT_AT + 2));
                        let is_live = rig.nat.table().iter().any(|flow| {
                            let key = flow.key();
                            (key.guest, key.guest_port, key.external_port) == (to.0, to.1, *external)
                        });
                        prop_assert!(is_live);
                        // Its sender's, unless that flow has ended and another took the port since.
                        let latest = sent.iter().rev().find(|(port, other)| {
                            port == external && other.dst == frame.dst && other.protocol() == frame.protocol()
                        });
                        prop_assert_eq!(Some(to), latest.map(|(_, frame)| frame.src));
                    }
                }
                Step::Pass { seconds } => rig.pass(Duration::from_secs(seconds)),
            }
            let mut outside = HashSet::new();
            for flow in rig.nat.table().iter() {
                prop_assert!(outside.insert(flow.key().inbound()), "{:?}", flow.key());
            }
        }
        rig.pass(Duration::from_secs(10_000));
        prop_assert!(rig.nat.table().is_empty());
    }
}
