//! Where frames leave: host sockets.
//!
//! What only Linux knows sits in [`sys`].

pub mod sockets;
pub mod sys;
