//! The worker's end of a link: the guest's frames leave by one queue of a TAP as they are, and what comes
//! there goes to the guest.
//!
//! A frame of the guest is one `writev`: its virtio-net header re-made from the judged copy, the copied
//! head, and the rest from guest memory. A frame to the guest is one `readv`: header and head into host
//! memory, the rest straight into reserved buffers; it is judged by what lies in host memory only. How long
//! it is shows only then, so buffers are reserved for a frame of the MTU, or for 64 KiB while such frames
//! come; what exceeds them lands in host memory and is copied.
//!
//! The queue is watched edge-triggered in both directions. A guest without buffers stops the reading: the
//! queue is left alone until there are some, and no event tells of it meanwhile. A queue that takes no more
//! stops the rings that feed it until it has room. A rate limit does either until a timer says that there are tokens.
//!
//! May touch: `engine::lan`, `engine::guest_port`, `uplink::sys::tap`.

mod ahead;
mod gate;
mod outside;
#[cfg(test)]
mod rig;
mod starved;
mod translated;

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError};

use crate::addr::{MacAddr, VlanId};
use crate::config::{IpMtu, Publish};
use crate::engine::counters::{Counters, DropReason};
use crate::engine::flows::Ended;
use crate::engine::gateway::SharedDhcp;
use crate::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use crate::engine::lan::guard::{self, Guard, Verdict};
use crate::engine::lan::services::{self, Service};
use crate::engine::lan::{self, vlan};
use crate::engine::packet::ports::WorkerSet;
use crate::frame::{Payload, PayloadMut, QueuePair, TxFrame};
use crate::limits::{
    BATCH_BYTES, FRAME_BYTES_MAX, FRAME_HEAD_BYTES, LEASE_LOOK_UPS_BURST, LEASE_LOOK_UPS_PER_SECOND,
    LEASES_PER_GUEST_MAX, LINK_BATCH_FRAMES, LINK_HEAD_BYTES, LINK_LONG_HEAD_BYTES,
};
use crate::rate::Rate;
use crate::rate_limit::RateLimits;
use crate::time::Instant;
use crate::uplink::sys::tap::{Segments, TapQueue};
use crate::wire::ethernet::{self, EtherType};
use crate::wire::vnet::{VNET_HEADER_BYTES, VnetHeader};

use self::ahead::Ahead;
use self::gate::Gate;
use self::starved::Starved;
use self::translated::{Arrived, Translation};

pub use self::outside::SharedStation;
pub use self::translated::TranslationParts;

/// Frames after one longer than the MTU for which room for as long a one is reserved. Too much room costs the
/// popping of a few descriptors, too little the copying of a frame.
const LARGE_FRAMES: u8 = 16;

/// What a worker's end of a link is made of.
#[derive(Debug)]
pub struct LinkParts {
    /// The worker's queue.
    pub queue: TapQueue,
    /// The VLAN the guest is in, unknown to it.
    pub vlan: Option<VlanId>,
    /// What the guest may send from; anything if `None`.
    pub guard: Option<Guard>,
    /// The guest's IP MTU; a front-end can make it smaller.
    pub ip_mtu: IpMtu,
    /// The address at which DHCP and DNS are ours, on a named network.
    pub gateway: Option<Ipv4Addr>,
    /// The DHCP that is ours there: it knows which address is the guest's.
    pub dhcp: Option<SharedDhcp>,
    /// Translation, if the guest is hidden behind an address of ours on the link.
    pub translation: Option<TranslationParts>,
    /// How much the guest may send and be sent, by all workers together.
    pub limits: RateLimits,
}

impl LinkParts {
    /// Whether the guest is hidden behind an address of ours.
    pub fn translates(&self) -> bool {
        self.translation.is_some()
    }

    /// The same, with the DHCP that is ours, and the limits that all workers share.
    #[must_use]
    pub fn sharing(self, dhcp: &SharedDhcp, limits: &RateLimits) -> LinkParts {
        LinkParts { dhcp: Some(Arc::clone(dhcp)), limits: limits.clone(), ..self }
    }

    /// The same, with the guest hidden behind an address of ours.
    #[must_use]
    pub fn translated(self, parts: TranslationParts) -> LinkParts {
        LinkParts { translation: Some(parts), ..self }
    }
}

/// What became of a frame of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// It left, or was dropped and counted.
    Yes,
    /// The queue is full.
    Full,
    /// The limit does not let it pass yet.
    Limited,
}

/// What became of the next frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// So many bytes of it reached the guest, or none and it is counted.
    Moved(usize),
    /// None waits.
    Nothing,
    /// The guest has no buffers for it.
    NoBuffers,
}

/// A frame in host memory that waits for receive buffers.
#[derive(Clone, Copy, Debug)]
struct Held {
    vnet: VnetHeader,
    len_bytes: usize,
}

/// A frame that was read: its head lies in `head`, what was not read into reserved buffers in `spare`.
#[derive(Clone, Copy, Debug)]
struct Got {
    header: [u8; VNET_HEADER_BYTES],
    /// Length with the tag.
    len_bytes: usize,
    /// Where the bytes behind the head belong in the guest's frame.
    behind: usize,
    /// Bytes of the guest's buffers that are reserved; none if 0.
    reserved_bytes: usize,
    /// Of those, so many behind the head were to be written to.
    offered: usize,
}

/// One queue of the link, and what waits at it.
#[derive(Debug)]
pub(super) struct LinkEnd {
    parts: LinkParts,
    translation: Option<Translation>,
    gate: Gate,
    /// What the interface was last set to.
    ip_mtu: u16,
    offloads: Option<GuestOffloads>,
    attached: bool,
    segments: Segments,
    /// Frames may wait in the queue.
    readable: bool,
    /// The guest had no buffers; it will kick.
    starved: bool,
    /// What is read for the station's sake meanwhile.
    meanwhile: Starved,
    /// For so many frames more, one may be longer than the MTU: acknowledgements come between long ones.
    large_frames: u8,
    held: Option<Held>,
    ahead: Ahead,
    /// The first bytes of the frame under way.
    head: Box<[u8]>,
    /// A question of the guest's to a DHCP server, as it is judged and sent.
    question: Box<[u8]>,
    /// A frame that did not fit what was reserved, whole.
    whole: Box<[u8]>,
    /// What of a frame lies beyond the guest's buffers.
    spare: Box<[u8]>,
    complained: bool,
    /// Reasons of drops that were told.
    told: Vec<DropReason>,
    /// How often the guest's lease is looked up.
    look_ups: Rate,
    /// Cards of the guest whose leases were taken up, or that had none.
    met: Vec<MacAddr>,
    counters: Counters,
}

impl LinkEnd {
    pub(super) fn new(mut parts: LinkParts) -> LinkEnd {
        let mut translation = parts.translation.take().map(Translation::new);
        if let Some(translation) = &mut translation {
            translation.nat().limit_flows(parts.limits.clone());
        }
        LinkEnd {
            ip_mtu: parts.ip_mtu.get(),
            gate: Gate::new(&parts.limits),
            translation,
            parts,
            offloads: None,
            attached: true,
            segments: Segments::default(),
            readable: true,
            starved: true,
            meanwhile: Starved::default(),
            large_frames: 0,
            held: None,
            ahead: Ahead::default(),
            head: vec![0; LINK_LONG_HEAD_BYTES + vlan::TAG_BYTES].into(),
            question: vec![0; LINK_LONG_HEAD_BYTES].into(),
            whole: vec![0; FRAME_BYTES_MAX].into(),
            spare: vec![0; FRAME_BYTES_MAX + vlan::TAG_BYTES].into(),
            complained: false,
            look_ups: Rate::new(LEASE_LOOK_UPS_BURST, LEASE_LOOK_UPS_PER_SECOND),
            met: Vec::with_capacity(LEASES_PER_GUEST_MAX),
            told: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Before a receive ring runs the queue gets no frames, if others can have them. To be called once the
    /// queue is watched: a detached one cannot be watched, but stays so.
    pub(super) fn detach(&mut self) {
        self.set_attached(false);
    }

    /// Whether the guest's packets are translated.
    pub(super) fn translates(&self) -> bool {
        self.translation.is_some()
    }

    /// Translation of the guest's packets, if they are translated.
    pub(super) fn nat(&mut self) -> Option<&mut crate::engine::packet::PacketNat> {
        self.translation.as_mut().map(Translation::nat)
    }

    /// Publishes a port of the address on the link; false if a flow of the guest has it, `None` if nothing is translated.
    pub(super) fn publish(&mut self, now: Instant, port: Publish) -> Option<bool> {
        self.translation.as_mut().map(|translation| translation.publish(now, port))
    }

    /// Publishes it no more, and takes a first step of ending its flows; `None` if nothing is translated.
    pub(super) fn unpublish(&mut self, now: Instant, port: &Publish, reset: bool) -> Option<Ended> {
        self.translation.as_mut().map(|translation| translation.unpublish(now, port, reset))
    }

    pub(super) fn queue(&self) -> &TapQueue {
        &self.parts.queue
    }

    /// What was counted, of translation too.
    pub(super) fn counters(&self) -> Counters {
        let mut counters = self.counters.clone();
        if let Some(translation) = &self.translation {
            counters.add(&translation.counters());
        }
        counters
    }

    /// Why the frame at hand was dropped, if it was since this was last asked.
    pub(super) fn take_dropped(&mut self) -> Option<DropReason> {
        let of_translation = self.translation.as_mut().and_then(Translation::take_dropped);
        self.counters.take_dropped().or(of_translation)
    }

    /// The limits were set to something else.
    pub(super) fn limits_changed(&mut self, now: Instant) {
        self.gate.refresh(now);
    }

    /// Whether a frame of the guest that is not for us may leave now.
    pub(super) fn may_leave(&mut self, now: Instant, frame: &TxFrame<'_>) -> bool {
        self.gate.lets_leave(now, (&frame.vnet, frame.whole.len()), &mut self.counters)
    }

    /// A frame that might have left finds the queue full.
    pub(super) fn did_not_leave(&self, frame: &TxFrame<'_>) {
        self.gate.did_not_leave(&frame.vnet, frame.whole.len());
    }

    /// No ring waits for the limit any more.
    pub(super) fn forget_rings(&mut self) {
        self.gate.forget_rings();
    }

    /// Whether rings that wait for the limit are to be tried again.
    pub(super) fn leaves_are_due(&mut self, now: Instant) -> bool {
        self.gate.leaves_are_due(now)
    }

    /// Frames moved so far, both ways.
    pub(super) fn frames(&self) -> u64 {
        self.counters.frames_from_guest + self.counters.frames_to_guest
    }

    /// A receive ring runs: frames may be read, with the offloads of the guest that is there now.
    pub(super) fn rings_up(&mut self, now: Instant, offloads: GuestOffloads) {
        self.set_attached(true);
        self.rings_ready(offloads);
        self.readable = true;
        self.set_starved(now, true);
        self.set_reading(true);
        self.guest_has_buffers();
    }

    /// A ring was started.
    pub(super) fn rings_ready(&mut self, offloads: GuestOffloads) {
        // A detached queue belongs to no interface to be told.
        if self.offloads == Some(offloads) || !self.attached {
            return;
        }
        match self.parts.queue.set_offloads(offloads) {
            Ok(()) => self.offloads = Some(offloads),
            Err(error) => {
                tracing::warn!(link = self.parts.queue.name(), %error, "the offloads of the link cannot be set");
            }
        }
    }

    /// No receive ring runs: what comes for the guest is lost.
    pub(super) fn rings_down(&mut self, now: Instant) {
        self.set_attached(false);
        self.set_reading(false);
        self.starved = true;
        // Other queues get the frames of one that is detached.
        self.set_starved(now, self.attached || !self.parts.queue.is_multi_queue());
        self.held = None;
        let lost = self.ahead.forget() + self.meanwhile.forget();
        self.counters.drop_many(DropReason::GuestNotReceiving, lost);
        self.offloads = None;
    }

    /// Tells the guard whether the queue has a receive ring.
    fn set_reading(&mut self, reading: bool) {
        if let Some(guard) = &mut self.parts.guard {
            guard.set_reading(reading);
        }
    }

    /// Tells the guard whether the queue stands still.
    fn set_starved(&mut self, now: Instant, starved: bool) {
        if let Some(guard) = &mut self.parts.guard {
            guard.set_stalled(now, starved);
        }
    }

    /// The guest is gone or began anew.
    pub(super) fn forget_guest(&mut self, now: Instant) {
        self.met.clear();
        if let Some(guard) = &mut self.parts.guard {
            guard.forget_guest();
        }
        self.forget_translated(now);
    }

    fn set_attached(&mut self, attached: bool) {
        // Our station is there without a guest too.
        let stays = !attached && self.serves_station();
        if self.attached == attached || stays {
            return;
        }
        match self.parts.queue.set_attached(attached) {
            Ok(()) => self.attached = attached,
            Err(error) => {
                tracing::warn!(link = self.parts.queue.name(), %error, attached, "a queue of the link stays");
            }
        }
    }

    /// A front-end asked for an MTU, or left (`None`): the smaller of it and the configured one holds.
    pub(super) fn limit_ip_mtu(&mut self, limit: Option<IpMtu>) {
        let configured = self.parts.ip_mtu.get();
        let ip_mtu = limit.map_or(configured, |limit| limit.get().min(configured));
        if ip_mtu == self.ip_mtu {
            return;
        }
        self.ip_mtu = ip_mtu;
        if let Some(translation) = &mut self.translation {
            translation.set_ip_mtu(ip_mtu);
        }
        if let Err(error) = self.parts.queue.set_ip_mtu(ip_mtu) {
            tracing::warn!(
                link = self.parts.queue.name(), ip_mtu, %error,
                "the link keeps its MTU; longer frames for the guest are dropped"
            );
        }
    }

    /// The queue has frames.
    pub(super) fn is_readable(&mut self) {
        self.readable = true;
    }

    /// The guest posted receive buffers after a lack of them.
    pub(super) fn guest_has_buffers(&mut self) {
        self.starved = false;
    }

    /// Whether a frame of the guest is for a service of ours, and not for the link. One from a MAC address that
    /// is not its own is for nobody: the guard drops it on its way to the link.
    pub(super) fn is_for_us(&mut self, now: Instant, frame: &TxFrame<'_>) -> bool {
        if self.translation.is_some() {
            return self.stays(frame.head);
        }
        let Some(gateway) = self.parts.gateway else { return false };
        let Some(service) = services::is_ours(frame.head, frame.whole.len(), gateway) else { return false };
        if let Some(guard) = &mut self.parts.guard {
            if !guard.is_from_own_mac(now, frame.head) {
                return false;
            }
            if service == Service::Dhcp {
                // Whatever becomes of its address, it is looked up anew.
                guard.forget_leases();
            }
        }
        true
    }

    /// The first frame of one of the guest's cards: the lease it has of a process that is gone is this one's from
    /// now on, so that nobody else gets it, though the guest asks for nothing until it renews.
    fn meet(&mut self, now: Instant, head: &[u8]) {
        if self.parts.gateway.is_none() || self.met.len() >= LEASES_PER_GUEST_MAX {
            return;
        }
        let Ok(header) = ethernet::Header::parse(head) else { return };
        if self.met.contains(&header.src) || !header.src.is_unicast() {
            return;
        }
        let is_own = self.parts.guard.as_mut().is_none_or(|guard| guard.is_from_own_mac(now, head));
        if is_own {
            self.look_up_lease(now, head);
        }
    }

    /// Looks up whether the guest has a lease of our own DHCP, as after a start of this process in the guest's
    /// lifetime. Whether anything was learnt.
    fn look_up_lease(&mut self, now: Instant, head: &[u8]) -> bool {
        let (Some(dhcp), Some(_)) = (&self.parts.dhcp, self.parts.gateway) else { return false };
        let Ok(header) = ethernet::Header::parse(head) else { return false };
        if !matches!(header.ethertype, EtherType::IPV4 | EtherType::ARP) || !self.look_ups.take(now) {
            return false;
        }
        let lease = dhcp.lock().unwrap_or_else(PoisonError::into_inner).resume(now, header.src);
        // What the store cannot say it said itself, where DHCP needs it.
        let Ok(lease) = lease else { return false };
        if !self.met.contains(&header.src) && self.met.len() < LEASES_PER_GUEST_MAX {
            self.met.push(header.src);
        }
        match (lease, &mut self.parts.guard) {
            (Some(lease), Some(guard)) => {
                guard.leased(now, lease.ip, lease.until.map(|until| until.since(now)));
                true
            }
            _ => false,
        }
    }

    /// Sends one frame of the guest.
    pub(super) fn forward(&mut self, now: Instant, frame: &TxFrame<'_>) -> Left {
        let outcome = if self.parts.guard.is_some() && guard::is_question(frame.head, frame.whole.len()) {
            self.forward_question(now, frame)
        } else {
            self.forward_judged(now, frame)
        };
        match outcome {
            Ok(Left::Yes) => {
                self.counters.frames_from_guest += 1;
                self.counters.payload_from_guest_bytes += frame.whole.len() as u64;
                Left::Yes
            }
            Ok(left) => left,
            Err(reason) => {
                self.counters.drop(reason);
                self.tell(reason, frame.head);
                Left::Yes
            }
        }
    }

    fn forward_judged(&mut self, now: Instant, frame: &TxFrame<'_>) -> Result<Left, DropReason> {
        self.judge_own(now, frame)?;
        let rest = frame.whole.range(frame.head.len(), frame.whole.len());
        self.send(frame.vnet, frame.head, &rest)
    }

    /// The same of a question to a DHCP server: it says what it is behind its first bytes, so more of it is copied,
    /// judged by the copy, and sent as it was copied. An address it gives back is given back once it has left.
    fn forward_question(&mut self, now: Instant, frame: &TxFrame<'_>) -> Result<Left, DropReason> {
        let mut copy = std::mem::take(&mut self.question);
        let (judged, behind) = copy.split_at_mut(frame.head.len());
        judged.copy_from_slice(frame.head);
        let len_bytes = judged.len() + frame.whole.range(judged.len(), behind.len()).copy_to(behind);
        let head = &copy[..len_bytes];
        let outcome = self.forward_judged(now, &TxFrame { head, ..*frame });
        if outcome == Ok(Left::Yes)
            && let Some(guard) = &mut self.parts.guard
        {
            guard.question_left(now, head);
        }
        self.question = copy;
        outcome
    }

    /// Judges a frame of the guest.
    fn judge_own(&mut self, now: Instant, frame: &TxFrame<'_>) -> Result<(), DropReason> {
        let len_bytes = frame.whole.len();
        if self.parts.vlan.is_some() && vlan::is_tagged(frame.head) {
            return Err(DropReason::VlanTag);
        }
        self.meet(now, frame.head);
        let mut verdict = self.guarded(now, frame);
        if verdict == Verdict::Drop(DropReason::SpoofedSource) && self.look_up_lease(now, frame.head) {
            verdict = self.guarded(now, frame);
        }
        match verdict {
            Verdict::Pass => lan::check_length(&frame.vnet, len_bytes, self.ip_mtu),
            Verdict::Recheck(probe) => {
                // One that is lost is no worse than an answer that is.
                let _ = self.send(VnetHeader::default(), &probe, &Payload::EMPTY);
                lan::check_length(&frame.vnet, len_bytes, self.ip_mtu)
            }
            Verdict::Drop(reason) => Err(reason),
            Verdict::Probe(probe) => {
                // One that is lost is asked for again.
                let _ = self.send(VnetHeader::default(), &probe, &Payload::EMPTY);
                Err(DropReason::SpoofedSource)
            }
        }
    }

    fn guarded(&mut self, now: Instant, frame: &TxFrame<'_>) -> Verdict {
        match &mut self.parts.guard {
            Some(guard) => guard.from_guest(now, frame.vnet.checksum, frame.head, frame.whole.len()),
            None => Verdict::Pass,
        }
    }

    /// Sends a frame, with the network's tag if it has one.
    fn send(&mut self, vnet: VnetHeader, head: &[u8], rest: &Payload<'_>) -> Result<Left, DropReason> {
        let (addresses, behind) = head.split_at(vlan::TAG_AT);
        let (vnet, tag) = match self.parts.vlan {
            None => (vnet, None),
            Some(id) => (vlan::tagged(vnet)?, Some(vlan::tag(id))),
        };
        let head = [addresses, tag.as_ref().map_or(&[][..], |tag| &tag[..]), behind];
        let queue = &self.parts.queue;
        let header = vnet.emit();
        let mut sent = queue.send(&mut self.segments, &header, head, rest);
        if sent.as_ref().is_err_and(|error| error.raw_os_error().is_none()) {
            // More pieces than one call takes.
            let len = rest.copy_to(&mut self.spare);
            sent = queue.send(&mut self.segments, &header, head, &Payload::from_host(&self.spare[..len]));
        }
        match sent {
            Ok(()) => Ok(Left::Yes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Left::Full),
            Err(error) => {
                self.complain(&error);
                Err(DropReason::LinkRefused)
            }
        }
    }

    /// Says once for each reason what the guest sent that may not leave.
    fn tell(&mut self, reason: DropReason, head: &[u8]) {
        let judged =
            matches!(reason, DropReason::SpoofedSource | DropReason::RogueServer | DropReason::VlanTag);
        if !judged || self.told.contains(&reason) {
            return;
        }
        self.told.push(reason);
        let source = ethernet::Header::parse(head).map(|header| header.src).unwrap_or_default();
        tracing::warn!(
            ?reason, mac = %source,
            "the guest sent what is not its to send; it is dropped, and counted from now on (--trust-guest lets \
             it)"
        );
    }

    fn complain(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(link = self.parts.queue.name(), %error, "the link refuses frames; this is said once");
        }
    }

    /// Moves a batch of frames to the guest. Returns whether more may wait.
    pub(super) fn deliver(&mut self, now: Instant, port: &mut impl GuestPort, pair: QueuePair) -> bool {
        let (mut bytes, mut is_limited) = (0, false);
        for _ in 0..LINK_BATCH_FRAMES {
            if self.starved || !self.has_frames() || bytes >= BATCH_BYTES {
                break;
            }
            if !self.gate.lets_read(now, &mut self.counters) {
                is_limited = true;
                self.set_starved(now, true);
                break;
            }
            match self.step(now, port, pair) {
                Ok(Step::Moved(len)) => bytes += len as u64,
                Ok(Step::Nothing) => {
                    self.readable = false;
                    self.gate.has_read_all();
                    self.meanwhile.read_empty();
                    self.set_starved(now, false);
                }
                Ok(Step::NoBuffers) => {
                    self.starved = true;
                    self.meanwhile.begin(now, self.counters.frames_to_guest);
                    self.set_starved(now, true);
                }
                Err(reason) => self.counters.drop(reason),
            }
        }
        self.gate.ends_reading();
        if self.starved {
            return self.read_for_station(now, port, pair);
        }
        !is_limited && self.has_frames()
    }

    /// Whether frames for the guest wait, here or perhaps in the queue.
    fn has_frames(&self) -> bool {
        self.readable || self.held.is_some() || self.ahead.has_frames() || self.meanwhile.has_frames()
    }

    fn step(&mut self, now: Instant, port: &mut impl GuestPort, pair: QueuePair) -> Result<Step, DropReason> {
        if let Some(held) = self.held {
            return self.send_held(now, port, pair, held);
        }
        if self.meanwhile.has_frames() {
            return self.send_kept(now, port, pair);
        }
        if self.look_ahead(port, pair) {
            return self.deliver_ahead(now, port, pair);
        }
        let least = ethernet::HEADER_BYTES + usize::from(self.ip_mtu);
        let most = if self.large_frames > 0 { FRAME_BYTES_MAX.max(least) } else { least };
        match port.reserve(pair, least, most) {
            Ok(reserved_bytes) => self.receive(now, port, pair, reserved_bytes),
            // The guest takes smaller ones, or none.
            Err(ReserveError::TooSmall) => self.receive(now, port, pair, 0),
            Err(ReserveError::Full | ReserveError::Down) => Ok(Step::NoBuffers),
        }
    }

    /// Reads one frame, with `reserved_bytes` of the guest's buffers reserved; none are if it is 0.
    fn receive(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        reserved_bytes: usize,
    ) -> Result<Step, DropReason> {
        let behind = self.head_bytes(now);
        let mut header = [0; VNET_HEADER_BYTES];
        let head = &mut self.head[..behind + self.parts.vlan.map_or(0, |_| vlan::TAG_BYTES)];
        let rest = match reserved_bytes {
            0 => PayloadMut::from_host(&mut []),
            _ => port.reserved(behind),
        };
        let got = self.parts.queue.receive(&mut self.segments, &mut header, head, rest, &mut self.spare);
        match got {
            Ok((len_bytes, offered)) => {
                self.take(now, port, pair, Got { header, len_bytes, behind, reserved_bytes, offered })
            }
            Err(error) => {
                give_up(port, reserved_bytes);
                self.nothing_read(&error)
            }
        }
    }

    fn tag_bytes(&self) -> usize {
        if self.parts.vlan.is_some() { vlan::TAG_BYTES } else { 0 }
    }

    /// Takes a frame that was read to where it belongs.
    fn take(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        got: Got,
    ) -> Result<Step, DropReason> {
        let Got { header, len_bytes: len, behind, reserved_bytes, offered } = got;
        let tag_bytes = self.tag_bytes();
        self.ahead.note(len);
        let is_large = len > ethernet::HEADER_BYTES + usize::from(self.ip_mtu) + tag_bytes;
        self.large_frames = if is_large { LARGE_FRAMES } else { self.large_frames.saturating_sub(1) };
        let head = &mut self.head[..len.min(behind + tag_bytes)];
        // What is longer than the guest's link is told of, or cut, by who translates it.
        let longest = if self.translation.is_some() { u16::MAX } else { self.ip_mtu };
        let vnet = match judge(&header, head, len, (self.parts.vlan, longest), port.offloads()) {
            Ok(vnet) => vnet,
            Err(reason) => {
                give_up(port, reserved_bytes);
                return Err(reason);
            }
        };
        let (len, head) = (len - tag_bytes, without_tag(head, tag_bytes));
        if let Some(guard) = &mut self.parts.guard {
            guard.to_guest(now, head);
        }
        let arrived = match &mut self.translation {
            Some(translation) => translation.arrived(now, &vnet, head, (len, WorkerSet::default())),
            None => Ok(Arrived::ForGuest),
        };
        let arrived = match arrived {
            Ok(arrived) => arrived,
            Err(reason) => {
                give_up(port, reserved_bytes);
                return Err(reason);
            }
        };
        let goes_on = arrived == Arrived::ForGuest && lan::check_length(&vnet, len, self.ip_mtu).is_ok();
        if goes_on && reserved_bytes > 0 && len <= reserved_bytes.min(behind + offered) {
            port.commit(vnet, head, len);
            return Ok(self.moved(now, &vnet, len));
        }
        self.whole[..head.len()].copy_from_slice(head);
        let mut filled = head.len();
        if reserved_bytes > 0 {
            let rest = port.reserved(behind);
            filled += rest.as_payload().range(0, offered).copy_to(&mut self.whole[filled..len]);
            port.cancel();
        }
        self.whole[filled..len].copy_from_slice(&self.spare[..len - filled]);
        self.place(now, port, pair, arrived, Held { vnet, len_bytes: len })
    }

    /// Ends the way of a frame that lies in `whole`.
    fn place(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        arrived: Arrived,
        held: Held,
    ) -> Result<Step, DropReason> {
        let Held { vnet, len_bytes } = held;
        if arrived != Arrived::ForGuest {
            self.settle_arrival(now, arrived, vnet, len_bytes);
            return Ok(Step::Moved(0));
        }
        if lan::check_length(&vnet, len_bytes, self.ip_mtu).is_err() {
            return self.send_cut(now, port, pair, (vnet, len_bytes));
        }
        if self.starved {
            return self.keep_meanwhile(vnet, len_bytes);
        }
        self.send_held(now, port, pair, held)
    }

    /// First bytes of a frame, without its tag, that are read into host memory.
    fn head_bytes(&mut self, now: Instant) -> usize {
        let awaits_lease = self.parts.guard.as_mut().is_some_and(|guard| guard.awaits_lease(now));
        match &self.translation {
            _ if awaits_lease => LINK_LONG_HEAD_BYTES,
            Some(translation) if translation.awaits_dhcp() => LINK_LONG_HEAD_BYTES,
            Some(_) => FRAME_HEAD_BYTES,
            None => LINK_HEAD_BYTES,
        }
    }

    fn nothing_read(&mut self, error: &io::Error) -> Result<Step, DropReason> {
        match error.kind() {
            io::ErrorKind::WouldBlock => Ok(Step::Nothing),
            io::ErrorKind::Interrupted => Ok(Step::Moved(0)),
            io::ErrorKind::InvalidData => Err(DropReason::Malformed),
            _ => {
                // The interface was deleted, say: there is nothing to wait for.
                self.complain(error);
                Ok(Step::Nothing)
            }
        }
    }

    /// Sends a frame that lies in `whole`, or holds it until there are buffers.
    fn send_held(
        &mut self,
        now: Instant,
        port: &mut impl GuestPort,
        pair: QueuePair,
        held: Held,
    ) -> Result<Step, DropReason> {
        self.held = None;
        match port.send(pair, held.vnet, &self.whole[..held.len_bytes]) {
            Ok(()) => Ok(self.moved(now, &held.vnet, held.len_bytes)),
            Err(ReserveError::Full) => {
                self.held = Some(held);
                Ok(Step::NoBuffers)
            }
            Err(ReserveError::TooSmall | ReserveError::Down) => Err(DropReason::GuestNotReceiving),
        }
    }

    fn moved(&mut self, now: Instant, vnet: &VnetHeader, len_bytes: usize) -> Step {
        self.gate.has_read(now, vnet, len_bytes);
        self.counters.frames_to_guest += 1;
        self.counters.payload_to_guest_bytes += len_bytes as u64;
        Step::Moved(len_bytes)
    }
}

/// Judges a frame for the guest by its header and first bytes, the tag still in place.
fn judge(
    header: &[u8; VNET_HEADER_BYTES],
    head: &[u8],
    mut len_bytes: usize,
    (vlan, ip_mtu): (Option<VlanId>, u16),
    accepted: GuestOffloads,
) -> Result<VnetHeader, DropReason> {
    if head.len() < ethernet::HEADER_BYTES {
        return Err(DropReason::Malformed);
    }
    let mut vnet = VnetHeader::parse(header).map_err(|_| DropReason::Malformed)?;
    if let Some(id) = vlan {
        vnet = vlan::untagged(vnet, head, id)?;
        len_bytes -= vlan::TAG_BYTES;
    }
    if len_bytes > FRAME_BYTES_MAX {
        return Err(DropReason::TooLong);
    }
    lan::check_length(&vnet, len_bytes, ip_mtu)?;
    lan::check_offloads(&vnet, accepted)?;
    Ok(vnet)
}

fn give_up(port: &mut impl GuestPort, reserved_bytes: usize) {
    if reserved_bytes > 0 {
        port.cancel();
    }
}

/// The head without the `tag_bytes` behind its addresses, which are moved up to what follows.
fn without_tag(head: &mut [u8], tag_bytes: usize) -> &mut [u8] {
    head.copy_within(..vlan::TAG_AT, tag_bytes);
    &mut head[tag_bytes..]
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::config::{DnsConfig, GuardConfig, Lan};
    use crate::engine::lan::guard::{SharedTable, StationLease};
    use crate::network::allocator::{Bind, Client, Grant, IpAllocator, Lease, Refusal};
    use crate::network::store::StoreError;
    use crate::service::dhcp::DhcpServer;
    use crate::wire::ipv4;
    use crate::wire::vnet::{Checksum, Gso, GsoKind};

    pub(super) const TSO: GuestOffloads =
        GuestOffloads { checksum: true, tso4: true, tso6: true, ecn: true, uso4: false, uso6: false };

    /// A guest that has `buffers_bytes` of receive buffers.
    pub(super) struct Port {
        pub(super) buffers_bytes: usize,
        open: Vec<u8>,
        reserved: Vec<usize>,
        pub(super) came: VecDeque<(VnetHeader, Vec<u8>)>,
        offloads: GuestOffloads,
    }

    impl Port {
        pub(super) fn new(buffers_bytes: usize) -> Port {
            let (open, reserved, came) = (Vec::new(), Vec::new(), VecDeque::new());
            Port { buffers_bytes, open, reserved, came, offloads: TSO }
        }
    }

    impl GuestPort for Port {
        fn offloads(&self) -> GuestOffloads {
            self.offloads
        }
        fn reserve(&mut self, _: QueuePair, min: usize, max: usize) -> Result<usize, ReserveError> {
            if self.buffers_bytes < min {
                return Err(ReserveError::Full);
            }
            self.open = vec![0; max.min(self.buffers_bytes)];
            self.reserved.push(self.open.len());
            Ok(self.open.len())
        }
        fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_> {
            PayloadMut::from_host(&mut self.open).range(from_bytes, usize::MAX)
        }
        fn commit(&mut self, vnet: VnetHeader, head: &[u8], len_bytes: usize) {
            let mut frame = std::mem::take(&mut self.open);
            frame[..head.len()].copy_from_slice(head);
            frame.truncate(len_bytes);
            self.buffers_bytes -= len_bytes;
            self.came.push_back((vnet, frame));
        }
        fn cancel(&mut self) {
            self.open.clear();
        }
        fn buffers(&self, _: QueuePair) -> usize {
            self.buffers_bytes / 2048
        }
    }

    struct Rig {
        end: LinkEnd,
        far: UnixDatagram,
        port: Port,
    }

    impl Rig {
        fn new(vlan: Option<u16>) -> Rig {
            let (near, far) = UnixDatagram::pair().unwrap();
            far.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            let vlan = vlan.map(|id| VlanId::new(id).unwrap());
            let parts = LinkParts {
                queue: TapQueue::of_socket(near),
                vlan,
                guard: None,
                ip_mtu: IpMtu::DEFAULT,
                gateway: None,
                dhcp: None,
                translation: None,
                limits: RateLimits::default(),
            };
            let mut end = LinkEnd::new(parts);
            end.guest_has_buffers();
            Rig { end, far, port: Port::new(1 << 20) }
        }

        /// What the link would bring: header and frame.
        fn comes(&self, vnet: VnetHeader, frame: &[u8]) {
            self.far.send(&[&vnet.emit()[..], frame].concat()).unwrap();
        }

        fn deliver(&mut self) -> bool {
            self.end.is_readable();
            self.end.deliver(Instant::ZERO, &mut self.port, QueuePair(0))
        }

        fn forward(&mut self, vnet: VnetHeader, frame: &[u8]) -> Left {
            let head = &frame[..frame.len().min(FRAME_HEAD_BYTES)];
            let whole = Payload::from_host(frame);
            self.end.forward(Instant::ZERO, &TxFrame { vnet, head, whole, pair: QueuePair(0) })
        }

        fn left(&self) -> Vec<u8> {
            let mut bytes = vec![0; 1 << 17];
            let len = self.far.recv(&mut bytes).unwrap_or(0);
            bytes.truncate(len);
            bytes
        }

        fn dropped(&self, reason: DropReason) -> u64 {
            self.end.counters().dropped(reason)
        }
    }

    /// A frame of `len` bytes: addresses, IPv4, and a pattern.
    fn frame(len: usize) -> Vec<u8> {
        let mut frame: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
        frame[..14].copy_from_slice(&[2, 2, 2, 2, 2, 2, 4, 4, 4, 4, 4, 4, 8, 0]);
        frame
    }

    fn segmented() -> VnetHeader {
        let gso = Gso { kind: GsoKind::Tcp4, size_bytes: 1448, headers_bytes: 66, ecn: false };
        VnetHeader { checksum: Checksum::Partial { start: 34, offset: 16 }, gso: Some(gso), num_buffers: 0 }
    }

    #[test]
    fn frames_of_any_length_reach_the_guest_whole() {
        let mut rig = Rig::new(None);
        for len in [14, 60, 127, 128, 129, 1513, 1514, 9000, 65_550, 40_000, 66, 1514] {
            let vnet = if len > 1514 { segmented() } else { VnetHeader::default() };
            rig.comes(vnet, &frame(len));
            assert!(!rig.deliver(), "{len}: nothing more waits");
            assert_eq!(rig.port.came.pop_front(), Some((vnet, frame(len))), "{len}");
            rig.port.buffers_bytes = 1 << 20;
        }
        // While frames are long, room for long ones is reserved at once.
        assert!(rig.port.reserved.contains(&FRAME_BYTES_MAX) && rig.port.reserved.contains(&1514));
        assert_eq!(rig.end.counters().frames_to_guest, 12);
    }

    #[test]
    fn a_guest_without_buffers_leaves_frames_in_the_queue() {
        let mut rig = Rig::new(None);
        for len in [100, 5000, 200] {
            rig.comes(if len > 1514 { segmented() } else { VnetHeader::default() }, &frame(len));
        }
        rig.port.buffers_bytes = 1600;
        assert!(!rig.deliver(), "no turn is asked for while there are no buffers");
        assert_eq!(rig.port.came.len(), 1, "the second frame does not fit");
        assert!(!rig.deliver() && !rig.deliver());
        assert_eq!(rig.port.came.len(), 1);
        rig.port.buffers_bytes = 1 << 20;
        rig.end.guest_has_buffers();
        assert!(!rig.end.deliver(Instant::ZERO, &mut rig.port, QueuePair(0)));
        let lengths: Vec<_> = rig.port.came.iter().map(|(_, frame)| frame.len()).collect();
        assert_eq!(lengths, [100, 5000, 200], "in order, none lost");
        assert_eq!(rig.port.came[1].1, frame(5000));
        assert_eq!(rig.end.counters().dropped_total(), 0);
    }

    #[test]
    fn what_the_guest_cannot_take_is_dropped_and_counted() {
        let mut rig = Rig::new(None);
        rig.port.offloads = GuestOffloads::default();
        rig.comes(segmented(), &frame(3000));
        rig.comes(VnetHeader::default(), &frame(1515));
        rig.comes(VnetHeader::default(), &[0; 13]);
        rig.far.send(&[0; 5]).unwrap();
        rig.comes(VnetHeader::default(), &frame(90));
        rig.deliver();
        assert_eq!(rig.port.came.len(), 1);
        assert_eq!(rig.dropped(DropReason::NotNegotiated), 1);
        assert_eq!(rig.dropped(DropReason::TooLong), 1);
        assert_eq!(rig.dropped(DropReason::Malformed), 2);
    }

    #[test]
    fn the_guests_frames_leave_as_they_are_and_wait_when_the_queue_is_full() {
        let mut rig = Rig::new(None);
        assert_eq!(rig.forward(segmented(), &frame(5000)), Left::Yes);
        assert_eq!(rig.left(), [&segmented().emit()[..], &frame(5000)].concat());
        assert_eq!(rig.forward(VnetHeader::default(), &frame(1515)), Left::Yes);
        assert_eq!((rig.left().len(), rig.dropped(DropReason::TooLong)), (0, 1));
        let mut sent = 0;
        while rig.forward(VnetHeader::default(), &frame(1000)) == Left::Yes {
            sent += 1;
            assert!(sent < 100_000, "the queue has a bound");
        }
        assert_eq!(rig.left().len(), 1012);
        assert_eq!(rig.forward(VnetHeader::default(), &frame(1000)), Left::Yes, "there is room again");
        assert_eq!(rig.end.counters().frames_from_guest, sent + 2);
        assert_eq!(rig.end.counters().dropped_total(), 1, "what waits is not lost");
    }

    /// A link with limits, and what they are.
    fn limited(from_guest: &str, to_guest: &str) -> (Rig, RateLimits) {
        let (mut rig, limits) = (Rig::new(None), RateLimits::default());
        limits.from_guest.set(Instant::ZERO, from_guest.parse().unwrap());
        limits.to_guest.set(Instant::ZERO, to_guest.parse().unwrap());
        rig.end.gate = Gate::new(&limits);
        (rig, limits)
    }

    fn ms(n: u64) -> Instant {
        Instant::from_micros(n * 1000)
    }

    #[test]
    fn the_guests_frames_wait_for_the_limit_and_none_is_lost() {
        let (mut rig, limits) = limited("rate=8mbit,burst=3000b", "none");
        let bytes = frame(1000);
        let whole = Payload::from_host(&bytes);
        let sent = TxFrame { vnet: VnetHeader::default(), head: &bytes[..256], whole, pair: QueuePair(0) };
        assert!((0..3).all(|_| rig.end.may_leave(ms(0), &sent)));
        assert!(!rig.end.may_leave(ms(0), &sent));
        assert!(!rig.end.leaves_are_due(ms(0)));
        assert_eq!(rig.end.next_deadline(), Some(ms(1)));
        assert!(rig.end.leaves_are_due(ms(1)) && rig.end.may_leave(ms(1), &sent));
        // A queue that is full has what was taken given back.
        rig.end.did_not_leave(&sent);
        assert!(rig.end.may_leave(ms(1), &sent) && !rig.end.may_leave(ms(1), &sent));
        assert_eq!(rig.end.counters().limited_from_guest.waits, 2);
        limits.from_guest.set(ms(1), "none".parse().unwrap());
        rig.end.limits_changed(ms(1));
        assert!(rig.end.leaves_are_due(ms(1)) && rig.end.may_leave(ms(1), &sent));
        assert_eq!(rig.end.counters().dropped_total(), 0);
    }

    #[test]
    fn the_links_frames_wait_in_its_queue_for_the_limit() {
        let (mut rig, _) = limited("none", "rate=8mbit,burst=3000b");
        rig.port.buffers_bytes = 1 << 30;
        let mut now = ms(0);
        for _ in 0..50 {
            rig.comes(VnetHeader::default(), &frame(1000));
        }
        rig.end.is_readable();
        assert!(!rig.end.deliver(now, &mut rig.port, QueuePair(0)), "no turn is asked for");
        let at_once = rig.port.came.len();
        assert!((2..=4).contains(&at_once), "{at_once}");
        let mut wakeups = 0;
        while rig.port.came.len() < 50 {
            now = rig.end.next_deadline().expect("it goes on");
            rig.end.deliver(now, &mut rig.port, QueuePair(0));
            wakeups += 1;
            assert!(wakeups < 100, "{} came", rig.port.came.len());
        }
        assert!((ms(45)..=ms(50)).contains(&now), "{now:?}");
        let _ = rig.end.deliver(now, &mut rig.port, QueuePair(0));
        let _ = rig.end.deliver(ms(60), &mut rig.port, QueuePair(0));
        assert_eq!(rig.end.next_deadline(), None, "with nothing to read no timer runs");
    }

    #[test]
    fn the_tag_of_the_network_is_added_and_removed() {
        let mut rig = Rig::new(Some(0x123));
        for len in [60, 130, 1514, 5000] {
            let tagged = |frame: &[u8]| [&frame[..12], &[0x81, 0, 0x01, 0x23], &frame[12..]].concat();
            let vnet = if len > 1514 { segmented() } else { VnetHeader::default() };
            let outside = vlan::tagged(vnet).unwrap();
            assert_eq!(rig.forward(vnet, &frame(len)), Left::Yes);
            assert_eq!(rig.left(), [&outside.emit()[..], &tagged(&frame(len))].concat(), "{len}");
            rig.comes(outside, &tagged(&frame(len)));
            rig.deliver();
            assert_eq!(rig.port.came.pop_front(), Some((vnet, frame(len))), "{len}");
        }
        rig.comes(VnetHeader::default(), &frame(60));
        let mut nested = frame(60);
        nested[12..14].copy_from_slice(&[0x81, 0]);
        rig.forward(VnetHeader::default(), &nested);
        rig.deliver();
        assert_eq!((rig.port.came.len(), rig.left().len()), (0, 0));
        assert_eq!(rig.dropped(DropReason::VlanTag), 2);
    }

    /// Leases one address to whoever asks, and counts how often it is asked whether it did.
    #[derive(Debug, Default)]
    struct Counting(Arc<AtomicUsize>);

    impl IpAllocator for Counting {
        fn offer(&mut self, _: Instant, _: &Client<'_>, _: Option<Ipv4Addr>) -> Result<Grant, Refusal> {
            Err(Refusal::Exhausted)
        }
        fn bind(&mut self, _: Instant, _: &Client<'_>, _: Ipv4Addr) -> Result<(Bind, Grant), Refusal> {
            Err(Refusal::Exhausted)
        }
        fn withdraw(&mut self, _: Instant, _: MacAddr) -> Result<(), StoreError> {
            Ok(())
        }
        fn release(&mut self, _: Instant, _: MacAddr, _: Ipv4Addr) -> Result<bool, StoreError> {
            Ok(false)
        }
        fn decline(&mut self, _: Instant, _: MacAddr, _: Ipv4Addr) -> Result<bool, StoreError> {
            Ok(false)
        }
        fn get(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let until = Some(now + Duration::from_secs(60));
            Ok(Some(Lease { mac, ip: Ipv4Addr::new(10, 0, 2, 2), until, host_name: None }))
        }
        fn leases(&mut self, _: Instant) -> Result<Vec<Lease>, StoreError> {
            Ok(Vec::new())
        }
    }

    /// A datagram of the guest without content.
    fn datagram(src: Ipv4Addr, dst: Ipv4Addr, (from, to): (u16, u16)) -> Vec<u8> {
        let mut frame = frame(42);
        let header = ipv4::Header {
            src,
            dst,
            protocol: ipv4::Protocol::UDP,
            ttl: 64,
            tos: 0,
            ident: 1,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset_bytes: 0,
            header_bytes: ipv4::HEADER_BYTES,
            payload_bytes: 8,
        };
        header.emit(&mut frame[14..]);
        let ports = [from.to_be_bytes(), to.to_be_bytes(), 8u16.to_be_bytes(), [0; 2]].concat();
        frame[34..].copy_from_slice(&ports);
        frame
    }

    #[test]
    fn whatever_the_guest_sends_costs_few_look_ups_of_its_lease() {
        let mut rig = Rig::new(None);
        let count = Arc::new(AtomicUsize::new(0));
        let gateway = Ipv4Addr::new(10, 0, 2, 1);
        let subnet = "10.0.2.0/24".parse().unwrap();
        let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let dns = DnsConfig::of_gateway(DnsConfig::DEFAULT_DOMAIN, gateway);
        let server = DhcpServer::over(Box::new(Counting(Arc::clone(&count))), &lan, &dns);
        rig.end.parts.guard = Some(Guard::new(GuardConfig::default(), Arc::default(), 0));
        rig.end.parts.dhcp = Some(Arc::new(Mutex::new(server)));
        rig.end.parts.gateway = Some(lan.gateway);
        let discover = datagram(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, (68, 67));
        let to = Ipv4Addr::new(10, 0, 2, 9);
        let (own, spoofed) = (Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 77));
        let mut now = Instant::ZERO;
        let send = |rig: &mut Rig, now, frame: &[u8]| {
            let frame = TxFrame {
                vnet: VnetHeader::default(),
                head: frame,
                whole: Payload::from_host(frame),
                pair: QueuePair(0),
            };
            if !rig.end.is_for_us(now, &frame) {
                rig.end.forward(now, &frame);
            }
        };
        send(&mut rig, now, &datagram(own, to, (4000, 9)));
        assert_eq!(rig.left().len(), 12 + 42, "its first frame has its lease looked up");
        for _ in 0..1000 {
            send(&mut rig, now, &discover);
            send(&mut rig, now, &datagram(spoofed, to, (4000, 9)));
        }
        assert_eq!(count.load(Ordering::Relaxed), LEASE_LOOK_UPS_BURST as usize);
        for _ in 0..1000 {
            now = now + Duration::from_millis(1);
            send(&mut rig, now, &discover);
            send(&mut rig, now, &datagram(spoofed, to, (4000, 9)));
        }
        let most = LEASE_LOOK_UPS_BURST + LEASE_LOOK_UPS_PER_SECOND;
        assert_eq!(count.load(Ordering::Relaxed), most as usize);
        assert_eq!(rig.left().len(), 0, "none of them left");
        // A moment later its own address is its own again.
        now = now + Duration::from_millis(100);
        send(&mut rig, now, &datagram(own, to, (4000, 9)));
        assert_eq!(rig.left().len(), 12 + 42);
    }

    #[test]
    fn a_question_to_a_server_is_judged_by_what_it_says_behind_its_first_bytes() {
        let mut rig = Rig::new(None);
        let mac = MacAddr([4; 6]);
        let known = [StationLease { mac, addr: Ipv4Addr::new(10, 0, 2, 2), left: None }];
        let table = Arc::new(SharedTable::with_leases(&known));
        rig.end.parts.guard = Some(Guard::new(GuardConfig::default(), table, 0));
        let own = Ipv4Addr::new(10, 0, 2, 2);
        let data = datagram(own, Ipv4Addr::new(10, 0, 2, 9), (4000, 9));
        assert_eq!(rig.forward(VnetHeader::default(), &data), Left::Yes);
        assert_eq!(rig.left().len(), 12 + 42);
        // A RELEASE whose type lies beyond the first 256 bytes.
        let mut message = vec![0; 236];
        message[..3].copy_from_slice(&[1, 1, 6]);
        message[12..16].copy_from_slice(&own.octets());
        message[28..34].copy_from_slice(&mac.0);
        message.extend_from_slice(&[99, 130, 83, 99, 53, 1, 7, 255]);
        let mut release = datagram(own, Ipv4Addr::new(10, 0, 2, 1), (68, 67));
        release[38..40].copy_from_slice(&(8 + message.len() as u16).to_be_bytes());
        release.extend_from_slice(&message);
        let mut header = ipv4::Header::parse(&release[14..], 28).unwrap();
        header.payload_bytes = 8 + message.len();
        header.emit(&mut release[14..]);
        assert_eq!(rig.forward(VnetHeader::default(), &release), Left::Yes);
        assert_eq!(rig.left(), [&VnetHeader::default().emit()[..], &release].concat(), "whole, as it was");
        assert_eq!(rig.forward(VnetHeader::default(), &data), Left::Yes);
        assert_eq!((rig.left().len(), rig.dropped(DropReason::SpoofedSource)), (0, 1), "it has gone");
    }

    #[test]
    fn the_guard_drops_counts_and_asks_on_the_guests_behalf() {
        let mut rig = Rig::new(Some(9));
        rig.end.parts.guard = Some(Guard::new(GuardConfig::default(), Arc::default(), 0));
        rig.end.rings_up(Instant::ZERO, TSO);
        assert!(!rig.deliver(), "all is read");
        // UDP over IPv6 from an address nobody has asked for.
        let mut data = frame(14 + 40 + 8);
        data[12..14].copy_from_slice(&[0x86, 0xdd]);
        data[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 8, 17, 64]);
        data[22..38].copy_from_slice(&[0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(rig.forward(VnetHeader::default(), &data), Left::Yes);
        let probe = rig.left();
        assert_eq!(probe.len(), 12 + 4 + guard::PROBE_BYTES, "a probe, in the guest's VLAN");
        assert_eq!(probe[24..28], [0x81, 0, 0, 9]);
        assert_eq!(probe[12 + 4 + 54 + 8..][..16], data[22..38], "asks for the packet's source");
        assert_eq!(rig.left().len(), 0, "the packet itself does not leave");
        rig.end.parts.vlan = None;
        assert_eq!(rig.forward(VnetHeader::default(), &frame(60)), Left::Yes);
        assert_eq!(rig.left().len(), 0);
        assert_eq!(rig.dropped(DropReason::SpoofedSource) + rig.dropped(DropReason::Malformed), 2);
        assert_eq!(rig.end.counters().frames_from_guest, 0);
    }
}
