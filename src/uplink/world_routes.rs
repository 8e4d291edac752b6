//! Which interfaces lead to the world: those that a default route leaves by, in any table that packets are sent to.
//!
//! A VPN often has its default route in a table of its own, which a rule sends packets to (`ip rule`), or in
//! the main table as two halves, 0.0.0.0/1 and 128.0.0.0/1, which leave the old one in place. A rule's conditions
//! are not judged: an interface too many forwards to guests, and nowhere else (`firewall`).
//!
//! May touch: `links`. Read first: ip-rule(8), rtnetlink(7).

use std::collections::BTreeSet;

use futures_util::StreamExt as _;
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::links::{LinkError, Links, failed};

/// The main table (`RT_TABLE_MAIN`), which is all there is where the kernel knows no rules.
const MAIN: u32 = 254;
/// Longest prefix of a route to half of the world.
const HALF: u8 = 1;

impl Links {
    /// Names of the interfaces that lead to the world over IPv4, in alphabetical order.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn to_the_world(&self) -> Result<Vec<String>, LinkError> {
        let tables = self.tables().await;
        let dump = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let mut routes = std::pin::pin!(self.handle().route().get(dump).execute());
        let mut indices = BTreeSet::new();
        while let Some(route) = routes.next().await {
            let route = route.map_err(failed("list", "routes"))?;
            if tables.contains(&table(&route)) {
                indices.extend(default_route(&route));
            }
        }
        let mut names = BTreeSet::new();
        for index in indices {
            // One that is gone by now leads nowhere.
            names.extend(self.at(index).await?.map(|link| link.name));
        }
        Ok(names.into_iter().collect())
    }

    /// The tables that rules send packets to.
    async fn tables(&self) -> BTreeSet<u32> {
        let mut rules = std::pin::pin!(self.handle().rule().get(IpVersion::V4).execute());
        let mut tables = BTreeSet::new();
        while let Some(rule) = rules.next().await {
            match rule {
                Ok(rule) => tables.extend(looks_up(&rule)),
                // Rules are an option of the kernel's.
                Err(_) => return BTreeSet::from([MAIN]),
            }
        }
        tables
    }
}

/// The table a rule sends packets to, if that is what it does.
fn looks_up(rule: &RuleMessage) -> Option<u32> {
    let long = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    (rule.header.action == RuleAction::ToTable).then(|| long.unwrap_or(rule.header.table.into()))
}

/// The table a route is in.
fn table(route: &RouteMessage) -> u32 {
    let long = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    long.unwrap_or(route.header.table.into())
}

/// Indices of the interfaces that a route to the world, or to half of it, leaves by; none of another route.
fn default_route(route: &RouteMessage) -> Vec<u32> {
    let header = &route.header;
    let leads_there = header.destination_prefix_length <= HALF && header.kind == RouteType::Unicast;
    if !leads_there || header.flags.contains(RouteFlags::Dead) {
        return Vec::new();
    }
    let mut indices = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(index) => indices.push(*index),
            RouteAttribute::MultiPath(hops) => {
                let alive = hops.iter().filter(|hop| !hop.flags.contains(RouteNextHopFlags::Dead));
                indices.extend(alive.map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    indices
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;

    fn route(prefix_len: u8, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::UNSPECIFIED, prefix_len)
            .build();
        route.header.kind = RouteType::Unicast;
        route.attributes = attributes;
        route
    }

    #[test]
    fn a_default_route_or_half_of_one_leads_to_the_world() {
        let oif = || vec![RouteAttribute::Oif(7)];
        assert_eq!(default_route(&route(0, oif())), [7]);
        assert_eq!(default_route(&route(1, oif())), [7]);
        assert!(default_route(&route(2, oif())).is_empty());
        let mut refusing = route(0, oif());
        refusing.header.kind = RouteType::Unreachable;
        assert!(default_route(&refusing).is_empty());
        let mut dead = route(0, oif());
        dead.header.flags = RouteFlags::Dead;
        assert!(default_route(&dead).is_empty());
    }

    #[test]
    fn each_living_hop_of_several_leads_there() {
        let hop = |interface_index, flags| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.flags) = (interface_index, flags);
            hop
        };
        let hops = vec![hop(3, RouteNextHopFlags::empty()), hop(4, RouteNextHopFlags::Dead)];
        assert_eq!(default_route(&route(0, vec![RouteAttribute::MultiPath(hops)])), [3]);
    }

    #[test]
    fn tables_beyond_255_are_known_by_their_attribute() {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.header.table = 100;
        assert_eq!(looks_up(&rule), Some(100));
        rule.attributes.push(RuleAttribute::Table(51_820));
        assert_eq!(looks_up(&rule), Some(51_820));
        rule.header.action = RuleAction::Blackhole;
        assert_eq!(looks_up(&rule), None);
        let mut of_vpn = route(0, vec![RouteAttribute::Table(51_820)]);
        of_vpn.header.table = 252;
        assert_eq!(table(&of_vpn), 51_820);
    }
}
