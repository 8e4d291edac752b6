//! The bound of any path between two TAPs: one thread that copies frames from one to the other.
//!
//! It looks at nothing: headers of offloads go across as they come.

use std::fs::File;
use std::io::{self, Read, Write};

use serde_json::json;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::sys::netns;
use crate::sys::tap::{Offload, Tap};

/// Frames copied one way before the other gets its turn.
const BATCH: usize = 64;
/// Length of the virtio-net header with `num_buffers` (virtio 1.3, 5.1.6).
const HEADER_BYTES: usize = 12;
/// Longest frame with its header.
const FRAME_BYTES: usize = HEADER_BYTES + 14 + 65_535;

/// Makes TAP `a` and TAP `b`, each `(namespace, name)`, and copies frames between them for ever.
/// Prints `{"ready":true}` when both are up.
///
/// # Errors
/// If a TAP cannot be made or read.
pub fn run(a: (&str, &str), b: (&str, &str), ip_mtu: u16) -> io::Result<()> {
    let open = |(namespace, name): (&str, &str)| -> io::Result<Tap> {
        netns::enter(namespace)?;
        let offload = Offload { csum: true, tso4: true, tso6: true, ecn: true, uso: true };
        let tap = Tap::open(name, 1, HEADER_BYTES, offload)?;
        tap.set_ip_mtu(ip_mtu)?;
        tap.set_up()?;
        Ok(tap)
    };
    let (a, b) = (open(a)?, open(b)?);
    let epoll = Epoll::new()?;
    for fd in [a.fd(0), b.fd(0)] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, u64::from(fd.unsigned_abs())))?;
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{}", json!({ "ready": true })).and_then(|()| out.flush())?;
    drop(out);
    copy(&epoll, a.file(0), b.file(0))
}

fn copy(epoll: &Epoll, a: &File, b: &File) -> io::Result<()> {
    let mut frame = vec![0; FRAME_BYTES];
    let mut events = [EpollEvent::default(); 2];
    loop {
        if let Err(e) = epoll.wait(-1, &mut events)
            && e.kind() != io::ErrorKind::Interrupted
        {
            return Err(e);
        }
        while copy_batch(a, b, &mut frame)? + copy_batch(b, a, &mut frame)? > 0 {}
    }
}

fn copy_batch(mut from: &File, mut to: &File, frame: &mut [u8]) -> io::Result<usize> {
    for count in 0..BATCH {
        match from.read(frame) {
            // What the other side cannot take is lost, as on a wire.
            Ok(len) => drop(to.write(&frame[..len])),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(count),
            Err(e) => return Err(e),
        }
    }
    Ok(BATCH)
}
