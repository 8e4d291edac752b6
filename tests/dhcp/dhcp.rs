//! The cases: see the [root](crate) of these tests.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use proptest::prelude::*;
use vunet::addr::MacAddr;
use vunet::config::{DnsConfig, IpMtu, Lan};
use vunet::network::allocator::Lease;
use vunet::service::dhcp::{DhcpReply, DhcpServer, LeaseChange, Outcome, Silence};
use vunet::time::Instant;

use super::server_of;

const MAC: MacAddr = MacAddr([0x52, 0x54, 0x00, 0x12, 0x34, 0x56]);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
const NOW: Instant = Instant::from_micros(1_000_000);

fn lan() -> Lan {
    Lan {
        subnet: "10.0.2.0/24".parse().unwrap(),
        gateway: GATEWAY,
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    }
}

fn dns() -> DnsConfig {
    DnsConfig { enabled: true, domain: DnsConfig::DEFAULT_DOMAIN.to_owned(), hosts: Vec::new() }
}

fn server() -> DhcpServer {
    server_of(&lan(), &dns())
}

fn known(server: &mut DhcpServer, mac: MacAddr) -> Option<Lease> {
    server.lease_of(NOW, mac).unwrap()
}

fn ip(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 2, last)
}

fn at(seconds: u64) -> Instant {
    NOW + Duration::from_secs(seconds)
}

/// Bytes of hexadecimal text; blanks and line ends are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// A client's message: what the fixed part can hold, and options as they go on the wire.
#[derive(Clone)]
struct Message {
    xid: u32,
    secs: u16,
    flags: u16,
    ciaddr: Ipv4Addr,
    giaddr: Ipv4Addr,
    mac: MacAddr,
    file: Vec<u8>,
    options: Vec<u8>,
}

impl Message {
    fn new(options: &str) -> Message {
        Message {
            xid: 0x23cd_9b77,
            secs: 0,
            flags: 0,
            ciaddr: Ipv4Addr::UNSPECIFIED,
            giaddr: Ipv4Addr::UNSPECIFIED,
            mac: MAC,
            file: Vec::new(),
            options: hex(options),
        }
    }

    fn discover() -> Message {
        Message::new("350101")
    }

    fn request() -> Message {
        Message::new("350103")
    }

    fn mac(mut self, mac: MacAddr) -> Message {
        self.mac = mac;
        self
    }

    fn ciaddr(mut self, ciaddr: Ipv4Addr) -> Message {
        self.ciaddr = ciaddr;
        self
    }

    fn relay(mut self, giaddr: Ipv4Addr) -> Message {
        self.giaddr = giaddr;
        self
    }

    fn flags(mut self, flags: u16) -> Message {
        self.flags = flags;
        self
    }

    fn option(mut self, code: u8, data: &[u8]) -> Message {
        self.options.push(code);
        self.options.push(u8::try_from(data.len()).unwrap());
        self.options.extend_from_slice(data);
        self
    }

    fn wants(self, address: Ipv4Addr) -> Message {
        self.option(50, &address.octets())
    }

    fn naming_server(self, address: Ipv4Addr) -> Message {
        self.option(54, &address.octets())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = fixed_part(1, self.xid, self.secs, self.flags);
        bytes.extend(self.ciaddr.octets());
        bytes.extend([0; 8]);
        bytes.extend(self.giaddr.octets());
        bytes.extend(self.mac.0);
        bytes.extend([0; 74]);
        bytes.extend(&self.file);
        bytes.resize(236, 0);
        bytes.extend([99, 130, 83, 99]);
        bytes.extend(&self.options);
        bytes.push(255);
        bytes.resize(bytes.len().max(300), 0);
        bytes
    }

    fn send(&self, server: &mut DhcpServer, now: Instant) -> Outcome {
        server.handle(now, self.mac, &self.bytes())
    }
}

fn fixed_part(op: u8, xid: u32, secs: u16, flags: u16) -> Vec<u8> {
    let mut bytes = vec![op, 1, 6, 0];
    bytes.extend(xid.to_be_bytes());
    bytes.extend(secs.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes
}

/// A reply's expected bytes.
fn expected(request: &Message, flags: u16, ciaddr: Ipv4Addr, yiaddr: Ipv4Addr, options: &str) -> Vec<u8> {
    let mut bytes = fixed_part(2, request.xid, 0, flags);
    bytes.extend(ciaddr.octets());
    bytes.extend(yiaddr.octets());
    bytes.extend([0; 4]);
    bytes.extend(request.giaddr.octets());
    bytes.extend(request.mac.0);
    bytes.resize(236, 0);
    bytes.extend([99, 130, 83, 99]);
    bytes.extend(hex(options));
    bytes.resize(bytes.len().max(300), 0);
    bytes
}

fn reply(outcome: Outcome) -> DhcpReply {
    match outcome {
        Outcome::Reply(reply) => reply,
        Outcome::Silent(silence) => panic!("expected a reply, not {silence:?}"),
    }
}

fn silence(outcome: Outcome) -> Silence {
    match outcome {
        Outcome::Silent(silence) => silence,
        Outcome::Reply(reply) => panic!("expected silence, not {reply:?}"),
    }
}

/// Option `code` of a reply.
fn option(reply: &DhcpReply, code: u8) -> Option<Vec<u8>> {
    options(reply).into_iter().find(|(found, _)| *found == code).map(|(_, data)| data)
}

fn options(reply: &DhcpReply) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = &reply.payload[240..];
    while rest[0] != 255 {
        let len = usize::from(rest[1]);
        found.push((rest[0], rest[2..2 + len].to_vec()));
        rest = &rest[2 + len..];
    }
    found
}

fn message_type(reply: &DhcpReply) -> u8 {
    option(reply, 53).unwrap()[0]
}

fn yiaddr(reply: &DhcpReply) -> Ipv4Addr {
    Ipv4Addr::from(<[u8; 4]>::try_from(&reply.payload[16..20]).unwrap())
}

const OFFER: u8 = 2;
const ACK: u8 = 5;
const NAK: u8 = 6;

/// DISCOVER and REQUEST to the end; returns the address.
fn lease(server: &mut DhcpServer, mac: MacAddr, now: Instant) -> Ipv4Addr {
    let offered = yiaddr(&reply(Message::discover().mac(mac).send(server, now)));
    let request = Message::request().mac(mac).wants(offered).naming_server(GATEWAY);
    let ack = reply(request.send(server, now));
    assert_eq!(message_type(&ack), ACK);
    assert_eq!(yiaddr(&ack), offered);
    offered
}

fn mac(n: u16) -> MacAddr {
    let [high, low] = n.to_be_bytes();
    MacAddr([0x02, 0, 0, 0, high, low])
}

// ---- real clients ----

const UDHCPC_DISCOVER: &str =
    "350101 39020240 3707 0103060c0f1c2a 3c0c 756468637020312e33352e30 3d07 01525400123456";
const COMMON_OPTIONS: &str = "0104ffffff00 03040a000201 06040a000201";
const LEASE_OPTIONS_HEAD: &str = "330400015180";
const LEASE_OPTIONS_TAIL: &str = "36040a000201 3a040000a8c0 3b0400012750";
const VUNET_INTERNAL: &str = "0f0e 76756e65742e696e7465726e616c";

#[test]
fn udhcpc_gets_offer_and_ack_byte_for_byte() {
    let mut server = server();
    let id = "3d0701525400123456";
    let discover = Message::new(UDHCPC_DISCOVER);
    assert_eq!(discover.bytes().len(), 300);
    let offer = reply(discover.send(&mut server, NOW));
    let options = |kind| {
        format!(
            "{COMMON_OPTIONS} {VUNET_INTERNAL} 1c040a0002ff {LEASE_OPTIONS_HEAD} 3501{kind} {LEASE_OPTIONS_TAIL} {id} ff"
        )
    };
    let none = Ipv4Addr::UNSPECIFIED;
    assert_eq!(offer.payload, expected(&discover, 0, none, ip(2), &options("02")));
    assert_eq!((offer.dst_mac, offer.dst_ip, offer.dst_port), (MAC, ip(2), 68));
    assert_eq!(offer.lease.unwrap().change, LeaseChange::Offered);

    let mut request = Message::new(UDHCPC_DISCOVER);
    request.options = hex(&UDHCPC_DISCOVER.replacen("350101", "350103 32040a000202 36040a000201", 1));
    let ack = reply(request.send(&mut server, NOW));
    assert_eq!(ack.payload, expected(&request, 0, none, ip(2), &options("05")));
    assert_eq!((ack.dst_mac, ack.dst_ip, ack.dst_port), (MAC, ip(2), 68));
    let event = ack.lease.unwrap();
    assert_eq!((event.mac, event.ip, event.change), (MAC, ip(2), LeaseChange::Bound));
}

#[test]
fn udhcpc_that_asks_for_an_address_and_names_itself_gets_both() {
    let mut server = server();
    let discover = Message::new(
        "350101 32040a00024d 39020240 37070103060c0f1c2a 0c03626f78 3c0c756468637020312e33352e30 3d0701525400123456",
    );
    let offer = reply(discover.send(&mut server, NOW));
    assert_eq!(yiaddr(&offer), ip(77));
    assert_eq!(option(&offer, 12).unwrap(), b"box");
    assert_eq!(known(&mut server, MAC).unwrap().host_name.as_deref(), Some("box"));
}

#[test]
fn dhclient_after_our_restart_keeps_its_address_byte_for_byte() {
    let mut server = server();
    let reboot = Message::new("350103 32040a00024d 0c02766d 370d011c02030f06770c2c2f1a792a");
    let ack = reply(reboot.send(&mut server, NOW));
    let options = format!(
        "{COMMON_OPTIONS} 0c02766d {VUNET_INTERNAL} 1a0205dc 1c040a0002ff {LEASE_OPTIONS_HEAD} 350105 {LEASE_OPTIONS_TAIL}
         7710 0576756e657408696e7465726e616c00 ff"
    );
    assert_eq!(ack.payload, expected(&reboot, 0, Ipv4Addr::UNSPECIFIED, ip(77), &options));
    assert_eq!((ack.dst_mac, ack.dst_ip, ack.dst_port), (MAC, ip(77), 68));
}

#[test]
fn dhclient_renews_at_the_address_it_uses() {
    let mut server = server();
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    let renew = Message::new("350103 0c02766d 370d011c02030f06770c2c2f1a792a").ciaddr(ip(2));
    let ack = reply(renew.send(&mut server, at(43_200)));
    assert_eq!(message_type(&ack), ACK);
    assert_eq!((ack.dst_mac, ack.dst_ip, ack.dst_port), (MAC, ip(2), 68));
    assert_eq!(&ack.payload[12..20], &[10, 0, 2, 2, 10, 0, 2, 2]);
    assert_eq!(ack.lease.unwrap().change, LeaseChange::Renewed);
    assert_eq!(known(&mut server, MAC).unwrap().until, Some(at(43_200 + 86_400)));
}

/// networkd identifies itself by IAID and DUID, and takes frames of the link's size.
const NETWORKD_DISCOVER: &str = "350101 3d13 ff b6220feb 0002 0000ab11 6e0c1d2f3a4b5c6d
    370b 0103060c0f1a212a777879 390205dc 0c067765622d3031";

#[test]
fn networkd_gets_what_it_lists_and_its_identifier_back() {
    let mut server = server();
    let discover = Message::new(NETWORKD_DISCOVER);
    let offer = reply(discover.send(&mut server, NOW));
    let options = format!(
        "{COMMON_OPTIONS} 0c067765622d3031 {VUNET_INTERNAL} 1a0205dc {LEASE_OPTIONS_HEAD} 350102 {LEASE_OPTIONS_TAIL}
         3d13 ff b6220feb 0002 0000ab11 6e0c1d2f3a4b5c6d 7710 0576756e657408696e7465726e616c00 ff"
    );
    assert_eq!(offer.payload, expected(&discover, 0, Ipv4Addr::UNSPECIFIED, ip(2), &options));
}

/// iPXE of a virtio card that had an address before, for which it asks for broadcasts.
const IPXE_DISCOVER: &str = "350101 390205c0 5d020000 5e03010201
    3c20 505845436c69656e743a417263683a30303030303a554e44493a303032303031
    4d04 69505845 3716 010306070c0f112b3c424377 8081828384858687 afcb
    af15 b105011af41000 eb03011501 170101 220101 130101
    3d07 01525400123456 6111 00 00112233445566778899aabbccddeeff";

#[test]
fn ipxe_firmware_and_system_of_one_card_get_one_address() {
    let mut server = server();
    let ipxe = reply(Message::new(IPXE_DISCOVER).flags(0x8000).send(&mut server, NOW));
    assert_eq!((ipxe.dst_mac, ipxe.dst_ip, ipxe.dst_port), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST, 68));
    assert_eq!(&ipxe.payload[10..12], &[0x80, 0]);
    assert_eq!((message_type(&ipxe), yiaddr(&ipxe)), (OFFER, ip(2)));
    assert_eq!(option(&ipxe, 61).unwrap(), hex("01525400123456"));
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    for (system, seconds) in [(NETWORKD_DISCOVER, 20), (UDHCPC_DISCOVER, 40), (WINDOWS_DISCOVER, 90_000)] {
        assert_eq!(yiaddr(&reply(Message::new(system).send(&mut server, at(seconds)))), ip(2));
    }
}

const WINDOWS_DISCOVER: &str = "350101 3d07 01525400123456 0c0f 4445534b544f502d37513242394637
    3c08 4d53465420352e30 370e 0103060f1f212b2c2e2f7779f9fc";

#[test]
fn windows_name_in_capitals_and_plain_fqdn_do_no_harm() {
    let mut server = server();
    let discover = Message::new(WINDOWS_DISCOVER);
    let offer = reply(discover.send(&mut server, NOW));
    let options = format!(
        "{COMMON_OPTIONS} {VUNET_INTERNAL} {LEASE_OPTIONS_HEAD} 350102 {LEASE_OPTIONS_TAIL}
         3d0701525400123456 7710 0576756e657408696e7465726e616c00 ff"
    );
    assert_eq!(offer.payload, expected(&discover, 0, Ipv4Addr::UNSPECIFIED, ip(2), &options));
    // The FQDN (81) is in the old plain form and stands before what matters.
    let request = Message::new(
        "350103 5112 000000 4445534b544f502d375132423946 37 3d0701525400123456 32040a000202 36040a000201
         0c0f 4445534b544f502d37513242394637 3c084d53465420352e30 370e0103060f1f212b2c2e2f7779f9fc",
    );
    let ack = reply(request.send(&mut server, NOW));
    assert_eq!((message_type(&ack), yiaddr(&ack)), (ACK, ip(2)));
    assert_eq!(known(&mut server, MAC).unwrap().host_name.as_deref(), Some("desktop-7q2b9f7"));
}

#[test]
fn windows_inform_is_answered_without_lease_or_address() {
    let mut server = server();
    let inform =
        Message::new("350108 3d0701525400123456 3c084d53465420352e30 370d0103060f1f212b2c2e2f79f9fc")
            .ciaddr(ip(50));
    let ack = reply(inform.send(&mut server, NOW));
    let options = format!("{COMMON_OPTIONS} {VUNET_INTERNAL} 350105 36040a000201 3d0701525400123456 ff");
    assert_eq!(ack.payload, expected(&inform, 0, ip(50), Ipv4Addr::UNSPECIFIED, &options));
    assert_eq!((ack.dst_mac, ack.dst_ip, ack.dst_port, ack.lease), (MAC, ip(50), 68, None));
    assert!(known(&mut server, MAC).is_none());
}

#[test]
fn inform_from_another_network_is_not_answered() {
    let inform = Message::new("350108").ciaddr(Ipv4Addr::new(192, 168, 1, 5));
    assert_eq!(silence(inform.send(&mut server(), NOW)), Silence::NoAddress);
}

// ---- states of REQUEST ----

#[test]
fn request_that_names_another_server_is_not_answered_and_frees_the_offer() {
    let mut server = server();
    reply(Message::discover().send(&mut server, NOW));
    let request = Message::request().wants(ip(2)).naming_server(ip(3));
    assert_eq!(silence(request.send(&mut server, NOW)), Silence::OtherServer);
    assert!(known(&mut server, MAC).is_none());
    assert_eq!(lease(&mut server, mac(1), NOW), ip(2));
}

#[test]
fn request_that_names_another_server_leaves_a_running_lease() {
    let mut server = server();
    lease(&mut server, MAC, NOW);
    let request = Message::request().wants(ip(2)).naming_server(ip(3));
    assert_eq!(silence(request.send(&mut server, NOW)), Silence::OtherServer);
    assert!(known(&mut server, MAC).unwrap().is_active(NOW));
}

#[test]
fn init_reboot_with_an_address_of_another_network_gets_nak_byte_for_byte() {
    let mut server = server();
    let reboot = Message::new("350103 3204c0a80105 3d0701525400123456 0c02766d 3703010306");
    let nak = reply(reboot.send(&mut server, NOW));
    let options = "350106 36040a000201 381a 61646472657373206e6f7420617661696c61626c652068657265
                   3d0701525400123456 ff";
    let none = Ipv4Addr::UNSPECIFIED;
    assert_eq!(nak.payload, expected(&reboot, 0, none, none, options));
    assert_eq!((nak.dst_mac, nak.dst_ip, nak.dst_port), (MacAddr::BROADCAST, Ipv4Addr::BROADCAST, 68));
    assert_eq!(nak.lease, None);
}

#[test]
fn addresses_that_are_not_to_be_had_get_nak() {
    let mut server = server();
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    for taken in [ip(2), ip(1), ip(0), ip(255), Ipv4Addr::new(10, 0, 3, 2)] {
        let reboot = Message::request().mac(mac(9)).wants(taken);
        assert_eq!(message_type(&reply(reboot.send(&mut server, NOW))), NAK, "{taken}");
        let renew = Message::request().mac(mac(9)).ciaddr(taken);
        assert_eq!(message_type(&reply(renew.send(&mut server, NOW))), NAK, "{taken}");
    }
}

#[test]
fn client_with_a_lease_cannot_take_a_second_address() {
    let mut server = server();
    lease(&mut server, MAC, NOW);
    let second = Message::request().wants(ip(9));
    assert_eq!(message_type(&reply(second.send(&mut server, NOW))), NAK);
    assert_eq!(yiaddr(&reply(Message::discover().wants(ip(9)).send(&mut server, NOW))), ip(2));
}

#[test]
fn rebinding_by_a_client_we_never_heard_of_is_acknowledged_if_its_address_is_free() {
    let mut server = server();
    let ack = reply(Message::request().ciaddr(ip(40)).send(&mut server, NOW));
    assert_eq!((message_type(&ack), yiaddr(&ack), ack.dst_ip), (ACK, ip(40), ip(40)));
    assert_eq!(ack.lease.unwrap().change, LeaseChange::Bound);
}

#[test]
fn request_without_any_address_is_not_answered() {
    assert_eq!(silence(Message::request().send(&mut server(), NOW)), Silence::NoAddress);
}

#[test]
fn declined_address_rests_for_300_seconds() {
    let mut server = server();
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    let decline = Message::new("350104").wants(ip(2)).naming_server(GATEWAY);
    let Silence::Declined(event) = silence(decline.send(&mut server, NOW)) else { panic!("not declined") };
    assert_eq!((event.ip, event.change), (ip(2), LeaseChange::Declined));
    assert_eq!(lease(&mut server, MAC, at(299)), ip(3));
    assert_eq!(lease(&mut server, mac(1), at(299)), ip(4));
    assert_eq!(lease(&mut server, mac(2), at(300)), ip(2));
}

#[test]
fn decline_or_release_of_what_is_not_ones_own_changes_nothing() {
    let mut server = server();
    lease(&mut server, MAC, NOW);
    let decline = Message::new("350104").mac(mac(1)).wants(ip(2)).naming_server(GATEWAY);
    assert_eq!(silence(decline.send(&mut server, NOW)), Silence::NotTheirs);
    let release = Message::new("350107").mac(mac(1)).ciaddr(ip(2)).naming_server(GATEWAY);
    assert_eq!(silence(release.send(&mut server, NOW)), Silence::NotTheirs);
    let elsewhere = Message::new("350107").ciaddr(ip(2)).naming_server(ip(9));
    assert_eq!(silence(elsewhere.send(&mut server, NOW)), Silence::OtherServer);
    assert!(known(&mut server, MAC).unwrap().is_active(NOW));
}

#[test]
fn released_address_is_remembered_for_its_owner() {
    let mut server = server();
    lease(&mut server, MAC, NOW);
    let release = Message::new("350107").ciaddr(ip(2)).naming_server(GATEWAY);
    assert!(matches!(silence(release.send(&mut server, NOW)), Silence::Released(_)));
    assert!(!known(&mut server, MAC).unwrap().is_active(NOW));
    assert_eq!(lease(&mut server, mac(1), NOW), ip(3));
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
}

// ---- where replies go ----

#[test]
fn relayed_messages_are_answered_through_the_relay_with_its_information_last() {
    let mut server = server();
    let relay_mac = mac(77);
    let info = hex("0104 61626364 0206 525400aabbcc 9702 0a0b");
    let discover = Message::discover().relay(ip(20)).flags(0x8000).option(82, &info).option(61, &[1, 2, 3]);
    let offer = reply(server.handle(NOW, relay_mac, &discover.bytes()));
    assert_eq!((offer.dst_mac, offer.dst_ip, offer.dst_port), (relay_mac, ip(20), 67));
    assert_eq!(options(&offer).last().unwrap(), &(82, info.clone()));
    assert_eq!(&offer.payload[24..28], &ip(20).octets());

    let wrong = Message::request().relay(ip(20)).wants(Ipv4Addr::new(10, 9, 9, 9)).option(82, &info);
    let nak = reply(server.handle(NOW, relay_mac, &wrong.bytes()));
    assert_eq!((nak.dst_mac, nak.dst_ip, nak.dst_port), (relay_mac, ip(20), 67));
    assert_eq!(&nak.payload[10..12], &[0x80, 0], "the relay is asked to broadcast");
    assert_eq!(options(&nak).last().unwrap(), &(82, info));
}

#[test]
fn relays_of_other_networks_are_not_answered() {
    for relay in [Ipv4Addr::new(192, 168, 7, 1), GATEWAY, ip(255)] {
        let discover = Message::discover().relay(relay);
        assert_eq!(silence(discover.send(&mut server(), NOW)), Silence::ForeignRelay);
    }
}

#[test]
fn broadcast_flag_is_obeyed_for_ack_but_not_for_an_address_in_use() {
    let mut server = server();
    lease(&mut server, MAC, NOW);
    let request = Message::request().wants(ip(2)).naming_server(GATEWAY).flags(0x8000);
    assert_eq!(reply(request.send(&mut server, NOW)).dst_mac, MacAddr::BROADCAST);
    let renew = Message::request().ciaddr(ip(2)).flags(0x8000);
    assert_eq!(reply(renew.send(&mut server, NOW)).dst_ip, ip(2));
}

// ---- options ----

#[test]
fn client_without_a_parameter_list_gets_everything() {
    let offer = reply(Message::discover().send(&mut server(), NOW));
    let codes: Vec<u8> = options(&offer).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, [1, 3, 6, 15, 26, 28, 51, 53, 54, 58, 59, 119]);
}

#[test]
fn client_with_an_empty_wish_gets_what_it_cannot_do_without() {
    let offer = reply(Message::discover().option(55, &[42]).send(&mut server(), NOW));
    let codes: Vec<u8> = options(&offer).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, [1, 3, 6, 51, 53, 54, 58, 59]);
}

#[test]
fn mtu_that_is_not_ethernets_is_told_unasked() {
    let lan = Lan { ip_mtu: IpMtu::new(1280).unwrap(), ..lan() };
    let mut server = server_of(&lan, &dns());
    let offer = reply(Message::discover().option(55, &[1, 3]).send(&mut server, NOW));
    assert_eq!(option(&offer, 26).unwrap(), [0x05, 0x00]);
}

#[test]
fn without_dns_there_is_no_resolver_and_no_domain() {
    let mut server = server_of(&lan(), &DnsConfig { enabled: false, ..dns() });
    let offer = reply(Message::discover().send(&mut server, NOW));
    for code in [6, 15, 119] {
        assert_eq!(option(&offer, code), None);
    }
}

/// The names of option 119 (RFC 3397), put together where they are compressed.
fn search_list(reply: &DhcpReply) -> Vec<String> {
    let data = option(reply, 119).unwrap();
    let mut decoder = BinDecoder::new(&data);
    let mut names = Vec::new();
    while !decoder.is_empty() {
        names.push(Name::read(&mut decoder).unwrap().to_ascii());
    }
    names
}

#[test]
fn the_hosts_search_list_is_served_behind_the_networks_own_domain_and_live_at_renewal() {
    let mut server = server();
    let discover = Message::new(NETWORKD_DISCOVER);
    assert_eq!(search_list(&reply(discover.send(&mut server, NOW))), ["vunet.internal."]);
    let domains = ["corp.example", "lab.corp.example", "vunet.internal"].map(str::to_owned);
    server.set_search(&domains);
    let expected = ["vunet.internal.", "corp.example.", "lab.corp.example."];
    assert_eq!(search_list(&reply(discover.send(&mut server, NOW))), expected);
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    server.set_search(&["other.example".to_owned()]);
    let renew = Message::new("350103 370177").ciaddr(ip(2));
    let ack = reply(renew.send(&mut server, at(43_200)));
    assert_eq!(search_list(&ack), ["vunet.internal.", "other.example."]);
    assert_eq!(option(&ack, 15), None, "not asked for");
}

#[test]
fn a_long_search_list_is_cut_to_what_one_option_holds() {
    let mut server = server();
    let label = "a".repeat(57);
    let domains: Vec<String> = (0..10).map(|n| format!("{n}{label}.example")).collect();
    server.set_search(&domains);
    let discover = Message::new(NETWORKD_DISCOVER).option(57, &1500u16.to_be_bytes());
    // 16 bytes of the own domain and 68 of each: the fourth would need 288.
    assert_eq!(search_list(&reply(discover.send(&mut server, NOW))).len(), 4);
    let mut server = server_of(&lan(), &DnsConfig { enabled: false, ..dns() });
    server.set_search(&domains);
    assert_eq!(option(&reply(discover.send(&mut server, NOW)), 119), None);
}

#[test]
fn long_reply_loses_what_can_be_spared_and_stays_within_the_clients_size() {
    let label = "a".repeat(60);
    let domain = [label.as_str(); 4].join(".");
    let mut server = server_of(&lan(), &DnsConfig { domain, ..dns() });
    let id = [7u8; 200];
    let small = reply(Message::discover().option(61, &id).send(&mut server, NOW));
    assert!(small.payload.len() <= 548, "{}", small.payload.len());
    assert_eq!(option(&small, 119), None);
    assert_eq!(option(&small, 61).unwrap(), id);
    for code in [1, 3, 6, 51, 53, 54, 58, 59] {
        assert!(option(&small, code).is_some());
    }
    let roomy = Message::discover().option(61, &id).option(57, &1500u16.to_be_bytes());
    let roomy = reply(roomy.send(&mut server, NOW));
    assert!(option(&roomy, 119).is_some() && option(&roomy, 15).is_some());
    // A size below what every client must take is not believed.
    let liar = Message::discover().option(57, &[0, 1]);
    assert!(option(&reply(liar.send(&mut server, NOW)), 51).is_some());
}

#[test]
fn options_in_parts_and_in_the_file_field_are_put_together() {
    let mut server = server();
    let mut discover =
        Message::discover().option(52, &[1]).option(12, b"ab").option(55, &[1]).option(12, b"cd");
    discover.file = hex("32040a000233 ff");
    let offer = reply(discover.send(&mut server, NOW));
    assert_eq!(yiaddr(&offer), ip(0x33));
    assert_eq!(known(&mut server, MAC).unwrap().host_name.as_deref(), Some("abcd"));
}

#[test]
fn malformed_option_does_not_hide_those_behind_it() {
    let discover =
        Message::discover().option(12, &[0xff, 0xfe]).option(81, &[4]).option(80, &[1, 2]).wants(ip(9));
    let mut server = server();
    assert_eq!(yiaddr(&reply(discover.send(&mut server, NOW))), ip(9));
    assert_eq!(known(&mut server, MAC).unwrap().host_name.as_deref(), None);
}

#[test]
fn host_names_are_one_label_of_letters_digits_and_hyphens() {
    let cases: [(u8, &[u8], Option<&str>); 11] = [
        (12, b"Web-01", Some("web-01")),
        (12, b"web.example.org", Some("web")),
        (12, b"web\0", Some("web")),
        (81, b"\x00\x00\x00BOX.example.org", Some("box")),
        (81, b"\x04\x00\x00\x03box\x07example\x00", Some("box")),
        (81, b"\x04\x00\x00\x3fbox", None),
        (12, b"-web", None),
        (12, b"we b", None),
        (12, b"localhost", None),
        (12, b"", None),
        (12, &[b'a'; 64], None),
    ];
    for (code, data, name) in cases {
        let mut server = server();
        reply(Message::discover().option(code, data).send(&mut server, NOW));
        assert_eq!(known(&mut server, MAC).unwrap().host_name.as_deref(), name, "{data:?}");
    }
}

// ---- what is no request ----

#[test]
fn messages_that_are_no_requests_are_not_answered() {
    let good = Message::discover().bytes();
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let cases = [
        (good[..239].to_vec(), Silence::Malformed),
        (with(0, 2), Silence::Malformed),
        (with(236, 0), Silence::Malformed),
        ([good.clone(), vec![0; 1300]].concat(), Silence::Malformed),
        (with(1, 6), Silence::NotEthernet),
        (with(2, 255), Silence::NotEthernet),
        (with(2, 0), Silence::NotEthernet),
        (with(28, 0x53), Silence::NotEthernet),
        (with(242, 2), Silence::NotForServers),
        (with(240, 12), Silence::NotForServers),
    ];
    for (bytes, expected) in cases {
        assert_eq!(silence(server().handle(NOW, MAC, &bytes)), expected);
    }
    let off = Lan { dhcp: false, ..lan() };
    assert_eq!(silence(server_of(&off, &dns()).handle(NOW, MAC, &good)), Silence::Disabled);
}

// ---- the pool under pressure ----

#[test]
fn flood_of_discovers_does_not_pin_the_pool_or_evict_leases() {
    let mut server = server();
    assert_eq!(lease(&mut server, MAC, NOW), ip(2));
    for n in 0..5000 {
        Message::discover().mac(mac(n)).send(&mut server, NOW);
    }
    assert_eq!(server.leases(NOW).unwrap().len(), 253);
    let late = Message::discover().mac(mac(6000));
    assert_eq!(silence(late.send(&mut server, NOW)), Silence::PoolExhausted);
    // A second later a newcomer is served, the leaseholder still has its address, and when the
    // offers have run out only the two leases are left.
    lease(&mut server, mac(6000), at(1));
    assert!(known(&mut server, MAC).unwrap().is_active(at(1)));
    assert_eq!(lease(&mut server, MAC, at(2)), ip(2));
    lease(&mut server, mac(6000), at(40));
    assert_eq!(server.leases(NOW).unwrap().len(), 2);
}

#[test]
fn guest_address_is_the_first_given() {
    let lan = Lan { guest: Some(ip(100)), ..lan() };
    let mut server = server_of(&lan, &dns());
    assert_eq!(lease(&mut server, MAC, NOW), ip(100));
    assert_eq!(lease(&mut server, mac(1), NOW), ip(2));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1600)) {
        server().handle(NOW, MAC, &bytes);
    }

    #[test]
    fn arbitrary_options_get_a_reply_within_the_clients_size_or_none(
        kind in 0u8..10,
        options in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..255)), 0..5),
        tail in proptest::collection::vec(any::<u8>(), 0..40),
        ciaddr in any::<u32>(),
        low in any::<bool>(),
    ) {
        let mut message = Message::new("").option(53, &[kind]);
        for (code, data) in &options {
            message = message.option(*code, data);
        }
        message.options.extend(&tail);
        message.ciaddr = if low { ip(ciaddr as u8) } else { Ipv4Addr::from_bits(ciaddr) };
        if let Outcome::Reply(reply) = message.send(&mut server(), NOW) {
            prop_assert!((300..=1472).contains(&reply.payload.len()));
            prop_assert_eq!(&reply.payload[4..8], &message.xid.to_be_bytes());
            prop_assert_eq!(option(&reply, 54).unwrap(), GATEWAY.octets());
        }
    }
}
