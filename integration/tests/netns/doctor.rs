//! `vunet doctor` on hosts that really lack something: what it says, and that the command it prints helps.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vunet_integration::lab::{Netns, SHORT, vunet_binary};

use crate::bench::{Failure, Outcome, PATIENCE, ensure, missing, skip};

/// An ordinary user, who could be given more.
const USER: &[&str] = &[
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all",
    "--ambient-caps=-all",
];
/// What it may take, whatever hangs.
const ALWAYS: Duration = Duration::from_secs(5);

/// A host: a namespace of networks, and a folder that everybody may write to.
struct Host {
    netns: Netns,
    folder: TempDir,
}

/// What a doctor said.
struct Said {
    json: Value,
    code: i32,
}

impl Said {
    /// The check `name` of the way to run `mode`, or of the one that was asked about.
    fn check(&self, mode: Option<&str>, name: &str) -> Result<&Value, Failure> {
        let modes = self.json["modes"].as_array().into_iter().flatten();
        let mut modes = modes.filter(|way| mode.is_none_or(|mode| way["mode"] == mode));
        let checks = modes.next().and_then(|way| way["checks"].as_array());
        let found = checks.into_iter().flatten().find(|check| check["name"] == name);
        found.ok_or_else(|| Failure(format!("{name} is not among {}", self.json)))
    }

    /// The command that fixes `name`, which is in `state`; as root runs it.
    fn fix(&self, mode: Option<&str>, name: &str, state: &str) -> Result<String, Failure> {
        let check = self.check(mode, name)?;
        ensure!(check["state"] == state, "{name} is not {state}: {check}");
        let fix = check["fix"].as_str().ok_or_else(|| Failure(format!("nothing to do: {check}")))?;
        Ok(fix.replace("sudo ", ""))
    }

    fn is_ok(&self, mode: Option<&str>, name: &str) -> Outcome {
        let check = self.check(mode, name)?;
        ensure!(check["state"] == "ok", "{check}");
        Ok(())
    }
}

fn said(output: &str, code: Option<i32>) -> Result<Said, Failure> {
    Ok(Said { json: serde_json::from_str(output)?, code: code.unwrap_or(-1) })
}

impl Host {
    /// What a doctor started by `before` says with `flags`.
    fn doctor(&self, before: &[&str], flags: &str) -> Result<Said, Failure> {
        let (binary, state) = (vunet_binary().display().to_string(), self.path("state"));
        let own = ["doctor", "--json", "--offline", "--state-dir", &state];
        let flags = flags.split_ascii_whitespace();
        let words: Vec<&str> = before.iter().copied().chain([&*binary]).chain(own).chain(flags).collect();
        let output = self.netns.run_any(&words, PATIENCE)?;
        said(&output.stdout, output.code).map_err(|error| Failure(format!("{error:?}: {}", output.stderr)))
    }

    /// In one shell and one namespace of mounts: `lack` takes something away, a doctor says what (`name` is in `state`), and once
    /// the command it prints was run another finds nothing amiss. Returns that command.
    fn is_fixed(&self, lack: &str, flags: &str, what: (Option<&str>, &str, &str)) -> Result<String, Failure> {
        let (mode, name, state) = what;
        let doctor = format!(
            "{} doctor --json --offline --state-dir {} {flags}",
            vunet_binary().display(),
            self.path("state")
        );
        let before = self.sh(&format!("{lack}\n{doctor}"))?;
        let fix = said(&before, None)?.fix(mode, name, state)?;
        let after = self.sh(&format!("{lack}\n{fix} >&2\n{doctor}"))?;
        said(&after, None)?.is_ok(mode, name).map_err(|error| Failure(format!("after {fix}: {error:?}")))?;
        Ok(fix)
    }

    fn sh(&self, script: &str) -> Result<String, Failure> {
        let output = self.netns.run_any(&["sh", "-c", script], PATIENCE)?;
        ensure!(!output.stdout.is_empty(), "{script}: {}", output.stderr);
        Ok(output.stdout)
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// A bridge `br0`, up.
    fn add_bridge(&self) -> Outcome {
        self.netns.run(&["ip", "link", "add", "br0", "type", "bridge"], SHORT)?;
        self.netns.run(&["ip", "link", "set", "br0", "up"], SHORT)?;
        Ok(())
    }

    /// All that a doctor could change here.
    fn state(&self) -> Result<String, Failure> {
        let mut state = String::new();
        for command in [
            "ip -o link show",
            "ip -o addr show",
            "ip route show table all",
            "nft list ruleset",
            "sysctl -a -r net.ipv4.(conf|ip_|ping)",
            &format!("find {}", self.folder.path().display()),
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            state += &self.netns.run(&words, SHORT)?.stdout;
        }
        Ok(state)
    }
}

/// Runs `body` on a host; skips where there can be none.
fn on_a_host(tools: &[&str], body: impl FnOnce(&Host) -> Outcome) {
    let mut needed = vec!["setpriv", "prlimit", "sysctl", "mount", "nft"];
    needed.extend(tools);
    if let Some(reason) = missing(&needed) {
        return skip(&reason);
    }
    let begin = || -> Result<Host, Failure> {
        // Not below /tmp, which may be in memory: state is not kept there.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777))?;
        let netns = Netns::create("doctor")?;
        // Addresses of IPv6 settle by themselves.
        netns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
        Ok(Host { netns, folder })
    };
    if let Err(failure) = begin().and_then(|host| body(&host)) {
        panic!("{failure:?}");
    }
}

#[test]
fn a_user_on_a_bridge_is_given_what_he_lacks_by_the_command_that_is_printed() {
    on_a_host(&[], |host| {
        host.add_bridge()?;
        let socket = host.path("vm.sock");
        let flags = format!("--mode bridge --uplink bridge=br0 --socket-path {socket}");
        let lacking = host.doctor(USER, &flags)?;
        ensure!(lacking.code == 1, "exit code {}", lacking.code);
        let fix = lacking.fix(None, "CAP_NET_ADMIN", "missing")?;
        ensure!(fix.starts_with("setpriv --reuid=65534"), "{fix}");
        // It starts that very run.
        let run = host.netns.spawn(&["sh", "-c", &format!("exec {fix}")])?;
        let begun = Instant::now();
        while !Path::new(&socket).exists() {
            ensure!(begun.elapsed() < PATIENCE, "no socket: {}", run.errors().join("\n"));
            std::thread::sleep(Duration::from_millis(20));
        }
        let uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&socket)?);
        ensure!(uid == 65534, "it runs as {uid}");
        drop(run);
        let _ = std::fs::remove_file(&socket);
        // And a doctor that is started so is content.
        let words: Vec<&str> = fix.split(' ').take_while(|word| !word.contains("/vunet")).collect();
        let content = host.doctor(&words, &flags)?;
        ensure!(content.code == 0, "{}", content.json);
        content.is_ok(None, "CAP_NET_ADMIN")
    });
}

#[test]
fn a_tap_that_root_makes_by_the_printed_command_is_enough_for_its_user() {
    on_a_host(&[], |host| {
        let flags = "--mode bridge --uplink tap=vm0 --queues 2";
        let lacking = host.doctor(USER, flags)?;
        ensure!(lacking.code == 1, "exit code {}", lacking.code);
        let fix = lacking.fix(None, "CAP_NET_ADMIN", "missing")?;
        ensure!(fix.contains("ip tuntap add dev vm0 mode tap user 65534 multi_queue"), "{fix}");
        host.netns.run(&["sh", "-c", &fix], SHORT)?;
        let content = host.doctor(USER, flags)?;
        ensure!(content.code == 0, "{}", content.json);
        content.is_ok(None, "uplink")
    });
}

#[test]
fn ports_and_pings_that_a_user_may_not_have_are_allowed_by_the_printed_commands() {
    on_a_host(&[], |host| {
        let flags = "--publish 80:80 --publish udp:53:53 --mode nat";
        let lacking = host.doctor(USER, flags)?;
        ensure!(lacking.code == 1, "exit code {}", lacking.code);
        let ports = lacking.fix(None, "published ports", "missing")?;
        ensure!(ports == "sysctl -w net.ipv4.ip_unprivileged_port_start=53", "{ports}");
        let ping = lacking.fix(None, "ping", "warn")?;
        for fix in [ports, ping] {
            host.netns.run(&["sh", "-c", &fix], SHORT)?;
        }
        let content = host.doctor(USER, flags)?;
        ensure!(content.code == 0, "{}", content.json);
        content.is_ok(None, "published ports")?;
        content.is_ok(None, "ping")
    });
}

/// A low limit on open files, which only some root may raise.
fn limits(host: &Host) -> Outcome {
    let (limit, what) = ("prlimit --pid $$ --nofile=64:64", (None, "open files", "missing"));
    let may_raise =
        "prlimit --pid $$ --nofile=65:65 && prlimit --pid $$ --nofile=66:66 && echo yes || echo no";
    if host.sh(may_raise)?.trim() == "yes" {
        return host.is_fixed(limit, "--mode nat", what).map(drop);
    }
    let fix =
        host.doctor(&["prlimit", "--nofile=64:64"], "--mode nat")?.fix(None, "open files", "missing")?;
    ensure!(fix.contains("docker run --ulimit nofile="), "{fix}");
    Ok(())
}

#[test]
fn what_a_shell_or_a_container_lacks_is_there_after_the_printed_command() {
    on_a_host(&[], |host| {
        limits(host)?;
        let no_tun = "mount -t tmpfs none /dev/net";
        host.is_fixed(no_tun, "--mode bridge", (None, "/dev/net/tun", "missing"))?;
        let read_only = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys";
        host.is_fixed(read_only, "--nat kernel", (None, "sysctl", "missing"))?;
        let open = format!("mkdir -p {0}; chmod 0777 {0}", host.path("state"));
        host.is_fixed(&open, "--nat kernel", (None, "state directory", "missing"))?;
        Ok(())
    });
}

#[test]
fn user_namespaces_are_allowed_by_the_printed_setting() {
    on_a_host(&["unshare"], |host| {
        // A namespace of users counts those made within it.
        let doctor = format!("{} doctor --json --offline", vunet_binary().display());
        let none = "echo 0 > /proc/sys/user/max_user_namespaces";
        let inside =
            |script: &str| host.sh(&format!("unshare --user --map-root-user --net sh -c '{script}'"));
        let rootless = Some("network-rootless");
        let fix = said(&inside(&format!("{none}; {doctor}"))?, None)?.fix(
            rootless,
            "user namespaces",
            "missing",
        )?;
        ensure!(fix == "sysctl -w user.max_user_namespaces=1000", "{fix}");
        let after = inside(&format!("{none}; {fix} >&2; {doctor}"))?;
        said(&after, None)?.is_ok(rootless, "user namespaces")
    });
}

#[test]
fn a_host_without_nft_or_with_an_unreadable_resolv_conf_is_told_so() {
    on_a_host(&[], |host| {
        let hidden = "mount --bind /dev/null $(readlink -f $(command -v nft))";
        let doctor = format!("{} doctor --json --offline --nat kernel", vunet_binary().display());
        let lacking = said(&host.sh(&format!("{hidden}; {doctor}"))?, None)?;
        let fix = lacking.fix(None, "nft", "missing")?;
        ensure!(fix.ends_with(" nftables"), "{fix}");
        host.netns.set_resolv_conf("nameserver 192.0.2.2\n")?;
        let resolv_conf = Path::new("/etc/netns").join(host.netns.name()).join("resolv.conf");
        std::fs::set_permissions(&resolv_conf, std::fs::Permissions::from_mode(0o600))?;
        let fix = host.doctor(USER, "--mode nat")?.fix(None, "resolver", "warn")?;
        ensure!(fix == "chmod a+r /etc/resolv.conf", "{fix}");
        host.netns.run(&["sh", "-c", &fix], SHORT)?;
        host.doctor(USER, "--mode nat")?.is_ok(None, "resolver")
    });
}

#[test]
fn what_iptables_drops_of_a_bridge_passes_after_the_printed_command() {
    on_a_host(&["iptables"], |host| {
        host.add_bridge()?;
        if host.netns.sysctl("net.bridge.bridge-nf-call-iptables", "1").is_err() {
            skip("needs br_netfilter");
            return Ok(());
        }
        host.netns.run(&["iptables", "-P", "FORWARD", "DROP"], SHORT)?;
        let flags = "--mode bridge --uplink bridge=br0";
        let fix = host.doctor(&[], flags)?.fix(None, "bridge-nf-call-iptables", "warn")?;
        ensure!(fix.ends_with(" -I FORWARD -i br0 -o br0 -j ACCEPT"), "{fix}");
        host.netns.run(&["sh", "-c", &fix], SHORT)?;
        host.doctor(&[], flags)?.is_ok(None, "bridge-nf-call-iptables")
    });
}

#[test]
fn it_ends_in_time_whatever_hangs_and_changes_nothing() {
    on_a_host(&[], |host| {
        host.add_bridge()?;
        let before = host.state()?;
        // A resolver behind a link that answers nothing, and an nft that never ends.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        let nft = folder.path().join("nft");
        std::fs::write(&nft, "#!/bin/sh\nexec sleep 60\n")?;
        std::fs::set_permissions(&nft, std::fs::Permissions::from_mode(0o755))?;
        let silent = std::net::Ipv4Addr::LOCALHOST;
        let listener = host.netns.inside(|| std::net::UdpSocket::bind((silent, 0)))?;
        let server = listener.local_addr()?.to_string();
        let path = format!("PATH={}:/usr/sbin:/usr/bin:/sbin:/bin", folder.path().display());
        let binary = vunet_binary().display().to_string();
        let state = host.path("state");
        let words =
            ["env", &path, &binary, "doctor", "--json", "--dns-server", &server, "--state-dir", &state];
        let begun = Instant::now();
        let output = host.netns.run_any(&words, PATIENCE)?;
        let took = begun.elapsed();
        ensure!(took < ALWAYS, "it took {took:?}");
        let said = said(&output.stdout, output.code)?;
        ensure!(said.code == 0, "a silent resolver keeps no run from starting: {}", said.json);
        let resolver = said.check(None, "resolver")?;
        ensure!(resolver["says"].as_str().is_some_and(|says| says.contains("does not answer")), "{resolver}");
        let nft = said.check(Some("network"), "nft")?;
        ensure!(nft["state"] == "missing", "{nft}");
        let after = host.state()?;
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
        Ok(())
    });
}
