//! Where frames leave: host sockets.
//!
//! What only Linux knows sits in [`sys`].

mod own_addresses;
pub mod sockets;
pub mod sys;
