//! The networks a process serves: who holds which address.
//!
//! [`leases`] is the pool of one process, in memory. It opens no file and reads no clock; time is
//! an argument.
#![forbid(unsafe_code)]

pub mod leases;
