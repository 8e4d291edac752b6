//! The program as its users and managers start it: output, exit codes, words.

use std::process::{Command, Output};

fn vunet(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vunet")).args(args).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is UTF-8")
}

/// The flags of the command line, as `--help` shows them.
const FLAGS: [&str; 23] = [
    "--socket-path",
    "--fd",
    "--client",
    "--one-off",
    "--print-capabilities",
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
fn version_is_the_packages() {
    let output = vunet(&["--version"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(text(&output.stdout).trim(), concat!("vunet ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn usage_errors_end_with_2_and_name_flag_value_reason_and_remedy() {
    let cases: [(&[&str], &[&str]); 18] = [
        (&[], &["--socket-path", "--fd", "give"]),
        (&["--socket-path", "s", "extra"], &["'extra'"]),
        (&["--socket-path"], &["--socket-path <PATH>", "value is required"]),
        (&["--socket-path", "s", "--mac", "x"], &["--mac", "'x'", "not a MAC", "52:54:00:12:34:56"]),
        (&["--socket-path", "s", "--ip-mtu", "68"], &["--ip-mtu", "'68'", "576 to 65521"]),
        (&["--socket-path", "s", "--subnet", "10.0.2.7/24"], &["--subnet", "10.0.2.7", "10.0.2.0/24"]),
        (&["--socket-path", "s", "--gateway", "10.0"], &["--gateway", "'10.0'", "10.0.2.1"]),
        (
            &["--socket-path", "s", "--publish", "[::1]:80:80"],
            &["--publish", "[::1]:80:80", "IPv6 is not offered"],
        ),
        (&["--socket-path", "s", "--mode", "routed"], &["--mode", "'routed'", "host-only"]),
        (&["--socket-path", "s", "--mode", "bridge"], &["--mode bridge", "--uplink bridge=BRIDGE"]),
        (&["--socket-path", "s", "--uplink", "veth"], &["--uplink", "'veth'", "sockets", "bridge=BRIDGE"]),
        (&["--socket-path", "s", "--uplink", "tap"], &["--uplink tap", "--mode bridge", "drop"]),
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
fn flags_of_later_versions_are_absent_not_ignored() {
    for flag in ["--control", "--pcap", "--nat", "--network", "--config", "--subnet6", "--no-ipv6"] {
        let output = vunet(&["--socket-path", "s", flag]);
        assert_eq!(output.status.code(), Some(2), "{flag}");
        assert!(text(&output.stderr).contains("unexpected argument"), "{flag}");
    }
}
