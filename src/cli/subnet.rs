//! Which subnet the guest gets: the one asked for, or a default that hides no network of the host.

use std::fmt;
use std::net::Ipv4Addr;

use crate::addr::Ipv4Subnet;
use crate::uplink::sys::routes::HostRoute;

/// Third octet of the defaults tried in NAT mode, 10.0.2.0/24 first.
const NAT_THIRD_OCTETS: std::ops::RangeInclusive<u8> = 2..=254;

/// How a subnet came to be the guest's, and what the user should know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing to say.
    Free,
    /// The first default is taken, a later one is not.
    Moved {
        /// The default passed over.
        from: Ipv4Subnet,
        /// What it overlaps.
        route: HostRoute,
    },
    /// Every default overlaps a route; the first is kept.
    NoneFree {
        /// What the first default overlaps.
        route: HostRoute,
    },
    /// The subnet was asked for and overlaps a route.
    AskedFor {
        /// What it overlaps.
        route: HostRoute,
    },
}

/// The `third`th of the defaults.
fn slash_24(third: u8) -> Ipv4Subnet {
    Ipv4Subnet::new(Ipv4Addr::new(10, 0, third, 0), 24).expect("10.0.n.0/24 has no host bits")
}

/// The default in NAT mode: 10.0.2.0/24.
pub(super) fn nat_default() -> Ipv4Subnet {
    slash_24(*NAT_THIRD_OCTETS.start())
}

/// The default of a network without the world: 10.0.0.0/24.
pub(super) fn isolated_default() -> Ipv4Subnet {
    slash_24(0)
}

/// The first default of NAT mode that overlaps none of `routes`.
pub(super) fn pick(routes: &[HostRoute]) -> (Ipv4Subnet, Verdict) {
    let default = nat_default();
    let Some(route) = overlapped(default, routes).cloned() else {
        return (default, Verdict::Free);
    };
    match NAT_THIRD_OCTETS.map(slash_24).find(|&subnet| overlapped(subnet, routes).is_none()) {
        Some(free) => (free, Verdict::Moved { from: default, route }),
        None => (default, Verdict::NoneFree { route }),
    }
}

/// A subnet for a named network: the first of the defaults, `first` before all, that overlaps neither a route
/// nor a network there is; if each overlaps a route, the first that overlaps no network. None if networks
/// have them all.
pub(super) fn pick_apart(
    first: Ipv4Subnet,
    routes: &[HostRoute],
    networks: &[Ipv4Subnet],
) -> Option<(Ipv4Subnet, Verdict)> {
    let candidates = || {
        let others = NAT_THIRD_OCTETS.map(slash_24).filter(move |&subnet| subnet != first);
        let apart = |subnet: &Ipv4Subnet| networks.iter().all(|network| !network.overlaps(*subnet));
        std::iter::once(first).chain(others).filter(apart)
    };
    let default = candidates().next()?;
    let Some(route) = overlapped(default, routes).cloned() else {
        return Some((default, Verdict::Free));
    };
    Some(match candidates().find(|&subnet| overlapped(subnet, routes).is_none()) {
        Some(free) => (free, Verdict::Moved { from: default, route }),
        None => (default, Verdict::NoneFree { route }),
    })
}

/// What is to be said of a `subnet` that was asked for.
pub(super) fn judge(subnet: Ipv4Subnet, routes: &[HostRoute]) -> Verdict {
    match overlapped(subnet, routes) {
        None => Verdict::Free,
        Some(route) => Verdict::AskedFor { route: route.clone() },
    }
}

fn overlapped(subnet: Ipv4Subnet, routes: &[HostRoute]) -> Option<&HostRoute> {
    routes.iter().find(|route| route.overlaps(subnet))
}

/// Something worth a line in the log once the log is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Good to know.
    Info(String),
    /// Something the user may have to act on.
    Warn(String),
}

impl Notice {
    /// Writes the notice to the log.
    pub fn log(&self) {
        match self {
            Notice::Info(text) => tracing::info!("{text}"),
            Notice::Warn(text) => tracing::warn!("{text}"),
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Notice::Info(text) | Notice::Warn(text)) = self;
        f.write_str(text)
    }
}

/// The words for `verdict` on `subnet`, if there is anything to say.
pub(super) fn notice(subnet: Ipv4Subnet, verdict: Verdict) -> Option<Notice> {
    match verdict {
        Verdict::Free => None,
        Verdict::Moved { from, route } => Some(Notice::Info(format!(
            "the default subnet {from} overlaps the host's route to {route}: the guest gets {subnet} instead \
             (--subnet chooses another)"
        ))),
        Verdict::NoneFree { route } => Some(Notice::Warn(format!(
            "every default subnet overlaps a route of the host, {subnet} the one to {route}: keeping {subnet}; \
             the guest cannot reach what has the same addresses there; --subnet chooses another"
        ))),
        Verdict::AskedFor { route } => Some(Notice::Warn(format!(
            "subnet {subnet} overlaps the host's route to {route}: the guest cannot reach what has the same \
             addresses there; give --subnet another if it should"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(list: &[(&str, u8)]) -> Vec<HostRoute> {
        let route = |&(network, prefix_len): &(&str, u8)| HostRoute {
            network: network.parse().unwrap(),
            prefix_len,
            interface: "eth0".to_owned(),
        };
        list.iter().map(route).collect()
    }

    fn subnet(text: &str) -> Ipv4Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn a_free_default_is_taken_without_a_word() {
        let (picked, verdict) = pick(&routes(&[("192.168.1.0", 24), ("10.0.3.0", 24)]));
        assert_eq!(picked, subnet("10.0.2.0/24"));
        assert_eq!(notice(picked, verdict), None);
    }

    #[test]
    fn an_overlapped_default_moves_to_the_next_free_one_and_says_so() {
        let (picked, verdict) = pick(&routes(&[("10.0.2.128", 25), ("10.0.3.7", 32), ("10.0.4.0", 23)]));
        assert_eq!(picked, subnet("10.0.6.0/24"));
        let Some(Notice::Info(text)) = notice(picked, verdict) else { panic!("an info") };
        for part in ["10.0.2.0/24", "10.0.2.128/25 on eth0", "10.0.6.0/24", "--subnet"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn the_last_default_is_found_and_one_past_it_keeps_the_first_with_a_warning() {
        let all_but_last: Vec<_> = (2..254).map(|third| (format!("10.0.{third}.0"), 24)).collect();
        let mut taken: Vec<(&str, u8)> = all_but_last.iter().map(|(net, len)| (net.as_str(), *len)).collect();
        assert_eq!(pick(&routes(&taken)).0, subnet("10.0.254.0/24"));
        taken.push(("10.0.254.0", 24));
        let (picked, verdict) = pick(&routes(&taken));
        assert_eq!(picked, subnet("10.0.2.0/24"));
        assert!(matches!(notice(picked, verdict), Some(Notice::Warn(_))));
    }

    #[test]
    fn a_named_networks_subnet_keeps_away_from_routes_and_other_networks() {
        let pick = |routes: &[HostRoute], networks: &[&str]| {
            let networks: Vec<Ipv4Subnet> = networks.iter().map(|text| subnet(text)).collect();
            pick_apart(nat_default(), routes, &networks)
        };
        assert_eq!(pick(&[], &[]), Some((subnet("10.0.2.0/24"), Verdict::Free)));
        let (picked, verdict) = pick(&routes(&[("10.0.4.0", 24)]), &["10.0.2.0/24", "10.0.3.0/25"]).unwrap();
        assert_eq!(picked, subnet("10.0.5.0/24"));
        assert!(matches!(verdict, Verdict::Moved { .. }));
        // A VPN over all of it: kept with a warning, yet never another network's.
        let (picked, verdict) = pick(&routes(&[("10.0.0.0", 8)]), &["10.0.2.0/24"]).unwrap();
        assert_eq!(picked, subnet("10.0.3.0/24"));
        assert!(matches!(verdict, Verdict::NoneFree { .. }));
        assert_eq!(pick(&[], &["10.0.0.0/8"]), None);
        let isolated = pick_apart(isolated_default(), &[], &[]).unwrap();
        assert_eq!(isolated, (subnet("10.0.0.0/24"), Verdict::Free));
    }

    #[test]
    fn a_vpn_over_all_of_ten_keeps_the_default_with_a_warning() {
        let (picked, verdict) = pick(&routes(&[("10.0.0.0", 8)]));
        assert_eq!(picked, nat_default());
        let Some(Notice::Warn(text)) = notice(picked, verdict) else { panic!("a warning") };
        assert!(text.contains("10.0.0.0/8 on eth0"), "{text}");
    }

    #[test]
    fn a_subnet_asked_for_is_kept_with_a_warning_if_it_overlaps() {
        let asked = subnet("192.168.1.0/25");
        assert_eq!(judge(asked, &routes(&[("10.0.0.0", 8)])), Verdict::Free);
        let verdict = judge(asked, &routes(&[("192.168.0.0", 16)]));
        assert!(matches!(notice(asked, verdict), Some(Notice::Warn(_))));
    }
}
