//! The tests that `docs/` names exist: a renamed or deleted one must not go on being a promise.

use std::fs;
use std::path::{Path, PathBuf};

const DOCUMENTS: [&str; 7] =
    ["capture.md", "tcp.md", "udp-icmp.md", "dns.md", "leases.md", "publishing.md", "known-failures.md"];

/// Every Rust file below `dir`, with its text.
fn sources(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("text");
            found.push((path, text));
        }
    }
}

/// The file and test that stand between two backquotes: `…/file::test`, or a sentence of a name alone.
fn named(quoted: &str) -> Option<(Option<&str>, &str)> {
    let is_name = |text: &str| text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let (file, test) = match quoted.rsplit_once("::") {
        Some((before, test)) => (before.rsplit(['/', ' ', ':']).next(), test),
        None => (None, quoted),
    };
    let is_test =
        is_name(test) && quoted != "file::test" && (file.is_some() || test.matches('_').count() > 2);
    is_test.then_some((file.map(|file| file.trim_end_matches(".rs")), test))
}

#[test]
fn every_test_the_documents_name_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for dir in ["src", "tests", "integration/tests"] {
        sources(&root.join(dir), &mut files);
    }
    let mut missing = Vec::new();
    let mut count = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(root.join("docs").join(document)).expect("a document");
        for (file, test) in text.split('`').skip(1).step_by(2).filter_map(named) {
            let exists = files.iter().any(|(path, source)| {
                let stem = path.file_stem().and_then(|stem| stem.to_str());
                // `dns::…` of some documents are of `tests/dns_forward.rs`.
                let is_file = |file| stem == Some(file) || (file == "dns" && stem == Some("dns_forward"));
                file.is_none_or(is_file) && source.contains(&format!("fn {test}("))
            });
            count += 1;
            if !exists {
                missing.push(format!("{document}: {test} in {file:?}"));
            }
        }
    }
    assert!(count > 200, "only {count} names were found");
    assert!(missing.is_empty(), "{missing:#?}");
}
