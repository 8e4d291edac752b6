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

/// Addresses one process leases or remembers, offers included. A guest is one machine; a nested
/// bridge or a container host behind it has hundreds of MAC addresses, not thousands, and each
/// entry costs about 100 bytes and one step of the walks a DISCOVER takes.
pub const LEASES_MAX: usize = 1024;

/// Addresses set aside after a DECLINE at one time. Past it the one declined first comes back
/// early, so that a client that declines everything cannot hold more than this of a large pool.
pub const LEASES_DECLINED_MAX: usize = 256;

/// Longest DHCP message read, in bytes. Clients send 300 to 600; no option of theirs needs more
/// than an Ethernet frame.
pub const DHCP_MESSAGE_BYTES_MAX: usize = 1500;

/// Longest DNS query taken, in bytes. A question is at most 271 bytes; padding (RFC 8467) makes
/// queries multiples of 128 and nothing makes them thousands.
pub const DNS_QUERY_BYTES_MAX: usize = 4096;

/// DNS queries of one worker that wait for an upstream at one time: each holds a descriptor for up
/// to [`DNS_UPSTREAMS_MAX`] tries of 2 s. One past it is answered with SERVFAIL.
pub const DNS_QUERIES_MAX: usize = 128;

/// Queries from DNS-over-TCP connections that wait for an upstream at one time; counted apart, so
/// that neither transport can starve the other. One past it is answered with SERVFAIL.
pub const DNS_TCP_QUERIES_MAX: usize = 64;

/// DNS-over-TCP connections of one guest at one time. One past it is refused (RFC 7766, 6.2.2 and
/// 10: clients should need one, servers should bound them).
pub const DNS_STREAMS_MAX: usize = 32;

/// Queries of one DNS-over-TCP connection in work. Past it the connection is not read until one is
/// answered: the client's window closes.
pub const DNS_STREAM_QUERIES_MAX: usize = 16;

/// Upstream resolvers tried for one query, 2 s each. The C library reads three; after 8 s the
/// guest's own resolver has given up.
pub const DNS_UPSTREAMS_MAX: usize = 4;

/// Bytes of `/etc/resolv.conf` that are read.
pub const RESOLV_CONF_BYTES_MAX: u64 = 65_536;
