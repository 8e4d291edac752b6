//! The vhost-user-net device against front-ends and drivers, well-behaved and hostile.

#[path = "../support/mod.rs"]
mod support;

mod full;
mod handshake;
mod hostile_driver;
mod hostile_front_end;
mod life;
mod transfer;
