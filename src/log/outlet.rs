//! The way of the log's lines to standard error, which may be a pipe that nobody reads.
//!
//! While the process has one thread, lines are written where they are said. From [`Outlet::write_apart`] on they wait in
//! a queue of bounded bytes for a thread of its own, and nobody who logs waits for anybody: what finds the queue full
//! is lost, counted, and told of in the place where it is missing.
//!
//! `tracing-appender`'s writer is not used: at its end it prints to standard output when its queue is full, which waits for
//! ever where both outputs are one pipe; it starts its thread at once, which forbids to enter a namespace of users;
//! and it bounds lines, not bytes.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use super::line;
use crate::limits::{LOG_LAST_WORDS_BYTES_MAX, LOG_QUEUE_BYTES_MAX};

/// Where lines go.
#[derive(Debug)]
pub(super) struct Outlet {
    queue: Mutex<Queue>,
    /// Lines came, or were written.
    changed: Condvar,
    /// Lines lost so far.
    lost: AtomicU64,
}

/// Lines that wait.
#[derive(Debug)]
struct Queue {
    /// Whether a thread writes them. Until then none wait.
    is_apart: bool,
    /// Whole lines.
    waiting: Vec<u8>,
    /// Lines lost behind those that wait. While it is not zero no line is taken, so that what is told of them stands in
    /// their place.
    lost: u64,
    /// Whether lines that were taken from here are being written.
    is_writing: bool,
}

impl Outlet {
    pub(super) const fn new() -> Outlet {
        let queue = Queue { is_apart: false, waiting: Vec::new(), lost: 0, is_writing: false };
        Outlet { queue: Mutex::new(queue), changed: Condvar::new(), lost: AtomicU64::new(0) }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has lines written by a thread of its own from now on; what is said of lost ones has the form `json`, or text.
    /// Does nothing the second time.
    ///
    /// # Errors
    /// No descriptor, or no thread.
    pub(super) fn write_apart(&'static self, json: bool) -> io::Result<()> {
        // Not by way of `Stderr`, whose lock would be held while it waits, and asked for by panics.
        let sink = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        self.write_apart_to(sink, json)
    }

    fn write_apart_to(&'static self, sink: impl Write + Send + 'static, json: bool) -> io::Result<()> {
        let mut queue = self.queue();
        if queue.is_apart {
            return Ok(());
        }
        queue.waiting = Vec::with_capacity(LOG_QUEUE_BYTES_MAX + LOG_LAST_WORDS_BYTES_MAX);
        let batch = Vec::with_capacity(queue.waiting.capacity());
        let carry = move || self.carry(batch, sink, json);
        thread::Builder::new().name("log".to_owned()).spawn(carry)?;
        queue.is_apart = true;
        Ok(())
    }

    /// Writes a whole line, or several, or keeps them for who writes; never waits once that is a thread.
    fn say(&self, line: &[u8], room: usize) -> io::Result<()> {
        let mut queue = self.queue();
        if !queue.is_apart {
            return io::stderr().write_all(line);
        }
        let is_last = room > LOG_QUEUE_BYTES_MAX;
        if queue.waiting.len() + line.len() > room || queue.lost > 0 && !is_last {
            queue.lost += 1;
            self.lost.fetch_add(1, Ordering::Relaxed);
        } else {
            queue.waiting.extend_from_slice(line);
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Writes a line for which there is room however many wait. A longer one than that room is cut.
    pub(super) fn say_last(&self, line: &str) {
        let mut end = line.len().min(LOG_LAST_WORDS_BYTES_MAX - 1);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        let line = format!("{}\n", line[..end].trim_end());
        // Nobody is left to tell if standard error is gone too.
        let _ = self.say(line.as_bytes(), LOG_QUEUE_BYTES_MAX + LOG_LAST_WORDS_BYTES_MAX);
    }

    /// Waits until all that was said is written, `patience` at most; whether it is.
    pub(super) fn flush(&self, patience: Duration) -> bool {
        let is_under_way =
            |queue: &mut Queue| queue.is_writing || !queue.waiting.is_empty() || queue.lost > 0;
        let waited = self.changed.wait_timeout_while(self.queue(), patience, is_under_way);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Lines lost so far, because standard error was not read in time.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Writes what waits, for as long as the process lives.
    fn carry(&self, mut batch: Vec<u8>, mut sink: impl Write, json: bool) {
        loop {
            let lost = self.take(&mut batch);
            // Each line is a write of its own, so that those of other processes come between lines only. There is nobody
            // to tell of one that fails.
            for line in batch.split_inclusive(|byte| *byte == b'\n') {
                let _ = sink.write_all(line);
            }
            if lost > 0 {
                let says =
                    format!("{lost} lines of the log are lost here: standard error was not read in time");
                let _ = sink.write_all((line("WARN", &says, json) + "\n").as_bytes());
            }
        }
    }

    /// Waits for lines and moves them to `batch`, in whose place they waited; how many are lost behind them.
    fn take(&self, batch: &mut Vec<u8>) -> u64 {
        batch.clear();
        let mut queue = self.queue();
        queue.is_writing = false;
        self.changed.notify_all();
        let is_idle = |queue: &mut Queue| queue.waiting.is_empty() && queue.lost == 0;
        let mut queue = self.changed.wait_while(queue, is_idle).unwrap_or_else(PoisonError::into_inner);
        mem::swap(&mut queue.waiting, batch);
        queue.is_writing = true;
        mem::take(&mut queue.lost)
    }
}

/// The log's layer asks for a writer for each line, which it hands over whole.
impl<'a> MakeWriter<'a> for &'static Outlet {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self)
    }
}

/// One line on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line(&'static Outlet);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.say(line, LOG_QUEUE_BYTES_MAX)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, PipeReader, Read as _};
    use std::time::Instant;

    use super::*;

    /// Longest wait for anything a test waits for.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// One whose pipe's reader is the test.
    fn piped(json: bool) -> (&'static Outlet, PipeReader) {
        let outlet = Box::leak(Box::new(Outlet::new()));
        let (reader, writer) = io::pipe().unwrap();
        outlet.write_apart_to(writer, json).unwrap();
        (outlet, reader)
    }

    /// Fills the pipe, and waits until its writer is stuck in a line.
    fn fill(outlet: &'static Outlet) -> usize {
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let mut said = 0;
        loop {
            Line(outlet).write_all(&line).unwrap();
            said += 1;
            if !outlet.flush(Duration::from_millis(200)) {
                return said;
            }
        }
    }

    #[test]
    fn lines_come_in_their_order_and_are_all_written_when_flushed() {
        let (outlet, reader) = piped(false);
        for n in 0..100 {
            writeln!(Line(outlet), "{n}").unwrap();
        }
        assert!(outlet.flush(PATIENCE));
        let lines = BufReader::new(reader).lines().take(100).map(Result::unwrap);
        assert!(lines.eq((0..100).map(|n| n.to_string())));
    }

    #[test]
    fn the_queue_takes_its_bound_and_not_a_byte_more_and_what_is_lost_is_told_in_its_place() {
        let (outlet, mut reader) = piped(true);
        let before = fill(outlet) * 1024;
        let begun = Instant::now();
        let line = [&[b'y'; LOG_QUEUE_BYTES_MAX / 4 - 1][..], b"\n"].concat();
        for _ in 0..4 {
            Line(outlet).write_all(&line).unwrap();
        }
        assert_eq!(outlet.lost(), 0, "the bound is {LOG_QUEUE_BYTES_MAX} bytes");
        for _ in 0..3 {
            Line(outlet).write_all(b"\n").unwrap();
        }
        assert_eq!(outlet.lost(), 3);
        assert!(!outlet.flush(Duration::from_millis(50)));
        assert!(begun.elapsed() < PATIENCE / 2, "nobody waited for the reader: {:?}", begun.elapsed());
        let mut read = vec![0; before + LOG_QUEUE_BYTES_MAX];
        reader.read_exact(&mut read).unwrap();
        assert!(read.ends_with(&line));
        let mut reader = BufReader::new(reader);
        let mut next = || {
            let mut text = String::new();
            reader.read_line(&mut text).unwrap();
            text
        };
        let told: serde_json::Value = serde_json::from_str(&next()).unwrap();
        assert_eq!(told["level"], "WARN");
        assert!(
            told["fields"]["message"].as_str().unwrap().starts_with("3 lines of the log are lost"),
            "{told}"
        );
        Line(outlet).write_all(b"after\n").unwrap();
        assert_eq!(next(), "after\n");
        assert!(outlet.flush(PATIENCE));
    }

    #[test]
    fn last_words_have_room_when_nothing_else_has() {
        let (outlet, mut reader) = piped(false);
        let before = fill(outlet) * 1024;
        let rest = [b'y'; LOG_QUEUE_BYTES_MAX];
        Line(outlet).write_all(&rest).unwrap();
        Line(outlet).write_all(b"lost\n").unwrap();
        outlet.say_last(&"ü".repeat(LOG_LAST_WORDS_BYTES_MAX));
        assert_eq!(outlet.lost(), 1);
        let mut read = vec![0; before + LOG_QUEUE_BYTES_MAX];
        reader.read_exact(&mut read).unwrap();
        let mut word = String::new();
        BufReader::new(reader).read_line(&mut word).unwrap();
        assert_eq!(word.trim_end(), "ü".repeat((LOG_LAST_WORDS_BYTES_MAX - 1) / 2));
    }
}
