//! Where frames leave: host sockets.
//!
//! What only Linux knows sits in [`sys`].

mod datagrams;
pub mod host_news;
mod own_addresses;
pub mod sockets;
pub mod sys;
