//! `vunet top` in a terminal, that of script(1): how it ends, and that it gives the terminal back.

use std::io::{Read as _, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::backend::Backend;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// It, in a shell that tells of the terminal afterwards.
struct Top {
    script: Child,
    keys: ChildStdin,
    screen: Receiver<Vec<u8>>,
    seen: String,
    pid: Pid,
}

impl Top {
    /// Starts it and waits for its first picture.
    fn start(backend: &Backend) -> Top {
        let top = format!("{} top --control {}", env!("CARGO_BIN_EXE_vunet"), backend.socket().display());
        let line = format!(
            "stty rows 30 cols 100; sh -c 'echo pid=$$.; exec {top} --interval 0.1'; echo code=$?.; stty -a; echo done."
        );
        let mut script = Command::new("script")
            .args(["--quiet", "--flush", "--command", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script (package bsdutils)");
        let (keys, mut output) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
        let (told, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                let _ = told.send(bytes[..length].to_vec());
            }
        });
        let mut top = Top { script, keys, screen, seen: String::new(), pid: Pid::INIT };
        top.pid = Pid::from_raw(top.word("pid=").parse().unwrap()).unwrap();
        top.sees("front-end");
        top.sees("PageDown");
        top
    }

    /// Waits until `text` was on the screen.
    #[track_caller]
    fn sees(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.seen.contains(text) {
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(error) => panic!("{error}: no {text:?} in {:?}", self.seen),
            }
        }
    }

    /// What is behind `name` on the screen, until a full stop.
    #[track_caller]
    fn word(&mut self, name: &str) -> String {
        self.sees(name);
        let at = self.seen.find(name).unwrap() + name.len();
        loop {
            if let Some((word, _)) = self.seen[at..].split_once('.') {
                return word.to_owned();
            }
            let more = self.screen.recv_timeout(PATIENCE).expect("the rest of a word");
            self.seen += &String::from_utf8_lossy(&more);
        }
    }

    /// Waits for its end: code 0, and a terminal as it was.
    #[track_caller]
    fn ends_well(&mut self) {
        assert_eq!(self.word("code="), "0", "{:?}", self.seen);
        self.sees("done.");
        let after = self.seen.split("code=").nth(1).unwrap();
        for setting in ["icanon", "echo", "isig"] {
            let is_set = after.split_whitespace().any(|word| word == setting);
            assert!(is_set, "{setting} is not set: {after:?}");
        }
        assert!(self.seen.contains("\u{1b}[?1049l"), "the screen is given back: {:?}", self.seen);
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

#[test]
fn top_gives_the_terminal_back_whatever_ends_it() {
    let backend = Backend::start(&[]);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut top = Top::start(&backend);
        kill_process(top.pid, signal).unwrap();
        top.ends_well();
    }
    let mut top = Top::start(&backend);
    top.keys.write_all(b"q").unwrap();
    top.ends_well();
}

#[test]
fn top_whose_terminal_is_gone_ends() {
    let backend = Backend::start(&[]);
    let mut top = Top::start(&backend);
    top.script.kill().unwrap();
    top.script.wait().unwrap();
    let end = Instant::now() + PATIENCE;
    while rustix::process::test_kill_process(top.pid).is_ok() {
        assert!(Instant::now() < end, "it still runs");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn top_obeys_keys_while_the_backend_is_stopped() {
    let backend = Backend::start(&[]);
    let mut top = Top::start(&backend);
    backend.halt();
    top.sees("answer");
    let begun = Instant::now();
    top.keys.write_all(b"q").unwrap();
    top.ends_well();
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
}
