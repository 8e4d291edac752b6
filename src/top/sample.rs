//! What is shown: two answers of the API, and what happened a second between them.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::Instant;

use crate::control::api::counters::CountersAnswer;
use crate::control::api::flows::{FlowStatus, Flows};
use crate::control::api::status::Status;
use crate::control::client::{Client, ClientError};

/// Rates kept for the curves.
const KEPT: usize = 240;
/// Flows asked for, in pages of a thousand: their order is that of a table, and those used last may be anywhere in it. More
/// would cost a worker, and this process, a noticeable part of a core each second.
const FLOWS_MAX: usize = 10_000;
/// Pages asked for them, as a page may be short of flows.
const PAGES_MAX: usize = 2 * FLOWS_MAX / 1000;

/// What happened a second, from the guest and to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) frames: [f64; 2],
    pub(super) bits: [f64; 2],
    pub(super) flows_opened: f64,
    pub(super) retransmits: f64,
}

/// One reason of drops.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Drop {
    pub(super) reason: String,
    pub(super) total: u64,
    pub(super) a_second: f64,
}

/// All that is drawn.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    pub(super) status: Status,
    pub(super) rates: Rates,
    /// Bits a second so far, oldest first.
    pub(super) history: [VecDeque<u64>; 2],
    /// The most frequent first.
    pub(super) drops: Vec<Drop>,
    /// Those used last first until they are sorted, of all that were asked for.
    pub(super) flows: Vec<FlowStatus>,
    /// Whether there are more.
    pub(super) has_more_flows: bool,
}

/// Which flows come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Order {
    #[default]
    UsedLast,
    MostFromGuest,
    MostToGuest,
}

impl Order {
    /// The next one.
    pub(super) const fn next(self) -> Order {
        match self {
            Order::UsedLast => Order::MostFromGuest,
            Order::MostFromGuest => Order::MostToGuest,
            Order::MostToGuest => Order::UsedLast,
        }
    }

    /// For people.
    pub(super) const fn text(self) -> &'static str {
        match self {
            Order::UsedLast => "used last first",
            Order::MostFromGuest => "most bytes from the guest first",
            Order::MostToGuest => "most bytes to the guest first",
        }
    }
}

impl Shown {
    /// Puts flows into another order.
    pub(super) fn sort(&mut self, order: Order) {
        match order {
            Order::UsedLast => {
                self.flows.sort_by(|one, other| one.idle_seconds.total_cmp(&other.idle_seconds));
            }
            Order::MostFromGuest => self.flows.sort_by_key(|flow| Reverse(flow.from_guest_bytes)),
            Order::MostToGuest => self.flows.sort_by_key(|flow| Reverse(flow.to_guest_bytes)),
        }
    }
}

/// What the last answer was.
#[derive(Debug)]
pub(super) struct Sampler {
    last: Option<(Instant, CountersAnswer)>,
    history: [VecDeque<u64>; 2],
}

impl Sampler {
    pub(super) fn new() -> Sampler {
        Sampler { last: None, history: Default::default() }
    }

    /// Asks the backend.
    pub(super) fn next(&mut self, client: &Client) -> Result<Shown, ClientError> {
        let status: Status = client.get("/v1/status")?;
        let counters: CountersAnswer = client.get("/v1/counters")?;
        let flows = all_flows(|resource| client.get(resource))?;
        Ok(self.take(Instant::now(), status, counters, flows))
    }

    /// What there is to show after an answer at `now`.
    pub(super) fn take(
        &mut self,
        now: Instant,
        status: Status,
        counters: CountersAnswer,
        (flows, has_more_flows): (Vec<FlowStatus>, bool),
    ) -> Shown {
        let (before, seconds) = match &self.last {
            Some((at, before)) => (before.clone(), now.duration_since(*at).as_secs_f64().max(1e-3)),
            None => (counters.clone(), 1.0),
        };
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let bits = |now: u64, before: u64| 8.0 * rate(now, before);
        let rates = Rates {
            frames: [
                rate(counters.frames_from_guest, before.frames_from_guest),
                rate(counters.frames_to_guest, before.frames_to_guest),
            ],
            bits: [
                bits(counters.payload_from_guest_bytes, before.payload_from_guest_bytes),
                bits(counters.payload_to_guest_bytes, before.payload_to_guest_bytes),
            ],
            flows_opened: rate(counters.flows_opened, before.flows_opened),
            retransmits: rate(counters.retransmits, before.retransmits),
        };
        for (history, bits) in self.history.iter_mut().zip(rates.bits) {
            if history.len() == KEPT {
                history.pop_front();
            }
            history.push_back(bits as u64);
        }
        let mut drops: Vec<Drop> = counters
            .drops
            .iter()
            .map(|(reason, total)| Drop {
                reason: reason.clone(),
                total: *total,
                a_second: rate(*total, before.drops.get(reason).copied().unwrap_or(0)),
            })
            .collect();
        drops.sort_by_key(|drop| Reverse(drop.total));
        self.last = Some((now, counters));
        let mut shown = Shown { status, rates, history: self.history.clone(), drops, flows, has_more_flows };
        shown.sort(Order::default());
        shown
    }
}

/// Flows of all pages, up to a bound, as `get` answers; and whether there are more.
fn all_flows(
    get: impl Fn(&str) -> Result<Flows, ClientError>,
) -> Result<(Vec<FlowStatus>, bool), ClientError> {
    let mut flows = Vec::new();
    let mut cursor = String::new();
    for _ in 0..PAGES_MAX {
        let page = get(&format!("/v1/flows?limit=1000{cursor}"))?;
        flows.extend(page.flows);
        let Some(next) = page.next else { return Ok((flows, false)) };
        if flows.len() >= FLOWS_MAX {
            break;
        }
        cursor = format!("&cursor={next}");
    }
    Ok((flows, true))
}

/// A number with its thousands as k, M, G.
pub(super) fn short(value: f64) -> String {
    let units = ["", "k", "M", "G", "T"];
    let mut value = value;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.digits$}{}{}", if unit > 0 { " " } else { "" }, units[unit])
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::api::Facts;
    use crate::control::api::status::RingStatus;
    use crate::engine::flows::FlowProtocol;

    pub(crate) fn status() -> Status {
        Status {
            version: "0.1.0".to_owned(),
            pid: 7,
            uptime_seconds: 3723.0,
            facts: Facts {
                mode: "nat".to_owned(),
                uplink: "sockets".to_owned(),
                nat: Some("sockets".to_owned()),
                network: None,
                subnet: "10.0.2.0/24".to_owned(),
                gateway: Some([10, 0, 2, 1].into()),
                ip_mtu_bytes: 1500,
                mac: None,
                queue_pairs: 1,
            },
            attached: true,
            features: Vec::new(),
            rings: vec![RingStatus { worker: 0, index: 0, size: 256, available: 192 }],
            guest_address: Some([10, 0, 2, 2].into()),
            flows: 2,
            draining: false,
        }
    }

    pub(crate) fn counters(bytes: u64, spoofed: u64) -> CountersAnswer {
        let drops = [("spoofed_source".to_owned(), spoofed), ("malformed".to_owned(), 1)].into();
        let [frames_from_guest, frames_to_guest] = [bytes / 1000, bytes / 500];
        CountersAnswer {
            frames_from_guest,
            frames_to_guest,
            payload_from_guest_bytes: bytes,
            payload_to_guest_bytes: 2 * bytes,
            drops,
            ..CountersAnswer::default()
        }
    }

    pub(crate) fn flow(port: u16, idle_seconds: f64) -> FlowStatus {
        FlowStatus {
            id: format!("0-{port}"),
            protocol: FlowProtocol::Tcp,
            guest: ([10, 0, 2, 2], port).into(),
            remote: ([192, 0, 2, 1], 443).into(),
            state: "established".to_owned(),
            began: Some("guest".to_owned()),
            idle_seconds,
            from_guest_bytes: Some(1000 * u64::from(port)),
            to_guest_bytes: None,
        }
    }

    #[test]
    fn rates_are_of_the_time_between_two_answers() {
        let mut sampler = Sampler::new();
        let begun = Instant::now();
        let first = sampler.take(begun, status(), counters(1000, 3), (Vec::new(), false));
        assert_eq!(first.rates, Rates::default(), "nothing is known yet");
        let flows = vec![flow(1, 9.0), flow(2, 0.5)];
        let shown =
            sampler.take(begun + Duration::from_secs(2), status(), counters(501_000, 7), (flows, false));
        assert_eq!(shown.rates.bits, [2_000_000.0, 4_000_000.0]);
        assert_eq!(shown.rates.frames, [250.0, 500.0]);
        assert_eq!(shown.drops[0], Drop { reason: "spoofed_source".to_owned(), total: 7, a_second: 2.0 });
        assert_eq!(shown.flows[0].id, "0-2", "the one used last");
        assert_eq!(shown.history[0], [0, 2_000_000]);
        let nothing = (Vec::new(), false);
        let again = sampler.take(begun + Duration::from_secs(3), status(), counters(0, 0), nothing);
        assert_eq!(again.rates, Rates::default(), "a backend that was started anew counts from nothing");
    }

    /// What a backend of `flows` flows answers, of which only the last is in use.
    fn answer(flows: usize, resource: &str) -> Flows {
        let cursor = resource.split_once("&cursor=").map_or(0, |(_, cursor)| cursor.parse().unwrap());
        let end = flows.min(cursor + 1000);
        let idle = |n| if n + 1 == flows { 0.0 } else { 60.0 };
        let page = (cursor..end).map(|n| flow(n as u16, idle(n))).collect();
        Flows { flows: page, next: (end < flows).then(|| end.to_string()) }
    }

    #[test]
    fn the_flow_used_last_is_found_on_any_page_and_a_bound_is_told_of() {
        for (there_are, taken, more) in [
            (0, 0, false),
            (1000, 1000, false),
            (FLOWS_MAX, FLOWS_MAX, false),
            (FLOWS_MAX + 1, FLOWS_MAX, true),
        ] {
            let flows = all_flows(|resource| Ok(answer(there_are, resource))).unwrap();
            let shown = Sampler::new().take(Instant::now(), status(), counters(0, 0), flows);
            assert_eq!((shown.flows.len(), shown.has_more_flows), (taken, more), "{there_are}");
            let is_first = shown.flows.first().is_some_and(|flow| flow.idle_seconds == 0.0);
            assert_eq!(is_first, taken > 0 && !more, "{there_are}");
        }
        let asked = std::cell::Cell::new(0);
        let without_end = |_: &str| {
            asked.set(asked.get() + 1);
            Ok(Flows { flows: Vec::new(), next: Some("0-1".to_owned()) })
        };
        assert!(all_flows(without_end).unwrap().1);
        assert_eq!(asked.get(), PAGES_MAX);
    }

    #[test]
    fn flows_are_in_the_order_that_was_asked_for() {
        let mut sampler = Sampler::new();
        let bytes = |port, from_guest_bytes, to_guest_bytes| FlowStatus {
            from_guest_bytes,
            to_guest_bytes,
            ..flow(port, f64::from(port))
        };
        let flows = vec![bytes(1, Some(5), Some(9)), bytes(2, Some(7), Some(1)), bytes(3, None, None)];
        let mut shown = sampler.take(Instant::now(), status(), counters(0, 0), (flows, false));
        let (mut order, mut orders) = (Order::default(), Vec::new());
        for _ in 0..3 {
            shown.sort(order);
            orders.push(shown.flows.iter().map(|flow| flow.guest.port()).collect::<Vec<_>>());
            order = order.next();
        }
        assert_eq!(orders, [[1, 2, 3], [2, 1, 3], [1, 2, 3]]);
        assert_eq!(order, Order::UsedLast, "and round again");
    }

    #[test]
    fn numbers_are_short() {
        let texts = [
            (0.0, "0"),
            (999.0, "999"),
            (999.6, "1.0 k"),
            (12_345.0, "12.3 k"),
            (250e6, "250 M"),
            (9.9e9, "9.9 G"),
        ];
        for (value, text) in texts {
            assert_eq!(short(value), text);
        }
    }
}
