//! The way of a frame: the types that device, engine and uplink hand each other.
//!
//! A frame from the guest is a [`TxFrame`]: its headers copied once into host memory, judged there
//! and never read from guest memory again, and its bytes as a [`Payload`] of segments in guest
//! memory, which are moved (`sendmsg`) but not judged. Towards the guest, receive buffers are
//! reserved as a [`PayloadMut`] that a socket fills directly.
//!
//! Only [`segments`] touches raw memory; everything above it is safe.

pub mod segments;

pub use segments::{Payload, PayloadMut};

use crate::wire::vnet::VnetHeader;

/// One Ethernet frame sent by the guest.
#[derive(Clone, Copy, Debug)]
pub struct TxFrame<'a> {
    /// The virtio-net header, copied once and decoded.
    pub vnet: VnetHeader,
    /// The frame's first bytes, copied once: all of it, or [`crate::limits::FRAME_HEAD_BYTES`].
    pub head: &'a [u8],
    /// The whole frame from its Ethernet header on, in place.
    pub whole: Payload<'a>,
    /// The queue pair it came from.
    pub pair: QueuePair,
}

/// A pair of virtqueues: receive queue `2n` and transmit queue `2n + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub struct QueuePair(pub u8);
