//! A vhost-user client that says what the test tells it to, message by message.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq as Req;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::driver::DriverRing;
use super::ram::{FILE_OFFSET, GUEST_BASE, Ram, USER_BASE};
use super::{PATIENCE, eventually};

pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const REPLY_ACK: u64 = 1 << 3;
const NEED_REPLY: u32 = 8;

/// A connected front-end.
pub(crate) struct Frontend {
    pub(crate) stream: UnixStream,
    /// Ask for an acknowledgement of everything.
    pub(crate) ack: bool,
}

/// A reply: payload and descriptors.
pub(crate) struct Answer {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Frontend {
    pub(crate) fn connect(path: &Path) -> Frontend {
        let mut stream = None;
        eventually("the socket takes connections", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        Frontend::new(stream.expect("connected"))
    }

    pub(crate) fn new(stream: UnixStream) -> Frontend {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Frontend { stream, ack: false }
    }

    /// Sends bytes as they are.
    pub(crate) fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) {
        if fds.is_empty() {
            // The back-end may have closed the connection: that is for the test to see.
            let _ = (&self.stream).write_all(bytes);
        } else {
            let _ = self.stream.send_with_fds(&[bytes], fds);
        }
    }

    /// Sends one message.
    pub(crate) fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[RawFd]) {
        self.send_raw(&message(code, flags | 1, payload), fds);
    }

    /// Receives one reply; `None` if the connection is closed.
    pub(crate) fn receive(&self) -> Option<Answer> {
        let mut header = [0u8; 12];
        let mut raw = [-1; 8];
        let mut vectors = [libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: 12 }];
        // SAFETY: the vector describes `header`, which outlives the call.
        let (bytes, count) = unsafe { self.stream.recv_with_fds(&mut vectors, &mut raw) }.ok()?;
        // SAFETY: the kernel just made these descriptors for us.
        let fds = raw[..count].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
        if bytes == 0 {
            return None;
        }
        assert_eq!(bytes, 12, "replies begin with a whole header");
        let size = u32::from_ne_bytes(header[8..12].try_into().expect("four bytes"));
        let mut payload = vec![0; size as usize];
        (&self.stream).read_exact(&mut payload).ok()?;
        Some(Answer { payload, fds })
    }

    /// Whether the back-end closed the connection.
    pub(crate) fn is_closed(&self) -> bool {
        self.receive().is_none()
    }

    /// Sends a request that has a reply of its own and returns it.
    pub(crate) fn ask(&self, code: Req, payload: &[u8]) -> Answer {
        self.send(code.into(), 0, payload, &[]);
        self.receive().unwrap_or_else(|| panic!("{code:?}: the connection was closed"))
    }

    pub(crate) fn ask_u64(&self, code: Req) -> u64 {
        u64::from_ne_bytes(self.ask(code, &[]).payload.try_into().expect("eight bytes"))
    }

    /// Sends a request without a reply; if acknowledgements are on, returns whether it was done.
    pub(crate) fn tell(&self, code: Req, payload: &[u8], fds: &[RawFd]) -> bool {
        if !self.ack {
            self.send(code.into(), 0, payload, fds);
            return true;
        }
        self.send(code.into(), NEED_REPLY, payload, fds);
        let answer = self.receive().unwrap_or_else(|| panic!("{code:?}: the connection was closed"));
        answer.payload == 0u64.to_ne_bytes()
    }

    pub(crate) fn tell_u64(&self, code: Req, value: u64) -> bool {
        self.tell(code, &value.to_ne_bytes(), &[])
    }

    pub(crate) fn tell_ring(&self, code: Req, ring: u16, value: u32) -> bool {
        self.tell(code, &state(ring, value), &[])
    }

    /// Makes sure that everything sent before was handled.
    pub(crate) fn sync(&self) {
        self.ask_u64(Req::GET_FEATURES);
    }

    pub(crate) fn set_mem_table(&self, ram: &Ram) -> bool {
        let payload = [&1u32.to_ne_bytes()[..], &[0; 4], &region(ram)].concat();
        self.tell(Req::SET_MEM_TABLE, &payload, &[ram.fd()])
    }

    pub(crate) fn set_vring_addr(&self, ring: u16, driver: &DriverRing) -> bool {
        let user = |at: usize| driver.ram.user(at).to_ne_bytes();
        let payload = [
            &u32::from(ring).to_ne_bytes()[..],
            &0u32.to_ne_bytes(),
            &user(driver.descriptors_at()),
            &user(driver.used_at()),
            &user(driver.avail_at()),
            &0u64.to_ne_bytes(),
        ]
        .concat();
        self.tell(Req::SET_VRING_ADDR, &payload, &[])
    }

    pub(crate) fn set_vring_fd(&self, code: Req, ring: u16, fd: &impl AsRawFd) -> bool {
        self.tell(code, &u64::from(ring).to_ne_bytes(), &[fd.as_raw_fd()])
    }

    pub(crate) fn get_vring_base(&self, ring: u16) -> u32 {
        let payload = self.ask(Req::GET_VRING_BASE, &state(ring, 0)).payload;
        u32::from_ne_bytes(payload[4..8].try_into().expect("eight bytes"))
    }

    /// Negotiates: protocol features first, then `features`.
    pub(crate) fn negotiate(&mut self, features: u64, protocol_features: u64) {
        let offered = self.ask_u64(Req::GET_FEATURES);
        assert_eq!(features & !offered, 0, "the test wants what is offered");
        if offered & PROTOCOL_FEATURES != 0 && protocol_features != 0 {
            self.ask_u64(Req::GET_PROTOCOL_FEATURES);
            self.tell_u64(Req::SET_PROTOCOL_FEATURES, protocol_features);
            self.ack = protocol_features & REPLY_ACK != 0;
        }
        self.tell(Req::SET_OWNER, &[], &[]);
        self.tell_u64(Req::SET_FEATURES, features);
    }

    /// Sets one ring up and starts it, in the order most front-ends use.
    pub(crate) fn start_ring(&self, ring: u16, driver: &DriverRing) {
        self.tell_ring(Req::SET_VRING_NUM, ring, u32::from(driver.size));
        self.tell_ring(Req::SET_VRING_BASE, ring, u32::from(driver.used_index()));
        self.set_vring_addr(ring, driver);
        self.set_vring_fd(Req::SET_VRING_ERR, ring, &driver.err);
        self.set_vring_fd(Req::SET_VRING_CALL, ring, &driver.call);
        self.set_vring_fd(Req::SET_VRING_KICK, ring, &driver.kick);
    }
}

/// A message's bytes.
pub(crate) fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = payload.len() as u32;
    [&code.to_ne_bytes()[..], &flags.to_ne_bytes(), &size.to_ne_bytes(), payload].concat()
}

/// Ring index and value.
pub(crate) fn state(ring: u16, value: u32) -> Vec<u8> {
    [u32::from(ring).to_ne_bytes(), value.to_ne_bytes()].concat()
}

/// The 32 bytes that describe all of `ram`.
pub(crate) fn region(ram: &Ram) -> Vec<u8> {
    region_of(GUEST_BASE, ram.size() as u64, USER_BASE, FILE_OFFSET)
}

/// The 32 bytes that describe a region.
pub(crate) fn region_of(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    [guest.to_ne_bytes(), size.to_ne_bytes(), user.to_ne_bytes(), offset.to_ne_bytes()].concat()
}

/// One queue pair with memory: what most tests need.
pub(crate) struct Guest {
    pub(crate) ram: Arc<Ram>,
    pub(crate) rx: DriverRing,
    pub(crate) tx: DriverRing,
    /// Where buffers may lie.
    pub(crate) heap: usize,
    pub(crate) features: u64,
}

impl Guest {
    pub(crate) const RAM_BYTES: usize = 32 << 20;

    pub(crate) fn new(size: u16) -> Guest {
        let ram = Ram::new(Guest::RAM_BYTES);
        let rx = DriverRing::new(&ram, 0, size);
        let tx = DriverRing::new(&ram, DriverRing::bytes(size), size);
        let heap = (2 * DriverRing::bytes(size)).next_multiple_of(4096);
        Guest { ram, rx, tx, heap, features: 0 }
    }

    /// Attaches with `features` (and protocol features with acknowledgements, if they are among
    /// them), and starts both rings.
    pub(crate) fn attach(&mut self, frontend: &mut Frontend, features: u64) {
        let protocol = if features & PROTOCOL_FEATURES == 0 { 0 } else { REPLY_ACK | 1 };
        self.features = features;
        frontend.negotiate(features, protocol);
        self.start(frontend);
    }

    /// Hands over memory and starts both rings.
    pub(crate) fn start(&mut self, frontend: &Frontend) {
        for ring in [&mut self.rx, &mut self.tx] {
            ring.event_idx = self.features & (1 << 29) != 0;
        }
        assert!(frontend.set_mem_table(&self.ram));
        frontend.start_ring(0, &self.rx);
        frontend.start_ring(1, &self.tx);
        if self.features & PROTOCOL_FEATURES != 0 {
            frontend.tell_ring(Req::SET_VRING_ENABLE, 0, 1);
            frontend.tell_ring(Req::SET_VRING_ENABLE, 1, 1);
        }
        frontend.sync();
    }

    pub(crate) fn header_bytes(&self) -> usize {
        if self.features & (VERSION_1 | 1 << 15) != 0 { 12 } else { 10 }
    }
}
