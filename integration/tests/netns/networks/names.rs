//! Addresses and names of guests that have a process each.

use std::collections::HashSet;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use super::site::{Site, Vm, on_a_site, until};
use vunet_integration::lab::SHORT;

use crate::bench::{Failure, Outcome, PATIENCE, ensure};

/// What `vm` is told about `question`: one line an answer.
fn dig(vm: &Vm, question: &str) -> Result<String, Failure> {
    Ok(vm.run(&format!("dig +short @10.0.2.1 {question}"))?.trim().to_owned())
}

/// `vm` finds the guest called `label` at `ip`, by every way there is.
fn finds(vm: &Vm, label: &str, ip: Ipv4Addr) -> Outcome {
    for how in ["", "+tcp "] {
        for name in [label.to_owned(), format!("{label}.lab.vunet.internal")] {
            let found = dig(vm, &format!("{how}{name} A"))?;
            ensure!(found == ip.to_string(), "{how}{name}: {found:?}, not {ip}");
        }
    }
    let found = dig(vm, &format!("-x {ip}"))?;
    ensure!(found == format!("{label}.lab.vunet.internal."), "{ip}: {found:?}");
    Ok(())
}

#[test]
fn guests_find_each_other_by_name_and_none_takes_anothers() {
    on_a_site(&["dig"], |site| {
        site.network("create lab --subnet 10.0.2.0/24 --reserve id:00ff01=10.0.2.50,db")?;
        let one = site.vm("lab", "vm1", &[])?;
        let mut two = site.vm("lab", "vm2", &[])?;
        ensure!(one.ip != two.ip, "both have {}", one.ip);
        finds(&one, "vm2", two.ip)?;
        finds(&two, "vm1", one.ip)?;
        ensure!(dig(&two, "vm3")?.is_empty(), "a guest that is not there yet");
        // A third one that would like to be the first, or the gateway.
        let third = site.vm_without_lease("lab", "vm3", &[])?;
        for name in ["vm1", "gateway"] {
            let lease = site.lease(&third, name)?;
            ensure!(lease.option("domain") == "lab.vunet.internal", "{lease:?}");
            ensure!(lease.ip != one.ip && lease.option("hostname").is_empty(), "{lease:?}");
            finds(&two, "vm1", one.ip)?;
            ensure!(dig(&two, &format!("-x {}", lease.ip))?.is_empty(), "the third has a name");
        }
        let refusals = third.vunet.errors().join("\n").matches("host name refused").count();
        ensure!(refusals == 1, "said {refusals} times");
        reserved(site, &two, &third)?;
        // Live: a lease that is given back takes its name along, and a guest that comes brings it.
        let script = site.lab.dir().join("udhcpc.sh").display().to_string();
        one.netns.run(&["sh", "-c", GIVE_BACK, "sh", &script], PATIENCE)?;
        until("the name's end", || dig(&two, "vm1").is_ok_and(|found| found.is_empty()))?;
        let back = site.lease(&one, "vm1")?;
        ensure!(back.ip == one.ip, "{} has become {}", one.ip, back.ip);
        finds(&two, "vm1", one.ip)?;
        // A process that is killed takes its guest's name along, but nobody gets its address at once.
        two.vunet.kill();
        until("the name's end", || dig(&one, "vm2").is_ok_and(|found| found.is_empty()))?;
        let again = site.vm_without_lease("lab", "again", &[])?;
        let newcomer = site.lease(&again, "vm4")?.ip;
        ensure!(
            ![one.ip, two.ip, Ipv4Addr::new(10, 0, 2, 50)].contains(&newcomer),
            "{newcomer} is another's"
        );
        again.stop()?;
        third.stop()?;
        one.stop()
    });
}

#[test]
fn a_killed_process_leaves_no_lease_and_its_guest_goes_on_under_the_next() {
    on_a_site(&["dig"], |site| {
        site.network("create lab --subnet 10.0.2.0/24")?;
        let mac = "52:54:00:00:00:02";
        let mut two = site.vm("lab", "vm2", &["--mac", mac])?;
        // All are gone: whoever starts next lets go.
        two.vunet.kill();
        let one = site.vm("lab", "vm1", &[])?;
        ensure!(dig(&one, "vm2")?.is_empty(), "the name of a guest that is gone");
        ensure!(dig(&one, &format!("-x {}", two.ip))?.is_empty(), "its address has a name");
        ensure!(one.ip != two.ip, "{} went to another at once", two.ip);
        let leases = site.inspect("lab")?["leases"].as_array().map(Vec::len);
        ensure!(leases == Some(1), "{:?}", site.inspect("lab")?);
        // The guest lived on: with its first frames its lease is its new process's, unasked.
        site.revive(&mut two, "lab", &["--mac", mac])?;
        ensure!(two.pings(one.ip)?, "the guest that went on is cut off");
        finds(&one, "vm2", two.ip)?;
        let others = site.vm("lab", "vm3", &[])?;
        ensure!(others.ip != two.ip, "its address went to another");
        // As it is with one that guards nothing, whose front-end never said a card's address.
        site.revive(&mut two, "lab", &["--trust-guest"])?;
        ensure!(two.pings(one.ip)?, "the guest that went on is cut off");
        finds(&one, "vm2", two.ip)?;
        // In order: the name ends with the process, and the guest gets its address again.
        let ip = two.ip;
        two.stop()?;
        ensure!(dig(&one, "vm2")?.is_empty(), "the name of a process that ended");
        let again = site.vm("lab", "vm2", &["--mac", mac])?;
        ensure!(again.ip == ip, "{ip} has become {}", again.ip);
        finds(&one, "vm2", ip)?;
        again.stop()?;
        others.stop()?;
        one.stop()
    });
}

#[test]
fn a_guest_that_shows_anothers_mac_address_gets_nothing_of_it() {
    on_a_site(&["dig"], |site| {
        site.network("create lab --subnet 10.0.2.0/24")?;
        let mut one = site.vm("lab", "vm1", &[])?;
        let two = site.vm("lab", "vm2", &[])?;
        // It names itself and its card as the first, and asks for that one's address.
        let thief = site.vm_as("lab", "thief", &[], &["--mac", &one.mac])?;
        let wish = one.ip.to_string();
        let args = ["-x", "hostname:vm1", "-r", &wish];
        ensure!(site.lab.udhcpc_in(&thief.netns, &args, SHORT).is_err(), "it has a lease");
        let said = thief.vunet.errors().join("\n");
        ensure!(said.matches("has this MAC address and its lease").count() == 1, "{said}");
        thief.run(&format!("ip addr replace {wish}/24 dev eth0"))?;
        ensure!(!thief.pings_soon(two.ip)?, "it sends from an address that is not its own");
        finds(&two, "vm1", one.ip)?;
        let leases = site.inspect("lab")?["leases"].as_array().map(Vec::len);
        ensure!(leases == Some(2), "{:?}", site.inspect("lab")?);
        // Once the first and its process are gone, whoever comes with its card is it.
        one.vunet.kill();
        until("the name's end", || dig(&two, "vm1").is_ok_and(|found| found.is_empty()))?;
        let lease = site.lab.udhcpc_in(&thief.netns, &args, PATIENCE)?;
        ensure!(lease.ip == one.ip, "{} has become {}", one.ip, lease.ip);
        finds(&two, "vm1", one.ip)?;
        thief.stop()?;
        two.stop()
    });
}

/// Renews the lease and gives it back; `$1` is udhcpc's script.
const GIVE_BACK: &str = "export LEASE_FILE=/dev/null
    udhcpc -i eth0 -f -x hostname:vm1 -s \"$1\" & client=$!
    sleep 2; kill -USR2 $client; sleep 1; kill $client";

/// The third's client identifier is known to the network.
fn reserved(site: &Site, two: &Vm, third: &Vm) -> Outcome {
    let args = ["-C", "-x", "0x3d:00ff01"];
    let lease = site.lab.udhcpc_in(&third.netns, &args, PATIENCE)?;
    let kept = Ipv4Addr::new(10, 0, 2, 50);
    ensure!(lease.ip == kept && lease.option("hostname") == "db", "{lease:?}");
    finds(two, "db", kept)?;
    let shown = site.inspect("lab")?;
    let leases = shown["leases"].as_array().cloned().unwrap_or_default();
    let names: Vec<&str> = leases.iter().filter_map(|lease| lease["host_name"].as_str()).collect();
    ensure!(names == ["vm1", "vm2", "db"], "{shown}");
    Ok(())
}

/// What udhcpc runs: notes the address, and leaves the interface as it is.
const NOTE_ADDRESS: &str = "#!/bin/sh\n[ \"$1\" = bound ] && echo \"$ip\" >\"$LEASE_FILE\"\nexit 0\n";

#[test]
fn fifty_guests_that_ask_at_once_get_fifty_addresses() {
    const GUESTS: usize = 50;
    on_a_site(&[], |site| {
        site.network("create lab --mode host-only --subnet 10.0.2.0/24")?;
        let script = site.lab.dir().join("note.sh");
        fs::write(&script, NOTE_ADDRESS)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let vms: Vec<Vm> = (0..GUESTS)
            .map(|n| site.vm_without_lease("lab", &format!("g{n}"), &[]))
            .collect::<Result<_, Failure>>()?;
        let file = |n: usize| site.lab.dir().join(format!("lease-{n}"));
        let begin = Instant::now();
        let mut clients = Vec::new();
        for (n, vm) in vms.iter().enumerate() {
            let lease_env = format!("LEASE_FILE={}", file(n).display());
            let (script, name) = (script.display().to_string(), format!("hostname:g{n}"));
            let words =
                ["env", &lease_env, "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-s", &script, "-x", &name];
            clients.push(vm.netns.spawn(&words)?);
        }
        let noted = |n: usize| fs::read_to_string(file(n)).unwrap_or_default();
        until("fifty leases", || (0..GUESTS).all(|n| noted(n).ends_with('\n')))?;
        eprintln!("{GUESTS} leases in {:?}", begin.elapsed());
        let addresses: HashSet<String> = (0..GUESTS).map(noted).collect();
        ensure!(addresses.len() == GUESTS, "{addresses:?}");
        let shown = site.inspect("lab")?;
        ensure!(shown["leases"].as_array().is_some_and(|leases| leases.len() == GUESTS), "{shown}");
        drop(clients);
        vms.into_iter().try_for_each(Vm::stop)
    });
}
