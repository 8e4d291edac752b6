//! UDP and ICMP echo sockets.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::Type;
use vunet::engine::host_net::{HostDatagram, HostNet, Token};
use vunet::frame::Payload;
use vunet::uplink::sockets::{Datagram, bind_published};

use crate::{Uplink, loopback, pattern};

const TOKEN: Token = Token(7);

fn receive(socket: &mut Datagram) -> std::io::Result<(Vec<u8>, SocketAddr)> {
    let mut got = None;
    socket.recv_batch(1, &mut |arrival| {
        assert_eq!(arrival.segment_bytes, arrival.bytes.len(), "one datagram at a time");
        got = Some((arrival.bytes.to_vec(), arrival.from));
    })?;
    got.ok_or_else(|| ErrorKind::WouldBlock.into())
}

#[test]
fn datagrams_of_every_size_come_whole_with_their_sender() {
    let mut uplink = Uplink::new(true);
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    socket.send_to(b"he", &Payload::from_host(b"llo"), far.local_addr().expect("an address")).expect("sent");
    let mut bytes = [0; 100];
    let (len, near) = far.recv_from(&mut bytes).expect("it came");
    assert_eq!(&bytes[..len], b"hello");
    for size in [0, 1, 8, 1472, 9000, 65_507] {
        far.send_to(&pattern(size), near).expect("sent");
        uplink.await_event(TOKEN, |ready| ready.readable);
        let (bytes, from) = receive(&mut socket).expect("it came");
        assert!(bytes == pattern(size), "{size} bytes");
        assert_eq!(from, far.local_addr().expect("an address"));
    }
    assert!(receive(&mut socket).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
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
    let bound = bind_published(Type::DGRAM, loopback(0)).expect("bound");
    let address = bound.local_addr().expect("an address").as_socket().expect("an IP address");
    let mut socket = uplink.net.published_udp(TOKEN, bound).expect("a socket");
    let client = UdpSocket::bind(loopback(0)).expect("a socket");
    client.send_to(b"ask", address).expect("sent");
    uplink.await_event(TOKEN, |ready| ready.readable);
    let (bytes, from) = receive(&mut socket).expect("it came");
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
    let (bytes, from) = receive(&mut socket).expect("it came");
    assert_eq!(from.ip(), host);
    assert_eq!((bytes[0], bytes[1], &bytes[6..8]), (0, 0, &[0, 9][..]));
    assert!(bytes[8..] == payload);
}

/// A view of `bytes` as if they lay in guest memory.
fn in_guest<'a>(segment: &'a mut [libc::iovec; 1], bytes: &'a [u8]) -> Payload<'a> {
    segment[0] = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the segment is `bytes`, which is borrowed as long as the view.
    unsafe { Payload::from_guest(&segment[..]) }
}

const NO_SEGMENT: [libc::iovec; 1] = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }];

#[test]
fn queued_datagrams_arrive_one_by_one_in_order_whatever_their_lengths() {
    let mut uplink = Uplink::new(true);
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    far.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let to = far.local_addr().expect("an address");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    let lengths: Vec<usize> =
        (0..60).map(|n| [100, 100, 100, 40, 1472, 1472, 0, 1473, 9000, 64][n % 10]).collect();
    let all: Vec<Vec<u8>> = lengths.iter().map(|len| pattern(*len)).collect();
    for bytes in &all {
        socket.queue_to(&in_guest(&mut { NO_SEGMENT }, bytes), to).expect("queued");
    }
    assert_eq!(uplink.net.flush_datagrams(), 0, "none is refused");
    let mut buffer = vec![0; 10_000];
    for bytes in &all {
        let len = far.recv(&mut buffer).expect("it came");
        assert!(buffer[..len] == bytes[..], "{} bytes arrived as {len}", bytes.len());
    }
}

#[test]
fn a_refused_run_is_counted_and_the_next_datagram_tells_why() {
    let mut uplink = Uplink::new(true);
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    // A socket without permission to broadcast refuses the address.
    let to = SocketAddr::from(([255, 255, 255, 255], 9));
    for _ in 0..3 {
        socket.queue_to(&in_guest(&mut { NO_SEGMENT }, b"x"), to).expect("queued");
    }
    assert_eq!(uplink.net.flush_datagrams(), 3);
    let refused = socket.queue_to(&in_guest(&mut { NO_SEGMENT }, b"x"), to);
    assert_eq!(refused.expect_err("alone").kind(), ErrorKind::PermissionDenied);
}

#[test]
fn segments_of_one_payload_arrive_as_datagrams() {
    let mut uplink = Uplink::new(true);
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    far.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut socket = uplink.net.udp(TOKEN, SocketAddr::from(([0, 0, 0, 0], 0))).expect("a socket");
    let payload = pattern(2500);
    let to = far.local_addr().expect("an address");
    socket.send_segments_to(&Payload::from_host(&payload), 1000, to).expect("sent");
    let mut buffer = vec![0; 10_000];
    for part in payload.chunks(1000) {
        let len = far.recv(&mut buffer).expect("it came");
        assert!(buffer[..len] == *part);
    }
}
