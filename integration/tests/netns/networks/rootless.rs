//! Networks without privilege: everything here runs as an ordinary user without any capability.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use vunet_integration::lab::{GATEWAY, Netns, SHORT};
use vunet_integration::world::ports;

use super::reach::seen_by_udp;
use super::site::{Site, Vm, connect, on_a_site, seen, until};
use crate::bench::{Failure, Outcome, PATIENCE, ensure};
use crate::publishing::{Api, change_ports_under_traffic};

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
const USER_NUMBER: u32 = 65534;
/// In the lab's world.
const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The control API at `path`, as that user asks it.
fn as_user(path: &Path) -> Result<Api, Failure> {
    let connect = || {
        let user = rustix::process::Uid::from_raw(USER_NUMBER);
        rustix::thread::set_thread_res_uid(user, user, user)?;
        Api::open(path)
    };
    // Only this thread is another user's.
    std::thread::scope(|scope| scope.spawn(connect).join().expect("it does not panic"))
}

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

/// The world's client of a published port is seen under its own address, over TCP and UDP.
fn is_published(site: &Site, port: u16) -> Outcome {
    let peer = seen(&site.lab.world, (HOST, port))?;
    ensure!(peer.ip() == WORLD, "port {port}: the guest saw {peer} for the world's client");
    let peer = seen_by_udp(&site.lab.world, (HOST, port))?;
    ensure!(peer == WORLD.to_string(), "port {port}: the guest saw {peer} over UDP");
    Ok(())
}

/// Waits until the network's holder leads the port to a guest: it hears of the guest's address a moment later
/// than the guest.
fn until_published(site: &Site, port: u16) -> Outcome {
    until("the published port", || seen(&site.lab.world, (HOST, port)).is_ok())?;
    is_published(site, port)
}

#[test]
fn published_ports_lead_to_their_guests_under_the_clients_addresses() {
    on_a_users_site("", |site| {
        let publish = |host: &'static str| ["--publish", host, "--publish", "127.0.0.1:7006:9006"];
        let one =
            site.vm("lab", "vm1", &[&publish("8006:9006")[..], &["--publish", "udp:8006:9006"]].concat())?;
        let two = site.vm("lab", "vm2", &["--publish", "8007:9006", "--publish", "udp:8007:9006"])?;
        let (_first, _second) = (site.serve(&one.netns)?, site.serve(&two.netns)?);
        until_published(site, 8006)?;
        until_published(site, 8007)?;
        let gateway = Ipv4Addr::new(10, 0, 2, 1);
        for to in [(Ipv4Addr::LOCALHOST, 8006), (Ipv4Addr::LOCALHOST, 7006)] {
            let peer = seen(&site.lab.host, to)?;
            ensure!(peer.ip() == gateway, "the guest saw {peer} for the host's own client of {to:?}");
        }
        let refused = connect(&site.lab.world, (HOST, 7006), Duration::from_secs(2));
        ensure!(refused.is_err(), "a port published on loopback is open to the world");
        // One guest reaches the other by way of the host.
        let peer = seen(&one.netns, (HOST, 8007))?;
        ensure!(peer.ip() == HOST, "the guest saw {peer} for another guest's client");
        // Who has which port is known.
        let shown = site.inspect("lab")?;
        let has = |user: &serde_json::Value| user["published"].as_array().map_or(0, Vec::len);
        let count: Vec<usize> =
            shown["users"].as_array().map(|all| all.iter().map(has).collect()).unwrap_or_default();
        ensure!(count.iter().sum::<usize>() == 5, "{shown}");
        one.stop()?;
        let gone = connect(&site.lab.world, (HOST, 8006), Duration::from_secs(2));
        ensure!(gone.is_err(), "the port outlives its process");
        is_published(site, 8007)?;
        two.stop()
    });
}

#[test]
fn a_published_port_is_one_processs_and_free_once_that_is_killed() {
    on_a_users_site("", |site| {
        let publish = ["--publish", "8006:9006", "--publish", "udp:8006:9006", "--publish", "8003:9003"];
        let mut one = site.vm("lab", "vm1", &publish)?;
        let served = site.serve(&one.netns)?;
        until_published(site, 8006)?;
        let socket = site.lab.dir().join("vm2.sock");
        let mut refused = site.start("lab", &socket, &publish)?;
        until("the refusal", || !refused.is_running())?;
        let words = refused.wait_error(PATIENCE, "the reason", |line| line.contains("--publish"))?;
        ensure!(words.contains("8006"), "{words}");
        let owner = one.vunet.pid().to_string();
        ensure!(words.contains(&owner) && words.contains("network lab"), "not whose the port is: {words}");
        let mut open = connect(&site.lab.world, (HOST, 8003), PATIENCE)?;
        open.write_all(b"echo")?;
        let mut echoed = [0; 4];
        open.read_exact(&mut echoed)?;
        one.vunet.kill();
        let ended = open.read(&mut echoed).map_err(|error| error.kind());
        ensure!(ended == Err(ErrorKind::ConnectionReset), "an open connection ended with {ended:?}");
        drop(served);
        let two = site.vm("lab", "vm3", &publish)?;
        let _server = site.serve(&two.netns)?;
        until_published(site, 8006)?;
        two.stop()
    });
}

#[test]
fn ports_are_published_again_by_the_next_holder() {
    on_a_users_site("", |site| {
        let publish = ["--publish", "8006:9006", "--publish", "udp:8006:9006"];
        let one = site.vm("lab", "vm1", &publish)?;
        let _server = site.serve(&one.netns)?;
        until_published(site, 8006)?;
        let pid = holder(site)?.ok_or_else(|| Failure("nobody holds the network".into()))?;
        kill(&site.lab.host, pid)?;
        until("word of it", || one.vunet.errors().iter().any(|line| line.contains("holder ended")))?;
        // The port is not free meanwhile: who comes waits for the next holder.
        let mut waits = connect(&site.lab.world, (HOST, 8006), PATIENCE)?;
        let two = site.vm("lab", "vm2", &["--publish", "0:9006"])?;
        until("its return", || one.vunet.errors().iter().any(|line| line.contains("has a holder again")))?;
        until_published(site, 8006)?;
        let mut told = String::new();
        waits.read_to_string(&mut told)?;
        ensure!(told.starts_with(&WORLD.to_string()), "whoever waited was told {told:?}");
        // Port 0 is picked, and told.
        let shown = site.inspect("lab")?;
        let users = shown["users"].as_array().cloned().unwrap_or_default();
        let hosts = users.iter().filter_map(|user| user["published"][0]["host"].as_str());
        let mut ports = hosts.filter_map(|host| host.rsplit_once(':')?.1.parse::<u16>().ok());
        let port = ports.find(|port| *port != 8006).ok_or_else(|| Failure(shown.to_string()))?;
        ensure!(port != 0, "{shown}");
        let _too = site.serve(&two.netns)?;
        until("the picked port", || {
            seen(&site.lab.world, (HOST, port)).is_ok_and(|peer| peer.ip() == WORLD)
        })?;
        one.stop()?;
        two.stop()
    });
}

#[test]
fn a_port_of_a_guest_with_a_fixed_address_needs_no_lease() {
    on_a_users_site("", |site| {
        let fixed = "10.0.2.77";
        let vm = site.vm_without_lease(
            "lab",
            "vm1",
            &["--guest-ip", fixed, "--publish", "8006:9006", "--publish", "udp:8006:9006"],
        )?;
        vm.run("ip addr add 10.0.2.77/24 dev eth0")?;
        vm.run("ip route add default via 10.0.2.1")?;
        let _server = site.serve(&vm.netns)?;
        until_published(site, 8006)?;
        vm.stop()
    });
}

#[test]
fn ports_come_and_go_while_the_guest_runs_and_conflicts_name_their_owner() {
    on_a_users_site("", |site| {
        let control = |n: u8| site.lab.dir().join(format!("control{n}.sock"));
        let (first, second) = (control(1).display().to_string(), control(2).display().to_string());
        let one = site.vm("lab", "vm1", &["--control", &first])?;
        let two = site.vm("lab", "vm2", &["--control", &second, "-t", "8004:9004"])?;
        let (mut api, mut other) = (as_user(&control(1))?, as_user(&control(2))?);
        let _servers = (site.serve(&one.netns)?, site.serve(&two.netns)?);
        let tcp = api.publish("8006:9006")?;
        api.publish("udp:8006:9006")?;
        is_published(site, 8006)?;
        let picked = api.publish("127.0.0.1%lo:0:9006")?;
        let number = picked["host_port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(0);
        ensure!(seen(&site.lab.host, (Ipv4Addr::LOCALHOST, number))?.ip() == GATEWAY, "{picked}");
        // Another guest's process is told whose it is, and anybody's else as far as this user may know.
        let mut refused = |port: &str| other.ask("POST", "/v1/ports", Some(&json!({ "publish": port })));
        let (status, answer) = refused("8006:1")?;
        let words = answer["error"]["message"].as_str().unwrap_or_default();
        ensure!(status == 409 && answer["error"]["owner"]["pid"] == one.vunet.pid(), "{status} {answer}");
        ensure!(words.contains("network lab") && words.contains(&one.vunet.pid().to_string()), "{words}");
        let taken = site.lab.host.inside(|| TcpListener::bind((HOST, 8009)))?;
        let (status, answer) = refused("8008-8009:1-2")?;
        ensure!(status == 409 && answer["error"]["owner"]["uid"] == 0, "{status} {answer}");
        drop(taken);
        let (status, answer) = refused("80:80")?;
        ensure!(status == 403 && answer.to_string().contains("CAP_NET_BIND_SERVICE"), "{status} {answer}");
        let half = connect(&site.lab.world, (HOST, 8008), Duration::from_secs(2));
        ensure!(half.is_err(), "half a range is published");
        // The port is the other's once it is removed.
        api.unpublish(&tcp["id"], true)?;
        let moved = other.publish("8006:9006")?;
        ensure!(seen(&site.lab.world, (HOST, 8006))?.ip() == WORLD, "{moved}");
        for close in [false, true] {
            let port = api.publish("8003:9003")?;
            let mut echo = connect(&site.lab.world, (HOST, 8003), PATIENCE)?;
            let mut got = [0; 5];
            echo.write_all(b"hello")?;
            echo.read_exact(&mut got)?;
            ensure!(api.unpublish(&port["id"], close)? == u64::from(close), "how many were reset");
            let gone = connect(&site.lab.world, (HOST, 8003), Duration::from_secs(2));
            ensure!(gone.is_err(), "it takes clients still");
            let end = echo.write_all(b"again").and_then(|()| echo.read_exact(&mut got));
            let end = end.map_err(|error| error.kind());
            let expected = if close { Err(ErrorKind::ConnectionReset) } else { Ok(()) };
            ensure!(end == expected, "with close={close}: {end:?}");
        }
        other.unpublish(&moved["id"], true)?;
        let pid = holder(site)?.ok_or_else(|| Failure("nobody holds the network".into()))?;
        change_ports_under_traffic(&mut other, &site.lab.world, &[pid, two.vunet.pid()], 1000)?;
        one.stop()?;
        two.stop()
    });
}

#[test]
fn ports_that_came_later_outlive_their_holder_too() {
    on_a_users_site("", |site| {
        let path = site.lab.dir().join("control.sock");
        let one = site.vm("lab", "vm1", &["--control", &path.display().to_string()])?;
        let mut api = as_user(&path)?;
        let _server = site.serve(&one.netns)?;
        let (tcp, udp) = (api.publish("8006:9006")?, api.publish("udp:8006:9006")?);
        let free = api.publish("8007:9006")?;
        is_published(site, 8006)?;
        let pid = holder(site)?.ok_or_else(|| Failure("nobody holds the network".into()))?;
        kill(&site.lab.host, pid)?;
        until("word of it", || one.vunet.errors().iter().any(|line| line.contains("holder ended")))?;
        let (status, answer) = api.ask("POST", "/v1/ports", Some(&json!({ "publish": "8008:9006" })))?;
        ensure!(status == 503 && answer.to_string().contains("vunet network hold"), "{status} {answer}");
        ensure!(site.lab.host.inside(|| TcpListener::bind((HOST, 8006))).is_err(), "it is free meanwhile");
        api.unpublish(&free["id"], true)?;
        drop(site.lab.host.inside(|| TcpListener::bind((HOST, 8007)))?);
        let two = site.vm("lab", "vm2", &[])?;
        until("its return", || one.vunet.errors().iter().any(|line| line.contains("has a holder again")))?;
        until_published(site, 8006)?;
        for port in [tcp, udp] {
            api.unpublish(&port["id"], true)?;
        }
        drop(site.lab.host.inside(|| TcpListener::bind((HOST, 8006)))?);
        one.stop()?;
        two.stop()
    });
}

#[test]
fn where_no_port_can_lead_to_the_guest_a_wish_for_one_says_why() {
    for (create, args, part) in
        [(" --mode host-only", &[][..], "reached by each other only"), ("", &["--trust-guest"], "--guest-ip")]
    {
        on_a_users_site(create, |site| {
            let path = site.lab.dir().join("control.sock");
            let control = path.display().to_string();
            let one = site.vm("lab", "vm1", &[&["--control", &control], args].concat())?;
            let (status, answer) =
                as_user(&path)?.ask("POST", "/v1/ports", Some(&json!({ "publish": "8006:9006" })))?;
            ensure!(status == 409 && answer["error"]["code"] == "not_here", "{status} {answer}");
            ensure!(
                answer["error"]["message"].as_str().is_some_and(|words| words.contains(part)),
                "{answer}"
            );
            one.stop()
        });
    }
}

/// Where there is no `nft`, neither in PATH nor elsewhere.
const WITHOUT_NFT: &[&str] =
    &["unshare", "-m", "sh", "-ec", "mount --bind /dev/null $(command -v nft); exec \"$@\"", "sh"];

#[test]
fn without_nft_root_is_told_of_the_network_in_user_space_and_has_it() {
    on_a_site(&["unshare", "pgrep", "dig"], |site| {
        site.through = WITHOUT_NFT;
        // The first makes the folder of all networks, which stays.
        site.network("create lab")?;
        site.network("remove lab")?;
        let before = site.host_state()?;
        for mode in ["nat", "host-only"] {
            let made =
                site.network_any(&format!("create lab --mode {mode} --isolate --subnet 10.0.2.0/24"))?;
            ensure!(made.code == Some(0) && made.stderr.contains("--rootless"), "{made:?}");
            let socket = site.lab.dir().join("refused.sock");
            let mut refused = site.start("lab", &socket, &[])?;
            until("the refusal", || !refused.is_running())?;
            let words = refused.wait_error(PATIENCE, "the reason", |line| line.contains("nft"))?;
            let state = site.state_dir().display();
            let of_mode = if mode == "nat" { "" } else { " --mode host-only" };
            let instead = format!(
                "vunet network remove lab --state-dir {state} && vunet network create lab --state-dir \
                 {state}{of_mode} --rootless --isolate --subnet 10.0.2.0/24 --gateway 10.0.2.1"
            );
            ensure!(words.contains(&instead), "{words} without {instead}");
            site.network("remove lab")?;
        }
        site.network("create lab --rootless --subnet 10.0.2.0/24")?;
        let one = site.vm("lab", "vm1", &["--publish", "8006:9006", "--publish", "udp:8006:9006"])?;
        let two = site.vm("lab", "vm2", &[])?;
        let _server = site.serve(&one.netns)?;
        until_published(site, 8006)?;
        ensure!(two.pings(one.ip)?, "the guests do not reach each other");
        reaches_the_world(&two)?;
        one.stop()?;
        two.stop()?;
        site.network("remove lab")?;
        super::site::ensure_as_before(&before, &site.host_state()?)
    });
}

#[test]
fn host_only_guests_reach_each_other_and_nothing_else() {
    on_a_users_site(" --mode host-only", |site| {
        let _server = site.serve(&site.lab.host)?;
        let one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        ensure!(one.pings(two.ip)? && two.pings(one.ip)?, "the guests do not reach each other");
        ensure!(one.pings(Ipv4Addr::new(10, 0, 2, 1))?, "the gateway does not answer");
        finds(&one, "vm2", two.ip)?;
        for to in [WORLD, HOST, Ipv4Addr::new(10, 0, 2, 1)] {
            let outcome = connect(&one.netns, (to, ports::PEER), Duration::from_secs(2));
            ensure!(outcome.is_err(), "{to} is in reach");
        }
        ensure!(!one.pings_soon(WORLD)?, "the world is in reach");
        let name = one.run("dig +short @10.0.2.1 www.example.test")?;
        ensure!(!name.contains(&WORLD.to_string()), "the world's names are answered: {name}");
        let socket = site.lab.dir().join("vm3.sock");
        let refused = site.start("lab", &socket, &["--publish", "8006:9006"])?;
        refused.wait_error(PATIENCE, "the refusal", |line| line.contains("--publish"))?;
        one.stop()?;
        two.stop()
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
