//! Accepts in the tables of `iptables-legacy`, which nftables knows nothing of and whose drops none of its accepts overrides.
//!
//! A table is there once somebody used it: `/proc/net/ip_tables_names` says so and is all that is read where nobody did. Rules are
//! listed (`-S`), compared, and changed in one transaction (`iptables-legacy-restore --noflush`), as in nftables. The kernel tells
//! nobody of changes here, so what others flush is put back at the next occasion, not at once.
//!
//! Read first: iptables(8), iptables-restore(8).

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;

use super::listing::{Accept, DOCKER_USER, FILTER, FORWARD, Family};
use super::{FirewallError, TRIES};

/// Seconds to wait for the lock that all runs of iptables share (`/run/xtables.lock`).
const LOCK_SECONDS: &str = "5";

/// Where programs are that a service's `PATH` may lack.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// The rules of a table `filter`, a line each, as `iptables-legacy -S` prints them.
struct Rules(String);

/// The words of a line without the quotes around comments.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(' ').map(|word| word.trim_matches('"'))
}

impl Rules {
    /// The chain that accepts go to.
    fn forward_chain(&self) -> &'static str {
        if self.0.lines().any(|line| words(line).eq(["-N", DOCKER_USER])) { DOCKER_USER } else { FORWARD }
    }

    /// Lines of rules with `comment`.
    fn tagged<'a>(&'a self, comment: &'a str) -> impl Iterator<Item = &'a str> {
        let is_tagged = move |line: &&str| {
            let mut rest = words(line).skip_while(|word| *word != "--comment").skip(1);
            line.starts_with("-A ") && rest.next() == Some(comment)
        };
        self.0.lines().filter(is_tagged)
    }

    /// What `iptables-restore` must be told so that the rules with `comment` are `wanted`; `None` if they are.
    fn change(&self, wanted: &[Accept], comment: &str) -> Option<String> {
        let wanted: Vec<String> = wanted.iter().map(|accept| rule(accept, comment)).collect();
        let here: Vec<String> =
            self.tagged(comment).map(|line| words(line).collect::<Vec<_>>().join(" ")).collect();
        let is_there = |rule: &String| here.iter().any(|line| line[3..] == *rule);
        if here.len() == wanted.len() && wanted.iter().all(is_there) {
            return None;
        }
        let mut text = format!("*{FILTER}\n");
        for line in here {
            let _ = writeln!(text, "-D {}", &line[3..]);
        }
        for rule in wanted {
            let _ = writeln!(text, "-I {rule}");
        }
        Some(text + "COMMIT\n")
    }
}

/// A rule as `-S` prints it, behind its `-A`.
fn rule(accept: &Accept, comment: &str) -> String {
    let Accept { chain, input, output, .. } = accept;
    format!("{chain} -i {input} -o {output} -m comment --comment {comment} -j ACCEPT")
}

impl Family {
    /// The file that names the tables somebody used in this network namespace.
    fn tables(self) -> &'static str {
        match self {
            Family::Ip => "/proc/thread-self/net/ip_tables_names",
            Family::Ip6 => "/proc/thread-self/net/ip6_tables_names",
        }
    }

    /// The programs that may be the one for its tables, the likeliest first.
    fn programs(self) -> [&'static str; 2] {
        match self {
            Family::Ip => ["iptables-legacy", "iptables"],
            Family::Ip6 => ["ip6tables-legacy", "ip6tables"],
        }
    }
}

/// Whether somebody filters with these tables.
fn is_used(family: Family) -> bool {
    // Without these tables in the kernel there is no such file.
    std::fs::read_to_string(family.tables()).is_ok_and(|names| names.lines().any(|name| name == FILTER))
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(SBIN.map(PathBuf::from));
    folders.find_map(|folder| Some(folder.join(program)).filter(|file| file.is_file()))
}

/// The program for the tables of `family`. One called `iptables` may be that for nftables, and says so.
fn program(family: Family) -> Option<PathBuf> {
    let [legacy, plain] = family.programs();
    let is_legacy = |file: &PathBuf| {
        Command::new(file)
            .arg("--version")
            .output()
            .is_ok_and(|output| !String::from_utf8_lossy(&output.stdout).contains("nf_tables"))
    };
    find(legacy).or_else(|| find(plain).filter(is_legacy))
}

/// Where these tables are in use for IPv4: their program, if it is there.
pub(super) fn program_in_use() -> Option<Option<PathBuf>> {
    is_used(Family::Ip).then(|| program(Family::Ip))
}

/// Runs a program of iptables; what it printed.
fn run(program: &Path, args: &[&str], input: &str) -> Result<String, FirewallError> {
    let failed = |said: String| FirewallError::Legacy { program: program.to_owned(), said };
    let io = |error: io::Error| failed(error.to_string());
    let mut command = Command::new(program);
    command.args(["-w", LOCK_SECONDS]).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(io)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ended before it read all says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(io)?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Makes the rules with `comment` those `wanted` names for a family and its chain. Whether anything had to be changed.
///
/// # Errors
/// [`FirewallError::Legacy`].
pub(super) fn apply(
    comment: &str,
    wanted: impl Fn(Family, &'static str) -> Vec<Accept>,
) -> Result<bool, FirewallError> {
    let mut changed = false;
    for family in [Family::Ip, Family::Ip6] {
        if !is_used(family) {
            continue;
        }
        let Some(program) = program(family) else {
            warn_once(family);
            continue;
        };
        changed |= apply_with(&program, comment, |chain| wanted(family, chain))?;
    }
    Ok(changed)
}

fn apply_with(
    program: &Path,
    comment: &str,
    wanted: impl Fn(&'static str) -> Vec<Accept>,
) -> Result<bool, FirewallError> {
    let mut restore: OsString = program.into();
    restore.push("-restore");
    let mut tries = 0;
    loop {
        tries += 1;
        let rules = Rules(run(program, &["-S"], "")?);
        let Some(change) = rules.change(&wanted(rules.forward_chain()), comment) else {
            return Ok(false);
        };
        match run(Path::new(&restore), &["--noflush"], &change) {
            Ok(_) => return Ok(true),
            Err(error) if tries == TRIES => return Err(error),
            // Others changed rules between listing and this.
            Err(_) => {}
        }
    }
}

fn warn_once(family: Family) {
    static SAID: Once = Once::new();
    let [program, _] = family.programs();
    SAID.call_once(|| {
        tracing::warn!(
            "legacy tables of iptables filter here, and {program} is neither in PATH nor in /usr/sbin: if they drop \
             what is forwarded, guests reach nothing until {program} is installed (package iptables) or their \
             FORWARD chain accepts vn-*"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accept(chain: &'static str, output: &str) -> Accept {
        Accept { family: Family::Ip, chain, input: "vn-1".to_owned(), output: output.to_owned() }
    }

    const HOST: &str = "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n";

    #[test]
    fn what_is_missing_is_inserted_in_one_transaction() {
        let rules = Rules(HOST.to_owned());
        assert_eq!(rules.forward_chain(), FORWARD);
        let change = rules.change(&[accept(FORWARD, "vn-1")], "vunet:1").unwrap();
        let insert = "-I FORWARD -i vn-1 -o vn-1 -m comment --comment vunet:1 -j ACCEPT";
        assert_eq!(change, format!("*filter\n{insert}\nCOMMIT\n"));
        assert_eq!(rules.change(&[], "vunet:1"), None);
    }

    #[test]
    fn only_rules_with_the_comment_are_ours() {
        let here = "-N DOCKER-USER\n\
            -A DOCKER-USER -i vn-1 -o vn-1 -m comment --comment \"vunet:1\" -j ACCEPT\n\
            -A DOCKER-USER -i vn-1 -o p0 -m comment --comment \"vunet:11\" -j ACCEPT\n\
            -A DOCKER-USER -m comment --comment \"about vunet:1\" -j RETURN\n";
        let rules = Rules(HOST.to_owned() + here);
        assert_eq!(rules.forward_chain(), DOCKER_USER);
        assert_eq!(rules.change(&[accept(DOCKER_USER, "vn-1")], "vunet:1"), None, "all is there");
        let gone = rules.change(&[], "vunet:1").unwrap();
        assert_eq!(gone.matches("-D ").count(), 1, "{gone}");
        let other = rules.change(&[accept(DOCKER_USER, "p0")], "vunet:1").unwrap();
        assert!(
            other.contains("-D DOCKER-USER -i vn-1 -o vn-1")
                && other.contains("-I DOCKER-USER -i vn-1 -o p0")
        );
    }
}
