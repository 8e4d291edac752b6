//! Translation of packets, not of connections: the guest's subnet behind one address of a link.
//!
//! Frames are judged and changed by their first bytes alone; payload stays where it is. Nothing here makes a
//! system call, reads a clock or keeps a frame but a bounded few fragments. IPv4 only.
//!
//! Read first: RFC 3022 (what such a NAT is), RFC 4787, 5382 and 5508 (what it owes UDP, TCP and ICMP).

mod cache;
pub mod flow;
pub mod fragments;
mod guests;
pub mod head;
pub mod icmp;
mod index;
pub mod ports;
pub mod random;
pub mod rewrite;
pub mod table;
pub mod tcp_state;
mod wheel;
