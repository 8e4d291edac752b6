//! The benchmark: one run, one guest, any back-ends side by side.
//!
//! Repetitions are interleaved: the first of every scenario behind every back-end, then the second,
//! so that a machine that gets slower is not taken for a back-end that is. Every sample has
//! namespaces, a back-end and a guest of its own. `docs/benchmarks.md` says what is measured and how;
//! results are written as JSON, a Markdown table and plots.

mod cpu;
mod dhcp;
mod load;
mod measure;
mod names;
mod network;
mod plot;
mod procfs;
mod quiet;
mod report;
mod scenario;
pub mod server;
mod site;
mod stats;
pub mod tap_loop;
mod through;
mod udp;
mod wan;

use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use cpu::RunCpu;
use measure::Sampler;
use procfs::{KernelSettings, Machine, load_average};
use report::{Report, Results};
use scenario::Scenario;
pub use site::{Backend, BackendKind, BenchError};

use crate::sys::process::allow_open_files;

/// Open files every process may have: enough for the most flows of any scenario with three files each,
/// whatever the machine's default is.
const OPEN_FILES: u64 = 40_000;

/// What to measure, and how.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// Seconds of load of each sample.
    pub seconds: f64,
    /// Samples of each scenario behind each back-end.
    pub repetitions: u32,
    /// Names of scenarios, or beginnings of them; all if empty.
    pub only: Vec<String>,
    /// Back-ends besides vunet.
    pub peers: Vec<Backend>,
    /// Leave vunet out.
    pub without_vunet: bool,
    /// Measure vunet with the guest on a TAP too.
    pub tap: bool,
    /// Measure ways through a host too: bridge mode and the packet NAT, routed and on a bridge, and the kernel's masquerade.
    pub through_host: bool,
    /// Measure the bounds too.
    pub bounds: bool,
    /// Directory the results are written to.
    pub out: PathBuf,
    /// Beginning of the results' file names.
    pub label: String,
    /// The machine's `rmem_max` and `wmem_max` in bytes while it runs.
    pub socket_limits: Option<u32>,
    /// Further arguments of every front-end.
    pub guest_args: Vec<String>,
    /// Congestion control of guest, host and world; the machine's if `None`.
    pub congestion: Option<String>,
    /// Path of the `vunet-integration` binary.
    pub integration: PathBuf,
    /// The command line, for the report.
    pub command: String,
}

/// Runs the benchmark and writes its results.
///
/// # Errors
/// [`BenchError`] if it cannot start or write. A sample that fails is reported and does not end it.
pub fn run(config: &BenchConfig) -> Result<(), BenchError> {
    let scenarios = Scenario::select(&config.only).map_err(BenchError::Config)?;
    if config.repetitions == 0 || !(0.1..=600.0).contains(&config.seconds) {
        return Err(BenchError::Config("one repetition or more, of 0.1 to 600 seconds".into()));
    }
    let mut tools = vec!["ip", "sysctl", "dnsmasq", "udhcpc", "iperf3"];
    if config.through_host || scenarios.iter().any(Scenario::is_on_a_network) {
        tools.push("nft");
    }
    if let Some(reason) = crate::lab::missing(&tools) {
        return Err(BenchError::Config(reason));
    }
    let backends = backends(config, &scenarios);
    let files = allow_open_files(OPEN_FILES).map_err(site::during("setting the limit on open files"))?;
    if files < OPEN_FILES {
        eprintln!("processes may have {files} files open instead of {OPEN_FILES}");
    }
    let mut settings = KernelSettings::default();
    if let Some(bytes) = config.socket_limits {
        settings.limit_sockets(bytes).map_err(site::during("setting rmem_max and wmem_max"))?;
    }
    let front_end_args = front_end_args(config);
    let cpu = RunCpu::begin();
    let mut report = empty_report(config, &backends, &front_end_args);
    report.cpu_of = cpu.what().into();
    if scenarios.iter().any(|scenario| matches!(scenario, Scenario::Wan(_))) {
        report.wan = Some(wan::conditions(config.congestion.as_deref()));
    }
    let mut results = Results::default();
    let sampler = Sampler {
        integration: &config.integration,
        cpu: &cpu,
        seconds: config.seconds,
        front_end_args: &front_end_args,
        congestion: config.congestion.as_deref(),
    };
    let started = Instant::now();
    for repetition in 1..=config.repetitions {
        for &scenario in &scenarios {
            for backend in &backends {
                sample(&sampler, backend, scenario, repetition, &mut results);
            }
        }
        // What there is so far is written, so that a run that is cut short is not lost.
        report.load_average_after = load_average();
        results.fill(&mut report);
        report.write(&config.out, &config.label).map_err(site::during("writing the results"))?;
    }
    eprintln!("{:.0} s; results in {}", started.elapsed().as_secs_f64(), config.out.display());
    Ok(())
}

/// What is measured, without those that take part in none of `scenarios`.
fn backends(config: &BenchConfig, scenarios: &[Scenario]) -> Vec<Backend> {
    let mut backends = vec![];
    if !config.without_vunet {
        backends.extend([Backend::vunet(), Backend::vunet_on_network()]);
    }
    if config.tap {
        backends.push(Backend::vunet_on_tap());
        backends.push(Backend::vunet_translated());
    }
    if config.through_host {
        backends.extend(Backend::through_host());
    }
    backends.extend(config.peers.iter().cloned());
    if config.bounds {
        backends.extend(Backend::bounds());
    }
    backends.retain(|backend| scenarios.iter().any(|&scenario| backend.takes_part(scenario)));
    backends
}

fn empty_report(config: &BenchConfig, backends: &[Backend], front_end_args: &[String]) -> Report {
    Report {
        machine: Machine::here(),
        commit: report::commit(),
        command: config.command.clone(),
        started_unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()),
        cpu_of: String::new(),
        load_average_before: load_average(),
        load_average_after: String::new(),
        seconds: config.seconds,
        repetitions: config.repetitions,
        backends: backends.iter().map(|backend| backend.name.clone()).collect(),
        backend_commands: backends.iter().map(Backend::command).collect(),
        front_end_args: front_end_args.iter().map(|word| names::in_command(word)).collect(),
        wan: None,
        figures: Vec::new(),
        failures: Vec::new(),
    }
}

/// Arguments of every front-end: the benchmark's own, then those of the user, which override.
fn front_end_args(config: &BenchConfig) -> Vec<String> {
    let own = site::FRONT_END_ARGS.map(str::to_owned).into_iter();
    own.chain(config.guest_args.iter().cloned()).collect()
}

fn sample(
    sampler: &Sampler<'_>,
    backend: &Backend,
    scenario: Scenario,
    repetition: u32,
    results: &mut Results,
) {
    match sampler.sample(backend, scenario, repetition) {
        Ok(sample) => {
            let figure = |(metric, value): &(scenario::Metric, f64)| {
                format!("{} {} {}", metric.name, report::short(*value), metric.unit)
            };
            let line: Vec<String> = sample.iter().map(figure).collect();
            eprintln!("{repetition} {scenario} {}: {}", backend.name, line.join(", "));
            results.add(scenario, &backend.name, &sample);
        }
        Err(BenchError::NotApplicable) => {}
        Err(e) => {
            eprintln!("{repetition} {scenario} {}: FAILED: {e}", backend.name);
            results.failed(scenario, &backend.name, repetition, &e.to_string());
        }
    }
}

/// The command line as a shell would take it, with files' names only.
pub fn command_line(args: impl Iterator<Item = String>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,+%@".contains(c);
    let quote = |word: String| {
        let word = names::in_command(&word);
        if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{word}'") }
    };
    let words = std::iter::once("vunet-integration".to_owned()).chain(args.skip(1).map(quote));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_quoted_where_a_shell_needs_it() {
        let args = ["/x/y/vunet-integration", "bench", "--peer", "a=/z/b {socket}", "--out", "/o/p"];
        let line = command_line(args.map(str::to_owned).into_iter());
        assert_eq!(line, "vunet-integration bench --peer 'a=b {socket}' --out p");
    }
}
