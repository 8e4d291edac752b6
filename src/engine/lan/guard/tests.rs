//! The guard against tables of frames, and against any frame at all.

use proptest::prelude::*;

use super::*;
use crate::limits::LINK_LONG_HEAD_BYTES;

const OWN: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 2]);
const IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);
const OTHER_IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
const ALL: MacAddr = MacAddr::BROADCAST;
const SPOOFED: Verdict = Verdict::Drop(DropReason::SpoofedSource);
const ROGUE: Verdict = Verdict::Drop(DropReason::RogueServer);
const MALFORMED: Verdict = Verdict::Drop(DropReason::Malformed);

fn at(millis: u64) -> Instant {
    Instant::from_micros(millis * 1000)
}

fn ethernet(src: MacAddr, ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 14];
    ethernet::Header { dst: ALL, src, ethertype: EtherType(ethertype) }.emit(&mut frame);
    frame.extend_from_slice(packet);
    frame
}

fn arp(sender_mac: MacAddr, sender_ip: Ipv4Addr, operation: arp::Operation) -> Vec<u8> {
    let mut packet = vec![0; 28];
    let (target_mac, target_ip) = (MacAddr::ZERO, Ipv4Addr::new(192, 0, 2, 2));
    arp::Packet { operation, sender_mac, sender_ip, target_mac, target_ip }.emit(&mut packet);
    ethernet(OWN, 0x0806, &packet)
}

fn ipv4_packet(src: Ipv4Addr, dst: Ipv4Addr, (protocol, offset): (Protocol, u16), payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 20];
    let header = ipv4::Header {
        src,
        dst,
        protocol,
        ttl: 64,
        tos: 0,
        ident: 1,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: offset,
        header_bytes: 20,
        payload_bytes: payload.len(),
    };
    header.emit(&mut packet);
    packet.extend_from_slice(payload);
    packet
}

fn udp(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    datagram.extend_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    datagram.extend_from_slice(&[0, 0]);
    datagram.extend_from_slice(payload);
    datagram
}

fn ipv4_udp(src: Ipv4Addr, dst: Ipv4Addr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    ethernet(OWN, 0x0800, &ipv4_packet(src, dst, (Protocol::UDP, 0), &udp(ports, payload)))
}

/// A DHCP message of `client`: a question if `kind` is none, else an answer that grants `addr`.
fn dhcp(xid: u32, client: MacAddr, answer: Option<(u8, Ipv4Addr, u32)>) -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..3].copy_from_slice(&[if answer.is_some() { 2 } else { 1 }, 1, 6]);
    message[4..8].copy_from_slice(&xid.to_be_bytes());
    message[28..34].copy_from_slice(&client.0);
    message.extend_from_slice(&[99, 130, 83, 99]);
    if let Some((kind, addr, seconds)) = answer {
        message[16..20].copy_from_slice(&addr.octets());
        message.extend_from_slice(&[0, 12, 3, b'v', b'm', b'1', 53, 1, kind, 51, 4]);
        message.extend_from_slice(&seconds.to_be_bytes());
    } else {
        message.extend_from_slice(&[53, 1, 3]);
    }
    message.push(255);
    message
}

fn discover(xid: u32, client: MacAddr) -> Vec<u8> {
    ipv4_udp(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, (68, 67), &dhcp(xid, client, None))
}

fn answer_frame(src: MacAddr, xid: u32, client: MacAddr, answer: (u8, Ipv4Addr, u32)) -> Vec<u8> {
    let payload = udp((67, 68), &dhcp(xid, client, Some(answer)));
    let server = Ipv4Addr::new(192, 0, 2, 2);
    ethernet(src, 0x0800, &ipv4_packet(server, Ipv4Addr::BROADCAST, (Protocol::UDP, 0), &payload))
}

fn guard(config: GuardConfig) -> Guard {
    let mut guard = Guard::new(config, Arc::default(), 0);
    guard.set_reading(true);
    guard
}

/// A guard of a guest that has an address by DHCP.
fn leased() -> Guard {
    let mut guard = guard(GuardConfig { mac: Some(OWN), ipv4: None });
    assert_eq!(judge(&mut guard, 0, &discover(7, OWN)), Verdict::Pass);
    guard.to_guest(at(1), &answer_frame(OTHER, 7, OWN, (5, IP, 3600)));
    guard
}

/// As much of a frame as the worker copies.
fn seen(frame: &[u8]) -> &[u8] {
    let question = is_question(&frame[..frame.len().min(256)], frame.len());
    &frame[..frame.len().min(if question { LINK_LONG_HEAD_BYTES } else { 256 })]
}

fn judge(guard: &mut Guard, millis: u64, frame: &[u8]) -> Verdict {
    guard.from_guest(at(millis), Checksum::Complete, seen(frame), frame.len())
}

#[test]
fn the_guest_speaks_from_its_leased_address_and_its_mac_only() {
    use arp::Operation::{Reply, Request};
    let mut guard = leased();
    let to = Ipv4Addr::new(198, 51, 100, 1);
    let data = |src| ipv4_udp(src, to, (4000, 53), b"question");
    let fragment = |src| ethernet(OWN, 0x0800, &ipv4_packet(src, to, (Protocol::UDP, 8), b"8 bytes "));
    let icmp = |protocol, kind| {
        ethernet(OWN, 0x0800, &ipv4_packet(IP, to, (protocol, 0), &[kind, 0, 0, 0, 0, 0, 0, 0]))
    };
    let from = |mac: MacAddr, mut frame: Vec<u8>| {
        frame[6..12].copy_from_slice(&mac.0);
        frame
    };
    for (what, frame, expected) in [
        ("own address", data(IP), Verdict::Pass),
        ("own fragment", fragment(IP), Verdict::Pass),
        ("another's address", data(OTHER_IP), SPOOFED),
        ("another's fragment", fragment(OTHER_IP), SPOOFED),
        ("no address", data(Ipv4Addr::UNSPECIFIED), SPOOFED),
        ("another's MAC", from(OTHER, data(IP)), SPOOFED),
        ("multicast MAC", from(ALL, data(IP)), SPOOFED),
        ("announcement", arp(OWN, IP, Request), Verdict::Pass),
        ("reply", arp(OWN, IP, Reply), Verdict::Pass),
        ("probe", arp(OWN, Ipv4Addr::UNSPECIFIED, Request), Verdict::Pass),
        ("reply for nobody", arp(OWN, Ipv4Addr::UNSPECIFIED, Reply), SPOOFED),
        ("another's address in ARP", arp(OWN, OTHER_IP, Reply), SPOOFED),
        ("another's MAC in ARP", arp(OTHER, IP, Reply), SPOOFED),
        ("cut ARP", arp(OWN, IP, Reply)[..41].to_vec(), MALFORMED),
        ("cut IPv4", data(IP)[..33].to_vec(), MALFORMED),
        ("a DHCP offer", ipv4_udp(IP, to, (67, 68), b"offer"), ROGUE),
        ("an ICMP redirect", icmp(Protocol::ICMP, 5), ROGUE),
        ("a router's advertisement", icmp(Protocol::ICMP, 9), ROGUE),
        ("an unreachable", icmp(Protocol::ICMP, 3), Verdict::Pass),
        ("a query for groups", icmp(Protocol::IGMP, 0x11), ROGUE),
        ("a report of groups", icmp(Protocol::IGMP, 0x22), Verdict::Pass),
        ("an offer from another port", ipv4_udp(IP, to, (4000, 68), b"offer"), ROGUE),
        ("a relay's message", ipv4_udp(IP, to, (67, 67), b"relayed"), ROGUE),
        (
            "ports out of sight",
            ethernet(OWN, 0x0800, &ipv4_packet(IP, to, (Protocol::UDP, 0), b"123")),
            MALFORMED,
        ),
        ("VLAN tag", ethernet(OWN, 0x8100, &[0, 7, 8, 0]), Verdict::Drop(DropReason::VlanTag)),
        ("provider tag", ethernet(OWN, 0x88a8, &[0, 7, 8, 0]), Verdict::Drop(DropReason::VlanTag)),
        ("spanning tree", ethernet(OWN, 0x0026, &[0x42, 0x42, 3]), Verdict::Drop(DropReason::Unsupported)),
        ("LLDP", ethernet(OWN, 0x88cc, &[2, 7, 4]), Verdict::Drop(DropReason::Unsupported)),
    ] {
        assert_eq!(judge(&mut guard, 10, &frame), expected, "{what}");
    }
}

#[test]
fn without_a_mac_told_the_first_one_is_the_guests_until_it_starts_anew() {
    let table = Arc::new(SharedTable::default());
    let mut one = Guard::new(GuardConfig::default(), Arc::clone(&table), 0);
    let mut two = Guard::new(GuardConfig::default(), table, 1);
    let of = |mac: MacAddr| {
        let mut frame = discover(1, mac);
        frame[6..12].copy_from_slice(&mac.0);
        frame
    };
    assert_eq!(judge(&mut one, 0, &of(ALL)), SPOOFED, "no station has this");
    assert_eq!(judge(&mut one, 0, &of(MacAddr::GATEWAY)), SPOOFED, "the gateway has it");
    assert_eq!(judge(&mut one, 0, &of(OWN)), Verdict::Pass);
    assert_eq!(judge(&mut two, 0, &of(OTHER)), SPOOFED, "whichever queue it comes by");
    assert_eq!(judge(&mut two, 0, &of(OWN)), Verdict::Pass);
    two.forget_guest();
    assert_eq!(judge(&mut one, 0, &of(OTHER)), Verdict::Pass);
    assert_eq!(judge(&mut two, 0, &of(OWN)), SPOOFED);
}

#[test]
fn the_address_leased_last_is_told_until_the_guest_gives_it_up() {
    let table = Arc::new(SharedTable::default());
    let leased = table.leased();
    let mut guard = Guard::new(GuardConfig { mac: Some(OWN), ipv4: None }, table, 0);
    assert_eq!(*leased.borrow(), None);
    let other = Ipv4Addr::new(10, 0, 2, 77);
    for (xid, addr) in [(7, IP), (8, other)] {
        judge(&mut guard, 0, &discover(xid, OWN));
        guard.to_guest(at(1), &answer_frame(OTHER, xid, OWN, (5, addr, 3600)));
        assert_eq!(*leased.borrow(), Some(addr));
    }
    judge(&mut guard, 0, &discover(9, OWN));
    // DHCPNAK.
    guard.to_guest(at(1), &answer_frame(OTHER, 9, OWN, (6, IP, 3600)));
    assert_eq!(*leased.borrow(), None);
    judge(&mut guard, 0, &discover(10, OWN));
    guard.to_guest(at(1), &answer_frame(OTHER, 10, OWN, (5, IP, 3600)));
    assert_eq!(*leased.borrow(), Some(IP));
    guard.forget_guest();
    assert_eq!(*leased.borrow(), Some(IP), "that of its MAC address still, should it come back");
}

#[test]
fn only_an_answer_to_the_guests_own_question_leases() {
    let to = Ipv4Addr::new(198, 51, 100, 1);
    let data = ipv4_udp(IP, to, (4000, 53), b"question");
    for (what, frame, expected) in [
        ("its answer", answer_frame(OTHER, 7, OWN, (5, IP, 3600)), Verdict::Pass),
        ("another transaction's", answer_frame(OTHER, 8, OWN, (5, IP, 3600)), SPOOFED),
        ("another client's", answer_frame(OTHER, 7, OTHER, (5, IP, 3600)), SPOOFED),
        ("an offer", answer_frame(OTHER, 7, OWN, (2, IP, 3600)), SPOOFED),
        ("no address", answer_frame(OTHER, 7, OWN, (5, Ipv4Addr::UNSPECIFIED, 3600)), SPOOFED),
        ("from its own MAC", answer_frame(OWN, 7, OWN, (5, IP, 3600)), SPOOFED),
        ("cut", answer_frame(OTHER, 7, OWN, (5, IP, 3600))[..290].to_vec(), SPOOFED),
    ] {
        let mut guard = guard(GuardConfig { mac: Some(OWN), ipv4: None });
        guard.to_guest(at(0), &frame);
        assert_eq!(judge(&mut guard, 0, &data), SPOOFED, "{what}, unasked");
        assert!(!guard.awaits_lease(at(0)));
        assert_eq!(judge(&mut guard, 0, &discover(7, OWN)), Verdict::Pass);
        assert!(guard.awaits_lease(at(0)) && !guard.awaits_lease(at(64_000)));
        guard.to_guest(at(1), &frame);
        assert_eq!(judge(&mut guard, 1, &data), expected, "{what}");
    }
    let mut guard = guard(GuardConfig { mac: Some(OWN), ipv4: None });
    assert_eq!(judge(&mut guard, 0, &discover(7, OTHER)), SPOOFED, "it asks for others");
    judge(&mut guard, 0, &discover(7, OWN));
    guard.to_guest(at(64_000), &answer_frame(OTHER, 7, OWN, (5, IP, 3600)));
    assert_eq!(judge(&mut guard, 64_000, &data), SPOOFED, "the answer came too late");
}

#[test]
fn a_lease_ends_with_its_time_or_a_refusal() {
    let data = ipv4_udp(IP, Ipv4Addr::new(198, 51, 100, 1), (4000, 53), b"question");
    let mut guard = leased();
    assert_eq!(judge(&mut guard, 3_600_000, &data), Verdict::Pass);
    assert_eq!(judge(&mut guard, 3_600_001, &data), SPOOFED);
    let mut guard = leased();
    assert_eq!(judge(&mut guard, 5, &discover(9, OWN)), Verdict::Pass);
    guard.to_guest(at(6), &answer_frame(OTHER, 9, OWN, (6, Ipv4Addr::UNSPECIFIED, 0)));
    assert_eq!(judge(&mut guard, 7, &data), SPOOFED);
    let mut guard = leased();
    guard.leased(at(5), OTHER_IP, None);
    let data = ipv4_udp(OTHER_IP, Ipv4Addr::new(198, 51, 100, 1), (4000, 53), b"question");
    assert_eq!(judge(&mut guard, u64::MAX / 2000, &data), Verdict::Pass, "one for ever");
}

const RELEASE: u8 = 7;
const DECLINE: u8 = 4;

/// A message of `client` that gives `addr` back, with `options` in front of its type.
fn gives_back(kind: u8, client: MacAddr, addr: Ipv4Addr, options: &[u8]) -> Vec<u8> {
    let mut message = dhcp(11, client, None);
    message.truncate(240);
    message.extend_from_slice(options);
    message.extend_from_slice(&[53, 1, kind]);
    if kind == RELEASE {
        message[12..16].copy_from_slice(&addr.octets());
    } else {
        message.extend_from_slice(&[50, 4]);
        message.extend_from_slice(&addr.octets());
    }
    message.push(255);
    message
}

/// Judges and, if it passes, sends a question.
fn ask(guard: &mut Guard, millis: u64, frame: &[u8]) -> Verdict {
    let verdict = judge(guard, millis, frame);
    if verdict == Verdict::Pass {
        guard.question_left(at(millis), seen(frame));
    }
    verdict
}

#[test]
fn an_address_given_back_is_not_the_guests_any_more_nor_its_next_process_s() {
    let to = Ipv4Addr::new(198, 51, 100, 1);
    let server = Ipv4Addr::new(192, 0, 2, 2);
    let data = ipv4_udp(IP, to, (4000, 53), b"question");
    // A long option in front, as a vendor's.
    let long = [&[60, 200][..], &[b'x'; 200]].concat();
    let release = |options: &[u8]| ipv4_udp(IP, server, (68, 67), &gives_back(RELEASE, OWN, IP, options));
    let decline =
        ipv4_udp(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, (68, 67), &gives_back(DECLINE, OWN, IP, &[]));
    let other_port = ipv4_udp(IP, server, (4000, 67), &gives_back(RELEASE, OWN, IP, &[]));
    for frame in [release(&[]), release(&long), decline, other_port] {
        let mut guard = leased();
        let mut news = guard.shared.news();
        news.borrow_and_update();
        assert_eq!(judge(&mut guard, 5, &frame), Verdict::Pass);
        // The link had no room for it: it is judged again.
        assert_eq!(judge(&mut guard, 6, &data), Verdict::Pass, "it has not left");
        assert_eq!(ask(&mut guard, 7, &frame), Verdict::Pass);
        assert!(!guard.table.questions.iter().any(|(xid, _)| *xid == 11), "there is no answer to it");
        assert_eq!(judge(&mut guard, 8, &data), SPOOFED);
        assert_eq!(judge(&mut guard, 8, &arp(OWN, IP, arp::Operation::Reply)), SPOOFED);
        assert_eq!(*news.borrow_and_update(), Some(LeaseNews { mac: OWN, leases: Vec::new() }));
        guard.forget_guest();
        assert_eq!(judge(&mut guard, 9, &data), SPOOFED);
        // Leased anew it is its again.
        judge(&mut guard, 10, &discover(12, OWN));
        guard.to_guest(at(11), &answer_frame(OTHER, 12, OWN, (5, IP, 3600)));
        assert_eq!(judge(&mut guard, 12, &data), Verdict::Pass);
    }
    let mut guard = leased();
    let others = ipv4_udp(IP, server, (68, 67), &gives_back(RELEASE, OWN, OTHER_IP, &[]));
    assert_eq!(ask(&mut guard, 5, &others), Verdict::Pass);
    assert_eq!(judge(&mut guard, 6, &data), Verdict::Pass, "another address");
}

#[test]
fn a_question_that_servers_may_read_otherwise_does_not_pass() {
    let server = Ipv4Addr::new(192, 0, 2, 2);
    let of = |message: &[u8]| ipv4_udp(IP, server, (68, 67), message);
    let release = |options: &[u8]| gives_back(RELEASE, OWN, IP, options);
    let mut short = of(&release(&[]));
    short[39] -= 2;
    let mut beyond = of(&release(&[]));
    beyond[39] += 1;
    let mut first = of(&release(&[]));
    first[20] = 0x20;
    // The header's checksum with it.
    first[14 + 10..14 + 12].fill(0);
    let mut sum = checksum::Accumulator::default();
    sum.add_bytes(&first[14..34]);
    let sum = sum.finish().to_be_bytes();
    first[14 + 10..14 + 12].copy_from_slice(&sum);
    for (what, frame) in [
        ("a type of its own in front", of(&release(&[53, 1, 1]))),
        ("a type of two bytes", of(&[&release(&[])[..240], &[53, 2, 7, 7, 255]].concat())),
        ("options where names stand", of(&[&release(&[])[..240], &[52, 1, 1, 255]].concat())),
        ("an address twice", of(&gives_back(DECLINE, OWN, IP, &[50, 4, 1, 2, 3, 4]))),
        ("no address", of(&[&release(&[])[..240], &[53, 1, DECLINE, 255]].concat())),
        ("options beyond what is copied", of(&release(&vec![0; 1500]))),
        ("an option that is cut", of(&[&release(&[])[..240], &[53, 1, 7, 60, 9]].concat())),
        ("an option beyond the datagram", short),
        ("a datagram beyond its packet", beyond),
        ("a fragment", first),
        ("nothing", of(&[])),
    ] {
        assert_eq!(judge(&mut leased(), 5, &frame), MALFORMED, "{what}");
    }
    let others = gives_back(RELEASE, OTHER, OTHER_IP, &[]);
    for port in [68, 4000] {
        assert_eq!(judge(&mut leased(), 5, &ipv4_udp(IP, server, (port, 67), &others)), SPOOFED, "{port}");
    }
    // Nor may who has no address ask from another port than clients have, and plain BOOTP may.
    let bootp = [&dhcp(7, OWN, None)[..236], &[0; 64]].concat();
    assert_eq!(judge(&mut leased(), 5, &of(&bootp)), Verdict::Pass);
}

#[test]
fn leases_are_told_of_and_known_to_the_next_process_of_the_same_mac_address() {
    let data = ipv4_udp(IP, Ipv4Addr::new(198, 51, 100, 1), (4000, 53), b"question");
    let mut guard = leased();
    let news = guard.shared.news().borrow().clone().expect("it was leased");
    let told = StationLease { mac: OWN, addr: IP, left: Some(Duration::from_secs(3600)) };
    assert_eq!(news, LeaseNews { mac: OWN, leases: vec![told] });
    guard.forget_guest();
    assert_eq!(judge(&mut guard, 5, &data), Verdict::Pass, "a guest that began anew");
    // The next process, told the guest's MAC address or shown it.
    for mac in [Some(OWN), None] {
        let table = Arc::new(SharedTable::with_leases(&news.leases));
        let mut next = Guard::new(GuardConfig { mac, ipv4: None }, Arc::clone(&table), 0);
        let mut worker = Guard::new(GuardConfig { mac, ipv4: None }, table, 1);
        assert_eq!(judge(&mut next, 5, &data), Verdict::Pass, "{mac:?}");
        assert_eq!(judge(&mut worker, 3_599_999, &data), Verdict::Pass, "{mac:?}");
        assert_eq!(judge(&mut worker, 3_600_001, &data), SPOOFED, "{mac:?}: as long as it was to last");
        // A refusal is the end of it, for the process after that too.
        let mut news = next.shared.news();
        assert_eq!(judge(&mut next, 6, &discover(9, OWN)), Verdict::Pass);
        next.to_guest(at(7), &answer_frame(OTHER, 9, OWN, (6, Ipv4Addr::UNSPECIFIED, 0)));
        assert_eq!(judge(&mut next, 8, &data), SPOOFED);
        next.forget_guest();
        assert_eq!(judge(&mut next, 9, &data), SPOOFED);
        assert_eq!(*news.borrow_and_update(), Some(LeaseNews { mac: OWN, leases: Vec::new() }));
    }
    // Another's address is not the guest's because another had it.
    let table = Arc::new(SharedTable::with_leases(&[StationLease { mac: OTHER, ..told }]));
    let mut next = Guard::new(GuardConfig::default(), table, 0);
    assert_eq!(judge(&mut next, 5, &data), SPOOFED);
    let config = GuardConfig { mac: Some(OWN), ipv4: Some(OTHER_IP) };
    let mut next = Guard::new(config, Arc::new(SharedTable::with_leases(&[told])), 0);
    assert_eq!(judge(&mut next, 5, &data), SPOOFED, "it was told another");
}

#[test]
fn an_address_told_is_the_only_one() {
    let mut guard = guard(GuardConfig { mac: Some(OWN), ipv4: Some(OTHER_IP) });
    judge(&mut guard, 0, &discover(7, OWN));
    guard.to_guest(at(1), &answer_frame(OTHER, 7, OWN, (5, IP, 3600)));
    let to = Ipv4Addr::new(198, 51, 100, 1);
    assert_eq!(judge(&mut guard, 1, &ipv4_udp(IP, to, (1, 2), b"")), SPOOFED);
    assert_eq!(judge(&mut guard, 1, &ipv4_udp(OTHER_IP, to, (1, 2), b"")), Verdict::Pass);
}

const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe00, 1);
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

fn ipv6_packet(src: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next, 255]);
    packet.extend_from_slice(&src.octets());
    packet.extend_from_slice(&Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
    packet.extend_from_slice(payload);
    packet
}

fn ipv6_frame(mac: MacAddr, src: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    ethernet(mac, 0x86dd, &ipv6_packet(src, next, payload))
}

/// A message of neighbour discovery, with a link-layer address option if there is one.
fn nd(kind: u8, target: Option<Ipv6Addr>, option: Option<(u8, MacAddr)>) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.iter().flat_map(Ipv6Addr::octets));
    if let Some((kind, mac)) = option {
        message.extend_from_slice(&[kind, 1]);
        message.extend_from_slice(&mac.0);
    }
    message
}

fn detection(mac: MacAddr, target: Ipv6Addr) -> Vec<u8> {
    ipv6_frame(mac, Ipv6Addr::UNSPECIFIED, 58, &nd(135, Some(target), None))
}

fn data(src: Ipv6Addr) -> Vec<u8> {
    ipv6_frame(OWN, src, 17, &udp((4000, 53), b"question"))
}

fn known_mac() -> Guard {
    guard(GuardConfig { mac: Some(OWN), ipv4: None })
}

#[test]
fn an_ipv6_address_that_nobody_claims_is_the_guests_after_half_a_second() {
    let mut guard = known_mac();
    assert_eq!(judge(&mut guard, 0, &detection(OWN, LINK_LOCAL)), Verdict::Pass);
    assert_eq!(judge(&mut guard, 499, &data(LINK_LOCAL)), SPOOFED);
    assert_eq!(judge(&mut guard, 500, &data(LINK_LOCAL)), Verdict::Pass);
    assert_eq!(judge(&mut guard, 501, &data(ROUTER)), Verdict::Probe(probe(OWN, ROUTER)));
}

#[test]
fn an_ipv6_address_somebody_has_never_becomes_the_guests() {
    let advertisement = ipv6_frame(OTHER, ROUTER, 58, &nd(136, Some(ROUTER), Some((2, OTHER))));
    let simultaneous = detection(OTHER, ROUTER);
    for answer in [advertisement, simultaneous] {
        let mut guard = known_mac();
        assert_eq!(judge(&mut guard, 0, &detection(OWN, ROUTER)), Verdict::Pass);
        guard.to_guest(at(100), &answer);
        for millis in [600, 601, 900, 2000] {
            let verdict = judge(&mut guard, millis, &data(ROUTER));
            assert_ne!(verdict, Verdict::Pass, "{millis}");
            if matches!(verdict, Verdict::Probe(_)) {
                guard.to_guest(at(millis), &answer);
            }
        }
        let reply = ipv6_frame(OWN, LINK_LOCAL, 58, &nd(136, Some(ROUTER), Some((2, OWN))));
        assert_eq!(judge(&mut guard, 2001, &reply), SPOOFED, "nor does it answer for it");
    }
}

#[test]
fn an_address_in_use_is_asked_for_on_the_guests_behalf() {
    let mut guard = known_mac();
    let frame = data(LINK_LOCAL);
    assert!(matches!(judge(&mut guard, 0, &frame), Verdict::Probe(_)));
    assert_eq!(judge(&mut guard, 249, &frame), SPOOFED);
    assert!(matches!(judge(&mut guard, 250, &frame), Verdict::Probe(_)), "twice");
    assert_eq!(judge(&mut guard, 499, &frame), SPOOFED);
    assert_eq!(judge(&mut guard, 500, &frame), Verdict::Pass);
    let probe = probe(OWN, LINK_LOCAL);
    assert_eq!(probe[..6], [0x33, 0x33, 0xff, 0, 0, 1]);
    let packet = ipv6::Packet::parse(&probe[14..]).unwrap();
    let Upper::Icmp { message, .. } = packet.upper else { panic!("{packet:?}") };
    assert_eq!(Discovery::parse(message), Ok(Discovery::NeighbourSolicitation(LINK_LOCAL, None)));
    let group: Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    assert_eq!(probe[38..54], group.octets());
    let mut sum = checksum::pseudo_header(Ipv6Addr::UNSPECIFIED.into(), group.into(), Protocol::ICMPV6, 24);
    sum.add_bytes(message);
    assert_eq!(sum.finish(), 0);
}

/// A guard of a guest whose link-local address is its own since 500 ms.
fn settled() -> Guard {
    let mut guard = known_mac();
    judge(&mut guard, 0, &detection(OWN, LINK_LOCAL));
    assert_eq!(judge(&mut guard, 500, &data(LINK_LOCAL)), Verdict::Pass);
    guard
}

/// What somebody who has the link-local address says.
fn claim_of_other() -> Vec<u8> {
    ipv6_frame(OTHER, LINK_LOCAL, 58, &nd(136, Some(LINK_LOCAL), Some((2, OTHER))))
}

#[test]
fn an_address_unused_for_long_is_asked_for_again_and_lost_only_to_an_answer() {
    let life = 300_000;
    let recheck = Verdict::Recheck(probe(OWN, LINK_LOCAL));
    let mut guard = settled();
    assert_eq!(judge(&mut guard, life - 1, &data(LINK_LOCAL)), Verdict::Pass, "in use");
    assert_eq!(judge(&mut guard, 2 * life - 2, &data(LINK_LOCAL)), Verdict::Pass);
    guard.to_guest(at(2 * life), &claim_of_other());
    assert_eq!(judge(&mut guard, 2 * life, &data(LINK_LOCAL)), Verdict::Pass, "nobody was asked");
    assert_eq!(judge(&mut guard, 3 * life, &data(LINK_LOCAL)), recheck, "it is asked once, and passes");
    assert_eq!(judge(&mut guard, 3 * life + 1, &data(LINK_LOCAL)), Verdict::Pass);
    guard.to_guest(at(3 * life + 500), &claim_of_other());
    assert_eq!(
        judge(&mut guard, 3 * life + 501, &data(LINK_LOCAL)),
        Verdict::Pass,
        "an answer that late is none"
    );
    // What it says of its address counts as a use of it, and an answer takes it away.
    let reply = ipv6_frame(OWN, LINK_LOCAL, 58, &nd(136, Some(LINK_LOCAL), Some((2, OWN))));
    assert_eq!(judge(&mut guard, 5 * life, &reply), recheck);
    guard.to_guest(at(5 * life + 10), &claim_of_other());
    assert_eq!(judge(&mut guard, 5 * life + 11, &reply), SPOOFED);
    assert!(
        matches!(judge(&mut guard, 5 * life + 12, &data(LINK_LOCAL)), Verdict::Probe(_)),
        "from the start"
    );
    assert_eq!(judge(&mut guard, 5 * life + 13, &data(LINK_LOCAL)), SPOOFED);
}

#[test]
fn an_address_another_station_looks_for_is_the_guests_if_it_says_so() {
    let reply = ipv6_frame(OWN, LINK_LOCAL, 58, &nd(136, Some(LINK_LOCAL), Some((2, OWN))));
    let looks = detection(OTHER, LINK_LOCAL);
    let mut guard = settled();
    guard.to_guest(at(1000), &looks);
    assert_eq!(judge(&mut guard, 1100, &data(LINK_LOCAL)), Verdict::Pass, "for half a second");
    assert_eq!(judge(&mut guard, 1200, &reply), Verdict::Pass);
    assert_eq!(judge(&mut guard, 2000, &data(LINK_LOCAL)), Verdict::Pass, "it said so");
    // It no longer has it, and says nothing; repetition wins no time.
    guard.to_guest(at(3000), &looks);
    guard.to_guest(at(3300), &looks);
    assert_eq!(judge(&mut guard, 3499, &data(LINK_LOCAL)), Verdict::Pass);
    assert_eq!(judge(&mut guard, 3500, &data(LINK_LOCAL)), Verdict::Probe(probe(OWN, LINK_LOCAL)));
    assert_eq!(judge(&mut guard, 3501, &reply), SPOOFED);
    // The guest's own question, reflected by a bridge, is nobody else's.
    let mut guard = settled();
    guard.to_guest(at(1000), &detection(OWN, LINK_LOCAL));
    assert_eq!(judge(&mut guard, 1600, &data(LINK_LOCAL)), Verdict::Pass);
    // One that takes no frames says nothing either, and cannot keep by it what another has now.
    guard.set_stalled(at(1700), true);
    guard.to_guest(at(1700), &looks);
    assert_eq!(judge(&mut guard, 2300, &data(LINK_LOCAL)), SPOOFED);
    guard.set_stalled(at(2400), false);
    assert!(matches!(judge(&mut guard, 2401, &data(LINK_LOCAL)), Verdict::Probe(_) | Verdict::Drop(_)));
}

#[test]
fn a_guest_that_takes_no_frames_gets_no_address() {
    let mut guard = known_mac();
    judge(&mut guard, 0, &detection(OWN, ROUTER));
    guard.set_stalled(at(10), true);
    assert_eq!(judge(&mut guard, 600, &data(ROUTER)), SPOOFED, "the answer may wait in the queue");
    guard.set_stalled(at(700), false);
    let again = judge(&mut guard, 701, &data(ROUTER));
    assert!(matches!(again, Verdict::Probe(_)), "or was lost there: {again:?}");
    assert_eq!(judge(&mut guard, 1200, &data(ROUTER)), Verdict::Probe(probe(OWN, ROUTER)));
    assert_eq!(judge(&mut guard, 1201, &data(ROUTER)), Verdict::Pass);
    let mut other = Guard::new(guard.config, Arc::clone(&guard.shared), 1);
    judge(&mut guard, 2000, &detection(OWN, LINK_LOCAL));
    other.set_stalled(at(2001), true);
    assert_eq!(judge(&mut guard, 2600, &data(LINK_LOCAL)), SPOOFED, "any queue may have it");
    other.set_stalled(at(2601), false);
    let mut brief = known_mac();
    judge(&mut brief, 0, &detection(OWN, LINK_LOCAL));
    brief.set_stalled(at(100), true);
    brief.set_stalled(at(200), false);
    assert_eq!(judge(&mut brief, 500, &data(LINK_LOCAL)), Verdict::Pass, "a busy guest is no liar");
}

#[test]
fn a_guest_whose_queue_nobody_reads_gets_no_address() {
    let config = GuardConfig { mac: Some(OWN), ipv4: None };
    let table = Arc::new(SharedTable::default());
    let mut one = Guard::new(config, Arc::clone(&table), 0);
    let mut two = Guard::new(config, table, 1);
    judge(&mut one, 0, &detection(OWN, ROUTER));
    assert_eq!(judge(&mut one, 600, &data(ROUTER)), SPOOFED, "no receive ring ran yet");
    one.set_reading(true);
    assert_eq!(judge(&mut one, 700, &data(ROUTER)), Verdict::Probe(probe(OWN, ROUTER)), "an answer was lost");
    two.set_reading(true);
    two.set_reading(false);
    assert_eq!(
        judge(&mut one, 1300, &data(ROUTER)),
        Verdict::Probe(probe(OWN, ROUTER)),
        "or with a queue that went"
    );
    assert_eq!(judge(&mut one, 1800, &data(ROUTER)), Verdict::Pass);
    judge(&mut two, 1900, &detection(OWN, LINK_LOCAL));
    assert_eq!(judge(&mut two, 2400, &data(LINK_LOCAL)), Verdict::Pass, "one queue has the answers for all");
    one.set_reading(false);
    assert_eq!(judge(&mut two, 2500, &data(LINK_LOCAL)), Verdict::Pass, "what is the guest's stays its");
}

#[test]
fn what_routers_and_servers_say_is_not_the_guests_to_say() {
    let mut guard = known_mac();
    judge(&mut guard, 0, &detection(OWN, LINK_LOCAL));
    let nd_frame = |message: &[u8]| ipv6_frame(OWN, LINK_LOCAL, 58, message);
    let (target, own, other) = (Some(LINK_LOCAL), Some((1, OWN)), Some((1, OTHER)));
    let fragment = |message: &[u8]| {
        let mut payload = vec![58, 0, 0, 1, 0, 0, 0, 9];
        payload.extend_from_slice(message);
        ipv6_frame(OWN, LINK_LOCAL, 44, &payload)
    };
    let behind_options = |message: &[u8]| {
        let mut payload = vec![58, 0, 5, 2, 0, 0, 1, 0];
        payload.extend_from_slice(message);
        ipv6_frame(OWN, LINK_LOCAL, 0, &payload)
    };
    let report = [&[58, 0, 5, 2, 0, 0, 1, 0][..], &[143, 0, 0, 0, 0, 0, 0, 0]].concat();
    let long = [&[60, 60][..], &[0; 494]].concat();
    for (what, frame, expected) in [
        ("router advertisement", nd_frame(&nd(134, None, None)), ROGUE),
        ("hidden behind options", behind_options(&nd(134, None, None)), ROGUE),
        ("hidden in a fragment", fragment(&nd(134, None, None)), MALFORMED),
        ("hidden beyond sight", ipv6_frame(OWN, LINK_LOCAL, 60, &long), MALFORMED),
        ("query for groups", nd_frame(&[130, 0, 0, 0, 0, 0, 0, 0]), ROGUE),
        ("multicast router", nd_frame(&[151, 0, 0, 0, 0, 0, 0, 0]), ROGUE),
        ("redirect", nd_frame(&nd(137, target, None)), ROGUE),
        ("DHCPv6 server", ipv6_frame(OWN, LINK_LOCAL, 17, &udp((547, 546), b"")), ROGUE),
        ("from another port", ipv6_frame(OWN, LINK_LOCAL, 17, &udp((4000, 546), b"")), ROGUE),
        ("DHCPv6 client", ipv6_frame(OWN, LINK_LOCAL, 17, &udp((546, 547), b"")), Verdict::Pass),
        ("router solicitation", nd_frame(&nd(133, None, own)), Verdict::Pass),
        ("with another's MAC", nd_frame(&nd(133, None, other)), SPOOFED),
        ("neighbour solicitation", nd_frame(&nd(135, Some(ROUTER), own)), Verdict::Pass),
        ("with another's MAC", nd_frame(&nd(135, Some(ROUTER), other)), SPOOFED),
        ("own advertisement", nd_frame(&nd(136, target, Some((2, OWN)))), Verdict::Pass),
        ("with another's MAC", nd_frame(&nd(136, target, Some((2, OTHER)))), SPOOFED),
        ("another's advertisement", nd_frame(&nd(136, Some(ROUTER), Some((2, OWN)))), SPOOFED),
        ("option of no length", nd_frame(&[&nd(136, target, None)[..], &[2, 0]].concat()), MALFORMED),
        ("echo", nd_frame(&[128, 0, 0, 0, 0, 1, 0, 1]), Verdict::Pass),
        ("data in a fragment", fragment(&[128, 0, 0, 0]), Verdict::Pass),
        ("listener report", ipv6_frame(OWN, Ipv6Addr::UNSPECIFIED, 0, &report), Verdict::Pass),
        ("data from nobody", ipv6_frame(OWN, Ipv6Addr::UNSPECIFIED, 17, &udp((1, 2), b"")), SPOOFED),
        ("multicast source", data(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1)), SPOOFED),
        ("version 4 within", ethernet(OWN, 0x86dd, &[0x45; 60]), MALFORMED),
    ] {
        assert_eq!(judge(&mut guard, 600, &frame), expected, "{what}");
    }
}

#[test]
fn a_checksum_is_written_over_nothing_that_was_judged() {
    let mut guard = leased();
    judge(&mut guard, 0, &detection(OWN, LINK_LOCAL));
    let tunnel = Ipv4Addr::new(198, 51, 100, 1);
    let tcp4 = ethernet(OWN, 0x0800, &ipv4_packet(IP, tunnel, (Protocol::TCP, 0), &[0; 40]));
    let piece4 = ethernet(OWN, 0x0800, &ipv4_packet(IP, tunnel, (Protocol::UDP, 8), &[0; 40]));
    let udp4 = ipv4_udp(IP, tunnel, (4000, 4789), &[0; 40]);
    let echo6 = ipv6_frame(OWN, LINK_LOCAL, 58, &[128, 0, 0, 0, 0, 1, 0, 1]);
    let behind_options = [&[6, 0, 5, 2, 0, 0, 1, 0][..], &[0; 20]].concat();
    let piece6 = [&[17, 0, 0, 8, 0, 0, 0, 9][..], &[0; 20]].concat();
    for (what, frame, places) in [
        // Each frame with the places that are allowed among the first 54 + 20; upper layers begin at 34 and 54.
        ("TCP", tcp4, 34..74),
        ("a further fragment", piece4, 34..74),
        ("ARP", arp(OWN, IP, arp::Operation::Reply), 0..0),
        ("echo", echo6, 56..57),
        ("TCP over IPv6", ipv6_frame(OWN, LINK_LOCAL, 6, &[0; 20]), 54..74),
        ("the same behind options", ipv6_frame(OWN, LINK_LOCAL, 0, &behind_options), 62..74),
        ("a further fragment over IPv6", ipv6_frame(OWN, LINK_LOCAL, 44, &piece6), 62..74),
        ("a question", discover(9, OWN), 40..41),
    ] {
        for place in 14..72u16 {
            let checksum = Checksum::Partial { start: 14, offset: place - 14 };
            let verdict = guard.from_guest(at(600), checksum, seen(&frame), frame.len());
            let expected = if places.contains(&place) { Verdict::Pass } else { MALFORMED };
            assert_eq!(verdict, expected, "{what}: {place}");
        }
    }
    for (place, expected) in
        [(34, MALFORMED), (37, MALFORMED), (40, Verdict::Pass), (41, MALFORMED), (42, Verdict::Pass)]
    {
        let checksum = Checksum::Partial { start: place, offset: 0 };
        assert_eq!(guard.from_guest(at(600), checksum, &udp4, udp4.len()), expected, "UDP: {place}");
    }
}

#[test]
fn tables_stay_within_their_bounds_and_keep_what_is_in_use() {
    let addr = |n: u16| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n);
    let mut guard = known_mac();
    judge(&mut guard, 0, &detection(OWN, LINK_LOCAL));
    assert_eq!(judge(&mut guard, 500, &data(LINK_LOCAL)), Verdict::Pass);
    for n in 1..200 {
        judge(&mut guard, 600, &detection(OWN, addr(n)));
        judge(&mut guard, 600, &discover(n.into(), OWN));
        guard.leased(at(600), Ipv4Addr::from_bits(0xc000_0200 + u32::from(n)), None);
    }
    assert_eq!(guard.table.bindings.len(), GUARD_IPV6_MAX);
    assert_eq!(guard.table.questions.len(), GUARD_QUESTIONS_MAX);
    assert_eq!(guard.table.leases.len(), GUARD_IPV4_MAX);
    assert_eq!(judge(&mut guard, 601, &data(LINK_LOCAL)), Verdict::Pass, "claims push out claims only");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the guest sends: what passes comes from its MAC address, and if it is IP or ARP, from an
    /// address that is its own or none.
    #[test]
    fn nothing_with_another_source_passes(
        mac in prop_oneof![Just(OWN), Just(OTHER), any::<[u8; 6]>().prop_map(MacAddr)],
        ethertype in prop_oneof![Just(0x0800), Just(0x0806), Just(0x86dd), Just(0x8100), any::<u16>()],
        src in prop_oneof![Just(IP), Just(OTHER_IP), Just(Ipv4Addr::UNSPECIFIED), any::<u32>().prop_map(Into::into)],
        src6 in prop_oneof![Just(LINK_LOCAL), Just(ROUTER), Just(Ipv6Addr::UNSPECIFIED), any::<u128>().prop_map(Into::into)],
        protocol in prop_oneof![Just(17u8), Just(58u8), Just(6u8), Just(0u8), Just(44u8), any::<u8>()],
        kind in prop_oneof![133u8..=137, any::<u8>()],
        payload in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut guard = leased();
        judge(&mut guard, 2, &detection(OWN, LINK_LOCAL));
        assert_eq!(judge(&mut guard, 600, &data(LINK_LOCAL)), Verdict::Pass);
        let payload = [&[kind][..], &payload].concat();
        let packet = match ethertype {
            0x0800 => ipv4_packet(src, Ipv4Addr::BROADCAST, (Protocol(protocol), 0), &payload),
            0x0806 => {
                let mut packet = arp(OWN, src, arp::Operation::Reply).split_off(14);
                packet[7] = kind % 4;
                packet
            }
            0x86dd => ipv6_packet(src6, protocol, &payload),
            _ => payload,
        };
        let frame = ethernet(mac, ethertype, &packet);
        if judge(&mut guard, 600, &frame) == Verdict::Pass {
            prop_assert_eq!(mac, OWN);
            let is_own = match ethertype {
                0x0800 => src == IP || (src.is_unspecified() && protocol == 17),
                0x0806 => src == IP || src.is_unspecified(),
                0x86dd => src6 == LINK_LOCAL || (src6.is_unspecified() && [0, 44, 58, 60].contains(&protocol)),
                _ => false,
            };
            prop_assert!(is_own, "{ethertype:#x} {src} {src6} {protocol}");
        }
    }

    /// Bytes of any kind, from the guest and for it, are judged without a panic.
    #[test]
    fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 14..400), ours in any::<bool>()) {
        let mut guard = leased();
        judge(&mut guard, 3, &discover(8, OWN));
        let mut bytes = bytes;
        if ours {
            bytes[6..12].copy_from_slice(&OWN.0);
        }
        judge(&mut guard, 5, &bytes);
        guard.to_guest(at(6), &bytes);
    }
}
