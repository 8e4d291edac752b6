//! The vhost-user-net device against front-ends and drivers, well-behaved and hostile.

#[path = "../support/mod.rs"]
mod support;

mod handshake;
mod transfer;
