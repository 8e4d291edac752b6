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
