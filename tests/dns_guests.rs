//! The DNS service on a named network: its guests are found by name and by address, as they come and go.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use vunet::config::{DnsConfig, IpMtu, Lan};
use vunet::network::guest_names::GuestNames;
use vunet::service::dns::{DnsAction, DnsService, Transport};

const DB: Ipv4Addr = Ipv4Addr::new(10, 0, 9, 7);

#[derive(Debug, Default)]
struct Guests(Mutex<HashMap<String, Ipv4Addr>>);

impl Guests {
    fn come(&self, name: &str, last: u8) {
        self.0.lock().unwrap().insert(name.to_owned(), Ipv4Addr::new(10, 0, 9, last));
    }

    fn go(&self, name: &str) {
        self.0.lock().unwrap().remove(name);
    }
}

impl GuestNames for Guests {
    fn address_of(&self, label: &str) -> Option<Ipv4Addr> {
        assert_eq!(label, label.to_ascii_lowercase());
        self.0.lock().unwrap().get(label).copied()
    }

    fn name_of(&self, ip: Ipv4Addr) -> Option<String> {
        self.0.lock().unwrap().iter().find(|(_, held)| **held == ip).map(|(name, _)| name.clone())
    }

    fn all(&self) -> Vec<(String, Ipv4Addr)> {
        self.0.lock().unwrap().iter().map(|(name, held)| (name.clone(), *held)).collect()
    }
}

struct Network {
    guests: Arc<Guests>,
    service: DnsService,
}

impl Network {
    fn new(domain: &str) -> Network {
        let subnet: vunet::addr::Ipv4Subnet = "10.0.9.0/24".parse().unwrap();
        let gateway = subnet.host(1).unwrap();
        let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let hosts = vec![(format!("db.{domain}"), IpAddr::V4(DB))];
        let dns = DnsConfig { enabled: true, domain: domain.to_owned(), hosts };
        let guests = Arc::new(Guests::default());
        let service =
            DnsService::new(&dns, &lan, true).with_guests(Arc::clone(&guests) as Arc<dyn GuestNames>, &lan);
        Network { guests, service }
    }

    fn action(&self, name: &str, kind: RecordType) -> DnsAction {
        let mut message = Message::new(1, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        self.service.handle(&message.to_vec().unwrap(), Transport::Udp)
    }

    fn ask(&self, name: &str, kind: RecordType) -> Message {
        match self.action(name, kind) {
            DnsAction::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("expected an answer about {name}, not {other:?}"),
        }
    }

    /// The answer's code and data; every record says the short time to live.
    fn answer(&self, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let message = self.ask(name, kind);
        assert!(message.answers.iter().chain(&message.authorities).all(|record| record.ttl == 5));
        let data = message.answers.iter().map(|record| record.data.to_string()).collect();
        (message.metadata.response_code, data)
    }
}

fn network() -> Network {
    Network::new("lab.vunet.internal")
}

fn found(data: &str) -> (ResponseCode, Vec<String>) {
    (ResponseCode::NoError, vec![data.to_owned()])
}

const NO_NAME: (ResponseCode, Vec<String>) = (ResponseCode::NXDomain, Vec::new());
const NO_DATA: (ResponseCode, Vec<String>) = (ResponseCode::NoError, Vec::new());

#[test]
fn a_guest_is_found_by_its_label_its_full_name_and_its_address_while_it_is_there() {
    let network = network();
    assert_eq!(network.answer("vm1.lab.vunet.internal.", RecordType::A), NO_NAME);
    assert_eq!(network.answer("5.9.0.10.in-addr.arpa.", RecordType::PTR), NO_NAME);
    network.guests.come("vm1", 5);
    for name in ["vm1.", "VM1.", "vm1.lab.vunet.internal.", "Vm1.Lab.vunet.INTERNAL."] {
        assert_eq!(network.answer(name, RecordType::A), found("10.0.9.5"), "{name}");
        assert_eq!(network.answer(name, RecordType::AAAA), NO_DATA, "{name}");
        assert_eq!(network.answer(name, RecordType::MX), NO_DATA, "{name}");
    }
    let pointer = "5.9.0.10.in-addr.arpa.";
    assert_eq!(network.answer(pointer, RecordType::PTR), found("vm1.lab.vunet.internal."));
    assert_eq!(network.answer(pointer, RecordType::A), NO_DATA);
    network.guests.go("vm1");
    assert_eq!(network.answer("vm1.lab.vunet.internal.", RecordType::A), NO_NAME);
    assert_eq!(network.answer(pointer, RecordType::PTR), NO_NAME);
}

#[test]
fn a_name_without_a_dot_that_is_nobodys_has_no_address_and_is_asked_for_nowhere() {
    let network = network();
    for kind in [RecordType::A, RecordType::AAAA] {
        assert_eq!(network.answer("vm1.", kind), NO_DATA);
    }
    // What is asked of top-level domains has other types, and goes on; longer names are none of a guest's.
    for (name, kind) in
        [("com.", RecordType::NS), ("com.", RecordType::DS), ("vm1.example.com.", RecordType::A)]
    {
        assert_eq!(network.action(name, kind), DnsAction::Forward, "{name} {kind}");
    }
    assert_eq!(network.action(".", RecordType::NS), DnsAction::Forward);
    assert_eq!(network.answer("localhost.", RecordType::A), found("127.0.0.1"));
    assert_eq!(network.answer("onion.", RecordType::A), NO_NAME);
}

#[test]
fn no_guest_stands_in_for_a_configured_host_the_gateway_or_a_name_below_its_own() {
    let network = network();
    for name in ["db", "host", "localhost", "*"] {
        network.guests.come(name, 66);
    }
    assert_eq!(network.answer("db.lab.vunet.internal.", RecordType::A), found("10.0.9.7"));
    assert_eq!(network.answer("host.lab.vunet.internal.", RecordType::A), found("10.0.9.1"));
    assert_eq!(network.answer("localhost.", RecordType::A), found("127.0.0.1"));
    assert_eq!(network.answer("1.9.0.10.in-addr.arpa.", RecordType::PTR), found("host.lab.vunet.internal."));
    network.guests.come("vm1", 5);
    assert_eq!(network.answer("www.vm1.lab.vunet.internal.", RecordType::A), NO_NAME);
    assert_eq!(network.answer("x.5.9.0.10.in-addr.arpa.", RecordType::PTR), NO_NAME);
    network.guests.come("outside", 5);
    assert_eq!(network.action("5.8.0.10.in-addr.arpa.", RecordType::PTR), DnsAction::Forward);
}

#[test]
fn the_gateways_standing_names_answer_in_every_domain() {
    for domain in ["lab.vunet.internal", "vunet.internal"] {
        let network = Network::new(domain);
        for name in ["host.vunet.internal.", "host.docker.internal."] {
            assert_eq!(network.answer(name, RecordType::A), found("10.0.9.1"), "{name} in {domain}");
        }
    }
    let elsewhere = Network::new("lab.example");
    assert_eq!(elsewhere.action("host.vunet.internal.", RecordType::A), DnsAction::Forward);
}
