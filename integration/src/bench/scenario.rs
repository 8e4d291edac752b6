//! What can be measured, by name.

use std::fmt;

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scenario {
    /// TCP streams with iperf3.
    Tcp {
        /// From the world to the guest, else from the guest.
        to_guest: bool,
        /// IP MTU of the guest's link in bytes.
        ip_mtu: u16,
        /// Streams at once.
        flows: u16,
        /// Queue pairs of the guest.
        pairs: u16,
    },
    /// UDP datagrams made in guest memory, on [`PAIRS_FLOWS`] flows if the pairs are what counts.
    UdpFrom {
        /// UDP payload in bytes.
        payload_bytes: u16,
        /// Queue pairs that send at once; `None` for one flow on the only pair.
        pairs: Option<u16>,
    },
    /// UDP datagrams of a server, counted in guest memory.
    UdpTo {
        /// UDP payload in bytes.
        payload_bytes: u16,
        /// The server sends many with one system call, else one.
        runs: bool,
    },
    /// One byte there and back, one after the other.
    Latency(Exchange),
    /// Connect, request, response, close by the server.
    Connect {
        /// Clients at once.
        parallel: u16,
    },
    /// Many open TCP flows.
    Flows {
        /// How many.
        count: u32,
    },
    /// Memory, wake-ups and CPU time while nothing can get ahead.
    Quiet(Quiet),
    /// From the start of the processes to a lease.
    Lease,
    /// TCP streams with iperf3 to a world behind a link with delay and losses.
    Wan(Wan),
    /// One TCP stream with iperf3 from a guest to another over a bridge.
    Between,
    /// From the start of many VMs of one network, all at once, to the last one's lease.
    LeasesTogether {
        /// How many, at most 250.
        guests: u8,
    },
}

/// What [`Scenario::Wan`] has between host and world, and what crosses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wan {
    /// From the world to the guest, else from the guest.
    pub(super) to_guest: bool,
    /// Round-trip time of the link in milliseconds.
    pub(super) rtt_ms: u16,
    /// Segments lost each way, in a thousand.
    pub(super) lost_per_mille: u16,
    /// Streams at once.
    pub(super) flows: u16,
}

/// What goes there and back in [`Scenario::Latency`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exchange {
    /// On one TCP connection.
    Tcp,
    /// Between two UDP sockets.
    Udp,
    /// ICMP echo, every millisecond.
    Ping,
}

/// Why nothing gets ahead in [`Scenario::Quiet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quiet {
    /// Nobody has anything to send.
    Idle,
    /// The world has data, the guest posts no receive buffers.
    Starved,
    /// The guest takes data and acknowledges none.
    Unacked,
}

/// Flows of the scenarios that compare queue pairs: the same whatever the number of pairs.
pub(super) const PAIRS_FLOWS: u16 = 4;

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = |to_guest: bool| if to_guest { "to" } else { "from" };
        match *self {
            Scenario::Tcp { to_guest, ip_mtu, flows, pairs: 1 } => {
                write!(f, "tcp-{}-{ip_mtu}-{flows}", way(to_guest))
            }
            Scenario::Tcp { to_guest, ip_mtu, flows, pairs } => {
                write!(f, "tcp-{}-{ip_mtu}-{flows}-pairs-{pairs}", way(to_guest))
            }
            Scenario::UdpFrom { payload_bytes, pairs: None } => write!(f, "udp-from-{payload_bytes}"),
            Scenario::UdpFrom { payload_bytes, pairs: Some(pairs) } => {
                write!(f, "udp-from-{payload_bytes}-pairs-{pairs}")
            }
            Scenario::UdpTo { payload_bytes, runs: false } => write!(f, "udp-to-{payload_bytes}"),
            Scenario::UdpTo { payload_bytes, runs: true } => write!(f, "udp-to-{payload_bytes}-runs"),
            Scenario::Latency(Exchange::Tcp) => f.write_str("tcp-rr"),
            Scenario::Latency(Exchange::Udp) => f.write_str("udp-rr"),
            Scenario::Latency(Exchange::Ping) => f.write_str("ping"),
            Scenario::Connect { parallel } => write!(f, "connect-{parallel}"),
            Scenario::Flows { count } => write!(f, "flows-{count}"),
            Scenario::Quiet(Quiet::Idle) => f.write_str("idle"),
            Scenario::Quiet(Quiet::Starved) => f.write_str("starved"),
            Scenario::Quiet(Quiet::Unacked) => f.write_str("unacked"),
            Scenario::Lease => f.write_str("lease"),
            Scenario::Wan(Wan { to_guest, rtt_ms, lost_per_mille, flows }) => {
                let percent = f64::from(lost_per_mille) / 10.0;
                write!(f, "wan-{}-{rtt_ms}ms-{percent}%-{flows}", way(to_guest))
            }
            Scenario::Between => f.write_str("between-1500-1"),
            Scenario::LeasesTogether { guests } => write!(f, "leases-{guests}"),
        }
    }
}

impl Scenario {
    /// Every scenario of a run that names none, in the order of the report. Two flows at MTU 1500 are there for their
    /// fairness.
    pub(super) fn all() -> Vec<Scenario> {
        let mut all = Vec::new();
        for ip_mtu in [1500, 9000, 65_520] {
            let flows: &[u16] = match ip_mtu {
                1500 => &[1, 2, 4, 16],
                9000 => &[1],
                _ => &[1, 4, 16],
            };
            for &flows in flows {
                for to_guest in [false, true] {
                    all.push(Scenario::Tcp { to_guest, ip_mtu, flows, pairs: 1 });
                }
            }
        }
        // To compare with the same four flows on one pair, above.
        for to_guest in [false, true] {
            all.push(Scenario::Tcp { to_guest, ip_mtu: 1500, flows: PAIRS_FLOWS, pairs: 2 });
        }
        for payload_bytes in [64, 512, 1472] {
            all.push(Scenario::UdpFrom { payload_bytes, pairs: None });
            all.extend([false, true].map(|runs| Scenario::UdpTo { payload_bytes, runs }));
        }
        all.extend([1, 2].map(|pairs| Scenario::UdpFrom { payload_bytes: 64, pairs: Some(pairs) }));
        all.extend([Exchange::Tcp, Exchange::Udp, Exchange::Ping].map(Scenario::Latency));
        all.extend([1, 8].map(|parallel| Scenario::Connect { parallel }));
        all.push(Scenario::Flows { count: 10_000 });
        all.extend([Quiet::Idle, Quiet::Starved, Quiet::Unacked].map(Scenario::Quiet));
        all.push(Scenario::Lease);
        all
    }

    /// Every scenario there is, in the order of the report.
    pub(super) fn every() -> Vec<Scenario> {
        let mut every = Scenario::all();
        every.extend([Scenario::Between, Scenario::LeasesTogether { guests: 50 }]);
        for rtt_ms in [1, 10, 50, 100, 300] {
            for lost_per_mille in [0, 1, 10] {
                for flows in [1, 8] {
                    for to_guest in [false, true] {
                        every.push(Scenario::Wan(Wan { to_guest, rtt_ms, lost_per_mille, flows }));
                    }
                }
            }
        }
        every
    }

    /// The scenarios `only` names; if it names none, all but those of [`Self::every`] alone. A name stands for every scenario it begins,
    /// part by part: `tcp-from` for all of `tcp-from-…`. The whole name of one stands for it alone.
    ///
    /// # Errors
    /// The first name that stands for nothing.
    pub(super) fn select(only: &[String]) -> Result<Vec<Scenario>, String> {
        if only.is_empty() {
            return Ok(Scenario::all());
        }
        let all = Scenario::every();
        let whole: Vec<String> = all.iter().map(Scenario::to_string).collect();
        let means = |wanted: &str, name: &str| {
            if whole.iter().any(|known| known == wanted) {
                return name == wanted;
            }
            name.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('-'))
        };
        for wanted in only {
            if !all.iter().any(|scenario| means(wanted, &scenario.to_string())) {
                let names: Vec<String> = all.iter().map(Scenario::to_string).collect();
                return Err(format!("no scenario {wanted:?}; there are {}", names.join(", ")));
            }
        }
        let chosen = |scenario: &Scenario| {
            let name = scenario.to_string();
            only.iter().any(|wanted| means(wanted, &name))
        };
        Ok(all.into_iter().filter(chosen).collect())
    }

    /// Whether its guests are on a named network.
    pub(super) fn is_on_a_network(&self) -> bool {
        matches!(self, Scenario::Between | Scenario::LeasesTogether { .. })
    }

    /// IP MTU of the guest's link in bytes.
    pub(super) fn ip_mtu(&self) -> u16 {
        if let Scenario::Tcp { ip_mtu, .. } = *self { ip_mtu } else { 1500 }
    }

    /// Queue pairs of the guest.
    pub(super) fn pairs(&self) -> u16 {
        match *self {
            Scenario::Tcp { pairs, .. } | Scenario::UdpFrom { pairs: Some(pairs), .. } => pairs,
            _ => 1,
        }
    }
}

/// A figure: what it is, its unit, and which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metric {
    /// Name in the results.
    pub(super) name: &'static str,
    /// Unit.
    pub(super) unit: &'static str,
    /// Whether more is better.
    pub(super) more_is_better: bool,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $id:ident = $name:literal, $unit:literal, $more:literal;)+) => {
        $($(#[doc = $doc])+
        pub(super) const $id: Metric = Metric { name: $name, unit: $unit, more_is_better: $more };)+

        impl Metric {
            /// The metric called `name`.
            pub(super) fn named(name: &str) -> Option<Metric> {
                [$($id,)+].into_iter().find(|metric| metric.name == name)
            }
        }
    };
}

metrics! {
    /// Payload carried.
    RATE = "rate", "Gbit/s", true;
    /// Payload carried over a link that is no faster than [`super::wan::RATE_MBIT`].
    GOODPUT = "goodput", "Mbit/s", true;
    /// Frames a faulty link handed over more than a millisecond late, because the machine was busy.
    LATE = "late on the link", "%", false;
    /// CPU time of the back-end for 10^9 bytes of payload.
    CPU_PER_GB = "backend CPU per GB", "s", false;
    /// CPU time of the whole machine for 10^9 bytes of payload: of all that runs for it ([`super::cpu`]).
    MACHINE_PER_GB = "machine CPU per GB", "s", false;
    /// The slowest flow's share of the fastest's.
    FAIRNESS = "slowest/fastest flow", "", true;
    /// Datagrams that arrived.
    PACKETS = "packets", "thousand/s", true;
    /// Datagrams sent that did not arrive.
    LOSS = "loss", "%", false;
    /// CPU time of the back-end for 10^6 datagrams that arrived.
    CPU_PER_MILLION = "backend CPU per million", "s", false;
    /// CPU time of the whole machine for 10^6 datagrams that arrived.
    MACHINE_PER_MILLION = "machine CPU per million", "s", false;
    /// Half of the exchanges took less.
    P50 = "p50", "us", false;
    /// 99 of 100 exchanges took less.
    P99 = "p99", "us", false;
    /// Exchanges completed.
    EXCHANGES = "exchanges", "thousand/s", true;
    /// CPU time of the back-end for one exchange.
    CPU_PER_EXCHANGE = "backend CPU per exchange", "us", false;
    /// Flows open at once before one failed: a back-end with several files a flow may run out of them.
    HELD = "flows held", "", true;
    /// Flows opened.
    OPENED = "flows opened", "thousand/s", true;
    /// Growth of resident memory for each open flow.
    BYTES_PER_FLOW = "resident per flow", "B", false;
    /// Resident memory without guest memory.
    RESIDENT = "resident", "MiB", false;
    /// Times any thread of the back-end slept and was woken.
    WAKES = "wake-ups", "1/s", false;
    /// CPU time of the back-end in a second: one that never sleeps has no wake-ups either.
    BUSY = "backend CPU", "% of a core", false;
    /// From the start of the back-end's process to DHCPACK; of the first of several to the last's.
    LEASE_MS = "start to lease", "ms", false;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str]) -> Vec<String> {
        let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
        Scenario::select(&only).unwrap().iter().map(Scenario::to_string).collect()
    }

    #[test]
    fn names_are_unique() {
        let mut all = names(&[]);
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn a_name_stands_for_all_it_begins_part_by_part() {
        assert_eq!(names(&["tcp-from-1500-1"]), ["tcp-from-1500-1"]);
        assert_eq!(names(&["tcp-from-9000"]), ["tcp-from-9000-1"]);
        assert_eq!(names(&["connect", "idle"]), ["connect-1", "connect-8", "idle"]);
        assert_eq!(names(&["udp-from-64-pairs"]), ["udp-from-64-pairs-1", "udp-from-64-pairs-2"]);
        assert!(Scenario::select(&["tcp-from-1500-".into()]).is_err());
        assert!(Scenario::select(&["tcp-fro".into()]).unwrap_err().contains("tcp-from-1500-1"));
    }

    #[test]
    fn the_wan_and_networks_are_measured_only_where_they_are_named() {
        let all = names(&[]);
        assert!(
            all.iter().all(|name| !["wan", "between", "leases"].iter().any(|kind| name.starts_with(kind)))
        );
        assert_eq!(names(&["between", "leases"]), ["between-1500-1", "leases-50"]);
        assert_eq!(names(&["wan"]).len(), 5 * 3 * 2 * 2);
        assert_eq!(names(&["wan-to-50ms-0.1%"]), ["wan-to-50ms-0.1%-1", "wan-to-50ms-0.1%-8"]);
    }

    #[test]
    fn a_whole_name_stands_for_itself_alone() {
        assert_eq!(names(&["udp-from-64"]), ["udp-from-64"]);
        assert_eq!(names(&["udp-to-64", "tcp-to-1500-4"]), ["tcp-to-1500-4", "udp-to-64"]);
        assert_eq!(names(&["udp-to-64-runs"]), ["udp-to-64-runs"]);
    }
}
