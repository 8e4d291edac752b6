//! Reboots, and clocks that are wrong.

use std::path::Path;

use vunet::network::allocator::IpAllocator;
use vunet::network::store::LeaseStore;
use vunet::time::Instant;

use crate::store::{self, TestClock};
use crate::{at, client, ip, is_nak, lease, pool};

const HOUR: u64 = 3600;
const NOON_US: i64 = 1_700_000_000_000_000;

fn open(folder: &Path, boot: &'static str, wall_ahead_us: i64) -> LeaseStore {
    LeaseStore::open(folder, pool(), TestClock::new(boot, wall_ahead_us), 1).unwrap()
}

fn us(seconds: u64) -> i64 {
    i64::try_from(seconds * 1_000_000).unwrap()
}

/// Seconds left of the lease of client 1.
fn left_s(store: &mut LeaseStore, now: Instant) -> u64 {
    let lease = store.get(now, client(1).mac).unwrap().unwrap();
    lease.until.unwrap().since(now).as_secs()
}

#[test]
fn a_lease_outlives_a_reboot_by_what_was_left_of_it() {
    let folder = store::folder();
    let mut before = open(folder.path(), "one", NOON_US);
    assert_eq!(lease(&mut before, at(10 * HOUR), &client(1)).ip, ip(2));
    before.offer(at(10 * HOUR), &client(2), None).unwrap();
    assert_eq!(lease(&mut before, at(10 * HOUR), &client(3)).ip, ip(4));
    assert!(before.decline(at(10 * HOUR), client(3).mac, ip(4)).unwrap());
    drop(before);
    // Off for an hour, up for none.
    let mut after = open(folder.path(), "two", NOON_US + us(11 * HOUR));
    assert_eq!(left_s(&mut after, at(0)), 23 * HOUR);
    assert!(is_nak(&after.bind(at(1), &client(9), ip(2))));
    assert_eq!(after.leases(at(1)).unwrap().len(), 1, "offers are void");
    assert_eq!(lease(&mut after, at(1), &client(9)).ip, ip(3));
    assert_eq!(lease(&mut after, at(1), &client(8)).ip, ip(4), "the declined address had its rest");
    assert!(after.bind(at(23 * HOUR), &client(7), ip(2)).is_ok(), "it ended");
}

#[test]
fn a_declined_address_rests_on_through_a_reboot() {
    let folder = store::folder();
    let mut before = open(folder.path(), "one", NOON_US);
    lease(&mut before, at(100), &client(1));
    assert!(before.decline(at(100), client(1).mac, ip(2)).unwrap());
    drop(before);
    let mut after = open(folder.path(), "two", NOON_US + us(200));
    assert_eq!(after.offer(at(0), &client(1), None).unwrap().ip, ip(3));
    assert_eq!(after.offer(at(201), &client(2), None).unwrap().ip, ip(2));
}

#[test]
fn a_time_of_day_that_jumps_ends_no_lease_and_prolongs_none() {
    let folder = store::folder();
    lease(&mut open(folder.path(), "one", NOON_US), at(0), &client(1));
    for wall_ahead_us in [NOON_US + us(90_000), NOON_US - us(90_000), 0, -NOON_US] {
        let mut store = open(folder.path(), "one", wall_ahead_us);
        assert_eq!(left_s(&mut store, at(HOUR)), 23 * HOUR);
        assert!(is_nak(&store.bind(at(24 * HOUR - 1), &client(2), ip(2))), "{wall_ahead_us}");
    }
    let mut store = open(folder.path(), "one", NOON_US);
    assert!(store.bind(at(24 * HOUR), &client(2), ip(2)).is_ok());
}

#[test]
fn after_a_reboot_into_the_past_a_lease_lasts_as_long_as_a_lease_can() {
    let folder = store::folder();
    lease(&mut open(folder.path(), "one", NOON_US), at(0), &client(1));
    let mut store = open(folder.path(), "two", 0);
    assert_eq!(left_s(&mut store, at(0)), 24 * HOUR);
}

#[test]
fn after_a_reboot_into_the_future_everybody_still_finds_its_address() {
    let folder = store::folder();
    let mut before = open(folder.path(), "one", NOON_US);
    for n in 1..=3 {
        assert_eq!(lease(&mut before, at(u64::from(n)), &client(n)).ip, ip(1 + n as u8));
    }
    drop(before);
    let mut after = open(folder.path(), "two", NOON_US + us(1_000_000_000));
    assert_eq!(lease(&mut after, at(1), &client(9)).ip, ip(5), "what is remembered is used last");
    assert_eq!(lease(&mut after, at(1), &client(2)).ip, ip(3));
}

#[test]
fn leases_that_ended_before_a_reboot_keep_their_order() {
    let folder = store::folder();
    let subnet = "10.0.2.0/29".parse().unwrap();
    let pool = store::alone(subnet, ip(1), None);
    let mut before =
        LeaseStore::open(folder.path(), pool.clone(), TestClock::new("one", NOON_US), 1).unwrap();
    for n in 0..5 {
        lease(&mut before, at(100), &client(n));
    }
    for n in [3, 0, 1, 4, 2] {
        assert!(before.release(at(200 + u64::from(n)), client(n).mac, ip(2 + n as u8)).unwrap());
    }
    drop(before);
    let clock = TestClock::new("two", NOON_US + us(300));
    let mut after = LeaseStore::open(folder.path(), pool, clock, 1).unwrap();
    for n in 0..5u8 {
        assert_eq!(lease(&mut after, at(0), &client(100 + u32::from(n))).ip, ip(2 + n));
    }
}
