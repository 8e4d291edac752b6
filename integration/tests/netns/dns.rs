//! Names through the gateway's resolver, asked with dig.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use vunet_integration::lab::{
    BIG_TXT_BYTES, BIG_TXT_NAME, BLACKHOLE, BackendOptions, DOMAIN, GATEWAY, WORLD,
};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, Outcome, PATIENCE, Setup, bare, ensure, fail, scenario};

/// A second name server of the world, and what it says `www` is.
const OTHER_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);
const OTHER_WWW: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);

fn dig(bench: &Bench, words: &[&str]) -> Result<String, Failure> {
    let server = format!("@{GATEWAY}");
    let mut command = vec!["dig", "+time=3", "+tries=2", &server];
    command.extend(words);
    bench.in_guest(&command)
}

#[test]
fn every_record_type_is_forwarded_as_it_came() {
    scenario(&Setup::new(), |bench| {
        let (www, alias) = (format!("www.{DOMAIN}"), format!("alias.{DOMAIN}"));
        let (sip, world) = (format!("_sip._tcp.{DOMAIN}"), WORLD.to_string());
        let questions: [(&str, &str, &str); 7] = [
            (&www, "A", &world),
            (&www, "AAAA", "2001:db8::2"),
            (&alias, "CNAME", "www.example.test."),
            (DOMAIN, "MX", "10 mail.example.test."),
            (DOMAIN, "TXT", "\"v=spf1 -all\" \"second string\""),
            (&sip, "SRV", "1 2 5060 sip.example.test."),
            (DOMAIN, "HTTPS", "1 . alpn=\"h2\""),
        ];
        for transport in ["+notcp", "+tcp"] {
            for (name, kind, want) in questions {
                let got = dig(bench, &["+short", transport, kind, name])?;
                ensure!(got.trim() == want, "{kind} {name} {transport}: {got:?} instead of {want:?}");
            }
            let missing = dig(bench, &[transport, "A", &format!("nobody.{DOMAIN}")])?;
            ensure!(missing.contains("status: NXDOMAIN"), "a name that does not exist: {missing}");
        }
        Ok(())
    });
}

#[test]
fn an_answer_of_3000_bytes_comes_whole() {
    scenario(&Setup::new(), |bench| {
        let whole =
            |output: &str| output.matches("IN\tTXT\t").count() == 12 && !output.contains("flags: qr tc");
        let size = |output: &str| -> usize {
            let line = output.lines().find(|line| line.contains("MSG SIZE")).unwrap_or_default();
            line.split_whitespace().last().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        for how in [&["+bufsize=4096", "+ignore"][..], &["+tcp"], &["+noedns"], &["+bufsize=1232"]] {
            let output = dig(bench, &[how, &["TXT", BIG_TXT_NAME]].concat())?;
            ensure!(whole(&output) && size(&output) > BIG_TXT_BYTES, "{how:?}: {output}");
        }
        // Without room and without a retry over TCP the answer says that it is truncated.
        let short = dig(bench, &["+noedns", "+ignore", "TXT", BIG_TXT_NAME])?;
        ensure!(short.contains(" tc ") || short.contains(" tc;"), "no TC bit: {short}");
        ensure!(size(&short) <= 512, "{} bytes without EDNS", size(&short));
        Ok(())
    });
}

#[test]
fn dnssec_ok_reaches_the_upstream() {
    scenario(&Setup::new(), |bench| {
        let output = dig(bench, &["+dnssec", "A", &format!("www.{DOMAIN}")])?;
        ensure!(output.contains("EDNS: version: 0, flags: do"), "the DO bit was lost: {output}");
        Ok(())
    });
}

#[test]
fn local_names_are_the_gateways_own() {
    let setup = Setup::new().vunet(&["--dns-host", "printer=192.0.2.77"]);
    scenario(&setup, |bench| {
        let gateway = GATEWAY.to_string();
        for (name, want) in [
            ("host.vunet.internal", &*gateway),
            ("host.docker.internal", &*gateway),
            ("gateway.docker.internal", &*gateway),
            ("printer.vunet.internal", "192.0.2.77"),
        ] {
            let got = dig(bench, &["+short", "A", name])?;
            ensure!(got.trim() == want, "{name}: {got:?} instead of {want}");
        }
        let reverse = dig(bench, &["+short", "-x", &gateway])?;
        ensure!(reverse.contains("vunet.internal."), "PTR of the gateway: {reverse:?}");
        Ok(())
    });
}

#[test]
fn a_named_upstream_is_used() {
    let server = WORLD.to_string();
    scenario(&Setup::new().vunet(&["--dns-server", &server]), |bench| {
        bench.lab.host.set_resolver("192.0.2.99")?;
        let got = dig(bench, &["+short", "A", &format!("www.{DOMAIN}")])?;
        ensure!(got.trim() == server, "{got:?}");
        Ok(())
    });
}

/// Ends guest and vunet, and reads a number from what vunet says of DNS at its end; another one takes its
/// place.
fn at_the_end(bench: &mut Bench, what: &str) -> Result<u64, Failure> {
    bench.detach()?;
    bench.vunet.process.stop();
    let said = |line: &str| line.contains("names forwarded");
    let line = bench.vunet.process.wait_error(PATIENCE, "the numbers", said)?;
    bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
    // Styles of the text may stand between name and number.
    let unstyled = line.split('\u{1b}').map(|part| part.split_once('m').map_or(part, |(_, rest)| rest));
    let plain: String = unstyled.collect();
    let rest = plain.split_once(&format!("{what}=")).map(|(_, rest)| rest).unwrap_or_default();
    let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
    number.parse().map_err(|_| Failure(format!("no {what} in {plain}")))
}

#[test]
fn an_answer_is_kept_and_its_time_to_live_counts_down() {
    scenario(&Setup::new(), |bench| {
        let www = format!("www.{DOMAIN}");
        let ttl = |output: &str| -> Option<u32> {
            let line = output.lines().find(|line| line.starts_with(&www) && line.contains("\tA\t"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        let before = bench.lab.asked_for(&www);
        let first = dig(bench, &["A", &www])?;
        sleep(Duration::from_millis(1_100));
        let second = dig(bench, &["A", &www])?;
        let by_tcp = dig(bench, &["+tcp", "A", &www])?;
        ensure!(bench.lab.asked_for(&www) == before + 1, "the world was asked more than once");
        let (Some(first), Some(second), Some(by_tcp)) = (ttl(&first), ttl(&second), ttl(&by_tcp)) else {
            fail!("no answers: {first} {second} {by_tcp}");
        };
        ensure!(second < first && by_tcp <= second, "{first}, {second}, {by_tcp}");
        dig(bench, &["AAAA", &www])?;
        dig(bench, &["+dnssec", "A", &www])?;
        ensure!(bench.lab.asked_for(&www) == before + 3, "another type, and DNSSEC, are other questions");
        Ok(())
    });
}

#[test]
fn a_first_server_that_is_dead_makes_way_and_is_asked_last() {
    if let Some(reason) = crate::bench::missing(&[]) {
        return crate::bench::skip(&reason);
    }
    scenario(&Setup::new(), |bench| {
        // Nobody answers there, not even for the link.
        let conf = format!("nameserver 192.0.2.99\nnameserver {WORLD}\noptions timeout:1\n");
        bench.lab.host.set_resolv_conf(&conf)?;
        bench.vunet.process.wait_error(PATIENCE, "the new resolvers", |line| line.contains("192.0.2.99"))?;
        for n in 0..4 {
            // No answer that could be kept.
            let output = dig(bench, &["A", &format!("n{n}.{DOMAIN}")])?;
            ensure!(output.contains("status: NXDOMAIN"), "{output}");
        }
        let held = |line: &str| line.contains("others are asked first") && line.contains("192.0.2.99");
        bench.vunet.process.wait_error(PATIENCE, "the dead one to be held back", held)?;
        let failed = at_the_end(bench, "failed")?;
        ensure!(failed == 0, "{failed} questions failed");
        Ok(())
    });
}

#[test]
fn resolv_conf_swapped_while_running_is_obeyed_at_once() {
    scenario(&Setup::new(), |bench| {
        bench.lab.ip(&bench.lab.world, &format!("addr add {OTHER_SERVER}/24 dev e0"))?;
        let _other = bench.lab.start_name_server(&OTHER_SERVER.to_string(), OTHER_WWW)?;
        let www = format!("www.{DOMAIN}");
        let ask = |bench: &Bench| dig(bench, &["+short", "A", &www]);
        let got = ask(bench)?;
        ensure!(got.trim() == WORLD.to_string(), "{got:?}");
        bench.lab.host.set_resolv_conf("")?;
        sleep(Duration::from_millis(300));
        let got = ask(bench)?;
        ensure!(got.trim() == WORLD.to_string(), "an empty file leaves the last known: {got:?}");
        bench.lab.host.set_resolver(&OTHER_SERVER.to_string())?;
        let deadline = Instant::now() + PATIENCE;
        while ask(bench)?.trim() != OTHER_WWW.to_string() {
            ensure!(Instant::now() < deadline, "the old answer is given on");
            sleep(Duration::from_millis(50));
        }
        Ok(())
    });
}

#[test]
fn a_server_at_a_link_local_address_is_asked_over_its_interface() {
    scenario(&Setup::new(), |bench| {
        bench.lab.ip(&bench.lab.world, "addr add fe80::53/64 dev e0 nodad")?;
        bench.lab.ip(&bench.lab.host, "addr add fe80::1/64 dev p0 nodad")?;
        let _other = bench.lab.start_name_server("fe80::53%e0", OTHER_WWW)?;
        bench.lab.host.set_resolver("fe80::53%p0")?;
        bench.vunet.process.wait_error(PATIENCE, "the new resolver", |line| line.contains("fe80::53%"))?;
        for transport in ["+notcp", "+tcp"] {
            let got = dig(bench, &["+short", transport, "A", &format!("www.{DOMAIN}")])?;
            ensure!(got.trim() == OTHER_WWW.to_string(), "{transport}: {got:?}");
        }
        Ok(())
    });
}

#[test]
fn the_hosts_search_list_reaches_the_guest_at_its_next_lease() {
    bare(&Setup::new().tools(&["dhclient"]), |bench| {
        bench.attach(&[])?;
        let lease = bench.lab.dhclient(PATIENCE)?;
        ensure!(lease.option("search").trim() == "vunet.internal.", "{lease:?}");
        let conf = format!("nameserver {WORLD}\nsearch corp.example lab.example\n");
        bench.lab.host.set_resolv_conf(&conf)?;
        bench.vunet.process.wait_error(PATIENCE, "the new list", |line| line.contains("lab.example"))?;
        let lease = bench.lab.dhclient(PATIENCE)?;
        let search = lease.option("search");
        ensure!(search.trim() == "vunet.internal. corp.example. lab.example.", "{search:?}");
        Ok(())
    });
}

#[test]
fn a_truncated_answer_is_asked_for_by_tcp_over_one_connection_kept() {
    scenario(&Setup::new(), |bench| {
        let output = dig(bench, &["+noedns", "TXT", BIG_TXT_NAME])?;
        ensure!(output.matches("IN\tTXT\t").count() == 12, "{output}");
        for n in 0..5 {
            let output = dig(bench, &["+tcp", "A", &format!("n{n}.{DOMAIN}")])?;
            ensure!(output.contains("status: NXDOMAIN"), "{output}");
        }
        let connections = at_the_end(bench, "connections")?;
        ensure!(connections == 1, "{connections} connections to the resolver");
        Ok(())
    });
}

/// Moves bytes over `streams` (reads from the first half, writes to the second) until `body` has ended;
/// returns the fewest bytes that passed over one.
fn under_bulk(streams: &[TcpStream], body: impl FnOnce() -> Outcome) -> Result<u64, Failure> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let transfer = |(n, mut stream): (usize, &TcpStream)| {
            let (mut buffer, mut bytes) = (vec![0; 64 << 10], 0);
            while !is_over.load(Ordering::Relaxed) {
                let moved =
                    if n < streams.len() / 2 { stream.read(&mut buffer) } else { stream.write(&buffer) };
                bytes += moved? as u64;
            }
            Ok::<u64, io::Error>(bytes)
        };
        let threads: Vec<_> =
            streams.iter().enumerate().map(|one| scope.spawn(move || transfer(one))).collect();
        let outcome = body();
        is_over.store(true, Ordering::Relaxed);
        let mut fewest = u64::MAX;
        for thread in threads {
            fewest = fewest.min(thread.join().map_err(|_| Failure("a transfer panicked".into()))??);
        }
        outcome.map(|()| fewest)
    })
}

#[test]
fn names_are_answered_while_bulk_passes_both_ways() {
    scenario(&Setup::new(), |bench| {
        let mut streams = Vec::new();
        for port in [ports::SOURCE, ports::SOURCE, ports::SOURCE, ports::SINK, ports::SINK, ports::SINK] {
            let mut stream = bench.connect_world(port)?;
            if port == ports::SOURCE {
                stream.write_all(b"1000000000000 1\n")?;
            }
            streams.push(stream);
        }
        let fewest = under_bulk(&streams, || {
            for n in 0..40 {
                let output = dig(bench, &["A", &format!("n{n}.{DOMAIN}")])?;
                ensure!(output.contains("status: NXDOMAIN"), "{output}");
            }
            Ok(())
        })?;
        ensure!(fewest > 0, "a transfer stood still");
        Ok(())
    });
}

/// Questions a crawler may ask at once.
const CRAWL: u16 = 10_000;

/// A query for the address of `qID.example.test`, with that id.
fn crawler_query(id: u16) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in [&*format!("q{id}"), "example", "test"] {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

#[test]
fn ten_thousand_questions_a_silent_resolver_has_are_all_failed_and_leave_no_mark() {
    scenario(&Setup::new(), |bench| {
        bench.lab.host.set_resolver(&BLACKHOLE.to_string())?;
        let named = |line: &str| line.contains(&BLACKHOLE.to_string());
        bench.vunet.process.wait_error(PATIENCE, "the silent resolver", named)?;
        // None is lost before vunet sees it: the guest knows the gateway's MAC address (while it asks for that it
        // keeps some 200 datagrams), and all fit into the queue of its interface.
        dig(bench, &["+short", "A", "host.vunet.internal"])?;
        bench.lab.ip(&bench.lab.guest, &format!("link set eth0 txqueuelen {CRAWL}"))?;
        // So many that each one's answers fit into its queue, however late they are read.
        let bind_all = || (0..100).map(|_| UdpSocket::bind("0.0.0.0:0")).collect::<io::Result<Vec<_>>>();
        let sockets = bench.lab.guest.inside(bind_all)?;
        for socket in &sockets {
            socket.connect((GATEWAY, 53))?;
            socket.set_nonblocking(true)?;
        }
        for id in 0..CRAWL {
            sockets[usize::from(id) % sockets.len()].send(&crawler_query(id))?;
            if id % 100 == 99 {
                // A burst the guest's own link takes.
                sleep(Duration::from_millis(2));
            }
        }
        let (mut failed, mut answer) = (HashSet::new(), [0; 512]);
        let deadline = Instant::now() + PATIENCE;
        while failed.len() < usize::from(CRAWL) && Instant::now() < deadline {
            sleep(Duration::from_millis(10));
            for socket in &sockets {
                while let Ok(len) = socket.recv(&mut answer) {
                    ensure!(len > 12 && answer[3] & 0xf == 2, "not SERVFAIL: {:?}", &answer[..len]);
                    failed.insert(u16::from_be_bytes([answer[0], answer[1]]));
                }
            }
        }
        ensure!(failed.len() == usize::from(CRAWL), "only {} of {CRAWL} are answered", failed.len());
        let status = std::fs::read_to_string(format!("/proc/{}/status", bench.vunet.process.pid()))?;
        let rss_kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let rss_kib: u64 = rss_kib.and_then(|text| text.parse().ok()).unwrap_or(u64::MAX);
        ensure!(rss_kib < 64 << 10, "{rss_kib} KiB are held");
        bench.lab.host.set_resolver(&WORLD.to_string())?;
        let (deadline, www) = (Instant::now() + PATIENCE, format!("www.{DOMAIN}"));
        while dig(bench, &["+short", "A", &www])?.trim() != WORLD.to_string() {
            ensure!(Instant::now() < deadline, "it does not recover");
        }
        Ok(())
    });
}
