//! `vunet doctor`: what this host lacks for a run, and the command that fixes it.
//!
//! Everything is read first (`facts`), each group of it within a bound, then judged: a check is a function of what
//! was read, one file for each subject. What can be tried is tried with the code the modes themselves use, on sockets and
//! namespaces of our own, and let go at once; nothing of the host is changed.
//!
//! May touch: all rooms, to read.

mod check;
mod facts;
mod firewall;
mod kernel;
mod links;
mod names;
mod places;
mod ports;
mod privilege;
mod programs;
mod report;
mod routes;
mod tree;
mod way;

pub use check::{Check, Fix, State, quoted};
pub use report::{Report, WayReport};
pub use way::{Asked, LinkAsked, SubnetNotice, Way};

use self::facts::Facts;
use self::tree::Tree;
use crate::network::definition::Kind;

/// Finds out what `asked` lacks here, within five seconds. Must be called while the process has one thread.
pub fn examine(asked: Asked) -> Report {
    let tree = Tree::of_host();
    let wanted = |group| match asked.way {
        Some(way) => way.needs(group),
        None => way::ALL.iter().any(|way| way.needs(group)),
    };
    let facts = Facts::read(&tree, &asked, wanted);
    report(&facts, asked)
}

/// Judges `facts`.
fn report(facts: &Facts, asked: Asked) -> Report {
    let is_overview = asked.way.is_none() && asked.network.is_none();
    let asked = with_network(facts, asked);
    let of = |way: Way| WayReport { way, checks: way.checks(facts, &asked) };
    let way = asked.way.unwrap_or(way::ALL[0]);
    let others = way::ALL.iter().filter(|other| is_overview && **other != way);
    Report { asked: of(way), others: others.map(|way| of(*way)).collect(), is_root: facts.who.is_root() }
}

/// The same, with the way and the link of the named network.
fn with_network(facts: &Facts, asked: Asked) -> Asked {
    if asked.network.is_none() {
        return asked;
    }
    let kind = facts.places.as_ref().and_then(|places| places.network.as_ref()?.as_ref().ok());
    let (way, link) = match kind {
        Some(Kind::Bridge { bridge, .. }) => (Way::Bridge, LinkAsked::Bridge(bridge.clone())),
        Some(Kind::HostOnly { .. }) => (Way::NetworkIsolated, LinkAsked::Any),
        Some(Kind::Rootless { world: true, .. }) => (Way::Rootless, LinkAsked::Any),
        Some(Kind::Rootless { world: false, .. }) => (Way::RootlessIsolated, LinkAsked::Any),
        Some(Kind::Nat { .. }) | None => (Way::Network, LinkAsked::Any),
    };
    Asked { way: Some(way), link, ..asked }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_flags_all_ways_are_told_of_and_the_default_one_decides() {
        let overview = report(&facts::tests::facts(), Asked::plain());
        assert_eq!(overview.asked.way, Way::Sockets);
        assert_eq!(overview.others.len(), 5);
        assert!(overview.others.iter().all(|other| other.way != Way::Sockets));
        let one = report(&facts::tests::facts(), Asked { way: Some(Way::Isolated), ..Asked::plain() });
        assert_eq!((one.asked.way, one.others.len()), (Way::Isolated, 0));
    }

    #[test]
    fn a_network_without_a_definition_is_missing_and_judged_as_one_of_nat() {
        let name = Some("lab".parse().unwrap());
        let asked = with_network(&facts::tests::facts(), Asked { network: name, ..Asked::plain() });
        assert_eq!(asked.way, Some(Way::Network));
    }

    #[test]
    fn each_way_names_what_is_not_known_of_it_as_missing() {
        // Nothing that is read in a thread came in time.
        for way in way::ALL {
            let report = report(&facts::tests::facts(), Asked { way: Some(way), ..Asked::plain() });
            assert!(!report.is_ready(), "{way:?}: {}", report.text());
            assert!(report.text().contains("no answer in time"), "{way:?}");
        }
    }
}
