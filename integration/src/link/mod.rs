//! A link with a WAN's faults between two TAPs: delay, jitter, loss, reordering, duplicates, corruption,
//! a rate and a queue, each direction by itself, all from one seed.
//!
//! [`Line`] is one direction, without I/O or clock. [`run`] moves frames: one thread that sleeps in epoll
//! until a TAP has a frame or a timer says that one is due. TCP crosses in frames of up to 64 KiB, as the
//! TAPs' owners send them, but every decision is made for each segment (`segments.rs`).
//!
//! Read first: the kernel's `Documentation/networking/tuntap.rst`, virtio 1.3 section 5.1.6, `timerfd_create(2)`.

mod line;
mod segments;
mod settings;

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

pub use line::{Counters, Line};
pub use settings::{Chance, Settings};

use crate::sys::netns;
use crate::sys::process::run_before_others;
use crate::sys::signal::{Signal, Signals};
use crate::sys::tap::{Offload, Tap};

/// Frames read from one TAP before the other gets its turn and what is due is delivered.
const BATCH: usize = 32;
/// Longest frame with its header.
const FRAME_BYTES: usize = segments::HEADER_BYTES + 14 + 65_535;
/// Frames the kernel keeps for us while we are not running: 10 ms of the smallest at 1 million a second.
const TX_QUEUE_FRAMES: u16 = 10_000;
/// What distinguishes the seeds of the two directions.
const OTHER_WAY: u64 = 0x5bd1_e995_9d1b_54a5;
const TOKEN_SIGNAL: u64 = 2;
const TOKEN_TIMER: u64 = 3;

/// One end of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Network namespace of the TAP, as `ip netns` names it.
    pub netns: String,
    /// Name of the TAP.
    pub tap: String,
}

/// A link to be run.
#[derive(Clone, Debug, PartialEq)]
pub struct LinkConfig {
    /// Where the two TAPs are.
    pub ends: [End; 2],
    /// What happens on the way from the first to the second, and from the second to the first.
    pub ways: [Settings; 2],
    /// Where fates come from.
    pub seed: u64,
    /// IP MTU of both TAPs in bytes.
    pub ip_mtu: u16,
    /// Whether TCP may cross in frames of many segments.
    pub segmentation: bool,
}

/// What a link has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkReport {
    /// From the first to the second end.
    pub to_second: Counters,
    /// From the second to the first.
    pub to_first: Counters,
    /// Frames handed over, of one segment or many.
    pub frames: u64,
    /// Frames handed over more than a millisecond late, because the machine was busy.
    pub late: u64,
    /// The latest one's lateness in microseconds.
    pub late_max_us: u64,
}

impl LinkReport {
    /// The report of a line of output, if the line is one.
    pub fn parse(line: &str) -> Option<LinkReport> {
        #[derive(Deserialize)]
        struct Line {
            link: LinkReport,
        }
        serde_json::from_str::<Line>(line).ok().map(|line| line.link)
    }
}

struct Link {
    taps: [Tap; 2],
    lines: [Line; 2],
    began: Instant,
    frames: u64,
    late: u64,
    late_max: Duration,
    frame: Vec<u8>,
}

/// Makes the TAPs and carries frames between them until SIGTERM. Prints `{"ready":true}` when both are up,
/// and a [`LinkReport`] on SIGUSR1 and at the end.
///
/// # Errors
/// If a TAP cannot be made or read.
pub fn run(config: &LinkConfig) -> io::Result<()> {
    let mut signals = Signals::block()?;
    let mut link = Link::open(config)?;
    if let Err(e) = run_before_others() {
        eprintln!("frames may be late on a busy machine: {e}");
    }
    let epoll = Epoll::new()?;
    let mut timer = TimerFd::new().map_err(io::Error::from)?;
    let watched = [
        (link.taps[0].fd(0), 0),
        (link.taps[1].fd(0), 1),
        (signals.fd(), TOKEN_SIGNAL),
        (std::os::fd::AsRawFd::as_raw_fd(&timer), TOKEN_TIMER),
    ];
    for (fd, token) in watched {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))?;
    }
    print(&json!({ "ready": true }));
    let mut events = [EpollEvent::default(); 4];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        for event in &events[..count] {
            match event.data() {
                TOKEN_SIGNAL => {
                    let signal = signals.take()?;
                    print(&json!({ "link": link.report() }));
                    if signal == Signal::Terminate {
                        return Ok(());
                    }
                }
                TOKEN_TIMER => drop(timer.wait().map_err(io::Error::from)?),
                _ => {}
            }
        }
        link.work()?;
        if let Some(pause) = link.pause() {
            timer.reset(pause, None).map_err(io::Error::from)?;
        }
    }
}

impl Link {
    fn open(config: &LinkConfig) -> io::Result<Link> {
        let on = config.segmentation;
        let offload = Offload { csum: on, tso4: on, tso6: false, ecn: on, uso: false };
        let open = |end: &End| -> io::Result<Tap> {
            netns::enter(&end.netns)?;
            let tap = Tap::open(&end.tap, 1, segments::HEADER_BYTES, offload)?;
            tap.set_ip_mtu(config.ip_mtu)?;
            tap.set_tx_queue_frames(TX_QUEUE_FRAMES)?;
            tap.set_up()?;
            Ok(tap)
        };
        let line = |way: usize, seed| Line::new(config.ways[way].clone(), seed);
        Ok(Link {
            taps: [open(&config.ends[0])?, open(&config.ends[1])?],
            lines: [line(0, config.seed), line(1, config.seed ^ OTHER_WAY)],
            began: Instant::now(),
            frames: 0,
            late: 0,
            late_max: Duration::ZERO,
            frame: vec![0; FRAME_BYTES],
        })
    }

    /// Takes what the TAPs have and hands over what is due, until there is neither.
    fn work(&mut self) -> io::Result<()> {
        loop {
            let mut taken = 0;
            for way in [0, 1] {
                taken += self.take_batch(way)?;
                self.deliver(way);
            }
            if taken == 0 {
                return Ok(());
            }
        }
    }

    fn take_batch(&mut self, way: usize) -> io::Result<usize> {
        for count in 0..BATCH {
            match self.taps[way].file(0).read(&mut self.frame) {
                Ok(len) => self.lines[way].offer(self.began.elapsed(), &self.frame[..len]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(count),
                Err(e) => return Err(e),
            }
        }
        Ok(BATCH)
    }

    fn deliver(&mut self, way: usize) {
        let now = self.began.elapsed();
        while let Some(due) = self.lines[way].next_due()
            && let Some(frame) = self.lines[way].take_due(now)
        {
            let late = now - due;
            self.frames += 1;
            self.late_max = self.late_max.max(late);
            self.late += u64::from(late > Duration::from_millis(1));
            // What the receiver cannot take is lost, as on a wire.
            let _ = self.taps[1 - way].file(0).write(&frame);
        }
    }

    /// Time until something is due, if anything is on its way.
    fn pause(&self) -> Option<Duration> {
        let due = self.lines.iter().filter_map(Line::next_due).min()?;
        // A timer of zero would never go off.
        Some(due.saturating_sub(self.began.elapsed()).max(Duration::from_nanos(1)))
    }

    fn report(&self) -> LinkReport {
        LinkReport {
            to_second: self.lines[0].counters(),
            to_first: self.lines[1].counters(),
            frames: self.frames,
            late: self.late,
            late_max_us: u64::try_from(self.late_max.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

fn print(line: &serde_json::Value) {
    let mut out = io::stdout().lock();
    // A reader that went away must not end the link.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
