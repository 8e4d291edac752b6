//! Frames of the link that are read before the first of them is judged.
//!
//! A translation of many flows waits for memory with each frame, and for those of sixteen frames hardly longer than for
//! one's. So while frames are short, some are read into host memory, their flows are fetched together, and each
//! goes on from there. Long ones are read where they belong, in the guest's buffers: copying them would cost more.
//!
//! May touch: as `link.rs`.

use std::io;

use super::{Got, LinkEnd, Step};
use crate::engine::counters::DropReason;
use crate::engine::guest_port::GuestPort;
use crate::engine::lan::vlan;
use crate::engine::packet::Side;
use crate::frame::{PayloadMut, QueuePair};
use crate::limits::{FRAME_BYTES_MAX, FRAME_HEAD_BYTES, LINK_AHEAD_FRAME_BYTES, PACKET_AHEAD_FRAMES};
use crate::time::Instant;
use crate::wire::vnet::VNET_HEADER_BYTES;

/// Bytes of a frame and its tag that lie in its own place.
const PLACE_BYTES: usize = LINK_AHEAD_FRAME_BYTES + vlan::TAG_BYTES;

#[derive(Clone, Debug)]
struct Place {
    header: [u8; VNET_HEADER_BYTES],
    bytes: [u8; PLACE_BYTES],
    len_bytes: usize,
}

const EMPTY: Place = Place { header: [0; VNET_HEADER_BYTES], bytes: [0; PLACE_BYTES], len_bytes: 0 };

/// Frames that were read and not judged, and whether more should be.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Made when they are first needed.
    places: Vec<Place>,
    /// What of the last frame lies beyond its place.
    beyond: Vec<u8>,
    next: usize,
    count: usize,
    /// The last frame was a short one.
    frames_are_short: bool,
}

impl Ahead {
    /// Whether any frame waits here.
    pub(super) fn has_frames(&self) -> bool {
        self.next < self.count
    }

    /// Notes how long a frame of the link was.
    pub(super) fn note(&mut self, len_bytes: usize) {
        self.frames_are_short = len_bytes <= LINK_AHEAD_FRAME_BYTES;
    }

    /// Forgets the frames; says how many there were.
    pub(super) fn forget(&mut self) -> u64 {
        let lost = self.count - self.next;
        (self.next, self.count) = (0, 0);
        lost as u64
    }

    fn make_room(&mut self) {
        if self.places.is_empty() {
            self.places = vec![EMPTY; PACKET_AHEAD_FRAMES];
            // One byte too many is as much as is to be known of a frame that is too long.
            self.beyond = vec![0; FRAME_BYTES_MAX + 1 - LINK_AHEAD_FRAME_BYTES];
        }
    }
}

impl LinkEnd {
    /// How many frames are worth being looked at before the first is moved.
    pub(in crate::worker) fn frames_ahead(&self) -> usize {
        self.translation.as_ref().map_or(1, |translation| translation.frames_ahead())
    }

    /// Frames of the guest that begin with `heads` are moved next.
    pub(in crate::worker) fn expect_from_guest<'a>(&self, heads: impl Iterator<Item = &'a [u8]>) {
        if let Some(translation) = &self.translation {
            translation.expect(Side::Guest, heads);
        }
    }

    /// Reads frames ahead if that is worth it, no more than the guest seems to have buffers for. Whether any wait.
    pub(super) fn look_ahead(&mut self, port: &impl GuestPort, pair: QueuePair) -> bool {
        if self.ahead.has_frames() {
            return true;
        }
        let most = self.frames_ahead().min(port.buffers(pair));
        if most < 2 || !self.ahead.frames_are_short || !self.readable {
            return false;
        }
        let tag_bytes = self.tag_bytes();
        let ahead = &mut self.ahead;
        ahead.make_room();
        (ahead.next, ahead.count) = (0, 0);
        while ahead.count < most {
            let Place { header, bytes, len_bytes } = &mut ahead.places[ahead.count];
            let nothing = PayloadMut::from_host(&mut []);
            let queue = &self.parts.queue;
            match queue.receive(&mut self.segments, header, bytes, nothing, &mut ahead.beyond) {
                Ok((len, _)) => *len_bytes = len,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    self.counters.drop(DropReason::Malformed);
                    break;
                }
                // Met again once those before it are moved.
                Err(_) => break,
            }
            ahead.count += 1;
            if ahead.places[ahead.count - 1].len_bytes > PLACE_BYTES {
                break;
            }
        }
        if let Some(translation) = &self.translation {
            let head = |place: &Place| {
                let head_bytes = place.len_bytes.min(FRAME_HEAD_BYTES);
                tag_bytes.min(head_bytes)..head_bytes
            };
            let heads = self.ahead.places[..self.ahead.count].iter().map(|place| &place.bytes[head(place)]);
            translation.expect(Side::World, heads);
        }
        self.ahead.has_frames()
    }

    /// Moves the next frame that was read ahead.
    pub(super) fn deliver_ahead(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
    ) -> Result<Step, DropReason> {
        let behind = self.head_bytes(now);
        let most_in_head = behind + self.tag_bytes();
        let ahead = &mut self.ahead;
        let Some(place) = ahead.places[..ahead.count].get(ahead.next) else { return Ok(Step::Moved(0)) };
        ahead.next += 1;
        let (header, len_bytes) = (place.header, place.len_bytes);
        let here = &place.bytes[..len_bytes.min(PLACE_BYTES)];
        let beyond = &ahead.beyond[..len_bytes - here.len()];
        let (in_head, in_spare) = here.split_at(here.len().min(most_in_head));
        self.head[..in_head.len()].copy_from_slice(in_head);
        // What is left of a head that is longer than a place lies beyond it.
        let (more_head, beyond) = beyond.split_at(beyond.len().min(most_in_head - in_head.len()));
        self.head[in_head.len()..in_head.len() + more_head.len()].copy_from_slice(more_head);
        self.spare[..in_spare.len()].copy_from_slice(in_spare);
        self.spare[in_spare.len()..in_spare.len() + beyond.len()].copy_from_slice(beyond);
        self.take(now, port, pair, Got { header, len_bytes, behind, reserved_bytes: 0, offered: 0 })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::unix::net::UnixDatagram;
    use std::sync::{Arc, Mutex};

    use super::super::tests::{Port, TSO};
    use super::super::{LinkParts, SharedStation, TranslationParts};
    use super::*;
    use crate::addr::MacAddr;
    use crate::config::{IpMtu, LinkAddress, StationAddress};
    use crate::engine::packet::config::PacketNatConfig;
    use crate::engine::packet::head::Packet;
    use crate::engine::packet::ports::Mappings;
    use crate::engine::packet::{PacketNat, Verdict};
    use crate::engine::placement::WorkerId;
    use crate::engine::station::{Station, StationConfig};
    use crate::limits::PACKET_AHEAD_FLOWS_MIN;
    use crate::rate_limit::RateLimits;
    use crate::uplink::sys::tap::TapQueue;
    use crate::wire::ethernet::{self, EtherType};
    use crate::wire::ipv4::{self, Protocol};
    use crate::wire::vnet::VnetHeader;

    const OURS: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const GUEST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
    const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
    const REMOTE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
    const PORTS_FROM: u16 = 50_000;

    fn held() -> LinkAddress {
        let subnet = "192.0.2.0/24".parse().unwrap();
        LinkAddress { addr: Ipv4Addr::new(192, 0, 2, 50), subnet, router: Some(Ipv4Addr::new(192, 0, 2, 1)) }
    }

    /// A datagram of `len` bytes, checksum left out.
    fn frame(src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), len: usize) -> Vec<u8> {
        let mut frame: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
        ethernet::Header { dst: OURS, src: MacAddr([9; 6]), ethertype: EtherType::IPV4 }.emit(&mut frame);
        let header = ipv4::Header {
            src: src.0,
            dst: dst.0,
            protocol: Protocol::UDP,
            ttl: 64,
            tos: 0,
            ident: 1,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset_bytes: 0,
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes: len - 34,
        };
        header.emit(&mut frame[14..]);
        frame[34..36].copy_from_slice(&src.1.to_be_bytes());
        frame[36..38].copy_from_slice(&dst.1.to_be_bytes());
        frame[38..40].copy_from_slice(&((len - 34) as u16).to_be_bytes());
        frame[40..42].fill(0);
        frame
    }

    /// A link behind which the guest has so many flows that frames are read ahead, and its far end.
    fn crowded() -> (LinkEnd, UnixDatagram) {
        let guests = "10.0.2.0/24".parse().unwrap();
        let config = PacketNatConfig {
            outside: Some(held().addr),
            ..PacketNatConfig::new(guests, Ipv4Addr::new(10, 0, 2, 1), (1, 2))
        };
        let mappings = Arc::new(Mutex::new(Mappings::new(config.ports.clone(), (3, 4))));
        let mut nat = PacketNat::new(config, mappings, Instant::ZERO).unwrap();
        for port in PORTS_FROM..PORTS_FROM + PACKET_AHEAD_FLOWS_MIN as u16 {
            let mut first = frame((GUEST, port), (REMOTE, 9), 60);
            let vnet = VnetHeader::default();
            let mut packet = Packet::new(&vnet, &mut first, 60);
            assert_eq!(nat.from_guest(Instant::ZERO, &mut packet), Verdict::Forward);
        }
        let address = StationAddress::Fixed(held());
        let config = StationConfig { mac: OURS, address, guests, seed: 3 };
        let mut station = Station::new(Instant::ZERO, config);
        for at_ms in [0, 200, 400, 600] {
            station.poll(Instant::from_micros(at_ms * 1000));
        }
        assert_eq!(station.held(), Some(held()));
        let station = Arc::new(SharedStation::new(station));
        let publish = Vec::new();
        let translation = TranslationParts { nat, station, guests, worker: WorkerId(0), publish };
        let (near, far) = UnixDatagram::pair().unwrap();
        let parts = LinkParts {
            queue: TapQueue::of_socket(near),
            vlan: None,
            guard: None,
            ip_mtu: IpMtu::DEFAULT,
            gateway: None,
            dhcp: None,
            translation: Some(translation),
            limits: RateLimits::default(),
        };
        let mut end = LinkEnd::new(parts);
        end.translation.as_mut().unwrap().learn(GUEST, GUEST_MAC);
        end.rings_up(Instant::ZERO, TSO);
        (end, far)
    }

    fn comes(far: &UnixDatagram, port: u16, len: usize) {
        let bytes = frame((REMOTE, 9), (held().addr, port), len);
        far.send(&[&VnetHeader::default().emit()[..], &bytes].concat()).unwrap();
    }

    fn deliver(end: &mut LinkEnd, port: &mut Port) -> bool {
        end.is_readable();
        end.deliver(Instant::from_micros(1_000_000), port, QueuePair(0))
    }

    /// Port and length of each frame the guest got, which must be whole.
    fn came(port: &mut Port) -> Vec<(u16, usize)> {
        let read = |(_, bytes): (VnetHeader, Vec<u8>)| {
            let to = u16::from_be_bytes([bytes[36], bytes[37]]);
            let sent = frame((REMOTE, 9), (held().addr, to), bytes.len());
            assert_eq!(bytes[..6], GUEST_MAC.0);
            assert_eq!(bytes[30..34], GUEST.octets());
            assert_eq!(bytes[42..], sent[42..], "{}", bytes.len());
            (to, bytes.len())
        };
        port.came.drain(..).map(read).collect()
    }

    #[test]
    fn frames_of_all_lengths_come_whole_and_in_order_whether_read_ahead_or_not() {
        let (mut end, far) = crowded();
        let mut port = Port::new(1 << 20);
        let lengths = [60, 60, 61, 255, 256, 257, 511, 512, 513, 516, 517, 1514, 60, 61, 1514, 1513, 60, 300];
        let (mut sent, mut ahead) = (Vec::new(), 0);
        for turn in 0..40 {
            for n in 0..turn {
                let (to, len) =
                    (PORTS_FROM + (turn * 40 + n) as u16, lengths[(turn * 7 + n) % lengths.len()]);
                comes(&far, to, len);
                sent.push((to, len));
            }
            assert!(!deliver(&mut end, &mut port), "all is read");
            ahead += usize::from(end.ahead.count > 1);
            assert_eq!(came(&mut port), std::mem::take(&mut sent), "turn {turn}");
            port.buffers_bytes = 1 << 20;
        }
        assert!(ahead > 10, "{ahead} batches were read ahead");
        assert_eq!(end.counters().frames_to_guest, 780);
        assert_eq!(end.counters().dropped_total(), 0);
    }

    #[test]
    fn frames_read_ahead_wait_for_buffers_and_end_with_the_ring() {
        let (mut end, far) = crowded();
        let mut port = Port::new(1 << 20);
        comes(&far, PORTS_FROM, 60);
        deliver(&mut end, &mut port);
        assert_eq!(came(&mut port), [(PORTS_FROM, 60)]);
        for n in 0..30 {
            comes(&far, PORTS_FROM + n, 500);
        }
        end.is_readable();
        assert!(end.look_ahead(&port, QueuePair(0)));
        assert_eq!(end.ahead.count, PACKET_AHEAD_FRAMES);
        port.buffers_bytes = 1600;
        assert!(!deliver(&mut end, &mut port), "no turn is asked for while there are no buffers");
        let got = came(&mut port);
        assert_eq!(got.len(), 3, "{got:?}");
        port.buffers_bytes = 1 << 20;
        end.guest_has_buffers();
        deliver(&mut end, &mut port);
        let wanted: Vec<_> = (0..30).map(|n| (PORTS_FROM + n, 500)).collect();
        assert_eq!([got, came(&mut port)].concat(), wanted);
        for n in 0..30 {
            comes(&far, PORTS_FROM + n, 500);
        }
        end.is_readable();
        assert!(end.look_ahead(&port, QueuePair(0)));
        port.buffers_bytes = 600;
        deliver(&mut end, &mut port);
        end.rings_down(Instant::from_micros(1_000_000));
        assert!(!end.ahead.has_frames());
        let lost = PACKET_AHEAD_FRAMES as u64 - 2;
        assert_eq!(end.counters().dropped(DropReason::GuestNotReceiving), lost, "one came, one was held");
    }

    #[test]
    fn a_frame_too_long_is_known_as_such() {
        let (mut end, far) = crowded();
        let mut port = Port::new(1 << 20);
        comes(&far, PORTS_FROM, 60);
        deliver(&mut end, &mut port);
        comes(&far, PORTS_FROM, 60);
        far.send(&vec![0; VNET_HEADER_BYTES + FRAME_BYTES_MAX + 1]).unwrap();
        far.send(&[0; 5]).unwrap();
        comes(&far, PORTS_FROM, 70);
        deliver(&mut end, &mut port);
        assert_eq!(came(&mut port), [(PORTS_FROM, 60), (PORTS_FROM, 60), (PORTS_FROM, 70)]);
        let counters = end.counters();
        assert_eq!(counters.dropped(DropReason::TooLong), 1);
        assert_eq!(counters.dropped(DropReason::Malformed), 1);
    }
}
