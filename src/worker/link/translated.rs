//! A link on which the guest is not a station itself but hidden behind one of ours: its packets are translated
//! to that station's address, and what comes for them back.
//!
//! What is for the gateway's services is the engine's. All else of the guest passes `engine::packet`, which
//! changes the judged copy of its first bytes; the payload leaves from guest memory, and comes to it, as on any
//! link.
//!
//! May touch: `engine::packet`, `engine::station` through [`super::outside`], the engine for the guest's side.

use std::net::Ipv4Addr;

use hashbrown::HashMap;

use super::outside::{Outside, Way};
use super::{Left, LinkEnd};
use crate::addr::{Ipv4Subnet, MacAddr};
use crate::engine::Engine;
use crate::engine::core::Neighbour;
use crate::engine::counters::DropReason;
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::HostNet;
use crate::engine::lan;
use crate::engine::packet::{Packet, PacketNat, Verdict};
use crate::frame::{Payload, TxFrame};
use crate::limits::{FRAME_HEAD_BYTES, NEIGHBOURS_MAX};
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::icmpv4::{Message, UnreachableCode};
use crate::wire::ipv4;
use crate::wire::vnet::VnetHeader;

/// Where source and destination stand in a frame with an IPv4 packet.
const SRC_AT: usize = ethernet::HEADER_BYTES + 12;
const DST_AT: usize = ethernet::HEADER_BYTES + 16;

/// What a worker's translation is made of.
#[derive(Debug)]
pub struct TranslationParts {
    /// The worker's flows.
    pub nat: PacketNat,
    /// The station of all workers.
    pub station: std::sync::Arc<super::outside::SharedStation>,
    /// The guest's network.
    pub guests: Ipv4Subnet,
    /// Whether this worker does what is due of the station.
    pub is_first: bool,
}

/// Translation on one worker.
#[derive(Debug)]
pub(super) struct Translation {
    nat: PacketNat,
    outside: Outside,
    subnet: Ipv4Subnet,
    /// Where addresses of the guest are.
    guests: HashMap<Ipv4Addr, MacAddr, foldhash::quality::RandomState>,
    newest: (Ipv4Addr, MacAddr),
    /// An address of the guest's that something came for and that is not known.
    unknown: Option<Ipv4Addr>,
    head: Box<[u8; FRAME_HEAD_BYTES]>,
}

/// What became of a frame of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    /// Translated, and the guest's.
    ForGuest,
    /// Our station's own.
    Taken,
}

impl Translation {
    pub(super) fn new(parts: TranslationParts) -> Translation {
        Translation {
            nat: parts.nat,
            outside: Outside::new(parts.station, parts.is_first),
            subnet: parts.guests,
            guests: HashMap::default(),
            newest: (Ipv4Addr::UNSPECIFIED, MacAddr::ZERO),
            unknown: None,
            head: Box::new([0; FRAME_HEAD_BYTES]),
        }
    }

    /// The guest is gone or began anew.
    pub(super) fn forget_guest(&mut self) {
        self.nat.forget_guest();
        self.guests.clear();
        self.newest = (Ipv4Addr::UNSPECIFIED, MacAddr::ZERO);
    }

    /// Whether an answer of DHCP may come, of which all is to be read.
    pub(super) fn awaits_dhcp(&self) -> bool {
        self.outside.awaits_dhcp()
    }

    fn learn(&mut self, addr: Ipv4Addr, mac: MacAddr) {
        if self.newest == (addr, mac) {
            return;
        }
        self.newest = (addr, mac);
        if self.guests.len() >= NEIGHBOURS_MAX && !self.guests.contains_key(&addr) {
            self.guests.clear();
        }
        self.guests.insert(addr, mac);
    }

    fn guest_mac(&self, addr: Ipv4Addr) -> Option<MacAddr> {
        if self.newest.0 == addr { Some(self.newest.1) } else { self.guests.get(&addr).copied() }
    }

    /// Takes a frame of the link whose first bytes are `head`.
    pub(super) fn arrived(
        &mut self,
        now: Instant,
        vnet: &VnetHeader,
        head: &mut [u8],
        len_bytes: usize,
    ) -> Result<Arrived, DropReason> {
        let header = ethernet::Header::parse(head).map_err(|_| DropReason::Malformed)?;
        if header.dst != self.outside.mac() && !header.dst.is_multicast() {
            return Err(DropReason::NotForUs);
        }
        if Outside::may_be_for_station(head) && self.outside.receive(now, head) {
            return Ok(Arrived::Taken);
        }
        if header.ethertype != EtherType::IPV4 || header.dst.is_multicast() {
            return Err(DropReason::NotForUs);
        }
        let Translation { nat, outside, .. } = self;
        outside.address(|addr| nat.set_outside(addr));
        match nat.from_world(now, &mut Packet { vnet, head, len_bytes }) {
            Verdict::Forward => {}
            Verdict::Drop(reason) => return Err(reason),
            other => unreachable!("{other:?}"),
        }
        let guest = addr_at(head, DST_AT);
        let Some(dst) = self.guest_mac(guest) else {
            self.unknown = Some(guest);
            return Err(DropReason::NoFlow);
        };
        ethernet::Header { dst, src: MacAddr::GATEWAY, ethertype: EtherType::IPV4 }.emit(head);
        Ok(Arrived::ForGuest)
    }
}

impl LinkEnd {
    /// Whether a frame of the guest is for the engine and not to be translated: ARP, and whatever is addressed
    /// within the guest's own network.
    pub(super) fn stays(&self, head: &[u8]) -> bool {
        let Some(translation) = &self.translation else { return false };
        let Ok(header) = ethernet::Header::parse(head) else { return true };
        if header.ethertype != EtherType::IPV4 || head.len() < ethernet::HEADER_BYTES + ipv4::HEADER_BYTES {
            return true;
        }
        let (src, dst) = (addr_at(head, SRC_AT), addr_at(head, DST_AT));
        header.dst.is_multicast()
            || src.is_unspecified()
            || dst.is_broadcast()
            || dst.is_multicast()
            || translation.subnet.contains(dst)
    }

    /// Translates and sends one frame of the guest, for which [`LinkEnd::stays`] does not hold.
    pub(in crate::worker) fn forward_translated<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &TxFrame<'_>,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Left {
        match self.translate(now, frame, engine, port) {
            Ok(Left::Full) => return Left::Full,
            Ok(Left::Yes) => {
                self.counters.frames_from_guest += 1;
                self.counters.payload_from_guest_bytes += frame.whole.len() as u64;
            }
            Err(reason) => self.counters.drop(reason),
        }
        Left::Yes
    }

    fn translate<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &TxFrame<'_>,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<Left, DropReason> {
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let header = ethernet::Header::parse(frame.head).map_err(|_| DropReason::Malformed)?;
        if header.dst != MacAddr::GATEWAY {
            return Err(DropReason::NotForUs);
        }
        let (guest, dst) = (addr_at(frame.head, SRC_AT), addr_at(frame.head, DST_AT));
        let from = Neighbour { mac: header.src, pair: frame.pair };
        if !engine.saw_guest(now, guest, from) {
            return Err(DropReason::SpoofedSource);
        }
        translation.learn(guest, header.src);
        let Translation { nat, outside, .. } = translation;
        let held = outside.address(|addr| nat.set_outside(addr));
        let is_hairpin = held.is_some_and(|held| held.addr == dst);
        let way = if is_hairpin { None } else { Some(outside.way(now, dst)) };
        if let Some(Way::None | Way::NoAddress) = way {
            let code = if held.is_some() { UnreachableCode::Host } else { UnreachableCode::Net };
            let message = Message::Unreachable { code, next_hop_mtu: 0 };
            engine.tell_guest(now, port, from, message, &frame.head[ethernet::HEADER_BYTES..]);
            return Err(DropReason::Refused);
        }
        let head = &mut translation.head[..frame.head.len()];
        head.copy_from_slice(frame.head);
        let len_bytes = frame.whole.len();
        let verdict = nat.from_guest(now, &mut Packet { vnet: &frame.vnet, head, len_bytes });
        match (verdict, way) {
            (Verdict::Forward, Some(way)) => self.leave(frame, way),
            (Verdict::Hairpin, _) => self.turn_back(now, frame, engine, port),
            (Verdict::Refuse(message), _) => {
                engine.tell_guest(now, port, from, message, &frame.head[ethernet::HEADER_BYTES..]);
                Err(DropReason::Refused)
            }
            (Verdict::Drop(reason), _) => Err(reason),
            (Verdict::Forward, None) => Err(DropReason::Refused),
        }
    }

    /// Sends the translated frame, or keeps it until its next hop is known.
    fn leave(&mut self, frame: &TxFrame<'_>, way: Way) -> Result<Left, DropReason> {
        lan::check_length(&frame.vnet, frame.whole.len(), self.ip_mtu)?;
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let src = translation.outside.mac();
        let mut head = *translation.head;
        let head = &mut head[..frame.head.len()];
        match way {
            Way::To(dst) => {
                ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(head);
                let rest = frame.whole.range(frame.head.len(), frame.whole.len());
                self.send(frame.vnet, head, &rest)
            }
            Way::Wait(target) => {
                let whole = whole_frame(frame, head);
                if translation.outside.park(target, frame.vnet, whole) {
                    Ok(Left::Yes)
                } else {
                    Err(DropReason::TableFull)
                }
            }
            Way::None | Way::NoAddress => Err(DropReason::Refused),
        }
    }

    /// Gives the guest a frame that it sent to itself through our address.
    fn turn_back<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &TxFrame<'_>,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<Left, DropReason> {
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let mut whole = whole_frame(frame, &translation.head[..frame.head.len()]);
        let Some(dst) = translation.guest_mac(addr_at(&whole, DST_AT)) else {
            return Err(DropReason::NoFlow);
        };
        lan::check_offloads(&frame.vnet, port.offloads())?;
        ethernet::Header { dst, src: MacAddr::GATEWAY, ethertype: EtherType::IPV4 }.emit(&mut whole);
        engine.send_to_guest(now, port, frame.pair, frame.vnet, &whole);
        Ok(Left::Yes)
    }

    /// Does what is due of translation and its station, and sends what waits. To be called once a batch.
    pub(in crate::worker) fn run_translation<N: HostNet>(
        &mut self,
        now: Instant,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) {
        let Some(translation) = &mut self.translation else { return };
        translation.nat.set_published_guest(engine.published_guest());
        if let Some(addr) = translation.unknown.take() {
            match engine.guest_at(addr) {
                Some(neighbour) => translation.learn(addr, neighbour.mac),
                None => engine.ask_for_guest(now, port, addr),
            }
        }
        translation.nat.tick(now);
        translation.outside.poll(now);
        self.send_station_frames();
        self.send_parked(now);
    }

    /// When [`LinkEnd::run_translation`] has something to do.
    pub(in crate::worker) fn next_deadline(&self) -> Option<Instant> {
        let translation = self.translation.as_ref()?;
        [translation.nat.next_deadline(), translation.outside.deadline()].into_iter().flatten().min()
    }

    /// The end: a leased address is given back.
    pub(in crate::worker) fn leave_link(&mut self) {
        if let Some(translation) = &mut self.translation {
            translation.outside.release();
            self.send_station_frames();
        }
    }

    fn send_station_frames(&mut self) {
        while let Some(frame) = self.translation.as_mut().and_then(|t| t.outside.next_frame()) {
            // One that is lost is sent again, or was an answer to who asks again.
            let _ = self.send(VnetHeader::default(), &frame, &Payload::EMPTY);
        }
    }

    fn send_parked(&mut self, now: Instant) {
        let Some(translation) = &mut self.translation else { return };
        if !translation.outside.has_parked() {
            return;
        }
        let Translation { nat, outside, .. } = translation;
        outside.address(|addr| nat.set_outside(addr));
        let src = outside.mac();
        let mut ready = Vec::new();
        outside.unpark(now, |dst, parked| {
            ready.push((dst, parked.vnet, std::mem::take(&mut parked.frame)));
        });
        for (dst, vnet, mut frame) in ready {
            let sent = match dst {
                None => Err(DropReason::Refused),
                Some(dst) => {
                    ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(&mut frame);
                    self.send(vnet, &frame, &Payload::EMPTY)
                }
            };
            match sent {
                Ok(Left::Yes) => {}
                Ok(Left::Full) => self.counters.drop(DropReason::LinkRefused),
                Err(reason) => self.counters.drop(reason),
            }
        }
    }
}

/// The whole of a frame in host memory, with `head` in place of its first bytes.
fn whole_frame(frame: &TxFrame<'_>, head: &[u8]) -> Box<[u8]> {
    let mut whole = vec![0; frame.whole.len()];
    frame.whole.copy_to(&mut whole);
    whole[..head.len()].copy_from_slice(head);
    whole.into()
}

/// The address at `at`; the caller saw to it that it is there.
fn addr_at(head: &[u8], at: usize) -> Ipv4Addr {
    Ipv4Addr::new(head[at], head[at + 1], head[at + 2], head[at + 3])
}
