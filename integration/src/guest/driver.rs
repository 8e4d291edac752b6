//! What every kind of guest has: a driver that meets a back-end, and rings and buffers laid out in
//! guest memory for it.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::GuestError;
use super::buffers::{Arena, Slot, rx_pieces, tx_pieces};
use super::doorbells::Doorbells;
use super::features::Features;
use super::handshake::{Agreement, RingPlace};
use super::ring::{DriverRing, RingAddrs, RingOptions};
use super::session::{ProtocolFeatures, Session, SessionError};
use crate::sys::mem::GuestMemory;

/// Guest-physical addresses of the two regions: transmit below 4 GiB, receive far above.
const TX_REGION_ADDR: u64 = 0x4000_0000;
const RX_REGION_ADDR: u64 = 0x1_2000_0000_0000;
/// Regions are sized in multiples of this many bytes.
const REGION_ALIGN_BYTES: u64 = 2 << 20;
/// Worst-case padding of one ring's parts in bytes.
const RING_PADDING_BYTES: u64 = 4 * 4096;
/// Queue pairs at most, so that descriptors and threads stay few.
const PAIRS_MAX: usize = 16;

/// In which order the messages of a handshake come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Order {
    /// Features first, rings enabled last.
    #[default]
    Spec,
    /// As QEMU 7.2: rings are enabled before any SET_FEATURES and never again; feature and memory
    /// messages repeat for each queue pair.
    Qemu,
}

/// The driver's side of a virtio-net device, and how it meets its back-end.
#[derive(Clone, Debug)]
pub struct DriverConfig {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Listen on the socket and let the back-end connect.
    pub server: bool,
    /// How long to wait for a back-end.
    pub patience: Duration,
    /// IP MTU of the link in bytes; without one the device's, else 1500.
    pub ip_mtu: Option<u16>,
    /// Features to accept where offered.
    pub features: Features,
    /// Protocol features to accept where offered.
    pub protocol: ProtocolFeatures,
    /// Entries of each ring, a power of two.
    pub ring_size: u16,
    /// Length of a receive buffer in bytes.
    pub rx_buffer_bytes: u32,
    /// Lengths of the descriptors a frame from the guest is cut into; the last one repeats.
    pub tx_cuts: Vec<u32>,
    /// Queue pairs.
    pub queues: usize,
    /// Order of the handshake's messages.
    pub order: Order,
}

impl DriverConfig {
    pub(super) fn validate(&self) -> Result<(), GuestError> {
        let fail = |text: String| Err(GuestError::Config(text));
        if !self.ring_size.is_power_of_two() || self.ring_size < 2 || self.ring_size > 32_768 {
            return fail(format!("ring size {}: expected a power of two from 2 to 32768", self.ring_size));
        }
        if self.queues == 0 || self.queues > PAIRS_MAX {
            return fail(format!("{} queue pairs: expected 1 to {PAIRS_MAX}", self.queues));
        }
        if self.rx_buffer_bytes < 128 || self.rx_buffer_bytes > 1 << 20 {
            return fail(format!("receive buffers of {}: expected 128 to 1048576", self.rx_buffer_bytes));
        }
        if self.tx_cuts.is_empty() || self.tx_cuts.contains(&0) {
            return fail("descriptor lengths must be one or more numbers above zero".into());
        }
        Ok(())
    }

    /// A listener on the socket, if the back-end is to connect.
    pub(super) fn listen(&self) -> io::Result<Option<UnixListener>> {
        if self.server { UnixListener::bind(&self.socket).map(Some) } else { Ok(None) }
    }

    /// Meets a back-end.
    pub(super) fn meet(&self, listener: Option<&UnixListener>) -> Result<Session, SessionError> {
        match listener {
            Some(listener) => Session::accept(listener, &self.socket),
            None => Session::connect(&self.socket, self.patience),
        }
    }
}

/// One queue pair's rings and buffers.
pub(super) struct PairRings {
    /// Receive ring.
    pub(super) rx: DriverRing,
    /// Transmit ring.
    pub(super) tx: DriverRing,
    /// Receive buffers.
    pub(super) rx_slots: Vec<Slot>,
    /// Transmit buffers.
    pub(super) tx_slots: Vec<Slot>,
    /// Notification descriptors.
    pub(super) bells: Arc<Doorbells>,
}

/// Guest memory with everything laid out in it.
pub(super) struct Layout {
    /// The memory.
    pub(super) mem: &'static GuestMemory,
    /// The pairs.
    pub(super) pairs: Vec<PairRings>,
    /// All rings, receive before transmit, pair by pair: the order of vhost-user's ring numbers.
    pub(super) places: Vec<RingPlace>,
}

struct Sizes {
    tx_lens: Vec<u32>,
    rx_lens: Vec<u32>,
    tx_slots: usize,
    rx_slots: usize,
}

impl Sizes {
    fn new(config: &DriverConfig, agreement: &Agreement) -> Result<Sizes, GuestError> {
        let features = agreement.features;
        let tx_lens = tx_pieces(features, &config.tx_cuts);
        let rx_lens = rx_pieces(features, config.rx_buffer_bytes, u32::from(agreement.ip_mtu));
        let indirect = features.named("indirect_desc");
        let chains = |lens: &[u32]| {
            let cost = if indirect && lens.len() > 1 { 1 } else { lens.len() };
            usize::from(config.ring_size) / cost
        };
        let rx_slots = chains(&rx_lens);
        if chains(&tx_lens) == 0 || rx_slots == 0 {
            let pieces = tx_lens.len().max(rx_lens.len());
            let text = format!("a ring of {} cannot hold a frame of {pieces} pieces", config.ring_size);
            return Err(GuestError::Config(text));
        }
        // A frame shorter than the longest takes fewer descriptors, so more slots than chains of
        // full length are of use when transmitting.
        Ok(Sizes { tx_lens, rx_lens, tx_slots: usize::from(config.ring_size), rx_slots })
    }

    fn region_bytes(config: &DriverConfig, lens: &[u32], slots: usize) -> u64 {
        let pair = ring_bytes(config.ring_size) + Slot::footprint_bytes(lens) * slots as u64;
        (pair * config.queues as u64).next_multiple_of(REGION_ALIGN_BYTES)
    }
}

/// Lays out memory, rings and buffers for what was agreed.
///
/// # Errors
/// If a ring cannot hold one frame, or memory cannot be had.
pub(super) fn lay_out(config: &DriverConfig, agreement: &Agreement) -> Result<Layout, GuestError> {
    let sizes = Sizes::new(config, agreement)?;
    let tx_bytes = Sizes::region_bytes(config, &sizes.tx_lens, sizes.tx_slots);
    let rx_bytes = Sizes::region_bytes(config, &sizes.rx_lens, sizes.rx_slots);
    let mem = GuestMemory::new(&[(TX_REGION_ADDR, tx_bytes), (RX_REGION_ADDR, rx_bytes)])
        .map_err(|e| GuestError::Kernel("guest memory", e))?;
    let mut tx_arena = Arena::new(TX_REGION_ADDR, tx_bytes);
    let mut rx_arena = Arena::new(RX_REGION_ADDR, rx_bytes);
    let features = agreement.features;
    let options = |device_writes| RingOptions {
        size: config.ring_size,
        device_writes,
        event_idx: features.named("event_idx"),
        indirect: features.named("indirect_desc"),
        in_order: features.named("in_order"),
    };
    let mut layout = Layout { mem, pairs: Vec::new(), places: Vec::new() };
    for _ in 0..config.queues {
        let bells = Arc::new(Doorbells::new().map_err(|e| GuestError::Kernel("eventfd", e))?);
        let tx = DriverRing::new(mem, lay_out_ring(&mut tx_arena, config.ring_size), options(false));
        let rx = DriverRing::new(mem, lay_out_ring(&mut rx_arena, config.ring_size), options(true));
        for (ring, kick, call) in
            [(&rx, &bells.rx_kick, &bells.rx_call), (&tx, &bells.tx_kick, &bells.tx_call)]
        {
            layout.places.push(RingPlace {
                addrs: ring.addrs(),
                size: ring.size(),
                kick: kick.as_raw_fd(),
                call: call.as_raw_fd(),
            });
        }
        let lay = |arena: &mut Arena, lens: &[u32], n: usize| {
            (0..n).map(|_| Slot::lay_out(mem, arena, lens)).collect::<Vec<_>>()
        };
        let tx_slots = lay(&mut tx_arena, &sizes.tx_lens, sizes.tx_slots);
        let rx_slots = lay(&mut rx_arena, &sizes.rx_lens, sizes.rx_slots);
        layout.pairs.push(PairRings { rx, tx, rx_slots, tx_slots, bells });
    }
    Ok(layout)
}

fn ring_bytes(size: u16) -> u64 {
    let n = u64::from(size);
    16 * n + (6 + 2 * n) + (6 + 8 * n) + RingAddrs::indirect_bytes(size) + RING_PADDING_BYTES
}

/// Places a ring's parts with the least alignment the specification asks for (virtio 1.3, 2.7), and
/// not at multiples of anything larger.
fn lay_out_ring(arena: &mut Arena, size: u16) -> RingAddrs {
    let n = u64::from(size);
    RingAddrs {
        desc: arena.take(16 * n, 4096, 16),
        avail: arena.take(6 + 2 * n, 4096, 2),
        used: arena.take(6 + 8 * n, 4096, 4),
        indirect: arena.take(RingAddrs::indirect_bytes(size), 64, 16),
    }
}
