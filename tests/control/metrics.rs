//! Metrics: what Prometheus's own checker says of them, where they are served, and that the dashboard asks for
//! metrics there are.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::backend::Backend;

/// The body of an answer.
fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("a whole answer").1
}

fn metrics(backend: &Backend) -> String {
    let answer = backend.raw("GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
    body(&answer).to_owned()
}

/// Names of the families, as their types are told.
fn families(text: &str) -> BTreeSet<String> {
    let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    names.filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn prometheus_finds_nothing_wrong() {
    let backend = Backend::start(&["--queues", "2"]);
    let text = metrics(&backend);
    // Where `integration/lib/prerequisites.sh` unpacks it, else wherever it is.
    let unpacked =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest-cache/prometheus/usr/bin/promtool");
    let tool = if unpacked.is_file() { unpacked } else { "promtool".into() };
    let check = Command::new(tool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut check) = check else {
        let line = "SKIPPED metrics::prometheus_finds_nothing_wrong: needs promtool (package prometheus)";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{line}");
        return eprintln!("{line}");
    };
    check.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.trim().is_empty(), "{said}");
}

#[test]
fn metrics_are_of_each_worker_and_have_their_units() {
    let backend = Backend::start(&["--queues", "2"]);
    let text = metrics(&backend);
    for line in [
        "vunet_front_end_attached 0",
        "vunet_frames_total{worker=\"1\",direction=\"from_guest\"} 0",
        "vunet_drops_total{worker=\"0\",reason=\"malformed\"} 0",
        "vunet_connect_duration_seconds_bucket{worker=\"1\",le=\"0.000001\"} 0",
        "vunet_connect_duration_seconds_bucket{worker=\"1\",le=\"+Inf\"} 0",
        "vunet_dns_queries_total{outcome=\"cached\"} 0",
    ] {
        assert!(text.lines().any(|other| other == line), "{line} in\n{text}");
    }
    let text = metrics(&backend);
    let woken = text.lines().find_map(|line| line.strip_prefix("vunet_wakeups_total{worker=\"0\"} "));
    assert!(woken.is_some_and(|count| count.parse::<f64>().unwrap() >= 1.0), "{woken:?}");
}

#[test]
fn address_for_metrics_serves_nothing_else() {
    let backend = Backend::start(&["--metrics", "127.0.0.1:0"]);
    let port = backend.logged("metrics address=127.0.0.1:");
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert_eq!(families(body(&ask("/metrics"))), families(&metrics(&backend)));
    for path in ["/v1/status", "/v1/stop", "/"] {
        assert!(ask(path).starts_with("HTTP/1.1 404"), "{path}");
    }
}

#[test]
fn dashboard_asks_for_metrics_there_are() {
    let backend = Backend::start(&[]);
    let known = families(&metrics(&backend));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/grafana/vunet.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    let mut asked = BTreeSet::new();
    for target in targets {
        let query = target["expr"].as_str().unwrap();
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        asked.extend(words.filter(|word| word.starts_with("vunet_")).map(str::to_owned));
    }
    assert!(asked.len() >= 10, "{asked:?}");
    for name in asked {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        // Of virtqueues there are none without a guest.
        let is_known = known.contains(&name) || family.is_some_and(|family| known.contains(family));
        assert!(is_known || name.starts_with("vunet_virtqueue_"), "the dashboard asks for {name}");
    }
}
