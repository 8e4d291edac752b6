//! Every bound of the process, each with its reason. A bound that is met is counted, never fatal.

use std::num::NonZeroU64;
use std::time::Duration;

/// Bytes of a guest frame that are copied once into host memory before anything is judged:
/// Ethernet (14) + IPv4 with all options (60) + TCP with all options (60), rounded up so that an
/// IPv6 header with a fragment header (48) and TCP fit too.
pub const FRAME_HEAD_BYTES: usize = 256;

/// Longest Ethernet frame either way, without the virtio-net header: a 64 KiB IP packet and its
/// Ethernet header (virtio 1.3, 5.1.6.3.1 asks for buffers of 65,562 bytes with the 12-byte header).
pub const FRAME_BYTES_MAX: usize = 65_550;

/// Segments of one frame in guest memory. The kernel's own bound on one `sendmsg` (`UIO_MAXIOV`).
pub const FRAME_SEGMENTS_MAX: usize = 1024;

/// Frames towards the guest that wait in host memory for receive buffers (gateway answers, resets,
/// errors; TCP data waits in its socket instead). Beyond it they are dropped and counted: each is
/// an answer its asker repeats.
pub const OUTBOX_FRAMES_MAX: usize = 256;

/// Out-of-order or refused TCP payload held for one flow. One window of a fast local sender.
pub const TCP_POOL_FLOW_BYTES_MAX: usize = 1 << 20;

/// The same for all flows of a worker. Beyond it payload is dropped unacknowledged and counted.
pub const TCP_POOL_BYTES_MAX: usize = 16 << 20;

/// Pieces the held payload of one flow may lie in, so that one hostile flow costs bounded work.
pub const TCP_POOL_SEGMENTS_MAX: usize = 512;

/// Ranges of bytes beyond a loss that a guest may say it holds (SACK). A guest names at most four at a
/// time; past this many the highest are sent again.
pub const TCP_SACKED_RANGES_MAX: usize = 64;

/// TCP connections under way in a worker, or half of all flows where that is less: each holds a descriptor
/// for up to two minutes, whoever answers. A guest that opens a hundred a second to hosts a second away has
/// a hundred of them.
pub const TCP_BACKLOG_MAX: usize = 1024;

/// Rates of limits, in bytes a second: 1 kbit/s, at which a large frame takes nine minutes, to 1 Tbit/s.
pub const LIMIT_RATE_BYTES_MIN: u64 = 125;
/// See [`LIMIT_RATE_BYTES_MIN`].
pub const LIMIT_RATE_BYTES_MAX: u64 = 125_000_000_000;

/// Packets or new flows a second of a limit, and what their buckets hold.
pub const LIMIT_PER_SECOND_MAX: u64 = 1_000_000_000;

/// Bytes a limit's bucket holds.
pub const LIMIT_BURST_MAX: u64 = 4 << 30;

/// A limit's bucket is full after so many seconds at the latest: costs are times, which add up to more.
pub const LIMIT_BURST_SECONDS_MAX: u64 = 3600;

/// What a limit's bucket holds at least if nothing is said: a frame of segmentation offload.
pub const LIMIT_FRAME_BYTES: NonZeroU64 = NonZeroU64::new(FRAME_BYTES_MAX as u64).expect("it is not zero");

/// The same in packets: such a frame's segments, and some more.
pub const LIMIT_PACKETS_BURST_MIN: NonZeroU64 = NonZeroU64::new(64).expect("it is not zero");

/// What one flow may use of a limit before the next one's turn, in time at the limit's rate: one that waits long for
/// its turn is slow, small turns cost calls.
pub const LIMIT_TURN: Duration = Duration::from_millis(1);

/// Bytes of such a turn: a packet at least, a large frame at most.
pub const LIMIT_TURN_BYTES_MIN: u64 = 1514;
/// See [`LIMIT_TURN_BYTES_MIN`].
pub const LIMIT_TURN_BYTES_MAX: u64 = FRAME_BYTES_MAX as u64;

/// How long bytes of a flow that its guest was promised to send wait at most for a limit: less than its patience
/// (200 ms with Linux), so that it sends nothing twice.
pub const LIMIT_WINDOW: Duration = Duration::from_millis(100);

/// The largest window of a flow under a limit: it fits its pool, and so do all of a worker together.
pub const LIMIT_WINDOW_BYTES_MAX: usize = TCP_POOL_FLOW_BYTES_MAX / 2;

/// Segments of such a turn at most: a large frame's.
pub const LIMIT_TURN_PACKETS_MAX: u64 = 46;

/// After how long a flow that sends nothing shares a limit no more.
pub const LIMIT_SENDER_IDLE: Duration = Duration::from_millis(100);

/// Acknowledgements a second with which a flow answers what proves nothing: segments outside of the window,
/// resets that are not exact (RFC 5961, 7). A stack that has lost the thread needs one; Linux sends two.
pub const TCP_CHALLENGES_PER_SECOND: u8 = 10;

/// Largest receive window offered to a guest: what a scale of 8 expresses (RFC 7323, 2.3) and more
/// than the kernel's default `tcp_wmem` maximum of 4 MiB can hold.
pub const TCP_WINDOW_BYTES_MAX: usize = 65_535 << 8;

/// Flows of a worker however many descriptors there are; 16-bit ports of a few hundred peers.
pub const FLOWS_MAX: usize = 262_144;

/// Descriptors kept back from flows for each worker: rings, epoll and channels.
pub const RESERVED_FDS_WORKER: usize = 64;

/// Descriptors kept back from flows for DNS: questions under way over both transports, and both ends of
/// one worker's streams, at their bounds. Several workers rarely have as many streams; where they do and
/// descriptors run out, the longest idle flow makes room.
pub const RESERVED_FDS_DNS: usize = 320;

/// Datagrams being reassembled from fragments at once.
pub const REASSEMBLY_DATAGRAMS_MAX: usize = 64;

/// Payload bytes held for all of them. Sixteen datagrams of the largest size.
pub const REASSEMBLY_BYTES_MAX: usize = 16 * 65_535;

/// Fragments of one datagram: 64 KiB at the smallest MTU allowed (576) rounded up.
pub const REASSEMBLY_FRAGMENTS_MAX: usize = 128;

/// Neighbours (guest address to MAC) remembered; one guest with containers bridged behind it.
pub const NEIGHBOURS_MAX: usize = 1024;

/// Flows that begin or end in one batch and are told to who listens; of others only the number is.
pub const FLOW_NEWS_MAX: usize = 1024;

/// ICMP errors towards the guest: burst and sustained rate per second (RFC 1812, 4.3.2.8).
pub const ICMP_ERRORS_BURST: u32 = 64;
/// See [`ICMP_ERRORS_BURST`].
pub const ICMP_ERRORS_PER_SECOND: u32 = 100;

/// Payload of one flow towards the guest before the next flow has its turn: a quarter of the usual ring of
/// 256 buffers of 4 KiB, so that several flows share it. Each turn ends in one discard from the flow's
/// socket and one window update to the world, which smaller turns would multiply (16 flows, of 128 KiB:
/// 0.63 CPU seconds for a GB, of 256 KiB: 0.58).
pub const FLOW_TURN_BYTES: usize = 256 << 10;

/// Frames of one turn, for guests that take small frames only.
pub const FLOW_TURN_FRAMES: usize = 32;

/// Payload of all flows towards the guest in one batch: a quarter of the usual ring, so that the guest
/// works one part while others are filled (16 flows: 10.9 Gbit/s against 9.0 with half of it).
pub const BATCH_BYTES: u64 = 256 << 10;

/// Turns in one batch, so that many flows with a few bytes each hold nothing else up.
pub const BATCH_TURNS: usize = 256;

/// Bytes of one flow's frames from the guest that leave with one system call.
pub const STREAM_RUN_BYTES_MAX: usize = 256 << 10;

/// Frames taken from one transmit ring before sockets and other rings have their turn.
pub const TX_BATCH_FRAMES: usize = 256;

/// Their bytes, as soon as there are so many: large frames would hold everything else up for
/// milliseconds.
pub const TX_BATCH_BYTES: usize = 4 << 20;

/// Frames of a transmit ring that are looked at before the first is handed on, at most: as many as a packet NAT has looked up
/// together.
pub const TX_AHEAD_FRAMES_MAX: usize = PACKET_AHEAD_FRAMES;

/// Batches of datagrams taken from one socket before the next has its turn.
pub const DATAGRAM_BATCHES: usize = 4;

/// Turns of one datagram socket in a row in which every reading failed, until it is left alone: an error
/// the network told of is read once, want of memory again and again.
pub const DATAGRAM_FAILED_TURNS_MAX: u8 = 16;

/// ICMP errors of the world taken from one datagram socket before the next has its turn: each is a system
/// call, and most of a flood would be withheld from the guest anyway ([`ICMP_ERRORS_PER_SECOND`]).
pub const DATAGRAM_ERRORS: usize = 16;

/// Remote endpoints the guest sent datagrams to that are remembered; beyond it the longest idle goes.
pub const DATAGRAM_PEERS_MAX: usize = 65_536;

/// Remote endpoints that sent to the guest first and have no answer yet: clients of published ports, and
/// what filtering lets in. Beyond it the longest idle of them goes, so that a flood of invented senders
/// costs no exchange of the guest's own.
pub const DATAGRAM_STRANGERS_MAX: usize = 8192;

/// Lowest port of the guest's that its host socket asks for too: below, a port of that number on the host
/// means something else (RFC 6335, 6).
pub const PRESERVED_PORT_MIN: u16 = 1024;

/// Connections taken from one listener before others have their turn.
pub const ACCEPT_BURST: usize = 64;

/// Until a listener whose clients could not be taken is tried again: descriptors and memory come back
/// when others give theirs up, of which nobody tells.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Addresses one process leases or remembers, offers included. A guest is one machine; a nested
/// bridge or a container host behind it has hundreds of MAC addresses, not thousands, and each
/// entry costs about 100 bytes and one step of the walks a DISCOVER takes.
pub const LEASES_MAX: usize = 1024;

/// Addresses set aside after a DECLINE at one time. Past it the one declined first comes back
/// early, so that a client that declines everything cannot hold more than this of a large pool.
pub const LEASES_DECLINED_MAX: usize = 256;

/// Addresses of a named network leased, offered or remembered at one time: more guests than a host runs. A
/// newcomer's address costs a walk past all of them.
pub const NETWORK_LEASES_MAX: usize = 4096;

/// Addresses of a named network one guest holds: a machine with a few cards or containers bridged to it.
/// More would let one hostile guest take the usual pool of 253 from the others.
pub const LEASES_PER_GUEST_MAX: usize = 16;

/// Look-ups of a guest's lease in the network's store that its frames cost on one queue: burst, one for each card
/// ([`LEASES_PER_GUEST_MAX`]), and sustained rate per second, whatever the guest sends. Each reads a file that all
/// processes share, for some ten microseconds.
pub const LEASE_LOOK_UPS_BURST: u32 = 16;
/// See [`LEASE_LOOK_UPS_BURST`].
pub const LEASE_LOOK_UPS_PER_SECOND: u32 = 10;

/// Addresses of a named network that rest because one guest declined them; see [`LEASES_PER_GUEST_MAX`].
pub const DECLINED_PER_GUEST_MAX: usize = 8;

/// DHCP messages a guest of a named network may send: burst, and sustained rate per second. Each takes the
/// store from all other processes for a tenth of a millisecond and adds some 12 KiB to its log.
pub const DHCP_MESSAGES_BURST: u32 = 64;
/// See [`DHCP_MESSAGES_BURST`].
pub const DHCP_MESSAGES_PER_SECOND: u32 = 20;

/// How long a worker waits for other processes' transactions: some thousand of them, far more than when 50
/// guests start at once on a busy host. Past it the message is not answered, and the client repeats it. Who
/// asks has no address yet, and so no flow that this would hold up, or renews one twice a day.
pub const STORE_WAIT: Duration = Duration::from_millis(200);

/// The same after a wait that was in vain: whoever holds the store is stopped, not slow.
pub const STORE_WAIT_AFTER_LOCKED: Duration = Duration::from_millis(2);

/// Bytes of the store's log from which on it is written back, which waits for the disk (and is no worker's).
pub const STORE_LOG_BYTES: u64 = 256 << 10;

/// How often it is looked at. At the bound of all messages, one guest adds 7 MiB meanwhile.
pub const STORE_LOG_LOOK: Duration = Duration::from_secs(30);

/// Longest DHCP message read, in bytes. Clients send 300 to 600; no option of theirs needs more
/// than an Ethernet frame.
pub const DHCP_MESSAGE_BYTES_MAX: usize = 1500;

/// Host ports published to the guest. Each takes a descriptor for good; this many leave most of the
/// usual hard limit on descriptors (524,288) to flows, and a range typed wrongly ends early.
pub const PUBLISHED_PORTS_MAX: usize = 4096;

/// Upstream resolvers given by hand. The C library itself asks three (`MAXNS`); more than a few only
/// add up their time-outs.
pub const DNS_SERVERS_MAX: usize = 8;

/// Local names given by hand: a generous hosts file, searched per query.
pub const DNS_HOSTS_MAX: usize = 1024;

/// A file of settings (`--config`). The most names and ports there may be, each on a line of its own, are half
/// of it.
pub const CONFIG_FILE_BYTES_MAX: u64 = 1 << 20;

/// Bytes of the status a service manager is told: systemd passes over a message of more than 4096 whole, and READY=1 with it.
pub const MANAGER_STATUS_BYTES_MAX: usize = 2048;

/// Time after which a service manager is told again what it did not take.
pub const MANAGER_RETRY: Duration = Duration::from_millis(250);

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

/// Longest DNS query taken, in bytes. A question is at most 271 bytes; padding (RFC 8467) makes
/// queries multiples of 128 and nothing makes them thousands.
pub const DNS_QUERY_BYTES_MAX: usize = 4096;

/// DNS queries over UDP of one worker that wait for an answer at one time: a crawler's burst. Identical
/// ones share an upstream question and the others wait for their turn ([`DNS_EXCHANGES_MAX`]), so that
/// one costs memory and no descriptor. One past it is answered with SERVFAIL.
pub const DNS_QUERIES_MAX: usize = 10_000;

/// Queries a worker's forwarder takes before others of the control thread have their turn: other workers'
/// names, signals, news of the host. Known names are answered at once, and a flood of them has no end.
pub const DNS_JOBS_BATCH: usize = 256;

/// Bytes of those queries. Usual ones have 30 to 130 bytes; a guest that pads them all to their bound
/// has a tenth of the queries.
pub const DNS_QUERIES_BYTES_MAX: usize = 4 << 20;

/// Questions on their way to an upstream over UDP at one time, each with a socket and port of its own
/// (RFC 5452, 9.2). The next ones wait for their turn: at 50 ms a question it is 3,800 a second.
pub const DNS_EXCHANGES_MAX: usize = 192;

/// Answers kept for the next who asks; twice what a busy desktop asks for in a day.
pub const DNS_CACHE_ENTRIES_MAX: usize = 8192;

/// Bytes of those answers, with what keeps them: 8,192 of 512 bytes, or 60 of the largest.
pub const DNS_CACHE_BYTES_MAX: usize = 4 << 20;

/// Queries from DNS-over-TCP connections that wait for an upstream at one time; counted apart, so
/// that neither transport can starve the other. One past it is answered with SERVFAIL.
pub const DNS_TCP_QUERIES_MAX: usize = 64;

/// DNS-over-TCP connections of one guest at one time. One past it is refused (RFC 7766, 6.2.2 and
/// 10: clients should need one, servers should bound them).
pub const DNS_STREAMS_MAX: usize = 32;

/// Queries of one DNS-over-TCP connection in work. Past it the connection is not read until one is
/// answered: the client's window closes.
pub const DNS_STREAM_QUERIES_MAX: usize = 16;

/// Upstream resolvers tried for one query, 2 s each unless the host says otherwise. The C library reads
/// three; after 8 s the guest's own resolver has given up.
pub const DNS_UPSTREAMS_MAX: usize = 4;

/// Connections to one upstream. One carries many questions, but some servers answer them one after the
/// other, or close after each.
pub const DNS_CONNECTIONS_MAX: usize = 4;

/// Domains of the host's search list: what the C library itself took before its bound was lifted
/// (`MAXDNSRCH`, 6). A short name of the guest is a question for each.
pub const DNS_SEARCH_DOMAINS_MAX: usize = 6;

/// Bytes of `/etc/resolv.conf` that are read.
pub const RESOLV_CONF_BYTES_MAX: u64 = 65_536;

/// Frames of the guest that wait for their flow to come from another worker. A flow comes within a
/// wake-up; a guest that spreads one flow over its queues on purpose loses frames, not memory.
pub const AWAITING_FRAMES_MAX: usize = 256;

/// Letters under way from one worker to another; those that wait for room there; those a worker reads before
/// frames and sockets have their turn. Past it frames for another worker are dropped.
pub const LETTERS_MAX: usize = 1024;

/// Bytes of frames of a link under way from one worker to others, wherever they wait: as many as letters of Ethernet's
/// size, with room for some of the largest.
pub const HANDED_BYTES_MAX: usize = 4 << 20;

/// Datagrams one frame of the guest may be cut into (UDP segmentation offload): what Linux sends at
/// most (`UDP_MAX_SEGMENTS`). Unbounded, a frame of 64 KiB would be 65,507 system calls.
pub const USO_SEGMENTS_MAX: usize = 128;

/// Links, addresses and routes of the host that are remembered, to tell news from repetition. Past it all
/// are forgotten, and each is news once more.
pub const HOST_ITEMS_KNOWN_MAX: usize = 4096;

/// Addresses of which it is remembered whether they are the host's own. Past it all are forgotten and
/// asked for anew.
pub const OWN_ADDRESSES_KNOWN_MAX: usize = 1024;

/// Datagrams of one guest's port that are copied to another worker before the socket is asked for: a
/// thread of the guest that moved to another CPU stays there, one of several that share a socket does not.
pub const SENT_ON_FRAMES: usize = 16;

/// Guest's ports of which such datagrams are counted; past it counting begins anew.
pub const SENT_ON_ENDS_MAX: usize = 1024;

/// Remote endpoints a datagram socket may have to move to another worker; with more it stays.
pub const MOVED_PEERS_MAX: usize = 1024;

/// Bytes of a named network's definition that are read; it has a dozen short lines.
pub const NETWORK_FILE_BYTES_MAX: u64 = 65_536;

/// Bytes of what a process notes about itself in a network's run folder: 4,096 published ports of 60 bytes.
pub const NETWORK_USER_FILE_BYTES_MAX: u64 = 1 << 20;

/// Processes that use one named network: each has a port of its bridge, and Linux gives a bridge 1,023.
pub const NETWORK_USERS_MAX: usize = 1023;

/// Interfaces whose forwarding is switched at one time, over all namespaces that share a state directory: far more than
/// a host has ways to the world. Past it an interface is let be, and replies by it do not arrive.
pub const FORWARDING_ENTRIES_MAX: usize = 256;

/// Connections at one time, and senders of datagrams, that one process relays from a published port to its guest on a
/// named network. Only the host's own go this way, the world's are redirected by the kernel. One past it waits,
/// a datagram past it is dropped.
pub const RELAYED_MAX: usize = 256;

/// Bytes of the largest datagram: UDP over IPv4 less both headers (RFC 768, RFC 791).
pub const DATAGRAM_BYTES_MAX: usize = 65_507;

/// Frames taken from one TAP queue before the guest's own frames have their turn.
pub const LINK_BATCH_FRAMES: usize = 64;

/// Frames of a link are read ahead of their translation while they are no longer than this: a longer one is dearer to copy.
pub const LINK_AHEAD_FRAME_BYTES: usize = 512;

/// Frames for a guest without receive buffers that are taken out of the TAP queue, so that what is our own station's
/// behind them is heard: as many as a card's ring of 256 holds. Past it they are dropped, as there.
pub const STARVED_FRAMES_MAX: usize = 256;

/// Bytes of them: as many of Ethernet's size, or some of the largest.
pub const STARVED_BYTES_MAX: usize = 1 << 20;

/// First bytes of a frame from a link that are read into host memory, to be judged: Ethernet with a tag
/// (18), IPv6 (40), and a neighbour advertisement with its option (32), rounded up.
pub const LINK_HEAD_BYTES: usize = 128;

/// The same while the guest waits for an answer of the LAN's DHCP server, whose options may fill an Ethernet
/// frame.
pub const LINK_LONG_HEAD_BYTES: usize = 1514;

/// Hosts of a link that are remembered while packets are translated onto it: a full /22.
pub const STATION_NEIGHBOURS_MAX: usize = 1024;

/// Questions for hosts of a link nobody is known to have, at once and each second in the long run: every host of the link
/// hears them. A guest that scans it gets no further; a busy one meets a few new hosts a second.
pub const STATION_QUESTIONS_BURST: u32 = 128;
/// See [`STATION_QUESTIONS_BURST`].
pub const STATION_QUESTIONS_PER_SECOND: u32 = 50;

/// Echo requests to our address on a link that are answered, at once and each second in the long run: somebody looks
/// whether it is there, a ping in flood mode included.
pub const STATION_ECHOES_BURST: u32 = 64;
/// See [`STATION_ECHOES_BURST`].
pub const STATION_ECHOES_PER_SECOND: u32 = 1000;

/// Frames that wait for the MAC address of their next hop: first packets of a page's connections (RFC 1122,
/// 2.3.2.2 asks for one at least).
pub const PARKED_FRAMES_MAX: usize = 32;

/// Bytes of them.
pub const PARKED_BYTES_MAX: usize = 256 << 10;

/// Frames of our own station that wait to be sent: answers to a flood of ARP are dropped beyond.
pub const STATION_OUTBOX_MAX: usize = 64;

/// IPv4 addresses of one guest on a link: containers with leases of their own behind one MAC address.
pub const GUARD_IPV4_MAX: usize = 64;

/// IPv6 addresses of one guest on a link: link-local, and for each of a few prefixes a stable one and a week
/// of temporary ones (RFC 8981), twice over.
pub const GUARD_IPV6_MAX: usize = 64;

/// Leases of all stations of a link that a guard remembers: of each of [`STATION_FILES_MAX`] a few.
pub const GUARD_KEPT_MAX: usize = 4096;

/// Stations of links whose leases by the LAN's DHCP are kept, and known to one process: a file each, more than a
/// host has guests.
pub const STATION_FILES_MAX: usize = 1024;

/// Bytes of such a file: [`GUARD_IPV4_MAX`] leases of 60 bytes.
pub const STATION_FILE_BYTES_MAX: u64 = 16_384;

/// Questions of the guest to a DHCP server that may still have an answer.
pub const GUARD_QUESTIONS_MAX: usize = 8;

/// Processes that use one rootless network at a time: a subnet of /24 has 253 addresses for guests, and each
/// process costs the holder a descriptor.
pub const HOLDER_USERS_MAX: usize = 256;

/// How long a holder may take to let a process into its network: it has only two descriptors to send.
pub const HOLDER_ANSWER: Duration = Duration::from_secs(5);

/// Packets passing a packet NAT in fragments, each way, whose first fragment's way is remembered: 15 s of 270 a
/// second, 64 KiB datagrams at 140 Mbit/s. Past it the oldest is forgotten, which at such rates has long passed.
pub const PACKET_FRAGMENTED_MAX: usize = 4096;

/// Fragments that overtook their packet's first one and wait for it, each way: those of one 64 KiB datagram
/// whose first came last (45 at Ethernet's MTU). Past it the one that waited longest is lost.
pub const PACKET_FRAGMENTS_HELD_MAX: usize = 64;

/// Their bytes: as many of Ethernet's size, and a few of the largest.
pub const PACKET_FRAGMENTS_HELD_BYTES_MAX: usize = 256 << 10;

/// Flows there are in any case, however few descriptors there are: a guest with none could not even ask for a name.
pub const FLOWS_MIN: usize = 16;

/// Flows of each of `workers` that the open files limit leaves room for, beside everything else and
/// the published ports.
pub fn flows_max(open_files: u64, published: usize, workers: usize) -> usize {
    let open_files = usize::try_from(open_files).unwrap_or(usize::MAX);
    let reserved = RESERVED_FDS_DNS + RESERVED_FDS_WORKER * workers + published;
    (open_files.saturating_sub(reserved) / workers).clamp(FLOWS_MIN, FLOWS_MAX)
}

/// Flows of one process that translates packets: 160 MiB, which become resident as flows come.
pub const PACKET_FLOWS_MAX: usize = 1 << 20;

/// Most flows a packet NAT can be told to hold for a worker: what the 24 bits of its indices' slots name.
pub const PACKET_FLOWS_BOUND: usize = (1 << 24) - 2;

/// Flows of a worker's packet NAT whose frames from other workers are counted, by the place of the flow; and flows that have moved
/// lately and are remembered.
pub const PACKET_HANDED_FLOWS: usize = 64;

/// Frames in a row another worker has to hand over before the flow moves there: as with datagram sockets. Moving costs
/// about as much as handing over two, so that a guest which sends of one flow by two queues in turn pays an eighth more.
pub const PACKET_HANDED_FRAMES: u8 = 16;

/// Buckets of eight slots of an empty index of flows, a power of two: half a page.
pub const PACKET_INDEX_BUCKETS_MIN: usize = 64;

/// Buckets in a row, each full, after which an index of flows gets a new key. At half load one bucket in twenty is
/// full, so that random keys meet twelve in a row with a probability far below one in a billion.
pub const PACKET_INDEX_PROBES_MAX: usize = 12;

/// Flows a packet NAT remembers of each direction before it asks its index: 32 KiB. Beside an index of four bytes a slot a
/// cache gains little: one flow 6 ns instead of 10, 1,024 of a million 20 to 30 percent; four thousand entries lose
/// a few nanoseconds where 65,536 are in use at random, and a thousand lose more where 1,024 are.
pub const PACKET_CACHE_ENTRIES: usize = 4096;

/// Packets whose flows a packet NAT has fetched before it looks up the first: as many misses as a core has under way (10 to
/// 16). Eight wait longer, 64 gain nothing.
pub const PACKET_AHEAD_FRAMES: usize = 16;

/// Flows from which on that is worth its 10 ns a packet: fewer lie, with their indices, in a cache of 2 MiB a core.
pub const PACKET_AHEAD_FLOWS_MIN: usize = 8192;

/// Flows a packet NAT looks at in one turn because their time may have come: each may cost several cache misses, all
/// of them some 50 us.
pub const PACKET_TIMERS_EXAMINED: usize = 256;

/// Ports of an exhausted range that are looked at for one new flow, each with a lookup in the worker's table. The next flow
/// goes on where this one stopped, so that the repetitions of a first packet come to all of them.
pub const PACKET_PORTS_TRIED: usize = 1024;

/// Bytes of the ring between a worker and a capture's writer: what a worker moves at 20 Gbit/s in 3 ms, which a writer of a busy
/// host may have to wait for its CPU.
pub const CAPTURE_RING_BYTES_MAX: usize = 8 << 20;

/// The same of all workers together, so that a capture of many queues does not take memory as it likes.
pub const CAPTURE_RINGS_BYTES: usize = 32 << 20;

/// Bytes of records of one batch that are shown to a capture's writer before its end: they stay in the cache of a core.
pub const CAPTURE_STAGED_BYTES: usize = 256 << 10;

/// Bytes of records a worker can hold back: beside those above what is answered while one frame of the guest is judged.
pub const CAPTURE_STAGED_BYTES_MAX: usize = CAPTURE_STAGED_BYTES + 4 * FRAME_BYTES_MAX;

/// Bytes after which a worker wakes a capture's writer: an eighth of its ring.
pub const CAPTURE_WAKE_BYTES: usize = CAPTURE_RING_BYTES_MAX / 8;

/// How often a capture's writer looks for frames when nobody wakes it.
pub const CAPTURE_LOOK: Duration = Duration::from_millis(20);

/// How long blocks of a capture may wait for more before they are written.
pub const CAPTURE_FLUSH: Duration = Duration::from_millis(50);

/// Bytes of blocks after which they are written at once.
pub const CAPTURE_WRITE_BYTES: usize = 256 << 10;

/// How long the rest of a capture that is to end may take whoever reads it.
pub const CAPTURE_END: Duration = Duration::from_secs(1);

/// Pieces of a streamed capture, of 256 KiB each, that wait for its client.
pub const CAPTURE_STREAM_PIECES: usize = 4;

/// Bytes of the log that wait for who reads standard error, and as many again that are being written: some two thousand
/// lines, which is more than a burst at level debug. Beyond it lines are lost and counted, and no thread waits.
pub const LOG_QUEUE_BYTES_MAX: usize = 256 << 10;

/// Bytes kept back there for why the process ends: a panic with its backtrace.
pub const LOG_LAST_WORDS_BYTES_MAX: usize = 16 << 10;

/// Resets of a packet NAT that wait to be sent: of all connections that one step of ending them comes to, two for each
/// end. Past it ends are not told.
pub const PACKET_RESETS_MAX: usize = 4 * crate::engine::flows::ENDED_LOOKED_AT_MAX;

/// Resets sent in one batch.
pub const PACKET_RESETS_AT_ONCE: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flow_bound_leaves_descriptors_for_everything_else() {
        assert_eq!(flows_max(1024, 0, 1), 640);
        assert_eq!(flows_max(1024, 100, 1), 540);
        assert_eq!(flows_max(1024, 0, 4), 112);
        assert_eq!(flows_max(64, 4096, 1), 16);
        assert_eq!(flows_max(u64::MAX, 4096, 2), FLOWS_MAX);
    }
}
