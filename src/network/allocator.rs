//! Who hands out addresses: what [`crate::service::dhcp`] asks of the pool, wherever it is kept.
//!
//! Two keep it: [`super::leases::LeaseTable`], in the memory of one process, and
//! [`super::store::LeaseStore`], a file that all processes of a named network share. Both answer the same
//! questions in the same way: an address that is free goes to whoever asks for it, or else the first free one
//! in order; a client has one address; an offer is held for [`OFFER_HOLD`], a lease for [`LEASE_TIME`], a
//! declined address for [`DECLINE_HOLD`]; who comes back gets what it had.
//!
//! Read first: RFC 2131, 3.1, 4.3.1 and 4.3.2.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use super::store::StoreError;
use crate::addr::MacAddr;
use crate::time::Instant;

/// How long a lease lasts.
pub const LEASE_TIME: Duration = Duration::from_secs(86_400);
/// How long an offer keeps its address for the client to take it. Clients answer within
/// milliseconds and repeat within 4 to 16 s (RFC 2131, 4.1).
pub const OFFER_HOLD: Duration = Duration::from_secs(30);
/// How long an offer is safe from newer ones when the pool is exhausted.
pub const OFFER_HOLD_MIN: Duration = Duration::from_secs(1);
/// How long a declined address rests.
pub const DECLINE_HOLD: Duration = Duration::from_secs(300);
/// How long the lease of a process that is gone keeps others from its address and name: its guest may live, and
/// whoever looks after virtual machines starts the process anew within seconds, or after some tries.
pub const RESTART_HOLD: Duration = Duration::from_secs(300);

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Its hardware address, by which it is known.
    pub mac: MacAddr,
    /// The identifier it sent (option 61), at most 255 bytes: only reservations look at it.
    pub id: Option<&'a [u8]>,
    /// The name it gave itself: one lower-case label.
    pub host_name: Option<&'a str>,
}

/// What it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its name, as far as it is its own.
    pub host_name: Option<String>,
    /// Whether the name it gave itself is another's and stays so.
    pub name_refused: bool,
}

/// What became of a request to bind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// A new lease, or one taken up again after its end.
    Bound,
    /// A lease still running, prolonged.
    Renewed,
}

/// Why an address was not bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindRefusal {
    /// Not a host address of the pool.
    OutsidePool,
    /// The client has another address, this one.
    HasOther(Ipv4Addr),
    /// Held by another client, reserved for one, or declined a moment ago.
    Taken,
    /// The table is full of leases and fresh offers.
    Full,
}

/// Why a client got nothing.
#[derive(Debug)]
pub enum Refusal {
    /// Nothing is free to be offered.
    Exhausted,
    /// The guest behind this process holds as many addresses of a shared network as one may.
    ShareUsed,
    /// Another process of the network, which lives, leased to a guest of this hardware address.
    Elsewhere,
    /// Not this address.
    NotBound(BindRefusal),
    /// The store could not be read or written.
    Store(StoreError),
}

impl From<BindRefusal> for Refusal {
    fn from(refusal: BindRefusal) -> Refusal {
        Refusal::NotBound(refusal)
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Refusal {
        Refusal::Store(error)
    }
}

/// One client's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The client's hardware address.
    pub mac: MacAddr,
    /// Its address.
    pub ip: Ipv4Addr,
    /// When the lease ends or ended; `None` if the address was only offered so far.
    pub until: Option<Instant>,
    /// The host name the client gave itself: one lower-case label.
    pub host_name: Option<String>,
}

impl Lease {
    /// Whether the client holds the address at `now`.
    pub fn is_active(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| until > now)
    }
}

/// The pool of one network.
pub trait IpAllocator: fmt::Debug + Send {
    /// Sets an address aside for `client`: its own if it has one, else `wanted` if that is free, else the
    /// first free one, else the one whose lease ended first.
    ///
    /// # Errors
    /// Any [`Refusal`] but `NotBound`.
    fn offer(
        &mut self,
        now: Instant,
        client: &Client<'_>,
        wanted: Option<Ipv4Addr>,
    ) -> Result<Grant, Refusal>;

    /// Binds `ip` to `client` for [`LEASE_TIME`].
    ///
    /// # Errors
    /// Any [`Refusal`] but `Exhausted`; nobody's address has changed then.
    fn bind(&mut self, now: Instant, client: &Client<'_>, ip: Ipv4Addr) -> Result<(Bind, Grant), Refusal>;

    /// Takes back an offer that `mac` did not take; a lease it has stays.
    ///
    /// # Errors
    /// Of the store.
    fn withdraw(&mut self, now: Instant, mac: MacAddr) -> Result<(), StoreError>;

    /// Ends the lease of `mac` on `ip`, which stays remembered. False if it had none.
    ///
    /// # Errors
    /// Of the store.
    fn release(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError>;

    /// `mac` found `ip` in use by someone else: the address rests for [`DECLINE_HOLD`]. False if it was
    /// neither offered nor leased to `mac`.
    ///
    /// # Errors
    /// Of the store.
    fn decline(&mut self, now: Instant, mac: MacAddr, ip: Ipv4Addr) -> Result<bool, StoreError>;

    /// What is known of `mac`: offered, leased or remembered.
    ///
    /// # Errors
    /// Of the store.
    fn get(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError>;

    /// The lease `mac` has, unless another process that lives gave it to its own guest. Of a process that is gone
    /// (as before a start of this one in the guest's lifetime) it becomes this one's.
    ///
    /// # Errors
    /// Of the store.
    fn resume(&mut self, now: Instant, mac: MacAddr) -> Result<Option<Lease>, StoreError> {
        Ok(self.get(now, mac)?.filter(|lease| lease.is_active(now)))
    }

    /// Everything known, by address: offers, leases and memories.
    ///
    /// # Errors
    /// Of the store.
    fn leases(&mut self, now: Instant) -> Result<Vec<Lease>, StoreError>;
}
