//! On a network without privilege: the guest's lease belongs to the guest's own process, though the network's
//! holder gave it.
//!
//! The holder leases for the guests of all processes, and outlives each. So a process that sees its guest get a
//! lease, or go on with one it had, notes in the network's store that it is its own: from then on it is let go
//! when this process is gone, as on other networks ([`crate::network::store::processes`]). A kill before that
//! leaves a lease that ends by time alone.
//!
//! May touch: `engine::lan::guard`, `network::store`.

use tokio::sync::watch;

use crate::engine::lan::guard::LeaseNews;
use crate::network::allocator::Refusal;
use crate::network::store::LeaseStore;
use crate::time::Clock;

/// Claims in `store` what the guest is said to have, for as long as it is polled; says once if it cannot.
pub async fn claim(mut store: LeaseStore, mut news: watch::Receiver<Option<LeaseNews>>) {
    let clock = Clock::start();
    let mut told = false;
    while news.changed().await.is_ok() {
        let Some(latest) = news.borrow_and_update().clone() else { continue };
        let mac = latest.mac;
        let job = move || {
            let claim = |store: &mut LeaseStore, ip| store.claim(clock.now(), mac, ip);
            let outcome = latest.leases.iter().try_for_each(|lease| claim(&mut store, lease.addr));
            (store, outcome)
        };
        let Ok((back, outcome)) = tokio::task::spawn_blocking(job).await else { return };
        store = back;
        let Err(refusal) = outcome else { continue };
        if std::mem::replace(&mut told, true) {
            continue;
        }
        match refusal {
            Refusal::Elsewhere => tracing::warn!(
                %mac,
                "another guest of the network that is running has this MAC address and its lease; give each a MAC \
                 address of its own, and say it with --mac"
            ),
            refusal => {
                tracing::warn!(%mac, ?refusal, "the guest's lease is not noted as its own: it outlives this process");
            }
        }
    }
}
