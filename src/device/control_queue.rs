//! The control queue, for front-ends that leave it to the back-end (user-mode Linux does; QEMU and
//! cloud-hypervisor serve it themselves).
//!
//! Commands are acknowledged where vunet has nothing to do for them: it delivers no frame the guest
//! would have to filter, and learns addresses from the guest's frames. What it does not know it
//! refuses, as the specification asks.
//!
//! May touch: the control ring. Read first: virtio 1.3, 5.1.6.5.

use virtio_bindings::bindings::virtio_net as net;

use super::chain::{ChainBuf, ChainError};
use super::ring::{Popped, Ring, RingFault, SharedMemory};
use super::stats::ControlStats;
use crate::addr::MacAddr;
use crate::limits::{CONTROL_COMMAND_BYTES_MAX, CONTROL_COMMANDS_MAX, QUEUE_PAIRS_MAX};

/// A control ring in its place.
#[derive(Debug)]
pub(super) struct ControlRing {
    pub(super) ring: Ring,
    /// Why it was stopped, until it is started again.
    pub(super) fault: Option<RingFault>,
}

/// The control queue.
#[derive(Debug)]
pub(super) struct ControlSide {
    /// The ring and its index, once one was found to be the control queue.
    pub(super) ring: Option<(u16, ControlRing)>,
    pub(super) stats: ControlStats,
    chain: ChainBuf,
}

impl ControlSide {
    pub(super) fn new(memory: &SharedMemory) -> ControlSide {
        ControlSide { ring: None, stats: ControlStats::default(), chain: ChainBuf::new(memory) }
    }

    pub(super) fn set_memory(&mut self, memory: &SharedMemory) {
        self.chain.set_memory(memory);
    }

    /// Serves the commands waiting. Returns whether some were left for another visit.
    pub(super) fn serve(&mut self) -> bool {
        let ControlSide { ring, stats, chain } = self;
        let Some((_, control)) = ring else { return false };
        if control.fault.is_some() {
            return false;
        }
        let outcome = serve_ring(&mut control.ring, chain, stats);
        control.ring.publish();
        match outcome {
            Ok(more) => more,
            Err(fault) => {
                control.fault = Some(fault);
                false
            }
        }
    }
}

fn serve_ring(ring: &mut Ring, chain: &mut ChainBuf, stats: &mut ControlStats) -> Result<bool, RingFault> {
    for _ in 0..CONTROL_COMMANDS_MAX {
        chain.clear();
        match ring.pop(chain)? {
            Popped::Empty if ring.arm()? => {}
            Popped::Empty => return Ok(false),
            Popped::Bad { head, why } => {
                stats.bad_chains.count(why);
                ring.complete(head, 0);
            }
            Popped::Chain { head } if chain.writable.len_bytes() == 0 => {
                stats.bad_chains.count(ChainError::Empty);
                ring.complete(head, 0);
            }
            Popped::Chain { head } => {
                let mut command = [0; CONTROL_COMMAND_BYTES_MAX];
                let len = chain.readable.payload().copy_to(&mut command);
                let served = chain.readable.len_bytes() == len && serve_command(&command[..len]);
                let count = if served { &mut stats.served } else { &mut stats.refused };
                *count += 1;
                let answer = if served { net::VIRTIO_NET_OK } else { net::VIRTIO_NET_ERR };
                chain.writable.payload_mut().copy_from(&[answer as u8]);
                ring.complete(head, 1);
            }
        }
    }
    Ok(true)
}

/// Whether the command (class, number, body) is known, well-formed and carried out.
fn serve_command(command: &[u8]) -> bool {
    let [class, number, body @ ..] = command else { return false };
    let (class, number) = (u32::from(*class), u32::from(*number));
    match class {
        net::VIRTIO_NET_CTRL_RX => number <= net::VIRTIO_NET_CTRL_RX_NOBCAST && body.len() == 1,
        net::VIRTIO_NET_CTRL_MAC => match number {
            net::VIRTIO_NET_CTRL_MAC_TABLE_SET => are_mac_tables(body),
            net::VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                <[u8; 6]>::try_from(body).is_ok_and(|mac| MacAddr(mac).is_unicast())
            }
            _ => false,
        },
        net::VIRTIO_NET_CTRL_VLAN => number <= net::VIRTIO_NET_CTRL_VLAN_DEL && body.len() == 2,
        net::VIRTIO_NET_CTRL_ANNOUNCE => number == net::VIRTIO_NET_CTRL_ANNOUNCE_ACK && body.is_empty(),
        net::VIRTIO_NET_CTRL_MQ if number == net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
            let pairs = <[u8; 2]>::try_from(body).map_or(0, u16::from_le_bytes);
            (1..=QUEUE_PAIRS_MAX).contains(&usize::from(pairs))
        }
        _ => false,
    }
}

/// Whether `body` is two tables of addresses, each with its length in front.
fn are_mac_tables(body: &[u8]) -> bool {
    let table_end = |from: usize| {
        let count = body.get(from..from + 4)?;
        let count = u32::from_le_bytes(count.try_into().ok()?) as usize;
        count.checked_mul(6)?.checked_add(from + 4).filter(|end| *end <= body.len())
    };
    table_end(0).and_then(table_end) == Some(body.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_of_the_specification_are_served() {
        for good in [
            &[0u8, 0, 1][..],
            &[1, 1, 0x52, 0x54, 0, 1, 2, 3],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 1, 0, 0, 0, 9, 9, 9, 9, 9, 9, 0, 0, 0, 0],
            &[2, 0, 7, 0],
            &[3, 0],
            &[4, 0, 16, 0],
        ] {
            assert!(serve_command(good), "{good:?}");
        }
    }

    #[test]
    fn unknown_or_malformed_commands_are_refused() {
        for bad in [
            &[][..],
            &[0],
            &[0, 6, 1],
            &[0, 0],
            &[1, 1, 0x53, 0x54, 0, 1, 2, 3],
            &[1, 1, 0x52],
            &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[1, 0, 255, 255, 255, 255, 0, 0, 0, 0],
            &[2, 0, 7],
            &[3, 1],
            &[4, 0, 0, 0],
            &[4, 0, 17, 0],
            &[4, 1, 1, 0],
            &[9, 0],
        ] {
            assert!(!serve_command(bad), "{bad:?}");
        }
    }
}
