//! What DNS asks about the other guests of a named network.

use std::fmt;
use std::net::Ipv4Addr;

/// Names of the guests that hold a lease now.
pub trait GuestNames: fmt::Debug + Send + Sync {
    /// The address of the guest called `label`, which is in lower case.
    fn address_of(&self, label: &str) -> Option<Ipv4Addr>;
    /// The name, one lower-case label, of the guest that holds `ip`.
    fn name_of(&self, ip: Ipv4Addr) -> Option<String>;
    /// All of them, by label.
    fn all(&self) -> Vec<(String, Ipv4Addr)>;
}
