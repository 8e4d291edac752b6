//! What the device counts: plain numbers owned by the worker, one writer, no atomics.
//!
//! May touch: nothing.

use super::chain::ChainError;

/// Malformed chains by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainErrors([u64; ChainError::ALL.len()]);

impl Default for ChainErrors {
    fn default() -> ChainErrors {
        ChainErrors([0; ChainError::ALL.len()])
    }
}

impl ChainErrors {
    pub(super) fn count(&mut self, why: ChainError) {
        self.0[why as usize] += 1;
    }

    /// How often `why` happened.
    pub fn get(&self, why: ChainError) -> u64 {
        self.0[why as usize]
    }

    /// Chains of any reason.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// Counters of the transmit queues (the guest sends).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TxStats {
    /// Frames handed on.
    pub frames: u64,
    /// Their bytes, Ethernet header on.
    pub bytes: u64,
    /// Malformed chains.
    pub bad_chains: ChainErrors,
    /// Chains shorter than a virtio-net and an Ethernet header.
    pub too_short: u64,
    /// Frames longer than [`crate::limits::FRAME_BYTES_MAX`].
    pub too_long: u64,
    /// Virtio-net headers that contradict themselves, their frame or the specification.
    pub bad_header: u64,
    /// Virtio-net headers asking for an offload that was not negotiated.
    pub not_negotiated: u64,
    /// Frames discarded because their ring is disabled.
    pub disabled: u64,
    /// Notifications sent.
    pub calls: u64,
}

/// Counters of the receive queues (the guest receives).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxStats {
    /// Frames delivered.
    pub frames: u64,
    /// Their bytes, Ethernet header on.
    pub bytes: u64,
    /// Buffers they took.
    pub buffers: u64,
    /// Malformed chains.
    pub bad_chains: ChainErrors,
    /// Reservations refused for want of buffers.
    pub full: u64,
    /// Reservations refused because no number of the guest's buffers would do.
    pub too_small: u64,
    /// Notifications sent.
    pub calls: u64,
}

/// Counters of the control queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlStats {
    /// Commands carried out.
    pub served: u64,
    /// Commands answered with `VIRTIO_NET_ERR`.
    pub refused: u64,
    /// Malformed chains.
    pub bad_chains: ChainErrors,
}

/// Everything the device counts, as of the last [`super::DeviceQueues::publish`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Transmit queues.
    pub tx: TxStats,
    /// Receive queues.
    pub rx: RxStats,
    /// Control queue.
    pub control: ControlStats,
    /// Rings stopped because the guest broke them.
    pub broken_rings: u64,
}
