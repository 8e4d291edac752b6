//! Packets cut into fragments: put together again they are the packet.

use proptest::prelude::*;

use vunet::engine::counters::DropReason;
use vunet::engine::packet::cut::cut;
use vunet::wire::checksum::Accumulator;
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::Flags;
use vunet::wire::vnet::{Gso, GsoKind, VnetHeader};

use crate::config;
use crate::packets::{Body, Frame, IP_AT, TRANSPORT_AT, sum_ip, word};
use crate::rig::{GUEST, OTHER, REMOTE};

/// The pieces of a frame.
fn pieces(vnet: &VnetHeader, frame: &[u8], ip_mtu: u16) -> Result<Vec<Vec<u8>>, DropReason> {
    let mut pieces = Vec::new();
    cut(vnet, &mut frame.to_vec(), ip_mtu, |piece| pieces.push(piece.to_vec())).map(|()| pieces)
}

/// The frame with these IP options.
fn with_options(frame: &[u8], options: &[u8]) -> Vec<u8> {
    let mut padded = options.to_vec();
    padded.resize(options.len().next_multiple_of(4), 0);
    let mut out = [&frame[..TRANSPORT_AT], &padded, &frame[TRANSPORT_AT..]].concat();
    out[IP_AT] = 0x40 | ((20 + padded.len()) / 4) as u8;
    let total = (out.len() - IP_AT) as u16;
    out[IP_AT + 2..IP_AT + 4].copy_from_slice(&total.to_be_bytes());
    let header_bytes = 20 + padded.len();
    out[IP_AT + 10..IP_AT + 12].fill(0);
    let mut sum = Accumulator::new();
    sum.add_bytes(&out[IP_AT..IP_AT + header_bytes]);
    out[IP_AT + 10..IP_AT + 12].copy_from_slice(&sum.finish().to_be_bytes());
    out
}

#[test]
fn options_that_say_so_go_with_every_fragment_and_others_with_the_first() {
    let frame = Frame::udp((GUEST, 1), (REMOTE, 2), &[7; 100]).build();
    // Record route (not copied), no operation, router alert (copied), end.
    let options = [7, 7, 4, 0, 0, 0, 0, 1, 148, 4, 0, 0];
    let frame = with_options(&frame, &options);
    let cut = pieces(&VnetHeader::default(), &frame, 68).unwrap();
    assert_eq!(cut[0][TRANSPORT_AT..TRANSPORT_AT + 12], options);
    for later in &cut[1..] {
        assert_eq!(later[IP_AT], 0x46);
        assert_eq!(later[TRANSPORT_AT..TRANSPORT_AT + 4], [148, 4, 0, 0]);
    }
}

#[test]
fn what_must_not_be_cut_is_not() {
    let vnet = VnetHeader::default();
    let whole = Frame { dont_fragment: true, ..Frame::udp((GUEST, 1), (REMOTE, 2), &[7; 1600]) };
    assert_eq!(pieces(&vnet, &whole.build(), 1500), Err(DropReason::TooLong));
    let segments = Frame { payload: vec![0; 5000], ..Frame::tcp((GUEST, 1), (REMOTE, 2), Flags::ACK, 1, 1) };
    let (vnet, bytes) = segments.build_partial();
    let gso = Some(Gso { kind: GsoKind::Tcp4, size_bytes: 1460, headers_bytes: 54, ecn: false });
    assert_eq!(pieces(&VnetHeader { gso, ..vnet }, &bytes, 1500), Err(DropReason::TooLong));
    assert_eq!(pieces(&VnetHeader::default(), &bytes[..30], 1500), Err(DropReason::Malformed));
}

fn body() -> impl Strategy<Value = Body> {
    let tcp = Frame::tcp((GUEST, 1), (REMOTE, 2), Flags::ACK, 5, 6).body;
    prop_oneof![
        Just(Body::Udp { summed: true }),
        Just(tcp),
        Just(Body::Query { kind: 8, seq: 1 }),
        Just(Body::Plain(Protocol(47))),
    ]
}

proptest! {
    #![proptest_config(config())]

    /// Any packet, whole or itself a fragment, its checksum complete or partial, cut once or twice.
    #[test]
    fn fragments_put_together_are_the_packet(
        body in body(), payload in proptest::collection::vec(any::<u8>(), 1..4000), ip_mtu in 68u16..1500,
        again in proptest::option::of(68u16..1500), options in any::<bool>(), partial in any::<bool>(),
        part_of in proptest::option::of((1u16..2000, any::<bool>())), padding in 0usize..20,
    ) {
        let mut payload = payload;
        if part_of.is_some_and(|(_, more)| more) {
            // Whole eights, with the header of any of the bodies.
            let header_bytes = if matches!(body, Body::Tcp(_)) { 20 } else { 8 };
            payload.resize(payload.len().next_multiple_of(8) + header_bytes % 8, 0);
        }
        let sent = Frame { ident: 77, payload, body, ..Frame::udp((OTHER, 1), (REMOTE, 2), b"") };
        let partial = partial && !options && part_of.is_none() && matches!(sent.body, Body::Udp { .. } | Body::Tcp(_));
        let complete = sent.build();
        let (vnet, mut frame) = if partial { sent.build_partial() } else { (VnetHeader::default(), complete.clone()) };
        if let Some((offset, more)) = part_of {
            let field = offset | if more { 0x2000 } else { 0 };
            frame[IP_AT + 6..IP_AT + 8].copy_from_slice(&field.to_be_bytes());
            sum_ip(&mut frame);
        }
        if options {
            frame = with_options(&frame, &[148, 4, 0, 0]);
        }
        frame.extend(vec![0xee; padding]);
        let mut cut = pieces(&vnet, &frame, ip_mtu).unwrap();
        if let Some(mtu) = again {
            cut = cut.iter().flat_map(|piece| pieces(&VnetHeader::default(), piece, mtu).unwrap()).collect();
        }
        let most = usize::from(again.map_or(ip_mtu, |mtu| mtu.min(ip_mtu)));
        let (base, more_behind) = part_of.map_or((0, false), |(offset, more)| (usize::from(offset) * 8, more));
        let mut together = Vec::new();
        for (n, piece) in cut.iter().enumerate() {
            let packet = &piece[IP_AT..];
            prop_assert!(packet.len() <= most);
            let ip = ipv4::Header::parse(packet, packet.len()).unwrap();
            prop_assert_eq!((ip.src, ip.dst, ip.ident, ip.ttl), (OTHER, REMOTE, 77, 64));
            prop_assert_eq!(usize::from(ip.fragment_offset_bytes), base + together.len());
            prop_assert_eq!(ip.more_fragments, n + 1 < cut.len() || more_behind);
            prop_assert_eq!(ip.header_bytes, if options { 24 } else { 20 });
            prop_assert_eq!(word(packet, 2) as usize, packet.len());
            together.extend_from_slice(&packet[ip.header_bytes..]);
        }
        prop_assert_eq!(&together[..], &complete[TRANSPORT_AT..], "the transport, its checksum complete");
    }
}
