//! The networks a process serves: who holds which address.
//!
//! [`allocator`] says what is asked of a pool; [`leases`] keeps it in the memory of one process, [`store`] in a
//! file that all processes of a named network share. [`state_dir`] is where that file lives and what else
//! such a network has to remember; [`name`] is what it is called, [`definition`] what it is, [`users`] who uses it,
//! [`manager`] makes, lists and removes it, and [`life`] is what it is on the host. [`clock`] is the time that
//! processes and boots agree on, [`guest_names`] what DNS asks.
#![forbid(unsafe_code)]

pub mod allocator;
pub mod clock;
pub mod definition;
mod file_lock;
pub mod guest_names;
pub mod leases;
pub mod life;
pub mod manager;
pub mod name;
pub mod rootless;
pub mod state_dir;
pub mod store;
pub mod users;
