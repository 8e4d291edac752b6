//! Where frames leave: host sockets.
//!
//! What only Linux knows sits in [`sys`].

mod datagrams;
pub mod host_news;
mod own_addresses;
mod receive_window;
pub mod sockets;
pub mod sys;
