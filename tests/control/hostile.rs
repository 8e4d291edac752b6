//! Requests made to break something: paths, bodies, framing, users, numbers.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::backend::Backend;

/// The status of the first answer to bytes; 0 if there is none.
fn status(backend: &Backend, request: &[u8]) -> u16 {
    let answer = backend.raw_bytes(request);
    let line = String::from_utf8_lossy(&answer[..answer.len().min(12)]).into_owned();
    line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest[..3].parse().ok()).unwrap_or(0)
}

fn get(target: &[u8]) -> Vec<u8> {
    [b"GET ", target, b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"].concat()
}

#[test]
fn paths_mean_what_they_say_and_nothing_else() {
    let backend = Backend::start(&[]);
    for target in [
        &b"//v1/status"[..],
        b"/v1/../v1/status",
        b"/v1/./status",
        b"/v1/%73tatus/..",
        b"/v1/status%00",
        b"/v1/status%2f",
        b"/V1/STATUS",
        b"/../../etc/passwd",
    ] {
        let shown = String::from_utf8_lossy(target);
        assert_eq!(status(&backend, &get(target)), 404, "{shown}");
    }
    for target in [&b"*"[..], b"/v1/sta\xfftus", b"/v1/sta tus", b"v1/status", b""] {
        let code = status(&backend, &get(target));
        assert!([0, 400, 404].contains(&code), "{:?}: {code}", String::from_utf8_lossy(target));
    }
    // A name is one, whatever it looks like.
    assert_eq!(backend.ask("DELETE", "/v1/flows/..%2fstatus", None).status, 404);
    // One that is not UTF-8 is an error like others.
    for path in ["/v1/flows/%ff", "/v1/ports/%ff"] {
        let answer = backend.ask("DELETE", path, None);
        assert_eq!((answer.status, answer.code()), (400, "bad_value"), "{path}");
    }
    let long = format!("/v1/flows/{}", "9".repeat(8 << 10));
    assert_eq!(backend.ask("DELETE", &long, None).status, 404);
    assert_eq!(backend.get("/v1/status").status, 200);
}

#[test]
fn bodies_that_are_deep_wrong_or_not_text_are_refused() {
    let backend = Backend::start(&[]);
    let depth = 20_000;
    let deep = "[".repeat(depth) + &"]".repeat(depth);
    let nested = format!("{{\"publish\":{}1{}}}", "{\"a\":".repeat(5_000), "}".repeat(5_000));
    for body in
        [&deep, &nested, "null", "1e999", "{\"publish\":\"\\ud800\"}", "{\"publish\":1,\"publish\":2}"]
    {
        for (method, path) in [("POST", "/v1/ports"), ("PUT", "/v1/log-level"), ("POST", "/v1/drain")] {
            let answer = backend.ask(method, path, Some(body));
            assert!([400, 422].contains(&answer.status), "{path}: {} {}", answer.status, answer.body);
            assert_eq!(answer.code(), "bad_value", "{path}");
        }
    }
    let head = "PUT /v1/log-level HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n";
    let request = [head.as_bytes(), b"\"\xff\xfe\""].concat();
    assert_eq!(status(&backend, &request), 400);
    let plain = head.replace("application/json", "text/plain") + "null";
    assert_eq!(status(&backend, plain.as_bytes()), 415);
    assert_eq!(backend.get("/v1/status").status, 200);
}

#[test]
fn framing_that_can_be_read_in_two_ways_is_refused() {
    let backend = Backend::start(&[]);
    let put = "PUT /v1/log-level HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n";
    let hidden = "GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n";
    let two_lengths = format!("{put}Content-Length: 2\r\nContent-Length: 40\r\n\r\n{{}}{hidden}");
    assert_eq!(status(&backend, two_lengths.as_bytes()), 400);
    for length in ["-1", "+2", "0x2", "99999999999999999999", "2, 3"] {
        let request = format!("{put}Content-Length: {length}\r\n\r\n{{}}");
        assert_eq!(status(&backend, request.as_bytes()), 400, "{length}");
    }
    // Both ways of framing at once: a proxy and the server could differ.
    let both = format!("{put}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}");
    let answers = String::from_utf8_lossy(&backend.raw_bytes(both.as_bytes())).into_owned();
    assert!(answers.starts_with("HTTP/1.1 400"), "{answers}");
    let endless = format!(
        "{put}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n{}",
        "ffff\r\n".to_owned() + &"a".repeat(0xffff) + "\r\n2\r\naa\r\n"
    );
    assert!([400, 413].contains(&status(&backend, endless.as_bytes())));
    assert_eq!(backend.get("/v1/status").status, 200);
}

#[test]
fn requests_in_one_go_are_answered_in_their_order() {
    let backend = Backend::start(&[]);
    let ask = |path: &str, rest: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n{rest}\r\n");
    let all =
        ask("/v1/log-level", "") + &ask("/nothing", "") + &ask("/v1/log-level", "Connection: close\r\n");
    let answers = backend.raw(&all);
    let codes: Vec<&str> = answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(codes, ["200", "404", "200"], "{answers}");
}

#[test]
fn ten_thousand_clients_that_come_and_go_leave_nothing() {
    let backend = Backend::start(&[]);
    let fds = || fs::read_dir(format!("/proc/{}/fd", backend.pid())).unwrap().count();
    assert_eq!(backend.get("/v1/status").status, 200);
    let before = fds();
    for n in 0..10_000 {
        let mut stream = UnixStream::connect(backend.socket()).unwrap();
        match n % 4 {
            0 => {}
            1 => stream.write_all(b"GET /v1/st").unwrap(),
            2 => stream.write_all(b"\0\0\0\0\r\n\r\n").unwrap(),
            _ => stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap(),
        }
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while backend.get("/v1/events?flows=x").status != 400 || fds() > before + 1 {
        assert!(std::time::Instant::now() < deadline, "{} descriptors, {before} before", fds());
    }
}

#[test]
fn another_user_is_refused_even_where_the_file_lets_it_in() {
    let backend = Backend::start(&[]);
    if !rustix::process::geteuid().is_root() {
        let line = "SKIPPED hostile::another_user_is_refused_even_where_the_file_lets_it_in: needs root";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{line}");
        return eprintln!("{line}");
    }
    let socket = backend.socket();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    let open = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    open(&socket, 0o666);
    open(socket.parent().unwrap(), 0o755);
    // The program is where another user may not come; a copy of it is where it may.
    let ctl = socket.with_file_name("vunet");
    fs::copy(env!("CARGO_BIN_EXE_vunet"), &ctl).unwrap();
    let ask = |uid: u32| {
        let mut command = Command::new(&ctl);
        command.args(["ctl", "status", "--control"]).arg(&socket).uid(uid).gid(uid);
        command.output().unwrap().status.code()
    };
    assert_eq!(ask(65_534), Some(1));
    backend.says("a client of another user was refused", 1);
    assert_eq!(ask(0), Some(0));
}
