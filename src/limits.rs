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

/// Queue pairs of one device. QEMU reads the answer to GET_QUEUE_NUM as pairs, cloud-hypervisor as
/// rings; 16 lets the first bring 16 pairs and the second 8, and a guest of 16 vCPUs is served.
pub const QUEUE_PAIRS_MAX: usize = 16;

/// Rings of one device: two for each pair, and the control queue after the last pair.
pub const VRINGS_MAX: usize = 2 * QUEUE_PAIRS_MAX + 1;

/// Entries of one ring, the specification's own bound (virtio 1.3, 2.7).
pub const RING_SIZE_MAX: u16 = 32_768;

/// Memory regions of one guest: what the kernel's vhost offers by default, and QEMU expects.
pub const MEMORY_SLOTS_MAX: usize = 509;

/// Mapped regions the process watches for SIGBUS: the slots of an old and of a new memory table,
/// alive together while rings move over, and the same again for a second device in one process.
pub const WATCHED_MAPPINGS_MAX: usize = 4 * MEMORY_SLOTS_MAX;

/// Payload bytes of one vhost-user message. The longest legal one is a configuration space of 256
/// bytes with its header, or a memory table of 8 regions; 4 KiB is what other back-ends take.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// File descriptors of one vhost-user message: the kernel's own bound (`SCM_MAX_FD`), so that none
/// is ever cut off and the stream stays readable.
pub const MESSAGE_FDS_MAX: usize = 253;

/// Bytes of the virtio configuration space a front-end may address (`VHOST_USER_MAX_CONFIG_SIZE`).
pub const CONFIG_SPACE_BYTES_MAX: usize = 256;

/// Different complaints about one connection that are logged; later ones are only counted.
pub const COMPLAINTS_PER_CONNECTION_MAX: usize = 32;

/// Commands of one control-queue visit, so that a guest flooding it cannot hold the worker.
pub const CONTROL_COMMANDS_MAX: usize = 64;

/// Bytes of one control command: class, command and the longest body served (MAC tables of 64
/// entries twice, far above what Linux sends before it falls back to promiscuous mode).
pub const CONTROL_COMMAND_BYTES_MAX: usize = 1024;
