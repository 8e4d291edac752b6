//! The gateway's services as pure machines: a request goes in, an answer comes out.
//!
//! No service here has a socket, a clock or a thread. The engine hands them what the guest sent,
//! with the time as an argument, and sends what they answer.
#![forbid(unsafe_code)]

pub mod dhcp;
pub mod dns;
