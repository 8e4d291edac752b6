//! Root becomes the user whose files it is to change, so that they stay that user's.

use std::io;

use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, configure_capability_in_ambient_set, set_capabilities,
    set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::sys;

/// Makes this process one of `uid` and `gid`, without any other group and without any capability but, if `keeps_net_admin`
/// and it has that, CAP_NET_ADMIN, for the programs that it starts too. There is no way back.
///
/// Read first: capabilities(7), "Effect of user ID changes on capabilities".
///
/// # Errors
/// The kernel's refusal; [`io::ErrorKind::Unsupported`] where there are other threads, which would stay what they are.
pub fn become_user(uid: Uid, gid: Gid, keeps_net_admin: bool) -> io::Result<()> {
    if sys::threads()? != 1 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let wanted = if keeps_net_admin { CapabilitySet::NET_ADMIN } else { CapabilitySet::empty() };
    let kept = capabilities(None)?.permitted & wanted;
    set_keep_capabilities(true)?;
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: kept })?;
    if !kept.is_empty() {
        configure_capability_in_ambient_set(kept, true)?;
    }
    set_keep_capabilities(false)?;
    Ok(())
}
