//! Each resource without a guest, and that its answers are what the description says.

use std::process::Output;

use serde_json::{Value, json};

use crate::backend::{Answer, Backend};

/// Whether an answer is one that the description has for this operation.
pub(crate) fn check(method: &str, route: &str, answer: &Answer) {
    let description = serde_json::to_value(vunet::control::api::description()).unwrap();
    let operation = &description["paths"][route][method.to_lowercase()];
    let response = &operation["responses"][answer.status.to_string()];
    assert!(response.is_object(), "{method} {route} does not answer {}: {}", answer.status, answer.body);
    let Some(schema) = response["content"]["application/json"].get("schema") else {
        assert_eq!(answer.body, Value::Null, "{method} {route}");
        return;
    };
    let mut schema = schema.clone();
    schema["components"] = description["components"].clone();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<String> = validator.iter_errors(&answer.body).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{method} {route}: {errors:?} in {}", answer.body);
}

#[test]
fn status_says_what_was_configured_and_that_nobody_is_there() {
    let backend = Backend::start(&["--subnet", "10.9.0.0/24", "--queues", "2", "--mac", "52:54:00:00:00:01"]);
    let answer = backend.get("/v1/status");
    assert_eq!(answer.status, 200);
    check("GET", "/v1/status", &answer);
    let wanted = json!({
        "version": env!("CARGO_PKG_VERSION"), "mode": "nat", "uplink": "sockets", "nat": "sockets", "network": null,
        "subnet": "10.9.0.0/24", "gateway": "10.9.0.1", "ip_mtu_bytes": 1500, "mac": "52:54:00:00:00:01",
        "queue_pairs": 2, "attached": false, "features": [], "rings": [], "guest_address": null, "flows": 0,
        "draining": false,
    });
    for (name, value) in wanted.as_object().unwrap() {
        assert_eq!(&answer.body[name], value, "{name}");
    }
    assert!(answer.body["pid"].as_u64() > Some(1));
}

#[test]
fn host_only_network_has_no_nat() {
    let backend = Backend::start(&["--mode", "host-only"]);
    let status = backend.get("/v1/status").body;
    assert_eq!((&status["mode"], &status["nat"]), (&json!("isolated"), &Value::Null));
}

#[test]
fn tables_are_empty_without_a_guest() {
    let backend = Backend::start(&["--dns-host", "db=10.0.2.9"]);
    for route in ["/v1/counters", "/v1/flows", "/v1/leases", "/v1/dns", "/v1/log-level", "/v1/limits"] {
        let answer = backend.get(route);
        assert_eq!(answer.status, 200, "{route}");
        check("GET", route, &answer);
    }
    assert_eq!(backend.get("/v1/flows").body, json!({ "flows": [], "next": null }));
    assert_eq!(backend.get("/v1/leases").body, json!({ "leases": [] }));
    assert_eq!(backend.get("/v1/counters").body["drops"], json!({}));
    let names = backend.get("/v1/dns").body;
    let db = json!({ "name": "db.vunet.internal", "address": "10.0.2.9" });
    assert!(names["records"].as_array().unwrap().contains(&db), "{names}");
}

#[test]
fn flows_are_asked_for_with_right_values_or_refused() {
    let backend = Backend::start(&["--queues", "2"]);
    let good =
        ["?protocol=tcp&guest=10.0.2.2&remote=192.0.2.1&port=80&limit=1000", "?cursor=1-0", "?limit=1"];
    for query in good {
        assert_eq!(backend.get(&format!("/v1/flows{query}")).status, 200, "{query}");
    }
    let bad = [
        "?protocol=tc",
        "?guest=10.0.2",
        "?port=65536",
        "?limit=0",
        "?limit=1001",
        "?limit=x",
        "?cursor=",
        "?cursor=1",
        "?cursor=z-0",
        "?cursor=0-g",
        "?colour=red",
    ];
    for query in bad {
        let answer = backend.get(&format!("/v1/flows{query}"));
        assert_eq!((answer.status, answer.code()), (400, "bad_value"), "{query}: {}", answer.body);
        check("GET", "/v1/flows", &answer);
    }
    for id in ["0-100000000000000", "0", "7-1", "nonsense"] {
        let answer = backend.ask("DELETE", &format!("/v1/flows/{id}"), None);
        assert_eq!((answer.status, answer.code()), (404, "not_found"), "{id}");
        check("DELETE", "/v1/flows/{id}", &answer);
    }
}

#[test]
fn log_level_is_set_or_stays() {
    let backend = Backend::start(&[]);
    let put = |body: &str| {
        let answer = backend.ask("PUT", "/v1/log-level", Some(body));
        check("PUT", "/v1/log-level", &answer);
        answer
    };
    assert_eq!(backend.get("/v1/log-level").body, json!({ "level": "info" }));
    assert_eq!(put(r#"{"level":"warn"}"#).body, json!({ "level": "warn" }));
    assert_eq!(backend.get("/v1/log-level").body, json!({ "level": "warn" }));
    for level in ["a=b=c", "wran", "", "info,", "vunet::device"] {
        assert_eq!(put(&format!("{{\"level\":\"{level}\"}}")).status, 400, "{level:?}");
    }
    assert_eq!(put(r#"{"levle":"debug"}"#).status, 422);
    assert_eq!(put("{").status, 400);
    assert_eq!(backend.get("/v1/log-level").body, json!({ "level": "warn" }));
}

#[test]
fn limits_are_set_all_of_them_or_none() {
    let backend = Backend::start(&["--queues", "2", "--limit-to-guest", "rate=8mbit,burst=64kb"]);
    let put = |body: &str| {
        let answer = backend.ask("PUT", "/v1/limits", Some(body));
        check("PUT", "/v1/limits", &answer);
        answer
    };
    let limits = backend.get("/v1/limits").body;
    assert_eq!(
        (&limits["from_guest"]["limit"], &limits["from_guest"]["packets_burst"]),
        (&json!("none"), &Value::Null)
    );
    assert_eq!(limits["to_guest"]["limit"], "rate=8mbit,burst=64kb");
    let set = put(r#"{"from_guest":"packets=500,flows=10"}"#);
    assert_eq!(set.status, 200);
    assert_eq!(set.body["from_guest"]["packets_per_second"], 500);
    assert_eq!(set.body["to_guest"]["rate_bytes_per_second"], 1_000_000, "it stays");
    let known = backend.get("/v1/limits").body;
    for wrong in [
        r#"{"from_guest":"none","to_guest":"rate=much"}"#,
        r#"{"from_guest":"none","to_guest":"rate=0"}"#,
        r#"{"from_guest":""}"#,
    ] {
        let answer = put(wrong);
        assert_eq!((answer.status, answer.code()), (400, "bad_value"), "{wrong}");
    }
    assert_eq!(put(r#"{"from-guest":"none"}"#).status, 422);
    assert_eq!(put("[").status, 400);
    assert_eq!(backend.get("/v1/limits").body, known, "nothing of it was set");
    assert_eq!(put(r#"{"from_guest":"none","to_guest":"none"}"#).status, 200);
}

#[test]
fn ctl_shows_and_sets_limits() {
    let backend = Backend::start(&[]);
    let text = |args: &[&str]| {
        let output = backend.ctl(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let table = text(&["limits"]);
    assert!(table.starts_with("DIRECTION") && table.contains("from guest  -"), "{table}");
    let table = text(&["limits", "set", "--to-guest", "rate=80mbit,flows=20"]);
    assert!(table.contains("to guest    10000000/s, burst 100000"), "{table}");
    let json: Value = serde_json::from_str(&text(&["--json", "limits"])).unwrap();
    assert_eq!(json["to_guest"]["flows_per_second"], 20);
    for args in [&["limits", "set"][..], &["limits", "set", "--to-guest", "rate=2tbit"]] {
        assert_eq!(backend.ctl(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn what_is_no_resource_or_has_no_such_method_is_said_so() {
    let backend = Backend::start(&[]);
    for path in ["/", "/v1", "/v2/status", "/v1/status/", "/v1/flows/a/b"] {
        let answer = backend.get(path);
        assert_eq!((answer.status, answer.code()), (404, "not_found"), "{path}");
    }
    let answer = backend.ask("POST", "/v1/status", None);
    assert_eq!((answer.status, answer.code()), (405, "no_method"));
}

#[test]
fn process_ends_when_it_is_told_to_and_its_sockets_go() {
    let mut backend = Backend::start(&[]);
    let answer = backend.ask("POST", "/v1/stop", None);
    assert_eq!(answer.status, 202);
    check("POST", "/v1/stop", &answer);
    assert_eq!(backend.ended(), Some(0));
    assert!(!backend.socket().exists());
}

#[test]
fn process_without_flows_has_drained() {
    let mut backend = Backend::start(&["--queues", "2"]);
    for seconds in ["-1", "1e300", "1e9"] {
        let answer = backend.ask("POST", "/v1/drain", Some(&format!("{{\"timeout_seconds\":{seconds}}}")));
        assert_eq!(answer.status, 400, "{seconds}: {}", answer.body);
        check("POST", "/v1/drain", &answer);
    }
    let answer = backend.ask("POST", "/v1/drain", Some("{}"));
    assert_eq!(answer.status, 202);
    check("POST", "/v1/drain", &answer);
    assert_eq!(backend.ended(), Some(0));
}

#[test]
fn ctl_shows_tables_json_and_refusals() {
    let backend = Backend::start(&[]);
    let text = |args: &[&str]| {
        let output = backend.ctl(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(text(&["status"]).contains("\nsubnet     10."));
    assert!(text(&["flows"]).starts_with("FLOW  PROTOCOL"));
    assert!(text(&["leases"]).starts_with("ADDRESS"));
    assert!(text(&["dns"]).contains("host.vunet.internal"));
    assert!(text(&["counters"]).contains("frames_from_guest"));
    let json: Value = serde_json::from_str(&text(&["--json", "status"])).unwrap();
    assert_eq!(json["mode"], "nat");
    assert_eq!(text(&["log-level", "debug"]), "");
    assert_eq!(text(&["log-level"]), "debug\n");
    let refused = backend.ctl(&["kill", "0-1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "error: no flow \"0-1\"\n");
}

/// What a program finds of an error of `vunet ctl --json`.
fn told(output: &Output) -> (Option<i32>, String, Value) {
    let body: Value = serde_json::from_slice(&output.stderr).expect("an object");
    (output.status.code(), body["error"]["code"].as_str().unwrap().to_owned(), body)
}

#[test]
fn errors_of_ctl_are_for_programs_too_and_tell_a_refusal_from_nobody_there() {
    let mut backend = Backend::start(&[]);
    for name in ["0-1", "a b", "x?y", "../status"] {
        let (code, error, body) = told(&backend.ctl(&["--json", "kill", name]));
        assert_eq!((code, &*error), (Some(1), "not_found"));
        assert_eq!(body["error"]["message"], format!("no flow {name:?}"), "it is asked for as it is");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("{}:80", taken.local_addr().unwrap());
    let (code, error, body) = told(&backend.ctl(&["--json", "publish", &port]));
    assert_eq!((code, &*error), (Some(1), "port_taken"));
    assert_eq!(body["error"]["owner"]["pid"], std::process::id(), "nothing of it is lost: {body}");
    let (events, first) = backend.ctl_begun(&["--json", "events"]);
    assert!(first.contains("listening"), "{first}");
    backend.kill();
    let (code, error, _) = told(&events.wait_with_output().unwrap());
    assert_eq!((code, &*error), (Some(1), "ended"), "that is no success");
    let (code, error, _) = told(&backend.ctl(&["--json", "status"]));
    assert_eq!((code, &*error), (Some(3), "unreachable"));
    assert_eq!(backend.ctl(&["status"]).status.code(), Some(3));
}

#[test]
fn what_ctl_did_before_an_error_is_told() {
    let backend = Backend::start(&[]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("{}:80", taken.local_addr().unwrap());
    let partly = backend.ctl(&["publish", "127.0.0.1:0:80", &taken, "127.0.0.1:0:81"]);
    assert_eq!(partly.status.code(), Some(1));
    let published = backend.get("/v1/ports").body["ports"].as_array().unwrap().clone();
    assert_eq!(published.len(), 1, "{published:?}");
    let text = String::from_utf8(partly.stdout).unwrap();
    assert!(text.contains(&format!("127.0.0.1:{}", published[0]["host_port"])), "the port picked: {text}");
    let (code, error, body) = told(&backend.ctl(&["--json", "unpublish", "1", "tcp:9"]));
    assert_eq!((code, &*error), (Some(1), "not_found"));
    assert_eq!(body["error"]["message"], "done: 1; then: no published port \"tcp:9\"");
    let nothing = backend.ctl(&["publish", &taken]);
    assert!(nothing.stdout.is_empty() && nothing.status.code() == Some(1));
}

#[test]
fn ports_are_published_picked_listed_refused_and_removed() {
    let backend = Backend::start(&["--queues", "2", "-t", "127.0.0.1/0:22"]);
    let list = || {
        let answer = backend.get("/v1/ports");
        check("GET", "/v1/ports", &answer);
        answer.body["ports"].as_array().expect("a list").clone()
    };
    let publish = |port: &str| {
        let answer = backend.ask("POST", "/v1/ports", Some(&json!({ "publish": port }).to_string()));
        check("POST", "/v1/ports", &answer);
        answer
    };
    let remove = |name: &str| {
        let answer = backend.ask("DELETE", &format!("/v1/ports/{name}"), None);
        check("DELETE", "/v1/ports/{id}", &answer);
        answer
    };
    let first = list();
    assert_eq!((first.len(), &first[0]["guest_port"]), (1, &json!(22)));
    assert!(first[0]["host_port"].as_u64() > Some(0), "the port that was picked: {first:?}");
    let made = publish("udp:127.0.0.1%lo:0:53");
    assert_eq!(made.status, 201);
    let port = &made.body["ports"][0];
    assert_eq!((&port["protocol"], &port["interface"]), (&json!("udp"), &json!("lo")));
    assert_eq!(list().len(), 2);
    // Another socket has it, and it is known whose that is.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap();
    let refused = publish(&format!("{host}:80"));
    assert_eq!((refused.status, refused.code()), (409, "port_taken"));
    assert_eq!(refused.body["error"]["owner"]["pid"], std::process::id(), "{}", refused.body);
    let again = publish(port["publish"].as_str().unwrap());
    assert_eq!((again.status, again.code()), (409, "published"));
    for wrong in ["", "80", "[::]:80:80", "198.51.100.77:80:80", "%vunet-none:80:80"] {
        assert_eq!((publish(wrong).status, publish(wrong).code()), (400, "bad_value"), "{wrong}");
    }
    let answer = backend.ask("POST", "/v1/ports", Some("{\"publsh\":\"1:1\"}"));
    check("POST", "/v1/ports", &answer);
    assert_eq!(answer.status, 422);
    assert_eq!((remove("77").status, remove("77?keep=maybe").status), (404, 400));
    let removed = remove(&format!("{}?keep=false", port["id"]));
    assert_eq!((removed.status, removed.body), (200, json!({ "connections_reset": 0 })));
    assert_eq!(remove(&format!("tcp:{}", first[0]["host_port"])).status, 200);
    assert_eq!(list(), [] as [Value; 0]);
}

#[test]
fn where_no_port_leads_to_the_guest_that_is_said() {
    let backend = Backend::start(&["--mode", "host-only"]);
    let answer = backend.ask("POST", "/v1/ports", Some("{\"publish\":\"0:80\"}"));
    check("POST", "/v1/ports", &answer);
    assert_eq!((answer.status, answer.code()), (409, "not_here"));
    assert_eq!(backend.get("/v1/ports").body, json!({ "ports": [] }));
}

#[test]
fn ctl_publishes_and_shows_ports() {
    let backend = Backend::start(&[]);
    let made = backend.ctl(&["publish", "127.0.0.1:0:80", "udp:127.0.0.1:0:53"]);
    let text = String::from_utf8(made.stdout).unwrap();
    assert!(
        made.status.success() && text.lines().count() == 3 && text.starts_with("PORT  PROTOCOL"),
        "{text}"
    );
    let refused = backend.ctl(&["unpublish", "tcp:1"]);
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "error: no published port \"tcp:1\"\n");
    assert_eq!(backend.ctl(&["publish", "auto"]).status.code(), Some(2), "it is not asked for");
    assert!(backend.ctl(&["unpublish", "1", "2", "--keep"]).status.success());
    assert_eq!(backend.get("/v1/ports").body, json!({ "ports": [] }));
}
