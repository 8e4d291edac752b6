//! Leases and reservations of a named network, as `vunet network` makes and shows them.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::values::{self, ValueError};
use crate::network::allocator::{IpAllocator as _, Lease};
use crate::network::clock::SystemClock;
use crate::network::definition::OwnLan;
use crate::network::name::is_label;
use crate::network::store::{FILE_NAME, LeaseStore, Pool, Reservation, StoreError, Who};
use crate::time::Instant;

/// Reads `WHO=IP[,NAME]`, where WHO is a MAC address or `id:` and the octets of a client identifier.
pub(super) fn reservation(text: &str) -> Result<Reservation, ValueError> {
    let (who, rest) = text.split_once('=').ok_or(ValueError::ReservationForm)?;
    let (ip, name) = rest.split_once(',').map_or((rest, None), |(ip, name)| (ip, Some(name)));
    let who = match who.strip_prefix("id:") {
        Some(id) => Who::ClientId(octets(id).ok_or(ValueError::ReservationForm)?),
        None => Who::Mac(values::guest_mac(who)?),
    };
    let host_name = name.map(str::to_ascii_lowercase);
    if host_name.as_ref().is_some_and(|name| !is_label(name.as_bytes())) {
        return Err(ValueError::ReservationForm);
    }
    Ok(Reservation { ip: ip.parse().map_err(|_| ValueError::ReservationForm)?, who, host_name })
}

/// Octets in hexadecimal, with or without colons between them.
fn octets(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != ':')
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    let whole = pairs.remainder().is_empty() && (1..=255).contains(&pairs.len());
    whole.then(|| pairs.map(|pair| pair[0] << 4 | pair[1]).collect())
}

/// The store in `folder` of a network with the addresses of `lan`.
fn open(folder: &Path, lan: &OwnLan) -> Result<LeaseStore, StoreError> {
    let other =
        |source: std::io::Error| StoreError::Other { path: folder.join(FILE_NAME), source: source.into() };
    let clock = Arc::new(SystemClock::new().map_err(other)?);
    // Holds nothing itself.
    LeaseStore::open(folder, Pool::new(lan.subnet, lan.gateway), clock, 0)
}

/// Keeps the addresses of `wishes` in the network in `folder`; all of them, or says why not.
pub(super) fn reserve(folder: &Path, lan: &OwnLan, wishes: &[Reservation]) -> Result<(), StoreError> {
    if wishes.is_empty() {
        return Ok(());
    }
    let mut store = open(folder, lan)?;
    wishes.iter().try_for_each(|wish| store.reserve(Instant::ZERO, wish))
}

/// An address that is kept for a client.
#[derive(Debug, Serialize)]
pub(super) struct ReservationReport {
    pub(super) ip: Ipv4Addr,
    pub(super) client: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) host_name: Option<String>,
}

/// An address that a guest holds.
#[derive(Debug, Serialize)]
pub(super) struct LeaseReport {
    pub(super) ip: Ipv4Addr,
    pub(super) mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) host_name: Option<String>,
    pub(super) seconds_left: u64,
}

/// What is kept and held in the network in `folder`; nothing if nobody used it yet.
pub(super) fn report(
    folder: &Path,
    lan: &OwnLan,
) -> Result<(Vec<ReservationReport>, Vec<LeaseReport>), StoreError> {
    if !folder.join(FILE_NAME).exists() {
        return Ok((Vec::new(), Vec::new()));
    }
    let mut store = open(folder, lan)?;
    let kept = store.reservations()?.into_iter().map(|kept| ReservationReport {
        ip: kept.ip,
        client: kept.who.to_string(),
        host_name: kept.host_name,
    });
    // Far from the start, so that no lease that ended is before it.
    let now = Instant::ZERO + Duration::from_secs(1 << 40);
    let held = store.leases(now)?;
    let held = held.into_iter().filter(|lease| lease.is_active(now)).map(|lease| lease_report(lease, now));
    Ok((kept.collect(), held.collect()))
}

fn lease_report(lease: Lease, now: Instant) -> LeaseReport {
    let seconds_left = lease.until.map_or(0, |until| until.since(now).as_secs());
    LeaseReport { ip: lease.ip, mac: lease.mac.to_string(), host_name: lease.host_name, seconds_left }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::MacAddr;

    #[test]
    fn a_reservation_names_a_card_or_a_client_identifier_an_address_and_perhaps_a_name() {
        let ip = Ipv4Addr::new(10, 0, 2, 9);
        let card = Who::Mac(MacAddr([0x52, 0x54, 0, 0, 0, 1]));
        let read = |text| reservation(text).unwrap();
        let expected = Reservation { ip, who: card, host_name: None };
        assert_eq!(read("52:54:00:00:00:01=10.0.2.9"), expected);
        let expected = Reservation { host_name: Some("db-1".to_owned()), ..expected };
        assert_eq!(read("52:54:00:00:00:01=10.0.2.9,DB-1"), expected);
        let who = Who::ClientId(vec![0xff, 0, 0x1a]);
        for text in ["id:ff001a=10.0.2.9", "id:ff:00:1a=10.0.2.9"] {
            assert_eq!(read(text), Reservation { ip, who: who.clone(), host_name: None });
        }
        for bad in [
            "",
            "=",
            "10.0.2.9",
            "52:54:00:00:00:01",
            "52:54:00:00:00:01=",
            "52:54:00:00:00:01=10.0.2",
            "52:54:00:00:00:01=10.0.2.9,",
            "52:54:00:00:00:01=10.0.2.9,a.b",
            "id:=10.0.2.9",
            "id:f=10.0.2.9",
            "id:zz=10.0.2.9",
            "53:54:00:00:00:01=10.0.2.9",
        ] {
            assert!(reservation(bad).is_err(), "{bad}");
        }
        assert!(reservation(&format!("id:{}=10.0.2.9", "00".repeat(255))).is_ok());
        assert!(reservation(&format!("id:{}=10.0.2.9", "00".repeat(256))).is_err());
    }
}
