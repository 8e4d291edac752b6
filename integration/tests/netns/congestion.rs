//! Explicit congestion notification: the guest has it where the host's socket has it with its peer.

use vunet_integration::lab;
use vunet_integration::world::ports;

use crate::bench::{Setup, ensure, scenario};

#[test]
fn ecn_is_agreed_on_with_the_guest_where_the_hosts_side_has_it() {
    scenario(&Setup::new(), |bench| {
        bench.lab.guest.sysctl("net.ipv4.tcp_ecn", "1")?;
        for (host_asks, expected) in [("1", true), ("0", false)] {
            bench.lab.host.sysctl("net.ipv4.tcp_ecn", host_asks)?;
            let stream = bench.connect_world(ports::SINK)?;
            let has_it = lab::has_ecn(&stream)?;
            ensure!(has_it == expected, "the host asks: {host_asks}; the guest has it: {has_it}");
        }
        Ok(())
    });
}
