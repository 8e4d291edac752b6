//! The DNS forwarder against upstreams on the host's loopback that answer well, badly, late, twice
//! or not at all.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::rdata::opt::EdnsOption;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use vunet::config::{DnsConfig, IpMtu, Lan};
use vunet::control::dns_forward::{DnsAnswer, DnsClient, DnsQuery, Resolver, Upstreams, channel};
use vunet::limits;
use vunet::service::dns::DnsService;

const GUEST_ID: u16 = 0xbeef;

// ---- the two ends ----

fn service() -> Arc<DnsService> {
    let lan = Lan {
        subnet: "10.0.2.0/24".parse().unwrap(),
        gateway: Ipv4Addr::new(10, 0, 2, 1),
        guest: None,
        ip_mtu: IpMtu::DEFAULT,
        dhcp: true,
    };
    let hosts = vec![("web.vunet.internal".to_owned(), IpAddr::V4(Ipv4Addr::new(10, 0, 2, 9)))];
    let dns = DnsConfig { enabled: true, domain: DnsConfig::DEFAULT_DOMAIN.to_owned(), hosts };
    Arc::new(DnsService::new(&dns, &lan, true))
}

/// A client whose forwarder runs on a thread of its own, watched as a worker does: edge-triggered.
struct Forwarding {
    resolver: Arc<Resolver>,
    client: Option<DnsClient>,
    epoll: i32,
    forwarder: Option<thread::JoinHandle<()>>,
}

impl Forwarding {
    fn to(upstreams: Upstreams) -> Forwarding {
        Forwarding::by(&Resolver::new(upstreams))
    }

    fn by(resolver: &Arc<Resolver>) -> Forwarding {
        Forwarding::with(resolver, false)
    }

    /// One whose resolver follows the host's settings.
    fn following(upstreams: Upstreams) -> Forwarding {
        Forwarding::with(&Resolver::new(upstreams), true)
    }

    fn with(resolver: &Arc<Resolver>, follow: bool) -> Forwarding {
        let (client, forwarder) = channel(resolver).unwrap();
        let followed = Arc::clone(resolver);
        let forwarder = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                if follow {
                    tokio::spawn(followed.follow());
                }
                forwarder.run(service()).await.unwrap();
            });
        });
        let epoll = epoll::create(true).unwrap();
        let event = epoll::Event::new(epoll::Events::EPOLLIN | epoll::Events::EPOLLET, 0);
        epoll::ctl(epoll, epoll::ControlOptions::EPOLL_CTL_ADD, client.event_fd(), event).unwrap();
        let resolver = Arc::clone(resolver);
        Forwarding { resolver, client: Some(client), epoll, forwarder: Some(forwarder) }
    }

    fn to_fixed(upstreams: &[SocketAddr]) -> Forwarding {
        Forwarding::to(Upstreams::Fixed(upstreams.to_vec()))
    }

    fn client(&mut self) -> &mut DnsClient {
        self.client.as_mut().unwrap()
    }

    fn wait(&mut self) -> DnsAnswer {
        let deadline = Instant::now() + Duration::from_secs(12);
        loop {
            if let Some(answer) = self.client().poll_answer() {
                return answer;
            }
            assert!(Instant::now() < deadline, "no answer");
            let mut events = [epoll::Event::new(epoll::Events::empty(), 0)];
            let woken = epoll::wait(self.epoll, 12_000, &mut events).unwrap();
            assert_eq!(woken, 1, "no wake-up");
        }
    }

    fn ask(&mut self, query: &[u8]) -> Vec<u8> {
        self.client().submit(DnsQuery { id: 7, bytes: query.to_vec() }).unwrap();
        let answer = self.wait();
        assert_eq!(answer.id, 7);
        answer.bytes
    }
}

impl Drop for Forwarding {
    fn drop(&mut self) {
        self.client = None;
        let ended = self.forwarder.take().unwrap().join();
        let _ = epoll::close(self.epoll);
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

// ---- upstreams ----

/// A UDP upstream: each query goes to `answer`, which gets the socket to answer on.
fn udp_upstream(
    mut answer: impl FnMut(&UdpSocket, SocketAddr, &[u8]) + Send + 'static,
) -> (SocketAddr, thread::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = socket.local_addr().unwrap();
    let handle = thread::spawn(move || {
        let mut buffer = [0; 65_535];
        socket.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            answer(&socket, from, &buffer[..len]);
        }
    });
    (addr, handle)
}

/// A UDP upstream that answers each query with `make` of it.
fn answering(make: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> SocketAddr {
    udp_upstream(move |socket, from, query| {
        socket.send_to(&make(query), from).unwrap();
    })
    .0
}

fn silent() -> SocketAddr {
    udp_upstream(|_, _, _| {}).0
}

/// A TCP upstream: each connection goes to `serve` on a thread of its own.
fn tcp_upstream(serve: impl Fn(TcpStream) + Send + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream.unwrap()));
        }
    });
    addr
}

fn read_frame(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(len))];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// `query` with QR set, the code, and `tail` behind it.
fn answer_to(query: &[u8], code: u8, tail: &[u8]) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[2] |= 0x80;
    bytes[3] = 0x80 | code;
    bytes.extend(tail);
    bytes
}

fn query(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(GUEST_ID, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn query_with_edns(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::from_vec(&query(name, kind)).unwrap();
    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    message.set_edns(edns);
    message.to_vec().unwrap()
}

fn code(answer: &[u8]) -> ResponseCode {
    Message::from_vec(answer).unwrap().metadata.response_code
}

// ---- UDP ----

#[test]
fn query_and_answer_pass_byte_for_byte_but_for_the_id() {
    let (seen_in, seen) = mpsc::channel();
    let (upstream, _) = udp_upstream(move |socket, from, query| {
        seen_in.send(query.to_vec()).unwrap();
        socket.send_to(&answer_to(query, 0, b"whatever the future brings"), from).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    for kind in [RecordType::A, RecordType::HTTPS, RecordType::Unknown(65_400)] {
        let query = query_with_edns("Example.com.", kind);
        assert_eq!(forwarding.ask(&query), answer_to(&query, 0, b"whatever the future brings"));
        assert_eq!(seen.recv().unwrap()[2..], query[2..]);
    }
    let stats = forwarding.client().stats();
    assert_eq!((stats.queries, stats.answered, stats.failed), (3, 3, 0));
}

#[test]
fn ids_and_source_ports_are_fresh_for_every_query() {
    let (seen_in, seen) = mpsc::channel();
    let (upstream, _) = udp_upstream(move |socket, from, query| {
        seen_in.send((query[..2].to_vec(), from.port())).unwrap();
        socket.send_to(&answer_to(query, 0, &[]), from).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    for _ in 0..32 {
        forwarding.ask(&query("example.com.", RecordType::A));
    }
    let (ids, ports): (HashSet<_>, HashSet<_>) = seen.try_iter().unzip();
    assert!(ids.len() > 28, "{ids:?}");
    assert!(ports.len() > 24, "{ports:?}");
}

#[test]
fn answers_with_a_wrong_id_or_question_are_ignored_and_waiting_goes_on() {
    let upstream = udp_upstream(|socket, from, query| {
        let mut wrong_id = answer_to(query, 0, b"forged");
        wrong_id[1] ^= 1;
        let other = self::query("example.org.", RecordType::A);
        let mut wrong_question = answer_to(&other, 0, b"forged");
        wrong_question[..2].copy_from_slice(&query[..2]);
        let not_an_answer = query.to_vec();
        for bytes in [wrong_id, wrong_question, not_an_answer, vec![0; 3], answer_to(query, 0, b"true")] {
            socket.send_to(&bytes, from).unwrap();
        }
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let query = query("example.com.", RecordType::A);
    assert_eq!(forwarding.ask(&query), answer_to(&query, 0, b"true"));
    assert_eq!(forwarding.client().stats().mismatched, 4);
}

#[test]
fn answers_from_another_address_do_not_reach_the_query() {
    let upstream = udp_upstream(|socket, from, query| {
        let forger = UdpSocket::bind("127.0.0.1:0").unwrap();
        forger.send_to(&answer_to(query, 0, b"forged"), from).unwrap();
        thread::sleep(Duration::from_millis(50));
        socket.send_to(&answer_to(query, 0, b"true"), from).unwrap();
    })
    .0;
    let query = query("example.com.", RecordType::A);
    assert_eq!(Forwarding::to_fixed(&[upstream]).ask(&query), answer_to(&query, 0, b"true"));
}

#[test]
fn silent_upstream_makes_way_after_two_seconds_and_its_late_answer_is_lost() {
    let late = udp_upstream(|socket, from, query| {
        thread::sleep(Duration::from_millis(3_500));
        socket.send_to(&answer_to(query, 0, b"late"), from).unwrap();
    })
    .0;
    let second = answering(|query| answer_to(query, 0, b"second"));
    let mut forwarding = Forwarding::to_fixed(&[late, second]);
    let query = query("example.com.", RecordType::A);
    let start = Instant::now();
    assert_eq!(forwarding.ask(&query), answer_to(&query, 0, b"second"));
    let took = start.elapsed();
    assert!((2_000..3_400).contains(&took.as_millis()), "{took:?}");
    thread::sleep(Duration::from_millis(3_700).saturating_sub(start.elapsed()));
    assert_eq!(forwarding.client().poll_answer(), None);
    assert_eq!(forwarding.client().stats().timeouts, 1);
}

#[test]
fn closed_port_makes_way_at_once() {
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let second = answering(|query| answer_to(query, 3, b"second"));
    let mut forwarding = Forwarding::to_fixed(&[closed, second]);
    let start = Instant::now();
    assert_eq!(code(&forwarding.ask(&query("example.com.", RecordType::A))), ResponseCode::NXDomain);
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_eq!(forwarding.client().stats().errors, 1);
}

#[test]
fn failing_and_unwilling_upstreams_make_way() {
    for code in [2, 5] {
        let first = answering(move |query| answer_to(query, code, b"first"));
        let second = answering(|query| answer_to(query, 0, b"second"));
        let query = query("example.com.", RecordType::A);
        assert_eq!(Forwarding::to_fixed(&[first, second]).ask(&query), answer_to(&query, 0, b"second"));
    }
}

#[test]
fn if_all_fail_the_first_answer_stands_with_what_it_explains() {
    let first = answering(|query| answer_to(query, 2, b"extended error"));
    let second = answering(|query| answer_to(query, 5, &[]));
    let query = query("example.com.", RecordType::A);
    assert_eq!(Forwarding::to_fixed(&[first, second]).ask(&query), answer_to(&query, 2, b"extended error"));
}

#[test]
fn complaint_of_a_header_only_is_passed_if_nobody_knows_better() {
    let old = || answering(|query| [&query[..2], &[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0]].concat());
    let query = query("example.com.", RecordType::A);
    assert_eq!(Forwarding::to_fixed(&[old()]).ask(&query)[..4], [0xbe, 0xef, 0x80, 1]);
    let good = answering(|query| answer_to(query, 0, b"good"));
    assert_eq!(Forwarding::to_fixed(&[old(), good]).ask(&query), answer_to(&query, 0, b"good"));
}

#[test]
fn without_an_answer_there_is_servfail() {
    let query = query_with_edns("example.com.", RecordType::A);
    let mut forwarding = Forwarding::to_fixed(&[silent()]);
    let answer = forwarding.ask(&query);
    assert_eq!(code(&answer), ResponseCode::ServFail);
    assert_eq!(Message::from_vec(&answer).unwrap().metadata.id, GUEST_ID);
    assert_eq!(forwarding.client().stats().failed, 1);
    assert_eq!(code(&Forwarding::to_fixed(&[]).ask(&query)), ResponseCode::ServFail);
}

#[test]
fn truncated_answer_passes_as_it_came() {
    let upstream = answering(|query| {
        let mut bytes = answer_to(query, 0, &[]);
        bytes[2] |= 0x02;
        bytes
    });
    let answer = Forwarding::to_fixed(&[upstream]).ask(&query("example.com.", RecordType::TXT));
    assert!(Message::from_vec(&answer).unwrap().metadata.truncation);
}

#[test]
fn datagram_of_60_kilobytes_passes_whole() {
    let tail = vec![0x5a; 60_000];
    let upstream = answering(|query| answer_to(query, 0, &[0x5a; 60_000]));
    let query = query_with_edns("example.com.", RecordType::TXT);
    assert_eq!(Forwarding::to_fixed(&[upstream]).ask(&query), answer_to(&query, 0, &tail));
}

#[test]
fn many_queries_at_once_each_get_their_own_answer() {
    let upstream = udp_upstream({
        let mut held: Vec<(SocketAddr, Vec<u8>)> = Vec::new();
        move |socket, from, query| {
            held.push((from, query.to_vec()));
            if held.len() == 100 {
                for (from, query) in held.drain(..).rev() {
                    socket.send_to(&answer_to(&query, 0, &[]), from).unwrap();
                }
            }
        }
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked: Vec<_> = (0..100).map(|n| query(&format!("n{n}.example."), RecordType::A)).collect();
    for (id, bytes) in (0..).zip(&asked) {
        forwarding.client().submit(DnsQuery { id, bytes: bytes.clone() }).unwrap();
    }
    let mut seen = HashSet::new();
    for _ in 0..100 {
        let answer = forwarding.wait();
        assert_eq!(answer.bytes, answer_to(&asked[usize::try_from(answer.id).unwrap()], 0, &[]));
        seen.insert(answer.id);
    }
    assert_eq!(seen.len(), 100);
}

#[test]
fn one_query_past_the_bound_is_given_back_and_the_bound_recovers() {
    let mut forwarding = Forwarding::to_fixed(&[silent()]);
    let nth = |n: u64| query(&format!("n{n}.example."), RecordType::A);
    for id in 0..limits::DNS_QUERIES_MAX as u64 {
        forwarding.client().submit(DnsQuery { id, bytes: nth(id) }).unwrap();
    }
    let refused = forwarding.client().submit(DnsQuery { id: 10_001, bytes: nth(0) });
    assert_eq!(refused.unwrap_err().id, 10_001);
    assert_eq!(forwarding.client().stats().over_bound, 1);
    let mut seen = HashSet::new();
    for _ in 0..limits::DNS_QUERIES_MAX {
        let answer = forwarding.wait();
        assert_eq!(code(&answer.bytes), ResponseCode::ServFail);
        seen.insert(answer.id);
    }
    assert_eq!(seen.len(), limits::DNS_QUERIES_MAX);
    assert_eq!(code(&forwarding.ask(&nth(0))), ResponseCode::ServFail);
}

#[test]
fn one_byte_of_queries_past_their_bound_is_given_back_and_the_bound_recovers() {
    let (go, stay) = mpsc::channel::<()>();
    let upstream = udp_upstream(move |socket, from, query| {
        let _ = stay.recv();
        socket.send_to(&answer_to(query, 0, &[]), from).unwrap();
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut long = query("example.com.", RecordType::A);
    long.resize(limits::DNS_QUERY_BYTES_MAX, 0);
    let count = limits::DNS_QUERIES_BYTES_MAX / long.len();
    for id in 0..count as u64 {
        forwarding.client().submit(DnsQuery { id, bytes: long.clone() }).unwrap();
    }
    assert!(forwarding.client().submit(DnsQuery { id: 1, bytes: vec![0] }).is_err());
    drop(go);
    (0..count).for_each(|_| drop(forwarding.wait()));
    forwarding.client().submit(DnsQuery { id: 1, bytes: vec![0] }).unwrap();
}

#[test]
fn as_many_questions_as_may_be_are_on_their_way_and_the_next_waits_for_its_turn() {
    let (seen_in, seen) = mpsc::channel();
    let upstream = udp_upstream(move |socket, from, query| {
        seen_in.send((socket.try_clone().unwrap(), from, query.to_vec())).unwrap();
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let count = limits::DNS_EXCHANGES_MAX + 1;
    for id in 0..count as u64 {
        let bytes = query(&format!("n{id}.example."), RecordType::A);
        forwarding.client().submit(DnsQuery { id, bytes }).unwrap();
    }
    let mut asked: Vec<_> = (0..limits::DNS_EXCHANGES_MAX)
        .map(|n| seen.recv_timeout(Duration::from_secs(5)).unwrap_or_else(|_| panic!("only {n} are asked")))
        .collect();
    // Sooner than anything is sent again.
    assert!(seen.recv_timeout(Duration::from_millis(200)).is_err(), "one past the bound is asked");
    let (socket, from, first) = asked.pop().unwrap();
    socket.send_to(&answer_to(&first, 0, b"tail"), from).unwrap();
    assert_eq!(forwarding.wait().bytes[12..], answer_to(&first, 0, b"tail")[12..]);
    asked.push(seen.recv_timeout(Duration::from_secs(5)).expect("the one that waited"));
    for (socket, from, query) in asked {
        socket.send_to(&answer_to(&query, 0, &[]), from).unwrap();
    }
    for _ in 1..count {
        assert_eq!(code(&forwarding.wait().bytes), ResponseCode::NoError);
    }
}

// ---- the cache, and questions asked once ----

/// `query`'s answer with one A record that lives for a minute.
fn address_for(query: &[u8]) -> Vec<u8> {
    let asked = Message::from_vec(query).unwrap();
    let mut message = Message::response(asked.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = asked.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.queries.clone_from(&asked.queries);
    message.edns.clone_from(&asked.edns);
    let data = RData::A(A::new(192, 0, 2, 7));
    message.answers.push(Record::from_rdata(asked.queries[0].name.clone(), 60, data));
    message.to_vec().unwrap()
}

/// An upstream that counts what it is asked and answers with [`address_for`].
fn counting() -> (SocketAddr, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let upstream = answering(move |query| {
        counted.fetch_add(1, Ordering::Relaxed);
        address_for(query)
    });
    (upstream, count)
}

/// `query` with another id, and its name's letters in another case.
fn other_spelling(query: &[u8], id: u16) -> Vec<u8> {
    let mut bytes = query.to_vec();
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    bytes[13..16].make_ascii_uppercase();
    bytes
}

#[test]
fn a_known_answer_is_given_without_asking_again_to_every_worker_and_transport() {
    let (upstream, count) = counting();
    let mut first = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    let answer = first.ask(&asked);
    assert_eq!(answer, address_for(&asked));
    let other = other_spelling(&asked, 4711);
    let mut second = Forwarding::by(&first.resolver);
    let mut expected = answer;
    expected[..other.len()].copy_from_slice(&answer_to(&other, 0, &[]));
    expected[7] = 1;
    let is_expected = |mut got: Vec<u8>| {
        // The record's time to live may have gone down.
        let ttl = got.len() - 10..got.len() - 6;
        assert!((58..=60).contains(&got[ttl.end - 1]), "{got:?}");
        got[ttl.clone()].copy_from_slice(&expected[ttl]);
        assert_eq!(got, expected);
    };
    is_expected(second.ask(&other));
    let mut stream = connect(&mut second);
    stream.write_all(&frame(&other)).unwrap();
    is_expected(read_frame(&mut stream).unwrap());
    assert_eq!(count.load(Ordering::Relaxed), 1);
    let stats = first.client().stats();
    assert_eq!((stats.queries, stats.cached, stats.answered), (3, 2, 1));
    first.ask(&query("example.com.", RecordType::AAAA));
    first.ask(&query_with_edns("example.com.", RecordType::A));
    assert_eq!(count.load(Ordering::Relaxed), 3, "another type, and DNSSEC, are other questions");
}

#[test]
fn an_answer_is_not_good_for_longer_because_the_host_slept() {
    static SINCE_BOOT: AtomicU64 = AtomicU64::new(1_000_000_000);
    let (upstream, count) = counting();
    let fixed = Upstreams::Fixed(vec![upstream]);
    let clock = || vunet::time::Instant::from_micros(SINCE_BOOT.load(Ordering::Relaxed));
    let mut forwarding = Forwarding::by(&Resolver::with_clock(fixed, clock));
    let asked = query("example.com.", RecordType::A);
    let ttl = |answer: &[u8]| answer[answer.len() - 7];
    assert_eq!(ttl(&forwarding.ask(&asked)), 60);
    for (slept_s, ttl_s, asked_times) in [(59, 1, 1), (2, 60, 2)] {
        SINCE_BOOT.fetch_add(slept_s * 1_000_000, Ordering::Relaxed);
        assert_eq!(ttl(&forwarding.ask(&asked)), ttl_s);
        assert_eq!(count.load(Ordering::Relaxed), asked_times);
    }
}

#[test]
fn identical_questions_on_their_way_go_upstream_once_and_each_asker_gets_its_own_answer() {
    let (seen_in, seen) = mpsc::channel();
    let (go, stay) = mpsc::channel::<()>();
    let upstream = udp_upstream(move |socket, from, query| {
        seen_in.send(query.to_vec()).unwrap();
        let _ = stay.recv();
        // Nothing that could be kept: what follows cannot come from the cache.
        socket.send_to(&answer_to(query, 0, b"tail"), from).unwrap();
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let first = query("example.com.", RecordType::A);
    let asked: Vec<_> = (0..500).map(|n| other_spelling(&first, n)).collect();
    forwarding.client().submit(DnsQuery { id: 1000, bytes: first.clone() }).unwrap();
    seen.recv_timeout(Duration::from_secs(5)).unwrap();
    for (id, bytes) in (0..).zip(&asked) {
        forwarding.client().submit(DnsQuery { id, bytes: bytes.clone() }).unwrap();
    }
    // Another question makes sure that all were taken before the upstream answers.
    let other = query("example.net.", RecordType::A);
    forwarding.client().submit(DnsQuery { id: 1001, bytes: other.clone() }).unwrap();
    let deadline = Instant::now() + Duration::from_secs(1);
    while forwarding.client().stats().joined < 500 && Instant::now() < deadline {
        thread::yield_now();
    }
    drop(go);
    for _ in 0..502 {
        let answer = forwarding.wait();
        let query = match answer.id {
            1000 => &first,
            1001 => &other,
            id => &asked[usize::try_from(id).unwrap()],
        };
        assert_eq!(answer.bytes, answer_to(query, 0, b"tail"), "{}", answer.id);
    }
    assert_eq!(seen.try_iter().count(), 1, "the first was taken above, and the other name");
    let stats = forwarding.client().stats();
    assert_eq!((stats.queries, stats.joined, stats.cached, stats.answered), (502, 500, 0, 2));
}

#[test]
fn questions_that_allow_another_size_are_no_copies_of_each_other() {
    let (seen_in, seen) = mpsc::channel();
    let upstream = udp_upstream({
        let mut held: Vec<(SocketAddr, Vec<u8>)> = Vec::new();
        move |socket, from, query| {
            seen_in.send(()).unwrap();
            held.push((from, query.to_vec()));
            if held.len() == 2 {
                for (from, query) in held.drain(..) {
                    socket.send_to(&answer_to(&query, 0, b"tail"), from).unwrap();
                }
            }
        }
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let roomy = query_with_edns("example.com.", RecordType::A);
    let mut small = roomy.clone();
    let at = small.len() - 8;
    small[at..at + 2].copy_from_slice(&512u16.to_be_bytes());
    for (id, bytes) in [(1, roomy), (2, small)] {
        forwarding.client().submit(DnsQuery { id, bytes }).unwrap();
    }
    drop((forwarding.wait(), forwarding.wait()));
    assert_eq!(seen.try_iter().count(), 2);
}

#[test]
fn what_an_asker_says_to_its_neighbour_stays_there_and_makes_no_other_question() {
    let (seen_in, seen) = mpsc::channel();
    let upstream = answering(move |query| {
        seen_in.send(query.to_vec()).unwrap();
        address_for(query)
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let plain = query_with_edns("example.com.", RecordType::A);
    for cookie in [[1; 8], [2; 8]] {
        let mut message = Message::from_vec(&plain).unwrap();
        let options = message.edns.as_mut().unwrap().options_mut();
        options.insert(EdnsOption::Unknown(10, cookie.to_vec()));
        let answer = forwarding.ask(&message.to_vec().unwrap());
        let answer = Message::from_vec(&answer).unwrap();
        assert!(answer.edns.unwrap().options().as_ref().is_empty(), "no server cookie, first or later");
    }
    let seen: Vec<_> = seen.try_iter().collect();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0][2..], plain[2..]);
}

#[test]
fn an_asker_that_leaves_takes_nobodys_answer_with_it() {
    let upstream = tcp_upstream(|mut stream| {
        let query = read_frame(&mut stream).unwrap();
        thread::sleep(Duration::from_millis(300));
        stream.write_all(&frame(&address_for(&query))).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    let (mut first, mut second) = (connect(&mut forwarding), connect(&mut forwarding));
    first.write_all(&frame(&asked)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while forwarding.client().stats().queries == 0 {
        assert!(Instant::now() < deadline, "the query is not taken");
        thread::yield_now();
    }
    second.write_all(&frame(&asked)).unwrap();
    drop(first);
    assert_eq!(read_frame(&mut second).unwrap(), address_for(&asked));
    assert_eq!(forwarding.client().stats().answered, 1);
}

#[test]
fn queries_too_long_or_too_short_cost_nothing_but_themselves() {
    let mut forwarding = Forwarding::to_fixed(&[answering(|query| answer_to(query, 0, &[]))]);
    let long = vec![0; limits::DNS_QUERY_BYTES_MAX + 1];
    assert!(forwarding.client().submit(DnsQuery { id: 1, bytes: long }).is_err());
    assert!(forwarding.ask(&[1, 2, 3]).is_empty());
    let good = query("example.com.", RecordType::A);
    assert_eq!(forwarding.ask(&good), answer_to(&good, 0, &[]));
}

#[test]
fn forwarder_that_is_gone_refuses_at_once() {
    let (mut client, forwarder) = channel(&Resolver::new(Upstreams::Fixed(vec![]))).unwrap();
    drop(forwarder);
    assert!(client.submit(DnsQuery { id: 1, bytes: query("example.com.", RecordType::A) }).is_err());
    assert_eq!(client.connect_stream().unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn host_resolvers_are_followed_as_their_file_changes() {
    // Name servers of resolv.conf listen on port 53.
    let bind = |ip: &str| UdpSocket::bind((ip, 53));
    let (Ok(one), Ok(two)) = (bind("127.83.2.1"), bind("127.83.2.2")) else {
        println!("skipped: port 53 of the loopback may not be bound here");
        return;
    };
    for (socket, mark) in [(one, *b"one"), (two, *b"two")] {
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = socket.recv_from(&mut buffer) {
                let query = &buffer[..len];
                let is_plain = query[12] == 3;
                let answer = if is_plain { address_for(query) } else { answer_to(query, 0, &mark) };
                socket.send_to(&answer, from).unwrap();
            }
        });
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let mut forwarding = Forwarding::to(Upstreams::ResolvConf(path.clone()));
    let query = query("example.com.", RecordType::A);
    assert_eq!(code(&forwarding.ask(&query)), ResponseCode::ServFail);
    let plain = self::query("www.example.com.", RecordType::A);
    for (ip, mark) in [("127.83.2.1", b"one"), ("127.83.2.2", b"two")] {
        std::fs::write(&path, format!("nameserver {ip}\n")).unwrap();
        thread::sleep(Duration::from_millis(1_050));
        assert_eq!(forwarding.ask(&query), answer_to(&query, 0, mark));
        forwarding.ask(&plain);
    }
    assert_eq!(forwarding.client().stats().cached, 0, "another network's answers are not given");
}

#[test]
fn the_hosts_settings_are_followed_without_a_query() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let search = |domain: &str| format!("nameserver 127.83.2.9\nsearch {domain}\n");
    std::fs::create_dir(at("run")).unwrap();
    std::fs::write(at("run/one"), search("one.example")).unwrap();
    std::fs::write(at("run/two"), search("two.example")).unwrap();
    std::os::unix::fs::symlink("run/one", at("resolv.conf")).unwrap();
    let forwarding = Forwarding::following(Upstreams::ResolvConf(at("resolv.conf")));
    let list = forwarding.resolver.search_list();
    let expect = |domain: &str, how: &str| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while *list.borrow() != [domain] {
            assert!(Instant::now() < deadline, "{how}: still {:?}", *list.borrow());
            thread::sleep(Duration::from_millis(5));
        }
    };
    expect("one.example", "at the start");
    std::os::unix::fs::symlink("run/two", at("link")).unwrap();
    std::fs::rename(at("link"), at("resolv.conf")).unwrap();
    expect("two.example", "another symlink");
    std::fs::write(at("run/two"), search("three.example")).unwrap();
    expect("three.example", "written in place");
    std::fs::write(at("run/new"), search("four.example")).unwrap();
    std::fs::rename(at("run/new"), at("run/two")).unwrap();
    expect("four.example", "replaced behind the symlink");
    std::fs::write(at("run/two"), "").unwrap();
    std::fs::remove_dir_all(at("run")).unwrap();
    thread::sleep(Duration::from_millis(300));
    expect("four.example", "gone");
    std::fs::create_dir(at("run")).unwrap();
    std::fs::write(at("run/two"), search("five.example")).unwrap();
    expect("five.example", "come back");
}

#[test]
fn a_flood_of_known_names_leaves_the_runtime_to_others_again_and_again() {
    let resolver = Resolver::new(Upstreams::Fixed(vec![answering(address_for)]));
    let (mut client, forwarder) = channel(&resolver).unwrap();
    let known = query("example.com.", RecordType::A);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::spawn(forwarder.run(service()));
        client.submit(DnsQuery { id: 0, bytes: known.clone() }).unwrap();
        while client.poll_answer().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for id in 0..limits::DNS_QUERIES_MAX as u64 {
            client.submit(DnsQuery { id, bytes: known.clone() }).unwrap();
        }
        let (mut answers, mut turns) = (0, 0);
        while answers < limits::DNS_QUERIES_MAX {
            // Nothing is said about when the forwarder is woken, only for how long it runs then.
            tokio::task::yield_now().await;
            let before = answers;
            while client.poll_answer().is_some() {
                answers += 1;
            }
            // A few batches: how many the runtime gives it before it looks at others is the runtime's own matter.
            assert!(answers - before <= 4096, "{} answers in one turn", answers - before);
            turns += 1;
            assert!(turns < 1_000_000, "it does not go on");
        }
    });
    assert_eq!(resolver.stats().cached, limits::DNS_QUERIES_MAX as u64);
}

// ---- several upstreams ----

#[test]
fn a_resolver_that_is_dead_costs_the_first_questions_only() {
    let mut forwarding = Forwarding::to_fixed(&[silent(), answering(address_for)]);
    let nth = |n: u64| query(&format!("n{n}.example."), RecordType::A);
    for id in 0..20 {
        forwarding.client().submit(DnsQuery { id, bytes: nth(id) }).unwrap();
    }
    for _ in 0..20 {
        assert_eq!(code(&forwarding.wait().bytes), ResponseCode::NoError);
    }
    assert_eq!(forwarding.client().stats().timeouts, 20);
    for n in 20..40 {
        assert_eq!(code(&forwarding.ask(&nth(n))), ResponseCode::NoError);
    }
    assert_eq!(forwarding.client().stats().timeouts, 20, "it is asked after the others now");
}

#[test]
fn a_resolver_that_recovers_is_asked_first_again() {
    let (go, stay) = mpsc::channel::<()>();
    let first = udp_upstream(move |socket, from, query| {
        if stay.try_recv() != Err(mpsc::TryRecvError::Empty) {
            socket.send_to(&answer_to(query, 0, b"first"), from).unwrap();
        }
    })
    .0;
    let second = answering(|query| answer_to(query, 0, b"second"));
    let mut forwarding = Forwarding::to_fixed(&[first, second]);
    let asked = query("example.com.", RecordType::A);
    let other = query("example.net.", RecordType::A);
    for (id, bytes) in [(1, &asked), (2, &other)] {
        forwarding.client().submit(DnsQuery { id, bytes: bytes.clone() }).unwrap();
    }
    drop((forwarding.wait(), forwarding.wait()));
    drop(go);
    let deadline = Instant::now() + Duration::from_secs(9);
    while forwarding.ask(&asked) != answer_to(&asked, 0, b"first") {
        assert!(Instant::now() < deadline, "it is not tried again");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_lost_datagram_is_sent_again_as_it_was_and_costs_no_resolver_its_place() {
    let (seen_in, seen) = mpsc::channel();
    let upstream = udp_upstream({
        let mut lost = false;
        move |socket, from, query| {
            seen_in.send((from, query.to_vec())).unwrap();
            if std::mem::replace(&mut lost, true) {
                socket.send_to(&answer_to(query, 0, b"late"), from).unwrap();
            }
        }
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    assert_eq!(forwarding.ask(&asked), answer_to(&asked, 0, b"late"));
    assert_eq!(forwarding.client().stats().timeouts, 0);
    let seen: Vec<_> = seen.try_iter().collect();
    assert_eq!((seen.len(), &seen[0]), (2, &seen[1]));
}

#[test]
fn another_network_forgets_answers_and_begins_questions_on_their_way_anew() {
    let (seen_in, seen) = mpsc::channel();
    let (go, stay) = mpsc::channel::<()>();
    let upstream = udp_upstream(move |socket, from, query| {
        seen_in.send((from.port(), query.to_vec())).unwrap();
        if stay.try_recv() != Err(mpsc::TryRecvError::Empty) {
            socket.send_to(&address_for(query), from).unwrap();
        }
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    forwarding.client().submit(DnsQuery { id: 1, bytes: asked.clone() }).unwrap();
    let first = seen.recv_timeout(Duration::from_secs(5)).unwrap();
    drop(go);
    forwarding.resolver.network_changed();
    assert_eq!(forwarding.wait().bytes, address_for(&asked));
    let second = seen.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_ne!((first.0, &first.1[..2]), (second.0, &second.1[..2]), "from another socket, by another id");
    assert_eq!(forwarding.client().stats().timeouts, 0);
    // What was asked before the change is not kept after it.
    assert_eq!(forwarding.ask(&asked), address_for(&asked));
    assert_eq!(forwarding.client().stats().cached, 0);
    forwarding.ask(&asked);
    assert_eq!(forwarding.client().stats().cached, 1);
    forwarding.resolver.network_changed();
    forwarding.ask(&asked);
    assert_eq!(forwarding.client().stats().cached, 1);
}

#[test]
fn a_network_that_never_settles_lets_questions_come_to_their_end() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&seen);
    let upstream = udp_upstream(move |socket, from, query| {
        counter.fetch_add(1, Ordering::Relaxed);
        let (socket, query) = (socket.try_clone().unwrap(), query.to_vec());
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(900));
            socket.send_to(&address_for(&query), from).unwrap();
        });
    })
    .0;
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    forwarding.client().submit(DnsQuery { id: 1, bytes: asked.clone() }).unwrap();
    let answer = loop {
        thread::sleep(Duration::from_millis(300));
        match forwarding.client().poll_answer() {
            Some(answer) => break answer.bytes,
            None => forwarding.resolver.network_changed(),
        }
    };
    assert_eq!(answer, address_for(&asked));
    let stats = forwarding.client().stats();
    assert_eq!((stats.answered, stats.failed, stats.timeouts), (1, 0, 0));
    assert_eq!(seen.load(Ordering::Relaxed), 4, "asked, and asked anew three times");
}

/// Set in the process that has few descriptors.
const FEW_DESCRIPTORS: &str = "VUNET_TEST_FEW_DESCRIPTORS";

#[test]
fn want_of_descriptors_is_not_the_resolvers_fault() {
    if std::env::var_os(FEW_DESCRIPTORS).is_some() {
        return ask_without_descriptors();
    }
    // In a process of its own: a limit on descriptors is all threads'.
    let status = Command::new("sh")
        .args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "want_of_descriptors_is_not_the_resolvers_fault", "--nocapture"])
        .env(FEW_DESCRIPTORS, "1")
        .status();
    assert!(status.unwrap().success());
}

fn ask_without_descriptors() {
    let tcp = tcp_upstream(|mut stream| {
        while let Ok(asked) = read_frame(&mut stream) {
            stream.write_all(&frame(&answer_to(&asked, 0, b"good"))).unwrap();
        }
    });
    let udp = UdpSocket::bind(tcp).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&answer_to(&buffer[..len], 0, b"good"), from).unwrap();
        }
    });
    let mut forwarding = Forwarding::to_fixed(&[silent(), tcp]);
    let nth = |n: u64| query(&format!("n{n}.example."), RecordType::A);
    for id in 0..2 {
        forwarding.client().submit(DnsQuery { id, bytes: nth(id) }).unwrap();
    }
    drop((forwarding.wait(), forwarding.wait()));
    assert_eq!(forwarding.client().stats().timeouts, 2, "the silent one is asked last from now on");
    let mut stream = connect(&mut forwarding);
    let taken: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
    for n in 2..5 {
        assert_eq!(code(&forwarding.ask(&nth(n))), ResponseCode::ServFail);
        stream.write_all(&frame(&nth(10 + n))).unwrap();
        assert_eq!(code(&read_frame(&mut stream).unwrap()), ResponseCode::ServFail);
    }
    drop(taken);
    let failed = forwarding.client().stats();
    assert_eq!((failed.errors, failed.timeouts), (12, 2));
    assert_eq!(forwarding.ask(&nth(5)), answer_to(&nth(5), 0, b"good"));
    stream.write_all(&frame(&nth(15))).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&nth(15), 0, b"good"));
    assert_eq!(forwarding.client().stats().timeouts, 2, "the good one is asked first still");
}

#[test]
fn resolvers_over_ipv6_are_asked_over_both_transports() {
    let bound = UdpSocket::bind("[::1]:0").and_then(|udp| Ok((TcpListener::bind(udp.local_addr()?)?, udp)));
    let Ok((tcp, udp)) = bound else {
        println!("skipped: no IPv6 loopback here");
        return;
    };
    let upstream = udp.local_addr().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = udp.recv_from(&mut buffer) {
            udp.send_to(&answer_to(&buffer[..len], 0, b"udp"), from).unwrap();
        }
    });
    thread::spawn(move || {
        let mut stream = tcp.accept().unwrap().0;
        let query = read_frame(&mut stream).unwrap();
        stream.write_all(&frame(&answer_to(&query, 0, b"tcp"))).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let asked = query("example.com.", RecordType::A);
    assert_eq!(forwarding.ask(&asked), answer_to(&asked, 0, b"udp"));
    let mut stream = connect(&mut forwarding);
    stream.write_all(&frame(&asked)).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&asked, 0, b"tcp"));
}

// ---- TCP ----

/// A connection as the engine gets it, made blocking for the test's convenience.
fn connect(forwarding: &mut Forwarding) -> UnixStream {
    let stream = forwarding.client().connect_stream().unwrap();
    assert_eq!((&stream).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    stream
}

#[test]
fn local_names_are_answered_over_tcp_without_an_upstream() {
    let mut forwarding = Forwarding::to_fixed(&[]);
    let mut stream = connect(&mut forwarding);
    stream.write_all(&frame(&query("web.vunet.internal.", RecordType::A))).unwrap();
    let answer = Message::from_vec(&read_frame(&mut stream).unwrap()).unwrap();
    assert_eq!(answer.answers[0].data.to_string(), "10.0.2.9");
    assert_eq!(forwarding.client().stats().queries, 0);
}

#[test]
fn tcp_answer_of_65535_bytes_passes_whole() {
    let upstream = tcp_upstream(|mut stream| {
        let query = read_frame(&mut stream).unwrap();
        let mut wrong = answer_to(&query, 0, b"forged");
        wrong[0] ^= 1;
        stream.write_all(&frame(&wrong)).unwrap();
        let mut answer = answer_to(&query, 0, &[]);
        answer.resize(65_535, 0x5a);
        stream.write_all(&frame(&answer)).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    let query = query("example.com.", RecordType::TXT);
    stream.write_all(&frame(&query)).unwrap();
    let mut expected = answer_to(&query, 0, &[]);
    expected.resize(65_535, 0x5a);
    assert_eq!(read_frame(&mut stream).unwrap(), expected);
    assert_eq!(forwarding.client().stats().mismatched, 1);
}

#[test]
fn pipelined_queries_are_answered_as_answers_come_past_the_bound_and_after_a_half_close() {
    // Even names take their time: odd ones overtake them.
    let upstream = tcp_upstream(|mut stream| {
        let query = read_frame(&mut stream).unwrap();
        if query[14].is_multiple_of(2) {
            thread::sleep(Duration::from_millis(200));
        }
        stream.write_all(&frame(&answer_to(&query, 0, &[]))).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    let count = limits::DNS_STREAM_QUERIES_MAX * 2 + 1;
    let mut expected = HashSet::new();
    let mut all = Vec::new();
    for n in 0..count {
        let mut query = query(&format!("n{:02}{n}.example.", n % 10), RecordType::A);
        query[..2].copy_from_slice(&u16::try_from(n).unwrap().to_be_bytes());
        expected.insert(answer_to(&query, 0, &[]));
        all.extend(frame(&query));
    }
    // In pieces that end anywhere.
    for piece in all.chunks(37) {
        stream.write_all(piece).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let got: HashSet<_> = (0..count).map(|_| read_frame(&mut stream).unwrap()).collect();
    assert_eq!(got, expected);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "closed when all is answered");
}

#[test]
fn tcp_tries_the_next_upstream_too() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let hangs_up = tcp_upstream(drop);
    let good = tcp_upstream(|mut stream| {
        let query = read_frame(&mut stream).unwrap();
        stream.write_all(&frame(&answer_to(&query, 0, b"good"))).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[closed, hangs_up, good]);
    let mut stream = connect(&mut forwarding);
    let query = query("example.com.", RecordType::A);
    stream.write_all(&frame(&query)).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&query, 0, b"good"));
    assert_eq!(forwarding.client().stats().errors, 2);
}

/// Serves questions of one connection until it ends, each after `pause`.
fn serve_all(mut stream: TcpStream, pause: Duration) {
    while let Ok(query) = read_frame(&mut stream) {
        thread::sleep(pause);
        if stream.write_all(&frame(&answer_to(&query, 0, b"tail"))).is_err() {
            return;
        }
    }
}

#[test]
fn one_connection_to_the_upstream_carries_one_question_after_the_other() {
    let upstream = tcp_upstream(|stream| serve_all(stream, Duration::ZERO));
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    for n in 0..20 {
        // Each guest's connection is another.
        let mut stream = connect(&mut forwarding);
        let asked = query(&format!("n{n}.example."), RecordType::A);
        stream.write_all(&frame(&asked)).unwrap();
        assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&asked, 0, b"tail"));
    }
    assert_eq!(forwarding.client().stats().connections, 1);
}

#[test]
fn many_questions_at_once_share_few_connections() {
    let upstream = tcp_upstream(|stream| serve_all(stream, Duration::from_millis(10)));
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut streams: Vec<_> = (0..4).map(|_| connect(&mut forwarding)).collect();
    let mut expected = HashSet::new();
    for (n, stream) in streams.iter_mut().enumerate() {
        for m in 0..limits::DNS_STREAM_QUERIES_MAX {
            let asked = query(&format!("n{n}.m{m}.example."), RecordType::A);
            stream.write_all(&frame(&asked)).unwrap();
            expected.insert(answer_to(&asked, 0, b"tail"));
        }
    }
    let mut got = HashSet::new();
    for stream in &mut streams {
        got.extend((0..limits::DNS_STREAM_QUERIES_MAX).map(|_| read_frame(stream).unwrap()));
    }
    assert_eq!(got, expected);
    let stats = forwarding.client().stats();
    assert_eq!((stats.over_bound, stats.errors, stats.timeouts), (0, 0, 0));
    assert!(stats.connections <= limits::DNS_CONNECTIONS_MAX as u64, "{}", stats.connections);
}

#[test]
fn one_question_by_tcp_past_the_bound_fails_at_once_and_the_bound_recovers() {
    let (go, stay) = mpsc::channel::<()>();
    let stay = Arc::new(std::sync::Mutex::new(stay));
    let upstream = tcp_upstream(move |stream| {
        let _ = stay.lock().unwrap().recv();
        serve_all(stream, Duration::ZERO);
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut streams = Vec::new();
    for n in 0..limits::DNS_TCP_QUERIES_MAX / limits::DNS_STREAM_QUERIES_MAX {
        let mut stream = connect(&mut forwarding);
        for m in 0..limits::DNS_STREAM_QUERIES_MAX {
            let asked = query(&format!("n{n}.m{m}.example."), RecordType::A);
            stream.write_all(&frame(&asked)).unwrap();
        }
        streams.push(stream);
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while forwarding.client().stats().queries < limits::DNS_TCP_QUERIES_MAX as u64 {
        assert!(Instant::now() < deadline, "{:?}", forwarding.client().stats());
        thread::yield_now();
    }
    let mut one_more = connect(&mut forwarding);
    let asked = query("one.more.example.", RecordType::A);
    one_more.write_all(&frame(&asked)).unwrap();
    assert_eq!(code(&read_frame(&mut one_more).unwrap()), ResponseCode::ServFail);
    assert_eq!(forwarding.client().stats().over_bound, 1);
    drop(go);
    for stream in &mut streams {
        for _ in 0..limits::DNS_STREAM_QUERIES_MAX {
            assert!(read_frame(stream).unwrap().ends_with(b"tail"));
        }
    }
    one_more.write_all(&frame(&asked)).unwrap();
    assert_eq!(read_frame(&mut one_more).unwrap(), answer_to(&asked, 0, b"tail"));
}

#[test]
fn a_connection_the_upstream_closed_while_idle_costs_no_question() {
    let upstream = tcp_upstream(|mut stream| {
        let query = read_frame(&mut stream).unwrap();
        stream.write_all(&frame(&answer_to(&query, 0, &[]))).unwrap();
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    for n in 0..10 {
        let asked = query(&format!("n{n}.example."), RecordType::A);
        stream.write_all(&frame(&asked)).unwrap();
        assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&asked, 0, &[]));
    }
    let stats = forwarding.client().stats();
    assert_eq!((stats.connections, stats.errors, stats.failed), (10, 0, 0));
}

#[test]
fn a_connection_that_falls_silent_makes_way_for_the_next() {
    let answered = Arc::new(AtomicUsize::new(0));
    let upstream = tcp_upstream(move |mut stream| {
        if answered.fetch_add(1, Ordering::Relaxed) == 0 {
            // The first connection takes questions and says nothing.
            let _ = stream.read_to_end(&mut Vec::new());
        } else {
            serve_all(stream, Duration::ZERO);
        }
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    let asked = query("example.com.", RecordType::A);
    stream.write_all(&frame(&asked)).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&asked, 0, b"tail"));
    let stats = forwarding.client().stats();
    assert_eq!((stats.connections, stats.timeouts), (2, 1));
}

/// Waits until `count` says that nothing is left.
fn wait_for_none(count: impl Fn() -> usize) {
    let deadline = Instant::now() + Duration::from_secs(12);
    while count() > 0 {
        assert!(Instant::now() < deadline, "{} left", count());
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_connection_on_which_an_upstream_trickles_for_ever_ends_once_nobody_waits_on_it() {
    let open = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&open);
    let upstream = tcp_upstream(move |mut stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        // The beginning of a message that never ends.
        while stream.write_all(&[0xff]).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
        counted.fetch_sub(1, Ordering::Relaxed);
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    stream.write_all(&frame(&query("example.com.", RecordType::A))).unwrap();
    assert_eq!(code(&read_frame(&mut stream).unwrap()), ResponseCode::ServFail);
    wait_for_none(|| open.load(Ordering::Relaxed));
}

/// Sockets of this host with a SYN on its way to `addr` (state 02 of `/proc/net/tcp`).
fn connecting_to(addr: SocketAddr) -> usize {
    let remote = format!(":{:04X}", addr.port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let columns = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    columns.filter(|columns| columns[2].ends_with(&remote) && columns[3] == "02").count()
}

#[test]
fn a_connection_to_an_upstream_that_answers_no_syn_is_given_up_with_its_questions() {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let upstream = listener.local_addr().unwrap().as_socket().unwrap();
    // With its backlog full the kernel lets SYNs go by.
    let _first = TcpStream::connect(upstream).unwrap();
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    stream.write_all(&frame(&query("example.com.", RecordType::A))).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while connecting_to(upstream) == 0 {
        assert!(Instant::now() < deadline, "no SYN goes by");
        thread::yield_now();
    }
    assert_eq!(code(&read_frame(&mut stream).unwrap()), ResponseCode::ServFail);
    wait_for_none(|| connecting_to(upstream));
}

#[test]
fn questions_by_tcp_whose_askers_left_still_count_while_they_are_on_their_way() {
    let upstream = tcp_upstream(|mut stream| {
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut asked = 0;
    while asked < limits::DNS_TCP_QUERIES_MAX {
        let mut stream = connect(&mut forwarding);
        let burst = (limits::DNS_STREAM_QUERIES_MAX - 1).min(limits::DNS_TCP_QUERIES_MAX - asked);
        for n in asked..asked + burst {
            stream.write_all(&frame(&query(&format!("n{n}.example."), RecordType::A))).unwrap();
        }
        asked += burst;
        let deadline = Instant::now() + Duration::from_secs(5);
        while forwarding.client().stats().queries < asked as u64 {
            assert!(Instant::now() < deadline, "{:?}", forwarding.client().stats());
            thread::yield_now();
        }
        // No length of a query: the connection is closed at once.
        stream.write_all(&[0, 0]).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let mut one_more = connect(&mut forwarding);
    one_more.write_all(&frame(&query("one.more.example.", RecordType::A))).unwrap();
    assert_eq!(code(&read_frame(&mut one_more).unwrap()), ResponseCode::ServFail);
    assert_eq!(forwarding.client().stats().over_bound, 1);
}

#[test]
fn answers_of_another_question_on_a_shared_connection_are_ignored() {
    let upstream = tcp_upstream(|mut stream| {
        while let Ok(query) = read_frame(&mut stream) {
            let mut forged = answer_to(&self::query("example.org.", RecordType::A), 0, b"forged");
            forged[..2].copy_from_slice(&query[..2]);
            for bytes in [forged, vec![], vec![0], answer_to(&query, 0, b"true")] {
                stream.write_all(&frame(&bytes)).unwrap();
            }
        }
    });
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let mut stream = connect(&mut forwarding);
    let asked = query("example.com.", RecordType::A);
    stream.write_all(&frame(&asked)).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap(), answer_to(&asked, 0, b"true"));
    assert_eq!(forwarding.client().stats().mismatched, 3);
}

#[test]
fn broken_framing_ends_the_connection_only() {
    let mut forwarding = Forwarding::to_fixed(&[]);
    let too_long = u16::try_from(limits::DNS_QUERY_BYTES_MAX + 1).unwrap();
    for len in [0u16, 11, too_long, u16::MAX] {
        let mut stream = connect(&mut forwarding);
        stream.write_all(&len.to_be_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{len}");
    }
    let mut stream = connect(&mut forwarding);
    stream.write_all(&frame(&query("web.vunet.internal.", RecordType::A))).unwrap();
    assert_eq!(code(&read_frame(&mut stream).unwrap()), ResponseCode::NoError);
}

#[test]
fn query_as_long_as_may_be_is_taken() {
    let mut forwarding = Forwarding::to_fixed(&[]);
    let mut stream = connect(&mut forwarding);
    let mut long = query("web.vunet.internal.", RecordType::A);
    long.resize(limits::DNS_QUERY_BYTES_MAX, 0);
    stream.write_all(&frame(&long)).unwrap();
    assert_eq!(read_frame(&mut stream).unwrap()[..2], long[..2]);
}

#[test]
fn one_connection_past_the_bound_is_refused_until_another_ends() {
    let mut forwarding = Forwarding::to_fixed(&[]);
    let mut open: Vec<_> = (0..limits::DNS_STREAMS_MAX).map(|_| connect(&mut forwarding)).collect();
    let refused = forwarding.client().connect_stream().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    open.pop();
    let deadline = Instant::now() + Duration::from_secs(5);
    while forwarding.client().connect_stream().is_err() {
        assert!(Instant::now() < deadline, "the bound does not recover");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn idle_connection_is_closed_after_ten_seconds() {
    let mut forwarding = Forwarding::to_fixed(&[]);
    let mut stream = connect(&mut forwarding);
    let start = Instant::now();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!((9_900..14_000).contains(&start.elapsed().as_millis()));
}

// ---- a real resolver ----

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dnsmasq(port: u16) -> Option<Process> {
    let long = "x".repeat(250);
    let child = Command::new("dnsmasq")
        // Not --no-daemon: that one serves a connection to its end before anything else.
        .args([
            "--keep-in-foreground",
            "--log-facility=-",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--pid-file=",
        ])
        .args(["--listen-address=127.0.0.1", "--bind-interfaces", "--user=root", "--edns-packet-max=4096"])
        .arg(format!("--port={port}"))
        .args([
            "--host-record=www.world.example,192.0.2.7,2001:db8::7",
            "--mx-host=world.example,mail.world.example,5",
        ])
        .args([
            "--srv-host=_sip._tcp.world.example,sip.world.example,5060,1,2",
            "--cname=alias.world.example,www.world.example",
        ])
        .args((0..12).map(|n| format!("--txt-record=big.world.example,{n}{long}")))
        .stderr(Stdio::null())
        .spawn();
    child.ok().map(Process)
}

#[test]
fn dnsmasq_answers_through_the_forwarder_over_udp_and_tcp() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let Some(_process) = dnsmasq(port) else {
        println!("skipped: no dnsmasq here");
        return;
    };
    let upstream = SocketAddr::from(([127, 0, 0, 1], port));
    let deadline = Instant::now() + Duration::from_secs(5);
    while TcpStream::connect(upstream).is_err() {
        assert!(Instant::now() < deadline, "dnsmasq does not start");
        thread::sleep(Duration::from_millis(10));
    }
    let mut forwarding = Forwarding::to_fixed(&[upstream]);
    let cases = [
        ("www.world.example.", RecordType::A, "192.0.2.7"),
        ("www.world.example.", RecordType::AAAA, "2001:db8::7"),
        ("world.example.", RecordType::MX, "5 mail.world.example."),
        ("_sip._tcp.world.example.", RecordType::SRV, "1 2 5060 sip.world.example."),
        ("alias.world.example.", RecordType::CNAME, "www.world.example."),
        ("7.2.0.192.in-addr.arpa.", RecordType::PTR, "www.world.example."),
    ];
    let mut stream = connect(&mut forwarding);
    for (name, kind, expected) in cases {
        let query = query(name, kind);
        stream.write_all(&frame(&query)).unwrap();
        for answer in [forwarding.ask(&query), read_frame(&mut stream).unwrap()] {
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!(answer.answers[0].data.to_string(), expected, "{name} {kind}");
        }
    }
    let plain = query("big.world.example.", RecordType::TXT);
    assert!(Message::from_vec(&forwarding.ask(&plain)).unwrap().metadata.truncation);
    let roomy = forwarding.ask(&query_with_edns("big.world.example.", RecordType::TXT));
    assert!(roomy.len() > 3_000);
    stream.write_all(&frame(&plain)).unwrap();
    let whole = Message::from_vec(&read_frame(&mut stream).unwrap()).unwrap();
    assert_eq!(whole.answers.len(), 12);
}
