//! What is made inside the network's namespaces: the bridge, and the holder's TAP on it.

use std::os::fd::OwnedFd;

use crate::config::IpMtu;

pub(super) fn make(_ip_mtu: IpMtu) -> Result<OwnedFd, String> {
    Err("not yet".into())
}
