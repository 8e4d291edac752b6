//! System calls of the uplink that `std` and `socket2` do not have, and the host's view of its own
//! network. Linux only, but for what the command line needs.

pub mod affinity;
pub mod clock;
pub mod control;
pub mod error_queue;
pub mod inherited;
pub mod poll;
pub mod readable;
pub mod routes;
pub mod socket;
pub mod stream_runs;
pub mod tap;
