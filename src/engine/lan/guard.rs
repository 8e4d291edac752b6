//! The guard: the guest sends from its own MAC address and from addresses that are its own.
//!
//! | who says so | what is the guest's |
//! |---|---|
//! | `--mac`, else the first frame since the guest started | its MAC address |
//! | `--guest-ip`, else the LAN's DHCP server in answer to a question of the guest | its IPv4 addresses, while leased |
//! | nobody else on the link (FCFS SAVI, RFC 6620) | its IPv6 addresses |
//!
//! An IPv6 address becomes the guest's half a second after it asked whether anybody has it (duplicate
//! address detection), or after the guard asked for it, because a packet came from it: unless somebody
//! answered, or asked for the same one. Packets from it are dropped meanwhile.
//!
//! An address the guest has not used for five minutes is asked for once more when it is used again, while its
//! packets pass; an answer takes it away. So does a station that looks for the address (duplicate address
//! detection) if the guest does not say within half a second that it has it. No timer runs for either.
//!
//! A guest that takes no frames could keep such answers from being read: while any of its queues stands still,
//! or none has a receive ring, no address becomes its. After a long stand, and when a queue begins or ends to be read, the
//! asking begins anew.
//!
//! Beyond addresses the guest says nothing that only a router or a DHCP server may say, has no VLAN tags,
//! and no frames but ARP, IPv4 and IPv6: bridges themselves listen to others.
//!
//! What the LAN's DHCP leased is told to whoever keeps it ([`SharedTable::news`]), so that the next process of
//! the same guest knows of it: a running guest renews when half of its lease is over, not when vunet starts.
//!
//! All workers judge by one table. Each has a copy and looks at a number that changes with the table, so
//! that a frame costs no lock; what is learnt is rare and takes one.
//!
//! May touch: `wire`, `addr`, `limits`; time is an argument. Read first: RFC 6620, 3.2; RFC 5227; RFC 7513.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::dhcp::{self, Answer, Told};
use super::ipv6::{self, Discovery, Upper};
use super::{vlan, written};
use crate::addr::MacAddr;
use crate::config::GuardConfig;
use crate::engine::counters::DropReason;
use crate::limits::{GUARD_IPV4_MAX, GUARD_IPV6_MAX, GUARD_KEPT_MAX, GUARD_QUESTIONS_MAX};
use crate::time::Instant;
use crate::wire::ethernet::{self, EtherType};
use crate::wire::ipv4::{self, Protocol};
use crate::wire::vnet::Checksum;
use crate::wire::{arp, checksum};

/// Until an address that nobody claimed is the guest's (RFC 6620, 3.1: TENT_LT).
const TENTATIVE: Duration = Duration::from_millis(500);
/// Until a question about it is asked once more (RFC 6620, 3.1: T_WAIT).
const ASK_AGAIN: Duration = Duration::from_millis(250);
/// How long an address stays the guest's without being used (RFC 6620, 3.1: DEFAULT_LT).
const UNUSED_LIFE: Duration = Duration::from_secs(300);
/// How exactly it is known when an address was used: taking note of it takes a lock.
const USE_STEP: Duration = Duration::from_secs(30);
/// How long a question of the guest's to a DHCP server may have its answer: clients repeat theirs after 64 s
/// at the latest (RFC 2131, 4.1).
const QUESTION_LIFE: Duration = Duration::from_secs(64);

/// Longest time without reading the link, for want of the guest's buffers, after which an answer about an
/// address may still be relied on to have been read, not lost.
const STALL: Duration = Duration::from_millis(100);

/// A neighbour solicitation on the guest's behalf: Ethernet, IPv6 and ICMPv6.
pub const PROBE_BYTES: usize = ethernet::HEADER_BYTES + 40 + 24;

/// What became of a frame of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may leave.
    Pass,
    /// It may not.
    Drop(DropReason),
    /// It may not, and whether anybody has its source address is to be asked with this frame.
    Probe([u8; PROBE_BYTES]),
    /// It may, and whether anybody else has its address by now is to be asked with this frame.
    Recheck([u8; PROBE_BYTES]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lease {
    addr: Ipv4Addr,
    /// Without end if `None`.
    until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Binding {
    addr: Ipv6Addr,
    /// When it was first asked for.
    since: Instant,
    /// When it was asked for by the guard.
    asked: Option<Instant>,
    bound: bool,
    /// When it was last used, to [`USE_STEP`].
    used: Instant,
    /// When it was asked for once more, after a time without use.
    rechecked: Option<Instant>,
    /// When another station looked for it, which the guest has not answered.
    disputed: Option<Instant>,
}

impl Binding {
    /// One that the guest asked for at `since`, or the guard at `asked`.
    fn new(addr: Ipv6Addr, since: Instant, asked: Option<Instant>) -> Binding {
        Binding { addr, since, asked, bound: false, used: since, rechecked: None, disputed: None }
    }

    /// Whether an answer at `now` takes it from the guest.
    fn is_open(&self, now: Instant) -> bool {
        !self.bound || self.rechecked.is_some_and(|at| now.since(at) < TENTATIVE)
    }
}

/// What is known of the guest.
#[derive(Clone, Debug, Default)]
struct Table {
    mac: Option<MacAddr>,
    leases: Vec<Lease>,
    bindings: Vec<Binding>,
    questions: Vec<(u32, Instant)>,
}

/// An address that the LAN's DHCP server leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StationLease {
    /// To whom.
    pub mac: MacAddr,
    /// Which.
    pub addr: Ipv4Addr,
    /// For how long from now on; without end if `None`.
    pub left: Option<Duration>,
}

/// All the leases of one station.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseNews {
    /// The station.
    pub mac: MacAddr,
    /// At most [`GUARD_IPV4_MAX`].
    pub leases: Vec<StationLease>,
}

/// The table all workers judge by.
#[derive(Debug, Default)]
pub struct SharedTable {
    /// What is known of stations beyond the guest that is there: of earlier processes, and before it began anew.
    kept: Mutex<Vec<(MacAddr, Lease)>>,
    news: watch::Sender<Option<LeaseNews>>,
    /// Changes with the table.
    version: AtomicU64,
    /// Workers that do not read their queue, a bit each.
    stalled: AtomicU64,
    /// Workers whose queue has a receive ring to be read into, a bit each.
    reading: AtomicU64,
    table: Mutex<Table>,
    /// The IPv4 address the guest leased last, for those who lead others to it.
    leased: watch::Sender<Option<Ipv4Addr>>,
}

/// The guard of one worker.
#[derive(Debug)]
pub struct Guard {
    config: GuardConfig,
    shared: Arc<SharedTable>,
    /// The worker's bit in `stalled`.
    bit: u64,
    stalled_since: Option<Instant>,
    /// The table as of `seen`.
    table: Table,
    seen: u64,
}

impl SharedTable {
    /// A table with leases of an earlier process, as of the beginning of time.
    pub fn with_leases(leases: &[StationLease]) -> SharedTable {
        let lease = |known: &StationLease| Lease {
            addr: known.addr,
            until: known.left.map(|left| Instant::ZERO + left),
        };
        let kept = leases.iter().take(GUARD_KEPT_MAX).map(|known| (known.mac, lease(known))).collect();
        SharedTable { kept: Mutex::new(kept), ..SharedTable::default() }
    }

    /// The guest's leases of the LAN's DHCP, whenever they changed, or are known to be the guest's.
    pub fn news(&self) -> watch::Receiver<Option<LeaseNews>> {
        self.news.subscribe()
    }

    fn kept(&self) -> MutexGuard<'_, Vec<(MacAddr, Lease)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The IPv4 address the guest leased last, as it comes and goes; `None` of one whose address is configured.
    pub fn leased(&self) -> watch::Receiver<Option<Ipv4Addr>> {
        self.leased.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guard {
    /// The guard of worker `worker`, below 64, which knows its settings and what others of `shared` have
    /// learnt.
    pub fn new(config: GuardConfig, shared: Arc<SharedTable>, worker: u8) -> Guard {
        let (bit, table) = (1 << worker, Table::default());
        let mut guard = Guard { config, shared, bit, stalled_since: None, table, seen: u64::MAX };
        guard.refresh();
        if let Some(mac) = config.mac {
            guard.meet(Instant::ZERO, mac);
        }
        guard
    }

    /// From now on `mac` is known to be the guest's: what it had before is its, which is told of.
    fn meet(&mut self, now: Instant, mac: MacAddr) {
        self.take_up(mac);
        if !self.table.leases.is_empty() {
            self.keep_leases(now, mac);
        }
    }

    /// Takes up the leases that `mac` had before it was known to be the guest's.
    fn take_up(&mut self, mac: MacAddr) {
        if self.config.ipv4.is_some() {
            return;
        }
        let mut leases: Vec<Lease> = self
            .shared
            .kept()
            .iter()
            .filter(|(station, _)| *station == mac)
            .map(|(_, lease)| *lease)
            .collect();
        leases.retain(|lease| !self.table.leases.iter().any(|known| known.addr == lease.addr));
        leases.truncate(GUARD_IPV4_MAX.saturating_sub(self.table.leases.len()));
        if !leases.is_empty() {
            self.learn(|table| table.leases.extend(leases));
        }
    }

    /// Keeps what leases the guest has now, and tells of them.
    fn keep_leases(&mut self, now: Instant, mac: MacAddr) {
        let mut kept = self.shared.kept();
        kept.retain(|(station, _)| *station != mac);
        kept.extend(self.table.leases.iter().map(|lease| (mac, *lease)));
        let beyond = kept.len().saturating_sub(GUARD_KEPT_MAX);
        kept.drain(..beyond);
        drop(kept);
        let news = |lease: &Lease| {
            let left = lease.until.map(|until| until.since(now));
            StationLease { mac, addr: lease.addr, left }
        };
        let leases = self.table.leases.iter().map(news).collect();
        self.shared.news.send_replace(Some(LeaseNews { mac, leases }));
    }

    /// The worker stopped reading its queue for want of the guest's buffers, or has read all of it.
    pub fn set_stalled(&mut self, now: Instant, stalled: bool) {
        match (self.stalled_since, stalled) {
            (None, true) => {
                self.shared.stalled.fetch_or(self.bit, Ordering::AcqRel);
                self.stalled_since = Some(now);
            }
            (Some(since), false) => {
                self.stalled_since = None;
                self.refresh();
                let is_asked = |binding: &Binding| !binding.bound;
                if now.since(since) > STALL && self.table.bindings.iter().any(is_asked) {
                    self.learn(|table| table.bindings.retain(|binding| !is_asked(binding)));
                }
                self.shared.stalled.fetch_and(!self.bit, Ordering::AcqRel);
            }
            _ => {}
        }
    }

    /// The worker's queue begins or ends to be read. What came for it before, and what it still held, is lost.
    pub fn set_reading(&mut self, reading: bool) {
        if reading {
            self.shared.reading.fetch_or(self.bit, Ordering::AcqRel);
        } else {
            self.shared.reading.fetch_and(!self.bit, Ordering::AcqRel);
        }
        self.learn(|table| table.bindings.retain(|binding| binding.bound));
    }

    /// Whether answers may wait unread, or be lost.
    fn is_stalled(&self) -> bool {
        self.shared.stalled.load(Ordering::Acquire) != 0 || self.shared.reading.load(Ordering::Acquire) == 0
    }

    fn refresh(&mut self) {
        if self.shared.version.load(Ordering::Acquire) != self.seen {
            let table = self.shared.lock();
            self.seen = self.shared.version.load(Ordering::Acquire);
            self.table.clone_from(&table);
        }
    }

    /// Changes the table for all.
    fn learn(&mut self, change: impl FnOnce(&mut Table)) {
        let mut table = self.shared.lock();
        change(&mut table);
        let newest = table.leases.last().map(|lease| lease.addr);
        self.shared.leased.send_if_modified(|known| std::mem::replace(known, newest) != newest);
        self.shared.version.fetch_add(1, Ordering::AcqRel);
        drop(table);
        self.refresh();
    }

    /// The guest is gone or began anew: what it showed of itself is void. What the LAN's DHCP leased to its MAC
    /// address is that address's still, should it show it again.
    pub fn forget_guest(&mut self) {
        self.learn(|table| *table = Table::default());
        if let Some(mac) = self.config.mac {
            self.take_up(mac);
        }
    }

    /// An address is the guest's, as a server of our own leased it.
    pub fn leased(&mut self, now: Instant, addr: Ipv4Addr, lease: Option<Duration>) {
        if self.config.ipv4.is_none() {
            self.learn(|table| table.lease(now, addr, lease));
        }
    }

    /// No IPv4 address is the guest's any more, until it is told of again.
    pub fn forget_leases(&mut self) {
        self.learn(|table| table.leases.clear());
    }

    /// Whether a frame of the guest, by its first bytes, comes from its own MAC address.
    pub fn is_from_own_mac(&mut self, now: Instant, head: &[u8]) -> bool {
        self.refresh();
        ethernet::Header::parse(head).is_ok_and(|header| self.check_mac(now, header.src).is_ok())
    }

    /// Whether an answer to the guest's own DHCP may come, so that frames are to be shown whole.
    pub fn awaits_lease(&mut self, now: Instant) -> bool {
        self.refresh();
        self.table.questions.iter().any(|(_, asked)| now.since(*asked) < QUESTION_LIFE)
    }

    /// Judges a frame of the guest by its first bytes, and by where its checksum is still to be written;
    /// `len_bytes` is all of it.
    pub fn from_guest(&mut self, now: Instant, checksum: Checksum, head: &[u8], len_bytes: usize) -> Verdict {
        self.refresh();
        match self.judge(now, head, len_bytes) {
            Ok(Verdict::Pass) => match written::check(checksum, head) {
                Ok(()) => Verdict::Pass,
                Err(reason) => Verdict::Drop(reason),
            },
            Ok(verdict) => verdict,
            Err(reason) => Verdict::Drop(reason),
        }
    }

    fn judge(&mut self, now: Instant, head: &[u8], len_bytes: usize) -> Result<Verdict, DropReason> {
        let header = ethernet::Header::parse(head).map_err(|_| DropReason::Malformed)?;
        self.check_mac(now, header.src)?;
        let packet = &head[ethernet::HEADER_BYTES..];
        match header.ethertype {
            EtherType::IPV4 => self.ipv4(now, header.src, packet, len_bytes - ethernet::HEADER_BYTES),
            EtherType::IPV6 => self.ipv6(now, header.src, packet),
            EtherType::ARP => self.arp(now, header.src, packet),
            _ if vlan::is_tagged(head) => Err(DropReason::VlanTag),
            _ => Err(DropReason::Unsupported),
        }
    }

    fn check_mac(&mut self, now: Instant, src: MacAddr) -> Result<(), DropReason> {
        match self.config.mac.or(self.table.mac) {
            Some(own) if own == src => return Ok(()),
            Some(_) => return Err(DropReason::SpoofedSource),
            None => {}
        }
        // Who had the gateway's would be sent what all others send to it.
        if !src.is_unicast() || src == MacAddr::GATEWAY {
            return Err(DropReason::SpoofedSource);
        }
        // Two workers may see a first frame at once: one is the first.
        self.learn(|table| {
            table.mac.get_or_insert(src);
        });
        if self.table.mac != Some(src) {
            return Err(DropReason::SpoofedSource);
        }
        self.meet(now, src);
        Ok(())
    }

    fn has_ipv4(&self, now: Instant, addr: Ipv4Addr) -> bool {
        match self.config.ipv4 {
            Some(own) => own == addr,
            None => self
                .table
                .leases
                .iter()
                .any(|lease| lease.addr == addr && lease.until.is_none_or(|until| now < until)),
        }
    }

    fn arp(&mut self, now: Instant, mac: MacAddr, packet: &[u8]) -> Result<Verdict, DropReason> {
        let packet = arp::Packet::parse(packet).map_err(|_| DropReason::Malformed)?;
        // A probe asks without saying anything (RFC 5227, 2.1.1).
        let is_probe = packet.sender_ip.is_unspecified() && packet.operation == arp::Operation::Request;
        if packet.sender_mac == mac && (is_probe || self.has_ipv4(now, packet.sender_ip)) {
            Ok(Verdict::Pass)
        } else {
            Err(DropReason::SpoofedSource)
        }
    }

    fn ipv4(
        &mut self,
        now: Instant,
        mac: MacAddr,
        packet: &[u8],
        available_bytes: usize,
    ) -> Result<Verdict, DropReason> {
        let ip = ipv4::Header::parse(packet, available_bytes).map_err(|_| DropReason::Malformed)?;
        let is_first = ip.fragment_offset_bytes == 0;
        let ports = match ip.protocol {
            Protocol::ICMP | Protocol::IGMP if is_first => {
                let kind = *packet.get(ip.header_bytes).ok_or(DropReason::Malformed)?;
                if says_router(ip.protocol, kind) {
                    return Err(DropReason::RogueServer);
                }
                None
            }
            Protocol::UDP if is_first => {
                let ports = packet[ip.header_bytes..].first_chunk::<4>().ok_or(DropReason::Malformed)?;
                let [a, b, c, d] = *ports;
                Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
            }
            _ => None,
        };
        // Clients take answers from any port, so theirs is not the guest's to send to.
        if ports.is_some_and(|(src, dst)| src == dhcp::SERVER_PORT || dst == dhcp::CLIENT_PORT) {
            return Err(DropReason::RogueServer);
        }
        // So do servers take questions.
        let to_server = ports.is_some_and(|(_, dst)| dst == dhcp::SERVER_PORT);
        let without_address = to_server && ip.src.is_unspecified() && ip.dst.is_broadcast();
        if !without_address && !self.has_ipv4(now, ip.src) {
            return Err(DropReason::SpoofedSource);
        }
        if to_server {
            self.question(now, mac, told(&ip, packet).ok_or(DropReason::Malformed)?)?;
        }
        Ok(Verdict::Pass)
    }

    /// A question of the guest to a DHCP server. For others' addresses it may not ask: it could use up all.
    fn question(&mut self, now: Instant, mac: MacAddr, told: Told) -> Result<(), DropReason> {
        if told.question().client != mac {
            return Err(DropReason::SpoofedSource);
        }
        if let Told::Asks(question) = told {
            self.learn(|table| table.ask(now, question.xid));
        }
        Ok(())
    }

    /// A question of the guest to a DHCP server, which was let pass, has left. What it gives back is not its any
    /// more, nor its next process's.
    pub fn question_left(&mut self, now: Instant, head: &[u8]) {
        let packet = head.get(ethernet::HEADER_BYTES..).unwrap_or_default();
        let Ok(ip) = ipv4::Header::parse(packet, usize::MAX) else { return };
        let Some(Told::GivesBack(question, addr)) = told(&ip, packet) else { return };
        self.refresh();
        if self.table.leases.iter().any(|lease| lease.addr == addr) {
            self.learn(|table| table.leases.retain(|lease| lease.addr != addr));
            self.keep_leases(now, question.client);
        }
    }

    fn ipv6(&mut self, now: Instant, mac: MacAddr, packet: &[u8]) -> Result<Verdict, DropReason> {
        let packet = ipv6::Packet::parse(packet).map_err(|_| DropReason::Malformed)?;
        let discovery = match packet.upper {
            Upper::Udp { src_port: 547, .. } | Upper::Udp { dst_port: 546, .. } => {
                return Err(DropReason::RogueServer);
            }
            Upper::Icmp { message, fragment } => {
                let discovery = Discovery::parse(message).map_err(|_| DropReason::Malformed)?;
                // RFC 6980: neighbour discovery is never fragmented, or guards could not read it.
                if fragment && discovery != Discovery::Other {
                    return Err(DropReason::Malformed);
                }
                discovery
            }
            _ => Discovery::Other,
        };
        let says = |option: Option<MacAddr>| option.is_none_or(|said| said == mac);
        match discovery {
            Discovery::FromRouter => return Err(DropReason::RogueServer),
            Discovery::RouterSolicitation(option) if !says(option) => return Err(DropReason::SpoofedSource),
            Discovery::NeighbourSolicitation(_, option) if !says(option) => {
                return Err(DropReason::SpoofedSource);
            }
            Discovery::NeighbourAdvertisement(target, option)
                if !says(option) || !self.settle(now, target) =>
            {
                return Err(DropReason::SpoofedSource);
            }
            Discovery::NeighbourAdvertisement(target, _) => self.defend(target),
            _ => {}
        }
        if packet.src.is_unspecified() {
            return self.without_source(now, discovery);
        }
        if self.settle(now, packet.src) {
            let others = match discovery {
                Discovery::NeighbourAdvertisement(target, _) => self.use_again(now, mac, target),
                _ => None,
            };
            let again = others.or_else(|| self.use_again(now, mac, packet.src));
            return Ok(again.map_or(Verdict::Pass, Verdict::Recheck));
        }
        self.claim(now, mac, packet.src)
    }

    /// A packet without a source address: who has none yet may ask for one, and for routers.
    fn without_source(&mut self, now: Instant, discovery: Discovery) -> Result<Verdict, DropReason> {
        match discovery {
            Discovery::NeighbourSolicitation(target, _) => {
                if !is_bindable(target) {
                    return Err(DropReason::Malformed);
                }
                if !self.table.bindings.iter().any(|binding| binding.addr == target) {
                    self.learn(|table| table.bind(Binding::new(target, now, None)));
                }
                Ok(Verdict::Pass)
            }
            Discovery::RouterSolicitation(_) | Discovery::ListenerReport => Ok(Verdict::Pass),
            _ => Err(DropReason::SpoofedSource),
        }
    }

    /// Whether `addr` is the guest's by now.
    fn settle(&mut self, now: Instant, addr: Ipv6Addr) -> bool {
        let Some(binding) = self.table.bindings.iter().find(|binding| binding.addr == addr) else {
            return false;
        };
        if binding.disputed.is_some_and(|at| now.since(at) >= TENTATIVE) {
            // It may not have been able to hear of it, but somebody has the address by now.
            if !self.is_stalled() {
                self.learn(|table| table.bindings.retain(|binding| binding.addr != addr));
            }
            return false;
        }
        if !binding.bound && now.since(binding.since) >= TENTATIVE && !self.is_stalled() {
            self.learn(|table| table.settle(now, addr));
        }
        self.table.bindings.iter().any(|binding| binding.addr == addr && binding.bound)
    }

    /// Takes note that the guest uses `addr`, which is its; what to ask the link with if it did not for long.
    fn use_again(&mut self, now: Instant, mac: MacAddr, addr: Ipv6Addr) -> Option<[u8; PROBE_BYTES]> {
        let unused = now.since(self.table.bindings.iter().find(|binding| binding.addr == addr)?.used);
        if unused < USE_STEP {
            return None;
        }
        let again = unused >= UNUSED_LIFE;
        self.learn(|table| {
            for binding in table.bindings.iter_mut().filter(|binding| binding.addr == addr) {
                binding.used = now;
                if again {
                    binding.rechecked = Some(now);
                }
            }
        });
        again.then(|| probe(mac, addr))
    }

    /// The guest says that it has `addr`.
    fn defend(&mut self, addr: Ipv6Addr) {
        let is_disputed = |binding: &Binding| binding.addr == addr && binding.disputed.is_some();
        if self.table.bindings.iter().any(is_disputed) {
            self.learn(|table| {
                for binding in table.bindings.iter_mut().filter(|binding| binding.addr == addr) {
                    binding.disputed = None;
                }
            });
        }
    }

    /// A packet from an address that is not the guest's: it may become so.
    fn claim(&mut self, now: Instant, mac: MacAddr, addr: Ipv6Addr) -> Result<Verdict, DropReason> {
        if !is_bindable(addr) || self.is_stalled() {
            return Err(DropReason::SpoofedSource);
        }
        let known = self.table.bindings.iter().find(|binding| binding.addr == addr).copied();
        let since = known.map_or(now, |binding| binding.since);
        let was_asked = known.is_some_and(|binding| match binding.asked {
            Some(asked) => now.since(asked) < ASK_AGAIN,
            // The guest asked itself.
            None => true,
        });
        if was_asked {
            return Err(DropReason::SpoofedSource);
        }
        self.learn(|table| table.bind(Binding::new(addr, since, Some(now))));
        Ok(Verdict::Probe(probe(mac, addr)))
    }

    /// Looks at a frame for the guest by its first bytes: an answer of the LAN's DHCP server, or somebody
    /// else with an address the guest would have.
    pub fn to_guest(&mut self, now: Instant, head: &[u8]) {
        self.refresh();
        let table = &self.table;
        let Ok(header) = ethernet::Header::parse(head) else { return };
        let packet = &head[ethernet::HEADER_BYTES..];
        // A station without an address looks whether somebody has the one it would like.
        let looks = header.ethertype == EtherType::IPV6
            && !table.bindings.is_empty()
            && packet.get(8..24).is_some_and(|src| src == [0; 16]);
        let waits =
            looks || !table.questions.is_empty() || table.bindings.iter().any(|binding| binding.is_open(now));
        if !waits || Some(header.src) == self.config.mac.or(table.mac) {
            return;
        }
        match header.ethertype {
            EtherType::IPV4 => self.answer(now, packet),
            EtherType::IPV6 => self.claimed_by_other(now, packet),
            _ => {}
        }
    }

    fn answer(&mut self, now: Instant, packet: &[u8]) {
        let Ok(ip) = ipv4::Header::parse(packet, usize::MAX) else { return };
        let whole = ip.header_bytes + ip.payload_bytes;
        let Some(datagram) = packet.get(ip.header_bytes..whole.min(packet.len())) else { return };
        let ports = [dhcp::SERVER_PORT.to_be_bytes(), dhcp::CLIENT_PORT.to_be_bytes()].concat();
        if ip.protocol != Protocol::UDP || ip.is_fragment() || !datagram.starts_with(&ports) {
            return;
        }
        let Some((question, answer)) = dhcp::parse_answer(datagram.get(8..).unwrap_or_default()) else {
            return;
        };
        let own = self.config.mac.or(self.table.mac);
        let asked = self
            .table
            .questions
            .iter()
            .any(|(xid, at)| *xid == question.xid && now.since(*at) < QUESTION_LIFE);
        if own != Some(question.client) || !asked {
            return;
        }
        match answer {
            Answer::Leased(addr, lease) => self.leased(now, addr, lease),
            Answer::Refused => self.learn(|table| table.leases.clear()),
        }
        self.keep_leases(now, question.client);
        self.learn(|table| table.questions.retain(|(xid, _)| *xid != question.xid));
    }

    fn claimed_by_other(&mut self, now: Instant, packet: &[u8]) {
        let Ok(packet) = ipv6::Packet::parse(packet) else { return };
        let Upper::Icmp { message, .. } = packet.upper else { return };
        let target = match Discovery::parse(message) {
            Ok(Discovery::NeighbourAdvertisement(target, _)) => target,
            Ok(Discovery::NeighbourSolicitation(target, _)) if packet.src.is_unspecified() => target,
            _ => return,
        };
        let is_lost = |binding: &Binding| binding.addr == target && binding.is_open(now);
        if self.table.bindings.iter().any(is_lost) {
            return self.learn(|table| table.bindings.retain(|binding| !is_lost(binding)));
        }
        // The guest has it, unless it does not say so. What comes again does not give it more time.
        let is_new = |binding: &Binding| binding.addr == target && binding.disputed.is_none();
        if packet.src.is_unspecified() && self.table.bindings.iter().any(is_new) {
            self.learn(|table| {
                for binding in table.bindings.iter_mut().filter(|binding| is_new(binding)) {
                    binding.disputed = Some(now);
                }
            });
        }
    }
}

impl Table {
    /// Takes note of a lease; past the bound the oldest goes.
    fn lease(&mut self, now: Instant, addr: Ipv4Addr, lease: Option<Duration>) {
        self.leases.retain(|known| known.addr != addr && known.until.is_none_or(|until| now < until));
        if self.leases.len() >= GUARD_IPV4_MAX {
            self.leases.remove(0);
        }
        self.leases.push(Lease { addr, until: lease.map(|lease| now + lease) });
    }

    fn ask(&mut self, now: Instant, xid: u32) {
        self.questions.retain(|(known, asked)| *known != xid && now.since(*asked) < QUESTION_LIFE);
        if self.questions.len() >= GUARD_QUESTIONS_MAX {
            self.questions.remove(0);
        }
        self.questions.push((xid, now));
    }

    /// Takes note of an address; past the bound one that is not the guest's yet goes, else the oldest.
    fn bind(&mut self, binding: Binding) {
        self.bindings.retain(|known| known.addr != binding.addr);
        if self.bindings.len() >= GUARD_IPV6_MAX {
            let at = self.bindings.iter().position(|known| !known.bound).unwrap_or(0);
            self.bindings.remove(at);
        }
        self.bindings.push(binding);
    }

    fn settle(&mut self, now: Instant, addr: Ipv6Addr) {
        for binding in self.bindings.iter_mut().filter(|binding| binding.addr == addr) {
            binding.bound = true;
            binding.used = now;
        }
    }
}

/// Whether a frame of the guest, by its first bytes, is for a DHCP server: it is to be judged by
/// [`crate::limits::LINK_LONG_HEAD_BYTES`] of it.
pub fn is_question(head: &[u8], len_bytes: usize) -> bool {
    let Some((link, packet)) = head.split_at_checked(ethernet::HEADER_BYTES) else { return false };
    // Nearly every frame is known by these not to be one.
    if link[12..] != EtherType::IPV4.0.to_be_bytes() || packet.get(9) != Some(&Protocol::UDP.0) {
        return false;
    }
    let Ok(ip) = ipv4::Header::parse(packet, len_bytes.saturating_sub(ethernet::HEADER_BYTES)) else {
        return false;
    };
    let port = packet.get(ip.header_bytes + 2..ip.header_bytes + 4);
    ip.fragment_offset_bytes == 0 && port == Some(&dhcp::SERVER_PORT.to_be_bytes())
}

/// What a datagram to a DHCP server's port says; `None` if that is not to be read: in fragments, longer than what
/// is at hand, or than it says itself.
fn told(ip: &ipv4::Header, packet: &[u8]) -> Option<Told> {
    let datagram = packet.get(ip.header_bytes..)?;
    let len = datagram.get(4..6)?;
    let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
    if ip.is_fragment() || len > ip.payload_bytes {
        return None;
    }
    Told::parse(datagram.get(8..len)?)
}

/// Whether ICMP or IGMP messages of a kind are only routers' to send: redirects and advertisements (RFC 792, RFC 1256),
/// queries for groups (RFC 3376, 4.1), which make of who sends them the one that switches believe, and what multicast
/// routers say of themselves (RFC 4286, 3).
fn says_router(protocol: Protocol, kind: u8) -> bool {
    match protocol {
        Protocol::ICMP => matches!(kind, 5 | 9),
        _ => matches!(kind, 0x11 | 0x30 | 0x32),
    }
}

/// Whether a station can have the address.
fn is_bindable(addr: Ipv6Addr) -> bool {
    !addr.is_multicast() && !addr.is_loopback() && !addr.is_unspecified()
}

/// "Who has `addr`?" from nobody, as in duplicate address detection (RFC 4862, 5.4.2).
fn probe(mac: MacAddr, addr: Ipv6Addr) -> [u8; PROBE_BYTES] {
    let mut frame = [0; PROBE_BYTES];
    let octets = addr.octets();
    let [.., a, b, c] = octets;
    // The group of all who could have it (RFC 4291, 2.7.1), and its Ethernet address (RFC 2464, 7).
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]));
    let dst = MacAddr([0x33, 0x33, 0xff, a, b, c]);
    ethernet::Header { dst, src: mac, ethertype: EtherType::IPV6 }.emit(&mut frame);
    let (ip, message) = frame[ethernet::HEADER_BYTES..].split_at_mut(40);
    ip[0] = 0x60;
    ip[5] = 24;
    ip[6] = Protocol::ICMPV6.0;
    ip[7] = 255;
    ip[24..40].copy_from_slice(&group.octets());
    message[0] = 135;
    message[8..24].copy_from_slice(&octets);
    let mut sum = checksum::pseudo_header(Ipv6Addr::UNSPECIFIED.into(), group.into(), Protocol::ICMPV6, 24);
    sum.add_bytes(message);
    message[2..4].copy_from_slice(&sum.finish().to_be_bytes());
    frame
}

#[cfg(test)]
mod tests;
