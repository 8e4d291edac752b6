//! The room uplink.

pub mod sys;
