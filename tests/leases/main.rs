//! The lease store of a named network: its rules against those of one process's table, what only a shared
//! network needs, and what it stands: other processes, their death at any instruction, reboots, clocks that
//! are wrong, disks that are full.

mod boots;
mod files;
mod kills;
mod names;
mod processes;
mod reservations;
mod rules;
mod shared;
#[path = "../support/store.rs"]
mod store;

use std::net::Ipv4Addr;
use std::time::Duration;

use vunet::addr::{Ipv4Subnet, MacAddr};
use vunet::network::allocator::{Bind, Client, Grant, IpAllocator, Refusal};
use vunet::network::store::{LeaseStore, Pool};
use vunet::time::Instant;

fn subnet() -> Ipv4Subnet {
    "10.0.2.0/24".parse().unwrap()
}

fn pool() -> Pool {
    Pool::new(subnet(), ip(1))
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 2, last)
}

fn mac(n: u32) -> MacAddr {
    let [a, b, c, d] = n.to_be_bytes();
    MacAddr([2, 0, a, b, c, d])
}

fn at(seconds: u64) -> Instant {
    Instant::ZERO + Duration::from_secs(seconds)
}

fn client(n: u32) -> Client<'static> {
    Client { mac: mac(n), id: None, host_name: None }
}

fn named(n: u32, host_name: &str) -> Client<'_> {
    Client { host_name: Some(host_name), ..client(n) }
}

/// DISCOVER and REQUEST to the end.
fn lease(store: &mut LeaseStore, now: Instant, client: &Client<'_>) -> Grant {
    let offer = store.offer(now, client, None).unwrap();
    let (_, grant) = store.bind(now, client, offer.ip).unwrap();
    assert_eq!(grant.ip, offer.ip);
    grant
}

/// Whether `client` was told that it cannot be bound.
fn is_nak(outcome: &Result<(Bind, Grant), Refusal>) -> bool {
    matches!(outcome, Err(Refusal::NotBound(_)))
}
