//! A named network in the life of the process: joined before anything else is opened, left after all else
//! is closed.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::publishing::bind;
use super::{Error, random_pair, services, starting};
use crate::config::{Attach, Config, NetworkConfig, Publish};
use crate::control::network_watch::{self, SharedJoined};
use crate::engine::lan::guard::SharedTable;
use crate::holder::door::Use;
use crate::holder::ports::Lent;
use crate::network::definition::Kind;
use crate::network::manager::{NetworkError, Networks};
use crate::network::rootless::Place;
use crate::network::store::LeaseStore;
use crate::network::users::{PublishedPort, User};

/// Joins the network of `config`, if it has one.
pub(super) fn join(config: &Config) -> Result<Option<SharedJoined>, Error> {
    let Some(network) = &config.network else { return Ok(None) };
    let mut user = User::this_process().map_err(starting("the number of the network namespace"))?;
    user.socket = match &config.attach {
        Attach::Listen(path) | Attach::Connect(path) => Some(path.clone()),
        Attach::Inherited(_) => None,
    };
    // As exact in any reader's JSON.
    user.holder = Some(random_pair()?.0 >> 11 | 1);
    if !config.lan.dhcp {
        // It configures itself, with the address it was told of if any.
        user.guest = config.lan.guest;
    }
    let joined = Networks::new(network.state.clone()).join(&network.name, user)?;
    let bridge = joined.definition().bridge();
    tracing::info!(network = %network.name, %bridge, "joined");
    Ok(Some(Arc::new(Mutex::new(joined))))
}

/// Binds the published ports that a holder is to serve; port 0 is picked by the kernel and put in its place.
pub(super) fn bind_lent(network: Option<&mut NetworkConfig>) -> Result<Vec<Arc<Lent>>, Error> {
    let Some(network) = network else { return Ok(Vec::new()) };
    let mut lent = Vec::with_capacity(network.lent.len());
    for n in 0..network.lent.len() {
        let bound = bind(&mut network.lent[n]);
        let socket = bound.map_err(|error| with_owner(error, Some(network)))?;
        lent.push(Arc::new(Lent { socket, port: network.lent[n] }));
    }
    Ok(lent)
}

/// The same error; of a port that another process of the same networks has published, with whose it is.
pub(super) fn with_owner(error: Error, network: Option<&NetworkConfig>) -> Error {
    let Some(network) = network else { return error };
    match error {
        Error::Publish(mut refused) => {
            if let Some(publisher) = Networks::new(network.state.clone()).publisher(&refused.port) {
                publisher.name_in(&mut refused);
            }
            Error::Publish(refused)
        }
        error => error,
    }
}

/// The guest's address on a network with a holder: the configured one, else what the guard sees of DHCP.
pub(super) fn address(config: &Config, table: &SharedTable) -> watch::Receiver<Option<Ipv4Addr>> {
    match config.lan.guest {
        Some(addr) => watch::channel(Some(addr)).1,
        None => table.leased(),
    }
}

/// Moves this process into the namespaces of its network, if those are a holder's, and lends that its ports; with
/// the way to stay there.
pub(super) fn enter(
    joined: Option<&SharedJoined>,
    lent: &[Arc<Lent>],
) -> Result<Option<(Place, Use)>, Error> {
    let Some(joined) = joined else { return Ok(None) };
    let joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
    let definition = joined.definition();
    if !definition.is_rootless() {
        return Ok(None);
    }
    let place = joined.holder();
    let used = place.enter(lent).map_err(|source| Error::Join { name: definition.name.clone(), source })?;
    Ok(Some((place, used)))
}

/// Of a network with a holder: whether that leads to the world.
pub(super) fn leads_to_the_world(joined: &SharedJoined) -> Option<bool> {
    match joined.lock().unwrap_or_else(PoisonError::into_inner).definition().kind {
        Kind::Rootless { world, .. } => Some(world),
        _ => None,
    }
}

/// The network's store of leases, where a holder gives them and this process claims its guest's.
pub(super) fn claims(joined: &SharedJoined, config: &Config) -> Result<Option<LeaseStore>, Error> {
    let joined = joined.lock().unwrap_or_else(PoisonError::into_inner);
    let definition = joined.definition();
    let Some(network) = config.network.as_ref().filter(|_| definition.is_rootless()) else { return Ok(None) };
    match (definition.kind.lan(), joined.user().holder) {
        (Some(lan), Some(holder)) => services::to_claim(network, lan, holder).map(Some),
        _ => Ok(None),
    }
}

/// This process's number in the network's store of leases.
pub(super) fn holder(joined: &SharedJoined) -> Option<u64> {
    joined.lock().unwrap_or_else(PoisonError::into_inner).user().holder
}

/// Changes what others know of this process, and waits until the host is as it must be then.
pub(super) fn update(joined: &SharedJoined, change: impl FnOnce(&mut User)) -> Result<(), NetworkError> {
    joined.lock().unwrap_or_else(PoisonError::into_inner).update(change)
}

/// Tells others what is published and looks after the network from now on, on the runtime this is called on.
pub(super) fn serve(
    joined: &SharedJoined,
    publish: &[Publish],
    mut guest: watch::Receiver<Option<Ipv4Addr>>,
) -> Result<(), Error> {
    let published = publish.iter().map(PublishedPort::from).collect();
    update(joined, |user| user.published = published)?;
    tokio::spawn(network_watch::follow(Arc::clone(joined)));
    let joined = Arc::clone(joined);
    tokio::spawn(async move {
        while guest.changed().await.is_ok() {
            let addr = *guest.borrow_and_update();
            let joined = Arc::clone(&joined);
            let work = move || update(&joined, |user| user.guest = addr);
            if let Ok(Err(error)) = tokio::task::spawn_blocking(work).await {
                tracing::warn!(%error, "published ports do not lead to the guest's address");
            }
        }
    });
    Ok(())
}
