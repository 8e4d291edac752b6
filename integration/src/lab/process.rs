//! Commands with time bounds, and processes that end with their owner.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::LabError;
use crate::sys::process::{self as signals, SIGKILL, SIGTERM, SIGUSR1};

/// Pause between looks at whether a process ended.
const POLL: Duration = Duration::from_millis(5);
/// Time a process gets to end after SIGTERM, before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// What a command printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn start(words: &[&str]) -> Result<Child, LabError> {
    command(words).spawn().map_err(|source| LabError::Start { command: words.join(" "), source })
}

fn collect(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            // What was read before an error is still worth showing.
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a command to its end, whatever its exit code, and kills it after `timeout`.
///
/// # Errors
/// [`LabError::Start`], or [`LabError::Failed`] if it took too long.
pub fn run_any(words: &[&str], timeout: Duration) -> Result<Output, LabError> {
    let mut child = start(words)?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let deadline = Instant::now() + timeout;
    let status = wait_until(&mut child, deadline);
    if status.is_none() {
        // It may have ended just now.
        let _ = child.kill();
        let _ = child.wait();
    }
    let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let (stdout, stderr) = (text(stdout), text(stderr));
    match status {
        Some(status) => Ok(Output { stdout, stderr, code: status.code() }),
        None => Err(LabError::Failed {
            command: words.join(" "),
            why: format!("timed out after {timeout:?}"),
            output: stdout + &stderr,
        }),
    }
}

/// Runs a command that must succeed within `timeout`.
///
/// # Errors
/// As [`run_any`], and [`LabError::Failed`] for an exit code other than 0.
pub fn run(words: &[&str], timeout: Duration) -> Result<Output, LabError> {
    let output = run_any(words, timeout)?;
    if output.code == Some(0) {
        return Ok(output);
    }
    Err(LabError::Failed {
        command: words.join(" "),
        why: format!("exit code {:?}", output.code),
        output: output.stdout + &output.stderr,
    })
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
            _ => return None,
        }
    }
}

#[derive(Debug, Default)]
struct Lines {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Lines {
    fn follow(from: Option<impl Read + Send + 'static>) -> Arc<Lines> {
        let lines = Arc::new(Lines::default());
        let Some(from) = from else {
            return lines;
        };
        let to = Arc::clone(&lines);
        thread::spawn(move || {
            for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                to.lines.lock().expect("no holder panics").push(line);
                to.more.notify_all();
            }
        });
        lines
    }

    fn get(&self) -> Vec<String> {
        self.lines.lock().expect("no holder panics").clone()
    }
}

/// A process in the background. Dropping it ends it.
#[derive(Debug)]
pub struct Process {
    command: String,
    child: Child,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
}

impl Process {
    /// Starts a command.
    ///
    /// # Errors
    /// [`LabError::Start`].
    pub fn start(words: &[&str]) -> Result<Process, LabError> {
        let mut child = start(words)?;
        let (stdout, stderr) = (Lines::follow(child.stdout.take()), Lines::follow(child.stderr.take()));
        Ok(Process { command: words.join(" "), child, stdout, stderr })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lines of standard output so far.
    pub fn lines(&self) -> Vec<String> {
        self.stdout.get()
    }

    /// Lines of standard error so far.
    pub fn errors(&self) -> Vec<String> {
        self.stderr.get()
    }

    /// Waits for a line of standard output for which `pick` holds, earlier ones included.
    ///
    /// # Errors
    /// [`LabError::Timeout`], naming `what` and quoting standard error.
    pub fn wait_line(
        &self,
        timeout: Duration,
        what: &str,
        pick: impl Fn(&str) -> bool,
    ) -> Result<String, LabError> {
        self.wait_in(&self.stdout, timeout, what, pick)
    }

    /// The same for standard error.
    ///
    /// # Errors
    /// As [`Self::wait_line`].
    pub fn wait_error(
        &self,
        timeout: Duration,
        what: &str,
        pick: impl Fn(&str) -> bool,
    ) -> Result<String, LabError> {
        self.wait_in(&self.stderr, timeout, what, pick)
    }

    fn wait_in(
        &self,
        lines: &Lines,
        timeout: Duration,
        what: &str,
        pick: impl Fn(&str) -> bool,
    ) -> Result<String, LabError> {
        let deadline = Instant::now() + timeout;
        let mut seen = 0;
        let mut guard = lines.lines.lock().expect("no holder panics");
        loop {
            if let Some(line) = guard[seen..].iter().find(|line| pick(line)) {
                return Ok(line.clone());
            }
            seen = guard.len();
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                drop(guard);
                let what = format!("{what} from {}\n{}", self.command, self.errors().join("\n"));
                return Err(LabError::Timeout(timeout, what));
            };
            guard = lines.more.wait_timeout(guard, left).expect("no holder panics").0;
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it at once.
    pub fn kill(&mut self) {
        // It may be gone already, which is what was wanted.
        let _ = signals::send(self.child.id(), SIGKILL);
        let _ = self.child.wait();
    }

    /// Asks it to end, and waits for nothing.
    pub fn terminate(&self) {
        // It may be gone already, which is what was wanted.
        let _ = signals::send(self.child.id(), SIGTERM);
    }

    /// Asks it to end, and kills it if it does not within a few seconds. Returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        if self.is_running() {
            // It may be ending just now.
            let _ = signals::send(self.child.id(), SIGTERM);
        }
        match wait_until(&mut self.child, Instant::now() + GRACE) {
            Some(status) => status.code(),
            None => {
                self.kill();
                None
            }
        }
    }

    /// Asks a namespace guest to print its counters.
    pub(super) fn ask_report(&self) {
        // A guest that is gone prints nothing, and the caller's wait says so.
        let _ = signals::send(self.child.id(), SIGUSR1);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            self.stop();
        }
        if thread::panicking() {
            let name = self.command.split_whitespace().next().unwrap_or_default().to_owned();
            let errors = self.errors();
            let tail = &errors[errors.len().saturating_sub(40)..];
            if !tail.is_empty() {
                eprintln!("--- standard error of {name} (last {} lines)\n{}", tail.len(), tail.join("\n"));
            }
        }
    }
}
