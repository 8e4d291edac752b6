//! Frames by hand on the LAN: a port of the host's bridge, and the guest's own interface.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::{BRIDGE, Lab, LabError, Netns};
use crate::sys::packet::RawLink;
use crate::sys::tap::{Offload, Tap};

/// Bytes of the header in front of a TAP's frames.
const HEADER_BYTES: usize = 12;
/// Pause between looks at a port without frames.
const POLL: Duration = Duration::from_millis(2);

/// A port of [`BRIDGE`] that sends what it is told and sees what the bridge floods, VLAN tags included.
#[derive(Debug)]
pub struct Port(Tap);

impl Lab {
    /// Adds a port of this name to the bridge.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn bridge_port(&self, name: &str) -> Result<Port, LabError> {
        let io = |e| LabError::Io(format!("port {name}"), e);
        let tap = self.host.inside(|| Tap::open(name, 1, HEADER_BYTES, Offload::default())).map_err(io)?;
        self.ip(&self.host, &format!("link set {name} master {BRIDGE}"))?;
        self.ip(&self.host, &format!("link set {name} up"))?;
        Ok(Port(tap))
    }
}

impl Port {
    /// Sends one frame into the bridge.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.file(0).write_all(&[&[0; HEADER_BYTES][..], frame].concat())
    }

    /// The frames that came and come within `timeout`, until one for which `last` holds and for a little
    /// while after it.
    ///
    /// # Errors
    /// What the kernel answers.
    pub fn frames(&self, timeout: Duration, last: impl Fn(&[u8]) -> bool) -> io::Result<Vec<Vec<u8>>> {
        let mut deadline = Instant::now() + timeout;
        let (mut frames, mut bytes) = (Vec::new(), vec![0; 1 << 17]);
        while Instant::now() < deadline {
            match self.0.file(0).read(&mut bytes) {
                Ok(len) => {
                    let frame = bytes[HEADER_BYTES.min(len)..len].to_vec();
                    if last(&frame) {
                        deadline = deadline.min(Instant::now() + Duration::from_millis(200));
                    }
                    frames.push(frame);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(POLL),
                Err(e) => return Err(e),
            }
        }
        Ok(frames)
    }
}

/// Sends frames from interface `eth0` of `netns`.
///
/// # Errors
/// If the interface cannot be used.
pub fn send_from(netns: &Netns, frames: &[Vec<u8>]) -> io::Result<()> {
    netns.inside(|| {
        let mut link = RawLink::open("eth0")?;
        frames.iter().try_for_each(|frame| link.send(frame))
    })
}

/// What comes to interface `eth0` of `netns` while `work` runs and until a frame for which `last` holds.
///
/// # Errors
/// If the interface cannot be used, or `work` fails.
pub fn seen_at(
    netns: &Netns,
    timeout: Duration,
    last: impl Fn(&[u8]) -> bool + Send + Sync,
    work: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<Vec<Vec<u8>>> {
    netns.inside(|| {
        let mut link = RawLink::open("eth0")?;
        work()?;
        let deadline = Instant::now() + timeout;
        let (mut frames, mut bytes) = (Vec::new(), vec![0; 1 << 17]);
        while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|t| !t.is_zero()) {
            match link.receive(&mut bytes, left) {
                Ok(len) => frames.push(bytes[..len].to_vec()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            }
            if frames.last().is_some_and(|frame| last(frame)) {
                break;
            }
        }
        Ok(frames)
    })
}
