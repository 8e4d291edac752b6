//! Real guests for vunet's tests, benchmarks and demo.
//!
//! - [`guest`]: the *namespace guest*, a vhost-user front-end whose driver side is a TAP in a network
//!   namespace, so that Linux's own TCP stack is the guest at native speed.
//! - [`mod@bench`]: the benchmark: back-ends side by side under the same guest.
//! - [`link`]: a link with a WAN's faults between two TAPs, from a seed.
//! - [`world`]: small servers that stand for the world beyond the host, and report how each
//!   connection ended.
//! - [`lab`]: namespaces, links, commands and processes of a test, cleaned up when dropped.
//! - [`pass_tap`]: a parent that hands TAP queues down to a back-end.
//! - `sys`: the only place with unsafe code: mapped memory and kernel calls.

pub mod bench;
pub mod guest;
pub mod lab;
pub mod link;
pub mod pass_tap;
mod sys;
pub mod world;
