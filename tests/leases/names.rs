//! Host names: whose they are, and how DNS hears of them.

use std::path::Path;
use std::sync::Arc;

use vunet::network::allocator::IpAllocator;
use vunet::network::clock::HostClock;
use vunet::network::guest_names::GuestNames;
use vunet::network::store::LeaseStore;
use vunet::network::store::live_names::LiveNames;

use crate::store::{self, TestClock};
use crate::{at, client, ip, lease, mac, named, pool};

/// A process of the network: its store and its clock.
fn process(folder: &Path, holder: u64) -> (LeaseStore, Arc<TestClock>) {
    let clock = TestClock::new("boot", 0);
    let mut pool = pool();
    pool.names_taken.push("registry".to_owned());
    (LeaseStore::open(folder, pool, Arc::clone(&clock) as Arc<dyn HostClock>, holder).unwrap(), clock)
}

#[test]
fn a_name_stays_with_its_first_holder_while_its_lease_runs() {
    let folder = store::folder();
    let (mut first, _) = process(folder.path(), 1);
    let (mut second, _) = process(folder.path(), 2);
    let grant = lease(&mut first, at(0), &named(1, "web"));
    assert_eq!((grant.host_name.as_deref(), grant.name_refused), (Some("web"), false));
    for now in [1, 2] {
        let grant = lease(&mut second, at(now), &named(2, "web"));
        assert_eq!((grant.host_name, grant.name_refused), (None, true));
    }
    assert_eq!(lease(&mut first, at(3), &named(1, "web")).host_name.as_deref(), Some("web"));
    // It ends, and the second's next renewal finds the name free; the first gets it back from nobody.
    assert!(first.release(at(4), mac(1), ip(2)).unwrap());
    let (_, grant) = second.bind(at(5), &named(2, "web"), ip(3)).unwrap();
    assert_eq!((grant.host_name.as_deref(), grant.name_refused), (Some("web"), false));
    let back = lease(&mut first, at(6), &named(1, "web"));
    assert_eq!((back.ip, back.host_name, back.name_refused), (ip(2), None, true));
}

#[test]
fn an_offer_takes_no_name_from_one_who_may_come_back() {
    let folder = store::folder();
    let (mut store, _) = process(folder.path(), 1);
    lease(&mut store, at(0), &named(1, "web"));
    store.release(at(1), mac(1), ip(2)).unwrap();
    assert_eq!(store.offer(at(2), &named(2, "web"), None).unwrap().host_name, None);
    assert_eq!(lease(&mut store, at(3), &named(1, "web")).host_name.as_deref(), Some("web"));
}

#[test]
fn a_guest_that_takes_another_name_gives_its_own_back() {
    let folder = store::folder();
    let (mut store, _) = process(folder.path(), 1);
    lease(&mut store, at(0), &named(1, "old"));
    assert_eq!(lease(&mut store, at(1), &named(1, "new")).host_name.as_deref(), Some("new"));
    assert_eq!(lease(&mut store, at(1), &client(1)).host_name.as_deref(), Some("new"), "silence keeps it");
    assert_eq!(lease(&mut store, at(2), &named(2, "old")).host_name.as_deref(), Some("old"));
}

#[test]
fn names_of_the_network_and_of_what_programs_trust_are_nobodys() {
    let folder = store::folder();
    let (mut store, _) = process(folder.path(), 1);
    for (n, name) in (1..).zip(["gateway", "host", "localhost", "wpad", "isatap", "registry"]) {
        let grant = lease(&mut store, at(0), &named(n, name));
        assert_eq!((grant.host_name, grant.name_refused), (None, true), "{name}");
    }
    assert_eq!(lease(&mut store, at(0), &named(99, "gateway2")).host_name.as_deref(), Some("gateway2"));
}

#[test]
fn dns_hears_of_names_of_other_processes_as_their_leases_come_and_go() {
    let folder = store::folder();
    let (mut ours, clock) = process(folder.path(), 1);
    let (mut theirs, _) = process(folder.path(), 2);
    let names = LiveNames::open(folder.path(), clock).unwrap();
    assert_eq!(names.address_of("vm1"), None);
    theirs.offer(at(0), &named(1, "vm1"), None).unwrap();
    assert_eq!(names.address_of("vm1"), None, "offered is not leased");
    theirs.bind(at(0), &named(1, "vm1"), ip(2)).unwrap();
    assert_eq!(names.address_of("vm1"), Some(ip(2)));
    assert_eq!(names.name_of(ip(2)).as_deref(), Some("vm1"));
    assert_eq!(names.name_of(ip(3)), None);
    lease(&mut ours, at(1), &named(2, "vm2"));
    assert_eq!(names.address_of("vm2"), Some(ip(3)));
    theirs.release(at(2), mac(1), ip(2)).unwrap();
    // The names' own clock is this process's, which a question to `ours` puts on.
    ours.withdraw(at(2), mac(9)).unwrap();
    assert_eq!((names.address_of("vm1"), names.name_of(ip(2))), (None, None));
    assert_eq!(names.address_of("vm2"), Some(ip(3)));
    drop((ours, theirs));
    assert_eq!(names.address_of("vm2"), Some(ip(3)), "names are the network's, not a process's");
}

#[test]
fn a_name_ends_with_its_lease_though_nobody_writes() {
    let folder = store::folder();
    let (mut store, clock) = process(folder.path(), 1);
    let names = LiveNames::open(folder.path(), Arc::clone(&clock) as Arc<dyn HostClock>).unwrap();
    lease(&mut store, at(0), &named(1, "vm1"));
    for (now, expected) in [(0, Some(ip(2))), (86_399, Some(ip(2))), (86_400, None)] {
        clock.at(at(now));
        assert_eq!(names.address_of("vm1"), expected, "{now}");
        assert_eq!(names.name_of(ip(2)).is_some(), expected.is_some(), "{now}");
    }
}
