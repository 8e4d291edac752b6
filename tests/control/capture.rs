//! Captures over the control socket, and `--pcap`. What a guest's frames look like in them is in
//! `integration/tests/netns/capture.rs`.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::backend::Backend;
use crate::resources::check;

const MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];
/// Type and length of the block that a whole capture ends with.
const STATISTICS: [u8; 8] = [5, 0, 0, 0, 88, 0, 0, 0];

fn begin(backend: &Backend, path: &Path, wanted: &Value) -> crate::backend::Answer {
    let body = json!({ "path": path, "wanted": wanted }).to_string();
    let answer = backend.ask("POST", "/v1/capture", Some(&body));
    check("POST", "/v1/capture", &answer);
    answer
}

fn state(backend: &Backend) -> Value {
    let answer = backend.get("/v1/capture");
    check("GET", "/v1/capture", &answer);
    answer.body
}

fn until(backend: &Backend, word: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let state = state(backend);
        if state["state"] == word {
            return state;
        }
        assert!(Instant::now() < deadline, "never {word}: {state}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_whole(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) && bytes[..bytes.len() - 80].ends_with(&STATISTICS)
}

#[test]
fn a_capture_begins_is_the_only_one_and_ends_whole() {
    let backend = Backend::start(&["--queues", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.pcapng");
    assert_eq!(state(&backend)["state"], "none");
    let none = backend.ask("DELETE", "/v1/capture", None);
    check("DELETE", "/v1/capture", &none);
    assert_eq!((none.status, none.code()), (404, "not_found"));

    let begun =
        begin(&backend, &path, &json!({ "snaplen": 100, "protocol": "tcp", "host": "10.0.2.2", "port": 80 }));
    assert_eq!(begun.status, 201, "{}", begun.body);
    assert_eq!((&begun.body["state"], &begun.body["to"]), (&json!("running"), &json!(path)));
    assert_eq!(begun.body["wanted"]["port"], 80);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let again = begin(&backend, &dir.path().join("b.pcapng"), &json!({}));
    assert_eq!((again.status, again.code()), (409, "running"));
    assert!(!dir.path().join("b.pcapng").exists(), "what is refused makes no file");

    let ended = backend.ask("DELETE", "/v1/capture", None);
    check("DELETE", "/v1/capture", &ended);
    assert_eq!((ended.status, &ended.body["ended"]), (200, &json!("stopped")));
    let bytes = fs::read(&path).unwrap();
    assert!(is_whole(&bytes));
    assert_eq!(ended.body["bytes"], bytes.len());
    assert_eq!(state(&backend)["state"], "ended");
    let metrics = backend.raw("GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    for line in
        ["vunet_capture_running 0", "vunet_capture_frames_total 0", "vunet_capture_lost_frames_total 0"]
    {
        assert!(metrics.lines().any(|other| other == line), "{line} in\n{metrics}");
    }
    assert_eq!(begin(&backend, &path, &json!({})).status, 201, "another may begin now");
}

#[test]
fn what_cannot_be_captured_to_is_refused_by_its_name() {
    let backend = Backend::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("letter"), "dear").unwrap();
    symlink(path("letter"), path("link")).unwrap();
    for (name, status, code) in [
        ("letter", 409, "not_a_capture"),
        ("link", 400, "bad_value"),
        ("none/file", 400, "bad_value"),
        (".", 400, "bad_value"),
    ] {
        let answer = begin(&backend, &path(name), &json!({}));
        assert_eq!((answer.status, answer.code()), (status, code), "{name}");
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(path(name).to_str().unwrap()), "{message}");
    }
    assert_eq!(begin(&backend, Path::new("relative"), &json!({})).status, 400);
    assert_eq!(fs::read_to_string(path("letter")).unwrap(), "dear");
    for wanted in [
        json!({ "snaplen": 13 }),
        json!({ "snaplen": 300_000 }),
        json!({ "max_bytes": 4095 }),
        json!({ "duration_seconds": 0 }),
        json!({ "duration_seconds": -1 }),
        json!({ "duration_seconds": 1e300 }),
    ] {
        assert_eq!(begin(&backend, &path("new"), &wanted).status, 400, "{wanted}");
    }
    for wanted in
        [json!({ "host": "x" }), json!({ "port": 65_536 }), json!({ "protocol": "ip" }), json!({ "x": 1 })]
    {
        assert_eq!(begin(&backend, &path("new"), &wanted).status, 422, "{wanted}");
    }
    for query in ["snaplen=1", "host=x", "protocol=ip", "x=1", "duration_seconds=nan"] {
        let answer = backend.get(&format!("/v1/capture/stream?{query}"));
        assert_eq!(answer.status, 400, "{query}");
        check("GET", "/v1/capture/stream", &answer);
    }
    assert_eq!(state(&backend)["state"], "none");
    assert!(!path("new").exists());
}

#[test]
fn a_capture_ends_when_its_time_is_over_and_that_is_told() {
    let backend = Backend::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let mut events = backend.connect();
    events.write_all(b"GET /v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let path = dir.path().join("a");
    assert_eq!(begin(&backend, &path, &json!({ "duration_seconds": 0.2 })).status, 201);
    let state = until(&backend, "ended");
    assert_eq!(state["ended"], "duration");
    assert!(is_whole(&fs::read(&path).unwrap()));
    let mut heard = String::new();
    let mut piece = [0; 4096];
    while !heard.contains("capture_ended") || !heard.ends_with("\n\r\n") {
        let len = events.read(&mut piece).unwrap();
        assert!(len > 0, "{heard}");
        heard.push_str(&String::from_utf8_lossy(&piece[..len]));
    }
    let to = path.display();
    assert!(heard.contains(&format!("\"event\":\"capture_started\",\"to\":\"{to}\"")), "{heard}");
    let ended = format!("\"event\":\"capture_ended\",\"to\":\"{to}\",\"reason\":\"duration\",\"frames\":0");
    assert!(heard.contains(&ended), "{heard}");
}

#[test]
fn a_client_has_the_capture_until_it_leaves() {
    let backend = Backend::start(&[]);
    let mut client = backend.connect();
    client.write_all(b"GET /v1/capture/stream?snaplen=64 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut all = Vec::new();
    let mut piece = [0; 4096];
    while !all.windows(4).any(|four| four == MAGIC) {
        let len = client.read(&mut piece).unwrap();
        assert!(len > 0, "{all:?}");
        all.extend_from_slice(&piece[..len]);
    }
    let head = String::from_utf8_lossy(&all).to_lowercase();
    assert!(
        head.starts_with("http/1.1 200") && head.contains("content-type: application/x-pcapng"),
        "{head}"
    );
    assert_eq!(state(&backend)["to"], "client");
    assert_eq!(backend.get("/v1/capture/stream").status, 409);
    drop(client);
    let ended = until(&backend, "ended");
    assert_eq!(ended["ended"], "reader_left");
}

#[test]
fn a_client_sees_the_end_of_a_capture_that_is_stopped() {
    let backend = Backend::start(&[]);
    let mut client = backend.connect();
    client.write_all(b"GET /v1/capture/stream HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    until(&backend, "running");
    assert_eq!(backend.ask("DELETE", "/v1/capture", None).body["ended"], "stopped");
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert!(all.ends_with(b"\r\n0\r\n\r\n"), "the answer is whole");
    assert!(all.windows(8).any(|eight| eight == STATISTICS), "the capture is too");
}

#[test]
fn a_client_that_never_reads_does_not_hold_the_end() {
    let backend = Backend::start(&[]);
    let mut client = backend.connect();
    client.write_all(b"GET /v1/capture/stream HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    until(&backend, "running");
    let begun = Instant::now();
    assert_eq!(backend.ask("DELETE", "/v1/capture", None).status, 200);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_capture_from_the_start_ends_whole_with_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("start.pcapng");
    let args = ["--pcap", path.to_str().unwrap(), "--pcap-snaplen", "96", "--pcap-max-bytes", "1000000"];
    let mut backend = Backend::start(&args);
    let state = until(&backend, "running");
    assert_eq!((&state["to"], &state["wanted"]["snaplen"]), (&json!(path), &json!(96)));
    assert_eq!(state["wanted"]["max_bytes"], 1_000_000);
    assert_eq!(backend.ask("POST", "/v1/stop", None).status, 202);
    assert_eq!(backend.ended(), Some(0));
    assert!(is_whole(&fs::read(&path).unwrap()));
}

#[test]
fn a_fifo_without_reader_holds_neither_the_start_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let mut backend = Backend::start(&["--pcap", path.to_str().unwrap()]);
    until(&backend, "waiting");
    let mut all = Vec::new();
    let reader = std::thread::spawn({
        let path = path.clone();
        move || {
            fs::File::open(path).unwrap().read_to_end(&mut all).unwrap();
            all
        }
    });
    until(&backend, "running");
    assert_eq!(backend.ask("DELETE", "/v1/capture", None).status, 200);
    assert!(is_whole(&reader.join().unwrap()));
    assert_eq!(begin(&backend, &path, &json!({})).body["state"], "waiting");
    assert_eq!(backend.ask("POST", "/v1/stop", None).status, 202);
    assert_eq!(backend.ended(), Some(0));
}

#[test]
fn a_start_that_cannot_capture_says_why_and_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("letter");
    fs::write(&path, "dear").unwrap();
    let run = |args: &[&str]| {
        let socket = dir.path().join("vm");
        let output =
            Command::new(env!("CARGO_BIN_EXE_vunet")).arg("--socket-path").arg(&socket).args(args).output();
        let output = output.unwrap();
        assert!(!socket.exists());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, error) = run(&["--pcap", path.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{error}");
    let said = format!("--pcap: {}: it is there and is no capture", path.display());
    assert!(error.contains(&said), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "dear");
    for flag in ["--pcap-snaplen=96", "--pcap-max-bytes=4096"] {
        let (code, error) = run(&[flag]);
        assert_eq!(code, Some(2));
        assert!(error.contains("is of no use without --pcap"), "{error}");
    }
}

#[test]
fn ctl_captures_to_a_file_of_its_own_folder_and_to_a_pipe() {
    let backend = Backend::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let socket = backend.socket();
    let ctl = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vunet"));
        command.args(["ctl", "--control"]).arg(&socket).args(args).current_dir(dir.path());
        command
    };
    let said = |args: &[&str]| {
        let output = ctl(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(said(&["capture", "status"]), "state   none\n");
    let begun = said(&["capture", "start", "a.pcapng", "--protocol", "udp", "--duration", "60"]);
    assert!(begun.contains("running") && begun.contains("a.pcapng"), "{begun}");
    let json: Value = serde_json::from_str(&said(&["--json", "pcap", "status"])).unwrap();
    let path = dir.path().canonicalize().unwrap().join("a.pcapng");
    assert_eq!((&json["to"], &json["wanted"]["protocol"]), (&json!(path), &json!("udp")));
    assert!(said(&["capture", "stop"]).contains("stopped"));
    assert!(is_whole(&fs::read(&path).unwrap()));
    let output = ctl(&["capture", "stop"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no capture runs"));

    for args in [
        &["capture", "stop", "a.pcapng"][..],
        &["capture", "-", "a.pcapng"],
        &["capture", "status", "--port", "53"],
        &["capture", "start"],
        &["capture", "begin"],
    ] {
        let output = ctl(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    let piped = ctl(&["capture", "-", "--port", "53"]).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(until(&backend, "running")["wanted"]["port"], 53);
    said(&["capture", "stop"]);
    let output = piped.wait_with_output().unwrap();
    assert!(output.status.success() && is_whole(&output.stdout));
}
