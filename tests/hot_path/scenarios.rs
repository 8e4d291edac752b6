//! What is carried while the worker's allocations are counted, each first once for warming up.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use crate::guest::{Connection, connect, receive_tcp, receive_udp, send_udp, until};
use crate::rig::Rig;
use crate::support::nic::Nic;
use crate::support::{PATIENCE, Random};

/// The longest payload of one frame: 64 KiB less the headers of IP and TCP.
const FRAME_PAYLOAD_BYTES: usize = 65_535 - 40;
/// Carried each way by a bulk scenario.
const BULK_BYTES: usize = 32 << 20;
/// Exchanges of a request/response scenario, each a batch or more.
const EXCHANGES: usize = 500;
/// Datagrams sent at once: fewer than a socket's queue holds, so that none is lost.
const BURST: usize = 32;
const BURSTS: usize = 50;
/// Datagrams that wait in a socket while its turn ends.
const FLOOD: usize = 200;

/// Starts one server a connection, which does `work` with what it accepts.
fn servers(count: usize, work: fn(TcpStream)) -> Vec<SocketAddr> {
    let listeners = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("a listener"));
    let start = |listener: TcpListener| {
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            // The byte that asked for the window.
            stream.read_exact(&mut [0]).expect("a first byte");
            work(stream);
        });
        address
    };
    listeners.map(start).collect()
}

/// Reads for ever; ends with the connection.
fn sink(mut stream: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer).is_ok_and(|len| len > 0) {}
}

/// Writes for ever; ends with the connection.
fn source(mut stream: TcpStream) {
    let buffer = vec![0; 256 << 10];
    while stream.write_all(&buffer).is_ok() {}
}

/// Sends back what comes; ends with the connection.
fn echo(mut stream: TcpStream) {
    stream.set_nodelay(true).expect("an option");
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len) = stream.read(&mut buffer) {
        if len == 0 || stream.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
}

fn upload(nic: &mut Nic, connections: &mut [Connection], frame_bytes: usize, random: &mut Random) {
    let payload = vec![0x55; frame_bytes];
    let mut sent = 0;
    until("all is sent and acknowledged", || {
        for connection in connections.iter_mut() {
            if sent < BULK_BYTES && connection.send(nic, &payload, random) {
                sent += payload.len();
            }
        }
        receive_tcp(nic, connections, random);
        sent >= BULK_BYTES && connections.iter().all(|one| one.in_flight_bytes() == 0)
    });
}

fn download(nic: &mut Nic, connections: &mut [Connection], random: &mut Random) {
    let total = |connections: &[Connection]| connections.iter().map(|one| one.received_bytes).sum::<usize>();
    let goal = total(connections) + BULK_BYTES;
    until("all is received", || {
        receive_tcp(nic, connections, random);
        total(connections) >= goal
    });
}

/// One byte there and back on all connections, [`EXCHANGES`] times.
fn exchange(nic: &mut Nic, connections: &mut [Connection], random: &mut Random) {
    for _ in 0..EXCHANGES {
        let before: Vec<usize> = connections.iter().map(|one| one.received_bytes).collect();
        for connection in connections.iter_mut() {
            assert!(connection.send(nic, b"?", random), "a byte fits the window");
        }
        until("the answers", || {
            receive_tcp(nic, connections, random);
            connections.iter().zip(&before).all(|(one, before)| one.received_bytes == before + 1)
        });
    }
}

/// Runs `work` over `flows` connections to servers of one kind, once to warm up and once more; the
/// worker's allocations the second time.
fn tcp_allocations(
    flows: usize,
    server: fn(TcpStream),
    work: impl Fn(&mut Nic, &mut [Connection], &mut Random),
) -> u64 {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let mut connections = connect(&mut rig.nic, &servers(flows, server), &mut random);
    work(&mut rig.nic, &mut connections, &mut random);
    let allocations = rig.allocations_during(|nic| work(nic, &mut connections, &mut random));
    assert_eq!(rig.end().dropped_total(), 0, "nothing was dropped");
    allocations
}

#[test]
fn tcp_in_large_frames_from_the_guest_allocates_nothing() {
    let upload = |nic: &mut Nic, connections: &mut [Connection], random: &mut Random| {
        upload(nic, connections, FRAME_PAYLOAD_BYTES, random);
    };
    assert_eq!(tcp_allocations(1, sink, upload), 0);
}

#[test]
fn tcp_in_plain_segments_from_the_guest_allocates_nothing() {
    let upload = |nic: &mut Nic, connections: &mut [Connection], random: &mut Random| {
        upload(nic, connections, 1460, random);
    };
    assert_eq!(tcp_allocations(4, sink, upload), 0);
}

#[test]
fn tcp_to_the_guest_allocates_nothing() {
    assert_eq!(tcp_allocations(1, source, download), 0);
}

#[test]
fn tcp_of_many_flows_to_the_guest_allocates_nothing() {
    assert_eq!(tcp_allocations(4, source, download), 0);
}

#[test]
fn tcp_requests_and_responses_allocate_nothing() {
    assert_eq!(tcp_allocations(1, echo, exchange), 0);
}

#[test]
fn tcp_requests_and_responses_of_eight_flows_allocate_nothing() {
    assert_eq!(tcp_allocations(8, echo, exchange), 0);
}

#[test]
fn tcp_requests_and_responses_of_forty_flows_allocate_nothing() {
    assert_eq!(tcp_allocations(40, echo, exchange), 0);
}

/// A UDP socket of the world.
fn world_socket() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let port = socket.local_addr().expect("an address").port();
    (socket, port)
}

#[test]
fn udp_from_the_guest_allocates_nothing() {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let (near, far) = (world_socket(), world_socket());
    let payload = [0x55; 1400];
    let mut bursts = |nic: &mut Nic| {
        for _ in 0..BURSTS {
            for n in 0..BURST {
                let to = if n % 8 == 7 { far.1 } else { near.1 };
                send_udp(nic, 4000, to, &payload, &mut random);
            }
            for n in 0..BURST {
                let socket = if n % 8 == 7 { &far.0 } else { &near.0 };
                assert_eq!(socket.recv(&mut [0; 2000]).expect("a datagram"), payload.len());
            }
        }
    };
    bursts(&mut rig.nic);
    assert_eq!(rig.allocations_during(bursts), 0);
}

/// Sends the guest `count` datagrams of `len` bytes at a time, [`BURSTS`] times to warm up and as often
/// again; the worker's allocations the second time.
fn udp_allocations(count: usize, len: usize) -> u64 {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let (socket, port) = world_socket();
    rig.nic.post_rx(usize::MAX, &mut random);
    send_udp(&mut rig.nic, 4000, port, b"!", &mut random);
    let (_, back) = socket.recv_from(&mut [0; 2000]).expect("the first datagram");
    let payload = vec![0x55; len];
    let mut bursts = |nic: &mut Nic| {
        for _ in 0..BURSTS {
            for _ in 0..count {
                socket.send_to(&payload, back).expect("sent");
            }
            let mut received = 0;
            until("the burst arrives", || {
                received += receive_udp(nic, &mut random).into_iter().filter(|got| *got == len).count();
                received == count
            });
        }
    };
    bursts(&mut rig.nic);
    rig.allocations_during(bursts)
}

#[test]
fn udp_to_the_guest_allocates_nothing() {
    assert_eq!(udp_allocations(BURST, 1200), 0);
}

/// As many as a socket of 212,992 bytes holds (768 are charged for each of these), so none is lost.
#[test]
fn a_flood_of_udp_to_the_guest_allocates_nothing() {
    assert_eq!(udp_allocations(FLOOD, 100), 0);
}

#[test]
fn udp_requests_and_responses_allocate_nothing() {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let (socket, port) = world_socket();
    rig.nic.post_rx(usize::MAX, &mut random);
    let mut exchange = |nic: &mut Nic| {
        for _ in 0..EXCHANGES {
            send_udp(nic, 4000, port, b"?", &mut random);
            let (len, back) = socket.recv_from(&mut [0; 2000]).expect("the request");
            socket.send_to(&[0x55; 100][..len * 100], back).expect("sent");
            until("the response", || receive_udp(nic, &mut random).contains(&100));
        }
    };
    exchange(&mut rig.nic);
    assert_eq!(rig.allocations_during(exchange), 0);
}
