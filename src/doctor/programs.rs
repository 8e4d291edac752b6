//! Programs that are run to ask something, and killed if they take too long.

use std::io::Read as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Bytes of output that are read: a ruleset of ten thousand rules.
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
/// Between two looks whether it ended.
const PAUSE: Duration = Duration::from_millis(5);

/// What `program` prints with `args` until `deadline`; in words, why nothing came of it.
pub(super) fn run(program: &Path, args: &[&str], deadline: Instant) -> Result<String, String> {
    if Instant::now() >= deadline {
        return Err("there was no time left to run it".to_owned());
    }
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Of its own, so that what it starts is killed with it.
    command.process_group(0);
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    // Both are read meanwhile: a program whose output nobody takes does not end.
    let outputs = [child.stdout.take().map(read), child.stderr.take().map(read)];
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => thread::sleep(PAUSE),
            Ok(None) => {
                let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
                let _ = child.wait();
                return Err("it took too long".to_owned());
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    let left = deadline.saturating_duration_since(Instant::now()) + PAUSE;
    let [printed, said] = outputs.map(|output| {
        let bytes = output.and_then(|output| output.recv_timeout(left).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    if status.success() {
        Ok(printed)
    } else {
        Err(said.lines().next().unwrap_or("it said nothing").trim().to_owned())
    }
}

fn read(from: impl std::io::Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
        // Nobody waits for it any more after the limit.
        let _ = sender.send(bytes);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration) -> Result<String, String> {
        run(Path::new("/bin/sh"), &["-c", script], Instant::now() + limit)
    }

    #[test]
    fn what_is_printed_comes_back_and_failures_in_words() {
        let long = Duration::from_secs(30);
        assert_eq!(sh("echo a; echo b >&2", long), Ok("a\n".to_owned()));
        assert_eq!(sh("echo a; echo b >&2; exit 3", long), Err("b".to_owned()));
        let many = sh("head -c 1000000 /dev/zero", long).unwrap();
        assert_eq!(many.len(), 1_000_000, "more than a pipe holds");
        assert!(run(Path::new("/no/such/program"), &[], Instant::now() + long).is_err());
    }

    #[test]
    fn one_that_does_not_end_is_killed() {
        let begun = Instant::now();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        let script = format!("sleep 100 & echo $! > {}; wait", file.display());
        let outcome = sh(&script, Duration::from_secs(2));
        assert!(outcome.unwrap_err().contains("too long"));
        assert!(begun.elapsed() < Duration::from_secs(60));
        let pid = std::fs::read_to_string(file).unwrap();
        // A zombie until somebody inherits it; killed, it still has to have its turn to die.
        let lives = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            !state.is_empty() && !state.contains(") Z") && !state.contains(") X")
        };
        while lives() {
            assert!(begun.elapsed() < Duration::from_secs(60), "what it started goes on");
            thread::sleep(PAUSE);
        }
        assert!(sh("echo late", Duration::ZERO).is_err());
    }
}
