//! What happens to a frame: classification, the gateway's services, translation.

#![forbid(unsafe_code)]

pub mod guest_port;
pub mod host_net;
pub mod nat;
