//! The log of a named network's leases is written back while nobody waits for it.
//!
//! Every process of the network does it; whoever comes first leaves the others nothing to do. One that is
//! killed is missed by nobody.

use crate::limits;
use crate::network::store::keeper::Keeper;

/// Looks after the log until the runtime ends.
pub async fn keep(mut keeper: Keeper) {
    let mut told = false;
    loop {
        tokio::time::sleep(limits::STORE_LOG_LOOK).await;
        let job = move || {
            let outcome = keeper.write_back();
            (keeper, outcome)
        };
        let Ok((back, outcome)) = tokio::task::spawn_blocking(job).await else { return };
        keeper = back;
        match outcome {
            Err(error) if !told => {
                told = true;
                tracing::warn!(%error, "the log of leases cannot be written back");
            }
            Err(_) => {}
            Ok(()) => told = false,
        }
    }
}
