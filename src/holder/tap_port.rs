//! A TAP in place of a guest: what the engine sends is written to it, what is read from it is the guest's.
//!
//! Every frame has a virtio-net header of 12 bytes in front (`TUNSETVNETHDRSZ`), as in a virtqueue, so
//! segmentation is done once, by the guest at the far end or by the kernel.
//!
//! Read first: the kernel's `Documentation/networking/tuntap.rst`.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::engine::guest_port::{GuestOffloads, GuestPort, ReserveError};
use crate::frame::{Payload, PayloadMut, QueuePair, TxFrame};
use crate::limits::{FRAME_BYTES_MAX, FRAME_HEAD_BYTES};
use crate::wire::ethernet;
use crate::wire::vnet::{VNET_HEADER_BYTES, VnetHeader};

/// Frames posted at any time, for the engine's estimates: the TAP takes as many as come.
const BUFFERS: usize = 1024;

/// The end that takes frames.
#[derive(Debug)]
pub struct TapPort {
    tap: File,
    scratch: Box<[u8]>,
    /// Bytes of the open reservation.
    open: Option<usize>,
    /// Frames the kernel did not take.
    pub refused: u64,
}

/// The end that has them.
#[derive(Debug)]
pub struct TapSource {
    tap: File,
    frame: Box<[u8]>,
}

/// Both ends of a TAP whose descriptor does not block.
///
/// # Errors
/// No second descriptor.
pub fn ends(tap: OwnedFd) -> io::Result<(TapSource, TapPort)> {
    let tap = File::from(tap);
    let buffer = || vec![0; FRAME_BYTES_MAX].into_boxed_slice();
    let source = TapSource { tap: tap.try_clone()?, frame: buffer() };
    Ok((source, TapPort { tap, scratch: buffer(), open: None, refused: 0 }))
}

impl TapSource {
    /// The descriptor, to be watched.
    pub fn fd(&self) -> RawFd {
        self.tap.as_raw_fd()
    }

    /// Hands the next frame to `each`. False if none is waiting. What is no frame is passed over.
    ///
    /// # Errors
    /// The kernel's: the interface is gone.
    pub fn next(&mut self, each: impl FnOnce(&TxFrame<'_>)) -> io::Result<bool> {
        let mut header = [0; VNET_HEADER_BYTES];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut self.frame)];
        let bytes = match (&self.tap).read_vectored(&mut parts) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        let frame = &self.frame[..bytes.saturating_sub(VNET_HEADER_BYTES)];
        if frame.len() >= ethernet::HEADER_BYTES
            && let Ok(vnet) = VnetHeader::parse(&header)
        {
            each(&TxFrame {
                vnet,
                head: &frame[..frame.len().min(FRAME_HEAD_BYTES)],
                whole: Payload::from_host(frame),
                pair: QueuePair::default(),
            });
        }
        Ok(true)
    }
}

impl GuestPort for TapPort {
    fn offloads(&self) -> GuestOffloads {
        // The kernel cuts and sums for whoever cannot.
        GuestOffloads { checksum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true }
    }

    fn reserve(
        &mut self,
        _pair: QueuePair,
        min_bytes: usize,
        max_bytes: usize,
    ) -> Result<usize, ReserveError> {
        if min_bytes > self.scratch.len() {
            return Err(ReserveError::TooSmall);
        }
        let reserved = max_bytes.min(self.scratch.len());
        self.open = Some(reserved);
        Ok(reserved)
    }

    fn reserved(&mut self, from_bytes: usize) -> PayloadMut<'_> {
        let open = self.open.unwrap_or(0);
        PayloadMut::from_host(&mut self.scratch[from_bytes.min(open)..open])
    }

    fn commit(&mut self, vnet: VnetHeader, head: &[u8], len_bytes: usize) {
        let Some(open) = self.open.take() else { return };
        let rest = &self.scratch[head.len().min(open)..len_bytes.min(open).max(head.len().min(open))];
        let header = VnetHeader { num_buffers: 0, ..vnet }.emit();
        let parts = [IoSlice::new(&header), IoSlice::new(head), IoSlice::new(rest)];
        // A link may lose a frame; whoever sent it knows what to do.
        if (&self.tap).write_vectored(&parts).is_err() {
            self.refused += 1;
        }
    }

    fn cancel(&mut self) {
        self.open = None;
    }

    fn buffers(&self, _pair: QueuePair) -> usize {
        BUFFERS
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::wire::vnet::Checksum;

    /// A datagram socket keeps frames apart as a TAP does.
    fn pair() -> (UnixDatagram, TapSource, TapPort) {
        let (world, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let (source, port) = ends(OwnedFd::from(tap)).unwrap();
        (world, source, port)
    }

    #[test]
    fn frame_is_written_whole_with_its_header_in_front() {
        let (world, _source, mut port) = pair();
        let vnet =
            VnetHeader { checksum: Checksum::Partial { start: 34, offset: 16 }, ..VnetHeader::default() };
        assert_eq!(port.reserve(QueuePair(0), 20, 100), Ok(100));
        port.reserved(14).copy_from(b"payload");
        port.commit(vnet, &[7; 14], 21);
        let mut bytes = [0; 200];
        let len = world.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..VNET_HEADER_BYTES], &vnet.emit());
        assert_eq!(&bytes[VNET_HEADER_BYTES..len], &[&[7; 14][..], b"payload"].concat()[..]);
    }

    #[test]
    fn frame_is_read_and_what_is_none_passed_over() {
        let (world, mut source, _port) = pair();
        let vnet = VnetHeader::default().emit();
        world.send(&[&vnet[..], &[1; 60]].concat()).unwrap();
        world.send(&[&vnet[..], &[2; 13]].concat()).unwrap();
        world.send(&vnet[..5]).unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            assert!(source.next(|frame| seen.push((frame.head[0], frame.whole.len()))).unwrap());
        }
        assert!(!source.next(|_| panic!("nothing is waiting")).unwrap());
        assert_eq!(seen, [(1, 60)]);
    }

    #[test]
    fn reservation_beyond_the_longest_frame_is_refused() {
        let (_world, _source, mut port) = pair();
        assert_eq!(
            port.reserve(QueuePair(0), FRAME_BYTES_MAX + 1, FRAME_BYTES_MAX + 1),
            Err(ReserveError::TooSmall)
        );
        assert_eq!(port.reserve(QueuePair(0), 1, FRAME_BYTES_MAX + 1), Ok(FRAME_BYTES_MAX));
    }
}
