//! The world's name server: dnsmasq with one zone that has every record type the tests ask for.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{LabError, Netns, Process, SHORT};

/// The zone.
pub const DOMAIN: &str = "example.test";
/// A name whose TXT records make an answer of more than [`BIG_TXT_BYTES`].
pub const BIG_TXT_NAME: &str = "big.example.test";
/// Bytes of text under [`BIG_TXT_NAME`].
pub const BIG_TXT_BYTES: usize = 12 * 250;

/// An HTTPS record (RFC 9460): priority 1, target ".", alpn h2.
const HTTPS_RDATA: &str = "000100000100030268 32";

/// Starts dnsmasq in `world` on `addr`, where `www` has the address `www`, and waits until it answers.
pub(super) fn start(world: &Netns, dir: &Path, addr: &str, www: Ipv4Addr) -> Result<Process, LabError> {
    let mut words: Vec<String> = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
        "--log-facility=-",
        "--log-queries",
        "--edns-packet-max=4096",
        "--local-ttl=60",
    ]
    .map(String::from)
    .to_vec();
    // It finds a link-local address's interface by itself, and takes none with it.
    let (plain, binding) = match addr.split_once('%') {
        Some((plain, _)) => (plain, "--bind-dynamic"),
        None => (addr, "--bind-interfaces"),
    };
    words.extend([format!("--listen-address={plain}"), binding.to_owned()]);
    words.push(format!("--pid-file={}", dir.join(format!("dnsmasq-{addr}.pid")).display()));
    words.push(format!("--local=/{DOMAIN}/"));
    words.push(format!("--host-record=www.{DOMAIN},{www},2001:db8::2"));
    words.push(format!("--cname=alias.{DOMAIN},www.{DOMAIN}"));
    words.push(format!("--mx-host={DOMAIN},mail.{DOMAIN},10"));
    words.push(format!("--txt-record={DOMAIN},v=spf1 -all,second string"));
    words.push(format!("--srv-host=_sip._tcp.{DOMAIN},sip.{DOMAIN},5060,1,2"));
    words.push(format!("--dns-rr={DOMAIN},65,{}", HTTPS_RDATA.replace(' ', "")));
    for index in 0..12 {
        let text: String = format!("{index:02} ").chars().chain(std::iter::repeat('x')).take(250).collect();
        words.push(format!("--txt-record={BIG_TXT_NAME},{text}"));
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = world.spawn(&words)?;
    let deadline = Instant::now() + SHORT;
    let ask = ["dig", "+short", "+time=1", "+tries=1", &format!("@{addr}"), &format!("www.{DOMAIN}")];
    loop {
        let answer = world.run_any(&ask, SHORT)?;
        if answer.stdout.contains(&www.to_string()) {
            return Ok(server);
        }
        if Instant::now() > deadline {
            return Err(LabError::Timeout(SHORT, format!("dnsmasq: {}", server.errors().join("\n"))));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
