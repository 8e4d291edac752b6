//! `docs/openapi.json` is what the server serves.

use std::path::Path;

use vunet::control::api;

/// Set to write the file anew.
const WRITE: &str = "VUNET_WRITE_OPENAPI";

#[test]
fn file_in_docs_is_the_servers_description() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let served = serde_json::to_string_pretty(&api::description()).unwrap() + "\n";
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &served).unwrap();
    }
    let file = std::fs::read_to_string(&path).unwrap();
    assert!(file == served, "docs/openapi.json is not what is served; write it anew with {WRITE}=1");
}
