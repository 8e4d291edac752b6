use std::net::IpAddr;

use dhcproto::v4::{Decodable, Decoder, DhcpOption, Encodable, Message, MessageType, Opcode};

use super::*;
use crate::addr::Ipv4Subnet;
use crate::wire::checksum;

const OURS: MacAddr = MacAddr([0x56, 0x54, 0, 0, 0, 1]);
const OTHER: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
const ADDR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 50);
const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

fn ms(at: u64) -> Instant {
    Instant::ZERO + Duration::from_millis(at)
}

fn subnet(network: [u8; 4]) -> Ipv4Subnet {
    Ipv4Subnet::new(network.into(), 24).unwrap()
}

fn fixed() -> LinkAddress {
    LinkAddress { addr: ADDR, subnet: subnet([192, 0, 2, 0]), router: Some(ROUTER) }
}

fn station(address: StationAddress) -> Station {
    Station::new(ms(0), StationConfig { mac: OURS, address, guests: subnet([10, 0, 2, 0]), seed: 5 })
}

/// Where each waiting frame goes, and the ARP in it.
fn sent(station: &mut Station) -> Vec<(MacAddr, arp::Packet)> {
    let frames = std::iter::from_fn(|| station.next_frame());
    let read = |frame: Box<[u8]>| {
        let header = ethernet::Header::parse(&frame).unwrap();
        assert_eq!((header.src, header.ethertype), (OURS, EtherType::ARP));
        (header.dst, arp::Packet::parse(&frame[ethernet::HEADER_BYTES..]).unwrap())
    };
    frames.map(read).collect()
}

fn says(operation: arp::Operation, sender: (MacAddr, Ipv4Addr), target_ip: Ipv4Addr) -> Vec<u8> {
    let (sender_mac, sender_ip) = sender;
    let packet = arp::Packet { operation, sender_mac, sender_ip, target_mac: MacAddr::ZERO, target_ip };
    packet.frame(MacAddr::BROADCAST, sender_mac).to_vec()
}

/// A station that has its address, and whose router answered.
fn settled() -> Station {
    let mut station = station(StationAddress::Fixed(fixed()));
    for at in [0, 200, 400, 600] {
        station.poll(ms(at));
    }
    sent(&mut station);
    assert!(station.receive(ms(600), &says(arp::Operation::Reply, (OTHER, ROUTER), ADDR)));
    station
}

#[test]
fn an_address_is_probed_for_announced_and_only_then_used() {
    let mut station = station(StationAddress::Fixed(fixed()));
    for probe in 0..3 {
        assert_eq!(station.deadline(), Some(ms(probe * 200)));
        station.poll(ms(probe * 200));
        let [(to, asked)] = sent(&mut station)[..] else { panic!("one probe") };
        assert_eq!((to, asked.sender_ip, asked.target_ip), (MacAddr::BROADCAST, Ipv4Addr::UNSPECIFIED, ADDR));
        assert_eq!((station.held(), station.next_hop(ms(1), ROUTER)), (None, NextHop::NotYet));
    }
    station.poll(ms(600));
    let frames = sent(&mut station);
    let targets: Vec<_> = frames.iter().map(|(_, packet)| (packet.sender_ip, packet.target_ip)).collect();
    assert_eq!(targets, [(ADDR, ADDR), (ADDR, ROUTER)], "announced, and the router asked for");
    assert_eq!(station.held(), Some(fixed()));
    station.poll(ms(2600));
    assert!(sent(&mut station).iter().any(|(_, packet)| packet.target_ip == ADDR), "announced again");
}

#[test]
fn packets_go_to_neighbours_directly_and_by_the_router_to_the_world() {
    let mut station = settled();
    let world = Ipv4Addr::new(198, 51, 100, 1);
    assert!(matches!(station.next_hop(ms(700), world), NextHop::At(OTHER, _)));
    assert_eq!(station.next_hop(ms(700), Ipv4Addr::new(192, 0, 2, 9)), NextHop::Asked([192, 0, 2, 9].into()));
    assert_eq!(sent(&mut station)[0].1.target_ip, Ipv4Addr::new(192, 0, 2, 9));
    let version = station.version();
    let neighbour = (MacAddr([2, 0, 0, 0, 0, 9]), Ipv4Addr::new(192, 0, 2, 9));
    station.receive(ms(700), &says(arp::Operation::Reply, neighbour, ADDR));
    assert!(station.version() > version);
    assert!(matches!(station.next_hop(ms(700), neighbour.1), NextHop::At(mac, _) if mac == neighbour.0));
    for broadcast in [[192, 0, 2, 255], [192, 0, 2, 0]] {
        assert_eq!(station.next_hop(ms(700), broadcast.into()), NextHop::Unreachable);
    }
    // One that nobody asked for tells nothing.
    let stranger = (OTHER, Ipv4Addr::new(192, 0, 2, 77));
    station.receive(ms(700), &says(arp::Operation::Reply, stranger, ADDR));
    assert!(matches!(station.next_hop(ms(700), stranger.1), NextHop::Asked(_)));
}

#[test]
fn who_asks_for_our_address_is_answered_and_remembered() {
    let mut station = settled();
    let neighbour = (MacAddr([2, 0, 0, 0, 0, 9]), Ipv4Addr::new(192, 0, 2, 9));
    assert!(station.receive(ms(700), &says(arp::Operation::Request, neighbour, ADDR)));
    let [(to, reply)] = sent(&mut station)[..] else { panic!("one reply") };
    assert_eq!((to, reply.operation), (neighbour.0, arp::Operation::Reply));
    assert_eq!((reply.sender_mac, reply.sender_ip, reply.target_ip), (OURS, ADDR, neighbour.1));
    assert!(matches!(station.next_hop(ms(700), neighbour.1), NextHop::At(..)), "no question of our own");
    station.receive(ms(700), &says(arp::Operation::Request, neighbour, ROUTER));
    assert_eq!(sent(&mut station), [], "not ours to answer");
    for _ in 0..10 * limits::STATION_OUTBOX_MAX {
        station.receive(ms(700), &says(arp::Operation::Request, neighbour, ADDR));
    }
    assert_eq!(sent(&mut station).len(), limits::STATION_OUTBOX_MAX);
}

#[test]
fn an_address_another_host_has_is_not_used_and_tried_again() {
    for (operation, sender_ip) in
        [(arp::Operation::Reply, ADDR), (arp::Operation::Request, Ipv4Addr::UNSPECIFIED)]
    {
        let mut station = station(StationAddress::Fixed(fixed()));
        station.poll(ms(0));
        station.receive(ms(50), &says(operation, (OTHER, sender_ip), ADDR));
        station.poll(ms(700));
        assert_eq!(station.held(), None, "{operation:?}");
        assert_eq!(station.deadline(), Some(ms(10_050)));
        sent(&mut station);
        for at in [10_050, 10_250, 10_450, 10_650] {
            station.poll(ms(at));
        }
        assert_eq!(station.held(), Some(fixed()), "the other is gone");
    }
}

#[test]
fn an_address_we_were_told_is_defended_every_ten_seconds_and_kept() {
    let mut station = settled();
    let thief = says(arp::Operation::Request, (OTHER, ADDR), ROUTER);
    let mut announced = 0;
    for second in 1..=30 {
        station.receive(ms(second * 1000), &thief);
        announced += sent(&mut station).len();
        assert_eq!(station.held(), Some(fixed()));
    }
    assert_eq!(announced, 3);
}

#[test]
fn a_lease_is_claimed_declined_when_in_use_and_given_back() {
    let mut station = station(StationAddress::Dhcp);
    assert!(!station.awaits_dhcp());
    station.poll(ms(0));
    assert!(station.awaits_dhcp());
    let discover = station.next_frame().expect("a question");
    let packet = &discover[ethernet::HEADER_BYTES..];
    let header = ipv4::Header::parse(packet, packet.len()).unwrap();
    assert_eq!((header.src, header.dst), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
    let mut sum = checksum::pseudo_header(
        IpAddr::V4(header.src),
        IpAddr::V4(header.dst),
        Protocol::UDP,
        header.payload_bytes,
    );
    sum.add_bytes(&packet[header.header_bytes..]);
    assert_eq!(sum.finish(), 0, "a complete checksum");
    let lease = |addr: [u8; 4]| {
        Some(ClientEvent::Bound(crate::service::dhcp::client::ClientLease {
            addr: addr.into(),
            subnet: subnet([addr[0], addr[1], addr[2], 0]),
            router: None,
            server: ROUTER,
            lease_time: Duration::from_secs(60),
            renewal: (Duration::from_secs(30), Duration::from_secs(50)),
        }))
    };
    station.leased(ms(10), lease([192, 0, 2, 50]));
    assert_eq!(station.held(), None, "probed for first");
    for at in [210, 410, 610] {
        station.poll(ms(at));
    }
    assert_eq!(station.held().map(|held| held.addr), Some(ADDR));
    let version = station.version();
    station.leased(ms(700), lease([192, 0, 2, 50]));
    assert_eq!((station.held().map(|held| held.addr), station.version()), (Some(ADDR), version), "prolonged");
    assert_eq!(station.next_hop(ms(700), [198, 51, 100, 1].into()), NextHop::Unreachable, "no router");
    station.leased(ms(750), Some(ClientEvent::Lost));
    station.leased(ms(800), lease([192, 0, 2, 50]));
    station.receive(ms(810), &says(arp::Operation::Reply, (OTHER, ADDR), ADDR));
    assert_eq!((station.held(), station.claim), (None, Claim::None));
    station.leased(ms(900), lease([192, 0, 2, 50]));
    assert!(station.held().is_none());
    station.leased(ms(901), Some(ClientEvent::Lost));
    assert_eq!(station.claim, Claim::None);
}

/// The DHCP message in a frame, and where that goes.
fn dhcp_in(frame: &[u8]) -> Option<(MacAddr, Ipv4Addr, Message)> {
    let header = ethernet::Header::parse(frame).unwrap();
    let packet = &frame[ethernet::HEADER_BYTES..];
    let ip = ipv4::Header::parse(packet, packet.len()).ok()?;
    let payload = packet.get(ip.header_bytes + udp::HEADER_BYTES..)?;
    Some((header.dst, ip.dst, Message::decode(&mut Decoder::new(payload)).ok()?))
}

/// The next DHCP message the station sends, whatever it asks besides.
fn next_dhcp(station: &mut Station) -> Option<(MacAddr, Ipv4Addr, Message)> {
    std::iter::from_fn(|| station.next_frame()).find_map(|frame| dhcp_in(&frame))
}

/// The server's answer to `asked` at our port 68.
fn answered(asked: &Message, kind: MessageType, addr: Ipv4Addr, server: Ipv4Addr) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(asked.xid(), none, addr, none, none, &OURS.0);
    message.set_opcode(Opcode::BootReply);
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(server));
    options.insert(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)));
    options.insert(DhcpOption::AddressLeaseTime(3600));
    let datagram =
        emit::datagram((server, SERVER_PORT).into(), (addr, CLIENT_PORT).into(), &message.to_vec().unwrap());
    let mut frame = vec![0; ethernet::HEADER_BYTES + ipv4::HEADER_BYTES];
    ethernet::Header { dst: OURS, src: OTHER, ethertype: EtherType::IPV4 }.emit(&mut frame);
    let header = ipv4::Header {
        src: server,
        dst: addr,
        protocol: Protocol::UDP,
        ttl: 64,
        tos: 0,
        ident: 1,
        dont_fragment: false,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: datagram.len(),
    };
    header.emit(&mut frame[ethernet::HEADER_BYTES..]);
    frame.extend_from_slice(&datagram);
    frame
}

/// Has the station leased `addr` by `server`, from its next question on.
fn leases(station: &mut Station, now: Instant, addr: Ipv4Addr, server: Ipv4Addr) {
    for kind in [MessageType::Offer, MessageType::Ack] {
        station.poll(now);
        let (to, _, asked) = next_dhcp(station).expect("a question");
        assert_eq!(to, MacAddr::BROADCAST);
        assert!(station.receive(now, &answered(&asked, kind, addr, server)));
    }
}

#[test]
fn a_lease_is_prolonged_from_its_server_alone_and_in_the_end_from_anybody() {
    let mut station = station(StationAddress::Dhcp);
    let server = Ipv4Addr::new(192, 0, 2, 3);
    leases(&mut station, ms(0), ADDR, server);
    for at in [200, 400, 600, 2600] {
        station.poll(ms(at));
    }
    assert_eq!(station.held().map(|held| held.addr), Some(ADDR));
    std::iter::from_fn(|| station.next_frame()).for_each(drop);
    let half = 1_800_000;
    station.poll(ms(half));
    let [(to, asked)] = sent(&mut station)[..] else { panic!("only a question who the server is") };
    assert_eq!((to, asked.target_ip), (MacAddr::BROADCAST, server));
    let mac = MacAddr([2, 0, 0, 0, 0, 3]);
    station.receive(ms(half), &says(arp::Operation::Reply, (mac, server), ADDR));
    let (to, dst, renew) = next_dhcp(&mut station).expect("the request");
    assert_eq!((to, dst, renew.ciaddr()), (mac, server, ADDR));
    assert!(next_dhcp(&mut station).is_none(), "once");
    // Nobody answers, and at last the server is gone from the link as well.
    let mut last = None;
    while let Some(due) = station.deadline().filter(|due| *due < ms(3_600_000)) {
        station.poll(due);
        last = next_dhcp(&mut station).or(last);
    }
    let (to, dst, _) = last.expect("more requests");
    assert_eq!((to, dst), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST), "REBINDING");
}

#[test]
fn a_lease_in_the_guests_own_network_is_given_back_and_asked_for_ever_more_seldom() {
    let mut station = station(StationAddress::Dhcp);
    let taken = Ipv4Addr::new(10, 0, 2, 50);
    let mut now = ms(0);
    let mut waits = Vec::new();
    for _ in 0..9 {
        leases(&mut station, now, taken, Ipv4Addr::new(10, 0, 2, 1));
        assert_eq!((station.held(), station.claim), (None, Claim::None));
        let (_, dst, release) = next_dhcp(&mut station).expect("it is given back");
        assert_eq!(release.opts().msg_type(), Some(MessageType::Release));
        assert_eq!((release.ciaddr(), dst), (taken, Ipv4Addr::new(10, 0, 2, 1)));
        let due = station.deadline().expect("asked for again");
        waits.push(due.since(now).as_secs());
        now = due;
    }
    assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 640, 640]);
    leases(&mut station, now, ADDR, ROUTER);
    for _ in 0..4 {
        now = now + Duration::from_millis(200);
        station.poll(now);
    }
    assert_eq!(station.held().map(|held| held.addr), Some(ADDR), "the link has changed");
}
