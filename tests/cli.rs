//! The program as its users and managers start it: output, exit codes, words.

use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

fn vunet(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vunet")).args(args).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// The flags of the command line, as `--help` shows them.
const FLAGS: [&str; 26] = [
    "--config",
    "--socket-path",
    "--fd",
    "--client",
    "--one-off",
    "--print-capabilities",
    "--network",
    "--state-dir",
    "--mode",
    "--uplink",
    "--mac",
    "--ip-mtu",
    "--subnet",
    "--gateway",
    "--guest-ip",
    "--publish",
    "--dns-server",
    "--dns-domain",
    "--dns-host",
    "--no-dns",
    "--no-dhcp",
    "--allow-host-loopback",
    "--udp-mapping",
    "--udp-filtering",
    "--log-level",
    "--log-format",
];

#[test]
fn capabilities_are_json_and_every_other_argument_is_ignored() {
    let with: [&[&str]; 4] = [
        &["--print-capabilities"],
        &["--socket-path", "x", "--print-capabilities"],
        &["--print-capabilities", "--fd=99", "--no-such-flag"],
        &["--mac", "nonsense", "--print-capabilities"],
    ];
    for args in with {
        let output = vunet(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(text(&output.stderr), "", "{args:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json, serde_json::json!({ "type": "net", "features": [] }));
    }
}

#[test]
fn help_shows_every_flag_and_the_examples_on_standard_output() {
    let output = vunet(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stderr), "");
    let help = text(&output.stdout);
    for flag in FLAGS {
        assert!(help.contains(flag), "{flag} is not in the help");
    }
    for part in ["share=on", "shared=on", "vhost_user=true", "Exit codes: 0"] {
        assert!(help.contains(part), "'{part}' is not in the help");
    }
    assert!(!help.contains("peek"), "a switch for tests is in the help");
}

#[test]
fn the_readme_explains_every_flag_of_the_help() {
    let output = vunet(&["--help"]);
    let readme = include_str!("../README.md");
    // The examples have flags of other programs.
    let help = text(&output.stdout).split("\nExamples:").next().unwrap_or_default();
    let flags: Vec<&str> = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--"))
        .filter_map(|line| line.split([' ', ',']).next())
        .collect();
    assert!(flags.len() > 30, "{flags:?}");
    for flag in flags {
        let rows = [format!("| `--{flag}`"), format!("| `--{flag} ")];
        let is_there = rows.iter().any(|row| readme.lines().any(|line| line.starts_with(row)));
        assert!(is_there, "README.md's table has no --{flag}");
    }
}

#[test]
fn version_is_the_packages() {
    let output = vunet(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout).trim(), concat!("vunet ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn usage_errors_end_with_2_and_name_flag_value_reason_and_remedy() {
    let cases: [(&[&str], &[&str]); 20] = [
        (&[], &["--socket-path", "--fd", "give"]),
        (&["--socket-path", "s", "extra"], &["'extra'"]),
        (&["--socket-path"], &["--socket-path <PATH>", "value is required"]),
        (&["--socket-path", "s", "--mac", "x"], &["--mac", "'x'", "not a MAC", "52:54:00:12:34:56"]),
        (&["--socket-path", "s", "--ip-mtu", "68"], &["--ip-mtu", "'68'", "576 to 65521"]),
        (&["--socket-path", "s", "--subnet", "10.0.2.7/24"], &["--subnet", "10.0.2.7", "10.0.2.0/24"]),
        (&["--socket-path", "s", "--gateway", "10.0"], &["--gateway", "'10.0'", "10.0.2.1"]),
        (
            &["--socket-path", "s", "--publish", "[::]:80:80"],
            &["--publish", "[::]:80:80", "guests speak IPv4"],
        ),
        (&["--socket-path", "s", "--mode", "routed"], &["--mode", "'routed'", "host-only"]),
        (&["--socket-path", "s", "--mode", "bridge"], &["--mode bridge", "--uplink bridge=BRIDGE"]),
        (&["--socket-path", "s", "--uplink", "veth"], &["--uplink", "'veth'", "sockets", "bridge=BRIDGE"]),
        (
            &["--socket-path", "s", "--mode", "none", "--uplink", "tap"],
            &["--uplink tap", "--mode nat or bridge", "drop"],
        ),
        (
            &["--socket-path", "s", "--nat", "packet"],
            &["--nat packet", "needs a link", "--uplink bridge=BRIDGE"],
        ),
        (&["--socket-path", "s", "--nat-address", "dhcp"], &["--nat-address", "needs --nat packet", "drop"]),
        (&["--socket-path", "s", "--mode", "none", "--publish", "1:1"], &["--publish", "none", "--mode nat"]),
        (&["--socket-path", "s", "--log-level", "loud"], &["--log-level", "'loud'", "debug"]),
        (
            &["--socket-path", "s", "--udp-mapping", "symmetric"],
            &["--udp-mapping", "'symmetric'", "address-and-port-dependent"],
        ),
        (
            &["--socket-path", "s", "--mode", "none", "--udp-filtering", "address-dependent"],
            &["--udp-filtering", "none", "--mode nat"],
        ),
        (&["--fd", "9"], &["--fd 9", "no such descriptor", "parent"]),
        (&["--fd", "nine"], &["--fd", "'nine'", "such as 3"]),
    ];
    for (args, parts) in cases {
        let output = vunet(args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {error}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
        assert!(error.starts_with("error: "), "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: '{part}' is not in: {error}");
        }
    }
}

#[test]
fn why_it_did_not_start_is_told_in_the_logs_form_whatever_its_level() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    for (args, code, part) in [
        (&["--socket-path", file][..], 1, "the path exists and is not a socket"),
        (&["--socket-path", file, "--fd", "9"], 2, "both say how the VM attaches"),
    ] {
        for level in ["off", "trace", "nothing=error"] {
            let args = [args, &["--log-format", "json", "--log-level", level]].concat();
            let output = vunet(&args);
            assert_eq!(output.status.code(), Some(code), "{args:?}");
            let last = text(&output.stderr).lines().last().expect("a reason");
            let told: serde_json::Value = serde_json::from_str(last).expect("an object");
            assert_eq!(told["level"], "ERROR");
            assert!(told["fields"]["message"].as_str().unwrap().contains(part), "{told}");
        }
        let output = vunet(&[args, &["--log-level", "off"]].concat());
        assert!(text(&output.stderr).starts_with("error: ") && text(&output.stderr).contains(part));
    }
    let same = vunet(&["--socket-path", file, "--control", file]);
    assert_eq!(same.status.code(), Some(2), "{}", text(&same.stderr));
}

#[test]
fn flags_of_later_versions_are_absent_not_ignored() {
    for flag in ["--subnet6", "--no-ipv6"] {
        let output = vunet(&["--socket-path", "s", flag]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(text(&output.stderr).contains("unexpected argument"), "{flag}");
    }
}

/// The program with a state directory of its own.
fn network(state_dir: &std::path::Path, line: &str) -> (i32, String, String) {
    let words = ["network"].into_iter().chain(line.split(' '));
    let output = Command::new(env!("CARGO_BIN_EXE_vunet"))
        .args(words)
        .arg("--state-dir")
        .arg(state_dir)
        .output()
        .expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    (output.status.code().expect("an exit code"), text(output.stdout), text(output.stderr))
}

#[test]
fn networks_are_made_listed_shown_and_removed() {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let run = |line: &str| network(place.path(), line);
    let (code, out, err) = run("create lab --subnet 10.77.1.0/24 --ip-mtu 1400 --isolate");
    assert_eq!((code, &*err), (0, ""));
    assert_eq!(out, "created network lab: nat, subnet 10.77.1.0/24, gateway 10.77.1.1, guests isolated\n");
    assert_eq!(run("create alone --mode host-only --subnet 10.77.2.0/24 --gateway 10.77.2.9").0, 0);
    assert_eq!(run("create wire --mode bridge --bridge br0").0, 0);
    let (code, out, _) = run("list");
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(code, 0);
    assert_eq!(rows[0], ["NAME", "MODE", "SUBNET", "BRIDGE", "USERS"]);
    assert_eq!(rows[1][..3], ["alone", "host-only", "10.77.2.0/24"]);
    assert_eq!(rows[2][..3], ["lab", "nat", "10.77.1.0/24"]);
    assert_eq!(rows[3], ["wire", "bridge", "-", "br0", "0"]);
    let (code, out, _) = run("inspect lab --json");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, 0);
    for (key, value) in [("state", "down"), ("gateway", "10.77.1.1"), ("dns_domain", "lab.vunet.internal")] {
        assert_eq!(json[key], value, "{out}");
    }
    assert_eq!((&json["ip_mtu"], &json["isolate"]), (&1400.into(), &true.into()));
    assert_eq!(json["bridge"], format!("vn-{}", json["id"].as_str().unwrap()));
    let (_, out, _) = run("inspect alone");
    assert!(out.contains("gateway      10.77.2.9") && out.contains("state        down"), "{out}");
    assert_eq!(run("remove lab"), (0, "removed network lab\n".to_owned(), String::new()));
    assert_eq!(run("list").1.lines().count(), 3);
    assert_eq!(run("create lab --subnet 10.77.1.0/24").0, 0, "the name is free again");
}

#[test]
fn a_signal_ends_a_start_that_waits_for_its_network() {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    assert_eq!(network(place.path(), "create lab --subnet 10.77.1.0/24").0, 0);
    let run = place.path().join("networks/lab/run");
    std::fs::create_dir_all(&run).unwrap();
    let lock = std::fs::File::create(run.join("lock")).unwrap();
    lock.lock().unwrap();
    let (socket, control) = (place.path().join("s"), place.path().join("c"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_vunet"))
        .args(["--network", "lab", "--state-dir", place.path().to_str().unwrap()])
        .args(["--socket-path", socket.to_str().unwrap(), "--control", control.to_str().unwrap()])
        .spawn()
        .unwrap();
    // Its control socket comes just before it joins.
    let end = Instant::now() + Duration::from_secs(20);
    while !control.exists() {
        assert!(Instant::now() < end && child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!control.exists() && !socket.exists());
}

#[test]
fn addresses_of_a_network_are_kept_for_clients_and_shown() {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let run = |line: &str| network(place.path(), line);
    let reserve = "--reserve 52:54:00:00:00:01=10.77.1.9,db --reserve id:ff01=10.77.1.10";
    assert_eq!(run(&format!("create lab --subnet 10.77.1.0/24 {reserve}")).0, 0);
    let (_, out, _) = run("inspect lab");
    assert!(out.contains("reserved     10.77.1.9 for 52:54:00:00:00:01, db\n"), "{out}");
    assert!(out.contains("reserved     10.77.1.10 for id:ff01\n"), "{out}");
    let (_, out, _) = run("inspect lab --json");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["reservations"][0]["host_name"], "db", "{out}");
    assert_eq!(
        (json["leases"].as_array().unwrap().len(), json["reservations"].as_array().unwrap().len()),
        (0, 2)
    );
    // What cannot be kept leaves no network behind.
    for (line, part) in [
        ("--reserve 52:54:00:00:00:01=10.99.1.9", "reservation of 10.99.1.9: not a guest's address"),
        ("--reserve 52:54:00:00:00:01=10.77.2.1", "gateway 10.77.2.1"),
        ("--reserve 52:54:00:00:00:01=10.77.2.9,wpad", "no name a guest can have"),
        (
            "--reserve 52:54:00:00:00:01=10.77.2.9 --reserve 52:54:00:00:00:02=10.77.2.9",
            "kept for 52:54:00:00:00:01",
        ),
        ("--reserve 10.77.2.9", "MAC=IP"),
    ] {
        let (code, _, err) = run(&format!("create web --subnet 10.77.2.0/24 {line}"));
        assert_eq!(code, 2, "{line}: {err}");
        assert!(err.contains("--reserve") && err.contains(part), "{line}: '{part}' is not in: {err}");
        assert!(run("inspect web").2.contains("no network web"), "{line}");
    }
    let bridge = "create web --mode bridge --bridge br0 --reserve 52:54:00:00:00:01=10.77.2.9";
    assert!(run(bridge).2.contains("--reserve has no meaning with --mode bridge"));
}

#[test]
fn errors_about_networks_name_what_is_wrong_and_what_to_do() {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let run = |line: &str| network(place.path(), line);
    assert_eq!(run("create lab --subnet 10.77.1.0/24").0, 0);
    for (line, parts) in [
        ("create lab", &["network lab already", "vunet network remove lab"][..]),
        ("create Lab", &["\"Lab\" is no name", "lower-case"]),
        ("create web --subnet 10.77.0.0/16", &["10.77.0.0/16", "10.77.1.0/24 of network lab", "another"]),
        ("create web --subnet 10.78.0.0/24 --gateway 10.79.0.1", &["--gateway 10.79.0.1", "10.78.0.0/24"]),
        ("create web --mode bridge", &["--mode bridge needs --bridge NAME"]),
        ("create web --mode bridge --bridge a/b", &["--bridge \"a/b\"", "15 characters"]),
        (
            "create web --mode bridge --bridge br0 --subnet 10.78.0.0/24",
            &["--subnet", "--mode bridge", "drop it"],
        ),
        ("create web --bridge br0", &["--bridge", "--mode nat", "its own"]),
        ("create web --mode host-only --allow-host", &["--allow-host", "host-only", "drop it"]),
        ("create web --dns-domain x.local", &["--dns-domain", ".local"]),
        ("inspect web", &["no network web", "there is lab", "vunet network create web"]),
        ("remove web", &["no network web"]),
    ] {
        let (code, out, err) = run(line);
        assert_eq!((code, &*out), (2, ""), "{line}: {err}");
        for part in parts {
            assert!(err.contains(part), "{line}: '{part}' is not in: {err}");
        }
    }
    let (code, _, err) = network(std::path::Path::new("/dev/shm/vunet-state"), "list");
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("tmpfs") && err.contains("--state-dir"), "{err}");
}

#[test]
fn flags_that_a_named_network_decides_are_refused_with_it_and_others_are_not() {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    for line in [
        "create lab --subnet 10.77.1.0/24",
        "create quiet --mode host-only --subnet 10.77.2.0/24",
        "create wire --mode bridge --bridge br0",
    ] {
        assert_eq!(network(place.path(), line).0, 0, "{line}");
    }
    let state = place.path().to_str().unwrap();
    for (name, flag, parts) in [
        ("lab", "--mode nat", &["--mode", "--network lab", "definition", "drop it"][..]),
        ("lab", "--ip-mtu 1500", &["--ip-mtu", "definition"]),
        ("lab", "--subnet 10.0.2.0/24", &["--subnet"]),
        ("lab", "--gateway 10.77.1.1", &["--gateway"]),
        ("lab", "--dns-domain lan", &["--dns-domain"]),
        ("lab", "--uplink sockets", &["--uplink", "bridge"]),
        ("lab", "--allow-host-loopback", &["--allow-host-loopback", "--allow-host"]),
        ("lab", "--udp-mapping endpoint-independent", &["--udp-mapping", "kernel"]),
        ("lab", "--vlan 7", &["--vlan", "one network"]),
        ("lab", "--guest-ip 10.0.2.9", &["--guest-ip 10.0.2.9", "10.77.1.0/24"]),
        ("lab", "--guest-ip 10.77.1.1", &["--guest-ip 10.77.1.1", "gateway"]),
        ("lab", "--no-dhcp", &["--no-dhcp", "--guest-ip IP", "--trust-guest"]),
        ("quiet", "--publish 80:80", &["--publish", "--network quiet"]),
        ("quiet", "--dns-server 192.0.2.1", &["--dns-server", "local names"]),
        ("wire", "--publish 80:80", &["--publish", "address of its own"]),
        ("wire", "--no-dns", &["--no-dns"]),
        ("none", "--one-off", &["no network none", "lab, quiet, wire", "vunet network create none"]),
        ("Lab", "--one-off", &["--network", "lower-case"]),
    ] {
        let line = format!("--socket-path s --state-dir {state} --network {name} {flag}");
        let output = vunet(&line.split(' ').collect::<Vec<_>>());
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {error}");
        for part in parts {
            assert!(error.contains(part), "{line}: '{part}' is not in: {error}");
        }
    }
}

#[test]
fn pages_and_completions_are_printed_and_what_is_none_is_refused() {
    let output = vunet(&["man", "network", "create"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains(".TH vunet-network-create 1"), "{}", text(&output.stdout));
    let output = vunet(&["completions", "bash"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stdout).contains("complete -F _vunet"), "{}", text(&output.stdout));
    for (args, part) in [
        (&["man", "networks"][..], "no command 'networks'"),
        (&["completions", "csh"], "'csh'"),
        (&["completions"], "<SHELL>"),
    ] {
        let output = vunet(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).contains(part), "{args:?}: {}", text(&output.stderr));
    }
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("man1");
    let output = vunet(&["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(dir.join("vunet.1").exists() && dir.join("vunet-network-remove.1").exists());
}

#[test]
fn bash_completes_values_behind_a_space_and_an_equals_sign() {
    let script = vunet(&["completions", "bash"]).stdout;
    let completed = |words: &str, before: &str, word: &str| {
        let words = format!(
            "{}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n_vunet vunet '{word}' '{before}'\n\
             echo \"${{COMPREPLY[@]}}\"",
            text(&script)
        );
        let output = Command::new("bash").args(["-c", &words]).output().expect("bash");
        text(&output.stdout).trim_end().to_owned()
    };
    assert_eq!(completed("vunet --mode h", "--mode", "h"), "host-only");
    assert_eq!(completed("vunet --mode = h", "=", "h"), "host-only");
    let all = "nat host-only none bridge";
    for word in ["", "="] {
        assert_eq!(completed("vunet --mode =", "--mode", word), all, "{word}");
    }
}

#[test]
fn a_doctors_exit_code_says_whether_the_run_can_start() {
    let folder = tempfile::tempdir().unwrap();
    let doctor = |socket: &str, more: &[&str]| {
        let path = folder.path().join(socket).display().to_string();
        let mut args = vec!["doctor", "--mode", "host-only", "--socket-path", &path];
        args.extend(more);
        vunet(&args)
    };
    let good = doctor("vm.sock", &["--json"]);
    assert_eq!((good.status.code(), text(&good.stderr)), (Some(0), ""));
    let json: serde_json::Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!((&json["asked"], &json["ready"]), (&"host-only".into(), &true.into()));
    let bad = doctor("no/vm.sock", &[]);
    assert_eq!(bad.status.code(), Some(1));
    let words = text(&bad.stdout);
    assert!(words.contains("missing socket") && words.contains("fix: mkdir -p"), "{words}");
    // The other sockets of a run, and what is handed down to it.
    let control = folder.path().join("no/ctl").display().to_string();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics = taken.local_addr().unwrap().to_string();
    for (more, code, part) in [
        (&["--control", &control][..], 1, "missing control socket"),
        (&["--metrics", &metrics], 1, "missing metrics"),
        (&["--metrics", "198.18.77.1:5"], 1, "missing metrics"),
    ] {
        let output = doctor("vm.sock", more);
        assert_eq!(output.status.code(), Some(code), "{more:?}");
        let words = text(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains(part), "{words}");
    }
    for line in ["--mode host-only --fd 77", "--mode bridge --uplink tap-fd=77", "--uplink tap-fd=77"] {
        let words: Vec<&str> = ["doctor"].into_iter().chain(line.split(' ')).collect();
        let output = vunet(&words);
        assert_eq!(output.status.code(), Some(2), "{line}: {}", text(&output.stdout));
        assert!(text(&output.stderr).contains("77: no such descriptor"), "{}", text(&output.stderr));
    }
    let wrong = doctor("vm.sock", &["--publish", "80:80"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong.stdout));
    assert!(text(&wrong.stderr).contains("--publish"));
}
