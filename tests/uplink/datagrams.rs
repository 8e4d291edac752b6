//! UDP and ICMP echo sockets.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use socket2::Type;
use vunet::engine::host_net::{HostDatagram, HostNet, Token};
use vunet::frame::{Payload, PayloadMut};
use vunet::uplink::sockets::{Datagram, bind_published};

use crate::{Uplink, loopback, pattern};

const TOKEN: Token = Token(7);

fn receive(socket: &mut Datagram, head: usize, into: usize) -> std::io::Result<(Vec<u8>, SocketAddr)> {
    let (mut first, mut next, mut rest) = (vec![0; head], vec![0; into], vec![0; 65_536]);
    let (len, from) = socket.recv_from(&mut first, PayloadMut::from_host(&mut next), &mut rest)?;
    let mut bytes = [first, next, rest].concat();
    bytes.truncate(len);
    Ok((bytes, from))
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
        for (head, into) in [(0, 1472), (8, 1464), (0, 0), (8, 0)] {
            far.send_to(&pattern(size), near).expect("sent");
            uplink.await_event(TOKEN, |ready| ready.readable);
            let (bytes, from) = receive(&mut socket, head, into).expect("it came");
            assert!(bytes == pattern(size), "{size} bytes into {head} and {into}");
            assert_eq!(from, far.local_addr().expect("an address"));
        }
    }
    assert!(receive(&mut socket, 0, 10).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
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
    let (bytes, from) = receive(&mut socket, 0, 100).expect("it came");
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
    let (bytes, from) = receive(&mut socket, 8, 1400).expect("it came");
    assert_eq!(from.ip(), host);
    assert_eq!((bytes[0], bytes[1], &bytes[6..8]), (0, 0, &[0, 9][..]));
    assert!(bytes[8..] == payload);
}

#[test]
fn a_datagram_for_more_segments_than_one_call_takes_is_given_up_on_and_not_met_again() {
    let mut uplink = Uplink::new(true);
    let mut socket = uplink.net.udp(TOKEN, loopback(0)).expect("a socket");
    let far = UdpSocket::bind(loopback(0)).expect("a socket");
    socket.send_to(&[], &Payload::from_host(b"x"), far.local_addr().expect("an address")).expect("sent");
    let near = far.recv_from(&mut [0; 10]).expect("it came").1;
    far.send_to(b"first", near).expect("sent");
    far.send_to(b"second", near).expect("sent");
    uplink.await_event(TOKEN, |ready| ready.readable);
    let mut memory = [0u8; 1024];
    let base = memory.as_mut_ptr();
    let segments: Vec<libc::iovec> =
        (0..1024).map(|n| libc::iovec { iov_base: base.wrapping_add(n).cast(), iov_len: 1 }).collect();
    // SAFETY: the segments lie in `memory`, which outlives the view and is not touched meanwhile.
    let into = unsafe { PayloadMut::from_guest(&segments) };
    let error = socket.recv_from(&mut [0; 8], into, &mut [0; 100]).expect_err("1,026 segments");
    assert_ne!(error.kind(), ErrorKind::WouldBlock);
    assert_eq!(receive(&mut socket, 0, 100).expect("the next").0, b"second");
}
