//! Named networks as this kernel and its firewall have them, each test in a network namespace of its own.

mod host;
mod life;
mod relay;
