//! TCP over a link with delay and losses: which link, how it is measured, and how it is judged.
//!
//! The link ([`crate::link`]) is between host and world, so that guest, back-end and server are where they
//! are in every other scenario. The bound is the host's own TCP over the same link: iperf3 where a back-end
//! would stand. Each repetition of each scenario has a seed of its own, the same for all back-ends.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::measure::{Sample, Sampler};
use super::procfs::KernelSettings;
use super::report::{Report, short};
use super::scenario::{self as m, Scenario, Wan};
use super::site::{Backend, BackendKind, BenchError, Site, during};
use crate::sys::lock;

/// Rate of the link each way in Mbit/s.
pub(super) const RATE_MBIT: u32 = 1000;
/// What waits for it at most: 32 ms.
const QUEUE_MB: u32 = 4;
/// An odd number, by which cells differ in all bits of their seeds.
const SEED_SPREAD: u32 = 0x9e37_79b1;
/// Time iperf3 gets besides its load: a connection that loses its SYN at 1 % and 300 ms takes seconds.
const PATIENCE: Duration = Duration::from_secs(40);

/// Whoever changes the congestion controls the machine allows holds the lock on this file.
const LOCK_FILE: &str = "/tmp/vunet-congestion-control.lock";

impl Wan {
    /// Arguments of `vunet-integration link` for the `repetition`th run. No two scenarios share a seed, lest
    /// one order of losses that happens to be kind decides a whole row.
    pub(super) fn link_args(&self, repetition: u32) -> Vec<String> {
        let Wan { to_guest, rtt_ms, lost_per_mille, flows } = *self;
        let cell = (u32::from(rtt_ms) << 16) | (u32::from(lost_per_mille) << 8) | (u32::from(flows) << 1);
        let seed = (cell | u32::from(to_guest)).wrapping_mul(SEED_SPREAD).wrapping_add(repetition);
        let delay_us = u32::from(self.rtt_ms) * 500;
        let loss = f64::from(self.lost_per_mille) / 10.0;
        let way = format!("delay={delay_us}us,loss={loss}%,rate={RATE_MBIT}mbit,queue={QUEUE_MB}MB");
        let words = ["--to-b", &way, "--to-a", &way, "--seed", &seed.to_string()];
        words.map(str::to_owned).to_vec()
    }
}

/// What is to be known about link and buffers besides the scenarios' names.
pub(super) fn conditions(congestion: Option<&str>) -> String {
    let read = |name: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let congestion = congestion.map_or_else(|| read("tcp_congestion_control"), str::to_owned);
    format!(
        "Link: {RATE_MBIT} Mbit/s each way, a queue of {QUEUE_MB} MB, losses both ways, a seed for each repetition of each scenario; \
         guest, host and world: {congestion}, tcp_rmem {}, tcp_wmem {}.",
        read("tcp_rmem"),
        read("tcp_wmem"),
    )
}

/// Gives all namespaces of `site` a congestion control, which the machine allows only meanwhile.
fn set_congestion(site: &Site, name: &str) -> Result<(), BenchError> {
    // The list of those allowed belongs to the whole machine, and another run may change it as well.
    let lock = lock::exclusive(Path::new(LOCK_FILE));
    let _lock = lock.map_err(during("the lock of the congestion controls"))?;
    let mut settings = KernelSettings::default();
    settings.allow_congestion(name).map_err(during("allowing a congestion control"))?;
    for netns in [&site.lab.guest, &site.lab.host, &site.lab.world] {
        netns.sysctl("net.ipv4.tcp_congestion_control", name)?;
    }
    Ok(())
}

impl Sampler<'_> {
    /// Carries TCP over the site's link.
    pub(super) fn wan(&self, site: &mut Site, backend: &Backend, wan: Wan) -> Result<Sample, BenchError> {
        if let Some(congestion) = self.congestion {
            set_congestion(site, congestion)?;
        }
        site.ready(backend, Scenario::Wan(wan), &[])?;
        let bare = backend.kind == BackendKind::Sockets;
        let said = self.iperf3(site, bare, wan.to_guest, wan.flows, PATIENCE)?;
        let link = site.lab.end_link()?;
        let mut sample = vec![(m::GOODPUT, said.bytes * 8.0 / said.seconds / 1e6)];
        if wan.flows > 1 {
            sample.push((m::FAIRNESS, said.fairness));
        }
        let frames = link.frames.max(1) as f64;
        sample.push((m::LATE, 100.0 * link.late as f64 / frames));
        Ok(sample)
    }
}

/// Medians of the first back-end divided by those of the others, and where it falls short; empty if
/// nothing was carried over a WAN by two.
pub(super) fn ratios(report: &Report) -> String {
    let median = |scenario: &str, backend: &str| {
        report.figure(scenario, m::GOODPUT.name, backend).map(|figure| figure.summary.median)
    };
    let [first, others @ ..] = &report.backends[..] else { return String::new() };
    let rows = report.rows().into_iter().filter(|row| row.1 == m::GOODPUT.name).map(|row| row.0);
    let rows: Vec<&str> = rows.filter(|scenario| median(scenario, first).is_some()).collect();
    if rows.is_empty() || others.is_empty() {
        return String::new();
    }
    let mut out =
        format!("\nGoodput of {first} divided by that of\n\n| scenario | {} |\n", others.join(" | "));
    let _ = writeln!(out, "|---|{}", "---|".repeat(others.len()));
    for scenario in rows {
        let ours = median(scenario, first).unwrap_or_default();
        let ratio =
            |other: &String| median(scenario, other).map_or(String::new(), |theirs| short(ours / theirs));
        let cells: Vec<String> = others.iter().map(ratio).collect();
        let _ = writeln!(out, "| {scenario} | {} |", cells.join(" | "));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::report::{Results, tests::example};
    use super::*;

    const CELL: Wan = Wan { to_guest: true, rtt_ms: 1, lost_per_mille: 1, flows: 8 };

    #[test]
    fn the_links_round_trip_is_half_each_way() {
        let args = CELL.link_args(3);
        assert_eq!(args[1], "delay=500us,loss=0.1%,rate=1000mbit,queue=4MB");
        assert_eq!((&args[3], &args[4]), (&args[1], &"--seed".to_owned()));
        assert!(args[1].parse::<crate::link::Settings>().is_ok());
    }

    #[test]
    fn each_repetition_of_each_cell_has_a_seed_of_its_own() {
        let others = [
            Wan { to_guest: false, ..CELL },
            Wan { rtt_ms: 10, ..CELL },
            Wan { lost_per_mille: 10, ..CELL },
            Wan { flows: 1, ..CELL },
        ];
        let cells = others.iter().chain([&CELL]);
        let seeds: HashSet<String> =
            cells.flat_map(|cell| [1, 2].map(|repetition| cell.link_args(repetition)[5].clone())).collect();
        assert_eq!(seeds.len(), 10);
    }

    #[test]
    fn ratios_are_of_medians_and_to_the_first_backend() {
        let mut report = example();
        assert_eq!(ratios(&report), "", "nothing was carried over a WAN");
        let mut results = Results::default();
        for value in [90.0, 80.0, 10.0] {
            results.add(Scenario::Wan(CELL), "vunet", &vec![(m::GOODPUT, value)]);
        }
        results.add(Scenario::Wan(CELL), "veth <&>", &vec![(m::GOODPUT, 100.0)]);
        results.fill(&mut report);
        let text = ratios(&report);
        assert!(text.contains("| wan-to-1ms-0.1%-8 | 0.800 |\n"), "{text}");
        assert!(report.markdown().contains(&text));
    }
}
