//! What happened, counted. A frame that goes nowhere is counted with its reason.

use crate::histogram::Histogram;

/// Why a frame, segment or datagram was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum DropReason {
    /// Not parseable as what it claims to be.
    Malformed,
    /// A checksum did not match.
    Checksum,
    /// An Ethernet type or IP protocol that is not served.
    Unsupported,
    /// Addressed to another station.
    NotForUs,
    /// A source address that is not the guest's to use.
    SpoofedSource,
    /// A destination that policy refuses.
    Refused,
    /// No translation for it.
    NoFlow,
    /// A table or pool is at its bound.
    TableFull,
    /// A host socket would not take it.
    SocketRefused,
    /// The guest posts no receive buffers and the outbox is full, or the ring is down.
    GuestNotReceiving,
    /// Outside of the receive window, or stale.
    OutOfWindow,
    /// Without the timestamps agreed on, or older than what came since (RFC 7323, 5).
    OldTimestamp,
    /// Fragments that overlap others or exceed bounds, and what comes of their datagram afterwards.
    Fragment,
    /// Datagrams whose fragments did not all come in time.
    FragmentHole,
    /// Answers withheld by rate limit.
    RateLimited,
    /// From a remote endpoint the guest has not sent to.
    Filtered,
    /// DHCP or DNS that deserves no answer.
    ServiceSilent,
    /// DHCP without an answer because no address is free, or the guest holds as many as one may.
    PoolExhausted,
    /// DHCP without an answer because the network's leases cannot be read or written.
    LeaseStore,
    /// An 802.1Q tag that is not the network's, or none where there is to be one.
    VlanTag,
    /// What only a router or DHCP server may say, said by the guest.
    RogueServer,
    /// Longer than the link's MTU, and not to be segmented.
    TooLong,
    /// An offload the guest did not accept.
    NotNegotiated,
    /// The TAP interface would not take it.
    LinkRefused,
    /// Its hops are used up.
    HopLimit,
    /// Beyond what the limit of rates lets pass, and it could not wait.
    OverLimit,
    /// It would have begun a flow, of which the limit lets so many begin a second.
    FlowLimit,
}

impl DropReason {
    /// All of them, in their order.
    pub const ALL: [DropReason; REASONS.len()] = {
        let mut all = [DropReason::Malformed; REASONS.len()];
        let mut at = 0;
        while at < all.len() {
            all[at] = REASONS[at].0;
            at += 1;
        }
        all
    };

    /// Its name in metrics and captures.
    pub const fn name(self) -> &'static str {
        REASONS[self as usize].1
    }
}

const REASONS: [(DropReason, &str); 27] = [
    (DropReason::Malformed, "malformed"),
    (DropReason::Checksum, "checksum"),
    (DropReason::Unsupported, "unsupported"),
    (DropReason::NotForUs, "not_for_us"),
    (DropReason::SpoofedSource, "spoofed_source"),
    (DropReason::Refused, "refused"),
    (DropReason::NoFlow, "no_flow"),
    (DropReason::TableFull, "table_full"),
    (DropReason::SocketRefused, "socket_refused"),
    (DropReason::GuestNotReceiving, "guest_not_receiving"),
    (DropReason::OutOfWindow, "out_of_window"),
    (DropReason::OldTimestamp, "old_timestamp"),
    (DropReason::Fragment, "fragment"),
    (DropReason::FragmentHole, "fragment_hole"),
    (DropReason::RateLimited, "rate_limited"),
    (DropReason::Filtered, "filtered"),
    (DropReason::ServiceSilent, "service_silent"),
    (DropReason::PoolExhausted, "pool_exhausted"),
    (DropReason::LeaseStore, "lease_store"),
    (DropReason::VlanTag, "vlan_tag"),
    (DropReason::RogueServer, "rogue_server"),
    (DropReason::TooLong, "too_long"),
    (DropReason::NotNegotiated, "not_negotiated"),
    (DropReason::LinkRefused, "link_refused"),
    (DropReason::HopLimit, "hop_limit"),
    (DropReason::OverLimit, "over_limit"),
    (DropReason::FlowLimit, "flow_limit"),
];

/// What a rate limit did in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limited {
    /// Times a flow, a socket, a queue or clients of a published port had to wait for tokens.
    pub waits: u64,
    /// Packets that could not wait, dropped.
    pub dropped_packets: u64,
    /// Their bytes, of Ethernet frames.
    pub dropped_bytes: u64,
    /// New flows that were not let begin.
    pub refused_flows: u64,
}

impl Limited {
    fn add(&mut self, other: &Limited) {
        self.waits += other.waits;
        self.dropped_packets += other.dropped_packets;
        self.dropped_bytes += other.dropped_bytes;
        self.refused_flows += other.refused_flows;
    }
}

/// Counters of one engine; plain numbers, owned by its worker.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// Frames taken from the guest.
    pub frames_from_guest: u64,
    /// Frames placed in the guest's receive buffers.
    pub frames_to_guest: u64,
    /// Payload bytes moved from the guest into sockets; of frames that leave by a link, all bytes.
    pub payload_from_guest_bytes: u64,
    /// Payload bytes moved from sockets into guest memory; of frames that come by a link, all bytes.
    pub payload_to_guest_bytes: u64,
    /// Flows begun.
    pub flows_opened: u64,
    /// Flows ended to make room for others.
    pub flows_evicted: u64,
    /// TCP flows ended because the address they came from is the host's no more.
    pub flows_stranded: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
    /// Names the guest asked for that are local, or refused here.
    pub names_answered: u64,
    /// Names the guest asked for that were asked of resolvers.
    pub names_forwarded: u64,
    /// Answers of DHCP.
    pub dhcp_answered: u64,
    /// What the limit of what the guest sends held up or dropped.
    pub limited_from_guest: Limited,
    /// The same of what it is sent.
    pub limited_to_guest: Limited,
    /// How long connects of TCP flows took that succeeded, in microseconds; a batch's time is that of its beginning.
    pub connect_time: Histogram,
    drops: [u64; REASONS.len()],
    /// Why the frame at hand was dropped: see [`Counters::take_dropped`].
    dropped: Option<DropReason>,
}

impl Counters {
    /// Says in the log what was counted, at the end.
    pub fn log(&self) {
        tracing::info!(
            frames_from_guest = self.frames_from_guest,
            frames_to_guest = self.frames_to_guest,
            payload_from_guest_bytes = self.payload_from_guest_bytes,
            payload_to_guest_bytes = self.payload_to_guest_bytes,
            flows_opened = self.flows_opened,
            flows_evicted = self.flows_evicted,
            flows_stranded = self.flows_stranded,
            retransmits = self.retransmits,
            dropped = self.dropped_total(),
            reasons = %self.drops_text(),
            "ended"
        );
    }

    /// Counts one drop, of the frame that is being judged.
    pub fn drop(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
        self.dropped = Some(reason);
    }

    /// Counts one drop of something else: of an answer, or of what came before.
    pub fn drop_aside(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
    }

    /// Why the frame at hand was dropped, if it was since this was last asked.
    pub fn take_dropped(&mut self) -> Option<DropReason> {
        self.dropped.take()
    }

    /// Counts `count` drops.
    pub fn drop_many(&mut self, reason: DropReason, count: u64) {
        self.drops[reason as usize] += count;
    }

    /// Adds another engine's counts.
    pub fn add(&mut self, other: &Counters) {
        self.frames_from_guest += other.frames_from_guest;
        self.frames_to_guest += other.frames_to_guest;
        self.payload_from_guest_bytes += other.payload_from_guest_bytes;
        self.payload_to_guest_bytes += other.payload_to_guest_bytes;
        self.flows_opened += other.flows_opened;
        self.flows_evicted += other.flows_evicted;
        self.flows_stranded += other.flows_stranded;
        self.retransmits += other.retransmits;
        self.names_answered += other.names_answered;
        self.names_forwarded += other.names_forwarded;
        self.dhcp_answered += other.dhcp_answered;
        self.limited_from_guest.add(&other.limited_from_guest);
        self.limited_to_guest.add(&other.limited_to_guest);
        self.connect_time.add(&other.connect_time);
        for (mine, theirs) in self.drops.iter_mut().zip(other.drops) {
            *mine += theirs;
        }
    }

    /// Drops counted for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// All drops.
    pub fn dropped_total(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// Every reason by its name, with its count.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS.iter().map(|(reason, name)| (*name, self.dropped(*reason)))
    }

    /// The reasons that occurred, as `name=count` words.
    pub fn drops_text(&self) -> String {
        let words: Vec<String> = REASONS
            .iter()
            .filter(|(reason, _)| self.dropped(*reason) > 0)
            .map(|(reason, name)| format!("{name}={}", self.dropped(*reason)))
            .collect();
        if words.is_empty() { "none".to_owned() } else { words.join(" ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_slot_and_name() {
        for (at, (reason, _)) in REASONS.iter().enumerate() {
            assert_eq!(*reason as usize, at);
            assert_eq!(DropReason::ALL[at], *reason);
        }
        let mut counters = Counters::default();
        counters.drop(DropReason::Filtered);
        counters.drop(DropReason::Filtered);
        assert_eq!(counters.drops_text(), "filtered=2");
        assert_eq!(counters.dropped_total(), 2);
    }

    #[test]
    fn a_drop_of_something_else_is_not_the_frames() {
        let mut counters = Counters::default();
        counters.drop_aside(DropReason::GuestNotReceiving);
        assert_eq!(counters.take_dropped(), None);
        counters.drop(DropReason::Refused);
        counters.drop_aside(DropReason::RateLimited);
        assert_eq!(counters.take_dropped(), Some(DropReason::Refused));
        assert_eq!(counters.take_dropped(), None);
        assert_eq!(counters.dropped_total(), 3);
    }
}
