//! A LAN instead of a routed link: the host's link is a port of a bridge, and the world has a DHCP server
//! for whoever is on it.
//!
//! ```text
//!  guest -- front-end ~~ vhost-user ~~ vunet -- TAP -- br0 -- p0 --- veth --- e0 (DHCP server, router)
//!                                                   192.0.2.1/24           192.0.2.2/24
//! ```

use std::net::Ipv4Addr;
use std::path::Path;

use super::{GuestProcess, HOST, Lab, LabError, Netns, Process, SHORT, WORLD};

/// The bridge in the host's namespace.
pub const BRIDGE: &str = "br0";
/// First and last address the LAN's DHCP server leases.
pub const LAN_POOL: (Ipv4Addr, Ipv4Addr) = (Ipv4Addr::new(192, 0, 2, 100), Ipv4Addr::new(192, 0, 2, 150));
/// The domain it tells.
pub const LAN_DOMAIN: &str = "lan.test";

/// dnsmasq as a DHCP server on one interface, without names.
fn start_dhcp(netns: &Netns, dir: &Path, interface: &str) -> Result<Process, LabError> {
    let path = |name: &str| dir.join(format!("dhcp-{interface}.{name}")).display().to_string();
    let (first, last) = LAN_POOL;
    let words = [
        "dnsmasq".to_owned(),
        "--keep-in-foreground".to_owned(),
        "--conf-file=/dev/null".to_owned(),
        "--user=root".to_owned(),
        "--port=0".to_owned(),
        "--no-ping".to_owned(),
        "--dhcp-authoritative".to_owned(),
        "--log-facility=-".to_owned(),
        "--log-dhcp".to_owned(),
        format!("--interface={interface}"),
        format!("--dhcp-range={first},{last},3600"),
        format!("--dhcp-option=option:router,{WORLD}"),
        format!("--domain={LAN_DOMAIN}"),
        format!("--dhcp-leasefile={}", path("leases")),
        format!("--pid-file={}", path("pid")),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let server = netns.spawn(&words)?;
    server.wait_error(SHORT, "the LAN's DHCP server", |line| line.contains("DHCP, IP range"))?;
    Ok(server)
}

/// The host's own address where vunet holds [`HOST`] itself ([`Lab::make_outside`]).
pub const HOST_BESIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 3);

impl Lab {
    /// Makes a link on which vunet can hold [`HOST`] itself, as it does when it translates packets: the host's
    /// link is a port of [`BRIDGE`], and the host is [`HOST_BESIDE`] there.
    ///
    /// # Errors
    /// If a link cannot be had.
    pub fn make_outside(&self) -> Result<(), LabError> {
        self.make_bridge(HOST_BESIDE)
    }

    /// Makes the LAN: [`BRIDGE`] with the host's link on it and the host's address, and the DHCP server.
    ///
    /// # Errors
    /// If a link or the server cannot be had.
    pub fn make_lan(&mut self) -> Result<(), LabError> {
        self.make_bridge(HOST)?;
        self.start_lan_dhcp()
    }

    /// Makes [`BRIDGE`] with the host's link on it and an address of the host's.
    ///
    /// # Errors
    /// If a link cannot be had.
    pub fn make_bridge(&self, host: Ipv4Addr) -> Result<(), LabError> {
        for words in [
            &format!("link add {BRIDGE} type bridge"),
            &format!("link set {BRIDGE} up"),
            &format!("addr del {HOST}/24 dev p0"),
            &format!("link set p0 master {BRIDGE}"),
            &format!("addr add {host}/24 dev {BRIDGE}"),
            &format!("route replace default via {WORLD}"),
        ] {
            self.ip(&self.host, words)?;
        }
        Ok(())
    }

    /// Starts the LAN's DHCP server in the world.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_lan_dhcp(&mut self) -> Result<(), LabError> {
        let server = start_dhcp(&self.world, self.dir.path(), "e0")?;
        self.servers.push(server);
        Ok(())
    }

    /// What `ip` shows of the ports of [`BRIDGE`], a line each.
    ///
    /// # Errors
    /// If it fails.
    pub fn bridge_ports(&self) -> Result<Vec<String>, LabError> {
        let words = ["ip", "-o", "link", "show", "master", BRIDGE];
        let shown = self.host.run(&words, SHORT)?.stdout;
        let name = |line: &str| {
            let name = line.split(": ").nth(1).unwrap_or_default();
            name.split('@').next().unwrap_or_default().to_owned()
        };
        Ok(shown.lines().map(name).collect())
    }

    /// Attaches a namespace guest in `netns` to `socket`, as [`Lab::attach`] does in the lab's own.
    ///
    /// # Errors
    /// If it fails or does not get ready.
    pub fn attach_in(&self, netns: &Netns, socket: &Path, args: &[&str]) -> Result<GuestProcess, LabError> {
        let guest = self.start_guest_in(netns, socket, args)?;
        guest.when_ready()
    }
}
