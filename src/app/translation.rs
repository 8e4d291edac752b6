//! What translation of packets onto a link needs: the station that holds the address there, and each worker's
//! flows.

use std::sync::{Arc, Mutex};

use super::{Error, random_pair, starting};
use crate::addr::MacAddr;
use crate::config::{Lan, TranslateConfig};
use crate::engine::packet::PacketNat;
use crate::engine::packet::config::PacketNatConfig;
use crate::engine::packet::ports::Mappings;
use crate::engine::placement::WorkerId;
use crate::engine::station::{Station, StationConfig};
use crate::limits;
use crate::random;
use crate::time::Instant;
use crate::worker::{SharedStation, TranslationParts};

/// Gives the station a MAC address if it was told none.
pub(super) fn settle_mac(config: &mut TranslateConfig) -> Result<MacAddr, Error> {
    if let Some(mac) = config.mac {
        return Ok(mac);
    }
    let [a, b, c, d, e, ..] = random::bits64().map_err(starting("random bytes"))?.to_ne_bytes();
    let mac = MacAddr([0x02, a, b, c, d, e]);
    config.mac = Some(mac);
    Ok(mac)
}

/// The parts of `workers` workers, as of the beginning of time.
pub(super) fn parts(
    config: &TranslateConfig,
    lan: &Lan,
    workers: usize,
) -> Result<Vec<TranslationParts>, Error> {
    let mac = config.mac.unwrap_or(MacAddr::ZERO);
    let (seed, _) = random_pair()?;
    let station = StationConfig { mac, address: config.address, guests: lan.subnet, seed };
    let station = Arc::new(SharedStation::new(Station::new(Instant::ZERO, station)));
    let mappings = Arc::new(Mutex::new(Mappings::new(config.ports.clone(), random_pair()?)));
    let flows_max = limits::PACKET_FLOWS_MAX / workers.max(1);
    (0u8..)
        .take(workers)
        .map(|worker| {
            let nat = PacketNatConfig {
                guest_ip_mtu: lan.ip_mtu.get(),
                outside_ip_mtu: lan.ip_mtu.get(),
                ports: config.ports.clone(),
                flows_max,
                guest_flows_max: flows_max - flows_max / 4,
                udp: config.udp,
                worker: WorkerId(worker),
                ..PacketNatConfig::new(lan.subnet, lan.gateway, random_pair()?)
            };
            let nat = PacketNat::new(nat, Arc::clone(&mappings), Instant::ZERO).map_err(Error::Flows)?;
            Ok(TranslationParts {
                nat,
                worker: WorkerId(worker),
                station: Arc::clone(&station),
                guests: lan.subnet,
                publish: config.publish.clone(),
            })
        })
        .collect()
}
