//! What is carried while the worker's allocations are counted, each first once for warming up.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use vunet::limits;
use vunet::uplink::sys::socket::MESSAGES_MAX;

use crate::guest::{Connection, connect, receive_tcp, receive_udp, send_udp, until};
use crate::rig::{RING_SIZE, Rig};
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

/// What a run came to.
struct Cost {
    /// Of the worker, once warm.
    allocations: u64,
    /// That the guest received meanwhile.
    frames: u64,
}

/// Runs `work` over `flows` connections to servers of one kind: once to warm up, once counted.
fn tcp_cost(
    flows: usize,
    server: fn(TcpStream),
    work: impl Fn(&mut Nic, &mut [Connection], &mut Random),
) -> Cost {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let mut connections = connect(&mut rig.nic, &servers(flows, server), &mut random);
    work(&mut rig.nic, &mut connections, &mut random);
    let received =
        |connections: &[Connection]| connections.iter().map(|one| one.received_frames).sum::<u64>();
    let before = received(&connections);
    let allocations = rig.allocations_during(|nic| work(nic, &mut connections, &mut random));
    assert_eq!(rig.end().dropped_total(), 0, "nothing was dropped");
    let frames = received(&connections) - before;
    println!("{allocations} allocations, {frames} frames to the guest");
    Cost { allocations, frames }
}

#[test]
fn tcp_in_large_frames_from_the_guest_allocates_nothing() {
    let upload = |nic: &mut Nic, connections: &mut [Connection], random: &mut Random| {
        upload(nic, connections, FRAME_PAYLOAD_BYTES, random);
    };
    assert_eq!(tcp_cost(1, sink, upload).allocations, 0);
}

#[test]
fn tcp_in_plain_segments_from_the_guest_allocates_nothing() {
    let upload = |nic: &mut Nic, connections: &mut [Connection], random: &mut Random| {
        upload(nic, connections, 1460, random);
    };
    assert_eq!(tcp_cost(4, sink, upload).allocations, 0);
}

/// The list of flows whose turn ended with more to send is made anew for the batch after, so each such
/// turn, of [`limits::FLOW_BURST_FRAMES`] frames, may cost one allocation. All else costs none. The worker
/// is ahead of what the guest has seen by a ring at most.
fn assert_one_allocation_a_full_turn(cost: &Cost) {
    let turns = (cost.frames + u64::from(RING_SIZE)) / limits::FLOW_BURST_FRAMES as u64;
    assert!(cost.allocations <= turns, "{} allocations in {turns} full turns", cost.allocations);
}

#[test]
fn tcp_to_the_guest_allocates_once_a_full_turn_at_most() {
    assert_one_allocation_a_full_turn(&tcp_cost(1, source, download));
}

#[test]
fn tcp_of_many_flows_to_the_guest_allocates_once_a_full_turn_at_most() {
    assert_one_allocation_a_full_turn(&tcp_cost(4, source, download));
}

#[test]
fn tcp_requests_and_responses_allocate_nothing() {
    assert_eq!(tcp_cost(1, echo, exchange).allocations, 0);
}

#[test]
fn tcp_requests_and_responses_of_eight_flows_allocate_nothing() {
    assert_eq!(tcp_cost(8, echo, exchange).allocations, 0);
}

/// Deadlines are a B-tree's, whose node holds eleven: beyond, a deadline that moves may split one. It
/// moves after a time-out's length, not with a frame, so this stays far below one a round.
#[test]
fn tcp_requests_and_responses_of_forty_flows_allocate_less_than_once_in_forty_exchanges() {
    let Cost { allocations, .. } = tcp_cost(40, echo, exchange);
    assert!(allocations < EXCHANGES as u64, "{allocations} allocations in {EXCHANGES} rounds");
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

#[test]
fn udp_to_the_guest_allocates_nothing() {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let (socket, port) = world_socket();
    rig.nic.post_rx(usize::MAX, &mut random);
    send_udp(&mut rig.nic, 4000, port, b"!", &mut random);
    let (_, back) = socket.recv_from(&mut [0; 2000]).expect("the first datagram");
    let mut bursts = |nic: &mut Nic| {
        for _ in 0..BURSTS {
            for _ in 0..BURST {
                socket.send_to(&[0x55; 1200], back).expect("sent");
            }
            let mut received = 0;
            until("the burst arrives", || {
                received += receive_udp(nic, &mut random).into_iter().filter(|len| *len == 1200).count();
                received == BURST
            });
        }
    };
    bursts(&mut rig.nic);
    assert_eq!(rig.allocations_during(bursts), 0);
}

/// As with TCP, the list of sockets whose turn ended with datagrams waiting is made anew. A turn takes
/// sixteen datagrams as often as [`limits::DATAGRAM_BATCHES`] says.
#[test]
fn a_flood_of_udp_to_the_guest_allocates_once_a_full_turn_at_most() {
    let mut random = Random::seeded();
    let mut rig = Rig::new();
    let (socket, port) = world_socket();
    rig.nic.post_rx(usize::MAX, &mut random);
    send_udp(&mut rig.nic, 4000, port, b"!", &mut random);
    let (_, back) = socket.recv_from(&mut [0; 2000]).expect("the first datagram");
    let mut flood = |nic: &mut Nic| {
        for _ in 0..BURSTS {
            // What a socket of 212,992 bytes holds (768 are charged for each of these), so none is lost.
            for _ in 0..FLOOD {
                socket.send_to(&[0x55; 100], back).expect("sent");
            }
            let mut received = 0;
            until("the flood arrives", || {
                received += receive_udp(nic, &mut random).into_iter().filter(|len| *len == 100).count();
                received == FLOOD
            });
        }
    };
    flood(&mut rig.nic);
    let allocations = rig.allocations_during(flood);
    let turns = (BURSTS * FLOOD / (limits::DATAGRAM_BATCHES * MESSAGES_MAX)) as u64;
    println!("{allocations} allocations in at most {turns} full turns");
    assert!(allocations <= turns, "{allocations} allocations in at most {turns} full turns");
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
