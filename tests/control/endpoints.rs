//! Every operation of the description, asked over the real socket.

use std::collections::BTreeSet;

use crate::backend::Backend;
use crate::resources::check;

/// Operations of `docs/openapi.json`, a request of each, and the status it has without a guest. Those that end the
/// process, and those whose answer is no JSON, are asked on their own below.
const ASKED: &[(&str, &str, &str, Option<&str>, u16)] = &[
    ("GET", "/v1/status", "/v1/status", None, 200),
    ("GET", "/v1/counters", "/v1/counters", None, 200),
    ("GET", "/v1/flows", "/v1/flows?limit=1", None, 200),
    ("DELETE", "/v1/flows/{id}", "/v1/flows/0-1", None, 404),
    ("GET", "/v1/leases", "/v1/leases", None, 200),
    ("GET", "/v1/dns", "/v1/dns", None, 200),
    ("GET", "/v1/ports", "/v1/ports", None, 200),
    ("POST", "/v1/ports", "/v1/ports", Some("{\"publish\":\"127.0.0.1:0:80\"}"), 201),
    ("DELETE", "/v1/ports/{id}", "/v1/ports/1", None, 200),
    ("GET", "/v1/limits", "/v1/limits", None, 200),
    ("PUT", "/v1/limits", "/v1/limits", Some("{\"to_guest\":\"rate=1gbit\"}"), 200),
    ("GET", "/v1/capture", "/v1/capture", None, 200),
    ("POST", "/v1/capture", "/v1/capture", Some("{\"path\":\"relative\"}"), 400),
    ("DELETE", "/v1/capture", "/v1/capture", None, 404),
    ("GET", "/v1/capture/stream", "/v1/capture/stream?snaplen=1", None, 400),
    ("GET", "/v1/log-level", "/v1/log-level", None, 200),
    ("PUT", "/v1/log-level", "/v1/log-level", Some("{\"level\":\"info\"}"), 200),
    ("POST", "/v1/drain", "/v1/drain", Some("{\"timeout_seconds\":1}"), 202),
    ("POST", "/v1/stop", "/v1/stop", None, 202),
];

/// Operations whose answer is text, and what it begins with.
const TEXT: &[(&str, &str, &str)] =
    &[("GET", "/metrics", "# HELP vunet_"), ("GET", "/v1/events", "event: listening\n")];

/// Operations that end the process.
const LAST: [&str; 2] = ["/v1/drain", "/v1/stop"];

fn described() -> BTreeSet<(String, String)> {
    let description = serde_json::to_value(vunet::control::api::description()).unwrap();
    let paths = description["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().expect("methods").keys();
        methods.map(move |method| (method.to_uppercase(), path.clone()))
    });
    operations.collect()
}

#[test]
fn every_operation_there_is_has_its_request_here() {
    let asked = ASKED.iter().map(|(method, path, ..)| (*method, *path));
    let text = TEXT.iter().map(|(method, path, _)| (*method, *path));
    let here: BTreeSet<_> =
        asked.chain(text).map(|(method, path)| (method.to_owned(), path.to_owned())).collect();
    let there = described();
    let missing: Vec<_> = there.difference(&here).collect();
    let gone: Vec<_> = here.difference(&there).collect();
    assert!(missing.is_empty() && gone.is_empty(), "not asked here: {missing:?}; not there: {gone:?}");
}

#[test]
fn every_operation_answers_as_it_is_described() {
    let backend = Backend::start(&[]);
    for (method, path, resource, body, status) in ASKED {
        if LAST.contains(path) {
            continue;
        }
        let answer = backend.ask(method, resource, *body);
        assert_eq!(answer.status, *status, "{method} {resource}: {}", answer.body);
        check(method, path, &answer);
    }
    for (method, path, begins) in TEXT {
        let request = format!("{method} {path} HTTP/1.0\r\nHost: a\r\n\r\n");
        let answer = backend.begin_of(&request, begins);
        assert!(answer.starts_with("HTTP/1.0 200"), "{method} {path}: {answer}");
    }
    for path in LAST {
        let mut backend = Backend::start(&[]);
        let (method, _, resource, body, status) =
            ASKED.iter().find(|(_, asked, ..)| *asked == path).expect("it is there");
        let answer = backend.ask(method, resource, *body);
        assert_eq!(answer.status, *status, "{path}");
        check(method, path, &answer);
        assert_eq!(backend.ended(), Some(0), "{path}");
    }
}

#[test]
fn a_method_that_is_none_of_a_path_is_refused() {
    let backend = Backend::start(&[]);
    let described = described();
    for path in described.iter().map(|(_, path)| path).collect::<BTreeSet<_>>() {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"] {
            if described.contains(&(method.to_owned(), path.clone())) {
                continue;
            }
            let answer = backend.ask(method, &path.replace("{id}", "1"), None);
            assert_eq!((answer.status, answer.code()), (405, "no_method"), "{method} {path}");
        }
    }
}
