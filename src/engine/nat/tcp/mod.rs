//! TCP flows: the table, its life cycle and the batch's end.

mod backlog;
mod flow;
mod limited;
mod listing;
mod output;
mod pool;
mod round_trip;
mod scoreboard;
mod segment;
mod turns;

use std::hash::Hasher;
use std::io;
use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;
use siphasher::sip::SipHasher13;
use slab::Slab;

use backlog::Backlog;
use flow::{Ecn, Origin, State};
pub use flow::{Fate, Flow, Key, Moved};
use output::After;
use pool::Budget;
use turns::Turns;

use super::TokenKind;
use crate::config::{self, Publish};
use crate::engine::core::{Core, Neighbour};
use crate::engine::counters::DropReason;
use crate::engine::emit;
use crate::engine::flows::{Carried, Ended, ending_step};
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::{HostStream, Readiness, Token};
use crate::engine::lru::Lru;
use crate::engine::placement::Place;
use crate::frame::Payload;
use crate::limits;
use crate::rate_limit::Cost;
use crate::time::Instant;
use crate::wire::ipv4;
use crate::wire::tcp::{Flags, Header, Options, SeqNumber};
use crate::wire::{icmpv4::UnreachableCode, ipv4::Protocol};

/// Flows of a usual batch, for which lists have room from the start.
const BATCH_FLOWS: usize = 64;

/// A TCP segment of the guest, parsed.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Both ends.
    pub key: Key,
    /// Who sent it.
    pub from: Neighbour,
    /// The header.
    pub header: Header,
    /// A router in the guest marked it: congestion (RFC 3168, 5).
    pub is_marked: bool,
    /// Payload in guest memory.
    pub payload: Payload<'a>,
}

/// All TCP flows of an engine.
#[derive(Debug)]
pub struct TcpTable<S> {
    flows: Slab<Flow<S>>,
    by_key: HashMap<Key, usize, foldhash::quality::RandomState>,
    /// Flows that hold a socket.
    lru: Lru,
    /// Flows in TIME-WAIT, which hold none: the first to go.
    finished: Lru,
    budget: Budget,
    dirty: Vec<usize>,
    /// Flows with bytes gathered in this batch of frames.
    gathering: Vec<usize>,
    turns: Turns,
    /// Flows whose SYN waits for the guest's MAC address.
    unresolved: Vec<Token>,
    backlog: Backlog,
    isn_secret: (u64, u64),
    generation: u32,
}

impl<S: HostStream> TcpTable<S> {
    /// An empty table of at most `flows_max` flows; `isn_secret` keys the initial sequence numbers (RFC 6528).
    pub fn new(flows_max: usize, isn_secret: (u64, u64)) -> TcpTable<S> {
        TcpTable {
            flows: Slab::new(),
            by_key: HashMap::default(),
            lru: Lru::default(),
            finished: Lru::default(),
            budget: Budget::default(),
            dirty: Vec::with_capacity(BATCH_FLOWS),
            gathering: Vec::with_capacity(BATCH_FLOWS),
            turns: Turns::default(),
            unresolved: Vec::new(),
            backlog: Backlog::new(flows_max),
            isn_secret,
            generation: 0,
        }
    }

    /// Flows in the table.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Out-of-order and refused payload held, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.budget.used_bytes()
    }

    /// When the longest idle flow that holds a socket was last used.
    pub fn oldest(&self) -> Option<Instant> {
        self.lru.oldest().map(|at| self.flows[at].last_active)
    }

    /// Whether a flow with these ends exists.
    pub fn contains(&self, key: &Key) -> bool {
        self.by_key.contains_key(key)
    }

    /// The token the next flow will have, for its socket's readiness events.
    pub fn next_token(&self) -> Token {
        TokenKind::Tcp.token(self.generation.wrapping_add(1), self.flows.vacant_key())
    }

    fn find(&self, token: Token) -> Option<usize> {
        let at = TokenKind::index(token);
        self.flows.get(at).filter(|flow| flow.token == token).map(|_| at)
    }

    /// RFC 6528: a clock of 4 us ticks plus a keyed hash of the flow's ends.
    fn initial_seq(&self, now: Instant, key: &Key) -> SeqNumber {
        let mut hasher = SipHasher13::new_with_keys(self.isn_secret.0, self.isn_secret.1);
        std::hash::Hash::hash(key, &mut hasher);
        SeqNumber((hasher.finish() as u32).wrapping_add((now.as_micros() / 4) as u32))
    }

    /// A segment for a flow that exists; false if there is none.
    pub fn segment(&mut self, core: &mut Core, port: &mut impl GuestPort, segment: &Segment<'_>) -> bool {
        let Some(&at) = self.by_key.get(&segment.key) else {
            return false;
        };
        let flow = &mut self.flows[at];
        let syn_only =
            segment.header.flags.contains(Flags::SYN) && !segment.header.flags.contains(Flags::ACK);
        let is_reset = segment.header.flags.contains(Flags::RST);
        if flow.state == State::TimeWait && syn_only && !is_reset && flow.may_be_followed_by(&segment.header)
        {
            self.remove(core, at);
            return false;
        }
        flow.last_active = core.now;
        flow.pair = segment.from.pair;
        flow.guest_mac = Some(segment.from.mac);
        if flow.state != State::TimeWait {
            self.lru.touch(at);
        }
        let was_gathering = flow.recv.queued > 0;
        flow.note_congestion(&segment.header, segment.is_marked);
        let fate = flow.segment(core, &mut self.budget, &segment.header, &segment.payload);
        if flow.state == State::Established
            && let Some(to) = flow.under_way.take()
        {
            self.backlog.leave(to, flow.token);
        }
        if !was_gathering && flow.recv.queued > 0 {
            self.gathering.push(at);
        }
        self.mark_dirty(at);
        self.settle(core, port, at, fate);
        true
    }

    /// Answers a segment that belongs to no flow with a reset (RFC 9293, 3.10.7.1).
    pub fn refuse(core: &mut Core, port: &mut impl GuestPort, segment: &Segment<'_>) {
        let header = &segment.header;
        if header.flags.contains(Flags::RST) {
            return;
        }
        core.counters.drop(DropReason::NoFlow);
        let len = segment.payload.len()
            + usize::from(header.flags.contains(Flags::SYN))
            + usize::from(header.flags.contains(Flags::FIN));
        let (seq, ack, flags) = if header.flags.contains(Flags::ACK) {
            (header.ack, SeqNumber(0), Flags::RST)
        } else {
            (SeqNumber(0), header.seq + len, Flags::RST | Flags::ACK)
        };
        send_reset(core, port, segment.from, &segment.key, seq, ack, flags);
    }

    /// Adds the flow the guest's SYN began, whose connect is under way on `stream`.
    /// `is_service`: it is to one of ours.
    pub fn insert_from_guest(&mut self, core: &mut Core, segment: &Segment<'_>, stream: S, is_service: bool) {
        let header = &segment.header;
        let ecn = Ecn::asked_by(header.flags);
        let origin = Origin::Guest { irs: header.seq, options: header.options, window: header.window, ecn };
        let at = self.insert(core, segment.key, stream, origin);
        self.flows[at].guest_mac = Some(segment.from.mac);
        self.flows[at].pair = segment.from.pair;
        self.flows[at].is_service = is_service;
    }

    /// Adds the flow of a client of a published port. Its SYN goes out at the batch's end, or once the
    /// guest's MAC address is known.
    pub fn insert_from_world(&mut self, core: &mut Core, key: Key, neighbour: Option<Neighbour>, stream: S) {
        let at = self.insert(core, key, stream, Origin::World);
        let flow = &mut self.flows[at];
        match neighbour {
            Some(neighbour) => {
                flow.guest_mac = Some(neighbour.mac);
                flow.pair = neighbour.pair;
            }
            None => {
                let token = flow.token;
                self.note_unresolved(token);
            }
        }
        self.mark_dirty(at);
    }

    /// Remembers a flow that waits for the guest's MAC address; those that ended meanwhile are
    /// forgotten once they are the most.
    fn note_unresolved(&mut self, token: Token) {
        if self.unresolved.len() > 2 * self.flows.len() {
            let mut waiting = std::mem::take(&mut self.unresolved);
            waiting.retain(|token| self.find(*token).is_some());
            self.unresolved = waiting;
        }
        self.unresolved.push(token);
    }

    /// Flows that end while they wait for their turn keep their place until it comes, which is never with a
    /// guest that posts no buffers: they are forgotten once they are the most.
    fn forget_gone_turns(&mut self) {
        if self.turns.len() > 2 * self.flows.len() + BATCH_FLOWS {
            let mut turns = std::mem::take(&mut self.turns);
            turns.retain(|token| self.find(token).is_some());
            self.turns = turns;
        }
    }

    /// Its turn in line for the limit of what guests send; what it used of `turn`.
    pub fn take_turn_from_guest(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        token: Token,
        turn: Cost,
    ) -> Cost {
        let Some(at) = self.find(token) else { return Cost::default() };
        let (used, outcome) = self.flows[at].take_turn_from_guest(core, &mut self.budget, turn);
        self.mark_dirty(at);
        if let Err(fate) = outcome {
            self.settle(core, port, at, fate);
        }
        used
    }

    /// Its turn in line for the limit of what guests are sent; what it used of `turn`.
    pub fn take_turn_to_guest(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        token: Token,
        turn: Cost,
    ) -> Cost {
        let Some(at) = self.find(token) else { return Cost::default() };
        let flow = &mut self.flows[at];
        flow.send.limited = false;
        // One that waits for buffers besides has its turn when they come.
        if flow.queued { Cost::default() } else { self.output_within(core, port, at, turn) }
    }

    /// Whether a token of a line is still a flow's.
    pub fn is_flow(&self, token: Token) -> bool {
        self.find(token).is_some()
    }

    fn insert(&mut self, core: &mut Core, key: Key, stream: S, origin: Origin) -> usize {
        self.forget_gone_turns();
        let token = self.next_token();
        self.generation = self.generation.wrapping_add(1);
        let iss = self.initial_seq(core.now, &key);
        let at = self.flows.insert(Flow::new(core, key, token, stream, iss, origin));
        self.by_key.insert(key, at);
        self.lru.touch(at);
        core.claim(Place::Tcp(key));
        core.counters.flows_opened += 1;
        Self::note_flow(core, true, &self.flows[at].key, Carried::default());
        self.enter_backlog(core, at);
        at
    }

    /// Counts a flow whose handshake is not done among those, and lets go of one where they are too many:
    /// without a word to the guest, as a full backlog does. A client of a published port sees RST.
    fn enter_backlog(&mut self, core: &mut Core, at: usize) {
        let flow = &mut self.flows[at];
        let Some(to) = flow.destination() else { return };
        let token = flow.token;
        flow.under_way = Some(to);
        self.backlog.enter(to, token);
        if let Some(at) = self.backlog.too_many(token).and_then(|token| self.find(token)) {
            core.counters.drop_aside(DropReason::TableFull);
            self.remove(core, at);
        }
    }

    /// Takes a flow out, for another worker.
    pub fn detach(&mut self, core: &mut Core, key: &Key) -> Option<Moved<S::Detached>> {
        let at = *self.by_key.get(key)?;
        let mut flow = self.take_out(at);
        core.timers.clear(&mut flow.timer);
        flow.recv.pool.leave(&mut self.budget);
        Some(flow.detach())
    }

    /// Takes a flow in that another worker had; its stream is watched through `attach`.
    pub fn attach(
        &mut self,
        core: &mut Core,
        moved: Moved<S::Detached>,
        attach: impl FnOnce(Token, S::Detached) -> io::Result<S>,
    ) {
        let token = self.next_token();
        self.generation = self.generation.wrapping_add(1);
        let (key, carried) = (moved.key, moved.carried);
        let flow = match Flow::attach(moved, token, core.now, |stream| attach(token, stream)) {
            Ok(flow) => flow,
            // Without its stream the flow is over; the guest's next segment finds out.
            Err(_) => {
                Self::note_flow(core, false, &key, carried);
                return core.release(&Place::Tcp(key));
            }
        };
        flow.recv.pool.enter(&mut self.budget);
        self.forget_gone_turns();
        let at = self.flows.insert(flow);
        self.by_key.insert(key, at);
        self.flows[at].pair = core.first_pair();
        let order = if self.flows[at].state == State::TimeWait { &mut self.finished } else { &mut self.lru };
        order.touch(at);
        self.mark_dirty(at);
        self.enter_backlog(core, at);
    }

    /// The guest's MAC address became known, or is another one now.
    pub fn resolved(&mut self, core: &Core, addr: IpAddr, neighbour: Neighbour) {
        self.follow(core, addr, neighbour);
        let mut waiting = std::mem::take(&mut self.unresolved);
        waiting.retain(|token| {
            let Some(at) = self.find(*token) else { return false };
            if self.flows[at].key.guest.ip() != addr {
                return true;
            }
            self.flows[at].guest_mac = Some(neighbour.mac);
            self.flows[at].pair = neighbour.pair;
            self.flows[at].send.syn_due = true;
            self.mark_dirty(at);
            false
        });
        self.unresolved = waiting;
    }

    /// The guest's flows go to its new MAC address, and each is asked whether it lives: the same guest
    /// acknowledges, another one answers with a reset and the flow ends.
    fn follow(&mut self, core: &Core, addr: IpAddr, neighbour: Neighbour) {
        let mut moved = Vec::new();
        for (at, flow) in &mut self.flows {
            let is_elsewhere = flow.guest_mac.is_some_and(|mac| mac != neighbour.mac);
            if flow.key.guest.ip() == addr && is_elsewhere {
                flow.guest_mac = Some(neighbour.mac);
                flow.ask(core.now);
                moved.push(at);
            }
        }
        moved.into_iter().for_each(|at| self.mark_dirty(at));
    }

    /// Ends every flow of the guest's address `addr`; the world sees RST.
    pub fn reset_address(&mut self, core: &mut Core, addr: IpAddr) {
        let of_it = self.flows.iter().filter(|(_, flow)| flow.key.guest.ip() == addr);
        for at in of_it.map(|(at, _)| at).collect::<Vec<_>>() {
            self.remove(core, at);
        }
    }

    /// Ends every flow whose end at the host's side is at an address that is the host's no more; both
    /// sides see RST, the world if it can still be reached. Nothing else would: the kernel sends nothing
    /// from such an address, and tells nobody.
    pub fn reset_stranded(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        mut is_own: impl FnMut(IpAddr) -> bool,
    ) {
        let local = |flow: &Flow<S>| flow.stream.as_ref().and_then(S::local_ip);
        let stranded = self.flows.iter().filter(|(_, flow)| local(flow).is_some_and(|ip| !is_own(ip)));
        for at in stranded.map(|(at, _)| at).collect::<Vec<_>>() {
            core.counters.flows_stranded += 1;
            self.flows[at].reset_guest(core, port);
            self.remove(core, at);
        }
    }

    /// Ends flows of clients that came by a published port, from the place `first` on; both sides see RST.
    pub fn reset_published(
        &mut self,
        core: &mut Core,
        guest: &mut impl GuestPort,
        port: &Publish,
        first: usize,
    ) -> Ended {
        if port.protocol != config::Protocol::Tcp || self.flows.is_empty() {
            return Ended::default();
        }
        let came = |flow: &Flow<S>| {
            flow.from_world
                && flow.key.guest.port() == port.guest_port
                && flow.stream.as_ref().is_some_and(|stream| stream.came_by(port))
        };
        let (step, next) = ending_step(first, self.flows.capacity());
        let mut connections = 0;
        for at in step {
            if self.flows.get(at).is_some_and(came) {
                self.flows[at].reset_guest(core, guest);
                self.remove(core, at);
                connections += 1;
            }
        }
        Ended { connections, next }
    }

    /// News of a flow's socket.
    pub fn host_ready(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token, ready: Readiness) {
        let Some(at) = self.find(token) else { return };
        let flow = &mut self.flows[at];
        if flow.state == State::TimeWait {
            return;
        }
        self.lru.touch(at);
        flow.last_active = core.now;
        let fate = flow.host_ready(core, &mut self.budget, ready);
        self.mark_dirty(at);
        self.settle(core, port, at, fate);
    }

    /// The guest's "destination unreachable" about the segment at `seq`; false if there is no such flow.
    pub fn unreachable(
        &mut self,
        core: &mut Core,
        port: &mut impl GuestPort,
        key: &Key,
        seq: SeqNumber,
        code: UnreachableCode,
        next_hop_mtu: u16,
    ) -> bool {
        let Some(&at) = self.by_key.get(key) else { return false };
        let fate = self.flows[at].unreachable(core, seq, code, next_hop_mtu);
        self.mark_dirty(at);
        self.settle(core, port, at, fate);
        true
    }

    /// A deadline came up.
    pub fn timeout(&mut self, core: &mut Core, port: &mut impl GuestPort, token: Token) {
        let Some(at) = self.find(token) else { return };
        let flow = &mut self.flows[at];
        if !core.timers.expired(&mut flow.timer, token, core.now) {
            return;
        }
        let fate = flow.timeout(core);
        if flow.guest_mac.is_none() {
            core.ask_for(port, flow.key.guest.ip());
        }
        self.mark_dirty(at);
        self.settle(core, port, at, fate);
    }

    fn mark_dirty(&mut self, at: usize) {
        if !std::mem::replace(&mut self.flows[at].dirty, true) {
            self.dirty.push(at);
        }
    }

    /// The end of a batch of frames: what was gathered of them goes into the sockets.
    pub fn send_queued(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        while let Some(at) = self.gathering.pop() {
            // One that ended meanwhile let its bytes go with its socket.
            let Some(flow) = self.flows.get_mut(at) else { continue };
            if let Err(fate) = flow.send_queued(core, &mut self.budget) {
                self.settle(core, port, at, fate);
            }
        }
    }

    /// Whether flows have more to send now.
    pub fn has_more(&self) -> bool {
        self.turns.has_ready() || !self.dirty.is_empty()
    }

    /// Whether flows wait for receive buffers.
    pub fn is_starved(&self) -> bool {
        self.turns.has_blocked()
    }

    /// Places in line for a turn, some of them of flows that are gone.
    pub fn waiting_len(&self) -> usize {
        self.turns.len()
    }

    /// The end of a batch: every flow touched sends what it owes, those with data in turns.
    pub fn flush(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        core.lines.flows = self.flows.len();
        let mut dirty = std::mem::take(&mut self.dirty);
        for at in dirty.drain(..) {
            let Some(flow) = self.flows.get_mut(at) else { continue };
            flow.dirty = false;
            if flow.queued {
                // It does all it has to do when its turn comes.
            } else if flow.has_data_to_send() && !flow.send.limited {
                flow.queued = true;
                self.turns.push_back(flow.pair, flow.token);
            } else {
                self.output(core, port, at);
            }
        }
        // Outputs mark nothing dirty, so the emptied list's room is kept for the next batch.
        if self.dirty.is_empty() {
            self.dirty = dirty;
        }
        self.take_turns(core, port);
    }

    /// Lets flows have turns until the batch is full.
    fn take_turns(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        let full = core.counters.payload_to_guest_bytes + limits::BATCH_BYTES;
        for _ in 0..limits::BATCH_TURNS {
            if core.counters.payload_to_guest_bytes >= full {
                return;
            }
            let Some(token) = self.turns.next() else { return };
            let Some(at) = self.find(token) else { continue };
            self.flows[at].queued = false;
            self.output(core, port, at);
        }
    }

    /// The guest posted receive buffers: flows that waited go on, in order.
    pub fn guest_has_buffers(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        self.turns.unblock_all();
        self.take_turns(core, port);
    }

    /// Lets one flow send, data as far as the limit lets it pass at once.
    fn output(&mut self, core: &mut Core, port: &mut impl GuestPort, at: usize) {
        let Some(flow) = self.flows.get(at) else { return };
        let line = &mut core.lines.to_guest;
        if !line.is_on() || flow.is_service || !flow.has_data_to_send() {
            self.output_within(core, port, at, Cost::UNLIMITED);
            return;
        }
        // In line it sends what is no data.
        let turn = if flow.send.limited { None } else { line.take_turn(core.now) }.unwrap_or_default();
        let used = self.output_within(core, port, at, turn);
        core.lines.to_guest.give_back(turn.less(used));
    }

    /// Lets one flow send, data for `turn` at most; what it used of that.
    fn output_within(&mut self, core: &mut Core, port: &mut impl GuestPort, at: usize, turn: Cost) -> Cost {
        let Some(flow) = self.flows.get_mut(at) else { return Cost::default() };
        let (pair, token) = (flow.pair, flow.token);
        let mut left = turn;
        let after = flow.output(core, port, &mut left);
        if flow.state == State::TimeWait {
            self.lru.remove(at);
            self.finished.touch(at);
        }
        match after {
            After::Idle => {}
            After::Limited => {
                if !std::mem::replace(&mut flow.send.limited, true) {
                    core.counters.limited_to_guest.waits += 1;
                    core.lines.to_guest.join(core.now, token);
                }
            }
            After::More => {
                flow.queued = true;
                self.turns.push_back(pair, token);
            }
            After::Starved { sent } => {
                flow.queued = true;
                if sent {
                    self.turns.push_back(pair, token);
                } else {
                    self.turns.push_front(pair, token);
                }
                self.turns.block(pair);
            }
            After::Over(fate) => self.settle(core, port, at, fate),
        }
        turn.less(left)
    }

    /// Carries out what became of a flow.
    fn settle(&mut self, core: &mut Core, port: &mut impl GuestPort, at: usize, fate: Fate) {
        match fate {
            Fate::Live => {}
            Fate::Done | Fate::Reset => self.remove(core, at),
            Fate::ResetBoth => {
                self.flows[at].reset_guest(core, port);
                self.remove(core, at);
            }
            Fate::ConnectFailed(error) => {
                let flow = &self.flows[at];
                let (key, syn) = (flow.key, flow.recv.nxt - 1);
                if let Some(mac) = flow.guest_mac {
                    let from = Neighbour { mac, pair: flow.pair };
                    connect_failed(core, port, from, &key, syn, &error);
                }
                self.remove(core, at);
            }
        }
    }

    /// Ends the longest idle flow that holds a socket to make room; both sides see RST.
    pub fn evict_oldest(&mut self, core: &mut Core, port: &mut impl GuestPort) {
        if let Some(at) = self.lru.oldest() {
            core.counters.flows_evicted += 1;
            self.flows[at].reset_guest(core, port);
            self.remove(core, at);
        }
    }

    /// Forgets the flow in TIME-WAIT that was used longest ago; false if there is none.
    pub fn forget_finished(&mut self, core: &mut Core) -> bool {
        let oldest = self.finished.oldest();
        if let Some(at) = oldest {
            self.remove(core, at);
        }
        oldest.is_some()
    }

    /// Ends every flow without a word to the guest, which is gone; the world sees RST.
    pub fn reset_all(&mut self, core: &mut Core) {
        while self.forget_finished(core) {}
        while let Some(at) = self.lru.oldest() {
            self.remove(core, at);
        }
        self.unresolved.clear();
        self.turns.clear();
    }

    fn remove(&mut self, core: &mut Core, at: usize) {
        let mut flow = self.take_out(at);
        Self::note_flow(core, false, &flow.key, flow.carried);
        core.release(&Place::Tcp(flow.key));
        core.timers.clear(&mut flow.timer);
        flow.recv.pool.clear(&mut self.budget);
    }

    /// Takes a flow out of every list.
    fn take_out(&mut self, at: usize) -> Flow<S> {
        let flow = self.flows.remove(at);
        self.by_key.remove(&flow.key);
        if let Some(to) = flow.under_way {
            self.backlog.leave(to, flow.token);
        }
        self.lru.remove(at);
        self.finished.remove(at);
        flow
    }
}

fn send_reset(
    core: &mut Core,
    port: &mut impl GuestPort,
    to: Neighbour,
    key: &Key,
    seq: SeqNumber,
    ack: SeqNumber,
    flags: Flags,
) {
    let header = Header {
        src_port: key.remote.port(),
        dst_port: key.guest.port(),
        seq,
        ack,
        flags,
        window: 0,
        urgent: 0,
        options: Options::default(),
    };
    let partial = port.offloads().checksum;
    if let Some(head) = emit::tcp(to.mac, key.remote, key.guest, &header, &Payload::EMPTY, partial) {
        core.send(port, to.pair, head.vnet, head.bytes());
    }
}

/// Tells the guest why its connect failed: RST where the peer refused, ICMP where a router or the
/// host's own tables did, silence where nobody answered (its own SYN time-out says so).
pub fn connect_failed(
    core: &mut Core,
    port: &mut impl GuestPort,
    to: Neighbour,
    key: &Key,
    syn: SeqNumber,
    error: &io::Error,
) {
    let code = match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::ENETDOWN) => UnreachableCode::Net,
        Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => UnreachableCode::Host,
        Some(libc::EACCES | libc::EPERM) => UnreachableCode::AdminProhibited,
        Some(libc::ETIMEDOUT) => return,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EADDRNOTAVAIL) => {
            return core.counters.drop(DropReason::TableFull);
        }
        _ => return send_reset(core, port, to, key, SeqNumber(0), syn + 1, Flags::RST | Flags::ACK),
    };
    unreachable(core, port, to, key, syn, code);
}

/// Sends "destination unreachable" about the guest's SYN, rebuilt from the flow.
pub fn unreachable(
    core: &mut Core,
    port: &mut impl GuestPort,
    to: Neighbour,
    key: &Key,
    syn: SeqNumber,
    code: UnreachableCode,
) {
    let (SocketAddr::V4(guest), SocketAddr::V4(remote)) = (key.guest, key.remote) else {
        return;
    };
    let mut packet = [0u8; ipv4::HEADER_BYTES + 8];
    ipv4::Header {
        src: *guest.ip(),
        dst: *remote.ip(),
        protocol: Protocol::TCP,
        ttl: 64,
        tos: 0,
        ident: 0,
        dont_fragment: true,
        more_fragments: false,
        fragment_offset_bytes: 0,
        header_bytes: ipv4::HEADER_BYTES,
        payload_bytes: 20,
    }
    .emit(&mut packet);
    packet[20..22].copy_from_slice(&guest.port().to_be_bytes());
    packet[22..24].copy_from_slice(&remote.port().to_be_bytes());
    packet[24..28].copy_from_slice(&syn.0.to_be_bytes());
    core.send_unreachable(port, to, code, &packet);
}
