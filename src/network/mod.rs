//! The networks a process serves: who holds which address.
//!
//! [`leases`] is the pool of one process, in memory. It opens no file and reads no clock; time is
//! an argument. [`state_dir`] is where named networks, which several processes share, keep what they know;
//! [`name`] is what they are called, [`definition`] what they are, [`users`] who uses them, [`manager`] makes, lists
//! and removes them, and [`life`] is what they are on the host.
#![forbid(unsafe_code)]

pub mod definition;
pub mod leases;
pub mod life;
pub mod manager;
pub mod name;
pub mod rootless;
pub mod state_dir;
pub mod users;
