//! Scenarios of the namespace guest: Linux's own stack as vunet's guest, at native speed.
//!
//! They need root and some tools; without them a test says which one is missing and counts as
//! skipped (`CI=true` makes that a failure). The binary under test is `VUNET_BIN`, else
//! `target/release/vunet`. Random choices print their seed; `VUNET_SEED` replays one.

mod bench;
mod bounds;
mod dns;
mod ends;
mod features;
mod hostile;
mod lease;
mod policy;
mod publish;
mod transfer;
