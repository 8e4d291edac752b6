//! What was found, for people and for programs.

use std::fmt::Write as _;

use serde::Serialize;

use super::check::{Check, State};
use super::way::Way;

/// One way to run, and what it needs.
#[derive(Clone, Debug)]
pub struct WayReport {
    /// Which.
    pub way: Way,
    /// Each thing that was looked at.
    pub checks: Vec<Check>,
}

impl WayReport {
    /// Whether nothing it needs is missing.
    pub fn is_ready(&self) -> bool {
        self.count(State::Missing) == 0
    }

    fn count(&self, state: State) -> usize {
        self.checks.iter().filter(|check| check.state == state).count()
    }

    /// Ready or not, in words.
    fn verdict(&self) -> String {
        let missing: Vec<&str> = self
            .checks
            .iter()
            .filter(|check| check.state == State::Missing)
            .map(|check| check.name)
            .collect();
        match (missing.is_empty(), self.count(State::Warn)) {
            (false, _) => format!("missing {}", missing.join(", ")),
            (true, 0) => "ready".to_owned(),
            (true, 1) => "ready, with 1 warning".to_owned(),
            (true, warnings) => format!("ready, with {warnings} warnings"),
        }
    }
}

/// All that was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was asked about.
    pub asked: WayReport,
    /// The other ways to run, where none was named.
    pub others: Vec<WayReport>,
    /// Whether root asked.
    pub is_root: bool,
}

#[derive(Serialize)]
struct ReportJson<'a> {
    version: &'static str,
    asked: &'static str,
    ready: bool,
    modes: Vec<WayJson<'a>>,
}

#[derive(Serialize)]
struct WayJson<'a> {
    mode: &'static str,
    title: &'static str,
    ready: bool,
    checks: Vec<CheckJson<'a>>,
}

#[derive(Serialize)]
struct CheckJson<'a> {
    name: &'static str,
    state: State,
    says: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix_is_command: Option<bool>,
}

impl Report {
    /// Whether the run that was asked about can start.
    pub fn is_ready(&self) -> bool {
        self.asked.is_ready()
    }

    fn ways(&self) -> impl Iterator<Item = &WayReport> {
        std::iter::once(&self.asked).chain(&self.others)
    }

    /// For people: each way with its verdict; all that was asked about, of the others what is not as it should be.
    pub fn text(&self) -> String {
        let named = self.ways().flat_map(|way| &way.checks).map(|check| check.name.chars().count());
        let width = named.max().unwrap_or_default();
        let mut text = String::new();
        for (n, way) in self.ways().enumerate() {
            let _ = writeln!(text, "{}: {}", way.way.title(), way.verdict());
            for check in way.checks.iter().filter(|check| n == 0 || check.state != State::Ok) {
                let (state, name, says) = (check.state.word(), check.name, &check.says);
                let _ = writeln!(text, "  {state:<8} {name:<width$}  {says}");
                if let Some(fix) = &check.fix {
                    let _ = writeln!(text, "  {:<8} {:<width$}  fix: {}", "", "", fix.line(self.is_root));
                }
            }
        }
        text
    }

    /// For programs: one JSON object, with a line's end.
    pub fn json(&self) -> String {
        let modes = self.ways().map(|way| WayJson {
            mode: way.way.id(),
            title: way.way.title(),
            ready: way.is_ready(),
            checks: way.checks.iter().map(|check| self.check_json(check)).collect(),
        });
        let report = ReportJson {
            version: env!("CARGO_PKG_VERSION"),
            asked: self.asked.way.id(),
            ready: self.is_ready(),
            modes: modes.collect(),
        };
        serde_json::to_string_pretty(&report).expect("strings and booleans are JSON") + "\n"
    }

    fn check_json<'a>(&self, check: &'a Check) -> CheckJson<'a> {
        CheckJson {
            name: check.name,
            state: check.state,
            says: &check.says,
            fix: check.fix.as_ref().map(|fix| fix.line(self.is_root)),
            fix_is_command: check.fix.as_ref().map(super::check::Fix::is_command),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Fix;
    use super::*;

    fn report() -> Report {
        let asked = vec![
            Check::ok("kernel", "Linux 6.12"),
            Check::warn("ping", "refused", Fix::sysctl(&["net.ipv4.ping_group_range='0 1'"])),
        ];
        let other =
            vec![Check::ok("kernel", "Linux 6.12"), Check::missing("nft", "none", Fix::advice("install it"))];
        Report {
            asked: WayReport { way: Way::Sockets, checks: asked },
            others: vec![WayReport { way: Way::Network, checks: other }],
            is_root: false,
        }
    }

    #[test]
    fn people_see_all_of_what_they_asked_for_and_what_is_wrong_with_the_rest() {
        let text = report().text();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with(": ready, with 1 warning"), "{text}");
        assert_eq!(lines[1], "  ok       kernel  Linux 6.12");
        assert_eq!(lines[2], "  warn     ping    refused");
        assert_eq!(lines[3], "                   fix: sudo sysctl -w net.ipv4.ping_group_range='0 1'");
        assert!(lines[4].ends_with(": missing nft"), "{text}");
        assert_eq!(&lines[5..], ["  missing  nft     none", "                   fix: install it"]);
    }

    #[test]
    fn programs_see_the_same() {
        let report = report();
        let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
        assert_eq!((&json["asked"], &json["ready"]), (&"nat".into(), &true.into()));
        assert_eq!(json["modes"][1]["ready"], false);
        let check = &json["modes"][1]["checks"][1];
        let expected = serde_json::json!({
            "name": "nft", "state": "missing", "says": "none", "fix": "install it", "fix_is_command": false
        });
        assert_eq!(*check, expected);
        assert!(report.is_ready(), "what was not asked for does not count");
    }
}
