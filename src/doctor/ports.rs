//! Ports of the host that are to lead to the guest, each bound for a moment and let go.
//!
//! Read first: `ip_unprivileged_port_start` in `Documentation/networking/ip-sysctl.rst` of Linux.

use std::io;
use std::net::{SocketAddr, TcpListener};

use super::check::{Check, Fix};
use super::facts::Facts;
use super::way::Asked;
use crate::config::{Protocol, Publish};
use crate::uplink::published::try_bind;

/// Ports that are named.
const NAMED_MAX: usize = 4;

/// A port that cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// Whether it is UDP, else TCP.
    pub(super) udp: bool,
    /// Where.
    pub(super) host: SocketAddr,
    /// Why not.
    pub(super) why: io::ErrorKind,
}

/// Those of `publish` that cannot be had.
pub(super) fn refused(publish: &[Publish]) -> Vec<Refused> {
    let refused = |port: &Publish| {
        let udp = port.protocol == Protocol::Udp;
        let error = try_bind(port).err()?;
        Some(Refused { udp, host: port.host, why: error.kind() })
    };
    publish.iter().filter_map(refused).collect()
}

/// Published ports.
pub(super) fn published(facts: &Facts, asked: &Asked) -> Option<Check> {
    const NAME: &str = "published ports";
    if asked.publish.is_empty() {
        return None;
    }
    let of = |why| facts.ports.iter().filter(move |port| port.why == why);
    if let Some(lowest) = of(io::ErrorKind::PermissionDenied).map(|port| port.host.port()).min() {
        let start = facts.unprivileged_port_start;
        let says = format!(
            "{} of this host: below net.ipv4.ip_unprivileged_port_start ({start}), and this process has no \
             CAP_NET_BIND_SERVICE",
            names(of(io::ErrorKind::PermissionDenied))
        );
        let setting = format!("net.ipv4.ip_unprivileged_port_start={lowest}");
        return Some(Check::missing(NAME, says, Fix::sysctl(&[&setting])));
    }
    if of(io::ErrorKind::AddrInUse).next().is_some() {
        let says = format!("{} of this host: somebody has it already", names(of(io::ErrorKind::AddrInUse)));
        let advice = "publish another, or end who has it (ss -Hlnp, as root, shows who)";
        return Some(Check::missing(NAME, says, Fix::advice(advice)));
    }
    if let Some(port) = facts.ports.first() {
        let says = format!("{} of this host: {}", names(facts.ports.iter()), port.why);
        return Some(Check::missing(
            NAME,
            says,
            Fix::advice("publish at an address that this host has (ip addr)"),
        ));
    }
    Some(Check::ok(NAME, format!("all {} can be had", asked.publish.len())))
}

/// Why nothing can listen at `address`.
pub(super) fn refused_listener(address: SocketAddr) -> Option<io::ErrorKind> {
    TcpListener::bind(address).err().map(|error| error.kind())
}

/// Where metrics are served.
pub(super) fn metrics(facts: &Facts, asked: &Asked) -> Option<Check> {
    const NAME: &str = "metrics";
    let address = asked.metrics?;
    Some(match facts.metrics {
        None => Check::ok(NAME, format!("{address} can be had")),
        Some(io::ErrorKind::AddrInUse) => Check::missing(
            NAME,
            format!("{address}: somebody listens there already"),
            Fix::advice(
                "give --metrics another port (0 picks one), or end who has it (ss -Hlntp, as root, shows who)",
            ),
        ),
        Some(io::ErrorKind::PermissionDenied) => Check::missing(
            NAME,
            format!(
                "{address}: below net.ipv4.ip_unprivileged_port_start ({})",
                facts.unprivileged_port_start
            ),
            Fix::advice("give --metrics a port above it"),
        ),
        Some(why) => Check::missing(
            NAME,
            format!("{address}: {why}"),
            Fix::advice("give --metrics an address that this host has (ip addr)"),
        ),
    })
}

fn names<'a>(ports: impl Iterator<Item = &'a Refused> + Clone) -> String {
    let name = |port: &Refused| format!("{} {}", if port.udp { "udp" } else { "tcp" }, port.host);
    let named: Vec<String> = ports.clone().take(NAMED_MAX).map(name).collect();
    match ports.count().saturating_sub(NAMED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::super::facts::tests::facts;
    use super::*;

    fn publish(host: SocketAddr, protocol: Protocol) -> Publish {
        Publish { protocol, host, guest_port: 1, interface: None }
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_refused_and_a_free_one_stays_free() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = (taken.local_addr().unwrap(), taken);
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp_addr = udp.local_addr().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let asked = [
            publish(taken.0, Protocol::Tcp),
            publish(udp_addr, Protocol::Udp),
            publish(free, Protocol::Tcp),
            publish("192.0.2.77:80".parse().unwrap(), Protocol::Udp),
        ];
        let found: Vec<_> = refused(&asked).iter().map(|port| (port.udp, port.host, port.why)).collect();
        assert_eq!(
            found[..2],
            [(false, taken.0, io::ErrorKind::AddrInUse), (true, udp_addr, io::ErrorKind::AddrInUse)]
        );
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(TcpListener::bind(free).is_ok(), "nothing holds it");
    }

    #[test]
    fn metrics_need_an_address_that_can_be_had() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let of = |address: SocketAddr| {
            let asked = Asked { metrics: Some(address), ..Asked::plain() };
            metrics(&Facts { metrics: refused_listener(address), ..facts() }, &asked).unwrap()
        };
        let address = taken.local_addr().unwrap();
        let check = of(address);
        assert!(check.state == State::Missing && check.says.contains("already"), "{}", check.says);
        drop(taken);
        assert_eq!(of(address).state, State::Ok);
        assert_eq!(of("198.18.77.1:5".parse().unwrap()).state, State::Missing);
        assert_eq!(metrics(&facts(), &Asked::plain()), None);
    }

    #[test]
    fn what_a_port_lacks_is_said_with_the_setting_that_allows_the_lowest() {
        let port = |port, why| Refused { udp: false, host: ([0, 0, 0, 0], port).into(), why };
        let asked =
            Asked { publish: vec![publish(([0, 0, 0, 0], 80).into(), Protocol::Tcp)], ..Asked::plain() };
        let of = |ports: Vec<Refused>| {
            published(&Facts { ports, unprivileged_port_start: 1024, ..facts() }, &asked).unwrap()
        };
        let low =
            of(vec![port(443, io::ErrorKind::PermissionDenied), port(80, io::ErrorKind::PermissionDenied)]);
        assert_eq!(low.state, State::Missing);
        assert!(
            low.says.contains("tcp 0.0.0.0:443, tcp 0.0.0.0:80") && low.says.contains("(1024)"),
            "{}",
            low.says
        );
        assert_eq!(low.fix.unwrap().line(true), "sysctl -w net.ipv4.ip_unprivileged_port_start=80");
        let taken = of((0..6).map(|n| port(8000 + n, io::ErrorKind::AddrInUse)).collect());
        assert!(taken.says.contains("8003 and 2 more"), "{}", taken.says);
        assert_eq!(of(vec![port(1, io::ErrorKind::AddrNotAvailable)]).state, State::Missing);
        assert_eq!(of(Vec::new()).state, State::Ok);
        assert_eq!(published(&facts(), &Asked::plain()), None);
    }
}
