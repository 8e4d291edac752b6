//! Flows as they are shown to people and programs, whichever table holds them.
//!
//! A page is a walk over a bounded number of places of the tables from a cursor on, so that a worker with a
//! million flows is not kept from its rings by who looks at them. Flows that begin or end meanwhile may be
//! missed; none is shown twice in one walk.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;

use crate::limits::FLOW_NEWS_MAX;
use crate::time::Instant;

/// Flows on a page, at most.
pub const PAGE_MAX: usize = 1000;
/// Places of tables that are looked at for a page, at most: a fraction of a millisecond.
const LOOKED_AT_MAX: usize = 1 << 14;
/// Places looked at in one step of ending flows: each of a host socket may cost system calls.
pub const ENDED_LOOKED_AT_MAX: usize = 1 << 12;

/// Names a flow of one worker: table, generation and place in 8, 24 and 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId(pub u64);

/// A table of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Table {
    /// TCP over host sockets.
    Tcp = 1,
    /// Datagrams over host sockets; the number is that of their tokens.
    Datagram = 3,
    /// Translated packets.
    Packet = 5,
}

impl FlowId {
    /// The flow at `place` of a table, in its `generation`.
    pub const fn new(table: Table, generation: u32, place: u32) -> FlowId {
        FlowId((table as u64) << 56 | ((generation & 0xff_ffff) as u64) << 32 | place as u64)
    }

    /// Its table.
    pub const fn table(self) -> Option<Table> {
        match self.0 >> 56 {
            1 => Some(Table::Tcp),
            3 => Some(Table::Datagram),
            5 => Some(Table::Packet),
            _ => None,
        }
    }

    /// Its place there.
    pub const fn place(self) -> u32 {
        self.0 as u32
    }
}

/// Transport protocol of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FlowProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo; the guest's "port" is the identifier.
    Icmp,
    /// Any other, translated by address alone.
    Other,
}

/// Which side began a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Began {
    /// The guest.
    Guest,
    /// The world: by a published port.
    World,
}

/// Payload that a flow carried since it began: bytes that the other end has not seen before. Held payload counts once it
/// left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// From the guest.
    pub from_guest_bytes: u64,
    /// To the guest.
    pub to_guest_bytes: u64,
}

/// One flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// Its name.
    pub id: FlowId,
    /// Protocol.
    pub protocol: FlowProtocol,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The remote end as the guest sees it.
    pub remote: SocketAddr,
    /// The state it is in, a word of its table's.
    pub state: &'static str,
    /// Who began it, where that is known.
    pub began: Option<Began>,
    /// Time since anything was carried.
    pub idle: Duration,
    /// What it carried, where that is counted: translated packets are not.
    pub carried: Option<Carried>,
}

/// Which flows are asked for. What is `None` does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowQuery {
    /// Protocol.
    pub protocol: Option<FlowProtocol>,
    /// The guest's address.
    pub guest: Option<IpAddr>,
    /// The remote address.
    pub remote: Option<IpAddr>,
    /// Port of either end.
    pub port: Option<u16>,
    /// Where to go on, from [`FlowPage::next`]; 0 at the beginning.
    pub cursor: u64,
    /// Flows wanted; [`PAGE_MAX`] at most are given.
    pub limit: usize,
}

impl FlowQuery {
    /// Whether `flow` is asked for.
    pub fn wants(&self, flow: &FlowView) -> bool {
        self.protocol.is_none_or(|protocol| protocol == flow.protocol)
            && self.guest.is_none_or(|addr| addr == flow.guest.ip())
            && self.remote.is_none_or(|addr| addr == flow.remote.ip())
            && self.port.is_none_or(|port| port == flow.guest.port() || port == flow.remote.port())
    }
}

/// Flows of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowPage {
    /// They.
    pub flows: Vec<FlowView>,
    /// Where the next page begins, if there is more to look at.
    pub next: Option<u64>,
}

/// A walk over the tables of a worker, one after the other.
#[derive(Debug)]
pub struct Walk<'a> {
    query: &'a FlowQuery,
    /// The time of the batch.
    pub now: Instant,
    looked_at: usize,
    page: FlowPage,
}

impl<'a> Walk<'a> {
    /// A walk from the query's cursor on.
    pub fn new(query: &'a FlowQuery, now: Instant) -> Walk<'a> {
        Walk { query, now, looked_at: 0, page: FlowPage::default() }
    }

    /// Walks over a table that is next, of `places` places, `view` showing the flow at one.
    pub fn over(&mut self, table: Table, places: usize, mut view: impl FnMut(usize) -> Option<FlowView>) {
        let cursor = FlowId(self.query.cursor);
        let done = (cursor.0 >> 56) as u8;
        if self.page.next.is_some() || done > table as u8 {
            return;
        }
        let first = if done == table as u8 { cursor.place() as usize } else { 0 };
        for place in first..places {
            let is_full = self.page.flows.len() >= self.query.limit.clamp(1, PAGE_MAX);
            if is_full || self.looked_at >= LOOKED_AT_MAX {
                self.page.next = Some(FlowId::new(table, 0, place as u32).0);
                return;
            }
            self.looked_at += 1;
            if let Some(flow) = view(place)
                && self.query.wants(&flow)
            {
                self.page.flows.push(flow);
            }
        }
    }

    /// What was found.
    pub fn done(self) -> FlowPage {
        self.page
    }
}

/// What a step of ending the flows of a removed port did: a bounded number of places is looked at in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// TCP connections that were reset.
    pub connections: usize,
    /// The place where the next step goes on, if there is more to look at.
    pub next: Option<usize>,
}

/// The places of a table of `places` that a step from `first` on looks at.
pub fn ending_step(first: usize, places: usize) -> (std::ops::Range<usize>, Option<usize>) {
    let end = places.min(first.saturating_add(ENDED_LOOKED_AT_MAX));
    (first.min(end)..end, (end < places).then_some(end))
}

/// A flow that began or ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowNews {
    /// Whether it began.
    pub opened: bool,
    /// Protocol.
    pub protocol: FlowProtocol,
    /// The guest's end.
    pub guest: SocketAddr,
    /// The remote end as the guest sees it.
    pub remote: SocketAddr,
    /// What one that ended has carried, where that is counted.
    pub carried: Option<Carried>,
}

/// Flows that began or ended since somebody took notice; nothing is noted while nobody listens.
#[derive(Debug, Default)]
pub struct NewsList {
    noted: Option<Vec<FlowNews>>,
    missed: u64,
}

impl NewsList {
    /// Whether flows are noted from now on.
    pub fn set(&mut self, listens: bool) {
        if listens != self.noted.is_some() {
            *self = NewsList { noted: listens.then(Vec::new), missed: 0 };
        }
    }

    /// Notes one, if anybody listens; beyond [`FLOW_NEWS_MAX`] only their number is.
    pub fn note(&mut self, news: impl FnOnce() -> FlowNews) {
        match &mut self.noted {
            None => {}
            Some(noted) if noted.len() >= FLOW_NEWS_MAX => self.missed += 1,
            Some(noted) => noted.push(news()),
        }
    }

    /// What was noted since the last call, and how many were not.
    pub fn take(&mut self) -> (Vec<FlowNews>, u64) {
        let noted = self.noted.as_mut().map(std::mem::take).unwrap_or_default();
        (noted, std::mem::take(&mut self.missed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(place: usize) -> FlowView {
        FlowView {
            id: FlowId::new(Table::Tcp, 1, place as u32),
            protocol: FlowProtocol::Tcp,
            guest: ([10, 0, 2, 2], place as u16).into(),
            remote: ([192, 0, 2, 1], 80).into(),
            state: "established",
            began: None,
            idle: Duration::ZERO,
            carried: None,
        }
    }

    /// All flows in pages of `limit`, of two tables with every third place taken.
    fn walk(limit: usize, places: usize, port: Option<u16>) -> (Vec<FlowView>, usize) {
        let (mut all, mut cursor, mut pages) = (Vec::new(), 0, 0);
        loop {
            let query = FlowQuery { limit, cursor, port, ..FlowQuery::default() };
            let mut walk = Walk::new(&query, Instant::ZERO);
            let view = |place: usize| place.is_multiple_of(3).then(|| flow(place));
            walk.over(Table::Tcp, places, view);
            walk.over(Table::Packet, places, view);
            let page = walk.done();
            assert!(page.flows.len() <= limit.clamp(1, PAGE_MAX));
            all.extend(page.flows);
            pages += 1;
            match page.next {
                Some(next) => cursor = next,
                None => return (all, pages),
            }
        }
    }

    #[test]
    fn pages_together_are_all_flows_of_all_tables_once() {
        let (all, pages) = walk(7, 100, None);
        assert_eq!(all.len(), 2 * 34);
        assert_eq!(all[..34], (0..100).step_by(3).map(flow).collect::<Vec<_>>());
        assert_eq!(pages, 68usize.div_ceil(7));
    }

    #[test]
    fn walk_for_a_flow_among_many_rests_after_a_bounded_number_of_places() {
        let places = 3 * LOOKED_AT_MAX;
        let (all, pages) = walk(10, places, Some(9));
        assert_eq!(all.len(), 2 * (0..places).step_by(3).filter(|place| *place as u16 == 9).count());
        assert!(pages >= 6, "{pages}");
    }

    #[test]
    fn flows_are_noted_while_somebody_listens_and_only_so_many() {
        let news = || FlowNews {
            opened: true,
            protocol: FlowProtocol::Udp,
            guest: ([10, 0, 2, 2], 1).into(),
            remote: ([192, 0, 2, 1], 2).into(),
            carried: None,
        };
        let mut list = NewsList::default();
        list.note(news);
        assert_eq!(list.take(), (vec![], 0));
        list.set(true);
        (0..FLOW_NEWS_MAX + 3).for_each(|_| list.note(news));
        list.set(true);
        let (noted, missed) = list.take();
        assert_eq!((noted.len(), missed), (FLOW_NEWS_MAX, 3));
        list.note(news);
        list.set(false);
        assert_eq!(list.take(), (vec![], 0));
    }

    #[test]
    fn steps_of_ending_flows_are_bounded_and_come_to_each_place_once() {
        for places in [0, 1, ENDED_LOOKED_AT_MAX, ENDED_LOOKED_AT_MAX + 1, 3 * ENDED_LOOKED_AT_MAX] {
            let (mut next, mut seen) = (Some(0), 0);
            while let Some(first) = next {
                let (step, more) = ending_step(first, places);
                assert!(step.start == seen && step.len() <= ENDED_LOOKED_AT_MAX);
                (seen, next) = (step.end, more);
            }
            assert_eq!(seen, places);
        }
        assert_eq!(ending_step(usize::MAX, 7), (7..7, None), "a place that is none");
    }

    #[test]
    fn limit_of_nothing_still_gets_on() {
        assert_eq!(walk(0, 10, None).0.len(), 8);
        assert_eq!(walk(usize::MAX, 4000, None).0.len(), 2 * 1334);
    }
}
