//! The firewall: the programs vunet needs for a named network, and others' rules that cut guests off.
//!
//! Rules are listed and judged as `uplink::firewall` does before it changes any; none is changed here.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::check::{Check, Fix, State};
use super::facts::Facts;
use super::programs;
use super::tree::Tree;
use super::way::{Asked, LinkAsked};
use crate::uplink::firewall::{self, Survey};

/// How long all programs together may take.
const LIMIT: Duration = Duration::from_millis(2500);

/// What is known of it.
#[derive(Clone, Debug)]
pub(super) struct FirewallFacts {
    /// Where `nft` is.
    pub(super) nft: Option<PathBuf>,
    /// Its version, as it says.
    pub(super) version: String,
    /// Others' rules; in words, why they cannot be listed.
    pub(super) survey: Result<Survey, String>,
    /// Where legacy tables of iptables are in use: their program, and whether they drop what is forwarded.
    pub(super) legacy: Option<Legacy>,
    /// How a package is installed here.
    pub(super) install: &'static str,
}

/// Legacy tables of iptables.
#[derive(Clone, Debug)]
pub(super) struct Legacy {
    /// Their program.
    pub(super) program: Option<PathBuf>,
    /// Whether their policy for what is forwarded is drop.
    pub(super) drops: bool,
    /// Bridges of which they accept in spite of that what comes in and leaves by them.
    pub(super) accepts_within: Vec<String>,
}

impl Legacy {
    /// Runs the program.
    fn read(program: Option<PathBuf>, deadline: Instant) -> Legacy {
        let rules = program.as_ref().map(|program| programs::run(program, &["-S", "FORWARD"], deadline));
        let rules = rules.and_then(Result::ok).unwrap_or_default();
        Legacy {
            program,
            drops: rules.lines().any(|line| line.trim() == "-P FORWARD DROP"),
            accepts_within: rules.lines().filter_map(accepted_within).collect(),
        }
    }
}

/// The interface that a rule, as `iptables -S` prints it, accepts all traffic within of.
fn accepted_within(rule: &str) -> Option<String> {
    let words: Vec<&str> = rule.split_whitespace().collect();
    match words[..] {
        ["-A", "FORWARD", "-i", input, "-o", output, "-j", "ACCEPT"] if input == output => {
            Some(input.to_owned())
        }
        _ => None,
    }
}

impl FirewallFacts {
    /// Runs the programs.
    pub(super) fn read(tree: &Tree) -> FirewallFacts {
        let deadline = Instant::now() + LIMIT;
        let nft = firewall::find_program();
        let run = |args: &[&str]| match &nft {
            Some(program) => programs::run(program, args, deadline),
            None => Err("there is no nft".to_owned()),
        };
        let version = run(&["--version"]).unwrap_or_default();
        let survey =
            run(&firewall::LIST).and_then(|json| Survey::of(&json).map_err(|error| error.to_string()));
        let legacy = firewall::legacy_program().map(|program| Legacy::read(program, deadline));
        let install = install(&tree.text("/etc/os-release").unwrap_or_default());
        FirewallFacts { nft, version: version.trim().to_owned(), survey, legacy, install }
    }
}

/// The command that installs a package, by `/etc/os-release` (os-release(5)).
fn install(os_release: &str) -> &'static str {
    let ids =
        os_release.lines().filter_map(|line| line.strip_prefix("ID=").or(line.strip_prefix("ID_LIKE=")));
    let ids: Vec<&str> = ids.flat_map(|ids| ids.trim_matches('"').split(' ')).collect();
    let commands = [
        ("debian", "apt-get install -y"),
        ("fedora", "dnf install -y"),
        ("rhel", "dnf install -y"),
        ("suse", "zypper install -y"),
        ("arch", "pacman -S"),
        ("alpine", "apk add"),
    ];
    let known = commands.iter().find(|(id, _)| ids.contains(id));
    known.map_or("apt-get install -y", |(_, command)| command)
}

fn late(name: &'static str, state: State) -> Check {
    Check::late(name, state, "look what holds nft up: `nft list ruleset`")
}

/// What the firewall of a named network needs, with the world or not.
pub(super) fn of_network(facts: &Facts, world: bool) -> Vec<Check> {
    let Some(firewall) = &facts.firewall else { return vec![late("nft", State::Missing)] };
    let mut checks = vec![nft(facts, firewall)];
    let firewalld = firewall.survey.as_ref().is_ok_and(|survey| survey.firewalld_rejects);
    if firewalld {
        checks.push(Check::warn(
            "firewalld",
            "it rejects what guests send to the world and to each other until it trusts the bridges",
            Fix::AsRoot(vec![
                "firewall-cmd --permanent --zone=trusted --add-interface=vn-+".to_owned(),
                "firewall-cmd --reload".to_owned(),
            ]),
        ));
    }
    if world && let Some(legacy) = &firewall.legacy {
        checks.push(match legacy.program {
            Some(_) => Check::ok("iptables-legacy", "its tables are in use, and get accepts for guests too"),
            None => Check::warn(
                "iptables-legacy",
                "its tables are in use: if they drop what is forwarded, guests reach nothing",
                Fix::root(format!("{} iptables", firewall.install)),
            ),
        });
    }
    checks
}

fn nft(facts: &Facts, firewall: &FirewallFacts) -> Check {
    const NAME: &str = "nft";
    let Some(program) = &firewall.nft else {
        let says = "neither in PATH nor in /usr/sbin or /sbin: needed to keep the network apart and to translate; networks \
                    made with --rootless need none";
        return Check::missing(NAME, says, Fix::root(format!("{} nftables", firewall.install)));
    };
    let (program, version) = (program.display(), &firewall.version);
    // Without the right to list rules it refuses, which is told of as CAP_NET_ADMIN.
    let may_list = facts.links.as_ref().is_some_and(|links| links.may_change == Ok(true));
    match &firewall.survey {
        Err(said) if may_list => {
            let says = format!("{program} ({version}) cannot list rules: {said}");
            let advice = "an nft with JSON (0.9.1 or later) and a kernel with nf_tables are needed; networks made with \
                          --rootless need neither";
            Check::missing(NAME, says, Fix::advice(advice))
        }
        _ => Check::ok(NAME, format!("{program}, {version}")),
    }
}

/// Rules that drop frames between ports of the bridge the guest is to be on.
pub(super) fn bridged(facts: &Facts, asked: &Asked) -> Option<Check> {
    const NAME: &str = "bridge-nf-call-iptables";
    if !matches!(asked.link, LinkAsked::Any | LinkAsked::Bridge(_)) || !facts.settings.bridge_netfilter {
        return None;
    }
    let bridge = facts.links.as_ref()?.bridge_of(&asked.link)?.name.clone();
    let Some(firewall) = &facts.firewall else { return Some(late(NAME, State::Warn)) };
    let survey = firewall.survey.as_ref().ok();
    let chain = survey
        .filter(|survey| !survey.accepts_within.contains(&bridge))
        .and_then(|survey| survey.drops_forwarded);
    let legacy =
        firewall.legacy.as_ref().filter(|legacy| legacy.drops && !legacy.accepts_within.contains(&bridge));
    let (program, chain) = match (chain, legacy.and_then(|legacy| legacy.program.as_ref())) {
        (Some(chain), _) => ("iptables".to_owned(), chain),
        (None, Some(program)) => (program.display().to_string(), "FORWARD"),
        (None, None) => {
            return Some(Check::ok(NAME, format!("1, and iptables lets pass what is within {bridge}")));
        }
    };
    let says = format!(
        "iptables sees what is bridged, and its policy for it is drop: what the guest sends and gets by {bridge} is lost \
         unless a rule accepts it"
    );
    Some(Check::warn(
        NAME,
        says,
        Fix::root(format!("{program} -I {chain} -i {bridge} -o {bridge} -j ACCEPT")),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::facts::tests::facts;
    use super::super::links::LinkFacts;
    use super::super::routes::Settings;
    use super::*;
    use crate::uplink::links::{Link, LinkKind};

    fn firewall() -> FirewallFacts {
        FirewallFacts {
            nft: Some("/usr/sbin/nft".into()),
            version: "nftables v1.0.6".to_owned(),
            survey: Ok(Survey::default()),
            legacy: None,
            install: "apt-get install -y",
        }
    }

    fn links() -> LinkFacts {
        let name = "br0".to_owned();
        let bridge = Link {
            index: 3,
            name,
            kind: LinkKind::Bridge,
            mac: None,
            ip_mtu: 1500,
            master: None,
            lower: None,
            up: true,
            alias: None,
        };
        LinkFacts {
            may_change: Ok(true),
            all: vec![bridge],
            bridge: None,
            taps: Vec::new(),
            uplinks: Vec::new(),
        }
    }

    fn of(firewall: FirewallFacts) -> Vec<(&'static str, State, String)> {
        let facts = Facts { firewall: Some(firewall), links: Some(links()), ..facts() };
        let line = |check: Check| {
            let fix = check.fix.map(|fix| fix.line(true)).unwrap_or_default();
            (check.name, check.state, fix)
        };
        of_network(&facts, true).into_iter().map(line).collect()
    }

    #[test]
    fn nft_is_installed_as_the_distribution_does() {
        assert_eq!(of(firewall())[0].1, State::Ok);
        let none = of(FirewallFacts { nft: None, ..firewall() });
        assert_eq!(none, [("nft", State::Missing, "apt-get install -y nftables".to_owned())]);
        assert_eq!(install("ID=debian\n"), "apt-get install -y");
        assert_eq!(install("NAME=x\nID=rocky\nID_LIKE=\"rhel centos fedora\"\n"), "dnf install -y");
        assert_eq!(install("ID=alpine\n"), "apk add");
        let broken = of(FirewallFacts { survey: Err("no JSON".to_owned()), ..firewall() });
        assert_eq!((broken[0].0, broken[0].1), ("nft", State::Missing));
    }

    #[test]
    fn what_else_filters_is_told_of() {
        let survey = Ok(Survey { firewalld_rejects: true, drops_forwarded: None, ..Survey::default() });
        let rejected = of(FirewallFacts { survey, ..firewall() });
        assert_eq!((rejected[1].0, rejected[1].1), ("firewalld", State::Warn));
        assert!(rejected[1].2.starts_with("firewall-cmd --permanent"), "{}", rejected[1].2);
        let with = |program: Option<&str>| {
            let program = program.map(PathBuf::from);
            of(FirewallFacts {
                legacy: Some(Legacy { program, drops: true, accepts_within: Vec::new() }),
                ..firewall()
            })
            .remove(1)
        };
        assert_eq!(with(Some("/usr/sbin/iptables-legacy")).1, State::Ok);
        assert_eq!(with(None), ("iptables-legacy", State::Warn, "apt-get install -y iptables".to_owned()));
        let facts = Facts { firewall: None, ..facts() };
        assert_eq!(of_network(&facts, true)[0].state, State::Missing, "it hangs");
    }

    #[test]
    fn bridged_frames_that_iptables_drops_get_an_accept() {
        let of = |bridge_netfilter, drops_forwarded, legacy: Option<Legacy>, link| {
            let survey = Ok(Survey { drops_forwarded, ..Survey::default() });
            let settings = Settings { bridge_netfilter, ..Settings::default() };
            let firewall = Some(FirewallFacts { survey, legacy, ..firewall() });
            let facts = Facts { firewall, settings, links: Some(links()), ..facts() };
            bridged(&facts, &Asked { link, ..Asked::plain() })
        };
        let line = |check: Option<Check>| check.unwrap().fix.unwrap().line(true);
        assert_eq!(of(false, Some("FORWARD"), None, LinkAsked::Any), None);
        assert_eq!(of(true, Some("FORWARD"), None, LinkAsked::Tap(None)), None);
        assert_eq!(of(true, None, None, LinkAsked::Any).unwrap().state, State::Ok);
        let docker = of(true, Some("DOCKER-USER"), None, LinkAsked::Any);
        assert_eq!(line(docker), "iptables -I DOCKER-USER -i br0 -o br0 -j ACCEPT");
        let accepts_within = Vec::new();
        let legacy = Legacy { program: Some("/sbin/iptables-legacy".into()), drops: true, accepts_within };
        let fix = line(of(true, None, Some(legacy.clone()), LinkAsked::Any));
        assert_eq!(fix, "/sbin/iptables-legacy -I FORWARD -i br0 -o br0 -j ACCEPT");
        let accepts = Legacy { accepts_within: vec!["br0".to_owned()], ..legacy.clone() };
        assert_eq!(of(true, None, Some(accepts), LinkAsked::Any).unwrap().state, State::Ok);
        assert_eq!(accepted_within("-A FORWARD -i br0 -o br0 -j ACCEPT").as_deref(), Some("br0"));
        assert_eq!(accepted_within("-A FORWARD -i br0 -o eth0 -j ACCEPT"), None);
        let lets = Legacy { drops: false, ..legacy };
        assert_eq!(of(true, None, Some(lets), LinkAsked::Any).unwrap().state, State::Ok);
    }
}
