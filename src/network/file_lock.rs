//! Waiting for a file's lock, but not for ever: who holds it may hang, or be stopped.
//!
//! Locks here are held for some milliseconds at a time. Processes that start at once pass one on to each other, so it is one
//! holder's time that is bounded, and not the wait.
//!
//! May touch: the file, `/proc/locks`. Read first: flock(2).

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use rustix::fs::{major, minor};
use rustix::thread::{NanosleepRelativeResult, nanosleep};

/// How long one process may keep it from others.
const HOLDER_PATIENCE: Duration = Duration::from_secs(30);

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(5);

/// Between two looks at who holds it.
const LOOK: Duration = Duration::from_millis(500);

/// Locks `file` for this process alone.
///
/// # Errors
/// `TimedOut` if one process has held it for 30 s, with its number; `Interrupted` if a signal came meanwhile, as the wait
/// is what it should end; the file system's refusal.
pub(super) fn lock(file: &File) -> io::Result<()> {
    lock_within(file, HOLDER_PATIENCE)
}

fn lock_within(file: &File, patience: Duration) -> io::Result<()> {
    let (mut holder, mut since, mut looked) = (None, Instant::now(), None::<Instant>);
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) => {}
        }
        if looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            looked = Some(Instant::now());
            let now = holder_of(file);
            if now != holder {
                (holder, since) = (now, Instant::now());
            }
        }
        if since.elapsed() >= patience {
            return Err(io::Error::new(io::ErrorKind::TimedOut, held(holder, patience)));
        }
        let pause = rustix::time::Timespec::try_from(PAUSE).map_err(io::Error::other)?;
        if !matches!(nanosleep(&pause), NanosleepRelativeResult::Ok) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "a signal came while it was waited for"));
        }
    }
}

fn held(holder: Option<u32>, patience: Duration) -> String {
    let seconds = patience.as_secs();
    match holder {
        Some(pid) => format!(
            "process {pid} has held it for {seconds} s: is it stopped or does it hang (ps -p {pid})? It has to go on or end"
        ),
        None => format!("a process that cannot be seen from here has held it for {seconds} s"),
    }
}

/// The process that has locked `file`, as `/proc/locks` has it; `None` if it is in another process namespace.
fn holder_of(file: &File) -> Option<u32> {
    let metadata = file.metadata().ok()?;
    let (device, inode) = (metadata.dev(), metadata.ino());
    let wanted = format!("{:02x}:{:02x}:{inode}", major(device), minor(device));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    // `1: FLOCK  ADVISORY  WRITE 12361 fe:00:11395078 0 EOF`; who waits has `->` after the number.
    let holder = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let is_flock = words.next() == Some("FLOCK");
        let pid = words.nth(2)?;
        (is_flock && words.next() == Some(&wanted)).then(|| pid.parse().ok()).flatten()
    };
    locks.lines().find_map(holder).filter(|pid| *pid != 0)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn lock_of_a_process_that_hangs_is_given_up_and_the_process_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holder = file.reopen().unwrap();
        holder.lock().unwrap();
        let error = lock_within(file.as_file(), Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(
            error.to_string().contains(&format!("process {} has held it", std::process::id())),
            "{error}"
        );
    }

    #[test]
    fn lock_that_is_let_go_is_taken() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let holder = file.reopen().unwrap();
        holder.lock().unwrap();
        let waits = file.reopen().unwrap();
        let waiter = thread::spawn(move || lock(&waits).map(|()| waits));
        thread::sleep(4 * PAUSE);
        assert!(!waiter.is_finished());
        drop(holder);
        let taken = waiter.join().unwrap().unwrap();
        assert!(matches!(file.as_file().try_lock(), Err(TryLockError::WouldBlock)));
        drop(taken);
    }
}
