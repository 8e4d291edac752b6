//! What a name means here: local, certainly nonexistent, or somebody else's to say.
//!
//! Four sources, in this order: the configured hosts with the gateway's standing names; on a named network
//! its guests, by their own label alone or under the domain; the local domain and the reverse names of the
//! guest's subnet, of which vunet knows every name there is; the special-use names of RFC 6761 and its
//! successors.
//!
//! Read first: RFC 2308, 2 and 5; RFC 6761, 6; RFC 7686, 2; RFC 9462, 6.4.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hickory_proto::rr::rdata::{PTR, SOA};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use crate::addr::Ipv4Subnet;
use crate::config::{DnsConfig, Lan};
use crate::network::guest_names::GuestNames;
use crate::service::dns::{GUEST_TTL_S, LOCAL_TTL_S};

/// Names of the gateway outside the local domain, which container tools expect to find.
const GATEWAY_NAMES: [&str; 2] = ["host.docker.internal", "gateway.docker.internal"];
/// Label of the gateway's name in the local domain.
const GATEWAY_LABEL: &str = "host";

/// What is known of a name and type.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// These records.
    Records(Vec<RData>),
    /// The name exists in this zone, without records of the type.
    NoData(Name),
    /// No such name in this zone.
    NxDomain(Name),
    /// Not ours to say.
    Elsewhere,
}

/// Everything local.
#[derive(Debug)]
pub(super) struct LocalNames {
    domain: Option<Name>,
    hosts: HashMap<Name, Vec<IpAddr>>,
    /// Names between the domain and a host, which exist without records.
    parents: HashSet<Name>,
    pointers: HashMap<Name, Name>,
    subnet: Ipv4Subnet,
    special: Special,
    /// The guests of a named network.
    guests: Option<Arc<dyn GuestNames>>,
}

/// Zones of special-use names.
#[derive(Debug)]
struct Special {
    localhost: Name,
    /// Nothing exists in them.
    void: [Name; 2],
    /// Every name exists, without records: a resolver behind the gateway must not be discovered
    /// as if it were the gateway.
    resolver: Name,
}

impl LocalNames {
    pub(super) fn new(dns: &DnsConfig, lan: &Lan) -> LocalNames {
        let domain = name(&dns.domain).filter(|domain| !domain.is_root());
        let mut names = LocalNames {
            domain,
            hosts: HashMap::new(),
            parents: HashSet::new(),
            pointers: HashMap::new(),
            subnet: lan.subnet,
            special: Special {
                localhost: fixed("localhost"),
                void: [fixed("invalid"), fixed("onion")],
                resolver: fixed("resolver.arpa"),
            },
            guests: None,
        };
        for (text, addr) in &dns.hosts {
            // What is no DNS name cannot be asked for.
            if let Some(host) = name(text) {
                names.add_host(host, *addr);
            }
        }
        let gateway = IpAddr::V4(lan.gateway);
        let in_domain = names.domain.as_ref().and_then(|domain| {
            let label = Name::from_ascii(GATEWAY_LABEL).ok()?;
            label.append_domain(domain).ok()
        });
        for host in in_domain.into_iter().chain(GATEWAY_NAMES.map(fixed)) {
            if !names.hosts.contains_key(&host) {
                names.add_host(host, gateway);
            }
        }
        let localhost = names.special.localhost.clone();
        for loopback in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
            names.pointers.entry(Name::from(loopback)).or_insert_with(|| localhost.clone());
        }
        names
    }

    /// Answers for the guests of a named network too. In a domain within the default one, `host` of the
    /// default one is still the gateway: programs have it in their configuration.
    pub(super) fn set_guests(&mut self, guests: Arc<dyn GuestNames>, gateway: Ipv4Addr) {
        self.guests = Some(guests);
        let default = fixed(DnsConfig::DEFAULT_DOMAIN);
        let host = Name::from_ascii(GATEWAY_LABEL).and_then(|label| label.append_domain(&default));
        if let Ok(host) = host
            && self.domain.as_ref().is_some_and(|domain| default.zone_of(domain))
            && !self.hosts.contains_key(&host)
        {
            self.add_host(host, gateway.into());
        }
    }

    /// The guests it answers for.
    pub(super) fn guests(&self) -> Option<Arc<dyn GuestNames>> {
        self.guests.clone()
    }

    pub(super) fn records(&self) -> Vec<(String, IpAddr)> {
        let text = |name: &Name| name.to_ascii().trim_end_matches('.').to_owned();
        let hosts = self.hosts.iter().flat_map(|(name, addrs)| addrs.iter().map(|addr| (text(name), *addr)));
        let guests = self.guests.iter().flat_map(|guests| guests.all());
        let guests = guests.filter_map(|(label, addr)| Some((text(&self.qualify(&label)?), addr.into())));
        hosts.chain(guests).collect()
    }

    /// Time to live of what is local, in seconds: short where names come and go.
    pub(super) fn ttl_s(&self) -> u32 {
        if self.guests.is_some() { GUEST_TTL_S } else { LOCAL_TTL_S }
    }

    fn add_host(&mut self, host: Name, addr: IpAddr) {
        if let Some(domain) = &self.domain
            && domain.zone_of(&host)
        {
            let mut parent = host.base_name();
            while parent.num_labels() > domain.num_labels() {
                let next = parent.base_name();
                self.parents.insert(parent);
                parent = next;
            }
        }
        self.pointers.entry(Name::from(addr)).or_insert_with(|| host.clone());
        let addrs = self.hosts.entry(host).or_default();
        if !addrs.contains(&addr) {
            addrs.push(addr);
        }
    }

    pub(super) fn lookup(&self, name: &Name, kind: RecordType) -> Verdict {
        if let Some(domain) = &self.domain
            && domain == name
            && kind == RecordType::SOA
        {
            return Verdict::Records(vec![self.soa(domain).data]);
        }
        if let Some(addrs) = self.hosts.get(name) {
            return records_or_nodata(addresses(addrs, kind), || self.zone_of_host(name));
        }
        if let Some(target) = self.pointers.get(name) {
            let wanted = matches!(kind, RecordType::PTR | RecordType::ANY);
            let pointer = wanted.then(|| RData::PTR(PTR(target.clone())));
            return records_or_nodata(pointer.into_iter().collect(), || self.zone_of_pointer(name));
        }
        if let Some(verdict) = self.lookup_guest(name, kind) {
            return verdict;
        }
        if let Some(domain) = &self.domain
            && domain.zone_of(name)
        {
            let exists = domain == name || self.parents.contains(name);
            return if exists { Verdict::NoData(domain.clone()) } else { Verdict::NxDomain(domain.clone()) };
        }
        self.lookup_special(name, kind)
            .or_else(|| self.lookup_reverse(name, kind))
            .unwrap_or(Verdict::Elsewhere)
    }

    /// Whether the question of `query`, which could not be read as a whole, is somebody else's.
    pub(super) fn is_elsewhere(&self, query: &[u8]) -> bool {
        let mut decoder = BinDecoder::new(query).clone(12);
        let name = Name::read(&mut decoder);
        name.is_ok_and(|name| self.lookup(&name, RecordType::ANY) == Verdict::Elsewhere)
    }

    /// The start of authority that goes with negative answers of `zone`.
    pub(super) fn soa(&self, zone: &Name) -> Record<RData> {
        let primary = self.domain.as_ref().unwrap_or(zone);
        let contact = Name::from_ascii("hostmaster").and_then(|label| label.append_domain(primary));
        let contact = contact.unwrap_or_else(|_| primary.clone());
        let ttl_s = self.ttl_s();
        let ttl = i32::try_from(ttl_s).unwrap_or(i32::MAX);
        let soa = SOA::new(primary.clone(), contact, 1, ttl, ttl, ttl, ttl_s);
        Record::from_rdata(zone.clone(), ttl_s, RData::SOA(soa))
    }

    /// What the network's guests make of a name: theirs, or one without a dot that is nobody's. The latter
    /// has no address and is not asked for elsewhere: a guest that is not up yet must not be found in the
    /// world, nor be forgotten there for a day (RFC 7085 has what else names without dots bring).
    fn lookup_guest(&self, name: &Name, kind: RecordType) -> Option<Verdict> {
        let guests = self.guests.as_ref()?;
        if let Some(ip) = self.guest_at(name) {
            let pointer = guests.name_of(ip).and_then(|label| self.qualify(&label))?;
            let wanted = matches!(kind, RecordType::PTR | RecordType::ANY);
            let pointer = wanted.then_some(RData::PTR(PTR(pointer)));
            return Some(records_or_nodata(pointer.into_iter().collect(), || self.zone_of_pointer(name)));
        }
        let mut labels = name.iter();
        let label = std::str::from_utf8(labels.next()?).ok()?.to_ascii_lowercase();
        let alone = labels.next().is_none();
        let in_domain = self.domain.as_ref().is_some_and(|domain| name.base_name() == *domain);
        let special = alone && self.lookup_special(name, kind).is_some();
        if special || (!alone && !in_domain) {
            return None;
        }
        if let Some(ip) = guests.address_of(&label) {
            return Some(records_or_nodata(addresses(&[ip.into()], kind), || self.zone_of_host(name)));
        }
        let address = matches!(kind, RecordType::A | RecordType::AAAA);
        (alone && address).then(|| Verdict::NoData(name.to_lowercase()))
    }

    /// The address of the guests' subnet that `name` is the reverse name of.
    fn guest_at(&self, name: &Name) -> Option<Ipv4Addr> {
        let block = Block::of(name)?;
        (block.octets == 4 && !block.below && self.subnet.contains(block.first)).then_some(block.first)
    }

    /// The full name of the guest called `label`.
    fn qualify(&self, label: &str) -> Option<Name> {
        let label = name(label)?;
        match &self.domain {
            Some(domain) => label.append_domain(domain).ok(),
            None => Some(label),
        }
    }

    fn zone_of_host(&self, host: &Name) -> Name {
        let domain = self.domain.as_ref().filter(|domain| domain.zone_of(host));
        domain.unwrap_or(host).to_lowercase()
    }

    fn zone_of_pointer(&self, pointer: &Name) -> Name {
        let block = Block::of(pointer);
        let zone = block.and_then(|block| block.zone_in(self.subnet, pointer));
        zone.unwrap_or_else(|| pointer.to_lowercase())
    }

    fn lookup_special(&self, name: &Name, kind: RecordType) -> Option<Verdict> {
        let special = &self.special;
        if special.localhost.zone_of(name) {
            let addrs = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
            return Some(records_or_nodata(addresses(&addrs, kind), || special.localhost.clone()));
        }
        if special.resolver.zone_of(name) {
            return Some(Verdict::NoData(special.resolver.clone()));
        }
        let void = special.void.iter().find(|zone| zone.zone_of(name))?;
        Some(Verdict::NxDomain(void.clone()))
    }

    /// Reverse names of the guest's subnet and of 127/8 that are no host's.
    fn lookup_reverse(&self, name: &Name, kind: RecordType) -> Option<Verdict> {
        let block = Block::of(name)?;
        let loopback = Ipv4Subnet::new(Ipv4Addr::new(127, 0, 0, 0), 8).ok()?;
        let zone = block.zone_in(self.subnet, name).or_else(|| block.zone_in(loopback, name))?;
        if block.octets == 4 || block.below {
            return Some(Verdict::NxDomain(zone));
        }
        if zone == *name && kind == RecordType::SOA {
            return Some(Verdict::Records(vec![self.soa(&zone).data]));
        }
        Some(Verdict::NoData(zone))
    }
}

/// The IPv4 addresses a name under `in-addr.arpa` stands for.
#[derive(Clone, Copy, Debug)]
struct Block {
    first: Ipv4Addr,
    /// How many octets the name gives, 0 to 4.
    octets: u8,
    /// Whether more labels precede them.
    below: bool,
}

impl Block {
    fn of(name: &Name) -> Option<Block> {
        let mut labels = name.iter().rev();
        let arpa = labels.next()?.eq_ignore_ascii_case(b"arpa");
        if !arpa || !labels.next()?.eq_ignore_ascii_case(b"in-addr") {
            return None;
        }
        let mut bytes = [0u8; 4];
        let mut octets = 0u8;
        let mut below = false;
        for label in labels {
            match octet(label) {
                Some(value) if octets < 4 => {
                    bytes[usize::from(octets)] = value;
                    octets += 1;
                }
                _ => {
                    below = true;
                    break;
                }
            }
        }
        Some(Block { first: Ipv4Addr::from(bytes), octets, below })
    }

    /// The reverse zone that `subnet` lies in and this block, whose name is `name`, is part of, if
    /// the whole block is in the subnet. Zones end at octets; a subnet of less than 256 addresses
    /// is part of one.
    fn zone_in(self, subnet: Ipv4Subnet, name: &Name) -> Option<Name> {
        if subnet.prefix_len() > 8 * self.octets || !subnet.contains(self.first) {
            return None;
        }
        let zone_octets = subnet.prefix_len().div_ceil(8).min(3);
        Some(name.trim_to(usize::from(zone_octets) + 2).to_lowercase())
    }
}

/// A label as an octet in decimal, without leading zeros.
fn octet(label: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(label).ok()?;
    let value: u8 = text.parse().ok()?;
    (value.to_string() == text).then_some(value)
}

fn addresses(addrs: &[IpAddr], kind: RecordType) -> Vec<RData> {
    let wanted = |addr: &&IpAddr| match kind {
        RecordType::A => addr.is_ipv4(),
        RecordType::AAAA => addr.is_ipv6(),
        RecordType::ANY => true,
        _ => false,
    };
    addrs.iter().filter(wanted).map(|&addr| RData::from(addr)).collect()
}

fn records_or_nodata(records: Vec<RData>, zone: impl FnOnce() -> Name) -> Verdict {
    if records.is_empty() { Verdict::NoData(zone()) } else { Verdict::Records(records) }
}

fn name(text: &str) -> Option<Name> {
    let mut name = Name::from_ascii(text).ok()?.to_lowercase();
    name.set_fqdn(true);
    Some(name)
}

fn fixed(text: &str) -> Name {
    name(text).expect("the fixed names of this file are names")
}
