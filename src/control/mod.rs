//! The control thread's work: everything slow, on one tokio runtime of one thread.
//!
//! That is upstream DNS (`dns_forward`), and the host's network as it changes: `host_watch` sees it,
//! `dependents` are told. For a named network, `network_watch` keeps it as it must be, `port_relay` serves
//! published ports to the host itself, and `lease_keeping` writes the log of leases back. On a LAN
//! `station_leases` keeps what its DHCP leased to the guest. With `--control`, `api` answers people and programs,
//! and `events` is what it tells them unasked;
//! `capture` has workers record what crosses the device. `service_manager` tells who started the process how it stands.
//!
//! Workers talk to it through single-producer rings with an eventfd in each direction, and never
//! wait for it.

pub mod api;
pub mod capture;
pub mod client;
pub mod dependents;
pub mod dns_forward;
pub mod events;
pub mod host_watch;
pub mod lease_claims;
pub mod lease_keeping;
pub mod limits;
pub mod network_watch;
pub mod port_relay;
pub mod ports;
pub mod ports_of_settings;
pub mod service_manager;
pub mod signals;
pub mod station_leases;
