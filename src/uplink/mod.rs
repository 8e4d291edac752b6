//! The room uplink.
