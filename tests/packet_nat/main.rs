//! The packet NAT: what it changes in a frame, and what becomes of frames that pass it.
//!
//! A failing case is printed shrunk; its seed goes to `tests/packet_nat/*.regressions` and is replayed first by every
//! later run.

mod ahead;
#[path = "../hot_path/allocations.rs"]
mod allocations;
mod conntrack;
mod cut;
mod nat;
mod packets;
mod rewrite;
mod rig;
mod steady;
mod tcp;

use proptest::prelude::ProptestConfig;
use proptest::test_runner::FileFailurePersistence;

/// Random cases of each property.
pub(crate) fn config() -> ProptestConfig {
    let persistence = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { failure_persistence: Some(Box::new(persistence)), ..ProptestConfig::with_cases(512) }
}
