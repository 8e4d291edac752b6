//! A network's rules as objects of nftables.
//!
//! ```text
//! chain forward (filter, before others')          guests among themselves; out and back; nothing else
//! chain input (filter, before others')            what guests may say to the host
//! chain published (nat, prerouting)               ports of the host that lead to guests
//! chain outgoing (nat, postrouting)               masquerade
//! chain is_… (no hook, empty)                     which ruleset this is
//! ```
//! Bridged frames pass `forward` too where `bridge-nf-call-iptables` is 1, with the bridge as both interfaces.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::net::Ipv4Addr;

use nftables::batch::Batch;
use nftables::expr::{
    CT, Expression, Fib, FibFlag, FibResult, Map, Meta, MetaKey, NamedExpression, Payload, PayloadField,
    Prefix, SetItem,
};
use nftables::schema::{Chain, NfCmd, NfListObject, Rule, Table};
use nftables::stmt::{Match, NAT, NATFamily, Operator, Reject, RejectType, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};

use super::listing::{Accept, FILTER, Family, Listing};
use super::{Beyond, Redirect, Ruleset};
use crate::addr::{Ipv4Subnet, LinkName};

/// Priority of our filters: before those of iptables and of most users (`filter`, 0). A drop is final
/// wherever it is; being first spares others what we drop.
const FILTER_PRIORITY: i32 = -10;
/// `dstnat` and `srcnat`.
const DSTNAT_PRIORITY: i32 = -100;
const SRCNAT_PRIORITY: i32 = 100;
/// Bridges of all named networks.
pub(super) const OWN_BRIDGES: &str = "vn-*";

type Expr = Expression<'static>;
type Stmt = Statement<'static>;

fn string(text: impl Into<Cow<'static, str>>) -> Expr {
    Expression::String(text.into())
}

fn meta(key: MetaKey) -> Expr {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn payload(protocol: &'static str, field: &'static str) -> Expr {
    let field = PayloadField { protocol: protocol.into(), field: field.into() };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}

fn ct(key: &'static str) -> Expr {
    Expression::Named(NamedExpression::CT(CT { key: key.into(), family: None, dir: None }))
}

fn prefix(subnet: Ipv4Subnet) -> Expr {
    Expression::Named(NamedExpression::Prefix(Prefix {
        addr: Box::new(string(subnet.network().to_string())),
        len: subnet.prefix_len().into(),
    }))
}

fn destination_is_own() -> Stmt {
    let flags = HashSet::from([FibFlag::Daddr]);
    let kind = Expression::Named(NamedExpression::Fib(Fib { result: FibResult::Type, flags }));
    is(kind, string("local"))
}

fn compare(left: Expr, op: Operator, right: Expr) -> Stmt {
    Statement::Match(Match { left, right, op })
}

fn is(left: Expr, right: Expr) -> Stmt {
    compare(left, Operator::EQ, right)
}

fn is_not(left: Expr, right: Expr) -> Stmt {
    compare(left, Operator::NEQ, right)
}

fn enters_by(interface: &str) -> Stmt {
    is(meta(MetaKey::Iifname), string(interface.to_owned()))
}

fn leaves_by(interface: &str) -> Stmt {
    is(meta(MetaKey::Oifname), string(interface.to_owned()))
}

fn is_ipv6() -> Stmt {
    is(meta(MetaKey::Nfproto), string("ipv6"))
}

fn is_ipv4() -> Stmt {
    is(meta(MetaKey::Nfproto), string("ipv4"))
}

fn of_state(states: &[&'static str]) -> Stmt {
    // A plain list means any of them (`ct state` is a bit mask).
    let right = match states {
        [one] => string(*one),
        many => Expression::List(many.iter().map(|state| string(*state)).collect()),
    };
    compare(ct("state"), Operator::IN, right)
}

fn was_redirected() -> Stmt {
    compare(ct("status"), Operator::IN, string("dnat"))
}

fn accept() -> Stmt {
    Statement::Accept(None)
}

fn drop() -> Stmt {
    Statement::Drop(None)
}

/// All rules of the table, each with its chain.
fn rules(ruleset: &Ruleset) -> Vec<(&'static str, Vec<Stmt>)> {
    let mut all: Vec<_> = forward(ruleset).into_iter().map(|rule| ("forward", rule)).collect();
    all.extend(input(ruleset).into_iter().map(|rule| ("input", rule)));
    if let Beyond::World { redirects, .. } = &ruleset.beyond {
        all.extend(published(redirects).into_iter().map(|rule| ("published", rule)));
        all.extend(outgoing(ruleset).into_iter().map(|rule| ("outgoing", rule)));
    }
    all
}

fn forward(ruleset: &Ruleset) -> Vec<Vec<Stmt>> {
    let enters = || enters_by(&ruleset.bridge);
    let leaves = || leaves_by(&ruleset.bridge);
    let among = if ruleset.isolate { drop() } else { accept() };
    let mut rules = vec![vec![enters(), leaves(), among]];
    let Beyond::World { guarded, .. } = &ruleset.beyond else {
        rules.extend([vec![enters(), drop()], vec![leaves(), drop()]]);
        return rules;
    };
    rules.extend([
        vec![enters(), is_ipv6(), drop()],
        vec![enters(), is_not(payload("ip", "saddr"), prefix(ruleset.subnet)), drop()],
        // What has no state would leave untranslated.
        vec![enters(), of_state(&["invalid"]), drop()],
        vec![enters(), accept()],
        vec![leaves(), of_state(&["established", "related"]), accept()],
        vec![leaves(), was_redirected(), accept()],
        vec![leaves(), drop()],
    ]);
    rules.extend(guarded.iter().map(|uplink| {
        vec![enters_by(uplink), is_not(meta(MetaKey::Oifname), string(OWN_BRIDGES)), is_ipv4(), drop()]
    }));
    rules
}

fn input(ruleset: &Ruleset) -> Vec<Vec<Stmt>> {
    let enters = || enters_by(&ruleset.bridge);
    let to_gateway = || is(payload("ip", "daddr"), string(ruleset.gateway.to_string()));
    let elsewhere = || is_not(payload("ip", "daddr"), string(ruleset.gateway.to_string()));
    let mut rules = vec![
        vec![enters(), is_ipv6(), drop()],
        vec![enters(), of_state(&["established", "related"]), accept()],
    ];
    match &ruleset.beyond {
        Beyond::World { allow_host: true, .. } => {}
        Beyond::Host => rules.push(vec![enters(), destination_is_own(), elsewhere(), drop()]),
        Beyond::World { allow_host: false, .. } => {
            let is_echo = is(payload("icmp", "type"), string("echo-request"));
            let reset = Reject::new(Some(RejectType::TCPReset), None);
            let is_tcp = is(meta(MetaKey::L4proto), string("tcp"));
            rules.extend([
                vec![enters(), to_gateway(), is_echo, accept()],
                vec![enters(), is_tcp, Statement::Reject(Some(reset))],
                vec![enters(), Statement::Reject(None)],
            ]);
        }
    }
    rules
}

/// One rule for each guest, protocol and address of the host, which maps ports.
fn published(redirects: &[Redirect]) -> Vec<Vec<Stmt>> {
    /// Protocol, address and interface of the host, guest.
    type Group = (bool, Ipv4Addr, Option<LinkName>, Ipv4Addr);
    let mut groups: BTreeMap<Group, Vec<(u16, u16)>> = BTreeMap::new();
    for redirect in redirects {
        let group = (redirect.udp, *redirect.host.ip(), redirect.interface, *redirect.guest.ip());
        groups.entry(group).or_default().push((redirect.host.port(), redirect.guest.port()));
    }
    let rule = |((udp, host, interface, guest), ports): (Group, Vec<(u16, u16)>)| {
        let destination = || payload(if udp { "udp" } else { "tcp" }, "dport");
        let number = |port: u16| Expression::Number(port.into());
        let known = ports.iter().map(|(host_port, _)| SetItem::Element(number(*host_port))).collect();
        let pairs = ports.iter().map(|(from, to)| SetItem::Mapping(number(*from), number(*to))).collect();
        let map = Map { key: destination(), data: Expression::Named(NamedExpression::Set(pairs)) };
        let to_host = if host.is_unspecified() {
            destination_is_own()
        } else {
            is(payload("ip", "daddr"), string(host.to_string()))
        };
        // What the host sends to itself is relayed by the process that listens there.
        let comes_in = match interface {
            Some(name) => enters_by(name.as_str()),
            None => is_not(meta(MetaKey::Iifname), string("lo")),
        };
        vec![
            comes_in,
            is_ipv4(),
            to_host,
            is(destination(), Expression::Named(NamedExpression::Set(known))),
            Statement::DNAT(Some(NAT {
                addr: Some(string(guest.to_string())),
                family: Some(NATFamily::IP),
                port: Some(Expression::Named(NamedExpression::Map(Box::new(map)))),
                flags: None,
            })),
        ]
    };
    groups.into_iter().map(rule).collect()
}

fn outgoing(ruleset: &Ruleset) -> Vec<Vec<Stmt>> {
    let from_guest = || is(payload("ip", "saddr"), prefix(ruleset.subnet));
    let leaves_elsewhere = is_not(meta(MetaKey::Oifname), string(ruleset.bridge.clone()));
    vec![
        vec![from_guest(), leaves_elsewhere, Statement::Masquerade(None)],
        // A guest that reaches another by a port of the host: else the answer would pass the host by.
        vec![from_guest(), leaves_by(&ruleset.bridge), was_redirected(), Statement::Masquerade(None)],
    ]
}

/// Number of rules the table has.
pub(super) fn count(ruleset: &Ruleset) -> usize {
    rules(ruleset).len()
}

fn table(name: &str) -> NfListObject<'static> {
    NfListObject::Table(Table { family: NfFamily::INet, name: name.to_owned().into(), handle: None })
}

/// Removes the table.
pub(super) fn delete_table(name: &str, batch: &mut Batch<'static>) {
    batch.delete(table(name));
}

/// Makes the table anew, in place of one that may be there.
pub(super) fn replace_table(ruleset: &Ruleset, batch: &mut Batch<'static>) {
    // To delete one that is not there is an error, so it is made first.
    batch.add(table(&ruleset.table));
    batch.delete(table(&ruleset.table));
    batch.add(table(&ruleset.table));
    let mut chain = |name: Cow<'static, str>, hooked: Option<(NfChainType, NfHook, i32)>| {
        batch.add(NfListObject::Chain(Chain {
            family: NfFamily::INet,
            table: ruleset.table.clone().into(),
            name,
            _type: hooked.map(|(kind, ..)| kind),
            hook: hooked.map(|(_, hook, _)| hook),
            prio: hooked.map(|(.., priority)| priority),
            policy: hooked.map(|_| NfChainPolicy::Accept),
            ..Chain::default()
        }));
    };
    chain("forward".into(), Some((NfChainType::Filter, NfHook::Forward, FILTER_PRIORITY)));
    chain("input".into(), Some((NfChainType::Filter, NfHook::Input, FILTER_PRIORITY)));
    if let Beyond::World { .. } = ruleset.beyond {
        chain("published".into(), Some((NfChainType::NAT, NfHook::Prerouting, DSTNAT_PRIORITY)));
        chain("outgoing".into(), Some((NfChainType::NAT, NfHook::Postrouting, SRCNAT_PRIORITY)));
    }
    chain(ruleset.mark().into(), None);
    for (chain, expr) in rules(ruleset) {
        batch.add(NfListObject::Rule(Rule {
            family: NfFamily::INet,
            table: ruleset.table.clone().into(),
            chain: chain.into(),
            expr: expr.into(),
            ..Rule::default()
        }));
    }
}

/// The accepts that others' tables need, as far as there are such tables.
pub(super) fn accepts(ruleset: &Ruleset, listing: &Listing) -> Vec<Accept> {
    let of = |family| listing.forward_chain(family).map(|chain| accepts_in(ruleset, family, chain));
    [Family::Ip, Family::Ip6].into_iter().filter_map(of).flatten().collect()
}

/// The accepts that another's `chain` needs.
pub(super) fn accepts_in(ruleset: &Ruleset, family: Family, chain: &'static str) -> Vec<Accept> {
    let bridge = &ruleset.bridge;
    let mut accepts = Vec::new();
    let mut add = |input: &str, output: &str| {
        accepts.push(Accept { family, chain, input: input.to_owned(), output: output.to_owned() });
    };
    if !ruleset.isolate {
        add(bridge, bridge);
    }
    if let (Family::Ip, Beyond::World { uplinks, .. }) = (family, &ruleset.beyond) {
        for uplink in uplinks {
            add(bridge, uplink);
            add(uplink, bridge);
        }
    }
    accepts
}

/// Puts accepts in front of what is in their chains.
pub(super) fn insert_accepts(accepts: &[Accept], comment: &str, batch: &mut Batch<'static>) {
    for wanted in accepts {
        batch.add_cmd(NfCmd::Insert(NfListObject::Rule(Rule {
            family: wanted.family.nf(),
            table: FILTER.into(),
            chain: wanted.chain.into(),
            expr: vec![enters_by(&wanted.input), leaves_by(&wanted.output), accept()].into(),
            comment: Some(comment.to_owned().into()),
            ..Rule::default()
        })));
    }
}
