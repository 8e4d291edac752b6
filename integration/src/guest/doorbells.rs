//! The eventfds of a queue pair.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The four notification descriptors of a pair, and one to wake its worker.
#[derive(Debug)]
pub(crate) struct Doorbells {
    /// Driver to device, receive ring.
    pub(crate) rx_kick: EventFd,
    /// Device to driver, receive ring.
    pub(crate) rx_call: EventFd,
    /// Driver to device, transmit ring.
    pub(crate) tx_kick: EventFd,
    /// Device to driver, transmit ring.
    pub(crate) tx_call: EventFd,
    /// Main thread to worker.
    pub(crate) wake: EventFd,
}

impl Doorbells {
    /// Fresh, non-blocking eventfds.
    ///
    /// # Errors
    /// What `eventfd` answers.
    pub(crate) fn new() -> io::Result<Doorbells> {
        let fd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Doorbells { rx_kick: fd()?, rx_call: fd()?, tx_kick: fd()?, tx_call: fd()?, wake: fd()? })
    }
}
