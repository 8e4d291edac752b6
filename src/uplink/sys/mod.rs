//! What the uplink asks of the kernel.

pub mod inherited;
pub mod routes;
