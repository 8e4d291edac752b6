//! What a packet NAT needs to know at its start.

use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::tcp_state::TcpTimeouts;
use crate::addr::Ipv4Subnet;
use crate::config::{self, IpMtu, TranslateConfig, UdpConfig};
use crate::engine::placement::WorkerId;
use crate::limits;

/// A port of the outside address that leads to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedPort {
    /// Transport protocol.
    pub protocol: config::Protocol,
    /// The port outside.
    pub port: u16,
    /// The guest it leads to.
    pub guest: Ipv4Addr,
    /// The guest's port.
    pub guest_port: u16,
}

/// How long flows live without packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Of TCP.
    pub tcp: TcpTimeouts,
    /// Of UDP that was answered.
    pub udp: Duration,
    /// Of UDP that was not yet.
    pub udp_unanswered: Duration,
    /// Of UDP to port 53: a question and its answer.
    pub dns: Duration,
    /// Of ICMP questions.
    pub icmp: Duration,
    /// Of protocols known by their addresses only.
    pub other: Duration,
}

impl Default for Timeouts {
    /// RFC 4787, REQ-5: 5 minutes recommended, 2 at least, less for some well-known ports. RFC 5508, REQ-2: a minute
    /// at least. Tunnels keep themselves alive within ten minutes, if at all.
    fn default() -> Timeouts {
        Timeouts {
            tcp: TcpTimeouts::default(),
            udp: Duration::from_secs(300),
            udp_unanswered: Duration::from_secs(120),
            dns: Duration::from_secs(30),
            icmp: Duration::from_secs(60),
            other: Duration::from_secs(600),
        }
    }
}

/// Settings of one worker's packet NAT.
#[derive(Clone, Debug)]
pub struct PacketNatConfig {
    /// The guests' subnet, hidden behind `outside`.
    pub subnet: Ipv4Subnet,
    /// vunet's address there.
    pub gateway: Ipv4Addr,
    /// The address outside; none while there is no lease.
    pub outside: Option<Ipv4Addr>,
    /// IP MTU towards the guest, in bytes.
    pub guest_ip_mtu: u16,
    /// IP MTU of the link outside, in bytes.
    pub outside_ip_mtu: u16,
    /// Ports and ICMP identifiers flows get outside.
    pub ports: RangeInclusive<u16>,
    /// Most flows at once.
    pub flows_max: usize,
    /// Most flows of one guest address.
    pub guest_flows_max: usize,
    /// How UDP is translated.
    pub udp: UdpConfig,
    /// Whether TCP segments outside of the windows pass.
    pub liberal: bool,
    /// How long flows live.
    pub timeouts: Timeouts,
    /// Ports that lead to guests.
    pub published: Vec<PublishedPort>,
    /// This worker.
    pub worker: WorkerId,
    /// From the operating system's randomness: keys indices and chooses ports.
    pub seed: (u64, u64),
}

impl PacketNatConfig {
    /// The defaults for the guests of `subnet`: Ethernet's MTU, the dynamic ports, one worker, no address outside yet.
    pub fn new(subnet: Ipv4Subnet, gateway: Ipv4Addr, seed: (u64, u64)) -> PacketNatConfig {
        PacketNatConfig {
            subnet,
            gateway,
            outside: None,
            guest_ip_mtu: IpMtu::DEFAULT.get(),
            outside_ip_mtu: IpMtu::DEFAULT.get(),
            ports: TranslateConfig::DEFAULT_PORTS,
            flows_max: limits::PACKET_FLOWS_MAX,
            guest_flows_max: limits::PACKET_FLOWS_MAX,
            udp: UdpConfig::default(),
            liberal: false,
            timeouts: Timeouts::default(),
            published: Vec::new(),
            worker: WorkerId(0),
            seed,
        }
    }
}
