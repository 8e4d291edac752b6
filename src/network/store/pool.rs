//! Who gets which address, decided within one transaction: nothing changes meanwhile.
//!
//! The rules are those of [`crate::network::leases`], and a random test holds the two against each other; what
//! is more here is what a shared network needs (see [`super`]).

use std::net::Ipv4Addr;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension as _, Row as SqlRow, Transaction, params};

use super::processes::{ENDED_US, LIVES, keeps};
use super::reservations::{self, Reservation};
use super::{Pool, micros};
use crate::addr::MacAddr;
use crate::limits;
use crate::network::allocator::{
    Bind, BindRefusal, Client, DECLINE_HOLD, Grant, LEASE_TIME, OFFER_HOLD, OFFER_HOLD_MIN, RESTART_HOLD,
    Refusal,
};
use crate::network::clock::Moment;

type Result<T> = rusqlite::Result<T>;

const COLUMNS: &str = "ip, mac, offered_us, until_us, host_name, holder";

/// Whether a row is held at `?1`; `?2` is the latest time an offer can be from and have run out.
fn held() -> String {
    format!("(coalesce(until_us > ?1, false) AND {} OR coalesce(offered_us > ?2, false))", keeps("?1"))
}

/// One address and who has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) ip: Ipv4Addr,
    pub(super) mac: MacAddr,
    offered_us: Option<i64>,
    pub(super) until_us: Option<i64>,
    pub(super) host_name: Option<String>,
    holder: i64,
    /// When the process it belongs to was found gone.
    ended_us: Option<i64>,
    /// Whether that process noted itself and was not found gone.
    lives: bool,
}

impl Row {
    /// The rows of all leases, to be narrowed by what follows.
    fn select() -> String {
        format!("SELECT {COLUMNS}, {ENDED_US}, {LIVES} FROM lease")
    }

    /// Whether its process is gone, but its lease would run on.
    pub(super) fn is_let_go(&self, now: Moment) -> bool {
        self.ended_us.is_some() && self.until_us.is_some_and(|until| until > now.boottime_us)
    }

    /// Whether it belongs to another process than `holder`, which lives.
    pub(super) fn is_of_another(&self, holder: i64) -> bool {
        self.lives && self.holder != holder
    }

    /// When its lease ends or ended, at the latest with its process.
    pub(super) fn end_us(&self) -> Option<i64> {
        let until = self.until_us?;
        Some(self.ended_us.map_or(until, |ended| until.min(ended)))
    }

    fn read(row: &SqlRow<'_>) -> Result<Row> {
        Ok(Row {
            ip: ip_at(row, 0)?,
            mac: MacAddr(row.get(1)?),
            offered_us: row.get(2)?,
            until_us: row.get(3)?,
            host_name: row.get(4)?,
            holder: row.get(5)?,
            ended_us: row.get(6)?,
            lives: row.get(7)?,
        })
    }
}

/// An address as the store keeps it: its 32 bits as a number, so that order is the addresses' order.
pub(super) fn number(ip: Ipv4Addr) -> i64 {
    ip.to_bits().into()
}

/// The address in column `at`.
pub(super) fn ip_at(row: &SqlRow<'_>, at: usize) -> Result<Ipv4Addr> {
    let number: i64 = row.get(at)?;
    let bits = u32::try_from(number)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(at, Type::Integer, Box::new(error)))?;
    Ok(Ipv4Addr::from_bits(bits))
}

/// What is known of `mac`.
pub(super) fn row_of(connection: &Connection, mac: MacAddr) -> Result<Option<Row>> {
    let sql = format!("{} WHERE mac = ?1", Row::select());
    connection.prepare_cached(&sql)?.query_row([mac.0], Row::read).optional()
}

/// Everything known, by address.
pub(super) fn rows(connection: &Connection) -> Result<Vec<Row>> {
    let sql = format!("{} ORDER BY ip", Row::select());
    connection.prepare_cached(&sql)?.query_map([], Row::read)?.collect()
}

/// The store within one transaction.
pub(super) struct Ledger<'a> {
    pub(super) tx: &'a Transaction<'a>,
    pub(super) now: Moment,
    pub(super) pool: &'a Pool,
    pub(super) holder: i64,
}

impl Ledger<'_> {
    fn now_us(&self) -> i64 {
        self.now.boottime_us
    }

    fn offers_out_us(&self) -> i64 {
        self.now_us() - micros(OFFER_HOLD)
    }

    fn is_active(&self, row: &Row) -> bool {
        row.end_us().is_some_and(|until| until > self.now_us())
    }

    /// Whether the row's lease keeps others from what it has: it runs, and its process lives or may be back soon.
    fn is_kept(&self, row: &Row) -> bool {
        row.until_us.is_some_and(|until| until > self.now_us())
            && row.ended_us.is_none_or(|ended| ended > self.now_us() - micros(RESTART_HOLD))
    }

    fn is_offered(&self, row: &Row) -> bool {
        row.offered_us.is_some_and(|made| made > self.offers_out_us())
    }

    /// Whether another process that lives gave the address under `mac` to its own guest, and this one's guest only
    /// says that it is that one.
    fn is_elsewhere(&self, mac: MacAddr) -> Result<bool> {
        if self.pool.takes_over {
            return Ok(false);
        }
        let row = row_of(self.tx, mac)?;
        Ok(row.is_some_and(|row| {
            row.is_of_another(self.holder) && (self.is_active(&row) || self.is_offered(&row))
        }))
    }

    fn is_memory(&self, row: &Row) -> bool {
        !self.is_kept(row) && !self.is_offered(row)
    }

    /// Drops offers that ran out and were never taken, and ends the rest of declined addresses.
    pub(super) fn sweep(&self) -> Result<()> {
        let sql = "DELETE FROM declined WHERE until_us <= ?1";
        self.tx.prepare_cached(sql)?.execute([self.now_us()])?;
        let sql = "DELETE FROM lease WHERE until_us IS NULL AND coalesce(offered_us <= ?1, true)";
        self.tx.prepare_cached(sql)?.execute([self.offers_out_us()])?;
        Ok(())
    }

    pub(super) fn offer(
        &self,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
    ) -> Result<std::result::Result<Grant, Refusal>> {
        if self.is_elsewhere(client.mac)? {
            return Ok(Err(Refusal::Elsewhere));
        }
        if !self.has_share(client)? {
            return Ok(Err(Refusal::ShareUsed));
        }
        let Some(ip) = self.choose(client, wanted)? else {
            return Ok(Err(Refusal::Exhausted));
        };
        let row = self.take(ip, client)?;
        self.tx
            .prepare_cached("UPDATE lease SET offered_us = ?2 WHERE ip = ?1")?
            .execute(params![number(ip), self.now_us()])?;
        let (host_name, name_refused) = self.name(client, &row, false)?;
        Ok(Ok(Grant { ip, host_name, name_refused }))
    }

    pub(super) fn bind(
        &self,
        client: &Client<'_>,
        ip: Ipv4Addr,
    ) -> Result<std::result::Result<(Bind, Grant), Refusal>> {
        if self.is_elsewhere(client.mac)? {
            return Ok(Err(Refusal::Elsewhere));
        }
        if let Err(refusal) = self.may_have(client, ip)? {
            return Ok(Err(refusal.into()));
        }
        if !self.has_share(client)? {
            return Ok(Err(Refusal::ShareUsed));
        }
        let own = row_of(self.tx, client.mac)?;
        if own.as_ref().is_none_or(|own| own.ip != ip) {
            if own.is_none()
                && self.row_at(ip)?.is_none()
                && self.count()? >= self.pool.leases_max
                && self.evict()?.is_none()
            {
                return Ok(Err(BindRefusal::Full.into()));
            }
            self.forget(client.mac)?;
        }
        let row = self.take(ip, client)?;
        let bind = if self.is_active(&row) { Bind::Renewed } else { Bind::Bound };
        let until = micros(LEASE_TIME);
        let sql = "UPDATE lease SET offered_us = NULL, until_us = ?2, until_wall_us = ?3, client_id = ?4 \
                   WHERE ip = ?1";
        let values = params![number(ip), self.now.boottime_us + until, self.now.wall_us + until, client.id];
        self.tx.prepare_cached(sql)?.execute(values)?;
        let (host_name, name_refused) = self.name(client, &row, true)?;
        Ok(Ok((bind, Grant { ip, host_name, name_refused })))
    }

    /// Whether `client` may be bound to `ip`.
    fn may_have(&self, client: &Client<'_>, ip: Ipv4Addr) -> Result<std::result::Result<(), BindRefusal>> {
        if !self.pool.contains(ip) {
            return Ok(Err(BindRefusal::OutsidePool));
        }
        let own = row_of(self.tx, client.mac)?;
        if let Some(reserved) = reservations::of(self.tx, client)?
            && reserved.ip != ip
            && (own.as_ref().is_some_and(|own| own.ip == reserved.ip) || self.is_free(client, reserved.ip)?)
        {
            return Ok(Err(BindRefusal::HasOther(reserved.ip)));
        }
        match own {
            Some(own) if own.ip == ip => {
                let free = self.is_kept(&own) || self.is_reservable(client, ip)?;
                return Ok(if free { Ok(()) } else { Err(BindRefusal::Taken) });
            }
            // Who has a reservation leaves for it whatever it had.
            Some(own) if own.until_us.is_some() && !self.is_reserved_for(client, ip)? => {
                return Ok(Err(BindRefusal::HasOther(own.ip)));
            }
            _ => {}
        }
        Ok(if self.is_free(client, ip)? { Ok(()) } else { Err(BindRefusal::Taken) })
    }

    /// Makes the lease of `mac` that was let go this process's; what is known of `mac` then.
    pub(super) fn resume(&self, mac: MacAddr) -> Result<Option<Row>> {
        let row = row_of(self.tx, mac)?;
        let client = Client { mac, id: None, host_name: None };
        if !row.as_ref().is_some_and(|row| row.is_let_go(self.now)) || !self.has_share(&client)? {
            return Ok(row);
        }
        let sql = "UPDATE lease SET holder = ?2 WHERE mac = ?1";
        self.tx.prepare_cached(sql)?.execute(params![mac.0, self.holder])?;
        row_of(self.tx, mac)
    }

    pub(super) fn withdraw(&self, mac: MacAddr) -> Result<()> {
        if self.is_elsewhere(mac)? {
            return Ok(());
        }
        let sql = "UPDATE lease SET offered_us = NULL WHERE mac = ?1";
        self.tx.prepare_cached(sql)?.execute([mac.0])?;
        self.sweep()
    }

    pub(super) fn release(&self, mac: MacAddr, ip: Ipv4Addr) -> Result<bool> {
        if self.is_elsewhere(mac)? {
            return Ok(false);
        }
        let sql = "UPDATE lease SET until_us = ?3, until_wall_us = ?4, offered_us = NULL \
                   WHERE ip = ?1 AND mac = ?2 AND until_us > ?3";
        let values = params![number(ip), mac.0, self.now.boottime_us, self.now.wall_us];
        Ok(self.tx.prepare_cached(sql)?.execute(values)? == 1)
    }

    pub(super) fn decline(&self, mac: MacAddr, ip: Ipv4Addr) -> Result<bool> {
        if row_of(self.tx, mac)?.is_none_or(|row| row.ip != ip) || self.is_elsewhere(mac)? {
            return Ok(false);
        }
        self.forget(mac)?;
        // The one declined first comes back early: of this guest's, then of all.
        let mine = ("holder = ?1", self.pool.declined_per_guest_max);
        for (whose, most) in [mine, ("?1 = ?1", limits::LEASES_DECLINED_MAX)] {
            let sql = format!(
                "DELETE FROM declined WHERE (SELECT count(*) FROM declined WHERE {whose}) >= ?2 \
                 AND ip = (SELECT ip FROM declined WHERE {whose} ORDER BY until_us, ip LIMIT 1)"
            );
            self.tx.prepare_cached(&sql)?.execute(params![self.holder, count(most)])?;
        }
        let hold = micros(DECLINE_HOLD);
        self.tx.prepare_cached("INSERT INTO declined VALUES(?1, ?2, ?3, ?4)")?.execute(params![
            number(ip),
            self.now.boottime_us + hold,
            self.now.wall_us + hold,
            self.holder
        ])?;
        Ok(true)
    }

    /// Whether this process's guest may hold one more address, or `client` has one already.
    fn has_share(&self, client: &Client<'_>) -> Result<bool> {
        let sql = format!(
            "SELECT count(*) < ?5 FROM (SELECT 1 FROM lease WHERE holder = ?3 AND mac <> ?4 AND {} LIMIT ?5)",
            held()
        );
        let most = count(self.pool.leases_per_guest_max);
        let values = params![self.now_us(), self.offers_out_us(), self.holder, client.mac.0, most];
        self.tx.prepare_cached(&sql)?.query_row(values, |row| row.get(0))
    }

    fn choose(&self, client: &Client<'_>, wanted: Option<Ipv4Addr>) -> Result<Option<Ipv4Addr>> {
        let mut own = row_of(self.tx, client.mac)?;
        if let Some(reserved) = reservations::of(self.tx, client)? {
            if own.as_ref().is_some_and(|own| own.ip == reserved.ip) {
                return Ok(Some(reserved.ip));
            }
            if self.is_free(client, reserved.ip)? {
                self.forget(client.mac)?;
                return Ok(Some(reserved.ip));
            }
        }
        // Reserved for another since it was this client's, who is not using it.
        if let Some(row) = &own
            && !self.is_kept(row)
            && !self.is_reservable(client, row.ip)?
        {
            self.forget(client.mac)?;
            own = None;
        }
        let wanted = match wanted {
            Some(ip) if self.is_free(client, ip)? => Some(ip),
            _ => None,
        };
        if let Some(own) = own {
            return match wanted {
                Some(wanted) if own.until_us.is_none() => {
                    self.forget(client.mac)?;
                    Ok(Some(wanted))
                }
                _ => Ok(Some(own.ip)),
            };
        }
        let full = self.count()? >= self.pool.leases_max;
        let unused = match wanted {
            Some(ip) => Some(ip),
            None => self.first_unused()?,
        };
        match unused {
            Some(ip) if !full || self.row_at(ip)?.is_some() => Ok(Some(ip)),
            Some(ip) => Ok(self.evict()?.map(|_| ip)),
            None => self.evict(),
        }
    }

    /// Whether `client` may have `ip`: in the pool, not declined, not reserved for another, and unused or only
    /// remembered.
    fn is_free(&self, client: &Client<'_>, ip: Ipv4Addr) -> Result<bool> {
        Ok(self.pool.contains(ip)
            && !self.is_declined(ip)?
            && self.row_at(ip)?.is_none_or(|row| self.is_memory(&row))
            && self.is_reservable(client, ip)?)
    }

    /// Whether `ip` is reserved for nobody but `client`.
    fn is_reservable(&self, client: &Client<'_>, ip: Ipv4Addr) -> Result<bool> {
        Ok(reservations::at(self.tx, ip)?.is_none_or(|reserved| reserved.is_for(client)))
    }

    fn is_reserved_for(&self, client: &Client<'_>, ip: Ipv4Addr) -> Result<bool> {
        Ok(reservations::at(self.tx, ip)?.is_some_and(|reserved| reserved.is_for(client)))
    }

    fn is_declined(&self, ip: Ipv4Addr) -> Result<bool> {
        self.tx.prepare_cached("SELECT 1 FROM declined WHERE ip = ?1")?.exists([number(ip)])
    }

    fn row_at(&self, ip: Ipv4Addr) -> Result<Option<Row>> {
        let sql = format!("{} WHERE ip = ?1", Row::select());
        self.tx.prepare_cached(&sql)?.query_row([number(ip)], Row::read).optional()
    }

    fn count(&self) -> Result<usize> {
        let count: i64 =
            self.tx.prepare_cached("SELECT count(*) FROM lease")?.query_row([], |row| row.get(0))?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// The first address nobody is remembered by: the first gap in what is spoken for.
    fn first_unused(&self) -> Result<Option<Ipv4Addr>> {
        if let Some(first) = self.pool.first
            && self.pool.contains(first)
            && !self.is_spoken_for(first)?
        {
            return Ok(Some(first));
        }
        let sql = "SELECT ip FROM lease UNION SELECT ip FROM declined UNION SELECT ip FROM reservation \
                   UNION SELECT ?1 ORDER BY ip";
        let mut statement = self.tx.prepare_cached(sql)?;
        let mut spoken_for = statement.query([number(self.pool.gateway)])?;
        let mut candidate = number(self.pool.subnet.network()) + 1;
        while let Some(row) = spoken_for.next()? {
            let taken: i64 = row.get(0)?;
            if taken > candidate {
                break;
            }
            candidate = candidate.max(taken + 1);
        }
        let ip = u32::try_from(candidate).ok().map(Ipv4Addr::from_bits);
        Ok(ip.filter(|&ip| self.pool.contains(ip)))
    }

    fn is_spoken_for(&self, ip: Ipv4Addr) -> Result<bool> {
        Ok(self.row_at(ip)?.is_some() || self.is_declined(ip)? || reservations::at(self.tx, ip)?.is_some())
    }

    /// Frees the address of the lease that ended first, or else of the oldest offer that had its time, and
    /// returns it. What is reserved is no use to whoever it is freed for.
    fn evict(&self) -> Result<Option<Ipv4Addr>> {
        let open = "ip NOT IN (SELECT ip FROM reservation)";
        let memory = format!(
            "SELECT ip FROM lease WHERE NOT {} AND {open} \
             ORDER BY min(until_us, coalesce({ENDED_US}, until_us)), ip LIMIT 1",
            held()
        );
        let offer = format!(
            "SELECT ip FROM lease WHERE coalesce(until_us <= ?1, true) AND offered_us <= ?2 AND {open} \
             ORDER BY offered_us, ip LIMIT 1"
        );
        let oldest = self.now_us() - micros(OFFER_HOLD_MIN);
        let find = |sql: &str, before: i64| {
            let values = params![self.now_us(), before];
            self.tx.prepare_cached(sql)?.query_row(values, |row| ip_at(row, 0)).optional()
        };
        let ip = match find(&memory, self.offers_out_us())? {
            Some(ip) => Some(ip),
            None => find(&offer, oldest)?,
        };
        if let Some(ip) = ip {
            self.tx.prepare_cached("DELETE FROM lease WHERE ip = ?1")?.execute([number(ip)])?;
        }
        Ok(ip)
    }

    /// The row of `ip`, which `client` has from now on, as it was before if it was the client's.
    fn take(&self, ip: Ipv4Addr, client: &Client<'_>) -> Result<Row> {
        let holder = self.holder;
        match self.row_at(ip)? {
            Some(row) if row.mac == client.mac => {
                let sql = "UPDATE lease SET holder = ?2 WHERE ip = ?1";
                self.tx.prepare_cached(sql)?.execute(params![number(ip), holder])?;
                Ok(row)
            }
            _ => {
                self.tx.prepare_cached("DELETE FROM lease WHERE ip = ?1")?.execute([number(ip)])?;
                let sql = "INSERT INTO lease(ip, mac, holder) VALUES(?1, ?2, ?3)";
                self.tx.prepare_cached(sql)?.execute(params![number(ip), client.mac.0, holder])?;
                let mac = client.mac;
                let (offered_us, until_us, host_name, ended_us) = (None, None, None, None);
                Ok(Row { ip, mac, offered_us, until_us, host_name, holder, ended_us, lives: true })
            }
        }
    }

    fn forget(&self, mac: MacAddr) -> Result<()> {
        self.tx.prepare_cached("DELETE FROM lease WHERE mac = ?1")?.execute([mac.0])?;
        Ok(())
    }

    /// The name of `client`, whose row is `row`, from now on, and whether one it asked for was refused. With a
    /// lease (`bound`) it takes names from whoever's lease is over; with an offer only what nobody has.
    fn name(&self, client: &Client<'_>, row: &Row, bound: bool) -> Result<(Option<String>, bool)> {
        let reserved = reservations::at(self.tx, row.ip)?.and_then(|reserved| reserved.host_name);
        let asked = match (&reserved, client.host_name) {
            (Some(name), _) => name.as_str(),
            (None, Some(name)) => name,
            (None, None) => return Ok((row.host_name.clone(), false)),
        };
        if row.host_name.as_deref() == Some(asked) {
            return Ok((row.host_name.clone(), false));
        }
        let theirs =
            reserved.is_some() || (self.pool.name_is_free(asked) && !reservations::names(self.tx, asked)?);
        let other = self.row_named(asked)?;
        let got = theirs
            && match &other {
                None => true,
                Some(other) => bound && (reserved.is_some() || !self.is_kept(other)),
            };
        if got && other.is_some() {
            let sql = "UPDATE lease SET host_name = NULL WHERE host_name = ?1";
            self.tx.prepare_cached(sql)?.execute([asked])?;
        }
        let name = got.then(|| asked.to_owned());
        self.tx
            .prepare_cached("UPDATE lease SET host_name = ?2 WHERE ip = ?1")?
            .execute(params![number(row.ip), name])?;
        Ok((name, !got && bound))
    }

    fn row_named(&self, name: &str) -> Result<Option<Row>> {
        let sql = format!("{} WHERE host_name = ?1", Row::select());
        self.tx.prepare_cached(&sql)?.query_row([name], Row::read).optional()
    }
}

fn count(most: usize) -> i64 {
    i64::try_from(most).unwrap_or(i64::MAX)
}

/// Frees names that [`Reservation`]s give to others.
pub(super) fn free_name(tx: &Transaction<'_>, reservation: &Reservation) -> Result<()> {
    let sql = "UPDATE lease SET host_name = NULL WHERE host_name = ?1 AND ip <> ?2";
    tx.execute(sql, params![reservation.host_name, number(reservation.ip)])?;
    Ok(())
}
