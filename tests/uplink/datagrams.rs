//! UDP and ICMP echo sockets.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use vunet::config::{Protocol, Publish};
use vunet::engine::host_net::{HostDatagram, HostNet, NetworkError, PacketFields, Token};
use vunet::frame::Payload;
use vunet::uplink::published::bind;
use vunet::uplink::sockets::Datagram;
use vunet::wire::icmpv4::{Message, UnreachableCode};

use crate::{Uplink, loopback, pattern};

const TOKEN: Token = Token(7);

/// What one read gives: senders and datagrams, and whether more may wait.
fn read(socket: &mut Datagram, arrivals_max: usize) -> (Vec<(SocketAddr, Vec<u8>)>, bool) {
    let mut seen = Vec::new();
    let more = socket.recv_batch(arrivals_max, &mut |arrival| {
        if arrival.bytes.is_empty() {
            seen.push((arrival.from, Vec::new()));
        }
        for bytes in arrival.bytes.chunks(arrival.segment_bytes.max(1)) {
            seen.push((arrival.from, bytes.to_vec()));
        }
    });
    (seen, more.expect("no error waits"))
}

/// The one datagram that waits.
fn receive(uplink: &Uplink, socket: &mut Datagram) -> (SocketAddr, Vec<u8>) {
    let start = std::time::Instant::now();
    loop {
        let (mut seen, _) = read(socket, 1);
        match seen.pop() {
            Some(datagram) => return datagram,
            None => assert!(start.elapsed() < Duration::from_secs(10), "nothing came"),
        }
        uplink.events(Duration::from_millis(10));
    }
}

/// A socket, its far end and the address the far end sees.
fn pair(uplink: &mut Uplink) -> (Datagram, UdpSocket, SocketAddr) {
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    far.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    socket.send_to(b"he", &Payload::from_host(b"llo"), far.local_addr().expect("an address")).expect("sent");
    let mut bytes = [0; 100];
    let (len, near) = far.recv_from(&mut bytes).expect("it came");
    assert_eq!(&bytes[..len], b"hello");
    (socket, far, near)
}

#[test]
fn differentiated_services_and_ecn_go_with_datagrams_both_ways() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, near) = pair(&mut uplink);
    let far_end = far.local_addr().expect("an address");
    let far = socket2::Socket::from(far);
    far.set_recv_tos_v4(true).expect("an option of every kernel");
    for tos in [0xb9, 0, 0x02] {
        socket.set_fields(PacketFields { tos, ..PacketFields::default() });
        socket.send_to(b"x", &Payload::from_host(b"y"), far_end).expect("sent");
        assert_eq!(received_tos(&far), tos);
        far.set_tos_v4(u32::from(tos)).expect("an option of every kernel");
        far.send_to(b"answer", &near.into()).expect("sent");
        let mut seen = None;
        for _ in 0..1000 {
            socket.recv_batch(1, &mut |arrival| seen = Some(arrival.tos)).expect("no error waits");
            if seen.is_some() {
                break;
            }
            uplink.events(Duration::from_millis(10));
        }
        assert_eq!(seen, Some(tos));
    }
}

/// The TOS of the datagram that waits, as the kernel tells it to others.
fn received_tos(socket: &socket2::Socket) -> u8 {
    let mut bytes = [std::mem::MaybeUninit::new(0); 16];
    let mut buffers = [socket2::MaybeUninitSlice::new(&mut bytes)];
    let mut control = [std::mem::MaybeUninit::new(0u8); 64];
    let mut message = socket2::MsgHdrMut::new().with_buffers(&mut buffers).with_control(&mut control);
    socket.recvmsg(&mut message, 0).expect("a datagram");
    assert!(message.control_len() > 16, "the kernel says so");
    // SAFETY: all of it was initialised above.
    unsafe { control[16].assume_init() }
}

#[test]
fn datagrams_of_every_size_come_whole_with_their_sender() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, near) = pair(&mut uplink);
    for size in [0, 1, 8, 1472, 1473, 9000, 65_507] {
        far.send_to(&pattern(size), near).expect("sent");
        let (from, bytes) = receive(&uplink, &mut socket);
        assert!(bytes == pattern(size), "{size} bytes");
        assert_eq!(from, far.local_addr().expect("an address"));
    }
    assert_eq!(read(&mut socket, 16), (Vec::new(), false));
}

#[test]
fn many_datagrams_come_in_order_and_the_last_read_says_so() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, near) = pair(&mut uplink);
    for n in 0..100u8 {
        far.send_to(&vec![n; usize::from(n) * 7], near).expect("sent");
    }
    let mut seen = Vec::new();
    loop {
        let (part, more) = read(&mut socket, usize::MAX);
        seen.extend(part);
        if !more {
            break;
        }
    }
    let expected: Vec<_> =
        (0..100u8).map(|n| (far.local_addr().expect("an address"), vec![n; usize::from(n) * 7])).collect();
    assert!(seen == expected);
}

/// `bytes` as a guest's memory holds them: in segments of `segment` bytes.
fn segments(bytes: &[u8], segment: usize) -> Vec<libc::iovec> {
    let iovec = |part: &[u8]| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    bytes.chunks(segment).map(iovec).collect()
}

#[test]
fn queued_datagrams_leave_each_by_itself_whole_and_in_order() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, _) = pair(&mut uplink);
    let other = UdpSocket::bind(loopback(0)).expect("a socket");
    other.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let ends = [&far, &other];
    // Equal ones, shorter ones, empty ones, longer ones, to one end and in between to another.
    let sizes: Vec<(usize, usize)> = (0..100)
        .map(|n| {
            (if n % 13 == 5 { 1 } else { 0 }, [100, 100, 100, 99, 0, 0, 100, 1472, 1472, 1473, 1][n % 11])
        })
        .collect();
    let memory: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(n, (_, len))| vec![n as u8; *len]).collect();
    let iovecs: Vec<Vec<libc::iovec>> = memory.iter().map(|bytes| segments(bytes, 40)).collect();
    for (((end, _), iovecs), expected) in sizes.iter().zip(&iovecs).zip(&memory) {
        // SAFETY: the segments lie in `memory`, which outlives the queue and is not touched.
        let payload = unsafe { Payload::from_guest(iovecs) };
        socket.queue_to(&payload, ends[*end].local_addr().expect("an address")).expect("queued");
        assert_eq!(payload.len(), expected.len());
    }
    assert_eq!(uplink.net.flush_datagrams(), 0, "none was refused");
    for ((end, _), expected) in sizes.iter().zip(&memory) {
        let mut bytes = vec![0; 2000];
        let len = ends[*end].recv(&mut bytes).expect("it came");
        assert!(bytes[..len] == *expected, "{len} bytes instead of {}", expected.len());
    }
}

#[test]
fn segmented_datagrams_leave_each_by_itself_however_many() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, _) = pair(&mut uplink);
    for (total, size) in [(14_720, 1472), (14_721, 1472), (100, 1472), (3000, 1000), (4096, 64), (640, 5)] {
        let bytes = pattern(total);
        let iovecs = segments(&bytes, 777);
        // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
        let payload = unsafe { Payload::from_guest(&iovecs) };
        let to = far.local_addr().expect("an address");
        socket.send_segments_to(&payload, size, to).expect("sent");
        for expected in bytes.chunks(size) {
            let mut bytes = vec![0; 2000];
            let len = far.recv(&mut bytes).expect("it came");
            assert!(bytes[..len] == *expected);
        }
    }
}

#[test]
fn the_largest_datagram_leaves_whole() {
    let mut uplink = Uplink::new(true);
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    far.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    let payload = pattern(65_507);
    socket.send_to(&[], &Payload::from_host(&payload), far.local_addr().expect("an address")).expect("sent");
    let mut bytes = vec![0; 70_000];
    let len = far.recv(&mut bytes).expect("it came");
    assert!(bytes[..len] == payload);
}

#[test]
fn a_closed_port_is_no_error_to_the_socket_that_others_use_too() {
    let mut uplink = Uplink::new(true);
    let closed = UdpSocket::bind(loopback(0)).expect("a port").local_addr().expect("an address");
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    for _ in 0..3 {
        socket.send_to(&[], &Payload::from_host(b"x"), closed).expect("sent");
        std::thread::sleep(Duration::from_millis(5));
    }
    socket.send_to(&[], &Payload::from_host(b"x"), far.local_addr().expect("an address")).expect("sent");
    assert_eq!(far.recv(&mut [0; 10]).expect("it came"), 1);
}

#[test]
fn a_published_port_receives_and_answers_from_where_it_is() {
    let uplink = Uplink::new(true);
    let bound = bind(&mut Publish::new(Protocol::Udp, loopback(0), 80)).expect("bound");
    let address = bound.local_addr().expect("an address").as_socket().expect("an IP address");
    let mut socket = uplink.net.published_udp(TOKEN, bound).expect("a socket");
    let client = UdpSocket::bind(loopback(0)).expect("a socket");
    client.send_to(b"ask", address).expect("sent");
    uplink.await_event(TOKEN, |ready| ready.readable);
    let (from, bytes) = receive(&uplink, &mut socket);
    assert_eq!((&bytes[..], from), (&b"ask"[..], client.local_addr().expect("an address")));
    socket.send_to(&[], &Payload::from_host(b"answer"), from).expect("sent");
    let mut bytes = [0; 100];
    assert_eq!(client.recv_from(&mut bytes).expect("it came"), (6, address));
}

#[test]
fn echoes_reach_loopback_where_the_kernel_allows_them() {
    let mut uplink = Uplink::new(true);
    let host = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mut socket = match uplink.net.ping(TOKEN, host) {
        Ok(socket) => socket,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            eprintln!("skipped: net.ipv4.ping_group_range excludes this process");
            return;
        }
    };
    let request = [8, 0, 0, 0, 0, 7, 0, 9];
    let payload = pattern(3000);
    socket.send_to(&request, &Payload::from_host(&payload), SocketAddr::new(host, 0)).expect("sent");
    uplink.await_event(TOKEN, |ready| ready.readable);
    let (from, bytes) = receive(&uplink, &mut socket);
    assert_eq!(from.ip(), host);
    assert_eq!((bytes[0], bytes[1], &bytes[6..8]), (0, 0, &[0, 9][..]));
    assert!(bytes[8..] == payload);
}

#[test]
fn a_refused_run_is_counted_and_the_next_datagram_tells_why() {
    let mut uplink = Uplink::new(true);
    let (mut socket, ..) = pair(&mut uplink);
    // A socket without permission to broadcast refuses the address.
    let to = SocketAddr::from(([255, 255, 255, 255], 9));
    let iovecs = segments(b"x", 1);
    for _ in 0..3 {
        // SAFETY: the segment is static memory.
        let payload = unsafe { Payload::from_guest(&iovecs) };
        socket.queue_to(&payload, to).expect("queued");
    }
    assert_eq!(uplink.net.flush_datagrams(), 3);
    // SAFETY: the segment is static memory.
    let payload = unsafe { Payload::from_guest(&iovecs) };
    let refused = socket.queue_to(&payload, to).expect_err("it goes alone");
    assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
}

#[test]
fn datagrams_sent_as_one_arrive_as_they_were_cut() {
    let mut uplink = Uplink::new(true);
    let (mut near, far, _) = pair(&mut uplink);
    let (mut other, _, _) = pair(&mut uplink);
    other.send_to(&[], &Payload::from_host(b"where"), far.local_addr().expect("an address")).expect("sent");
    let address = far.recv_from(&mut [0; 10]).expect("it came").1;
    for (total, size) in [(14_720, 1472), (14_721, 1472), (5000, 100), (1000, 1000)] {
        let bytes = pattern(total);
        let iovecs = segments(&bytes, 4000);
        // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
        let payload = unsafe { Payload::from_guest(&iovecs) };
        near.send_segments_to(&payload, size, address).expect("sent");
        let mut received = Vec::new();
        while received.len() < total.div_ceil(size) {
            let (part, _) = read(&mut other, 16);
            received.extend(part.into_iter().map(|(_, bytes)| bytes));
        }
        assert!(received.iter().map(Vec::as_slice).eq(bytes.chunks(size)));
    }
}

/// An error of the network, in memory of its own.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    to: SocketAddr,
    offender: Option<IpAddr>,
    message: Message,
    quoted: Vec<u8>,
}

fn errors(socket: &mut Datagram, errors_max: usize) -> (Vec<Told>, bool) {
    let mut told = Vec::new();
    let more = socket.take_errors(errors_max, &mut |error| {
        let NetworkError { to, offender, message, quoted } = *error;
        told.push(Told { to, offender, message, quoted: quoted.to_vec() });
    });
    (told, more)
}

#[test]
fn a_closed_port_is_told_with_the_datagram_and_who_refused_it() {
    let mut uplink = Uplink::new(true);
    let closed = UdpSocket::bind(loopback(0)).expect("a port").local_addr().expect("an address");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    assert_eq!(errors(&mut socket, 16), (Vec::new(), false));
    for n in 0..3u8 {
        socket.send_to(&[n], &Payload::from_host(b" refused"), closed).expect("sent");
    }
    uplink.await_event(TOKEN, |ready| ready.failed);
    let told = |n: u8| Told {
        to: closed,
        offender: Some(Ipv4Addr::LOCALHOST.into()),
        message: Message::Unreachable { code: UnreachableCode::Port, next_hop_mtu: 0 },
        quoted: [&[n][..], b" refused"].concat(),
    };
    assert_eq!(errors(&mut socket, 2), (vec![told(0), told(1)], true), "no more than asked for");
    assert_eq!(errors(&mut socket, 16), (vec![told(2)], false));
    // Once told it fails no call.
    assert_eq!(read(&mut socket, 16), (Vec::new(), false));
}

#[test]
fn an_error_of_another_datagram_fails_neither_one_alone_nor_a_run() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, _) = pair(&mut uplink);
    let closed = UdpSocket::bind(loopback(0)).expect("a port").local_addr().expect("an address");
    let to = far.local_addr().expect("an address");
    let bytes = pattern(3000);
    let iovecs = segments(&bytes, 1000);
    let mut received = vec![0; 2000];
    for round in 0..3 {
        socket.send_to(&[], &Payload::from_host(b"x"), closed).expect("sent");
        uplink.await_event(TOKEN, |ready| ready.failed);
        // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
        let whole = unsafe { Payload::from_guest(&iovecs) };
        match round {
            0 => socket.send_to(&[], &whole.range(0, 1000), to).expect("sent"),
            1 => (0..3).for_each(|n| socket.queue_to(&whole.range(n * 1000, 1000), to).expect("queued")),
            _ => socket.send_segments_to(&whole, 1000, to).expect("sent"),
        }
        assert_eq!(uplink.net.flush_datagrams(), 0, "none was refused");
        for n in 0..if round == 0 { 1 } else { 3 } {
            assert_eq!(far.recv(&mut received).expect("it came"), 1000);
            assert!(received[..1000] == bytes[n * 1000..][..1000]);
        }
        assert_eq!(errors(&mut socket, 16).0.len(), 1);
    }
}

/// Makes `far` say with how many hops left its datagrams came (`IP_RECVTTL`, ip(7)).
fn ask_for_hops(far: &UdpSocket) {
    let (on, len) = (1i32, size_of::<i32>() as libc::socklen_t);
    let (fd, value) = (far.as_raw_fd(), (&raw const on).cast());
    // SAFETY: `value` is a live integer of the length said.
    let result = unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_RECVTTL, value, len) };
    assert_eq!(result, 0);
}

/// The next datagram at `far`, and its hops left.
fn receive_with_hops(far: &UdpSocket) -> (Vec<u8>, u8) {
    let (mut bytes, mut control) = (vec![0u8; 2000], [0u64; 8]);
    let mut segment = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: `msghdr` is plain data, for which all zeroes is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut segment;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: `header` names live storage of the lengths it says.
    let len = unsafe { libc::recvmsg(far.as_raw_fd(), &mut header, 0) };
    bytes.truncate(usize::try_from(len).expect("it came"));
    // One control message: its length, level and kind, then the hops.
    assert_eq!(control[1], libc::IPPROTO_IP as u64 | (libc::IP_TTL as u64) << 32);
    (bytes, (control[2] & 0xff) as u8)
}

#[test]
fn each_datagram_leaves_with_the_hops_it_was_given_however_it_leaves() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, _) = pair(&mut uplink);
    ask_for_hops(&far);
    let to = far.local_addr().expect("an address");
    let bytes = pattern(1000);
    let iovecs = segments(&bytes, 1000);
    // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
    let payload = unsafe { Payload::from_guest(&iovecs) };
    let hops = [63, 63, 5, 5, 5, 63, 1, 255, 63];
    for (n, ttl) in hops.into_iter().enumerate() {
        socket.set_fields(PacketFields { ttl, dont_fragment: n % 4 == 0, ..PacketFields::default() });
        socket.queue_to(&payload.range(0, 100 + n), to).expect("queued");
    }
    socket.set_fields(PacketFields { ttl: 7, dont_fragment: true, ..PacketFields::default() });
    socket.send_to(b"", &payload, to).expect("sent");
    socket.set_fields(PacketFields { ttl: 8, dont_fragment: true, ..PacketFields::default() });
    socket.send_segments_to(&payload, 500, to).expect("sent");
    assert_eq!(uplink.net.flush_datagrams(), 0, "none was refused");
    let mut seen: Vec<(usize, u8)> = Vec::new();
    for _ in 0..hops.len() + 3 {
        let (bytes, hops) = receive_with_hops(&far);
        seen.push((bytes.len(), hops));
    }
    let queued = hops.into_iter().enumerate().map(|(n, ttl)| (100 + n, ttl));
    let expected: Vec<(usize, u8)> = queued.chain([(1000, 7), (500, 8), (500, 8)]).collect();
    assert_eq!(seen, expected);
}

#[test]
fn the_path_to_loopback_carries_any_packet() {
    let mut uplink = Uplink::new(true);
    assert_eq!(uplink.net.path_mtu(loopback(9)), Some(u16::MAX));
    assert_eq!(uplink.net.path_mtu(loopback(0)), Some(u16::MAX), "an echo has no port");
    // No socket may be connected there: nothing is known.
    assert_eq!(uplink.net.path_mtu(SocketAddr::from(([255, 255, 255, 255], 9))), None);
}

/// The port a far end sees `socket` under.
fn port_of(socket: &mut Datagram) -> u16 {
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    far.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let to = far.local_addr().expect("an address");
    socket.send_to(&[], &Payload::from_host(b"who"), to).expect("sent");
    far.recv_from(&mut [0; 10]).expect("it came").1.port()
}

#[test]
fn a_free_port_is_had_and_a_taken_one_gives_another_of_its_parity() {
    let mut uplink = Uplink::new(true);
    for round in 0..8 {
        let taken = UdpSocket::bind(SocketAddr::from(([0, 0, 0, 0], 0))).expect("a port");
        let wished = taken.local_addr().expect("an address");
        let mut other = uplink.net.udp(Token(round), wished).expect("another port");
        let port = port_of(&mut other);
        assert_ne!(port, wished.port());
        assert_eq!(port % 2, wished.port() % 2);
        drop(taken);
        // Somebody else of this machine may have got it meanwhile, but not again and again.
        let mut socket = uplink.net.udp(Token(100 + round), wished).expect("the port");
        if port_of(&mut socket) == wished.port() {
            return;
        }
    }
    panic!("no free port was had");
}

#[test]
fn a_published_port_on_all_addresses_says_which_was_used_and_answers_from_it() {
    let uplink = Uplink::new(true);
    let bound =
        bind(&mut Publish::new(Protocol::Udp, SocketAddr::from(([0, 0, 0, 0], 0)), 80)).expect("bound");
    let port = bound.local_addr().expect("an address").as_socket().expect("an IP address").port();
    let mut socket = uplink.net.published_udp(TOKEN, bound).expect("a socket");
    let bytes = pattern(3000);
    let iovecs = segments(&bytes, 1000);
    // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
    let whole = unsafe { Payload::from_guest(&iovecs) };
    for last in [1, 2, 77] {
        let host = SocketAddr::from(([127, 0, 0, last], port));
        let client = UdpSocket::bind(loopback(0)).expect("a socket");
        client.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        client.connect(host).expect("connected");
        client.send(b"ask").expect("sent");
        uplink.await_event(TOKEN, |ready| ready.readable);
        let mut used = None;
        socket.recv_batch(16, &mut |arrival| used = arrival.to).expect("it came");
        assert_eq!(used, Some(host.ip()));
        socket.set_fields(PacketFields { from: used, ..PacketFields::default() });
        let to = client.local_addr().expect("an address");
        socket.send_to(&[], &whole.range(0, 1000), to).expect("sent");
        socket.send_segments_to(&whole, 1000, to).expect("sent");
        // Connected, it takes nothing from elsewhere.
        for _ in 0..4 {
            assert_eq!(client.recv(&mut [0; 2000]).expect("it came"), 1000);
        }
    }
}

#[test]
fn a_run_refused_for_its_datagrams_does_not_part_the_runs_after_it() {
    let mut uplink = Uplink::new(true);
    let (mut socket, far, near) = pair(&mut uplink);
    let (mut other, ..) = pair(&mut uplink);
    // Where the other socket is, as its far end saw it.
    other.send_to(&[], &Payload::from_host(b"here"), far.local_addr().expect("an address")).expect("sent");
    let to = far.recv_from(&mut [0; 10]).expect("it came").1;
    assert_ne!(to, near);
    let bytes = pattern(4000);
    let iovecs = segments(&bytes, 1000);
    // SAFETY: the segments lie in `bytes`, which outlives the view and is not touched.
    let whole = unsafe { Payload::from_guest(&iovecs) };
    // No socket without permission to broadcast may send there, in a run or alone.
    let refused = SocketAddr::from(([255, 255, 255, 255], 9));
    (0..4).for_each(|n| socket.queue_to(&whole.range(n * 1000, 1000), refused).expect("queued"));
    assert_eq!(uplink.net.flush_datagrams(), 4);
    socket.queue_to(&whole.range(0, 1000), refused).expect_err("it goes alone and tells why");
    (0..4).for_each(|n| socket.queue_to(&whole.range(n * 1000, 1000), to).expect("queued"));
    assert_eq!(uplink.net.flush_datagrams(), 0);
    let mut lengths = Vec::new();
    while lengths.iter().sum::<usize>() < 4000 {
        uplink.events(Duration::from_millis(100));
        other.recv_batch(16, &mut |arrival| lengths.push(arrival.bytes.len())).expect("no error");
    }
    assert_eq!(lengths, [4000], "one run, as the kernel carries it over loopback");
}
