//! One query to one upstream, once.
//!
//! Over UDP each try has a socket of its own, connected before it is bound to a port, so that the kernel
//! picks a random port and delivers that upstream's datagrams only; and a random id. An answer
//! counts if id and question are the query's. Anything else is ignored and waiting goes on: it may
//! be a forger's, and the answer still to come. Over TCP the same holds on a connection that others share
//! (`connections`).
//!
//! Read first: RFC 5452, 4 and 9; RFC 7766, 8.

use std::io;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::control::dns_forward::connections::Connections;
use crate::control::dns_forward::upstreams::Try;
use crate::control::dns_forward::{Counters, count};
use crate::service::dns::question_matches;

/// Longest DNS message.
const MESSAGE_BYTES_MAX: usize = 65_535;
const HEADER_BYTES: usize = 12;

const FORMERR: u8 = 1;
const SERVFAIL: u8 = 2;
const NOTIMP: u8 = 4;
const REFUSED: u8 = 5;

/// Why an upstream gave no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing that counts within the time.
    Timeout,
    /// The host's network, or a connection that ended early.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Io(error)
    }
}

/// An upstream's answer, with the id of the try.
#[derive(Debug)]
pub(super) struct Answer(Vec<u8>);

impl Answer {
    /// Takes `bytes` as the answer to `asked`, if they are. A complaint without a question counts
    /// as one: some servers copy nothing of a query they cannot read.
    pub(super) fn accept(asked: &[u8], bytes: Vec<u8>) -> Option<Answer> {
        let complaint = bytes.len() == HEADER_BYTES
            && asked.len() >= HEADER_BYTES
            && bytes[..2] == asked[..2]
            && bytes[2] & 0x80 != 0
            && bytes[4..6] == [0, 0]
            && matches!(bytes[3] & 0x0f, FORMERR | SERVFAIL | NOTIMP | REFUSED);
        (complaint || question_matches(asked, &bytes)).then_some(Answer(bytes))
    }

    /// Whether no other upstream needs to be asked: neither failure nor refusal, and with the
    /// question it answers.
    pub(super) fn is_final(&self) -> bool {
        self.0.len() > HEADER_BYTES && !matches!(self.0[3] & 0x0f, SERVFAIL | REFUSED)
    }

    /// The bytes, with the id of `query` in place of the try's.
    pub(super) fn into_bytes_for(mut self, query: &[u8]) -> Vec<u8> {
        self.0[..2].copy_from_slice(&query[..2]);
        self.0
    }
}

/// Asks the upstream of `one` over UDP, again if no answer comes: the same question, from the same port
/// and with the same id, so that a forger gains nothing by the second.
pub(super) async fn ask_udp(
    one: Try,
    query: &[u8],
    time_max: Duration,
    counters: &Counters,
) -> Result<Answer, Failure> {
    let exchange = async {
        if query.len() < HEADER_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut asked = query.to_vec();
        getrandom::fill(&mut asked[..2])?;
        let socket = Socket::new(
            Domain::for_address(one.addr),
            Type::DGRAM.nonblocking().cloexec(),
            Some(Protocol::UDP),
        )?;
        socket.connect(&one.addr.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        socket.send(&asked).await?;
        let mut pause = one.resend_after;
        loop {
            match timeout(pause, receive(&socket, &asked, counters)).await {
                Ok(answer) => return answer,
                Err(_) => {
                    // Refused now, it may still be answered.
                    let _ = socket.try_send(&asked);
                    pause *= 2;
                }
            }
        }
    };
    match timeout(time_max, exchange).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Failure::Timeout),
    }
}

/// Asks the upstream of `one` over TCP.
pub(super) async fn ask_tcp(
    one: Try,
    query: &[u8],
    time_max: Duration,
    connections: &Connections,
) -> Result<Answer, Failure> {
    if query.len() < HEADER_BYTES {
        return Err(Failure::Io(io::ErrorKind::InvalidInput.into()));
    }
    match timeout(time_max, connections.ask(one.addr, query, time_max)).await {
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Err(Failure::Timeout),
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Failure::Timeout),
    }
}

async fn receive(socket: &UdpSocket, asked: &[u8], counters: &Counters) -> io::Result<Answer> {
    loop {
        // An ICMP error alone makes the socket not readable: without asking for errors too, a
        // closed port would cost the whole time.
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            // It was taken already: forget it, or this loop would spin.
            let _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
        // Not before something waits: most of the time of most queries is waiting.
        let mut bytes = Vec::with_capacity(MESSAGE_BYTES_MAX);
        match socket.try_recv_buf(&mut bytes) {
            Ok(_) => {
                bytes.shrink_to_fit();
                match Answer::accept(asked, bytes) {
                    Some(answer) => return Ok(answer),
                    None => count(&counters.mismatched),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// `message` behind its length, in one piece (RFC 1035, 4.2.2; RFC 7766, 8).
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let len_bytes = u16::try_from(message.len()).expect("no DNS message here is longer than 65,535 bytes");
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend_from_slice(&len_bytes.to_be_bytes());
    bytes.extend_from_slice(message);
    bytes
}
