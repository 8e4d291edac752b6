//! The guest's leases on a LAN, as the process before this one knew them.

use std::io;
use std::sync::Arc;

use crate::config::KeepLeases;
use crate::control::station_leases::StationLeases;
use crate::engine::lan::guard::SharedTable;
use crate::network::clock::SystemClock;

/// Where `keep` says they are kept. Without a place for them vunet says so and goes on.
pub(super) fn open(keep: &KeepLeases) -> Option<StationLeases> {
    let open = || match &keep.folder {
        Some(folder) => StationLeases::open(folder, &keep.link, Arc::new(SystemClock::new()?)),
        None => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "neither XDG_STATE_HOME nor HOME is an absolute path",
        )),
    };
    match open() {
        Ok(kept) => Some(kept),
        Err(error) => {
            let folder = keep.folder.as_ref().map_or(String::new(), |folder| folder.display().to_string());
            tracing::warn!(
                %folder, %error,
                "the guest's lease by the LAN's DHCP cannot be kept: after the next start of vunet it is cut off \
                 until it renews; give --state-dir DIR of this user's own"
            );
            None
        }
    }
}

/// What all workers judge by, with the leases that are kept.
pub(super) fn table(kept: Option<&StationLeases>) -> SharedTable {
    let leases = kept.map(StationLeases::load).transpose().unwrap_or_else(|error| {
        tracing::warn!(%error, "the guest's lease by the LAN's DHCP cannot be read; it is cut off until it renews");
        None
    });
    SharedTable::with_leases(&leases.unwrap_or_default())
}
