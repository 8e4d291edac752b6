//! A DHCP client made of frames, quicker than any program: it asks as soon as there is an interface, and configures nothing.
//!
//! Read first: RFC 2131, sections 2 to 4.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use crate::lab::frame::udp_frame;
use crate::sys::packet::RawLink;

/// Where options begin in a DHCP message, and the cookie in front of them (RFC 2131, section 3).
const OPTIONS_AT: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// A client on `eth0` of the calling thread's network namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct DhcpClient {
    /// Its MAC address.
    pub(super) mac: [u8; 6],
    /// Time until a message is sent again.
    pub(super) retry: Duration,
    /// Pause between looks at whether the interface is there and up.
    pub(super) pause: Duration,
}

/// The DHCP server's answer in a frame: its kind, the address it offers and its own.
fn dhcp_answer(frame: &[u8]) -> Option<(u8, [u8; 4], [u8; 4])> {
    if frame.get(12..14)? != [8, 0] || *frame.get(23)? != 17 || frame.get(36..38)? != [0, 68] {
        return None;
    }
    let message = frame.get(42..)?;
    if message.get(236..240)? != COOKIE {
        return None;
    }
    let offered = message.get(16..20)?.try_into().ok()?;
    let (mut kind, mut server) = (None, None);
    let mut options = message.get(OPTIONS_AT..)?;
    while let [code, len, rest @ ..] = options {
        let value = rest.get(..usize::from(*len))?;
        match code {
            53 => kind = value.first().copied(),
            54 => server = value.try_into().ok(),
            255 => break,
            _ => {}
        }
        options = rest.get(usize::from(*len)..)?;
    }
    Some((kind?, offered, server?))
}

impl DhcpClient {
    /// The one that has a machine for itself.
    pub(super) const HASTY: DhcpClient = DhcpClient {
        mac: [0x52, 0x54, 0, 0, 0, 0x77],
        retry: Duration::from_millis(20),
        pause: Duration::from_micros(200),
    };

    /// Gets a lease as soon as there is an interface; the address.
    ///
    /// # Errors
    /// `TimedOut`, or what opening the interface answers, after `patience`.
    pub(super) fn lease(&self, patience: Duration) -> io::Result<Ipv4Addr> {
        let deadline = Instant::now() + patience;
        let mut link = loop {
            match RawLink::open("eth0") {
                Ok(link) => break link,
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => std::thread::sleep(self.pause),
            }
        };
        let (offered, server) = self.ask(&mut link, &self.frame(DISCOVER, &[]), OFFER, deadline)?;
        let options = [&[50, 4][..], &offered, &[54, 4], &server].concat();
        let (acknowledged, _) = self.ask(&mut link, &self.frame(REQUEST, &options), ACK, deadline)?;
        Ok(acknowledged.into())
    }

    /// A DHCP message of the client in a broadcast frame.
    fn frame(&self, kind: u8, options: &[u8]) -> Vec<u8> {
        let mut message = vec![0; OPTIONS_AT];
        // BOOTREQUEST, Ethernet, 6 bytes of address; any transaction id; broadcast flag.
        message[..4].copy_from_slice(&[1, 1, 6, 0]);
        message[4..8].copy_from_slice(b"vunt");
        message[10] = 0x80;
        message[28..34].copy_from_slice(&self.mac);
        message[236..240].copy_from_slice(&COOKIE);
        message.extend([53, 1, kind]);
        message.extend(options);
        message.push(255);
        message.resize(300, 0);
        let from = (self.mac, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 68));
        udp_frame(from, ([0xff; 6], SocketAddrV4::new(Ipv4Addr::BROADCAST, 67)), &message)
    }

    /// Sends `frame` until an answer of `kind` comes: the address offered and the server's.
    fn ask(
        &self,
        link: &mut RawLink,
        frame: &[u8],
        kind: u8,
        deadline: Instant,
    ) -> io::Result<([u8; 4], [u8; 4])> {
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            // The interface may not be up yet.
            let _ = link.send(frame);
            let again = Instant::now() + self.retry;
            while let Some(left) = again.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            {
                match link.receive(&mut buffer, left) {
                    Ok(len) => {
                        if let Some((answered, offered, server)) = dhcp_answer(&buffer[..len])
                            && answered == kind
                        {
                            return Ok((offered, server));
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    // Not up yet.
                    Err(_) => std::thread::sleep(self.pause),
                }
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_client_sends_is_a_dhcp_message_with_the_options_asked_for() {
        let mut frame = DhcpClient::HASTY.frame(REQUEST, &[54, 4, 10, 0, 2, 1]);
        assert_eq!(dhcp_answer(&frame), None, "it goes to port 67");
        frame[36..38].copy_from_slice(&[0, 68]);
        frame[42 + 16..42 + 20].copy_from_slice(&[10, 0, 2, 2]);
        assert_eq!(dhcp_answer(&frame), Some((REQUEST, [10, 0, 2, 2], [10, 0, 2, 1])));
        for len in 0..frame.len() {
            // Whatever is cut off, it must not panic.
            let _ = dhcp_answer(&frame[..len]);
        }
    }
}
