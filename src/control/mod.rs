//! The control thread's work: everything slow, on one tokio runtime of one thread.
//!
//! That is upstream DNS (`dns_forward`), and the host's network as it changes: `host_watch` sees it,
//! `dependents` are told. On a named network `lease_keeping` writes the log of leases back.
//!
//! Workers talk to it through single-producer rings with an eventfd in each direction, and never
//! wait for it.

pub mod dependents;
pub mod dns_forward;
pub mod host_watch;
pub mod lease_keeping;
