//! The address pool: one MAC address gets one IPv4 address.
//!
//! A [`LeaseTable`] knows for each address of the subnet who holds it: an *offer* (made, not yet
//! taken, held for [`OFFER_HOLD`]), a *lease* (bound, held for [`LEASE_TIME`]), or a *memory* (a
//! lease that ended). A memory keeps its address for its MAC until the pool has nothing else; then
//! the one that ended first is reused. A declined address rests for [`DECLINE_HOLD`].
//!
//! The key is the hardware address and never the client identifier: a boot ROM, a firmware and an
//! operating system send different identifiers from one card and must get one address.
//!
//! A free address goes to whoever asks for it, even if this process never heard of the client: so
//! leases survive a restart of the process without a file.
//!
//! Everything here is bounded by [`limits::LEASES_MAX`] and [`limits::LEASES_DECLINED_MAX`]. A
//! flood of discovers from made-up addresses costs offers only: offers of more than
//! [`OFFER_HOLD_MIN`] give way to newer ones, leases never do.
//!
//! Read first: RFC 2131, 3.1, 4.3.1 and 4.3.2.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use super::allocator::{
    Bind, BindRefusal, Client, DECLINE_HOLD, Grant, IpAllocator, LEASE_TIME, Lease, OFFER_HOLD,
    OFFER_HOLD_MIN, Refusal,
};
use super::store::StoreError;
use crate::addr::{Ipv4Subnet, MacAddr};
use crate::limits;
use crate::time::Instant;

#[derive(Clone, Copy, Debug)]
struct Offer {
    made: Instant,
}

#[derive(Debug)]
struct Slot {
    mac: MacAddr,
    offer: Option<Offer>,
    lease_until: Option<Instant>,
    host_name: Option<String>,
}

impl Slot {
    fn is_active(&self, now: Instant) -> bool {
        self.lease_until.is_some_and(|until| until > now)
    }

    fn is_offered(&self, now: Instant) -> bool {
        self.offer.is_some_and(|offer| offer.made + OFFER_HOLD > now)
    }

    fn is_memory(&self, now: Instant) -> bool {
        !self.is_active(now) && !self.is_offered(now)
    }
}

/// The pool of one subnet. See the [module](self) for the rules.
#[derive(Debug)]
pub struct LeaseTable {
    subnet: Ipv4Subnet,
    gateway: Ipv4Addr,
    first: Option<Ipv4Addr>,
    slots: BTreeMap<Ipv4Addr, Slot>,
    by_mac: HashMap<MacAddr, Ipv4Addr>,
    declined: BTreeMap<Ipv4Addr, Instant>,
}

impl LeaseTable {
    /// An empty table. The pool is every host address of `subnet` but `gateway`; the first client
    /// to come gets `first`, or else the lowest.
    pub fn new(subnet: Ipv4Subnet, gateway: Ipv4Addr, first: Option<Ipv4Addr>) -> LeaseTable {
        LeaseTable {
            subnet,
            gateway,
            first,
            slots: BTreeMap::new(),
            by_mac: HashMap::new(),
            declined: BTreeMap::new(),
        }
    }

    /// Whether `ip` belongs to the pool, free or not.
    pub fn in_pool(&self, ip: Ipv4Addr) -> bool {
        self.subnet.is_host(ip) && ip != self.gateway
    }

    /// The address to offer to `mac`: its own if it has one, else `wanted` if that is free, else a
    /// free one. `None` if the pool or the table is exhausted.
    pub fn offer(&mut self, now: Instant, mac: MacAddr, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        self.sweep(now);
        let ip = self.choose(now, mac, wanted)?;
        let slot = self.slot(ip, mac);
        slot.offer = Some(Offer { made: now });
        Some(ip)
    }

    /// Binds `ip` to `mac` for [`LEASE_TIME`].
    ///
    /// # Errors
    /// [`BindRefusal`] says why not; nothing has changed then.
    pub fn bind(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<Bind, BindRefusal> {
        self.sweep(now);
        if !self.in_pool(ip) {
            return Err(BindRefusal::OutsidePool);
        }
        let own = self.by_mac.get(&mac).copied();
        if own != Some(ip) {
            self.may_move(now, mac, own, ip)?;
        }
        let slot = self.slot(ip, mac);
        let bind = if slot.is_active(now) { Bind::Renewed } else { Bind::Bound };
        slot.offer = None;
        slot.lease_until = Some(now + LEASE_TIME);
        Ok(bind)
    }

    /// Makes room for `mac` at `ip`, which is not what it has at present (`own`).
    fn may_move(
        &mut self,
        now: Instant,
        mac: MacAddr,
        own: Option<Ipv4Addr>,
        ip: Ipv4Addr,
    ) -> Result<(), BindRefusal> {
        if let Some(own) = own
            && self.slots.get(&own).is_some_and(|slot| slot.lease_until.is_some())
        {
            return Err(BindRefusal::HasOther(own));
        }
        if !self.is_free(now, ip) {
            return Err(BindRefusal::Taken);
        }
        if own.is_none()
            && !self.slots.contains_key(&ip)
            && self.slots.len() >= limits::LEASES_MAX
            && self.evict(now).is_none()
        {
            return Err(BindRefusal::Full);
        }
        self.forget_mac(mac);
        Ok(())
    }

    /// Takes back an offer that `mac` did not take; a lease it has stays.
    pub fn withdraw(&mut self, now: Instant, mac: MacAddr) {
        if let Some(slot) = self.by_mac.get(&mac).and_then(|ip| self.slots.get_mut(ip)) {
            slot.offer = None;
        }
        self.sweep(now);
    }

    /// Ends the lease of `mac` on `ip`; its address stays in memory. False if it had none.
    pub fn release(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> bool {
        self.sweep(now);
        match self.slots.get_mut(&ip) {
            Some(slot) if slot.mac == mac && slot.is_active(now) => {
                slot.lease_until = Some(now);
                slot.offer = None;
                true
            }
            _ => false,
        }
    }

    /// `mac` found `ip` in use by someone else: the address rests for [`DECLINE_HOLD`]. False if
    /// the address was neither offered nor leased to `mac`.
    pub fn decline(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> bool {
        self.sweep(now);
        if self.by_mac.get(&mac) != Some(&ip) {
            return false;
        }
        self.forget_mac(mac);
        if self.declined.len() >= limits::LEASES_DECLINED_MAX
            && let Some((&oldest, _)) = self.declined.iter().min_by_key(|&(_, &until)| until)
        {
            self.declined.remove(&oldest);
        }
        self.declined.insert(ip, now + DECLINE_HOLD);
        true
    }

    /// Remembers the host name `mac` gave itself. No effect without an offer or a lease.
    pub fn set_host_name(&mut self, mac: MacAddr, host_name: &str) {
        if let Some(slot) = self.by_mac.get(&mac).and_then(|ip| self.slots.get_mut(ip))
            && slot.host_name.as_deref() != Some(host_name)
        {
            slot.host_name = Some(host_name.to_owned());
        }
    }

    /// What is known of `mac`: offered, leased or remembered.
    pub fn get(&self, mac: MacAddr) -> Option<Lease> {
        let ip = *self.by_mac.get(&mac)?;
        self.slots.get(&ip).map(|slot| slot.view(ip))
    }

    /// Everything known, by address: offers, leases and memories.
    pub fn iter(&self) -> impl Iterator<Item = Lease> {
        self.slots.iter().map(|(&ip, slot)| slot.view(ip))
    }

    fn choose(&mut self, now: Instant, mac: MacAddr, wanted: Option<Ipv4Addr>) -> Option<Ipv4Addr> {
        let wanted = wanted.filter(|&ip| self.is_free(now, ip));
        if let Some(&own) = self.by_mac.get(&mac) {
            let settled = self.slots.get(&own).is_some_and(|slot| slot.lease_until.is_some());
            match wanted {
                Some(wanted) if !settled => {
                    self.forget_mac(mac);
                    return Some(wanted);
                }
                _ => return Some(own),
            }
        }
        let full = self.slots.len() >= limits::LEASES_MAX;
        match wanted.or_else(|| self.first_unused()) {
            Some(ip) if !full || self.slots.contains_key(&ip) => Some(ip),
            Some(ip) => self.evict(now).map(|_| ip),
            None => self.evict(now),
        }
    }

    /// Whether anyone may have `ip`: in the pool, not declined, and unused or only remembered.
    fn is_free(&self, now: Instant, ip: Ipv4Addr) -> bool {
        self.in_pool(ip)
            && !self.declined.contains_key(&ip)
            && self.slots.get(&ip).is_none_or(|slot| slot.is_memory(now))
    }

    /// The first address nobody is remembered by.
    fn first_unused(&self) -> Option<Ipv4Addr> {
        let unused = |ip: Ipv4Addr| {
            self.in_pool(ip) && !self.slots.contains_key(&ip) && !self.declined.contains_key(&ip)
        };
        // One of this many candidates is free, for no more addresses than that are spoken for.
        let candidates = u32::try_from(self.slots.len() + self.declined.len() + 2).unwrap_or(u32::MAX);
        self.first
            .into_iter()
            .chain((1..=candidates).map_while(|n| self.subnet.host(n)))
            .find(|&ip| unused(ip))
    }

    /// Frees the address of the lease that ended first, or else of the oldest offer that had its
    /// time, and returns it.
    fn evict(&mut self, now: Instant) -> Option<Ipv4Addr> {
        let memory = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.is_memory(now))
            .min_by_key(|(_, slot)| slot.lease_until)
            .map(|(&ip, _)| ip);
        let ip = memory.or_else(|| {
            self.slots
                .iter()
                .filter(|(_, slot)| !slot.is_active(now))
                .filter_map(|(&ip, slot)| Some((slot.offer?.made, ip)))
                .filter(|&(made, _)| made + OFFER_HOLD_MIN <= now)
                .min()
                .map(|(_, ip)| ip)
        })?;
        if let Some(slot) = self.slots.remove(&ip) {
            self.by_mac.remove(&slot.mac);
        }
        Some(ip)
    }

    /// The slot of `ip`, which `mac` has from now on.
    fn slot(&mut self, ip: Ipv4Addr, mac: MacAddr) -> &mut Slot {
        let fresh = || Slot { mac, offer: None, lease_until: None, host_name: None };
        let slot = self.slots.entry(ip).or_insert_with(fresh);
        if slot.mac != mac {
            self.by_mac.remove(&slot.mac);
            *slot = fresh();
        }
        self.by_mac.insert(mac, ip);
        slot
    }

    fn forget_mac(&mut self, mac: MacAddr) {
        if let Some(ip) = self.by_mac.remove(&mac) {
            self.slots.remove(&ip);
        }
    }

    /// Drops offers that ran out and were never taken, and ends the rest of declined addresses.
    fn sweep(&mut self, now: Instant) {
        self.declined.retain(|_, &mut until| until > now);
        let by_mac = &mut self.by_mac;
        self.slots.retain(|_, slot| {
            let keep = slot.lease_until.is_some() || slot.is_offered(now);
            if !keep {
                by_mac.remove(&slot.mac);
            }
            keep
        });
    }
}

impl Slot {
    fn view(&self, ip: Ipv4Addr) -> Lease {
        Lease { mac: self.mac, ip, until: self.lease_until, host_name: self.host_name.clone() }
    }
}

impl IpAllocator for LeaseTable {
    fn offer(
        &mut self,
        now: Instant,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
    ) -> Result<Grant, Refusal> {
        let ip = LeaseTable::offer(self, now, client.mac, wanted).ok_or(Refusal::Exhausted)?;
        Ok(self.grant(client, ip))
    }

    fn bind(&mut self, now: Instant, client: &Client<'_>, ip: Ipv4Addr) -> Result<(Bind, Grant), Refusal> {
        let bind = LeaseTable::bind(self, now, client.mac, ip)?;
        Ok((bind, self.grant(client, ip)))
    }

    fn withdraw(&mut self, now: Instant, mac: MacAddr) -> Result<(), StoreError> {
        LeaseTable::withdraw(self, now, mac);
        Ok(())
    }

    fn release(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError> {
        Ok(LeaseTable::release(self, now, mac, ip))
    }

    fn decline(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError> {
        Ok(LeaseTable::decline(self, now, mac, ip))
    }

    fn get(&mut self, _now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        Ok(LeaseTable::get(self, mac))
    }

    fn leases(&mut self, _now: Instant) -> Result<Vec<Lease>, StoreError> {
        Ok(self.iter().collect())
    }
}

impl LeaseTable {
    /// What `client`, who was just given `ip`, has. One process has one guest: it may name its cards as it
    /// likes.
    fn grant(&mut self, client: &Client<'_>, ip: Ipv4Addr) -> Grant {
        if let Some(name) = client.host_name {
            self.set_host_name(client.mac, name);
        }
        let host_name = LeaseTable::get(self, client.mac).and_then(|lease| lease.host_name);
        Grant { ip, host_name, name_refused: false }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn table(subnet: &str) -> LeaseTable {
        let subnet: Ipv4Subnet = subnet.parse().unwrap();
        LeaseTable::new(subnet, subnet.host(1).unwrap(), None)
    }

    fn mac(n: u32) -> MacAddr {
        let [a, b, c, d] = n.to_be_bytes();
        MacAddr([2, 0, a, b, c, d])
    }

    fn at(seconds: u64) -> Instant {
        Instant::ZERO + Duration::from_secs(seconds)
    }

    #[test]
    fn lease_that_ended_first_is_reused_first() {
        let mut table = table("10.0.2.0/29");
        let ips: Vec<_> = (0..5)
            .map(|n| {
                let now = at(u64::from(n));
                let ip = table.offer(now, mac(n), None).unwrap();
                assert_eq!(table.bind(now, mac(n), ip), Ok(Bind::Bound));
                ip
            })
            .collect();
        assert_eq!(table.offer(at(10), mac(9), None), None);
        assert_eq!(table.bind(at(86_399), mac(0), ips[0]), Ok(Bind::Renewed));
        assert_eq!(table.offer(at(86_402), mac(9), None), Some(ips[1]));
        assert_eq!(table.offer(at(86_402), mac(2), None), Some(ips[2]), "a memory keeps its address");
    }

    #[test]
    fn lease_ends_at_its_last_second() {
        let mut table = table("10.0.2.0/30");
        let ip = table.offer(at(0), mac(1), None).unwrap();
        table.bind(at(0), mac(1), ip).unwrap();
        assert_eq!(table.bind(at(86_399), mac(2), ip), Err(BindRefusal::Taken));
        assert_eq!(table.bind(at(86_400), mac(2), ip), Ok(Bind::Bound));
        assert_eq!(table.bind(at(86_400), mac(1), ip), Err(BindRefusal::Taken));
    }

    #[test]
    fn table_holds_its_bound_and_not_one_more() {
        let mut table = table("10.0.0.0/16");
        let bound = u32::try_from(limits::LEASES_MAX).unwrap();
        for n in 0..bound {
            let ip = table.offer(at(0), mac(n), None).unwrap();
            table.bind(at(0), mac(n), ip).unwrap();
        }
        assert_eq!(table.offer(at(1), mac(bound), None), None);
        let free = Ipv4Addr::new(10, 0, 200, 1);
        assert_eq!(table.offer(at(1), mac(bound), Some(free)), None);
        assert_eq!(table.bind(at(1), mac(bound), free), Err(BindRefusal::Full));
        assert_eq!(table.iter().count(), limits::LEASES_MAX);
        assert_eq!(table.bind(at(86_400), mac(bound), free), Ok(Bind::Bound));
        assert_eq!(table.iter().count(), limits::LEASES_MAX);
    }

    #[test]
    fn one_decline_past_the_bound_brings_back_the_first() {
        let mut table = table("10.0.0.0/16");
        let bound = u32::try_from(limits::LEASES_DECLINED_MAX).unwrap();
        for n in 0..=bound {
            let now = Instant::from_micros(u64::from(n));
            let ip = table.offer(now, mac(1), None).unwrap();
            assert_eq!(ip, table.subnet.host(n + 2).unwrap());
            assert!(table.decline(now, mac(1), ip));
        }
        assert_eq!(table.offer(at(1), mac(2), None), table.subnet.host(2));
    }

    #[test]
    fn offer_that_nobody_took_may_be_asked_for_by_another() {
        let mut table = table("10.0.2.0/24");
        let ip = table.offer(at(0), mac(1), None).unwrap();
        assert_eq!(table.bind(at(29), mac(2), ip), Err(BindRefusal::Taken));
        assert_eq!(table.bind(at(30), mac(2), ip), Ok(Bind::Bound));
    }

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
            (mac.clone(), proptest::option::of(0u8..17)).prop_map(|(m, a)| Op::Offer(m, a)),
            (mac.clone(), 0u8..17).prop_map(|(m, a)| Op::Bind(m, a)),
            mac.clone().prop_map(Op::Withdraw),
            (mac.clone(), 0u8..17).prop_map(|(m, a)| Op::Release(m, a)),
            (mac, 0u8..17).prop_map(|(m, a)| Op::Decline(m, a)),
            prop_oneof![0u64..40, 80_000u64..90_000].prop_map(Op::Pass),
        ]
    }

    proptest! {
        #[test]
        fn nobody_loses_a_lease_and_no_address_has_two_holders(ops in prop::collection::vec(op(), 1..80)) {
            let mut table = table("10.0.2.0/28");
            let addr = |n: u8| Ipv4Addr::new(10, 0, 2, n);
            let mut now = at(1);
            let mut held: HashMap<MacAddr, (Ipv4Addr, Instant)> = HashMap::new();
            for op in ops {
                match op {
                    Op::Offer(m, a) => {
                        let offered = table.offer(now, mac(m), a.map(addr));
                        if let Some(&(ip, _)) = held.get(&mac(m)) {
                            prop_assert_eq!(offered, Some(ip));
                        }
                    }
                    Op::Bind(m, a) => {
                        if table.bind(now, mac(m), addr(a)).is_ok() {
                            held.insert(mac(m), (addr(a), now + LEASE_TIME));
                        }
                    }
                    Op::Withdraw(m) => table.withdraw(now, mac(m)),
                    Op::Release(m, a) => {
                        if table.release(now, mac(m), addr(a)) {
                            held.remove(&mac(m));
                        }
                    }
                    Op::Decline(m, a) => {
                        if table.decline(now, mac(m), addr(a)) {
                            held.remove(&mac(m));
                        }
                    }
                    Op::Pass(seconds) => now = now + Duration::from_secs(seconds),
                }
                held.retain(|_, (_, until)| *until > now);
                for (&mac, &(ip, until)) in &held {
                    let lease = table.get(mac).unwrap();
                    prop_assert_eq!((lease.ip, lease.until), (ip, Some(until)));
                    prop_assert!(table.in_pool(ip));
                }
                let macs: std::collections::HashSet<_> = table.iter().map(|lease| lease.mac).collect();
                prop_assert_eq!(macs.len(), table.iter().count());
                prop_assert_eq!(macs.len(), table.by_mac.len());
            }
        }
    }
}
