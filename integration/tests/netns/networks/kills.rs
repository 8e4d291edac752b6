//! Processes of a network are killed at random points; the next start leaves the host as it was.

use std::time::Duration;

use vunet_integration::lab::{Process, WORLD};

use super::site::{Site, ensure_as_before, on_a_site, until};
use crate::bench::{Outcome, PATIENCE, ensure, seed};

/// A generator of delays and choices (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// One round: up to three processes of up to two networks, each killed, or ended and killed while it ends, at
/// a random moment of its life.
fn round(site: &Site, random: &mut Random) -> Outcome {
    let mut processes: Vec<Process> = Vec::new();
    for n in 0..1 + random.below(3) {
        let network = if random.below(3) == 0 { "quiet" } else { "lab" };
        let socket = site.lab.dir().join(format!("killed{n}.sock"));
        let publish = format!("{}:80", 8100 + n);
        let args: &[&str] = if network == "lab" { &["--publish", &publish] } else { &[] };
        processes.push(site.start(network, &socket, args)?);
        std::thread::sleep(Duration::from_millis(random.below(120)));
    }
    while !processes.is_empty() {
        let at = random.below(processes.len() as u64) as usize;
        let mut process = processes.swap_remove(at);
        if random.below(3) == 0 {
            process.terminate();
            std::thread::sleep(Duration::from_millis(random.below(60)));
        }
        process.kill();
        std::thread::sleep(Duration::from_millis(random.below(40)));
    }
    Ok(())
}

/// Whoever starts next, on whichever network, cleans up after all.
fn next_start_cleans(site: &Site, network: &str, before: &str) -> Outcome {
    let socket = site.lab.dir().join("next.sock");
    let mut next = site.start(network, &socket, &[])?;
    until("the next vunet", || socket.exists() || !next.is_running())?;
    ensure!(next.is_running(), "the next start failed: {}", next.errors().join("\n"));
    let code = next.stop();
    ensure!(code == Some(0), "the next vunet ended with {code:?}: {}", next.errors().join("\n"));
    ensure_as_before(before, &site.host_state()?)
}

fn kill_times(times: usize) {
    let mut random = Random(seed());
    on_a_site(&[], |site| {
        // Something of everybody else's, alike and not ours.
        site.lab.ip(&site.lab.host, "link add vn-other type bridge")?;
        let others = "add table inet vunet-other; add chain inet vunet-other c; \
            add rule inet vunet-other c counter comment \"vunet:other\"; add table ip filter; \
            add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }; \
            add rule ip filter FORWARD counter comment \"vunet:mine\"";
        site.lab.host.run(&["nft", others], Duration::from_secs(5))?;
        site.network("create lab")?;
        site.network("create quiet --mode host-only")?;
        let before = site.host_state()?;
        for n in 0..times {
            round(site, &mut random)?;
            let network = if random.below(2) == 0 { "quiet" } else { "lab" };
            next_start_cleans(site, network, &before)
                .map_err(|failure| crate::bench::Failure(format!("after round {n}: {}", failure.0)))?;
        }
        Ok(())
    });
}

#[test]
fn what_killed_processes_leave_is_gone_after_the_next_start() {
    kill_times(20);
}

#[test]
#[ignore = "ten minutes; integration/test.sh --long runs it"]
fn what_killed_processes_leave_is_gone_after_the_next_start_two_hundred_times() {
    kill_times(200);
}

#[test]
fn a_network_whose_processes_were_all_killed_can_be_removed() {
    on_a_site(&[], |site| {
        site.network("create other --mode host-only")?;
        let before = site.host_state()?;
        site.network("create lab")?;
        let socket = site.lab.dir().join("killed.sock");
        let mut process = site.start("lab", &socket, &[])?;
        until("vunet's socket", || socket.exists() || !process.is_running())?;
        process.kill();
        site.network("remove lab")?;
        ensure_as_before(&before, &site.host_state()?)
    });
}

#[test]
fn another_process_keeps_the_network_once_its_keeper_was_killed() {
    on_a_site(&[], |site| {
        site.network("create lab")?;
        let mut first = site.vm("lab", "vm1", &["--publish", "8006:9006"])?;
        let rules = || site.lab.host.run(&["nft", "list", "ruleset"], PATIENCE).map(|output| output.stdout);
        until("the port's rule", || rules().is_ok_and(|rules| rules.contains("8006 : 9006")))?;
        let second = site.vm("lab", "vm2", &[])?;
        first.vunet.kill();
        until("the end of the dead process's port", || rules().is_ok_and(|rules| !rules.contains("8006")))?;
        site.lab.host.run(&["nft", "flush ruleset"], PATIENCE)?;
        until("the rules", || rules().is_ok_and(|rules| rules.contains("masquerade")))?;
        ensure!(second.pings(WORLD)?, "the world is out of reach");
        second.stop()?;
        let left = rules()?;
        ensure!(!left.contains("vunet-"), "left behind: {left}");
        Ok(())
    });
}
