//! The firewall of a named network: one nftables table of its own, replaced as a whole, and tagged accepts
//! where another program's policy would drop what the network needs.
//!
//! A [`Ruleset`] says what must hold; `rules` makes objects of it, `listing` reads what is there. [`apply`] is
//! idempotent: it lists, compares, and replaces in one transaction only what differs. An accept in our table
//! does not override a drop in another, so `ip filter FORWARD` and `ip6 filter FORWARD` (iptables, Docker,
//! ufw) get accepts too, in Docker's own chain for them if it is there. Those match interfaces only, in the
//! form `iptables` understands, because our own table is the strict one; each carries the network's comment,
//! and nothing else is ever removed. `iptables-legacy` has tables of its own, which `legacy` gives the same accepts.
//!
//! Runs the program `nft` (through the crate `nftables`), and iptables' where its tables are in use, so callers are not on a worker's thread.
//!
//! Read first: nft(8), libnftables-json(5); `Documentation/networking/nf_conntrack-sysctl.rst` of Linux.

mod legacy;
mod listing;
mod rules;

use std::ffi::OsStr;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::Once;

use nftables::batch::Batch;
use nftables::helper::{self, NftablesError};
use siphasher::sip::SipHasher13;
use thiserror::Error;

use crate::addr::{Ipv4Subnet, LinkName};
use listing::Listing;

/// How often a transaction is tried anew because others changed rules between listing and it.
const TRIES: usize = 5;

/// A port of the host that leads to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Redirect {
    /// Whether it is UDP, else TCP.
    pub udp: bool,
    /// Address and port of the host; the address is unspecified for "any".
    pub host: SocketAddrV4,
    /// The one interface it is redirected from; all but the loopback if `None`.
    pub interface: Option<LinkName>,
    /// Where it leads.
    pub guest: SocketAddrV4,
}

/// What guests may reach beyond each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Beyond {
    /// The host, at the gateway's address.
    Host,
    /// The world, masqueraded.
    World {
        /// Whether also the host's own services.
        allow_host: bool,
        /// Interfaces that lead to the world.
        uplinks: Vec<String>,
        /// Of those, the ones that forward only because of us: they forward to guests and nowhere else.
        guarded: Vec<String>,
        /// Ports of the host that lead to guests.
        redirects: Vec<Redirect>,
    },
}

/// What must hold for a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ruleset {
    /// Name of the network's own table, of the family `inet`.
    pub table: String,
    /// Comment of its rules in other tables.
    pub comment: String,
    /// Its bridge.
    pub bridge: String,
    /// Its subnet.
    pub subnet: Ipv4Subnet,
    /// The host's address there.
    pub gateway: Ipv4Addr,
    /// Whether guests are kept from each other.
    pub isolate: bool,
    /// What they may reach beyond each other.
    pub beyond: Beyond,
}

impl Ruleset {
    /// Name of an empty chain that says which rules the table holds, whoever made them.
    fn mark(&self) -> String {
        // Fixed keys: it tells rulesets apart for processes of one version, not for an adversary.
        let mut hasher = SipHasher13::new();
        env!("CARGO_PKG_VERSION").hash(&mut hasher);
        self.hash(&mut hasher);
        format!("is_{:016x}", hasher.finish())
    }
}

/// Why the firewall could not be set.
#[derive(Debug, Error)]
pub enum FirewallError {
    /// No `nft`.
    #[error(
        "the program nft is needed to keep this network apart and to translate its addresses, and is neither \
         in PATH nor in /usr/sbin or /sbin: install the package nftables, or make the network with --rootless, \
         which does both in user space, for root too"
    )]
    NoProgram,
    /// `nft` refused.
    #[error("nft failed while {what}; what it says about it is above, or: {said}")]
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// What it said, if it could be read.
        said: String,
    },
    /// A program of iptables refused.
    #[error(
        "legacy tables of iptables filter here and must let this network's guests pass, but {} failed: {said}",
        program.display()
    )]
    Legacy {
        /// The program.
        program: PathBuf,
        /// What it said.
        said: String,
    },
}

/// Makes what must hold hold. Whether anything had to be changed.
///
/// # Errors
/// [`FirewallError`].
pub fn apply(ruleset: &Ruleset) -> Result<bool, FirewallError> {
    let changed = transact(|listing, batch| {
        if listing.firewalld_rejects(&ruleset.bridge, rules::OWN_BRIDGES) {
            warn_of_firewalld();
        }
        if !listing.table_is(&ruleset.table, &ruleset.mark(), rules::count(ruleset)) {
            rules::replace_table(ruleset, batch);
        }
        let wanted = rules::accepts(ruleset, listing);
        if !listing.holds_tagged(&ruleset.comment, &wanted) {
            listing.delete_tagged(&ruleset.comment, batch);
            rules::insert_accepts(&wanted, &ruleset.comment, batch);
        }
    })?;
    let accepted =
        legacy::apply(&ruleset.comment, |family, chain| rules::accepts_in(ruleset, family, chain))?;
    Ok(changed || accepted)
}

/// firewalld may own its table, so that nobody else can put an accept there.
fn warn_of_firewalld() {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            "firewalld rejects what this network's guests send to the world and to each other until it trusts the \
             bridges: firewall-cmd --permanent --zone=trusted --add-interface=vn-+; firewall-cmd --reload"
        );
    });
}

/// Removes the table and everything with the comment. Whether there was anything.
///
/// # Errors
/// [`FirewallError`].
pub fn remove(table: &str, comment: &str) -> Result<bool, FirewallError> {
    // In spite of each other's failure.
    let accepted = legacy::apply(comment, |_, _| Vec::new());
    let changed = transact(|listing, batch| {
        if listing.has_table(table) {
            rules::delete_table(table, batch);
        }
        listing.delete_tagged(comment, batch);
    })?;
    Ok(changed | accepted?)
}

/// Lists, lets `plan` say what to change, and changes it in one transaction; again if that fails, because
/// rules are named by handles that others may have made invalid.
fn transact(plan: impl Fn(&Listing, &mut Batch<'static>)) -> Result<bool, FirewallError> {
    let mut tries = 0;
    loop {
        tries += 1;
        let mut batch = Batch::new();
        plan(&list()?, &mut batch);
        let commands = batch.to_nftables();
        if commands.objects.is_empty() {
            return Ok(false);
        }
        match helper::apply_ruleset_with_args(&commands, Some(program()), helper::DEFAULT_ARGS) {
            Ok(()) => return Ok(true),
            Err(error) if tries == TRIES => return Err(refused("changing rules", error)),
            Err(_) => {}
        }
    }
}

fn list() -> Result<Listing, FirewallError> {
    let text = helper::get_current_ruleset_raw(Some(program()), helper::DEFAULT_ARGS)
        .map_err(|error| refused("listing rules", error))?;
    Listing::parse(&text)
        .map_err(|error| FirewallError::Refused { what: "listing rules", said: error.to_string() })
}

/// Whether there is a program `nft`.
pub fn has_program() -> bool {
    in_path() || elsewhere().is_some()
}

/// `nft` where it is: services often have no `sbin` in their `PATH`.
fn program() -> &'static OsStr {
    OsStr::new(if in_path() { "nft" } else { elsewhere().unwrap_or("nft") })
}

fn in_path() -> bool {
    let has = |path| std::env::split_paths(&path).any(|dir| dir.join("nft").is_file());
    std::env::var_os("PATH").is_some_and(has)
}

fn elsewhere() -> Option<&'static str> {
    ["/usr/sbin/nft", "/sbin/nft"].into_iter().find(|file| Path::new(file).is_file())
}

/// Where the program `nft` is.
pub fn find_program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join("nft")).find(|file| file.is_file());
    in_path.or_else(|| elsewhere().map(PathBuf::from))
}

/// Arguments of `nft` that list the whole ruleset, for [`Survey::of`].
pub const LIST: [&str; 3] = ["-j", "list", "ruleset"];

/// What of others' rules concerns guests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// firewalld rejects what bridges of named networks forward.
    pub firewalld_rejects: bool,
    /// iptables' chain for what is forwarded, or Docker's for users' rules there, where the former's policy is drop.
    pub drops_forwarded: Option<&'static str>,
    /// Bridges of which it accepts in spite of that what comes in and leaves by them.
    pub accepts_within: Vec<String>,
}

impl Survey {
    /// What the output of `nft` with [`LIST`] tells.
    ///
    /// # Errors
    /// [`FirewallError::Refused`] if it is no such output.
    pub fn of(json: &str) -> Result<Survey, FirewallError> {
        let listing = Listing::parse(json)
            .map_err(|error| FirewallError::Refused { what: "listing rules", said: error.to_string() })?;
        Ok(Survey {
            firewalld_rejects: listing.firewalld_rejects(rules::OWN_BRIDGES, rules::OWN_BRIDGES),
            drops_forwarded: listing.drops_forwarded(),
            accepts_within: listing.accepts_within(),
        })
    }
}

/// Where iptables' legacy tables are in use for IPv4: the program for them, if it is there. `None` where nobody uses them.
pub fn legacy_program() -> Option<Option<PathBuf>> {
    legacy::program_in_use()
}

fn refused(what: &'static str, error: NftablesError) -> FirewallError {
    match error {
        NftablesError::NftExecution { inner, .. }
            if inner.kind() == io::ErrorKind::NotFound || !has_program() =>
        {
            FirewallError::NoProgram
        }
        NftablesError::NftFailed { stdout, stderr, .. } => {
            FirewallError::Refused { what, said: (stdout + &stderr).trim().to_owned() }
        }
        other => FirewallError::Refused { what, said: other.to_string() },
    }
}
