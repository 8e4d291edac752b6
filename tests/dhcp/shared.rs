//! The DHCP server of one of several guests that share a network.

use vunet::addr::MacAddr;
use vunet::config::{DnsConfig, IpMtu, Lan};
use vunet::limits;
use vunet::network::store::{FILE_NAME, Pool};
use vunet::service::dhcp::{DhcpServer, LeaseChange, Outcome, Silence};
use vunet::time::Instant;

use crate::store;

const NOW: Instant = Instant::from_micros(1_000_000);

fn mac(n: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, n])
}

/// A message of `kind` from the card `mac`, with more options.
fn message(kind: u8, mac: MacAddr, options: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 236];
    bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
    bytes[28..34].copy_from_slice(&mac.0);
    bytes.extend([99, 130, 83, 99, 53, 1, kind]);
    bytes.extend(options);
    bytes.push(255);
    bytes
}

struct Network {
    folder: tempfile::TempDir,
    lan: Lan,
    dns: DnsConfig,
}

impl Network {
    fn new(subnet: &str) -> Network {
        let subnet: vunet::addr::Ipv4Subnet = subnet.parse().unwrap();
        let lan =
            Lan { subnet, gateway: subnet.host(1).unwrap(), guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
        let dns = DnsConfig { enabled: true, domain: "lab.vunet.internal".to_owned(), hosts: Vec::new() };
        Network { folder: store::folder(), lan, dns }
    }

    fn process(&self, trust_guest: bool) -> DhcpServer {
        let leases = store::open(self.folder.path(), Pool::new(self.lan.subnet, self.lan.gateway));
        DhcpServer::over(Box::new(leases), &self.lan, &self.dns).shared(trust_guest)
    }
}

fn silence(outcome: Outcome) -> Silence {
    match outcome {
        Outcome::Silent(silence) => silence,
        Outcome::Reply(reply) => panic!("expected silence, not {reply:?}"),
    }
}

fn change(outcome: &Outcome) -> Option<LeaseChange> {
    match outcome {
        Outcome::Reply(reply) => reply.lease.map(|event| event.change),
        Outcome::Silent(_) => None,
    }
}

#[test]
fn a_guest_speaks_for_itself_only_unless_it_is_trusted() {
    let network = Network::new("10.0.2.0/24");
    let (mut server, mut trusting) = (network.process(false), network.process(true));
    let discover = message(1, mac(1), &[]);
    assert_eq!(silence(server.handle(NOW, mac(9), &discover)), Silence::NotTheSender);
    let mut relayed = discover.clone();
    relayed[24..28].copy_from_slice(&[10, 0, 2, 77]);
    assert_eq!(silence(server.handle(NOW, mac(1), &relayed)), Silence::NotTheSender);
    assert_eq!(change(&server.handle(NOW, mac(1), &discover)), Some(LeaseChange::Offered));
    assert_eq!(change(&trusting.handle(NOW, mac(9), &discover)), Some(LeaseChange::Offered));
    assert_eq!(change(&trusting.handle(NOW, mac(1), &relayed)), Some(LeaseChange::Offered));
    // Another's lease cannot be given back either.
    let wants = [50, 4, 10, 0, 2, 2];
    assert_eq!(change(&server.handle(NOW, mac(1), &message(3, mac(1), &wants))), Some(LeaseChange::Bound));
    let mut release = message(7, mac(1), &[]);
    release[12..16].copy_from_slice(&[10, 0, 2, 2]);
    assert_eq!(silence(server.handle(NOW, mac(9), &release)), Silence::NotTheSender);
    assert!(server.lease_of(NOW, mac(1)).unwrap().unwrap().is_active(NOW));
}

#[test]
fn a_flood_is_not_heard_and_costs_the_store_nothing() {
    let network = Network::new("10.0.2.0/24");
    let mut server = network.process(false);
    let discover = message(1, mac(1), &[]);
    for _ in 0..limits::DHCP_MESSAGES_BURST {
        assert_eq!(change(&server.handle(NOW, mac(1), &discover)), Some(LeaseChange::Offered));
    }
    let log = network.folder.path().join(format!("{FILE_NAME}-wal"));
    let log_bytes = || std::fs::metadata(&log).unwrap().len();
    let before = log_bytes();
    for _ in 0..1000 {
        assert_eq!(silence(server.handle(NOW, mac(1), &discover)), Silence::TooMany);
    }
    assert_eq!(log_bytes(), before);
    let later = NOW + std::time::Duration::from_secs(1);
    assert_eq!(change(&server.handle(later, mac(1), &discover)), Some(LeaseChange::Offered));
}

#[test]
fn a_name_that_is_anothers_is_neither_given_nor_kept_from_being_told_of() {
    let network = Network::new("10.0.2.0/24");
    let (mut first, mut second) = (network.process(false), network.process(false));
    let request = |n: u8| message(3, mac(n), &[50, 4, 10, 0, 2, n, 12, 3, b'w', b'e', b'b']);
    let Outcome::Reply(ack) = first.handle(NOW, mac(2), &request(2)) else { panic!("no answer") };
    assert_eq!(ack.name_refused, None);
    assert!(ack.payload.windows(5).any(|option| option == [12, 3, b'w', b'e', b'b']));
    let Outcome::Reply(ack) = second.handle(NOW, mac(3), &request(3)) else { panic!("no answer") };
    assert_eq!(ack.name_refused.as_deref(), Some("web"));
    assert!(!ack.payload.windows(2).any(|option| option == [12, 3]), "it is told no name");
}

#[test]
fn an_exhausted_pool_and_a_broken_store_are_silence_with_a_reason() {
    let network = Network::new("10.0.2.0/30");
    let mut server = network.process(true);
    let bound = server.handle(NOW, mac(1), &message(3, mac(1), &[50, 4, 10, 0, 2, 2]));
    assert_eq!(change(&bound), Some(LeaseChange::Bound));
    let discover = message(1, mac(2), &[]);
    assert_eq!(silence(server.handle(NOW, mac(2), &discover)), Silence::PoolExhausted);
    let other = rusqlite::Connection::open(network.folder.path().join(FILE_NAME)).unwrap();
    other.execute_batch("DROP TABLE declined").unwrap();
    let Silence::Store(why) = silence(server.handle(NOW, mac(2), &discover)) else { panic!("not the store") };
    assert!(why.contains(FILE_NAME) && why.contains("no such table: declined"), "{why}");
}
