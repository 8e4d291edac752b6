//! What `contrib/` holds is true of the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use vunet::cli::{self, CAPABILITIES, Command};

fn contrib() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib")
}

fn read(name: &str) -> String {
    fs::read_to_string(contrib().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The values of a key of a unit.
fn values<'a>(unit: &'a str, key: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
}

#[test]
fn the_back_end_file_has_the_fields_of_the_conventions_and_says_what_the_program_says() {
    let json: serde_json::Value = serde_json::from_str(&read("50-vunet.json")).unwrap();
    let object = json.as_object().unwrap();
    // VhostUserBackend of QEMU's docs/interop/vhost-user.json; tags are optional.
    let keys: BTreeSet<_> = object.keys().map(String::as_str).collect();
    assert_eq!(keys, BTreeSet::from(["binary", "description", "tags", "type"]));
    assert!(object["description"].is_string());
    assert!(object["tags"].as_array().unwrap().iter().all(serde_json::Value::is_string));
    let said: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
    assert_eq!(object["type"], said["type"]);
    // The path that the package and the unit have.
    assert_eq!(object["binary"], "/usr/bin/vunet");
    assert!(values(&read("systemd/vunet@.service"), "ExecStart")[0].starts_with("/usr/bin/vunet --config "));
}

#[test]
fn the_example_of_settings_is_taken_with_a_socket_of_its_own() {
    let path = contrib().join("vunet.toml");
    let line = ["vunet", "--config", path.to_str().unwrap(), "--socket-path", "vm.sock"];
    let Command::Run(args) = cli::parse(line.map(Into::into)).unwrap() else { panic!("not a backend") };
    let (config, _) = args.into_config(Ok(Vec::new())).unwrap();
    assert_eq!(config.lan.guest, Some("10.0.2.15".parse().unwrap()));
    assert_eq!(config.dns.hosts[0].0, "db.vunet.internal");
}

#[test]
fn the_units_belong_together_and_to_the_other_examples() {
    let (socket, service) = (read("systemd/vunet@.socket"), read("systemd/vunet@.service"));
    // One: vunet takes no more.
    assert_eq!(values(&socket, "ListenStream"), ["%t/vunet/%i.sock"]);
    assert_eq!(values(&service, "Requires"), ["vunet@%i.socket"]);
    assert_eq!(values(&service, "Type"), ["notify"]);
    assert_eq!(values(&service, "WatchdogSec").len(), 1);
    assert!(read("libvirt/domain.xml").contains("path='/run/vunet/vm1.sock'"));
}

#[test]
fn every_file_is_spoken_of_and_every_file_spoken_of_is_there() {
    fn files(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { files(&path, found) } else { found.push(path) }
        }
    }
    let readme = read("README.md");
    let mut found = Vec::new();
    files(&contrib(), &mut found);
    for path in found {
        let name = path.strip_prefix(contrib()).unwrap().to_str().unwrap();
        let folder = name.split_once('/').map_or("-", |(folder, _)| folder);
        let is_named = [name, &format!("{folder}/")].iter().any(|name| readme.contains(&format!("`{name}`")));
        assert!(is_named || name == "README.md", "contrib/README.md does not speak of {name}");
    }
    for name in readme.split('`').skip(1).step_by(2).filter(|name| name.contains('.') || name.ends_with('/'))
    {
        let root = contrib();
        let is_there = [root.join(name), root.parent().unwrap().join(name)].iter().any(|path| path.exists());
        assert!(is_there, "{name} is not there");
    }
}
