//! A backend with a control socket, and a client that speaks plain HTTP to it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// It, until it is dropped.
pub(crate) struct Backend {
    child: Child,
    dir: TempDir,
}

/// An answer: the status, and the body as JSON, null if there is none.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Answer {
    /// The code of an error.
    pub(crate) fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }
}

impl Backend {
    /// Starts one with `args` besides its sockets and waits for the control socket.
    pub(crate) fn start(args: &[&str]) -> Backend {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vunet"))
            .arg("--socket-path")
            .arg(dir.path().join("vm"))
            .arg("--control")
            .arg(dir.path().join("ctl"))
            .args(args)
            .stderr(log)
            .spawn()
            .unwrap();
        let backend = Backend { child, dir };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(backend.socket()).is_err() {
            assert!(Instant::now() < deadline, "no control socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        backend
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request as it is and reads all of the answer.
    pub(crate) fn raw(&self, request: &str) -> String {
        String::from_utf8(self.raw_bytes(request.as_bytes())).unwrap()
    }

    /// The same of bytes that may be no text.
    pub(crate) fn raw_bytes(&self, request: &[u8]) -> Vec<u8> {
        let mut stream = self.connect();
        // A backend that refuses early closes early.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    }

    /// Sends a request as it is and reads its answer until `part` is in it.
    pub(crate) fn begin_of(&self, request: &str, part: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        while !answer.contains(part) {
            let mut some = [0; 4096];
            let count = stream.read(&mut some).unwrap();
            assert!(count > 0, "no {part:?} in {answer}");
            answer += std::str::from_utf8(&some[..count]).unwrap();
        }
        answer
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A request with a body of JSON, or none.
    pub(crate) fn ask(&self, method: &str, resource: &str, body: Option<&str>) -> Answer {
        let length = body.map_or(0, str::len);
        let kind = if body.is_some() { "Content-Type: application/json\r\n" } else { "" };
        let body = body.unwrap_or_default();
        let answer = self.raw(&format!(
            "{method} {resource} HTTP/1.1\r\nHost: vunet\r\nConnection: close\r\n{kind}Content-Length: {length}\r\n\r\n{body}"
        ));
        let (head, body) = answer.split_once("\r\n\r\n").expect("a whole answer");
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a status");
        let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).expect("JSON") };
        Answer { status, body }
    }

    pub(crate) fn get(&self, resource: &str) -> Answer {
        self.ask("GET", resource, None)
    }

    /// Has it read its settings again.
    pub(crate) fn reload(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    }

    /// Stops it, as a debugger does. It can be killed still.
    pub(crate) fn halt(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }

    /// Waits until its log says `text` so many times.
    pub(crate) fn says(&self, text: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
            if log.matches(text).count() >= times {
                return;
            }
            assert!(Instant::now() < deadline, "no {text:?} in {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The number its log has behind `text`.
    pub(crate) fn logged(&self, text: &str) -> u16 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap();
            let word =
                log.split_once(text).and_then(|(_, rest)| rest.split_whitespace().next().map(str::to_owned));
            if let Some(number) = word.and_then(|word| word.parse().ok()) {
                return number;
            }
            assert!(Instant::now() < deadline, "nothing behind {text:?} in {log}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `vunet ctl` with `args`.
    pub(crate) fn ctl(&self, args: &[&str]) -> Output {
        let socket = self.socket();
        Command::new(env!("CARGO_BIN_EXE_vunet"))
            .args(["ctl", "--control"])
            .arg(socket)
            .args(args)
            .output()
            .unwrap()
    }

    /// The same under way, once it has said a first line, which comes along.
    pub(crate) fn ctl_begun(&self, args: &[&str]) -> (Child, String) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vunet"))
            .args(["ctl", "--control"])
            .arg(self.socket())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        // Byte by byte: the rest is the caller's.
        BufReader::with_capacity(1, child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        (child, line)
    }

    /// Ends it as nobody can see coming.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The code it ended with, which it does soon.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("it did not end");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
