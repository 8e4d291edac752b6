//! vunet: a vhost-user network backend, one process per virtual machine.
//!
//! A front-end (QEMU, cloud-hypervisor, crosvm, user-mode Linux, DPDK) attaches over a unix socket
//! and shares the guest's memory; vunet works the guest's virtqueues and gives the guest a network:
//! DHCP, DNS and address translation over ordinary host sockets, without privilege.
//!
//! The rooms and what each may touch are described in `docs/architecture.md`.

pub mod addr;
pub mod app;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod device;
pub mod doctor;
pub mod engine;
pub mod frame;
pub mod histogram;
pub mod holder;
pub mod limits;
pub mod log;
pub mod memory;
pub mod network;
pub mod postbox;
mod random;
mod rate;
pub mod rate_limit;
pub mod requests;
pub mod sandbox;
pub mod service;
pub mod socket_file;
pub mod time;
pub mod top;
pub mod uplink;
pub mod wire;
pub mod worker;
