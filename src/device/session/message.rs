//! Messages on the socket: framing, descriptors, replies.
//!
//! A message is a header of 12 bytes and a payload, in any number of pieces; its descriptors come
//! with some byte of it. The socket never blocks: every wait also watches for shutdown and for the
//! worker's notices. A header that cannot be one means that the stream is out of step, and only
//! that ends the connection.
//!
//! May touch: the connection. Read first: the vhost-user specification, "Message Specification".

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::device::sys::{self, Interest};
use crate::limits::MESSAGE_BYTES_MAX;

/// Bytes of a header: type, flags, payload size, in host order.
const HEADER_BYTES: usize = 12;
/// The only protocol version there is, in the flags' low bits.
const VERSION: u32 = 1;

/// A message as it came.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) code: u32,
    /// The sender asks for an acknowledgement.
    pub(super) need_reply: bool,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why a connection ended.
#[derive(Debug, Error)]
pub(super) enum Ended {
    /// The front-end closed it between messages.
    #[error("the front-end left")]
    Left,
    /// It closed it, or the kernel cut it, within one.
    #[error("the connection broke off within a message")]
    Cut,
    /// The process is to end.
    #[error("shutting down")]
    Shutdown,
    /// Guest memory was lost under a mapping.
    #[error("the front-end truncated the guest's memory")]
    MemoryLost,
    /// What came is no vhost-user message.
    #[error("the stream is out of step: {0}")]
    OutOfStep(#[from] HeaderError),
    /// An answer the front-end waits for could not be given.
    #[error("a request that needs an answer has none")]
    NoAnswer,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The worker is gone.
    #[error(transparent)]
    Worker(#[from] crate::device::command::WorkerGone),
}

/// Why 12 bytes are not a header.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum HeaderError {
    #[error("message version {0} instead of 1")]
    Version(u32),
    #[error("a message of {0} bytes")]
    TooLong(u32),
    #[error("a reply where a request belongs")]
    Reply,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    code: u32,
    need_reply: bool,
    payload_bytes: usize,
}

impl Header {
    fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Header, HeaderError> {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (code, flags, size) = (word(0), word(4), word(8));
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        if flags & VhostUserHeaderFlag::REPLY.bits() != 0 {
            return Err(HeaderError::Reply);
        }
        let payload_bytes = size as usize;
        if payload_bytes > MESSAGE_BYTES_MAX {
            return Err(HeaderError::TooLong(size));
        }
        Ok(Header { code, need_reply: flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0, payload_bytes })
    }
}

/// The front-end's socket, with what else to watch while waiting on it.
#[derive(Debug)]
pub(super) struct Channel {
    stream: UnixStream,
    shutdown: RawFd,
    notice: RawFd,
}

impl Channel {
    /// Takes a connected socket; `shutdown` becomes readable when the process is to end, `notice`
    /// when the worker lost guest memory.
    pub(super) fn new(stream: UnixStream, shutdown: RawFd, notice: RawFd) -> io::Result<Channel> {
        stream.set_nonblocking(true)?;
        Ok(Channel { stream, shutdown, notice })
    }

    /// Receives the next message.
    pub(super) fn receive(&self) -> Result<Message, Ended> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header, &mut fds, true)?;
        let header = Header::parse(header)?;
        let mut payload = vec![0; header.payload_bytes];
        self.fill(&mut payload, &mut fds, false)?;
        Ok(Message { code: header.code, need_reply: header.need_reply, payload, fds })
    }

    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>, starts: bool) -> Result<(), Ended> {
        let mut done = 0;
        while done < buffer.len() {
            self.ready(Interest::Read)?;
            match sys::receive(&self.stream, &mut buffer[done..], fds) {
                Ok(0) if starts && done == 0 => return Err(Ended::Left),
                Ok(0) => return Err(Ended::Cut),
                Ok(count) => done += count,
                Err(error) => after_error(error)?,
            }
        }
        Ok(())
    }

    /// Replies to a message of type `code`.
    pub(super) fn reply(&self, code: u32, payload: &[u8], fd: Option<&OwnedFd>) -> Result<(), Ended> {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        let size = u32::try_from(payload.len()).expect("replies are a few hundred bytes at most");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        for word in [code, flags, size] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(payload);
        let mut fds: &[RawFd] = &fd.map(AsRawFd::as_raw_fd).into_iter().collect::<Vec<_>>();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            self.ready(Interest::Write)?;
            let sent = if fds.is_empty() {
                (&self.stream).write(rest)
            } else {
                self.stream.send_with_fds(&[rest], fds).map_err(io::Error::from)
            };
            match sent {
                Ok(count) => {
                    rest = &rest[count..];
                    fds = &[];
                }
                Err(error) => after_error(error)?,
            }
        }
        Ok(())
    }

    /// Waits until the socket can be read or written, or says why the connection ends instead.
    fn ready(&self, interest: Interest) -> Result<(), Ended> {
        let watched = [
            (self.stream.as_raw_fd(), interest),
            (self.shutdown, Interest::Read),
            (self.notice, Interest::Read),
        ];
        match sys::wait(watched, None)? {
            [_, true, _] => Err(Ended::Shutdown),
            [_, _, true] => Err(Ended::MemoryLost),
            _ => Ok(()),
        }
    }
}

/// Whether a failed call is to be tried again, once the socket is ready.
fn after_error(error: io::Error) -> Result<(), Ended> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Err(Ended::Left),
        _ => Err(Ended::Io(error)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        for (at, word) in [code, flags, size].into_iter().enumerate() {
            out[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
        }
        out
    }

    #[test]
    fn longest_payload_is_taken_and_one_byte_more_refused() {
        let most = MESSAGE_BYTES_MAX as u32;
        assert_eq!(Header::parse(header(24, 1, most)).unwrap().payload_bytes, MESSAGE_BYTES_MAX);
        assert_eq!(Header::parse(header(24, 1, most + 1)), Err(HeaderError::TooLong(most + 1)));
    }

    #[test]
    fn header_of_another_version_is_out_of_step() {
        assert_eq!(Header::parse(header(1, 0, 0)), Err(HeaderError::Version(0)));
        assert_eq!(Header::parse(header(1, 5, 0)), Err(HeaderError::Reply));
        assert!(Header::parse(header(1, 9, 0)).unwrap().need_reply);
    }

    proptest! {
        #[test]
        fn arbitrary_headers_are_judged_without_panicking(bytes in any::<[u8; HEADER_BYTES]>()) {
            if let Ok(header) = Header::parse(bytes) {
                prop_assert!(header.payload_bytes <= MESSAGE_BYTES_MAX);
            }
        }
    }
}
