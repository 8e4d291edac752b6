//! Leases of processes that are gone: let go, kept for a while, taken up again.

use std::path::Path;
use std::sync::Arc;

use rusqlite::Connection;
use vunet::network::allocator::{Bind, IpAllocator, RESTART_HOLD, Refusal};
use vunet::network::clock::HostClock;
use vunet::network::guest_names::GuestNames as _;
use vunet::network::store::live_names::LiveNames;
use vunet::network::store::{FILE_NAME, LeaseStore, Pool, processes};
use vunet::time::Instant;

use crate::store::{self, TestClock};
use crate::{at, client, ip, is_nak, lease, mac, named, pool};

const HOLD: u64 = RESTART_HOLD.as_secs();

/// A process of the network that noted itself.
fn process_of(folder: &Path, pool: Pool, holder: u64) -> LeaseStore {
    LeaseStore::open(folder, pool, TestClock::new("boot", 0), holder).unwrap().of_process().unwrap()
}

fn process(folder: &Path, holder: u64) -> LeaseStore {
    process_of(folder, pool(), holder)
}

/// Lets go at `now` what is not of `live`; how many leases that were.
fn let_go(folder: &Path, now: Instant, live: &[u64]) -> usize {
    let clock = TestClock::new("boot", 0);
    clock.at(now);
    processes::let_go(folder, live, &*clock).unwrap()
}

#[test]
fn names_of_a_process_that_is_gone_resolve_no_more_and_those_of_others_do() {
    let folder = store::folder();
    let (mut one, mut two) = (process(folder.path(), 1), process(folder.path(), 2));
    lease(&mut one, at(0), &named(1, "vm1"));
    lease(&mut two, at(0), &named(2, "vm2"));
    let clock = TestClock::new("boot", 0);
    let names = LiveNames::open(folder.path(), Arc::clone(&clock) as Arc<dyn HostClock>).unwrap();
    assert_eq!(let_go(folder.path(), at(1), &[1, 2]), 0);
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
    drop(one);
    assert_eq!(let_go(folder.path(), at(1), &[2]), 1);
    assert_eq!((names.address_of("vm1"), names.name_of(ip(2))), (None, None));
    assert_eq!(names.address_of("vm2"), Some(ip(3)));
    let known = two.get(at(2), mac(1)).unwrap().unwrap();
    assert!(!known.is_active(at(2)), "it is shown as ended");
    assert_eq!(known.ip, ip(2), "and remembered");
    assert_eq!(let_go(folder.path(), at(3), &[2]), 0, "once is enough");
}

#[test]
fn what_was_let_go_is_nobodys_until_its_guest_had_time_to_come_back_and_then_others_last_of_all() {
    let folder = store::folder();
    let subnet = "10.0.2.0/29".parse().unwrap();
    let small = || store::alone(subnet, ip(1), None);
    let mut dead = process_of(folder.path(), small(), 1);
    for n in 0..3 {
        lease(&mut dead, at(0), &named(n, ["a", "b", "c"][n as usize]));
    }
    assert!(dead.release(at(1), mac(1), ip(3)).unwrap());
    drop(dead);
    assert_eq!(let_go(folder.path(), at(10), &[]), 2);
    let mut live = process_of(folder.path(), small(), 2);
    // Never used: 5 and 6.
    assert_eq!(lease(&mut live, at(11), &client(10)).ip, ip(5));
    assert!(is_nak(&live.bind(at(11), &client(11), ip(2))), "its guest may come back");
    let grant = lease(&mut live, at(11), &named(11, "a"));
    assert_eq!((grant.ip, grant.host_name, grant.name_refused), (ip(6), None, true), "so with its name");
    // Longest unused, then nothing until the time is over.
    assert_eq!(lease(&mut live, at(12), &client(12)).ip, ip(3));
    assert!(live.offer(at(9 + HOLD), &client(13), None).is_err());
    let (_, grant) = live.bind(at(10 + HOLD), &named(11, "a"), ip(6)).unwrap();
    assert_eq!(grant.host_name.as_deref(), Some("a"));
    assert_eq!(lease(&mut live, at(10 + HOLD), &client(13)).ip, ip(2));
    assert_eq!(lease(&mut live, at(10 + HOLD), &client(2)).ip, ip(4), "still free: the same address");
}

#[test]
fn a_guest_that_is_still_there_keeps_its_lease_under_the_next_process() {
    let folder = store::folder();
    let clock = TestClock::new("boot", 0);
    let mut dead = process(folder.path(), 1);
    lease(&mut dead, at(0), &named(1, "vm1"));
    drop(dead);
    assert_eq!(let_go(folder.path(), at(10), &[]), 1);
    let mut next = process(folder.path(), 2);
    let names = LiveNames::open(folder.path(), Arc::clone(&clock) as Arc<dyn HostClock>).unwrap();
    assert_eq!(next.resume(at(11), mac(9)).unwrap(), None, "another card");
    assert_eq!(names.address_of("vm1"), None);
    let taken_up = next.resume(at(11), mac(1)).unwrap().expect("its own");
    assert_eq!((taken_up.ip, taken_up.until), (ip(2), Some(at(86_400))), "for as long as before");
    clock.at(at(11));
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
    assert_eq!(let_go(folder.path(), at(12), &[2]), 0);
    let late = at(11 + 2 * HOLD);
    assert!(is_nak(&next.bind(late, &client(5), ip(2))), "nobody else gets it, however late");
    let outcome = next.bind(late, &named(1, "vm1"), ip(2)).unwrap();
    assert_eq!(outcome.0, Bind::Renewed);
}

#[test]
fn a_lease_that_went_to_another_or_ended_is_not_taken_up() {
    let folder = store::folder();
    let mut dead = process(folder.path(), 1);
    lease(&mut dead, at(0), &client(1));
    lease(&mut dead, at(0), &client(2));
    drop(dead);
    let_go(folder.path(), at(10), &[]);
    let mut next = process(folder.path(), 2);
    next.bind(at(10 + HOLD), &client(7), ip(2)).unwrap();
    assert_eq!(next.resume(at(11 + HOLD), mac(1)).unwrap(), None);
    assert_eq!(next.resume(at(86_400), mac(2)).unwrap(), None);
    assert_eq!(next.resume(at(11 + HOLD), mac(7)).unwrap().map(|lease| lease.ip), Some(ip(2)));
}

#[test]
fn a_renewal_under_the_next_process_and_a_reservation_hold_as_ever() {
    let folder = store::folder();
    let mut dead = process(folder.path(), 1);
    lease(&mut dead, at(0), &named(1, "vm1"));
    drop(dead);
    let_go(folder.path(), at(10), &[]);
    let mut next = process(folder.path(), 2);
    // The guest itself renews, long after others could have had its address.
    let (bind, grant) = next.bind(at(2 * HOLD), &client(1), ip(2)).unwrap();
    assert_eq!((bind, grant.host_name.as_deref()), (Bind::Bound, Some("vm1")));
    assert_eq!(let_go(folder.path(), at(2 * HOLD), &[2]), 0);
}

#[test]
fn a_guest_with_the_mac_address_of_another_that_is_there_gets_neither_lease_nor_name() {
    let folder = store::folder();
    let (mut own, mut other) = (process(folder.path(), 1), process(folder.path(), 2));
    lease(&mut own, at(0), &named(1, "vm1"));
    let clock = TestClock::new("boot", 0);
    let names = LiveNames::open(folder.path(), Arc::clone(&clock) as Arc<dyn HostClock>).unwrap();
    let wish = Some(ip(2));
    assert!(matches!(other.offer(at(1), &named(1, "vm1"), wish), Err(Refusal::Elsewhere)));
    assert!(matches!(other.offer(at(1), &client(1), None), Err(Refusal::Elsewhere)));
    for wish in [ip(2), ip(9)] {
        assert!(matches!(other.bind(at(1), &named(1, "evil"), wish), Err(Refusal::Elsewhere)), "{wish}");
    }
    assert_eq!(other.resume(at(1), mac(1)).unwrap(), None, "its first frame gets it nothing");
    assert!(!other.release(at(1), mac(1), ip(2)).unwrap(), "nor can it give back what is another's");
    assert!(!other.decline(at(1), mac(1), ip(2)).unwrap());
    other.withdraw(at(1), mac(1)).unwrap();
    assert_eq!(own.resume(at(1), mac(1)).unwrap().map(|lease| lease.ip), Some(ip(2)));
    assert_eq!((names.address_of("vm1"), names.address_of("evil")), (Some(ip(2)), None));
    // What is only offered is the other's as well, until the offer is over.
    own.offer(at(1), &client(3), None).unwrap();
    assert!(matches!(other.offer(at(2), &client(3), None), Err(Refusal::Elsewhere)));
    other.withdraw(at(2), mac(3)).unwrap();
    own.bind(at(2), &client(3), ip(3)).unwrap();
    // Given back it is nobody's, and a guest that moved gets it.
    assert!(own.release(at(3), mac(3), ip(3)).unwrap());
    assert_eq!(lease(&mut other, at(4), &client(3)).ip, ip(3));
    // So is that of a process that ended: the guest was started anew, or moved, under the next.
    drop(own);
    assert_eq!(let_go(folder.path(), at(5), &[2]), 1);
    assert_eq!(lease(&mut other, at(6), &named(1, "vm1")).ip, ip(2));
    clock.at(at(6));
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
}

#[test]
fn who_bridges_others_and_is_trusted_may_take_over_what_moved() {
    let folder = store::folder();
    let mut from = process(folder.path(), 1);
    lease(&mut from, at(0), &named(1, "box"));
    let mut to = process_of(folder.path(), Pool { takes_over: true, ..pool() }, 2);
    assert_eq!(lease(&mut to, at(1), &client(1)).ip, ip(2));
    assert!(matches!(from.bind(at(2), &client(1), ip(2)), Err(Refusal::Elsewhere)));
}

#[test]
fn leases_of_who_noted_nothing_end_by_time_alone() {
    let folder = store::folder();
    let mut holder = LeaseStore::open(folder.path(), pool(), TestClock::new("boot", 0), 0).unwrap();
    lease(&mut holder, at(0), &client(1));
    assert_eq!(let_go(folder.path(), at(10), &[]), 0);
    assert!(holder.get(at(11), mac(1)).unwrap().unwrap().is_active(at(11)));
}

#[test]
fn what_a_holder_leased_is_the_guests_own_process_s_once_that_claims_it() {
    let folder = store::folder();
    let of_all = Pool { takes_over: true, ..pool() };
    let mut holder = LeaseStore::open(folder.path(), of_all, TestClock::new("boot", 0), 0).unwrap();
    lease(&mut holder, at(0), &named(1, "vm1"));
    lease(&mut holder, at(0), &named(2, "vm2"));
    let (mut one, mut two) = (process(folder.path(), 1), process(folder.path(), 2));
    one.claim(at(1), mac(1), ip(2)).unwrap();
    two.claim(at(1), mac(2), ip(3)).unwrap();
    one.claim(at(1), mac(1), ip(2)).unwrap();
    assert!(matches!(two.claim(at(1), mac(1), ip(2)), Err(Refusal::Elsewhere)), "another's");
    for (n, ip) in [(1, ip(3)), (9, ip(2))] {
        assert!(matches!(one.claim(at(1), mac(n), ip), Err(Refusal::NotBound(_))), "{n} has no such lease");
    }
    // A process that is gone takes its guest's name along, and nobody else's.
    drop(one);
    assert_eq!(let_go(folder.path(), at(10), &[2]), 1);
    let clock = TestClock::new("boot", 0);
    let names = LiveNames::open(folder.path(), Arc::clone(&clock) as Arc<dyn HostClock>).unwrap();
    clock.at(at(10));
    assert_eq!((names.address_of("vm1"), names.address_of("vm2")), (None, Some(ip(3))));
    // The guest goes on under the next, which claims what it has ...
    let mut next = process(folder.path(), 3);
    next.claim(at(11), mac(1), ip(2)).unwrap();
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
    assert_eq!(let_go(folder.path(), at(12), &[2, 3]), 0);
    // ... and renews with the holder.
    assert_eq!(holder.bind(at(13), &named(1, "vm1"), ip(2)).unwrap().0, Bind::Renewed);
    next.claim(at(13), mac(1), ip(2)).unwrap();
    assert_eq!(let_go(folder.path(), at(14), &[2]), 1);
    assert!(is_nak(&holder.bind(at(15), &client(5), ip(2))), "its guest may come back");
    assert!(matches!(next.claim(at(90_000), mac(1), ip(2)), Err(Refusal::NotBound(_))), "it is over");
}

#[test]
fn after_a_reboot_every_process_is_gone_and_every_guest_finds_its_address() {
    let folder = store::folder();
    let noon_us = 1_700_000_000_000_000;
    let open = |boot, wall, holder| {
        LeaseStore::open(folder.path(), pool(), TestClock::new(boot, wall), holder).unwrap()
    };
    let mut before = open("one", noon_us, 1).of_process().unwrap();
    lease(&mut before, at(100), &named(1, "vm1"));
    drop(before);
    let mut after = open("two", noon_us + 200_000_000, 2).of_process().unwrap();
    let clock = TestClock::new("two", noon_us + 200_000_000);
    let names = LiveNames::open(folder.path(), clock).unwrap();
    assert_eq!(names.address_of("vm1"), None);
    assert!(is_nak(&after.bind(at(HOLD - 1), &client(2), ip(2))));
    assert_eq!(lease(&mut after, at(HOLD - 1), &client(1)).ip, ip(2));
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
}

/// The tables as layout 1 had them, with a lease of 24 h from time 0 on.
const LAYOUT_1: &str = "
CREATE TABLE pool(subnet TEXT NOT NULL, gateway TEXT NOT NULL);
CREATE TABLE boot(id TEXT NOT NULL);
CREATE TABLE lease(
  ip INTEGER PRIMARY KEY,
  mac BLOB NOT NULL UNIQUE CHECK(length(mac) = 6),
  client_id BLOB CHECK(length(client_id) <= 255),
  offered_us INTEGER,
  until_us INTEGER,
  until_wall_us INTEGER,
  host_name TEXT UNIQUE,
  holder INTEGER NOT NULL
) STRICT;
CREATE TABLE declined(
  ip INTEGER PRIMARY KEY,
  until_us INTEGER NOT NULL,
  until_wall_us INTEGER NOT NULL,
  holder INTEGER NOT NULL
) STRICT;
CREATE TABLE reservation(
  ip INTEGER PRIMARY KEY,
  mac BLOB UNIQUE CHECK(length(mac) = 6),
  client_id BLOB UNIQUE CHECK(length(client_id) <= 255),
  host_name TEXT UNIQUE,
  CHECK(mac IS NOT NULL OR client_id IS NOT NULL)
) STRICT;
PRAGMA application_id = 0x766e6574;
PRAGMA user_version = 1;
INSERT INTO pool VALUES('10.0.2.0/24', '10.0.2.1');
INSERT INTO boot VALUES('boot');
INSERT INTO lease VALUES(167772674, x'020000000001', NULL, NULL, 86400000000, 86400000000, 'old', 77);
INSERT INTO reservation VALUES(167772681, x'020000000009', NULL, 'db');
";

#[test]
fn a_store_of_the_first_layout_goes_on_with_all_that_is_in_it() {
    let folder = store::folder();
    let file = Connection::open(folder.path().join(FILE_NAME)).unwrap();
    file.execute_batch(LAYOUT_1).unwrap();
    assert_eq!(let_go(folder.path(), at(1), &[]), 0, "it is left as it is by who only cleans up");
    let layout = || file.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0));
    assert_eq!(layout(), Ok(1));
    let mut store = process(folder.path(), 1);
    assert_eq!(layout(), Ok(2));
    let old = store.get(at(1), mac(1)).unwrap().unwrap();
    assert_eq!((old.ip, old.until, old.host_name.as_deref()), (ip(2), Some(at(86_400)), Some("old")));
    assert_eq!(store.reservations().unwrap().len(), 1);
    // Whoever gave it noted nothing, and may live.
    assert_eq!(let_go(folder.path(), at(1), &[1]), 0);
    assert!(is_nak(&store.bind(at(2 * HOLD), &client(2), ip(2))));
    // A process of the earlier version that has the file open goes on.
    let theirs = "INSERT INTO lease(ip, mac, holder) VALUES(167772675, x'020000000003', 78); \
                  UPDATE lease SET until_us = 86400000000, until_wall_us = 1 WHERE ip = 167772675";
    file.execute_batch(theirs).unwrap();
    assert!(is_nak(&store.bind(at(3), &client(2), ip(3))));
}
