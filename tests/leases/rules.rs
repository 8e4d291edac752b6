//! The store answers as the table does, whatever is asked; and neither gives one address to two.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use proptest::prelude::*;
use vunet::addr::{Ipv4Subnet, MacAddr};
use vunet::network::allocator::{Client, IpAllocator, LEASE_TIME, Refusal};
use vunet::network::leases::LeaseTable;
use vunet::time::Instant;

use crate::{at, mac, store};

#[derive(Clone, Debug)]
enum Op {
    Offer(u32, Option<u8>),
    Bind(u32, u8),
    Withdraw(u32),
    Release(u32, u8),
    Decline(u32, u8),
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let mac = 0u32..12;
    prop_oneof![
        3 => (mac.clone(), proptest::option::of(0u8..17)).prop_map(|(m, a)| Op::Offer(m, a)),
        3 => (mac.clone(), 0u8..17).prop_map(|(m, a)| Op::Bind(m, a)),
        1 => mac.clone().prop_map(Op::Withdraw),
        1 => (mac.clone(), 0u8..17).prop_map(|(m, a)| Op::Release(m, a)),
        1 => (mac, 0u8..17).prop_map(|(m, a)| Op::Decline(m, a)),
        2 => prop_oneof![0u64..40, 80_000u64..90_000].prop_map(Op::Pass),
    ]
}

fn addr(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 2, last)
}

fn text<T: std::fmt::Debug>(outcome: &Result<T, Refusal>) -> String {
    format!("{outcome:?}")
}

/// Does `op` and says what was answered.
fn ask(leases: &mut dyn IpAllocator, now: Instant, op: &Op) -> String {
    let client = |m: u32| Client { mac: mac(m), id: None, host_name: None };
    match *op {
        Op::Offer(m, a) => text(&leases.offer(now, &client(m), a.map(addr))),
        Op::Bind(m, a) => text(&leases.bind(now, &client(m), addr(a))),
        Op::Withdraw(m) => format!("{:?}", leases.withdraw(now, mac(m))),
        Op::Release(m, a) => format!("{:?}", leases.release(now, mac(m), addr(a))),
        Op::Decline(m, a) => format!("{:?}", leases.decline(now, mac(m), addr(a))),
        Op::Pass(_) => String::new(),
    }
}

/// Who holds what for how long, as the answers told it.
#[derive(Default)]
struct Told(HashMap<MacAddr, (Ipv4Addr, Instant)>);

impl Told {
    fn hear(&mut self, now: Instant, op: &Op, answer: &str) -> Result<(), TestCaseError> {
        match *op {
            Op::Offer(m, _) => {
                if let Some((ip, _)) = self.0.get(&mac(m)) {
                    prop_assert!(answer.contains(&ip.to_string()), "{answer} to the holder of {ip}");
                }
            }
            Op::Bind(m, a) if answer.starts_with("Ok") => {
                self.0.insert(mac(m), (addr(a), now + LEASE_TIME));
            }
            Op::Release(m, _) | Op::Decline(m, _) if answer == "Ok(true)" => {
                self.0.remove(&mac(m));
            }
            _ => {}
        }
        Ok(())
    }

    /// Everybody has what it was told, and nobody else has.
    fn holds(&mut self, leases: &mut dyn IpAllocator, now: Instant) -> Result<(), TestCaseError> {
        self.0.retain(|_, (_, until)| *until > now);
        for (&mac, &(ip, until)) in &self.0 {
            let lease = leases.get(now, mac).unwrap().unwrap();
            prop_assert_eq!((lease.ip, lease.until), (ip, Some(until)));
        }
        let all = leases.leases(now).unwrap();
        let macs: HashSet<_> = all.iter().map(|lease| lease.mac).collect();
        let ips: HashSet<_> = all.iter().map(|lease| lease.ip).collect();
        prop_assert_eq!((macs.len(), ips.len()), (all.len(), all.len()));
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nobody_loses_a_lease_and_no_address_has_two_holders(ops in prop::collection::vec(op(), 1..80)) {
        let subnet: Ipv4Subnet = "10.0.2.0/28".parse().unwrap();
        let folder = store::folder();
        let mut file = store::open(folder.path(), store::alone(subnet, addr(1), None));
        let mut told = Told::default();
        let mut now = at(1);
        for op in &ops {
            if let Op::Pass(seconds) = op {
                now = now + Duration::from_secs(*seconds);
            }
            let answer = ask(&mut file, now, op);
            told.hear(now, op, &answer)?;
            told.holds(&mut file, now)?;
        }
    }

    #[test]
    fn store_and_table_answer_alike(
        ops in prop::collection::vec(op(), 1..120),
        bits in 28u8..30,
        first in proptest::option::of((3u8..6).prop_map(addr)),
    ) {
        let subnet = Ipv4Subnet::new(addr(0), bits).unwrap();
        let folder = store::folder();
        let mut file = store::open(folder.path(), store::alone(subnet, addr(1), first));
        let mut table = LeaseTable::new(subnet, addr(1), first);
        let mut now = at(1);
        for op in &ops {
            if let Op::Pass(seconds) = op {
                now = now + Duration::from_secs(*seconds);
            }
            prop_assert_eq!(ask(&mut file, now, op), ask(&mut table, now, op), "{:?} at {:?}", op, now);
            let known = IpAllocator::leases(&mut table, now).unwrap();
            prop_assert_eq!(file.leases(now).unwrap(), known, "after {:?} at {:?}", op, now);
        }
    }
}

#[test]
fn the_store_holds_its_bound_and_not_one_more() {
    let folder = store::folder();
    let subnet: Ipv4Subnet = "10.0.0.0/16".parse().unwrap();
    let mut pool = store::alone(subnet, subnet.host(1).unwrap(), None);
    pool.leases_max = 40;
    let mut file = store::open(folder.path(), pool);
    for n in 0..40 {
        crate::lease(&mut file, at(0), &crate::client(n));
    }
    let free = Ipv4Addr::new(10, 0, 200, 1);
    let newcomer = crate::client(40);
    assert!(matches!(file.offer(at(1), &newcomer, None), Err(Refusal::Exhausted)));
    assert!(matches!(file.offer(at(1), &newcomer, Some(free)), Err(Refusal::Exhausted)));
    assert!(crate::is_nak(&file.bind(at(1), &newcomer, free)));
    assert_eq!(file.leases(at(1)).unwrap().len(), 40);
    assert!(file.bind(at(86_400), &newcomer, free).is_ok());
    assert_eq!(file.leases(at(86_400)).unwrap().len(), 40);
}
