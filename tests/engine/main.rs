//! The engine between a guest of hand-made frames and a scripted world, time by hand.
//!
//! `rig` puts the parts together, `world` and `port` script both sides, `frames` writes and reads
//! frames. Every frame the guest receives is checked to be well-formed, checksums included.

mod behaviours;
mod bounds;
mod carried;
mod churn;
mod datagram_churn;
mod datagrams;
#[path = "../support/detached.rs"]
mod detached;
mod ending;
mod errors;
mod fragments;
mod frames;
mod from_guest;
mod gateway;
mod guest_changes;
mod handover;
mod handshake;
#[path = "../support/heap.rs"]
mod heap;
mod host_changes;
mod hostile;
mod interleavings;
mod leases;
mod limits;
mod options;
mod policy;
mod port;
mod published;
#[path = "../support/random.rs"]
mod random;
mod rig;
mod robust;
mod starvation;
mod to_guest;
mod world;
