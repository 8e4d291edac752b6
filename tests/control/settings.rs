//! Settings that change while the process runs, as the control API shows them.

use std::fs;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use crate::backend::Backend;

/// A backend whose settings `file` says.
fn start(file: &Path) -> Backend {
    Backend::start(&["--config", file.to_str().unwrap()])
}

#[test]
fn settings_that_became_a_pipe_hold_nothing_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    fs::write(&file, "log-level = 'info'\n").unwrap();
    let mut backend = start(&file);
    fs::remove_file(&file).unwrap();
    mknodat(CWD, &file, FileType::Fifo, Mode::RUSR, 0).unwrap();
    backend.reload();
    backend.says("not a file", 1);
    fs::remove_file(&file).unwrap();
    fs::write(&file, "log-level = 'warn'\n").unwrap();
    backend.reload();
    let level = || backend.get("/v1/log-level").body;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while level() != json!({ "level": "warn" }) {
        assert!(std::time::Instant::now() < deadline, "it is read again: {}", level());
    }
    assert_eq!(backend.ask("POST", "/v1/stop", None).status, 202);
    assert_eq!(backend.ended(), Some(0));
}

/// Ports of the host that lead to the guest, and where.
fn ports(backend: &Backend) -> Vec<(u64, u64)> {
    let list = backend.get("/v1/ports").body;
    let list = list["ports"].as_array().expect("a list");
    list.iter()
        .map(|port| (port["host_port"].as_u64().unwrap(), port["guest_port"].as_u64().unwrap()))
        .collect()
}

#[test]
fn ports_of_the_settings_come_and_go_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    let set = |text: &str| fs::write(&file, text).unwrap();
    set("publish = ['127.0.0.1:0:80', '127.0.0.1:0:81']\n");
    let backend = start(&file);
    let at_start = ports(&backend);
    assert_eq!(backend.ask("POST", "/v1/ports", Some("{\"publish\":\"127.0.0.1:0:82\"}")).status, 201);
    let by_hand = ports(&backend)[2];
    // One is kept as it is, one goes, one comes by another key.
    set("publish = ['127.0.0.1:0:80']\nudp-ports = ['127.0.0.1/0:53']\n");
    backend.reload();
    backend.says("settings read again", 1);
    let now = ports(&backend);
    assert_eq!(now[..2], [at_start[0], by_hand]);
    assert_eq!((now.len(), now[2].1), (3, 53));
    let gone = std::net::TcpListener::bind(("127.0.0.1", at_start[1].0 as u16));
    assert!(gone.is_ok(), "its socket is closed");
    // What cannot be published changes nothing, the level least of all.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap();
    set(&format!("log-level = 'warn'\npublish = ['127.0.0.1:0:90', '{host}:80']\n"));
    backend.reload();
    backend.says("settings stay as they are", 1);
    assert_eq!(ports(&backend), now);
    assert_eq!(backend.get("/v1/log-level").body, json!({ "level": "info" }));
    drop(taken);
    // A port of the host leads elsewhere.
    set(&format!("publish = ['{host}:80']\n"));
    backend.reload();
    backend.says("settings read again", 2);
    assert_eq!(ports(&backend), [by_hand, (host.port().into(), 80)]);
    set(&format!("publish = ['{host}:81', '{host}:82']\n"));
    backend.reload();
    backend.says("publish each host port once", 1);
    set(&format!("publish = ['{host}:81']\n"));
    backend.reload();
    backend.says("settings read again", 3);
    assert_eq!(ports(&backend), [by_hand, (host.port().into(), 81)]);
    // One that was in the way comes back if the others cannot.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let other = taken.local_addr().unwrap();
    set(&format!("publish = ['{host}:83', '{other}:84']\n"));
    backend.reload();
    backend.says("settings stay as they are", 3);
    assert_eq!(ports(&backend), [by_hand, (host.port().into(), 81)]);
}

#[test]
fn where_no_port_leads_to_the_guest_none_can_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    fs::write(&file, "mode = 'host-only'\n").unwrap();
    let backend = start(&file);
    fs::write(&file, "mode = 'host-only'\npublish = ['80:80']\n").unwrap();
    backend.reload();
    backend.says("no port of this host leads to the guest", 1);
    assert_eq!(ports(&backend), []);
}
