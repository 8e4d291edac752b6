//! The guest becomes another one, or has another address, without a word of its device.

use dhcproto::v4::{DhcpOption, Message, MessageType};
use dhcproto::{Decodable, Decoder, Encodable};
use std::net::{Ipv4Addr, SocketAddrV4};

use vunet::engine::counters::DropReason;
use vunet::frame::QueuePair;
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::VnetHeader;

use crate::frames::{GATEWAY, GUEST_IP, GUEST_MAC, Seen, echo_frame, guest, udp_frame, world};
use crate::rig::{Peer, READABLE, Rig, WRITABLE, connected, only, pattern, secs};
use crate::world::End;

const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

fn under_another_mac(mut frame: Vec<u8>) -> Vec<u8> {
    frame[6..12].copy_from_slice(&OTHER_MAC);
    frame
}

/// The frames for the guest now, by whom they are for.
fn receivers(rig: &mut Rig) -> Vec<[u8; 6]> {
    while rig.engine.flush(&mut rig.port) {}
    rig.port.delivered.iter().map(|received| *received.frame.first_chunk().expect("a frame")).collect()
}

#[test]
fn the_same_guest_under_another_mac_address_goes_on() {
    let mut rig = Rig::new();
    let mut peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.feed(&under_another_mac(echo_frame(GATEWAY, 1, 1, b"hello")));
    rig.conn(0).queue.extend(pattern(1000));
    let token = rig.conn(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    assert_eq!(receivers(&mut rig), [OTHER_MAC; 3], "the echo, the bytes, the question whether it lives");
    rig.take();
    peer.ack += 1000;
    rig.send(&under_another_mac(peer.seg(Flags::ACK, &[]).frame()));
    assert_eq!(rig.conn(0).discarded, 1000);
    assert_eq!(rig.pass(secs(3600)), [], "it lives");
}

#[test]
fn another_guest_under_another_mac_address_is_asked_and_ends_the_flows_it_does_not_know() {
    let mut rig = Rig::new();
    let peer = connected(&mut rig, Peer::new(guest(4000), world(80)));
    let seen = rig.send(&under_another_mac(echo_frame(GATEWAY, 1, 1, b"hello")));
    let asked = seen.into_iter().find(|seen| matches!(seen, Seen::Tcp(_))).expect("a question").tcp();
    assert_eq!((asked.header.seq.0, asked.payload.len()), (peer.ack - 1, 0));
    let reset = Peer { seq: asked.header.ack.0, ..peer };
    rig.send(&under_another_mac(reset.seg(Flags::RST, &[]).frame()));
    assert_eq!(rig.conn(0).end, End::Reset);
    rig.assert_empty();
}

#[test]
fn a_guest_that_left_its_address_to_one_that_says_nothing_is_given_up_on() {
    let mut rig = Rig::new();
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    rig.send(&under_another_mac(echo_frame(GATEWAY, 1, 1, b"hello")));
    rig.pass(secs(15 * 60));
    assert_eq!(rig.conn(0).end, End::Reset);
    rig.assert_empty();
}

#[test]
fn a_handshake_goes_on_at_the_new_mac_address_at_once() {
    let mut rig = Rig::new();
    let mut peer = Peer::new(guest(4000), world(80));
    peer.syn(&mut rig);
    only(rig.stream_ready(0, WRITABLE));
    rig.feed(&under_another_mac(echo_frame(GATEWAY, 1, 1, b"hello")));
    assert_eq!(receivers(&mut rig), [OTHER_MAC; 2], "the echo and the SYN-ACK again");
}

#[test]
fn datagrams_follow_to_the_new_mac_address_before_the_guest_sends_any() {
    let mut rig = Rig::new();
    rig.send(&udp_frame(guest(4000), world(9), b"ask"));
    rig.feed(&under_another_mac(echo_frame(GATEWAY, 1, 1, b"hello")));
    rig.flush();
    rig.sock(0).inbox.push_back((b"answer".to_vec(), world(9).into()));
    let token = rig.sock(0).token;
    rig.engine.host_ready(rig.now, &mut rig.port, token, READABLE);
    assert_eq!(receivers(&mut rig), [OTHER_MAC]);
}

/// A DHCP message of the guest; returns the answer.
pub(crate) fn dhcp(
    rig: &mut Rig,
    from: Ipv4Addr,
    kind: MessageType,
    asked: Option<Ipv4Addr>,
) -> Option<Message> {
    let zero = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(7, from, zero, zero, zero, &GUEST_MAC.0);
    let options = message.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    if kind != MessageType::Discover {
        options.insert(DhcpOption::ServerIdentifier(GATEWAY));
    }
    if let Some(asked) = asked {
        options.insert(DhcpOption::RequestedIpAddress(asked));
    }
    let to = if from == zero { Ipv4Addr::BROADCAST } else { GATEWAY };
    let payload = message.to_vec().expect("it encodes");
    let frame = udp_frame(SocketAddrV4::new(from, 68), SocketAddrV4::new(to, 67), &payload);
    rig.send(&frame).into_iter().find_map(|seen| match seen {
        Seen::Udp { payload, .. } => Message::decode(&mut Decoder::new(&payload)).ok(),
        _ => None,
    })
}

/// The guest takes a lease of [`GUEST_IP`].
pub(crate) fn lease(rig: &mut Rig) {
    let zero = Ipv4Addr::UNSPECIFIED;
    let offer = dhcp(rig, zero, MessageType::Discover, None).expect("an offer");
    assert_eq!(offer.yiaddr(), GUEST_IP);
    dhcp(rig, zero, MessageType::Request, Some(offer.yiaddr())).expect("an acknowledgement");
}

#[test]
fn an_address_given_back_takes_its_flows_along_and_no_others() {
    let mut rig = Rig::new();
    lease(&mut rig);
    connected(&mut rig, Peer::new(guest(4000), world(80)));
    let other = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 77), 4000);
    connected(&mut rig, Peer::new(other, world(80)));
    rig.send(&udp_frame(guest(4000), world(9), b"ask"));
    assert!(dhcp(&mut rig, GUEST_IP, MessageType::Release, None).is_none(), "a release is not answered");
    assert_eq!(rig.conn(0).end, End::Reset);
    assert_eq!(rig.conn(1).end, End::Open);
    assert_eq!(rig.world().open(), 1, "the datagram socket is closed too");
    assert_eq!(rig.dropped(DropReason::ServiceSilent), 0);
}

#[test]
fn an_address_given_back_is_forgotten_by_every_worker() {
    let mut rigs = Rig::workers(2);
    lease(&mut rigs[0]);
    let peer = Peer::new(guest(4000), world(80));
    rigs[1].feed_on(QueuePair(1), VnetHeader::default(), &peer.seg(Flags::SYN, &[]).frame());
    assert_eq!(rigs[1].engine.nat().len(), 1);
    dhcp(&mut rigs[0], GUEST_IP, MessageType::Release, None);
    while let Some((to, letter)) = rigs[0].engine.next_letter() {
        let rig = &mut rigs[usize::from(to.0)];
        rig.engine.letter(rig.now, &mut rig.port, letter);
    }
    assert!(rigs[1].engine.nat().is_empty());
}
