//! Clients that send too much, too slowly or nonsense cost themselves only.

use std::io::{Read as _, Write as _};
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

#[test]
fn clients_beyond_the_bound_wait_for_a_place() {
    let backend = Backend::start(&[]);
    let mut held: Vec<_> = (0..32).map(|_| backend.connect()).collect();
    for stream in &mut held {
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
    }
    let mut waiting = backend.connect();
    waiting.write_all(b"GET /v1/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    waiting.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(waiting.read(&mut [0]).is_err(), "no place is free");
    drop(held);
    waiting.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
