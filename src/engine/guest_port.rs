//! What the engine needs of the guest's side: receive buffers to fill.
//!
//! `device::rx` implements it over the guest's receive queues, the simulation over a Vec. At most
//! one reservation is open at a time; it ends with `commit` or `cancel`.

use thiserror::Error;

use crate::frame::{PayloadMut, QueuePair};
use crate::wire::vnet::VnetHeader;

/// What the guest's driver accepted for frames towards it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads {
    /// Partial checksums (`VIRTIO_NET_F_GUEST_CSUM`).
    pub checksum: bool,
    /// TCP over IPv4 up to 64 KiB (`VIRTIO_NET_F_GUEST_TSO4`).
    pub tso4: bool,
    /// TCP over IPv6 up to 64 KiB (`VIRTIO_NET_F_GUEST_TSO6`).
    pub tso6: bool,
    /// ECN on segmented TCP (`VIRTIO_NET_F_GUEST_ECN`).
    pub ecn: bool,
    /// UDP over IPv4 datagrams of equal size in one frame (`VIRTIO_NET_F_GUEST_USO4`).
    pub uso4: bool,
    /// The same over IPv6 (`VIRTIO_NET_F_GUEST_USO6`).
    pub uso6: bool,
}

/// Why no receive buffer could be reserved.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ReserveError {
    /// The guest has posted too few buffers; it will kick when it posts more, and the engine's
    /// `guest_has_buffers` is called then.
    #[error("no receive buffers")]
    Full,
    /// The ring is not running: the frame has nowhere to go.
    #[error("the receive ring is not running")]
    Down,
    /// The guest's buffers cannot hold `min_bytes` whatever the number of them posted.
    #[error("receive buffers too small")]
    TooSmall,
}

/// The guest's receive side.
pub trait GuestPort {
    /// What the guest accepted; constant between ring starts.
    fn offloads(&self) -> GuestOffloads;

    /// Opens a reservation for a frame of at least `min_bytes` and at most `max_bytes` (Ethernet
    /// header included, virtio-net header not). Returns the bytes reserved, between the two.
    ///
    /// # Errors
    /// [`ReserveError`]; nothing is open then.
    fn reserve(&mut self, pair: QueuePair, min_bytes: usize, max_bytes: usize)
    -> Result<usize, ReserveError>;

    /// The open reservation from frame byte `from_bytes` on, to be filled.
    fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_>;

    /// Ends the reservation with a frame of `len_bytes`: writes the virtio-net header (its
    /// `num_buffers` is the port's to set) and `head` at the frame's start, and returns unused
    /// buffers to the ring. The guest sees the frame at the next publish, once per batch.
    fn commit(&mut self, vnet: VnetHeader, head: &[u8], len_bytes: usize);

    /// Ends the reservation and returns all its buffers to the ring.
    fn cancel(&mut self);

    /// Receive buffers posted and not used, an estimate on the low side; a frame takes one or more.
    fn buffers(&self, pair: QueuePair) -> usize;

    /// Whether a frame of `len_bytes` could be sent now.
    ///
    /// # Errors
    /// [`ReserveError`]; after `Full` a kick tells of buffers, as after [`GuestPort::reserve`].
    fn has_room(&mut self, pair: QueuePair, len_bytes: usize) -> Result<(), ReserveError> {
        self.reserve(pair, len_bytes, len_bytes)?;
        self.cancel();
        Ok(())
    }

    /// Sends a frame whose headers and payload lie in host memory, apart.
    ///
    /// # Errors
    /// [`ReserveError`] if it could not be placed whole.
    fn send_parts(
        &mut self,
        pair: QueuePair,
        vnet: VnetHeader,
        head: &[u8],
        payload: &[u8],
    ) -> Result<(), ReserveError> {
        let len = head.len() + payload.len();
        self.reserve(pair, len, len)?;
        self.reserved(head.len()).copy_from(payload);
        self.commit(vnet, head, len);
        Ok(())
    }

    /// Sends a frame that lies in host memory.
    ///
    /// # Errors
    /// [`ReserveError`] if it could not be placed whole.
    fn send(&mut self, pair: QueuePair, vnet: VnetHeader, frame: &[u8]) -> Result<(), ReserveError> {
        self.reserve(pair, frame.len(), frame.len())?;
        self.commit(vnet, frame, frame.len());
        Ok(())
    }
}
