//! What was configured, as the status shows it.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::config::{Config, LinkConfig, LinkSource, Mode};

/// The network a process gives its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Facts {
    /// `nat`, `bridge` or `isolated`.
    pub mode: String,
    /// Where frames leave, as `--uplink` has it.
    pub uplink: String,
    /// `sockets`, `packet`, `kernel` or `holder` (by the sockets of the rootless network's holder): how nat mode translates; none in
    /// other modes.
    pub nat: Option<String>,
    /// The named network.
    pub network: Option<String>,
    /// The guest's subnet, with prefix.
    pub subnet: String,
    /// Address of router, DHCP and DNS server; none on a bridge of the host's.
    #[schema(value_type = Option<String>, format = Ipv4)]
    pub gateway: Option<Ipv4Addr>,
    /// Largest IP packet on the guest's link, in bytes.
    pub ip_mtu_bytes: u16,
    /// MAC address offered to the front-end.
    pub mac: Option<String>,
    /// Queue pairs, each with a worker.
    pub queue_pairs: u8,
}

impl Facts {
    /// On a named network without privilege, it is not the kernel that translates.
    pub fn translates_at_holder(&mut self, is_rootless: bool) {
        if is_rootless && self.nat.is_some() {
            self.nat = Some("holder".to_owned());
        }
    }

    /// Those of `config`.
    pub fn of(config: &Config) -> Facts {
        let translates = config.link.as_ref().is_some_and(|link| link.translate.is_some());
        let is_nat = matches!(config.mode, Mode::Nat(_));
        let of_network = config.network.is_some();
        let is_bridged = config.link.is_some() && !translates && !of_network;
        let mode = match () {
            () if is_bridged => "bridge",
            () if is_nat => "nat",
            () => "isolated",
        };
        let nat = match () {
            () if translates => Some("packet"),
            () if !is_nat || is_bridged => None,
            () if of_network => Some("kernel"),
            () => Some("sockets"),
        };
        Facts {
            mode: mode.to_owned(),
            uplink: config.link.as_ref().map_or_else(|| "sockets".to_owned(), uplink),
            nat: nat.map(str::to_owned),
            network: config.network.as_ref().map(|network| network.name.to_string()),
            subnet: config.lan.subnet.to_string(),
            gateway: (!is_bridged).then_some(config.lan.gateway),
            ip_mtu_bytes: config.lan.ip_mtu.get(),
            mac: config.mac.map(|mac| mac.to_string()),
            queue_pairs: config.workers.queue_pairs,
        }
    }
}

fn uplink(link: &LinkConfig) -> String {
    match &link.source {
        LinkSource::Tap(None) => "tap".to_owned(),
        LinkSource::Tap(Some(name)) => format!("tap={name}"),
        LinkSource::Inherited(queues) => format!("tap-fd ({} queues)", queues.len()),
        LinkSource::Bridge(name) => format!("bridge={name}"),
        LinkSource::MacVtap(name) => format!("macvtap={name}"),
    }
}
