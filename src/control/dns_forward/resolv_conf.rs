//! `resolv.conf`: what the host's resolver is told, as far as a forwarder obeys it.
//!
//! Obeyed are `nameserver`, `search` and `domain` (the last of them counts), and of `options` `timeout`,
//! `attempts` and `rotate`. The others concern who asks by a short name (`ndots`), which is the guest, or
//! how the C library speaks (`edns0`, `use-vc`). What cannot be read is passed over, as the C library does.
//!
//! Read first: resolv.conf(5).

use std::fs;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::time::Duration;

use crate::limits;
use crate::service::dns::DNS_PORT;

/// How long one resolver has to answer where the file does not say: less than the C library's five
/// seconds, so that a second one is asked before the guest's own resolver has given up.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may have, in seconds.
const TIMEOUT_MAX_S: u64 = 5;
/// How often a silent one is asked where the file does not say (`RES_DFLRETRY` of the C library).
const ATTEMPTS: u32 = 2;
/// How often it may be asked (`RES_MAXRETRY`).
const ATTEMPTS_MAX: u32 = 5;

/// The settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ResolvConf {
    /// The first [`limits::DNS_UPSTREAMS_MAX`] resolvers, in order, each once.
    pub(super) servers: Vec<SocketAddr>,
    /// How long each has to answer.
    pub(super) timeout: Duration,
    /// How often silent ones are asked.
    pub(super) attempts: u32,
    /// Whether questions are spread over all of them.
    pub(super) rotate: bool,
    /// Domains in which short names are looked for: lower case, no trailing dot, the first
    /// [`limits::DNS_SEARCH_DOMAINS_MAX`].
    pub(super) search: Vec<String>,
}

impl Default for ResolvConf {
    fn default() -> ResolvConf {
        ResolvConf {
            servers: Vec::new(),
            timeout: TIMEOUT,
            attempts: ATTEMPTS,
            rotate: false,
            search: Vec::new(),
        }
    }
}

impl ResolvConf {
    /// Reads the file's text.
    pub(super) fn parse(text: &str) -> ResolvConf {
        let mut conf = ResolvConf::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => conf.add_server(words.next()),
                Some("search") => conf.search = domains(words),
                Some("domain") => conf.search = domains(words.take(1)),
                Some("options") => words.for_each(|word| conf.add_option(word)),
                _ => {}
            }
        }
        conf
    }

    fn add_server(&mut self, text: Option<&str>) {
        if let Some(addr) = text.and_then(server)
            && self.servers.len() < limits::DNS_UPSTREAMS_MAX
            && !self.servers.contains(&addr)
        {
            self.servers.push(addr);
        }
    }

    fn add_option(&mut self, word: &str) {
        match word.split_once(':') {
            None if word == "rotate" => self.rotate = true,
            Some(("timeout", seconds)) => {
                if let Ok(seconds) = seconds.parse::<u64>() {
                    self.timeout = Duration::from_secs(seconds.clamp(1, TIMEOUT_MAX_S));
                }
            }
            Some(("attempts", count)) => {
                if let Ok(count) = count.parse::<u32>() {
                    self.attempts = count.clamp(1, ATTEMPTS_MAX);
                }
            }
            _ => {}
        }
    }
}

/// The names among `words` that a guest can be given; the root is where every name is looked for anyway.
fn domains<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for word in words {
        let name = word.strip_suffix('.').unwrap_or(word).to_ascii_lowercase();
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        let fits = name.len() <= 253 && name.split('.').all(is_label);
        if fits && !found.contains(&name) && found.len() < limits::DNS_SEARCH_DOMAINS_MAX {
            found.push(name);
        }
    }
    found
}

/// An address, with a scope if it is a link-local one of IPv6 (`fe80::1%eth0`).
fn server(text: &str) -> Option<SocketAddr> {
    match text.split_once('%') {
        None => text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DNS_PORT)),
        Some((ip, scope)) => {
            let ip: Ipv6Addr = ip.parse().ok()?;
            Some(SocketAddrV6::new(ip, DNS_PORT, 0, interface_index(scope)?).into())
        }
    }
}

fn interface_index(scope: &str) -> Option<u32> {
    if let Ok(index) = scope.parse() {
        return Some(index);
    }
    if scope.contains('/') || scope.starts_with('.') {
        return None;
    }
    fs::read_to_string(Path::new("/sys/class/net").join(scope).join("ifindex")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addrs(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn nameserver_lines_are_read_and_everything_else_passed_over() {
        let text = "# by hand\n; also\nsearch example.org\nnameserver 192.0.2.1\n\tnameserver\t2001:db8::1 # v6\n\
                    nameserver\nnameservers 192.0.2.9\nnameserver example.org\noptions edns0\nnameserver 127.0.0.53\n\
                    nameserver 192.0.2.1\n";
        let conf = ResolvConf::parse(text);
        assert_eq!(conf.servers, addrs(&["192.0.2.1:53", "[2001:db8::1]:53", "127.0.0.53:53"]));
        assert_eq!(conf.search, ["example.org"]);
        assert_eq!((conf.timeout, conf.attempts, conf.rotate), (TIMEOUT, ATTEMPTS, false));
    }

    #[test]
    fn as_many_as_are_tried_are_read() {
        let text: String = (1..=5).map(|n| format!("nameserver 192.0.2.{n}\n")).collect();
        assert_eq!(ResolvConf::parse(&text).servers.len(), limits::DNS_UPSTREAMS_MAX);
    }

    #[test]
    fn options_are_obeyed_within_bounds() {
        let options = |text: &str| {
            let conf = ResolvConf::parse(&format!("options {text}\n"));
            (conf.timeout.as_secs(), conf.attempts, conf.rotate)
        };
        assert_eq!(options("timeout:1 attempts:4 rotate"), (1, 4, true));
        assert_eq!(options("timeout:0 attempts:0"), (1, 1, false));
        assert_eq!(options("timeout:3600 attempts:99"), (5, 5, false));
        assert_eq!(options("timeout attempts: timeout:x ndots:5 rotated"), (2, 2, false));
    }

    #[test]
    fn the_last_search_or_domain_line_counts_and_names_are_judged() {
        let search = |text: &str| ResolvConf::parse(text).search;
        assert_eq!(
            search("domain one.example\nsearch Two.example. three.example\n"),
            ["two.example", "three.example"]
        );
        assert_eq!(search("search one.example\ndomain two.example three.example\n"), ["two.example"]);
        let label = "x".repeat(64);
        let bad = format!("search . a..b a/b {label}.example b.example b.example c_d.example\n");
        assert_eq!(search(&bad), ["b.example", "c_d.example"]);
        let many: String = (0..100).map(|n| format!(" d{n}.example")).collect();
        assert_eq!(search(&format!("search{many}\n")).len(), limits::DNS_SEARCH_DOMAINS_MAX);
    }

    #[test]
    fn link_local_address_has_its_scope() {
        assert_eq!(server("fe80::1%7"), Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 7).into()));
        assert_eq!(
            server("fe80::1%lo"),
            Some(SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, 1).into())
        );
        assert_eq!(server("fe80::1%../lo"), None);
        assert_eq!(server("fe80::1%nosuch"), None);
    }
}
