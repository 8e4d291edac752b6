//! The control API while a guest is there: what `vunet ctl` shows of it, and what it does to it. What needs no
//! guest is in `tests/control`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use vunet_integration::lab::{GUEST, WORLD, vunet_binary};
use vunet_integration::world::ports;

use crate::bench::{Bench, Failure, Outcome, PATIENCE, Setup, bare, ensure, scenario};

/// A control socket, and `vunet ctl` on it.
struct Control {
    dir: TempDir,
}

/// `vunet ctl events`, until it is dropped.
struct Events {
    child: Child,
    lines: Receiver<String>,
}

impl Control {
    fn new() -> Control {
        Control { dir: tempfile::tempdir().expect("a directory") }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    fn setup(&self) -> Setup {
        Setup::new().vunet(&["--control", &self.socket().display().to_string()])
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(vunet_binary());
        command.args(["ctl", "--json", "--control"]).arg(self.socket()).args(args);
        command
    }

    fn ctl(&self, args: &[&str]) -> Result<Value, Failure> {
        let output = self.command(args).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vunet ctl {args:?}: {error}");
        match output.stdout.is_empty() {
            true => Ok(Value::Null),
            false => Ok(serde_json::from_slice(&output.stdout)?),
        }
    }

    fn flows(&self, filter: &[&str]) -> Result<Vec<Value>, Failure> {
        let args: Vec<&str> = ["flows"].iter().chain(filter).copied().collect();
        Ok(self.ctl(&args)?["flows"].as_array().cloned().unwrap_or_default())
    }

    /// Asks for flows until `is_so` of them.
    fn flows_until(&self, filter: &[&str], is_so: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let flows = self.flows(filter)?;
            if is_so(&flows) {
                return Ok(flows);
            }
            ensure!(Instant::now() < deadline, "flows never became what they should: {flows:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Listens to events: those after its return are heard.
    fn events(&self, args: &[&str]) -> Result<Events, Failure> {
        let all: Vec<&str> = ["events"].iter().chain(args).copied().collect();
        let mut child = self.command(&all).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().expect("a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let events = Events { child, lines };
        events.named("listening")?;
        Ok(events)
    }
}

impl Events {
    /// The first of these that `is_it`.
    fn wait(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value, Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                return Err(Failure(format!("no event {what}; there were {seen:?}")));
            };
            let event: Value = serde_json::from_str(&line)?;
            if is_it(&event) {
                return Ok(event);
            }
            seen.push(line);
        }
    }

    fn named(&self, name: &str) -> Result<Value, Failure> {
        self.wait(name, |event| event["event"] == name)
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a word to the echo server and has it back.
fn echoes(stream: &mut TcpStream) -> Outcome {
    stream.write_all(b"hello")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"hello", "{got:?}");
    Ok(())
}

fn remote(port: u16) -> String {
    format!("{WORLD}:{port}")
}

#[test]
fn status_shows_the_guest_and_what_it_negotiated() {
    let control = Control::new();
    scenario(&control.setup(), |_| {
        let status = control.ctl(&["status"])?;
        ensure!(status["attached"] == true, "{status}");
        ensure!(status["guest_address"] == GUEST.to_string(), "{status}");
        let features = status["features"].as_array().cloned().unwrap_or_default();
        ensure!(features.contains(&"MRG_RXBUF".into()), "{status}");
        let rings = status["rings"].as_array().cloned().unwrap_or_default();
        ensure!(
            rings.iter().any(|ring| ring["index"] == 0) && rings.iter().any(|ring| ring["index"] == 1),
            "{status}"
        );
        ensure!(rings.iter().any(|ring| ring["available"].as_u64() > Some(0)), "{status}");
        let leases = control.ctl(&["leases"])?;
        let lease = &leases["leases"][0];
        ensure!(lease["address"] == GUEST.to_string() && lease["state"] == "active", "{leases}");
        let counters = control.ctl(&["counters"])?;
        ensure!(counters["frames_from_guest"].as_u64() > Some(0), "{counters}");
        Ok(())
    });
}

#[test]
fn flows_are_listed_filtered_and_ended() {
    let control = Control::new();
    scenario(&control.setup(), |bench| {
        let mut kept = bench.connect_world(ports::ECHO)?;
        let mut ended: Vec<TcpStream> = Vec::new();
        for _ in 0..5 {
            ended.push(bench.connect_world(ports::SINK)?);
        }
        bench.in_guest(&["ping", "-c", "1", "-W", "5", &WORLD.to_string()])?;
        echoes(&mut kept)?;
        let all = control.flows(&[])?;
        ensure!(all.len() >= 7, "{all:?}");
        let sink = ports::SINK.to_string();
        let sinks = control.flows(&["--protocol", "tcp", "--port", &sink])?;
        ensure!(sinks.len() == 5, "{sinks:?}");
        for flow in &sinks {
            let is_it = flow["remote"] == remote(ports::SINK)
                && flow["began"] == "guest"
                && flow["guest"].as_str().is_some_and(|end| end.starts_with(&format!("{GUEST}:")));
            ensure!(is_it, "{flow}");
        }
        ensure!(control.flows(&["--protocol", "icmp"])?.len() == 1, "{all:?}");
        ensure!(control.flows(&["--remote", "192.0.2.77"])?.is_empty(), "a flow to nobody");
        let ids: Vec<&str> = sinks.iter().filter_map(|flow| flow["id"].as_str()).collect();
        control.ctl(&[&["kill"], &ids[..]].concat())?;
        for stream in &mut ended {
            let outcome = stream.read(&mut [0]);
            ensure!(outcome.is_err(), "a flow that was ended gave {outcome:?}");
        }
        ensure!(control.flows(&["--port", &sink])?.is_empty(), "ended flows are listed");
        let again = control.command(&["kill", ids[0]]).output()?;
        ensure!(!again.status.success(), "a flow was ended twice");
        echoes(&mut kept)
    });
}

#[test]
fn events_tell_of_guest_lease_and_of_flows_if_asked() {
    let control = Control::new();
    bare(&control.setup(), |bench| {
        let events = control.events(&["--flows"])?;
        let quiet = control.events(&[])?;
        bench.attach(&[])?;
        bench.lease()?;
        events.named("attached")?;
        let lease = events.named("lease")?;
        ensure!(lease["address"] == GUEST.to_string(), "{lease}");
        let mut stream = bench.connect_world(ports::ECHO)?;
        echoes(&mut stream)?;
        let to_echo = |name: &'static str| {
            move |event: &Value| event["event"] == name && event["remote"] == remote(ports::ECHO)
        };
        events.wait("flow_opened", to_echo("flow_opened"))?;
        let flow = control.flows(&["--port", &ports::ECHO.to_string()])?;
        control.ctl(&["kill", flow[0]["id"].as_str().unwrap_or_default()])?;
        events.wait("flow_closed", to_echo("flow_closed"))?;
        bench.detach()?;
        events.named("detached")?;
        while let Ok(line) = quiet.lines.try_recv() {
            ensure!(!line.contains("flow_"), "flows are told to who did not ask: {line}");
        }
        Ok(())
    });
}

/// Connects from the guest to the echo server within a moment.
fn may_connect(bench: &Bench) -> bool {
    bench.connect((WORLD, ports::ECHO), Duration::from_secs(2)).is_ok()
}

#[test]
fn draining_backend_ends_with_its_last_connection() {
    let control = Control::new();
    let setup = control.setup();
    scenario(&setup, |bench| {
        let mut stream = bench.connect_world(ports::ECHO)?;
        echoes(&mut stream)?;
        control.ctl(&["drain", "--timeout", "600"])?;
        ensure!(!may_connect(bench), "a connection began while the backend drained");
        echoes(&mut stream)?;
        ensure!(control.ctl(&["status"])?["draining"] == true, "not draining");
        let flow = control.flows_until(&["--port", &ports::ECHO.to_string()], |flows| flows.len() == 1)?;
        ensure!(flow[0]["state"] == "established", "{flow:?}");
        let all: Vec<Value> = control.flows(&[])?;
        let ids: Vec<&str> = all.iter().filter_map(|flow| flow["id"].as_str()).collect();
        control.ctl(&[&["kill"], &ids[..]].concat())?;
        let deadline = Instant::now() + PATIENCE;
        let ended = loop {
            if let Some(ended) = bench.vunet.process.ended() {
                break ended;
            }
            ensure!(Instant::now() < deadline, "it did not end");
            std::thread::sleep(Duration::from_millis(50));
        };
        ensure!(ended.code() == Some(0), "it ended with {ended:?}");
        // What it had of it is gone.
        bench.guest = None;
        bench.vunet = bench.lab.vunet(&setup.vunet)?;
        Ok(())
    });
}
