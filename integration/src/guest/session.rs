//! The vhost-user conversation of a front-end, message by message.
//!
//! The `vhost` crate's `Frontend` is too strict for a test guest: it knows no NET_SET_MTU and no
//! SET_STATUS, and refuses to send messages in the order QEMU does. So messages are written here,
//! with that crate's message numbers. Read first: QEMU's `docs/interop/vhost-user.rst`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::features::Features;

const VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;
/// Longest reply body accepted, in bytes: far more than any message here has.
const REPLY_BYTES_MAX: usize = 4096;
/// How long a reply may take before the back-end counts as hung.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// Protocol feature bits this front-end can use.
pub mod protocol {
    /// Multiple queue pairs; GET_QUEUE_NUM.
    pub const MQ: u32 = 0;
    /// Messages can ask for an acknowledgement.
    pub const REPLY_ACK: u32 = 3;
    /// NET_SET_MTU.
    pub const NET_MTU: u32 = 4;
    /// A channel for requests of the back-end.
    pub const BACKEND_REQ: u32 = 5;
    /// GET_CONFIG.
    pub const CONFIG: u32 = 9;
    /// Regions are added one by one with ADD_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u32 = 15;
    /// SET_STATUS.
    pub const STATUS: u32 = 16;
    /// Names and bits.
    pub const NAMES: &[(&str, u32)] = &[
        ("mq", MQ),
        ("reply_ack", REPLY_ACK),
        ("net_mtu", NET_MTU),
        ("backend_req", BACKEND_REQ),
        ("config", CONFIG),
        ("configure_mem_slots", CONFIGURE_MEM_SLOTS),
        ("status", STATUS),
    ];
}

/// A set of vhost-user protocol features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProtocolFeatures(pub u64);

impl ProtocolFeatures {
    /// Every protocol feature this front-end can use.
    pub fn all() -> ProtocolFeatures {
        ProtocolFeatures(protocol::NAMES.iter().fold(0, |set, (_, bit)| set | 1 << bit))
    }

    /// Whether bit `bit` is set.
    pub const fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// Names of the set's bits.
    pub fn names(self) -> Vec<&'static str> {
        protocol::NAMES.iter().filter(|(_, bit)| self.has(*bit)).map(|(name, _)| *name).collect()
    }
}

impl std::str::FromStr for ProtocolFeatures {
    type Err = UnknownProtocolFeature;
    /// `all`, `none` or names separated by commas; a name after `-` takes away.
    fn from_str(text: &str) -> Result<ProtocolFeatures, UnknownProtocolFeature> {
        let mut set = 0;
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, add) = part.strip_prefix('-').map_or((part, true), |name| (name, false));
            let bits = match name {
                "all" => ProtocolFeatures::all().0,
                "none" => 0,
                _ => {
                    let found = protocol::NAMES.iter().find(|(known, _)| *known == name);
                    1 << found.ok_or_else(|| UnknownProtocolFeature(part.to_owned()))?.1
                }
            };
            set = if add { set | bits } else { set & !bits };
        }
        Ok(ProtocolFeatures(set))
    }
}

/// Why a text is no set of protocol features.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "unknown protocol feature {0:?}: expected `all`, `none`, mq, reply_ack, net_mtu, backend_req, config, configure_mem_slots or status"
)]
pub struct UnknownProtocolFeature(String);

/// What goes wrong between front-end and back-end.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The socket could not be had.
    #[error("cannot meet the back-end at {path}: {source}")]
    Meet {
        /// The socket's path.
        path: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Sending or receiving failed, or the back-end left.
    #[error("{request:?}: {source}")]
    Io {
        /// The message under way.
        request: FrontendReq,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A reply that is none.
    #[error("{request:?}: reply has request {got}, flags {flags:#x} and {size} bytes")]
    BadReply {
        /// The message under way.
        request: FrontendReq,
        /// Request number of the reply.
        got: u32,
        /// Its flags.
        flags: u32,
        /// Its size in bytes.
        size: u32,
    },
    /// The back-end refused a message.
    #[error("{0:?} was refused by the back-end with {1}")]
    Refused(FrontendReq, u64),
    /// The back-end lacks what is needed.
    #[error("the back-end {0}")]
    Unfit(String),
}

/// A connection to a back-end.
#[derive(Debug)]
pub(crate) struct Session {
    socket: UnixStream,
    protocol: ProtocolFeatures,
}

impl Session {
    /// Connects to a back-end's socket, waiting up to `patience` for it to be there.
    ///
    /// # Errors
    /// [`SessionError::Meet`].
    pub(crate) fn connect(path: &Path, patience: Duration) -> Result<Session, SessionError> {
        let deadline = Instant::now() + patience;
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => return Session::over(socket, path),
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                Err(source) => return Err(meet_error(path, source)),
            }
        }
    }

    /// Waits for a back-end to connect to `listener`.
    ///
    /// # Errors
    /// [`SessionError::Meet`].
    pub(crate) fn accept(listener: &UnixListener, path: &Path) -> Result<Session, SessionError> {
        let (socket, _) = listener.accept().map_err(|source| meet_error(path, source))?;
        Session::over(socket, path)
    }

    fn over(socket: UnixStream, path: &Path) -> Result<Session, SessionError> {
        socket.set_read_timeout(Some(REPLY_TIMEOUT)).map_err(|source| meet_error(path, source))?;
        Ok(Session { socket, protocol: ProtocolFeatures::default() })
    }

    /// The connection, to see the back-end leave.
    pub(crate) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Protocol features in force.
    pub(crate) fn protocol(&self) -> ProtocolFeatures {
        self.protocol
    }

    fn send(
        &mut self,
        request: FrontendReq,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<(), SessionError> {
        let size = u32::try_from(body.len()).expect("bodies are short");
        let mut message = Vec::with_capacity(12 + body.len());
        for word in [u32::from(request), VERSION | flags, size] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        let sent = self.socket.send_with_fds(&[&message[..]], fds);
        let sent = sent.map_err(|e| io::Error::from_raw_os_error(e.errno()));
        match sent {
            Ok(n) if n == message.len() => Ok(()),
            Ok(_) => {
                let source = io::Error::new(io::ErrorKind::WriteZero, "message sent in part");
                Err(SessionError::Io { request, source })
            }
            Err(source) => Err(SessionError::Io { request, source }),
        }
    }

    fn receive(&mut self, request: FrontendReq) -> Result<Vec<u8>, SessionError> {
        use std::io::Read;
        let io_error = |source| SessionError::Io { request, source };
        let mut head = [0u8; 12];
        self.socket.read_exact(&mut head).map_err(io_error)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (got, flags, size) = (word(0), word(4), word(8));
        let whole = usize::try_from(size).ok().filter(|size| *size <= REPLY_BYTES_MAX);
        let Some(whole) =
            whole.filter(|_| got == u32::from(request) && flags & FLAG_REPLY != 0 && flags & 3 == VERSION)
        else {
            return Err(SessionError::BadReply { request, got, flags, size });
        };
        let mut body = vec![0; whole];
        self.socket.read_exact(&mut body).map_err(io_error)?;
        Ok(body)
    }

    /// Sends a message that has a reply of its own; returns the reply's body.
    ///
    /// # Errors
    /// [`SessionError::Io`] or [`SessionError::BadReply`].
    pub(crate) fn ask(&mut self, request: FrontendReq, body: &[u8]) -> Result<Vec<u8>, SessionError> {
        self.send(request, 0, body, &[])?;
        self.receive(request)
    }

    /// Like [`Self::ask`] for a reply that is one 64-bit number.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) fn ask_u64(&mut self, request: FrontendReq) -> Result<u64, SessionError> {
        let body = self.ask(request, &[])?;
        let bytes = body.as_slice().try_into().map_err(|_| bad_size(request, &body))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Sends a message without a reply of its own; with REPLY_ACK its success is waited for.
    ///
    /// # Errors
    /// [`SessionError::Refused`] if the back-end says so, else as [`Self::ask`].
    pub(crate) fn tell(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<(), SessionError> {
        if !self.protocol.has(protocol::REPLY_ACK) {
            return self.send(request, 0, body, fds);
        }
        self.send(request, FLAG_NEED_REPLY, body, fds)?;
        let body = self.receive(request)?;
        let bytes = body.as_slice().try_into().map_err(|_| bad_size(request, &body))?;
        match u64::from_le_bytes(bytes) {
            0 => Ok(()),
            code => Err(SessionError::Refused(request, code)),
        }
    }

    /// Agrees on protocol features: those of `wanted` the back-end has.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) fn agree_protocol(&mut self, wanted: ProtocolFeatures) -> Result<(), SessionError> {
        let offered = self.ask_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        let agreed = ProtocolFeatures(offered & wanted.0);
        self.tell(FrontendReq::SET_PROTOCOL_FEATURES, &agreed.0.to_le_bytes(), &[])?;
        self.protocol = agreed;
        Ok(())
    }

    /// Features the back-end offers.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub(crate) fn offered(&mut self) -> Result<Features, SessionError> {
        self.ask_u64(FrontendReq::GET_FEATURES).map(Features)
    }

    /// The first 12 bytes of the device's configuration space: MAC, status, pairs, MTU
    /// (virtio 1.3, 5.1.4).
    ///
    /// # Errors
    /// As [`Self::ask`], or [`SessionError::BadReply`] for another length.
    pub(crate) fn config(&mut self) -> Result<[u8; 12], SessionError> {
        let mut body = Vec::new();
        for word in [0u32, 12, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend([0; 12]);
        let reply = self.ask(FrontendReq::GET_CONFIG, &body)?;
        let space = reply.get(12..24).filter(|_| reply.len() == 24);
        space.and_then(|s| s.try_into().ok()).ok_or_else(|| bad_size(FrontendReq::GET_CONFIG, &reply))
    }
}

fn meet_error(path: &Path, source: io::Error) -> SessionError {
    SessionError::Meet { path: path.display().to_string(), source }
}

fn bad_size(request: FrontendReq, body: &[u8]) -> SessionError {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    SessionError::BadReply { request, got: u32::from(request), flags: FLAG_REPLY, size }
}

/// The body of a message about one ring: its number and a value.
pub(crate) fn ring_state(ring: u32, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&ring.to_le_bytes());
    body[4..].copy_from_slice(&value.to_le_bytes());
    body
}

/// Concatenates 64-bit words.
pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
