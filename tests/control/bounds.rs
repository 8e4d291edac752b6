//! Clients that send too much, too slowly or nonsense cost themselves only.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::backend::Backend;

#[test]
fn body_and_head_are_bounded() {
    let backend = Backend::start(&[]);
    let long = format!("{{\"level\":\"{}\"}}", "a".repeat(70 << 10));
    let answer = backend.ask("PUT", "/v1/log-level", Some(&long));
    assert_eq!((answer.status, answer.code()), (413, "bad_value"));
    let head = "x".repeat(40 << 10);
    let answer = backend.raw(&format!("GET /v1/status HTTP/1.1\r\nHost: a\r\nX: {head}\r\n\r\n"));
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    let fields: String = (0..100).map(|n| format!("X-{n}: y\r\n")).collect();
    let answer = backend.raw(&format!("GET /v1/status HTTP/1.1\r\nHost: a\r\n{fields}\r\n"));
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    assert_eq!(backend.get("/v1/status").status, 200);
}

#[test]
fn nonsense_is_refused() {
    let backend = Backend::start(&[]);
    for request in ["\r\n\r\n\r\n", "GET\r\n\r\n", "\0\u{1}\u{2}", "GET /v1/status HTTP/9.9\r\n\r\n"] {
        let answer = backend.raw(&format!("{request}{}", " ".repeat(10)));
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{request:?}: {answer}");
    }
    assert_eq!(backend.get("/v1/status").status, 200);
}

#[test]
fn client_that_stops_amid_its_request_is_let_go() {
    let backend = Backend::start(&[]);
    let begun = Instant::now();
    let mut slow_head = backend.connect();
    slow_head.write_all(b"GET /v1/status HTTP/1.1\r\nHost:").unwrap();
    let mut slow_body = backend.connect();
    let head = "PUT /v1/log-level HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{";
    slow_body.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    let _ = slow_body.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    let mut rest = Vec::new();
    let _ = slow_head.read_to_end(&mut rest);
    assert!(begun.elapsed() < Duration::from_secs(18));
    assert_eq!(backend.get("/v1/status").status, 200);
}

/// A stream of events, which has begun.
fn listen(backend: &Backend) -> UnixStream {
    let mut stream = backend.connect();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    stream
}

#[test]
fn clients_that_hold_every_place_they_can_keep_no_person_out() {
    let backend = Backend::start(&[]);
    let listening: Vec<_> = (0..24).map(|_| listen(&backend)).collect();
    let answer = backend.get("/v1/events");
    assert_eq!((answer.status, answer.code()), (503, "too_many_streams"));
    // The last places have no patience, and answer one request.
    let begun = Instant::now();
    let silent: Vec<_> = (0..8).map(|_| backend.connect()).collect();
    assert_eq!(backend.get("/v1/status").status, 200);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    drop(silent);
    let answers = backend.raw(&"GET /v1/log-level HTTP/1.1\r\nHost: a\r\n\r\n".repeat(2));
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 1, "{answers}");
    assert!(answers.contains("connection: close"), "{answers}");
    drop(listening);
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = backend.connect();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).unwrap();
        if &begin == b"HTTP/1.1 200" {
            break;
        }
        assert!(Instant::now() < deadline, "places are given back");
    }
}

#[test]
fn who_does_not_read_loses_its_place_and_who_reads_keeps_it() {
    let backend = Backend::start(&[]);
    let mut unread = listen(&backend);
    let mut read = listen(&backend);
    let mut greedy = backend.connect();
    let asked = 64;
    greedy.write_all("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(asked).as_bytes()).unwrap();
    let mut seen = Vec::new();
    let begun = Instant::now();
    let mut published = 0;
    while begun.elapsed() < Duration::from_secs(18) {
        let made = backend.ask("POST", "/v1/ports", Some("{\"publish\":\"127.0.0.1:0:80\"}"));
        let removed = backend.ask("DELETE", &format!("/v1/ports/{}", made.body["ports"][0]["id"]), None);
        assert_eq!((made.status, removed.status), (201, 200));
        published += 1;
        let mut some = [0; 65_536];
        let count = read.read(&mut some).expect("it keeps its place");
        seen.extend_from_slice(&some[..count]);
        std::thread::sleep(Duration::from_millis(50));
    }
    let told = String::from_utf8_lossy(&seen).matches("event: port_published").count();
    assert!(told + 1 >= published, "{told} of {published}");
    let mut rest = Vec::new();
    unread.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = unread.read_to_end(&mut rest);
    let told = String::from_utf8_lossy(&rest).matches("event: port_published").count();
    assert!(told < published / 2, "{told} of {published} are in the kernel, and no more is sent");
    let mut rest = Vec::new();
    let _ = greedy.read_to_end(&mut rest);
    let answers = String::from_utf8_lossy(&rest).matches("HTTP/1.1 200").count();
    assert!(answers < asked, "{answers}");
}

#[test]
fn who_says_nothing_loses_its_place() {
    let backend = Backend::start(&[]);
    let begun = Instant::now();
    let mut silent = backend.connect();
    let mut idle = backend.connect();
    idle.write_all(b"GET /v1/log-level HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    let mut answer = String::new();
    idle.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(18));
}

#[test]
fn clients_beyond_the_bound_wait_for_a_place() {
    let backend = Backend::start(&[]);
    let held: Vec<_> = (0..32).map(|_| backend.connect()).collect();
    let begun = Instant::now();
    let answers: Vec<_> = std::thread::scope(|all| {
        let asked: Vec<_> = (0..40).map(|_| all.spawn(|| backend.get("/v1/status").status)).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    assert_eq!(answers, [200; 40], "{:?}", begun.elapsed());
    drop(held);
}
