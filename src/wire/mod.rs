//! Wire formats: parse and emit. No heap, no clock, no log.
//!
//! Every protocol follows one skeleton: `Header::parse` judges lengths and fields and returns a
//! plain value that cannot be wrong; `Header::emit` is its inverse. Parsing takes the host's copy of
//! a frame's first bytes, never guest memory.

#![forbid(unsafe_code)]

pub mod arp;
pub mod checksum;
pub mod ethernet;
pub mod icmpv4;
pub mod ipv4;
pub mod tcp;
pub mod udp;
pub mod vnet;

use thiserror::Error;

/// Why bytes are not a header of the protocol they were read as.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// Fewer bytes than the header, or than the length it claims.
    #[error("truncated")]
    Truncated,
    /// A field holds what its protocol forbids.
    #[error("malformed: {0}")]
    Malformed(&'static str),
    /// The checksum does not match.
    #[error("wrong checksum")]
    Checksum,
}
