//! Addresses kept for one client, whether it is there or not.

use std::fmt;
use std::net::Ipv4Addr;

use rusqlite::{Connection, OptionalExtension as _, Row as SqlRow, params};

use super::pool::{free_name, ip_at, number};
use super::{LeaseStore, StoreError};
use crate::addr::MacAddr;
use crate::network::allocator::Client;
use crate::network::name::is_label;
use crate::time::Instant;

/// Whom an address is kept for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// The card with this hardware address.
    Mac(MacAddr),
    /// The client that sends this identifier (option 61, RFC 2132, 9.14; 1 to 255 bytes), from whatever card.
    ClientId(Vec<u8>),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Mac(mac) => mac.fmt(f),
            Who::ClientId(id) => {
                f.write_str("id:")?;
                id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// An address kept for one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The address.
    pub ip: Ipv4Addr,
    /// Whose it is.
    pub who: Who,
    /// The client's name, whatever it calls itself: one lower-case label that no other guest may have.
    pub host_name: Option<String>,
}

impl Reservation {
    /// Whether `client` is the one.
    pub(super) fn is_for(&self, client: &Client<'_>) -> bool {
        match &self.who {
            Who::Mac(mac) => *mac == client.mac,
            Who::ClientId(id) => client.id == Some(id.as_slice()),
        }
    }

    fn read(row: &SqlRow<'_>) -> rusqlite::Result<Reservation> {
        let mac: Option<[u8; 6]> = row.get(1)?;
        let who = match mac {
            Some(mac) => Who::Mac(MacAddr(mac)),
            None => Who::ClientId(row.get(2)?),
        };
        Ok(Reservation { ip: ip_at(row, 0)?, who, host_name: row.get(3)? })
    }
}

const SELECT: &str = "SELECT ip, mac, client_id, host_name FROM reservation";

/// What is kept for `client`; an identifier says more than a card.
pub(super) fn of(connection: &Connection, client: &Client<'_>) -> rusqlite::Result<Option<Reservation>> {
    let sql = format!("{SELECT} WHERE client_id = ?1 OR mac = ?2 ORDER BY client_id IS NULL LIMIT 1");
    let values = params![client.id, client.mac.0];
    connection.prepare_cached(&sql)?.query_row(values, Reservation::read).optional()
}

/// For whom `ip` is kept.
pub(super) fn at(connection: &Connection, ip: Ipv4Addr) -> rusqlite::Result<Option<Reservation>> {
    let sql = format!("{SELECT} WHERE ip = ?1");
    connection.prepare_cached(&sql)?.query_row([number(ip)], Reservation::read).optional()
}

/// Whether `name` is kept for some client.
pub(super) fn names(connection: &Connection, name: &str) -> rusqlite::Result<bool> {
    connection.prepare_cached("SELECT 1 FROM reservation WHERE host_name = ?1")?.exists([name])
}

impl LeaseStore {
    /// Keeps an address for one client from now on, in place of what was kept for it before. Who holds the
    /// address keeps it until its lease ends, and the client gets another meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Reservation`] if the address is none of the pool or kept for another, or the name cannot
    /// be had.
    pub fn reserve(&mut self, now: Instant, wish: &Reservation) -> Result<(), StoreError> {
        let refused = |why: String| Err(StoreError::Reservation { ip: wish.ip, why });
        if !self.pool.contains(wish.ip) {
            let (subnet, gateway) = (self.pool.subnet, self.pool.gateway);
            return refused(format!(
                "not a guest's address in {subnet} with gateway {gateway}; give another"
            ));
        }
        if let Who::ClientId(id) = &wish.who
            && !(1..=255).contains(&id.len())
        {
            return refused("a client identifier has 1 to 255 bytes".to_owned());
        }
        if let Some(name) = &wish.host_name
            && (!is_label(name.as_bytes()) || !self.pool.name_is_free(name))
        {
            return refused(format!("{name:?} is no name a guest can have; give another"));
        }
        let (mac, id) = match &wish.who {
            Who::Mac(mac) => (Some(mac.0), None),
            Who::ClientId(id) => (None, Some(id)),
        };
        let other = self.write(now, |ledger| {
            let tx = ledger.tx;
            let sql = format!(
                "{SELECT} WHERE (ip = ?1 OR host_name = ?2) \
                 AND NOT coalesce(mac = ?3, false) AND NOT coalesce(client_id = ?4, false)"
            );
            let values = params![number(wish.ip), wish.host_name, mac, id];
            let other = tx.query_row(&sql, values, Reservation::read).optional()?;
            if other.is_none() {
                tx.execute("DELETE FROM reservation WHERE mac = ?1 OR client_id = ?2", params![mac, id])?;
                let values = params![number(wish.ip), mac, id, wish.host_name];
                tx.execute("INSERT INTO reservation VALUES(?1, ?2, ?3, ?4)", values)?;
                free_name(tx, wish)?;
            }
            Ok(other)
        })?;
        match other {
            None => Ok(()),
            Some(other) if other.ip == wish.ip => {
                refused(format!("it is kept for {}; remove that first", other.who))
            }
            Some(other) => refused(format!("its name is that of {} already; give another", other.ip)),
        }
    }

    /// Keeps `ip` for nobody any more. False if it was not kept.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn unreserve(&mut self, now: Instant, ip: Ipv4Addr) -> Result<bool, StoreError> {
        self.write(now, |ledger| {
            Ok(ledger.tx.execute("DELETE FROM reservation WHERE ip = ?1", [number(ip)])? == 1)
        })
    }

    /// What is kept, by address.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn reservations(&mut self) -> Result<Vec<Reservation>, StoreError> {
        let all = |connection: &Connection| -> rusqlite::Result<Vec<Reservation>> {
            let sql = format!("{SELECT} ORDER BY ip");
            connection.prepare_cached(&sql)?.query_map([], Reservation::read)?.collect()
        };
        all(&self.file.connection).map_err(|error| StoreError::of(&self.file.path, error))
    }
}
