//! Every bound of the process, each with its reason. A bound that is met is counted, never fatal.

/// Bytes of a guest frame that are copied once into host memory before anything is judged:
/// Ethernet (14) + IPv4 with all options (60) + TCP with all options (60), rounded up so that an
/// IPv6 header with a fragment header (48) and TCP fit too.
pub const FRAME_HEAD_BYTES: usize = 256;

/// Longest Ethernet frame either way, without the virtio-net header: a 64 KiB IP packet and its
/// Ethernet header (virtio 1.3, 5.1.6.3.1 asks for buffers of 65,562 bytes with the 12-byte header).
pub const FRAME_BYTES_MAX: usize = 65_550;

/// Segments of one frame in guest memory. The kernel's own bound on one `sendmsg` (`UIO_MAXIOV`).
pub const FRAME_SEGMENTS_MAX: usize = 1024;

/// Host ports published to the guest. Each takes a descriptor for good; this many leave most of the
/// usual hard limit on descriptors (524,288) to flows, and a range typed wrongly ends early.
pub const PUBLISHED_PORTS_MAX: usize = 4096;

/// Upstream resolvers given by hand. The C library itself asks three (`MAXNS`); more than a few only
/// add up their time-outs.
pub const DNS_SERVERS_MAX: usize = 8;

/// Local names given by hand: a generous hosts file, searched per query.
pub const DNS_HOSTS_MAX: usize = 1024;
