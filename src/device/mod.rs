//! The room device.
