//! The vhost-user-net device: what a front-end attaches to and a guest's driver talks to.
//!
//! Two sides, two threads. The *session* (`session`) speaks vhost-user on the socket: it parses
//! messages, negotiates, maps memory, and never touches a ring. The *worker* owns [`DeviceQueues`]
//! and moves frames; it takes commands from the session between batches and never waits for it.
//!
//! Why not `vhost-user-backend`: `docs/adr/0001-own-vhost-user-session.md`.
//!
//! May touch: `wire`, `frame`, `limits`, the trait `engine::guest_port`. Unsafe code lives in
//! `guest_mem` and `sys` only. Read first: the vhost-user specification; virtio 1.3, 2.7 and 5.1.

mod chain;
mod command;
mod config_space;
mod control_queue;
mod features;
#[expect(unsafe_code, reason = "guest memory is reached through raw pointers")]
pub mod guest_mem;
mod queues;
mod ring;
mod rx;
mod session;
mod stats;
#[expect(unsafe_code, reason = "system calls the libraries do not wrap")]
mod sys;
mod tx;

use std::io;

pub use chain::ChainError;
pub use features::{Feature, Features};
pub use queues::{DeviceEvent, DeviceQueues, KickKind, KickWatch};
pub use ring::RingFault;
pub use rx::RxSide;
pub use session::{SessionError, SessionSide, SocketError};
pub use stats::{ChainErrors, ControlStats, DeviceStats, RxStats, TxStats};
pub use tx::{Drained, Heads, Taken, TxEvent, TxSide};

use crate::addr::MacAddr;
use crate::config::IpMtu;

/// What the device is told at start.
#[derive(Clone, Copy, Debug)]
pub struct DeviceConfig {
    /// MAC address offered to front-ends that read the configuration space.
    pub mac: Option<MacAddr>,
    /// The guest's IP MTU; a front-end can make it smaller.
    pub ip_mtu: IpMtu,
    /// Queue pairs a driver that reads the configuration space is told of, 1 to
    /// [`crate::limits::QUEUE_PAIRS_MAX`].
    pub queue_pairs: u16,
    /// End the session when the first front-end leaves.
    pub one_off: bool,
}

/// A device: the side that speaks to the front-end, and one side for each of `workers` workers that
/// moves frames. Worker `n` has the queue pairs `n`, `n + workers`, and so on.
///
/// # Errors
/// No descriptor for the eventfds between them.
pub fn device(config: DeviceConfig, workers: usize) -> io::Result<(SessionSide, Vec<DeviceQueues>)> {
    let (senders, receivers, notice) = command::channels(workers)?;
    let queues = receivers.into_iter().map(DeviceQueues::new).collect();
    Ok((SessionSide::new(config, senders, notice), queues))
}
