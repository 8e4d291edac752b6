//! System calls of the uplink that `std` and `socket2` do not have. Linux only.

pub mod poll;
pub mod socket;
