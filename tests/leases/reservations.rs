//! Addresses kept for one client.

use vunet::network::allocator::{Client, IpAllocator, Refusal};
use vunet::network::store::{LeaseStore, Reservation, StoreError, Who};

use crate::{at, client, ip, is_nak, lease, mac, named, pool, store};

fn for_mac(n: u32, last: u8) -> Reservation {
    Reservation { ip: ip(last), who: Who::Mac(mac(n)), host_name: None }
}

fn refused(outcome: Result<(), StoreError>) -> String {
    match outcome {
        Err(error @ StoreError::Reservation { .. }) => error.to_string(),
        other => panic!("not refused: {other:?}"),
    }
}

fn open() -> (tempfile::TempDir, LeaseStore) {
    let folder = store::folder();
    let store = store::open(folder.path(), pool());
    (folder, store)
}

#[test]
fn a_reserved_address_is_its_clients_and_nobody_elses() {
    let (_folder, mut store) = open();
    store.reserve(at(0), &for_mac(7, 2)).unwrap();
    store.reserve(at(0), &for_mac(8, 50)).unwrap();
    assert_eq!(lease(&mut store, at(1), &client(1)).ip, ip(3), "the first free one is kept for another");
    assert!(is_nak(&store.bind(at(1), &client(2), ip(50))));
    assert_eq!(store.offer(at(1), &client(2), Some(ip(50))).unwrap().ip, ip(4));
    assert_eq!(lease(&mut store, at(1), &client(7)).ip, ip(2));
    assert!(is_nak(&store.bind(at(1), &client(8), ip(60))), "not another than its own");
    assert_eq!(lease(&mut store, at(1), &client(8)).ip, ip(50));
}

#[test]
fn a_reservation_is_in_the_way_even_when_nothing_else_is_free() {
    let folder = store::folder();
    let mut store = store::open(folder.path(), store::alone("10.0.2.0/30".parse().unwrap(), ip(1), None));
    store.reserve(at(0), &for_mac(7, 2)).unwrap();
    assert!(matches!(store.offer(at(0), &client(1), None), Err(Refusal::Exhausted)));
    lease(&mut store, at(0), &client(7));
    store.release(at(1), mac(7), ip(2)).unwrap();
    assert!(matches!(store.offer(at(2), &client(1), None), Err(Refusal::Exhausted)));
}

#[test]
fn a_client_identifier_finds_its_address_from_another_card_but_takes_it_from_nobody() {
    let (_folder, mut store) = open();
    let who = Who::ClientId(b"db".to_vec());
    store.reserve(at(0), &Reservation { ip: ip(9), who, host_name: None }).unwrap();
    let with_id = |n| Client { id: Some(b"db"), ..client(n) };
    assert_eq!(lease(&mut store, at(0), &with_id(1)).ip, ip(9));
    assert_eq!(lease(&mut store, at(1), &with_id(2)).ip, ip(2), "its holder is there");
    assert!(is_nak(&store.bind(at(1), &with_id(3), ip(9))));
    assert!(store.release(at(2), mac(1), ip(9)).unwrap());
    assert_eq!(lease(&mut store, at(3), &with_id(3)).ip, ip(9));
    assert!(is_nak(&store.bind(at(4), &client(1), ip(9))), "without the identifier it is another's");
}

#[test]
fn a_client_moves_to_what_is_reserved_for_it_later() {
    let (_folder, mut store) = open();
    assert_eq!(lease(&mut store, at(0), &client(1)).ip, ip(2));
    assert_eq!(lease(&mut store, at(0), &client(2)).ip, ip(3));
    store.reserve(at(1), &for_mac(1, 40)).unwrap();
    assert!(is_nak(&store.bind(at(2), &client(1), ip(2))), "it is sent for its own");
    assert_eq!(lease(&mut store, at(3), &client(1)).ip, ip(40));
    // Held by another: the lease runs on, and the address changes hands after it.
    store.reserve(at(4), &for_mac(5, 3)).unwrap();
    assert_eq!(lease(&mut store, at(5), &client(2)).ip, ip(3));
    assert_eq!(lease(&mut store, at(5), &client(5)).ip, ip(2));
    assert!(store.release(at(6), mac(2), ip(3)).unwrap());
    assert_eq!(store.offer(at(7), &client(2), None).unwrap().ip, ip(4));
    assert_eq!(lease(&mut store, at(7), &client(5)).ip, ip(3));
}

#[test]
fn a_reserved_name_is_the_clients_whoever_has_it() {
    let (_folder, mut store) = open();
    assert_eq!(lease(&mut store, at(0), &named(1, "db")).host_name.as_deref(), Some("db"));
    let wish = Reservation { host_name: Some("db".to_owned()), ..for_mac(5, 30) };
    store.reserve(at(1), &wish).unwrap();
    let renewed = lease(&mut store, at(2), &named(1, "db"));
    assert_eq!((renewed.host_name, renewed.name_refused), (None, true));
    assert_eq!(lease(&mut store, at(3), &named(5, "other")).host_name.as_deref(), Some("db"));
}

#[test]
fn what_cannot_be_kept_is_refused_and_changes_nothing() {
    let (_folder, mut store) = open();
    let web = Reservation { host_name: Some("web".to_owned()), ..for_mac(1, 10) };
    store.reserve(at(0), &web).unwrap();
    assert!(refused(store.reserve(at(0), &for_mac(1, 1))).contains("gateway 10.0.2.1"));
    assert!(refused(store.reserve(at(0), &for_mac(2, 10))).contains("kept for 02:00:00:00:00:01"));
    let name = |name: &str| Reservation { host_name: Some(name.to_owned()), ..for_mac(2, 11) };
    assert!(refused(store.reserve(at(0), &name("web"))).contains("10.0.2.10"));
    for bad in ["host", "wpad", "No", "a.b", ""] {
        assert!(refused(store.reserve(at(0), &name(bad))).contains("no name"), "{bad}");
    }
    let long = Reservation { ip: ip(11), who: Who::ClientId(vec![1; 256]), host_name: None };
    assert!(refused(store.reserve(at(0), &long)).contains("255"));
    assert_eq!(store.reservations().unwrap(), std::slice::from_ref(&web));
    let moved = Reservation { ip: ip(12), ..web };
    store.reserve(at(0), &moved).unwrap();
    assert_eq!(store.reservations().unwrap(), [moved]);
    assert!(store.unreserve(at(0), ip(12)).unwrap());
    assert!(!store.unreserve(at(0), ip(12)).unwrap());
    assert_eq!(store.offer(at(0), &client(9), Some(ip(12))).unwrap().ip, ip(12));
}
