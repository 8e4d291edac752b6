//! News of the host's network as this kernel tells them, in a namespace of its own.

use std::io;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use vunet::uplink::host_news::{Change, HostNews};

use crate::PATIENCE;

/// Set in the copy of this test that runs in a network namespace of its own.
const INSIDE: &str = "VUNET_TEST_INSIDE_NAMESPACE";

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status();
    assert!(status.is_ok_and(|status| status.success()), "ip {words}");
}

/// What was told until it was silent for a while.
fn told(news: &mut HostNews) -> Change {
    let mut all = Change::default();
    let mut silent_since = Instant::now();
    while silent_since.elapsed() < Duration::from_millis(100) {
        match news.read() {
            Ok(change) => {
                all.way |= change.way;
                all.address_gone |= change.address_gone;
                silent_since = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(2)),
            Err(error) => panic!("{error}"),
        }
    }
    all
}

const NOTHING: Change = Change { way: false, address_gone: false };
const WAY: Change = Change { way: true, address_gone: false };
const GONE: Change = Change { way: true, address_gone: true };

fn inside() {
    ip("link add one type veth peer name two");
    ip("link set two up");
    ip("link set one up");
    ip("addr add 192.0.2.1/24 dev one");
    ip("route add default via 192.0.2.2");
    let mut news = HostNews::new().expect("a netlink socket");
    let start = Instant::now();
    while !news.is_ready() {
        assert!(start.elapsed() < PATIENCE, "what there is was never told to its end");
        let _ = news.read();
    }
    // Duplicate address detection of the link's own addresses, if there is IPv6.
    sleep(Duration::from_millis(100));
    assert_eq!(told(&mut news), NOTHING, "what there was before is no news");
    for (words, expected) in [
        ("addr change 192.0.2.1/24 dev one valid_lft 1000 preferred_lft 900", NOTHING),
        ("link set one alias something", NOTHING),
        ("link add three type veth peer name four", NOTHING),
        ("link set three up", NOTHING),
        ("link set four up", NOTHING),
        ("link del three", NOTHING),
        ("addr add 169.254.7.7/16 scope link dev one", WAY),
        ("addr add 192.0.2.3/32 dev one", WAY),
        ("addr del 192.0.2.3/32 dev one", GONE),
        ("route replace default via 192.0.2.3", WAY),
        ("route replace default via 192.0.2.2", WAY),
        ("route add 10.0.0.0/8 via 192.0.2.2", WAY),
        ("route del 10.0.0.0/8", WAY),
        ("rule add fwmark 7 table 7", WAY),
        ("link set one down", WAY),
        ("link set one up", WAY),
        ("route add default via 192.0.2.2", WAY),
        ("link del one", GONE),
    ] {
        ip(words);
        assert_eq!(told(&mut news), expected, "ip {words}");
    }
}

#[test]
fn every_change_of_the_way_to_the_world_is_told_and_nothing_else() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let script = "ip link set lo up && ip link add probe type veth peer name probed && ip link del probe \
                  || exit 77; exec \"$0\" \"$@\"";
    let test = std::env::current_exe().expect("this test's own path");
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", script])
        .arg(test)
        .args([
            "--exact",
            "news::every_change_of_the_way_to_the_world_is_told_and_nothing_else",
            "--nocapture",
        ])
        .env(INSIDE, "1")
        .status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => {}
        Ok(Some(77)) | Err(_) => eprintln!("skipped: no network namespace with a veth to be had here"),
        other => panic!("{other:?}"),
    }
}
