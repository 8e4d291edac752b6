//! Scenarios of the namespace guest: Linux's own stack as vunet's guest, at native speed.
//!
//! They need root and some tools; without them a test says which one is missing and counts as
//! skipped (`CI=true` makes that a failure; `VUNET_SKIP_LOG` names a file that gets a line for each). The binary under test is `VUNET_BIN`, else
//! `target/release/vunet`. Random choices print their seed; `VUNET_SEED` replays one.
//! `VUNET_GUEST_ARGS` adds arguments to every guest, to run all of it with, say, `--features none`;
//! `VUNET_NAT=packet` has vunet translate packets onto a bridge instead of ending connections on sockets.

mod behaviours;
mod bench;
mod benchmark;
mod bounds;
mod capture;
mod congestion;
mod conntrack;
mod control;
mod dns;
mod doctor;
mod ends;
mod features;
mod host_changes;
mod hostile;
mod icmp;
mod lan;
mod lan_guard;
mod lan_uplinks;
mod lease;
mod limits;
mod link;
mod networks;
mod packet_nat;
mod policy;
mod programs;
mod publish;
mod publishing;
mod syscalls;
mod transfer;
