//! Mapped memory and kernel calls: the only unsafe code of this crate.
//!
//! Everything here gives safe functions to the rest. Read first: `memfd_create(2)`, `mmap(2)`,
//! `setns(2)`, `signalfd(2)` and the kernel's `Documentation/networking/tuntap.rst`.

pub(crate) mod lock;
pub(crate) mod mem;
pub(crate) mod netns;
pub(crate) mod packet;
pub(crate) mod process;
pub(crate) mod signal;
pub(crate) mod tap;
pub(crate) mod tcp;
pub(crate) mod udp;
