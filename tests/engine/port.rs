//! The guest's receive rings, scripted: so many buffers of such a size, or none, or no ring at all.

use std::collections::VecDeque;

use vunet::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use vunet::frame::{PayloadMut, QueuePair};
use vunet::wire::vnet::VnetHeader;

/// A frame as the guest's driver finds it.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) vnet: VnetHeader,
    pub(crate) frame: Vec<u8>,
    pub(crate) pair: QueuePair,
}

/// The receive rings.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) offloads: GuestOffloads,
    /// Frames that may still be placed.
    pub(crate) free: usize,
    pub(crate) is_up: bool,
    /// Largest frame a buffer holds.
    pub(crate) frame_bytes_max: usize,
    pub(crate) delivered: VecDeque<Received>,
    pub(crate) reserves: usize,
    /// A reservation found no buffers: the guest's next kick is heard.
    pub(crate) is_starved: bool,
    open: Option<(QueuePair, Vec<u8>)>,
}

impl Port {
    pub(crate) fn new() -> Port {
        Port {
            offloads: GuestOffloads::default(),
            free: usize::MAX,
            is_up: true,
            frame_bytes_max: 70_000,
            delivered: VecDeque::new(),
            reserves: 0,
            is_starved: false,
            open: None,
        }
    }
}

impl GuestPort for Port {
    fn offloads(&self) -> GuestOffloads {
        self.offloads
    }

    fn reserve(
        &mut self,
        pair: QueuePair,
        min_bytes: usize,
        max_bytes: usize,
    ) -> Result<usize, ReserveError> {
        assert!(self.open.is_none(), "one reservation at a time");
        assert!(min_bytes <= max_bytes);
        self.reserves += 1;
        if !self.is_up {
            return Err(ReserveError::Down);
        }
        if self.free == 0 {
            self.is_starved = true;
            return Err(ReserveError::Full);
        }
        if min_bytes > self.frame_bytes_max {
            return Err(ReserveError::TooSmall);
        }
        let bytes = max_bytes.min(self.frame_bytes_max);
        self.open = Some((pair, vec![0xee; bytes]));
        Ok(bytes)
    }

    fn buffers(&self, _: QueuePair) -> usize {
        self.free
    }

    fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_> {
        let (_, bytes) = self.open.as_mut().expect("a reservation is open");
        let from = from_bytes.min(bytes.len());
        PayloadMut::from_host(&mut bytes[from..])
    }

    fn commit(&mut self, vnet: VnetHeader, head: &[u8], len_bytes: usize) {
        let (pair, mut frame) = self.open.take().expect("a reservation is open");
        assert!(head.len() <= len_bytes && len_bytes <= frame.len());
        frame.truncate(len_bytes);
        frame[..head.len()].copy_from_slice(head);
        self.free -= 1;
        self.delivered.push_back(Received { vnet, frame, pair });
    }

    fn cancel(&mut self) {
        assert!(self.open.take().is_some(), "a reservation is open");
    }
}
