//! Networks without privilege: everything here runs as an ordinary user without any capability.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;

use vunet_integration::lab::{Netns, SHORT};
use vunet_integration::world::ports;

use super::site::{Site, Vm, on_a_site, seen, until};
use crate::bench::{Failure, Outcome, PATIENCE, ensure};

/// As whom.
const USER: &[&str] = &[
    "setpriv",
    "--reuid",
    "65534",
    "--regid",
    "65534",
    "--clear-groups",
    "--no-new-privs",
    "--inh-caps=-all",
    "--ambient-caps=-all",
    "--bounding-set=-all",
];
/// In the lab's world.
const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Runs `body` on a site whose state directory is the user's, with the network `lab` made.
fn on_a_users_site(create: &str, body: impl FnOnce(&mut Site) -> Outcome) {
    on_a_site(&["setpriv", "pgrep", "dig"], |site| {
        site.give_to_user(USER)?;
        site.network(&format!("create lab --subnet 10.0.2.0/24 --rootless{create}"))?;
        let outcome = body(site);
        // Whatever came of it, no holder is left.
        let _ = site.network_any("remove lab");
        outcome
    });
}

/// The process that holds `lab`, if one does.
fn holder(site: &Site) -> Result<Option<u32>, Failure> {
    let pattern = format!("network hold lab --state-dir {}", site.state_dir().display());
    let found = site.lab.host.run_any(&["pgrep", "-f", &format!("^vunet {pattern}")], SHORT)?;
    Ok(found.stdout.lines().next().and_then(|pid| pid.parse().ok()))
}

/// `vm` reaches the world, which sees the host.
fn reaches_the_world(vm: &Vm) -> Outcome {
    let client = seen(&vm.netns, (WORLD, ports::PEER))?;
    ensure!(client.ip() == HOST, "the world sees {client}");
    Ok(())
}

fn finds(vm: &Vm, label: &str, ip: Ipv4Addr) -> Outcome {
    let found = vm.run(&format!("dig +short @10.0.2.1 {label}.lab.vunet.internal A"))?;
    ensure!(found.trim() == ip.to_string(), "{label}: {found:?}, not {ip}");
    Ok(())
}

fn kill(netns: &Netns, pid: u32) -> Outcome {
    netns.run(&["kill", "-9", &pid.to_string()], SHORT)?;
    Ok(())
}

#[test]
fn guests_of_an_ordinary_user_share_a_bridge_and_reach_the_world() {
    on_a_users_site("", |site| {
        let before = site.host_state()?;
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(one.ip != two.ip, "both have {}", one.ip);
        ensure!(one.pings(two.ip)? && two.pings(one.ip)?, "the guests do not reach each other");
        finds(&one, "vm2", two.ip)?;
        finds(&two, "vm1", one.ip)?;
        reaches_the_world(&one)?;
        reaches_the_world(&two)?;
        ensure!(!one.vunet.errors().join("\n").contains("WARN"), "{}", one.vunet.errors().join("\n"));
        // The guard holds in the namespaces as on any bridge.
        one.run("ip addr add 10.0.2.99/24 dev eth0")?;
        let spoofed = one.netns.run_any(
            &["ping", "-n", "-c", "2", "-W", "1", "-I", "10.0.2.99", &two.ip.to_string()],
            PATIENCE,
        )?;
        ensure!(!spoofed.stdout.contains(" 2 received"), "an address that is another's: {}", spoofed.stdout);
        // Who uses it is known, and it cannot be removed meanwhile.
        let refused = site.network_any("remove lab")?;
        ensure!(refused.stderr.contains("in use"), "{}", refused.stderr);
        one.stop()?;
        reaches_the_world(&two)?;
        two.stop()?;
        let after = site.host_state()?;
        super::site::ensure_as_before(&before, &after)
    });
}

#[test]
fn a_holder_that_is_killed_leaves_guests_together_and_is_succeeded() {
    on_a_users_site("", |site| {
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        let pid = holder(site)?.ok_or_else(|| Failure("nobody holds the network".into()))?;
        kill(&site.lab.host, pid)?;
        ensure!(one.pings(two.ip)?, "the guests lost each other");
        let told = |vm: &Vm| vm.vunet.errors().iter().any(|line| line.contains("holder ended"));
        until("word of it", || told(&one) && told(&two))?;
        // A further VM starts another, which takes over what is there.
        let third = site.vm("lab", "vm3", &[])?;
        ensure!(third.pings(one.ip)?, "the third is on another bridge");
        for vm in [&one, &two, &third] {
            reaches_the_world(vm)?;
            finds(vm, "vm1", one.ip)?;
        }
        let back = |vm: &Vm| vm.vunet.errors().iter().any(|line| line.contains("has a holder again"));
        until("their return", || back(&one) && back(&two))?;
        for vm in [one, two, third] {
            vm.stop()?;
        }
        Ok(())
    });
}

#[test]
fn a_killed_process_leaves_no_lease_and_its_guest_goes_on_under_the_next() {
    on_a_users_site("", |site| {
        let mac = "52:54:00:00:00:02";
        let mut two = site.vm("lab", "vm2", &["--mac", mac])?;
        let one = site.vm("lab", "vm1", &[])?;
        finds(&one, "vm2", two.ip)?;
        two.vunet.kill();
        let is_gone = || {
            one.run("dig +short @10.0.2.1 vm2.lab.vunet.internal A").is_ok_and(|told| told.trim().is_empty())
        };
        until("the name's end", is_gone)?;
        // Its guest lived on, and says nothing of DHCP.
        for args in [&["--mac", mac][..], &[]] {
            site.revive(&mut two, "lab", args)?;
            ensure!(two.pings(one.ip)?, "the guest that went on is cut off");
            until("the name's return", || finds(&one, "vm2", two.ip).is_ok())?;
        }
        two.stop()?;
        ensure!(is_gone(), "the name of a process that ended");
        one.stop()
    });
}

#[test]
fn isolated_guests_reach_the_world_and_not_each_other() {
    on_a_users_site(" --isolate", |site| {
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(!one.pings_soon(two.ip)?, "they reach each other");
        reaches_the_world(&one)?;
        reaches_the_world(&two)?;
        one.stop()?;
        two.stop()
    });
}

#[test]
fn a_network_that_is_removed_has_no_holder_any_more() {
    on_a_users_site("", |site| {
        ensure!(holder(site)?.is_some(), "nobody holds a network just made");
        let held = site.network("hold lab")?;
        ensure!(held.contains("held by another process"), "{held}");
        site.network("remove lab")?;
        until("the holder's end", || holder(site).is_ok_and(|pid| pid.is_none()))?;
        let gone = site.network_any("inspect lab")?;
        ensure!(gone.stderr.contains("there is no network lab"), "{}", gone.stderr);
        Ok(())
    });
}

impl Site {
    /// From now on all of it is the user's, as whom vunet runs.
    fn give_to_user(&mut self, user: &'static [&'static str]) -> Outcome {
        let path = self.state_dir().to_owned();
        std::os::unix::fs::chown(&path, Some(65534), Some(65534))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
        self.user = user;
        Ok(())
    }
}
