//! The inflight area (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`): handed out, checked, never written.
//!
//! It exists so that a back-end which completes out of order can tell after a crash what was in
//! flight. This one completes in order and leaves nothing in flight across batches, so `used->idx`
//! says it all; a front-end that insists on the area gets one of the right size.
//!
//! May touch: nothing. Read first: the vhost-user specification, "Inflight I/O tracking".

use std::fs::File;
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{DescStateSplit, VhostUserInflight};

use super::request::{InflightArea, Refusal};
use crate::device::sys;

/// Bytes of a queue's region before its descriptor states: features, version, size, head, index.
const QUEUE_HEADER_BYTES: u64 = 16;
/// Each queue's region starts on a cache line.
const QUEUE_ALIGN_BYTES: u64 = 64;

/// A zeroed area for the queues `request` names, and the reply that describes it.
pub(super) fn create(request: &InflightArea) -> Result<(Vec<u8>, OwnedFd), Refusal> {
    let states = u64::from(request.queue_size) * size_of::<DescStateSplit>() as u64;
    let each = (QUEUE_HEADER_BYTES + states).next_multiple_of(QUEUE_ALIGN_BYTES);
    let size_bytes = each * u64::from(request.queues);
    let fd = sys::shared_memory(size_bytes)
        .map_err(|error| Refusal::System("cannot create the inflight area", error))?;
    Ok((describe(size_bytes, request), fd))
}

/// The reply that says there is no area.
pub(super) fn none(request: &InflightArea) -> Vec<u8> {
    describe(0, request)
}

fn describe(size_bytes: u64, request: &InflightArea) -> Vec<u8> {
    let mut out = Vec::with_capacity(size_of::<VhostUserInflight>());
    out.extend_from_slice(&size_bytes.to_ne_bytes());
    out.extend_from_slice(&0u64.to_ne_bytes());
    out.extend_from_slice(&request.queues.to_ne_bytes());
    out.extend_from_slice(&request.queue_size.to_ne_bytes());
    out.resize(size_of::<VhostUserInflight>(), 0);
    out
}

/// Checks that the area that came back lies within its file.
pub(super) fn check(area: &InflightArea, fd: OwnedFd) -> Result<(), Refusal> {
    let end = area.offset_bytes.checked_add(area.size_bytes);
    let file =
        File::from(fd).metadata().map_err(|error| Refusal::System("cannot stat the inflight area", error))?;
    match end {
        Some(end) if end <= file.len() => Ok(()),
        _ => Err(Refusal::Value("the inflight area is longer than its file")),
    }
}
