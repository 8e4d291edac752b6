//! Which addresses are the host's own, whatever its settings.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;

use vunet::engine::host_net::HostNet;

use crate::Uplink;

/// Set in the copy of this test that runs in a network namespace of its own.
const INSIDE: &str = "VUNET_TEST_INSIDE_NAMESPACE";

fn own(uplink: &mut Uplink, addr: [u8; 4]) -> bool {
    uplink.net.is_own_address(IpAddr::V4(Ipv4Addr::from(addr)))
}

#[test]
fn loopback_is_the_hosts_own_and_addresses_of_documentation_are_not() {
    let mut uplink = Uplink::new(true);
    assert!(own(&mut uplink, [127, 0, 0, 1]));
    for foreign in [[192, 0, 2, 1], [198, 51, 100, 1], [203, 0, 113, 1], [8, 8, 8, 8]] {
        assert!(!own(&mut uplink, foreign), "{foreign:?}");
    }
}

#[test]
fn own_addresses_are_known_where_any_address_may_be_bound() {
    if std::env::var_os(INSIDE).is_some() {
        let mut uplink = Uplink::new(true);
        for (addr, expected) in [
            ([127, 0, 0, 1], true),
            ([127, 9, 9, 9], true),
            ([198, 51, 100, 7], true),
            ([192, 0, 2, 1], false),
            ([8, 8, 8, 8], false),
        ] {
            assert_eq!(own(&mut uplink, addr), expected, "{addr:?}");
        }
        // What was answered is remembered until the host's addresses change.
        for (change, expected) in [("add", true), ("del", false), ("add", true)] {
            let status = Command::new("ip").args(["addr", change, "192.0.2.1/32", "dev", "lo"]).status();
            assert!(status.is_ok_and(|status| status.success()), "ip addr {change}");
            assert_eq!(own(&mut uplink, [192, 0, 2, 1]), expected, "after {change}");
            assert!(own(&mut uplink, [198, 51, 100, 7]));
        }
        return;
    }
    let script = "ip link set lo up && ip addr add 198.51.100.7/32 dev lo \
                  && echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind || exit 77; exec \"$0\" \"$@\"";
    let test = std::env::current_exe().expect("this test's own path");
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", script])
        .arg(test)
        .args(["--exact", "hosts::own_addresses_are_known_where_any_address_may_be_bound"])
        .env(INSIDE, "1")
        .status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => {}
        Ok(Some(77)) | Err(_) => eprintln!("skipped: no network namespace to be had here"),
        other => panic!("{other:?}"),
    }
}
