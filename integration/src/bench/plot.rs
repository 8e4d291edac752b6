//! Results as bars in SVG, one picture for each kind of figure.

use std::fmt::Write as _;

use super::report::{Report, short};
use super::stats::Summary;

/// Okabe and Ito's palette, which people of any colour vision can tell apart.
const COLOURS: [&str; 6] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
const LEFT: f64 = 160.0;
const WIDTH: f64 = 720.0;
const BAR: f64 = 13.0;
const GAP: f64 = 10.0;
/// Where the legend begins.
const LEGEND_TOP: f64 = 34.0;
const LEGEND_ROW: f64 = 18.0;
const LEGEND_COLUMN: f64 = 150.0;
/// Names in a row of the legend.
const LEGEND_COLUMNS: usize = 4;
/// Room for the figures at the bars' ends.
const RIGHT: f64 = 120.0;

/// A picture: its name, its title, which scenarios it shows and the metric.
type Plot = (&'static str, &'static str, fn(&str) -> bool, &'static str);

fn any(_: &str) -> bool {
    true
}

fn tcp(scenario: &str) -> bool {
    scenario.starts_with("tcp-")
}

fn udp(scenario: &str) -> bool {
    scenario.starts_with("udp-")
}

/// Datagrams sent many at a time are so many more that they would dwarf the others.
fn udp_runs(scenario: &str) -> bool {
    udp(scenario) && scenario.ends_with("-runs")
}

fn udp_singly(scenario: &str) -> bool {
    udp(scenario) && !udp_runs(scenario)
}

fn udp_to(scenario: &str) -> bool {
    scenario.starts_with("udp-to-")
}

fn idle(scenario: &str) -> bool {
    scenario == "idle"
}

const PLOTS: [Plot; 13] = [
    ("tcp-rate", "TCP, Gbit/s", tcp, "rate"),
    ("tcp-cpu", "TCP, CPU seconds of the back-end per GB", tcp, "backend CPU per GB"),
    ("udp-packets", "UDP, thousand packets/s", udp_singly, "packets"),
    ("udp-runs", "UDP of a server that sends many datagrams a call, thousand packets/s", udp_runs, "packets"),
    ("udp-cpu", "UDP, CPU seconds of the back-end per million packets", udp, "backend CPU per million"),
    ("udp-loss", "UDP to the guest at 70 % of the most that arrived, % lost", udp_to, "loss"),
    ("latency-p50", "One byte there and back, p50 in microseconds", any, "p50"),
    ("latency-p99", "One byte there and back, p99 in microseconds", any, "p99"),
    (
        "connect",
        "Connect, request, response, close: thousand/s",
        |scenario| scenario.starts_with("connect-"),
        "exchanges",
    ),
    ("wakes", "Wake-ups a second while nothing gets ahead", any, "wake-ups"),
    ("busy", "CPU time while nothing gets ahead, % of a core", any, "backend CPU"),
    ("memory", "Resident memory without the guest's, MiB", idle, "resident"),
    ("lease", "Process start to DHCP lease, ms", any, "start to lease"),
];

/// Every picture there are figures for: name and SVG.
pub(super) fn all(report: &Report) -> Vec<(&'static str, String)> {
    let picture = |&(name, title, shows, metric): &Plot| {
        let rows = report.rows().into_iter();
        let scenarios: Vec<&str> =
            rows.filter(|row| shows(row.0) && row.1 == metric).map(|row| row.0).collect();
        (!scenarios.is_empty()).then(|| (name, bars(report, title, &scenarios, metric)))
    };
    PLOTS.iter().filter_map(picture).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn bars(report: &Report, title: &str, scenarios: &[&str], metric: &str) -> String {
    let of = |scenario: &str, backend: &str| report.figure(scenario, metric, backend);
    let shown = |backend: &&String| scenarios.iter().any(|scenario| of(scenario, backend).is_some());
    // A back-end keeps its colour in every picture, whether the others are shown or not.
    let backends: Vec<(&String, &str)> =
        report.backends.iter().zip(COLOURS.into_iter().cycle()).filter(|(name, _)| shown(name)).collect();
    let figures = scenarios.iter().flat_map(|scenario| backends.iter().map(|(name, _)| of(scenario, name)));
    let (mut most, mut bars) = (f64::MIN_POSITIVE, 0usize);
    for figure in figures.flatten() {
        (most, bars) = (most.max(figure.summary.max), bars + 1);
    }
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let top = LEGEND_TOP + LEGEND_ROW * backends.len().div_ceil(LEGEND_COLUMNS) as f64 + GAP;
    let height = top + bars as f64 * BAR + scenarios.len() as f64 * GAP;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
<text x="8" y="20" font-size="14">{}</text>
"#,
        escape(title)
    );
    legend(&mut out, &backends);
    let mut y = top;
    for scenario in scenarios {
        let _ = writeln!(out, r#"<text x="8" y="{:.1}">{scenario}</text>"#, y + BAR * 0.8);
        for (backend, colour) in &backends {
            if let Some(figure) = of(scenario, backend) {
                bar(&mut out, &figure.summary, scale, y, colour);
                y += BAR;
            }
        }
        y += GAP;
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String, backends: &[(&String, &str)]) {
    for (at, (name, colour)) in backends.iter().enumerate() {
        let (column, row) = ((at % LEGEND_COLUMNS) as f64, (at / LEGEND_COLUMNS) as f64);
        let (x, y) = (8.0 + column * LEGEND_COLUMN, LEGEND_TOP + row * LEGEND_ROW);
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            r#"<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/><text x="{}" y="{}">{}</text>"#,
            x + 14.0,
            y + 9.0,
            escape(name)
        );
    }
}

/// The median as a bar, the spread as a line over it.
fn bar(out: &mut String, summary: &Summary, scale: f64, y: f64, colour: &str) {
    let (min, max) = (LEFT + summary.min * scale, LEFT + summary.max * scale);
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        r#"<rect x="{LEFT}" y="{y:.1}" width="{:.1}" height="{}" fill="{colour}"/><path d="M{min:.1} {mid:.1}H{max:.1}" stroke="black"/><text x="{:.1}" y="{:.1}">{}</text>"#,
        (summary.median * scale).max(0.5),
        BAR - 2.0,
        max + 4.0,
        y + BAR - 4.0,
        short(summary.median),
        mid = y + (BAR - 2.0) / 2.0,
    );
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::example;
    use super::*;

    #[test]
    fn there_is_a_picture_for_each_kind_of_figure_measured() {
        let pictures = all(&example());
        let names: Vec<&str> = pictures.iter().map(|picture| picture.0).collect();
        assert_eq!(names, ["tcp-rate", "latency-p50"]);
        assert!(!pictures[1].1.contains("veth"), "the legend names only what is shown");
        let svg = &pictures[0].1;
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains("veth &lt;&amp;&gt;"), "names are escaped: {svg}");
        assert_eq!(svg.matches("<path").count(), 2, "one spread for each back-end: {svg}");
    }
}
