//! What the way of a frame costs in memory: nothing. The real worker, engine and host sockets run on a
//! thread whose allocations are counted, between a front-end over shared memory and servers on the
//! host's loopback. Once flows stand and lists have grown to what they need, batches allocate nothing.
//!
//! A process of its own, because it counts with the process's allocator.

mod allocations;
mod guest;
mod rig;
mod scenarios;
#[expect(dead_code, reason = "the device tests use the rest")]
#[path = "../support/mod.rs"]
mod support;
