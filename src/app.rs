//! Start order and shutdown.
