//! What `contrib/` holds is true of the program.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{self, Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

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
    // Without it all instances are one user.
    assert_eq!(values(&service, "User"), ["vunet-%i"]);
    // A service that is given up, or tried at once again, takes its socket with it.
    assert_eq!(values(&service, "StartLimitIntervalSec"), ["0"]);
    assert_eq!(values(&service, "RestartPreventExitStatus"), [""; 0]);
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

/// Longest wait for anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(20);
/// The scripts that start a VM beside a vunet: name, the variable with the VMM's program, words before and after flags of vunet.
const SCRIPTS: [(&str, &str, &[&str], &[&str]); 3] = [
    ("qemu.sh", "QEMU", &[], &["--", "-nographic"]),
    ("cloud-hypervisor.sh", "CLOUD_HYPERVISOR", &["kernel", "disk"], &[]),
    ("crosvm.sh", "CROSVM", &["kernel", "disk"], &[]),
];

/// One of the scripts at work, with the real vunet and a stand-in for the VMM.
struct Script {
    dir: tempfile::TempDir,
    child: Child,
}

impl Script {
    /// Starts it with `flags` for vunet; the stand-in, once it is up, does `vmm`.
    fn start(
        (name, variable, before, after): (&str, &str, &[&str], &[&str]),
        flags: &[&str],
        vmm: &str,
    ) -> Script {
        let dir = tempfile::tempdir().unwrap();
        let program = |name: &str, does: &str| {
            let path = dir.path().join(name);
            let note = dir.path().join(format!("{name}.pid"));
            fs::write(
                &path,
                format!("#!/bin/sh\necho $$ >{0}.new; mv {0}.new {0}\n{does}\n", note.display()),
            )
            .unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let vunet = program("vunet", &format!("exec {} \"$@\"", env!("CARGO_BIN_EXE_vunet")));
        let vmm = program("vmm", vmm);
        fs::create_dir(dir.path().join("tmp")).unwrap();
        // Each is started by its name and not through a shell, as users do.
        let child = process::Command::new(contrib().join(name))
            .args(before)
            .args(flags)
            .args(after)
            .env("VUNET", vunet)
            .env(variable, vmm)
            .env("TMPDIR", dir.path().join("tmp"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(dir.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        Script { dir, child }
    }

    /// The process id of `vunet` or `vmm`, once it is up.
    fn pid(&self, name: &str) -> String {
        let path = self.dir.path().join(format!("{name}.pid"));
        self.until(&format!("{name} is up"), || path.exists());
        fs::read_to_string(path).unwrap().trim().to_owned()
    }

    fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
            assert!(Instant::now() < end, "not in time: {what}: {log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end; nothing of it is left then.
    fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < end, "the script does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let left = fs::read_dir(self.dir.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "its folder is gone");
        status
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for name in ["vunet.pid", "vmm.pid"] {
            if let Ok(pid) = fs::read_to_string(self.dir.path().join(name)) {
                signal("KILL", pid.trim());
            }
        }
    }
}

fn signal(name: &str, pid: &str) {
    let _ = process::Command::new("kill").args(["-s", name, pid]).stderr(Stdio::null()).status();
}

/// Whether a process runs; one that ended and that nobody waited for does not.
fn is_running(pid: &str) -> bool {
    fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

#[test]
fn a_script_that_is_ended_ends_vunet_and_the_vm() {
    for script in SCRIPTS {
        let mut run = Script::start(script, &[], "exec sleep 60");
        let (vunet, vmm) = (run.pid("vunet"), run.pid("vmm"));
        signal("TERM", &run.child.id().to_string());
        assert_eq!(run.ended().code(), Some(143), "{}", script.0);
        run.until("both are gone", || !is_running(&vunet) && !is_running(&vmm));
    }
}

#[test]
fn a_script_ends_with_its_vm_and_as_that_ended() {
    for script in SCRIPTS {
        let mut run = Script::start(script, &[], "exit 7");
        assert_eq!(run.ended().code(), Some(7), "{}", script.0);
        let vunet = run.pid("vunet");
        run.until("vunet is gone", || !is_running(&vunet));
    }
}

#[test]
fn a_script_starts_no_vm_without_its_network() {
    for script in SCRIPTS {
        let mut run = Script::start(script, &["--colour"], "exec sleep 60");
        assert_eq!(run.ended().code(), Some(2), "{}", script.0);
        assert!(!run.dir.path().join("vmm.pid").exists(), "{} started the VMM", script.0);
    }
}
