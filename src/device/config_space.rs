//! The device's configuration space, for front-ends that read it (`VHOST_USER_PROTOCOL_F_CONFIG`).
//!
//! It is written out afresh for every request, so there is no state to keep true. The driver may
//! write nothing of it that matters: a legacy driver's MAC address is learned from its frames.
//!
//! May touch: nothing. Read first: virtio 1.3, 5.1.4.

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::addr::MacAddr;
use crate::limits::CONFIG_SPACE_BYTES_MAX;

/// What the configuration space says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConfigSpace {
    /// The guest's address, if it was configured; zero otherwise, and `MAC` is not offered then.
    pub(super) mac: Option<MacAddr>,
    /// Queue pairs a guest is told of that reads the configuration space. More than there are workers
    /// would only cost it memory; a front-end that brings more all the same is served.
    pub(super) queue_pairs: u16,
    /// IP MTU in bytes.
    pub(super) ip_mtu: u16,
}

impl ConfigSpace {
    /// The whole space: `struct virtio_net_config`, zero beyond the fields served.
    pub(super) fn bytes(&self) -> [u8; CONFIG_SPACE_BYTES_MAX] {
        let mut out = [0; CONFIG_SPACE_BYTES_MAX];
        out[0..6].copy_from_slice(&self.mac.unwrap_or_default().0);
        out[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        out[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        out[10..12].copy_from_slice(&self.ip_mtu.to_le_bytes());
        out
    }

    /// The `size_bytes` bytes from `offset_bytes` on, if they lie within the space.
    pub(super) fn read(&self, offset_bytes: u32, size_bytes: u32) -> Option<Vec<u8>> {
        let from = offset_bytes as usize;
        let end = from.checked_add(size_bytes as usize)?;
        Some(self.bytes().get(from..end)?.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let space = ConfigSpace { mac: Some(MacAddr([2, 3, 4, 5, 6, 7])), queue_pairs: 2, ip_mtu: 1400 };
        let bytes = space.read(0, 12).unwrap();
        assert_eq!(bytes, [2, 3, 4, 5, 6, 7, 1, 0, 2, 0, 0x78, 5]);
        assert_eq!(space.read(10, 2).unwrap(), [0x78, 5]);
    }

    #[test]
    fn request_past_the_end_is_refused() {
        let space = ConfigSpace { mac: None, queue_pairs: 1, ip_mtu: 1500 };
        assert_eq!(space.read(0, 256).unwrap().len(), 256);
        assert_eq!(space.read(1, 256), None);
        assert_eq!(space.read(u32::MAX, u32::MAX), None);
    }
}
