//! The DNS service: what it answers itself, what it forwards, what it refuses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use proptest::prelude::*;
use vunet::config::{DnsConfig, IpMtu, Lan};
use vunet::service::dns::{
    DnsAction, DnsService, Ignored, Transport, question_matches, servfail, truncate_for_udp,
};

const WEB: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 9));
const WEB6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 9));

fn service_in(subnet: &str, has_upstream: bool) -> DnsService {
    let subnet: vunet::addr::Ipv4Subnet = subnet.parse().unwrap();
    let lan =
        Lan { subnet, gateway: subnet.host(1).unwrap(), guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
    let hosts = [
        ("web.vunet.internal", WEB),
        ("web.vunet.internal", WEB6),
        ("db.staging.vunet.internal", IpAddr::V4(Ipv4Addr::new(10, 0, 2, 10))),
        ("api.example.com", IpAddr::V4(Ipv4Addr::new(192, 0, 2, 80))),
    ];
    let dns = DnsConfig {
        enabled: true,
        domain: DnsConfig::DEFAULT_DOMAIN.to_owned(),
        hosts: hosts.into_iter().map(|(name, addr)| (name.to_owned(), addr)).collect(),
    };
    DnsService::new(&dns, &lan, has_upstream)
}

fn service() -> DnsService {
    service_in("10.0.2.0/24", true)
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0xbeef, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, bytes: u16, dnssec_ok: bool) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(bytes).set_dnssec_ok(dnssec_ok);
    message.set_edns(edns);
    message
}

fn ask_bytes(service: &DnsService, query: &[u8]) -> Message {
    match service.handle(query, Transport::Udp) {
        DnsAction::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("expected an answer, not {other:?}"),
    }
}

fn ask(name: &str, kind: RecordType) -> Message {
    ask_bytes(&service(), &query(name, kind).to_vec().unwrap())
}

fn data(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

/// The owner of the SOA that a negative answer must have, and nothing else.
fn soa_owner(message: &Message) -> String {
    assert!(message.answers.is_empty());
    let [soa] = message.authorities.as_slice() else { panic!("one SOA, not {:?}", message.authorities) };
    assert!(matches!(soa.data, RData::SOA(_)));
    assert_eq!(soa.ttl, 300);
    soa.name.to_string()
}

fn is_forwarded(name: &str, kind: RecordType) -> bool {
    service().handle(&query(name, kind).to_vec().unwrap(), Transport::Udp) == DnsAction::Forward
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

// ---- golden vectors ----

#[test]
fn address_of_a_local_name_byte_for_byte_with_the_case_of_the_question() {
    // WeB.vUNet.internal A, with RD.
    let query = hex("abcd 0100 0001 0000 0000 0000 03576542 0576554e6574 08696e7465726e616c 00 0001 0001");
    let answer = hex("abcd 8580 0001 0001 0000 0000 03576542 0576554e6574 08696e7465726e616c 00 0001 0001
                      c00c 0001 0001 0000012c 0004 0a000209");
    assert_eq!(service().handle(&query, Transport::Udp), DnsAction::Reply(answer.clone()));
    assert_eq!(service().handle(&query, Transport::Tcp), DnsAction::Reply(answer));
}

#[test]
fn unknown_local_name_with_edns_byte_for_byte() {
    // nope.vunet.internal AAAA, RD and AD, OPT of 4096 bytes with DO and a cookie.
    let query = hex("0001 0120 0001 0000 0000 0001 046e6f7065 0576756e6574 08696e7465726e616c 00 001c 0001
                     00 0029 1000 00008000 000c 000a 0008 0102030405060708");
    let answer = hex("0001 8583 0001 0000 0001 0001 046e6f7065 0576756e6574 08696e7465726e616c 00 001c 0001
                      c011 0006 0001 0000012c 0023 c011 0a686f73746d6173746572 c011
                      00000001 0000012c 0000012c 0000012c 0000012c
                      00 0029 04d0 00008000 0000");
    assert_eq!(service().handle(&query, Transport::Udp), DnsAction::Reply(answer));
}

#[test]
fn refusal_byte_for_byte() {
    // version.bind TXT CH.
    let query = hex("1234 0110 0001 0000 0000 0000 0776657273696f6e 0462696e64 00 0010 0003");
    let answer = hex("1234 8195 0001 0000 0000 0000 0776657273696f6e 0462696e64 00 0010 0003");
    assert_eq!(service().handle(&query, Transport::Udp), DnsAction::Reply(answer));
}

// ---- local names ----

#[test]
fn local_names_answer_with_their_addresses() {
    assert_eq!(data(&ask("web.vunet.internal.", RecordType::A)), ["10.0.2.9"]);
    assert_eq!(data(&ask("web.vunet.internal.", RecordType::AAAA)), ["fd00::9"]);
    assert_eq!(data(&ask("WEB.VUNET.INTERNAL.", RecordType::ANY)), ["10.0.2.9", "fd00::9"]);
    for name in ["host.vunet.internal.", "host.docker.internal.", "gateway.docker.internal."] {
        let answer = ask(name, RecordType::A);
        assert_eq!(data(&answer), ["10.0.2.1"]);
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert_eq!(answer.answers[0].ttl, 300);
    }
}

#[test]
fn configured_name_of_the_gateway_wins() {
    let lan = Lan {
        subnet: "10.0.2.0/24".parse().unwrap(),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    };
    let hosts = vec![("host.docker.internal".to_owned(), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)))];
    let dns = DnsConfig { enabled: true, domain: "corp.example".to_owned(), hosts };
    let service = DnsService::new(&dns, &lan, true);
    let ask = |name: &str| ask_bytes(&service, &query(name, RecordType::A).to_vec().unwrap());
    assert_eq!(data(&ask("host.docker.internal.")), ["192.0.2.1"]);
    assert_eq!(data(&ask("host.corp.example.")), ["10.0.2.1"]);
    assert_eq!(ask("x.corp.example.").metadata.response_code, ResponseCode::NXDomain);
}

#[test]
fn other_types_of_a_local_name_have_no_data() {
    for kind in [RecordType::MX, RecordType::HTTPS, RecordType::TXT, RecordType::Unknown(65_400)] {
        let answer = ask("web.vunet.internal.", kind);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert_eq!(soa_owner(&answer), "vunet.internal.");
    }
    let answer = ask("api.example.com.", RecordType::AAAA);
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(soa_owner(&answer), "api.example.com.");
}

#[test]
fn unknown_names_of_the_domain_do_not_exist_and_never_leak() {
    for name in ["nope.vunet.internal.", "a.web.vunet.internal.", "_dns-sd._udp.vunet.internal."] {
        let answer = ask(name, RecordType::A);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
        assert_eq!(soa_owner(&answer), "vunet.internal.");
    }
}

#[test]
fn domain_and_names_between_it_and_a_host_exist() {
    for name in ["vunet.internal.", "staging.vunet.internal."] {
        let answer = ask(name, RecordType::A);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
        assert_eq!(soa_owner(&answer), "vunet.internal.");
    }
    assert!(matches!(ask("VUNET.internal.", RecordType::SOA).answers[0].data, RData::SOA(_)));
}

#[test]
fn names_beside_local_ones_are_forwarded() {
    for name in
        ["example.com.", "www.example.com.", "x.api.example.com.", "metadata.google.internal.", "internal."]
    {
        assert!(is_forwarded(name, RecordType::A), "{name}");
    }
    assert!(is_forwarded(".", RecordType::NS));
    assert!(is_forwarded("example.com.", RecordType::Unknown(65_400)));
    assert!(is_forwarded("xvunet.internal.", RecordType::A));
}

// ---- reverse names ----

#[test]
fn reverse_names_of_hosts_point_to_their_first_name() {
    assert_eq!(data(&ask("9.2.0.10.in-addr.arpa.", RecordType::PTR)), ["web.vunet.internal."]);
    assert_eq!(data(&ask("1.2.0.10.IN-ADDR.arpa.", RecordType::PTR)), ["host.vunet.internal."]);
    assert_eq!(data(&ask("80.2.0.192.in-addr.arpa.", RecordType::PTR)), ["api.example.com."]);
    let six = "9.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.";
    assert_eq!(data(&ask(six, RecordType::PTR)), ["web.vunet.internal."]);
    assert_eq!(soa_owner(&ask("9.2.0.10.in-addr.arpa.", RecordType::A)), "2.0.10.in-addr.arpa.");
}

#[test]
fn reverse_names_of_the_subnet_never_leak() {
    for name in
        ["7.2.0.10.in-addr.arpa.", "b._dns-sd._udp.0.2.0.10.in-addr.arpa.", "300.2.0.10.in-addr.arpa."]
    {
        let answer = ask(name, RecordType::PTR);
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name}");
        assert_eq!(soa_owner(&answer), "2.0.10.in-addr.arpa.");
    }
    let zone = ask("2.0.10.in-addr.arpa.", RecordType::NS);
    assert_eq!(zone.metadata.response_code, ResponseCode::NoError);
    assert_eq!(soa_owner(&zone), "2.0.10.in-addr.arpa.");
    assert!(matches!(ask("2.0.10.in-addr.arpa.", RecordType::SOA).answers[0].data, RData::SOA(_)));
}

#[test]
fn reverse_names_of_other_networks_are_forwarded() {
    for name in ["7.3.0.10.in-addr.arpa.", "0.10.in-addr.arpa.", "8.8.8.8.in-addr.arpa.", "in-addr.arpa."] {
        assert!(is_forwarded(name, RecordType::PTR), "{name}");
    }
}

#[test]
fn reverse_names_follow_subnets_that_end_within_an_octet() {
    let cases = [
        ("10.0.4.0/22", "9.7.0.10.in-addr.arpa.", Some("7.0.10.in-addr.arpa.")),
        ("10.0.4.0/22", "9.8.0.10.in-addr.arpa.", None),
        ("10.0.4.0/22", "0.10.in-addr.arpa.", None),
        ("10.0.2.0/26", "60.2.0.10.in-addr.arpa.", Some("2.0.10.in-addr.arpa.")),
        ("10.0.2.0/26", "64.2.0.10.in-addr.arpa.", None),
        ("10.0.2.0/26", "2.0.10.in-addr.arpa.", None),
        ("10.0.0.0/8", "60.2.0.10.in-addr.arpa.", Some("10.in-addr.arpa.")),
    ];
    for (subnet, name, zone) in cases {
        let query = query(name, RecordType::PTR).to_vec().unwrap();
        match service_in(subnet, true).handle(&query, Transport::Udp) {
            DnsAction::Reply(bytes) => {
                assert_eq!(
                    Some(soa_owner(&Message::from_vec(&bytes).unwrap()).as_str()),
                    zone,
                    "{subnet} {name}"
                );
            }
            other => assert_eq!((other, zone), (DnsAction::Forward, None), "{subnet} {name}"),
        }
    }
}

// ---- special-use names ----

#[test]
fn localhost_is_the_guests_own() {
    assert_eq!(data(&ask("localhost.", RecordType::A)), ["127.0.0.1"]);
    assert_eq!(data(&ask("app.LocalHost.", RecordType::AAAA)), ["::1"]);
    assert_eq!(soa_owner(&ask("localhost.", RecordType::MX)), "localhost.");
    assert_eq!(data(&ask("1.0.0.127.in-addr.arpa.", RecordType::PTR)), ["localhost."]);
    assert_eq!(
        ask("2.0.0.127.in-addr.arpa.", RecordType::PTR).metadata.response_code,
        ResponseCode::NXDomain
    );
}

#[test]
fn names_that_cannot_exist_do_not_and_the_resolver_is_not_discovered() {
    for name in ["invalid.", "x.invalid.", "abcdef.onion."] {
        assert_eq!(ask(name, RecordType::A).metadata.response_code, ResponseCode::NXDomain, "{name}");
    }
    let discovery = ask("_dns.resolver.arpa.", RecordType::SVCB);
    assert_eq!(discovery.metadata.response_code, ResponseCode::NoError);
    assert_eq!(soa_owner(&discovery), "resolver.arpa.");
}

#[test]
fn names_the_hosts_resolver_decides_on_are_forwarded() {
    for name in ["app.test.", "printer.local.", "www.example.", "5.1.168.192.in-addr.arpa."] {
        assert!(is_forwarded(name, RecordType::A), "{name}");
    }
}

// ---- without the world ----

#[test]
fn without_an_upstream_everything_else_is_refused() {
    let service = service_in("10.0.2.0/24", false);
    let refused = ask_bytes(&service, &query("example.com.", RecordType::A).to_vec().unwrap());
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    assert!(!refused.metadata.recursion_available);
    let local = ask_bytes(&service, &query("web.vunet.internal.", RecordType::A).to_vec().unwrap());
    assert_eq!(data(&local), ["10.0.2.9"]);
}

// ---- EDNS and other forms of question ----

#[test]
fn edns_is_answered_with_our_size_the_do_bit_and_no_options() {
    let mut message = with_edns(query("web.vunet.internal.", RecordType::A), 4096, true);
    let cookie = EdnsOption::Unknown(10, vec![1; 8]);
    message.edns.as_mut().unwrap().options_mut().insert(cookie);
    let edns = ask_bytes(&service(), &message.to_vec().unwrap()).edns.unwrap();
    assert_eq!((edns.max_payload(), edns.version(), edns.flags().dnssec_ok), (1232, 0, true));
    assert!(edns.options().as_ref().is_empty());
    assert!(ask("web.vunet.internal.", RecordType::A).edns.is_none());
}

#[test]
fn edns_of_another_version_gets_badvers() {
    for name in ["web.vunet.internal.", "example.com."] {
        let mut message = with_edns(query(name, RecordType::A), 1232, false);
        message.edns.as_mut().unwrap().set_version(1);
        let answer = ask_bytes(&service(), &message.to_vec().unwrap());
        // 16 is BADVERS here; in signatures it is BADSIG, which the reader takes it for.
        assert_eq!(u16::from(answer.metadata.response_code), 16);
        assert_eq!(answer.edns.unwrap().version(), 0);
    }
}

#[test]
fn two_opt_records_are_a_format_error_for_local_names() {
    let mut bytes = with_edns(query("web.vunet.internal.", RecordType::A), 1232, false).to_vec().unwrap();
    bytes.extend(hex("00 0029 04d0 00000000 0000"));
    bytes[11] = 2;
    assert_eq!(ask_bytes(&service(), &bytes).metadata.response_code, ResponseCode::FormErr);
}

#[test]
fn what_only_upstream_may_understand_is_forwarded_as_it_is() {
    let mut bytes = query("example.com.", RecordType::A).to_vec().unwrap();
    bytes.extend(hex("00 0001 0001 00000000 0003 010203"));
    bytes[11] = 1;
    assert!(Message::from_vec(&bytes).is_err());
    assert_eq!(service().handle(&bytes, Transport::Udp), DnsAction::Forward);
}

#[test]
fn operations_classes_and_transfers_that_are_not_a_resolvers_are_refused() {
    let code = |message: &Message| ask_bytes(&service(), &message.to_vec().unwrap()).metadata.response_code;
    for op in [OpCode::Update, OpCode::Notify, OpCode::Status] {
        let mut message = query("example.com.", RecordType::SOA);
        message.metadata.op_code = op;
        assert_eq!(code(&message), ResponseCode::NotImp);
    }
    for class in [DNSClass::CH, DNSClass::ANY, DNSClass::HS] {
        let mut message = query("web.vunet.internal.", RecordType::A);
        message.queries[0].set_query_class(class);
        assert_eq!(code(&message), ResponseCode::Refused);
    }
    for kind in [RecordType::AXFR, RecordType::IXFR] {
        assert_eq!(code(&query("example.com.", kind)), ResponseCode::Refused);
    }
}

#[test]
fn no_question_or_two_are_a_format_error() {
    let mut none = query("example.com.", RecordType::A);
    none.queries.clear();
    let mut two = query("example.com.", RecordType::A);
    two.add_query(Query::query(Name::root(), RecordType::NS));
    for message in [none, two] {
        let answer = ask_bytes(&service(), &message.to_vec().unwrap());
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
        assert_eq!(answer.metadata.id, 0xbeef);
    }
}

#[test]
fn compressed_or_cut_questions_are_a_format_error() {
    let header = hex("0001 0100 0001 0000 0000 0000");
    for question in ["c00c 0001 0001", "0377", "03777777 00 0001", "40 00 0001 0001"] {
        let bytes = [header.clone(), hex(question)].concat();
        let DnsAction::Reply(answer) = service().handle(&bytes, Transport::Udp) else { panic!("{question}") };
        assert_eq!(answer, hex("0001 8181 0000 0000 0000 0000"), "{question}");
    }
}

#[test]
fn responses_and_fragments_of_headers_are_dropped() {
    let mut response = query("example.com.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    let drop = |bytes: &[u8]| service().handle(bytes, Transport::Udp);
    assert_eq!(drop(&response.to_vec().unwrap()), DnsAction::Drop(Ignored::Response));
    assert_eq!(drop(&[0; 11]), DnsAction::Drop(Ignored::Short));
    assert_eq!(drop(&[]), DnsAction::Drop(Ignored::Short));
}

// ---- sizes ----

fn many_addresses() -> DnsService {
    let lan = Lan {
        subnet: "10.0.2.0/24".parse().unwrap(),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    };
    let hosts = (0..100).map(|n| ("many.x".to_owned(), IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)))).collect();
    DnsService::new(&DnsConfig { enabled: true, domain: "x".to_owned(), hosts }, &lan, true)
}

#[test]
fn local_answer_of_many_addresses_is_truncated_for_udp_but_not_for_tcp() {
    let service = many_addresses();
    let plain = query("many.x.", RecordType::A).to_vec().unwrap();
    let cut = ask_bytes(&service, &plain);
    assert!(cut.metadata.truncation && cut.answers.is_empty() && cut.queries.len() == 1);
    let DnsAction::Reply(whole) = service.handle(&plain, Transport::Tcp) else { panic!("no answer") };
    assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 100);
    let roomy = with_edns(query("many.x.", RecordType::A), 4096, false).to_vec().unwrap();
    assert_eq!(ask_bytes(&service, &roomy).answers.len(), 100);
}

#[test]
fn answer_of_exactly_the_size_fits_and_one_byte_more_is_truncated() {
    let plain = query("a.example.", RecordType::TXT).to_vec().unwrap();
    let edns = with_edns(query("a.example.", RecordType::TXT), 700, true).to_vec().unwrap();
    let small = with_edns(query("a.example.", RecordType::TXT), 512, true).to_vec().unwrap();
    let mut liar = small.clone();
    let class_at = liar.len() - 8;
    liar[class_at..class_at + 2].copy_from_slice(&[0, 1]);
    for (query, size) in [(&plain, 512), (&edns, 700), (&small, 512), (&liar, 512)] {
        let mut answer = plain.clone();
        answer[2] |= 0x80;
        answer.resize(size, 0xaa);
        assert_eq!(truncate_for_udp(&answer, query), answer);
        answer.push(0xaa);
        let cut = truncate_for_udp(&answer, query);
        let message = Message::from_vec(&cut).unwrap();
        assert!(message.metadata.truncation);
        assert_eq!(message.queries.len(), 1);
        assert_eq!(message.edns.is_some(), query != &plain);
        assert!(message.edns.is_none_or(|edns| edns.flags().dnssec_ok));
    }
}

#[test]
fn servfail_keeps_id_question_and_the_do_bit() {
    let bytes = with_edns(query("example.com.", RecordType::MX), 1232, true).to_vec().unwrap();
    let answer = Message::from_vec(&servfail(&bytes)).unwrap();
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (0xbeef, ResponseCode::ServFail));
    assert!(answer.metadata.recursion_available && answer.edns.unwrap().flags().dnssec_ok);
    assert!(question_matches(&bytes, &servfail(&bytes)));
    assert!(servfail(&[1, 2, 3]).is_empty());
}

#[test]
fn answers_match_by_id_and_question_whatever_the_case() {
    let asked = query("Example.com.", RecordType::A).to_vec().unwrap();
    let answer = |name: &str, kind, id| {
        let mut message = query(name, kind);
        message.metadata.message_type = MessageType::Response;
        message.metadata.id = id;
        message.to_vec().unwrap()
    };
    assert!(question_matches(&asked, &answer("eXample.com.", RecordType::A, 0xbeef)));
    assert!(!question_matches(&asked, &answer("example.com.", RecordType::A, 0xbeee)));
    assert!(!question_matches(&asked, &answer("example.com.", RecordType::AAAA, 0xbeef)));
    assert!(!question_matches(&asked, &answer("example.org.", RecordType::A, 0xbeef)));
    assert!(!question_matches(&asked, &asked), "a question is no answer");
    assert!(!question_matches(&asked, &[]));
}

#[test]
fn disabled_service_says_nothing() {
    let lan = Lan {
        subnet: "10.0.2.0/24".parse().unwrap(),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    };
    let dns = DnsConfig { enabled: false, domain: String::new(), hosts: Vec::new() };
    let query = query("example.com.", RecordType::A).to_vec().unwrap();
    let action = DnsService::new(&dns, &lan, true).handle(&query, Transport::Udp);
    assert_eq!(action, DnsAction::Drop(Ignored::Disabled));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        service().handle(&bytes, Transport::Udp);
        truncate_for_udp(&bytes, &bytes);
        question_matches(&bytes, &bytes);
    }

    #[test]
    fn broken_queries_get_short_well_formed_answers_or_none(
        name in "[a-zA-Z0-9_.-]{0,40}(vunet\\.internal|in-addr\\.arpa|localhost|com)?",
        kind in any::<u16>(),
        edns in any::<bool>(),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        break_it in any::<bool>(),
    ) {
        let Ok(name) = Name::from_ascii(&name) else { return Ok(()) };
        let mut message = Message::new(1, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(name, RecordType::from(kind)));
        if edns {
            message = with_edns(message, 1232, true);
        }
        let mut bytes = message.to_vec().unwrap();
        if break_it {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let DnsAction::Reply(answer) = service().handle(&bytes, Transport::Udp) {
            prop_assert!(answer.len() <= 1232);
            let parsed = Message::from_vec(&answer).unwrap();
            prop_assert_eq!(parsed.metadata.message_type, MessageType::Response);
            prop_assert_eq!(&answer[..2], &bytes[..2]);
        }
    }
}

#[test]
fn local_names_become_others_for_all_who_share_the_service() {
    let service = std::sync::Arc::new(service());
    let shared = std::sync::Arc::clone(&service);
    let bytes = |name| query(name, RecordType::A).to_vec().unwrap();
    assert_eq!(data(&ask_bytes(&service, &bytes("web.vunet.internal"))), ["10.0.2.9"]);
    let subnet: vunet::addr::Ipv4Subnet = "10.0.2.0/24".parse().unwrap();
    let gateway = subnet.host(1).unwrap();
    let lan = Lan { subnet, gateway, guest: None, ip_mtu: IpMtu::DEFAULT, dhcp: true };
    let mut dns = DnsConfig::of_gateway(DnsConfig::DEFAULT_DOMAIN, gateway);
    dns.hosts.push(("mail.vunet.internal".to_owned(), "10.0.2.11".parse().unwrap()));
    // From another thread, as the workers ask meanwhile.
    std::thread::spawn(move || shared.set_names(&dns, &lan)).join().unwrap();
    assert_eq!(data(&ask_bytes(&service, &bytes("mail.vunet.internal"))), ["10.0.2.11"]);
    assert_eq!(data(&ask_bytes(&service, &bytes("host.vunet.internal"))), ["10.0.2.1"]);
    let gone = ask_bytes(&service, &bytes("web.vunet.internal"));
    assert_eq!(gone.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(
        service.handle(&bytes("api.example.com"), Transport::Udp),
        DnsAction::Forward,
        "a name of others again"
    );
}
