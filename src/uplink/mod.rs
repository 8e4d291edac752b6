//! Where frames leave: host sockets; and the links of the host.
//!
//! What only Linux knows sits in [`sys`].

pub mod conntrack;
mod datagrams;
pub mod firewall;
pub mod forwarding;
pub mod host_news;
pub mod links;
pub mod network_news;
mod own_addresses;
pub mod own_bridge;
pub mod port_owner;
pub mod published;
mod receive_window;
pub mod sockets;
pub mod sys;
pub mod sysctl;
pub mod tap;
mod world_routes;
