//! One query to one upstream, once.
//!
//! Each try has a socket of its own, connected before it is bound to a port, so that the kernel
//! picks a random port and delivers that upstream's datagrams only; and a random id. An answer
//! counts if id and question are the query's. Anything else is ignored and waiting goes on: it may
//! be a forger's, and the answer still to come.
//!
//! Read first: RFC 5452, 4 and 9; RFC 7766, 8.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::control::dns_forward::{Counters, count};
use crate::service::dns::{Transport, question_matches};

/// How long one upstream has to answer, connecting included.
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
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
    fn accept(asked: &[u8], bytes: Vec<u8>) -> Result<Answer, Vec<u8>> {
        let complaint = bytes.len() == HEADER_BYTES
            && asked.len() >= HEADER_BYTES
            && bytes[..2] == asked[..2]
            && bytes[2] & 0x80 != 0
            && bytes[4..6] == [0, 0]
            && matches!(bytes[3] & 0x0f, FORMERR | SERVFAIL | NOTIMP | REFUSED);
        if complaint || question_matches(asked, &bytes) { Ok(Answer(bytes)) } else { Err(bytes) }
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

/// Asks `upstream` over `transport`.
pub(super) async fn ask(
    upstream: SocketAddr,
    query: &[u8],
    transport: Transport,
    counters: &Counters,
) -> Result<Answer, Failure> {
    if query.len() < HEADER_BYTES {
        return Err(Failure::Io(io::ErrorKind::InvalidInput.into()));
    }
    let mut asked = query.to_vec();
    getrandom::fill(&mut asked[..2]).map_err(io::Error::from)?;
    let exchange = async {
        match transport {
            Transport::Udp => ask_udp(upstream, &asked, counters).await,
            Transport::Tcp => ask_tcp(upstream, &asked, counters).await,
        }
    };
    match timeout(TRY_TIMEOUT, exchange).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(Failure::Timeout),
    }
}

async fn ask_udp(upstream: SocketAddr, asked: &[u8], counters: &Counters) -> io::Result<Answer> {
    let socket = Socket::new(Domain::for_address(upstream), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_nonblocking(true)?;
    socket.connect(&upstream.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(asked).await?;
    loop {
        socket.readable().await?;
        // Not before something waits: most of the time of most queries is waiting.
        let mut bytes = Vec::with_capacity(MESSAGE_BYTES_MAX);
        match socket.try_recv_buf(&mut bytes) {
            Ok(_) => {
                bytes.shrink_to_fit();
                match Answer::accept(asked, bytes) {
                    Ok(answer) => return Ok(answer),
                    Err(_) => count(&counters.mismatched),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn ask_tcp(upstream: SocketAddr, asked: &[u8], counters: &Counters) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(upstream).await?;
    stream.write_all(&framed(asked)).await?;
    loop {
        let len_bytes = stream.read_u16().await?;
        let mut bytes = vec![0; usize::from(len_bytes)];
        stream.read_exact(&mut bytes).await?;
        match Answer::accept(asked, bytes) {
            Ok(answer) => return Ok(answer),
            Err(_) => count(&counters.mismatched),
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
