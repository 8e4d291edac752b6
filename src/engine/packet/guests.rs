//! Flows by guest address: how many each has, and in which order they fell idle.
//!
//! Each guest has two lists through its flows, of the assured and of those that are not yet, each from the longest idle to
//! the one used last. A flow moves at most once in [`GRANULE_MS`], so that packets rarely touch its neighbours;
//! within that time the order is that of the last move.
//!
//! Who must make room when the table is full is a guest with the most flows, and of it
//! the longest idle flow: one that is not assured while those are more than an eighth, so that
//! floods of first packets push out each other and not what is under way.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use hashbrown::HashMap;

use super::flow::{Flow, FlowFlags, NIL};

/// For how long a flow stays where it is in the order of idleness, whatever it carries, in milliseconds: a power of
/// two. With a million flows in use at random each move touches five lines that are in no cache; at four
/// seconds that is a few nanoseconds a packet.
pub(super) const GRANULE_MS: u32 = 4096;

#[derive(Clone, Copy, Debug)]
struct List {
    newest: u32,
    oldest: u32,
    len: u32,
}

const EMPTY_LIST: List = List { newest: NIL, oldest: NIL, len: 0 };

#[derive(Debug)]
struct Guest {
    addr: Ipv4Addr,
    /// Of those not assured, and of the assured.
    lists: [List; 2],
}

impl Guest {
    fn flows(&self) -> u32 {
        self.lists[0].len + self.lists[1].len
    }

    fn victim(&self) -> Option<u32> {
        let [fresh, assured] = &self.lists;
        let list = if fresh.len > self.flows() / 8 || assured.len == 0 { fresh } else { assured };
        (list.oldest != NIL).then_some(list.oldest)
    }
}

/// The guests that have flows.
#[derive(Debug, Default)]
pub(super) struct Guests {
    by_addr: HashMap<Ipv4Addr, u32, foldhash::quality::RandomState>,
    guests: Vec<Guest>,
    free: Vec<u32>,
    /// Flows and number of each guest that has any.
    by_flows: BTreeSet<(u32, u32)>,
}

impl Guests {
    /// Flows of a guest.
    pub(super) fn flows_of(&self, addr: Ipv4Addr) -> usize {
        self.by_addr.get(&addr).map_or(0, |slot| self.guests[*slot as usize].flows() as usize)
    }

    /// The flow that `addr` gives up for another of its own.
    pub(super) fn own_victim(&self, addr: Ipv4Addr) -> Option<u32> {
        self.guests[*self.by_addr.get(&addr)? as usize].victim()
    }

    /// The flow that is given up for another of `addr`: of a guest with more flows if there is one, else its own.
    pub(super) fn victim(&self, addr: Ipv4Addr) -> Option<u32> {
        let (flows, heaviest) = *self.by_flows.last()?;
        if flows as usize > self.flows_of(addr) {
            self.guests[heaviest as usize].victim()
        } else {
            self.own_victim(addr)
        }
    }

    /// Takes in flow `index`, as the one used last.
    pub(super) fn add(&mut self, flows: &mut [Flow], index: u32) {
        let addr = flows[index as usize].key().guest;
        let slot = match self.by_addr.get(&addr) {
            Some(slot) => *slot,
            None => self.begin(addr),
        };
        flows[index as usize].guest_slot = slot;
        self.link(flows, index);
        let count = self.guests[slot as usize].flows();
        self.by_flows.remove(&(count - 1, slot));
        self.by_flows.insert((count, slot));
    }

    fn begin(&mut self, addr: Ipv4Addr) -> u32 {
        let guest = Guest { addr, lists: [EMPTY_LIST; 2] };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.guests[slot as usize] = guest;
                slot
            }
            None => {
                self.guests.push(guest);
                self.guests.len() as u32 - 1
            }
        };
        self.by_addr.insert(addr, slot);
        slot
    }

    /// Makes flow `index` the one used last, among those its flags say.
    pub(super) fn touch(&mut self, flows: &mut [Flow], index: u32) {
        self.unlink(flows, index);
        self.link(flows, index);
    }

    /// Takes flow `index` out.
    pub(super) fn remove(&mut self, flows: &mut [Flow], index: u32) {
        self.unlink(flows, index);
        let slot = flows[index as usize].guest_slot;
        let guest = &self.guests[slot as usize];
        let count = guest.flows();
        self.by_flows.remove(&(count + 1, slot));
        if count > 0 {
            self.by_flows.insert((count, slot));
        } else {
            self.by_addr.remove(&guest.addr);
            self.free.push(slot);
        }
    }

    fn list(&mut self, flow: &Flow) -> &mut List {
        let assured = flow.flags.has(FlowFlags::RANKED_ASSURED);
        &mut self.guests[flow.guest_slot as usize].lists[usize::from(assured)]
    }

    fn link(&mut self, flows: &mut [Flow], index: u32) {
        let flow = &mut flows[index as usize];
        if flow.flags.has(FlowFlags::ASSURED) {
            flow.flags.set(FlowFlags::RANKED_ASSURED);
        } else {
            flow.flags.clear(FlowFlags::RANKED_ASSURED);
        }
        let list = self.list(flow);
        flow.idle.newer = NIL;
        flow.idle.older = list.newest;
        list.newest = index;
        list.len += 1;
        match flow.idle.older {
            NIL => list.oldest = index,
            older => flows[older as usize].idle.newer = index,
        }
    }

    fn unlink(&mut self, flows: &mut [Flow], index: u32) {
        let flow = &flows[index as usize];
        let (newer, older) = (flow.idle.newer, flow.idle.older);
        let list = self.list(flow);
        list.len -= 1;
        match newer {
            NIL => list.newest = older,
            newer => flows[newer as usize].idle.older = older,
        }
        match older {
            NIL => list.oldest = newer,
            older => flows[older as usize].idle.newer = newer,
        }
    }
}
