//! The holder of a rootless network: the small process that keeps what several virtual machines of one user
//! share.
//!
//! ```text
//!   host's namespace            |  the network's own namespaces (of users, of networks)
//!   host sockets -- engine -- TAP ==== bridge ==== TAP -- vunet -- virtual machine
//!                               |             \=== TAP -- vunet -- virtual machine
//! ```
//!
//! The engine is the gateway of all of them: NAT over host sockets, DHCP from the network's leases, DNS. The
//! bridge is the kernel's, so guests reach each other without the holder, and no virtual machine's death
//! takes anything away. A process of a virtual machine gets the namespaces at the [`door`] and moves into
//! them before it starts a thread.
//!
//! May touch: `engine`, `uplink`, `control`, `service`, `sandbox`.

pub mod door;
pub mod tap_port;
pub mod worker;
