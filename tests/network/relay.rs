//! Published ports as the host itself reaches them: relayed to the guest, which here is another port of the
//! loopback.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use socket2::Socket;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::time::timeout;
use vunet::config::{Protocol, Publish};
use vunet::control::port_relay::{GuestAddress, Relay};
use vunet::limits::RELAYED_MAX;
use vunet::uplink::published;

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A published port's socket, and its address.
fn bound(protocol: Protocol) -> (Socket, SocketAddr) {
    let mut port = Publish::new(protocol, SocketAddr::from((LOOPBACK, 0)), 80);
    let socket = published::bind(&mut port).unwrap();
    (socket, port.host)
}

fn relay(protocol: Protocol, socket: Socket, guest: GuestAddress, guest_port: u16) -> Relay {
    Relay::new(socket, guest, &Publish::new(protocol, SocketAddr::from((LOOPBACK, 0)), guest_port)).unwrap()
}

fn on_a_runtime(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(Duration::from_secs(20), work).await.expect("it ends in time") });
}

#[test]
fn bytes_and_ends_pass_both_ways() {
    on_a_runtime(async {
        let server = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let (socket, published) = bound(Protocol::Tcp);
        let (_address, guest) = watch::channel(Some(LOOPBACK));
        let _relay = relay(Protocol::Tcp, socket, guest, server.local_addr().unwrap().port());
        let mut client = TcpStream::connect(published).await.unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        client.write_all(&[7; 300_000]).await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = Vec::new();
        served.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, [7; 300_000], "all of it, then the end");
        served.write_all(b"answer after the end").await.unwrap();
        drop(served);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer after the end");
    });
}

#[test]
fn a_connection_nobody_takes_is_reset_and_so_is_its_other_end() {
    on_a_runtime(async {
        let server = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let port = server.local_addr().unwrap().port();
        let (socket, published) = bound(Protocol::Tcp);
        let (address, guest) = watch::channel(None);
        let _relay = relay(Protocol::Tcp, socket, guest, port);
        let ended = async |mut client: TcpStream| client.read(&mut [0]).await.map_err(|error| error.kind());
        let early = TcpStream::connect(published).await.unwrap();
        assert_eq!(ended(early).await, Err(ErrorKind::ConnectionReset), "the guest has no address");
        address.send_replace(Some(LOOPBACK));
        let client = TcpStream::connect(published).await.unwrap();
        let (served, _) = server.accept().await.unwrap();
        socket2::SockRef::from(&served).set_linger(Some(Duration::ZERO)).unwrap();
        drop(served);
        assert_eq!(ended(client).await, Err(ErrorKind::ConnectionReset), "the guest reset it");
        drop(server);
        let refused = TcpStream::connect(published).await.unwrap();
        assert_eq!(ended(refused).await, Err(ErrorKind::ConnectionReset), "nobody listens in the guest");
    });
}

#[test]
fn datagrams_come_back_to_whom_they_answer() {
    on_a_runtime(async {
        let server = UdpSocket::bind((LOOPBACK, 0)).await.unwrap();
        let (socket, published) = bound(Protocol::Udp);
        let (address, guest) = watch::channel(None);
        let _relay = relay(Protocol::Udp, socket, guest, server.local_addr().unwrap().port());
        let clients =
            [UdpSocket::bind((LOOPBACK, 0)).await.unwrap(), UdpSocket::bind((LOOPBACK, 0)).await.unwrap()];
        clients[0].send_to(b"too early", published).await.unwrap();
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        address.send_replace(Some(LOOPBACK));
        let mut buffer = [0; 100];
        for round in 0..3u8 {
            for (n, client) in clients.iter().enumerate() {
                client.send_to(&[round, n as u8], published).await.unwrap();
                let (len, from) = server.recv_from(&mut buffer).await.unwrap();
                assert_eq!(buffer[..len], [round, n as u8]);
                server.send_to(&buffer[..len], from).await.unwrap();
                let (len, from) = client.recv_from(&mut buffer).await.unwrap();
                assert_eq!((&buffer[..len], from), (&[round, n as u8][..], published));
            }
        }
    });
}

#[test]
fn one_connection_past_the_bound_waits_for_another_to_end() {
    on_a_runtime(async {
        let server = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let (socket, published) = bound(Protocol::Tcp);
        let (_address, guest) = watch::channel(Some(LOOPBACK));
        let _relay = relay(Protocol::Tcp, socket, guest, server.local_addr().unwrap().port());
        let mut pairs = Vec::new();
        for _ in 0..RELAYED_MAX {
            let client = TcpStream::connect(published).await.unwrap();
            pairs.push((client, server.accept().await.unwrap()));
        }
        let _one_more = TcpStream::connect(published).await.unwrap();
        let waited = timeout(Duration::from_millis(200), server.accept()).await;
        assert!(waited.is_err(), "one past the bound was relayed");
        drop(pairs.pop());
        server.accept().await.unwrap();
    });
}

#[test]
fn a_relay_that_is_gone_frees_the_port_and_keeps_its_connections() {
    on_a_runtime(async {
        let server = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
        let (socket, published) = bound(Protocol::Tcp);
        let (_address, guest) = watch::channel(Some(LOOPBACK));
        let relayed = relay(Protocol::Tcp, socket, guest, server.local_addr().unwrap().port());
        let mut client = TcpStream::connect(published).await.unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        drop(relayed);
        tokio::task::yield_now().await;
        TcpStream::connect(published).await.expect_err("nobody listens");
        client.write_all(b"on and on").await.unwrap();
        let mut got = [0; 9];
        served.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"on and on");
        published::bind(&mut Publish::new(Protocol::Tcp, published, 80)).expect("the port is free");
    });
}
