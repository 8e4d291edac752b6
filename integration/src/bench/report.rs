//! Results as JSON and as a Markdown table.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use super::measure::Sample;
use super::names;
use super::plot;
use super::procfs::Machine;
use super::scenario::{Metric, Scenario};
use super::stats::Summary;

/// Longest text of a failure that is kept, in characters.
const FAILURE_CHARS: usize = 300;

/// One figure of one scenario behind one back-end.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    pub(super) scenario: String,
    pub(super) backend: String,
    pub(super) metric: String,
    pub(super) unit: String,
    #[serde(flatten)]
    pub(super) summary: Summary,
}

/// A sample that could not be taken.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Failure {
    scenario: String,
    backend: String,
    repetition: u32,
    why: String,
}

/// A run and everything that is to be known about it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) commit: String,
    pub(super) command: String,
    pub(super) started_unix_seconds: u64,
    /// Whose time "machine CPU" is.
    pub(super) cpu_of: String,
    pub(super) load_average_before: String,
    pub(super) load_average_after: String,
    pub(super) seconds: f64,
    pub(super) repetitions: u32,
    pub(super) backends: Vec<String>,
    /// Their commands in the same order; a bound has none.
    pub(super) backend_commands: Vec<Option<String>>,
    pub(super) front_end_args: Vec<String>,
    /// The link and the buffers of the scenarios over a WAN, if there were any.
    pub(super) wan: Option<String>,
    pub(super) figures: Vec<Figure>,
    pub(super) failures: Vec<Failure>,
}

/// Samples as they come.
#[derive(Debug, Default)]
pub(super) struct Results {
    values: Vec<((String, String, Metric), Vec<f64>)>,
    failures: Vec<Failure>,
}

impl Results {
    /// Adds one sample.
    pub(super) fn add(&mut self, scenario: Scenario, backend: &str, sample: &Sample) {
        for &(metric, value) in sample {
            let key = (scenario.to_string(), backend.to_owned(), metric);
            match self.values.iter_mut().find(|(known, _)| *known == key) {
                Some((_, values)) => values.push(value),
                None => self.values.push((key, vec![value])),
            }
        }
    }

    /// Notes a failure.
    pub(super) fn failed(&mut self, scenario: Scenario, backend: &str, repetition: u32, why: &str) {
        let why = names::in_message(why).chars().take(FAILURE_CHARS).collect();
        let (scenario, backend) = (scenario.to_string(), backend.to_owned());
        self.failures.push(Failure { scenario, backend, repetition, why });
    }

    /// Puts what there is into `report`.
    pub(super) fn fill(&self, report: &mut Report) {
        let figure = |((scenario, backend, metric), values): &((String, String, Metric), Vec<f64>)| {
            Some(Figure {
                scenario: scenario.clone(),
                backend: backend.clone(),
                metric: metric.name.to_owned(),
                unit: metric.unit.to_owned(),
                summary: Summary::of(values)?,
            })
        };
        report.figures = self.values.iter().filter_map(figure).collect();
        report.failures.clone_from(&self.failures);
    }
}

/// The commit this workspace is at, with a `+` if files differ from it.
pub(super) fn commit() -> String {
    let git = |args: &[&str]| {
        let output =
            Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", "../src", "src"]);
    let plus = if changed.is_some_and(|files| !files.is_empty()) { "+" } else { "" };
    format!("{commit}{plus}")
}

/// A figure with three significant digits, as far as they are before the point or needed behind it.
pub(super) fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

impl Report {
    /// The figure, if it was measured.
    pub(super) fn figure(&self, scenario: &str, metric: &str, backend: &str) -> Option<&Figure> {
        self.figures.iter().find(|f| f.scenario == scenario && f.metric == metric && f.backend == backend)
    }

    /// Scenarios and metrics in the order of the scenarios.
    pub(super) fn rows(&self) -> Vec<(&str, &str, &str)> {
        let mut rows: Vec<(&str, &str, &str)> = Vec::new();
        for scenario in Scenario::every() {
            let name = scenario.to_string();
            for figure in self.figures.iter().filter(|figure| figure.scenario == name) {
                let row = (figure.scenario.as_str(), figure.metric.as_str(), figure.unit.as_str());
                if !rows.contains(&row) {
                    rows.push(row);
                }
            }
        }
        rows
    }

    /// The table, medians with the smallest and the largest value.
    pub(super) fn markdown(&self) -> String {
        let mut out = String::new();
        let mut line = |text: &str| {
            out.push_str(text);
            out.push('\n');
        };
        line(&format!("Machine: {}.", self.machine.line()));
        line(&format!(
            "Commit {}, medians of {} runs of {} s (smallest to largest), load average before {} and after {}.",
            self.commit, self.repetitions, self.seconds, self.load_average_before, self.load_average_after,
        ));
        line(&format!("\n```sh\n{}\n```\n", self.command));
        line(&format!(
            "Front-ends: `{}`. \"Machine CPU\" is {}.\n",
            self.front_end_args.join(" "),
            self.cpu_of
        ));
        if let Some(wan) = &self.wan {
            line(&format!("{wan}\n"));
        }
        line(&format!("| scenario | figure | {} |", self.backends.join(" | ")));
        line(&format!("|---|---|{}", "---|".repeat(self.backends.len())));
        let mut last = "";
        for (scenario, metric, unit) in self.rows() {
            let cells = self.backends.iter().map(|backend| match self.figure(scenario, metric, backend) {
                None => String::new(),
                Some(Figure { summary: Summary { median, min, max, .. }, .. }) if min == max => {
                    short(*median)
                }
                Some(Figure { summary: Summary { median, min, max, .. }, .. }) => {
                    format!("{} ({} to {})", short(*median), short(*min), short(*max))
                }
            });
            let cells: Vec<String> = cells.collect();
            let shown = if scenario == last { "" } else { scenario };
            let better = match Metric::named(metric) {
                Some(Metric { more_is_better: true, .. }) => "↑",
                _ => "↓",
            };
            let unit = if unit.is_empty() { String::new() } else { format!(", {unit}") };
            line(&format!("| {shown} | {metric}{unit} {better} | {} |", cells.join(" | ")));
            last = scenario;
        }
        out.push_str(&super::wan::ratios(self));
        for failure in &self.failures {
            let why = failure.why.lines().next().unwrap_or_default();
            let _ = write!(
                out,
                "\nFailed: {} behind {}, run {}: {why}\n",
                failure.scenario, failure.backend, failure.repetition
            );
        }
        out
    }

    /// Writes `LABEL.json`, `LABEL.md` and the plots into `dir`.
    pub(super) fn write(&self, dir: &Path, label: &str) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        let json = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        fs::write(dir.join(format!("{label}.json")), json + "\n")?;
        fs::write(dir.join(format!("{label}.md")), self.markdown())?;
        for (name, svg) in plot::all(self) {
            fs::write(dir.join(format!("{label}-{name}.svg")), svg)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::scenario::{P50, RATE};
    use super::*;

    pub(in super::super) fn example() -> Report {
        let mut results = Results::default();
        let tcp = Scenario::Tcp { to_guest: false, ip_mtu: 1500, flows: 1, pairs: 1 };
        for value in [1.0, 3.0, 2.5] {
            results.add(tcp, "vunet", &vec![(RATE, value)]);
        }
        results.add(tcp, "veth <&>", &vec![(RATE, 31.25)]);
        results.add(Scenario::Latency(super::super::scenario::Exchange::Tcp), "vunet", &vec![(P50, 40.0)]);
        results.failed(tcp, "vunet", 3, "no /a/b/socket\nreason");
        let mut report = Report {
            machine: Machine::here(),
            commit: "abc".into(),
            command: "vunet-integration bench".into(),
            started_unix_seconds: 0,
            cpu_of: "all the machine did".into(),
            load_average_before: "0 0 0".into(),
            load_average_after: "1 1 1".into(),
            seconds: 1.0,
            repetitions: 3,
            backends: vec!["vunet".into(), "veth <&>".into()],
            backend_commands: vec![Some("vunet --socket-path {socket}".into()), None],
            front_end_args: vec!["--tx-cuts".into(), "65562".into()],
            wan: None,
            figures: Vec::new(),
            failures: Vec::new(),
        };
        results.fill(&mut report);
        report
    }

    #[test]
    fn the_table_has_medians_with_their_spread_and_empty_cells() {
        let text = example().markdown();
        assert!(
            text.contains("| tcp-from-1500-1 | rate, Gbit/s ↑ | 2.50 (1.00 to 3.00) | 31.2 |\n"),
            "{text}"
        );
        assert!(text.contains("| tcp-rr | p50, us ↓ | 40.0 |  |\n"), "{text}");
        assert!(text.contains("Failed: tcp-from-1500-1 behind vunet, run 3: no socket\n"), "{text}");
    }

    #[test]
    fn the_json_holds_every_value() {
        let json = serde_json::to_value(example()).unwrap();
        assert_eq!(json["figures"][0]["values"], serde_json::json!([1.0, 3.0, 2.5]));
        assert_eq!(json["figures"][0]["median"], 2.5);
        assert_eq!(json["failures"][0]["repetition"], 3);
        assert_eq!(json["backend_commands"], serde_json::json!(["vunet --socket-path {socket}", null]));
        assert_eq!(json["front_end_args"], serde_json::json!(["--tx-cuts", "65562"]));
    }

    #[test]
    fn figures_are_short() {
        let all = [1234.5, 12.345, 1.2345, 0.12345, 0.0].map(short);
        assert_eq!(all, ["1234", "12.3", "1.23", "0.123", "0.00"]);
    }
}
