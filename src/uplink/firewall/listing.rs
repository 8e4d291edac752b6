//! What rules are there: the output of `nft -j list ruleset`, read only as far as it matters here.
//!
//! Others' rules may hold statements that no library knows, so they are looked at as JSON.

use std::collections::BTreeMap;

use nftables::batch::Batch;
use nftables::schema::{NfListObject, Rule};
use nftables::types::NfFamily;
use serde_json::Value;

/// A chain of another program that gets our accepts, and the interfaces each is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Accept {
    /// `ip` or `ip6`.
    pub family: Family,
    /// The chain, of the table `filter`.
    pub chain: &'static str,
    /// Interface it comes in by.
    pub input: String,
    /// Interface it leaves by.
    pub output: String,
}

/// A family whose table `filter` belongs to iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Family {
    Ip,
    Ip6,
}

impl Family {
    pub(super) fn nf(self) -> NfFamily {
        match self {
            Family::Ip => NfFamily::IP,
            Family::Ip6 => NfFamily::IP6,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
        }
    }
}

/// The table of iptables that filters.
pub(super) const FILTER: &str = "filter";
/// Its chain for what is forwarded.
pub(super) const FORWARD: &str = "FORWARD";
/// Docker's chain for users' rules, which `FORWARD` goes to first.
pub(super) const DOCKER_USER: &str = "DOCKER-USER";

/// firewalld's table, and its chain for what is forwarded, which begins the names of those it goes on to.
const FIREWALLD: &str = "firewalld";
const FIREWALLD_FORWARD: &str = "filter_FORWARD";

/// The ruleset of a network namespace.
#[derive(Debug, Default)]
pub(super) struct Listing {
    tables: Vec<Value>,
    chains: Vec<Value>,
    rules: Vec<Value>,
}

/// The text of a field, empty if it is not there.
fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The interface that a rule accepts all traffic within of.
fn accepted_within(rule: &Value) -> Option<String> {
    let statements = rule["expr"].as_array()?;
    let accepts = statements.iter().any(|statement| statement.get("accept").is_some());
    let mut matches: Vec<(&str, &str)> = Vec::new();
    for condition in statements.iter().filter_map(|statement| statement.get("match")) {
        matches.push((condition["left"]["meta"]["key"].as_str()?, condition["right"].as_str()?));
    }
    match matches[..] {
        [("iifname", input), ("oifname", output)] if accepts && input == output => Some(input.to_owned()),
        _ => None,
    }
}

impl Listing {
    pub(super) fn parse(json: &str) -> serde_json::Result<Listing> {
        let mut whole: Value = serde_json::from_str(json)?;
        let mut listing = Listing::default();
        let Some(objects) = whole.get_mut("nftables").and_then(Value::as_array_mut) else {
            return Ok(listing);
        };
        for object in objects {
            for (kind, list) in
                [("table", &mut listing.tables), ("chain", &mut listing.chains), ("rule", &mut listing.rules)]
            {
                if let Some(found) = object.get_mut(kind) {
                    list.push(found.take());
                }
            }
        }
        Ok(listing)
    }

    /// Whether there is a table `name` of the family `inet`.
    pub(super) fn has_table(&self, name: &str) -> bool {
        self.tables.iter().any(|table| text(table, "family") == "inet" && text(table, "name") == name)
    }

    /// Whether that table has the chain `mark` and this many rules.
    pub(super) fn table_is(&self, name: &str, mark: &str, rules: usize) -> bool {
        let of_table = |object: &&Value| text(object, "family") == "inet" && text(object, "table") == name;
        self.chains.iter().filter(of_table).any(|chain| text(chain, "name") == mark)
            && self.rules.iter().filter(of_table).count() == rules
    }

    /// Whether firewalld filters here and has no rule about this bridge or about all of ours.
    pub(super) fn firewalld_rejects(&self, bridge: &str, all: &str) -> bool {
        let of_firewalld =
            |object: &&Value| text(object, "family") == "inet" && text(object, "table") == FIREWALLD;
        let names = [bridge, all].map(|name| format!("\"{name}\""));
        let is_about_us = |rule: &Value| {
            text(rule, "chain").starts_with(FIREWALLD_FORWARD)
                && names.iter().any(|name| rule["expr"].to_string().contains(name))
        };
        let filters =
            self.chains.iter().filter(of_firewalld).any(|chain| text(chain, "name") == FIREWALLD_FORWARD);
        filters && !self.rules.iter().filter(of_firewalld).any(is_about_us)
    }

    /// The chain of `family` that accepts go to, if iptables filters what is forwarded.
    pub(super) fn forward_chain(&self, family: Family) -> Option<&'static str> {
        let has = |name: &str| {
            self.chains.iter().any(|chain| {
                text(chain, "family") == family.name()
                    && text(chain, "table") == FILTER
                    && text(chain, "name") == name
            })
        };
        match (has(FORWARD), has(DOCKER_USER)) {
            (false, _) => None,
            (true, true) => Some(DOCKER_USER),
            (true, false) => Some(FORWARD),
        }
    }

    /// The chain that accepts go to, if iptables' policy for what is forwarded over IPv4 is drop.
    pub(super) fn drops_forwarded(&self) -> Option<&'static str> {
        let drops = self.chains.iter().any(|chain| {
            text(chain, "family") == Family::Ip.name()
                && text(chain, "table") == FILTER
                && text(chain, "name") == FORWARD
                && text(chain, "policy") == "drop"
        });
        self.forward_chain(Family::Ip).filter(|_| drops)
    }

    /// Interfaces of which that chain, or Docker's, accepts whatever comes in and leaves by them.
    pub(super) fn accepts_within(&self) -> Vec<String> {
        let in_chain = |rule: &&Value| {
            text(rule, "family") == Family::Ip.name()
                && text(rule, "table") == FILTER
                && [FORWARD, DOCKER_USER].contains(&text(rule, "chain"))
        };
        self.rules.iter().filter(in_chain).filter_map(accepted_within).collect()
    }

    /// Whether the rules with `comment` are those of `wanted`: as many in each chain.
    pub(super) fn holds_tagged(&self, comment: &str, wanted: &[Accept]) -> bool {
        let mut counts: BTreeMap<(&str, &str), i64> = BTreeMap::new();
        for rule in self.tagged(comment) {
            *counts.entry((text(rule, "family"), text(rule, "chain"))).or_default() += 1;
        }
        for accept in wanted {
            *counts.entry((accept.family.name(), accept.chain)).or_default() -= 1;
        }
        let names = |interface: &str| {
            self.tagged(comment).any(|rule| rule["expr"].to_string().contains(&format!("\"{interface}\"")))
        };
        counts.values().all(|count| *count == 0)
            && wanted.iter().all(|accept| names(&accept.input) && names(&accept.output))
    }

    /// Rules of the tables of iptables with `comment`.
    fn tagged<'a>(&'a self, comment: &'a str) -> impl Iterator<Item = &'a Value> {
        self.rules.iter().filter(move |rule| {
            text(rule, "comment") == comment
                && text(rule, "table") == FILTER
                && [Family::Ip, Family::Ip6].iter().any(|family| text(rule, "family") == family.name())
        })
    }

    /// Deletes the rules with `comment`.
    pub(super) fn delete_tagged(&self, comment: &str, batch: &mut Batch<'static>) {
        for rule in self.tagged(comment) {
            let handle = rule.get("handle").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            let family = if text(rule, "family") == Family::Ip.name() { Family::Ip } else { Family::Ip6 };
            batch.delete(NfListObject::Rule(Rule {
                family: family.nf(),
                table: FILTER.into(),
                chain: text(rule, "chain").to_owned().into(),
                handle,
                ..Rule::default()
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCKER: &str = r#"{"nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "ip", "name": "filter", "handle": 1}},
        {"table": {"family": "inet", "name": "vunet-1", "handle": 2}},
        {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, "policy": "drop"}},
        {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 2}},
        {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "handle": 3}},
        {"chain": {"family": "inet", "table": "filter", "name": "DOCKER-USER", "handle": 3}},
        {"rule": {"family": "ip", "table": "filter", "chain": "DOCKER-USER", "handle": 7,
                  "comment": "vunet:1", "expr": [{"match": {"right": "vn-1"}}, {"accept": null}]}},
        {"rule": {"family": "ip", "table": "filter", "chain": "DOCKER-USER", "handle": 8,
                  "expr": [{"xt": {"type": "match", "name": "unheard of"}}]}},
        {"rule": {"family": "ip", "table": "mine", "chain": "c", "handle": 9, "comment": "vunet:1", "expr": []}},
        {"chain": {"family": "inet", "table": "vunet-1", "name": "is_1", "handle": 1}},
        {"rule": {"family": "inet", "table": "vunet-1", "chain": "forward", "handle": 4, "expr": []}}
    ]}"#;

    fn accept(chain: &'static str, output: &str) -> Accept {
        Accept { family: Family::Ip, chain, input: "vn-1".to_owned(), output: output.to_owned() }
    }

    #[test]
    fn chains_of_iptables_are_found_and_dockers_goes_first() {
        let listing = Listing::parse(DOCKER).unwrap();
        assert_eq!(listing.forward_chain(Family::Ip), Some(DOCKER_USER));
        assert_eq!(listing.forward_chain(Family::Ip6), Some(FORWARD));
        assert_eq!(Listing::parse(r#"{"nftables": []}"#).unwrap().forward_chain(Family::Ip), None);
    }

    #[test]
    fn a_policy_of_drop_is_seen_and_what_is_accepted_within_a_bridge() {
        let listing = Listing::parse(DOCKER).unwrap();
        assert_eq!(listing.drops_forwarded(), Some(DOCKER_USER));
        assert!(listing.accepts_within().is_empty(), "its rules say nothing of where it leaves");
        let lets = DOCKER.replace("\"drop\"", "\"accept\"");
        assert_eq!(Listing::parse(&lets).unwrap().drops_forwarded(), None);
        let within = |input: &str, output: &str, verdict: &str| {
            let name = |key: &str, name: &str| {
                format!(
                    r#"{{"match": {{"op": "==", "left": {{"meta": {{"key": "{key}"}}}}, "right": "{name}"}}}}"#
                )
            };
            let expr = format!("{}, {}", name("iifname", input), name("oifname", output));
            let rule = format!(
                r#"{{"rule": {{"family": "ip", "table": "filter", "chain": "FORWARD", "handle": 4,
                    "expr": [{expr}, {{"counter": {{}}}}, {{"{verdict}": null}}]}}}}"#
            );
            Listing::parse(&format!(r#"{{"nftables": [{rule}]}}"#)).unwrap().accepts_within()
        };
        assert_eq!(within("br0", "br0", "accept"), ["br0"]);
        assert!(within("br0", "eth0", "accept").is_empty() && within("br0", "br0", "drop").is_empty());
    }

    #[test]
    fn tagged_rules_are_counted_by_chain_and_only_they_are_deleted() {
        let listing = Listing::parse(DOCKER).unwrap();
        assert!(listing.holds_tagged("vunet:1", &[accept(DOCKER_USER, "vn-1")]));
        assert!(!listing.holds_tagged("vunet:1", &[accept(FORWARD, "vn-1")]), "in another chain");
        assert!(!listing.holds_tagged("vunet:1", &[accept(DOCKER_USER, "p0")]), "for another interface");
        assert!(!listing.holds_tagged("vunet:1", &[]));
        assert!(listing.holds_tagged("vunet:2", &[]));
        let mut batch = Batch::new();
        listing.delete_tagged("vunet:1", &mut batch);
        let json = serde_json::to_value(batch.to_nftables()).unwrap();
        let deleted = json["nftables"].as_array().unwrap();
        assert_eq!(deleted.len(), 1, "neither another's rule nor one of a table that is not iptables'");
        assert_eq!(deleted[0]["delete"]["rule"]["handle"], 7);
    }

    #[test]
    fn firewalld_rejects_until_a_zone_has_the_bridge() {
        let rejects = |objects: &str| {
            let chain = r#"{"chain": {"family": "inet", "table": "firewalld", "name": "filter_FORWARD"}}"#;
            let json = format!(r#"{{"nftables": [{chain}{objects}]}}"#);
            Listing::parse(&json).unwrap().firewalld_rejects("vn-1", "vn-*")
        };
        let rule = |chain: &str, interface: &str| {
            format!(
                r#", {{"rule": {{"family": "inet", "table": "firewalld", "chain": "{chain}",
                    "expr": [{{"match": {{"right": "{interface}"}}}}]}}}}"#
            )
        };
        assert!(rejects(""));
        assert!(rejects(&rule("filter_FORWARD_ZONES", "vn-11")), "another's bridge");
        assert!(rejects(&rule("nat_PREROUTING_ZONES", "vn-1")), "nothing is accepted there");
        assert!(!rejects(&rule("filter_FORWARD_ZONES", "vn-1")));
        assert!(!rejects(&rule("filter_FORWARD_ZONES", "vn-*")));
        assert!(!Listing::parse(DOCKER).unwrap().firewalld_rejects("vn-1", "vn-*"), "no firewalld");
    }

    #[test]
    fn a_table_is_what_its_mark_and_number_of_rules_say() {
        let listing = Listing::parse(DOCKER).unwrap();
        assert!(listing.has_table("vunet-1"));
        assert!(!listing.has_table("filter"), "that one is of another family");
        assert!(listing.table_is("vunet-1", "is_1", 1));
        assert!(!listing.table_is("vunet-1", "is_1", 2), "somebody flushed a chain");
        assert!(!listing.table_is("vunet-1", "is_2", 1));
        assert!(!listing.table_is("vunet-2", "is_1", 0));
    }
}
