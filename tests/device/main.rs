//! The vhost-user-net device against front-ends and drivers, well-behaved and hostile.

#[path = "../capture/reader.rs"]
mod reader;
#[path = "../support/mod.rs"]
mod support;

mod capture;
mod full;
mod handshake;
mod hostile_driver;
mod hostile_front_end;
mod life;
mod transfer;
