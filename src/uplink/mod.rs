<<<<<<< HEAD
//! Where frames leave: host sockets.
//!
//! What only Linux knows sits in [`sys`].

pub mod sockets;
=======
//! The room uplink.

>>>>>>> wire
pub mod sys;
