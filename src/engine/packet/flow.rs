//! A translated flow: one entry of two cache lines for both directions.
//!
//! The first line holds all that a packet needs: who the flow is, what its translation changes, the TCP
//! tracker, when it was last used. The second holds what the table keeps about it, which packets of a
//! flow under way rarely touch: its places in the timer wheel and in the order of idleness.
//!
//! Three ends make a flow: the *guest's* (address and port behind the NAT), the *external* port it has on
//! the address vunet holds outside, and the *remote* end. Outbound packets are known by guest and remote,
//! inbound packets by external port and remote. The external address is the same for all flows and stands
//! nowhere here; when it changes, the flows end.
//!
//! Read first: RFC 4787, 1 to 5; RFC 5382; RFC 5508, 3.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::tcp_state::TcpTracker;
use crate::time::Instant;
use crate::wire::ipv4::Protocol;

/// Marks the end of a list of flows, and a flow in none.
pub(super) const NIL: u32 = u32::MAX;

/// Milliseconds since the clock's start, modulo 2^32. Two of them are compared by their difference, so
/// that the wrap after 49 days shows nowhere; nothing compared lies further apart than [`Ticks::SPAN_MAX`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticks(pub u32);

impl Ticks {
    /// The longest time between two points that are compared: half of the range, 24.8 days.
    pub const SPAN_MAX: Duration = Duration::from_millis(i32::MAX as u64);

    /// The point `now` lies at.
    pub fn at(now: Instant) -> Ticks {
        Ticks((now.as_micros() / 1000) as u32)
    }

    /// The point `after_ms` milliseconds later.
    pub const fn plus(self, after_ms: u32) -> Ticks {
        Ticks(self.0.wrapping_add(after_ms))
    }

    /// Milliseconds from `earlier` until here, negative if `earlier` is the later of both.
    pub const fn since(self, earlier: Ticks) -> i32 {
        self.0.wrapping_sub(earlier.0) as i32
    }
}

/// Names a flow for longer than a packet: the place of an ended flow is used again, under another
/// generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// The place in the table.
    pub index: u32,
    /// Which of the flows that were at this place.
    pub generation: u32,
}

/// How a packet of the guest is known. Protocols without ports have zero for them; an ICMP echo has its
/// identifier as the guest's port and zero as the remote one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Outbound {
    /// Protocol of the packet.
    pub protocol: Protocol,
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The guest's port.
    pub guest_port: u16,
    /// The remote address.
    pub remote: Ipv4Addr,
    /// The remote port.
    pub remote_port: u16,
}

/// How a packet of the world is known; ports as in [`Outbound`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inbound {
    /// Protocol of the packet.
    pub protocol: Protocol,
    /// The port on vunet's address outside.
    pub external_port: u16,
    /// The remote address.
    pub remote: Ipv4Addr,
    /// The remote port.
    pub remote_port: u16,
}

/// Who a flow is: all three ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The remote address, as the guest's packets name it.
    pub remote: Ipv4Addr,
    /// The guest's port.
    pub guest_port: u16,
    /// The remote port.
    pub remote_port: u16,
    /// The port on vunet's address outside.
    pub external_port: u16,
    /// Protocol of the packets.
    pub protocol: Protocol,
}

impl FlowKey {
    /// How the guest's packets are known.
    pub const fn outbound(&self) -> Outbound {
        Outbound {
            protocol: self.protocol,
            guest: self.guest,
            guest_port: self.guest_port,
            remote: self.remote,
            remote_port: self.remote_port,
        }
    }

    /// How the world's packets are known.
    pub const fn inbound(&self) -> Inbound {
        Inbound {
            protocol: self.protocol,
            external_port: self.external_port,
            remote: self.remote,
            remote_port: self.remote_port,
        }
    }
}

/// What is so of a flow, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowFlags(u8);

impl FlowFlags {
    /// Nothing.
    pub const NONE: FlowFlags = FlowFlags(0);
    /// The other side has answered.
    pub const SEEN_REPLY: FlowFlags = FlowFlags(1);
    /// Both sides take part for longer than one question and its answer: the last to make room for others.
    pub const ASSURED: FlowFlags = FlowFlags(2);
    /// It leads to a published port.
    pub const PUBLISHED: FlowFlags = FlowFlags(4);
    /// Both its ends lie behind the NAT.
    pub const HAIRPIN: FlowFlags = FlowFlags(8);
    /// The world sent first.
    pub const FROM_WORLD: FlowFlags = FlowFlags(16);
    /// Its external port is shared with flows of other ends of guests: the range was exhausted.
    pub const PORT_SHARED: FlowFlags = FlowFlags(32);
    /// In the order of idleness it stands among the assured.
    pub(super) const RANKED_ASSURED: FlowFlags = FlowFlags(64);
    /// It lives; not set in a free place.
    pub(super) const LIVE: FlowFlags = FlowFlags(128);

    /// Whether all of `flags` are set.
    pub const fn has(self, flags: FlowFlags) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Sets `flags`.
    pub const fn set(&mut self, flags: FlowFlags) {
        self.0 |= flags.0;
    }

    /// Takes `flags` away.
    pub const fn clear(&mut self, flags: FlowFlags) {
        self.0 &= !flags.0;
    }

    /// These and `flags`.
    pub const fn with(self, flags: FlowFlags) -> FlowFlags {
        FlowFlags(self.0 | flags.0)
    }
}

/// What a translation adds to checksums, outbound, as 16-bit one's complement numbers (RFC 1624, eqn. 3:
/// the sum of the complements of the old words and of the new words). What it adds inbound is the complement of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChecksumDeltas {
    /// Of the address, which the IPv4 header's checksum covers, and the transport's by its pseudo-header.
    pub address: u16,
    /// Of the port or ICMP identifier alone.
    pub port: u16,
}

/// One flow.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Flow {
    guest: Ipv4Addr,
    remote: Ipv4Addr,
    guest_port: u16,
    remote_port: u16,
    external_port: u16,
    protocol: Protocol,
    /// What is so of it. The table acts on what it needs of this at the next [`FlowTable::touch`](super::table::FlowTable::touch).
    pub flags: FlowFlags,
    /// When the last packet was carried.
    pub(super) last_seen: Ticks,
    /// How long it lives without packets, in milliseconds.
    pub(super) timeout_ms: u32,
    /// What its translation adds to checksums.
    pub deltas: ChecksumDeltas,
    /// What TCP's both directions said; unused in other flows.
    pub tcp: TcpTracker,
    /// Its place in the timer wheel.
    pub(super) timer: TimerLinks,
    /// Its place in the order of idleness of its guest's flows.
    pub(super) idle: IdleLinks,
    /// The record of its guest.
    pub(super) guest_slot: u32,
    /// Which of the flows at this place it is.
    pub(super) generation: u32,
    /// When it began.
    pub(super) begun: Ticks,
}

/// A flow's place in the timer wheel.
#[derive(Clone, Copy, Debug)]
pub(super) struct TimerLinks {
    /// The next of its slot, or [`NIL`].
    pub(super) next: u32,
    /// The one before it; for a slot's first the slot's number with the top bit set, or [`NIL`] if it is in
    /// none.
    pub(super) previous: u32,
    /// When the wheel looks at it, in milliseconds: never later than its end.
    pub(super) due: Ticks,
}

/// A flow's place in the order of idleness; [`NIL`] at its ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct IdleLinks {
    /// The next one used later.
    pub(super) newer: u32,
    /// The next one used earlier.
    pub(super) older: u32,
}

const _: () = assert!(size_of::<Flow>() <= 128);
const _: () = assert!(std::mem::offset_of!(Flow, timer) <= 64);

impl Flow {
    /// A flow that carries its first packet at `now` and lives `timeout_ms` milliseconds without another. It
    /// is in no table yet.
    pub fn new(key: FlowKey, flags: FlowFlags, now: Ticks, timeout_ms: u32) -> Flow {
        Flow {
            guest: key.guest,
            remote: key.remote,
            guest_port: key.guest_port,
            remote_port: key.remote_port,
            external_port: key.external_port,
            protocol: key.protocol,
            flags,
            last_seen: now,
            timeout_ms,
            deltas: ChecksumDeltas::default(),
            tcp: TcpTracker::default(),
            timer: TimerLinks { next: NIL, previous: NIL, due: now },
            idle: IdleLinks { newer: NIL, older: NIL },
            guest_slot: NIL,
            generation: 0,
            begun: now,
        }
    }

    /// Who it is.
    pub const fn key(&self) -> FlowKey {
        FlowKey {
            guest: self.guest,
            remote: self.remote,
            guest_port: self.guest_port,
            remote_port: self.remote_port,
            external_port: self.external_port,
            protocol: self.protocol,
        }
    }

    /// When the last packet was carried.
    pub const fn last_seen(&self) -> Ticks {
        self.last_seen
    }

    /// How long it lives without packets, in milliseconds.
    pub const fn timeout_ms(&self) -> u32 {
        self.timeout_ms
    }

    /// When it began.
    pub const fn begun(&self) -> Ticks {
        self.begun
    }

    /// When it ends if no packet comes.
    pub(super) const fn end(&self) -> Ticks {
        self.last_seen.plus(self.timeout_ms)
    }

    /// Whether a packet of the guest is this flow's.
    #[inline]
    pub(super) fn is_outbound(&self, of: &Outbound) -> bool {
        self.guest == of.guest
            && self.remote == of.remote
            && self.guest_port == of.guest_port
            && self.remote_port == of.remote_port
            && self.protocol == of.protocol
            && self.flags.has(FlowFlags::LIVE)
    }

    /// Whether a packet of the world is this flow's.
    #[inline]
    pub(super) fn is_inbound(&self, of: &Inbound) -> bool {
        self.remote == of.remote
            && self.external_port == of.external_port
            && self.remote_port == of.remote_port
            && self.protocol == of.protocol
            && self.flags.has(FlowFlags::LIVE)
    }
}
