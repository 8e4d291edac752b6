//! Translation of packets, not of connections: the guests' subnet behind one address of a link.
//!
//! Frames are judged and changed by their first bytes alone; payload stays where it is. Nothing here makes a
//! system call, reads a clock or keeps a frame but a bounded few fragments. IPv4 only.
//!
//! A frame is read once (`head.rs`), its flow found (`table.rs`) or begun with an end outside (`ports.rs`), for TCP judged by
//! what both ends said (`tcp_state.rs`), and changed in place (`rewrite.rs`). Most
//! packets take a shorter way to the same end (`plain.rs`). ICMP errors are translated with the packet they quote
//! (`icmp.rs`), fragments follow their first (`fragments.rs`). A flow is one entry for both directions, so the
//! reply to what was translated translates back whatever happens to mappings meanwhile. A packet to the outside
//! address itself passes twice, out and in again: each of its ends has a flow of its own.
//!
//! Flows are one worker's; mappings are shared by all, and touched when a flow begins or ends.
//!
//! Read first: RFC 3022 (what such a NAT is), RFC 4787, 5382 and 5508 (what it owes UDP, TCP and ICMP), RFC 7857.

mod answers;
mod cache;
pub mod config;
pub mod cut;
pub mod echo;
pub mod flow;
pub mod fragments;
mod guests;
pub mod head;
pub mod icmp;
mod index;
mod inward;
mod listing;
pub mod moving;
mod outward;
mod plain;
pub mod ports;
pub mod random;
pub mod resets;
pub mod rewrite;
pub mod table;
pub mod tcp_state;
mod wheel;

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;

use self::answers::Answers;
use self::config::{PacketNatConfig, PublishedPort};
use self::flow::{Flow, FlowFlags, FlowKey, Ticks};
use self::fragments::{Fragments, Way};
use self::head::{Packet, Transport, View};
use self::ports::{Grant, GuestEnd, Mappings, Scope};
use self::resets::{Reset, Resets};
use self::rewrite::{End, NewEnd, take_hop, translate};
use self::table::{FlowIndex, FlowTable, TableConfig, TableError};
use self::tcp_state::{Direction, TcpTracker, TcpVerdict};
use super::counters::{Counters, DropReason};
use super::flows::NewsList;
use super::placement::WorkerId;
use crate::config::{self as settings, UdpFiltering, UdpMapping};
use crate::rate_limit::RateLimits;
use crate::time::Instant;
use crate::wire::icmpv4::{Message, UnreachableCode};
use crate::wire::ipv4::Protocol;
use crate::wire::vnet::VnetHeader;

/// Port of DNS, whose flows are one question each.
const DNS_PORT: u16 = 53;

/// Where a packet came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The guest.
    Guest,
    /// The link outside.
    World,
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It goes to the other side, changed from its IP header on; the caller writes the Ethernet addresses, and cuts what is
    /// longer than that link ([`cut::cut`]).
    Forward,
    /// It goes back to the guest's side, changed likewise.
    Hairpin,
    /// It is for the gateway's own services, or for those of the station outside; unchanged.
    Ours,
    /// It goes nowhere, and its sender is told so: the first so many bytes of [`PacketNat::answer`] are a frame for it.
    Answer(usize),
    /// A fragment whose first has not come: the whole frame is to be handed to [`PacketNat::hold`].
    Hold,
    /// Its flow is another worker's, to which it is to be handed, unchanged.
    Elsewhere(WorkerId),
    /// It goes nowhere.
    Drop(DropReason),
}

/// A frame that was held, and what has become of it.
#[derive(Debug)]
pub struct Released {
    /// Where it came from.
    pub side: Side,
    /// As for a frame that was just judged; never [`Verdict::Hold`] or [`Verdict::Answer`].
    pub verdict: Verdict,
    /// The whole frame. Its virtio-net header says nothing.
    pub frame: Box<[u8]>,
}

/// What became of a packet on the short way (`plain.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passage {
    /// It is on its way.
    Done,
    /// It is as it came, and to go the general way.
    General,
    /// The same, and no flow has it: it need not be looked for again.
    Unknown,
}

/// Why a packet is not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// Nobody is told.
    Silent(DropReason),
    /// Its sender is.
    Told(Message, DropReason),
    /// Another worker will.
    Elsewhere(WorkerId),
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Refusal {
        Refusal::Silent(reason)
    }
}

impl Refusal {
    /// Its sender is told that the destination is unreachable.
    fn unreachable(code: UnreachableCode, reason: DropReason) -> Refusal {
        Refusal::Told(Message::Unreachable { code, next_hop_mtu: 0 }, reason)
    }
}

/// The packet NAT of one worker.
#[derive(Debug)]
pub struct PacketNat {
    config: PacketNatConfig,
    lifetimes: Lifetimes,
    table: FlowTable,
    mappings: Arc<Mutex<Mappings>>,
    from_guest: Fragments,
    from_world: Fragments,
    released: VecDeque<Released>,
    /// Addresses the guest sent datagrams to, by external port, with their flows; kept only where filtering asks
    /// for it.
    spoken_to: HashMap<(u16, Ipv4Addr), u32, foldhash::quality::RandomState>,
    answers: Answers,
    moving: moving::Moving,
    resets: Resets,
    counters: Counters,
    flow_news: NewsList,
    /// No flow may begin any more.
    draining: bool,
    /// How many flows may begin.
    limits: RateLimits,
}

/// Lifetimes of flows in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Lifetimes {
    tcp_established: u32,
    tcp_transitory: u32,
    udp: u32,
    udp_unanswered: u32,
    dns: u32,
    icmp: u32,
    other: u32,
}

impl Lifetimes {
    fn of(timeouts: &config::Timeouts) -> Lifetimes {
        let ms = |time: std::time::Duration| {
            u32::try_from(time.min(Ticks::SPAN_MAX).as_millis()).expect("within the span")
        };
        Lifetimes {
            tcp_established: ms(timeouts.tcp.established),
            tcp_transitory: ms(timeouts.tcp.transitory),
            udp: ms(timeouts.udp),
            udp_unanswered: ms(timeouts.udp_unanswered),
            dns: ms(timeouts.dns),
            icmp: ms(timeouts.icmp),
            other: ms(timeouts.other),
        }
    }

    fn of_tcp(&self, tcp: &TcpTracker) -> u32 {
        if tcp.is_assured() { self.tcp_established } else { self.tcp_transitory }
    }

    fn of_udp(&self, flow: FlowFlags, remote_port: u16) -> u32 {
        match flow.has(FlowFlags::SEEN_REPLY) {
            _ if remote_port == DNS_PORT => self.dns,
            true => self.udp,
            false => self.udp_unanswered,
        }
    }
}

impl PacketNat {
    /// A NAT without flows, which shares `mappings` with those of other workers.
    ///
    /// # Errors
    /// [`TableError`] if there is no table for so many flows.
    pub fn new(
        config: PacketNatConfig,
        mappings: Arc<Mutex<Mappings>>,
        now: Instant,
    ) -> Result<PacketNat, TableError> {
        let table = FlowTable::new(&table_config(&config), now)?;
        if is_publisher(&config) {
            publish(&mut lock(&mappings), &config);
        }
        Ok(PacketNat {
            lifetimes: Lifetimes::of(&config.timeouts),
            table,
            mappings,
            from_guest: Fragments::default(),
            from_world: Fragments::default(),
            released: VecDeque::new(),
            spoken_to: HashMap::default(),
            answers: Answers::default(),
            moving: moving::Moving::default(),
            resets: Resets::default(),
            counters: Counters::default(),
            flow_news: NewsList::default(),
            draining: false,
            limits: RateLimits::default(),
            config,
        })
    }

    /// Takes a frame of the guest.
    pub fn from_guest(&mut self, now: Instant, packet: &mut Packet<'_>) -> Verdict {
        self.counters.frames_from_guest += 1;
        match self.pass_outward(now, packet) {
            Passage::Done => Verdict::Forward,
            general => self.judge_from_guest(now, packet, general),
        }
    }

    #[cold]
    fn judge_from_guest(&mut self, now: Instant, packet: &mut Packet<'_>, known: Passage) -> Verdict {
        match self.judge_outward(now, packet, known) {
            Ok(verdict) => self.noted(verdict),
            Err(refusal) => self.refuse(now, Side::Guest, packet, refusal),
        }
    }

    /// Takes a frame of the link outside.
    pub fn from_world(&mut self, now: Instant, packet: &mut Packet<'_>) -> Verdict {
        match self.pass_inward(now, packet) {
            Passage::Done => {
                self.counters.frames_to_guest += 1;
                Verdict::Forward
            }
            general => self.judge_from_world(now, packet, general),
        }
    }

    #[cold]
    fn judge_from_world(&mut self, now: Instant, packet: &mut Packet<'_>, known: Passage) -> Verdict {
        match self.judge_inward(now, packet, known) {
            Ok(verdict) => {
                self.counters.frames_to_guest += u64::from(verdict == Verdict::Forward);
                self.noted(verdict)
            }
            Err(refusal) => self.refuse(now, Side::World, packet, refusal),
        }
    }

    /// Whether it has so many flows that [`PacketNat::expect`] saves time.
    pub fn is_large(&self) -> bool {
        self.table.is_large()
    }

    /// Frames from `side` that will be handed over next begin with `heads`: what their flows need is fetched meanwhile, of
    /// [`limits::PACKET_AHEAD_FRAMES`](crate::limits::PACKET_AHEAD_FRAMES) at a time. No verdict depends on it, and heads may say anything.
    pub fn expect<'a>(&self, side: Side, heads: impl Iterator<Item = &'a [u8]>) {
        match side {
            Side::Guest => self.table.expect_outbound(heads.map(plain::outbound_at_first_sight)),
            Side::World => self.table.expect_inbound(heads.map(plain::inbound_at_first_sight)),
        }
    }

    /// The frame of the last [`Verdict::Answer`], whose Ethernet addresses the caller writes.
    pub fn answer(&self) -> &[u8] {
        self.answers.frame()
    }

    /// Takes a copy of a whole frame whose verdict was [`Verdict::Hold`].
    pub fn hold(&mut self, now: Instant, side: Side, frame: &[u8]) {
        let mut head = [0u8; crate::limits::FRAME_HEAD_BYTES];
        let head_bytes = frame.len().min(head.len());
        let head = &mut head[..head_bytes];
        head.copy_from_slice(&frame[..head_bytes]);
        let view = View::read(&Packet::new(&VnetHeader::default(), head, frame.len()));
        let lost = match view {
            Ok(view) => self.fragments(side).hold(now, &view.ip, frame),
            Err(_) => 1,
        };
        self.counters.drop_many(DropReason::FragmentHole, lost);
    }

    /// The next frame that was held and waits no more. Looked for after each [`Verdict`] of a fragment.
    pub fn pop_released(&mut self) -> Option<Released> {
        self.released.pop_front()
    }

    /// Ends what has had its time. Bounded: what is left over is due at [`PacketNat::next_deadline`].
    pub fn tick(&mut self, now: Instant) {
        let lost = self.from_guest.expire(now) + self.from_world.expire(now);
        self.counters.drop_many(DropReason::FragmentHole, lost);
        let PacketNat { table, mappings, spoken_to, config, flow_news, .. } = self;
        let mut shared = None;
        table.expire(now, |flow| {
            let mappings = shared.get_or_insert_with(|| lock(mappings));
            give_back(mappings, spoken_to, config, &flow);
            flow_news.note(|| listing::news(false, &flow));
        });
    }

    /// The next reset of a connection that was ended here, for its sender to address.
    pub fn pop_reset(&mut self) -> Option<Reset> {
        self.resets.pop()
    }

    /// When [`PacketNat::tick`] has something to do, or resets wait.
    pub fn next_deadline(&self) -> Option<Instant> {
        if !self.resets.is_empty() {
            return Some(Instant::ZERO);
        }
        let fragments = [self.from_guest.next_deadline(), self.from_world.next_deadline()];
        fragments.into_iter().chain([self.table.next_deadline()]).flatten().min()
    }

    /// The address outside is `outside` from now on. Flows through another end.
    ///
    /// # Errors
    /// [`TableError`] if there is no memory for a fresh table; the NAT is as before then.
    pub fn set_outside(&mut self, now: Instant, outside: Option<Ipv4Addr>) -> Result<(), TableError> {
        if self.config.outside == outside {
            return Ok(());
        }
        self.forget(now)?;
        self.config.outside = outside;
        Ok(())
    }

    /// Ends all flows: the guest began anew.
    ///
    /// # Errors
    /// As [`PacketNat::set_outside`].
    pub fn forget(&mut self, now: Instant) -> Result<(), TableError> {
        let fresh = FlowTable::new(&table_config(&self.config), now)?;
        let mut mappings = lock(&self.mappings);
        for flow in self.table.iter() {
            give_back(&mut mappings, &mut self.spoken_to, &self.config, flow);
            self.flow_news.note(|| listing::news(false, flow));
        }
        drop(mappings);
        self.table = fresh;
        self.from_guest = Fragments::default();
        self.from_world = Fragments::default();
        self.released.clear();
        self.moving = moving::Moving::default();
        self.resets = Resets::default();
        Ok(())
    }

    /// The MTUs of the guest's link and of the one outside, in bytes.
    pub fn set_ip_mtus(&mut self, guest: u16, outside: u16) {
        self.config.guest_ip_mtu = guest;
        self.config.outside_ip_mtu = outside;
    }

    /// These ports lead to guests from now on, instead of those before. Flows under way through one that is gone go on.
    /// Returns how many do not yet, because flows have them: see [`PacketNat::publish_again`].
    ///
    /// Ports are all workers', and the first worker's to publish: one that heard of a guest later than others would take
    /// away what they gave to the next. With another worker nothing happens.
    pub fn set_published(&mut self, ports: Vec<PublishedPort>) -> usize {
        if !is_publisher(&self.config) {
            return 0;
        }
        let mut mappings = lock(&self.mappings);
        for port in &self.config.published {
            let [end, stand_in] = published_ends(port);
            mappings.unpublish(end);
            mappings.unpublish(stand_in);
        }
        self.config.published = ports;
        publish(&mut mappings, &self.config)
    }

    /// Publishes what could not be: flows that had the ports may have ended. Returns how many are left.
    pub fn publish_again(&mut self) -> usize {
        if is_publisher(&self.config) { publish(&mut lock(&self.mappings), &self.config) } else { 0 }
    }

    /// Whether a port of the outside address leads to a guest.
    pub fn is_published(&self, protocol: settings::Protocol, port: u16) -> bool {
        let held = lock(&self.mappings).of_port(published_protocol(protocol), port, Ipv4Addr::UNSPECIFIED);
        held.is_some_and(|held| held.leads_to.is_some())
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Why the packet at hand was dropped, if it was since this was last asked.
    pub fn take_dropped(&mut self) -> Option<DropReason> {
        self.counters.take_dropped()
    }

    /// The flows, to look at.
    pub fn table(&self) -> &FlowTable {
        &self.table
    }

    fn fragments(&mut self, side: Side) -> &mut Fragments {
        match side {
            Side::Guest => &mut self.from_guest,
            Side::World => &mut self.from_world,
        }
    }

    /// Counts a later fragment that goes nowhere.
    fn noted(&mut self, verdict: Verdict) -> Verdict {
        if let Verdict::Drop(reason) = verdict {
            self.counters.drop(reason);
        }
        verdict
    }

    /// What becomes of a packet its flow does not take: of a connection that was begun here and went on through another
    /// worker, that one knows the rest.
    fn not_taken(&self, at: FlowIndex, packet: &Packet<'_>, reason: DropReason) -> Refusal {
        let key = self.table.flow(at).key();
        let workers = lock(&self.mappings).workers_of_port(key.protocol, key.external_port, key.remote);
        self.another(workers, packet).map_or(Refusal::Silent(reason), Refusal::Elsewhere)
    }

    fn refuse(&mut self, now: Instant, side: Side, packet: &Packet<'_>, refusal: Refusal) -> Verdict {
        let reason = match refusal {
            Refusal::Elsewhere(worker) => return Verdict::Elsewhere(worker),
            Refusal::Silent(reason) => reason,
            Refusal::Told(message, reason) => {
                let from = match side {
                    Side::Guest => Some(self.config.gateway),
                    Side::World => self.config.outside,
                };
                match from.map(|from| self.answers.answer(now, from, message, packet)) {
                    Some(Ok(len_bytes)) => {
                        self.counters.drop(reason);
                        return Verdict::Answer(len_bytes);
                    }
                    Some(Err(Some(withheld))) => withheld,
                    Some(Err(None)) | None => reason,
                }
            }
        };
        self.counters.drop(reason);
        Verdict::Drop(reason)
    }

    /// Judges hops and length before anything is changed.
    fn check_passage(view: &View, packet: &Packet<'_>, ip_mtu: u16) -> Result<(), Refusal> {
        if view.ip.ttl <= 1 {
            return Err(Refusal::Told(Message::TimeExceeded { code: 0 }, DropReason::HopLimit));
        }
        let whole = view.ip.header_bytes + view.ip.payload_bytes;
        let longest = match packet.vnet.gso {
            // What it is cut into: its headers, as far as they are repeated, and the payload of one segment.
            Some(gso) => {
                let transport_bytes = match view.ip.protocol {
                    Protocol::TCP => usize::from(packet.head[view.transport_at + 12] >> 4) * 4,
                    _ => crate::wire::udp::HEADER_BYTES,
                };
                whole.min(view.ip.header_bytes + transport_bytes + usize::from(gso.size_bytes))
            }
            None => whole,
        };
        if longest <= usize::from(ip_mtu) {
            return Ok(());
        }
        if view.ip.dont_fragment {
            let code = UnreachableCode::FragmentationNeeded;
            let message = Message::Unreachable { code, next_hop_mtu: ip_mtu };
            return Err(Refusal::Told(message, DropReason::TooLong));
        }
        // Cut where it leaves ([`cut::cut`]), which segments cannot be.
        if packet.vnet.gso.is_some() { Err(DropReason::TooLong.into()) } else { Ok(()) }
    }

    /// Lets the flow take a packet of any kind.
    fn advance_any(
        &mut self,
        now: Instant,
        at: FlowIndex,
        side: Side,
        view: &View,
        head: &[u8],
    ) -> Result<(), DropReason> {
        let liberal = self.config.liberal;
        let judge = |tcp: &mut TcpTracker, from| {
            let verdict = tcp.take(from, &view.segment(head), liberal);
            if verdict == TcpVerdict::Accepted && view.ip.more_fragments {
                tcp.loosen();
            }
            verdict
        };
        self.advance(now, at, side, view.ip.protocol, judge)
    }

    /// Lets the flow take a packet from `side`: has TCP judged, and renews its time.
    #[inline(always)]
    fn advance(
        &mut self,
        now: Instant,
        at: FlowIndex,
        side: Side,
        protocol: Protocol,
        judge: impl FnOnce(&mut TcpTracker, Direction) -> TcpVerdict,
    ) -> Result<(), DropReason> {
        let flow = self.table.flow_mut(at);
        let begun_by = if flow.flags.has(FlowFlags::FROM_WORLD) { Side::World } else { Side::Guest };
        let direction = if side == begun_by { Direction::Original } else { Direction::Reply };
        let lifetime_ms = match protocol {
            Protocol::TCP => {
                match judge(&mut flow.tcp, direction) {
                    TcpVerdict::Accepted => {}
                    TcpVerdict::Unproven => return Ok(()),
                    TcpVerdict::Invalid => return Err(DropReason::OutOfWindow),
                }
                let set = if flow.tcp.is_assured() { FlowFlags::set } else { FlowFlags::clear };
                set(&mut flow.flags, FlowFlags::ASSURED);
                self.lifetimes.of_tcp(&flow.tcp)
            }
            Protocol::UDP => {
                if direction == Direction::Reply {
                    flow.flags.set(FlowFlags::SEEN_REPLY);
                } else if flow.flags.has(FlowFlags::SEEN_REPLY) {
                    flow.flags.set(FlowFlags::ASSURED);
                } else if side == Side::World {
                    // A stranger without an answer keeps nothing alive (RFC 4787, REQ-6).
                    return Ok(());
                }
                self.lifetimes.of_udp(flow.flags, flow.key().remote_port)
            }
            Protocol::ICMP => self.lifetimes.icmp,
            _ => self.lifetimes.other,
        };
        self.table.touch(at, Ticks::at(now), lifetime_ms);
        Ok(())
    }

    /// Takes a new flow in, which has its end outside already; gives that back if there is no room.
    fn begin(&mut self, now: Instant, key: FlowKey, flags: FlowFlags, tcp: TcpTracker) -> Option<FlowIndex> {
        let outside = self.config.outside?;
        let lifetime_ms = match key.protocol {
            Protocol::TCP => self.lifetimes.of_tcp(&tcp),
            Protocol::UDP => self.lifetimes.of_udp(flags, key.remote_port),
            Protocol::ICMP => self.lifetimes.icmp,
            _ => self.lifetimes.other,
        };
        let mut flow = Flow::new(key, flags, Ticks::at(now), lifetime_ms);
        flow.tcp = tcp;
        flow.deltas =
            flow::ChecksumDeltas::between((key.guest, key.guest_port), (outside, key.external_port));
        if self.keeps_spoken_to(&flow) {
            *self.spoken_to.entry((key.external_port, key.remote)).or_default() += 1;
        }
        let spare = flow.clone();
        let inserted = self.table.insert(flow).ok().and_then(|id| self.table.get(id));
        if inserted.is_some() {
            self.counters.flows_opened += 1;
            self.flow_news.note(|| listing::news(true, &spare));
        } else {
            give_back(&mut lock(&self.mappings), &mut self.spoken_to, &self.config, &spare);
        }
        inserted
    }

    /// Makes room for another flow of `guest`: the longest idle one goes.
    fn make_room(&mut self, guest: Ipv4Addr) {
        while let Some(victim) = self.table.crowded(guest) {
            let Some(flow) = self.table.remove(victim) else { return };
            self.counters.flows_evicted += 1;
            self.flow_news.note(|| listing::news(false, &flow));
            give_back(&mut lock(&self.mappings), &mut self.spoken_to, &self.config, &flow);
        }
    }

    fn keeps_spoken_to(&self, flow: &Flow) -> bool {
        keeps_spoken_to(&self.config, flow)
    }

    /// A later fragment goes where its packet's first went.
    fn follow(&mut self, now: Instant, side: Side, head: &mut [u8], view: &View) -> Verdict {
        match self.fragments(side).way(now, &view.ip) {
            Some(way) => go(head, view, way),
            None => Verdict::Hold,
        }
    }

    /// Where the first fragment of `ip` went, if it was one; those that overtook it go there too.
    fn lead(&mut self, now: Instant, side: Side, first: &View, way: Way) {
        if !first.ip.more_fragments {
            return;
        }
        self.fragments(side).remember(now, &first.ip, way);
        while let Some(mut frame) = self.fragments(side).take_held(&first.ip) {
            let len_bytes = frame.len();
            let view = View::read(&Packet::new(&VnetHeader::default(), &mut frame, len_bytes));
            let Ok(view) = view else { continue };
            let verdict = go(&mut frame, &view, way);
            let verdict = self.noted(verdict);
            self.released.push_back(Released { side, verdict, frame });
        }
    }
}

/// Sends a later fragment on its way.
fn go(head: &mut [u8], view: &View, way: Way) -> Verdict {
    match way {
        Way::Elsewhere(worker) => Verdict::Elsewhere(worker),
        Way::Ours => Verdict::Ours,
        Way::On { .. } if view.ip.ttl <= 1 => Verdict::Drop(DropReason::HopLimit),
        Way::On { src, dst, hairpin } => {
            for (end, old, addr) in [(End::Source, view.ip.src, src), (End::Destination, view.ip.dst, dst)] {
                let deltas = flow::ChecksumDeltas::between((old, 0), (addr, 0));
                translate(head, view, &NewEnd { end, addr, port: 0, deltas });
            }
            take_hop(head);
            if hairpin { Verdict::Hairpin } else { Verdict::Forward }
        }
    }
}

fn table_config(config: &PacketNatConfig) -> TableConfig {
    let PacketNatConfig { flows_max, guest_flows_max, seed, .. } = *config;
    TableConfig { flows_max, guest_flows_max, seed }
}

/// A panic while mappings are changed ends the process (panic = abort); elsewhere they are whole.
fn lock(mappings: &Mutex<Mappings>) -> MutexGuard<'_, Mappings> {
    mappings.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keeps_spoken_to(config: &PacketNatConfig, flow: &Flow) -> bool {
    config.udp.filtering == UdpFiltering::AddressDependent
        && flow.key().protocol == Protocol::UDP
        && !flow.flags.has(FlowFlags::FROM_WORLD)
}

/// What a flow that has ended held outside is free again.
fn give_back(
    mappings: &mut Mappings,
    spoken_to: &mut HashMap<(u16, Ipv4Addr), u32, foldhash::quality::RandomState>,
    config: &PacketNatConfig,
    flow: &Flow,
) {
    let key = flow.key();
    if keeps_spoken_to(config, flow)
        && let hashbrown::hash_map::Entry::Occupied(mut flows) =
            spoken_to.entry((key.external_port, key.remote))
    {
        *flows.get_mut() -= 1;
        if *flows.get() == 0 {
            flows.remove();
        }
    }
    let grant = Grant { external_port: key.external_port, shared: flow.flags.has(FlowFlags::PORT_SHARED) };
    let is_published = flow.flags.has(FlowFlags::PUBLISHED);
    let (end, scope) = if is_published || flow.flags.has(FlowFlags::FROM_WORLD) {
        // Two ports may lead to one end; what holds the second is a stand-in. Who was let in otherwise joined what the port
        // speaks to, which may be another remote end.
        let held = mappings.of_port(key.protocol, key.external_port, key.remote);
        let scope = if is_published { Scope::World } else { scope(config, &key) };
        held.map_or((guest_end(&key), scope), |held| (held.guest, held.scope))
    } else {
        (guest_end(&key), scope(config, &key))
    };
    mappings.end(end, scope, grant);
}

/// The guest's end of a flow.
const fn guest_end(key: &FlowKey) -> GuestEnd {
    GuestEnd { protocol: key.protocol, addr: key.guest, port: key.guest_port }
}

/// How much of the world the mapping of a flow speaks to.
fn scope(config: &PacketNatConfig, key: &FlowKey) -> Scope {
    match (key.protocol, config.udp.mapping) {
        (Protocol::UDP, UdpMapping::AddressAndPortDependent) => Scope::End(key.remote, key.remote_port),
        (Protocol::TCP | Protocol::UDP | Protocol::ICMP, _) => Scope::World,
        _ => Scope::Address(key.remote),
    }
}

const fn published_protocol(protocol: settings::Protocol) -> Protocol {
    match protocol {
        settings::Protocol::Tcp => Protocol::TCP,
        settings::Protocol::Udp => Protocol::UDP,
    }
}

/// Whom a published port is mapped to: the guest's end, and what stands in for it where that has another port outside.
fn published_ends(port: &PublishedPort) -> [GuestEnd; 2] {
    let protocol = published_protocol(port.protocol);
    [
        GuestEnd { protocol, addr: port.guest, port: port.guest_port },
        GuestEnd { protocol, addr: Ipv4Addr::UNSPECIFIED, port: port.port },
    ]
}

/// Whether ports are published by the worker of these settings.
fn is_publisher(config: &PacketNatConfig) -> bool {
    config.worker == WorkerId(0)
}

/// Has published ports lead to their guests, and keeps them from being given to others. Returns how many have other
/// mappings still.
fn publish(mappings: &mut Mappings, config: &PacketNatConfig) -> usize {
    let mut missing = 0;
    for port in &config.published {
        // Nobody else could answer.
        if !config.subnet.is_host(port.guest) || port.guest == config.gateway {
            continue;
        }
        let [end, stand_in] = published_ends(port);
        // Asked even where it is held already: flows may have kept it while it led nowhere.
        let is_held = mappings.publish(end, port.port)
            || mappings.publish_for(stand_in, port.port, (port.guest, port.guest_port));
        missing += usize::from(!is_held);
    }
    missing
}

/// The tracker of a flow that begins with this packet; none if it can begin none.
fn first_segment(view: &View, head: &[u8], pick_up: bool) -> Option<TcpTracker> {
    match (view.ip.protocol, view.transport) {
        (Protocol::TCP, Transport::Ports { .. }) => TcpTracker::begin(&view.segment(head), pick_up),
        _ => Some(TcpTracker::default()),
    }
}
