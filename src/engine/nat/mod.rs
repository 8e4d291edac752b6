//! Flows to host sockets.
