//! The control thread's work: everything slow, on one tokio runtime of one thread.
//!
//! Workers talk to it through single-producer rings with an eventfd in each direction, and never
//! wait for it.

pub mod dns_forward;
