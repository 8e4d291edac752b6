//! The room control.
