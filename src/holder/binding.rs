//! A port of the host that the holder binds for a process that has left the host's namespace.
//!
//! The process asks with [`super::ports::bind`]. The answer is a length (16 bits, big endian) and as many bytes of
//! JSON, [`Answer`]; the socket comes with the first of them. It is the process's from then on, which lends it as it
//! lends those it bound itself: the holder keeps none, so that a port outlives the holder.
//!
//! May touch: `uplink::published`. Read first: `ports`, unix(7), SCM_RIGHTS.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use serde::{Deserialize, Serialize};
use socket2::Socket;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::ports::{self, LendError, Stream};
use crate::config::Publish;
use crate::uplink::published::{self, BindError, Obstacle};

/// Bytes of an answer in JSON: an owner's name of 32 characters, each of which may take six.
const ANSWER_BYTES_MAX: usize = 512;

/// What became of a port that was to be bound.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// Here is its socket.
    Bound,
    /// It could not be.
    Refused {
        /// What is in the way.
        why: Obstacle,
        /// The kernel's refusal, as a number.
        errno: i32,
    },
    /// That is no port.
    NotUnderstood,
}

/// Binds `port` and sends it over `stream`, or why it cannot be. Looking for who has it takes a while, and is done aside.
///
/// # Errors
/// The stream's.
pub(super) async fn answer(stream: &mut UnixStream, port: Option<Publish>) -> io::Result<()> {
    let (answer, socket) = match port {
        None => (Answer::NotUnderstood, None),
        Some(mut port) => match tokio::task::spawn_blocking(move || published::bind(&mut port)).await {
            Ok(Ok(socket)) => (Answer::Bound, Some(socket)),
            Ok(Err(BindError { why, source, .. })) => {
                (Answer::Refused { why, errno: source.raw_os_error().unwrap_or(libc::EIO) }, None)
            }
            Err(_) => (Answer::Refused { why: Obstacle::Other, errno: libc::EIO }, None),
        },
    };
    let text = serde_json::to_vec(&answer)?;
    let len = u16::try_from(text.len()).map_err(io::Error::other)?;
    let bytes = [&len.to_be_bytes()[..], &text].concat();
    let sent = match socket {
        Some(socket) => send(stream, &bytes, &socket).await?,
        None => 0,
    };
    stream.write_all(&bytes[sent..]).await
}

/// Sends the first of `bytes`, the socket with them; how many.
async fn send(stream: &UnixStream, bytes: &[u8], socket: &Socket) -> io::Result<usize> {
    loop {
        stream.writable().await?;
        let send = || Stream(stream).send_with_fd(bytes, socket.as_raw_fd()).map_err(io::Error::from);
        match stream.try_io(Interest::WRITABLE, send) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            outcome => return outcome,
        }
    }
}

/// Asks the holder at the other end of `stream` to bind `port`, and puts the port it picked in the place of port 0.
///
/// # Errors
/// [`LendError`]; after any but [`LendError::Bind`] the stream is of no use any more.
pub(super) async fn ask(stream: &mut UnixStream, port: &mut Publish) -> Result<Socket, LendError> {
    stream.write_all(&ports::bind(port)).await?;
    let mut len = [0; 2];
    let socket = receive(stream, &mut len).await?;
    let len = usize::from(u16::from_be_bytes(len));
    if len > ANSWER_BYTES_MAX {
        return Err(LendError::NotUnderstood);
    }
    let mut text = vec![0; len];
    stream.read_exact(&mut text).await?;
    match (serde_json::from_slice(&text), socket) {
        (Ok(Answer::Bound), Some(socket)) => {
            let socket = Socket::from(OwnedFd::from(socket));
            port.host = socket.local_addr()?.as_socket().ok_or(LendError::NotUnderstood)?;
            Ok(socket)
        }
        (Ok(Answer::Refused { why, errno }), _) => {
            let source = io::Error::from_raw_os_error(errno);
            Err(LendError::Bind(Box::new(BindError { port: Box::new(*port), why, source })))
        }
        _ => Err(LendError::NotUnderstood),
    }
}

/// Fills `bytes` and takes the descriptor that comes with them.
async fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Option<File>> {
    let (mut len, mut file) = (0, None);
    while len < bytes.len() {
        stream.readable().await?;
        let rest = &mut bytes[len..];
        let read = || Stream(stream).recv_with_fd(rest).map_err(io::Error::from);
        match stream.try_io(Interest::READABLE, read) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((more, with_it)) => {
                len += more;
                file = with_it.or(file);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::publish::publish;

    fn port(text: &str) -> Publish {
        publish(text).unwrap().iter().next().unwrap()
    }

    async fn asked(wanted: &mut Publish) -> Result<Socket, LendError> {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let holder = tokio::spawn(async move {
            let said = ports::Record::default().read(&there).await.unwrap();
            let Some(ports::Said::Bind(port)) = said else { panic!("{said:?}") };
            answer(&mut there, port).await.unwrap();
        });
        let outcome = ask(&mut here, wanted).await;
        holder.await.unwrap();
        outcome
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_is_bound_at_the_other_end_and_its_refusal_told_whole() {
        let mut wanted = port("udp:127.0.0.1%lo:0:53");
        let socket = asked(&mut wanted).await.unwrap();
        assert_eq!(socket.local_addr().unwrap().as_socket(), Some(wanted.host));
        assert!(wanted.host.port() != 0 && socket.device().unwrap().as_deref() == Some(b"lo"));
        let refused = asked(&mut wanted).await.unwrap_err();
        let LendError::Bind(refused) = refused else { panic!("{refused:?}") };
        let BindError { why: Obstacle::Taken { owner: Some(owner), .. }, source, .. } = *refused else {
            panic!("{refused:?}")
        };
        assert_eq!(source.raw_os_error(), Some(libc::EADDRINUSE));
        assert_eq!(owner.process.as_ref().map(|(pid, _)| *pid), Some(std::process::id()));
        let refused = asked(&mut port("198.51.100.7:0:80")).await.unwrap_err().to_string();
        assert!(refused.contains("no interface of this host has the address"), "{refused}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_holder_that_says_something_else_is_not_believed() {
        for said in [&b"\0\x07nonsens"[..], b"\xff\xff", b"\0\x07\"bound\"", b"\0\x0f\"not_understood\""] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            there.write_all(said).await.unwrap();
            drop(there);
            let error = ask(&mut here, &mut port("0:80")).await.unwrap_err();
            assert!(matches!(error, LendError::NotUnderstood | LendError::Silent(_)), "{error:?}");
        }
    }
}
