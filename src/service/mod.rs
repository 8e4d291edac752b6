//! The room service.
