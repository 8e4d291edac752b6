//! A host of a test's own: the test runs again as a process in a fresh network namespace.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use vunet::network::state_dir::StateDir;

/// Set in the copy of a test that runs in a network namespace of its own.
const INSIDE: &str = "VUNET_TEST_INSIDE_NAMESPACE";

/// Runs `body` of the test `name` in a namespace that has a veth pair `up0` (192.0.2.1/24, default route) and
/// `up1`. Without root or `nft` it says so and is skipped; in CI that is a failure.
pub(crate) fn on_a_host(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        for words in [
            "link set lo up",
            "link add up0 type veth peer name far0",
            "link add up1 type veth peer name far1",
            "addr add 192.0.2.1/24 dev up0",
            "addr add 198.51.100.1/24 dev up1",
            "link set up0 up",
            "link set far0 up",
            "link set up1 up",
            "link set far1 up",
            "route add default via 192.0.2.2",
        ] {
            run("ip", words);
        }
        await_carrier();
        return body();
    }
    let ready = Command::new("unshare").args(["-n", "nft", "list", "ruleset"]).output();
    if !ready.is_ok_and(|output| output.status.success()) {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "SKIPPED {name}: needs root, unshare and nft");
        return eprintln!("SKIPPED {name}: needs root, unshare and nft");
    }
    let exe = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new("unshare");
    command.arg("-n").arg(exe).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let output = command.output().expect("unshare runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

/// Waits until both links are up: on a busy machine the kernel settles that later, and the host's state would
/// differ by it.
fn await_carrier() {
    let deadline = Instant::now() + Duration::from_secs(10);
    while run("ip", "-o link show").matches("state UP").count() != 4 {
        assert!(Instant::now() < deadline, "the links stay down: {}", run("ip", "-o link show"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program that must succeed; what it printed.
pub(crate) fn run(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split(' ')).output().expect("the program runs");
    assert!(output.status.success(), "{program} {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Loads rules in nft's own language.
pub(crate) fn nft(rules: &str) {
    let output = Command::new("nft").arg(rules).output().expect("nft runs");
    assert!(output.status.success(), "nft {rules}: {}", String::from_utf8_lossy(&output.stderr));
}

/// All that a network could leave behind on the host: links, addresses, routes, rules, forwarding.
pub(crate) fn host_state() -> String {
    let mut state = run("ip", "-o link show") + &run("ip", "-o addr show") + &run("ip", "route show");
    state += &run("nft", "list ruleset");
    for interface in ["up0", "up1", "all", "default"] {
        state += &format!("{interface} {}", forwarding(interface));
    }
    // Statistics that go on by themselves, and link-local addresses that the kernel gives when it likes.
    state
        .lines()
        .filter(|line| !line.contains("fe80::"))
        .map(|line| line.split(" valid_lft").next().unwrap_or(line).to_owned() + "\n")
        .collect()
}

/// `net.ipv4.conf.INTERFACE.forwarding`.
pub(crate) fn forwarding(interface: &str) -> String {
    sysctl(&format!("ipv4/conf/{interface}/forwarding"))
}

/// A setting below `net`.
pub(crate) fn sysctl(path: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{path}")).expect("the setting exists").trim().to_owned()
}

/// Makes a setting below `net`.
pub(crate) fn set_sysctl(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).expect("the setting can be made");
}

/// A state directory on a disk, gone with what is returned.
pub(crate) fn state_dir() -> (tempfile::TempDir, StateDir) {
    let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).expect("a directory");
    let state = StateDir::open(PathBuf::from(place.path())).expect("it will do");
    (place, state)
}
