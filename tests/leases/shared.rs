//! Several guests at once: none starves the others, and all get what is theirs.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant as Wall};

use vunet::limits;
use vunet::network::allocator::{IpAllocator, Refusal};
use vunet::network::clock::{HostClock, SystemClock};
use vunet::network::guest_names::GuestNames as _;
use vunet::network::store::live_names::LiveNames;
use vunet::network::store::{LeaseStore, StoreError};

use crate::store::{self, TestClock};
use crate::{at, client, ip, lease, mac, pool};

fn of_guest(folder: &std::path::Path, holder: u64) -> LeaseStore {
    LeaseStore::open(folder, pool(), TestClock::new("boot", 0), holder).unwrap()
}

#[test]
fn one_guest_holds_its_share_and_not_one_more() {
    let folder = store::folder();
    let (mut greedy, mut other) = (of_guest(folder.path(), 1), of_guest(folder.path(), 2));
    let share = u32::try_from(limits::LEASES_PER_GUEST_MAX).unwrap();
    for n in 0..share {
        lease(&mut greedy, at(0), &client(n));
    }
    assert!(matches!(greedy.offer(at(1), &client(share), None), Err(Refusal::ShareUsed)));
    assert!(matches!(greedy.bind(at(1), &client(share), ip(200)), Err(Refusal::ShareUsed)));
    assert_eq!(lease(&mut greedy, at(1), &client(0)).ip, ip(2), "what it has it keeps");
    lease(&mut other, at(1), &client(1000));
    assert!(greedy.release(at(2), mac(0), ip(2)).unwrap());
    lease(&mut greedy, at(3), &client(share));
}

#[test]
fn one_guest_sets_few_addresses_aside_by_declining_them() {
    let folder = store::folder();
    let (mut vandal, mut other) = (of_guest(folder.path(), 1), of_guest(folder.path(), 2));
    lease(&mut other, at(0), &client(500));
    assert!(other.decline(at(0), mac(500), ip(2)).unwrap());
    for n in 0..100 {
        let offered = vandal.offer(at(1), &client(n), None).unwrap().ip;
        assert!(vandal.decline(at(1), mac(n), offered).unwrap());
    }
    let mut free = HashSet::new();
    for n in 0..4 {
        free.insert(lease(&mut other, at(2), &client(1000 + n)).ip);
    }
    // The first four that are neither the other's nor at rest because of the vandal.
    let last = ip(2 + u8::try_from(limits::DECLINED_PER_GUEST_MAX).unwrap() + 4);
    assert!(free.iter().all(|&ip| ip <= last), "{free:?}");
    assert!(!free.contains(&ip(2)), "what the other declined rests");
}

/// The address of client `n`, unless the store was busy for too long.
fn leased(store: &mut LeaseStore, n: u32) -> Option<Ipv4Addr> {
    let outcome = store.offer(at(0), &client(n), None);
    match outcome.and_then(|offer| store.bind(at(0), &client(n), offer.ip)) {
        Ok((_, grant)) => Some(grant.ip),
        Err(Refusal::Store(StoreError::Locked(_))) => {
            thread::sleep(Duration::from_millis(250));
            None
        }
        Err(refusal) => panic!("{refusal:?}"),
    }
}

#[test]
fn fifty_guests_that_start_together_get_fifty_addresses_at_once() {
    const GUESTS: u64 = 50;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let start = Arc::new(Barrier::new(GUESTS as usize));
    let begin = Wall::now();
    let guests: Vec<_> = (0..GUESTS)
        .map(|n| {
            let (start, folder) = (Arc::clone(&start), folder.path().to_owned());
            thread::spawn(move || {
                start.wait();
                let clock: Arc<dyn HostClock> = Arc::new(SystemClock::new().unwrap());
                let mut store = LeaseStore::open(&folder, pool(), clock, n).unwrap();
                // A client that got no answer asks again.
                (0..20).find_map(|_| leased(&mut store, n as u32)).unwrap()
            })
        })
        .collect();
    let addresses: HashSet<_> = guests.into_iter().map(|guest| guest.join().unwrap()).collect();
    assert_eq!(addresses.len(), GUESTS as usize);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}

#[test]
#[ignore = "a measurement: run it alone, with --release --no-capture"]
fn an_allocation_takes_a_fraction_of_a_millisecond_and_a_name_microseconds() {
    const ROUNDS: u32 = 2000;
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let clock: Arc<dyn HostClock> = Arc::new(SystemClock::new().unwrap());
    let mut store = LeaseStore::open(folder.path(), pool(), Arc::clone(&clock), 1).unwrap();
    let names = LiveNames::open(folder.path(), clock).unwrap();
    let mut times = [const { Vec::new() }; 4];
    let mut time = |kind: usize, begin: Wall| times[kind].push(begin.elapsed());
    for n in 0..ROUNDS {
        let name = format!("vm{}", n % 10);
        let who = crate::named(n % 10, &name);
        let begin = Wall::now();
        let offer = store.offer(at(0), &who, None).unwrap();
        time(0, begin);
        let begin = Wall::now();
        store.bind(at(0), &who, offer.ip).unwrap();
        time(1, begin);
        let begin = Wall::now();
        assert_eq!(names.address_of(&name), Some(offer.ip));
        time(2, begin);
        let begin = Wall::now();
        assert_eq!(names.name_of(offer.ip).as_deref(), Some(name.as_str()));
        time(3, begin);
    }
    for (what, times) in ["offer", "bind", "name after a change", "name"].iter().zip(&mut times) {
        times.sort();
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        eprintln!("{what}: median {:?}, 99 % {:?}, most {:?}", at(0.5), at(0.99), at(1.0));
        assert!(at(0.5) < Duration::from_millis(2), "{what}");
    }
}
