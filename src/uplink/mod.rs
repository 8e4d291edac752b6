//! Where frames leave: host sockets; and the links of the host.
//!
//! What only Linux knows sits in [`sys`].

mod datagrams;
pub mod host_news;
pub mod links;
mod own_addresses;
mod receive_window;
pub mod sockets;
pub mod sys;
