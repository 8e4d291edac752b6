//! A link on which the guest is not a station itself but hidden behind one of ours: its packets are translated
//! to that station's address, and what comes for them back.
//!
//! What is for the gateway's services is the engine's. All else of the guest passes `engine::packet`, which
//! changes the judged copy of its first bytes; the payload leaves from guest memory, and comes to it, as on any
//! link. A frame whose flow is another worker's is copied and handed to it.
//!
//! May touch: `engine::packet`, the station through [`super::outside`], the engine for the guest's side.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;

use super::outside::{Outside, SharedStation, Way};
use super::{Left, LinkEnd, Step, judge, without_tag};
use crate::addr::{Ipv4Subnet, MacAddr};
use crate::config::{Protocol, Publish};
use crate::engine::Engine;
use crate::engine::core::Neighbour;
use crate::engine::counters::{Counters, DropReason};
use crate::engine::flows::Ended;
use crate::engine::guest_port::{GuestOffloads, GuestPort};
use crate::engine::host_net::HostNet;
use crate::engine::lan::{self, vlan};
use crate::engine::packet::config::PublishedPort;
use crate::engine::packet::cut::cut;
use crate::engine::packet::echo::answer_echo;
use crate::engine::packet::head::Packet;
use crate::engine::packet::ports::WorkerSet;
use crate::engine::packet::resets::Reset;
use crate::engine::packet::{PacketNat, Released, Side, Verdict};
use crate::engine::placement::WorkerId;
use crate::frame::{Payload, PayloadMut, QueuePair, TxFrame};
use crate::limits::{
    FRAME_HEAD_BYTES, LETTERS_MAX, LINK_BATCH_FRAMES, NEIGHBOURS_MAX, PACKET_AHEAD_FRAMES,
    PACKET_RESETS_AT_ONCE, PARKED_FRAMES_MAX, STATION_ECHOES_BURST, STATION_ECHOES_PER_SECOND,
};
use crate::postbox::{LinkFrame, LinkLetter, Room};
use crate::rate::Rate;
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::icmpv4::{Message, UnreachableCode};
use crate::wire::ipv4;
use crate::wire::vnet::{VNET_HEADER_BYTES, VnetHeader};

/// How long a frame waits in its ring before it is looked at again whether our address is ours by then.
const CLAIM_PAUSE: Duration = Duration::from_millis(5);

/// How often ports are tried that could not be published: flows of the guest before may have them at other workers.
const PUBLISH_PAUSE: Duration = Duration::from_secs(1);

/// What a frame may ask for that no guest gets.
const ALL_OFFLOADS: GuestOffloads =
    GuestOffloads { checksum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };

/// Where source and destination stand in a frame with an IPv4 packet.
const SRC_AT: usize = ethernet::HEADER_BYTES + 12;
const DST_AT: usize = ethernet::HEADER_BYTES + 16;

/// What a worker's translation is made of.
#[derive(Debug)]
pub struct TranslationParts {
    /// The worker's flows.
    pub nat: PacketNat,
    /// The station of all workers.
    pub station: Arc<SharedStation>,
    /// The guest's network.
    pub guests: Ipv4Subnet,
    /// This worker. The first looks after the station while there is no guest, and at the end.
    pub worker: WorkerId,
    /// Ports that lead to the guest.
    pub publish: Vec<Publish>,
}

/// Translation on one worker.
#[derive(Debug)]
pub(super) struct Translation {
    nat: PacketNat,
    worker: WorkerId,
    outside: Outside,
    subnet: Ipv4Subnet,
    /// Where addresses of the guest are.
    guests: HashMap<Ipv4Addr, MacAddr, foldhash::quality::RandomState>,
    newest: (Ipv4Addr, MacAddr),
    /// An address of the guest's that something came for and that is not known.
    unknown: Option<Ipv4Addr>,
    head: Box<[u8; FRAME_HEAD_BYTES]>,
    /// Frames whose flows are other workers', and flows that move to them.
    for_others: VecDeque<(WorkerId, LinkLetter)>,
    /// Frames whose next hop nobody answered for, their vnet headers, as they would have left.
    given_up: Vec<(VnetHeader, Box<[u8]>)>,
    /// For them, until they are read.
    room: Room,
    /// The guest's starts that were noticed here.
    guest_starts: u64,
    /// How often questions whether our address is there are answered.
    echoes: Rate,
    /// When to look again whether frames need wait no longer: in their ring for our address, or parked for a next
    /// hop that another worker may hear of.
    claims: Option<Instant>,
    publish: Vec<Publish>,
    /// The guest they lead to.
    published_to: Option<Ipv4Addr>,
    /// When those that flows have are tried again.
    publish_again: Option<Instant>,
}

/// What became of a frame of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    /// Translated, and the guest's.
    ForGuest,
    /// Our station's own.
    Ours,
    /// Its flow is another worker's.
    Elsewhere(WorkerId),
    /// A fragment that waits for the first of its packet.
    Held,
    /// Refused, and its sender is told: the answer waits.
    Answered,
    /// A question whether our address is there.
    Echo,
}

impl Translation {
    pub(super) fn new(parts: TranslationParts) -> Translation {
        let TranslationParts { nat, worker, station, guests, publish } = parts;
        Translation {
            nat,
            worker,
            outside: Outside::new(station),
            subnet: guests,
            guests: HashMap::default(),
            newest: (Ipv4Addr::UNSPECIFIED, MacAddr::ZERO),
            unknown: None,
            head: Box::new([0; FRAME_HEAD_BYTES]),
            for_others: VecDeque::new(),
            given_up: Vec::new(),
            room: Room::default(),
            guest_starts: 0,
            echoes: Rate::new(STATION_ECHOES_BURST, STATION_ECHOES_PER_SECOND),
            claims: None,
            publish,
            published_to: None,
            publish_again: None,
        }
    }

    pub(super) fn nat(&mut self) -> &mut PacketNat {
        &mut self.nat
    }

    /// The guest is gone or began anew.
    pub(super) fn forget_guest(&mut self, now: Instant) {
        if let Err(error) = self.nat.forget(now) {
            tracing::warn!(%error, "flows of the guest that is gone stay until they time out");
        }
        self.guests.clear();
        self.newest = (Ipv4Addr::UNSPECIFIED, MacAddr::ZERO);
        for (_, letter) in self.for_others.drain(..) {
            if let LinkLetter::Flow(moved, _) = letter {
                self.nat.give_up(&moved);
            }
        }
        self.given_up.clear();
        self.outside.forget_parked();
        self.publish_to(now, None);
    }

    /// Published ports lead to `guest`.
    fn publish_to(&mut self, now: Instant, guest: Option<Ipv4Addr>) {
        // Ports are all workers', and published in one place.
        if self.worker != WorkerId(0) {
            return;
        }
        if self.published_to == guest {
            return self.publish_what_is_missing(now);
        }
        self.published_to = guest;
        let missing = self.set_published(now);
        if missing > 0 {
            tracing::warn!(
                missing,
                "flows of the guest have published ports that are to lead to it; they do when those flows have ended"
            );
        }
    }

    /// Has the translation know what is published to whom; how many ports flows of the guest have.
    fn set_published(&mut self, now: Instant) -> usize {
        let to = |guest, port: &Publish| PublishedPort {
            protocol: port.protocol,
            port: port.host.port(),
            guest,
            guest_port: port.guest_port,
        };
        let guest = self.published_to;
        let ports = guest.map(|guest| self.publish.iter().map(|port| to(guest, port)).collect());
        let missing = self.nat.set_published(ports.unwrap_or_default());
        self.publish_again = (missing > 0).then_some(now + PUBLISH_PAUSE);
        missing
    }

    /// One port more leads to the guest, or will when there is one. False, and nothing has changed, if a flow of the
    /// guest has it.
    pub(super) fn publish(&mut self, now: Instant, port: Publish) -> bool {
        self.publish.push(port);
        self.set_published(now);
        let is_free = self.published_to.is_none() || self.nat.is_published(port.protocol, port.host.port());
        if !is_free {
            self.unpublish(now, &port, false);
        }
        is_free
    }

    /// One port less. Connections that came by it go on, unless they are to end, of which a first step is taken. Exchanges of
    /// datagrams end, or with endpoint-independent filtering they would keep the port open to anybody.
    pub(super) fn unpublish(&mut self, now: Instant, port: &Publish, end: bool) -> Ended {
        self.publish.retain(|known| known != port);
        self.set_published(now);
        if end || port.protocol == Protocol::Udp {
            self.nat.end_published(port.protocol, port.host.port(), 0)
        } else {
            Ended::default()
        }
    }

    fn publish_what_is_missing(&mut self, now: Instant) {
        if self.publish_again.is_some_and(|due| now >= due) {
            let missing = self.nat.publish_again();
            self.publish_again = (missing > 0).then_some(now + PUBLISH_PAUSE);
        }
    }

    /// Whether an answer of DHCP may come, of which all is to be read.
    pub(super) fn awaits_dhcp(&self) -> bool {
        self.outside.awaits_dhcp()
    }

    /// What was counted of flows and drops; frames are the link's to count.
    pub(super) fn counters(&self) -> Counters {
        let mut counters = self.nat.counters().clone();
        (counters.frames_from_guest, counters.frames_to_guest) = (0, 0);
        counters
    }

    /// Our address on the link, of which the flows are told when it changes.
    fn refresh(&mut self, now: Instant) -> Option<Ipv4Addr> {
        let Translation { nat, outside, .. } = self;
        let held = outside.address(|addr| {
            if let Err(error) = nat.set_outside(now, addr) {
                tracing::error!(%error, "flows cannot move to the new address on the link");
            }
        });
        held.map(|held| held.addr)
    }

    pub(super) fn learn(&mut self, addr: Ipv4Addr, mac: MacAddr) {
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

    /// The MTU of both links, in bytes.
    pub(super) fn set_ip_mtu(&mut self, ip_mtu: u16) {
        self.nat.set_ip_mtus(ip_mtu, ip_mtu);
    }

    /// Why the packet at hand was dropped, if it was since this was last asked.
    pub(super) fn take_dropped(&mut self) -> Option<DropReason> {
        self.nat.take_dropped()
    }

    /// How many frames are worth being looked at before the first is translated.
    pub(super) fn frames_ahead(&self) -> usize {
        if self.nat.is_large() { PACKET_AHEAD_FRAMES } else { 1 }
    }

    /// Frames from `side` that begin with `heads` are translated next.
    pub(super) fn expect<'a>(&self, side: Side, heads: impl Iterator<Item = &'a [u8]>) {
        self.nat.expect(side, heads);
    }

    /// Hands a frame to the worker whose flow it may be of; lost if too many wait.
    fn hand_over(&mut self, to: WorkerId, mut frame: LinkFrame) -> Result<(), DropReason> {
        // Once after a flow that moved, and not in circles.
        if frame.tried.has(to) && frame.tried.has(self.worker) {
            return Err(DropReason::NoFlow);
        }
        frame.tried = frame.tried.with(self.worker);
        frame.from = self.worker;
        if self.for_others.len() >= LETTERS_MAX {
            return Err(DropReason::TableFull);
        }
        frame.room = Some(self.room.take(frame.bytes.len()).ok_or(DropReason::TableFull)?);
        frame.guest_starts = self.guest_starts;
        self.for_others.push_back((to, LinkLetter::Frame(frame)));
        Ok(())
    }

    /// Has a flow move to the worker that handed over the frame, which lies in `frame` as it came, if it did so often
    /// enough.
    fn move_after(&mut self, now: Instant, frame: &mut LinkFrame) {
        if self.for_others.len() >= LETTERS_MAX {
            return;
        }
        let len_bytes = frame.bytes.len();
        let head = &mut frame.bytes[..len_bytes.min(FRAME_HEAD_BYTES)];
        let packet = Packet::new(&frame.vnet, head, len_bytes);
        if let Some(moved) = self.nat.give_away(now, &packet, frame.from) {
            self.for_others.push_back((frame.from, LinkLetter::Flow(moved, self.guest_starts)));
        }
    }

    /// Whether a frame of the link is addressed to us.
    fn is_to_us(&self, header: &ethernet::Header) -> bool {
        header.dst == self.outside.mac() || header.dst.is_multicast()
    }

    /// Takes a frame of the link whose first bytes are `head`.
    pub(super) fn arrived(
        &mut self,
        now: Instant,
        vnet: &VnetHeader,
        head: &mut [u8],
        (len_bytes, tried): (usize, WorkerSet),
    ) -> Result<Arrived, DropReason> {
        let header = ethernet::Header::parse(head).map_err(|_| DropReason::Malformed)?;
        if !self.is_to_us(&header) {
            return Err(DropReason::NotForUs);
        }
        if Outside::may_be_for_station(head) && self.outside.receive(now, head) {
            return Ok(Arrived::Ours);
        }
        if header.ethertype != EtherType::IPV4 || header.dst.is_multicast() {
            return Err(DropReason::NotForUs);
        }
        self.refresh(now);
        match self.nat.from_world(now, &mut Packet { vnet, head, len_bytes, tried }) {
            Verdict::Forward => self.address_to_guest(head).map(|()| Arrived::ForGuest),
            Verdict::Answer(_) => Ok(Arrived::Answered),
            Verdict::Hold => Ok(Arrived::Held),
            Verdict::Elsewhere(worker) => Ok(Arrived::Elsewhere(worker)),
            // Counted there.
            Verdict::Drop(_) => Ok(Arrived::Ours),
            Verdict::Ours if self.outside.is_ours(addr_at(head, DST_AT)) => Ok(Arrived::Echo),
            Verdict::Ours | Verdict::Hairpin => Err(DropReason::NotForUs),
        }
    }

    /// Makes the answer of a frame that asks whether our address is there, within the rate limit.
    fn answer_echo(&mut self, now: Instant, frame: &mut [u8]) -> Result<(), DropReason> {
        if !self.echoes.has(now) {
            return Err(DropReason::RateLimited);
        }
        let is_answered = answer_echo(frame) && self.echoes.take(now);
        if is_answered { Ok(()) } else { Err(DropReason::NotForUs) }
    }

    /// Writes the Ethernet header of a frame that is translated for the guest.
    fn address_to_guest(&mut self, head: &mut [u8]) -> Result<(), DropReason> {
        let guest = addr_at(head, DST_AT);
        let Some(dst) = self.guest_mac(guest) else {
            self.unknown = Some(guest);
            return Err(DropReason::NoFlow);
        };
        ethernet::Header { dst, src: MacAddr::GATEWAY, ethertype: EtherType::IPV4 }.emit(head);
        Ok(())
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
        src.is_unspecified() || dst.is_broadcast() || dst.is_multicast() || translation.subnet.contains(dst)
    }

    /// Translates and sends one frame of the guest, for which [`LinkEnd::stays`] does not hold.
    pub(in crate::worker) fn forward_translated<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &TxFrame<'_>,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Left {
        match self.translate(now, frame, WorkerSet::default(), engine, port) {
            Ok(left @ (Left::Full | Left::Limited)) => return left,
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
        tried: WorkerSet,
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
        let address = translation.refresh(now);
        let is_hairpin = address == Some(dst);
        let way = if is_hairpin { None } else { Some(translation.outside.way(now, dst)) };
        let code = match way {
            Some(Way::NotYet) => {
                translation.claims = Some(now + CLAIM_PAUSE);
                return Ok(Left::Full);
            }
            Some(Way::Withheld) => return Err(DropReason::RateLimited),
            Some(Way::None) => Some(UnreachableCode::Host),
            Some(Way::NoAddress) => Some(UnreachableCode::Net),
            Some(Way::To(_) | Way::Wait(_)) | None => None,
        };
        if let Some(code) = code {
            let message = Message::Unreachable { code, next_hop_mtu: 0 };
            engine.tell_guest(now, port, from, message, &frame.head[ethernet::HEADER_BYTES..]);
            return Err(DropReason::Refused);
        }
        self.translate_towards(now, frame, (way, tried), engine, port)
    }

    /// The same with the way known; none if it goes to our own address.
    fn translate_towards<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &TxFrame<'_>,
        (way, tried): (Option<Way>, WorkerSet),
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<Left, DropReason> {
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let head = &mut translation.head[..frame.head.len()];
        head.copy_from_slice(frame.head);
        let mut packet = Packet { vnet: &frame.vnet, head, len_bytes: frame.whole.len(), tried };
        match (translation.nat.from_guest(now, &mut packet), way) {
            (Verdict::Forward, Some(way)) => {
                let left = self.leave(frame, way);
                self.send_released(now, engine, port);
                left
            }
            (Verdict::Hairpin, _) => {
                let whole = self.whole_translated(frame);
                self.turn_back(now, frame.pair, frame.vnet, whole, engine, port)
            }
            (Verdict::Answer(_), _) => {
                let answer = translation.nat.answer();
                engine.send_to_guest(now, port, frame.pair, VnetHeader::default(), answer);
                Ok(Left::Yes)
            }
            (Verdict::Hold, _) => {
                translation.nat.hold(now, Side::Guest, &whole_frame(frame, frame.head));
                Ok(Left::Yes)
            }
            (Verdict::Elsewhere(worker), _) => {
                let bytes = whole_frame(frame, frame.head);
                let handed = LinkFrame::new(Side::Guest, frame.pair, frame.vnet, tried, bytes);
                translation.hand_over(worker, handed).map(|()| Left::Yes)
            }
            // Counted there.
            (Verdict::Drop(_), _) => Ok(Left::Yes),
            (Verdict::Ours, None) => {
                let mut answer = whole_frame(frame, frame.head);
                translation.answer_echo(now, &mut answer)?;
                self.send_whole(now, (frame.pair, VnetHeader::default()), &mut answer, engine, port)?;
                Ok(Left::Yes)
            }
            (Verdict::Ours, _) | (Verdict::Forward, None) => Err(DropReason::Refused),
        }
    }

    /// Sends the translated frame, or keeps it until its next hop is known.
    fn leave(&mut self, frame: &TxFrame<'_>, way: Way) -> Result<Left, DropReason> {
        if lan::check_length(&frame.vnet, frame.whole.len(), self.ip_mtu).is_err() {
            return self.leave_cut(frame, way);
        }
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let src = translation.outside.mac();
        match way {
            Way::To(dst) => {
                let mut head = *translation.head;
                let head = &mut head[..frame.head.len()];
                ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(head);
                let rest = frame.whole.range(frame.head.len(), frame.whole.len());
                self.send(frame.vnet, head, &rest)
            }
            Way::Wait(target) => {
                let whole = whole_frame(frame, &translation.head[..frame.head.len()]);
                let parked = translation.outside.park(target, frame.vnet, whole);
                if parked { Ok(Left::Yes) } else { Err(DropReason::TableFull) }
            }
            Way::None | Way::Withheld | Way::NotYet | Way::NoAddress => Err(DropReason::Refused),
        }
    }

    /// The same of one longer than the link, which is cut. Where the queue has no room for all of it the rest is lost.
    fn leave_cut(&mut self, frame: &TxFrame<'_>, way: Way) -> Result<Left, DropReason> {
        let mut whole = self.whole_translated(frame);
        let mut pieces: Vec<Box<[u8]>> = Vec::new();
        cut(&frame.vnet, &mut whole, self.ip_mtu, |piece| pieces.push(piece.into()))?;
        for mut piece in pieces {
            let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
            let src = translation.outside.mac();
            let left = match way {
                Way::To(dst) => {
                    ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(&mut piece);
                    self.send(VnetHeader::default(), &piece, &Payload::EMPTY)?
                }
                Way::Wait(target) if translation.outside.park(target, VnetHeader::default(), piece) => {
                    Left::Yes
                }
                Way::Wait(_) => return Err(DropReason::TableFull),
                Way::None | Way::Withheld | Way::NotYet | Way::NoAddress => return Err(DropReason::Refused),
            };
            if left == Left::Full {
                return Err(DropReason::LinkRefused);
            }
        }
        Ok(Left::Yes)
    }

    /// Sends the guest a frame that is translated for it, cut if it is longer than its link.
    fn send_whole<N: HostNet>(
        &mut self,
        now: Instant,
        (pair, vnet): (QueuePair, VnetHeader),
        whole: &mut [u8],
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<(), DropReason> {
        if lan::check_length(&vnet, whole.len(), self.ip_mtu).is_ok() {
            engine.send_to_guest(now, port, pair, vnet, whole);
            return Ok(());
        }
        let plain = VnetHeader::default();
        cut(&vnet, whole, self.ip_mtu, |piece| engine.send_to_guest(now, port, pair, plain, piece))
    }

    fn whole_translated(&self, frame: &TxFrame<'_>) -> Box<[u8]> {
        let head = self.translation.as_ref().map_or(frame.head, |t| &t.head[..frame.head.len()]);
        whole_frame(frame, head)
    }

    /// Gives the guest a frame that it sent to itself through our address.
    fn turn_back<N: HostNet>(
        &mut self,
        now: Instant,
        pair: QueuePair,
        vnet: VnetHeader,
        mut whole: Box<[u8]>,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<Left, DropReason> {
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        lan::check_offloads(&vnet, port.offloads())?;
        translation.address_to_guest(&mut whole)?;
        self.send_whole(now, (pair, vnet), &mut whole, engine, port)?;
        Ok(Left::Yes)
    }

    /// Ends the way of a frame of the link that does not go on to the guest as it came, which lies in `whole`.
    pub(super) fn settle_arrival(
        &mut self,
        now: Instant,
        arrived: Arrived,
        vnet: VnetHeader,
        len_bytes: usize,
    ) {
        let whole = std::mem::take(&mut self.whole);
        self.settle(now, arrived, (vnet, WorkerSet::default()), &whole[..len_bytes]);
        self.whole = whole;
    }

    fn settle(
        &mut self,
        now: Instant,
        arrived: Arrived,
        (vnet, tried): (VnetHeader, WorkerSet),
        whole: &[u8],
    ) {
        let Some(translation) = &mut self.translation else { return };
        match arrived {
            Arrived::ForGuest => {}
            Arrived::Ours => {
                self.send_station_frames();
                // It may have been the answer they wait for.
                self.send_parked(now);
            }
            Arrived::Held => translation.nat.hold(now, Side::World, whole),
            Arrived::Elsewhere(worker) => {
                let pair = QueuePair::default();
                let frame = LinkFrame::new(Side::World, pair, vnet, tried, whole.into());
                if let Err(reason) = translation.hand_over(worker, frame) {
                    self.counters.drop(reason);
                }
            }
            Arrived::Echo => {
                let mut answer: Box<[u8]> = whole.into();
                match translation.answer_echo(now, &mut answer) {
                    Ok(()) => {
                        let _ = self.send(VnetHeader::default(), &answer, &Payload::EMPTY);
                    }
                    Err(reason) => self.counters.drop(reason),
                }
            }
            Arrived::Answered => {
                let mut answer: Box<[u8]> = translation.nat.answer().into();
                // It goes where the packet came from.
                answer[6..12].copy_from_slice(&translation.outside.mac().0);
                let _ = self.send(VnetHeader::default(), &answer, &Payload::EMPTY);
            }
        }
    }

    /// Forgets the guest if it began anew, whichever worker saw that. To be called before each batch.
    pub(in crate::worker) fn notice_guest(&mut self, now: Instant, guest_starts: u64) {
        if let Some(translation) = &mut self.translation
            && translation.guest_starts != guest_starts
        {
            translation.guest_starts = guest_starts;
            self.forget_translated(now);
        }
    }

    /// Ends the guest's flows, and what was translated for it.
    pub(super) fn forget_translated(&mut self, now: Instant) {
        let Some(translation) = &mut self.translation else { return };
        translation.forget_guest(now);
        let lost = self.ahead.forget() + self.meanwhile.forget() + u64::from(self.held.take().is_some());
        self.counters.drop_many(DropReason::GuestNotReceiving, lost);
    }

    /// Takes what another worker has for this one.
    pub(in crate::worker) fn letter<N: HostNet>(
        &mut self,
        now: Instant,
        letter: LinkLetter,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) {
        self.notice_guest(now, engine.guest_starts(now));
        match (letter, &mut self.translation) {
            (LinkLetter::Frame(frame), _) => self.handed(now, frame, engine, port),
            (LinkLetter::Flow(moved, guest_starts), Some(own)) if guest_starts == own.guest_starts => {
                own.refresh(now);
                own.nat.take_in(moved);
            }
            (LinkLetter::Flow(moved, _), Some(own)) => own.nat.give_up(&moved),
            (LinkLetter::Flow(..), None) => {}
        }
    }

    /// Takes a frame whose flow is this worker's from another worker.
    fn handed<N: HostNet>(
        &mut self,
        now: Instant,
        mut frame: LinkFrame,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) {
        frame.room = None;
        if self.translation.as_ref().is_none_or(|own| own.guest_starts != frame.guest_starts) {
            return self.counters.drop(DropReason::NoFlow);
        }
        // Its own pair is another worker's.
        frame.pair = engine.first_pair();
        let outcome = match frame.side {
            Side::Guest => {
                let head_bytes = frame.bytes.len().min(FRAME_HEAD_BYTES);
                let tx = TxFrame {
                    vnet: frame.vnet,
                    head: &frame.bytes[..head_bytes],
                    whole: Payload::from_host(&frame.bytes),
                    pair: frame.pair,
                };
                let left = self.translate(now, &tx, frame.tried, engine, port);
                if let Some(translation) = &mut self.translation {
                    translation.move_after(now, &mut frame);
                }
                match left {
                    Ok(Left::Yes) => Ok(()),
                    // Nobody keeps it.
                    Ok(Left::Full | Left::Limited) => Err(DropReason::LinkRefused),
                    Err(reason) => Err(reason),
                }
            }
            Side::World => self.handed_from_world(now, &mut frame, engine, port),
        };
        if let Err(reason) = outcome {
            self.counters.drop(reason);
        }
    }

    fn handed_from_world<N: HostNet>(
        &mut self,
        now: Instant,
        frame: &mut LinkFrame,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<(), DropReason> {
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        let len_bytes = frame.bytes.len();
        let mut head = [0; FRAME_HEAD_BYTES];
        let head = &mut head[..len_bytes.min(FRAME_HEAD_BYTES)];
        head.copy_from_slice(&frame.bytes[..head.len()]);
        match translation.arrived(now, &frame.vnet, head, (len_bytes, frame.tried))? {
            Arrived::ForGuest => {
                lan::check_offloads(&frame.vnet, port.offloads())?;
                frame.bytes[..head.len()].copy_from_slice(head);
                self.counters.payload_to_guest_bytes += len_bytes as u64;
                self.gate.has_read(now, &frame.vnet, len_bytes);
                self.send_whole(now, (frame.pair, frame.vnet), &mut frame.bytes, engine, port)
            }
            arrived => {
                self.settle(now, arrived, (frame.vnet, frame.tried), &frame.bytes);
                Ok(())
            }
        }
    }

    /// What there is next for another worker.
    pub(in crate::worker) fn next_letter(&mut self) -> Option<(WorkerId, LinkLetter)> {
        self.translation.as_mut()?.for_others.pop_front()
    }

    /// Sends fragments that waited for the first of their packet.
    fn send_released<N: HostNet>(&mut self, now: Instant, engine: &mut Engine<N>, port: &mut impl GuestPort) {
        while let Some(released) = self.translation.as_mut().and_then(|t| t.nat.pop_released()) {
            if let Err(reason) = self.send_one_released(now, released, engine, port) {
                self.counters.drop_aside(reason);
            }
        }
    }

    fn send_one_released<N: HostNet>(
        &mut self,
        now: Instant,
        released: Released,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) -> Result<(), DropReason> {
        let Released { side, verdict, mut frame } = released;
        let (pair, vnet) = (engine.first_pair(), VnetHeader::default());
        let Some(translation) = &mut self.translation else { return Err(DropReason::NoFlow) };
        match (verdict, side) {
            (Verdict::Forward, Side::Guest) => {
                let target = addr_at(&frame, DST_AT);
                let mut pieces: Vec<Box<[u8]>> = Vec::new();
                if lan::check_length(&vnet, frame.len(), self.ip_mtu).is_ok() {
                    pieces.push(frame);
                } else {
                    cut(&vnet, &mut frame, self.ip_mtu, |piece| pieces.push(piece.into()))?;
                }
                let parked = pieces.into_iter().all(|piece| translation.outside.park(target, vnet, piece));
                self.send_parked(now);
                if parked { Ok(()) } else { Err(DropReason::TableFull) }
            }
            (Verdict::Forward, Side::World) | (Verdict::Hairpin, _) => {
                translation.address_to_guest(&mut frame)?;
                self.send_whole(now, (pair, vnet), &mut frame, engine, port)
            }
            (Verdict::Elsewhere(worker), side) => {
                let tried = WorkerSet::default();
                translation.hand_over(worker, LinkFrame::new(side, pair, vnet, tried, frame))
            }
            // Counted there.
            (Verdict::Drop(_), _) => Ok(()),
            (Verdict::Ours | Verdict::Answer(_) | Verdict::Hold, _) => Err(DropReason::NotForUs),
        }
    }

    /// Does what is due of translation and its station, and sends what waits. To be called once a batch.
    pub(in crate::worker) fn run_translation<N: HostNet>(
        &mut self,
        now: Instant,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) {
        let Some(translation) = &mut self.translation else { return };
        let published_guest = engine.published_guest();
        translation.publish_to(now, published_guest);
        if let Some(guest) = published_guest
            && translation.guest_mac(guest).is_none()
            && let Some(neighbour) = engine.guest_at(guest)
        {
            translation.learn(guest, neighbour.mac);
        }
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
        self.tell_of_given_up(now, engine, port);
        self.send_released(now, engine, port);
        self.send_resets(now, engine, port);
        // The answer they wait for may come to another worker.
        if let Some(translation) = &mut self.translation
            && translation.outside.has_parked()
            && translation.claims.is_none()
        {
            translation.claims = Some(now + CLAIM_PAUSE);
        }
    }

    /// When [`LinkEnd::run_translation`] has something to do.
    pub(in crate::worker) fn next_deadline(&self) -> Option<Instant> {
        let gate = self.gate.next_deadline(self.starved);
        let Some(translation) = &self.translation else { return gate };
        let starved = self.station_deadline();
        let own =
            [translation.nat.next_deadline(), translation.outside.deadline(), translation.claims, starved];
        let own = own.into_iter().chain([translation.publish_again, gate]);
        own.flatten().min()
    }

    /// Whether what waits is looked at again soon, without an event of the link.
    pub(in crate::worker) fn awaits_claim(&self) -> bool {
        self.translation.as_ref().is_some_and(|translation| translation.claims.is_some())
    }

    /// Whether frames that waited for our address may be tried again.
    pub(in crate::worker) fn is_claim_due(&mut self, now: Instant) -> bool {
        let Some(translation) = &mut self.translation else { return false };
        let is_due = translation.claims.is_some_and(|due| now >= due);
        if is_due {
            translation.claims = None;
        }
        is_due
    }

    /// Whether the station is looked after by this worker.
    pub(super) fn serves_station(&self) -> bool {
        self.translation.as_ref().is_some_and(|translation| translation.worker == WorkerId(0))
    }

    /// Takes frames of the link for the station while there is no guest. Returns whether more may wait.
    pub(in crate::worker) fn serve_station(&mut self, now: Instant) -> bool {
        for _ in 0..LINK_BATCH_FRAMES {
            if !self.readable || self.translation.is_none() {
                return false;
            }
            let mut header = [0; VNET_HEADER_BYTES];
            let tag_bytes = if self.parts.vlan.is_some() { vlan::TAG_BYTES } else { 0 };
            let (head, spare) = (&mut self.head[..], &mut self.spare[..]);
            let nothing = PayloadMut::from_host(&mut []);
            let got = self.parts.queue.receive(&mut self.segments, &mut header, head, nothing, spare);
            let len = match got {
                Ok((len, _)) => len.min(self.head.len()),
                Err(error) => {
                    if let Ok(Step::Nothing) = self.nothing_read(&error) {
                        self.readable = false;
                    }
                    continue;
                }
            };
            let head = &mut self.head[..len];
            let judged = judge(&header, head, len, (self.parts.vlan, self.ip_mtu), ALL_OFFLOADS);
            if judged.is_err() {
                continue;
            }
            let head = without_tag(head, tag_bytes);
            if let Some(translation) = &mut self.translation
                && ethernet::Header::parse(head).is_ok_and(|header| translation.is_to_us(&header))
                && Outside::may_be_for_station(head)
                && translation.outside.receive(now, head)
            {
                self.send_station_frames();
            }
        }
        self.readable
    }

    /// The end: a leased address is given back.
    pub(in crate::worker) fn leave_link(&mut self) {
        if let Some(translation) = &mut self.translation
            && translation.worker == WorkerId(0)
        {
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

    fn give_up(&mut self, vnet: VnetHeader, frame: Box<[u8]>) {
        if let Some(translation) = &mut self.translation
            && translation.given_up.len() < PARKED_FRAMES_MAX
        {
            translation.given_up.push((vnet, frame));
        }
    }

    /// Tells the guest of frames whose next hop nobody answered for (RFC 1122, 2.3.2.2; RFC 1812, 5.2.7.1), about
    /// what it sent itself.
    fn tell_of_given_up<N: HostNet>(
        &mut self,
        now: Instant,
        engine: &mut Engine<N>,
        port: &mut impl GuestPort,
    ) {
        let Some(translation) = &mut self.translation else { return };
        for (vnet, mut frame) in translation.given_up.drain(..) {
            let len_bytes = frame.len();
            let head = &mut frame[..len_bytes.min(FRAME_HEAD_BYTES)];
            let sender = translation.nat.as_sent(&mut Packet::new(&vnet, head, len_bytes));
            let Some(neighbour) = sender.and_then(|sender| engine.guest_at(sender)) else { continue };
            let message = Message::Unreachable { code: UnreachableCode::Host, next_hop_mtu: 0 };
            engine.tell_guest(now, port, neighbour, message, &head[ethernet::HEADER_BYTES..]);
        }
    }

    /// Tells the ends of connections that were ended here; in turns, if they are many.
    fn send_resets<N: HostNet>(&mut self, now: Instant, engine: &mut Engine<N>, port: &mut impl GuestPort) {
        for _ in 0..PACKET_RESETS_AT_ONCE {
            let Some(translation) = &mut self.translation else { return };
            let Some(Reset { to, mut frame }) = translation.nat.pop_reset() else { return };
            match to {
                Side::Guest => {
                    if translation.address_to_guest(&mut frame).is_ok() {
                        let pair = engine.first_pair();
                        engine.send_to_guest(now, port, pair, VnetHeader::default(), &frame);
                    }
                }
                Side::World => {
                    let src = translation.outside.mac();
                    match translation.outside.way(now, addr_at(&frame, DST_AT)) {
                        Way::To(dst) => {
                            ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(&mut frame);
                            // A link may lose a frame; the end finds out when it sends next.
                            let _ = self.send(VnetHeader::default(), &frame, &Payload::EMPTY);
                        }
                        Way::Wait(target) => {
                            translation.outside.park(target, VnetHeader::default(), Box::new(frame));
                        }
                        Way::None | Way::Withheld | Way::NotYet | Way::NoAddress => {}
                    }
                }
            }
        }
    }

    /// Sends frames whose next hop has become known.
    fn send_parked(&mut self, now: Instant) {
        let Some(translation) = &mut self.translation else { return };
        if !translation.outside.has_parked() {
            return;
        }
        translation.refresh(now);
        let src = translation.outside.mac();
        let mut ready = Vec::new();
        translation.outside.unpark(now, |dst, parked| {
            ready.push((dst, parked.vnet, std::mem::take(&mut parked.frame)));
        });
        for (dst, vnet, mut frame) in ready {
            let sent = match dst {
                None => {
                    self.give_up(vnet, frame);
                    Err(DropReason::Refused)
                }
                Some(dst) => {
                    ethernet::Header { dst, src, ethertype: EtherType::IPV4 }.emit(&mut frame);
                    self.send(vnet, &frame, &Payload::EMPTY)
                }
            };
            match sent {
                Ok(Left::Yes) => {}
                Ok(Left::Full | Left::Limited) => self.counters.drop(DropReason::LinkRefused),
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

#[cfg(test)]
mod tests;
