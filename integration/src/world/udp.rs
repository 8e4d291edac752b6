//! The UDP services: one datagram in, any number out.

use std::io;
use std::net::{SocketAddr, UdpSocket};

/// What a service does with a datagram.
pub(super) type Service = fn(&UdpSocket, SocketAddr, &[u8]) -> io::Result<()>;

/// Serves datagrams for ever.
pub(super) fn serve(socket: &UdpSocket, service: Service) {
    let mut datagram = vec![0; 65_536];
    loop {
        // ICMP errors about earlier answers arrive here as well: nothing to do about them.
        let Ok((len, peer)) = socket.recv_from(&mut datagram) else {
            continue;
        };
        if let Err(e) = service(socket, peer, &datagram[..len]) {
            eprintln!("udp to {peer}: {e}");
        }
    }
}

/// Sends the datagram back.
pub(super) fn echo(socket: &UdpSocket, peer: SocketAddr, datagram: &[u8]) -> io::Result<()> {
    socket.send_to(datagram, peer).map(drop)
}

/// Tells the client its address.
pub(super) fn peer(socket: &UdpSocket, peer: SocketAddr, _: &[u8]) -> io::Result<()> {
    socket.send_to(peer.to_string().as_bytes(), peer).map(drop)
}

/// Answers `COUNT SIZE` with COUNT datagrams of SIZE bytes; each starts with its number, 32-bit
/// little-endian.
pub(super) fn burst(socket: &UdpSocket, peer: SocketAddr, datagram: &[u8]) -> io::Result<()> {
    let text = String::from_utf8_lossy(datagram);
    let numbers: Vec<u32> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [count, size] = numbers[..] else {
        return Ok(());
    };
    let mut out = vec![0; size.clamp(4, 65_507) as usize];
    for number in 0..count {
        out[..4].copy_from_slice(&number.to_le_bytes());
        socket.send_to(&out, peer)?;
    }
    Ok(())
}
