//! The program as a service manager runs it: sockets passed, readiness and life told, settings read again.
//!
//! The tests play systemd: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Longest wait for anything a test waits for.
const PATIENCE: Duration = Duration::from_secs(20);

/// What keeps a manager's socket full.
const FILLING: &str = "FILLING=1\n";

/// A vunet whose manager is the test.
struct Service {
    dir: tempfile::TempDir,
    notify: UnixDatagram,
    child: Child,
}

impl Service {
    /// Starts it with the settings `file`, and `environment` as a shell sets it, such as `WATCHDOG_USEC=9`; with
    /// `socket` as descriptor 3.
    fn start(file: &str, flags: &str, environment: &str, socket: Option<OwnedFd>) -> Service {
        let dir = tempfile::tempdir().unwrap();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notify.set_read_timeout(Some(PATIENCE)).unwrap();
        fs::write(dir.path().join("vm.toml"), file).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        // The shell knows its own number, which is the program's then.
        let script = format!("exec 3<&0 </dev/null; {environment} exec \"$0\" \"$@\"");
        let child = Command::new("sh")
            .args(["-c", &script, env!("CARGO_BIN_EXE_vunet"), "--config", "vm.toml"])
            .args(flags.split_whitespace())
            .current_dir(dir.path())
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .stdin(socket.map_or_else(Stdio::null, Stdio::from))
            .stderr(log)
            .spawn()
            .expect("a shell");
        Service { dir, notify, child }
    }

    /// The same, and waits until it is ready.
    fn ready(file: &str, flags: &str, environment: &str, socket: Option<OwnedFd>) -> Service {
        let service = Service::start(file, flags, environment, socket);
        let told = service.told();
        assert!(told.contains("READY=1\n") && told.contains("STATUS=serving "), "{told:?}");
        assert!(told.contains(": no VM yet\n"), "{told:?}");
        service
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// The same once it says `part`: it is written a moment after.
    #[track_caller]
    fn log_with(&self, part: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if log.contains(part) {
                return log;
            }
            assert!(Instant::now() < end, "'{part}' is not in: {log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the manager is told next.
    #[track_caller]
    fn told(&self) -> String {
        let mut message = [0; 4096];
        match self.notify.recv(&mut message) {
            Ok(length) => String::from_utf8(message[..length].to_vec()).unwrap(),
            Err(error) => panic!("nothing was told: {error}; log: {}", self.log()),
        }
    }

    /// The next of what the manager is told that says `part`.
    #[track_caller]
    fn told_of(&self, part: &str) -> String {
        loop {
            let told = self.told();
            if told.contains(part) {
                return told;
            }
        }
    }

    /// Leaves no room for a message, as a manager does that reads none.
    fn fill(&self) {
        let other = UnixDatagram::unbound().unwrap();
        other.set_nonblocking(true).unwrap();
        while other.send_to(FILLING.as_bytes(), self.path("notify")).is_ok() {}
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Writes the settings anew and has them read; what the manager is told after that of the outcome.
    fn reload(&self, file: &str) -> String {
        fs::write(self.path("vm.toml"), file).unwrap();
        self.signal("HUP");
        let told = self.told_of("RELOADING=1\n");
        assert!(told.contains("MONOTONIC_USEC="), "{told:?}");
        self.told_of("READY=1\n")
    }

    /// Waits for its end.
    fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "it does not end: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks for the features over `stream` as a front-end does (GET_FEATURES), until they come.
fn features(stream: &UnixStream) -> u64 {
    say_hello(stream);
    answered(stream)
}

fn say_hello(mut stream: &UnixStream) {
    let header: Vec<u8> = [1u32, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&header).unwrap();
}

fn answered(mut stream: &UnixStream) -> u64 {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).expect("an answer");
    u64::from_ne_bytes(answer[12..].try_into().unwrap())
}

/// Bit 30: the protocol features, which every back-end of ours offers.
fn is_served(stream: &UnixStream) -> bool {
    features(stream) & 1 << 30 != 0
}

fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).unwrap()
}

#[test]
fn a_manager_is_told_that_it_serves_reloads_and_ends() {
    let mut service = Service::ready("socket-path = 'vm.sock'\n", "", "", None);
    let vm = connect(&service.path("vm.sock"));
    assert!(is_served(&vm), "it was ready");
    assert_eq!(service.told(), "STATUS=serving vm.sock: a VM is attached\n");
    let told = service.reload("socket-path = 'vm.sock'\nlog-level = 'debug'\n");
    assert!(told.contains("STATUS=serving vm.sock: a VM is attached\n"), "{told:?}");
    drop(vm);
    assert_eq!(service.told(), "STATUS=serving vm.sock: no VM\n");
    service.signal("TERM");
    assert!(service.told().contains("STOPPING=1\n"));
    assert_eq!(service.ended().code(), Some(0));
    assert!(!service.path("vm.sock").exists(), "its own socket is gone");
}

#[test]
fn settings_that_can_change_do_and_others_are_refused_with_all_that_came_with_them() {
    let mut service = Service::ready("socket-path = 'vm.sock'\n", "", "", None);
    let debug = "socket-path = 'vm.sock'\nlog-level = 'debug'\n";
    for (file, part) in [
        (
            &*format!("{debug}ip-mtu = 9000\n"),
            "ip-mtu cannot change while vunet runs (it is 1500, the file says 9000)",
        ),
        ("socket-path = 'vm.sock'\nlog-level = 'loud'\n", "vm.toml: log-level = \"loud\""),
        ("socket-path = 'vm.sock'\ndns-host = ['x']\n", "vm.toml: dns-host = \"x\""),
        ("socket-path = 'vm.sock'\nlog_level = 'debug'\n", "vm.toml: log_level: no such setting"),
        ("socket-path = ", "vm.toml:1: "),
    ] {
        let told = service.reload(file);
        assert!(told.contains("settings stay as they are") && told.contains(part), "'{part}': {told:?}");
        let log = service.log_with(part);
        assert!(log.contains("ERROR"), "{log}");
    }
    // A connection that says nothing is spoken of at level debug only.
    let said = |service: &Service| service.log().contains("said nothing");
    drop(connect(&service.path("vm.sock")));
    assert!(is_served(&connect(&service.path("vm.sock"))));
    assert!(!said(&service), "nothing of what was refused is applied: {}", service.log());
    service.reload(debug);
    drop(connect(&service.path("vm.sock")));
    service.log_with("said nothing");
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
}

/// A vunet whose standard error is a pipe that the test reads, or does not.
struct Unread {
    dir: tempfile::TempDir,
    log: io::PipeReader,
    child: Child,
}

impl Unread {
    fn start(flags: &[&str]) -> Unread {
        let dir = tempfile::tempdir().unwrap();
        let (log, stderr) = io::pipe().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vunet"))
            .args(["--socket-path", "vm.sock", "--control", "ctl.sock"])
            .args(flags)
            .current_dir(dir.path())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let unread = Unread { dir, log, child };
        let end = Instant::now() + PATIENCE;
        while UnixStream::connect(unread.dir.path().join("vm.sock")).is_err() {
            assert!(Instant::now() < end, "no socket");
            thread::sleep(Duration::from_millis(5));
        }
        unread
    }

    /// Has it log until `lines` are lost, as its metrics say.
    fn log_until_lost(&self, lines: u64) {
        let end = Instant::now() + 3 * PATIENCE;
        while self.lost() < lines {
            assert!(Instant::now() < end, "{} lines are lost", self.lost());
            for _ in 0..200 {
                // No front-end: said at level warn.
                let mut stream = connect(&self.dir.path().join("vm.sock"));
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(&[0xff; 12]).unwrap();
                assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0, "it is served no more");
            }
        }
    }

    fn lost(&self) -> u64 {
        let mut stream = connect(&self.dir.path().join("ctl.sock"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let value = answer.lines().find_map(|line| line.strip_prefix("vunet_log_lines_lost_total "));
        value.and_then(|value| value.parse().ok()).expect("the metric")
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_vms_nor_the_end() {
    let mut unread = Unread::start(&[]);
    unread.log_until_lost(1);
    assert!(is_served(&connect(&unread.dir.path().join("vm.sock"))));
    // Read again, it says what is missing, and where.
    let mut lines = BufReader::new(&unread.log).lines().map(Result::unwrap);
    let told = lines.find(|line| line.contains("of the log are lost here")).unwrap();
    assert!(told.contains(" WARN "), "{told}");
    drop(lines);
    unread.log_until_lost(unread.lost() + 1);
    let begun = Instant::now();
    assert!(Command::new("kill").arg(unread.child.id().to_string()).status().unwrap().success());
    assert_eq!(unread.child.wait().unwrap().code(), Some(0));
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
}

/// A vunet without settings in `dir`, by the words of a shell before it, that listens.
fn bare(dir: &Path, before: &str) -> Child {
    let child = Command::new("sh")
        .args(["-c", &format!("{before} exec \"$0\" --socket-path vm.sock"), env!("CARGO_BIN_EXE_vunet")])
        .current_dir(dir)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + PATIENCE;
    while UnixStream::connect(dir.join("vm.sock")).is_err() {
        assert!(Instant::now() < end, "no socket");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn a_hang_up_without_a_file_ends_it_in_order_unless_it_was_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = bare(dir.path(), "");
    send(&child, "HUP");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!dir.path().join("vm.sock").exists(), "its socket is gone");
    // As nohup(1) does.
    let mut child = bare(dir.path(), "trap '' HUP;");
    send(&child, "HUP");
    thread::sleep(Duration::from_millis(50));
    assert!(child.try_wait().unwrap().is_none());
    send(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_socket_that_is_passed_is_served_again_and_again_and_left_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // Who comes before it runs waits, as with any socket unit.
    let early = connect(&path);
    say_hello(&early);
    let passed = "LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=vunet@vm1.socket";
    let mut service = Service::ready("", "", passed, Some(listener.into()));
    service.told_of(": a VM is attached\n");
    assert!(answered(&early) & 1 << 30 != 0);
    drop(early);
    for _ in 0..3 {
        assert!(is_served(&connect(&path)));
    }
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
    assert!(path.exists(), "it is the manager's");
}

#[test]
fn a_socket_passed_to_another_process_or_beside_a_flag_is_not_taken() {
    let socket = || {
        let dir = tempfile::tempdir().unwrap();
        (UnixListener::bind(dir.path().join("s")).unwrap().into(), dir)
    };
    for (file, environment, parts) in [
        ("", "LISTEN_FDS=1 LISTEN_PID=1", &["no service manager passed a socket"][..]),
        ("socket-path = 'x'", "LISTEN_FDS=1 LISTEN_PID=$$", &["--socket-path x", "LISTEN_FDS", "vm.toml"]),
        ("client = true", "LISTEN_FDS=1 LISTEN_PID=$$", &["--client", "LISTEN_FDS"]),
        ("", "LISTEN_FDS=x LISTEN_PID=$$", &["LISTEN_FDS", "invalid"]),
        ("", "LISTEN_FDS=9 LISTEN_PID=$$", &["LISTEN_FDS", "Bad file descriptor"]),
    ] {
        let (listener, _dir) = socket();
        let mut service = Service::start(file, "", environment, Some(listener));
        assert_eq!(service.ended().code(), Some(2), "{environment}");
        for part in parts {
            assert!(service.log().contains(part), "{environment}: '{part}' is not in: {}", service.log());
        }
    }
}

#[test]
fn a_watchdog_hears_that_it_is_alive_in_good_time_and_only_if_it_asked() {
    const TIMEOUT: Duration = Duration::from_millis(400);
    let asked = format!("WATCHDOG_USEC={} WATCHDOG_PID=$$", TIMEOUT.as_micros());
    let service = Service::ready("socket-path = 'vm.sock'\n", "--queues 2", &asked, None);
    let begun = Instant::now();
    for _ in 0..5 {
        assert_eq!(service.told(), "WATCHDOG=1\n");
    }
    // The first comes at once, so five are four periods of a third of the time-out.
    assert!(begun.elapsed() >= TIMEOUT * 4 / 3 - Duration::from_millis(50), "{:?}", begun.elapsed());
    for environment in ["", "WATCHDOG_USEC=400000 WATCHDOG_PID=1"] {
        let service = Service::ready("socket-path = 'vm.sock'\n", "", environment, None);
        service.notify.set_read_timeout(Some(TIMEOUT * 2)).unwrap();
        let mut message = [0; 64];
        assert!(service.notify.recv(&mut message).is_err(), "{environment}: {message:?}");
    }
}

#[test]
fn a_watchdog_of_no_time_is_none() {
    let service = Service::ready("socket-path = 'vm.sock'\n", "", "WATCHDOG_USEC=0 WATCHDOG_PID=$$", None);
    assert!(is_served(&connect(&service.path("vm.sock"))));
    service.told_of(": a VM is attached\n");
}

#[test]
fn a_manager_that_does_not_read_holds_nothing_up_and_learns_the_outcome_once_it_reads() {
    let settings = "socket-path = 'vm.sock'\ncontrol = 'ctl'\n";
    let mut service = Service::ready(settings, "", "WATCHDOG_USEC=300000 WATCHDOG_PID=$$", None);
    service.fill();
    fs::write(service.path("vm.toml"), format!("{settings}ip-mtu = 9000\n")).unwrap();
    service.signal("HUP");
    let end = Instant::now() + PATIENCE;
    while !service.log().contains("ip-mtu cannot change") {
        assert!(Instant::now() < end, "it was not read again: {}", service.log());
        thread::sleep(Duration::from_millis(5));
    }
    let mut control = connect(&service.path("ctl"));
    control.set_read_timeout(Some(PATIENCE)).unwrap();
    control.write_all(b"GET /v1/status HTTP/1.1\r\nHost: vunet\r\n\r\n").unwrap();
    let mut answer = [0; 12];
    control.read_exact(&mut answer).expect("the control thread answers");
    assert_eq!(answer, *b"HTTP/1.1 200");
    // It reads: what it did not take is told again, and the newest of it.
    let told = service.told_of("READY=1\n");
    assert!(told.contains("ip-mtu cannot change"), "{told:?}");
    service.fill();
    service.signal("TERM");
    assert_eq!(service.ended().code(), Some(0));
}

#[test]
fn one_off_ends_with_the_vm_however_the_two_met() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let ends = |mut service: Service, how: &str| {
        assert_eq!(service.ended().code(), Some(0), "{how}: {}", service.log());
        service.told_of("STOPPING=1\n");
    };
    // A socket of its own; who looks and says nothing is no VM.
    let service = Service::ready("socket-path = 'vm.sock'\none-off = true\n", "", "", None);
    drop(connect(&service.path("vm.sock")));
    let vm = connect(&service.path("vm.sock"));
    assert!(is_served(&vm));
    drop(vm);
    ends(service, "--socket-path");
    // Passed, listening; by a manager, then by a parent.
    for (flags, environment) in [("--one-off", "LISTEN_FDS=1 LISTEN_PID=$$"), ("--one-off --fd 3", "")] {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let service = Service::ready("", flags, environment, Some(listener.into()));
        drop(connect(&path));
        let vm = connect(&path);
        assert!(is_served(&vm));
        drop(vm);
        ends(service, flags);
    }
    // Passed, connected: the VM that left cannot come back, whatever was asked for.
    for flags in ["--one-off --fd 3", "--fd 3"] {
        let (vm, ours) = UnixStream::pair().unwrap();
        let service = Service::ready("", flags, "", Some(ours.into()));
        assert!(is_served(&vm));
        drop(vm);
        ends(service, flags);
    }
    // The VM listens.
    let _ = fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let flags = format!("--one-off --client --socket-path {}", path.display());
    let service = Service::ready("", &flags, "", None);
    let (vm, _) = listener.accept().unwrap();
    assert!(is_served(&vm));
    drop(vm);
    ends(service, "--client");
    assert!(path.exists(), "it is the VM's");
}

#[test]
fn without_one_off_it_waits_for_the_vm_to_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let flags = format!("--client --socket-path {}", path.display());
    let service = Service::ready("", &flags, "", None);
    for _ in 0..2 {
        let (vm, _) = listener.accept().unwrap();
        assert!(is_served(&vm));
    }
    drop(service);
}
