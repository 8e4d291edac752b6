//! Results as bars in SVG, one picture for each kind of figure.

use std::fmt::Write as _;

use super::report::{Report, short};

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

/// A picture: its name, its title, the scenarios' beginning and the metric.
const PLOTS: [(&str, &str, &str, &str); 12] = [
    ("tcp-rate", "TCP, Gbit/s", "tcp-", "rate"),
    ("tcp-cpu", "TCP, CPU seconds of the back-end per GB", "tcp-", "backend CPU per GB"),
    ("udp-packets", "UDP, thousand packets/s", "udp-", "packets"),
    ("udp-loss", "UDP to the guest at 70 % of the most that arrived, % lost", "udp-to", "loss"),
    ("udp-cpu", "UDP, CPU seconds of the back-end per million packets", "udp-", "backend CPU per million"),
    ("latency-p50", "One byte there and back, p50 in microseconds", "", "p50"),
    ("latency-p99", "One byte there and back, p99 in microseconds", "", "p99"),
    ("connect", "Connect, request, response, close: thousand/s", "connect-", "exchanges"),
    ("wakes", "Wake-ups a second while nothing gets ahead", "", "wake-ups"),
    ("busy", "CPU time while nothing gets ahead, % of a core", "", "backend CPU"),
    ("memory", "Resident memory without the guest's, MiB", "idle", "resident"),
    ("lease", "Process start to DHCP lease, ms", "lease", "start to lease"),
];

/// Every picture there are figures for: name and SVG.
pub(super) fn all(report: &Report) -> Vec<(&'static str, String)> {
    let picture = |&(name, title, beginning, metric): &(&'static str, &str, &str, &str)| {
        let rows = report.rows().into_iter();
        let scenarios: Vec<&str> =
            rows.filter(|row| row.0.starts_with(beginning) && row.1 == metric).map(|row| row.0).collect();
        (!scenarios.is_empty()).then(|| (name, bars(report, title, &scenarios, metric)))
    };
    PLOTS.iter().filter_map(picture).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn bars(report: &Report, title: &str, scenarios: &[&str], metric: &str) -> String {
    let backends = &report.backends;
    let group = backends.len() as f64 * BAR + GAP;
    let top = LEGEND_TOP + LEGEND_ROW * backends.len().div_ceil(LEGEND_COLUMNS) as f64 + GAP;
    let height = top + group * scenarios.len() as f64;
    let figures = report.figures.iter().filter(|f| f.metric == metric && scenarios.contains(&&*f.scenario));
    let most = figures.map(|figure| figure.summary.max).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) / most;
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
    for (at, name) in backends.iter().enumerate() {
        let (column, row) = ((at % LEGEND_COLUMNS) as f64, (at / LEGEND_COLUMNS) as f64);
        let (x, y) = (8.0 + column * LEGEND_COLUMN, LEGEND_TOP + row * LEGEND_ROW);
        let colour = COLOURS[at % COLOURS.len()];
        let _ = writeln!(
            out,
            r#"<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/><text x="{}" y="{}">{}</text>"#,
            x + 14.0,
            y + 9.0,
            escape(name)
        );
    }
    for (row, scenario) in scenarios.iter().enumerate() {
        let y = top + row as f64 * group;
        let _ = writeln!(out, r#"<text x="8" y="{}">{scenario}</text>"#, y + BAR * 0.8);
        for (at, backend) in backends.iter().enumerate() {
            let Some(figure) = report.figure(scenario, metric, backend) else { continue };
            let s = &figure.summary;
            let (y, colour) = (y + at as f64 * BAR, COLOURS[at % COLOURS.len()]);
            let (min, max) = (LEFT + s.min * scale, LEFT + s.max * scale);
            let _ = writeln!(
                out,
                r#"<rect x="{LEFT}" y="{y:.1}" width="{:.1}" height="{}" fill="{colour}"/><path d="M{min:.1} {mid:.1}H{max:.1}" stroke="black"/><text x="{:.1}" y="{:.1}">{}</text>"#,
                (s.median * scale).max(0.5),
                BAR - 2.0,
                max + 4.0,
                y + BAR - 4.0,
                short(s.median),
                mid = y + (BAR - 2.0) / 2.0,
            );
        }
    }
    out.push_str("</svg>\n");
    out
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
        let svg = &pictures[0].1;
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains("veth &lt;&amp;&gt;"), "names are escaped: {svg}");
        assert_eq!(svg.matches("<path").count(), 2, "one spread for each back-end: {svg}");
    }
}
