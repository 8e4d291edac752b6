//! Translation changes exactly what it must, to the bit: each case is compared with a frame built anew.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use vunet::engine::packet::flow::ChecksumDeltas;
use vunet::engine::packet::head::{Packet, View};
use vunet::engine::packet::icmp::{Quote, translate_quote};
use vunet::engine::packet::rewrite::{End, NewEnd, take_hop, translate};
use vunet::wire::checksum::Accumulator;
use vunet::wire::ipv4::{self, Protocol};
use vunet::wire::tcp::{self, Flags, SeqNumber};
use vunet::wire::vnet::{Checksum, Gso, GsoKind, VnetHeader};

use crate::config;
use crate::packets::{self, Body, Frame, IP_AT, TRANSPORT_AT, word};

/// An address and a port.
type Pair = (Ipv4Addr, u16);

fn pair() -> impl Strategy<Value = Pair> {
    let edge_addrs =
        prop_oneof![Just(0u32), Just(u32::MAX), Just(0x0000_ffff), Just(0xffff_0000), any::<u32>()];
    let edge_ports = prop_oneof![Just(0u16), Just(u16::MAX), any::<u16>()];
    (edge_addrs.prop_map(Ipv4Addr::from_bits), edge_ports)
}

fn body() -> impl Strategy<Value = Body> {
    let tcp = (any::<[u32; 2]>(), any::<u8>(), any::<u16>(), any::<bool>()).prop_map(
        |([seq, ack], flags, window, timestamps)| {
            let options = tcp::Options { timestamps: timestamps.then_some((1, 2)), ..Default::default() };
            let (seq, ack, flags) = (SeqNumber(seq), SeqNumber(ack), Flags(flags));
            Body::Tcp(tcp::Header { seq, ack, flags, window, options, ..Default::default() })
        },
    );
    let query = (prop_oneof![Just(0u8), Just(8), Just(13), Just(14)], any::<u16>());
    prop_oneof![
        3 => tcp,
        2 => any::<bool>().prop_map(|summed| Body::Udp { summed }),
        2 => query.prop_map(|(kind, seq)| Body::Query { kind, seq }),
        1 => Just(Body::Summed(Protocol(33))),
        1 => Just(Body::Summed(Protocol(136))),
        1 => Just(Body::Plain(Protocol(47))),
    ]
}

prop_compose! {
    fn frame()(
        src in pair(),
        dst in pair(),
        ttl in 1u8..,
        ident in any::<u16>(),
        body in body(),
        payload in proptest::collection::vec(any::<u8>(), 2..64),
    ) -> Frame {
        Frame { src, dst, ttl, ident, dont_fragment: false, body, payload }.with_one_ident()
    }
}

/// Which checksum is to lie at an edge.
#[derive(Clone, Copy, Debug)]
enum Edge {
    None,
    /// The payload makes it zero before the translation.
    ZeroBefore,
    /// After it.
    ZeroAfter,
}

fn edge() -> impl Strategy<Value = Edge> {
    prop_oneof![Just(Edge::None), Just(Edge::ZeroBefore), Just(Edge::ZeroAfter)]
}

impl Frame {
    /// An identifier stands once in its message.
    fn with_one_ident(mut self) -> Frame {
        if matches!(self.body, Body::Query { .. }) {
            self.dst.1 = self.src.1;
        }
        self
    }

    /// With `end` in the place of one end, one hop further.
    fn translated(&self, end: End, to: Pair) -> Frame {
        let mut frame = Frame { ttl: self.ttl - 1, ..self.clone() };
        match end {
            End::Source => frame.src = to,
            End::Destination => frame.dst = to,
        }
        if matches!(frame.body, Body::Query { .. }) {
            (frame.src.1, frame.dst.1) = (to.1, to.1);
        }
        frame
    }

    fn end(&self, end: End) -> Pair {
        if end == End::Source { self.src } else { self.dst }
    }

    /// The first word of payload that makes the checksum zero: what the checksum is over a word of zero.
    fn zeroing_word(&self) -> Option<u16> {
        let mut blank = self.clone();
        blank.payload[..2].fill(0);
        let at = TRANSPORT_AT + blank.checksum_offset()?;
        Some(word(&blank.build(), at))
    }
}

/// What changes `frame`'s `end` to `to`.
fn change(frame: &Frame, end: End, to: Pair) -> NewEnd {
    NewEnd { end, addr: to.0, port: to.1, deltas: ChecksumDeltas::between(frame.end(end), to) }
}

fn apply(vnet: &VnetHeader, bytes: &mut [u8], new: &NewEnd) {
    let len_bytes = bytes.len();
    let view = View::read(&Packet::new(vnet, bytes, len_bytes)).expect("a frame that can be translated");
    translate(bytes, &view, new);
    take_hop(bytes);
}

fn any_end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Source), Just(End::Destination)]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_changed_frame_is_the_frame_built_anew(
        frame in frame(), end in any_end(), to in pair(), edge in edge(),
    ) {
        let mut frame = frame;
        let zeroing = match edge {
            Edge::None => None,
            Edge::ZeroBefore => frame.zeroing_word(),
            Edge::ZeroAfter => frame.translated(end, to).zeroing_word(),
        };
        if let Some(zeroing) = zeroing {
            frame.payload[..2].copy_from_slice(&zeroing.to_be_bytes());
        }
        let mut bytes = frame.build();
        apply(&VnetHeader::default(), &mut bytes, &change(&frame, end, to));
        prop_assert_eq!(bytes, frame.translated(end, to).build());
    }

    #[test]
    fn the_way_back_undoes_it(frame in frame(), end in any_end(), to in pair()) {
        let original = frame.build();
        let mut bytes = original.clone();
        let new = change(&frame, end, to);
        let vnet = VnetHeader::default();
        let view = View::read(&Packet::new(&vnet, &mut bytes, original.len())).unwrap();
        translate(&mut bytes, &view, &new);
        let (addr, port) = frame.end(end);
        translate(&mut bytes, &view, &NewEnd { end, addr, port, deltas: new.deltas.inverse() });
        prop_assert_eq!(bytes, original);
    }

    #[test]
    fn a_partial_checksum_stays_partial_and_right(frame in frame(), end in any_end(), to in pair()) {
        if matches!(frame.body, Body::Query { .. } | Body::Plain(_)) {
            return Ok(());
        }
        let (vnet, mut bytes) = frame.build_partial();
        apply(&vnet, &mut bytes, &change(&frame, end, to));
        prop_assert_eq!(bytes, frame.translated(end, to).build_partial().1);
    }

    #[test]
    fn a_frame_to_be_cut_comes_to_the_same_as_its_segments(
        frame in frame(), end in any_end(), to in pair(), size in 1u16..40, more in 1usize..200,
    ) {
        let mut frame = frame;
        let kind = match frame.body {
            Body::Tcp(_) => GsoKind::Tcp4,
            Body::Udp { .. } => GsoKind::UdpL4,
            _ => return Ok(()),
        };
        frame.body = if let Body::Udp { .. } = frame.body { Body::Udp { summed: true } } else { frame.body };
        frame.payload.extend((0..more).map(|n| n as u8));
        let (vnet, bytes) = frame.build_partial();
        let gso = Some(Gso { kind, size_bytes: size, headers_bytes: 54, ecn: false });
        let vnet = VnetHeader { gso, ..vnet };
        let new = change(&frame, end, to);
        let mut whole = bytes.clone();
        apply(&vnet, &mut whole, &new);
        let segments = cut(&bytes, usize::from(size)).into_iter().map(|mut segment| {
            apply(&VnetHeader::default(), &mut segment, &new);
            segment
        });
        prop_assert_eq!(cut(&whole, usize::from(size)), segments.collect::<Vec<_>>());
    }

    #[test]
    fn an_errors_quote_becomes_what_its_sender_sent(
        frame in frame(), end in any_end(), to in pair(), router in pair(), host in pair(), new_host in pair(),
        quoted in 28usize..200, kind in prop_oneof![Just(3u8), Just(11), Just(12)],
    ) {
        // Of half a checksum nobody can say what it was.
        let cuts_checksum = frame.checksum_offset().is_some_and(|at| quoted == ipv4::HEADER_BYTES + at + 1);
        let quoted = quoted + usize::from(cuts_checksum);
        let passed = frame.translated(end, to);
        let sent = Frame { ttl: passed.ttl, ..frame.clone() };
        let mut bytes = packets::error((kind, 1), router.0, host.0, &passed.build(), quoted);
        let vnet = VnetHeader::default();
        let len_bytes = bytes.len();
        let view = View::read(&Packet::new(&vnet, &mut bytes, len_bytes)).unwrap();
        let quote = Quote::read(&bytes, &view).unwrap();
        let (addr, port) = frame.end(end);
        let deltas = change(&frame, end, to).deltas.inverse();
        translate_quote(&mut bytes, &view, &quote, &NewEnd { end, addr, port, deltas });
        let deltas = ChecksumDeltas::between((host.0, 0), (new_host.0, 0));
        translate(&mut bytes, &view, &NewEnd { end: End::Destination, addr: new_host.0, port: 0, deltas });
        prop_assert_eq!(bytes, packets::error((kind, 1), router.0, new_host.0, &sent.build(), quoted));
    }

    #[test]
    fn no_bytes_whatever_make_reading_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..160), claimed in 0usize..2000, version in any::<bool>(),
    ) {
        let mut bytes = bytes;
        if version && bytes.len() >= TRANSPORT_AT {
            // Past the checks that random bytes fail.
            bytes[12..14].copy_from_slice(&[8, 0]);
            bytes[IP_AT] = 0x45;
            bytes[IP_AT + 6] &= 0x20;
            bytes[IP_AT + 9] = [1, 6, 17, 47][usize::from(bytes[IP_AT + 9] % 4)];
            let total = (bytes.len() - IP_AT) as u8;
            bytes[IP_AT + 2..IP_AT + 4].copy_from_slice(&[0, total]);
            bytes[IP_AT + 10..IP_AT + 12].fill(0);
            let mut sum = Accumulator::new();
            sum.add_bytes(&bytes[IP_AT..TRANSPORT_AT]);
            bytes[IP_AT + 10..IP_AT + 12].copy_from_slice(&sum.finish().to_be_bytes());
        }
        let (vnet, len_bytes) = (VnetHeader::default(), claimed.max(bytes.len()));
        if let Ok(view) = View::read(&Packet::new(&vnet, &mut bytes, len_bytes))
            && let Ok(quote) = Quote::read(&bytes, &view)
        {
            let to = (Ipv4Addr::LOCALHOST, 1);
            let deltas = ChecksumDeltas::between((quote.src, 0), to);
            translate_quote(&mut bytes, &view, &quote, &NewEnd { end: End::Source, addr: to.0, port: 1, deltas });
        }
    }
}

/// Cuts a frame as a device does: by its headers and the sum in its checksum field, not by its meaning.
fn cut(bytes: &[u8], size: usize) -> Vec<Vec<u8>> {
    let is_tcp = bytes[IP_AT + 9] == 6;
    let (header_bytes, checksum_at) =
        if is_tcp { (usize::from(bytes[TRANSPORT_AT + 12] >> 4) * 4, 16) } else { (8, 6) };
    let (headers, payload) = bytes.split_at(TRANSPORT_AT + header_bytes);
    let count = payload.chunks(size).count();
    let whole_bytes = bytes.len() - TRANSPORT_AT;
    let one = |(n, piece): (usize, &[u8])| {
        let mut out = [headers, piece].concat();
        let transport_bytes = out.len() - TRANSPORT_AT;
        let put =
            |out: &mut [u8], at: usize, value: u16| out[at..at + 2].copy_from_slice(&value.to_be_bytes());
        let total = (out.len() - IP_AT) as u16;
        put(&mut out, IP_AT + 2, total);
        put(&mut out, IP_AT + 4, word(headers, IP_AT + 4).wrapping_add(n as u16));
        put(&mut out, IP_AT + 10, 0);
        let mut sum = Accumulator::new();
        sum.add_bytes(&out[IP_AT..TRANSPORT_AT]);
        put(&mut out, IP_AT + 10, sum.finish());
        if is_tcp {
            let seq = u32::from_be_bytes(out[TRANSPORT_AT + 4..TRANSPORT_AT + 8].try_into().unwrap());
            let seq = seq.wrapping_add((n * size) as u32);
            out[TRANSPORT_AT + 4..TRANSPORT_AT + 8].copy_from_slice(&seq.to_be_bytes());
            if n + 1 < count {
                out[TRANSPORT_AT + 13] &= !9;
            }
        } else {
            put(&mut out, TRANSPORT_AT + 4, transport_bytes as u16);
        }
        // The field holds the pseudo-header's sum with the whole's length.
        let pseudo = word(headers, TRANSPORT_AT + checksum_at);
        put(&mut out, TRANSPORT_AT + checksum_at, 0);
        let mut sum = Accumulator::new();
        sum.add_u16(pseudo);
        sum.add_u16(!(whole_bytes as u16));
        sum.add_u16(transport_bytes as u16);
        sum.add_bytes(&out[TRANSPORT_AT..]);
        let value = sum.finish();
        put(&mut out, TRANSPORT_AT + checksum_at, if is_tcp || value != 0 { value } else { 0xffff });
        out
    };
    payload.chunks(size).enumerate().map(one).collect()
}

#[test]
fn a_checksum_to_be_completed_elsewhere_is_refused() {
    let frame = Frame::udp((Ipv4Addr::new(10, 0, 2, 2), 5), (Ipv4Addr::new(192, 0, 2, 1), 6), b"abcd");
    let read = |checksum, mut bytes: Vec<u8>| {
        let (vnet, len_bytes) = (VnetHeader { checksum, ..VnetHeader::default() }, bytes.len());
        View::read(&Packet::new(&vnet, &mut bytes, len_bytes)).map(|view| view.partial)
    };
    let (vnet, bytes) = frame.build_partial();
    assert_eq!(read(vnet.checksum, bytes.clone()), Ok(true));
    for (start, offset) in [(14, 10), (34, 16), (34, 4), (35, 6), (0, 0), (u16::MAX, u16::MAX)] {
        let refused = read(Checksum::Partial { start, offset }, bytes.clone());
        assert!(refused.is_err(), "{start} {offset}");
    }
    let fragment = frame.fragments(8).remove(0);
    assert!(read(vnet.checksum, fragment).is_err(), "a fragment's checksum cannot be partial");
}

#[test]
fn fragments_that_could_hide_a_header_are_refused() {
    let ends = ((Ipv4Addr::new(10, 0, 2, 2), 5), (Ipv4Addr::new(192, 0, 2, 1), 6));
    let mut frame = Frame::tcp(ends.0, ends.1, Flags::ACK, 1, 1);
    frame.payload = vec![0; 40];
    let read = |bytes: &mut Vec<u8>| {
        let (vnet, len_bytes) = (VnetHeader::default(), bytes.len());
        View::read(&Packet::new(&vnet, bytes, len_bytes)).map(|view| view.transport)
    };
    // RFC 1858: a first fragment without all of the header, and one that would overwrite its flags.
    for piece in &mut frame.fragments(8)[..3] {
        assert!(read(piece).is_err());
    }
    let mut whole = frame.fragments(24);
    assert!(read(&mut whole[0]).is_ok() && read(&mut whole[1]).is_ok());
}
